"""Small models that know something: trained from nothing on plain text, and kept in a folder as ``save_pretrained`` writes it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from hanse.core.cache import cache_folder
from hanse.core.part import Part
from hanse.core.streams import Streams
from hanse.llm.commands import documentation, exercises
from hanse.llm.models import Kind, make, train_tokenizer
from hanse.llm.scores import IGNORED

log = logging.getLogger(__name__)


class Recipe(Part):
    """How a small model is made."""

    kind = "recipe"

    architecture: Kind = "decoder"
    """Llama's, learning the next token; or BERT's, learning a masked one."""
    vocabulary: PositiveInt = 1024
    """Tokens."""
    width: PositiveInt = 128
    """Width of a layer."""
    layers: PositiveInt = 4
    """Number of layers."""
    heads: PositiveInt = 4
    """Attention heads."""
    length: PositiveInt = 128
    """Tokens of a sequence."""
    longest: PositiveInt = 512
    """Tokens of the longest sequence that it will be able to read."""
    batch: PositiveInt = 32
    """Sequences of a step."""
    steps: PositiveInt = 500
    """Steps."""
    lr: PositiveFloat = 3e-3
    """Highest learning rate; half a cosine after a tenth of warm-up."""
    seed: int = 0
    """Of the weights and the order of the text."""


def pretrain(recipe: Recipe, texts: Sequence[str], folder: Path) -> float:
    """Train a tokenizer and a model on ``texts`` and save both in ``folder``, a new one; the mean loss of the last steps."""
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    ids = torch.tensor([i for row in tokenizer([*texts])["input_ids"] for i in (*row, tokenizer.eos_token_id)])
    streams = Streams(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.torch("pretrain").initial_seed())
        sizes = {"width": recipe.width, "layers": recipe.layers, "heads": recipe.heads, "length": recipe.longest}
        model = make(recipe.architecture, tokenizer, **sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.1, betas=(0.9, 0.95))
    rng, losses = streams.torch("order"), []
    for step in range(recipe.steps):
        starts = torch.randint(len(ids) - recipe.length - 1, (recipe.batch, 1), generator=rng)
        rows = ids[starts + torch.arange(recipe.length + 1)]
        if recipe.architecture == "decoder":
            x, y = rows[:, :-1], rows[:, 1:]
        else:
            x, y = masked(rows[:, :-1], tokenizer, rng)
        warm = max(1, recipe.steps // 10)
        share = min(1.0, (step + 1) / warm) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / recipe.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * share
        logits = model(input_ids=x).logits
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            log.info("step %d of %d: loss %.3f", step + 1, recipe.steps, sum(losses[-100:]) / 100)
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    part.mkdir(parents=True)
    model.eval().save_pretrained(part)
    tokenizer.save_pretrained(part)
    last = sum(losses[-50:]) / len(losses[-50:])
    (part / "recipe.json").write_text(json.dumps({"recipe": recipe.full(), "loss": last}))
    part.rename(folder)
    return last


def masked(x: Tensor, tokenizer: Any, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's task (Devlin et al., arXiv 1810.04805): 15 % of the tokens are guessed; of these 80 % are masked, 10 % others."""
    chance, how = (torch.rand(x.shape, generator=rng) for _ in range(2))
    guessed = chance < 0.15
    other = torch.randint(len(tokenizer), x.shape, generator=rng)
    seen = torch.where(guessed & (how < 0.8), tokenizer.mask_token_id, torch.where(guessed & (how > 0.9), other, x))
    return seen, torch.where(guessed, x, IGNORED)


def small(architecture: Kind = "decoder") -> Path:
    """The folder of a model of a million parameters that has read Python's language reference and done exercises on its words.

    Trained when it is first asked for, which takes minutes, and kept in the cache.
    """
    recipe = Recipe(architecture=architecture)
    name = hashlib.blake2b(recipe.full().encode(), digest_size=4).hexdigest()
    folder = cache_folder() / "models" / f"small-{architecture}-{name}"
    if not folder.is_dir():
        log.warning("training the small %s that this task starts from, once, in %s", architecture, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        text = [documentation(), *exercises(Streams(recipe.seed).numpy("exercises"), 20_000)]
        try:
            pretrain(recipe, text, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            for left in folder.parent.glob(f".{folder.name}.{os.getpid()}"):
                shutil.rmtree(left, ignore_errors=True)
    return folder
