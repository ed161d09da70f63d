"""The node *Load LoRA, exact*: a LoRA of any kind on ComfyUI's own MODEL and CLIP, by the formulas of its trainer.

Knows ComfyUI's models, folders and patcher, and our reader and report. Holds no formulas: those are the patches'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import comfy.model_base  # type: ignore[import-not-found]
import comfy.utils  # type: ignore[import-not-found]
from comfy_api.latest import io  # type: ignore[import-not-found]

from impasto.comfyui.adapter import put_on
from impasto.comfyui.folders import NONE, called, fingerprint, lora_file, lora_names
from impasto.comfyui.names import Kind, Names, Shape, read_names
from impasto.comfyui.reporting import report_text
from impasto.comfyui.schema import CATEGORY, LoraStack
from impasto.comfyui.stack import StackedLora, read_stack
from impasto.errors import LoraError, ModelError
from impasto.lora.cache import FileState
from impasto.lora.contents import LoraContents
from impasto.lora.formats import read_lora
from impasto.lora.keys import UNETS, Target, TargetNames
from impasto.lora.patch import Patch
from impasto.lora.report import SHOWN, LoraReport

MOST_STRENGTH: Final = 100.0  # as ComfyUI's own loader has it
KEPT_FILES: Final = 2  # read lately, for a strength that is being tried out


class LoadLoraExact(io.ComfyNode):  # type: ignore[misc]  # ComfyUI has no types
    """MODEL and CLIP with a LoRA, and those of a stack before it."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's fields."""
        ends = {"default": 1.0, "min": -MOST_STRENGTH, "max": MOST_STRENGTH, "step": 0.01}
        return io.Schema(
            node_id="ImpastoLoadLoraExact",
            display_name="Load LoRA, exact",
            category=CATEGORY,
            description=(
                "Loads a LoRA of any kind in any spelling (DoRA, LoHa, LoKr, OFT, BOFT, IA3, GLoRA, PEFT's …) by its "
                "trainer's formula, says what it did, and fails where it would do nothing."
            ),
            inputs=[
                io.Model.Input("model", tooltip="SDXL, or its refiner."),
                io.Clip.Input("clip", optional=True, tooltip="Without it, the text encoders' part is left out."),
                io.Combo.Input("lora_name", options=lora_names()),
                io.Float.Input("strength_model", tooltip="For the UNet; may be negative.", **ends),
                io.Float.Input("strength_clip", tooltip="For the text encoders.", **ends),
                LoraStack.Input("lora_stack", optional=True, tooltip="LoRAs to apply before this one, in order."),
            ],
            outputs=[
                io.Model.Output("patched_model", display_name="MODEL"),
                io.Clip.Output("patched_clip", display_name="CLIP"),
                LoraStack.Output("whole_stack", display_name="LORA_STACK", tooltip="All LoRAs that are on."),
                io.String.Output("report", display_name="report"),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **others: Any) -> Any:
        """Run again when the file under the name is another one."""
        try:
            return fingerprint(lora_file(lora_name)) if lora_name != NONE else None
        except (LoraError, OSError):
            return None

    @classmethod
    def validate_inputs(cls, lora_name: Any = None) -> Any:
        """Refuse a name that is no file's, before anything runs."""
        try:
            if lora_name not in (None, NONE):
                lora_file(lora_name)
        except LoraError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        lora_stack: Any = None,
    ) -> Any:
        """Apply the stack and then the LoRA.

        Raises:
            LoraError: A file is missing, broken, for another base model, or fits nothing here.
            InvalidInput: Something else is connected as a stack.
            ModelError: The model is not SDXL.
        """
        own = [] if lora_name == NONE else [StackedLora(lora_name, strength_model, strength_clip)]
        stack = [*read_stack(lora_stack), *own]
        model, clip, reports = apply_stack(model, clip, stack)
        return io.NodeOutput(model, clip, [tuple(item) for item in stack], report_text(reports))


