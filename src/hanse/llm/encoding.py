"""Prompts and answers as token ids and labels.

Position t is labelled with the token at t + 1. Sequences are padded on the right, where a causal model's padding changes nothing
before it, and cut to ``length`` from the right, as the page of FedIT has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hanse.core.errors import DataError
from hanse.llm.examples import Example
from hanse.llm.scores import IGNORED
from hanse.llm.templates import Template


class Encoded(NamedTuple):
    """Token ids and labels, int64 ``[N, length]``, of those examples that are ``kept``, bool ``[all]``."""

    x: Tensor
    y: Tensor
    kept: Tensor


def encode(examples: Sequence[Example], tokenizer: Any, template: Template, length: int, prompts: bool = False) -> Encoded:
    """Examples in a template; with ``prompts`` the prompts are learned as well.

    Examples of which no part of the answer is left within ``length`` are not kept. Raises ``DataError`` if none is.
    """
    end = template.end(tokenizer)
    asked = prompt_ids(tokenizer, [template.prompt(example, tokenizer) for example in examples])
    answered = text_ids(tokenizer, [example.answer + end for example in examples])
    x = torch.full((len(examples), length), pad_of(tokenizer))
    y = torch.full((len(examples), length), IGNORED)
    kept = torch.zeros(len(examples), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(asked, answered, strict=True)):
        ids = torch.tensor([*prompt, *answer][: length + 1])
        first = 0 if prompts else len(prompt) - 1  # the last token of the prompt is labelled with the first of the answer
        x[row, : len(ids) - 1] = ids[:-1]
        y[row, first : len(ids) - 1] = ids[first + 1 :]
        kept[row] = len(ids) > len(prompt)
    if len(examples) and not kept.any():
        raise DataError(f"length: {length} is not allowed: no answer is left of any of {len(examples)} examples")
    return Encoded(x[kept], y[kept], kept)


def text_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, without anything that a tokenizer puts around them."""
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return found


def prompt_ids(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Token ids of what begins a text, with the sign of a beginning where the tokenizer puts one."""
    begin = tokenizer.bos_token_id if getattr(tokenizer, "add_bos_token", False) else None
    return [ids if begin is None or ids[:1] == [begin] else [begin, *ids] for ids in text_ids(tokenizer, prompts)]


def pad_of(tokenizer: Any) -> int:
    """The id that sequences are padded with: the tokenizer's own, or that of the end of a text."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
