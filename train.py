"""The training loop. `update_weights` is the whole AMP recipe; the rest feeds it, reads its numbers, saves and stops.

FP32 and AMP take the same path: FP32 is a disabled autocast and a disabled GradScaler. Nothing in the update waits for
the device. Knows nothing of options, the layout of files or how pictures are drawn.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dataset import Batches, MicroBatch
from evaluate import evaluate
from metrics import Meter, UnusedParameters, UpdateRecord, UpdateStats, best_epochs, require_figure
from model import BuffersBefore, Network, StepModel
from optimizer import hold_from_fault_on
from precision import Precision
from runs.checkpoint import Progress, load_moments
from runs.evaluation import Evaluation
from runs.failures import Failures
from runs.folder import RunDirectory
from runs.second_look import SecondLook
from runs.writing import PROBABILITIES
from system import parent
from system.progress import seconds_left
from system.terminal import duration
from utils import Interrupted, StopSignal, progress_bar, seed_everything


def update_weights(
    model: StepModel,
    micro_batches: Iterable[MicroBatch],
    image_count: int,
    *,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    criterion: nn.Module,
    clip_grad_norm: float | None,
    ranks: int = 1,
) -> UpdateStats:
    """Make one optimizer update on `image_count` images, in micro-batches: the whole AMP recipe.

    Return its numbers, still on the device. The order of the five scaler calls is PyTorch's own:
    https://docs.pytorch.org/docs/stable/notes/amp_examples.html
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
    hold_from_fault_on(optimizer, norm, scaler)  # without a scaler the weights stay as they were before a fault
    scaler.step(optimizer)  # skipped as a whole, inside the fused kernel, if any gradient is not finite
    buffers.put_back_if_skipped(norm)
    scaler.update()  # halves the scale after a skip, doubles it after 2,000 updates without one
    optimizer.zero_grad(set_to_none=True)
    return record.stats()


@dataclass(frozen=True)
class Recipe:
    """The parts of an update."""

    optimizer: torch.optim.Optimizer
    make_scheduler: Callable[..., LRScheduler]  # make_scheduler(done=n) returns the schedule as it is after n updates
    precision: Precision
    criterion: nn.Module  # returns the summed loss of a micro-batch
    clip_grad_norm: float | None = None


@dataclass(frozen=True)
class Plan:
    """The length of a training, the choice of its best epoch, and the times to read numbers and to save."""

    epochs: int
    seed: int
    best_by: str = "accuracy"  # a key of choices.METRICS
    patience: int | None = None  # epochs
    log_interval: int = 20  # updates
    save_every_updates: int | None = None  # also within an epoch
    save_every_seconds: float | None = None


