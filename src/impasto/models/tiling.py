"""The VAE made safe: pictures in tiles where memory is short, and in float32 where half precision overflows.

Knows diffusers' autoencoder. Knows no requests and no scaling of latents: that is ``sdxl``'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from impasto.errors import ModelError

log = logging.getLogger(__name__)

TILE = 512  # pixels, side of a tile; tiles overlap by a quarter and are blended
VALUES_PER_PIXEL = 1700  # held at the peak of a decode; see ``fits``
SHARE = 0.9  # of the free memory


def decode(vae: Any, latents: Tensor, *, tiling: bool) -> Tensor:
    """Decode latents ``[N, 4, h, w]`` in the VAE's own scale to pictures ``[N, 3, 8h, 8w]``, float32, about -1 to 1.

    With ``tiling`` the result differs slightly from the exact one, as every tile is normalised by itself.

    Raises:
        ModelError: The picture is not finite, even in float32.
    """

    def run() -> Tensor:
        picture: Tensor = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
        return picture

    with _tiles(vae, tiling):
        return _finite(vae, run, "decode these latents")


def encode(vae: Any, pictures: Tensor, *, tiling: bool) -> tuple[Tensor, Tensor]:
    """Encode pictures ``[N, 3, H, W]``, -1 to 1, to the mean and standard deviation of their latents.

    Returns:
        Two ``[N, 4, H/8, W/8]``, float32, in the VAE's own scale.

    Raises:
        ModelError: The latents are not finite, even in float32.
    """

    def run() -> Tensor:
        found = vae.encode(pictures.to(vae.device, vae.dtype), return_dict=False)[0]
        moments: Tensor = found.parameters
        return moments

    with _tiles(vae, tiling):
        mean, log_variance = _finite(vae, run, "encode this picture").chunk(2, dim=1)
    return mean, (log_variance.clamp(-30, 20) / 2).exp()  # bounds as in Rombach et al. 2022 (arXiv:2112.10752)


def fits(pixels: int, dtype: torch.dtype, free_bytes: int) -> bool:
    """Whether ``pixels`` (of all pictures together) can be decoded whole in 0.9 of ``free_bytes``.

    The rule: ``VALUES_PER_PIXEL`` numbers a pixel. The decoder of SDXL holds 770 at its peak, whatever the size:
    three tensors of 256 channels at full resolution. With the room that convolutions take besides, 1,000 were
    measured on a CPU; libraries on a GPU may take more, so 1,700 are asked for. Encoding needs less (640).
    """
    return pixels * VALUES_PER_PIXEL * dtype.itemsize <= SHARE * free_bytes


@contextmanager
def _tiles(vae: Any, on: bool) -> Iterator[None]:
    """Switch tiling on or off for one call, with tiles no larger than ``TILE``."""
    names = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")
    before = {name: getattr(vae, name) for name in names}
    scale = vae.tile_sample_min_size // vae.tile_latent_min_size
    vae.use_tiling = on
    vae.tile_sample_min_size = min(TILE, vae.tile_sample_min_size)
    vae.tile_latent_min_size = vae.tile_sample_min_size // scale
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def _finite(vae: Any, run: Callable[[], Tensor], what: str) -> Tensor:
    """Run the VAE, in float32 if its own format overflows; nothing that is not finite leaves."""
    result = run()
    own = vae.dtype
    if own != torch.float32 and not result.isfinite().all():
        log.warning("the VAE overflows %s: trying once more in float32; a VAE made for float16 saves this time", own)
        del result
        try:
            nn.Module.to(vae, torch.float32)  # not diffusers' own ``to``, which warns
            result = run()
        finally:
            nn.Module.to(vae, own)  # exact: every half-precision number has its float32
    if not result.isfinite().all():
        raise ModelError(f"the VAE cannot {what}: the result is not finite, even in float32; check model and LoRAs")
    return result.float()
