"""FRL (Mozaffari, Shejwalkar, Houmansadr, arXiv 2110.04350) among liars, on the digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hanse.attacks import Attack, sign_flip
from hanse.core.errors import DivergedError
from hanse.core.optim import exponential
from hanse.data.partition import dirichlet
from hanse.data.tasks import digits
from hanse.engines.local import local
from hanse.experiment import run
from hanse.federation import Federation
from hanse.methods.base import Method
from hanse.methods.fedavg import FedAvg
from hanse.methods.frl import FRL
from hanse.reproduce.base import SEEDS, Findings, Property, band, by_seed, panels
from hanse.schedules.synchronous import synchronous
from hanse.track.figures import COLOURS, DASHES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS, ROUNDS, LAST, EPOCHS, BATCH, WIDTH, WIDE = 20, 25, 5, 2, 8, 128, 512
LIARS = (0, 4, 8)
RATES = {"FRL": (0.2, 0.4), "FedAvg": (0.3, 0.5)}  # 0.1 and 0.8 are worse for FRL, 0.1 and 1.0 for FedAvg
OURS, CODE, SIGNED, PLAIN, KRUM, TRIMMED = "FRL", "FRL, reference", "FRL, signed", "FedAvg", "Multi-Krum", "trimmed mean"
KEYS = {OURS: "abs", CODE: "reference", SIGNED: "signed"}
NAMES = (OURS, CODE, SIGNED, PLAIN, KRUM, TRIMMED)
SETTING = (
    f"Digits, MLP 64-{WIDTH}-10, {CLIENTS} clients (Dirichlet, alpha = 1), all of them in each of {ROUNDS} rounds of {EPOCHS} local"
    f" epochs with batches of {BATCH}, 3 seeds (bands: lowest to highest). FRL: k = 0.5, momentum 0.9, weight decay 1e-4, and no"
    " biases. Its liars train, and all send the reverse of the ranking that their votes make together (the paper's attack). The"
    " others are FedAvg with the mean, Multi-Krum and the trimmed mean, the latter two made for as many liars as there are, or for"
    f" {LIARS[1]}; liars send -5 times their update. FRL and FedAvg each at its own better rate without liars: FRL of 0.2 and 0.4"
    " (0.1 and 0.8 are worse), FedAvg, whose rate is also that of the robust means, of 0.3 and 0.5 (0.1 and 1.0 are worse)."
    f" Accuracy is that on the test set of 360 pictures, mean over the last {LAST} rounds, of a run that diverged 0; points are"
    " of 100."
)


@dataclass(frozen=True)
class Runs:
    """The same run with every seed: test accuracy ``[seeds, rounds]``, and the bytes of a client's message."""

    accuracy: Tensor
    message: float

    @property
    def final(self) -> Tensor:
        """Accuracy over the last rounds ``[seeds]``."""
        return self.accuracy[:, -LAST:].mean(1)

    @property
    def mean(self) -> float:
        return float(self.final.mean())


def rule(name: str, rate: float, liars: int) -> Method:
    """The rule called ``name``; what withstands liars is told how many there are, or 4."""
    if name in KEYS:
        return FRL(epochs=EPOCHS, batch=BATCH, lr=exponential(rate, 0.999), key=KEYS[name])
    f = liars or LIARS[1]
    means = {PLAIN: "mean", KRUM: f"multi_krum({f})", TRIMMED: f"trimmed_mean({f})"}
    return FedAvg(epochs=EPOCHS, batch=BATCH, lr=rate, aggregate=means[name])


def measure(name: str, rate: float, liars: int = 0, width: int = WIDTH) -> Runs:
    """A rule among so many liars."""
    attack: Attack | None = None
    if liars:
        share = liars / CLIENTS
        attack = sign_flip(share=share, together=True) if name in KEYS else sign_flip(share=share, scale=5)
    # A fixed arrangement, so that the numbers do not depend on what a machine finds fastest.
    engine, schedule = local(path="stacked", chunk=CLIENTS, workers=1, threads=1), synchronous(cohort=CLIENTS)
    found, sent = torch.zeros(len(SEEDS), ROUNDS, dtype=torch.float64), 0
    for seed, row in zip(SEEDS, found, strict=True):
        federation = Federation(digits(hidden=width), clients=CLIENTS, partition=dirichlet(1.0), seed=seed)
        try:
            history = run(federation, rule(name, rate, liars), schedule, rounds=ROUNDS, engine=engine, attack=attack).history
        except DivergedError:
            continue
        row[:] = torch.tensor([record["metrics"]["accuracy"] for record in history], dtype=torch.float64)
        sent = history[-1]["bytes_up"]
    return Runs(found, sent / (ROUNDS * CLIENTS))


