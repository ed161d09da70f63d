"""The networks that the LoRAs of this suite are for: SDXL's real classes and names, small; and their other names.

The original names stand here as a table of its own making, block by block, so that the library's rule is not checked
with itself.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from impasto.lora.keys import Target
from tests.random_sdxl import WIDTHS, base_unet, character_tokenizer, refiner_unet, seeded, text_config

LAYERS = ("linear", "1x1", "3x3", "te1", "te2", "norm")

# Original block -> diffusers block. The base has three levels, attention on the lower two; the refiner four, attention
# on the two in the middle.
BASE_BLOCKS = {
    "input_blocks.1.0": "down_blocks.0.resnets.0", "input_blocks.2.0": "down_blocks.0.resnets.1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0": "down_blocks.1.resnets.0", "input_blocks.4.1": "down_blocks.1.attentions.0",
    "input_blocks.5.0": "down_blocks.1.resnets.1", "input_blocks.5.1": "down_blocks.1.attentions.1",
    "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks.7.0": "down_blocks.2.resnets.0", "input_blocks.7.1": "down_blocks.2.attentions.0",
    "input_blocks.8.0": "down_blocks.2.resnets.1", "input_blocks.8.1": "down_blocks.2.attentions.1",
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0", "output_blocks.0.1": "up_blocks.0.attentions.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1", "output_blocks.1.1": "up_blocks.0.attentions.1",
    "output_blocks.2.0": "up_blocks.0.resnets.2", "output_blocks.2.1": "up_blocks.0.attentions.2",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.3.0": "up_blocks.1.resnets.0", "output_blocks.3.1": "up_blocks.1.attentions.0",
    "output_blocks.4.0": "up_blocks.1.resnets.1", "output_blocks.4.1": "up_blocks.1.attentions.1",
    "output_blocks.5.0": "up_blocks.1.resnets.2", "output_blocks.5.1": "up_blocks.1.attentions.2",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.6.0": "up_blocks.2.resnets.0", "output_blocks.7.0": "up_blocks.2.resnets.1",
    "output_blocks.8.0": "up_blocks.2.resnets.2",
}  # fmt: skip
REFINER_BLOCKS = {
    "input_blocks.1.0": "down_blocks.0.resnets.0", "input_blocks.2.0": "down_blocks.0.resnets.1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0": "down_blocks.1.resnets.0", "input_blocks.4.1": "down_blocks.1.attentions.0",
    "input_blocks.5.0": "down_blocks.1.resnets.1", "input_blocks.5.1": "down_blocks.1.attentions.1",
    "input_blocks.6.0.op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks.7.0": "down_blocks.2.resnets.0", "input_blocks.7.1": "down_blocks.2.attentions.0",
    "input_blocks.8.0": "down_blocks.2.resnets.1", "input_blocks.8.1": "down_blocks.2.attentions.1",
    "input_blocks.9.0.op": "down_blocks.2.downsamplers.0.conv",
    "input_blocks.10.0": "down_blocks.3.resnets.0", "input_blocks.11.0": "down_blocks.3.resnets.1",
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0", "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.2.0": "up_blocks.0.resnets.2", "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.3.0": "up_blocks.1.resnets.0", "output_blocks.3.1": "up_blocks.1.attentions.0",
    "output_blocks.4.0": "up_blocks.1.resnets.1", "output_blocks.4.1": "up_blocks.1.attentions.1",
    "output_blocks.5.0": "up_blocks.1.resnets.2", "output_blocks.5.1": "up_blocks.1.attentions.2",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.6.0": "up_blocks.2.resnets.0", "output_blocks.6.1": "up_blocks.2.attentions.0",
    "output_blocks.7.0": "up_blocks.2.resnets.1", "output_blocks.7.1": "up_blocks.2.attentions.1",
    "output_blocks.8.0": "up_blocks.2.resnets.2", "output_blocks.8.1": "up_blocks.2.attentions.2",
    "output_blocks.8.2.conv": "up_blocks.2.upsamplers.0.conv",
    "output_blocks.9.0": "up_blocks.3.resnets.0", "output_blocks.10.0": "up_blocks.3.resnets.1",
    "output_blocks.11.0": "up_blocks.3.resnets.2",
}  # fmt: skip
TOP = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


@dataclass(frozen=True)
class Networks:
    """A model's networks, and every module's layer type and original name."""

    modules: dict[str, nn.Module]
    layers: dict[str, tuple[Target, ...]]
    original: dict[tuple[str, str], str]

    def shape(self, target: Target) -> tuple[int, ...]:
        """Of the module's weight."""
        return tuple(self.modules[target.network].get_submodule(target.module).weight.shape)

    def has_bias(self, target: Target) -> bool:
        """Whether the module has one."""
        return self.modules[target.network].get_submodule(target.module).bias is not None

    def parameter(self, target: Target) -> torch.Tensor:
        """The parameter as it is now."""
        return getattr(self.modules[target.network].get_submodule(target.module), target.parameter).detach()


@cache
def networks() -> Networks:
    """The base's UNet and both text encoders, float32, random weights."""
    tokenizer = character_tokenizer()
    return networks_of(
        {
            "unet": seeded(0, lambda: base_unet(4)),
            "text_encoder": seeded(1, lambda: CLIPTextModel(text_config(WIDTHS[0], tokenizer))),
            "text_encoder_2": seeded(2, lambda: CLIPTextModelWithProjection(text_config(WIDTHS[1], tokenizer))),
        }
    )


@cache
def with_refiner() -> Networks:
    """The base's networks and the refiner's UNet."""
    return networks_of({**networks().modules, "refiner": seeded(3, refiner_unet)})


def networks_of(modules: dict[str, nn.Module]) -> Networks:
    """Networks with every module's layer type and original name worked out."""
    layers: dict[str, list[Target]] = {layer: [] for layer in LAYERS}
    for network, root in modules.items():
        for name, module in root.named_modules():
            if (layer := _layer(network, module)) is not None:
                layers[layer].append(Target(network, name))
    original = {
        (network, module): name
        for network, blocks in (("unet", BASE_BLOCKS), ("refiner", REFINER_BLOCKS))
        if network in modules
        for name, module in _originals(blocks, modules[network])
    }
    return Networks(modules, {layer: tuple(targets) for layer, targets in layers.items()}, original)


def _layer(network: str, module: nn.Module) -> str | None:
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return "norm"
    if isinstance(module, nn.Linear):
        return {"text_encoder": "te1", "text_encoder_2": "te2"}.get(network, "linear")
    if isinstance(module, nn.Conv2d) and network in ("unet", "refiner"):
        return "1x1" if module.kernel_size == (1, 1) else "3x3"
    return None


def _originals(blocks: dict[str, str], root: nn.Module):
    whole = {ours: name for name, ours in (TOP | blocks).items()}
    for module, _ in root.named_modules():
        if module in whole:
            yield whole[module], module
            continue
        block = next((ours for ours in blocks.values() if module.startswith(f"{ours}.")), None)
        if block is not None:
            rest = module.removeprefix(f"{block}.")
            inside = {ours: name for name, ours in RESNET.items()} if ".resnets." in block else {}
            yield f"{whole[block]}.{inside.get(rest, rest)}", module
