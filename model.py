"""Build a classifier with a new head from published weights, a file, or scratch; keep its EMA and frozen layers.

`build_model` builds every model that is trained, `rebuild_model` builds it again from a checkpoint. pretrained/ reads
the weights. Knows nothing of data, precision or the training loop.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distributed import Ranks
from pretrained import timm_models, torchvision_models
from pretrained.fitting import Fit, Weights, belongs, fitted, for_classes, load_weights, read_weights
from utils import UserError, first_line, log, printable

GRAPHS = 32  # of one model: growing images, two micro-batch sizes and frozen layers need more than PyTorch's 8


def known_model(name: str) -> str:
    """Return the library's name of a classifier, given in any spelling: `resnet18`, `timm:resnet18`.

    Raise UserError if no classifier has that name.
    """
    return timm_models.known_name(name) if timm_models.is_timm(name) else torchvision_models.known_name(name)


def constructor_options(model: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments that the model was built with."""
    return dict(vars(model)["constructor_options"])


def build_model(
    name: str,
    class_count: int,
    *,
    pretrained: bool = True,
    pretrained_path: str | Path | None = None,
    weights: str | None = None,
    image_size: int | None = None,
    classes: list[str] | None = None,
) -> nn.Module:
    """Return a classifier for `class_count` classes: images (N, 3, H, W) to logits (N, class_count).

    `pretrained_path`, a file in any form that pretrained/ reads, takes precedence over `pretrained`: the published
    weights; `weights` names other ones than the default. A head for another number of classes stays initialised, and so
    does one for classes other than `classes`, if both are known.

    Models of a fixed size are built for `image_size` pixels, with interpolated position embeddings. The keyword
    arguments of the constructor are kept in the attribute `constructor_options`.

    Raise UserError for an unknown name and for weights that cannot be downloaded or do not fit.
    """
    key = known_model(name)
    package = timm_models if timm_models.is_timm(key) else torchvision_models
    file = None if pretrained_path is None else read_weights(pretrained_path)
    model, ignored = package.build(key, class_count, image_size, file, pretrained=pretrained, weights=weights)
    if file is not None:
        _fill(model, file, key, ignored, classes)
    elif pretrained and classes and len(classes) == _published_count(model) and not _are_of_imagenet(classes):
        for name in head_names(model):
            model.get_submodule(name).reset_parameters()
        log.info(f"weights: the published head is for {len(classes):,} other classes: the model starts with a new one")
    return model


def rebuild_model(checkpoint: dict[str, Any]) -> nn.Module:
    """Return the model of a checkpoint with its weights, built with the arguments that it was trained with."""
    name = checkpoint["model_name"]
    model = empty_model(name, len(checkpoint["classes"]), checkpoint["model_options"])
    load_weights(model, checkpoint["model"], source="the checkpoint")
    return model


def empty_model(name: str, class_count: int, options: dict[str, Any]) -> nn.Module:
    """Return the model that `build_model` returned, without its weights.

    `options` are its `constructor_options`.
    """
    key = known_model(name)
    package = timm_models if timm_models.is_timm(key) else torchvision_models
    return package.create(key, class_count, options)


def preprocessing(name: str) -> dict[str, Any]:
    """Return `mean` and `std` of each channel, for values from 0 to 1, and the `interpolation` for resizing."""
    key = known_model(name)
    return timm_models.preprocessing(key) if timm_models.is_timm(key) else torchvision_models.preprocessing()


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that compute the logits: one, or up to four in timm (LeViT, EfficientViM)."""
    return timm_models.head_names(model) or (torchvision_models.head_name(model),)


def _published_count(model: nn.Module) -> int:
    """Return the number of classes of a model's published weights."""
    count: int = timm_models.published_count(model) or 1000
    return count


def _are_of_imagenet(classes: list[str]) -> bool:
    """Return True if classes are WordNet's numbers, the order of published heads, or ImageNet's class names."""
    known = torchvision_models.imagenet_classes()
    return classes == known or all(re.fullmatch(r"n\d{8}", name) for name in classes)


