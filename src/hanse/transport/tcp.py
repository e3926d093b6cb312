"""Connections that carry frames: TCP, with or without TLS, and sockets of the local machine. Nothing is copied in Python."""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress

from hanse.core.errors import CodecError, TransportError
from hanse.transport.frames import ACK, CONTROL, HEADER, LONGEST_CONTROL, MAGIC, Ack, Frame, Said, said

Address = tuple[str, int] | str
"""Host and port, or the path of a socket of this machine."""

_MOST_PARTS = 512  # of one sendmsg; the system takes 1024
_MAGIC = MAGIC.to_bytes(4, "little")


class GoneError(ConnectionResetError):
    """The other end has closed the connection, and not in the middle of something."""


def fill(sock: socket.socket, view: memoryview) -> None:
    """Receive exactly as much as ``view`` holds."""
    size = len(view)
    while len(view):
        got = sock.recv_into(view)
        if not got:
            raise (GoneError if len(view) == size else ConnectionResetError)("the connection was closed")
        view = view[got:]


class Channel:
    """A connection. Everything raises ``OSError`` when it is gone or has stood still for ``patience`` seconds.

    For one thread, but for ``abort``. ``sent`` and ``received`` count bytes.
    """

    def __init__(self, sock: socket.socket, patience: float = 30.0) -> None:
        sock.settimeout(patience)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.patience = patience
        self.sent = self.received = 0
        self._sock = sock
        self._tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self._small = bytearray(HEADER.size)

    @property
    def local(self) -> bool:
        """Whether the other end is on this machine."""
        if self._sock.family == socket.AF_UNIX:
            return True
        return bool(self._sock.getpeername()[0] == self._sock.getsockname()[0])

    @property
    def host(self) -> str:
        """The address of the other end's machine."""
        return "localhost" if self._sock.family == socket.AF_UNIX else str(self._sock.getpeername()[0])

    def send(self, *parts: bytes | memoryview) -> None:
        """Send all of ``parts``, one after the other."""
        views = [memoryview(part) for part in parts if len(part)]
        self.sent += sum(len(view) for view in views)
        if self._tls is not None:
            for view in views:
                self._tls.sendall(view)
            return
        first = 0
        while first < len(views):
            gone = self._sock.sendmsg(views[first : first + _MOST_PARTS])
            while first < len(views) and gone >= len(views[first]):
                gone -= len(views[first])
                first += 1
            if gone:
                views[first] = views[first][gone:]

    def fill(self, view: memoryview) -> None:
        """Receive exactly as much as ``view`` holds."""
        self.received += len(view)
        fill(self._sock, view)

    def ready(self, seconds: float | None = 0.0, wake: int | None = None) -> bool:
        """Wait until something can be received; whether it can. ``wake``: a descriptor that ends the wait when it can be read."""
        if self._tls is not None and self._tls.pending():
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if wake is not None:
            poll.register(wake, select.POLLIN)
        mine = self._sock.fileno()
        return any(fd == mine for fd, _ in poll.poll(None if seconds is None else max(0.0, 1000 * seconds)))

    def frame(self, forever: bool = False) -> Frame:
        """The next header; ``forever``: however long it takes to begin."""
        if forever:
            self.ready(None)
        view = memoryview(self._small)
        self.fill(view)
        return Frame.parse(view)

    def answer(self) -> Ack | Said:
        """What comes next from a receiver."""
        view = memoryview(self._small)
        self.fill(view[: ACK.size])
        if view[:4] != _MAGIC:
            return Ack.parse(view[: ACK.size])
        self.fill(view[ACK.size :])
        return self.control(Frame.parse(view))

    def control(self, frame: Frame | None = None, longest: int = LONGEST_CONTROL) -> Said:
        """The control message whose header is ``frame``, or comes next. Raises ``CodecError`` if it is none, or too long."""
        frame = frame or self.frame()
        if frame.flags != CONTROL or frame.length > longest:
            raise CodecError(
                f"a control message of at most {longest} bytes must come now, not {frame.length} bytes of flags {frame.flags}"
            )
        text = bytearray(frame.length)
        self.fill(memoryview(text))
        return said(frame, text)

    def abort(self) -> None:
        """Cut the connection; whoever waits in another thread gets an error."""
        with suppress(OSError):  # it is cut already
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # an SSLSocket's own would go on without TLS

    def close(self) -> None:
        """Let go of the connection."""
        self._sock.close()


def connect(address: Address, patience: float | None = None) -> socket.socket:
    """A socket that is connected to a listener. Raises ``OSError``; ``TransportError`` where there can be no such address."""
    if not isinstance(address, str):
        if address[1] >= 1 << 16:  # or it would be another port
            raise TransportError(f"address: {address}: port must be 0 to 65535")
        return socket.create_connection(address, patience)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(patience)
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def dial(address: Address, tls: ssl.SSLContext | None = None, patience: float = 30.0) -> Channel:
    """Connect to a listener. Raises as ``connect`` does."""
    sock = connect(address, patience)
    if tls is not None and not isinstance(address, str):
        sock = tls.wrap_socket(sock, server_hostname=address[0])
    return Channel(sock, patience)


def listen(address: Address) -> socket.socket:
    """A socket that takes connections. Raises ``TransportError`` where the address cannot be had."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
    except (OSError, OverflowError) as error:
        sock.close()
        raise TransportError(f"address: cannot listen at {address}: {error}") from None
    return sock


def inline(channel: Channel, frame: Frame, parts: Sequence[memoryview]) -> int:
    """Send a frame and its payload where headers go; the bytes that took on the connection."""
    channel.send(frame.pack(), *parts)
    return HEADER.size + frame.length
