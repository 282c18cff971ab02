#!/usr/bin/env bash
# DeepSeek-V3.2 or GLM-5 with FastDeploy, and drafts by the checkpoint's own MTP layer.
#
#   scripts/serve_mtp.sh MODEL [FLAG...] [--dry-run]        flags of FastDeploy; the last of a name counts
set -euo pipefail
source "$(dirname "$0")/serve_common.sh"
require_model "$@"

launch "${fastdeploy[@]}" --model "$1" "${features[@]}" \
    --speculative-config '{"method": "mtp", "num_speculative_tokens": 1, "num_model_steps": 1, "model": "'"$1"'"}' \
    "${@:2}"
