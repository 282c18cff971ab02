"""What drafting brings on the demo model: tokens per target step, and tokens per second with and without.

    python scripts/bench_mtp.py [--markdown docs/mtp_benchmarks.md] [--repeats 5] [--max-tokens 96] [--batch 1 8]

Everything runs in one process. The greedy tokens with drafts are compared with those without first. Then both sides
take turns; a ratio is that of a pair of neighbouring runs, and medians are printed with the smallest and the largest.
Times are those of `generate` as its caller sees them; after the first run the prompts' beginnings are cached.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import paddle
from demo_model.corpus_text import load_corpus
from demo_model.recall import QUESTION_LINES, RUNNING_TEXT, recall_prompts

from fastdeploy_dsa import LLM, SamplingParams
from fastdeploy_dsa.engine.speculative.stats import SpeculativeStats
from fastdeploy_dsa.installation import DEMO_MODEL

CORES = len(os.sched_getaffinity(0))
REQUIRED = {"recall and text": 1.25, "wrong drafts": 0.95}
NOTES = """\
`recall and text` continues the corpus, answers questions about it and finds facts in prompts of 256 tokens, greedily.
`unfamiliar` continues words that no training text puts together, greedily. `temperature 1.5` samples the same.
`wrong drafts` continues the recall and text prompts with drafts replaced by the token the draft model finds least
likely: acceptance cannot be poorer. `ratio` is tokens per second with drafts over those without, the median of pairs
of neighbouring runs with the smallest and largest; `required` is what the project promises at batch 1 and, for wrong
drafts, everywhere. `per step` are tokens of a request per step of the target. `drafting` is the draft model's share of
the time. `adaptive` means that a request's drafts become fewer when they are rejected; `fixed` is the ablation."""


class Workload(NamedTuple):
    """Prompts and how they are continued."""

    name: str
    prompts: list[str]
    temperature: float = 0.0
    spoils_drafts: bool = False


class Choice(NamedTuple):
    """Drafts at most, and whether there may be fewer."""

    num_drafts: int
    adaptive: bool

    @property
    def text(self) -> str:
        return f"{self.num_drafts} {'adaptive' if self.adaptive else 'fixed'}"


@dataclass
class Result:
    """Of one workload, batch size and choice; seconds per token of each pair of runs."""

    workload: str
    batch: int
    choice: Choice
    without: list[float]
    with_drafts: list[float]
    stats: SpeculativeStats
    draft_share: float

    def row(self) -> list[str]:
        ratios = [a / b for a, b in zip(self.without, self.with_drafts, strict=True)]
        places = " ".join(f"{rate:.0%}" for rate in self.stats.acceptance_by_position) or "-"
        promised = REQUIRED.get(self.workload)
        counts = promised is not None and (self.batch == 1 or promised < 1.0) and self.choice.adaptive
        return [
            self.workload,
            str(self.batch),
            self.choice.text,
            f"{self.stats.tokens_per_round:.2f}",
            places,
            f"{1 / median(self.without):.0f}",
            f"{1 / median(self.with_drafts):.0f}",
            f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})",
            f"{promised:.2f}" if counts else "-",
            f"{self.draft_share:.0%}",
        ]


