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
from data import SAMPLES_PER_FRAME, MediaError, fitting, load_speech, write_video
from extras.people import rate_whole
from extras.talkers import render_talker
from model import load_generator

TINY = ("--size 32 --width 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --mlp-width 32 --space-channels 6 "
        "--channels 8 --clips 6 --seconds 1 --validate-clips 2 --batch 2 --sampling-steps 1 --warmup 2 "
        "--updates 0 --judge none").split()


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
    train.main([*TINY, "--steps", "6", "--validate-every", "4", "--out", str(folder)])
    return folder


def weights(folder, name="state.pt"):
    state = torch.load(folder / name, weights_only=True)
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict | list):
            for k, v in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{prefix}.{k}", v)
        else:
            flat[prefix] = value
    walk("", state)
    return flat


def assert_same_bits(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys() and len(one) > 50
    for name, value in one.items():
        assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name], name


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
    with pytest.raises(SystemExit, match="stopped at step 4; go on with: python train.py --resume"):
        train.main([*TINY, "--steps", "6", "--validate-every", "4", "--out", str(tmp_path / "half")])
    monkeypatch.setattr(train, "optimizers", make)
    train.main(["--resume", str(tmp_path / "half")])
    assert_same_bits(run, tmp_path / "half")
    whole, half = ((folder / "report.md").read_text().partition("## Pretraining")
                   for folder in (run, tmp_path / "half"))
    assert whole[2] and whole[2] == half[2] and half[0].count("python train.py") == 2      # what it found, and how


def test_a_run_that_died_goes_on_from_its_last_checkpoint(run, tmp_path, monkeypatch):
    """Killed after step 5 with a checkpoint of step 4: step 5 is done again, and logged once."""
    advance = train.Pretraining.advance

    def dying(self, data):
        if self.step == 5:
            raise EOFError("power cut")
        return advance(self, data)
    monkeypatch.setattr(train.Pretraining, "advance", dying)
    folder = tmp_path / "dead"
    with pytest.raises(EOFError):
        train.main([*TINY, "--steps", "6", "--save-every", "4", "--validate-every", "4", "--out", str(folder)])
    monkeypatch.setattr(train.Pretraining, "advance", advance)
    train.main(["--resume", str(folder)])
    assert_same_bits(run, folder)
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_leaves_everything_it_names(run):
    names = {p.name for p in run.iterdir()}
    assert names == {"config.json", "model.safetensors", "state.pt", "log.jsonl", "sheet.png", "sample.mp4",
                     "portrait.png", "speech.wav", "held_out.json", "report.md", "pretraining.png",
                     "validation.png"}
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in entries if "held_out" in e] == [4, 6]
    measured = {"lip_sync", "offset", "amplitude", "psnr", "mouth_psnr", "motion", "head", "jerk_ratio", "still_psnr",
                "jerk", "seam", "sync_own", "sync_confidence", "identity"}
    assert set(entries[-2]["held_out"]) == measured and set(entries[0]["codec"]) == measured
    assert "rewarded" in entries[-1] and (run / "report.md").read_text().count("](pretraining.png)") == 1
    assert Image.open(run / "sheet.png").size == (12 * 32, 2 * 2 * 32)


