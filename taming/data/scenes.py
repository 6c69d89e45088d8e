"""The built-in scenes: a procedural data set in which every condition agrees with the picture.

A scene is a pure function of (seed, index) and of the shape of its frame: a sky with clouds, ground in
perspective, and objects of five classes at several depths, of which nearer ones stand lower, are larger
and hide those behind them. Lengths are in units of the frame's shorter side, so that a scene is the same
at 64 and at 256 pixels; a wider frame shows more of it.

Axes: H W pixels; y points down, x to the right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from PIL import Image

from taming.data.scene_objects import OBJECTS, Placement, draw_object

CLASS_NAMES: tuple[str, ...] = tuple(OBJECTS)
"""Names of the picture's class and of `SceneObject.label`."""

SKY, GROUND, FIRST_OBJECT = 0, 1, 2
LABEL_NAMES: tuple[str, ...] = ("sky", "ground", *CLASS_NAMES)
"""Names of the segmentation labels: an object of class c has the label FIRST_OBJECT + c."""

PROTOTYPES: tuple[tuple[tuple[float, float, float], ...], ...] = (
    ((115, 164, 225), (163, 190, 225), (224, 224, 229)),
    ((168, 203, 99), (146, 179, 81), (109, 135, 60)),
    *(kind.prototypes for kind in OBJECTS.values()),
)
"""Typical colours of each segmentation label, RGB in 0..255 (see taming.metrics.adherence)."""

SMALLEST_SHARE = 1.5e-3
"""Of the frame's shorter side squared: less of an object is neither listed nor told."""


class SceneObject(TypedDict):
    """One visible object; `box` is (x0, y0, x1, y1) in [0, 1] around its visible pixels."""

    label: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """One rendered scene."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    segmentation: np.ndarray
    """(H, W) uint8, labels in [0, len(LABEL_NAMES))."""
    depth: np.ndarray
    """(H, W) float32 in [0, 1]: inverse depth, 0 for the sky, 1 at the nearest ground."""
    label: int
    """Class of the nearest object, in [0, len(CLASS_NAMES))."""
    objects: list[SceneObject]
    """Visible objects, nearest first."""
    text: str
    """One sentence about what can be seen."""


def render_scene(seed: int, index: int, size: tuple[int, int] = (64, 64)) -> Scene:
    """Draw scene `index` of the endless set `seed` in a frame of `size` (H, W)."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    stage = _Stage(random, size)
    picture = stage.sky(random)
    ground = stage.paint_ground(picture, random)
    segmentation = np.where(ground > 0.5, np.uint8(GROUND), np.uint8(SKY))
    depth = np.where(ground > 0.5, stage.ground_nearness[:, None], np.float32(0))
    places = stage.place_objects(random)
    owner = np.full(size, -1, dtype=np.int16)
    for number, place in enumerate(places):  # from far to near
        sprite = draw_object(place, size)
        if sprite is None:
            continue
        window = (sprite.rows, sprite.columns)
        _shade_ground(picture, segmentation, place)
        haze = 0.24 * (1 - place.nearness) ** 2
        colour = sprite.colour * (1 - haze) + sprite.coverage[..., None] * (haze * stage.haze)
        picture[window] *= 1 - sprite.coverage[..., None]
        picture[window] += colour
        inside = sprite.coverage > 0.5
        segmentation[window][inside] = FIRST_OBJECT + CLASS_NAMES.index(place.kind)
        depth[window][inside] = place.nearness
        owner[window][inside] = number
    picture *= stage.light_colour
    image = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    seen = _visible_objects(owner, places)
    label = CLASS_NAMES.index(places[-1].kind)
    return Scene(image, segmentation, depth, label, seen, _describe(seen, stage.sky_words))


