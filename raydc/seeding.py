"""Random numbers that depend on what they are for, never on who draws them or when.

Every seed is derived from (seed, purpose, ...); numbers for images come from (seed, epoch, image_id, draw) through a
counter-based hash, so any worker, in any order, draws the same ones.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
BLOCK = 1 << 15  # numbers made at once: they stay in a core's cache from step to step


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(config.seed, "kmeans", epoch)``."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def uniforms(seed: int, image_ids: np.ndarray, draws: np.ndarray | int = 0, num: int = 1) -> np.ndarray:
    """Numbers in [0, 1), float64 of shape (len(image_ids), num), a pure function of (seed, image_id, draw, column)."""
    image_ids, draws = np.asarray(image_ids), np.asarray(draws)
    found, step = np.empty((len(image_ids), num)), max(1, BLOCK // num)
    for start in range(0, len(image_ids), step):
        rows = slice(start, start + step)
        found[rows] = _uniforms(seed, image_ids[rows], draws[rows] if draws.ndim else draws, num)
    return found


def _uniforms(seed: int, image_ids: np.ndarray, draws: np.ndarray, num: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        key = _mix(image_ids.astype(np.uint64) * _GOLDEN + np.uint64(seed))
        key += draws.astype(np.uint64) * _GOLDEN
        columns = np.arange(1, num + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(_mix(key)[:, None] + columns)
    bits >>= np.uint64(11)
    return bits.view(np.int64) * 2.0**-53  # of signed numbers, which more CPUs convert many at a time


def random_bits(seed: int, image_ids: np.ndarray, draws: np.ndarray | int = 0) -> np.ndarray:
    """uint64 (len(image_ids),): 64 random bits, a pure function of (seed, image_id, draw); a third of the cost of a uniform.

    splitmix64's sequence over the image_ids; further draws of an image are the one that begins at its own number.
    """
    with np.errstate(over="ignore"):
        bits = image_ids.astype(np.uint64)
        bits *= _GOLDEN
        bits += np.uint64(seed)
        bits = _mix(bits)
        if np.ndim(draws) == 0 and draws == 0:
            return bits
        later = np.asarray(draws, np.uint64)
        return np.where(later > 0, _mix(bits + later * _GOLDEN), bits)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), in place: a bijection whose output bits look independent."""
    x ^= x >> np.uint64(30)
    x *= _MIX_1
    x ^= x >> np.uint64(27)
    x *= _MIX_2
    x ^= x >> np.uint64(31)
    return x
