"""Log a run to TensorBoard, Weights & Biases and MLflow, each through one small class.

All get the same numbers under the names of metrics.jsonl and result.json. A resumed run continues in the same log. If a
log fails, it is dropped with a warning, because it must not end a training.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from utils import UserError, with_type

Values = dict[str, Any]
PROJECT = "amp-train"  # W&B's project and MLflow's experiment, unless their own variables name another


class Logs:
    """The logs `names` of one run; if the run has a `history`, they continue its earlier logs."""

    def __init__(
        self, names: Iterable[str], folder: Path, *, options: Values, history: list[Values], warn: Callable[[str], None]
    ):
        self._warn = warn
        self._last = history[-1] if history else {"epoch": 1}
        self._logs = {name: LOGS[name]() for name in names}
        self._each("open", folder, options, bool(history))

    def epoch(self, line: Values) -> None:
        """Log one epoch's entry of metrics.jsonl."""
        self._last = line
        self._each("scalars", _numbers(line), line["epoch"])

    def result(self, values: Values, pictures: Iterable[Path]) -> None:
        """Log the numbers of the test, except those that an epoch has under the same name, and the pictures."""
        epoch = self._last["epoch"]
        self._each("scalars", _numbers({name: values[name] for name in values if name not in self._last}), epoch)
        for file in pictures:
            if file.exists():
                self._each("picture", file, epoch)

    def close(self, ending: str) -> None:
        """Close all logs; `ending` is finished, stopped or failed."""
        self._each("close", ending)
        self._logs.clear()

    def _each(self, method: str, *values: Any) -> None:
        for name, log in list(self._logs.items()):
            try:
                getattr(log, method)(*values)
            except Exception as error:  # these packages raise nearly every type
                del self._logs[name]
                self._warn(f"the log {name} goes no further ({with_type(error)}); the training does.")


def refuse_missing_packages(names: Iterable[str]) -> None:
    """Raise UserError if a log needs a package that is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log {name} needs a package: pip install {name}")


def _numbers(values: Values) -> dict[str, float]:
    """Return the finite numbers of an entry of metrics.jsonl or of result.json, without the epoch."""
    numbers = {name: float(value) for name, value in values.items() if type(value) in (int, float) and name != "epoch"}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


class TensorBoard:
    """Write event files into the run's folder `tensorboard`."""

    def open(self, folder: Path, options: Values, resumed: bool) -> None:
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

        self._writer.add_image(
            file.stem, np.asarray(Image.open(file, formats=["PNG"]).convert("RGB")), epoch, dataformats="HWC"
        )

    def close(self, ending: str) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Log a W&B run in the run's folder `wandb`; offline unless WANDB_MODE or WANDB_API_KEY is set."""

    def open(self, folder: Path, options: Values, resumed: bool) -> None:
        import wandb

        self._image = wandb.Image
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
        self._run.log({"epoch": epoch, file.stem: self._image(str(file))})

    def close(self, ending: str) -> None:
        self._run.finish(exit_code=0 if ending == "finished" else 1)


class MLflow:
    """Log a run to the file store `mlruns` beside the run's folder, or to MLFLOW_TRACKING_URI."""

    def open(self, folder: Path, options: Values, resumed: bool) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # version 3 prefers a database, which needs more
        import mlflow

        self._mlflow = mlflow
        place = str(folder.absolute())
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or (Path(place).parent / "mlruns").as_uri())
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        runs = mlflow.search_runs(output_format="list") if resumed else []  # the newest first
        earlier = [run.info.run_id for run in runs if run.data.tags.get("folder") == place][:1]
        mlflow.start_run(*earlier, run_name=folder.name, tags={"folder": place})
        if not earlier:
            mlflow.log_params({name: str(value)[:500] for name, value in options.items()})

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        self._mlflow.log_metrics(values, step=epoch)

    def picture(self, file: Path, epoch: int) -> None:
        self._mlflow.log_artifact(str(file))

    def close(self, ending: str) -> None:
        self._mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending])


# By value of --log, which is also the name of the package that each needs.
LOGS: Values = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
