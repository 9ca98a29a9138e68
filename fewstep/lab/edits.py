"""The six editing categories of the lab: source, arguments and the exact truth of what may change.

An edit that is determined by its source (a recoloured house, a brighter photo) has one true target.
One that leaves something open (where a second balloon goes, how a new sign is lettered, what the
place looks like to which the houses are moved) keeps a part of the source fixed, or none of its
pixels; `Edit.keep` says which, `Edit.exact` says which kind it is.
"""

from dataclasses import dataclass, replace
from io import BytesIO
from typing import Final

import numpy as np
from PIL import Image, ImageFilter

from fewstep.lab.words import EVALUATION_WORDS, training_words
from fewstep.lab.world import (
    ATTRIBUTES,
    INKS,
    SIZE,
    STYLES,
    Scene,
    apply_style,
    is_evaluation,
    render,
    sample_scene,
)

EDIT_CATEGORIES: Final = ("scene", "enhance", "object", "text_edit", "identity", "style")
DEGRADATIONS: Final = ("noise", "blur", "dark", "haze", "jpeg")
LOSSY: Final = ("noise", "blur", "jpeg")  # what they take away is lost: many clean pictures fit

SURROUNDINGS: Final = ("sky", "weather", "terrain")
# shares of the edits that leave most open, of their categories, and of ink among text edits
ELSEWHERE: Final = 0.45
SIGN: Final = 0.45
INK: Final = 0.15


