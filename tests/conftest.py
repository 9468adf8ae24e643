"""Where the tests run: on the CPU, but for those of the kernels; and what several files look at."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():      # interpret Triton's kernels; ask before anything imports triton
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu(request):
    """Hide a GPU from all but the tests of the kernels, and from the processes that they start: what they
    show is the same everywhere, and two runs are alike to the bit on a CPU alone."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_kernels":
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """One cache of clips for all tests, and never the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def drawn():
    """Thirty-two talkers of two seconds, 64 pixels."""
    from extras.talkers import render_talker
    return [render_talker(i, 5, 64, 50) for i in range(32)]


@pytest.fixture(scope="session")
def strangers():
    """Sixteen talkers of a world that no judge was taught on, 64 frames of 64 pixels."""
    from extras.talkers import render_talker
    return [render_talker(i, 31, 64, 64) for i in range(16)]


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> list[Path]:
    """Two folders of videos, eight drawn talkers in each."""
    from data import write_video
    from extras.talkers import render_talker
    folders = [tmp_path_factory.mktemp(name) for name in ("some clips", "others")]
    for folder, seed in zip(folders, (7, 8)):
        for i in range(8):
            clip = render_talker(i, seed, 32, 30)
            write_video(folder / f"{i}.mp4", clip.frames, clip.audio)
    return folders


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of all stages and controls, judged by known ratings: not to be changed."""
    import train
    from tiny import WHOLE, Taste
    folder = tmp_path_factory.mktemp("runs") / "it's finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_judge", lambda args: Taste())
        train.main([*WHOLE, "--control", "--out", str(folder)])
    return folder


@pytest.fixture
def taste(monkeypatch):
    """A judge of known ratings in every run."""
    import train
    from tiny import Taste
    monkeypatch.setattr(train, "make_judge", lambda args: Taste())


@pytest.fixture
def unmeasured(monkeypatch):
    """Without what a run measures before and after it trains: it takes most of the time."""
    import train
    monkeypatch.setattr(train, "describe", lambda *_: None)
    monkeypatch.setattr(train, "conclude", lambda *_: None)
