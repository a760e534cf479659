"""Keyed integers: permutations, draws and hashes that follow from their key alone, vectorised, without state."""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_Words = NDArray[np.uint64]


class Permutation:
    """A keyed bijection on [0, num_items) that stores nothing but its key.

    A balanced Feistel network (Luby and Rackoff, 1988) on the next even number of bits; an item that falls outside is
    encrypted again until it falls inside (cycle walking: Black and Rogaway, 2002), fewer than four times on average.
    """

    def __init__(self, num_items: int, *key: int | str) -> None:
        if num_items < 1:
            raise ValueError(f"a permutation of {num_items} items: at least 1 is needed")
        self.num_items = num_items
        self._half_bits = _half_bits(num_items)
        self._round_keys = _keys(_ROUNDS, num_items, *key)

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Items at `positions` (an array, of any shape but ()); ValueError for a position outside [0, num_items)."""
        if positions.size and not 0 <= positions.min() <= positions.max() < self.num_items:
            raise ValueError(f"positions {positions.min()} to {positions.max()} are not all in [0, {self.num_items})")
        items = self._encrypt(positions.astype(np.uint64))
        while (outside := items >= self.num_items).any():
            items[outside] = self._encrypt(items[outside])
        return items.astype(np.int64)

    def _encrypt(self, items: _Words) -> _Words:
        return _feistel(items, self._half_bits, self._round_keys)


class Permutations:
    """Many permutations under one key, one a domain, evaluated together: a domain is a number and a size.

    Each is a Permutation's network, whose round keys are mixed with the domain's number; no size exceeds `largest`, nor
    is less than half of it, or cycle walking would take long.
    """

    def __init__(self, largest: int, *key: int | str) -> None:
        self._half_bits = _half_bits(largest)
        self._round_keys = _keys(_ROUNDS, largest, *key)

    def __call__(
        self, domains: NDArray[np.int64], sizes: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Items [n] at `positions` [n], each in [0, size), of the permutations `domains` [n] of `sizes` [n]."""
        salt = _mix(domains.astype(np.uint64) + _GOLDEN_GAMMA)
        items = self._encrypt(positions.astype(np.uint64), salt)
        while (outside := items >= sizes.astype(np.uint64)).any():
            items[outside] = self._encrypt(items[outside], salt[outside])
        return items.astype(np.int64)

    def _encrypt(self, items: _Words, salt: _Words) -> _Words:
        return _feistel(items, self._half_bits, [_mix(key ^ salt) for key in self._round_keys])


def uniforms(seed: int, epoch: int, ids: NDArray[np.integer], stream: int, count: int) -> NDArray[np.float64]:
    """Draws in [0, 1), [len(ids), count], that depend on (seed, epoch, sample id, stream) and on nothing else.

    Each sample has a SplitMix64 sequence of its own; `stream` separates the uses of one sample.
    """
    state = _mix(_keys(1, "uniforms", seed, epoch, stream) ^ _mix(ids.astype(np.uint64) + _GOLDEN_GAMMA))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN_GAMMA
    return (_mix(state[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def id_hash(ids: NDArray[np.integer]) -> int:
    """A hash of 64 bits of a multiset of ids: the sum of their mixed values, so that parts add up in any order."""
    return int(_mix(ids.astype(np.uint64) + _GOLDEN_GAMMA).sum(dtype=np.uint64))


def _half_bits(num_items: int) -> np.uint64:
    return np.uint64(max(1, ((num_items - 1).bit_length() + 1) // 2))


def _feistel(items: _Words, half: np.uint64, round_keys: "list[_Words] | _Words") -> _Words:
    left, right = items >> half, items & ((np.uint64(1) << half) - np.uint64(1))
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - half))
    return (left << half) | right


def _keys(count: int, *parts: int | str) -> _Words:
    text = ":".join(str(part) for part in parts)
    return np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * count), dtype="<u8")


def _mix(words: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
