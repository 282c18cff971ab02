"""DeepSeek-V3.2 and GLM-5 in FastDeploy with this package's attention layers.

The classes derive from FastDeploy's: experts, tensor parallelism and weight loading stay. FastDeploy's decoder layer
looks its attention class up in its own module, so that name is another while a model is constructed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastdeploy import envs
from fastdeploy.model_executor.models import deepseek_v3

from fastdeploy_dsa.integrations.fastdeploy.errors import PluginError
from fastdeploy_dsa.integrations.fastdeploy.served_model import served_model
from fastdeploy_dsa.integrations.fastdeploy.sparse_layers import recorded, require_indexers, sparse_layers


class SparseCausalLM:
    """What the two architectures have in common; mixed into FastDeploy's classes of the same names."""

    fd_config: Any

    def __init__(self, fd_config: Any) -> None:
        """Build FastDeploy's model with this package's attention.

        Raises:
            PluginError: FD_ATTENTION_BACKEND is another, or the model is not served.
        """
        if envs.FD_ATTENTION_BACKEND != "DSA_ATTN":
            raise PluginError(
                f"{fd_config.model_config.architectures[0]} needs FD_ATTENTION_BACKEND=DSA_ATTN, "
                f"got {envs.FD_ATTENTION_BACKEND}"
            )
        complete_config(fd_config.model_config)
        with sparse_layers():
            super().__init__(fd_config)  # type: ignore[call-arg]

    def load_weights(self, weights_iterator: Iterable[tuple[str, Any]]) -> None:
        """As FastDeploy's.

        Raises:
            PluginError: A layer that selects has no indexer weights in the checkpoint: FastDeploy passes over what is
                missing, and the layer would select at random.
        """
        seen: set[str] = set()
        super().load_weights(recorded(weights_iterator, seen))  # type: ignore[misc]
        require_indexers(served_model(self.fd_config), seen)


class DeepseekV32ForCausalLM(SparseCausalLM, deepseek_v3.DeepseekV32ForCausalLM):  # type: ignore[misc]
    """DeepSeek-V3.2."""

    def __new__(cls, fd_config: Any) -> Any:
        """The model; its draft model for the proposer's configuration, which has the same architecture name."""
        from fastdeploy_dsa.integrations.fastdeploy.mtp import SparseMTPForCausalLM

        if served_model(fd_config).is_draft:
            return SparseMTPForCausalLM(fd_config)
        return super().__new__(cls)


class GlmMoeDsaForCausalLM(DeepseekV32ForCausalLM):
    """GLM-5, 5.1 and 5.2."""

    @classmethod
    def name(cls) -> str:
        """The architecture of config.json."""
        return "GlmMoeDsaForCausalLM"


def complete_config(model_config: Any) -> None:
    """Give a ModelConfig the keys FastDeploy's layers read and newer config.json files leave out."""
    for name, value in _LEFT_OUT_KEYS.items():
        if not hasattr(model_config, name):
            setattr(model_config, name, value)


_LEFT_OUT_KEYS = {"topk_method": "noaux_tc"}  # the only one of these models
