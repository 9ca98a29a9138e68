"""The lab's procedural world: scenes of named attributes, and a seed for what captions leave open.

A `Scene` is exact ground truth. Its attributes are what captions say and the judge reads; its
nuisance seed decides placement, shapes, texture, typeface, clutter and shades. Editing an attribute
keeps the nuisance, so the true target of an edit is a render too. Captions live in `grammar.py`,
edits in `edits.py`.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import cos, pi, sin
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fewstep.lab.glyphs import GLYPHS
from fewstep.lab.words import EVALUATION_WORDS, training_words

SIZE: Final = 32  # pixels of a finished image, both ways
SUPERSAMPLING: Final = 4
CANVAS: Final = SIZE * SUPERSAMPLING

Colour = tuple[int, int, int]

ATTRIBUTES: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "landscape": {
        "sky": ("noon", "sunset", "night"),
        "weather": ("clear", "cloudy", "rainy", "snowy"),
        "terrain": ("mountains", "hills", "sea", "desert"),
        "count": ("no", "one", "two", "three"),
        "landmark": ("house", "tower", "balloon", "flag"),
        "colour": ("red", "yellow", "blue", "white"),
    },
    "portrait": {
        "hair_colour": ("black", "brown", "blond", "red"),
        "hair": ("short", "long", "curly"),
        "mood": ("happy", "sad", "surprised"),
        "wear": ("nothing", "glasses", "hat", "scarf"),
        "shirt": ("green", "blue", "purple", "orange"),
    },
    "text": {
        "board": ("wooden", "paper", "screen", "enamel"),
        "ink": ("black", "red", "blue", "white", "yellow", "pink"),
        "word": (),  # open: 3 to 5 capitals
    },
}
CATEGORIES: Final = tuple(ATTRIBUTES)
INKS: Final = {
    "wooden": ("black", "red", "blue"),
    "paper": ("black", "red", "blue"),
    "screen": ("white", "yellow", "pink"),
    "enamel": ("white", "yellow", "pink"),
}

PAINT: Final[dict[str, Colour]] = {
    "red": (222, 38, 38),
    "yellow": (250, 208, 36),
    "blue": (38, 84, 226),
    "white": (250, 250, 250),
}
INK: Final[dict[str, Colour]] = {
    "black": (18, 18, 22),
    "red": (206, 18, 24),
    "blue": (20, 52, 200),
    "white": (252, 252, 252),
    "yellow": (255, 226, 48),
    "pink": (255, 120, 200),
}
HAIR: Final[dict[str, Colour]] = {
    "black": (26, 22, 26),
    "brown": (112, 66, 30),
    "blond": (238, 204, 98),
    "red": (204, 74, 20),
}
SHIRT: Final[dict[str, Colour]] = {
    "green": (36, 150, 60),
    "blue": (40, 90, 220),
    "purple": (128, 46, 170),
    "orange": (244, 136, 24),
}


@dataclass(frozen=True)
class Scene:
    """One image of the world: a category, its attribute values, and the seed of everything else."""

    category: str
    attributes: tuple[tuple[str, str], ...]
    nuisance: int
    sign: int | None = None
    """Seed of the sign alone, where an edit puts up another in the same street; None: nuisance."""

    def __getitem__(self, name: str) -> str:
        return dict(self.attributes)[name]

    def with_(self, changes: Mapping[str, str]) -> "Scene":
        """The same scene (same nuisance) with some attributes changed."""
        merged = {**dict(self.attributes), **changes}
        return replace(self, attributes=tuple(merged.items()))


class Open:
    """Named uniform draws from one seed: a draw depends on its name alone, not on earlier draws.

    So changing an attribute never moves a cloud.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        z = (
            zlib.crc32(name.encode()) * 0x9E3779B97F4A7C15 + self.seed * 0xD1B54A32D192ED03
        ) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            z = ((z ^ (z >> shift)) * factor) % 2**64
        return low + (high - low) * (z / 2**64)

    def pick(self, name: str, count: int) -> int:
        return min(int(self(name) * count), count - 1)

    def shade(self, name: str, colour: Colour, spread: float = 14) -> Colour:
        """The colour with a small open shift in each channel."""
        r, g, b = (
            int(min(max(c + self(f"{name}{i}", -spread, spread), 0), 255))
            for i, c in enumerate(colour)
        )
        return (r, g, b)


