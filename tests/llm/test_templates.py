"""How instructions are written, letter by letter."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tiny import folder

from hanse.core.errors import ConfigError
from hanse.llm import alpaca, chatml, own
from hanse.llm.examples import Example
from hanse.llm.models import tokenizer_of

ASKED = Example("Sort the words.", "b a", "a b", "sort")
BARE = ASKED._replace(context="")


def test_alpaca() -> None:
    prompt = alpaca().prompt(ASKED, None)
    assert prompt.startswith("Below is an instruction that describes a task, paired with an input that provides further context. ")
    assert prompt.endswith("### Instruction:\nSort the words.\n\n### Input:\nb a\n\n### Response:\n")
    assert "### Input:" not in alpaca().prompt(BARE, None) and "paired" not in alpaca().prompt(BARE, None)
    assert alpaca(preamble=False).prompt(BARE, None) == "### Instruction:\nSort the words.\n\n### Response:\n"
    assert alpaca().end(tokenizer_of(folder())) == "<|end|>"


def test_chatml() -> None:
    said = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSort the words.\n\nb a<|im_end|>\n<|im_start|>assistant\n"
    assert chatml(system="Be brief.").prompt(ASKED, None) == said
    assert chatml().prompt(BARE, None).startswith("<|im_start|>user\nSort the words.<|im_end|>")
    assert chatml().end(None) == "<|im_end|>"


def test_the_tokenizers_own() -> None:
    tokenizer = tokenizer_of(folder())
    with pytest.raises(ConfigError, match="own is not allowed: this model's tokenizer has no chat template"):
        own().prompt(ASKED, tokenizer)
    turns = "{% for m in messages %}[{{ m.role }}] {{ m.content }} [/]\n{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}[assistant] {% endif %}"
    assert own().prompt(ASKED, tokenizer) == "[user] Sort the words.\n\nb a [/]\n[assistant] "
    assert own().end(tokenizer) == " [/]\n"
