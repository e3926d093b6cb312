"""Models and their tokenizers: loaded from a folder (or by a hub's name where there is a network), or made small from a config.

A model is used as a function of token ids ``[B, T]`` alone, so that it is a module like any other to whoever trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hanse.core.errors import ConfigError, MissingExtraError

Kind = Literal["decoder", "encoder"]


def transformers() -> Any:
    """The module; raises ``MissingExtraError`` without it."""
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("a language model", "llm") from None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


ATTENTION = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
"""What configurations call the share of attention weights that is dropped."""


def load(path: str, kind: Kind, classes: int = 0) -> Any:
    """A model by ``from_pretrained``: a decoder, or an encoder with a new head for ``classes`` classes.

    Attention drops nothing, because its masks would not follow the run's seed. Raises ``ConfigError`` where there is no model, or
    none of this kind.
    """
    made = transformers()
    try:
        config = made.AutoConfig.from_pretrained(path)
        for name in ATTENTION:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        if kind == "decoder":
            return made.AutoModelForCausalLM.from_pretrained(path, config=config)
        config.num_labels = classes
        return made.AutoModelForSequenceClassification.from_pretrained(path, config=config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {path!r} cannot be loaded as {kind}: {str(error).splitlines()[0]}") from None


def tokenizer_of(path: str) -> Any:
    """A model's tokenizer; raises ``ConfigError`` where there is none."""
    try:
        return transformers().AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {path!r} has no tokenizer that can be loaded: {str(error).splitlines()[0]}") from None


SPECIAL = ("<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|mask|>")
"""Tokens of made tokenizers that no text has: padding, end of a text, ChatML's turns, and what an encoder has to guess."""


def train_tokenizer(texts: Sequence[str], size: int) -> Any:
    """A tokenizer of ``size`` tokens: BPE (Sennrich et al., arXiv 1508.07909) on bytes, so that every text can be written."""
    made = transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*SPECIAL], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    pad, end, _, _, mask = SPECIAL
    return made.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=pad, eos_token=end, mask_token=mask)


def make(kind: Kind, tokenizer: Any, *, width: int, layers: int, heads: int, length: int) -> Any:
    """A new model: Llama's architecture as decoder, BERT's as encoder of masked text; weights from torch's global generator."""
    made, size = transformers(), len(tokenizer)
    common = {
        "vocab_size": size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": length,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "decoder":
        config = made.LlamaConfig(
            **common,
            intermediate_size=3 * width,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
        return made.LlamaForCausalLM(config)
    return made.BertForMaskedLM(made.BertConfig(**common, intermediate_size=4 * width))


def has_virtual_tokens(model: nn.Module) -> bool:
    """Whether peft puts tokens of its own before a text."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


class Decoder(nn.Module):
    """Logits ``[B, T, vocabulary]`` of the next token at every position; what a tuning puts before the text is left out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.virtual = inner, has_virtual_tokens(inner)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=x, use_cache=False).logits
        return logits[:, -x.shape[1] :]


class Classifier(nn.Module):
    """Logits ``[B, classes]`` of texts padded with ``pad``."""

    def __init__(self, inner: nn.Module, pad: int) -> None:
        super().__init__()
        self.inner, self.pad, self.virtual = inner, pad, has_virtual_tokens(inner)

    def forward(self, x: Tensor) -> Tensor:
        real = x != self.pad
        if self.virtual:  # peft puts its own in front of a mask a token
            mask = real.long()
        else:  # one a pair of tokens is taken as it is; it is made of one a token after a look at its values, which vmap forbids
            mask = torch.zeros_like(real, dtype=torch.get_default_dtype()).masked_fill(~real, torch.finfo(torch.float32).min)
            mask = mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        logits: Tensor = self.inner(input_ids=x, attention_mask=mask).logits
        return logits


def save(model: Decoder | Classifier, tokenizer: Any, folder: Path, merge: bool) -> None:
    """Write a model in its library's format, with its tokenizer; of one that peft has tuned only what was trained, unless merged.

    Raises ``ConfigError`` where there is nothing to merge.
    """
    inner: Any = model.inner
    if merge:
        if not hasattr(inner, "merge_and_unload") or model.virtual:
            raise ConfigError("merge: not allowed: only lora and ia3 can become part of the model")
        inner = inner.merge_and_unload()
    inner.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
