"""The command line. Only light modules are imported here; torch comes with the commands that need it."""

from __future__ import annotations

import inspect
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from hanse.core.errors import ConfigError, HanseError, unknown

if TYPE_CHECKING:
    from hanse.track.run import Run

typer.core.HAS_RICH = False  # help is printed plainly; typer before 0.21 would escape its brackets all the same
app = typer.Typer(
    name="hanse",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train, fine-tune and compare models together, across machines that cannot share their data.",
)
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout; progress goes to stderr.")]


def _settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` one option for every field of ``Settings``, collected into its ``given`` argument."""
    from hanse.config import Settings

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
    options = []
    for name, field in Settings.model_fields.items():
        shown = field.default if not isinstance(field.default, tuple) else ", ".join(map(str, field.default))
        text = f"{field.description} [{shown}]" if shown not in (None, "") else field.description
        flag = typer.Option(f"--{name.replace('_', '-')}", help=text, show_default=False, metavar=name.upper())
        kind = list[str] if isinstance(field.default, tuple) else str
        options.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, flag])
        )

    def wrapped(**values: Any) -> None:
        given = {o.name: values.pop(o.name) for o in options}
        command(**values, given={name: value for name, value in given.items() if value})

    wrapped.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
    return wrapped


def run(
    given: dict[str, Any],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE.toml]", help="Settings; flags override them.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [runs/ and the file's name]", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate time, bytes and memory.")] = False,
    json_: Json = False,
) -> None:
    """Run one or several rules on a federation and write a report.

    Parts take parameters in brackets, as in --partition 'dirichlet(0.3)'; 'hanse list KIND' shows what there is.
    """
    from hanse.config import Settings
    from hanse.study import Study

    settings = Settings.read(file, given)
    folder = out or Path("runs") / (file.stem if file else "run")
    study = Study(settings, folder)
    if dry_run:
        estimate = study.estimate()
        typer.echo(json.dumps(asdict(estimate)) if json_ else study.describe(estimate))
        return
    _finish(study, resume=False, as_json=json_)


def resume(folder: Annotated[Path, typer.Argument(help="A run folder.")], json_: Json = False) -> None:
    """Go on with a run that was stopped or killed, to the identical result."""
    from hanse.study import Study

    _finish(Study.open(folder), resume=True, as_json=json_)


def _finish(study: Any, resume: bool, as_json: bool) -> None:
    signal.signal(signal.SIGINT, study.interrupt)
    runs = study.run(resume=resume)
    if study.stopped:
        typer.echo(f"stopped, state saved; go on with: hanse resume {study.folder}", err=True)
        raise typer.Exit(130)
    report = study.report(runs)
    _show(runs, as_json)
    typer.echo(f"report: {report}", err=True)


def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, or of a study, whose runs are all shown.")],
    json_: Json = False,
) -> None:
    """Say where a run is: running, finished, stopped or died, and what its clients are doing."""
    import time

    from hanse.core.errors import CheckpointError
    from hanse.study import folders_in
    from hanse.track.status import in_words, status_of, study_in_words

    now, paths = time.time(), folders_in(folder)
    if not paths:
        raise CheckpointError(f"{folder} holds no run: neither run.json nor settings.toml is in it")
    found = [status_of(path, now) for path in paths]
    if json_:
        typer.echo(json.dumps(found))
        return
    for path, one in zip(paths, found, strict=True):
        typer.echo(in_words(path, one, now))
    if len(found) > 1:
        typer.echo(study_in_words(found))


def report(
    folders: Annotated[list[Path], typer.Argument(help="Run folders to compare.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it [the first folder]", show_default=False)] = None,
    json_: Json = False,
) -> None:
    """Compare finished runs: a table and report.html."""
    from hanse.study import runs_in
    from hanse.track.report import write_report

    runs = [run for folder in folders for run in runs_in(folder)]
    path = write_report(runs, out or folders[0], ", ".join(f.name for f in folders))
    _show(runs, json_)
    typer.echo(f"report: {path}", err=True)


def _show(runs: list[Run], as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from hanse.track.summary import summary_table, table_text, verdict

    if as_json:
        typer.echo(json.dumps(summary_table(runs)))
        return
    headers, rows = table_text(runs)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, label in enumerate([headers[0], *(row[0] for row in rows)]):  # a column a rule: many measures, few rules
        table.add_column(label, justify="left" if i == 0 else "right")
    for measure, *values in zip(headers[1:], *(row[1:] for row in rows), strict=True):
        table.add_row(measure, *values)
    console = Console()
    console.print(table)
    console.print(verdict(runs))


KINDS = (
    "methods",
    "schedules",
    "topologies",
    "codecs",
    "aggregators",
    "pre-aggregations",
    "merges",
    "attacks",
    "privacy",
    "tasks",
    "tunings",
    "templates",
    "partitions",
    "fleets",
    "traces",
    "distributions",
    "staleness",
    "optimizers",
    "rates",
    "engines",
    "systems",
)


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Have adapters become part of the model.")] = False,
) -> None:
    """Write a run's final model for others: tensors by name, or a language model or its adapters in their library's format."""
    from hanse.export import export as write

    write(run, folder, merge)


def list_(kind: Annotated[str, typer.Argument(help=", ".join(KINDS))], json_: Json = False) -> None:
    """What there is: methods, schedules, codecs, tasks, ... with their parameters, or the published systems."""
    from hanse.catalogue import catalogue
    from hanse.systems import SYSTEMS

    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    rows = [asdict(system) for system in SYSTEMS] if kind == "systems" else catalogue(kind)
    if json_:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        typer.echo(f"{row.pop('slug', None) or row.pop('name')}")
        for key, value in row.items():
            lines = [f"{f['name']} = {f['default']}: {f['text']}" for f in value] if isinstance(value, list) else [value]
            for line in lines:
                typer.echo(f"    {line}" if isinstance(value, list) or key == "text" else f"    {key}: {line}")


def reproduce(
    slugs: Annotated[list[str], typer.Argument(help="Systems, by the slugs of 'hanse list systems'.")],
    out: Annotated[Path, typer.Option(help="Where tables and figures go.")] = Path("reproduced"),
) -> None:
    """Repeat the experiments of published systems; fails when a stated property does not hold."""
    from hanse.reproduce import run as reproduce_all

    if not reproduce_all(slugs, out):
        raise typer.Exit(1)


def deploy(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="Settings of one run.")],
    nodes: Annotated[str, typer.Option(help="Names of the clients, with commas between them.", show_default=False)],
    address: Annotated[str, typer.Option(help="host:port under which clients reach the server.")] = "localhost:8000",
    out: Annotated[Path | None, typer.Option(help="Folder to write [deploy/ and the file's name]", show_default=False)] = None,
    days: Annotated[float, typer.Option(help="For how long the certificates last.")] = 365,
) -> None:
    """Write a Flower app for real clients, with keys, certificates and the commands that start it all."""
    from hanse.config import Settings
    from hanse.deploy.app import write
    from hanse.deploy.share import deployed

    names = [name.strip() for name in nodes.split(",") if name.strip()]
    settings = deployed(Settings.read(file, {"clients": len(names)}))
    folder = out or Path("deploy") / file.stem
    write(settings, folder, names, address, days)
    typer.echo(f"written: {folder / 'README.md'} says how to start it", err=True)


def parity(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="Settings; their first rule, schedule, codec and seed count.")],
    rounds: Annotated[int, typer.Option(help="Rounds of each run.", min=1)] = 3,
    clients: Annotated[int, typer.Option(help="Clients of each run, at most; with Flower each is a process.", min=1)] = 3,
    json_: Json = False,
) -> None:
    """Run the same in every engine that is installed and say whether histories and weights agree; fails where they do not."""
    from hanse.config import Settings
    from hanse.parity import parity as compare

    found = compare(Settings.read(file, {}), rounds, clients)
    if json_:
        typer.echo(json.dumps([verdict._asdict() for verdict in found]))
    else:
        for verdict in found:
            took = f"{verdict.seconds:6.1f} s" if verdict.agrees is not None else "       -"
            typer.echo(f"{verdict.engine:10} {took}  {verdict.text}")
    if any(verdict.agrees is False for verdict in found):
        raise typer.Exit(1)


def doctor(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What 'hanse deploy' wrote: on the server all of it, on a node nodes/NAME.")
    ],
    data: Annotated[Path | None, typer.Option(help="On a node: the folder of its data [DIR/data]", show_default=False)] = None,
    settings: Annotated[
        Path | None, typer.Option(help="On a node: the run's settings, or its app's pyproject.toml.", show_default=False)
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="On a node: the server [as in start.sh]", show_default=False)
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="On a node: what --listen shows on the server; measures bandwidth too.", show_default=False)
    ] = None,
    listen: Annotated[bool, typer.Option("--listen", help="On the server: answer nodes' doctors until Ctrl-C.")] = False,
    json_: Json = False,
) -> None:
    """Say what stands in the way of a deployed run, and what to do: names, ports, certificates, clocks, data.

    DIR is what 'hanse deploy' wrote: on the server all of it, on a node its own folder, nodes/NAME. Fails where there is a problem.
    """
    from hanse.core.errors import MissingExtraError

    try:
        from hanse.deploy import doctor as checks
    except ImportError:
        raise MissingExtraError("hanse doctor", "flower") from None
    from datetime import UTC, datetime

    now, here = datetime.now(UTC), (folder / "server").is_dir()
    if not here and not any(folder.glob("*.key")):
        raise ConfigError(f"{folder}: neither what 'hanse deploy' wrote nor the folder of one of its nodes")
    if here:
        found = checks.server(folder, now)
    else:
        run = None if settings is None else checks.settings_of(settings)
        found = checks.node(folder, checks.server_for(folder, server), data or folder / "data", run, token, now)
    done = []
    for check in found:
        done.append(check)
        if not json_:
            typer.echo(checks.shown(check))
    if json_:
        typer.echo(json.dumps([check._asdict() for check in done]))
    if here and listen:
        _answer_doctors(folder)
    if any(check.state == "problem" for check in done):
        raise typer.Exit(1)


def _answer_doctors(folder: Path) -> None:
    import secrets

    from hanse.deploy import doctor as checks
    from hanse.deploy.responder import Responder, listens

    where, token = checks.server_of(folder / "server"), secrets.token_urlsafe(16)
    settings = checks.settings_of(folder / "app" / "pyproject.toml")
    with Responder(folder / "server", listens(where.host), where.port, token, settings) as responder:
        typer.echo(f"on each node: hanse doctor NODE'S-FOLDER --data FOLDER --token {token}", err=True)
        typer.echo(f"answering at {where.host}:{where.port} until Ctrl-C", err=True)
        try:
            responder.serve_forever()
        except KeyboardInterrupt:
            typer.echo("stopped answering", err=True)


def bench(
    workloads: Annotated[
        list[str] | None, typer.Argument(help="W1 to W4 [all], codecs, aggregators, gossip, or aggregation", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions.", min=1)] = 3,
    json_: Json = False,
) -> None:
    """Time hanse against the raw PyTorch loop, or parts of one kind against each other, each in a process of its own."""
    from hanse.bench.runner import run as run_bench

    run_bench(workloads or [], repeats, json_)


app.command()(_settings_options(run))
app.command()(resume)
app.command()(status)
app.command()(report)
app.command()(export)
app.command("list")(list_)
app.command()(reproduce)
app.command()(deploy)
app.command()(parity)
app.command()(doctor)
app.command()(bench)


@app.callback(invoke_without_command=True)
def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from hanse import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point: one line and an exit status for what a user can cause."""
    try:
        status = app(standalone_mode=False)
    except HanseError as error:
        typer.echo(f"hanse: {error}", err=True)
        status = error.exit_status
    except typer.Abort:  # a second Ctrl-C
        typer.echo("hanse: stopped at once; what was saved is kept", err=True)
        status = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # wrong usage; the class has another home in every other version of typer
            raise
        typer.echo(f"hanse: {' '.join(error.format_message().split())}", err=True)
        status = 2
    sys.exit(status)


__all__ = ["ConfigError", "app", "main"]
