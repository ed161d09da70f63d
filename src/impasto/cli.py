"""The command line: ``impasto serve | worker | generate | animate | status | keys … | db … | lora … | comfyui …``.

Knows every room, imports each one inside the command that needs it, and holds no logic of its own. Options that
are not given come from ``IMPASTO_…`` variables, then from ``impasto.toml``, then from the defaults in ``config``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from impasto.cli_animate import animate
from impasto.cli_comfyui import comfyui_app
from impasto.cli_db import db_app
from impasto.cli_keys import keys_app
from impasto.cli_lora import lora_app
from impasto.cli_options import lora_named, loras_by_option
from impasto.cli_progress import denoising
from impasto.cli_status import status
from impasto.config import GenerateSettings, Settings
from impasto.errors import ConfigError, ImpastoError, InvalidInput
from impasto.types import (
    REFINE_MODES,
    EmbeddingRef,
    GenerationRequest,
    ImageReady,
    Progress,
    parse_size,
    scheduler_name,
)

if TYPE_CHECKING:
    from PIL.Image import Image

AnySettings = TypeVar("AnySettings", Settings, GenerateSettings)

app = typer.Typer(
    name="impasto",
    help="SDXL with LoRAs, served fast. Start with: impasto generate 'a red apple on a blue background' -o apple.png",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Every option can also be set as IMPASTO_NAME in the environment or as name = … in impasto.toml.",
)
app.add_typer(keys_app, name="keys")
app.add_typer(lora_app, name="lora")
app.add_typer(db_app, name="db")
app.add_typer(comfyui_app, name="comfyui")
app.command()(status)
app.command()(animate)


def _setting(kind: type[Settings | GenerateSettings], name: str, *flags: str) -> Any:
    """Make the option of a setting: its flag, and help with where else it can be set and its default."""
    field = kind.model_fields[name]
    default = "" if field.default in (None, [], "", False) else f" Default: {field.default}."
    return typer.Option(
        *(flags or (f"--{name.replace('_', '-')}",)),
        help=f"{field.description}{default} (IMPASTO_{name.upper()})",
        show_default=False,
    )


def _load(kind: type[AnySettings], ctx: typer.Context) -> AnySettings:
    """Read the settings of a command whose options are named like them; an option not given is left to the rest."""
    given = {name: value for name, value in ctx.params.items() if name in kind.model_fields and value not in (None, [])}
    return kind.load(ctx.params.get("config"), given)


Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings. (IMPASTO_CONFIG)")]
DataDir = Annotated[Path | None, _setting(Settings, "data_dir")]
DatabaseUrl = Annotated[str | None, _setting(Settings, "database_url")]
StorageUrl = Annotated[str | None, _setting(Settings, "storage_url")]
Model = Annotated[str | None, _setting(Settings, "model")]
Device = Annotated[str | None, _setting(Settings, "device")]
Dtype = Annotated[str | None, _setting(Settings, "dtype")]
Refiner = Annotated[str | None, _setting(Settings, "refiner")]
MotionAdapter = Annotated[str | None, _setting(Settings, "motion_adapter")]
Acceleration = Annotated[str | None, _setting(Settings, "accel")]


@app.command()
def serve(
    ctx: typer.Context,
    host: Annotated[str | None, _setting(Settings, "host")] = None,
    port: Annotated[int | None, _setting(Settings, "port")] = None,
    workers: Annotated[int | None, _setting(Settings, "workers")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    storage_url: StorageUrl = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    refiner: Refiner = None,
    motion_adapter: MotionAdapter = None,
    accel: Acceleration = None,
    public_url: Annotated[str | None, _setting(Settings, "public_url")] = None,
    log_level: Annotated[str | None, _setting(Settings, "log_level")] = None,
    config: Config = None,
) -> None:
    """Start the service: the API at once, and workers beside it, one for each GPU, that load the model.

    The first start prints an API key. Then, from another terminal:

        curl -X POST http://127.0.0.1:8000/api/v3/wavespeed-ai/sdxl-lora -H "Authorization: Bearer KEY"
        -H "Content-Type: application/json" -d '{"prompt": "a red apple on a blue background", "size": "512*512"}'
    """
    from impasto.serving import serve as run_service

    run_service(_load(Settings, ctx))


@app.command()
def worker(
    ctx: typer.Context,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    storage_url: StorageUrl = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    refiner: Refiner = None,
    motion_adapter: MotionAdapter = None,
    accel: Acceleration = None,
    log_level: Annotated[str | None, _setting(Settings, "log_level")] = None,
    config: Config = None,
) -> None:
    """Run one more worker: on the same data folder, or on another machine with the same database and storage.

    impasto worker --database-url postgresql://impasto@db/impasto --storage-url s3://pictures
    """
    from impasto.logs import set_up_logging
    from impasto.worker.naming import new_name
    from impasto.worker.process import run

    settings = _load(Settings, ctx)
    set_up_logging(settings.log_level, settings.log_format)
    raise typer.Exit(run(settings, new_name()))


@app.command()
def generate(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    output: Annotated[Path | None, _setting(GenerateSettings, "output", "--output", "-o")] = None,
    negative: Annotated[str | None, _setting(GenerateSettings, "negative")] = None,
    size: Annotated[str | None, _setting(GenerateSettings, "size")] = None,
    steps: Annotated[int | None, _setting(GenerateSettings, "steps")] = None,
    guidance: Annotated[float | None, _setting(GenerateSettings, "guidance")] = None,
    scheduler: Annotated[str | None, _setting(GenerateSettings, "scheduler")] = None,
    seed: Annotated[int | None, _setting(GenerateSettings, "seed")] = None,
    count: Annotated[int | None, _setting(GenerateSettings, "count")] = None,
    lora: Annotated[list[str] | None, _setting(GenerateSettings, "lora")] = None,
    image: Annotated[Path | None, _setting(GenerateSettings, "image")] = None,
    mask: Annotated[Path | None, _setting(GenerateSettings, "mask")] = None,
    strength: Annotated[float | None, _setting(GenerateSettings, "strength")] = None,
    refine: Annotated[str | None, _setting(GenerateSettings, "refine")] = None,
    high_noise_frac: Annotated[float | None, _setting(GenerateSettings, "high_noise_frac")] = None,
    refine_steps: Annotated[int | None, _setting(GenerateSettings, "refine_steps")] = None,
    acceleration: Annotated[str | None, _setting(GenerateSettings, "acceleration")] = None,
    weighted: Annotated[bool | None, _setting(GenerateSettings, "weighted", "--weighted/--plain")] = None,
    embedding: Annotated[list[str] | None, _setting(GenerateSettings, "embedding")] = None,
    metadata: Annotated[bool | None, _setting(Settings, "embed_metadata", "--metadata/--no-metadata")] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    refiner: Refiner = None,
    accel: Acceleration = None,
    config: Config = None,
) -> None:
    """Make pictures in this process, without a server, and save them.

    Examples:

        impasto generate "a red apple on a blue background" -o apple.png --size 512*512 --steps 20 --seed 7

        impasto generate "a fox, pixel art" -o fox.png --lora pixel-art.safetensors:0.8 --count 4

    From a picture; with a mask, only its white parts are painted and the rest is kept as it is:

        impasto generate "a fox in the snow" -o snow.png --image fox.png --strength 0.6

        impasto generate "a red hat" -o hat.png --image fox.png --mask head.png

    With a refiner for the last steps:

        impasto generate "a fox" --model sdxl-base --refiner sdxl-refiner --refine expert_ensemble_refiner
    """
    settings = _load(GenerateSettings, ctx)
    with loras_by_option(settings.lora):
        loras = tuple(lora_named(text, settings.model, config) for text in settings.lora)
        request = replace(_request(prompt, settings), loras=loras)
        _draw(request, settings, Settings.load(config, {"embed_metadata": metadata, "model": settings.model}))


def _request(prompt: str, settings: GenerateSettings) -> GenerationRequest:
    """Turn the options of ``generate`` into a request, reading the files they name."""
    if settings.mask and not settings.image:
        raise InvalidInput("--mask", "needs a picture to paint into; give --image as well")
    if settings.refine != REFINE_MODES[0] and settings.refine in REFINE_MODES and not settings.refiner:
        raise InvalidInput("--refine", f"{settings.refine} needs a refiner; give --refiner MODEL as well")
    image = _picture("--image", settings.image)
    width, height = _size(settings, image)
    return GenerationRequest(
        prompt=prompt,
        negative_prompt=settings.negative,
        width=width,
        height=height,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        num_images=settings.count,
        seed=settings.seed,
        scheduler=scheduler_name(settings.scheduler),
        image=image,
        mask_image=_mask(settings.mask),
        strength=settings.strength,
        refine=settings.refine,  # type: ignore[arg-type]  # the request checks it, in words that name it
        high_noise_frac=settings.high_noise_frac,
        refine_steps=settings.refine_steps,
        acceleration=settings.acceleration,  # type: ignore[arg-type]  # likewise
        prompt_syntax="weighted" if settings.weighted else "plain",
        embeddings=tuple(_embedding(text) for text in settings.embedding),
    )


def main() -> None:
    """Run the command line; an error of ours is one line on standard error, not a trace."""
    with _plain_errors():
        app()


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except ImpastoError as error:
        print(f"impasto: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InvalidInput | ConfigError) else 1)


def _embedding(text: str) -> EmbeddingRef:
    """Read ``TOKEN=PATH``."""
    token, equals, path = text.partition("=")
    if not equals or not token or not path:
        raise InvalidInput("--embedding", f"must be TOKEN=PATH, such as sketch=sketch.safetensors; got {text!r}")
    return EmbeddingRef(token, path)


def _size(settings: GenerateSettings, image: Image | None) -> tuple[int, int]:
    """The size that was asked for, or the start picture's, or what the model draws best."""
    if settings.size:
        return parse_size(settings.size)
    if image is not None:
        from impasto.images import natural_size

        return natural_size(image)
    from impasto.models.catalog import find_model

    return (find_model(settings.model).native_side,) * 2


