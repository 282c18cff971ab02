"""The table of docs/deepseek_v4.md: how far our DeepSeek-V4 is from the goldens and from float64, and what chunks do.

python scripts/compressed_goldens_table.py --goldens ../goldens
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastdeploy_dsa.models import load_model
from fastdeploy_dsa.ops import CacheFormat
from tests.kit.compressed_agreement import NOISE, Given
from tests.kit.compressed_serving import CompressedServing, ServedEntries
from tests.kit.goldens import COMPRESSED_CASES, GoldenCase, default_golden_folder
from tests.kit.reference_model.compressed import CompressedReferenceModel
from tests.kit.serving import in_chunks

FORMATS: tuple[CacheFormat, ...] = ("float32", "bfloat16", "fp8")
CHUNKS = (1, 3, 4, 5, 127, 128, 129)


def served(golden: GoldenCase, cache_format: CacheFormat, chunk: int) -> tuple[CompressedServing, ServedEntries]:
    (prompt,) = golden.prompts
    serving = CompressedServing(load_model(golden.folder), [prompt.fed_ids], cache_format=cache_format)
    (result,) = serving.run_recorded(in_chunks([len(prompt.fed_ids)], chunk))
    return serving, result


def row(golden: GoldenCase, cache_format: CacheFormat) -> str:
    (prompt,) = golden.prompts
    serving, whole = served(golden, cache_format, len(prompt.fed_ids))
    from_golden = np.abs(whole.logits[prompt.stored] - prompt.logits).max()
    stored = prompt.by_layer("topk")
    full = [(stored[layer] >= 0).all(1) for layer in stored]
    same = [(whole.positions[layer] == stored[layer]).all(1) for layer in stored]
    num_same = sum(int(equal[rows].sum()) for equal, rows in zip(same, full, strict=True))
    given = Given(CompressedReferenceModel.load(golden.folder), serving, whole)
    exact = given.forward(prompt.fed_ids).logits
    error, bound = np.abs(whole.logits - exact).max(), NOISE * np.abs(exact).max()
    equal = sum(np.array_equal(served(golden, cache_format, chunk)[1].logits, whole.logits) for chunk in CHUNKS)
    sets = f"{num_same} / {sum(int(rows.sum()) for rows in full)}"
    figures = f"{from_golden:.1e} | {sets} | {error:.1e} | {bound:.1e} | {equal} / {len(CHUNKS)}"
    return f"| {golden.name} | {cache_format} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goldens", type=Path, default=default_golden_folder())
    folder = parser.parse_args().goldens
    paths = [] if folder is None else sorted(folder.glob(COMPRESSED_CASES))
    if not paths:
        parser.error(f"--goldens: expected a folder with {COMPRESSED_CASES}, got {str(folder)!r}")
    print("| case | cache | from golden | sets as golden | from float64 | bound | chunk sizes with the same bits |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in paths:
        for cache_format in FORMATS:
            print(row(GoldenCase(path), cache_format), flush=True)


if __name__ == "__main__":
    main()
