"""Streams from process to process and from thread to thread: bytes, credits, memory, refusals."""

import hashlib
import itertools
import logging
import os
import resource
import socket
import ssl
import threading
import tracemalloc
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.core.errors import CodecError, ConfigError, TransportError
from hanse.transport.frames import Ack, Frame, Name, control
from hanse.transport.handshake import enter
from hanse.transport.peers import Link, Listener
from hanse.transport.proxy import Conditions, Proxy
from hanse.transport.sources import Source, content, message
from hanse.transport.stream import Pace, Plan, prepared
from hanse.transport.tcp import Channel, dial
from tests.transport.processes import TOKEN, Receiver

NEVER = Pace(patience=60.0, least=60.0)
"""No timer fires, however slow the machine is."""
BIG = torch.randn(16 << 20, generator=torch.Generator().manual_seed(0)).numpy().tobytes()  # 64 MiB of float32
numbers = itertools.count()


def link(address, **settings):
    return Link(address, **{"job": 1, "token": TOKEN, "pace": NEVER, "ways": ("inline",), "attempts": 2, **settings})


def listener(**settings):
    return Listener(**{"job": 1, "token": TOKEN, **settings})


@pytest.fixture(scope="module")
def other():
    """A receiver in another process, and its address."""
    process = Receiver()
    yield process, process.start()
    process.close()


