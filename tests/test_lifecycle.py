"""What people and machines do to a run: stop it, kill it, move it, give it more, build on it, ask what cannot
be."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import extras.flags
import train
from extras import session
from extras.files import MediaError
from model import Generator
from test_endpoint import GOOD, serving
from tiny import ALONE, POST, ROOT, TINY, WHOLE, assert_same_bits, logged, same_weights, state


@pytest.fixture(scope="module")
def filmed(videos, tmp_path_factory):
    """A finished run of pretraining on a folder of videos."""
    folder = tmp_path_factory.mktemp("runs") / "filmed"
    train.main([*ALONE, "--data", str(videos[0]), "--crop", "none", "--steps", "2", "--out", str(folder)])
    return folder


def rewrite(run: Path, **flags) -> None:
    """Change what a run's config.json says of its flags."""
    kept = json.loads((run / "config.json").read_text())
    kept["training"] |= flags
    (run / "config.json").write_text(json.dumps(kept))


# ---------------------------------------------------------------- refused

@pytest.mark.parametrize("flags, words", [
    ("--steps 0", "--steps must be at least 1"), ("--crop 0,0,32", "--crop is of the clips of --data"),
    ("--seconds nan", "--seconds must be from 1"), ("--grid 4", "grid 4 must be odd"),
    ("--device gpu", "cannot be used"),
    ("--weights beauty=1", "want name=weight"), ("--weights seams=-1", "want name=weight"),
    ("--group 1", "no one to compare with"), ("--control --updates 0", "give it --updates"),
    ("--out tests", "holds files, none of them a run's log.jsonl"),
    ("--resume nowhere", "holds no run; one that stopped before its first checkpoint starts anew"),
    ("--resume RUN --steps 3", "--steps 3 is less than the run's 6"),
    ("--resume RUN --lr 1", "leave out --lr"), ("--pretrained RUN", "--pretrained wants an --out of its own"),
    ("--pretrained RUN --out x --width 64", "leave out --width"),
    ("--chunk-frames 1 --channels 64", "--chunk-frames must be at least 2"),
    ("--chunk-frames 26", "--seconds 2 is too short: whole chunks of 26"),
    ("--seconds 1 --chunk-frames 9", "--seconds 1 is too short: whole chunks of 9"),
    ("--grid 15 --size 32", "more than the 48 values of"),
    ("--resume RUN --sampling-steps 2", "leave out --sampling-steps"),
    ("--pretrained RUN --out x --audio-encoder RUN", "leave out --audio-encoder"),
    ("--pretrained RUN --out x --data RUN --init-from RUN", "leave out --init-from"),
    ("--resume EMPTY", "EMPTY is not a run of this version")])
def test_what_cannot_be_meant_ends_with_one_clear_line(finished, tmp_path, monkeypatch, capsys, flags, words):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "EMPTY" / "config.json").write_text("{}")
    places = {"RUN": str(finished), "EMPTY": str(tmp_path / "EMPTY"), "tests": str(ROOT / "tests")}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main([places.get(word, word) for word in flags.split()])
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_not_begun_over_another_and_what_that_left_is_not_taken_up(
        finished, unmeasured, tmp_path, monkeypatch):
    """The same command twice leaves the first run as it is, and so does --overwrite where the new one cannot
    begin; else nothing of it stays."""
    run = shutil.copytree(finished, tmp_path / "my run")
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    refused = "holds a run; go on with --resume '.*my run', .* or begin anew"
    with pytest.raises(MediaError, match=refused) as error:
        train.main([*ALONE, "--out", str(run)])
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for flags in ["--tensorboard"], ["--calibration", "nothing.json"]:
        with pytest.raises(MediaError):
            train.main([*ALONE, *flags, "--overwrite", "--out", str(run)])
        with pytest.raises(MediaError):
            train.main([*ALONE, *flags, "--out", str(tmp_path / "new")])
        assert not (tmp_path / "new").exists()
    nothing = "sync=0,background=0,identity=0,smoothness=0,seams=0"
    with pytest.raises(MediaError, match="--weights: leave nothing to reward"):      # not after pretraining
        train.main([*ALONE, "--updates", "1", "--weights", nothing, "--overwrite", "--out", str(run)])
    assert before == {path: path.read_bytes() for path in before}
    (run / "rivals").mkdir()
    (run / "cut.jpg").touch()
    train.main([*ALONE, "--steps", "1", "--overwrite", "--out", str(run)])
    gone = {"post.pt", "curate.pt", "control", "rivals", "pretrained", "curated", "cut.jpg"}
    assert not gone & {p.name for p in run.iterdir()}


