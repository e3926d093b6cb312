"""Tasks of language models: what is learned from which texts, starting from which model, training which of its numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from hanse.core.errors import DataError
from hanse.core.losses import PerSample
from hanse.core.problem import Problem
from hanse.core.streams import Streams
from hanse.data.files import holdout
from hanse.data.task import Answer, Dataset, Task
from hanse.llm.commands import examples
from hanse.llm.encoding import encode, pad_of, text_ids
from hanse.llm.examples import Columns, Example, read
from hanse.llm.generation import say
from hanse.llm.models import Classifier, Decoder, Kind, load, save, tokenizer_of
from hanse.llm.pretrain import small
from hanse.llm.scores import IGNORED, answer_loss, exact, tokens
from hanse.llm.templates import Template, alpaca
from hanse.llm.tuning import Tuning, lora

log = logging.getLogger(__name__)

FURTHER = 8
"""Tokens that a model may go on for beyond the longest expected answer."""
SMALL = "small"
"""The name of hanse's own model, which is trained when it is first needed."""


class Pretrained(Task):
    """Base of tasks that start from a language model."""

    abstract: ClassVar[bool] = True
    architecture: ClassVar[Kind] = "decoder"

    base: str = SMALL
    """Folder of the model and its tokenizer (or a name on a hub), or "small", which hanse trains itself."""
    tune: Tuning = lora()
    """What of it is trained."""

    @property
    def folder(self) -> str:
        """Where the model is."""
        return str(small(self.architecture)) if self.base == SMALL else self.base

    def export(self, module: nn.Module, folder: Path, merge: bool) -> None:
        """In the formats of transformers and peft."""
        save(cast(Decoder | Classifier, module), loaded(self.folder), folder, merge)


class Instructions(Pretrained):
    """Base of tasks that tune a decoder to follow instructions; the loss is that of the answers' tokens."""

    abstract: ClassVar[bool] = True

    template: Template = alpaca(preamble=False)
    """How instructions are written."""
    length: PositiveInt = 96
    """Tokens of an example; longer ones are cut."""
    prompts: bool = False
    """Whether prompts are learned as well."""

    @property
    def loss(self) -> PerSample:
        return answer_loss

    @property
    def metrics(self) -> Mapping[str, PerSample]:
        return {"tokens": tokens, "exact": exact}

    def model(self) -> nn.Module:
        return Decoder(self.tune.applied(load(self.folder, "decoder"), "decoder"))

    def dataset(self, train: Sequence[Example], test: Sequence[Example]) -> Dataset:
        """Examples as samples; their groups, and their owners, are their categories."""
        names = tuple(sorted({example.category for example in train}))
        number = {name: i for i, name in enumerate(names)}
        tokenizer = loaded(self.folder)
        x, y, kept = encode(train, tokenizer, self.template, self.length, self.prompts)
        test_x, test_y, kept_too = encode(test, tokenizer, self.template, self.length, self.prompts)
        lost = int((~kept).sum()) + int((~kept_too).sum())
        if lost:
            log.warning(
                "%d of %d examples are left out: nothing of their answers is within length=%d",
                lost,
                len(train) + len(test),
                self.length,
            )
        group = torch.tensor([number[example.category] for example in train])[kept]
        return Dataset(x, y, test_x, test_y, group, names, group, names)

    def answers(self, problem: Problem, w: Tensor, buffers: Tensor, x: Tensor, y: Tensor) -> list[Answer]:
        """Up to eight test examples and what the model says to them before and after; none where prompts are learned as well."""
        if self.prompts:
            return []
        tokenizer, rows = loaded(self.folder), torch.linspace(0, len(x) - 1, min(8, len(x))).long().tolist()
        asked = [x[row, : int((y[row] != IGNORED).nonzero()[0]) + 1].tolist() for row in rows]
        expected = [y[row][y[row] != IGNORED].tolist() for row in rows]
        end = self.template.end(tokenizer)
        ids = text_ids(tokenizer, [end])[0]
        stops = [tokenizer.eos_token_id, *(ids if len(ids) == 1 else [])]  # of an end of several tokens none is one by itself
        most = max(map(len, expected)) + FURTHER
        models = (cast(Decoder, problem.module(v, buffers)) for v in (problem.start, w))
        before, after = (say(model, asked, most, stops, pad_of(tokenizer)) for model in models)
        texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (asked, expected, before, after))
        return [
            Answer(asked=q.strip(), expected=e.split(end)[0].strip(), before=b.split(end)[0].strip(), after=a.split(end)[0].strip())
            for q, e, b, a in zip(*texts, strict=True)
        ]


