"""Runs that an earlier version began: today's code resumes them to the same end, tests them, and reads their options.

The files were written by the version whose name their folder has (see written_before/make.py).
"""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from written_before import make

from dataset import Batches

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


def cut_as_before(self, update, rank):
    """Version 0.1.0 cut a ragged batch into as many micro-batches as a full one."""
    mine = np.array_split(np.array(self._places(update)), self.ranks.size)[rank]
    return np.array_split(mine, self.accumulate)


@every_run
def test_it_resumes_to_the_same_end(begun, request, monkeypatch):
    """Bit for bit where the machine rounds as the one that wrote it."""
    monkeypatch.setattr(Batches, "_pieces", cut_as_before)
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


def test_a_run_with_a_last_batch_of_one_image_is_refused(folder, monkeypatch, capsys):
    """Version 0.1.0 cut 19 images into 9, 9 and 1, where today's updates have 9 and 10."""
    import train

    monkeypatch.chdir(folder)
    more = make.words("--batch_size=9", "--epochs=3")
    with pytest.MonkeyPatch.context() as before:
        before.setattr(Batches, "updates_per_epoch", property(lambda self: -(-len(self.subset) // self.batch_size)))
        make.stop_in_mid_epoch(train, before)
        assert tiny.train(make.DATA, make.RUNS, *more, name="cut") == 143
    run = make.RUNS / "cut"
    line = json.loads((run / "metrics.jsonl").read_text())
    assert line["updates"] == 3
    kept = (run / "last.pt").read_bytes()
    capsys.readouterr()
    assert tiny.train(make.DATA, make.RUNS, *more, "--resume", name="cut") == 2
    said = capsys.readouterr().err
    assert "runs/cut was begun by an earlier version" in said and "--overwrite" in said and "Traceback" not in said
    assert (run / "last.pt").read_bytes() == kept
    assert tiny.train(make.DATA, make.RUNS, *more, "--overwrite", name="cut") == 0
