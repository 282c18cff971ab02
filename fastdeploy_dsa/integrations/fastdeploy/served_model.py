"""Which model FastDeploy serves, as this package reads it from the same folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastdeploy_dsa.config import MODELS, DsaConfig
from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
from fastdeploy_dsa.integrations.fastdeploy.settings import VARIABLE, Settings, read_settings

ARCHITECTURES = tuple(model.architecture for model in MODELS if model.family == "dsa")
"""What the plug-in serves; the engine runs more models, for which FastDeploy has no layers."""

DRAFT_MODEL_TYPE = "mtp"  # what FastDeploy's proposer writes into the draft's speculative_config.model_type


@dataclass(frozen=True)
class ServedModel:
    """The model, or its draft model, in one FastDeploy configuration.

    Attributes:
        config: Of the checkpoint, with the replaced keys.
        settings: Of the plug-in.
        layer_ids: Absolute ids of the layers this model runs; FastDeploy counts a draft's from 0.
    """

    config: DsaConfig
    settings: Settings
    layer_ids: tuple[int, ...]

    @property
    def is_draft(self) -> bool:
        """Whether it is the draft model."""
        return self.layer_ids[:1] == (self.config.num_hidden_layers,)

    def absolute_id(self, layer_id: int) -> int:
        """Absolute id of a layer by FastDeploy's, which may count a draft's layers from 0."""
        return layer_id if layer_id >= self.layer_ids[0] else self.layer_ids[0] + layer_id


def served_model(fd_config: Any) -> ServedModel:
    """The model of an FDConfig.

    Raises:
        PluginError: It is not served, or its config.json is refused.
    """
    settings = read_settings()
    config = _read_config(str(fd_config.model_config.model), json.dumps(settings.overrides, sort_keys=True))
    num_layers = int(fd_config.model_config.num_hidden_layers)
    if not is_draft_config(fd_config):
        if num_layers != config.num_hidden_layers:
            raise PluginError(
                f"num_hidden_layers: FastDeploy runs {num_layers} layers, config.json has {config.num_hidden_layers}"
            )
        return ServedModel(config, settings, tuple(range(num_layers)))
    first = config.num_hidden_layers
    if config.num_nextn_predict_layers < num_layers:
        raise PluginError(
            f"the speculative model has {config.num_nextn_predict_layers} MTP layers, FastDeploy asks for {num_layers}"
        )
    return ServedModel(config, settings, tuple(range(first, first + num_layers)))


def is_draft_config(fd_config: Any) -> bool:
    """Whether an FDConfig is the proposer's copy, of the draft model."""
    speculative = getattr(fd_config, "speculative_config", None)
    return getattr(speculative, "model_type", None) == DRAFT_MODEL_TYPE


def read_served_config(folder: str | Path, overrides: Mapping[str, Any]) -> DsaConfig:
    """The configuration of a model folder.

    Raises:
        PluginError: As served_model.
    """
    return _read_config(str(folder), json.dumps(dict(overrides), sort_keys=True))


@cache  # asked for by every layer
def _read_config(folder: str, overrides: str) -> DsaConfig:
    try:
        return DsaConfig.from_pretrained(Path(folder), overrides=json.loads(overrides))
    except ValueError as error:
        replaced = f" (with {VARIABLE} {overrides})" if overrides != "{}" else ""
        raise PluginError(
            f"model {folder}: {error}{replaced}; served with sparse attention: {', '.join(ARCHITECTURES)}"
        ) from error