def is_evaluation(category: str, attributes: Mapping[str, str]) -> bool:
    """Whether a combination of attributes (text: a word) is of the evaluation split, 1 in 10."""
    if category == "text":
        return attributes["word"] in EVALUATION_WORDS
    key = category + "|" + "|".join(f"{k}={attributes[k]}" for k in sorted(attributes))
    return zlib.crc32(key.encode()) % 10 == 0


def sample_scene(category: str, rng: np.random.Generator, *, evaluation: bool = False) -> Scene:
    """A scene with attributes drawn uniformly from one split of its category."""
    while True:
        drawn = {
            name: values[rng.integers(len(values))]
            for name, values in ATTRIBUTES[category].items()
            if values
        }
        if category == "text":
            words = EVALUATION_WORDS if evaluation else training_words()
            drawn["word"] = words[rng.integers(len(words))]
            inks = INKS[drawn["board"]]
            drawn["ink"] = inks[rng.integers(len(inks))]
        if category == "landscape" and drawn["count"] == "no":
            if rng.random() < 0.6:  # an empty landscape is a quarter of the draws; keep it rarer
                continue
            drawn |= {"landmark": "house", "colour": "white"}  # canonical values of what is absent
        if is_evaluation(category, drawn) == evaluation:
            return Scene(category, tuple(drawn.items()), int(rng.integers(2**31)))


def render(scene: Scene) -> np.ndarray:
    """The scene as uint8 [SIZE, SIZE, 3], drawn at four times the size and averaged down."""
    image = DRAW[scene.category](scene, Open(scene.nuisance))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


# --- shared brushes ---------------------------------------------------------------------------


def gradient(top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, CANVAS)[:, None, None]
    rows = np.asarray(top) * (1 - ramp) + np.asarray(bottom) * ramp
    return Image.fromarray(np.broadcast_to(rows, (CANVAS, CANVAS, 3)).astype(np.uint8), "RGB")


def mix(a: Colour, b: Colour, share: float) -> Colour:
    r, g, bl = (int(x * (1 - share) + y * share) for x, y in zip(a, b, strict=True))
    return (r, g, bl)


def disc(
    draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, fill: Colour, **kw
) -> None:
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill, **kw)


# --- landscape --------------------------------------------------------------------------------

SKY: Final[dict[str, tuple[Colour, Colour]]] = {
    "noon": ((70, 150, 235), (190, 224, 250)),
    "sunset": ((120, 50, 120), (255, 160, 70)),
    "night": ((8, 10, 40), (30, 36, 90)),
}
GROUND: Final[dict[str, tuple[Colour, Colour]]] = {  # far, near
    "mountains": ((112, 108, 124), (86, 122, 74)),
    "hills": ((104, 168, 74), (66, 138, 52)),
    "sea": ((36, 110, 160), (24, 84, 140)),
    "desert": ((236, 198, 122), (220, 172, 92)),
}
LIGHT: Final = {"noon": 1.0, "sunset": 0.78, "night": 0.42}


