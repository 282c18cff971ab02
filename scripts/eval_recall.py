"""Measures recall with the engine: a fact somewhere in a prompt, a question at its end.

    python scripts/eval_recall.py --lengths 256 512 1024 --prompts 100

The facts are held out from training; prompt i depends on the seed, the length, the layout and the number of prompts.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

from demo_model.corpus_text import load_corpus
from demo_model.recall import QUESTION_LINES, RUNNING_TEXT, RecallPrompt, recall_prompts

from fastdeploy_dsa import LLM, SamplingParams

_SHIPPED_MODEL = Path(__file__).parents[1] / "fastdeploy_dsa" / "demo_model"
_LAYOUTS = {"lines": QUESTION_LINES, "running": RUNNING_TEXT}
_NUM_DEPTHS = 5


def main() -> None:
    options = _parse_options()
    llm = LLM(options.model, cache_dtype=options.cache_dtype)
    corpus = load_corpus()
    depths = [f"{depth / _NUM_DEPTHS:.0%}-{(depth + 1) / _NUM_DEPTHS:.0%}" for depth in range(_NUM_DEPTHS)]
    print("| prompt tokens | recall |", " | ".join(f"fact at {depth}" for depth in depths), "| seconds |")
    print("| --- " * (_NUM_DEPTHS + 3) + "|")
    for length in options.lengths:
        prompts = recall_prompts(corpus, length, options.prompts, options.seed, _LAYOUTS[options.layout])
        started = time.perf_counter()
        answers = _answers(llm, prompts)
        seconds = time.perf_counter() - started
        print(f"| {length} |", " | ".join(_shares(prompts, answers)), f"| {seconds:.0f} |", flush=True)
        if options.show_misses:
            _print_misses(prompts, answers)


def _answers(llm: LLM, prompts: list[RecallPrompt]) -> list[str]:
    longest = max(len(prompt.reply.encode()) for prompt in prompts) + 1  # one for the end token
    outputs = llm.generate([prompt.text for prompt in prompts], SamplingParams(max_tokens=longest, temperature=0.0))
    return [output.text for output in outputs]


def _shares(prompts: list[RecallPrompt], answers: list[str]) -> list[str]:
    """Exactly right replies as hits/prompts: of all prompts, then of each depth."""
    asked: Counter[int] = Counter()
    right: Counter[int] = Counter()
    for prompt, answer in zip(prompts, answers, strict=True):
        depth = min(int(prompt.depth * _NUM_DEPTHS), _NUM_DEPTHS - 1)
        asked[depth] += 1
        right[depth] += answer == prompt.reply
    total = f"{right.total()}/{asked.total()} = {right.total() / asked.total():.1%}"
    return [total, *(f"{right[depth]}/{asked[depth]}" for depth in range(_NUM_DEPTHS))]


def _print_misses(prompts: list[RecallPrompt], answers: list[str]) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        if answer != prompt.reply:
            print(f"  depth {prompt.depth:.2f} {prompt.text[-60:]!r}: {answer!r} instead of {prompt.reply!r}")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=_SHIPPED_MODEL, help="model folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024], help="prompt tokens, bos included")
    parser.add_argument("--prompts", type=int, default=100, help="prompts of each length")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache-dtype", default="auto", help="as LLM takes it: auto, float32, bfloat16 or fp8")
    parser.add_argument("--layout", choices=_LAYOUTS, default="lines", help="how the question is put")
    parser.add_argument("--show-misses", action="store_true", help="print every wrong answer")
    return parser.parse_args()


if __name__ == "__main__":
    main()
