"""`prepare --archive`: a zip is unpacked whole or refused, and what is not unpacked is said.

Archives are written here as other programs write them. What is hostile or damaged is in test_prepare.py.
"""

import os
import zipfile

import pytest
from test_prepare import contents, make_zip, picture

from commands import prepare
from images import archive
from images.folders import find_image_set
from utils import UserError


def named(*classes, top="", parts=("train", "test")) -> dict[str, bytes]:
    places = [f"{top}{part}/{name}/{index}.png" for part in parts for name in classes for index in range(2)]
    return {place: picture(seed) for seed, place in enumerate(places)}


class RawInfo(zipfile.ZipInfo):
    """A member whose name is written in a code page, and not marked as Unicode, as Windows does it."""

    def __init__(self, name: bytes):
        super().__init__(name.hex())
        self.raw = name

    def _encodeFilenameFlags(self):
        return self.raw, self.flag_bits & ~0x800


def raw_zip(path, members):
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in members.items():
            opened.writestr(RawInfo(name), content)
    return path


def unpacked(tmp_path, members, **options):
    prepare.extract_archive(make_zip(tmp_path / "a.zip", members), tmp_path / "data", **options)
    return tmp_path / "data"


@pytest.mark.parametrize("encoding", ["cp932", "gbk", "cp866", "cp1252"])
def test_a_code_page_is_asked_for_and_then_used(encoding, tmp_path):
    classes = {"cp932": ("森", "表"), "gbk": ("森林", "海洋"), "cp866": ("лес", "море"), "cp1252": ("Grün", "Weiß")}
    members = {name.encode(encoding): content for name, content in named(*classes[encoding]).items()}
    file = raw_zip(tmp_path / "a.zip", members)
    with pytest.raises(UserError, match="code page.*--archive_encoding"):
        prepare.extract_archive(file, tmp_path / "data")
    for wrong in ("ascii", "no-such-page"):
        with pytest.raises(UserError, match=f"are not in {wrong}"):
            prepare.extract_archive(file, tmp_path / "data", encoding=wrong)
    assert not (tmp_path / "data").exists()
    prepare.extract_archive(file, tmp_path / "data", encoding=encoding)
    assert find_image_set(tmp_path / "data").classes == sorted(classes[encoding])


def test_unicode_without_its_mark_is_read(tmp_path):
    """As macOS and older programs of Linux write it."""
    members = {name.encode(): content for name, content in named("été", "forêt").items()}
    prepare.extract_archive(raw_zip(tmp_path / "a.zip", members), tmp_path / "data")
    assert find_image_set(tmp_path / "data").classes == ["forêt", "été"]


def test_backslashes_are_folders(tmp_path):
    members = {b"train\\": b"", b"train\\sea\\": b""}
    members |= {name.replace("/", "\\").encode(): content for name, content in named("sea", "forest").items()}
    prepare.extract_archive(raw_zip(tmp_path / "a.zip", members), tmp_path / "data")
    assert contents(tmp_path / "data") == named("sea", "forest")


@pytest.mark.parametrize("top", ["", "data/", "a/b/c/", "Archive/"])
def test_folders_that_hold_all_the_rest_are_left_out(top, tmp_path):
    assert contents(unpacked(tmp_path, named("sea", "forest", top=top))) == named("sea", "forest")


def test_a_part_that_holds_all_the_rest_stays(tmp_path):
    members = named("sea", "forest", parts=("train",))
    assert contents(unpacked(tmp_path, members)) == members


@pytest.mark.parametrize("parts", [("Training", "Testing"), ("TRAIN", "Val"), ("train images", "valid")])
def test_parts_are_found_as_in_any_folder(parts, tmp_path):
    found = find_image_set(unpacked(tmp_path, named("sea", "forest", parts=parts) | {"README.txt": b"x"}))
    assert (found.classes, len(found.train), len(found.test)) == (["forest", "sea"], 4, 4)
    assert (tmp_path / "data" / "README.txt").exists()


def test_two_data_sets_are_both_unpacked_and_named(tmp_path, caplog):
    caplog.set_level("INFO")
    members = named("sea", "forest", top="part1/") | named("sea", "forest", top="part2/")
    assert contents(unpacked(tmp_path, members)) == members
    assert "16 images are in" in caplog.text
    assert all(f"perhaps you mean --data_dir {tmp_path / 'data' / part}" in caplog.text for part in ("part1", "part2"))


def test_two_spellings_of_one_part_lose_no_image(tmp_path, caplog):
    members = {"train/cat/1.png": picture(0), "Training/cat/1.png": picture(1), "train/dog/1.png": picture(2)}
    members |= {"Training/dog/1.png": picture(3)}
    assert contents(unpacked(tmp_path, members)) == members
    assert "Training and train could hold the train images" in caplog.text


@pytest.mark.parametrize(
    "one, other",
    [
        ("train/cat/1.png", "train/cat/1.PNG"),
        ("train/Cat/1.png", "train/cat/1.png"),
        ("train/é/1.png", "train/e\u0301/1.png"),
        ("train/cat/1.png", "train//cat/1.png"),
        ("train/cat", "train/cat/1.png"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_names_that_some_system_takes_for_one_are_refused(one, other, order, tmp_path):
    members = named("sea", "forest") | dict([(one, picture(0)), (other, picture(1))][::order])
    with pytest.raises(UserError, match="not safe to unpack.*Nothing was written"):
        unpacked(tmp_path, members)
    assert os.listdir(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("name", ["a.jpg:hidden.exe", "train/sea/1.png:x", "train/sea/1.png.", "train/sea /1.png"])
def test_streams_and_names_that_windows_changes_are_refused_there(name, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "WINDOWS", True)
    with pytest.raises(UserError, match="not a file name on Windows"):
        unpacked(tmp_path, named("sea", "forest") | {name: b"x"})


def test_a_name_with_a_zero_byte_is_refused(tmp_path):
    members = {name.encode(): content for name, content in named("sea", "forest").items()}
    with pytest.raises(UserError, match="points outside"):
        prepare.extract_archive(raw_zip(tmp_path / "a.zip", members | {b"train/x\0.png": b"x"}), tmp_path / "data")


def test_what_is_not_unpacked_is_said(tmp_path, caplog):
    inner = make_zip(tmp_path / "inner.zip", named("sea", "forest")).read_bytes()
    hidden = {"train/.thumbs/1.png": picture(0), "__MACOSX/train/._1.png": b"x"}
    data = unpacked(tmp_path, named("sea", "forest") | hidden | {"more.zip": inner})
    assert "1 hidden image is not unpacked, such as train/.thumbs/1.png" in caplog.text
    assert "1 archive in it is to be unpacked by hand" in caplog.text and "more.zip" in caplog.text
    assert (data / "more.zip").read_bytes() == inner


def test_class_folders_and_tables_are_unpacked_and_named(tmp_path, caplog):
    caplog.set_level("INFO")
    members = {f"photos/{name}/{index}.png": picture(index) for name in ("sea", "forest") for index in range(3)}
    assert find_image_set(unpacked(tmp_path, members)).classes == ["forest", "sea"]
    assert "6 train, in 2 classes" in caplog.text
    table = {"images/1.png": picture(0), "images/2.png": picture(1), "labels.csv": b"image,label\n1,a\n2,b\n"}
    prepare.extract_archive(make_zip(tmp_path / "b.zip", table), tmp_path / "other")
    assert f"add --labels {tmp_path / 'other' / 'labels.csv'}" in caplog.text