def test_the_report_is_made_of_the_log_and_the_clips_values_alone(post_run, tmp_path):
    """Three arms whose lip_sync is known by hand: means, intervals and paired differences of two clips."""
    shutil.copytree(post_run, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        if path.name not in ("log.jsonl", "held_out.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    values = json.loads((post_run / "held_out.json").read_text())
    for arm, pair in {"pretrained": [0.2, 0.4], "control": [0.1, 0.3], "post-trained": [0.5, 0.9]}.items():
        values["ode"][arm]["lip_sync"] = pair
    (tmp_path / "copy" / "held_out.json").write_text(json.dumps(values))
    train.write_report(tmp_path / "copy")
    text = (tmp_path / "copy" / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| lip_sync |")).split(" | ")
    # 1.96 * std / sqrt(2) of two values is 1.96 * half their distance
    assert row[2:] == ["0.300±0.196", "0.700±0.392", "0.200±0.196", "0.400±0.196", "0.500±0.196 |"]
    for words in ("| seed | 0 |", "hardware", "CPU threads", "seconds an update, rollout", "minutes of post-training",
                  "post-trained minus control", "python train.py --pretrained", "more steps of pretraining", "kept"):
        assert words in text, words
    for name in ("rewards.png", "watched.png"):
        assert f"({name})" in text and Image.open(tmp_path / "copy" / name).size[0] > 300
    assert "pretraining.png" not in text                               # those steps are in the other run's report


def test_a_run_with_the_learned_codec_trains_it_first_keeps_it_and_animates(cache, tmp_path, monkeypatch):
    """Its stage has a log and a picture of its own; a run stopped before its first checkpoint of pretraining goes on
    without training the codec again, to the same bits; sample.py uses it."""
    learned = [*TINY, "--codec", "learned", "--codec-steps", "12", "--steps", "3"]
    train.main([*learned, "--out", str(tmp_path / "whole")])
    entries = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    stage = [e for e in entries if e.get("stage") == "codec"]
    assert [e["codec_step"] for e in stage] == list(range(1, 13)) and all(e["loss"] > 0 for e in stage)
    assert Image.open(tmp_path / "whole" / "codec.png").size == (12 * 32, 2 * 2 * 32)
    folder = tmp_path / "half"
    with monkeypatch.context() as patch:
        patch.setattr(train.Pretraining, "advance", lambda *_: (_ for _ in ()).throw(EOFError))
        with pytest.raises(EOFError):
            train.main([*learned, "--out", str(folder)])
    monkeypatch.setattr(train, "train_codec", None)
    train.main(["--resume", str(folder)])
    assert_same_bits(tmp_path / "whole", folder)
    assert sum('"codec_step"' in line for line in open(folder / "log.jsonl")) == 12
    out = tmp_path / "v.mp4"
    sample.main(["--checkpoint", str(folder), "--image", str(folder / "portrait.png"),
                 "--audio", str(folder / "speech.wav"), "--out", str(out)])
    assert out.stat().st_size > 1000


@pytest.mark.parametrize("wrong, words", [(["--codec", "neural"], "codec must be linear or learned, got 'neural'"),
                                          (["--codec-steps", "0"], "--codec-steps must be at least 1, got 0"),
                                          (["--codec", "learned", "--size", "60"], "size 60 must divide by 8")])
def test_a_codec_that_cannot_be_is_one_clear_line(wrong, words, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(wrong)
    assert words in capsys.readouterr().err


def test_the_seed_changes_the_run(run, cache, tmp_path):
    train.main([*TINY, "--steps", "6", "--validate-every", "4", "--seed", "1", "--out", str(tmp_path)])
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
    loss, bins = train.flow_matching_loss(velocity, data, args, step=7)
    total, by_bin = [], [[] for _ in bins]
    for b in range(2):
        for k in range(3):
            sigma, x = seen["sigma"][b, 0, k].item(), seen["noisy"][b, 0, k]
            origin = seen["context"][b, k]
            noise = (x - (1 - sigma) * origin) / sigma
            total.append(min(sigma / 0.2, 1) ** 2 * ((noise - origin) ** 2).mean().item())
            by_bin[int(sigma * len(bins))].append(total[-1])
    assert math.isclose(loss.item(), sum(total) / 6, rel_tol=1e-4)
    for value, members in zip(bins.tolist(), by_bin):
        assert math.isclose(value, sum(members) / len(members), rel_tol=1e-4) if members else math.isnan(value)


@pytest.mark.parametrize("wrong", ["--steps 0", "--preset huge", "--crop 1,2", "--seconds 0.5", "--grid 4",
                                   "--resume nowhere", "--batch -1", "--prediction noise", "--size 66",
                                   "--window 0", "--seed -1", "--device gpu", "--ema 1", "--seconds nan",
                                   "--resume . --steps 9", "--crop 0,0,0", "--out train.py", "--weights still",
                                   "--group 1", "--draws 5", "--noise-level 2", "--parts 0", "--post-ema 1",
                                   "--control --updates 0", "--pretrained nowhere --out x", "--pretrained .",
                                   "--seed 9999999999999999999", "--batch 10000000000", "--seconds 1e30", "--clip inf",
                                   "--width 1000000000", "--grad-clip 0", "--crop 0,0,32", "--out tests"])
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
    with train.alone(tmp_path / "run"), pytest.raises(MediaError), train.alone(tmp_path / "run"):
        pass
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in run.iterdir()}


@pytest.mark.parametrize("full", ["model.safetensors", "state.pt"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(run, tmp_path, full):
    """The system refuses to let a file grow: one line that names it, and every byte that stood there still stands."""
    shutil.copytree(run, tmp_path / "run")
    old = (tmp_path / "run" / full).read_bytes()
    args = train.parse_arguments(["--resume", str(tmp_path / "run")])
    again = train.Pretraining(train.Generator(args.config), args)
    again.load(tmp_path / "run")
    size, limits = (tmp_path / "run" / full).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limits[1]))
    try:
        with pytest.raises(MediaError, match=f"{full}: cannot be written .*make room there") as error:
            again.save(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "\n" not in str(error.value) and (tmp_path / "run" / full).read_bytes() == old
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in run.iterdir()}


def test_a_log_that_was_cut_short_loses_its_last_line_alone(run, tmp_path):
    text = (run / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text + '{"seconds": 3.1, "st')
    train.Log(tmp_path, 6, 0.0)
    assert (tmp_path / "log.jsonl").read_text() == text


@pytest.mark.parametrize("stage, words", [("load_clips", "before the first checkpoint, so nothing was kept"),
                                          ("pretrain_longer", "go on with: python train.py --resume"),
                                          ("report", "go on with: python train.py --resume")])
def test_ctrl_c_says_how_to_go_on_wherever_it_comes(run, judge, cache, tmp_path, monkeypatch, stage, words):
    """In preparation, in the control and while measuring; the steps between have tests of their own."""
    def interrupt(*_):                               # a signal may be ignored where tests run in the background
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, stage, interrupt)
        with pytest.raises(SystemExit, match=words):
            train.main(["--pretrained", str(run), "--out", str(tmp_path / "run"), *POST, "--updates", "1", "--control"])
    if stage == "report":
        train.main(["--resume", str(tmp_path / "run")])
        assert (tmp_path / "run" / "report.md").exists()


CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                        "tried to allocate 8000000000 bytes.\nError code 12")


@pytest.mark.parametrize("full", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), CPU_FULL, MemoryError()])
@pytest.mark.parametrize("owner, name, words", [
    (train.Pretraining, "advance", "pretraining: does not fit into memory; lower --batch"),
    (train.PostTraining, "advance", "post-training: does not fit into memory; lower --micro-batch"),
    (train, "report", "measuring: does not fit into memory; lower --validate-clips")])
