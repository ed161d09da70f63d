"""What the evaluation asks for: prompts for combinations that training never saw, and what must be on the picture.

Knows scenes and plain wording; one wording for each kind, so that what is measured is the model. Does not know
pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.second.captions import article
from training.second.scene import Frame, Ground, Scene, Thing, held_out
from training.second.subjects import COLOURS, STYLES, subjects

FIRST_SEED = 1_000_000
SIDES = (("left", 0.26, 0.5), ("right", 0.74, 0.5), ("top", 0.5, 0.26), ("bottom", 0.5, 0.74))
KINDS = ("single", "style", "two alike", "pair", "place")
RARE = "rare"  # single objects that training shows less often; a third as many


@dataclass(frozen=True)
class Question:
    """One picture to ask for; ``scene`` is what should be on it, composed to be measured as well, as a control."""

    kind: str
    prompt: str
    scene: Scene
    seed: int


def on(colour: int) -> str:
    """The background in words."""
    return f"on {article(COLOURS[colour])} {COLOURS[colour]} background"


def scene(things: Sequence[tuple[int, float, float, float]], style: int, colour: int) -> Scene:
    """A plain scene at 512 px; things are subject, size, x, y."""
    made = tuple(Thing(subject, size, x, y) for subject, size, x, y in things)
    return Scene(made, style, Ground(colour), Frame(512, 512))


def unseen(rng: np.random.Generator, cast: Sequence[int], kind: str, subject: int) -> tuple[str, Scene]:
    """A prompt of one kind about a subject, and its scene: by lot until it is one that training leaves out."""
    while True:
        colour, name = int(rng.integers(len(COLOURS))), subjects()[subject].name
        if kind == "single":
            prompt, made = f"{article(name)} {name} {on(colour)}", scene([(subject, 0.74, 0.5, 0.5)], 0, colour)
        elif kind == "style":
            style = 1 + int(rng.integers(len(STYLES) - 1))
            words = ("flat icon of", "black and white drawing of")[style - 1]
            prompt, made = (
                f"{words} {article(name)} {name} {on(colour)}",
                scene([(subject, 0.74, 0.5, 0.5)], style, colour),
            )
        elif kind == "two alike":
            things = [(subject, 0.4, 0.26, 0.5), (subject, 0.4, 0.74, 0.5)]
            prompt, made = f"two {subjects()[subject].plural or name} {on(colour)}", scene(things, 0, colour)
        elif kind == "pair":
            other = int(rng.choice([index for index in cast if index != subject]))
            second = subjects()[other].name
            things = [(subject, 0.4, 0.26, 0.5), (other, 0.4, 0.74, 0.5)]
            prompt = f"{article(name)} {name} next to {article(second)} {second} {on(colour)}"
            made = scene(things, 0, colour)
        else:
            side, x, y = SIDES[int(rng.integers(len(SIDES)))]
            prompt, made = (
                f"{article(name)} {name} on the {side} {on(colour)}",
                scene([(subject, 0.42, x, y)], 0, colour),
            )
        if held_out(made):
            return prompt, made


def questions(names: Sequence[str], count: int, seed: int = 0, rare: Sequence[str] = ()) -> list[Question]:
    """So many questions of each kind, over the named subjects in turn, and some singles of ``rare`` ones.

    Raises:
        ValueError: A name is not in the table.
    """
    table = [subject.name for subject in subjects()]
    if unknown := [name for name in (*names, *rare) if name not in table]:
        raise ValueError(f"not in the table of subjects: {', '.join(unknown)}")
    rng = np.random.default_rng((seed, 77))
    cast = [table.index(name) for name in names]
    asked: list[Question] = []
    for kind in KINDS:
        order = [cast[int(i)] for _ in range(-(-count // len(cast))) for i in rng.permutation(len(cast))]
        for subject in order[:count]:
            prompt, made = unseen(rng, cast, kind, subject)
            asked.append(Question(kind, prompt, made, FIRST_SEED + len(asked)))
    for name in rng.permutation(rare)[: -(-count // 3)] if rare else ():
        prompt, made = unseen(rng, cast, "single", table.index(name))
        asked.append(Question(RARE, prompt, made, FIRST_SEED + len(asked)))
    return asked
