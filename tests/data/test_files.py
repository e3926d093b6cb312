import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hanse.core.errors import ConfigError, DataError, MissingExtraError
from hanse.core.streams import Streams
from hanse.data import files
from hanse.data.files import hub, images, table, texts
from hanse.data.partition import natural
from hanse.data.task import Task

STREAMS = Streams(0)


def write_npz(file: Path, **arrays) -> str:
    np.savez(file, **arrays)
    return str(file)


def write(file: Path, text: str | bytes) -> str:
    raw = text.encode() if isinstance(text, str) else text
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    return str(file)


def idx(values: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def runs(task: Task) -> None:
    """The model accepts the data, and the loss and metrics their outcome."""
    data = task.data(STREAMS)
    data.check()
    model = task.model()
    for x, y in ((data.x[:4], data.y[:4]), (data.test_x[:2], data.test_y[:2])):
        output = model(x)
        assert task.loss(output, y).shape == (len(x),)
        assert all(metric(output, y).shape == (len(x),) for metric in task.metrics.values())


# ---- where files are looked for


def test_a_relative_path_is_looked_for_here_and_then_in_hanse_data(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("HANSE_DATA", raising=False)
    write(there / "a.txt", "there")
    with pytest.raises(DataError, match=rf"{here}/a.txt.*HANSE_DATA"):
        files.find("a.txt")
    monkeypatch.setenv("HANSE_DATA", str(there))
    assert files.find("a.txt").file == there / "a.txt"
    write(here / "a.txt", "here")
    assert files.find("a.txt").file == here / "a.txt"
    with pytest.raises(DataError, match=rf"{here}/b.txt or {there}/b.txt"):
        files.find("b.txt")


def test_a_changed_file_is_read_again(tmp_path):
    file = tmp_path / "t.csv"
    write(file, "a,y\n" + "1,0\n2,1\n" * 5)
    assert len(table(str(file), "y").data(STREAMS).names) == 2
    write(file, "a,y\n" + "1,0\n2,1\n3,2\n" * 5)
    assert len(table(str(file), "y").data(STREAMS).names) == 3


# ---- pictures


def made_pictures(*shape: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.integers(0, 201, (20, *shape)).astype(np.uint8), "y": np.arange(20) % 3}


@pytest.mark.parametrize(
    ("stored", "read"),
    [((6, 8), (1, 6, 8)), ((6, 8, 3), (3, 6, 8)), ((6, 8, 1), (1, 6, 8)), ((3, 6, 8), (3, 6, 8)), ((48,), (48,))],
)
def test_pictures_are_brought_into_one_order(tmp_path, stored, read):
    arrays = made_pictures(*stored)
    path = write_npz(tmp_path / "a.npz", **arrays)
    task = images(path, network="mlp" if len(stored) == 1 else "cnn")
    runs(task)
    data = task.data(STREAMS)
    assert data.x.shape == (16, *read) and data.test_x.shape == (4, *read) and data.names == ("0", "1", "2")
    both = torch.cat([data.x, data.test_x])
    assert float(both.min()) >= 0 and float(both.max()) == 1
    assert float(both.double().sum()) == pytest.approx(arrays["x"].astype(float).sum() / arrays["x"].max())


def test_channels_last_pictures_keep_their_pixels(tmp_path):
    arrays = made_pictures(4, 5, 3)
    arrays["x"][...] = np.arange(3) + 1
    data = images(write_npz(tmp_path / "a.npz", **arrays)).data(STREAMS)
    assert torch.allclose(data.x[0].mean((1, 2)), torch.tensor([1 / 3, 2 / 3, 1]))


def test_the_test_file_is_scaled_like_the_training_file(tmp_path):
    x = np.full((4, 5, 5), 200, np.uint8)
    train = write_npz(tmp_path / "train.npz", x=x, y=np.array([0, 1, 0, 1]))
    test = write_npz(tmp_path / "test.npz", x=x // 2, y=np.array([0, 1, 0, 1]))
    data = images(train, test=test, network="mlp").data(STREAMS)
    assert len(data.x) == 4 and float(data.x.max()) == 1 and float(data.test_x.max()) == 0.5


def test_real_pixels_are_left_as_they_are(tmp_path):
    x = np.random.default_rng(0).normal(size=(10, 4, 4)).astype(np.float32)
    data = images(write_npz(tmp_path / "a.npz", x=x, y=np.zeros(10, int))).data(STREAMS)
    assert sorted(torch.cat([data.x, data.test_x]).flatten().tolist()) == sorted(x.flatten().tolist())


def test_names_of_arrays_and_owners(tmp_path):
    arrays = made_pictures(6, 8)
    path = write_npz(tmp_path / "a.npz", pic=arrays["x"], cls=arrays["y"], who=np.array(["b", "a", "c", "a"] * 5))
    task = images(path, pixels="pic", label="cls", owner="who")
    data = task.data(STREAMS)
    assert data.owner_names == ("a", "b", "c") and len(data.owner) == len(data.x)
    split = natural(test=0).split(data, 3, STREAMS)
    assert split.train.counts().tolist() == torch.bincount(data.owner).tolist()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_format_of_mnist(tmp_path, suffix):
    arrays = made_pictures(6, 8)
    path = write(tmp_path / f"train-images-idx3-ubyte{suffix}", idx(arrays["x"]))
    write(tmp_path / f"train-labels-idx1-ubyte{suffix}", idx(arrays["y"]))
    same = images(write_npz(tmp_path / "a.npz", **arrays))
    task = images(path)
    runs(task)
    assert torch.equal(task.data(STREAMS).x, same.data(STREAMS).x) and torch.equal(task.data(STREAMS).y, same.data(STREAMS).y)
    with pytest.raises(ConfigError, match="an idx file has no owners"):
        images(path, owner="writer").data(STREAMS)


BAD_ARRAYS = [
    ({"x": np.zeros((3, 4, 4))}, r"no array 'y' \(label\); it holds x"),
    ({"x": np.zeros((3, 4, 4)), "y": np.zeros(2, int)}, r"labels of type int64 and shape \(2,\).*3 whole numbers"),
    ({"x": np.zeros((3, 4, 4)), "y": np.zeros(3)}, "labels of type float64"),
    ({"x": np.zeros((3, 4, 4)), "y": np.array([0, -2, 1])}, "label -2 in row 1 is not allowed: 0 or more"),
    ({"x": np.full((3, 4, 4), np.nan), "y": np.zeros(3, int)}, "a pixel is not finite"),
    ({"x": np.zeros(3), "y": np.zeros(3, int)}, r"shape \(3,\)"),
    ({"x": np.zeros((0, 4, 4)), "y": np.zeros(0, int)}, r"shape \(0, 4, 4\)"),
    ({"x": np.array([["a"]]), "y": np.zeros(1, int)}, "pictures of type <U1"),
    ({"x": np.zeros((1, 4, 4)), "y": np.zeros(1, int)}, "1 samples are too few"),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS)
def test_arrays_that_are_no_pictures(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        images(write_npz(tmp_path / "bad.npz", **arrays)).data(STREAMS)


def test_test_pictures_that_do_not_fit(tmp_path):
    train = write_npz(tmp_path / "train.npz", **made_pictures(6, 8))
    other = write_npz(tmp_path / "other.npz", **made_pictures(8, 6))
    more = write_npz(tmp_path / "more.npz", x=np.zeros((4, 6, 8)), y=np.arange(4))
    with pytest.raises(DataError, match=r"other.npz: pictures of shape \(1, 8, 6\) do not fit"):
        images(train, test=other).data(STREAMS)
    with pytest.raises(DataError, match=r"more.npz: label 3 is not allowed: 0 to 2"):
        images(train, test=more).data(STREAMS)


def test_pictures_too_small_for_the_cnn(tmp_path):
    for shape in ((3, 8), (48,)):
        with pytest.raises(ConfigError, match="network: 'cnn' is not allowed"):
            images(write_npz(tmp_path / "a.npz", **made_pictures(*shape))).model()


def test_damaged_archives_are_refused_and_never_unpickled(tmp_path):
    whole = Path(write_npz(tmp_path / "a.npz", **made_pictures(30, 30))).read_bytes()
    np.savez_compressed(tmp_path / "c.npz", **made_pictures(30, 30))
    packed = bytearray((tmp_path / "c.npz").read_bytes())
    packed[200:260] = bytes(60)
    cases = {"cut.npz": whole[: len(whole) // 2], "text.npz": b"hello", "empty.npz": b"", "flipped.npz": bytes(packed)}
    for name, raw in cases.items():
        with pytest.raises(DataError, match=name):
            images(write(tmp_path / name, raw)).data(STREAMS)
    pickled = np.empty(3, object)
    pickled[:] = [{}, {}, {}]
    with pytest.raises(DataError, match=r"o.npz.*allow_pickle=False"):
        images(write_npz(tmp_path / "o.npz", x=pickled, y=np.zeros(3, int))).data(STREAMS)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (idx(np.zeros((3, 4, 4)))[:-1], r"47 numbers do not fill the shape \[3, 4, 4\]"),
        (b"\0\0\x0d\x01" + bytes(8), "begins with '00000d01'"),
        (b"", "not an idx file"),
        (b"\0\0\x08\x03\0\0", "do not fill"),
    ],
)
def test_damaged_idx_files(tmp_path, raw, message):
    write(tmp_path / "a-labels-idx1-ubyte", idx(np.zeros(3)))
    with pytest.raises(DataError, match=f"a-images-idx3-ubyte.*{message}"):
        images(write(tmp_path / "a-images-idx3-ubyte", raw)).data(STREAMS)


def test_an_idx_file_without_its_labels(tmp_path):
    with pytest.raises(DataError, match=r"no file .*a-labels-idx1-ubyte"):
        images(write(tmp_path / "a-images-idx3-ubyte", idx(np.zeros((3, 4, 4))))).data(STREAMS)


# ---- tables

PATIENTS = "age,colour,weight,ill\n" + "".join(
    f"{20 + i},{'red' if i % 2 else 'blue'},{'?' if i % 5 == 0 else 3 * i},{'yes' if i % 3 == 0 else 'no'}\n" for i in range(40)
)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_columns_become_features(tmp_path, name):
    task = table(write(tmp_path / name, PATIENTS), "ill")
    runs(task)
    data = task.data(STREAMS)
    assert data.names == ("no", "yes") and data.x.shape == (32, 5)  # age; blue, red; weight, weight missing
    assert data.x[:, 0].mean().abs() < 1e-6 and float(data.x[:, 0].std(correction=0)) == pytest.approx(1)
    assert torch.equal(data.x[:, 1:3].sum(1), torch.ones(32)) and set(data.x[:, 1].tolist()) == {0.0, 1.0}
    missing = data.x[:, 4] == 1
    assert 0 < missing.sum() <= 8 and (data.x[missing, 3] == 0).all()
    present = data.x[~missing, 3]
    assert present.mean().abs() < 1e-6 and float(present.std(correction=0)) == pytest.approx(1)


def test_test_rows_do_not_leak_into_the_scale(tmp_path):
    path = tmp_path / "t.csv"
    before = table(write(path, "a,y\n" + "".join(f"{i},{i % 2}\n" for i in range(50))), "y").data(STREAMS)
    held, _ = files.holdout(50, 0.2, STREAMS)
    outlier = {int(held[0]): 1e9}
    after = table(write(path, "a,y\n" + "".join(f"{outlier.get(i, i)},{i % 2}\n" for i in range(50))), "y").data(STREAMS)
    assert torch.equal(before.x, after.x) and after.test_x.max() > 1e6


def test_a_column_can_own_the_rows(tmp_path):
    data = table(write(tmp_path / "t.csv", PATIENTS), "ill", owner="colour", drop=("weight",)).data(STREAMS)
    assert data.owner_names == ("blue", "red") and data.x.shape == (32, 1)
    whole = table(write(tmp_path / "u.csv", PATIENTS), "ill", owner="ill").data(STREAMS)
    assert torch.equal(whole.owner, whole.y) and whole.x.shape == (32, 5)


BAD_TABLES = [
    ("a,b\n1,2\n", {}, r"no column 'y' \(label\); the columns are a, b"),
    ("a,y\n1,2\n", {"owner": "z"}, r"no column 'z' \(owner\)"),
    ("a,y\n1,2\n", {"drop": ("z",)}, r"no column 'z' \(drop\)"),
    ("a,y\n1,0\n1\n", {}, r"t.csv:3: 1 values, expected 2"),
    ("a,y\n1,0\n1,2,3\n", {}, r"t.csv:3: 3 values, expected 2"),
    ('a,y\n1,0\n"1"x,0\n', {}, r"t.csv:3: "),
    ("a,y\n1,0\n1,?\n", {}, "row 2 below the header has no y"),
    ("a,y\n", {}, "no row below the header"),
    ("", {}, "no column 'y'"),
    ("a,a,y\n1,2,0\n", {}, "two columns have the same name"),
    ("y\n1\n0\n", {}, "no column is left"),
    ("a,y\n1e999,0\n1,1\n", {}, "column 'a' holds an infinite number"),
    ("a,y\n1,0\n", {}, "1 samples are too few"),
    (b"a,y\n\xff,0\n", {}, "t.csv: cannot be read: 'utf-8'"),
    ("name,y\n" + "".join(f"n{i},0\n" for i in range(1200)), {}, "column 'name' has more than 1000 values"),
]


@pytest.mark.parametrize(("text", "options", "message"), BAD_TABLES)
def test_malformed_tables(tmp_path, text, options, message):
    with pytest.raises(DataError, match=message):
        table(write(tmp_path / "t.csv", text), "y", **options).data(STREAMS)


def test_a_gzip_file_cut_short(tmp_path):
    packed = gzip.compress(PATIENTS.encode())
    file = tmp_path / "t.csv.gz"
    for raw in (packed[: len(packed) // 2], PATIENTS.encode(), b""):
        file.write_bytes(raw)
        with pytest.raises(DataError, match=r"t.csv.gz"):
            table(str(file), "ill").data(STREAMS)


# ---- texts


def test_plain_text_is_cut_into_windows(tmp_path):
    text = bytes(range(1, 101))
    task = texts(write(tmp_path / "a.txt", text), length=9)
    runs(task)
    data = task.data(STREAMS)
    assert len(data.x) + len(data.test_x) == 11
    seen = sorted(torch.cat([data.x, data.test_x])[:, 0].tolist())
    assert seen == list(range(1, 100, 9))
    assert torch.equal(data.y, data.x + 1)


def test_jsonl_owners_are_natural_clients(tmp_path):
    lines = [{"who": name, "text": name * 30} for name in "bacab"] + [{"who": "short", "text": "x"}]
    path = write(tmp_path / "a.jsonl.gz", "".join(json.dumps(line) + "\n" for line in lines))
    task = texts(path, owner="who", length=5)
    runs(task)
    data = task.data(STREAMS)
    assert data.owner_names == ("a", "b", "c")  # too little text of "short"
    split = natural(test=0).split(data, 3, STREAMS)
    for client, name in enumerate("abc"):
        assert set(split.train.of(client)[0].flatten().tolist()) <= {ord(name), ord("\n")}
    whole = texts(path, length=5).data(STREAMS)
    assert whole.names == ("text",) and len(whole.x) + len(whole.test_x) == (5 * 30 + 1 + 5 - 1) // 5


def test_a_test_text(tmp_path):
    train, test = write(tmp_path / "a.txt", "a" * 50), write(tmp_path / "b.txt", "b" * 50)
    data = texts(train, test=test, length=7).data(STREAMS)
    assert set(data.x.flatten().tolist()) == {ord("a")} and set(data.test_y.flatten().tolist()) == {ord("b")}


BAD_TEXTS = [
    ("a.jsonl", "", {}, "a.jsonl: too little text"),
    ("a.jsonl", '{"text": "x"}\n{"text": \n', {}, r"a.jsonl:2: not JSON"),
    ("a.jsonl", '{"text": "x"}\n[1]\n', {}, r"a.jsonl:2: expected an object, got "),
    ("a.jsonl", '{"text": 3}\n', {}, r"a.jsonl:1: expected an object"),
    ("a.jsonl", '{"text": "x"}\n', {"owner": "who"}, r"a.jsonl:1: .* fields text, who"),
    ("a.jsonl", "[" * 100_000, {}, r"a.jsonl:1: "),
    ("a.jsonl", b'{"text": "\xff"}', {}, r"a.jsonl:1: not JSON"),
    ("a.txt", "short", {}, r"a.txt: too little text: no source has the 65 bytes"),
]


@pytest.mark.parametrize(("name", "raw", "options", "message"), BAD_TEXTS)
def test_malformed_texts(tmp_path, name, raw, options, message):
    with pytest.raises(DataError, match=message):
        texts(write(tmp_path / name, raw), **options).data(STREAMS)


def test_a_plain_text_has_no_fields(tmp_path):
    with pytest.raises(ConfigError, match=r"texts.owner: 'who' is not allowed"):
        texts(write(tmp_path / "a.txt", "x" * 200), owner="who").data(STREAMS)


# ---- Hugging Face


def test_hub_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"hub needs the extra 'datasets': pip install 'hanse\[datasets\]'"):
        hub("mnist", "image", label="label").data(STREAMS)


def test_hub_reads_texts_of_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", "".join(json.dumps({"who": w, "t": w * 40}) + "\n" for w in "abba"))
    task = hub(str(folder), "t", owner="who", length=8)
    runs(task)
    assert task.data(STREAMS).owner_names == ("a", "b")
    with pytest.raises(DataError, match="no column 'x'; it has who, t"):
        hub(str(folder), "x").data(STREAMS)
    with pytest.raises(DataError, match="cannot be loaded"):
        hub(str(folder), "t", split="nothing").data(STREAMS)


def test_hub_reads_pictures_of_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    arrays = made_pictures(6, 8)
    rows = [{"image": x.tolist(), "label": int(y), "who": int(y) % 2} for x, y in zip(arrays["x"], arrays["y"], strict=True)]
    write(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    task = hub(str(folder), "image", label="label", owner="who")
    runs(task)
    same = images(write_npz(tmp_path / "a.npz", **arrays)).data(STREAMS)
    assert torch.equal(task.data(STREAMS).x, same.x) and torch.equal(task.data(STREAMS).y, same.y)


# ---- real data


def test_mnist_by_writer(real_data):
    task = images(real_data("mnist/train.npz"), test=real_data("mnist/test.npz"), owner="writer")
    data = task.data(STREAMS)
    assert data.x.shape == (60_000, 1, 28, 28) and data.test_x.shape == (7394, 1, 28, 28) and len(data.owner_names) == 539
    assert float(data.x[0].max()) == 1
    split = natural().split(data, 100, STREAMS)
    assert split.train.index is not None and split.train.counts().min() > 50  # the hundred busiest writers, not copied
    model = task.model()
    assert model(data.x[:2]).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "shape"), [("usps/usps_test.npz", (2007, 16, 16)), ("optdigits/optdigits_test.npz", (1797, 8, 8))]
)
def test_digit_domains(real_data, name, shape):
    data = images(real_data(name)).data(STREAMS)
    assert len(data.x) + len(data.test_x) == shape[0] and data.x.shape[1:] == (1, *shape[1:])
    assert data.x.max() == 1 and data.names == tuple("0123456789")
    centres = torch.stack([data.x[data.y == c].flatten(1).mean(0) for c in range(10)])
    nearest = torch.cdist(data.test_x.flatten(1), centres).argmin(1)
    assert (nearest == data.test_y).double().mean() > 0.75


def test_hospitals(real_data):
    data = table(real_data("heart_disease/heart_disease.csv.gz"), "disease", owner="hospital").data(STREAMS)
    assert data.owner_names == ("cleveland", "hungarian", "switzerland", "va_long_beach")
    split = natural().split(data, 4, STREAMS)
    ill = split.groups[:, 1] / split.groups.sum(1)
    assert ill.argmax() == 2 and ill[2] > 0.85  # 115 of 123 in Switzerland


def test_census(real_data):
    path = real_data("adult/adult.csv.gz")
    task = table(path, "income_above_50k", owner="occupation")
    runs(task)
    data = task.data(STREAMS)
    assert len(data.x) + len(data.test_x) == 32_561 and int(data.y.sum() + data.test_y.sum()) == 7841
    with gzip.open(path, "rt") as stream:
        jobs = {row["occupation"] for row in csv.DictReader(io.StringIO(stream.read()))}
    assert data.owner_names == tuple(sorted(jobs))


def test_roles(real_data):
    data = texts(real_data("shakespeare/tinyshakespeare_roles.jsonl.gz"), owner="role").data(STREAMS)
    split = natural().split(data, 100, STREAMS)
    assert split.train.counts().min() >= 10
    assert "\nKing" not in bytes(split.train.of(0)[0][0].tolist()).decode()


def test_importing_the_data_half_stays_light():
    code = "import sys, hanse.data; print([m for m in ('sklearn', 'datasets', 'matplotlib', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