@pytest.mark.parametrize("way", ["inline", "shared"])
@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize(
    ("size", "chunk"),
    [(300, 1), (12_345, 1000), (1_000_003, 1 << 16), (9 << 20, 4 << 20), (70_000, 70_000), (70_000, 70_001), (1, 4 << 20), (0, 5)],
)
def test_what_arrives_in_another_process_is_what_was_sent(other, size, chunk, window, way):
    process, address = other
    number, data = next(numbers), BIG[:size]
    with link(address, chunk=chunk, window=window, ways=(way, "inline")) as mine:
        counters = mine.put(content(data), number=number)
    assert process.arrived() == (number, hashlib.sha256(data).hexdigest(), -(-size // chunk))
    assert counters.resent == 0 and counters.peak <= window
    assert counters.wire == 40 * counters.chunks + 16 * counters.acks + (size if way == "inline" else 0)


@pytest.mark.parametrize("way", ["inline", "shared"])
def test_sixty_four_mebibytes(other, way):
    process, address = other
    number = next(numbers)
    with link(address, ways=(way, "inline")) as mine:
        mine.put(content(BIG), number=number)
    assert process.arrived()[:2] == (number, hashlib.sha256(BIG).hexdigest())


@pytest.mark.parametrize("chunk", [1000, 1 << 16, 1 << 20])
def test_bytes_on_the_wire(chunk):
    """N + 40 C + 16 A, as somebody counts who stands between the two."""
    size = 300_001
    with listener() as far, Proxy(far.address, Conditions()) as between, link(between.address, chunk=chunk) as mine:
        mine.put(content(b"hello"), number=1)
        before = between.up + between.down
        counters = mine.put(content(BIG[:size]), number=2)
        chunks = -(-size // chunk)
        assert counters.acks == counters.chunks == chunks
        assert counters.wire == size + 40 * chunks + 16 * chunks
        assert between.up + between.down - before == counters.wire + counters.control
        assert counters.control < 700


def test_named_tensors_arrive_where_the_receiver_wants_them():
    given = {"w": torch.randn(300, 7), "b": torch.arange(5), "empty": torch.zeros(0, 3), "t": torch.randn(4, 6).t()}
    places = {}

    def memory(name, size):
        places[name] = torch.empty(size, dtype=torch.uint8)
        return places[name]

    with listener(memory=memory) as far, link(far.address, chunk=1000) as mine:
        mine.put(message(given, {"work": "train"}), round=2, number=3)
        arrival = far.get(5)
    found, about = arrival.tensors()
    assert arrival.name == Name(1, 2, 3) and about == {"work": "train"}
    assert arrival.memory.data_ptr() == places[arrival.name].data_ptr()
    assert found.keys() == given.keys() and all(torch.equal(found[n], given[n]) for n in given)


@pytest.mark.parametrize("way", ["inline", "shared"])
def test_what_is_offered_is_fetched(way):
    given = {"x": torch.randn(100_000)}
    with listener(chunk=1 << 16) as far, link(far.address, ways=(way, "inline")) as mine:
        far.offer(message(given), round=4)
        for _ in range(2):
            assert torch.equal(mine.get(round=4).tensors()[0]["x"], given["x"])
        far.withdraw(round=4)
        with pytest.raises(TransportError, match="stream 0 of round 4 is not offered"):
            mine.get(round=4)
        mine.put(content(b"and back"))
        assert far.get(5).memory.numpy().tobytes() == b"and back"


def test_two_rounds_in_flight_do_not_mix():
    with listener() as far:
        datas = [BIG[: 2_000_000 + n] for n in range(4)]

        def send(n):
            with link(far.address, chunk=10_000, ways=("shared",) if n % 2 else ("inline",)) as mine:
                mine.put(content(datas[n]), round=n // 2, number=n % 2)

        threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for _ in threads:
            arrival = far.get(20)
            assert arrival.memory.numpy().tobytes() == datas[2 * arrival.name.round + arrival.name.number]
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("at", [1, 130_000])
def test_after_a_cut_the_stream_goes_on(at):
    """Cut after so many bytes, and twice again after 50,000."""
    with (
        listener() as far,
        Proxy(far.address, Conditions(), cuts=[at, 50_000, 50_000]) as between,
        link(between.address, chunk=10_000, attempts=8) as mine,
    ):
        counters = mine.put(content(BIG[:300_000]))
        assert far.get(5).memory.numpy().tobytes() == BIG[:300_000]
        assert counters.connections + (at == 1) == 4  # a cut at the first byte is one in the handshake
        assert counters.resent <= 3 * 8


@pytest.mark.parametrize("drop", [False, True])
def test_chunks_that_are_damaged_or_lost_are_sent_again(drop):
    conditions = Conditions(loss=2e-5, drop=drop)
    with (
        listener() as far,
        Proxy(far.address, conditions, np.random.default_rng(1)) as between,
        link(between.address, chunk=10_000, pace=Pace(patience=1.0, least=0.01)) as mine,
    ):
        counters = mine.put(content(BIG[:500_000]))
        assert far.get(5).memory.numpy().tobytes() == BIG[:500_000]
        assert counters.resent > 0 and (drop or counters.damaged > 0)


def test_a_stream_in_pieces_takes_a_window_of_memory():
    """Cast on the way: W s bytes and a MiB at most, where casting first takes all N."""
    chunk, window, values = 1 << 19, 4, np.frombuffer(BIG, np.float32)[: 8 << 20]
    half = values.astype(np.float16)
    step = chunk // 2

    def pieces():
        for at in range(0, len(values), step):
            yield values[at : at + step].astype(np.float16).data

    with listener(memory=lambda name, size: torch.empty(size, dtype=torch.uint8)) as far:
        with link(far.address, chunk=chunk, window=window) as mine:
            mine.put(content(b"hello"), number=1)
            tracemalloc.start()
            mine.put(Source(half.nbytes, pieces), number=2)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        far.get(5)
        assert far.get(5).memory.numpy().tobytes() == half.tobytes()
    assert peak <= window * chunk + (1 << 20) < half.nbytes / 4


def test_a_stream_in_memory_takes_none():
    with listener() as far, link(far.address) as mine:
        mine.put(content(b"hello"), number=1)
        tracemalloc.start()
        mine.put(message({"x": torch.zeros(8 << 20)}), number=2)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_more_than_the_limit_is_refused_before_a_byte_of_it():
    with listener(limit=1000) as far, link(far.address, chunk=100) as mine:
        mine.put(content(bytes(600)), number=1)
        with pytest.raises(
            TransportError, match=r"refused: stream 2 of round 0 has 500 bytes; 1,000 are taken at a time, 600 of them"
        ):
            mine.put(content(bytes(500)), number=2)
        far.get(5)
        counters = mine.put(content(bytes(500)), number=2)
        assert counters.chunks == 5 and len(far.get(5).memory) == 500


def test_another_job_is_refused(caplog):
    refused = pytest.raises(TransportError, match="refused: job 2 is not that of this listener")
    with listener() as far, link(far.address, job=2) as mine, refused:
        mine.put(content(b"x"))
    assert any("refused 127.0.0.1" in r.getMessage() and "job 2" in r.getMessage() for r in caplog.records)


def test_a_stream_of_another_job_is_refused_on_an_open_door():
    with listener() as far:
        channel = dial(far.address)
        enter(channel, 1, TOKEN)
        channel.send(control(Name(2, 0, 0), "open", size=1, chunk=1, digest="sha256", window=1, ways=[]))
        assert channel.control().get("reason", str) == "job 2 is not received here"
        channel.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + bytes(40),
        bytes(range(100, 200)),
        control(Name(1, 0, 0), "login", nonce="00", proof="00"),
        control(Name(1, 0, 0), "login", nonce="00" * 32, proof="00" * 32),
        control(Name(1, 0, 0), "open", size=1),
        Frame(0, 0, Name(1, 0, 0), 0, 1, 5, 0).pack() + b"xxxxx",
        b"",
    ],
    ids=["http", "noise", "short proof", "wrong proof", "no proof", "chunk", "nothing"],
)
def test_strangers_are_refused_in_a_line_and_the_listener_goes_on(sent, caplog):
    caplog.set_level(logging.WARNING)
    with listener() as far:
        with suppress(OSError), socket.create_connection(far.address) as stranger:
            stranger.sendall(sent)  # more than anybody wants to hear
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(1000):
                pass
        with link(far.address) as mine:
            mine.put(content(b"x"))
        far.get(5)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("refused 127.0.0.1:") and "\n" not in lines[0]


@pytest.mark.parametrize("broken", ["window", "size", "chunk", "digest", "many"])
def test_streams_that_cannot_be_are_refused_and_the_door_stays_open(broken):
    right = {"size": 10, "chunk": 5, "digest": "sha256", "window": 2, "ways": []}
    wrong = {"window": 65, "size": -1, "chunk": 0, "digest": "md5", "many": 1}[broken]
    with listener() as far:
        channel = dial(far.address)
        enter(channel, 1, TOKEN)
        fields = {**right, "size": 1 << 40} if broken == "many" else {**right, broken: wrong}
        channel.send(control(Name(1, 0, 0), "open", **fields))
        assert channel.control().say == "refused"
        channel.send(control(Name(1, 0, 0), "open", **right))
        assert channel.control().say == "go"
        channel.close()


def opened(far, ways=()):
    """A connection that has announced a stream of 10 bytes in chunks of 5, and the answer."""
    channel = dial(far.address, patience=5.0)
    enter(channel, 1, TOKEN)
    channel.send(control(Name(1, 0, 0), "open", size=10, chunk=5, digest="sha256", window=2, ways=list(ways)))
    return channel, channel.control()


def frame(index=0, count=2, length=5, job=1, round=0, flags=0, slot=0):
    return Frame(flags, slot, Name(job, round, 0), index, count, length, 0).pack()


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"x" * 40, "not a chunk"),
        (frame()[:4] + b"\x02" + frame()[5:], "version 2 of the protocol; 1 is spoken"),
        (frame()[:5] + b"\x09" + frame()[6:], "flags 9 of a chunk are unknown"),
        (frame(index=2, count=3), "chunk 2 of 3 with 5 bytes; there are 2"),
        (frame(length=4), "chunk 0 of 2 with 4 bytes"),
        (frame(job=2), "a chunk of job 2"),
        (frame(round=7), "a chunk of job 1, stream 0 of round 7"),
        (frame(flags=2), "a chunk in shared memory, of which there is none"),
        (frame(flags=3), "a chunk by UCX, which is not used here"),
        (control(Name(1, 0, 0), "open"), "'open' of stream 0 of round 0 must not come now"),
        (control(Name(1, 0, 0), "done", digest="00"), "stream 0 of round 0 is done after 0 of 2 chunks"),
        (frame()[:17], "the connection was closed"),
        (frame() + b"xx", "the connection was closed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_peer_that_breaks_the_protocol_is_let_go(sent, said, caplog):
    caplog.set_level(logging.WARNING)
    with listener() as far:
        channel, go = opened(far)
        assert go.say == "go"
        channel.send(sent)
        channel._sock.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            channel.frame()  # nothing: the listener closes
        channel.close()
        with link(far.address, chunk=5) as mine:  # and the stream can be sent by somebody who does it right
            mine.put(content(b"0123456789"))
        assert far.get(5).memory.numpy().tobytes() == b"0123456789"
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("lost 127.0.0.1:") and said in lines[0]


def test_slots_that_are_not_there_are_not_read():
    with listener() as far:
        channel, go = opened(far, ["shared"])
        assert go.get("shared", dict)["chunk"] >= 5
        channel.send(frame(flags=2, slot=8))
        with pytest.raises(OSError, match=r"closed|reset"):
            channel.frame()
        channel.close()


def test_a_wrong_digest_is_void():
    with listener() as far:
        channel, _ = opened(far)
        plan = Plan(Name(1, 0, 0), 10, 5)
        for i in range(2):
            part = memoryview(b"abcde")
            channel.send(Frame(0, 0, plan.name, i, 2, 5, prepared(plan, i, [part]).crc).pack(), part)
        channel.send(control(plan.name, "done", digest="00" * 32))
        assert [channel.answer().bitmap, channel.answer().base] == [0, 2]
        assert channel.answer().say == "void"
        with pytest.raises(TransportError, match="no stream within"):
            far.get(0.01)
        channel.close()


@settings(max_examples=60)
@given(st.binary(max_size=120), st.booleans())
def test_whatever_a_peer_sends_the_listener_goes_on(noise, framed):
    with Listener(job=1, token=TOKEN, ways=["inline"]) as far:
        channel, _ = opened(far)
        with suppress(OSError):
            channel.send(frame() + noise if framed else noise)
        channel.abort()
        channel.close()
        with link(far.address, chunk=5) as mine:
            mine.put(content(b"0123456789"))
        assert far.get(5).memory.numpy().tobytes() == b"0123456789"


def test_another_digest_voids_everything_once():
    """A sender that goes on with a stream of other bytes: what the first has sent does not count."""
    with listener() as far, Proxy(far.address, Conditions(), cuts=[150_000]) as between:
        with link(between.address, chunk=10_000, attempts=1) as mine, pytest.raises(TransportError, match="given up after 1"):
            mine.put(content(BIG[:300_000]))
        other = BIG[300_000:600_000]
        with link(far.address, chunk=10_000) as mine:
            counters = mine.put(content(other))
        assert far.get(5).memory.numpy().tobytes() == other
        assert counters.chunks > 30 and counters.connections == 1


def test_a_stream_that_was_received_is_not_received_again():
    with listener() as far:
        for _ in range(2):
            with link(far.address, chunk=100) as mine:
                mine.put(content(b"x" * 1000))
        far.get(5)
        with pytest.raises(TransportError, match="no stream within"):
            far.get(0.01)
        with link(far.address, chunk=100) as mine:  # other bytes under its name are a stream of their own
            mine.put(content(b"y" * 1000))
        assert far.get(5).memory.numpy().tobytes() == b"y" * 1000


def test_a_source_that_fails_says_so_and_the_next_stream_goes_through():
    def broken():
        yield memoryview(b"abc")
        raise ValueError("the encoder broke")

    with listener() as far, link(far.address) as mine:
        with pytest.raises(ValueError, match="the encoder broke"):
            mine.put(Source(6, broken))
        for size in (2, 4):
            with pytest.raises(TransportError, match=f"the source gave 3 bytes and said {size}"):
                mine.put(Source(size, lambda: [memoryview(b"abc")]))
        mine.put(content(b"abc"))
        assert far.get(5).memory.numpy().tobytes() == b"abc"


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    with link(address) as mine, pytest.raises(TransportError, match="given up after 2 attempts"):
        mine.put(content(b"x"))
    with listener() as far, pytest.raises(TransportError, match="address: cannot listen at"):
        listener(address=far.address)


def test_a_listener_with_all_the_peers_it_takes_can_be_closed():
    far = listener(peers=1)
    with link(far.address) as mine:
        mine.put(content(b"x"))
        with socket.create_connection(far.address):  # and this one has to wait
            far.close()


def test_a_stream_that_is_given_up_makes_room():
    with listener(limit=300_000) as far, Proxy(far.address, Conditions(), cuts=[100_000]) as between:
        with link(between.address, chunk=10_000, attempts=1) as mine, pytest.raises(TransportError):
            mine.put(content(BIG[:300_000]), number=1)
        with link(far.address) as mine:
            with pytest.raises(TransportError, match="300,000 of them now"):
                mine.put(content(b"x"), number=2)
            far.forget(number=1)
            mine.put(content(b"x"), number=2)


def test_sockets_of_this_machine(tmp_path):
    path = str(tmp_path / "socket")
    with listener(address=path) as far, link(path, ways=("shared", "inline")) as mine:
        assert mine.put(content(BIG[:100_000])).wire == 40 + 16
        assert far.get(5).memory.numpy().tobytes() == BIG[:100_000]
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"token": b"short"}, "token: 5 bytes"),
        ({"ways": ["pigeon"]}, "ways: .*pigeon.*allowed: ucx, shared, inline"),
        ({"window": 65}, "window: 65; 1 to 64"),
        ({"window": 0}, "window: 0"),
    ],
)
def test_settings_that_cannot_be(settings, match):
    with pytest.raises(ConfigError, match=match):
        link(("127.0.0.1", 1), **settings)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a certificate for localhost that it signs itself."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    plain = serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.mark.parametrize("chunk", [1000, 1 << 20])
