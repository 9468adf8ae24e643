"""Measure the kernels on this GPU: against PyTorch, against the hardware, and in training and sampling.

    python kernels/bench.py                       # prints the tables, writes runs/bench.json
    python kernels/bench.py --only attention      # or flow, or whole

Every kernel is first held against its PyTorch twin, then timed beside what PyTorch offers: for the flow step
eager operations and torch.compile, for attention scaled_dot_product_attention with the dense mask (sdpa) and
FlexAttention, compiled (flex; its mask is made before).

A rate counts what the task needs, whoever does more: FLOPs of the allowed pairs (4 D forward, 10 D backward),
bytes of the tensors that go in and come out. The ceiling is what this GPU can do: a bf16 matmul, or a copy.
Times are medians of triton.testing.do_bench, of random data, in ms.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grpo                                                                         # noqa: E402
import model                                                                        # noqa: E402
from kernels import triton                                                          # noqa: E402
from kernels.attention import Layout, attention, chunk_causal_mask, coordinates, may_see      # noqa: E402
from kernels.flow_step import step_coefficients, stochastic_step                    # noqa: E402

DEVICE = "cuda"
FLOW_SHAPES = {"full": (64, 327_680), "small": (8, 6400)}     # rows, N C; one chunk of 8 videos
ATTENTION_SHAPES = {                                          # B, H, H_kv, D and the sequence
    "stated": (8, 12, 12, 64, Layout(8, 128, 128, segments=2)),
    "small": (16, 8, 4, 64, Layout(12, 50, 4, window=8))}


# ---------------------------------------------------------------- measuring

def attention_flops(batch: int, heads: int, head_dim: int, layout: Layout, backward: bool) -> int:
    """Two products of 2 D FLOPs an allowed pair forward; five backward, the scores anew among them."""
    pairs = chunk_causal_mask(layout, torch.device("cpu")).sum().item()
    return (10 if backward else 4) * head_dim * batch * heads * pairs


def milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call."""
    return triton.testing.do_bench(run, warmup=50, rep=300, return_mode="median")


def ceilings() -> dict[str, float]:
    """Measure what this GPU can do per second: bytes copied (read and written), FLOPs of a bf16 product."""
    x = torch.randn(2 ** 28, device=DEVICE)
    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    return {"copy": 2 * x.nbytes / milliseconds(x.clone) * 1e3,
            "matmul": 2 * 8192 ** 3 / milliseconds(lambda: a @ b) * 1e3}


def rows(task: str, work: float, ceiling: float, runs: dict[str, Callable]) -> list[dict]:
    """Time every provider of a task. `work`: its FLOPs or bytes; `ceiling`: as much per second."""
    times = {provider: milliseconds(run) for provider, run in runs.items()}
    return [{"task": task, "provider": provider, "ms": ms, "rate": work / ms * 1e3,
             "of the ceiling": work / ms * 1e3 / ceiling, "time / kernel's": ms / times["triton"]}
            for provider, ms in times.items()]


