"""What all rules have in common: rows that are not finite, too few rows, text, order, types."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_rows import EVERY, made, rotation, some_rows
from torch import Tensor

from hanse.aggregators import Aggregator, centred_clipping, nnm
from hanse.core.errors import ConfigError


@pytest.mark.parametrize("text", [*EVERY, "bucketing(2) | mean"])
def test_rows_that_are_not_finite_are_dropped(text: str) -> None:
    rule, rows = Aggregator.parse(text), made(11, 7)
    spoilt = torch.cat([rows[:2], rows[:1] * torch.nan, rows[2:], rows[:1]])
    spoilt[-1, 3] = torch.inf
    before = spoilt.clone()
    torch.testing.assert_close(rule(spoilt), rule(rows), rtol=0, atol=1e-12)
    torch.testing.assert_close(spoilt, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("text", EVERY)
def test_nothing_finite_is_an_error(text: str) -> None:
    rule = Aggregator.parse(text)
    with pytest.raises(ValueError, match="none of the 9 rows is finite"):
        rule(torch.full((9, 4), torch.nan))
    with pytest.raises(ValueError, match="no rows"):
        rule(torch.zeros(0, 4))


@pytest.mark.parametrize(
    ("text", "p", "needed"),
    [
        ("krum(2)", 6, r"krum\(f=2\): f=2 and p=6 rows are not allowed: it needs p >= 2f\+3 = 7"),
        ("multi_krum(1)", 4, r"p >= 2f\+3 = 5"),
        ("trimmed_mean(2)", 4, r"p >= 2f\+1 = 5"),
        ("meamed(2)", 4, r"p >= 2f\+1 = 5"),
        ("phocas(2)", 4, r"p >= 2f\+1 = 5"),
        ("bulyan(2)", 10, r"p >= 4f\+3 = 11"),
        ("nnm(4) | mean", 4, r"p >= f\+1 = 5"),
        ("bucketing(3) | krum(1)", 9, r"p=3 rows are not allowed: it needs p >= 2f\+3 = 5"),
        ("multi_krum(1, q=6)", 5, "q=6 is not allowed: there are p=5 rows"),
    ],
)
def test_too_few_rows_are_refused(text: str, p: int, needed: str) -> None:
    with pytest.raises(ConfigError, match=needed):
        Aggregator.parse(text)(made(p))
    if "q=" not in text and "bucketing" not in text:
        assert Aggregator.parse(text)(made(p + 1)).shape == (5,)


def test_dropped_rows_do_not_count() -> None:
    rows = made(7)
    rows[3, 0] = torch.nan
    with pytest.raises(ConfigError, match="p=6 rows"):
        Aggregator.parse("krum(2)")(rows)


TIES = ("bulyan(1)", "nnm(1) | krum(1)")
"""Of two rows nearest to each other the first is taken: with one neighbour left, and among rows that are means of the same rows."""


@pytest.mark.parametrize("text", [text for text in EVERY if text not in TIES])
@given(rows=some_rows, seed=st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(text: str, rows: Tensor, seed: int) -> None:
    rule, order = Aggregator.parse(text), torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rule(rows[order]), rule(rows), rtol=0, atol=1e-7)


MOVES = [text for text in EVERY if Aggregator.parse(text).centred]


def test_which_rules_start_from_zero() -> None:
    assert {text.split("(")[0].split(" ")[0] for text in set(EVERY) - set(MOVES)} == {"centred_clipping", "flag", "clipping"}


@pytest.mark.parametrize("text", MOVES)
@given(rows=some_rows, seed=st.integers(0, 1000))
def test_rows_moved_move_the_result(text: str, rows: Tensor, seed: int) -> None:
    rule, by = Aggregator.parse(text), 100 * made(1, rows.shape[1], seed)[0]
    torch.testing.assert_close(rule(rows + by), rule(rows) + by, rtol=0, atol=1e-6)


TURNS = [t for t in EVERY if all(name not in t for name in ("median", "trimmed", "meamed", "phocas", "bulyan")) or "geometric" in t]


@pytest.mark.parametrize("text", TURNS)
@given(rows=some_rows, seed=st.integers(0, 1000))
def test_rows_turned_turn_the_result(text: str, rows: Tensor, seed: int) -> None:
    rule, turn = Aggregator.parse(text), rotation(rows.shape[1], seed)
    torch.testing.assert_close(rule(rows @ turn), rule(rows) @ turn, rtol=0, atol=1e-7)


@pytest.mark.parametrize("text", EVERY)
def test_types_and_many_chunks(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, rows = Aggregator.parse(text), made(9, 3000)
    whole = rule(rows)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        found = rule(rows.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), rule(rows.to(dtype).double()), rtol=error, atol=error)
    monkeypatch.setattr("hanse.aggregators.gram.CHUNK", 9 * 64)
    torch.testing.assert_close(rule(rows), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("text", EVERY)
def test_the_number_of_threads_changes_rounding_at_most(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, rows, threads = Aggregator.parse(text), made(9, 3000, dtype=torch.float32), torch.get_num_threads()
    monkeypatch.setattr("hanse.aggregators.gram.CHUNK", 9 * 64)
    try:
        torch.set_num_threads(1)
        alone = rule(rows)
        torch.set_num_threads(2)
        found = rule(rows)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    # Chunks are added up in the same order; only the product at the end is torch's own, which may share out its sums.
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


def test_text_reads_back() -> None:
    for text in EVERY:
        rule = Aggregator.parse(text)
        assert Aggregator.parse(str(rule)) == rule == Aggregator.parse(rule.full())
    assert str(Aggregator.parse("nnm(2)|krum(2)")) == "nnm(f=2) | krum(f=2)"


def test_parts_are_joined_in_python_too() -> None:
    assert nnm(2) | centred_clipping(3) == Aggregator.parse("nnm(2) | centred_clipping(3)")
    three = Aggregator.parse("nnm(2) | clipping(1) | mean")
    assert str(three) == "nnm(f=2) | clipping(bound=1.0) | mean" and three.short_name == "nnm_clipping_mean"


@pytest.mark.parametrize("text", ["krum(1) | nnm(1)", "nnm(1)", "nnm(1) | nnm(1)", "krum", "krum(-1)", "nnm(1) |", "flag(m=0)"])
def test_wrong_text_is_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigError):
        Aggregator.parse(text)
