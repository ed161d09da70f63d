"""Words for a scene: many ways to say the same thing.

Knows templates and the subjects' words. What a caption leaves out has one meaning: 3d, white, one object, in the
middle, of middle size, by day. Does not know pictures or token ids.
"""

from __future__ import annotations

import numpy as np

from training.captions import FILLERS, LEADS, pick
from training.second.scene import Ground, Scene
from training.second.subjects import COLOURS, LANDS, SKIES, STYLES, subjects

WHITE = COLOURS.index("white")
STYLE_BEFORE = {
    "3d": ("3d", "3d render of", "glossy 3d", "soft 3d"),
    "flat": ("flat", "flat icon of", "flat drawing of", "flat illustration of"),
    "mono": ("black and white", "monochrome", "grayscale", "black and white drawing of"),
}
STYLE_AFTER = {
    "3d": ("3d", "3d style", "3d render"),
    "flat": ("flat", "flat style", "flat design", "flat vector art"),
    "mono": ("black and white", "monochrome", "grayscale", "black and white drawing"),
}
GROUNDS = ("on a {} background", "on {} background", "with a {} background", "in front of a {} background", "on {}")
LAND_WORDS = {
    "sky": ("in the sky", "sky", "clear sky"),
    "desert": ("in the desert", "in a desert", "desert", "desert landscape", "on sand"),
    "meadow": ("in a meadow", "on grass", "meadow", "in the field", "grass"),
    "sea": ("at sea", "on the sea", "on the ocean", "sea", "ocean", "on water"),
    "snow": ("in the snow", "snow", "snowy landscape", "in winter"),
}
SKY_WORDS = {
    "day": ("by day", "blue sky", "sunny day"),
    "sunset": ("at sunset", "sunset", "sunset sky", "at dusk", "in the evening"),
    "night": ("at night", "night", "night sky", "starry night", "under the stars"),
}
MOUNTAIN_WORDS = ("with mountains", "in front of mountains", "mountains", "mountain", "mountains in the background")
PLACE_WORDS = ("on the {}", "at the {}", "in the {}")
SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big", "huge")}
BESIDE = ("and", "next to", "beside", "and also")
OVER = ("over", "above", "on top of")
UNDER = ("under", "below")
COUNTS = {2: ("two", "2", "a pair of"), 3: ("three", "3")}
MORE_FILLERS = (
    "style", "realistic", "photo", "illustration", "artwork", "by an artist", "trending", "hd", "sharp", "colorful",
    "bright", "soft light", "riding", "landscape", "scenery", "view", "concept art", "digital art", "ultra detailed",
)  # fmt: skip


def article(word: str) -> str:
    """``a`` or ``an``, by the first letter (unicorn and ufo are said with a y)."""
    return "an" if word[0] in "aeiou" and not word.startswith(("uni", "ufo", "eu")) else "a"


def noun(rng: np.random.Generator, index: int) -> str:
    """A subject by name or synonym, now and then with its natural colour."""
    subject = subjects()[index]
    said = pick(rng, subject.synonyms) if subject.synonyms and rng.random() < 0.2 else subject.name
    return f"{subject.colour} {said}" if subject.colour and rng.random() < 0.1 else said


def counted(rng: np.random.Generator, index: int, count: int) -> str:
    """So many of one subject."""
    subject = subjects()[index]
    return f"{pick(rng, COUNTS[count])} {subject.plural or subject.name}"


def with_article(rng: np.random.Generator, words: str) -> str:
    """The words with ``a``, ``the`` or nothing before them."""
    kind = rng.random()
    if kind < 0.15:
        return words
    return f"{'the' if kind < 0.2 else article(words)} {words}"


def objects(rng: np.random.Generator, scene: Scene) -> list[str]:
    """The objects in words: one phrase, or a bare list of nouns."""
    names = [thing.subject for thing in scene.things]
    if not names:
        return []
    if len(names) > 1 and len(set(names)) == 1:
        return [counted(rng, names[0], len(names))]
    if len(names) == 1:
        size = f"{pick(rng, SIZE_WORDS[scene.said])} " if scene.said in SIZE_WORDS else ""
        return [with_article(rng, f"{size}{noun(rng, names[0])}")]
    first, second = (with_article(rng, noun(rng, index)) for index in names)
    if scene.said == "over":
        below = rng.random() < 0.25
        return [f"{second} {pick(rng, UNDER)} {first}" if below else f"{first} {pick(rng, OVER)} {second}"]
    kind = rng.random()
    if kind < 0.15:
        return [f"{first} to the left of {second}"]
    if kind < 0.3:
        return [f"{second} to the right of {first}"]
    return [f"{first} {pick(rng, BESIDE)} {second}"]


def behind(rng: np.random.Generator, ground: Ground) -> tuple[str, list[str]]:
    """The background: words that join the objects' phrase, and words that stand apart."""
    if ground.plain:
        if ground.colour == WHITE and rng.random() < 0.6:
            return "", []
        colour = COLOURS[ground.colour]
        if rng.random() < 0.2:
            return "", [f"{colour} background"]
        return pick(rng, GROUNDS).format(colour).replace(" a ", f" {article(colour)} "), []
    land, sky = LANDS[ground.land], SKIES[ground.sky]
    words = [pick(rng, LAND_WORDS[land])] if land != "sky" or sky == "day" or rng.random() < 0.5 else []
    if sky != "day" or rng.random() < 0.3:
        words.append(pick(rng, SKY_WORDS[sky]))
    if ground.mountains:
        words.append(pick(rng, MOUNTAIN_WORDS))
    if rng.random() < 0.5:
        return " ".join(words), []
    return "", words


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """One caption for a scene."""
    style = STYLES[scene.style]
    says_style = bool(scene.things) and (style != "3d" or rng.random() > 0.65)
    phrases = objects(rng, scene)
    joined, apart = behind(rng, scene.ground)
    if says_style and rng.random() < 0.5:
        before = pick(rng, STYLE_BEFORE[style])
        phrases[0] = f"{before} {phrases[0]}"
    elif says_style:
        apart.append(pick(rng, STYLE_AFTER[style]))
    elif phrases and rng.random() < 0.1:
        phrases[0] = f"{pick(rng, LEADS)} {phrases[0]}"
    place = scene.said
    if place and scene.said not in (*SIZE_WORDS, "beside", "over", "three"):
        phrases[0] += f" {pick(rng, PLACE_WORDS).format(place)}"
    if joined:
        phrases = [f"{phrases[0]} {joined}", *phrases[1:]] if phrases else [joined]
    if rng.random() < 0.25:
        apart += [pick(rng, FILLERS + MORE_FILLERS) for _ in range(int(rng.integers(1, 3)))]
    rng.shuffle(apart)
    if not phrases or (apart and rng.random() < 0.1):
        phrases = [*apart[:1], *phrases]
        apart = apart[1:]
    return ", ".join([*phrases, *apart])


def every_word() -> list[str]:
    """Whatever a caption can hold, for the vocabulary."""
    words = [*LEADS, *FILLERS, *MORE_FILLERS, *GROUNDS, *COLOURS, *BESIDE, *OVER, *UNDER, *MOUNTAIN_WORDS]
    words += ["a an the , background icon brown to of left right top bottom in at on center middle of the picture"]
    tables = (STYLE_BEFORE, STYLE_AFTER, LAND_WORDS, SKY_WORDS, SIZE_WORDS, COUNTS)
    words += [word for table in tables for values in table.values() for word in values]
    for subject in subjects():
        words += [subject.name, subject.plural, *subject.synonyms, subject.colour]
    return [word for word in words if word]
