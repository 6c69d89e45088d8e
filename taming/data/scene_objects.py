"""The silhouettes, colours and textures of the objects in the built-in scenes.

Every object is drawn in its own coordinates (s, t): s in [-0.5, 0.5] from left to right over its width,
t in [0, 1] from its base to its top. Outlines are drawn four times as fine as the pixels and averaged, so
that coverage is antialiased; textures are smooth functions of (s, t) that fade where a pixel is too coarse
for them, so that a scene looks the same at every size.

Axes: h w pixels of an object's box within the frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[float, float, float]
Point = tuple[float, float]
Floats = np.ndarray

_FINE = 4  # drawn pixels along one pixel


@dataclass(frozen=True)
class Placement:
    """Where an object stands, in units of the frame's shorter side, and its own random numbers."""

    kind: str
    centre: float
    base: float
    height: float
    nearness: float
    """Inverse depth in (0, 1], 1 at the bottom edge of the frame."""
    mirrored: bool
    light: float
    """Side from which light falls: -1 left, 1 right."""
    random: Floats
    """(32,) uniform in [0, 1): shade, tint, texture phases and outline."""

    @property
    def width(self) -> float:
        return self.height * OBJECTS[self.kind].aspect


@dataclass(frozen=True)
class Sprite:
    """An object's pixels: `colour` is already multiplied by `coverage`."""

    rows: slice
    columns: slice
    colour: Floats  # (h, w, 3) in 0..255
    coverage: Floats  # (h, w) in [0, 1]


@dataclass(frozen=True)
class ObjectKind:
    """What every object of a class shares."""

    aspect: float
    """Width over height."""
    height: float
    """Height at nearness 1, in units of the frame's shorter side."""
    singular: str
    plural: str
    prototypes: tuple[RGB, ...]
    """Its typical colours, 0..255, as light, haze and texture leave them on average."""
    paint: Callable[[_Canvas], Floats]


def draw_object(place: Placement, size: tuple[int, int]) -> Sprite | None:
    """The pixels of one object in a frame of `size` (H, W); None if it lies outside the frame."""
    canvas = _Canvas(place, size)
    if canvas.empty:
        return None
    colour = OBJECTS[place.kind].paint(canvas)
    shade = 0.90 + 0.18 * place.random[0]
    tint = 1 + 0.05 * (2 * place.random[1:4] - 1)
    colour *= (shade * tint).astype(np.float32)
    return Sprite(canvas.rows, canvas.columns, colour, canvas.coverage())


class _Canvas:
    """A box of the frame around one object, in which its parts are drawn one over another."""

    def __init__(self, place: Placement, size: tuple[int, int]) -> None:
        self.place = place
        self.scale = min(size)
        reach = 0.54 * place.width
        x0 = max(0, math.floor((place.centre - reach) * self.scale))
        x1 = min(size[1], math.ceil((place.centre + reach) * self.scale))
        y0 = max(0, math.floor((place.base - 1.02 * place.height) * self.scale))
        y1 = min(size[0], math.ceil((place.base + 0.02 * place.height) * self.scale))
        self.empty = x1 <= x0 or y1 <= y0
        if self.empty:
            return
        self.rows, self.columns = slice(y0, y1), slice(x0, x1)
        fine = ((x1 - x0) * _FINE, (y1 - y0) * _FINE)
        self._colour, self._cover = Image.new("RGB", fine), Image.new("L", fine)
        self._draw_colour, self._draw_cover = ImageDraw.Draw(self._colour), ImageDraw.Draw(self._cover)
        sign = -1.0 if place.mirrored else 1.0
        x = (np.arange(x0, x1, dtype=np.float32) + 0.5) / self.scale
        y = (np.arange(y0, y1, dtype=np.float32) + 0.5) / self.scale
        self.s: Floats = (sign * (x - place.centre) / place.width)[None, :]  # (1, w)
        self.t: Floats = ((place.base - y) / place.height)[:, None]  # (h, 1)
        self.light = sign * place.light
        # Fine pixels of (s, t); Pillow's coordinates name pixel centres.
        self._fine_x = (
            sign * place.width * self.scale * _FINE,
            (place.centre * self.scale - x0) * _FINE - 0.5,
        )
        self._fine_y = (-place.height * self.scale * _FINE, (place.base * self.scale - y0) * _FINE - 0.5)

    def polygon(self, points: Sequence[Point], colour: RGB) -> None:
        """Paint a polygon of (s, t) corners."""
        (ax, bx), (ay, by) = self._fine_x, self._fine_y
        corners = [(ax * s + bx, ay * t + by) for s, t in points]
        self._draw_colour.polygon(corners, fill=(int(colour[0]), int(colour[1]), int(colour[2])))
        self._draw_cover.polygon(corners, fill=255)

    def box(self, s0: float, t0: float, s1: float, t1: float, colour: RGB) -> None:
        self.polygon([(s0, t0), (s1, t0), (s1, t1), (s0, t1)], colour)

    def colour(self) -> Floats:
        """(h, w, 3) in 0..255 times coverage."""
        return np.asarray(self._colour.reduce(_FINE), dtype=np.float32)

    def coverage(self) -> Floats:
        """(h, w) in [0, 1]."""
        return np.asarray(self._cover.reduce(_FINE), dtype=np.float32) / 255

    def random(self, index: int) -> float:
        return float(self.place.random[index])

    def waves(self, phase: Floats, cycles: float, length: float) -> Floats:
        """sin(2 pi phase), faded out where `cycles` over `length` (units) are too fine for the pixels."""
        pixels = length * self.scale / cycles
        fade = min(1.0, max(0.0, (pixels - 2.0) / 3.0))
        if fade == 0.0:
            return np.zeros((1, 1), dtype=np.float32)
        return fade * np.sin(2 * np.pi * phase)


