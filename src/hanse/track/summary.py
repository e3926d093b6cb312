"""What several runs amount to in numbers: one row a method, and who is ahead at equal cost."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hanse.core.errors import DataError
from hanse.track.folder import worst_share
from hanse.track.run import Record, Run

Against = Literal["rounds", "updates", "bytes", "seconds"]
TARGET_SHARE = 0.9
"""The target that "to reach" columns use, as a share of the best final value."""


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, under the shortest label that tells them apart; in order of first appearance."""
    alike: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.method, *sorted(_but_seed(run).items())), []).append(run)
    labelled = {}
    for members in alike.values():
        run = members[0]
        rivals = [_but_seed(other[0]) for other in alike.values() if other[0].method == run.method]
        own = [key for key in dict.fromkeys(k for r in rivals for k in r) if len({r.get(key) for r in rivals}) > 1]
        head = run.settings.get("method", run.method) if "method" in own else run.method
        labelled[" ".join([head, *(_difference(k, run, rivals) for k in own if k != "method")])] = members
    return labelled


def _difference(key: str, run: Run, rivals: Sequence[Mapping[str, str]]) -> str:
    """A setting in which runs differ; of a part its name, with the fields that tell it apart from its namesakes."""
    own = run.settings.get(key, "-")
    if own == "-":
        return f"no {key}"
    stages = _stages(own)
    if not stages:
        return f"{key}={own}"
    names = [name for name, _ in stages]
    others = [found for found in map(_stages, {r.get(key, "-") for r in rivals}) if [name for name, _ in found] == names]
    texts = []
    for i, (name, fields) in enumerate(stages):
        apart = [f"{k}={v}" for k, v in fields.items() if any(other[i][1].get(k) != v for other in others)]
        texts.append(f"{name}({', '.join(apart)})" if apart else name)
    return (" + " if key == "privacy" else " | ").join(texts)


def _stages(text: str) -> list[tuple[str, dict[str, str]]]:
    """Name and fields, as text, of a part written in full; of the stages of a chain, of several parts between commas; else none."""
    try:
        found = [_stage(node) for node in _pieces(ast.parse(text, mode="eval").body)]
    except SyntaxError:
        return []
    stages = [stage for stage in found if stage is not None]
    return stages if len(stages) == len(found) else []


def _pieces(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_pieces(node.left), node.right]
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


def _stage(node: ast.expr) -> tuple[str, dict[str, str]] | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id, {str(k.arg): ast.unparse(k.value) for k in node.keywords}
    return (node.id, {}) if isinstance(node, ast.Name) else None


def _but_seed(run: Run) -> dict[str, str]:
    return {k: v for k, v in run.settings.items() if k != "seed"}


def metrics(runs: Sequence[Run]) -> list[str]:
    """Every metric that some round of some run has, ``epsilon`` too, and ``loss``, the training loss, which all have."""
    records = [record for run in runs for record in run.history]
    spent = ["epsilon"] if any("epsilon" in record for record in records) else []
    return [*dict.fromkeys(name for record in records for name in record["metrics"]), *spent, "loss"]


def headline(runs: Sequence[Run]) -> str:
    """The metric that methods are compared by: a global one before clients', a score before a loss; ``loss`` without evaluation."""
    evaluated = [{name for record in run.history for name in record["metrics"]} for run in runs]
    shared = set.intersection(*(found for found in evaluated if found)) if any(evaluated) else set()
    return min(
        (m for m in metrics(runs) if m in shared),
        key=lambda m: (m.startswith(("client", "node", "attack")), lower_is_better(m)),
        default="loss",
    )


def lower_is_better(metric: str) -> bool:
    """Whether a small value of ``metric`` is a good one."""
    return any(word in metric for word in ("loss", "error", "perplexity", "variance", "consensus", "attack"))


