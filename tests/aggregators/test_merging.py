"""What nodes make of their models: the variance correction against its formula, and robust means next door."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hanse as hs
from hanse.aggregators import Aggregator, mean
from hanse.aggregators.merging import Merge, average, robust, variance_corrected
from hanse.core.layout import Layout
from hanse.core.streams import Streams
from hanse.methods import FedAvg
from hanse.schedules import gossip
from hanse.topologies import Mixing, complete, ring

LAYOUT = Layout({"first.weight": (6, 5), "first.bias": (6,), "norm": (5,), "second.weight": (4, 3, 2), "gain": (1, 1)})
CORRECTED = ("first.weight", "second.weight")
NODES = 6


def drawn(seed: int = 0, nodes: int = NODES) -> Tensor:
    """Models ``[nodes, P]`` in which no two tensors have the same variance or mean."""
    noise, views = Streams(seed).normal("models", torch.arange(nodes), n=LAYOUT.size).double(), LAYOUT.views
    for k, tensor in enumerate(views(noise).values(), 1):
        tensor.mul_(k).add_(k * torch.arange(1, nodes + 1).view(-1, *[1] * (tensor.dim() - 1)))
    return noise


def around(nodes: int = NODES, own: float = 0.5) -> Mixing:
    return Mixing.leaning(ring().graph(nodes, Streams(0), 0), own)


def variance(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).var(1, correction=0)


def merged(merge: Merge, own: Tensor, mixing: Mixing, received: Tensor | None = None) -> dict[str, Tensor]:
    return LAYOUT.views(merge(own, own if received is None else received, mixing, LAYOUT))


@pytest.mark.parametrize("target", ["others", "own", "both"])
@pytest.mark.parametrize("own", [0.0, 0.5])
@settings(max_examples=20)
@given(seed=st.integers(0, 100))
def test_after_the_correction_the_variance_is_the_target_and_the_mean_is_as_it_was(target: str, own: float, seed: int) -> None:
    """Node i of a ring has heard from i - 1 and i + 1; what they say need not be what they have."""
    mine, told, mixing = drawn(seed), drawn(seed + 1000), around(own=own)
    found, plain = (merged(m, mine, mixing, told) for m in (variance_corrected(target=target), average()))
    for name in CORRECTED:
        theirs, single = variance(LAYOUT.views(told)[name]), variance(LAYOUT.views(mine)[name])
        near = (theirs.roll(1) + theirs.roll(-1)) / 2
        wanted = {"others": near, "own": single, "both": own * single + (1 - own) * near}[target]
        torch.testing.assert_close(variance(found[name]), wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[name].flatten(1).mean(1), plain[name].flatten(1).mean(1), rtol=0, atol=1e-7)


def test_the_received_models_weigh_in_the_target_as_they_do_in_the_mean() -> None:
    graph = complete().graph(3, Streams(0), 0)
    x = drawn(nodes=3)
    found = merged(variance_corrected(), x, Mixing.proportional(graph, torch.tensor([1, 2, 6])))
    single = variance(LAYOUT.views(x)["first.weight"])
    torch.testing.assert_close(variance(found["first.weight"])[0], (2 * single[1] + 6 * single[2]) / 8, rtol=1e-6, atol=0)


def test_biases_scales_of_norms_and_single_numbers_are_only_averaged() -> None:
    found, plain = (merged(m, drawn(), around()) for m in (variance_corrected(), average()))
    assert {name for name in found if not torch.equal(found[name], plain[name])} == set(CORRECTED)


@pytest.mark.parametrize(("skip", "left"), [(("first.*",), {"second.weight"}), (("*",), set()), (("*.weight",), set())])
def test_what_is_skipped_is_only_averaged_bit_for_bit(skip: tuple[str, ...], left: set[str]) -> None:
    found, plain = (merged(m, drawn(), around()) for m in (variance_corrected(skip=skip), average()))
    assert {name for name in found if not torch.equal(found[name], plain[name])} == left


def test_a_run_that_skips_everything_is_plain_gossip_bit_for_bit() -> None:
    runs = [played(merge, "own", 3) for merge in (average(), variance_corrected(skip=("*",)), variance_corrected())]
    plain, skipped, corrected = (run.state["state.x"] for run in runs)
    assert torch.equal(plain, skipped) and not torch.equal(plain, corrected)


@pytest.mark.parametrize("target", ["others", "own", "both"])
def test_copies_of_ones_own_model_leave_it_as_it_is(target: str) -> None:
    x = drawn(nodes=1).repeat(NODES, 1)
    found = variance_corrected(target=target)(x, x, around(), LAYOUT)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


def test_identical_models_stay_so_for_twenty_rounds_with_and_without_the_correction() -> None:
    """All nodes have all samples, in the same order, and begin alike."""
    x = drawn(nodes=1).float().repeat(NODES, 1)
    plain, corrected = x, x
    for k in range(20):
        step = 0.01 * drawn(k, 1).float()
        plain = average()(plain + step, plain + step, around(), LAYOUT)
        corrected = variance_corrected()(corrected + step, corrected + step, around(), LAYOUT)
    torch.testing.assert_close(corrected, plain, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, x, atol=1e-2)


@pytest.mark.parametrize(("own", "left", "within"), [(0.5, 0.25 + 0.25 / 8, 0.02), (0.0, 1 / 8, 0.03)])
def test_averaging_independent_layers_takes_their_variance_and_the_correction_gives_it_back(
    own: float, left: float, within: float
) -> None:
    """M = 10^5 numbers, B = 8 models: beta^2 + (1 - beta)^2 / B of the variance is left."""
    layout, mixing = Layout({"weight": (250, 400)}), Mixing.into_one(8, own)
    x = Streams(0).normal("layers", torch.arange(9), n=layout.size)
    plain, corrected = (variance(merge(x, x, mixing, layout)[:1]) for merge in (average(), variance_corrected()))
    assert float(plain / variance(x).mean()) == pytest.approx(left, rel=within)
    assert float(corrected) == pytest.approx(float(variance(x[1:]).mean()), rel=1e-5)


def test_a_node_that_hears_from_nobody_keeps_its_model_bit_for_bit() -> None:
    x = drawn()
    away = torch.arange(NODES) == 0
    alone = around().without(away | (torch.arange(NODES) == 4))  # node 5 is between them
    found = variance_corrected()(x, x, alone, LAYOUT)
    assert torch.equal(found[[0, 4, 5]], x[[0, 4, 5]]) and not torch.equal(found[[1, 2, 3]], x[[1, 2, 3]])


def test_neighbours_that_weigh_nothing_are_nobody() -> None:
    x, graph = drawn(nodes=3), complete().graph(3, Streams(0), 0)
    found = variance_corrected()(x, x, Mixing.proportional(graph, torch.tensor([5, 0, 0])), LAYOUT)
    assert torch.equal(found[0], x[0]) and bool(found.isfinite().all())


def test_a_tensor_without_variance_is_left() -> None:
    """Opposite weights cancel: there is nothing that could be scaled."""
    x = drawn(nodes=2)
    x[1] = -x[0]
    found = variance_corrected()(x, x, Mixing.leaning(complete().graph(2, Streams(0), 0), 0.5), LAYOUT)
    assert torch.equal(found, torch.zeros_like(x))


def test_eps_weakens_the_correction_of_small_variances() -> None:
    layout, mixing = Layout({"weight": (40, 50)}), Mixing.into_one(8, 0.5)
    x = 0.01 * Streams(0).normal("layers", torch.arange(9), n=layout.size).double()
    found, plain = (merge(x, x, mixing, layout)[:1] for merge in (variance_corrected(eps=1e-4), average()))
    wanted = variance(plain) * (variance(x[1:]).mean() + 1e-4) / (variance(plain) + 1e-4)
    torch.testing.assert_close(variance(found), wanted, rtol=1e-9, atol=0)
    assert variance(found) < 0.6 * variance(x).mean()


def played(merge: Merge, start: str, rounds: int) -> hs.Run:
    fed = hs.Federation(hs.tasks.digits(hidden=8), 8, dtype="float64")
    schedule = gossip(topology=ring(4), own=0.5, merge=merge, start=start)
    engine = hs.engines.local("stacked", 8, 1, 1, shortcuts=False)
    return hs.run(fed, FedAvg(steps=2), schedule, rounds=rounds, evaluate=0, engine=engine)


def test_only_models_are_sent() -> None:
    plain, corrected = played(average(), "own", 2), played(variance_corrected(), "own", 2)
    assert torch.equal(plain.clients["sent"], corrected.clients["sent"])
    assert [r["bytes_up"] for r in plain.history] == [r["bytes_up"] for r in corrected.history]


def test_from_one_start_the_correction_changes_little_and_from_many_the_variance() -> None:
    ratio = {}
    for start in ("same", "own"):
        plain, corrected = (played(merge, start, 10).weights["0.weight"].var() for merge in (average(), variance_corrected()))
        ratio[start] = float(corrected / plain)
    assert ratio["same"] == pytest.approx(1, abs=0.01) and ratio["own"] > 4


class middle(Aggregator):
    """The median, coordinate by coordinate."""

    abstract: ClassVar[bool] = True

    def __call__(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return rows.median(0).values


def test_an_aggregator_at_every_node_takes_its_own_model_as_it_is_and_those_received() -> None:
    """One neighbour lies; who hears nobody keeps its model."""
    x = torch.arange(NODES, dtype=torch.float64)[:, None].repeat(1, 3)
    told = x.clone()
    told[1] = 1e6
    mixing = around().without(torch.arange(NODES) == 5)
    found = robust(rule=middle())(x, told, mixing, Layout({"x": (3,)}))
    assert found[:, 0].tolist() == [0, 1, 3, 3, 3, 5]  # of {0, 1e6} the lower, {0, 1, 2}, {1e6, 2, 3}, {2, 3, 4}, {3, 4}
    average_of_three = robust(rule=mean())(x, x, around(), Layout({"x": (3,)}))[:, 0]
    assert average_of_three.tolist() == pytest.approx([2, 1, 2, 3, 4, 3])
