"""DFedSAM and its family (Shi, Shen, Wei, Sun, Yuan, Wang, Tao, ICML 2023, arXiv 2302.04083), on the digits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hanse.core.optim import sgd
from hanse.core.streams import Streams
from hanse.data.partition import dirichlet
from hanse.data.tasks import digits
from hanse.engines.simulation import Simulation
from hanse.experiment import evaluate
from hanse.federation import Federation
from hanse.methods.fedavg import FedAvg
from hanse.methods.fedsam import FedSAM
from hanse.reproduce.base import SEEDS, Findings, Property, band, panels, watch
from hanse.schedules.gossip import gossip
from hanse.track.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODES, ROUNDS, STEPS, MIXES, RHO = 16, 30, 5, 4, 0.05
RATES = (0.2, 0.4, 0.8, 1.6)
DIRECTIONS, RADIUS = 50, 0.5
SETTING = (
    f"Digits, MLP 64-64-10, {NODES} nodes on a ring with Dirichlet(0.3) labels, {ROUNDS} rounds of K = {STEPS} local steps of 32"
    f" samples (D-PSGD: one), rho = {RHO}, momentum 0.9 for DFedAvgM, Metropolis weights (1/3 each), means over {len(SEEDS)} seeds"
    " (bands: lowest to highest). Accuracies are on the test set of 360 pictures: that of the mean model, and the mean of the"
    " nodes' own. Xi is the mean squared distance from the mean model. Rise: by how much the mean model's loss over all training"
    f" samples rises {RADIUS} away from it, mean over {DIRECTIONS} random directions, each with its opposite. MB and gradients are"
    f" what a node sends and computes in {ROUNDS} rounds. All rules ran at all rates; the claims are read off at that at which"
    " DFedAvg's nodes are the most accurate."
)


def rule(name: str, rate: float) -> FedAvg:
    """The local rule of a member of the family."""
    if name in ("DFedSAM", "DFedSAM-MGS"):
        return FedSAM(lr=rate, steps=STEPS, rho=RHO)
    return FedAvg(lr=rate, steps=1 if name == "D-PSGD" else STEPS, local=sgd(momentum=0.9 if name == "DFedAvgM" else 0))


EXCHANGES = {"D-PSGD": 1, "DFedAvg": 1, "DFedAvgM": 1, "DFedSAM": 1, "DFedAvg, Q = 4": MIXES, "DFedSAM-MGS": MIXES}
"""Q of each member of the family."""
OFTEN = "DFedAvg, Q = 4"


class Curves(NamedTuple):
    """What became of a rule at a rate, float64, a row a seed."""

    shared: Tensor
    """Accuracy of the mean model after every round, ``[seeds, ROUNDS]``."""
    local: Tensor
    """Mean accuracy of the nodes' models after every round, ``[seeds, ROUNDS]``."""
    apart: Tensor
    """Xi after every round, ``[seeds, ROUNDS]``."""
    rise: Tensor
    """See ``rise``, after the last round, ``[seeds]``."""
    megabytes: float
    """Sent by a node in a round."""
    gradients: int
    """Computed by a node in a round."""


def rise(net: Simulation) -> float:
    """``F(x + r u) - F(x)`` of the mean model x and r = RADIUS, mean over random directions u of length 1 and their opposites."""
    x, samples = net.model, net.samples
    u = Streams(0).normal("directions", torch.arange(DIRECTIONS), n=len(x)).to(x)
    u *= RADIUS / u.norm(dim=1, keepdim=True)

    def loss(w: Tensor) -> float:
        return net.problem.evaluate(w, net.problem.start_buffers, samples.x, samples.y)["loss"]

    return sum(loss(x + step) for step in torch.cat([u, -u])) / (2 * DIRECTIONS) - loss(x)


def curves(name: str, rate: float, federations: list[Federation]) -> Curves:
    """Every round of a rule at a rate."""
    found, rises = torch.zeros(3, len(federations), ROUNDS, dtype=torch.float64), torch.zeros(len(federations), dtype=torch.float64)
    local, schedule = rule(name, rate), gossip(mixes=EXCHANGES[name])
    for i, federation in enumerate(federations):

        def look(net: Simulation, i: int = i) -> None:
            metrics = evaluate(net)
            found[:, i, net.round - 1] = torch.tensor([metrics[n] for n in ("accuracy", "node_accuracy", "consensus")])
            if net.finished:
                rises[i] = rise(net)

        run = watch(federation, local, schedule, look, ROUNDS, chunk=NODES)
    sent = run.history[-1]["bytes_up"] / NODES / ROUNDS / 1e6
    shared, own, apart = found
    return Curves(shared, own, apart, rises, sent, (local.steps or 0) * local.gradients)