def series(run: Run, metric: str, against: Against) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``x``, the cost by then, and ``y`` of the rounds in which ``metric`` is known and finite."""
    points = [(cost(record, against), value(record, metric)) for record in run.history]
    x, y = np.array([p for p in points if math.isfinite(p[1])], dtype=np.float64).reshape(-1, 2).T
    return x, y


def cost(record: Record, against: Against) -> float:
    """What had been spent when ``record`` was written: rounds, client updates, bytes up and down, or virtual seconds."""
    if against == "bytes":
        return record["bytes_down"] + record["bytes_up"]
    return record["round"] if against == "rounds" else record[against]


def value(record: Record, metric: str) -> float:
    """``metric`` in one round, NaN where it was not evaluated."""
    if metric == "epsilon":
        return record.get("epsilon", math.nan)
    return record["loss"] if metric == "loss" else record["metrics"].get(metric, math.nan)


@dataclass(frozen=True)
class Comparison:
    """Methods at equal cost: ``values`` per method, one per seed, when ``budget`` had been spent; ``ahead`` is best first, and
    has more than one entry for a tie.
    """

    against: Against
    budget: float
    values: dict[str, list[float]]
    ahead: list[str]


def compare(runs: Sequence[Run], metric: str, against: Against) -> Comparison:
    """Compare at the largest cost that every run reached, between evaluations by linear interpolation.

    Methods with nothing evaluated up to there are left out. Raises ``DataError`` when fewer than two are left, or time stood still.
    """
    curves = {label: [series(run, metric, against) for run in members] for label, members in groups(runs).items()}
    curves = {label: found for label, found in curves.items() if all(len(x) for x, _ in found)}
    budget = min((x[-1] for found in curves.values() for x, _ in found), default=0.0)
    reached = {label: found for label, found in curves.items() if all(x[0] <= budget for x, _ in found)}
    if len(reached) < 2 or budget <= 0:
        raise DataError(f"{metric} at equal {against}: fewer than two methods can be compared")
    values = {label: [float(np.interp(budget, x, y)) for x, y in found] for label, found in reached.items()}
    return Comparison(against, float(budget), values, leaders(values, lower_is_better(metric)))


def leaders(values: Mapping[str, Sequence[float]], lower: bool) -> list[str]:
    """The best mean, then all that tie with it: the means differ by no more than the larger of the two standard deviations."""
    ranked = sorted(values, key=lambda label: _mean(values[label]), reverse=not lower)
    best = values[ranked[0]]

    def ties(other: Sequence[float]) -> bool:
        return abs(_mean(other) - _mean(best)) <= max(std(best) or 0.0, std(other) or 0.0)

    return [ranked[0], *(label for label in ranked[1:] if ties(values[label]))]


def std(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample (n - 1), None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mean_or_none(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None


def last_value(run: Run, metric: str) -> float:
    """What the last evaluation found, NaN included: a run that ended in NaN has no final value."""
    found = (value(r, metric) for r in reversed(run.history) if metric == "loss" or metric in r["metrics"])
    return next(found, math.nan)


def worst_clients(run: Run, lower: bool) -> float:
    """Mean over the worst 10 % of clients on their own test data, NaN without any."""
    scores = run.clients.get("accuracy")
    if scores is None:
        return math.nan
    return -worst_share(-scores) if lower else worst_share(scores)


def finals(runs: Sequence[Run], metric: str) -> dict[str, list[float]]:
    """What each method's seeds ended with, as far as it is finite."""
    return {label: [v for run in members if math.isfinite(v := last_value(run, metric))] for label, members in groups(runs).items()}


def target(runs: Sequence[Run], metric: str) -> float | None:
    """90 % of the best method's final value; for a loss, 90 % of the way from the first value (mean of all runs) down to it."""
    means = [_mean(found) for found in finals(runs, metric).values() if found]
    if not means:
        return None
    if lower_is_better(metric):
        first = _mean([y[0] for run in runs if len(y := series(run, metric, "rounds")[1])])
        return first + TARGET_SHARE * (min(means) - first)
    return TARGET_SHARE * max(means)


