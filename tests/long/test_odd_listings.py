"""Names that look like others: accents in two forms, blanks, capitals, missing labels, copies, other folders."""

import shlex
import unicodedata
from collections import Counter

import pytest
from test_listing import PETS, draw, listed, opened, tree

from images.folders import find_image_set
from images.labels import find_labelled, list_images


def test_an_emptied_class_folder_is_still_a_folder(tmp_path):
    draw(tmp_path, "cow/1.png", "dog/1.png", "cat/1.png")
    (tmp_path / "cat" / "1.png").unlink()
    labels, notes = listed(
        tmp_path, "file,label\ncow/1.png,cow\ncow/1.png,cow\ncat/1.png,cat\n1.jpg,x\ndog/1.png,dog\n"
    )
    assert labels == {"cow/1.png": "cow", "dog/1.png": "dog"} and "2 rows of t.csv name no image" in notes


@pytest.mark.parametrize("folder", ["", "train_images/", "parts/a/"])
def test_a_renamed_folder_is_said(tmp_path, folder):
    root = draw(tmp_path / "pics", *(f"{folder}{name}.png" for name in "1234"))
    labels, notes = listed(root, "".join(f"images/{number}.png,{number % 2}\n" for number in (1, 2, 3, 4)))
    assert sorted(labels.values()) == ["0", "0", "1", "1"]
    assert "4 rows of t.csv name a folder that is not there, such as images/1.png: taken for " in notes


def test_absolute_paths_name_their_file_and_no_other(tmp_path):
    root = draw(tmp_path / "pets", *PETS)
    away = draw(tmp_path / "else", "1.png", "2.png") / "2.png"
    rows = {root / "cat" / "1.png": "x", away: "y", root / "dog" / "2.png": "y"}
    (root / "t.csv").write_text("".join(f"{path},{label}\n" for path, label in rows.items()))
    found = find_labelled(root, "t.csv")
    assert {path: found.classes[label] for path, label in found.train} == rows


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


def test_a_model_that_knows_a_class_called_train_is_tested_in_parts_too(tmp_path):
    classes = ["bus", "car", "train"]
    tree(tmp_path, **{f"{part}__{name}": 2 for part in ("train", "test") for name in classes})
    assert len(find_image_set(tmp_path, known=classes).test) == 6
    assert find_image_set(tmp_path).classes == classes