def test_tls(certificate, chunk):
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    client = ssl.create_default_context(cafile=str(certificate))
    with listener(tls=server) as far:
        with link(("localhost", far.address[1]), tls=client, chunk=chunk) as mine:
            mine.put(content(BIG[:300_001]))
            assert far.get(5).memory.numpy().tobytes() == BIG[:300_001]
            far.offer(content(BIG[:1000]), 1)
            assert mine.get(1).memory.numpy().tobytes() == BIG[:1000]
        distrusted = pytest.raises(TransportError, match="self-signed certificate")
        with link(("localhost", far.address[1]), tls=ssl.create_default_context()) as mine, distrusted:
            mine.put(content(b"x"))
        in_clear = pytest.raises(TransportError, match="given up")
        with link(far.address, patience=0.2) as mine, in_clear:
            mine.put(content(b"x"))


def test_a_message_that_is_no_message_is_an_error_of_its_reader():
    with listener() as far, link(far.address) as mine:
        mine.put(content(b"not tensors"))
        with pytest.raises(CodecError):
            far.get(5).tensors()


@pytest.fixture
def deaf(monkeypatch):
    """The first "taken" never gets out: the connection ends before it."""
    send, said = Channel.send, []

    def failing(self, *parts):
        if b'"taken"' in bytes(parts[0]) and not said:
            said.append(self)
            self.abort()
        send(self, *parts)

    monkeypatch.setattr(Channel, "send", failing)
    yield said


