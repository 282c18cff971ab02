"""The ops that write caches and quantise queries; nothing in Paddle does the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from fastdeploy_dsa import ops
from fastdeploy_dsa.ops import reference
from scripts.op_benchmark.arguments import Arguments, arrays, tensors
from scripts.op_benchmark.timing import Work
from tests.kit.cases import IndexKeyWriteCase, IndexQueryQuantCase, MlaCacheWriteCase
from tests.kit.compare import assert_same


def writer_works() -> Iterator[Work]:
    """A prefill step of 4096 tokens."""
    num_tokens = 4096
    for name, case in (
        ("mla_cache_write", MlaCacheWriteCase(num_tokens=num_tokens, input_format="bfloat16")),
        ("index_key_write", IndexKeyWriteCase(num_tokens=num_tokens, input_format="bfloat16")),
    ):
        arguments = case.arguments()
        inputs = tensors(arguments)
        expected = case.arguments()
        cache = inputs["cache"]

        def run(name: str = name, inputs: Arguments = inputs) -> Any:
            getattr(ops, name)(**inputs)
            return inputs["cache"]

        def check(result: Any, name: str = name, expected: Arguments = expected) -> None:
            getattr(reference, name)(**expected)
            assert_same(arrays(result), expected["cache"], name)

        read = sum(arguments[key].nbytes for key in ("latent", "rope", "key") if key in arguments)
        token_bytes = int(np.prod(cache.shape)) // (cache.shape[0] * case.block_size)
        yield Work(name, f"{num_tokens} tokens, bfloat16 to fp8", run, check, {}, read + num_tokens * token_bytes, 0)

    quant = IndexQueryQuantCase(num_tokens=num_tokens // 8, input_format="bfloat16")
    arguments = quant.arguments()

    def check_quant(result: Any) -> None:
        for actual, wanted, name in zip(
            arrays(result), reference.index_query_quant(**arguments), ("quantized", "folded_weights"), strict=True
        ):
            assert_same(actual, wanted, name)

    yield Work(
        "index_query_quant",
        f"{quant.num_tokens} x {quant.index_n_heads} x {quant.index_head_dim}, bfloat16 to fp8",
        partial(ops.index_query_quant, **tensors(arguments)),
        check_quant,
        {},
        arguments["query"].size * 3,
        0,
    )