def table(results: list[dict]) -> str:
    """Write rows as a Markdown table."""
    lines = [list(results[0]), ["---"] * len(results[0])]
    for row in results:
        lines.append([f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def agree(task: str, one: Tensor, other: Tensor, tolerance: float) -> None:
    """Raise where a kernel is further from its twin than a share of the largest value."""
    gap = ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()
    if not gap <= tolerance:
        raise RuntimeError(f"{task}: the kernel is {gap:.1e} off, more than {tolerance:.0e}")


# ---------------------------------------------------------------- the kernels

def bench_flow(name: str, shape: tuple[int, int], ceiling: float) -> list[dict]:
    """A CPS draw with its log-probability."""
    (count, n), results = shape, []
    x, velocity, noise = torch.randn(3, count, 1, n, device=DEVICE)
    coefficients = step_coefficients("cps", 0.75, 0.5, 0.8)

    def draw(x, v, impl):
        return stochastic_step(x, v, coefficients, noise=noise, impl=impl)
    for dtype in (torch.float32, torch.bfloat16):
        v = velocity.to(dtype)
        runs = {"eager": partial(draw, x, v, "torch"), "triton": partial(draw, x, v, "triton"),
                "compile": partial(torch.compile(draw), x, v, "torch")}
        for part, kernel, twin in zip(("x'", "log-probability"), runs["triton"](), runs["eager"]()):
            agree(f"flow {name}, {part}", kernel, twin, 1e-4)
        moved = x.numel() * (4 + v.itemsize + 8)              # x, velocity, noise in; x' out
        results += rows(f"flow {name}, {str(dtype)[6:]}", moved, ceiling, runs)
    return results


def attention_runs(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> dict[str, Callable]:
    """Return provider -> function of nothing."""
    index, segment = coordinates(layout, q.device)

    def rule(b, h, i, j):
        return may_see(index[i], segment[i], index[j], segment[j], layout.window)
    blocks = create_block_mask(rule, None, None, layout.length, layout.length, device=q.device)
    torch._functorch.config.donated_buffer = False            # a backward pass that is timed runs again
    gqa = q.shape[1] > k.shape[1]
    return {"sdpa": partial(attention, q, k, v, layout, impl="torch"),
            "flex": partial(torch.compile(flex_attention), q, k, v, block_mask=blocks, enable_gqa=gqa),
            "triton": partial(attention, q, k, v, layout, impl="triton")}


def bench_attention(name: str, shape: tuple, ceiling: float) -> list[dict]:
    """Forward, then backward to q, k and v."""
    b, h, h_kv, d, layout = shape
    q, k, v, dout = (torch.randn(b, heads, layout.length, d, device=DEVICE, dtype=torch.bfloat16)
                     for heads in (h, h_kv, h_kv, h))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    runs = attention_runs(*inputs, layout)
    outs = {provider: run() for provider, run in runs.items()}
    back = {provider: partial(torch.autograd.grad, out, inputs, dout, retain_graph=True)
            for provider, out in outs.items()}
    exact = [x[:1].detach().double().requires_grad_() for x in inputs]        # one of the batch, for memory
    want = attention(*exact, layout, impl="torch")
    agree(f"attention {name}", outs["triton"][:1], want, 3e-2)
    for one, other in zip(back["triton"](), torch.autograd.grad(want, exact, dout[:1].double())):
        agree(f"attention {name}, gradient", one[:1], other, 3e-2)
    work = [attention_flops(b, h, d, layout, backward) for backward in (False, True)]
    with torch.no_grad():
        forward = rows(f"attention {name} forward", work[0], ceiling, runs)
    return forward + rows(f"attention {name} backward", work[1], ceiling, back)


# ---------------------------------------------------------------- the whole

@contextmanager
def using(impl: str):
    """Let the generator and GRPO call the kernels, or their twins, whatever "auto" would choose."""
    with (patch.object(model, "attention", partial(attention, impl=impl)),
          patch.object(grpo, "stochastic_step", partial(stochastic_step, impl=impl))):
        yield


def bench_whole(flags: str, impl: str) -> dict:
    """Time a training step, a video, eight videos, and an update of GRPO by train.py with these flags."""
    import train
    from extras.flags import parse_arguments
    from extras.reward_flags import make_judge, make_reward
    from extras.talkers import synthetic_clips
    args = parse_arguments([*flags.split(), "--device", DEVICE, "--updates", "1"])
    clips, c = synthetic_clips(max(8, args.prompts), args.config.size, args.seconds, 0), args.config
    run = train.FlowMatching("pretraining", None, args, args.steps)
    train.fit_codec(run.model, clips, args)
    run.data = data = train.encode(run.model, clips, args.frames, DEVICE)

    def sample(batch):
        portrait, mel = data.portrait[:batch].to(DEVICE) / 255, data.mel[:batch].to(DEVICE)
        noise = torch.randn(batch, c.video_tokens, c.channels, device=DEVICE)
        return list(run.model.generate(portrait, mel, lambda: noise))
    with using(impl):
        made = {"task": flags, "impl": impl, "ms per step": milliseconds(run.advance),
                "ms per video": milliseconds(lambda: sample(1)),
                "ms per 8 videos": milliseconds(lambda: sample(8))}
        reward = make_reward(args, make_judge(args), clips, c.chunk_frames)
        post = train.PostTraining("post-training", run.model.eval(), reward, data, clips, args)
        post.checked = True                                   # a run's first batch alone is checked
        return made | {"ms per update": milliseconds(post.advance)}


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--only", choices=("flow", "attention", "whole"), help="one part (all)")
    p.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="(%(default)s)")
    args = p.parse_args(argv)
    if not torch.cuda.is_available() or triton is None:
        sys.exit("error: the benchmark needs a CUDA GPU and triton; on a CPU, python -m pytest "
                 "tests/test_kernels.py shows that the kernels are right")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **ceilings()}
    print(f"{made['gpu']}: {made['copy'] / 1e9:.0f} GB/s, {made['matmul'] / 1e12:.0f} TFLOP/s")
    for part in ("flow", "attention", "whole") if args.only is None else (args.only,):
        if part == "flow":
            results = [row for item in FLOW_SHAPES.items() for row in bench_flow(*item, made["copy"])]
        elif part == "attention":
            results = [row for item in ATTENTION_SHAPES.items()
                       for row in bench_attention(*item, made["matmul"])]
        else:
            results = [bench_whole(f"--preset {preset}", impl)
                       for preset in ("tiny", "small") for impl in ("torch", "triton")]
        print(table(results), flush=True)
        made[part] = results
        args.out.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