def test_a_stream_whose_sender_did_not_hear_that_it_was_taken_has_arrived(deaf):
    with listener() as far, link(far.address, chunk=100) as mine:
        mine.put(content(b"x" * 1000))
        assert deaf and far.get(1).memory.numpy().tobytes() == b"x" * 1000
        with pytest.raises(TransportError, match="no stream within"):
            far.get(0.01)


def test_a_stream_that_was_fetched_though_the_listener_did_not_hear_so(deaf):
    with listener() as far, link(far.address) as mine:
        far.offer(content(b"x" * 1000))
        for _ in range(2):
            assert mine.get().memory.numpy().tobytes() == b"x" * 1000
        assert deaf


@pytest.mark.parametrize("kind", [OSError, CodecError])
def test_a_source_that_fails_like_a_connection_is_not_tried_again(kind):
    tried = []

    def broken():
        tried.append(1)
        yield memoryview(b"abc")
        raise kind("the disk is gone")

    with listener() as far, link(far.address, chunk=1) as mine:
        with pytest.raises(TransportError, match="the source failed: the disk is gone"):
            mine.put(Source(6, broken))
        assert len(tried) == 1


def asked(far, *answer):
    """Ask for what the listener offers, and answer its "open"."""
    channel = dial(far.address, patience=5.0)
    enter(channel, 1, TOKEN)
    channel.send(control(Name(1, 0, 0), "want"))
    assert channel.control().say == "open"
    channel.send(*answer)
    with suppress(OSError):
        while True:
            channel.answer()
    channel.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([control(Name(1, 0, 0), "go", have="\xe9")], "what has arrived cannot be read"),
        ([control(Name(1, 0, 0), "go", have="-1")], "what has arrived"),
        ([control(Name(1, 0, 0), "go", have="fffff")], "what has arrived"),
        ([control(Name(1, 0, 0), "refused", reason="a\n" * 9 + "b" * 9000)], "refused: a a"),
        ([control(Name(1, 0, 0), "go", have="0"), Ack(0, 9, 0).pack()], "of 3 is acknowledged"),
    ],
)
def test_a_peer_that_fetches_and_breaks_the_protocol_is_let_go(answer, said, caplog):
    caplog.set_level(logging.WARNING)
    with listener(chunk=5) as far:
        far.offer(content(b"hello, you all."))
        asked(far, *answer)
        with link(far.address) as mine:
            assert mine.get().memory.numpy().tobytes() == b"hello, you all."
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("lost 127.0.0.1:") and said in lines[0]
    assert "\n" not in lines[0] and len(lines[0]) < 400


