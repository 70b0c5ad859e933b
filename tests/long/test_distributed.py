"""Several processes of a job against one: the same losses and weights, one voice, faults and restarts.

Two gloo processes on this machine, which are forks except where torchrun itself is tried. Networks without dropout and
with fixed batch statistics, because those alone depend on ranks. Run it alone: pytest tests/long/test_distributed.py
"""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed.run
from forks import Process
from ranks import steady
from tiny import computed_metrics, run_main

import assemble
import model

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
SCENARIOS = {  # name: (options of the run, what happens to which rank)
    "fp32": ([], {}),
    "bf16": (["--amp", "--accumulate=2", "--clip_grad_norm=0.5"], {"count": True}),
    "fp16": (["--amp", "--amp_dtype=float16", "--epochs=1"], {"rank": 1, "what": "spoil", "at": 2}),
    "resnet": (["--model=resnet18", "--batch_size=43", "--epochs=1"], {}),  # some ranks have no image of the last one
    "probe": (["--preset=probe", "--epochs=3", "--batch_size=15"], {}),
    "stopped": ([], {"rank": 1, "what": "stop", "at": 5}),
    "resumed": (["--resume"], {}),
}


PROGRAM = Path(__file__).parent / "ranks.py"


def words(data, runs, name, *more):
    options = ["--image_size=33", "--batch_size=15", "--optimizer=SGD", "--warmup_epochs=0", "--log_interval=1"]
    line = tiny.words(data, runs, *options, *more, name=name)[1:]
    return [word for word in line if word != "--quiet"]


def job(scenarios, folder):
    """Return the file of the scenarios and the folder for the results of each rank: the arguments of ranks.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    return folder / "scenarios.json", folder


def ranks(scenarios, folder, **variables):
    """Two ranks of a job, each of which plays all scenarios; they have ended well."""
    place = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": tiny.free_port()}
    given = job(scenarios, folder)
    started = []
    for rank in range(2):
        own = place | {"RANK": rank, "LOCAL_RANK": rank} | variables
        environment = tiny.environment(**{name: str(value) for name, value in own.items()})
        started.append(Process(given, script=PROGRAM, env=environment))
    for process in started:
        status, _, err = tiny.finish(process, 300)
        assert status == 0, err


def torchrun(scenarios, folder, *options):
    """torchrun, which starts ranks.py in two fresh processes."""
    command = ("--standalone", "--nproc_per_node=2", *options, PROGRAM, *job(scenarios, folder))
    return Process(command, script=torch.distributed.run.__file__, env=tiny.environment())


def seen_by(folder, count=2):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(count)]


def weights(folder, file="last.pt"):
    return torch.load(folder / file, weights_only=True)["model"]


def assert_close_runs(ours, theirs, tolerance):
    """Compare losses, accuracies, confusion matrix and weights, up to the rounding of another order of sums."""
    exact = tolerance < 1e-3  # coarser rounding may turn a prediction between two likely classes
    left_out = {"skips", "loss_scale", *(() if exact else ("train_acc", "val_acc", "val_balanced_acc", "val_macro_f1"))}
    for one, other in zip(computed_metrics(ours), computed_metrics(theirs), strict=True):
        for name in one.keys() - left_out:
            factor = 5 if name == "grad_norm" else 1
            assert one[name] == pytest.approx(other[name], rel=factor * tolerance, abs=tolerance), name
    one, other = (json.loads((folder / "result.json").read_text()) for folder in (ours, theirs))
    assert one["test_loss"] == pytest.approx(other["test_loss"], rel=tolerance)
    ours_counted = np.array(one["confusion"])
    theirs_counted = np.array(other["confusion"])
    assert ours_counted.sum(1).tolist() == theirs_counted.sum(1).tolist() and ours_counted.sum() == 17
    assert not exact or np.array_equal(ours_counted, theirs_counted)
    expected = weights(theirs)
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def assert_equal_runs(ours, theirs):
    assert computed_metrics(ours) == computed_metrics(theirs)
    expected = weights(theirs)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(ours).items())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """No count is even: 44 images to train, 11 to validate, 17 to test."""
    return tiny.draw(tmp_path_factory.mktemp("odd"), train=55, test=17)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Run the same trainings in one process; return the folder of their runs."""
    runs = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "build_model", steady(model.build_model))
        patch.setattr(assemble, "empty_model", steady(model.empty_model))
        for name, (more, what) in SCENARIOS.items():
            if not what or what.get("count"):
                more = [word for word in more if word != "--resume"]
                status, _, err = run_main(words(data, runs, name, *more))
                assert status == 0, err
    return runs


