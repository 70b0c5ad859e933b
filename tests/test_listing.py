"""What is listed, and under which label: folders of all shapes, tables of all kinds, and nothing lost in silence.

Run: pytest tests/test_listing.py
"""

import shutil
import unicodedata

import pytest
import tiny

from images.labels import find_labelled
from images.opening import Opening, open_data_set, open_test_set
from images.subsets import files_checksum


def draw(root, *names):
    """Writes an image of noise for each name, each another one."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.noise(seed, (6, 5)).save(path, "PNG")
    return root


def listed(root, table, **options):
    """Writes a table and returns {image: class} as it was understood, and the notes."""
    (root / "t.csv").write_text(table)
    found = find_labelled(root, "t.csv", **options)
    labels = {
        path.relative_to(root).as_posix(): found.classes[label]
        for listing in found.parts.values()
        for path, label in listing
    }
    return labels, " | ".join(found.notes)


def opened(root, **options):
    return open_data_set(root, image_size=8, seed=1, opening=Opening(workers=1), **options)


def split_of(data):
    """{path: (class, part)}, as read from the split.csv that a run would write."""
    header, *rows = data.split()
    return {path: (name, part) for path, name, part in rows}


PETS = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")

# ------------------------------------------------------------------------------------------ rows and their files
MISSING = {
    "another class's picture of the same name": (("cat/1.png", "dog/1.png", "dog/7.png"), "cat/7.png"),
    "the same, by its stem": (("cat/1.png", "dog/1.png", "dog/7.png"), "cat/7"),
    "the same, by a number": (("cat/0001.png", "dog/0001.png", "dog/0007.png"), "cat/7"),
    "a class whose folder is gone": (("cow/1.png", "dog/1.png", "dog/7.png"), "cat/7.png"),
    "another part's": (("train/cat/1.png", "test/cat/7.png", "train/dog/1.png"), "train/cat/7.png"),
    "a backup's": (("cat/1.png", "old/cat/7.png", "dog/1.png"), "cat/7.png"),
    "a folder within the one that is named": (("cat/1.png", "cat/small/7.png", "dog/1.png"), "cat/7.png"),
    "with a folder before it": (("cat/1.png", "dog/1.png", "dog/7.png"), "data/cat/7.png"),
    "with a path from another machine": (("cat/1.png", "dog/1.png", "dog/7.png"), "C:\\data\\cat\\7.png"),
}


@pytest.mark.parametrize("there, cell", MISSING.values(), ids=MISSING)
def test_a_row_without_its_file_takes_no_other_picture(tmp_path, there, cell):
    draw(tmp_path, *there)
    own = [name for name in there if "7" not in name]
    table = "\n".join(["file,label", *(f"{name},{name.split('/')[-2]}" for name in own), f"{cell},cat"])
    labels, notes = listed(tmp_path, table)
    assert set(labels) == set(own)
    assert (
        f"1 row of t.csv names no image that is there, such as {cell.encode('unicode_escape').decode()}" in notes
        or (f"1 row of t.csv names no image that is there, such as {cell}" in notes)
    )


def test_an_emptied_class_folder_is_still_a_folder(tmp_path):
    draw(tmp_path, "cow/1.png", "dog/1.png", "cat/1.png")
    (tmp_path / "cat" / "1.png").unlink()
    labels, notes = listed(
        tmp_path, "file,label\ncow/1.png,cow\ncow/1.png,cow\ncat/1.png,cat\n1.jpg,x\ndog/1.png,dog\n"
    )
    assert labels == {"cow/1.png": "cow", "dog/1.png": "dog"} and "2 rows of t.csv name no image" in notes


FOUND = {
    "as it is": "cat/1.png",
    "with a dot before it": "./cat/1.png",
    "with a folder before it": "images/cat/1.png",
    "with the data folder before it": "/home/x/pets/cat/1.png",
    "as Windows writes it": "D:\\pets\\cat\\1.png",
    "without its suffix": "cat/1",
    "in capitals": "CAT/1.PNG",
    "by a way around": "dog/../cat/1.png",
}


@pytest.mark.parametrize("cell", FOUND.values(), ids=FOUND)
def test_a_path_is_found_by_its_end(tmp_path, cell):
    draw(tmp_path, *PETS)
    labels, notes = listed(tmp_path, f"file,label\n{cell},x\ncat/2.png,x\ndog/1.png,y\ndog/2.png,y\n")
    assert labels == dict(zip(PETS, "xxyy", strict=True))
    assert "no image" not in notes and "is not there" not in notes


@pytest.mark.parametrize("folder", ["", "train_images/", "parts/a/"])
def test_a_renamed_folder_is_said(tmp_path, folder):
    root = draw(tmp_path / "pics", *(f"{folder}{name}.png" for name in "1234"))
    labels, notes = listed(root, "".join(f"images/{number}.png,{number % 2}\n" for number in (1, 2, 3, 4)))
    assert sorted(labels.values()) == ["0", "0", "1", "1"]
    assert "4 rows of t.csv name a folder that is not there, such as images/1.png: taken for " in notes


def test_absolute_paths_name_their_file_and_no_other(tmp_path):
    root = draw(tmp_path / "pets", *PETS)
    draw(tmp_path / "else", "1.png", "2.png")
    away = tmp_path / "else" / "2.png"
    labels = find_labelled_rows(root, [(root / "cat" / "1.png", "x"), (away, "y"), (root / "dog" / "2.png", "y")])
    assert labels == {root / "cat" / "1.png": "x", away: "y", root / "dog" / "2.png": "y"}


def find_labelled_rows(root, rows):
    (root / "t.csv").write_text("".join(f"{path},{label}\n" for path, label in rows))
    found = find_labelled(root, "t.csv")
    return {path: found.classes[label] for path, label in found.train}


def test_names_that_differ_by_case_alone_are_two(tmp_path):
    if (draw(tmp_path, "A/x.png", "a/X.png", "a/x.png") / "a" / "X.png").samefile(tmp_path / "a" / "x.png"):
        pytest.skip("case does not count on this disk")
    labels, notes = listed(tmp_path, "file,label\nA/x.png,1\na/X.png,2\na/x.png,3\nA/X.png,4\n")
    assert labels == {"A/x.png": "1", "a/X.png": "2", "a/x.png": "3"}
    assert "such as A/X.png" in notes


@pytest.mark.parametrize("disk, table", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_is_one_in_both_unicode_forms(tmp_path, disk, table):
    names = ["café/é.png", "thé/ü.png"]
    draw(tmp_path, *(unicodedata.normalize(disk, name) for name in names))
    rows = "".join(f"{unicodedata.normalize(table, name)},{number}\n" for number, name in enumerate(names))
    assert list(listed(tmp_path, rows)[0].values()) == ["0", "1"]


TWICE = [
    ("cat/1.png,cat,train,p\ncat/1.png,dog,train,p", "two labels: cat and dog"),
    ("cat/1.png,cat,train,p\ncat/1.png,cat,test,p", "two parts: train and test"),
    ("cat/1.png,cat,train,p\ncat/1,cat,,p", "two parts: train and none"),
    ("cat/1.png,cat,train,p\n./cat/1.png,cat,train,q", "two groups: p and q"),
]


@pytest.mark.parametrize("rows, message", TWICE)
def test_an_image_listed_twice_says_one_thing(tmp_path, rows, message):
    draw(tmp_path, *PETS)
    head = "file,label,split,group\ndog/1.png,dog,train,r\n"
    assert message in tiny.refused(listed, tmp_path, head + rows)
    same = head + "cat/1.png,cat,train,p\ncat/1,cat,Training,p\n"
    assert len(listed(tmp_path, same)[0]) == 2


# --------------------------------------------------------------------------------- labels that change under a run
TABLE = {f"{number}.png": ("even", "odd")[number % 2] for number in range(16)}


def write(root, table, groups=None):
    rows = [f"{name},{label},{(groups or {}).get(name, name)}" for name, label in table.items()]
    (root / "t.csv").write_text("\n".join(["image,label,group", *rows]))


def test_labels_that_changed_make_other_images_of_them(tmp_path):
    draw(tmp_path, *TABLE)
    write(tmp_path, TABLE)
    first = opened(tmp_path, labels="t.csv")
    recorded = split_of(first)
    assert opened(tmp_path, labels="t.csv", recorded=recorded).fingerprint == first.fingerprint
    swapped = TABLE | {"3.png": "even", "4.png": "odd"}
    for changed, groups in ((swapped, None), (TABLE | {"4.png": "odd"}, None), (TABLE, {"1.png": "7.png"})):
        write(tmp_path, changed, groups)
        assert opened(tmp_path, labels="t.csv", recorded=recorded).fingerprint != first.fingerprint


def test_a_table_in_another_order_is_the_same(tmp_path):
    draw(tmp_path, *TABLE)
    write(tmp_path, TABLE)
    first = opened(tmp_path, labels="t.csv").fingerprint
    write(tmp_path, dict(reversed(TABLE.items())))
    assert opened(tmp_path, labels="t.csv").fingerprint == first


def test_the_fingerprint_of_class_folders_is_what_it_was(tmp_path):
    draw(tmp_path, *(f"{'ab'[number % 2]}/{number}.png" for number in range(8)))
    assert opened(tmp_path).fingerprint == "ebc6072bcb194ee5"


def test_images_tested_under_another_label_are_said(tmp_path, caplog):
    caplog.set_level("INFO", "amp-train")
    draw(tmp_path, *TABLE)
    write(tmp_path, TABLE)
    recorded = split_of(opened(tmp_path, labels="t.csv"))
    tested = next(name for name, (label, part) in recorded.items() if part == "test" and label == "odd")
    write(tmp_path, TABLE | {tested: "even"})
    options = {"image_size": 8, "known": ["even", "odd"], "labels": "t.csv", "same_place": True}
    open_test_set(tmp_path, recorded=recorded, **options)
    said = f"1 image has another label than in split.csv, such as {tested} (odd there, even now)"
    assert said in caplog.messages
    caplog.clear()
    write(tmp_path, TABLE)
    open_test_set(tmp_path, recorded=recorded, **options)
    assert "another label" not in caplog.text


# ------------------------------------------------------------------------------------- copies on both sides
@pytest.mark.parametrize("size, larger", [(16, True), (32, True), (40, True), (16, False)])
@pytest.mark.parametrize("cache", ["auto", "none"])
def test_copies_in_a_given_part_are_seen_at_every_size(tmp_path, caplog, size, larger, cache):
    for seed in range(12):
        path = tmp_path / "train" / "ab"[seed % 2] / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.noise(seed, (40, 36)).save(path)
        for part in ("test", "val"):
            (tmp_path / part / "ab"[seed % 2]).mkdir(parents=True, exist_ok=True)
    for seed, part in ((0, "test"), (1, "test"), (2, "val"), (3, "val")):
        picture = tiny.noise(seed if seed < 3 else 77, (40, 36))
        picture.save(tmp_path / part / "ab"[seed % 2] / f"again{seed}.{'bmp' if seed else 'png'}")
    opening = Opening(workers=1, cache=cache)
    for _ in range(2):  # decoded, then found decoded
        caplog.clear()
        open_data_set(tmp_path, image_size=size, seed=1, keep_larger=larger, opening=opening)
        assert "2 test images are also training images, such as " in caplog.text
        assert "1 validation image is also a training image, such as " in caplog.text


# ---------------------------------------------------------------------------------- what a run is tested on later
PHOTOS = [f"{name}/{number}.bmp" for name in "ab" for number in range(15)]


def evaluated(root, caplog, **options):
    """How many images `evaluate` tests, and what it says."""
    caplog.set_level("INFO", "amp-train")
    caplog.clear()
    return len(open_test_set(root, image_size=8, known=["a", "b"], **options).test), caplog.text


@pytest.fixture
def ran(tmp_path):
    """A data folder, and what a run on it recorded."""
    data = opened(draw(tmp_path / "data", *PHOTOS))
    return data.root, {"recorded": split_of(data), "checksum": files_checksum(data.test.paths, data.root)}


def test_new_pictures_under_old_names_are_all_tested(ran, tmp_path, caplog):
    _, was = ran
    other = draw(tmp_path / "hold", *reversed(PHOTOS))  # as many, of the same names and sizes
    count, said = evaluated(other, caplog, **was)
    assert count == 30 and "have the names of the run's test images, but" in said
    count, said = evaluated(draw(tmp_path / "none", "a/x.bmp", "b/y.bmp"), caplog, **was)
    assert count == 2 and "names of the run's" not in said


def test_a_data_folder_that_moved_and_grew_is_known_again(ran, tmp_path, caplog):
    root, was = ran
    moved = shutil.copytree(root, tmp_path / "moved")
    draw(moved, "a/new.bmp", "b/new.bmp")
    few = sum(part == "test" for _, part in was["recorded"].values())
    assert evaluated(moved, caplog, **was)[0] == few < 30
    draw(moved, next(name for name, (_, part) in was["recorded"].items() if part == "test"))
    assert evaluated(moved, caplog, **was)[0] == 32
    assert (
        evaluated(moved, caplog, **was, same_place=True)[0] == few and "were changed after its training" in caplog.text
    )
