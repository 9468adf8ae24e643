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
    precise    as cps, with as much fresh noise as the SDE of flow-sde has on the way (arXiv 2605.23522):
               step_std = next_sigma sqrt(1 - r^(a^2)),  r = next_sigma (1 - sigma) / (sigma (1 - next_sigma))

The arithmetic is nothing, the memory everything. Fused, a draw reads x and velocity and writes x' (fp32: 12
bytes an element; 16 if the mean is kept, which rescoring's KL wants); PyTorch, operation by operation, moves
about 116. Noise is read, as GRPO needs the same on every device, or made on the spot by Philox-4x32-10
(Salmon et al., 2011), a cipher: four words from each number.

    row r of x     |<-- BLOCK -->|<-- BLOCK -->|<-- .. |      one program a block, its elements in registers:
    velocity       |             |             |       |      mean, x' and z = (x' - mean) / step_std
    sums of z^2    |      s0     |      s1     |  ..   |  ->  log_prob of row r, added up in a fixed order

A draw and its rescoring run the same kernel on the same blocks, and only then can a ratio be exactly 1.
"""

import math

import torch
from torch import Tensor

from kernels import INTERPRETED, jit, libdevice, tl, triton, use_triton

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
        rest = 1 - (sigma if sigma < 1 else next_sigma)             # at sigma = 1 the noise would be infinite
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


def philox_normal(shape: torch.Size, seed: Tensor) -> Tensor:
    """Return fp32 normal numbers for a latent (..., N, C): the noise that the kernel makes from this seed.

    Words 4 q .. 4 q + 3 of a row come from the counter offset + row ceil(N C / 4) + q under the 64-bit key;
    two words make two numbers (Box and Muller, 1958), from the middles of 2^23 equal parts of (0, 1).

    Args: seed: (2,) int64, key and offset. An offset moves on by one for every four elements of a row.
    """
    n, low = shape[-2:].numel(), 0xFFFFFFFF
    rows, quads = shape[:-2].numel(), -(-n // 4)
    key, offset = seed
    counter = offset + torch.arange(rows * quads, device=seed.device)

    def times(word, by):                                             # 32 x 32 -> 64 bits, within int64
        high = (word >> 16) * by + ((word & 0xFFFF) * by >> 16) >> 16
        return high & low, word * by & low
    a, b, c, d = counter & low, counter >> 32 & low, torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = key & low, key >> 32 & low
    for _ in range(10):
        (high_a, low_a), (high_c, low_c) = times(a, 0xD2511F53), times(c, 0xCD9E8D57)
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    uniform = ((torch.stack([a, b, c, d], -1) >> 9).float() + 0.5) * 2.0 ** -23      # (rows quads, 4)
    radius, angle = (-2 * uniform[:, ::2].log()).sqrt(), 2 * math.pi * (uniform[:, 1::2] - 0.5)
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)           # (rows quads, 2, 2)
    return normal.view(rows, quads * 4)[:, :n].reshape(shape)


def flow_step(x: Tensor, velocity: Tensor, sigma: float, next_sigma: float, impl: str = "auto") -> Tensor:
    """Carry a latent one step down the flow by the ODE (Euler's rule), without fresh noise.

    Args:
        x: (B, N, C) latent at noise level `sigma`, fp32. It stays fp32 whatever the velocity's dtype.
        velocity: (B, N, C) predicted noise - clean, any float dtype.
        sigma, next_sigma: noise levels, 1 >= sigma > next_sigma >= 0.
        impl: "auto", "torch" or "triton"; the kernel has no gradient here.

    Returns: (B, N, C) latent at `next_sigma`, fp32.

    Raises: ValueError when the levels do not go down, or the kernel cannot run.
    """
    c_x, c_v, _ = step_coefficients("ode", sigma, next_sigma)
    if use_triton(impl, x, unsuitable(x, velocity)):
        return fused_step(x, velocity, None, "ode", c_x, c_v, 0.0, False)[0]
    return c_x * x.float() + c_v * velocity.float()


def stochastic_step(x: Tensor, velocity: Tensor, coefficients: tuple[float, float, float],
                    noise: Tensor | None = None, next_x: Tensor | None = None, seed: Tensor | None = None,
                    with_mean: bool = True, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor | None]:
    """Take a step with fresh noise, or rescore one that was taken: one code path, and both agree to the bit.

    The log-probability is that of the stored x', which must stay fp32: rounded to bf16 it would move by more
    than the width of the clip. It is the mean over the latent's elements (Flow-GRPO), in nats per element.

    Args:
        x: (..., N, C) latent before the step.    velocity: (..., N, C).
        coefficients: (c_x, c_v, step_std) of `step_coefficients`, step_std > 0.
        noise: (..., N, C) of unit variance: draws x'.    seed: (2,) int64: draws x' by `philox_normal`.
        next_x: (..., N, C): rescores this x'. Give one of the three.
        with_mean: False leaves the mean out, a quarter of what the kernel moves.
        impl: "auto", "torch" or "triton"; the kernel takes fp32 x, and rescores with a gradient for velocity.

    Returns: x' (..., N, C) fp32; its log-probability (...); the mean (..., N, C) or None.

    Raises: ValueError where there is no noise to have a probability, or the kernel cannot run.
    """
    c_x, c_v, step_std = coefficients
    if not step_std > 0:
        raise ValueError("a step without noise has no log-probability; "
                         "keep the window off sigma = 1 and the last step")
    if sum(given is not None for given in (noise, next_x, seed)) != 1:
        raise ValueError("give either noise or a seed, to draw a step, or next_x, to rescore one")
    if use_triton(impl, x, unsuitable(x, velocity, noise, next_x)):
        mode = "rescore" if next_x is not None else "noise" if noise is not None else "seed"
        given = next_x if next_x is not None else noise if noise is not None else seed
        drawn, log_prob, mean = fused_step(x, velocity, given, mode, c_x, c_v, step_std, with_mean)
        return drawn if next_x is None else next_x, log_prob, mean if with_mean else None
    mean = c_x * x.float() + c_v * velocity.float()
    if next_x is None:
        next_x = mean + step_std * (philox_normal(x.shape, seed) if noise is None else noise)
    per_element = ((next_x - mean) / step_std).square() / 2
    log_prob = -per_element.flatten(-2).mean(-1) - log_normaliser(step_std)
    return next_x, log_prob, mean if with_mean else None


def log_normaliser(step_std: float) -> float:
    return math.log(step_std) + math.log(2 * math.pi) / 2


# ---------------------------------------------------------------- the kernels

@jit
def uniform(word):
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * (2.0 ** -23)           # in (0, 1), ends excluded


@jit
def box_muller(first, second, FAST: tl.constexpr):
    """Two normal numbers from two words. FAST: hardware log, sine and cosine, 5 times fewer instructions."""
    u, angle = uniform(first), 6.283185307179586 * (uniform(second) - 0.5)
    if FAST:
        log, cos, sin = libdevice.fast_logf(u), libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        log, cos, sin = tl.log(u), tl.cos(angle), tl.sin(angle)
    radius = tl.sqrt(tl.maximum(-2.0 * log, 0.0))                   # near u = 1 a fast logarithm may exceed 0
    return radius * cos, radius * sin


@jit
def philox_block(seed_ptr, counter, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK normal numbers, four from each counter of counter .. counter + BLOCK / 4 - 1, side by side."""
    a, b, c, d = tl.randint4x(tl.load(seed_ptr), tl.load(seed_ptr + 1) + counter + tl.arange(0, BLOCK // 4))
    a, b = box_muller(a, b, FAST)
    c, d = box_muller(c, d, FAST)
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(BLOCK)      # join makes the last axis: a b c d


@jit
def step_kernel(x_ptr, velocity_ptr, given_ptr, next_ptr, mean_ptr, sum_ptr, n, blocks,
                c_x, c_v, step_std, inverse_std,
                MODE: tl.constexpr, MEAN: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one block of one row. `given` is the noise, the seed, or the x' to rescore, by MODE."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    inside = block * BLOCK + tl.arange(0, BLOCK)
    at, seen = row * n + inside, inside < n
    x = tl.load(x_ptr + at, mask=seen, other=0.0)
    velocity = tl.load(velocity_ptr + at, mask=seen, other=0.0).to(tl.float32)
    mean = tl.fma(velocity, c_v, x * c_x)        # the only fused one: else two modes might round apart
    if MODE == "rescore":
        next_x = tl.load(given_ptr + at, mask=seen, other=0.0)
    else:
        next_x = mean
        if MODE == "noise":
            next_x += step_std * tl.load(given_ptr + at, mask=seen, other=0.0).to(tl.float32)
        if MODE == "seed":
            quad = row * tl.cdiv(n, 4) + block * (BLOCK // 4)
            next_x += step_std * philox_block(given_ptr, quad, FAST, BLOCK)
        tl.store(next_ptr + at, next_x, mask=seen)
    if MEAN:
        tl.store(mean_ptr + at, mean, mask=seen)
    if MODE != "ode":
        z = tl.where(seen, (next_x - mean) * inverse_std, 0.0)
        tl.store(sum_ptr + tl.program_id(0), tl.sum(z * z))


@jit
def log_prob_kernel(sum_ptr, log_prob_ptr, n, blocks, log_normaliser, BLOCKS: tl.constexpr):
    """One program: one row's log-probability from its blocks' sums."""
    row, block = tl.program_id(0), tl.arange(0, BLOCKS)
    total = tl.sum(tl.load(sum_ptr + row * blocks + block, mask=block < blocks, other=0.0))
    tl.store(log_prob_ptr + row, -0.5 * total / n - log_normaliser)


@jit
def velocity_gradient_kernel(x_ptr, velocity_ptr, next_ptr, dlog_prob_ptr, dmean_ptr, dvelocity_ptr,
                             n, blocks, c_x, c_v, inverse_variance, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """dvelocity = c_v (dlog_prob (x' - mean) / (step_std^2 n) + dmean), the mean computed anew."""
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    inside = block * BLOCK + tl.arange(0, BLOCK)
    at, seen = row * n + inside, inside < n
    velocity = tl.load(velocity_ptr + at, mask=seen, other=0.0).to(tl.float32)
    mean = tl.fma(velocity, c_v, tl.load(x_ptr + at, mask=seen, other=0.0) * c_x)
    next_x = tl.load(next_ptr + at, mask=seen, other=0.0)
    gradient = tl.load(dlog_prob_ptr + row) * inverse_variance / n * (next_x - mean)
    if MEAN:
        gradient += tl.load(dmean_ptr + at, mask=seen, other=0.0)
    tl.store(dvelocity_ptr + at, (c_v * gradient).to(dvelocity_ptr.dtype.element_ty), mask=seen)


# ---------------------------------------------------------------- launching them

def unsuitable(x: Tensor, velocity: Tensor, noise: Tensor | None = None,
               next_x: Tensor | None = None) -> str | None:
    """Say why the kernel cannot take these inputs; None: it can."""
    given = [t for t in (velocity, noise, next_x) if t is not None]
    types = torch.float32, torch.bfloat16, torch.float16
    if x.dtype != torch.float32 or any(t.dtype not in types for t in given):
        return f"x must be fp32 and the velocity fp32, bf16 or fp16, got {x.dtype} and {velocity.dtype}"
    if next_x is not None and next_x.dtype != torch.float32:
        return f"x' must stay fp32 to be rescored, got {next_x.dtype}"
    if any(t.shape != x.shape for t in given) or not x.numel():
        return f"the shapes must be one and not empty, got {[tuple(t.shape) for t in (x, *given)]}"
    if torch.is_grad_enabled() and (any(t.requires_grad for t in (x, *given[1:])) or
                                    (velocity.requires_grad and next_x is None)):
        return "it has a gradient for the velocity alone, when rescoring"
    return None


def blocking(n: int) -> tuple[int, int]:
    """Elements of a block and blocks of a row. By n alone: sums must be cut alike to be equal to the bit."""
    block = min(4096, max(128, triton.next_power_of_2(n)))
    return block, triton.cdiv(n, block)


@torch.library.custom_op("flowportrait::step", mutates_args=())
def fused_step(x: Tensor, velocity: Tensor, given: Tensor | None, mode: str,
               c_x: float, c_v: float, step_std: float, with_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return x', log-probability and mean; empty where the mode (ode, noise, seed, rescore) has none."""
    x, velocity, given = (None if t is None else t.contiguous() for t in (x, velocity, given))
    next_x, log_prob, mean = empty_outputs(x, mode, with_mean)
    rows, n = x.shape[:-2].numel(), x.shape[-2:].numel()
    block, blocks = blocking(n)
    sums = x.new_empty(rows * blocks if log_prob.numel() else 0)
    step_kernel[rows * blocks,](
        x, velocity, x if given is None else given, next_x, mean, sums, n, blocks,
        c_x, c_v, step_std, 1 / step_std if step_std else 0.0,
        MODE=mode, MEAN=with_mean, FAST=not INTERPRETED, BLOCK=block, num_warps=8, enable_fp_fusion=False)
    if mode != "ode":
        log_prob_kernel[rows,](sums, log_prob, n, blocks, log_normaliser(step_std),
                               BLOCKS=triton.next_power_of_2(blocks))
    return next_x, log_prob, mean


def empty_outputs(x: Tensor, mode: str, with_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    next_x = x.new_empty(0 if mode == "rescore" else x.shape)
    log_prob = x.new_empty(0 if mode == "ode" else x.shape[:-2])
    return next_x, log_prob, x.new_empty(x.shape if with_mean else 0)


@torch.library.custom_op("flowportrait::step_backward", mutates_args=())
def fused_step_backward(x: Tensor, velocity: Tensor, next_x: Tensor, dlog_prob: Tensor, dmean: Tensor | None,
                        c_x: float, c_v: float, step_std: float) -> Tensor:
    """Return dvelocity (..., N, C)."""
    x, velocity, next_x, dlog_prob = (t.contiguous() for t in (x, velocity, next_x, dlog_prob))
    dmean, dvelocity = x if dmean is None else dmean.contiguous(), torch.empty_like(velocity)
    rows, n = x.shape[:-2].numel(), x.shape[-2:].numel()
    block, blocks = blocking(n)
    velocity_gradient_kernel[rows * blocks,](
        x, velocity, next_x, dlog_prob, dmean, dvelocity, n, blocks,
        c_x, c_v, step_std ** -2, MEAN=dmean is not x, BLOCK=block, num_warps=8)
    return dvelocity


@fused_step.register_fake
def _(x, velocity, given, mode, c_x, c_v, step_std, with_mean):
    return empty_outputs(x, mode, with_mean)


@fused_step_backward.register_fake
def _(x, velocity, next_x, dlog_prob, dmean, c_x, c_v, step_std):
    return torch.empty_like(velocity, memory_format=torch.contiguous_format)


def keep_for_backward(ctx, inputs, output):
    x, velocity, next_x, ctx.mode, *ctx.coefficients, ctx.with_mean = inputs
    ctx.save_for_backward(x, velocity, next_x)


def backward(ctx, _, dlog_prob, dmean):
    if ctx.mode != "rescore":
        raise RuntimeError("the flow step's kernel has a gradient in rescoring alone; draw under no_grad()")
    dmean = dmean if ctx.with_mean else None
    dvelocity = fused_step_backward(*ctx.saved_tensors, dlog_prob, dmean, *ctx.coefficients)
    return None, dvelocity, *[None] * 6


fused_step.register_autograd(backward, setup_context=keep_for_backward)
