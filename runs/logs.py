"""What a run tells the tools that teams watch: TensorBoard, Weights & Biases, MLflow; one small adapter for each.

All are told the same under the same names, those of metrics.jsonl and result.json. A resumed run continues its log. A
log that fails is given up with a warning, because no training may end for it. Knows nothing of how values come about.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from system.files import json_text, write_text
from utils import UserError, printable

PROJECT = "amp-train"  # of W&B, and the experiment of MLflow, unless their own variables name another
STATE = "logs.json"  # in the run's folder: which epochs each log has, and under which name it knows this run


class Adapter(Protocol):
    """One tool's log of one run. A `state` that is handed to it at the start may keep what it needs to go on."""

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        """Adds the numbers of one epoch, so that they are there although the process be killed."""

    def picture(self, file: Path, epoch: int) -> None:
        """Adds a PNG."""

    def close(self, ending: str) -> None:
        """Ends the log; `ending` is finished, stopped or failed."""


class Logs:
    """The logs of one run, told together."""

    def __init__(
        self,
        names: Iterable[str],
        folder: Path,
        *,
        options: dict[str, Any],
        history: list[dict[str, Any]],
        warn: Callable[[str], None],
    ):
        """Opens, or goes on with, the logs `names` of the run in `folder`; `history` is its epochs so far."""
        self._folder = folder
        self._warn = warn
        self._state = _read_state(folder / STATE)
        self._told: set[str] = set()  # names of an epoch's numbers
        self._adapters: dict[str, Adapter] = {}
        for name in names:
            own = self._state.setdefault(name, {"epoch": 0})
            with self._guarded(name):
                self._adapters[name] = LOGS[name].adapter(folder, options, own)
        self.epochs(history)

    def epochs(self, history: list[dict[str, Any]]) -> None:
        """Tells each log the epochs that it does not have yet, whoever was stopped before it could."""
        self._told |= set(history[-1] if history else ())
        for name, adapter in list(self._adapters.items()):
            own = self._state[name]
            with self._guarded(name):
                for line in history[own["epoch"] :]:
                    adapter.scalars(_numbers(line), line["epoch"])
                    own["epoch"] = line["epoch"]
        if self._adapters:
            with self._guarded():
                write_text(self._folder / STATE, json_text(self._state))

    def result(self, values: dict[str, Any], pictures: Iterable[Path]) -> None:
        """Tells the numbers of the test, less those that an epoch has under the same name, and shows the pictures."""
        values = {name: value for name, value in values.items() if name not in self._told}
        files = [file for file in pictures if file.exists()]
        for name, adapter in list(self._adapters.items()):
            with self._guarded(name):
                epoch = max(1, self._state[name]["epoch"])
                adapter.scalars(_numbers(values), epoch)
                for file in files:
                    adapter.picture(file, epoch)

    def close(self, ending: str) -> None:
        for name, adapter in list(self._adapters.items()):
            with self._guarded(name):
                adapter.close(ending)
        self._adapters.clear()

    @contextlib.contextmanager
    def _guarded(self, name: str = "") -> Iterator[None]:
        """Gives up the log `name` if the block fails: these tools raise nearly every type."""
        try:
            yield
        except Exception as error:
            self._adapters.pop(name, None)
            reason = printable(f"{type(error).__name__}: {error}")[:300]
            self._warn(f"the log {name or STATE} goes no further ({reason}); the training does.")


def refuse_missing_packages(names: Iterable[str]) -> None:
    """Raises UserError if a log needs a package that is not installed: before the work, not after it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log {name} needs a package: pip install {LOGS[name].package}")


def _read_state(file: Path) -> dict[str, dict[str, Any]]:
    """What an earlier process of this run noted; nothing if there was none or the note is damaged."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and all(
            isinstance(own, dict) and isinstance(own.get("epoch"), int) for own in content.values()
        ):
            return content
    return {}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl or of result.json; the epoch is no measurement."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and name != "epoch"
    }


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, folder: Path, options: dict[str, Any], state: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        begun = state["epoch"]
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=begun + 1 if begun else None)
        if not begun:
            text = "\n".join(f"    {name}: {value}" for name, value in options.items())  # Markdown shows it as it is
            self._writer.add_text("options", text, 0)

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
    """A run of W&B with its files in the run's folder `wandb`.

    It is offline unless WANDB_MODE says otherwise or an account is set up; `wandb sync` sends it later. The epoch is
    the horizontal axis, so that an epoch which a killed process had told already lies on itself.
    """

    def __init__(self, folder: Path, options: dict[str, Any], state: dict[str, Any]):
        import wandb

        self._wandb = wandb
        state.setdefault("id", uuid.uuid4().hex[:8])
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            mode=os.environ.get("WANDB_MODE") or ("online" if _wandb_account() else "offline"),
            dir=str(folder),
            id=state["id"],
            resume="allow",
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=folder.name,
            group=folder.parent.name,
            config=options,
            settings=wandb.Settings(console="off", silent=True, disable_git=True),  # it writes on the user's terminal
        )
        self._run.define_metric("*", step_metric="epoch")

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        self._run.log({"epoch": epoch, **values})

    def picture(self, file: Path, epoch: int) -> None:
        self._run.log({"epoch": epoch, file.stem: self._wandb.Image(str(file))})

    def close(self, ending: str) -> None:
        self._run.finish(exit_code=0 if ending == "finished" else 1)


def _wandb_account() -> bool:
    """Whether a key is set up; without one W&B would ask for it on the terminal."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, RuntimeError, netrc.NetrcParseError):
        return "api.wandb.ai" in netrc.netrc(os.environ.get("NETRC") or None).hosts
    return False


class MLflow:
    """A run in the file store `mlruns` beside the run's folder, or wherever MLFLOW_TRACKING_URI says."""

    _STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, folder: Path, options: dict[str, Any], state: dict[str, Any]):
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # version 3 prefers a database, which needs more
        self._metric = Metric
        store = folder.absolute().parent / "mlruns"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or store.as_uri())
        self._id = state.get("id")
        if self._id is not None:
            try:
                self._client.update_run(self._id, status="RUNNING")
                return
            except MlflowException:  # the store was removed, or it is another one: the whole run is told again
                state["epoch"] = 0
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = state["id"] = self._client.create_run(place, run_name=folder.name).info.run_id
        self._client.log_batch(self._id, params=[Param(name, str(value)[:500]) for name, value in options.items()])

    def scalars(self, values: dict[str, float], epoch: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[self._metric(*pair, now, epoch) for pair in values.items()])

    def picture(self, file: Path, epoch: int) -> None:
        self._client.log_artifact(self._id, str(file))

    def close(self, ending: str) -> None:
        self._client.set_terminated(self._id, self._STATUS[ending])


@dataclass(frozen=True)
class Log:
    """One name of `--log`, which is also the name of the module that its adapter imports."""

    adapter: Callable[[Path, dict[str, Any], dict[str, Any]], Adapter]
    package: str  # to install if there is no such module


LOGS = {
    "tensorboard": Log(TensorBoard, "tensorboard"),
    "wandb": Log(WeightsAndBiases, "wandb"),
    "mlflow": Log(MLflow, "mlflow-skinny"),
}
