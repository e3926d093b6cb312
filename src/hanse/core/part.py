"""Parts: the frozen, validated pieces a run is composed of (rules, schedules, codecs, fleets, partitions, tasks, optimisers).

A part is a pydantic model, so one declaration is at once the Python call, the TOML value, the command-line flag and the
documentation: ``dirichlet(alpha=0.3)`` reads the same in all of them, and ``str(part)`` writes it back.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo

from hanse.core.errors import ConfigError, unknown

if TYPE_CHECKING:

    class _Model:
        """What parts use of pydantic's model; its own typing would forbid positional values, as in ``dirichlet(0.3)``."""

        model_fields: ClassVar[dict[str, FieldInfo]]
        model_fields_set: set[str]

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __init_subclass__(cls, **kwargs: Any) -> None: ...
        def __iter__(self) -> Iterator[tuple[str, Any]]: ...

else:
    _Model = BaseModel


class Part(_Model):
    """Base of every configurable piece.

    A direct subclass opens a *kind* (``Method``, ``Codec``, ...); every concrete class below it is found by its name, in any
    case, with ``-`` read as ``_``. Positional arguments are taken in the order of the fields, a class's own before inherited ones.
    A string is accepted wherever a part is: ``FedAvg(local="sgd(momentum=0.9)")``.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True, validate_default=True
    )
    kind: ClassVar[str] = "part"
    abstract: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        names = list(type(self).model_fields)
        if len(args) > len(names):
            raise ConfigError(f"{type(self).__name__}: {len(args)} positional values, at most {len(names)} are allowed")
        for name, value in zip(names, args, strict=False):
            if name in kwargs:
                raise ConfigError(f"{type(self).__name__}.{name}: given twice")
            kwargs[name] = value
        try:
            super().__init__(**kwargs)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self).__name__)) from None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "abstract" not in cls.__dict__:
            cls.abstract = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """A class's own fields come before those of its nearest base, and so on, so that ``dirichlet(0.3)`` sets its alpha."""
        own, fields = [inspect.get_annotations(c) for c in cls.__mro__], cls.model_fields
        for name in sorted(fields, key=lambda n: next(i for i, names in enumerate(own) if n in names)):
            fields[name] = fields.pop(name)

    @model_validator(mode="wrap")
    @classmethod
    def _from_text(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        return cls.parse(value) if isinstance(value, str) else handler(value)

    def __str__(self) -> str:
        """``name(key=value, ...)`` with the fields that differ from their defaults; ``parse`` reads it back."""
        changed = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        }
        values = ", ".join(f"{k}={v if isinstance(v, Part) else repr(v)}" for k, v in changed.items())
        return f"{type(self).__name__}({values})" if values else type(self).__name__

    __repr__ = __str__

    def full(self) -> str:
        """Like ``str``, with every field."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        inside = ", ".join(f"{k}={v.full() if isinstance(v, Part) else repr(v)}" for k, v in values.items())
        return f"{type(self).__name__}({inside})"

    @property
    def short_name(self) -> str:
        """What it is called in names of folders and in titles."""
        return type(self).__name__

    @classmethod
    def registry(cls) -> dict[str, type[Self]]:
        """Every concrete class of this kind, by name."""
        found: dict[str, type[Self]] = {}
        stack = [cls]
        while stack:
            part = stack.pop()
            stack += part.__subclasses__()
            if not part.abstract:
                found.setdefault(part.__name__, part)
        return dict(sorted(found.items(), key=lambda item: item[0].casefold()))

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """The class called ``name`` (any case, ``-`` read as ``_``); raises ``ConfigError`` with the nearest names."""
        registry = cls.registry()
        folded = {_fold(key): part for key, part in registry.items()}
        if _fold(name) not in folded:
            raise unknown(cls.kind, name, registry)
        return folded[_fold(name)]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Build a part from ``name`` or ``name(key=value, ...)``; values are Python literals or further parts."""
        match = re.fullmatch(r"\s*([A-Za-z_][\w-]*)\s*(\(.*\))?\s*", text, re.DOTALL)
        try:
            call = ast.parse(f"f{match[2] or '()'}", mode="eval").body if match else None
        except SyntaxError:
            call = None
        if (
            match is None
            or not isinstance(call, ast.Call)
            or not isinstance(call.func, ast.Name)
            or not all(k.arg for k in call.keywords)
        ):
            raise ConfigError(f"{cls.kind}: cannot read {text!r}; write name or name(key=value, ...)")
        keywords = [str(k.arg) for k in call.keywords]
        if len(set(keywords)) < len(keywords):
            raise ConfigError(f"{cls.kind}: a field is given twice in {text!r}")
        part = cls.named(match[1])
        return part(*map(_value, call.args), **{str(k.arg): _value(k.value) for k in call.keywords})


def pipeline(text: str) -> list[str]:
    """The parts of ``a | b(c | d) | e``; what has no bar outside brackets, or cannot be read, is one part."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return [text]
    stages: list[str] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        stages.insert(0, ast.unparse(node.right))
        node = node.left
    return [ast.unparse(node), *stages] if stages else [text]


def _fold(name: str) -> str:
    return name.casefold().replace("-", "_")


def _value(node: ast.expr) -> Any:
    """A literal, or the source text of a nested part, which the field it goes to parses as its own kind; or several of these."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return tuple(map(_value, node.elts)) if isinstance(node, ast.Tuple | ast.List) else ast.unparse(node)


def explain(error: ValidationError, owner: str) -> str:
    """One line for the first thing wrong: field, value, what is allowed."""
    first = error.errors()[0]
    where = ".".join(str(p) for p in (owner, *first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown field"
    return f"{where}: {first['input']!r} is not allowed: {first['msg'].removeprefix('Value error, ')}"
