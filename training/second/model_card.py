"""The model card's words around the evaluation's figures. Knows the report's layout and nothing of how it is made."""

from __future__ import annotations

from typing import Any

COMMAND = "python -m training.second.evaluate --edition {edition} --count {count} --size {size} --steps {steps}"
MATTERS = ("background", "object", "style", "count", "place")
EDITIONS = {
    "first": """This edition learned 16 subjects in one style (soft 3d), one in
the middle of a plain colour; asking it for two things, for a place or for another style measures what it was never
taught. All its plain combinations were trained on.""",
    "second": """This edition learned hundreds of subjects in three styles, one or
more of them, on plain colours and in sceneries. The combinations below were kept from its training.""",
}
RARE = ", and of {} more that training shows less often (*rare*),"
TEXT = """# Model card of the built-in model

<!-- Written by training.second.evaluate; edit training/second/model_card.py instead. -->

A small text-to-image model with SDXL's architecture, trained from nothing on Fluent Emoji art (MIT, Copyright (c)
Microsoft Corporation). {edition}

It exists so that the service draws a real picture without any download, and so that every feature can be seen and
tested. It is no substitute for SDXL's own weights: it knows emoji-like objects, no people, no text, no photographs.

## Does it draw what it is asked for?

{questions} pictures of {subjects} subjects{rare} at {size} px, {steps} steps, guidance {guidance:g}, seeds from
1,000,000; each share is of right answers. *Composed* is the same measure on pictures composed of the very drawings
asked for: the most that could be had. *Shuffled* judges each picture by another question of its kind: what chance
gives.

{table}

- Background: the named colour nearest to the median of the picture's border. Count and place: what stands out from
  that colour, without any network. Object and style: a judge trained on composed pictures alone, which names
  {judge:.1%} of unseen compositions right; two objects count as right only if both are.
- Copies: the median distance (root mean square, 32x32 thumbnails) to the nearest of 40 training compositions of the
  same subject is {copied:.3f} for generated pictures and {real:.3f} for real compositions that training never saw.
  Well below the latter would mean copying.

![The first pictures of each kind](gallery/model-card.jpg)

## What do the features do?

{features}

## Made by

```sh
{command}
```

The figures are in [model-card.json](model-card.json); the recipe is in `training/`, with what failed in its log.
"""


def percent(value: float | None) -> str:
    """A share in words of a table."""
    return "" if value is None else f"{value:.0%}"


def table(report: dict[str, Any]) -> str:
    """Rows: what was asked for and what of it was looked at; columns: generated, composed, shuffled."""
    rows = ["| asked for | looked at | generated | composed | shuffled |", "|---|---|---|---|---|"]
    for kind, found in report["generated"].items():
        for matter in MATTERS:
            if matter in found:
                values = (report[column][kind].get(matter) for column in ("generated", "composed", "shuffled"))
                rows.append(f"| {kind} | {matter} | {' | '.join(map(percent, values))} |")
    return "\n".join(rows)


def features(found: dict[str, Any]) -> str:
    """A line for each feature that was measured."""
    lines = []
    if squares := found.get("pixel_art_squares"):
        scales = ", ".join(f"{value:.2f} at {scale}" for scale, value in squares.items())
        lines.append(f"- LoRA `pixel-art`, variance within squares of 16 px (1: no squares), by scale: {scales}.")
    seam = found["inpainting"]
    lines.append(
        f"- Inpainting one half: the step across the seam is {seam['seam']:.2f} times those beside it (1: invisible); "
        f"the kept half changed by {seam['kept_part_changed']:.3f} of 255."
    )
    lines.append(f"- Grain of plain backgrounds {found['grain']:.2f} of 255, steepest edges {found['sharpness']:.1f}.")
    if "refined_grain" in found:
        lines.append(
            f"- With the refiner in the last fifth: grain {found['refined_grain']:.2f}, "
            f"edges {found['refined_sharpness']:.1f}."
        )
    else:
        lines.append("- Refiner: none ships with this edition.")
    if few := found.get("few_steps"):
        steps = ", ".join(f"{value:.1f} in {steps} steps" for steps, value in few.items())
        lines.append(f"- Few-step LoRA with the lcm sampler, steepest edges: {steps}.")
    return "\n".join(lines)


def text(report: dict[str, Any]) -> str:
    """The whole card."""
    near = report["nearest_training_picture"]
    count = report["count"]
    command = COMMAND.format(**{key: report[key] for key in ("edition", "size", "steps")}, count=count)
    return TEXT.format(
        edition=EDITIONS[report["edition"]],
        rare=RARE.format(report["rare_subjects"]) if report["rare_subjects"] else "",
        **{key: report[key] for key in ("questions", "subjects", "size", "steps", "guidance")},
        table=table(report),
        judge=report["judge_on_composed_pictures"],
        copied=near["generated"],
        real=near["unseen_real"],
        features=features(report["features"]),
        command=command,
    )
