"""Measure an exported model through the engine, and write what was found: figures, pictures, ``docs/model-card.md``.

Every figure has its control beside it: the same measure on composed pictures of the very scenes that were asked for
(what a perfect model would get), and against another question's answer (chance). Questions are for combinations that
the second edition's training leaves out. Knows the engine and the measures; the card's words are ``model_card``'s.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from impasto.engine.engine import Engine
from training import classifier
from training.places import BUILTIN, GALLERY, ROOT
from training.second import art, measures, model_card
from training.second.features import features
from training.second.hand import Hand
from training.second.judge import Judge
from training.second.judge import trained as trained_judge
from training.second.measures import Pixels
from training.second.places import SECOND
from training.second.preview import sheet
from training.second.questions import RARE, Question, questions
from training.second.render import render
from training.second.scene import CORE, MIDDLE, NEAR, Frame, Ground, Scene, Thing, held_out
from training.second.subjects import COLOURS, STYLES, subjects
from training.second.tables import tabulate
from training.subjects import CAST, SUBJECTS

REPORT, CARD = ROOT / "docs" / "model-card.json", ROOT / "docs" / "model-card.md"
COLUMNS = 8  # of the sheet, which has a row for each kind
SHIFT = 7  # how far questions and answers are shifted against each other in the chance control


@dataclass(frozen=True)
class Eye:
    """Who names subjects and styles: the second edition's judge, or the first's, which knows no styles."""

    judge: Judge | None
    accuracy: float

    def sees(self, picture: Pixels) -> tuple[str, str]:
        """The subject's name and the style's (empty where it cannot tell) of one object on a plain background."""
        given = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        if self.judge is None:
            return SUBJECTS[int(classifier.named(classifier.judge()[0], given)[0])].name, ""
        subject, style = self.judge(given)
        return subjects()[int(subject.argmax())].name, STYLES[int(style.argmax())]


def first_eye() -> Eye:
    """The first edition's judge."""
    return Eye(None, classifier.judge()[1])


@dataclass(frozen=True)
class Seen:
    """What was found on one picture."""

    background: str
    names: tuple[str, ...]
    styles: tuple[str, ...]
    places: tuple[str, ...]


def look(picture: Pixels, eye: Eye, several: bool) -> Seen:
    """Look at a picture: as a whole, or at each object that stands out."""
    spots = measures.objects(picture)
    parts = [measures.cut(picture, spot) for spot in spots[:4]] if several or len(spots) == 1 else [picture]
    told = [eye.sees(part) for part in parts]
    return Seen(
        measures.background(picture),
        tuple(name for name, _ in told),
        tuple(style for _, style in told),
        tuple(measures.place(spot) for spot in sorted(spots, key=lambda spot: spot.x)),
    )


def right(question: Question, seen: Seen) -> dict[str, bool]:
    """Each thing that a picture is asked for, and whether it is there."""
    scene = question.scene
    wanted = [subjects()[thing.subject].name for thing in scene.things]
    several = len(wanted) > 1
    answers = {
        "background": seen.background == COLOURS[scene.ground.colour],
        "object": sorted(seen.names) == sorted(wanted) if several else wanted[0] in seen.names[:1],
    }
    if question.kind in ("two alike", "pair"):
        answers["count"] = len(seen.places) == len(wanted)
    if question.kind in ("single", RARE):
        answers["count"] = len(seen.places) == 1
    if question.kind == "place":
        answers["place"] = seen.places[:1] == (question.prompt.split(" on the ")[1].split()[0],)
    if seen.styles[:1] != ("",) and not several:
        answers["style"] = seen.styles[:1] == (STYLES[scene.style],)
    return answers


def tally(asked: Sequence[Question], seen: Sequence[Seen], shift: int = 0) -> dict[str, dict[str, float]]:
    """Shares of right answers by kind and matter; with a shift each picture answers another question of its kind."""
    found: dict[str, dict[str, list[bool]]] = {}
    for kind in dict.fromkeys(question.kind for question in asked):
        of = [(question, look) for question, look in zip(asked, seen, strict=True) if question.kind == kind]
        for at, (question, _) in enumerate(of):
            for matter, good in right(question, of[(at + shift) % len(of)][1]).items():
                found.setdefault(kind, {}).setdefault(matter, []).append(good)
    return {
        kind: {name: round(float(np.mean(goods)), 4) for name, goods in matters.items()}
        for kind, matters in found.items()
    }


def composed(scene: Scene, drawings: art.Art) -> Pixels:
    """The picture that a scene describes."""
    made: Pixels = (render(tabulate([scene]), drawings)[0].permute(1, 2, 0).double().numpy() + 1) * 127.5
    return made


