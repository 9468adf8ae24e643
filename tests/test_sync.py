"""What the sync network promises: its windows, training, files, and the shipped one."""

import math

import pytest
import torch
import torch.nn.functional as nnf

from data import Clip, MediaError
from extras.talkers import render_talker
from reward import (DEFAULT_SYNC, REWARD_SYNC, WEIGHTS, Exemplars, Reward, SyncNetwork, info_nce, load_sync,
                    reward_sync, save_sync, sync_loss, train_sync)
from sample import frechet, identity_cosine, offset_curve, parse_arguments, sync_metrics


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


# ---- What the network sees and hears ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("n", "size"), [(5, 64), (20, 48), (33, 128)])
def test_any_number_of_frames_of_any_size_gives_a_window_for_each_five(n, size):
    net = SyncNetwork()
    frames, audio = torch.rand(2, n, 3, size, size), torch.randn(2, n * 640)
    for windows in net.visual(frames), net.sound(audio):
        assert windows.shape == (2, n - 4, 64)
        torch.testing.assert_close(windows.norm(dim=-1), torch.ones(2, n - 4))
    assert net.identity(frames).shape == (2, n, 64)
    torch.testing.assert_close(identity_cosine(net, frames[:, :1], frames[:, 0]), torch.ones(2, 1))


def test_a_window_hears_its_own_five_frames_and_15_ms_before():
    """A click in frame 10 reaches windows 6 to 10, which hold it; at its end also 11: spectra last 25 ms."""
    net, quiet = SyncNetwork(), 0.01 * torch.randn(1, 30 * 640)
    for sample, last in (0, 10), (639, 11):
        loud = quiet.clone()
        loud[0, 10 * 640 + sample] = 1
        changed = (net.sound(loud) != net.sound(quiet)).any(-1)[0].nonzero()[:, 0].tolist()
        assert changed == list(range(6, last + 1))


