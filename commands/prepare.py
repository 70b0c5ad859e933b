"""Put a data set on disk, or check one: demo scenes, an archive, a Kaggle download. Imports no torch.

A data set grows in a hidden folder and is moved into place when it is whole, so that nobody trains on half of one.
"""

import os
import shutil
from datetime import datetime
from pathlib import Path

from command_line.groups import Preparation
from images.archive import checked, opened_zip, unpack
from images.cache_files import clean_caches
from images.check import check, format_check
from images.decode import Rules, windows_of
from images.demo import draw_demo
from images.labels import list_images
from images.placing import explained, finish_interrupted, put_in_place, refuse_existing
from images.walk import find_images, is_wanted, relative_name
from system.files import FULL, json_text, refuse_missing_folders, write_text
from system.machine import cores
from utils import RunError, UserError, amount, log, printable

KAGGLE_DATASET = "puneet6060/intel-image-classification"

BY_HAND = (
    f"Or download the zip in a browser from https://www.kaggle.com/datasets/{KAGGLE_DATASET}\n"
    "and run: python main.py prepare --archive FILE.zip"
)


def prepare(asked: Preparation) -> None:
    """Put a data set on disk, or report on the one that is there."""
    folder = Path(asked.data_dir)
    if asked.demo:
        draw_demo(
            folder, train_images=asked.train_images, test_images=asked.test_images, seed=asked.seed, workers=cores()
        )
        print(f"{asked.train_images + asked.test_images:,} demo scenes are in {folder}")
    elif asked.archive:
        extract_archive(Path(asked.archive), folder, encoding=asked.archive_encoding)
        print(f"{asked.archive} is unpacked in {folder}")
    elif asked.download:
        download_from_kaggle(folder)
        print(f"Intel Image Classification is in {folder}")
    elif asked.clean:
        _clean(folder)
    else:
        refuse_missing_folders(asked.json)
        rules = Rules(asked.max_megapixels, windows_of(asked.window))
        report = check(folder, labels=asked.labels, rules=rules, own_window=asked.window == "data")
        print(format_check(report))
        if asked.model:
            report["near"] = _near(folder, asked, rules)
        if asked.json:
            write_text(Path(asked.json), json_text(report, indent=1))
        if report["unreadable"]:
            count = len(report["unreadable"])
            raise RunError(f"{count:,} {'image' if count == 1 else 'images'} cannot be read: repair or remove them.")


def _near(folder: Path, asked: Preparation, rules: Rules) -> list[list[str | float]]:
    """Print and return the nearly equal pictures of two parts, each pair with its cosine."""
    from commands.near import NEAR, near_pictures  # they need torch

    assert asked.model is not None
    found = list_images(folder, labels=asked.labels)
    parts = {part: [path for path, _ in listing] for part, listing in found.parts.items()}
    pairs = near_pictures(parts, asked.model, asked.pretrained_path, rules)
    shown: list[list[str | float]] = [
        [relative_name(one, found.root), relative_name(other, found.root), cosine] for one, other, cosine in pairs
    ]
    print(
        f"nearly equal pictures of two parts, by {printable(asked.model)} (cosine of at least {NEAR}): {len(pairs):,}"
    )
    for one, other, cosine in shown[:10]:
        print(f"  {cosine:.3f}  {printable(one)} ~ {printable(other)}")
    return shown


def _clean(folder: Path) -> None:
    """Remove the decoded images that are kept for a data set, and say which.

    Raise UserError if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{printable(folder)} does not exist. Name the folder that holds the images with --data_dir.")
    removed = clean_caches(folder)
    for cache in removed:
        used = datetime.fromtimestamp(cache.used).strftime("%Y-%m-%d %H:%M")
        print(f"removed {cache.file} ({cache.size / 2**20:,.1f} MB, last used {used})")
    print(f"{amount(len(removed), 'cache', 'caches')} removed, {sum(cache.size for cache in removed) / 2**20:,.1f} MB")


def extract_archive(archive: Path, data_dir: Path, *, encoding: str | None = None) -> None:
    """Unpack a .zip into `data_dir`, and say which data set is found there.

    `encoding` is the code page of names that the archive does not mark as Unicode. Nothing is written before every
    name and size was found harmless; an interrupted extraction starts anew. Raise UserError for a missing, damaged
    or hostile archive and if `data_dir` holds data already, RunError if the disk is full.
    """
    archive = Path(archive)
    data_dir = Path(data_dir)
    if not archive.is_file():
        raise UserError(f"--archive {printable(archive)}: no such file.")
    with explained(data_dir, archive), opened_zip(archive, encoding) as packed:
        infos = checked(packed, archive)
        put_in_place(data_dir, archive, lambda stage: unpack(packed, infos, stage))
    _say_what_is_there(data_dir)


def _say_what_is_there(data_dir: Path) -> None:
    """Log how many images were put in place, and the parts and classes that a training would find."""
    log.info(f"{amount(sum(1 for _ in find_images(data_dir)), 'image is', 'images are')} in {printable(data_dir)}")
    try:
        found = list_images(data_dir)
    except UserError as error:
        log.warning(str(error))
        return
    parts = ", ".join(f"{len(listing):,} {name}" for name, listing in found.parts.items())
    for sentence in (f"{parts}, in {amount(len(found.classes), 'class', 'classes')}", *found.remarks()):
        log.info(sentence)


def download_from_kaggle(data_dir: Path) -> None:
    """Fetch Intel Image Classification with kagglehub and put it in place as `extract_archive` does.

    Raise UserError if kagglehub is missing, Kaggle wants an account, or `data_dir` holds data already, RunError
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
    with explained(data_dir, fetched):
        put_in_place(
            data_dir, fetched, lambda stage: shutil.copytree(fetched, stage, ignore=_unwanted, dirs_exist_ok=True)
        )
    _say_what_is_there(data_dir)


def _unwanted(folder: str, names: list[str]) -> list[str]:
    """Return the names that are not copied: links, and files that a desktop left behind."""
    return [name for name in names if not is_wanted(name) or os.path.islink(os.path.join(folder, name))]


def _download_error(error: Exception, data_dir: Path) -> Exception:
    """Return the error for a failed download: an account, the network, the disk, or Kaggle itself."""
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
