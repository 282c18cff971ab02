"""Reads and writes the demo model as a Hugging Face model folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo_model.config import DemoConfig
from demo_model.model import DemoModel
from demo_model.vocabulary import BOS_ID, EOS_ID, PAD_ID

_BIAS = "mlp.gate.e_score_correction_bias"


def to_checkpoint(model: DemoModel) -> dict[str, Tensor]:
    """Tensors under their checkpoint names: bfloat16, router biases float32.

    The MTP layer's copies of embedding and head are left out, because they would equal the target's.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        full_name = name if name.startswith("lm_head") else f"model.{name}"
        prefix = full_name.partition("mlp.")[0]
        if name.endswith("mlp.correction_bias"):
            tensors[prefix + _BIAS] = value.float()
        elif name.endswith("mlp.gate_up.weight"):
            stacked = value.view(model.config.n_routed_experts + 1, 2, -1, model.config.hidden_size)
            for expert, pair in zip(_expert_names(prefix, model.config), stacked, strict=True):
                tensors[f"{expert}.gate_proj.weight"], tensors[f"{expert}.up_proj.weight"] = pair
        elif name.endswith("mlp.down.weight"):
            stacked = value.chunk(model.config.n_routed_experts + 1, dim=1)
            for expert, part in zip(_expert_names(prefix, model.config), stacked, strict=True):
                tensors[f"{expert}.down_proj.weight"] = part
        else:
            tensors[full_name] = value
    return {
        name: (value if name.endswith(_BIAS) else value.to(torch.bfloat16)).cpu().contiguous().clone()
        for name, value in tensors.items()
    }


def from_checkpoint(tensors: dict[str, Tensor], config: DemoConfig) -> DemoModel:
    """Float32 model holding exactly the checkpoint's values."""
    model = DemoModel(config)
    state = model.state_dict()
    for name in state:
        full_name = name if name.startswith("lm_head") else f"model.{name}"
        prefix = full_name.partition("mlp.")[0]
        experts = _expert_names(prefix, config)
        if name.endswith("mlp.correction_bias"):
            value = tensors[prefix + _BIAS]
        elif name.endswith("mlp.gate_up.weight"):
            parts = [f"{expert}.{part}_proj.weight" for expert in experts for part in ("gate", "up")]
            value = torch.cat([tensors[part] for part in parts])
        elif name.endswith("mlp.down.weight"):
            value = torch.cat([tensors[f"{expert}.down_proj.weight"] for expert in experts], dim=1)
        else:
            value = tensors[full_name]
        state[name] = value.float()
    model.load_state_dict(state)
    return model


def _expert_names(prefix: str, config: DemoConfig) -> list[str]:
    routed = [f"{prefix}mlp.experts.{expert}" for expert in range(config.n_routed_experts)]
    return [*routed, f"{prefix}mlp.shared_experts"]


def save_model(model: DemoModel, folder: Path) -> None:
    """Writes config, generation config and weights; tokenizer.py writes the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_checkpoint(model), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", model.config.to_hugging_face())
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    _write_json(folder / "generation_config.json", {"do_sample": False, **ids})


def load_model(folder: Path) -> DemoModel:
    """The model of a folder that `save_model` wrote, in float32."""
    config = DemoConfig.from_hugging_face(json.loads((folder / "config.json").read_text()))
    return from_checkpoint(load_file(folder / "model.safetensors"), config)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
