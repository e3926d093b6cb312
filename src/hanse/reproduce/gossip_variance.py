"""Vanishing variance in gossip, and its correction (Tian, Al-Ars, Kitsak, Hofstee, 2024, arXiv 2404.04616), on the digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hanse.aggregators.merging import Merge, average, variance_corrected, variances
from hanse.data.tasks import digits
from hanse.engines.simulation import Simulation
from hanse.experiment import per_node
from hanse.federation import Federation
from hanse.methods.fedavg import FedAvg
from hanse.reproduce.base import SEEDS, Findings, Property, band, by_seed, panels, watch
from hanse.schedules.async_gossip import async_gossip
from hanse.schedules.gossip import gossip
from hanse.schedules.network import Schedule
from hanse.topologies import ring
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES, ROUNDS, WIDTH, BETA = 16, 60, 96, 0.5
XAVIER = 2 / (WIDTH + WIDTH)
"""Variance of a hidden layer's initial weights."""
TASK = digits(hidden=WIDTH, depth=3, activation="tanh")
RULE = FedAvg(lr=0.05, steps=2, batch=16)
SETTING = (
    f"Digits dealt out at random to {NODES} nodes on a ring lattice of degree 8; MLP 64-{WIDTH}-{WIDTH}-{WIDTH}-10 with tanh and"
    f" Xavier's initial weights; {RULE.steps} local steps of {RULE.batch} samples at rate {RULE.lr} a round, {ROUNDS} rounds, own"
    f" weight beta = {BETA}; means over {len(SEEDS)} seeds (bands: lowest to highest). Accuracy is the mean over the nodes' own"
    " models on the test set of 360 pictures. Variance is that of the two hidden layers' weights, the mean over layers and nodes;"
    f" at first it is {XAVIER:.4f}. Asynchronous: every node trains every 8 to 12 seconds and averages when it has received eight"
    " models; a round is 16 trainings, and models are looked at before they are averaged."
)
Start = Literal["same", "own"]


def rounds(merge: Merge, start: Start) -> Schedule:
    """Gossip in rounds."""
    return gossip(topology=ring(8), own=BETA, merge=merge, start=start)


def no_rounds(merge: Merge, start: Start) -> Schedule:
    """Gossip in which every node keeps its own time."""
    return async_gossip(topology=ring(8), own=BETA, merge=merge, start=start)


PLAIN, CORRECTED = "own starts, plain", "own starts, corrected"
COMMON, COMMON_CORRECTED = "common start, plain", "common start, corrected"
ASYNC, ASYNC_CORRECTED = "asynchronous, own starts, plain", "asynchronous, own starts, corrected"
ARMS: dict[str, Schedule] = {
    PLAIN: rounds(average(), "own"),
    CORRECTED: rounds(variance_corrected(), "own"),
    COMMON: rounds(average(), "same"),
    COMMON_CORRECTED: rounds(variance_corrected(), "same"),
    ASYNC: no_rounds(average(), "own"),
    ASYNC_CORRECTED: no_rounds(variance_corrected(), "own"),
}


def hidden_variance(net: Simulation) -> float:
    """Variance of the weights of a hidden layer, mean over both layers and all nodes."""
    views = net.problem.shared_layout.views(net.state["x"])
    return float(torch.stack([variances(t) for t in views.values() if t.shape[1:] == (WIDTH, WIDTH)]).mean())


def curves(schedule: Schedule) -> Tensor:
    """The nodes' mean accuracy and their hidden variance after every round, float64 ``[seeds, ROUNDS, 2]``."""
    found = torch.zeros(len(SEEDS), ROUNDS, 2, dtype=torch.float64)
    for row, seed in zip(found, SEEDS, strict=True):

        def look(net: Simulation, row: Tensor = row) -> None:
            row[net.round - 1] = torch.tensor([per_node(net)["accuracy"].mean(), hidden_variance(net)])

        watch(Federation(TASK, NODES, seed=seed), RULE, schedule, look, ROUNDS, chunk=NODES)
    return found


def draw(found: dict[str, Tensor]) -> Figure:
    """Accuracy and hidden variance by rounds."""
    figure, (left, right) = panels(10, 1, 1, height=4.4)
    at = range(1, ROUNDS + 1)
    for (name, runs), colour in zip(found.items(), COLOURS, strict=False):
        band(left, at, runs[..., 0], colour, name)
        band(right, at, runs[..., 1], colour, "_")
        if name == COMMON_CORRECTED:  # it lies on the curve without
            for line in (left.lines[-1], right.lines[-1]):
                line.set_linestyle("--")
    right.axhline(XAVIER, color="0.5", lw=0.8, ls="--")
    right.axhline(XAVIER / NODES, color="0.5", lw=0.8, ls=":")
    left.set(xlabel="rounds", ylabel="accuracy of the nodes' models", ylim=(0, 1))
    right.set(title="dashed: Xavier's; dotted: a 16th of it", xlabel="rounds", ylabel="variance of hidden weights", yscale="log")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


def reproduce() -> Findings:
    """Measure the claims; about one and a half minutes on one core."""
    found = {name: curves(schedule) for name, schedule in ARMS.items()}
    accuracy = {name: float(runs[:, -1, 0].mean()) for name, runs in found.items()}
    variance = {name: float(runs[:, -1, 1].mean()) for name, runs in found.items()}
    rows = [
        [
            name,
            f"{float(runs[:, 19, 0].mean()):.3f}",
            f"{accuracy[name]:.3f}",
            by_seed(runs[:, -1, 0].tolist()),
            f"{variance[name]:.5f}",
        ]
        for name, runs in found.items()
    ]
    properties = [
        Property(
            "from own starts",
            "the correction makes the nodes' models more accurate by at least 0.3",
            f"{accuracy[CORRECTED]:.3f} against {accuracy[PLAIN]:.3f}",
            accuracy[CORRECTED] >= accuracy[PLAIN] + 0.3,
        ),
        Property(
            "own starts or a common one",
            "with the correction own starts end within 0.03 of plain gossip from a common start",
            f"{accuracy[CORRECTED]:.3f} against {accuracy[COMMON]:.3f}",
            accuracy[CORRECTED] >= accuracy[COMMON] - 0.03,
        ),
        Property(
            "from a common start",
            "the correction changes the accuracy by less than 0.01",
            f"{accuracy[COMMON_CORRECTED]:.3f} against {accuracy[COMMON]:.3f}",
            abs(accuracy[COMMON_CORRECTED] - accuracy[COMMON]) < 0.01,
        ),
        Property(
            "variance of hidden weights",
            f"falls to a {NODES}th of Xavier's without the correction, and stays with it (each within a fifth)",
            f"{variance[PLAIN]:.5f} of {XAVIER / NODES:.5f}, and {variance[CORRECTED]:.5f} of {XAVIER:.5f}",
            abs(variance[PLAIN] * NODES / XAVIER - 1) < 0.2 and abs(variance[CORRECTED] / XAVIER - 1) < 0.2,
        ),
        Property(
            "without rounds",
            "the same gain of at least 0.3 where every node trains and averages at times of its own",
            f"{accuracy[ASYNC_CORRECTED]:.3f} against {accuracy[ASYNC]:.3f}",
            accuracy[ASYNC_CORRECTED] >= accuracy[ASYNC] + 0.3,
        ),
    ]
    return Findings(
        "Gossip from own starts, with and without the variance correction",
        SETTING,
        properties,
        ("gossip", "accuracy after 20 rounds", f"after {ROUNDS}", f"after {ROUNDS} by seed", "hidden variance"),
        rows,
        draw(found),
    )
