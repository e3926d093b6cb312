import socket
import threading
from contextlib import suppress

import numpy as np
import pytest

from hanse.transport.frames import CONTROL, Frame, Name, control
from hanse.transport.peers import Link, Listener
from hanse.transport.proxy import Conditions, Proxy
from hanse.transport.sources import content
from hanse.transport.tcp import listen
from tests.transport.processes import TOKEN

PAYLOAD = bytes(range(256)) * 400


@pytest.fixture
def echo():
    """A listener that gives back what it gets."""
    sock = listen(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                peer, _ = sock.accept()
            except OSError:
                return
            with peer, suppress(OSError):  # it was cut
                while data := peer.recv(1 << 16):
                    peer.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield sock.getsockname()
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def through(proxy, data):
    """What comes back, and whether it was all."""
    found = b""
    with socket.create_connection(proxy.address) as sock:

        def send():
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        thread = threading.Thread(target=send)
        thread.start()
        try:
            while got := sock.recv(1 << 16):
                found += got
        except ConnectionResetError:
            pass
        thread.join()
    return found


def frames(count):
    return b"".join(Frame(0, 0, Name(1, 2, 3), i, count, len(PAYLOAD), 0).pack() + PAYLOAD for i in range(count))


def test_without_loss_everything_passes_whatever_it_is(echo):
    with Proxy(echo, Conditions(rtt=0.01, bandwidth=1e8)) as proxy:
        data = b"not frames at all" * 10_000
        assert through(proxy, data) == data
        assert proxy.up == proxy.down == len(data)


@pytest.mark.parametrize("drop", [False, True])
def test_chunks_are_harmed_and_control_messages_are_not(echo, drop):
    count, loss = 40, 1e-5
    data = control(Name(1, 2, 3), "open") + frames(count) + control(Name(1, 2, 3), "done")
    with Proxy(echo, Conditions(loss=loss, drop=drop), np.random.default_rng(0)) as proxy:
        found = through(proxy, data)
    expected = count * (1 - (1 - loss) ** len(PAYLOAD))
    controls = harmed = at = chunks = 0
    while at < len(found):
        frame = Frame.parse(found[at : at + 40])
        payload = found[at + 40 : at + 40 + frame.length]
        at += 40 + frame.length
        controls += frame.flags == CONTROL
        if frame.flags != CONTROL:
            chunks += 1
            bits = sum((a ^ b).bit_count() for a, b in zip(payload, PAYLOAD, strict=True))
            assert bits in ((0,) if drop else (0, 1))
            harmed += bits
    assert controls == 2
    assert abs((count - chunks if drop else harmed) - expected) < 4 * expected**0.5


def test_the_same_chunks_are_harmed_every_time(echo):
    found = []
    for _ in range(2):
        with Proxy(echo, Conditions(loss=1e-5), np.random.default_rng(3)) as proxy:
            found.append(through(proxy, frames(10)))
    assert found[0] == found[1] != frames(10)


def test_connections_are_cut_where_it_is_said(echo):
    data = frames(10)
    with Proxy(echo, Conditions(), cuts=[200_000]) as proxy:
        assert len(through(proxy, data)) < len(data)
        assert 200_000 <= proxy.up < 200_000 + (1 << 16) + 40
        assert through(proxy, data) == data


def test_nobody_behind(echo):
    with Proxy(("127.0.0.1", 1), Conditions()) as proxy:
        assert through(proxy, b"x") == b""


def test_what_it_cannot_read_ends_the_connection_and_its_threads(echo):
    with Proxy(echo, Conditions(loss=1e-9)) as proxy:
        with suppress(ConnectionResetError), socket.create_connection(proxy.address, 5) as sock:
            sock.sendall(b"not a frame at all, but longer than a header of one")
            assert sock.recv(100) == b""
        pipes = [thread for thread in threading.enumerate() if thread.name == "hanse-pipe"]
        for thread in pipes:
            thread.join(2)
        assert not any(thread.is_alive() for thread in pipes)


def test_chunks_in_shared_memory_have_no_bytes_to_harm():
    with Listener(job=1, token=TOKEN) as far, Proxy(far.address, Conditions(loss=1e-12)) as between:
        with Link(between.address, job=1, token=TOKEN, ways=("shared",), patience=5.0, attempts=1) as link:
            link.put(content(PAYLOAD))
        assert far.get(5).memory.numpy().tobytes() == PAYLOAD
