"""TorchScript archives: their tensors by name, without running or compiling the code beside them.

torch.jit.load would run an archive's __setstate__ methods, which may write files; here its objects become bare
holders of attributes.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Attributes:
    """An object of any class of the archive."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


class _Unpickler(pickle.Unpickler):
    """Makes tensors, lists and bare objects; anything else is refused before it is imported."""

    def __init__(self, content: bytes, archive: zipfile.ZipFile, root: str):
        super().__init__(io.BytesIO(content))
        self.archive = archive
        self.root = root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Attributes
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch.jit._pickle":  # build_intlist, build_tensorlist and so on; restore_type_tag has a tag, too
            return lambda values, *_: values
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is no part of weights")

    def persistent_load(self, saved: tuple) -> torch.Tensor:
        """A storage as a tensor of one dimension."""
        _, dtype, key, _, count = saved
        content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(content, dtype=dtype)[:count] if content else torch.empty(0, dtype=dtype)


def _tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    return torch.as_strided(storage, size, stride, offset)


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor attribute of a TorchScript module's archive, by its dotted name."""
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
        return dict(_tensors(_Unpickler(archive.read(f"{root}/data.pkl"), archive, root).load()))


def _tensors(module: Any, start: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in vars(module).items():
        if torch.is_tensor(value):
            yield start + name, value
        elif isinstance(value, _Attributes):
            yield from _tensors(value, f"{start}{name}.")