def apply_stack(model: Any, clip: Any, stack: Sequence[StackedLora]) -> tuple[Any, Any, list[LoraReport]]:
    """Return clones of MODEL and CLIP with the stack's LoRAs put on, and a report for each; both stay as they were.

    Raises:
        LoraError: A file cannot be had or used; its name is in the message.
        ModelError: The model is not SDXL.
    """
    names = names_of(model, clip)
    patched: dict[Kind, Any] = {"model": model.clone(), "clip": None if clip is None else clip.clone()}
    reports = []
    for position, item in enumerate(stack):
        if item.strength_model == item.strength_clip == 0:
            reports.append(LoraReport.unused(item.name, position))
            continue
        contents = _acting(_contents(item, names), names, item)
        for kind, strength in _strengths(item).items():
            patches = {key: (item.name, patch) for key, patch in _half(contents, names, kind).items()}
            if patches:
                put_on(patched[kind] if kind == "model" else patched[kind].patcher, patches, strength)
        reports.append(_report(contents, item, position, clip is not None))
    return patched["model"], patched["clip"], reports


def names_of(model: Any, clip: Any) -> Names:
    """Name the parameters of what ComfyUI has loaded.

    Raises:
        ModelError: It is not SDXL.
    """
    base = model.model
    if not isinstance(base, comfy.model_base.SDXL | comfy.model_base.SDXLRefiner):
        raise ModelError(f"MODEL is {type(base).__name__}; connect SDXL or its refiner, others have other LoRAs")
    return read_names(
        unet=_shapes(base),
        diffusers=comfy.utils.unet_to_diffusers(base.model_config.unet_config),
        clip={} if clip is None else _shapes(clip.cond_stage_model),
        network=UNETS[isinstance(base, comfy.model_base.SDXLRefiner)],
    )


def _shapes(module: Any) -> dict[str, Shape]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _strengths(item: StackedLora) -> dict[Kind, float]:
    return {"model": item.strength_model, "clip": item.strength_clip}


def _acting(contents: LoraContents, names: Names, item: StackedLora) -> LoraContents:
    """Leave out what a strength of 0 leaves as it is."""
    strengths = _strengths(item)
    patches = {target: patch for target, patch in contents.patches.items() if strengths[names.keys[target][0]] != 0}
    return replace(contents, patches=patches)


def _half(contents: LoraContents, names: Names, half: Kind) -> dict[str, Patch]:
    """Return the patches of MODEL, or CLIP, by ComfyUI's names."""
    named = ((names.keys[target], patch) for target, patch in contents.patches.items())
    return {key: patch for (kind, key), patch in named if kind == half}


def _report(contents: LoraContents, item: StackedLora, position: int, has_clip: bool) -> LoraReport:
    report = LoraReport.of(contents, item.name, item.strength_model or item.strength_clip, position)
    notes = []
    if report.embeddings:
        words = ", ".join(map(repr, report.embeddings[:SHOWN]))
        notes.append(f"It brings embeddings for {words}, which a LoRA loader cannot apply; save them as files.")
    if not has_clip:
        notes.append("No CLIP is connected, so what it has for the text encoders counts as unmatched.")
    elif item.strength_clip != item.strength_model:
        notes.append(f"Its strength for the text encoders is {item.strength_clip:g}.")
    return report.speaking((), notes)


def _contents(item: StackedLora, names: Names) -> LoraContents:
    path = lora_file(item.name)
    try:
        state = FileState.now(path)
    except OSError as error:
        raise LoraError(called(item.name), f"cannot be read ({error.strerror})") from None
    return _read(state, item.name, frozenset(names.shapes.items()))


@lru_cache(KEPT_FILES)
def _read(file: FileState, name: str, shapes: frozenset[tuple[Target, Shape]]) -> LoraContents:
    return read_lora(file.path, TargetNames(dict(shapes)), called(name))
