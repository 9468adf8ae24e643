"""What sample.py promises: metrics are what they say, mouths against truth and loudness, the rest by hand;
the sound that was given comes out, and nothing given is harmed."""

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image
from scipy import linalg
from torchvision.transforms.functional import gaussian_blur

import reward
import sample
from data import Clip, write_video
from extras import score
from extras.files import MediaError
from extras.mouths import mouth_axis, mouth_opening_from_pixels
from extras.talkers import LIP_LEAD, render_talker
from model import estimate_pose, warp
from reward import COMPONENTS
from sample import (correlation, evaluate, frame_change, frechet, head_motion, head_spread, jerk, lip_offset,
                    psnr, seam_ratio, shifted_correlation, still_psnr, sync_metrics)
from tiny import ROOT, SPEECH, ffmpeg, random_generator, streams


@pytest.fixture(scope="module")
def clips(drawn) -> list[Clip]:
    return drawn[:16]


@pytest.fixture(scope="module")
def measured(clips) -> list[torch.Tensor]:
    """The open area of each clip's mouth, from pixels."""
    return [mouth_opening_from_pixels(clip.frames, clip.truth) for clip in clips]


def true_area(clip: Clip) -> torch.Tensor:
    return clip.truth["opening"] * clip.truth["width"]


def test_the_reader_sees_the_true_opening_of_drawn_talkers_even_when_blurred(clips, measured):
    soft = [mouth_opening_from_pixels(gaussian_blur(clip.frames / 255, 7, 0.7), clip.truth) for clip in clips]
    clear, blurred = (np.array([np.corrcoef(seen, true_area(clip))[0, 1] for seen, clip in zip(some, clips)])
                      for some in (measured, soft))
    assert clear.mean() > 0.98 and clear.min() > 0.9 and blurred.mean() > 0.97


def test_loudness_follows_the_lips_by_the_stated_lead(clips, measured):
    """Averaged over talkers, lips read from pixels correlate most with the loudness LIP_LEAD later."""
    curves = []
    for area, clip in zip(measured, clips):
        loud = clip.audio.view(-1, 160).square().mean(1).sqrt().add(2e-3).log().numpy()     # each 10 ms
        fine = np.interp(np.arange(len(loud)), np.arange(len(area)) * 4 + 1.5, area)
        shifted = [loud[20 + k:len(loud) - 20 + k] for k in range(-20, 21)]
        curves.append([np.corrcoef(fine[20:-20], later)[0, 1] for later in shifted])
    curve = np.mean(curves, 0)
    assert abs((curve.argmax() - 20) * 0.01 - LIP_LEAD) <= 0.02 and curve.max() > 0.5


def test_the_axis_of_a_mouth_is_the_direction_that_sound_moves_and_not_the_one_that_moves_most():
    torch.manual_seed(0)
    audio = torch.randn(3, 200 * 640) * torch.rand(3, 200).repeat_interleave(640, 1)
    loud = audio.unflatten(1, (200, 640)).square().mean(2).add(1e-3).log()
    mouth, light = torch.linalg.qr(torch.randn(60, 2)).Q.T
    boxes = loud[..., None] * mouth + 5 * torch.randn(3, 200, 1) * light + 0.05 * torch.randn(3, 200, 60)
    axis = mouth_axis(boxes, audio)
    assert correlation((boxes @ axis).flatten(), loud.flatten()) > 0.9
    assert abs(axis @ light) < 0.02 * abs(axis @ mouth)
    assert mouth_axis(boxes, torch.zeros_like(audio)).isfinite().all()


def test_correlation_is_pearson_s_over_the_frames_that_both_have_and_zero_for_what_never_moves():
    torch.manual_seed(0)
    a, b = torch.randn(2, 50)
    torch.testing.assert_close(correlation(a, b), torch.corrcoef(torch.stack([a, b]))[0, 1])
    assert correlation(a, torch.ones(50)) == 0 and correlation(torch.zeros(50), b) == 0
    later = torch.cat([torch.randn(4), a])[:50]                                     # a, four frames later
    assert shifted_correlation(later, a, 4) > 0.999 and abs(shifted_correlation(later, a, 0)) < 0.9
    assert shifted_correlation(a, later, -4) > 0.999
    assert lip_offset(later, a) == 4 and lip_offset(a, later) == -4 and lip_offset(torch.ones(50), a) == 0