def test_of_two_runs_in_one_folder_the_second_is_refused_and_a_dead_one_holds_nothing(tmp_path):
    """The lock is the system's: it ends with the process, were it by kill -9, and leaves no file behind."""
    locking = ("import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
               "print('in', flush=True); time.sleep(60)")
    first = subprocess.Popen([sys.executable, "-c", locking, str(tmp_path)], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"in\n"
    with pytest.raises(MediaError, match="another run is at work there; wait for its end, or choose"):
        train.main([*ALONE, "--out", str(tmp_path)])
    first.kill(), first.wait()
    for left in "pretrained/.model.safetensors.7.part", ".writing-x/video.mp4":         # by a killed run
        (tmp_path / left).parent.mkdir()
        (tmp_path / left).touch()
    os.utime(tmp_path / ".writing-x", (0, 0))
    own = {tmp_path / name for name in ("pretrained", ".writing-y", ".notes.2026", ".git/.keep.1", ".git")}
    for path in own - {tmp_path / "pretrained"}:                    # a user's, and of a video at work
        path.mkdir(parents=True, exist_ok=True)
    with session.lock(tmp_path), pytest.raises(MediaError), session.lock(tmp_path):
        pass
    assert {*tmp_path.rglob("*")} == own


# ---------------------------------------------------------------- stopped

def test_a_run_that_is_stopped_in_every_stage_ends_bit_equal_to_an_unbroken_one(
        finished, taste, unmeasured, tmp_path, monkeypatch):
    """Ctrl-C between gradient and optimizer: in step 4, in step 2 of curation, in the first part of update 3.
    Each is finished and saved, and the run ends with the same weights, averages, optimizers and log."""
    folder, clip = tmp_path / "half", train.clip_grad_norm_
    command = [*WHOLE, "--out", str(folder)]
    for gradients, words in ((4, "step 4 of pretraining"), (4, "step 2 of curation"),
                             (6, "update 3 of post-training")):
        calls = []

        def interrupting(*args):
            calls.append(1)
            if len(calls) == gradients:
                signal.raise_signal(signal.SIGINT)
            return clip(*args)
        monkeypatch.setattr(train, "clip_grad_norm_", interrupting)
        with pytest.raises(SystemExit, match=f"stopped at {words}; go on with: python train.py --resume"):
            train.main(command)
        command = ["--resume", str(folder)]
    monkeypatch.setattr(train, "clip_grad_norm_", clip)
    train.main(command)
    assert_same_bits(finished, folder, "state.pt", "curate.pt", "post.pt")
    both = [[(e["stage"], e.get("step", e.get("update")), "watched" in e) for e in logged(of)
             if e.get("stage") in session.CHECKPOINTS] for of in (finished, folder)]
    assert both[0] == both[1]
    monkeypatch.setattr(train.Stage, "advance", None)                  # once more: no step, but the report
    train.main(command)
    assert same_weights(finished, folder)


def test_a_run_that_died_goes_on_from_its_last_checkpoint(finished, unmeasured, tmp_path, monkeypatch):
    """Killed after step 5 with a checkpoint of step 4: step 5 is done again, and logged once."""
    save, folder = session.save, tmp_path / "dead"

    def dying(stage, out):
        if stage.step == 5:
            raise EOFError("power cut")
        save(stage, out)
    with monkeypatch.context() as patch, pytest.raises(EOFError):
        patch.setattr(session, "SAVE_MINUTES", 0)
        patch.setattr(session, "save", dying)
        train.main([*ALONE, "--out", str(folder)])
    assert [e["step"] for e in logged(folder, "pretraining")] == [1, 2, 3, 4, 5]
    train.main(["--resume", str(folder)])
    assert_same_bits(finished, folder, "state.pt")
    assert [e["step"] for e in logged(folder, "pretraining")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_goes_on_never_falls_back_to_the_weights_of_an_earlier_stage(
        finished, taste, unmeasured, tmp_path, monkeypatch):
    """Nor where it fails before its last stage, nor where a kill came between a state and its weights."""
    run = shutil.copytree(finished, tmp_path / "run")
    rewrite(run, control=False)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "post_train", lambda *_: exec("raise MemoryError"))
        patch.setattr(train, "fitting", lambda *_: suppress())
        train.main(["--resume", str(run)])
    assert same_weights(finished, run)
    shutil.copy(run / "curated" / "model.safetensors", run)
    assert not same_weights(finished, run)
    train.main(["--resume", str(run)])
    assert same_weights(finished, run)


def test_a_run_that_is_stopped_while_a_stage_saves_its_end_goes_no_further(unmeasured, tmp_path, monkeypatch):
    def saved(stage, folder, save=session.save):
        save(stage, folder)
        for _ in range(2):                           # where a terminal is closed
            os.kill(os.getpid(), signal.SIGHUP)
    monkeypatch.setattr(session, "save", saved)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)            # nohup, say, has it ignored
    try:
        with pytest.raises(SystemExit, match="stopped at the end of pretraining; go on with: python train"):
            train.main([*ALONE, "--out", str(tmp_path)])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert state(tmp_path)["step"] == 6


