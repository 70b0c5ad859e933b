"""torchvision's classifiers by name: built by its own constructors, which also load its published weights."""

from __future__ import annotations

import difflib
import pickle
import re
import urllib.error
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrained.fitting import State, Weights, load_weights, narrow_head, note_options, set_versions
from transforms import IMAGENET_MEAN, IMAGENET_STD
from utils import UserError, importing, printable, shows_bars

# These two have auxiliary heads, which ImageNet files fill and fine-tuning leaves out. Their constructors also decide
# about `transform_input`: their ImageNet files were trained on another normalisation.
AUXILIARY = {"inception_v3": ("AuxLogits",), "googlenet": ("aux1", "aux2")}


@cache
def models() -> Any:
    """Return torchvision.models, whose import takes longer than a process that only starts others should wait."""
    with importing():
        from torchvision import models

    return models


def names() -> list[str]:
    """Names of torchvision's image classification models."""
    return models().list_models(module=models())


def known_name(name: str) -> str:
    """torchvision's name of a classifier in any spelling. Raises UserError where it has none of that name."""
    key = name.lower().replace("-", "_")
    if key not in names():
        from pretrained.timm_models import close_names

        close = difflib.get_close_matches(key, names(), 3) or ["resnet18", "resnet50"]
        known = ", ".join([*close, *close_names(name)])
        raise UserError(f"--model {printable(name)} is not a torchvision classifier. Did you mean {known}?")
    return key


def create(key: str, class_count: int, options: dict[str, Any]) -> nn.Module:
    """A classifier without its weights, with the constructor's arguments in `options`, which it keeps."""
    told = {**options}
    if "input_size" in told:
        told["input_size"] = tuple(told["input_size"])  # a list in JSON
    model = models().get_model(key, num_classes=class_count, **told)
    note_options(model, options)
    return model


