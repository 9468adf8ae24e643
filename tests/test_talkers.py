"""What the drawn worlds promise: exact truth, natural size of everything, faults that are what they say."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from data import Clip
from extras.media import normalise_loudness
from extras import talkers
from extras.mouths import mouth_opening_from_pixels
from extras.talkers import EARLY, FAULTS, draw_faults, render_talker, synthetic_clips
from model import estimate_pose


def test_a_talker_is_the_same_each_time_and_another_with_another_index_or_seed():
    """640 samples and one truth per frame."""
    a, again, index, seed = (render_talker(i, s, 32, 13) for i, s in ((3, 7), (3, 7), (4, 7), (3, 8)))
    assert torch.equal(a.frames, again.frames) and torch.equal(a.audio, again.audio)
    for other in (index, seed):
        assert (a.frames.float() - other.frames.float()).abs().mean() > 4
        assert not torch.equal(a.audio, other.audio)
    assert a.frames.shape == (13, 3, 32, 32) and a.frames.dtype == torch.uint8
    assert a.audio.shape == (13 * 640,) and a.audio.dtype == torch.float32
    assert all(a.truth[k].shape == (13,) for k in ("opening", "width", "blink", "brow"))
    assert a.truth["head"].shape == (13, 4) and all(x.isfinite().all() for x in a.truth.values())


def test_the_mouth_rests_in_silence_and_opens_in_speech(drawn):
    """Where the 280 ms around a frame are no louder than room noise, lips are closed. The first frame is a
    portrait at rest. A talker is as loud as loaded speech, and pauses in the noise of a room."""
    speaking, resting = [], []
    for clip in drawn:
        assert (clip.truth["head"][0] == 0).all() and clip.truth["opening"][0] == 0
        assert (clip.truth["blink"][:2] == 0).all()
        rms = clip.audio.view(-1, 640).square().mean(1).sqrt()
        quiet = nnf.max_pool1d(rms[None], 7, 1, 3)[0] < 0.003
        assert (clip.truth["opening"][quiet] == 0).all()
        torch.testing.assert_close(clip.audio, normalise_loudness(clip.audio), atol=1e-3, rtol=1e-3)
        assert 1e-4 < clip.audio.view(-1, 160).square().mean(1).sqrt().min() < 0.002
        speaking.append(clip.truth["opening"][rms > 0.05])
        resting.append(quiet.sum())
    assert sum(resting) > 40 and torch.cat(speaking).mean() > 0.02


def found(drawn, clips=6, **faults):
    """Pairs of the same talkers with these faults and without."""
    return [(render_talker(i, 5, 64, 50, faults), drawn[i]) for i in range(clips)]


def mouth(clip: Clip) -> np.ndarray:
    return mouth_opening_from_pixels(clip.frames, clip.truth).numpy()


@pytest.mark.parametrize("late", [-5, -1, 3, 7])
def test_offset_moves_the_mouth_by_whole_frames_and_leaves_the_sound(drawn, late):
    """The lag at which the mouth, from pixels, correlates most with the flawless clip's, by a loop."""
    for clip, flawless in found(drawn, offset=late):
        moved, own = mouth(clip), mouth(flawless)
        curve = {k: np.corrcoef(moved[max(k, 0):50 + min(k, 0)], own[max(-k, 0):50 - max(k, 0)])[0, 1]
                 for k in range(-10, 11)}
        assert max(curve, key=curve.get) == late and curve[late] > 0.9
        assert torch.equal(clip.audio, flawless.audio)


@pytest.mark.parametrize("lost", [0.1, 0.6])
def test_mumble_takes_its_share_of_the_mouths_range_and_half_of_it_of_the_heads(drawn, lost):
    for clip, flawless in found(drawn, mumble=lost):
        assert mouth(clip).std() / mouth(flawless).std() == pytest.approx(1 - lost, abs=0.09)
        assert torch.allclose(clip.truth["head"], (1 - lost / 2) * flawless.truth["head"], atol=1e-6)
        assert torch.equal(clip.audio, flawless.audio)


@pytest.mark.parametrize("strength", [0.1, 0.8])
def test_tremble_jumps_by_a_hundredth_of_the_picture_and_turns_by_point_seven_degrees(drawn, strength):
    """Deviations of what the pose, from pixels, has beyond the flawless clip's, frame by frame."""
    pose = lambda clip: estimate_pose(clip.frames[None] / 255)[0]
    jumps = torch.stack([pose(clip) - pose(flawless) for clip, flawless in found(drawn, tremble=strength)])
    x, _, roll, y, *_ = jumps.std(1).mean(0).div(strength).tolist()
    assert x == pytest.approx(0.02, rel=0.2) and y == pytest.approx(0.02, rel=0.2)   # the picture's side is 2
    assert roll == pytest.approx(math.radians(0.7), rel=0.2)
    assert (jumps.diff(dim=1).std(1) / jumps.std(1)).mean(0)[0] > 1.3     # sqrt 2: no drift, but jumps


