"""Draw assets/demo_scenes.png: the first ten test scenes of each class of the demo data.

python docs/demo_scenes.py
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from images.scenes import CLASSES, draw_scene  # noqa: E402

SIDE = 100
STEP = 103
LEFT = 90
COUNT = 10  # pixels of a scene, from one to the next, for the names; scenes in a row

sheet = Image.new("RGB", (LEFT + COUNT * STEP, len(CLASSES) * STEP), "white")
pen = ImageDraw.Draw(sheet)
font = ImageFont.load_default(15)
for label, name in enumerate(CLASSES):
    pen.text((LEFT - 10, label * STEP + SIDE / 2), name, "#222222", font, anchor="rm")
    for index in range(COUNT):
        # seed, test, class, index, as in images/demo.py
        scene = draw_scene(name, np.random.default_rng([0, 1, label, index]))
        sheet.paste(scene.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (LEFT + index * STEP, label * STEP))
sheet.quantize(256).save(ROOT / "assets" / "demo_scenes.png", optimize=True)
