"""The names that modules have in the original SDXL code, worked out from a network's own diffusers names.

Knows how the original lays out a UNet's blocks (one list down, a middle, one list up) and OpenCLIP's text tower. Knows
no sizes: levels and layers are counted from the names given, so it holds for the base, the refiner and smaller models.

Source: Stability AI's ``generative-models``, ``sgm/modules/diffusionmodules/openaimodel.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {("resnets", 0): "middle_block.0", ("attentions", 0): "middle_block.1", ("resnets", 1): "middle_block.2"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID_BLOCK = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_TEXT_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.(.+)")


def original_names(modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield ``(original name, module)`` for each module that has one."""
    layout = _Layout(modules)
    for module in modules:
        if original := _TOP.get(module) or layout.original(module) or _open_clip(module):
            yield original, module


class _Layout:
    """Where each block of a UNet stands in the original's lists."""

    def __init__(self, modules: Sequence[str]) -> None:
        blocks = {(m[1], int(m[2]), m[3], int(m[4])) for name in modules if (m := _BLOCK.match(name))}
        self._attended = {(side, level, layer) for side, level, part, layer in blocks if part == "attentions"}
        self._start: dict[tuple[str, int], int] = {}
        self._layers: dict[tuple[str, int], int] = {}
        # Going down, block 0 is conv_in and every resampler has a block of its own; going up it ends the last layer's.
        for side, position in (("down", 1), ("up", 0)):
            for level in sorted({level for s, level, *_ in blocks if s == side}):
                layers = {layer for s, n, part, layer in blocks if (s, n, part) == (side, level, "resnets")}
                self._start[side, level], self._layers[side, level] = position, len(layers)
                position += len(layers) + ((side, level, "downsamplers", 0) in blocks)

    def original(self, module: str) -> str | None:
        if match := _MID_BLOCK.fullmatch(module):
            block = _MIDDLE.get((match[1], int(match[2])))
            return block and f"{block}.{_within(match[1], match[3])}"
        match = _BLOCK.fullmatch(module)
        if match is None:
            return None
        side, level, part, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        start, layers = self._start[side, level], self._layers[side, level]
        if part == "downsamplers":
            return f"input_blocks.{start + layers}.0.op"
        if part == "upsamplers":
            place = 1 + ((side, level, layers - 1) in self._attended)
            return f"output_blocks.{start + layers - 1}.{place}.{rest}"
        blocks = "input_blocks" if side == "down" else "output_blocks"
        return f"{blocks}.{start + layer}.{int(part == 'attentions')}.{_within(part, rest)}"


def _within(part: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if part == "resnets" else rest


def _open_clip(module: str) -> str | None:
    match = _TEXT_LAYER.fullmatch(module)
    if match is None or match[2] not in _OPEN_CLIP:
        return None
    return f"transformer.resblocks.{match[1]}.{_OPEN_CLIP[match[2]]}"
