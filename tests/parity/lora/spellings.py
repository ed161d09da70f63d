"""Spellings: how trainers and tools write the key of one part of one module's adapter.

Knows the words of each scheme. Knows no kinds beyond which of them a scheme can write.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from impasto.lora.keys import Target
from tests.parity.lora.networks import Networks

# Part -> suffix, by kohya's and LyCORIS' words.
KOHYA = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "a1": "a1.weight", "a2": "a2.weight",
    "b1": "b1.weight", "b2": "b2.weight", "bm": "bm.weight", "oft_R": "oft_R.weight", "scaled_oft": "oft_R.scaled_oft",
    "magnitude": "lora_magnitude_vector.weight", "values": "lora_E",
}  # fmt: skip
PEFT = KOHYA | {"down": "lora_A.weight", "up": "lora_B.weight"}
PEFT_DEFAULT = PEFT | {
    "down": "lora_A.default.weight", "up": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default",
}  # fmt: skip
DIFFUSERS = KOHYA | {"down": "lora.down.weight", "up": "lora.up.weight"}
LINEAR_LAYER = KOHYA | {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight"}
TEXTS = {"text_encoder": ("te1", "clip_l"), "text_encoder_2": ("te2", "clip_g")}
Spell = Callable[[Networks, Target], str | None]


@dataclass(frozen=True)
class Spelling:
    """One scheme.

    Attributes:
        module: The name of a module in it; ``None`` where it cannot name the module.
        parts: Part -> suffix; a part that is not here has its own name.
        only: The parts that it can write; empty for all.
        no_alpha: Whether it has no place for alpha.
        no_conv: Whether OFTv2 in it is PEFT's, which turns the inputs of convolutions too.
    """

    module: Spell
    parts: dict[str, str] = field(default_factory=lambda: KOHYA)
    only: frozenset[str] = frozenset()
    no_alpha: bool = False
    no_conv: bool = False

    def key(self, module: str, part: str) -> str:
        """Return the key of a part."""
        return f"{module}{'' if module.endswith('_lora') else '.'}{self.parts.get(part, part)}"

    def writes(self, parts: dict[str, object]) -> bool:
        """Whether it can write an adapter of these parts."""
        if self.no_alpha and "alpha" in parts:
            return False
        return not self.only or parts.keys() <= self.only | {"alpha"}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _text(target: Target) -> str:
    """The text encoders' names as they were before transformers 5, which is how nearly every file has them."""
    name = target.module.removeprefix("text_model.")
    return name if name.startswith("text_projection") else f"text_model.{name}"


def _original(networks: Networks, target: Target) -> str:
    return networks.original[target.network, target.module]


def _unet_or_text(unet: Callable[[Networks, Target], str], text: Callable[[Target], str]) -> Spell:
    def spell(networks: Networks, target: Target) -> str | None:
        return text(target) if target.network in TEXTS else unet(networks, target)

    return spell


def _kohya_text(target: Target) -> str:
    return f"lora_{TEXTS[target.network][0]}_{_flat(_text(target))}"


def _dotted_text(target: Target) -> str:
    return f"{target.network}.{_text(target)}"


def _comfy_text(target: Target) -> str:
    return f"text_encoders.{TEXTS[target.network][1]}.transformer.{_text(target)}"


def _processor(prefix: str) -> Spell:
    """diffusers' first attention processors: the UNet's attention alone."""

    def spell(networks: Networks, target: Target) -> str | None:
        block, dot, part = target.module.partition(".attn1.")
        if not dot:
            block, dot, part = target.module.partition(".attn2.")
        if target.network in TEXTS or not dot:
            return None
        return f"{prefix}{block}{dot}processor.{part.removesuffix('.0')}_lora"

    return spell


def _unet_only(name: Callable[[Networks, Target], str]) -> Spell:
    return lambda networks, target: None if target.network in TEXTS else name(networks, target)


LOW_RANK = frozenset({"down", "up"})
OFT_BLOCKS = frozenset({"oft_blocks", "oft_diag", "rescale"})

SPELLINGS: dict[str, Spelling] = {
    "kohya, original names": Spelling(
        _unet_or_text(lambda n, t: f"lora_unet_{_flat(_original(n, t))}", _kohya_text)
    ),
    "kohya, diffusers names": Spelling(_unet_or_text(lambda n, t: f"lora_unet_{_flat(t.module)}", _kohya_text)),
    "kohya, without text_model": Spelling(
        _unet_or_text(
            lambda n, t: f"lora_unet_{_flat(t.module)}",
            lambda t: f"lora_{TEXTS[t.network][0]}_{_flat(_text(t).removeprefix('text_model.'))}",
        )
    ),
    "lycoris_": Spelling(_unet_only(lambda n, t: f"lycoris_{_flat(t.module)}")),
    "oft_unet_": Spelling(
        _unet_or_text(
            lambda n, t: f"oft_unet_{_flat(_original(n, t))}", lambda t: _kohya_text(t).replace("lora_", "oft_", 1)
        ),
        only=OFT_BLOCKS,
    ),
    "PEFT in diffusers": Spelling(_unet_or_text(lambda n, t: f"unet.{t.module}", _dotted_text), PEFT),
    "PEFT in diffusers, without text_model": Spelling(
        _unet_or_text(
            lambda n, t: f"unet.{t.module}", lambda t: f"{t.network}.{_text(t).removeprefix('text_model.')}"
        ),
        PEFT,
    ),
    "PEFT in diffusers, kohya's suffixes": Spelling(_unet_or_text(lambda n, t: f"unet.{t.module}", _dotted_text)),
    "PEFT, base_model.model.": Spelling(
        _unet_only(lambda n, t: f"base_model.model.{t.module}"), PEFT, no_conv=True
    ),
    "PEFT, unet.base_model.model.": Spelling(
        _unet_or_text(
            lambda n, t: f"unet.base_model.model.{t.module}",
            lambda t: f"{t.network}.base_model.model.{_text(t)}",
        ),
        PEFT,
        no_conv=True,
    ),
    "PEFT, .default.": Spelling(
        _unet_only(lambda n, t: f"base_model.model.{t.module}"), PEFT_DEFAULT, no_conv=True
    ),
    "PEFT, no prefix": Spelling(_unet_only(lambda n, t: t.module), PEFT),
    "attention processors, unet.": Spelling(
        _processor("unet."), {"down": ".down.weight", "up": ".up.weight"}, only=LOW_RANK, no_alpha=True
    ),
    "attention processors, no prefix": Spelling(
        _processor(""), {"down": ".down.weight", "up": ".up.weight"}, only=LOW_RANK, no_alpha=True
    ),
    "diffusers, .lora.down": Spelling(
        _unet_only(lambda n, t: f"unet.{t.module}"), DIFFUSERS, only=LOW_RANK
    ),
    "diffusers, lora_linear_layer": Spelling(
        _unet_or_text(lambda n, t: f"unet.{t.module}", _dotted_text), LINEAR_LAYER, only=LOW_RANK
    ),
    "diffusion_model.": Spelling(
        _unet_or_text(lambda n, t: f"diffusion_model.{_original(n, t)}", _comfy_text), PEFT
    ),
    "model.diffusion_model.": Spelling(
        _unet_or_text(lambda n, t: f"model.diffusion_model.{_original(n, t)}", _comfy_text)
    ),
}  # fmt: skip