class _Stage:
    """What a scene's parts share: frame, horizon and light."""

    def __init__(self, random: np.random.Generator, size: tuple[int, int]) -> None:
        self.size = size
        self.scale = min(size)
        self.height, self.width = size[0] / self.scale, size[1] / self.scale
        self.y = ((np.arange(size[0], dtype=np.float32) + 0.5) / self.scale)[:, None]  # (H, 1)
        self.x = ((np.arange(size[1], dtype=np.float32) + 0.5) / self.scale)[None, :]  # (1, W)
        draw = random.random(8)
        # Low and high horizons are more frequent than middling ones: scenes differ more.
        self.horizon = self.height * (0.13 + 0.48 * math.sin(0.5 * math.pi * draw[0]) ** 2)
        brightness, warmth = 0.92 + 0.15 * draw[1], 0.045 * (2 * draw[2] - 1)
        self.light_colour = np.array(
            [brightness * (1 + warmth), brightness, brightness * (1 - warmth)], np.float32
        )
        self.light = -1.0 if draw[3] < 0.5 else 1.0
        self.dusk = max(0.0, 2.2 * draw[4] - 1.2)
        self.cloudiness = draw[5]
        low = np.array([196, 219, 236], np.float32)
        self.haze = low + self.dusk * (np.array([243, 206, 182], np.float32) - low)
        nearness = (self.y[:, 0] - self.horizon) / (self.height - self.horizon)
        self.ground_nearness = np.clip(nearness, 0.02, 1.0).astype(np.float32)

    @property
    def sky_words(self) -> str:
        if self.dusk > 0.35:
            return _SKIES[0]
        return _SKIES[1] if self.cloudiness > 0.5 else _SKIES[2]

    def noise(self, random: np.random.Generator, rows: float, columns: float) -> np.ndarray:
        """(H, W) smooth noise in about [-1, 1], of `rows` and `columns` bumps along the shorter side."""
        grid = (max(2, math.ceil(rows * self.height) + 1), max(2, math.ceil(columns * self.width) + 1))
        values = Image.fromarray((2 * random.random(grid) - 1).astype(np.float32))
        box = (0.0, 0.0, min(grid[1], columns * self.width), min(grid[0], rows * self.height))
        fine = values.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC, box=box)
        return np.asarray(fine)

    def sky(self, random: np.random.Generator) -> np.ndarray:
        """(H, W, 3) float32: a gradient with soft clouds."""
        draw = random.random(6)
        top = np.array([84 + 24 * draw[0], 148 + 18 * draw[1], 222 + 14 * draw[2]], np.float32)
        top += 0.45 * self.dusk * (np.array([128, 140, 206], np.float32) - top)
        fall = np.clip(self.y / self.horizon, 0, 1) ** 1.3
        picture = (top + fall[..., None] * (self.haze - top)) * np.ones((1, self.size[1], 1), np.float32)
        shape = (
            self.noise(random, 7, 3) + 0.55 * self.noise(random, 14, 6) + 0.22 * self.noise(random, 26, 12)
        )
        cover = np.clip((shape + 0.95 * (self.cloudiness - 0.62)) * 1.9, 0, 1)
        cover = cover * cover * (3 - 2 * cover) * 0.92
        white = np.array([247, 247, 249], np.float32)
        white = white + self.dusk * (np.array([252, 222, 204], np.float32) - white)
        picture += cover[..., None] * (white * (1 - 0.05 * np.clip(shape, 0, 1)[..., None]) - picture)
        return picture

    def paint_ground(self, picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Paint the ground over the sky; returns its coverage (H, W) in [0, 1]."""
        draw = random.random(12)
        rise = 0.012 + 0.06 * draw[0]
        ridge = self.horizon - rise * (
            np.sin(2 * np.pi * (0.7 * self.x + draw[1])) + 0.5 * np.sin(2 * np.pi * (1.7 * self.x + draw[2]))
        )
        coverage = np.clip((self.y - ridge) * self.scale + 0.5, 0, 1)  # (H, W)
        start = max(0, math.floor(float(ridge.min()) * self.scale) - 1)
        rows = slice(start, self.size[0])
        near = self.ground_nearness[rows, None]
        base = np.array([146 + 16 * draw[3], 186 + 10 * draw[4], 74 + 14 * draw[5]], np.float32)
        far = base + 0.34 * (self.haze - base)
        colour = far + (near**0.45)[..., None] * (base - far)
        # Furrows run to a vanishing point; they fade where they come too close for the pixels.
        vanish, cycles = self.width * (1.4 * draw[6] - 0.2), 5 + 4 * draw[7]
        spread = (self.x - vanish) / near  # (h, W)
        pixels = near * self.scale / cycles
        calm = np.clip(4 * near, 0, 1)  # far off they would shimmer at any size
        fade = np.clip((pixels - 2) / 4, 0, 1) * calm * (0.45 + 0.55 * draw[8])
        shade = 0.075 * fade * np.sin(2 * np.pi * (cycles * spread + draw[9]))
        shade = shade + 0.045 * calm * np.sin(9 * np.log(near) + 2.5 * self.x + 6.28 * draw[10])
        shade += 0.07 * self.noise(random, 9, 5)[rows] + 0.05 * self.noise(random, 24, 18)[rows]
        colour = colour * (1 + shade)[..., None]
        weight = coverage[rows, :, None]
        picture[rows] += weight * (colour - picture[rows])
        return coverage

    def place_objects(self, random: np.random.Generator) -> list[Placement]:
        """Objects from far to near; the nearest is well inside the frame."""
        count = 2 + int(5 * random.random() ** 0.5)
        if self.width > 1.5:
            count = round(count * (0.4 + 0.6 * self.width))
        # Evenly spread depths with jitter, so that objects rarely share one.
        draw = random.random((count, 8))
        steps = (np.arange(count) + 0.15 + 0.7 * draw[:, 0]) / count
        nearness = 0.22 + 0.66 * steps
        nearness[-1] = 0.80 + 0.20 * draw[-1, 0]
        centres: list[float] = []
        places = []
        for n in reversed(range(count)):  # the nearest chooses its place first
            candidates = self.width * (0.06 + 0.88 * draw[n, 1:5])
            if n == count - 1:
                candidates = self.width * (0.22 + 0.56 * draw[n, 1:2])
            room = [min((abs(c - other) for other in centres), default=0.0) for c in candidates]
            centre = float(candidates[int(np.argmax(room))])
            centres.append(centre)
            kind = CLASS_NAMES[int(draw[n, 5] * len(CLASS_NAMES))]
            height = OBJECTS[kind].height * float(nearness[n]) * (0.88 + 0.24 * float(draw[n, 6]))
            base = self.horizon + float(nearness[n]) * (self.height - self.horizon)
            places.append(
                Placement(
                    kind,
                    centre,
                    base,
                    height,
                    float(nearness[n]),
                    bool(draw[n, 7] < 0.5),
                    self.light,
                    random.random(32),
                )
            )
        return places[::-1]


def _shade_ground(picture: np.ndarray, segmentation: np.ndarray, place: Placement) -> None:
    """Darken the ground under and beside an object, away from the light."""
    scale = min(segmentation.shape)
    reach_x, reach_y = 0.62 * place.width, 0.13 * place.width * (0.4 + 0.6 * place.nearness)
    x, y = place.centre - 0.16 * place.light * place.width, place.base - 0.1 * reach_y
    rows = slice(max(0, int((y - reach_y) * scale)), max(0, math.ceil((y + reach_y) * scale)))
    columns = slice(max(0, int((x - reach_x) * scale)), max(0, math.ceil((x + reach_x) * scale)))
    ground = segmentation[rows, columns] == GROUND
    down = (np.arange(rows.start, rows.start + ground.shape[0]) + 0.5) / scale - y
    across = (np.arange(columns.start, columns.start + ground.shape[1]) + 0.5) / scale - x
    fall = 1 - (down / reach_y)[:, None] ** 2 - (across / reach_x)[None, :] ** 2
    shade = 0.34 * np.clip(1.6 * fall, 0, 1) * ground
    picture[rows, columns] *= (1 - shade)[..., None].astype(np.float32)


def _visible_objects(owner: np.ndarray, places: list[Placement]) -> list[SceneObject]:
    height, width = owner.shape
    least = SMALLEST_SHARE * min(height, width) ** 2
    seen: list[SceneObject] = []
    for number in reversed(range(len(places))):
        mask = owner == number
        if np.count_nonzero(mask) < least:
            continue
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (
            float(columns[0] / width),
            float(rows[0] / height),
            float((columns[-1] + 1) / width),
            float((rows[-1] + 1) / height),
        )
        seen.append({"label": CLASS_NAMES.index(places[number].kind), "box": box})
    return seen


_NUMBERS = ("no", "a", "two", "three", "four", "five", "six")
_SKIES = ("an evening sky", "a cloudy sky", "a clear sky")


def _describe(objects: list[SceneObject], sky: str) -> str:
    """ "a house in front of two pines and a ball under a clear sky": the nearest object leads."""
    nearest, *others = (item["label"] for item in objects)
    parts = []
    for label in sorted(set(others)):
        kind, number = OBJECTS[CLASS_NAMES[label]], others.count(label)
        amount = _NUMBERS[number] if number < len(_NUMBERS) else "many"
        parts.append(kind.singular if number == 1 else f"{amount} {kind.plural}")
    behind = ""
    if parts:
        behind = " in front of " + (", ".join(parts[:-1]) + " and " + parts[-1] if parts[1:] else parts[0])
    return f"{OBJECTS[CLASS_NAMES[nearest]].singular}{behind} under {sky}"


def every_phrase() -> list[str]:
    """Sentences of the scenes' language in which each of its words stands."""
    amounts = (*_NUMBERS[2:], "many")
    kinds = list(OBJECTS.values())
    sentences = []
    for number in range(max(len(amounts), len(kinds), len(_SKIES))):
        kind, sky = kinds[number % len(kinds)], _SKIES[number % len(_SKIES)]
        some = f"{amounts[number % len(amounts)]} {kind.plural}"
        sentences.append(f"{kind.singular} in front of {kind.singular} and {some} under {sky}")
    return sentences
