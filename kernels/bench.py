"""Measure the kernels on this GPU: against PyTorch, against the hardware, and in the whole of training and sampling.

    python kernels/bench.py                       # prints the tables, writes runs/bench.json
    python kernels/bench.py --only attention      # or flow, or whole

Every kernel is first held against its PyTorch twin, then timed beside
    eager      PyTorch, operation by operation            sdpa    scaled_dot_product_attention with the dense mask
    compile    torch.compile of the same                  flex    FlexAttention, compiled; its block mask is made apart
A rate counts what the task needs, whoever does more: FLOPs of the allowed pairs (4 D forward, 10 D backward), bytes of
the tensors that go in and come out. The ceiling is what this GPU was measured to do: bf16 matmul, or copy.
Times are the median [20th, 80th percentile] of triton.testing.do_bench, of random data, in ms.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo                                                                         # noqa: E402
import model                                                                        # noqa: E402
from data import replacing                                                          # noqa: E402
from kernels import triton                                                          # noqa: E402
from kernels.attention import Layout, attention, chunk_causal_mask, coordinates, may_see      # noqa: E402
from kernels.flow_step import flow_step, step_coefficients, stochastic_step         # noqa: E402

FLOW_SHAPES = {"full": (64, 327_680), "small": (8, 6400), "tiny": (8, 1280)}       # rows, N C; one chunk of 8 videos
ATTENTION_SHAPES = {                                          # B, H, H_kv, D and the sequence
    "stated": (8, 12, 12, 64, Layout(8, 128, 128, segments=2)),
    "small": (16, 8, 4, 64, Layout(12, 50, 4, window=8)),
    "tiny": (32, 3, 3, 32, Layout(12, 10, 4, window=8))}
LARGE = ("--size 128 --grid 7 --width 1536 --layers 24 --heads 24 --kv-heads 8 --head-dim 64 --mlp-width 4096 "
         "--batch 8 --micro-batch 2")                         # 0.97 billion parameters; 4 GB kept per clip


# ---------------------------------------------------------------- measuring

def attention_flops(batch: int, heads: int, head_dim: int, layout: Layout, backward: bool) -> int:
    """Two products of 2 D FLOPs an allowed pair forward; five backward, the scores anew among them."""
    pairs = chunk_causal_mask(layout, torch.device("cpu")).sum().item()
    return (10 if backward else 4) * head_dim * batch * heads * pairs


def training_flops(run, data, args: argparse.Namespace, layout: Layout) -> int:
    """FLOPs of a pretraining step of train.py: every product forward, as PyTorch counts them, and of attention the
    allowed pairs; twice that backward; nothing counted for recomputing."""
    import train
    with patch.object(model, "attention", lambda q, *_: q), FlopCounterMode(display=False) as counter, torch.no_grad():
        train.flow_matching_loss(run.model, train.draw_batch(data, args, 0))
    c = args.config
    scores = c.layers * attention_flops(args.batch, c.heads, c.head_dim, layout, backward=False)
    return 3 * (counter.get_total_flops() + scores)


def measure(run: Callable[[], object], device: str) -> list[float]:
    """Return the median, the 20th and the 80th percentile of a call's time in ms."""
    if device == "cpu":                                       # only so that the suite can try every line of this file
        start = time.perf_counter()
        run()
        return [(time.perf_counter() - start) * 1e3] * 3
    return triton.testing.do_bench(run, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8], return_mode="median")


def ceilings() -> dict[str, float]:
    """Measure what this GPU can do: bytes copied per second (read and written), FLOPs per second of a bf16 product."""
    x = torch.randn(2 ** 28, device="cuda")
    copy = measure(x.clone, "cuda")[0]
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = measure(lambda: a @ b, "cuda")[0]
    return {"copy": 2 * x.nbytes / copy * 1e3, "matmul": 2 * 8192 ** 3 / product * 1e3}


def rows(task: str, work: float, ceiling: float, runs: dict[str, Callable], device: str) -> list[dict]:
    """Time every provider of a task. `work`: its FLOPs or bytes; `ceiling`: as much per second, from `ceilings`."""
    times = {provider: measure(run, device) for provider, run in runs.items()}
    return [{"task": task, "provider": provider, "p50": p50, "p20": p20, "p80": p80, "rate": work / p50 * 1e3,
             "ceiling": work / p50 * 1e3 / ceiling, "of_kernel": p50 / times["triton"][0]}
            for provider, (p50, p20, p80) in times.items()]


def table(results: list[dict]) -> str:
    """Write rows as a Markdown table. A rate is in GB/s or TFLOP/s."""
    lines = ["| task | provider | ms: p50 [p20, p80] | rate | of the ceiling | time / kernel's |",
             "|---|---|---|---|---|---|"]
    for r in results:
        rate = f"{r['rate'] / 1e9:.0f} GB/s" if r["task"].startswith("flow") else f"{r['rate'] / 1e12:.1f} TFLOP/s"
        lines.append(f"| {r['task']} | {r['provider']} | {r['p50']:.4f} [{r['p20']:.4f}, {r['p80']:.4f}] | {rate} "
                     f"| {r['ceiling']:.0%} | {r['of_kernel']:.2f} |")
    return "\n".join(lines)


