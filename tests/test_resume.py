"""Resuming is exact: a run stopped at any moment, then resumed, equals bit for bit one that was never stopped.

Stops after every update and drawn options: tests/test_same_run.py. Kills at random moments: tests/long/test_kills.py.
"""

import json
import math
import os
import shutil
import signal

import pytest
import tiny
import torch
from tiny import assert_equal, outcome

import commands.train
import main
import train as training
from runs import checkpoint
from runs.folder import RunDirectory
from utils import RunError

SETTINGS = {
    "fp16, accumulated, averaged, mixed, frozen": (
        "--amp --amp_dtype=float16 --accumulate=2 --clip_grad_norm=1 --ema=0.9 --mixup=0.4 --cutmix=1 --augment=crop "
        "--freeze_epochs=1 --optimizer=SGD --decay_type=step_warmup --warmup_epochs=1 --no-channels_last"
    ),
    "bf16, dropout, streamed": (
        "--amp --augment=trivial --optimizer=ADAMW --cache=none --num_workers=0 --decay_type=step --label_smoothing=0.1"
    ),
}


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Return the outcome of an undisturbed run of the first setting."""
    runs = tmp_path_factory.mktemp("straight")
    assert tiny.train(data, runs) == 0
    return outcome(runs / "run")


def at_call(monkeypatch, owner, name: str, number: int, act, *, before: bool = False) -> None:
    """Call `act` at call `number` (from 1) of a function, after it or before it."""
    original = getattr(owner, name)
    calls = []

    def wrapper(*arguments, **options):
        calls.append(name)
        if before and len(calls) == number:
            act()
        result = original(*arguments, **options)
        if not before and len(calls) == number:
            act()
        return result

    monkeypatch.setattr(owner, name, wrapper)


def kill_self(number: int):
    return lambda: os.kill(os.getpid(), number)


def position(runs) -> tuple[int, int]:
    progress = torch.load(runs / "run" / "last.pt", weights_only=True)["progress"]
    return progress["epoch"], progress["update"]


# ------------------------------------------------------------------------------------ stops
@pytest.mark.parametrize("setting", SETTINGS)
def test_stopped_run_equals_undisturbed(setting, data, tmp_path, capsys):
    """SIGINT in mid-epoch, SIGTERM in validation, SIGTERM in the second epoch; each time resumed."""
    options = SETTINGS[setting].split()
    assert tiny.train(data, tmp_path / "a", *options) == 0
    stops = [
        ("update_weights", 2, signal.SIGINT, (0, 2)),
        ("evaluate", 1, signal.SIGTERM, (0, 3)),
        ("update_weights", 1, signal.SIGTERM, (1, 1)),
    ]
    for turn, (name, call, number, expected) in enumerate(stops):
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, training, name, call, kill_self(number), before=name == "evaluate")
            assert tiny.train(data, tmp_path / "b", *options, *["--resume"] * (turn > 0)) == 128 + number
        assert position(tmp_path / "b") == expected
        said = capsys.readouterr().err
        assert "--resume" in said and str(tmp_path / "b" / "run") in said
        assert not (tmp_path / "b" / "run" / "result.json").exists()
    assert tiny.train(data, tmp_path / "b", *options, "--resume") == 0
    assert_equal(outcome(tmp_path / "a" / "run"), outcome(tmp_path / "b" / "run"))


@pytest.mark.parametrize(("name", "call"), [("write_metrics", 1), ("save", 2)])
def test_stop_at_the_end_of_an_epoch(name, call, data, straight, tmp_path, monkeypatch):
    """A signal while an epoch is being finished, the last one too, is obeyed, and what was done is kept."""
    with monkeypatch.context() as patch:
        at_call(patch, RunDirectory, name, call, kill_self(signal.SIGTERM))
        assert tiny.train(data, tmp_path) == 143
    assert tiny.train(data, tmp_path, "--resume") == 0
    assert_equal(straight, outcome(tmp_path / "run"))


def test_stop_while_testing(data, straight, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_call(patch, commands.train, "evaluate", 1, kill_self(signal.SIGTERM), before=True)
        assert tiny.train(data, tmp_path) == 143
    assert "--resume" in capsys.readouterr().err
    assert tiny.train(data, tmp_path, "--resume") == 0
    assert_equal(straight, outcome(tmp_path / "run"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_run_equals_undisturbed(data, straight, tmp_path):
    """kill -9 in the middle of an epoch, and of a save that is written but not yet in its place."""
    kills = [(training, "update_weights", 3), (os, "replace", 2)]
    for owner, name, call in kills:
        process = os.fork()
        if process == 0:
            try:
                at_call(pytest.MonkeyPatch(), owner, name, call, kill_self(signal.SIGKILL), before=True)
                tiny.train(data, tmp_path, "--checkpoint_every=1u", "--resume=auto")
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert list((tmp_path / "run").glob(".*.tmp")) and position(tmp_path) == (0, 2)
    assert tiny.train(data, tmp_path, "--resume=auto") == 0
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert_equal(straight, outcome(tmp_path / "run"))


# ------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize(("every", "expected"), [("2u", (1, 1)), ("0.0000001m", (1, 2))])
def test_checkpoint_every(every, expected, data, straight, tmp_path, monkeypatch):
    """A run that ends without warning in its last update goes on from the last checkpoint within the epoch."""

    with monkeypatch.context() as patch:
        at_call(patch, training, "update_weights", 6, tiny.raising(RunError("the plug was pulled")))
        assert tiny.train(data, tmp_path, f"--checkpoint_every={every}") == 1
    assert position(tmp_path) == expected
    assert tiny.train(data, tmp_path, "--resume") == 0
    assert_equal(straight, outcome(tmp_path / "run"))


def test_first_last_pt_that_was_never_written(data, straight, tmp_path, monkeypatch, capsys):
    """Killed, or out of disk, after the first best_model.pt: nothing to go on from, and `auto` begins anew."""
    original = checkpoint.replace_file

    def fail(path, size, fill):
        if path.name == "last.pt":
            raise RunError("the disk is full")
        original(path, size, fill)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "replace_file", fail)
        assert tiny.train(data, tmp_path) == 1
    assert (tmp_path / "run" / "best_model.pt").exists() and not (tmp_path / "run" / "last.pt").exists()
    capsys.readouterr()
    assert tiny.train(data, tmp_path) == 2 and "--resume" not in capsys.readouterr().err
    assert tiny.train(data, tmp_path, "--resume=auto") == 0
    assert_equal(straight, outcome(tmp_path / "run"))


def test_metrics_that_were_cut_short_are_whole_again(data, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, RunDirectory, "write_metrics", 2, tiny.raising(RunError("the disk is full")), before=True)
        assert tiny.train(data, tmp_path) == 1
    assert tiny.train(data, tmp_path, "--resume") == 0
    assert_equal(straight, outcome(tmp_path / "run"))


def test_another_precision_is_refused(data, begun, capsys):
    """`--amp_dtype auto` is another type on another device."""
    file = begun / "run" / "last.pt"
    torch.save({**torch.load(file, weights_only=True), "precision": "amp-fp16"}, file)
    assert tiny.train(data, begun, "--resume") == 2
    said = capsys.readouterr().err
    assert "amp-fp16" in said and "fp32" in said and "--amp_dtype" in said


def test_nothing_to_resume(data, tmp_path, capsys):
    assert tiny.train(data, tmp_path, "--resume") == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(data, straight, tmp_path):
    assert tiny.train(data, tmp_path) == 0
    assert tiny.train(data, tmp_path, "--resume") == 0
    assert_equal(straight, outcome(tmp_path / "run"))


# ----------------------------------------------------------------------------------- options
@pytest.fixture(scope="module")
def begun_once(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, training, "update_weights", 2, kill_self(signal.SIGINT))
        assert tiny.train(data, runs) == 130
    return runs


@pytest.fixture
def begun(begun_once, tmp_path):
    """Return a folder of runs with a copy of a run that was stopped after two updates."""
    return shutil.copytree(begun_once, tmp_path / "runs")


@pytest.mark.parametrize(
    "option",
    ["--learning_rate=0.5", "--epochs=3", "--amp", "--seed=1", "--image_size=40", "--ema=0.5", "--model=squeezenet1_1"],
)
def test_changed_option_is_refused(option, data, begun, capsys):
    before = (begun / "run" / "last.pt").read_bytes()
    name, _, value = option.partition("=")
    assert tiny.train(data, begun, "--resume", option) == 2
    said = capsys.readouterr().err
    assert f"{name}: begun with " in said and f"now {value or True}" in said
    assert (begun / "run" / "last.pt").read_bytes() == before


def test_harmless_options_may_change(data, straight, begun):
    harmless = ["--num_workers=2", "--log_interval=1", "--cache=none", "--checkpoint_every=1u", "--tensorboard"]
    if not tiny.has("tensorboard"):
        harmless.pop()
    assert tiny.train(data, begun, "--resume", *harmless) == 0
    assert_equal(straight, outcome(begun / "run"))


def test_finished_run_is_not_overwritten(data, tmp_path, capsys):
    assert tiny.train(data, tmp_path) == 0
    before = outcome(tmp_path / "run")
    assert tiny.train(data, tmp_path, "--seed=1") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert tiny.train(data / "nowhere", tmp_path, "--overwrite", "--seed=1") == 2  # wrong input loses nothing
    assert tiny.train(data, tmp_path, "--overwrite", "--seed=1", "--model=resnet999") == 2
    assert_equal(before, outcome(tmp_path / "run"))
    assert tiny.train(data, tmp_path, "--overwrite", "--seed=1") == 0
    assert outcome(tmp_path / "run") != before


def test_begun_run_is_not_overwritten(data, begun, capsys):
    assert tiny.train(data, begun) == 2
    assert "--resume" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ config
def test_config_repeats_a_run(data, straight, tmp_path):
    assert tiny.train(data, tmp_path, name="first") == 0
    again = ["train", f"--config={tmp_path / 'first' / 'config.json'}", f"--checkpoint_dir={tmp_path}"]
    assert main.main([*again, "--checkpoint_name=second"]) == 0
    assert_equal(straight, outcome(tmp_path / "second"))
    assert main.main([*again, "--checkpoint_name=third", "--epochs=1"]) == 0  # the command line wins
    assert tiny.config(tmp_path / "third")["options"]["epochs"] == 1
    assert tiny.config(tmp_path / "third")["options"]["learning_rate"] == 1e-2


HOSTILE_OPTIONS = {
    "batch_size": (-5, "many"),
    "model": (5,),
    "epochs": ([1],),
    "amp": ("perhaps",),
    "cache": ("never",),
    "checkpoint_every": ("soon",),
    "image_size": (None,),
    "learning_rate": (math.nan,),
}


def test_hostile_config_is_refused(data, tmp_path, capsys):
    options = [json.dumps({"options": {name: value}}) for name, values in HOSTILE_OPTIONS.items() for value in values]
    for content in ("", "{", "[]", "{}", '{"options": []}', "\ud800", 10**5 * "[", *options):
        file = tmp_path / "config.json"
        file.write_bytes(content.encode("utf-8", "surrogatepass"))
        assert main.main(["train", f"--config={file}", f"--data_dir={data}", f"--checkpoint_dir={tmp_path}"]) == 2
        said = capsys.readouterr().err
        assert "config.json" in said and len(said.splitlines()) <= 4, content[:80]


@pytest.mark.parametrize("content", ["", "{}", '{"options": {}}', '{"options": {"seed": 42}, "versions": 3}'])
def test_damaged_config_of_a_begun_run(content, data, begun, capsys):
    (begun / "run" / "config.json").write_text(content)
    status = tiny.train(data, begun, "--resume")
    assert (status, "config.json" in capsys.readouterr().err) in [(0, False), (2, True)]


def test_other_environment_is_said(data, begun, capsys):
    file = begun / "run" / "config.json"
    stored = json.loads(file.read_text())
    stored["versions"]["torch"] = "0.4"
    stored["device_name"] = "an abacus"
    stored["threads"] = 99
    file.write_text(json.dumps(stored))
    commands = [tiny.words(data, begun, "--resume"), tiny.words(data, begun, f"--config={file}", name="other")]
    for command in commands:
        assert main.main([word for word in command if word != "--quiet"]) == 0
        said = capsys.readouterr().out
        for was in ("0.4", "an abacus", "99"):
            assert was in said
