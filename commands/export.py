"""ONNX export: one graph from uint8 pixels to probabilities, checked against PyTorch before it is kept.

Resize and normalisation are inside the graph, so the file needs no preprocessing code where it is used.
Knows nothing of runs or options.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from transforms import IMAGENET_MEAN, IMAGENET_STD
from utils import RunError, UserError, atomic_write, printable, refuse_missing_folders

if TYPE_CHECKING:
    from assemble import Setup

TOLERANCE = 1e-3  # largest difference of probabilities between PyTorch and ONNX Runtime


def export(setup: Setup, *, out: str | None) -> None:
    """The command: writes a trained run as ONNX."""
    refuse_missing_folders(out)
    checkpoint = setup.checkpoint
    file = Path(out or setup.checkpoint_file.with_name("model.onnx"))
    print(export_onnx(setup.trained(checkpoint), checkpoint, file))


class FromPixels(nn.Module):
    """uint8 images (count, height, width, 3), RGB, any size, to probabilities (count, classes)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, image_size: int, normalize: str):
        super().__init__()
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if normalize == "imagenet" else ((0.0,) * 3, (1.0,) * 3)
        self.model = model
        self.size = (image_size, image_size)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True)  # as images are read here
        return self.model((pixels - self.mean) / self.std).softmax(1)


def export_onnx(model: nn.Module, checkpoint: dict, file: Path) -> str:
    """Writes `file`, checked with ONNX Runtime on random images of two sizes; returns what to tell the user.

    Raises UserError if the packages are missing, RunError if the two disagree by more than TOLERANCE.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"export needs {error.name}: pip install onnx onnxruntime onnxscript") from None
    network = FromPixels(model.float().cpu().eval(), checkpoint["image_size"], checkpoint["normalize"]).eval()
    count, height, width = (torch.export.Dim(name) for name in ("count", "height", "width"))
    example = torch.randint(0, 256, (2, 150, 160, 3), dtype=torch.uint8)
    program: Any = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: count, 1: height, 2: width}},
        verbose=False,
    )
    proto = program.model_proto
    facts = {
        "classes": json.dumps(checkpoint["classes"]),
        "image_size": str(checkpoint["image_size"]),
        "normalize": checkpoint["normalize"],
        "input": "RGB uint8, (count, height, width, 3), any size",
        "model": checkpoint["model_name"],
    }
    onnx.helper.set_model_props(proto, facts)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    difference = max(_difference(session, network, shape) for shape in ((3, 150, 160, 3), (1, 97, 300, 3)))
    if not difference <= TOLERANCE:
        raise RunError(f"ONNX Runtime and PyTorch differ by {difference:.2g} (allowed {TOLERANCE}): nothing written.")
    with atomic_write(file) as handle:
        handle.write(proto.SerializeToString())
    return (
        f"{printable(file)}: {file.stat().st_size / 2**20:.1f} MB; ONNX Runtime and PyTorch agree to {difference:.1e}"
        "\n\n  import onnxruntime, numpy, PIL.Image"
        f"\n  session = onnxruntime.InferenceSession({str(file)!r})"
        '\n  print(session.run(None, {"images": numpy.asarray(PIL.Image.open("x.jpg").convert("RGB"))[None]}))'
    )


def _difference(session: Any, network: nn.Module, shape: tuple[int, ...]) -> float:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    return float(np.abs(session.run(None, {"images": images})[0] - expected).max())
