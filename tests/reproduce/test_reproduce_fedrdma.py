"""How the findings are drawn from times. The times themselves are measured by ``hanse reproduce fedrdma``."""

import pytest

from hanse.reproduce import fedrdma
from hanse.reproduce.fedrdma import KIB, LOSS, RTT, SIZE, Cast, Way, in_turns, reproduce, seconds
from hanse.transport.timing import best_chunk

COST = 1e-4


@pytest.fixture
def as_the_model_says(monkeypatch):
    """Streams take as long as the model says, unless ``but`` says otherwise; a cast is hidden by the link."""
    but = {}
    monkeypatch.setattr(fedrdma, "chunk_cost", lambda: COST)
    monkeypatch.setattr(fedrdma, "seconds", lambda way, seed=0: but.get(way, way.expected(COST)))
    monkeypatch.setattr(fedrdma, "cast", lambda: Cast(1.0, 2.0, 1.1))
    return but


def test_under_the_model_everything_holds(as_the_model_says):
    findings = reproduce()
    assert findings.hold, [p for p in findings.properties if not p.holds]
    assert len({tuple(row[:4]) for row in findings.rows}) == len(findings.rows)


@pytest.mark.parametrize(
    ("name", "way", "takes"),
    [
        ("window", Way(128 * KIB, 1), 0.4),
        ("repair", Way(SIZE, 1, loss=1e-7), 0.1),
        ("best chunk", Way(1 << 20, 32, loss=LOSS), 0.01),
        ("model", Way(64 * KIB, 1), 2.5),
        ("model with losses", Way(64 * KIB, 32, loss=LOSS), 0.3),
        ("without losses", Way(256 * KIB, 8), 0.19),
    ],
)
def test_what_does_not_hold_is_said(as_the_model_says, name, way, takes):
    as_the_model_says[way] = takes
    failed = {p.name for p in reproduce().properties if not p.holds}
    assert name in failed and failed <= {name, "model", "model with losses"}


def test_a_slow_cast_is_said(as_the_model_says, monkeypatch):
    monkeypatch.setattr(fedrdma, "cast", lambda: Cast(1.0, 2.0, 1.7))
    assert [p.name for p in reproduce().properties if not p.holds] == ["overlap"]


def test_one_shot_is_one_chunk_and_no_loss_is_no_repeat():
    assert Way(SIZE, 1).expected(0.0) == pytest.approx(3 * RTT + SIZE / 40e6)
    assert Way(SIZE, 1).expected(0.0) == pytest.approx(Way(SIZE - 1, 2, size=SIZE - 1).expected(0.0), rel=1e-3)
    assert 8 * KIB < best_chunk(40e6, LOSS, COST) < 1 << 20


def test_ways_take_turns(monkeypatch):
    asked = []
    monkeypatch.setattr(fedrdma, "seconds", lambda way, seed=0: asked.append((way.chunk, seed)) or seed)
    assert in_turns([Way(1, 1), Way(2, 1)], 3, max) == {Way(1, 1): 2, Way(2, 1): 2}
    assert asked == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (2, 2)]


def test_a_stream_is_really_sent():
    assert seconds(Way(8 * KIB, 8, rtt=0.002, loss=1e-5, size=64 * KIB)) >= 3 * 0.002
