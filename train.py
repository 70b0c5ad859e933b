"""The loop. `update_weights` is the whole AMP recipe; the rest feeds it, reads it, saves it and stops.

FP32 and AMP take the same path: FP32 is a disabled autocast and a disabled GradScaler. Nothing in the step
waits for the device. Knows nothing of options, files' layout or how pictures are drawn.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dataset import Batches, MicroBatch
from evaluate import Evaluation, evaluate
from metrics import Meter, UnusedParameters, UpdateRecord, best_epochs
from model import BuffersBefore, Forward, Network
from optimizer import SmoothedCrossEntropy
from precision import Precision
from runs.checkpoint import Progress, load_moments
from runs.folder import RunDirectory
from system.terminal import duration
from system.waiting import Waiting
from utils import Interrupted, StopSignal, progress, seed_everything


def update_weights(
    model: Forward,
    micro_batches: Iterable[MicroBatch],
    image_count: int,
    *,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    criterion: nn.Module,
    clip_grad_norm: float | None,
    ranks: int = 1,
) -> torch.Tensor:
    """One optimizer update on `image_count` images, in micro-batches: the whole AMP recipe.

    Returns what `UpdateRecord.row` describes, still on the device. The order of the five scaler calls is PyTorch's
    own: https://docs.pytorch.org/docs/stable/notes/amp_examples.html
    """
    record = UpdateRecord()
    buffers = BuffersBefore(model, scaler)  # the forward pass writes BatchNorm's statistics, whatever comes of it
    for images, labels, weight, last in micro_batches:
        # DDP averages gradients over ranks once per update, during the backward pass of the last micro-batch.
        with contextlib.nullcontext() if last or ranks == 1 else model.no_sync():
            with precision.autocast():  # forward and loss only: backward ops run in their forward's dtype
                logits = model(images)
                loss = criterion(logits, labels) * weight  # a sum over the micro-batch
            scaler.scale(loss * (ranks / image_count)).backward()
        record.add(loss, logits, labels, weight)
    scaler.unscale_(optimizer)  # from here on .grad holds true gradients, which is what clipping needs
    norm = record.gradient_norm(model, scaler)
    if clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip_grad_norm, norm)
    scaler.step(optimizer)  # skipped as a whole, inside the fused kernel, if any gradient is not finite
    buffers.put_back_if_skipped(norm)
    scaler.update()  # halves the scale after a skip, doubles it after 2,000 updates without one
    optimizer.zero_grad(set_to_none=True)
    return record.row()


@dataclass
class Trainer:
    """Trains `network` on `batches`, validates after each epoch, keeps last.pt and best_model.pt in `run`."""

    network: Network
    optimizer: torch.optim.Optimizer
    make_scheduler: Callable[..., LRScheduler]  # done=updates done: the schedule, standing there
    precision: Precision
    batches: Batches
    validation: Batches
    run: RunDirectory
    epochs: int
    seed: int
    label_smoothing: InitVar[float] = 0.0
    class_weights: InitVar[torch.Tensor | None] = None  # (classes,), on the device
    best_by: str = "accuracy"  # a key of choices.METRICS
    clip_grad_norm: float | None = None
    log_interval: int = 20
    checkpoint_every: str | None = None
    patience: int | None = None
    max_seconds: InitVar[float | None] = None  # of this process, in all
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None
    record: dict[str, Any] = field(default_factory=dict)  # what a checkpoint says of its run
    criterion: nn.Module = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    scheduler: LRScheduler = field(init=False)
    progress: Progress = field(init=False, default_factory=Progress)
    meter: Meter = field(init=False)
    stop: StopSignal = field(init=False)
    unused: UnusedParameters = field(init=False)
    begun: float = field(init=False, default_factory=time.perf_counter)  # less what was trained before a resume
    prepared: float = field(init=False, default=0.0)  # seconds before the first epoch
    frozen_seconds: float | None = field(init=False, default=None)  # of a frozen network computed once, until recorded
    epoch_begun: float = field(init=False, default_factory=time.perf_counter)  # less what was done before a resume
    last_save: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(
        self, label_smoothing: float, class_weights: torch.Tensor | None, max_seconds: float | None
    ) -> None:
        self.stop = StopSignal(max_seconds)
        self.criterion = SmoothedCrossEntropy(label_smoothing, class_weights)
        self.scaler = self.precision.grad_scaler()
        self.scheduler = self.make_scheduler(done=0)
        self.unused = UnusedParameters(self.optimizer, self.network.model)
        self.meter = Meter(
            self.run.path, self.precision, self.scaler, self.batches.ranks, self.batches.updates_per_epoch
        )

    def train(self) -> None:
        """Trains from where the run stands to its end.

        Raises Stopped after a signal, with everything saved, and RunError if the run cannot go on.
        """
        self.last_save = time.monotonic()
        self.begun = time.perf_counter() - self.progress.elapsed
        self.meter.waiting = Waiting()
        with self.stop:
            if self.progress.epoch < self.epochs:
                self.frozen_seconds = self.batches.prepare()
                self.validation.prepare()
            self.prepared = 0.0 if self.progress.elapsed else self.seconds
            while self.progress.epoch < self.epochs and not self._out_of_patience():
                self._train_epoch()
                self._finish_epoch()
        self.run.write_metrics(self.progress.history)  # as last.pt knows it, whatever ended an earlier process
        self.run.flush()
        if self._must_stop():  # the signal came while the last epoch was being finished
            raise self.stop.stopped(
                f"stopped after the last epoch; saved in {self.run.path}. Test it with the same command and --resume."
            )

    @property
    def seconds(self) -> float:
        """Of this run so far, those before a resume included."""
        return time.perf_counter() - self.begun

    @property
    def updates_done(self) -> int:
        """Attempted updates, those that the scaler skipped included."""
        return self.progress.epoch * self.batches.updates_per_epoch + self.progress.update

    def _train_epoch(self) -> None:
        """The updates that are left of this epoch."""
        at = self.progress
        batches = self.batches
        other_layers = self.network.begin_epoch(at.epoch)
        if other_layers:
            self.unused.due = True
        if other_layers or batches.grows_in(at.epoch):
            self.meter.warming = True
        begun = self.epoch_begun = time.perf_counter() - at.epoch_seconds
        batches.seconds_waited = at.epoch_waited
        with self._bar() as bar:
            for micro_batches in batches.epoch(at.epoch, at.update):
                count = batches.images_in(at.update)
                seed_everything(self.seed, at.epoch, at.update, batches.ranks.rank)  # for dropout
                row = update_weights(
                    self.network.forward,
                    micro_batches,
                    count,
                    optimizer=self.optimizer,
                    scaler=self.scaler,
                    precision=self.precision,
                    criterion=self.criterion,
                    clip_grad_norm=self.clip_grad_norm,
                    ranks=batches.ranks.size,
                )
                self.meter.add(row)
                at.learning_rate = self.optimizer.param_groups[0]["lr"]
                self.scheduler.step()  # counts attempted updates: a skipped one does not shift the schedule
                self.network.after_update(self.updates_done)
                at.update += 1
                bar.update(count)
                ended = at.update == batches.updates_per_epoch
                stopping = self._must_stop()
                saving = not ended and self._save_is_due()
                if ended or stopping or saving or at.update % self.log_interval == 0:
                    self._read(bar)
                at.epoch_seconds = time.perf_counter() - begun
                at.epoch_waited = batches.seconds_waited
                if stopping:
                    self._save_and_stop()
                if saving:
                    self._save()
                    begun = time.perf_counter() - at.epoch_seconds  # saving is no training

    def _finish_epoch(self) -> None:
        """Validation, the epoch's line in the metrics, and both checkpoints."""
        at = self.progress
        try:
            found = self._validate()
            if not found.is_finite:
                raise self.meter.bad_validation(at, found, self.network.spoiled_buffers())
        except Interrupted:
            self._save_and_stop()
        except Exception:  # what is wrong with a validation must not cost the epoch's training
            with contextlib.suppress(Exception):
                self._save()
                self.run.flush()
            raise
        at.elapsed = self.seconds
        size = self.batches.size_in(at.epoch)
        trained = len(self.network.trained_names())
        line = self.meter.line(at, found, self.batches.device, size=size, trained=trained)
        if self.frozen_seconds is not None:
            line["frozen_seconds"] = round(self.frozen_seconds, 3)
            self.frozen_seconds = 0.0
        at.close_epoch(line)
        files = {}
        if at.epoch in best_epochs(at.history, self.best_by):  # of equal ones the later, which was trained longer
            at.best_epoch = at.epoch
            at.best_val_acc = found.accuracy
            weights = self.network.evaluated.state_dict()
            files["best_model.pt"] = {**self.record, "model": weights, "epoch": at.epoch, "val_acc": found.accuracy}
        self.run.save({**files, "last.pt": self.state()})
        self.run.write_metrics(at.history)
        self.on_epoch(line)
        self.meter.next_epoch(self.batches.device)

    def _validate(self) -> Evaluation:
        """Validates in the precision of the training. Raises Interrupted after a signal."""
        model = self.network.ready_to_evaluate()
        return evaluate(model, self.validation, self.precision, stop=self._must_stop, description="validating")

    def _bar(self) -> Any:
        at = self.progress
        count = len(self.batches.subset)
        return progress(
            total=count,
            initial=min(at.update * self.batches.batch_size, count),
            desc=f"epoch {at.epoch + 1}/{self.epochs}",
            unit="image",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}, {rate_fmt}{postfix}",
        )

    def _read(self, bar: Any) -> None:
        at = self.progress
        counts = [self.batches.images_in(update) for update in range(at.update - self.meter.unread, at.update)]
        self.meter.read(at, self.network.trained_names(), counts)
        if self.batches.ranks.is_first:
            left = {"run": f"{duration(self.seconds_left())} left"}  # first: a narrow terminal cuts the end
            bar.set_postfix(left | self.meter.readings(at), refresh=False)

    def seconds_left(self) -> float:
        """How long the run will still take if nothing stops it, at the speed of its last epochs or, in the first one,
        of its updates so far.

        The time of an image is taken to grow with its side to the power of 1.5: less than its area, because a
        processor computes small maps less efficiently (a ResNet-18 from 48 to 128 px: 1.2 and 1.8 on two CPUs).
        """
        at = self.progress
        work = [self.batches.size_in(epoch) ** 1.5 for epoch in range(self.epochs + 1)]
        updates = self.batches.updates_per_epoch
        if at.history:
            ends = [self.prepared, *(line["elapsed"] for line in at.history)][-4:]
            seconds = ends[-1] - ends[0]
            done = sum(work[at.epoch + 1 - len(ends) : at.epoch])
        else:
            seconds = time.perf_counter() - self.epoch_begun
            done = work[0] * max(1, at.update) / updates
        left = sum(work[at.epoch : self.epochs]) - work[at.epoch] * at.update / updates
        return seconds * max(0.0, left) / done

    def _out_of_patience(self) -> bool:
        """Return whether `patience` epochs in a row were not better than the best one before them.

        Epochs of small images or frozen layers do not count: what makes later ones better is still to come.
        """
        sizes = self.batches.sizes
        frozen = self.network.freeze_epochs
        best = min(best_epochs(self.progress.history, self.best_by), default=0)  # of equal ones the first
        since = max(best, sizes.index(sizes[-1]), frozen if frozen < self.epochs else 0)
        return self.patience is not None and self.progress.epoch - since >= self.patience

    def _must_stop(self) -> bool:
        """Whether any rank had a signal or is out of time. They ask one another on the CPU: no device is waited for."""
        return self.batches.ranks.any(self.stop.asked())

    def _save(self) -> None:
        """Hands last.pt, with the run as it stands, to the thread that writes it."""
        self.progress.elapsed = self.seconds
        self.last_save = time.monotonic()
        self.run.save({"last.pt": self.state()})

    def _save_and_stop(self) -> NoReturn:
        """Saves where the run stands, then raises Stopped."""
        self._save()
        self.run.write_metrics(self.progress.history)
        self.run.flush()
        at = self.progress
        raise self.stop.stopped(
            f"stopped in epoch {at.epoch + 1} after update {at.update} of {self.batches.updates_per_epoch}; "
            f"saved in {self.run.path}. Go on with the same command and --resume."
        )

    def _save_is_due(self) -> bool:
        if self.checkpoint_every is None:
            return False
        amount = float(self.checkpoint_every[:-1])
        if self.checkpoint_every.endswith("u"):
            return self.updates_done % int(amount) == 0
        due = time.monotonic() - self.last_save > 60 * amount
        return self.batches.ranks.any(due)  # the clocks of ranks differ

    def state(self) -> dict[str, Any]:
        """What last.pt holds: tensors and plain types only."""
        return {
            **self.record,
            **self.network.state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {**vars(self.progress)},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state()` gave. The schedule is rebuilt and replayed, not loaded."""
        self.network.load_state(state)
        load_moments(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:  # a disabled scaler's state is {}, which it would refuse
            self.scaler.load_state_dict(state["scaler"])
        at = Progress.restored(state["progress"])
        if not (0 <= at.epoch <= self.epochs and 0 <= at.update <= self.batches.updates_per_epoch):
            raise ValueError(f"no such place in this run: epoch {at.epoch}, update {at.update}")
        self.progress = at
        self.scheduler = self.make_scheduler(done=self.updates_done)
