"""Draw one small landscape or town scene, from a class name and a random generator.

The demo data must be a real problem that needs no download: six classes that share light, colours and parts. Knows
nothing of files, folders or splits: images/demo.py writes the pictures.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

CLASSES = ("buildings", "forest", "glacier", "mountain", "sea", "street")
SIZE = 150  # pixels of a side unless asked otherwise, as in the Intel set
VERSION = 3  # increased whenever the same seed would draw another picture

BILINEAR = Image.Resampling.BILINEAR
LIGHTS = (  # sky above, sky at the horizon, the light that falls on things; the first ones are drawn most often
    ((70, 130, 205), (190, 218, 236), (1.0, 1.0, 1.0)),  # day
    ((30, 92, 182), (140, 188, 228), (1.08, 1.03, 0.94)),  # clear
    ((148, 156, 168), (204, 206, 208), (0.8, 0.82, 0.86)),  # overcast
    ((122, 134, 184), (250, 200, 182), (0.95, 0.82, 0.8)),  # dawn
    ((72, 70, 128), (246, 154, 88), (0.84, 0.62, 0.54)),  # dusk
    ((14, 20, 48), (60, 72, 112), (0.44, 0.48, 0.62)),  # night
)
ROCKS = ((122, 112, 104), (96, 96, 106), (142, 118, 94), (88, 98, 82), (152, 136, 126), (100, 75, 60))
LEAVES = ((45, 95, 45), (70, 120, 50), (30, 75, 50), (95, 125, 55), (25, 60, 35), (185, 110, 35), (165, 75, 40))
WALLS = (
    (165, 150, 130),
    (155, 82, 62),
    (120, 125, 135),
    (208, 198, 178),
    (95, 105, 125),
    (188, 168, 120),
    (216, 212, 206),
    (112, 92, 82),
    (140, 165, 185),
    (196, 134, 104),
)
GLASS = ((60, 75, 95), (40, 45, 55), (125, 155, 185), (190, 205, 215))
WATERS = ((40, 95, 140), (45, 125, 140), (85, 110, 125), (30, 70, 110), (90, 150, 165), (120, 130, 135))
FLOORS = ((75, 75, 80), (120, 120, 118), (150, 140, 125), (105, 130, 65), (214, 188, 148))  # the last two: grass, sand
SNOW = (242, 245, 250)
SHADOW = (140, 170, 208)
LAMP = (250, 215, 140)


@cache
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a column [size, 1] and a row [1, size] from 0 to 1."""
    column, row = (part.astype(np.float32) / size for part in np.ogrid[:size, :size])
    return column, row