def draw_landscape(scene: Scene, u: Open) -> Image.Image:
    sky, weather, terrain = scene["sky"], scene["weather"], scene["terrain"]
    top, bottom = (u.shade(f"sky{i}", c, 10) for i, c in enumerate(SKY[sky]))
    if weather in ("rainy", "snowy"):
        dull: Colour = (130, 136, 146) if sky != "night" else (44, 48, 66)
        top, bottom = mix(top, dull, 0.55), mix(bottom, dull, 0.4)
    image = gradient(top, bottom)
    draw = ImageDraw.Draw(image)
    horizon = u("horizon", 0.5, 0.68) * CANVAS
    _draw_lights(draw, sky, weather, u)
    if weather == "cloudy":
        for i in range(3 + u.pick("clouds", 3)):
            _draw_cloud(draw, sky, u, i)
    _draw_ground(draw, terrain, horizon, LIGHT[sky], u)
    for i in range(u.pick("birds", 4) if weather == "clear" and sky != "night" else 0):
        x, y, s = u(f"bx{i}", 8, 120), u(f"by{i}", 6, 50), u(f"bs{i}", 4, 7)
        draw.line((x - s, y - s * 0.6, x, y, x + s, y - s * 0.6), fill=(30, 30, 40), width=2)
    _draw_landmarks(draw, scene, horizon, u)
    _draw_weather(draw, weather, u)
    return image


def _draw_lights(draw: ImageDraw.ImageDraw, sky: str, weather: str, u: Open) -> None:
    x, y, r = u("sunx", 14, 114), u("suny", 14, 46), u("sunr", 7, 12)
    if sky == "night":
        if weather in ("clear", "cloudy"):
            for i in range(10 + u.pick("stars", 12)):
                sx, sy = u(f"sx{i}", 2, 126), u(f"sy{i}", 2, 66)
                disc(draw, sx, sy, 1.8, 1.8, (235, 235, 255))
        disc(draw, x, y, r, r, (238, 238, 210))
        disc(draw, x + r * 0.5, y - r * 0.2, r * 0.85, r * 0.85, (16, 18, 52))
    elif weather in ("clear", "cloudy"):
        warm: Colour = (255, 240, 120) if sky == "noon" else (255, 96, 48)
        disc(draw, x, y if sky == "noon" else y + 24, r, r, warm)


def _draw_cloud(draw: ImageDraw.ImageDraw, sky: str, u: Open, i: int) -> None:
    x, y, s = u(f"cx{i}", 6, 122), u(f"cy{i}", 8, 48), u(f"cs{i}", 7, 12)
    paint: dict[str, Colour] = {
        "noon": (250, 250, 252),
        "sunset": (250, 200, 190),
        "night": (92, 96, 128),
    }
    for j in range(3):
        dx, dy = (j - 1) * s * 1.1, u(f"cd{i}{j}", -0.3, 0.3) * s
        disc(draw, x + dx, y + dy, s, s * 0.7, u.shade(f"cc{i}", paint[sky], 6))


def _draw_ground(
    draw: ImageDraw.ImageDraw, terrain: str, horizon: float, light: float, u: Open
) -> None:
    def lit(colour: Colour) -> Colour:
        return mix((6, 8, 24), colour, light)

    far, near = (u.shade(f"ground{i}", c, 10) for i, c in enumerate(GROUND[terrain]))
    if terrain == "mountains":
        for i in range(2 + u.pick("peaks", 3)):
            x, h, w = u(f"px{i}", 6, 122), u(f"ph{i}", 30, 58), u(f"pw{i}", 22, 40)
            peak = horizon - h
            rock = lit(u.shade(f"rock{i}", far, 16))
            draw.polygon([(x - w, horizon), (x, peak), (x + w, horizon)], fill=rock)
            cap = 0.28
            draw.polygon(
                [(x - w * cap, peak + h * cap), (x, peak), (x + w * cap, peak + h * cap)],
                fill=lit((244, 246, 250)),
            )
    if terrain in ("hills", "desert"):
        for i, (colour, lift) in enumerate(((far, 16.0), (mix(far, near, 0.5), 6.0))):
            phase, wave = u(f"ha{i}", 0, 2 * pi), u(f"hw{i}", 0.03, 0.07)
            ridge = [
                (float(x), horizon - lift * (1 + sin(phase + wave * x)))
                for x in range(0, CANVAS + 1, 4)
            ]
            draw.polygon([*ridge, (CANVAS, CANVAS), (0, CANVAS)], fill=lit(colour))
    draw.rectangle((0, horizon, CANVAS, CANVAS), fill=lit(near))
    if terrain == "sea":
        for i in range(7 + u.pick("waves", 5)):
            x, y = u(f"wx{i}", 0, 120), u(f"wy{i}", horizon + 5, 126)
            w = u(f"ww{i}", 8, 20)
            draw.line((x, y, x + w, y), fill=lit((176, 214, 236)), width=2)
    elif terrain == "desert":
        for i in range(u.pick("cacti", 3)):
            x, y, h = u(f"kx{i}", 6, 122), u(f"ky{i}", horizon + 10, 122), u(f"kh{i}", 10, 18)
            draw.line((x, y, x, y - h), fill=lit((40, 120, 60)), width=4)
            draw.line(
                (x - 5, y - h * 0.7, x - 5, y - h * 0.45, x + 5, y - h * 0.45),
                fill=lit((40, 120, 60)),
                width=3,
            )
    else:
        for i in range(6 + u.pick("tufts", 8)):
            x, y, h = u(f"tx{i}", 2, 126), u(f"ty{i}", horizon + 6, 126), u(f"th{i}", 5, 9)
            draw.line((x, y, x + u(f"tl{i}", -3, 3), y - h), fill=lit((30, 84, 30)), width=2)


