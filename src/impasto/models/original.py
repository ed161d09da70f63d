"""The original SDXL checkpoint layout: names of its tensors, translated to diffusers' and transformers' names.

Knows the two naming schemes and the shapes that tell sizes. Knows no files, no classes of networks, and not which
kind of model a file is: that is ``kinds``'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

State = dict[str, Tensor]

# Buffers of the training code that carry no weights of the networks; and the first encoder's projection, which some
# tools save and SDXL never uses.
NOT_WEIGHTS = re.compile(
    r"denoiser\.|model_ema\.|alphas|betas|sqrt_|log_|posterior_|logvar|lvlb|v_pred$|ztsnr$|.*position_ids$|.*logit_scale$"
    r"|conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)?$"
)

_PER_LEVEL = 3  # two layers and one resampler
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_TOP = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_CLIP_G_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def unet_name(name: str) -> str | None:
    """Translate a UNet name (without its prefix) to diffusers'; ``None`` if it is not one."""
    for original, ours in _UNET_TOP.items():
        if name.startswith(original + "."):
            return ours + name.removeprefix(original)
    match = re.match(r"(input_blocks|output_blocks|middle_block)\.(\d+)\.(?:(\d+)\.)?(.+)", name)
    if match is None:
        return None
    side, first, second, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        full = rest if second is None else f"{second}.{rest}"
        return f"mid_block.attentions.0.{full}" if first == 1 else _resnet(f"mid_block.resnets.{first // 2}", full)
    if second is None:
        return None
    index = first - 1 if side == "input_blocks" else first
    level, layer = divmod(index, _PER_LEVEL)
    block = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
    if rest.startswith("op."):
        return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
    if rest.startswith("conv."):
        return f"{block}.upsamplers.0.{rest}"
    if second == "0":
        return _resnet(f"{block}.resnets.{layer}", rest)
    return f"{block}.attentions.{layer}.{rest}"


def _resnet(block: str, rest: str) -> str | None:
    for original, ours in _RESNET.items():
        if rest.startswith(original + "."):
            return f"{block}.{ours}{rest.removeprefix(original)}"
    return None


def vae_name(name: str, levels: int) -> str | None:
    """Translate a VAE name (without its prefix) to diffusers'; ``levels`` is how many resolutions it has."""
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)\.(\d+)\.block\.(\d+)\.(.+)", name):
        level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
        rest = match[5].replace("nin_shortcut", "conv_shortcut")
        return f"{match[1]}.{match[2]}_blocks.{level}.resnets.{match[4]}.{rest}"
    if match := re.fullmatch(r"encoder\.down\.(\d+)\.downsample\.(.+)", name):
        return f"encoder.down_blocks.{match[1]}.downsamplers.0.{match[2]}"
    if match := re.fullmatch(r"decoder\.up\.(\d+)\.upsample\.(.+)", name):
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}.upsamplers.0.{match[2]}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", name):
        return f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{match[3]}"
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(norm|q|k|v|proj_out)\.(.+)", name):
        return f"{match[1]}.mid_block.attentions.0.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"(encoder|decoder)\.norm_out\.(.+)", name):
        return f"{match[1]}.conv_norm_out.{match[2]}"
    plain = re.fullmatch(r"((encoder|decoder)\.conv_(in|out)|(post_)?quant_conv)\..+", name)
    return name if plain else None


def convert_unet(state: Mapping[str, Tensor]) -> State:
    """Translate the UNet's tensors (names without their prefix)."""
    return dict(_renamed(state, unet_name))


def convert_vae(state: Mapping[str, Tensor]) -> State:
    """Translate the VAE's tensors; its attention's 1x1 convolutions become the linears they are."""
    levels = 1 + max(int(match[1]) for name in state if (match := re.match(r"encoder\.down\.(\d+)\.", name)))
    converted = dict(_renamed(state, lambda name: vae_name(name, levels)))
    return {
        name: tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
        for name, tensor in converted.items()
    }


def convert_clip_g(state: Mapping[str, Tensor]) -> State:
    """Translate OpenCLIP's text tower: split the fused projections, turn the output projection."""
    converted: State = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name):
            layer = f"text_model.encoder.layers.{match[1]}.self_attn"
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{layer}.{part}_proj.{match[2]}"] = piece
        else:
            translated = _clip_g_name(name)
            if translated is None:
                raise KeyError(name)
            converted[translated] = tensor.t().contiguous() if name == "text_projection" else tensor
    return converted


def _clip_g_name(name: str) -> str | None:
    whole = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "text_projection": "text_projection.weight",
    }
    if name in whole:
        return whole[name]
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _CLIP_G_LAYER:
        return None
    return f"text_model.encoder.layers.{match[1]}.{_CLIP_G_LAYER[match[2]]}.{match[3]}"


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        translated = rename(name)
        if translated is None:
            raise KeyError(name)
        yield translated, tensor


def unet_config(state: Mapping[str, Tensor], *, pooled: int, size_ids: int) -> dict[str, Any]:
    """Read the UNet's configuration off the shapes of its (translated) tensors; SDXL has 64 channels a head.

    Args:
        state: Tensors by diffusers' names.
        pooled: Width of the pooled text embedding.
        size_ids: How many numbers of size, crop and score join it: six for the base, five for the refiner.
    """
    levels = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("down_blocks."))
    channels = [state[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
    depths = [_depth(state, f"down_blocks.{i}.attentions.0.transformer_blocks.") for i in range(levels)]
    context = next(t for name, t in state.items() if name.endswith("attn2.to_k.weight"))
    embedded = state["add_embedding.linear_1.weight"].shape[1]
    # diffusers gives the middle the last level's depth, also where that level itself has no attention.
    last = depths[-1] or _depth(state, "mid_block.attentions.0.transformer_blocks.")
    return {
        "in_channels": state["conv_in.weight"].shape[1],
        "block_out_channels": channels,
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [max(depth, 1) for depth in [*depths[:-1], last]],
        "attention_head_dim": [max(width // 64, 1) for width in channels],
        "cross_attention_dim": context.shape[1],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (embedded - pooled) // size_ids,
        "projection_class_embeddings_input_dim": embedded,
        "sample_size": 128,
    }


def vae_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the VAE's configuration off its (translated) tensors."""
    levels = 1 + max(int(m[1]) for name in state if (m := re.match(r"encoder\.down_blocks\.(\d+)\.", name)))
    channels = [state[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
    return {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": 2,
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "scaling_factor": 0.13025,
        "force_upcast": True,
        "sample_size": 1024,
    }


def text_config(state: Mapping[str, Tensor], *, activation: str, end_token: int) -> dict[str, Any]:
    """Read a text encoder's configuration off its tensors; CLIP has 64 channels a head."""
    embedding = next(t for name, t in state.items() if name.endswith("token_embedding.weight"))
    positions = next(t for name, t in state.items() if name.endswith("position_embedding.weight"))
    inner = next(t for name, t in state.items() if name.endswith("layers.0.mlp.fc1.weight"))
    layers = 1 + max(int(m[1]) for name in state if (m := re.search(r"encoder\.layers\.(\d+)\.", name)))
    width = embedding.shape[1]
    projection = state.get("text_projection.weight")
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": inner.shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": positions.shape[0],
        "projection_dim": width if projection is None else projection.shape[0],
        "hidden_act": activation,
        "bos_token_id": end_token - 1,
        "eos_token_id": end_token,
        "pad_token_id": 1,
    }


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    found = [int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)]
    return 1 + max(found) if found else 0
