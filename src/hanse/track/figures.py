"""Pictures of runs. Every function returns a ``matplotlib.figure.Figure`` and leaves pyplot alone.

All raise ``DataError`` when the runs hold nothing to draw. A method has the same colour in every picture of the same runs.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hanse.core.errors import CheckpointError, DataError, unknown
from hanse.track.run import Run
from hanse.track.summary import (
    Against,
    and_text,
    compare,
    cost_text,
    groups,
    headline,
    is_share,
    lower_is_better,
    metric_text,
    metrics,
    series,
    unit,
    value_text,
    worst_clients,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hanse.data.task import Split

DPI = 150
NARROW, WIDE = 6.4, 12.0
"""Widths in inches: two narrow pictures go beside each other where one wide one goes."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette ("Color Universal Design", 2008), told apart with any colour vision, without its faint yellow."""
AXIS_TEXT: dict[Against, str] = {"rounds": "rounds", "updates": "client updates", "bytes": "bytes sent", "seconds": "virtual time"}
DASHES = ("-", "--", ":", "-.")
INK, FAINT, EMPTY = "#222222", "#6b6b6b", "#f2f2f2"
RASTER_CLIENTS = 200
"""Most clients that are drawn one by one in ``participation``."""
NUMBERED_CLIENTS = 40
"""Most clients that are numbered on an axis."""
RASTERS = 4
"""Most patterns of participation that are drawn one below the other."""
ACROSS = 15
"""How many typical jobs fit beside each other in ``timeline``."""
AGGREGATIONS = 50
"""Most aggregations that are marked in ``timeline``."""


def curves(runs: Sequence[Run], metric: str, against: Against) -> Figure:
    """``metric`` against rounds, client updates, bytes or virtual seconds: a line for the mean over seeds, a band for their range.

    ``metric`` is a name from ``Record.metrics`` or ``loss``, the training loss; raises ``ConfigError`` for any other. Seeds that
    were evaluated at different costs are joined by linear interpolation, where all of them have values.
    """
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

    if metric not in metrics(runs):
        raise unknown("metric", metric, metrics(runs))
    members = groups(runs)
    found = {label: [s for s in (series(run, metric, against) for run in group) if len(s[0])] for label, group in members.items()}
    largest = max((x[-1] for group in found.values() for x, _ in group), default=0.0)
    if largest <= 0:
        raise DataError(f"nothing to draw: no {metric_text(metric)} over {against} above zero")
    size, name = unit(against, largest)
    figure, ax = _figure(NARROW, 4.3)
    lowest, highest, what = np.inf, -np.inf, "one point a seed"
    for (label, group), style in zip(found.items(), _styles(members), strict=True):
        if not group:
            continue
        x, y = _joined(group)
        # Seeds evaluated once each, at different costs, have nothing in common to average over: they stay points.
        if len(x) > 1:
            what = _seeds_text(members)
            ax.plot(x / size, y.mean(0), label=label, lw=2, **style)
            if len(group) > 1:
                ax.fill_between(x / size, y.min(0), y.max(0), color=style["color"], alpha=0.18, lw=0)
        else:
            points = np.array([(found_x[-1] / size, found_y[-1]) for found_x, found_y in group])
            ax.plot(points[:, 0], points[:, 1], "o", color=style["color"], label=label)
        lowest = min(lowest, *(found_y.min() for _, found_y in group))
        highest = max(highest, *(found_y.max() for _, found_y in group))
    if is_share(metric):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, 0 if highest - lowest > 0.05 else 1, " %"))
    elif lowest > 0 and highest > 20 * lowest:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    measured = {"bytes": f"bytes sent, up and down ({name})", "seconds": f"virtual time ({name})"}
    ax.set_xlabel(measured.get(against, AXIS_TEXT[against]))
    ax.set_ylabel(metric_text(metric))
    ax.set_xlim(left=0)
    _mark_budget(ax, runs, metric, against, size)
    alone = f"{next(iter(members))}, " if len(members) == 1 else ""
    _title(figure, ax, f"{metric_text(metric).capitalize()} against {AXIS_TEXT[against]}", alone + what)
    if not alone:
        _legend(figure, ax)
    return figure


