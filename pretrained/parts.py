"""Recognise weights that were saved in several files: the index, the parts, and the way to read all of them.

safetensors and Transformers write shards and an index, PyTorch's distributed checkpoints a folder, DeepSpeed a file for
each process. Knows nothing of models.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from utils import UserError, printable, typed

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
_DISTRIBUTED = (".distcp", ".metadata")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")


def names_parts(path: Path) -> bool:
    """Return True if a text file is an index of shards, whatever its name is."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("weight_map"), dict)


def parts_of(index: Path) -> list[Path]:
    """Return the shards that an index names. Raise UserError if one is not beside it."""
    names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{printable(index)} names a file in another folder: {printable(outside[0])}.")
    missing = sorted(name for name in names if not (index.parent / name).exists())
    if missing:
        raise UserError(
            f"{printable(index)} lists {len(names)} shards, but {len(missing)} of them are not beside it, such as "
            f"{printable(missing[0])}: put all of them into one folder."
        )
    return [index.parent / name for name in sorted(names)]


def refuse_part(path: Path) -> None:
    """Raise UserError for a file that holds one part of a network, with the way to read all parts."""
    shard = _SHARD.search(path.name)
    if shard and int(shard[2]) > 1:
        indices = sorted(path.parent.glob("*.index.json"))
        way = "put all shards and their index (*.index.json) into one folder, and name the index"
        if indices:
            way = f"name their index, {printable(indices[0])}"
        raise UserError(f"{printable(path)} is shard {int(shard[1])} of {int(shard[2])} of a network's weights: {way}.")
    if path.name.endswith(_DISTRIBUTED):
        raise UserError(folder_advice(path.parent))
    ranks = sorted(path.parent.glob("mp_rank_*_model_states.pt"))
    if path.name.startswith(("zero_pp_rank_", "bf16_zero_pp_rank_")) or (path in ranks and len(ranks) > 1):
        raise UserError(f"{printable(path)} is one process's part of a network. {_DEEPSPEED}")


_DEEPSPEED = (
    "DeepSpeed put zero_to_fp32.py into the folder above, which joins the parts: python zero_to_fp32.py . weights"
)


def folder_advice(path: Path) -> str:
    """Return advice for a folder: the file in it to name, or the command that joins its parts."""
    names = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith(_DISTRIBUTED) for name in names):
        module = "torch.distributed.checkpoint.format_utils"
        line = typed("python", "-m", module, "dcp_to_torch", path, "weights.pt")
        return (
            f"{printable(path)} is a distributed checkpoint, of one file for each process. If you trust its source, "
            f"make one file of it:\n  {line}"
        )
    if "zero_to_fp32.py" in names:
        return f"{printable(path)} is a checkpoint of DeepSpeed, of one file for each process. {_DEEPSPEED}"
    files = [name for name in names if name.endswith(".index.json")]
    files += [name for name in names if name.endswith(_SUFFIXES)]
    inside = f"Name a file in it: {', '.join(map(printable, files[:5]))}." if files else "No file of weights is in it."
    return f"{printable(path)} is a folder. {inside}"