class SpoiledRunner:
    """The real draft model with its logits turned round."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.layer_ids, self.cost = runner.layer_ids, runner.cost

    def run(self, *given: Any, **sharing: Any) -> Any:
        outputs = self._runner.run(*given, **sharing)
        return outputs._replace(logits=-outputs.logits)


def workloads(count: int) -> list[Workload]:
    corpus, rng = load_corpus(), random.Random(7)
    texts = [
        (first + second).rstrip() for first, second in zip(corpus.sentences[::9], corpus.sentences[1::9], strict=False)
    ]
    questions = [f"Q: {question}\nA:" for question, _ in corpus.questions]
    recall = [
        prompt.text
        for layout in (QUESTION_LINES, RUNNING_TEXT)
        for prompt in recall_prompts(corpus, 256, count, 11, layout)
    ]
    mixed = [rng.choice(kind) for _ in range(count) for kind in (texts, questions, recall)][:count]
    words = sorted({word for sentence in corpus.sentences for word in sentence.split()})
    unfamiliar = [" ".join(rng.choices(words, k=20)) for _ in range(count)]
    return [
        Workload("recall and text", mixed),
        Workload("unfamiliar", unfamiliar),
        Workload("temperature 1.5", unfamiliar, temperature=1.5),
        Workload("wrong drafts", mixed, spoils_drafts=True),
    ]


def make_llm(options: argparse.Namespace, batch: int, choice: Choice | None, spoils: bool) -> LLM:
    config = None
    if choice is not None:
        config = {"method": "mtp", "num_speculative_tokens": choice.num_drafts, "adaptive": choice.adaptive}
    llm = LLM(
        DEMO_MODEL,
        cache_dtype=options.cache_dtype,
        num_threads=options.num_threads,
        max_num_seqs=batch,
        speculative_config=config,
    )
    if spoils and llm._proposer is not None:
        llm._proposer._look_ahead._runner = SpoiledRunner(llm._proposer._look_ahead._runner)
    return llm


def seconds_per_token(llm: LLM, workload: Workload, batch: int, max_tokens: int) -> tuple[float, list[list[int]]]:
    params = SamplingParams(max_tokens=max_tokens, temperature=workload.temperature, seed=1, ignore_eos=True)
    tokens: list[list[int]] = []
    begin = perf_counter()
    for first in range(0, len(workload.prompts), batch):
        tokens += [output.token_ids for output in llm.generate(workload.prompts[first : first + batch], params)]
    return (perf_counter() - begin) / sum(map(len, tokens)), tokens


def measure(options: argparse.Namespace, workload: Workload, batch: int, choices: Sequence[Choice]) -> list[Result]:
    plain = make_llm(options, batch, None, spoils=False)
    _, expected = seconds_per_token(plain, workload, batch, options.max_tokens)
    results = []
    for choice in choices:
        llm = make_llm(options, batch, choice, workload.spoils_drafts)
        _, tokens = seconds_per_token(llm, workload, batch, options.max_tokens)
        if workload.temperature == 0.0 and tokens != expected:
            raise RuntimeError(f"{workload.name}, {choice.text}: drafts change tokens")
        pairs = [
            [seconds_per_token(side, workload, batch, options.max_tokens)[0] for side in (plain, llm)]
            for _ in range(options.repeats)
        ]
        without, with_drafts = (list(column) for column in np.array(pairs).T)
        times = llm.time_split()
        share = times.draft / (times.model + times.draft + times.engine)
        results.append(Result(workload.name, batch, choice, without, with_drafts, llm.speculative_stats(), share))
        print(" | ".join(results[-1].row()), flush=True)
    return results


def processor() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def page(results: Sequence[Result], load: float, command: str) -> str:
    busy = f"; BUSY with other work, so the times are not reliable: {CORES} cores" if load > CORES / 2 else ""
    header = (
        "workload | batch | drafts | per step | accepted by position | tokens/s without | with | ratio | required | "
        "drafting"
    )
    lines = [
        "# Benchmarks of drafting",
        "",
        "Written by the command below; do not edit.",
        "",
        f"    {command}",
        "",
        *NOTES.splitlines(),
        "",
        "| machine | |",
        "| --- | --- |",
        f"| CPU | {processor()}, {CORES} cores |",
        f"| load average at the start | {load:.2f}{busy} |",
        f"| Paddle | {paddle.version.full_version} |",
        f"| date | {date.today().isoformat()} |",
        "",
        f"| {header} |",
        "| --- " * (header.count("|") + 1) + "|",
        *(f"| {' | '.join(result.row())} |" for result in results),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="page to write")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--prompts", type=int, default=8, help="of every workload")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-threads", type=int, default=0)
    parser.add_argument("--cache-dtype", default="auto")
    options = parser.parse_args()

    load = os.getloadavg()[0]
    results = []
    for workload in workloads(options.prompts):
        for batch in options.batch:
            if workload.name == "recall and text":
                choices = [Choice(count, adaptive=True) for count in options.drafts]
            else:
                choices = [Choice(3, adaptive=True), Choice(3, adaptive=False)]
            results += measure(options, workload, batch, choices)
    if options.markdown is not None:
        command = " ".join(["python scripts/bench_mtp.py", *sys.argv[1:]])
        options.markdown.write_text(page(results, load, command), encoding="utf-8")


if __name__ == "__main__":
    main()