def _joined(group: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All seeds on the union of their ``x``, as far as they all reach: ``[X]`` and ``[seeds, X]``."""
    first, last = max(x[0] for x, _ in group), min(x[-1] for x, _ in group)
    grid = np.unique(np.concatenate([x for x, _ in group]))
    grid = grid[(grid >= first) & (grid <= last)]
    return grid, np.stack([np.interp(grid, x, y) for x, y in group])


def _mark_budget(ax: Axes, runs: Sequence[Run], metric: str, against: Against, size: float) -> None:
    """A line where methods of unequal length are compared."""
    try:
        budget = compare(runs, metric, against).budget / size
    except DataError:
        return
    if budget < 0.95 * ax.get_xlim()[1] and metric == headline(runs):
        ax.axvline(budget, color=FAINT, lw=1, ls=(0, (2, 3)), zorder=0)
        low = 0.03 if not lower_is_better(metric) else 0.97
        text = ax.text(budget, low, f" equal {AXIS_TEXT[against]} ", transform=ax.get_xaxis_transform(), color=FAINT, fontsize=9)
        text.set(ha="right" if budget > ax.get_xlim()[1] / 2 else "left", va="bottom" if low < 0.5 else "top")


def split(run: Run) -> Figure:
    """Who holds what: the share of every class in each client's training samples, below the clients' numbers of samples.

    Clients are ordered by their most frequent class. Where classes are unknown, a histogram of samples per client.
    """
    from matplotlib.colors import LinearSegmentedColormap

    classes = run.clients.get("classes")
    if classes is None or classes.shape[1] < 2:
        return _sizes(run)
    counts = classes.numpy().astype(np.float64)
    total = counts.sum(1)
    share = counts / np.maximum(total, 1)[:, None]
    order = np.lexsort((-share.max(1), share.argmax(1)))
    n, k = counts.shape
    figure, (top, ax) = _figure(WIDE, min(7.0, 2.2 + 0.26 * k), rows=2, height_ratios=(1, 3), sharex=True)
    top.bar(np.arange(n), total[order], width=1 if n > NUMBERED_CLIENTS else 0.8, color=FAINT, lw=0)
    top.set_ylabel("samples")
    top.tick_params(bottom=False, labelbottom=False)
    top.grid(axis="x", visible=False)
    blues = LinearSegmentedColormap.from_list("share", ["#ffffff", "#9ecae1", COLOURS[0], "#062f52"])
    image = ax.imshow(share[order].T, aspect="auto", cmap=blues, vmin=0, vmax=share.max())
    ax.grid(visible=False)
    if n * k <= 200:
        for (i, j), number in np.ndenumerate(counts[order].astype(int)):
            if number:
                ax.text(
                    i,
                    j,
                    f"{number:,}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if share[order][i, j] > 0.45 * share.max() else INK,
                )
    names = list(run.names) if len(run.names) == k else [str(j) for j in range(k)]
    shown = np.arange(0, k, -(-k // 25))
    ax.set_yticks(shown, [names[j] for j in shown])
    ax.set_ylabel("class")
    if n <= NUMBERED_CLIENTS:
        ax.set_xticks(np.arange(n), [str(c) for c in order])
        ax.set_xlabel("client, ordered by most frequent class")
    else:
        ax.set_xticks([])
        ax.set_xlabel(f"{n:,} clients, ordered by most frequent class")
    bar = figure.colorbar(image, ax=ax, format=lambda v, _: f"{100 * v:.0f} %", pad=0.01, aspect=15)
    bar.set_label("share of the client's samples")
    bar.outline.set_visible(False)
    _title(figure, top, "How the training data are split", _split_text(run, n, int(total.sum())))
    return figure


def partition(data: Split) -> Figure:
    """``split`` of a federation's data (``federation.split``) before anything has run."""
    clients = {"samples": data.train.counts()}
    if data.groups is not None:
        clients["classes"] = data.groups
    return split(Run("", 0, {}, [], {}, clients, data.names))


def _split_text(run: Run, clients: int, samples: int) -> str:
    partition = run.settings.get("partition")
    by = f", partition {partition}" if partition else ""
    return f"{samples:,} samples on {clients:,} clients{by}"


def _sizes(run: Run) -> Figure:
    samples = run.clients.get("samples")
    if samples is None or not len(samples):
        raise DataError("nothing to draw: this run does not say who holds how many samples")
    counts = samples.numpy()
    figure, ax = _figure(NARROW, 3.6)
    if counts.min() > 0 and counts.max() > 50 * counts.min():
        # Doublings are the finest bins of equal width on a log axis that hold whole numbers evenly: 1, 2-3, 4-7, ...
        edges = 2.0 ** np.arange(np.floor(np.log2(counts.min())), np.floor(np.log2(counts.max())) + 2)
        ax.set_xscale("log", base=2)
        ax.set_xticks(edges, [f"{edge:,g}" for edge in edges])
    else:
        edges = _whole_edges(counts)
    ax.hist(counts, edges, color=COLOURS[0], edgecolor="white", lw=0.5)
    ax.set_xlabel("training samples of a client")
    ax.set_ylabel("clients")
    _title(figure, ax, "How the training data are split", _split_text(run, len(counts), int(counts.sum())))
    return figure


def _whole_edges(counts: NDArray[np.int64], most: int = 30) -> NDArray[np.float64]:
    """Edges of at most ``most`` equal bins that each hold the same number of whole numbers."""
    low, high = int(counts.min()), int(counts.max())
    width = -(-(high - low + 1) // most)
    return np.arange(low, high + width + 1, width, dtype=np.float64) - 0.5


def participation(runs: Sequence[Run]) -> Figure:
    """Who took part when: client by round for up to 200 clients, with how often at the side; else how often, as a histogram.

    The raster shows each method's first seed; methods that asked the same clients share one.
    """
    patterns: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for label, group in groups(runs).items():
        patterns.setdefault(tuple(tuple(record["cohort"]) for record in group[0].history), []).append(label)
    taken = [run.clients["rounds"] for run in runs if "rounds" in run.clients]
    clients = max([len(t) for t in taken] + [1 + c for pattern in patterns for cohort in pattern for c in cohort], default=0)
    if clients <= RASTER_CLIENTS and len(patterns) <= RASTERS and all(pattern and all(pattern) for pattern in patterns):
        return _raster(patterns, clients, groups(runs))
    return _how_often(groups(runs))


def _raster(patterns: dict[tuple[tuple[int, ...], ...], list[str]], clients: int, members: dict[str, list[Run]]) -> Figure:
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    colours = dict(zip(members, (style["color"] for style in _styles(members)), strict=True))
    height = 0.9 + len(patterns) * min(3.4, max(1.6, 0.5 + 0.05 * clients))
    figure, axes = _figure(WIDE, height, rows=len(patterns), columns=2, width_ratios=(5, 1), sharey=True)
    for i, ((pattern, labels), (ax, side)) in enumerate(zip(patterns.items(), np.reshape(axes, (-1, 2)), strict=True)):
        there = np.zeros((clients, len(pattern)))
        for t, cohort in enumerate(pattern):
            there[list(cohort), t] = 1
        colour = colours[labels[0]] if len(labels) == 1 else "#4d4d4d"
        rounds = (0.5, len(pattern) + 0.5)
        ax.imshow(there, aspect="auto", cmap=ListedColormap([EMPTY, colour]), vmin=0, vmax=1, extent=(*rounds, clients - 0.5, -0.5))
        ax.set_ylabel("client")
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        side.barh(np.arange(clients), there.sum(1), height=1 if clients > NUMBERED_CLIENTS else 0.8, color=colour, lw=0)
        side.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        side.tick_params(labelleft=False)
        for each in (ax, side):
            each.grid(visible=False)
        if i == len(patterns) - 1:
            ax.set_xlabel("round")
            side.set_xlabel("times in all")
        seed = members[labels[0]][0].seed
        who = f"all methods, seed {seed}" if len(labels) == len(members) > 1 else f"{and_text(labels)}, seed {seed}"
        mean = there.sum() / len(pattern)
        text = f"{who}: {mean:.3g} of {clients:,} clients a round, {_seen(there.sum(1))}"
        if i == 0:
            _title(figure, ax, "Who took part", text)
        else:
            _subtitle(ax, text)
    return figure


def _seen(times: NDArray[np.float64]) -> str:
    seen = int((times > 0).sum())
    return f"{'all' if seen == len(times) else seen} seen at least once"


def _how_often(members: dict[str, list[Run]]) -> Figure:
    counts = {
        label: [run.clients["rounds"].numpy() for run in group if "rounds" in run.clients] for label, group in members.items()
    }
    pooled = {label: np.concatenate(found) for label, found in counts.items() if found}
    if not pooled:
        raise DataError("nothing to draw: the runs do not say who took part")
    first = next(iter(pooled.values()))
    alike = all(np.array_equal(first, other) for other in pooled.values())
    edges = _whole_edges(np.concatenate(list(pooled.values())))
    figure, ax = _figure(NARROW, 3.6)
    for (label, style), found in zip(
        zip(members, _styles(members), strict=True), (pooled.get(label) for label in members), strict=True
    ):
        if found is not None and not (alike and label != next(iter(pooled))):
            shares = np.histogram(found, edges)[0] / len(found)
            if alike:
                ax.stairs(shares, edges, fill=True, color="#4d4d4d", lw=0)
                for x, y in zip((edges[1:] + edges[:-1]) / 2, shares, strict=True):
                    if len(shares) <= 12 and y:
                        ax.annotate(_percent(y), (x, y), (0, 2), textcoords="offset points", ha="center", fontsize=8.5, color=INK)
            else:
                ax.stairs(shares, edges, label=label, lw=2, **style)
    ax.set_xlabel("rounds a client took part in")
    ax.set_ylabel("clients")
    ax.yaxis.set_major_formatter(lambda v, _: _percent(v))
    if edges[1] - edges[0] == 1 and len(edges) <= 16:
        ax.set_xticks((edges[1:] + edges[:-1]) / 2)
    who = f"{len(next(g for g in counts.values() if g)[0]):,} clients" + (", all methods" if alike and len(members) > 1 else "")
    _title(figure, ax, "How often clients took part", f"{who}; {_pooled_text(members)}")
    ax.margins(y=0.1)
    if not alike:
        _legend(figure, ax)
    return figure


def timeline(run: Run) -> Figure:
    """Who did what when: a row a client, from fast to slow, along virtual time; of many clients the 40 with most jobs.

    Bars are jobs; the thin ones below them are replies that wait at the server until it aggregates them. A cross ends a job whose
    reply never came: lost on its way, or the client went away or was told to stop. The picture ends where 15 typical jobs (by the
    median) would fit one after another. What was still going on when the run ended is not on record.
    """
    away = run.clients["away"].numpy() if "away" in run.clients else np.zeros((0, 3))
    jobs = _jobs(run, away)
    begin, whole = jobs.sent.min(initial=np.inf), jobs.last.max(initial=-np.inf)
    if not begin < whole:
        raise DataError("nothing to draw: this run does not say who worked when")
    # A reply may wait at the server while its client is at work again: a job has its row until the next one begins.
    usual = float(np.median(np.minimum(jobs.last, jobs.following) - jobs.sent))
    end = min(whole, begin + ACROSS * usual) if usual else whole
    size, name = unit("seconds", end)
    aggregations = np.unique(jobs.used[jobs.used <= end])
    jobs = jobs[jobs.sent < end]
    there, ids = len(np.unique(jobs.client)), _rows(jobs)
    jobs, away = jobs[np.isin(jobs.client, ids)], away[np.isin(away[:, 0], ids)]
    order = np.argsort(ids)
    rows, away_rows = (order[np.searchsorted(ids, clients, sorter=order)] for clients in (jobs.client, away[:, 0]))

    figure, ax = _figure(WIDE, 1.7 + max(2.2, 0.17 * len(ids)))
    ax.set(xlim=(begin / size, end / size), ylim=(len(ids) - 0.4, -0.6))
    strips = partial(_strips, ax, size)
    work, below = (-0.34, 0.22), (0.29, 0.41)
    strips("receiving", rows, jobs.sent, jobs.received, work, color=COLOURS[5])
    strips("computing", rows, jobs.received, jobs.computed, work, color=COLOURS[0])
    strips("sending", rows, jobs.computed, jobs.arrived, work, color=COLOURS[4])
    strips("reply waiting", rows, jobs.arrived, jobs.used, below, color="#8c8c8c")
    strips("away", away_rows, away[:, 1], away[:, 2], (-0.45, 0.45), fc=EMPTY, ec="#c4c4c4", hatch="/////", zorder=0.5)
    silent = np.isnan(jobs.arrived) & (jobs.last <= end)
    dropped = np.isnan(jobs.used) & (jobs.arrived <= end)
    mark = {"ls": "none", "ms": 7, "mew": 2, "zorder": 3, "clip_on": False}
    if silent.any():
        ax.plot(jobs.last[silent] / size, rows[silent], marker="x", color=COLOURS[1], label="no reply", **mark)
    if dropped.any():
        ax.plot(jobs.arrived[dropped] / size, rows[dropped], marker="o", mfc="white", mec=COLOURS[1], label="reply dropped", **mark)
    if 0 < len(aggregations) <= AGGREGATIONS:
        ax.vlines(aggregations / size, -0.6, len(ids) - 0.4, color=FAINT, lw=1, ls=":", label="aggregation", zorder=0.8)
    ax.set_yticks(range(len(ids)), [str(i) for i in ids], fontsize=9.5 if len(ids) <= 20 else 8)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False)
    ax.set_ylabel("client, from fast to slow")
    ax.set_xlabel(f"virtual time ({name})")
    total = len(run.clients["rounds"]) if "rounds" in run.clients else there
    some = f"{len(ids)} of {total:,}" if there < total else f"{total:,}"
    who = f"the {len(ids)} busiest of {total:,}" if len(ids) < there else some
    schedule = run.settings.get("schedule", "").partition("(")[0]
    busy = np.nansum(np.clip(jobs.computed, begin, end) - np.clip(jobs.received, begin, end)) / (len(ids) * (end - begin))
    facts = [f"computing {100 * busy:.0f} % of the time"]
    counted = (silent.sum(), "job", "jobs", "without reply"), (dropped.sum(), "reply", "replies", "dropped")
    facts += [f"{n} {one if n == 1 else many} {what}" for n, one, many, what in counted if n]
    ran = ", ".join(part for part in (run.method, schedule, f"seed {run.seed}") if part)
    when = f"{'first' if end < whole else 'all'} {cost_text('seconds', end - begin)}"
    _title(figure, ax, "What clients did when", f"{ran}: {who} clients, {when}; {', '.join(facts)}")
    _legend(figure, ax)
    return figure


def _jobs(run: Run, away: NDArray[np.float64]) -> np.recarray[Any, Any]:
    """``Record.jobs`` in order of client, then ``sent``, by name, with NaN for None.

    Computing that was broken off ends in ``computed`` too: when the client went away, else when the server had given up on it.
    ``last`` is the last of a job's times, ``following`` when the client was sent its next one, inf for never.
    """
    rows = [[*job, record["seconds"]] for record in run.history for job in record["jobs"]]
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    client, _, sent, received, computed, arrived, used, listed = table[np.lexsort((table[:, 2], table[:, 0]))].T
    following = np.where(np.diff(client, append=-1), np.inf, np.append(sent[1:], np.inf)[: len(sent)])
    # NumPy orders complex numbers by real part, then by imaginary part: here by client, then by time.
    departures = np.sort(away[:, 0] + 1j * away[:, 1])
    leaves = np.append(departures, np.inf)[np.searchsorted(departures, client + 1j * received)]
    left = np.where(leaves.real == client, leaves.imag, np.inf)
    broken = np.isnan(computed) & ~np.isnan(received)
    computed = np.where(broken, np.minimum.reduce([left, listed, following]), computed)
    last = np.fmax.reduce([sent, received, computed, arrived, used])
    times = {"sent": sent, "received": received, "computed": computed, "arrived": arrived, "used": used}
    columns = {"client": client.astype(np.int64), **times, "last": last, "following": following}
    return np.rec.fromarrays(list(columns.values()), dtype=np.dtype([(name, found.dtype) for name, found in columns.items()]))


def _rows(jobs: np.recarray[Any, Any]) -> NDArray[np.int64]:
    """Who is drawn: those with most jobs, by their mean time of computing."""
    ids, index, counts = np.unique(jobs.client, return_inverse=True, return_counts=True)
    spent = jobs.computed - jobs.received
    known = np.bincount(index, ~np.isnan(spent))
    mean = np.divide(np.bincount(index, np.nan_to_num(spent)), known, where=known > 0, out=np.full(len(ids), np.inf))
    most = np.argsort(-counts, kind="stable")[:NUMBERED_CLIENTS]
    return ids[most[np.lexsort((most, mean[most]))]]


def _strips(
    ax: Axes,
    size: float,
    label: str,
    rows: NDArray[np.integer],
    start: NDArray[np.float64],
    stop: NDArray[np.float64],
    edges: tuple[float, float],
    **style: Any,
) -> None:
    """A bar from each ``start`` to ``stop`` (seconds, NaN for none) that lies in the axes, between the ``edges`` of its row."""
    from matplotlib.collections import PolyCollection

    left, right = np.clip(start / size, *ax.get_xlim()), np.clip(stop / size, *ax.get_xlim())
    seen = left < right
    if seen.any():
        left, right, low, high = left[seen], right[seen], rows[seen] + edges[0], rows[seen] + edges[1]
        corners = np.stack([left, low, right, low, right, high, left, high], axis=1).reshape(-1, 4, 2)
        ax.add_collection(PolyCollection(list(corners), label=label, lw=0, **style), autolim=False)


def per_client(runs: Sequence[Run]) -> Figure:
    """How clients fare on their own test data: all from worst to best, and their mean and worst 10 %, over all seeds."""
    from matplotlib.ticker import PercentFormatter

    metric = headline(runs)
    metric = metric if metric != "loss" else "accuracy"
    lower, members = lower_is_better(metric), groups(runs)
    known = {label: [run for run in group if "accuracy" in run.clients] for label, group in members.items()}
    scores = {
        label: np.concatenate([np.zeros(0), *(run.clients["accuracy"].numpy() for run in group)]) for label, group in known.items()
    }
    rows = [label for label, found in scores.items() if not np.isnan(found).all()]
    if not rows:
        raise DataError("nothing to draw: no client has test data of its own")
    names = [textwrap.fill(label, 24) for label in rows]
    lines = max(name.count("\n") + 1.5 for name in names)  # of 9.5 points, and half of one between two names
    figure, (ax, side) = _figure(WIDE, max(4.2, 1.1 + 0.16 * lines * len(rows)), columns=2, width_ratios=(1, 1))
    for label, style in zip(members, _styles(members), strict=True):
        if label not in rows:
            continue
        ranked = np.sort(scores[label][~np.isnan(scores[label])])
        ranked = ranked[::-1] if lower else ranked
        ax.step(np.arange(len(ranked) + 1) / len(ranked), np.append(ranked, ranked[-1]), where="post", lw=2, **style)
        row, mean = rows.index(label), float(ranked.mean())
        worst = float(np.nanmean([worst_clients(run, lower) for run in known[label]]))
        side.plot([worst, mean], [row, row], color=style["color"], lw=2, alpha=0.45, zorder=1)
        for x, marker, outwards in ((worst, "v", 1 if lower else -1), (mean, "o", -1 if lower else 1)):
            side.plot(x, row, marker, color=style["color"], ms=8)
            text = side.annotate(
                value_text(metric, x), (x, row), (8 * outwards, 0), textcoords="offset points", fontsize=9, color=INK
            )
            text.set(ha="left" if outwards > 0 else "right", va="center")
    name = metric_text(metric).removeprefix("client ")
    if is_share(metric):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, 0, " %"))
        ax.set_ylim(-0.02, 1.02)
        side.xaxis.set_major_formatter(PercentFormatter(1.0, 0, " %"))
        side.set_xticks(np.linspace(0, 1, 6))
        side.set_xlim(-0.2, 1.2)
    else:
        side.margins(x=0.3)
    ax.axvspan(0, 0.1, color=EMPTY, zorder=0, lw=0)
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, 0, " %"))
    ax.set_xlabel("clients, from worst to best")
    ax.set_ylabel(f"client's {name}")
    side.set_xlabel(name)
    side.set_yticks(range(len(rows)), names)
    for tick, label in zip(side.get_yticklabels(), rows, strict=True):
        tick.set(color=_styles(members)[list(members).index(label)]["color"], weight="bold")
    side.set_ylim(len(rows) - 0.4, -0.6)
    side.grid(axis="y", visible=False)
    side.tick_params(axis="y", length=0)
    _subtitle(side, "●  mean     ▼  mean of the worst 10 %")
    _title(
        figure, ax, f"{name.capitalize()} of every client on its own test data", f"{_pooled_text(members)}; shaded: the worst 10 %"
    )
    return figure