def test_a_run_that_is_stopped_before_its_first_log_line_goes_on_or_is_begun_anew(tmp_path, monkeypatch):
    """Published weights become the first checkpoint, then clips are encoded: there the run is stopped."""
    def interrupt(*_):
        raise KeyboardInterrupt
    weights, out = tmp_path / "published", tmp_path / "run"
    args = train.parse_arguments([*ALONE, "--out", str(weights)])
    session.save_generator(Generator(args.config), weights, training=session.flags(args))
    command = ["--pretrained", str(weights), "--out", str(out)]
    monkeypatch.setattr(train, "encode", interrupt)
    with pytest.raises(SystemExit, match="stopped; go on with: python train.py --resume"):
        train.main(command)
    assert train.parse_arguments(["--resume", str(out)]).out == out
    assert train.parse_arguments([*command, "--overwrite"]).out == out


@contextmanager
def begun(*command: str):
    """A run in a process of its own, which the test does not leave behind."""
    process = subprocess.Popen([sys.executable, "train.py", *command], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill(), process.wait()


def wait_for(condition, process: subprocess.Popen, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)


def test_sigterm_while_a_remote_judge_is_waited_for_saves_and_ends_within_seconds(tmp_path):
    """The server answers for the six clips, and then no more; the printed line goes on."""
    rated, out = 6 * 3, tmp_path / "it's stopped"

    def answer(k, body):
        time.sleep(60 if k >= rated else 0)
        return 200, {}, GOOD
    judged = ["--curate", "0", "--judge-model", "stuck", "--out", str(out)]
    with serving(answer) as (url, seen), begun(*WHOLE, "--judge-url", url, *judged) as process:
        wait_for(lambda: len(seen) > rated, process)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1].splitlines()[-1]
        assert time.monotonic() - asked < 15 and process.returncode == 1
    assert said.startswith("stopped at update 0 of post-training; go on with: python train.py --resume ")
    assert (out / "post.pt").exists()
    goes_on = shlex.split(said.partition("go on with: python train.py ")[2])
    assert train.parse_arguments(goes_on).out == out


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_while_it_draws_leaves_no_worker_and_says_that_nothing_was_kept(tmp_path, sent):
    """Two thousand talkers are being drawn by processes of its own."""
    def workers(parent: int) -> list[Path]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):                     # it ends while it is looked at
                state, of, *_ = path.read_text().rpartition(")")[2].split()
                found += [path.parent] if of == f"{parent}" else []
        return found

    with begun(*TINY, "--clips", "2000", "--out", str(tmp_path / "run")) as process:
        wait_for(lambda: len(workers(process.pid)) > 1, process)
        begun_by_it = workers(process.pid)
        process.send_signal(sent)
        said = process.communicate(timeout=120)[1].replace("\r", "\n").strip().splitlines()
    until = time.monotonic() + 120
    while any(folder.exists() for folder in begun_by_it):
        assert time.monotonic() < until
        time.sleep(0.1)
    if sent == signal.SIGTERM:
        assert said[-1] == "stopped; start it again: it was before the first checkpoint, so nothing was kept"


def test_a_full_disk_leaves_the_old_checkpoint_whole(finished, tmp_path, monkeypatch):
    """Half of the state is written: one line names the file, and every byte that stood there still stands."""
    run = shutil.copytree(finished, tmp_path / "run")
    args = train.parse_arguments(["--resume", str(run)])
    stage = train.FlowMatching("pretraining", None, args, args.steps)
    session.load(stage, run / "state.pt")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(MediaError, match="state.pt: cannot be written .No space left on device.; make room"):
        session.save(stage, run)
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


# ---------------------------------------------------------------- the log