class commands(Instructions):
    """Eight kinds of small work on words: repeat, reverse, capitals, sort, count, first, last, initials. Needs no file."""

    each: PositiveInt = 200
    """Examples of every kind; a fifth as many for testing."""

    def data(self, streams: Streams) -> Dataset:
        test = examples(streams.numpy("task", 1), max(1, self.each // 5))
        return self.dataset(examples(streams.numpy("task"), self.each), test)


class instruct(Instructions):
    """Instructions and answers from a JSONL or CSV file, or a data set that ``datasets`` loads."""

    path: str
    """The file (gzipped or not), or folder, or name on the hub."""
    test: str | None = None
    """Test file of the same form; without one a tenth is held out."""
    instruction: str = "instruction"
    """Field of what is asked."""
    context: str | None = "input"
    """Field of what it is asked about."""
    answer: str = "output"
    """Field of the answer."""
    category: str | None = None
    """Field that says what kind of work it is; also whose it is, for ``natural``."""

    def data(self, streams: Streams) -> Dataset:
        columns = Columns(self.instruction, self.context, self.answer, self.category)
        found = read(self.path, columns)
        if self.test is not None:
            return self.dataset(found, read(self.test, columns))
        test, train = holdout(len(found), 0.1, streams)
        return self.dataset([found[i] for i in train.tolist()], [found[i] for i in test.tolist()])


class classify(Pretrained):
    """Texts and their classes from a JSONL or CSV file, or a data set that ``datasets`` loads: an encoder with a new head, which is
    trained whatever else is.
    """

    architecture: ClassVar[Kind] = "encoder"

    path: str
    """The file (gzipped or not), or folder, or name on the hub."""
    test: str | None = None
    """Test file of the same form; without one a tenth is held out."""
    text: str = "text"
    """Field of the text."""
    label: str = "label"
    """Field of its class."""
    owner: str | None = None
    """Field that says whose it is."""
    length: PositiveInt = 64
    """Tokens of a text; longer ones are cut."""

    def data(self, streams: Streams) -> Dataset:
        columns = Columns(self.text, self.owner, self.label, None)
        found = read(self.path, columns)
        if self.test is None:
            held, rest = holdout(len(found), 0.1, streams)
            train, test = [found[i] for i in rest.tolist()], [found[i] for i in held.tolist()]
        else:
            train, test = found, read(self.test, columns)
        names = sorted({example.answer for example in found}, key=lambda name: (len(name), name) if name.isdigit() else (0, name))
        group = self._classes(train, names)
        owners = sorted({example.context for example in train})
        number = {name: i for i, name in enumerate(owners)}
        owner = torch.tensor([number[example.context] for example in train]) if self.owner else None
        x, y = self._ids(train), self._ids(test)
        return Dataset(x, group, y, self._classes(test, names), group, tuple(names), owner, tuple(owners) if self.owner else ())

    def _classes(self, rows: Sequence[Example], names: Sequence[str]) -> Tensor:
        number = {name: i for i, name in enumerate(names)}
        for row in rows:
            if row.answer not in number:
                raise DataError(f"{self.test}: label {row.answer!r} is not allowed: {', '.join(names)}")
        return torch.tensor([number[row.answer] for row in rows])

    def _ids(self, rows: Sequence[Example]) -> Tensor:
        tokenizer = loaded(self.folder)
        how = {"truncation": True, "max_length": self.length, "padding": "max_length", "padding_side": "right"}
        ids: Tensor = tokenizer([row.instruction for row in rows], return_tensors="pt", **how)["input_ids"]
        return ids

    def model(self) -> nn.Module:
        classes = len({example.answer for example in read(self.path, Columns(self.text, None, self.label, None))})
        return Classifier(self.tune.applied(load(self.folder, "encoder", classes), "encoder"), pad_of(loaded(self.folder)))


@lru_cache(maxsize=4)
def loaded(folder: str) -> Any:
    """A tokenizer, kept."""
    return tokenizer_of(folder)
