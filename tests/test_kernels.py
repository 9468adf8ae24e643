"""The mask rule, attention and the flow step, in PyTorch and in Triton, against brute force and closed forms.

Without a GPU the kernels run in Triton's interpreter, in fp32 (its bf16 is wrong), which shows what they
compute; what they compile to is shown by compiling them for GPUs that are not here. Neither shows races or
speed: on a machine with a GPU the same tests run on it, and those marked `gpu` besides.
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
from kernels import bench, flow_step
from kernels.attention import Layout, attention, chunk_causal_mask, fused_attention
from kernels.flow_step import STOCHASTIC, fused_step, sigma_schedule, step_coefficients, stochastic_step
from test_grpo import SMALL
from test_model import generator, inputs, noise_for, parallel_inputs

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
ROOT = Path(__file__).parents[1]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 2e-5 if GPU else 3e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]
KERNEL_SIZED = dict(heads=2, kv_heads=1, head_dim=32, layers=1, channels=8)
gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU, and there is none")
with_triton = pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
either = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=with_triton)])


def tensors(*shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


# ---------------------------------------------------------------- attention

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
    now = q_chunk if qs or q_kind == "audio" else q_chunk + 1     # clean video i is read for chunk i+1
    heard = k_chunk if k_kind == "audio" else k_chunk + 1
    return now - window < heard <= now


def rule(layout: Layout) -> torch.Tensor:
    names = tokens(layout)
    return torch.tensor([[may_see(q, k, layout.window) for k in names] for q in names])


@pytest.mark.parametrize("layout", [Layout(1, 3, 2), Layout(4, 3, 2), Layout(5, 2, 4, segments=2, window=2),
                                    Layout(6, 1, 1, segments=3, window=1), Layout(3, 2, 1, segments=0)])
def test_the_mask_is_the_rule_token_by_token(layout):
    assert layout.length == len(tokens(layout))
    assert torch.equal(chunk_causal_mask(layout, torch.device("cpu")), rule(layout))


def softmax_attention(q, k, v, mask):
    """Dense attention in float64; query head h reads key head h // (H / H_kv)."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    score = q.double() @ k.mT / math.sqrt(q.shape[-1])
    return score.masked_fill(~mask.to(q.device), -math.inf).softmax(-1) @ v


def with_gradients(q, k, v, dout, attend):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def assert_attention(impl, q, k, v, dout, layout):
    """out, dq, dk and dv against float64, in units of their largest value."""
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool) if layout is None else rule(layout)
    got = with_gradients(q, k, v, dout, lambda *x: attention(*x, layout, impl=impl))
    want = with_gradients(q, k, v, dout, lambda *x: softmax_attention(*x, mask))
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want):
        assert a.dtype == q.dtype and (a.double() - b.double()).abs().max() <= (
            TOLERANCE[q.dtype] * b.abs().max().clamp_min(1)), name


def qkv(layout, heads=2, kv_heads=2, d=32, batch=1, dtype=torch.float32):
    return tensors(*[(batch, h, layout.length, d) for h in (heads, kv_heads, kv_heads, heads)], dtype=dtype)


@either
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout, heads, kv_heads, d", [
    (Layout(3, 5, 2, segments=2, window=2), 4, 2, 32),          # short odd units, shared key heads, segments
    (Layout(2, 37, 4), 1, 1, 64),                               # units of more than one tile, the last short
    (Layout(1, 3, 2), 1, 1, 128),                               # one chunk
    (Layout(4, 2, 1, segments=0, window=2), 1, 1, 32),          # context alone
    (Layout(3, 4, 0, segments=2, window=1), 1, 1, 32),          # no sound: block 0 is the portrait alone
    (Layout(4, 3, 2, window=0), 1, 1, 32),                      # the portrait and the own chunk are left
    (Layout(4, 3, 2, window=3), 1, 1, 32)])
def test_attention_is_a_float64_softmax_forward_and_backward(impl, layout, heads, kv_heads, d, dtype):
    assert_attention(impl, *qkv(layout, heads, kv_heads, d, dtype=dtype), layout)


@with_triton
def test_long_chunks_get_tiles_of_128_that_give_the_same():
    """In fp16, which the interpreter can do: the tiles of 16-bit numbers, 128 rows if these fill chunks."""
    layout = Layout(1, 128, 128)
    assert attention_module.tiling(layout.bounds, 32, torch.float16, False)[0] == 128
    assert_attention("triton", *qkv(layout, 1, 1, dtype=torch.float16), layout)


