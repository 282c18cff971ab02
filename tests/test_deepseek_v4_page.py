"""docs/deepseek_v4.md: its tables are what the layouts, the selector and the goldens say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastdeploy_dsa.attention.deepseek_v4.select import ATTENTION_CLASSES
from fastdeploy_dsa.cache_plan import compressed_sizes
from fastdeploy_dsa.compressed_cache_layout import compressed_spans
from fastdeploy_dsa.config import CompressedConfig
from fastdeploy_dsa.ops import CacheFormat
from tests.kit.compressed_mistakes import MISTAKES
from tests.models.test_compressed_reference import SHAPES

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "deepseek_v4.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
FORMATS: tuple[CacheFormat, ...] = ("fp8", "bfloat16", "float32")
CONFIG = CompressedConfig.from_pretrained(ROOT / "tests" / "configs" / "deepseek_v4_flash.json")


@pytest.mark.parametrize(("column", "cache_format"), tuple(enumerate(FORMATS, start=2)), ids=FORMATS)
def test_the_table_of_caches_is_the_layout(column: int, cache_format: CacheFormat) -> None:
    spans = compressed_spans(
        compressed_sizes(CONFIG), cache_format=cache_format, layer_ids=tuple(range(CONFIG.num_layers))
    )
    expected = {}
    for span in spans:
        (ratio,) = {CONFIG.ratio(layer) for layer in span.spec.layer_ids} if span.spec.role != "swa" else {1}
        has_two = span.spec.role in ("key", "comp_state")
        name = f"{span.spec.role}, ratio {ratio}" if has_two else span.spec.role
        kept = "all tokens" if span.live_tokens is None else f"last {span.live_tokens} tokens"
        expected[name] = (str(span.block_tokens), str(span.spec.bytes_per_block), kept)
    listed = {row[0]: (row[1], row[column], row[5]) for row in ROWS if len(row) == 6 and row[1].isdigit()}
    assert listed == expected


def test_the_table_of_layers_names_their_caches() -> None:
    spans = compressed_spans(compressed_sizes(CONFIG), cache_format="fp8", layer_ids=tuple(range(44)))
    for kind, layer in (("swa", 0), ("c4a", 2), ("c128a", 3)):
        (row,) = [row for row in ROWS if row[0] == f"`{kind}`"]
        roles = {span.spec.role for span in spans if layer in span.spec.layer_ids}
        assert set(re.findall(r"`(\w+)`", row[2])) == roles
        assert CONFIG.layer_kind(layer) == kind


def test_the_table_of_platforms_is_the_selectors_list() -> None:
    listed = [(row[0].strip("`"), row[2]) for row in ROWS if row[0].startswith("`DeepseekV4")]
    assert listed == [(cls.__name__, ", ".join(cls.cache_formats)) for cls in ATTENTION_CLASSES]


def test_the_figures_are_within_their_bounds_and_complete() -> None:
    figures = [row for row in ROWS if len(row) == 7 and row[1] in FORMATS]
    assert [row[:2] for row in figures] == [
        [case, cache] for case in ("v4_window128", "v4_window8") for cache in ("float32", "bfloat16", "fp8")
    ]
    for row in figures:
        assert float(row[4]) <= float(row[5]), row
        same, rows = map(int, row[3].split(" / "))
        assert same == rows or row[1] == "fp8", row
        assert row[6] == "7 / 7", row
        assert float(row[2]) <= {"float32": 2.2e-4, "bfloat16": 0.11, "fp8": 0.75}[row[1]], row


def test_the_counts_of_the_text_are_those_of_the_tests() -> None:
    assert f"on {len(SHAPES)} random checkpoints" in PAGE
    assert f"Each of the {len(MISTAKES)} wrong" in PAGE
