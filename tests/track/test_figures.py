from itertools import pairwise

import matplotlib._pylab_helpers
import numpy as np
import pytest
import torch
from made_runs import run, working
from matplotlib.colors import to_hex

import hanse as hs
from hanse.core.errors import ConfigError, DataError
from hanse.track.figures import COLOURS, curves, draw_all, participation, per_client, save_all, split, timeline

PNG = b"\x89PNG\r\n\x1a\n"


def lines(figure):
    """The drawn lines of the first axes that are methods, by label."""
    return {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}


# ---- curves


def test_a_line_is_the_mean_over_seeds_and_the_band_their_range():
    figure = curves([run(seed=0, accuracies=[0.2, 0.6]), run(seed=1, accuracies=[0.4, 1.0])], "accuracy", "rounds")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[1, 0.3], [2, 0.8]])
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.2
    assert band[:, 1].max() == 1.0
    assert "band: lowest to highest seed" in figure.axes[0].get_title("left")


def test_seeds_that_paid_differently_are_interpolated_where_both_have_values():
    # Seed 0 is evaluated after 2, 4, 6 kB in all; seed 1 after 3, 6, 9 kB: they share 3 to 6 kB.
    runs = [run(seed=0, accuracies=[0.2, 0.4, 0.6], up=1000), run(seed=1, accuracies=[0.0, 0.6, 0.9], up=1500)]
    figure = curves(runs, "accuracy", "bytes")
    expected = [[3, (0.3 + 0.0) / 2], [4, (0.4 + 0.2) / 2], [6, (0.6 + 0.6) / 2]]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), expected)
    assert figure.axes[0].get_xlabel() == "bytes sent, up and down (kB)"


def test_updates_are_an_axis_of_their_own_where_they_are_not_rounds_by_another_name():
    runs = [run("FedAvg"), run("FedBuff")]
    assert "accuracy-updates" not in draw_all(runs)
    for record in runs[1].history:
        record["updates"] = 5 * record["round"]
    figure = draw_all(runs)["accuracy-updates"]
    assert [line.get_xdata().tolist() for line in lines(figure).values()] == [[2, 4, 6], [5, 10, 15]]
    assert figure.axes[0].get_xlabel() == "client updates"


def test_names_below_each_other_cost_the_page_and_not_the_data():
    heights = []
    for names in (("A", "B"), tuple(f"a rule with a name that fills a line, number {i}" for i in range(6))):
        figure = curves([run(name) for name in names], "accuracy", "rounds")
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] == pytest.approx(heights[0], rel=0.05)


def test_rounds_without_evaluation_are_passed_over():
    figure = curves([run(accuracies=[0.2, None, 0.6])], "accuracy", "rounds")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[1, 0.2], [3, 0.6]])


def test_seeds_evaluated_once_at_different_costs_stay_points():
    runs = [run(seed=0, accuracies=[None, 0.5], up=1000), run(seed=1, accuracies=[None, 0.7], up=2000)]
    (points,) = lines(curves(runs, "accuracy", "bytes")).values()
    assert points.get_linestyle() == "None"
    np.testing.assert_allclose(points.get_xydata(), [[4, 0.5], [8, 0.7]])


def test_training_loss_is_there_without_any_evaluation():
    figure = curves([run(accuracies=[None, None])], "loss", "rounds")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[1, 1], [2, 0.5]])


def test_privacy_spent_is_drawn_against_rounds():
    private = run("FedAvg")
    assert "epsilon-rounds" not in draw_all([private])
    for t, r in enumerate(private.history, 1):
        r["epsilon"] = t / 2
    (ax,) = draw_all([private])["epsilon-rounds"].axes
    assert ax.get_ylabel() == "epsilon" and list(ax.lines[0].get_ydata()) == [0.5, 1.0, 1.5]


def test_a_loss_over_several_magnitudes_has_a_logarithmic_axis_with_plain_numbers():
    axis = curves([run(accuracies=[None] * 50)], "loss", "rounds").axes[0]
    assert axis.get_yscale() == "log"
    assert {"0.05", "0.1", "0.5", "1"} <= {axis.yaxis.get_major_formatter()(v) for v in axis.get_yticks()}


