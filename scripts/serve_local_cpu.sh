#!/usr/bin/env bash
# The demo model with this package's own engine and server, on the CPU; docs/server.md.
#
#   scripts/serve_local_cpu.sh [OPTION...] [--dry-run]        of `fastdeploy-dsa serve`; the last of a name counts
set -euo pipefail
source "$(dirname "$0")/serve_common.sh"

launch "$python" -m fastdeploy_dsa serve \
    --device cpu \
    --host 127.0.0.1 \
    --port 8000 \
    --max-num-seqs 32 \
    --max-num-batched-tokens 512 \
    "$@"
