"""One step of the flow, from noise level `sigma` down to `next_sigma`, with or without fresh noise.

    x_sigma  = (1 - sigma) * clean + sigma * noise          sigma = 1 is noise, sigma = 0 is the clean latent
    velocity = noise - clean                                 d x_sigma / d sigma
    x'       = c_x * x + c_v * velocity + step_std * eps     eps ~ N(0, 1)

Every sampler is a choice of those three coefficients, made on the host in float64, so that one function serves them
all. With fresh noise a step is a draw from N(mean, step_std^2): a stochastic policy, whose log-probability
reinforcement learning needs. Write D = sigma - next_sigma, a = noise_level, and, from the velocity,

    clean_hat = x - sigma * velocity,     noise_hat = x + (1 - sigma) * velocity

    ode        mean = x - D velocity = (1 - next_sigma) clean_hat + next_sigma noise_hat,     step_std = 0
    flow-sde   the SDE with the ODE's marginals, by Euler's rule (Flow-GRPO, arXiv 2505.05470):
               step_std = a sqrt(sigma / (1 - sigma)) sqrt(D)
               mean = x - D velocity - step_std^2 / (2 sigma) noise_hat
    cps        swap a part of the noise for fresh noise, the sum as large as before (CPS, arXiv 2509.05952):
               step_std = next_sigma sin(a pi / 2)
               mean = (1 - next_sigma) clean_hat + sqrt(next_sigma^2 - step_std^2) noise_hat
    precise    as cps, with as much fresh noise as the SDE of flow-sde has on the way (arXiv 2605.23522):
               step_std = next_sigma sqrt(1 - r^(a^2)),     r = next_sigma (1 - sigma) / (sigma (1 - next_sigma))
"""

import math

import torch
from torch import Tensor

STOCHASTIC = "flow-sde", "cps", "precise"


def sigma_schedule(steps: int) -> list[float]:
    """Return the `steps + 1` noise levels of a sampler, from 1 (noise) down to 0 (clean), equally spaced."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return [1 - i / steps for i in range(steps)] + [0.0]


def step_coefficients(sampler: str, sigma: float, next_sigma: float,
                      noise_level: float = 0.0) -> tuple[float, float, float]:
    """Return (c_x, c_v, step_std) of a step: the formulas above, sorted by x and velocity.

    Args:
        sampler: "ode", "flow-sde", "cps" or "precise".
        sigma, next_sigma: noise levels, 1 >= sigma > next_sigma >= 0.
        noise_level: a, how much of the noise is fresh; 0 makes every sampler the ODE. cps: at most 1.

    Raises: ValueError when the levels do not go down or the sampler has no such noise level.
    """
    if not 1 >= sigma > next_sigma >= 0:
        raise ValueError(f"noise levels must go down within [0, 1], got {sigma} -> {next_sigma}")
    if sampler not in ("ode", *STOCHASTIC):
        raise ValueError(f"sampler must be ode or one of {', '.join(STOCHASTIC)}, got {sampler!r}")
    if noise_level < 0 or (sampler == "cps" and noise_level > 1):
        raise ValueError(f"noise_level {noise_level} is out of range for {sampler}")
    if sampler == "ode":
        return 1.0, next_sigma - sigma, 0.0
    if sampler == "flow-sde":
        rest = 1 - (sigma if sigma < 1 else next_sigma)              # at sigma = 1 the noise would be infinite
        step_std = noise_level * math.sqrt(sigma / rest * (sigma - next_sigma))
        pull = step_std ** 2 / (2 * sigma)
        return 1 - pull, next_sigma - sigma - pull * (1 - sigma), step_std
    if sampler == "cps":
        step_std = next_sigma * math.sin(noise_level * math.pi / 2)
    else:
        r = next_sigma * (1 - sigma) / (sigma * (1 - next_sigma))
        step_std = next_sigma * math.sqrt(1 - r ** noise_level ** 2)
    kept = math.sqrt(next_sigma ** 2 - step_std ** 2)                # what is left of the old noise
    return 1 - next_sigma + kept, kept * (1 - sigma) - (1 - next_sigma) * sigma, step_std


def flow_step(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Carry a latent one step down the flow by the ODE (Euler's rule), without fresh noise.

    Args:
        x: (B, N, C) latent at noise level `sigma`, fp32. It stays fp32 whatever the velocity's dtype.
        velocity: (B, N, C) predicted noise - clean, any float dtype.
        sigma, next_sigma: noise levels, 1 >= sigma > next_sigma >= 0.

    Returns: (B, N, C) latent at `next_sigma`, fp32.

    Raises: ValueError when the levels do not go down.
    """
    c_x, c_v, _ = step_coefficients("ode", sigma, next_sigma)
    return c_x * x.float() + c_v * velocity.float()


def stochastic_step(x: Tensor, velocity: Tensor, coefficients: tuple[float, float, float], noise: Tensor | None = None,
                    next_x: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Take a step with fresh noise, or rescore one that was taken: one code path, so that both agree to the bit.

    The log-probability is that of the stored x', which must stay fp32: rounded to bf16 it would move by more than
    the width of the clip. It is the mean over the latent's elements (Flow-GRPO), in nats per element.

    Args:
        x: (..., N, C) latent before the step.    velocity: (..., N, C).
        coefficients: (c_x, c_v, step_std) of `step_coefficients`, step_std > 0.
        noise: (..., N, C) of unit variance: draws x'.    next_x: (..., N, C): rescores this x'. Give one of the two.

    Returns: x' (..., N, C) fp32; its log-probability (...); the mean (..., N, C).

    Raises: ValueError where there is no noise to have a probability.
    """
    c_x, c_v, step_std = coefficients
    if not step_std > 0:
        raise ValueError("a step without noise has no log-probability; keep the window off sigma = 1 and the last step")
    if (noise is None) == (next_x is None):
        raise ValueError("give either noise, to draw a step, or next_x, to rescore one")
    mean = c_x * x.float() + c_v * velocity.float()
    if next_x is None:
        next_x = mean + step_std * noise
    per_element = ((next_x - mean) / step_std).square() / 2
    log_prob = -per_element.flatten(-2).mean(-1) - (math.log(step_std) + math.log(2 * math.pi) / 2)
    return next_x, log_prob, mean
