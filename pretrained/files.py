"""Read files of PyTorch and safetensors from any source, without running code in them.

An unreadable file is refused with the reason and the remedy. Knows nothing of models.
"""

from __future__ import annotations

import collections
import json
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from pretrained.parts import folder_advice, names_parts, parts_of, refuse_part
from utils import UserError, first_line, printable, typed

METADATA = "safetensors metadata"  # `load_file` returns the text metadata of a safetensors file under this key
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    AttributeError,
    TypeError,
    IndexError,
    NotImplementedError,
    zipfile.BadZipFile,
)


# -------------------------------------------------------------------------------------------- files
def load_file(path: str | Path) -> Any:
    """Return the content of a PyTorch or safetensors file on the CPU, tensors and plain types only.

    An index of shards gives the tensors of all shards. Raise UserError, with the remedy, for a missing or damaged file,
    a part of a network, another format, and a file that would run code: a pickle, a TorchScript archive.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(folder_advice(path))
    refuse_part(path)
    return _read(path)


def _read(path: Path) -> Any:
    try:
        kind = _kind(path)
        if kind == "index":
            return {name: tensor for part in parts_of(path) for name, tensor in _read(part).items()}
        if kind == "safetensors":
            return _read_safetensors(path)
        if kind == "torchscript":
            raise UserError(_torchscript_advice(path))
        if kind in _OTHER_FORMATS:
            raise UserError(f"{printable(path)} is {kind}, {_OTHER_FORMATS[kind]}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(_plain_types()):
            warnings.simplefilter("ignore")  # hide remarks on odd pickles: only errors matter
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{printable(path)} does not exist.") from None
    except _DAMAGE as error:
        raise UserError(_why_unreadable(path, error)) from None


_OTHER_FORMATS = {
    "a program of torch.export": "not weights: load it with torch.export.load and save its state_dict.",
    "an HDF5 file (Keras)": "which PyTorch cannot read: convert it to a PyTorch state dict first.",
    "a NumPy archive": "which holds no names that PyTorch gave: convert it to a PyTorch state dict first.",
    "text": "not weights (perhaps a web page that was saved, or a pointer of Git LFS): download the file itself.",
    "empty": "0 bytes long: it is damaged; download or copy it again.",
}


def _kind(path: Path) -> str:
    """Return the type of a file by its content, whatever its name is."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "empty"
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file (Keras)"
    if head.startswith(b"\x93NUMPY"):
        return "a NumPy archive"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
        if "constants.pkl" in names:
            return "torchscript"
        if any("exported_program" in name or name.startswith("models/") for name in names):
            return "a program of torch.export"
        if any(name.endswith(".npy") for name in names):
            return "a NumPy archive"
    if head.lstrip()[:1] == b"{" and names_parts(path):
        return "index"
    if head.lstrip()[:1] in (b"<", b"{") or head.startswith(b"version https://git-lfs"):
        return "text"
    return "pickle"


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{printable(path)} needs a package: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
            facts = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{printable(path)} is a damaged safetensors file ({error}).") from None
    if "model_options" not in facts:
        return tensors
    return {
        "state_dict": tensors,
        "model_name": facts.get("model"),
        "model_options": json.loads(facts["model_options"]),
        METADATA: facts,
    }


def _plain_types() -> list[Any]:
    """Return the types without behaviour that training programs store in their checkpoints.

    They are argparse's Namespace (torchvision's reference code, timm), paths, versions, and NumPy's numbers.
    """
    import numpy as np

    types_ = [
        types.SimpleNamespace,
        (types.SimpleNamespace, "argparse.Namespace"),
        collections.deque,
        torch.torch_version.TorchVersion,
    ]
    types_ += [np.dtype, np.ndarray, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}, type(np.dtype("U1"))]
    for name, path in (("PosixPath", pathlib.PurePosixPath), ("WindowsPath", pathlib.PureWindowsPath)):
        types_ += [(path, f"{module}.{name}") for module in ("pathlib", "pathlib._local")]
    core = np._core if hasattr(np, "_core") else np.core  # since NumPy 2, and before
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since NumPy 2
        types_ += [(getattr(core.multiarray, name), f"{module}.{name}") for name in ("scalar", "_reconstruct")]
    for package in ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data"):
        types_ += [(dict, f"{package}.AttributeDict")]
    for package in ("lightning.pytorch.utilities.parsing", "pytorch_lightning.utilities.parsing"):
        types_ += [(dict, f"{package}.AttributeDict")]
    return types_


def _why_unreadable(path: Path, error: BaseException) -> str:
    """Return a sentence on the fault of a file and, if there is one, the line that makes it readable."""
    text = str(error)
    name = printable(path)
    found = re.search(r"GLOBAL ([\w.<>]+)|function <?([^>]+)>?|module (\S+) is blocked", text)
    if isinstance(error, pickle.UnpicklingError) and found:
        what = next(group for group in found.groups() if group)
        return (
            f"{name} was refused: it holds {printable(what)}, which is more than tensors and plain types, and loading "
            "it could run code.\nIf you trust its source, save only its weights, in an environment that can import "
            "that code:\n"
            f"  {_resaving_line(path)}"
        )
    with open(path, "rb") as file:
        pickled = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if "legacy .tar" in text or pickled and "Unsupported operand" in text:
        form = "in PyTorch's format of before 2017" if "tar" in text else "with a newer pickle protocol"
        return (
            f"{name} was refused: it was saved {form}, which cannot be read without the risk of running code.\nIf you "
            f"trust its source, save it again:\n  {_resaving_line(path)}"
        )
    return f"{name} is damaged or not a PyTorch file ({first_line(error)})."


def _torchscript_advice(path: Path) -> str:
    """Return the way to save the weights of a TorchScript archive: torch.jit.load would run the archive's methods."""
    code = (
        f"import torch; m = torch.jit.load({str(path)!r}, map_location='cpu'); torch.save(m.state_dict(), 'weights.pt')"
    )
    return (
        f"{printable(path)} is a TorchScript archive, and loading it runs its code.\nIf you trust its source, save its "
        f"weights alone:\n  {typed('python', '-c', code)}"
    )


def _resaving_line(path: Path) -> str:
    """Return a command that saves only the weights of a trusted file, under whatever key they are."""
    code = (
        f"import torch; c = torch.load({str(path)!r}, map_location='cpu', weights_only=False); "
        "c = next((c[k] for k in ('state_dict', 'model', 'model_state_dict', 'net') "
        "if isinstance(c, dict) and k in c), c); torch.save(getattr(c, 'state_dict', lambda: c)(), 'weights.pt')"
    )
    return typed("python", "-c", code)
