"""What a model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hanse.llm.models import Decoder


@torch.no_grad()
def say(model: Decoder, prompts: Sequence[Sequence[int]], most: int, end: Sequence[int], pad: int) -> list[list[int]]:
    """Greedy answers to prompts, as token ids: at most so many, or up to one of ``end``.

    One prompt at a time, so that no answer depends on the others or on padding.
    """
    inner: Any = model.inner
    device, said = next(model.parameters()).device, []
    for prompt in prompts:
        x = torch.tensor([prompt], device=device)
        how = {"max_new_tokens": most, "do_sample": False, "eos_token_id": [*end], "pad_token_id": pad}
        said.append(inner.generate(input_ids=x, attention_mask=torch.ones_like(x), **how)[0, len(prompt) :].tolist())
    return said
