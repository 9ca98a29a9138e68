"""Plain facts about one prompt, without a model: its words, its language, what it quotes.

A Chinese character, and one of Japanese kana, counts as a word; elsewhere a word is what stands
between spaces. The language is a rule of thumb whose limits are in docs/prompts.md.
"""

import re
import unicodedata
from collections import Counter
from hashlib import blake2b
from typing import Literal

Language = Literal["en", "zh", "other"]

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_KANA = "\u3040-\u30ff"
_WORD = re.compile(rf"[{_HAN}{_KANA}]|[^\W_{_HAN}{_KANA}]+(?:'[^\W_{_HAN}{_KANA}]+)*")
_LATIN = re.compile(r"[a-z\u00df-\u024f]")

# An apostrophe inside a word neither opens nor closes: 'ROSIE'S DINER' is one quotation.
_QUOTED = re.compile(
    r'"([^"]*)"|\u201c([^\u201d]+)\u201d|\u300c([^\u300d]+)\u300d|\u300e([^\u300f]+)\u300f'
    r"|\uff02([^\uff02]+)\uff02|(?<!\w)\u2018(.+?)\u2019(?!\w)|(?<!\w)'(.+?)'(?!\w)"
)


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Frequent words that tell languages of the Latin script apart. Those that English shares with
# another language (a, in, on, an, de, no, do, as) are left out.
_ENGLISH = _set(
    "the of and with is are to at by from its their his her that under over into for near it "
    "this there while has have wearing holding standing sitting behind between against through "
    "one two three make change remove add replace turn"
)
_FOREIGN = {
    "es": _set("el las una con y que del sobre en por para bajo junto al"),
    "fr": _set("le les un une des du et avec dans sur est aux qui sous devant"),
    "de": _set("der das ein eine einen einem und mit auf im von vor dem den ist"),
    "it": _set("il lo gli una di con che nel della sul sulla sotto un alla"),
    "pt": _set("os um uma em na sobre ao sob numa dos"),
    "nl": _set("het een met op en voor naar onder zijn"),
}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; a Chinese character is one."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return _WORD.findall(plain)


def normal_form(text: str) -> str:
    """What two prompts have in common that differ in case, spacing and punctuation alone."""
    return " ".join(words(text))


def fingerprint(text: str) -> str:
    """16 hex digits of the normal form."""
    return blake2b(normal_form(text).encode(), digest_size=8).hexdigest()


def quotations(text: str) -> list[str]:
    """What stands in quotation marks and holds a letter or a digit, in the order of the text."""
    found = ["".join(groups) for groups in _QUOTED.findall(text)]
    return [quoted.strip() for quoted in found if words(quoted)]


def without_quotations(text: str) -> str:
    return _QUOTED.sub(" ", text)


def language(text: str) -> Language:
    """By script, and for the Latin script by frequent words; quotations are not looked at.

    A text that is only a quotation is judged by it. Latin words without any known frequent word
    count as English where they are pure ASCII.
    """
    found = words(without_quotations(text)) or words(text)
    scripts = Counter(_script(word) for word in found)
    lettered = sum(scripts.values()) - scripts["digit"]
    if lettered and scripts["han"] * 2 >= lettered and scripts["kana"] * 10 < lettered:
        return "zh"
    if not lettered or scripts["latin"] * 2 < lettered:
        return "other"
    english = sum(word in _ENGLISH for word in found)
    foreign = max(sum(word in known for word in found) for known in _FOREIGN.values())
    if english or foreign:
        return "en" if english > foreign else "other"
    return "en" if all(word.isascii() for word in found) else "other"


def _script(word: str) -> str:
    if re.match(f"[{_HAN}]", word):
        return "han"
    if re.match(f"[{_KANA}]", word):
        return "kana"
    if word.isdigit():
        return "digit"
    return "latin" if _LATIN.match(word) else "other"
