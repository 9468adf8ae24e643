"""What reward.py promises of the pixel oracle: how open a drawn mouth is, judged by truth, by loudness and by blur."""

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from data import LIP_LEAD, Clip, render_talker
from reward import correlation, lip_sync_correlation, mouth_amplitude, mouth_opening_from_pixels


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
    a, b = clips[0], clips[1]
    frozen = a.frames[:1].expand_as(a.frames)
    assert lip_sync_correlation(frozen, a.truth) == 0 and mouth_amplitude(frozen, a.frames, a.truth) < 1e-6
    assert lip_sync_correlation(a.frames.flip(0), a.truth) < 0.6
    assert mouth_amplitude(a.frames, a.frames, a.truth) == pytest.approx(1.0)
    swap = lambda c, d: c.truth | {k: d.truth[k] for k in ("opening", "width")}
    strangers = torch.stack([lip_sync_correlation(c.frames, swap(c, d)) for c, d in zip(clips, clips[1:])])
    assert strangers.mean() < 0.4


def test_the_oracle_does_not_care_where_the_head_is(clips):
    """Moving the whole picture by two pixels (3% of the frame) leaves the measured area where it was."""
    for clip in clips[:10]:
        a, b = (mouth_opening_from_pixels(x, clip.truth) for x in (clip.frames, clip.frames.roll((2, -2), (2, 3))))
        assert (a - b).abs().max() < 0.25 * a.max()
