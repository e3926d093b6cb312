"""Secure aggregation: the sum is exact whoever leaves, nothing else can be seen, and what breaks the protocol is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare, kstest

from hanse.core.errors import ConfigError, MissingExtraError, PrivacyError
from hanse.core.messages import Upload
from hanse.privacy import secure
from hanse.privacy.primitives import add_mask, agreed
from hanse.privacy.protocol import LEFT, STAYED, Client, Messages, Server, aggregate, masking, own_mask
from hanse.privacy.secure import Array

LENGTH = 5


def vectors(part: secure, clients: int, seed: int = 0) -> dict[int, Array]:
    """Any integers modulo 2^bits, so that sums wrap around."""
    drawn = np.random.default_rng(seed).integers(0, 2**part.bits, (clients, LENGTH), np.uint64, endpoint=False)
    return dict(enumerate(drawn.astype(part.dtype)))


def plain(values: dict[int, Array], who: set[int]) -> Array:
    return np.stack([values[u] for u in who]).sum(0, dtype=values[0].dtype)


class Round:
    """All parties of one aggregation, step by step."""

    def __init__(self, part: secure, values: dict[int, Array], seed: int = 0) -> None:
        entropy = random.Random(seed).randbytes
        self.values = values
        self.clients: dict[int, Client] = {u: part.client(u, len(values), entropy) for u in values}
        self.server: Server = part.server(len(values), len(values[0]), entropy)

    def keys(self) -> dict[int, Messages]:
        return self.server.pair({u: client.advertise() for u, client in self.clients.items()})

    def shares(self) -> dict[int, Messages]:
        keys = self.keys()
        return self.server.route({u: client.share(keys[u]) for u, client in self.clients.items()})

    def request(self, silent: set[int] = frozenset()) -> dict[int, Messages]:
        self.routed = self.shares()
        for u in self.routed.keys() - silent:
            self.server.add(u, self.clients[u].mask(self.routed[u], self.values[u]))
        return self.server.request()

    def answers(self, silent: set[int] = frozenset()) -> dict[int, Messages]:
        return {u: self.clients[u].unmask(asked) for u, asked in self.request(silent).items()}


@settings(max_examples=60)
@given(
    clients=st.integers(2, 8),
    leaves=st.lists(st.sampled_from([0, 1, 2, 3, 4, 4, 4, 4]), min_size=8, max_size=8),
    bits=st.sampled_from([32, 64]),
    threshold=st.sampled_from([0.51, 0.67, 1.0]),
)
def test_the_sum_is_exact_or_there_is_none(clients: int, leaves: list[int], bits: int, threshold: float) -> None:
    """Client u leaves before step ``leaves[u]``; 4 stays to the end."""
    part = secure(threshold=threshold, bits=bits)
    values = vectors(part, clients)
    gone = [{u for u in range(clients) if leaves[u] == step} for step in range(4)]
    if sum(leaves[u] == 4 for u in range(clients)) < part.least(clients):
        with pytest.raises(PrivacyError, match=r"secure.threshold: only \d clients .*, needed are \d; nothing was revealed"):
            aggregate(part, values, gone)
        return
    total, included = aggregate(part, values, gone)
    assert included == {u for u in range(clients) if leaves[u] > 2}
    assert np.array_equal(total, plain(values, included))


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), gone=st.lists(st.integers(0, 11), min_size=4, max_size=4))
def test_the_sum_is_exact_with_few_neighbours(seed: int, gone: list[int]) -> None:
    """One client leaves at each step, so that each of the others keeps at least 5 of its circle of 9."""
    part = secure(threshold=0.55, neighbours=8)
    values = vectors(part, 12, seed)
    total, included = aggregate(part, values, [{u} for u in gone], random.Random(seed).randbytes)
    assert included == set(values) - set(gone[:3])
    assert np.array_equal(total, plain(values, included))


def test_neighbours_are_mutual_and_as_many_as_asked_for() -> None:
    part = secure(neighbours=4)
    keys = Round(part, vectors(part, 9)).keys()
    assert all(len(peers) == 4 and u not in peers for u, peers in keys.items())
    assert all(u in keys[v] for u, peers in keys.items() for v in peers)


def test_a_neighbourhood_too_thin_is_an_error() -> None:
    """Of 12 clients enough stay, but not around each."""
    part = secure(threshold=0.6, neighbours=4)
    round = Round(part, vectors(part, 12))
    near = sorted(round.keys()[0])[:3]
    again = Round(part, vectors(part, 12))
    with pytest.raises(PrivacyError, match="around client"):
        again.request(silent=set(near))


@settings(max_examples=200)
@given(
    stayed=st.lists(st.booleans(), min_size=2, max_size=14),
    threshold=st.sampled_from([0.51, 0.6, 0.8, 1.0]),
    neighbours=st.sampled_from([None, 2, 4, 6]),
)
def test_who_is_enough_is_known_without_the_protocol(stayed: list[bool], threshold: float, neighbours: int | None) -> None:
    """The same error or none as the server's, whose ring is in the clients' order if its chance only counts up."""
    part, count = secure(threshold=threshold, neighbours=neighbours), iter(range(10**6))
    server = part.server(len(stayed), 1, lambda size: next(count).to_bytes(size))
    server.pair(dict.fromkeys(range(len(stayed)), bytes(64)))
    server._sharing = set(range(len(stayed)))
    server.included = {u: b"" for u, there in enumerate(stayed) if there}
    try:
        server.request()
    except PrivacyError as error:
        with pytest.raises(PrivacyError) as found:
            part.enough(np.array(stayed))
        assert ("around a client" in str(found.value)) == ("around client" in str(error))
    else:
        part.enough(np.array(stayed))


def test_a_neighbourhood_too_thin_is_named() -> None:
    part, stayed = secure(threshold=0.6, neighbours=4), np.ones(12, dtype=bool)
    part.enough(stayed)
    stayed[[0, 1, 3]] = False  # of places 0 to 4 around 2, two are left
    with pytest.raises(PrivacyError, match=r"only 2 of 5 neighbours .* around a client, needed are 3"):
        part.enough(stayed)
    secure(threshold=0.6).enough(stayed)
    stayed[5:7] = False
    with pytest.raises(PrivacyError, match=r"only 7 of 12 clients .*, needed are 8"):
        secure(threshold=0.6).enough(stayed)


def test_masked_vectors_do_not_show_what_they_hide() -> None:
    """Bytes of masked zeros and of masked large constants are uniform and alike; unmasked, the same test tells them at once.

    One p-value may be anything, so those of 40 rounds are held against the uniform distribution they must have.
    """
    part, seen, likely = secure(bits=32), [], []
    for content in (0, 2**30 + 12345):
        values = {u: np.full(4096, content, part.dtype) for u in range(3)}
        assert chisquare(histogram(values[0].tobytes())).pvalue < 1e-9
        rounds = [Round(part, values, seed=40 * len(seen) + i) for i in range(40)]
        bytes_seen = np.array([histogram(round.clients[0].mask(round.shares()[0], values[0])[16:]) for round in rounds])
        likely += [chisquare(counts).pvalue for counts in bytes_seen]
        seen.append(bytes_seen.sum(0))
    assert kstest(likely, "uniform").pvalue > 1e-3
    assert chi2_contingency(seen).pvalue > 1e-3


def histogram(data: bytes) -> Array:
    return np.bincount(np.frombuffer(data, np.uint8), minlength=256)


def test_a_mask_does_not_depend_on_the_values_and_is_new_for_every_seed() -> None:
    part = secure()
    values = [vectors(part, 3, seed) for seed in (5, 6)]

    def masked(which: int, seed: int) -> Array:
        round = Round(part, values[which], seed)
        return np.frombuffer(round.clients[0].mask(round.shares()[0], values[which][0])[16:], part.dtype)

    assert np.array_equal(masked(0, 7) - masked(1, 7), values[0][0] - values[1][0])
    assert not (masked(0, 7) == masked(0, 8)).any()


def test_who_arrives_after_it_was_given_up_is_still_hidden() -> None:
    """The server then has the client's key and takes away all pairs' masks; the client's own mask is what stays."""
    part = secure()
    values = vectors(part, 4)
    round = Round(part, values)
    request = round.request(silent={3})
    client = round.clients[3]
    late = client.mask(round.routed[3], values[3])
    round.server.total({u: round.clients[u].unmask(request[u]) for u in request})
    with pytest.raises(PrivacyError, match="too late"):
        round.server.add(3, late)
    bare = np.frombuffer(late[16:], part.dtype).copy()
    for v in range(3):  # client 3, the last one, subtracted these
        add_mask(bare, agreed(client._key, client._peers[v][32:], masking(3, v)), 1)
    assert not (bare == values[3]).any()
    add_mask(bare, own_mask(client._mask_seed), -1)
    assert np.array_equal(bare, values[3])


def changed(data: bytes, place: int = -1) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("place", [0, 20, -1], ids=["nonce", "text", "tag"])
def test_a_sealed_share_that_was_changed_is_refused(place: int) -> None:
    round = Round(secure(), vectors(secure(), 3))
    shares = round.shares()[0]
    with pytest.raises(PrivacyError, match="changed on its way"):
        round.clients[0].mask({**shares, 1: changed(shares[1], place)}, round.values[0])
    with pytest.raises(PrivacyError, match="changed on its way"):  # another's share under this name
        round.clients[0].mask({1: shares[2], 2: shares[1]}, round.values[0])
    assert len(round.clients[0].mask(shares, round.values[0])) == 16 + LENGTH * 4


@pytest.mark.parametrize(("about", "silent"), [(1, set()), (3, {3})], ids=["of a seed", "of a key"])
def test_a_share_that_was_changed_is_refused(about: int, silent: set[int]) -> None:
    round = Round(secure(), vectors(secure(), 4))
    answers = round.answers(silent)
    answers[0][about] = changed(answers[0][about])
    with pytest.raises(PrivacyError, match=f"shares of client {about} do not fit together"):
        round.server.total(answers)


def test_a_client_never_gives_both_kinds_of_share() -> None:
    round = Round(secure(threshold=0.51), vectors(secure(), 4))
    request = round.request()[0]
    client = round.clients[0]
    other = {**request, 1: LEFT}
    assert request[1] == STAYED
    for bad in (
        {**request, 1: STAYED + LEFT},  # both at once
        {**request, 1: b"x"},
        {u: kind for u, kind in request.items() if u != 1},  # not of everyone
        {**request, 9: STAYED},
        {**request, 0: LEFT},  # its own key
        dict.fromkeys(request, LEFT) | {0: STAYED, 1: STAYED},  # so few stayed that a sum over them is refused
    ):
        with pytest.raises(PrivacyError):
            client.unmask(bad)
    given = client.unmask(request)
    with pytest.raises(PrivacyError, match="unmask comes once"):
        client.unmask(other)
    assert all(len(share) == 16 for share in given.values())


def test_steps_come_once_and_in_order() -> None:
    """A second vector under the same masks would show the difference of the two."""
    round = Round(secure(), vectors(secure(), 3))
    with pytest.raises(PrivacyError):
        round.clients[0].unmask({0: STAYED})
    shares = round.shares()
    round.clients[0].mask(shares[0], round.values[0])
    with pytest.raises(PrivacyError, match="mask comes once"):
        round.clients[0].mask(shares[0], round.values[1])
    with pytest.raises(PrivacyError, match="advertise comes once"):
        round.clients[0].advertise()


def test_malformed_messages_are_refused() -> None:
    part = secure()
    values = vectors(part, 3)
    round = Round(part, values)
    with pytest.raises(PrivacyError, match="64 bytes"):
        round.server.pair({0: bytes(63), 1: bytes(64), 2: bytes(64)})
    keys = round.keys()
    client = round.clients[0]
    for bad in (
        {1: keys[0][1]},
        keys[0] | {0: keys[1][0]},
        keys[0] | {5: keys[0][1]},
        keys[0] | {1: b""},
        {**keys[0], 1: bytes(64)},
    ):
        with pytest.raises(PrivacyError):
            client.share(bad)
    sent = {u: c.share(keys[u]) for u, c in round.clients.items()}
    for worse in ({**sent, 7: sent[0]}, {**sent, 0: {1: sent[0][1]}}, {**sent, 0: {**sent[0], 1: b"x"}}):
        with pytest.raises(PrivacyError):
            round.server.route(worse)
    shares = round.server.route(sent)
    for wrong in (values[0].astype(np.int32), values[0].astype("<u8"), values[0][None]):
        with pytest.raises(PrivacyError, match="expected is a vector"):
            client.mask(shares[0], wrong)
    masked = client.mask(shares[0], values[0])
    for number, data in ((0, masked[:-1]), (7, masked)):
        with pytest.raises(PrivacyError):
            round.server.add(number, data)
    round.server.add(0, masked)
    with pytest.raises(PrivacyError, match="came twice"):
        round.server.add(0, masked)


def test_answers_that_were_not_asked_for_are_refused() -> None:
    round = Round(secure(), vectors(secure(), 3))
    answers = round.answers()
    for bad in ({**answers, 5: answers[0]}, {**answers, 0: {0: answers[0][0]}}, {**answers, 0: {**answers[0], 1: b""}}):
        with pytest.raises(PrivacyError):
            round.server.total(bad)
    assert np.array_equal(round.server.total(answers), plain(round.values, {0, 1, 2}))


@pytest.mark.parametrize("neighbours", [None, 4])
def test_what_masking_costs_in_bytes(neighbours: int | None) -> None:
    """The vector does not grow; the rest is a few hundred bytes a neighbour."""
    part = secure(neighbours=neighbours)
    round = Round(part, vectors(part, 9))
    advertised = {u: c.advertise() for u, c in round.clients.items()}
    keys = round.server.pair(advertised)
    sent = {u: c.share(keys[u]) for u, c in round.clients.items()}
    shares = round.server.route(sent)
    masked = {u: c.mask(shares[u], round.values[u]) for u, c in round.clients.items()}
    for u, data in masked.items():
        round.server.add(u, data)
    request = round.server.request()
    answer = round.clients[0].unmask(request[0])

    def size(*messages: Messages) -> int:
        return sum(4 + len(data) for message in messages for data in message.values())

    up = len(advertised[0]) + size(sent[0]) + len(masked[0]) + size(answer)
    assert part.traffic(9, LENGTH) == (size(keys[0], shares[0], request[0]), up)
    peers = 8 if neighbours is None else 4
    assert up == 84 * peers + 4 * LENGTH + 100


@settings(max_examples=40)
@given(
    rows=st.lists(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), min_size=2, max_size=6),
    bits=st.sampled_from([32, 64]),
    fraction=st.sampled_from([None, 4, 16]),
)
def test_the_decoded_sum_is_within_half_a_unit_for_every_client(rows: list[list[float]], bits: int, fraction: int | None) -> None:
    x, weight = torch.tensor(rows), torch.arange(1.0, len(rows) + 1)
    fixed = secure(bits=bits, clip=2.0, fraction=fraction).fixed(len(rows), heaviest=len(rows))
    integers = fixed.encode({"delta": x[:, :2], "c": x[:, 2:]}, weight)
    sums, total = fixed.decode(integers.sum(0, dtype=integers.dtype), {"delta": 2, "c": 1})
    # In units of the heaviest weight; float64 itself adds a little where the integers have more bits than it.
    half = len(rows) * 2.0 ** -(fixed.fraction + 1) + 1e-13
    torch.testing.assert_close(torch.cat([*sums.values()]), weight.double() @ x.double(), rtol=0, atol=len(rows) * half)
    assert abs(total - float(weight.sum())) <= len(rows) * half
    for i in range(len(rows)):
        one, _ = fixed.decode(integers[i], {"delta": 2, "c": 1})
        torch.testing.assert_close(torch.cat([*one.values()]), weight[i].double() * x[i].double(), rtol=0, atol=half)


@pytest.mark.parametrize(("bits", "clip", "clients"), [(32, 8.0, 1), (32, 1.0, 1000), (64, 8.0, 3), (64, 0.3, 7), (32, 1e-3, 10)])
def test_everyone_at_the_limit_does_not_overflow_and_one_more_bit_would(bits: int, clip: float, clients: int) -> None:
    part = secure(bits=bits, clip=clip)
    fixed = part.fixed(clients)
    for sign in (1, -1):
        integers = fixed.encode({"x": torch.full((clients, 1), sign * clip, dtype=torch.float64)}, torch.ones(clients))
        sums, _ = fixed.decode(integers.sum(0, dtype=integers.dtype), {"x": 1})
        assert float(sums["x"]) == pytest.approx(sign * clip * clients, abs=clients * 2.0**-fixed.fraction)
    with pytest.raises(ConfigError, match=r"secure.fraction: \d+ is not allowed: .* would overflow"):
        secure(bits=bits, clip=clip, fraction=fixed.fraction + 1).fixed(clients)


def test_what_does_not_fit_is_named() -> None:
    fixed = secure(clip=1.0).fixed(2, heaviest=4.0)
    ones = torch.ones(2)
    with pytest.raises(PrivacyError, match=r"secure.clip: delta has a value of magnitude 1.5, at most 1.0 is allowed"):
        fixed.encode({"c": torch.ones(2, 1), "delta": torch.tensor([[0.0], [-1.5]])}, 4 * ones)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(PrivacyError, match=r"secure.clip: delta"):
            fixed.encode({"delta": torch.tensor([[0.0], [bad]])}, ones)
    for weight in (torch.tensor([1.0, 5.0]), torch.tensor([1.0, -1.0]), torch.tensor([1.0, torch.nan])):
        with pytest.raises(PrivacyError, match=r"secure: a weight is beyond 0 to 4.0"):
            fixed.encode({"delta": torch.ones(2, 1)}, weight)
    with pytest.raises(ConfigError, match=r"secure.clip: 1000000000.0 is not allowed: sums over 100 clients"):
        secure(clip=1e9).fixed(100)
    with pytest.raises(PrivacyError, match="does not fit the sizes"):
        fixed.decode(np.zeros(3, np.uint32), {"delta": 1})


def test_rules_that_show_single_clients_are_refused() -> None:
    def upload(**more: object) -> Upload:
        empty = {"rows": {}, "senders": {}} | more
        return Upload(torch.arange(2), torch.ones(2), {"delta": torch.ones(2, 1)}, loss=torch.zeros(2), **empty)

    secure().check(upload())
    for more in ({"rows": {"delta": torch.ones(2, 3)}}, {"senders": {"delta": torch.tensor([True, False])}}):
        with pytest.raises(PrivacyError, match="secure: the rule sends 'delta' to be seen client by client"):
            secure().check(upload(**more))


@pytest.mark.parametrize("text", ["secure(threshold=0.5)", "secure(bits=16)", "secure(neighbours=3)", "secure(clip=0)"])
def test_settings_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError):
        secure.parse(text)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for make in (lambda: secure().client(0, 3), lambda: secure().server(3, 5), lambda: aggregate(secure(), vectors(secure(), 3))):
        with pytest.raises(MissingExtraError, match=r"privacy = secure needs the extra 'privacy': pip install 'hanse\[privacy\]'"):
            make()
