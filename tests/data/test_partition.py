import dataclasses
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse.core.errors import ConfigError, DataError
from hanse.core.samples import Samples
from hanse.core.streams import Streams
from hanse.data import partition as module
from hanse.data.partition import Partition, dirichlet, feature_shift, iid, natural, neighbouring, quantity, shards
from hanse.data.task import Dataset, Split


def numbered_data(labels: torch.Tensor, classes: int, owner: torch.Tensor | None = None) -> Dataset:
    """Samples that are their own row number, so that a split shows where each one went."""
    x = torch.arange(len(labels), dtype=torch.float64)[:, None]
    return Dataset(x, labels, x[:1], labels[:1], labels, tuple(map(str, range(classes))), owner)


def even_classes(samples: int, classes: int) -> Dataset:
    return numbered_data(torch.arange(samples) % classes, classes)


def rows(samples: Samples, client: int) -> list[int]:
    return samples.of(client)[0].flatten().long().tolist()


def everything(split: Split) -> list[int]:
    """Rows of all train, test and newcomer parts."""
    parts = [split.train, split.test] + ([split.newcomers] if split.newcomers else [])
    return [row for part in parts for client in range(part.clients) for row in rows(part, client)]


@st.composite
def cases(draw):
    clients, newcomers = draw(st.integers(1, 12)), draw(st.integers(0, 3))
    classes = draw(st.integers(1, 5))
    least = draw(st.integers(1, 3))
    size = draw(st.integers(3 * (clients + newcomers), 120))
    labels = torch.tensor(draw(st.lists(st.integers(0, classes - 1), min_size=size, max_size=size)))
    common = {"test": draw(st.sampled_from([0.0, 0.2, 0.5, 0.99])), "newcomers": newcomers}
    kind = draw(st.sampled_from(["iid", "dirichlet", "shards", "quantity", "feature_shift"]))
    own = {
        "iid": {},
        "dirichlet": {"alpha": draw(st.sampled_from([1e-3, 0.1, 1.0, 1e3])), "min_samples": least},
        "shards": {"per_client": least},
        "quantity": {"sigma": draw(st.sampled_from([0.0, 1.0, 5.0]))},
        "feature_shift": {"change": "noise", "domains": 1},  # a single domain: samples stay recognisable
    }[kind]
    return Partition.named(kind)(**own, **common), numbered_data(labels, classes), clients, draw(st.integers(0, 3))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_every_sample_has_one_place_and_nobody_is_empty(case):
    part, data, clients, seed = case
    split = part.split(data, clients, Streams(seed))
    assert sorted(everything(split)) == list(range(len(data.x)))
    assert split.train.clients == split.test.clients == clients
    assert (split.train.counts() >= 1).all()
    assert (split.newcomers.clients if split.newcomers else 0) == part.newcomers
    own = split.train.counts() + split.test.counts()
    assert torch.equal(split.test.counts(), (part.test * own + 0.5).floor().long().minimum(own - 1))
    if isinstance(part, dirichlet):
        assert own.min() >= part.min_samples


@settings(max_examples=30, deadline=None)
@given(cases())
def test_a_split_follows_its_seed_and_nothing_else(case):
    part, data, clients, seed = case
    streams = Streams(seed)
    first = part.split(data, clients, streams)
    streams.numpy("task").random(100), streams.numpy("another purpose").random(100), torch.rand(7)
    again = part.split(data, clients, streams)
    assert torch.equal(first.train.x, again.train.x) and torch.equal(first.train.offsets, again.train.offsets)
    assert torch.equal(first.test.x, again.test.x) and torch.equal(first.groups, again.groups)


def test_another_seed_gives_another_split():
    data = even_classes(200, 4)
    for part in (iid(), dirichlet(), shards(), quantity(), neighbouring()):
        assert everything(part.split(data, 10, Streams(0))) != everything(part.split(data, 10, Streams(1)))


def test_labels_travel_with_samples_and_groups_count_training_samples():
    data = even_classes(300, 3)
    split = dirichlet(0.5).split(data, 10, Streams(0))
    for client in range(10):
        x, y = split.train.of(client)
        assert torch.equal(y, data.y[x.flatten().long()])
        assert torch.equal(split.groups[client], torch.bincount(y, minlength=3))


def test_iid_clients_differ_by_at_most_one_sample():
    counts = iid(test=0).split(even_classes(1003, 10), 100, Streams(0)).train.counts()
    assert sorted(set(counts.tolist())) == [10, 11] and counts.sum() == 1003


