"""From a Hugging Face folder to a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import paddle
from paddle import Tensor

from fastdeploy_dsa.config import DsaConfig
from fastdeploy_dsa.models.checkpoint import load_weights
from fastdeploy_dsa.models.deepseek_v32 import DeepseekV32ForCausalLM, weight_shapes
from fastdeploy_dsa.models.mtp import MtpModel, mtp_weight_shapes, optional_mtp_weight_shapes
from fastdeploy_dsa.row_invariance import use_one_math_thread

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


def load_model(
    folder: str | Path,
    *,
    config: DsaConfig | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> DeepseekV32ForCausalLM:
    """Read config.json and the safetensors files of a folder and build the model in float32.

    From then on Paddle's matrix products run on one thread in this process, see row_invariance.py.

    Args:
        folder: A Hugging Face checkpoint.
        config: What config.json says, read already; None: it is read here.
        on_tensor: Called with (tensors read, tensors in all).

    Raises:
        ValueError: The configuration is refused, or a tensor is unknown, missing, misshapen, truncated or not finite;
            the message names the file or the tensor.
    """
    config = config or DsaConfig.from_pretrained(folder)
    tensors = _load_tensors(folder, config, shapes=weight_shapes(config), optional={}, on_tensor=on_tensor)
    return DeepseekV32ForCausalLM(config, tensors)


def load_model_with_mtp(
    folder: str | Path,
    *,
    config: DsaConfig | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> tuple[DeepseekV32ForCausalLM, tuple[MtpModel, ...]]:
    """As load_model, with the checkpoint's draft models, which share what tensors they can.

    Raises:
        ValueError: As load_model, and if the checkpoint has no MTP layer.
    """
    config = config or DsaConfig.from_pretrained(folder)
    if config.num_nextn_predict_layers == 0:
        raise ValueError(f"num_nextn_predict_layers: expected 1 or more, the layers that draft, got 0 in {folder}")
    tensors = _load_tensors(
        folder,
        config,
        shapes=weight_shapes(config) | mtp_weight_shapes(config),
        optional=optional_mtp_weight_shapes(config),
        on_tensor=on_tensor,
    )
    drafts = tuple(MtpModel(config, tensors, index) for index in range(config.num_nextn_predict_layers))
    return DeepseekV32ForCausalLM(config, tensors), drafts


def _load_tensors(
    folder: str | Path,
    config: DsaConfig,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    on_tensor: Callable[[int, int], None] | None,
) -> dict[str, Tensor]:
    arrays = load_weights(
        folder,
        shapes=shapes,
        optional=optional,
        leftover_reason=lambda name: _leftover_reason(name, config),
        weight_block_size=config.weight_block_size,
        on_tensor=on_tensor,
    )
    use_one_math_thread()
    tensors = {}
    for name in list(arrays):  # an array dies as its tensor is made: two copies of a checkpoint may not fit
        tensors[name] = paddle.to_tensor(arrays.pop(name))
    return tensors


def _leftover_reason(name: str, config: DsaConfig) -> str | None:
    """Why a tensor that the model does not need may stand in a checkpoint; None if it may not."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "the output head is tied to the embedding"
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return None
    layer, rest = int(match[1]), match[2]
    draft_layers = max(config.num_nextn_predict_layers, 1)  # converted configs lose the count, not the weights
    if config.num_hidden_layers <= layer < config.num_hidden_layers + draft_layers:
        return "MTP layer, not in use without speculative decoding"
    is_shared = layer < config.num_hidden_layers and not config.index_schedule.is_full(layer)
    if is_shared and rest.startswith("self_attn.indexer."):
        return "indexer of a layer that shares another layer's selection"
    return None
