"""The Triton kernels: against their PyTorch twins in float64, in the whole of the project, and as compiled for GPUs.

Without a GPU the kernels run in Triton's interpreter, in fp32 and fp64 (its bf16 is wrong), which shows what they
compute; what they compile to is shown by compiling them for GPUs that are not here. Neither shows races or speed: on a
machine with a GPU the same tests run on it, and those marked `gpu` besides.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grpo
import kernels
from kernels import attention as attention_module
from kernels import bench, flow_step, tl
from kernels.attention import Layout, attention, chunk_causal_mask, fused_attention
from kernels.flow_step import STOCHASTIC, fused_step, philox_normal, step_coefficients, stochastic_step
from test_grpo import SMALL
from test_model import generator, inputs, noise_for, parallel_inputs

triton = pytest.importorskip("triton", reason="needs triton, which comes with PyTorch on Linux")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")      # of the interpreter
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU, and there is none")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5 if GPU else 3e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float64, torch.float32]
KERNEL_SIZED = dict(heads=2, kv_heads=1, head_dim=32, layers=1, channels=8)


def tensors(*shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def qkv(layout, heads=2, kv_heads=2, d=32, batch=1, dtype=torch.float32, seed=0):
    shapes = [(batch, h, layout.length, d) for h in (heads, kv_heads, kv_heads, heads)]
    return tensors(*shapes, dtype=dtype, seed=seed)


def with_gradients(q, k, v, dout, layout, impl):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, layout, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def assert_near(one, other, dtype):
    for name, a, b in zip(("out", "dq", "dk", "dv"), one, other):
        assert a.dtype == dtype and (a.double() - b).abs().max() <= TOLERANCE[dtype] * b.abs().max().clamp_min(1), name


# ---------------------------------------------------------------- attention

@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout, heads, kv_heads, d", [
    (Layout(3, 5, 2, segments=2, window=2), 4, 2, 32),          # short odd units, shared key heads, several segments
    (Layout(2, 37, 4, segments=1), 1, 1, 64),                   # units of more than one tile, and a short last one
    (Layout(1, 3, 2), 1, 1, 128),                               # one chunk
    (Layout(4, 2, 1, segments=0, window=2), 1, 1, 32),          # context alone
    (Layout(3, 4, 0, segments=2, window=1), 1, 1, 32)],         # no sound: block 0 has no tokens but the portrait
    ids=["odd", "tiles", "one chunk", "context", "silent"])
def test_the_kernel_is_the_twin_in_float64_forward_and_backward(layout, heads, kv_heads, d, dtype):
    """out, dq, dk, dv for random out gradients, in units of their largest value."""
    q, k, v, dout = qkv(layout, heads, kv_heads, d, dtype=dtype)
    want = with_gradients(q.double(), k.double(), v.double(), dout.double(), layout, "torch")
    assert_near(with_gradients(q, k, v, dout, layout, "triton"), want, dtype)


@pytest.mark.parametrize("window", [0, 1, 2, 3, 50])
def test_every_window_is_kept_and_0_leaves_the_portrait_and_the_own_chunk(window):
    layout = Layout(4, 3, 2, segments=1, window=window)
    q, k, v, dout = qkv(layout)
    want = with_gradients(q.double(), k.double(), v.double(), dout.double(), layout, "torch")
    assert_near(with_gradients(q, k, v, dout, layout, "triton"), want, torch.float32)


def test_long_chunks_get_tiles_of_128_that_give_the_same():
    """In fp16, which the interpreter can do: the tiles of 16-bit numbers, 128 rows where they fill the chunks."""
    layout = Layout(1, 128, 128)
    q, k, v, dout = qkv(layout, heads=1, kv_heads=1, dtype=torch.float16)
    assert attention_module.tiling(layout.bounds, layout.length, 32, q.dtype, False)[0] == 128
    want = with_gradients(q.double(), k.double(), v.double(), dout.double(), layout, "torch")
    assert_near(with_gradients(q, k, v, dout, layout, "triton"), want, torch.float16)


def test_nothing_that_is_forbidden_is_ever_read():
    """NaN in every key that a query may not see, and in the out gradient of every query that may not see a key: not a
    bit of the query's output and gradient, of the key's and the value's gradient, changes."""
    layout = Layout(2, 5, 2, segments=2, window=1)
    q, k, v, dout = qkv(layout, heads=1, kv_heads=1)
    mask = chunk_causal_mask(layout, torch.device(DEVICE))
    before = with_gradients(q, k, v, dout, layout, "triton")
    for row in (1, 8, layout.context_length + 16):                  # portrait, block 1, a noisy chunk of segment 2
        hidden = ~mask[row]
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, hidden], bad_v[:, :, hidden] = math.nan, math.nan
        after = with_gradients(q, bad_k, bad_v, dout, layout, "triton")
        assert all(torch.equal(a[:, :, row], b[:, :, row]) for a, b in zip(after[:2], before[:2]))
        blind, bad_dout = ~mask[:, row], dout.clone()
        bad_dout[:, :, blind] = math.nan
        after = with_gradients(q, k, v, bad_dout, layout, "triton")
        assert all(torch.equal(a[:, :, row], b[:, :, row]) for a, b in zip(after[2:], before[2:]))


