"""Fixtures that many tests share: a tiny demo data set, finished runs, and a way to call main(argv) as a user does."""

import contextlib
import logging
import os
import threading
import zipfile
from pathlib import Path

from images import demo

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; inherited by every process a test starts

import forks
import pytest
import tiny
from tiny import ROOT, SMALL, run_main
from tqdm import tqdm

import utils

# tqdm's own lock is shared with forks: one killed while it holds it would block all bars
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that could hold it while a test forks

ARCHIVE = ROOT.parent / "shared" / "intel-image-classification.zip"


@pytest.fixture(scope="session")
def run():
    return run_main


@pytest.fixture(scope="session", autouse=True)
def zoo():
    """Register the tiny classifier as a model, and skip pictures unless a test asks for them."""
    tiny.register_classifier()
    tiny.leave_out_pictures()


@pytest.fixture(autouse=True)
def heard():
    """Undo the --quiet of an earlier test."""
    utils.log.setLevel(logging.INFO)
    utils.log.disabled = False


@pytest.fixture
def said(caplog):
    """Return what is logged, line by line."""
    caplog.set_level("INFO", utils.log.name)
    return caplog


@pytest.fixture
def drawn():
    """Draw pictures and pages in this test."""
    with tiny.drawing():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the zoo's data set, drawn anew for each file of tests."""
    return tiny.draw(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    """Return sixty training scenes (48 after the split) and eighteen to test, ten and three a class."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    demo.draw_demo(folder, train_images=60, test_images=18)
    return folder


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory):
    """Return twenty photographs per class and split from the Intel archive, if it lies beside the checkout."""
    if not ARCHIVE.exists():
        pytest.skip("the Intel archive is not beside the checkout")
    folder = tmp_path_factory.mktemp("data") / "real"
    taken = {}
    with zipfile.ZipFile(ARCHIVE) as archive:
        for name in archive.namelist():
            parts = Path(name).parts
            group = parts[:-1]
            if name.endswith(".jpg") and "seg_pred" not in parts and taken.setdefault(group, 0) < 20:
                taken[group] += 1
                archive.extract(name, folder)
    return next(folder.rglob("seg_train/seg_train")).parent.parent


@pytest.fixture(scope="session")
def trained(scenes_folder, tmp_path_factory):
    """Return finished runs of each precision by name: (folder, exit status, stdout, stderr)."""
    checkpoints = tmp_path_factory.mktemp("runs")
    flags = {"fp32": [], "amp-bf16": ["--amp"], "amp-fp16": ["--amp", "--amp_dtype=float16"]}
    runs = {}
    for name, words in flags.items():
        line = [f"--data_dir={scenes_folder}", f"--checkpoint_dir={checkpoints}", f"--checkpoint_name={name}"]
        with tiny.drawing() if name == "fp32" else contextlib.nullcontext():
            outcome = run_main([*line, *SMALL, "--model=tiny_classifier", "--learning_rate=0.03", *words])
        runs[name] = (checkpoints / name, *outcome)
    return runs


def pytest_sessionstart(session):
    """Start the process that forks while all tests are collected: a second core imports what it needs meanwhile."""
    shared_out = session.config.getoption("numprocesses", None)  # to pytest-xdist's processes, which start their own
    if session.config.args_source is pytest.Config.ArgsSource.TESTPATHS and not shared_out:
        forks.start()


def pytest_terminal_summary(terminalreporter, config):
    """Print how to run the other tests."""
    if "long" in config.getini("norecursedirs") and not any("long" in str(word) for word in config.args):
        terminalreporter.write_line("These were the smoke tests. Everything: python tests/check.py")
