"""Training and sampling as a user runs them: resume, seeds, flags, files."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import reward
import sample
import train
from data import SAMPLES_PER_FRAME, Clip, MediaError, fitting, load_speech, write_video
from extras.report import write_report
from extras.talkers import FAULTS, render_talker
from model import load_generator
from reward import ASPECTS, COMPONENTS, REWARD_SYNC, Ratings, rate_whole

TINY = ("--size 32 --width 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --mlp-width 32 --space-channels 6 "
        "--channels 8 --clips 6 --seconds 1 --validate-clips 2 --batch 2 --sampling-steps 1 --warmup 2 "
        "--curate 0 --updates 0 --judge none").split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One clip cache for the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """A finished run of six steps, and the folder it left."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*TINY, "--steps", "6", "--out", str(folder)])
    return folder


def weights(folder, name="state.pt"):
    """All that a checkpoint holds, but for the CPU time."""
    state, flat = torch.load(folder / name, weights_only=True), {}
    assert state.pop("cpu_seconds") > 0

    def walk(prefix, value):
        if isinstance(value, dict | list):
            for k, v in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{prefix}.{k}", v)
        else:
            flat[prefix] = value
    walk("", state)
    return flat


def assert_same_bits(one, other, name="state.pt"):
    one, other = weights(one, name), weights(other, name)
    assert one.keys() == other.keys() and len(one) > 50
    for name, value in one.items():
        assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name], name


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_stopped_and_resumed_run_is_bit_equal_to_an_unbroken_one(run, tmp_path, monkeypatch):
    """Ctrl-C in the middle of step 4, between the two optimizers: the step is finished and saved, and the resumed run
    ends with the same bits in weights, average and both optimizers."""
    make = train.optimizers
    calls = []

    def interrupting(model, args):
        muon, adam = make(model, args)
        step = muon.step

        def interrupted():
            calls.append(step())
            if len(calls) == 4:
                signal.raise_signal(signal.SIGINT)
        muon.step = interrupted
        return [muon, adam]
    monkeypatch.setattr(train, "optimizers", interrupting)
    with pytest.raises(SystemExit, match="stopped at step 4 of pretraining; go on with: python train.py --resume"):
        train.main([*TINY, "--steps", "6", "--out", str(tmp_path / "half")])
    monkeypatch.setattr(train, "optimizers", make)
    train.main(["--resume", str(tmp_path / "half")])
    assert_same_bits(run, tmp_path / "half")
    whole, half = ((folder / "report.md").read_text().split("\n", 1)[1].partition("## How it was made")
                   for folder in (run, tmp_path / "half"))
    assert whole[0].count("|") > 50 and whole[0] == half[0] and half[2].count("python train.py") == 2


def test_a_run_that_died_goes_on_from_its_last_checkpoint(run, tmp_path, monkeypatch):
    """Killed after step 5 with a checkpoint of step 4: step 5 is done again, and logged once."""
    save, folder = train.Stage.save, tmp_path / "dead"

    def dying(self, out):
        if self.step == 5:
            raise EOFError("power cut")
        save(self, out)
    with monkeypatch.context() as patch, pytest.raises(EOFError):
        patch.setattr(train.Stage, "save", dying)
        train.main([*TINY, "--steps", "6", "--save-minutes", "0", "--out", str(folder)])
    assert sum('"loss"' in line for line in open(folder / "log.jsonl")) == 5
    train.main(["--resume", str(folder)])
    assert_same_bits(run, folder)
    assert [e["step"] for e in logged(folder) if "loss" in e] == [1, 2, 3, 4, 5, 6]


def test_a_run_leaves_everything_it_names(run):
    names = {p.name for p in run.iterdir()}
    assert names == {"config.json", "model.safetensors", "state.pt", "log.jsonl", "sheet.png", "sample.mp4",
                     "portrait.png", "speech.wav", "held_out.json", "report.md", "report.html",
                     "pretraining.png"}
    entries = logged(run)
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [(e["arm"], e["sampler"]) for e in entries if "held_out" in e] == [("pretrained", "ode")]
    measured = {"lip_sync", "offset", "amplitude", "psnr", "mouth_psnr", "motion", "head", "jerk_ratio", "still_psnr",
                "jerk", "seam", "sync_own", "sync_confidence", "identity"}
    assert set(entries[-1]["held_out"]) == measured and set(entries[0]["codec"]) == measured
    assert (run / "report.md").read_text().count("](pretraining.png)") == 1
    assert Image.open(run / "sheet.png").size == (12 * 32, 2 * 2 * 32)


def test_the_seed_changes_the_run(run, cache, tmp_path):
    train.main([*TINY, "--steps", "6", "--seed", "1", "--out", str(tmp_path)])
    assert not torch.equal(weights(run)[".model.no_audio"], weights(tmp_path)[".model.no_audio"])
    assert json.loads((tmp_path / "config.json").read_text())["training"]["seed"] == 1


