"""The ComfyUI node pack. ComfyUI asks ``comfy_entrypoint`` for its nodes.

Knows which module holds which node. A module that cannot be imported, such as a local one where its libraries are
missing, is told of in the log and costs its own nodes alone. Importing this package imports nothing of ComfyUI.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from typing import Any, Final

NODES: Final[Mapping[str, tuple[str, ...]]] = {  # module of this package -> its node classes, in the menu's order
    "remote": ("ServerSdxlLora",),
    "local": ("LocalSdxlLora",),
    "exact": ("LoadLoraExact",),
    "rows": ("LoraStackRows",),
    "inspect": ("LoraInspect",),
    "animate": ("ImageToVideo",),
}

log = logging.getLogger(__name__)


def node_classes() -> list[Any]:
    """Return every node class whose module is there and can be imported. Works inside ComfyUI alone."""
    found = []
    for module, names in NODES.items():
        path = f"{__name__}.{module}"
        if importlib.util.find_spec(path) is None:
            continue
        try:
            found += [getattr(importlib.import_module(path), name) for name in names]
        except (ImportError, AttributeError):
            log.exception("the Impasto nodes of %s are left out; the others are not affected", path)
    return found


async def comfy_entrypoint() -> Any:
    """Return the extension, as ComfyUI's V3 interface has it."""
    from impasto.comfyui.extension import ImpastoExtension

    return ImpastoExtension(node_classes())
