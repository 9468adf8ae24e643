"""The two hot operations of the generator, one file each: in plain PyTorch, and fused for a GPU in Triton.

The PyTorch version stands above the kernel and is its specification. Each function takes `impl`: "torch";
"triton", which raises where the kernel cannot run; or "auto", the kernel on a GPU wherever it can run.
"""

from types import SimpleNamespace

from torch import Tensor

try:                                    # comes with PyTorch on Linux; elsewhere "auto" is "torch"
    import triton
    from triton import language as tl
    jit, INTERPRETED = triton.jit, triton.knobs.runtime.interpret    # TRITON_INTERPRET=1: on a CPU, slowly
except ImportError:
    triton = None
    tl, jit, INTERPRETED = SimpleNamespace(constexpr=None), lambda kernel: kernel, False


def use_triton(impl: str, x: Tensor, problem: str | None) -> bool:
    """Decide for the kernel or for plain PyTorch. Args: problem: why the kernel cannot take these inputs.

    Raises: ValueError where impl is "triton" and the kernel cannot run, with the reason.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be auto, torch or triton, got {impl!r}")
    if triton is None:
        problem = "triton is not installed"
    elif not x.is_cuda and not INTERPRETED:
        problem = f"it needs a CUDA device; the inputs are on {x.device} (TRITON_INTERPRET=1 takes a CPU)"
    if impl == "triton" and problem:
        raise ValueError(f"impl='triton' cannot run: {problem}; impl='auto' would use PyTorch")
    return impl == "triton" or (impl == "auto" and x.is_cuda and not problem)
