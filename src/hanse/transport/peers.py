"""Streams from process to process: a ``Listener`` that waits for peers, and the ``Link`` of a peer to it.

    listener = Listener(("0.0.0.0", 7000), job=1, token=token)        link = Link(("server", 7000), job=1, token=token)
    arrived = listener.get()                                    <---  link.put(message(tensors), round=3, number=17)
    tensors, about = arrived.tensors()
    listener.offer(message(model), round=4, number=0)           --->  tensors, about = link.get(round=4, number=0).tensors()

The link dials in either case, so that only the listener needs an address that others can reach, and dials again when the connection
is cut: the stream then goes on where it was. A stream has a name: job, round and number; every stream of a job needs another one.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from hanse.core.errors import CodecError, ConfigError, TransportError
from hanse.transport import ucx
from hanse.transport.blocks import Blocks
from hanse.transport.desk import Desk, Memory, own_memory
from hanse.transport.exchange import WAYS, Arrival, Inbox, Outbox, Outgoing
from hanse.transport.frames import WIDEST, Name, Said, control
from hanse.transport.handshake import admit, enter, token_bytes
from hanse.transport.sources import Source
from hanse.transport.stream import Counters, Pace, Plan
from hanse.transport.tcp import Address, Channel, GoneError, dial, listen

log = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK = 4 << 20
WINDOW = 8
POOL = 64 << 20
_WORKERS = min(4, os.cpu_count() or 1)


def _checked(ways: Sequence[str], window: int) -> tuple[str, ...]:
    """The ways; raises ``ConfigError`` where a way or a window cannot be."""
    if not set(ways) <= set(WAYS):
        raise ConfigError(f"ways: {tuple(ways)}; allowed: {', '.join(WAYS)}")
    if not 1 <= window <= WIDEST:
        raise ConfigError(f"window: {window}; 1 to {WIDEST} chunks can be in flight")
    if "ucx" in ways:
        ucx.require()
    return tuple(ways)


class Listener:
    """Waits for peers at ``address``, in threads of its own, and collects what they send.

    ``limit``: bytes of streams that are not whole or not fetched yet; more is refused before any of it is taken. ``memory`` gives
    the memory of each stream; with ``folder`` streams that are not whole lie there, and outlast this process. ``pool``: bytes of
    shared memory a connection may have at most. ``tls``: a context for servers. ``peers``: connections at a time; ``patience``:
    seconds after which a peer that owes something is given up. Raises ``TransportError`` where the address cannot be had.
    """

    def __init__(
        self,
        address: Address = ("127.0.0.1", 0),
        *,
        job: int,
        token: str | bytes,
        limit: int = 1 << 30,
        memory: Memory = own_memory,
        folder: Path | None = None,
        tls: ssl.SSLContext | None = None,
        ways: Sequence[str] = ("shared", "inline"),
        chunk: int = CHUNK,
        window: int = WINDOW,
        pool: int = POOL,
        peers: int = 256,
        patience: float = 30.0,
    ) -> None:
        self._ways, self._token, self._job = _checked(ways, window), token_bytes(token), job
        self._tls, self._pool, self._patience = tls, pool, patience
        self._chunk, self._window = chunk, window
        self._desk = Desk(job, limit, memory, folder)
        self._blocks = Blocks() if "shared" in ways else None
        self._sock = listen(address)
        self._workers = ThreadPoolExecutor(_WORKERS, "hanse-check")
        self._arrivals: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        self._offered: dict[Name, Source] = {}
        self._places = threading.Semaphore(peers)
        self._channels: set[Channel] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        name = self._sock.getsockname()
        self.address: Address = name if isinstance(name, str) else (name[0], name[1])
        """Where it listens; the port is chosen by the system if none was given."""
        self._accepting = threading.Thread(target=self._accept, name="hanse-listener", daemon=True)
        self._accepting.start()

    def get(self, timeout: float | None = None) -> Arrival:
        """The next stream that is whole. Raises ``TransportError`` if there is none within ``timeout`` seconds, or it is closed."""
        try:
            arrival = self._arrivals.get(timeout=timeout)
        except queue.Empty:
            raise TransportError(f"no stream within {timeout} seconds") from None
        if arrival is None:
            self._arrivals.put(None)  # for the next one who asks
            raise TransportError("the listener is closed")
        self._desk.collected(len(arrival.memory))
        return arrival

    def offer(self, source: Source, round: int = 0, number: int = 0) -> None:
        """Have a stream for any peer that asks for it, until it is withdrawn."""
        plan = Plan(Name(self._job, round, number), source.size, self._chunk).check()
        self._offered[plan.name] = source

    def withdraw(self, round: int = 0, number: int = 0) -> None:
        """No longer have it."""
        self._offered.pop(Name(self._job, round, number), None)

    def forget(self, round: int = 0, number: int = 0) -> None:
        """Give up what there is of a stream that is not whole, and the memory it counts for; or that it was received."""
        self._desk.forget(Name(self._job, round, number))

    def close(self) -> None:
        """Cut all connections. Streams in ``folder`` that are not whole stay there."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._sock.close()
        for channel in list(self._channels):
            channel.abort()
        self._accepting.join()
        for thread in list(self._threads):
            thread.join()
        self._arrivals.put(None)
        self._desk.close()
        self._workers.shutdown()
        if self._blocks:
            self._blocks.close()
        if isinstance(self.address, str):
            Path(self.address).unlink(missing_ok=True)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed:
            self._places.acquire()
            try:
                sock, peer = self._sock.accept()
                thread = threading.Thread(target=self._serve, args=(sock, peer), name="hanse-peer", daemon=True)
                self._threads.add(thread)
                thread.start()
            except OSError as error:
                self._places.release()
                if not self._closed:  # no more files may be open, say
                    log.warning("nobody comes in: %s", error)
                    time.sleep(0.1)

    def _serve(self, sock: socket.socket, peer: object) -> None:
        """One connection, from its first byte to its last; whatever a peer does ends in a line of the log."""
        who = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "a local process"
        happened, channel = "refused", None
        try:
            if self._tls is not None:  # they shake hands when the first byte is sent, so that ``close`` need not wait for it
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            channel = Channel(sock, self._patience)
            self._channels.add(channel)
            if not self._closed:
                self._admit(channel)
                happened = "lost"
                self._listen_to(channel, who)
        except (OSError, CodecError, TransportError) as error:
            log.log(logging.DEBUG if self._closed and happened == "lost" else logging.WARNING, "%s %s: %s", happened, who, error)
        except Exception as error:  # of the source of what is offered
            log.exception("lost %s: %s", who, error)
        finally:
            if channel:
                self._channels.discard(channel)
            sock.close()
            self._threads.discard(threading.current_thread())
            self._places.release()

    def _admit(self, channel: Channel) -> None:
        """Let a peer in, who has one patience for all that is said before that."""
        watch = threading.Timer(self._patience, channel.abort)
        watch.start()
        try:
            admit(channel, self._job, self._token)
        finally:
            watch.cancel()

    def _listen_to(self, channel: Channel, who: str) -> None:
        inbox = Inbox(channel, self._desk, self._blocks, self._pool, self._workers, "ucx" in self._ways)
        outbox = Outbox(channel, self._ways)
        try:
            while True:
                try:
                    frame = channel.frame(forever=True)
                except GoneError:
                    return
                message = channel.control(frame)
                if message.say == "open":
                    try:
                        arrival = inbox.receive(message)
                    except TransportError as error:
                        log.warning("refused %s from %s: %s", message.name, who, error)
                        continue
                    if arrival:
                        self._arrivals.put(arrival)
                elif message.say == "want":
                    self._give(message, outbox)
                elif message.say == "bye":
                    return
                else:
                    raise CodecError(f"{message.say!r:.40} is no request")
        finally:
            inbox.close()
            outbox.close()

    def _give(self, message: Said, outbox: Outbox) -> None:
        source = self._offered.get(message.name)
        if source is None:
            outbox.channel.send(control(message.name, "refused", reason=f"{message.name} is not offered"))
            return
        outgoing = Outgoing(Plan(message.name, source.size, self._chunk), source, self._window, Pace(), tries=5)
        try:
            outgoing.push(outbox)
        finally:
            outgoing.close()


