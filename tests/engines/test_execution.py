"""What clients send, as it arrives and as it is counted."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from safetensors.torch import save
from small_networks import ask, at_once, network, traffic
from torch import Tensor

import hanse as hs
from hanse.codecs import Sending
from hanse.core.context import Context
from hanse.core.layout import Layout
from hanse.core.messages import Upload
from hanse.engines.execution import encode

CODECS = [hs.codecs.identity(), hs.codecs.topk(0.1)]


class Some(hs.methods.FedAvg):
    """Clients with odd numbers send their end points as well."""

    abstract: ClassVar[bool] = True

    def train(self, ctx: Context) -> Upload:
        delta, odd = ctx.displacement(self.direction), ctx.ids % 2 == 1
        return ctx.upload(self.weigh(ctx), delta=delta, end=odd[:, None] * (delta + ctx.start), senders={"end": odd})


def file(codec: hs.codecs.Codec, *names: str, size: int) -> int:
    """Length of a message that holds vectors of these names, a weight and a loss."""
    torch.manual_seed(0)
    vectors = {n: torch.randn(size, dtype=torch.float64) for n in names}
    if codec != hs.codecs.identity():
        vectors = {n: torch.zeros(len(codec.encode(v)), dtype=torch.uint8) for n, v in vectors.items()}
    return len(save({**vectors, **{n: torch.zeros(1, dtype=torch.float64) for n in ("weight", "loss")}}))


def encoded(upload: Upload, codec: hs.codecs.Codec) -> Tensor:
    seeds = torch.zeros_like(upload.clients)
    return encode(upload, codec, {}, lambda name, width: Sending(Layout({name: (width,)}), seeds))


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("barrier", [True, False])
def test_a_name_that_some_send_is_averaged_over_them_and_costs_only_them(
    ragged: hs.Federation, codec: hs.codecs.Codec, barrier: bool
) -> None:
    net = network(ragged, Some(), codec, chunk=5)
    state, _ = net.begin(net.method.init(net.problem))
    if barrier:
        reply = ask(net, torch.arange(12), net.method.message(state))
    else:
        net.send(torch.arange(12), "train", net.method.message(state))
        at_once(net.wait(12))
        reply = net.collect(net.arrived)
    assert torch.equal(reply.senders["end"], reply.clients % 2 == 1)
    size = net.problem.shared
    assert traffic(net)[1] == 6 * file(codec, "delta", size=size) + 6 * file(codec, "delta", "end", size=size)
    alone = {int(i): ask(network(ragged, Some(), codec), torch.tensor([i]), net.method.message(state)) for i in range(12)}
    ends = torch.stack([alone[i].sums["end"] for i in (1, 3, 5, 7, 9, 11)]).sum(0)
    weight = sum(float(alone[i].weight[0]) for i in (1, 3, 5, 7, 9, 11))
    torch.testing.assert_close(reply.mean("end"), ends / weight, rtol=1e-10, atol=1e-12)
    assert not bool(alone[0].mean("end").any())


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_every_client_is_weighed_by_what_it_sends(codec: hs.codecs.Codec) -> None:
    """Two names that some send, in all four ways."""
    a, b = torch.tensor([[True, True], [True, False], [False, True], [False, False]]).T
    one, two = (torch.randn(4, 50, dtype=torch.float64) * sent[:, None] for sent in (a, b))
    loss: Tensor = torch.ones(4, dtype=torch.float64)
    upload = Upload(torch.arange(4), loss, {"one": one, "two": two}, {}, {"one": a, "two": b}, loss)
    expected = [file(codec, *names, size=50) for names in (("one", "two"), ("one",), ("two",), ())]
    assert encoded(upload, codec).tolist() == expected


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_rows_are_encoded_like_sums(codec: hs.codecs.Codec) -> None:
    values, loss = torch.randn(3, 40, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    upload = Upload(torch.arange(3), loss, {"s": values.clone()}, {"r": values.clone()}, {}, loss)
    assert encoded(upload, codec).tolist() == [file(codec, "s", "r", size=40)] * 3
    expected = torch.stack([codec.decode(codec.encode(row)) for row in values])
    assert torch.equal(upload.sums["s"], expected) and torch.equal(upload.rows["r"], expected)
