"""Lets ComfyUI load SDXL checkpoints of other widths than the real one: for tests, in which five gigabytes are no use.

ComfyUI knows a model by its widths and puts 32 groups in every norm. Here its own classes are given the widths that a
checkpoint has, and the groups and heads that go with them. It is a custom node without nodes: copied into
``custom_nodes``, or imported by a script that has ComfyUI on its path.
"""

from dataclasses import dataclass

import comfy.ldm.modules.diffusionmodules.model as vae_layers
import comfy.model_base
import comfy.ops
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import torch

NODE_CLASS_MAPPINGS: dict = {}


@dataclass(frozen=True)
class Widths:
    """What a checkpoint's tensors do not tell."""

    groups: int  # in the norms
    head: int  # channels of an attention head
    text_heads: tuple[int, int]
    scale: float = 0.13025  # of the latents
    vae_groups: int = 32


# By the UNet's first channels: the conformance suite's model, the built-in one, and one with SDXL's own 64 to a head.
WIDTHS = {8: Widths(4, 8, (2, 2)), 32: Widths(8, 32, (2, 3), 1.0, 1), 64: Widths(32, 64, (1, 1))}
GROUPS = "groups of the small model's norms"  # stands among the VAE's tensors for a moment
TEXT = {
    "clip_l": ("conditioner.embedders.0.transformer.text_model.", "encoder.layers", "mlp.fc1.weight"),
    "clip_g": ("conditioner.embedders.1.model.", "transformer.resblocks", "mlp.c_fc.weight"),
}


def operations(groups: int) -> type:
    """ComfyUI's operations with that many groups in a norm."""

    class Operations(comfy.ops.manual_cast):
        class GroupNorm(comfy.ops.manual_cast.GroupNorm):
            def __init__(self, num_groups: int, num_channels: int, **options: object) -> None:
                super().__init__(groups, num_channels, **options)

    return Operations


class SmallSDXL(comfy.supported_models.SDXL):
    """SDXL of any width in ``WIDTHS``."""

    unet_config = {"use_linear_in_transformer": True, "use_temporal_attention": False}  # noqa: RUF012

    @classmethod
    def matches(cls, unet_config: dict, state_dict: dict | None = None) -> bool:
        return super().matches(unet_config, state_dict) and unet_config.get("model_channels") in WIDTHS

    def __init__(self, unet_config: dict) -> None:
        self.widths = WIDTHS[unet_config["model_channels"]]
        super().__init__(unet_config)
        self.unet_config["num_head_channels"] = self.widths.head
        self.latent_format.scale_factor = self.widths.scale

    def get_model(self, state_dict: dict, prefix: str = "", device: object = None) -> comfy.model_base.SDXL:
        self.custom_operations = operations(self.widths.groups)
        made = super().get_model(state_dict, prefix, device)
        pooled = state_dict[TEXT["clip_g"][0] + "text_projection"].shape[1]
        made.embedder.dim = (self.unet_config["adm_in_channels"] - pooled) // 6
        return made

    def process_vae_state_dict(self, state_dict: dict) -> dict:
        return with_attention(state_dict) | {GROUPS: torch.tensor(self.widths.vae_groups)}

    def clip_target(self, state_dict: dict | None = None) -> comfy.supported_models_base.ClipTarget:
        configs = {
            f"{name}_model_config": text_config(name, state_dict or {}, heads)
            for name, heads in zip(TEXT, self.widths.text_heads, strict=True)
        }

        class SmallClip(comfy.sdxl_clip.SDXLClipModel):
            def __init__(self, device="cpu", dtype=None, model_options=None) -> None:
                super().__init__(device=device, dtype=dtype, model_options={**(model_options or {}), **configs})

        return comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, SmallClip)


def text_config(name: str, state_dict: dict, heads: int) -> dict:
    """The sizes of a text encoder, read off its tensors."""
    prefix, layers, wide = TEXT[name]
    found = {key: tensor.shape for key, tensor in state_dict.items() if key.startswith(f"{prefix}{layers}.")}
    [inner, width] = found[f"{prefix}{layers}.0.{wide}"]
    count = 1 + max(int(key.removeprefix(f"{prefix}{layers}.").split(".")[0]) for key in found)
    return {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": count, "num_attention_heads": heads,
        "projection_dim": width,
    }  # fmt: skip


def whole_vocabulary(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors with tables of all of CLIP's words, as ComfyUI wants them."""
    words = 49408
    tables = ("token_embedding.weight",)
    return {
        key: torch.cat([tensor, tensor.new_zeros(words - len(tensor), tensor.shape[1])])
        if key.endswith(tables) and len(tensor) < words
        else tensor
        for key, tensor in tensors.items()
    }


def with_attention(vae: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a VAE's tensors with the attention that ComfyUI's always has in its middle: where there is none, zeros."""
    zeros = {}
    for half in ("encoder", "decoder"):
        width = vae[f"{half}.mid.block_1.conv1.weight"].shape[0]
        for part in ("norm", "q", "k", "v", "proj_out"):
            shape = (width,) if part == "norm" else (width, width, 1, 1)
            zeros |= {f"{half}.mid.attn_1.{part}.weight": torch.zeros(shape), f"{half}.mid.attn_1.{part}.bias":
                      torch.zeros(width)}  # fmt: skip
    return zeros | vae


class SmallVAE(comfy.sd.VAE):
    """ComfyUI's VAE, its widths read off its tensors where they are those of a small model."""

    def __init__(self, sd: dict | None = None, **options: object) -> None:
        groups = (sd or {}).pop(GROUPS, None)
        if groups is None:
            super().__init__(sd=sd, **options)
            return
        usual, vae_layers.ops = vae_layers.ops, operations(int(groups))
        try:
            super().__init__(sd=sd, **{**options, "config": {"params": vae_params(sd or {})}})
        finally:
            vae_layers.ops = usual


def vae_params(sd: dict) -> dict:
    """The arguments of ComfyUI's autoencoder for these tensors."""
    levels = range(1 + max(int(key.split(".")[2]) for key in sd if key.startswith("encoder.down.")))
    widths = [sd[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in levels]
    blocks = len({key.split(".")[4] for key in sd if key.startswith("encoder.down.0.block.")})
    first = widths[0]
    config = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": first,
        "ch_mult": [width // first for width in widths], "num_res_blocks": blocks, "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    return {"ddconfig": config, "embed_dim": 4}


comfy.supported_models.models.insert(0, SmallSDXL)
comfy.sd.VAE = SmallVAE
