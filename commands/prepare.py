"""Puts a data set on disk and looks it over: demo scenes, an archive, a Kaggle download, a check.

A data set grows in a hidden folder and is moved into place when it is whole, so that half of one is never
trained on. Must not know torch, models or how images are fed to them.
"""

import shutil
import zipfile
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from images.archive import (
    MAX_DEPTH,
    Member,
    checked,
    data_set,
    folder_members,
    nothing_found,
    unpack_inner,
    zip_members,
)
from images.cache import clean_caches
from images.check import check, format_check
from images.decode import Rules, windows_of
from images.demo import draw_demo
from images.placing import building, explained, finish_interrupted, one_writer, refuse_existing
from system.files import FULL, json_text, refuse_missing_folders, write_text
from system.machine import cores
from utils import RunError, UserError, amount, printable, progress

KAGGLE_DATASET = "puneet6060/intel-image-classification"
SPARE = 64 * 2**20  # bytes to leave free on the disk

BY_HAND = (
    f"Or download the zip in a browser from https://www.kaggle.com/datasets/{KAGGLE_DATASET}\n"
    "and run: python main.py prepare --archive FILE.zip"
)


def prepare(
    *,
    data_dir: str,
    demo: bool,
    archive: str | None,
    archive_encoding: str | None,
    download: bool,
    clean: bool,
    train_images: int,
    test_images: int,
    seed: int,
    labels: str | None,
    window: str,
    max_megapixels: float,
    json: str | None,
) -> None:
    """The command: puts a data set on disk, or reports on the one that is there."""
    folder = Path(data_dir)
    if demo:
        draw_demo(folder, train_images=train_images, test_images=test_images, seed=seed, workers=cores())
        print(f"{train_images + test_images:,} demo scenes are in {folder}")
    elif archive:
        extract_archive(Path(archive), folder, encoding=archive_encoding)
        print(f"{archive} is unpacked in {folder}")
    elif download:
        download_from_kaggle(folder)
        print(f"Intel Image Classification is in {folder}")
    elif clean:
        _clean(folder)
    else:
        refuse_missing_folders(json)
        rules = Rules(max_megapixels, windows_of(window))
        report = check(folder, labels=labels, rules=rules, own_window=window == "data")
        print(format_check(report))
        if json:
            write_text(Path(json), json_text(report, indent=1))
        if report["unreadable"]:
            count = len(report["unreadable"])
            raise RunError(f"{count:,} {'image' if count == 1 else 'images'} cannot be read: repair or remove them.")


def _clean(folder: Path) -> None:
    """Removes the decoded images that are kept for a data set, and says which."""
    removed = clean_caches(folder)
    for cache in removed:
        used = datetime.fromtimestamp(cache.used).strftime("%Y-%m-%d %H:%M")
        print(f"removed {cache.file} ({cache.size / 2**20:,.1f} MB, last used {used})")
    print(f"{amount(len(removed), 'cache', 'caches')} removed, {sum(cache.size for cache in removed) / 2**20:,.1f} MB")


def extract_archive(archive: Path, data_dir: Path, *, encoding: str | None = None) -> None:
    """Unpacks a .zip that holds train and test folders, at any depth, into `data_dir`.

    `encoding` is the code page of names that the archive does not mark as Unicode. Nothing is written before every
    name and size was found harmless; an interrupted extraction starts anew. Raises UserError for a missing, damaged,
    hostile or unsuitable archive and if `data_dir` holds data already, RunError if the disk is full.
    """
    archive = Path(archive)
    data_dir = Path(data_dir)
    if not archive.is_file():
        raise UserError(f"--archive {printable(archive)}: no such file.")
    with explained(data_dir, archive), ExitStack() as opened:
        file = opened.enter_context(archive.open("rb"))
        if not zipfile.is_zipfile(file):
            raise UserError(
                f"{printable(archive)} is no .zip archive, or it is damaged: a refused download leaves a web page, and "
                "an interrupted one leaves a part. Download it again, or unpack other archives by hand."
            )
        members = zip_members(opened.enter_context(zipfile.ZipFile(file)), archive, encoding)
        _unpack(members, archive, data_dir, archive.stat().st_size, opened, encoding)


