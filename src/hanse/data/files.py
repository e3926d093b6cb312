"""Tasks read from files: pictures, tables, texts, and whatever Hugging Face's ``datasets`` can load.

A relative path is looked for in the working directory, then in the folder that the environment variable ``HANSE_DATA`` names.
Nothing is ever unpickled; a malformed file raises ``DataError`` with its name and, in text, the line.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from hanse.core.errors import ConfigError, DataError, MissingExtraError
from hanse.core.streams import Streams
from hanse.data.task import Dataset, Task
from hanse.models.small import ByteWindow, cnn, mlp

Array = npt.NDArray[Any]


class Found(NamedTuple):
    """A file as it was when looked up, so that what was read from it can be kept until it changes."""

    file: Path
    changed: int


def find(path: str) -> Found:
    """The file that ``path`` means; raises ``DataError`` with the places looked in."""
    places = [Path(path).expanduser().absolute()]
    if "HANSE_DATA" in os.environ:
        places.append(Path(os.environ["HANSE_DATA"]) / path)
    for place in places:
        if place.is_file():
            return Found(place, place.stat().st_mtime_ns)
    hint = "" if len(places) > 1 else " (a folder to look in can be named by HANSE_DATA)"
    raise DataError(f"path: no file {' or '.join(map(str, dict.fromkeys(places)))}{hint}")


@contextlib.contextmanager
def reading(name: Path | str) -> Iterator[None]:
    """Turn whatever a damaged or foreign file causes into a ``DataError`` with its name."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{name}: cannot be read: {str(error) or type(error).__name__}") from None


def content(file: Path) -> bytes:
    """All bytes of a file, unpacked if it ends in ``.gz``."""
    with reading(file):
        return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()


def numbered(values: Array) -> tuple[Tensor, tuple[str, ...]]:
    """Distinct values counted from 0 in sorted order, int64 ``[N]``, and their names."""
    names, number = np.unique(values, return_inverse=True)
    return torch.from_numpy(number.astype(np.int64)), tuple(map(str, names))


# ---- pictures


class Pictures(NamedTuple):
    """Pictures ``x`` ``[N, C, H, W]`` (or features ``[N, F]``) as stored, labels ``y`` int64 ``[N]``, owners ``[N]``."""

    x: Array
    y: Array
    owner: Array | None

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1

    def real(self, scale: float) -> Tensor:
        """float32 pictures, integers divided by ``scale``."""
        x = torch.from_numpy(np.array(self.x, np.float32, order="C"))
        return x if self.x.dtype.kind == "f" else x.div_(scale)

    def dataset(self, test: Pictures | None, streams: Streams) -> Dataset:
        """A task's data; without ``test`` a fifth at random is held out."""
        x, y = self.real(float(max(1, self.x.max()))), torch.from_numpy(self.y)
        owner, owner_names = (None, ()) if self.owner is None else numbered(self.owner)
        if test is None:
            held, rest = holdout(len(y), 0.2, streams)
            test_x, test_y, x, y = x[held], y[held], x[rest], y[rest]
            owner = None if owner is None else owner[rest]
        else:
            test_x, test_y = test.real(float(max(1, self.x.max()))), torch.from_numpy(test.y)
        return Dataset(x, y, test_x, test_y, y, tuple(map(str, range(self.classes))), owner, owner_names)

    def network(self, kind: Literal["cnn", "mlp"], hidden: int) -> nn.Module:
        """A network that fits the pictures."""
        if kind == "mlp":
            return mlp(int(np.prod(self.x.shape[1:])), hidden, self.classes, flatten=self.x.ndim > 2)
        if self.x.ndim != 4 or min(self.x.shape[2:]) < 4:
            raise ConfigError(f"network: 'cnn' is not allowed for samples of shape {self.x.shape[1:]}: pictures from 4x4, or 'mlp'")
        channels, height, width = self.x.shape[1:]
        return cnn(channels, height, width, self.classes, hidden)