def test_colour_brightness_and_contrast_are_not_seen(batch):
    net, frames = SyncNetwork(), batch[0][:2]
    torch.testing.assert_close(net.visual(0.5 * frames + 0.3), net.visual(frames), atol=1e-4, rtol=0)
    grey = (frames * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(2, keepdim=True).expand_as(frames)
    torch.testing.assert_close(net.visual(grey), net.visual(frames), atol=1e-4, rtol=0)


def test_contrast_is_log_n_where_nothing_is_known_and_nearly_0_where_all_is():
    same, known = torch.ones(9, 16) / 4, torch.eye(9)
    assert info_nce(same, same).item() == pytest.approx(math.log(9))
    assert info_nce(known, known).item() < 1e-4


# ---- Training and files ----------------------------------------------------------------------------------------------

def test_a_few_steps_lower_the_loss_and_the_seed_decides_everything(clips, batch):
    """From log(4 * 46) for 4 talkers that were not trained on; the caller's random numbers are not touched."""
    frames, audio = batch[0][8:], batch[1][8:]
    state = torch.get_rng_state()
    net = train_sync(clips[:8], seed=3, steps=25, batch=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert sync_loss(net, frames, audio) < math.log(4 * 46) - 0.4
    weights = [torch.cat([w.flatten() for w in train_sync(clips[:8], seed=s, steps=2, batch=2).parameters()])
               for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_training_refuses_what_it_cannot_contrast(clips):
    short = [Clip("short", c.frames[:19], c.audio[: 19 * 640]) for c in clips]
    for few in clips[:1], short, []:
        with pytest.raises(ValueError, match="two clips or more, of 20 frames"):
            train_sync(few)


def test_a_saved_network_comes_back_rounded_once_to_half_precision(tmp_path, shipped, batch):
    net = SyncNetwork()
    save_sync(net, tmp_path / "sync", clips="none")
    torch.testing.assert_close(load_sync(tmp_path / "sync").state_dict(), net.state_dict(), rtol=1e-3, atol=1e-6)
    save_sync(shipped, tmp_path / "sync")
    found, want = (sync_metrics(which, *batch) for which in (load_sync(tmp_path / "sync"), shipped))
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert {path.name for path in (tmp_path / "sync").iterdir()} == {"config.json", "model.safetensors"}
    assert sum(path.stat().st_size for path in (tmp_path / "sync").iterdir()) < 1.5e6


def test_a_missing_or_broken_network_is_named_in_one_line(tmp_path):
    with pytest.raises(MediaError, match="holds no config.json"):
        load_sync(tmp_path)
    save_sync(SyncNetwork(8, 8), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    for file, broken in ((weights, weights.read_bytes()[:1000]), (config, b"{"), (config, b'{"sync": {"width": 16}}'),
                         (config, b'{"sync": {"depth": 3}}'), (config, b"{}")):
        good = file.read_bytes()
        file.write_bytes(broken)
        with pytest.raises(MediaError, match="is not a sync network of this version") as caught:
            load_sync(tmp_path)
        assert "\n" not in str(caught.value)
        file.write_bytes(good)
    weights.unlink()
    with pytest.raises(MediaError, match="holds no model.safetensors"):
        load_sync(tmp_path)


def test_wrong_shapes_are_refused_with_what_was_given():
    net, frames, audio = SyncNetwork(8, 8), torch.rand(1, 20, 3, 64, 64), torch.zeros(1, 20 * 640)
    for call in (lambda: net.visual(frames[:, :4]), lambda: net.visual(frames[0]), lambda: net.visual(frames.byte()),
                 lambda: net.sound(audio[0]), lambda: net.sound(audio[:, :-1]), lambda: net.sound(audio[:, : 4 * 640]),
                 lambda: sync_metrics(net, frames[:, :19], audio[:, : 19 * 640]),
                 lambda: sync_metrics(net, frames, audio[:, :-640]),
                 lambda: offset_curve(torch.zeros(1, 16, 4), torch.zeros(1, 16, 5)),
                 lambda: frechet(torch.zeros(9, 4), torch.zeros(9, 5)),
                 lambda: frechet(torch.zeros(1, 4), torch.zeros(9, 4))):
        with pytest.raises(ValueError, match="want .* got"):
            call()


# ---- The shipped network, on talkers of another world ----------------------------------------------------------------

def test_the_shipped_network_finds_by_how_much_a_picture_is_late(shipped, batch):
    """Dropping the first n frames of the sound and the last n of the picture makes the picture n frames late."""
    frames, audio = batch
    for n in 0, 3, 8:
        late = sync_metrics(shipped, frames[:, : 50 - n], audio[:, n * 640 :])["sync_offset"]
        early = sync_metrics(shipped, frames[:, n:], audio[:, : (50 - n) * 640])["sync_offset"]
        assert ((late - n).abs() <= 1).all() and ((early + n).abs() <= 1).all()


def test_the_shipped_network_prefers_true_sound_moving_lips_and_sharp_ones(shipped, batch):
    frames, audio = batch
    blurred = nnf.interpolate(nnf.interpolate(frames.flatten(0, 1), (16, 16), mode="area"), (64, 64), mode="bilinear")
    frozen = frames.clone()
    frozen[..., 37:63, 16:48] = frames[:, :1, :, 37:63, 16:48]
    true = sync_metrics(shipped, frames, audio)
    for made, sound, least in ((frames, audio.roll(1, 0), 0.3), (frozen, audio, 0.3),
                               (blurred.view_as(frames), audio, 0.1)):
        other = sync_metrics(shipped, made, sound)
        assert (other["sync_confidence"] < true["sync_confidence"]).all()
        assert (other["sync_own"] > true["sync_own"]).all()
        assert (true["sync_confidence"] - other["sync_confidence"]).mean() > least


def test_the_shipped_network_knows_a_talker_from_another(shipped, batch):
    frames = batch[0]
    own, other = (identity_cosine(shipped, frames, frames[:, 0].roll(shift, 0)) for shift in (0, 1))
    assert own.min() > 0.8 and other.mean() < 0.3


def test_frechet_distance_of_mouths_is_small_between_real_clips_and_large_for_frozen_ones(shipped, batch):
    """Between two halves of the talkers, though few samples of 64 dimensions exaggerate it."""
    mouths = lambda frames: shipped.visual(frames).flatten(0, 1)
    real, others = batch[0].chunk(2)
    assert frechet(mouths(real), mouths(others[:, :1].expand_as(others))) > 5 * frechet(mouths(real), mouths(others))


# ---- In the reward ---------------------------------------------------------------------------------------------------

SYNC_ALONE = dict.fromkeys(WEIGHTS, 0.0) | {"sync": 1.0}


def test_the_reward_of_a_chunk_is_minus_the_distance_of_the_five_frames_around_each_of_its_own(clips, batch):
    """By a loop over the frames of videos of 30: the first two and the last two have the nearest whole window's."""
    net, frames, audio = SyncNetwork(8, 8), batch[0][:2, :30], batch[1][:2, :30 * 640]
    rate = Reward(None, Exemplars.measure(clips, clips, 4), SYNC_ALONE, sync=net)
    scores = rate(frames, audio, frames[:, 0], "ab", per_chunk=True)
    v, a = net.visual(frames).double(), net.sound(audio).double()
    for b in range(2):
        apart = [math.dist(v[b, i].tolist(), a[b, i].tolist()) for i in range(26)]
        of = [apart[min(max(f - 2, 0), 25)] for f in [*range(30), 29, 29]]                   # the last is filled up
        chunks = [-sum(of[k:k + 4]) / 4 for k in range(0, 32, 4)]
        assert scores.per_chunk["sync"][b].tolist() == pytest.approx(chunks, abs=1e-5)
        assert scores.components["sync"][b].item() == pytest.approx(sum(chunks) / 8, abs=1e-5)
    assert scores.total.tolist() == scores.components["sync"].tolist()


def test_the_rewards_network_tells_the_own_sound_from_one_of_40_ms_earlier_or_later(clips, batch):
    """On people that it never met, each of them."""
    rate = Reward(None, Exemplars.measure(clips, clips, 4), SYNC_ALONE, sync=load_sync(REWARD_SYNC))
    frames, names = batch[0][:, 8:40], [clip.name for clip in clips]
    own, early, late = (rate(frames, batch[1][:, (8 + by) * 640:(40 + by) * 640], frames[:, 0], names).total
                        for by in (0, -1, 1))
    assert (own > early).all() and (own > late).all()


def test_the_network_that_measures_cannot_be_the_rewards():
    """By any name of its folder; the two that come along are of different seeds."""
    flags = ["--score", "v.mp4", "--judge", "none", "--reward-sync", str(DEFAULT_SYNC / ".." / "sync")]
    with pytest.raises(MediaError, match="which measures what the reward does; teach the reward another"):
        reward_sync(parse_arguments(flags))
    one, other = (load_sync(folder).state_dict() for folder in (DEFAULT_SYNC, REWARD_SYNC))
    assert all(not torch.equal(one[name], other[name]) for name in one)