def test_too_little_memory_is_one_line_that_says_what_to_lower(cache, tmp_path, monkeypatch, owner, name, words, full):
    def fail(*_):
        raise full
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(MediaError, match=words) as error:
        train.main([*TINY, *POST, "--steps", "1", "--updates", "1", "--out", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_a_judge_that_does_not_fit_says_so_and_other_errors_stay_what_they_are():
    class Big:
        window, readouts = None, ()

        def rate(self, *_):
            raise CPU_FULL
    with pytest.raises(MediaError, match="the judge: does not fit into memory; lower --judge-batch"):
        rate_whole(Big(), torch.zeros(1, 8, 3, 32, 32), torch.zeros(1, 8 * SAMPLES_PER_FRAME), ["clip"])
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


def test_a_folder_of_clips_trains_and_resumes(cache, tmp_path):
    """--data: drawn talkers written as videos; the metrics are those of real clips, which have no truth."""
    videos = tmp_path / "clips"
    videos.mkdir()
    for i in range(12):
        clip = render_talker(i, 7, 32, 30)
        write_video(videos / f"{i}.mp4", clip.frames, clip.audio)
    flags = TINY[:TINY.index("--clips")] + TINY[TINY.index("--clips") + 2:]
    train.main([*flags, "--data", str(videos), "--crop", "0,0,32", "--steps", "1", "--out", str(tmp_path / "run")])
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"mouth_own", "mouth_late", "over_late", "amplitude", "offset"} <= set(entries[-2]["held_out"])
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


# ---------------------------------------------------------------- post-training

POST = ("--updates 4 --prompts 2 --group 3 --rollout-steps 3 --draws 1 --micro-batch 2 --watch-every 2 --watch-clips 2 "
        "--post-lr 1e-3").split()


class Brightness:
    """A reward with the interface of reward.Reward that anyone can compute: bright frames, and bright last ones."""

    def __init__(self):
        self.weights, self.floors, self.asked = {"bright": 1.0, "end": 0.5}, {}, []

    def resemble(self, clips, codec):
        """Hold nothing against real clips."""

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
    judge = Brightness()
    monkeypatch.setattr(train, "make_reward", lambda *args: judge)
    return judge


def post_weights(folder):
    flat = weights(folder, "post.pt")
    assert flat.pop(".cpu_seconds") > 0
    return flat


@pytest.fixture(scope="module")
def post_run(run, tmp_path_factory):
    """The finished run, post-trained for four updates with the control beside it, and the folder that it left."""
    folder = tmp_path_factory.mktemp("runs") / "post"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_reward", lambda *args: Brightness())
        train.main(["--pretrained", str(run), "--out", str(folder), "--control", *POST])
    return folder


def test_post_training_leaves_its_arms_and_logs_every_update(post_run, run):
    """The reference stands in pretrained/, the control in control/, the best policy on top; each measured twice."""
    entries = [json.loads(line) for line in (post_run / "log.jsonl").read_text().splitlines()]
    updates = [e for e in entries if "parts" in e]
    assert [e["update"] for e in updates] == [1, 2, 3, 4]
    assert [e["update"] for e in entries if "watched" in e] == [0, 2, 4]
    for entry in updates:
        first, second = entry["parts"]
        assert set(entry["components"]) == {"bright", "end", "total"} and entry["seconds_for"].keys() == {
            "rollout", "reward", "update"}
        assert abs(first["ratio_max"][0] - 1) <= 1e-6 < abs(second["ratio_max"][0] - 1)          # 1, then off 1
        assert first["grad_norm"] > 0 and second["clip_high"] + second["clip_low"] > 0
        assert entry["sigma"] == pytest.approx(2 / 3)
    arms = [(e["arm"], e["sampler"]) for e in entries if "arm" in e]
    assert sorted(arms) == sorted((a, s) for a in ("pretrained", "post-trained", "control") for s in ("ode", "cps"))
    control = next(e for e in entries if "control_steps" in e)
    spent = torch.load(post_run / "post.pt", weights_only=True)["cpu_seconds"]
    assert control["control_steps"] >= 1 and spent <= control["cpu_seconds"] < spent + 0.25
    values = json.loads((post_run / "held_out.json").read_text())
    assert len(values["cps"]["control"]["lip_sync"]) == 2
    assert Image.open(post_run / "sheet.png").size == (12 * 32, 2 * 4 * 32)
    for name, value in load_generator(run).state_dict().items():
        assert torch.equal(load_generator(post_run / "pretrained").state_dict()[name], value)
    assert not torch.equal(load_generator(post_run / "control").no_audio, load_generator(run).no_audio)


def test_one_command_does_the_whole_method(post_run, judge, tmp_path):
    """Pretraining and post-training in one go end with the bits of post-training the saved pretraining."""
    train.main([*TINY, "--steps", "6", "--out", str(tmp_path), *POST])
    one, other = post_weights(post_run), post_weights(tmp_path)
    assert all(torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k] for k, v in one.items())
    assert all(torch.equal(v, load_generator(tmp_path).state_dict()[k])
               for k, v in load_generator(post_run).state_dict().items())


