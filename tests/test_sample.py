"""What sample.py promises of its metrics: the pixel oracle against truth, loudness and blur; the rest by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from scipy import linalg

import sample
from data import Clip, MediaError, write_video
from extras.talkers import LIP_LEAD, render_talker
from model import estimate_pose, warp
from reward import COMPONENTS
from sample import (correlation, evaluate, frechet, head_motion, jerk, lip_sync_correlation, motion, mouth_axis,
                    mouth_boxes, mouth_opening_from_pixels, psnr, seam, shifted_correlation, still_psnr, sync_metrics,
                    sync_offset)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Thirty-two talkers of two seconds, 64 pixels."""
    return [render_talker(i, 5, 64, 50) for i in range(32)]


@pytest.fixture(scope="module")
def measured(clips):
    """The open area of each clip's mouth, from pixels."""
    return [mouth_opening_from_pixels(c.frames, c.truth).numpy() for c in clips]


def loudness(audio: torch.Tensor, hop: int) -> np.ndarray:
    """Log of the rms of each hop: knows nothing of phones or lips."""
    return audio.view(-1, hop).square().mean(1).sqrt().add(2e-3).log().numpy()


def lips_to_sound(signal: np.ndarray, audio: torch.Tensor) -> np.ndarray:
    """Correlate a signal per frame with loudness delayed by -200..200 ms. Returns: 41 values, one each 10 ms."""
    loud = loudness(audio, 160)
    fine = np.interp(np.arange(len(loud)), np.arange(len(signal)) * 4 + 1.5, signal)
    return np.array([np.corrcoef(fine[20:-20], loud[20 + k:len(loud) - 20 + k])[0, 1] for k in range(-20, 21)])


def test_correlation_is_pearson_s_and_zero_for_what_never_moves():
    torch.manual_seed(0)
    a, b = torch.randn(2, 50)
    torch.testing.assert_close(correlation(a, b), torch.corrcoef(torch.stack([a, b]))[0, 1])
    assert correlation(a, torch.ones(50)) == 0 and correlation(torch.zeros(50), b) == 0


def test_loudness_follows_the_lips_by_the_stated_lead(clips, measured):
    """Averaged over talkers, lips read from pixels correlate most with the loudness LIP_LEAD later."""
    curve = np.mean([lips_to_sound(m, c.audio) for m, c in zip(measured, clips)], 0)
    assert abs((curve.argmax() - 20) * 0.01 - LIP_LEAD) <= 0.02 and curve.max() > 0.5


@pytest.mark.parametrize("n", [-3, 2])
def test_shifting_the_sound_by_n_frames_moves_the_measured_offset_by_n(clips, measured, n):
    def offset(shift):
        curves = [lips_to_sound(m, c.audio.roll(shift * 640)) for m, c in zip(measured, clips)]
        return (np.mean(curves, 0).argmax() - 20) / 4
    assert abs(offset(n) - offset(0) - n) <= 0.5


def test_the_oracle_reads_the_true_opening_from_pixels_even_when_blurred(clips):
    tap = torch.exp(-torch.arange(-3, 4.0).square() / (2 * 0.7**2))
    kernel = (tap[:, None] * tap / tap.sum() ** 2).expand(3, 1, 7, 7)
    clear = torch.stack([lip_sync_correlation(c.frames, c.truth) for c in clips])
    soften = lambda x: nnf.conv2d(x / 255, kernel, padding=3, groups=3)
    blurred = torch.stack([lip_sync_correlation(soften(c.frames), c.truth) for c in clips])
    assert clear.mean() > 0.98 and clear.min() > 0.9 and blurred.mean() > 0.97


def test_the_oracle_says_nothing_for_a_frozen_face_and_little_for_another_mouth(clips):
    a = clips[0]
    frozen = a.frames[:1].expand_as(a.frames)
    assert lip_sync_correlation(frozen, a.truth) == 0 and mouth_opening_from_pixels(frozen, a.truth).std() < 1e-6
    assert lip_sync_correlation(a.frames.flip(0), a.truth) < 0.6
    swap = lambda c, d: c.truth | {k: d.truth[k] for k in ("opening", "width")}
    strangers = torch.stack([lip_sync_correlation(c.frames, swap(c, d)) for c, d in zip(clips, clips[1:])])
    assert strangers.mean() < 0.4


def test_the_oracle_does_not_care_where_the_head_is(clips):
    """Moving the whole picture by two pixels (3% of the frame) leaves the measured area where it was."""
    for clip in clips[:10]:
        a, b = (mouth_opening_from_pixels(x, clip.truth) for x in (clip.frames, clip.frames.roll((2, -2), (2, 3))))
        assert (a - b).abs().max() < 0.25 * a.max()


# ---------------------------------------------------------------- metrics of any clip

def test_shifting_one_signal_by_n_frames_moves_the_measured_offset_by_n(clips, measured):
    """The mouth read from pixels against the true mouth, whose sound comes n frames earlier or later: n is found."""
    for n in (-5, -2, 0, 3):
        found = []
        for clip, area in zip(clips, measured):
            truth = (clip.truth["opening"] * clip.truth["width"]).roll(-n)          # the truth leads by n frames
            found.append(sync_offset(torch.as_tensor(area), truth).item())
        assert np.median(found) == n and np.mean(np.array(found) == n) > 0.9


def test_shifted_correlation_compares_the_frames_that_both_have():
    a = torch.randn(30)
    later = torch.cat([torch.randn(4), a])[:30]                                     # a, four frames later
    assert shifted_correlation(later, a, 4) > 0.999 and abs(shifted_correlation(later, a, 0)) < 0.9
    assert shifted_correlation(a, later, -4) > 0.999


def test_simple_metrics_equal_hand_computed_values():
    frames = torch.zeros(9, 3, 16, 16)
    assert psnr(frames, frames + 0.1).item() == pytest.approx(20, abs=1e-3)
    steady = frames + torch.arange(9.0)[:, None, None, None] / 100                  # brighter by 0.01 a frame
    assert motion(steady).item() == pytest.approx(0.01, abs=1e-6)
    assert jerk(steady).item() == pytest.approx(0, abs=1e-6)
    cubic = frames + (torch.arange(9.0) ** 3)[:, None, None, None] / 1000           # third difference of n^3 is 6
    assert jerk(cubic).item() == pytest.approx(0.006, abs=1e-6)
    stairs = frames + torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 12.0])[:, None, None, None] / 100
    assert seam(stairs, 4).item() == pytest.approx(3, abs=1e-4) and seam(steady, 4).item() == pytest.approx(1, abs=1e-4)


def test_still_psnr_sees_the_background_and_not_the_face():
    portrait = torch.rand(3, 32, 32)
    frames = portrait.repeat(4, 1, 1, 1)
    frames[:, :, 8:, 8:24] = 0
    assert still_psnr(frames, portrait) > 90
    frames[:, :, :16, :4] += 0.1                                                    # half of the compared pixels
    assert still_psnr(frames, portrait).item() == pytest.approx(20 + 10 * np.log10(2), abs=0.01)


def test_mouth_motion_follows_the_true_mouth_of_clips_whose_truth_it_is_not_told(clips):
    """The metric for real clips, tried where truth is known: along an axis fitted to other clips of the same talker."""
    own = render_talker(3, 5, 64, 300)
    frames, true = own.frames / 255, own.truth["opening"] * own.truth["width"]
    axis = mouth_axis(mouth_boxes([frames[:150]]), own.audio[None, :150 * 640])
    assert correlation(mouth_boxes([frames[150:]])[0] @ axis, true[150:]) > 0.8
    frozen = frames[:1].repeat(150, 1, 1, 1)
    assert (mouth_boxes([frozen]) @ axis).abs().max() < 1e-6


