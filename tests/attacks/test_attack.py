"""What holds for every attack: who lies, whose rows change, and what the noise depends on."""

from __future__ import annotations

import pytest
import torch
from cohorts import cohorts, forged, forging, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanse.attacks import Attack, Cohort, backdoor, label_flip, sign_flip
from hanse.core.errors import ConfigError
from hanse.core.streams import Streams

DATA = ["label_flip", "backdoor"]
ALONE = [
    *("sign_flip(2)", "scaled", "random", "random('uniform', 3)", "gaussian(0.5)", "drop(0.5)"),
    *("inversion", "sign_random", "rescale", "free_rider(0.5)"),
]
"""What a liar sends depends on its own update alone."""
OMNISCIENT = ["alie", "alie(1.5)", "ipm", "mimic", "mimic(2)", "free_rider"]
MESSAGES = ["damaged"]
EVERY = DATA + MESSAGES + ALONE + OMNISCIENT


def test_every_attack_is_tried_here() -> None:
    assert {Attack.parse(text).short_name for text in EVERY} == set(Attack.registry())


# ---- who lies


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 300), st.integers(0, 9))
def test_as_many_lie_as_the_share_says(share: float, clients: int, seed: int) -> None:
    liars = sign_flip(share=share).liars(clients, Streams(seed))
    assert liars.dtype == torch.bool and liars.shape == (clients,)
    assert int(liars.sum()) == round(share * clients)


def test_the_same_clients_lie_under_every_attack_of_a_seed() -> None:
    drawn = [Attack.parse(text).liars(100, Streams(5)) for text in EVERY]
    assert int(drawn[0].sum()) == 20
    assert all(torch.equal(drawn[0], other) for other in drawn)
    assert not torch.equal(drawn[0], sign_flip().liars(100, Streams(6)))


def test_liars_are_spread_over_all_clients() -> None:
    often = torch.stack([sign_flip(share=0.5).liars(10, Streams(seed)) for seed in range(400)]).double().mean(0)
    assert bool(((often - 0.5).abs() < 0.1).all())  # four standard deviations


@pytest.mark.parametrize(
    "text", ["sign_flip(share=1)", "sign_flip(share=-0.1)", "sign_flip(0)", "alie(float('inf'))", "ipm(-1)", "drop(0)"]
)
def test_what_is_no_attack_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not allowed|cannot read"):
        Attack.parse(text)


# ---- whose rows change


@pytest.mark.parametrize("text", EVERY)
@settings(max_examples=25)
@given(cohorts())
def test_rows_of_the_honest_keep_their_bits(text: str, cohort: tuple[Tensor, Tensor]) -> None:
    values, lies = cohort
    before = values.clone()
    sent = forged(text, values, lies)
    assert sent.shape == values.shape and sent.dtype == values.dtype
    assert torch.equal(sent[~lies], before[~lies]) and torch.equal(values, before)
    assert bool(sent.isfinite().all())


@pytest.mark.parametrize("text", EVERY)
def test_nobody_lies_nothing_changes(text: str) -> None:
    values = rows(4, 5)
    assert forged(text, values, torch.zeros(4, dtype=torch.bool)) is values


@pytest.mark.parametrize("text", DATA)
def test_who_lies_about_data_sends_what_it_computed(text: str) -> None:
    values = rows(4, 5)
    assert forged(text, values, torch.tensor([True, False, True, True])) is values


@pytest.mark.parametrize("text", ALONE + OMNISCIENT)
def test_liars_do_lie(text: str) -> None:
    values, lies = rows(6, 50), torch.tensor([True, False, False, True, False, False])
    sent = forged(text, values, lies)
    assert not bool((sent[lies] == values[lies]).all(1).any())