def degrade(image: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """One of `DEGRADATIONS` at a random, visible strength; uint8 in and out."""
    x = image.astype(np.float32)
    if kind == "noise":
        x = x + rng.normal(0, rng.uniform(16, 36), x.shape)
    elif kind == "blur":
        radius = float(rng.uniform(0.8, 1.5))
        x = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)), np.float32)
    elif kind == "dark":
        x = x * rng.uniform(0.25, 0.45)
    elif kind == "haze":
        share = rng.uniform(0.45, 0.65)
        x = x * (1 - share) + share * 214
    else:
        buffer = BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=int(rng.integers(4, 14)))
        x = np.asarray(Image.open(buffer), np.float32)
    return np.clip(x, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Edit:
    """One editing case. `operation` and `argument` are what the instruction grammar words."""

    category: str
    operation: str
    argument: str
    before: Scene
    after: Scene
    seed: int  # of the degradation, where there is one

    @property
    def exact(self) -> bool:
        """Whether source and instruction determine every pixel of the target."""
        return self.category != "scene" and self.operation not in ("add", "replace", "sign")

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """Source and target as uint8 [SIZE, SIZE, 3]; for open edits one of many right targets."""
        target = render(self.after)
        if self.operation == "enhance":
            return degrade(target, self.argument, np.random.default_rng(self.seed)), target
        source = render(self.before)
        if self.operation == "style":
            return source, apply_style(source, self.argument)
        return source, target

    def keep(self) -> np.ndarray:
        """Pixels [SIZE, SIZE] (bool) that a right answer leaves as they are in the source.

        Exact edits: where source and target agree. Scene edits: the landmarks. Added or replaced
        landmarks and signs: what neither drawing touches. Elsewhere nothing stays in its place.
        """
        if self.operation == "elsewhere":
            return np.zeros((SIZE, SIZE), bool)
        if self.category == "scene":
            bare = render(self.before.with_({"count": "no"}))
            return np.abs(render(self.before).astype(int) - bare).max(-1) > 60
        source, target = self.images()
        return np.abs(source.astype(int) - target).max(-1) <= 8


def sample_edit(category: str, rng: np.random.Generator, *, evaluation: bool = False) -> Edit:
    """An editing case whose target belongs to the split; in training, source and target both do."""
    while True:
        edit = _DRAW[category](rng, evaluation)
        if edit is None:
            continue
        sides = (edit.after,) if evaluation else (edit.before, edit.after)
        if all(is_evaluation(s.category, dict(s.attributes)) == evaluation for s in sides):
            return edit


def _other(values: tuple[str, ...], current: str, rng: np.random.Generator) -> str:
    rest = [v for v in values if v != current]
    return rest[rng.integers(len(rest))]


def _change(
    category: str, operation: str, name: str, scene: Scene, value: str, rng: np.random.Generator
) -> Edit:
    return Edit(
        category, operation, value, scene, scene.with_({name: value}), int(rng.integers(2**31))
    )


def _source(category: str, rng: np.random.Generator, evaluation: bool) -> Scene:
    # an evaluation target may come from any source; draw those from both splits
    return sample_scene(category, rng, evaluation=evaluation and rng.random() < 0.5)


def _scene(rng: np.random.Generator, evaluation: bool) -> Edit | None:
    before = _source("landscape", rng, evaluation)
    if rng.random() < ELSEWHERE:
        return _elsewhere(before, rng)
    name = SURROUNDINGS[rng.integers(3)]
    value = _other(ATTRIBUTES["landscape"][name], before[name], rng)
    return _change("scene", name, name, before, value, rng)


def _elsewhere(before: Scene, rng: np.random.Generator) -> Edit | None:
    """The same landmarks in another place: two of three surroundings change, and every pixel."""
    if before["count"] == "no":
        return None
    changed = {
        SURROUNDINGS[i]: _other(
            ATTRIBUTES["landscape"][SURROUNDINGS[i]], before[SURROUNDINGS[i]], rng
        )
        for i in rng.permutation(3)[:2]
    }
    after = replace(before.with_(changed), nuisance=int(rng.integers(2**31)))
    return Edit("scene", "elsewhere", " ".join(changed), before, after, int(rng.integers(2**31)))


def _enhance(rng: np.random.Generator, evaluation: bool) -> Edit:
    category = tuple(ATTRIBUTES)[rng.integers(3)]
    scene = sample_scene(category, rng, evaluation=evaluation)
    kind = DEGRADATIONS[rng.integers(len(DEGRADATIONS))]
    return Edit("enhance", "enhance", kind, scene, scene, int(rng.integers(2**31)))


def _object(rng: np.random.Generator, evaluation: bool) -> Edit | None:
    if rng.random() < 0.2:
        before = _source("portrait", rng, evaluation)
        value = _other(ATTRIBUTES["portrait"]["shirt"], before["shirt"], rng)
        return _change("object", "shirt", "shirt", before, value, rng)
    before = _source("landscape", rng, evaluation)
    if before["count"] == "no":
        return None
    operation = ("colour", "replace", "remove", "add")[rng.integers(4)]
    if operation == "colour":
        value = _other(ATTRIBUTES["landscape"]["colour"], before["colour"], rng)
        return _change("object", "colour", "colour", before, value, rng)
    if operation == "replace":
        value = _other(ATTRIBUTES["landscape"]["landmark"], before["landmark"], rng)
        return _change("object", "replace", "landmark", before, value, rng)
    bare = before.with_({"count": "no", "landmark": "house", "colour": "white"})
    if operation == "remove":
        return Edit("object", "remove", before["landmark"], before, bare, int(rng.integers(2**31)))
    return Edit("object", "add", before["landmark"], bare, before, int(rng.integers(2**31)))


def _text_edit(rng: np.random.Generator, evaluation: bool) -> Edit:
    before = _source("text", rng, evaluation)
    chance = rng.random()
    if chance < SIGN:
        return _sign(before, rng, evaluation)
    if chance < SIGN + INK:
        ink = _other(INKS[before["board"]], before["ink"], rng)
        return _change("text_edit", "ink", "ink", before, ink, rng)
    words = [
        w
        for w in (EVALUATION_WORDS if evaluation else training_words())
        if len(w) == len(before["word"])
    ]
    return _change(
        "text_edit", "word", "word", before, _other(tuple(words), before["word"], rng), rng
    )


def _sign(before: Scene, rng: np.random.Generator, evaluation: bool) -> Edit:
    """Another sign in the same street: board, ink and word are asked for, its lettering is open."""
    other = sample_scene("text", rng, evaluation=evaluation)
    board = _other(tuple(INKS), before["board"], rng)
    ink = INKS[board][rng.integers(len(INKS[board]))]
    after = before.with_({"board": board, "ink": ink, "word": other["word"]})
    after = replace(after, sign=other.nuisance)
    return Edit("text_edit", "sign", other["word"], before, after, int(rng.integers(2**31)))


def _identity(rng: np.random.Generator, evaluation: bool) -> Edit:
    before = _source("portrait", rng, evaluation)
    name = ("mood", "wear", "hair", "hair_colour")[rng.integers(4)]
    value = _other(ATTRIBUTES["portrait"][name], before[name], rng)
    return _change("identity", name, name, before, value, rng)


def _style(rng: np.random.Generator, evaluation: bool) -> Edit:
    category = tuple(ATTRIBUTES)[rng.integers(3)]
    scene = sample_scene(category, rng, evaluation=evaluation)
    style = STYLES[rng.integers(len(STYLES))]
    return Edit("style", "style", style, scene, replace(scene), int(rng.integers(2**31)))


_DRAW: Final = {
    "scene": _scene,
    "enhance": _enhance,
    "object": _object,
    "text_edit": _text_edit,
    "identity": _identity,
    "style": _style,
}
