"""The built-in demo data set: drawn scenes of six classes, in the layout of the Intel archive."""

import json
from pathlib import Path

import numpy as np

from images.placing import building, explained, finish_interrupted, one_writer, refuse_existing
from images.scenes import CLASSES, VERSION, draw_scene
from utils import progress


def draw_demo(root: Path, *, train_images: int = 1200, test_images: int = 300, seed: int = 0) -> None:
    """Draws six balanced classes of scenes in the Intel layout below `root`.

    Every picture depends on (seed, split, class, index) alone. Returns at once where `root` holds these scenes
    already; an interrupted drawing starts anew. Raises UserError where `root` holds other data or cannot be written,
    RunError where the disk is full.
    """
    settings = {"scenes": VERSION, "seed": seed, "train_images": train_images, "test_images": test_images}
    root = Path(root)
    manifest = json.dumps(settings, indent=1).encode() + b"\n"
    drawn = root / "demo.json"
    with explained(root), one_writer(root):
        finish_interrupted(root)
        if drawn.exists() and drawn.read_bytes() == manifest and (root / "seg_train").exists():
            return
        refuse_existing(root, {"demo.json"})
        bar = progress(total=train_images + test_images, desc="drawing", unit="image")
        with building(root, "demo scenes") as stage, bar:
            for split, (folder, count) in enumerate((("seg_train", train_images), ("seg_test", test_images))):
                for name in CLASSES:
                    (stage / folder / folder / name).mkdir(parents=True)
                for number in range(count):
                    index, label = divmod(number, len(CLASSES))
                    image = draw_scene(CLASSES[label], np.random.default_rng([seed, split, label, index]))
                    image.save(stage / folder / folder / CLASSES[label] / f"{index:05d}.jpg", "JPEG", quality=90)
                    bar.update()
            (stage / "demo.json").write_bytes(manifest)
