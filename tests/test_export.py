"""Final models for others: read back by the libraries they are for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import hanse as hs
from hanse.core.errors import CheckpointError, ConfigError
from hanse.export import export

sys.path.insert(0, str(Path(__file__).parent / "llm"))


def trained(federation: hs.Federation, out: Path) -> hs.Run:
    rule, schedule = hs.methods.FedAvg(steps=1, batch=2, lr=0.5), hs.schedules.synchronous(cohort=2)
    return hs.run(federation, rule, schedule, rounds=1, out=out, engine=hs.engines.local(workers=1))


def test_tensors_by_name_load_in_plain_torch(tmp_path: Path) -> None:
    from safetensors.torch import load_model

    fed = hs.Federation(hs.tasks.digits(hidden=4), clients=2)
    run = trained(fed, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    model = fed.task.model()
    load_model(model, str(tmp_path / "model" / "model.safetensors"))
    assert all(torch.equal(t, run.weights[n]) for n, t in model.state_dict().items())
    with pytest.raises(ConfigError, match=r"folder: .*model is not allowed: it is there already"):
        export(tmp_path / "run", tmp_path / "model")
    with pytest.raises(ConfigError, match="merge: not allowed: nothing was trained beside this task's model"):
        export(tmp_path / "run", tmp_path / "other", merge=True)
    with pytest.raises(CheckpointError, match="not a run folder"):
        export(tmp_path / "nothing", tmp_path / "other")


def test_adapters_load_in_plain_peft_and_merged_models_in_plain_transformers(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from tiny import folder

    from hanse.llm import commands, lora

    fed = hs.Federation(commands(base=folder(), each=2, length=200, tune=lora(rank=2)), clients=8, partition=hs.natural())
    run = trained(fed, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "adapter")
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    x = fed.split.test_x[:2]
    expected = fed.problem.output(*fed.problem.vectors(run.weights), x)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder())
    assert not torch.allclose(base.eval()(input_ids=x).logits, expected, atol=1e-4)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(tuned(input_ids=x).logits, expected, rtol=0, atol=1e-5)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=x).logits, expected, rtol=0, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|end|>"
