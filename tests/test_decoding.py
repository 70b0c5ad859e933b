"""Files to pixels: which formats are opened at all, which picture of a file is used, and which values it gets.

Hostile and unusual files are written here byte by byte or by Pillow, and read by the functions that every command uses.
"""

import ast
import os

import numpy as np
import pytest
import tiny
from PIL import EpsImagePlugin, Image

import images.decode
from images.check import check, format_check
from images.decode import Rules, decode, read_header, try_decode, value_range
from images.walk import find_images

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
WINDOWS_METAFILE = b"\xd7\xcd\xc6\x9a" + bytes(6) + b"\x64\x00\x64\x00" + b"\x60\x00" + bytes(6) + b"\x01\x00\x09\x00"
HANDLED = {  # formats that Pillow hands to a program or to a handler, by the first bytes of a file
    "PostScript": POSTSCRIPT,
    "PostScript in a DOS binary": b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + bytes(22) + POSTSCRIPT,
    "Windows metafile": WINDOWS_METAFILE,
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "GRIB": b"GRIB\0\0\0\1" + bytes(64),
    "BUFR": b"BUFR" + bytes(64),
    "compound file (MIC, FPX)": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1016),
}


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """Put a program called gs first in PATH that writes a file when it is started."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    monkeypatch.setattr(EpsImagePlugin, "gs_windows_binary", None)
    return started


@pytest.mark.parametrize("name", ["photo.jpg", "photo.eps"])
def test_no_file_starts_ghostscript(name, tmp_path, ghostscript):
    for seed in range(4):
        tiny.save_noise(tmp_path / "data" / "ab"[seed % 2] / f"{seed}.png", seed)
    (tmp_path / "data" / "a" / name).write_bytes(POSTSCRIPT)
    file = tmp_path / "data" / "a" / name
    assert try_decode(file, None) == "no image, or of a kind that is not read"
    assert read_header(file, Rules()) is None
    assert value_range(file, Rules()) == "no image, or of a kind that is not read"
    listed = [path.name for path in find_images(tmp_path / "data" / "a")]
    assert (name in listed) == name.endswith(".jpg")  # a picture's suffix counts, and is then refused
    assert ("a/" + name in check(tmp_path / "data")["unreadable"]) == (name in listed)
    assert not ghostscript.exists()


@pytest.mark.parametrize("kind", HANDLED)
def test_formats_that_need_a_handler_are_not_opened(kind, tmp_path, monkeypatch):
    opened = []
    for plugin in ("WmfImagePlugin", "Hdf5StubImagePlugin", "GribStubImagePlugin", "BufrStubImagePlugin"):
        module = __import__(f"PIL.{plugin}", fromlist=[plugin])
        handler = type("Handler", (), {"open": lambda *_: opened.append(1), "load": lambda *_: opened.append(2)})()
        monkeypatch.setattr(module, "_handler", handler, raising=False)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: opened.append(3))
    file = tmp_path / "photo.jpg"
    file.write_bytes(HANDLED[kind])
    assert try_decode(file, None) == "no image, or of a kind that is not read"
    assert opened == []


def test_every_image_is_opened_with_a_list_of_formats():
    """In the whole program, as Pillow tries all formats if it is given none."""
    without = []
    for path in tiny.ROOT.rglob("*.py"):
        if path.relative_to(tiny.ROOT).parts[0] in ("tests", "build"):
            continue
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text if "Image.open" in text else "")
        for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
            opens = ast.unparse(call.func) in ("Image.open", "PIL.Image.open")
            if opens and "formats" not in [word.arg for word in call.keywords]:
                without.append(f"{path.name}:{call.lineno}")
    assert without == []


# ------------------------------------------------------------------------------------- photographs
@pytest.mark.parametrize("orientation", [1, 2, 6, 7])
@pytest.mark.parametrize("size", [(1261, 809), (256, 4000)])
def test_a_photograph_is_decoded_smaller_to_the_same_picture(tmp_path, monkeypatch, orientation, size):
    file = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[274] = orientation
    tiny.noise(1, (10, 8)).resize(size, Image.Resampling.BICUBIC).save(file, exif=exif, quality=95)
    seen = []
    to_rgb = images.decode.to_rgb
    monkeypatch.setattr("images.decode.to_rgb", lambda image, window: seen.append(image.size) or to_rgb(image, window))
    found = decode(file, 64)
    whole = Image.fromarray(decode(file)).resize((64, 64), Image.Resampling.BILINEAR)
    difference = np.abs(np.asarray(whole).astype(int) - found)
    assert difference.mean() < 0.5 and difference.max() <= 5
    assert 128 <= min(seen[0]) < min(size)
    assert seen[1] == (size if orientation < 5 else size[::-1])


# ------------------------------------------------------------------------------------- values
STEPS = np.repeat(np.array([[0, 1000, 30000, 65535]], np.uint16), 3, 0)


@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bits_with_white_as_zero_are_no_negative(tmp_path, orientation):
    """PhotometricInterpretation 0, as scanners and X-ray exports write it."""
    tags = {274: orientation}
    Image.fromarray(65535 - STEPS).save(tmp_path / "white.tif", tiffinfo=tags | {262: 0})
    Image.fromarray(STEPS).save(tmp_path / "black.tif", tiffinfo=tags)
    assert np.array_equal(decode(tmp_path / "white.tif"), decode(tmp_path / "black.tif"))
    assert value_range(tmp_path / "white.tif", Rules()) == ("I;16", 0, 65535)
    narrow = Rules(windows={"I;16": (500, 30000)})
    assert np.array_equal(*(decode(tmp_path / name, None, narrow) for name in ("white.tif", "black.tif")))
    assert decode(tmp_path / "white.tif", None, narrow).max() == 255


@pytest.mark.parametrize("mode", ["1", "L", "F"])
def test_white_as_zero_of_other_depths_is_no_negative(tmp_path, mode):
    grey = Image.linear_gradient("L").resize((12, 10))
    grey = Image.fromarray(np.asarray(grey, np.float32) / 255) if mode == "F" else grey.convert(mode)
    grey.save(tmp_path / "black.tif")
    turned = Image.fromarray(1 - np.asarray(grey)) if mode == "F" else grey  # of the others Pillow writes the reverse
    turned.save(tmp_path / "white.tif", tiffinfo={262: 0})
    difference = decode(tmp_path / "white.tif").astype(int) - decode(tmp_path / "black.tif")
    assert np.abs(difference).max() <= 1


def test_a_folder_of_both_kinds_has_one_window_and_what_pillow_cannot_read_is_named(tmp_path):
    for number in range(8):
        values = STEPS // 4 + 100 * number
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        tags, values = ({262: 0}, 65535 - values) if number % 4 < 2 else ({}, values)
        Image.fromarray(values).save(tmp_path / "ab"[number % 2] / f"{number}.tif", tiffinfo=tags)
    assert check(tmp_path)["windows"] == {"I;16": [0, 65535 // 4 + 700]}
    Image.fromarray(STEPS.astype(">u2")).save(tmp_path / "x.tif", tiffinfo={262: 0})  # in the other order of bytes
    assert "a TIFF of 1 band of 16 bits" in try_decode(tmp_path / "x.tif", None)


# -------------------------------------------------------------------------------------- bands


def test_a_fourth_band_is_counted_as_transparency(tmp_path, capsys):
    numbers = np.random.default_rng(0)
    for number in range(6):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        pixels = numbers.integers(0, 256, (8, 8, 4), np.uint8)
        pixels[..., 3] = 255 if number == 5 else pixels[..., 3]  # an opaque one is none
        Image.fromarray(pixels).save(tmp_path / "ab"[number % 2] / f"{number}.tif")
    tiny.save_noise(tmp_path / "a" / "opaque.png")
    report = check(tmp_path)
    assert report["transparent"] == ["a/0.tif", "a/2.tif", "a/4.tif", "b/1.tif", "b/3.tif"]
    assert "(transparent pixels become white): 5" in format_check(report)


# ------------------------------------------------------------------------- pictures that are not square
@pytest.mark.parametrize(("size", "limit"), [((30, 11), 40), ((11, 30), 16), ((2001, 900), 100), ((700, 1999), 64)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_is_cropped_to_its_middle_or_padded_with_black(size, limit, orientation, tmp_path):
    """The middle is bright and the ends are dark; large JPEG files are decoded at a fraction of their size."""
    width, height = size
    short, long = sorted(size)
    values = np.full((height, width), 90, np.uint8)
    end = (long - short) // 2
    middle = np.s_[:, end : end + short] if width > height else np.s_[end : end + short]
    values[middle] = 210
    turned = Image.Exif()
    turned[0x0112] = orientation
    Image.fromarray(values).convert("RGB").save(tmp_path / "a.jpg", exif=turned, quality=95)
    found = {how: decode(tmp_path / "a.jpg", limit, Rules(resize=how)).astype(int) for how in ("crop", "pad", "squash")}
    header = read_header(tmp_path / "a.jpg", Rules())
    for how, pixels in found.items():
        shape = Rules(resize=how).shape(header.size)
        assert pixels.shape[:2] == (shape if max(shape) <= limit else (limit, limit))
    assert abs(found["crop"][2:-2, 2:-2] - 210).max() < 12
    padded = found["pad"][..., 0]
    if header.size[0] > header.size[1]:
        padded = padded.T
    side = len(padded)
    border = round((side - side * short / long) / 2)
    assert padded[: border - 2].max(initial=0) < 12 and padded[border - side + 2 - border :][-border + 2 :].max() < 12
    line = padded[side // 2]
    share = np.mean(line > 150)
    assert abs(share - short / long) < 3 / side + 0.02 and line[0] > 60 and line[-1] > 60
    assert (found["squash"] > 60).all()
