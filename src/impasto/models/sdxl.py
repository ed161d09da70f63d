"""SDXL's networks: two text encoders, the UNet and the VAE; load, encode, predict, decode.

Knows diffusers and transformers, and is the only file that does. Knows no requests, samplers or noise levels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from impasto.errors import InvalidInput, ModelError
from impasto.models.catalog import BUILTIN_FOLDER, ModelSource
from impasto.models.checkpoint import END_TOKEN, read_checkpoint
from impasto.models.original import State, text_config, unet_config, vae_config

MAX_WINDOWS = 20  # of a prompt; 1,500 tokens


@dataclass(slots=True, eq=False)
class Sdxl:
    """The component set of an SDXL base model, on one device.

    ``predict`` and ``decode`` take and give float32; inside, the networks run in ``dtype``.
    """

    unet: Any
    vae: Any
    text_encoders: tuple[Any, Any]
    tokenizers: tuple[Any, ...]
    scheduler_config: dict[str, Any]
    zero_absent_negative: bool  # force_zeros_for_empty_prompt: an absent negative prompt is all zeros
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Sdxl:
        """Load a diffusers folder or a single-file checkpoint.

        Raises:
            ModelError: A part is missing, cut short or of another kind; the message names the part.
        """
        with _no_progress_bars():
            parts = _from_folder(source, dtype) if source.path.is_dir() else _from_checkpoint(source, dtype)
        if dtype == torch.float16 and parts.vae.config.force_upcast:
            parts.vae.float()  # SDXL's own VAE overflows float16 (black pictures); its configuration says so
        networks = (parts.unet, parts.vae, parts.text_encoder, parts.text_encoder_2)
        unet, vae, first, second = (n.to(device).requires_grad_(False).eval() for n in networks)
        return cls(
            unet=unet,
            vae=vae,
            text_encoders=(first, second),
            tokenizers=tuple(
                CLIPTokenizer.from_pretrained(parts.tokenizers / part, local_files_only=True)
                for part in ("tokenizer", "tokenizer_2")
            ),
            scheduler_config=parts.scheduler_config,
            zero_absent_negative=bool(source.index.get("force_zeros_for_empty_prompt", True)),
            device=device,
            dtype=dtype,
        )

    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Embed one prompt with both encoders.

        Returns:
            Tokens ``[77 * windows, D]``, the encoders' penultimate hidden states side by side (768 + 1280 for SDXL),
            and the second encoder's pooled projection of the first window ``[P]``. A prompt longer than the
            encoders' window is read in several.

        Raises:
            InvalidInput: The prompt has more than ``MAX_WINDOWS`` windows.

        Source: Podell et al. 2023 (arXiv:2307.01952), section 2.1.
        """
        states = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            output = encoder(_windows(tokenizer, prompt).to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2].flatten(0, 1))
        return torch.cat(states, dim=-1), output.text_embeds[0]

    def predict(self, latents: Tensor, timesteps: Tensor, tokens: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """Run the UNet once over a batch of rows.

        Args:
            latents: Scaled noisy latents ``[N, 4, h, w]``, float32.
            timesteps: Training timestep of each row, ``[N]``.
            tokens: ``[N, T, D]``; pooled: ``[N, P]``; time_ids: ``[N, 6]``.

        Returns:
            The predicted noise ``[N, 4, h, w]``, float32.
        """
        output = self.unet(
            latents.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=tokens.to(self.device, self.dtype),
            added_cond_kwargs={
                "text_embeds": pooled.to(self.device, self.dtype),
                "time_ids": time_ids.to(self.device, self.dtype),
            },
            return_dict=False,
        )[0]
        return output.float()  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``[4, h, w]`` to a picture ``[8h, 8w, 3]``, uint8, on the CPU."""
        config = self.vae.config
        latents = latents[None].to(self.device, self.vae.dtype)
        if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
            mean, std = (latents.new_tensor(v).view(1, -1, 1, 1) for v in (config.latents_mean, config.latents_std))
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        picture: Tensor = self.vae.decode(latents, return_dict=False)[0][0].float()
        return ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()

    def networks(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may change, by diffusers' names."""
        return {"unet": self.unet, "text_encoder": self.text_encoders[0], "text_encoder_2": self.text_encoders[1]}


def _windows(tokenizer: Any, prompt: str) -> Tensor:
    """Cut a prompt into the encoder's windows, each with its own start and end, ``[windows, 77]``."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    room = tokenizer.model_max_length - 2
    chunks = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
    if len(chunks) > MAX_WINDOWS:
        raise InvalidInput("prompt", f"has {len(ids)} tokens; at most {MAX_WINDOWS * room} are read")
    return torch.tensor(
        [
            [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (room - len(chunk))
            for chunk in chunks
        ]
    )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars off the terminal: callers show their own progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """What a source holds, on the CPU in the asked dtype."""

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizers: Path  # folder with ``tokenizer`` and ``tokenizer_2``
    scheduler_config: dict[str, Any]


def _from_folder(source: ModelSource, dtype: torch.dtype) -> _Parts:
    return _Parts(
        unet=_load_network(UNet2DConditionModel, source, "unet", dtype),
        vae=_load_network(AutoencoderKL, source, "vae", dtype),
        text_encoder=_load_network(CLIPTextModel, source, "text_encoder", dtype),
        text_encoder_2=_load_network(CLIPTextModelWithProjection, source, "text_encoder_2", dtype),
        tokenizers=source.path,
        scheduler_config=_read_json(source, "scheduler/scheduler_config.json"),
    )


def _load_network(kind: Any, source: ModelSource, part: str, dtype: torch.dtype) -> Any:
    folder = source.path / part
    plain = list(folder.glob("*.safetensors"))
    if not plain:
        raise ModelError(f"model {source.name!r}: {part} has no .safetensors file (pickles are not loaded)")
    variant = "fp16" if all(".fp16." in path.name for path in plain) else None
    options = {"dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
    try:
        network, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {source.name!r}: {part} cannot be loaded: {str(error).splitlines()[0]}") from error
    # The libraries fill what is missing with random numbers and only warn.
    wrong = sorted(map(str, [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise ModelError(f"model {source.name!r}: {part}: {len(wrong)} tensors missing or unknown, first {wrong[0]!r}")
    return network


def _from_checkpoint(source: ModelSource, dtype: torch.dtype) -> _Parts:
    """Build the networks from a single file; the tokenizers, which no checkpoint has, are CLIP's own."""
    found = read_checkpoint(source.path, source.name)
    first = text_config(found.text_encoder, activation="quick_gelu", end_token=END_TOKEN)
    second = text_config(found.text_encoder_2, activation="gelu", end_token=END_TOKEN)
    build = partial(_build, source.name, dtype)
    return _Parts(
        unet=build("UNet", lambda: UNet2DConditionModel(**unet_config(found.unet)), found.unet),
        vae=build("VAE", lambda: AutoencoderKL(**vae_config(found.vae)), found.vae),
        text_encoder=build("text encoder", lambda: CLIPTextModel(CLIPTextConfig(**first)), found.text_encoder),
        text_encoder_2=build(
            "text encoder 2", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**second)), found.text_encoder_2
        ),
        tokenizers=BUILTIN_FOLDER,
        scheduler_config=found.scheduler_config,
    )


