"""Data on disk: drawn scenes, archives good, damaged and hostile, the check.

Everything is made here in temporary folders; no network. Run it alone: pytest tests/test_prepare.py
"""

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import struct
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from commands import prepare
from images import scenes
from images.demo import draw_demo
from images.folders import find_image_set
from utils import RunError, UserError

LAYOUT = [
    f"seg_{split}/seg_{split}/{name}/{index}.jpg"
    for split in ("train", "test")
    for name in ("forest", "sea")
    for index in range(3)
]


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    tiny.noise(seed, size).convert(mode).save(stream, "PNG")
    return stream.getvalue()


def files(top: str = "") -> dict[str, bytes]:
    return {top + name: picture(seed) for seed, name in enumerate(LAYOUT)}


def make_zip(path: Path, members: dict[str, bytes], *extra: zipfile.ZipInfo) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for info in extra:
            archive.writestr(info, b"target")
    return path


# -------------------------------------------------------------------------------- demo scenes
def test_demo_layout_and_balance(tmp_path):
    draw_demo(tmp_path / "demo", train_images=20, test_images=12)
    counts = {
        split: [len(list((tmp_path / "demo" / split / split / name).glob("*.jpg"))) for name in scenes.CLASSES]
        for split in ("seg_train", "seg_test")
    }
    assert counts == {"seg_train": [4, 4, 3, 3, 3, 3], "seg_test": [2] * 6}
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["train_images"] == 20
    assert not (tmp_path / "demo" / ".partial").exists()
    for path in (tmp_path / "demo").rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (150, 150), "RGB")


def test_demo_depends_on_seed_split_class_and_index_alone(tmp_path):
    draw_demo(tmp_path / "one", train_images=24, test_images=12)
    draw_demo(tmp_path / "many", train_images=60, test_images=12)
    draw_demo(tmp_path / "other", train_images=24, test_images=12, seed=1)
    one, many, other = (contents(tmp_path / name) for name in ("one", "many", "other"))
    images = [name for name in one if name.endswith(".jpg")]
    assert len(images) == 36
    assert all(one[name] == many[name] for name in images)
    assert all(one[name] != other[name] for name in images)
    digests = [hashlib.sha256(content).digest() for name, content in many.items() if name.endswith(".jpg")]
    assert len(set(digests)) == 72, "every picture, of train and test alike, is another one"


def test_demo_is_drawn_once_and_never_over_other_data(tmp_path, monkeypatch):
    draw_demo(tmp_path / "demo", train_images=12, test_images=12)
    before = contents(tmp_path / "demo")
    monkeypatch.setattr("images.demo.draw_scene", lambda *_: pytest.fail("drawn again"))
    draw_demo(tmp_path / "demo", train_images=12, test_images=12)
    with pytest.raises(UserError, match="already holds demo.json, seg_test, seg_train"):
        draw_demo(tmp_path / "demo", train_images=18, test_images=12)
    assert contents(tmp_path / "demo") == before
    with pytest.raises(UserError, match="cannot write"):
        draw_demo(tmp_path / "demo" / "demo.json", train_images=12, test_images=12)


def test_two_at_once_draw_one_whole_data_set(tmp_path, monkeypatch, capsys):
    started = threading.Event()

    def slowly(name, random, size):
        started.set()
        time.sleep(0.005)
        return scenes.draw_scene(name, random, size)

    monkeypatch.setattr("images.demo.draw_scene", slowly)
    other = threading.Thread(target=draw_demo, args=[tmp_path / "demo"], kwargs={"train_images": 18, "test_images": 6})
    other.start()
    started.wait()
    draw_demo(tmp_path / "demo", train_images=18, test_images=6)
    other.join()
    assert len(list((tmp_path / "demo").rglob("*.jpg"))) == 24 and "waiting for it" in capsys.readouterr().err


def left_by_a_kill(folder: Path) -> None:
    """Write the files that a killed process leaves; they are never taken for a data set."""
    (folder / ".partial" / "seg_train").mkdir(parents=True)
    (folder / ".partial" / "seg_train" / "half.jpg").write_bytes(b"half")
    with pytest.raises(UserError, match="only a part of a data set"):
        find_image_set(folder)


def test_scenes_are_varied_and_not_flat():
    for label, name in enumerate(scenes.CLASSES):
        randoms = [np.random.default_rng([7, label, index]) for index in range(6)]
        pictures = [np.asarray(scenes.draw_scene(name, random)) for random in randoms]
        means = np.array([pixels.mean() for pixels in pictures])
        assert means.std() > 10, f"the light in {name} hardly changes"
        assert min(pixels.std() for pixels in pictures) > 3, f"an empty picture in {name}"


