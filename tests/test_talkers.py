"""What the drawn worlds promise: exact truth, natural size of everything, and faults that are what they say."""

import time

import pytest
import torch
import torch.nn.functional as nnf

from data import Clip, normalise_loudness
from extras.talkers import render_talker


@pytest.fixture(scope="module")
def drawn() -> list[Clip]:
    """Thirty-two talkers of two seconds, 64 pixels."""
    return [render_talker(i, 5, 64, 50) for i in range(32)]


def test_a_talker_is_the_same_each_time_and_another_with_another_index_or_seed():
    a, again, index, seed = (render_talker(i, s, 32, 10) for i, s in ((3, 7), (3, 7), (4, 7), (3, 8)))
    assert torch.equal(a.frames, again.frames) and torch.equal(a.audio, again.audio)
    for other in (index, seed):
        assert (a.frames.float() - other.frames.float()).abs().mean() > 4
        assert not torch.equal(a.audio, other.audio)


def test_a_talker_has_640_samples_per_frame_and_one_truth_per_frame():
    clip = render_talker(0, 0, 48, 13)
    assert clip.frames.shape == (13, 3, 48, 48) and clip.frames.dtype == torch.uint8
    assert clip.audio.shape == (13 * 640,) and clip.audio.dtype == torch.float32
    assert all(clip.truth[k].shape == (13,) for k in ("opening", "width", "blink", "brow"))
    assert clip.truth["head"].shape == (13, 4) and all(x.isfinite().all() for x in clip.truth.values())


def test_size_changes_neither_the_speech_nor_the_truth_nor_what_is_depicted():
    """A picture of 128 averaged over 2x2 pixels is the picture of 64, to the width of an edge."""
    small, large = render_talker(2, 0, 64, 6), render_talker(2, 0, 128, 6)
    assert torch.equal(small.audio, large.audio)
    assert all(torch.equal(small.truth[k], large.truth[k]) for k in small.truth)
    gap = (nnf.avg_pool2d(large.frames.float(), 2) - small.frames.float()).abs()
    stranger = (render_talker(3, 0, 64, 6).frames.float() - small.frames.float()).abs()
    assert gap.mean() < 2 and stranger.mean() > 8 * gap.mean()


def test_the_first_frame_is_a_portrait_at_rest(drawn):
    """Head upright in its place, lips closed, eyes open."""
    for clip in drawn:
        assert (clip.truth["head"][0] == 0).all() and clip.truth["opening"][0] == 0
        assert (clip.truth["blink"][:2] == 0).all()


def test_the_mouth_rests_in_silence_and_opens_in_speech(drawn):
    """Where the 280 ms around a frame are no louder than room noise, lips are closed."""
    speaking, resting = [], []
    for clip in drawn:
        rms = clip.audio.view(-1, 640).square().mean(1).sqrt()
        quiet = nnf.max_pool1d(rms[None], 7, 1, 3)[0] < 0.003
        assert (clip.truth["opening"][quiet] == 0).all()
        speaking.append(clip.truth["opening"][rms > 0.05])
        resting.append(quiet.sum())
    assert sum(resting) > 40 and torch.cat(speaking).mean() > 0.02


def test_a_talker_is_as_loud_as_loaded_speech_and_pauses_in_the_noise_of_a_room(drawn):
    """Loudness is already normal, so what a generator hears in training is what `load_speech` gives it later."""
    for clip in drawn:
        torch.testing.assert_close(clip.audio, normalise_loudness(clip.audio), atol=1e-3, rtol=1e-3)
        rms = clip.audio.view(-1, 160).square().mean(1).sqrt()
        assert 1e-4 < rms.min() < 0.002


def test_the_head_sways_at_natural_size_and_faces_differ(drawn):
    head = torch.cat([clip.truth["head"] for clip in drawn]).std(0)
    for std, low, high in zip(head, (0.012, 0.012, 0.024, 0.007), (0.018, 0.018, 0.037, 0.013)):
        assert low < std < high
    portraits = torch.stack([clip.frames[0].float() for clip in drawn])
    assert torch.pdist(portraits.flatten(1)).min() / portraits[0].numel() ** 0.5 > 8


def test_half_a_minute_is_as_cheap_per_second_as_two_seconds():
    def cost(index, frames):
        start = time.process_time()
        clip = render_talker(index, 0, 64, frames)
        return time.process_time() - start, clip

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    short = min(cost(i, 50)[0] for i in range(8))
    taken, long = cost(0, 750)
    torch.set_num_threads(threads)
    assert short < 0.2, f"{1e3 * short:.0f} ms of CPU for two seconds"          # about 30 ms on an idle core
    assert taken / 750 < 1.5 * short / 50
    assert (long.truth["blink"] > 0.5).any() and (long.truth["opening"][-250:] > 0.01).any()