@pytest.mark.parametrize("length, keys", [(50, 1), (1, 77), (10, 122)])
def test_a_chunk_attends_to_a_part_of_a_cache_of_any_length(length, keys):
    """No mask, other numbers of queries than of keys, keys a view into a longer cache, queries as projections
    leave them: heads inside tokens."""
    q, dout = (x.transpose(1, 2) for x in tensors((2, length, 4, 32), (2, length, 4, 32)))
    k, v = tensors((2, 2, keys + 9, 32), (2, 2, keys + 9, 32), seed=1)
    k[:, :, keys:], v[:, :, keys:] = math.nan, math.nan
    assert_attention("auto", q, k[:, :, :keys], v[:, :, :keys], dout, None)


@either
def test_nothing_that_is_forbidden_is_ever_read(impl):
    """What a query may not see, and the out gradients of what may not see a key, become NaN (in PyTorch,
    which multiplies them by 0, large): no bit of the query's output or gradient, or of the key's, changes."""
    layout, bad = Layout(2, 5, 2, segments=2, window=1), math.nan if impl == "triton" else 1e4
    q, k, v, dout = qkv(layout, heads=1, kv_heads=1)
    mask, attend = rule(layout), lambda *x: attention(*x, layout, impl=impl)
    before = with_gradients(q, k, v, dout, attend)
    for row in (1, 8, layout.context_length + 16):              # portrait, block 1, noisy chunk of segment 2
        bad_k, bad_v, bad_dout = k.clone(), v.clone(), dout.clone()
        bad_k[:, :, ~mask[row]], bad_v[:, :, ~mask[row]], bad_dout[:, :, ~mask[:, row]] = bad, bad, bad
        after = with_gradients(q, bad_k, bad_v, dout, attend)
        assert all(torch.equal(a[:, :, row], b[:, :, row]) for a, b in zip(after[:2], before[:2]))
        after = with_gradients(q, k, v, bad_dout, attend)
        assert all(torch.equal(a[:, :, row], b[:, :, row]) for a, b in zip(after[2:], before[2:]))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("layout", [Layout(4, 128, 128, segments=2), Layout(12, 50, 4, window=8)], ids=str)
