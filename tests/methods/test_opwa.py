"""OPWA against its formula on masks made by hand, and in a run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hanse as hs
from hanse.core.messages import Reply
from hanse.methods import OPWA, FedAvg


def reply(deltas: Tensor, masks: Tensor, weight: Tensor) -> Reply:
    """What the server sees of updates ``[C, P]`` of which the clients sent what ``masks`` says."""
    kept = masks.to(deltas.dtype)
    sums = {"delta": weight @ (deltas * kept), "delta.kept": weight @ kept, "delta.overlap": kept.sum(0)}
    clients = torch.arange(len(deltas))
    return Reply(clients, 0 * clients, weight, sums, {}, {}, weight, population=9, starts={})


def moved(rule: OPWA, *args: Tensor) -> Tensor:
    return rule.step({"x": torch.zeros(args[0].shape[1], dtype=torch.float64)}, reply(*args), 0)["x"]


DELTAS = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DISJOINT = torch.arange(12) % 4 == torch.arange(4)[:, None]
EQUAL = torch.ones(4, dtype=torch.float64)


def test_entries_of_one_client_arrive_whole() -> None:
    """Disjoint masks, p = 1/|S|, gamma = |S|, r = 1: the step is the sum of all updates."""
    torch.testing.assert_close(moved(OPWA(), DELTAS, DISJOINT, EQUAL), (DELTAS * DISJOINT).sum(0), rtol=0, atol=1e-7)


def test_entries_that_all_send_are_averaged() -> None:
    same = (torch.arange(12) < 5).expand(4, -1)
    weight = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    torch.testing.assert_close(moved(OPWA(), DELTAS, same, weight), weight @ (DELTAS * same) / 10)


def test_the_threshold_counts_clients_and_not_weights() -> None:
    """With r = 2 entries that one or two sent are enlarged, whatever these weigh."""
    masks = torch.arange(12) % 5 > torch.arange(4)[:, None]  # entry j was sent by j mod 5 clients
    weight = torch.tensor([0.1, 30, 2, 7], dtype=torch.float64)
    plain = weight @ (DELTAS * masks) / weight.sum()
    factor = torch.where(torch.arange(12) % 5 <= 2, 3.0, 1.0)
    torch.testing.assert_close(moved(OPWA(gamma=3, overlap=2), DELTAS, masks, weight), factor * plain)


def test_normalised_is_the_mean_over_those_who_sent_an_entry() -> None:
    masks = torch.arange(12) % 5 > torch.arange(4)[:, None]
    weight = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    share = weight[:, None] * masks
    expected = (share * DELTAS).sum(0) / share.sum(0).clamp(min=1e-30)
    torch.testing.assert_close(moved(OPWA(weighting="normalised"), DELTAS, masks, weight), expected)


def test_one_client_alone_is_not_enlarged() -> None:
    torch.testing.assert_close(moved(OPWA(), DELTAS[:1], DISJOINT[:1], EQUAL[:1]), (DELTAS * DISJOINT)[0])


def test_gamma_is_the_number_of_clients_but_at_most_ten() -> None:
    deltas, masks = torch.ones(20, 20, dtype=torch.float64), torch.eye(20, dtype=torch.bool)
    torch.testing.assert_close(moved(OPWA(), deltas, masks, torch.ones(20).double()), torch.full((20,), 0.5).double())


def test_without_a_codec_it_is_fedavg() -> None:
    fed = hs.Federation(hs.tasks.digits(), 8, hs.data.dirichlet(0.5))
    one, two = (hs.run(fed, rule(lr=0.1), hs.schedules.synchronous(4), rounds=3) for rule in (OPWA, FedAvg))
    assert all(torch.equal(one.weights[n], w) for n, w in two.weights.items())


@pytest.mark.parametrize("schedule", [hs.schedules.synchronous(4), hs.schedules.fedbuff(3, cohort=4)])
@pytest.mark.parametrize("workers", [1, 2])
def test_masks_of_a_run_are_those_of_what_was_sent(schedule: hs.schedules.Schedule, workers: int) -> None:
    """Every step, from the clients' encoded updates one by one, zeros that were sent included."""

    class Noted(OPWA):
        """OPWA that also sees every update."""

        abstract = True

        def train(self, ctx):
            upload = super().train(ctx)
            upload.rows["seen"] = upload.sums["delta"].clone()
            return upload

        def step(self, state, reply, round):
            seen = reply.rows["seen"]
            kept = seen != 0  # no entry of these is exactly zero, so what arrived is what was kept
            shares = (reply.shares[:, None] * kept).sum(0)
            counts = kept.sum(0)
            torch.testing.assert_close(reply.mean("delta.kept"), shares, rtol=1e-5, atol=1e-6)
            assert torch.equal(reply.sums["delta.overlap"].round().long(), counts)
            notes.append(int(counts.max()))
            return super().step(state, reply, round)

    notes: list[int] = []
    fed = hs.Federation(hs.tasks.digits(), 8, hs.data.dirichlet(0.5), hs.fleet.devices(job="exponential(1)"))
    engine = hs.engines.local(path="stacked", chunk=2, workers=workers, threads=1)
    hs.run(fed, Noted(lr=0.1), schedule, rounds=4, codec=hs.codecs.topk(0.05), engine=engine)
    assert len(notes) == 4 and max(notes) > 1


def test_a_schedules_discount_is_kept_when_weights_are_normalised() -> None:
    fed = hs.Federation(hs.tasks.digits(), 8, hs.data.dirichlet(0.5), hs.fleet.devices(job="exponential(1)"))
    rule, codec = OPWA(lr=0.1, weighting="normalised"), hs.codecs.topk(0.05)
    moved = []
    for alpha in (1.0, 0.01):
        run = hs.run(fed, rule, hs.schedules.fedbuff(2, cohort=4, alpha=alpha), rounds=1, codec=codec)
        start = dict(fed.problem.layout.views(fed.problem.start))
        moved.append(torch.cat([(run.weights[n] - start[n]).flatten() for n in run.weights]))
    torch.testing.assert_close(0.01 * moved[0], moved[1], rtol=1e-3, atol=1e-7)


def test_with_a_codec_that_sends_everything_it_is_fedavg() -> None:
    fed, codec = hs.Federation(hs.tasks.digits(), 8, hs.data.dirichlet(0.5)), hs.codecs.uniform(8)
    one, two = (
        hs.run(fed, rule, hs.schedules.synchronous(3), rounds=3, codec=codec) for rule in (OPWA(lr=0.1, overlap=3), FedAvg(lr=0.1))
    )
    assert all(torch.equal(one.weights[n], w) for n, w in two.weights.items())