def draw_all(runs: Sequence[Run]) -> dict[str, Figure]:
    """Every picture that these runs give, by file name without its ending."""
    metric = headline(runs)
    endings = "test_loss", "_worst10", "epsilon", "consensus", f"node_{metric}", f"attack_{metric}"
    others = ["loss", *(m for m in metrics(runs) if m.endswith(endings))]
    axes: tuple[Against, ...] = ("rounds", "bytes", "seconds")
    if len({run.history[-1]["updates"] / run.history[-1]["round"] for run in runs if run.history}) > 1:
        axes = ("rounds", "updates", "bytes", "seconds")  # otherwise those are rounds by another name
    draw: dict[str, Callable[[], Figure]] = {f"{metric}-{against}": partial(curves, runs, metric, against) for against in axes}
    draw |= {f"{other}-rounds": partial(curves, runs, other, "rounds") for other in others}
    draw |= {"clients": partial(per_client, runs), "split": partial(split, runs[0]), "participation": partial(participation, runs)}
    firsts: dict[str, Run] = {}  # the first run of every schedule
    for run in runs:
        firsts.setdefault(run.settings.get("schedule", ""), run)
    for name, run in zip(("timeline", "timeline_2", "timeline_3"), firsts.values(), strict=False):
        draw[name] = partial(timeline, run)
    drawn = {}
    for name, picture in draw.items():
        with contextlib.suppress(DataError):  # what these runs do not hold is not drawn
            drawn[name] = picture()
    return drawn


