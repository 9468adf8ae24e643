"""One step of the flow, from noise level `sigma` down to `next_sigma`.

    x_sigma  = (1 - sigma) * clean + sigma * noise          sigma = 1 is noise, sigma = 0 is the clean latent
    velocity = noise - clean                                 d x_sigma / d sigma
    x'       = c_x * x + c_v * velocity (+ step_std * noise)

Every sampler is a choice of those coefficients, made on the host in float64, so that one function
serves them all. The ordinary differential equation (Euler's rule) is the choice

    c_x = 1,   c_v = next_sigma - sigma < 0,   step_std = 0.
"""

import torch
from torch import Tensor


def sigma_schedule(steps: int) -> list[float]:
    """Return the `steps + 1` noise levels of a sampler, from 1 (noise) down to 0 (clean), equally spaced."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return [1 - i / steps for i in range(steps)] + [0.0]


def ode_coefficients(sigma: float, next_sigma: float) -> tuple[float, float]:
    """Return (c_x, c_v) of Euler's rule for the flow's ODE: x' = x + (next_sigma - sigma) * velocity."""
    return 1.0, next_sigma - sigma


def flow_step(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Carry a latent one step down the flow.

    Args:
        x: (B, N, C) latent at noise level `sigma`, fp32. It stays fp32 whatever the velocity's dtype.
        velocity: (B, N, C) predicted noise - clean, any float dtype.
        sigma, next_sigma: noise levels, 1 >= sigma > next_sigma >= 0.

    Returns: (B, N, C) latent at `next_sigma`, fp32.

    Raises: ValueError when the levels do not go down.
    """
    if not 1 >= sigma > next_sigma >= 0:
        raise ValueError(f"noise levels must go down within [0, 1], got {sigma} -> {next_sigma}")
    c_x, c_v = ode_coefficients(sigma, next_sigma)
    return c_x * x.float() + c_v * velocity.float()