def copies(
    asked: Sequence[Question], pictures: Sequence[Pixels], drawings: art.Art, tries: int = 40
) -> dict[str, float]:
    """How near generated pictures are to training pictures of the same subject, and how near unseen real ones are.

    Training pictures are composed anew: the subject in the asked style on every colour that training has, at the sizes
    and places it has them. A generated picture that were a copy of one would be nearer than a real unseen one.
    """
    rng = np.random.default_rng(5)
    gaps: list[float] = []
    real: list[float] = []
    for question, picture in zip(asked, pictures, strict=True):
        if question.kind != "single":
            continue
        thing = question.scene.things[0]
        known: list[Pixels] = []
        while len(known) < tries:
            spot = Thing(thing.subject, rng.uniform(*MIDDLE), *(0.5 + rng.uniform(-NEAR, NEAR, 2)))
            made = Scene((spot,), 0, Ground(int(rng.integers(len(COLOURS)))), Frame(64, 64))
            if not held_out(made):
                known.append(measures.thumbnail(composed(made, drawings)))
        for found, given in ((gaps, picture), (real, composed(question.scene, drawings))):
            found.append(min(measures.distance(measures.thumbnail(given), other) for other in known))
    return {"generated": round(float(np.median(gaps)), 4), "unseen_real": round(float(np.median(real)), 4)}


def evaluate(
    hand: Hand, eye: Eye, names: Sequence[str], count: int, more: dict[str, Any], rare: Sequence[str] = ()
) -> tuple[dict[str, Any], Image.Image]:
    """All figures, and a sheet of the first pictures of each kind."""
    drawings, asked = art.load(), questions(names, count, rare=rare)
    began, pictures = time.monotonic(), []
    for question in asked:
        pictures.append(hand.draw(question.prompt, question.seed))
    spent = time.monotonic() - began

    def several(question: Question) -> bool:
        return len(question.scene.things) > 1

    seen = [look(picture, eye, several(q)) for q, picture in zip(asked, pictures, strict=True)]
    real = [look(composed(q.scene, drawings), eye, several(q)) for q in asked]
    report = {
        "subjects": len(names), "rare_subjects": len(rare), "count": count, "questions": len(asked),
        "size": hand.size, "steps": hand.steps, "guidance": hand.guidance,
        "seconds_per_picture": round(spent / len(asked), 2),
        "judge_on_composed_pictures": round(eye.accuracy, 4),
        "generated": tally(asked, seen), "composed": tally(asked, real), "shuffled": tally(asked, seen, SHIFT),
        "nearest_training_picture": copies(asked, pictures, drawings),
        "features": features(hand, names[:3], **more),
    }  # fmt: skip
    shown = [Image.fromarray(picture.astype(np.uint8)) for picture in pictures]
    kinds = [[at for at, q in enumerate(asked) if q.kind == kind] for kind in dict.fromkeys(q.kind for q in asked)]
    return report, sheet([shown[at] for places in kinds for at in places[:COLUMNS]], COLUMNS, side=160)


def main() -> None:
    """Ask, look, write the report, the sheet and the card."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", default="builtin", help="a name or folder that the engine knows")
    asked.add_argument("--refiner", default=None)
    asked.add_argument("--few-steps", type=Path, default=None, help="the LoRA file")
    asked.add_argument("--loras", type=Path, default=BUILTIN / "loras")
    asked.add_argument("--edition", choices=("first", "second"), default="second", help="whose cast and judge")
    asked.add_argument("--cast", type=int, default=CORE, help="how many subjects of the table, the others are rare")
    asked.add_argument("--count", type=int, default=150, help="questions of each kind")
    asked.add_argument("--size", type=int, default=512)
    asked.add_argument("--steps", type=int, default=20)
    asked.add_argument("--guidance", type=float, default=5.0)
    asked.add_argument("--report", type=Path, default=REPORT)
    asked.add_argument("--card", type=Path, default=CARD)
    asked.add_argument("--grid", type=Path, default=GALLERY / "model-card.jpg")
    chosen = asked.parse_args()
    engine = Engine.load(chosen.model, refiner=chosen.refiner, dtype="float32", max_batch=1)
    hand = Hand(engine, chosen.size, chosen.steps, chosen.guidance)
    first = chosen.edition == "first"
    table = [subject.name for subject in subjects()]
    names, rare = (CAST, []) if first else (table[: chosen.cast], table[chosen.cast :])
    eye = first_eye() if first else Eye(*trained_judge(SECOND / "judge.pt"))
    more = {"loras": chosen.loras, "refined": chosen.refiner is not None, "few_steps": chosen.few_steps}
    report, grid = evaluate(hand, eye, names, chosen.count, more, rare)
    report = {"model": Path(chosen.model).name, "edition": chosen.edition} | report
    for path in (chosen.report, chosen.card, chosen.grid):
        path.parent.mkdir(parents=True, exist_ok=True)
    chosen.report.write_text(json.dumps(report, indent=1) + "\n")
    grid.save(chosen.grid, quality=85)
    chosen.card.write_text(model_card.text(report))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