def landmark_places(scene: Scene, u: Open) -> list[tuple[float, float, float]]:
    """x, y of the foot and the scale of each landmark: side by side, in open order and place."""
    count = ("no", "one", "two", "three").index(scene["count"])
    order = sorted(range(3), key=lambda i: u(f"slot{i}"))
    # one stands anywhere, several keep clear of each other
    spans = {1: (18.0, 110.0), 2: (18.0, 110.0), 3: (18.0, 110.0)}
    low, high = spans.get(count, (0.0, 0.0))
    width = (high - low) / max(count, 1)
    places = []
    for i in range(count):
        slot = order[i] if count == 3 else i
        centre = low + width * (slot + 0.5)
        slack = max(width / 2 - 16, 1.5)
        places.append((centre + u(f"lx{i}", -slack, slack), u(f"ly{i}"), u(f"ls{i}", 0.9, 1.12)))
    return places


def _draw_landmarks(draw: ImageDraw.ImageDraw, scene: Scene, horizon: float, u: Open) -> None:
    paint = u.shade("paint", PAINT[scene["colour"]], 8)
    line: Colour = (22, 20, 24)
    for x, lift, s in landmark_places(scene, u):
        if scene["landmark"] == "house":
            y = horizon + 10 + lift * 26
            w, h = 13 * s, 13 * s
            draw.rectangle((x - w, y - h, x + w, y), fill=paint, outline=line, width=2)
            draw.polygon(
                [(x - w - 3, y - h), (x, y - h - 12 * s), (x + w + 3, y - h)],
                fill=(92, 56, 44),
                outline=line,
            )
            draw.rectangle((x - 3, y - 8, x + 3, y), fill=line)
        elif scene["landmark"] == "tower":
            y = horizon + 10 + lift * 26
            w, h = 6.5 * s, 42 * s
            draw.rectangle((x - w, y - h, x + w, y), fill=paint, outline=line, width=2)
            for j in range(4):
                draw.rectangle(
                    (
                        x - w - 2 + j * (w + 1) * 0.58,
                        y - h - 5,
                        x - w + 2 + j * (w + 1) * 0.58,
                        y - h,
                    ),
                    fill=line,
                )
            draw.rectangle((x - 2, y - h * 0.7, x + 2, y - h * 0.55), fill=line)
        elif scene["landmark"] == "balloon":
            y = 26 + lift * 26
            r = 13 * s
            disc(draw, x, y, r, r * 1.1, paint, outline=line, width=2)
            draw.line((x - r * 0.5, y + r, x - 3, y + r + 9), fill=line, width=2)
            draw.line((x + r * 0.5, y + r, x + 3, y + r + 9), fill=line, width=2)
            draw.rectangle((x - 4, y + r + 8, x + 4, y + r + 14), fill=(110, 70, 36))
        else:
            y = horizon + 12 + lift * 26
            h, w = 44 * s, 22 * s
            side = 1 if u("flagside") < 0.5 else -1
            draw.line((x, y, x, y - h), fill=line, width=4)
            draw.polygon(
                [(x, y - h), (x + side * w, y - h + 8), (x, y - h + 17)], fill=paint, outline=line
            )


