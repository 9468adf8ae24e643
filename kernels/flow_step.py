"""One step of the flow, from noise level `sigma` down to `next_sigma`, with or without fresh noise.

    x_sigma  = (1 - sigma) * clean + sigma * noise          sigma = 1 is noise, sigma = 0 is the clean latent
    velocity = noise - clean                                 d x_sigma / d sigma
    x'       = c_x * x + c_v * velocity + step_std * eps     eps ~ N(0, 1)

Every sampler is a choice of those three coefficients, made on the host in float64, so that one function
serves them all. With fresh noise a step is a draw from N(mean, step_std^2): a stochastic policy, whose
log-probability reinforcement learning needs. Write D = sigma - next_sigma, a = noise_level, and, from the
velocity,

    clean_hat = x - sigma * velocity,     noise_hat = x + (1 - sigma) * velocity

    ode        mean = x - D velocity = (1 - next_sigma) clean_hat + next_sigma noise_hat,     step_std = 0
    flow-sde   the SDE with the ODE's marginals, by Euler's rule (Flow-GRPO, arXiv 2505.05470):
               step_std = a sqrt(sigma / (1 - sigma)) sqrt(D)
               mean = x - D velocity - step_std^2 / (2 sigma) noise_hat
    cps        swap a part of the noise for fresh noise, the sum as large as before (CPS, arXiv 2509.05952):
               step_std = next_sigma sin(a pi / 2)
               mean = (1 - next_sigma) clean_hat + sqrt(next_sigma^2 - step_std^2) noise_hat

The step is bound by memory traffic, not by arithmetic. Fused, a draw reads x, velocity and noise and writes
x', 16 bytes an element in fp32; PyTorch, operation by operation, moves 88.

    row r of x     |<-- BLOCK -->|<-- BLOCK -->|<-- .. |      one program a block, its elements in registers:
    velocity       |             |             |       |      mean, x' and z = (x' - mean) / step_std
    sums of z^2    |      s0     |      s1     |  ..   |  ->  log_prob of row r, added up in a fixed order

A draw and its rescoring run the same kernel on the same blocks: of equal velocities, to the same bits.
"""

import math

import torch
from torch import Tensor

from kernels import jit, tl, triton, use_triton

STOCHASTIC = "flow-sde", "cps"


def sigma_schedule(steps: int) -> list[float]:
    """Return the `steps + 1` noise levels of a sampler, from 1 (noise) down to 0 (clean), equally spaced."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return [1 - i / steps for i in range(steps + 1)]


def step_coefficients(sampler: str, sigma: float, next_sigma: float,
                      noise_level: float = 0.0) -> tuple[float, float, float]:
    """Return (c_x, c_v, step_std) of a step: the formulas above, collected by x and velocity.

    Args:
        sampler: "flow-sde" or "cps".
        sigma, next_sigma: noise levels, 1 >= sigma > next_sigma >= 0.
        noise_level: a, how much of the noise is fresh; 0 makes every sampler the ODE. cps: at most 1.

    Raises: ValueError when the levels do not go down or the sampler has no such noise level.
    """
    if not 1 >= sigma > next_sigma >= 0:
        raise ValueError(f"noise levels must go down within [0, 1], got {sigma} -> {next_sigma}")
    if sampler not in STOCHASTIC:
        raise ValueError(f"sampler must be one of {', '.join(STOCHASTIC)}, got {sampler!r}")
    if noise_level < 0 or (sampler == "cps" and noise_level > 1):
        raise ValueError(f"noise_level {noise_level} is out of range for {sampler}")
    if sampler == "flow-sde":
        rest = 1 - (sigma if sigma < 1 else next_sigma)             # at sigma = 1 the noise would be infinite
        step_std = noise_level * math.sqrt(sigma / rest * (sigma - next_sigma))
        pull = step_std ** 2 / (2 * sigma)
        return 1 - pull, next_sigma - sigma - pull * (1 - sigma), step_std
    step_std = next_sigma * math.sin(noise_level * math.pi / 2)
    kept = math.sqrt(next_sigma ** 2 - step_std ** 2)                # what is left of the old noise
    return 1 - next_sigma + kept, kept * (1 - sigma) - (1 - next_sigma) * sigma, step_std


def flow_step(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Carry a latent (B, N, C) one step down the flow by the ODE (Euler's rule), without fresh noise, in fp32
    whatever the velocity's dtype. There is too little to fuse: launching a kernel would take longer."""
    return x.float() + (next_sigma - sigma) * velocity.float()


