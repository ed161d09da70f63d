"""Linear layers in 8-bit floating point, with low-rank LoRAs in full beside them.

Knows torch's scaled product and which of SDXL's layers are large. Knows no LoRA files: whoever patches weights tells a
layer what it did, and the layer's own weight stays where patches find it.

A layer multiplies by its weight in float8 (e4m3: 3 bits of fraction, one scale for each output), and its inputs are
rounded likewise (one scale for each row, from its largest number); sums are made in float32 or nearly so. That is an
approximation, about 3 % of an answer's norm. A low-rank LoRA is not rounded with it: its two thin products are done in
bfloat16 and added. What is not low-rank (DoRA, LoKr) can only be rounded with the weight, and the log says so.

Memory: half a weight's bytes more for each layer. Factors lie in buffers that stay in place, so compiled code and
recorded graphs go on seeing them; a rank larger than any before needs new ones, and ``listen`` tells that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

FORMAT: Final = torch.float8_e4m3fn
LARGEST: Final = torch.finfo(FORMAT).max
LEAST_SCALE: Final = 1e-12  # of a row of zeros
MULTIPLE: Final = 16  # of inputs and outputs, as the scaled product asks; ranks are filled up to it
LAYERS: Final = (  # all but keys and values of prompts, which are few rows
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0",
    "ff.net.0.proj", "ff.net.2",
)  # fmt: skip


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in float8; its weight, in bfloat16, is what patches change.

    Attributes:
        rounded: The weight in float8, ``[out, in]``: the model's own, or the patched one if the patch is not low-rank.
        scales: ``[1, out]``.
        up: ``[out, r]``, what patches add, with ``down``; ``None`` until there was one.
        down: ``[r, in]``.
    """

    rounded: Tensor
    scales: Tensor
    up: Tensor | None
    down: Tensor | None
    _whole: bool
    _listeners: list[Callable[[], object]]

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's answer for ``[..., in]``."""
        if input.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16:
            return super().forward(input)
        rows = input.reshape(-1, self.in_features)
        product = scaled_product(rows, self.rounded, self.scales, self.bias)
        if self.up is not None and self.down is not None:
            product = torch.addmm(product, F.linear(rows, self.down), self.up.t())
        return product.view(*input.shape[:-1], self.out_features)

    @torch.no_grad()
    def wear_product(self, own: Tensor, up: Tensor, down: Tensor, alpha: float) -> None:
        """Note that the weight is now ``own + alpha * up @ down``: ``[out, r]`` and ``[r, in]``."""
        if self._whole:
            self._round(own)
        self._make_room(down.shape[0])
        assert self.up is not None and self.down is not None
        self.up.zero_()[:, : up.shape[1]].copy_(up.float() * alpha)
        self.down.zero_()[: down.shape[0]].copy_(down)

    @torch.no_grad()
    def wear_weight(self) -> None:
        """Note that the weight was changed in a way that is not low-rank: it is rounded as it is now."""
        log.info("fp8: a LoRA that is not low-rank is rounded to float8 with its weight")
        self._take_off()
        self._round(self.weight)
        self._whole = True

    @torch.no_grad()
    def wear_nothing(self) -> None:
        """Note that the weight is the model's own."""
        self._take_off()
        if self._whole:
            self._round(self.weight)

    def _round(self, weight: Tensor) -> None:
        rounded, scales = to_float8(weight)
        self.rounded.copy_(rounded)
        self.scales.copy_(scales.t())
        self._whole = False

    def _take_off(self) -> None:
        if self.up is not None:
            self.up.zero_()

    def _make_room(self, rank: int) -> None:
        """Have buffers of this rank at least; their place changes only when they grow."""
        if self.up is not None and self.up.shape[1] >= rank:
            return
        room = -(-rank // MULTIPLE) * MULTIPLE
        with torch.inference_mode(False):  # so that they may be used and changed in any mode
            self.up = self.weight.new_zeros(self.out_features, room)
            self.down = self.weight.new_zeros(room, self.in_features)
        for tell in self._listeners:
            tell()

    def _apply(self, fn: Any, recurse: bool = True) -> Fp8Linear:
        """Move or cast; what is in float8 moves along and is not cast."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in ("rounded", "scales", "up", "down"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.to(self.weight.device))
        return self


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round ``[M, K]`` to float8, each row by its largest number; return that and the scales ``[M, 1]``, float32."""
    scales = (rows.abs().amax(-1, keepdim=True).float() / LARGEST).clamp_min(LEAST_SCALE)
    return (rows / scales).to(FORMAT), scales


def scaled_product(rows: Tensor, rounded: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``rows W^T + bias`` in bfloat16: ``rows [M, K]``, ``rounded [N, K]`` in float8 with ``scales [1, N]``."""
    values, row_scales = to_float8(rows)
    product: Tensor = torch._scaled_mm(
        values, rounded.t(), row_scales, scales, bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product


def can_multiply(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch and this device have the product, tried on a trifle; GPUs do from capability 8.9 or 9.0 on."""
    if dtype != torch.bfloat16:
        log.warning("fp8 is off: the weights are in %s, not in bfloat16", dtype)
        return False
    try:
        layer, rows = (torch.ones(32, 32, dtype=dtype, device=device) for _ in range(2))
        rounded, scales = to_float8(layer)
        return bool((scaled_product(rows, rounded, scales.t(), None) == 32).all())
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        log.warning("fp8 is off: %s cannot multiply so (%s)", device, str(error).splitlines()[0])
        return False


@torch.no_grad()
def to_fp8(network: nn.Module) -> list[Fp8Linear]:
    """Let the large linear layers of a network's transformer blocks multiply in float8, in place, and return them.

    Call it while the weights are the model's own.
    """
    layers: list[Any] = [module for name, module in network.named_modules() if _is_large(name, module)]
    for layer in layers:
        with torch.inference_mode(False):
            layer.rounded, scales = to_float8(layer.weight.detach())
            layer.scales = scales.t()
        layer.up = layer.down = None
        layer._whole, layer._listeners = False, []
        layer.__class__ = Fp8Linear
    return layers


def listen(layers: list[Fp8Linear], tell: Callable[[], object]) -> None:
    """Have ``tell`` called whenever a layer's factors get new memory: recorded graphs do not see it."""
    for layer in layers:
        layer._listeners.append(tell)


def _is_large(name: str, module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and name.endswith(LAYERS)
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    )
