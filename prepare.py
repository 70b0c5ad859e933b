"""Puts a data set on disk and looks it over: demo scenes, a Kaggle archive, a Kaggle download, a check.

Whatever is begun here is built in a hidden folder and moved into place when it is whole, so that a half
data set is never trained on. Must not know torch, models or how images are fed to them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scenes import CLASSES, VERSION, draw_scene
from utils import RunError, UserError, printable, progress

KAGGLE_DATASET = "puneet6060/intel-image-classification"
TRAIN_NAMES = {"seg_train", "train"}
TEST_NAMES = {"seg_test", "test", "val", "valid", "validation"}
MAX_MEMBERS = 1_000_000
MAX_RATIO = 100  # unpacked to packed bytes; JPEG archives stay near 1
SMALL = 16 * 2**20  # bytes that are harmless at any ratio
SPARE = 64 * 2**20  # bytes to leave free on the disk
_CHUNK = 2**20


# ------------------------------------------------------------------- begun, whole, in place
def _stage(data_dir: Path, key: str) -> Path:
    """The hidden folder in which a data set grows; dataset.py refuses a folder that holds `.partial`."""
    stage = data_dir / ".partial" / key
    stage.mkdir(parents=True, exist_ok=True)
    for other in stage.parent.iterdir():  # begun from another source and given up
        if other != stage:
            shutil.rmtree(other)
    return stage


def _place(data_dir: Path, stage: Path) -> None:
    """Moves a whole data set from the stage into `data_dir`; stopped in between, the next call ends it."""
    getattr(os, "sync", lambda: None)()  # once for all files: a rename must not reach the disk before their bytes
    (stage / ".complete").touch()
    entries = [entry for entry in stage.iterdir() if entry.name != ".complete"]
    for entry in sorted(entries, key=lambda entry: (entry.name in TRAIN_NAMES, entry.is_file(), entry.name)):
        os.replace(entry, data_dir / entry.name)
    shutil.rmtree(data_dir / ".partial")


def _finish_placing(data_dir: Path) -> None:
    for marker in list((data_dir / ".partial").glob("*/.complete")):
        _place(data_dir, marker.parent)


@contextlib.contextmanager
def _writing(data_dir: Path) -> Iterator[None]:
    """Turns what the disk may answer into one clear message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"the disk that holds {printable(data_dir)} is full. Free some space there and run the same command "
                "again: it goes on where it stopped."
            ) from None
        name = printable(error.filename or data_dir)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"cannot write {name}: {error.strerror}. Choose another --data_dir, or make this one writable."
            ) from None
        raise RunError(f"cannot write {name}: {error.strerror or error}. Run the same command again.") from None


def _refuse_existing(data_dir: Path, names: Iterable[str] = ()) -> None:
    held = sorted(name for name in {*TRAIN_NAMES, *TEST_NAMES, *names} if (data_dir / name).exists())
    if held:
        raise UserError(
            f"{printable(data_dir)} already holds {printable(', '.join(held))}; nothing was changed. "
            "Use it as it is, remove it, or choose another --data_dir."
        )


# ------------------------------------------------------------------------------ demo scenes
def draw_demo(
    root: Path, *, train_images: int = 1200, test_images: int = 300, seed: int = 0, workers: int | None = None
) -> None:
    """Draws six balanced classes of scenes in the Intel layout below `root`.

    Every picture depends on (seed, split, class, index) alone, whatever the counts and workers. Returns
    at once where `root` holds these scenes already, and finishes an interrupted drawing.

    Args:
        workers: processes that draw; None takes the cores at hand.

    Raises:
        UserError: `root` holds other data or cannot be written.
        RunError: the disk is full.
    """
    root = Path(root)
    manifest = {"scenes": VERSION, "seed": seed, "train_images": train_images, "test_images": test_images}
    with _writing(root):
        _finish_placing(root)
        if _is_drawn(root, manifest):
            return
        stage = _stage(root, f"demo-{VERSION}-{seed}-{train_images}-{test_images}")
        jobs = _demo_jobs(stage, train_images, test_images, seed)
        _draw_all(jobs, workers)
        (stage / "demo.json").write_text(json.dumps(manifest, indent=1) + "\n")
        _place(root, stage)


