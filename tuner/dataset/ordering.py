"""Orders of many numbers, from a seed or by length, made piece by piece: little memory beside the result."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.signedinteger[Any]]
PIECE = 1 << 20  # numbers that are put in order at a time
BITS_BESIDE_LENGTH = 24  # of a sorting key of 64: lengths up to 2**40, and 24 random bits to order equal lengths


def number_type(limit: int) -> type[np.int32] | type[np.int64]:
    """The smaller type that holds the numbers up to `limit`: half the memory of an index over 100 million documents."""
    return np.int32 if limit <= np.iinfo(np.int32).max else np.int64


def random_bits(number: int, seed: Sequence[int]) -> NDArray[np.uint64]:
    """(number,) 64 random bits each, from the seed and the index: splitmix64 (Steele, Lea, Flood 2014)."""
    return random_bits_of(np.arange(number, dtype=np.uint64), seed)


def random_bits_of(numbers: NDArray[Any], seed: Sequence[int]) -> NDArray[np.uint64]:
    """(numbers,) what `random_bits` has at these indices."""
    state = np.zeros(1, np.uint64)
    for part in seed:
        state = _mix(state + np.uint64(part % (1 << 64)))
    return _mix(numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + state)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def pieces(number: int) -> Iterator[slice]:
    """PIECE of `number` at a time."""
    return (slice(first, min(first + PIECE, number)) for first in range(0, number, PIECE))


def permutation(number: int, seed: Sequence[int]) -> IntArray:
    """The numbers from 0 to `number` - 1 in an order given by the seed alone."""
    seed = [*seed, 1]
    order = np.empty(number, number_type(number))
    if number <= PIECE:
        order[:] = np.argsort(random_bits(number, seed), kind="stable")
        return order
    high = np.empty(number, np.uint32)  # of the random bits; the others decide inside a piece
    for piece in pieces(number):
        high[piece] = random_bits_of(np.arange(piece.start, piece.stop), seed) >> np.uint64(32)
    filled = 0
    for first, last in _even_ranges(number, 1 << 32):
        found = _members(high, first, last)
        order[filled : filled + len(found)] = found[np.argsort(random_bits_of(found, seed), kind="stable")]
        filled += len(found)
    return order


def by_length(lengths: IntArray, seed: Sequence[int]) -> tuple[IntArray, NDArray[np.int64]]:
    """Numbers by length, equal ones in random order, and where each length's begin (up to the longest + 1)."""
    seed = [*seed, 0]
    counts = np.zeros(int(lengths.max()) + 1, np.int64)
    for piece in pieces(len(lengths)):
        found = np.bincount(lengths[piece])
        counts[: len(found)] += found
    starts = np.concatenate([[0], np.cumsum(counts)])
    order = np.empty(len(lengths), number_type(len(lengths)))
    for first, last in _length_ranges(starts):
        found = _members(lengths, first, last)
        here = order[starts[first] : starts[last + 1]]
        if len(found) <= 2 * PIECE:
            keys = lengths[found].astype(np.uint64) << np.uint64(BITS_BESIDE_LENGTH)
            keys |= _bits_beside_length(found, seed)
            here[:] = found[np.argsort(keys, kind="stable")]
        else:
            _fill_in_random_order(here, found, seed)
    return order, starts


def _fill_in_random_order(order: IntArray, found: IntArray, seed: Sequence[int]) -> None:
    """What `by_length` does, for the very many numbers of a single length."""
    keys = np.empty(len(found), np.uint32)
    for piece in pieces(len(found)):
        keys[piece] = _bits_beside_length(found[piece], seed)
    filled = 0
    for first, last in _even_ranges(len(found), 1 << BITS_BESIDE_LENGTH):
        own = _members(keys, first, last)
        order[filled : filled + len(own)] = found[own[np.argsort(keys[own], kind="stable")]]
        filled += len(own)


def _bits_beside_length(numbers: IntArray, seed: Sequence[int]) -> NDArray[np.uint64]:
    return random_bits_of(numbers, seed) >> np.uint64(64 - BITS_BESIDE_LENGTH)


def _members(values: NDArray[Any], first: int, last: int) -> IntArray:
    """Where `values` are from `first` to `last`, in order."""
    found = []
    for piece in pieces(len(values)):
        part = values[piece]
        places = np.flatnonzero((part >= first) & (part <= last)) + piece.start
        found.append(places.astype(number_type(len(values))))
    return np.concatenate(found)


def _even_ranges(number: int, limit: int) -> list[tuple[int, int]]:
    """From 0 to limit - 1 in parts that hold about PIECE each of `number` values which lie evenly."""
    num_parts = -(-number // PIECE)
    return [(limit * part // num_parts, limit * (part + 1) // num_parts - 1) for part in range(num_parts)]


def _length_ranges(starts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Lengths from and to, such that a range holds PIECE numbers or one length only."""
    ranges, first, longest = [], 0, len(starts) - 2
    while first <= longest:
        last = int(np.searchsorted(starts, starts[first] + PIECE, side="right")) - 2
        last = min(longest, max(first, last))
        ranges.append((first, last))
        first = last + 1
    return ranges