@pytest.mark.parametrize(("seconds", "label"), [(2.0, "(s)"), (300.0, "(min)"), (20_000.0, "(h)"), (400_000.0, "(days)")])
def test_virtual_time_is_shown_in_a_unit_for_people(seconds, label):
    assert curves([run(seconds=seconds)], "accuracy", "seconds").axes[0].get_xlabel() == f"virtual time {label}"


def test_equal_bytes_are_marked_where_the_cheapest_method_ends():
    figure = curves([run("FedAvg", up=1000), run("SCAFFOLD", up=2000)], "accuracy", "bytes")
    (mark,) = [line for line in figure.axes[0].lines if line.get_label().startswith("_")]
    assert mark.get_xdata() == pytest.approx([6, 6])


def test_an_unknown_metric_is_named_with_what_there_is():
    with pytest.raises(ConfigError, match=r"'acuracy'; did you mean accuracy\? allowed: accuracy, loss, test_loss"):
        curves([run()], "acuracy", "rounds")


def test_time_that_stands_still_is_not_drawn():
    runs = [run(seconds=0.0)]
    with pytest.raises(DataError, match="no accuracy over seconds above zero"):
        curves(runs, "accuracy", "seconds")
    assert "accuracy-seconds" not in draw_all(runs)
    assert "accuracy-bytes" in draw_all(runs)


def test_a_method_keeps_its_colour_in_every_picture_also_where_another_has_no_values():
    runs = [run("FedAvg", accuracies=[None, float("nan")]), run("FedProx"), run("SCAFFOLD")]
    for each in runs[1:]:
        each.clients["accuracy"] = torch.tensor([0.5, 1.0])
    drawn = lines(curves(runs, "accuracy", "rounds"))
    assert list(drawn) == ["FedProx", "SCAFFOLD"]
    assert [line.get_color() for line in drawn.values()] == list(COLOURS[1:3])
    assert [line.get_color() for line in lines(curves(runs, "loss", "bytes")).values()] == list(COLOURS[:3])
    assert {to_hex(line.get_color()).upper() for line in per_client(runs).axes[1].lines} == set(COLOURS[1:3])


# ---- split


def test_clients_are_ordered_by_their_most_frequent_class():
    one = run(clients=3)
    one.clients["classes"], one.names = torch.tensor([[1, 9], [8, 0], [6, 4]]), ("cat", "dog")
    figure = split(one)
    sizes, shares = figure.axes[0], figure.axes[1]
    np.testing.assert_allclose(shares.images[0].get_array(), [[1, 0.6, 0.1], [0, 0.4, 0.9]])
    assert [bar.get_height() for bar in sizes.patches] == [8, 10, 10]
    assert [tick.get_text() for tick in shares.get_xticklabels()] == ["1", "2", "0"]
    assert [tick.get_text() for tick in shares.get_yticklabels()] == ["cat", "dog"]
    assert sorted(text.get_text() for text in shares.texts) == ["1", "4", "6", "8", "9"]
    assert sizes.get_title("left") == "28 samples on 3 clients"


def test_without_classes_samples_per_client_are_counted():
    one = run(clients=10_000, partition="natural")
    one.clients["samples"] = torch.arange(10_000) % 7 + 1
    ax = split(one).axes[0]
    assert sum(bar.get_height() for bar in ax.patches) == 10_000
    assert ax.patches[0].get_height() == 1429  # 10,000 = 7 * 1428 + 4: sizes 1 to 4 come once more
    assert ax.get_title("left") == f"{int(one.clients['samples'].sum()):,} samples on 10,000 clients, partition natural"


def test_very_unequal_clients_are_counted_by_doublings():
    one = run()
    one.clients["samples"] = torch.tensor([1, 2, 3, 4, 7, 7, 8, 100])
    ax = split(one).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [1, 2, 3, 1, 0, 0, 1]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4", "8", "16", "32", "64", "128"]


# ---- participation


