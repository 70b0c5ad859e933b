"""Which picture of a file is used, and which files are none: bands, camera raw, previews, phone photos, pages."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image, TiffImagePlugin

from images.check import check, format_check
from images.decode import Rules, decode, read_header, try_decode
from images.folders import find_image_set


def tiff(bands: int, photometric: int, extra: tuple = ()) -> bytes:
    """Return an uncompressed little-endian TIFF of 4 x 2 pixels of 8 bits; `extra` are its extra samples."""
    pixels = np.arange(8 * bands).astype("u1").tobytes()
    tags = {256: 4, 257: 2, 259: 1, 262: photometric, 273: 8, 277: bands, 278: 2, 279: len(pixels)}
    entries = {tag: struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()}
    if extra:
        entries[338] = struct.pack("<HHI", 338, 3, len(extra)) + struct.pack(f"<{len(extra)}H", *extra).ljust(4, b"\0")
    start = 8 + len(pixels)
    entries[258] = struct.pack("<HHII", 258, 3, bands, start + 2 + 12 * (len(entries) + 1) + 4)
    table = b"".join(entries[tag] for tag in sorted(entries))
    header = b"II*\0" + struct.pack("<I", start) + pixels
    return header + struct.pack("<H", len(entries)) + table + bytes(4) + struct.pack("<H", 8) * bands


@pytest.mark.parametrize("bands, photometric, extra", [(5, 1, ()), (5, 2, (0, 0)), (7, 1, (0, 0))])
def test_more_bands_than_a_picture_has_are_refused(tmp_path, bands, photometric, extra):
    (tmp_path / "x.tif").write_bytes(tiff(bands, photometric, extra))
    reason = try_decode(tmp_path / "x.tif", None)
    assert isinstance(reason, str) and f"{bands} bands" in reason and "RGB" in reason
    (tmp_path / "x.tif").write_bytes(tiff(3, 2))
    assert decode(tmp_path / "x.tif")[0, 1].tolist() == [3, 4, 5]


RED = Image.new("RGB", (16, 12), "red")


BLUE = Image.new("RGB", (300, 200), "blue")


def test_a_preview_is_not_taken_for_the_picture(tmp_path):
    RED.save(tmp_path / "x.tif", save_all=True, append_images=[BLUE], tiffinfo={254: 1})
    assert "preview" in try_decode(tmp_path / "x.tif", None)
    RED.save(tmp_path / "below.tif", tiffinfo={254: 1, 330: 8})  # the full picture is below the first, as in DNG
    assert "preview" in try_decode(tmp_path / "below.tif", None)
    RED.save(tmp_path / "alone.tif", tiffinfo={254: 1})
    assert decode(tmp_path / "alone.tif")[0, 0].tolist() == [255, 0, 0]


def test_what_is_made_from_the_first_picture_is_no_other_one(tmp_path):
    """Gain maps and views of phone photos, smaller copies in a TIFF."""
    small = BLUE.resize((30, 20))
    BLUE.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[small])
    with Image.open(tmp_path / "phone.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    with TiffImagePlugin.AppendingTiffWriter(str(tmp_path / "overviews.tif"), True) as writer:
        for picture, tags in ((BLUE, {}), (small, {254: 1})):
            picture.save(writer, "TIFF", tiffinfo=tags)
            writer.newFrame()
    RED.save(tmp_path / "pages.tif", save_all=True, append_images=[BLUE])
    several = {name: read_header(tmp_path / name, Rules()).several for name in os.listdir(tmp_path)}
    assert several == {"phone.jpg": False, "overviews.tif": False, "pages.tif": True}


@pytest.mark.parametrize("name", ["x.nef", "x.DNG"])
def test_camera_raw_is_passed_over_with_a_word(tmp_path, name):
    for number in range(4):
        tiny.save_noise(tmp_path / "ab"[number % 2] / f"{number}.png", number)
    RED.save(tmp_path / "a" / name, format="TIFF", save_all=True, append_images=[BLUE], tiffinfo={254: 1})
    found = find_image_set(tmp_path)
    assert len(found.train) == 4
    (remark,) = found.remarks()
    assert f"1 {Path(name).suffix.lower()}" in remark and "1 file of camera raw: convert" in remark
    assert "camera raw: convert" in format_check(check(tmp_path))
    assert "camera raw" in try_decode(tmp_path / "a" / name, None)
