"""The escape hatch does plain PyTorch, one client at a time, and loses nothing of the accounting."""

import torch
from torch import Tensor, nn

import hanse as hs
from hanse.core.messages import Tensors
from hanse.methods.one_by_one import OneByOne


class TwoOptimisers(OneByOne):
    """Another optimiser for each layer, which no flat-vector optimiser offers; both plain SGD, so the result is FedAvg's."""

    def train_one(
        self, model: nn.Module, data: tuple[Tensor, Tensor], message: Tensors, lr: float, generator: torch.Generator
    ) -> float:
        first, last = model[0], model[2]
        optimisers = [torch.optim.SGD(part.parameters(), lr) for part in (first, last)]
        losses = []
        for x, y in zip(data[0].split(self.batch), data[1].split(self.batch), strict=True):
            loss = nn.functional.cross_entropy(model(x), y)
            model.zero_grad()
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)


def test_it_equals_the_batched_rule_where_both_do_the_same_work():
    fed = hs.Federation(hs.tasks.digits(hidden=8), clients=12, partition=hs.dirichlet(0.5), dtype="float64")
    shared = {"schedule": hs.schedules.synchronous(cohort=5), "rounds": 4}
    alone = hs.run(fed, TwoOptimisers(batch=16, shuffle=False), **shared)
    batched = hs.run(fed, hs.methods.FedAvg(batch=16, shuffle=False), **shared)
    for name, tensor in batched.weights.items():
        torch.testing.assert_close(alone.weights[name], tensor, rtol=0, atol=1e-10)
    for one, other in zip(alone.history, batched.history, strict=True):
        assert one["bytes_up"] == other["bytes_up"]
        assert abs(one["loss"] - other["loss"]) < 1e-10


def test_a_client_draws_from_a_generator_of_its_own():
    seen = []

    class Draws(OneByOne):
        """Notes one random number per client and round."""

        def train_one(self, model, data, message, lr, generator):
            seen.append(float(torch.rand((), generator=generator)))
            return 0.0

    fed = hs.Federation(hs.tasks.digits(), clients=6)
    hs.run(fed, Draws(), hs.schedules.synchronous(cohort=6), rounds=2)
    first = list(seen)
    hs.run(fed, Draws(), hs.schedules.synchronous(cohort=6), rounds=2)
    assert len(set(first)) == 12
    assert seen[12:] == first
