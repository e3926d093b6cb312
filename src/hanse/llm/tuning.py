"""What of a model is trained: everything, or little beside it or in it (by peft). Everything else is frozen and held once.

Counts of trained numbers, for maps of ``d_out x d_in``, L layers of width d with keys and values of width k, p virtual tokens:

    lora      sum over maps r (d_in + d_out)     Hu et al., arXiv 2106.09685
    prompt    p d                                 Lester et al., arXiv 2104.08691
    ptuning   a network that makes p d            Liu et al., arXiv 2103.10385
    prefix    2 L p k                             Li and Liang, arXiv 2101.00190
    ia3       sum over maps: its inputs or outputs   Liu et al., arXiv 2205.05638
    bias      the biases that there are           Ben Zaken et al., arXiv 2106.10199
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from hanse.core.errors import ConfigError, MissingExtraError
from hanse.core.part import Part
from hanse.llm.models import Kind


class Tuning(Part):
    """Base of all tunings."""

    kind: ClassVar[str] = "tuning"
    abstract: ClassVar[bool] = True

    def applied(self, model: Any, kind: Kind) -> nn.Module:
        """``model`` with ``requires_grad`` where it is trained; may be wrapped. New numbers come from torch's global generator."""
        raise TypeError(f"{type(self).__name__} does not define applied")


class full(Tuning):
    """Everything is trained."""

    def applied(self, model: Any, kind: Kind) -> nn.Module:
        return trained(model, ["*"])


class last(Tuning):
    """The last layers, and what comes after them."""

    layers: PositiveInt = 1
    """How many."""

    def applied(self, model: Any, kind: Kind) -> nn.Module:
        groups = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        if not groups:
            raise ConfigError("last: not allowed for this model: it has no list of layers")
        name, stack = max(groups, key=lambda group: len(group[1]))
        if self.layers > len(stack):
            raise ConfigError(f"last.layers: {self.layers} is not allowed: the model has {len(stack)}")
        names = [n for n, _ in model.named_parameters()]
        end = max(i for i, n in enumerate(names) if n.startswith(f"{name}."))
        late = [f"{name}.{i}.*" for i in range(len(stack) - self.layers, len(stack))]
        return trained(model, [*late, *names[end + 1 :]])


class bias(Tuning):
    """The biases (BitFit), and a classifier's head."""

    def applied(self, model: Any, kind: Kind) -> nn.Module:
        return trained(model, ["*.bias", *(["classifier.*", "score.*"] if kind == "encoder" else [])])


class lora(Tuning):
    """Low-rank additions ``scale B A`` to linear maps, A random and B zero at first."""

    rank: PositiveInt = 8
    """Rank r."""
    scale: PositiveFloat = 2.0
    """Factor alpha / r, which does not change with the rank."""
    targets: tuple[str, ...] = ()
    """Ends of the names of the maps, as in ("q_proj", "v_proj"); without any, all linear maps of the layers."""
    ranks: tuple[tuple[str, PositiveInt], ...] = ()
    """Other ranks for maps by pattern, as in (("layers.0.*", 4),)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a map's inputs that the addition does not see."""
    freeze_a: bool = False
    """Train B alone."""

    def applied(self, model: Any, kind: Kind) -> nn.Module:
        patterns = {_regular(pattern): rank for pattern, rank in self.ranks}
        tuned = adapted(
            model,
            kind,
            "LoraConfig",
            r=self.rank,
            lora_alpha=self.scale * self.rank,
            rank_pattern=patterns,
            alpha_pattern={pattern: self.scale * rank for pattern, rank in patterns.items()},
            target_modules=[*self.targets] or "all-linear",
            lora_dropout=self.dropout,
        )
        if self.freeze_a:
            for name, parameter in tuned.named_parameters():
                if ".lora_A." in name:
                    parameter.requires_grad_(False)
        return tuned


class ia3(Tuning):
    """Factors on keys, values and the inputs of the second map of a feed-forward part."""

    targets: tuple[str, ...] = ()
    """Ends of the names of the maps; without any, peft's choice for the architecture."""
    inputs: tuple[str, ...] = ()
    """Those of them whose inputs are scaled instead of their outputs."""

    def applied(self, model: Any, kind: Kind) -> nn.Module:
        chosen = {"target_modules": [*self.targets], "feedforward_modules": [*self.inputs]} if self.targets else {}
        return adapted(model, kind, "IA3Config", **chosen)


class prompt(Tuning):
    """Virtual tokens before the text."""

    tokens: PositiveInt = 20
    """How many."""

    def applied(self, model: Any, kind: Kind) -> nn.Module:
        return adapted(model, kind, "PromptTuningConfig", num_virtual_tokens=self.tokens)


class ptuning(Tuning):
    """Virtual tokens before the text, made by a small network."""

    tokens: PositiveInt = 20
    """How many."""
    hidden: PositiveInt = 64
    """Width of the network."""

    def applied(self, model: Any, kind: Kind) -> nn.Module:
        return adapted(model, kind, "PromptEncoderConfig", num_virtual_tokens=self.tokens, encoder_hidden_size=self.hidden)


class prefix(Tuning):
    """Virtual keys and values before those of the text, in every layer."""

    tokens: PositiveInt = 20
    """How many."""

    def applied(self, model: Any, kind: Kind) -> nn.Module:
        return adapted(model, kind, "PrefixTuningConfig", num_virtual_tokens=self.tokens)


TASKS = {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS"}


def adapted(model: Any, kind: Kind, config: str, **settings: Any) -> nn.Module:
    """``model`` in one of peft's forms; raises ``MissingExtraError`` without peft, ``ConfigError`` where it does not fit."""
    try:
        import peft
    except ImportError:
        raise MissingExtraError(f"tuning with {config}", "llm") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what peft has yet to change is not the user's affair
            tuned: nn.Module = peft.get_peft_model(model, getattr(peft, config)(task_type=TASKS[kind], **settings))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"tuning: {config.removesuffix('Config')} is not allowed for this model: {error}") from None
    return tuned


def trained(model: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """``model`` with only those parameters trained whose names match; raises ``ConfigError`` if none does."""
    hit = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))
        hit |= parameter.requires_grad
    if not hit:
        raise ConfigError(f"tuning: no parameter of this model is called {' or '.join(patterns)}")
    return model


def _regular(pattern: str) -> str:
    """A shell pattern as the regular expression that peft reads."""
    return ".*" + pattern.replace(".", r"\.").replace("*", ".*")
