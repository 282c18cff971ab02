"""Every backend declares its cache; allocation, order and capacity follow from the declaration."""

from __future__ import annotations

import paddle
import pytest

from cache_manager import CacheConfig, CacheController
from fastdeploy_dsa.attention.backend import AttentionBackend
from fastdeploy_dsa.attention.deepseek_v4.backend import DeepseekV4AttentionBackend
from fastdeploy_dsa.attention.dsa import DSAAttentionBackend
from fastdeploy_dsa.attention.gqa import GQAAttentionBackend
from fastdeploy_dsa.attention.mla import MLAAttentionBackend
from fastdeploy_dsa.compressed_cache_layout import CompressedSizes
from fastdeploy_dsa.index_schedule import IndexSchedule
from fastdeploy_dsa.ops import CacheFormat


def schedule(letters: str) -> IndexSchedule:
    return IndexSchedule(letters=letters, dialect="pattern", warnings=())


def dsa(letters: str, cache_format: CacheFormat = "fp8") -> DSAAttentionBackend:
    return DSAAttentionBackend(
        index_head_dim=128,
        index_schedule=schedule(letters),
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        softmax_scale=0.1,
        cache_format=cache_format,
    )


def mla(cache_format: CacheFormat = "bfloat16") -> MLAAttentionBackend:
    return MLAAttentionBackend(kv_lora_rank=512, qk_rope_head_dim=64, softmax_scale=0.1, cache_format=cache_format)


def gqa() -> GQAAttentionBackend:
    return GQAAttentionBackend(num_heads=4, kv_num_heads=2, head_dim=16, softmax_scale=0.25)


def compressed(cache_format: CacheFormat = "fp8") -> DeepseekV4AttentionBackend:
    """Window, ratio 4, ratio 128, ratio 4 without an indexer, and a draft layer."""
    sizes = CompressedSizes(
        head_dim=512,
        qk_rope_head_dim=64,
        index_head_dim=128,
        sliding_window=128,
        ratios=((0, 1), (1, 4), (2, 128), (3, 4), (4, 1)),
        selecting_layers=(1,),
    )
    return DeepseekV4AttentionBackend(sizes=sizes, softmax_scale=0.1, cache_format=cache_format)


WINDOW_BLOCKS = {"swa": 7, "state4": 11, "state128": 13}


def described(backend: AttentionBackend, **arguments: object) -> dict[tuple[str, int], tuple[list[int], object]]:
    created = backend.create_kv_cache(**arguments)  # type: ignore[arg-type]
    return {key: (list(tensor.shape), tensor.dtype) for key, tensor in created.items()}


def test_dsa_cache_can_be_created_with_layers_and_blocks_alone() -> None:
    key, indexer = ([5, 1, 64, 656], paddle.uint8), ([5, 64, 132], paddle.uint8)
    created = described(dsa("FF"), num_layers=2, num_blocks=5)
    assert list(created.items()) == [
        (("key", 0), key),
        (("indexer", 0), indexer),
        (("key", 1), key),
        (("indexer", 1), indexer),
    ]


def test_dsa_index_cache_exists_only_on_layers_that_own_an_indexer() -> None:
    created = described(dsa("FSSF"), num_layers=4, num_blocks=2)
    assert list(created) == [("key", 0), ("indexer", 0), ("key", 1), ("key", 2), ("key", 3), ("indexer", 3)]


def test_a_draft_layer_always_owns_an_index_cache() -> None:
    created = described(dsa("FS"), num_layers=1, num_blocks=2, layer_offset=2)
    assert list(created) == [("key", 2), ("indexer", 2)]


def test_mla_and_gqa_caches_have_the_documented_shapes() -> None:
    assert described(mla(), num_layers=1, num_blocks=3) == {("key", 0): ([3, 1, 64, 576], paddle.bfloat16)}
    per_head = ([3, 2, 64, 16], paddle.float32)
    assert described(gqa(), num_layers=1, num_blocks=3) == {("key", 0): per_head, ("value", 0): per_head}
    scaled = described(gqa(), num_layers=1, num_blocks=3, kv_cache_quant_type="block_wise_fp8")
    scale = ([3, 2, 64], paddle.float32)
    assert list(scaled.items()) == [
        (("key", 0), ([3, 2, 64, 16], paddle.uint8)),
        (("value", 0), ([3, 2, 64, 16], paddle.uint8)),
        (("key_scale", 0), scale),
        (("value_scale", 0), scale),
    ]