@pytest.mark.skipif(GPU, reason="the interpreter alone has fp64")
def test_the_gradient_passes_gradcheck_in_float64():
    layout = Layout(3, 2, 1)                                                         # L = 15
    q, k, v = (x.requires_grad_() for x in qkv(layout, heads=1, kv_heads=1, dtype=torch.float64)[:3])
    assert torch.autograd.gradcheck(lambda *x: attention(*x, layout, impl="triton"), (q, k, v), fast_mode=True)


def test_strided_inputs_of_any_scale_are_read_where_they_lie():
    """Heads inside tokens, as the projections leave them; a part of a longer cache; scores of a thousand."""
    layout = Layout(2, 5, 2)
    q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(layout))
    k, v = (torch.cat([x, torch.full_like(x, math.nan)], 2)[:, :, :layout.length] for x in (100 * k, v))
    want = with_gradients(q.double(), k.double(), v.double(), dout.double(), layout, "torch")
    got = with_gradients(q, k, v, dout, layout, "triton")
    assert all((a - b).abs().max() < 1e-3 * b.abs().max() for a, b in zip(got, want))


@pytest.mark.parametrize("length, keys", [(50, 1), (1, 77), (10, 122)])
def test_a_chunk_attends_to_a_cache_of_any_length(length, keys):
    """The decode path: no mask, queries and keys of different and odd numbers, keys a view into a longer cache."""
    q, k, v = tensors((2, 4, length, 32), (2, 2, keys + 9, 32), (2, 2, keys + 9, 32))
    k[:, :, keys:], v[:, :, keys:] = math.nan, math.nan
    k, v, dout = k[:, :, :keys], v[:, :, :keys], tensors((2, 4, length, 32), seed=1)[0]
    want = with_gradients(q.double(), k.double(), v.double(), dout.double(), None, "torch")
    assert_near(with_gradients(q, k, v, dout, None, "triton"), want, torch.float32)


@pytest.mark.parametrize("bounds", [Layout(1, 3, 1).bounds, []], ids=["layout", "decode"])
def test_attention_is_an_operator_that_pytorch_knows(bounds):
    """Schema, shapes and strides without data, autograd, and tracing, as torch.library checks them."""
    q, k, v = (x.requires_grad_() for x in qkv(Layout(1, 3, 1), heads=2, kv_heads=1)[:3])
    torch.library.opcheck(fused_attention, (q, k, v, bounds))