class Scene:
    """Draw a picture. Coordinates run from 0 to 1, x to the right and y downwards."""

    def __init__(self, random: np.random.Generator, size: int):
        self.size = size
        self.y, self.x = grid(size)
        self.random = random.random
        self.uniform = random.uniform
        self.count: Callable[..., Any] = random.integers
        self.image = Image.new("RGB", (self.size, self.size))
        self.pen = ImageDraw.Draw(self.image)
        top, low, light = LIGHTS[min(self.count(len(LIGHTS), size=2))]
        self.top, self.low = (np.clip(part + random.normal(0, 12, 3), 0, 255).tolist() for part in (top, low))
        self.light = (np.array(light) * self.uniform(0.85, 1.12)).tolist()
        self.haze = self.uniform(0.15, 0.8)
        self.lamps = self.light[1] < 0.7

    def choose(self, options: tuple) -> tuple:
        return options[self.count(len(options))]

    def colour(self, colour: tuple, depth: float = 0.0, shade: float = 1.0) -> tuple[int, ...]:
        """Return the colour under this light, slightly varied, fading into haze with depth (0 near, 1 at the
        horizon)."""
        mist = depth * self.haze
        shift = 24 * self.random() - 12
        return tuple(
            min(max(int((part * shade * light + shift) * (1 - mist) + far * mist), 0), 255)
            for part, light, far in zip(colour, self.light, self.low, strict=True)
        )

    def below(self, line: np.ndarray | float) -> np.ndarray:
        """Return the mask [size, size] of the area under a line [size] or a height, with a smooth edge."""
        return np.clip((self.y + 0 * self.x - line) * self.size, 0, 1)

    def polygon(self, colour: tuple, *points: tuple[float, float]) -> None:
        self.pen.polygon([(x * self.size, y * self.size) for x, y in points], fill=colour)

    def box(self, colour: tuple, x: float, y: float, width: float, height: float, *, round: bool = False) -> None:
        """Draw a rectangle, or the ellipse in it; x is its middle and y its foot."""
        draw = self.pen.ellipse if round else self.pen.rectangle
        draw(
            [(x - width / 2) * self.size, (y - height) * self.size, (x + width / 2) * self.size, y * self.size],
            fill=colour,
        )

    def noise(self, columns: int, rows: int) -> np.ndarray:
        """Return smooth noise [size, size] from 0 to 1 with this many cells across and down, and a finer octave."""
        cells = [Image.fromarray(self.count(0, 256, (rows * size, columns * size), np.uint8)) for size in (1, 3)]
        blend = Image.blend(cells[0].resize(cells[1].size, BILINEAR), cells[1], 0.4)
        blend = blend.resize((self.size, self.size), BILINEAR)
        return np.clip(np.asarray(blend, np.float32) * (1.7 / 255) - 0.35, 0, 1)

    def profile(self, points: int) -> np.ndarray:
        """Return a broken line [size] from 0 to 1: four octaves, each with twice the points and half the height."""
        counts = [points * 2**octave for octave in range(4)]
        total = sum(np.interp(self.x[0] * n, np.arange(n + 1), self.random(n + 1)) / n for n in counts)
        return ((total - total.min()) / np.ptp(total)).astype(np.float32)

    def fill(self, mask: np.ndarray, dark: tuple, bright: tuple, mix: np.ndarray) -> None:
        """Cover the picture where `mask` [size, size] is 1 with two colours mixed by `mix`."""
        top = int(mask.any(1).argmax())
        for colour, cover in ((dark, mask), (bright, mask * mix)):
            self.image.paste(colour, (0, top), Image.fromarray((cover[top:] * 255).astype(np.uint8)))

    # ------------------------------------------------------------ parts that several classes share
    def sky(self, horizon: float) -> None:
        """Draw a gradient and, by chance, sun or moon, clouds, a distant ridge."""
        top, low = np.array((self.top, self.low))[:, None, None]
        column = top + (low - top) * np.clip(self.y[..., None] / max(horizon, 0.3), 0, 1) ** self.uniform(0.6, 1.6)
        self.image.paste(
            Image.fromarray(column.astype(np.uint8)).resize((self.size, self.size), Image.Resampling.NEAREST)
        )
        if self.random() < 0.3:
            x = self.uniform(0.1, 0.9)
            y = self.uniform(0.1, 1) * horizon
            size = self.uniform(0.05, 0.1)
            self.box((255, 240, 205), x, y, size, size, round=True)
        if self.random() < 0.6:
            cover = self.noise(self.count(2, 5), self.count(3, 9)) * 1.8 - self.uniform(0.5, 1.3)
            self.fill(np.clip(cover, 0, 0.85), self.colour(SNOW, 0.4, 0.85), self.colour(SNOW, 0.2), 1 - self.y)
        if self.random() < 0.4:
            self.ridge(horizon + 0.05, self.uniform(0.1, 0.5), self.uniform(0.3, 0.9), self.uniform(-0.4, 0.5))

    def ridge(self, base: float, height: float, depth: float, snow: float) -> None:
        """Draw a mountain chain: lit and shaded faces run down from the crest, snow lies on the upper part."""
        crest = base - height * self.profile(self.count(2, 6))
        grain = self.noise(8, 8)
        rock = self.choose(ROCKS)
        slope = (np.gradient(crest) * self.choose((-self.size, self.size))).astype(np.float32)
        column = self.x + np.maximum(self.y - crest, 0) * (grain - 0.5) * 1.2  # so that the faces wind downwards
        column = column * self.size
        lit = np.clip(0.5 + 0.5 * slope[np.clip(column, 0, self.size - 1).astype(np.intp)], 0, 1)
        mask = self.below(crest)
        self.fill(mask, self.colour(rock, depth, 0.6), self.colour(rock, depth, 1.1), lit)
        if snow > 0:
            white = np.clip((base - height * (1 - snow) - self.y + grain * 0.3 + lit * 0.1 - 0.2) * 25, 0, 1)
            self.fill(mask * white, self.colour(SHADOW, depth), self.colour(SNOW, depth), lit)

    def ground(self, line: np.ndarray | float, colour: tuple, shade: float = 0.72) -> None:
        """Draw patchy ground below a line [size] or a height."""
        self.fill(self.below(line), self.colour(colour, 0.2, shade), self.colour(colour), self.noise(9, 14))

    def water(self, top: float) -> None:
        """Draw water from a horizon down, the sky in it, its waves growing towards the viewer."""
        near = np.sqrt(np.clip((self.y[:, 0] - top) / (1 - top), 0, 1))
        waves = self.noise(self.count(3, 8), self.count(16, 36))[(near * (self.size - 1)).astype(np.intp)]
        colour = self.choose(WATERS)
        self.fill(self.below(top), self.colour(colour, 0, 0.75), self.colour(colour, 1), waves)

    def trees(self, foot: float, height: float, count: int, depth: float, leaf: tuple, conifer: bool) -> None:
        """Draw a row of conifers, lit from one side, or of trunks with crowns of blobs, lit from above."""
        bark = self.colour(ROCKS[5], depth)
        shades = [self.colour(leaf, depth, shade) for shade in (0.6, 0.85, 1.1)]
        for x, down, size in self.random((count, 3)).tolist():
            x = x * 1.1 - 0.05
            y = foot + 0.05 * down
            tall = height * (0.6 + 0.5 * size)
            for side in (-tall, tall) if conifer else ():
                steps = ((0, 1), (0.06, 0.7), (0.03, 0.7), (0.12, 0.35), (0.06, 0.35), (0.2, 0), (0, 0))
                self.polygon(shades[1 + (side < 0)], *((x + side * out, y - tall * up) for out, up in steps))
            if not conifer:
                self.box(bark, x, y, tall * 0.07, tall * 0.6)
            for place, (across, up, wide) in enumerate(() if conifer else self.random((9, 3)).tolist()):
                middle = x + (across - 0.5) * 0.4 * tall
                low = y - tall * (0.43 + place / 30 + up / 5)
                self.box(shades[place // 3], middle, low, tall * (0.22 + wide / 5), tall * 0.28, round=True)

    def facade(self, corners: list, depth: float = 0.0, shade: float = 1.0) -> None:
        """Draw a wall seen as a quadrilateral (top left, top right, bottom right, bottom left) with its windows."""
        self.polygon(self.colour(self.choose(WALLS), depth, shade), *corners)
        (a, b, c, d) = np.array(corners)
        size = self.count(2, (6, 9))
        glass = self.choose(GLASS)
        panes = [LAMP, *(self.colour(glass, depth, light) for light in (0.8, 1.0, 1.15))]
        half = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * self.uniform(0.2, 0.4, 2)
        u, v = np.split((np.moveaxis(np.indices(size), 0, -1).reshape(-1, 1, 2) + 0.5 + half) / size, 2, -1)
        dark = (self.random(len(u)) > (0.45 if self.lamps else 0.02)).tolist()
        windows = self.size * (a + u * (b - a) + v * (d - a) + u * v * (a - b + c - d))
        for place, points in enumerate(windows.reshape(-1, 8).tolist()):
            self.pen.polygon(points, panes[dark[place] * (1 + place * 5 % 3)])

    # ---------------------------------------------------------------------------- the six classes
    def buildings(self) -> None:
        """Draw blocks and towers with two walls each, from one close by to a skyline; no road."""
        foot = self.uniform(0.65, 1.02)
        count = self.count(1, 6)
        self.sky(foot)
        self.ground(foot, self.choose(FLOORS))
        for depth in np.linspace(0.8, 0, count).tolist() if count > 1 else [0.0]:
            left = self.uniform(-0.2, 0.7)
            wide = self.uniform(0.1, 0.3) + 0.7 / count
            edge = left + wide * self.uniform(0.2, 0.8)
            top = foot - self.uniform(0.25, 1)
            for end, shade in ((left, 1.0), (left + wide, 0.7)):
                fall = self.uniform(0, 0.4) * abs(end - edge)
                self.facade([(end, top + fall), (edge, top), (edge, foot), (end, foot - fall / 5)], depth, shade)
        self.trees(foot, self.uniform(0.15, 0.5), self.count(6), 0.0, self.choose(LEAVES), self.random() < 0.3)

    def forest(self) -> None:
        """Draw rows of conifers or of broad-leaved trees, up a slope or around the viewer."""
        leaf = self.choose(LEAVES)
        horizon = self.uniform(0, 0.7)
        conifer = self.random() < 0.5
        grown = self.random()
        self.sky(horizon)
        self.ground(horizon + 0.08, leaf, 0.4)
        for near in np.linspace(0, 1, self.count(3, 6)).tolist():
            foot = horizon + 0.12 + (1.1 - horizon) * near**1.4
            height = 0.18 + (0.3 + 0.6 * grown) * near
            self.trees(foot, height, 20 - int(14 * near), 1 - near, leaf, conifer)

    def mountain(self) -> None:
        """Draw ridges behind each other over a lake, a meadow, scree or snow, perhaps with woods."""
        base = self.uniform(0.45, 0.92)
        snow = self.uniform(-0.4, 0.9)
        self.sky(base)
        for depth in (0.9, 0.3)[self.count(2) :]:
            self.ridge(base, self.uniform(0.4, 0.75) * (0.6 + 0.4 * depth), depth, snow * (0.4 + 0.6 * depth))
        if self.random() < 0.35:
            self.water(base)
        else:
            self.ground(base - 0.08 * self.profile(3), self.choose((*FLOORS[1:4], LEAVES[0], SNOW)))
        if self.random() < 0.5:
            self.trees(base + self.uniform(0, 0.15), self.uniform(0.06, 0.4), 15, 0.2, self.choose(LEAVES), True)

    def glacier(self) -> None:
        """Draw a river of ice between ridges, or the broken front of the ice over water with bergs."""
        base = self.uniform(0.3, 0.6)
        level = self.uniform(0.5, 0.85)
        blue = self.colour(SHADOW)
        ice = self.colour(SNOW, 0, self.uniform(0.85, 1))
        self.sky(base)
        self.ridge(base + 0.05, self.uniform(0, 0.6), 0.6, self.uniform(-0.4, 0.9))
        if self.random() < 0.5:
            self.ground(base - 0.12 * self.profile(3), self.choose(ROCKS))
            near = np.clip((self.y - base + 0.05) / (1.05 - base), 0, 1)
            grain = self.noise(8, 14)
            half = self.uniform(0.02, 0.1) + self.uniform(0.1, 0.8) * near**1.3
            across = (self.x - self.uniform(0.3, 0.7) - self.uniform(-0.3, 0.3) * np.sin(4 * near) - 0.1 * grain) / half
            cracks = np.sin((near**0.6 + 0.15 * across**2 * near + 0.06 * grain) * self.uniform(50, 110)) > 0.7
            self.fill((abs(across) < 1) * (near > 0), blue, ice, grain * (1 - 0.8 * cracks))
            return
        wall = self.below(base + 0.08 - self.uniform(0, 0.15) * self.profile(16))
        self.fill(wall, blue, ice, self.noise(self.count(20, 50), 3))
        self.water(level)
        for y in np.sort(self.uniform(level + 0.01, 1.0, self.count(9))).tolist():
            x = self.uniform()
            wide = (y - level + 0.08) * self.uniform(0.3, 0.8)
            tall = self.uniform(0.02, 0.2)
            split = (x + wide * 0.2, y)
            peak = (x + self.uniform(-0.4, 0.4) * wide, y - tall)
            self.polygon(ice, (x - wide, y), (x - wide * 0.6, y - tall * 0.6), peak, split)
            self.polygon(blue, split, peak, (x + wide * 0.7, y - tall * 0.5), (x + wide, y))

    def sea(self) -> None:
        """Draw open water with a level horizon, sometimes with a path of light, boats or a beach."""
        horizon = self.uniform(0.15, 0.7)
        white = self.colour(SNOW)
        self.sky(horizon)
        self.water(horizon)
        if self.lamps or self.random() < 0.2:
            path = abs(self.x - self.uniform(0.2, 0.8)) < (0.04 + 0.2 * (self.y - horizon)) * self.noise(2, 40)
            self.fill(self.below(horizon + 0.01) * path, LAMP, SNOW, 1 - self.y)
        if self.random() < 0.4:
            edge = self.uniform(max(horizon + 0.2, 0.65), 1) + self.uniform(-0.3, 0.3) * (self.x[0] - 0.5)
            self.fill(self.below(edge - 0.01 - 0.05 * self.profile(4)), white, white, self.y)
            self.ground(edge, self.choose(FLOORS[2::2]), 0.85)
        for x, down in self.random((self.count(3), 2)).tolist():
            y = horizon + (0.02 + 0.25 * down) * (1 - horizon)
            size = 0.05 + 0.1 * down
            self.box(self.colour(self.choose(WALLS)), x, y, size, size * 0.18)
            self.polygon(white, (x, y - size * 1.1), (x, y - size * 0.2), (x + size * 0.45, y - size * 0.2))

    def street(self) -> None:
        """Draw a road that runs away between two rows of houses, with traffic and trees."""
        x = self.uniform(0.3, 0.7)
        y = self.uniform(0.35, 0.62)
        reach = self.uniform(0.4, 0.9)

        def at(offset: float, near: float, up: float = 0.0) -> tuple[float, float]:
            return x + offset * near, y + (1.1 - y - up) * near

        self.sky(y)
        self.ground(y, FLOORS[2], 0.9)
        self.trees(y, self.uniform(0.1, 0.5), self.count(9), 0.5, self.choose(LEAVES), False)
        self.polygon(self.colour(self.choose(FLOORS[:3])), at(0, 0), at(reach, 1.2), at(-reach, 1.2))
        self.polygon(self.colour(SNOW), at(0, 0), at(0.03, 1.2), at(-0.03, 1.2))
        for edge, shade in ((-1.25 * reach, 0.75), (1.25 * reach, 1.0)):
            for far, near in pairwise([0.06, *np.sort(self.uniform(0.12, 0.9, self.count(1, 4))).tolist(), 1.4]):
                if self.random() < 0.65:
                    tall = self.uniform(0.6, 1.7)
                    wall = [at(edge, far, tall), at(edge, near, tall), at(edge, near), at(edge, far)]
                    self.facade(wall, 0.5 - near / 3, shade)
        for near in np.sort(self.uniform(0.12, 0.8, self.count(4))).tolist():
            (middle, foot) = at(self.uniform(-0.7, 0.7) * reach, near)
            size = 0.4 * near
            self.box(self.colour(GLASS[1]), middle, foot, size * 0.72, size * 0.62)
            self.box(self.colour(self.choose(WALLS)), middle, foot, size, size * 0.36)
            self.box(LAMP if self.lamps else (160, 40, 40), middle, foot - size * 0.18, size * 0.84, size * 0.08)


def draw_scene(name: str, random: np.random.Generator, size: int = SIZE) -> Image.Image:
    """Draw one RGB picture of `size` pixels square of the class `name`; `random` is the only source of variation."""
    scene = Scene(random, size)
    getattr(scene, name)()
    side = size * random.uniform(0.6, 1)
    left, top = random.uniform(0, size - side, 2).tolist()
    image = scene.image.resize((size, size), BILINEAR, (left, top, left + side, top + side))
    if random.random() < 0.2:
        image = image.filter(ImageFilter.BoxBlur(random.uniform(0.2, 1.6)))
    gain = random.uniform(0.6, 1.25) * random.normal(1, 0.07, 3)  # exposure, and a cast of colour
    image = image.convert("RGB", np.pad(np.diag(gain), ((0, 0), (0, 1))).ravel().tolist())
    grain = 128 + random.integers(-128, 128, (size, size), np.int8) * np.float32(random.uniform(0, 0.12))
    return ImageChops.add(image, Image.merge("RGB", [Image.fromarray(grain.astype(np.uint8))] * 3), 1, -128)