def test_a_stopped_post_training_goes_on_bit_equal(post_run, run, judge, tmp_path, monkeypatch):
    """Ctrl-C in update 3, between its two gradient steps: the update is finished and saved, and the resumed run ends
    with the same bits in policy, average, optimizer and best."""
    improve, calls = train.PostTraining.improve, []

    def interrupted(self, *args):
        calls.append(improve(self, *args))
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return calls[-1]
    monkeypatch.setattr(train.PostTraining, "improve", interrupted)
    folder = tmp_path / "half"
    with pytest.raises(SystemExit, match="stopped at update 3; go on with: python train.py --resume"):
        train.main(["--pretrained", str(run), "--out", str(folder), *POST])
    train.main(["--resume", str(folder)])
    one, other = post_weights(post_run), post_weights(folder)
    assert one.keys() == other.keys() and len(one) > 100
    for name, value in one.items():
        assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name], name
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [e["update"] for e in logged if "parts" in e] == [1, 2, 3, 4]
    assert_same_bits(post_run, folder)                                # pretraining's state, untouched


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", str(tmp_path)])
    assert "holds no run; one that stopped before its first checkpoint starts anew" in capsys.readouterr().err


def test_a_finished_run_resumes_to_its_report_without_another_update(post_run, judge):
    before = post_weights(post_run)
    train.main(["--resume", str(post_run)])
    assert not judge.asked
    after = post_weights(post_run)
    assert all(torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in before.items())