def test_simple_metrics_equal_hand_computed_values():
    frames = torch.zeros(9, 3, 16, 16)
    level = lambda values: frames + values[:, None, None, None]
    assert psnr(frames, frames + 0.1).item() == pytest.approx(20, abs=1e-3)
    steady = level(torch.arange(9) / 100)                                           # brighter by 0.01 a frame
    assert frame_change(steady).item() == pytest.approx(0.01, abs=1e-6)
    assert jerk(steady).item() == pytest.approx(0, abs=1e-6)
    cubic = level(torch.arange(9) ** 3 / 1000)                                # third difference of n^3: 6
    assert jerk(cubic).item() == pytest.approx(0.006, abs=1e-6)
    stairs = level(torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 12]) / 100)
    assert seam_ratio(stairs, 4).item() == pytest.approx(3, abs=1e-4)
    assert seam_ratio(steady, 4).item() == pytest.approx(1, abs=1e-4)
    pose = torch.zeros(50, 6)
    pose[:, 0], pose[:, 3] = 0.03 * torch.randn(50), 0.04 * torch.randn(50)
    torch.testing.assert_close(head_motion(pose), (pose[:, 0].var() + pose[:, 3].var()).sqrt())
    portrait = torch.rand(3, 32, 32)
    frames = portrait.repeat(4, 1, 1, 1)
    frames[:, :, 8:, 8:24] = 0                                                  # the face is not background
    assert still_psnr(frames, portrait) > 90
    frames[:, :, :16, :4] += 0.1                                                # half of the compared pixels
    assert still_psnr(frames, portrait).item() == pytest.approx(20 + 10 * np.log10(2), abs=0.01)


@pytest.mark.parametrize("known", [True, False])
def test_the_truth_measures_as_the_truth_and_each_fault_shows_in_its_own_metric(clips, known):
    """True clips, frozen ones, the clips' neighbours, late ones, and clips whose head was moved by hand."""
    few = [clip if known else Clip(clip.name, clip.frames, clip.audio) for clip in clips[:4]]
    true, lips = torch.stack([clip.frames[:48] for clip in few]) / 255, "lip_correlation"
    own = evaluate(true, few, 4)
    for name in ("frame_change", "jerk_ratio", "amplitude"):
        torch.testing.assert_close(own[name], torch.ones(4))
    assert own["head"].mean().item() == pytest.approx(1, abs=1e-5) and (own["psnr"] > 99).all()
    assert (own["offset"] == 0).all() and (own[lips] > 0.99).all()
    frozen = evaluate(true[:, :1].repeat(1, 48, 1, 1, 1), few, 4)
    for name in ("frame_change", "jerk_ratio", "amplitude", lips):
        assert frozen[name].abs().max() < 1e-5
    assert frozen["head"].max() < 1e-3 and (frozen["still_psnr"] > 99).all()
    # Whose head it is does not count, only how far heads go: the same four videos are as lively together.
    other = evaluate(true.roll(1, 0), few, 4)
    torch.testing.assert_close(other["head"], own["head"].roll(1, 0))
    assert other[lips].mean() < 0.6 and (other["psnr"] < own["psnr"]).all()
    late = evaluate(true.roll(2, 1), few, 4)
    assert late["offset"].median() == 2 and (late[lips] < own[lips]).all()
    if not known:
        torch.testing.assert_close(own["over_late"], own["lip_correlation"] - own["late_correlation"])
        assert (own["over_late"] > 0.3).all() and (own["over_other"] > 0.3).all()
    pose = torch.zeros(48, 6)
    pose[:, 0] = 0.03 * torch.sin(torch.arange(48) / 5)
    swung = torch.stack([warp(portrait[None].repeat(48, 1, 1, 1), pose) for portrait in true[:, 0]])
    scale = torch.stack([head_motion(estimate_pose(video[None])[0]) for video in true]).mean()
    head = evaluate(swung, few, 4)["head"] * scale
    torch.testing.assert_close(head, pose[:, 0].std().expand(4), rtol=0.1, atol=0)


def test_takes_differ_as_much_as_they_are_wrong_where_the_truth_could_be_another():
    """Heads that were moved by hand, by a, b and c pixels: |a - b| over the mean of |a - c| and |b - c|."""
    def moved(*pixels):
        pose = torch.zeros(6, 6)
        pose[1:, 0] = torch.tensor(pixels) * 2 / 64
        return warp(portrait[None].repeat(6, 1, 1, 1), pose)[None]
    portrait = render_talker(3, 5, 64, 1).frames[0] / 255
    one, other, true = moved(0, 0, 1, 1, 0), moved(2, 1, 2, 0, 1), moved(0, 2, 0, 1, 2)
    apart, off = 2 + 1 + 1 + 1 + 1, (0 + 2 + 1 + 0 + 2 + 2 + 1 + 2 + 1 + 1) / 2
    assert head_spread(one, other, true).item() == pytest.approx(apart / off, abs=0.05)
    assert head_spread(one, one, true) == 0 and head_spread(one, other, other).item() == pytest.approx(2)


