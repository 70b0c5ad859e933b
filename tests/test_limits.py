"""Little of everything: few open files, few threads, little memory, workers that never answer.

The program goes on with fewer workers or ends in one sentence; it never waits without an end.
"""

import contextlib
import errno
import getpass
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

import utils
from command_line.failures import explain
from images import decode, stores
from images.opening import Opening, open_data_set
from images.stores import open_store
from system import machine

BATCHES = [np.array([0, 1, 2]), np.array([3, 4]), np.array([5, 1, 0]), np.array([2])] * 3


@pytest.fixture
def folder(tmp_path):
    for seed in range(6):
        tiny.noise(seed).save(tmp_path / f"{seed}.png")
    return tmp_path


@pytest.fixture(autouse=True)
def no_worker_is_left():
    """PyTorch would wait five seconds for each worker of a store that a failed test holds."""
    yield
    heard = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would raise for each
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, heard)


@pytest.fixture
def few_files():
    """Return a function that leaves this process `count` more open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave(count):
        with contextlib.ExitStack() as opened:  # the numbers that are free are not all above those in use
            for _ in range(count):
                last = os.open(os.devnull, os.O_RDONLY)
                opened.callback(os.close, last)
            first = os.open(os.devnull, os.O_RDONLY)
            os.close(first)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first, before[1]))

    yield leave
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def streamed(folder: Path, workers: int) -> stores.ImageStore:
    return open_store(sorted(folder.glob("*.png")), folder, limit=16, opening=Opening(cache="none", workers=workers))


def read(store) -> list[bytes]:
    return [images.numpy().tobytes() for images, _ in store.batches(BATCHES)]


def test_workers_see_what_this_process_sees(folder):
    """Whatever the order in which they come to an end, in epochs of other batch sizes, too."""
    store = streamed(folder, 3)
    assert read(store) == read(streamed(folder, 0)) == read(store)
    larger = [np.array([0, 1, 2, 3, 4, 5])]
    (images, _), *_ = store.batches(larger)
    assert images.shape == (6, 10, 12, 3)
    assert read(store) == read(streamed(folder, 0))
    next(store.batches(BATCHES))  # an epoch that is left early leaves nothing for the next one
    assert read(store) == read(streamed(folder, 0))


@pytest.mark.parametrize("count, workers", [(18, "no"), (34, "3")])
def test_few_open_files_mean_fewer_workers(folder, few_files, count, workers, caplog):
    caplog.set_level("INFO")
    store = streamed(folder, 4)
    few_files(count)
    assert read(store) == read(streamed(folder, 0))
    assert f"by {workers} workers instead of 4" in caplog.text and "ulimit -n" in caplog.text


def test_a_worker_that_never_answers_is_not_waited_for(folder, monkeypatch):
    assert 0 < stores.LONGEST_WAIT <= 3600
    store = streamed(folder, 1)
    monkeypatch.setattr(stores, "LONGEST_WAIT", 0.3)
    monkeypatch.setattr(stores, "try_decode", lambda *_: time.sleep(3600))
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        read(store)
    assert time.monotonic() - started < 20
    status, words = explain(caught.value, "train", {})
    assert status == 1 and "no batch came from the loading workers" in words and "--num_workers 0" in words


def test_a_process_without_files_blames_no_image(folder, few_files):
    """Otherwise the cache would say for ever that they cannot be read."""
    few_files(0)
    for call in (decode.try_decode, lambda path, _: decode.read_header(path, decode.Rules())):
        with pytest.raises(OSError, match="Too many open files") as caught:
            call(folder / "0.png", None)
    assert "ulimit -n" in explain(caught.value, "train", {})[1]


def test_no_thread_and_no_file_are_said_with_the_limit_to_raise():
    for error, limit in (
        (RuntimeError(machine.NO_THREAD), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (ImportError("libc.so.6: cannot open shared object file: Too many open files"), "ulimit -n"),
    ):
        status, words = explain(error, "train", {})
        assert status == 1 and limit in words and "--num_workers" in words


def test_loading_workers_end_with_their_command(data, tmp_path):
    words = ("--cache=none", "--num_workers=2", "--epochs=1")
    assert tiny.train(data, tmp_path, *words) == 0
    assert multiprocessing.active_children() == []
    status, _, err = tiny.run_main(["evaluate", f"--checkpoint_dir={tmp_path}", "--checkpoint_name=run", *words[:2]])
    assert status == 0, err
    assert multiprocessing.active_children() == []


def test_a_command_leaves_children_that_are_not_its_own(tmp_path):
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    other.start()
    assert tiny.run_main(["train", f"--data_dir={tmp_path / 'none'}"])[0] == 2
    assert other.is_alive()
    other.kill()
    other.join()


# ----------------------------------------------------------------------------- room for caches
@pytest.mark.parametrize("cache", ["auto", "memory"])
@pytest.mark.parametrize("kilobytes", [20, 110, 10])
@pytest.mark.parametrize("keep_larger", [False, True])
def test_a_second_start_decodes_nothing_however_small_the_limit(
    data, tmp_path, monkeypatch, cache, kilobytes, keep_larger
):
    """The caches of a data set's parts used to remove one another: they take 93 and 23 kB."""
    folder = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))

    def opened():
        opening = Opening(cache=cache, workers=1, cache_limit=kilobytes * 1000 / 2**30)
        return open_data_set(folder, image_size=32, seed=1, keep_larger=keep_larger, opening=opening)

    first = opened()
    monkeypatch.setattr("images.cache.build_cache", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr("images.cache.survey", lambda *_: pytest.fail("read again"))
    second = opened()
    assert second.fingerprint == first.fingerprint
    kinds = {name: type(subset.store).__name__ for name, subset in second.subsets.items()}
    assert kinds == {name: type(subset.store).__name__ for name, subset in first.subsets.items()}
    if cache == "auto":
        arrays = sum(file.stat().st_size for file in (folder / ".cache").glob("*.npy"))
        assert arrays <= kilobytes * 1000


def test_what_is_kept_of_other_sizes_makes_room(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns(".cache"))
    for size in (32, 24, 20):
        open_data_set(folder, image_size=size, seed=1, opening=Opening(workers=1, cache_limit=1e5 / 2**30))
        arrays = [file.stat().st_size for file in (folder / ".cache").glob("*.npy")]
        assert len(arrays) >= 2 and sum(arrays) <= 1e5


def test_no_memory_left_is_not_unknown_memory(folder, monkeypatch):
    for left, kind in ((0, stores.StreamedImages), (None, stores.DecodedImages)):
        monkeypatch.setattr("images.cache.available_memory", lambda left=left: left)
        assert type(open_store(sorted(folder.glob("*.png")), folder, limit=16, opening=Opening(workers=0))) is kind


# ------------------------------------------------------------------------ streams, users without a name
def test_a_mistake_with_closed_streams_has_its_status(tmp_path):
    process = tiny.start(["train", f"--data_dir={tmp_path}"], closed=[0, 1, 2])
    assert tiny.finish(process, 60)[0] == 2


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 1042"), OSError("No username set")])
def test_a_user_without_a_name_gets_one(monkeypatch, error):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", tiny.raising(error))
    utils.name_this_user()
    assert getpass.getuser() == f"uid_{os.getuid()}"


def test_a_user_with_a_name_keeps_it(monkeypatch):
    monkeypatch.setenv("LOGNAME", "me")
    monkeypatch.delenv("USER", raising=False)
    utils.name_this_user()
    assert getpass.getuser() == "me" and "USER" not in os.environ
