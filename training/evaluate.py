"""Measure the shipped model: does it draw what the prompt asks, on the colour it asks for?

Generates through diffusers' own pipeline with seeds that training never used. Background: the median of the border,
nearest named colour. Object: a judge trained on the same art (``classifier``), with two controls beside it: its
accuracy on composed pictures, and its score when every picture is judged against another prompt's subject.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from training.captions import article
from training.classifier import judge, named
from training.places import BUILTIN, CACHE, GALLERY
from training.subjects import BACKGROUNDS, CAST, CAST_STYLE, SUBJECTS

FIRST_SEED = 1_000_000
COLOURS = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Question:
    """One picture to ask for, and what should be on it."""

    prompt: str
    subject: int
    colour: str
    seed: int


@dataclass(frozen=True)
class Answer:
    """What was found on the picture."""

    question: Question
    colour: str
    subject: int


def questions(each: int) -> list[Question]:
    """So many prompts for every subject of the cast, in turn plain, with its colour, without background, as 3d."""
    asked: list[Question] = []
    for turn in range(each):
        for index, subject in enumerate(SUBJECTS):
            if subject.name not in CAST:
                continue
            colour = COLOURS[(3 * index + 7 * turn) % len(COLOURS)]
            name = f"{subject.colour} {subject.name}" if turn % 4 == 1 and subject.colour else subject.name
            style = f"{CAST_STYLE} " if turn % 4 == 3 else ""
            prompt = f"{article(style + name)} {style}{name} on {article(colour)} {colour} background"
            if turn % 4 == 2:
                prompt, colour = f"{article(name)} {name}", "white"
            asked.append(Question(prompt, index, colour, FIRST_SEED + len(asked)))
    return asked


def nearest(colour: np.ndarray) -> str:
    """The named background closest to an RGB value."""
    return min(COLOURS, key=lambda name: float(np.abs(colour - np.array(BACKGROUNDS[name])).sum()))


def border(picture: np.ndarray) -> np.ndarray:
    """The median colour of a frame of a twentieth of the side."""
    width = max(1, min(picture.shape[:2]) // 20)
    middle = np.zeros(picture.shape[:2], bool)
    middle[width:-width, width:-width] = True
    return np.asarray(np.median(picture[~middle], 0))


def draw(
    pipeline: StableDiffusionXLPipeline, asked: list[Question], size: int, steps: int, guidance: float
) -> list[Image.Image]:
    """The pictures, a few at a time."""
    pictures: list[Image.Image] = []
    for at in range(0, len(asked), 4):
        some = asked[at : at + 4]
        pictures += pipeline(
            [question.prompt for question in some],
            width=size,
            height=size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(question.seed) for question in some],
        ).images
    return pictures


def grade(asked: list[Question], pictures: list[Image.Image]) -> tuple[list[Answer], float]:
    """What each picture shows, and the judge's accuracy on real pictures."""
    made, control = judge()
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    stack = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    guesses = [int(i) for i in named(made, stack)]
    answers = [
        Answer(question, nearest(border(array)), guess)
        for question, array, guess in zip(asked, arrays, guesses, strict=True)
    ]
    return answers, control


def summary(answers: list[Answer], control: float) -> dict[str, object]:
    """The figures of the report."""
    right = np.array([answer.subject == answer.question.subject for answer in answers])
    wanted = np.array([answer.question.subject for answer in answers])
    given = np.array([answer.subject for answer in answers])
    per = {SUBJECTS[i].name: float(right[wanted == i].mean()) for i in np.unique(wanted)}
    ranked = sorted(per, key=lambda name: -per[name])
    colour = np.array([answer.colour == answer.question.colour for answer in answers])
    return {
        "pictures": len(answers),
        "background_accuracy": round(float(colour.mean()), 4),
        "object_accuracy": round(float(right.mean()), 4),
        "subjects": len(per),
        "control_judge_on_real_pictures": round(control, 4),
        "control_shuffled_prompts": round(float((given == np.roll(wanted, 17)).mean()), 4),
        "per_subject": {name: per[name] for name in ranked},
        "wrong": [
            {
                **asdict(a.question),
                "subject": SUBJECTS[a.question.subject].name,
                "seen_colour": a.colour,
                "seen_subject": SUBJECTS[a.subject].name,
            }
            for a in answers
            if a.subject != a.question.subject or a.colour != a.question.colour
        ],
    }


def grid(pictures: list[Image.Image], path: Path, columns: int = 8, side: int = 144) -> None:
    """All pictures on one sheet."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(
            picture.resize((side, side), Image.Resampling.LANCZOS), ((i % columns) * side, (i // columns) * side)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=85)


def main() -> None:
    """Ask, grade, write the report and the sheet."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", type=Path, default=BUILTIN)
    asked.add_argument("--size", type=int, default=512)
    asked.add_argument("--steps", type=int, default=20)
    asked.add_argument("--guidance", type=float, default=5.0)
    asked.add_argument("--each", type=int, default=4, help="pictures for every subject")
    asked.add_argument("--report", type=Path, default=CACHE / "evaluation.json")
    asked.add_argument("--grid", type=Path, default=GALLERY / "builtin-grid.jpg")
    chosen = asked.parse_args()
    pipeline = StableDiffusionXLPipeline.from_pretrained(chosen.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = questions(chosen.each)
    began = time.monotonic()
    pictures = draw(pipeline, wanted, chosen.size, chosen.steps, chosen.guidance)
    spent = time.monotonic() - began
    answers, control = grade(wanted, pictures)
    report = summary(answers, control)
    report |= {"size": chosen.size, "steps": chosen.steps, "guidance": chosen.guidance, "seconds": round(spent, 1)}
    chosen.report.parent.mkdir(parents=True, exist_ok=True)
    chosen.report.write_text(json.dumps(report, indent=1) + "\n")
    grid(pictures[:48], chosen.grid)
    print(json.dumps({k: v for k, v in report.items() if k not in ("wrong", "per_subject")}, indent=1))


if __name__ == "__main__":
    main()
