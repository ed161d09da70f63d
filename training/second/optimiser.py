"""Muon for the UNet's matrices and kernels beside AdamW for the rest, as one optimiser.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) makes the update of a matrix orthogonal, so that
all its directions are learned at one pace; kernels are taken as matrices of one row for each output. Knows parameters
and torch's optimisers. Knows no pictures.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
SMALL = 4  # inputs or outputs of a layer that is no matrix worth the name: the latents' channels


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values brought near 1, by Newton and Schulz's iteration.

    It is torch's (``torch.optim.Muon``), but in single precision, since a CPU without bfloat16 takes a hundred times as
    long for that one; and on the small product of the matrix with itself, where most of the cost was the long side.
    """
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    gram = wide @ wide.T
    made = torch.eye(len(gram), device=gram.device)
    for _ in range(ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=QUINTIC[1], alpha=QUINTIC[2])
        factor.diagonal().add_(QUINTIC[0])
        made, gram = factor @ made, factor @ gram @ factor
    full: Tensor = made @ wide
    return full.T if len(matrix) > matrix.shape[1] else full


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum, its updates of AdamW's size (Liu et al. 2025, arXiv:2502.16982)."""

    def __init__(self, matrices: Iterable[Tensor], momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": 1e-3, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all matrices by their gradients."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                kept = state["momentum"]
                kept.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(kept, group["momentum"]))
                matrix.add_(update, alpha=-0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW as all courses have it; each step sets the rate."""
    return torch.optim.AdamW(groups, 1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


class MuonBesideAdamW:
    """One step of both; its groups have a ``pace``, what their rate is multiplied by.

    Args:
        learned: What Muon may take: matrices and kernels; anything else of it is AdamW's.
        others: AdamW's, with a pace of their own.
        muon_pace: Muon's.
        others_pace: Of ``others``.

    Raises:
        ValueError: A kernel's channels do not lie innermost.
    """

    def __init__(
        self, learned: Iterable[Tensor], others: Iterable[Tensor], muon_pace: float, others_pace: float
    ) -> None:
        parameters = list(learned)
        matrices = [p for p in parameters if p.ndim == 2]
        kernels = [p for p in parameters if p.ndim == 4 and min(p.shape[:2]) > SMALL]
        taken = {id(p) for p in (*matrices, *kernels)}
        self._kernels = [(kernel, nn.Parameter(as_matrix(kernel.detach()))) for kernel in kernels]
        if any(matrix.data_ptr() != kernel.data_ptr() for kernel, matrix in self._kernels):
            raise ValueError("kernels must have their channels innermost: a matrix must be a view of each")
        views = [matrix for _, matrix in self._kernels]
        self._muon = Muon([*matrices, *views])
        rest = [p for p in parameters if id(p) not in taken]
        groups = [{"params": rest, "pace": 1.0}, {"params": list(others), "pace": others_pace}]
        self._adamw = adamw(groups)
        self._muon.param_groups[0]["pace"] = muon_pace

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both."""
        return [*self._muon.param_groups, *self._adamw.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self._muon.zero_grad(set_to_none)
        self._adamw.zero_grad(set_to_none)
        for kernel, _ in self._kernels:
            kernel.grad = None

    def step(self) -> None:
        """Change all parameters by their gradients."""
        for kernel, matrix in self._kernels:
            matrix.grad = None if kernel.grad is None else as_matrix(kernel.grad)
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Both's."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``'s."""
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])


def as_matrix(kernel: Tensor) -> Tensor:
    """A kernel ``[out, in, h, w]`` as ``[out, h * w * in]``; of one with channels innermost, a view."""
    return kernel.permute(0, 2, 3, 1).reshape(len(kernel), -1)
