"""Puts a data set on disk and looks it over: demo scenes, an archive, a Kaggle download, a check.

A data set grows in a hidden folder and is moved into place when it is whole, so that half of one is never
trained on. Must not know torch, models or how images are fed to them.
"""

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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image

from scenes import CLASSES, VERSION, draw_scene
from utils import RunError, UserError, printable, progress

KAGGLE_DATASET = "puneet6060/intel-image-classification"
TRAIN_NAMES = {"seg_train", "train"}
TEST_NAMES = {"seg_test", "test", "val", "valid", "validation"}
MAX_MEMBERS = 1_000_000
MAX_RATIO = 100  # unpacked to packed bytes; JPEG archives stay near 1
SMALL = 16 * 2**20  # bytes that are harmless at any ratio
SPARE = 64 * 2**20  # bytes to leave free on the disk
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
FULL = (errno.ENOSPC, errno.EDQUOT)

BY_HAND = (f"Or download the zip in a browser from https://www.kaggle.com/datasets/{KAGGLE_DATASET}\n"
           "and run: python main.py prepare --archive FILE.zip")

Member = tuple[str, int, bool, Callable[[], IO[bytes]]]  # name, bytes, whether it is a regular file, what opens it


# ------------------------------------------------------------------- begun, whole, in place
@contextlib.contextmanager
def _building(data_dir: Path, source: str) -> Iterator[Path]:
    """A hidden folder for a data set to grow in; what it holds is moved into place when the block succeeds.

    What a killed process left there is thrown away; until then dataset.py refuses a folder that holds `.partial`.
    """
    stage = data_dir / ".partial"
    if stage.exists():
        shutil.rmtree(stage)
    stage.mkdir(parents=True)
    try:
        yield stage
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    getattr(os, "sync", lambda: None)()  # once for all files: a rename must not reach the disk before their bytes
    (stage / ".complete").write_bytes(os.fsencode(source))
    _finish(data_dir)


def _finish(data_dir: Path) -> str | None:
    """Moves a whole data set into place, its training images last, and returns its source; None where there is none.

    Also called first of all, to end what a stop between two moves left undone.
    """
    stage = data_dir / ".partial"
    if not (stage / ".complete").exists():
        return None
    source = os.fsdecode((stage / ".complete").read_bytes())
    for name in sorted(set(os.listdir(stage)) - {".complete"}, key=lambda name: (name in TRAIN_NAMES, name)):
        os.replace(stage / name, data_dir / name)
    shutil.rmtree(stage)
    return source


@contextlib.contextmanager
def _explained(data_dir: Path, source: Path | None = None) -> Iterator[None]:
    """Turns what the disk, or a damaged archive, raises into one clear message."""
    try:
        yield
    except Exception as error:  # zipfile, tarfile and the decompressors raise nearly every type on damage
        number = getattr(error, "errno", None)
        if isinstance(error, (UserError, RunError)) or source is None and number is None:
            raise
        if number is None:
            problem = f"damaged or incomplete ({printable(error)}). Download it again."
            if "password" in str(error) or "encrypted" in str(error):
                problem = "protected by a password; unpack it by hand."
            raise UserError(f"{printable(source)} is {problem}") from None
        if number in FULL:
            raise RunError(f"the disk that holds {printable(data_dir)} is full. Free some space there and run the "
                           "same command again.") from None
        forbidden = isinstance(error, (PermissionError, FileExistsError, NotADirectoryError)) or number == errno.EROFS
        verb = "read" if source and error.filename == str(source) else "write"
        problem = f"cannot {verb} {printable(error.filename or data_dir)}: {error.strerror}."
        raise (UserError if forbidden else RunError)(f"{problem} Mend that, or choose another --data_dir.") from None


def _refuse_existing(data_dir: Path, names: Iterable[str]) -> None:
    held = sorted(name for name in {*TRAIN_NAMES, *TEST_NAMES, *names} if (data_dir / name).exists())
    if held:
        raise UserError(f"{printable(data_dir)} already holds {printable(', '.join(held))}; nothing was changed. "
                        "Use it as it is, remove it, or choose another --data_dir.")


