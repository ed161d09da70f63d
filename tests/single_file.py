"""Writes SDXL models as single files in the original key layout: the way back from diffusers' names.

Written from the layout's description, not from the loader, so that the two can disagree. Knows no loader.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
CLIP_G = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(
    path: Path, unet: Any, vae: Any, text_encoder: Any, text_encoder_2: Any, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a base or inpainting model: four networks' tensors under the original names."""
    return _save(path, base_layout(unet, vae, text_encoder, text_encoder_2), dtype)


def save_single_refiner(
    path: Path, unet: Any, vae: Any, text_encoder_2: Any, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a refiner: its only text encoder is the first embedder, without a ``transformer`` level."""
    return _save(path, refiner_layout(unet, vae, text_encoder_2), dtype)


def base_layout(unet: Any, vae: Any, text_encoder: Any, text_encoder_2: Any) -> dict[str, torch.Tensor]:
    """The tensors of a base model by their original names."""
    tensors = image_layout(unet, vae)
    for name, tensor in text_encoder.state_dict().items():
        tensors["conditioner.embedders.0.transformer.text_model." + name.removeprefix("text_model.")] = tensor
    return tensors | prefixed("conditioner.embedders.1.model.", clip_g_original(text_encoder_2.state_dict()))


def refiner_layout(unet: Any, vae: Any, text_encoder_2: Any) -> dict[str, torch.Tensor]:
    """The tensors of a refiner by their original names."""
    encoder = clip_g_original(text_encoder_2.state_dict())
    return image_layout(unet, vae) | prefixed("conditioner.embedders.0.model.", encoder)


def image_layout(unet: Any, vae: Any) -> dict[str, torch.Tensor]:
    attention_levels = {i for i, kind in enumerate(unet.config.up_block_types) if "CrossAttn" in kind}
    tensors = {
        "model.diffusion_model." + unet_original(name, attention_levels): tensor
        for name, tensor in unet.state_dict().items()
    }
    levels = len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        is_projection = ".attentions." in name and tensor.ndim == 2
        tensors["first_stage_model." + vae_original(name, levels)] = (
            tensor[:, :, None, None] if is_projection else tensor
        )
    return tensors


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _save(path: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Path:
    save_file({name: tensor.to(dtype).clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def unet_original(name: str, attention_levels: set[int]) -> str:
    for ours, theirs in TOP.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    if m := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        return f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}.{resnet(m[1], m[3])}"
    m = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name)
    assert m is not None, name
    level, part, layer, rest = int(m[2]), m[3], int(m[4]), m[5]
    if part == "downsamplers":
        return f"input_blocks.{3 * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{2 if level in attention_levels else 1}.{rest}"
    index = 3 * level + layer + (1 if m[1] == "down" else 0)
    side = "input_blocks" if m[1] == "down" else "output_blocks"
    return f"{side}.{index}.{1 if part == 'attentions' else 0}.{resnet(part, rest)}"


def resnet(part: str, rest: str) -> str:
    if part == "attentions":
        return rest
    head, tail = rest.rsplit(".", 1)
    return f"{RESNET[head]}.{tail}"


def vae_original(name: str, levels: int) -> str:
    if m := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name):
        level = int(m[3]) if m[2] == "down" else levels - 1 - int(m[3])
        if m[4] == "resnets":
            return f"{m[1]}.{m[2]}.{level}.block.{m[5]}.{m[6].replace('conv_shortcut', 'nin_shortcut')}"
        return f"{m[1]}.{m[2]}.{level}.{m[2]}sample.{m[6]}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return f"{m[1]}.mid.block_{int(m[2]) + 1}.{m[3]}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        return f"{m[1]}.mid.attn_1.{ATTENTION[m[2]]}.{m[3]}"
    return name.replace("conv_norm_out", "norm_out")


def clip_g_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    layers = {int(m[1]) for name in state if (m := re.match(r"encoder\.layers\.(\d+)\.", name))}
    for layer in layers:
        prefix, theirs = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            parts = [state[f"{prefix}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            out[f"{theirs}attn.in_proj_{kind}"] = torch.cat(parts)
            for ours, original in CLIP_G.items():
                out[f"{theirs}{original}.{kind}"] = state[f"{prefix}{ours}.{kind}"]
    return out
