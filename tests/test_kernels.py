"""The mask rule and the flow step, held against brute force and against closed forms."""

import math

import pytest
import torch

from kernels.attention import Layout, attention, chunk_causal_mask
from kernels.flow_step import STOCHASTIC, flow_step, sigma_schedule, step_coefficients, stochastic_step


def tokens(layout: Layout) -> list[tuple]:
    """Name every token of a sequence: (segment, kind, chunk); segment 0 is the context."""
    names = []
    for i in range(layout.chunks):
        past = ("portrait", -1) if i == 0 else ("video", i - 1)
        names += [(0, *past)] * layout.video + [(0, "audio", i)] * layout.audio
    for segment in range(1, layout.segments + 1):
        for i in range(layout.chunks):
            names += [(segment, "video", i)] * layout.video
    return names


def may_see(query: tuple, key: tuple, window: int) -> bool:
    """The rule in words, token by token, without block indices."""
    (qs, q_kind, q_chunk), (ks, k_kind, k_chunk) = query, key
    if q_kind == "portrait":
        return k_kind == "portrait"
    if ks:                                                        # a noisy key: only its own noisy chunk
        return (qs, q_chunk) == (ks, k_chunk)
    if k_kind == "portrait":
        return True
    now = q_chunk if qs or q_kind == "audio" else q_chunk + 1     # clean video i is read when chunk i+1 is made
    heard = k_chunk if k_kind == "audio" else k_chunk + 1
    return now - window < heard <= now


@pytest.mark.parametrize("layout", [Layout(1, 3, 2), Layout(4, 3, 2), Layout(5, 2, 4, segments=2, window=2),
                                    Layout(6, 1, 1, segments=3, window=1), Layout(3, 2, 1, segments=0)])
def test_the_mask_is_the_rule_token_by_token(layout):
    names = tokens(layout)
    want = torch.tensor([[may_see(q, k, layout.window) for k in names] for q in names])
    assert len(names) == layout.length
    assert torch.equal(chunk_causal_mask(layout, torch.device("cpu")), want)