def test_the_axis_of_a_mouth_is_the_direction_that_sound_moves_and_not_the_one_that_moves_most():
    torch.manual_seed(0)
    audio = torch.randn(3, 200 * 640) * torch.rand(3, 200).repeat_interleave(640, 1)
    loud = audio.unflatten(1, (200, 640)).square().mean(2).add(1e-3).log()
    mouth, light = torch.linalg.qr(torch.randn(60, 2)).Q.T
    boxes = loud[..., None] * mouth + 5 * torch.randn(3, 200, 1) * light + 0.05 * torch.randn(3, 200, 60)
    axis = mouth_axis(boxes, audio)
    signal = boxes @ axis
    assert correlation(signal.flatten(), loud.flatten()) > 0.9
    assert abs(axis @ light) < 0.02 * abs(axis @ mouth)
    assert mouth_axis(boxes, torch.zeros_like(audio)).isfinite().all()


def test_head_motion_is_the_deviation_of_the_shift():
    pose = torch.zeros(50, 6)
    pose[:, 0], pose[:, 3] = 0.03 * torch.randn(50), 0.04 * torch.randn(50)
    assert head_motion(pose).item() == pytest.approx((pose[:, 0].var() + pose[:, 3].var()).sqrt().item(), rel=1e-5)


def test_the_truth_measures_as_the_truth_and_each_fault_shows_in_its_own_metric(clips):
    """`sample.evaluate` of true clips, of the clips' neighbours, frozen, and of clips whose head was moved by hand."""
    few = clips[:4]
    true = torch.stack([clip.frames[:48] for clip in few]) / 255
    own = evaluate(true, few, 4)
    for name in ("motion", "jerk_ratio", "amplitude"):
        torch.testing.assert_close(own[name], torch.ones(4))
    assert own["head"].mean().item() == pytest.approx(1, abs=1e-5) and (own["psnr"] > 99).all()
    assert (own["offset"] == 0).all() and (own["lip_sync"] > 0.99).all()
    frozen = evaluate(true[:, :1].repeat(1, 48, 1, 1, 1), few, 4)
    for name in ("motion", "jerk_ratio", "amplitude", "lip_sync"):
        assert frozen[name].abs().max() < 1e-5
    assert frozen["head"].max() < 1e-3 and (frozen["still_psnr"] > 99).all()
    # Whose head it is does not count, only how far heads go: the same four videos among themselves are as lively.
    other = evaluate(true.roll(1, 0), few, 4)
    torch.testing.assert_close(other["head"], own["head"].roll(1, 0))
    assert other["lip_sync"].mean() < 0.6 and (other["psnr"] < own["psnr"]).all()
    pose = torch.zeros(48, 6)
    pose[:, 0] = 0.03 * torch.sin(torch.arange(48) / 5)
    swung = torch.stack([warp(portrait[None].repeat(48, 1, 1, 1), pose) for portrait in true[:, 0]])
    scale = torch.stack([head_motion(estimate_pose(video[None])[0]) for video in true]).mean()
    torch.testing.assert_close(evaluate(swung, few, 4)["head"] * scale, pose[:, 0].std().expand(4), rtol=0.1, atol=0)


# ---------------------------------------------------------------- the metrics of a sync network

def fabricated(visual: torch.Tensor, sound: torch.Tensor) -> SimpleNamespace:
    """A network that has made up its mind: it returns these embeddings (B, W, D) whatever it is shown."""
    return SimpleNamespace(visual=lambda frames: visual, sound=lambda audio: sound)


def test_metrics_are_those_of_a_float64_loop_over_shifts_and_windows():
    """D_k = mean_i |v_i - a_(i+k)| over the i with both; least, median - least, -argmin and D_0."""
    torch.manual_seed(0)
    v, a = nnf.normalize(torch.randn(2, 3, 24, 8), dim=-1)
    found = sync_metrics(fabricated(v, a), None, None)
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


