"""The loop. `update_weights` is the whole AMP recipe; the rest feeds it, reads it, saves it and tests it.

FP32 and AMP take the same path: FP32 is a disabled autocast and a disabled GradScaler. Nothing in the step
waits for the device. Knows nothing of options, files' layout or how pictures are drawn.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dataset import Batches
from evaluate import Evaluation, evaluate
from model import update_average
from precision import Precision
from runs.folder import RunDirectory
from utils import RunError, Stopped, StopSignal, peak_memory, progress, reset_peak_memory, seed_everything


def update_weights(
    model: nn.Module,
    pieces: Iterable,
    image_count: int,
    *,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: Precision,
    criterion: nn.Module,
    clip_grad_norm: float | None,
    ranks: int = 1,
) -> torch.Tensor:
    """One optimizer update on `image_count` images, in pieces: the whole AMP recipe.

    Returns, still on the device: loss sum, correct predictions, gradient norm, index of the last parameter whose
    gradient is not finite (the first that the backward pass reached), and loss scale. The order of the five scaler
    calls is PyTorch's own: https://docs.pytorch.org/docs/stable/notes/amp_examples.html
    """
    loss_sum = 0.0
    correct = 0
    for images, labels, weight, last in pieces:
        # DDP averages gradients over ranks once per update, during the backward pass of the last piece.
        with contextlib.nullcontext() if last or ranks == 1 else model.no_sync():
            with precision.autocast():  # forward and loss only: backward ops run in their forward's dtype
                logits = model(images)
                loss = criterion(logits, labels) * weight  # a sum over the piece
            scaler.scale(loss * (ranks / image_count)).backward()
        loss_sum = loss_sum + loss.detach()
        correct = correct + weight * (logits.argmax(1) == hard(labels)).sum()
    loss_scale = scaler.scale(torch.ones_like(loss_sum))  # on the device: get_scale() would wait for it
    scaler.unscale_(optimizer)  # from here on .grad holds true gradients, which is what clipping needs
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
    norm = torch.linalg.vector_norm(norms)
    if clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_grad_norm, norm)
    scaler.step(optimizer)  # skipped as a whole, inside the fused kernel, where any gradient is not finite
    scaler.update()  # halves the scale after a skip, doubles it after 2,000 updates without one
    optimizer.zero_grad(set_to_none=True)
    last_bad = len(norms) - 1 - norms.isfinite().logical_not().flip(0).float().argmax()
    return torch.stack([loss_sum.float(), correct.float(), norm, last_bad.float(), loss_scale.float()])


def hard(labels: torch.Tensor) -> torch.Tensor:
    """Class indices of labels that may be probabilities (count, classes) after MixUp or CutMix."""
    return labels.argmax(1) if labels.ndim > 1 else labels


# Of an epoch: images and correct predictions of all updates; loss, norm and images of those not skipped.
NO_SUMS = {"images": 0, "correct": 0.0, "loss": 0.0, "norm": 0.0, "updates": 0, "counted": 0}


@dataclass
class Progress:
    """Where a run stands: all that is needed, beside the tensors, to go on as if nothing had happened."""

    epoch: int = 0  # epochs finished
    update: int = 0  # updates finished in the next one
    sums: dict[str, float] = field(default_factory=lambda: dict(NO_SUMS))
    skips: list[dict[str, Any]] = field(default_factory=list)
    epoch_seconds: float = 0.0
    epoch_waited: float = 0.0
    best_epoch: int = 0
    best_val_acc: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    learning_rate: float = 0.0  # of the last update
    elapsed: float = 0.0
    peak_memory_mb: float = 0.0
    steady: bool = False  # whether that is of an epoch after warm-up


@dataclass
class Trainer:
    """Trains `model` on `batches`, validates after each epoch, keeps last.pt and best_model.pt in `run`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    make_scheduler: Callable[..., LRScheduler]  # done=updates done: the schedule, standing there
    precision: Precision
    batches: Batches
    validation: Batches
    run: RunDirectory
    epochs: int
    seed: int
    label_smoothing: float = 0.0
    clip_grad_norm: float | None = None
    log_interval: int = 20
    checkpoint_every: str | None = None
    patience: int | None = None
    freeze_epochs: int = 0
    head: str = ""
    ema: float = 0.0  # decay of the moving average of the weights; 0: there is none
    compile: bool = False
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None
    record: dict[str, Any] = field(default_factory=dict)  # what a checkpoint says of its run
    log: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.ranks = self.batches.ranks
        self.device = self.batches.device
        self.scaler = self.precision.grad_scaler()
        self.criterion = nn.CrossEntropyLoss(reduction="sum", label_smoothing=self.label_smoothing)
        self.progress = Progress()
        self._unread: list[torch.Tensor] = []
        self._scale_warned = False
        self._frozen: bool | None = None
        self.average = copy.deepcopy(self.model).requires_grad_(False) if self.ema else None
        self._evaluating = Forward(self.evaluated_model, {self.validation.batch_size}, self.compile)

    # ------------------------------------------------------------------------------- the way
    def train(self, *, stop_after: int | None = None) -> None:
        """Trains from where the run stands to its end, or until `stop_after` updates are done in all.

        Raises Stopped after a signal, with everything saved, and RunError where the run cannot go on.
        """
        self.scheduler = self.make_scheduler(done=self._updates_done)
        self._last_save = time.monotonic()
        self._begun = time.perf_counter() - self.progress.elapsed
        with StopSignal() as self.stop:
            while self.progress.epoch < self.epochs and not self._out_of_patience():
                if self._train_epoch(stop_after) is False:
                    break
                self._finish_epoch()
                if stop_after is not None and self._updates_done >= stop_after:
                    break
        self.run.write_metrics(self.progress.history)  # as last.pt knows it, whatever ended an earlier process
        self.run.flush()
        if self._must_stop():  # the signal came while the last epoch was being finished
            raise Stopped(
                self.stop.number or 15,
                f"stopped after the last epoch; saved in {self.run.path}. Test it with the same command and --resume.",
            )

    @property
    def seconds(self) -> float:
        """Of this run so far, those before a resume included."""
        return time.perf_counter() - self._begun

    @property
    def _per_epoch(self) -> int:
        return self.batches.updates_per_epoch

    @property
    def _updates_done(self) -> int:
        return self.progress.epoch * self._per_epoch + self.progress.update

    def _images_in(self, update: int) -> int:
        return min(self.batches.batch_size, len(self.batches.subset) - update * self.batches.batch_size)

    def _train_epoch(self, stop_after: int | None) -> bool:
        """The updates that are left of this epoch; False where `stop_after` ended it early."""
        self._prepare_model()
        at = self.progress
        batches = self.batches
        begun = time.perf_counter() - at.epoch_seconds
        batches.seconds_waited = at.epoch_waited
        bar = progress(
            total=len(batches.subset),
            initial=min(at.update * batches.batch_size, len(batches.subset)),
            desc=f"epoch {at.epoch + 1}/{self.epochs}",
            unit="image",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}, {rate_fmt}{postfix}",
        )
        with bar:
            for pieces in batches.epoch(at.epoch, at.update):
                count = self._images_in(at.update)
                seed_everything(self.seed, at.epoch, at.update, self.ranks.rank)  # for dropout
                self._unread.append(
                    update_weights(
                        self._forward,
                        pieces,
                        count,
                        optimizer=self.optimizer,
                        scaler=self.scaler,
                        precision=self.precision,
                        criterion=self.criterion,
                        clip_grad_norm=self.clip_grad_norm,
                        ranks=self.ranks.size,
                    )
                )
                at.learning_rate = self.optimizer.param_groups[0]["lr"]
                self.scheduler.step()  # counts attempted updates: a skipped one does not shift the schedule
                if self.average is not None:
                    update_average(self.average, self.model, self.ema, self._updates_done)
                at.update += 1
                bar.update(count)
                ended = at.update == self._per_epoch
                stopping = self._must_stop() or (not ended and self._updates_done == stop_after)
                saving = not ended and self._save_is_due()
                if ended or stopping or saving or at.update % self.log_interval == 0:
                    self._read(bar)
                at.epoch_seconds = time.perf_counter() - begun
                at.epoch_waited = batches.seconds_waited
                if stopping:
                    self._save_and_stop()
                    return False
                if saving:
                    self._save()
                    begun = time.perf_counter() - at.epoch_seconds  # saving is no training
        return True

    def _finish_epoch(self) -> None:
        """Validation, the epoch's line in the metrics, and both checkpoints."""
        at = self.progress
        found = self._validate()
        if found is None:
            self._save_and_stop()
        if not math.isfinite(found.loss):
            self._not_finite("validation loss", self._per_epoch)
        line = self._metrics(found)
        at.history.append(line)
        at.epoch = at.epoch + 1
        at.update = 0
        at.sums = dict(NO_SUMS)
        at.skips = []
        at.epoch_seconds = at.epoch_waited = 0.0
        files = {}
        if found.accuracy > at.best_val_acc:
            at.best_epoch = at.epoch
            at.best_val_acc = found.accuracy
            files["best_model.pt"] = {
                **self.record,
                "model": self.evaluated_model.state_dict(),
                "epoch": at.epoch,
                "val_acc": found.accuracy,
            }
        self.run.save({**files, "last.pt": self.state()})
        self.run.write_metrics(at.history)
        self.on_epoch(line)
        if self._warming:
            self._warming = False
            reset_peak_memory(self.device)

    # ------------------------------------------------------------------------------ the model
    @property
    def evaluated_model(self) -> nn.Module:
        """The network whose weights are validated and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average

    def _prepare_model(self) -> None:
        """Training mode, the right layers frozen, wrapped for ranks and compiled where asked."""
        frozen = self.progress.epoch < self.freeze_epochs
        if frozen != self._frozen:
            self._frozen = frozen
            self._warming = True  # this epoch's peak will hold the workspaces of cuDNN's searches
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(not frozen or name.startswith(self.head))
            self._wrapped = self.model
            if self.ranks.size > 1:
                self._wrapped = nn.parallel.DistributedDataParallel(self.model)
            self._forward = Forward(self._wrapped, self.batches.full_sizes, self.compile)
        self.model.train()
        if frozen:  # a frozen layer's batch statistics stay as they were trained, too
            for name, module in self.model.named_modules():
                if name and not name.startswith(self.head):
                    module.eval()

    def _validate(self) -> Evaluation | None:
        """Validates in the precision of the training; None where a signal interrupted it."""
        model = self.evaluated_model.eval()
        if self.ranks.size > 1:  # batch statistics were each rank's own since the last update
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return evaluate(
            self._evaluating, self.validation, self.precision, stop=self._must_stop, description="validating"
        )

    # -------------------------------------------------------------------------- reading back
    def _read(self, bar: Any) -> None:
        """Reads what the updates since the last reading left on the device: the only wait for it."""
        at = self.progress
        begun = self.progress.update - len(self._unread)
        records = torch.stack(self._unread)
        totals = records[:, :2].contiguous()
        self.ranks.sum(totals)  # loss and correct predictions are per rank, the rest is the same on all
        rows = torch.cat([totals, records[:, 2:]], 1).tolist()
        self._unread.clear()
        for update, (loss, correct, norm, bad, scale) in enumerate(rows, begun + 1):
            finite = math.isfinite(norm)
            if not finite and not self.scaler.is_enabled():
                self._not_finite("gradient" if math.isfinite(loss) else "loss", update)
            count = self._images_in(update - 1)
            at.sums["images"] += count
            at.sums["correct"] += correct
            if finite:
                at.sums["loss"] += loss
                at.sums["norm"] += norm
                at.sums["updates"] += 1
                at.sums["counted"] += count
            else:
                names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
                at.skips.append(
                    {"update": at.epoch * self._per_epoch + update, "parameter": names[int(bad)], "scale": scale}
                )
        self._watch_scale()
        if self.ranks.is_first:
            bar.set_postfix(self._readings(), refresh=False)

    def _readings(self) -> dict[str, str]:
        at = self.progress
        shown = {
            "loss": f"{at.sums['loss'] / max(1, at.sums['counted']):.3f}",
            "acc": f"{100 * at.sums['correct'] / max(1, at.sums['images']):.1f}%",
            "lr": f"{at.learning_rate:.1e}",
        }
        if self.scaler.is_enabled():
            shown |= {"scale": f"{self.scaler.get_scale():g}", "skipped": str(len(at.skips))}
        return shown

    def _not_finite(self, what: str, update: int) -> None:
        at = self.progress
        kept = f"best_model.pt of epoch {at.best_epoch}" if at.epoch else "none is of a finished epoch"
        raise RunError(
            f"the {what} is not finite in epoch {at.epoch + 1}, update {update} of {self._per_epoch} "
            f"({self.precision.label}). Last good checkpoint: {kept} ({self.run.path}).\nUsual causes: a learning rate "
            "too high (--learning_rate, --warmup_epochs, --clip_grad_norm), or NaN in pretrained weights."
        )

    def _watch_scale(self) -> None:
        if not self.scaler.is_enabled():
            return
        scale = self.scaler.get_scale()
        if scale < 1 and not self._scale_warned:
            self._scale_warned = True
            skips = self.progress.skips
            where = f" The backward pass met it first at {skips[0]['parameter']}." if skips else ""
            self.log(
                f"warning: the loss scale fell to {scale:g}. Below 1 float16 gradients overflow whatever the scale: "
                f"the run has probably diverged.{where} Lower the learning rate, or use --amp_dtype bfloat16."
            )
        if scale < 2.0**-20:
            raise RunError(
                f"every update overflows in float16 (loss scale {scale:g}, epoch {self.progress.epoch + 1}): the run "
                f"has diverged. What was saved before is intact in {self.run.path}."
            )

    def _metrics(self, found: Evaluation) -> dict[str, Any]:
        """One line of metrics.jsonl; losses are means in nats, accuracies percent, times seconds."""
        at = self.progress
        memory = peak_memory(self.device)
        if not (self._warming and at.steady):  # such an epoch counts only where there is no other
            at.peak_memory_mb = max(at.peak_memory_mb if at.steady else 0.0, memory["peak_memory_mb"])
            at.steady = not self._warming
        at.elapsed = self.seconds
        sums = at.sums
        return {
            "epoch": at.epoch + 1,
            "updates": (at.epoch + 1) * self._per_epoch,
            "train_loss": sums["loss"] / sums["counted"] if sums["counted"] else None,
            "train_acc": 100 * sums["correct"] / sums["images"],
            "val_loss": found.loss,
            "val_acc": found.accuracy,
            "learning_rate": at.learning_rate,
            "loss_scale": self.scaler.get_scale() if self.scaler.is_enabled() else None,
            "skipped_updates": len(at.skips),
            "grad_norm": sums["norm"] / max(1, sums["updates"]),
            "images_per_second": round(sums["images"] / at.epoch_seconds, 2),
            "data_wait_share": round(at.epoch_waited / at.epoch_seconds, 4),
            "seconds": round(at.epoch_seconds, 3),
            "elapsed": round(at.elapsed, 3),
            "peak_memory_mb": memory["peak_memory_mb"],
            "skips": at.skips,
        }

    # --------------------------------------------------------------------- stopping and saving
    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.progress.epoch - self.progress.best_epoch >= self.patience

    def _must_stop(self) -> bool:
        """Whether a signal came to any rank. They ask one another on the CPU, so no device is waited for."""
        return self.ranks.any(self.stop.number is not None)

    def _save(self) -> None:
        """Hands last.pt, with the run as it stands, to the thread that writes it."""
        self.progress.elapsed = self.seconds
        self._last_save = time.monotonic()
        self.run.save({"last.pt": self.state()})

    def _save_and_stop(self) -> None:
        """Saves where the run stands; raises Stopped where a signal asked for it."""
        self._save()
        self.run.write_metrics(self.progress.history)
        self.run.flush()
        if self._must_stop():
            at = self.progress
            raise Stopped(
                self.stop.number or 15,
                f"stopped in epoch {at.epoch + 1} after update {at.update} of "
                f"{self._per_epoch}; saved in {self.run.path}. Go on with the same command and --resume.",
            )

    def _save_is_due(self) -> bool:
        if self.checkpoint_every is None:
            return False
        amount = float(self.checkpoint_every[:-1])
        unit = self.checkpoint_every[-1]
        if unit == "u":
            return self._updates_done % int(amount) == 0
        return self.ranks.any(time.monotonic() - self._last_save > 60 * amount)  # their clocks differ

    def state(self) -> dict[str, Any]:
        """What last.pt holds: tensors and plain types only."""
        return {
            **self.record,
            "model": self.model.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {**vars(self.progress)},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state()` gave. The schedule is rebuilt and replayed, not loaded."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():  # fused kernels walk memory: moments must lie as their weights do
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        if self.scaler.is_enabled():  # a disabled scaler's state is {}, which an enabled one refuses
            self.scaler.load_state_dict(state["scaler"])
        at = Progress(**state["progress"])
        if len(state["progress"]) < len(vars(at)):
            raise ValueError("the progress is incomplete")
        if not (0 <= at.epoch <= self.epochs and 0 <= at.update <= self._per_epoch):
            raise ValueError(f"no such place in this run: epoch {at.epoch}, update {at.update}")
        self.progress = at


class Forward:
    """Calls a model, compiled for `sizes` of batches; a ragged last batch runs eagerly instead of recompiling."""

    def __init__(self, model: nn.Module, sizes: set[int], compiled: bool):
        self.model = model
        self.sizes = sizes
        self.compiled = torch.compile(model, dynamic=False) if compiled else model
        if compiled:  # the backward pass runs outside autocast here: it is not to be traced under it
            torch._functorch.config.backward_pass_autocast = "off"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (self.compiled if len(images) in self.sizes else self.model)(images)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.model.parameters()

    def no_sync(self) -> contextlib.AbstractContextManager:
        return self.model.no_sync()