def test_full_size_attention_is_the_softmax_and_equal_inputs_give_equal_bits(layout, d, dtype):
    given = qkv(layout, 4, 2, d, batch=2, dtype=dtype)
    assert_attention("triton", *given, layout)
    one, other = (with_gradients(*given, lambda *x: attention(*x, layout, impl="triton")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


# ---------------------------------------------------------------- the flow step

@pytest.mark.parametrize("sampler", ["ode", "flow-sde"])
def test_many_steps_carry_noise_to_the_marginal_of_a_gaussian(sampler, m=1.5, s=0.4):
    """Clean data N(m, s^2) have a closed-form velocity. The SDE was made to have the ODE's marginals: m and s
    come out, whatever the noise."""
    g, levels = torch.Generator().manual_seed(0), sigma_schedule(300)
    x = torch.randn(40_000, 1, 1, generator=g)
    for sigma, down in zip(levels, levels[1:]):
        slope = (sigma - (1 - sigma) * s ** 2) / ((1 - sigma) ** 2 * s ** 2 + sigma ** 2)
        velocity = slope * (x - (1 - sigma) * m) - m
        if down and sampler != "ode":
            noise = torch.randn(x.shape, generator=g)
            x = stochastic_step(x, velocity, step_coefficients(sampler, sigma, down, 0.7), noise=noise)[0]
        else:
            x = flow_step.flow_step(x, velocity, sigma, down)
    assert abs(x.mean() - m) < 0.015 and abs(x.std() - s) < 0.015


def latents(rows=(2, 3), n=(10, 133)):
    return tensors(*[(*rows, *n)] * 3)


blocks = pytest.mark.parametrize("n", [(1, 3), (10, 128), (10, 451)], ids=["short", "block", "two blocks"])


def mean_and_deviation(sampler, x, v, sigma, down, a):
    """The papers' formulas in float64, without the three coefficients."""
    x, v = x.double(), v.double()
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    if sampler == "flow-sde":
        deviation = a * math.sqrt(sigma / (1 - sigma)) * math.sqrt(sigma - down)
        return x - (sigma - down) * v - 0.5 * deviation ** 2 * noise / sigma, deviation
    deviation = down * math.sin(a * math.pi / 2)
    return (1 - down) * clean + math.sqrt(down ** 2 - deviation ** 2) * noise, deviation


@either
@blocks
@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_a_draw_and_its_log_prob_are_those_of_a_normal_distribution(impl, sampler, n):
    """x' = mean + step_std eps, log p(x') = mean over (N, C) of log Normal(mean, step_std), in float64."""
    x, v, noise = latents(n=n)
    coefficients = step_coefficients(sampler, 0.75, 0.5, 0.7)
    next_x, log_prob = stochastic_step(x, v, coefficients, noise=noise, impl=impl)
    want, deviation = mean_and_deviation(sampler, x, v, 0.75, 0.5, 0.7)
    assert math.isclose(coefficients[2], deviation, rel_tol=1e-12)
    assert (next_x - want - deviation * noise).abs().max() < 2e-6
    normal = torch.distributions.Normal(want, deviation)                  # its mean is not rounded to fp32
    assert (log_prob - normal.log_prob(next_x.double()).mean((-2, -1))).abs().max() < 2e-6
    assert next_x.dtype == log_prob.dtype == torch.float32


@either
@blocks
def test_rescoring_is_the_draw_to_the_bit_however_rows_are_batched(impl, n):
    """One chunk at a time, as a rollout draws, then all chunks at once from strided slices, as rescoring."""
    x, v, noise = latents(n=n)
    coefficients = step_coefficients("cps", 0.75, 0.5, 0.8)
    drawn = [stochastic_step(x[:, k], v[:, k], coefficients, noise=noise[:, k], impl=impl) for k in range(3)]
    next_x, log_prob = (torch.stack(what, 1) for what in zip(*drawn))
    x, v, next_x = (torch.stack([torch.zeros_like(t), t], 1)[:, 1] for t in (x, v, next_x))
    again = stochastic_step(x, v, coefficients, next_x=next_x, impl=impl)
    assert torch.equal(again[1], log_prob) and again[0] is next_x


@with_triton
@blocks
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=gpu)], ids=str)
def test_the_gradient_for_the_velocity_is_the_twins_in_float64(n, dtype):
    x, v, next_x = latents(n=n)
    v = v.to(dtype)
    coefficients, (dlog_prob,) = step_coefficients("flow-sde", 0.75, 0.5, 0.7), tensors((2, 3), seed=1)
    gradients = []
    for velocity, impl in ((v, "triton"), (v.double(), "torch")):
        velocity = velocity.clone().requires_grad_()
        _, log_prob = stochastic_step(x, velocity, coefficients, next_x=next_x, impl=impl)
        gradients.append(torch.autograd.grad((log_prob * dlog_prob).sum(), velocity)[0].double())
    assert (gradients[0] - gradients[1]).abs().max() < (
        1e-6 if dtype == torch.float32 else 1e-2) * gradients[1].abs().max()


def test_without_noise_a_step_is_the_ode_whatever_the_sampler():
    x, v, _ = latents()
    want = x.double() - 0.2 * v.double()
    assert (flow_step.flow_step(x, v, 0.7, 0.5) - want).abs().max() < 1e-6
    for sampler in STOCHASTIC:
        for sigma, down in ((1.0, 0.8), (0.6, 0.3), (0.2, 0.0)):
            assert step_coefficients(sampler, sigma, down, 0.0) == pytest.approx((1, down - sigma, 0))
            nearly = step_coefficients(sampler, sigma, down, 1e-6)
            assert nearly == pytest.approx((1, down - sigma, 0), abs=1e-5)


@with_triton
def test_attention_and_the_step_are_operators_that_pytorch_knows():
    """Schema, shapes and strides without data, autograd, and tracing, as torch.library checks them."""
    q, k, v = (x.requires_grad_() for x in qkv(Layout(1, 3, 1), heads=2, kv_heads=1)[:3])
    torch.library.opcheck(fused_attention, (q, k, v, Layout(1, 3, 1).bounds))
    for draws in True, False:
        x, v, given = latents(n=(1, 3))
        v.requires_grad_(not draws)
        torch.library.opcheck(fused_step, (x, v, given, draws, 0.9, 0.2, 0.4))


