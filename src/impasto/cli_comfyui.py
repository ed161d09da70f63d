"""The command line's ``impasto comfyui …``: our nodes into ComfyUI and out again.

Knows options and what to tell afterwards. Holds no logic of its own (``comfyui/install.py``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

comfyui_app = typer.Typer(
    help="ComfyUI: install our nodes, or take them out.", no_args_is_help=True, rich_markup_mode="markdown"
)

ComfyUi = Annotated[Path, typer.Argument(help="ComfyUI's folder, the one with its main.py.", show_default=False)]
CustomNodes = Annotated[
    Path | None,
    typer.Option("--custom-nodes", help="Folder of its custom nodes, if elsewhere (ComfyUI's --base-directory)."),
]


@comfyui_app.command("install")
def install(comfyui: ComfyUi, custom_nodes: CustomNodes = None) -> None:
    """Put our nodes into a ComfyUI of 0.3.64 or later. Safe to repeat: do so after each update of impasto.

    A small folder is written, custom_nodes/impasto, with the example workflows. The nodes themselves are in the
    package impasto, which must be installed in the Python that runs ComfyUI, too:

        ~/ComfyUI/venv/bin/python -m pip install impasto

    Then install, say which server to use, and start ComfyUI as ever. The nodes are under *Impasto*:

        impasto comfyui install ~/ComfyUI

        export IMPASTO_SERVER_URL=http://127.0.0.1:8000 IMPASTO_API_KEY=$(impasto keys create comfyui)

        ~/ComfyUI/venv/bin/python ~/ComfyUI/main.py
    """
    from impasto.comfyui.install import check_comfyui, pythons_without_us
    from impasto.comfyui.install import install as put

    version = check_comfyui(comfyui)
    folder = put(comfyui, custom_nodes)
    print(f"installed into {folder} (ComfyUI {version}); restart ComfyUI, then look under Impasto", file=sys.stderr)
    for python in pythons_without_us(comfyui):
        print(f"{python} lacks the package: {python} -m pip install impasto", file=sys.stderr)


@comfyui_app.command("uninstall")
def uninstall(comfyui: ComfyUi, custom_nodes: CustomNodes = None) -> None:
    """Take our nodes out of a ComfyUI; workflows and the package stay.

    impasto comfyui uninstall ~/ComfyUI
    """
    from impasto.comfyui.install import uninstall as take

    folder = take(comfyui, custom_nodes)
    print("was not installed" if folder is None else f"deleted {folder}; restart ComfyUI", file=sys.stderr)


@comfyui_app.command("pack")
def pack(
    folder: Annotated[Path, typer.Argument(help="Folder to write, such as dist/impasto.", show_default=False)],
) -> None:
    """Write the pack as ComfyUI's registry takes it, to be published with its own tool.

    impasto comfyui pack dist/impasto && cd dist/impasto && comfy node publish
    """
    from impasto.comfyui.install import write_pack

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_pack(folder)
    print(f"wrote {folder}", file=sys.stderr)