def test_the_raster_shows_who_took_part_when():
    one = run(clients=4)
    for record, cohort in zip(one.history, ([0, 2], [1, 2], [0, 2]), strict=True):
        record["cohort"] = cohort
    raster, often = participation([one]).axes
    np.testing.assert_array_equal(raster.images[0].get_array(), [[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert [bar.get_width() for bar in often.patches] == [2, 1, 3, 0]
    assert raster.get_title("left") == "FedAvg, seed 0: 2 of 4 clients a round, 3 seen at least once"


def test_methods_that_asked_the_same_clients_share_a_raster():
    runs = [run("FedAvg"), run("FedProx"), run("MoDeST")]
    assert len(participation(runs).axes) == 2
    runs[2].history[0]["cohort"] = [3]
    titles = [ax.get_title("left") for ax in participation(runs).axes if ax.images]
    assert [title.split(",")[0] for title in titles] == ["FedAvg and FedProx", "MoDeST"]


def test_many_clients_are_counted_rather_than_drawn_one_by_one():
    one = run(clients=10_000)
    ax = participation([one]).axes[0]
    (steps,) = ax.patches
    np.testing.assert_allclose(steps.get_data().values, [0.9998, 0, 0, 0.0002])
    assert [text.get_text() for text in ax.texts] == ["100 %", "0.02 %"]


def test_methods_that_asked_differently_often_get_steps_of_their_own():
    runs = [run("FedAvg", clients=1000), run("FedBuff", clients=1000)]
    runs[1].clients["rounds"][:] = 1
    steps = participation(runs).axes[0].patches
    np.testing.assert_allclose([step.get_data().values for step in steps], [[0.998, 0, 0, 0.002], [0, 1, 0, 0]])
    assert [step.get_label() for step in steps] == ["FedAvg", "FedBuff"]


def test_nothing_known_about_participation_is_nothing_to_draw():
    one = run(clients=1000)
    one.clients = {}
    for record in one.history:
        record["cohort"] = []
    with pytest.raises(DataError, match="who took part"):
        participation([one])


# ---- timeline


def bars(figure, label):
    """The bars of one kind as (row, from, to), in order."""
    boxes = [c.get_paths() for c in figure.axes[0].collections if c.get_label() == label]
    corners = [path.vertices for paths in boxes for path in paths]
    return sorted((round(v[:, 1].mean()), v[:, 0].min(), v[:, 0].max()) for v in corners)


def marks(figure, label):
    """The marks of one kind as (row, when)."""
    return [tuple(xy[::-1]) for line in figure.axes[0].lines if line.get_label() == label for xy in line.get_xydata()]


def rows(figure):
    return [int(tick.get_text()) for tick in figure.axes[0].get_yticklabels()]


def test_bars_are_where_the_numbers_say_with_fast_clients_first():
    figure = timeline(
        working([3, 0, 0.0, 2.0, 30.0, 34.0, 34.0], [1, 0, 0.0, 1.0, 11.0, 14.0, 34.0], [1, 1, 34.0, 36.0, 46.0, 50.0, 50.0])
    )
    assert rows(figure) == [1, 3]
    assert bars(figure, "receiving") == [(0, 0, 1), (0, 34, 36), (1, 0, 2)]
    assert bars(figure, "computing") == [(0, 1, 11), (0, 36, 46), (1, 2, 30)]
    assert bars(figure, "sending") == [(0, 11, 14), (0, 46, 50), (1, 30, 34)]
    assert bars(figure, "reply waiting") == [(0, 14, 34)]
    assert figure.axes[0].get_xlim() == (0, 50)
    assert figure.axes[0].get_xlabel() == "virtual time (s)"
    assert figure.axes[0].get_title("left") == "FedAvg, seed 0: 2 of 4 clients, all 50 s; computing 48 % of the time"


def test_what_was_lost_or_dropped_is_marked_where_it_ended():
    lost, dropped = [0, 0, 0.0, 1.0, 5.0, None, None], [1, 0, 0.0, 1.0, 6.0, 8.0, None]
    figure = timeline(working(lost, dropped, [2, 0, 0.0, 1.0, 8.0, 9.0, 10.0]))
    assert marks(figure, "no reply") == [(0, 5)]
    assert marks(figure, "reply dropped") == [(1, 8)]
    assert bars(figure, "sending") == [(1, 6, 8), (2, 8, 9)]
    assert figure.axes[0].get_title("left").endswith("; computing 53 % of the time, 1 job without reply, 1 reply dropped")


def test_work_that_a_client_left_ends_when_it_went_away():
    jobs = [0, 0, 0.0, 1.0, None, None, None], [0, 1, 20.0, 21.0, None, None, None], [1, 0, 0.0, 2.0, 38.0, 39.0, 40.0]
    away = [(0, 30.0, float("inf")), (1, 5.0, 6.0), (0, 10.0, 15.0), (2, 3.0, 4.0)]
    figure = timeline(working(*jobs, away=away))
    assert bars(figure, "computing") == [(0, 1, 10), (0, 21, 30), (1, 2, 38)]
    assert marks(figure, "no reply") == [(0, 10), (0, 30)]
    assert bars(figure, "away") == [(0, 10, 15), (0, 30, 40), (1, 5, 6)]  # client 2 never worked and has no row


@pytest.mark.parametrize(("away", "end"), [((0, 25.0, 26.0), 25), ((1, 7.0, 8.0), 30)], ids=["went away", "was told to stop"])
def test_work_that_was_broken_off_ends_with_the_clients_next_job_or_the_round_at_the_latest(away, end):
    jobs = [0, 0, 0.0, 1.0, None, None, None], [0, 1, 20.0, 21.0, None, None, None], [1, 0, 0.0, 2.0, 28.0, 29.0, 30.0]
    figure = timeline(working(*jobs, away=[away]))
    assert bars(figure, "computing") == [(0, 1, 20), (0, 21, end), (1, 2, 28)]
    assert marks(figure, "no reply") == [(0, 20), (0, end)]


def test_a_client_that_never_received_anything_counts_as_slow():
    figure = timeline(working([0, 0, 20.0, None, None, None, None], [1, 0, 0.0, 2.0, 28.0, 29.0, 30.0]))
    assert rows(figure) == [1, 0]
    assert bars(figure, "computing") == [(0, 2, 28)]
    assert marks(figure, "no reply") == [(1, 20)]


def jobs_of(client, seconds, jobs, wait=0.0):
    """Jobs one after the other, of ``seconds`` each, the replies waiting longer than that."""
    return [[client, t, t * seconds, t * seconds, t * seconds + seconds / 2, (t + 1) * seconds, (t + 1) * seconds + wait]
            for t in range(jobs)]  # fmt: skip


@pytest.mark.parametrize("wait", [0.0, 500.0])
def test_the_picture_ends_where_typical_jobs_can_still_be_told_apart(wait):
    jobs = [job for client, seconds in enumerate((4.0, 8.0, 8.0, 16.0)) for job in jobs_of(client, seconds, 100, wait)]
    figure = timeline(working(*jobs))
    assert figure.axes[0].get_xlim() == (0, 2)  # minutes: 15 jobs of the median length, 8 s
    assert figure.axes[0].get_xlabel() == "virtual time (min)"
    drawn = [row for row, *_ in bars(figure, "computing")]
    assert [drawn.count(row) for row in range(4)] == [30, 15, 15, 8]
    assert max(end for *_, end in bars(figure, "computing")) == 2
    assert ", first 2 min; computing 51 % of the time" in figure.axes[0].get_title("left")


def test_of_many_clients_those_with_most_jobs_are_drawn():
    jobs = [job for client in range(60) for job in jobs_of(client, 5.0 - client / 100, 2 if client % 3 else 1)]
    late = [[0, 5, 1000.0 + t, 1000.0 + t, 1001.0 + t, 1001.0 + t, 1001.0 + t] for t in range(9)]  # beyond the picture
    figure = timeline(working(*jobs, *late, clients=90))
    assert rows(figure) == [client for client in range(59, 0, -1) if client % 3]
    assert "the 40 busiest of 90 clients" in figure.axes[0].get_title("left")


def test_aggregations_are_marked_unless_there_are_very_many():
    def lines_of(figure):
        return [path.vertices[0, 0] for c in figure.axes[0].collections if c.get_label() == "aggregation" for path in c.get_paths()]

    assert lines_of(timeline(working(*jobs_of(0, 2.0, 3), *jobs_of(1, 3.0, 2)))) == [2, 3, 4, 6]
    assert lines_of(timeline(working(*(job for client in range(51) for job in jobs_of(client, 2.0 + client / 99, 1))))) == []


def test_thousands_of_jobs_are_a_handful_of_artists():
    figure = timeline(working(*(job for client in range(40) for job in jobs_of(client, 10.0, 100, 1.0))))
    assert len(figure.axes[0].collections) == 4  # nothing is received, as that took no time; with the aggregations


@pytest.mark.parametrize("jobs", [[], [[0, 0, 5.0, 5.0, 5.0, 5.0, 5.0]]], ids=["none", "no time"])
def test_without_time_nobody_worked_at_any(jobs):
    with pytest.raises(DataError, match="who worked when"):
        timeline(working(*jobs))


def test_the_first_run_of_up_to_three_schedules_is_drawn():
    job = jobs_of(0, 2.0, 1)
    runs = [working(*job, method=f"M{i}", schedule=name) for i, name in enumerate(("a(k=1)", "a(k=1)", "a(k=2)", "b", "c"))]
    titles = [figure.axes[0].get_title("left") for name, figure in draw_all(runs).items() if name.startswith("timeline")]
    assert [title.split(", seed")[0] for title in titles] == ["M0, a", "M2, a", "M3, b"]


# ---- clients


def test_clients_run_from_worst_to_best_with_mean_and_worst_tenth_marked():
    runs = [run(seed=0), run(seed=1)]
    runs[0].clients["accuracy"] = torch.linspace(0.1, 1.0, 10)
    runs[1].clients["accuracy"] = torch.tensor([0.3, float("nan"), 0.5])
    ranked, marks = per_client(runs).axes
    everyone = np.sort([*np.linspace(0.1, 1.0, 10), 0.3, 0.5])
    np.testing.assert_allclose(ranked.lines[0].get_ydata(), np.append(everyone, 1.0), atol=1e-7)
    assert ranked.lines[0].get_xdata()[-1] == 1
    placed = {line.get_marker(): line.get_xdata()[0] for line in marks.lines}
    assert placed["o"] == pytest.approx(everyone.mean())
    assert placed["v"] == pytest.approx((0.1 + 0.3) / 2)


def test_long_names_beside_the_clients_do_not_overlap():
    runs = [run(f"FedAvg synchronous(over=0.{i}, deadline=None)") for i in range(8)]
    for one in runs:
        one.clients["accuracy"] = torch.ones(4)
    figure = per_client(runs)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[1].get_yticklabels()]  # from top to bottom
    assert all(above.y0 > below.y1 for above, below in pairwise(boxes))


def test_for_an_error_the_worst_clients_have_the_largest():
    one = run()
    for record in one.history:
        record["metrics"] = {"squared_error": 4.0}
    one.clients["accuracy"] = torch.tensor([1.0, 9.0, 2.0])
    ranked, marks = per_client([one]).axes
    np.testing.assert_allclose(ranked.lines[0].get_ydata(), [9, 2, 1, 1])
    assert {line.get_marker(): line.get_xdata()[0] for line in marks.lines}["v"] == 9


def test_clients_without_test_data_are_nothing_to_draw():
    one = run()
    one.clients["accuracy"] = torch.full((4,), float("nan"))
    with pytest.raises(DataError, match="test data"):
        per_client([one])


# ---- all


def test_everything_is_written_as_png_and_pyplot_is_left_alone(tmp_path):
    one = run()
    one.clients["accuracy"] = torch.tensor([0.5, 0.7, 0.9, 1.0])
    paths = save_all([one, run("FedProx")], tmp_path / "new" / "folder")
    expected = ["accuracy-rounds", "accuracy-bytes", "accuracy-seconds", "loss-rounds", "test_loss-rounds"]
    assert [path.stem for path in paths] == [*expected, "clients", "split", "participation"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert not matplotlib._pylab_helpers.Gcf.figs


def test_names_of_metrics_cannot_leave_the_folder(tmp_path):
    one = run()
    for record in one.history:
        record["metrics"] = {"../score": 0.5}
    paths = save_all([one], tmp_path)
    assert paths[0].name == "---score-rounds.png"
    assert {path.parent for path in paths} == {tmp_path}


def test_runs_without_a_single_round_give_the_split_alone():
    one = run(accuracies=[])
    one.clients.pop("rounds")
    assert list(draw_all([one])) == ["split"]


def test_a_partition_can_be_drawn_before_anything_runs():
    fed = hs.Federation(hs.tasks.digits(), clients=12, partition=hs.dirichlet(0.3))
    figure = hs.figures.partition(fed.split)
    samples, shares = figure.axes[:2]
    assert sum(bar.get_height() for bar in samples.patches) == fed.split.train.counts().sum()
    assert shares.images[0].get_array().shape == (10, 12)
