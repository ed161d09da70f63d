"""Words for a picture: many ways to say the same thing.

Knows templates and the subjects' words. A caption leaves out the style only where it is ``3d`` and the background
only where it is white, so that what a prompt does not say has one meaning. Does not know pictures or token ids.
"""

from __future__ import annotations

import numpy as np

from training.subjects import BACKGROUNDS, STYLES, SUBJECTS

COLOURS = tuple(BACKGROUNDS)
WHITE = COLOURS.index("white")
LEADS = ("a picture of", "an image of", "a drawing of", "an emoji of", "a photo of", "an illustration of")
FILLERS = (
    "high quality",
    "best quality",
    "detailed",
    "highly detailed",
    "beautiful",
    "cute",
    "simple",
    "centered",
    "sharp focus",
    "masterpiece",
    "4k",
    "8k",
    "professional",
    "studio lighting",
    "vivid colors",
    "clean",
    "close up",
    "cinematic",
)
STYLE_BEFORE = {
    "3d": ("3d", "3d render of", "glossy 3d", "soft 3d"),
    "flat": ("flat", "flat icon of", "flat drawing of"),
}
STYLE_AFTER = {"3d": ("3d", "3d style", "3d render"), "flat": ("flat", "flat style", "flat design", "flat vector art")}
GROUNDS = ("on a {} background", "on {} background", "with a {} background", "in front of a {} background", "on {}")
SILENT_STYLE, SILENT_WHITE = 0.6, 0.6


def article(word: str) -> str:
    """``a`` or ``an``, by the first letter (a unicorn is the exception that the table knows)."""
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"


def pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """One of the words."""
    return words[int(rng.integers(len(words)))]


def thing(rng: np.random.Generator, index: int) -> str:
    """The subject itself: its name or a synonym, now and then with its natural colour."""
    subject = SUBJECTS[index]
    noun = pick(rng, subject.synonyms) if subject.synonyms and rng.random() < 0.2 else subject.name
    return f"{subject.colour} {noun}" if subject.colour and rng.random() < 0.15 else noun


def dressed(rng: np.random.Generator, noun: str, style: str | None) -> str:
    """The subject with article, lead words and the style, where the style is said in front."""
    before = pick(rng, STYLE_BEFORE[style]) if style else ""
    if before.endswith(" of"):
        return f"{article(before)} {before} {article(noun)} {noun}"
    words = f"{before} {noun}".strip()
    kind = rng.random()
    if kind < 0.15:
        return words
    phrase = f"{'the' if kind < 0.2 else article(words)} {words}"
    return f"{pick(rng, LEADS)} {phrase}" if rng.random() < 0.15 else phrase


def caption(rng: np.random.Generator, subject: int, style: int, background: int) -> str:
    """One caption for a picture given by its subject, style and background."""
    name, colour = STYLES[style], COLOURS[background]
    says_style = name != "3d" or rng.random() > SILENT_STYLE
    says_ground = background != WHITE or rng.random() > SILENT_WHITE
    in_front = says_style and rng.random() < 0.6
    words = dressed(rng, thing(rng, subject), name if in_front else None)
    extra = [pick(rng, STYLE_AFTER[name])] if says_style and not in_front else []
    if rng.random() < 0.3:
        extra += [pick(rng, FILLERS) for _ in range(int(rng.integers(1, 4)))]
    if says_ground:
        if rng.random() < 0.8:
            ground = pick(rng, GROUNDS).format(colour)
            words = f"{words} {ground.replace(' a ', f' {article(colour)} ')}"
        else:
            extra.append(f"{colour} background")
    rng.shuffle(extra)
    if extra and rng.random() < 0.15:
        return ", ".join([extra[0], words, *extra[1:]])
    return ", ".join([words, *extra])


def every_word() -> list[str]:
    """Whatever a caption can hold, for the vocabulary."""
    words = [*LEADS, *FILLERS, *GROUNDS, *COLOURS, "a an the , background icon"]
    words += [w for table in (STYLE_BEFORE, STYLE_AFTER) for values in table.values() for w in values]
    for subject in SUBJECTS:
        words += [subject.name, *subject.synonyms, subject.colour]
    return words
