"""Every instruction of a pickle, looked at before one is followed: only those of torch.save, and no bombs."""

import io
import pickletools
import struct
from typing import NamedTuple

from tuner.errors import UserError

MAX_BYTES = 64 << 20  # of a pickle without its tensors; real ones have some 100 KB
MAX_INSTRUCTIONS = 4_000_000
MAX_DEPTH = 64  # containers in containers; the hash of a deeper tuple could exhaust the C stack
MAX_WEIGHT = 20_000_000  # values in a container, repetitions counted: tuples of tuples of the same tuple hash for years
ALLOWED = {
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
}  # fmt: skip
"""what torch.save writes (protocol 2); pickles of other protocols have instructions that nobody needs for weights"""
MALFORMED = (ValueError, IndexError, KeyError, EOFError, OverflowError, struct.error)


class Cell(NamedTuple):
    """What is known of a value on the pickle's stack."""

    depth: int
    weight: int


class Mark(NamedTuple):
    """Where a MARK instruction stands on the stack."""


LEAF = Cell(0, 1)
Stack = list[Cell | Mark]


def check_pickle(data: bytes, what: str) -> int:
    """Where the first pickle in `data` ends.

    Args:
        what: the file, for messages.

    Raises:
        UserError: it is cut off or malformed, has an instruction that torch.save does not write, or is built to
            exhaust time or memory.
    """
    stack: Stack = []
    memo: dict[int, Cell] = {}
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream := io.BytesIO(data))):
            if opcode.name not in ALLOWED:
                raise UserError(f"{what} is refused: its pickle has {opcode.name}, which torch.save never writes.")
            if count > MAX_INSTRUCTIONS:
                raise UserError(f"{what} is refused: its pickle has over {MAX_INSTRUCTIONS:,} instructions.")
            follow(opcode, argument, stack, memo)
            top = stack[-1] if stack else LEAF
            if isinstance(top, Cell) and (top.depth > MAX_DEPTH or top.weight > MAX_WEIGHT):
                raise UserError(f"{what} is refused: its pickle nests {top.depth} deep, {top.weight:,} values in all.")
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{what} is no whole pickle ({str(error)[:80]}). Copy it again.") from error
    return stream.tell()


def follow(opcode: pickletools.OpcodeInfo, argument: object, stack: Stack, memo: dict[int, Cell]) -> None:
    """Do to the stack what the instruction would, with depths and weights in the place of values."""
    if opcode.name in ("BINPUT", "LONG_BINPUT"):
        if argument != len(memo) and argument not in memo:
            raise ValueError("places of the memo are not in order")  # a far one would make Python fill all before it
        assert isinstance(argument, int)
        memo[argument] = cell(stack[-1])
    elif opcode.name in ("BINGET", "LONG_BINGET"):
        assert isinstance(argument, int)
        stack.append(memo[argument])
    elif opcode.name == "MARK":
        stack.append(Mark())
    else:
        taken = take(opcode, stack)
        if opcode.stack_after:
            depth = max((item.depth for item in taken), default=-1) + 1
            stack.append(Cell(depth, 1 + sum(item.weight for item in taken)))


def take(opcode: pickletools.OpcodeInfo, stack: Stack) -> list[Cell]:
    """The values that the instruction takes from the stack."""
    taken = []
    before = [item.name for item in opcode.stack_before]
    if "mark" in before:
        while not isinstance(item := stack.pop(), Mark):
            taken.append(item)
        before = before[: before.index("mark")]
    return taken + [cell(stack.pop()) for _ in before]


def cell(item: Cell | Mark) -> Cell:
    """The item, which must be a value."""
    if isinstance(item, Mark):
        raise ValueError("a mark in the place of a value")
    return item
