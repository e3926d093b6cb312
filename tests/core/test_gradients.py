"""The three gradient paths against each other and against autograd written out here."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_clients import batch_of, chain, plainly
from torch import Tensor, nn

from hanse.core.errors import ConfigError
from hanse.core.gradients import linear_chain, own_module, paths
from hanse.core.losses import PerSample, cross_entropy, squared_error
from hanse.core.problem import Problem
from hanse.core.samples import Batch

COUNTS = [5, 5, 3, 1]


def problem_of(model: nn.Module, loss: PerSample = cross_entropy, dtype: torch.dtype = torch.float64) -> Problem:
    return Problem(model, loss, {}, dtype=dtype)


def rows(problem: Problem, clients: int) -> Tensor:
    """Different weights for every client."""
    generator = torch.Generator().manual_seed(1)
    return problem.start + 0.5 * torch.randn(clients, problem.layout.size, generator=generator, dtype=torch.float64).to(
        problem.dtype
    )


def no_buffers(problem: Problem, clients: int) -> Tensor:
    return problem.start_buffers.expand(clients, -1).clone()


def labels(loss: PerSample, n: int, outputs: int) -> Tensor:
    return torch.randint(outputs, (n,)) if loss is cross_entropy else torch.randn(n, outputs, dtype=torch.float64)


def check(problem: Problem, batch: Batch, counts: Sequence[int], tolerance: float, expected_paths: set[str]) -> None:
    w, found = rows(problem, len(counts)), paths(problem)
    assert set(found) == expected_paths
    expected, losses = plainly(problem, w, batch, counts)
    for name, path in found.items():
        before = w.clone()
        g, loss = path.grad(w, batch, no_buffers(problem, len(counts)))
        torch.testing.assert_close(g, expected, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(loss, losses, rtol=tolerance, atol=tolerance)
        looked = path.losses(w, batch, no_buffers(problem, len(counts)))
        torch.testing.assert_close(looked, losses, rtol=tolerance, atol=tolerance)
        assert torch.equal(w, before) and not looked.requires_grad


@settings(max_examples=60)
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    activations=st.lists(st.sampled_from([nn.ReLU, nn.Tanh, nn.Sigmoid]), min_size=3, max_size=3),
    bias=st.booleans(),
    loss=st.sampled_from([cross_entropy, squared_error]),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(lambda c: sorted(c, reverse=True)),
)
def test_all_paths_agree_with_autograd_in_float64(
    widths: list[int], activations: list[type[nn.Module]], bias: bool, loss: PerSample, counts: list[int]
) -> None:
    torch.manual_seed(0)
    problem = problem_of(chain(widths, activations, bias), loss)
    x = torch.randn(20, widths[0], dtype=torch.float64)
    check(problem, batch_of(counts, x, labels(loss, 20, widths[-1])), counts, 1e-12, {"loop", "vmap", "stacked"})


@pytest.mark.parametrize("loss", [cross_entropy, squared_error])
def test_all_paths_agree_in_float32(loss: PerSample) -> None:
    torch.manual_seed(0)
    problem = problem_of(chain([8, 16, 16, 5], [nn.ReLU, nn.Tanh]), loss, torch.float32)
    y = labels(loss, 20, 5)
    batch = batch_of(COUNTS, torch.randn(20, 8), y if loss is cross_entropy else y.float())
    check(problem, batch, COUNTS, 1e-5, {"loop", "vmap", "stacked"})


class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embed(x)))
        return out


class Tied(nn.Module):
    """One matrix read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x))
        return out


