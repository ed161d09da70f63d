"""How near the machine's limit: operations counted, and the share of what the processor was measured to do.

Knows networks and clocks. Knows nothing of requests. Operations are counted by torch on networks without memory
(multiply and add are two); the peak is the best of several large matrix products in the same number format, in the
same run, so a busy machine lowers both sides.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

TOKENS: Final = 77
CELL: Final = 8  # pixels of a latent cell's side
PRODUCT: Final = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product is timed
TRIES: Final = 20


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one model's parts at one size."""

    step: float  # one denoising step of one picture, with guidance: two rows of the UNet
    decode: float

    def request(self, steps: int) -> float:
        """Operations of a request of one picture; the text encoders' are left out (below a thousandth)."""
        return steps * self.step + self.decode


def count(unet: Any, vae: Any, side: int) -> Work:
    """Count a model's operations for pictures of ``side`` pixels."""
    return Work(unet_operations(unet.config, side, rows=2), vae_operations(vae.config, side))


def unet_operations(config: Any, side: int, rows: int) -> float:
    """Operations of one UNet call."""
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config))
        inputs = torch.empty(rows, config["in_channels"], side // CELL, side // CELL), torch.empty(rows)
        tokens = torch.empty(rows, TOKENS, config["cross_attention_dim"])
        added = {"text_embeds": torch.empty(rows, pooled), "time_ids": torch.empty(rows, 6)}
        with FlopCounterMode(display=False) as counter:
            unet(*inputs, encoder_hidden_states=tokens, added_cond_kwargs=added)
    return float(counter.get_total_flops())


def vae_operations(config: Any, side: int) -> float:
    """Operations of one decode."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(config))
        with FlopCounterMode(display=False) as counter:
            vae.decode(torch.empty(1, config["latent_channels"], side // CELL, side // CELL))
    return float(counter.get_total_flops())


@lru_cache(maxsize=8)
def measured_peak(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the best of several large matrix products, with as many threads as torch uses now."""
    side = PRODUCT.get(torch.device(device).type, PRODUCT["cpu"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(TRIES):
        start = now(device)
        torch.mm(a, b)
        best = min(best, now(device) - start)
    return 2 * side**3 / best


def now(device: str) -> float:
    """The time when the device has done everything it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def line(operations: float, seconds: float, device: str, dtype: torch.dtype) -> dict[str, float]:
    """The roofline line of a measurement: ``tflop``, ``tflop_per_s`` and ``share_of_peak`` (0 to 1)."""
    peak, rate = measured_peak(device, dtype), operations / seconds
    figures = {"tflop": operations / 1e12, "tflop_per_s": rate / 1e12, "peak_tflop_per_s": peak / 1e12}
    return {name: float(f"{value:.4g}") for name, value in figures.items()} | {"share_of_peak": round(rate / peak, 3)}