def label_entropy(split: Split) -> float:
    share = split.groups / split.groups.sum(1, keepdim=True)
    return float(torch.special.entr(share).sum(1).mean())


def test_dirichlet_alpha_orders_label_skew():
    data = even_classes(20_000, 10)
    skew = [label_entropy(dirichlet(alpha).split(data, 50, Streams(0))) for alpha in (1e-300, 0.01, 0.1, 1.0, 10.0, 1e9)]
    assert skew == sorted(skew)
    assert skew[0] == 0  # a single class each
    assert skew[-1] > 0.99 * torch.tensor(10.0).log()


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution():
    alpha, clients, classes, each = 0.5, 20, 100, 1000
    data = even_classes(classes * each, classes)
    share = dirichlet(alpha, test=0).split(data, clients, Streams(3)).groups / each
    assert share.sum(0).allclose(torch.ones(classes))
    mean = 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    assert float(share.var()) == pytest.approx(variance, rel=0.1)


def test_dirichlet_fills_up_poor_clients_from_the_richest_only():
    data = even_classes(400, 4)
    before = dirichlet(0.05, test=0).split(data, 20, Streams(2)).train.counts()
    after = dirichlet(0.05, min_samples=8, test=0).split(data, 20, Streams(2)).train.counts()
    assert before.min() < 8
    assert torch.equal(after[before < 8], torch.full_like(after[before < 8], 8))
    gave = after < before
    level = after[gave].max()
    assert (before[gave] > level).all() and after[gave].min() >= level - 1  # the givers end up level
    assert (before[~gave & (before >= 8)] <= level).all()


def test_shards_hold_at_most_the_classes_of_their_pieces():
    data = even_classes(1000, 10)
    straddling = 0  # 100 samples a class, 50 a shard: no shard crosses a border
    classes = (shards(2, test=0).split(data, 10, Streams(0)).groups > 0).sum(1)
    assert classes.max() <= 2 + straddling and classes.min() >= 1
    uneven = shards(2, test=0).split(data, 7, Streams(0))  # 14 shards, 9 inner borders
    assert (uneven.groups > 0).sum() <= 14 + 9
    assert uneven.train.counts().max() - uneven.train.counts().min() <= 2


def test_quantity_skew_grows_with_sigma_and_keeps_labels_even():
    data = even_classes(10_000, 2)
    spread = [float(quantity(s, test=0).split(data, 20, Streams(0)).train.counts().double().std()) for s in (0.0, 0.5, 1.0, 2.0)]
    assert spread == sorted(spread) and spread[0] < 1
    large = quantity(1.0, test=0).split(data, 20, Streams(0)).groups
    biggest = large[large.sum(1).argmax()].double()
    assert abs(biggest[0] / biggest.sum() - 0.5) < 0.05


def test_natural_keeps_owners_together_and_drops_the_smallest():
    owner = torch.tensor([3] * 5 + [0] * 4 + [7] * 6 + [1] * 1)  # numbers need not be dense
    data = numbered_data(torch.zeros(16, dtype=torch.long), 1, owner)
    split = natural(test=0).split(data, 3, Streams(0))
    assert [sorted(rows(split.train, c)) for c in range(3)] == [[5, 6, 7, 8], [0, 1, 2, 3, 4], [9, 10, 11, 12, 13, 14]]
    whole = natural(test=0).split(data, 4, Streams(0))
    assert sorted(everything(whole)) == list(range(16))
    with pytest.raises(ConfigError, match=r"clients: 5 .* the task has 4 natural clients"):
        natural().split(data, 5, Streams(0))
    with pytest.raises(ConfigError, match="names no owners"):
        natural().split(even_classes(10, 2), 2, Streams(0))


def picture_data() -> Dataset:
    x = torch.arange(40 * 9).float().view(40, 1, 3, 3)
    y = torch.arange(40) % 2
    return Dataset(x, y, x[:8], y[:8], y, ("even", "odd"))


def test_feature_shift_turns_the_pictures_of_a_domain():
    data, part = picture_data(), feature_shift("rotate", 4)
    assert part.domain(torch.arange(6)).tolist() == [0, 1, 2, 3, 0, 1]
    split = part.split(data, 6, Streams(0))
    for client in range(6):
        for samples in (split.train, split.test):
            upright = torch.rot90(samples.of(client)[0], -(client % 4), (-2, -1))
            original = data.x[(upright[:, 0, 0, 0] / 9).long()]
            assert torch.equal(upright, original)
    turned = [
        [torch.equal(torch.rot90(x, d, (-2, -1)), y) for d in range(4)] for x, y in zip(data.test_x, split.test_x, strict=True)
    ]
    assert torch.tensor(turned).sum(0).tolist() == [2, 2, 2, 2]
    assert torch.equal(data.x, picture_data().x)  # the task's own data are left alone


