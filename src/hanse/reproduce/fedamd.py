"""FedAMD (Wu, Guo, Qu, He, Liu, Gao, ICML 2023, arXiv 2206.05891), on the digits."""

from __future__ import annotations

import torch
from torch import Tensor

from hanse.data.partition import shards
from hanse.methods.fedamd import FedAMD, anchor_probability
from hanse.methods.fedavg import FedAvg
from hanse.reproduce.base import Findings, Property, digit_federations, distance_to_optimum, scores, train_loss
from hanse.track.figures import COLOURS

CLIENTS, COHORT, ROUNDS, LAST, TARGET = 20, 5, 150, 20, 0.3
STEPS, BATCH = 10, 16
PLAIN_RATES, ANCHORED_RATES = (0.1, 0.3, 0.5, 0.7), (0.02, 0.03, 0.05, 0.07, 0.1)


def reached(losses: Tensor) -> Tensor:
    """The round in which each run's loss first is at most the target, ``[seeds]``; one more than there are where it never is."""
    there = torch.cat([losses <= TARGET, torch.ones(len(losses), 1, dtype=torch.bool)], 1)
    return there.int().argmax(1) + 1


def needed(losses: Tensor) -> float:
    """Mean over seeds of ``reached``; too few where a run never gets there."""
    return float(reached(losses).double().mean())


def final(losses: Tensor) -> float:
    """Mean over seeds of the loss after the last round; infinite if a run diverged."""
    return float(losses[:, -1].nan_to_num(torch.inf).mean())


def variance(losses: Tensor) -> float:
    """Variance of the loss over the last rounds, mean over seeds."""
    return float(losses[:, -LAST:].var(1).mean())


def rounds(losses: Tensor) -> str:
    """``needed``, as text."""
    return f"{'over ' if int(reached(losses).max()) > ROUNDS else ''}{needed(losses):.0f}"


def reproduce() -> Findings:
    """Measure the claims; about two minutes on one core."""
    from matplotlib.figure import Figure

    federations = digit_federations(CLIENTS, shards(2))
    rows = []

    def measure(rule: FedAvg) -> Tensor:
        losses = scores(federations, rule, COHORT, ROUNDS, train_loss)
        by_seed = " ".join(str(n) if n <= ROUNDS else "-" for n in reached(losses).tolist())
        rows.append([str(rule), by_seed, f"{final(losses):.3f}", f"{variance(losses):.1e}"])
        return losses

    def fedavg(lr: float) -> Tensor:
        return measure(FedAvg(lr=lr, steps=STEPS, batch=BATCH, weights="uniform"))

    def fedamd(lr: float, p: float = 0.2, period: int | None = None) -> Tensor:
        return measure(FedAMD(lr=lr, steps=STEPS, batch=BATCH, p=p, period=period))

    closed = round(anchor_probability(CLIENTS, COHORT), 3)
    sweeps = {
        "FedAvg": {lr: fedavg(lr) for lr in PLAIN_RATES},
        "p = 0.2": {lr: fedamd(lr) for lr in ANCHORED_RATES},
        f"p = {closed}": {lr: fedamd(lr, closed) for lr in ANCHORED_RATES},
        "sequential": {lr: fedamd(lr, period=5) for lr in ANCHORED_RATES},
        "p = 0": {lr: fedamd(lr, 0) for lr in ANCHORED_RATES},
    }
    # Every rule at its own rate: the one that needs fewest rounds to the target, and of those that never get there the lowest loss.
    eta = {name: min(sweep, key=lambda lr: (needed(sweep[lr]), final(sweep[lr]))) for name, sweep in sweeps.items()}
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
            f"loss {final(never):.2f}, {final(ours):.2f}, {final(sequential):.2f}",
            needed(never) > max(needed(ours), needed(sequential)) and final(never) > max(final(ours), final(sequential)),
        ),
        Property(
            "quadratics",
            "goes to the optimum with 3 of 10 clients a round, where FedAvg with all of them stops short of it",
            f"{ends[0]:.0e} from it after 150 rounds; FedAvg {ends[1]:.2f}",
            ends[0] < 1e-5 and ends[1] > 1e-2,
        ),
    ]

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, losses), colour in zip(best.items(), COLOURS, strict=False):
        left.plot(range(1, ROUNDS + 1), losses.mean(0), color=colour)
        left.fill_between(range(1, ROUNDS + 1), losses.min(0).values, losses.max(0).values, color=colour, alpha=0.18, lw=0)
        label = name if name == "FedAvg" else f"FedAMD, {name}"
        right.plot(list(sweeps[name]), [needed(found) for found in sweeps[name].values()], "o-", color=colour, label=label)
    left.axhline(TARGET, color="grey", lw=0.8, ls=":")
    left.set(title="each at its own best rate", xlabel="rounds", ylabel="training loss", yscale="log")
    right.axhline(ROUNDS + 1, color="grey", lw=0.8, ls=":")
    right.set(title=f"{ROUNDS + 1}: never", xlabel="local rate", ylabel=f"rounds to a loss of {TARGET}", xscale="log")
    rates = sorted({*ANCHORED_RATES, *PLAIN_RATES})
    right.set_xticks(rates, [str(rate) for rate in rates])
    right.set_xticks([], minor=True)
    right.legend(frameon=False)

    return Findings(
        "FedAMD against FedAvg",
        f"Digits, MLP 64-64-10, {CLIENTS} clients with 2 shards of sorted labels each, {COHORT} a round, {ROUNDS} rounds of {STEPS}"
        f" local steps of {BATCH} samples, anchors with all of theirs, means over 3 seeds (bands: lowest to highest). Losses are"
        f" over the training samples of all clients. Each rule has its own best rate: FedAvg of {', '.join(map(str, PLAIN_RATES))},"
        f" each kind of FedAMD of {', '.join(map(str, ANCHORED_RATES))}. A run that never gets to {TARGET} counts as {ROUNDS + 1}"
        f" rounds. p = {closed} is the closed form of the authors' EMNIST script; sequential: only anchors in every fifth round.",
        properties,
        ("rule", f"rounds to {TARGET}, by seed", "final loss", f"variance of the last {LAST}"),
        rows,
        figure,
    )