def _unpack(
    members: list[Member],
    source: Path,
    data_dir: Path,
    packed: int | None,
    opened: ExitStack,
    encoding: str | None = None,
) -> None:
    """Checks all files, copies them to a hidden folder and moves the whole into place.

    `packed` is the size of the archive in bytes, for the ratio; None for a folder. Archives in the archive are looked
    into if there is no data set outside them.
    """
    inside = _members_of_the_data(members, source, data_dir, packed, opened, encoding)
    key = str(source.absolute())
    with one_writer(data_dir):
        if finish_interrupted(data_dir) == key:
            return
        refuse_existing(data_dir, {path.parts[0] for path in inside})
        with building(data_dir, key) as stage:
            _copy(inside, data_dir, stage)


def _members_of_the_data(
    members: list[Member], source: Path, data_dir: Path, packed: int | None, opened: ExitStack, encoding: str | None
) -> dict[Path, Member]:
    """The files of the data set, found harmless, by their place in it; those of an inner archive if it lies in one."""
    found = checked(members, source, packed)
    inside = data_set(found)
    for _ in range(MAX_DEPTH):
        if inside is not None:
            break
        near = next(folder for folder in (data_dir, *data_dir.absolute().parents) if folder.is_dir())
        inner = unpack_inner(found.values(), source, near, opened, encoding)
        if inner is None:
            break
        found = checked(inner, source, packed)
        inside = data_set(found)
    if inside is None:
        raise nothing_found(found, source)
    return inside


def _copy(inside: dict[Path, Member], data_dir: Path, stage: Path) -> None:
    """Copies all files into `stage`, the hidden folder of `data_dir`, if the disk holds them."""
    total = sum(member.size for member in inside.values())
    missing = total + SPARE - shutil.disk_usage(stage).free
    if missing > 0:
        raise RunError(
            f"the disk that holds {printable(data_dir)} has too little room: free "
            f"{missing / 2**20:,.1f} MB more there, or choose another --data_dir, and try again."
        )
    with progress(total=total, desc="unpacking", unit="B", unit_scale=True) as bar:
        for path, member in inside.items():
            target = stage / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as stream, target.open("wb") as written:
                shutil.copyfileobj(stream, written)
            if target.stat().st_size != member.size:
                raise ValueError(f"{member.name} has not the size it declares")
            bar.update(member.size)


def download_from_kaggle(data_dir: Path) -> None:
    """Fetches Intel Image Classification with kagglehub and puts it in place as `extract_archive` does.

    Raises UserError if kagglehub is missing, Kaggle wants an account, or `data_dir` holds data already, RunError
    if there is no network or Kaggle fails otherwise.
    """
    data_dir = Path(data_dir)
    try:
        import kagglehub
    except ImportError:
        raise UserError(f"--download needs kagglehub: pip install kagglehub\n{BY_HAND}") from None
    with explained(data_dir):
        finish_interrupted(data_dir)
    refuse_existing(data_dir, {"seg_pred"})
    try:
        fetched = Path(kagglehub.dataset_download(KAGGLE_DATASET))
    except Exception as error:  # kagglehub lets through whatever requests, its own API and the disk raise
        raise _download_error(error, data_dir) from None
    with explained(data_dir, fetched), ExitStack() as opened:
        _unpack(folder_members(fetched), fetched, data_dir, None, opened)


def _download_error(error: Exception, data_dir: Path) -> Exception:
    """What a failed download means for the user: an account, a network, a disk, or Kaggle itself."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "error_code", None)
    names = {kind.__name__ for kind in type(error).__mro__}
    reason = (printable(error) or type(error).__name__)[:300]
    if status in (401, 403) or names & {"UnauthenticatedError", "CredentialError"}:
        return UserError(
            f"Kaggle wants an account ({reason}). Create an API token at https://www.kaggle.com/settings "
            f"and put kaggle.json into ~/.kaggle/, or set KAGGLE_USERNAME and KAGGLE_KEY.\n{BY_HAND}"
        )
    if getattr(error, "errno", None) in FULL:
        return RunError(f"the disk is full: free about 400 MB in kagglehub's cache folder and 400 MB in {data_dir}.")
    if names & {"ConnectionError", "TimeoutError", "Timeout", "gaierror", "MaxRetryError"}:
        return RunError(f"Kaggle cannot be reached: this machine seems to be offline ({reason}).\n{BY_HAND}")
    return RunError(f"the download failed: {reason}\n{BY_HAND}")