def stochastic_step(x: Tensor, velocity: Tensor, coefficients: tuple[float, float, float],
                    noise: Tensor | None = None, next_x: Tensor | None = None,
                    impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Take a step with fresh noise, or rescore one that was taken: of equal velocities to the same bits.

    The log-probability is that of the stored x', which must stay fp32: rounded to bf16 it would move by more
    than a ratio may leave 1 before PPO clips it. It is the mean over the latent's elements (Flow-GRPO), in
    nats per element.

    Args:
        x: (..., N, C) latent before the step.    velocity: (..., N, C).
        coefficients: (c_x, c_v, step_std) of `step_coefficients`, step_std > 0.
        noise: (..., N, C) of unit variance: draws x'.    next_x: (..., N, C): rescores this x'. Give one.
        impl: "auto", "torch" or "triton"; the kernel takes fp32 x, and rescores with a gradient for velocity.

    Returns: x' (..., N, C) fp32; its log-probability (...).

    Raises: ValueError where there is no noise to have a probability, or the kernel cannot run.
    """
    c_x, c_v, step_std = coefficients
    if not step_std > 0:
        raise ValueError("a step without noise has no log-probability; "
                         "the first step and the last one do not draw")
    if (noise is None) == (next_x is None):
        raise ValueError("give either noise, to draw a step, or next_x, to rescore one")
    draws = next_x is None
    given = noise if draws else next_x
    if use_triton(impl, x, unsuitable(x, velocity, given, draws)):
        drawn, log_prob = fused_step(x, velocity, given, draws, c_x, c_v, step_std)
        return drawn if draws else next_x, log_prob
    mean = c_x * x.float() + c_v * velocity.float()
    if draws:
        next_x = mean + step_std * noise
    per_element = ((next_x - mean) / step_std).square() / 2
    return next_x, -per_element.flatten(-2).mean(-1) - log_normaliser(step_std)


def log_normaliser(step_std: float) -> float:
    return math.log(step_std) + math.log(2 * math.pi) / 2


# ---------------------------------------------------------------- the kernels

@jit
def step_kernel(x_ptr, velocity_ptr, given_ptr, next_ptr, sum_ptr, n, blocks,
                c_x, c_v, step_std, inverse_std, DRAWS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one block of one row. `given` is the noise to draw with, or the x' to rescore."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    inside = block * BLOCK + tl.arange(0, BLOCK)
    at, seen = row * n + inside, inside < n
    x = tl.load(x_ptr + at, mask=seen, other=0.0)
    velocity = tl.load(velocity_ptr + at, mask=seen, other=0.0).to(tl.float32)
    mean = tl.fma(velocity, c_v, x * c_x)        # the only fused one: else two modes might round apart
    next_x = tl.load(given_ptr + at, mask=seen, other=0.0).to(tl.float32)
    if DRAWS:
        next_x = mean + step_std * next_x
        tl.store(next_ptr + at, next_x, mask=seen)
    z = tl.where(seen, (next_x - mean) * inverse_std, 0.0)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(z * z))


@jit
def log_prob_kernel(sum_ptr, log_prob_ptr, n, blocks, log_normaliser, BLOCKS: tl.constexpr):
    """One program: one row's log-probability from its blocks' sums."""
    row, block = tl.program_id(0), tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(sum_ptr + row * blocks + block, mask=block < blocks, other=0.0))
    tl.store(log_prob_ptr + row, -0.5 * total / n - log_normaliser)


@jit
def velocity_gradient_kernel(x_ptr, velocity_ptr, next_ptr, dlog_prob_ptr, dvelocity_ptr,
                             n, blocks, c_x, c_v, inverse_variance, BLOCK: tl.constexpr):
    """dvelocity = c_v dlog_prob (x' - mean) / (step_std^2 n), the mean computed anew."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    inside = block * BLOCK + tl.arange(0, BLOCK)
    at, seen = row * n + inside, inside < n
    velocity = tl.load(velocity_ptr + at, mask=seen, other=0.0).to(tl.float32)
    mean = tl.fma(velocity, c_v, tl.load(x_ptr + at, mask=seen, other=0.0) * c_x)
    next_x = tl.load(next_ptr + at, mask=seen, other=0.0)
    gradient = tl.load(dlog_prob_ptr + row) * inverse_variance / n * (next_x - mean)
    tl.store(dvelocity_ptr + at, (c_v * gradient).to(dvelocity_ptr.dtype.element_ty), mask=seen)


# ---------------------------------------------------------------- launching them

def unsuitable(x: Tensor, velocity: Tensor, given: Tensor, draws: bool) -> str | None:
    """Say why the kernel cannot take these inputs; None: it can."""
    if (x.dtype, given.dtype) != (torch.float32,) * 2 or not velocity.dtype.is_floating_point:
        return f"x, and noise or x', must be fp32, got {x.dtype} and {given.dtype}"
    if not x.shape == velocity.shape == given.shape or not x.numel():
        return f"the shapes must be one and not empty, got {[tuple(t.shape) for t in (x, velocity, given)]}"
    taught = x.requires_grad or given.requires_grad or draws and velocity.requires_grad
    if taught and torch.is_grad_enabled():
        return "it has a gradient for the velocity alone, when rescoring"
    return None


def blocking(n: int) -> tuple[int, int]:
    """Elements of a block and blocks of a row. By n alone: sums must be cut alike to be equal to the bit."""
    block = min(4096, max(128, triton.next_power_of_2(n)))
    return block, triton.cdiv(n, block)


@torch.library.custom_op("flowportrait::step", mutates_args=())
def fused_step(x: Tensor, velocity: Tensor, given: Tensor, draws: bool,
               c_x: float, c_v: float, step_std: float) -> tuple[Tensor, Tensor]:
    """Return x', empty where it is given to be rescored, and its log-probability."""
    x, velocity, given = x.contiguous(), velocity.contiguous(), given.contiguous()
    next_x, log_prob = empty_outputs(x, draws)
    rows, n = x.shape[:-2].numel(), x.shape[-2:].numel()
    block, blocks = blocking(n)
    sums = x.new_empty(rows * blocks)
    step_kernel[rows * blocks,](x, velocity, given, next_x, sums, n, blocks,
                                c_x, c_v, step_std, 1 / step_std,
                                DRAWS=draws, BLOCK=block, num_warps=8, enable_fp_fusion=False)
    log_prob_kernel[rows,](sums, log_prob, n, blocks, log_normaliser(step_std),
                           BLOCKS=triton.next_power_of_2(blocks))
    return next_x, log_prob


def empty_outputs(x: Tensor, draws: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if draws else 0), x.new_empty(x.shape[:-2])


@torch.library.custom_op("flowportrait::step_backward", mutates_args=())
def fused_step_backward(x: Tensor, velocity: Tensor, next_x: Tensor, dlog_prob: Tensor,
                        c_x: float, c_v: float, step_std: float) -> Tensor:
    """Return dvelocity (..., N, C)."""
    x, velocity, next_x, dlog_prob = (t.contiguous() for t in (x, velocity, next_x, dlog_prob))
    dvelocity = torch.empty_like(velocity)
    rows, n = x.shape[:-2].numel(), x.shape[-2:].numel()
    block, blocks = blocking(n)
    velocity_gradient_kernel[rows * blocks,](x, velocity, next_x, dlog_prob, dvelocity, n, blocks,
                                             c_x, c_v, step_std ** -2, BLOCK=block, num_warps=8)
    return dvelocity


@fused_step.register_fake
def _(x, velocity, given, draws, c_x, c_v, step_std):
    return empty_outputs(x, draws)


@fused_step_backward.register_fake
def _(x, velocity, next_x, dlog_prob, c_x, c_v, step_std):
    return torch.empty_like(velocity, memory_format=torch.contiguous_format)


def keep_for_backward(ctx, inputs, output):
    x, velocity, next_x, ctx.draws, *ctx.coefficients = inputs
    ctx.save_for_backward(x, velocity, next_x)


def backward(ctx, _, dlog_prob):
    if ctx.draws:
        raise RuntimeError("the flow step's kernel has a gradient in rescoring alone; draw under no_grad()")
    return None, fused_step_backward(*ctx.saved_tensors, dlog_prob, *ctx.coefficients), *[None] * 5


fused_step.register_autograd(backward, setup_context=keep_for_backward)