def _build(name: str, dtype: torch.dtype, part: str, make: Callable[[], nn.Module], state: State) -> nn.Module:
    """Make a network without memory of its own and give it the tensors, every one of them."""
    try:
        with torch.device("meta"):
            network = make()
    except (KeyError, StopIteration, ValueError) as error:  # a tensor that tells a size is not there
        raise ModelError(f"model {name!r}: {part}: tensors are missing, such as {error}") from None
    expected = network.state_dict().keys()
    # transformers dropped "text_model." from one of the encoders; files have it.
    state = {key if key in expected else key.removeprefix("text_model."): t.to(dtype) for key, t in state.items()}
    wrong = sorted(expected ^ state.keys())
    if wrong:
        raise ModelError(f"model {name!r}: {part}: {len(wrong)} tensors missing or unknown, first {wrong[0]!r}")
    network.load_state_dict(state, assign=True)
    for module in network.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor) and ids.is_meta:  # a buffer that no file stores
            module.position_ids = torch.arange(ids.shape[-1]).expand(ids.shape)
    return network


def _read_json(source: ModelSource, name: str) -> dict[str, Any]:
    try:
        return json.loads((source.path / name).read_text())  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ModelError(f"model {source.name!r}: {name} cannot be read ({type(error).__name__})") from None