def test_what_an_earlier_run_left_in_the_folder_is_not_taken_up(post_run, cache, tmp_path):
    """A new run stopped before its post-training would otherwise be resumed with the old one's policy and control."""
    shutil.copytree(post_run, tmp_path / "again")
    train.main([*TINY, "--steps", "1", "--out", str(tmp_path / "again")])
    assert not {"post.pt", "control/config.json"} & {str(p.relative_to(tmp_path / "again"))
                                                     for p in (tmp_path / "again").rglob("*")}


def test_the_checkpoint_is_chosen_by_lips_and_loses_by_too_much_motion_and_by_too_little():
    """By hand: lip_sync less .1 |log| of amplitude and motion; a head costs .05 log where it goes too far alone."""
    score = lambda **metrics: train.held_out_score({k: torch.tensor(v) for k, v in metrics.items()})
    right = dict(amplitude=[1.0, 1.0], motion=[0.5, 1.5], head=[0.9, 0.5])
    assert score(lip_sync=[0.9, 0.7], **right) == pytest.approx(0.8)
    assert score(mouth_own=[0.6], **right | {"amplitude": [0.5]}) == pytest.approx(0.6 - 0.1 * math.log(2))
    assert score(mouth_own=[0.6], **right | {"motion": [2.0]}) == pytest.approx(0.6 - 0.1 * math.log(2))
    assert score(mouth_own=[0.6], **right | {"head": [2.0, 2.0]}) == pytest.approx(0.6 - 0.05 * math.log(2))


def test_patience_ends_a_post_training_that_helps_nobody_and_the_best_is_kept(run, judge, tmp_path, monkeypatch):
    """Held-out scores 0.5, 0.9, 0.8, 0.7 ... at updates 0, 1, 2, ...: stop two updates after the best, keep it."""
    looks = iter([0.5, 0.9, 0.8, 0.7, 0.6])
    kept = []
    monkeypatch.setattr(train, "held_out_score", lambda metrics: next(looks))
    watch = train.PostTraining.watch

    def noting(self, clips):
        kept.append({k: v.clone() for k, v in self.average.items()})
        return watch(self, clips)
    monkeypatch.setattr(train.PostTraining, "watch", noting)
    train.main(["--pretrained", str(run), "--out", str(tmp_path), *POST, "--updates", "9", "--watch-every", "1",
                "--patience", "2"])
    state = torch.load(tmp_path / "post.pt", weights_only=True)
    assert (state["update"], state["best"]["update"], state["best"]["score"]) == (3, 1, 0.9)
    assert all(torch.equal(v, kept[1][k]) for k, v in load_generator(tmp_path).state_dict().items())


