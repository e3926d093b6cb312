"""Which tokens are learned."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tiny import folder

from hanse.core.errors import DataError
from hanse.llm import alpaca, chatml
from hanse.llm.encoding import encode, pad_of, prompt_ids
from hanse.llm.examples import Example
from hanse.llm.models import tokenizer_of
from hanse.llm.scores import IGNORED
from hanse.llm.templates import Template

EXAMPLES = [Example("Repeat.", "the fox", "the fox", "copy"), Example("Say nothing.", "", "dog", "none")]


@pytest.mark.parametrize("template", [alpaca(preamble=False), chatml()])
def test_answers_and_their_end_are_learned_and_nothing_else(template: Template) -> None:
    tokenizer = tokenizer_of(folder())
    x, y, kept = encode(EXAMPLES, tokenizer, template, 80)
    assert kept.all() and x.shape == y.shape == (2, 80)
    for row, example in enumerate(EXAMPLES):
        learned = y[row] != IGNORED
        assert tokenizer.decode(y[row][learned]) == example.answer + template.end(tokenizer)
        first = int(learned.nonzero()[0])
        assert tokenizer.decode(x[row, : first + 1]) == template.prompt(example, tokenizer)
        assert torch.equal(x[row, first + 1 : first + int(learned.sum())], y[row][learned][:-1])  # a label is the next token
        assert (x[row, first + int(learned.sum()) :] == pad_of(tokenizer)).all()


def test_prompts_are_learned_on_request() -> None:
    tokenizer = tokenizer_of(folder())
    x, y, _ = encode(EXAMPLES, tokenizer, alpaca(preamble=False), 80, prompts=True)
    for row in range(2):
        count = int((y[row] != IGNORED).sum())
        assert torch.equal(y[row, : count - 1], x[row, 1:count])
        assert (y[row, count:] == IGNORED).all()


def test_what_is_cut_before_its_answer_is_dropped() -> None:
    tokenizer = tokenizer_of(folder())
    long = EXAMPLES[0]._replace(context="the fox " * 60)
    x, y, kept = encode([long, EXAMPLES[1]], tokenizer, alpaca(preamble=False), 60)
    assert kept.tolist() == [False, True] and len(x) == len(y) == 1
    with pytest.raises(DataError, match="length: 8 is not allowed: no answer is left of any of 2 examples"):
        encode(EXAMPLES, tokenizer, alpaca(), 8)


def test_an_answer_that_is_cut_keeps_its_beginning() -> None:
    tokenizer = tokenizer_of(folder())
    whole, _, _ = encode(EXAMPLES[:1], tokenizer, alpaca(preamble=False), 80)
    length = int((whole[0] != pad_of(tokenizer)).sum()) - 2
    _, y, kept = encode(EXAMPLES[:1], tokenizer, alpaca(preamble=False), length)
    said = tokenizer.decode(y[0][y[0] != IGNORED])
    assert kept.all() and EXAMPLES[0].answer.startswith(said) and said


def test_the_sign_of_a_beginning_is_put_once() -> None:
    tokenizer = tokenizer_of(folder())
    (plain,) = prompt_ids(tokenizer, ["dog"])
    tokenizer.bos_token, tokenizer.add_bos_token = "<|im_start|>", True
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert prompt_ids(tokenizer, ["dog", "<|im_start|>dog"]) == [[begin, *plain], [begin, *plain]]