def save_all(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write every picture as a PNG of 150 dots per inch; raises ``CheckpointError`` if the folder cannot be written."""
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in draw_all(runs).items():
            paths.append(folder / f"{''.join(c if c.isalnum() or c in '-_' else '-' for c in name)}.png")
            figure.savefig(paths[-1], dpi=DPI)
    except OSError as error:
        raise CheckpointError(f"out: {folder} cannot be written: {error.strerror}") from None
    return paths


# ---- the look


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, Any]:
    """A figure in inches and its axes, in the common look."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    share = {key: grid.pop(key) for key in ("sharex", "sharey") if key in grid}
    axes = figure.subplots(rows, columns, gridspec_kw=grid, **share)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#b0b0b0")
        ax.tick_params(color="#b0b0b0", labelcolor=INK, labelsize=9.5)
        ax.xaxis.label.set(color=INK, fontsize=10)
        ax.yaxis.label.set(color=INK, fontsize=10)
        ax.grid(color="#e4e4e4", lw=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _styles(members: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Colour and dashes of every method."""
    return [{"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]} for i in range(len(members))]


def _title(figure: Figure, ax: Axes, title: str, subtitle: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold", color=INK)
    _subtitle(ax, subtitle)


def _subtitle(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=9, color=FAINT)


def _legend(figure: Figure, ax: Axes) -> None:
    """Below the axes, in as many columns as fit, so that it never covers data."""
    handles, labels = ax.get_legend_handles_labels()
    fits = int(11 * figure.get_figwidth() // (6 + max(map(len, labels))))
    rows = -(-len(labels) // max(1, fits))
    columns = -(-len(labels) // rows)
    figure.set_figheight(
        figure.get_figheight() + 0.2 * (rows - 1)
    )  # a row of 10 points, at the cost of the page and not of the data
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10, handlelength=1.8)


def _seeds_text(members: dict[str, list[Run]]) -> str:
    fewest, most = min(map(len, members.values())), max(map(len, members.values()))
    if most == 1:
        return "one seed"
    return f"mean of {most if fewest == most else f'{fewest} to {most}'} seeds; band: lowest to highest seed"


def _pooled_text(members: dict[str, list[Run]]) -> str:
    most = max(map(len, members.values()))
    return f"{most} seeds pooled" if most > 1 else "one seed"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
