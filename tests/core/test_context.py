"""Local training of several clients side by side."""

from collections.abc import Callable

import pytest
import torch
from small_clients import chain, context, plain, plainly, samples_of
from torch import Tensor, nn

from hanse.core.context import Context
from hanse.core.gradients import paths
from hanse.core.losses import squared_error
from hanse.core.optim import Optimizer, adamw, sgd
from hanse.core.problem import Problem
from hanse.core.samples import Batch, Plan, Samples
from hanse.core.streams import Streams

COUNTS = [11, 8, 8, 3, 1]
PATHS = ["loop", "vmap", "stacked"]


def made(dtype: torch.dtype = torch.float64, private: tuple[str, ...] = ()) -> tuple[Problem, Samples]:
    torch.manual_seed(0)
    problem = Problem(chain([6, 9, 4], [nn.ReLU]), metrics={}, dtype=dtype, private=private)
    return problem, samples_of(COUNTS, torch.randn(31, 6, dtype=dtype), torch.randint(4, (31,)))


def test_ragged_clients_with_integer_samples_are_weighted_in_full_precision() -> None:
    torch.manual_seed(0)
    problem = Problem(nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 7)), metrics={}, dtype=torch.float64)
    samples = samples_of(COUNTS, torch.randint(7, (31, 2)), torch.randint(7, (31,)))
    ends = [context(problem, paths(problem)[name], samples, Plan(batch=4)).displacement(plain) for name in ("loop", "vmap")]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "plan", [Plan(batch=4, epochs=2), Plan(batch=4, steps=5), Plan(batch=100)], ids=["epochs", "steps", "full"]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", PATHS)
