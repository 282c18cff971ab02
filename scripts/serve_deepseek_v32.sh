#!/usr/bin/env bash
# DeepSeek-V3.2 with FastDeploy on 8 GPUs of 141 GB. On two nodes of 8 GPUs of 80 GB, run on both with
# --tensor-parallel-size 16 --ips NODE,NODE.
#
#   scripts/serve_deepseek_v32.sh MODEL [FLAG...] [--dry-run]        flags of FastDeploy; the last of a name counts
set -euo pipefail
source "$(dirname "$0")/serve_common.sh"
require_model "$@"

launch "${fastdeploy[@]}" --model "$1" "${features[@]}" "${@:2}"