def test_feature_shift_takes_flat_square_pictures():
    data = picture_data()
    flat = dataclasses.replace(data, x=data.x.flatten(1), test_x=data.test_x.flatten(1))
    a, b = (feature_shift("rotate").split(d, 5, Streams(0)).train.x for d in (data, flat))
    assert torch.equal(a.flatten(1), b)


def test_feature_shift_noise_and_contrast_grow_with_the_domain():
    y = torch.arange(3000) % 2
    x = torch.cat([torch.zeros(1500, 4), torch.ones(1500, 4)])
    data = Dataset(x, y, x, y, y, ("0", "1"))
    noisy = feature_shift("noise", domains=3, strength=1.0).split(data, 3, Streams(0)).train
    noise = [float((noisy.of(c)[0] - noisy.of(c)[0].round().clamp(0, 1)).abs().mean()) for c in range(3)]
    assert noise[0] == 0 < noise[1] < noise[2]
    faded = feature_shift("contrast", domains=3, strength=1.0).split(data, 3, Streams(0)).train
    for c, contrast in enumerate((1.0, 0.5, 0.0)):
        values = faded.of(c)[0]
        assert float(values.max() - values.min()) == pytest.approx(contrast, abs=1e-6)
        assert float(values.max() + values.min()) / 2 == pytest.approx(0.5, abs=1e-6)


def test_feature_shift_refuses_what_it_cannot_change():
    data = even_classes(20, 2)
    with pytest.raises(ConfigError, match=r"feature_shift.domains: 5 .* 4 rotations"):
        feature_shift("rotate", 5).split(data, 2, Streams(0))
    with pytest.raises(ConfigError, match=r"feature_shift.strength: 2.0"):
        feature_shift("contrast", strength=2).split(data, 2, Streams(0))
    with pytest.raises(DataError, match=r"shape \(2,\) cannot be rotated"):
        feature_shift("rotate").split(dataclasses.replace(data, x=torch.zeros(20, 2)), 2, Streams(0))
    with pytest.raises(DataError, match=r"torch.int64 cannot be changed"):
        feature_shift("noise").split(dataclasses.replace(data, x=torch.zeros(20, 2).long()), 2, Streams(0))


def test_newcomers_are_apart_from_the_training_clients():
    data = even_classes(120, 3)
    split = dirichlet(1.0, newcomers=4).split(data, 8, Streams(0))
    assert split.train.clients == 8 and split.newcomers.clients == 4 and split.groups.shape == (8, 3)
    assert sorted(everything(split)) == list(range(120))


def test_large_data_stay_where_they_are(monkeypatch):
    data, part = even_classes(500, 5), dirichlet(0.3, newcomers=2)
    copied = part.split(data, 10, Streams(0))
    monkeypatch.setattr(module, "COPY_BYTES", 0)
    indexed = part.split(data, 10, Streams(0))
    assert copied.train.index is None and indexed.train.x is indexed.test.x is indexed.newcomers.x is data.x
    for a, b in ((copied.train, indexed.train), (copied.test, indexed.test), (copied.newcomers, indexed.newcomers)):
        for client in range(a.clients):
            assert all(map(torch.equal, a.of(client), b.of(client)))
    moved = indexed.to("cpu", torch.float32)
    assert moved.train.x.dtype == torch.float32
    assert moved.train.x is moved.test.x is moved.newcomers.x  # a move does not multiply them


def test_a_million_clients_split_in_seconds():
    y = torch.zeros(2_000_000, dtype=torch.long)
    x = torch.arange(2_000_000 * 5).view(-1, 5)
    began = time.perf_counter()
    split = iid().split(Dataset(x, y, x[:1], y[:1], y, ("one",)), 1_000_000, Streams(0))
    assert time.perf_counter() - began < 5
    assert split.train.clients == 1_000_000 and split.train.x is x and split.groups is None
    assert torch.equal(split.train.counts(), torch.full((1_000_000,), 2))
    assert torch.equal(split.train.index.sort().values, torch.arange(2_000_000))


@pytest.mark.parametrize("part", [iid(), dirichlet(), shards(1), quantity(), feature_shift("noise")])
def test_more_clients_than_samples(part):
    with pytest.raises(ConfigError, match=r"clients: 11 .* 10 training samples"):
        part.split(even_classes(10, 2), 11, Streams(0))
    assert part.split(even_classes(10, 2), 10, Streams(0)).train.counts().tolist() == [1] * 10


