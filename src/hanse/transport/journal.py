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


class Journal:
    """The two files of one stream in ``folder``. What they hold of another stream of that name is void."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan = plan
        stem = folder / f"{plan.name.job:016x}-{plan.name.round}-{plan.name.number}"
        self._part, self._have = stem.with_suffix(".part"), stem.with_suffix(".have")
        self._first = f"{plan.size} {plan.chunk} {plan.digest}\n".encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            records = self._records()
            self._file = self._have.open("ab" if records is not None else "wb", buffering=0)
            self.memory = self._mapped()
            if records is None:
                self._file.write(self._first)
        except OSError as error:
            raise TransportError(f"{folder}: cannot keep {plan.size:,} bytes of a stream: {error.strerror}") from None
        view = self.memory.numpy().data
        self.digests = {
            index: digest
            for index, digest in (records or {}).items()
            if prepared(plan, index, [view[plan.span(index)]]).digest == digest
        }
        """Of the chunks that are there."""

    def add(self, index: int, digest: bytes) -> None:
        """A chunk has arrived."""
        self._file.write(index.to_bytes(4, "little") + digest)

    def void(self) -> None:
        """Nothing that has arrived counts."""
        self._file.truncate(len(self._first))

    def close(self, keep: bool) -> None:
        """Let go of the files, which stay if the stream is to be gone on with; the memory stays valid."""
        self._file.close()
        if not keep:
            self._part.unlink(missing_ok=True)
            self._have.unlink(missing_ok=True)

    def _records(self) -> dict[int, bytes] | None:
        """What is written down of this stream; None if it is another or none."""
        if not self._have.is_file() or not self._part.is_file() or self._part.stat().st_size != self.plan.size:
            return None
        text = self._have.read_bytes()
        if not text.startswith(self._first):
            return None
        width = 4 + (32 if self.plan.digest == "sha256" else 4)
        body = text[len(self._first) :]
        whole = len(body) // width * width
        if whole < len(body):  # a kill cut the last one off
            os.truncate(self._have, len(self._first) + whole)
        rows = [body[at : at + width] for at in range(0, whole, width)]
        found = {int.from_bytes(row[:4], "little"): row[4:] for row in rows}
        return {index: digest for index, digest in found.items() if index < self.plan.count}

    def _mapped(self) -> Tensor:
        descriptor = os.open(self._part, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if self.plan.size:
                os.posix_fallocate(descriptor, 0, self.plan.size)
            os.truncate(descriptor, self.plan.size)
        finally:
            os.close(descriptor)
        if not self.plan.size:
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_file(str(self._part), shared=True, size=self.plan.size, dtype=torch.uint8)
