"""Print how far the model is from the golden fixtures, as a Markdown table.

python scripts/goldens_table.py --goldens ../goldens
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # the tests' kit is no installed package

from fastdeploy_dsa.models import DeepseekV32ForCausalLM, load_model  # noqa: E402 - after the path
from fastdeploy_dsa.ops import CacheFormat  # noqa: E402
from tests.kit.agreement import check_agreement  # noqa: E402
from tests.kit.goldens import CASES, GoldenCase, default_golden_folder  # noqa: E402
from tests.kit.reference_model import ReferenceModel  # noqa: E402
from tests.kit.rounding_noise import logit_bound  # noqa: E402
from tests.kit.selections import forced, mask_of_positions  # noqa: E402
from tests.kit.serving import Served, Serving, in_one_step, prompts_then_tokens  # noqa: E402

FORMATS: tuple[CacheFormat, ...] = ("float32", "bfloat16", "fp8")
HEADER = (
    "| case | cache | from golden | bound | sets as golden | from float64 | bound | sets as float64 |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=default_golden_folder(), help="folder of the golden fixtures")
    folder = parser.parse_args().goldens
    if folder is None:
        parser.error("--goldens: no golden fixtures near the repository, so their folder is needed")
    print("\n".join(HEADER))
    for name in CASES:
        for line in lines(GoldenCase(folder / name)):
            print(line, flush=True)


def lines(case: GoldenCase) -> Iterator[str]:
    """A row per cache format, over all prompts of the case, which run as one batch."""
    model, reference = load_model(case.folder), ReferenceModel.load(case.folder)
    sequences = [prompt.fed_ids for prompt in case.prompts]
    plan = prompts_then_tokens([len(prompt.prompt_ids) for prompt in case.prompts], [len(ids) for ids in sequences])
    for cache_format in FORMATS:
        served = Serving(model, sequences, cache_format=cache_format).run_recorded(plan)
        if cache_format == "float32":
            logits, bound = [one.logits for one in served], case.tolerances.logits
        else:
            logits, bound = with_stored_selections(case, model, reference, cache_format)
        moved = max(np.abs(w[p.stored] - p.logits).max() for p, w in zip(case.prompts, logits, strict=True))
        agreements = [
            check_agreement(reference, ids, one, cache_format) for ids, one in zip(sequences, served, strict=True)
        ]
        worst = max(agreements, key=lambda agreement: agreement.logit_error / agreement.logit_bound)
        identical, rows = (sum(getattr(a, name) for a in agreements) for name in ("identical_rows", "rows"))
        yield (
            f"| {case.name} | {cache_format} | {moved:.1e} | {bound:.1e} "
            f"| {rows_as_stored(case, served, model.config.index_topk)} / {rows} "
            f"| {worst.logit_error:.1e} | {worst.logit_bound:.1e} | {identical} / {rows} |"
        )


def with_stored_selections(
    case: GoldenCase, model: DeepseekV32ForCausalLM, reference: ReferenceModel, cache_format: CacheFormat
) -> tuple[list[np.ndarray], float]:
    """Logits of every prompt and the largest bound."""
    logits, bounds = [], []
    for prompt in case.prompts:
        masks = {layer: mask_of_positions(rows) for layer, rows in prompt.by_layer("topk").items()}
        with forced(list(masks.values())):
            serving = Serving(model, [prompt.fed_ids], cache_format=cache_format)
            logits += serving.run(in_one_step([len(prompt.fed_ids)]))
        bounds.append(logit_bound(reference, prompt.fed_ids, masks, cache_format))
    return logits, max(bounds)


def rows_as_stored(case: GoldenCase, served: Sequence[Served], topk: int) -> int:
    """Rows with topk keys whose set is the stored one."""
    return sum(
        int((positions == prompt.by_layer("topk")[layer])[topk - 1 :].all(1).sum())
        for prompt, one in zip(case.prompts, served, strict=True)
        for layer, positions in one.positions.items()
    )


if __name__ == "__main__":
    main()
