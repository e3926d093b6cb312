"""What is trained of a model, counted by the formulas, and given back as peft knows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from tiny import RECIPE, folder

from hanse.core.errors import ConfigError
from hanse.core.problem import Problem
from hanse.llm import Tuning, bias, full, ia3, last, lora, prefix, prompt, ptuning
from hanse.llm.models import Decoder, load
from hanse.llm.scores import answer_loss

L, D, F, V = RECIPE.layers, RECIPE.width, 3 * RECIPE.width, 301
MAPS = {
    "q_proj": (D, D),
    "k_proj": (D, D),
    "v_proj": (D, D),
    "o_proj": (D, D),
    "gate_proj": (D, F),
    "up_proj": (D, F),
    "down_proj": (F, D),
}
BLOCK = sum(i * o for i, o in MAPS.values()) + 2 * D

COUNTS: list[tuple[Tuning, int]] = [
    (full(), V * D + L * BLOCK + D),
    (last(), BLOCK + D),
    (last(layers=2), 2 * BLOCK + D),
    (lora(rank=4), L * sum(4 * (i + o) for i, o in MAPS.values())),
    (lora(rank=4, targets=("q_proj", "v_proj")), L * 2 * 4 * 2 * D),
    (lora(rank=4, targets=("q_proj",), ranks=(("layers.0.*", 2),)), (2 + 4 * (L - 1)) * 2 * D),
    (lora(rank=4, targets=("q_proj",), freeze_a=True), L * 4 * D),
    (prompt(tokens=5), 5 * D),
    (prefix(tokens=5), 2 * L * 5 * D),
    (ia3(), L * (2 * D + F)),
    (ia3(targets=("q_proj", "down_proj"), inputs=("down_proj",)), L * (D + F)),
]


def problem_of(tune: Tuning) -> Problem:
    torch.manual_seed(0)
    return Problem(Decoder(tune.applied(load(folder(), "decoder"), "decoder")), answer_loss, {})


@pytest.mark.parametrize(("tune", "count"), COUNTS, ids=lambda value: str(value))
def test_trained_numbers_are_those_of_the_formula(tune: Tuning, count: int) -> None:
    assert problem_of(tune).layout.size == count


def test_virtual_tokens_may_be_made_by_a_network() -> None:
    p, h = 5, 8
    assert problem_of(ptuning(tokens=p, hidden=h)).layout.size == p * D + (D * h + h) + (h * h + h) + (h * D + D)


@pytest.mark.parametrize("tune", [lora(), ia3(), prompt(tokens=3), prefix(tokens=3), last(), full()], ids=str)
def test_a_model_says_the_same_before_it_is_tuned_but_for_virtual_tokens(tune: Tuning) -> None:
    problem, plain = problem_of(tune), load(folder(), "decoder").eval()
    x = torch.randint(V, (2, 9))
    found = problem.output(problem.start, problem.start_buffers, x)
    assert found.shape == (2, 9, V)
    same = torch.allclose(found, plain(input_ids=x).logits, atol=1e-6)
    assert same == (tune not in (prompt(tokens=3), prefix(tokens=3)))


def moved(problem: Problem) -> torch.Tensor:
    return problem.start + 0.05 * torch.randn(problem.layout.size, generator=torch.Generator().manual_seed(1))


def test_a_tuned_model_loads_in_plain_peft_and_can_be_merged(tmp_path: Path) -> None:
    from peft import PeftModel

    problem, x = problem_of(lora(rank=2)), torch.randint(V, (2, 9))
    w = moved(problem)
    expected = problem.output(w, problem.start_buffers, x)
    problem.module(w, problem.start_buffers).inner.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder(), "decoder"), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=x).logits, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded.merge_and_unload()(input_ids=x).logits, expected, rtol=0, atol=1e-5)


def test_what_is_frozen_is_held_once() -> None:
    problem = problem_of(lora())
    one, other = (problem.module(w, problem.start_buffers) for w in (problem.start, moved(problem)))
    embeddings = "inner.base_model.model.model.embed_tokens.weight"
    places = {dict(m.named_parameters())[embeddings].data_ptr() for m in (one, other, problem.copy())}
    assert places == {problem.fixed[embeddings].data_ptr()}


WRONG = [
    (bias(), "no parameter of this model is called"),
    (last(layers=9), r"last\.layers: 9 is not allowed: the model has 3"),
    (lora(targets=("no_such",)), "tuning: Lora is not allowed for this model"),
]


@pytest.mark.parametrize(("tune", "why"), WRONG, ids=lambda value: str(value))
def test_what_does_not_fit_is_refused(tune: Tuning, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        problem_of(tune)
