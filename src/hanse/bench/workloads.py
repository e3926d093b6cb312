"""Four workloads that stress different things, and the raw PyTorch loop that does the same work without any framework.

======  =========  ========  ======  ======================================================  ==========================
name    clients    sampled   batch   model                                                   stresses
======  =========  ========  ======  ======================================================  ==========================
W1      100        10        16      MLP 64-32-10 on scikit-learn digits                     overhead
W2      500        50        20      CNN of 455 thousand parameters, 28x28                   convolutions
W3      10,000     1,000     20      MLP 64-32-10                                            number of clients
W4      10         10        8       MLP of 20 million parameters, one step                  memory traffic
======  =========  ========  ======  ======================================================  ==========================

Data lie in client order and batches are taken in stored order, so that every program can do exactly the same steps.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from hanse.core.streams import Streams
from hanse.data.partition import Partition, even
from hanse.data.task import Dataset, Task
from hanse.federation import Federation
from hanse.fleet import Fleet

Name = Literal["W1", "W2", "W3", "W4"]


@dataclass(frozen=True)
class Workload:
    """Settings of one workload; ``samples`` a client (None: digits, 14 or 15); others may take minutes, hence ``peer_rounds``."""

    clients: int
    cohort: int
    batch: int
    lr: float
    rounds: int
    model: Literal["mlp", "cnn", "big"]
    samples: int | None
    peer_rounds: int


WORKLOADS = {
    "W1": Workload(100, 10, 16, 0.1, 50, "mlp", None, 50),
    "W2": Workload(500, 50, 20, 0.05, 4, "cnn", 100, 4),
    "W3": Workload(10_000, 1_000, 20, 0.1, 10, "mlp", 20, 3),
    "W4": Workload(10, 10, 8, 0.05, 6, "big", 8, 4),
}


class in_order(Partition):
    """Client ``i`` owns the ``i``-th stretch of the stored data."""

    def deal(self, data: Dataset, clients: int, streams: Streams) -> tuple[Tensor, Tensor]:
        return torch.arange(len(data.x)), even(len(data.x), clients)


class workload(Task):
    """The data and model of a benchmark workload."""

    name: Name = "W1"
    """Which one."""

    def data(self, streams: Streams) -> Dataset:
        work, rng = WORKLOADS[self.name], streams.torch("workload")
        if work.samples is None:
            from sklearn.datasets import load_digits

            raw = load_digits()
            order = torch.randperm(len(raw.target), generator=rng)
            x, y = torch.from_numpy(raw.data).float()[order] / 16, torch.from_numpy(raw.target).long()[order]
            return Dataset(x[360:], y[360:], x[:360], y[:360], y[360:], tuple("0123456789"))
        n, test = work.clients * work.samples, 500 if work.model == "big" else 2000
        y = torch.randint(10, (n + test,), generator=rng)
        if work.model == "cnn":
            centres = torch.randn(10, 1, 7, 7, generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3) * 0.6
        else:
            centres = torch.randn(10, 784, generator=rng) * 0.3 if work.model == "big" else torch.randn(10, 64, generator=rng) * 0.6
        x = centres[y] + torch.randn(n + test, *centres.shape[1:], generator=rng)
        return Dataset(x[test:], y[test:], x[:test], y[:test], y[test:], tuple("0123456789"))

    def model(self) -> nn.Module:
        match WORKLOADS[self.name].model:
            case "mlp":
                return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
            case "big":
                return nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
            case "cnn":
                return nn.Sequential(
                    nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                    nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                    nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10),
                )  # fmt: skip


def federation(name: Name, fleet: str = "ideal") -> Federation:
    """The workload as a federation, without test parts on the clients."""
    return Federation(workload(name), WORKLOADS[name].clients, in_order(test=0), Fleet.parse(fleet))


def export(name: Name, file: Path) -> None:
    """Everything another tool needs to do the same work, as one npz file."""
    fed, work = federation(name), WORKLOADS[name]
    train, split = fed.split.train, fed.split
    cohorts = [fed.streams.sample("cohort", fed.clients, work.cohort, t).numpy() for t in range(work.peer_rounds)]
    start = fed.problem.layout.views(fed.problem.start)
    settings = {k: np.array(v) for k, v in asdict(work).items() if v is not None} | {"epochs": np.array(1)}
    settings["rounds"] = settings.pop("peer_rounds")
    np.savez(
        file,
        x=train.x.numpy(),
        y=train.y.numpy(),
        offsets=train.offsets.numpy(),
        test_x=split.test_x.numpy(),
        test_y=split.test_y.numpy(),
        cohorts=np.stack(cohorts),
        start=np.concatenate([start[n].numpy().ravel() for n, _ in fed.problem.model.named_parameters()]),
        **settings,  # type: ignore[arg-type]
    )


def raw_rounds(fed: Federation, work: Workload, epochs: int, rounds: int) -> tuple[list[float], nn.Module]:
    """FedAvg as a bare PyTorch loop with ``torch.optim.SGD``; seconds per round, and the final model."""
    import time

    x, y, offsets = fed.split.train.x, fed.split.train.y, fed.split.train.offsets.tolist()
    model = fed.task.model()
    start = fed.problem.layout.views(fed.problem.start)
    world = [start[name].clone() for name, _ in model.named_parameters()]
    params = list(model.parameters())
    spent = []
    for t in range(rounds):
        began = time.perf_counter()
        total, seen = [torch.zeros_like(w) for w in world], 0
        for c in fed.streams.sample("cohort", fed.clients, work.cohort, t).tolist():
            first, last = offsets[c], offsets[c + 1]
            with torch.no_grad():
                for p, w in zip(params, world, strict=True):
                    p.copy_(w)
            optimiser = torch.optim.SGD(params, lr=work.lr)
            mine, labels = x[first:last], y[first:last]
            for _ in range(epochs):
                for i in range(0, last - first, work.batch):
                    optimiser.zero_grad()
                    nn.functional.cross_entropy(model(mine[i : i + work.batch]), labels[i : i + work.batch]).backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
            with torch.no_grad():
                for s, p in zip(total, params, strict=True):
                    s.add_(p, alpha=last - first)
            seen += last - first
        for w, s in zip(world, total, strict=True):
            torch.div(s, seen, out=w)
        spent.append(time.perf_counter() - began)
    with torch.no_grad():
        for p, w in zip(params, world, strict=True):
            p.copy_(w)
    return spent, model
