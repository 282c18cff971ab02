"""Text to token ids and back, from the files of a model folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import tokenizers

TOKENIZER_FILE = "tokenizer.json"
# Files that another library can make a tokenizer of.
OTHER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer; any thread may use it at any time."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model expects around it unless they are there."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of tokens; ids without a text give none."""


class JsonTokenizer:
    """A tokenizer.json, read by the tokenizers library."""

    def __init__(self, folder: Path) -> None:
        """Read the folder's tokenizer.json, and from tokenizer_config.json whether a prompt starts with bos.

        Raises:
            ValueError: A file is not what its name says.
        """
        path = folder / TOKENIZER_FILE
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class
            raise ValueError(f"{path}: expected a tokenizer, got a file that cannot be read: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._bos_id = self._bos_of(folder / "tokenizer_config.json")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As Tokenizer says.

        Raises:
            ValueError: The tokenizer has no tokens for the text.
        """
        try:
            token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # the library raises the bare class
            raise ValueError(f"expected text that the tokenizer has tokens for: {error}") from error
        if add_special_tokens and self._bos_id is not None and token_ids[:1] != [self._bos_id]:
            token_ids.insert(0, self._bos_id)
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """As Tokenizer says."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def _bos_of(self, path: Path) -> int | None:
        """Id of the token that tokenizer_config.json puts before every prompt (tokenizer.json may not say so)."""
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: expected JSON, got a file that cannot be read: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
        if content.get("add_bos_token") is not True:
            return None
        bos = content.get("bos_token")
        bos = bos.get("content") if isinstance(bos, dict) else bos
        bos_id: int | None = self._tokenizer.token_to_id(bos) if isinstance(bos, str) else None
        if bos_id is None:
            raise ValueError(f"{path}: add_bos_token needs a bos_token of {TOKENIZER_FILE}, got {bos!r}")
        return bos_id


class PaddleNlpTokenizer:
    """Any tokenizer that paddlenlp (extra nlp) knows."""

    def __init__(self, folder: Path, auto_tokenizer: Any) -> None:
        """Load with paddlenlp's AutoTokenizer."""
        self._tokenizer = auto_tokenizer.from_pretrained(str(folder))
        self._lock = Lock()  # the library does not say what threads may do

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As Tokenizer says."""
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """As Tokenizer says."""
        with self._lock:
            return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


def load_tokenizer(folder: Path) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a model folder.

    Returns:
        The tokenizer and "", or None and why there is none.

    Raises:
        ValueError: The folder has a tokenizer that cannot be read.
    """
    if (folder / TOKENIZER_FILE).exists():
        return JsonTokenizer(folder), ""
    other = next((name for name in OTHER_TOKENIZER_FILES if (folder / name).exists()), None)
    if other is None:
        return None, f"{folder} has no {TOKENIZER_FILE}"
    try:
        from paddlenlp.transformers import AutoTokenizer  # type: ignore[import-not-found]  # noqa: PLC0415
    except ImportError:
        return None, f"{folder} has {other} and no {TOKENIZER_FILE}: reading it needs the extra 'nlp'"
    return PaddleNlpTokenizer(folder, AutoTokenizer), ""
