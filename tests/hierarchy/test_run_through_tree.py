"""A whole run whose mean is taken by the tree of aggregators."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import hanse as hs
from hanse.aggregators import Aggregator
from hanse.hierarchy.service import Aggregation


class through_tree(Aggregator):
    """The weighted mean, by processes over shared memory."""

    abstract: ClassVar[bool] = True
    service: ClassVar[Aggregation]

    def __call__(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        round = self.service.round(expected=len(rows))
        for row, weight in zip(rows, torch.ones(len(rows)) if weights is None else weights, strict=True):
            round.put(row, float(weight))
        return round.finish()[0].clone()


def test_federated_averaging_of_digits_is_that_of_a_flat_server() -> None:
    federation = hs.Federation(hs.tasks.digits(), clients=20, partition=hs.dirichlet(0.3))
    schedule, engine = hs.schedules.synchronous(cohort=10), hs.engines.local("stacked", 5, 1, 1)
    flat = hs.run(federation, hs.methods.FedAvg(), schedule, rounds=5, engine=engine)
    with Aggregation(size=federation.problem.shared, workers=2) as through_tree.service:
        tree = hs.run(federation, hs.methods.FedAvg(aggregate=through_tree()), schedule, rounds=5, engine=engine)
        assert 0 < through_tree.service.counters.starts <= 2
    for name, weights in flat.weights.items():
        torch.testing.assert_close(tree.weights[name], weights, rtol=0, atol=1e-5)