def agree(task: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    """Raise where a kernel is further from its twin than a share of the largest value."""
    gap = ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()
    if not gap <= tolerance:
        raise RuntimeError(f"{task}: the kernel is {gap:.1e} off, more than {tolerance:.0e}; its speed means nothing")


# ---------------------------------------------------------------- the kernels

def bench_flow(name: str, shape: tuple[int, int], ceiling: float, device: str = "cuda",
               compiled: bool = True) -> list[dict]:
    """A CPS draw with its log-probability; PyTorch's noise is torch.randn's, the kernel's its own."""
    (count, n), results = shape, []
    x, velocity, seed = *torch.randn(2, count, 1, n, device=device), torch.tensor([1, 0], device=device)
    coefficients = step_coefficients("cps", 0.75, 0.5, 0.8)

    def eager(x, v):
        return stochastic_step(x, v, coefficients, noise=torch.randn_like(x), with_mean=False, impl="torch")
    for dtype in (torch.float32, torch.bfloat16):
        v = velocity.to(dtype)
        kernel = partial(stochastic_step, x, v, coefficients, seed=seed, with_mean=False, impl="triton")
        twin = stochastic_step(x, v, coefficients, seed=seed, impl="torch")
        agree(f"flow {name}", kernel()[0], twin[0], 1e-4)
        agree(f"flow {name}, log-probability", kernel()[1], twin[1], 1e-4)
        runs = {"eager": partial(eager, x, v)}
        if compiled:
            runs["compile"] = partial(torch.compile(eager), x, v)
        moved = x.numel() * (4 + v.itemsize + 4)              # x and velocity in, x' out; noise is made on the spot
        results += rows(f"flow {name}, {str(dtype)[6:]}", moved, ceiling, runs | {"triton": kernel}, device)
    return results


def attention_runs(q: Tensor, k: Tensor, v: Tensor, layout: Layout, compiled: bool) -> tuple[dict, float]:
    """Return provider -> function of nothing, the kernel last; and the seconds that FlexAttention's mask took."""
    mask, groups, seconds = chunk_causal_mask(layout, q.device), q.shape[1] // k.shape[1], 0.0

    def eager(q, k, v):
        score = q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5
        return score.masked_fill(~mask, -math.inf).softmax(-1) @ v.repeat_interleave(groups, 1)
    runs = {"eager": partial(eager, q, k, v)}
    if compiled:
        index, segment = coordinates(layout, q.device)
        start = time.perf_counter()
        rule = lambda b, h, i, j: may_see(index[i], segment[i], index[j], segment[j], layout.window)
        blocks = create_block_mask(rule, None, None, layout.length, layout.length, device=q.device)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        torch._functorch.config.donated_buffer = False       # a backward pass that is timed runs more than once
        runs |= {"compile": partial(torch.compile(eager), q, k, v),
                 "flex": partial(torch.compile(flex_attention), q, k, v, block_mask=blocks, enable_gqa=groups > 1)}
    return runs | {"sdpa": partial(attention, q, k, v, layout, impl="torch"),
                   "triton": partial(attention, q, k, v, layout, impl="triton")}, seconds


def bench_attention(name: str, shape: tuple, ceiling: float, device: str = "cuda", dtype: torch.dtype = torch.bfloat16,
                    compiled: bool = True) -> list[dict]:
    """Forward, then backward to q, k and v."""
    b, h, h_kv, d, layout = shape
    shapes = [(b, heads, layout.length, d) for heads in (h, h_kv, h_kv, h)]
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    runs, seconds = attention_runs(*inputs, layout, compiled)
    outs = {provider: run() for provider, run in runs.items()}
    back = {provider: partial(torch.autograd.grad, out, inputs, dout, retain_graph=True)
            for provider, out in outs.items()}
    exact = [x[:1].detach().double().requires_grad_() for x in inputs]                # one of the batch, for memory
    want = attention(*exact, layout, impl="torch")
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    agree(f"attention {name}", outs["triton"][:1], want, tolerance)
    for one, other in zip(back["triton"](), torch.autograd.grad(want, exact, dout[:1].double())):
        agree(f"attention {name}, gradient", one[:1], other, tolerance)
    with torch.no_grad():
        results = rows(f"attention {name} forward", attention_flops(b, h, d, layout, False), ceiling, runs, device)
    results += rows(f"attention {name} backward", attention_flops(b, h, d, layout, True), ceiling, back, device)
    return [r | {"mask_seconds": seconds} if r["provider"] == "flex" else r for r in results]


# ---------------------------------------------------------------- the whole

@contextmanager
def using(impl: str):
    """Let the generator and GRPO call the kernels, or their twins, whatever "auto" would choose."""
    with (patch.object(model, "attention", partial(attention, impl=impl)),
          patch.object(model, "flow_step", partial(flow_step, impl=impl)),
          patch.object(grpo, "flow_step", partial(flow_step, impl=impl)),
          patch.object(grpo, "stochastic_step", partial(stochastic_step, impl=impl))):
        yield


def seconds_each(run: Callable[[], object], times: int, device: str) -> float:
    """Return the seconds of one of several calls in a row, after three to warm up."""
    for repeat in (min(times, 3), times):
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        torch.get_device_module(device).synchronize()
    return (time.perf_counter() - start) / times


def peak_memory(device: str) -> float:
    """Return the most memory in GB that tensors have taken on a GPU so far."""
    return torch.cuda.max_memory_allocated() / 1e9 if device != "cpu" else 0.0


def bench_whole(flags: str, impl: str, ceiling: float, device: str = "cuda", times: int = 20) -> dict:
    """Time a pretraining step, sampling, and a GRPO update of train.py, given its flags.

    Returns: tokens_per_second, mfu and peak memory in GB of pretraining, frames_per_second of sampling one video and
        eight, and seconds of an update for rollout, reward and update, under "grpo", and the peak memory of all.
    """
    import train
    args = train.parse_arguments([*flags.split(), "--device", device, "--updates", "1"])
    clips, c = train.synthetic_clips(max(8, args.prompts), args.config.size, args.seconds, 0), args.config
    torch.manual_seed(0)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    run = train.FlowMatching("pretraining", None, args, args.steps)
    train.fit_codec(run.model, clips, args)
    run.data = data = train.encode(run.model, clips, args.frames, device)
    layout = Layout(args.frames // c.chunk_frames, c.video_tokens, c.chunk_frames, 1, c.window)
    flops = training_flops(run, data, args, layout)

    with using(impl):
        step = seconds_each(run.advance, times, device)
        made = {"flags": flags, "impl": impl, "tokens_per_second": args.batch * layout.length / step,
                "mfu": flops / step / ceiling, "step_seconds": step, "memory": peak_memory(device)}
        for batch in (1, 8):
            portrait, mel = data.portrait[:batch].to(device) / 255, data.mel[:batch].to(device)
            noise = torch.randn(batch, c.video_tokens, c.channels, device=device)
            sample = lambda: list(run.model.generate(portrait, mel, lambda chunk: noise))
            made[f"frames_per_second_{batch}"] = batch * args.frames / seconds_each(sample, max(times // 5, 1), device)
        reward = train.make_reward(args, train.make_judge(args), clips, clips, c.chunk_frames)
        post = train.PostTraining("post-training", run.model.eval(), reward, data, clips, args)
        rollout, synchronize = grpo.roll_out, torch.get_device_module(device).synchronize
        with patch.object(grpo, "roll_out", lambda *a: (rollout(*a), synchronize())[0]):
            post.checked = True                               # a check of every run's first batch, not of every update
            entries = [post.advance() for _ in range(max(times // 5, 1) + 1)]
        made |= {"grpo": entries[-1]["seconds_for"], "memory_in_all": peak_memory(device)}
    return made


def whole_table(results: list[dict]) -> str:
    lines = ["| size | impl | step, s | tokens/s | MFU | GB | frames/s, 1 video | 8 "
             "| GRPO update, s: rollout + reward + update | GB |", "|---|---|---|---|---|---|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r['size']} | {r['impl']} | {r['step_seconds']:.3f} | {r['tokens_per_second']:.0f} "
                     f"| {r['mfu']:.1%} | {r['memory']:.1f} | {r['frames_per_second_1']:.0f} "
                     f"| {r['frames_per_second_8']:.0f} | {' + '.join(f'{s:.2f}' for s in r['grpo'].values())} "
                     f"| {r['memory_in_all']:.1f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", choices=("flow", "attention", "whole"), help="one part (all)")
    p.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="(%(default)s)")
    args = p.parse_args(argv)
    if not torch.cuda.is_available() or triton is None:
        sys.exit("error: the benchmark needs a CUDA GPU and triton; on a CPU, python -m pytest tests/test_triton.py "
                 "shows that the kernels are right")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ceilings": ceilings(), "kernels": [],
            "whole": []}
    copy, product = made["ceilings"].values()
    print(f"{made['gpu']}: copies {copy / 1e9:.0f} GB/s, multiplies bf16 at {product / 1e12:.0f} TFLOP/s")

    def show(part: str, results: list[dict], write: Callable[[list[dict]], str]) -> None:
        """Print the rows as soon as they are measured, under a head if they are the first, and keep them all."""
        lines = write(results).splitlines()
        print("\n".join(lines[2:] if made[part] else lines), flush=True)
        made[part] += results
        with replacing(args.out) as path:
            path.write_text(json.dumps(made, indent=1))
    wanted = lambda part: args.only in (None, part)
    for name, shape in FLOW_SHAPES.items() if wanted("flow") else ():
        show("kernels", bench_flow(name, shape, copy), table)
    for name, shape in ATTENTION_SHAPES.items() if wanted("attention") else ():
        show("kernels", bench_attention(name, shape, product), table)
    sizes = {"tiny": "--preset tiny", "small": "--preset small", "large": f"--preset small {LARGE}"}
    for (size, flags), impl in itertools.product(sizes.items() if wanted("whole") else (), ("torch", "triton")):
        show("whole", [{"size": size} | bench_whole(flags, impl, product)], whole_table)
    print(args.out)


if __name__ == "__main__":
    main()