def _draw_weather(draw: ImageDraw.ImageDraw, weather: str, u: Open) -> None:
    if weather == "rainy":
        lean = u("lean", -7, 7)
        for i in range(16 + u.pick("drops", 8)):
            x, y = u(f"rx{i}", 0, 128), u(f"ry{i}", -6, 112)
            draw.line((x, y, x + lean, y + 16), fill=(206, 222, 240), width=2)
    elif weather == "snowy":
        for i in range(26 + u.pick("flakes", 12)):
            x, y = u(f"fx{i}", 0, 128), u(f"fy{i}", 0, 128)
            disc(draw, x, y, 2.6, 2.6, (255, 255, 255))


# --- portrait ---------------------------------------------------------------------------------

SKIN: Final[tuple[Colour, ...]] = (
    (250, 220, 196),
    (236, 190, 150),
    (196, 142, 100),
    (142, 94, 62),
    (98, 64, 44),
)
WALL: Final[tuple[Colour, ...]] = (
    (196, 222, 236),
    (240, 216, 200),
    (206, 232, 206),
    (232, 226, 170),
    (222, 206, 236),
    (160, 166, 176),
)


def draw_portrait(scene: Scene, u: Open) -> Image.Image:
    wall = u.shade("wall", WALL[u.pick("wallkind", len(WALL))], 12)
    image = Image.new("RGB", (CANVAS, CANVAS), wall)
    draw = ImageDraw.Draw(image)
    _draw_wall(draw, wall, u)
    skin = u.shade("skin", SKIN[u.pick("skinkind", len(SKIN))], 10)
    hair = u.shade("hair", HAIR[scene["hair_colour"]], 8)
    x, y = u("fx", 54, 74), u("fy", 52, 62)
    rx, ry = u("frx", 23, 28), u("fry", 28, 33)
    _draw_hair_behind(draw, scene["hair"], hair, x, y, rx, ry)
    shirt = u.shade("shirt", SHIRT[scene["shirt"]], 8)
    _draw_shirt(draw, shirt, x, y, ry, u)
    draw.rectangle((x - 9, y + ry - 8, x + 9, y + ry + 10), fill=mix(skin, (40, 20, 20), 0.15))
    if scene["wear"] == "scarf":
        wrap = u.shade("scarf", (200, 30, 60), 10)
        draw.rounded_rectangle(
            (x - 20, y + ry - 3, x + 20, y + ry + 11), 6, fill=wrap, outline=(90, 8, 30), width=2
        )
        draw.rectangle(
            (x + 6, y + ry + 6, x + 16, y + ry + 34), fill=wrap, outline=(90, 8, 30), width=2
        )
    disc(draw, x, y, rx, ry, skin)
    _draw_features(draw, scene, skin, x, y, rx, ry, u)
    _draw_hair_front(draw, scene["hair"], hair, x, y, rx, ry, u)
    if scene["wear"] == "hat":
        felt = u.shade("hat", (52, 58, 84), 12)
        draw.rectangle((x - rx * 0.8, y - ry - 16, x + rx * 0.8, y - ry + 10), fill=felt)
        draw.rectangle((x - rx * 0.8, y - ry + 3, x + rx * 0.8, y - ry + 8), fill=(214, 178, 60))
        draw.rounded_rectangle(
            (x - rx * 1.45, y - ry + 8, x + rx * 1.45, y - ry + 15), 3, fill=felt
        )
    return image


