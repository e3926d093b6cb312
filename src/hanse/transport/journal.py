"""Streams that are not whole yet, kept in a folder, so that a receiver that was killed goes on where it was.

Two files a stream: ``.part`` is its memory, mapped; ``.have`` has a line that says what stream it is, then for every chunk that has
arrived its index (u32) and what it adds to the digest, appended before the chunk is acknowledged. What is read back is checked
against the bytes, so nothing needs to reach the disk in any order.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from hanse.core.errors import TransportError
from hanse.transport.stream import Plan, prepared


class Journal(dict[int, bytes]):
    """The two files of one stream in ``folder``: its ``memory``, and the digests of the chunks that are there, by index.

    A digest that is set is written down. What the files hold of another stream of that name is void.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        stem = folder / f"{plan.name.job:016x}-{plan.name.round}-{plan.name.number}"
        self._part, self._have = stem.with_suffix(".part"), stem.with_suffix(".have")
        self._first = f"{plan.size} {plan.chunk} {plan.digest}\n".encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = self._found(plan)
            self.memory = _mapped(self._part, plan.size)
            self._file = self._have.open("ab", buffering=0)
            if not found:
                self.clear()
        except OSError as error:
            raise TransportError(f"{folder}: cannot keep {plan.size:,} bytes of a stream: {error.strerror}") from None
        view = self.memory.numpy().data
        for index, digest in found.items():
            if index < plan.count and prepared(plan, index, [view[plan.span(index)]]).digest == digest:
                super().__setitem__(index, digest)

    def __setitem__(self, index: int, digest: bytes) -> None:
        self._file.write(index.to_bytes(4, "little") + digest)
        super().__setitem__(index, digest)

    def clear(self) -> None:
        """Nothing that has arrived counts."""
        super().clear()
        self._file.truncate(0)
        self._file.write(self._first)

    def close(self, keep: bool) -> None:
        """Let go of the files, which stay if the stream is to be gone on with; the memory stays valid."""
        self._file.close()
        if not keep:
            self._part.unlink(missing_ok=True)
            self._have.unlink(missing_ok=True)

    def _found(self, plan: Plan) -> dict[int, bytes]:
        """What is written down of this stream."""
        if not self._have.is_file() or not self._part.is_file() or self._part.stat().st_size != plan.size:
            return {}
        text, start = self._have.read_bytes(), len(self._first)
        if not text.startswith(self._first):
            return {}
        width = 4 + (32 if plan.digest == "sha256" else 4)
        end = start + (len(text) - start) // width * width
        os.truncate(self._have, end)  # a kill may have cut the last one off
        rows = [text[at : at + width] for at in range(start, end, width)]
        return {int.from_bytes(row[:4], "little"): row[4:] for row in rows}


def _mapped(path: Path, size: int) -> Tensor:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        if size:
            os.posix_fallocate(descriptor, 0, size)
        os.truncate(descriptor, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