# ----------------------------------------------------------------------------------- archives
@pytest.mark.parametrize("name, top", [("data.zip", ""), ("named.wrongly", "./"), ("data.zip", "a/b/")])
def test_archive_unpacks_into_the_layout(tmp_path, name, top):
    junk = {f"{top}.DS_Store": b"x", "__MACOSX/seg_train/._1.jpg": b"x", f"{top}seg_train/Thumbs/.hidden": b"x"}
    prepare.extract_archive(make_zip(tmp_path / name, files(top) | junk), tmp_path / "data")
    assert contents(tmp_path / "data") == files()
    assert sorted(os.listdir(tmp_path / "data")) == ["seg_test", "seg_train"]


def link_info(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (mode | 0o777) << 16
    return info


HOSTILE_NAMES = [
    *("/etc/evil.jpg", "../evil.jpg", "seg_train/../../evil.jpg", "..\\evil.jpg", "seg_train\\..\\..\\evil"),
    *("C:\\evil.jpg", "C:evil.jpg", "\\\\server\\share\\evil.jpg", "\\evil.jpg", "seg_train/" + "x" * 300),
    *("seg_train/seg_train/sea/0.jpg/evil.jpg", "a/" * 40 + "evil.jpg"),
]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_names_links_and_devices_write_nothing(tmp_path):
    kinds = {"link": stat.S_IFLNK, "pipe": stat.S_IFIFO, "disk": stat.S_IFBLK}
    hostile = [zipfile.ZipInfo(name) for name in HOSTILE_NAMES]
    hostile += [link_info(f"seg_train/{name}", mode) for name, mode in kinds.items()]
    for info in [*hostile, zipfile.ZipInfo(LAYOUT[0])]:
        archive = make_zip(tmp_path / "evil.zip", files(), info)
        with pytest.raises(UserError, match="not safe to unpack" if info in hostile else "occurs twice"):
            prepare.extract_archive(archive, tmp_path / "sub" / "data")
        assert os.listdir(tmp_path) == ["evil.zip"], info.filename


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "bomb.zip", files() | {"seg_train/zeros.bin": bytes(40 * 2**20)})
    with pytest.raises(UserError, match="bomb"):
        prepare.extract_archive(archive, tmp_path / "data")
    assert os.listdir(tmp_path) == ["bomb.zip"]
    monkeypatch.setattr("images.archive.MAX_MEMBERS", 11)
    with pytest.raises(UserError, match="12 files .*bomb"):
        prepare.extract_archive(make_zip(tmp_path / "many.zip", files()), tmp_path / "data")


def test_a_size_that_lies_is_noticed(tmp_path):
    archive = make_zip(tmp_path / "lie.zip", files())
    content = bytearray(archive.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 10)  # the uncompressed size in the directory
    archive.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        prepare.extract_archive(archive, tmp_path / "data")
    assert not (tmp_path / "data" / "seg_train").exists()