# Colours of one object's parts. They keep away from the other labels' colours, so that a pixel's label
# can be told from its colour alone.
_WALL, _SIDE, _ROOF, _DARK, _TRIM = (
    (206, 84, 66),
    (170, 62, 52),
    (66, 44, 80),
    (54, 38, 68),
    (224, 132, 104),
)
_NEEDLES, _TRUNK = (24, 92, 66), (92, 62, 46)
_PANEL_A, _PANEL_B = (222, 62, 158), (126, 40, 160)
_ROCK_LIGHT, _ROCK_DARK = (158, 156, 160), (96, 93, 102)
_STRAW, _STRAW_DARK = (238, 176, 44), (196, 128, 28)


def _house(canvas: _Canvas) -> Floats:
    lit_front = canvas.light < 0
    front, side = (_WALL, _SIDE) if lit_front else (_SIDE, _WALL)
    corner = -0.10 + 0.10 * canvas.random(8)
    ridge = (corner - 0.5) / 2
    eaves = 0.50 + 0.08 * canvas.random(9)
    chimney = 0.16 + 0.10 * canvas.random(10)
    canvas.box(chimney, 0.78, chimney + 0.10, 1.0, side)
    canvas.box(chimney - 0.01, 0.955, chimney + 0.11, 1.0, _DARK)
    canvas.polygon([(-0.47, 0), (corner, 0), (corner, eaves), (ridge, 0.93), (-0.47, eaves)], front)
    canvas.box(corner, 0.0, 0.47, eaves, side)
    # A roof over the side wall, and the rim of its edge over the gable.
    drop = eaves - 0.05
    canvas.polygon([(corner - 0.03, drop), (ridge, 0.94), (0.34, 0.94), (0.52, drop)], _ROOF)
    canvas.polygon([(-0.52, drop), (ridge, 0.95), (ridge, 0.86), (-0.47, drop - 0.035)], _ROOF)
    canvas.polygon([(corner + 0.03, drop), (ridge, 0.95), (ridge, 0.86), (corner - 0.03, drop - 0.03)], _ROOF)
    middle = (-0.47 + corner) / 2
    canvas.box(middle - 0.075, 0, middle + 0.075, 0.335, _TRIM)
    canvas.box(middle - 0.055, 0, middle + 0.055, 0.31, _DARK)
    canvas.box(middle - 0.05, 0.50, middle + 0.05, 0.64, _TRIM)
    canvas.box(middle - 0.034, 0.52, middle + 0.034, 0.62, _DARK)
    space = (0.47 - corner) / 2
    for n in range(2):
        left = corner + space * (n + 0.5)
        canvas.box(left - 0.075, 0.16, left + 0.075, 0.40, _TRIM)
        canvas.box(left - 0.055, 0.185, left + 0.055, 0.375, _DARK)
        canvas.box(left - 0.008, 0.185, left + 0.008, 0.375, _TRIM)
    colour = canvas.colour()
    courses = canvas.waves(canvas.t * 15 + canvas.random(11), 15, canvas.place.height)
    return colour * (1 + 0.06 * courses + 0.08 * (canvas.t - 0.45))[..., None]


