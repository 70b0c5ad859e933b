"""Why did it say so? Class activation maps of images, for the class that a trained run predicted."""

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
    from evaluate import Evaluation
    from images.subsets import DataSet


def explain_mistakes(model: nn.Module, data: DataSet, batches: Batches, found: Evaluation) -> dict[str, Any]:
    """Return maps by file name, for the class that was predicted, of those test images that mistakes.png shows.

    `found` is the test, `batches` feed its images. Empty if this network or this machine's memory gives none.
    """
    wrong = most_confidently_wrong(found.confidence, ~found.right)
    if not len(wrong):
        return {}
    chosen = copy.copy(data.test)
    chosen.positions = data.test.positions[wrong]
    chosen.labels = data.test.labels[wrong]
    try:
        maps = explained(model, _one_by_one(batches, chosen), found.predicted[wrong].tolist())
    except (RuntimeError, MemoryError) as error:  # a picture is not worth a finished run
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
    """`predict --explain FILE`: images with maps of what spoke for their predicted class beside them, as PNG.

    `found` are paths with captions; of more than 24 some are chosen evenly. Raises UserError for a network that has no
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