class Link:
    """A connection to a listener, made when it is needed and made again when it is cut, ``attempts`` times without progress.

    ``chunk`` and ``window`` are s and W; ``digest`` is "sha256" or "crc32". ``ways`` that payloads may take: "ucx", "shared",
    "inline"; the first in this order that both ends can is taken. ``limit`` and ``memory`` are for what is fetched. One stream at a
    time, from any thread; several links to one listener carry several at once.
    """

    def __init__(
        self,
        address: Address,
        *,
        job: int,
        token: str | bytes,
        chunk: int = CHUNK,
        window: int = WINDOW,
        digest: str = "sha256",
        tries: int = 5,
        tls: ssl.SSLContext | None = None,
        ways: Sequence[str] = ("shared", "inline"),
        limit: int = 1 << 40,
        memory: Memory = own_memory,
        patience: float = 30.0,
        attempts: int = 8,
        pace: Pace | None = None,
    ) -> None:
        self.address, self.pace = address, pace or Pace()
        self._ways, self._token, self._job = _checked(ways, window), token_bytes(token), job
        self._chunk, self._window, self._digest, self._tries = chunk, window, digest, tries
        self._tls, self._patience, self._attempts = tls, patience, attempts
        self._desk = Desk(job, limit, memory)
        self._workers = ThreadPoolExecutor(_WORKERS, "hanse-check")
        self._blocks: Blocks | None = None
        self._lock = threading.Lock()
        self._connection: tuple[Inbox, Outbox] | None = None
        self._opened = ExitStack()

    def put(self, source: Source, round: int = 0, number: int = 0) -> Counters:
        """Send a stream; returns when the listener has all of it. Raises ``TransportError`` if it refuses, or cannot be reached."""
        plan = Plan(Name(self._job, round, number), source.size, self._chunk, self._digest).check()
        outgoing = Outgoing(plan, source, self._window, self.pace, self._tries)
        try:
            with self._lock:
                self._persist(lambda inbox, outbox: outgoing.push(outbox), lambda: len(outgoing.sender.arrived))
        finally:
            outgoing.close()
        return outgoing.sender.counters

    def get(self, round: int = 0, number: int = 0) -> Arrival:
        """Fetch a stream that the listener offers. Raises ``TransportError`` if it does not, or cannot be reached."""
        name = Name(self._job, round, number)

        def ask(inbox: Inbox, outbox: Outbox) -> Arrival:
            outbox.channel.send(control(name, "want"))
            message = outbox.channel.control()
            if message.say == "refused":
                raise message.refusal()
            if message.say != "open" or message.name != name:
                raise CodecError(f"'open' must come now, not {message.say!r:.40}")
            arrival = inbox.receive(message)
            if arrival is None:
                raise TransportError(f"{name} was offered and not taken")
            return arrival

        with self._lock:
            self._desk.forget(name)
            arrival = self._persist(ask, lambda: self._desk.arrived(name))
        self._desk.collected(len(arrival.memory))
        return arrival

    def close(self) -> None:
        """Say good-bye."""
        with self._lock:
            if self._connection:
                with suppress(OSError):
                    self._connection[1].channel.send(control(Name(self._job, 0, 0), "bye"))
            self._hang_up()
            self._desk.close()
            self._workers.shutdown()
            if self._blocks:
                self._blocks.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _persist(self, work: Callable[[Inbox, Outbox], T], progress: Callable[[], int]) -> T:
        """Do it over as many connections as it takes, with pauses that double while nothing gets through."""
        failed, before = 0, progress()
        while True:
            try:
                return work(*self._connected())
            except ssl.SSLCertVerificationError as error:
                raise TransportError(f"{self.address}: {error.verify_message}") from None
            except (OSError, CodecError) as error:
                self._hang_up()
                failed, before = (failed + 1 if progress() == before else 1), progress()
                if failed >= self._attempts:
                    raise TransportError(f"{self.address}: given up after {failed} attempts: {error}") from None
                log.info("%s: %s; once more", self.address, error)
                time.sleep(min(2.0, 0.05 * 2**failed))
            except BaseException:
                self._hang_up()  # nobody knows what has been said
                raise

    def _connected(self) -> tuple[Inbox, Outbox]:
        if self._connection is None:
            channel = dial(self.address, self._tls, self._patience)
            self._opened.callback(channel.close)
            enter(channel, self._job, self._token)
            if self._blocks is None and "shared" in self._ways and channel.local:
                self._blocks = Blocks()
            inbox = Inbox(channel, self._desk, self._blocks, POOL, self._workers, "ucx" in self._ways)
            outbox = Outbox(channel, self._ways)
            self._opened.callback(inbox.close)
            self._opened.callback(outbox.close)
            self._connection = inbox, outbox
        return self._connection

    def _hang_up(self) -> None:
        self._connection = None
        self._opened.close()
