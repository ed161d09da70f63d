"""The node *LoRA inspect*: what a LoRA file is, and whether it applies to a checkpoint, as ``impasto lora inspect``.

Knows ComfyUI's folders and how the answer reads as text. What is in a file is ``lora.inspect``'s to find.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import folder_paths  # type: ignore[import-not-found]
from comfy_api.latest import io, ui  # type: ignore[import-not-found]

from impasto.comfyui.schema import CATEGORY, LoraStack
from impasto.comfyui.stack import read_stack
from impasto.errors import InvalidInput
from impasto.lora.inspect import Inspection, inspect_lora
from impasto.models.catalog import BUILTIN, BUILTIN_FOLDER, find_model
from impasto.models.shapes import parameter_shapes

NO_LORA: Final = "None"


class LoraInspect(io.ComfyNode):  # type: ignore[misc]  # ComfyUI has no types
    """LoRA files to a report; loads no model."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the node's fields."""
        return io.Schema(
            node_id="ImpastoLoraInspect",
            display_name="LoRA inspect (Impasto)",
            category=CATEGORY,
            description="What LoRA files are, and whether they apply: kinds, modules, base model, trigger words.",
            is_output_node=True,
            inputs=[
                io.Combo.Input("lora_name", options=[NO_LORA, *folder_paths.get_filename_list("loras")]),
                io.Combo.Input(
                    "checkpoint",
                    options=[BUILTIN, *folder_paths.get_filename_list("checkpoints")],
                    default=BUILTIN,
                    tooltip="The model to hold them against; of it, names and shapes are read, nothing is loaded.",
                ),
                LoraStack.Input("lora_stack", optional=True, tooltip="Files to look at before this one."),
            ],
            outputs=[
                io.String.Output("report", display_name="report"),
                io.Boolean.Output("applies", display_name="applies", tooltip="Whether all of them do."),
                io.String.Output("trigger_words", display_name="trigger words", tooltip="From the files' metadata."),
            ],
        )

    @classmethod
    def execute(cls, lora_name: str, checkpoint: str, lora_stack: Any = None) -> Any:
        """Look at each file.

        Raises:
            InvalidInput: No LoRA is named.
            LoraError: A file is not there, or no safetensors file.
            ModelError: The checkpoint is not SDXL.
        """
        names = [item.name for item in read_stack(lora_stack)] + ([] if lora_name == NO_LORA else [lora_name])
        if not names:
            raise InvalidInput("lora_name", "names no LoRA; choose one, or connect a LORA_STACK")
        shapes = parameter_shapes(find_model(_checkpoint(checkpoint)))
        found = [inspect_lora(_file(name, checkpoint), name, shapes) for name in names]
        text = "\n\n".join(inspection_text(inspection, checkpoint) for inspection in found)
        words = dict.fromkeys(word for inspection in found for word in inspection.report.trigger_words)
        return io.NodeOutput(
            text, all(inspection.problem is None for inspection in found), ", ".join(words), ui=ui.PreviewText(text)
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, checkpoint: str, **_: Any) -> Any:
        """Look again when a file was written anew."""
        files = (folder_paths.get_full_path("loras", lora_name), folder_paths.get_full_path("checkpoints", checkpoint))
        return [Path(file).stat().st_mtime_ns for file in files if file]


def inspection_text(found: Inspection, model: str) -> str:
    """Return the rows of the report, and the verdict in a sentence."""
    rows = found.report.rows()
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {text}".replace("\n", "\n" + " " * (width + 2)) for label, text in rows]
    verdict = f"applies to {model}" if found.problem is None else f"does not apply to {model}: it {found.problem}"
    return "\n".join([*lines, f"This is {found.what}; it {verdict}."])


def _checkpoint(name: str) -> str:
    return name if name == BUILTIN else str(folder_paths.get_full_path_or_raise("checkpoints", name))


def _file(name: str, checkpoint: str) -> Path:
    """Find a file of ComfyUI's folder, or one of the built-in model's own."""
    file = folder_paths.get_full_path("loras", name)
    if file is not None:
        return Path(file)
    own = BUILTIN_FOLDER / "loras" / f"{Path(name).stem}.safetensors"
    if checkpoint == BUILTIN and own.is_file():
        return own
    raise InvalidInput("lora_stack", f"names {name[:200]!r}, which is not in ComfyUI's loras folder; put it there")