def summary_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a method, means over its seeds; plain numbers, None where there is nothing to say.

    ``metric`` names the headline; ``final``, ``std`` (n - 1) and ``best`` are values of it, over the ``scored`` seeds that ended
    with a finite one. ``rounds_to_target``, ``bytes_to_target`` and ``seconds_to_target`` are means if all seeds got there, and
    ``reached`` counts those that did. ``bytes_up``, ``bytes_down`` and virtual ``seconds`` are totals of a run; so is
    ``epsilon``, which is there if any run is differentially private. Where any run is among peers, ``node`` is the mean of every
    node's own final value, ``consensus`` the last distance from it, and ``bytes_node`` and ``bytes_busiest`` what a node has sent
    and received: the mean, and the most.
    """
    metric = headline(runs)
    lower, goal = lower_is_better(metric), target(runs, metric)
    rows = []
    for (label, members), ended_with in zip(groups(runs).items(), finals(runs, metric).values(), strict=True):
        evaluated = [[v for record in run.history if not math.isnan(v := value(record, metric))] for run in members]
        ended = [run.history[-1] for run in members if run.history]
        hits = [
            next((r for r in run.history if goal is not None and _good(value(r, metric), goal, lower)), None) for run in members
        ]
        there = [r for r in hits if r is not None]
        everywhere = there if len(there) == len(members) else []
        worst = [v for run in members if not math.isnan(v := worst_clients(run, lower))]
        spent = [v for r in ended if math.isfinite(v := value(r, "epsilon"))]
        rows.append(
            {
                "method": label,
                "seeds": len(members),
                "scored": len(ended_with),
                "metric": metric,
                "final": _mean_or_none(ended_with),
                "std": std(ended_with),
                "best": _mean_or_none([(min if lower else max)(found) for found in evaluated if found]),
                "target": goal,
                "reached": len(there),
                "rounds_to_target": _mean_or_none([cost(r, "rounds") for r in everywhere]),
                "bytes_to_target": _mean_or_none([cost(r, "bytes") for r in everywhere]),
                "seconds_to_target": _mean_or_none([cost(r, "seconds") for r in everywhere]),
                "rounds": _mean_or_none([cost(r, "rounds") for r in ended]),
                "bytes_up": _mean_or_none([r["bytes_up"] for r in ended]),
                "bytes_down": _mean_or_none([r["bytes_down"] for r in ended]),
                "seconds": _mean_or_none([r["seconds"] for r in ended]),
                "worst10": _mean_or_none(worst),
                **({"epsilon": _mean_or_none(spent)} if "epsilon" in metrics(runs) else {}),
                **(_among_peers(members, f"node_{metric}") if any("sent" in run.clients for run in runs) else {}),
            }
        )
    return rows


def _among_peers(members: Sequence[Run], metric: str) -> dict[str, float | None]:
    def ended(name: str) -> list[float]:
        return [v for run in members if math.isfinite(v := last_value(run, name))]

    traffic = [run.clients["sent"] + run.clients["received"] for run in members if "sent" in run.clients]
    return {
        "node": _mean_or_none(ended(metric)),
        "consensus": _mean_or_none(ended("consensus")),
        "bytes_node": _mean_or_none([float(bytes_.double().mean()) for bytes_ in traffic]),
        "bytes_busiest": _mean_or_none([float(bytes_.max()) for bytes_ in traffic]),
    }


def _good(found: float, goal: float, lower: bool) -> bool:
    return found <= goal if lower else found >= goal


# ---- in words


def metric_text(metric: str) -> str:
    """The name of a metric for people."""
    return "training loss" if metric == "loss" else metric.replace("_worst10", ", worst 10 %").replace("_", " ")


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is written in per cent."""
    return "accuracy" in metric and "variance" not in metric


def value_text(metric: str, mean: float | None, spread: float | None = None) -> str:
    """``93.4 ± 0.5 %`` for a share, ``0.1234 ± 0.0056`` for anything else, ``-`` for None."""
    if mean is None:
        return "-"
    if is_share(metric):
        return f"{100 * mean:.1f} %" if spread is None else f"{100 * mean:.1f} ± {100 * spread:.1f} %"
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"


