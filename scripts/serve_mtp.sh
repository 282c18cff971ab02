#!/usr/bin/env bash
# DeepSeek-V3.2 or GLM-5 with FastDeploy, and drafts by the checkpoint's own MTP layer.
#
#   scripts/serve_mtp.sh [--dry-run] MODEL [FLAG...]        flags of FastDeploy; the last of a name counts
set -euo pipefail
source "$(dirname "$0")/serve_common.sh"

launch "${fastdeploy[@]}" --model "${1:?expected the folder of the model}" "${features[@]}" \
    --speculative-config '{"method": "mtp", "num_speculative_tokens": 1, "num_model_steps": 1, "model": "'"$1"'"}' \
    "${@:2}"
