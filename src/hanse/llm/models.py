"""Models and their tokenizers: loaded from a folder (or by a hub's name where there is a network), or made small from a config.

A model is used as a function of token ids ``[B, T]`` alone, so that it is a module like any other to whoever trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from hanse.core.errors import ConfigError, MissingExtraError

Kind = Literal["decoder", "encoder", "seq2seq"]


def transformers() -> Any:
    """The module; raises ``MissingExtraError`` without it."""
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("a language model", "llm") from None
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


def load(path: str, kind: Kind, classes: int = 0) -> Any:
    """A model by ``from_pretrained``: a decoder, an encoder with a new head for ``classes`` classes, or both in one.

    Raises ``ConfigError`` where there is none, or none of this kind.
    """
    made = transformers()
    try:
        if kind == "decoder":
            return made.AutoModelForCausalLM.from_pretrained(path)
        if kind == "encoder":
            return made.AutoModelForSequenceClassification.from_pretrained(path, num_labels=classes)
        return made.AutoModelForSeq2SeqLM.from_pretrained(path)
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


def make(kind: Kind, tokenizer: Any, *, width: int, layers: int, heads: int, length: int, classes: int = 0) -> Any:
    """A new model: Llama's architecture as decoder, BERT's as encoder; weights from torch's global generator."""
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
    if kind == "encoder":
        config = made.BertConfig(**common, intermediate_size=4 * width, num_labels=max(2, classes))
        return made.BertForSequenceClassification(config) if classes else made.BertForMaskedLM(config)
    raise ConfigError(f"kind: {kind!r} is not allowed for a new model: decoder or encoder")


class Decoder(nn.Module):
    """Logits ``[B, T, vocabulary]`` of the next token at every position; what a tuning puts before the text is left out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=x, use_cache=False).logits
        return logits[:, -x.shape[1] :]


class Classifier(nn.Module):
    """Logits ``[B, classes]`` of texts padded with ``pad``."""

    def __init__(self, inner: nn.Module, pad: int) -> None:
        super().__init__()
        self.inner, self.pad = inner, pad

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=x, attention_mask=(x != self.pad).long()).logits
        return logits
