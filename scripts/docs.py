"""Pages of the documentation that are made from the code: a hook of mkdocs, named in mkdocs.yml.

A page a rule (``docs/methods`` holds none of them), and the text that stands where a page says ``<!-- generated: NAME -->``.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from hanse.catalogue import KINDS
from hanse.cli import app
from hanse.config import Settings
from hanse.methods.base import Method
from hanse.reproduce import SLUGS
from hanse.systems import SYSTEMS

WIDE = "---\nhide:\n  - toc\n---"
"""Front matter of pages with long lines: no table of contents beside them."""

BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages of the rules in the section 'Methods', and what was measured of each system in 'Reproduced'."""
    assert config.nav is not None
    (reports,) = (item["Reproduced"] for item in config.nav if "Reproduced" in item)
    reports += [{slug: f"reproduced/{slug}/report.md"} for slug in SLUGS]
    (methods,) = (item["Methods"] for item in config.nav if "Methods" in item)
    methods += [{", ".join(rules): f"methods/{module}.md"} for module, rules in families().items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file of rules, and one that lists them."""
    docs = Path(config.docs_dir)
    pages = {module: rule_page(module, rules, docs) for module, rules in families().items()}
    for module, text in pages.items():
        files.append(File.generated(config, f"methods/{module}.md", content=text))
    files.append(File.generated(config, "methods/index.md", content=rule_list()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put generated text where a page asks for it; the wide tables of reports get the room of a table of contents."""
    if page.file.src_uri.startswith("reproduced/"):
        page.meta["hide"] = ["toc"]
    made = {"commands": commands, "settings": settings, "parts": parts, "systems": systems}
    return re.sub(r"<!-- generated: (\w+) -->", lambda match: made[match[1]](), markdown)


def families() -> dict[str, dict[str, type[Method]]]:
    """The rules by the file they stand in, each file's own in the order in which they are written."""
    found: dict[str, dict[str, type[Method]]] = {}
    for name, rule in Method.registry().items():
        module = rule.__module__.removeprefix("hanse.methods.")
        if "." not in module:
            found.setdefault(module, {})[name] = rule
    return {m: dict(sorted(rules.items(), key=lambda r: inspect.getsourcelines(r[1])[1])) for m, rules in sorted(found.items())}


def rule_list() -> str:
    rows = [[f"[{name}]({module}.md)", first_line(rule)] for module, rules in families().items() for name, rule in rules.items()]
    about = (
        "Every rule is a file of `src/hanse/methods`, and its page is made from that file. `hanse list methods` prints the same."
    )
    return "\n\n".join([WIDE, "# Methods", about, table(["rule", "what it is"], rows), "## Published systems", systems()])


def rule_page(module: str, rules: dict[str, type[Method]], docs: Path) -> str:
    """The docstring of the file, the fields of each rule in it, and what was reproduced of it."""
    lead, _, text = (inspect.getdoc(importlib.import_module(f"hanse.methods.{module}")) or "").partition("\n")
    page = [WIDE, f"# {', '.join(rules)}", prose(lead), prose(text)]
    for name, rule in rules.items():
        own = inspect.get_annotations(rule)
        fields = rule.model_fields
        page += [f"## {name if len(rules) > 1 else 'Use'}", prose(inspect.getdoc(rule) or ""), example(name)]
        mine, inherited = ([f for f in fields if (f in own) is here] for here in (True, False))
        if mine:
            page += [field_table({f: fields[f] for f in mine})]
        if inherited:
            page += [f'??? note "Inherited fields"\n\n{indented(field_table({f: fields[f] for f in inherited}))}']
    for system in SYSTEMS:
        report = docs / "reproduced" / system.slug / "report.md"
        if not any(re.search(rf"\b{name}\b", system.implemented) for name in rules):
            continue
        page += [f"## Reproduced: {system.slug}", f"{system.paper}. {system.shown[0].upper()}{system.shown[1:]}."]
        if report.is_file():
            page += [f"[What was measured](../reproduced/{system.slug}/report.md) by `hanse reproduce {system.slug}`."]
    return "\n\n".join(page)


def example(name: str) -> str:
    return f"```sh\nhanse run --method '{name}'\n```"


def commands() -> str:
    """What every command says of itself."""
    page = []
    for command in ("run", "resume", "status", "report", "list", "reproduce", "doctor", "bench"):
        shown = CliRunner().invoke(app, [command, "--help"], prog_name="hanse", terminal_width=88)
        page.append(f"## hanse {command}\n\n```text\n{shown.stdout.strip()}\n```")
    return "\n\n".join(page)


def settings() -> str:
    return field_table(Settings.model_fields)


def parts() -> str:
    """All parts but the rules, which have pages of their own."""
    page = []
    for kind, base in KINDS.items():
        if kind == "methods":
            continue
        page.append(f"## {kind.capitalize()}")
        for name, part in base.registry().items():
            if part.__module__.startswith("hanse.bench"):
                continue
            page += [f"### {name}", prose(inspect.getdoc(part) or "")]
            if part.model_fields:
                page.append(field_table(part.model_fields))
    return "\n\n".join(page)


def systems() -> str:
    rows = [[f"`{s.slug}`", s.name, s.paper, s.status, s.implemented, s.shown] for s in SYSTEMS]
    return table(["slug", "name", "paper", "status", "implemented", "shown"], rows)


def field_table(fields: dict[str, FieldInfo]) -> str:
    rows = []
    for name, field in fields.items():
        default = field.get_default(call_default_factory=True)
        texts = [str(value) for value in default] if isinstance(default, tuple) else [str(default)]
        shown = "required" if field.is_required() else f"`{', '.join(texts)}`" if any(texts) else ""
        rows.append(
            [f"`{name}`", allowed(field.annotation, field.metadata), shown, prose(field.description or "").replace("\n", " ")]
        )
    return table(["field", "allowed", "default", "meaning"], rows)


def allowed(kind: Any, metadata: list[Any]) -> str:
    """The values of a type, in words."""
    origin = get_origin(kind)
    if origin is Annotated:
        return allowed(get_args(kind)[0], [*metadata, *get_args(kind)[1:]])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(allowed(one, metadata) for one in get_args(kind))
    if origin is tuple:
        return f"several: {allowed(get_args(kind)[0], [])}"
    if kind is type(None):
        return "`None`"
    name = {int: "whole number", float: "number", str: "text", bool: "`True`, `False`"}.get(kind)
    if name is None:
        return f"{getattr(kind, 'kind', kind.__name__)}"
    bounds = [text.format(getattr(m, key)) for m in metadata for key, text in BOUNDS.items() if getattr(m, key, None) is not None]
    return " ".join([name, " and ".join(bounds)]).strip()


def first_line(part: type) -> str:
    return prose((inspect.getdoc(part) or "").split("\n")[0])


def prose(text: str) -> str:
    """A docstring as Markdown: indented lines are code already, and a star elsewhere is a star."""
    return "\n".join(line if line.startswith("    ") else line.replace("*", r"\*") for line in text.split("\n")).strip("\n")


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in lines)