@dataclass
class Trainer:
    """Train `network` on `batches`, validate after each epoch, keep last.pt and best_model.pt in `run`."""

    network: Network
    recipe: Recipe
    plan: Plan
    batches: Batches
    validation: Batches
    run: RunDirectory
    record: dict[str, Any] = field(default_factory=dict)  # the part of a checkpoint that describes the run
    stop: StopSignal = field(default_factory=StopSignal)
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None
    around_update: Callable[[int], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __post_init__(self) -> None:
        require_figure(self.plan.best_by, self.validation.subset.labels, self.validation.class_count)
        self.scaler = self.recipe.precision.grad_scaler()
        self.scheduler = self.recipe.make_scheduler(done=0)
        self.progress = Progress()
        failures = Failures(self.run.path, self.recipe.precision, self.batches.updates_per_epoch)
        recipe = self.recipe
        self.look = SecondLook(self.network, recipe.precision, recipe.criterion, self.batches, self.plan.seed)
        self.meter = Meter(failures, self.scaler, self.batches.ranks, self.look.at_update)
        self.unused = UnusedParameters(self.recipe.optimizer, self.network.model)
        self.begun = time.perf_counter()  # less the time that was trained before a resume
        self.epoch_begun = self.begun  # likewise
        self.prepared = 0.0  # seconds from the beginning to the first epoch
        self.frozen_seconds: float | None = None  # of computing a frozen network once, until they are recorded
        self.last_save = time.monotonic()

    def train(self) -> None:
        """Train from where the run is to its end.

        Raise Stopped after a signal, with everything saved, and RunError if the run cannot go on.
        """
        self.last_save = time.monotonic()
        self.begun = time.perf_counter() - self.progress.elapsed
        self.meter.begin(self.batches.device)
        with self.stop:
            if self.progress.epoch < self.plan.epochs:
                self.frozen_seconds = self.batches.prepare()
                self.validation.prepare()
            self.prepared = 0.0 if self.progress.elapsed else self.seconds
            while self.progress.epoch < self.plan.epochs and not self._out_of_patience():
                self._train_epoch()
                self._finish_epoch()
        self.run.write_metrics(self.progress.history)  # an earlier process may have ended before it wrote all
        self.run.flush()
        if self._must_stop():  # the signal came while the last epoch was being finished
            raise self.stop.stopped(
                f"stopped after the last epoch; saved in {self.run.path}. Test it with the same command and --resume."
            )

    @property
    def seconds(self) -> float:
        """Return the seconds that this run has taken so far, including those before a resume."""
        return time.perf_counter() - self.begun

    @property
    def updates_done(self) -> int:
        """Return the number of attempted updates, including those that the scaler skipped."""
        return self.progress.epoch * self.batches.updates_per_epoch + self.progress.update

    def _train_epoch(self) -> None:
        """Make the remaining updates of this epoch."""
        state = self.progress
        batches = self.batches
        self._begin_epoch()
        with self._bar() as bar:
            for micro_batches in batches.epoch(state.epoch, state.update):
                image_count = batches.images_in(state.update)
                self.meter.add(self.make_update(micro_batches, image_count))
                bar.update(image_count)
                ended = state.update == batches.updates_per_epoch
                stopping = self._must_stop()
                saving = not ended and self._save_is_due()
                if ended or stopping or saving or state.update % self.plan.log_interval == 0:
                    self._read(bar)
                state.epoch_seconds = time.perf_counter() - self.epoch_begun
                state.epoch_waited = batches.seconds_waited
                if stopping:
                    self._save_and_stop()
                if saving:
                    self._save()
                    self.epoch_begun = time.perf_counter() - state.epoch_seconds  # the time of saving does not count

    def make_update(self, micro_batches: Iterable[MicroBatch], image_count: int) -> UpdateStats:
        """Make the next update of this epoch, and move the schedule and the averaged weights on."""
        state = self.progress
        seed_everything(self.plan.seed, state.epoch, state.update, self.batches.ranks.rank)  # for dropout
        with self.around_update(self.updates_done + 1):
            stats = update_weights(
                self.network.forward,
                micro_batches,
                image_count,
                optimizer=self.recipe.optimizer,
                scaler=self.scaler,
                precision=self.recipe.precision,
                criterion=self.recipe.criterion,
                clip_grad_norm=self.recipe.clip_grad_norm,
                ranks=self.batches.ranks.size,
            )
        state.learning_rate = self.recipe.optimizer.param_groups[0]["lr"]
        self.scheduler.step()  # counts attempted updates: a skipped one does not shift the schedule
        self.network.after_update(self.updates_done)
        state.update += 1
        return stats

    def _begin_epoch(self) -> None:
        """Set the network, the clocks and the alarms up for this epoch or the rest of it."""
        epoch = self.progress.epoch
        other_layers = self.network.begin_epoch(epoch)
        if other_layers:
            self.unused.due = True
        if other_layers or self.batches.grows_in(epoch):
            self.meter.warming = True
        self.epoch_begun = time.perf_counter() - self.progress.epoch_seconds
        self.batches.seconds_waited = self.progress.epoch_waited

    def _finish_epoch(self) -> None:
        """Validate, add the epoch to the metrics, and write last.pt and, if it is the best, best_model.pt."""
        state = self.progress
        try:
            validation = self._validate()
            if not validation.is_finite:
                spoiled = self.network.spoiled_buffers()
                found = None if spoiled else self.look.at_validation(self.validation)
                raise self.meter.failures.bad_validation(state, validation, spoiled, found)
        except Interrupted:
            self._save_and_stop()
        except Exception:  # a validation that fails must not cost the epoch's training
            with contextlib.suppress(Exception):
                self._save()
                self.run.flush()
            raise
        state.elapsed = self.seconds
        size = self.batches.size_in(state.epoch)
        trained = len(self.network.trained_names())
        device = self.batches.device
        best_by = self.plan.best_by
        line = self.meter.line(state, validation, device, best_by=best_by, size=size, trained=trained)
        if self.frozen_seconds is not None:
            line["frozen_seconds"] = round(self.frozen_seconds, 3)
            self.frozen_seconds = 0.0
        state.close_epoch(line)
        files = {}
        # Of equal epochs the later is kept: it was trained longer.
        if state.epoch in best_epochs(state.history, best_by):
            state.best_epoch = state.epoch
            state.best_val_acc = validation.accuracy
            found = {"model": self.network.ema_or_model.state_dict(), "epoch": state.epoch}
            figures = {"val_acc": validation.accuracy, "temperature": validation.temperature}
            files["best_model.pt"] = {**self.record, **found, **figures}
        self.run.save({**files, "last.pt": self.state()})
        self.run.write_metrics(state.history)
        self.on_epoch(line)
        self.meter.next_epoch(self.batches.device)

    def _validate(self) -> Evaluation:
        """Validate in the precision of the training. Raise Interrupted after a signal."""
        return evaluate(
            self.network.ready_to_evaluate(),
            self.validation,
            self.recipe.precision,
            keep_logits=self.validation.class_count <= PROBABILITIES,
            stop=self._must_stop,
            description="validating",
        )

    def _bar(self) -> Any:
        """Return the progress bar of this epoch."""
        state = self.progress
        image_count = len(self.batches.subset)
        return progress_bar(
            total=image_count,
            initial=min(state.update * self.batches.batch_size, image_count),
            desc=f"epoch {state.epoch + 1}/{self.plan.epochs}",
            unit="image",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}, {rate_fmt}{postfix}",
        )

    def _read(self, bar: Any) -> None:
        """Read the numbers of the latest updates from the device and show them."""
        state = self.progress
        counts = [self.batches.images_in(update) for update in range(state.update - self.meter.unread, state.update)]
        self.meter.read(state, self.network.trained_names(), counts)
        if self.batches.ranks.is_first:
            # First, because a narrow terminal cuts the end.
            left = {} if parent.estimates() else {"run": f"{duration(self.seconds_left())} left"}
            bar.set_postfix(left | self.meter.readings(state), refresh=False)

    def seconds_left(self) -> float:
        """Return how long the run will still take if it does not stop early."""
        return seconds_left(
            [self.batches.size_in(epoch) for epoch in range(self.plan.epochs)],
            [self.prepared, *(line["elapsed"] for line in self.progress.history)],
            epoch_share=self.progress.update / self.batches.updates_per_epoch,
            epoch_seconds=time.perf_counter() - self.epoch_begun,
        )

    def _out_of_patience(self) -> bool:
        """Return True if `patience` epochs in a row were not better than the best one before them.

        Epochs of small images or frozen layers do not count, because later epochs are expected to be better.
        """
        sizes = self.batches.sizes
        frozen = self.network.freeze_epochs
        best = min(best_epochs(self.progress.history, self.plan.best_by), default=0)  # of equal ones the first
        since = max(best, sizes.index(sizes[-1]), frozen if frozen < self.plan.epochs else 0)
        return self.plan.patience is not None and self.progress.epoch - since >= self.plan.patience

    def _must_stop(self) -> bool:
        """Return True if any rank had a signal or is out of time. Ranks ask on the CPU: nothing waits for a device."""
        return self.batches.ranks.any(self.stop.asked())

    def _save(self) -> None:
        """Give last.pt, with the run as it is now, to the thread that writes it."""
        self.progress.elapsed = self.seconds
        self.last_save = time.monotonic()
        self.run.save({"last.pt": self.state()})

    def _save_and_stop(self) -> NoReturn:
        """Save the run as it is now, then raise Stopped."""
        self._save()
        self.run.write_metrics(self.progress.history)
        self.run.flush()
        state = self.progress
        raise self.stop.stopped(
            f"stopped in epoch {state.epoch + 1} after update {state.update} of {self.batches.updates_per_epoch}; "
            f"saved in {self.run.path}. Go on with the same command and --resume."
        )

    def _save_is_due(self) -> bool:
        """Return True if last.pt is to be written within the epoch, after this update."""
        if self.plan.save_every_updates is not None:
            return self.updates_done % self.plan.save_every_updates == 0
        if self.plan.save_every_seconds is None:
            return False
        due = time.monotonic() - self.last_save > self.plan.save_every_seconds
        return self.batches.ranks.any(due)  # the clocks of ranks differ

    def state(self) -> dict[str, Any]:
        """Return the content of last.pt: tensors and plain types only."""
        return {
            **self.record,
            **self.network.state(),
            "optimizer": self.recipe.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {**vars(self.progress)},
        }

    def load_state(self, content: dict[str, Any]) -> None:
        """Go on from the result of `state()`. The schedule is rebuilt and replayed, not loaded."""
        self.network.load_state(content)
        load_moments(self.recipe.optimizer, content["optimizer"])
        if self.scaler.is_enabled() and content["scaler"]:  # a disabled scaler's state is {}, which it would refuse
            self.scaler.load_state_dict(content["scaler"])
        state = Progress.restored(content["progress"])
        if not (0 <= state.epoch <= self.plan.epochs and 0 <= state.update <= self.batches.updates_per_epoch):
            raise ValueError(f"no such position in this run: epoch {state.epoch}, update {state.update}")
        self.progress = state
        self.scheduler = self.recipe.make_scheduler(done=self.updates_done)
