"""How an instruction is written for a model: the prompt, and the answer that is to follow it.

Alpaca: Taori et al., "Stanford Alpaca", 2023, and Zhang et al., arXiv 2305.05644 (FedIT). ChatML: OpenAI's markup of conversations.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hanse.core.errors import ConfigError
from hanse.core.part import Part
from hanse.llm.examples import Example


class Template(Part):
    """Base of all templates."""

    kind: ClassVar[str] = "template"
    abstract: ClassVar[bool] = True

    def prompt(self, example: Example, tokenizer: Any) -> str:
        """All that comes before the answer."""
        raise TypeError(f"{type(self).__name__} does not define prompt")

    def end(self, tokenizer: Any) -> str:
        """What follows the answer."""
        return str(tokenizer.eos_token)


class alpaca(Template):
    """A preamble, then sections that are called Instruction, Input (where there is a context) and Response."""

    preamble: bool = True
    """Whether the sentence that describes the task comes first; without it small models have less to read."""

    def prompt(self, example: Example, tokenizer: Any) -> str:
        asked = f"### Instruction:\n{example.instruction}\n\n"
        about = f"### Input:\n{example.context}\n\n" if example.context else ""
        further = ", paired with an input that provides further context" if example.context else ""
        first = f"Below is an instruction that describes a task{further}. "
        first += "Write a response that appropriately completes the request.\n\n"
        return f"{first if self.preamble else ''}{asked}{about}### Response:\n"


class chatml(Template):
    """Turns of user and assistant between ``<|im_start|>`` and ``<|im_end|>``."""

    system: str = ""
    """What the system says first, if anything."""

    def prompt(self, example: Example, tokenizer: Any) -> str:
        turns = [("system", self.system)] if self.system else []
        turns.append(("user", message(example)))
        return "".join(f"<|im_start|>{who}\n{said}<|im_end|>\n" for who, said in turns) + "<|im_start|>assistant\n"

    def end(self, tokenizer: Any) -> str:
        return "<|im_end|>"


class own(Template):
    """The tokenizer's own chat template."""

    def prompt(self, example: Example, tokenizer: Any) -> str:
        self._check(tokenizer)
        turns = [{"role": "user", "content": message(example)}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def end(self, tokenizer: Any) -> str:
        """What the template puts behind an answer, which is that behind a made one."""
        self._check(tokenizer)
        marker = "ANSWER"
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": marker}]
        _, found, end = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(marker)
        return end if found else str(tokenizer.eos_token)

    def _check(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("template: own is not allowed: this model's tokenizer has no chat template; alpaca or chatml")


def message(example: Example) -> str:
    """An instruction and its context as one turn of a conversation."""
    return f"{example.instruction}\n\n{example.context}" if example.context else example.instruction