@pytest.mark.parametrize("train, test", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_accent_in_a_class_is_one_in_both_unicode_forms(tmp_path, train, test):
    for part, form in (("train", train), ("test", test)):
        tree(tmp_path, **{f"{part}__{unicodedata.normalize(form, name)}": 3 for name in ("café", "thé")})
    found = find_image_set(tmp_path)
    assert found.classes == [unicodedata.normalize(train, name) for name in ("café", "thé")]
    assert [label for _, label in found.test] == [0, 0, 0, 1, 1, 1]
    known = find_image_set(tmp_path, known=[unicodedata.normalize(test, name) for name in ("thé", "café")])
    assert [label for _, label in known.test] == [0, 0, 0, 1, 1, 1] and known.notes == []


def test_blanks_at_the_end_of_a_class_do_not_count(tmp_path):
    tree(tmp_path, **{"train__cat": 2, "train__cat ": 3, "train__dog ": 2, "test__cat": 1, "test__dog": 1})
    found = find_image_set(tmp_path)
    assert found.classes == ["cat", "dog "] and [label for _, label in found.train] == [0] * 5 + [1, 1]
    assert [label for _, label in found.test] == [0, 1]
    assert f"taken for one class in {tmp_path / 'train'}: 'cat' and 'cat '" in found.notes


ODD = {
    "nan": "class 'nan' looks like a missing label: 2 images",
    "#N/A": "class '#N/A' looks like a missing label: 2 images",
    "Cat": "classes 'Cat' and 'cat' differ in capitals alone",
    "cat dog": "class 'cat dog' looks like the labels cat, dog together: 2 images",
    "dog,cat": "class 'dog,cat' looks like the labels dog, cat together: 2 images",
    "cat|dog": "class 'cat|dog' looks like the labels cat, dog together: 2 images",
}


@pytest.mark.parametrize("name, note", ODD.items(), ids=ODD)
def test_a_class_that_looks_like_a_mistake_is_said(tmp_path, name, note):
    root = draw(tmp_path / "table", *(f"{number}.png" for number in range(6)))
    labels, notes = listed(root, "".join(f'{number}.png,"{("cat", "dog", name)[number % 3]}"\n' for number in range(6)))
    assert set(labels.values()) == {"cat", "dog", name} and note in notes
    if "/" not in name:
        tree(tmp_path / "folders", cat=2, dog=2, **{name: 2})
        assert note in " | ".join(list_images(tmp_path / "folders").notes)


def test_ordinary_classes_are_not_remarked_upon(tmp_path):
    tree(tmp_path, **{"red apple": 2, "apple": 2, "Nan bread": 2, "nancy": 2, "a b": 2})
    assert list_images(tmp_path).notes == []


def test_one_label_in_two_unicode_forms_is_one(tmp_path):
    draw(tmp_path, *"1234")
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    labels, _ = listed(tmp_path, f"1,{forms[0]}\n2,{forms[1]}\n3,x\n4,x\n")
    assert list(labels.values()) == [forms[0], forms[0], "x", "x"]
    assert list(listed(tmp_path, f"1,{forms[0]}\n2,x\n", known=["x", forms[1]])[0].values()) == [forms[1], "x"]


def test_a_split_written_on_a_mac_is_kept_elsewhere(tmp_path):
    names = [f"{label}/é{number}.png" for label in "ab" for number in range(10)]
    first = opened(draw(tmp_path / "one", *(unicodedata.normalize("NFD", name) for name in names)))
    here = draw(tmp_path / "two", *(unicodedata.normalize("NFC", name) for name in names))
    (tmp_path / "split.csv").write_text("\n".join(",".join(row) for row in first.split()))
    second = opened(here, split=str(tmp_path / "split.csv"))
    for part in ("train", "validation", "test"):
        theirs = [unicodedata.normalize("NFC", name) for name in first.names(first.subsets[part])]
        assert sorted(second.names(second.subsets[part])) == sorted(theirs)


COPIES = {
    "Roboflow's": [f"{name}_jpg.rf.{copy}.jpg" for name in ("p01", "p02", "p 3") for copy in ("aa1", "bb2", "cc3")],
    "numbered": [f"{name}{mark}.png" for name in ("p01", "p02", "p 3") for mark in ("", "_aug1", "_aug2")],
    "named": [f"{name}{mark}.jpg" for name in ("p01", "p02", "x") for mark in ("", "-hflip", " rotated 90")],
    "twice": [f"{name}{mark}.jpg" for name in ("p01", "p02", "x") for mark in ("_aug_0", "_aug_1", "_flip_noise3")],
}


@pytest.mark.parametrize("names", COPIES.values(), ids=COPIES)
def test_augmented_copies_are_noticed_and_the_offered_group_keeps_them_together(tmp_path, names):
    draw(tmp_path, *(f"{label}/{name}" for label in "ab" for name in names), "a/other.png", "b/bus_augsburg.png")
    note = next(note for note in list_images(tmp_path).notes if "--group" in note)
    assert note.startswith("18 images have names of 6 pictures and augmented copies")
    offered = shlex.split(note)
    group = offered[offered.index("--group") + 1]
    found = list_images(tmp_path, group=group)
    assert not any("augmented" in note for note in found.notes)
    sizes = Counter(found.groups.values())
    assert sorted(sizes.values())[-6:] == [3] * 6 and len([size for size in sizes.values() if size > 1]) == 6
    other = ("1_aug1.png", "p_rotterdam.png", "p.png", "q_2.png")
    draw(tmp_path / "others", *(f"{label}/{name}" for label in "ab" for name in other))
    assert not any("--group" in note for note in list_images(tmp_path / "others").notes)
