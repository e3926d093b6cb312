"""What the server sees of replies."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hanse.core.messages import Reply


def reply_of(values: Tensor, weight: Tensor, sent: Tensor | None = None, scale: Tensor | None = None, **rest: Any) -> Reply:
    """What the server sees when clients send rows of ``values`` ``[C, P]``, of those who have not ``sent`` nothing."""
    if sent is not None:
        values = values * sent[:, None]
    return Reply(
        clients=torch.arange(len(weight)),
        versions=torch.zeros(len(weight)).long(),
        weight=weight,
        sums={"delta": weight @ values},
        rows={},
        senders={} if sent is None else {"delta": sent},
        loss=torch.zeros(len(weight)),
        population=10,
        starts={},
        scaled=None if scale is None else {"delta": (scale * weight) @ values},
        scale=scale,
        **rest,
    )


WEIGHT, VALUES = torch.tensor([1.0, 3.0]), torch.tensor([[1.0, 2.0], [5.0, 6.0]])


def test_the_mean_is_weighted() -> None:
    reply = reply_of(VALUES, WEIGHT)
    assert len(reply) == 2 and torch.equal(reply.mean("delta"), torch.tensor([4.0, 5.0]))
    assert torch.equal(reply.shares, torch.tensor([0.25, 0.75]))


def test_a_schedule_may_count_contributions_less_and_divide_by_more() -> None:
    """``mean`` follows it; the books, ``sums`` and ``weight``, do not."""
    discounted = reply_of(VALUES, WEIGHT, scale=torch.tensor([1.0, 0.5]))
    assert torch.equal(discounted.mean("delta"), (1 * VALUES[0] + 1.5 * VALUES[1]) / 4)
    assert torch.equal(discounted.shares, torch.tensor([0.25, 0.375]))
    everyone = reply_of(VALUES, WEIGHT, scale=torch.tensor([2.0, 1.0]), total=8.0)
    assert torch.equal(everyone.mean("delta"), (2 * VALUES[0] + 3 * VALUES[1]) / 8)
    assert torch.equal(everyone.shares, torch.tensor([0.25, 0.375]))
    for reply in (discounted, everyone):
        assert torch.equal(reply.sums["delta"], WEIGHT @ VALUES) and torch.equal(reply.weight, WEIGHT)


numbers = st.floats(0.125, 8, width=32)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6), st.none() | st.floats(1, 100), st.booleans())
def test_the_mean_is_the_sum_of_shares(clients: list[tuple[float, float]], total: float | None, scaled: bool) -> None:
    weight, scale = torch.tensor(clients, dtype=torch.float64).unbind(1)
    values = torch.randn(len(weight), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reply = reply_of(values, weight, scale=scale if scaled else None, total=total)
    torch.testing.assert_close(reply.mean("delta"), reply.shares @ values, rtol=1e-12, atol=1e-12)


def test_the_mean_is_over_those_who_sent() -> None:
    sent = torch.tensor([False, True])
    assert torch.equal(reply_of(VALUES, WEIGHT, sent).mean("delta"), VALUES[1])
    assert torch.equal(reply_of(VALUES, WEIGHT, sent, scale=torch.tensor([1.0, 0.5])).mean("delta"), VALUES[1] / 2)
    assert torch.equal(reply_of(VALUES, WEIGHT, ~sent).mean("delta"), VALUES[0])


def test_a_total_counts_those_who_sent_as_their_share_of_the_reply() -> None:
    """Three quarters of the weight sent it, so that three quarters of the total stand for them."""
    reply = reply_of(VALUES, WEIGHT, torch.tensor([False, True]), total=8.0)
    assert torch.equal(reply.mean("delta"), 3 * VALUES[1] / (8 * 0.75))


def test_what_nobody_sent_has_mean_zero() -> None:
    assert torch.equal(reply_of(VALUES, WEIGHT, torch.zeros(2).bool()).mean("delta"), torch.zeros(2))
    assert torch.equal(reply_of(VALUES, WEIGHT, torch.zeros(2).bool(), total=8.0).mean("delta"), torch.zeros(2))


def test_what_counts_nothing_is_not_shown_to_a_robust_mean() -> None:
    """Five of ones, of which two came too late: their zeros would be two liars' worth of rows."""
    rows, five = torch.ones(5, 3), torch.arange(5)
    seen: list[Tensor] = []

    def aggregate(values: Tensor, weight: Tensor) -> Tensor:
        seen.append(values)
        return values.mean(0)

    scale = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.0])
    made = Reply(
        five, five, torch.ones(5), {}, {}, {}, torch.zeros(5), 5, {}, scale=scale, each={"delta": rows}, aggregate=aggregate
    )
    torch.testing.assert_close(made.mean("delta"), torch.full((3,), 2.5 / 3))
    assert len(seen[0]) == 3
    late = Reply(
        five, five, torch.ones(5), {}, {}, {}, torch.zeros(5), 5, {}, scale=0 * scale, each={"delta": rows}, aggregate=aggregate
    )
    assert not late.mean("delta").any() and len(seen) == 1
