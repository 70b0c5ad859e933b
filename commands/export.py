"""Export of a trained run: ONNX from pixels to probabilities, checked against PyTorch, or its weights as safetensors.

Resize and normalisation are inside the graph. The lines that read an image are printed with it: they are the code
with which images are read here. Knows nothing of options.
"""

from __future__ import annotations

import inspect
import logging
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from images import decode
from images.decode import Rules
from model import WithMirrorImage
from runs.checkpoint import metadata
from system.files import atomic_write, refuse_missing_folders
from utils import RunError, UserError, log, printable

if TYPE_CHECKING:
    from assemble import Setup

TOLERANCE = 1e-3  # largest difference of probabilities between PyTorch and ONNX Runtime


def export(setup: Setup, *, out: str | None, safetensors: bool) -> None:
    """The command: writes a trained run as ONNX, or its weights as safetensors."""
    refuse_missing_folders(out)
    checkpoint = setup.checkpoint
    if safetensors:
        write_safetensors(checkpoint, Path(out or setup.checkpoint_file.with_name("best_model.safetensors")))
    else:
        print(
            export_onnx(
                setup.trained(checkpoint), checkpoint, Path(out or setup.checkpoint_file.with_name("model.onnx"))
            )
        )


def require_safetensors() -> Any:
    """The function that makes such files. Raises UserError where the package is missing."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("--safetensors needs a package: pip install safetensors") from None
    return save


def write_safetensors(checkpoint: dict[str, Any], file: Path) -> None:
    """Writes a checkpoint's weights, and what else its use needs as text in the file's metadata."""
    save = require_safetensors()
    facts = {"format": "pt", **metadata(checkpoint)}
    weights = {name: tensor.contiguous().clone() for name, tensor in checkpoint["model"].items()}
    with atomic_write(file) as handle:
        handle.write(save(weights, facts))
    log.info(f"weights: {printable(file)}")


class FromPixels(nn.Module):
    """uint8 images (count, height, width, 3), RGB, any size, to probabilities (count, classes)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, checkpoint: dict[str, Any]):
        super().__init__()
        self.model = model
        self.size = (checkpoint["image_size"], checkpoint["image_size"])
        self.interpolation = checkpoint["interpolation"]
        self.register_buffer("mean", 255 * torch.tensor(checkpoint["mean"]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(checkpoint["std"]).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, self.size, mode=self.interpolation, antialias=True)
        return self.model((pixels - self.mean) / self.std).softmax(1)


def export_onnx(model: nn.Module, checkpoint: dict[str, Any], file: Path) -> str:
    """Writes `file`, checked with ONNX Runtime on one, two and five images; returns what to tell the user.

    Raises UserError where packages are missing, RunError where the model cannot be exported, or where the two
    disagree by more than TOLERANCE.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"export needs {error.name}: pip install onnx onnxruntime onnxscript") from None
    network = FromPixels(model.float().cpu().eval(), checkpoint).eval()
    name = printable(checkpoint["model_name"])
    try:
        proto = _converted(network)
        tta = "flip" if isinstance(model, WithMirrorImage) else "none"
        facts = {**metadata(checkpoint), "tta": tta, "input": "RGB uint8, (count, height, width, 3), any size"}
        onnx.helper.set_model_props(proto, facts)
        onnx.checker.check_model(proto)
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        side = checkpoint["image_size"]
        shapes = ((1, side, side, 3), (2, 150, 160, 3), (5, 97, 300, 3))
        difference = max(_difference(session, network, shape) for shape in shapes)
    except Exception as error:  # the exporter, the checker and the runtime raise many kinds, some of them their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunError(f"{name} cannot be exported to ONNX: {printable(reason)}. Nothing was written.") from None
    if not difference <= TOLERANCE:
        raise RunError(
            f"{name}: ONNX Runtime and PyTorch differ by {difference:.2g} (allowed {TOLERANCE}). Nothing was written."
        )
    with atomic_write(file) as handle:
        handle.write(proto.SerializeToString())
    size = file.stat().st_size / 2**20
    said = f"{printable(file)}: {size:.1f} MB; ONNX Runtime and PyTorch agree to {difference:.1e}. To use it:"
    return f"{said}\n\n{lines_of_use(file, checkpoint)}"


def _converted(network: FromPixels) -> Any:
    """The graph, for any number of images of any size."""
    count, height, width = (torch.export.Dim(name) for name in ("count", "height", "width"))
    example = torch.randint(0, 256, (2, 150, 160, 3), dtype=torch.uint8)
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's remarks on itself: what it made is checked
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["probabilities"],
                dynamic_shapes={"images": {0: count, 1: height, 2: width}},
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None  # as with dynamo it always is
    return program.model_proto


def _difference(session: Any, network: nn.Module, shape: tuple[int, ...]) -> float:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    return float(np.abs(session.run(None, {"images": images})[0] - expected).max())


def lines_of_use(file: Path, checkpoint: dict[str, Any]) -> str:
    """A program that needs neither PyTorch nor this package, and gives what `predict` gives."""
    windows = Rules(windows=checkpoint.get("windows") or {})
    side = checkpoint["image_size"]
    functions = (decode.deep_mode, decode.upright, decode.to_rgb)
    turns = ", ".join(f"{number}: Image.Transpose.{turn.name}" for number, turn in decode.UPRIGHT.items())
    program = "\n\n\n".join(
        [
            "from __future__ import annotations\n\nfrom contextlib import suppress\n\nimport numpy as np\n"
            "import onnxruntime\nfrom PIL import Image, ImageCms\n\n"
            f"BACKGROUND = {decode.BACKGROUND}\nORIENTATION = {decode.ORIENTATION:#06x}\nUPRIGHT = {{{turns}}}\n"
            f"WINDOWS = { ({mode: windows.window(mode) for mode in decode.TYPE_WINDOWS}) }",
            *(inspect.getsource(function).rstrip() for function in functions),
            f"session = onnxruntime.InferenceSession({str(file)!r})\n"
            'image = Image.open("x.jpg")\nimage.load()\n'
            f"image = to_rgb(upright(image), WINDOWS.__getitem__).resize(({side}, {side}), "
            f"Image.Resampling.{checkpoint['interpolation'].upper()})\n"
            'print(session.run(None, {"images": np.asarray(image)[None]})[0])  # probabilities of the classes',
        ]
    )
    return textwrap.indent(program, "  ")