def _pine(canvas: _Canvas) -> Floats:
    canvas.box(-0.075, 0.0, 0.075, 0.2, _TRUNK)
    tiers = 4
    for n in range(tiers):
        low = 0.11 + 0.19 * n
        high = 1.0 if n == tiers - 1 else low + 0.40
        half = 0.5 - 0.095 * n
        points: list[Point] = [(0.0, high)]
        teeth = 7
        for k in range(teeth):
            reach = half * (1 - 2 * k / (teeth - 1))
            sway = 0.03 * (canvas.random((8 + 5 * n + k) % 32) - 0.5)
            hang = 0.03 * (1 - abs(reach) / half) + (0.0 if k % 2 == 0 else 0.05)
            points.append((reach, low + hang + sway))
        tone = 0.90 + 0.06 * n
        canvas.polygon(points, (_NEEDLES[0] * tone, _NEEDLES[1] * tone, _NEEDLES[2] * tone))
    colour = canvas.colour()
    s, t = canvas.s, canvas.t
    # Under each tier it is darker; boughs hang in arcs from the trunk.
    tier = (t - 0.11) / 0.19
    under = np.clip(tier - np.floor(tier), 0, 1) - 0.5
    boughs = canvas.waves(9 * t + 6 * np.abs(s) + canvas.random(30), 9, canvas.place.height)
    shade = 1 + 0.22 * under + 0.12 * boughs + 0.55 * canvas.light * s
    return colour * np.clip(shade, 0.6, 1.5)[..., None]


def _ball(canvas: _Canvas) -> Floats:
    corners = [
        (0.5 * math.cos(a), 0.5 + 0.5 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 48, endpoint=False)
    ]
    canvas.polygon(corners, (255, 255, 255))
    x: Floats = 2 * canvas.s
    y: Floats = 2 * canvas.t - 1
    z = np.sqrt(np.clip(1 - x * x - y * y, 0.0, 1.0))
    # Turn the ball about its axis of view, then tilt its pole to us: panels meet at the pole.
    turn, tilt = 2 * math.pi * canvas.random(8), 0.5 + 0.5 * canvas.random(9)
    u, v = math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y
    v, w = math.cos(tilt) * v - math.sin(tilt) * z, math.sin(tilt) * v + math.cos(tilt) * z
    panel = np.sin(3 * np.arctan2(u, w) + 2 * math.pi * canvas.random(10))
    sharp = max(1.5, canvas.place.height * canvas.scale / 6)
    share = np.clip(0.5 + sharp * panel * np.sqrt(np.clip(1 - v * v, 0, 1)), 0, 1)[..., None]
    colour = np.asarray(_PANEL_A, np.float32) * share + np.asarray(_PANEL_B, np.float32) * (1 - share)
    facing = 0.45 * canvas.light * x + 0.62 * y + 0.64 * z
    gleam = np.clip(facing - 0.93, 0, 1) * 9
    shade = 0.72 + 0.42 * np.clip(facing, 0, 1)
    colour = colour * shade[..., None] + 30 * np.clip(gleam, 0, 1)[..., None]
    return (colour * canvas.coverage()[..., None]).astype(np.float32)