def _fill(model: nn.Module, file: Weights, key: str, ignored: tuple[str, ...], classes: list[str] | None) -> None:
    """Load the weights of a user's file into `model` and log how they were found."""
    timm = timm_models.is_timm(key)
    package = timm_models if timm else torchvision_models
    head = head_names(model)
    file.places = {place: package.with_todays_names(state, model) for place, state in file.places.items()}
    fit = fitted(file, model, head)
    unknown = next((name for name in fit.state if "parametrizations." in name), None)
    if unknown:
        raise UserError(
            f"the weights in {printable(file.source)} are parametrized in a way that is not known here "
            f"({printable(unknown)}).\nCall torch.nn.utils.parametrize.remove_parametrizations(module, name) for each "
            "and save them again."
        )
    state = fit.state if timm else torchvision_models.resized(fit.state, model)
    state, moved, new_head = for_classes(state, file.classes, classes, head)
    notes = load_weights(
        model,
        state,
        source=file.source,
        ignored=ignored,
        head=head,
        new_head=new_head,
        advice=lambda: _advice(file, fit, key),
    )
    unnamed = classes is not None and file.classes is None and not notes
    kept = "its head is kept, although the file does not name its classes" if unnamed else ""
    described = "; ".join(filter(None, [fit.described(), file.notes.get(fit.place, ""), moved, kept, *notes]))
    log.info(f"weights: {printable(file.source)}{f' ({described})' if described else ''}")


def _advice(file: Weights, fit: Fit, key: str) -> str:
    """Return the name of the model that a file's weights would fit: one of torchvision's, or the name in the file."""
    found = None if timm_models.is_timm(key) else torchvision_models.who_fits(fit.state, key)
    if found:
        return f"They fit --model {found}."
    if file.saved_from and file.saved_from.lower() != key:
        return f"The file says that its model is {printable(file.saved_from)}: name the --model that this is."
    return "Name the --model they were saved from, or leave out --pretrained_path."


