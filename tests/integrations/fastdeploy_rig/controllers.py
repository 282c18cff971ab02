"""Cache controllers of the plug-in over small configurations, with backends of every kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.integrations.fastdeploy_rig import shims

NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE = 2, 5, 16


def bare_controller(
    *,
    local_rank: int = 0,
    device_id: int = 0,
    tensor_parallel_size: int = 1,
    num_cpu_blocks: int = 0,
    quant_type: str | None = None,
    write_policy: str = "write_through",
    dtype: str = "bfloat16",
) -> Any:
    """A controller for a model of NUM_LAYERS layers."""
    shims.apply()
    from fastdeploy_dsa.integrations.fastdeploy.cache_controller import FastDeployCacheController

    config = SimpleNamespace(
        model_config=SimpleNamespace(num_hidden_layers=NUM_LAYERS, dtype=dtype),
        cache_config=SimpleNamespace(num_cpu_blocks=num_cpu_blocks, write_policy=write_policy),
        quant_config=None if quant_type is None else SimpleNamespace(kv_cache_quant_type=quant_type),
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel_size),
    )
    return FastDeployCacheController(config, local_rank, device_id)


def dsa_backend(**changes: Any) -> Any:
    """As FastDeploy's tests make it: without a constructor, the sizes set one by one."""
    shims.apply()
    from fastdeploy_dsa.integrations.fastdeploy.dsa_backend import FastDeployDSABackend

    sizes = {
        "block_size": BLOCK_SIZE,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_topk": 128,
        "quant_block_size": 128,
    }
    return _bare(FastDeployDSABackend, {**sizes, **changes})


def mla_backend(**changes: Any) -> Any:
    """The same for dense latent attention."""
    shims.apply()
    from fastdeploy_dsa.integrations.fastdeploy.mla_backend import FastDeployMLABackend

    return _bare(
        FastDeployMLABackend, {"block_size": BLOCK_SIZE, "kv_lora_rank": 512, "qk_rope_head_dim": 64, **changes}
    )


class GqaBackend:
    """A backend of FastDeploy's that answers with two shapes."""

    def get_kv_cache_shape(self, max_num_blocks: int, kv_cache_quant_type: str | None = None) -> Any:
        return [max_num_blocks, 2, BLOCK_SIZE, 32], [max_num_blocks, 2, BLOCK_SIZE, 32]


def _bare(kind: type[Any], attributes: dict[str, Any]) -> Any:
    backend = kind.__new__(kind)
    for name, value in attributes.items():
        setattr(backend, name, value)
    return backend