def test_a_source_that_fails_while_it_is_fetched_is_a_line_of_the_log(caplog):
    caplog.set_level(logging.WARNING)

    def broken():
        yield memoryview(b"abc")
        raise ValueError("the encoder broke")

    with listener() as far, link(far.address, attempts=1) as mine:
        far.offer(Source(6, broken))
        with pytest.raises(TransportError, match="given up after 1"):
            mine.get()
    assert any("lost 127.0.0.1" in r.getMessage() and "the encoder broke" in r.getMessage() for r in caplog.records)


def test_memory_that_is_not_there_is_a_refusal():
    with listener(limit=1 << 60) as far, link(far.address, chunk=1 << 30) as mine:
        with pytest.raises(TransportError, match="refused: stream 1 of round 0: there is no memory for its 1,125,899,906,842,624"):
            mine.put(Source(1 << 50, list), number=1)
        mine.put(content(b"x"), number=2)


def test_what_a_link_refuses_it_says_why():
    with listener() as far, link(far.address, limit=100) as mine:
        far.offer(content(bytes(101)), 3)
        with pytest.raises(TransportError, match="stream 0 of round 3 has 101 bytes; 100 are taken at a time"):
            mine.get(3)


def test_a_refusal_of_something_long_is_short(caplog):
    with listener() as far:
        channel = dial(far.address)
        enter(channel, 1, TOKEN)
        channel.send(control(Name(1, 0, 0), "open", size=1, chunk=1, digest="x" * 100_000, window=1, ways=[]))
        assert len(channel.control().get("reason", str)) < 200
        channel.close()
    assert max(len(r.getMessage()) for r in caplog.records) < 300