def test_torch_compile_takes_both_kernels_in_one_graph():
    layout, (x, v, next_x) = Layout(2, 3, 1), tensors((2, 3, 8), (2, 3, 8), (2, 3, 8), seed=3)
    q, k, w = qkv(layout)[:3]

    def both(q, v):
        log_prob = stochastic_step(x, v, (0.9, 0.2, 0.4), next_x=next_x, impl="triton")[1]
        return attention(q, k, w, layout, impl="triton").square().mean() + log_prob.sum()
    grads = [torch.autograd.grad(f(q, v), (q, v)) for q, v in [(q.requires_grad_(), v.requires_grad_())]
             for f in (both, torch.compile(both, backend="aot_eager", fullgraph=True))]
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and grads[0][0].abs().max() > 0


@gpu
def test_equal_inputs_give_equal_bits():
    layout = Layout(4, 50, 4, segments=2, window=2)
    inputs = qkv(layout, 8, 4, 64, batch=4, dtype=torch.bfloat16)
    first = with_gradients(*inputs, layout, "triton")
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(*inputs, layout, "triton"), first))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("layout", [Layout(4, 128, 128, segments=2), Layout(12, 50, 4, window=8), Layout(12, 10, 4)],
                         ids=str)
def test_the_kernel_is_the_twin_at_full_size(layout, d, dtype):
    q, k, v, dout = qkv(layout, 4, 2, d, batch=2, dtype=dtype)
    want = with_gradients(q.double(), k.double(), v.double(), dout.double(), layout, "torch")
    assert_near(with_gradients(q, k, v, dout, layout, "triton"), want, dtype)


# ---------------------------------------------------------------- the flow step

def latents(rows=(2, 3), n=(10, 133), seed=0):
    return tensors(*[(*rows, *n)] * 3, seed=seed)


def one_block_or_more():
    return pytest.mark.parametrize("n", [(1, 3), (10, 128), (10, 451)], ids=["short", "one block", "two blocks"])


@one_block_or_more()
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_draw_and_its_log_prob_are_those_of_a_normal_distribution(sampler, n):
    """x' = mean + step_std eps, log p(x') = mean of log Normal(mean, step_std) of torch.distributions in float64."""
    x, v, noise = latents(n=n)
    c_x, c_v, step_std = coefficients = step_coefficients(sampler, 0.75, 0.5, 0.7)
    next_x, log_prob, mean = stochastic_step(x, v, coefficients, noise=noise, impl="triton")
    want = c_x * x.double() + c_v * v.double()
    assert (mean - want).abs().max() < 1e-6 and (next_x - want - step_std * noise).abs().max() < 1e-6
    normal = torch.distributions.Normal(mean.double(), step_std)
    assert (log_prob - normal.log_prob(next_x.double()).mean((-2, -1))).abs().max() < 5e-7
    assert next_x.dtype == log_prob.dtype == mean.dtype == torch.float32


@one_block_or_more()
def test_rescoring_is_the_draw_to_the_bit_however_rows_are_batched(n):
    """One chunk at a time, with given noise and with a seed, then all chunks at once from strided slices."""
    x, v, noise = latents(n=n)
    coefficients, seed = step_coefficients("cps", 0.75, 0.5, 0.8), torch.tensor([7, 1 << 40], device=DEVICE)
    for how in ({"noise": noise}, {"seed": seed}):
        hows = [{name: t if name == "seed" else t[:, k] for name, t in how.items()} for k in range(3)]
        drawn = [stochastic_step(x[:, k], v[:, k], coefficients, impl="triton", **hows[k]) for k in range(3)]
        next_x, log_prob, mean = (torch.stack(what, 1) for what in zip(*drawn))
        slices = [torch.stack([torch.zeros_like(t), t], 1)[:, 1] for t in (x, v, next_x)]
        again = stochastic_step(*slices[:2], coefficients, next_x=slices[2], impl="triton")
        assert torch.equal(again[1], log_prob) and torch.equal(again[2], mean) and again[0] is slices[2]


