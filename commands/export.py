"""Export a trained run: ONNX from pixels to probabilities, checked against `predict`, or weights as safetensors.

Resizing and normalisation are inside the graph. A program that uses it is printed; it contains this program's own code
that reads images. Knows nothing of options.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from assemble import set_up, trained_model
from features.means import MeanOfViews
from images import decode
from images.decode import Rules, try_decode
from images.split import read_split
from runs.checkpoint import metadata
from runs.config import read_config
from system.files import atomic_write, refuse_missing_folders
from transforms import Preprocess, resize, squared
from utils import RunError, UserError, first_line, log, printable

if TYPE_CHECKING:
    from command_line.groups import Asked, Export
    from distributed import Ranks

# The largest differences that are allowed between the exported graph and `predict`.
PIXELS = 2  # of 255: ONNX Runtime resizes in float32, `predict` in fixed point
# Logits as a share of the largest; eleven architectures stay below 5e-6 in float32.
IN_FLOAT32 = {"logits": 1e-4, "probabilities": 1e-3}
IN_FLOAT16 = {"logits": 0.02, "probabilities": 0.02}


def export(asked: Asked, ranks: Ranks, own: Export) -> None:
    """Write a trained run as ONNX, or its weights as safetensors."""
    refuse_missing_folders(own.out)
    setup = set_up(asked, ranks)
    checkpoint = setup.trained
    source = asked.place.checkpoint_file
    if own.safetensors:
        write_safetensors(checkpoint, Path(own.out or source.with_name("best_model.safetensors")))
    else:
        file = Path(own.out or source.with_name("model_float16.onnx" if own.float16 else "model.onnx"))
        images = images_of_test(checkpoint, source.parent, 200 if own.float16 else 8)
        kept = checkpoint.get("float32_layers")
        if kept:
            computed = "the whole network in float16" if own.float16 else "all layers in float32"
            log.info(f"note: --float32_layers {printable(kept)} was for training: the file computes {computed}")
        print(export_onnx(trained_model(setup, checkpoint), checkpoint, file, images, float16=own.float16))


def images_of_test(checkpoint: dict[str, Any], folder: Path, most: int = 8) -> list[np.ndarray]:
    """Return up to `most` test images of the run in `folder`, as `predict` decodes them; none if they are gone."""
    rules = Rules.recorded(checkpoint)
    with contextlib.suppress(UserError):
        root = Path(read_config(folder / "config.json")["dataset"].get("folder", ""))
        names = [name for name, (_, part) in read_split(folder / "split.csv").items() if part == "test"]
        chosen = [root / name for name in names[:: max(1, len(names) // most)][:most]]
        found = [try_decode(path, checkpoint["image_size"], rules) for path in chosen]
        return [image for image in found if not isinstance(image, str)]
    return []


def require_safetensors() -> Any:
    """Return the function that makes such files. Raise UserError if the package is missing."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("--safetensors needs a package: pip install safetensors") from None
    return save


