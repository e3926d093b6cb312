"""What every peer script shares: the exported workload, the same models, and the line of JSON at the end."""

import json
import os
import resource
import statistics
import sys
import time

import numpy as np
import torch
from torch import nn

WORK = dict(np.load(sys.argv[1], allow_pickle=False)) if len(sys.argv) > 1 else {}


def setting(name):
    return WORK[name].item()


def make_model(kind):
    if kind == "mlp":
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    if kind == "big":
        return nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def start_model():
    """The model with the workload's initial weights."""
    model, at = make_model(setting("model")), 0
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(WORK["start"][at : at + p.numel()]).view_as(p))
            at += p.numel()
    return model


def client(c):
    """``x`` and ``y`` of one client."""
    a, b = WORK["offsets"][c : c + 2]
    return WORK["x"][a:b], WORK["y"][a:b]


class Rounds:
    """Times rounds and prints the result."""

    def __init__(self):
        self.times = []

    def mark(self):
        self.times.append(time.perf_counter())

    def done(self, arrays):
        spent = np.diff(self.times)
        model = make_model(setting("model"))
        with torch.no_grad():
            for p, a in zip(model.parameters(), arrays, strict=True):
                p.copy_(torch.from_numpy(np.array(a)))
            output, y = model(torch.from_numpy(WORK["test_x"])), torch.from_numpy(WORK["test_y"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        result = {
            "seconds": statistics.median(spent[1:]),
            "first": float(spent[0]),
            "peak_mb": peak / 1024,
            "loss": float(nn.functional.cross_entropy(output, y)),
            "accuracy": float((output.argmax(1) == y).float().mean()),
        }
        print(json.dumps(result), flush=True)
        sys.stdout.flush()
        os._exit(0)  # some tools leave threads behind that would keep the process alive
