"""What the experiments on gossip measure with; the experiments themselves take a minute each."""

from __future__ import annotations

import pytest
import torch

from hanse.aggregators.merging import average
from hanse.core.wire import wire_size
from hanse.data.tasks import digits, quadratics
from hanse.engines.simulation import Simulation
from hanse.federation import Federation
from hanse.methods import FedAvg
from hanse.reproduce import dfedsam, gossip_variance
from hanse.reproduce.base import bowls, watch
from hanse.schedules import gossip


def test_the_rise_of_a_quadratic_is_half_its_curvature_along_the_directions() -> None:
    """``F(x + r u) + F(x - r u) - 2 F(x) = r^2 u^T A u`` wherever x is; on average over all u it is ``r^2 tr(A) / d``."""
    found: list[float] = []
    watch(bowls(), FedAvg(), gossip(), lambda net: found.append(dfedsam.rise(net)), 2, chunk=10)
    curvature = quadratics().samples()[:, 0].mean(0)
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0] == pytest.approx(0.5 * dfedsam.RADIUS**2 * float(curvature.mean()), rel=0.02)


@pytest.mark.parametrize(("name", "gradients"), [("D-PSGD", 1), ("DFedAvgM", 5), ("DFedSAM-MGS", 10)])
def test_what_a_node_computes_and_sends_in_a_round(monkeypatch: pytest.MonkeyPatch, name: str, gradients: int) -> None:
    monkeypatch.setattr(dfedsam, "ROUNDS", 2)
    federation = Federation(digits(hidden=4), dfedsam.NODES)
    seen = dfedsam.curves(name, 0.1, [federation])
    size = wire_size({"x": federation.problem.start})
    assert seen.gradients == gradients
    assert seen.megabytes == pytest.approx(dfedsam.EXCHANGES[name] * 2 * size / 1e6)
    assert seen.shared.shape == seen.local.shape == seen.apart.shape == (1, 2) and seen.rise.shape == (1,)
    assert float(seen.apart.min()) > 0 and float(seen.rise) != 0


def test_the_hidden_variance_is_that_of_xavier_until_models_are_averaged() -> None:
    found: list[float] = []

    def look(net: Simulation) -> None:
        found.append(gossip_variance.hidden_variance(net))

    for start in ("same", "own"):
        schedule = gossip_variance.rounds(average(), start)
        watch(Federation(gossip_variance.TASK, 16), FedAvg(lr=1e-9, steps=1), schedule, look, 1, chunk=16)
    assert found[0] == pytest.approx(gossip_variance.XAVIER, rel=0.03)
    assert found[1] == pytest.approx(gossip_variance.XAVIER * (0.25 + 0.25 / 8), rel=0.03)


def test_the_curves_are_those_of_all_nodes_after_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gossip_variance, "ROUNDS", 2)
    monkeypatch.setattr(gossip_variance, "SEEDS", (0,))
    plain, corrected = (gossip_variance.curves(gossip_variance.ARMS[name]) for name in list(gossip_variance.ARMS)[:2])
    assert plain.shape == corrected.shape == (1, 2, 2)
    assert bool((plain[..., 1] < 0.5 * corrected[..., 1]).all()) and bool(torch.all((plain[..., 0] > 0) & (plain[..., 0] < 1)))