# ------------------------------------------------------------------------------ demo scenes
def draw_demo(root: Path, *, train_images: int = 1200, test_images: int = 300, seed: int = 0,
              workers: int | None = None) -> None:
    """Draws six balanced classes of scenes in the Intel layout below `root`, with `workers` processes (all cores).

    Every picture depends on (seed, split, class, index) alone. Returns at once where `root` holds these scenes
    already; an interrupted drawing starts anew.

    Raises:
        UserError: `root` holds other data or cannot be written.
        RunError: the disk is full.
    """
    root = Path(root)
    manifest = {"scenes": VERSION, "seed": seed, "train_images": train_images, "test_images": test_images}
    with _explained(root):
        _finish(root)
        if _is_drawn(root, manifest):
            return
        with _building(root, "demo scenes") as stage:
            jobs = []  # (folder, what seeds its images, indices), at most 50 images each
            for split, (name, count) in enumerate((("seg_train", train_images), ("seg_test", test_images))):
                for label, class_name in enumerate(CLASSES):
                    folder = stage / name / name / class_name
                    folder.mkdir(parents=True)
                    indices = range(count // len(CLASSES) + (label < count % len(CLASSES)))
                    jobs += [(folder, (seed, split, label), indices[first:first + 50]) for first in indices[::50]]
            with progress(total=train_images + test_images, desc="drawing", unit="image") as bar:
                for drawn in _draw_all(jobs, min(workers or CORES, bar.total // 250 + 1)):
                    bar.update(drawn)
            (stage / "demo.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _is_drawn(root: Path, manifest: dict[str, int]) -> bool:
    """Whether `root` holds exactly these scenes. Raises UserError where it holds anything else."""
    names, found = sorted(name for name in os.listdir(root) if name[0] != ".") if root.exists() else [], None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((root / "demo.json").read_text())
    if names and (found != manifest or not {"seg_train", "seg_test"} <= set(names)):
        held = f"demo scenes drawn with other settings ({found}; asked for: {manifest})" if found else names[:3]
        raise UserError(f"{printable(root)} is not empty: it holds {printable(held)}. Choose another --data_dir, or "
                        "remove that folder if you do not need it.")
    return bool(names)


def _draw_all(jobs: list[tuple], workers: int) -> Iterator[int]:
    """Draws in processes, or in this one where none can be started; yields the counts of images drawn."""
    if workers > 1:
        ignore = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's affair
        pool = ProcessPoolExecutor(workers, get_context("spawn"), *ignore)
        with contextlib.suppress(BrokenProcessPool), pool:
            yield from pool.map(_draw_images, jobs)
            return
    yield from map(_draw_images, jobs)


def _draw_images(job: tuple[Path, tuple[int, ...], range]) -> int:
    folder, seeds, indices = job
    for index in indices:
        image = draw_scene(CLASSES[seeds[-1]], np.random.default_rng([*seeds, index]))
        image.save(folder / f"{index:05d}.jpg", "JPEG", quality=90)
    return len(indices)


# ------------------------------------------------------------------- archives and downloads
def extract_archive(archive: Path, data_dir: Path) -> None:
    """Unpacks a .zip or .tar(.gz) that holds train and test folders, at any depth, into `data_dir`.

    Nothing is written before every name and size was found harmless; an interrupted extraction starts anew.

    Raises:
        UserError: missing, damaged, hostile or unsuitable archive, or `data_dir` holds data already.
        RunError: the disk is full.
    """
    archive, data_dir = Path(archive), Path(data_dir)
    if not archive.is_file():
        raise UserError(f"--archive {printable(archive)}: no such file.")
    with _explained(data_dir, archive), _open(archive) as opened:
        _unpack(_members(opened), archive, data_dir, archive.stat().st_size)


def _open(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    with archive.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PK"):
        return zipfile.ZipFile(archive)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")) or start[257:262] == b"ustar":
        return tarfile.open(archive)
    web = " It looks like a web page: was the download refused?" if start.lstrip()[:1] == b"<" else ""
    raise UserError(f"{printable(archive)} is not a .zip, .tar or .tar.gz archive.{web}")


def _members(opened: zipfile.ZipFile | tarfile.TarFile) -> Iterator[Member]:
    if isinstance(opened, tarfile.TarFile):
        for info in opened:
            if not info.isdir():
                yield info.name, info.size, info.isreg(), partial(opened.extractfile, info)
    else:
        for info in opened.infolist():
            if not info.is_dir():
                regular = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)  # 0: not packed on Unix
                yield info.filename, info.file_size, regular, partial(opened.open, info)


def _hostile(archive: Path, name: str, problem: str) -> UserError:
    return UserError(f"{printable(archive)} is not safe to unpack: {printable(name)!r} {problem}. Nothing was written.")


def _unpack(members: Iterable[Member], source: Path, data_dir: Path, packed: int | None) -> None:
    """Checks all members, copies them to a hidden folder and moves the whole into place.

    Args:
        packed: bytes of the archive, for the ratio; None for a folder.
    """
    key = str(source.absolute())
    if _finish(data_dir) == key:
        return
    files = _below_root(_checked(members, source, packed), source)
    _refuse_existing(data_dir, {path.parts[0] for path in files})
    total = sum(member[1] for member in files.values())
    with _building(data_dir, key) as stage, progress(total=total, desc="unpacking", unit="B", unit_scale=True) as bar:
        missing = total + SPARE - shutil.disk_usage(stage).free
        if missing > 0:
            raise RunError(f"the disk that holds {printable(data_dir)} has too little room: free "
                           f"{missing / 2**20:,.1f} MB more there, or choose another --data_dir, and try again.")
        for path, (name, size, _, open_member) in files.items():
            target = stage / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_member() as stream, target.open("wb") as file:
                shutil.copyfileobj(stream, file)
            if target.stat().st_size != size:
                raise ValueError(f"{name} has not the size it declares")
            bar.update(size)


def _checked(members: Iterable[Member], source: Path, packed: int | None) -> dict[PurePosixPath, Member]:
    """All members by their path, refused as soon as one is hostile or their sum looks like a bomb."""
    found: dict[PurePosixPath, Member] = {}
    total = 0
    for name, size, regular, open_member in members:
        path, total = _safe_path(name, source), total + size
        if not regular:
            raise _hostile(source, name, "is a link or a device")
        if size < 0 or (packed is not None and total > max(SMALL, MAX_RATIO * packed)):
            raise _hostile(source, name, f"brings it to {total / 2**20:,.0f} MB, like a decompression bomb")
        if len(found) >= MAX_MEMBERS:
            raise _hostile(source, name, f"is one of more than {MAX_MEMBERS:,} files")
        if path in found:
            raise _hostile(source, name, "occurs twice")
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            found[path] = name, size, regular, open_member
    for clash in found.keys() & {parent for path in found for parent in path.parents}:
        raise _hostile(source, str(clash), "is both a file and a folder")
    return found


def _safe_path(name: str, source: Path) -> PurePosixPath:
    """The relative path of a member; refuses absolute ones, drives, and any way upwards."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name or re.search(r"(^|/)[A-Za-z]:", str(path)):
        raise _hostile(source, name, "points outside the target folder")
    if not path.parts or any(len(os.fsencode(part)) > 240 for part in path.parts) or len(path.parts) > 32:
        raise _hostile(source, name, "is no usable file name")
    return path


def _below_root(found: dict[PurePosixPath, Member], source: Path) -> dict[Path, Member]:
    """Cuts off the folders above train and test, and what lies beside them."""
    roots = {path.parts[:path.parts.index(name)] for path in found for name in TRAIN_NAMES & set(path.parts[:-1])}
    for root in sorted(roots, key=len)[:1]:
        inside = {Path(*path.parts[len(root):]): member for path, member in found.items()
                  if path.parts[:len(root)] == root}
        if any(path.parts[0] in TEST_NAMES for path in inside):
            return inside
    raise UserError(f"{printable(source)} holds no data set: it needs seg_train/ and seg_test/, or train/ and test/ or "
                    "val/, with a folder per class in each.")


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
        raise UserError(f"--download needs kagglehub: pip install kagglehub\n{BY_HAND}") from None
    with _explained(data_dir):
        _finish(data_dir)
    _refuse_existing(data_dir, {"seg_pred"})
    try:
        fetched = Path(kagglehub.dataset_download(KAGGLE_DATASET))
    except Exception as error:  # kagglehub lets through whatever requests, its own API and the disk raise
        raise _download_error(error, data_dir) from None
    if fetched.is_file():
        extract_archive(fetched, data_dir)
        return
    with _explained(data_dir, fetched):
        files = sorted(path for path in fetched.rglob("*") if path.is_file() and not path.is_symlink())
        _unpack([(path.relative_to(fetched).as_posix(), path.stat().st_size, True, partial(path.open, "rb"))
                 for path in files], fetched, data_dir, None)


def _download_error(error: Exception, data_dir: Path) -> Exception:
    """What a failed download means for the user: an account, a network, a disk, or Kaggle itself."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "error_code", None)
    names = {kind.__name__ for kind in type(error).__mro__}
    reason = (printable(error) or type(error).__name__)[:300]
    if status in (401, 403) or names & {"UnauthenticatedError", "CredentialError"}:
        return UserError(f"Kaggle wants an account ({reason}). Create an API token at https://www.kaggle.com/settings "
                         f"and put kaggle.json into ~/.kaggle/, or set KAGGLE_USERNAME and KAGGLE_KEY.\n{BY_HAND}")
    if getattr(error, "errno", None) in FULL:
        return RunError(f"the disk is full: free about 400 MB in kagglehub's cache folder and 400 MB in {data_dir}.")
    if names & {"ConnectionError", "TimeoutError", "Timeout", "gaierror", "MaxRetryError"}:
        return RunError(f"Kaggle cannot be reached: this machine seems to be offline ({reason}).\n{BY_HAND}")
    return RunError(f"the download failed: {reason}\n{BY_HAND}")


# -------------------------------------------------------------------------- a look at the data
def _look(path: Path) -> tuple[str, str, str, str]:
    """(digest of the bytes, size, mode, problem) of an image file; empty where unknown."""
    if not path.is_file():
        return "", "", "", "not a regular file"
    digest = ""
    try:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return digest, f"{image.width}x{image.height}", image.mode, ""
    except Exception as error:  # Pillow's decoders raise nearly every type on damaged input
        return digest, "", "", "empty file" if digest and not content else printable(error) or "unreadable"


def check(data_dir: Path) -> dict[str, Any]:
    """Reads every image of a data set and reports what a training would meet.

    Returns:
        `classes`, `counts` {split: {class: images}}, `balance` {split: largest class / smallest}, `sizes` and
        `modes` {name: images}, `unreadable` {file: reason}, and lists of groups of files with equal bytes:
        `duplicates`, and of these `across_splits` and `across_labels`. Files are named relative to `data_dir`.

    Raises:
        UserError: `data_dir` holds no data set.
    """
    from dataset import find_image_set  # brings torch, which nothing else in this file needs

    images = find_image_set(data_dir)
    listings = {"train": images.train, "validation": images.validation or [], "test": images.test}
    files = [(split, images.classes[label], path.relative_to(images.root).as_posix())
             for split, listing in listings.items() for path, label in listing]
    with ThreadPoolExecutor(min(16, 2 * CORES)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on large or odd files; what matters is an error
        looks = progress(pool.map(_look, [images.root / name for *_, name in files]), total=len(files), desc="checking")
        seen = [(*file, *look) for file, look in zip(files, looks, strict=True)]

    same = defaultdict(list)
    for split, label, name, digest, *_ in seen:
        same[digest or name].append((split, label, name))
    groups = [tuple(zip(*group, strict=True)) for group in same.values() if len(group) > 1]  # splits, labels, names
    counts = {split: dict(Counter(images.classes[label] for _, label in listing))
              for split, listing in listings.items() if listing}
    return {
        "data_dir": str(data_dir),
        "classes": images.classes,
        "counts": counts,
        "balance": {split: round(max(part.values()) / min(part.values()), 3) for split, part in counts.items()},
        "sizes": dict(Counter(size for *_, size, _, _ in seen if size).most_common()),
        "modes": dict(Counter(mode for *_, mode, _ in seen if mode).most_common()),
        "unreadable": {name: problem for _, _, name, *_, problem in seen if problem},
        "duplicates": [list(names) for *_, names in groups],
        "across_splits": [list(names) for splits, _, names in groups if len(set(splits)) > 1],
        "across_labels": [list(names) for _, labels, names in groups if len(set(labels)) > 1],
    }


def format_check(report: dict[str, Any], *, most: int = 10) -> str:
    """The report of `check` as text for a terminal; lists are cut after `most` entries."""
    counts, width = report["counts"], max(18, *(len(printable(name)) for name in report["classes"]))
    rows = [("images", *counts)]
    rows += [(printable(name), *(f"{part[name]:,}" for part in counts.values())) for name in report["classes"]]
    rows.append(("total", *(f"{sum(part.values()):,}" for part in counts.values())))
    rows.append(("largest / smallest", *(f"{value:.2f}" for value in report["balance"].values())))
    lines = [printable(report["data_dir"]), ""]
    lines += [f"{first:{width}}" + "".join(f"{value:>11}" for value in rest) for first, *rest in rows] + [""]
    for title in ("sizes", "modes"):
        shown = [f"{name}: {count:,}" for name, count in list(report[title].items())[:most]]
        rest = len(report[title]) - len(shown)
        lines.append(f"{title}: " + ", ".join(shown) + f", and {rest} more" * (rest > 0))
    unreadable = [[f"{name}: {reason}"] for name, reason in report["unreadable"].items()]
    for title, groups in (("\nunreadable files", unreadable),
                          ("pictures stored more than once (equal bytes)", report["duplicates"]),
                          ("of these, in both train and test", report["across_splits"]),
                          ("of these, under two labels", report["across_labels"])):
        lines += [f"{title}: {len(groups):,}", *("  " + " = ".join(map(printable, group)) for group in groups[:most])]
        lines += [f"  … and {len(groups) - most:,} more"] * (len(groups) > most)
    return "\n".join(lines)
