"""Payloads by UCX, which moves them by RDMA where both ends have it. Needs the extra ``ucx``.

Headers and acknowledgements go over the ordinary connection; a payload is a tagged message whose tag is in its header. UCX
registers memory when it first sees it and remembers that. It is used only where it is asked for, and only with an RDMA device,
unless the environment variable ``UCX_TLS`` says what UCX is to use instead (``tcp,sm`` say). Soft-RoCE counts as a device.
It was run over these two, never over RDMA.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hanse.core.errors import MissingExtraError, TransportError
from hanse.transport.frames import HEADER, UCX, Frame, Said
from hanse.transport.shared import copy, gather
from hanse.transport.tcp import Channel, inline

DEVICES = Path("/sys/class/infiniband")
MARK = 16
_PATIENCE = 10.0
_TAGS = 1 << 16
_MOST_LOST = 64


def devices() -> list[str]:
    """The RDMA devices of this machine."""
    return sorted(p.name for p in DEVICES.iterdir()) if DEVICES.is_dir() else []


def require() -> None:
    """Raises ``MissingExtraError`` without the package, ``TransportError`` without the hardware."""
    try:
        import ucxx  # noqa: F401
    except ImportError:
        raise MissingExtraError("UCX", "ucx") from None
    if not devices() and "UCX_TLS" not in os.environ:
        raise TransportError(f"ucx: no RDMA device in {DEVICES}; UCX_TLS=tcp,sm in the environment has UCX do without")


class _Node:
    """UCX in this process: a thread with its event loop, and a listener whose endpoints say by a mark whose they are."""

    def __init__(self) -> None:
        require()
        self._loop = asyncio.new_event_loop()
        self.marked: dict[bytes, Future[Any]] = {}
        """The endpoints that are waited for, by what they will say."""
        threading.Thread(target=self._loop.run_forever, name="hanse-ucx", daemon=True).start()
        self.listener = self.submit(self._listen()).result(_PATIENCE)

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Have the loop do something."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _listen(self) -> Any:
        import ucxx

        return ucxx.create_listener(self._accept)

    async def _accept(self, endpoint: Any) -> None:
        mark = bytearray(MARK)
        with suppress(Exception):
            await asyncio.wait_for(endpoint.recv(mark, tag=0, force_tag=True), _PATIENCE)
            waiting = self.marked.get(bytes(mark))
            if waiting is not None and not waiting.done():
                waiting.set_result(endpoint)
                return
        endpoint.abort()


@lru_cache(maxsize=1)
def _node() -> _Node:
    return _Node()


class Sender:
    """The sender's endpoint. What it cannot send any more goes over the connection."""

    def __init__(self, host: str, offer: Said) -> None:
        port, mark = offer.get("port", int), offer.get("mark", str)
        self._node = _node()
        try:
            self._endpoint = self._node.submit(self._connect(host, port, bytes.fromhex(mark))).result(_PATIENCE)
        except Exception as error:  # ucxx has errors of its own for each status of UCX
            raise TransportError(f"ucx: no endpoint at {host}:{port}: {error}") from None
        self._staged: dict[int, bytearray] = {}
        self._flying: dict[int, Future[Any]] = {}
        self._tag = 0
        self._broken = False

    def send(self, channel: Channel, frame: Frame, parts: Sequence[memoryview]) -> int:
        """Post the payload and send its header; the bytes that took on the connection."""
        for tag in [t for t, future in self._flying.items() if future.done()]:
            self._broken |= self._flying.pop(tag).exception() is not None
        if self._broken:
            return inline(channel, frame, parts)
        self._tag = self._tag % (_TAGS - 1) + 1
        payload = parts[0]
        if len(parts) > 1:  # in one piece, in memory that is the slot's and registered once
            staged = self._staged.get(frame.slot, b"")
            if len(staged) < frame.length:
                staged = self._staged[frame.slot] = bytearray(frame.length)
            payload = memoryview(staged)[: frame.length]
            gather(payload, parts)
        channel.send(replace(frame, flags=UCX, slot=self._tag).pack())
        self._flying[self._tag] = self._node.submit(self._endpoint.send(payload, tag=self._tag))
        return HEADER.size

    def close(self) -> None:
        """Close the endpoint."""
        with suppress(Exception):
            self._node.submit(self._endpoint.close()).result(_PATIENCE)

    @staticmethod
    async def _connect(host: str, port: int, mark: bytes) -> Any:
        import ucxx

        endpoint = await ucxx.create_endpoint(host, port)
        await endpoint.send(bytearray(mark), tag=0, force_tag=True)
        return endpoint


class Receiver:
    """The receiver's endpoint, which the sender makes when it is told where: by ``offer``."""

    def __init__(self) -> None:
        self._node = _node()
        self._mark = secrets.token_bytes(MARK)
        self._endpoint = self._node.marked[self._mark] = Future()
        self.offer: dict[str, object] = {"port": self._node.listener.port, "mark": self._mark.hex()}
        self._spare: list[bytearray] = []
        self._lost = 0

    def fetch(self, frame: Frame, target: memoryview, patience: float) -> Callable[[], None]:
        """Have the payload of a frame received; what is returned waits for it and copies it into ``target``.

        It raises ``ConnectionError`` if nothing comes. The buffer is then never used again, because something still may; so this
        raises ``ConnectionError`` too when that has happened too often.
        """
        if self._lost >= _MOST_LOST:
            raise ConnectionAbortedError(f"ucx: {self._lost} payloads did not come")
        endpoint = self._endpoint.result(patience)
        buffer = self._spare.pop() if self._spare else bytearray()
        if len(buffer) < frame.length:
            buffer = bytearray(frame.length)
        view = memoryview(buffer)[: frame.length]
        received = self._node.submit(endpoint.recv(view, tag=frame.slot))

        def wait() -> None:
            try:
                received.result(min(patience, _PATIENCE))
            except Exception as error:
                self._lost += 1
                raise ConnectionResetError(f"ucx: {error or type(error).__name__}") from None
            copy(target, view)
            self._spare.append(buffer)

        return wait

    def close(self) -> None:
        """Close the endpoint."""
        self._node.marked.pop(self._mark, None)
        if self._endpoint.done():
            with suppress(Exception):
                self._node.submit(self._endpoint.result().close()).result(_PATIENCE)
