"""Texts in classes, by an encoder with a new head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from tiny import RECIPE, folder

import hanse as hs
from hanse.core.errors import DataError
from hanse.core.streams import Streams
from hanse.llm import classify, last, lora
from hanse.llm.tuning import Tuning


def rows(path: Path, labels: list[object]) -> str:
    path.write_text(
        "".join(json.dumps({"text": f"the fox {i}", "label": label, "who": "xy"[i % 2]}) + "\n" for i, label in enumerate(labels))
    )
    return str(path)


def test_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", [10, 2, 1, 2, 10, 1] * 4)
    task = classify(path=path, base=folder("encoder"), owner="who", length=12)
    data = task.data(Streams(0))
    assert data.names == ("1", "2", "10") and data.owner_names == ("x", "y") and data.owner is not None
    assert (len(data.x), len(data.test_x), data.x.shape[1]) == (22, 2, 12)
    assert torch.equal(data.y, data.group)


@pytest.mark.parametrize("tune", [lora(rank=2, targets=("query", "value")), last()], ids=str)
def test_a_head_is_trained_in_any_case(tune: Tuning, tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", ["good", "bad"] * 12)
    fed = hs.Federation(classify(path=path, base=folder("encoder"), tune=tune, length=12), clients=2)
    D = RECIPE.width
    head = [e.size for e in fed.problem.layout.entries if "classifier" in e.name]
    assert sorted(head) == [2, 2 * D]
    if tune == lora(rank=2, targets=("query", "value")):
        assert fed.problem.layout.size == RECIPE.layers * 2 * 2 * 2 * D + 2 * D + 2
    rule, schedule = hs.methods.FedAvg(steps=3, batch=6, lr=0.01, local="adamw"), hs.schedules.synchronous(cohort=2)
    one, other = (
        hs.run(fed, rule, schedule, rounds=2, engine=hs.engines.local(path=path, chunk=1, workers=1)) for path in ("loop", "vmap")
    )
    assert one.history[-1]["loss"] < one.history[0]["loss"]
    torch.testing.assert_close(one.history[-1]["loss"], other.history[-1]["loss"], rtol=1e-3, atol=1e-5)  # with the same dropout


def test_padding_says_nothing(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", ["good", "bad"] * 12)
    short, long = (hs.Federation(classify(path=path, base=folder("encoder"), length=n), clients=2) for n in (14, 40))
    outputs = [fed.problem.output(fed.problem.start, fed.problem.start_buffers, fed.split.test_x) for fed in (short, long)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_class_that_is_only_in_the_test_is_refused(tmp_path: Path) -> None:
    path, test = rows(tmp_path / "a.jsonl", ["good", "bad"] * 3), rows(tmp_path / "b.jsonl", ["ugly"])
    with pytest.raises(DataError, match=r"b\.jsonl: label 'ugly' is not allowed: bad, good"):
        classify(path=path, test=test, base=folder("encoder"), length=12).data(Streams(0))


def test_real_sentences(real_data: Callable[[str], str]) -> None:
    data = classify(path=real_data("sst2/dev.jsonl.gz"), base=folder("encoder"), length=32).data(Streams(0))
    assert data.names == ("0", "1") and len(data.x) + len(data.test_x) == 872
