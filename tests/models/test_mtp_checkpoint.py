"""Checkpoints with and without an MTP layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastdeploy_dsa.config import DsaConfig
from fastdeploy_dsa.models import load_model, load_model_with_mtp
from fastdeploy_dsa.models.checkpoint import CheckpointError
from tests.kit.tiny_model import write_tiny_model
from tests.models.mtp_checkpoint import WEIGHTS, write_tiny_mtp_model


def test_embedding_and_head_are_the_targets_unless_the_checkpoint_brings_its_own(tmp_path: Path) -> None:
    target, (draft,) = load_model_with_mtp(write_tiny_mtp_model(tmp_path / "shared"))
    assert draft._embed_tokens is target._embed_tokens
    assert draft._lm_head is target._lm_head
    folder = write_tiny_mtp_model(tmp_path / "own", brings_own=True)
    target, (draft,) = load_model_with_mtp(folder)
    weights, prefix = load_file(folder / WEIGHTS), f"model.layers.{draft.layer_id}."
    assert np.array_equal(draft._embed_tokens.numpy(), weights[f"{prefix}embed_tokens.weight"])
    assert np.array_equal(draft._lm_head.numpy(), weights[f"{prefix}shared_head.head.weight"])
    assert not np.array_equal(draft._lm_head.numpy(), target._lm_head.numpy())


def test_a_tied_head_is_the_embedding_for_drafting_too(tmp_path: Path) -> None:
    _, (draft,) = load_model_with_mtp(write_tiny_mtp_model(tmp_path / "tied", tie_word_embeddings=True))
    assert draft._lm_head is draft._embed_tokens


def test_a_model_that_does_not_draft_skips_the_mtp_layer(tmp_path: Path) -> None:
    assert len(load_model(write_tiny_mtp_model(tmp_path / "mtp")).layers) == 3


def test_a_config_without_mtp_layers_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "none")
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers: expected 1 or more, .*, got 0 in .*none"):
        load_model_with_mtp(folder)


def test_a_config_that_promises_more_layers_than_the_checkpoint_has_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_mtp_model(tmp_path / "one")
    config = DsaConfig.from_pretrained(folder, overrides={"num_nextn_predict_layers": 2})
    with pytest.raises(CheckpointError, match=r"tensors are missing: model.layers.4.eh_proj.weight"):
        load_model_with_mtp(folder, config=config)


def test_weights_that_the_config_promises_and_the_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "promised", num_nextn_predict_layers=1)
    with pytest.raises(CheckpointError, match=r"tensors are missing: model.layers.3.eh_proj.weight"):
        load_model_with_mtp(folder)
    folder = write_tiny_mtp_model(tmp_path / "incomplete")
    weights = load_file(folder / WEIGHTS)
    del weights["model.layers.3.hnorm.weight"]
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors are missing: model.layers.3.hnorm.weight"):
        load_model_with_mtp(folder)
