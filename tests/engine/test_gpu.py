"""The engine on a GPU: texts, and decode steps as graphs. Runs where Paddle has a GPU, or a plugin that is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import Tensor

from fastdeploy_dsa import LLM, SamplingParams, ops
from fastdeploy_dsa.engine.decode_graphs import DecodeGraphs, DecodeLimits
from fastdeploy_dsa.engine.step_inputs import StepInputs
from fastdeploy_dsa.installation import DEMO_MODEL
from fastdeploy_dsa.step import StepMetadata
from tests.kit.compare import assert_same
from tests.kit.tiny_compressed_model import VOCAB_SIZE, write_tiny_compressed_model

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
FILLER = "The cache keeps one row per token, and every row is read by its own slot. "
PROMPTS = [  # one below and two above index_topk, which is 64
    "The code of the red box is 4812. What is the code of the red box?",
    "The code of the red box is 4812. " + FILLER * 2 + "What is the code of the red box?",
    FILLER + "The code of the blue box is 7305. " + FILLER * 3 + "What is the code of the blue box?",
]
LIMITS = DecodeLimits(max_num_seqs=24, max_model_len=4096, block_size=64)
NUM_BLOCKS, NUM_HEADS, TOPK = 160, 16, 512


@pytest.mark.usefixtures("falls_back")
@pytest.mark.parametrize("cache_dtype", ["float32", "fp8"])
def test_the_gpu_says_what_the_cpu_says(gpu: str, cache_dtype: str) -> None:
    def texts(device: str) -> list[str]:
        llm = LLM(DEMO_MODEL, device=device, cache_dtype=cache_dtype, cache_memory="64MiB", max_model_len=512)
        return [output.text for output in llm.generate(PROMPTS, GREEDY)]

    on_gpu = texts(gpu)
    assert on_gpu == texts("cpu")


@pytest.mark.usefixtures("falls_back")
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_the_gpu_says_of_deepseek_v4_what_the_cpu_says(gpu: str, tmp_path: Path, num_drafts: int) -> None:
    """All three layer kinds; prompts that cross windows and close entries while they are decoded."""
    folder = write_tiny_compressed_model(tmp_path / "model", num_nextn_predict_layers=1)
    prompts = [np.random.default_rng(length).integers(0, VOCAB_SIZE, length).tolist() for length in (375, 250, 61, 1)]
    drafting = {"method": "mtp", "num_speculative_tokens": num_drafts, "adaptive": False}
    speculative = {"speculative_config": drafting} if num_drafts else {}

    def tokens(device: str) -> list[list[int]]:
        llm = LLM(folder, device=device, cache_dtype="float32", cache_memory="64MiB", max_model_len=512, **speculative)
        return [output.token_ids for output in llm.generate(prompts, GREEDY)]

    on_gpu = tokens(gpu)
    assert on_gpu == tokens("cpu")


class Attention:
    """One layer's cache writes, selection and attention, of fixed projections: nothing but ops of this package."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def numbers(*shape: int) -> Tensor:
            return paddle.to_tensor(rng.standard_normal(shape).astype(np.float32))

        rows = LIMITS.max_num_seqs
        self.latent, self.rope, self.key = numbers(rows, 512), numbers(rows, 64), numbers(rows, 128)
        self.query, self.weights = numbers(rows, 64, 128), numbers(rows, 64)
        self.attention_query = paddle.to_tensor(rng.standard_normal((rows, NUM_HEADS, 576)), dtype="bfloat16")
        self.latent_cache = paddle.to_tensor(np.zeros((NUM_BLOCKS, 1, 64, 656), np.uint8))
        self.index_cache = paddle.to_tensor(np.zeros((NUM_BLOCKS, 64, 132), np.uint8))
        slots = paddle.to_tensor(np.arange(NUM_BLOCKS * 64))
        ops.mla_cache_write(
            latent=numbers(NUM_BLOCKS * 64, 512),
            rope=numbers(NUM_BLOCKS * 64, 64),
            cache=self.latent_cache,
            slot_mapping=slots,
        )
        ops.index_key_write(key=numbers(NUM_BLOCKS * 64, 128), cache=self.index_cache, slot_mapping=slots)

    def forward(self, step: StepMetadata) -> Tensor:
        rows = step.num_rows
        quantized, folded_weights = ops.layer_write(
            latent=self.latent[:rows],
            rope=self.rope[:rows],
            latent_cache=self.latent_cache,
            slot_mapping=step.slot_mapping,
            key=self.key[:rows],
            index_cache=self.index_cache,
            query=self.query[:rows],
            weights=self.weights[:rows],
        )
        selection = ops.index_select(
            query=quantized,
            folded_weights=folded_weights,
            index_cache=self.index_cache,
            block_table=step.block_table,
            request_ids=step.request_ids,
            lengths=step.lengths,
            max_length=step.max_length,
            topk=TOPK,
        )
        out, _ = ops.sparse_mla(
            query=self.attention_query[:rows],
            latent_cache=self.latent_cache,
            slot_ids=selection.slot_ids,
            counts=selection.counts,
            kv_lora_rank=512,
            softmax_scale=0.1352337789,
        )
        return out


def decode_step(rng: np.random.Generator, num_requests: int) -> StepInputs:
    blocks = rng.permutation(NUM_BLOCKS)
    lengths = rng.integers(1, 64 * (NUM_BLOCKS // num_requests), num_requests).clip(max=LIMITS.max_model_len)
    width = -(-int(lengths.max()) // 64)
    table = np.full((num_requests, width), -1, np.int32)
    for line, length in enumerate(lengths):
        used, blocks = np.split(blocks, [-(-int(length) // 64)])
        table[line, : len(used)] = used
    return StepInputs(
        token_ids=rng.integers(0, 9, num_requests),
        positions=(lengths - 1).astype(np.int32),
        request_ids=np.arange(num_requests, dtype=np.int32),
        block_table=table,
        logits_rows=np.arange(num_requests),
    )


@pytest.mark.usefixtures("gpu")
def test_replayed_decode_steps_equal_eager_ones() -> None:
    from paddle.device.cuda.graphs import CUDAGraph  # noqa: PLC0415 - GPU builds only

    captured, eager = Attention(1), Attention(1)
    graphs = DecodeGraphs(captured.forward, LIMITS, CUDAGraph)
    others = DecodeGraphs(eager.forward, LIMITS, _no_graph)
    rng = np.random.default_rng(2)
    for num_requests in (8, 8, 5, 8, 3, 16, 11, 16, 1, 8):
        inputs = decode_step(rng, num_requests)
        expected = eager.forward(others._build(inputs, num_requests + -num_requests % 8))[:num_requests]
        actual = graphs.run(inputs)
        assert graphs.takes(inputs), "the capture failed"
        assert_same(_bits(actual), _bits(expected), f"{num_requests} requests")
    assert_same(captured.latent_cache.numpy(), eager.latent_cache.numpy(), "latent cache")
    assert_same(captured.index_cache.numpy(), eager.index_cache.numpy(), "index cache")


def _no_graph() -> Any:
    raise AssertionError("nothing is captured here")


def _bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.numpy().view(np.uint16)