@one_block_or_more()
@pytest.mark.parametrize("with_mean", [True, False])
def test_the_gradient_for_the_velocity_is_the_twins_in_float64(with_mean, n):
    x, v, next_x = latents(n=n)
    coefficients, (dlog_prob,) = step_coefficients("flow-sde", 0.75, 0.5, 0.7), tensors((2, 3), seed=1)
    gradients = []
    for dtype, impl in ((torch.float32, "triton"), (torch.float64, "torch")):
        velocity = v.to(dtype).requires_grad_()
        _, log_prob, mean = stochastic_step(x, velocity, coefficients, next_x=next_x, with_mean=with_mean, impl=impl)
        loss = (log_prob * dlog_prob).sum() + (0 if mean is None else (mean * next_x).sum())
        gradients.append(torch.autograd.grad(loss, velocity)[0].double())
    assert mean is not None or not with_mean
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6 * gradients[1].abs().max()


def test_the_ode_is_the_same_kernel_without_noise():
    x, v, _ = latents()
    assert (flow_step.flow_step(x, v, 0.7, 0.5, impl="triton") - (x.double() - 0.2 * v.double())).abs().max() < 1e-6


def philox(counter: int, key: int) -> list[int]:
    """Philox-4x32-10 as Salmon et al. (2011) give it, in Python's own integers. Returns: four 32-bit words."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_gives_the_published_words():
    """The known answers of Random123 whose upper counter words are zero, for the oracle of the tests below."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@triton.jit
def words_kernel(seed_ptr, out_ptr):
    at = tl.arange(0, 16)
    words = tl.randint4x(tl.load(seed_ptr), tl.load(seed_ptr + 1) + at)
    for j in tl.static_range(4):
        tl.store(out_ptr + 4 * at + j, words[j].to(tl.int64))


SEEDS = [(0, 0), (0x0123456789ABCDEF, (5 << 32) - 8), (-1, 3)]


@pytest.mark.parametrize("key, offset", SEEDS)
def test_the_kernels_words_are_philox_4x32_10(key, offset):
    """64-bit keys and counters, the latter across a carry into their upper half."""
    out = torch.zeros(64, dtype=torch.int64, device=DEVICE)
    words_kernel[1,](torch.tensor([key, offset], device=DEVICE), out)
    assert out.tolist() == [w for i in range(16) for w in philox(offset + i, key % 2 ** 64)]


