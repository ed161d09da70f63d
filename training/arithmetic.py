"""Short arithmetic, where it is the faster one. Knows torch's switches and processors; nothing of the training."""

from __future__ import annotations

import torch


def short(place: torch.device, wanted: bool = True) -> torch.autocast:
    """Products in bfloat16 where the device has it; a CPU that has not would take a hundred times as long."""
    has = place.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(place.type, torch.bfloat16, enabled=wanted and has)


CPU = torch.device("cpu")