# ---------------------------------------------------------------- refusing and choosing

X, Q = torch.zeros(1, 2, 3, device=DEVICE), torch.zeros(1, 3, 10, 32, device=DEVICE)
TEN = Layout(1, 3, 4)
STEP = dict(coefficients=(1.0, 1.0, 1.0), noise=X, impl="triton")


@pytest.mark.parametrize("wrong, message", [
    (lambda: attention(Q, Q, Q, Layout(2, 3, 2)), "10 queries"),
    (lambda: attention(Q, Q, Q, TEN, impl="cuda"), "'cuda'"),
    (lambda: step_coefficients("cps", 0.5, 0.5, 0.8), "go down"),
    (lambda: stochastic_step(X, X, step_coefficients("cps", 0.7, 0.0, 0.7), noise=X), "no log-probability"),
    (lambda: stochastic_step(X, X, (1.0, 1.0, 1.0)), "either noise"),
    (lambda: step_coefficients("cps", 0.5, 0.2, 1.1), "out of range"),
    # by name, the kernels never become PyTorch in silence
    (lambda: attention(*[Q[..., :24]] * 3, TEN, impl="triton"), "got 24|not installed"),
    (lambda: attention(Q, Q, Q.half(), TEN, impl="triton"), "one dtype|not installed"),
    (lambda: stochastic_step(X.double(), X, **STEP), "fp32|not installed"),
    (lambda: stochastic_step(X, X[:, :1], **STEP), "shapes|not installed"),
    (lambda: stochastic_step(X, X.clone().requires_grad_(), **STEP), "gradient|not installed")])
