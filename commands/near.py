"""Find nearly equal pictures in two parts of a data set, such as frames of one video, by the inputs of a head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from commands.embeddings import HeadInputs
from images.decode import Rules, ahead, try_decode
from model import build_model, preprocessing
from system.machine import cores
from transforms import Preprocess
from utils import progress_bar

# Cosine of two vectors. Of 450 Intel images with an EfficientNet-Lite0 no two different ones reached it (0.895), but 95
# of 100 that were cropped by 4 % or shifted by 8 of 150 pixels.
NEAR = 0.9
SIDE = 224


def near_pictures(
    parts: Mapping[str, Sequence[Path]], model_name: str, pretrained_path: str | None, rules: Rules
) -> list[tuple[Path, Path, float]]:
    """Return pairs of pictures in two parts whose vectors have a cosine of at least NEAR, the nearest first.

    Each picture of the later part has one pair, with the nearest picture of the earlier one.
    """
    model = build_model(model_name, 1000, pretrained_path=pretrained_path, image_size=SIDE).eval()
    preprocess = Preprocess(torch.device("cpu"), SIDE, **preprocessing(model_name))
    inputs = HeadInputs(model)
    found = defaultdict(list)
    names = defaultdict(list)
    files = [(part, path) for part, paths in parts.items() for path in paths]
    with ThreadPoolExecutor(cores()) as pool, torch.inference_mode():
        decoded = ahead(pool, lambda file: (*file, try_decode(file[1], SIDE, rules)), files, 64)
        for part, path, image in progress_bar(decoded, total=len(files), desc="comparing", unit="image"):
            if not isinstance(image, str):
                model(preprocess(torch.tensor(image)[None]))
                vector = inputs.take()[0]
                found[part].append(vector / max(float(np.linalg.norm(vector)), 1e-12))
                names[part].append(path)
    pairs = []
    for one, other in combinations(found, 2):
        earlier = np.stack(found[one])
        for path, vector in zip(names[other], found[other], strict=True):
            cosines = earlier @ vector
            nearest = int(cosines.argmax())
            if cosines[nearest] >= NEAR:
                pairs.append((names[one][nearest], path, round(float(cosines[nearest]), 3)))
    return sorted(pairs, key=lambda pair: -pair[2])
