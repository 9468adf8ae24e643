"""Where the tests run: on the CPU, but for those of the kernels."""

import os
from pathlib import Path

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


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache of clips for the tests of train.py."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(cache, tmp_path_factory) -> Path:
    """The folder of a finished run of all stages and controls, judged by known ratings: not to be changed."""
    import train
    from tiny import WHOLE, Taste
    folder = tmp_path_factory.mktemp("runs") / "it's finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWPORTRAIT_CACHE", str(cache))
        patch.setattr(train, "make_judge", lambda args: Taste())
        train.main([*WHOLE, "--control", "--out", str(folder)])
    return folder
