"""The demo model finds facts again through the tokens its indexers select."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "eval_recall.py"
NUM_PROMPTS = 25
# Of 25 prompts, 21 or fewer right has a chance below 4 % even at the promised 95 %, and the model is better than that;
# a model that has lost its selection answers none (docs/demo_model.md).
LEAST_RIGHT = 22


@pytest.mark.parametrize("cache_dtype", ["float32", "fp8"])
def test_a_fact_anywhere_in_four_times_index_topk_tokens_is_answered(cache_dtype: str) -> None:
    command = [sys.executable, str(SCRIPT), "--lengths", "256", "--prompts", str(NUM_PROMPTS), "--seed", "77"]
    done = subprocess.run([*command, "--cache-dtype", cache_dtype], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (right,) = re.findall(rf"^\| 256 \| (\d+)/{NUM_PROMPTS} = ", done.stdout, re.MULTILINE)
    assert int(right) >= LEAST_RIGHT, done.stdout