def _draw_wall(draw: ImageDraw.ImageDraw, wall: Colour, u: Open) -> None:
    kind, dark = u.pick("wallpattern", 4), mix(wall, (40, 40, 60), 0.22)
    if kind == 1:
        step, width = u("ws", 12, 22), int(u("ww", 3, 7))
        for i in range(14):
            x = u("wo", 0, 12) + i * step
            draw.line((x, 0, x, CANVAS), fill=dark, width=width)
    elif kind == 2:
        step = u("ws", 16, 26)
        for i in range(9):
            for j in range(9):
                disc(draw, u("wo", 0, 12) + i * step, u("wp", 0, 12) + j * step, 3, 3, dark)
    elif kind == 3:
        x, y = u("framex", 4, 90), u("framey", 4, 30)
        draw.rectangle(
            (x, y, x + 30, y + 24), fill=mix(wall, (255, 255, 255), 0.6), outline=dark, width=4
        )


def _draw_shirt(
    draw: ImageDraw.ImageDraw, shirt: Colour, x: float, y: float, ry: float, u: Open
) -> None:
    top = y + ry + 3
    w = u("shoulder", 42, 52)
    draw.rounded_rectangle((x - w, top, x + w, CANVAS + 30), 20, fill=shirt)
    if u("shirtpattern") < 0.4:
        light = mix(shirt, (255, 255, 255), 0.45)
        for i in range(8):
            yy = top + 8 + i * u("stripe", 8, 12)
            draw.line((x - w + 3, yy, x + w - 3, yy), fill=light, width=3)


def _draw_hair_behind(
    draw: ImageDraw.ImageDraw, kind: str, hair: Colour, x: float, y: float, rx: float, ry: float
) -> None:
    if kind == "long":
        draw.rounded_rectangle((x - rx - 9, y - ry - 4, x + rx + 9, y + ry + 20), 22, fill=hair)
    elif kind == "curly":
        for i in range(13):
            a = pi * (0.92 + 1.16 * i / 12)
            disc(draw, x + cos(a) * (rx + 5), y - 3 + sin(a) * (ry + 4), 11, 11, hair)
    else:
        disc(draw, x, y - 4, rx + 3, ry + 2, hair)


def _draw_hair_front(
    draw: ImageDraw.ImageDraw,
    kind: str,
    hair: Colour,
    x: float,
    y: float,
    rx: float,
    ry: float,
    u: Open,
) -> None:
    box = (x - rx - 1, y - ry - 3, x + rx + 1, y + ry * 0.6)
    draw.chord(box, 196, 344, fill=hair)
    if kind == "long":
        for side in (-1, 1):
            draw.rectangle(
                (x + side * (rx - 1) - 5, y - ry * 0.4, x + side * (rx - 1) + 5, y + ry), fill=hair
            )
    part = u("part", -0.5, 0.5) * rx
    draw.line(
        (x + part, y - ry, x + part * 1.2, y - ry * 0.55),
        fill=mix(hair, (255, 255, 255), 0.3),
        width=2,
    )


