"""Keep the inputs of a model's head, which describe images, for `predict --embed`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from features.means import MeanOfViews
from images.inputs import Item
from model import head_names
from runs.writing import csv_text
from system.files import as_cell, atomic_write, write_text
from utils import UserError, amount, log, printable


class HeadInputs:
    """Keep the inputs of the head in each call of a model, until they are taken."""

    def __init__(self, model: nn.Module):
        plain = model.model if isinstance(model, MeanOfViews) else model
        self._calls: list[torch.Tensor] = []
        plain.get_submodule(head_names(plain)[0]).register_forward_pre_hook(
            lambda _, inputs: self._calls.append(inputs[0].float())
        )

    def take(self) -> np.ndarray:
        """Return one vector for each image (count, width), float32: the mean over views, and over places in a map."""
        vectors = torch.stack(self._calls).mean(0)
        self._calls.clear()
        return (vectors.flatten(2).mean(2) if vectors.ndim > 2 else vectors).cpu().numpy()


class Embeddings:
    """The images that were classified, each with its vector, class and probability."""

    def __init__(self, file: str, model: nn.Module, classes: list[str]):
        self.file = Path(file)
        if self.file.suffix not in (".npz", ".csv"):
            raise UserError(f"--embed {printable(file)}: the name must end with .npz or .csv.")
        self.classes = classes
        self._inputs = HeadInputs(model)
        self._paths: list[str] = []
        self._vectors: list[np.ndarray] = []
        self._shares: list[np.ndarray] = []

    def add(self, items: list[Item], shares: np.ndarray, finite: np.ndarray) -> None:
        """Keep the images of the model's last call whose logits are `finite`; `shares` are their probabilities."""
        self._paths += [str(item.path) for item in items]
        self._vectors.append(self._inputs.take()[finite])
        self._shares.append(shares)

    def write(self) -> None:
        """Write a row for each image: vectors, paths, predicted classes and their probabilities."""
        vectors = np.concatenate(self._vectors)
        shares = np.concatenate(self._shares)
        predicted = [self.classes[label] for label in shares.argmax(1)]
        confidence = shares.max(1)
        if self.file.suffix == ".npz":
            with atomic_write(self.file) as file:
                paths, names = (np.array(words, np.str_) for words in (self._paths, predicted))
                np.savez(file, embeddings=vectors, paths=paths, predicted=names, confidence=confidence)
        else:
            header = ["path", "predicted", "confidence", *(f"e{place}" for place in range(vectors.shape[1]))]
            rows = zip(map(as_cell, self._paths), map(as_cell, predicted), confidence, vectors, strict=True)
            cells = ([path, name, f"{share:.6f}", *map("{:.6g}".format, vector)] for path, name, share, vector in rows)
            write_text(self.file, csv_text([header, *cells]))
        count = amount(len(vectors), "vector", "vectors")
        log.info(f"{printable(self.file)}: {count} of {vectors.shape[1]:,} numbers, the inputs of the head")
