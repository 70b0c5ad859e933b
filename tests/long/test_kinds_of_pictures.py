"""Kinds of pictures: every suffix of Pillow, links, broken EXIF blocks, limits, several pictures in a file."""

import io
import os
import shutil
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import tiny
from PIL import Image, features
from test_pictures import classes, opened, rows_of

from images.cache_files import caches, limit_caches
from images.check import check, format_check
from images.decode import Rules, decode, read_header, try_decode
from images.folders import find_image_set
from images.opening import Opening, open_data_set
from images.walk import find_images
from reports.sheets import load_picture
from utils import UserError

SUFFIXES = [
    *(".jpg", ".jfif", ".jpe", ".JPG", ".png", ".bmp", ".gif", ".tif", ".webp", ".tga", ".ppm", ".pbm", ".jp2"),
    *(".ico", ".pcx", ".sgi", ".dds", ".avif", ".qoi"),
]


def can_write(suffix):
    kind = Image.registered_extensions().get(suffix.lower())
    return kind in Image.SAVE and (suffix != ".avif" or features.check("avif"))


def test_every_suffix_of_pillow_counts_and_the_rest_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "amp-train")
    Image.init()
    written = [suffix for suffix in SUFFIXES if can_write(suffix)]
    assert len(written) >= 16
    for number, suffix in enumerate(written):
        path = tmp_path / "cat" / f"{number}{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.new("1" if suffix == ".pbm" else "RGB", (8, 8)).save(path)
    shutil.copy(tmp_path / "cat" / "0.jpg", tmp_path / "cat" / "photo")  # by its content
    for number, name in enumerate(("notes.txt", "a.xml", "b.XML", "c.pdf", "README")):
        (tmp_path / "cat" / name).write_bytes(b"%PDF-1.4" if number == 3 else b"no picture")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"")
    tiny.save_noise(tmp_path / "dog" / "1.png")
    found = find_image_set(tmp_path)
    assert len(found.train) == len(written) + 2
    assert found.passed_over == Counter({".xml": 2, ".txt": 1, ".pdf": 1, "without a suffix": 1})
    assert found.remarks() == ["passed over as no images: 2 .xml, 1 .pdf, 1 .txt, 1 without a suffix"]
    report = check(tmp_path)
    assert report["unreadable"] == {} and report["passed_over"][".xml"] == 2
    assert "passed over: .xml: 2, " in format_check(report)


def test_links_are_followed_and_loops_end(tmp_path):
    outside = classes(tmp_path / "elsewhere", names=("more",), count=3)
    root = classes(tmp_path / "data", count=2)
    (root / "cat" / "linked").symlink_to(outside / "more")
    (root / "emu").symlink_to(outside / "more", target_is_directory=True)
    (root / "dog" / "loop").symlink_to(root / "dog")
    (root / "dog" / "gone.png").symlink_to(root / "nothing.png")
    found = find_image_set(root)
    assert Counter(found.classes[label] for _, label in found.train) == {"cat": 5, "emu": 3, "dog": 3}
    assert try_decode(root / "dog" / "gone.png", None) == "a link to a file that does not exist"
    assert len(list(find_images(root))) == 8  # the folder that is linked twice is walked once


def damage_exif(path):
    """Insert an unreadable EXIF block into a file without changing its pixels."""
    content = path.read_bytes()
    block = b"II*\0\xff\xff\xff\x7f garbage"
    if path.suffix == ".png":
        chunk = b"eXIf" + block
        whole = struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:33] + whole + content[33:])
    elif path.suffix == ".jpg":
        path.write_bytes(
            content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + content[2:]
        )
    else:
        Image.open(io.BytesIO(content)).save(path, lossless=True, exif=b"Exif\0\0 no TIFF at all")


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_an_orientation_that_cannot_be_read_is_none(tmp_path, suffix):
    root = classes(tmp_path, count=4)
    broken = tiny.save_noise(root / "cat" / f"broken{suffix}", 3, **({"lossless": True} if suffix == ".webp" else {}))
    sound = decode(broken)
    damage_exif(broken)
    assert np.array_equal(decode(broken), sound)
    assert check(tmp_path)["unreadable"] == {}
    assert read_header(broken, Rules()).size == (10, 12)
    opened(tmp_path)


