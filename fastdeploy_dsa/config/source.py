"""A config.json as it is given: its content, that of generation_config.json beside it, and what replaces values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeploy_dsa.config.keys import ConfigError, ConfigKeys
from fastdeploy_dsa.strict_json import read_json_object, require_shallow
from fastdeploy_dsa.wording import shown

_ENVELOPE_KEYS = ("quantization_config", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "tie_word_embeddings")


@dataclass(frozen=True)
class ConfigSource:
    """What a config is read from.

    Attributes:
        content: The whole file.
        overrides: Values that replace those of the text config.
        generation: The content of generation_config.json; empty without one.
        path: The file; None if the content was given.
    """

    content: Mapping[str, Any]
    overrides: Mapping[str, Any]
    generation: Mapping[str, Any]
    path: Path | None

    def keys(self) -> ConfigKeys:
        """The text config, what concerns the whole checkpoint and stands around it, and the overrides.

        Raises:
            ConfigError: The text config is no object, or is to be replaced.
        """
        wrapped = self.content.get("text_config") is not None
        text = ConfigKeys(self.content).mapping("text_config") if wrapped else self.content
        envelope = {key: self.content[key] for key in _ENVELOPE_KEYS if key in self.content}
        keys = ConfigKeys({**envelope, **text, **self.overrides})
        if "text_config" in keys:
            raise ConfigError("text_config: expected at the top level only; overrides reach into it by themselves")
        return keys

    def eos_token_ids(self, keys: ConfigKeys) -> tuple[int, ...]:
        """Ids of the keys, then those that generation_config.json adds, each once.

        Raises:
            ConfigError: An id is no int >= 0.
        """
        token_ids: list[int] = []
        for given in (keys, {} if "eos_token_id" in self.overrides else self.generation):
            value = given.get("eos_token_id")
            if value is None:
                continue
            for token_id in value if isinstance(value, list | tuple) else [value]:
                if type(token_id) is not int or token_id < 0:
                    raise ConfigError(f"eos_token_id: expected an int >= 0 or a list of them, got {shown(value)}")
                token_ids.append(token_id)
        return tuple(dict.fromkeys(token_ids))

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Errors of what is read begin with the file and the overrides."""
        try:
            yield
        except ConfigError as reason:
            if self.path is None:
                raise
            replaced = f" with overrides of {', '.join(map(str, self.overrides))}" if self.overrides else ""
            raise type(reason)(f"{self.path}{replaced}: {reason}") from None


def read_source(
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None
) -> ConfigSource:
    """The files, or the content, that `ModelConfig.from_pretrained` is given.

    Raises:
        ConfigError: A wrong argument, no such file, or one that is no JSON object.
    """
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise ConfigError(f"overrides: expected a mapping, got {shown(overrides)}")
    _require_shallow("overrides", overrides)
    if isinstance(path_or_dict, Mapping):
        _require_shallow("path_or_dict", path_or_dict)
        return ConfigSource(path_or_dict, overrides, generation={}, path=None)
    if not isinstance(path_or_dict, str | os.PathLike):
        raise ConfigError(f"path_or_dict: expected a path or a mapping, got {type(path_or_dict).__name__}")
    path = Path(path_or_dict)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        raise ConfigError(f"{path}: expected a file, got a folder" if path.is_dir() else f"{path}: no such file")
    generation_path = path.with_name("generation_config.json")
    content = read_json_object(path, ConfigError)
    generation = read_json_object(generation_path, ConfigError) if generation_path.is_file() else {}
    return ConfigSource(content, overrides, generation, path)


def _require_shallow(name: str, content: Mapping[str, Any]) -> None:
    try:
        require_shallow(content)
    except ValueError as reason:
        raise ConfigError(f"{name}: {reason}") from None
