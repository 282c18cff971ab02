"""What a user asks of speculative decoding, spelled as in FastDeploy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastdeploy_dsa.engine.validation import require_bool, require_int
from fastdeploy_dsa.strict_json import parse_json_object
from fastdeploy_dsa.wording import shown

MAX_SPECULATIVE_TOKENS = 5
"""FastDeploy's limit; GLM-5.2 is served with 5."""

_NAME = "speculative_config"


@dataclass(frozen=True)
class SpeculativeConfig:
    """How requests are drafted.

    Attributes:
        method: Who drafts: "mtp" is the checkpoint's own MTP layer.
        num_speculative_tokens: Drafts of a round at most.
        adaptive: Whether a request whose drafts are rejected gets fewer of them, or none for a while.

    Raises:
        ValueError: A value is not possible; the message names it.
    """

    method: Literal["mtp"] = "mtp"
    num_speculative_tokens: int = 1
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.method != "mtp":
            raise ValueError(f"{_NAME}.method: expected 'mtp', got {shown(self.method)}")
        require_int(f"{_NAME}.num_speculative_tokens", self.num_speculative_tokens, low=1, high=MAX_SPECULATIVE_TOKENS)
        require_bool(f"{_NAME}.adaptive", self.adaptive)

    def check_depth(self, num_layers: int) -> None:
        """Check that a checkpoint with so many MTP layers can draft as asked for.

        One layer is fed with its own results, as often as wanted; of several, each looks one token further.

        Raises:
            ValueError: It cannot.
        """
        if num_layers == 0:
            raise ValueError(
                f"{_NAME}: expected a model with an MTP layer, got num_nextn_predict_layers 0 in its config"
            )
        if 1 < num_layers < self.num_speculative_tokens:
            raise ValueError(
                f"{_NAME}.num_speculative_tokens: expected at most {num_layers}, one per MTP layer of the checkpoint, "
                f"got {self.num_speculative_tokens}"
            )


def read_speculative_config(value: object) -> SpeculativeConfig | None:
    """A config from a mapping, or from the text of a JSON object; None stays None: no drafts.

    Raises:
        ValueError: It is something else, a key is missing or unknown, or a value is not possible.
    """
    if value is None or isinstance(value, SpeculativeConfig):
        return value
    if isinstance(value, str):
        value = parse_json_object(value, _NAME, ValueError)
    if not isinstance(value, Mapping):
        raise ValueError(f"{_NAME}: expected an object such as {{'method': 'mtp'}}, got {shown(value)}")
    content: dict[Any, Any] = dict(value)
    known = [field.name for field in fields(SpeculativeConfig)]
    for key in ("method", "num_speculative_tokens"):
        if key not in content:
            raise ValueError(f"{_NAME}.{key}: missing")
    for key in content:
        if key not in known:
            raise ValueError(f"{_NAME}: expected the keys {', '.join(known)}, got {shown(key)}")
    return SpeculativeConfig(**content)