@pytest.mark.parametrize("text", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_stay(text: str, dtype: torch.dtype) -> None:
    values = rows(5, 20).to(dtype)
    assert forged(text, values, torch.tensor([True, False, False, True, False])).dtype == dtype


@pytest.mark.parametrize("text", EVERY)
@settings(max_examples=25)
@given(cohorts())
def test_together_all_send_the_mean_of_what_each_would(text: str, cohort: tuple[Tensor, Tensor]) -> None:
    values, lies = cohort
    attack = Attack.parse(text)
    alone = forged(attack, values, lies)
    one = forged(type(attack)(**{**dict(attack), "together": True}), values, lies)
    assert torch.equal(one[~lies], values[~lies])
    torch.testing.assert_close(one[lies], alone[lies].mean(0).expand_as(one[lies]), rtol=0, atol=0)


# ---- what the noise depends on


@pytest.mark.parametrize("text", DATA + ALONE)
@settings(max_examples=25)
@given(cohorts())
def test_side_by_side_equals_one_by_one(text: str, cohort: tuple[Tensor, Tensor]) -> None:
    values, lies = cohort
    together = forged(text, values, lies)
    ids = torch.arange(len(values))
    alone = [forged(text, values[i : i + 1], lies[i : i + 1], ids[i : i + 1]) for i in range(len(values))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=0)  # a norm of 9 numbers may round otherwise


@pytest.mark.parametrize("text", EVERY)
@settings(max_examples=25)
@given(cohorts(), st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(text: str, cohort: tuple[Tensor, Tensor], random: object) -> None:
    values, lies = cohort
    order = list(range(len(values)))
    random.shuffle(order)  # type: ignore[attr-defined]
    p = torch.tensor(order)
    torch.testing.assert_close(forged(text, values[p], lies[p], p), forged(text, values, lies)[p], rtol=1e-14, atol=0)


RANDOM = ["random", "random('uniform')", "gaussian", "drop(0.5)", "inversion", "sign_random", "rescale", "free_rider"]


@pytest.mark.parametrize("text", RANDOM)
def test_noise_follows_seed_round_client_and_vector_and_nothing_else(text: str) -> None:
    values, lies = rows(1, 40).repeat(3, 1), torch.tensor([True, True, False])
    one = forged(text, values, lies)
    assert torch.equal(one, forged(text, values, lies))
    assert not torch.equal(one[0], one[1])
    for other in ({"seed": 1}, {"rounds": 4}, {"name": "c"}, {"ids": torch.tensor([7, 8, 9])}):
        assert not torch.equal(one, forged(text, values, lies, **other)), other
    # rounds are the clients' own
    mixed = forged(text, values, lies, rounds=torch.tensor([3, 4, 3]))
    assert torch.equal(mixed[0], one[0]) and torch.equal(mixed[1], forged(text, values, lies, rounds=4)[1])


def test_attacks_draw_different_noise() -> None:
    values, lies = torch.zeros(1, 30), torch.tensor([True])
    assert not torch.equal(forged("gaussian", values, lies), forged("random", values, lies))


# ---- an attack of one's own


class halve(Attack):
    """As a user would write it."""

    abstract = True  # not to be found by other tests

    def forged(self, cohort: Cohort) -> Tensor:
        return cohort.own / 2


def test_an_attack_of_ones_own_takes_one_method() -> None:
    values, lies = rows(3, 4), torch.tensor([False, True, False])
    assert torch.equal(halve().forge(values, lies, forging(torch.arange(3), 4))[1], values[1] / 2)


def test_a_cohort_knows_who_is_honest_in_the_order_of_their_numbers() -> None:
    values, ids = rows(3, 4), torch.tensor([5, 3, 8])
    seen = Cohort(values, torch.tensor([False, True, False]), forging(ids, 4), "any")
    assert torch.equal(seen.own, values[1:2]) and torch.equal(seen.honest, values[[0, 2]])
    assert seen.honest_clients.tolist() == [5, 8]
    alone = Cohort(values, torch.ones(3, dtype=torch.bool), forging(ids, 4), "any")
    assert torch.equal(alone.honest, values[[1, 0, 2]]) and alone.honest_clients.tolist() == [3, 5, 8]


def test_only_attacks_with_a_target_have_something_to_probe() -> None:
    x, y = torch.rand(6, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    measured = {text for text in EVERY if Attack.parse(text).probe(x, y) is not None}
    assert measured == {"backdoor"}
    assert backdoor().probe(x, torch.zeros(6, dtype=torch.long)) is None
    assert label_flip(1, 2).probe(x, y) is not None and label_flip(1, 2).probe(x, torch.zeros(6, dtype=torch.long)) is None
