"""Samplers: one step of the reverse diffusion, as pure functions over rows.

Knows latents and noise levels, each row with its own. Knows no network, schedule or request.
"""

from __future__ import annotations

from torch import Tensor


def per_row(values: Tensor) -> Tensor:
    """Shape one value a row, ``[B]``, to multiply latents, ``[B, 1, 1, 1]``."""
    return values.view(-1, 1, 1, 1)


def scale_input(x: Tensor, sigma: Tensor) -> Tensor:
    """Bring noisy latents to the unit variance the network was trained on: ``x / sqrt(sigma^2 + 1)``.

    Args:
        x: Noisy latents ``[B, 4, H/8, W/8]`` with ``x = x0 + sigma * noise``.
        sigma: Noise level of each row, ``[B]``.

    Source: Karras et al. 2022 (arXiv:2206.00364), table 1, variance-preserving ``c_in``.
    """
    return x / per_row((sigma**2 + 1) ** 0.5)


def denoised_from_epsilon(x: Tensor, epsilon: Tensor, sigma: Tensor) -> Tensor:
    """Turn the predicted noise into the network's estimate of the clean latents: ``x - sigma * epsilon``."""
    return x - per_row(sigma) * epsilon


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Push the prediction away from the unconditional one, row by row.

    Source: Ho and Salimans 2022, classifier-free guidance (arXiv:2207.12598), in the form of Imagen's equation 6.
    """
    return unconditional + per_row(scale) * (conditional - unconditional)


def euler_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Take one deterministic Euler step of the probability-flow ODE, row by row.

    Args:
        x: Noisy latents ``[B, 4, H/8, W/8]``, float32, with ``x = x0 + sigma * noise``.
        denoised: The network's estimate of ``x0``; shape and dtype of ``x``.
        sigma: Noise level of each row now, ``[B]``, unitless, ``> 0``.
        sigma_next: Noise level after the step, ``[B]``, ``0 <= sigma_next < sigma``.

    Raises:
        ValueError: A row would gain noise. Ancestral samplers add noise elsewhere.

    Source: Karras et al. 2022, algorithm 2 with ``S_churn = 0`` (arXiv:2206.00364).
    Parity: ``tests/parity/test_sigmas.py``, 1e-5 against diffusers' EulerDiscreteScheduler.
    """
    if bool((sigma_next >= sigma).any()):
        raise ValueError("an Euler step must lower the noise level of every row")
    slope = (x - denoised) / per_row(sigma)
    return x + slope * per_row(sigma_next - sigma)
