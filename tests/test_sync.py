"""What the sync networks promise: windows, training, files, those that are shipped, and the reward's part."""

import math

import pytest
import torch
import torch.nn.functional as nnf

from data import Clip
from extras.files import MediaError
from extras.reward_flags import reward_sync
from extras.score import parse_arguments
from extras.sync import load_sync, save_sync, sync_loss, train_sync
from extras.talkers import render_talker
from reward import DEFAULT_SYNC, REWARD_SYNC, WEIGHTS, Exemplars, Reward, SyncNetwork
from sample import identity_cosine, sync_metrics


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Twelve talkers of two seconds, of a world that no network was trained on."""
    return [render_talker(i, 78, 64, 50) for i in range(12)]


@pytest.fixture(scope="module")
def batch(clips):
    """Their frames (12, 50, 3, 64, 64) in [0, 1] and sound (12, 32000)."""
    return torch.stack([c.frames for c in clips]) / 255, torch.stack([c.audio for c in clips])


@pytest.fixture(scope="module")
def shipped() -> SyncNetwork:
    return load_sync(DEFAULT_SYNC)


def test_a_window_hears_its_own_five_frames_and_15_ms_before():
    """A click in frame 10 reaches windows 6 to 10, which hold it; at its end also 11: spectra last 25 ms."""
    net, quiet = SyncNetwork(), 0.01 * torch.randn(1, 30 * 640)
    assert net.sound(quiet).shape == net.visual(torch.rand(1, 30, 3, 48, 48)).shape == (1, 26, 64)
    for sample, last in (0, 10), (639, 11):
        loud = quiet.clone()
        loud[0, 10 * 640 + sample] = 1
        changed = (net.sound(loud) != net.sound(quiet)).any(-1)[0].nonzero()[:, 0].tolist()
        assert changed == list(range(6, last + 1))


def test_a_few_steps_lower_the_loss_and_the_seed_decides_everything(clips, batch):
    """From log(4 * 46) for 4 talkers that were not trained on; the caller's random numbers stay."""
    state = torch.get_rng_state()
    net = train_sync(clips[:8], seed=3, steps=25, batch=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert sync_loss(net, batch[0][8:], batch[1][8:]) < math.log(4 * 46) - 0.4
    one, same, other = (train_sync(clips[:8], seed=seed, steps=2, batch=2).state_dict() for seed in (0, 0, 1))
    assert train_sync(clips[:2], steps=20, batch=1)              # at which PyTorch divides by zero
    assert all(torch.equal(weight, same[name]) for name, weight in one.items())
    assert not any(torch.equal(weight, other[name]) for name, weight in one.items())
    for few in clips[:1], [Clip("short", c.frames[:19], c.audio[: 19 * 640]) for c in clips]:
        with pytest.raises(ValueError, match="two clips or more, of 20 frames"):
            train_sync(few)


def test_a_saved_network_comes_back_rounded_once_to_half_precision(tmp_path):
    net = SyncNetwork(8, 8)
    save_sync(net, tmp_path, clips="none")
    saved = load_sync(tmp_path).state_dict()
    assert all(torch.equal(weight.half().float(), saved[name]) for name, weight in net.state_dict().items())


def test_the_shipped_network_finds_by_how_much_a_picture_is_late(shipped, batch):
    """Without the first n frames of the sound and the last n of the picture, the picture is n frames late."""
    frames, audio = batch
    for n in 0, 3, 8:
        late = sync_metrics(shipped, frames[:, : 50 - n], audio[:, n * 640 :])["sync_offset"]
        early = sync_metrics(shipped, frames[:, n:], audio[:, : (50 - n) * 640])["sync_offset"]
        assert ((late - n).abs() <= 1).all() and ((early + n).abs() <= 1).all()


def test_the_shipped_network_prefers_true_sound_moving_lips_sharp_ones_and_the_same_person(shipped, batch):
    frames, audio = batch
    small = nnf.interpolate(frames.flatten(0, 1), (16, 16), mode="area")
    blurred = nnf.interpolate(small, (64, 64), mode="bilinear").view_as(frames)
    frozen = frames.clone()
    frozen[..., 37:63, 16:48] = frames[:, :1, :, 37:63, 16:48]
    true = sync_metrics(shipped, frames, audio)
    for made, sound, least in (frames, audio.roll(1, 0), 0.3), (frozen, audio, 0.3), (blurred, audio, 0.1):
        other = sync_metrics(shipped, made, sound)
        assert (other["sync_confidence"] < true["sync_confidence"]).all()
        assert (other["sync_own"] > true["sync_own"]).all()
        assert (true["sync_confidence"] - other["sync_confidence"]).mean() > least
    own, other = (identity_cosine(shipped, frames, frames[:, 0].roll(shift, 0)) for shift in (0, 1))
    assert own.min() > 0.8 and other.mean() < 0.3


SYNC_ALONE = dict.fromkeys(WEIGHTS, 0.0) | {"sync": 1.0}


def test_a_chunk_earns_minus_the_distance_of_the_five_frames_around_each_of_its_own(clips, batch):
    """By a loop over the frames. The first two and the last two have the nearest whole window's."""
    net, frames, audio = SyncNetwork(8, 8), batch[0][:2, :30], batch[1][:2, :30 * 640]
    rate = Reward(None, Exemplars.measure(clips, 4), SYNC_ALONE, sync=net)
    scores = rate(frames, audio, frames[:, 0], "ab")
    v, a = net.visual(frames).double(), net.sound(audio).double()
    for b in range(2):
        apart = [math.dist(v[b, i].tolist(), a[b, i].tolist()) for i in range(26)]
        of = [apart[min(max(f - 2, 0), 25)] for f in [*range(30), 29, 29]]           # the last is filled up
        chunks = [-sum(of[k:k + 4]) / 4 for k in range(0, 32, 4)]
        assert scores.per_chunk["sync"][b].tolist() == pytest.approx(chunks, abs=1e-5)
        assert scores.components["sync"][b].item() == pytest.approx(sum(chunks) / 8, abs=1e-5)
    assert scores.total.tolist() == scores.components["sync"].tolist()


def test_the_rewards_network_tells_the_own_sound_from_one_of_40_ms_earlier_or_later(clips, batch):
    """On people that it never met, each of them."""
    rate = Reward(None, Exemplars.measure(clips, 4), SYNC_ALONE, sync=load_sync(REWARD_SYNC))
    frames, names = batch[0][:, 8:40], [clip.name for clip in clips]
    own, early, late = (rate(frames, batch[1][:, (8 + by) * 640:(40 + by) * 640], frames[:, 0], names).total
                        for by in (0, -1, 1))
    assert (own > early).all() and (own > late).all()


def test_the_network_that_measures_cannot_be_the_rewards():
    """By any name of its folder; the two that come along are of different seeds."""
    flags = ["v.mp4", "--judge", "none", "--reward-sync", str(DEFAULT_SYNC / ".." / "sync")]
    with pytest.raises(MediaError, match="which measures what the reward does; teach the reward another"):
        reward_sync(parse_arguments(flags))
    one, other = (load_sync(folder).state_dict() for folder in (DEFAULT_SYNC, REWARD_SYNC))
    assert all(not torch.equal(one[name], other[name]) for name in one)
