"""Trains the demo model and writes its folder.

Two runs give the model that ships:

    python scripts/train_demo_model.py --state demo.pt --out first_model
    python scripts/train_demo_model.py --refine demo.pt --out fastdeploy_dsa/demo_model

docs/demo_model.md has the seeds, the time and the figures of the model that ships.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_model import evaluate
from demo_model.checkpoint import load_model, save_model
from demo_model.config import DemoConfig
from demo_model.corpus_text import Corpus, load_corpus
from demo_model.model import DemoModel, Reading
from demo_model.recall import QUESTION_LINES, RUNNING_TEXT, recall_prompts
from demo_model.tokenizer import save_tokenizer
from demo_model.train import FROM_SCRATCH, REFINING, Trainer

_CHECK_SEED = 1


def main() -> None:
    options = _parse_options()
    if options.report:
        report(options.report, options.device)
    else:
        train(options)


def train(options: argparse.Namespace) -> None:
    """Runs one recipe; the folder is written after every stage."""
    recipe = REFINING if options.refine else FROM_SCRATCH
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # one graph per kind of layer, length and draft iteration
    model = DemoModel(DemoConfig()).to(options.device)
    if options.refine:
        model.load_state_dict(torch.load(options.refine, map_location=options.device))
    for layer in model.layers:
        layer.compile(dynamic=False)  # takes effect in the stages that ask for it
    trainer = Trainer(model, recipe, options.workers)
    corpus = load_corpus()
    started = time.perf_counter()
    for number, stage in enumerate(recipe.stages):
        trainer.run_stage(number)
        reading = Reading.SELECTED if stage.reading is Reading.SELECTED else Reading.ALL
        _report_recall(model, corpus, (256, 512, 1024), 96, reading)
        save_model(model, options.out)
        if options.state:
            trainer.save(options.state)
    print(f"trained for {time.perf_counter() - started:.0f} s", flush=True)
    save_tokenizer(options.out)
    report(options.out, options.device)


@torch.compiler.set_stance("force_eager")
def report(folder: Path, device: str) -> None:
    """Figures of the saved model, weights rounded to bfloat16, computed in float32."""
    model = load_model(folder).to(device)
    corpus = load_corpus()
    for layout in (QUESTION_LINES, RUNNING_TEXT):
        _report_recall(model, corpus, (256, 512, 1024, 2048), 300, Reading.SELECTED, layout)
    print(f"corpus loss {evaluate.corpus_loss(model, corpus):.4f} nats per byte")
    drafts = evaluate.acceptance(model, evaluate.acceptance_prompts(corpus, 48, _CHECK_SEED), 64)
    print(f"drafts accepted {_rounded(drafts.by_draft)}, tokens per round {_rounded(drafts.tokens_per_round)}")


@torch.compiler.set_stance("force_eager")
def _report_recall(
    model: DemoModel,
    corpus: Corpus,
    lengths: tuple[int, ...],
    count: int,
    reading: Reading,
    layout: str = QUESTION_LINES,
) -> None:
    for length in lengths:
        score = evaluate.recall(model, recall_prompts(corpus, length, count, _CHECK_SEED, layout), length, reading)
        line = {"recall": length, "layout": layout, "reading": reading.value, "correct": round(score.correct, 4)}
        print(json.dumps(line | {"by_depth": _rounded(score.by_depth)}), flush=True)


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else round(value, 3) for value in values]


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, help="train and write this model folder")
    task.add_argument("--report", type=Path, help="only print the figures of this model folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="processes that compose documents")
    parser.add_argument("--state", type=Path, help="float32 weights are written here after each stage")
    parser.add_argument("--refine", type=Path, help="float32 weights of a first run to go on from")
    return parser.parse_args()


if __name__ == "__main__":
    main()
