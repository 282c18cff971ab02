"""FastDeploy's own model class, loaded from a checkpoint and run step by step over its own ForwardMeta."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import paddle

from tests.integrations.fastdeploy_rig import shims
from tests.kit.reference_model import read_safetensors


class Chunk(NamedTuple):
    """Tokens begin .. end-1 of a request, as one step computes them.

    Attributes:
        request: Row of the request tensors.
        tokens: The request's, all of them.
        is_prompt: Whether FastDeploy takes the step for a prefill of the request.
    """

    request: int
    tokens: Sequence[int]
    begin: int
    end: int
    is_prompt: bool


def make_config(
    folder: Path,
    *,
    max_model_len: int = 512,
    block_size: int = 16,
    num_cpu_blocks: int = 0,
    tensor_parallel: tuple[int, int] = (0, 1),
) -> Any:
    """An FDConfig for one process on the CPU, which plays one rank (rank, ranks) of a tensor-parallel group."""
    shims.apply()
    from fastdeploy import config
    from paddle.distributed import fleet

    model = config.ModelConfig({"model": str(folder), "dtype": "float32", "max_model_len": max_model_len})
    model.model_format = "torch"
    parallel = config.ParallelConfig({})
    parallel.tp_group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
    parallel.tensor_parallel_rank, parallel.tensor_parallel_size = tensor_parallel
    cache = config.CacheConfig({"block_size": block_size, "num_cpu_blocks": num_cpu_blocks, "model_cfg": model})
    load = config.LoadConfig({"load_choices": "default_v1"})
    scheduler = config.SchedulerConfig({"max_num_seqs": 8})
    return config.FDConfig(
        model_config=model,
        cache_config=cache,
        parallel_config=parallel,
        load_config=load,
        scheduler_config=scheduler,
        speculative_config=config.SpeculativeConfig({}),
        graph_opt_config=config.GraphOptimizationConfig({}),
        test_mode=True,
    )


class Rig:
    """A model in FastDeploy with its backend and caches.

    Attributes:
        model: FastDeploy's model object.
        backend: Its attention backend.
        controller: Its cache controller.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_blocks: int = 32,
        block_size: int = 16,
        max_requests: int = 4,
        tensor_parallel: tuple[int, int] = (0, 1),
    ) -> None:
        """Build everything; of a rank among several, with attention weights alone."""
        paddle.set_default_dtype("float32")
        self.config = make_config(folder, block_size=block_size, tensor_parallel=tensor_parallel)
        self.block_size = block_size
        self.model = (build_model if tensor_parallel[1] == 1 else build_attention)(self.config)
        self.backend = make_backend(self.config)
        self.controller = make_controller(self.config)
        self.caches = self.controller.initialize_kv_cache(attn_backend=self.backend, num_gpu_blocks=num_blocks)
        width = num_blocks // max_requests
        self.block_tables = np.arange(num_blocks, dtype=np.int32)[::-1].reshape(max_requests, width).copy()

    def step(self, chunks: Sequence[Chunk]) -> np.ndarray:
        """Logits of every token of the step, [T, vocab_size]."""
        return self.step_with_hidden(chunks)[0]

    def step_with_hidden(self, chunks: Sequence[Chunk]) -> tuple[np.ndarray, Any]:
        """The same, and the hidden states after the final norm."""
        meta = self.forward_meta(chunks)
        self.backend.init_attention_metadata(meta)
        with paddle.no_grad():
            hidden = self.run(meta)
            return self.model.compute_logits(hidden).numpy(), hidden

    def run(self, meta: Any) -> Any:
        """The model's hidden states for a step that was begun; versions differ in what the model takes."""
        takes_ids = "ids_remove_padding" in inspect.signature(self.model.forward).parameters
        inputs = meta.ids_remove_padding if takes_ids else {"ids_remove_padding": meta.ids_remove_padding}
        return self.model(inputs, forward_meta=meta)

    def forward_meta(self, chunks: Sequence[Chunk]) -> Any:
        """What FastDeploy's runner passes: idle rows, positions and slots not filled yet."""
        return make_forward_meta(chunks, self.backend, self.caches, self.block_tables)


class DraftRig:
    """The draft model of a Rig, as FastDeploy's proposer sets it up.

    Attributes:
        model: FastDeploy's model object.
        backend: Its attention backend.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.config = make_draft_config(rig)
        self.model = build_model(self.config)
        self.backend = make_backend(self.config)
        first = rig.config.model_config.num_hidden_layers
        num_blocks = rig.block_tables.size
        self.caches = rig.controller.initialize_mtp_kv_cache(
            attn_backend=self.backend, num_gpu_blocks=num_blocks, num_mtp_layers=1, layer_offset=first
        )

    def step(self, chunks: Sequence[Chunk], previous_hidden: Any) -> tuple[np.ndarray, Any]:
        """Logits of every row of the step, and the hidden states the next iteration takes in."""
        meta = make_forward_meta(chunks, self.backend, self.caches, self._rig.block_tables)
        self.backend.init_attention_metadata(meta)
        with paddle.no_grad():
            hidden = self.model(meta.ids_remove_padding, previous_hidden_states=previous_hidden, forward_meta=meta)
            return self.model.compute_logits(hidden, meta).numpy(), hidden


def make_draft_config(rig: Rig) -> Any:
    """The proposer's copy of a configuration, through its own method."""
    from fastdeploy.spec_decode import mtp

    config = deepcopy(rig.config)
    proposer = SimpleNamespace(
        model_config=config.model_config,
        speculative_config=config.speculative_config,
        num_main_model_layers=config.model_config.num_hidden_layers,
        use_attn_mask_offset=False,
    )
    config.speculative_config.model = config.model_config.model
    mtp.MTPProposer._update_mtp_config(proposer, rig.model)
    return config


