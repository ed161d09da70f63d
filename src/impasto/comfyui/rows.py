"""The node *LoRA stack*: up to five LoRAs by name, as a LORA_STACK that ours and other packs' nodes take.

Knows the rows and their order. Looks for no files: a name may be one that only the server knows.
"""

from __future__ import annotations

from typing import Any, Final

from comfy_api.latest import io  # type: ignore[import-not-found]

from impasto.comfyui.schema import CATEGORY, LoraStack
from impasto.comfyui.stack import StackedLora, read_stack
from impasto.types import LIMITS

ROWS: Final = LIMITS.max_loras
MOST: Final = LIMITS.lora_scale.high


class LoraStackRows(io.ComfyNode):  # type: ignore[misc]  # ComfyUI has no types
    """Names and scales to a LORA_STACK."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's fields."""
        name = "A file of the loras folder; for a server also its own names, owner/name of the hub, or a URL."
        rows = [
            field
            for row in range(1, ROWS + 1)
            for field in (
                io.String.Input(f"lora_{row}", default="", optional=row > 1, tooltip=f"{name} Empty: none."),
                io.Float.Input(
                    f"scale_{row}", default=1.0, min=-MOST, max=MOST, step=0.05, optional=row > 1,
                    tooltip="How strongly it is applied; 0 leaves it out. A server takes none below 0.",
                ),
            )
        ]  # fmt: skip
        return io.Schema(
            node_id="ImpastoLoraStack",
            display_name="LoRA stack (Impasto)",
            category=CATEGORY,
            description="Up to five LoRAs by name, after those of a stack before it.",
            inputs=[*rows, LoraStack.Input("lora_stack", optional=True, tooltip="LoRAs to put before these.")],
            outputs=[LoraStack.Output("stack", display_name="LORA_STACK")],
        )

    @classmethod
    def execute(cls, lora_stack: Any = None, **rows: Any) -> Any:
        """Return the stack before it, and then its own rows."""
        named = [
            (str(rows.get(f"lora_{row}") or "").strip(), rows.get(f"scale_{row}", 1.0)) for row in range(1, ROWS + 1)
        ]
        own = [StackedLora(name, scale, scale) for name, scale in named if name and scale]
        return io.NodeOutput([tuple(item) for item in (*read_stack(lora_stack), *own)])
