"""FedRDMA (Zhang, Cai, Zhang, Xu, Wang, Zhou, 2024, arXiv 2403.00881): chunks over a long link, and one message."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hanse.core.streams import Streams
from hanse.reproduce.base import Findings, Property, panels, ticks
from hanse.track.figures import COLOURS
from hanse.transport.peers import Link, Listener
from hanse.transport.proxy import Conditions, Proxy
from hanse.transport.sources import Source, content
from hanse.transport.stream import Pace
from hanse.transport.timing import best_chunk, fills, one_shot, repaired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIB, MIB = 1 << 10, 1 << 20
SIZE, BANDWIDTH, RTT = 4 * MIB, 40e6, 0.02
CHUNK, WINDOW = 256 * KIB, 8
TURNS, SEEDS = 5, 8
SMALL, WIDE = 64 * KIB, 32
"""Chunk and window under losses."""
CHUNKS = (64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB)
LATENCIES = (0.005, 0.01, 0.02, 0.04, 0.08)
LOSSES = (1e-7, 3e-7, 6e-7)
SWEPT = (8 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB)
LOSS = 1e-6
"""Of the sweep for the best chunk."""
VALUES = 4 << 20
Array = np.ndarray[Any, np.dtype[Any]]
TOKEN = b"a token for nobody outside of here"
SETTING = (
    f"Streams of {SIZE // MIB} MiB between two ends on one machine, through a proxy: {BANDWIDTH / 1e6:.0f} MB/s, RTT"
    f" {1000 * RTT:.0f} ms, chunks damaged with probability 1 - (1 - q)^s. Times are from a stream's first message to its last,"
    " so two exchanges of control messages (2 RTT) are in them, and in the model. s: bytes of a chunk; W: chunks in flight; one"
    f" shot: s = N. Without losses medians of {TURNS} turns, with them means over {SEEDS} seeds; what is compared was run in turns."
    " h, the cost of a chunk, was measured with chunks of 1 KiB and no delay. The cast rounds 16 MiB of float32 to one of the two"
    " nearest float16 by chance; its link has the bandwidth that makes the sending of 8 MiB take as long."
)


class Way(NamedTuple):
    """A link, and how a stream is cut for it."""

    chunk: int
    window: int
    rtt: float = RTT
    loss: float = 0.0
    size: int = SIZE
    bandwidth: float = BANDWIDTH

    def expected(self, cost: float) -> float:
        """Seconds by the model, with the two exchanges beside the chunks; ``cost`` is h."""
        if self.chunk >= self.size:
            return 2 * self.rtt + one_shot(self.size, self.bandwidth, self.rtt, self.loss, self.rtt, cost)
        return 2 * self.rtt + repaired(self.size, self.chunk, self.bandwidth, self.rtt, self.window, self.loss, cost)


def seconds(way: Way, seed: int = 0, source: Source | None = None) -> float:
    """One stream, on a connection that is there already."""
    source = source or content(bytes(way.size))
    conditions = Conditions(way.rtt, way.bandwidth, way.loss)
    generator = Streams(seed).numpy("fedrdma")
    patient = Pace(patience=60.0, least=60.0)  # every harmed chunk is answered, so no timer is needed
    with (
        Listener(job=1, token=TOKEN) as listener,
        Proxy(listener.address, conditions, generator) as proxy,
        Link(
            proxy.address, job=1, token=TOKEN, chunk=way.chunk, window=way.window, tries=10**6, ways=("inline",), pace=patient
        ) as link,
    ):
        link.put(content(b""), number=1)
        began = time.perf_counter()
        link.put(source, number=2)
        return time.perf_counter() - began


def in_turns(ways: Sequence[Way], turns: int, middle: Callable[[list[float]], float], first: int = 0) -> dict[Way, float]:
    """Each of ``ways`` once a turn, and what their times have in the middle; the seed is that of the turn."""
    times: dict[Way, list[float]] = {way: [] for way in ways}
    for turn in range(turns):
        for way, found in times.items():
            found.append(seconds(way, first + turn))
    return {way: middle(found) for way, found in times.items()}


def chunk_cost() -> float:
    """h: what a chunk takes beside its bytes, here, in seconds."""
    way = Way(KIB, 64, 0.0, size=MIB, bandwidth=1e9)
    return max(1e-6, median(seconds(way) for _ in range(TURNS)) / (way.size // way.chunk) - way.chunk / way.bandwidth)


class Cast(NamedTuple):
    """Seconds to cast alone, to cast and then send, and to cast while sending, over a link that takes as long as the cast."""

    alone: float
    after: float
    while_sending: float


def rounded(values: Array, generator: np.random.Generator) -> Array:
    """float16 whose means are the float32 ``values``: one of the two neighbours each, by chance."""
    near = values.astype(np.float16)
    off = values - near
    other = np.nextafter(near, np.where(off > 0, np.float16(np.inf), np.float16(-np.inf)))
    gap = np.abs(other.astype(np.float32) - near)
    return np.where(generator.random(len(values), dtype=np.float32) * gap < np.abs(off), other, near)


def cast() -> Cast:
    """Random rounding of 16 MiB to 8; medians."""
    values, size = np.linspace(-1, 1, VALUES, dtype=np.float32), 2 * VALUES

    def pieces(step: int) -> Iterator[memoryview]:
        generator = Streams(0).numpy("rounding")
        for at in range(0, VALUES, step):
            yield rounded(values[at : at + step], generator).data

    def alone() -> float:
        began = time.perf_counter()
        for _ in pieces(VALUES):
            pass
        return time.perf_counter() - began

    takes = median(alone() for _ in range(TURNS))
    whole, piped = (Way(chunk, WINDOW, 0.001, size=size, bandwidth=size / takes) for chunk in (size, CHUNK))
    times = [
        [seconds(way, 0, Source(size, lambda step=way.chunk // 2: pieces(step))) for way in (whole, piped)]  # type: ignore[misc]
        for _ in range(TURNS)
    ]
    return Cast(takes, median(t for t, _ in times), median(t for _, t in times))


def draw(found: dict[Way, float], cost: float) -> Figure:
    """Times against the chunk, and speed-ups over one message against latency and loss, beside the model's curves."""
    figure, (left, middle, right) = panels(13, 1.2, 1, 1)
    for colour, (label, ways) in zip(
        COLOURS,
        {
            "W = 1": [Way(s, 1) for s in CHUNKS],
            f"W = {WINDOW}": [Way(s, WINDOW) for s in CHUNKS],
            f"W = {WIDE}, q = {LOSS:g}": [Way(s, WIDE, loss=LOSS) for s in SWEPT],
        }.items(),
        strict=False,
    ):
        x = [way.chunk / KIB for way in ways]
        left.plot(x, [way.expected(cost) for way in ways], color=colour, lw=1)
        left.plot(x, [found[way] for way in ways], "o", color=colour, label=label)
    left.axvline(best_chunk(BANDWIDTH, LOSS, cost) / KIB, color=COLOURS[2], ls=":", lw=1)
    left.set(xscale="log", yscale="log", xlabel="chunk (KiB); dotted: the model's best", ylabel="seconds for 4 MiB")

    def speed_up(of: Way) -> tuple[float, float]:
        shot = of._replace(chunk=SIZE, window=1)
        return found[shot] / found[of], shot.expected(cost) / of.expected(cost)

    for ax, label, colour, x, ways in (
        (middle, f"W = {WINDOW}, 256 KiB", COLOURS[1], [1000 * r for r in LATENCIES], [Way(CHUNK, WINDOW, r) for r in LATENCIES]),
        (middle, "W = 1, 256 KiB", COLOURS[0], [1000 * r for r in LATENCIES], [Way(CHUNK, 1, r) for r in LATENCIES]),
        (right, f"W = {WIDE}, 64 KiB", COLOURS[2], [1e7 * q for q in LOSSES], [Way(SMALL, WIDE, loss=q) for q in LOSSES]),
    ):
        measured, model = zip(*map(speed_up, ways), strict=True)
        ax.plot(x, model, color=colour, lw=1)
        ax.plot(x, measured, "o", color=colour, label=label)
        ax.axhline(1, color="#6b6b6b", lw=0.8)
    middle.set(xlabel="RTT (ms), no losses", ylabel="times as fast as one shot", ylim=(0, None))
    right.set(xlabel="losses per 10 MB (q / 1e-7), RTT 20 ms", ylabel="times as fast as one shot", yscale="log")
    ticks(left, (8, 32, 128, 512, 2048))
    for ax, at in ((left, (0.2, 0.5, 1)), (right, (1, 2, 5, 10))):
        ax.set_yticks(at, [str(y) for y in at])
        ax.set_yticks([], minor=True)
    for ax in (left, middle, right):
        ax.legend(frameon=False)
    return figure


