"""Muon, as torch.optim has it, but in a precision that the machine is fast in."""

import math

import torch
from torch import Tensor

A, B, C = 3.4445, -4.775, 2.0315        # the quintic's coefficients, by Jordan et al.
STEPS = 5
MOMENTUM = 0.95


def fast_dtype(device: torch.device) -> torch.dtype:
    """fp32 on a CPU without AVX-512: emulated there, bf16 takes twenty times as long."""
    slow = device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return torch.float32 if slow else torch.bfloat16


def orthogonalized(matrix: Tensor) -> Tensor:
    """Push the singular values of a matrix (rows, columns) towards 1, by Newton and Schulz's iteration. All
    but tiny ones end between about .7 and 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(fast_dtype(matrix.device), copy=True)
    x /= x.norm().clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonalized (Jordan et al., 2024, kellerjordan.github.io/posts/muon). It is
    for matrices; other parameters need another optimizer."""

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in (m for m in group["params"] if m.grad is not None):
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonalized(matrix.grad.lerp(momentum, MOMENTUM))              # Nesterov's
                rate = group["lr"] * math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)