def _draw_features(
    draw: ImageDraw.ImageDraw,
    scene: Scene,
    skin: Colour,
    x: float,
    y: float,
    rx: float,
    ry: float,
    u: Open,
) -> None:
    dark = mix(skin, (30, 10, 10), 0.72)
    gap, eye = u("eyegap", 9, 12), y - 2
    mood = scene["mood"]
    size = 4.6 if mood == "surprised" else 3.4
    for side in (-1, 1):
        ex = x + side * gap
        disc(draw, ex, eye, size + 1.2, size, (252, 252, 252))
        disc(draw, ex, eye + 0.4, size * 0.62, size * 0.75, (24, 20, 30))
        tilt = {"happy": 0.0, "sad": 3.0, "surprised": 0.0}[mood]
        lift = 8 if mood != "surprised" else 12
        brow, slope = eye - lift, -side * tilt
        draw.line((ex - 5, brow + slope, ex + 5, brow - slope), fill=dark, width=3)
    draw.line((x, eye + 4, x - 2, eye + 10, x + 2, eye + 10), fill=mix(skin, dark, 0.5), width=2)
    my, mw = y + ry * 0.52, u("mouth", 9, 12)
    lip: Colour = (168, 36, 44)
    if mood == "happy":
        draw.chord(
            (x - mw, my - 9, x + mw, my + 8), 0, 180, fill=(250, 250, 250), outline=lip, width=3
        )
    elif mood == "sad":
        draw.arc((x - mw, my - 1, x + mw, my + 15), 190, 350, fill=lip, width=4)
    else:
        disc(draw, x, my + 1, 5.5, 7, (90, 14, 24), outline=lip, width=2)
    if scene["wear"] == "glasses":
        for side in (-1, 1):
            ex = x + side * gap
            draw.ellipse((ex - 9, eye - 8, ex + 9, eye + 8), outline=(14, 14, 20), width=4)
        draw.line((x - gap + 8, eye - 1, x + gap - 8, eye - 1), fill=(14, 14, 20), width=4)
        for side in (-1, 1):
            draw.line(
                (x + side * (gap + 8), eye - 1, x + side * rx, eye - 3), fill=(14, 14, 20), width=3
            )


# --- text -------------------------------------------------------------------------------------

BOARD: Final[dict[str, Colour]] = {
    "wooden": (206, 160, 104),
    "paper": (248, 244, 228),
    "screen": (14, 14, 20),
    "enamel": (20, 92, 70),
}


def draw_text(scene: Scene, u: Open) -> Image.Image:
    image = _draw_street(u)
    draw = ImageDraw.Draw(image)
    u = u if scene.sign is None else Open(scene.sign)
    word, board = scene["word"], scene["board"]
    letter_h = u("lh", 30, 38)
    fill_w = {3: 84.0, 4: 104.0, 5: 116.0}[len(word)] * u("spread", 0.94, 1.0)
    x0 = (CANVAS - fill_w) / 2 + u("tx", -1, 1) * max((CANVAS - fill_w) / 2 - 6, 0.0)
    y0 = u("ty", 22, 62)
    pad_x, pad_y = 5.0, u("pad", 8, 14)
    box = (x0 - pad_x, y0 - pad_y, x0 + fill_w + pad_x, y0 + letter_h + pad_y)
    ground = u.shade("board", BOARD[board], 8)
    _draw_board(draw, board, ground, box, u)
    cell = fill_w / len(word)
    slant = u("slant", -0.12, 0.22)
    width = int(u("weight", 5, 8))
    bounce = u("bounce", 0, 2.5)
    for i, letter in enumerate(word):
        lift = bounce * (1 if i % 2 else -1)
        for stroke in GLYPHS[letter]:
            points = [
                (
                    x0
                    + i * cell
                    + cell * 0.13
                    + gx / 4 * cell * 0.74
                    + slant * (3 - gy) / 6 * letter_h * 0.35,
                    y0 + lift + gy / 6 * letter_h,
                )
                for gx, gy in stroke
            ]
            draw.line(points, fill=INK[scene["ink"]], width=width, joint="curve")
            for px, py in (points[0], points[-1]):
                disc(draw, px, py, width / 2 - 0.5, width / 2 - 0.5, INK[scene["ink"]])
    return image


