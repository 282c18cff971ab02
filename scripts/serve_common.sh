# Sourced by serve_*.sh. `launch COMMAND...` becomes the command, or prints it if the script's first argument is
# --dry-run. PYTHON names the interpreter.
# shellcheck shell=bash disable=SC2034
python="${PYTHON:-python3}"
if [ "${1-}" = --dry-run ]; then
    shift
    launch() {
        printf '%q ' "$@"
        echo
    }
else
    launch() { exec "$@"; }
fi

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
