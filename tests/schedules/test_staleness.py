"""How much an old update counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hanse as hs
from hanse.schedules.staleness import Staleness, constant, discounted, halving, hinge, polynomial

KINDS = [constant(), polynomial(), polynomial(0), polynomial(2), hinge(), hinge(a=0.1, b=0), halving(), halving(every=0.5)]
U = torch.arange(200)


@pytest.mark.parametrize("s", KINDS, ids=str)
def test_a_fresh_update_counts_in_full_and_an_older_one_never_more(s):
    values = s(U)
    assert values.dtype == torch.float64 and values.shape == U.shape
    assert float(values[0]) == 1
    assert bool((values.diff() <= 0).all()) and bool((values >= 0).all())


@pytest.mark.parametrize("s", [polynomial(), hinge(b=0), halving()], ids=str)
def test_older_counts_less(s):
    """With the exponent's sign the other way round, which is the slip of public code, old updates would count more."""
    assert bool((s(U).diff() < 0).all())


@given(u=st.integers(0, 10**6), a=st.floats(0.01, 3), b=st.floats(0, 50))
def test_formulas(u, a, b):
    one = torch.tensor([u])
    assert float(constant()(one)) == 1
    assert float(polynomial(a)(one)) == pytest.approx(1 / (1 + u) ** a, rel=1e-12)
    assert float(hinge(a=a, b=b)(one)) == pytest.approx(1 if u <= b else 1 / (a * (u - b) + 1), rel=1e-12)
    assert float(halving(every=a)(one)) == pytest.approx(0.5 ** (u / a), rel=1e-9, abs=1e-300)


def test_numbers_of_the_paper():
    """a = 0.5: the fourth model ago counts half of the current one's; hinge, a = 10, b = 4: a fifth version costs nine tenths."""
    assert polynomial(0.5)(torch.tensor([0, 3, 8])).tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert hinge()(torch.tensor([0, 4, 5, 6])).tolist() == pytest.approx([1, 1, 1 / 11, 1 / 21])
    assert halving(20)(torch.tensor([0, 20, 40])).tolist() == pytest.approx([1, 1 / 2, 1 / 4])


@pytest.mark.parametrize("s", KINDS, ids=str)
def test_what_is_older_than_the_oldest_counts_nothing(s):
    assert torch.equal(discounted(s, U, None), s(U))
    assert torch.equal(discounted(s, U, 7), torch.cat([s(U[:8]), torch.zeros(192, dtype=torch.float64)]))
    assert discounted(s, U, 0).count_nonzero() == 1


@pytest.mark.parametrize("s", KINDS, ids=str)
def test_it_reads_back_from_its_text(s):
    assert Staleness.parse(str(s)) == s


@pytest.mark.parametrize("text", ["polynomial(-0.5)", "hinge(a=0)", "hinge(b=-1)", "halving(0)"])
def test_weights_that_would_rise_are_refused(text):
    with pytest.raises(hs.ConfigError):
        Staleness.parse(text)
