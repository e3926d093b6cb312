import base64
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_runs import record, run, working

from hanse.core.errors import CheckpointError, DataError
from hanse.track.figures import draw_all
from hanse.track.report import notes, settings, write_report
from hanse.track.summary import (
    compare,
    cost_text,
    doubts,
    groups,
    headline,
    leaders,
    summary_table,
    table_text,
    value_text,
    verdict,
)

NAN = float("nan")


def text_of(path):
    """The report without tags, each run of white space a blank."""
    body = re.sub(r"<style>.*?</style>|<[^>]+>", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", body)


@pytest.fixture
def no_pictures(monkeypatch):
    """Pages without pictures, which take most of the time."""

    def folder_only(runs, folder):
        folder.mkdir(parents=True)
        return []

    monkeypatch.setattr("hanse.track.report.save_all", folder_only)


# ---- numbers


def test_the_table_by_hand():
    runs = [run("FedAvg", 0, [0.5, 0.8, 0.9], up=1000, seconds=2.0), run("FedAvg", 1, [0.5, 0.9, 0.7], up=1000, seconds=4.0)]
    runs[0].clients["accuracy"] = torch.cat([torch.tensor([0.1, 0.3]), torch.ones(18)])  # worst 10 %: two clients
    runs[1].clients["accuracy"] = torch.tensor([0.4, 1.0, NAN])  # at least one
    (row,) = summary_table(runs)
    assert row == {
        "method": "FedAvg",
        "seeds": 2,
        "scored": 2,
        "metric": "accuracy",
        "final": pytest.approx(0.8),
        "std": pytest.approx(0.2 / 2**0.5),
        "best": pytest.approx(0.9),
        "target": pytest.approx(0.72),
        "reached": 2,
        "rounds_to_target": 2.0,
        "bytes_to_target": 4000.0,
        "seconds_to_target": 6.0,
        "rounds": 3.0,
        "bytes_up": 3000.0,
        "bytes_down": 3000.0,
        "seconds": 9.0,
        "worst10": pytest.approx(0.3),
    }


def test_the_target_comes_from_the_best_method_and_half_a_success_has_no_mean():
    runs = [run("A", 0, [0.5, 1.0]), run("A", 1, [0.95, 1.0]), run("B", 0, [0.5, 0.91]), run("B", 1, [0.5, 0.6])]
    a, b = summary_table(runs)
    assert a["target"] == b["target"] == pytest.approx(0.9)
    assert (a["reached"], a["rounds_to_target"]) == (2, 1.5)
    assert (b["reached"], b["rounds_to_target"], b["bytes_to_target"], b["seconds_to_target"]) == (1, None, None, None)
    headers, cells = table_text(runs)
    assert dict(zip(headers, cells[1], strict=True))["rounds to 90.0 %"] == "1 of 2 seeds"


def test_for_a_loss_less_is_better():
    runs = [run("A", accuracies=[None, None, None]), run("B", accuracies=[None, None])]
    a, b = summary_table(runs)
    assert headline(runs) == a["metric"] == "loss"
    assert (a["final"], a["best"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert a["target"] == pytest.approx(1 + 0.9 * (1 / 3 - 1))  # 90 % of the way from 1 to 1/3
    assert (a["reached"], b["reached"]) == (1, 0)
    assert verdict(runs).startswith(
        "Judged by training loss (one seed each, so the spread is unknown): at equal rounds (2) A and B tie"
    )


def test_a_run_that_ends_in_nan_has_no_final_value():
    runs = [run("A", 0, [0.5, 0.8]), run("A", 1, [0.5, NAN])]
    (row,) = summary_table(runs)
    assert (row["seeds"], row["scored"], row["final"], row["std"]) == (2, 1, 0.8, None)
    assert table_text(runs)[1][0][2] == "80.0 % (1 of 2 seeds)"
    assert doubts(runs) == ["A, seed 1, ended without a finite accuracy."]


def test_a_run_cut_short_is_said_to_be():
    one = run(rounds="60")
    assert doubts([one]) == ["FedAvg, seed 0, stopped after 3 of 60 rounds."]


@pytest.mark.parametrize("accuracies", [[], [None, None], [NAN, NAN], [0.5]])
def test_the_table_is_json_whatever_is_missing(accuracies):
    rows = summary_table([run("A", accuracies=accuracies), run("B", accuracies=accuracies)])
    assert [row["method"] for row in json.loads(json.dumps(rows, allow_nan=False))] == ["A", "B"]


def test_columns_of_time_are_left_out_when_it_stands_still():
    assert "virtual time" in table_text([run()])[0]
    assert not [header for header in table_text([run(seconds=0.0)])[0] if "time" in header]


# ---- who is one method


def test_methods_keep_the_order_in_which_they_came():
    runs = [run("SCAFFOLD", 0), run("FedAvg", 0), run("SCAFFOLD", 1), run("FedAvg", 1)]
    assert {label: [r.seed for r in members] for label, members in groups(runs).items()} == {"SCAFFOLD": [0, 1], "FedAvg": [0, 1]}


def test_one_rule_with_two_codecs_is_two_methods():
    runs = [run(codec="identity"), run(codec="topk(ratio=0.1)"), run("FedProx", codec="identity")]
    assert list(groups(runs)) == ["FedAvg identity", "FedAvg topk", "FedProx"]


def test_one_rule_under_schedules_of_one_name_is_told_apart_by_the_fields_that_differ():
    texts = "synchronous(cohort=4, over=0.0)", "synchronous(cohort=4, over=0.3)", "fedbuff(buffer=3)"
    assert list(groups([run(schedule=text) for text in texts])) == [
        "FedAvg synchronous(over=0.0)",
        "FedAvg synchronous(over=0.3)",
        "FedAvg fedbuff",
    ]


def test_chains_of_codecs_are_told_apart_by_their_stages_and_these_by_their_fields():
    texts = (
        "layers() | uniform(bits=8, stochastic=False)",
        "layers() | topk(fraction=0.1, only={}) | kmeans(centres=2)",
        "layers() | topk(fraction=0.5, only={}) | kmeans(centres=2)",
        "feedback(codec=topk(fraction=0.1, only={}))",
    )
    assert list(groups([run(codec=text) for text in texts])) == [
        "FedAvg layers | uniform",
        "FedAvg layers | topk(fraction=0.1) | kmeans",
        "FedAvg layers | topk(fraction=0.5) | kmeans",
        "FedAvg feedback",
    ]


def test_what_privacy_has_cost_has_a_column_of_its_own():
    private, other, plain = run("FedAvg"), run("Scaffold"), run("FedProx")
    for t, r in enumerate(private.history, 1):
        r["epsilon"] = 0.5 * t
    for r in other.history:
        r["epsilon"] = float("inf")
    assert [row["epsilon"] for row in summary_table([private, other, plain])] == [1.5, None, None]
    headers, rows = table_text([private, other, plain])
    assert headers[-1] == "epsilon" and [row[-1] for row in rows] == ["1.5", "-", "-"]
    assert "epsilon" not in table_text([plain])[0] and "epsilon" not in summary_table([plain])[0]
    assert headline([private]) == "accuracy"
    json.dumps(summary_table([private, other]), allow_nan=False)


def test_among_peers_there_are_columns_for_the_nodes():
    one, other = run("FedAvg"), run("FedSAM")
    for made, accuracy, distance in ((one, 0.7, 0.25), (other, 0.8, 0.0625)):
        made.history[-1]["metrics"] |= {"node_accuracy": accuracy, "consensus": distance}
    one.clients |= {"sent": torch.tensor([1000, 2000, 3000, 4000]), "received": torch.tensor([0, 0, 0, 6000])}
    headers, rows = table_text([one, other])
    assert headers[-4:] == ["final accuracy, mean of the nodes", "consensus distance", "bytes of a node", "of the busiest"]
    assert [row[-4:] for row in rows] == [["70.0 %", "0.25", "4 kB", "10 kB"], ["80.0 %", "0.0625", "-", "-"]]
    assert headline([one, other]) == "accuracy"
    assert {"consensus-rounds", "node_accuracy-rounds"} <= draw_all([one, other]).keys()


def test_a_server_has_no_such_columns():
    assert "consensus distance" not in table_text([run()])[0]


def test_one_rule_with_and_without_privacy_is_told_apart():
    noises = [run("FedAvg", privacy=f"differential(clip=0.5, noise={z}), secure(threshold=0.67, clip=8.0)") for z in (0.5, 1.0)]
    alone, none = run("FedAvg", privacy="secure(threshold=0.67, clip=8.0)"), run("FedAvg")
    assert list(groups([*noises, alone, none])) == [
        "FedAvg differential(noise=0.5) + secure",
        "FedAvg differential(noise=1.0) + secure",
        "FedAvg secure",
        "FedAvg no privacy",
    ]


def test_a_run_that_ended_by_its_time_did_not_stop_early():
    ended, stopped = run(seconds=9.0), run(seed=1, seconds=9.0)
    ended.settings |= {"rounds": "1000", "seconds": str(ended.history[-1]["seconds"])}
    stopped.settings |= {"rounds": "1000", "seconds": "1e9"}
    assert [text.split(",")[1] for text in doubts([ended, stopped])] == [" seed 1"]


def test_one_rule_with_two_rates_is_told_apart_by_its_parameters():
    runs = [run(), run()]
    runs[1].settings["method"] = "FedAvg(lr=constant(0.5))"
    assert list(groups(runs)) == ["FedAvg", "FedAvg(lr=constant(0.5))"]


def test_the_headline_is_one_that_every_evaluated_run_has():
    personal = run("Ditto")
    for each in personal.history:
        each["metrics"] = {"client_accuracy": 0.5, "client_accuracy_worst10": 0.2, "client_accuracy_variance": 0.1}
    shared = run("FedAvg")
    for each in shared.history:
        each["metrics"] |= {"client_accuracy_variance": 0.1, "client_accuracy": 0.4}
    assert headline([shared]) == "accuracy"
    assert headline([shared, personal]) == "client_accuracy"
    assert headline([personal, run("killed", accuracies=[])]) == "client_accuracy"


# ---- who is ahead


def test_the_winner_depends_on_what_is_held_equal():
    # Per round SCAFFOLD is better, but it sends twice as much: after 6 kB it has had 1.5 rounds, half way from 0.4 to 0.7.
    runs = [run("FedAvg", 0, [0.3, 0.6, 0.8], up=1000), run("SCAFFOLD", 0, [0.4, 0.7, 0.9], up=2000)]
    by_rounds, by_bytes = compare(runs, "accuracy", "rounds"), compare(runs, "accuracy", "bytes")
    assert (by_rounds.budget, by_rounds.ahead) == (3, ["SCAFFOLD"])
    assert (by_bytes.budget, by_bytes.ahead) == (6000, ["FedAvg"])
    assert by_bytes.values == {"FedAvg": [0.8], "SCAFFOLD": [pytest.approx(0.55)]}
    said = verdict(runs)
    assert "at equal rounds (3) SCAFFOLD is ahead with 90.0 % (then FedAvg, 80.0 %)" in said
    assert "at equal bytes (6 kB) FedAvg is ahead with 80.0 % (then SCAFFOLD, 55.0 %)" in said
    assert "at equal virtual time (6 s) SCAFFOLD is ahead" in said


def test_a_difference_within_the_spread_is_a_tie():
    runs = [
        run("A", 0, [0.80]),
        run("A", 1, [0.90]),
        run("B", 0, [0.86]),
        run("B", 1, [0.88]),
        run("C", 0, [0.7]),
        run("C", 1, [0.7]),
    ]
    assert compare(runs, "accuracy", "rounds").ahead == ["B", "A"]  # 0.87 and 0.85 ± 0.07
    assert "at equal rounds (1) B and A tie (87.0 ± 1.4 %, 85.0 ± 7.1 %)" in verdict(runs)


def test_a_method_with_no_value_at_that_cost_is_left_out_and_named():
    runs = [run("A", accuracies=[0.5, 0.6]), run("B", accuracies=[0.5, 0.7]), run("C", accuracies=[None, 0.9], up=9000)]
    assert "at equal bytes (4 kB; no value by then for C) B is ahead" in verdict(runs)


def test_nothing_in_common_is_said():
    runs = [run("A", accuracies=[None, 0.6]), run("B", accuracies=[None, 0.7], up=9000)]
    assert "at equal bytes fewer than two methods can be compared" in verdict(runs)


def test_a_single_method_is_described():
    assert verdict([run(seconds=60.0)]) == "FedAvg ends at accuracy 90.0 % after 3 rounds, 6 kB and 3 min of virtual time."
    assert verdict([run(accuracies=[])]) == "FedAvg ended without a value to judge it by."


@given(st.dictionaries(st.sampled_from("ABCD"), st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1), st.booleans())
def test_nobody_beats_the_first_leader_and_without_spread_ties_are_exact(values, lower):
    sign = -1 if lower else 1
    mean = {label: sum(found) / len(found) for label, found in values.items()}
    first, *_ = leaders(values, lower)
    assert all(sign * mean[first] >= sign * other - 1e-12 for other in mean.values())
    single = {label: found[:1] for label, found in values.items()}
    best = single[leaders(single, lower)[0]]
    assert set(leaders(single, lower)) == {label for label, found in single.items() if found == best}


# ---- in words


@pytest.mark.parametrize(
    ("against", "amount", "text"),
    [("rounds", 60, "60"), ("rounds", 17.333, "17.3"), ("bytes", 900, "900 B"), ("bytes", 12_345_678, "12.3 MB"),
     ("bytes", 1_234_567_890_123, "1,235 GB"), ("seconds", 0.25, "0.25 s"), ("seconds", 7200, "2 h"), ("seconds", None, "-"),
     ("updates", 1234, "1,234")],
)  # fmt: skip
def test_costs_read_well(against, amount, text):
    assert cost_text(against, amount) == text


def test_shares_are_per_cent_and_losses_are_not():
    assert value_text("accuracy", 0.9342, 0.0051) == "93.4 ± 0.5 %"
    assert value_text("test_loss", 0.12345, 0.0061) == "0.1235 ± 0.0061"
    assert value_text("client_accuracy_variance", 0.04) == "0.04"


# ---- the page


def test_the_page_holds_numbers_pictures_settings_and_notes(tmp_path):
    runs = [run("FedAvg", 0, partition="iid"), run("FedProx", 0, [0.5, 0.8, 0.95], partition="iid")]
    runs[0].notes["estimate"] = "3 s before, 4 s in fact"
    path = write_report(runs, tmp_path / "out", "Two rules")
    page, text = path.read_text(), text_of(path)
    assert path == tmp_path / "out" / "report.html"
    assert "FedProx is ahead with 95.0 %" in text
    assert re.search(r"FedAvg 1 90.0 % .* FedProx 1 95.0 %", text)
    assert "3 s before, 4 s in fact FedAvg, seed 0" in text
    assert "partition iid" in text
    assert page.count('class="best"') == 1
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert sorted(embedded) == sorted(p.read_bytes() for p in (tmp_path / "out" / "figures").glob("*.png"))
    assert len(embedded) == 7


def test_the_page_shows_the_timeline_in_a_row_of_its_own_after_participation(tmp_path):
    page = write_report([working([0, 0, 0.0, 1.0, 2.0, 3.0, 4.0])], tmp_path, "Timed").read_text()
    assert re.findall(r'<img class="wide" alt="([^"]+)"', page) == ["split", "participation", "timeline"]
    assert (tmp_path / "figures" / "timeline.png").is_file()


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = write_report([run()], tmp_path, "One").read_text()
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)\s*=\s*"([^"]*)', page))
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)


