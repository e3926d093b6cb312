"""Numbers a client."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hanse as hs
from hanse.core.streams import Streams
from hanse.fleet import Distribution, Population, devices
from hanse.fleet import distributions as ds

N = 20_000
EVERYONE = torch.arange(N)
PEOPLE = Population(Streams(0), N)

TABLE = torch.tensor([[10, 0, 0], [5, 0, 5], [0, 1, 3], [4, 3, 3], [0, 0, 0]])  # five clients, three classes
FIVE = Population(Streams(0), 5, TABLE)

ALL = [
    "constant(3)",
    "uniform(1, 2)",
    "lognormal(2, 0.4)",
    "exponential(3)",
    "zipf(1, 0.5, 100)",
    "evenly(1, 0.2)",
    f"listed({tuple(range(5))})",
    "mixture((lognormal(2, 0.4), 7), (1, 3))",
    "by_class((2,), uniform(5, 6), 1)",
    "by_labels",
]


def drawn(text: str, people: Population = PEOPLE, purpose: str = "test") -> torch.Tensor:
    return Distribution.parse(text).draw(people, torch.arange(people.size), purpose)


@pytest.mark.parametrize(
    ("text", "quantiles"),
    [
        ("uniform(2, 4)", (2.5, 3.0, 3.5)),
        ("lognormal(3, 0.5)", (3 * math.exp(-0.5 * 0.67449), 3.0, 3 * math.exp(0.5 * 0.67449))),
        ("exponential(2)", (2 * math.log(4 / 3), 2 * math.log(2), 2 * math.log(4))),
        ("mixture((uniform(0, 1), uniform(10, 11)), (1, 1))", (0.5, None, 10.5)),
    ],
)
def test_quantiles_are_those_of_the_distribution(text: str, quantiles: tuple[float | None, ...]) -> None:
    found = torch.quantile(drawn(text), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    for value, expected in zip(found, quantiles, strict=True):
        assert expected is None or value == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("text", "mean", "deviation"),
    [
        ("uniform(2, 4)", 3.0, 2 / math.sqrt(12)),
        ("lognormal(3, 0.5)", 3 * math.exp(0.125), 3 * math.exp(0.125) * math.sqrt(math.exp(0.25) - 1)),
        ("exponential(2)", 2.0, 2.0),
    ],
)
def test_moments_are_those_of_the_distribution(text: str, mean: float, deviation: float) -> None:
    values = drawn(text)
    assert float(values.mean()) == pytest.approx(mean, rel=0.02)
    assert float(values.std()) == pytest.approx(deviation, rel=0.04)


def test_the_ends_of_a_uniform_are_not_passed() -> None:
    values = drawn("uniform(2, 4)")
    assert 2 < float(values.min()) < 2.01 and 3.99 < float(values.max()) < 4


def test_zipf_falls_with_the_rank_down_to_the_least() -> None:
    four = Population(Streams(0), 4)
    assert drawn("zipf(1, 3)", four).tolist() == pytest.approx([12, 6, 4, 3])
    assert drawn("zipf(2, 1, 5)", four).tolist() == pytest.approx([5, 4, 16 / 9, 1])
    assert drawn("zipf(0, 3)", four).tolist() == [3, 3, 3, 3]


def test_evenly_spaced_jobs_are_scenario_f_80() -> None:
    """tau_i = 1 - (80/100) * i / (M - 1), FedFix."""
    ten = Population(Streams(0), 10)
    assert drawn("evenly(1.0, 0.2)", ten).tolist() == pytest.approx([1 - 0.8 * i / 9 for i in range(10)], abs=1e-12)
    assert drawn("evenly(1.0, 0.2)", Population(Streams(0), 1)).tolist() == [1.0]


def test_a_list_gives_each_its_own() -> None:
    values = ds.listed((3, 1, 4, 1, 5))
    assert values.draw(FIVE, torch.tensor([4, 0]), "test").tolist() == [5, 3]
    with pytest.raises(hs.ConfigError, match="listed holds 5 values, but there are 6 clients"):
        values.draw(Population(Streams(0), 6), torch.tensor([0]), "test")


def test_a_mixture_has_the_shares_asked_for_and_unrelated_parts() -> None:
    values = drawn("mixture((lognormal(1, 0.1), 50, lognormal(1000, 0.1)), (2, 1, 1))")
    low, high = values < 10, values > 100
    assert float(low.double().mean()) == pytest.approx(0.5, abs=0.015)
    assert float((values == 50).double().mean()) == pytest.approx(0.25, abs=0.015)
    assert float(values[low].median()) == pytest.approx(1, rel=0.02) and float(values[high].median()) == pytest.approx(
        1000, rel=0.02
    )
    assert float(values[low].log().std()) == pytest.approx(0.1, rel=0.05)


def test_clients_that_hold_mostly_certain_classes_are_inside() -> None:
    inside = "by_class((2,), inside=9, outside=1)"
    assert drawn(inside, FIVE).tolist() == [1, 9, 9, 1, 1]  # shares of class 2: 0, 0.5, 0.75, 0.3, and no samples at all
    assert drawn(inside[:-1] + ", share=0.3)", FIVE).tolist() == [1, 9, 9, 9, 1]
    assert drawn(inside[:-1] + ", share=1)", FIVE).tolist() == [1, 1, 1, 1, 1]
    assert drawn("by_class((1, 2), inside=9, outside=1, share=0.6)", FIVE).tolist() == [1, 1, 9, 9, 1]
    spread = drawn("by_class((2,), inside=uniform(5, 6), outside=uniform(1, 2))", FIVE)
    assert [int(v) for v in spread] == [1, 5, 5, 1, 1]


def test_rates_by_labels_are_the_formula_of_the_paper() -> None:
    """p_n = max(0.02, 0.1 * C * <labels_n, q>), FedAU; a client of one class shows its q."""
    classes = 10
    pure = torch.eye(classes).long() * 7
    people = Population(Streams(1), classes + 1, torch.cat([pure, torch.ones(1, classes).long()]))
    free = drawn("by_labels(mean=0.1, alpha=1, least=0)", people)
    assert float(free[:classes].sum()) == pytest.approx(0.1 * classes)  # q sums to 1
    assert float(free[classes]) == pytest.approx(0.1)
    assert torch.equal(drawn("by_labels(mean=0.1, alpha=1, least=0.05)", people), free.clamp(min=0.05))
    steep = drawn("by_labels(mean=0.5, alpha=0.001)", people)
    assert float(steep.max()) == 1.0 and float(steep.min()) == 0.02


def test_dirichlet_rates_have_the_mean_and_spread_asked_for() -> None:
    """E[q] = 1/C, var[C q] = (C - 1) / (C alpha + 1)."""
    pure = torch.eye(10).long()
    values = torch.stack([drawn("by_labels(0.1, 2.0, 0)", Population(Streams(seed), 10, pure)) for seed in range(300)]) / 0.1
    assert float(values.mean()) == pytest.approx(1)
    assert float(values.var()) == pytest.approx(9 / 21, rel=0.1)


@pytest.mark.parametrize("text", ["by_class((0,), 1, 2)", "by_labels"])
def test_unknown_classes_are_refused(text: str) -> None:
    with pytest.raises(hs.ConfigError, match=r"test: by_\w+ needs to know the classes"):
        drawn(text)


def test_a_class_that_is_not_there_is_refused() -> None:
    with pytest.raises(hs.ConfigError, match="class 3 is not allowed: the data have classes 0 to 2"):
        drawn("by_class((0, 3), 1, 2)", FIVE)


@pytest.mark.parametrize("text", ALL)
@given(order=st.permutations(range(5)), cut=st.integers(0, 5))
def test_a_client_has_its_value_whoever_is_asked_with(text: str, order: list[int], cut: int) -> None:
    some = torch.tensor(order)[:cut].long()
    assert torch.equal(Distribution.parse(text).draw(FIVE, some, "test"), drawn(text, FIVE)[some])


@pytest.mark.parametrize("text", ["uniform(1, 2)", "lognormal(2, 0.4)", "mixture((uniform(1, 2), 7), (3, 1))"])
def test_values_follow_seed_and_purpose(text: str) -> None:
    values = drawn(text)
    assert torch.equal(values, drawn(text))
    assert not torch.equal(values, drawn(text, Population(Streams(1), N)))
    other = drawn(text, purpose="other")
    assert abs(float(torch.corrcoef(torch.stack([values, other]))[0, 1])) < 0.03


@pytest.mark.parametrize("text", ALL)
def test_writing_it_down_and_reading_it_back_changes_nothing(text: str) -> None:
    once = Distribution.parse(text)
    assert Distribution.parse(str(once)) == once == Distribution.parse(once.full())


@pytest.mark.parametrize(
    "text",
    [
        'mixture(parts=("lognormal(2, 0.4)", 3), shares=(0.5, 0.5))',
        "mixture(parts=(lognormal(2, 0.4), 3), shares=(0.5, 0.5))",
        "mixture([lognormal(2, 0.4), 3], [0.5, 0.5])",
        'mixture((lognormal(2, 0.4), "constant(3)"), (0.5, 0.5))',
    ],
)
def test_nested_parts_may_be_written_in_any_way(text: str) -> None:
    assert Distribution.parse(text) == ds.mixture(parts=(ds.lognormal(2, 0.4), 3), shares=(0.5, 0.5))


def test_a_mixture_may_hold_mixtures() -> None:
    text = "mixture((mixture((1, lognormal(2, 0.1)), (1, 1)), by_class((0,), 3, inf)), (1, 1))"
    once = Distribution.parse(text)
    assert Distribution.parse(str(once)) == once
    assert isinstance(once, ds.mixture) and once.parts[1] == ds.by_class((0,), inside=3, outside=math.inf)


def test_a_number_is_a_constant() -> None:
    assert devices(step=2).step == devices(step="2").step == devices(step="constant(2)").step == ds.constant(2)
    assert hs.fleet.Fleet.parse("devices(up=inf)") == devices()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("constant(-1)", "constant.value: -1 is not allowed"),
        ("constant(nan)", "constant.value: .* is not allowed"),
        ("uniform(2, 1)", "high has to be at least low"),
        ("uniform(0, inf)", "uniform.high: 'inf' is not allowed"),
        ("lognormal(0, 1)", "lognormal.median: 0 is not allowed"),
        ("lognormal(1, -1)", "lognormal.sigma: -1 is not allowed"),
        ("exponential(0)", "exponential.mean: 0 is not allowed"),
        ("zipf(-1, 1)", "zipf.exponent: -1 is not allowed"),
        ("zipf(1, 2, 1)", "most has to be at least least"),
        ("evenly(-1, 1)", "evenly.first: -1 is not allowed"),
        ("listed(())", "listed.values"),
        ("listed((1, -1))", "listed.values.1: -1 is not allowed"),
        ("mixture((1, 2), (1,))", "2 parts need as many shares, not 1"),
        ("mixture((1, 2), (1, 0))", "mixture.shares.1: 0 is not allowed"),
        ("mixture((1, -2), (1, 1))", "mixture.parts.1: -2 is not allowed: a number from 0 up, or a distribution, is needed"),
        ("mixture(lognormal(2, 1), (1,))", "mixture.parts: 'lognormal.*' is not allowed: Input should be a valid tuple"),
        ("mixture((lognorml(2, 1), 1), (1, 1))", "did you mean lognormal"),
        ("by_class((), 1, 2)", "by_class.classes"),
        ("by_class((0,), 1, 2, share=0)", "by_class.share: 0 is not allowed"),
        ("by_labels(mean=1.5)", "by_labels.mean: 1.5 is not allowed"),
        ("by_labels(alpha=0)", "by_labels.alpha: 0 is not allowed"),
        ("by_labels(least=2)", "by_labels.least: 2 is not allowed"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, said: str) -> None:
    with pytest.raises(hs.ConfigError, match=said):
        Distribution.parse(text)
