"""Several processes are one: the same weights, the same log, one set of files; what goes wrong ends all of
them."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from extras import flags, session
from extras.files import MediaError
from extras.media import SAMPLES_PER_FRAME
from tiny import ROOT, SHAPE, Brightness, flat, logged

FEW = [*SHAPE, *"--judge none --watch-clips 1 --looks 1 --rollout-steps 4 --draws 1 --micro-batch 4".split()]
TOY = [*FEW, *"--layers 2 --batch 6 --steps 20 --updates 20 --prompts 4 --group 3 --post-lr 1e-2 "
       "--credit chunk --clip 1e-2".split()]


@contextmanager
def float64():
    """Float64 everywhere, also where the code asks for fp32."""
    kept = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float = kept


@float64()
def teach(out: Path) -> None:
    """20 steps of pretraining and 20 updates of post-training on random latents. Saves weights and log."""
    train.join_processes()
    args = train.parse_arguments(TOY)
    torch.manual_seed(0)
    n, chunks, c = 12, 3, args.config
    data = train.Latents(torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8),
                         torch.randn(n, 4 * chunks, c.mel_channels),
                         torch.randn(n, chunks, c.video_tokens, c.channels))
    run = train.FlowMatching("pretraining", data, args, args.steps)
    run.model.codec.space.normal_(std=0.05), run.model.codec.time.normal_(std=0.05)
    run.average = train.snapshot(start := train.snapshot(run.model.state_dict()))
    log = [run.advance() for _ in range(20)]
    clips = [SimpleNamespace(name=f"{i}", audio=torch.zeros(12 * SAMPLES_PER_FRAME)) for i in range(n)]
    start_of_post = train.loaded(run.average, args)
    post = train.PostTraining("post-training", start_of_post, Brightness(), data, clips, args)
    middle = train.snapshot(post.model.state_dict())
    for _ in range(20):
        log.append({k: v for k, v in post.advance().items() if k != "seconds_for"})
    torch.save({"start": start, "pretrained": run.model.state_dict(), "average": run.average,
                "middle": middle, "policy": post.model.state_dict(), "log": log},
               out / f"{train.rank()} of {train.world()}.pt")


def falling(at: int):
    """A step that fails in the last process, as if its disk were full."""
    take_step = train.FlowMatching.take_step

    def fall(self):
        if self.step == at and train.rank() == train.world() - 1:
            raise MediaError(f"process {train.rank()} fell over")
        return take_step(self)
    return fall


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                           "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *command],
                          capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"})


def test_two_processes_are_one_process_with_the_same_batch(tmp_path):
    """After 20 steps of each stage, in float64 over gloo: weights and log to 1e-9, both processes' alike."""
    teach(tmp_path)
    done = torchrun(2, __file__, str(tmp_path))
    assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True)
                          for name in ("0 of 1", "0 of 2", "1 of 2"))
    for stage, before in {"pretrained": "start", "average": "start", "policy": "middle"}.items():
        for name, weight in one[stage].items():
            assert weight.dtype == torch.float64, name
            assert torch.equal(first[stage][name], second[stage][name]), name
            assert (weight - first[stage][name]).abs().max() <= 1e-9, (stage, name)
        assert max((one[stage][name] - one[before][name]).abs().max() for name in one[stage]) > 1e-2
    logs = [flat(x["log"]) for x in (one, first, second)]
    assert logs[0].keys() == logs[1].keys() == logs[2].keys() and len(logs[0]) > 500
    for name, value in logs[0].items():
        for other in logs[1:]:
            assert other[name] == (value if value is None else pytest.approx(value, rel=1e-9, abs=1e-9)), name
    assert sum(value for name, value in logs[0].items() if "clip_" in name) > 0


def test_a_run_of_two_processes_leaves_one_of_everything_and_goes_on_with_one(tmp_path, monkeypatch):
    """Stopped in step 3 by an error of the second process, which ends the first; resumed with one, stopped in
    step 4, resumed and ended with two. The losses are those of an unbroken run."""
    monkeypatch.setattr(session, "SAVE_MINUTES", 0)
    folder = tmp_path / "run"
    command = [*FEW, *"--clips 6 --steps 4 --curate 0.5 --curate-steps 2 --updates 1 --prompts 2 --parts 1 "
               "--group 2 --control".split()]
    failed = torchrun(2, __file__, "fail", *command, "--out", str(folder))
    assert failed.returncode != 0 and "process 1 fell over" in failed.stderr
    assert torch.load(folder / "state.pt", weights_only=True)["step"] == 2
    with monkeypatch.context() as patch:
        patch.setattr(train.FlowMatching, "take_step", falling(at=3))
        with pytest.raises(MediaError, match="process 0 fell over"):
            train.main(["--resume", str(folder)])
    done = torchrun(2, "train.py", "--resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("codec alone") == done.stdout.count("minutes in all") == 1
    at = lambda stage: [e.get("step", e.get("update")) for e in logged(folder, stage)]
    assert at("pretraining") == [1, 2, 3, 4] and at("curation") == [1, 2] and at("post-training") == [1]
    assert at("GRPO without curation") == [1] and at("more curation") and at("more pretraining")
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    train.main([*command[:-1], "--updates", "0", "--out", str(tmp_path / "unbroken")])
    for stage in "pretraining", "curation":
        losses = [[e["loss"] for e in logged(of, stage)] for of in (tmp_path / "unbroken", folder)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3), stage


if __name__ == "__main__":
    if sys.argv[1] != "fail":
        teach(Path(sys.argv[1]))
    else:
        session.SAVE_MINUTES, train.FlowMatching.take_step = 0, falling(at=2)
        flags.program = lambda: "python train.py"                            # which goes on with it
        train.main(sys.argv[2:])
