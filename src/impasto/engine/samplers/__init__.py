"""Samplers: how the latents move from one noise level to the next, each as a pure function of one row.

Knows latents and noise levels. Knows no network, request or batch: the engine asks the network, the sampler moves
the row. All samplers work on latents of the form ``x = x0 + sigma * noise`` (variance exploding); those whose papers
scale the signal down instead are rewritten for it, which changes nothing but the bookkeeping.
"""

from impasto.engine.samplers.table import SAMPLERS, Sampler

__all__ = ["SAMPLERS", "Sampler"]
