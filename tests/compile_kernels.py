"""Compile the kernels for a GPU that is not here, and print as JSON what the compiler made of them.

Run in a process of its own, without TRITON_INTERPRET: `python tests/compile_kernels.py 90`. Every kernel
is replaced by a recorder, so that what is compiled is what the wrappers would launch: same types, alignments,
tiles and warps.
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

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", int: "i32", float: "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHAPES = {"tiny": (32, Layout(4, 10, 4)), "small": (64, Layout(4, 50, 4)),
          "stated": (64, Layout(8, 128, 128, 2)), "wide heads": (128, Layout(8, 128, 128))}


class Recorder:
    """Stands in a kernel's place: `recorder[grid](...)` compiles, launching nothing."""

    case = ""                                        # that all of them are in

    def __init__(self, kernel, architecture, results):
        self.kernel, self.architecture, self.results = kernel, architecture, results

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps=4, num_stages=3, enable_fp_fusion=True, **kwargs):
        given = {**dict(zip((p.name for p in self.kernel.params), args)), **kwargs}
        signature, constexprs, attributes = {}, {}, {}
        for i, p in enumerate(self.kernel.params):
            value = given[p.name]
            if p.is_constexpr:
                signature[p.name], constexprs[p.name] = "constexpr", value
                continue
            parts = value if isinstance(value, tuple) else (value,)
            types = tuple("*" + TYPES[x.dtype] if torch.is_tensor(x) else TYPES[type(x)] for x in parts)
            signature[p.name] = types if isinstance(value, tuple) else types[0]
            for j, x in enumerate(parts):
                if torch.is_tensor(x) or (isinstance(x, int) and x % 16 == 0):
                    attributes[(i, j) if isinstance(value, tuple) else (i,)] = [["tt.divisibility", 16]]
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        source = ASTSource(self.kernel, signature, constexprs=constexprs, attrs=attributes)
        made = triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)
        self.results.append({"kernel": self.kernel.__name__, "case": self.case, "sm": self.architecture,
                             "num_warps": num_warps, **inspect(made), **constexprs})


def inspect(made) -> dict:
    """Stack (spills) and shared memory of a cubin, its matrix instructions, its widest loads, how sums are
    dealt out to threads: the same layout is the same order of additions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        use, sass = (subprocess.check_output([CUOBJDUMP, what, file.name], text=True)
                     for what in ("-res-usage", "-sass"))

    def count(instruction):
        return len(re.findall(instruction, sass))
    layouts = dict(re.findall(r"(#\w+) = (.*)", made.asm["ttgir"]))
    reduced = re.findall(r"tt\.reduce.*?\}\) : \(tensor<[^,>]*, (#\w+)", made.asm["ttgir"], re.S)
    return {"stack": int(re.search(r"STACK:(\d+)", use)[1]), "shared": made.metadata.shared,
            "matrix": count(r"\b(?:HMMA|HGMMA)\b"), "warp_group": count(r"\bHGMMA\b"),
            "local": count(r"\b(?:STL|LDL)\b"), "wide_loads": count(r"\bLD(?:G|GSTS)\.E\S*\.128"),
            "arithmetic": {op: count(rf"\b{op}\b") for op in ("FFMA", "FMUL", "FADD")},
            "summed": [layouts[name] for name in reduced]}


def main(architecture: int) -> list[dict]:
    results = []
    for module in (attention, flow_step):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                setattr(module, name, Recorder(kernel, architecture, results))
    for n, dtype in ((1280, torch.float32), (1280, torch.bfloat16), (327_680, torch.bfloat16)):
        Recorder.case = f"flow step, {n}, {TYPES[dtype]}"
        x, log_prob = torch.zeros(2, 1, n), torch.zeros(2)
        for draws in True, False:
            flow_step.fused_step(x, x.to(dtype), x, draws, 0.9, 0.1, 0.5)
        flow_step.fused_step_backward(x, x.to(dtype), x, log_prob, 0.9, 0.1, 0.5)
    for dtype in (torch.bfloat16, torch.float32):
        for name, (d, layout) in SHAPES.items():
            if dtype == torch.float32 and name in ("tiny", "stated"):                  # as small
                continue
            Recorder.case = f"{name}, {TYPES[dtype]}"
            q = torch.zeros(1, 2, layout.length, d, dtype=dtype)
            out, lse = attention.fused_attention(q, q, q, layout.bounds)
            attention.fused_backward(q, q, q, out, lse, out, layout.bounds)
    return results


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
