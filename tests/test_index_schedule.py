"""Index schedules: what every combination of config keys resolves to, and what each mistake is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdeploy_dsa.index_schedule import IndexSchedule, IndexScheduleError, freq_letters, resolve_index_schedule

CONFIGS = Path(__file__).parent / "configs"
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy

GLM_5_HALF = "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS"
GLM_5_QUARTER = "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS"
PUBLISHED_30B = {
    "half": "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF",
    "quarter": "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS",
    "eighth": "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS",
}

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["F", "FFSS", "full", "", "ä"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
)
SCHEDULE_KEYS = (
    "indexer_types",
    "index_topk_pattern",
    "index_topk_freq",
    "index_skip_topk_offset",
    "use_index_cache",
    "cli_factor",
    "index_kpool",
    "kv_source_layer_ids",
)


def codes(schedule: IndexSchedule) -> list[str]:
    return [warning.partition(":")[0] for warning in schedule.warnings]


@pytest.mark.parametrize(
    ("num_layers", "freq", "offset", "full_layers"),
    [
        (61, 4, 2, [0, *range(1, 58, 4)]),
        (61, 2, 2, [0, *range(1, 60, 2)]),
        (61, 8, 2, [0, *range(1, 58, 8)]),
        (47, 4, 2, [0, *range(1, 46, 4)]),
        (78, 4, 3, [0, 1, *range(2, 75, 4)]),
        (78, 4, 2, [0, *range(1, 78, 4)]),
        (61, 4, 1, list(range(0, 61, 4))),
        (5, 1, 1, [0, 1, 2, 3, 4]),
        (5, 1, 7, [0, 1, 2, 3, 4]),
        (0, 4, 2, []),
    ],
)
def test_freq_puts_full_layers_where_the_rule_says(
    num_layers: int, freq: int, offset: int, full_layers: list[int]
) -> None:
    letters = freq_letters(num_layers, freq, offset)
    assert [layer for layer, letter in enumerate(letters) if letter == "F"] == full_layers
    assert len(letters) == num_layers


@pytest.mark.parametrize(
    ("num_layers", "freq", "offset", "num_full"),
    [(61, 4, 2, 16), (61, 2, 2, 31), (61, 8, 2, 9), (47, 4, 2, 13), (78, 4, 3, 21), (78, 4, 2, 21), (61, 4, 1, 16)],
)
def test_freq_gives_the_published_number_of_full_layers(
    num_layers: int, freq: int, offset: int, num_full: int
) -> None:
    assert freq_letters(num_layers, freq, offset).count("F") == num_full


def test_glm_52_as_shipped_resolves_by_its_types_without_warning() -> None:
    schedule = resolve_index_schedule(json.loads((CONFIGS / "glm_52.json").read_text()), 78)
    assert schedule == IndexSchedule(freq_letters(78, 4, 3), "indexer_types")
    assert schedule.letters == "FFF" + "SSSF" * 18 + "SSS"
    assert schedule.full_layers == (0, 1, *range(2, 75, 4))


@pytest.mark.parametrize(
    ("config", "letters", "dialect", "warnings"),
    [
        ({}, "FFFFFF", "default", []),
        ({"index_topk_freq": 4}, "FFSSSF", "index_topk_freq", []),
        ({"use_index_cache": True, "index_topk_freq": 4}, "FFSSSF", "index_topk_freq", []),
        ({"use_index_cache": True}, "FFFFFF", "default", ["W4"]),
        ({"use_index_cache": False}, "FFFFFF", "use_index_cache", []),
        ({"use_index_cache": False, "index_topk_freq": 4}, "FFFFFF", "use_index_cache", ["W7"]),
        ({"use_index_cache": False, "index_topk_pattern": "not validated"}, "FFFFFF", "use_index_cache", ["W7"]),
        ({"use_index_cache": False, "indexer_types": ["shared"]}, "FFFFFF", "use_index_cache", ["W7"]),
        ({"use_index_cache": False, "index_skip_topk_offset": 3}, "FFFFFF", "use_index_cache", []),
        ({"use_index_cache": None, "index_topk_freq": 4}, "FFSSSF", "index_topk_freq", []),
        ({"use_index_cache": None, "index_topk_freq": None}, "FFFFFF", "default", []),
    ],
)
def test_gate_decides_whether_the_schedule_keys_count(
    config: dict[str, Any], letters: str, dialect: str, warnings: list[str]
) -> None:
    schedule = resolve_index_schedule(config, 6)
    assert (schedule.letters, schedule.dialect, codes(schedule)) == (letters, dialect, warnings)


TYPES = ["full", "shared", "full", "shared"]


@pytest.mark.parametrize(
    ("config", "letters", "dialect", "warnings"),
    [
        ({"indexer_types": TYPES, "index_topk_pattern": "FSFS"}, "FSFS", "indexer_types", []),
        (
            {"indexer_types": TYPES, "index_topk_pattern": "FSFS", "index_topk_freq": 1},
            "FSFS",
            "indexer_types",
            ["W2"],
        ),
        ({"indexer_types": TYPES, "index_topk_pattern": None}, "FSFS", "indexer_types", []),
        ({"indexer_types": TYPES, "index_topk_freq": 2, "index_skip_topk_offset": 1}, "FSFS", "indexer_types", []),
        ({"indexer_types": TYPES, "index_topk_freq": 2}, "FSFS", "indexer_types", ["W2"]),
        ({"indexer_types": TYPES, "index_topk_freq": "x"}, "FSFS", "indexer_types", []),
        ({"indexer_types": TYPES, "index_topk_freq": 2, "index_skip_topk_offset": 0}, "FSFS", "indexer_types", []),
        ({"indexer_types": tuple(TYPES)}, "FSFS", "indexer_types", []),
        ({"index_topk_pattern": "FSSF", "index_topk_freq": 0}, "FSSF", "index_topk_pattern", ["W1"]),
        ({"index_topk_pattern": ["F", "shared", "S", "full"]}, "FSSF", "index_topk_pattern", []),
        ({"index_skip_topk_offset": 0}, "FFFF", "default", []),
        ({"index_topk_freq": 2, "index_skip_topk_offset": None}, "FFSF", "index_topk_freq", []),
    ],
)
def test_the_most_explicit_key_wins_and_only_it_is_validated(
    config: dict[str, Any], letters: str, dialect: str, warnings: list[str]
) -> None:
    schedule = resolve_index_schedule(config, 4)
    assert (schedule.letters, schedule.dialect, codes(schedule)) == (letters, dialect, warnings)


def test_types_that_no_freq_can_express_resolve_exactly() -> None:
    types = ["full", "shared", "shared", "full", "full", "shared", "full"]
    expressible = {freq_letters(7, freq, offset) for freq in range(1, 9) for offset in range(1, 9)}
    letters = resolve_index_schedule({"indexer_types": types}, 7).letters
    assert letters == "FSSFFSF"
    assert letters not in expressible


@pytest.mark.parametrize(
    ("config", "code", "message"),
    [
        ({"use_index_cache": "yes"}, "E01", "use_index_cache: expected true, false or null, got 'yes'"),
        ({"use_index_cache": 1}, "E01", "use_index_cache: expected true, false or null, got 1"),
        ({"indexer_types": "FFFS"}, "E02", "indexer_types: expected a list, got 'FFFS'"),
        (
            {"indexer_types": ["full", "Shared", "full", "full"]},
            "E02",
            "indexer_types: position 1: expected 'full' or 'shared', got 'Shared'",
        ),
        (
            {"indexer_types": ["full", "full", ["full"], "full"]},
            "E02",
            "indexer_types: position 2: expected 'full' or 'shared', got ['full']",
        ),
        ({"indexer_types": ["full"] * 3}, "E03", "indexer_types: expected 4 entries, one per backbone layer, got 3"),
        ({"index_topk_pattern": "FfSF"}, "E04", "index_topk_pattern: position 1: expected 'F' or 'S', got 'f'"),
        ({"index_topk_pattern": ["F", None]}, "E04", "index_topk_pattern: position 1: expected 'F' or 'S', got None"),
        ({"index_topk_pattern": 4}, "E04", "index_topk_pattern: expected a string or a list, got 4"),
        (
            {"index_topk_pattern": "FFS"},
            "E05",
            "index_topk_pattern: expected 4 entries, one per backbone layer, got 3",
        ),
        (
            {"index_topk_pattern": "FFSSF"},
            "E05",
            "index_topk_pattern: expected 4 entries, one per backbone layer, got 5",
        ),
        ({"index_topk_pattern": ""}, "E05", "index_topk_pattern: expected 4 entries, one per backbone layer, got 0"),
        *[
            ({"index_topk_freq": freq}, "E06", f"index_topk_freq: expected an int >= 1, got {freq!r}")
            for freq in (0, -1, True, 2.0, "4")
        ],
        *[
            (
                {"index_topk_freq": 4, "index_skip_topk_offset": offset},
                "E07",
                f"index_skip_topk_offset: expected an int >= 1, got {offset!r}",
            )
            for offset in (0, -1, True, 2.0)
        ],
        ({"index_topk_pattern": "SFFF"}, "E08", "index_topk_pattern: layer 0: expected a full layer, got S"),
        ({"indexer_types": ["shared"] * 4}, "E08", "indexer_types: layer 0: expected a full layer, got S"),
        ({"cli_factor": 2}, "E09", "cli_factor: not supported, expected null or at most 1, got 2"),
        ({"index_kpool": "2"}, "E09", "index_kpool: not supported, expected null or at most 1, got '2'"),
        ({"kv_source_layer_ids": [2]}, "E09", "kv_source_layer_ids: source-layer lists are not supported, got [2]"),
        (
            {"index_source_layer_ids": []},
            "E09",
            "index_source_layer_ids: source-layer lists are not supported, got []",
        ),
        (
            {"indexer_types": TYPES, "index_topk_pattern": "FSSS"},
            "E10",
            "layer 2: indexer_types says F, index_topk_pattern says S",
        ),
    ],
)
def test_a_mistake_is_told_with_its_code_key_and_value(config: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(IndexScheduleError, match=re.escape(f"{code}: {message}")) as caught:
        resolve_index_schedule(config, 4)
    assert caught.value.code == code
    assert str(caught.value) == f"{code}: {message}"


def test_a_pattern_beside_types_is_validated() -> None:
    with pytest.raises(IndexScheduleError, match="E04"):
        resolve_index_schedule({"indexer_types": TYPES, "index_topk_pattern": "FxFS"}, 4)


def test_a_short_pattern_is_filled_up_where_that_is_allowed() -> None:
    schedule = resolve_index_schedule({"index_topk_pattern": "FFS"}, 4, allow_short=True)
    assert (schedule.letters, codes(schedule)) == ("FFSF", ["W5"])


def test_a_long_pattern_is_an_error_even_where_short_ones_are_allowed() -> None:
    with pytest.raises(IndexScheduleError, match="E05"):
        resolve_index_schedule({"index_topk_pattern": "FFSSF"}, 4, allow_short=True)


@pytest.mark.parametrize(
    ("pattern", "num_layers", "num_full", "longest_shared_run"),
    [
        (PUBLISHED_30B["half"], 47, 24, 4),
        (PUBLISHED_30B["quarter"], 47, 12, 9),
        (PUBLISHED_30B["eighth"], 47, 7, 9),
        (GLM_5_HALF, 78, 40, 6),
        (GLM_5_QUARTER, 78, 22, 8),
        (GLM_5_HALF[:61], 61, 32, 6),
    ],
)
def test_published_patterns_resolve(pattern: str, num_layers: int, num_full: int, longest_shared_run: int) -> None:
    schedule = resolve_index_schedule({"index_topk_pattern": pattern}, num_layers)
    assert len(schedule.full_layers) == num_full
    assert max(layer - schedule.source(layer) for layer in range(num_layers)) == longest_shared_run


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        (PUBLISHED_30B["eighth"], PUBLISHED_30B["quarter"]),
        (PUBLISHED_30B["quarter"], PUBLISHED_30B["half"]),
        (GLM_5_QUARTER, GLM_5_HALF),
    ],
)
def test_published_patterns_are_nested(smaller: str, larger: str) -> None:
    assert set(IndexSchedule(smaller).full_layers) < set(IndexSchedule(larger).full_layers)


@pytest.mark.parametrize(
    ("letters", "layers", "kinds"),
    [
        (freq_letters(78, 4, 3), (39, 18, 38, 58), "SFFF"),
        (freq_letters(61, 4), (16, 31, 46), "SSS"),
        (freq_letters(61, 4), (17, 33, 49), "FFF"),
    ],
)
def test_kind_of_layers_at_which_a_pipeline_stage_may_start(letters: str, layers: tuple[int, ...], kinds: str) -> None:
    schedule = IndexSchedule(letters)
    assert "".join("F" if schedule.is_full(layer) else "S" for layer in layers) == kinds


def test_source_is_the_nearest_full_layer_below() -> None:
    schedule = IndexSchedule("FFSSF")
    assert [schedule.source(layer) for layer in range(5)] == [0, 1, 1, 1, 4]
    assert [schedule.is_full(layer) for layer in range(5)] == [True, True, False, False, True]


@pytest.mark.parametrize("layer", [-1, 5, 6])
def test_a_layer_outside_the_backbone_has_no_source(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer: expected a backbone layer, 0 to 4, got {layer}"):
        IndexSchedule("FFSSF").source(layer)


@pytest.mark.parametrize(("letters", "code"), [("SF", "E08"), ("FX", "E04"), ("f", "E04")])
def test_letters_are_checked_however_a_schedule_is_made(letters: str, code: str) -> None:
    with pytest.raises(IndexScheduleError) as caught:
        IndexSchedule(letters)
    assert caught.value.code == code


def test_description_has_counts_letters_and_the_deciding_key() -> None:
    described = resolve_index_schedule({"index_topk_freq": 2}, 4).describe()
    assert described == "3 full and 1 shared layers from index_topk_freq: FFSF"


@UNHURRIED
@given(letters=st.text("FS", max_size=80).map("F".__add__))
def test_every_spelling_of_a_schedule_resolves_to_it(letters: str) -> None:
    types = ["full" if letter == "F" else "shared" for letter in letters]
    for config in ({"indexer_types": types}, {"index_topk_pattern": letters}, {"index_topk_pattern": types}):
        schedule = resolve_index_schedule(config, len(letters))
        assert schedule.letters == letters
        for layer in range(len(letters)):
            source = schedule.source(layer)
            assert letters[source : layer + 1] == "F" + "S" * (layer - source)


@UNHURRIED
@given(num_layers=st.integers(1, 100), freq=st.integers(1, 12), offset=st.integers(1, 12))
def test_freq_starts_with_offset_full_layers_and_then_shares_freq_minus_one(
    num_layers: int, freq: int, offset: int
) -> None:
    expected = "F" * (offset - 1) + ("F" + "S" * (freq - 1)) * num_layers
    assert freq_letters(num_layers, freq, offset) == expected[:num_layers]


@UNHURRIED
@given(config=st.dictionaries(st.sampled_from(SCHEDULE_KEYS), JSON_VALUES), num_layers=st.integers(0, 5))
def test_any_values_give_a_whole_schedule_or_a_coded_error(config: dict[str, Any], num_layers: int) -> None:
    try:
        schedule = resolve_index_schedule(config, num_layers)
    except IndexScheduleError as error:
        assert re.fullmatch(r"E\d\d", error.code)  # noqa: PT017 - raising is one of two right answers
    else:
        assert len(schedule.letters) == num_layers


def test_letters_may_stand_for_some_layers_only() -> None:
    schedule = IndexSchedule("FSF", layer_ids=(2, 4, 9))
    assert schedule.full_layers == (2, 9)
    assert [schedule.source(layer) for layer in (2, 4, 9)] == [2, 2, 9]
    with pytest.raises(ValueError, match=r"^layer: expected layer 2 or 4 or 9, got 3$"):
        schedule.source(3)


@pytest.mark.parametrize("layer_ids", [(2, 4), (2, 4, 4), (4, 2, 9), (-1, 2, 3)])
def test_layers_of_letters_are_as_many_and_ascend(layer_ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^layer_ids: expected "):
        IndexSchedule("FSF", layer_ids=layer_ids)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"index_topk_pattern": "SFF"}, "E08: index_topk_pattern: layer 2: expected a full layer, got S"),
        (
            {"index_topk_pattern": "FFFFFFFFFF"},
            "E05: index_topk_pattern: expected 3 entries, one per layer with an indexer (layer 2 or 4 or 9), got 10, "
            "which is one per backbone layer",
        ),
        (
            {"indexer_types": ["full"] * 4},
            "E03: indexer_types: expected 3 entries, one per layer with an indexer (layer 2 or 4 or 9), got 4",
        ),
        (
            {"indexer_types": ["full", "shared", "full"], "index_topk_pattern": "FSS"},
            "E10: layer 9: indexer_types says F, index_topk_pattern says S",
        ),
    ],
)
def test_a_mistake_in_a_list_over_some_layers_names_them(config: dict[str, Any], message: str) -> None:
    with pytest.raises(IndexScheduleError, match=f"^{re.escape(message)}$"):
        resolve_index_schedule(config, 10, layer_ids=(2, 4, 9))


def test_a_pattern_may_be_an_object_that_carries_its_model() -> None:
    config = {"index_topk_pattern": {"pattern": "FSF", "model": {"name": "any"}}}
    assert resolve_index_schedule(config, 3).letters == "FSF"
    with pytest.raises(IndexScheduleError, match=r"^E04: index_topk_pattern: expected a string or a list, got None$"):
        resolve_index_schedule({"index_topk_pattern": {"model": {}}}, 3)


@UNHURRIED
@given(
    layer_ids=st.sets(st.integers(0, 99), min_size=1).map(sorted),
    freq=st.integers(1, 12),
    offset=st.integers(1, 12),
)
def test_freq_list_and_pattern_give_one_schedule_over_any_layers(layer_ids: list[int], freq: int, offset: int) -> None:
    by_freq = resolve_index_schedule(
        {"index_topk_freq": freq, "index_skip_topk_offset": offset}, 100, layer_ids=layer_ids
    )
    types = ["full" if by_freq.is_full(layer) else "shared" for layer in layer_ids]
    by_types = resolve_index_schedule({"indexer_types": types}, 100, layer_ids=layer_ids)
    by_pattern = resolve_index_schedule({"index_topk_pattern": by_types.letters}, 100, layer_ids=layer_ids)
    assert by_freq.letters == by_types.letters == by_pattern.letters
    full = set(by_freq.full_layers)
    assert len(full) == by_freq.letters.count("F") == types.count("full")
    for layer in layer_ids:
        source = by_pattern.source(layer)
        assert source in full
        assert (source == layer) == (layer in full)
        assert not [between for between in full if source < between <= layer]
