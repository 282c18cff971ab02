"""Number formats of the caches, after rules S24 to S28 of the DSA data flow. Every function returns float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

E4M3_MAX = 448.0
LATENT_GROUP = 128
INDEX_AMAX_FLOOR = 1e-4  # on amax for index vectors (S26, S27)
LATENT_SCALE_FLOOR = 1e-4  # on amax / 448 for latent rows (S28)


def bfloat16(x):
    """Nearest bfloat16, half to even, of the nearest float32."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)) << np.uint64(16)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def e4m3(x):
    """Nearest e4m3 number: steps of 2^(e-3), of 2^-9 below 2^-6; half to even, saturating at 448."""
    x = np.asarray(x, np.float32).astype(np.float64)
    magnitude = np.minimum(np.abs(x), E4M3_MAX)
    exponent = np.clip(np.frexp(magnitude)[1] - 1, -6, 8)
    return np.copysign(np.ldexp(np.rint(np.ldexp(magnitude, 3 - exponent)), exponent - 3), x)


def ceil_pow2(x):
    """Smallest power of two that is not below x > 0."""
    mantissa, exponent = np.frexp(np.asarray(x, np.float32))
    return np.ldexp(1.0, exponent - (mantissa == 0.5))


class Scaled(NamedTuple):
    """numbers [..., n] and the scale [...] they are to be multiplied with."""

    numbers: np.ndarray
    scale: np.ndarray


def index_vectors(x, cache_format):
    """Index queries or keys [..., D] as the scoring reads them."""
    if cache_format == "float32":
        return Scaled(x, np.ones(x.shape[:-1]))
    x = bfloat16(x)
    if cache_format == "bfloat16":
        return Scaled(x, np.ones(x.shape[:-1]))
    scale = index_scale(np.abs(x).max(-1))
    return Scaled(e4m3(x / scale[..., None]), scale)


def index_scale(amax):
    """Scale of an index vector whose largest magnitude is amax."""
    return ceil_pow2(np.maximum(np.float32(amax), np.float32(INDEX_AMAX_FLOOR)) / np.float32(E4M3_MAX))


def latent_rows(latent, cache_format):
    """Latent parts [T, C] as attention reads them back."""
    if cache_format == "float32":
        return latent
    latent = bfloat16(latent)
    if cache_format == "bfloat16":
        return latent
    scaled = [(group, latent_scale(np.abs(group).max(-1, keepdims=True))) for group in latent_groups(latent)]
    return np.concatenate([e4m3(group / scale) * scale for group, scale in scaled], axis=-1)


def latent_groups(latent):
    """The parts [T, <= 128] of latent rows that have a scale each."""
    return np.split(latent, range(LATENT_GROUP, latent.shape[-1], LATENT_GROUP), axis=-1)


def latent_scale(amax):
    """Scale of a group of a latent row whose largest magnitude is amax."""
    return ceil_pow2(np.maximum(np.float32(amax) / np.float32(E4M3_MAX), np.float32(LATENT_SCALE_FLOOR)))


def rope_rows(rope, cache_format):
    """Rotated parts [T, R] as attention reads them back: never e4m3."""
    return rope if cache_format == "float32" else bfloat16(rope)
