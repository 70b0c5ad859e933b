"""Build and describe timm's models by name, `timm:NAME`. timm is imported only if one is used."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from typing import Any

from torch import nn

from pretrained.fitting import Weights, narrow_head, note_options
from utils import UserError, first_line, printable, shows_bars

PREFIX = "timm:"


def is_timm(name: str) -> bool:
    return name.lower().startswith(PREFIX)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError("--model timm:NAME needs a package: pip install timm") from None
    return timm


def known_name(name: str) -> str:
    """Return `timm:NAME` in timm's spelling, with a tag of weights if given. Raise UserError if it is unknown."""
    timm = _timm()
    key = name[len(PREFIX) :].lower()
    architecture, _, tag = key.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), 3) or ["resnet18", "efficientnet_lite0"]
        raise UserError(f"--model {printable(name)} is not a timm model. Did you mean {_joined(close)}?")
    tags = {full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")}
    if tag and tag not in tags:
        close = difflib.get_close_matches(tag, tags, 3, 0) or sorted(tags)[:3]
        known = f"Did you mean {_joined(f'{architecture}.{one}' for one in close)}?" if tags else "It has none."
        raise UserError(f"--model {printable(name)}: timm has no such weights of {architecture}. {known}")
    return PREFIX + key


def close_names(name: str) -> list[str]:
    """Return timm's models with similar names, if timm is installed."""
    if importlib.util.find_spec("timm") is None:
        return []
    return [PREFIX + near for near in difflib.get_close_matches(name.lower(), _timm().list_models(), 1, 0.9)]


def _joined(names: Any) -> str:
    return ", ".join(PREFIX + name for name in names)


def create(key: str, class_count: int, options: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Return timm's model built with the keyword arguments in `options`; `pretrained`: filled by timm."""
    told = {name: value for name, value in options.items() if name not in ("pretrained", "num_classes")}
    model = _timm().create_model(key[len(PREFIX) :], pretrained=pretrained, num_classes=class_count, **told)
    note_options(model, options)
    return model


def build(
    key: str, class_count: int, image_size: int | None, file: Weights | None, *, pretrained: bool, weights: str | None
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a timm model for images of `image_size`, with its published weights unless there is a `file`.

    `file` supplies only the constructor's keyword arguments. Return the model, and an empty tuple of further layer
    names. Raise UserError if the model cannot be built for that size or the weights cannot be downloaded.
    """
    if weights is not None:
        raise UserError(f"--weights names torchvision's weights; timm's are part of the name: --model {key}.TAG")
    config = _timm().get_pretrained_cfg(key[len(PREFIX) :])
    told = {} if file is None else file.options
    options = {name: value for name, value in told.items() if isinstance(value, (bool, int, float))}
    if image_size and config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    try:
        model = create(key, class_count, options)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        own_size = 224 if config is None else config.input_size[1]
        raise UserError(
            f"{key} cannot be built ({first_line(error)}). Its own size is --image_size {own_size}."
        ) from None
    _refuse_without_head(model, key, class_count)
    if pretrained and file is None:
        model = _pretrained(key, class_count, options, config)
        if class_count != config.num_classes:  # otherwise the head has published weights as well
            narrow_head(model, head_names(model))
    elif file is not None:
        narrow_head(model, head_names(model))
    return model, ()


def _refuse_without_head(model: nn.Module, key: str, class_count: int) -> None:
    """Raise UserError for a network without logits: timm's encoders, and others that are not classifiers."""
    layers = dict(model.named_modules())
    heads = [getattr(layers.get(name), "weight", None) for name in head_names(model)]
    if not heads or any(weight is None or len(weight) != class_count for weight in heads):
        kind = type(model).__name__
        raise UserError(f"--model {key} is not a classifier: {kind} has no head for {class_count} classes.")


def _pretrained(key: str, class_count: int, options: dict[str, Any], config: Any) -> nn.Module:
    timm = _timm()
    if config is None or not config.has_weights:
        tagged = timm.list_pretrained(f"{key[len(PREFIX) :].partition('.')[0]}.*")
        known = f" Others: {_joined(tagged[:3])}." if tagged else ""
        raise UserError(f"timm has no published weights of {key}: use --pretrained 0.{known}")
    timm.models.set_pretrained_download_progress(shows_bars())
    try:
        return create(key, class_count, options, pretrained=True)
    except Exception as error:  # the loader, the hub, its transport and the network raise many types
        where = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
        raise UserError(
            f"the published weights of {key} could not be loaded: {first_line(error)}\nThree ways out:"
            f"\n  download them from {where}\n    and name the file with --pretrained_path FILE"
            "\n  name a file of weights you have with --pretrained_path FILE"
            "\n  train from scratch with --pretrained 0"
        ) from None


def _config(model: nn.Module) -> dict[str, Any]:
    """Return the configuration that timm stores in each of its models; empty for another library's."""
    return getattr(model, "pretrained_cfg", None) or {}


def head_names(model: nn.Module) -> tuple[str, ...]:
    names = _config(model).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def published_count(model: nn.Module) -> int | None:
    """Return the number of classes of a timm model's published weights; None for another library's model."""
    return _config(model).get("num_classes")


def own_size(model: nn.Module) -> int | None:
    size = _config(model).get("input_size")
    return size[1] if size else None


def preprocessing(key: str) -> dict[str, Any]:
    """Return mean, standard deviation and interpolation of the model's data configuration."""
    from timm.data import resolve_data_config

    config = _timm().get_pretrained_cfg(key[len(PREFIX) :])
    config = resolve_data_config(
        pretrained_cfg=config.to_dict() if config is not None else {"interpolation": "bicubic"}
    )
    known = config["interpolation"] in ("bilinear", "bicubic")
    return {
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"] if known else "bicubic",
    }


def with_todays_names(state: Any, model: nn.Module) -> Any:
    """Return `state` renamed and resized by timm's filter for the model's family; unchanged if there is no filter."""
    filter_ = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filter_ is None or not _config(model):
        return state
    try:
        return filter_(dict(state), model)
    except Exception:  # filters assume weights of their own family: `load_weights` reports the entries that do not fit
        return state
