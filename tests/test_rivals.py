"""The rivals of GRPO do what they are called: the best by the judge, sound put in time, own videos learned
from."""

from types import SimpleNamespace

import pytest
import torch

import train
from extras import rivals
from extras.files import MediaError
from extras.talkers import synthetic_clips
from reward import DEFAULT_SYNC, Ratings, load_sync
from sample import imitate
from tiny import SHAPE


class Grey:
    """A judge of the mean grey level."""

    window, fingerprint = None, "grey"

    def rate(self, frames, audio, names):
        return Ratings(frames.mean((1, 2, 3, 4))[:, None].expand(-1, 3), torch.ones(len(frames), 3))


@pytest.fixture
def run(tmp_path):
    args = train.parse_arguments([*SHAPE, "--out", str(tmp_path), "--seed", "3"])
    clips = synthetic_clips(6, args.config.size, 2.0, 0, cache=tmp_path / "cache")
    torch.manual_seed(0)
    stage = train.FlowMatching("curation", None, args, 1)
    train.fit_codec(stage.model, clips, args)
    stage.model.video_out.weight.data.normal_(std=0.05)              # else every video is the noise alone
    data = train.encode(stage.model, clips, args.frames, "cpu")
    return SimpleNamespace(args=args, clips=clips, data=data, model=stage.model.eval())


def test_the_best_of_n_is_the_best_of_takes_that_differ(run):
    args, clips = run.args, list(run.clips)
    takes = torch.stack([imitate(run.model, clips, args.frames, args.sampling_steps, seed=3 + 1000 * take)
                         for take in range(3)])
    best = rivals.best_of(3, run.model, Grey(), clips, args)
    level = takes.mean((2, 3, 4, 5))
    assert torch.equal(best.mean((1, 2, 3, 4)), level.amax(0)) and level.argmax(0).unique().numel() > 1
    assert torch.equal(rivals.best_of(1, run.model, Grey(), clips, args), takes[0])


def test_its_own_videos_are_the_best_of_their_prompts(run, monkeypatch):
    """Latents, portrait and sound belong together, and no rejected video is brighter than the kept one."""
    monkeypatch.setattr(rivals, "PROMPTS", 4)
    stage = rivals.RejectionSampling(run, judge := Grey(), 1.0)
    stage.average = train.snapshot(run.model.state_dict())
    seen = []
    monkeypatch.setattr(judge, "rate", lambda *a: seen.append(Grey.rate(judge, *a)) or seen[-1])
    own = stage.best_own()
    [rated] = seen
    videos = run.model.codec.decode(own.portrait / 255, own.clean)
    best = rated.score[:, 0].view(4, rivals.SAMPLES).amax(1)
    torch.testing.assert_close(videos.mean((1, 2, 3, 4)), best, atol=1e-5, rtol=0)
    assert rated.score[:, 0].unique().numel() > 4
    for portrait, mel in zip(own.portrait, own.mel):
        [row] = [i for i in range(6) if torch.equal(run.data.portrait[i], portrait)]
        assert torch.equal(run.data.mel[row], mel)


def test_a_shift_by_the_measured_lateness_puts_sound_in_time(run):
    net, [clip] = load_sync(DEFAULT_SYNC), list(synthetic_clips(1, 64, 4.0, 7, world="flawless"))
    frames = len(clip.frames)
    early = rivals.shifted(clip, -4)                                 # so its lips come 4 frames late
    by = int(rivals.lateness(net, clip.frames[None] / 255, [early]))
    assert by == 4 and frames == 100
    assert torch.equal(rivals.shifted(early, by).audio, clip.audio)


def test_a_run_without_its_stages_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {}, "training": {}}')
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(MediaError, match="all three stages"):
        rivals.main([str(tmp_path)])
