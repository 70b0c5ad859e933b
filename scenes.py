"""Draws one small landscape or town scene with Pillow, from a class name and a random generator.

The demo data must be a real problem that needs no download: six classes that share colours and parts.
Knows nothing of files, folders or splits: prepare.py writes what this module draws.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIZE = 150  # pixels of the finished picture, as in the Intel set
CANVAS = 192  # drawn a little larger: the last step crops, turns and shrinks it, which smooths the edges
VERSION = 1  # raised whenever the same seed would draw another picture

BILINEAR = Image.Resampling.BILINEAR
ARCH = np.sin(np.linspace(0, np.pi, 9))
Colour = Sequence[float]
Points = Sequence[tuple[float, float]]

# sky above, sky at the horizon, the light that falls on things
LIGHTS = {
    "day": ((70, 130, 205), (185, 215, 235), (1.0, 1.0, 1.0)),
    "clear": ((30, 90, 180), (130, 180, 225), (1.08, 1.04, 0.95)),
    "overcast": ((150, 158, 168), (200, 203, 206), (0.8, 0.82, 0.86)),
    "haze": ((190, 190, 190), (222, 218, 208), (0.95, 0.93, 0.9)),
    "dusk": ((70, 70, 125), (245, 150, 85), (0.85, 0.62, 0.52)),
    "dawn": ((120, 130, 180), (250, 195, 180), (0.95, 0.8, 0.78)),
    "night": ((14, 20, 46), (58, 68, 104), (0.44, 0.47, 0.6)),
}
LIGHT_ODDS = (0.3, 0.21, 0.16, 0.08, 0.11, 0.08, 0.06)


@dataclass
class Canvas:
    """A picture being drawn. Coordinates run from 0 to 1, x to the right and y downwards."""

    random: np.random.Generator

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (CANVAS, CANVAS))
        self.draw = ImageDraw.Draw(self.image)
        self.light = str(self.random.choice(list(LIGHTS), p=LIGHT_ODDS))
        top, low, ambient = (np.array(part, np.float32) for part in LIGHTS[self.light])
        self.top, self.low = (np.clip(part + self.random.normal(0, 14, 3), 0, 255).tolist() for part in (top, low))
        self.ambient = (ambient * self.random.uniform(0.85, 1.12)).tolist()
        self.haze = self.uniform(0.5, 0.95) if self.light == "haze" else self.uniform(0.1, 0.55)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random.random()

    def count(self, low: int, end: int) -> int:
        return int(self.random.integers(low, end))

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def choose(self, *options):
        return options[int(self.random.integers(len(options)))]

    def colour(self, colour: Colour, depth: float = 0.0, vary: float = 9.0) -> tuple[int, int, int]:
        """The colour under this light, lost in haze with depth (0 near, 1 at the horizon)."""
        mist, shake = depth * self.haze, self.random.normal(0, vary * self.ambient[1], 3).tolist()
        red, green, blue = (
            min(max(int((part * light + wobble) * (1 - mist) + far * mist), 0), 255)
            for part, light, wobble, far in zip(colour, self.ambient, shake, self.low, strict=True))
        return red, green, blue

    def polygon(self, points: Points, colour: Colour) -> None:
        self.draw.polygon([(x * CANVAS, y * CANVAS) for x, y in points], fill=tuple(colour))

    def line(self, points: Points, colour: Colour, width: float) -> None:
        thick = max(1, round(width * CANVAS))
        self.draw.line([(x * CANVAS, y * CANVAS) for x, y in points], fill=tuple(colour), width=thick)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        box = [(x - rx) * CANVAS, (y - ry) * CANVAS, (x + rx) * CANVAS, (y + ry) * CANVAS]
        self.draw.ellipse(box, fill=tuple(colour))

    def noise(self, columns: int, rows: int, gain: float = 1.6, lift: float = 0.0, most: int = 255) -> Image.Image:
        """Smooth grey noise with about that many cells across and down and one finer octave.

        Values spread around 128 by `gain`, are raised by `lift` and end between 0 and `most`.
        """
        cells = [(max(columns, 2), max(rows, 2)), (columns * 3 + 2, rows * 3 + 2)]
        coarse, fine = (Image.frombytes("L", size, self.random.bytes(size[0] * size[1])) for size in cells)
        half = (CANVAS // 3, CANVAS // 3)
        both = Image.blend(coarse.resize(half, BILINEAR), fine.resize(half, BILINEAR), 0.4)
        levels = (np.asarray(both, np.float32) - 128) * gain + (128 + lift)
        levels = np.minimum(np.maximum(levels, 0), most).astype(np.uint8)
        return Image.fromarray(levels).resize((CANVAS, CANVAS), BILINEAR)

    def texture(self, points: Points, dark: Colour, bright: Colour, noise: Image.Image) -> None:
        """Fills a polygon with two colours mixed by the noise."""
        mask = Image.new("L", (CANVAS, CANVAS))
        ImageDraw.Draw(mask).polygon([(x * CANVAS, y * CANVAS) for x, y in points], fill=255)
        box = mask.getbbox() or (0, 0, 1, 1)
        mask = mask.crop(box)
        for colour, cover in ((dark, mask), (bright, ImageChops.multiply(mask, noise.crop(box)))):
            self.image.paste(tuple(int(part) for part in colour), box, cover)

    def ground(self, points: Points, colour: Colour, dark: float, columns: int, rows: int) -> None:
        """Fills a polygon with a patchy colour, from its `dark` share up to itself."""
        self.texture(points, self.colour(np.array(colour) * dark), self.colour(colour), self.noise(columns, rows))


# ---------------------------------------------------------------- parts that several scenes share


def sky(canvas: Canvas, horizon: float) -> None:
    """Gradient, and by chance clouds, stars, sun or moon."""
    ramp = np.linspace(0, 1, CANVAS, dtype=np.float32)[:, None]
    ramp = np.clip(ramp / max(horizon, 0.25), 0, 1) ** canvas.uniform(0.6, 1.6)
    top, low = np.array(canvas.top), np.array(canvas.low)
    column = (top + (low - top) * ramp).astype(np.uint8)[:, None]
    canvas.image.paste(Image.fromarray(np.ascontiguousarray(column)).resize((CANVAS, CANVAS)))
    if canvas.light == "night":
        for x, y in canvas.random.random((int(canvas.uniform(0, 40)), 2)):
            canvas.ellipse(x, y * horizon, 0.003, 0.003, (200, 200, 190))
    if canvas.light in ("dusk", "dawn", "clear", "night") and canvas.chance(0.45):
        glow = (255, 225, 170) if canvas.light != "night" else (225, 228, 215)
        radius = canvas.uniform(0.02, 0.05)
        canvas.ellipse(canvas.uniform(0.1, 0.9), canvas.uniform(0.1, horizon), radius, radius, glow)
    if canvas.chance(0.6):
        mask = canvas.noise(canvas.choose(2, 3, 5), canvas.choose(3, 5, 8), 2.4, canvas.uniform(-150, 40), 215)
        white = canvas.colour((238, 238, 240), 0.3)
        canvas.image.paste(white, (0, 0, CANVAS, CANVAS), mask)


def ridge(canvas: Canvas, base: float, height: float, depth: float, rock: Colour, snow: float) -> None:
    """A mountain chain over the full width: peaks with a lit and a shaded face, snow on the upper part."""
    lit = canvas.colour(rock, depth)
    shade = canvas.colour(np.array(rock) * canvas.uniform(0.45, 0.75), depth)
    white = canvas.colour((240, 243, 248), depth * 0.8)
    grey = canvas.colour((165, 178, 205), depth * 0.8)
    if canvas.chance(0.5):
        lit, shade, white, grey = shade, lit, grey, white
    for _ in range(canvas.count(2, 6)):
        x, top = canvas.uniform(0.0, 1.0), base - height * canvas.uniform(0.6, 1.0)
        width = (base - top) * canvas.uniform(0.7, 1.5)
        left = jagged(canvas, (x, top), (x - width, base))
        right = jagged(canvas, (x, top), (x + width * canvas.uniform(0.7, 1.3), base))
        spine = jagged(canvas, (x, top), (x + width * canvas.uniform(-0.3, 0.3), base), 0.05)
        canvas.polygon([*left, *spine[::-1]], lit)
        canvas.polygon([*right, *spine[::-1]], shade)
        if snow > 0:
            cut = int(np.clip(len(left) * snow * canvas.uniform(0.6, 1.2), 2, len(left)))
            canvas.polygon([*left[:cut], *teeth(canvas, left[cut - 1], spine[cut - 1]), *spine[:cut][::-1]], white)
            canvas.polygon([*right[:cut], *teeth(canvas, right[cut - 1], spine[cut - 1]), *spine[:cut][::-1]], grey)
    if canvas.chance(0.5):
        roughen(canvas, base - height, base)


def jagged(canvas: Canvas, start: tuple, end: tuple, amount: float = 0.03) -> list[tuple[float, float]]:
    """A broken line between two points."""
    (x, y), (right, low) = start, end
    offsets = (canvas.random.normal(0, amount, 9) * ARCH).tolist()
    return [(x + (right - x) * step / 8 + offset, y + (low - y) * step / 8 + offset * 0.4)
            for step, offset in enumerate(offsets)]


def teeth(canvas: Canvas, start: tuple, end: tuple) -> list[tuple[float, float]]:
    """The ragged lower edge of a snow cap."""
    drops = canvas.random.uniform(-0.03, 0.06, 5).tolist()
    return [(start[0] + (end[0] - start[0]) * step / 6, start[1] + (end[1] - start[1]) * step / 6 + drop)
            for step, drop in enumerate(drops, 1)]


def roughen(canvas: Canvas, top: float, bottom: float) -> None:
    """Light and dark patches over a band of the picture, so that faces are not flat."""
    up, down = (int(np.clip(edge, 0, 1) * CANVAS) for edge in (top, bottom))
    if down - up < 4:
        return
    grain = canvas.noise(canvas.choose(12, 20), canvas.choose(12, 20), 0.45).crop((0, up, CANVAS, down))
    band = canvas.image.crop((0, up, CANVAS, down))
    canvas.image.paste(ImageChops.overlay(band, Image.merge("RGB", (grain, grain, grain))), (0, up))


def conifer(canvas: Canvas, x: float, foot: float, height: float, colour: Colour) -> None:
    width = height * canvas.uniform(0.2, 0.32)
    levels = 2 if height < 0.12 else 4
    for level in range(levels):
        top = foot - height + level * height * 0.75 / levels
        low = top + height * (1.15 / levels + 0.1)
        half = width * (level + 1.2) / levels
        canvas.polygon([(x, top), (x - half, min(low, foot)), (x + half, min(low, foot))], colour)


def tree(canvas: Canvas, x: float, foot: float, height: float, leaf: Colour, depth: float = 0.0) -> None:
    """A broad-leaved tree: a trunk and a crown of blobs lit from above."""
    canvas.line([(x, foot), (x, foot - height * 0.6)], canvas.colour((75, 55, 40), depth), height * 0.07)
    for shade in (0.6, 0.85, 1.1):
        fill = canvas.colour(np.array(leaf) * shade, depth)
        for _ in range(4):
            blob = height * canvas.uniform(0.1, 0.22)
            canvas.ellipse(x + canvas.uniform(-0.22, 0.22) * height,
                           foot - height * (0.45 + 0.35 * shade + canvas.uniform(-0.2, 0.1)), blob, blob * 0.9, fill)


def woods(canvas: Canvas, foot: float, height: float, count: int, depth: float, leaf: Colour) -> None:
    """A row of conifers across the picture."""
    for x in np.sort(canvas.random.uniform(-0.05, 1.05, count)).tolist():
        conifer(canvas, x, foot + canvas.uniform(-0.02, 0.03), height * canvas.uniform(0.5, 1.1),
                canvas.colour(leaf, depth))


def leaves(canvas: Canvas) -> Colour:
    """A foliage colour: mostly green, sometimes autumn or frost."""
    return canvas.choose((45, 95, 45), (70, 120, 50), (30, 75, 50), (95, 125, 55), (25, 60, 35),
                         (175, 105, 35), (160, 70, 35), (190, 150, 55), (165, 180, 185))


def water(canvas: Canvas, top: float, colour: Colour, bands: int) -> None:
    """Water from a horizon down, its waves growing towards the viewer."""
    deep = canvas.colour(np.array(colour) * canvas.uniform(0.5, 0.8))
    sheen = np.array(canvas.colour(colour)) * 0.55 + np.array(canvas.low) * 0.45
    steps = np.linspace(0, 1, bands + 1) ** canvas.uniform(1.4, 2.2)
    rows = np.interp(np.linspace(0, 1, CANVAS), steps, np.arange(bands + 1)).astype(int)
    cells = canvas.random.integers(0, 256, (bands + 1, canvas.choose(5, 8, 12)), np.uint8)
    waves = Image.fromarray(cells[rows]).resize((CANVAS, CANVAS), BILINEAR)
    height = max(int((1 - top) * CANVAS), 2)
    stretched = Image.new("L", (CANVAS, CANVAS))
    stretched.paste(waves.resize((CANVAS, height), BILINEAR), (0, CANVAS - height))
    canvas.texture([(0, top), (1, top), (1, 1), (0, 1)], deep, sheen, stretched)


def facade(canvas: Canvas, corners: Points, wall: Colour, columns: int, rows: int, depth: float = 0.0) -> None:
    """A wall seen as a quadrilateral (top left, top right, bottom right, bottom left) with its windows."""
    canvas.polygon(corners, canvas.colour(wall, depth))
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = corners

    def at(u: float, v: float) -> tuple[float, float]:
        top, low = (ax + (bx - ax) * u, ay + (by - ay) * u), (dx + (cx - dx) * u, dy + (cy - dy) * u)
        return top[0] + (low[0] - top[0]) * v, top[1] + (low[1] - top[1]) * v

    wide, tall = canvas.uniform(0.4, 0.8), canvas.uniform(0.4, 0.75)
    glass = canvas.choose((60, 75, 95), (40, 45, 55), (120, 150, 180), (190, 205, 215))
    lamps = 0.5 if canvas.light == "night" else 0.25 if canvas.light == "dusk" else 0.02
    panes = [canvas.colour(glass, depth, 16) for _ in range(3)]
    lit = canvas.random.random((columns, rows)) < lamps
    for column in range(columns):
        for row in range(rows):
            u, v = (column + 0.5) / columns, (row + 0.5) / rows
            half_u, half_v = wide / 2 / columns, tall / 2 / rows
            fill = (250, 215, 140) if lit[column, row] else panes[(column * 7 + row * 5) % 3]
            canvas.polygon([at(u - half_u, v - half_v), at(u + half_u, v - half_v),
                            at(u + half_u, v + half_v), at(u - half_u, v + half_v)], fill)


def front(x: float, top: float, width: float, foot: float) -> Points:
    """The corners of a wall that stands square to the viewer."""
    return [(x, top), (x + width, top), (x + width, foot), (x, foot)]


def walls(canvas: Canvas) -> Colour:
    return canvas.choose((165, 150, 130), (150, 80, 60), (120, 125, 135), (205, 195, 175), (95, 105, 125),
                         (180, 165, 120), (215, 210, 205), (110, 90, 80), (140, 165, 185), (190, 130, 100))


def car(canvas: Canvas, x: float, y: float, width: float) -> None:
    """A car from behind or from the front, its wheels at y."""
    body = canvas.colour(canvas.choose((170, 30, 30), (30, 60, 140), (225, 225, 225), (35, 35, 40), (200, 170, 40)))
    tall = width * 0.62
    canvas.polygon([(x - width * 0.34, y - tall), (x + width * 0.34, y - tall),
                    (x + width * 0.42, y - tall * 0.5), (x - width * 0.42, y - tall * 0.5)], (45, 55, 70))
    canvas.polygon(front(x - width / 2, y - tall * 0.58, width, y - tall * 0.12), body)
    for side in (-0.36, 0.36):
        canvas.ellipse(x + side * width, y - tall * 0.1, width * 0.1, tall * 0.14, (20, 20, 22))
        lamp = (255, 235, 180) if canvas.light in ("night", "dusk") else (200, 60, 50)
        canvas.ellipse(x + side * width, y - tall * 0.42, width * 0.06, width * 0.05, lamp)


def person(canvas: Canvas, x: float, y: float, height: float) -> None:
    cloth = canvas.colour(canvas.choose((40, 40, 50), (150, 50, 45), (60, 80, 130), (200, 190, 170)))
    canvas.line([(x, y), (x, y - height * 0.8)], cloth, height * 0.26)
    canvas.ellipse(x, y - height * 0.9, height * 0.1, height * 0.11, canvas.colour((190, 150, 125)))


def boat(canvas: Canvas, x: float, y: float, width: float) -> None:
    hull = canvas.colour(canvas.choose((235, 235, 235), (60, 50, 45), (170, 60, 50)))
    canvas.polygon([(x - width / 2, y - width * 0.16), (x + width / 2, y - width * 0.16),
                    (x + width * 0.35, y), (x - width * 0.35, y)], hull)
    if canvas.chance(0.7):
        canvas.polygon([(x, y - width * 1.1), (x, y - width * 0.2), (x + width * 0.45, y - width * 0.2)],
                       canvas.colour((240, 238, 228)))


# ---------------------------------------------------------------------------------- the six scenes


def buildings(canvas: Canvas) -> None:
    """A skyline, one block close by, towers seen from below, or a house: walls and windows, no road."""
    view = canvas.choose("skyline", "block", "below", "house", "pair")
    ground = canvas.uniform(0.78, 1.05)
    sky(canvas, ground)
    if canvas.chance(0.15):
        ridge(canvas, ground, 0.35, 1.0, (110, 115, 120), 0.2)
    if view == "skyline":
        for depth in (0.8, 0.45, 0.1):
            for _ in range(4):
                x, wide = canvas.uniform(-0.1, 1), canvas.uniform(0.12, 0.3)
                top = ground - canvas.uniform(0.2, 0.75) * (1.1 - depth * 0.4)
                facade(canvas, front(x, top, wide, ground), walls(canvas),
                       canvas.count(2, 6), canvas.count(4, 9), depth)
    elif view == "below":
        x, y = canvas.uniform(0.3, 0.7), canvas.uniform(-0.7, -0.2)
        for side in (-1, 1):
            near, far = x + side * canvas.uniform(0.35, 0.8), x + side * canvas.uniform(0.08, 0.2)
            facade(canvas, [(far, y + canvas.uniform(0.3, 0.7)), (far + side * 0.25, y + 0.2), (near + side * 0.6, 1.1),
                            (near - side * 0.3, 1.1)], walls(canvas), 5, 10)
    elif view == "house":
        x, wide, top = canvas.uniform(0.05, 0.35), canvas.uniform(0.4, 0.6), canvas.uniform(0.35, 0.55)
        roof = canvas.colour(canvas.choose((130, 60, 45), (75, 75, 85), (100, 80, 60)))
        rise = canvas.uniform(0.1, 0.3)
        gable = (x + wide * canvas.uniform(0.3, 0.7), top - rise)
        canvas.polygon([(x - 0.05, top), gable, (x + wide + 0.05, top)], roof)
        facade(canvas, front(x, top, wide, ground), walls(canvas),
               canvas.count(3, 6), canvas.count(2, 4))
    else:
        edge, lean = canvas.uniform(0.25, 0.75), canvas.uniform(-0.2, 0.2)
        top, wall = canvas.uniform(-0.3, 0.35), walls(canvas)
        rows = canvas.count(4, 10)
        left, right = (canvas.uniform(-0.3, 0.1), canvas.uniform(0.9, 1.3))
        facade(canvas, [(left, top + lean), (edge, top), (edge, ground), (left, ground - lean * 0.4)], wall,
               canvas.count(3, 7), rows)
        if view == "pair" and canvas.chance(0.5):
            wall = walls(canvas)
        facade(canvas, [(edge, top), (right, top + abs(lean)), (right, ground), (edge, ground)],
               np.array(wall) * 0.7, canvas.count(3, 7), rows)
    floor = canvas.choose((120, 120, 118), (95, 120, 70), (150, 140, 125), (90, 110, 130))
    canvas.ground([(-0.1, ground), (1.1, ground), (1.1, 1.1), (-0.1, 1.1)], floor, 0.8, 8, 12)
    for _ in range(canvas.count(0, 3)):
        tree(canvas, canvas.uniform(0, 1), ground + 0.04, canvas.uniform(0.15, 0.35), leaves(canvas))


def forest(canvas: Canvas) -> None:
    """Trunks from within, rows of conifers on a slope, or a wall of broad-leaved crowns."""
    view, leaf = canvas.choose("trunks", "conifers", "crowns"), leaves(canvas)
    horizon = canvas.uniform(0.0, 0.42)
    sky(canvas, horizon)
    if view == "trunks":
        back = canvas.colour(np.array(leaf) * 1.3, 0.7), canvas.colour(np.array(leaf) * 0.5, 0.2)
        canvas.texture([(0, 0), (1, 0), (1, 1), (0, 1)], back[1], back[0], canvas.noise(7, 7))
        floor = canvas.uniform(0.65, 0.9)
        soil = canvas.choose((90, 70, 45), (70, 95, 45), (150, 95, 45), (205, 210, 215))
        canvas.ground([(0, floor), (1, floor - 0.05), (1, 1), (0, 1)], soil, 0.6, 9, 14)
        bark = canvas.choose((70, 55, 42), (45, 40, 36), (110, 95, 80), (190, 185, 178))
        for depth in (0.8, 0.4, 0.0):
            for _ in range(canvas.count(3, 7)):
                x, width = canvas.uniform(0, 1), canvas.uniform(0.01, 0.035) * (2.4 - 2 * depth)
                foot = floor + (1 - depth) * canvas.uniform(0.02, 0.25)
                canvas.line([(x, foot), (x + canvas.uniform(-0.06, 0.06), -0.1)], canvas.colour(bark, depth), width)
        for _ in range(canvas.count(6, 22)):
            size = canvas.uniform(0.02, 0.08)
            canvas.ellipse(canvas.uniform(0, 1), canvas.uniform(0, 0.4), size * 1.6, size, canvas.colour(leaf, 0.2, 18))
        return
    if canvas.chance(0.3):
        ridge(canvas, horizon + 0.2, 0.3, 0.9, (110, 110, 115), canvas.uniform(0, 0.4))
    rows = canvas.count(4, 7)
    canvas.polygon([(0, horizon + 0.08), (1, horizon + 0.08), (1, 1), (0, 1)],
                   canvas.colour(np.array(leaf) * 0.5, 0.3))
    for row in range(rows):
        depth, foot = 1 - row / (rows - 1), horizon + 0.12 + (1.0 - horizon) * (row / (rows - 1)) ** 1.4
        height = canvas.uniform(0.16, 0.22) * (1 + row * 0.45)
        if view == "conifers":
            woods(canvas, foot, height, 26 - row * 3, depth, np.array(leaf) * canvas.uniform(0.6, 1.1))
        else:
            for x in canvas.random.uniform(0, 1, 9 - row).tolist():
                tree(canvas, x, foot, height * 1.1, leaf if canvas.chance(0.7) else leaves(canvas), depth * 0.7)


def mountain(canvas: Canvas) -> None:
    """Ridges behind each other over a meadow, a lake, scree or woods."""
    base = canvas.uniform(0.62, 0.9)
    sky(canvas, base)
    rock = canvas.choose((120, 110, 100), (95, 95, 105), (140, 115, 90), (85, 100, 75), (150, 135, 125), (110, 80, 65))
    snow = canvas.uniform(0.2, 0.75) if canvas.chance(0.6) else 0.0
    for depth in (1.0, 0.6, 0.25)[canvas.count(0, 2):]:
        height = canvas.uniform(0.45, 0.8) * (1 - 0.3 * (1 - depth))
        ridge(canvas, base, height, depth, rock, snow * (0.5 + depth / 2))
    foot = canvas.choose("meadow", "lake", "scree", "woods", "snow")
    if foot == "lake":
        water(canvas, base, canvas.choose((60, 95, 120), (50, 110, 110), (90, 110, 130)), 18)
    else:
        ground = {"meadow": (105, 130, 65), "scree": rock, "woods": (60, 85, 50), "snow": (225, 230, 238)}[foot]
        edge = [(x, base + canvas.uniform(-0.05, 0.03)) for x in (0, 0.25, 0.5, 0.75, 1)]
        canvas.ground([*edge, (1, 1.1), (0, 1.1)], ground, 0.75, 8, 14)
    if foot == "woods" or canvas.chance(0.25):
        woods(canvas, min(base + canvas.uniform(0, 0.15), 1.0), canvas.uniform(0.06, 0.2), 22, 0.2, leaves(canvas))


def glacier(canvas: Canvas) -> None:
    """An ice tongue between ridges, an ice front over water, floating bergs, or a broken ice field."""
    view = canvas.choose("tongue", "front", "bergs", "field", "tongue")
    base = canvas.uniform(0.3, 0.55)
    sky(canvas, base)
    rock = canvas.choose((110, 105, 100), (90, 90, 100), (130, 110, 95))
    if view != "bergs" or canvas.chance(0.6):
        ridge(canvas, base + 0.05, canvas.uniform(0.2, 0.5), 0.7, rock, canvas.uniform(0.0, 0.8))
    ice = canvas.choose((225, 235, 242), (205, 225, 238), (235, 235, 235), (190, 215, 230))
    blue = canvas.choose((120, 175, 212), (95, 160, 205), (150, 185, 208), (130, 158, 178))
    if view == "tongue":
        flank = [(-0.1, base - 0.1), (1.1, base - 0.1), (1.1, 1.1), (-0.1, 1.1)]
        canvas.ground(flank, rock, 0.6, 10, 10)
        ice_tongue(canvas, base - 0.12, ice, blue, rock)
    elif view == "field":
        edge = [(x, base + canvas.uniform(-0.06, 0.04)) for x in (-0.1, 0.3, 0.6, 1.1)]
        field = [*edge, (1.1, 1.1), (-0.1, 1.1)]
        canvas.texture(field, canvas.colour(blue), canvas.colour(ice), canvas.noise(6, 12, 1.3))
        crevasses(canvas, base, 40, blue)
    else:
        sea_level = canvas.uniform(0.6, 0.88) if view == "front" else base + canvas.uniform(0, 0.1)
        if view == "front":
            ice_front(canvas, base, sea_level, ice, blue)
        water(canvas, sea_level, canvas.choose((60, 100, 125), (80, 125, 140), (50, 75, 95), (120, 140, 150)), 20)
        for _ in range(canvas.count(5, 12) if view == "bergs" else canvas.count(0, 6)):
            y = canvas.uniform(sea_level + 0.02, 1.0)
            size = (y - sea_level + 0.08) * canvas.uniform(0.3, 0.75 if view == "bergs" else 0.4)
            berg(canvas, canvas.uniform(0, 1), y, size, ice, blue)


def ice_tongue(canvas: Canvas, top: float, ice: Colour, blue: Colour, rock: Colour) -> None:
    """A river of ice that widens and winds towards the viewer, with crevasses and moraines."""
    t = np.linspace(0, 1, 12)
    start, end, bend = canvas.uniform(0.3, 0.7), canvas.uniform(0.2, 0.8), canvas.uniform(-0.25, 0.25)
    centre = start + (end - start) * t + bend * np.sin(np.pi * t)
    half = canvas.uniform(0.05, 0.12) + canvas.uniform(0.2, 0.55) * t**1.3
    y = top + (1.1 - top) * t
    side = [list(zip((centre + sign * half).tolist(), y.tolist(), strict=True)) for sign in (-1, 1)]
    canvas.texture([*side[0], *side[1][::-1]], canvas.colour(blue), canvas.colour(ice), canvas.noise(8, 12, 1.3))
    crack = canvas.colour(np.array(blue) * 0.75)
    for step in canvas.random.uniform(0.05, 1, 16).tolist():
        x, down, width = (np.interp(step, t, values) for values in (centre, y, half))
        a, b = np.sort(canvas.random.uniform(-0.9, 0.9, 2))
        canvas.line([(x + a * width, down), (x + (a + b) / 2 * width, down + 0.03), (x + b * width, down)], crack,
                    0.004 + 0.012 * step)
    for offset in canvas.random.uniform(-0.7, 0.7, canvas.count(0, 3)).tolist():
        canvas.line(list(zip((centre + offset * half).tolist(), y.tolist(), strict=True)),
                    canvas.colour(np.array(rock) * 0.7), canvas.uniform(0.008, 0.03))


def ice_front(canvas: Canvas, top: float, bottom: float, ice: Colour, blue: Colour) -> None:
    """The broken wall where a glacier ends: columns of ice with blue cracks between them."""
    x = -0.05
    while x < 1.05:
        width, rise = canvas.uniform(0.03, 0.12), top + canvas.uniform(-0.05, 0.1)
        mix = canvas.uniform(0, 0.8)
        fill = canvas.colour(np.array(ice) * (1 - mix) + np.array(blue) * mix)
        canvas.polygon([(x, rise), (x + width * 0.6, rise - canvas.uniform(0, 0.05)), (x + width, rise + 0.02),
                        (x + width, bottom), (x, bottom)], fill)
        canvas.line(jagged(canvas, (x, rise), (x + canvas.uniform(-0.02, 0.02), bottom), 0.01),
                    canvas.colour(np.array(blue) * 0.7), canvas.uniform(0.004, 0.016))
        x += width


def crevasses(canvas: Canvas, top: float, count: int, blue: Colour) -> None:
    """Dark blue cracks across an ice field, wider and further apart near the viewer."""
    slope = canvas.uniform(-0.15, 0.15)
    for step in np.sort(canvas.random.random(count) ** 0.8).tolist():
        x, y, length = canvas.uniform(-0.1, 1), top + (1.05 - top) * step, canvas.uniform(0.1, 0.5) * (0.3 + step)
        width = 0.006 + 0.03 * step * canvas.uniform(0.3, 1)
        canvas.polygon([(x, y), (x + length / 2, y - width + slope * length / 2), (x + length, y + slope * length),
                        (x + length / 2, y + width + slope * length / 2)], canvas.colour(np.array(blue) * 0.5))


def berg(canvas: Canvas, x: float, y: float, size: float, ice: Colour, blue: Colour) -> None:
    """A floating block with a lit and a shaded side."""
    peak = x + canvas.uniform(-0.4, 0.4) * size
    tall = size * canvas.uniform(0.3, 0.9)
    left, right = (x - size, y), (x + size, y)
    middle = (peak + canvas.uniform(-0.2, 0.4) * size, y)
    canvas.polygon([left, (x - size * 0.6, y - tall * 0.6), (peak, y - tall), middle], canvas.colour(ice))
    canvas.polygon([middle, (peak, y - tall), (x + size * 0.7, y - tall * canvas.uniform(0.3, 0.7)), right],
                   canvas.colour(np.array(blue) * 1.05))


def sea(canvas: Canvas) -> None:
    """Open water with a level horizon, sometimes with a beach, surf, a headland or boats."""
    horizon = canvas.uniform(0.15, 0.7)
    sky(canvas, horizon)
    if canvas.chance(0.12):
        ridge(canvas, horizon, canvas.uniform(0.05, 0.22), 0.9, (100, 110, 110), canvas.uniform(0, 0.5))
    colour = canvas.choose((40, 95, 140), (45, 125, 140), (85, 110, 125), (30, 70, 110), (90, 150, 165),
                           (120, 130, 135))
    water(canvas, horizon, colour, canvas.count(14, 40))
    foam = canvas.colour((240, 244, 246))
    for step in canvas.random.random(canvas.count(0, 14)).tolist():
        y, length = horizon + (1 - horizon) * (0.1 + 0.9 * step), canvas.uniform(0.05, 0.35) * (0.3 + step)
        x = canvas.uniform(-0.1, 1)
        canvas.line(jagged(canvas, (x, y), (x + length, y), 0.012), foam, 0.004 + 0.012 * step)
    if canvas.light in ("dusk", "dawn") or canvas.chance(0.15):
        x = canvas.uniform(0.2, 0.8)
        for y in np.linspace(horizon + 0.01, 1, 18).tolist():
            half = canvas.uniform(0.02, 0.1) * (0.4 + y - horizon)
            canvas.line([(x - half, y), (x + half, y)], (250, 205, 140), 0.008)
    if canvas.chance(0.25):
        headland(canvas, horizon)
    for _ in range(canvas.count(0, 3)):
        y = horizon + canvas.uniform(0.02, 0.3) * (1 - horizon)
        boat(canvas, canvas.uniform(0.05, 0.95), y, canvas.uniform(0.04, 0.08) + 0.3 * (y - horizon))
    if canvas.chance(0.45):
        beach(canvas, horizon, foam)


def headland(canvas: Canvas, horizon: float) -> None:
    """A cliff that runs into the picture from one side."""
    side, reach = canvas.choose(0, 1), canvas.uniform(0.15, 0.45)
    rise, foot = canvas.uniform(0.05, 0.3), horizon + canvas.uniform(0.02, 0.15)
    line = [(0.0, horizon - rise), (reach * 0.5, horizon - rise * 0.9), (reach * 0.8, horizon - rise * 0.3),
            (reach, foot), (0.0, foot + 0.05)]
    rock = canvas.choose((110, 95, 80), (80, 85, 80), (90, 110, 70))
    canvas.ground([(abs(side - x), y + canvas.uniform(-0.02, 0.02)) for x, y in line], rock, 0.6, 14, 12)


def beach(canvas: Canvas, horizon: float, foam: Colour) -> None:
    """Sand or shingle in the foreground with the surf line, and people on it by chance."""
    sand = canvas.choose((210, 185, 145), (190, 170, 140), (130, 125, 120), (225, 210, 180))
    left, right = (canvas.uniform(max(horizon + 0.2, 0.6), 1.0) for _ in range(2))
    edge = jagged(canvas, (-0.1, left), (1.1, right), 0.02)
    canvas.line([(x, y - 0.015) for x, y in edge], foam, canvas.uniform(0.02, 0.05))
    canvas.ground([*edge, (1.1, 1.1), (-0.1, 1.1)], sand, 0.85, 10, 16)
    for _ in range(canvas.count(0, 4)):
        person(canvas, canvas.uniform(0.05, 0.95), canvas.uniform(max(left, right), 1.05), canvas.uniform(0.06, 0.16))


def street(canvas: Canvas) -> None:
    """A road that runs away between two rows of houses, with traffic, lamps and people."""
    x, y = canvas.uniform(0.25, 0.75), canvas.uniform(0.35, 0.62)
    sky(canvas, y)
    if canvas.chance(0.2):
        ridge(canvas, y, 0.2, 1.0, (105, 110, 115), canvas.uniform(0, 0.4))
    canvas.polygon([(-0.1, y), (1.1, y), (1.1, 1.1), (-0.1, 1.1)], canvas.colour((140, 132, 122)))
    if canvas.chance(0.5):
        wide, top = canvas.uniform(0.1, 0.2), y - canvas.uniform(0.08, 0.25)
        facade(canvas, front(x - wide, top, 2 * wide, y + 0.02), walls(canvas), 4, 4, 0.8)
    left, right = x - canvas.uniform(0.5, 1.0), x + canvas.uniform(0.5, 1.0)  # kerbs at the lower edge
    asphalt = canvas.choose((75, 75, 80), (100, 98, 95), (130, 120, 110), (60, 62, 70))
    canvas.ground([(x - 0.02, y), (x + 0.02, y), (right, 1.15), (left, 1.15)], asphalt, 0.85, 12, 16)
    for side, kerb in ((-1, left), (1, right)):
        house_row(canvas, x, y, side, abs(kerb - x) * canvas.uniform(1.0, 1.3))
    if canvas.chance(0.65):
        for step in (0.12, 0.25, 0.42, 0.65, 0.95):
            half = 0.02 * step
            canvas.polygon([(x + (0.5 * (left + right) - x) * s + w, y + (1.15 - y) * s)
                            for s, w in ((step, -half), (step, half), (step * 1.18, half), (step * 1.18, -half))],
                           canvas.colour((225, 222, 205)))
    for step in np.sort(canvas.random.uniform(0.12, 0.8, canvas.count(0, 5))).tolist():
        lane = canvas.uniform(left * 0.75 + x * 0.25, right * 0.75 + x * 0.25)
        car(canvas, x + (lane - x) * step, y + (1.1 - y) * step, 0.5 * step * canvas.uniform(0.7, 1.1))
    for step in np.sort(canvas.random.uniform(0.15, 0.9, canvas.count(0, 5))).tolist():
        kerb = canvas.choose(left, right)
        person(canvas, x + (kerb - x) * step, y + (1.1 - y) * step, 0.4 * step)
    if canvas.chance(0.5):
        for step in (0.2, 0.38, 0.7):
            post = x + (canvas.choose(left, right) - x) * step
            foot = y + (1.1 - y) * step
            canvas.line([(post, foot), (post, foot - step * 0.8)], canvas.colour((50, 50, 52)), 0.02 * step + 0.003)
            glow = (255, 225, 150) if canvas.light in ("night", "dusk") else canvas.colour((190, 190, 180))
            canvas.ellipse(post, foot - step * 0.8, 0.03 * step + 0.006, 0.02 * step + 0.006, glow)


def house_row(canvas: Canvas, x: float, y: float, side: int, reach: float) -> None:
    """Fronts along one side of a street, drawn from the far end to the near one."""
    cuts = np.array([0.08, *np.sort(canvas.random.uniform(0.12, 0.9, canvas.count(1, 4))), 1.4])
    for far, near in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        if canvas.chance(0.12):
            tree(canvas, x + side * reach * near, y + (1.1 - y) * near, 0.7 * near, leaves(canvas), 0.3)
            continue
        tall, wall, depth = canvas.uniform(0.35, 1.2), walls(canvas), 0.6 * (1 - near)
        corners = [(x + side * reach * step, y - tall * step) for step in (far, near)]
        corners += [(x + side * reach * step, y + (1.1 - y) * step) for step in (near, far)]
        facade(canvas, corners, np.array(wall) * (0.75 if side < 0 else 1), canvas.count(2, 5),
               canvas.count(2, 6), depth)
        if canvas.chance(0.4):  # the awning of a shop
            canvas.polygon([(x + side * reach * far, y + 0.25 * far), (x + side * reach * near, y + 0.25 * near),
                            (x + side * reach * near * 0.85, y + 0.4 * near),
                            (x + side * reach * far * 0.85, y + 0.4 * far)], canvas.colour(walls(canvas)))


SCENES = {"buildings": buildings, "forest": forest, "glacier": glacier,
          "mountain": mountain, "sea": sea, "street": street}
CLASSES = tuple(SCENES)


def occlude(canvas: Canvas) -> None:
    """Something close to the camera that belongs to no class: twigs, a pole, a dark corner, a passer-by."""
    kind = canvas.choose("twigs", "pole", "corner", "person")
    if kind == "twigs":
        x, y, leaf = canvas.choose(0.0, 1.0), canvas.uniform(0, 0.5), leaves(canvas)
        for _ in range(12):
            size = canvas.uniform(0.012, 0.04)
            canvas.ellipse(abs(x - canvas.uniform(0, 0.35)), y + canvas.uniform(-0.15, 0.15), size * 1.5, size,
                           canvas.colour(np.array(leaf) * 0.7, 0, 14))
    elif kind == "pole":
        x, lean = canvas.uniform(0.05, 0.95), canvas.uniform(-0.04, 0.04)
        canvas.line([(x, -0.1), (x + lean, 1.1)], canvas.colour((60, 58, 55)), canvas.uniform(0.008, 0.025))
    elif kind == "corner":
        x, y = canvas.choose(-0.1, 1.1), canvas.choose(-0.1, 1.1)
        inner = abs(x - canvas.uniform(0.2, 0.5)), abs(y - canvas.uniform(0.2, 0.5))
        canvas.polygon([(x, y), (inner[0], y), (x, inner[1])], canvas.colour((45, 45, 40)))
    else:
        person(canvas, canvas.uniform(0.1, 0.9), canvas.uniform(0.9, 1.1), canvas.uniform(0.15, 0.4))


def view(canvas: Canvas) -> Image.Image:
    """Crops, mirrors and by chance tilts the drawing to SIZE x SIZE."""
    side, tilted = canvas.uniform(0.8, 0.97) * CANVAS, canvas.chance(0.5)
    if not tilted:
        left, up = canvas.uniform(0, CANVAS - side), canvas.uniform(0, CANVAS - side)
        box = (left, up, left + side, up + side)
        image = canvas.image.resize((SIZE, SIZE), BILINEAR, box)
    else:
        side *= 0.93  # the turned frame stays inside the drawing
        angle, zoom, half = np.radians(canvas.uniform(-6, 6)), side / SIZE, SIZE / 2
        cosine, sine, spare = float(np.cos(angle) * zoom), float(np.sin(angle) * zoom), (CANVAS - side) * 0.15
        x, y = (CANVAS / 2 + canvas.uniform(-spare, spare) for _ in range(2))
        matrix = (cosine, -sine, x - (cosine - sine) * half, sine, cosine, y - (sine + cosine) * half)
        image = canvas.image.transform((SIZE, SIZE), Image.Transform.AFFINE, matrix, BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if canvas.chance(0.5) else image


def develop(canvas: Canvas, image: Image.Image) -> Image.Image:
    """The camera: blur, colour cast, contrast, vignette and grain."""
    random = canvas.random
    if canvas.chance(0.35):
        image = image.filter(ImageFilter.BoxBlur(canvas.uniform(0.2, 1.2)))
    if canvas.chance(0.08):  # faded or black-and-white
        image = Image.blend(image, image.convert("L").convert("RGB"), canvas.choose(0.4, 0.8, 1.0))
    contrast, lift = canvas.uniform(0.85, 1.25), canvas.uniform(-10, 18)
    gain = canvas.uniform(0.8, 1.2) * random.normal(1, 0.06, 3)
    levels = ((np.arange(256) - 110) * contrast + 110) * gain[:, None] + lift
    image = image.point(np.clip(levels, 0, 255).astype(np.uint8).ravel().tolist())
    # Uniform bytes are the cheapest grain; their standard deviation is 74 levels.
    grain = np.frombuffer(random.bytes(SIZE * SIZE), np.uint8).reshape(SIZE, SIZE).astype(np.float32) - 127.5
    radius = np.linspace(-1, 1, SIZE, dtype=np.float32) ** 2
    change = 128 + grain * canvas.uniform(0, 0.08) - canvas.uniform(0, 22) * (radius[:, None] + radius)
    layer = Image.fromarray(change.astype(np.uint8))
    return ImageChops.add(image, Image.merge("RGB", (layer, layer, layer)), 1, -128)


def draw_scene(name: str, random: np.random.Generator) -> Image.Image:
    """Draws one picture of the class.

    Args:
        name: one of CLASSES.
        random: the only source of variation; the same state gives the same picture.

    Returns:
        An RGB image of SIZE x SIZE pixels.
    """
    canvas = Canvas(random)
    SCENES[name](canvas)
    if canvas.chance(0.15):
        occlude(canvas)
    return develop(canvas, view(canvas))
