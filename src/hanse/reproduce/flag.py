"""The Flag Aggregator (Almasi, Mishra, Vamanan, Ravi, ICLR 2024, arXiv 2302.05865), on Gaussian gradients and the digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hanse.aggregators import (
    Aggregator,
    bulyan,
    flag,
    geometric_median,
    krum,
    meamed,
    mean,
    median,
    multi_krum,
    phocas,
    trimmed_mean,
)
from hanse.attacks import Attack
from hanse.core.streams import Streams
from hanse.data.partition import iid
from hanse.data.tasks import digits
from hanse.federation import Federation
from hanse.methods.fedavg import FedAvg
from hanse.reproduce.base import SEEDS, Findings, Property, panels, test_accuracy, ticks, watch
from hanse.schedules.synchronous import synchronous
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P, F, N = 15, 3, 2000
NOISE = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Length of an honest gradient's noise, in lengths of the mean."""
RULES: dict[str, Aggregator] = {
    "mean": mean(),
    "normalised mean": flag(m=P),
    "Flag": flag(),
    "Flag, m = 1": flag(m=1),
    "median": median(),
    "trimmed mean": trimmed_mean(F),
    "MeaMed": meamed(F),
    "Phocas": phocas(F),
    "Krum": krum(F),
    "Multi-Krum": multi_krum(F),
    "geometric median": geometric_median(),
    "Bulyan": bulyan(F),
}
ATTACKS = {
    "none": "sign_flip(share=0)",
    "sign flip x 10": "sign_flip(scale=10, share=0.2)",
    "random": "random(distribution='uniform', share=0.2)",
    "drop": "drop(rate=0.1, share=0.2)",
    "ALIE": "alie(share=0.2)",
    "IPM 0.1": "ipm(eps=0.1, share=0.2)",
    "IPM 5": "ipm(eps=5, share=0.2)",
    "label flip": "label_flip(share=0.2)",
}
ROUNDS = 30
SETTING = (
    f"Gaussian: {P} gradients of {N:,} numbers, {F} of them bad, the others a common mean with noise of so many of its lengths;"
    " cosine of the aggregate with that mean, means over 10 draws. Bad ones are random of 10 times the length, or reversed and 10"
    f" times as long. Digits: MLP 64-64-10, {P} IID clients who all take part, {F} of them liars, {ROUNDS} rounds of one epoch"
    " of 32 samples, lr 0.2, accuracy after the last round, means over 3 seeds. Normalised mean: Flag with m = p."
)


def gradients(noise: float, bad: str, draw: int) -> tuple[Tensor, Tensor]:
    """The mean ``[N]``, and ``[P, N]`` gradients of which the last ``F`` are bad, float64."""
    normal = Streams(0).normal("gradients", torch.arange(P + 1), draw, N)
    mu = normal[0] / normal[0].norm()
    rows = mu + noise * normal[1:] / N**0.5
    other = Streams(0).normal("bad", torch.arange(F), draw, N)
    rows[-F:] = (
        -10 * rows[-F:] if bad == "reversed" else 10 * rows[-F:].norm(dim=1, keepdim=True) * other / other.norm(dim=1)[:, None]
    )
    return mu, rows


def cosine(rule: Callable[[Tensor], Tensor], noise: float, bad: str) -> float:
    """Of the aggregate with the mean of the honest distribution; mean over ten draws."""
    found = []
    for draw in range(10):
        mu, rows = gradients(noise, bad, draw)
        d = rule(rows)
        found.append(float(d @ mu / d.norm().clamp_min(1e-12)))
    return sum(found) / len(found)


def accuracy(rule: Aggregator, attack: str) -> float:
    """On the digits after the last round, mean over seeds."""
    last: list[float] = []
    for seed in SEEDS:
        watch(
            Federation(digits(), P, iid(), seed=seed),
            FedAvg(lr=0.2, weights="uniform", aggregate=rule),
            synchronous(P),
            lambda net: last.append(test_accuracy(net)) if net.round == ROUNDS else None,
            ROUNDS,
            chunk=P,
            attack=Attack.parse(attack),
        )
    return float(torch.tensor(last).mean())


def draw(curves: dict[str, dict[str, list[float]]], scores: dict[str, dict[str, float]]) -> Figure:
    """Cosines against noise under the two attacks, and the worst accuracy of each rule."""
    figure, (left, middle, right) = panels(14, 1, 1, 1, height=5)
    shown = ("mean", "normalised mean", "Flag", "Flag, m = 1", "median", "Multi-Krum", "geometric median", "Bulyan")
    for ax, bad in ((left, "random"), (middle, "reversed")):
        for colour, name in zip(COLOURS, shown, strict=False):
            ax.plot(NOISE, curves[bad][name], "o-", color=colour, label=name)
        ax.set(xscale="log", xlabel="noise / mean", title=f"{F} of {P} {bad}, 10 times as long", ylim=(-1.05, 1.05))
        ticks(ax, NOISE)
    left.set_ylabel("cosine with the mean")
    worst = {name: min(v for attack, v in found.items() if attack != "none") for name, found in scores.items()}
    right.barh([*worst], [*worst.values()], color=[COLOURS[0] if "Flag" in n else "#8c8c8c" for n in worst])
    right.invert_yaxis()
    right.set(xlabel="accuracy on the digits under the worst attack", xlim=(0, 1))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4)
    return figure


def reproduce() -> Findings:
    """Measure the claims; about a minute on one core."""
    curves = {bad: {name: [cosine(rule, s, bad) for s in NOISE] for name, rule in RULES.items()} for bad in ("random", "reversed")}
    scores = {name: {attack: accuracy(rule, text) for attack, text in ATTACKS.items()} for name, rule in RULES.items()}
    one = NOISE.index(1.0)
    behind = {attack: scores["normalised mean"][attack] - scores["Flag"][attack] for attack in ATTACKS}
    most = max(behind, key=lambda attack: behind[attack])
    at = {bad: {name: found[name][one] for name in found} for bad, found in curves.items()}
    properties = [
        Property(
            "random gradients",
            "at noise 1 with 3 random gradients of 10 times the length the cosine of Flag with the mean is above 0.93",
            ", ".join(f"{n} {at['random'][n]:.3f}" for n in ("mean", "normalised mean", "Flag", "Flag, m = 1")),
            at["random"]["Flag"] > 0.93,
        ),
        Property(
            "reversed gradients",
            "at noise 1 with 3 gradients reversed and 10 times as long the mean points backwards, and Flag is above 0.93",
            ", ".join(f"{n} {at['reversed'][n]:.3f}" for n in ("mean", "normalised mean", "Flag", "Flag, m = 1")),
            at["reversed"]["mean"] < 0 and at["reversed"]["Flag"] > 0.93,
        ),
        Property(
            "digits",
            "under every attack Flag is at most 2 points below the mean of normalised updates",
            f"at most {100 * behind[most]:.1f} points below ({most})",
            behind[most] <= 0.02,
        ),
    ]
    rows = [
        [name, f"{at['random'][name]:.3f}", f"{at['reversed'][name]:.3f}", *(f"{v:.3f}" for v in scores[name].values())]
        for name in RULES
    ]
    return Findings(
        "The Flag Aggregator among robust rules",
        SETTING,
        properties,
        ("rule", "cosine, random", "cosine, reversed", *ATTACKS),
        rows,
        draw(curves, scores),
    )
