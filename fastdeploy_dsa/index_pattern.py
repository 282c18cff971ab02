"""The model a pattern was searched for: a pattern fits one model only, and its length cannot tell (W3, E14).

`index_topk_pattern` may be an object that carries the model beside the letters:
`{"pattern": "FFSS...", "model": {"name": ..., "fingerprint": ...}}`. `pattern_of_artefact` makes one from the file of
a pattern search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastdeploy_dsa.strict_json import read_json_object
from fastdeploy_dsa.wording import shown

if TYPE_CHECKING:
    from fastdeploy_dsa.config.model_config import ModelConfig
    from fastdeploy_dsa.config.rope import RopeConfig

ARTEFACT_FORMAT = "dsa-index-pattern/1"

_FINGERPRINT_FIELDS = (
    *("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk"),
    "indexer_rope_interleave",
)
_ROPE_FIELDS = ("rope", "main_rope", "compress_rope")
_SHORTEST_KNOWN_PREFIX = 16  # shorter ones occur by chance in small models


@dataclass(frozen=True)
class PublishedPattern:
    """A searched pattern found in public, and the model it fits.

    Attributes:
        model: The model's name.
        share: Full layers of all layers, about.
        letters: F or S per layer.
        fingerprint: That of the model's config; empty if the config is not public.
    """

    model: str
    share: str
    letters: str
    fingerprint: str


_GLM_5 = "cfe1c192bc3f776b0f92506955c6d13859b4732389f5868ccca90b8eaf01798d"
_SMALL = "a 30B model of 47 layers"
PUBLISHED_PATTERNS = (
    PublishedPattern(
        "GLM-5", "1/2", "FFSFSSSFSSFFFSSSFFFSFSSSSSSFFSFFSFFSSFFFFFFSFFFFFSFFSSSSSSFSFFFSFSSSFSFFSFFSSS", _GLM_5
    ),
    PublishedPattern(
        "GLM-5", "1/4", "FFSFSSSFSSFSFSSSSSSSFSSSSSSFSSSFSFSSSSFFFFFSSSFFSSSFSSSSSSSSFSSSFSSSSSSFSFSSSS", _GLM_5
    ),
    PublishedPattern(_SMALL, "1/2", "FSFSFSSSSFSFFFFSFFSSFFSFFFSSFFSSFSSSSFSFFFSFSSF", ""),
    PublishedPattern(_SMALL, "1/4", "FSFSFSSSSFSSSFSSFFSSFSSFSSSSFSSSFSSSSFSSSSSSSSS", ""),
    PublishedPattern(_SMALL, "1/8", "FSSSFSSSSSSSSFSSSFSSSSSFSSSSFSSSSSSSSFSSSSSSSSS", ""),
)


def model_fingerprint(config: ModelConfig, revision: str | None = None) -> str:
    """sha256 of what a searched pattern depends on; the same for every spelling of a config.

    Args:
        config: The model.
        revision: Of its weights, if known.

    Source: rule S41.
    """
    content: dict[str, object] = {name: getattr(config, name, None) for name in _FINGERPRINT_FIELDS}
    content |= {name: _rope_content(getattr(config, name)) for name in _ROPE_FIELDS if hasattr(config, name)}
    if revision is not None:
        content["revision"] = revision
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def pattern_doubts(pattern: object, letters: str, config: ModelConfig) -> str | None:
    """Why a pattern may not be this model's, or None if nothing speaks against it.

    Args:
        pattern: The value of `index_topk_pattern`.
        letters: What it resolved to.
        config: The model.
    """
    own = model_fingerprint(config)
    if isinstance(pattern, Mapping):
        model = pattern.get("model")
        model = model if isinstance(model, Mapping) else {}
        fingerprint, name = model.get("fingerprint"), shown(model.get("name"))
        if not isinstance(fingerprint, str):
            return f"index_topk_pattern: expected its model's fingerprint, got {shown(fingerprint)}"
        if fingerprint != own:
            return (
                f"index_topk_pattern was searched for another model, {name}: "
                f"expected fingerprint {own[:12]}, got {fingerprint[:12]}"
            )
        return None
    for published in PUBLISHED_PATTERNS:
        is_prefix = len(letters) >= _SHORTEST_KNOWN_PREFIX and published.letters.startswith(letters)
        if is_prefix and not (letters == published.letters and published.fingerprint == own):
            part = "" if letters == published.letters else f"the first {len(letters)} letters of "
            return (
                f"index_topk_pattern is {part}the published {published.share} pattern of {published.model}, "
                f"searched for another model than {config.architecture}"
            )
    return None


def pattern_of_artefact(path: str | Path, num_full: int) -> dict[str, object]:
    """A value for `index_topk_pattern` from the file of a pattern search.

    Args:
        path: The file.
        num_full: Which of its patterns, by the number of full layers.

    Raises:
        ValueError: The file is none, or has no such pattern.
    """
    artefact = read_json_object(Path(path), ValueError)
    if artefact.get("format") != ARTEFACT_FORMAT:
        raise ValueError(f"{path}: format: expected {ARTEFACT_FORMAT!r}, got {shown(artefact.get('format'))}")
    model, patterns = artefact.get("model"), artefact.get("patterns")
    for key, value in (("model", model), ("patterns", patterns)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {key}: expected an object, got {shown(value)}")
    letters = patterns.get(str(num_full)) if isinstance(patterns, dict) else None
    if not isinstance(letters, str):
        raise ValueError(
            f"{path}: patterns: expected one of {num_full} full layers, got {shown(sorted(patterns or ()))}"
        )
    return {"pattern": letters, "model": model}


def _rope_content(rope: RopeConfig) -> dict[str, object]:
    if rope.rope_type == "default":
        return {"rope_type": rope.rope_type, "theta": rope.theta}
    return asdict(rope)
