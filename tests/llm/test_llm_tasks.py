"""Tasks of language models are tasks like any others: every rule, schedule, codec and engine applies."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from tiny import folder

import hanse as hs
from hanse.core.errors import ConfigError, DataError
from hanse.core.streams import Streams
from hanse.core.wire import wire_size
from hanse.data import Task
from hanse.engines import Engine
from hanse.llm import alpaca, commands, instruct, lora, prompt
from hanse.llm.commands import COMMANDS, examples, exercises, vocabulary
from hanse.llm.scores import IGNORED
from hanse.methods.base import Method
from hanse.schedules import Schedule

LONG = 200


def task(**how: object) -> commands:
    return commands(**{"base": folder(), "each": 5, "length": LONG, "tune": lora(rank=2, targets=("q_proj", "v_proj")), **how})


def federation(**how: object) -> hs.Federation:
    return hs.Federation(task(**how), clients=8, partition=hs.natural())


def test_commands_are_done_as_they_say() -> None:
    rng = Streams(0).numpy("task")
    found = examples(rng, 20)
    assert [example.category for example in found] == [name for name in COMMANDS for _ in range(20)]
    by = {example.category: example for example in found}
    said = by["sort"].context.split()
    assert by["sort"].answer.split() == sorted(said) and set(said) <= set(vocabulary())
    assert by["reverse"].answer.split()[::-1] == by["reverse"].context.split()
    assert by["initials"].answer == " ".join(word[0] for word in by["initials"].context.split())
    assert all(line.endswith("\n") and line[1:3] == ": " for line in exercises(rng, 9))


def test_every_client_has_a_category() -> None:
    split = federation().split
    assert split.names == tuple(sorted(COMMANDS)) and split.groups is not None
    assert (split.groups > 0).sum(1).tolist() == [1] * 8
    assert len(split.test_x) == 8 * 1 and split.test_x.shape[1] == LONG


ROUND: list[tuple[Method, Schedule, str]] = [
    (hs.methods.FedAvg(steps=1, batch=2), hs.schedules.synchronous(cohort=4), "identity"),
    (hs.methods.FedProx(steps=1, batch=2, local="adamw"), hs.schedules.synchronous(cohort=4), "topk(0.1) | uniform(8)"),
    (hs.methods.Scaffold(steps=1, batch=2), hs.schedules.synchronous(cohort=4), "feedback(topk(0.25))"),
    (hs.methods.FedAvg(steps=1, batch=2), hs.schedules.fedbuff(buffer=2, cohort=4), "uniform(4)"),
]


@pytest.mark.parametrize(("rule", "schedule", "codec"), ROUND, ids=lambda value: str(value)[:20])
def test_rules_schedules_and_codecs_apply(rule: Method, schedule: Schedule, codec: str) -> None:
    fed = federation()
    before = {n: t.clone() for n, t in fed.problem.fixed.items()}
    run = hs.run(
        fed, rule, schedule, rounds=2, codec=hs.codecs.Codec.parse(codec), engine=Engine.parse("local(path='vmap', workers=1)")
    )
    assert len(run.history) == 2 and run.history[-1]["metrics"]["test_loss"] > 0
    assert all(torch.equal(t, before[n]) for n, t in fed.problem.fixed.items())
    if codec == "identity" and rule.short_name == "FedAvg":  # adapters alone, each way
        once = wire_size({"x": fed.problem.start})
        assert fed.problem.layout.size * 4 < once < fed.problem.layout.size * 4 + 100
        assert run.history[-1]["bytes_down"] == once * sum(len(record["cohort"]) for record in run.history)
    assert len(run.answers) == 8 and {*run.answers[0]} == {"asked", "expected", "before", "after"}


def test_batched_clients_equal_clients_one_by_one() -> None:
    rule = hs.methods.FedAvg(steps=2, batch=2, lr=0.1)
    runs = [
        hs.run(federation(), rule, hs.schedules.synchronous(cohort=8), rounds=2, engine=hs.engines.local(path=path, chunk=chunk))
        for path, chunk in (("vmap", 8), ("loop", 1))
    ]
    for name, tensor in runs[0].weights.items():
        torch.testing.assert_close(tensor, runs[1].weights[name], rtol=1e-4, atol=1e-6)


def test_other_processes_come_to_the_same_bits() -> None:
    rule, schedule = hs.methods.FedAvg(steps=1, batch=2), hs.schedules.synchronous(cohort=4)
    how = "path='vmap', chunk=2, threads=1"
    engines = (f"local({how}, workers=2)", f"processes({how}, workers=2)")
    one, other = (hs.run(federation(), rule, schedule, rounds=2, engine=Engine.parse(engine)) for engine in engines)
    assert one.history == other.history
    assert all(torch.equal(t, other.weights[n]) for n, t in one.weights.items())


def test_what_a_model_says_is_read_off_the_test_samples() -> None:
    fed = federation(template=alpaca(preamble=False))
    said = fed.task.answers(fed.problem, fed.problem.start, fed.problem.start_buffers, fed.split.test_x, fed.split.test_y)
    asked = {example.context: example for example in examples(fed.streams.numpy("task", 1), 1)}
    for answer in said:
        context = answer["asked"].split("### Input:\n")[1].split("\n")[0]
        assert answer["expected"] == asked[context].answer and answer["before"] == answer["after"]


def rows(path: Path, lines: list[dict[str, object]]) -> str:
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_instructions_are_read_from_files(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = [{"ask": f"Say {i}.", "say": str(i), "kind": "ab"[i % 2]} for i in range(20)]
    path = rows(tmp_path / "a.jsonl.gz", lines)
    columns = {"instruction": "ask", "context": None, "answer": "say", "category": "kind"}
    data = instruct(path=path, base=folder(), length=LONG, **columns).data(Streams(0))
    assert (len(data.x), len(data.test_x), data.names) == (18, 2, ("a", "b"))
    (tmp_path / "a.csv").write_text("ask,say,kind\n" + "".join(f"{r['ask']},{r['say']},{r['kind']}\n" for r in lines))
    other = instruct(path=str(tmp_path / "a.csv"), base=folder(), length=LONG, **columns).data(Streams(0))
    assert torch.equal(data.x, other.x) and torch.equal(data.y, other.y)
    named = instruct(path=path, test=path, base=folder(), length=LONG, **columns).data(Streams(0))
    assert len(named.x) == len(named.test_x) == 20
    assert Task.parse(f"instruct({path!r}, context=None)") == instruct(path=path, context=None)


WRONG: list[tuple[list[dict[str, object]], str]] = [
    ([{"instruction": "a", "input": "", "output": 3.5}], r"a\.jsonl\.gz:1: field 'output' is no text: 3\.5; there are instruction"),
    (
        [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "output": "b"}],
        r":2: field 'input' is no text: None",
    ),
]


@pytest.mark.parametrize(("lines", "why"), WRONG)
def test_rows_that_will_not_do_are_named(lines: list[dict[str, object]], why: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=why):
        instruct(path=rows(tmp_path / "a.jsonl.gz", lines), base=folder()).data(Streams(0))


def test_real_instructions(real_data: Callable[[str], str]) -> None:
    how = {"instruction": "prompt", "context": None, "answer": "completion", "category": "dataset"}
    path = real_data("t0_tasks/test.jsonl.gz")
    data = instruct(path=path, base=folder(), length=LONG, **how).data(Streams(0))
    assert len(data.names) == 35 and data.x.shape[1] == LONG
    assert ((data.y != IGNORED).sum(1) > 0).all()


def test_models_that_are_not_there_are_named() -> None:
    with pytest.raises(ConfigError, match="model: '/nowhere' has no tokenizer that can be loaded"):
        _ = federation(base="/nowhere").split
    with pytest.raises(ConfigError, match="model: '/nowhere' cannot be loaded as decoder"):
        task(base="/nowhere", tune=prompt()).model()
