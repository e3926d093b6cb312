"""Every codec: bytes and back, sizes, and what is not an encoding."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from hanse.codecs import Codec, identity, topk
from hanse.core.errors import CodecError

CODECS = [identity(), topk(0.1), topk(0.5), topk(1.0), topk(1e-9)]
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, float("inf"), float("-inf"), float("nan")]), st.floats(-10, 10, width=32)
)
matrices = st.tuples(st.integers(1, 3), st.integers(1, 40)).flatmap(
    lambda shape: st.lists(st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@given(matrices, st.sampled_from([torch.float32, torch.float64]))
def test_what_arrives_is_the_same_with_and_without_bytes(codec: Codec, matrix: list[list[float]], dtype: torch.dtype) -> None:
    """Bit for bit, ties, zeros, infinities and NaN included, and every row has the size of its bytes."""
    rows = torch.tensor(matrix, dtype=dtype)
    coded = [codec.encode(row) for row in rows]
    arrived, sizes = codec.roundtrip(rows.clone())
    assert torch.equal(bits(arrived), torch.stack([bits(codec.decode(data)) for data in coded]))
    assert sizes.tolist() == [len(data) for data in coded] and sizes.dtype == torch.int64


def test_ties_are_broken_alike_in_large_rows() -> None:
    rows = torch.randint(-2, 3, (4, 30_000), generator=torch.Generator().manual_seed(0)).float()
    for codec in (topk(0.01), topk(0.3)):
        arrived, _ = codec.roundtrip(rows.clone())
        for row, got in zip(rows, arrived, strict=True):
            assert torch.equal(codec.decode(codec.encode(row)), got)


def test_identity_changes_nothing() -> None:
    x = torch.randn(57)
    assert torch.equal(identity().decode(identity().encode(x)), x)
    assert len(identity().encode(x)) == len(save({"x": x}))


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60), st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_topk_keeps_the_largest_magnitudes(row: list[float], fraction: float) -> None:
    x = torch.tensor(row)
    got = topk(fraction).decode(topk(fraction).encode(x))
    kept = max(1, round(fraction * len(x)))
    largest = x.abs().sort(descending=True).values[:kept]
    assert torch.equal(got[got != 0], x[got != 0])
    assert torch.equal(got.abs().sort(descending=True).values[:kept], largest) and int((got != 0).sum()) <= kept


def test_topk_bytes_by_formula() -> None:
    """An int32 place and a float32 value for each entry kept, and a header that names them."""
    one, two = (len(topk(0.1).encode(torch.randn(n))) for n in (100_000, 200_000))
    assert two - one == 10_000 * 8
    assert one < 10_000 * 8 + 300


def damaged(data: bytes, place: int, byte: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([byte]) + data[place + 1 :]


@pytest.mark.parametrize("codec", CODECS[:2], ids=str)
@settings(max_examples=300)
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 10**6))
def test_damaged_bytes_are_refused_or_give_a_vector(codec: Codec, place: int, byte: int, cut: int) -> None:
    """A changed value cannot be told from another vector's; anything else must raise CodecError and nothing but it."""
    x = torch.randn(40, generator=torch.Generator().manual_seed(0))
    data = codec.encode(x)
    with pytest.raises(CodecError):
        codec.decode(data[: cut % len(data)])
    try:
        got = codec.decode(damaged(data, place, byte))
    except CodecError as error:
        assert "\n" not in str(error)
    else:
        assert got.dim() == 1 and len(codec.encode(got.float())) > 0


@pytest.mark.parametrize("codec", CODECS[:2], ids=str)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(codec: Codec, data: bytes, header: bool) -> None:
    with pytest.raises(CodecError):
        codec.decode(len(data).to_bytes(8, "little") + data if header else data)


def message(**tensors: Tensor) -> bytes:
    return save(tensors)


SIZE, PLACE, VALUE = torch.tensor([20]), torch.tensor([3, 7], dtype=torch.int32), torch.tensor([1.0, 2.0])
FOREIGN = {
    "another codec's": message(x=torch.ones(20)),
    "one name more": message(place=PLACE, value=VALUE, size=SIZE, more=SIZE.clone()),
    "no size": message(place=PLACE, value=VALUE),
    "more values than places": message(place=PLACE, value=torch.ones(3), size=SIZE),
    "too few": message(place=PLACE[:1], value=VALUE[:1], size=SIZE),
    "too many": message(place=torch.arange(3, dtype=torch.int32), value=torch.ones(3), size=SIZE),
    "long places": message(place=PLACE.long(), value=VALUE, size=SIZE),
    "negative place": message(place=-PLACE, value=VALUE, size=SIZE),
    "place beyond the end": message(place=PLACE + 17, value=VALUE, size=SIZE),
    "a place twice": message(place=PLACE * 0, value=VALUE, size=SIZE),
    "places not in order": message(place=PLACE.flip(0), value=VALUE, size=SIZE),
    "negative size": message(place=PLACE[:1] * 0, value=VALUE[:1], size=-SIZE),
    "two sizes": message(place=PLACE, value=VALUE, size=SIZE.expand(2).contiguous()),
    "a matrix": message(place=PLACE[None], value=VALUE[None], size=SIZE),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_topk_refuses_what_it_did_not_make(what: str) -> None:
    topk(0.1).decode(message(place=PLACE, value=VALUE, size=SIZE))
    with pytest.raises(CodecError):
        topk(0.1).decode(FOREIGN[what])


@pytest.mark.parametrize(
    "data", [message(y=torch.ones(3)), message(x=torch.ones(2, 3)), message(x=torch.ones(()))], ids=["name", "matrix", "scalar"]
)
def test_identity_refuses_what_it_did_not_make(data: bytes) -> None:
    with pytest.raises(CodecError):
        identity().decode(data)


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "C64", "X", 3, None])
def test_types_that_torch_lacks_are_refused(kind: object) -> None:
    header = json.dumps({"x": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
    with pytest.raises(CodecError):
        identity().decode(len(header).to_bytes(8, "little") + header + bytes(4))


def test_a_codec_without_a_roundtrip_of_its_own_gets_the_one_by_bytes() -> None:
    class halves(Codec):
        """Half precision."""

        def encode(self, x: Tensor) -> bytes:
            return x.half().numpy().tobytes()

        def decode(self, data: bytes) -> Tensor:
            return torch.frombuffer(bytearray(data), dtype=torch.float16).float()

    arrived, sizes = halves().roundtrip(torch.full((2, 5), 1 / 3))
    assert torch.equal(arrived, torch.full((2, 5), 1 / 3).half().float()) and sizes.tolist() == [10, 10]