@torch.no_grad()
def update_ema(average: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """Move `average` towards `model`, including buffers: decay * average + (1 - decay) * model.

    During the first `updates` the decay is smaller, (1 + updates) / (10 + updates), so that the average does not linger
    at the initial weights (as TensorFlow's ExponentialMovingAverage with `num_updates`).
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    state = average.state_dict()
    new = model.state_dict()
    floating = [name for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([state[name] for name in floating], [new[name] for name in floating], 1 - decay)
    for name in state.keys() - set(floating):
        state[name].copy_(new[name])


def check_input_size(model: nn.Module, image_size: int, smallest_micro_batch: int, start_size: int = 0) -> None:
    """Raise UserError if `model` cannot train on `smallest_micro_batch` images of `image_size` or `start_size` pixels.

    This is tried on the meta device, which computes shapes only.
    """
    twin = copy.deepcopy(model).to("meta").train()
    kind = type(model).__name__
    reason = _objection(twin, image_size, smallest_micro_batch)
    if reason:
        images = "image" if smallest_micro_batch == 1 else "images"
        suits = timm_models.own_size(model) or 224
        ways = [f"another --image_size ({suits} suits it)"] if not _objection(twin, suits, smallest_micro_batch) else []
        if not _objection(twin, image_size, 2 * smallest_micro_batch):
            ways.append("a --batch_size and --accumulate that make larger micro-batches")
        advice = f"\nUse {', or '.join(ways)}." if ways else ""
        raise UserError(
            f"--image_size {image_size}: {kind} cannot train on a micro-batch of {smallest_micro_batch} such {images} "
            f"({reason}).{advice}"
        )
    reason = _objection(twin, start_size, smallest_micro_batch) if start_size else None
    if reason:
        raise UserError(
            f"--start_size {start_size}: {kind} cannot train on images of that size ({reason}).\n"
            "Use a larger one, or --start_size 0, which leaves all images at --image_size."
        )


def _objection(model: nn.Module, image_size: int, count: int) -> str | None:
    """Return the error that a model on the meta device raises for `count` images of `image_size` pixels, or None."""
    try:
        model(torch.empty(count, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        return first_line(error)
    return None


class Network:
    """A model in training: partly frozen at first, wrapped for ranks, compiled, and averaged.

    `heads` are the names of the layers that alone are trained for the first `freeze_epochs`; `ema` is the decay of the
    moving average of the weights (0: there is none), which is then validated and saved. `sizes` are the numbers of
    images that a full micro-batch can hold, `evaluation_size` that of a full batch in evaluation. `compile_mode`
    is that of torch.compile (None: nothing is compiled); "reduce-overhead" replays training kernels as CUDA graphs.

    With `only_head` batches contain the inputs of the model's one head instead of images.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sizes: set[int],
        evaluation_size: int,
        ranks: Ranks,
        heads: tuple[str, ...] = (),
        freeze_epochs: int = 0,
        ema: float = 0.0,
        compile_mode: str | None = None,
        only_head: bool = False,
    ):
        self.model = model
        self.only_head = only_head
        self.sizes = sizes
        self.ranks = ranks
        self.heads = heads
        self.freeze_epochs = freeze_epochs
        self.ema = ema
        self.compile = compile_mode is not None
        self.graphs = graphs = compile_mode == "reduce-overhead"
        self.average = copy.deepcopy(model).requires_grad_(False) if ema else None
        self.forward = StepModel(self._fed(model), sizes, self.compile, graphs)
        # Without graphs: the output is kept.
        self.validation_forward = StepModel(self._fed(self.ema_or_model), {evaluation_size}, self.compile)
        self._frozen: bool | None = None

    @property
    def ema_or_model(self) -> nn.Module:
        """Return the model whose weights are validated and saved: the EMA if there is one."""
        return self.model if self.average is None else self.average

    def _fed(self, model: nn.Module) -> nn.Module:
        """Return the part of `model` that receives the batches: all of it, or only its head."""
        return model.get_submodule(self.heads[0]) if self.only_head else model

    def begin_epoch(self, epoch: int) -> bool:
        """Set training mode and freeze the right layers; return True if other layers train than before."""
        frozen = epoch < self.freeze_epochs
        changed = frozen != self._frozen
        if changed:
            self._frozen = frozen
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(not frozen or belongs(name, self.heads))
            fed = self._fed(self.model)
            wrapped = nn.parallel.DistributedDataParallel(fed) if self.ranks.size > 1 else fed
            self.forward = StepModel(wrapped, self.sizes, self.compile, self.graphs)
        self.model.train()
        if frozen:  # frozen layers keep their batch statistics
            for layer in self.model.children():
                layer.eval()
            for head in self.heads:
                self.model.get_submodule(head).train()
        return changed

    def after_update(self, updates: int) -> None:
        """Move the average after `updates` updates."""
        if self.average is not None:
            update_ema(self.average, self.model, self.ema, updates)

    def ready_to_evaluate(self) -> StepModel:
        """Return the model to validate, in evaluation mode, with the buffers of the first rank."""
        model = self.ema_or_model.eval()
        if self.ranks.size > 1:  # batch statistics were each rank's own since the last update
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return self.validation_forward

    def trained_names(self) -> list[str]:
        """Return the names of the parameters that are trained now, in the order of `parameters()`."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def spoiled_buffers(self) -> list[str]:
        """Return the names of the evaluated model's buffers that hold NaN, such as running statistics.

        Infinities are not reported: a mask may contain them.
        """
        return [name for name, buffer in self.ema_or_model.named_buffers() if buffer.isnan().any()]

    def state(self) -> dict[str, Any]:
        """Return the weights, and those of the EMA, for a checkpoint."""
        return {"model": self.model.state_dict(), "ema": None if self.average is None else self.average.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `state()`."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])


class BuffersBefore:
    """The buffers of a model as they were before an update, in case the loss scaler skips it.

    The forward pass updates BatchNorm's running statistics before a gradient is known not to be finite. An activation
    that overflowed makes them inf or NaN for ever, as 0.9 * NaN + 0.1 * x is NaN, and each evaluation fails. A disabled
    scaler skips nothing, so nothing is copied. Nothing here waits for the device.
    """

    def __init__(self, model: StepModel, scaler: torch.amp.GradScaler):
        kinds: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in model.buffers() if scaler.is_enabled() else ():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        self._kinds = list(kinds.values())
        self._before = [_in_one(buffers) for buffers in self._kinds]

    def put_back_if_skipped(self, norm: torch.Tensor) -> None:
        """Restore the buffers if `norm`, the L2 norm of all gradients, is not finite.

        It is the same on all ranks, so that all make the same decision.
        """
        for buffers, before in zip(self._kinds, self._before, strict=True):
            chosen = torch.where(norm.isfinite(), _in_one(buffers), before)
            parts = chosen.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])


def _in_one(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the values of all tensors in one vector: one kernel instead of one for each."""
    return torch.cat([tensor.flatten() for tensor in tensors])


class StepModel:
    """A model compiled for `sizes` of batches; a smaller last batch runs eagerly instead of recompiling.

    With `graphs` the next call overwrites the output of this one; the update has used it by then.
    """

    def __init__(self, model: nn.Module, sizes: set[int], compiled: bool, graphs: bool = False):
        self.model = model
        self.sizes = sizes
        self.graphs = graphs
        mode = "reduce-overhead" if graphs else None
        self.compiled = torch.compile(model, dynamic=False, mode=mode) if compiled else model
        if compiled:  # the backward pass runs outside autocast here, so it must not be traced under it
            torch._functorch.config.backward_pass_autocast = "off"
            torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return (self.compiled if len(images) in self.sizes else self.model)(images)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.model.parameters()

    def buffers(self) -> Iterable[torch.Tensor]:
        return self.model.buffers()

    def no_sync(self) -> contextlib.AbstractContextManager:
        """Return a context in which DDP does not exchange gradients."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()