def test_the_loss_is_the_velocity_error_of_the_levels_it_draws(cache):
    """Against a stand-in that returns a known velocity, the loss is a weighted mean square that a loop can compute."""
    args = train.parse_arguments([*TINY, "--audio-dropout", "0", "--context-noise", "0"])
    clean = torch.randn(5, 3, 10, 8)
    data = train.Latents(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.zeros(5, 12, 4), clean)
    seen = {}

    def velocity(portrait, mel, context, noisy, sigma, heard):
        seen.update(noisy=noisy, sigma=sigma, context=context)
        return torch.zeros_like(noisy)
    error, level = train.flow_matching_loss(velocity, train.draw_batch(data, args, step=7))
    bins = train.by_noise_level(error, level)
    total, by_bin = [], [[] for _ in bins]
    for b in range(2):
        for k in range(3):
            sigma, x = seen["sigma"][b, 0, k].item(), seen["noisy"][b, 0, k]
            origin = seen["context"][b, k]
            noise = (x - (1 - sigma) * origin) / sigma
            total.append(min(sigma / 0.2, 1) ** 2 * ((noise - origin) ** 2).mean().item())
            by_bin[int(sigma * len(bins))].append(total[-1])
    assert error.flatten().tolist() == pytest.approx(total, rel=1e-4)
    for value, members in zip(bins, by_bin):
        assert value == (pytest.approx(sum(members) / len(members), abs=1e-4) if members else None)


@pytest.mark.parametrize("wrong", ["--steps 0", "--preset huge", "--crop 1,2", "--seconds 0.5", "--grid 4",
                                   "--resume nowhere", "--batch -1", "--prediction noise", "--size 66",
                                   "--window 0", "--seed -1", "--device gpu", "--ema 1", "--seconds nan",
                                   "--resume . --steps 9", "--crop 0,0,0", "--out train.py", "--weights still",
                                   "--group 1", "--draws 5", "--noise-level 2", "--parts 0", "--post-ema 1",
                                   "--control --updates 0", "--pretrained nowhere --out x", "--pretrained .",
                                   "--seed 9999999999999999999", "--batch 10000000000", "--seconds 1e30", "--clip inf",
                                   "--width 1000000000", "--grad-clip 0", "--crop 0,0,32", "--out tests",
                                   "--curate 1", "--looks 0", "--save-minutes -1", "--world real"])
def test_bad_flags_end_with_one_clear_line(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(wrong.split())
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("wrong", ["--seed 9999999999999999999", "--guidance nan", "--max-seconds inf",
                                   "--out train.py", "--score v"])
def test_sampling_refuses_what_cannot_be_meant(wrong, capsys):
    """A video over one's source, a guidance that is no number: argparse's exit, before anything is read."""
    with pytest.raises(SystemExit) as stop:
        sample.main([*"--checkpoint c --image i --audio a --out o.mp4".split(), *wrong.split()])
    assert stop.value.code == 2 and wrong.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_other_files_is_no_place_for_a_run(tmp_path, capsys):
    """`--out ""` is the folder one stands in: whatever lies there, as a portrait.png, is not overwritten."""
    (tmp_path / "portrait.png").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        train.main([*TINY, "--out", str(tmp_path)])
    assert "holds files, none of them a run's log.jsonl" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["portrait.png"]


# ---------------------------------------------------------------- what a machine does to a run

def test_of_two_runs_in_one_folder_the_second_is_refused_and_a_dead_one_holds_nothing(run, tmp_path, monkeypatch):
    """The lock is the system's: it ends with the process, were it by kill -9, and leaves no file behind."""
    shutil.copytree(run, tmp_path / "run")
    first = subprocess.Popen([sys.executable, "-c", "import fcntl, os, sys, time; "
                              "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print('in', flush=True); "
                              "time.sleep(60)", str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"in\n"
    with pytest.raises(MediaError, match="another run is at work there; wait for its end, or choose another --out"):
        train.main(["--resume", str(tmp_path / "run")])
    first.kill(), first.wait()
    with train.lock(tmp_path / "run"), pytest.raises(MediaError), train.lock(tmp_path / "run"):
        pass
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in run.iterdir()}


@pytest.mark.parametrize("full", ["model.safetensors", "state.pt"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(run, tmp_path, full):
    """The system refuses to let a file grow: one line that names it, and every byte that stood there still stands."""
    shutil.copytree(run, tmp_path / "run")
    old = (tmp_path / "run" / full).read_bytes()
    args = train.parse_arguments(["--resume", str(tmp_path / "run")])
    again = train.FlowMatching("pretraining", None, args, args.steps)
    again.load(tmp_path / "run" / "state.pt")
    size, limits = (tmp_path / "run" / full).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limits[1]))
    try:
        with pytest.raises(MediaError, match=f"{full}: cannot be written .*make room there") as error:
            if full == "state.pt":                       # what is written first
                again.save(tmp_path / "run")
            else:
                train.save_generator(again.model, tmp_path / "run", again.kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(error.value) and (tmp_path / "run" / full).read_bytes() == old
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in run.iterdir()}


def test_a_log_that_was_cut_short_loses_its_last_line_and_the_steps_that_come_again(run, tmp_path):
    """A stage at step 4 of 6: what it logged of steps 5 and 6 goes, and what other stages and lines say stays."""
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    other = '{"seconds": 3, "stage": "curation", "step": 6, "loss": 1.0}\n'
    (tmp_path / "log.jsonl").write_text("".join(lines) + other + '{"seconds": 3.1, "st')
    stage = SimpleNamespace(name="pretraining", unit="step", step=4, looks=0, progress=4 / 6,
                            args=SimpleNamespace(looks=4))
    train.Log(tmp_path, 0.0).rewind(stage)
    kept = [line for line in lines if '"loss"' not in line or json.loads(line)["step"] <= 4] + [other]
    assert (tmp_path / "log.jsonl").read_text() == "".join(kept) and len(kept) == len(lines) - 1


@pytest.mark.parametrize("stage, words", [("load_clips", "start it again: .* nothing was kept"),
                                          ("control_arms", "go on with: python train.py --resume"),
                                          ("measure", "go on with: python train.py --resume")])
def test_ctrl_c_says_how_to_go_on_wherever_it_comes(run, judge, cache, tmp_path, monkeypatch, stage, words):
    """In preparation, in the controls and while measuring; the steps between have tests of their own."""
    def interrupt(*_):                               # a signal may be ignored where tests run in the background
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, stage, interrupt)
        with pytest.raises(SystemExit, match=words):
            train.main(["--pretrained", str(run), "--out", str(tmp_path / "run"), *POST, "--updates", "1", "--control"])
    if stage == "measure":
        train.main(["--resume", str(tmp_path / "run")])
        assert (tmp_path / "run" / "report.md").exists()


CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                        "tried to allocate 8000000000 bytes.\nError code 12")


