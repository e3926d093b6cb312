"""Language models: text to tokens, what of a model is tuned, tasks, and what tuned models say.

``templates`` turn an instruction into a prompt and an answer, ``encoding`` turns both into token ids and labels, ``models`` loads a
model with its tokenizer or makes a small one, ``tuning`` says which of its numbers are trained, and ``tasks`` puts them together,
so that every rule, schedule, codec and engine applies. Needs the extra ``llm``, which nothing here imports
before it is used.
"""

from hanse.llm.tasks import classify, commands, instruct
from hanse.llm.templates import Template, alpaca, chatml, own
from hanse.llm.tuning import Tuning, bias, full, ia3, last, lora, prefix, prompt, ptuning

__all__ = [
    "Template",
    "Tuning",
    "alpaca",
    "bias",
    "chatml",
    "classify",
    "commands",
    "full",
    "ia3",
    "instruct",
    "last",
    "lora",
    "own",
    "prefix",
    "prompt",
    "ptuning",
]
