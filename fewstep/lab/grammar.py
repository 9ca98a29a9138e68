"""How the lab speaks: captions for scenes, instructions for edits, and the tokenizer of both.

A caption may leave attributes out (`Phrase.says` names those it mentions), as real captions do; a
judge must only ask for what was said.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Final

import numpy as np

from fewstep.errors import DataError
from fewstep.lab.edits import Edit
from fewstep.lab.glyphs import LETTERS
from fewstep.lab.world import Scene

SAYING: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "sky": {
        "noon": ("at noon", "in daylight", "at midday"),
        "sunset": ("at sunset", "at dusk", "in the evening"),
        "night": ("at night", "after dark", "at midnight"),
    },
    "weather": {
        "clear": ("clear weather", "no clouds"),
        "cloudy": ("cloudy", "some clouds"),
        "rainy": ("rain", "a rainy day", "rain falling"),
        "snowy": ("snow", "snow falling", "a snowy day"),
    },
    "terrain": {
        "mountains": ("in the mountains", "below mountains"),
        "hills": ("on green hills", "in the hills"),
        "sea": ("by the sea", "on the sea"),
        "desert": ("in the desert", "on desert sand"),
    },
    "board": {
        "wooden": ("a wooden sign", "a sign of wood"),
        "paper": ("a paper poster", "a poster"),
        "screen": ("a screen", "a dark display"),
        "enamel": ("an enamel plate", "a green plate"),
    },
    "mood": {
        "happy": ("happy", "smiling"),
        "sad": ("sad", "unhappy"),
        "surprised": ("surprised", "amazed"),
    },
    "wear": {
        "nothing": ("nothing on the head",),
        "glasses": ("wearing glasses", "with glasses"),
        "hat": ("wearing a hat", "with a hat"),
        "scarf": ("wearing a scarf", "with a scarf"),
    },
    "hair": {"short": ("short",), "long": ("long",), "curly": ("curly",)},
}
READING: Final = ("reading", "that says", "with the word")
PLURAL: Final = {"house": "houses", "tower": "towers", "balloon": "balloons", "flag": "flags"}
STYLE_NAMES: Final = {
    "sketch": ("a pencil sketch", "a drawing"),
    "sepia": ("a sepia photo", "an old photo"),
    "pixels": ("pixel art", "a mosaic"),
    "negative": ("a photo negative", "inverted colours"),
}
REPAIRS: Final = {
    "noise": ("remove the noise", "denoise the photo"),
    "blur": ("sharpen the photo", "remove the blur"),
    "dark": ("brighten the photo", "the photo is too dark , fix it"),
    "haze": ("remove the haze", "clear the fog"),
    "jpeg": ("remove the compression artefacts", "clean up the blocks"),
}
MENTION: Final = 0.88  # chance that a caption mentions an attribute it could leave out


@dataclass(frozen=True)
class Phrase:
    """A caption or instruction and the attributes it mentions."""

    text: str
    says: tuple[str, ...]


def spell(word: str) -> str:
    return f'" {word} "'


def caption(scene: Scene, rng: np.random.Generator) -> Phrase:
    """A caption of the scene: one of several templates, synonyms, and some attributes left out."""
    return {"landscape": _landscape, "portrait": _portrait, "text": _text}[scene.category](
        scene, rng
    )


def _pick(values: tuple[str, ...], rng: np.random.Generator) -> str:
    return values[rng.integers(len(values))]


def _say(name: str, scene: Scene, rng: np.random.Generator) -> str:
    return _pick(SAYING[name][scene[name]], rng)


def landmarks(scene: Scene, *, colour: bool = True) -> str:
    """The counted, coloured noun: `two red houses`."""
    noun = scene["landmark"] if scene["count"] == "one" else PLURAL[scene["landmark"]]
    return " ".join([scene["count"], *([scene["colour"]] if colour else []), noun])


def _landscape(scene: Scene, rng: np.random.Generator) -> Phrase:
    says = [name for name in ("sky", "weather", "terrain") if rng.random() < MENTION]
    parts = [_say(name, scene, rng) for name in says]
    if scene["count"] == "no":
        things = _pick(("an empty landscape", "nothing but landscape"), rng)
        says.append("count")
    else:
        colour = rng.random() < MENTION
        things = landmarks(scene, colour=colour)
        says += ["count", "landmark", *(["colour"] if colour else [])]
    rng.shuffle(parts)
    first = rng.random() < 0.6
    order = [things, *parts] if first else [*parts, things]
    return Phrase(" , ".join(order), tuple(says))


def _portrait(scene: Scene, rng: np.random.Generator) -> Phrase:
    says = [n for n in ("mood", "wear", "shirt", "hair", "hair_colour") if rng.random() < MENTION]
    hair = " ".join(
        [
            scene[n] if n == "hair_colour" else _say(n, scene, rng)
            for n in ("hair", "hair_colour")
            if n in says
        ]
    )
    who = _pick(("person", "portrait of a person", "face"), rng)
    parts = [f"{hair} hair"] if hair else []
    if "wear" in says:
        parts.append(_say("wear", scene, rng))
    if "shirt" in says:
        parts.append(f"{scene['shirt']} shirt")
    rng.shuffle(parts)
    head = who if "mood" not in says else f"{who} , {_say('mood', scene, rng)}"
    return Phrase(" , ".join([head, *parts]), tuple(says))


def _text(scene: Scene, rng: np.random.Generator) -> Phrase:
    says = ["word", *(n for n in ("board", "ink") if rng.random() < MENTION)]
    board = _say("board", scene, rng) if "board" in says else "something"
    ink = f"in {scene['ink']}" if "ink" in says else ""
    text = f"{board} {_pick(READING, rng)} {spell(scene['word'])} {ink}".strip()
    return Phrase(text, tuple(says))


def instruction(edit: Edit, rng: np.random.Generator) -> Phrase:
    """An instruction for the edit. `says` names the attribute that must change."""
    return Phrase(_INSTRUCT[edit.operation](edit, rng), (edit.operation,))


def _ask_saying(name: str, verbs: tuple[str, ...]):
    def ask(edit: Edit, rng: np.random.Generator) -> str:
        return f"{_pick(verbs, rng)} {_say(name, edit.after, rng)}"

    return ask


def _ask_colour(edit: Edit, rng: np.random.Generator) -> str:
    noun = (
        edit.before["landmark"]
        if edit.before["count"] == "one"
        else PLURAL[edit.before["landmark"]]
    )
    return _pick((f"paint the {noun} {edit.argument}", f"make the {noun} {edit.argument}"), rng)


def _ask_replace(edit: Edit, rng: np.random.Generator) -> str:
    old, new = edit.before["landmark"], edit.after["landmark"]
    if edit.before["count"] != "one":
        old, new = PLURAL[old], PLURAL[new]
    return _pick((f"replace the {old} with {new}", f"turn the {old} into {new}"), rng)


def _ask_remove(edit: Edit, rng: np.random.Generator) -> str:
    noun = edit.argument if edit.before["count"] == "one" else PLURAL[edit.argument]
    return f"{_pick(('remove', 'take away'), rng)} the {noun}"


def _ask_add(edit: Edit, rng: np.random.Generator) -> str:
    return f"{_pick(('add', 'put in'), rng)} {landmarks(edit.after)}"


def _ask_word(edit: Edit, rng: np.random.Generator) -> str:
    new, old = spell(edit.after["word"]), spell(edit.before["word"])
    return _pick(
        (f"change the word to {new}", f"write {new} on it", f"replace {old} with {new}"), rng
    )


def _ask_sign(edit: Edit, rng: np.random.Generator) -> str:
    verb = _pick(("replace it with", "turn it into", "put up"), rng)
    board, reading = _say("board", edit.after, rng), _pick(READING, rng)
    return f"{verb} {board} {reading} {spell(edit.after['word'])} in {edit.after['ink']}"


def _ask_elsewhere(edit: Edit, rng: np.random.Generator) -> str:
    noun = edit.before["landmark"]
    noun = noun if edit.before["count"] == "one" else PLURAL[noun]
    verb = _pick((f"put the {noun} into a landscape", f"show the {noun} in a landscape"), rng)
    return " , ".join([verb, *(_say(name, edit.after, rng) for name in edit.argument.split())])


def _ask_wear(edit: Edit, rng: np.random.Generator) -> str:
    old, new = edit.before["wear"], edit.after["wear"]
    thing = new if new == "glasses" else f"a {new}"
    if new == "nothing":
        return _pick((f"take off the {old}", f"remove the {old}"), rng)
    if old == "nothing":
        return _pick((f"add {thing}", f"put on {thing}"), rng)
    return f"replace the {old} with {thing}"


_INSTRUCT: Final = {
    "sky": _ask_saying("sky", ("show it", "make it")),
    "weather": _ask_saying("weather", ("make it", "change the weather to")),
    "terrain": _ask_saying("terrain", ("place it", "move it")),
    "enhance": lambda edit, rng: _pick(REPAIRS[edit.argument], rng),
    "shirt": lambda edit, rng: (
        _pick(("make the shirt", "dye the shirt"), rng) + f" {edit.argument}"
    ),
    "colour": _ask_colour,
    "replace": _ask_replace,
    "remove": _ask_remove,
    "add": _ask_add,
    "ink": lambda edit, rng: f"make the letters {edit.argument}",
    "word": _ask_word,
    "sign": _ask_sign,
    "elsewhere": _ask_elsewhere,
    "mood": _ask_saying("mood", ("make the person look", "make the face")),
    "wear": _ask_wear,
    "hair": lambda edit, rng: f"give the person {edit.argument} hair",
    "hair_colour": lambda edit, rng: f"dye the hair {edit.argument}",
    "style": lambda edit, rng: (
        _pick(("turn it into", "make it"), rng) + f" {_pick(STYLE_NAMES[edit.argument], rng)}"
    ),
}

# --- tokenizer ----------------------------------------------------------------------------------

_FIXED: Final = """
    a an the of in on at by to it with into portrait person face hair shirt letters word landscape
    empty nothing but something reading that says , give make show place move paint dye replace turn
    remove take away off put add change write look weather no one two three red yellow blue white
    black brown blond green purple orange pink house tower balloon flag glasses hat scarf