def _is_drawn(root: Path, manifest: dict[str, int]) -> bool:
    """Whether `root` holds exactly these scenes. Raises UserError where it holds anything else."""
    others = [entry.name for entry in os.scandir(root) if not entry.name.startswith(".")] if root.exists() else []
    if not others:
        return False
    try:
        found = json.loads((root / "demo.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{printable(root)} is not empty and holds no demo scenes ({printable(', '.join(sorted(others)[:3]))}). "
            "Choose an empty --data_dir for them."
        ) from None
    if found == manifest and (root / "seg_train").is_dir() and (root / "seg_test").is_dir():
        return True
    raise UserError(
        f"{printable(root)} holds demo scenes drawn with other settings ({printable(found)}; asked for: {manifest}). "
        "Remove that folder, or choose another --data_dir."
    )


def _demo_jobs(stage: Path, train_images: int, test_images: int, seed: int) -> list[tuple]:
    """(folder, seed, split, label, first, end) for the indices still to draw, in pieces for the workers."""
    jobs = []
    for split, (name, count) in enumerate((("seg_train", train_images), ("seg_test", test_images))):
        for label, class_name in enumerate(CLASSES):
            folder = stage / name / name / class_name
            folder.mkdir(parents=True, exist_ok=True)
            end = count // len(CLASSES) + (label < count % len(CLASSES))
            jobs += [(folder, seed, split, label, first, min(first + 50, end)) for first in range(0, end, 50)]
    return jobs


def _draw_images(job: tuple) -> int:
    """Draws one piece; runs in a worker process. Returns how many images it held."""
    folder, seed, split, label, first, end = job
    for index in range(first, end):
        path = folder / f"{index:05d}.jpg"
        if path.exists() and path.stat().st_size:
            continue
        image = draw_scene(CLASSES[label], np.random.default_rng([seed, split, label, index]))
        part = path.with_name(path.name + ".part")  # a stopped process leaves no half image under the real name
        image.save(part, "JPEG", quality=90)
        os.replace(part, path)
    return end - first


def _draw_all(jobs: list[tuple], workers: int | None) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = sum(job[-1] - job[-2] for job in jobs)
    workers = min(workers or cores, total // 250 + 1)
    with progress(total=total, desc="drawing", unit="image") as bar:
        if workers > 1:
            with contextlib.suppress(BrokenProcessPool):  # no processes here: draw what is missing in this one
                _draw_in_processes(jobs, workers, bar)
                return
            bar.reset()
        for job in jobs:
            bar.update(_draw_images(job))


def _draw_in_processes(jobs: list[tuple], workers: int, bar) -> None:
    pool = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        for future in as_completed([pool.submit(_draw_images, job) for job in jobs]):
            bar.update(future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def contact_sheet(root: Path, path: Path, *, columns: int = 10, side: int = 100) -> None:
    """Writes a PNG with one labelled row of pictures per class folder of `root`, evenly chosen.

    Args:
        root: a folder of class folders, such as `seg_train/seg_train`.
        side: pixels of one picture.
    """
    folders = sorted(entry for entry in Path(root).iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise UserError(f"{printable(root)} holds no class folders to show.")
    font, label_width, gap = ImageFont.load_default(size=15), 92, 3
    size = (label_width + columns * (side + gap), len(folders) * (side + gap) + gap)
    sheet = Image.new("RGB", size, (250, 250, 250))
    draw = ImageDraw.Draw(sheet)
    for row, folder in enumerate(folders):
        top = gap + row * (side + gap)
        draw.text((label_width - 10, top + side / 2), printable(folder.name), (40, 40, 40), font, anchor="rm")
        files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
        for column in range(min(columns, len(files))):
            with Image.open(files[column * len(files) // min(columns, len(files))]) as image:
                small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(small, (label_width + column * (side + gap), top))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # A palette without dithering: grain makes a full-colour PNG several times as large.
    sheet.quantize(192, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


# ------------------------------------------------------------------- archives and downloads
@dataclass(frozen=True)
class Member:
    """A regular file in an archive or folder; `crc` is None where only reading it would tell."""

    name: str
    size: int
    crc: int | None
    open: Callable[[], IO[bytes]]


def extract_archive(archive: Path, data_dir: Path) -> None:
    """Unpacks a .zip or .tar(.gz) that holds train and test folders, at any depth, into `data_dir`.

    Nothing is written before every name and size was found harmless; an interrupted extraction goes on
    where it stopped and counts as a data set only when it is whole.

    Raises:
        UserError: missing, damaged, hostile or unsuitable archive, or `data_dir` holds data already.
        RunError: the disk is full.
    """
    archive, data_dir = Path(archive), Path(data_dir)
    if not archive.is_file():
        raise UserError(f"--archive {printable(archive)}: no such file.")
    with _reading(archive), _open_archive(archive) as members:
        state = archive.stat()
        _unpack(members, archive, data_dir, f"{archive.name}-{state.st_size}-{state.st_mtime_ns}", state.st_size)


@contextlib.contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """One message for the many ways in which the archive modules say that a file is damaged."""
    damage = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, UnicodeDecodeError, ValueError,
              NotImplementedError, RuntimeError, OverflowError, ArithmeticError)
    try:
        yield
    except PermissionError as error:
        raise UserError(f"--archive {printable(archive)}: {error.strerror}.") from None
    except damage as error:
        if "password" in str(error) or "encrypted" in str(error):
            raise UserError(f"{printable(archive)} is protected by a password; unpack it by hand.") from None
        raise UserError(_damaged(archive, error)) from None
    except OSError as error:  # gzip reports its damage so
        raise UserError(_damaged(archive, error)) from None


def _damaged(archive: Path, reason: object) -> str:
    return f"{printable(archive)} is damaged or incomplete ({printable(reason)}). Download it again."


@contextlib.contextmanager
def _open_archive(archive: Path) -> Iterator[Iterator[Member]]:
    with archive.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PK"):
        with zipfile.ZipFile(archive) as opened:
            yield _zip_members(opened, archive)
    elif start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or start[257:262] == b"ustar":
        with tarfile.open(archive) as opened:
            yield _tar_members(opened, archive)
    else:
        web = " It looks like a web page: was the download refused?" if start.lstrip()[:1] == b"<" else ""
        raise UserError(f"{printable(archive)} is not a .zip, .tar or .tar.gz archive.{web}")


def _zip_members(opened: zipfile.ZipFile, archive: Path) -> Iterator[Member]:
    for info in opened.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UserError(_hostile(archive, info.filename, "is a link or a device"))
        if not info.is_dir():
            yield Member(info.filename, info.file_size, info.CRC, lambda info=info: opened.open(info))


def _tar_members(opened: tarfile.TarFile, archive: Path) -> Iterator[Member]:
    for info in opened:
        try:
            tarfile.data_filter(info, str(archive.absolute().parent))
        except tarfile.FilterError as error:
            raise UserError(_hostile(archive, info.name, f"is refused: {printable(error)}")) from None
        if not info.isdir():
            if not info.isreg():
                raise UserError(_hostile(archive, info.name, "is a link or a device"))
            yield Member(info.name, info.size, None, lambda info=info: opened.extractfile(info))


def _hostile(archive: Path, name: str, problem: str) -> str:
    return f"{printable(archive)} is not safe to unpack: {printable(name)!r} {problem}. Nothing was written."


def _unpack(members: Iterable[Member], source: Path, data_dir: Path, key: str, packed: int | None) -> None:
    """Checks all members, writes them to the stage of `key` and moves the whole into place.

    Args:
        packed: bytes of the archive, for the ratio; None for a folder.
    """
    with _writing(data_dir):
        key = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        if (data_dir / ".partial" / key / ".complete").exists():
            _finish_placing(data_dir)
            return
        _finish_placing(data_dir)
    files = _below_root(_checked(members, source, packed), source)
    _refuse_existing(data_dir, {path.parts[0] for path in files})
    with _writing(data_dir):
        stage = _stage(data_dir, key)
    _require_space(stage, files, data_dir)
    total = sum(member.size for member in files.values())
    with progress(total=total, desc="unpacking", unit="B", unit_scale=True) as bar:
        for path, member in files.items():
            _write_member(member, stage / path, data_dir, source)
            bar.update(member.size)
    with _writing(data_dir):
        _place(data_dir, stage)


def _checked(members: Iterable[Member], source: Path, packed: int | None) -> dict[PurePosixPath, Member]:
    """All members by their path, refused as soon as one is hostile or their sum looks like a bomb."""
    found: dict[PurePosixPath, Member] = {}
    total = 0
    for member in members:
        path = _safe_path(member.name, source)
        total += member.size
        if member.size < 0 or (packed is not None and total > max(SMALL, MAX_RATIO * packed)):
            growth = f"brings it to {_megabytes(total)} from {_megabytes(packed or 0)}, like a decompression bomb"
            raise UserError(_hostile(source, member.name, growth))
        if len(found) >= MAX_MEMBERS:
            raise UserError(_hostile(source, member.name, f"is one of more than {MAX_MEMBERS:,} files"))
        if path in found:
            raise UserError(_hostile(source, member.name, "occurs twice"))
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            found[path] = member
    for path in found:
        for parent in path.parents:
            if parent in found:
                raise UserError(_hostile(source, str(parent), "is both a file and a folder"))
    return found


def _safe_path(name: str, source: Path) -> PurePosixPath:
    """The relative path of a member; refuses absolute ones, drives, and any way upwards."""
    parts = name.replace("\\", "/").split("/")
    if name[:1] in ("/", "\\") or ".." in parts or "\0" in name or any(re.match(r"[A-Za-z]:", p) for p in parts):
        raise UserError(_hostile(source, name, "points outside the target folder"))
    path = PurePosixPath(*(part for part in parts if part not in ("", ".")))
    if not path.parts or any(len(os.fsencode(part)) > 240 for part in path.parts) or len(path.parts) > 32:
        raise UserError(_hostile(source, name, "is no usable file name"))
    return path


def _below_root(found: dict[PurePosixPath, Member], source: Path) -> dict[Path, Member]:
    """Cuts off the folders above train and test, and what lies beside them."""
    depths = [(path.parts.index(name), path.parts) for path in found for name in TRAIN_NAMES & set(path.parts[:-1])]
    if depths:
        depth, parts = min(depths, key=lambda pair: pair[0])
        inside = {Path(*path.parts[depth:]): member for path, member in found.items()
                  if path.parts[:depth] == parts[:depth]}
        if any(path.parts[0] in TEST_NAMES for path in inside):
            return inside
    raise UserError(
        f"{printable(source)} holds no data set: it needs seg_train/ and seg_test/, or train/ and test/ or val/, "
        "with a folder per class in each."
    )


def _require_space(stage: Path, files: dict[Path, Member], data_dir: Path) -> None:
    there = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    missing = sum(member.size for member in files.values()) - there + SPARE - shutil.disk_usage(stage).free
    if missing > 0:
        raise RunError(
            f"the disk that holds {printable(data_dir)} has too little room: free {_megabytes(missing)} more there, "
            "or choose another --data_dir, and run the same command again."
        )


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MB"


def _write_member(member: Member, target: Path, data_dir: Path, source: Path) -> None:
    """Writes one file unless it is there already with the right size and checksum."""
    if target.is_file() and target.stat().st_size == member.size:
        expected = member.crc
        if expected is None:
            with member.open() as stream:
                expected = _crc(stream)
        with target.open("rb") as file:
            if _crc(file) == expected:
                return

    part, left = target.with_name(target.name + ".part"), member.size
    with _writing(data_dir):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("wb")
    with file, member.open() as stream:
        while left >= 0 and (chunk := stream.read(min(_CHUNK, left + 1))):
            left -= len(chunk)
            with _writing(data_dir):  # reading the archive is left to `_reading`
                file.write(chunk)
                file.flush()
    if left:
        raise UserError(_damaged(source, f"{member.name} has not the size it declares"))
    with _writing(data_dir):
        os.replace(part, target)


def _crc(stream: IO[bytes]) -> int:
    value = 0
    while chunk := stream.read(_CHUNK):
        value = zlib.crc32(chunk, value)
    return value


def download(data_dir: Path) -> None:
    """Fetches Intel Image Classification with kagglehub and puts it in place as `extract_archive` does.

    Raises:
        UserError: kagglehub is missing, Kaggle wants an account, or `data_dir` holds data already.
        RunError: offline, or Kaggle fails otherwise.
    """
    data_dir = Path(data_dir)
    try:
        import kagglehub
    except ImportError:
        raise UserError(f"--download needs kagglehub: pip install kagglehub\n{_by_hand()}") from None
    with _writing(data_dir):
        _finish_placing(data_dir)
    _refuse_existing(data_dir, {"seg_pred"})
    try:
        fetched = Path(kagglehub.dataset_download(KAGGLE_DATASET))
    except Exception as error:  # kagglehub lets through whatever requests, its own API and the disk raise
        raise _download_error(error, data_dir) from None
    if fetched.is_file():
        extract_archive(fetched, data_dir)
        return
    with _reading(fetched):
        _unpack(_folder_members(fetched), fetched, data_dir, str(fetched.absolute()), None)


def _folder_members(folder: Path) -> Iterator[Member]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            name, size = path.relative_to(folder).as_posix(), path.stat().st_size
            yield Member(name, size, None, lambda path=path: path.open("rb"))


def _by_hand() -> str:
    return (f"Or download the zip in a browser from https://www.kaggle.com/datasets/{KAGGLE_DATASET}\n"
            "and run: python main.py prepare --archive FILE.zip")


def _download_error(error: Exception, data_dir: Path) -> Exception:
    """What a failed download means for the user: an account, a network, a disk, or Kaggle itself."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "error_code", None)
    names = {kind.__name__ for kind in type(error).__mro__}
    reason = (printable(error) or type(error).__name__)[:300]
    if status in (401, 403) or names & {"UnauthenticatedError", "CredentialError"}:
        return UserError(
            f"Kaggle wants an account ({reason}). Create an API token at https://www.kaggle.com/settings and put "
            f"kaggle.json into ~/.kaggle/, or set KAGGLE_USERNAME and KAGGLE_KEY.\n{_by_hand()}"
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"the disk is full: free about 400 MB in kagglehub's cache folder and 400 MB in {data_dir}.")
    if names & {"ConnectionError", "TimeoutError", "Timeout", "gaierror", "MaxRetryError"}:
        return RunError(f"Kaggle cannot be reached: this machine seems to be offline ({reason}).\n{_by_hand()}")
    return RunError(f"the download failed: {reason}\n{_by_hand()}")


# -------------------------------------------------------------------------- a look at the data
@dataclass(frozen=True)
class _Seen:
    """What one file turned out to be."""

    digest: str = ""
    size: str = ""
    mode: str = ""
    problem: str = ""


def _look(path: Path) -> _Seen:
    if not path.is_file():
        return _Seen(problem="not a regular file")
    digest = ""
    try:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return _Seen(digest, f"{image.width}x{image.height}", image.mode)
    except Exception as error:  # Pillow's decoders raise nearly every type on damaged input
        return _Seen(digest, problem="empty file" if digest and not content else printable(error) or "unreadable")


def check(data_dir: Path) -> dict[str, Any]:
    """Reads every image of a data set and reports what a training would meet.

    Returns:
        `classes`, `counts` {split: {class: images}}, `balance` {split: largest class / smallest},
        `sizes` and `modes` {name: images}, `unreadable` {file: reason}, and lists of groups of files with
        equal bytes: `duplicates`, and of these `across_splits` and `across_labels`. Files are named
        relative to `data_dir`; plain types only, fit for JSON.

    Raises:
        UserError: `data_dir` holds no data set.
    """
    from dataset import find_image_set  # brings torch, which nothing else in this file needs

    images = find_image_set(data_dir)
    listings = {"train": images.train, "validation": images.validation or [], "test": images.test}
    files = [(split, images.classes[label], path) for split, part in listings.items() for path, label in part]
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on large or odd files; what matters is an error
        looks = pool.map(_look, [path for _, _, path in files])
        seen = list(progress(looks, total=len(files), desc="checking", unit="image"))

    counts = {split: dict.fromkeys(images.classes, 0) for split, part in listings.items() if part}
    same: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    unreadable = {}
    for (split, name, path), look in zip(files, seen, strict=True):
        shown = path.relative_to(images.root).as_posix()
        counts[split][name] += 1
        if look.problem:
            unreadable[shown] = look.problem
        if look.digest:
            same[look.digest].append((split, name, shown))
    groups = [group for group in same.values() if len(group) > 1]
    readable = [look for look in seen if not look.problem]

    def paths(chosen: Iterable[list[tuple[str, str, str]]]) -> list[list[str]]:
        return [[path for _, _, path in group] for group in chosen]

    return {
        "data_dir": str(data_dir),
        "classes": images.classes,
        "counts": counts,
        "balance": {split: round(max(part.values()) / min(part.values()), 3) for split, part in counts.items()},
        "sizes": dict(Counter(look.size for look in readable).most_common()),
        "modes": dict(Counter(look.mode for look in readable).most_common()),
        "unreadable": unreadable,
        "duplicates": paths(groups),
        "across_splits": paths(group for group in groups if len({split for split, _, _ in group}) > 1),
        "across_labels": paths(group for group in groups if len({name for _, name, _ in group}) > 1),
    }


def format_check(report: dict[str, Any], *, most: int = 10) -> str:
    """The report of `check` as text for a terminal; lists are cut after `most` entries."""
    counts, width = report["counts"], max(18, *(len(printable(name)) for name in report["classes"]))
    rows = [("images", *counts)]
    rows += [(printable(name), *(f"{part[name]:,}" for part in counts.values())) for name in report["classes"]]
    rows.append(("total", *(f"{sum(part.values()):,}" for part in counts.values())))
    rows.append(("largest / smallest", *(f"{value:.2f}" for value in report["balance"].values())))
    lines = [printable(report["data_dir"]), ""]
    lines += [f"{first:{width}}" + "".join(f"{value:>11}" for value in rest) for first, *rest in rows]
    lines += ["", _histogram("sizes", report["sizes"], most), _histogram("modes", report["modes"], most), ""]
    unreadable = [f"{printable(name)}: {reason}" for name, reason in report["unreadable"].items()]
    lines += _listed("unreadable files", unreadable, most)
    for title, key in (("pictures stored more than once (equal bytes)", "duplicates"),
                       ("of these, in both train and test", "across_splits"),
                       ("of these, under two labels", "across_labels")):
        lines += _listed(title, [" = ".join(map(printable, group)) for group in report[key]], most)
    return "\n".join(lines)


def _histogram(title: str, values: dict[str, int], most: int) -> str:
    shown = [f"{name}: {count:,}" for name, count in list(values.items())[:most]]
    rest = len(values) - len(shown)
    return f"{title}: " + ", ".join(shown) + (f", and {rest} more" if rest else "")


def _listed(title: str, entries: list[str], most: int) -> list[str]:
    lines = [f"{title}: {len(entries):,}", *(f"  {entry}" for entry in entries[:most])]
    return lines + ([f"  … and {len(entries) - most:,} more"] if len(entries) > most else [])
