"""Runs that an earlier version began: today's code resumes them to the same end, tests them, and reads their options.

The files were written by the version whose name their folder has (see written_before/make.py).
"""

import json
import shutil

import pytest
import tiny
import torch
from written_before import make

VERSIONS = sorted(path.name for path in make.HERE.iterdir() if (path / "machine.json").exists())
CLOSE = {"fp32": 1e-4, "amp-fp16": 2e-2, "amp-bf16": 2e-2}  # of another machine's or another torch's rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the data set in it; the networks are registered."""
    folder = tmp_path_factory.mktemp("before")
    tiny.register_classifier()
    tiny.draw(folder / make.DATA)
    return folder


@pytest.fixture
def begun(request, folder, monkeypatch):
    """A copy of the run of (version, setting), in the current folder as when it was written; returns its folder."""
    version, name = request.param
    monkeypatch.chdir(folder)
    tiny.leave_out_pictures(monkeypatch)
    run = make.RUNS / name
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(make.HERE / version / name, run)
    return run


every_run = pytest.mark.parametrize(
    "begun",
    [(version, name) for version in VERSIONS for name in make.SETTINGS],
    indirect=True,
    ids=lambda pair: " ".join(pair),
)


@every_run
def test_it_resumes_to_the_same_end(begun, request):
    """Bit for bit where the machine rounds as the one that wrote it."""
    version, name = request.node.callspec.params["begun"]
    assert tiny.train(make.DATA, make.RUNS, *make.words(*make.SETTINGS[name]), "--resume", name=name) == 0
    expected = torch.load(begun / "end.pt", weights_only=True)
    found = torch.load(begun / "last.pt", weights_only=True)
    assert json.loads((make.HERE / version / "machine.json").read_text()).keys() == make.machine().keys()
    if json.loads((make.HERE / version / "machine.json").read_text()) == make.machine():
        exact = dict(tiny.leaves(expected))
        now = dict(tiny.leaves(found))
        assert [path for path, value in exact.items() if now.get(path) != value] == []
    for part in ("model", "ema"):
        for path, weight in (expected[part] or {}).items():
            torch.testing.assert_close(found[part][path], weight, rtol=CLOSE[name], atol=CLOSE[name], msg=path)
    assert len((begun / "metrics.jsonl").read_text().splitlines()) == 2


@every_run
def test_its_best_epoch_is_tested(begun, run):
    status, out, err = run(["evaluate", f"--checkpoint_dir={make.RUNS}", f"--checkpoint_name={begun.name}"])
    assert status == 0 and "Test accuracy" in out, err
