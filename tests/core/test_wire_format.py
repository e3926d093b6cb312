"""Messages as safetensors files, judged by the library of that name."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from hanse.core.errors import CodecError
from hanse.core.wire import _DTYPES, pieces, read, wire_size, write

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda n: n != "__metadata__")
tensors = st.builds(
    lambda dtype, shape: torch.arange(int(torch.Size(shape).numel())).remainder(2).view(shape).to(dtype),
    st.sampled_from(sorted(_DTYPES, key=str)),
    st.lists(st.sampled_from([0, 1, 2, 3, 9, 10, 11, 99, 101]), max_size=2),
)
messages = st.dictionaries(names, tensors, max_size=5)
words = st.sampled_from([{}, {"work": "train"}])


@settings(max_examples=400)
@given(messages, words)
@example({"x": torch.zeros(())}, {})
@example({"a": torch.zeros(1, dtype=torch.int32), "b": torch.zeros(1000)}, {})
@example({"b": torch.zeros(1, dtype=torch.float64), "a": torch.zeros(999, dtype=torch.int64), "c": torch.zeros(12345)}, {})
@example(
    {
        "h": torch.zeros(3, dtype=torch.float16),
        "b": torch.zeros(1001, dtype=torch.bfloat16),
        "i": torch.zeros(9, dtype=torch.int16),
    },
    {},
)
@example({'"quoted"\\\n\x7f\x01': torch.zeros(2), "\u00e4\U0001f600": torch.zeros(3)}, {})
def test_bytes_are_those_of_the_library(message: dict[str, Tensor], about: dict[str, str]) -> None:
    file = save(message, about or None)
    memory = torch.zeros(len(file), dtype=torch.uint8)
    assert wire_size(message, about=about) == len(file) == write(memory, message, about)
    assert memory.numpy().tobytes() == file == b"".join(pieces(message, about))
    found, said = read(file)
    assert said == about and found.keys() == message.keys()
    for name, t in message.items():
        assert found[name].dtype == t.dtype and found[name].shape == t.shape and torch.equal(found[name], t)


@given(st.dictionaries(names, st.integers(0, 3000), max_size=4))
def test_encoded_arrays_count_as_byte_arrays(sizes: dict[str, int]) -> None:
    assert wire_size({}, sizes) == len(save({n: torch.zeros(k, dtype=torch.uint8) for n, k in sizes.items()}))


def test_what_is_read_lies_where_it_was_written() -> None:
    memory = torch.zeros(200, dtype=torch.uint8)
    size = write(memory, {"x": torch.ones(3)})
    found, _ = read(memory[:size])
    found["x"][1] = 5
    assert read(memory[:size])[0]["x"].tolist() == [1, 5, 1]
    assert found["x"].untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def test_scattered_tensors_are_gathered() -> None:
    t = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(read(b"".join(pieces({"x": t})))[0]["x"], t)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    try:
        read(data)
    except CodecError:
        return
    load(data)  # what is read at all is a safetensors file


@given(messages, st.data())
def test_damaged_messages_are_refused_or_read_within_their_bytes(message: dict[str, Tensor], data: st.DataObject) -> None:
    file = bytearray(save(message))
    file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(file)))
    try:
        found, _ = read(bytes(file[:cut]))
    except CodecError:
        return
    assert sum(t.nbytes for t in found.values()) <= cut
