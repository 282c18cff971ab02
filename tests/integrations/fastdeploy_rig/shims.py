"""What FastDeploy needs of a GPU before its modules can be imported and its layers built. Call `apply` first.

Its attention, cache and model code runs as it is; only device queries, the platform name and the fused experts, for
which it has no CPU version, are doubles.
"""

from __future__ import annotations

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
from paddle import nn

from fastdeploy_dsa.layers import route


class Platform:
    """FastDeploy's platform with the one accelerator whose linear layers are plain Paddle."""

    def __init__(self, actual: Any) -> None:
        self._actual = actual

    def is_gcu(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actual, name)


class CpuExperts(nn.Layer):
    """FastDeploy's FusedMoE: its constructor, parameter names and weight loading, computed expert by expert."""

    def __init__(self, fd_config: Any, *, moe_intermediate_size: int, num_experts: int, **options: Any) -> None:
        super().__init__()
        hidden_size = fd_config.model_config.hidden_size
        self._options = SimpleNamespace(
            n_group=options["n_group"],
            topk_group=options["topk_group"],
            num_experts_per_tok=options["top_k"],
            norm_topk_prob=options.get("renormalize", fd_config.model_config.norm_topk_prob),
            routed_scaling_factor=options["routed_scaling_factor"],
        )
        self.gate_correction_bias = options["gate_correction_bias"]
        self.up_gate_proj_weight = self.create_parameter([num_experts, 2 * moe_intermediate_size, hidden_size])
        self.down_proj_weight = self.create_parameter([num_experts, hidden_size, moe_intermediate_size])
        for parameter in (self.up_gate_proj_weight, self.down_proj_weight):
            parameter.weight_loader = self.load

    def load(self, parameter: Any, weight: Any, shard_id: str, expert_id: int) -> None:
        from fastdeploy.model_executor.layers.utils import get_tensor

        if not parameter._is_initialized():
            parameter.initialize()
        rows = get_tensor(weight).astype("float32").numpy()
        all_rows = parameter.numpy()
        begin = rows.shape[0] if shard_id == "up" else 0
        all_rows[expert_id, begin : begin + rows.shape[0]] = rows
        parameter.set_value(all_rows)

    def forward(self, x: Any, gate: Any, forward_meta: Any) -> Any:
        scores = nn.functional.sigmoid(gate(x.astype("float32"))).numpy()
        chosen, weights = route(scores, self.gate_correction_bias.numpy().reshape(-1), self._options)
        out = np.zeros(x.shape, np.float32)
        half = self.up_gate_proj_weight.shape[1] // 2
        for row, experts in enumerate(chosen):
            for expert, weight in zip(experts, weights[row], strict=True):
                up_gate = paddle.matmul(self.up_gate_proj_weight[int(expert)], x[row].astype("float32"))
                active = nn.functional.silu(up_gate[:half]) * up_gate[half:]
                out[row] += weight * paddle.matmul(self.down_proj_weight[int(expert)], active).numpy()
        return paddle.to_tensor(out).astype(x.dtype)


@cache
def apply() -> None:
    """Once per process, before anything of FastDeploy is imported."""
    os.environ.setdefault("FD_ATTENTION_BACKEND", "DSA_ATTN")
    properties = SimpleNamespace(major=9, minor=0, name="none", total_memory=80 << 30, multi_processor_count=132)
    paddle.device.cuda.get_device_properties = lambda *_: properties
    paddle.device.get_device_properties = lambda *_: properties
    paddle.device.cuda.empty_cache = lambda *_: None

    from fastdeploy.model_executor.ops import gpu

    gpu.tolerant_import_error()
    from fastdeploy.model_executor.layers import activation, linear
    from fastdeploy.model_executor.models import deepseek_v3
    from paddle.distributed import fleet

    fleet.init(is_collective=True, strategy=fleet.DistributedStrategy())
    for module in (linear, activation):
        module.current_platform = Platform(module.current_platform)
    # Versions up to 2.6 compute positions inside the model; nothing reads them with the plug-in.
    deepseek_v3.get_position_ids_and_mask_encoder_batch = lambda *_: None
    CpuExperts.make_expert_params_mapping = deepseek_v3.FusedMoE.make_expert_params_mapping
    deepseek_v3.FusedMoE = CpuExperts