def reproduce() -> Findings:
    """Measure the claims; about two minutes."""
    cost = chunk_cost()
    clean = [Way(s, w) for s in CHUNKS for w in (1, WINDOW)]
    clean += [Way(s, w, rtt) for rtt in LATENCIES for s, w in ((CHUNK, WINDOW), (CHUNK, 1), (SIZE, 1))]
    lossy = [Way(s, w, loss=q) for q in LOSSES for s, w in ((SMALL, WIDE), (SIZE, 1))]
    swept = [Way(s, WIDE, loss=LOSS) for s in SWEPT]
    found = in_turns(list(dict.fromkeys(clean)), TURNS, median) | in_turns(lossy + swept, SEEDS, fmean)
    both = cast()

    gains = {s: found[Way(s, 1)] / found[Way(s, WINDOW)] for s in CHUNKS if fills(s, BANDWIDTH, RTT, WINDOW)}
    repairs = {q: (found[Way(SIZE, 1, loss=q)], found[Way(SMALL, WIDE, loss=q)]) for q in LOSSES}
    best, star = min(swept, key=found.__getitem__).chunk, best_chunk(BANDWIDTH, LOSS, cost)
    off = {way: found[way] / way.expected(cost) - 1 for way in found}
    worst, worst_lossy = (max((off[w] for w in ways), key=abs) for ways in (clean, lossy + swept))
    shot = found[Way(SIZE, 1)]
    properties = [
        Property(
            "window",
            f"with W = {WINDOW} at least 3 times as fast as with W = 1, at the smallest chunk with W s >= B RTT",
            ", ".join(f"{s // KIB} KiB: {gain:.1f} times" for s, gain in gains.items()),
            gains[min(gains)] >= 3,
        ),
        Property(
            "repair",
            "repairing chunks is faster than repairing whole messages at every q > 0",
            ", ".join(f"q = {q:g}: {chunked:.2f} s against {whole:.2f} s" for q, (whole, chunked) in repairs.items()),
            all(chunked < whole for whole, chunked in repairs.values()),
        ),
        Property(
            "best chunk",
            f"at q = {LOSS:g} the best chunk of a sweep is within a factor 4 of the model's",
            f"{best / KIB:.0f} KiB against {star / KIB:.0f} KiB, with h = {1000 * cost:.2f} ms",
            star / 4 <= best <= 4 * star,
        ),
        Property(
            "overlap",
            "casting to float16 while sending takes at most 0.8 of casting, then sending, where both take as long",
            f"{both.while_sending / both.after:.2f}: {both.while_sending:.3f} s against {both.after:.3f} s, the cast alone"
            f" {both.alone:.3f} s",
            both.while_sending <= 0.8 * both.after,
        ),
        Property(
            "model",
            "without losses every time is within 25 % of the model's",
            f"{100 * worst:+.0f} % at most",
            abs(worst) <= 0.25,
        ),
        Property(
            "model with losses",
            f"with losses every mean over {SEEDS} seeds is within 50 % of the model's",
            f"{100 * worst_lossy:+.0f} % at most",
            abs(worst_lossy) <= 0.5,
        ),
        Property(
            "without losses",
            "chunks are no slower than one message where the window is full, and nothing is cast or lost",
            f"{found[Way(CHUNK, WINDOW)]:.3f} s against {shot:.3f} s",
            found[Way(CHUNK, WINDOW)] <= 1.05 * shot,
        ),
    ]
    rows = [
        [
            "one shot" if way.chunk == way.size else f"{way.chunk // KIB} KiB",
            str(way.window),
            f"{1000 * way.rtt:.0f}",
            f"{way.loss:g}",
            f"{found[way]:.3f}",
            f"{way.expected(cost):.3f}",
            f"{100 * off[way]:+.0f} %",
        ]
        for way in found
    ]
    return Findings(
        "Chunks over a long link",
        SETTING,
        properties,
        ("chunk", "W", "RTT (ms)", "q", "seconds", "by the model", "off"),
        rows,
        draw(found, cost),
    )