@pytest.fixture(scope="module")
def pair(data, alone, tmp_path_factory):
    """Two ranks, all scenarios in one job: (folder of the runs, what each rank saw)."""
    runs = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:  # begun by one process, resumed by two
        patch.setattr(assemble, "build_model", steady(model.build_model))
        patch.setattr(assemble, "empty_model", steady(model.empty_model))
        patch.setattr(
            sys.modules["train"].Trainer,
            "_must_stop",
            lambda self: self.updates_done == 4 and not setattr(self.stop, "number", signal.SIGTERM),
        )
        assert run_main(words(data, runs, "resumed"))[0] == 143
    scenarios = {name: {"words": words(data, runs, name, *more), **what} for name, (more, what) in SCENARIOS.items()}
    here = [f"--checkpoint_dir={runs}", "--checkpoint_name=fp32"]
    commands = {
        "evaluate": here,
        "predict": [*here, str(data)],
        "compare": here,
        "doctor": [],
        "inspect": here,
        "export": here,
        "prepare": ["--check", f"--data_dir={data}"],
    }
    scenarios |= {name: {"words": [name, *more]} for name, more in commands.items()}
    scenarios["no data"] = {"words": words(runs / "nothing", runs, "x")}
    scenarios["too small"] = {"words": words(data, runs, "y", "--batch_size=3", "--accumulate=2")}
    scenarios["batchnorm"] = {"words": words(data, runs, "z", "--sync_batchnorm")}
    budget = [word for word in words(data, runs, "budget", "--budget=1s") if not word.startswith("--epochs")]
    scenarios["budget"] = {"words": budget}
    scenarios["option"] = {"words": ["--epochz=3"]}
    ranks(scenarios, runs / "job")
    return runs, seen_by(runs / "job")


# ----------------------------------------------------------------------------- the same numbers
@pytest.mark.parametrize("name, tolerance", [("fp32", 2e-5), ("resnet", 2e-4), ("probe", 2e-5), ("bf16", 2e-2)])
def test_two_ranks_compute_what_one_process_computes(pair, alone, name, tolerance):
    runs, seen = pair
    assert [rank[name]["status"] for rank in seen] == [0, 0]
    assert_close_runs(runs / name, alone / name, tolerance)
    assert seen[0][name]["weights"] == seen[1][name]["weights"]


def test_ranks_measure_together_for_a_budget(pair):
    folder, seen = pair
    assert len(computed_metrics(folder / "budget")) == 1
    assert ["too short" in each["budget"]["out"] for each in seen] == [True, False]


def test_the_probe_keeps_the_frozen_networks_outputs(pair):
    assert "the outputs of the frozen network are computed once" in pair[1][0]["probe"]["out"]


def test_the_comparison_is_of_something(alone):
    """The losses move, and precision changes them, by more than what ranks may change."""
    first, second = computed_metrics(alone / "fp32")
    assert abs(first["train_loss"] - second["train_loss"]) > 1e-3
    assert abs(second["train_loss"] - computed_metrics(alone / "bf16")[1]["train_loss"]) > 1e-5


def test_accumulation_exchanges_gradients_once_per_update(pair):
    assert [rank["bf16"]["exchanges"] for rank in pair[1]] == [6, 6]  # two epochs of three updates of two pieces


def test_an_infinity_on_one_rank_skips_the_update_on_all(pair):
    runs, seen = pair
    for rank in seen:
        assert rank["fp16"]["status"] == 0, rank["fp16"]["err"]
        skipped = {skip["update"]: skip["parameter"] for skip in rank["fp16"]["skips"]}
        assert skipped[2] == "fc.bias"  # the one that was spoiled, on the other rank, too
        assert rank["fp16"]["scale"] == 65536 / 2 ** len(skipped) and len(skipped) < 3
    assert seen[0]["fp16"]["skips"] == seen[1]["fp16"]["skips"]
    assert seen[0]["fp16"]["weights"] == seen[1]["fp16"]["weights"]
    assert all(tensor.isfinite().all() for tensor in weights(runs / "fp16").values())


def test_evaluate_counts_every_image_once(pair, alone):
    runs, seen = pair
    status, out, err = run_main(["evaluate", f"--checkpoint_dir={runs}", "--checkpoint_name=fp32"])
    line = next(line for line in out.splitlines() if line.startswith("Test accuracy"))
    assert status == 0 and line in seen[0]["evaluate"]["out"] and " of 17, " in line
    assert seen[0]["evaluate"]["status"] == 0


