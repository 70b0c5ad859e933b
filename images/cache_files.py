"""Keep caches of decoded images on disk: choose the folder, allow one builder, limit the size. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from system.files import lock, remove
from utils import log


def cache_folder(root: Path) -> Path:
    """Return the folder for decoded images: in the data folder, or the user's cache if that is read-only.

    If neither can be written to, images are kept in memory.
    """
    inside = root / ".cache"
    places = [inside]
    with suppress(RuntimeError):  # no HOME, and no entry for this user
        places.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "amp-train"))
    for place in places:
        with suppress(OSError):
            place.mkdir(parents=place is not inside, exist_ok=True)
            if os.access(place, os.W_OK | os.X_OK):
                return place
    return inside


@contextmanager
def only_builder(file: Path) -> Iterator[None]:
    """Let one process of this machine build a cache at a time; the others wait, and then find the cache."""
    try:
        handle = open(file, "w")  # noqa: SIM115 (held while the lock is)
    except OSError:  # without a lock file there can be no cache
        yield
        return
    with handle:
        if not lock(handle):
            log.info("another process is decoding the images; waiting for it")
            lock(handle, wait=True)
        yield


@dataclass(frozen=True)
class CacheFile:
    """One listing's decoded images on disk: their size in bytes, and the time of their last use (as from time())."""

    file: Path
    size: int
    used: float


def caches(folder: Path) -> list[CacheFile]:
    """Return the caches in a folder, the least recently used first."""
    found = []
    for stem in {path.stem for suffix in ("npy", "json") for path in folder.glob(f"{'[0-9a-f]' * 20}.{suffix}")}:
        file = folder / f"{stem}.npy"
        with suppress(OSError):
            states = [path.stat() for path in (file, file.with_suffix(".json")) if path.exists()]
            found.append(CacheFile(file, sum(state.st_size for state in states), max(s.st_mtime for s in states)))
    return sorted(found, key=lambda cache: cache.used)


def limit_caches(folder: Path, limit: float, *, keep: Path | Collection[Path]) -> None:
    """Remove the least recently used caches until all take at most `limit` bytes.

    Never remove those in `keep`: otherwise the caches of one data set would remove one another at every start.
    """
    kept = {keep} if isinstance(keep, Path) else set(keep)
    there = caches(folder)
    total = sum(cache.size for cache in there)
    for cache in there:
        if total > limit and cache.file not in kept:
            remove_cache(cache)
            total -= cache.size
            log.info(f"removed the cache {cache.file} ({cache.size / 2**20:,.0f} MB): --cache_limit")


def remove_cache(cache: CacheFile) -> bool:
    """Remove a cache; return False if a process is building it."""
    with contextlib.ExitStack() as opened:
        with suppress(OSError):
            handle = opened.enter_context(open(cache.file.with_suffix(".lock"), "w"))
            if not lock(handle):
                return False
        remove(cache.file, cache.file.with_suffix(".json"))
        remove(*cache.file.parent.glob(f".{cache.file.stem}.*.tmp"), cache.file.with_suffix(".lock"))
    return True


def clean_caches(root: Path) -> list[CacheFile]:
    """Remove the caches of the images below `root`; return the removed ones.

    If `root` is read-only, its caches are in a folder that all data sets share. Those of other data sets stay.
    """
    folder = cache_folder(root)
    is_shared = folder != root / ".cache"
    return [cache for cache in caches(folder) if (not is_shared or _is_of(cache, root)) and remove_cache(cache)]


def _is_of(cache: CacheFile, root: Path) -> bool:
    """Return True if a cache's notes say that its images lie below `root`."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        notes = json.loads(cache.file.with_suffix(".json").read_text())
        return Path(notes["images_in"]).is_relative_to(root.absolute())
    return False
