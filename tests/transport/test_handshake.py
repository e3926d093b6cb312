import re
import socket
import threading

import pytest

from hanse.core.errors import CodecError, ConfigError, TransportError
from hanse.transport.frames import Name, control
from hanse.transport.handshake import admit, enter, token_bytes
from hanse.transport.tcp import Channel

TOKEN = b"a token for tests, of 32 bytes.."


class Recorded(Channel):
    """Remembers what was sent."""

    def send(self, *parts):
        self.said = getattr(self, "said", b"") + b"".join(bytes(p) for p in parts)
        super().send(*parts)


@pytest.fixture
def pair():
    ends = [Recorded(end, patience=5.0) for end in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


def meet(pair, dialer, listener):
    """What ``enter`` and ``admit`` end with, given job and token each."""
    ends = {}

    def run(name, work, channel, job, token):
        try:
            work(channel, job, token)
            ends[name] = None
        except (TransportError, CodecError, OSError) as error:
            ends[name] = str(error)
            channel.abort()

    threads = [
        threading.Thread(target=run, args=("dialer", enter, pair[0], *dialer)),
        threading.Thread(target=run, args=("listener", admit, pair[1], *listener)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_who_knows_the_token_comes_in_and_nobody_hears_it(pair):
    assert meet(pair, (7, TOKEN), (7, TOKEN)) == {"dialer": None, "listener": None}
    heard = pair[0].said + pair[1].said
    assert TOKEN not in heard and TOKEN.hex().encode() not in heard


def test_every_meeting_is_another_one(pair):
    meet(pair, (7, TOKEN), (7, TOKEN))
    again = [Recorded(end) for end in socket.socketpair()]
    meet(again, (7, TOKEN), (7, TOKEN))
    values = [re.findall(rb'"([0-9a-f]{64})"', end.said) for end in (*pair, *again)]
    assert len({v for found in values for v in found}) == sum(map(len, values)) == 8
    for end in again:
        end.close()


def test_who_does_not_know_it_does_not(pair):
    assert meet(pair, (7, b"x" * 32), (7, TOKEN)) == {"dialer": "refused: wrong token", "listener": "wrong token"}


def test_another_job_stays_outside_and_only_who_knows_the_token_hears_that(pair):
    found = meet(pair, (8, TOKEN), (7, TOKEN))
    assert found["listener"] == "job 8 is not that of this listener"
    assert found["dialer"] == "refused: job 8 is not that of this listener"


def test_a_proof_cannot_be_mirrored(pair):
    """A listener that knows no token and sends the dialer's own values back is found out."""
    dialer, impostor = pair
    found = {}

    def run():
        with pytest.raises(TransportError) as error:
            enter(dialer, 7, TOKEN)
        found["error"] = str(error.value)

    thread = threading.Thread(target=run)
    thread.start()
    impostor.send(control(Name(7, 0, 0), "hello", nonce="11" * 32))
    login = impostor.control()
    impostor.send(control(Name(7, 0, 0), "welcome", proof=login.get("proof", str)))
    thread.join()
    assert found["error"] == "the listener does not know the token"


@pytest.mark.parametrize("field", ["nonce", "proof"])
@pytest.mark.parametrize("value", ["zz" * 32, "00" * 31, "00" * 2000, 5])
def test_other_values_are_refused(pair, field, value):
    dialer, listener = pair
    dialer.send(control(Name(7, 0, 0), "login", **{"nonce": "00" * 32, "proof": "00" * 32, field: value}))
    with pytest.raises(CodecError):
        admit(listener, 7, TOKEN)


def test_tokens_are_secrets():
    assert token_bytes("a secret of words") == b"a secret of words"
    with pytest.raises(ConfigError, match="token: 3 bytes; a secret has at least 16"):
        token_bytes("abc")
