"""Two data files side by side as one: rows that share an id, such as questions and their answers."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tuner.dataset.read import read_chunks
from tuner.dataset.reading.strict_json import parse_row
from tuner.errors import UserError
from tuner.new_files import check_new


class Joined(NamedTuple):
    """Rows written, and rows of the first file whose id the second one lacks."""

    num_rows: int
    num_alone: int


def join_files(first: Path, second: Path, out: Path) -> Joined:
    """Write to `out` (JSONL) each row of `first` with the keys that the row of `second` with its id has.

    Rows without a partner are left out and counted. Raises UserError for a row without an id, an id given twice, a key
    that both rows have with different values, and where `out` exists.
    """
    check_new(out)
    partners: dict[str, dict[str, Any]] = {}
    for where, row in _rows(second):
        if _id(row, where) in partners:
            raise UserError(f"{where}: the id {row['id']!r} comes twice. Expected each id once.")
        partners[_id(row, where)] = row
    part = out.with_name(out.name + ".part")
    try:
        joined = _write(first, partners, part)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return joined


def _write(first: Path, partners: dict[str, dict[str, Any]], part: Path) -> Joined:
    num_rows = num_alone = 0
    with part.open("w", encoding="utf-8") as file:
        for where, row in _rows(first):
            partner = partners.get(_id(row, where))
            if partner is None:
                num_alone += 1
                continue
            differing = sorted(key for key in row.keys() & partner.keys() if row[key] != partner[key])
            if differing:
                raise UserError(f"{where}: both rows with id {row['id']!r} have {differing}, with different values.")
            file.write(json.dumps({**row, **partner}, ensure_ascii=False) + "\n")
            num_rows += 1
    return Joined(num_rows, num_alone)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for chunk in read_chunks(path):
        for row in chunk.rows:
            where = f"{path}:{row.line}"
            if row.fault:
                raise UserError(f"{where}: {row.fault}")
            try:
                yield where, parse_row(row.content)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None


def _id(row: dict[str, Any], where: str) -> str:
    if not isinstance(row.get("id"), str | int):
        raise UserError(f"{where}: expected an 'id' (text or a number), the row has {sorted(map(str, row))}.")
    return str(row["id"])