@pytest.mark.parametrize("key, offset", SEEDS)
@one_block_or_more()
def test_noise_from_a_seed_is_box_muller_of_those_words(key, offset, n):
    """In kernel and twin: element j of a row from word j % 4 of counter offset + row ceil(n / 4) + j // 4."""
    zero, seed, size = torch.zeros(2, *n, device=DEVICE), torch.tensor([key, offset], device=DEVICE), math.prod(n)
    drawn = stochastic_step(zero, zero, (1.0, 0.0, 1.0), seed=seed, impl="triton")[0].view(2, -1)
    twin = philox_normal(zero.shape, seed).view(2, -1)
    for row, j in [(0, 0), (0, 1), (0, 2), (1, 0), (1, size // 2), (1, size - 1)]:
        words = philox(offset + row * -(-size // 4) + j // 4, key % 2 ** 64)
        u, angle = (((w >> 9) + 0.5) / 2 ** 23 for w in words[j % 4 // 2 * 2:][:2])
        want = math.sqrt(-2 * math.log(u)) * (math.sin, math.cos)[j % 2 == 0](2 * math.pi * (angle - 0.5))
        assert abs(drawn[row, j].item() - want) < 1e-4 and abs(twin[row, j].item() - want) < 1e-5
    assert (drawn - twin).abs().max() < 1e-4


def test_noise_from_a_seed_is_normal():
    """Mean, variance, fourth moment and correlation of neighbours of 400,000 numbers, within five standard errors."""
    z = philox_normal(torch.Size([1, 400, 1000]), torch.tensor([3, 0])).double().flatten()
    error = 5 / math.sqrt(len(z))
    assert abs(z.mean()) < error and abs(z.var() - 1) < error * math.sqrt(2)
    assert abs((z ** 4).mean() - 3) < error * math.sqrt(96)
    assert all(abs((z[i:] * z[:-i]).mean()) < error for i in (1, 2, 3, 4, 1000))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_takes_a_velocity_of_16_bits(dtype):
    x, v, noise = latents(n=(10, 451))
    v, coefficients = v.to(dtype), step_coefficients("cps", 0.75, 0.5, 0.8)
    velocities = [v.clone().requires_grad_(), v.double().requires_grad_()]
    next_x, old, _ = stochastic_step(x, v, coefficients, noise=noise, impl="triton")
    _, log_prob, mean = stochastic_step(x, velocities[0], coefficients, next_x=next_x, impl="triton")
    _, want, _ = stochastic_step(x, velocities[1], coefficients, next_x=next_x, impl="torch")
    assert torch.equal(log_prob, old) and (log_prob - want).abs().max() < 1e-6 and mean.dtype == torch.float32
    one, other = (torch.autograd.grad(p.sum(), u)[0].double() for p, u in zip((log_prob, want), velocities))
    assert (one - other).abs().max() < (1e-5 if dtype == torch.float32 else 1e-2) * other.abs().max()


@pytest.mark.parametrize("mode", ["ode", "noise", "seed", "rescore"])
def test_the_step_is_an_operator_that_pytorch_knows(mode):
    x, v, other = latents(n=(1, 3))
    given = {"ode": None, "seed": torch.tensor([1, 2], device=DEVICE)}.get(mode, other)
    v.requires_grad_(mode == "rescore")
    torch.library.opcheck(fused_step, (x, v, given, mode, 0.9, 0.2, 0.4, mode != "ode"))


# ---------------------------------------------------------------- choosing

def test_triton_asked_for_by_name_never_becomes_pytorch_in_silence(monkeypatch):
    q = torch.zeros(1, 1, 5, 32, device=DEVICE)
    x, v = torch.zeros(2, 1, 3, 8, device=DEVICE)
    for wrong, message in (((q[..., :24],) * 3, "got 24"), ((q, q, q.half()), "one dtype"),
                           ((q, q[:, :, :0], q[:, :, :0]), "no keys")):
        with pytest.raises(ValueError, match=message):
            attention(*wrong, impl="triton")
    for wrong, message in (((x.double(), v), "fp32"), ((x, v[:, :2]), "shapes"),
                           ((x, v.clone().requires_grad_()), "gradient")):
        with pytest.raises(ValueError, match=message):
            stochastic_step(*wrong, (1.0, 1.0, 1.0), noise=x.float(), impl="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        attention(q, q, q, impl="cuda")
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        attention(*[q.cpu()] * 3, impl="triton")
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(ValueError, match="not installed"):
        attention(q, q, q, impl="triton")
    assert attention(q, q, q).shape == q.shape


def test_auto_on_a_cpu_is_pytorch(monkeypatch):
    def refuse(*args):
        raise AssertionError("the kernel ran")
    monkeypatch.setattr(attention_module, "fused_attention", refuse)
    monkeypatch.setattr(flow_step, "fused_step", refuse)
    layout, (x, v, noise) = Layout(2, 3, 1), (t.cpu() for t in latents(n=(1, 3)))
    attention(*(t.cpu() for t in qkv(layout)[:3]), layout)
    stochastic_step(x, v, (1.0, 1.0, 1.0), noise=noise)
    flow_step.flow_step(x, v, 0.7, 0.5)


def test_the_project_runs_where_triton_is_not_installed():
    """A fresh interpreter in which `import triton` fails."""
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch, kernels, grpo\nfrom kernels.attention import attention\n"
            "q = torch.zeros(1, 1, 5, 32)\nprint(kernels.triton, attention(q, q, q).shape)\n"
            "attention(q, q, q, impl='triton')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.startswith("None torch.Size([1, 1, 5, 32])"), done.stderr
    assert "triton is not installed" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- the whole

def pretraining_gradients(model, impl, chunks=3):
    with bench.using(impl):
        clean, noisy, sigma = (t.to(DEVICE) for t in parallel_inputs(model, chunks))
        velocity = model(*(t.to(DEVICE) for t in inputs(model, chunks)), clean, noisy, sigma)
        velocity.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [velocity.detach(), *gradients]


def test_a_training_step_is_the_same_with_and_without_kernels():
    """The generator's velocity, and the gradient of every parameter."""
    model = generator(**KERNEL_SIZED, window=2).to(DEVICE)
    one, other = (pretraining_gradients(model, impl) for impl in ("triton", "torch"))
    assert len(one) > 20 and max((a - b).abs().max() / b.abs().max().clamp_min(1e-3) for a, b in zip(one, other)) < 1e-4


def test_generation_is_the_same_with_and_without_kernels():
    """Three chunks against the rolling cache, which rolls over, and the flow's steps: latents of either."""
    model = generator(**KERNEL_SIZED, window=1).to(DEVICE)
    made = {}
    for impl in ("triton", "torch"):
        noise = noise_for(model, 1)
        with bench.using(impl):
            chunks = model.generate(*(t.to(DEVICE) for t in inputs(model, 3, 1)), lambda k: noise(k).to(DEVICE), 2)
            made[impl] = torch.stack([x for x, _ in chunks])
    assert made["torch"].abs().max() > 0.1 and (made["triton"] - made["torch"]).abs().max() < 1e-4


def test_a_grpo_update_is_the_same_with_and_without_kernels():
    """A rollout, its rescoring in one pass to 1e-6 (cache and mask hold the same), the loss and its gradient."""
    model, made, settings = generator(**KERNEL_SIZED, window=1).to(DEVICE), {}, replace(SMALL, group=2, kl_weight=0.0)
    for impl in ("triton", "torch"):
        with bench.using(impl):
            portrait, mel = (t.to(DEVICE) for t in inputs(model, 2, 1))
            rng = torch.Generator().manual_seed(0)
            rollout = grpo.roll_out(model, portrait, mel, settings, grpo.window(settings, 0, rng), rng)
            assert grpo.check_rescoring(model, rollout, settings) <= 1e-6
            advantage = torch.tensor([[1.0], [-0.5]], device=DEVICE).expand(2, 2)
            loss, _ = grpo.grpo_loss(model, model, rollout, advantage, settings)
            gradients = torch.autograd.grad(loss, list(model.blocks.parameters()))
            made[impl] = [rollout.next_x, rollout.old_log_prob, *gradients]
    for one, other in zip(made["triton"], made["torch"]):
        assert (one - other).abs().max() < 1e-4 * other.abs().max().clamp_min(1e-2)


@gpu
def test_under_autocast_a_training_step_agrees_to_the_precision_of_bf16():
    model = generator(**KERNEL_SIZED, window=2).to(DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        one, other = (pretraining_gradients(model, impl) for impl in ("triton", "torch"))
    for a, b in zip(one, other):
        assert (a - b).norm() <= 0.05 * b.norm() + 1e-3


# ---------------------------------------------------------------- compiled for GPUs that are not here

@pytest.fixture(scope="module")
def compiled():
    """What tests/compile_kernels.py printed: every kernel as it would be launched, for an A100 and an H100."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, script, "80,90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_compiled_kernel_spills_registers(compiled):
    assert {r["kernel"] for r in compiled} == {"forward_kernel", "dq_kernel", "dkdv_kernel", "step_kernel",
                                               "log_prob_kernel", "velocity_gradient_kernel"}
    assert not [r for r in compiled if r["stack"] or r["local"]]


def test_compiled_attention_uses_tensor_cores_and_fits_into_shared_memory(compiled):
    """HMMA or HGMMA in every kernel, HGMMA on sm_90 where tiles have the 64 rows of a warp group; 163 and 227 KB."""
    for r in compiled:
        if r["kernel"] in ("forward_kernel", "dq_kernel", "dkdv_kernel"):
            own = r["BLOCK_K"] if r["kernel"] == "dkdv_kernel" else r["BLOCK_Q"]
            assert r["matrix"] > 0 and (r["warp_group"] > 0) == (r["sm"] == 90 and own >= 64), r
            assert r["wide_loads"] > 0, r
        assert r["shared"] <= {80: 163, 90: 227}[r["sm"]] * 1024, r


def test_compiled_sums_of_a_draw_and_of_its_rescoring_add_in_one_order(compiled):
    """Equal bits need the same layout of elements over threads, whatever the mode and the velocity's type."""
    layouts = {}
    for r in compiled:
        if r["kernel"] == "step_kernel" and r["MODE"] != "ode":
            layouts.setdefault((r["sm"], r["BLOCK"]), set()).add((*r["summed"], r["num_warps"]))
    assert len(layouts) >= 2 and all(len(found) == 1 and len(next(iter(found))) == 2 for found in layouts.values())


def test_compiled_draws_and_rescorings_round_alike(compiled):
    """The interpreter does not round a fused multiply-add once, so rounding is read off the instructions: one FFMA an
    element in every mode, the mean, and in a draw one multiplication and one addition more than in its rescoring."""
    steps = {}
    for r in compiled:
        if r["kernel"] == "step_kernel":
            steps.setdefault((r["sm"], r["case"], r["BLOCK"]), {})[r["MODE"]] = r["arithmetic"]
    assert steps
    for (_, _, block), modes in steps.items():
        each = block // 256                                          # elements of each of the 8 x 32 threads
        assert {a["FFMA"] for a in modes.values()} == {each}, modes
        assert all(modes["noise"][op] == modes["rescore"][op] + each for op in ("FMUL", "FADD")), modes


# ---------------------------------------------------------------- the benchmark

def test_attention_flops_are_those_of_the_dense_products_on_the_allowed_pairs():
    """One chunk, by hand: the portrait's 3 tokens see 3 keys, the 2 of the sound 5, the 3 noisy ones 8: 43 pairs."""
    assert bench.attention_flops(2, 3, 32, Layout(1, 3, 2), backward=False) == 2 * 3 * 4 * 32 * 43
    assert bench.attention_flops(2, 3, 32, Layout(1, 3, 2), backward=True) == 2 * 3 * 10 * 32 * 43


def test_the_benchmark_ends_in_one_line_without_a_gpu(monkeypatch, capsys):
    """sys.exit with a message: printed to stderr, exit code 1."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^error: the benchmark needs a CUDA GPU.*$") as stopped:
        bench.main([])
    assert "\n" not in stopped.value.code and capsys.readouterr().out == ""


def test_the_benchmark_measures_every_provider_and_writes_a_table():
    results = bench.bench_flow("tiny", (2, 30), 1e12, DEVICE, compiled=False)
    shape = (1, 2, 1, 32, Layout(2, 3, 1))
    results += bench.bench_attention("tiny", shape, 1e14, DEVICE, torch.float32, compiled=False)
    lines = bench.table(results).splitlines()
    assert len(lines) == 2 + 2 * 2 + 2 * 3 and lines[-1].startswith("| attention tiny backward | triton |")
    assert lines[-1].endswith("| 1.00 |") and "GB/s" in lines[2] and "TFLOP/s" in lines[-1]
    flow = results[0]
    assert math.isclose(flow["rate"], 60 * 12 / flow["p50"] * 1e3)
    assert math.isclose(flow["ceiling"], flow["rate"] / 1e12)


def test_the_benchmark_of_the_whole_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path))
    flags = ("--size 32 --width 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --mlp-width 32 --space-channels 6 "
             "--channels 8 --seconds 1 --batch 2 --group 2 --prompts 2 --judge none")
    made = bench.bench_whole(flags, "torch", 1e14, "cpu", times=1)
    assert set(made["grpo"]) == {"rollout", "reward", "update"} and 0 < made["mfu"] < 1
    assert "| s | torch |" in bench.whole_table([{"size": "s"} | made])