def test_dubbing_changes_the_voice_and_nothing_that_is_seen(drawn):
    own, dubbed = [], []
    for clip, flawless in found(drawn, dubbed=1):
        assert torch.equal(clip.frames, flawless.frames)
        torch.testing.assert_close(clip.audio, normalise_loudness(clip.audio), atol=1e-3, rtol=1e-3)
        for of, follow in ((clip, dubbed), (flawless, own)):
            loud = of.audio.view(-1, 640).square().mean(1).add(4e-6).log()
            follow.append(np.corrcoef(mouth(flawless), loud)[0, 1])
    assert np.mean(own) > 0.4 and np.mean(dubbed) < np.mean(own) - 0.3


def test_compression_leaves_blocks_that_grow_with_its_strength_and_the_sound_as_it_was(drawn):
    """Steps across the borders of blocks of 8 pixels against steps inside of them: 1 without blocks."""
    def blocks(x):
        step = x.float().diff(dim=-1).abs().mean((0, 1, 2))
        return step[7::8].mean() / step[torch.arange(63) % 8 != 7].mean()
    steps = [np.mean([blocks(clip.frames) for clip in drawn[:6]])]
    for strength in 0.2, 0.6, 1.0:
        pairs = found(drawn, compressed=strength)
        steps.append(np.mean([blocks(clip.frames) for clip, _ in pairs]))
        assert all(torch.equal(a.audio, b.audio) for a, b in pairs)
        assert 1 < np.mean([(a.frames.float() - b.frames.float()).abs().mean() for a, b in pairs]) < 10
    assert steps[0] < steps[1] < steps[2] < steps[3] and steps[3] > 1.4 * steps[0]


def test_faults_come_at_their_rates_and_strengths_each_by_itself():
    """2000 draws: shares within four deviations of the table's, strengths even between its least and most,
    but for offsets: the smaller of two that are."""
    draws = [draw_faults(np.random.default_rng([9, i])) for i in range(2000)]
    has = {name: np.array([draw[name] != 0 for draw in draws]) for name in FAULTS}
    for name, (share, least, most) in FAULTS.items():
        strength = np.abs([draw[name] for draw in draws])[has[name]]
        assert abs(has[name].mean() - share) <= 4 * math.sqrt(share * (1 - share) / 2000), name
        assert strength.min() >= least and strength.max() <= most, name
        mean = 140 / 49 if name == "offset" else (least + most) / 2      # of the smaller of two, 1 to 7 alike
        assert strength.mean() == pytest.approx(mean, rel=0.07), name
    offsets = np.array([draw["offset"] for draw in draws])[has["offset"]]
    assert set(offsets) == {*range(-7, 0), *range(1, 8)}
    assert (offsets < 0).mean() == pytest.approx(EARLY, abs=0.05)
    together = np.corrcoef([[abs(draw[name]) for draw in draws] for name in FAULTS]) - np.eye(len(FAULTS))
    assert np.abs(together).max() < 0.09


def test_clips_as_found_are_the_talkers_with_what_was_drawn_for_them_and_others_record_nothing():
    clips = synthetic_clips(4, 32, 0.4, 3, world="found")
    flawless = synthetic_clips(4, 32, 0.4, 3)
    for i, (clip, plain) in enumerate(zip(clips, flawless)):
        wrong = draw_faults(np.random.default_rng([3, i, 4]))
        assert {name: clip.truth[f"fault_{name}"].item() for name in FAULTS} == pytest.approx(wrong)
        for got, want in ((clip, render_talker(i, 3, 32, 10, wrong)), (plain, render_talker(i, 3, 32, 10))):
            assert torch.equal(got.frames, want.frames) and torch.equal(got.audio, want.audio)
        assert not any(name.startswith("fault") for name in plain.truth)


def test_the_key_of_the_cache_holds_all_that_shapes_the_clips(tmp_path, monkeypatch):
    """Count, size, seconds, seed, first, world, the renderer's text; the same recipe is read back."""
    recipe = dict(count=1, size=32, seconds=0.4, seed=0, first=0)
    changes = dict(count=2, size=48, seconds=0.8, seed=1, first=1, world="found")
    folders = {synthetic_clips(**recipe | {key: value}).folder for key, value in changes.items()}
    folders.add(synthetic_clips(**recipe).folder)
    monkeypatch.setattr(talkers, "render_talker", None)              # whatever renders now fails
    assert len(folders) == 7 and synthetic_clips(**recipe).folder in folders
    (tmp_path / "talkers.py").write_text("an edited renderer")
    monkeypatch.setattr(talkers, "__file__", str(tmp_path / "talkers.py"))
    with pytest.raises(TypeError):
        synthetic_clips(**recipe)
