"""The model of times, against its own limits and against streams in virtual time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.transport.frames import Name
from hanse.transport.stream import Pace, Plan, Receiver, Sender, cut, prepared, verified
from hanse.transport.timing import best_chunk, fills, one_shot, repaired, survives

positive = st.floats(1e-3, 1e6)


def in_virtual_time(size, chunk, bandwidth, rtt, window, loss=0.0, seed=0):
    """Seconds that a Sender and a Receiver take over a pipe of this bandwidth and delay, in which chunks are damaged."""
    plan, data = Plan(Name(1, 2, 3), size, chunk, "crc32"), bytes(size)
    chunks = [prepared(plan, i, parts) for i, parts in enumerate(cut([memoryview(data)], chunk))]
    sender, receiver = Sender(plan, window, Pace(1e9), 10**9), Receiver(plan, memoryview(bytearray(size)))
    generator, made, free, now = np.random.default_rng(seed), 0, 0.0, 0.0
    events: list[tuple[float, int, object]] = []
    while not sender.over:
        while made < plan.count and len(sender.held) < window:
            sender.hold(chunks[made])
            made += 1
        while todo := sender.next(now):
            free = max(free, now) + todo[0].length / bandwidth
            events.append((free + rtt, len(events), todo))
        now, _, (frame, parts) = events.pop(0)
        place = receiver.place(frame)
        place[:] = b"".join(parts)
        good = generator.random() < survives(frame.length, loss)
        sender.acknowledged(receiver.settle(frame, verified(plan, frame, place) if good else None), now)
    return now


@pytest.mark.parametrize("window", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("chunk", [100, 1000, 7000])
def test_the_state_machines_take_the_time_of_the_model(window, chunk):
    size, bandwidth, rtt = 100_000, 1e6, 0.02
    took = in_virtual_time(size, chunk, bandwidth, rtt, window)
    assert took == pytest.approx(repaired(size, chunk, bandwidth, rtt, window), rel=0.12)
    if window == 1:
        assert took == pytest.approx(rtt * -(-size // chunk) + size / bandwidth)


def test_with_losses_too():
    size, chunk, bandwidth, rtt, loss = 400_000, 1000, 1e6, 0.005, 1e-4
    took = [in_virtual_time(size, chunk, bandwidth, rtt, 8, loss, seed) for seed in range(10)]
    assert np.mean(took) == pytest.approx(repaired(size, chunk, bandwidth, rtt, 8, loss), rel=0.05)


@given(positive, positive, positive, positive, positive, st.integers(1, 64))
def test_a_window_is_never_slower_and_one_is_stop_and_wait(size, chunk, bandwidth, rtt, cost, window):
    alone = repaired(size, chunk, bandwidth, rtt, 1, cost=cost)
    assert alone == pytest.approx(math.ceil(size / chunk) * (cost + rtt + min(chunk, size) / bandwidth))
    assert repaired(size, chunk, bandwidth, rtt, window, cost=cost) <= alone


def test_a_full_window_runs_at_the_rate_of_the_link():
    assert fills(1 << 18, 1e8, 0.02, 8) and not fills(1 << 17, 1e8, 0.02, 8)
    assert repaired(1e9, 1 << 20, 1e8, 0.02, 8) == pytest.approx(10.02, rel=1e-3)


@given(st.floats(1e3, 1e10), st.floats(1e-12, 1e-3), st.floats(1e-7, 1.0))
def test_no_chunk_is_better_than_the_best(bandwidth, loss, cost):
    def seconds_per_byte(chunk):
        return (cost / chunk + 1 / bandwidth) * math.exp(loss * chunk)

    best = best_chunk(bandwidth, loss, cost)
    assert all(seconds_per_byte(best) <= seconds_per_byte(best * f) * (1 + 1e-9) for f in (0.5, 0.9, 1.1, 2))


def test_the_best_chunk_by_its_formula():
    bandwidth, loss, cost = 1e8, 1e-7, 1e-3
    formula = bandwidth / 2 * (math.sqrt(cost**2 + 4 * cost / (loss * bandwidth)) - cost)
    assert best_chunk(bandwidth, loss, cost) == pytest.approx(formula)
    assert best_chunk(bandwidth, 1e-14, cost) == pytest.approx(math.sqrt(cost * bandwidth / 1e-14), rel=0.01)
    assert best_chunk(bandwidth, 0.0, cost) == math.inf


def test_one_shot_repeats_everything():
    assert one_shot(1e8, 1e8, 0.02) == pytest.approx(1.02)
    assert survives(1e8, 1e-8) == pytest.approx(math.exp(-1), rel=1e-6)
    assert one_shot(1e8, 1e8, 0.02, 1e-8, timeout=0.5) == pytest.approx(1.02 + (math.e - 1) * 1.5, rel=1e-6)