def pictures(where: str, x: Array, y: Array, owner: Array | None) -> Pictures:
    """Check arrays and bring pictures into the order ``[N, C, H, W]``; ``where`` names the source in errors."""
    if x.ndim not in (2, 3, 4) or x.dtype.kind not in "uif" or not len(x):
        raise DataError(
            f"{where}: pictures of type {x.dtype} and shape {x.shape} are not allowed: numbers [N, F], [N, H, W] or [N, H, W, C]"
        )
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise DataError(f"{where}: a pixel is not finite")
    if y.shape != (len(x),) or y.dtype.kind not in "ui":
        raise DataError(f"{where}: labels of type {y.dtype} and shape {y.shape} are not allowed: {len(x)} whole numbers")
    if y.min() < 0:
        raise DataError(f"{where}: label {y.min()} in row {y.argmin()} is not allowed: 0 or more")
    if owner is not None and owner.shape != (len(x),):
        raise DataError(f"{where}: owners of shape {owner.shape} are not allowed: one for each of {len(x)} pictures")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3, 4):
        x = x.transpose(0, 3, 1, 2)
    return Pictures(x, y.astype(np.int64), owner)


def tested(train: Pictures, test: Pictures, where: str) -> Pictures:
    """``test``, if it fits ``train``."""
    if test.x.shape[1:] != train.x.shape[1:]:
        raise DataError(f"{where}: pictures of shape {test.x.shape[1:]} do not fit the training set's {train.x.shape[1:]}")
    if test.classes > train.classes:
        raise DataError(f"{where}: label {test.y.max()} is not allowed: 0 to {train.classes - 1}, as in the training set")
    return test


def holdout(size: int, share: float, streams: Streams) -> tuple[Tensor, Tensor]:
    """A random ``share`` of ``size`` rows (at least one) and the rest; raises ``DataError`` if that leaves nothing."""
    held = max(1, round(share * size))
    if held >= size:
        raise DataError(f"{size} samples are too few: at least 2 are needed, one of them to test on")
    order = torch.from_numpy(streams.numpy("task").permutation(size))
    return order[:held], order[held:]


class images(Task):
    """Pictures from an ``.npz`` file or a pair of idx files (the format of MNIST, also gzipped).

    Pictures are ``[N, H, W]`` or ``[N, H, W, C]``; whole numbers are divided by the largest one in the training file, so
    that pixels lie in [0, 1]. The labels of ``train-images-idx3-ubyte`` are those in ``train-labels-idx1-ubyte`` beside it.
    """

    path: str
    """Training file."""
    test: str | None = None
    """Test file of the same form; without one, a fifth of the training file is held out."""
    pixels: str = "x"
    """Array of pictures in an ``.npz``."""
    label: str = "y"
    """Array of labels, counted from 0, in an ``.npz``."""
    owner: str | None = None
    """Array in an ``.npz`` that says whose each picture is."""
    network: Literal["cnn", "mlp"] = "cnn"
    """cnn: two 5x5 convolutions and a hidden layer; mlp: one hidden layer."""
    hidden: PositiveInt = 128
    """Width of the hidden layer."""

    def _read(self, path: str) -> Pictures:
        found = find(path)
        if found.file.suffix == ".npz":
            return _read_npz(found, self.pixels, self.label, self.owner)
        if self.owner is not None:
            raise ConfigError(f"images.owner: {self.owner!r} is not allowed: an idx file has no owners")
        labels = Path(path).name.replace("images", "labels").replace("idx3", "idx1")
        return _read_idx_pair(found, find(str(Path(path).with_name(labels))))

    def data(self, streams: Streams) -> Dataset:
        train = self._read(self.path)
        return train.dataset(None if self.test is None else tested(train, self._read(self.test), self.test), streams)

    def model(self) -> nn.Module:
        return self._read(self.path).network(self.network, self.hidden)


@lru_cache(maxsize=2)
def _read_npz(found: Found, pixels: str, label: str, owner: str | None) -> Pictures:
    if not zipfile.is_zipfile(found.file):
        raise DataError(f"{found.file}: not an .npz archive, or cut short")
    with reading(found.file), np.load(found.file, allow_pickle=False) as arrays:
        for field, name in (("pixels", pixels), ("label", label), ("owner", owner)):
            if name is not None and name not in arrays:
                raise DataError(f"{found.file}: no array {name!r} ({field}); it holds {', '.join(arrays)}")
        return pictures(str(found.file), arrays[pixels], arrays[label], None if owner is None else arrays[owner])