def test_damaged_and_wrong_archives(tmp_path):
    good_zip = make_zip(tmp_path / "a.zip", files())
    flipped = bytearray(good_zip.read_bytes())
    flipped[200] ^= 255
    locked = bytearray(good_zip.read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    locked[6] |= 1
    cases = {
        "half.zip": (good_zip.read_bytes()[:900], "damaged"),
        "flipped.zip": (bytes(flipped), "damaged"),
        "locked.zip": (bytes(locked), "password"),
        "page.zip": (b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        "empty.zip": (b"", "not a .zip archive"),
        "image.zip": (picture(0), "not a .zip archive"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            prepare.extract_archive(tmp_path / name, tmp_path / "data")
        assert name in str(caught.value)
        assert not (tmp_path / "data" / "seg_train").exists(), name
    with pytest.raises(UserError, match="no such file"):
        prepare.extract_archive(tmp_path / "absent.zip", tmp_path / "data")
    with pytest.raises(UserError, match="no such file"):
        prepare.extract_archive(tmp_path, tmp_path / "data")
    with pytest.raises(UserError, match="--data_dir"):
        prepare.extract_archive(good_zip, tmp_path / "empty.zip" / "data")
    prepare.extract_archive(good_zip, tmp_path / "data")
    assert contents(tmp_path / "data") == files(), "what damaged archives left is gone"


def test_existing_data_is_left_alone(tmp_path):
    archive = make_zip(tmp_path / "a.zip", files())
    prepare.extract_archive(archive, tmp_path / "data")
    (tmp_path / "data" / LAYOUT[0]).write_bytes(b"edited")
    with pytest.raises(UserError, match="already holds seg_test, seg_train"):
        prepare.extract_archive(archive, tmp_path / "data")
    assert (tmp_path / "data" / LAYOUT[0]).read_bytes() == b"edited"
    (tmp_path / "mine" / "seg_pred").mkdir(parents=True)
    archive = make_zip(tmp_path / "b.zip", files() | {"seg_pred/seg_pred/1.jpg": b"x"})
    with pytest.raises(UserError, match="already holds seg_pred"):
        prepare.extract_archive(archive, tmp_path / "mine")


def test_interrupted_extraction_is_no_data_set_and_starts_anew(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.bin", files())
    real = shutil.copyfileobj
    copied = []

    def stop_at_six(*arguments):
        if len(copied) == 6:
            raise KeyboardInterrupt
        copied.append(arguments)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "copyfileobj", stop_at_six)
        with pytest.raises(KeyboardInterrupt):
            prepare.extract_archive(archive, tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []
    left_by_a_kill(tmp_path / "data")
    prepare.extract_archive(archive, tmp_path / "data")
    assert contents(tmp_path / "data") == files()


def test_train_is_moved_into_place_last(tmp_path, monkeypatch):
    """A stop between the renames leaves val/ without train/, which is no data set; the next call ends it."""
    named = {
        name.replace("seg_train/seg_train", "train").replace("seg_test/seg_test", "val"): content
        for name, content in files().items()
    }
    archive = make_zip(tmp_path / "a.zip", named)
    real = os.replace
    moved = []

    def stop_after_one(source, target):
        if Path(target).parent == tmp_path / "data":
            if moved:
                raise KeyboardInterrupt
            moved.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            prepare.extract_archive(archive, tmp_path / "data")
    assert sorted(os.listdir(tmp_path / "data")) == [".partial", "val"]
    prepare.extract_archive(archive, tmp_path / "data")
    assert contents(tmp_path / "data") == named


def test_full_disk_names_what_to_free(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / "a.zip", files())
    usage = types.SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(RunError, match=r"free 64\.0 MB more"):
            prepare.extract_archive(archive, tmp_path / "data")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(RunError, match="is full"):
            prepare.extract_archive(archive, tmp_path / "data")
    prepare.extract_archive(archive, tmp_path / "data")
    assert contents(tmp_path / "data") == files()


# -------------------------------------------------------------------------------------- check
def test_check_counts_and_finds_what_is_wrong(tmp_path):
    for seed, name in enumerate(LAYOUT):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))
    train = tmp_path / "seg_train" / "seg_train"
    test = tmp_path / "seg_test" / "seg_test"
    (train / "sea" / "copy.jpg").write_bytes((train / "sea" / "1.jpg").read_bytes())  # within a class
    (train / "forest" / "same.jpg").write_bytes((train / "sea" / "2.jpg").read_bytes())  # two labels
    (test / "sea" / "leak.jpg").write_bytes((train / "sea" / "0.jpg").read_bytes())  # train and test
    (train / "sea" / "grey.png").write_bytes(picture(50, "L", (5, 9)))
    (train / "sea" / "cut\nshort.jpg").write_bytes(picture(51, size=(90, 90))[:700])
    (train / "sea" / "zero.jpg").write_bytes(b"")
    (train / "sea" / "text.jpg").write_bytes(b"not an image at all")
    with pytest.raises(UserError):
        prepare.check(tmp_path / "nothing")
    report = prepare.check(tmp_path)
    assert report["classes"] == ["forest", "sea"]
    assert report["counts"] == {"train": {"forest": 4, "sea": 8}, "test": {"forest": 3, "sea": 4}}
    assert report["balance"] == {"train": 2.0, "test": 1.333}
    assert report["sizes"] == {"8x6": 15, "5x9": 1}
    assert report["modes"] == {"RGB": 15, "L": 1}
    assert {Path(name).name for name in report["unreadable"]} == {"cut\nshort.jpg", "zero.jpg", "text.jpg"}
    assert len(report["duplicates"]) == 3
    assert [sorted(Path(path).name for path in group) for group in report["across_splits"]] == [["0.jpg", "leak.jpg"]]
    assert [sorted(Path(path).name for path in group) for group in report["across_labels"]] == [["2.jpg", "same.jpg"]]
    json.dumps(report)
    text = prepare.format_check(report, most=2)
    assert "unreadable files: 3" in text and "and 1 more" in text and "leak.jpg" in text
    assert "cut\\nshort.jpg" in text, "a line break in a name does not break the line"
    assert "train and test: 1" in text and "two labels: 1" in text