def make_forward_meta(chunks: Sequence[Chunk], backend: Any, caches: Any, block_tables: np.ndarray) -> Any:
    from fastdeploy.model_executor.forward_meta import ForwardMeta

    by_request = {chunk.request: chunk for chunk in chunks}
    rows = range(len(block_tables))
    ordered = [by_request[row] for row in rows if row in by_request]
    counts = [by_request[row].end - by_request[row].begin if row in by_request else 0 for row in rows]
    cached = [by_request[row].begin if row in by_request else 0 for row in rows]
    prompt = [count if count and by_request[row].is_prompt else 0 for row, count in zip(rows, counts, strict=True)]
    return ForwardMeta(
        ids_remove_padding=paddle.to_tensor(
            np.concatenate([chunk.tokens[chunk.begin : chunk.end] for chunk in ordered]).astype(np.int64)
        ),
        seq_lens_this_time=_int32(counts),
        seq_lens_encoder=_int32(prompt),
        seq_lens_decoder=_int32(cached),
        batch_id_per_token=_int32(np.repeat(np.arange(len(block_tables)), counts)),
        cu_seqlens_q=_int32(np.concatenate([[0], np.cumsum(counts)])),
        cu_seqlens_k=_int32(np.concatenate([[0], np.cumsum(counts)])),
        block_tables=_int32(block_tables),
        caches=caches,
        attn_backend=backend,
    )


def build_model(config: Any) -> Any:
    """The class that FastDeploy's registry names, made and filled by FastDeploy's own loader."""
    from fastdeploy.model_executor.model_loader import get_model_loader

    return get_model_loader(load_config=config.load_config).load_model(fd_config=config)


def build_attention(config: Any) -> Any:
    """The same class with attention weights alone: one rank among several has no group to gather anything with."""
    from fastdeploy.model_executor.models.model_base import ModelRegistry
    from fastdeploy.model_executor.utils import process_final_after_loading

    model = ModelRegistry.get_class(config.model_config.architectures[0])(config)
    weights = read_safetensors(Path(config.model_config.model) / "model.safetensors")
    model.load_weights((name, _weight(rows)) for name, rows in weights.items() if "self_attn" in name)
    process_final_after_loading(model, config)
    return model


def make_backend(config: Any) -> Any:
    """The class that FastDeploy chooses for FD_ATTENTION_BACKEND."""
    from fastdeploy.model_executor.layers.attention import get_attention_backend

    model = config.model_config
    return get_attention_backend()(
        config,
        kv_num_heads=1,
        num_heads=model.num_attention_heads // config.parallel_config.tensor_parallel_size,
        head_dim=model.head_dim,
    )


class InlineCaches:
    """As FastDeploy's runner allocates without the v1 cache manager: from shapes, every role on every layer.

    Attributes:
        cache_kvs_map: Name to tensor.
    """

    def __init__(self, config: Any) -> None:
        self._num_layers = config.model_config.num_hidden_layers
        self.cache_kvs_map: dict[str, Any] = {}

    def initialize_kv_cache(self, attn_backend: Any, num_gpu_blocks: int) -> list[Any]:
        shapes = [shape for shape in attn_backend.get_kv_cache_shape(max_num_blocks=num_gpu_blocks) if shape]
        dtype = attn_backend.cache_spec((0,))[0].dtype
        for layer in range(self._num_layers):
            for role, shape in zip(("key", "indexer"), shapes, strict=True):
                self.cache_kvs_map[f"{role}_caches_{layer}"] = paddle.zeros(shape, dtype=dtype)
        return list(self.cache_kvs_map.values())


def has_cache_controller() -> bool:
    """Whether this FastDeploy has the v1 cache manager."""
    shims.apply()
    return importlib.util.find_spec("fastdeploy.cache_manager.v1") is not None


def make_controller(config: Any) -> Any:
    """The plug-in's controller, which FastDeploy's runner would be given; its own allocation where there is none."""
    if not has_cache_controller():
        return InlineCaches(config)
    from fastdeploy_dsa.integrations.fastdeploy.cache_controller import FastDeployCacheController

    return FastDeployCacheController(config, local_rank=0, device_id=0)


def _int32(values: Any) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(values, np.int32))


def _weight(rows: np.ndarray) -> paddle.Tensor:
    return paddle.to_tensor(np.asarray(rows, np.float32))
