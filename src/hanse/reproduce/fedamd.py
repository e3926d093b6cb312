"""FedAMD (Wu, Guo, Qu, He, Liu, Gao, ICML 2023, arXiv 2206.05891), on the digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hanse.data.partition import shards
from hanse.methods.fedamd import FedAMD, anchor_probability
from hanse.methods.fedavg import FedAvg
from hanse.reproduce.base import (
    Findings,
    Property,
    band,
    digit_federations,
    distance_to_optimum,
    last_loss,
    panels,
    scores,
    ticks,
    train_loss,
)
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIENTS, COHORT, ROUNDS, LAST, TARGET = 20, 5, 150, 20, 0.3
STEPS, BATCH = 10, 16
PLAIN_RATES, ANCHORED_RATES = (0.1, 0.3, 0.5, 0.7), (0.02, 0.03, 0.05, 0.07, 0.1)
CLOSED = round(anchor_probability(CLIENTS, COHORT), 3)
SETTING = (
    f"Digits, MLP 64-64-10, {CLIENTS} clients with 2 shards of sorted labels each, {COHORT} a round, {ROUNDS} rounds of {STEPS}"
    f" local steps of {BATCH} samples, anchors with all of theirs, means over 3 seeds (bands: lowest to highest). Losses are"
    f" over the training samples of all clients. Each rule has its own best rate: FedAvg of {', '.join(map(str, PLAIN_RATES))},"
    f" each kind of FedAMD of {', '.join(map(str, ANCHORED_RATES))}. A run that never gets to {TARGET} counts as {ROUNDS + 1}"
    f" rounds. p = {CLOSED} is the closed form of the authors' EMNIST script; sequential: only anchors in every fifth round."
)


def reached(losses: Tensor) -> Tensor:
    """The round in which each run's loss first is at most the target, ``[seeds]``; one more than there are where it never is."""
    there = torch.cat([losses <= TARGET, torch.ones(len(losses), 1, dtype=torch.bool)], 1)
    return there.int().argmax(1) + 1


def needed(losses: Tensor) -> float:
    """Mean over seeds of ``reached``; too few where a run never gets there."""
    return float(reached(losses).double().mean())


def variance(losses: Tensor) -> float:
    """Variance of the loss over the last rounds, mean over seeds."""
    return float(losses[:, -LAST:].var(1).mean())


def rounds(losses: Tensor) -> str:
    """``needed``, as text."""
    return f"{'over ' if int(reached(losses).max()) > ROUNDS else ''}{needed(losses):.0f}"


def draw(best: dict[str, Tensor], sweeps: dict[str, dict[float, Tensor]]) -> Figure:
    """The losses of each rule at its best rate, and the rounds to the target at all rates."""
    figure, (left, right) = panels(10, 1, 1, height=4.5)
    for (name, losses), colour in zip(best.items(), COLOURS, strict=False):
        label = name if name == "FedAvg" else f"FedAMD, {name}"
        band(left, range(1, ROUNDS + 1), losses, colour, label)
        right.plot(list(sweeps[name]), [needed(found) for found in sweeps[name].values()], "o-", color=colour)
    left.axhline(TARGET, color="grey", lw=0.8, ls=":")
    left.set(title="each at its own best rate", xlabel="rounds", ylabel="training loss", yscale="log")
    right.axhline(ROUNDS + 1, color="grey", lw=0.8, ls=":")
    right.set(title=f"{ROUNDS + 1}: never", xlabel="local rate", ylabel=f"rounds to a loss of {TARGET}", xscale="log")
    ticks(right, sorted({*ANCHORED_RATES, *PLAIN_RATES}))
    figure.legend(frameon=False, loc="outside lower center", ncols=len(best))
    return figure


