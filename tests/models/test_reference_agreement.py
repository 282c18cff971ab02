"""Random tiny checkpoints: every number of our model on the way to its logits against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdeploy_dsa.models import load_model
from fastdeploy_dsa.ops import CacheFormat
from tests.kit.agreement import check_agreement
from tests.kit.reference_model import ReferenceModel, Scaled
from tests.kit.serving import Served, Serving, in_chunks
from tests.kit.tiny_model import tiny_config, write_tiny_model
from tests.kit.tokens import random_tokens

V32 = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "indexer_rope_interleave": None}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
ALL_FULL = {"indexer_types": None}  # unless another key decides


@dataclass(frozen=True)
class Case:
    """A checkpoint and requests that are served together, chunk tokens of each per step.

    Attributes:
        changes: Of the tiny config; None takes a key out.
        lengths: Tokens of each request.
        chunk: Tokens of a request per step.
        seed: Of weights and tokens.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (41,)
    chunk: int = 256
    seed: int = 1

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("glm, three requests in chunks", lengths=(1, 7, 90), chunk=13),
    Case("v32 without rotation scaling", V32 | ALL_FULL, lengths=(60, 44), seed=2),
    Case("v32 with yarn far beyond the original length", V32 | ALL_FULL | {"rope_parameters": YARN}, (200,), 64, 3),
    Case(
        "yarn in the older spelling with unequal multipliers",
        V32
        | {
            "rope_parameters": None,
            "rope_theta": 5000.0,
            "rope_scaling": YARN | {"rope_type": None, "rope_theta": None, "type": "yarn", "mscale": 0.7},
        },
        seed=4,
    ),
    Case(
        "odd sizes",
        V32
        | ALL_FULL
        | {
            "hidden_size": 37,
            "num_attention_heads": 3,
            "q_lora_rank": 23,
            "kv_lora_rank": 53,
            "qk_nope_head_dim": 7,
            "qk_rope_head_dim": 6,
            "v_head_dim": 5,
            "index_n_heads": 3,
            "index_head_dim": 11,
            "index_topk": 7,
            "intermediate_size": 29,
            "moe_intermediate_size": 9,
            "vocab_size": 301,
        },
        (73, 5, 36),
        31,
        5,
    ),
    Case(
        "latent rows of a whole and a short scale group", {"kv_lora_rank": 200, "index_head_dim": 128}, (48,), seed=6
    ),
    Case(
        "groups of experts", {"n_routed_experts": 9, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}, seed=7
    ),
    Case(
        "no shared expert, weights not normalised",
        {"n_shared_experts": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
        seed=8,
    ),
    Case("two shared experts, tied embeddings", {"n_shared_experts": 2, "tie_word_embeddings": True}, seed=9),
    Case(
        "mixture layers by first_k_dense_replace",
        {"mlp_layer_types": None, "first_k_dense_replace": 2},
        seed=10,
    ),
    Case(
        "shared by frequency",
        ALL_FULL | {"num_hidden_layers": 6, "first_k_dense_replace": 5, "mlp_layer_types": None, "index_topk_freq": 3},
        seed=11,
    ),
    Case(
        "shared by frequency and offset",
        ALL_FULL
        | {
            "num_hidden_layers": 6,
            "first_k_dense_replace": None,
            "mlp_layer_types": ["sparse"] + ["dense"] * 5,
            "index_topk_freq": 2,
            "index_skip_topk_offset": 3,
        },
        seed=12,
    ),
    Case(
        "shared by pattern",
        ALL_FULL
        | {
            "num_hidden_layers": 5,
            "first_k_dense_replace": None,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "dense"],
            "index_topk_pattern": "FSSFS",
        },
        (66, 30),
        9,
        13,
    ),
    Case("one key per query", {"index_topk": 1, "index_n_heads": 1}, (24,), seed=14),
    Case("everything selected", {"index_topk": 64}, (50, 64), seed=15),
)


@pytest.mark.parametrize("cache_format", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_number_on_the_way_is_the_references(case: Case, cache_format: CacheFormat, tmp_path: Path) -> None:
    print(f"seed {case.seed}")
    folder = write_tiny_model(tmp_path / "model", seed=case.seed, **case.changes)
    vocab_size = (tiny_config() | case.changes)["vocab_size"]
    sequences = random_tokens(case.lengths, vocab_size, case.seed)
    served = Serving(load_model(folder), sequences, cache_format=cache_format).run_recorded(
        in_chunks(case.lengths, case.chunk)
    )
    reference = ReferenceModel.load(folder)
    for token_ids, one in zip(sequences, served, strict=True):
        check_agreement(reference, token_ids, one, cache_format)


@pytest.mark.parametrize("seed", range(20, 26))
def test_selections_of_a_float32_run_are_the_references(seed: int, tmp_path: Path) -> None:
    print(f"seed {seed}")
    folder = write_tiny_model(tmp_path / "model", seed=seed)
    (tokens,) = random_tokens((96,), tiny_config()["vocab_size"], seed)
    (served,) = Serving(load_model(folder), [tokens]).run_recorded(in_chunks([96], 96))
    agreement = check_agreement(ReferenceModel.load(folder), tokens, served, "float32")
    assert agreement.identical_rows == agreement.rows


def one_step_off(values: np.ndarray) -> np.ndarray:
    """The number of largest magnitude moved by a sixteenth of itself: one step of e4m3 or less than two."""
    wrong = values.copy()
    place = np.unravel_index(np.abs(values).argmax(), values.shape)
    wrong[place] *= 1 - 2.0**-4
    return wrong


def with_wrong_latent(served: Served) -> None:
    served.numbers[1] = served.numbers[1]._replace(latent=one_step_off(served.numbers[1].latent))


def with_wrong_key(served: Served) -> None:
    key = served.numbers[1].index_key
    served.numbers[1] = served.numbers[1]._replace(index_key=Scaled(one_step_off(key.numbers), key.scale))


def with_wrong_query_scale(served: Served) -> None:
    query = served.numbers[1].index_query
    served.numbers[1] = served.numbers[1]._replace(index_query=Scaled(query.numbers / 2, query.scale * 2))


def with_wrong_selection(served: Served) -> None:
    row = served.positions[1][-1]
    row[0] = np.setdiff1d(np.arange(row[1]), row)[-1]


def with_wrong_expert(served: Served) -> None:
    served.experts[1][3, 0] = np.setdiff1d(np.arange(4), served.experts[1][3])[0]


@pytest.mark.parametrize(
    "spoil", [with_wrong_latent, with_wrong_key, with_wrong_query_scale, with_wrong_selection, with_wrong_expert]
)
def test_agreement_notices_one_wrong_number_in_an_fp8_run(spoil: Callable[[Served], None], tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", seed=30)
    (tokens,) = random_tokens((40,), tiny_config()["vocab_size"], 30)
    (served,) = Serving(load_model(folder), [tokens], cache_format="fp8").run_recorded(in_chunks([40], 40))
    reference = ReferenceModel.load(folder)
    check_agreement(reference, tokens, served, "fp8")
    spoil(served)
    with pytest.raises(AssertionError):
        check_agreement(reference, tokens, served, "fp8")
