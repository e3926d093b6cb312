"""Momentum in local steps (Cheng, Huang, Wu, Yuan, ICLR 2024, arXiv 2306.16504), on the digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hanse.data.partition import dirichlet
from hanse.methods.fedavg import FedAvg
from hanse.methods.fedavg_m import FedAvg_M, FedAvg_M_VR
from hanse.methods.scaffold import Scaffold
from hanse.methods.scaffold_m import Scaffold_M, Scaffold_M_VR
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

ROUNDS, STEPS = 60, 10
RATES = (0.1, 0.3, 0.5, 0.7, 1.0)
SETTING = (
    f"Digits, MLP 64-64-10, Dirichlet(0.1) labels, {STEPS} local steps of 32 samples, {ROUNDS} rounds, means over 3 seeds"
    " (bands: lowest to highest). beta = 0.1 unless given, gamma = lr K. The local rate is the best of"
    f" {', '.join(map(str, RATES))} for FedAvg. Losses are over the training samples of all clients."
)


def draw(curves: dict[str, dict[str, Tensor]], sweeps: dict[str, dict[float, Tensor]]) -> Figure:
    """A panel of losses by rule for each title of ``curves``, and the last losses at all rates."""
    figure, (*others, right) = panels(12, 1, 1, 1)
    for ax, (title, by_rule) in zip(others, curves.items(), strict=True):
        for (label, losses), colour in zip(by_rule.items(), COLOURS, strict=False):
            band(ax, range(1, ROUNDS + 1), losses, colour, label)
        ax.set(title=title, xlabel="rounds", ylabel="training loss", yscale="log")
    for (label, sweep), colour in zip(sweeps.items(), COLOURS, strict=False):
        right.plot(RATES, [last_loss(sweep[rate]) for rate in RATES], "o-", color=colour, label=label)
    title = f"4 of 20 clients, after {ROUNDS} rounds"
    right.set(title=title, xlabel="local rate", ylabel="training loss", xscale="log", yscale="log")
    ticks(right, RATES)
    for ax in (*others, right):
        ax.legend(frameon=False)
    return figure


def reproduce() -> Findings:
    """Measure the claims; about one and a half minutes on one core."""
    every, some = digit_federations(10, dirichlet(0.1)), digit_federations(20, dirichlet(0.1))
    rows = []

    def measure(group: str, rule: FedAvg) -> Tensor:
        federations, cohort = (every, 10) if group == "10 of 10" else (some, 4)
        losses = scores(federations, rule, cohort, ROUNDS, train_loss)
        middle, last = losses[:, ROUNDS // 2 - 1].mean(), losses[:, -1].mean()
        rows.append([group, str(rule), f"{middle:.3f}", f"{last:.3f}"])
        return losses

    # The rate is tuned for FedAvg and used for all; the grid is also run for the SCAFFOLD kinds, to see what their own would be.
    full = {rate: measure("10 of 10", FedAvg(lr=rate, steps=STEPS)) for rate in RATES}
    eta_full = min(RATES, key=lambda rate: last_loss(full[rate]))
    momentum = measure("10 of 10", FedAvg_M(lr=eta_full, steps=STEPS))
    measure("10 of 10", FedAvg_M_VR(lr=eta_full, steps=STEPS))
    measure("10 of 10", FedAvg_M_VR(lr=eta_full, steps=STEPS, beta=0.8))
    kinds: tuple[type[FedAvg], ...] = (FedAvg, Scaffold, Scaffold_M)
    grid = {kind: {rate: measure("4 of 20", kind(lr=rate, steps=STEPS)) for rate in RATES} for kind in kinds}
    eta = {kind: min(RATES, key=lambda rate: last_loss(grid[kind][rate])) for kind in kinds}
    shared = eta[FedAvg]
    plain, ours = grid[Scaffold][shared], grid[Scaffold_M][shared]
    half = float(ours[:, ROUNDS // 2 - 1].mean())
    below = int((momentum.mean(0) < full[eta_full].mean(0)).sum())
    own, own_m = grid[Scaffold][eta[Scaffold]], grid[Scaffold_M][eta[Scaffold_M]]
    drift, shrunk, slower = (distance_to_optimum(rule, 10, 300) for rule in (
        FedAvg(lr=0.1, steps=10), FedAvg_M(lr=0.1, beta=0.1, steps=10), FedAvg(lr=0.01, steps=10)))  # fmt: skip
    ends = [distance_to_optimum(rule, 3, 400) for rule in (Scaffold_M(lr=0.1, steps=10), Scaffold_M_VR(lr=0.1, steps=10))]

    properties = [
        Property(
            "FedAvg-M, all of 10 clients",
            f"a lower training loss than FedAvg after {ROUNDS} rounds, at FedAvg's best rate",
            f"{last_loss(momentum):.3f} against {last_loss(full[eta_full]):.3f} at rate {eta_full}"
            f"; lower in {below} of {ROUNDS} rounds",
            last_loss(momentum) < last_loss(full[eta_full]),
        ),
        Property(
            "SCAFFOLD-M, 4 of 20 clients",
            f"a lower training loss after {ROUNDS // 2} rounds than SCAFFOLD after {ROUNDS}, at FedAvg's best rate",
            f"{half:.3f} against {last_loss(plain):.3f} at rate {shared}",
            half < last_loss(plain),
        ),
        Property(
            "SCAFFOLD-M, 4 of 20 clients, own rates",
            f"a lower training loss than SCAFFOLD after {ROUNDS} rounds, each at its own best rate",
            f"{last_loss(own_m):.3f} at {eta[Scaffold_M]} against {last_loss(own):.3f} at {eta[Scaffold]}"
            f"; after {ROUNDS // 2} rounds SCAFFOLD-M is at {own_m[:, ROUNDS // 2 - 1].mean():.3f}",
            last_loss(own_m) < last_loss(own),
        ),
        Property(
            "drift of FedAvg-M on quadratics",
            "the limit of FedAvg with the rate beta * lr: drift is scaled by about beta, not removed",
            f"{shrunk:.5f} from the optimum; FedAvg {drift:.5f} at lr, {slower:.5f} at beta * lr",
            abs(shrunk - slower) < 1e-6 and shrunk < drift / 5,
        ),
        Property(
            "SCAFFOLD-M and SCAFFOLD-M-VR on quadratics",
            "reach the optimum with 3 of 10 clients a round",
            f"{ends[0]:.0e} and {ends[1]:.0e} from it after 400 rounds",
            max(ends) < 1e-10,
        ),
    ]

    return Findings(
        "Momentum in the local steps of FedAvg and SCAFFOLD",
        SETTING,
        properties,
        ("clients", "rule", f"loss after {ROUNDS // 2}", f"loss after {ROUNDS}"),
        rows,
        draw(
            {
                f"all of 10 clients, rate {eta_full}": {"FedAvg": full[eta_full], "FedAvg-M": momentum},
                f"4 of 20 clients, rate {shared}": {"FedAvg": grid[FedAvg][shared], "SCAFFOLD": plain, "SCAFFOLD-M": ours},
            },
            dict(zip(("FedAvg", "SCAFFOLD", "SCAFFOLD-M"), grid.values(), strict=True)),
        ),
    )
