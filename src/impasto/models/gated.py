"""The gated layers of transformer blocks on a CPU: gate and multiply while the products are written.

Knows diffusers' gated layer and packed weights. Knows no LoRA: ``proj`` stays as it is, and may be edited in place.

A plain gated layer writes both halves, reads the gate, writes its GELU, reads both and writes their product. Here the
gate's product is put through GELU before it is written, and the other half's is multiplied by it: measured in
``benchmarks/LOG.md``. Nothing is rounded in between but the gate, so the answer is closer to the exact one.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from impasto.models.packed import Pack, suits


class PackedGeglu(GEGLU):  # type: ignore[misc]  # diffusers has no types
    """A gated layer, ``a * gelu(b)`` with ``a`` and ``b`` linear: two products that gate and multiply as they write.

    Source: Shazeer 2020 (arXiv:2002.05202). Both halves lie in ``proj``'s weight, the gate's second.
    """

    packs: tuple[Pack, Pack]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the layer's answer for ``[..., in]``."""
        weight, bias = self.proj.weight, self.proj.bias
        if not suits(hidden_states, weight):
            plain: Tensor = super().forward(hidden_states)
            return plain
        (value, gate), parts = weight.chunk(2), (weight,)
        biases = (None, None) if bias is None else bias.chunk(2)
        gated = self.packs[1].linear(hidden_states, gate, biases[1], parts, gelu=True)
        return self.packs[0].linear(hidden_states, value, biases[0], parts, times=gated)

    def _apply(self, fn: Any, recurse: bool = True) -> PackedGeglu:
        super()._apply(fn, recurse)
        for pack in self.packs:
            pack.forget()
        return self


def pack_gates(network: nn.Module) -> int:
    """Let every gated layer multiply by packed weights, in place; return how many there are."""
    layers: list[Any] = [module for module in network.modules() if type(module) is GEGLU]
    for layer in layers:
        layer.packs = (Pack(), Pack())
        layer.__class__ = PackedGeglu
    return len(layers)
