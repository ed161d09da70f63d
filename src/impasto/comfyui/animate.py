"""The node *Image to video*: a picture moves, by our animator, inside ComfyUI. Experimental.

Knows ComfyUI's progress bar, previews, interrupt and VIDEO type, and the animator's events. Engine, LoRAs and checker
are the local node's (``local``).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Final
from weakref import WeakKeyDictionary

import comfy.utils  # type: ignore[import-not-found]
import folder_paths  # type: ignore[import-not-found]
from comfy_api.latest import InputImpl, Types, io  # type: ignore[import-not-found]
from PIL import Image

from impasto.animate.animator import Animator
from impasto.comfyui import local
from impasto.comfyui.folders import checkpoint_file
from impasto.comfyui.resident import Wanted
from impasto.comfyui.schema import CATEGORY, LoraStack
from impasto.comfyui.stack import read_stack
from impasto.comfyui.tensors import image_batch, one_picture
from impasto.engine.engine import Engine
from impasto.errors import LoraError
from impasto.models.catalog import BUILTIN
from impasto.safety.gate import SafetyGate
from impasto.types import LIMITS, MOTIONS, Animation, Bounds, Failed, GenerationRequest, Preview, Progress, VideoReady

ANIMATORS: Final[WeakKeyDictionary[Engine, tuple[str, Animator]]] = WeakKeyDictionary()  # they go with their engines


class ImageToVideo(io.ComfyNode):  # type: ignore[misc]  # ComfyUI has no types
    """A video that begins with a picture."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's fields."""
        return io.Schema(
            node_id="ImpastoImageToVideo",
            display_name="Image to video (Impasto, experimental)",
            category=CATEGORY,
            description="A picture moves: SDXL, LoRAs and a motion adapter, by Impasto's engine on this machine.",
            is_experimental=True,
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=[BUILTIN, *folder_paths.get_filename_list("checkpoints")],
                    default=BUILTIN,
                    tooltip="An SDXL base model, of which the motion adapter must be.",
                ),
                io.String.Input(
                    "motion_adapter",
                    default=BUILTIN,
                    tooltip=f"{BUILTIN}, for the model of that name; for SDXL a folder, or owner/name of the hub, "
                    "such as guoyww/animatediff-motion-adapter-sdxl-beta.",
                ),
                io.Image.Input("image", tooltip="The picture that the video begins with."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What the video shows."),
                io.String.Input("negative_prompt", multiline=True, default="", tooltip="What it should not show."),
                _whole("frames", LIMITS.frames, "Frames of the video."),
                _whole("fps", LIMITS.fps, "Frames a second."),
                io.Float.Input(
                    "strength",
                    default=LIMITS.video_strength.default,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="How far frames may go.",
                ),
                _whole("width", LIMITS.video_side, "In pixels.", LIMITS.side_multiple),
                _whole("height", LIMITS.video_side, "In pixels.", LIMITS.side_multiple),
                io.Int.Input("num_inference_steps", default=20, min=1, max=50, tooltip="Denoising steps."),
                io.Float.Input("guidance_scale", default=5.0, min=0.0, max=10.0, step=0.1, tooltip="0 and 1: off."),
                io.Int.Input("seed", default=0, min=0, max=int(LIMITS.seed.high), control_after_generate=True),
                io.Boolean.Input("enable_safety_checker", default=True, tooltip="A flagged frame comes out black."),
                LoraStack.Input("lora_stack", optional=True, tooltip=f"Up to {LIMITS.max_loras} LoRAs."),
                io.Combo.Input(
                    "motion",
                    options=list(MOTIONS),
                    default=MOTIONS[0],
                    optional=True,
                    tooltip="How the picture is moved from the outset; auto: bounce with the built-in motion adapter.",
                ),
            ],
            outputs=[
                io.Video.Output("video", display_name="video"),
                io.Image.Output("images", display_name="frames"),
                io.Boolean.Output("nsfw", display_name="nsfw", tooltip="Whether a frame was flagged."),
            ],
        )

    @classmethod
    def execute(cls, checkpoint: str, motion_adapter: str, lora_stack: Any = None, **values: Any) -> Any:
        """Draw the frames.

        Raises:
            ImpastoError: A field, a LoRA, a model or the adapter is wrong; the message says which and what to do.
        """
        stack = read_stack(lora_stack)
        names = ("prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed", "strength")
        request = GenerationRequest(
            negative_prompt=values["negative_prompt"] or None,
            image=one_picture("image", values["image"]),
            loras=tuple(local.loras_of(stack)),
            animation=Animation(values["frames"], values["fps"], values.get("motion") or MOTIONS[0]),
            **{name: values[name] for name in names},
        )
        wanted = Wanted.now(None if checkpoint == BUILTIN else checkpoint_file(checkpoint), None)
        engine = local.RESIDENT.get(wanted)
        gate = SafetyGate(local._checker() if values["enable_safety_checker"] else None)
        try:
            frames = drawn(animator_of(engine, motion_adapter.strip()), request)
        except LoraError as error:
            raise local._named(error, stack) from None
        passed = [gate.passed(frame, wanted=True) for frame in frames]
        images = image_batch([frame for frame, _ in passed])
        parts = Types.VideoComponents(images=images, frame_rate=Fraction(values["fps"]))
        return io.NodeOutput(InputImpl.VideoFromComponents(parts), images, any(flagged for _, flagged in passed))


def drawn(animator: Animator, request: GenerationRequest) -> tuple[Image.Image, ...]:
    """Run a request to its end, showing how far it is; the stop button ends it before the next step.

    Raises:
        ImpastoError: It failed for a reason that the user can mend.
    """
    bar = comfy.utils.ProgressBar(request.num_inference_steps)
    request_id = animator.submit(request, preview_every=1)
    try:
        while animator.busy:
            local.check_interrupt()
            for event in animator.step():
                match event:
                    case Progress():
                        bar.update_absolute(event.step, event.total)
                    case Preview():
                        bar.update_absolute(bar.current, bar.total, ("JPEG", event.image, local.PREVIEW_SIDE))
                    case VideoReady():
                        return event.frames
                    case Failed():
                        raise event.error
    finally:
        animator.cancel(request_id)
    raise RuntimeError("the animator ended without a video")


def animator_of(engine: Engine, adapter: str) -> Animator:
    """Return an engine's animator with an adapter, the one that was used last if it is that.

    Raises:
        ModelError: There is no such adapter, or it does not fit.
    """
    name, animator = ANIMATORS.get(engine, ("", None))
    if animator is None or name != adapter:
        ANIMATORS.pop(engine, None)  # its memory is for the next one
        animator = Animator(engine, adapter)
        ANIMATORS[engine] = (adapter, animator)
    return animator


def _whole(name: str, bounds: Bounds, tooltip: str, step: int = 1) -> Any:
    ends = {"default": int(bounds.default), "min": int(bounds.low), "max": int(bounds.high)}
    return io.Int.Input(name, step=step, tooltip=tooltip, **ends)
