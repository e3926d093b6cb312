"""Parts as text: what is written reads back, and what is wrong is named in one line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hanse as hs
from hanse.catalogue import KINDS
from hanse.core.errors import ConfigError
from hanse.core.optim import constant
from hanse.core.part import Part

EVERY = [part for kind in KINDS.values() for part in kind.registry().values() if part is not constant]  # written as its number


REQUIRED: dict[str, object] = {
    **dict.fromkeys(("rate", "value", "sigma"), 0.5),
    **dict.fromkeys(("factor", "mean", "median", "exponent", "inside", "outside", "first", "last", "low", "high", "least"), 2),
    **dict.fromkeys(("every", "lasts"), 600),
    **dict.fromkeys(("classes", "shares"), (1, 2)),
    "values": (1, 2.5),
    "parts": (1, "exponential(2)"),
    "stages": ("topk", "uniform"),
    "codec": "topk(0.2) | sign",
    "rule": "mean",
    "before": "nnm(1)",
    "mixings": ("nnm(1)", "bucketing(2)"),
    "f": 1,
    "share": 0.5,
    "at": 600.0,
}


def made(part: type[Part]) -> Part:
    """With defaults; required fields get a number where they take one, else a name."""
    return part(**{n: REQUIRED.get(n, "a/b") for n, f in part.model_fields.items() if f.is_required()})


@pytest.mark.parametrize("part", EVERY, ids=lambda p: p.__name__)
def test_every_part_reads_back_from_its_text(part: type[Part]) -> None:
    one = made(part)
    kind = next(k for k in KINDS.values() if issubclass(part, k))
    assert kind.parse(str(one)) == one
    assert kind.parse(one.full()) == one


@given(
    st.floats(min_value=1e-300, exclude_max=True, max_value=float("inf"), allow_infinity=False),
    st.integers(1, 10**9),
    st.booleans(),
)
def test_values_survive_exactly(lr: float, batch: int, shuffle: bool) -> None:
    rule = hs.methods.FedAvg(lr=lr, batch=batch, shuffle=shuffle, local="sgd(momentum=0.9)", clip=lr)
    assert hs.methods.Method.parse(rule.full()) == rule == hs.methods.Method.parse(str(rule))


def test_names_in_any_case_and_with_dashes() -> None:
    for text in ("FedAvg_M", "fedavg-m", " FEDAVG_M ( beta = 0.3 ) "):
        assert type(hs.methods.Method.parse(text)).__name__ == "FedAvg_M"


def test_positional_values_take_a_parts_own_fields_first() -> None:
    assert hs.dirichlet(0.3) == hs.dirichlet(alpha=0.3)
    assert hs.methods.Method.parse("FedProx(0.5)") == hs.methods.FedProx(mu=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FedAvgg", r"method: unknown name 'FedAvgg'; did you mean FedAvg .*\? allowed: .*FedAvg.*Scaffold"),
        ("FedAvg(", "method: cannot read"),
        ("FedAvg(**{})", "method: cannot read"),
        ("", "method: cannot read"),
        ("FedAvg\0", "method: cannot read"),
        ("FedAvg(lr=\0)", "method: cannot read"),
        ("FedAvg(rate=1)", "FedAvg.rate: unknown field"),
        ("FedAvg(batch=0)", "FedAvg.batch: 0 is not allowed: .*greater than 0"),
        ("FedAvg(batch=2.5)", "FedAvg.batch: 2.5 is not allowed"),
        ("FedAvg(lr={[]: 1})", "not allowed|cannot read"),
        ("FedAvg(local=nothing)", "optimizer: unknown name 'nothing'"),
        ("FedAvg(local=sgd(momentum=2))", "sgd.momentum: 2 is not allowed"),
        ("FedAvg(lr=0.1, lr=0.2)", "twice"),
        ("FedProx(0.1, mu=0.2)", "FedProx.mu: given twice"),
        (f"FedAvg({', '.join('1' for _ in range(99))})", "99 positional values"),
        ("FedAvg(__import__('os').abort())", "not allowed|cannot read"),
    ],
)
def test_wrong_text_is_one_line_that_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        hs.methods.Method.parse(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30), st.sampled_from(["", "FedAvg", "FedAvg(", "FedAvg(lr="]), st.sampled_from(["", ")"]))
def test_any_text_is_a_part_or_a_configuration_error(text: str, before: str, after: str) -> None:
    try:
        assert isinstance(hs.methods.Method.parse(before + text + after), hs.methods.Method)
    except ConfigError as error:
        assert "\n" not in str(error)


def test_parts_are_frozen_and_equal_by_value() -> None:
    rule = hs.methods.FedAvg(lr=0.2)
    with pytest.raises(Exception, match="frozen"):
        rule.lr = 0.3
    assert rule == hs.methods.FedAvg(lr=0.2) != hs.methods.FedAvg(lr=0.3)
