"""What ComfyUI's own validation leaves open: choices of lists, and sides off the latent grid.

Knows the fields that ``schema`` states. ComfyUI checks ranges itself, but of a V3 node no choices; without this a wrong
one would be refused only after everything before it has run.
"""

from __future__ import annotations

from typing import Any

from impasto.errors import InvalidInput
from impasto.types import REFINE_MODES, check_side, scheduler_name


def fields_problem(width: Any = None, height: Any = None, scheduler: Any = None, refine: Any = None) -> str | None:
    """Return what is wrong with the first that is; what another node will give is ``None`` so far."""
    try:
        for name, side in (("width", width), ("height", height)):
            if side is not None:
                check_side(name, side)
        if scheduler is not None:
            scheduler_name(scheduler)
        if refine is not None and refine not in REFINE_MODES:
            raise InvalidInput("refine", f"must be one of {', '.join(REFINE_MODES)}, got {str(refine)[:40]!r}")
    except InvalidInput as error:
        return str(error)
    return None
