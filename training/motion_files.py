"""The shipped motion adapter's files: diffusers' names, half precision, configuration and card beside the weights.

Knows the folder's layout. Does not know how the layers are learned.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.places import BUILTIN
from training.poses import MOTIONS

MOTION = BUILTIN / "motion"
WEIGHTS = "diffusion_pytorch_model.fp16.safetensors"
SCHEDULE = "scheduler_config.json"
LIMIT_BYTES = 8_000_000

README = """# The motion adapter of the built-in model

Layers between the frames, in the layout of AnimateDiff's motion adapters (diffusers' `MotionAdapter`), for the built-in
model only; experimental. They keep frames that begin with a moving picture one video. They were trained to move it by
themselves as well, each subject in its way, in a loop of eight frames, and do so barely:

| motion | subjects |
|---|---|
{rows}

It was trained for {steps} steps on Fluent Emoji drawings, and carries the same licences as the model: Impasto's
(Apache-2.0), and for the drawings MIT, Copyright (c) Microsoft Corporation (`../NOTICE`). `python -m training.motion`
makes it again.
"""


def write_adapter(folder: Path, layers: Mapping[str, Tensor], config: Mapping[str, Any], steps: int) -> int:
    """Write the adapter's folder; returns the weights' size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "weights.tmp"
    halves = {name: tensor.to(torch.float16).contiguous() for name, tensor in layers.items()}
    save_file(halves, beside, {"format": "pt"})
    size = beside.stat().st_size
    if size > LIMIT_BYTES:
        raise ValueError(f"the adapter has {size} bytes, more than {LIMIT_BYTES}")
    beside.chmod(0o644)
    beside.replace(folder / WEIGHTS)
    said = {name: value for name, value in config.items() if not name.startswith("_")} | {
        "_class_name": "MotionAdapter"
    }
    (folder / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(BUILTIN / "scheduler" / SCHEDULE, folder / SCHEDULE)  # it was trained on the model's own
    rows = "\n".join(f"| {motion} | {', '.join(subjects)} |" for motion, (_, subjects) in MOTIONS.items())
    (folder / "README.md").write_text(README.format(rows=rows, steps=steps))
    return size