def _draw_street(u: Open) -> Image.Image:
    kind = u.pick("street", 4)
    if kind == 0:  # brick wall
        base = u.shade("brick", (168, 86, 66), 20)
        image = Image.new("RGB", (CANVAS, CANVAS), base)
        draw = ImageDraw.Draw(image)
        joint = mix(base, (236, 226, 214), 0.5)
        for j in range(12):
            y = j * 12 + u("bo", 0, 12)
            draw.line((0, y, CANVAS, y), fill=joint, width=2)
            for i in range(7):
                x = i * 24 + (12 if j % 2 else 0) + u("bp", -12, 0)
                draw.line((x, y, x, y + 12), fill=joint, width=2)
    elif kind == 1:  # sky and pavement
        image = gradient(u.shade("up", (110, 170, 226), 24), u.shade("low", (208, 226, 240), 16))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 102, CANVAS, CANVAS), fill=u.shade("pave", (128, 126, 130), 20))
        for i in range(u.pick("trees", 3)):
            x = u(f"trx{i}", 4, 124)
            draw.line((x, 104, x, 86), fill=(84, 56, 34), width=5)
            disc(draw, x, 80, 11, 12, u.shade(f"leaf{i}", (50, 130, 56), 18))
    elif kind == 2:  # plain room with a floor line
        image = gradient(
            *(u.shade(f"room{i}", c, 24) for i, c in enumerate(((206, 196, 186), (180, 172, 170))))
        )
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 108, CANVAS, CANVAS), fill=u.shade("floor", (128, 84, 52), 20))
    else:  # night street
        image = gradient((16, 18, 40), u.shade("glow", (72, 48, 84), 20))
        draw = ImageDraw.Draw(image)
        for i in range(8):
            x, y = u(f"nx{i}", 0, 122), u(f"ny{i}", 0, 110)
            draw.rectangle((x, y, x + 5, y + 7), fill=u.shade(f"nw{i}", (240, 206, 110), 20))
        draw.rectangle((0, 112, CANVAS, CANVAS), fill=(30, 28, 36))
    return image


def _draw_board(
    draw: ImageDraw.ImageDraw,
    board: str,
    ground: Colour,
    box: tuple[float, float, float, float],
    u: Open,
) -> None:
    left, top, right, bottom = box
    if board == "wooden":
        post = (left + right) / 2 + u("post", -24, 24)
        draw.rectangle((post - 4, bottom, post + 4, CANVAS), fill=(120, 80, 44))
        draw.rectangle(box, fill=ground, outline=(110, 70, 36), width=3)
    elif board == "paper":
        draw.rectangle(
            (left, top, right, min(bottom + u("sheet", 0, 16), 126)),
            fill=ground,
            outline=(170, 160, 140),
            width=2,
        )
        for side in (left + 4, right - 4):
            disc(draw, side, top + 4, 2.5, 2.5, (200, 40, 40))
    elif board == "screen":
        draw.rounded_rectangle((left - 1, top - 2, right + 1, bottom + 2), 6, fill=(96, 98, 108))
        draw.rectangle((left + 2, top + 2, right - 2, bottom - 2), fill=ground)
    else:
        draw.rounded_rectangle(box, 9, fill=ground, outline=(236, 236, 226), width=3)


DRAW: Final = {"landscape": draw_landscape, "portrait": draw_portrait, "text": draw_text}

# --- styles: exact functions of a finished image ------------------------------------------------

STYLES: Final = ("sketch", "sepia", "pixels", "negative")


def apply_style(image: np.ndarray, style: str) -> np.ndarray:
    """The image in one of `STYLES`; deterministic, so a style edit has one true target."""
    x = image.astype(np.float32)
    grey = x @ np.array([0.299, 0.587, 0.114], np.float32)
    if style == "sepia":
        out = grey[..., None] / 255 * np.array([255, 222, 170], np.float32)
    elif style == "negative":
        out = 255 - x
    elif style == "pixels":
        block = 4
        small = x.reshape(SIZE // block, block, SIZE // block, block, 3).mean((1, 3))
        out = np.round(small / 36) * 36
        out = out.repeat(block, 0).repeat(block, 1)
    else:
        edge = Image.fromarray(grey.astype(np.uint8)).filter(ImageFilter.FIND_EDGES)
        lines = np.asarray(edge, np.float32)
        lines[[0, -1]] = 0
        lines[:, [0, -1]] = 0
        out = np.repeat((248 - np.minimum(lines * 1.1, 220))[..., None], 3, 2)
    return np.clip(out, 0, 255).astype(np.uint8)