@lru_cache(maxsize=2)
def _read_idx_pair(found: Found, labels: Found) -> Pictures:
    return pictures(str(found.file), _read_idx(found.file), _read_idx(labels.file), None)


def _read_idx(file: Path) -> Array:
    """The one array of an idx file of bytes: magic 0 0 8 rank, then the sizes, big-endian, then the numbers."""
    found = content(file)
    if len(found) < 4 or found[:3] != b"\0\0\x08" or not 1 <= found[3] <= 4:
        raise DataError(f"{file}: not an idx file of bytes: it begins with {found[:4].hex()!r}, expected '000008' and the rank")
    start = 4 + 4 * found[3]
    shape = [int.from_bytes(found[i : i + 4]) for i in range(4, start, 4)]
    if len(found) != start + math.prod(shape):
        raise DataError(f"{file}: {len(found) - start} numbers do not fill the shape {shape}")
    return np.frombuffer(found, np.uint8, offset=start).reshape(shape)


# ---- tables

MISSING = {"", "?", "NA", "NaN", "nan"}
MOST_VALUES = 1000


class table(Task):
    """A classification table from a CSV file with a header line, optionally gzipped; a small MLP; a fifth is held out for testing.

    A column of numbers is standardised with the training rows' mean and deviation; any other column becomes one indicator per
    value. Missing values (empty, ``?``, ``NA``, ``NaN``) become the mean and an indicator, or a value of their own.
    """

    path: str
    """The file."""
    label: str
    """Column to predict."""
    owner: str | None = None
    """Column that says whose each row is; not a feature."""
    drop: tuple[str, ...] = ()
    """Columns to leave out."""
    hidden: PositiveInt = 64
    """Width of the hidden layer."""

    def _read(self) -> Columns:
        return _read_table(find(self.path), self.label, self.owner, self.drop)

    def data(self, streams: Streams) -> Dataset:
        read = self._read()
        held, rest = holdout(len(read.y), 0.2, streams)
        known, measured = ~read.x.isnan(), read.x.nan_to_num()
        count = known[rest].sum(0).clamp(min=1)
        mean = measured[rest].sum(0) / count
        deviation = (((measured - mean) * known)[rest].square().sum(0) / count).sqrt()
        scaled = ((measured - mean) * known / torch.where(deviation > 0, deviation, 1)).float()
        x = torch.where(read.numeric, scaled, measured.float())
        owner = None if read.owner is None else read.owner[rest]
        return Dataset(x[rest], read.y[rest], x[held], read.y[held], read.y[rest], read.names, owner, read.owner_names)

    def model(self) -> nn.Module:
        read = self._read()
        return mlp(read.x.shape[1], self.hidden, len(read.names))


class Columns(NamedTuple):
    """Features ``x`` float64 ``[N, F]``, NaN where missing; which of them are measured numbers, bool ``[F]``; labels and owners."""

    x: Tensor
    numeric: Tensor
    y: Tensor
    names: tuple[str, ...]
    owner: Tensor | None
    owner_names: tuple[str, ...]


