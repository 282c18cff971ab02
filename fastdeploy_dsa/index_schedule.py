"""Which layer computes its top-k indices (full, F) and which reuses the nearest earlier full layer's (shared, S).

Rules and codes (S9-S17, E01-E10, W1-W7) are those of IndexCache, arXiv 2603.12201, as GLM-5.2 ships it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeGuard

from fastdeploy_dsa.wording import CodedError, shown

ScheduleDialect = Literal["indexer_types", "index_topk_pattern", "index_topk_freq", "use_index_cache", "default"]

_DEFAULT_OFFSET = 2  # layers 0 and 1 are both full, as in the original rule max(l - 1, 0) % freq
_LETTER_OF_TYPE = {"full": "F", "shared": "S"}
_LETTER_OF_PATTERN_ENTRY = {"F": "F", "S": "S", **_LETTER_OF_TYPE}
_SCHEDULE_KEYS = ("indexer_types", "index_topk_pattern", "index_topk_freq")  # in order of precedence
_FOREIGN_COUNTS = ("cli_factor", "index_kpool")
_FOREIGN_LISTS = ("kv_source_layer_ids", "index_source_layer_ids")


class IndexScheduleError(CodedError):
    """A config whose index schedule cannot be used; codes are E01, E02, ..."""


@dataclass(frozen=True)
class IndexSchedule:
    """A letter per backbone layer that selects. Draft layers are outside: no pattern makes them share.

    Attributes:
        letters: F or S per layer; the first is F.
        dialect: The config key that decided.
        warnings: Texts that start with a code, "W1: ...".
        layer_ids: The backbone layers the letters stand for, ascending; left out: 0, 1, 2, ...
    """

    letters: str
    dialect: ScheduleDialect = "default"
    warnings: tuple[str, ...] = ()
    layer_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the letters.

        Raises:
            ValueError: As many layers as letters are expected, ascending.
            IndexScheduleError: E04 for a letter other than F and S, E08 if the first is S.
        """
        if not self.layer_ids:
            object.__setattr__(self, "layer_ids", tuple(range(len(self.letters))))
        if len(self.layer_ids) != len(self.letters):
            raise ValueError(f"layer_ids: expected {len(self.letters)}, one per letter, got {len(self.layer_ids)}")
        if any(layer >= above for layer, above in pairwise((-1, *self.layer_ids))):
            raise ValueError(f"layer_ids: expected ascending ids from 0, got {shown(self.layer_ids)}")
        for layer, letter in zip(self.layer_ids, self.letters, strict=True):
            if letter not in "FS":
                raise IndexScheduleError("E04", f"{self.dialect}: layer {layer}: expected 'F' or 'S', got {letter!r}")
        if self.letters.startswith("S"):
            first = self.layer_ids[0]
            raise IndexScheduleError("E08", f"{self.dialect}: layer {first}: expected a full layer, got S")

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer, letter in zip(self.layer_ids, self.letters, strict=True) if letter == "F")

    def is_full(self, layer: int) -> bool:
        return self.source(layer) == layer

    def source(self, layer: int) -> int:
        """The layer whose indices the given layer uses: itself or the nearest full layer below.

        Raises:
            ValueError: The layer has no letter.
        """
        place = bisect_left(self.layer_ids, layer)
        if self.layer_ids[place : place + 1] != (layer,):
            raise ValueError(f"layer: expected {_described(self.layer_ids)}, got {layer}")
        return self.layer_ids[self.letters.rindex("F", 0, place + 1)]

    def describe(self) -> str:
        """One line for the log: letters, counts and the key that decided."""
        full = len(self.full_layers)
        return f"{full} full and {len(self.letters) - full} shared layers from {self.dialect}: {self.letters}"


def freq_letters(num_layers: int, freq: int, offset: int = _DEFAULT_OFFSET) -> str:
    """Layer l is shared iff max(l - offset + 1, 0) % freq != 0."""
    return "".join("S" if max(layer - offset + 1, 0) % freq else "F" for layer in range(num_layers))