FULL = [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), CPU_FULL, MemoryError()]


@pytest.mark.parametrize("owner, name, words, full", [
    (train.FlowMatching, "take_step", "pretraining: does not fit into memory; lower --batch", FULL[0]),
    (train.PostTraining, "take_step", "post-training: does not fit into memory; lower --micro-batch", FULL[1]),
    (train, "measure", "measuring: does not fit into memory; lower --validate-clips", FULL[2])])
def test_too_little_memory_is_one_line_that_says_what_to_lower(cache, tmp_path, monkeypatch, owner, name, words, full):
    def fail(*_):
        raise full
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(MediaError, match=words) as error:
        train.main([*TINY, *POST, "--steps", "1", "--updates", "1", "--out", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_a_judge_that_does_not_fit_says_so_and_other_errors_stay_what_they_are():
    for full in FULL:
        def fail(*_):
            raise full
        judge = SimpleNamespace(window=None, rate=fail)
        with pytest.raises(MediaError, match="the judge: does not fit into memory; lower --judge-batch"):
            rate_whole(judge, torch.zeros(1, 8, 3, 32, 32), torch.zeros(1, 8 * SAMPLES_PER_FRAME), ["clip"])
    with pytest.raises(RuntimeError, match="shapes"), fitting("this", "that"):
        raise RuntimeError("shapes do not match")


def test_flags_win_over_the_preset():
    args = train.parse_arguments("--preset small --width 256 --steps 7 --out x".split())
    assert (args.config.width, args.config.size, args.steps, args.batch) == (256, 128, 7, 16)


def test_a_real_picture_speaks_and_the_video_is_as_long_as_the_sound(run, tmp_path):
    """1.31 s of sound: ceil(1.31 * 25) = 33 frames, not a multiple of the chunk."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8)).save(tmp_path / "face.png")
    tone = torch.sin(torch.arange(int(1.31 * 16000)) * 0.05) * 0.3
    write_video(tmp_path / "tone.mp4", torch.zeros(33, 3, 16, 16, dtype=torch.uint8), tone)
    out = tmp_path / "out.mp4"
    sample.main(["--checkpoint", str(run), "--image", str(tmp_path / "face.png"), "--audio", str(tmp_path / "tone.mp4"),
                 "--out", str(out), "--steps", "1", "--guidance", "1.5"])
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(out))
    assert frames == 33 and abs(len(load_speech(out)) - 1.31 * 16000) <= SAMPLES_PER_FRAME


def test_the_seed_is_obeyed_when_animating(run):
    model, portrait = load_generator(run).eval(), torch.full((3, 32, 32), 128, dtype=torch.uint8)
    speech = torch.randn(5 * SAMPLES_PER_FRAME)
    made = [torch.stack(list(sample.animate(model, portrait, speech, 2, 1.0, seed))) for seed in (0, 0, 1)]
    assert made[0].shape == (5, 3, 32, 32) and torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_the_line_that_train_prints_works_and_max_seconds_is_obeyed(run, tmp_path):
    out = tmp_path / "video.mp4"
    sample.main(["--checkpoint", str(run), "--image", str(run / "portrait.png"), "--audio", str(run / "speech.wav"),
                 "--out", str(out), "--steps", "1", "--max-seconds", "0.5"])
    assert imageio_ffmpeg.count_frames_and_secs(str(out))[0] == 13


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of twelve drawn talkers as videos."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(12):
        clip = render_talker(i, 7, 32, 30)
        write_video(folder / f"{i}.mp4", clip.frames, clip.audio)
    return folder


def test_a_folder_of_clips_trains_and_resumes_and_leaves_curation_out_where_nobody_knows_them(
        cache, videos, tmp_path, capsys):
    """--data: the metrics are those of real clips, which have no truth; with neither a judge nor a sync network of the
    user's own one line says that nothing is picked."""
    flags = [*TINY, "--data", str(videos), "--crop", "0,0,32", "--steps", "1", "--curate", "0.5"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    assert capsys.readouterr().out.count("no curation: neither a judge nor") == 1
    arm, = (e for e in logged(tmp_path / "run") if "held_out" in e)
    assert arm["arm"] == "pretrained"
    assert {"mouth_own", "mouth_late", "over_late", "amplitude", "offset"} <= set(arm["held_out"])
    train.main(["--resume", str(tmp_path / "run")])


def test_bad_input_is_one_line_and_a_failing_exit(run, tmp_path):
    (tmp_path / "face.png").write_bytes(b"not a picture")
    done = subprocess.run([sys.executable, "sample.py", "--checkpoint", str(run), "--image", str(tmp_path / "face.png"),
                           "--audio", "missing.wav", "--out", str(tmp_path / "o.mp4")],
                          capture_output=True, text=True, cwd=Path(train.__file__).parent)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error:") and "face.png" in done.stderr
    assert not (tmp_path / "o.mp4").exists()
    with pytest.raises(MediaError, match="holds no config.json"):
        sample.main(["--checkpoint", str(tmp_path), "--image", "a", "--audio", "b", "--out", "c.mp4"])


# ---------------------------------------------------------------- what the judge picks

class Taste:
    """A judge of known ratings: of the six training clips these, of anything else how bright and how lively it is."""

    window, fingerprint = None, "taste"
    known = torch.tensor([[1.0, 5, 4], [4, 1, 1], [3, 2, 5], [2, 4, 2], [5, 3, 3], [1, 1, 1]])   # sums 10 6 10 8 11 3

    def __init__(self):
        self.asked = []

    def rate(self, frames, audio, names):
        assert 0 <= frames.min() and frames.max() <= 1 and audio.shape == (len(frames), frames.shape[1] * 640)
        self.asked += names
        bright, lively = 1 + 4 * frames.mean((1, 2, 3, 4)), 1 + 4 * frames.diff(dim=1).abs().mean((1, 2, 3, 4))
        score = torch.stack([bright, lively, bright], 1)
        for i, name in enumerate(names):
            if name.startswith("talker-0-") and "rollout" not in name:
                score[i] = self.known[int(name.split("-")[2])]
        return Ratings(score, torch.ones_like(score))


def picks(judge, *flags, change=lambda clips: clips):
    args = train.parse_arguments([*TINY, "--curate", "0.5", *flags])
    clips = change(list(train.load_clips(args)[0]))
    entries = []
    return train.pick_clips(judge, clips, args, lambda **entry: entries.append(entry)), clips, entries


def numbers(clips) -> list[int]:
    return [int(clip.name.split("-")[2]) for clip in clips]


def test_the_judge_picks_by_its_ratings_alone(cache, monkeypatch):
    """By hand: half of six clips by the sum, two exemplars each by liveliness and by motion; in whatever order the
    clips come and whatever their truth says. They are rated once, and the CPU time of that is kept."""
    monkeypatch.setattr(train, "EXEMPLARS", 2)
    nonsense = lambda truth: dict.fromkeys(truth, torch.tensor(math.nan))
    garble = lambda clips: [Clip(c.name, c.frames, c.audio, nonsense(c.truth)) for c in clips]
    judge = Taste()
    for change in (lambda clips: clips, lambda clips: clips[::-1], garble):
        picked, clips, entries = picks(judge, change=change)
        assert sorted(numbers(clips[i] for i in picked.curated)) == [0, 2, 4]
        assert sorted(numbers(picked.lively)) == [0, 3] and sorted(numbers(picked.smooth)) == [0, 2]
        assert picked.cpu_seconds > 0 and [row["fault"] for row in entries[0]["funnel"]] == list(FAULTS)
    assert len(judge.asked) == 12                                      # once in either order
    assert len(picks(judge, "--curate", "0")[0].curated) == 0          # no curation, but exemplars


def test_a_clip_without_a_rating_is_never_picked(cache, monkeypatch):
    """Also where fewer clips are rated than are wanted: of six with two sums, three shall be picked."""
    class Silent(Taste):
        fingerprint = "silent"
        known = Taste.known.clone()
    Silent.known[[0, 2, 4], 0], Silent.known[3] = math.nan, math.nan
    picked, *_ = picks(Silent())
    assert picked.curated.tolist() == [1, 5]
    assert sorted(numbers(picked.lively)) == sorted(numbers(picked.smooth)) == [0, 1, 2, 4, 5]


def test_without_a_judge_the_confidence_of_a_sync_network_ranks_the_clips(cache, videos):
    """--data and a network of its own."""
    picked, clips, entries = picks(None, "--data", str(videos), "--reward-sync", str(REWARD_SYNC))
    confidence = sample.sync_metrics(reward.load_sync(REWARD_SYNC), train.pixels(clips, 24),
                                     train.sounds(clips, 24))["sync_confidence"]
    assert sorted(picked.curated.tolist()) == sorted(confidence.argsort()[-(len(clips) // 2):].tolist())
    assert [c.name for c in picked.lively] == [c.name for c in picked.smooth] and not entries


def test_exemplars_are_the_lively_and_the_smooth_clips_or_those_of_a_folder(run, videos, tmp_path, monkeypatch):
    """What the reward is made of, where the run is stopped; a folder's clips are both, and are so when it goes on."""
    monkeypatch.setattr(train, "EXEMPLARS", 2), monkeypatch.setattr(train, "make_judge", lambda args: Taste())
    seen, flags = [], ["--pretrained", str(run), *POST, "--curate", "0"]

    def stop(args, judge, lively, smooth, *_):
        seen.append((lively, smooth))
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "make_reward", stop)
    for command in ([*flags, "--out", str(tmp_path / "a")], [*flags, "--exemplars", str(videos), "--out",
                    str(tmp_path / "b")], ["--resume", str(tmp_path / "b")]):
        with pytest.raises(SystemExit, match="stopped; go on with"):
            train.main(command)
    assert [sorted(numbers(clips)) for clips in seen[0]] == [[0, 3], [0, 2]]
    for lively, smooth in seen[1:]:
        assert all(".mp4" in clip.name for clip in [*lively, *smooth])
        assert [c.name for c in lively] == [c.name for c in smooth] == [c.name for c in seen[1][0]]


# ---------------------------------------------------------------- curation and post-training

POST = ("--curate 0.5 --curate-steps 3 --updates 4 --prompts 2 --group 3 --rollout-steps 3 --draws 1 --micro-batch 2 "
        "--looks 2 --watch-clips 2 --post-lr 1e-3").split()


class Brightness:
    """A reward with the interface of reward.Reward that anyone can compute: bright frames, and bright last ones."""

    def __init__(self):
        self.weights, self.floors, self.asked = {"bright": 1.0, "end": 0.5}, {}, []

    def __call__(self, frames, audio, portrait, names, per_chunk=False):
        assert audio.shape == (len(frames), frames.shape[1] * SAMPLES_PER_FRAME) and len(names) == len(frames)
        assert portrait.shape == (len(frames), *frames.shape[2:]) and 0 <= frames.min() and frames.max() <= 1
        assert not frames.requires_grad
        if "rollout" in names[0]:                    # not the report's clips
            self.asked.append(names)
        components = {"bright": frames.mean((1, 2, 3, 4)), "end": frames[:, -1].mean((1, 2, 3))}
        chunks = {"bright": frames.unflatten(1, (-1, 4)).mean((2, 3, 4, 5))} if per_chunk else {}
        return SimpleNamespace(total=components["bright"] + 0.5 * components["end"], components=components,
                               per_chunk=chunks)


@pytest.fixture
def judge(monkeypatch):
    """Instead of the reward, and of a judge: nothing is curated."""
    judge = Brightness()
    monkeypatch.setattr(train, "make_reward", lambda *args: judge)
    monkeypatch.setattr(train, "pick_clips", lambda judge, clips, *_: train.Picks(torch.empty(0).long(), clips, clips))
    return judge


@pytest.fixture
def taste(monkeypatch):
    """A judge of known ratings, in the reward as it is."""
    monkeypatch.setattr(train, "make_judge", lambda args: Taste())


@pytest.fixture(scope="module")
def post_run(run, tmp_path_factory):
    """The finished run, curated for three steps and post-trained for four updates with the controls beside it, and the
    folder that it left."""
    folder = tmp_path_factory.mktemp("runs") / "post"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_judge", lambda args: Taste())
        train.main(["--pretrained", str(run), "--out", str(folder), "--control", *POST])
    return folder


ARMS = "pretrained", "curated", "post-trained", "more curation", "GRPO without curation", "more pretraining"


def test_the_stages_leave_their_arms_and_log_every_step(post_run, run):
    """What was taught before in folders of their own, the best policy on top; each arm measured twice."""
    entries = logged(post_run)
    steps = [e for e in entries if e.get("stage") == "curation"]
    assert [e["step"] for e in steps if "loss" in e] == [1, 2, 3]
    assert [e["step"] for e in steps if "watched" in e] == [0, 2, 3]              # the first at each half or after it
    updates = [e for e in entries if e.get("stage") == "post-training"]
    assert [e["update"] for e in updates if "watched" in e] == [0, 2, 4]
    updates = [e for e in updates if "parts" in e]
    assert [e["update"] for e in updates] == [1, 2, 3, 4]
    for entry in updates:
        first, second = entry["parts"]
        assert set(entry["components"]) == {*COMPONENTS, "total"} and entry["seconds_for"].keys() == {
            "rollout", "reward", "update"}
        assert abs(first["ratio_max"][0] - 1) <= 1e-6 < abs(second["ratio_max"][0] - 1)          # 1, then off 1
        assert first["grad_norm"] > 0 and entry["sigma"] == pytest.approx(2 / 3)
    assert sorted((e["arm"], e["sampler"]) for e in entries if "arm" in e) == sorted(
        (arm, sampler) for arm in ARMS for sampler in ("ode", "cps"))
    assert "rewarded" in entries[-1] and len(json.loads((post_run / "held_out.json").read_text())["cps"]) == 6
    assert Image.open(post_run / "sheet.png").size == (12 * 32, 2 * 7 * 32)
    kept = [load_generator(folder).state_dict() for folder in (
        run, post_run / "pretrained", post_run / "curated", post_run, *(post_run / "control").iterdir())]
    for name, value in kept[0].items():
        assert torch.equal(kept[1][name], value)
    assert len(kept) == 7


def test_the_report_is_made_of_the_log_and_the_clips_values_alone(post_run, tmp_path):
    """Arms whose lip_sync is known by hand: means, intervals and paired differences of two clips."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("log.jsonl", "held_out.json"):
        shutil.copy(post_run / name, copy)
    values = json.loads((copy / "held_out.json").read_text())
    known = {"pretrained": [0.2, 0.4], "curated": [0.1, 0.3], "post-trained": [0.5, 0.9]}
    for arm, pair in known.items():
        values["ode"][arm]["lip_sync"] = pair
    (copy / "held_out.json").write_text(json.dumps({"ode": {arm: values["ode"][arm] for arm in known}}))
    write_report(copy)
    text = (copy / "report.md").read_text()
    one, other = ([cell.strip(" |") for cell in line.split(" | ")] for line in text.splitlines()
                  if line.startswith("| lip_sync |"))
    # 1.96 * std / sqrt(2) of two values is 1.96 * half their distance
    assert one[2:] == ["0.300±0.196", "0.200±0.196", "0.700±0.392"]
    assert other[1:] == ["-0.100±0.000", "0.500±0.196", "0.400±0.196"]           # of PAIRS, in their order
    for words in ("| seed | 0 |", "hardware", "CPU threads", "seconds an update, rollout", "minutes of post-training",
                  "post-trained minus curated", "python train.py --pretrained", "steps in", "kept, ", "last, ",
                  "What was found", "| tremble |", "no part of the reward contains or resembles them"):
        assert words in text, words
    for name in ("rewards.png", "watched.png"):
        assert f"({name})" in text and Image.open(copy / name).size[0] > 300
    assert "pretraining.png" not in text                               # those steps are in the other run's report


def test_controls_spend_the_cpu_time_of_what_they_are_compared_with(post_run):
    """More curation that of post-training, more pretraining that of GRPO without curation: to within a step, by the
    times of their own folders; and what the rating took is charged to curation."""
    spent = {e["control"]: e for e in logged(post_run) if "control" in e}
    post = torch.load(post_run / "post.pt", weights_only=True)["cpu_seconds"]
    budget = {"more curation": post, "more pretraining": spent["GRPO without curation"]["cpu_seconds"]}
    for name, seconds in budget.items():
        one = spent[name]["cpu_seconds"]
        assert seconds <= one < seconds + 0.25 and spent[name]["steps"] > 3, name
        saved = torch.load(post_run / train.CHECKPOINTS.get(name, f"control/{name.replace(' ', '-')}/state.pt"),
                           weights_only=True)
        assert (saved["cpu_seconds"], saved["step"]) == (one, spent[name]["steps"])
    assert spent["GRPO without curation"]["steps"] == 4


def test_controls_that_were_stopped_go_on_with_the_same_budgets(post_run, taste, tmp_path):
    """Two are finished, the last was under way: it alone is done again, for as long as GRPO without curation took."""
    shutil.copytree(post_run, tmp_path / "run")
    name, other = "more pretraining", tmp_path / "run" / "control" / "GRPO-without-curation" / "state.pt"
    shutil.rmtree(tmp_path / "run" / "control" / "more-pretraining")
    torch.save(torch.load(other, weights_only=True) | {"cpu_seconds": 0.2}, other)
    before = (tmp_path / "run" / "log.jsonl").read_text()
    train.main(["--resume", str(tmp_path / "run")])
    again = logged(tmp_path / "run")
    steps = [e["step"] for e in again if e.get("stage") == name and "loss" in e]
    assert steps == [*range(1, len(steps) + 1)]                        # those of the first time are gone
    added = [e for e in again if "control" in e and json.dumps(e) not in before]
    assert [e["control"] for e in added] == [name] and 0.2 <= added[0]["cpu_seconds"] < 0.8


@pytest.mark.parametrize("garbled", [False, True])
def test_one_command_does_the_whole_method_and_the_record_of_faults_changes_no_bit_of_it(
        post_run, taste, tmp_path, monkeypatch, garbled):
    """All stages in one go end with the bits of curating and post-training the saved pretraining, reward and all; with
    every clip's record of faults exchanged for another's, or for nonsense, too."""
    load = train.load_clips

    def exchanged(args):
        clips, *others = load(args)
        faults = [{k: v for k, v in clip.truth.items() if k.startswith("fault")} for clip in clips]
        assert any(faults[0].values()) and len(faults[0]) == len(FAULTS)
        faults = faults[1:] + [dict.fromkeys(faults[0], torch.tensor(math.nan))]
        return [Clip(c.name, c.frames, c.audio, c.truth | f) for c, f in zip(clips, faults)], *others
    if garbled:
        monkeypatch.setattr(train, "load_clips", exchanged)
    train.main([*TINY, "--steps", "6", "--out", str(tmp_path), *POST])
    for name in "state.pt", "curate.pt", "post.pt":
        assert_same_bits(post_run, tmp_path, name)
    one, other = ([e["components"] for e in logged(folder) if e.get("stage") == "post-training" and "parts" in e]
                  for folder in (post_run, tmp_path))
    assert one == other and len(one) == 4
    assert all(torch.equal(v, load_generator(tmp_path).state_dict()[k])
               for k, v in load_generator(post_run).state_dict().items())


def test_a_stopped_curation_and_a_stopped_post_training_go_on_bit_equal(post_run, run, taste, tmp_path, monkeypatch):
    """Ctrl-C in step 2 of curation, then in update 3, between its two gradient steps: each is finished and saved, and
    the resumed run ends with the same bits in weights, average, optimizers and best."""
    folder, calls = tmp_path / "half", []

    def interrupting(owner, name, at):
        whole, calls = getattr(owner, name), []

        def interrupted(self, *args):
            calls.append(whole(self, *args))
            if self.name != "pretraining" and len(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return calls[-1]
        return owner, name, interrupted
    for stop, words, flags in (
            (interrupting(train.FlowMatching, "take_step", 2), "step 2 of curation", ["--pretrained", str(run), *POST,
                                                                                    "--out", str(folder)]),
            (interrupting(train.PostTraining, "improve", 5), "update 3 of post-training", ["--resume", str(folder)])):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"stopped at {words}; go on with"):
            patch.setattr(*stop)
            train.main(flags)
    train.main(["--resume", str(folder)])
    for name in "state.pt", "curate.pt", "post.pt":
        assert_same_bits(post_run, folder, name)
    both = [[(e["stage"], e.get("step", e.get("update")), "watched" in e) for e in logged(of)
             if e.get("stage") in ("curation", "post-training")] for of in (post_run, folder)]
    assert both[0] == both[1]


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", str(tmp_path)])
    assert "holds no run; one that stopped before its first checkpoint starts anew" in capsys.readouterr().err


def test_a_finished_run_resumes_to_its_report_without_another_step(post_run, taste, tmp_path, monkeypatch):
    shutil.copytree(post_run, tmp_path / "run")
    monkeypatch.setattr(train.Stage, "advance", None)
    train.main(["--resume", str(tmp_path / "run")])
    for name in "state.pt", "curate.pt", "post.pt":
        assert_same_bits(post_run, tmp_path / "run", name)
    assert all(torch.equal(v, load_generator(tmp_path / "run").state_dict()[k])
               for k, v in load_generator(post_run).state_dict().items())


def test_what_an_earlier_run_left_in_the_folder_is_not_taken_up(post_run, cache, tmp_path):
    """A new run stopped before its post-training would otherwise be resumed with the old one's policy and control."""
    shutil.copytree(post_run, tmp_path / "again")
    train.main([*TINY, "--steps", "1", "--exemplars", "unused", "--overwrite", "--out", str(tmp_path / "again")])
    assert not {"post.pt", "curate.pt", "control"} & {p.name for p in (tmp_path / "again").iterdir()}


def test_the_checkpoint_is_chosen_by_lips_and_loses_by_too_much_motion_and_by_too_little():
    """By hand: lip_sync less .1 |log| of amplitude and motion; a head costs .05 log where it goes too far alone."""
    score = lambda **metrics: train.held_out_score({k: torch.tensor(v) for k, v in metrics.items()})
    right = dict(amplitude=[1.0, 1.0], motion=[0.5, 1.5], head=[0.9, 0.5])
    assert score(lip_sync=[0.9, 0.7], **right) == pytest.approx(0.8)
    assert score(mouth_own=[0.6], **right | {"amplitude": [0.5]}) == pytest.approx(0.6 - 0.1 * math.log(2))
    assert score(mouth_own=[0.6], **right | {"motion": [2.0]}) == pytest.approx(0.6 - 0.1 * math.log(2))
    assert score(mouth_own=[0.6], **right | {"head": [2.0, 2.0]}) == pytest.approx(0.6 - 0.05 * math.log(2))


def test_the_best_that_was_looked_at_is_kept_and_later_ones_are_not(run, judge, tmp_path, monkeypatch):
    """Held-out scores .5, .9, .8, .7, .6 at updates 0 .. 4: the average of update 1 it is."""
    scores, seen, look = iter([0.5, 0.9, 0.8, 0.7, 0.6]), [], train.Stage.look
    monkeypatch.setattr(train, "held_out_score", lambda metrics: next(scores))

    def noting(self, clips):
        seen.append({k: v.clone() for k, v in self.average.items()})
        return look(self, clips)
    monkeypatch.setattr(train.Stage, "look", noting)
    train.main(["--pretrained", str(run), "--out", str(tmp_path), *POST, "--looks", "4"])
    state = torch.load(tmp_path / "post.pt", weights_only=True)
    assert (state["update"], state["best"]["step"], state["best"]["score"]) == (4, 1, 0.9) and len(seen) == 5
    assert all(torch.equal(v, seen[1][k]) for k, v in load_generator(tmp_path).state_dict().items())


def test_what_chooses_the_checkpoint_is_watched_and_what_is_reported_is_not_and_neither_has_faults(cache):
    args = train.parse_arguments([*TINY, *POST, "--validate-clips", "3"])
    parts = train.load_clips(args)
    faulty = [{name for clip in clips for name in clip.truth if name.startswith("fault")} for clips in parts]
    assert faulty == [{f"fault_{name}" for name in FAULTS}, set(), set()]
    clips, reported, watched = ({clip.name for clip in clips} for clips in parts)
    assert len(clips) == 6 and len(reported) == 3 and len(watched) == 2
    assert not clips & reported and not clips & watched and not reported & watched
    flawless = train.load_clips(train.parse_arguments([*TINY, "--world", "flawless"]))[0]
    assert not any(name.startswith("fault") for clip in flawless for name in clip.truth)


def test_a_rollout_that_cannot_be_rescored_stops_the_run_at_once(run, judge, tmp_path, monkeypatch):
    rescore = train.grpo.rescore
    monkeypatch.setattr(train.grpo, "rescore", lambda model, rollout, settings: [
        part + 1e-4 for part in rescore(model, rollout, settings)])
    with pytest.raises(RuntimeError, match="does not repeat the rollout"):
        train.main(["--pretrained", str(run), "--out", str(tmp_path), *POST])


@pytest.mark.parametrize("more", [["--credit", "video", "--sampler", "flow-sde", "--group-noise", "different"],
                                  ["--sampler", "precise", "--parts", "1", "--kl-weight", "0"]])
def test_every_choice_of_the_algorithm_runs(run, judge, tmp_path, more):
    train.main(["--pretrained", str(run), "--out", str(tmp_path), *POST, "--updates", "1", *more])
    assert len(judge.asked) == 1 and len(judge.asked[0]) == 6


def test_sampling_with_noise_is_paired_and_reproducible(run):
    """The same noise for every arm: two runs agree, whatever stands in the batch beside a clip, and it is no ODE."""
    args = train.parse_arguments([*TINY, "--sampling-steps", "4", "--rollout-steps", "4"])
    model, clips = load_generator(run).eval(), train.load_clips(args)[1]
    both, one = (train.validate(model, list(clips)[:n], args, noisy=True)[1] for n in (2, 1))
    assert torch.allclose(both[:1], one, atol=1e-5)
    assert not torch.allclose(both, train.validate(model, clips, args)[1], atol=1e-3)


def test_post_training_samples_as_the_run_did_unless_told_otherwise(run, tmp_path):
    again = ["--pretrained", str(run), "--out", str(tmp_path)]
    assert train.parse_arguments(again).sampling_steps == 1
    for steps in 2, 3:                                # the default too, if it is asked for
        assert train.parse_arguments([*again, "--sampling-steps", f"{steps}"]).sampling_steps == steps


def first_updates(run, folder, *more):
    train.main(["--pretrained", str(run), "--out", str(folder), *POST, "--looks", "1", "--parts", "1", *more])
    return [e for e in logged(folder) if "parts" in e]


def test_micro_batches_save_memory_and_change_nothing_else(run, judge, tmp_path):
    """Six rollouts at once, or as 4 + 2: the same loss, gradient and statistics."""
    whole, split = (first_updates(run, tmp_path / n, "--updates", "1", "--micro-batch", n)[0]["parts"][0]
                    for n in ("6", "4"))
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert whole["grad_norm"] > 1e-4


def test_every_update_has_prompts_and_noise_of_its_own(run, judge, tmp_path):
    first_updates(run, tmp_path / "a")
    asked, judge.asked = judge.asked, []
    assert len({tuple(names) for names in asked}) > 1
    norms = [e["parts"][0]["grad_norm"] for e in first_updates(run, tmp_path / "b", "--post-lr", "0")]
    assert judge.asked == asked and len(set(norms)) == 4


def test_flags_choose_the_reward(cache):
    args = train.parse_arguments([*TINY, "--weights", "background=2,seams=0"])
    clips, _, _ = train.load_clips(args)
    make = lambda args: train.make_reward(args, None, clips, clips, args.config.chunk_frames)
    weights = {k: c.weight for k, c in COMPONENTS.items() if k[6:] not in ASPECTS and k != "seams"}
    assert make(args).weights == weights | {"background": 2.0}
    alone = make(train.parse_arguments([*TINY, "--reward-sync", "none"]))
    assert alone.sync is None and "sync" not in alone.weights