@lru_cache(maxsize=2)
def _read_table(found: Found, label: str, owner: str | None, drop: tuple[str, ...]) -> Columns:
    file = found.file
    with reading(file):
        source = content(file).decode("utf-8-sig")
    lines = csv.reader(io.StringIO(source, newline=""), strict=True)
    rows = []
    try:
        header = next(lines, [])
        for row in lines:
            if len(row) != len(header):
                raise DataError(f"{file}:{lines.line_num}: {len(row)} values, expected {len(header)} as in the header")
            rows.append(row)
    except csv.Error as error:
        raise DataError(f"{file}:{lines.line_num}: {error}") from None
    if len(set(header)) < len(header):
        raise DataError(f"{file}: two columns have the same name: {', '.join(header)}")
    for field, name in (("label", label), ("owner", owner), *(("drop", name) for name in drop)):
        if name is not None and name not in header:
            raise DataError(f"{file}: no column {name!r} ({field}); the columns are {', '.join(header)}")
    if not rows:
        raise DataError(f"{file}: no row below the header")
    columns = dict(zip(header, map(np.array, zip(*rows, strict=True)), strict=True))
    absent = np.isin(columns[label], list(MISSING))
    if absent.any():
        raise DataError(f"{file}: row {absent.argmax() + 1} below the header has no {label}")
    y, names = numbered(columns[label])
    whose, owner_names = (None, ()) if owner is None else numbered(columns[owner])
    features, numeric = [], []
    for name in header:
        if name in (label, owner, *drop):
            continue
        made, measured = _features(columns[name])
        if np.isinf(made).any():
            raise DataError(f"{file}: column {name!r} holds an infinite number")
        if made.shape[1] > MOST_VALUES:
            raise DataError(f"{file}: column {name!r} has more than {MOST_VALUES} values that are not numbers; name it in drop")
        features.append(made)
        numeric += [measured] + [False] * (made.shape[1] - 1)
    if not features:
        raise DataError(f"{file}: no column is left as a feature")
    return Columns(torch.from_numpy(np.concatenate(features, 1)), torch.tensor(numeric), y, names, whose, owner_names)


def _features(values: Array) -> tuple[Array, bool]:
    """One column of text as features ``[N, F]``, and whether the first of them is a measured number."""
    absent = np.isin(values, list(MISSING))
    try:
        number = np.where(absent, "nan", values).astype(np.float64)
    except ValueError:
        kinds, place = np.unique(np.where(absent, "", values), return_inverse=True)
        return np.eye(len(kinds))[place] if len(kinds) <= MOST_VALUES else np.empty((0, len(kinds))), False
    return (np.stack([number, absent], 1) if absent.any() else number[:, None]), True


# ---- texts


def windows(
    where: str, sources: Mapping[str, bytes], length: int, streams: Streams, test: Mapping[str, bytes] | None = None
) -> Dataset:
    """Next-byte prediction: windows of ``length`` bytes ``x`` and the same one byte on, ``y``, both int64 ``[N, length]``.

    A source too short for one window is left out, and so are the last bytes of the others. The group and the owner of a window
    is its source. Without ``test`` a tenth of the windows is held out. Raises ``DataError``, which begins with ``where``, when
    there is too little text.
    """
    cut = _windows(where, sources, length)
    names, both = tuple(cut), torch.cat(list(cut.values()))
    owner = torch.repeat_interleave(torch.arange(len(cut)), torch.tensor([len(found) for found in cut.values()]))
    if test is None:
        held, rest = holdout(len(both), 0.1, streams)
        tests, both, owner = both[held], both[rest], owner[rest]
    else:
        tests = torch.cat(list(_windows(where, test, length).values()))
    return Dataset(both[:, :-1], both[:, 1:], tests[:, :-1], tests[:, 1:], owner, names, owner, names)


def _windows(where: str, sources: Mapping[str, bytes], length: int) -> dict[str, Tensor]:
    """int64 ``[n, length + 1]`` of every source that has any; each window begins with the last byte of the one before."""
    found = {}
    for name, source in sources.items():
        count = (len(source) - 1) // length
        if count > 0:
            values = torch.from_numpy(np.frombuffer(source, np.uint8).astype(np.int64))
            found[name] = values[: count * length + 1].unfold(0, length + 1, length)
    if not found:
        raise DataError(f"{where}: too little text: no source has the {length + 1} bytes of one window")
    return found


