"""Archives that other programs and other systems made: names, separators, levels, archives in archives.

Some are written here as those programs write them, byte for byte; some by the programs that are installed here.
"""

import io
import os
import shutil
import struct
import subprocess
import unicodedata
import zipfile
import zlib
from pathlib import Path

import pytest
from test_prepare import contents, files, make_zip, picture

from commands import prepare
from images.folders import find_image_set
from utils import UserError

SPLITS = ("train", "test")


def named(*classes: str, top: str = "", between: str = "") -> dict[str, bytes]:
    return {
        f"{top}{split}/{between}{name}/{index}.png": picture(index)
        for split in SPLITS
        for name in classes
        for index in range(2)
    }


class RawInfo(zipfile.ZipInfo):
    """A member whose name is written in a code page, and not marked as Unicode, as Windows does it."""

    def __init__(self, name: bytes, system: int = 0):
        super().__init__(name.hex())
        self.raw = name
        self.create_system = system

    def _encodeFilenameFlags(self):
        return self.raw, self.flag_bits & ~0x800


def raw_zip(path: Path, members: dict[bytes, bytes], system: int = 0, extra=lambda name: b"") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = RawInfo(name, system)
            info.extra = extra(name)
            archive.writestr(info, content)
    return path


def unpacked(archive: Path, folder: Path, **options) -> list[str]:
    """The classes of the data set that the archive gives."""
    prepare.extract_archive(archive, folder, **options)
    return find_image_set(folder).classes


# -------------------------------------------------------------------------------- code pages
@pytest.mark.parametrize(
    "page, classes",
    [
        ("cp932", ["森", "海"]),
        ("gbk", ["森林", "海洋"]),
        ("cp866", ["лес", "море"]),
        ("cp850", ["Grün", "Straße"]),
        ("cp1252", ["Grün", "Straße"]),
        ("big5", ["山脈", "街道"]),
        ("shift_jis", ["ソ連", "表"]),  # the second byte of both first letters is a backslash
    ],
)
def test_a_code_page_is_asked_for_and_then_used(page, classes, tmp_path):
    members = {name.encode(page): content for name, content in named(*classes).items()}
    archive = raw_zip(tmp_path / "a.zip", members)
    with pytest.raises(UserError) as caught:
        prepare.extract_archive(archive, tmp_path / "data")
    said = str(caught.value)
    assert "code page" in said and "--archive_encoding" in said and not (tmp_path / "data").exists()
    shown = {"shift_jis": "cp932"}.get(page, page)
    (line,) = (line for line in said.splitlines() if f"--archive_encoding {shown} " in line)
    assert any(name in line for name in classes)
    assert unpacked(archive, tmp_path / "data", encoding=page) == sorted(classes)


def test_a_code_page_that_does_not_fit_is_refused(tmp_path):
    members = {name.encode("cp866"): content for name, content in named("лес", "море").items()}
    archive = raw_zip(tmp_path / "a.zip", members)
    for wrong in ("utf-8", "ascii", "no-such-page"):
        with pytest.raises(UserError, match=f"--archive_encoding {wrong} does not fit") as caught:
            prepare.extract_archive(archive, tmp_path / "data", encoding=wrong)
        assert "cp866" in str(caught.value)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("system", [0, 3], ids=["DOS", "Unix"])
def test_unicode_without_its_mark_is_known(form, system, tmp_path):
    """As macOS writes it, with accents apart, and older zips on Linux."""
    members = {unicodedata.normalize(form, name).encode(): content for name, content in named("été", "forêt").items()}
    assert unpacked(raw_zip(tmp_path / "a.zip", members, system), tmp_path / "data") == ["forêt", "été"]


def test_accents_apart_in_train_and_together_in_test_are_one_class(tmp_path):
    content = {
        unicodedata.normalize("NFD" if name.startswith("train") else "NFC", name): image
        for name, image in named("été", "forêt").items()
    }
    assert unpacked(make_zip(tmp_path / "a.zip", content), tmp_path / "data") == ["forêt", "été"]


def unicode_path(name: bytes, text: bytes, checksum: int | None = None) -> bytes:
    data = struct.pack("<BI", 1, zlib.crc32(name) if checksum is None else checksum) + text
    return struct.pack("<HH", 0x7075, len(data)) + data