def write_safetensors(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a checkpoint's weights, and everything else that its use needs as text in the metadata."""
    save = require_safetensors()
    facts = {"format": "pt", **metadata(checkpoint)}
    weights = {name: tensor.contiguous().clone() for name, tensor in checkpoint["model"].items()}
    with atomic_write(file) as handle:
        handle.write(save(weights, facts))
    log.info(f"weights: {printable(file)}")


class FromPixels(nn.Module):
    """Compute probabilities (count, classes) from uint8 RGB images (count, height, width, 3) of any size."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, checkpoint: dict[str, Any], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model.to(dtype)
        self.dtype = dtype  # of the network; images and probabilities are float32
        self.size = (checkpoint["image_size"], checkpoint["image_size"])
        self.interpolation = checkpoint["interpolation"]
        self.resize = checkpoint.get("resize") or "squash"
        self.with_parts = False
        self.register_buffer("mean", 255 * torch.tensor(checkpoint["mean"]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(checkpoint["std"]).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> Any:
        """Return the probabilities, or if `with_parts` is set (probabilities, logits, resized pixels)."""
        square = squared(images.permute(0, 3, 1, 2), self.resize)
        pixels = resize(square.float(), self.size, self.interpolation)
        logits = self.model(((pixels - self.mean) / self.std).to(self.dtype)).float()
        probabilities = logits.softmax(1)
        return (probabilities, logits, pixels) if self.with_parts else probabilities


def export_onnx(
    model: nn.Module,
    checkpoint: dict[str, Any],
    file: Path,
    images: Sequence[np.ndarray] = (),
    *,
    float16: bool = False,
) -> str:
    """Write `file`, checked with ONNX Runtime against `predict`; return the message for the user.

    With `float16` the network computes in float16, but the one that it is compared with in float32. The check takes
    drawn pictures of several sizes, and `images` uint8 (height, width, 3). Raise UserError if packages are missing,
    RunError if the model cannot be exported, or if the two differ by more than is allowed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"export needs {error.name}: pip install onnx onnxruntime onnxscript") from None
    network = FromPixels(model.float().cpu().eval(), checkpoint).eval()
    written = FromPixels(copy.deepcopy(network.model), checkpoint, torch.float16).eval() if float16 else network
    name = printable(checkpoint["model_name"])
    try:
        proto = _converted(written)
        tta = model.tta if isinstance(model, MeanOfViews) else "none"
        facts = {**metadata(checkpoint), "tta": tta, "computes_in": "float16" if float16 else "float32"}
        facts |= {"input": "RGB uint8, (count, height, width, 3), any size"}
        onnx.helper.set_model_props(proto, facts)
        onnx.checker.check_model(proto)
        onnxruntime.set_default_logger_severity(3)  # it warns of operators that it computes in float32
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        preprocess = as_predict(checkpoint)
        drawn = [differences(session, network, preprocess, batch) for batch in drawn_pictures(preprocess.image_size)]
        taken = [differences(session, network, preprocess, image[None]) for image in images]
        found = np.max([*drawn, *taken], 0)[:3]
        changed = sum(int(another) for *_, another in taken)
        del proto.graph.output[1:]  # the parts, which only the check needs
    except Exception as error:  # the exporter, the checker and the runtime raise many types
        raise RunError(f"{name} cannot be exported to ONNX: {first_line(error)}. Nothing was written.") from None
    allowed = {"pixels": PIXELS, **(IN_FLOAT16 if float16 else IN_FLOAT32)}
    for difference, (part, most) in zip(found.tolist(), allowed.items(), strict=True):
        if not difference <= most:
            raise RunError(
                f"{name}: the {part} of ONNX Runtime and PyTorch differ by {difference:.2g} (allowed {most}). Nothing "
                "was written."
            )
    with atomic_write(file) as handle:
        handle.write(proto.SerializeToString())
    size = file.stat().st_size / 2**20
    real = f" and {len(images)} test images of the run" if images else ""
    same = f", {changed} of which get another class" if float16 and images else ""
    said = (
        f"{printable(file)}: {size:.1f} MB; ONNX Runtime and PyTorch agree on drawn pictures{real}{same}: pixels to "
        f"{found[0]:.0f} of 255, logits to {found[1]:.1e} of the largest, probabilities to {found[2]:.1e}. To use it:"
    )
    return f"{said}\n\n{lines_of_use(file, checkpoint)}"


def _converted(network: FromPixels) -> Any:
    """Return the graph with its parts (probabilities, logits, pixels), for any number of images of any size."""
    count, height, width = (torch.export.Dim(name) for name in ("count", "height", "width"))
    example = torch.randint(0, 256, (2, 150, 160, 3), dtype=torch.uint8)
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    network.with_parts = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's remarks on itself; its graph is checked below
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["probabilities", "logits", "pixels"],
                dynamic_shapes={"images": {0: count, 1: height, 2: width}},
                verbose=False,
            )
    finally:
        network.with_parts = False
        quiet.setLevel(level)
    assert program is not None  # as with dynamo it always is
    return program.model_proto