@pytest.mark.parametrize(("part", "message"), [(dirichlet(min_samples=3), "at most 2 samples"), (shards(3), "at most 2 shards")])
def test_clients_that_cannot_all_be_served(part, message):
    with pytest.raises(ConfigError, match=message):
        part.split(even_classes(10, 2), 5, Streams(0))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_without_a_name(label):
    labels = torch.arange(30) % 3
    labels[7] = label
    with pytest.raises(DataError, match=rf"label {label} is not allowed: 0 to 2"):
        dirichlet().split(numbered_data(labels, 3), 4, Streams(0))


def test_labels_and_samples_of_different_number():
    data = even_classes(10, 2)
    with pytest.raises(DataError, match="group: 9 entries do not fit 10 samples"):
        iid().split(dataclasses.replace(data, group=data.group[:9]), 2, Streams(0))


def test_a_negative_owner():
    data = numbered_data(torch.zeros(3, dtype=torch.long), 1, torch.tensor([0, -1, 1]))
    with pytest.raises(DataError, match="owner -1 is not allowed: 0 or more"):
        natural().split(data, 1, Streams(0))


def test_an_empty_client_is_named():
    class lazy(Partition):
        """Gives client 1 nothing."""

        def deal(self, data, clients, streams):
            return torch.arange(len(data.x)), torch.tensor([len(data.x), 0])

    try:
        with pytest.raises(DataError, match="partition lazy: client 1 of 2 has no training sample"):
            lazy().split(even_classes(10, 2), 2, Streams(0))
    finally:
        lazy.abstract = True


@pytest.mark.parametrize(
    "text",
    [
        "dirichlet(0)",
        "dirichlet(-1)",
        "dirichlet(1e999)",
        "iid(test=1)",
        "iid(newcomers=-1)",
        "shards(0)",
        "quantity(-0.1)",
        "feature_shift('blur')",
    ],
)
def test_values_out_of_range(text):
    with pytest.raises(ConfigError, match="is not allowed"):
        Partition.parse(text)


def test_positional_values_are_the_partitions_own():
    assert dirichlet(0.1) == Partition.parse("dirichlet(0.1)") == dirichlet(alpha=0.1)
    assert str(dirichlet(0.1, test=0)) == "dirichlet(alpha=0.1, test=0.0)"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_neighbouring_classes_are_dealt_evenly_to_all_who_have_them(data):
    classes, clients = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 12))
    wide, seed = data.draw(st.integers(1, classes)), data.draw(st.integers(0, 3))
    labels = torch.arange(classes).repeat_interleave(
        torch.randint(12, 40, (classes,), generator=torch.Generator().manual_seed(seed))
    )
    split = neighbouring(classes=wide, test=0).split(numbered_data(labels, classes), clients, Streams(seed))
    for client, held in enumerate(split.groups):
        assert sorted((client + j) % classes for j in range(wide)) == held.nonzero().flatten().tolist()
    for held, there in zip(split.groups.t(), torch.bincount(labels), strict=True):
        shares = held[held > 0]
        assert not len(shares) or (shares.sum() == there and shares.max() - shares.min() <= 1)
    assert len(set(everything(split))) == len(everything(split))


def test_neighbouring_clients_with_so_many_samples_of_each_class_have_all_of_them_in_both_parts():
    split = neighbouring(each=15, test=2 / 3).split(even_classes(1400, 10), 15, Streams(0))
    assert split.groups[12].tolist() == [0, 0, 5, 5, 5, 5, 0, 0, 0, 0]
    for client in range(15):
        trained, tested = split.train.of(client)[1], split.test.of(client)[1]
        assert torch.equal(torch.bincount(tested, minlength=10), 2 * torch.bincount(trained, minlength=10))
    assert trained.tolist() != sorted(trained.tolist())


def test_neighbouring_classes_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"neighbouring.classes: 5 is not allowed: the task has 4"):
        neighbouring(classes=5).split(even_classes(40, 4), 4, Streams(0))
    with pytest.raises(ConfigError, match=r"neighbouring.each: 4 is not allowed: 8 clients, at most 3 samples of a class"):
        neighbouring(classes=2, each=4).split(even_classes(48, 4), 8, Streams(0))
    most = neighbouring(classes=2, each=3).split(even_classes(48, 4), 8, Streams(0))
    assert (most.train.counts() + most.test.counts()).tolist() == [6] * 8