def fabricated(visual: torch.Tensor, sound: torch.Tensor) -> SimpleNamespace:
    """A network that has made up its mind: it returns these embeddings (B, W, D) whatever it is shown."""
    return SimpleNamespace(visual=lambda frames: visual, sound=lambda audio: sound,
                           parameters=lambda: iter([visual]))


def test_metrics_are_those_of_a_float64_loop_over_shifts_and_windows():
    """D_k = mean_i |v_i - a_(i+k)| over the i with both; least, median - least, -argmin and D_0."""
    torch.manual_seed(0)
    v, a = nnf.normalize(torch.randn(2, 3, 24, 8), dim=-1)
    found = sync_metrics(fabricated(v, a), torch.zeros(1), torch.zeros(1))
    for b in range(3):
        curve = {}
        for k in range(-15, 16):
            both = [i for i in range(24) if 0 <= i + k < 24]
            distances = [math.dist(v[b, i].double().tolist(), a[b, i + k].double().tolist()) for i in both]
            curve[k] = sum(distances) / len(both)
        least, middle = min(curve.values()), sorted(curve.values())[15]
        expected = {"sync_distance": least, "sync_confidence": middle - least, "sync_own": curve[0],
                    "sync_offset": -min(curve, key=curve.get)}
        for name, value in expected.items():
            assert found[name][b].item() == pytest.approx(value, abs=1e-5), name


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("n", [300, 5])
def test_frechet_of_gaussians_agrees_with_the_matrix_square_root_of_scipy(n):
    """Either way, also with fewer samples than dimensions, where no root is unique; 0 for equal sets."""
    torch.manual_seed(2)
    a, b = torch.randn(n, 6) @ torch.randn(6, 6), torch.randn(n, 6) @ torch.randn(6, 6) + 1
    A, B = a.double().T.cov(), b.double().T.cov()
    root = linalg.sqrtm(linalg.sqrtm(A.numpy()) @ B.numpy() @ linalg.sqrtm(A.numpy()))
    apart = (a.double().mean(0) - b.double().mean(0)).square().sum()
    want = apart + A.trace() + B.trace() - 2 * root.trace().real
    torch.testing.assert_close(frechet(a, b), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(frechet(a, b), frechet(b, a), rtol=1e-5, atol=1e-5)
    assert abs(frechet(a, a.flip(0))) < 1e-4


def test_a_video_is_scored_with_the_held_out_metrics_apart(tmp_path, capsys, monkeypatch, clips):
    """One that cannot be scored is named at the end, and does not keep the others from their scores."""
    monkeypatch.setattr("extras.score.synthetic_clips", lambda *a, **k: clips)
    write_video(tmp_path / "v.mp4", clips[0].frames, clips[0].audio)
    write_video(tmp_path / "odd.mp4", clips[0].frames, clips[0].audio)
    rate = reward.Judge.rate

    def choosy(self, frames, audio, names):
        if names[0].endswith("odd.mp4"):
            raise reward.Unrated(names[0], "no digit")
        return rate(self, frames, audio, names)

    monkeypatch.setattr(reward.Judge, "rate", choosy)
    write_video(tmp_path / "mute.mp4", torch.zeros(30, 3, 64, 64, dtype=torch.uint8), torch.zeros(30 * 640))
    with pytest.raises(MediaError, match="2 of 3 videos could not be .*mute.mp4: is silent.*no digit"):
        score.main([str(tmp_path / name) for name in ("mute.mp4", "odd.mp4", "v.mp4")])
    before, _, after = capsys.readouterr().out.partition("held out, no part of the reward:")
    assert all(name in before for name in (*COMPONENTS, "total")) and "sync_confidence" in after
    with pytest.raises(MediaError, match="nothing.mp4: does not exist"):
        score.main(["nothing.mp4"])
    with pytest.raises(MediaError, match="frames; lower --chunk-frames"):
        score.main([str(tmp_path / "v.mp4"), "--chunk-frames", "200"])


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """A generator of random weights, a portrait, and speech in the second track, beside a silent one."""
    folder = tmp_path_factory.mktemp("given")
    random_generator(folder / "run", 0)
    Image.linear_gradient("L").convert("RGB").save(folder / "face.png")
    ffmpeg("-f", "lavfi", "-i", "anullsrc", "-f", "lavfi", "-i", SPEECH, "-map", "0", "-map", "1", "-t", 1.3,
           "-ac", 2, "-c:a", "flac", folder / "speech.mkv")
    names = {"--checkpoint": "run", "--image": "face.png", "--audio": "speech.mkv"}
    return {flag: str(folder / name) for flag, name in names.items()}


def command(given: dict[str, str], *more: str) -> list[str]:
    return [word for pair in given.items() for word in pair] + ["--steps", "1", *more]


@pytest.mark.parametrize("out", ["A.MP4", "12:30/-50%d.mp4"])
def test_any_name_is_written_with_the_sound_that_was_chosen(given, out, tmp_path, monkeypatch, capsys):
    """The track with speech, as it was: FLAC, stereo. A message names it, and the flag for another."""
    monkeypatch.chdir(tmp_path)
    Path(out).parent.mkdir(exist_ok=True)
    sample.main(command(given, f"--out={out}"))
    assert "hears sound track 2 of 2; --track TRACK[:CHANNEL] chooses another" in capsys.readouterr().out
    assert re.search("flac.*48000 Hz, stereo", streams(out))
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / out))[0] == 33


