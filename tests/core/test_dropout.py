"""Dropout masks are keyed: by seed, client, round, step and place in the model, and by nothing else."""

import pytest
import torch
from small_clients import batch_of, context, samples_of
from torch import Tensor, nn

from hanse.core.context import Context
from hanse.core.dropout import KeyedDropout, dropout_at, with_keyed_dropout
from hanse.core.gradients import paths
from hanse.core.problem import Problem
from hanse.core.samples import Batch, Plan

WHERE = {"client": torch.tensor(5), "round": torch.tensor(2), "step": 1, "seed": 0}


def masked(part: nn.Module, x: Tensor, **where: object) -> Tensor:
    with dropout_at(**{**WHERE, **where}):  # type: ignore[arg-type]
        out: Tensor = part(x)
    return out


def problem(seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    drop = nn.Dropout(0.3)
    return Problem(
        nn.Sequential(nn.Linear(4, 8), drop, nn.ReLU(), nn.Linear(8, 8), drop, nn.Linear(8, 3)), metrics={}, dtype=torch.float64
    )


def data(n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def test_share_and_scale() -> None:
    out = masked(KeyedDropout(0.3, 0), torch.ones(300, 300))
    assert sorted(float(v) for v in out.unique()) == pytest.approx([0, 1 / 0.7])
    assert float((out == 0).double().mean()) == pytest.approx(0.3, abs=4 * (0.21 / 90_000) ** 0.5)
    assert torch.equal(KeyedDropout(0.3, 0).eval()(torch.ones(9)), torch.ones(9))


def test_every_key_changes_the_mask() -> None:
    x, part = torch.ones(200), KeyedDropout(0.5, 0)
    here = masked(part, x)
    assert torch.equal(masked(part, x), here)
    others = {"client": torch.tensor(6), "round": torch.tensor(3), "step": 2, "seed": 1}
    for name, value in others.items():
        assert not torch.equal(masked(part, x, **{name: value}), here), name
    assert not torch.equal(masked(KeyedDropout(0.5, 1), x), here)


def test_a_module_at_two_places_draws_two_masks() -> None:
    drop = nn.Dropout(0.5)
    first, second = with_keyed_dropout(nn.Sequential(drop, drop)).children()
    assert not torch.equal(masked(first, torch.ones(200)), masked(second, torch.ones(200)))


def test_whole_channels_are_dropped() -> None:
    part = with_keyed_dropout(nn.Sequential(nn.Dropout2d(0.4)))
    out = masked(part, torch.ones(50, 40, 2, 3)).flatten(2)
    assert torch.equal(out, out[:, :, :1].expand(out.shape))
    assert float((out[:, :, 0] == 0).double().mean()) == pytest.approx(0.4, abs=4 * (0.24 / 2000) ** 0.5)


@pytest.mark.parametrize("counts", [[6, 6, 6], [6, 4, 1]])
def test_vmap_and_loop_drop_the_same_units(counts: list[int]) -> None:
    made, (x, y) = problem(), data(18)
    batch = batch_of(counts, x, y)
    w = made.start + torch.randn(3, made.layout.size, dtype=torch.float64)
    none = made.start_buffers.expand(3, -1)
    (g, loss), (h, other) = (paths(made)[name].grad(w, batch, none) for name in ("vmap", "loop"))
    torch.testing.assert_close(g, h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=1e-12)
    evaluated = Problem(made.model, metrics={}, dtype=torch.float64)
    plain = evaluated.loss(evaluated.output(w[0], evaluated.start_buffers, batch.x[0]), batch.y[0]).mean()
    assert abs(float(plain - loss[0])) > 1e-3  # something was dropped


@pytest.mark.parametrize("name", ["vmap", "loop"])
@pytest.mark.parametrize("counts", [[6, 6, 6], [6, 4, 1]])
def test_masks_follow_the_round_of_each_client(name: str, counts: list[int]) -> None:
    """Clients that are at work for different rounds drop side by side what each drops alone."""
    made, (x, y) = problem(), data(18)
    batch, path, w = batch_of(counts, x, y), paths(made)[name], made.start.repeat(3, 1)
    none = made.start_buffers.expand(3, -1)
    mixed = batch._replace(rounds=torch.tensor([3, 8, 0]))
    together, _ = path.grad(w, mixed, none)
    for i, count in enumerate(counts):
        alone = Batch(x=batch.x[i : i + 1, :count], y=batch.y[i : i + 1, :count], weight=None, ids=batch.ids[i : i + 1],
                      rounds=mixed.rounds[i : i + 1], step=0, seed=0)  # fmt: skip
        torch.testing.assert_close(path.grad(w[:1], alone, none[:1])[0][0], together[i], rtol=1e-12, atol=1e-12)
    same_round, _ = path.grad(w, batch, none)
    assert torch.equal(same_round[0], together[0]) and not torch.allclose(same_round[1], together[1])


@pytest.mark.parametrize("name", ["vmap", "loop"])
def test_training_does_not_depend_on_the_grouping(name: str) -> None:
    made = problem()
    samples, plan = samples_of([7, 5, 3], *data(15)), Plan(batch=3, epochs=2)

    def end(ids: list[int], seed: int = 0) -> Tensor:
        ctx = context(made, paths(made)[name], samples, plan, ids=torch.tensor(ids), seed=seed)
        return ctx.displacement(lambda c, w, b: c.grad(w, b))

    together = end([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(end([i])[0], together[i], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(end([0], seed=1)[0], together[0])


@pytest.mark.parametrize("name", ["vmap", "loop"])
def test_a_second_gradient_in_a_step_uses_the_same_mask(name: str) -> None:
    made = problem()
    seen: list[Tensor] = []

    def twice(ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        first, second = ctx.grad(w, batch), ctx.grad(w, batch)
        assert torch.equal(first, second)
        seen.append(first)
        return torch.zeros_like(first)

    samples = samples_of([6, 6], *data(12))
    ctx = context(made, paths(made)[name], samples, Plan(batch=6, steps=2, shuffle=False))
    ctx.displacement(twice)
    assert not torch.allclose(*seen)  # same weights, same samples: the next step has masks of its own
