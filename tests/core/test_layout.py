"""Named views of flat vectors, and selections of tensors by name or type."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hanse.core.errors import ConfigError
from hanse.core.layout import Layout, select

Shapes = dict[str, list[int]]
shapes = st.dictionaries(st.text(min_size=1, max_size=5), st.lists(st.integers(0, 4), max_size=3), max_size=5)
leads = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@given(shapes, leads)
def test_flatten_undoes_views(shape: Shapes, lead: tuple[int, ...]) -> None:
    layout = Layout(shape)
    flat = torch.randn(*lead, sum(map(math.prod, shape.values())), dtype=torch.float64)
    views = layout.views(flat)
    assert {n: tuple(v.shape) for n, v in views.items()} == {n: (*lead, *s) for n, s in shape.items()}
    assert torch.equal(layout.flatten(views, lead).to(flat), flat)


@given(shapes, leads)
def test_views_share_the_memory_of_the_vector(shape: Shapes, lead: tuple[int, ...]) -> None:
    layout = Layout(shape)
    flat = torch.zeros(*lead, layout.size)
    for number, view in enumerate(layout.views(flat).values()):
        view.fill_(number)
    expected = [n for n, s in enumerate(shape.values()) for _ in range(math.prod(s))]
    assert torch.equal(flat, torch.tensor(expected, dtype=torch.float32).expand(flat.shape))


def test_flatten_makes_a_new_vector() -> None:
    one = {"w": torch.zeros(3)}
    Layout({"w": [3]}).flatten(one).add_(1)
    assert torch.equal(one["w"], torch.zeros(3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"w": torch.zeros(2, 3)}, r"weights\['b'\]: got nothing, expected \(3,\)"),
        ({"w": torch.zeros(3, 2), "b": torch.zeros(3)}, r"weights\['w'\]: got \(3, 2\), expected \(2, 3\)"),
        ({"w": torch.zeros(2, 3), "b": torch.zeros(3, 1)}, r"weights\['b'\]: got \(3, 1\), expected \(3,\)"),
    ],
)
def test_wrong_names_and_shapes_are_named(given: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout({"w": [2, 3], "b": [3]}).flatten(given)


class Body(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4))


NET = nn.ModuleDict({"body": Body(), "head": nn.Linear(4, 2)})
NORM = {f"body.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize(
    ("chosen", "picked"),
    [
        ([], set()),
        (["head.*"], {"head.weight", "head.bias"}),
        (["*.bias"], {"body.0.bias", "body.1.bias", "head.bias"}),
        (["BatchNorm1d"], NORM),
        (["BatchNorm1d", "head.bias"], NORM | {"head.bias"}),
        (["Linear"], {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}),
        (["body.1.running_*"], {"body.1.running_mean", "body.1.running_var"}),
    ],
)
def test_select_by_pattern_and_by_type(chosen: list[str], picked: set[str]) -> None:
    assert select(NET, chosen) == picked


def test_a_pattern_that_picks_nothing_is_an_error_that_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'tail\.\*' matches no tensor; names: .*head\.weight.*; types: BatchNorm1d, Linear"):
        select(NET, ["head.*", "tail.*"])
