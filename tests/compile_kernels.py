"""Compile the kernels for GPUs that are not here, and print as JSON what the compiler made of them.

Run in a process of its own, without TRITON_INTERPRET: `python tests/compile_kernels.py 80 90`. Every kernel is replaced
by a recorder, so that what is compiled is what the wrappers would launch: same types, alignments, tiles and warps.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernels import attention, flow_step                           # noqa: E402
from kernels.attention import Layout                               # noqa: E402

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Recorder:
    """Stands in a kernel's place: `recorder[grid](...)` compiles it for each architecture instead of launching it."""

    def __init__(self, kernel, name, architectures, results):
        self.kernel, self.name, self.architectures, self.results = kernel, name, architectures, results

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps=4, num_stages=3, enable_fp_fusion=True, **kwargs):
        names = [p.name for p in self.kernel.params]
        given = {**dict(zip(names, args)), **kwargs}
        signature, constexprs, attributes = {}, {}, {}
        for i, p in enumerate(self.kernel.params):
            value = given[p.name]
            if p.is_constexpr:
                signature[p.name], constexprs[p.name] = "constexpr", value
                continue
            parts = value if isinstance(value, tuple) else (value,)
            types = ["*" + TYPES[x.dtype] if torch.is_tensor(x) else {int: "i32", float: "fp32"}[type(x)]
                     for x in parts]
            signature[p.name] = tuple(types) if isinstance(value, tuple) else types[0]
            for j, x in enumerate(parts):
                if torch.is_tensor(x) or (isinstance(x, int) and x % 16 == 0):
                    attributes[(i, j) if isinstance(value, tuple) else (i,)] = [["tt.divisibility", 16]]
        for architecture in self.architectures:
            source = ASTSource(self.kernel, signature, constexprs=constexprs, attrs=attributes)
            made = triton.compile(source, target=GPUTarget("cuda", architecture, 32),
                                  options={"num_warps": num_warps, "num_stages": num_stages,
                                           "enable_fp_fusion": enable_fp_fusion})
            self.results.append({"kernel": self.kernel.__name__, "case": self.name, "sm": architecture, **inspect(made),
                                 "num_warps": num_warps, **constexprs})


def inspect(made) -> dict:
    """Registers, stack (spills) and shared memory of a cubin, its matrix instructions, its widest loads."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        use = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", use)[1]), "stack": int(re.search(r"STACK:(\d+)", use)[1]),
            "shared": made.metadata.shared, "matrix": len(re.findall(r"\b(?:HMMA|HGMMA)\b", sass)),
            "warp_group": len(re.findall(r"\bHGMMA\b", sass)), "local": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
            "arithmetic": {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("FFMA", "FMUL", "FADD")},
            "wide_loads": len(re.findall(r"\bLD(?:G|GSTS)\.E\S*\.128", sass)),
            "summed": reduced_layouts(made.asm["ttgir"])}


def reduced_layouts(ttgir: str) -> list[str]:
    """How the operands of reductions are dealt out to threads: the same layout is the same order of additions."""
    layouts = dict(re.findall(r"(#\w+) = (.*)", ttgir))
    names = re.findall(r"tt\.reduce.*?\}\) : \(tensor<[^,>]*, (#\w+)", ttgir, re.S)
    return [layouts[name] for name in names]


def main(architectures: list[int], wanted: str = "") -> list[dict]:
    results = []

    def record(module, name):
        for attribute, kernel in list(vars(module).items()):
            kernel = kernel.kernel if isinstance(kernel, Recorder) else kernel
            if attribute.endswith("_kernel"):
                setattr(module, attribute, Recorder(kernel, name, architectures, results))

    if wanted in "flow step":
        for n, dtype in ((1280, torch.float32), (1280, torch.bfloat16), (327_680, torch.bfloat16)):
            record(flow_step, f"flow step, {n}, {TYPES[dtype]}")
            x, seed, log_prob = torch.zeros(2, 1, n), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
            velocity = x.to(dtype)
            for mode, given in (("ode", None), ("noise", x), ("seed", seed), ("rescore", x)):
                flow_step.fused_step(x, velocity, given, mode, 0.9, 0.1, 0.5, with_mean=mode != "ode")
            flow_step.fused_step_backward(x, velocity, x, log_prob, x, 0.9, 0.1, 0.5)
    shapes = {"tiny": (32, Layout(4, 10, 4)), "small": (64, Layout(4, 50, 4)), "stated": (64, Layout(8, 128, 128, 2)),
              "wide heads": (128, Layout(8, 128, 128)), "wide heads, odd": (128, Layout(4, 50, 4)),
              "decode": (64, None)}
    for dtype in (torch.bfloat16, torch.float32):
        for name, (d, layout) in shapes.items():
            name = f"{name}, {TYPES[dtype]}"
            if wanted not in name or name in ("tiny, fp32", "stated, fp32"):           # as small, fp32
                continue
            record(attention, name)
            length = 50 if layout is None else layout.length
            q = torch.zeros(1, 2, length, d, dtype=dtype)
            k = q if layout else torch.zeros(1, 2, 432, d, dtype=dtype)
            bounds = layout.bounds if layout else []
            out, lse = attention.fused_attention(q, k, k, bounds)
            if layout:
                attention.fused_backward(q, k, k, out, lse, out, bounds)
    return results


if __name__ == "__main__":
    print(json.dumps(main([int(a) for a in sys.argv[1].split(",")], *sys.argv[2:])))