def test_what_chooses_the_checkpoint_is_watched_and_what_is_reported_is_not(cache):
    args = train.parse_arguments([*TINY, *POST, "--validate-clips", "3"])
    clips, reported, watched = ({clip.name for clip in clips} for clips in train.load_clips(args))
    assert len(clips) == 6 and len(reported) == 3 and len(watched) == 2
    assert not clips & reported and not clips & watched and not reported & watched


def test_a_rollout_that_cannot_be_rescored_stops_the_run_at_once(run, judge, tmp_path, monkeypatch):
    rescore = train.grpo.rescore
    monkeypatch.setattr(train.grpo, "rescore", lambda model, rollout, settings: [
        part + 1e-4 for part in rescore(model, rollout, settings)])
    with pytest.raises(RuntimeError, match="does not repeat the rollout"):
        train.main(["--pretrained", str(run), "--out", str(tmp_path), *POST])


@pytest.mark.parametrize("more", [["--credit", "chunk", "--ratio", "guard", "--kl", "closed"],
                                  ["--sampler", "flow-sde", "--group-noise", "different", "--normalise", "max-group"],
                                  ["--sampler", "precise", "--draw-at", "sliding", "--parts", "1", "--kl-weight", "0"]])
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
    train.main(["--pretrained", str(run), "--out", str(folder), *POST, "--parts", "1", *more])
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "parts" in e]


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
    args = train.parse_arguments([*TINY, "--weights", "still=2,seam=0"])
    clips, _, _ = train.load_clips(args)
    reward = train.make_reward(args, clips, args.config.chunk_frames)
    assert reward.judge is None and reward.weights == {"sync": 2.0, "still": 2.0, "identity": 0.25, "drift": 0.5,
                                                       "activity": 0.5, "jerk": 0.5, "flicker": 0.25}
    alone = train.make_reward(train.parse_arguments([*TINY, "--reward-sync", "none"]), clips, args.config.chunk_frames)
    assert alone.sync is None and "sync" not in alone.weights


def test_a_reward_of_your_own_is_a_component_like_the_others(run, tmp_path, monkeypatch):
    """README's example: it is logged, and counts in the advantage."""
    text = (Path(train.__file__).parent / "README.md").read_text()
    example = text.split("import reward, train")[1].split("reward.Reward = Mine")[0]
    names = {"reward": reward, "train": train}
    monkeypatch.setattr(reward, "Reward", reward.Reward)                             # undone after the test
    exec(example, names)
    reward.Reward = names["Mine"]
    train.main(["--pretrained", str(run), "--updates", "1", "--prompts", "2", "--group", "2", "--watch-clips", "2",
                "--judge", "none", "--out", str(tmp_path)])
    update = next(e for e in map(json.loads, open(tmp_path / "log.jsonl")) if "parts" in e)
    assert update["components"]["warmth"]["group_std"] > 0


def test_a_judge_of_your_own_is_asked(cache, monkeypatch):
    """README's example: its ratings are components, and what needs readouts is left out."""
    text = (Path(train.__file__).parent / "README.md").read_text()
    example = text.split("import reward, torch, train")[1].split("reward.make_judge =")[0]
    names = {"reward": reward, "torch": torch}
    exec(example, names)
    monkeypatch.setattr(reward, "make_judge", lambda args: names["MyJudge"]())
    args = train.parse_arguments(TINY)
    clips, _, _ = train.load_clips(args)
    mine, frames = train.make_reward(args, clips, args.config.chunk_frames), train.pixels(clips[:2], 16)
    scores = mine(frames, torch.zeros(2, 16 * 640), frames[:, 0], ["a", "b"])
    torch.testing.assert_close(scores.components["motion"], 1 + 4 * frames[:, -1].mean((1, 2, 3)))
    assert "lip_course" not in scores.components
