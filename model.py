"""A torchvision classifier with a new head, from ImageNet weights, a file, or scratch.

One function builds every model the package trains, and says in words what is wrong with weights that
do not fit. Knows nothing of data, precision or training.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import pickle
import re
import urllib.error
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from distributed import Ranks
from utils import UserError, printable, shows_bars

# These two have auxiliary heads, which ImageNet files fill and fine-tuning leaves out.
_AUXILIARY = {"inception_v3": ("AuxLogits.",), "googlenet": ("aux1.", "aux2.")}


def model_names() -> list[str]:
    """Names of torchvision's image classification models."""
    return models.list_models(module=models)


def known_model(name: str) -> str:
    """torchvision's name of a classifier in any spelling. Raises UserError if it has none of that name."""
    key = name.lower()
    if key not in model_names():
        close = difflib.get_close_matches(key, model_names(), 3) or ["resnet18", "resnet50"]
        raise UserError(f"--model {name} is not a torchvision classifier. Did you mean {', '.join(close)}?")
    return key


def build_model(
    name: str, class_count: int, *, pretrained: bool = True, pretrained_path: str | Path | None = None
) -> nn.Module:
    """A torchvision classifier for `class_count` classes: images (N, 3, H, W) to logits (N, class_count).

    `pretrained_path` (a state dict file or a checkpoint of this package) wins over `pretrained`
    (torchvision's ImageNet weights). A head for another number of classes is left as initialised.
    Raises UserError for an unknown name and for weights that cannot be had or do not fit.
    """
    key = known_model(name)
    options = {"aux_logits": False, "init_weights": True} if key in _AUXILIARY else {}
    model = models.get_model(key, num_classes=class_count, **options)
    ignored = _AUXILIARY.get(key, ())
    if pretrained_path is not None:
        load_weights(model, read_state_dict(pretrained_path), source=str(pretrained_path), ignored=ignored)
    elif pretrained:
        original = _imagenet_model(key)
        load_weights(model, original.state_dict(), source="ImageNet weights", ignored=ignored)
        if key in _AUXILIARY:
            model.transform_input = original.transform_input  # their files were trained on another normalisation
    return model