def reproduce() -> Findings:
    """Measure the claims; about two minutes on one core."""
    federations = digit_federations(CLIENTS, shards(2))
    rows = []

    def measure(rule: FedAvg) -> Tensor:
        losses = scores(federations, rule, COHORT, ROUNDS, train_loss)
        by_seed = " ".join(str(n) if n <= ROUNDS else "-" for n in reached(losses).tolist())
        rows.append([str(rule), by_seed, f"{last_loss(losses):.3f}", f"{variance(losses):.1e}"])
        return losses

    def fedavg(lr: float) -> Tensor:
        return measure(FedAvg(lr=lr, steps=STEPS, batch=BATCH, weights="uniform"))

    def fedamd(lr: float, p: float = 0.2, period: int | None = None) -> Tensor:
        return measure(FedAMD(lr=lr, steps=STEPS, batch=BATCH, p=p, period=period))

    sweeps = {
        "FedAvg": {lr: fedavg(lr) for lr in PLAIN_RATES},
        "p = 0.2": {lr: fedamd(lr) for lr in ANCHORED_RATES},
        f"p = {CLOSED}": {lr: fedamd(lr, CLOSED) for lr in ANCHORED_RATES},
        "sequential": {lr: fedamd(lr, period=5) for lr in ANCHORED_RATES},
        "p = 0": {lr: fedamd(lr, 0) for lr in ANCHORED_RATES},
    }
    # Every rule at its own rate: the one that needs fewest rounds to the target, and of those that never get there the lowest loss.
    eta = {name: min(sweep, key=lambda lr: (needed(sweep[lr]), last_loss(sweep[lr]))) for name, sweep in sweeps.items()}
    best = {name: sweep[eta[name]] for name, sweep in sweeps.items()}
    plain, ours, sequential, never = (best[name] for name in ("FedAvg", "p = 0.2", "sequential", "p = 0"))
    alike = fedavg(eta["p = 0.2"])
    ends = [
        distance_to_optimum(FedAMD(lr=0.05, steps=3, p=0.6), 3, 150),
        distance_to_optimum(FedAvg(lr=0.05, steps=3), 10, 150),
    ]

    properties = [
        Property(
            "rounds",
            f"with p = 0.2 no more rounds to a training loss of {TARGET} than FedAvg, each at its own best rate",
            f"{rounds(ours)} at {eta['p = 0.2']} against {rounds(plain)} at {eta['FedAvg']}",
            needed(ours) <= needed(plain),
        ),
        Property(
            "rounds, at one rate",
            f"the same at FedAMD's best rate, {eta['p = 0.2']}",
            f"{rounds(ours)} against {rounds(alike)}",
            needed(ours) <= needed(alike),
        ),
        Property(
            "variance",
            f"with p = 0.2 a lower variance of the loss over the last {LAST} rounds than FedAvg, each at its own best rate",
            f"{variance(ours):.1e} against {variance(plain):.1e}",
            variance(ours) < variance(plain),
        ),
        Property(
            "p = 0 is the worst",
            "without anchors more rounds and a higher final loss than with p = 0.2 and with anchors alone in every fifth round",
            f"rounds {rounds(never)}, {rounds(ours)}, {rounds(sequential)}; "
            f"loss {last_loss(never):.2f}, {last_loss(ours):.2f}, {last_loss(sequential):.2f}",
            needed(never) > max(needed(ours), needed(sequential))
            and last_loss(never) > max(last_loss(ours), last_loss(sequential)),
        ),
        Property(
            "quadratics",
            "goes to the optimum with 3 of 10 clients a round, where FedAvg with all of them stops short of it",
            f"{ends[0]:.0e} from it after 150 rounds; FedAvg {ends[1]:.2f}",
            ends[0] < 1e-5 and ends[1] > 1e-2,
        ),
    ]

    return Findings(
        "FedAMD against FedAvg",
        SETTING,
        properties,
        ("rule", f"rounds to {TARGET}, by seed", "final loss", f"variance of the last {LAST}"),
        rows,
        draw(best, sweeps),
    )