def test_a_listener_that_may_open_no_more_files_goes_on_when_it_may(caplog):
    caplog.set_level(logging.WARNING)
    before, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    with listener() as far:
        stranger = socket.socket()
        try:
            highest = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, before[1]))
            with suppress(OSError):
                while True:
                    taken.append(os.dup(stranger.fileno()))
            stranger.connect(far.address)
            for _ in range(500):
                if caplog.records:
                    break
                threading.Event().wait(0.01)
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            stranger.close()
        assert any("Too many open files" in r.getMessage() for r in caplog.records)
        with link(far.address, patience=5.0) as mine:
            mine.put(content(b"x"))


def test_a_stranger_who_dawdles_is_let_go():
    """One byte at a time, each well within the listener's patience."""
    let_go = pytest.raises(OSError, match=r"reset|pipe")
    with listener(patience=0.3) as far, socket.create_connection(far.address, 5) as stranger, let_go:
        for _ in range(38):
            stranger.sendall(b"\xf1")
            threading.Event().wait(0.05)


def test_who_waits_for_a_stream_hears_that_the_listener_was_closed():
    far, found = listener(), []

    def wait():
        try:
            far.get()
        except TransportError as error:
            found.append(str(error))

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    far.close()
    for thread in threads:
        thread.join(5)
    assert found == ["the listener is closed"] * 2


def test_a_window_that_cannot_be_is_said_where_it_is_set():
    for window in (0, 65):
        with pytest.raises(ConfigError, match=f"window: {window}; 1 to 64"):
            listener(window=window)


def test_cutting_a_connection_does_not_turn_its_tls_off(certificate):
    """Or what another thread sends in that moment would go in the clear."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    client = ssl.create_default_context(cafile=str(certificate))
    with listener(tls=server) as far:
        channel = dial(("localhost", far.address[1]), client)
        channel.abort()
        assert channel._sock.version() is not None
        with pytest.raises(OSError):
            channel.send(b"secret")
        channel.close()
