"""Where the tests run: on the CPU, but for those of the kernels."""

import os

import pytest
import torch

if not torch.cuda.is_available():              # Triton's kernels are interpreted; ask before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu(request):
    """Hide a GPU from all but the tests of the kernels, and from the processes that they start: what they show is the
    same everywhere, and two runs are alike to the bit on a CPU alone."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_kernels":
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield
