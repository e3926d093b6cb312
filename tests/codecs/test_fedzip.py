"""FedZip: what arrives, and how many bytes it takes, against the paper's stages and formulas written out here once more."""

from __future__ import annotations

import itertools
import math
import struct
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import hanse as hs
from hanse.codecs import Codec, Sending, fedzip
from hanse.codecs.wire import FRAME, varint
from hanse.core.errors import ConfigError
from hanse.core.layout import Layout

CODES = ("huffman", "positions", "gaps")


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


TENSORS = {
    "random": normal(700),
    "heavy tails": normal(700) ** 5,
    "all zero": torch.zeros(300),
    "one entry": torch.tensor([-0.3]),
    "two entries": torch.tensor([-0.3, 2.0]),
    "all equal": torch.full((400,), 0.7),
    "all equal and negative": torch.full((400,), -0.7),
    "positive": normal(500).abs() + 0.1,
    "negative": -normal(500).abs() - 0.1,
    "one of a thousand": torch.nn.functional.one_hot(torch.tensor(77), 1000).float(),
    "many of equal magnitude": normal(400).sign(),
}


@dataclass
class Layer:
    """A layer as the paper has it, from a message of FedZip with its parameters."""

    size: int
    places: np.ndarray  # S, int64 [m]
    table: np.ndarray  # centres but zero, float32 [k - 1], as they stand in the message
    groups: np.ndarray  # which of them each of S has, int64 [m]

    @classmethod
    def of(cls, x: Tensor, z: float, k: int) -> Layer:
        m = max(1, math.floor(z * len(x) + 1e-9))
        order = sorted(range(len(x)), key=lambda j: (-abs(float(x[j])), j))
        places = np.array(sorted(order[:m]))
        data = fedzip(z, k, "positions").encode(x)
        table = np.frombuffer(data, np.float32, k - 1, FRAME.size + len(varint(m + 1)))
        arrived = fedzip(z, k, "positions").decode(data).numpy()[places]
        groups = np.array([np.flatnonzero(table == value)[-1] for value in arrived])
        return cls(len(x), places, table, groups)

    @property
    def counts(self) -> list[int]:
        """c_1 to c_{k-1}."""
        return [int((self.groups == g).sum()) for g in range(len(self.table))]

    def lengths(self) -> list[int]:
        """Of Huffman's codes of zero and of the other centres, by merging the two rarest until one is left."""
        heap = [(n, [s]) for s, n in enumerate([self.size - len(self.places), *self.counts]) if n]
        lengths = [0] * (1 + len(self.table))
        while len(heap) > 1:
            heap.sort()
            (a, left), (b, right), *rest = heap
            for s in left + right:
                lengths[s] += 1
            heap = [*rest, (a + b, left + right)]
        return lengths

    def huffman_bits(self) -> int:
        return int(np.dot([self.size - len(self.places), *self.counts], self.lengths()))

    def code_bytes(self, code: str) -> int:
        """(a), (b) and (c) of the formulas."""
        m, k = len(self.places), 1 + len(self.table)
        counts = sum(len(varint(c)) for c in self.counts[:-1])
        if code == "huffman":
            payload = math.ceil(self.huffman_bits() / 8)
            return k + len(varint(payload)) + payload
        if code == "positions":
            return counts + math.ceil(m * (self.size - 1).bit_length() / 8)
        bits = 0
        for g, c in enumerate(self.counts):
            gaps = np.diff(self.places[self.groups == g], prepend=-1) - 1
            bits += c * max(1, int(gaps.max(initial=0)).bit_length())
        return counts + k - 1 + math.ceil(bits / 8)

    def bytes(self, encoding: str) -> int:
        head = len(varint(len(self.places) + 1)) + 4 * len(self.table)
        return head + (1 + min(map(self.code_bytes, CODES)) if encoding == "auto" else self.code_bytes(encoding))


# ---- 1: what arrives


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("z", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("x", TENSORS.values(), ids=TENSORS)
def test_every_code_carries_the_quantised_tensor_bit_for_bit(x: Tensor, z: float, k: int) -> None:
    layer = Layer.of(x, z, k)
    quantised = torch.zeros(len(x))
    quantised[layer.places] = torch.from_numpy(layer.table[layer.groups])
    for encoding in ("auto", *CODES):
        codec = fedzip(z, k, encoding)
        sent = codec.roundtrip(x[None].clone(), Sending(Layout({"": (len(x),)}), torch.tensor([0])))
        for arrived in (codec.decode(codec.encode(x)), sent.values[0]):
            assert arrived.numpy().tobytes() == quantised.numpy().tobytes(), encoding


@pytest.mark.parametrize("x", TENSORS.values(), ids=TENSORS)
def test_every_survivor_arrives_as_the_nearest_centre_and_every_centre_is_a_mean(x: Tensor) -> None:
    layer = Layer.of(x, 0.3, 3)
    kept = x.double().numpy()[layer.places]
    for g, centre in enumerate(layer.table):
        if layer.counts[g]:
            assert math.isclose(centre, kept[layer.groups == g].mean(), rel_tol=1e-6)
    distance = np.abs(kept[:, None] - layer.table)
    assert (distance[np.arange(len(kept)), layer.groups] <= distance.min(1) + 1e-6 * np.abs(kept)).all()


def test_zeros_and_a_tensor_on_one_side_of_zero_stay_what_they_are() -> None:
    codec = fedzip(0.3)
    assert not codec.decode(codec.encode(TENSORS["all zero"])).any()
    for name, sign in (("positive", 1), ("negative", -1)):
        arrived = codec.decode(codec.encode(TENSORS[name]))
        assert set((arrived * sign).sign().tolist()) == {0.0, 1.0} and len(arrived.unique()) == 3


# ---- 2: bytes


def test_a_message_byte_for_byte() -> None:
    """Ten entries of which three are sent: how many plus one, two centres, and each of the codes, lowest bits first."""
    x = torch.tensor([0.1, -2.0, 0, 0, 4.0, 0, 0, 0, -4.0, 0.2])
    head = varint(4) + struct.pack("<2f", -3.0, 4.0)
    code = {
        "huffman": bytes([1, 2, 2]) + varint(2) + bytes([0b0_11_0_0_0_1_0, 0b0_0_1_0_0]),  # 0, 01 and 11 from right to left
        "positions": varint(2) + (1 | 8 << 4 | 4 << 8).to_bytes(2, "little"),
        "gaps": varint(2) + bytes([3, 3]) + (1 | 6 << 3 | 4 << 6).to_bytes(2, "little"),
    }
    for encoding in CODES:
        assert fedzip(0.3, encoding=encoding).encode(x)[FRAME.size :] == head + code[encoding]
    assert fedzip(0.3).encode(x)[FRAME.size :] == head + bytes([CODES.index("positions")]) + code["positions"]


@pytest.mark.parametrize("encoding", ["auto", *CODES])
@pytest.mark.parametrize("k", [2, 3, 5, 17])
@pytest.mark.parametrize("x", TENSORS.values(), ids=TENSORS)
def test_bytes_are_those_of_the_formulas(x: Tensor, k: int, encoding: str) -> None:
    for z in (0.01, 0.1, 0.5, 1.0):
        assert len(fedzip(z, k, encoding).encode(x)) == FRAME.size + Layer.of(x, z, k).bytes(encoding), z


def test_every_layer_is_coded_by_itself_and_so_is_its_size() -> None:
    layout = Layout({"conv.weight": (8, 3, 3, 3), "conv.bias": (8,), "head.weight": (10, 40), "head.bias": (10,)})
    x = normal(layout.size)
    for encoding in ("auto", *CODES):
        codec = fedzip(0.1, encoding=encoding)
        sizes = [Layer.of(x[e.start : e.start + e.size], 0.1, 3).bytes(encoding) for e in layout.entries]
        assert len(codec.encode(x, Sending(layout, torch.tensor([0])))) == FRAME.size + sum(sizes)


def test_addresses_win_where_little_is_sent_and_huffman_where_much_is() -> None:
    x = normal(4096)
    sizes = {z: [len(fedzip(z, encoding=code).encode(x)) for code in CODES] for z in (0.005, 0.5)}
    huffman, positions, gaps = sizes[0.005]
    assert gaps < positions < huffman
    huffman, positions, gaps = sizes[0.5]
    assert huffman < gaps < positions
    for z, found in sizes.items():
        assert len(fedzip(z).encode(x)) == min(found) + 1


# ---- 3: nothing is lost


@pytest.mark.parametrize("values", [(-1.5, 0.25), (0.0, 1.0), (2.0, 3.0), (-3.0, -2.0), (7.0,)])
@pytest.mark.parametrize("encoding", ["auto", *CODES])
def test_with_everything_sent_and_a_centre_for_every_number_nothing_is_lost(values: tuple[float, ...], encoding: str) -> None:
    """z = 1, k = 3: two centres besides the one at zero."""
    x = torch.tensor(values)[torch.arange(60) ** 2 % 7 % len(values)]
    codec = fedzip(1.0, 3, encoding)
    assert torch.equal(codec.decode(codec.encode(x)), x)


# ---- 4: Huffman's code


@pytest.mark.parametrize("k", [2, 3, 5, 9])
@pytest.mark.parametrize("z", [0.01, 0.1, 0.4, 0.9])
def test_huffmans_code_takes_between_the_entropy_and_a_bit_more(z: float, k: int) -> None:
    x = normal(3000)
    layer = Layer.of(x, z, k)
    n, counts = layer.size, np.array([layer.size - len(layer.places), *layer.counts])
    entropy = -sum(c / n * math.log2(c / n) for c in counts if c)
    assert n * entropy <= layer.huffman_bits() <= n * (entropy + 1)
    if k == 3 and counts[0] >= counts[1:].max():
        assert layer.huffman_bits() == n + len(layer.places)
    payload = math.ceil(layer.huffman_bits() / 8)
    head = FRAME.size + len(varint(len(layer.places) + 1)) + 4 * (k - 1) + k + len(varint(payload))
    assert len(fedzip(z, k, "huffman").encode(x)) == head + payload


def test_huffmans_code_alone_never_makes_a_vector_32_times_smaller_and_the_others_do() -> None:
    x = normal(100_000)
    assert 4 * len(x) / len(fedzip(0.0005, encoding="huffman").encode(x)) < 32
    assert 4 * len(x) / len(fedzip(0.0005).encode(x)) > 1000


# ---- 5: the quantiser

NUMBERS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-100, 100, width=16))


def squared_error(x: Tensor, k: int) -> float:
    codec = fedzip(1.0, k)
    return float((x.double() - codec.decode(codec.encode(x)).double()).square().sum())


@settings(max_examples=50, deadline=None)
@given(NUMBERS)
@example(np.array([1, 1, 1000], np.float32))
def test_three_centres_are_never_worse_than_a_mean_for_each_sign(numbers: np.ndarray) -> None:
    x = torch.from_numpy(numbers)
    signs = [side.double() for side in (x[x < 0], x[x >= 0]) if len(side)]
    means = sum(float((side - side.mean()).square().sum()) for side in signs)
    assert squared_error(x, 3) <= means * (1 + 1e-6) + 1e-6 * float(x.double().square().sum())


@settings(max_examples=50, deadline=None)
@given(NUMBERS)
def test_the_error_does_not_grow_as_centres_are_doubled(numbers: np.ndarray) -> None:
    """k - 1 = 1, 2, 4, 8, 16: each codebook is the one before with every cluster split."""
    x = torch.from_numpy(numbers)
    errors = [squared_error(x, k) for k in (2, 3, 5, 9, 17)]
    room = 1e-6 * float(x.double().square().sum())  # centres travel as float32
    assert all(after <= before + room for before, after in itertools.pairwise(errors))


# ---- the part


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("fedzip", "layers | topk(0.1) | kmeans(2) | shortest"),
        ("fedzip(0.01, 5)", "layers | topk(0.01) | kmeans(4) | shortest"),
        ("fedzip(0.5, encoding='huffman')", "layers | topk(0.5) | kmeans(2) | huffman"),
        ("fedzip(encoding='positions')", "layers | topk(0.1) | kmeans(2) | positions(grouped=True)"),
        ("fedzip(encoding='gaps')", "layers | topk(0.1) | kmeans(2) | gaps(grouped=True)"),
    ],
)
def test_it_is_a_chain_with_a_name(text: str, chain: str) -> None:
    codec, same = Codec.parse(text), Codec.parse(chain)
    assert isinstance(codec, fedzip) and Codec.parse(str(codec)) == codec == Codec.parse(codec.full())
    assert codec.chained() == same.chained() and codec.sparse
    layout = Layout({"weight": (30, 20), "bias": (30,)})
    x, sending = normal(layout.size), Sending(layout, torch.tensor([0]))
    assert codec.encode(x, sending) == same.encode(x, sending)
    assert torch.equal(codec.decode(same.encode(x, sending), layout), same.decode(codec.encode(x, sending), layout))


def test_it_can_be_continued() -> None:
    assert fedzip(0.02) | Codec.parse("zstd") == Codec.parse("layers | topk(0.02) | kmeans(2) | shortest | zstd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fedzip(0)", "fedzip.z: 0 is not allowed"),
        ("fedzip(1.5)", "fedzip.z: 1.5 is not allowed"),
        ("fedzip(k=1)", "fedzip.k: 1 is not allowed"),
        ("fedzip(encoding='golomb')", "fedzip.encoding: 'golomb' is not allowed: .*'auto', 'huffman', 'positions' or 'gaps'"),
    ],
)
def test_what_it_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Codec.parse(text)


def test_a_run_through_it_is_the_run_through_its_chain() -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=4)
    engine = hs.engines.local(path="stacked", chunk=4, workers=1, threads=1)
    rule, schedule = hs.methods.FedAvg(lr=0.1), hs.schedules.synchronous(cohort=4)
    codecs = map(Codec.parse, ("fedzip", "layers | topk(0.1) | kmeans(2) | shortest", "feedback(fedzip)", "identity"))
    runs = [hs.run(federation, rule, schedule, codec=codec, rounds=2, evaluate=0, engine=engine) for codec in codecs]
    one, same, corrected, _ = (torch.cat([w.flatten() for w in run.weights.values()]) for run in runs)
    assert torch.equal(one, same) and not torch.equal(one, corrected)
    sent = [run.history[-1]["bytes_up"] for run in runs]
    assert sent[0] == sent[1] and 5 * sent[0] < sent[3]