def resolve_index_schedule(
    config: Mapping[str, object],
    num_layers: int,
    *,
    layer_ids: Sequence[int] | None = None,
    allow_short: bool = False,
) -> IndexSchedule:
    """The schedule of a text config; only the key that wins is validated, and a pattern beside `indexer_types`.

    Precedence: `use_index_cache: false`, `indexer_types`, `index_topk_pattern`, `index_topk_freq` with
    `index_skip_topk_offset`, all full. A key whose value is None is absent.

    Args:
        config: The text config, overrides applied.
        num_layers: Backbone layers.
        layer_ids: Those that select, if not all do; lists, patterns and the frequency then count them alone.
        allow_short: A pattern shorter than the model is filled up with F (W5) instead of E05.

    Raises:
        IndexScheduleError: E01 to E10.
    """
    counted = _CountedLayers(tuple(range(num_layers)) if layer_ids is None else tuple(layer_ids), num_layers)
    _refuse_foreign_dialects(config)
    gate = config.get("use_index_cache")
    if gate is not None and not isinstance(gate, bool):
        raise IndexScheduleError("E01", f"use_index_cache: expected true, false or null, got {shown(gate)}")
    has_schedule = any(config.get(key) is not None for key in _SCHEDULE_KEYS)
    if has_schedule and gate is not False:
        return _schedule_of_keys(config, counted, allow_short)
    letters = "F" * len(counted.layer_ids)
    if gate is False:
        ignored = ("W7: use_index_cache is false: every layer is full, the schedule keys are ignored",)
        return IndexSchedule(letters, "use_index_cache", ignored if has_schedule else (), counted.layer_ids)
    nothing_to_do = ("W4: use_index_cache is true, but no schedule key is given: every layer is full",)
    return IndexSchedule(letters, "default", nothing_to_do if gate else (), counted.layer_ids)


def pattern_entries(pattern: object) -> object:
    """The letters of `index_topk_pattern`: of its key `pattern` where it is an object that names a model, too."""
    return pattern.get("pattern") if isinstance(pattern, Mapping) else pattern


@dataclass(frozen=True)
class _CountedLayers:
    """The layers a list, a pattern or the frequency rule counts, of all backbone layers."""

    layer_ids: tuple[int, ...]
    num_layers: int

    def require_length(self, key: str, code: str, actual: int) -> None:
        expected = len(self.layer_ids)
        if actual == expected:
            return
        if expected == self.num_layers:
            raise IndexScheduleError(code, f"{key}: expected {expected} entries, one per backbone layer, got {actual}")
        message = f"{key}: expected {expected} entries, one per layer with an indexer ({_described(self.layer_ids)})"
        hint = ", which is one per backbone layer" if actual == self.num_layers else ""
        raise IndexScheduleError(code, f"{message}, got {actual}{hint}")


def _described(layer_ids: tuple[int, ...]) -> str:
    """Layers in few words: "a backbone layer, 0 to 60", "layer 2, 4, ..., 42"."""
    if not layer_ids:
        return "no layer, for none selects"
    if layer_ids == tuple(range(len(layer_ids))):
        return f"a backbone layer, 0 to {len(layer_ids) - 1}"
    if len(layer_ids) < 5:
        return f"layer {' or '.join(map(str, layer_ids))}"
    return f"layer {layer_ids[0]}, {layer_ids[1]}, ..., {layer_ids[-1]}"