def test_the_unicode_path_field_is_read(tmp_path):
    """Info-ZIP and 7-Zip keep the name in a field of its own beside one that old programs can read."""
    names = {name.encode("cp866"): name.encode() for name in named("лес", "море")}
    members = dict.fromkeys(names, picture(0))
    archive = raw_zip(tmp_path / "a.zip", members, extra=lambda name: unicode_path(name, names[name]))
    assert unpacked(archive, tmp_path / "data") == ["лес", "море"]
    stale = raw_zip(tmp_path / "b.zip", members, extra=lambda name: unicode_path(name, names[name], checksum=1))
    with pytest.raises(UserError, match="code page"):  # renamed by a program that does not know the field
        prepare.extract_archive(stale, tmp_path / "other")
    broken = raw_zip(tmp_path / "c.zip", members, extra=lambda name: b"\x75\x70\x03\x00abc")
    with pytest.raises(UserError, match="code page"):
        prepare.extract_archive(broken, tmp_path / "other")


def test_plain_names_need_no_code_page(tmp_path):
    members = {name.encode(): content for name, content in named("sea", "forest").items()}
    assert unpacked(raw_zip(tmp_path / "a.zip", members), tmp_path / "data", encoding="cp932") == ["forest", "sea"]


# -------------------------------------------------------------------------- separators, levels
@pytest.mark.parametrize("entries", [False, True], ids=["files alone", "with entries of folders"])
def test_backslashes_are_folders(entries, tmp_path):
    members = {name.replace("/", "\\").encode(): content for name, content in named("sea", "forest").items()}
    if entries:  # as .NET wrote them
        members = {b"train\\": b"", b"train\\sea\\": b"", b"test\\": b""} | members
    assert unpacked(raw_zip(tmp_path / "a.zip", members), tmp_path / "data") == ["forest", "sea"]


@pytest.mark.parametrize("top", ["", "data/", "a/b/c/"])
@pytest.mark.parametrize("between", ["", "images/", "images/all/"])
def test_folders_above_and_between(top, between, tmp_path):
    content = named("sea", "forest", top=top, between=between) | {f"{top}README.txt": b"x", f"{top}train/a.csv": b"x"}
    assert unpacked(make_zip(tmp_path / "a.zip", content), tmp_path / "data") == ["forest", "sea"]
    assert len(find_image_set(tmp_path / "data").train) == 4
    assert (tmp_path / "data" / "train" / "a.csv").exists()


@pytest.mark.parametrize("train, test", [("Training", "Testing"), ("TRAIN", "Val"), ("Train", "valid")])
def test_other_spellings_of_the_parts(train, test, tmp_path):
    content = {
        name.replace("train/", f"{train}/").replace("test/", f"{test}/"): image
        for name, image in named("sea", "forest").items()
    }
    assert unpacked(make_zip(tmp_path / "a.zip", content), tmp_path / "data") == ["forest", "sea"]


def test_val_in_val(tmp_path):
    content = {f"{split}/{split}/{name}/0.png": picture(0) for split in ("train", "val") for name in ("sea", "forest")}
    assert unpacked(make_zip(tmp_path / "a.zip", content), tmp_path / "data") == ["forest", "sea"]


def test_one_class_is_no_level_too_many(tmp_path):
    content = {f"{split}/sea/{index}.png": picture(index) for split in SPLITS for index in range(2)}
    prepare.extract_archive(make_zip(tmp_path / "a.zip", content), tmp_path / "data")
    assert (tmp_path / "data" / "train" / "sea" / "0.png").exists()


def test_what_is_there_instead_is_said(tmp_path):
    content = {f"photos/{name}/0.png": picture(0) for name in ("sea", "forest")}
    with pytest.raises(UserError, match=r"needs .*train/ and test/.*Its folders of images are forest, sea\."):
        prepare.extract_archive(make_zip(tmp_path / "a.zip", content), tmp_path / "data")


