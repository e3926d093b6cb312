"""What is left over is sent later."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.codecs import Codec, Sending
from hanse.core.errors import ConfigError
from hanse.core.layout import Layout

LAYOUT = Layout({"a": (6, 5), "b": (10,)})
CODECS = ["feedback(topk(0.1))", "feedback(layers | topk(0.2) | sign | gaps)", "feedback(uniform(2))", "feedback(randomk(0.1))"]


def rounds(text: str, inputs: Tensor, by_bytes: bool) -> tuple[list[Tensor], Tensor]:
    """What arrives in each round ``[C, P]`` of inputs ``[T, C, P]``, and what is left at the end."""
    codec, clients = Codec.parse(text), inputs.shape[1]
    memory: dict[str, Tensor] = {}
    alone: list[dict[str, Tensor]] = [{} for _ in range(clients)]
    arrived = []
    for t, rows in enumerate(inputs):
        seeds = torch.arange(clients) + 100 * t
        if by_bytes:
            each = [Sending(LAYOUT, seeds[i : i + 1], memory=alone[i]) for i in range(clients)]
            arrived.append(torch.stack([codec.decode(codec.encode(r, s), LAYOUT) for r, s in zip(rows, each, strict=True)]))
        else:
            arrived.append(codec.roundtrip(rows.clone(), Sending(LAYOUT, seeds, memory=memory)).values)
    return arrived, torch.cat([m["residual"] for m in alone]) if by_bytes else memory["residual"]


@pytest.mark.parametrize("text", CODECS)
@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.float64]))
def test_what_was_sent_and_what_is_left_is_all_there_was(text: str, seed: int, dtype: torch.dtype) -> None:
    """sum_t sent_t + e_T = sum_t x_t, to rounding."""
    inputs = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    arrived, left = rounds(text, inputs, by_bytes=False)
    torch.testing.assert_close(torch.stack(arrived).sum(0) + left, inputs.sum(0), rtol=0, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("text", CODECS)
def test_by_bytes_it_is_the_same(text: str) -> None:
    inputs = torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(0))
    inputs[1, 0, 7], inputs[1, 1, 3], inputs[2, 2, 0] = torch.nan, torch.inf, -torch.inf
    batched, alone = (rounds(text, inputs, by_bytes) for by_bytes in (False, True))
    torch.testing.assert_close(alone[0], batched[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(alone[1], batched[1])


def test_one_step_by_hand() -> None:
    codec, memory = Codec.parse("feedback(topk(0.5))"), {}
    layout = Layout({"": (4,)})
    for x, arrives, left in (
        ([4.0, 1, 0, 3], [4.0, 0, 0, 3], [0.0, 1, 0, 0]),
        ([0.0, 1, 1, 3], [0.0, 2, 0, 3], [0.0, 0, 1, 0]),
    ):
        sent = codec.roundtrip(torch.tensor([x]), Sending(layout, torch.tensor([0]), memory=memory))
        assert sent.values.tolist() == [arrives] and memory["residual"].tolist() == [left]


def test_what_is_not_finite_is_not_kept() -> None:
    codec, memory = Codec.parse("feedback(topk(0.5))"), {}
    x = torch.tensor([1.0, torch.nan, torch.inf, 2.0])
    codec.encode(x, Sending(Layout({"": (4,)}), torch.tensor([0]), memory=memory))
    assert memory["residual"].tolist() == [[0.0] * 4]


def test_a_codec_inside_does_not_see_the_memory_of_the_one_outside() -> None:
    inputs = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    twice = "feedback(feedback(topk(0.1)))"
    for by_bytes in (False, True):
        once, nested = (rounds(text, inputs, by_bytes)[0] for text in ("feedback(topk(0.1))", twice))
        assert torch.equal(torch.stack(once), torch.stack(nested))


def test_it_says_what_it_keeps_and_whether_all_is_sent() -> None:
    codec = Codec.parse("feedback(topk | sign)")
    assert codec.keeps == ("residual",) and codec.sparse and not Codec.parse("feedback(sign)").sparse
    sending = Sending(Layout({"": (10,)}), torch.arange(2), masks=True)
    kept = codec.roundtrip(torch.zeros(2, 10), sending).kept
    assert kept is not None and kept.sum(1).tolist() == [1, 1]


def test_what_makes_up_by_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="unbiased scales up"):
        Codec.parse("feedback(randomk(0.1, unbiased=True))")
