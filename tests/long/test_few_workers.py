"""Threads, forks, locks, shared memory or files that loading workers want and do not get: fewer workers, or none."""

import errno
import mmap
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_limits
import tiny
from test_limits import read, streamed

from images import decode, stores
from images.cache import Opening
from images.stores import open_store
from system import machine
from utils import RunError

folder = test_limits.folder  # fixtures
no_worker_is_left = test_limits.no_worker_is_left


def few_threads(monkeypatch, most: int) -> None:
    """Let a thread start only if fewer than `most` are running."""
    start = threading.Thread.start

    def limited(thread):
        if threading.active_count() >= most:
            raise RuntimeError(machine.NO_THREAD)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)


def test_few_threads_mean_fewer_workers(folder, monkeypatch, caplog):
    caplog.set_level("INFO")
    store = streamed(folder, 4)
    few_threads(monkeypatch, threading.active_count() + machine.RESERVE + 7)
    assert read(store) == read(streamed(folder, 0))
    assert "by 2 workers instead of 4" in caplog.text


@pytest.mark.parametrize("number, after", [(errno.EAGAIN, 0), (errno.ENOMEM, 2)])
def test_a_fork_that_fails_leaves_no_worker_behind(folder, monkeypatch, caplog, capfd, number, after):
    caplog.set_level("INFO")
    store = streamed(folder, 4)
    expected = read(streamed(folder, 0))
    fork = os.fork
    forks = []

    def failing():
        forks.append(1)
        if len(forks) > after:
            raise OSError(number, os.strerror(number))
        return fork()

    monkeypatch.setattr(os, "fork", failing)
    before = set(multiprocessing.active_children())
    assert read(store) == expected
    until = time.monotonic() + 10
    while set(multiprocessing.active_children()) - before:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert "by no workers instead of 4" in caplog.text
    assert "Exception ignored" not in capfd.readouterr().err


def test_no_shared_memory_means_pipes_and_no_locks_means_no_workers(folder, monkeypatch, caplog):
    caplog.set_level("INFO")

    def refused(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    expected = read(streamed(folder, 0))
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refused)
        store = streamed(folder, 2)
        assert read(store) == expected and "instead" not in caplog.text
    monkeypatch.setattr(multiprocessing, "Lock", refused)
    assert read(streamed(folder, 2)) == expected
    assert "by no workers instead of 2" in caplog.text


def test_an_image_that_a_worker_cannot_open_for_want_of_files_is_a_sentence(folder, monkeypatch):
    store = streamed(folder, 1)

    monkeypatch.setattr(stores, "try_decode", tiny.raising(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(
        RunError,
        match="Too many open files.*\nUse fewer --num_workers, then repeat the command, a training with --resume",
    ):
        read(store)


def test_pools_without_threads_compute_in_this_one(folder, monkeypatch):
    expected = streamed(folder, 0)
    (folder / "other").mkdir()
    few_threads(monkeypatch, 0)
    with ThreadPoolExecutor(4) as pool:
        assert list(decode.ahead(pool, str, range(20), 3)) == list(map(str, range(20)))
    paths = sorted(folder.glob("*.png"))
    found = open_store(paths, folder / "other", limit=16, opening=Opening(cache="memory", workers=4))
    assert (found.crc32 == expected.crc32).all()
