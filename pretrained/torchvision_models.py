"""Build torchvision's classifiers by name with its own constructors, which also load its published weights."""

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

# These two have auxiliary heads: ImageNet files fill them, fine-tuning leaves them out. Their constructors also decide
# about `transform_input`, because their ImageNet files were trained with another normalisation.
AUXILIARY = {"inception_v3": ("AuxLogits",), "googlenet": ("aux1", "aux2")}


@cache
def models() -> Any:
    """Return torchvision.models. Its import is slow, and a process that only starts others should not wait for it."""
    with importing():
        from torchvision import models

    return models


def names() -> list[str]:
    """Return the names of torchvision's image classification models."""
    return models().list_models(module=models())


def known_name(name: str) -> str:
    """Return torchvision's name of a classifier, given in any spelling. Raise UserError if it is unknown."""
    key = name.lower().replace("-", "_")
    if key not in names():
        from pretrained.timm_models import close_names

        close = difflib.get_close_matches(key, names(), 3) or ["resnet18", "resnet50"]
        known = ", ".join([*close, *close_names(name)])
        raise UserError(f"--model {printable(name)} is not a torchvision classifier. Did you mean {known}?")
    return key


def create(key: str, class_count: int, options: dict[str, Any]) -> nn.Module:
    """Return a classifier without its weights, built with the keyword arguments in `options`, which it keeps."""
    told = {**options}
    if "input_size" in told:
        told["input_size"] = tuple(told["input_size"])  # a list in JSON
    model = models().get_model(key, num_classes=class_count, **told)
    note_options(model, options)
    return model


def build(
    key: str, class_count: int, image_size: int | None, file: Weights | None, *, pretrained: bool, weights: str | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a classifier, with its published weights unless there is a `file` or `pretrained` is False.

    `file` supplies only the constructor's keyword arguments. Return the classifier and the names of the layers that
    files of weights may contain in addition to its own.
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
    """Return the name of the layer that computes the logits: the last linear or convolution layer."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def imagenet_classes() -> list[str]:
    """Return the names of ImageNet's 1,000 classes, in the order of the published heads."""
    return list(models().ResNet18_Weights.DEFAULT.meta["categories"])


def preprocessing() -> dict[str, Any]:
    """Return the normalisation and interpolation that all published weights were trained with."""
    return {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "interpolation": "bilinear"}


def with_todays_names(state: State, model: nn.Module) -> State:
    """Return `state` of an old file with today's layer names, as torchvision's constructor renames them."""
    if not isinstance(model, models().DenseNet):
        return state
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
    renamed = OrderedDict((old.sub(r"\1\2.", name), tensor) for name, tensor in state.items())
    set_versions(renamed, getattr(state, "_metadata", None))
    return renamed


def resized(state: State, model: nn.Module) -> State:
    """Return `state` with the position embedding of a vision transformer resized for `model`."""
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
    """Return another model of the same kind as `key` with the layers of `state`, except the head, or None."""
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
    """Return True if a file's weights expect the input normalisation of GoogLeNet's and Inception's ImageNet weights.

    A run of this program records it; a file under torchvision's published name is taken for torchvision's.
    """
    if file is None:
        return False
    published = {weights.url.rpartition("/")[2] for weights in models().get_model_weights(key)}
    return bool(file.options.get("transform_input", Path(file.source).name in published))


def _size_options(key: str, image_size: int | None, published: Any) -> dict[str, Any]:
    """Return the keyword arguments for a model of a fixed size; `image_size` defaults to that of its weights.

    Raise UserError if it cannot be built for that size.
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
            f"(it was made for {own_size})."
        )
    return {"image_size": size} if key.startswith("vit_") else {"input_size": [size, size]}


def _named_weights(key: str, name: str | None) -> Any:
    """Return one of torchvision's sets of weights for a model. Raise UserError if it has none of that name."""
    known = models().get_model_weights(key)
    asked = (name or "DEFAULT").rpartition(".")[2].upper()
    if asked not in known.__members__:
        choices = ", ".join(known.__members__) or "none: use --pretrained 0"
        raise UserError(f"--weights {printable(name)}: torchvision's weights of {key} are {choices}.")
    return known[asked]


def _imagenet_model(key: str, weights: Any) -> nn.Module:
    """Return the classifier of 1,000 classes, loaded by torchvision's own constructor.

    Published files are old: many lack batch counters or have old layer names, and only torchvision's constructors
    convert them. The constructors would also run code in a file, so read the file without running it first.
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
