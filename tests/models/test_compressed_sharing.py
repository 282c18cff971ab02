"""Index sharing of DeepSeek-V4 counts the layers of ratio 4 alone, whatever lies between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastdeploy_dsa.attention.deepseek_v4.indexer as indexer_module
from fastdeploy_dsa.models import load_model, read_runnable_config
from tests.kit.compare import assert_same
from tests.kit.compressed_serving import CompressedServing
from tests.kit.serving import in_chunks, in_one_step
from tests.kit.tiny_compressed_model import VOCAB_SIZE, write_tiny_compressed_model

RATIOS = [4, 128, 4, 0, 4, 128, 4, 0]
SELECTING = (0, 2, 4, 6)
SEQUENCE = np.random.default_rng(9).integers(0, VOCAB_SIZE, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layer of ratio 4 has an indexer in the checkpoint."""
    path = tmp_path_factory.mktemp("sharing") / "model"
    return write_tiny_compressed_model(path, num_hidden_layers=7, compress_ratios=RATIOS)


def serving(folder: Path, **overrides: Any) -> CompressedServing:
    config = read_runnable_config(folder, overrides)
    return CompressedServing(load_model(folder, config=config), [SEQUENCE])


@pytest.mark.parametrize(
    ("overrides", "letters"),
    [
        ({"index_topk_pattern": "FSFS"}, "FSFS"),
        ({"index_topk_pattern": "FSSS"}, "FSSS"),
        ({"index_topk_freq": 2}, "FFSF"),
        ({"indexer_types": ["full", "full", "shared", "shared"]}, "FFSS"),
        ({"index_topk_pattern": "FSSS", "use_index_cache": False}, "FFFF"),
    ],
)
def test_a_shared_layer_attends_to_the_selection_of_the_nearest_full_layer_below(
    folder: Path, overrides: dict[str, Any], letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = serving(folder, **overrides)
    full_layers = [layer for layer, letter in zip(SELECTING, letters, strict=True) if letter == "F"]
    assert [i for i, layer in enumerate(shared.model.layers) if layer.attention.indexer is not None] == full_layers
    for role in (
        "indexer",
        "idx_comp_state",
    ):  # layers that share keep neither index keys nor the states they come from
        assert sorted(layer for name, layer in shared.caches if name == role) == full_layers
    (got,) = shared.run(in_one_step([len(SEQUENCE)]))

    # The same model with all indexers at work, whose choices are replaced where a layer shares.
    select, calls, last = indexer_module.index_select, iter(letters), []

    def shared_select(**given: Any) -> Any:
        if next(calls) == "F":
            last[:] = [select(**given)]
        return last[0]

    monkeypatch.setattr(indexer_module, "index_select", shared_select)
    (expected,) = serving(folder).run(in_one_step([len(SEQUENCE)]))
    assert_same(got, expected, "logits")


def test_sharing_changes_the_result_and_chunks_do_not(folder: Path) -> None:
    plan = in_one_step([len(SEQUENCE)])
    (full,), (shared,) = (serving(folder, **changes).run(plan) for changes in ({}, {"index_topk_pattern": "FSSS"}))
    assert np.abs(full - shared).max() > 0.01
    (chunked,) = serving(folder, index_topk_pattern="FSSS").run(in_chunks([len(SEQUENCE)], 7))
    assert_same(chunked, shared, "logits")


def test_a_pattern_with_a_letter_per_backbone_layer_is_told_what_is_counted(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"E05: .*expected 4 entries, one per layer with an indexer"):
        read_runnable_config(folder, {"index_topk_pattern": "FFFFFFF"})
