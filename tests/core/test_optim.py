"""Optimisers row by row against torch's, and learning rates over rounds."""

import math

import pytest
import torch
from torch import Tensor

from hanse.core.errors import ConfigError
from hanse.core.optim import Optimizer, Rate, adamw, adaptive, constant, cosine, exponential, sgd, steps
from hanse.methods import FedAvg

PAIRS = {
    "plain": (sgd(), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (sgd(momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (sgd(momentum=0.8, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True)),
    "weight decay": (sgd(weight_decay=0.05), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.05)),
    "all of it": (
        sgd(momentum=0.9, nesterov=True, weight_decay=0.05),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    ),
    "adamw": (adamw(), lambda p: torch.optim.AdamW(p, 0.1)),
    "adamw, other values": (
        adamw(b1=0.5, b2=0.8, eps=1e-3, weight_decay=0.2),
        lambda p: torch.optim.AdamW(p, 0.1, betas=(0.5, 0.8), eps=1e-3, weight_decay=0.2),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_rows_equal_torch_step_by_step(name: str) -> None:
    ours, theirs = PAIRS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    rows = [row.clone().requires_grad_() for row in x]
    optimizers = [theirs([row]) for row in rows]
    slots = ours.slots(x)
    for _ in range(6):
        g = torch.randn(3, 7, dtype=torch.float64, generator=generator)
        x.sub_(ours.direction(g.clone(), slots, x), alpha=0.1)
        for row, one, optimizer in zip(rows, g, optimizers, strict=True):
            row.grad = one
            optimizer.step()
        torch.testing.assert_close(x, torch.stack(rows).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("local", [sgd(momentum=0.9), adamw(), adaptive()], ids=str)
def test_slots_cut_to_the_first_rows_stay_in_place(local: Optimizer) -> None:
    """Clients that have finished stop; the memory of the others is updated through the cut."""
    x, g = torch.ones(3, 2), torch.full((3, 2), 0.5)
    slots = local.slots(x)
    local.direction(g[:2].clone(), {n: s[:2] for n, s in slots.items()}, x[:2])
    fresh = local.slots(x)
    for name, slot in slots.items():
        assert not torch.equal(slot[:2], fresh[name][:2]) and torch.equal(slot[2], fresh[name][2])


def test_only_bare_sgd_is_plain() -> None:
    assert sgd().plain and sgd(nesterov=True).plain
    assert not any(o.plain for o in (sgd(momentum=0.1), sgd(weight_decay=0.1), adamw(), adaptive()))


def by_formula(second: str, d: list[Tensor]) -> Tensor:
    """Algorithm 2 of FedOpt, with tau = 0.1, b1 = 0.9, b2 = 0.99."""
    m, v = torch.zeros_like(d[0]), torch.full_like(d[0], 0.01)
    for g in d:
        m = 0.9 * m + 0.1 * g
        match second:
            case "adagrad":
                v = v + g**2
            case "yogi":
                v = v - 0.01 * g**2 * torch.sign(v - g**2)
            case "adam":
                v = 0.99 * v + 0.01 * g**2
    return m / (v.sqrt() + 0.1)


@pytest.mark.parametrize("second", ["adagrad", "yogi", "adam"])
def test_adaptive_server_optimisers_follow_their_algorithm(second: str) -> None:
    d = list(torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    rule, x = adaptive(second=second, tau=0.1), torch.zeros(6, dtype=torch.float64)  # type: ignore[arg-type]
    slots = rule.slots(x)
    for g in d:
        out = rule.direction(g.clone(), slots, x)
    torch.testing.assert_close(out, by_formula(second, d), rtol=1e-12, atol=1e-12)


RATES: dict[str, tuple[Rate, dict[int, float]]] = {
    "constant": (constant(0.3), {0: 0.3, 1000: 0.3}),
    "exponential": (exponential(0.2, 0.5), {0: 0.2, 1: 0.1, 3: 0.025}),
    "steps": (steps(1.0, (3, 5), 0.1), {0: 1, 2: 1, 3: 0.1, 4: 0.1, 5: 0.01, 99: 0.01}),
    "cosine": (cosine(1.0, 0.2, 10), {0: 1, 5: 0.6, 10: 0.2, 99: 0.2, 2: 0.2 + 0.4 * (1 + math.cos(0.2 * math.pi))}),
    "warm-up": (cosine(1.0, 0.2, 14, warmup=4), {0: 0.25, 1: 0.5, 3: 1, 4: 1, 9: 0.6, 14: 0.2, 20: 0.2}),
    "warm-up only": (cosine(1.0, 0.2, 4, warmup=4), {3: 1, 4: 1, 5: 0.2}),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_over_rounds(name: str) -> None:
    rate, values = RATES[name]
    assert {t: rate.at(t) for t in values} == pytest.approx(values, abs=1e-15)


def test_a_number_is_a_constant_rate() -> None:
    assert FedAvg(lr=0.3).lr == constant(0.3) and str(FedAvg(lr=0.3)) == "FedAvg(lr=0.3)"
    assert FedAvg(lr="exponential(0.2, 0.5)").lr.at(1) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        "FedAvg(lr=0)",
        "FedAvg(lr=-1)",
        "FedAvg(lr=True)",
        "FedAvg(local=sgd(momentum=1))",
        "FedAvg(local=adamw(eps=0))",
        "FedAvg(clip=0)",
    ],
)
def test_values_out_of_range_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        FedAvg.parse(wrong)
