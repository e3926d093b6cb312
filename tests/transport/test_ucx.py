"""UCX where it is there. Without its package, or a device and UCX_TLS, what is said of that."""

import importlib.util
import os

import pytest

from hanse.core.errors import MissingExtraError, TransportError
from hanse.transport import ucx
from hanse.transport.peers import Link, Listener
from hanse.transport.sources import Source, content
from tests.transport.processes import TOKEN

PACKAGE = importlib.util.find_spec("ucxx") is not None
usable = pytest.mark.skipif(
    not PACKAGE or not (ucx.devices() or "UCX_TLS" in os.environ), reason="needs ucxx, and an RDMA device or UCX_TLS"
)
DATA = bytes(range(251)) * 20_000
WAYS = ("ucx", "inline")


@pytest.mark.skipif(PACKAGE, reason="ucxx is installed")
def test_without_the_package():
    for kind in (Link, Listener):
        with pytest.raises(MissingExtraError, match=r"UCX needs the extra 'ucx'"):
            kind(("127.0.0.1", 0), job=1, token=TOKEN, ways=WAYS)


@pytest.mark.skipif(not PACKAGE, reason="needs ucxx")
def test_without_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(ucx, "DEVICES", tmp_path / "none")
    monkeypatch.delenv("UCX_TLS", raising=False)
    with pytest.raises(TransportError, match=r"no RDMA device in .*none; UCX_TLS=tcp,sm"):
        Link(("127.0.0.1", 0), job=1, token=TOKEN, ways=WAYS)


def test_devices_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(ucx, "DEVICES", tmp_path)
    (tmp_path / "rxe0").mkdir()
    assert ucx.devices() == ["rxe0"]


@pytest.mark.skipif(not any(d.startswith("rxe") for d in ucx.devices()) or not PACKAGE, reason="needs a Soft-RoCE device")
def test_soft_roce():
    with Listener(job=1, token=TOKEN, ways=WAYS) as far, Link(far.address, job=1, token=TOKEN, ways=WAYS) as link:
        link.put(content(DATA))
        assert far.get(20).memory.numpy().tobytes() == DATA


@usable
@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize(("size", "chunk"), [(300, 1), (12_345, 1000), (5_020_000, 1 << 16), (5_020_000, 5_020_001), (0, 5)])
def test_what_arrives_is_what_was_sent(size, chunk, window):
    settings = {"job": 1, "token": TOKEN, "ways": WAYS}
    with Listener(**settings) as far, Link(far.address, chunk=chunk, window=window, **settings) as link:
        for number in range(2):
            counters = link.put(content(DATA[:size]), number=number)
            assert far.get(20).memory.numpy().tobytes() == DATA[:size]
            assert counters.wire == 56 * counters.chunks


@usable
def test_what_ucx_cannot_send_goes_by_tcp(monkeypatch):
    monkeypatch.setattr(ucx, "_PATIENCE", 1.0)
    real = ucx.Sender.send

    def failing(self, channel, frame, parts):
        self._endpoint = type("Broken", (), {"send": staticmethod(broken), "close": self._endpoint.close})()
        return real(self, channel, frame, parts)

    async def broken(*given, **named):
        raise OSError("the queue pair is in error")

    monkeypatch.setattr(ucx.Sender, "send", failing)
    with (
        Listener(job=1, token=TOKEN, ways=WAYS) as far,
        Link(far.address, job=1, token=TOKEN, ways=WAYS, chunk=1000, window=2) as link,
    ):
        counters = link.put(content(DATA[:5000]))
        assert far.get(20).memory.numpy().tobytes() == DATA[:5000]
        assert counters.connections == 1 and counters.wire > 5000


@usable
def test_chunks_of_many_pieces():
    pieces = [memoryview(DATA)[at : at + 777] for at in range(0, 100_000, 777)]
    source = Source(sum(map(len, pieces)), lambda: pieces)
    with Listener(job=1, token=TOKEN, ways=WAYS) as far, Link(far.address, job=1, token=TOKEN, ways=WAYS, chunk=10_000) as link:
        link.put(source)
        assert far.get(20).memory.numpy().tobytes() == b"".join(pieces)