def tuned(name: str, width: int = WIDTH) -> tuple[float, Runs]:
    """The better rate of a rule without liars, and what it gives."""
    return max(((rate, measure(name, rate, width=width)) for rate in RATES[name]), key=lambda found: found[1].mean)


def draw(found: dict[tuple[str, int], Runs]) -> Figure:
    """Accuracy as rounds pass with the fewer liars, and for two of the rules without any; in the end, over the number of liars."""
    figure, (left, right) = panels(11, 1.3, 1, height=4.6)
    colours, rounds = dict(zip(NAMES, COLOURS, strict=False)), torch.arange(1, ROUNDS + 1)
    for name in (OURS, PLAIN, KRUM, TRIMMED):
        band(left, rounds, found[name, LIARS[1]].accuracy, colours[name], name)
        if name in (OURS, PLAIN):
            left.plot(rounds, found[name, 0].accuracy.mean(0), DASHES[1], color=colours[name], label=f"{name}, no liars")
    left.set(title=f"{LIARS[1]} of {CLIENTS} lie", xlabel="rounds", ylabel="test accuracy", ylim=(0, 1))
    left.legend(frameon=False)
    for name in NAMES:
        right.plot(LIARS, [found[name, liars].mean for liars in LIARS], "o-", color=colours[name], label=name)
    right.set(title=f"last {LAST} rounds", xlabel=f"liars among {CLIENTS} clients", ylabel="test accuracy", ylim=(0, 1))
    right.set_xticks(LIARS)
    right.legend(frameon=False)
    return figure


def reproduce() -> Findings:
    """Measure the claims; about four minutes on one core."""
    (ours_rate, ours), (plain_rate, plain) = tuned(OURS), tuned(PLAIN)
    rates = {name: ours_rate if name in KEYS else plain_rate for name in NAMES}
    known = {(OURS, 0): ours, (PLAIN, 0): plain}
    found = known | {
        (name, liars): measure(name, rates[name], liars) for name in NAMES for liars in LIARS if (name, liars) not in known
    }
    (wide_rate, wide), (wide_plain_rate, wide_plain) = tuned(OURS, WIDE), tuned(PLAIN, WIDE)
    few, many = LIARS[1:]

    def lost(name: str, liars: int) -> float:
        return 100 * (found[name, 0].mean - found[name, liars].mean)

    def losses(liars: int) -> Property:
        share = f"{100 * liars // CLIENTS} % liars"
        told = ", ".join(f"{name} {lost(name, liars):.1f}" for name in (OURS, KRUM, TRIMMED)) + " points"
        least = lost(OURS, liars) < min(lost(KRUM, liars), lost(TRIMMED, liars))
        return Property(f"robust means, {share}", "Multi-Krum and the trimmed mean lose more than FRL", told, least)

    def near(one: Runs, other: Runs) -> tuple[str, bool]:
        behind = 100 * (other.mean - one.mean)
        return f"{one.mean:.3f} against {other.mean:.3f}: {behind:.2f} points", behind <= 5

    properties = [
        Property("no liars", "within 5 points of FedAvg", *near(ours, plain)),
        Property(f"no liars, {WIDE} hidden units", "within 5 points of FedAvg", *near(wide, wide_plain)),
        Property(
            "20 % liars",
            "FRL keeps more than 0.85 of its accuracy",
            f"{found[OURS, few].mean:.3f}, which is {found[OURS, few].mean / ours.mean:.3f} of {ours.mean:.3f}",
            found[OURS, few].mean > 0.85 * ours.mean,
        ),
        Property(
            "20 % liars, FedAvg",
            "falls below 0.4",
            f"{found[PLAIN, few].mean:.3f}",
            found[PLAIN, few].mean < 0.4,
        ),
        losses(few),
        losses(many),
        Property(
            "bytes",
            "what a client sends is less than with FedAvg",
            f"{ours.message:.0f} against {plain.message:.0f} bytes: {plain.message / ours.message:.1f} times fewer",
            ours.message < plain.message,
        ),
    ]

    def row(name: str, rate: float, liars: int, runs: Runs) -> Sequence[str]:
        return [name, str(rate), str(liars), by_seed(runs.final.tolist()), f"{runs.mean:.3f}", f"{runs.message:.0f}"]

    rows = [row(name, rates[name], liars, found[name, liars]) for name in NAMES for liars in LIARS]
    rows.append(row(f"{OURS}, {WIDE} hidden units", wide_rate, 0, wide))
    rows.append(row(f"{PLAIN}, {WIDE} hidden units", wide_plain_rate, 0, wide_plain))
    columns = ("rule", "rate", "liars", "accuracy, by seed", "mean", "bytes of a message")
    return Findings("FRL among liars", SETTING, properties, columns, rows, draw(found))
