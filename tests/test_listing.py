"""What is listed, and under which label: folders of all shapes, tables of all kinds, and nothing lost in silence."""

import io
import json
import re
import shutil
from random import Random

import pytest
import tiny

from images.check import check, format_check
from images.folders import find_image_set
from images.labels import list_images
from images.opening import Opening, open_data_set, open_test_set
from images.subsets import files_checksum
from utils import UserError


def draw(root, *names):
    """Write a different image of noise for each name."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tiny.noise(seed, (6, 5)).save(path, "PNG")
    return root


def listed(root, table, **options):
    """Write a table; return {image: class} as it was read, and the notes."""
    (root / "t.csv").write_text(table)
    found = list_images(root, labels="t.csv", **options)
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
    assert f"1 row of t.csv names no image that is there, such as {cell}" in notes.replace("\\\\", "\\")


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


def test_labels_that_changed_make_other_images_of_them_and_another_order_does_not(tmp_path):
    draw(tmp_path, *TABLE)
    write(tmp_path, TABLE)
    first = opened(tmp_path, labels="t.csv")
    recorded = split_of(first)
    swapped = TABLE | {"3.png": "even", "4.png": "odd"}
    for table, groups, alike in (
        (TABLE, None, True),
        (dict(reversed(TABLE.items())), None, True),
        (swapped, None, False),
        (TABLE | {"4.png": "odd"}, None, False),
        (TABLE, {"1.png": "7.png"}, False),
    ):
        write(tmp_path, table, groups)
        assert (opened(tmp_path, labels="t.csv", recorded=recorded).fingerprint == first.fingerprint) == alike
    folders = draw(tmp_path / "folders", *(f"{'ab'[number % 2]}/{number}.png" for number in range(8)))
    assert opened(folders).fingerprint == "ebc6072bcb194ee5", "as runs of earlier versions recorded it"


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
@pytest.mark.parametrize("size, larger", [(16, False), (32, True)])
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


def test_the_check_names_the_two_parts_of_each_copy(tmp_path):
    tree(tmp_path, train__a=4, train__b=4, test__a=2, test__b=1, val__a=3)
    for one, other in (
        ("train/a/0_0", "val/a/again"),
        ("train/b/1_1", "test/b/again"),
        ("train/a/0_2", "train/b/again"),
    ):
        shutil.copy(tmp_path / f"{one}.png", tmp_path / f"{other}.png")
    report = check(tmp_path)
    assert {parts: len(groups) for parts, groups in report["shared"].items()} == {
        "train and test": 1,
        "train and validation": 1,
        "test and validation": 0,
    }
    text = format_check(report)
    assert "of these, in both train and test: 1" in text and "in both train and validation: 1" in text
    assert len(report["across_splits"]) == 2 and len(report["across_labels"]) == 1
    assert report["counts"]["validation"] == {"a": 4, "b": 0}
    assert report["balance"] == {"train": 1.25, "test": 1.0, "validation": None}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


# ---------------------------------------------------------------------------------- what a run is tested on later
PHOTOS = [f"{name}/{number}.bmp" for name in "ab" for number in range(15)]


def evaluated(root, caplog, **options):
    """How many images `evaluate` tests, and what it says."""
    caplog.set_level("INFO", "amp-train")
    caplog.clear()
    return len(open_test_set(root, image_size=8, known=["a", "b"], **options).test), caplog.text


@pytest.fixture
def ran(tmp_path):
    """Return a data folder, and the records of a run on it."""
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


# ------------------------------------------------------------------------------- folders: parts, classes, the rest
def tree(root, **counts):
    """Draws so many images in each folder; __ stands for a slash."""
    places = [folder.replace("__", "/") for folder in counts]
    numbered = [(place, seed, count) for seed, (place, count) in enumerate(zip(places, counts.values(), strict=True))]
    return draw(root, *(f"{place}/{seed}_{number}.png" for place, seed, count in numbered for number in range(count)))


VEHICLES = {"bus": 6, "car": 6}


@pytest.mark.parametrize("name", ["train", "validation", "Training"])
def test_a_class_called_after_a_part_is_a_class_whatever_it_holds(tmp_path, name):
    tree(tmp_path, **VEHICLES, **{f"{name}__fast": 4, f"{name}__freight": 5, f"{name}__old__steam": 2})
    found = find_image_set(tmp_path)
    assert found.classes == sorted([name, "bus", "car"]) and len(found.train) == 23 and not found.test
    assert f"taken for classes, like the folders beside: {name} (move" in found.notes[0]
    known = find_image_set(tmp_path, known=["bus", "car", name])
    assert len(known.train) == 23 and known.notes == []
    flat = tree(tmp_path / "flat", **VEHICLES, train=6, test=6)
    assert find_image_set(flat).classes == ["bus", "car", "test", "train"]


def test_what_may_be_a_part_or_a_class_is_refused_with_both_ways(tmp_path):
    tree(tmp_path, train__cat=9, train__dog=9, extra=3)
    said = tiny.refused(find_image_set, tmp_path)
    assert "is train a part of the data set, or a class beside extra?" in said
    assert f"--data_dir {tmp_path / 'train'}" in said and "give it another name" in said
    assert find_image_set(tmp_path / "train").classes == ["cat", "dog"]


@pytest.mark.parametrize(
    "rest",
    [{"test__cat": 2, "extra": 9, "more": 9}, {"test_stg1": 30, "test_stg2": 30}, {"seg_pred__seg_pred": 30}, {}],
)
def test_parts_beside_other_folders_are_parts(tmp_path, rest):
    tree(tmp_path, train__cat=4, train__dog=4, **rest)
    found = find_image_set(tmp_path)
    left = sum(rest.values()) - len(found.test or [])
    assert found.classes == ["cat", "dog"] and len(found.train) == 8
    assert sum("left out" in note for note in found.notes) == bool(left)
    assert not left or f"{left} images in no class folder that is used: left out, such as " in found.notes[-1]


# ------------------------------------------------------------------------------------------------ kinds of tables
FLAGS = {  # a column, its cell of five images and that of seven others: are the five trained on?
    "is_test,yes,no": False,
    "Validation,TRUE,FALSE": False,
    "is_train,1.0,0.0": True,
    "valid,y,n": False,
    "phase,val,train": False,
    "usage,Training,Test": True,
}


@pytest.mark.parametrize("words, trains", FLAGS.items(), ids=FLAGS)
def test_a_column_of_yes_and_no_says_the_part(tmp_path, words, trains):
    draw(tmp_path, *(f"{number}.png" for number in range(12)))
    column, yes, no = words.split(",")
    rows = [f"{number}.png,{'ab'[number % 2]},{yes if number < 5 else no}" for number in range(12)]
    _, notes = listed(tmp_path, "\n".join([f"name,label,{column}", *rows]))
    found = list_images(tmp_path, labels="t.csv")
    assert {int(path.stem) for path, _ in found.train} == (set(range(5)) if trains else set(range(5, 12)))
    assert len(found.test) == 12 - len(found.train) and found.classes == ["a", "b"]  # validation is tested
    assert f"parts from '{column}'" in notes


@pytest.mark.parametrize("one, zero", [("1.0", "0.0"), ("1", "0"), ("True", "False"), ("1", "")])
def test_columns_of_classes_say_the_label(tmp_path, one, zero):
    """As competitions have them; a class without an image (UNK) is none, and a row of zeros has no label."""
    draw(tmp_path, *(f"ISIC_{number}.jpg" for number in range(5)))
    header = ["image", "MEL", "NV", "BCC", "UNK", "is_test"]
    chosen = ["MEL", "NV", "BCC", "NV", None]
    rows = [
        [f"ISIC_{number}", *(one if name == column else zero for column in header[1:5]), one if number == 3 else zero]
        for number, name in enumerate(chosen)
    ]
    labels, notes = listed(tmp_path, "\n".join(map(",".join, [header, *rows])))
    assert labels == {f"ISIC_{number}.jpg": name for number, name in enumerate(chosen) if name}
    assert "images from 'image', classes from 'MEL', 'NV', 'BCC', 'UNK', parts from 'is_test'" in notes
    assert "1 image has no label" in notes
    rows[0][2] = one
    assert "'ISIC_0' several labels at once, MEL and NV (1 such row)" in tiny.refused(
        listed, tmp_path, "\n".join(map(",".join, [header, *rows]))
    )


def lines(kind, rows):
    """Return the text of a metadata file: rows of {column: value}."""
    if kind == "jsonl":
        return "\n".join(map(json.dumps, rows))
    return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)])


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_of_an_image_folder_is_found_by_itself(tmp_path, kind):
    draw(tmp_path / "one", "images/1.png", "images/2.png", "images/3.png")
    rows = [{"file_name": f"images/{number}.png", "caption": "a", "label": number % 2} for number in (1, 2, 3)]
    (tmp_path / "one" / f"metadata.{kind}").write_text(lines(kind, rows))
    found = list_images(tmp_path / "one")
    assert found.classes == ["0", "1"] and [label for _, label in found.train] == [1, 0, 1]
    assert f"metadata.{kind}: images from 'file_name', classes from 'label'; not used: 'caption'" in found.notes
    for number, part in enumerate(("train", "validation")):
        draw(tmp_path / "parts" / part, "1.png", "2.png")
        rows = [{"file_name": f"{name}.png", "label": ("cat", "dog")[(name + number) % 2]} for name in (1, 2)]
        (tmp_path / "parts" / part / f"metadata.{kind}").write_text(lines(kind, rows))
    found = list_images(tmp_path / "parts")
    assert [label for _, label in found.train] == [1, 0] and [label for _, label in found.test] == [0, 1]


def test_metadata_without_labels_leave_class_folders_alone(tmp_path):
    draw(tmp_path, *PETS)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "cat/1.png", "text": "a cat"}))
    (tmp_path / "metadata.csv").write_text("one column\n")
    assert list_images(tmp_path).classes == ["cat", "dog"]
    (tmp_path / "metadata.jsonl").write_text("no json")
    assert list_images(tmp_path).classes == ["cat", "dog"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "cat/1.png", "label": ["cat", "dog"]}))
    assert "several labels at once, cat and dog" in tiny.refused(list_images, tmp_path)


def test_columns_are_named_after_a_colon(tmp_path):
    draw(tmp_path, *PETS)
    table = "file,height,width\n" + "".join(f"{name},{number % 3},{number % 2}\n" for number, name in enumerate(PETS))
    (tmp_path / "t.csv").write_text(table)
    found = list_images(tmp_path, labels="t.csv:file,width")
    assert found.classes == ["0", "1"] and "classes from 'width'; not used: 'height'" in found.notes[0]
    assert list_images(tmp_path, labels=f"{tmp_path / 't.csv'}:file,height").classes == ["0", "1", "2"]
    for wrong in ("file,depth", "file", "file,width,height"):
        assert "Name two, of images and labels" in tiny.refused(list_images, tmp_path, labels=f"t.csv:{wrong}")
    assert "t.csv:file,NAME" in tiny.refused(list_images, tmp_path, labels="t.csv")


def test_labels_that_are_names_of_parts_stay_labels(tmp_path):
    draw(tmp_path, *(f"{number}.png" for number in range(8)))
    for columns in ("name,label", "name,kind"):
        rows = [f"{number}.png,{('train', 'test')[number % 2]}" for number in range(8)]
        listed(tmp_path, "\n".join([columns, *rows]))
        assert list_images(tmp_path, labels="t.csv").classes == ["test", "train"]


def test_two_columns_of_yes_and_no_say_three_parts(tmp_path):
    draw(tmp_path, *(f"{number}.png" for number in range(9)))
    rows = [f"{number}.png,{'ab'[number % 2]},{number < 3},{number > 6}" for number in range(9)]
    listed(tmp_path, "\n".join(["name,label,is_valid,is_test", *rows]))
    found = list_images(tmp_path, labels="t.csv")
    assert [len(part) for part in (found.train, found.validation, found.test)] == [4, 3, 2]


def test_columns_that_are_not_used_are_named(tmp_path):
    draw(tmp_path, *PETS)
    table = "file,label,fold,width,is_valid\n" + "".join(
        f"{name},{name[:3]},{n},6,maybe\n" for n, name in enumerate(PETS)
    )
    labels, notes = listed(tmp_path, table)
    assert "images from 'file', classes from 'label'; not used: 'fold', 'width', 'is_valid'" in notes


@pytest.mark.parametrize("space, header", [(" ", ""), (" \t", "path \tlabel\n")])
def test_a_list_of_paths_and_labels_between_blanks_is_read(tmp_path, space, header):
    labels = {"3.png": "0", "my photos/1.png": "0", "my photos/2.png": "1"}
    draw(tmp_path, *labels)
    assert listed(tmp_path, header + "\n".join(map(space.join, labels.items())))[0] == labels


def test_a_table_of_one_column_shows_its_first_line(tmp_path):
    draw(tmp_path, *PETS)
    assert "its first line is 'cat/1.png'" in tiny.refused(listed, tmp_path, "cat/1.png\ncat/2.png\n")


# ----------------------------------------------------------------------------- used and left out are what is there
PICTURE = io.BytesIO()
tiny.noise(0, (2, 2)).save(PICTURE, "PNG")
NAMES = ["train", "val", "test", "cat", "dog", "extra", "pred", "x"]
FILES = ["1.png", "2.PNG", "3", "5.txt", ".6.png"]
KNOWN = [None, ("cat", "dog"), ("train", "x", "cat")]


def plant(root, folders):
    """Write files below a folder; return how many of them are visible images."""
    count = 0
    for number, (names, files) in enumerate(folders):
        place = root.joinpath(*names)
        place.mkdir(parents=True, exist_ok=True)
        for name in files:
            path = place / (name if name[0] == "." else f"{number}_{name}")
            is_image = not name.endswith("txt")
            path.write_bytes(PICTURE.getvalue() if is_image else b"no image")
            count += is_image and name[0] != "."
    return count


def left_out(notes):
    """Return the number in front of each "left out"."""
    return sum(int(re.search(r"[\d,]+(?= images?)", note)[0].replace(",", "")) for note in notes if "left out" in note)


def assert_tree_accounts_for_all(root, folders, known):
    there = plant(root, folders)
    try:
        found = list_images(root, known=known)
    except UserError:
        return False
    used = [path for listing in found.parts.values() for path, _ in listing]
    assert len(set(used)) == len(used)
    assert len(used) + left_out(found.notes) == there, (folders, found.notes)
    return True


def assert_rows_account_for_all(root, rows, known):
    there = plant(root, [((), ["1.png"])] * 9)
    lines = "".join(f"{number}_1.png,{label}\n" for number, label in dict(rows).items())
    (root / "t.csv").write_text(f"image,label\n{lines}")
    try:
        found = list_images(root, labels="t.csv", known=["a", "b"] if known else None)
    except UserError:
        return False
    assert sum(map(len, found.parts.values())) + left_out(found.notes) == there, (rows, found.notes)
    return True


def test_images_used_and_images_said_to_be_left_out_are_all_that_are_there(tmp_path):
    """Forty trees and tables drawn at random; tests/long tries more of them."""
    drawn = Random(0)
    counted = 0
    for number in range(20):
        names = [drawn.choices(NAMES, k=drawn.randrange(4)) for _ in range(drawn.randrange(4, 10))]
        folders = [(place, drawn.sample(FILES, drawn.randrange(len(FILES) + 1))) for place in names]
        rows = [(drawn.randrange(12), drawn.choice(["a", "b", "c", ""])) for _ in range(drawn.randrange(4, 13))]
        counted += assert_tree_accounts_for_all(tmp_path / f"tree {number}", folders, KNOWN[number % 3])
        counted += assert_rows_account_for_all(tmp_path / f"table {number}", rows, number % 2)
    assert counted >= 15, "of the others everything was refused"