# -------------------------------------------------------------------------------- one voice
def test_only_the_first_rank_prints_and_writes(pair):
    runs, seen = pair
    assert "epoch   2/2" in seen[0]["fp32"]["out"] and "Test accuracy" in seen[0]["fp32"]["out"]
    for name in (*SCENARIOS, "evaluate"):
        assert seen[1][name]["out"] == "", name
    assert "stopped in epoch" in seen[0]["stopped"]["err"] + seen[1]["stopped"]["err"]
    assert json.loads((runs / "fp32" / "config.json").read_text())["ranks"] == 2
    assert not list(runs.glob("*/.*.tmp"))


@pytest.mark.parametrize("name", ["predict", "compare", "doctor", "inspect", "export", "prepare"])
def test_commands_for_one_process_say_so(pair, name):
    said = [rank[name]["err"] for rank in pair[1]]
    assert [rank[name]["status"] for rank in pair[1]] == [2, 2]
    assert sorted(map(bool, said)) == [False, True] and f"run {name} without torchrun" in "".join(said)


@pytest.mark.parametrize(
    "name, named",
    [
        ("no data", "no training images"),
        ("too small", "is too small for 2 processes"),
        ("batchnorm", "needs CUDA"),
        ("option", "did you mean --epochs"),
    ],
)
def test_a_mistake_is_named_once_for_all_ranks(pair, name, named):
    said = [rank[name]["err"] for rank in pair[1]]
    assert [rank[name]["status"] for rank in pair[1]] == [2, 2]
    assert sorted(map(bool, said)) == [False, True] and named in "".join(said)


# -------------------------------------------------------------------------- stopping and resuming
def test_ranks_agree_on_stopping_and_one_process_goes_on(pair, alone, data, monkeypatch):
    runs, seen = pair
    assert [rank["stopped"]["status"] for rank in seen] == [143, 143]  # only the second had the signal
    state = torch.load(runs / "stopped" / "last.pt", weights_only=True)["progress"]
    assert (state["epoch"], state["update"]) == (1, 2)
    monkeypatch.setattr(assemble, "build_model", steady(model.build_model))
    monkeypatch.setattr(assemble, "empty_model", steady(model.empty_model))
    status, out, err = run_main(words(data, runs, "stopped", "--resume"))
    assert status == 0 and "resuming after 1 epoch and 2 updates" in out, err
    assert_close_runs(runs / "stopped", alone / "fp32", 2e-5)


def test_two_ranks_go_on_where_one_process_stopped(pair, alone):
    runs, seen = pair
    assert [rank["resumed"]["status"] for rank in seen] == [0, 0]
    assert "resuming after 1 epoch and 1 update\n" in seen[0]["resumed"]["out"]
    assert_close_runs(runs / "resumed", alone / "fp32", 2e-5)


def test_a_killed_rank_is_said_once_restarted_and_comes_to_the_same_end(pair, data, tmp_path):
    scenario = {"words": words(data, tmp_path, "again", "--resume=auto"), "rank": 1, "what": "kill", "at": 5}
    status, out, err = tiny.finish(torchrun({"again": scenario}, tmp_path / "job", "--max_restarts=1"), 300)
    assert status == 0, err
    # torchrun's SIGTERM may come before the survivor notices
    said = [line for line in err.splitlines() if line.startswith(("error: this process lost the others", "stopped"))]
    assert len(said) == 1 and "--resume" in err, err
    assert 'main.py", line' not in err  # no traceback of this program
    assert "resuming after 1 epoch and 0 updates" in out
    assert_equal_runs(tmp_path / "again", pair[0] / "fp32")
    assert not (tmp_path / "again" / "failure.json").exists()


def test_sigterm_to_the_agent_saves(data, tmp_path):
    agent = torchrun({"run": {"words": words(data, tmp_path, "run", "--epochs=500")}}, tmp_path / "job")
    tiny.wait_for((tmp_path / "run" / "metrics.jsonl").exists, agent)
    agent.send_signal(signal.SIGTERM)
    _, _, err = tiny.finish(agent)
    assert err.count("stopped in epoch") == 1 and err.count("finishing this update") <= 1, err
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["progress"]
    said = next(line for line in err.splitlines() if "stopped in epoch" in line)
    assert f"stopped in epoch {state['epoch'] + 1} after update {state['update']} of 3" in said


# ------------------------------------------------------------------------------- two machines
def test_ranks_of_two_machines_are_as_good_as_two_of_one(pair, data, tmp_path):
    """Each is the first of its machine."""
    ranks({"nodes": {"words": words(data, tmp_path, "nodes")}}, tmp_path / "job", LOCAL_RANK=0, LOCAL_WORLD_SIZE=1)
    assert_close_runs(tmp_path / "nodes", pair[0] / "fp32", 1e-5)
    assert [rank["nodes"]["status"] for rank in seen_by(tmp_path / "job")] == [0, 0]
