"""The command line's ``impasto animate``: a picture becomes a short video, in this process.

Knows the rooms it asks, and how they look in a terminal. Holds no logic of its own. Experimental, as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from impasto.cli_options import lora_named, loras_by_option
from impasto.cli_progress import denoising
from impasto.config import GenerateSettings, Settings
from impasto.errors import InvalidInput
from impasto.types import LIMITS, MOTIONS, Animation, GenerationRequest, Motion, Progress, VideoReady, parse_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from impasto.animate.animator import Animator

STRENGTH, GUIDANCE, STEPS = LIMITS.video_strength.default, 5.0, 20


def _range(what: str, low: float, high: float) -> str:
    return f"{what}, {low:g} to {high:g}."


def animate(
    image: Annotated[Path, typer.Argument(help="Start picture: PNG, JPEG, WebP, GIF or BMP.", show_default=False)],
    prompt: Annotated[str, typer.Option("--prompt", help="What it shows, and does.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Video file: .webm or .webp.")] = Path("out.webm"),
    frames: Annotated[int, typer.Option("--frames", help=_range("Frames", LIMITS.frames.low, LIMITS.frames.high))] = 16,
    fps: Annotated[int, typer.Option("--fps", help=_range("Frames a second", LIMITS.fps.low, LIMITS.fps.high))] = 8,
    strength: Annotated[float, typer.Option("--strength", help="How far from the start picture, up to 1.")] = STRENGTH,
    motion: Annotated[str, typer.Option("--motion", help=f"How it moves: {', '.join(MOTIONS)}.")] = MOTIONS[0],
    negative: Annotated[str | None, typer.Option("--negative", help="What to keep out of the video.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="W*H in pixels; by default the picture's.")] = None,
    steps: Annotated[int, typer.Option("--steps", help="Denoising steps; the share --strength of them runs.")] = STEPS,
    guidance: Annotated[float, typer.Option("--guidance", help="Pull of the prompt; 0 and 1: off.")] = GUIDANCE,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same video; -1 draws one.")] = -1,
    lora: Annotated[list[str] | None, typer.Option("--lora", help="NAME or NAME:SCALE; up to five times.")] = None,
    motion_adapter: Annotated[str | None, typer.Option("--motion-adapter", help="builtin, folder or hub id.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="As elsewhere. (IMPASTO_MODEL)")] = None,
    device: Annotated[str | None, typer.Option("--device", help="As elsewhere. (IMPASTO_DEVICE)")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="As elsewhere. (IMPASTO_DTYPE)")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with settings. (IMPASTO_CONFIG)")] = None,
) -> None:
    """Make a picture move, in this process, without a server. Experimental.

    Examples:

        impasto animate frog.png --prompt "a frog on a blue background" -o frog.webm

        impasto animate fox.png --prompt "a fox" --lora pixel-art:0.8 --frames 8 --motion pulse --seed 7 -o fox.webp

    With SDXL's weights, the adapter for them has to be named:

        impasto animate cat.jpg --prompt "a cat turns its head" --model stabilityai/stable-diffusion-xl-base-1.0
        --motion-adapter guoyww/animatediff-motion-adapter-sdxl-beta -o cat.webm
    """
    from impasto.images import natural_size
    from impasto.models.catalog import motion_adapter as adapter_for
    from impasto.video import video_format_of

    video_format_of(output)
    picture = _picture(image)
    given = {"model": model, "device": device, "dtype": dtype, "lora": lora}
    settings = GenerateSettings.load(config, given)
    width, height = parse_size(size, "--size", LIMITS.video_side) if size else natural_size(picture, LIMITS.video_side)
    adapter = motion_adapter or adapter_for(Settings.load(config).motion_adapter, settings.model)
    if adapter is None:
        raise InvalidInput("--motion-adapter", f"is needed with the model {settings.model!r}: it has none of its own")
    with loras_by_option(settings.lora):
        request = GenerationRequest(
            prompt=prompt,
            negative_prompt=negative,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            strength=strength,
            image=picture,
            loras=tuple(lora_named(text, settings.model, config) for text in settings.lora),
            animation=Animation(frames, fps, cast(Motion, motion)),
        )
        _run(request, settings, Settings.load(config, {"model": settings.model}), adapter, output)


def _picture(path: Path) -> Image:
    from impasto.images import read_picture

    try:
        return read_picture(path.read_bytes(), "IMAGE")
    except OSError as error:
        raise InvalidInput("IMAGE", f"{path} cannot be read ({error.strerror}); give a picture file") from None


def _run(request: GenerationRequest, settings: GenerateSettings, service: Settings, adapter: str, output: Path) -> None:
    """Load, draw with a progress bar, and save."""
    from rich.console import Console

    from impasto.cli_metadata import Teller
    from impasto.video import video_format_of

    output.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with console.status(f"loading {settings.model} …"):
        animator = _animator(settings, adapter)
    teller = Teller(request, settings.lora, service)
    with denoising(console, request.num_inference_steps) as move:
        for event in animator.animate(request):
            if isinstance(event, Progress):
                move(event)
            elif isinstance(event, VideoReady):
                output.write_bytes(teller.video(event, video_format_of(output)))
                console.print(f"{output}  {len(event.frames)} frames  seed {event.seed}")


def _animator(settings: GenerateSettings, adapter: str) -> Animator:
    from impasto.animate.animator import Animator
    from impasto.engine.accel import Accel
    from impasto.engine.engine import Engine

    engine = Engine.load(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        max_batch=settings.max_batch,
        accel=Accel.parse(settings.accel),
    )
    return Animator(engine, adapter)
