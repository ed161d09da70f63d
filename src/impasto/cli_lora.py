"""The command line's ``impasto lora …``: what a LoRA file is, and whether it applies.

Knows the rooms it asks, and how their answers look in a terminal. Holds no logic of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from impasto.errors import LoraError

if TYPE_CHECKING:
    from impasto.lora.inspect import Inspection

lora_app = typer.Typer(
    help="LoRA files: what is in one, and does it apply.", no_args_is_help=True, rich_markup_mode="markdown"
)


@lora_app.callback()
def lora() -> None:
    """LoRA files: what is in one, and does it apply."""


@lora_app.command("inspect")
def inspect(
    lora: Annotated[
        str, typer.Argument(help="A file, or a LoRA's name as a request would give it.", metavar="FILE|NAME")
    ],
    model: Annotated[
        str, typer.Option("--model", help="The model to hold it against, named as elsewhere.")
    ] = "builtin",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", help="Folder of the service, in whose loras folder names are looked up."),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with settings. (IMPASTO_CONFIG)")] = None,
) -> None:
    """Say what a LoRA file is, and whether it applies to a model: kinds, ranks, matched modules, base model, words.

    Nothing is loaded but the file itself: of the model, names and shapes are enough. The exit status is 0 if it
    applies, 1 if it does not (the reason is said), 2 if the command was wrong.

    Examples:

        impasto lora inspect pixel-art.safetensors

        impasto lora inspect my-style --model /models/sdxl-base --json

        impasto lora inspect new.safetensors || echo "not for the built-in model"
    """
    from impasto.lora.inspect import inspect_lora
    from impasto.models.catalog import find_model
    from impasto.models.shapes import parameter_shapes

    shapes = parameter_shapes(find_model(model))
    try:
        found = inspect_lora(_file(lora, data_dir, config), lora, shapes)
    except LoraError as error:
        if not as_json:
            raise
        print(json.dumps({"applies": False, "problem": error.problem, "path": lora}, indent=2))
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(found.to_json() | {"model": model}, indent=2))
    else:
        _show(found, model)
    raise typer.Exit(0 if found.problem is None else 1)


def _file(name: str, data_dir: Path | None, config: Path | None) -> Path:
    """Return the file itself, or what the service would find under the name."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    from impasto.config import Settings
    from impasto.worker.loras import LoraLibrary

    settings = Settings.load(config, {"data_dir": data_dir})
    return LoraLibrary.of(settings).find(name, name, None).file


def _show(found: Inspection, model: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in found.report.rows():
        table.add_row(label, Text(text))  # as text: a file's own words are no markup
    console = Console()
    console.print(table)
    verdict = f"applies to {model}" if found.problem is None else f"does not apply to {model}: it {found.problem}"
    console.print(Text(f"This is {found.what}; it {verdict}."), soft_wrap=True)
