from __future__ import annotations

import numpy as np
import pytest

from tests.kit.cases import Format, IndexQueryQuantCase
from tests.kit.checks import check_index_query_quant
from tests.kit.compare import assert_same
from tests.kit.implementation import Implementation

FORMATS = ["fp8", "bfloat16", "float32"]


@pytest.mark.parametrize("input_format", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_production_queries_have_the_bits_of_the_definition(
    implementation: Implementation, cache_format: Format, input_format: str
) -> None:
    check_index_query_quant(implementation, IndexQueryQuantCase(cache_format=cache_format, input_format=input_format))


@pytest.mark.parametrize(("index_n_heads", "index_head_dim"), [(1, 1), (3, 5), (7, 17), (32, 100), (128, 127)])
@pytest.mark.parametrize("cache_format", FORMATS)
def test_odd_dims_have_the_bits_of_the_definition(
    implementation: Implementation, cache_format: Format, index_n_heads: int, index_head_dim: int
) -> None:
    check_index_query_quant(
        implementation,
        IndexQueryQuantCase(index_n_heads=index_n_heads, index_head_dim=index_head_dim, cache_format=cache_format),
    )


@pytest.mark.parametrize("cache_format", FORMATS)
def test_strided_inputs_are_read_as_their_contiguous_copies(
    implementation: Implementation, cache_format: Format
) -> None:
    case = IndexQueryQuantCase(cache_format=cache_format, input_format="bfloat16", has_row_strides=True)
    check_index_query_quant(implementation, case)


@pytest.mark.parametrize("cache_format", FORMATS)
def test_an_empty_batch_gives_empty_results(implementation: Implementation, cache_format: Format) -> None:
    check_index_query_quant(implementation, IndexQueryQuantCase(num_tokens=0, cache_format=cache_format))


@pytest.mark.parametrize(("index_n_heads", "factor"), [(64, 0.011048543456), (32, 0.015625)])
def test_a_weight_of_one_folds_to_the_scale_times_the_models_factor(
    implementation: Implementation, index_n_heads: int, factor: float
) -> None:
    query = np.zeros((1, index_n_heads, 128), np.float32)
    query[..., 3] = 448
    weights = np.ones((1, index_n_heads), np.float32)
    _, folded = implementation.index_query_quant(query=query, weights=weights, cache_format="fp8")
    assert np.all(folded == np.float32(factor))


def test_a_zero_query_keeps_the_smallest_scale_and_the_sign_of_its_weight(implementation: Implementation) -> None:
    query, weights = np.zeros((1, 2, 8), np.float32), np.array([[1, -1]], np.float32)
    quantized, folded = implementation.index_query_quant(query=query, weights=weights, cache_format="fp8")
    assert not quantized.any()
    assert_same(folded, weights * np.float32(2.0**-22) * np.float32(0.25), "folded_weights")


@pytest.mark.parametrize("cache_format", FORMATS)
def test_queries_do_not_depend_on_the_batch_or_on_threads(
    implementation: Implementation, cache_format: Format
) -> None:
    arguments = IndexQueryQuantCase(num_tokens=50, index_n_heads=8, cache_format=cache_format).arguments()
    together = implementation.index_query_quant(**arguments)
    for num_threads in (1, 2, 4):
        parts = [
            implementation.on_threads(num_threads).index_query_quant(
                query=arguments["query"][first : first + 7],
                weights=arguments["weights"][first : first + 7],
                cache_format=cache_format,
            )
            for first in range(0, 50, 7)
        ]
        for i, name in enumerate(("quantized", "folded_weights")):
            assert_same(np.concatenate([part[i] for part in parts]), together[i], name)