@pytest.mark.parametrize("look_is_due", [False, True])
def test_a_log_that_was_cut_short_loses_its_last_line_and_what_comes_again(finished, tmp_path, look_is_due):
    """Curation at step 2 of 3: what it logged of step 3 goes, and the look at step 2 if it will look again.
    What other stages and lines say stays."""
    lines = (finished / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_text("".join(lines) + '{"seconds": 3.1, "st')
    stage = SimpleNamespace(name="curation", unit="step", step=2, look_is_due=look_is_due)
    session.Log(tmp_path, 0.0).rewind(stage)
    kept = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    gone = [entry for entry in map(json.loads, lines) if entry not in map(json.loads, kept)]
    looks_and_steps = [("watched" in entry, entry["step"]) for entry in gone]
    assert looks_and_steps == [(True, 2)] * look_is_due + [(False, 3), (True, 3)]
    assert len(kept) == len(lines) - len(gone) and {entry["stage"] for entry in gone} == {"curation"}


# ---------------------------------------------------------------- moved

def test_flags_win_over_the_preset_and_over_the_run_of_before(finished, tmp_path):
    """Also where the command repeats the run's own; those that no longer exist are ignored."""
    args = train.parse_arguments("--preset small --width 256 --steps 7 --out x".split())
    assert (args.config.width, args.config.size, args.steps, args.batch) == (256, 128, 7, 16)
    again = ["--pretrained", str(finished), "--out", str(tmp_path)]
    assert train.parse_arguments(again).sampling_steps == 1
    assert train.parse_arguments([*again, "--sampling-steps", "2"]).sampling_steps == 2
    run = shutil.copytree(finished, tmp_path / "run")
    rewrite(run, codec_steps=900, grad_clip=1.0, compile=False, refit_codec=False)
    same = train.parse_arguments([*WHOLE, "--control", "--resume", str(run)])
    assert vars(same).keys() == vars(train.parse_arguments(["--resume", str(run)])).keys()
    assert same.steps == 6 and not hasattr(same, "codec_steps") and not hasattr(same, "grad_clip")


def test_a_run_is_told_where_its_clips_are_now(filmed, videos, unmeasured, tmp_path, capsys):
    """What ships with the project is found from the code that runs. Clips that moved are named when they are
    missed; told once, the place is kept."""
    assert str(ROOT) not in (filmed / "config.json").read_text()
    run, moved = shutil.copytree(filmed, tmp_path / "run"), tmp_path / "moved"
    rewrite(run, data=str(tmp_path / "old"))
    with pytest.raises(SystemExit):
        train.parse_arguments(["--resume", str(run)])
    assert "old is not there; say where the clips are with --data" in capsys.readouterr().err
    shutil.copytree(videos[0], moved)
    train.main(["--resume", str(run), "--data", str(moved)])
    again = train.parse_arguments(["--resume", str(run)])
    assert again.data == str(moved) and again.crop is None                        # cut as before


# ---------------------------------------------------------------- more of it, and built upon

@pytest.mark.parametrize("more, anew", [("--steps 8", ["curation", "post-training"]), ("--updates 6", [])])
def test_a_finished_run_is_given_more_and_later_stages_are_done_anew(
        finished, taste, unmeasured, tmp_path, capsys, more, anew):
    """Each stage goes on where it was; its learning rate rises and falls again; looks are spread over all of
    it."""
    run, (flag, count) = shutil.copytree(finished, tmp_path / "run"), more.split()
    rewrite(run, control=False)
    train.main(["--resume", str(run), flag, count])
    said = capsys.readouterr().out
    assert [stage for stage in ("curation", "post-training") if f"{stage} is done anew" in said] == anew
    steps = {"--steps": state(run)["step"], "--curate-steps": state(run, "curate.pt")["step"],
             "--updates": state(run, "post.pt")["update"]}
    assert steps == {"--steps": 6, "--curate-steps": 3, "--updates": 4} | {flag: int(count)}
    one, other = (state(folder)["model"]["no_audio"] for folder in (finished, run))
    assert torch.equal(one, other) == (flag != "--steps")
    for stage in session.CHECKPOINTS:
        taken = [e.get("step", e.get("update")) for e in logged(run, stage)]
        assert taken == list(range(1, len(taken) + 1)), stage
    looks = [e["update"] for e in logged(run) if e.get("stage") == "post-training" and "watched" in e]
    assert looks[-1] == steps["--updates"]


@pytest.mark.parametrize("flags, steps", [("", 0), ("--curate-steps 2", 2), ("--looks 1", 3)])
def test_the_same_curation_is_not_done_twice_and_another_begins_anew(
        finished, taste, unmeasured, tmp_path, flags, steps):
    command = [*POST, "--updates", "0", *flags.split(), "--pretrained", str(finished)]
    train.main([*command, "--out", str(tmp_path / "run")])
    assert len([entry for entry in logged(tmp_path / "run", "curation") if "loss" in entry]) == steps
    assert state(tmp_path / "run", "curate.pt")["step"] == (steps or 3)


def test_a_pretrained_run_is_trained_on_other_clips(filmed, videos, unmeasured, tmp_path):
    """Where it is not said how these are cut, it is as for new clips, not as the run's were. The codec is
    fitted to them."""
    other_clips = ["--pretrained", str(filmed), "--data", str(videos[1]), "--steps", "3",
                   "--curate", "0", "--updates", "0", "--out"]
    args = train.parse_arguments([*other_clips, str(tmp_path / "none")])
    assert (args.seconds, args.crop) == (3.0, "face") and args.batch == 2
    other_clips = ["--crop", "none", "--seconds", "1", *other_clips]
    train.main([*other_clips, str(tmp_path / "run")])
    one, other = state(filmed)["model"], state(tmp_path / "run")["model"]
    assert not torch.equal(one["codec.space"], other["codec.space"])
    assert not torch.equal(one["no_audio"], other["no_audio"])
    assert [e["step"] for e in logged(tmp_path / "run") if "loss" in e] == [1, 2, 3]
    train.main(["--resume", str(tmp_path / "run")])                      # what it goes on with is its own


def test_published_weights_are_curated(finished, taste, unmeasured, tmp_path, monkeypatch):
    """config.json and model.safetensors alone, by a name on the hub: the pretrained ones. Half of the six
    clips were picked, and only these are learned from."""
    learned_from, draw_batch = [], train.draw_batch

    def noting(data, *rest):
        learned_from.append(len(data))
        return draw_batch(data, *rest)
    monkeypatch.setattr(train, "draw_batch", noting)
    published = tmp_path / "published"
    published.mkdir()
    for name in "config.json", "model.safetensors":
        shutil.copy(finished / "pretrained" / name, published)
    monkeypatch.setattr(extras.flags, "hub_folder", lambda name: {"someone/talkers": published}[str(name)])
    train.main(["--pretrained", "someone/talkers", *POST, "--updates", "0", "--out", str(tmp_path / "run")])
    assert same_weights(published, tmp_path / "run" / "pretrained")
    assert [e["stage"] for e in logged(tmp_path / "run") if "loss" in e] == ["curation"] * 3
    assert learned_from == [3, 3, 3]


# ---------------------------------------------------------------- what comes of it

def test_the_log_is_plain_json_and_tensorboard_gets_the_numbers_of_each_step(tmp_path, monkeypatch):
    """What is no number is null. Against a stub of torch.utils.tensorboard, whose absence is one line."""
    session.Log(tmp_path, 0.0)(loss=float("nan"), parts=[{"kl": float("inf")}, 1.5], best=-float("inf"))
    entry = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert entry["loss"] is None and entry["parts"] == [{"kl": None}, 1.5] and entry["best"] is None
    written = []
    board = SimpleNamespace(add_scalar=lambda *scalar: written.append(scalar))
    stub = SimpleNamespace(SummaryWriter=lambda folder: written.append(folder) or board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    log = session.Log(tmp_path, 0.0, tensorboard=True)
    log(arm="pretrained", held_out={"psnr": 30.0})
    log(stage="post-training", update=3, reward=1.5, parts=[{"kl": 0.25, "ratio_max": [1.0, 2.0]}], note="")
    assert written == [tmp_path / "tensorboard", *((f"post-training/{name}", value, 3) for name, value in (
        ("update", 3), ("reward", 1.5), ("parts/0/kl", 0.25), ("parts/0/ratio_max/0", 1.0),
        ("parts/0/ratio_max/1", 2.0)))]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MediaError, match="--tensorboard: wants the package of this name; pip install"):
        session.Log(tmp_path, 0.0, tensorboard=True)


def test_a_run_whose_clips_have_changed_says_so(tmp_path, capsys):
    """It had five; there are six now."""
    (tmp_path / "log.jsonl").write_text('{"seconds": 1, "config": {}, "clips": 5}\n')
    args = train.parse_arguments(TINY)
    clips, held_out, _ = train.load_clips(args)
    train.describe(Generator(args.config), clips, held_out, args, session.Log(tmp_path, 0.0))
    assert "had 5 training clips before, and has 6 now" in capsys.readouterr().out
    assert logged(tmp_path)[-1]["clips"] == 6