def test_attention_is_a_float64_softmax_with_shared_key_heads():
    layout = Layout(3, 2, 2, segments=2, window=2)
    q = torch.randn(2, 4, layout.length, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, layout.length, 8, dtype=torch.float64)
    want = torch.empty_like(q)
    mask = chunk_causal_mask(layout, torch.device("cpu"))
    for b in range(2):
        for h in range(4):
            score = (q[b, h] @ k[b, h // 2].T / math.sqrt(8)).masked_fill(~mask, -math.inf)
            want[b, h] = score.softmax(-1) @ v[b, h // 2]
    assert torch.allclose(attention(q, k, v, layout), want, atol=1e-12)


def test_keys_that_are_forbidden_change_nothing_however_bad():
    layout = Layout(4, 2, 1, segments=1, window=2)
    q, k, v = torch.randn(3, 1, 2, layout.length, 8)
    mask = chunk_causal_mask(layout, torch.device("cpu"))
    row = layout.context_length + 2 * 2                           # a token of noisy chunk 2
    before = attention(q, k, v, layout)[:, :, row]
    k[:, :, ~mask[row]], v[:, :, ~mask[row]] = 1e4, -1e4
    assert torch.equal(attention(q, k, v, layout)[:, :, row], before)


def test_attention_names_what_does_not_fit():
    q = torch.randn(1, 3, 10, 8)
    with pytest.raises(ValueError, match="3 query heads"):
        attention(q, q[:, :2], q[:, :2])
    with pytest.raises(ValueError, match="10 queries"):
        attention(q, q, q, Layout(2, 3, 2))


def test_a_straight_flow_arrives_in_one_step_or_many():
    """For x = (1 - sigma) clean + sigma noise the velocity is constant, so Euler's rule is exact."""
    clean, noise = torch.randn(2, 2, 3, 4)
    for steps in (1, 5):
        x, levels = noise, sigma_schedule(steps)
        for sigma, next_sigma in zip(levels, levels[1:]):
            x = flow_step(x, noise - clean, sigma, next_sigma)
        assert torch.allclose(x, clean, atol=1e-5)


def test_a_gaussian_flows_to_its_own_mean_and_deviation():
    """Clean data N(m, s^2) has the closed-form velocity E[noise - clean | x]; the flow must carry N(0, 1) onto it."""
    m, s, levels = 1.5, 0.4, sigma_schedule(400)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None]
    start = x.clone()
    for sigma, next_sigma in zip(levels, levels[1:]):
        variance = (1 - sigma) ** 2 * s ** 2 + sigma ** 2
        centred = x.double() - (1 - sigma) * m
        velocity = (sigma - (1 - sigma) * s ** 2) / variance * centred - m
        x = flow_step(x, velocity, sigma, next_sigma)
    assert torch.allclose(x.double(), m + s * start, atol=0.02)


def test_noise_levels_must_go_down():
    assert sigma_schedule(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    for wrong in ((0.5, 0.5), (0.2, 0.6), (1.2, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError, match="go down"):
            flow_step(torch.zeros(1), torch.zeros(1), *wrong)
    with pytest.raises(ValueError, match="at least one step"):
        sigma_schedule(0)


# ---------------------------------------------------------------- steps with fresh noise

def latent_and_velocity():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 5, 10, 128, generator=g)                   # (B, K, N, C) each


def mean_and_deviation(sampler, x, v, sigma, down, a):
    """The papers' formulas as METHOD.md writes them, in float64, without the three coefficients."""
    x, v = x.double(), v.double()
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    if sampler == "flow-sde":
        deviation = a * math.sqrt(sigma / (1 - sigma)) * math.sqrt(sigma - down)
        return x - (sigma - down) * v - 0.5 * deviation ** 2 * noise / sigma, deviation
    if sampler == "cps":
        deviation = down * math.sin(a * math.pi / 2)
    else:
        deviation = down * math.sqrt(1 - (down * (1 - sigma) / (sigma * (1 - down))) ** (a * a))
    return (1 - down) * clean + math.sqrt(down ** 2 - deviation ** 2) * noise, deviation


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_stochastic_step_and_its_log_prob_are_those_of_a_normal_distribution(sampler):
    """x' = mean + step_std eps, log p(x') = mean over (N, C) of log Normal(mean, step_std), against float64."""
    x, v = latent_and_velocity()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    coefficients = step_coefficients(sampler, 0.75, 0.5, 0.7)
    next_x, log_prob, mean = stochastic_step(x, v, coefficients, noise=noise)
    want, deviation = mean_and_deviation(sampler, x, v, 0.75, 0.5, 0.7)
    assert next_x.dtype == torch.float32 and math.isclose(coefficients[2], deviation, rel_tol=1e-12)
    assert (mean - want).abs().max() < 2e-6 and (next_x - want - deviation * noise).abs().max() < 2e-6
    normal = torch.distributions.Normal(mean.double(), deviation)
    assert (log_prob - normal.log_prob(next_x.double()).mean((-2, -1))).abs().max() < 5e-7


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_rescoring_a_step_gives_the_log_prob_of_sampling_it_to_the_bit(sampler):
    """One chunk at a time, as a rollout draws, or all chunks in strided slices, as rescoring reads them."""
    x, v = latent_and_velocity()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    coefficients = step_coefficients(sampler, 0.75, 0.5, 0.7)
    drawn = [stochastic_step(x[:, k], v[:, k], coefficients, noise=noise[:, k]) for k in range(x.shape[1])]
    next_x, log_prob, _ = (torch.stack(what, 1) for what in zip(*drawn))
    draws = [torch.stack([torch.zeros_like(t), t], 1) for t in (x, v, next_x)]        # (B, M, K, N, C), as rollouts
    again = stochastic_step(draws[0][:, 1], draws[1][:, 1], coefficients, next_x=draws[2][:, 1])
    assert torch.equal(again[1], log_prob) and torch.equal(again[0], next_x)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_without_noise_every_sampler_is_the_ode(sampler):
    for sigma, down in ((1.0, 0.8), (0.6, 0.3), (0.2, 0.0)):
        c_x, c_v, step_std = step_coefficients(sampler, sigma, down, 0.0)
        assert math.isclose(c_x, 1) and math.isclose(c_v, down - sigma) and step_std == 0
        if sigma < 1:                   # precise forgets everything on the way from sigma = 1, however little its noise
            nearly = step_coefficients(sampler, sigma, down, 1e-6)
            assert all(abs(a - b) < 1e-5 for a, b in zip(nearly, (1, down - sigma, 0)))


def flow_of_a_gaussian(sampler, a, steps, m=1.5, s=0.4, samples=40_000):
    """Sample clean data N(m, s^2) by its closed-form velocity; the last step is an ODE step. Returns (samples,)."""
    g = torch.Generator().manual_seed(0)
    x, levels = torch.randn(samples, 1, 1, generator=g), sigma_schedule(steps)
    for sigma, down in zip(levels, levels[1:]):
        slope = (sigma - (1 - sigma) * s ** 2) / ((1 - sigma) ** 2 * s ** 2 + sigma ** 2)
        velocity = slope * (x - (1 - sigma) * m) - m
        if down:
            noise = torch.randn(x.shape, generator=g)
            x = stochastic_step(x, velocity, step_coefficients(sampler, sigma, down, a), noise=noise)[0]
        else:
            x = flow_step(x, velocity, sigma, down)
    return x.flatten()


@pytest.mark.parametrize("sampler", ["flow-sde", "precise"])
def test_many_noisy_steps_keep_the_marginal_of_a_gaussian(sampler):
    """The SDE was made to have the ODE's marginals: mean 1.5 and deviation 0.4 come out, whatever the noise."""
    x = flow_of_a_gaussian(sampler, a=0.7, steps=300)
    assert abs(x.mean() - 1.5) < 0.015 and abs(x.std() - 0.4) < 0.015


def test_cps_follows_its_own_recursion_and_loses_spread():
    """CPS adds as much noise as it takes away, but what it adds no longer carries the sample: variances shrink.

    The recursion of the variance, for x' = (1 - s') clean_hat + kept noise_hat + step_std eps, both linear in x.
    """
    steps, a, s = 300, 0.8, 0.4
    variance, levels = 1.0, sigma_schedule(steps)
    for sigma, down in zip(levels, levels[1:]):
        slope = (sigma - (1 - sigma) * s ** 2) / ((1 - sigma) ** 2 * s ** 2 + sigma ** 2)
        clean, noise = 1 - sigma * slope, 1 + (1 - sigma) * slope       # d clean_hat / dx, d noise_hat / dx
        gain = (1 - down) * clean + down * math.cos(a * math.pi / 2) * noise
        variance = gain ** 2 * variance + (down * math.sin(a * math.pi / 2)) ** 2
    x = flow_of_a_gaussian("cps", a, steps)
    assert abs(x.mean() - 1.5) < 0.015 and abs(x.std() - math.sqrt(variance)) < 0.005
    assert 0.75 < math.sqrt(variance) / s < 0.85


def test_a_step_names_what_it_cannot_do():
    x = torch.zeros(1, 2, 3)
    for sampler, last in (("cps", 0.0), ("precise", 0.0), ("ode", 0.5)):
        with pytest.raises(ValueError, match="without noise has no log-probability"):
            stochastic_step(x, x, step_coefficients(sampler, 0.7, last, 0.7), noise=x)
    with pytest.raises(ValueError, match="either noise"):
        stochastic_step(x, x, (1.0, 1.0, 1.0))
    for wrong in (("euler", 0.5, 0.2, 0.7), ("cps", 0.5, 0.2, 1.1), ("flow-sde", 0.5, 0.2, -1)):
        with pytest.raises(ValueError, match="sampler must be|out of range"):
            step_coefficients(*wrong)
