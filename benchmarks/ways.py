"""Ways to make a picture that are timed side by side: ours, and diffusers' as its own documents advise.

Knows how each is loaded and how LoRAs are put on it. Knows no clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.lora_networks import write_lora
from impasto.engine.accel import Accel, choose_device, choose_dtype
from impasto.engine.engine import Engine
from impasto.models.catalog import find_model
from impasto.types import GenerationRequest, ImageReady, LoraRef

LORA_SCALE: Final = 0.7


class Way(Protocol):
    """Makes pictures."""

    def wear(self, loras: Sequence[Path]) -> None:
        """Have these LoRAs on from now on; what that takes is not part of a picture's time."""

    def draw(self, request: GenerationRequest) -> object:
        """Make the picture of a request, on the CPU."""


class Ours:
    """Our engine.

    Args:
        folder: The model.
        device: Where it runs; ``dtype``: its number format.
        accel: Its switches, as a comma list.
    """

    def __init__(self, folder: str, device: str, dtype: str, accel: str = "") -> None:
        self.engine = Engine.load(folder, device=device, dtype=dtype, accel=Accel.parse(accel))
        self._loras: tuple[LoraRef, ...] = ()

    def wear(self, loras: Sequence[Path]) -> None:
        """Note them for the requests to come; the first request puts them on."""
        self._loras = tuple(LoraRef(str(path), LORA_SCALE) for path in loras)

    def draw(self, request: GenerationRequest) -> object:
        """Run one request alone."""
        worn = replace(request, loras=self._loras)
        (picture,) = [event.image for event in self.engine.generate(worn) if isinstance(event, ImageReady)]
        return picture


class Diffusers:
    """diffusers' pipeline; LoRAs stay beside the weights, as ``load_lora_weights`` leaves them.

    Args:
        folder: The model.
        device: Where it runs; ``dtype``: its number format.
        prepare: What is done to the pipeline once, such as compiling.
    """

    def __init__(
        self, folder: str, device: str, dtype: str, prepare: Callable[[Any], object] = lambda pipeline: None
    ) -> None:
        place = choose_device(device)
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(
            find_model(folder).path, dtype=choose_dtype(dtype, place), local_files_only=True, add_watermarker=False
        ).to(place)
        self.pipeline.set_progress_bar_config(disable=True)
        prepare(self.pipeline)

    def wear(self, loras: Sequence[Path]) -> None:
        """Unload what was on and load these."""
        self.pipeline.unload_lora_weights()
        names = [f"lora{position}" for position in range(len(loras))]
        for path, name in zip(loras, names, strict=True):
            self.pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        if names:
            self.pipeline.set_adapters(names, [LORA_SCALE] * len(names))

    def draw(self, request: GenerationRequest) -> object:
        """Call the pipeline."""
        return self.pipeline(
            request.prompt,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator().manual_seed(request.seed),
        ).images[0]


def compiled_blocks(pipeline: Any) -> None:
    """Compile the UNet's repeated blocks: diffusers' advice where compiling the whole takes too long."""
    pipeline.unet.compile_repeated_blocks(dynamic=True)


def best_recipe(pipeline: Any) -> None:
    """What torch's and diffusers' documents ("Accelerate inference") add up for SDXL on a GPU, fp8 left out."""
    pipeline.fuse_qkv_projections()
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.unet = torch.compile(pipeline.unet, mode="max-autotune", fullgraph=True)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode="max-autotune", fullgraph=True)


PEERS: Final[dict[str, Callable[[Any], object]]] = {
    "diffusers": lambda pipeline: None,
    "diffusers compiled": compiled_blocks,
    "torch recipe": best_recipe,
}
NO_LORAS: Final = ("torch recipe",)  # adapters put beside compiled weights compile everything anew


def make_ways(folder: str, device: str, dtype: str, accels: Sequence[str], peers: Sequence[str]) -> dict[str, Way]:
    """Load every way: ``ours`` with each comma list of switches, and the peers by name."""
    ways: dict[str, Way] = {f"ours {accel}".strip(): Ours(folder, device, dtype, accel) for accel in accels}
    return ways | {name: Diffusers(folder, device, dtype, PEERS[name]) for name in peers}


def make_loras(folder: str, count: int, where: Path, rank: int = 32) -> list[Path]:
    """Write LoRAs over all attention layers of a model's UNet, of kohya's default targets and names."""
    from impasto.models.networks import Dtypes, load_networks

    if not count:
        return []
    unet = load_networks(find_model(folder), Dtypes.all(torch.bfloat16), parts=("unet",)).unet
    return [write_lora(where / f"lora-{i}.safetensors", unet, rank, torch.bfloat16, i) for i in range(count)]
