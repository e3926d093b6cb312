"""Sizes of messages are those of safetensors files, without making one."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from hanse.core.messages import _DTYPES, Reply, wire_size

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda n: n != "__metadata__")
tensors = st.builds(
    lambda dtype, shape: torch.zeros(shape, dtype=dtype),
    st.sampled_from(sorted(_DTYPES, key=str)),
    st.lists(st.sampled_from([0, 1, 2, 3, 9, 10, 11, 99, 101]), max_size=2),
)


@settings(max_examples=400)
@given(st.dictionaries(names, tensors, max_size=5))
@example({"x": torch.zeros(())})
@example({"a": torch.zeros(1, dtype=torch.int32), "b": torch.zeros(1000)})
@example({"b": torch.zeros(1, dtype=torch.float64), "a": torch.zeros(999, dtype=torch.int64), "c": torch.zeros(12345)})
@example(
    {"h": torch.zeros(3, dtype=torch.float16), "b": torch.zeros(1001, dtype=torch.bfloat16), "i": torch.zeros(9, dtype=torch.int16)}
)
@example({'"quoted"\\\n\x7f\x01': torch.zeros(2), "\u00e4\U0001f600": torch.zeros(3)})
def test_wire_size_is_the_length_of_the_file(message: dict[str, Tensor]) -> None:
    assert wire_size(message) == len(save(message))


@given(st.dictionaries(names, st.integers(0, 3000), max_size=4))
def test_encoded_arrays_count_as_byte_arrays(sizes: dict[str, int]) -> None:
    assert wire_size({}, sizes) == len(save({n: torch.zeros(k, dtype=torch.uint8) for n, k in sizes.items()}))


def test_the_mean_is_weighted() -> None:
    weight = torch.tensor([1.0, 3.0])
    sums = {"delta": weight @ torch.tensor([[1.0, 2.0], [5.0, 6.0]])}
    reply = Reply(torch.tensor([4, 9]), weight, sums, {}, torch.zeros(2), population=10)
    assert len(reply) == 2 and torch.equal(reply.mean("delta"), torch.tensor([4.0, 5.0]))