# ----------------------------------------------------------------------- archives in archives
def zipped(content: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, image in content.items():
            archive.writestr(name, image)
    return stream.getvalue()


def classes_of(split: str, top: str = "") -> dict[str, bytes]:
    return {f"{top}{name}/{index}.png": picture(index) for name in ("sea", "forest") for index in range(2)}


NESTED = {
    "one for all": {"intel.zip": zipped(files())},
    "one for all, deeper": {"a/b.zip": zipped({"c.ZIP": zipped(files())})},
    "one for each part": {f"{split}.zip": zipped(classes_of(split)) for split in SPLITS},
    "with its folder": {f"{split}.zip": zipped(classes_of(split, f"{split}/")) for split in SPLITS},
    "one part alone": {"test.zip": zipped(classes_of("test"))}
    | {f"train/{name}": image for name, image in classes_of("train").items()},
    "stored": {"intel.zip": zipped(files(), zipfile.ZIP_STORED)},
}


@pytest.mark.parametrize("content", NESTED.values(), ids=NESTED)
def test_zips_in_zips(content, tmp_path):
    assert unpacked(make_zip(tmp_path / "a.zip", content), tmp_path / "data") == ["forest", "sea"]
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "data"]


def test_an_inner_archive_beside_a_data_set_is_left_alone(tmp_path):
    content = files() | {"extra.zip": zipped({"../evil": b"x"})}
    assert unpacked(make_zip(tmp_path / "a.zip", content), tmp_path / "data") == ["forest", "sea"]


@pytest.mark.parametrize(
    "inner, said",
    [
        (b"no archive", "in it intel.zip: no .zip archive"),
        (zipped({"../../evil.png": b"x"} | files()), "not safe to unpack"),
        (zipped({"zeros.bin": bytes(40 * 2**20)} | files()), "bomb"),
        (zipped({"b.zip": zipped({"c.zip": zipped({"d.zip": zipped(files())})})}), "holds no data set"),
        (zipped({"photos/1.png": b"x"}), "holds no data set"),
    ],
    ids=["no archive", "hostile", "bomb", "too deep", "no data"],
)
def test_bad_inner_archives_write_nothing(inner, said, tmp_path):
    with pytest.raises(UserError, match=said):
        prepare.extract_archive(make_zip(tmp_path / "a.zip", {"intel.zip": inner}), tmp_path / "data")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_a_code_page_inside(tmp_path):
    members = {name.encode("cp866"): content for name, content in named("лес", "море").items()}
    inner = raw_zip(tmp_path / "inner", members).read_bytes()
    archive = make_zip(tmp_path / "a.zip", {"data.zip": inner})
    with pytest.raises(UserError, match="in it data.zip"):
        prepare.extract_archive(archive, tmp_path / "data")
    assert unpacked(archive, tmp_path / "data", encoding="cp866") == ["лес", "море"]


# ----------------------------------------------------------------------------- other programs
PROGRAMS = {
    "zip": ["zip", "-qr", "OUT", "."],
    "zip, names as bytes": ["zip", "-qr", "-UN=n", "OUT", "."],
    "7-Zip": ["7zz", "a", "-tzip", "OUT", "."],
    "7-Zip, Deflate64": ["7zz", "a", "-tzip", "-mm=Deflate64", "OUT", "."],
    "7-Zip, in a code page": ["7zz", "a", "-tzip", "-mcp=866", "OUT", "."],
    "libarchive": ["bsdtar", "-a", "-cf", "OUT", "."],
    "libarchive, in a code page": ["bsdtar", "--format=zip", "--options=hdrcharset=CP866", "-cf", "OUT", "."],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_archives_of_other_programs(name, tmp_path):
    command = PROGRAMS[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    for file, content in named("лес", "море").items():
        path = tmp_path / "source" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content * 40)
    archive = tmp_path / "a.zip"
    words = [str(archive) if word == "OUT" else word for word in command]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    subprocess.run(words, cwd=tmp_path / "source", check=True, capture_output=True, env=environment, timeout=60)
    if name == "7-Zip, Deflate64":
        with pytest.raises(UserError, match="packed in a way that Python cannot unpack"):
            unpacked(archive, tmp_path / "data")
        return
    encoding = "cp866" if name == "libarchive, in a code page" else None  # 7-Zip adds the Unicode name
    if encoding:
        with pytest.raises(UserError, match="--archive_encoding cp866 .*(лес|море)"):
            unpacked(archive, tmp_path / "data")
    assert unpacked(archive, tmp_path / "data", encoding=encoding) == ["лес", "море"]
    assert len(contents(tmp_path / "data")) == 8
