"""A prompt's category by rule: words that speak for it, counted, the early ones twice.

The built-in rules are for the categories of the paper (arXiv 2606.03746), in English and Chinese.
How often they are right is measured in docs/prompts.md. An own category brings its own rule.
"""

from collections.abc import Mapping
from functools import cache
from typing import Literal

from fewstep.prompts.text import quotations, words
from fewstep.recipe.schema import Strict

Kind = Literal["prompt", "instruction"]
OTHER = "other"
HEAD = 12
"""The first words say what a picture is of; a match that begins there counts twice."""


class Rule(Strict):
    strong: tuple[str, ...] = ()
    """Words or phrases worth 2 points each, singular; every occurrence counts."""
    weak: tuple[str, ...] = ()
    """Worth 1 point each."""
    against: tuple[str, ...] = ()
    """Worth -2 points each."""
    quote: float = 0.0
    """Points for a prompt that quotes text."""
    least: float = 2.0
    """Points below which the category is not considered."""


def points(rule: Rule, text: str) -> float:
    """The sum over all matches, at their worth."""
    found = [_singular(word) for word in words(text)]
    spaced = f" {' '.join(found)} "
    head = len(" ".join(found[:HEAD])) + 1
    total = rule.quote if rule.quote and quotations(text) else 0.0
    for phrases, worth in ((rule.strong, 2), (rule.weak, 1), (rule.against, -2)):
        for phrase in phrases:
            wanted = _wanted(phrase)
            at = spaced.find(wanted)
            while at >= 0:
                total += worth * (2 if at < head else 1)
                at = spaced.find(wanted, at + 1)
    return total


def category_by_rule(text: str, rules: Mapping[str, Rule]) -> str:
    """The category of most points, of equals the first named; `other` where none has enough."""
    best, most = OTHER, 0.0
    for category, rule in rules.items():
        scored = points(rule, text)
        if scored >= rule.least and scored > most:
            best, most = category, scored
    return best


@cache
def _wanted(phrase: str) -> str:
    return f" {' '.join(_singular(word) for word in words(phrase))} "


def _singular(word: str) -> str:
    """Only a final s; applied to the rule and to the prompt alike, so `dress` does no harm."""
    return word[:-1] if len(word) > 3 and word.endswith("s") else word


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.replace("\n", ",").split(",") if phrase.strip())


BUILTIN: dict[Kind, dict[str, Rule]] = {
    "prompt": {
        "text": Rule(
            quote=4,
            strong=_phrases(
                """that reads, that read, that says, that say, reading the, saying, the words,
                the word, the text, lettering, typography, headline, slogan, written in,
                inscription, handwritten, infographic, calligraphy that, engraved with, title reads,
                caption reads, 写着, 印着, 标题, 文字, 字样, 标语, 书写, 题字"""
            ),
            weak=_phrases(
                """poster, sign, signboard, banner, menu, label, book cover, billboard, logo,
                written, letter, font, flyer, chalkboard, whiteboard, newspaper, magazine cover,
                slide, 海报, 招牌, 字体, 菜单, 横幅, 标签, 封面"""
            ),
        ),
        "portrait": Rule(
            strong=_phrases(
                """portrait, headshot, selfie, close up of a woman, close up of a man,
                half body, upper body, bust of, face of, 肖像, 人像, 半身, 特写, 自拍"""
            ),
            weak=_phrases(
                """woman, man, girl, boy, person, lady, gentleman, child, children, women, men,
                grandmother, grandfather, bride, soldier, dancer, farmer, king, queen, princess,
                musician, chef, nurse, doctor, fisherman, boxer, elder, toddler, teenager, face,
                eye, hair, skin, smile, gaze, expression, freckle, beard, wrinkle, cheek, wearing,
                looking at the camera, shallow depth of field, 女子, 女人, 男子, 男人, 女孩, 男孩,
                老人, 少女, 女性, 男性, 眼神, 头发, 皮肤, 微笑, 面部, 表情, 身穿"""
            ),
        ),
        "landscape": Rule(
            strong=_phrases(
                """landscape, seascape, cityscape, skyline, vista, panorama, scenery, mountain,
                valley, canyon, waterfall, glacier, fjord, meadow, coastline, countryside, dune,
                aerial view, 风景, 山脉, 峡谷, 瀑布, 草原, 湖泊, 山水, 森林, 海岸, 雪山"""
            ),
            weak=_phrases(
                """forest, lake, river, sea, ocean, beach, beaches, desert, hill, cliff, field,
                island, sky, skies, cloud, horizon, sunset, sunrise, dawn, dusk, mist, fog, snow,
                coast, shore, wave, tree, grass, village, city, cities, street, harbour, harbor,
                bridge, garden, path, pine, rock, volcano, aurora, moon, star, 大海, 天空, 云, 日落,
                日出, 沙滩, 沙漠, 河流, 树, 村庄, 城市, 街道, 雪, 星空, 雾"""
            ),
            against=_phrases("still life, diagram, logo, icon"),
        ),
    },
    "instruction": {
        "text_edit": Rule(
            quote=3,
            strong=_phrases("the text, the word, the words, caption, lettering, typo, 文字, 的字"),
            weak=_phrases("title, headline, label, font, spell, letter, slogan, reads, says, 标题"),
        ),
        "style": Rule(
            strong=_phrases(
                """style, watercolour, watercolor, oil painting, sketch, cartoon, anime, pixel art,
                impressionist, pop art, woodcut, ukiyo e, cubist, line drawing, 风格, 水彩, 油画,
                素描, 动漫"""
            ),
            weak=_phrases("painting, drawing, render, illustration, comic, mosaic, 画, 卡通"),
        ),
        "enhance": Rule(
            strong=_phrases(
                """deblur, denoise, dehaze, sharpen, sharper, noise, blur, blurry, haze, hazy,
                low light, brighten, exposure, contrast, resolution, restore, enhance, artifact,
                artefact, white balance, colourise, colorize, watermark, scratches, rain streak,
                raindrop, shadow, clearer, 去噪, 清晰, 去雾, 增强, 修复, 提亮, 模糊"""
            ),
            weak=_phrases("clear, quality, detail, brightness, darker, lighter, saturation, rain"),
        ),
        "scene": Rule(
            strong=_phrases(
                """background, season, weather, winter, summer, autumn, spring, at night,
                night time, nighttime, snowy, sunset, backdrop, scene, setting, surrounding, 背景,
                季节, 天气, 夜晚, 冬天, 场景"""
            ),
            weak=_phrases("sky, night, rainy, snow, beach, forest, desert, city, street, fog"),
        ),
        # Its verbs are those of every edit: they decide only where nothing else speaks louder.
        "object": Rule(
            weak=_phrases(
                """remove, add, replace, delete, swap, erase, insert, put, move, take away, color,
                colour, recolor, recolour, dye, object, bigger, smaller, count, change,
                添加, 移除, 替换, 去掉, 删除, 颜色"""
            ),
            least=1,
        ),
        "identity": Rule(
            strong=_phrases(
                """same person, hairstyle, facial expression, identity, makeup, her hair,
                his hair, the person smile, older, younger, haircut, beard, moustache, mustache,
                her pose, his pose, 发型, 表情, 同一个人, 妆容"""
            ),
            weak=_phrases(
                """hair, smile, glasses, pose, face, expression, woman, man, person, girl, boy, age,
                outfit, she, he, her, his, 人物, 女子, 男子, 微笑, 眼镜"""
            ),
        ),
    },
}
