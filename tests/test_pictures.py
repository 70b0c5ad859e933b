"""Own pictures: layouts, kinds of files, tables of labels, the split, and that all commands see the same pixels.

Tables are those that LibreOffice Calc 7.4 saved (tests/tables), photographs those of scikit-learn and, where it is
installed, scikit-image. Run: pytest tests/test_pictures.py
"""

import csv
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from commands import predict
from dataset import Batches, balanced
from distributed import Ranks
from images.cache_files import caches
from images.check import _sizes, check
from images.decode import Rules, decode, try_decode
from images.folders import find_image_set, part_of
from images.labels import find_labelled, list_images
from images.opening import Opening, open_data_set
from images.split import read_split, some_of_each
from images.tables import read_table
from transforms import Preprocess
from utils import UserError

TABLES = Path(__file__).parent / "tables"
CPU = torch.device("cpu")


def classes(root, names=("cat", "dog"), count=10, first=0, size=(12, 10)):
    for label, name in enumerate(names):
        for index in range(count):
            tiny.save_noise(root / name / f"{index:03}.png", first + 1000 * label + index, size)
    return root


def opened(root, size=16, **options):
    return open_data_set(root, image_size=size, seed=options.pop("seed", 42), opening=Opening(workers=1), **options)


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def names(subset, root):
    return {path.relative_to(root).as_posix() for path in subset.paths}


# -------------------------------------------------------------------------------------- layouts
NAMES_OF_PARTS = {
    "train": ("train", "training", "Train", "Training set", "train_images"),
    "validation": ("val", "valid", "validation", "Valid", "val-set"),
    "test": ("test", "testing", "eval", "TEST_DATA", "seg_test"),
    None: ("trains", "data", "set", "images", "attest", "cat", ""),
}


def test_parts_by_any_usual_name():
    assert {name: part_of(name) for names in NAMES_OF_PARTS.values() for name in names} == {
        name: part for part, names in NAMES_OF_PARTS.items() for name in names
    }


