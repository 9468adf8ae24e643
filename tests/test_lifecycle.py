"""What people do to a run: move it, give it more, build on it, stop it; and clips in which nothing moves."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import sample
import train
from data import Clip, MediaError, write_video
from extras.talkers import render_talker
from test_endpoint import GOOD, serving

ROOT = Path(train.__file__).parent
TINY = ("--size 32 --width 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --mlp-width 32 --space-channels 6 "
        "--channels 8 --seconds 1 --validate-clips 2 --batch 2 --sampling-steps 1 --warmup 2 --judge none").split()
POST = ("--curate 0.5 --curate-steps 3 --updates 2 --prompts 2 --group 2 --rollout-steps 3 --draws 1 --micro-batch 4 "
        "--looks 2 --watch-clips 2").split()
WHOLE = [*TINY, "--clips", "6", "--steps", "4", *POST]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One clip cache for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of all stages on drawn talkers."""
    folder = tmp_path_factory.mktemp("runs") / "it's whole"
    train.main([*WHOLE, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two folders of clips."""
    folders = [tmp_path_factory.mktemp(name) for name in ("some clips", "others")]
    for folder, seed in zip(folders, (7, 8)):
        for i in range(8):
            clip = render_talker(i, seed, 32, 30)
            write_video(folder / f"{i}.mp4", clip.frames, clip.audio)
    return folders


@pytest.fixture(scope="module")
def filmed(videos, tmp_path_factory):
    """A finished run of pretraining on the first of them."""
    folder = tmp_path_factory.mktemp("runs") / "filmed"
    train.main([*TINY, "--data", str(videos[0]), "--steps", "2", "--updates", "0", "--out", str(folder)])
    return folder


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def state(folder: Path, name: str = "state.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def refusal(capsys, *command: str) -> str:
    """The line that a command ends with."""
    with pytest.raises(SystemExit):
        train.parse_arguments(list(command))
    return capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- moved

def test_no_path_of_the_checkout_is_kept_and_what_a_user_named_is_kept_whole(whole, filmed, videos):
    """What ships with the project is found from the code that runs; a folder of clips from anywhere."""
    assert str(ROOT) not in (whole / "config.json").read_text() + (filmed / "config.json").read_text()
    kept = json.loads((filmed / "config.json").read_text())["training"]
    assert kept["data"] == str(videos[0]) and kept["sync"] is None and kept["reward_sync"] is None


def test_a_resumed_run_is_told_where_things_are_now(filmed, videos, tmp_path, capsys):
    """Clips that moved are named when they are missed; told once, the place is kept."""
    run, moved = copy(filmed, tmp_path / "run"), tmp_path / "moved"
    kept = json.loads((run / "config.json").read_text())
    kept["training"]["data"] = str(tmp_path / "old")
    (run / "config.json").write_text(json.dumps(kept))
    assert "old is not a folder; say where the clips are with --data" in refusal(capsys, "--resume", str(run))
    shutil.copytree(videos[0], moved)
    train.main(["--resume", str(run), "--data", str(moved)])
    assert train.parse_arguments(["--resume", str(run)]).data == str(moved)
    again = train.parse_arguments(["--resume", str(run), "--judge-url", "http://h:1/v1", "--judge-model", "m"])
    assert (again.judge_url, again.judge_model, again.steps) == ("http://h:1/v1", "m", 2)


def test_a_judge_that_is_named_anew_takes_the_place_of_a_server(whole, tmp_path):
    run = copy(whole, tmp_path / "run")
    kept = json.loads((run / "config.json").read_text())
    kept["training"] |= {"judge_url": "http://h:1/v1", "judge_model": "m"}
    (run / "config.json").write_text(json.dumps(kept))
    args = train.parse_arguments(["--resume", str(run), "--judge", "default"])
    assert args.judge == "default" and args.judge_url is None


# ---------------------------------------------------------------- more of it

@pytest.mark.parametrize("more, anew", [("--steps 6", ["curation", "post-training"]),
                                        ("--curate-steps 5", ["post-training"]), ("--updates 4", [])])
def test_a_finished_run_is_given_more_and_later_stages_are_done_anew(whole, tmp_path, capsys, more, anew):
    """Each stage goes on where it was, and its learning rate rises and falls again; looks are spread over all of it."""
    run, before, (name, count) = copy(whole, tmp_path / "run"), state(whole), more.split()
    train.main(["--resume", str(run), *more.split()])
    said = capsys.readouterr().out
    kept = [state(folder, "curate.pt")["best"]["weights"] for folder in (whole, run)]
    if name == "--curate-steps" and all(torch.equal(v, kept[1][k]) for k, v in kept[0].items()):
        anew = []                                    # more of it found nothing better: what came after it stands
    assert [stage for stage in ("curation", "post-training") if f"{stage} is done anew" in said] == anew
    steps = {name: state(run, file)[unit] for name, file, unit in (
        ("--steps", "state.pt", "step"), ("--curate-steps", "curate.pt", "step"), ("--updates", "post.pt", "update"))}
    assert steps == {"--steps": 4, "--curate-steps": 3, "--updates": 2} | {name: int(count)}
    same = all(torch.equal(v, state(run)["model"][k]) for k, v in before["model"].items())
    assert same == (name != "--steps")
    for stage in "pretraining", "curation", "post-training":
        taken = [e.get("step", e.get("update")) for e in logged(run) if e.get("stage") == stage and "watched" not in e]
        assert taken == list(range(1, len(taken) + 1)), stage
    assert [e["update"] for e in logged(run) if e.get("stage") == "post-training" and "watched" in e][-1] == steps[
        "--updates"]


def test_less_is_refused_and_what_a_run_has_settled_stays(whole, capsys):
    run = str(whole)
    assert "--steps 3 is less than the run's 4" in refusal(capsys, "--resume", run, "--steps", "3")
    assert "leave out --lr" in refusal(capsys, "--resume", run, "--lr", "1")
    assert "leave out --width" in refusal(capsys, "--pretrained", run, "--out", "x", "--width", "64")
    assert "leave out --data" in refusal(capsys, "--resume", run, "--data", str(ROOT))       # it had no clips on disk
    assert "leave out --out" in refusal(capsys, "--resume", run, "--out", "x")
    same = train.parse_arguments([*WHOLE, "--resume", run])                       # as they were, they may be given
    assert vars(same).keys() == vars(train.parse_arguments(["--resume", run])).keys()


# ---------------------------------------------------------------- built upon

@pytest.mark.parametrize("refit", [False, True])
def test_a_pretrained_run_is_trained_on_other_clips_and_its_codec_kept_or_refitted(filmed, videos, tmp_path, refit):
    train.main(["--pretrained", str(filmed), "--data", str(videos[1]), "--steps", "3", "--out", str(tmp_path / "run"),
                "--updates", "0", *["--refit-codec"] * refit])
    one, other = state(filmed)["model"], state(tmp_path / "run")["model"]
    assert torch.equal(one["codec.space"], other["codec.space"]) != refit
    assert not torch.equal(one["no_audio"], other["no_audio"]) and state(tmp_path / "run")["step"] == 3
    assert [e["step"] for e in logged(tmp_path / "run") if "loss" in e] == [1, 2, 3]
    train.main(["--resume", str(tmp_path / "run")])                                # what it goes on with is its own
    assert state(tmp_path / "run")["step"] == 3


def test_the_same_command_twice_leaves_the_first_run_as_it_is(filmed, videos, tmp_path):
    run = copy(filmed, tmp_path / "my run")
    command = [*TINY, "--data", str(videos[0]), "--steps", "2", "--updates", "0", "--out", str(run)]
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(MediaError, match="holds a run; go on with --resume '.*my run', .* or begin anew") as error:
        train.main(command)
    assert "\n" not in str(error.value) and before == {path: path.read_bytes() for path in run.iterdir()}
    train.main([*command, "--overwrite"])


# ---------------------------------------------------------------- stopped

@contextmanager
def begun(*command: str):
    """A run in a process of its own, which the test does not leave behind."""
    process = subprocess.Popen([sys.executable, "train.py", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield process
    finally:
        process.kill(), process.wait()


def wait_for(condition, process: subprocess.Popen, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)


def test_sigterm_while_a_remote_judge_is_waited_for_saves_and_ends_within_seconds(whole, tmp_path):
    """The server answers for the six clips, and then no more; the printed line goes on, another judge and all."""
    rated, out = 6 * 3, tmp_path / "it's stopped"

    def answer(k, body):
        time.sleep(60 if k >= rated else 0)
        return 200, {}, GOOD
    judged = ["--judge-model", "m", "--out", str(out)]
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


def test_sigterm_while_data_are_prepared_is_one_line(tmp_path):
    """Two thousand talkers are being drawn."""
    with begun(*TINY, "--clips", "2000", "--out", str(tmp_path / "run")) as process:
        wait_for((tmp_path / "run").exists, process)
        time.sleep(2)
        asked = time.monotonic()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1].replace("\r", "\n").strip().splitlines()[-1]
    assert time.monotonic() - asked < 20
    assert said == "stopped; start it again: it was before the first checkpoint, so nothing was kept"


# ---------------------------------------------------------------- nothing moves

def a_still_one(clip: Clip) -> Clip:
    """The picture of a clip with its sound, silent in the middle."""
    audio = clip.audio.clone()
    audio[len(audio) // 3: len(audio) // 2] = 0
    truth = clip.truth and clip.truth | {k: clip.truth[k][:1].expand_as(clip.truth[k]) for k in ("opening", "width")}
    return Clip("still", clip.frames[:1].expand_as(clip.frames), audio, truth)


@pytest.mark.parametrize("drawn", [True, False])
def test_a_still_clip_does_not_decide_a_mean_and_changes_no_ratio_of_the_others(drawn):
    """By hand, for clips that move: a value divided by that of the true clip."""
    clips = [render_talker(i, 7, 32, 32) for i in range(4)]
    clips = clips if drawn else [Clip(c.name, c.frames, c.audio) for c in clips]
    shown = torch.stack([c.frames for c in clips]).roll(1, 1) / 255
    alone = sample.evaluate(shown, clips, 4)
    for name, measure in (("motion", sample.motion), ("jerk_ratio", sample.jerk)):
        want = [measure(v).item() / measure(c.frames / 255).item() for v, c in zip(shown, clips)]
        assert alone[name].tolist() == pytest.approx(want, rel=1e-3)
    mixed = sample.evaluate(torch.cat([shown, shown[:1]]), [*clips, a_still_one(clips[0])], 4)
    for name, values in mixed.items():
        assert values.isfinite().all(), name
    for name in "motion", "jerk_ratio", "amplitude":
        assert mixed[name].max() < 8 and mixed[name].mean() < 3, name
    for name in "motion", "jerk_ratio":
        assert mixed[name][:4].tolist() == pytest.approx(alone[name].tolist(), rel=1e-3)
    assert abs(train.held_out_score(mixed) - train.held_out_score(alone)) < 0.5
    stills = [a_still_one(clip) for clip in clips]
    nothing = sample.evaluate(torch.stack([c.frames for c in stills]) / 255, stills, 4)
    assert all(values.isfinite().all() for values in nothing.values()) and nothing["motion"].abs().max() == 0


def test_the_log_is_json_that_every_reader_takes(tmp_path):
    train.Log(tmp_path, 0.0)(loss=float("nan"), parts=[{"kl": float("inf")}, 1.5], best=-float("inf"))
    def refuse(name): raise AssertionError(name)
    entry = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert entry["loss"] is None and entry["parts"] == [{"kl": None}, 1.5] and entry["best"] is None
