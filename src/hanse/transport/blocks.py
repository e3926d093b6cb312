"""Memory that processes of one machine share: blocks with names, owned by the process that made them.

A block is a file in shared memory (``/dev/shm`` where there is one), mapped by whoever knows its name. Its pages are taken when it
is made, so that too little memory is an error then and no crash later. Blocks live in a folder that their owner holds locked; what
a killed owner has left is removed by the next one. Python's own ``shared_memory`` removes segments when any process that attached
to one ends (until 3.13), and takes pages on first touch.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hanse.core.errors import TransportError

SHARED = Path("/dev/shm")
PREFIX = "hanse-"
LOCK = "owner"
SMALLEST = 1 << 16


@dataclass(frozen=True, eq=False)
class Block:
    """Shared memory, uint8, under a name by which other processes of this machine find it."""

    name: str
    memory: Tensor


class Blocks:
    """The blocks that this process owns. Those given back are lent again, uncleared, to whoever takes as much or less."""

    def __init__(self) -> None:
        sweep()
        place = _place()
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=place))  # not yet anything that others would remove
        self._lock = os.open(made / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = made.rename(place / made.name[1:])
        self._free: list[Block] = []
        self._made = 0
        self.close = weakref.finalize(self, _remove, self.folder, self._lock)
        """Remove all blocks; mappings that others hold stay valid until they drop them."""

    def take(self, size: int) -> Block:
        """A block of at least ``size`` bytes, with anything in it. Raises ``TransportError`` where no memory is left."""
        fitting = [b for b in self._free if len(b.memory) >= size]
        if fitting:
            block = min(fitting, key=lambda b: len(b.memory))
            self._free.remove(block)
            return block
        for small in self._free:  # rather than keep what is too small for what is going on
            self._unlink(small)
        self._free = []
        return self._make(max(SMALLEST, 1 << (size - 1).bit_length() if size < 1 << 20 else size + (-size % (1 << 20))))

    def give_back(self, block: Block) -> None:
        """Nobody uses it any more."""
        self._free.append(block)

    def _make(self, size: int) -> Block:
        path = self.folder / str(self._made)
        self._made += 1
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            path.unlink()
            free = shutil.disk_usage(self.folder).free
            raise TransportError(
                f"{self.folder.parent}: no room for {size:,} bytes of shared memory, {free:,} free: {error}"
            ) from None
        finally:
            os.close(descriptor)
        return Block(str(path), _mapped(path, size))

    def _unlink(self, block: Block) -> None:
        with suppress(FileNotFoundError):
            os.unlink(block.name)


def attach(name: str) -> Tensor:
    """The memory of another process's block, uint8; valid as long as it is held. Raises ``TransportError`` if there is none."""
    path = Path(name)
    if not path.parent.name.startswith(PREFIX) or not path.is_file():
        raise TransportError(f"{name}: no such block of shared memory")
    return _mapped(path, path.stat().st_size)


def _mapped(path: Path, size: int) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        os.close(lock)


def _place() -> Path:
    return SHARED if SHARED.is_dir() and os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())


def sweep() -> None:
    """Remove the folders of owners that are gone: nobody holds their lock."""
    for folder in _place().glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