@pytest.mark.parametrize("inner", [".", "pets", "train"])
def test_one_folder_of_class_folders_is_split_in_three(tmp_path, inner):
    root = tmp_path / "pets"
    classes(root / inner, names=("cat", "dog", "emu"), count=20)
    data = opened(root)
    assert [len(data.subsets[name]) for name in ("train", "validation", "test")] == [42, 9, 9]
    assert all(np.bincount(subset.labels).tolist() == [len(subset) // 3] * 3 for subset in data.subsets.values())
    assert len({path for subset in data.subsets.values() for path in subset.paths}) == 60
    other = opened(root, seed=7)
    assert names(other.test, root) == names(data.test, root)  # runs of any seed can be compared
    assert names(other.validation, root) != names(data.validation, root)
    shares = opened(root, split="50,25,25")
    assert [len(shares.subsets[name]) for name in ("train", "validation", "test")] == [30, 15, 15]


def test_two_folders_for_one_part_are_refused(tmp_path):
    for name in ("train", "Training", "test"):
        classes(tmp_path / name, count=2)
    with pytest.raises(UserError, match="both (Training and train|train and Training) could hold the train images"):
        find_image_set(tmp_path)


def test_what_does_not_fit_is_listed_with_what_it_would_be(tmp_path):
    classes(tmp_path / "photos" / "2024", count=3)
    tiny.save_noise(tmp_path / "loose.png")
    (tmp_path / "labels.csv").write_text("a,b\n")
    with pytest.raises(UserError) as refused:
        find_image_set(tmp_path)
    text = str(refused.value)
    assert "photos/: 6 images in 1 folder, would be no part and no class" in text
    assert "--labels labels.csv" not in text and "labels.csv: a table of labels?" in text
    assert "1 image without a class folder" in text and "Three ways" in text
    for name in ("train", "test"):
        tiny.save_noise(tmp_path / "flat" / name / "1.png")
    with pytest.raises(UserError, match=r"train/: 1 image in 0 folders"):
        find_image_set(tmp_path / "flat")


def test_a_class_called_train_is_a_class(tmp_path):
    assert find_image_set(classes(tmp_path, names=("bus", "car", "train"))).classes == ["bus", "car", "train"]


def test_classes_absent_from_a_part_are_said(tmp_path, caplog):
    caplog.set_level("INFO", "amp-train")
    classes(tmp_path / "train", names=("cat", "dog", "emu"), count=10)
    classes(tmp_path / "test", names=("cat", "dog"), count=3)
    data = opened(tmp_path)
    assert np.bincount(data.test.labels, minlength=3).tolist() == [3, 3, 0]
    assert any("no test image of emu: tested with support 0" in text for text in caplog.messages)


# -------------------------------------------------------------------------------- kinds of files


def test_a_shape_that_is_only_opacity_is_seen(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6, 3] = 255
    for colour in (0, 128):
        pixels[..., :3] = colour
        Image.fromarray(pixels).save(tmp_path / "drawing.png")
        assert sorted(np.unique(decode(tmp_path / "drawing.png"))) == [colour, 255]


def deep(root, values, kind):
    for name in ("cat", "dog"):
        for index in range(6):
            path = root / name / f"{index}.{'png' if kind == np.uint16 else 'tif'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn = np.random.default_rng(index + len(name)).permutation(values).reshape(16, -1)
            Image.fromarray(drawn.astype(kind)).save(path)
    return root


@pytest.mark.parametrize(
    "values, kind, mode",
    [
        (np.linspace(0, 4095, 4096), np.uint16, "I;16"),  # a 12-bit X-ray
        (np.linspace(-1000, 2000, 4096), np.int32, "I"),  # a slice of a CT in Hounsfield units
        (np.linspace(-1, 1, 4096), np.float32, "F"),
    ],
)
def test_deep_grey_pictures_keep_their_levels(tmp_path, values, kind, mode):
    root = deep(tmp_path, values, kind)
    data = open_data_set(root, image_size=256, seed=1, opening=Opening(workers=1, own_window=True))
    assert data.rules.windows == {mode: pytest.approx((values.min(), values.max()))}
    array = data.train.store.array
    assert len(np.unique(array[0])) >= 250 and array.min() == 0 and array.max() == 255
    assert np.array_equal(decode(data.test.paths[0], 256, data.rules), data.test.store.array[data.test.positions[0]])
    report = check(root)
    assert report["windows"] == {mode: [values.min(), pytest.approx(values.max())]} and report["flat"] == []
    narrow = Rules(windows={mode: (values.min() - 2, values.min() - 1)})
    assert len(check(root, rules=narrow)["flat"]) == 12  # named, before a training learns nothing


def test_a_window_holds_for_training_evaluation_and_prediction(tmp_path, run):
    root = deep(tmp_path / "data", np.linspace(0, 4095, 4096), np.uint16)
    runs = tmp_path / "runs"
    assert tiny.train(root, runs, "--window=100,3000", "--split=50,25,25", "--image_size=64") == 0
    config = tiny.config(runs / "run")
    assert config["dataset"]["windows"]["I;16"] == [100.0, 3000.0]
    assert torch.load(runs / "run" / "best_model.pt", weights_only=True)["windows"]["I;16"] == [100.0, 3000.0]
    tested = {row["path"]: row for row in rows_of(runs / "run" / "predictions.csv")}
    given = [f"--checkpoint_dir={runs}", "--checkpoint_name=run", f"--csv={tmp_path / 'out.csv'}"]
    status, _, err = run(["predict", root, *given])
    assert status == 0, err
    found = {Path(row["path"]).relative_to(root).as_posix(): row for row in rows_of(tmp_path / "out.csv")}
    for path, row in tested.items():
        assert float(found[path]["cat"]) == pytest.approx(float(row["cat"]), abs=1e-5)


# ------------------------------------------------------------- the same pixels, whatever stands beside
@pytest.mark.parametrize("sizes, cache", [([(16, 16), (128, 128)], "memory"), ([(30, 12), (64, 64), (70, 20)], "none")])
def test_evaluation_sees_of_a_file_what_prediction_sees(tmp_path, sizes, cache):
    root = tmp_path / "data"
    for number in range(12):
        tiny.save_noise(
            root / "test" / ("cat", "dog")[number % 2] / f"{number}.png", number, sizes[number % len(sizes)]
        )
        tiny.save_noise(root / "train" / ("cat", "dog")[number % 2] / f"{number}.png", 100 + number, sizes[0])
    data = open_data_set(root, image_size=64, seed=1, opening=Opening(cache, 1))
    preprocess = Preprocess(CPU, 64)
    tested = Batches(data.test, preprocess, 7, 2).evaluation()
    pixels = torch.cat([images for images, *_ in tested])
    for path, seen in zip(data.test.paths, pixels, strict=True):
        alone = preprocess(*predict._boxed([decode(path, 64)], CPU))
        assert torch.equal(alone[0], seen)
    together = preprocess(*predict._boxed([decode(path, 64) for path in data.test.paths], CPU))
    assert torch.equal(together, pixels)


def test_validation_sees_no_larger_picture_than_the_test(tmp_path):
    """Random crops choose from larger pictures; what is validated is read as what is tested."""
    root = classes(tmp_path, count=10, size=(90, 80))
    data = opened(root, 32, keep_larger=True)
    assert data.train.store.array.shape[1:3] == (48, 48)
    for subset in (data.validation, data.test):
        expected = [decode(path, 32) for path in subset.paths]
        assert np.array_equal(subset.store.array[subset.positions], expected)


@pytest.mark.parametrize("kind", ["trivial", "crop"])
def test_pictures_of_several_sizes_train(tmp_path, kind):
    root = tmp_path
    for number in range(24):
        tiny.save_noise(
            root / ("cat", "dog")[number % 2] / f"{number}.png", number, [(16, 20), (60, 30), (100, 90)][number % 3]
        )
    data = opened(root, 32, keep_larger=kind == "crop")
    batches = Batches(data.train, Preprocess(CPU, 32), 5, 2, augment=kind)
    for images, *_ in (piece for pieces in batches.epoch(0) for piece in pieces):
        assert images.shape[1:] == (3, 32, 32) and images.isfinite().all() and images.std() > 0.3


# -------------------------------------------------------------------------------------- the split
def test_equal_pictures_are_on_one_side(tmp_path, caplog):
    caplog.set_level("INFO", "amp-train")
    root = classes(tmp_path, count=30)
    for index in range(10):
        shutil.copy(root / "cat" / f"{index:03}.png", root / "cat" / f"copy{index}.png")
        with Image.open(root / "dog" / f"{index:03}.png") as image:
            image.save(root / "dog" / f"again{index}.tif")  # other bytes, the same picture
    for seed in range(3):
        data = opened(root, seed=seed)
        sides = {path.stem: name for name, subset in data.subsets.items() for path in subset.paths}
        by_path = {f"{p.parent.name}/{p.stem}": n for n, subset in data.subsets.items() for p in subset.paths}
        assert len(by_path) == 80 and sides
        for index in range(10):
            assert by_path[f"cat/copy{index}"] == by_path[f"cat/{index:03}"]
            assert by_path[f"dog/again{index}"] == by_path[f"dog/{index:03}"]
    assert any("20 images are copies of others" in text for text in caplog.messages)


def test_a_test_picture_that_is_trained_on_is_a_warning(tmp_path, caplog):
    for part in ("train", "test"):
        classes(tmp_path / part, count=6, first=10_000 * len(part))
    shutil.copy(tmp_path / "train" / "cat" / "000.png", tmp_path / "test" / "cat" / "leak.png")
    opened(tmp_path)
    assert any("1 test image is also a training image" in text and "leak.png" in text for text in caplog.messages)


def test_groups_stay_together(tmp_path):
    for number in range(60):
        tiny.save_noise(tmp_path / ("cat", "dog")[number % 2] / f"patient{number // 6:02}_{number}.png", number)
    data = opened(tmp_path, group=r"patient(\d+)")
    sides = {}
    for name, subset in data.subsets.items():
        assert set(subset.labels) == {0, 1}
        for path in subset.paths:
            assert sides.setdefault(path.name[:9], name) == name
    assert len(sides) == 10
    with pytest.raises(UserError, match="fits no file name, such as"):
        opened(tmp_path, group="video")
    with pytest.raises(UserError, match="nor a regular expression"):
        opened(tmp_path, group="(")


# ------------------------------------------------------------------------------ labels in a table
FRUIT = ["Apfel", "Birne, reif", "Äpfel", "Birne, reif"]


def fruit(root):
    for number in range(1, 5):
        tiny.save_noise(root / "bilder" / f"{number:04}.jpg", number)
    return root


@pytest.mark.parametrize("name", ["semicolon", "utf16_tab", "windows", "quoted"])
def test_tables_as_a_spreadsheet_saves_them(tmp_path, name):
    found = find_labelled(fruit(tmp_path), TABLES / f"{name}.csv", group="Gruppe")
    assert found.classes == sorted(set(FRUIT))
    assert [found.classes[label] for _, label in found.train] == FRUIT
    assert [path.name for path, _ in found.train] == ["0001.jpg", "0002.jpg", "0003.jpg", "0004.jpg"]
    assert sorted(found.groups.values()) == ["p1", "p1", "p2", "p2"]


def test_numbers_that_lost_their_zeros_are_found_and_sorted_as_numbers(tmp_path):
    found = find_labelled(fruit(tmp_path), TABLES / "lost_zeros.csv")
    assert found.classes == ["2", "3", "11"] and [label for _, label in found.train] == [1, 2, 1, 0]


EXCEL = [
    b"\xef\xbb\xbfid;label\r\n0001;a\r\n0002;b\r\n0003;a\r\n0004;b\r\n",  # CSV UTF-8, in a country of semicolons
    "\ufeffid\tlabel\r\n0001\ta\r\n0002\tb\r\n0003\ta\r\n0004\tb\r\n".encode("utf-16-le"),  # Unicode text
    b"sep=,\r\nid,label\r\n0001,a\r\n0002,b\r\n0003,a\r\n0004,b\r\n",
    b"bilder\\0001.jpg,a\r\nbilder\\0002.jpg,b\r\nbilder\\0003.JPG,a\r\nbilder\\0004.jpg,b",  # Windows paths, no header
    b"0001.jpg,a,p1\n0002.jpg,b,p2\n0003.jpg,a,p3\n0004.jpg,b,p4\n",
    b"label,file,width\na,0001.jpg,12\nb,0002.jpg,12\na,0003.jpg,12\nb,0004.jpg,12\n\n ,,\n",
    b'Image,Id\n"0001.jpg","a"\n"0002.jpg","b"\n"0003.jpg","a"\n"0004.jpg","b"\n',  # Id is the label
]


@pytest.mark.parametrize("content", EXCEL, ids=range(len(EXCEL)))
def test_tables_in_the_forms_of_excel_and_kaggle(tmp_path, content):
    fruit(tmp_path)
    (tmp_path / "labels.csv").write_bytes(content)
    found = find_labelled(tmp_path, "labels.csv")
    assert found.classes == ["a", "b"] and [label for _, label in found.train] == [0, 1, 0, 1]


def test_kaggles_table_beside_its_folders(tmp_path, caplog):
    caplog.set_level("INFO", "amp-train")
    for number in range(40):
        tiny.save_noise(tmp_path / "train" / f"{number:x}f.jpg", number)
        tiny.save_noise(tmp_path / "test" / f"{number:x}e.jpg", 100 + number)
    rows = [f"{number:x}f,{('beagle', 'poodle')[number % 2]}" for number in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["id,breed", *rows, "gone,beagle"]))
    (tmp_path / "sample_submission.csv").write_text("id,beagle,poodle\n")
    data = opened(tmp_path, labels="train.csv")
    assert data.classes == ["beagle", "poodle"]
    assert [len(data.subsets[name]) for name in ("train", "validation", "test")] == [28, 6, 6]
    assert "train.csv: images from 'id', classes from 'breed'" in caplog.messages
    assert "1 row of train.csv names no image that is there, such as gone" in caplog.messages
    assert "40 images have no row in train.csv, such as test/0e.jpg: left out" in caplog.messages


def test_parts_and_groups_of_a_table(tmp_path):
    rows = []
    for number in range(30):
        tiny.save_noise(tmp_path / f"{number}.png", number)
        rows.append(f"{number}.png;{'ab'[number % 2]};{('Training', 'Training', 'TEST')[number % 3]};{number // 2}")
    (tmp_path / "t.csv").write_text("\n".join(["image;label;split;group", *rows]))
    data = opened(tmp_path, labels="t.csv")
    assert {int(path.stem) for path in data.test.paths} == set(range(2, 30, 3))
    assert len(data.train) + len(data.validation) == 20
    assert not {int(path.stem) // 2 for path in data.train.paths} & {int(p.stem) // 2 for p in data.validation.paths}


@pytest.mark.parametrize(
    "content, message",
    [
        ("id,label\n0001,a\n0001,b\n0002,b\n", "two labels: a and b"),
        ("id,label\n9991,a\n9992,b\n", "no cell names an image"),
        ("id,label\n0001,a\n0002,a\n", "labels one class, a: two are needed"),
        ("id,height,width\n0001,1,0\n0002,0,7\n", "which column is the label, of height, width.*t.csv:id,NAME"),
        ("id,healthy,rust\n0001,1,0\n0002,1,1\n", "'0002' several labels at once, healthy and rust .1 such row"),
        ("id,label,split\n0001,a,train\n0002,b,somewhere\n", "'somewhere' is not a part"),
        ("only\n0001\n", "at least two columns"),
        ("", "at least two columns"),
        (b"PK\x05\x06" + bytes(18), "save it as CSV"),
        (None, "cannot be read"),
    ],
)
def test_wrong_tables_are_named(tmp_path, content, message):
    fruit(tmp_path)
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        find_labelled(tmp_path, "t.csv")


def test_a_name_in_two_folders_needs_its_folder(tmp_path):
    for folder in ("a", "b"):
        for number in range(3):
            tiny.save_noise(tmp_path / folder / f"{number}.png", number)
    (tmp_path / "t.csv").write_text("file,label\n0.png,x\n1.png,y\n")
    with pytest.raises(UserError, match="may mean .*Name the folder, too"):
        find_labelled(tmp_path, "t.csv")
    (tmp_path / "t.csv").write_text("file,label\na/0.png,x\nb/0.png,y\n./a/1.png,y\n")
    assert [path.parent.name for path, _ in find_labelled(tmp_path, "t.csv").train] == ["a", "a", "b"]


def test_a_column_of_groups_or_a_pattern(tmp_path):
    fruit(tmp_path)
    (tmp_path / "t.csv").write_text("id,label,Patient ID\n0001,a,p\n0002,b,p\n0003,a,q\n0004,b,q\n")
    assert sorted(list_images(tmp_path, labels="t.csv", group="patient_id").groups.values()) == ["p", "p", "q", "q"]
    found = list_images(tmp_path, labels="t.csv", group=r"000(\d)")
    assert sorted(found.groups.values()) == ["1", "2", "3", "4"]
    assert read_table(tmp_path / "t.csv")[0] == ["id", "label", "Patient ID"]


# ------------------------------------------------------------------------------------- few and uneven
def test_a_balanced_epoch_holds_each_class_equally_often():
    labels = np.repeat([0, 1, 2], [40, 3, 17])
    order = np.random.default_rng(1).permutation(60)
    found = balanced(order, labels, 3)
    assert np.bincount(labels[found]).tolist() == [20, 20, 20]
    times = np.bincount(found, minlength=60)
    assert times[labels == 1].tolist() == [7, 7, 6] or sorted(times[labels == 1]) == [6, 7, 7]
    assert times[labels == 0].max() == 1  # of many, each at most once
    assert not np.array_equal(balanced(np.random.default_rng(2).permutation(60), labels, 3), found)
    assert len(set(labels[found[:10]])) == 3  # mixed, not class by class


def test_balanced_sampling_depends_on_position_and_is_shared_by_ranks(tmp_path):
    root = classes(tmp_path, names=("cat",), count=40)
    classes(tmp_path, names=("dog",), count=6, first=5000)
    data = opened(root)
    preprocess = Preprocess(CPU, 16)

    def labels(first=0, ranks=1):
        found = []
        for rank in range(ranks):
            batches = Batches(data.train, preprocess, 8, 2, seed=3, sampler="balanced", ranks=Ranks(rank, rank, ranks))
            found.append([[p[1].tolist() for p in pieces if p[2]] for pieces in batches.epoch(1, first)])
        return [sum((part for rank in found for part in rank[update]), []) for update in range(len(found[0]))]

    whole = labels()
    assert labels(first=2) == whole[2:] and labels(ranks=2) == whole
    counts = Counter(label for update in whole for label in update)
    assert abs(counts[0] - counts[1]) <= 1


# ------------------------------------------------------------------------------ by the command line
TINY = ["--image_size=16", "--batch_size=8", "--epochs=2"]


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Return a run on one folder of class folders: (data folder, folder of runs)."""
    folder = tmp_path_factory.mktemp("pets")
    root = classes(folder / "pets", names=("cat", "dog", "emu"), count=20)
    assert tiny.train(root, folder / "runs", *TINY, "--best_by=roc_auc", "--sampler=balanced", "--fraction=0.5") == 0
    return root, folder / "runs"


def evaluated(run, root, runs, *more):
    given = ["evaluate", f"--data_dir={root}", f"--checkpoint_dir={runs}", "--checkpoint_name=run"]
    status, out, err = run([*given, *more])
    assert status == 0, err
    return out


def test_a_run_writes_its_split_and_is_tested_on_it_when_files_are_added(pets, tmp_path, run):
    root, runs = pets
    rows = rows_of(runs / "run" / "split.csv")
    assert Counter(row["part"] for row in rows) == {"train": 21, "": 21, "validation": 9, "test": 9}
    assert all(row["path"].split("/")[0] == row["class"] for row in rows)
    lines = tiny.metrics(runs / "run")
    assert all(0 <= line["val_roc_auc"] <= 100 and "val_top5_acc" not in line for line in lines)
    grown = shutil.copytree(root, tmp_path / "pets")
    classes(grown, names=("cat", "dog", "emu"), count=24, first=0)
    shutil.rmtree(grown / ".cache", ignore_errors=True)
    out = evaluated(run, grown, runs, f"--csv={tmp_path / 'out.csv'}", f"--json={tmp_path / 'out.json'}")
    assert "tested: the 9 images of the test part in the run's split.csv" in out
    expected = {row["path"]: row for row in rows_of(runs / "run" / "predictions.csv")}
    found = {row["path"]: row for row in rows_of(tmp_path / "out.csv")}
    assert found.keys() == expected.keys() == {row["path"] for row in rows if row["part"] == "test"}
    for path, row in found.items():
        assert float(row["confidence"]) == pytest.approx(float(expected[path]["confidence"]), abs=1e-5)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["test_acc"] == json.loads((runs / "run" / "result.json").read_text())["test_acc"]


def test_a_fraction_has_its_share_of_each_class_and_lies_in_a_larger_one():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4], [200, 50, 7, 1]))
    drawn = [some_of_each(labels, fraction, 3) for fraction in (0.1, 0.25, 1.0)]
    assert [np.bincount(labels[places]).tolist() for places in drawn] == [
        [20, 5, 1, 0, 1],
        [50, 12, 2, 0, 1],
        [200, 50, 7, 0, 1],
    ]
    assert set(drawn[0]) < set(drawn[1]) and np.array_equal(drawn[2], np.arange(258))
    assert np.array_equal(drawn[0], some_of_each(labels, 0.1, 3))
    assert not np.array_equal(drawn[0], some_of_each(labels, 0.1, 4))


def test_a_resumed_run_keeps_its_split_and_its_fraction(pets, tmp_path):
    root, runs = pets
    shutil.copytree(root, tmp_path / "pets")
    shutil.copytree(runs, tmp_path / "runs")
    before = (tmp_path / "runs" / "run" / "split.csv").read_text()
    tiny.save_noise(tmp_path / "pets" / "cat" / "added.png", 77)
    words = (*TINY, "--best_by=roc_auc", "--sampler=balanced", "--resume")
    assert tiny.train(tmp_path / "pets", tmp_path / "runs", *words) == 2
    words = (*words, "--fraction=0.5")
    assert tiny.train(tmp_path / "pets", tmp_path / "runs", *words) == 0
    assert (tmp_path / "runs" / "run" / "split.csv").read_text() == before
    data = opened(tmp_path / "pets", recorded=read_split(tmp_path / "runs" / "run" / "split.csv"))
    assert list(data.split()) == list(opened(root, recorded=read_split(runs / "run" / "split.csv")).split())
    assert len(data.train) == 21 and {*map(",".join, data.split())} == {*before.splitlines()}
    next((tmp_path / "pets" / "emu").iterdir()).unlink()
    assert tiny.train(tmp_path / "pets", tmp_path / "runs", *words) == 2


def test_a_new_run_may_follow_a_split_and_divide_what_is_new(pets, tmp_path):
    root, runs = pets
    grown = classes(shutil.copytree(root, tmp_path / "pets"), names=("cat", "dog", "emu"), count=40)
    recorded = {row["path"]: row["part"] for row in rows_of(runs / "run" / "split.csv") if row["part"]}
    data = opened(grown, split=str(runs / "run" / "split.csv"))
    now = {name: part for part, subset in data.subsets.items() for name in data.names(subset)}
    assert {name: now[name] for name in recorded} == recorded
    assert len(now) == 120 - 21 and set(Counter(now.values())) == {"train", "validation", "test"}


@pytest.mark.usefixtures("drawn")
def test_evaluation_on_new_data_writes_what_a_training_writes(pets, tmp_path, run):
    _, runs = pets
    new = classes(tmp_path / "new", names=("cat", "emu", "fox"), count=5, first=90_000)
    out = evaluated(run, new, runs, f"--out={tmp_path / 'out'}")
    assert "left out, as the model does not know them: 5 images of fox" in out
    assert "no test image of dog: tested with support 0" in out
    for name in ("predictions.csv", "result.json", "confusion_matrix.png", "mistakes.png", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 100, name
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["per_class"]["dog"]["support"] == 0 and np.sum(result["confusion"]) == 10
    assert result["balanced_acc"] == pytest.approx(
        50 * (result["per_class"]["cat"]["recall"] + result["per_class"]["emu"]["recall"]), abs=1e-3
    )
    given = [f"--checkpoint_dir={runs}", "--checkpoint_name=run"]
    status, _, err = run(["evaluate", f"--data_dir={new}", *given, f"--out={runs / 'run'}"])
    assert status == 2 and "is a run's folder" in err
    (new / "only").mkdir()
    (new / "cat").rename(new / "only" / "test")
    status, _, err = run(["evaluate", f"--data_dir={new / 'only'}", *given])
    assert status == 2 and "none of the classes that the model knows: there are test, it knows cat, dog, emu" in err


def test_evaluation_of_a_test_folder_alone(pets, tmp_path, run):
    _, runs = pets
    classes(tmp_path / "Testing", names=("cat", "dog", "emu"), count=3, first=50_000)
    assert "of 9," in evaluated(run, tmp_path, runs)


def test_prediction_of_lists_and_lines_and_subfolders(pets, tmp_path, run, monkeypatch):
    root, runs = pets
    given = [f"--checkpoint_dir={runs}", "--checkpoint_name=run", f"--csv={tmp_path / 'out.csv'}"]
    status, out, err = run(["predict", root, *given])
    assert status == 0, err
    assert Counter(row["folder"] for row in rows_of(tmp_path / "out.csv")) == {"cat": 20, "dog": 20, "emu": 20}
    assert "cat/: 20 images: " in out and "60 images: " in out
    (root / "list.txt").write_text("cat/000.png\n\ndog/001.png\ncat/absent.png\n")
    status, out, err = run(["predict", f"@{root / 'list.txt'}", *given])
    (root / "list.txt").unlink()
    assert status == 1 and "2 images: " in out and "absent.png: the file does not exist" in out, err
    assert "1 of 3 files could not be read" in err
    (root / "list.txt").write_text("dog/002\nC:\\work\\pets\\emu\\003.png\n000\n")  # the last may mean three
    status, out, err = run(["predict", f"@{root / 'list.txt'}", *given])
    (root / "list.txt").unlink()
    assert [Path(row["path"]).parts[-2:] for row in rows_of(tmp_path / "out.csv")] == [
        ("dog", "002.png"),
        ("emu", "003.png"),
    ]
    assert status == 1 and "000: the file does not exist" in out, err
    (tmp_path / "sample.csv").write_text("id,label\nemu/003,\ncat/001,\n")
    status, out, err = run(["predict", root, *given, f"--submission={tmp_path / 'sample.csv'}"])
    assert status == 0 and "2 images: " in out, err
    assert [row["id"] for row in rows_of(tmp_path / "out.csv") if row["label"]] == ["emu/003", "cat/001"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{root / 'emu'}\n"))
    status, out, err = run(["predict", "-", *given])
    assert status == 0 and "20 images: " in out, err


def test_a_stopped_prediction_keeps_its_rows(pets, tmp_path, run, monkeypatch):
    root, runs = pets
    real = try_decode
    seen = []

    def decode_some(path, *more):
        seen.append(path)
        if len(seen) > 40:
            raise KeyboardInterrupt
        return real(path, *more)

    monkeypatch.setattr(predict, "try_decode", decode_some)
    given = [f"--checkpoint_dir={runs}", "--checkpoint_name=run", "--batch_size=4", "--num_workers=1"]
    status, _, err = run(["predict", root, *given, f"--csv={tmp_path / 'out.csv'}", f"--json={tmp_path / 'out.json'}"])
    rows = rows_of(tmp_path / "out.csv")
    assert status == 130 and f"stopped after {len(rows)} predictions" in err and 0 < len(rows) < 60
    assert len(json.loads((tmp_path / "out.json").read_text())) == len(rows)


def test_check_and_clean_by_the_command_line(tmp_path, run):
    root = classes(tmp_path / "data", count=3)
    opened(root)
    status, out, _ = run(["prepare", "--check", f"--data_dir={root}", f"--json={tmp_path / 'check.json'}"])
    assert status == 0 and "a training splits validation and test images off" in out
    assert json.loads((tmp_path / "check.json").read_text())["counts"] == {"train": {"cat": 3, "dog": 3}}
    status, out, _ = run(["prepare", "--clean", f"--data_dir={root}"])
    assert status == 0 and "1 cache removed" in out and caches(root / ".cache") == []


def test_clean_touches_no_caches_if_the_folder_is_not_there(tmp_path, run, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = tmp_path / "amp-train" / "0123456789abcdef0123.npy"
    other.parent.mkdir()
    other.write_bytes(b"of another data set")
    status, _, err = run(["prepare", "--clean", f"--data_dir={tmp_path / 'mistyped'}"])
    assert status == 2 and "mistyped does not exist" in err
    assert other.exists()


def test_clean_leaves_the_shared_caches_of_other_data(tmp_path, run, monkeypatch):
    monkeypatch.setattr("images.cache_files.cache_folder", lambda root: tmp_path)
    monkeypatch.setattr("images.cache.cache_folder", lambda root: tmp_path)
    roots = [classes(tmp_path / name, count=3) for name in ("data", "data2")]
    for root in roots:
        opened(root)
    assert len(caches(tmp_path)) == 2
    status, out, _ = run(["prepare", "--clean", f"--data_dir={roots[0]}"])
    assert status == 0 and "1 cache removed" in out
    assert [json.loads(cache.file.with_suffix(".json").read_text())["images_in"] for cache in caches(tmp_path)] == [
        str(roots[1] / "cat")
    ]


def test_many_sizes_are_summed_up():
    many = {"9x9": 3} | {f"{side}x{200 - side}": 1 for side in range(10, 30)}
    assert _sizes(many, 10) == "sizes: 21 different ones, from 9x9 to 29x171, most often 9x9 (3)"
    assert _sizes({"9x9": 3, "8x6": 1}, 10) == "sizes: 9x9: 3, 8x6: 1"


def test_a_run_whose_images_moved_asks_where_they_are(tmp_path, run):
    root = classes(tmp_path / "data", count=4)
    assert run(tiny.words(root, tmp_path))[0] == 0
    root.rename(tmp_path / "elsewhere")
    status, _, err = run(["evaluate", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run"])
    assert status == 2 and f"{root} does not exist, but the images of this run were in {root}" in err
    assert "Three ways" not in err and "--data_dir" in err


@pytest.mark.parametrize("window, told", [("0,300", 1), ("data", 0), ("type", 0)])
def test_a_window_without_deep_pictures_is_said_to_change_nothing(tmp_path, run, window, told):
    root = classes(tmp_path / "data", count=4)
    status, out, err = run(["prepare", "--check", f"--data_dir={root}", f"--window={window}"])
    assert status == 0 and (out + err).count("--window changes nothing") == told
    status, out, err = run(word for word in tiny.words(root, tmp_path, f"--window={window}") if word != "--quiet")
    assert status == 0 and (out + err).count("--window changes nothing") == told
    assert "becomes black" not in out + err


@pytest.mark.usefixtures("drawn")
def test_audit_tests_each_image_once_and_lists_what_is_doubtful(tmp_path, run, monkeypatch):
    monkeypatch.setattr("commands.compare.subprocess", tiny.Subprocess)
    root = tiny.draw(tmp_path / "data", train=90, test=6)
    train = root / "seg_train" / "seg_train"
    swapped = sorted((train / "coast").iterdir())[:3]
    for place, path in enumerate(swapped):
        path.rename(train / "town" / f"swapped{place}.png")
    shutil.copy(sorted((train / "field").iterdir())[0], train / "town" / "twice.png")
    words = tiny.words(root, tmp_path / "runs", "--epochs=1", "--folds=2", name="look")[1:]
    status, out, err = run(["audit", *words])
    assert status == 0, err
    folder = tmp_path / "runs" / "look"
    report = json.loads((folder / "audit.json").read_text())
    assert report["images"] == 91 and len(report["folds"]) == 2
    assert [sorted(Path(name).name for name in group) for group in report["copies_under_two_labels"]] == [
        sorted([sorted((train / "field").iterdir())[0].name, "twice.png"])
    ]
    assert "same picture: " in out and (folder / "doubtful.png").exists() and (folder / "report.html").exists()
    folds = [rows_of(folder / f"fold-{number}" / "predictions.csv") for number in (1, 2)]
    assert len({row["path"] for rows in folds for row in rows}) == 91  # each image once, by a model without it
    status, _, err = run(["audit", *words, "--folds=3"])
    assert status == 2 and "an audit of other images, or of other --folds" in err


def test_confident_learning_by_hand():
    """Two classes, thresholds 0.8 (of labels 0) and 0.6: the third image is confidently of the other class."""
    from reports.doubt import find_doubtful

    probabilities = np.array([[1.0, 0.0], [0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7], [0.5, 0.5]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    found = find_doubtful(probabilities, labels)
    assert found.order.tolist() == [2] and found.suggested.tolist() == [0, 0, 1, 1, 1, 1]
    assert found.margin[2] == pytest.approx(-0.6)
    assert found.joint.tolist() == [[2, 1], [0, 3]]
