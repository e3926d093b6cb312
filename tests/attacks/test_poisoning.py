"""Liars that train on data that they have changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hanse.attacks import Attack, backdoor, label_flip
from hanse.attacks.poisoning import changed, owned
from hanse.core.errors import ConfigError
from hanse.core.samples import Samples
from hanse.core.streams import Streams

CLASSES = 5


def dealt(counts: list[int], index: str = "none", shape: tuple[int, ...] = (16,), seed: int = 0) -> Samples:
    """Random pictures of random classes, of which client 0's first is of the last class.

    ``index``: none, shuffled (and some rows are nobody's) or shared (some rows are several clients').
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    x = torch.rand((total + 3, *shape), generator=generator)
    y = torch.randint(CLASSES, (total + 3,), generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = torch.randperm(total + 3, generator=generator)[:total] if index != "none" else torch.arange(total)
    if index == "shared":
        rows = rows[torch.randint(max(1, total // 2), (total,), generator=generator)]
    y[rows[0]] = CLASSES - 1
    return Samples(x[:total], y[:total], offsets) if index == "none" else Samples(x, y, offsets, rows)


def copied(samples: Samples) -> Samples:
    index = None if samples.index is None else samples.index.clone()
    return Samples(samples.x.clone(), samples.y.clone(), samples.offsets.clone(), index)


def same(a: Samples, b: Samples) -> bool:
    indexes = a.index is b.index if a.index is None or b.index is None else torch.equal(a.index, b.index)
    return indexes and torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.offsets, b.offsets)


indexes = st.sampled_from(["none", "shuffled", "shared"])
people = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=6)
"""How many samples each client has, and whether it lies."""


@pytest.mark.parametrize("text", ["label_flip", "label_flip(4, 0)", "backdoor", "backdoor(1, 1.0, 4)"])
@settings(max_examples=25)
@given(people, indexes)
def test_the_honest_keep_their_samples_and_everybody_else_s_run_too(text: str, clients: list[tuple[int, bool]], index: str) -> None:
    samples = dealt([n for n, _ in clients], index)
    before, liars = copied(samples), torch.tensor([lies for _, lies in clients])
    poisoned = Attack.parse(text).poison(samples, liars, Streams(0))
    assert same(samples, before)
    assert torch.equal(poisoned.offsets, samples.offsets)
    for client in (~liars).nonzero()[:, 0].tolist():
        assert all(torch.equal(a, b) for a, b in zip(poisoned.of(client), before.of(client), strict=True))
    assert liars.any() or poisoned is samples
    again = Attack.parse(text).poison(samples, liars, Streams(0))
    assert same(again, poisoned)


# ---- in place of some samples, others


@given(people, indexes, st.booleans())
def test_places_get_what_they_are_given(clients: list[tuple[int, bool]], index: str, pictures: bool) -> None:
    samples = dealt([n for n, _ in clients], index)
    places = owned(samples, torch.tensor([lies for _, lies in clients]))
    x, y = torch.rand(len(places), 16), torch.arange(len(places)) + 100
    after = changed(samples, places, y, x if pictures else None)
    got, labels = after.take(places)
    assert torch.equal(labels, y) and torch.equal(got, x if pictures else samples.take(places)[0])
    rest = torch.ones(int(samples.offsets[-1]), dtype=torch.bool).index_fill(0, places, False).nonzero()[:, 0]
    assert all(torch.equal(a, b) for a, b in zip(after.take(rest), samples.take(rest), strict=True))


def test_only_what_changes_is_copied() -> None:
    places, y, x = torch.tensor([1, 3]), torch.tensor([0, 0]), torch.zeros(2, 16)
    for index in ("none", "shuffled"):
        samples = dealt([2, 3], index)
        labels, both = changed(samples, places, y), changed(samples, places, y, x)
        assert labels.x is samples.x and labels.index is samples.index and both.index is samples.index
        assert len(both.x) == len(samples.x)
        assert changed(samples, places[:0], y[:0]) is samples


def test_owned_places_are_those_between_the_offsets() -> None:
    assert owned(dealt([2, 3, 1, 2]), torch.tensor([False, True, False, True])).tolist() == [2, 3, 4, 6, 7]


# ---- label flips


@given(people, indexes)
def test_every_class_becomes_its_opposite(clients: list[tuple[int, bool]], index: str) -> None:
    samples, liars = dealt([n for n, _ in clients], index), torch.tensor([lies for _, lies in clients])
    poisoned = label_flip().poison(samples, liars, Streams(0))
    for client in liars.nonzero()[:, 0].tolist():
        (x, y), (old_x, old_y) = poisoned.of(client), samples.of(client)
        assert torch.equal(x, old_x) and torch.equal(y, int(samples.y.max()) - old_y)


@given(people, indexes)
def test_flipping_twice_is_nothing(clients: list[tuple[int, bool]], index: str) -> None:
    samples = dealt([5, *(n for n, _ in clients)], index)
    liars = torch.tensor([False, *(lies for _, lies in clients)])  # client 0 keeps the last class in the data
    flip = label_flip()
    twice = flip.poison(flip.poison(samples, liars, Streams(0)), liars, Streams(0))
    for client in range(len(liars)):
        assert all(torch.equal(a, b) for a, b in zip(twice.of(client), samples.of(client), strict=True))


def test_one_class_is_given_out_for_another() -> None:
    samples = dealt([30, 30])
    poisoned = label_flip(1, 4).poison(samples, torch.tensor([False, True]), Streams(0))
    old, new = samples.of(1)[1], poisoned.of(1)[1]
    assert torch.equal(new, torch.where(old == 1, 4, old)) and bool((old == 1).any())


def test_a_flip_has_succeeded_where_the_source_is_taken_for_the_target() -> None:
    x, y = torch.rand(6, 16), torch.tensor([1, 0, 1, 7, 2, 1])
    probe = label_flip(1, 7).probe(x, y)
    assert probe is not None and torch.equal(probe[0], x[[0, 2, 5]]) and probe[1].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label_flip(1)", "both or not at all"),
        ("label_flip(target=1)", "both or not at all"),
        ("label_flip(2, 2)", "have to differ"),
        ("label_flip(-1, 2)", "-1 is not allowed"),
        ("backdoor(rate=0)", "backdoor.rate: 0 is not allowed"),
        ("backdoor(size=0)", "backdoor.size: 0 is not allowed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Attack.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label_flip(5, 1)", "label_flip.source: 5 is not allowed: the data have classes 0 to 4"),
        ("label_flip(1, 5)", "label_flip.target: 5 is not allowed: the data have classes 0 to 4"),
        ("backdoor(5)", "backdoor.target: 5 is not allowed: the data have classes 0 to 4"),
        ("backdoor(size=5)", "backdoor.size: 5 is not allowed: the pictures are 4x4"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Attack.parse(text).poison(dealt([4, 4]), torch.tensor([True, False]), Streams(0))


@pytest.mark.parametrize("text", ["label_flip", "backdoor"])
@pytest.mark.parametrize("y", [torch.zeros(4), torch.zeros(4, 2, dtype=torch.long)], ids=["numbers", "sequences"])
def test_labels_that_are_no_classes_are_refused(text: str, y: Tensor) -> None:
    samples = Samples(torch.rand(4, 16), y, torch.tensor([0, 2, 4]))
    with pytest.raises(ConfigError, match=f"{text}: labels of type .* are not allowed"):
        Attack.parse(text).poison(samples, torch.tensor([True, False]), Streams(0))


# ---- the backdoor


def patch(x: Tensor, size: int) -> Tensor:
    """The square of every picture, ``[N, ...]``."""
    pictures = x if x.dim() == 4 else x.view(len(x), 4, 4)
    return pictures[..., -size:, -size:]


@pytest.mark.parametrize("shape", [(16,), (1, 4, 4), (3, 4, 6)], ids=["flat", "grey", "colour"])
@pytest.mark.parametrize("index", ["none", "shuffled"])
def test_a_share_of_each_liar_s_pictures_gets_the_square_and_the_target(shape: tuple[int, ...], index: str) -> None:
    counts, liars = [8, 5, 1, 12], torch.tensor([True, False, True, True])
    samples = dealt(counts, index, shape)
    poisoned = backdoor(target=2, rate=0.25, size=2).poison(samples, liars, Streams(0))
    top = samples.x.max()
    for client, most in ((0, 2), (2, 0), (3, 3)):  # a quarter, rounded
        (x, y), (old_x, old_y) = poisoned.of(client), samples.of(client)
        hit = (x != old_x).flatten(1).any(1)
        assert int(hit.sum()) == most
        assert torch.equal(y, torch.where(hit, 2, old_y))
        assert bool((patch(x[hit], 2) == top).all())
        outside = torch.ones_like(x)
        patch(outside, 2).zero_()
        assert torch.equal(x * outside, old_x * outside)


@given(st.floats(0.01, 1), st.integers(1, 40), st.integers(0, 9))
def test_the_share_is_rounded_and_drawn_from_all_of_the_liar_s_samples(rate: float, count: int, seed: int) -> None:
    samples = dealt([3, count, 4])
    samples.x[0, 0] = 2.0  # brighter than anything the liar has
    poisoned = backdoor(rate=rate, size=1).poison(samples, torch.tensor([False, True, False]), Streams(seed))
    assert abs(int((poisoned.of(1)[0][:, -1] == 2).sum()) - rate * count) <= 0.5 + 1e-4


def test_which_pictures_follows_seed_and_client_and_not_who_else_lies() -> None:
    samples = dealt([20, 20, 20])

    def hit(lies: list[bool], seed: int) -> Tensor:
        return (backdoor().poison(samples, torch.tensor(lies), Streams(seed)).of(1)[0] != samples.of(1)[0]).any(1)

    assert torch.equal(hit([False, True, False], 0), hit([True, True, True], 0))
    assert not torch.equal(hit([False, True, False], 0), hit([False, True, False], 1))


def test_the_probe_shows_other_classes_with_the_square() -> None:
    x, y = torch.rand(6, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    before = x.clone()
    probe = backdoor(target=1, size=2).probe(x, y)
    assert probe is not None
    shown, wanted = probe
    assert wanted.tolist() == [1] * 4 and torch.equal(x, before)
    assert bool((patch(shown, 2) == x[[0, 2, 3, 5]].max().new_tensor(float(x.max()))).all())
    assert torch.equal(shown.view(4, 4, 4)[:, :2], x[[0, 2, 3, 5]].view(4, 4, 4)[:, :2])


@pytest.mark.parametrize(
    "x",
    [torch.rand(4, 15), torch.rand(4, 4, 4), torch.rand(4), torch.zeros(4, 16, dtype=torch.long)],
    ids=["not square", "no channels", "numbers", "whole numbers"],
)
def test_what_is_no_picture_is_refused(x: Tensor) -> None:
    y = torch.tensor([0, 1, 2, 1])
    with pytest.raises(ConfigError, match=r"backdoor: samples of type .* are not allowed"):
        backdoor(size=1).probe(x, y)
    with pytest.raises(ConfigError, match=r"backdoor: samples of type .* are not allowed"):
        backdoor(size=1).poison(Samples(x, y, torch.tensor([0, 2, 4])), torch.tensor([True, False]), Streams(0))
