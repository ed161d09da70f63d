"""Checks of the nodes that draw inside ComfyUI: *SDXL LoRA (local)* and *Load LoRA, exact*, through its HTTP API.

Each is a function whose docstring says what it promises; ``run`` calls them with its bench.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from tests.comfyui.driver import Refused, Run
from tests.comfyui.programs import Trouble
from tests.comfyui.run import REMOTE, Bench, example, expect

LOCAL, EXACT = "ImpastoLocalSdxlLora", "ImpastoLoadLoraExact"
STOP_SECONDS = 60.0  # a step of a busy machine, and the decoding of no picture


def node_of(prompt: dict[str, Any], kind: str) -> str:
    """The id of the only node of a kind."""
    [node] = [node for node, what in prompt.items() if what["class_type"] == kind]
    return node


def check_local_is_the_servers(bench: Bench) -> None:
    """The local node and the server draw the same picture of the same fields, LoRA and all; steps and previews show."""
    prompt = example("local-text-to-image")
    node = node_of(prompt, LOCAL)
    run = bench.run(prompt)
    expect(run.end == "execution_success", f"it ended with {run.end}: {run.error}")
    steps = run.steps.get(node, [])
    expect(bool(steps) and max(steps) == prompt[node]["inputs"]["num_inference_steps"], f"its bar: {steps}")
    expect(bool(run.previews), "no preview was shown")
    expect("pixel-art" in json.dumps(run.executed), "the report does not name the LoRA")
    other = copy.deepcopy(prompt)
    fields = {k: v for k, v in prompt[node]["inputs"].items() if k not in ("checkpoint", "refiner")}
    other[node] = {"class_type": REMOTE, "inputs": {**fields, "send_local_loras": False}}
    served = bench.run(other)
    expect(served.end == "execution_success", f"the server's ended with {served.end}: {served.error}")
    save = node_of(prompt, "SaveImage")
    here, there = (
        np.asarray(bench.comfy.pictures(done, save)[0].convert("RGB"), dtype=np.int16) for done in (run, served)
    )
    expect(int(np.abs(here - there).max()) <= 1, f"they differ by up to {np.abs(here - there).max()} of 255")


def check_local_interrupt(bench: Bench) -> None:
    """The stop button ends the local node before its next step, and the next prompt draws as before."""
    prompt = example("local-text-to-image")
    node = node_of(prompt, LOCAL)
    prompt[node]["inputs"] |= {"num_inference_steps": 50, "num_images": 4, "seed": 99}
    pressed: list[float] = []

    def press(run: Run) -> None:
        if not pressed and max(run.steps.get(node, [0])) >= 1:
            pressed.append(time.monotonic())
            bench.comfy.interrupt()

    run = bench.run(prompt, watch=press)
    took = time.monotonic() - pressed[0]
    expect(run.end == "execution_interrupted", f"it ended with {run.end}: {run.error}")
    expect(took < STOP_SECONDS, f"it took {took:.0f} s to end")
    prompt[node]["inputs"] |= {"num_inference_steps": 2, "num_images": 1}
    expect(bench.run(prompt).end == "execution_success", "the next prompt failed")


def check_exact(bench: Bench) -> None:
    """A kind that ComfyUI's own loader leaves out changes the picture, and the report counts its modules."""
    prompt = example("load-lora-exact")
    node = node_of(prompt, EXACT)
    prompt[node_of(prompt, "KSampler")]["inputs"]["steps"] = 4
    pictures = []
    for changed in ({"lora_name": "None"}, {"lora_name": "ia3.safetensors"}):
        prompt[node]["inputs"] |= changed
        run = bench.run(prompt)
        expect(run.end == "execution_success", f"{changed} ended with {run.end}: {run.error}")
        picture = bench.comfy.pictures(run, node_of(prompt, "SaveImage"))[0]
        pictures.append(np.asarray(picture.convert("RGB"), dtype=np.int16))
    expect("IA3 on" in json.dumps(run.executed), f"the report says: {json.dumps(run.executed)[:500]}")
    expect(float(np.abs(pictures[0] - pictures[1]).mean()) > 1, "the LoRA changed nothing")
    theirs = copy.deepcopy(prompt)
    theirs[node]["class_type"] = "LoraLoader"
    theirs.pop(node_of(theirs, "PreviewAny"))
    run = bench.run(theirs)
    picture = np.asarray(bench.comfy.pictures(run, node_of(theirs, "SaveImage"))[0].convert("RGB"), dtype=np.int16)
    expect(np.array_equal(picture, pictures[0]), "ComfyUI's own loader reads IA3 now: say so in the documentation")


def check_inside_errors(bench: Bench) -> None:
    """What cannot be used stops the workflow in words that name it; a wrong value is refused before anything runs."""
    prompt = example("load-lora-exact")
    exact = node_of(prompt, EXACT)
    prompt["90"] = {"class_type": "ImpastoLoraStack", "inputs": {"lora_1": "nobody-has-this", "scale_1": 1.0}}
    prompt[exact]["inputs"]["lora_stack"] = ["90", 0]
    run = bench.run(prompt)
    expect("nobody-has-this" in run.error and "loras folders" in run.error, f"a missing LoRA: {run.error}")
    local = example("local-text-to-image")
    node = node_of(local, LOCAL)
    local[node]["inputs"]["refine"] = "base_image_refiner"
    run = bench.run(local)
    expect("refine" in run.error, f"without a refiner the error says: {run.error}")
    local[node]["inputs"] |= {"refine": "no_refiner", "checkpoint": "nowhere.safetensors"}
    try:
        bench.run(local)
    except Refused as refused:
        expect("nowhere.safetensors" in json.dumps(refused.errors), f"the refusal does not name it: {refused}")
    else:
        raise Trouble("a checkpoint that is not there was not refused")


CHECKS: Final[tuple[Callable[[Bench], None], ...]] = (
    check_local_is_the_servers, check_local_interrupt, check_exact, check_inside_errors,
)  # fmt: skip
