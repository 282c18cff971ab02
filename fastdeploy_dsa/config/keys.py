"""Typed access to the keys of a config.json, and the errors that name a key, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from fastdeploy_dsa.softmax_scale import is_finite_number
from fastdeploy_dsa.wording import shown

# Limits far above any model, so that a wrong digit is an error here and not an allocation later.
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 16
MAX_VOCAB_SIZE = 1 << 24
MAX_POSITIONS = (1 << 31) - 1  # positions and lengths are int32 in the kernels

REQUIRED: Any = object()


class ConfigError(ValueError):
    """A config that is malformed, or whose values do not fit together."""


class UnsupportedConfigError(ConfigError, NotImplementedError):
    """A config of a model, or with a feature, that this package does not serve."""


class ConfigKeys(Mapping[str, Any]):
    """Keys of a config, None left out; remembers the keys that were asked for."""

    def __init__(self, content: Mapping[str, Any], prefix: str = "") -> None:
        """Keep the values that are not None; the prefix stands before a key's name in messages."""
        self._values = {key: value for key, value in content.items() if value is not None}
        self._prefix = prefix
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def value(self, key: str, default: Any = REQUIRED) -> Any:
        if default is REQUIRED and key not in self:
            raise ConfigError(f"{self._prefix}{key}: missing")
        return self.get(key, default)

    def integer(self, key: str, maximum: int = MAX_WIDTH, *, minimum: int = 1, default: Any = REQUIRED) -> int:
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self.refuse(key, f"an int from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: Any = REQUIRED, *, above: float = 0.0) -> float:
        value = self.value(key, default)
        if not is_finite_number(value) or value <= above:
            self.refuse(key, f"a finite number > {above:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def mapping(self, key: str) -> ConfigKeys:
        value = self[key]
        if not isinstance(value, Mapping):
            self.refuse(key, "an object")
        return ConfigKeys(value, f"{self._prefix}{key}.")

    def entries(self, key: str, allowed: tuple[object, ...], length: int | None = None) -> list[Any]:
        """A list whose entries are among the allowed ones; of the given length, unless that is None."""
        entries = self[key]
        if not isinstance(entries, list | tuple):
            self.refuse(key, "a list")
        for position, entry in enumerate(entries):
            if not any(type(entry) is type(value) and entry == value for value in allowed):
                expected = " or ".join(map(repr, allowed))
                raise ConfigError(f"{self._prefix}{key}: position {position}: expected {expected}, got {shown(entry)}")
        if length is not None and len(entries) != length:
            raise ConfigError(f"{self._prefix}{key}: expected {length} entries, one per layer, got {len(entries)}")
        return list(entries)

    def require_fixed(self, fixed: Mapping[str, object]) -> None:
        """Refuse keys whose value differs from the only one supported."""
        for key, supported in fixed.items():
            value = self.get(key, supported)
            if type(value) is not type(supported) or value != supported:
                message = f"{self._prefix}{key}: only {shown(supported)} is supported, got {shown(value)}"
                raise UnsupportedConfigError(message)

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise ConfigError(f"{self._prefix}{key}: expected {expected}, got {shown(self[key])}")