def test_the_seed_and_the_seconds_are_obeyed(given, tmp_path):
    made = []
    for i, seed in enumerate("001"):
        out = tmp_path / f"{i}.mp4"
        sample.main(command(given, "--seed", seed, "--max-seconds", "0.5", "--out", str(out)))
        made.append(out.read_bytes())
    assert made[0] == made[1] != made[2]
    assert imageio_ffmpeg.count_frames_and_secs(str(out))[0] == 13


@pytest.mark.parametrize("name", ["source.mp4", "link.mp4"])
def test_what_exists_is_never_overwritten_not_even_by_a_link(given, name, tmp_path):
    (tmp_path / "source.mp4").write_bytes(b"an hour of work")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "source.mp4")
    with pytest.raises(MediaError, match="exists; choose another --out"):
        sample.main(command(given, "--out", f"{tmp_path}/{name}"))
    assert (tmp_path / "source.mp4").read_bytes() == b"an hour of work"


@pytest.mark.parametrize("flags, words", [
    ("--track 1", "is silent"), ("--track 3", "track 1 with 2 channels, track 2 with 2 channels"),
    ("--out no/a.mp4", "in no folder that can be written"), ("--crop 1,2", "x,y,size")])
def test_what_cannot_be_done_is_said_and_leaves_nothing(given, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((MediaError, OSError, SystemExit)) as caught:
        sample.main(command(given, "--out", "a.mp4", *flags.split()))
    assert words.lower() in f"{caught.value} {capsys.readouterr().err}".lower()
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_and_any_sign_is_spelled_out_in_any_encoding(given, tmp_path):
    """On a terminal that knows only ASCII, with a name that is no UTF-8 among the arguments."""
    odd = os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.mkv")
    Path(odd).write_bytes(Path(given["--audio"]).read_bytes())
    code = ("import sample, sys\nfrom extras.files import one_line\n"
            "with one_line('', ''):\n    print('0.1±0.2')\n    sample.main(sys.argv[1:])")
    arguments = command(given | {"--audio": odd}, "--out", str(tmp_path / "a.mp4"), "--track", "1")
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode and done.stdout.strip() == rb"0.1\xb10.2"
    assert done.stderr.count(b"\n") == 1 and rb"caf\udce9.mkv: is silent" in done.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_sigterm_leaves_nothing_behind(given, tmp_path):
    """Ten minutes of speech are on their way into a video."""
    ffmpeg("-f", "lavfi", "-i", SPEECH.replace("d=3", "d=600"), tmp_path / "long.wav")
    arguments = command(given | {"--audio": str(tmp_path / "long.wav")}, "--out", str(tmp_path / "a.mp4"))
    process = subprocess.Popen([sys.executable, "sample.py", *arguments], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True)
    while not [*tmp_path.glob(".writing-*/video.mp4")]:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.communicate(timeout=60)[1].rstrip().endswith("stopped; nothing was written")
    assert process.returncode == 1 and [path.name for path in tmp_path.iterdir()] == ["long.wav"]