@pytest.mark.parametrize("late", [-7, 0, 4, 15])
def test_offset_is_positive_when_the_picture_comes_after_its_sound(late):
    """Orthogonal moments: what is heard in window i is seen in window i + late. Then D is 0 there and sqrt 2 elsewhere,
    by hand, so distance 0, confidence sqrt 2, offset `late`."""
    moments = torch.eye(80)[None]
    seen, heard = moments[:, 20 - late : 50 - late], moments[:, 20:50]
    found = sync_metrics(fabricated(seen, heard), None, None)
    assert found["sync_offset"].item() == late
    assert found["sync_distance"].item() == 0
    assert found["sync_confidence"].item() == pytest.approx(math.sqrt(2))
    assert found["sync_own"].item() == pytest.approx(math.sqrt(2) if late else 0)


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    """With covariances diag(s^2), diag(t^2) and means m apart it is |m|^2 + sum (s - t)^2, and 0 for equal sets."""
    torch.manual_seed(1)
    x = torch.randn(500, 4, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T                 # exactly zero mean, unit covariance
    s, t, m = torch.rand(3, 4, dtype=torch.float64) + 0.5
    torch.testing.assert_close(frechet(x * s, x * t + m), m.square().sum() + (s - t).square().sum())
    assert abs(frechet(x, x.flip(0)).item()) < 1e-9


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_frechet_of_any_gaussians_agrees_with_the_matrix_square_root_of_scipy():
    """Also either way round, and where there are fewer samples than dimensions, so that no root is unique."""
    torch.manual_seed(2)
    for n in 300, 5:
        a, b = torch.randn(n, 6) @ torch.randn(6, 6), torch.randn(n, 6) @ torch.randn(6, 6) + 1
        A, B = a.double().T.cov(), b.double().T.cov()
        root = linalg.sqrtm(linalg.sqrtm(A.numpy()) @ B.numpy() @ linalg.sqrtm(A.numpy()))
        want = (a.double().mean(0) - b.double().mean(0)).square().sum() + A.trace() + B.trace() - 2 * root.trace().real
        torch.testing.assert_close(frechet(a, b), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(frechet(a, b), frechet(b, a), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the command line

def test_a_video_is_scored_with_the_held_out_metrics_apart(tmp_path, capsys, monkeypatch, clips):
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("extras.talkers.synthetic_clips", lambda *a, **k: clips)
    write_video(tmp_path / "v.mp4", clips[0].frames, clips[0].audio)
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(MediaError, match="1 of 2 videos could not be scored: .*broken.mp4: is not audio or video"):
        sample.main(["--score", str(tmp_path / "broken.mp4"), str(tmp_path / "v.mp4")])
    said = capsys.readouterr().out
    before, _, after = said.partition("held out, no part of the reward:")
    assert all(name in before for name in (*COMPONENTS, "total")) and "sync_confidence" in after


def test_a_clip_that_cannot_be_scored_is_named(tmp_path):
    write_video(tmp_path / "mute.mp4", torch.zeros(30, 3, 64, 64, dtype=torch.uint8), torch.zeros(30 * 640))
    with pytest.raises(MediaError, match="mute.mp4: is silent"):
        sample.main(["--score", str(tmp_path / "mute.mp4")])
    with pytest.raises(MediaError, match="nothing.mp4: does not exist"):
        sample.main(["--score", "nothing.mp4"])


@pytest.mark.parametrize("flag", [
    ["--size", "8"], ["--size", "1e3"], ["--weights", "beauty=1"], ["--weights", "seam=-1"], ["--weights", "seam"],
    ["--judge-dtype", "float8"], ["--seed", "9999999999999999999"]])
def test_bad_flags_of_a_score_end_with_a_usage_line(flag, capsys):
    with pytest.raises(SystemExit) as end:
        sample.main(["--score", "v.mp4", *flag])
    assert end.value.code == 2 and flag[0] in capsys.readouterr().err