def last(runs: Tensor) -> float:
    """Mean over seeds after the last round, of ``[seeds, ROUNDS]``."""
    return float(runs[:, -1].mean())


def draw(found: dict[str, Curves], rate: float) -> Figure:
    """Mean accuracy of the nodes' models against rounds, traffic and work, and their distance by rounds."""
    figure, (one, two, three, four) = panels(14, 1, 1, 1, 1, height=4.2)
    rounds = torch.arange(1, ROUNDS + 1)
    for (name, seen), colour in zip(found.items(), COLOURS, strict=False):
        band(one, rounds, seen.local, colour, name)
        two.plot(rounds * seen.megabytes, seen.local.mean(0), color=colour)
        three.plot(rounds * seen.gradients, seen.local.mean(0), color=colour)
        band(four, rounds, seen.apart, colour, "_")
    for ax in (one, two, three):
        ax.set(ylim=(0.1, 1))
    one.set(xlabel="rounds", ylabel="accuracy of the nodes' models", title=f"rate {rate}")
    two.set(xlabel="MB sent by a node")
    three.set(xlabel="gradients computed by a node")
    four.set(xlabel="rounds", ylabel=r"$\Xi$, squared distance from the mean model", yscale="log")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(found))
    return figure


def reproduce() -> Findings:
    """Measure the claims; about one and a half minutes on one core."""
    federations = [Federation(digits(), NODES, dirichlet(0.3), seed=seed) for seed in SEEDS]
    grid = {name: {rate: curves(name, rate, federations) for rate in RATES} for name in EXCHANGES}
    rows = [
        [
            name,
            str(rate),
            f"{last(seen.shared):.3f}",
            f"{last(seen.local):.3f}",
            f"{last(seen.apart):.3f}",
            f"{float(seen.rise.mean()):.5f}",
            f"{ROUNDS * seen.megabytes:.2f}",
            str(ROUNDS * seen.gradients),
        ]
        for name, by_rate in grid.items()
        for rate, seen in by_rate.items()
    ]
    rate = max(RATES, key=lambda r: last(grid["DFedAvg"][r].local))
    found = {name: by_rate[rate] for name, by_rate in grid.items()}
    plain, sam, often = found["DFedAvg"], found["DFedSAM"], found[OFTEN]
    psgd = max(grid["D-PSGD"].values(), key=lambda seen: last(seen.local))
    mgs = found["DFedSAM-MGS"]
    properties = [
        Property(
            "DFedAvg and D-PSGD",
            f"DFedAvg is the more accurate after {ROUNDS} rounds, D-PSGD at the best rate of its own",
            f"mean model {last(plain.shared):.3f} against {last(psgd.shared):.3f}, nodes {last(plain.local):.3f} against"
            f" {last(psgd.local):.3f}",
            last(plain.shared) > last(psgd.shared) and last(plain.local) > last(psgd.local),
        ),
        *(
            Property(
                f"Q = {MIXES}, {name}",
                f"nodes are more accurate than with Q = 1 by 2 points, and Xi is at least {MIXES} times smaller",
                f"{last(more.local):.3f} against {last(once.local):.3f}; Xi {last(more.apart):.3f} against {last(once.apart):.3f},"
                f" {last(once.apart) / last(more.apart):.1f} times",
                last(more.local) >= last(once.local) + 0.02 and last(once.apart) >= MIXES * last(more.apart),
            )
            for name, once, more in (("DFedAvg", plain, often), ("DFedSAM", sam, mgs))
        ),
        Property(
            "DFedSAM, accuracy",
            "within 1 point of DFedAvg or above",
            f"mean model {last(sam.shared):.3f} against {last(plain.shared):.3f}, nodes {last(sam.local):.3f} against"
            f" {last(plain.local):.3f}",
            last(sam.shared) >= last(plain.shared) - 0.01 and last(sam.local) >= last(plain.local) - 0.01,
        ),
        Property(
            "DFedSAM, flatness",
            f"the mean model's loss rises less than DFedAvg's {RADIUS} away from it",
            f"{float(sam.rise.mean()):.5f} against {float(plain.rise.mean()):.5f}; less in"
            f" {int((sam.rise < plain.rise).sum())} of {len(SEEDS)} seeds",
            float(sam.rise.mean()) < float(plain.rise.mean()),
        ),
    ]
    return Findings(
        "DFedSAM, DFedSAM-MGS, DFedAvg and D-PSGD on a ring",
        SETTING,
        properties,
        ("rule", "rate", "mean model", "nodes", "Xi", "rise", "MB a node", "gradients a node"),
        rows,
        draw(found, rate),
    )