def build(
    key: str, class_count: int, image_size: int | None, file: Weights | None, *, pretrained: bool, weights: str | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """A classifier, with its published weights unless there is a `file` or `pretrained` is off.

    `file` is asked only for what the constructor is to be told. Returns the classifier and the names of the layers
    that files of weights may hold beside its own.
    """
    published = _named_weights(key, weights) if pretrained and file is None else None
    options = _size_options(key, image_size, published)
    original = None if published is None else _imagenet_model(key, published)
    if key in AUXILIARY:
        options |= {"aux_logits": False, "init_weights": False}
        options["transform_input"] = original.transform_input if original else _transforms_input(key, file)
    drawn = {"init_weights": True} if key in AUXILIARY else {}
    model = create(key, class_count, {**options, **drawn})
    note_options(model, options)
    ignored = AUXILIARY.get(key, ())
    if original is not None or file is not None:
        narrow_head(model, (head_name(model),))
    if original is not None:
        state = resized(original.state_dict(), model)
        load_weights(model, state, source="ImageNet weights", ignored=ignored, head=(head_name(model),))
    return model, ignored


def head_name(model: nn.Module) -> str:
    """The name of the layer that makes the logits: the last linear or convolution layer."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def imagenet_classes() -> list[str]:
    """Return the words for ImageNet's 1,000 classes, in the order of the published heads."""
    return list(models().ResNet18_Weights.DEFAULT.meta["categories"])


def preprocessing() -> dict[str, Any]:
    """How published weights saw images; all were trained on these, whatever the interpolation of their last test."""
    return {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "interpolation": "bilinear"}


def with_todays_names(state: State, model: nn.Module) -> State:
    """`state` of an old file with today's names of layers, as torchvision's constructor gives them."""
    if not isinstance(model, models().DenseNet):
        return state
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
    renamed = OrderedDict((old.sub(r"\1\2.", name), tensor) for name, tensor in state.items())
    set_versions(renamed, getattr(state, "_metadata", None))
    return renamed


def resized(state: State, model: nn.Module) -> State:
    """`state` with the position embedding of a vision transformer at the size that `model` was built for."""
    name = "encoder.pos_embedding"
    if not isinstance(model, models().VisionTransformer) or state.get(name, torch.empty(0)).dim() != 3:
        return state
    if state[name].shape[2] != model.hidden_dim or state[name].shape == model.encoder.pos_embedding.shape:
        return state
    floats = OrderedDict(state)
    floats[name] = state[name].float()
    larger = models().vision_transformer.interpolate_embeddings(model.image_size, model.patch_size, floats)
    larger._metadata = getattr(state, "_metadata", None)
    return larger


def who_fits(state: State, key: str) -> str | None:
    """Another model of the same kind as `key` whose layers are those of `state`, apart from the head."""
    kind = models().get_model_builder(key).__module__
    for name in names():
        if models().get_model_builder(name).__module__ != kind or name == key:
            continue
        try:
            with torch.device("meta"):
                other = models().get_model(name)
        except NotImplementedError:  # RegNets compute their widths with tensors
            continue
        head = head_name(other)
        if _layers(state, head) == _layers(other.state_dict(), head):
            return name
    return None


def _layers(state: State, head: str) -> dict[str, torch.Size]:
    return {
        name: tensor.shape
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked") and not name.startswith(f"{head}.")
    }


def _transforms_input(key: str, file: Weights | None) -> bool:
    """Whether the weights in a file want the input that GoogLeNet's and Inception's ImageNet weights want.

    A run of this program says so; a file under the name that torchvision published it by is that one.
    """
    if file is None:
        return False
    published = {weights.url.rpartition("/")[2] for weights in models().get_model_weights(key)}
    return bool(file.options.get("transform_input", Path(file.source).name in published))


def _size_options(key: str, image_size: int | None, published: Any) -> dict[str, Any]:
    """What the constructor of a model of a fixed size is told; `image_size` defaults to that of its weights.

    Raises UserError where it cannot be built for that size.
    """
    if not key.startswith(("vit_", "maxvit_")):
        return {}
    own_size = published.meta["min_size"][0] if published is not None else 224
    step = int(key.rpartition("_")[2]) if key.startswith("vit_") else 224  # MaxViT: 7 windows at a 32nd of the size
    size = image_size or own_size
    if size % step:
        near = {size // step * step, (size // step + 1) * step, own_size} - {0}
        one = ", ".join(map(str, sorted(near)))
        raise UserError(
            f"--image_size {size}: {key} takes multiples of {step} pixels. Use one of {one} "
            f"({own_size} is what it was made for)."
        )
    return {"image_size": size} if key.startswith("vit_") else {"input_size": [size, size]}


def _named_weights(key: str, name: str | None) -> Any:
    """One of torchvision's sets of weights for a model. Raises UserError where it has none of that name."""
    known = models().get_model_weights(key)
    asked = (name or "DEFAULT").rpartition(".")[2].upper()
    if asked not in known.__members__:
        choices = ", ".join(known.__members__) or "none: use --pretrained 0"
        raise UserError(f"--weights {printable(name)}: torchvision's weights of {key} are {choices}.")
    return known[asked]


def _imagenet_model(key: str, weights: Any) -> nn.Module:
    """The classifier of 1,000 classes as torchvision's own constructor loads it.

    Published files are old: many hold no batch counters, or names of layers from before they were renamed. Only
    their constructors know. They would also run code that a file holds, so it is read without that first.
    """
    try:
        weights.get_state_dict(progress=shows_bars(), check_hash=True, weights_only=True)
        return models().get_model(key, weights=weights, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        raise UserError(
            f"the ImageNet weights of {key} could not be loaded: {(str(error) or repr(error)).splitlines()[0]}"
            "\nThree ways out:"
            f"\n  put {weights.url}\n    at {file} (delete a damaged file there)"
            "\n  name a file of weights you have with --pretrained_path FILE"
            "\n  train from scratch with --pretrained 0"
        ) from None
