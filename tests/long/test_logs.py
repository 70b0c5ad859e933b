"""The logs that teams watch, read back with the tools' own readers: the same names, the same numbers, continued.

Skipped for a tool that is not installed: pip install '.[tensorboard,wandb,mlflow]'
"""

import json
import os
import struct
import time

import pytest
import tiny
from PIL import Image
from test_main import METRICS, words
from tiny import metrics

from runs import logs
from utils import UserError

NAMES = ("tensorboard", "wandb", "mlflow")


def line(epoch: int) -> dict:
    return {"epoch": epoch, "train_loss": 1 / epoch, "val_acc": 50.0 + epoch, "loss_scale": None, "skips": []}


def history(epochs: int) -> list[dict]:
    return [line(epoch) for epoch in range(1, epochs + 1)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))  # whoever runs this test may have an account
    run = tmp_path / "checkpoint" / "my run"
    run.mkdir(parents=True)
    return run


@pytest.fixture
def opened(folder):
    """Return a function that opens the logs of the run; warnings are failures unless a list is given for them."""

    def open_logs(*names, epochs=0, warn=pytest.fail, **options):
        for name in names:
            tiny.has(name) or pytest.skip(f"{name} is not installed")
        time.sleep(1 - time.time() % 1 if "tensorboard" in names else 0)  # its files are read in order of their seconds
        return logs.Logs(names, folder, options={"batch_size": 8, **options}, history=history(epochs), warn=warn)

    return open_logs


def read_tensorboard(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return found | {name: [(e.step, e.width) for e in events.Images(name)] for name in events.Tags()["images"]}


def wandb_records(content: bytes):
    """Yield the records of a .wandb file: LevelDB's log format after seven bytes, in blocks of 32 KB."""
    at = 7
    record = b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:  # too little for a header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(folder) -> dict[str, list[tuple[int, float]]]:
    """Every offline file of the run, as `wandb sync` would read them one after the other."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        records = []
        until = time.monotonic() + 10  # `finish` returns some milliseconds before its process has written all
        while not any(record.HasField("exit") for record in records) and time.monotonic() < until:
            records = [Record.FromString(data) for data in wandb_records(file.read_bytes())]
        for record in records:
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name, value in values.items():
                if name != "epoch" and not name.startswith("_"):
                    found.setdefault(name, []).append((values["epoch"], value))
    return found


def read_mlflow(folder) -> dict[str, list[tuple[int, float]]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder.parent / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'amp-train'")
    (run,) = client.search_runs([experiment.experiment_id])
    names = run.data.metrics
    found = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names}
    return found | {file.path: run.info.status for file in client.list_artifacts(run.info.run_id)}


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow}


def numbers(name, folder) -> dict[str, list[tuple[int, float]]]:
    content = READERS[name](folder)
    return {
        key: [(step, pytest.approx(value, rel=1e-6)) for step, value in points]
        for key, points in content.items()
        if "." not in key and key != "curve"
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_log_has_every_epoch_the_test_and_the_pictures(name, opened, folder):
    told = opened(name)
    for epoch in (1, 2, 3):
        told.epoch(line(epoch))
    Image.new("RGB", (30, 20), "red").save(folder / "curve.png")
    told.result(
        {"test_acc": 87.5, "val_acc": 1.0, "classes": ["a", "b"]}, [folder / "curve.png", folder / "not drawn.png"]
    )
    told.close("finished")
    assert numbers(name, folder) == {
        "train_loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)],
        "val_acc": [(1, 51.0), (2, 52.0), (3, 53.0)],
        "test_acc": [(3, 87.5)],
    }
    content = READERS[name](folder)
    assert {"tensorboard": "curve", "wandb": "curve", "mlflow": "curve.png"}[name] in content
    assert name != "mlflow" or content["curve.png"] == "FINISHED"


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_continues_its_log(name, opened, folder):
    told = opened(name)
    told.epoch(line(1))
    told.close("stopped")
    told = opened(name, epochs=1)
    told.epoch(line(2))
    told.close("finished")
    assert numbers(name, folder)["val_acc"] == [(1, 51.0), (2, 52.0)]
    assert name != "wandb" or len({file.stem for file in folder.glob("wandb/*/*.wandb")}) == 1  # one id


def test_all_three_at_once_say_the_same(opened, folder):
    told = opened(*NAMES)
    told.epoch(line(1))
    told.epoch(line(2))
    told.result({"test_acc": 90.0}, [])
    told.close("finished")
    first, *others = (numbers(name, folder) for name in NAMES)
    assert first and all(other.keys() == first.keys() for other in others)
    assert [points for name in NAMES for points in READERS[name](folder)["val_acc"]] == 3 * [(1, 51.0), (2, 52.0)]


def test_a_log_that_fails_ends_no_training(opened, folder):
    said = []
    (folder / "tensorboard").write_text("in the way")
    told = opened("tensorboard", "mlflow", warn=said.append)
    told.epoch(line(1))
    told.close("finished")
    assert len(said) == 1 and "the log tensorboard goes no further" in said[0] and "\n" not in said[0]
    assert numbers("mlflow", folder)["val_acc"] == [(1, 51.0)]


def test_a_log_that_fails_later_is_given_up_once(opened, folder, monkeypatch):
    said = []
    told = opened("tensorboard", warn=said.append)
    told.epoch(line(1))
    monkeypatch.setattr(logs.TensorBoard, "scalars", lambda *_: 1 / 0)
    for epoch in (2, 3, 4):
        told.epoch(line(epoch))
    told.close("finished")
    assert len(said) == 1 and "ZeroDivisionError" in said[0]


def test_stopped_and_failed_runs_are_marked(opened, folder):
    opened("mlflow", epochs=1).close("stopped")
    (meta,) = (file for file in folder.parent.glob("mlruns/*/*/meta.yaml") if "status:" in file.read_text())
    assert "status: 5" in meta.read_text()  # KILLED
    opened("mlflow", epochs=1).close("failed")
    assert "status: 4" in meta.read_text()  # FAILED


def test_a_missing_package_is_said_before_the_work(monkeypatch):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda _: None)
    for name in NAMES:
        with pytest.raises(UserError, match=f"--log {name} needs a package: pip install {name}$"):
            logs.refuse_missing_packages([name])


@pytest.mark.usefixtures("drawn")
def test_tensorboard_shows_scalars_and_pictures(scenes_folder, tmp_path, run):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = words(
        scenes_folder, tmp_path, "run", "--model=tiny_classifier", "--tensorboard", "--amp", "--amp_dtype=float16"
    )
    assert run(given)[0] == run([*given, "--overwrite"])[0] == 0  # whose events take the place of the first run's
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    lines = metrics(tmp_path / "run")
    tags = found.Tags()
    assert set(tags["images"]) == {"learning_curve", "confusion_matrix", "mistakes"}
    of_the_test = {
        "test_acc",
        "balanced_acc",
        "macro_f1",
        "specificity",
        "roc_auc",
        "average_precision",
        "top5_acc",
        "test_loss",
        "best_epoch",
        "best_val_acc",
        "calibration_error",
        "calibrated_error",
        "temperature",
    }
    assert set(tags["scalars"]) - {"training_memory_mb"} == {*METRICS.split()} - {"epoch", "skips"} | of_the_test | {
        "total_seconds",
        "train_seconds",
    }
    for name in ("learning_rate", "loss_scale", "val_acc"):
        values = [(event.step, event.value) for event in found.Scalars(name)]
        assert values == [(line["epoch"], pytest.approx(line[name])) for line in lines]
