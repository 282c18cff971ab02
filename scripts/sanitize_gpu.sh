#!/usr/bin/env bash
# compute-sanitizer over a few calls of every kernel, all four tools at once; needs a GPU and a library with CUDA kernels.
#
#   scripts/sanitize_gpu.sh [PYTEST OPTION...]        such as --c-library PATH; PYTHON names the interpreter
#
# Arrays lie in device memory of exactly their size, so that memcheck sees the first byte beside them. A tool that runs
# longer than LIMIT seconds (60) is stopped and counts as failed.
set -u
cd "$(dirname "$0")/.."

logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
grid=tests/ops/test_gpu_grid.py
selection=(
    tests/ops/test_gpu.py
    tests/ops/test_gpu_compressed.py
    "$grid::test_attention_of_any_number_of_rows[c_cuda-16-4]"
    "$grid::test_attention_of_any_number_of_rows[c_cuda-64-133]"
    "$grid::test_attention_of_any_number_of_rows[c_cuda-128-65]"
    "$grid::test_rows_that_are_empty_in_parts[c_cuda-16-64]"
    "$grid::test_scores_of_draft_rows[c_cuda-64-3]"
    "$grid::test_scores_of_a_prompt[c_cuda-64-65]"
    "$grid::test_scores_of_a_prompt[c_cuda-32-5]"
    "$grid::test_topk_of_rows_of_every_length[c_cuda-100-random]"
    "$grid::test_topk_of_rows_of_every_length[c_cuda-2048-close]"
    "tests/ops/test_widened_rows.py::test_rows_widened_for_all_give_the_attention_of_the_definition[c_cuda]"
)
calls="uses_default_stream or too_large or wrong_request or clamped or skipped_alone or grid or of_the_definition"

run_tool() {
    # To racecheck a barrier in memory that one thread initialises and then arrives at looks like a race; those are
    # warnings.
    timeout -k 5 "${LIMIT:-60}" compute-sanitizer --tool "$1" --error-exitcode 1 --print-limit 20 --print-level error \
        "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider --only-gpu --exact-memory -k "$calls" \
        "${selection[@]}" "${@:2}" >"$logs/$1" 2>&1
    echo "$?" >"$logs/$1.status"
}

tools=(memcheck racecheck synccheck initcheck)
for tool in "${tools[@]}"; do run_tool "$tool" "$@" & done
wait

failed=0
for tool in "${tools[@]}"; do
    status="$(cat "$logs/$tool.status")"
    echo "== $tool: exit status $status"
    grep -E "SUMMARY|passed|failed" "$logs/$tool" || tail -5 "$logs/$tool"
    [ "$status" = 0 ] && continue
    failed=1
    # The same fault of many threads is one line.
    grep -E "^=+ +(Error|Warning|Invalid|Uninitialized|Barrier|Program hit|and |at )" "$logs/$tool" |
        cut -c 1-200 | sort | uniq -c | sort -rn | head -20
done
exit "$failed"
