# Sourced by serve_*.sh: takes --dry-run and --help out of the script's arguments, wherever they stand. `launch COMMAND...`
# becomes the command, or prints it with --dry-run. PYTHON names the interpreter.
# shellcheck shell=bash disable=SC2034
python="${PYTHON:-python3}"

# The comment that the script begins with.
usage() { sed -n -e 1d -e '/^#/!q' -e 's/^#$//' -e 's/^# //' -e p "$0"; }

require_model() {
    case "${1-}" in
        '' | -*)
            usage >&2
            echo "$0: expected the folder of the model first, got ${1:-nothing}" >&2
            exit 2
            ;;
    esac
}

launch() { exec "$@"; }
arguments=()
for argument in "$@"; do
    case "$argument" in
        --help | -h)
            usage
            exit 0
            ;;
        --dry-run)
            launch() {
                printf '%q ' "$@"
                echo
            }
            ;;
        *) arguments+=("$argument") ;;
    esac
done
set -- "${arguments[@]}"

# FastDeploy's API server with the plug-in of this package.
fastdeploy=(
    env FD_PLUGINS=fastdeploy_dsa FD_ATTENTION_BACKEND=DSA_ATTN ENABLE_V1_KVCACHE_MANAGER=1
    "$python" -m fastdeploy.entrypoints.openai.api_server
)
# What FastDeploy's own launch of a sparse model turns off or keeps short.
features=(
    --tensor-parallel-size 8
    --enable-prefix-caching
    --enable-chunked-prefill
    --graph-optimization-config '{"use_cudagraph": true}'
    --max-model-len 131072
    --max-num-batched-tokens 8192
    --max-num-seqs 64
    --block-size 64
    --quantization block_wise_fp8
    --gpu-memory-utilization 0.85
)
