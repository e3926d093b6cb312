"""Bandwidth-aware ratios: the paper's schedule law, and that with equal links it is top-k."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hanse as hs
from hanse.codecs import Links, Sending, bcrs, topk
from hanse.codecs.wire import FRAME, varint_size
from hanse.core.layout import Layout

ENGINE = hs.engines.local(path="stacked", chunk=4, workers=1, threads=1, shortcuts=False)
UNEQUAL = "devices(up=lognormal(1, 0.8), latency=uniform(0.05, 0.2))"


def federation(fleet: str = "ideal") -> hs.Federation:
    return hs.Federation(hs.tasks.digits(), 12, hs.data.dirichlet(0.3), hs.fleet.Fleet.parse(fleet))


links = st.lists(st.tuples(st.floats(1e3, 1e8), st.floats(0, 2)), min_size=1, max_size=8).map(
    lambda pairs: Links(*torch.tensor(pairs, dtype=torch.float64).T)
)


@given(links, st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.integers(1, 100_000))
def test_everyone_who_may_send_more_ends_when_the_slowest_does(found: Links, base: float, size: int) -> None:
    codec = bcrs(base)
    share = codec.allot(found, size)
    assert bool(((share >= base) & (share <= 1)).all())

    def seconds(entries: torch.Tensor) -> torch.Tensor:
        return found.latency + codec.entry * entries / found.up

    bench = seconds(torch.full_like(share, base) * size).max()
    between = (share > base) & (share < 1)
    torch.testing.assert_close(seconds(share * size)[between], bench.expand(int(between.sum())), rtol=1e-9, atol=1e-9)
    whole = (share * size + 1e-9).floor()  # rounded down, so that nobody is later, and by less than an entry earlier
    assert bool((seconds(whole) <= bench * (1 + 1e-9)).all())
    assert bool((bench - seconds(whole)[between] <= codec.entry / found.up[between] + 1e-9 * bench).all())


def test_shares_by_hand() -> None:
    """P = 1000, 8 bytes an entry, CR* = 0.1: the slowest takes 1 + 800/100 = 9 s."""
    found = Links(torch.tensor([100.0, 200.0, 1e9]).double(), torch.tensor([1.0, 5.0, 0.0]).double())
    assert bcrs(0.1).allot(found, 1000).tolist() == pytest.approx([0.1, 0.1, 1.0])
    found = Links(torch.tensor([100.0, 400.0]).double(), torch.tensor([1.0, 4.0]).double())
    assert bcrs(0.1).allot(found, 1000).tolist() == pytest.approx([0.1, (9 - 4) * 400 / 8000])


def test_bytes_are_a_place_and_a_value_for_every_entry() -> None:
    n, share = 5_000, torch.tensor([0.013, 0.1, 0.9999, 1.0, 1e-9], dtype=torch.float64)
    sent = bcrs().roundtrip(torch.randn(5, n), Sending(Layout({"": (n,)}), torch.arange(5), share=share, masks=True))
    counts = (share * n).floor().long().clamp(min=1)
    assert sent.sizes.tolist() == (FRAME.size + varint_size(counts + 1) + 8 * counts).tolist()
    assert sent.kept is not None and sent.kept.sum(1).tolist() == counts.tolist()


def test_each_client_sends_what_topk_with_its_share_sends() -> None:
    """Ties included, and the same bytes when it encodes by itself."""
    rows = torch.randint(-3, 4, (6, 400), generator=torch.Generator().manual_seed(1)).float()
    share = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    layout = Layout({"": (400,)})
    sent = bcrs().roundtrip(rows, Sending(layout, torch.arange(6), share=share))
    for row, own, values, size in zip(rows, share, sent.values, sent.sizes.tolist(), strict=True):
        assert torch.equal(values, topk(float(own)).roundtrip(row[None], Sending(layout, torch.tensor([0]))).values[0])
        data = bcrs().encode(row, Sending(layout, torch.tensor([0]), share=own[None]))
        assert len(data) == size and torch.equal(bcrs().decode(data, layout), values)


@pytest.mark.parametrize("fleet", ["devices(up=2, latency=0.1)", "ideal"])
@pytest.mark.parametrize("schedule", [hs.schedules.synchronous(4), hs.schedules.fedbuff(2, cohort=4)])
def test_with_equal_links_it_is_topk(fleet: str, schedule: hs.schedules.Schedule) -> None:
    fed = federation(fleet)
    one, two = (hs.run(fed, hs.methods.FedAvg(lr=0.1), schedule, rounds=4, codec=c, engine=ENGINE) for c in (bcrs(0.1), topk(0.1)))
    assert all(torch.equal(one.weights[n], w) for n, w in two.weights.items())
    assert one.history[-1]["bytes_up"] == two.history[-1]["bytes_up"]


def test_a_round_takes_no_longer_than_with_topk_and_carries_more() -> None:
    fed = federation(UNEQUAL)
    one, two = (
        hs.run(fed, hs.methods.FedAvg(lr=0.1), hs.schedules.synchronous(5), rounds=6, codec=c, engine=ENGINE)
        for c in (bcrs(0.05), topk(0.05))
    )
    header = 6 * 300 / 12_500  # at 0.1 Mbit/s: the message's own header, and the eight bytes more that say the share
    assert one.history[-1]["seconds"] <= two.history[-1]["seconds"] + header
    assert one.history[-1]["bytes_up"] > 1.5 * two.history[-1]["bytes_up"]
    assert one.history[-1]["bytes_down"] == two.history[-1]["bytes_down"] + 6 * 5 * 8


def test_everything_sent_and_nothing_enlarged_is_fedavg() -> None:
    fed = federation(UNEQUAL)
    plain = hs.run(fed, hs.methods.FedAvg(lr=0.1), hs.schedules.synchronous(5), rounds=4, engine=ENGINE)
    for rule in (hs.methods.OPWA(lr=0.1, gamma=1), hs.methods.OPWA(lr=0.1, weighting="normalised")):
        full = hs.run(fed, rule, hs.schedules.synchronous(5), rounds=4, codec=bcrs(1.0), engine=ENGINE)
        for n, w in plain.weights.items():
            assert (
                torch.equal(full.weights[n], w) if rule.weighting == "enlarged" else torch.allclose(full.weights[n], w, atol=1e-6)
            )


def test_layers_with_a_share_of_their_own_keep_it() -> None:
    layout = Layout({"body": (200,), "head": (100,)})
    codec = hs.codecs.Codec.parse("layers | bcrs(0.05, only={'head': 1})")
    sent = codec.roundtrip(
        torch.randn(2, 300), Sending(layout, torch.arange(2), share=torch.tensor([0.1, 0.5]).double(), masks=True)
    )
    assert sent.kept is not None
    assert sent.kept[:, :200].sum(1).tolist() == [20, 100] and bool(sent.kept[:, 200:].all())


def test_the_estimate_counts_what_links_allow() -> None:
    from hanse.engines.estimate import estimate
    from hanse.engines.simulation import Simulation

    fed, schedule = federation(UNEQUAL), hs.schedules.synchronous(5)
    net = Simulation(fed, hs.methods.FedAvg(), ENGINE, bcrs(0.05), seed=0, rounds=8)
    run = hs.run(fed, hs.methods.FedAvg(), schedule, rounds=8, codec=bcrs(0.05))
    assert estimate(net, schedule).up == pytest.approx(run.history[-1]["bytes_up"], rel=0.01)
