"""How long a stream takes, by the model of chunked transport: N bytes in chunks of s over a link of B bytes a second.

Symbols: h is the fixed cost of a chunk in seconds (header, acknowledgement, interpreter), RTT the time there and back, q the
probability that a byte is lost or damaged, so that a chunk survives with (1 - q)^s, near exp(-q s). A shorter last chunk counts as
a whole one.
"""

from __future__ import annotations

import math


def fills(chunk: float, bandwidth: float, rtt: float, window: int) -> bool:
    """Whether the window covers the bandwidth-delay product: W s >= B RTT."""
    return window * chunk >= bandwidth * rtt


def survives(chunk: float, loss: float) -> float:
    """The probability (1 - q)^s that a chunk arrives undamaged."""
    return math.exp(chunk * math.log1p(-loss))


def repaired(size: float, chunk: float, bandwidth: float, rtt: float, window: int, loss: float = 0.0, cost: float = 0.0) -> float:
    """Expected seconds with at most ``window`` in flight, where a lost chunk is sent again.

    RTT + C max(h + s/B, (h + RTT + s/B) / W) with C = ceil(N / s) / (1 - q)^s, and never more than one at a time takes,
    C (h + RTT + s / B). Losses are found at no cost in time, which holds while other chunks are in flight.
    """
    own = cost + min(chunk, size) / bandwidth
    sent = math.ceil(size / chunk) / survives(min(chunk, size), loss)
    return min(rtt + sent * max(own, (own + rtt) / window), sent * (own + rtt))


def one_shot(size: float, bandwidth: float, rtt: float, loss: float = 0.0, timeout: float = 0.0, cost: float = 0.0) -> float:
    """Expected seconds where the whole message is one chunk: every failure costs ``timeout`` seconds, then all is sent again."""
    arrives = survives(size, loss)
    return (cost + rtt + size / bandwidth) + (1 / arrives - 1) * (cost + size / bandwidth + timeout)


def best_chunk(bandwidth: float, loss: float, cost: float) -> float:
    """s* = (B/2) (sqrt(h^2 + 4 h / (q B)) - h), where f(s) = (h/s + 1/B) exp(q s) is least, the time per byte on a full
    link with repair of chunks; infinite without loss."""
    if loss <= 0:
        return math.inf
    # The same without the difference of two near numbers that a small h would leave.
    return 2 * cost / loss / (math.sqrt(cost * cost + 4 * cost / (loss * bandwidth)) + cost) if cost > 0 else 0.0