def _schedule_of_keys(config: Mapping[str, object], counted: _CountedLayers, allow_short: bool) -> IndexSchedule:
    types, pattern, freq = (config.get(key) for key in _SCHEDULE_KEYS)
    offset = config.get("index_skip_topk_offset")
    offset = _DEFAULT_OFFSET if offset is None else offset
    num_counted = len(counted.layer_ids)
    warnings: list[str] = []
    dialect: ScheduleDialect = "index_topk_freq"
    if types is not None:
        dialect, letters = "indexer_types", _letters_of_types(types, counted)
        if pattern is not None:
            pattern_letters = _letters_of_pattern(pattern, counted, allow_short, warnings)
            _require_same(counted.layer_ids, letters, pattern_letters)
        if _is_positive_int(freq) and _is_positive_int(offset) and freq_letters(num_counted, freq, offset) != letters:
            warnings.append("W2: indexer_types and index_topk_freq disagree: indexer_types is used")
    elif pattern is not None:
        dialect, letters = "index_topk_pattern", _letters_of_pattern(pattern, counted, allow_short, warnings)
        if freq is not None:
            warnings.append("W1: index_topk_pattern and index_topk_freq are both given: the pattern is used")
    else:
        letters = _letters_of_freq(freq, offset, num_counted)
    return IndexSchedule(letters, dialect, tuple(warnings), counted.layer_ids)


def _refuse_foreign_dialects(config: Mapping[str, object]) -> None:
    for key in _FOREIGN_COUNTS:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value > 1):
            raise IndexScheduleError("E09", f"{key}: not supported, expected null or at most 1, got {shown(value)}")
    for key in _FOREIGN_LISTS:
        if config.get(key) is not None:
            message = f"{key}: source-layer lists are not supported, got {shown(config[key])}"
            raise IndexScheduleError("E09", message)


def _is_positive_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _letters_of_types(types: object, counted: _CountedLayers) -> str:
    if not isinstance(types, list | tuple):
        raise IndexScheduleError("E02", f"indexer_types: expected a list, got {shown(types)}")
    for position, entry in enumerate(types):
        if not isinstance(entry, str) or entry not in _LETTER_OF_TYPE:
            message = f"indexer_types: position {position}: expected 'full' or 'shared', got {shown(entry)}"
            raise IndexScheduleError("E02", message)
    counted.require_length("indexer_types", "E03", len(types))
    return "".join(_LETTER_OF_TYPE[entry] for entry in types)


def _letters_of_pattern(pattern: object, counted: _CountedLayers, allow_short: bool, warnings: list[str]) -> str:
    entries = pattern_entries(pattern)
    if not isinstance(entries, str | list | tuple):
        raise IndexScheduleError("E04", f"index_topk_pattern: expected a string or a list, got {shown(entries)}")
    for position, entry in enumerate(entries):
        if not isinstance(entry, str) or entry not in _LETTER_OF_PATTERN_ENTRY:
            message = f"index_topk_pattern: position {position}: expected 'F' or 'S', got {shown(entry)}"
            raise IndexScheduleError("E04", message)
    letters, expected = "".join(_LETTER_OF_PATTERN_ENTRY[entry] for entry in entries), len(counted.layer_ids)
    if allow_short and len(letters) < expected:
        warnings.append(f"W5: index_topk_pattern has {len(letters)} of {expected} entries: the rest is full")
        letters = letters.ljust(expected, "F")
    counted.require_length("index_topk_pattern", "E05", len(letters))
    return letters


def _letters_of_freq(freq: object, offset: object, num_layers: int) -> str:
    if not _is_positive_int(freq):
        raise IndexScheduleError("E06", f"index_topk_freq: expected an int >= 1, got {shown(freq)}")
    if not _is_positive_int(offset):
        raise IndexScheduleError("E07", f"index_skip_topk_offset: expected an int >= 1, got {shown(offset)}")
    return freq_letters(num_layers, freq, offset)


def _require_same(layer_ids: tuple[int, ...], letters: str, pattern_letters: str) -> None:
    for layer, letter, pattern_letter in zip(layer_ids, letters, pattern_letters, strict=True):
        if letter != pattern_letter:
            message = f"layer {layer}: indexer_types says {letter}, index_topk_pattern says {pattern_letter}"
            raise IndexScheduleError("E10", message)
