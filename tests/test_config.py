"""Settings: one schema for TOML, flags and Python."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.config import Settings
from hanse.core.errors import ConfigError

CHANGED = {
    "task": 'table(path="a\\b \u00e4\U0001f600.csv")',
    "clients": 7,
    "partition": "dirichlet(0.3)",
    "fleet": "phones",
    "method": ["FedAvg(lr=0.2)", "Scaffold"],
    "schedule": ["synchronous(cohort=3)", "fedbuff(buffer=2)"],
    "cohort": 5,
    "codec": ["topk(0.2)", "feedback(topk(0.1) | sign)"],
    "down": "cast",
    "privacy": ["differential(clip=0.5, noise=2.0)", "secure"],
    "attack": "alie(share=0.3)",
    "engine": 'local(path="loop")',
    "rounds": 9,
    "seconds": 12.5,
    "seed": [3, 4],
    "split_seed": 8,
    "evaluate": 0,
    "evaluate_seconds": 2.5,
    "private": ["head.*", "BatchNorm2d"],
    "frozen": ["0.*"],
    "buffers": "private",
    "dtype": "float64",
    "device": "cpu",
    "track": ["tensorboard"],
    "metrics_port": "0.0.0.0:9400",
}


def test_every_field_is_tried_and_documented() -> None:
    assert CHANGED.keys() == Settings.model_fields.keys()
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize("values", [{}, CHANGED], ids=["defaults", "all changed"])
def test_toml_reads_back(values: dict[str, object], tmp_path: Path) -> None:
    settings = Settings.read(None, values)
    (tmp_path / "a.toml").write_text(settings.toml(), encoding="utf-8")
    assert Settings.read(tmp_path / "a.toml", {}) == settings


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_toml(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    settings, file = Settings(task=text, private=(text,)), tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(settings.toml(), encoding="utf-8", newline="")
    assert Settings.read(file, {}) == settings


def test_text_from_flags_means_the_same_as_toml() -> None:
    flags = {
        n: v if n in ("method", "schedule", "codec", "privacy") else " ".join(map(str, v)) if isinstance(v, list) else str(v)
        for n, v in CHANGED.items()
    }
    assert Settings.read(None, flags) == Settings.read(None, CHANGED)
    assert Settings.read(None, {"seed": "1, 2,3", "private": "a,b"}) == Settings.read(
        None, {"seed": [1, 2, 3], "private": ["a", "b"]}
    )
    assert Settings.read(None, {"seed": 4, "method": "FedProx"}) == Settings(seed=(4,), method=("FedProx",))


def test_what_is_given_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('task = "digits"\nclients = 5\nrounds = 3\n')
    assert Settings.read(tmp_path / "a.toml", {"clients": "6"}) == Settings(clients=6, rounds=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"client": 3}, r"setting: unknown name 'client'; did you mean clients"),
        ({"clients": 0}, "clients: 0 is not allowed: .*greater than 0"),
        ({"clients": "many"}, "clients: 'many' is not allowed"),
        ({"rounds": "1.5"}, "rounds: '1.5' is not allowed"),
        ({"seed": "1 x"}, r"seed.1: 'x' is not allowed"),
        ({"seed": -1}, "seed.0: -1 is not allowed"),
        ({"seed": ""}, "seed: .* is not allowed"),
        ({"method": []}, "method: .* is not allowed"),
        ({"partition": {"alpha": 1}}, "partition: .* is not allowed"),
        ({"dtype": "int8"}, "dtype: 'int8' is not allowed: .*float32"),
        ({"buffers": "shared"}, "buffers: 'shared' is not allowed: .*average"),
        ({"track": "paper"}, "track.0: 'paper' is not allowed: .*tensorboard"),
        ({"evaluate": -1}, "evaluate: -1 is not allowed"),
        ({"seconds": 0}, "seconds: 0 is not allowed: .*greater than 0"),
        ({"evaluate_seconds": "soon"}, "evaluate_seconds: 'soon' is not allowed"),
        ({"schedule": []}, "schedule: .* is not allowed"),
    ],
)
def test_wrong_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Settings.read(None, values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"clients = ", b"clients = 1\nclients = 2", b"\xff\xfe", b"[[]", b"task = 'a\nb'"])
def test_what_is_not_toml(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(data)
    with pytest.raises(ConfigError, match=r"a.toml: not a TOML file") as caught:
        Settings.read(tmp_path / "a.toml", {})
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.toml"):
        with pytest.raises(ConfigError, match=f"{path}: cannot be read: "):
            Settings.read(path, {})


def test_parts_are_built_on_demand() -> None:
    rules, schedules, codecs, down, engine, privacy, attack = Settings.read(None, CHANGED).parts()
    assert [str(p) for p in (*rules, *schedules, *codecs, down)] == [
        "FedAvg(lr=0.2)",
        "Scaffold",
        "synchronous(cohort=5)",
        "fedbuff(buffer=2, cohort=5)",
        "topk(fraction=0.2)",
        "feedback(codec=topk | sign)",
        "cast",
    ]
    assert engine.path == "loop"
    assert [str(p) for p in privacy] == ["differential(clip=0.5, noise=2.0)", "secure"]
    assert str(attack) == "alie(share=0.3)"


def test_one_text_may_hold_both_kinds_of_privacy() -> None:
    both = Settings.read(None, {"privacy": "differential(clip=0.5, noise=2.0), secure"})
    assert both == Settings(privacy=("differential(clip=0.5, noise=2.0)", "secure"))
    assert Settings.read(None, {"privacy": ["differential(clip=0.5, noise=2.0), secure"]}) == both
    assert Settings.read(None, {"privacy": ""}) == Settings.read(None, {"privacy": [""]}) == Settings()
    for text, message in (("secure(", "cannot read"), ("sicher", "unknown name 'sicher'"), ("secure(bits=16)", "32 or 64")):
        with pytest.raises(ConfigError, match=f"privacy.*{message}|{message}"):
            Settings.read(None, {"privacy": text}).parts()


def test_the_split_has_a_seed_of_its_own() -> None:
    assert Settings().federation(3).seed == 3
    assert Settings(split_seed=8).federation(3).seed == 8


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device: '{device}' is not allowed"):
        Settings(device=device).federation(0)


def test_no_attack_has_a_name() -> None:
    assert Settings.read(None, {"attack": "none"}).attack is None