def head_name(model: nn.Module) -> str:
    """The name of the layer that makes the logits: the last linear or convolution layer."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def avoid_in_place(model: nn.Module) -> nn.Module:
    """Makes activations write new tensors; those a backward pass keeps are the same ones as in place.

    On CPUs PyTorch's 16-bit kernels take twice the time in place (34 against 14 ms for 67 million values).
    """
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    return model


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """Moves `average` towards `model`, buffers included: decay * average + (1 - decay) * model.

    While few `updates` were done the decay is smaller, (1 + updates) / (10 + updates), so that the average does
    not linger at the initial weights (as TensorFlow's ExponentialMovingAverage with `num_updates`).
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    state = average.state_dict()
    new = model.state_dict()
    floating = [name for name, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([state[name] for name in floating], [new[name] for name in floating], 1 - decay)
    for name in state.keys() - set(floating):
        state[name].copy_(new[name])


def check_input_size(model: nn.Module, image_size: int, smallest_piece: int) -> None:
    """Raises UserError if `model` cannot train on `smallest_piece` images of `image_size` pixels.

    Tried on the meta device, which computes shapes only.
    """
    twin = copy.deepcopy(model).to("meta").train()
    try:
        twin(torch.empty(smallest_piece, 3, image_size, image_size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"--image_size {image_size}: {type(model).__name__} cannot train on a micro-batch of {smallest_piece} "
            f"such images ({str(error).splitlines()[0]}).\nUse another --image_size "
            "(224 suits every model) or a --batch_size that leaves no single image over."
        ) from None


def _imagenet_model(key: str) -> nn.Module:
    """The classifier of 1,000 classes as torchvision's own constructor loads it.

    Published files are old: many hold no batch counters, or names of layers from before they were renamed. Only
    their constructors know. They would also run code that a file holds, so it is read without that first.
    """
    weights = models.get_model_weights(key).DEFAULT
    try:
        weights.get_state_dict(progress=shows_bars(), check_hash=True, weights_only=True)
        return models.get_model(key, weights=weights, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise UserError(
            f"the ImageNet weights of {key} could not be loaded: {(str(error) or repr(error)).splitlines()[0]}"
            "\nThree ways out:"
            f"\n  put {weights.url}\n    at {file} (delete a damaged file there)"
            "\n  name a state dict you have with --pretrained_path FILE"
            "\n  train from scratch with --pretrained 0"
        ) from None


def load_file(path: str | Path) -> Any:
    """What `torch.save` wrote to `path`, tensors and plain types only, on the CPU.

    Raises UserError for a missing or damaged file and for a pickle that would run code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd pickles: what matters is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{printable(path)} does not exist.") from None
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        IndexError,
    ) as error:
        if isinstance(error, pickle.UnpicklingError) and re.search("weights_only|Unsupported", str(error), re.I):
            raise UserError(
                f"{printable(path)} was refused: it holds more than tensors and plain types, and loading "
                "it could run code. Use a file that holds a state dict only."
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{printable(path)} is damaged or not a PyTorch file ({reason}).") from None


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in `path`: bare, or under `model` or `state_dict`, with or without DDP's `module.`."""
    content = load_file(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise UserError(f"{printable(path)} holds no state dict (names to tensors).")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def load_weights(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    *,
    source: str,
    ignored: tuple[str, ...] = (),
    new_head: bool = True,
) -> None:
    """Loads `state` into `model`, except, with `new_head`, a head for another number of classes.

    Raises UserError with the offending names where anything else is missing, unknown or of another shape.
    """
    own = model.state_dict()
    head = head_name(model)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(ignored)}
    shapes = {
        name: f"{tuple(state[name].shape)}, needs {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    }
    replaced = {name for name in shapes if new_head and name.rpartition(".")[0] == head}
    problems = [f"  {name}: shape {shapes[name]}" for name in sorted(shapes.keys() - replaced)]
    problems += [f"  {name}: missing" for name in sorted(own.keys() - state.keys())]
    problems += [f"  {name}: unknown" for name in sorted(state.keys() - own.keys())]
    if problems:
        more = [f"  and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise UserError(
            "\n".join(
                [
                    f"the weights in {printable(source)} do not fit this {type(model).__name__}:",
                    *problems[:10],
                    *more,
                    "Name the --model they were saved from, or use --pretrained 0.",
                ]
            )
        )
    own.update({name: tensor for name, tensor in state.items() if name not in replaced})
    model.load_state_dict(own)  # `own` knows the versions of its layers, which MNASNet's loader asks for


class Network:
    """A model as a training uses it: frozen in part at first, wrapped for ranks, compiled, and averaged.

    `head` is the name of the layer that alone is trained for the first `freeze_epochs`; `ema` the decay of the moving
    average of the weights (0: there is none), which is then what is validated and kept. `sizes` are the numbers of
    images that a full micro-batch can hold, `evaluation_size` that of a full batch in evaluation. With `graphs` the
    model is compiled and its training kernels are replayed as CUDA graphs.
    With `only_head` batches are not of images but of the head's inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sizes: set[int],
        evaluation_size: int,
        ranks: Ranks,
        head: str = "",
        freeze_epochs: int = 0,
        ema: float = 0.0,
        compile: bool = False,
        only_head: bool = False,
        graphs: bool = False,
    ):
        self.model = model
        self.only_head = only_head
        self.sizes = sizes
        self.ranks = ranks
        self.head = head
        self.freeze_epochs = freeze_epochs
        self.ema = ema
        self.compile = compile or graphs
        self.graphs = graphs
        self.average = copy.deepcopy(model).requires_grad_(False) if ema else None
        self.forward = Forward(self._fed(model), sizes, self.compile, graphs)
        # No graphs here: what it returns is kept.
        self.evaluate = Forward(self._fed(self.evaluated), {evaluation_size}, self.compile)
        self._frozen: bool | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The model whose weights are validated and kept: the moving average if there is one."""
        return self.model if self.average is None else self.average

    def _fed(self, model: nn.Module) -> nn.Module:
        """The part of `model` that batches are given to."""
        return model.get_submodule(self.head) if self.only_head else model

    def begin_epoch(self, epoch: int) -> bool:
        """Puts the model into training mode with the right layers frozen; returns whether other layers train now."""
        frozen = epoch < self.freeze_epochs
        changed = frozen != self._frozen
        if changed:
            self._frozen = frozen
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(not frozen or name.startswith(self.head))
            fed = self._fed(self.model)
            wrapped = nn.parallel.DistributedDataParallel(fed) if self.ranks.size > 1 else fed
            self.forward = Forward(wrapped, self.sizes, self.compile, self.graphs)
        self.model.train()
        if frozen:  # a frozen layer's batch statistics stay as they were trained, too
            for name, module in self.model.named_modules():
                if name and not name.startswith(self.head):
                    module.eval()
        return changed

    def after_update(self, updates: int) -> None:
        """Moves the average, `updates` being those done before this one."""
        if self.average is not None:
            update_average(self.average, self.model, self.ema, updates)

    def ready_to_evaluate(self) -> Forward:
        """The evaluated model in evaluation mode, its buffers those of the first rank."""
        model = self.evaluated.eval()
        if self.ranks.size > 1:  # batch statistics were each rank's own since the last update
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return self.evaluate

    def trained_names(self) -> list[str]:
        """Names of the parameters that are trained now, in the order of `parameters()`."""
        return [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def state(self) -> dict[str, Any]:
        """The weights, and those of the average, for a checkpoint."""
        return {"model": self.model.state_dict(), "ema": None if self.average is None else self.average.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state()` gave."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])


class WithMirrorImage(nn.Module):
    """Test-time augmentation: the mean of the logits of images (count, 3, height, width) and their mirror images."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.model(images) + self.model(images.flip(3))) / 2


class Forward:
    """Calls a model, compiled for `sizes` of batches; a ragged last batch runs eagerly instead of recompiling.

    With `graphs` what it returns is overwritten by the next call: the update has used it by then.
    """

    def __init__(self, model: nn.Module, sizes: set[int], compiled: bool, graphs: bool = False):
        self.model = model
        self.sizes = sizes
        self.graphs = graphs
        mode = "reduce-overhead" if graphs else None
        self.compiled = torch.compile(model, dynamic=False, mode=mode) if compiled else model
        if compiled:  # the backward pass runs outside autocast here: it is not to be traced under it
            torch._functorch.config.backward_pass_autocast = "off"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return (self.compiled if len(images) in self.sizes else self.model)(images)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.model.parameters()

    def no_sync(self) -> contextlib.AbstractContextManager:
        """Within it DDP exchanges no gradients."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()
