"""The mask rule and the flow step, held against brute force and against closed forms."""

import math

import pytest
import torch

from kernels.attention import Layout, attention, chunk_causal_mask
from kernels.flow_step import flow_step, sigma_schedule


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
