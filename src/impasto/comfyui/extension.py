"""The pack as ComfyUI sees it: a list of node classes.

Knows ComfyUI's V3 interface for extensions. It can be imported inside ComfyUI alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import ComfyExtension  # type: ignore[import-not-found]


class ImpastoExtension(ComfyExtension):  # type: ignore[misc]  # ComfyUI has no types
    """Offers some node classes."""

    def __init__(self, nodes: Sequence[Any]) -> None:
        self._nodes = list(nodes)

    async def get_node_list(self) -> list[Any]:
        """Return them."""
        return self._nodes