def as_predict(checkpoint: dict[str, Any]) -> Preprocess:
    """Return the preprocessing with which `predict` runs this checkpoint on a CPU."""
    reading = {name: checkpoint[name] for name in ("mean", "std", "interpolation")}
    return Preprocess(torch.device("cpu"), checkpoint["image_size"], **reading)


def drawn_pictures(side: int) -> Iterator[np.ndarray]:
    """Yield batches uint8 (count, height, width, 3): noise in the model's size, and black and white blocks.

    At the edges of the blocks a filter overshoots; they are smaller than `side`, larger, narrow and broad.
    """
    random = np.random.default_rng(0)
    yield random.integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    for count, height, width in ((2, 2 * side // 3 + 1, side // 2 + 1), (2, 150, 160), (5, 97, 300)):
        blocks = 255 * random.integers(0, 2, (count, height // 5 + 1, width // 5 + 1, 3), dtype=np.uint8)
        yield blocks.repeat(5, 1).repeat(5, 2)[:, :height, :width]


def differences(
    session: Any, network: FromPixels, preprocess: Preprocess, images: np.ndarray
) -> tuple[float, float, float, bool]:
    """Return how far the graph is from `predict` on images uint8 (count, height, width, 3).

    The largest differences: of the resized pixels (0 to 255); of the logits for the same pixels, as a share of the
    largest logit, because the probabilities of a model that is sure of itself hide a wrong graph; of probabilities.
    The last value is True if an image gets another class.
    """
    probabilities, logits, pixels = session.run(["probabilities", "logits", "pixels"], {"images": images})
    squares = np.stack([np.asarray(decode.squared(Image.fromarray(image), network.resize)) for image in images])
    with torch.inference_mode():
        resized = preprocess.resized(torch.from_numpy(squares).permute(0, 3, 1, 2)).numpy()
        wanted = network.model(preprocess.normalized(torch.from_numpy(pixels)))
    size = max(float(wanted.abs().max()), 0.01)
    return (
        float(np.abs(pixels - resized).max()),
        float(np.abs(logits - wanted.numpy()).max()) / size,
        float(np.abs(probabilities - wanted.softmax(1).numpy()).max()),
        bool((logits.argmax(1) != wanted.argmax(1).numpy()).any()),
    )


def lines_of_use(file: Path, checkpoint: dict[str, Any]) -> str:
    """Return a program with the results of `predict` that needs neither PyTorch nor this package."""
    rules = Rules.recorded(checkpoint)
    side = checkpoint["image_size"]
    functions = (decode.deep_mode, decode.upright, decode.shown, decode.to_rgb, decode.squared, decode.resized)
    turns = ", ".join(f"{number}: Image.Transpose.{turn.name}" for number, turn in decode.UPRIGHT.items())
    program = "\n\n\n".join(
        [
            "from __future__ import annotations\n\nimport json\nfrom contextlib import suppress\n\nimport numpy as np\n"
            "import onnxruntime\nfrom PIL import Image, ImageCms\n\n"
            f"BACKGROUND = {decode.BACKGROUND}\nORIENTATION = {decode.ORIENTATION:#06x}\n"
            f"PHOTOMETRIC = {decode.PHOTOMETRIC}\nUPRIGHT = {{{turns}}}\n"
            f"WINDOWS = { ({mode: rules.window(mode) for mode in decode.TYPE_WINDOWS}) }",
            *(inspect.getsource(function).rstrip() for function in functions),
            f"session = onnxruntime.InferenceSession({str(file)!r})\n"
            'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])\n'
            "# Pillow resizes, as for the training. The graph would also take the picture in its own size, but it\n"
            "# resizes in float32, up to 2 of 255 apart, and a photograph decodes faster at a reduced size.\n"
            f'image = resized(Image.open("x.jpg"), {side}, Image.Resampling.{checkpoint["interpolation"].upper()}, '
            f"WINDOWS.__getitem__, {rules.resize!r})\n"
            'probabilities = session.run(None, {"images": np.asarray(image)[None]})[0][0]\n'
            "for place in np.argsort(-probabilities)[:3]:\n"
            '    print(f"{classes[place]}: {probabilities[place]:.1%}")',
        ]
    )
    return textwrap.indent(program, "  ")
