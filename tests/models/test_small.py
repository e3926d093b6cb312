import pytest
import torch
from torch import nn

from hanse.core.gradients import paths
from hanse.core.losses import cross_entropy, own_loss
from hanse.core.problem import Problem
from hanse.core.samples import Plan, Samples
from hanse.core.streams import Streams
from hanse.models.small import ByteWindow, Quadratic, cnn, mlp

SAMPLES = {
    "mlp": (lambda: mlp(12, 5, 3, flatten=True), (3, 4)),
    "cnn": (lambda: cnn(2, 9, 6, 3, hidden=8), (2, 9, 6)),
    "bytes": (lambda: ByteWindow(context=3, width=4, hidden=8), None),
    "quadratic": (lambda: Quadratic(5), (2, 5)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_many_clients_at_once_equal_one_at_a_time(name):
    make, shape = SAMPLES[name]
    torch.manual_seed(0)
    model: nn.Module = make()
    problem = Problem(model, own_loss if name == "quadratic" else cross_entropy, dtype=torch.float64)
    if shape is None:
        x, y = torch.randint(256, (3, 2, 7)), torch.randint(256, (3, 2, 7))
    else:
        x, y = torch.randn(3, 2, *shape, dtype=torch.float64), torch.randint(3, (3, 2))
    w = problem.start + 0.1 * torch.randn(3, problem.layout.size, dtype=torch.float64)
    samples = Samples(x.flatten(0, 1), y.flatten(0, 1), torch.tensor([0, 2, 4, 6]))
    zeros, ones = torch.zeros(3).long(), torch.ones(3).long()
    [(_, batch)] = Plan(batch=2).batches(samples, torch.arange(3), Streams(0), zeros, ones)
    buffers = problem.start_buffers.expand(3, -1)
    found = {key: path.grad(w, batch, buffers) for key, path in paths(problem).items()}
    assert {"loop", "vmap"} <= set(found)
    for gradient, loss in found.values():
        torch.testing.assert_close(gradient, found["loop"][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss, found["loop"][1], rtol=1e-10, atol=1e-12)


def test_byte_window_sees_the_last_bytes_and_none_to_come():
    torch.manual_seed(0)
    model = ByteWindow(context=3, width=4, hidden=16)
    x = torch.randint(256, (1, 10))
    before = model(x)
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % 256
    touched = (model(changed) != before).any(-1)[0]
    assert touched.tolist() == [False] * 5 + [True] * 3 + [False] * 2
    assert before.shape == (1, 10, 256)


def test_the_cnn_has_the_sizes_of_its_description():
    model = cnn(1, 28, 28, 10, hidden=512)
    assert sum(p.numel() for p in model.parameters()) == 1_663_370  # as in the paper


def test_a_deep_tanh_network_has_the_weights_of_glorot_and_bengio():
    torch.manual_seed(0)
    model = mlp(64, 96, 10, depth=3, activation="tanh")
    assert [type(m).__name__ for m in model] == ["Linear", "Tanh"] * 3 + ["Linear"]
    layers = model[::2]
    assert [tuple(m.weight.shape) for m in layers] == [(96, 64), (96, 96), (96, 96), (10, 96)]
    for layer in layers:
        assert float(layer.weight.detach().var()) == pytest.approx(2 / sum(layer.weight.shape), rel=0.1)
        assert not layer.bias.any()
