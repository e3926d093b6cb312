"""What all codecs share: bytes from encode and decode alone, text with bars, and identity."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from hanse.codecs import Codec, Sending, identity, sign, topk, zstd
from hanse.codecs.chain import chain
from hanse.core.errors import CodecError, ConfigError
from hanse.core.layout import Layout

values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, float("inf"), float("-inf"), float("nan")]), st.floats(-10, 10, width=32)
)


class _Registered(Codec):
    """Keeps the codecs of these tests out of the registry, which other tests list."""

    abstract: ClassVar[bool] = True


class halves(_Registered):
    """Half precision of the sum with what was kept, which is then the number itself; the share is the last entry."""

    abstract: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("before",)

    def encode(self, x: Tensor, sending: Sending | None = None) -> bytes:
        assert sending is not None and sending.share is not None and len(sending.share) == len(sending.seeds) == 1
        wanted = x + sending.memory["before"][0]
        sending.memory["before"] = x[None]
        return torch.cat([wanted, sending.share]).half().numpy().tobytes()

    def decode(self, data: bytes, layout: Layout | None = None) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.float16).float()[:-1]


def test_a_codec_that_defines_only_bytes_is_sent_row_by_row() -> None:
    """Each client with its own seed, its own share and its own memory."""
    rows, before = torch.full((3, 5), 1 / 3), torch.arange(15.0).view(3, 5)
    sending = Sending(Layout({"": (5,)}), torch.arange(3), torch.tensor([0.1, 0.2, 0.3]), {"before": before})
    sent = halves().roundtrip(rows, sending)
    assert torch.equal(sent.values, (rows + before).half().float()) and sent.sizes.tolist() == [12, 12, 12]
    assert torch.equal(sending.memory["before"], rows) and sent.kept is None


def test_a_codec_that_defines_nothing_says_so() -> None:
    with pytest.raises(TypeError, match="_Registered does not define encode"):
        _Registered().encode(torch.ones(2))
    with pytest.raises(TypeError, match="_Registered does not define decode"):
        _Registered().decode(b"")


@given(st.lists(values, max_size=40), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
def test_identity_changes_no_bit(row: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(row, dtype=dtype)
    data = identity().encode(x)
    got = identity().decode(data, Layout({"": (len(row),)}))
    assert got.dtype == dtype and torch.equal(got.view(torch.uint8), x.view(torch.uint8))
    assert len(data) == len(save({"x": x}))


def test_identity_side_by_side_is_identity_alone() -> None:
    rows = torch.randn(4, 57)
    sent = identity().roundtrip(rows.clone(), Sending(Layout({"": (57,)}), torch.arange(4)))
    assert torch.equal(sent.values, rows) and sent.sizes.tolist() == [len(identity().encode(row)) for row in rows]


@pytest.mark.parametrize(
    "tensors",
    [{"y": torch.ones(3)}, {"x": torch.ones(2, 3)}, {"x": torch.ones(())}, {"x": torch.ones(3), "y": torch.ones(3)}, {}],
    ids=["another name", "a matrix", "a scalar", "two", "none"],
)
def test_identity_refuses_what_it_did_not_make(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(CodecError, match="expected a vector 'x'"):
        identity().decode(save(tensors))


def test_identity_refuses_a_vector_of_another_size() -> None:
    with pytest.raises(CodecError):
        identity().decode(identity().encode(torch.ones(3)), Layout({"": (4,)}))


@pytest.mark.parametrize("kind", ["F8_E8M0", "F4", "C64", "X", 3, None])
def test_types_that_torch_lacks_are_refused(kind: object) -> None:
    header = json.dumps({"x": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}).encode()
    with pytest.raises(CodecError):
        identity().decode(len(header).to_bytes(8, "little") + header + bytes(4))


@pytest.mark.parametrize("codec", [identity(), topk(0.1), topk(0.1) | sign() | zstd()], ids=str)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_are_refused(codec: Codec, data: bytes, header: bool) -> None:
    with pytest.raises(CodecError):
        codec.decode(len(data).to_bytes(8, "little") + data if header else data)


@given(st.integers(0, 10**6))
def test_identity_cut_short_is_refused(cut: int) -> None:
    data = identity().encode(torch.ones(40))
    with pytest.raises(CodecError):
        identity().decode(data[: cut % len(data)])


def test_a_bar_makes_a_chain_and_nested_bars_belong_to_their_brackets() -> None:
    assert Codec.parse("topk(0.1)") == topk(0.1)
    assert Codec.parse(" topk( 0.1 )|sign ") == chain(stages=(topk(0.1), sign())) == topk(0.1) | sign()
    inner = Codec.parse("feedback(topk(0.1) | sign)")
    assert str(inner) == "feedback(codec=topk | sign)" and Codec.parse(str(inner)) == inner


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk | ", "cannot read"),
        ("| topk", "cannot read"),
        ("topk | tpk", "unknown name 'tpk'; did you mean topk"),
        ("topk(2) | sign", "topk.fraction: 2 is not allowed"),
        ("topk | 3", "cannot read"),
        ("identity | sign", "identity is no stage; it goes around a chain, or alone"),
        ("feedback(sign) | zstd", r"feedback\(codec=sign\) is no stage; it goes around a chain, or alone"),
        ("chain(stages=())", "chain.stages"),
    ],
)
def test_what_is_no_chain_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Codec.parse(text)
    assert "\n" not in str(caught.value)


def test_only_what_selects_is_sparse() -> None:
    sparse = {text: Codec.parse(text).sparse for text in ("identity", "topk", "topk | sign", "uniform | zstd", "feedback(topk)")}
    assert sparse == {"identity": False, "topk": True, "topk | sign": True, "uniform | zstd": False, "feedback(topk)": True}
