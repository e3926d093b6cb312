"""What is sent: bytes in pieces that may be made while earlier ones travel, and the thread that makes them."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from torch import Tensor

from hanse.core import wire
from hanse.core.errors import CodecError, TransportError
from hanse.transport.stream import Chunk, Plan, cut, prepared


@dataclass(frozen=True)
class Source:
    """``size`` bytes, in the pieces that ``pieces()`` gives one after the other.

    A piece must stay as it is until the stream is through, so a generator must not write its next piece over the last one. It is
    called again where a receiver has lost what it had, and must then give the same bytes. It runs in a thread of its own.
    """

    size: int
    pieces: Callable[[], Iterable[memoryview]]


def message(tensors: Mapping[str, Tensor], about: wire.About | None = None) -> Source:
    """Named tensors, as ``hanse.core.wire`` writes them; sent from where they lie. They must not change on the way."""
    return Source(wire.wire_size(tensors, about=about), lambda: wire.pieces(tensors, about))


def content(data: bytes | bytearray | memoryview) -> Source:
    """Bytes that are there already."""
    view = memoryview(data)
    return Source(view.nbytes, lambda: [view])


class Ahead:
    """A thread that makes the chunks of a source, with their checksums, and waits while ``window`` are not given back.

    So whatever a source makes is in memory W s bytes at a time, those in flight among them. Of chunks whose bits are set in
    ``skip`` only the digest is made. ``wake`` can be read when ``take`` has something.
    """

    def __init__(self, plan: Plan, source: Source, window: int, skip: int) -> None:
        self._plan, self._source, self._skip = plan, source, skip
        self._credits = threading.Semaphore(window)
        self._made: queue.SimpleQueue[Chunk | BaseException] = queue.SimpleQueue()
        self._stopped = False
        self.wake, self._bell = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(self._bell, False)
        self._thread = threading.Thread(target=self._run, name="hanse-ahead", daemon=True)
        self._thread.start()

    def take(self) -> list[Chunk]:
        """What has been made since the last call. Raises what the source raised, ``TransportError`` if its size is another."""
        with suppress(BlockingIOError):
            os.read(self.wake, 1 << 16)
        found = []
        while not self._made.empty():
            chunk = self._made.get()
            if isinstance(chunk, BaseException):
                raise chunk
            found.append(chunk)
        return found

    def free(self, chunks: int) -> None:
        """So many that were taken are not needed any more."""
        if chunks:  # a semaphore is not released by 0
            self._credits.release(chunks)

    def close(self) -> None:
        """Stop; returns when the source does nothing any more."""
        self._stopped = True
        self._credits.release()
        self._thread.join()
        os.close(self.wake)
        os.close(self._bell)

    def _give(self, chunk: Chunk | BaseException) -> None:
        self._made.put(chunk)
        with suppress(BlockingIOError):  # full: it will wake as it is
            os.write(self._bell, b"!")

    def _run(self) -> None:
        try:
            index = size = 0
            chunks = cut(self._source.pieces(), self._plan.chunk)
            while True:
                self._credits.acquire()
                parts = None if self._stopped else next(chunks, None)
                if parts is None:
                    break
                size += sum(len(part) for part in parts)
                if size > self._plan.size:
                    break
                chunk = prepared(self._plan, index, parts)
                if self._skip >> index & 1:
                    chunk = replace(chunk, parts=())
                    self._credits.release()
                index += 1
                self._give(chunk)
                del parts, chunk  # or one more than the window would be held while waiting
            if size != self._plan.size and not self._stopped:
                raise TransportError(f"{self._plan.name}: the source gave {size:,} bytes and said {self._plan.size:,}")
        except (OSError, CodecError) as error:  # from a connection these are a reason to make a new one, from a source they are not
            self._give(TransportError(f"{self._plan.name}: the source failed: {error}"))
        except BaseException as error:
            self._give(error)