def test_what_users_write_is_escaped(tmp_path, no_pictures):
    evil = "<script>alert('&')</script>"
    one = run(partition=evil)
    one.method, one.notes[evil] = evil, evil
    page = write_report([one], tmp_path, evil).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;") >= 6


def test_settings_are_told_apart_into_common_and_different():
    runs = [run("FedAvg", 0, codec="identity"), run("FedAvg", 1, codec="identity"), run("FedProx", 0, codec="topk")]
    common, differing = settings(runs)
    assert common == {"task": "digits", "clients": "4", "rounds": "3"}
    assert differing == {"method": ["FedAvg", "FedProx"], "codec": ["identity", "topk"], "seeds": ["0, 1", "0"]}


def test_runs_that_note_the_same_share_a_row():
    runs = [run(seed=0), run(seed=1)]
    for one in runs:
        one.notes = {"arrangement": "stacked", "estimate": f"{one.seed} s"}
    assert notes(runs) == [
        ("arrangement", "all runs", "stacked"),
        ("estimate", "FedAvg, seed 0", "0 s"),
        ("estimate", "FedAvg, seed 1", "1 s"),
    ]


def test_bare_runs_give_a_page_too(tmp_path):
    killed = run("killed", accuracies=[])
    killed.clients = {}
    assert "fewer than two methods" in text_of(write_report([killed, run("FedAvg", accuracies=[])], tmp_path, "Nothing"))


def test_one_round_gives_a_page(tmp_path, no_pictures):
    one = run(accuracies=[])
    one.history.append(record(1, accuracy=0.25, up=10))
    assert "FedAvg ends at accuracy 25.0 % after 1 round and 10 B." in text_of(write_report([one], tmp_path, "One"))


def test_no_runs_and_no_room_are_errors(tmp_path):
    with pytest.raises(DataError, match="no runs"):
        write_report([], tmp_path, "None")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match="taken"):
        write_report([run()], tmp_path / "taken", "No room")