def test_one_limit_for_every_command(tmp_path):
    root = classes(tmp_path, count=3)
    tiny.save_noise(root / "cat" / "large.png", size=(300, 200))
    assert check(root, rules=Rules(max_megapixels=0.06))["unreadable"] == {}
    reason = check(root, rules=Rules(max_megapixels=0.05))["unreadable"]["cat/large.png"]
    assert "larger than --max_megapixels allows" in reason
    assert try_decode(root / "cat" / "large.png", 16, Rules(max_megapixels=0.05)) == reason
    with pytest.raises(UserError, match="larger than --max_megapixels allows"):
        open_data_set(root, image_size=16, seed=1, opening=Opening(rules=Rules(max_megapixels=0.05)))
    Image.new("L", (12000, 10000)).save(root / "cat" / "photo.png")  # 120 megapixels, as today's telephones take
    assert decode(root / "cat" / "photo.png", 16).shape == (16, 16, 3)


def test_several_pictures_in_a_file_are_said_once(tmp_path, caplog):
    caplog.set_level("INFO", "amp-train")
    root = classes(tmp_path, count=4)
    frames = [Image.new("RGB", (12, 10), (shade, 0, 0)) for shade in (10, 200)]
    frames[0].save(root / "cat" / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(root / "cat" / "pages.tif", save_all=True, append_images=frames[1:])
    assert decode(root / "cat" / "moving.gif")[0, 0].tolist() == [10, 0, 0]
    opened(root)
    assert [text for text in caplog.messages if "several pictures" in text] == [
        "2 files hold several pictures: the first of each is used"
    ]
    assert check(root)["several"] == ["cat/moving.gif", "cat/pages.tif"]


def test_caches_are_limited_the_oldest_go_first(tmp_path):
    root = classes(tmp_path, count=8)
    for number, size in enumerate((16, 12, 10)):
        opened(root, size)
        for cache in caches(root / ".cache")[number:]:
            os.utime(cache.file.with_suffix(".json"), (number, number))
            os.utime(cache.file, (number, number))
    first, second, third = caches(root / ".cache")
    limit_caches(root / ".cache", second.size + third.size, keep=third.file)
    assert caches(root / ".cache") == [second, third]
    limit_caches(root / ".cache", 1, keep=third.file)
    assert caches(root / ".cache") == [third]


def test_a_run_reads_pictures_as_it_was_trained_in_every_command(tmp_path, run):
    """Squashed, these stripes would be as wide as they are tall; padded, a third of the image is picture."""
    for place in range(30):
        tiny.save_noise(tmp_path / "data" / "ab"[place % 2] / f"{place}.png", place, (60, 20))
    place = [f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run"]
    for how, whole in (("pad", 60), ("crop", 20)):
        assert tiny.train(tmp_path / "data", tmp_path, f"--resize={how}", "--image_size=60", "--overwrite") == 0
        assert tiny.train(tmp_path / "data", tmp_path, "--image_size=60", "--resume") == 2
        assert tiny.config(tmp_path / "run")["dataset"]["resize"] == how
        expected = {row["path"]: row for row in rows_of(tmp_path / "run" / "predictions.csv")}
        (tmp_path / "run" / "config.json").rename(tmp_path / "config.json")  # the checkpoint says it, too
        for words in ([*place], [f"--checkpoint={tmp_path / 'run' / 'best_model.pt'}"]):
            status, _, error = run(["predict", str(tmp_path / "data"), *words, f"--csv={tmp_path / 'found.csv'}"])
            assert status == 0, error
            found = {"/".join(row["path"].split("/")[-2:]): row for row in rows_of(tmp_path / "found.csv")}
            for path, row in expected.items():
                assert float(found[path]["confidence"]) == pytest.approx(float(row["confidence"]), abs=2e-6)
        assert load_picture(tmp_path / "data" / "a" / "0.png", 224, Rules(resize=how)).shape == (whole, whole, 3)
        (tmp_path / "config.json").rename(tmp_path / "run" / "config.json")