def test_attention_and_steps_name_what_they_cannot_do(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@with_triton
def test_on_a_cpu_auto_is_pytorch_and_triton_is_refused_unless_interpreted(monkeypatch):
    monkeypatch.setattr(attention_module, "fused_attention", None)
    monkeypatch.setattr(flow_step, "fused_step", None)
    q, x = Q.cpu(), X.cpu()
    assert attention(q, q, q, TEN).shape == q.shape
    assert stochastic_step(x, x, (1.0, 1.0, 1.0), noise=x)[0].shape == x.shape
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        attention(q, q, q, TEN, impl="triton")


def test_the_project_runs_where_triton_is_not_installed():
    """A fresh interpreter in which `import triton` fails."""
    code = ("import sys; sys.modules['triton'] = None\n"
            "import torch, kernels, grpo\nfrom kernels.attention import Layout, attention\n"
            "q = torch.zeros(1, 1, 5, 32)\nprint(kernels.triton, attention(q, q, q, Layout(1, 2, 1)).shape)\n"
            "attention(q, q, q, Layout(1, 2, 1), impl='triton')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("None torch.Size([1, 1, 5, 32])"), done.stderr
    assert "triton is not installed" in done.stderr.splitlines()[-1]


# ---------------------------------------------------------------- the whole

def training_step(model):
    """Velocity, and the gradient of every parameter."""
    given = (*inputs(model, 3), *parallel_inputs(model, 3))
    velocity = model(*(t.to(DEVICE) for t in given))
    gradients = torch.autograd.grad(velocity.square().mean(), list(model.parameters()), allow_unused=True)
    return [velocity.detach(), *(g for g in gradients if g is not None)]


def generation(model):
    """Three chunks against the rolling cache, which rolls over."""
    noise = noise_for(model, 1)
    chunks = model.generate(*(t.to(DEVICE) for t in inputs(model, 3, 1)), lambda: noise().to(DEVICE), 2)
    return [x for x, _ in chunks]


def grpo_update(model):
    """A rollout, its rescoring in one pass to 1e-6 (cache and mask hold the same), and the gradient."""
    settings, rng = replace(SMALL, group=2, kl_weight=0.0), torch.Generator().manual_seed(0)
    portrait, mel = (t.to(DEVICE) for t in inputs(model, 2, 1))
    rollout = grpo.roll_out(model, portrait, mel, settings, grpo.drawing_steps(settings, rng), rng)
    assert grpo.check_rescoring(model, rollout, settings) <= 1e-6
    advantage = torch.tensor([[1.0], [-0.5]], device=DEVICE).expand(2, 2)
    loss, _ = grpo.grpo_loss(model, model, rollout, advantage, settings)
    return [rollout.next_x, rollout.old_log_prob, *torch.autograd.grad(loss, list(model.blocks.parameters()))]


@with_triton
@pytest.mark.parametrize("task", [training_step, generation, grpo_update])
def test_training_generation_and_grpo_are_the_same_with_and_without_kernels(task):
    model, made = generator(**KERNEL_SIZED, window=1).to(DEVICE), []
    for impl in ("triton", "torch"):
        with bench.using(impl):
            made.append(task(model))
    assert made[1][0].abs().max() > 0.1
    for one, other in zip(*made):
        assert (one - other).abs().max() < 1e-4 * other.abs().max().clamp_min(1e-2)


@gpu
def test_under_autocast_a_training_step_agrees_to_the_precision_of_bf16():
    model, made = generator(**KERNEL_SIZED, window=2).to(DEVICE), []
    for impl in ("triton", "torch"):
        with bench.using(impl), torch.autocast("cuda", torch.bfloat16):
            made.append(training_step(model))
    assert all((a - b).norm() <= 0.05 * b.norm() + 1e-3 for a, b in zip(*made))


# ---------------------------------------------------------------- compiled for GPUs that are not here

@pytest.fixture(scope="module")
def compiled():
    """What tests/compile_kernels.py printed: every kernel as it would be launched, for A100 and H100."""
    if kernels.triton is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script, results = [sys.executable, ROOT / "tests" / "compile_kernels.py"], []
    for process in [subprocess.Popen([*script, sm], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                     env=environment) for sm in ("80", "90")]:
        printed, said = process.communicate()
        assert process.returncode == 0, said[-2000:]
        results += json.loads(printed)
    return results


def test_compiled_kernels_spill_nothing_fit_into_shared_memory_and_use_tensor_cores(compiled):
    """163 and 227 KB. HMMA or HGMMA in attention, HGMMA on sm_90 if tiles have a warp group's 64 rows."""
    assert {r["kernel"] for r in compiled} == {"forward_kernel", "dq_kernel", "dkdv_kernel", "step_kernel",
                                               "log_prob_kernel", "velocity_gradient_kernel"}
    for r in compiled:
        assert not r["stack"] and not r["local"], r
        assert r["shared"] <= {80: 163, 90: 227}[r["sm"]] * 1024, r
        if "BLOCK_Q" in r:
            own = r["BLOCK_K"] if r["kernel"] == "dkdv_kernel" else r["BLOCK_Q"]
            assert r["matrix"] > 0 and (r["warp_group"] > 0) == (r["sm"] == 90 and own >= 64), r
            assert r["wide_loads"] > 0, r


def test_compiled_draws_and_rescorings_add_and_round_alike(compiled):
    """Equal bits need the same layout of elements over threads, whatever the mode and the velocity's type,
    and, as the interpreter does not round a fused multiply-add once, the same instructions: one FFMA an
    element in every mode, the mean, and in a draw one multiplication and one addition more than in its
    rescoring."""
    layouts, steps = {}, {}
    for r in compiled:
        if r["kernel"] == "step_kernel":
            steps.setdefault((r["sm"], r["case"], r["BLOCK"]), {})[r["DRAWS"]] = r["arithmetic"]
            layouts.setdefault((r["sm"], r["BLOCK"]), set()).add((*r["summed"], r["num_warps"]))
    assert len(layouts) >= 2
    assert all(len(found) == 1 and len(next(iter(found))) == 2 for found in layouts.values())
    for (_, _, block), modes in steps.items():
        each = block // 256                                          # elements of each of the 8 x 32 threads
        assert {a["FFMA"] for a in modes.values()} == {each}, modes
        assert all(modes[True][op] == modes[False][op] + each for op in ("FMUL", "FADD")), modes


# ---------------------------------------------------------------- the benchmark

def test_attention_flops_are_those_of_the_dense_products_on_the_allowed_pairs():
    """One chunk, by hand: the portrait's 3 tokens see 3 keys, the sound's 2 see 5, 3 noisy 8: 43 pairs."""
    assert bench.attention_flops(2, 3, 32, Layout(1, 3, 2), backward=False) == 2 * 3 * 4 * 32 * 43
    assert bench.attention_flops(2, 3, 32, Layout(1, 3, 2), backward=True) == 2 * 3 * 10 * 32 * 43
