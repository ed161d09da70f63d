"""The node *SDXL LoRA (local)*: our engine inside ComfyUI, on its checkpoints and LoRA folders.

Knows ComfyUI's progress bar, previews and interrupt, and the engine's events. Which engine is there is ``resident``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import comfy.model_management  # type: ignore[import-not-found]
import comfy.utils  # type: ignore[import-not-found]
import folder_paths  # type: ignore[import-not-found]
from comfy_api.latest import io  # type: ignore[import-not-found]
from PIL import Image

from impasto.comfyui.checks import fields_problem
from impasto.comfyui.folders import NONE, called, checkpoint_file, fingerprint, lora_file
from impasto.comfyui.reporting import report_text
from impasto.comfyui.request import read_request
from impasto.comfyui.resident import Resident, Wanted
from impasto.comfyui.schema import CATEGORY, acceleration_input, shared_inputs, shared_outputs
from impasto.comfyui.stack import StackedLora, read_stack
from impasto.comfyui.tensors import image_batch
from impasto.engine.engine import Engine
from impasto.errors import LoraError, ModelError
from impasto.lora.report import LoraReport
from impasto.models.catalog import BUILTIN
from impasto.safety.checker import ImageChecker
from impasto.safety.gate import SafetyGate
from impasto.safety.table import make_checker
from impasto.types import Failed, Finished, GenerationRequest, ImageReady, LoraRef, Preview, Progress

PREVIEW_SIDE: Final = 512  # pixels
RESIDENT: Final = Resident()

check_interrupt = comfy.model_management.throw_exception_if_processing_interrupted


class LocalSdxlLora(io.ComfyNode):  # type: ignore[misc]  # ComfyUI has no types
    """Pictures by our engine, in ComfyUI's own process."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's fields."""
        checkpoints = folder_paths.get_filename_list("checkpoints")
        return io.Schema(
            node_id="ImpastoLocalSdxlLora",
            display_name="SDXL LoRA (Impasto local)",
            category=CATEGORY,
            description="SDXL with LoRAs by Impasto's engine on this machine: from text, a picture, or within a mask.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=[BUILTIN, *checkpoints],
                    default=BUILTIN,
                    tooltip=f"An SDXL base or inpainting model; {BUILTIN} is the small one that comes with Impasto.",
                ),
                io.Combo.Input(
                    "refiner", options=[NONE, *checkpoints], default=NONE, tooltip="For the refine modes; else unused."
                ),
                *shared_inputs(),
                acceleration_input(),
            ],
            outputs=shared_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **_: Any) -> Any:
        """Run again when the checkpoint's file is another one."""
        try:
            return None if checkpoint == BUILTIN else fingerprint(checkpoint_file(checkpoint))
        except (ModelError, OSError):
            return None  # said where it runs

    @classmethod
    def validate_inputs(
        cls,
        checkpoint: Any = None,
        refiner: Any = None,
        width: Any = None,
        height: Any = None,
        scheduler: Any = None,
        refine: Any = None,
    ) -> Any:
        """Refuse what ComfyUI's validation lets through, before anything runs."""
        try:
            for name in (checkpoint, refiner):
                if name not in (None, NONE, BUILTIN):
                    checkpoint_file(name)
        except ModelError as error:
            return str(error)
        return fields_problem(width, height, scheduler, refine) or True

    @classmethod
    def execute(cls, checkpoint: str, refiner: str, lora_stack: Any = None, **values: Any) -> Any:
        """Draw.

        Raises:
            ImpastoError: A field, a LoRA or a model is wrong; the message says which and what to do.
        """
        stack = read_stack(lora_stack)
        request = read_request(values, loras_of(stack))
        wanted = Wanted.now(
            None if checkpoint == BUILTIN else checkpoint_file(checkpoint),
            checkpoint_file(refiner) if refiner != NONE and request.refine != "no_refiner" else None,
        )
        gate = SafetyGate(_checker() if values["enable_safety_checker"] else None)
        try:
            pictures, reports = draw(RESIDENT.get(wanted), request)
        except LoraError as error:
            raise _named(error, stack) from None
        passed = [gate.passed(picture, wanted=True) for picture in pictures]
        named = [report.named(item.name) for report, item in zip(reports, stack, strict=True)]
        return io.NodeOutput(
            image_batch([picture for picture, _ in passed]),
            [flagged for _, flagged in passed],
            request.seed,
            report_text(named),
        )


def loras_of(stack: Sequence[StackedLora]) -> list[LoraRef]:
    """Return a stack's LoRAs as files of ComfyUI's folders.

    Raises:
        LoraError: One is not there.
    """
    return [LoraRef(str(lora_file(item.name)), item.strength_model, item.strength_clip) for item in stack]


def draw(engine: Engine, request: GenerationRequest) -> tuple[list[Image.Image], Sequence[LoraReport]]:
    """Run a request to its end, showing how far it is; the stop button ends it before the next step.

    Raises:
        ImpastoError: It failed for a reason that the user can mend.
    """
    pictures: dict[int, Image.Image] = {}
    reports: Sequence[LoraReport] = ()
    bar = comfy.utils.ProgressBar(request.num_inference_steps)
    request_id = engine.submit(request, preview_every=1)
    try:
        while engine.busy:
            check_interrupt()
            for event in engine.step():
                match event:
                    case Progress():
                        bar.update_absolute(event.step, event.total)
                    case Preview(index=0):
                        bar.update_absolute(bar.current, bar.total, ("JPEG", event.image, PREVIEW_SIDE))
                    case ImageReady():
                        pictures[event.index] = event.image
                    case Finished():
                        reports = event.reports
                    case Failed():
                        raise event.error
    finally:
        engine.cancel(request_id)
    return [pictures[index] for index in sorted(pictures)], reports


@lru_cache(1)
def _checker() -> ImageChecker | None:
    return make_checker("builtin")


def _named(error: LoraError, stack: Sequence[StackedLora]) -> LoraError:
    """Name the LoRA as the stack does, where the error counts it: ``loras.0.path``."""
    _, _, rest = str(error.field).partition("loras.")
    position = rest.partition(".")[0]
    if not position.isdigit() or int(position) >= len(stack):
        return error
    return LoraError(called(stack[int(position)].name), error.problem)