"""


@cache
def vocabulary() -> Mapping[str, int]:
    """Word or letter to token id; 0 is padding. A letter has one id for each of its five places."""
    phrases = [_FIXED, *PLURAL.values()]
    for table in (*SAYING.values(), STYLE_NAMES, REPAIRS):
        phrases += [text for texts in table.values() for text in texts]
    words = sorted({w for phrase in phrases for w in phrase.split()})
    letters = [f"{place}:{letter}" for place in range(5) for letter in LETTERS]
    return {word: i + 1 for i, word in enumerate([*words, *letters])}


def encode(text: str) -> list[int]:
    """Token ids of a prompt; a word in double quotes is spelled, each letter with its place.

    Raises DataError for a word the lab does not know, with the nearest known one.
    """
    ids: list[int] = []
    known = vocabulary()
    for quoted, plain in re.findall(r'"\s*([^"]*?)\s*"|([^"]+)', text):
        if quoted:
            ids += _encode_letters(quoted)
            continue
        for word in plain.lower().replace(",", " , ").split():
            if word not in known:
                near = get_close_matches(word, [w for w in known if ":" not in w], n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise DataError(
                    f"prompt {text!r}: the lab's teachers do not know the word '{word}'{hint} "
                    "(`fewstep lab words` lists what they know; sign texts go in double quotes)"
                )
            ids.append(known[word])
    if not ids:
        raise DataError(
            "prompt: empty; say what to draw, for example 'two red houses , by the sea'"
        )
    return ids


def _encode_letters(word: str) -> list[int]:
    word = word.upper()
    bad = sorted(set(word) - set(LETTERS))
    if bad or not 1 <= len(word) <= 5:
        raise DataError(
            f"prompt: sign text {word!r} needs 1 to 5 letters out of {LETTERS}"
            + (f"; not {', '.join(map(repr, bad))}" if bad else "")
        )
    return [vocabulary()[f"{place}:{letter}"] for place, letter in enumerate(word)]
