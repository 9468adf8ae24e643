"""Without a GPU, Triton's kernels are interpreted on the CPU. It must be asked for before anything imports triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
