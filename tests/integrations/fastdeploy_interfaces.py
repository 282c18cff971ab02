"""FastDeploy's interfaces as the plug-in uses them: names, parameters in their order, defaults, and orders of tensors.

Recorded from the tree of May 2026; what came with backend-owned caches is marked, and not there in that tree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_BACKEND_INIT = "fd_config, kv_num_heads, num_heads, head_dim, encoder_block_shape_q=-1, decoder_block_shape_q=-1"
_FORWARD = "q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta"
_OWNED_CACHES = ("create_kv_cache", "create_host_kv_cache", "free_host_kv_cache", "_format_cache_name")


@dataclass(frozen=True)
class Interface:
    """A class of FastDeploy and the plug-in's class in its place.

    Attributes:
        theirs: Dotted name.
        ours: File in the plug-in's folder, and the classes there and in other files that make it up.
        methods: Name to parameters without self.
        later: Methods that only some versions have.
    """

    theirs: str
    ours: tuple[tuple[str, str], ...]
    methods: dict[str, str]
    later: tuple[str, ...] = field(default=_OWNED_CACHES)


INTERFACES = (
    Interface(
        "fastdeploy.model_executor.layers.attention.dsa_attention_backend.DSAAttentionBackend",
        (("dsa_backend.py", "FastDeployDSABackend"), ("cache_methods.py", "CacheMethods")),
        {
            "__init__": _BACKEND_INIT,
            "init_attention_metadata": "forward_meta",
            "get_kv_cache_shape": "max_num_blocks, kv_cache_quant_type=None",
            "create_kv_cache": "num_layers, num_blocks, cache_dtype=None, kv_cache_quant_type=None, layer_offset=0",
            "create_host_kv_cache": (
                "num_layers, num_blocks, cache_item_bytes, kv_cache_quant_type=None, layer_offset=0"
            ),
            "free_host_kv_cache": "host_caches",
            "forward_mixed": _FORWARD,
        },
    ),
    Interface(
        "fastdeploy.model_executor.layers.attention.mla_attention_backend.MLAAttentionBackend",
        (("mla_backend.py", "FastDeployMLABackend"), ("cache_methods.py", "CacheMethods")),
        {
            "__init__": _BACKEND_INIT,
            "get_kv_cache_shape": "max_num_blocks, kv_cache_quant_type=None",
        },
    ),
    Interface(
        "fastdeploy.cache_manager.v1.cache_controller.CacheController",
        (("cache_controller.py", "FastDeployCacheController"),),
        {
            "__init__": "config, local_rank, device_id",
            "initialize_kv_cache": "attn_backend, num_gpu_blocks",
            "initialize_mtp_kv_cache": "attn_backend, num_gpu_blocks, num_mtp_layers, layer_offset",
            "initialize_host_cache": "attn_backend",
            "get_kv_caches": "",
            "get_host_cache_kvs_map": "",
            "submit_swap_tasks": "evict_metadata, swap_in_metadata",
            "load_host_to_device": "swap_metadata",
            "evict_device_to_host": "swap_metadata",
            "prefetch_from_storage": "metadata",
            "backup_device_to_storage": "device_block_ids, metadata",
            "backup_host_to_storage": "host_block_ids, metadata",
            "send_to_node": "metadata",
            "wait_for_transfer_from_node": "metadata",
            "reset_cache": "",
            "free_cache": "clear_storage=False",
            "free_gpu_cache": "",
            "get_stats": "",
            "start": "",
            "stop": "",
            "_get_cache_names": "layer_idx",
            "_format_cache_name": "role, layer_idx",
            "_get_kv_cache_quant_type": "",
            "_is_fp8_quantization": "quant_type=None",
            "_should_wait_for_swap_out": "",
            "_wait_for_pending_evict_counters": "",
            "_submit_swap_task": (
                "meta, src_location, dst_location, transfer_fn_all, transfer_fn_layer, force_all_layers=False"
            ),
            "_get_numa_node_for_gpu": "device_id",
            "_bind_to_closest_numa_node": "",
            "_free_host_cache": "",
            "_clear_storage": "",
        },
    ),
    Interface(
        "fastdeploy.model_executor.models.deepseek_v3.DeepseekV32DSAAttention",
        (("sparse_layers.py", "SparseAttention"),),
        {"__init__": "fd_config, layer_id, prefix=''"},
    ),
    Interface(
        "fastdeploy.model_executor.models.deepseek_v3.DeepseekV32ForCausalLM",
        (("model.py", "SparseCausalLM"),),
        {"__init__": "fd_config", "load_weights": "weights_iterator"},
    ),
    Interface(
        "fastdeploy.model_executor.models.glm4_mtp.Glm4MTPForCausalLM",
        (("mtp.py", "SparseMTPForCausalLM"),),
        {
            "__init__": "fd_config",
            "load_weights": "weights_iterator",
            "forward": "ids_remove_padding, previous_hidden_states, forward_meta",
            "empty_input_forward": "forward_meta",
            "clear_graph_opt_backend": "",
        },
        later=("empty_input_forward",),
    ),
    Interface(
        "fastdeploy.worker.gpu_model_runner.GPUModelRunner",
        (("runner.py", "FastDeployModelRunner"),),
        {"cal_theortical_kvcache": "", "initialize_kv_cache": "profile=False"},
    ),
)

ENTRY_POINTS = {
    "fastdeploy.model_register_plugins": ("fastdeploy_dsa", "register"),
    "fastdeploy.model_runner_plugins": ("fastdeploy_dsa", "runner_class"),
}
"""Group to the name FD_PLUGINS has and the function; one name for both groups."""

STORAGE_NAMES = {
    "key": "key_caches_3_rank1.device5",
    "value": "value_caches_3_rank1.device5",
    "key_scale": "key_cache_scales_3_rank1.device5",
    "value_scale": "value_cache_scales_3_rank1.device5",
    "indexer": "indexer_caches_3_rank1.device5",
}
"""Of layer 3, local rank 3 of 2 tensor-parallel ranks, physical device 5: names other processes attach to."""

FORWARD_META_FIELDS = (
    *("ids_remove_padding", "seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "batch_id_per_token"),
    *("cu_seqlens_q", "block_tables", "caches", "max_len_tensor_cpu", "attn_backend", "step_use_cudagraph"),
)