def _picture(option: str, path: Path | None) -> Image | None:
    """Read the picture that an option names."""
    if path is None:
        return None
    from impasto.images import read_picture

    try:
        return read_picture(path.read_bytes(), option)
    except OSError as error:
        raise InvalidInput(option, f"{path} cannot be read ({error.strerror}); give a picture file") from None


def _mask(path: Path | None) -> Image | None:
    from impasto.images import mask_of

    mask = _picture("--mask", path)
    return None if mask is None else mask_of(mask)


def _draw(request: GenerationRequest, settings: GenerateSettings, service: Settings) -> None:
    """Run the engine with a progress bar and save each picture as it is done."""
    from rich.console import Console

    from impasto.images import format_of

    output, file_format = settings.output, format_of(settings.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with console.status(f"loading {settings.model} …"):
        from impasto.cli_metadata import Teller
        from impasto.engine.accel import Accel
        from impasto.engine.engine import Engine

        engine = Engine.load(
            settings.model,
            device=settings.device,
            dtype=settings.dtype,
            max_batch=settings.max_batch,
            refiner=settings.refiner,
            accel=Accel.parse(settings.accel),
        )
    teller = Teller(request, settings.lora, service)
    with denoising(console, request.num_inference_steps) as move:
        for event in engine.generate(request):
            if isinstance(event, Progress):
                move(event)
            elif isinstance(event, ImageReady):
                path = _numbered(output, event.index, request.num_images)
                path.write_bytes(teller.encoded(event.image, event.seed, file_format))
                console.print(f"{path}  seed {event.seed}")


def _numbered(output: Path, index: int, count: int) -> Path:
    """``fox.png`` for one picture; ``fox-0.png``, ``fox-1.png``, … for several."""
    return output if count == 1 else output.with_stem(f"{output.stem}-{index}")
