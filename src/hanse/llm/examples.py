"""Instructions with their answers, read from files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

from hanse.core.errors import DataError, MissingExtraError
from hanse.data.files import content, find, objects


class Example(NamedTuple):
    """What is asked, what it is asked about (may be empty), what is to be answered, and of which category that is."""

    instruction: str
    context: str
    answer: str
    category: str


class Columns(NamedTuple):
    """Names of the fields that hold an example's parts; None where there is no such part."""

    instruction: str
    context: str | None
    answer: str
    category: str | None


def read(path: str, columns: Columns, split: str = "train") -> list[Example]:
    """The examples of a JSONL or CSV file, or of a data set that ``datasets`` loads (a folder, or a name on its hub).

    Raises ``DataError`` with the file and the line where a field is missing or no text.
    """
    if path.removesuffix(".gz").endswith((".jsonl", ".csv")):
        file = find(path).file
        rows = objects(file) if file.name.removesuffix(".gz").endswith(".jsonl") else _csv(file)
    else:
        rows = _loaded(path, split)
    return [_example(where, row, columns) for where, row in rows]


def _csv(file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = content(file).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: {error}") from None
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
        yield f"{file}:{number}", row


def _loaded(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError("instructions from a data set", "llm") from None
    try:
        rows = load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"path: {name!r} cannot be loaded: {error}") from None
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows))


def _example(where: str, row: dict[str, Any], columns: Columns) -> Example:
    parts = []
    for column in columns:
        value = "" if column is None else row.get(column)
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise DataError(f"{where}: field {column!r} is no text: {value!r}; there are {', '.join(map(str, row))}")
        parts.append(str(value))
    return Example(*parts)
