"""Draw class activation maps of images, for the class that a trained run predicted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from features.activation_maps import explained
from images.decode import Rules, try_decode
from reports.results import most_confidently_wrong
from transforms import Preprocess
from utils import UserError, log, printable

if TYPE_CHECKING:
    from dataset import Batches
    from images.subsets import DataSet
    from runs.evaluation import Evaluation


def explain_mistakes(model: nn.Module, data: DataSet, batches: Batches, found: Evaluation) -> dict[str, Any]:
    """Return the maps of the test images in mistakes.png, by file name, for the predicted class.

    `found` is the test, `batches` load its images. Return an empty dict if the network has no such maps or memory is
    short.
    """
    wrong = most_confidently_wrong(found.confidence, ~found.right)
    if not len(wrong):
        return {}
    chosen = copy.copy(data.test)
    chosen.positions = data.test.positions[wrong]
    chosen.labels = data.test.labels[wrong]
    try:
        maps = explained(model, _one_by_one(batches, chosen), found.predicted[wrong].tolist())
    except (RuntimeError, MemoryError) as error:  # a picture must not cost a finished run
        log.info(f"no class activation maps: {str(error).splitlines()[0]}")
        return {}
    if maps is None:
        log.info(f"no class activation maps: {type(model).__name__} has no layer that keeps places")
        return {}
    return dict(zip(data.names(chosen), maps, strict=True))


def _one_by_one(batches: Batches, chosen: Any) -> Iterator[torch.Tensor]:
    own = copy.copy(batches)
    own.subset = chosen
    own.ranks = type(batches.ranks)()  # only the first process writes
    for images, *_ in own.evaluation():
        yield from images.split(1)


def explain_predictions(
    model: nn.Module, found: list[tuple[Path, str]], preprocess: Preprocess, rules: Rules | None, file: Path
) -> None:
    """Write the PNG of `predict --explain FILE`: images, each beside the map for its predicted class.

    `found` are paths with captions; 24 of them at most are shown, evenly spaced. Raise UserError if the network has no
    such maps.
    """
    chosen = [found[place] for place in np.linspace(0, len(found) - 1, min(24, len(found))).astype(int)]
    paths = [path for path, _ in chosen]
    images = [_decoded(path, preprocess, rules) for path in paths]
    with torch.no_grad():
        predicted = [int(model(image).argmax()) for image in images]
    maps = explained(model, images, predicted)
    if maps is None:
        raise UserError(f"--explain: {type(model).__name__} has no layer that keeps places. Leave it out.")
    captions = [caption for _, caption in chosen]
    heading = "What spoke for the predicted class (bright)"
    from reports.sheets import explained_sheet  # matplotlib, which no training should wait for

    explained_sheet(paths, captions, maps, file, heading=heading, rules=rules)
    log.info(f"explained: {printable(file)}")


def _decoded(path: Path, preprocess: Preprocess, rules: Rules | None) -> torch.Tensor:
    pixels = try_decode(path, preprocess.image_size, rules)
    if isinstance(pixels, str):
        raise UserError(f"{printable(path)} can no longer be read: {printable(pixels)}")
    own = torch.from_numpy(np.array(pixels, order="C"))  # a copy: some decoded pixels are read-only
    return preprocess(own[None].to(preprocess.device))
