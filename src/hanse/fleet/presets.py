"""Fleets with a name: ``devices`` with other defaults.

All figures are round ones, meant for comparing rules on one fleet rather than for predicting a product's speed. Measured ones are
published for links by M-Lab and by Ookla's Speedtest Global Index, and for processors by Geekbench and, for phones, AI Benchmark;
what training reaches is a fraction of a processor's peak.
"""

from __future__ import annotations

from hanse.fleet.distributions import Amount, FiniteAmount, PositiveAmount, constant, lognormal, mixture
from hanse.fleet.profiles import devices


class phones(devices):
    """Slow and fast phones, half of each, on mobile links; round figures for sustained single-precision training."""

    gflops: PositiveAmount = mixture(parts=(lognormal(2, 0.4), lognormal(10, 0.4)), shares=(0.5, 0.5))
    """Training speed of the whole phone, 1e9 floating-point operations per second."""
    memory: Amount = lognormal(4, 0.4)
    """Memory that training may take, GB."""
    down: PositiveAmount = lognormal(20, 0.4)
    """From the server, Mbit/s."""
    up: PositiveAmount = lognormal(5, 0.4)
    """To the server, Mbit/s."""
    latency: FiniteAmount = constant(0.05)
    """Seconds for a message one way."""


class laptops(devices):
    """Laptops of four and eight cores, without an accelerator, on home links; round figures."""

    gflops: PositiveAmount = lognormal(20, 0.3)
    """Training speed of a core, 1e9 floating-point operations per second."""
    cores: PositiveAmount = mixture(parts=(4, 8), shares=(0.5, 0.5))
    """Cores that work at it."""
    memory: Amount = mixture(parts=(8, 16), shares=(0.5, 0.5))
    """Memory, GB."""
    down: PositiveAmount = lognormal(100, 0.5)
    """From the server, Mbit/s."""
    up: PositiveAmount = lognormal(20, 0.5)
    """To the server, Mbit/s."""
    latency: FiniteAmount = constant(0.02)
    """Seconds for a message one way."""


class silos(devices):
    """Institutions with a server and one accelerator each, on leased lines; round figures."""

    gflops: PositiveAmount = lognormal(10_000, 0.2)
    """Training speed of the accelerator, 1e9 floating-point operations per second."""
    memory: Amount = constant(40)
    """Memory of the accelerator, GB."""
    down: PositiveAmount = lognormal(1000, 0.3)
    """From the server, Mbit/s."""
    up: PositiveAmount = lognormal(1000, 0.3)
    """To the server, Mbit/s."""
    latency: FiniteAmount = constant(0.01)
    """Seconds for a message one way."""
