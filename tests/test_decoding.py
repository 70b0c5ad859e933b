"""Files to pixels: which formats are opened at all, which picture of a file is used, and which values it gets.

Hostile and unusual files are written here byte by byte or by Pillow, and read by the functions that every command uses.
"""

import ast
import os
from pathlib import Path

import pytest
import tiny
from PIL import EpsImagePlugin

from images.check import check
from images.decode import Rules, read_header, try_decode, value_range
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


def draw(path: Path, seed: int = 0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.noise(seed).save(path, **options)
    return path


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program called gs, first in PATH, that leaves a file when it is started."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    monkeypatch.setattr(EpsImagePlugin, "gs_windows_binary", None)
    return started


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.eps", "photo"])
def test_no_file_starts_ghostscript(name, tmp_path, ghostscript):
    for seed in range(8):
        draw(tmp_path / "data" / ("a" if seed % 2 else "b") / f"{seed}.png", seed)
    (tmp_path / "data" / "a" / name).write_bytes(POSTSCRIPT)
    file = tmp_path / "data" / "a" / name
    assert try_decode(file, None) == "no image, or of a kind that is not read"
    assert read_header(file, Rules()) is None
    assert value_range(file, Rules()) == "no image, or of a kind that is not read"
    listed = [path.name for path in find_images(tmp_path / "data" / "a")]
    assert (name in listed) == name.endswith((".jpg", ".png"))  # a picture's suffix counts, and is then refused
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
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            opens = ast.unparse(call.func) in ("Image.open", "PIL.Image.open")
            if opens and "formats" not in [word.arg for word in call.keywords]:
                without.append(f"{path.name}:{call.lineno}")
    assert without == []