def _boulder(canvas: _Canvas) -> Floats:
    # A rim of corners over a flat base, and facets between the rim and an inner ring.
    num = 9
    rim: list[Point] = []
    inner: list[Point] = []
    for k in range(num):
        angle = math.pi * k / (num - 1)
        bulge = 0.86 + 0.14 * canvas.random(8 + k)
        x, y = math.cos(angle), math.sin(angle) ** 0.75
        rim.append((0.5 * bulge * x, 0.97 * bulge * y + 0.02))
        near = 0.42 + 0.2 * canvas.random((17 + k) % 32)
        inner.append((0.5 * near * x, 0.18 + 0.62 * near * y + 0.12 * canvas.random((20 + k) % 32)))
    rim[0], rim[-1] = (rim[0][0], 0.0), (rim[-1][0], 0.0)
    canvas.polygon(rim, _ROCK_DARK)

    def tone(angle: float, k: int) -> RGB:
        lit = 0.5 + 0.32 * canvas.light * math.cos(angle) + 0.34 * (math.sin(angle) - 0.35)
        lit = min(1.0, max(0.0, lit + 0.22 * (canvas.random((8 + 3 * k) % 32) - 0.5)))
        return (
            _ROCK_DARK[0] + lit * (_ROCK_LIGHT[0] - _ROCK_DARK[0]),
            _ROCK_DARK[1] + lit * (_ROCK_LIGHT[1] - _ROCK_DARK[1]),
            _ROCK_DARK[2] + lit * (_ROCK_LIGHT[2] - _ROCK_DARK[2]),
        )

    for k in range(num - 1):
        angle = math.pi * (k + 0.5) / (num - 1)
        canvas.polygon([rim[k], rim[k + 1], inner[k + 1], inner[k]], tone(angle, k))
    canvas.polygon([*inner, (0.0, 0.06)], tone(math.pi / 2, num))
    canvas.polygon([inner[0], rim[0], rim[-1], inner[-1], (0.0, 0.10)], tone(-0.5, num + 1))
    colour = canvas.colour()
    grain = canvas.waves(2.2 * canvas.s + 1.1 * canvas.t + canvas.random(28), 9, canvas.place.width)
    grain = grain * np.cos(2 * np.pi * (2.3 * canvas.t - 0.8 * canvas.s + canvas.random(29)))
    return colour * (1 + 0.05 * grain + 0.10 * (canvas.t - 0.5))[..., None]


def _haystack(canvas: _Canvas) -> Floats:
    def taper(up: float) -> float:
        return float((1 - up**1.9) ** 0.62)

    steps = 13
    half = [0.43 + 0.07 * math.sin(math.pi * min(1.0, 2.2 * k / steps)) for k in range(steps)]
    edge: list[Point] = []
    for k in range(steps):
        up = k / (steps - 1)
        straw = 0.025 * (canvas.random((8 + k) % 32) - 0.5)
        edge.append((half[k] * taper(up) + straw * (1 - up), up * 0.985))
    left = [(-x + 0.02 * (canvas.random((20 + k) % 32) - 0.5), y) for k, (x, y) in enumerate(edge)]
    canvas.polygon([*edge, *reversed(left)], _STRAW)
    # Two ropes hold the straw together; they sag in the middle and stay within the outline.
    for up in (0.33, 0.63):
        reach = 0.455 * taper(up)
        above = [(x, up - 0.05 * (1 - (x / reach) ** 2)) for x in np.linspace(-reach, reach, 7).tolist()]
        canvas.polygon([*above, *((x, y - 0.035) for x, y in reversed(above))], _STRAW_DARK)
    colour = canvas.colour()
    s, t = canvas.s, canvas.t
    stalks = canvas.waves(
        13 * s * (1 + 0.5 * t) + 0.6 * np.sin(7 * t) + canvas.random(30), 15, canvas.place.width
    )
    layers = canvas.waves(8 * t + 1.5 * s * s + canvas.random(31), 8, canvas.place.height)
    round_shade = 0.40 * canvas.light * s - 0.9 * s * s
    shade = 1.04 + 0.09 * stalks + 0.06 * layers + round_shade + 0.12 * (t - 0.5)
    return colour * np.clip(shade, 0.6, 1.25)[..., None]


OBJECTS: dict[str, ObjectKind] = {
    "house": ObjectKind(
        1.25, 0.83, "a house", "houses", ((206, 103, 84), (168, 69, 59), (68, 46, 80)), _house
    ),
    "pine": ObjectKind(0.68, 1.16, "a pine", "pines", ((29, 100, 73), (22, 79, 57), (92, 63, 46)), _pine),
    "ball": ObjectKind(1.0, 0.61, "a ball", "balls", ((229, 68, 169), (175, 52, 135), (118, 39, 147)), _ball),
    "boulder": ObjectKind(
        1.45, 0.56, "a boulder", "boulders", ((148, 146, 152), (128, 125, 130), (101, 97, 105)), _boulder
    ),
    "haystack": ObjectKind(
        1.15, 0.71, "a haystack", "haystacks", ((248, 188, 49), (220, 163, 43), (183, 132, 34)), _haystack
    ),
}
"""The classes in the order of their labels."""