class texts(Task):
    """Next-byte prediction on a text file or on a field of a JSONL file, optionally gzipped, in UTF-8."""

    path: str
    """The file: ``.jsonl`` holds one JSON object a line, any other suffix means plain text."""
    owner: str | None = None
    """JSONL field that says whose each text is."""
    field: str = "text"
    """JSONL field that holds the text."""
    test: str | None = None
    """Test file of the same form; without one, a tenth of the windows is held out."""
    length: PositiveInt = 64
    """Bytes per sample."""
    hidden: PositiveInt = 128
    """Width of the model's hidden layer."""

    def data(self, streams: Streams) -> Dataset:
        test = None if self.test is None else self._sources(self.test)
        return windows(self.path, self._sources(self.path), self.length, streams, test)

    def model(self) -> nn.Module:
        return ByteWindow(hidden=self.hidden)

    def _sources(self, path: str) -> dict[str, bytes]:
        file = find(path).file
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            return joined((str(row[self.owner]) if self.owner else "text", row[self.field]) for row in self._rows(file))
        if self.owner is not None:
            raise ConfigError(f"texts.owner: {self.owner!r} is not allowed: a plain text has no fields")
        return {"text": content(file)}

    def _rows(self, file: Path) -> Iterator[dict[str, Any]]:
        wanted = [self.field] if self.owner is None else [self.field, self.owner]
        for where, row in objects(file):
            if not all(name in row for name in wanted) or not isinstance(row[self.field], str):
                raise DataError(f"{where}: expected an object with the fields {', '.join(wanted)}, the first a string")
            yield row


def objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place as ``file:line``."""
    for number, line in enumerate(content(file).splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number}: expected an object, got {str(row)[:40]}")
        yield f"{file}:{number}", row


def joined(rows: Iterator[tuple[str, str]]) -> dict[str, bytes]:
    """``(owner, text)`` pairs to the text of each owner, one line break between texts, in the order of the owners' names."""
    found: dict[str, list[str]] = {}
    for owner, text in rows:
        found.setdefault(owner, []).append(text)
    return {owner: "\n".join(found[owner]).encode() for owner in sorted(found)}


# ---- Hugging Face


class hub(Task):
    """A data set of the Hugging Face hub, or a folder that its ``datasets`` can read: pictures with labels, or text without.

    Raises ``MissingExtraError`` where ``datasets`` is not installed.
    """

    name: str
    """Name on the hub, or a folder."""
    column: str
    """Column of pictures, or of texts."""
    label: str | None = None
    """Column of labels, for pictures; without it the texts' next bytes are predicted."""
    owner: str | None = None
    """Column that says whose each row is."""
    subset: str | None = None
    """Configuration of the data set, where it has several."""
    split: str = "train"
    """Training split."""
    test: str | None = None
    """Test split; without one, a part of the training split is held out."""
    length: PositiveInt = 64
    """Bytes per sample of text."""
    network: Literal["cnn", "mlp"] = "cnn"
    """Network for pictures."""
    hidden: PositiveInt = 128
    """Width of the hidden layer."""

    def _rows(self, split: str) -> Any:
        try:
            from datasets import load_dataset
        except ImportError:
            raise MissingExtraError("task hub", "datasets") from None
        try:
            rows = load_dataset(self.name, self.subset, split=split)
        except (OSError, ValueError) as error:
            raise DataError(f"hub.name: {self.name!r} cannot be loaded: {error}") from None
        for name in (self.column, self.label, self.owner):
            if name is not None and name not in rows.column_names:
                raise DataError(f"{self.name}: no column {name!r}; it has {', '.join(rows.column_names)}")
        return rows

    def _pictures(self, split: str) -> Pictures:
        rows = self._rows(split)
        with reading(self.name):  # pictures of different sizes do not stack
            x = np.stack([np.asarray(picture) for picture in rows[self.column]])
        return pictures(self.name, x, np.asarray(rows[self.label]), None if self.owner is None else np.asarray(rows[self.owner]))

    def _sources(self, split: str) -> dict[str, bytes]:
        rows = self._rows(split)
        return joined(zip(map(str, rows[self.owner]) if self.owner else ["text"] * len(rows), rows[self.column], strict=True))

    def data(self, streams: Streams) -> Dataset:
        if self.label is None:
            test = None if self.test is None else self._sources(self.test)
            return windows(self.name, self._sources(self.split), self.length, streams, test)
        train = self._pictures(self.split)
        return train.dataset(None if self.test is None else tested(train, self._pictures(self.test), self.test), streams)

    def model(self) -> nn.Module:
        if self.label is None:
            return ByteWindow(hidden=self.hidden)
        return self._pictures(self.split).network(self.network, self.hidden)