def test_compressed_caches_have_blocks_of_their_own_pools() -> None:
    created = described(compressed(), num_layers=4, num_blocks=5, window_blocks=WINDOW_BLOCKS)
    swa, state4 = ([7, 37440], paddle.uint8), ([11, 4, 2048], paddle.float32)
    assert list(created.items()) == [
        (("swa", 0), swa),
        (("key", 1), ([5, 37440], paddle.uint8)),
        (("indexer", 1), ([5, 8640], paddle.uint8)),
        (("swa", 1), swa),
        (("comp_state", 1), state4),
        (("idx_comp_state", 1), ([11, 4, 512], paddle.float32)),
        (("key", 2), ([5, 1728], paddle.uint8)),
        (("swa", 2), swa),
        (("comp_state", 2), ([13, 8, 1024], paddle.float32)),
        (("key", 3), ([5, 37440], paddle.uint8)),
        (("swa", 3), swa),
        (("comp_state", 3), state4),
    ]
    draft = described(compressed(), num_layers=1, num_blocks=5, layer_offset=4, window_blocks=WINDOW_BLOCKS)
    assert draft == {("swa", 4): swa}


@pytest.mark.parametrize("cache_format", ["fp8", "bfloat16", "float32"])
def test_bytes_of_compressed_caches_are_those_of_their_pools(cache_format: CacheFormat) -> None:
    backend = compressed(cache_format)
    created = backend.create_kv_cache(num_layers=4, num_blocks=5, window_blocks=WINDOW_BLOCKS)
    bytes_of = {key: tensor.numel().item() * tensor.element_size() for key, tensor in created.items()}
    allocated = sum(bytes_of.values())
    counts = {"main": 5, **WINDOW_BLOCKS}
    specs = backend.cache_spec((0, 1, 2, 3))
    assert allocated == sum(spec.bytes_per_block_all_layers * counts[spec.pool] for spec in specs)
    assert {pool.name for pool in backend.cache_pools()} == set(WINDOW_BLOCKS)
    main = sum(size for (role, _), size in bytes_of.items() if role in ("key", "indexer"))
    assert backend.bytes_per_block(4) * 5 == main


@pytest.mark.parametrize("backend", [dsa("FSF"), dsa("FSF", "bfloat16"), dsa("FSF", "float32"), mla(), gqa()])
def test_planned_bytes_equal_allocated_bytes(backend: AttentionBackend) -> None:
    created = backend.create_kv_cache(num_layers=3, num_blocks=2)
    allocated = sum(tensor.numel().item() * tensor.element_size() for tensor in created.values())
    assert backend.bytes_per_block(3) * 2 == allocated


@pytest.mark.parametrize(
    ("letters", "bytes_per_token"),
    [("F" * 61, 48068), ("FF" + "SSSF" * 14 + "SSS", 42128), ("FFF" + "SSSF" * 18 + "SSS", 53940)],
    ids=["V3.2", "V3.2 every fourth", "GLM-5.2"],
)
def test_bytes_per_token_equal_the_published_tables(letters: str, bytes_per_token: int) -> None:
    assert dsa(letters).bytes_per_block(len(letters)) == 64 * bytes_per_token


def test_controller_names_and_orders_what_the_backend_declares() -> None:
    controller = CacheController(CacheConfig(num_layers=2), local_rank=1, device_id=3)
    tensors = controller.initialize_kv_cache(dsa("FS"), num_gpu_blocks=4)
    draft = controller.initialize_mtp_kv_cache(dsa("FS"), num_gpu_blocks=4, num_mtp_layers=1, layer_offset=2)
    assert list(controller.get_kv_caches()) == [
        "key_caches_0_rank0.device3",
        "indexer_caches_0_rank0.device3",
        "key_caches_1_rank0.device3",
        "key_caches_2_rank0.device3",
        "indexer_caches_2_rank0.device3",
    ]
    assert [list(tensor.shape) for tensor in tensors + draft] == [
        [4, 1, 64, 656],
        [4, 64, 132],
        [4, 1, 64, 656],
        [4, 1, 64, 656],
        [4, 64, 132],
    ]


def test_gqa_storage_names_are_fastdeploys() -> None:
    controller = CacheController(CacheConfig(num_layers=1, kv_cache_quant_type="block_wise_fp8"))
    controller.initialize_kv_cache(gqa(), num_gpu_blocks=1)
    assert list(controller.get_kv_caches()) == [
        "key_caches_0_rank0.device0",
        "value_caches_0_rank0.device0",
        "key_cache_scales_0_rank0.device0",
        "value_cache_scales_0_rank0.device0",
    ]


def test_unknown_formats_and_quantisations_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cache_format: expected one of fp8, bfloat16, float32, got 'int4'"):
        mla("int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kv_cache_quant_type: expected None or 'block_wise_fp8', got 'int8'"):
        gqa().create_kv_cache(num_layers=1, num_blocks=1, kv_cache_quant_type="int8")
    with pytest.raises(ValueError, match="block_size: expected 1 or more, got 0"):
        GQAAttentionBackend(num_heads=2, kv_num_heads=2, head_dim=4, softmax_scale=1.0, block_size=0)
    with pytest.raises(ValueError, match="num_heads: expected a multiple of kv_num_heads 3, got 4"):
        GQAAttentionBackend(num_heads=4, kv_num_heads=3, head_dim=4, softmax_scale=1.0)
