"""Which ranks share a sequence and which hold copies of it: data parallel x ring x Ulysses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from tuner.errors import UserError
from tuner.parallel.ranks import Ranks


class Degrees(NamedTuple):
    """Over how many ranks a sequence is cut, and by which way of attention."""

    ulysses: int = 1  # these ranks share the heads: it divides them
    ring: int = 1  # these pass keys and values on: any number

    @property
    def size(self) -> int:
        """Ranks that share a sequence; rank r of them has the place divmod(r, ulysses) = (ring, Ulysses)."""
        return self.ulysses * self.ring


@dataclass(frozen=True)
class Mesh:
    """This process's neighbours by what they share. Neighbours in the world share a sequence, Ulysses' ranks first."""

    degrees: Degrees
    ulysses: Ranks  # the same part of a sequence, once heads are exchanged
    ring: Ranks  # the same heads
    sequence: Ranks  # the same sequence
    data: Ranks  # the same place in other sequences


class Layout(NamedTuple):
    """Ranks of the world in their groups; each rank is in one group of each kind."""

    ulysses: list[list[int]]
    ring: list[list[int]]
    sequence: list[list[int]]
    data: list[list[int]]


def read_degrees(setting: int | Mapping[str, int]) -> Degrees:
    """What a config says: 8 stands for Ulysses alone, dict(ulysses=8, ring=2) for both.

    Raises:
        UserError: it is something else.
    """
    parts = dict(setting) if isinstance(setting, Mapping) else {"ulysses": setting}
    unknown = sorted(set(parts) - set(Degrees._fields))
    wrong = [name for name, size in parts.items() if type(size) is not int or size < 1]
    if unknown or wrong:
        raise UserError(
            f"sequence_parallel_size = {setting!r} is not understood. "
            'Give a number of ranks from 1, such as 8, or {"ulysses": 8, "ring": 2}.'
        )
    return Degrees(**parts)


def arrange(world_size: int, degrees: Degrees) -> Layout:
    """The groups of a world of `world_size` ranks.

    Raises:
        UserError: the ranks that share a sequence do not divide the world.
    """
    size, ulysses = degrees.size, degrees.ulysses
    if world_size % size:
        legal = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(
            f"A sequence over {size} ranks{_written(degrees)} does not fit {world_size} "
            f"{'rank' if world_size == 1 else 'ranks'}, which it must divide. Sizes that do: {_listed(legal)}."
        )
    sequence = [list(range(start, start + size)) for start in range(0, world_size, size)]
    return Layout(
        ulysses=[ranks[start : start + ulysses] for ranks in sequence for start in range(0, size, ulysses)],
        ring=[ranks[place::ulysses] for ranks in sequence for place in range(ulysses)],
        sequence=sequence,
        data=[list(range(place, world_size, size)) for place in range(size)],
    )


def build_mesh(degrees: Degrees) -> Mesh:
    """The mesh of this process; every rank of the world must call it, in the same order.

    Without torch.distributed it is a world of one rank.

    Raises:
        UserError: the ranks that share a sequence do not divide the world.
    """
    initialized = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)
    layout = arrange(world_size, degrees)
    return Mesh(degrees, *(_join(rank, groups) for groups in layout))


def _join(rank: int, groups: list[list[int]]) -> Ranks:
    """All ranks make all groups of a kind, and each keeps its own."""
    own = next(members for members in groups if rank in members)
    made = {tuple(members): dist.new_group(members) for members in groups if len(members) > 1}
    return Ranks(own, own.index(rank), made.get(tuple(own)))


def legal_degrees(num_heads: int, num_kv_heads: int) -> list[int]:
    """Ulysses sizes for these heads: each rank gets as many query heads, and whole kv heads or copies of one."""
    return [
        n for n in range(1, num_heads + 1) if num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
    ]


def head_counts(config: Any) -> tuple[int, int]:
    """Query heads, and heads of keys and values, of a model's text config; without a number of its own, as many."""
    num_heads = config.num_attention_heads
    return num_heads, getattr(config, "num_key_value_heads", None) or num_heads


def check_heads(num_heads: int, num_kv_heads: int, ulysses: int) -> None:
    """UserError unless `ulysses` ranks can share the heads; says which numbers could."""
    legal = legal_degrees(num_heads, num_kv_heads)
    if ulysses not in legal:
        longer = f'sequence_parallel_size = {{"ulysses": {legal[-1]}, "ring": 2}}'
        raise UserError(
            f"{ulysses} ranks cannot share {num_heads} query heads and {num_kv_heads} kv heads. Sizes that can: "
            f"{_listed(legal)}. For more ranks add a ring: {longer}."
        )


def _written(degrees: Degrees) -> str:
    return "" if degrees.ring == 1 else f" (ulysses={degrees.ulysses}, ring={degrees.ring})"


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))
