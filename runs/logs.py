"""Log a run to TensorBoard, Weights & Biases and MLflow, each through one small class.

All get the same numbers under the names of metrics.jsonl and result.json. A resumed run continues in the same log. If a
log fails, it is dropped with a warning, because it must not end a training.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import UserError, printable

PROJECT = "amp-train"  # W&B's project and MLflow's experiment, unless their own variables name another


class Logs:
    """The logs of one run."""

    def __init__(
        self,
        names: Iterable[str],
        folder: Path,
        *,
        options: dict[str, Any],
        history: list[dict[str, Any]],
        warn: Callable[[str], None],
    ):
        """Open the logs `names`; if the run has a `history`, continue its earlier logs."""
        self._warn = warn
        self._last = history[-1] if history else {"epoch": 1}
        self._logs: dict[str, Any] = {}
        for name in names:
            try:
                self._logs[name] = LOGS[name].adapter(folder, options, bool(history))
            except Exception as error:  # these packages raise nearly every type
                self._give_up(name, error)

    def epoch(self, line: dict[str, Any]) -> None:
        """Log one epoch's entry of metrics.jsonl."""
        self._last = line
        self._tell("scalars", _numbers(line), line["epoch"])

    def result(self, values: dict[str, Any], pictures: Iterable[Path]) -> None:
        """Log the numbers of the test, except those that an epoch has under the same name, and the pictures."""
        epoch = self._last["epoch"]
        numbers = _numbers({name: value for name, value in values.items() if name not in self._last})
        self._tell("scalars", numbers, epoch)
        for file in pictures:
            if file.exists():
                self._tell("picture", file, epoch)

    def close(self, ending: str) -> None:
        """Close all logs; `ending` is finished, stopped or failed."""
        self._tell("close", ending)
        self._logs.clear()

    def _tell(self, method: str, *values: Any) -> None:
        for name, log in list(self._logs.items()):
            try:
                getattr(log, method)(*values)
            except Exception as error:
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._logs.pop(name, None)
        reason = printable(f"{type(error).__name__}: {error}")[:300]
        self._warn(f"the log {name} goes no further ({reason}); the training does.")


def refuse_missing_packages(names: Iterable[str]) -> None:
    """Raise UserError if a log needs a package that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log {name} needs a package: pip install {LOGS[name].package}")


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of an entry of metrics.jsonl or of result.json, without the epoch."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and name != "epoch"
    }


class TensorBoard:
    """Write event files into the run's folder `tensorboard`."""

    def __init__(self, folder: Path, options: dict[str, Any], resumed: bool):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard")
        if not resumed:
            self._writer.add_text("options", "\n".join(f"    {name}: {value}" for name, value in options.items()))

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def picture(self, file: Path, epoch: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file, formats=["PNG"]) as image:
            self._writer.add_image(file.stem, np.asarray(image.convert("RGB")), epoch, dataformats="HWC")

    def close(self, ending: str) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Log a W&B run in the run's folder `wandb`; offline unless WANDB_MODE or WANDB_API_KEY is set."""

    def __init__(self, folder: Path, options: dict[str, Any], resumed: bool):
        import wandb

        self._wandb = wandb
        earlier = sorted(folder.glob("wandb/*run-*-*")) if resumed else []
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode=os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline"),
            dir=str(folder),
            id=earlier[-1].name.rpartition("-")[2] if earlier else None,  # the name ends with the run's id
            resume="allow",
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=folder.name,
            group=folder.parent.name,
            config=options,
            settings=wandb.Settings(console="off", silent=True, disable_git=True),  # it prints to the user's terminal
        )
        self._run.define_metric("*", step_metric="epoch")

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        self._run.log({"epoch": epoch, **values})

    def picture(self, file: Path, epoch: int) -> None:
        self._run.log({"epoch": epoch, file.stem: self._wandb.Image(str(file))})

    def close(self, ending: str) -> None:
        self._run.finish(exit_code=0 if ending == "finished" else 1)


class MLflow:
    """Log a run to the file store `mlruns` beside the run's folder, or to MLFLOW_TRACKING_URI."""

    _STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, folder: Path, options: dict[str, Any], resumed: bool):
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.tracking import MlflowClient

        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # version 3 prefers a database, which needs more
        self._metric = Metric
        store = folder.absolute().parent / "mlruns"
        self._client = client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or store.as_uri())
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else client.create_experiment(name)
        tag = RunTag("folder", str(folder.absolute()))
        for run in client.search_runs([place]) if resumed else []:  # the newest first
            if run.data.tags.get(tag.key) == tag.value:
                self._id = run.info.run_id
                client.update_run(self._id, status="RUNNING")
                return
        self._id = client.create_run(place, run_name=folder.name).info.run_id
        params = [Param(name, str(value)[:500]) for name, value in options.items()]
        client.log_batch(self._id, params=params, tags=[tag])

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[self._metric(*pair, now, epoch) for pair in values.items()])

    def picture(self, file: Path, epoch: int) -> None:
        self._client.log_artifact(self._id, str(file))

    def close(self, ending: str) -> None:
        self._client.set_terminated(self._id, self._STATUS[ending])


@dataclass(frozen=True)
class Log:
    """A value of `--log`, which is also the name of the module that its adapter imports."""

    adapter: Callable[[Path, dict[str, Any], bool], Any]  # the run's folder, its options, True if it was resumed
    package: str  # to install if the module is missing


LOGS = {
    "tensorboard": Log(TensorBoard, "tensorboard"),
    "wandb": Log(WeightsAndBiases, "wandb"),
    "mlflow": Log(MLflow, "mlflow-skinny"),
}