class Scaled(nn.Module):
    """A parameter without dimensions, and one that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale, self.idle = nn.Linear(6, 4), nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.body(x)


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4))


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    "convolution": (convolution, (2, 4, 4)),
    "group norm": (lambda: nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4), nn.GELU(), nn.Linear(4, 4)), (6,)),
    "embedding, a label at every place": (Bytes, None),
    "tied weights": (Tied, None),
    "scalar and unused parameters": (Scaled, (6,)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_agree_on_loop_and_vmap(case: str) -> None:
    torch.manual_seed(0)
    make, shape = OTHERS[case]
    problem = problem_of(make())
    if shape is None:
        x, y = torch.randint(7, (20, 5)), torch.randint(7, (20, 5))
    else:
        x, y = torch.randn(20, *shape, dtype=torch.float64), torch.randint(4, (20,))
    check(problem, batch_of(COUNTS, x, y), COUNTS, 1e-10, {"loop", "vmap"})


def test_one_client_with_large_layers_takes_the_unbatched_products() -> None:
    torch.manual_seed(0)
    problem = problem_of(chain([9, 30, 4], [nn.Sigmoid]))
    check(
        problem,
        batch_of([6], torch.randn(6, 9, dtype=torch.float64), torch.randint(4, (6,))),
        [6],
        1e-12,
        {"loop", "vmap", "stacked"},
    )


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + super().forward(x)
        return out


def test_a_chain_is_only_what_really_is_one() -> None:
    relu, linear = nn.ReLU(), nn.Linear(4, 4)
    shared_activation = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    layers = linear_chain(problem_of(shared_activation))
    assert layers is not None and [(name, bool(act)) for name, _, act in layers] == [
        ("0.weight", True),
        ("2.weight", True),
        ("4.weight", False),
    ]
    others = {
        "a layer used twice": nn.Sequential(linear, nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), linear),
        "an activation at the end": nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        "two activations in a row": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 4)),
        "a forward of its own": Residual(nn.Linear(4, 4)),
        "dropout": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)),
    }
    assert {name: linear_chain(problem_of(model)) for name, model in others.items()} == dict.fromkeys(others)
    assert linear_chain(Problem(shared_activation, cross_entropy, frozen=["0.*"])) is None


def test_shared_layers_and_activations_get_the_right_gradient() -> None:
    torch.manual_seed(0)
    relu, linear = nn.ReLU(), nn.Linear(4, 4)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(4, (20,))
    batch = batch_of(COUNTS, x, y)
    three = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4))
    check(problem_of(three), batch, COUNTS, 1e-12, {"loop", "vmap", "stacked"})
    check(problem_of(nn.Sequential(linear, relu, linear)), batch, COUNTS, 1e-12, {"loop", "vmap"})
    check(problem_of(Residual(nn.Linear(4, 4))), batch, COUNTS, 1e-12, {"loop", "vmap"})


def test_frozen_parameters_get_no_gradient() -> None:
    torch.manual_seed(0)
    problem = Problem(chain([4, 5, 3], [nn.ReLU]), frozen=["0.*"], dtype=torch.float64)
    assert problem.layout.size == 5 * 3 + 3
    check(
        problem, batch_of(COUNTS, torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))), COUNTS, 1e-12, {"loop", "vmap"}
    )


def test_batch_norm_runs_on_the_loop_alone_and_on_real_samples_alone() -> None:
    """Running statistics and gradients of ragged clients equal those of the module itself, client by client."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    problem, counts = problem_of(model), [5, 4, 2]
    batch = batch_of(counts, torch.randn(15, 3, dtype=torch.float64), torch.randint(2, (15,)))
    assert set(paths(problem)) == {"loop"}
    w, buffers = rows(problem, 3), no_buffers(problem, 3)
    gradient, _ = paths(problem)["loop"].grad(w, batch, buffers)
    for i, count in enumerate(counts):
        own = problem.model
        own.load_state_dict({n: t.clone() for n, t in problem.named(w[i], problem.start_buffers).items()})
        loss = cross_entropy(own.train()(batch.x[i, :count]), batch.y[i, :count]).mean()
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(own.parameters()))])
        torch.testing.assert_close(gradient[i], expected, rtol=1e-12, atol=1e-12)
        stats = problem.buffer_layout.flatten(dict(own.named_buffers()))
        torch.testing.assert_close(buffers[i], stats, rtol=1e-12, atol=1e-12)
        assert not torch.equal(stats, problem.start_buffers)


def test_models_with_five_dimensional_weights_run() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4**3, 3))
    problem = Problem(model)
    x, y = torch.randn(2, 5, 1, 4, 4, 4), torch.randint(3, (2, 5))
    batch = Batch(x, y, None, torch.arange(2), torch.zeros(2).long(), 0, 0)
    gradient, losses = paths(problem)["loop"].grad(problem.start.repeat(2, 1), batch, problem.start_buffers.repeat(2, 1))
    assert gradient.isfinite().all() and losses.isfinite().all()


def test_batch_norm_that_depends_on_the_order_of_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match="momentum=None is not allowed"):
        Problem(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)))


def test_looking_is_without_dropout_and_leaves_statistics_alone() -> None:
    torch.manual_seed(0)
    problem = problem_of(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)))
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    batch, w, buffers = batch_of(COUNTS, x, y), rows(problem, len(COUNTS)), no_buffers(problem, len(COUNTS)) + 0.3
    (path,) = paths(problem).values()
    before = buffers.clone()
    looked = path.losses(w, batch, buffers)
    for i, count in enumerate(COUNTS):
        (expected, *_) = problem.scores(w[i], buffers[i], batch.x[i, :count], batch.y[i, :count]).values()
        torch.testing.assert_close(looked[i], expected.mean())
    assert torch.equal(buffers, before)
    trained, _ = path.grad(w, batch, buffers.clone())
    again, _ = path.grad(w, batch, buffers.clone())
    assert torch.equal(trained, again)  # what was trained in is trained in still


def test_what_is_frozen_is_not_copied() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    problem = problem_of(model)
    (frozen,) = (t for n, t in problem.fixed.items() if n == "0.weight")
    assert own_module(problem)[0].weight.data_ptr() == frozen.data_ptr()
    assert own_module(problem)[1].weight.data_ptr() != problem.model[1].weight.data_ptr()


class Looks(nn.Module):
    """What it computes depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x if bool((x == 0).all()) else x / x.norm())
        return out


def test_models_that_look_at_values_are_left_to_the_loop() -> None:
    assert set(paths(Problem(Looks(), sample=torch.zeros(1, 6)))) == {"loop"}
    assert set(paths(Problem(Tied(), sample=torch.zeros(1, 4, dtype=torch.long)))) == {"loop", "vmap"}


def test_frozen_statistics_stay_as_they_are_whoever_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    problem = Problem(model, frozen=["BatchNorm1d"], dtype=torch.float64)
    before = {n: t.clone() for n, t in problem.fixed.items()}
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(3, (20,))
    paths(problem)["loop"].grad(rows(problem, 4), batch_of(COUNTS, x, y), no_buffers(problem, 4))
    assert all(torch.equal(t, before[n]) for n, t in problem.fixed.items())