def unit(against: Against, largest: float) -> tuple[float, str]:
    """The size and name of the unit in which numbers up to ``largest`` read well."""
    sizes: dict[Against, list[tuple[float, str]]] = {
        "rounds": [(1, "rounds")],
        "updates": [(1, "updates")],
        "bytes": [(1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB")],
        "seconds": [(1, "s"), (60, "min"), (3600, "h"), (86400, "days")],
    }
    return next((s for s in reversed(sizes[against]) if largest >= 1.5 * s[0]), sizes[against][0])


def cost_text(against: Against, amount: float | None, largest: float | None = None) -> str:
    """``60``, ``12.3 MB`` or ``3.2 h`` (in the unit that suits ``largest``, default ``amount``); ``-`` for None."""
    if amount is None:
        return "-"
    size, name = unit(against, largest or amount)
    number = amount / size
    if against in ("rounds", "updates"):
        return f"{number:,.1f}".removesuffix(".0")
    return f"{number:,.0f} {name}" if number >= 100 or name == "B" else f"{number:.3g} {name}"


def and_text(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def verdict(runs: Sequence[Run]) -> str:
    """One sentence: who is ahead at equal rounds, equal bytes and equal virtual time; differences within the spread are ties."""
    metric, rows = headline(runs), summary_table(runs)
    if len(rows) == 1:
        return _outcome(rows[0])
    names: dict[Against, str] = {"rounds": "equal rounds", "bytes": "equal bytes"}
    if any(row["seconds"] for row in rows):
        names["seconds"] = "equal virtual time"
    clauses = []
    for against, name in names.items():
        try:
            found = compare(runs, metric, against)
        except DataError:
            clauses.append(f"at {name} fewer than two methods can be compared")
            continue
        shown = {label: value_text(metric, _mean(values), std(values)) for label, values in found.values.items()}
        absent = [row["method"] for row in rows if row["method"] not in found.values]
        without = f"; no value by then for {and_text(absent)}" if absent else ""
        where = f"at {name} ({cost_text(against, found.budget)}{without})"
        if len(found.ahead) > 1:
            clauses.append(f"{where} {and_text(found.ahead)} tie ({', '.join(shown[label] for label in found.ahead)})")
        else:
            rest = {label: values for label, values in found.values.items() if label not in found.ahead}
            second = leaders(rest, lower_is_better(metric))[0]
            clauses.append(f"{where} {found.ahead[0]} is ahead with {shown[found.ahead[0]]} (then {second}, {shown[second]})")
    doubt = " (one seed each, so the spread is unknown)" if all(row["seeds"] == 1 for row in rows) else ""
    return f"Judged by {metric_text(metric)}{doubt}: {'; '.join(clauses)}."


def _outcome(row: dict[str, Any]) -> str:
    if row["final"] is None:
        return f"{row['method']} ended without a value to judge it by."
    spent = [
        f"{cost_text('rounds', row['rounds'])} round{'s' * (row['rounds'] != 1)}",
        cost_text("bytes", row["bytes_up"] + row["bytes_down"]),
    ]
    if row["seconds"]:
        spent.append(f"{cost_text('seconds', row['seconds'])} of virtual time")
    over = f" (mean of {row['scored']} seeds)" if row["scored"] > 1 else ""
    ended = value_text(row["metric"], row["final"], row["std"])
    return f"{row['method']} ends at {metric_text(row['metric'])} {ended}{over} after {and_text(spent)}."


def doubts(runs: Sequence[Run]) -> list[str]:
    """What keeps the numbers from being taken at face value: runs that stopped early or ended in a value that is not finite."""
    metric, found = headline(runs), []
    for label, members in groups(runs).items():
        for run in members:
            done, planned = len(run.history), int(run.settings.get("rounds", len(run.history)))
            over = bool(run.history) and run.history[-1]["seconds"] >= float(run.settings.get("seconds", "inf"))
            if done < planned and not over:
                found.append(f"{label}, seed {run.seed}, stopped after {done:,} of {planned:,} rounds.")
            if done and not math.isfinite(last_value(run, metric)):
                found.append(f"{label}, seed {run.seed}, ended without a finite {metric_text(metric)}.")
    return found


def table_text(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """``summary_table`` for people: headers, and one row of cells a method; one unit a column."""
    rows, metric = summary_table(runs), headline(runs)
    goal = "target" if rows[0]["target"] is None else value_text(metric, rows[0]["target"])
    axes: list[Against] = ["rounds", "bytes", "seconds"] if any(row["seconds"] for row in rows) else ["rounds", "bytes"]
    totals: dict[str, tuple[str, Against]] = {"bytes up": ("bytes_up", "bytes"), "bytes down": ("bytes_down", "bytes")}
    if "seconds" in axes:
        totals["virtual time"] = ("seconds", "seconds")
    headers = ["method", "seeds", f"final {metric_text(metric)}", "best"]
    private = "epsilon" in metrics(runs)
    headers += [f"{'time' if a == 'seconds' else a} to {goal}" for a in axes] + [*totals, "worst 10 % of clients"]
    headers += ["epsilon"] * private
    peers = any("node" in row for row in rows)
    headers += [
        f"final {metric_text(metric)}, mean of the nodes",
        "consensus distance",
        "bytes of a node",
        "of the busiest",
    ] * peers
    cells = []
    for row in rows:
        partly = f" ({row['scored']} of {row['seeds']} seeds)" if 0 < row["scored"] < row["seeds"] else ""
        final = value_text(metric, row["final"], row["std"]) + partly
        # A mean over the seeds that got there would flatter a method that often does not.
        to = [
            _cell(rows, f"{a}_to_target", a, row) if row["rounds_to_target"] else f"{row['reached']} of {row['seeds']} seeds"
            for a in axes
        ]
        spent = [_cell(rows, key, against, row) for key, against in totals.values()]
        worst = value_text("accuracy" if metric == "loss" else metric, row["worst10"])
        privately = [value_text("epsilon", row["epsilon"])] if private else []
        nodes = [value_text(metric, row["node"]), value_text("consensus", row["consensus"])] if peers else []
        nodes += [_cell(rows, key, "bytes", row) for key in ("bytes_node", "bytes_busiest") if peers]
        cells.append(
            [row["method"], str(row["seeds"]), final, value_text(metric, row["best"]), *to, *spent, worst, *privately, *nodes]
        )
    return headers, cells


def _cell(rows: list[dict[str, Any]], key: str, against: Against, row: dict[str, Any]) -> str:
    return cost_text(against, row[key], max((r[key] for r in rows if r[key] is not None), default=None))