def test_ragged_clients_together_equal_one_at_a_time(name: str, dtype: torch.dtype, tolerance: float, plan: Plan) -> None:
    problem, samples = made(dtype)
    path = paths(problem)[name]
    ctx = context(problem, path, samples, plan)
    together = ctx.displacement(plain)
    for row, client in enumerate(ctx.ids.tolist()):
        alone = context(problem, path, samples, plan, ids=torch.tensor([client]))
        torch.testing.assert_close(alone.displacement(plain)[0], together[row], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(alone.loss[0], ctx.loss[row], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PATHS)
def test_training_is_gradient_descent(name: str) -> None:
    """Against autograd written out, with the mean of the steps' losses as the loss."""
    problem, samples = made()
    plan = Plan(batch=4, epochs=2, shuffle=False)
    ctx = context(problem, paths(problem)[name], samples, plan, lr=0.2)
    moved = ctx.displacement(plain)
    for row, client in enumerate(ctx.ids.tolist()):
        x, y = samples.of(client)
        w, losses = problem.start.clone(), []
        for _ in range(2):
            for xs, ys in zip(x.split(4), y.split(4), strict=True):
                g, loss = plainly(
                    problem, w[None], Batch(xs[None], ys[None], None, torch.zeros(1), torch.zeros(1), 0, 0), [len(xs)]
                )
                w -= 0.2 * g[0]
                losses.append(float(loss))
        torch.testing.assert_close(moved[row], w - problem.start, rtol=1e-10, atol=1e-10)
        assert float(ctx.loss[row]) == pytest.approx(sum(losses) / len(losses), abs=1e-12)


@pytest.mark.parametrize("local", [sgd(momentum=0.9), sgd(momentum=0.5, nesterov=True, weight_decay=0.1), adamw()], ids=str)
def test_local_optimisers_keep_ragged_clients_apart(local: sgd) -> None:
    problem, samples = made()
    path, plan = paths(problem)["stacked"], Plan(batch=4, epochs=2)
    ctx = context(problem, path, samples, plan, local=local, lr=0.01)
    together = ctx.displacement(plain)
    for row, client in enumerate(ctx.ids.tolist()):
        alone = context(problem, path, samples, plan, local=local, lr=0.01, ids=torch.tensor([client])).displacement(plain)[0]
        torch.testing.assert_close(alone, together[row], rtol=1e-9, atol=1e-9)


def shortcut(problem: Problem, samples: Samples, plan: Plan, weight: Tensor) -> tuple[Tensor, Tensor]:
    ctx = context(problem, paths(problem)["stacked"], samples, plan, totals={})
    total = ctx.total_displacement(weight)
    assert total is not None
    return total, ctx.loss


@pytest.mark.parametrize("counts", [[8, 8, 8], [11, 8, 3, 1], [5]], ids=str)
@pytest.mark.parametrize("plan", [Plan(batch=4), Plan(batch=100), Plan(batch=4, epochs=3), Plan(batch=3, steps=7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_shortcuts_equal_the_sum_of_displacements(counts: list[int], plan: Plan, bias: bool) -> None:
    torch.manual_seed(0)
    problem = Problem(chain([6, 9, 7, 4], [nn.ReLU, nn.Tanh], bias), metrics={}, dtype=torch.float64)
    samples = samples_of(counts, torch.randn(31, 6, dtype=torch.float64), torch.randint(4, (31,)))
    weight = torch.rand(len(counts), dtype=torch.float64) + 0.5
    start = problem.start.clone()
    total, loss = shortcut(problem, samples, plan, weight)
    ctx = context(problem, paths(problem)["stacked"], samples, plan)
    torch.testing.assert_close(total, weight @ ctx.displacement(plain), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, ctx.loss, rtol=1e-10, atol=1e-10)
    assert torch.equal(problem.start, start)


def test_shortcuts_for_squared_error() -> None:
    torch.manual_seed(0)
    problem = Problem(chain([6, 5, 2], [nn.Sigmoid]), squared_error, {}, dtype=torch.float64)
    samples = samples_of([5, 3], torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))
    weight = torch.tensor([5.0, 3.0], dtype=torch.float64)
    total, _ = shortcut(problem, samples, Plan(batch=2, epochs=2), weight)
    ctx = context(problem, paths(problem)["stacked"], samples, Plan(batch=2, epochs=2))
    torch.testing.assert_close(total, weight @ ctx.displacement(plain), rtol=1e-10, atol=1e-10)


def test_shortcuts_add_to_what_is_there() -> None:
    problem, samples = made()
    weight = torch.ones(5, dtype=torch.float64)
    once, _ = shortcut(problem, samples, Plan(batch=4), weight)
    totals = {"delta": once.clone()}
    context(problem, paths(problem)["stacked"], samples, Plan(batch=4), totals=totals).total_displacement(weight)
    torch.testing.assert_close(totals["delta"], 2 * once)


WITHOUT: dict[str, dict[str, object]] = {
    "nobody sums": {"totals": None},
    "clipping": {"clip": 1.0},
    "momentum": {"local": sgd(momentum=0.9)},
    "rates that differ": {"lr": torch.full((5, 1), 0.1).double()},
    "models that differ": {"message": {"x": torch.zeros(5, 103).double()}},
}


@pytest.mark.parametrize("why", WITHOUT)
def test_shortcuts_switch_themselves_off(why: str) -> None:
    problem, samples = made()
    arguments = {"totals": {}, **WITHOUT[why]}
    ctx = context(problem, paths(problem)["stacked"], samples, Plan(batch=4), **arguments)  # type: ignore[arg-type]
    assert ctx.total_displacement(torch.ones(5).double()) is None
    assert context(problem, paths(problem)["vmap"], samples, Plan(), totals={}).total_displacement(torch.ones(5).double()) is None


@pytest.mark.parametrize("work", [lambda c: c.displacement(plain), lambda c: c.total_displacement(torch.ones(5).double())])
def test_training_leaves_the_model_it_was_handed_alone(work: Callable[[Context], Tensor]) -> None:
    problem, samples = made()
    message = {"x": problem.start, "c": torch.ones(3)}
    before = {n: t.clone() for n, t in message.items()}
    ctx = context(problem, paths(problem)["stacked"], samples, Plan(batch=4), message=message, totals={})
    moved = work(ctx)
    assert float(moved.norm()) > 0.1
    assert all(torch.equal(message[n], before[n]) for n in before)


def test_gradients_are_clipped_row_by_row() -> None:
    problem, samples = made()
    zeros, ones = torch.zeros(5).long(), torch.ones(5).long()
    _, batch = next(Plan(batch=1, shuffle=False).batches(samples, torch.arange(5), Streams(0), zeros, ones))
    w = problem.start.expand(5, -1).clone()
    free, held = (
        context(problem, paths(problem)["vmap"], samples, Plan(batch=1), clip=clip).grad(w, batch) for clip in (None, 1.5)
    )
    norms = free.norm(dim=1)
    assert float(norms.min()) < 1.5 < float(norms.max())
    torch.testing.assert_close(held.norm(dim=1), norms.clamp(max=1.5))
    torch.testing.assert_close(held / held.norm(dim=1, keepdim=True), free / norms[:, None])


def test_every_client_may_start_from_a_model_of_its_own() -> None:
    problem, samples = made()
    starts = problem.start + torch.randn(5, problem.layout.size, dtype=torch.float64)
    plan, path = Plan(batch=4), paths(problem)["stacked"]
    together = context(problem, path, samples, plan, ids=torch.arange(5), message={"x": starts}).descend(plain)
    for i in range(5):
        alone = context(problem, path, samples, plan, ids=torch.tensor([i]), message={"x": starts[i]}).descend(plain)[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("local", [sgd(), sgd(momentum=0.9, weight_decay=0.1), adamw()], ids=str)
def test_private_parameters_are_trained_where_they_are_kept(local: Optimizer, clip: float | None) -> None:
    """Shared displacement and private rows together are those of training the whole model."""
    problem, samples = made(private=("2.*",))
    whole, _ = made()
    assert problem.shared == 63
    plan = Plan(batch=4, epochs=2)
    kept = {"private": problem.start[63:].expand(5, -1).clone()}
    ctx = context(problem, paths(problem)["stacked"], samples, plan, state=kept, local=local, clip=clip, lr=0.01)
    moved = ctx.displacement(plain)
    expected = context(whole, paths(whole)["stacked"], samples, plan, local=local, clip=clip, lr=0.01).displacement(plain)
    torch.testing.assert_close(torch.cat([moved, kept["private"] - problem.start[63:]], 1), expected, rtol=1e-10, atol=1e-10)


def bn(buffers: str = "average") -> tuple[Problem, Samples]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    problem = Problem(model, metrics={}, dtype=torch.float64, buffers=buffers)  # type: ignore[arg-type]
    return problem, samples_of([8, 6, 4], torch.randn(18, 6, dtype=torch.float64), torch.randint(4, (18,)))


def test_running_statistics_move_in_the_first_pass_of_a_step_only() -> None:
    problem, samples = bn()

    def twice(ctx: Context, w: Tensor, batch: Batch) -> Tensor:
        g = ctx.grad(w, batch)
        ctx.grad(w + g, batch)
        return g

    ends = []
    for direction in (plain, twice):
        ctx = context(problem, paths(problem)["loop"], samples, Plan(batch=4, epochs=2))
        moved = ctx.displacement(direction)
        ends.append((moved, ctx.buffers, ctx.loss, ctx.upload(torch.ones(3)).sums["buffers"]))
    for once, again in zip(*ends, strict=True):
        assert torch.equal(once, again)
    assert not torch.equal(ends[0][1][0], ends[0][1][1])
    assert torch.equal(problem.start_buffers, torch.tensor([0.0] * 5 + [1.0] * 5).double())


def test_private_statistics_stay_with_the_client() -> None:
    problem, samples = bn("private")
    kept = {"buffers": problem.start_buffers.expand(3, -1).clone()}
    ctx = context(problem, paths(problem)["loop"], samples, Plan(batch=4), state=kept)
    ctx.displacement(plain)
    assert "buffers" not in ctx.upload(torch.ones(3)).sums
    averaged, _ = bn()
    other = context(averaged, paths(averaged)["loop"], samples, Plan(batch=4))
    other.displacement(plain)
    assert torch.equal(kept["buffers"], other.buffers)


def test_a_last_batch_of_one_sample_is_normalised_by_the_running_statistics() -> None:
    problem, _ = bn()
    samples = samples_of([5, 5], torch.randn(10, 6, dtype=torch.float64), torch.randint(4, (10,)))
    assert bool(torch.isfinite(context(problem, paths(problem)["loop"], samples, Plan(batch=4)).displacement(plain)).all())


def test_a_single_sample_leaves_the_running_statistics_alone() -> None:
    problem, _ = bn()
    samples = samples_of([5], torch.randn(5, 6, dtype=torch.float64), torch.randint(4, (5,)))
    both = context(problem, paths(problem)["loop"], samples, Plan(batch=4, shuffle=False))
    both.displacement(plain)
    first = context(problem, paths(problem)["loop"], samples, Plan(batch=4, steps=1, shuffle=False))
    first.displacement(plain)
    torch.testing.assert_close(both.buffers, first.buffers)


def test_an_optimiser_that_goes_on_from_what_it_remembers() -> None:
    """Two times two steps with a memory are four steps."""
    problem = Problem(nn.Linear(3, 2), dtype=torch.float64)
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    samples, local = samples_of([4, 4], x, y), adamw()
    path, plan = paths(problem)["loop"], Plan(batch=4, steps=2, shuffle=False)
    slots = local.slots(problem.start.expand(2, -1))
    first = context(problem, path, samples, plan, local=local).descend(plain, slots)
    second = context(problem, path, samples, plan, local=local, message={"x": first}).descend(plain, slots)
    whole = context(problem, path, samples, Plan(batch=4, steps=4, shuffle=False), local=local).descend(plain)
    forgetful = context(problem, path, samples, plan, local=local, message={"x": first}).descend(plain)
    assert torch.equal(second, whole) and not torch.equal(forgetful, whole)
    assert slots["t"].flatten().tolist() == [4, 4]
