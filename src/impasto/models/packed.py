"""Linear layers whose weights lie in the order that the CPU's matrix product reads: packed once, not at every call.

Knows torch's oneDNN operators. Knows no networks and no LoRA: the plain weights stay where they are, whoever edits them
in place counts up their version, and the next call packs them anew. A packed weight takes as much memory again.

Measured in ``benchmarks/LOG.md``: the product is the same, 1.01 to 1.15 times as fast in bfloat16 and 1.05 to 1.46 in
float32.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
_NOTHING: Final = ("none", (), "")
_GELU: Final = ("gelu", (), "none")  # the last one: not by the tanh formula


class Pack:
    """A packed weight, made again whenever the plain one has changed.

    Made of one matrix, or of several that lie on top of each other in memory as one.
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._made_of: tuple[tuple[int, int], ...] = ()
        self.packings = 0  # so far

    def linear(
        self,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        parts: tuple[Tensor, ...],
        *,
        gelu: bool = False,
        times: Tensor | None = None,
    ) -> Tensor:
        """Return ``inputs weight^T + bias``, and what follows it done before it is rounded and written.

        Args:
            inputs: ``[..., in]``, on the CPU.
            weight: ``[out, in]``.
            bias: ``[out]``, or none.
            parts: The tensors through which the weight is edited: itself, or its views.
            gelu: Put it through GELU (exact, not the tanh formula).
            times: ``[..., out]``, to multiply it with; not together with ``gelu``.
        """
        made_of = tuple((part._version, part.data_ptr()) for part in parts)
        if self._packed is None or made_of != self._made_of:
            rows = inputs.numel() // inputs.shape[-1]
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            self._made_of = made_of
            self.packings += 1
        product: Tensor
        if times is not None:
            product = torch.ops.mkldnn._linear_pointwise.binary(inputs, times, self._packed, bias, "mul")
        else:
            product = torch.ops.mkldnn._linear_pointwise(inputs, self._packed, bias, *(_GELU if gelu else _NOTHING))
        return product

    def forget(self) -> None:
        """Let go of the packed weight."""
        self._packed, self._made_of = None, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Pack:
        return Pack()

    def __reduce__(self) -> tuple[type[Pack], tuple[()]]:
        return Pack, ()


class PackedLinear(nn.Linear):
    """A linear layer that multiplies by its packed weight."""

    pack: Pack

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's answer for ``[..., in]``."""
        if not suits(input, self.weight):
            return super().forward(input)
        return self.pack.linear(input, self.weight, self.bias, (self.weight,))

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.pack.forget()
        return self


def suits(inputs: Tensor, weight: Tensor) -> bool:
    """Whether a product can be done with a packed weight."""
    return (
        inputs.device.type == "cpu"
        and weight.dtype == inputs.dtype
        and weight.dtype in DTYPES
        and not weight.is_inference()  # such tensors do not count their versions
        and not torch.compiler.is_compiling()
    )


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch and this processor have the operators, tried on a trifle."""
    if device.type != "cpu" or dtype not in DTYPES:
        return False
    try:
        layer, inputs = torch.ones(32, 32, dtype=dtype), torch.ones(4, 32, dtype=dtype)
        pack = Pack()
        product = pack.linear(inputs, layer, None, (layer,))
        gated = pack.linear(inputs, layer, None, (layer,), gelu=True)
        times = pack.linear(inputs, layer, None, (layer,), times=gated)
        return bool((product == 32).all() and (gated == 32).all() and (times == 1024).all())
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        log.info("weights are not packed: %s", str(error).splitlines()[0])
        return False


def pack_linears(network: nn.Module) -> int:
    """Let every plain linear layer multiply by a packed weight, in place; return the bytes that will take."""
    layers: list[Any] = [module for module in network.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.pack = Pack()
        layer.__class__ = PackedLinear
    return sum(layer.weight.nbytes for layer in layers)
