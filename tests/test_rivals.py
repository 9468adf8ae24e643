"""The rivals of GRPO do what they are called: the best by the judge, own videos learned from."""

import json
from types import SimpleNamespace

import pytest
import torch

import train
from extras import rivals
from extras.files import MediaError
from extras.session import go_on
from extras.sync import load_sync
from extras.talkers import synthetic_clips
from reward import DEFAULT_SYNC
from sample import imitate, sync_metrics
from tiny import SHAPE, Bright

STAGES = "curate.pt", "post.pt", "curated", "held_out.json"


@pytest.fixture
def run(tmp_path):
    args = train.parse_arguments([*SHAPE, "--out", str(tmp_path), "--seed", "3"])
    clips = synthetic_clips(6, args.config.size, 2.0, 0)
    torch.manual_seed(0)
    stage = train.FlowMatching("curation", None, args, 1)
    train.fit_codec(stage.model, clips, args)
    stage.model.video_out.weight.data.normal_(std=0.05)              # else every video is the noise alone
    data = train.encode(stage.model, clips, args.frames, "cpu")
    return SimpleNamespace(args=args, clips=clips, data=data, model=stage.model.eval())


def test_the_best_of_n_is_the_best_of_takes_that_differ_and_never_an_unrated_one(run):
    args, clips = run.args, list(run.clips)
    takes = torch.stack([imitate(run.model, clips, args.frames, args.sampling_steps, seed=3 + 1000 * take)
                         for take in range(3)])
    best = rivals.best_of(3, run.model, Bright(window=None), clips, args, 3)
    level = takes.mean((2, 3, 4, 5))
    assert torch.equal(best.mean((1, 2, 3, 4)), level.amax(0)) and level.argmax(0).unique().numel() > 1
    assert torch.equal(rivals.best_of(1, run.model, Bright(window=None), clips, args, 3), takes[0])
    ratings = rivals.rated(Bright(unrated=[1]), takes[0], clips)
    assert ratings.argmin() == 1 and ratings.isfinite().sum() == 5


def test_its_own_videos_are_the_best_of_their_prompts(run, monkeypatch):
    """Latents, portrait and sound belong together, and no rejected video is brighter than the kept one."""
    monkeypatch.setattr(rivals, "PROMPTS", 4)
    stage = rivals.RejectionSampling(run, judge := Bright(window=None), 1.0)
    stage.average, seen = train.snapshot(run.model.state_dict()), []
    monkeypatch.setattr(judge, "rate", lambda *a: seen.append(Bright.rate(judge, *a)) or seen[-1])
    own = stage.best_own()
    rated = seen[0].score[:, 0]
    videos = run.model.codec.decode(own.portrait / 255, own.clean)
    best = rated.view(4, rivals.SAMPLES).amax(1)
    torch.testing.assert_close(1 + 4 * videos.mean((1, 2, 3, 4)), best, atol=1e-5, rtol=0)
    assert rated.unique().numel() > 4
    for portrait, mel in zip(own.portrait, own.mel):
        [row] = [i for i in range(6) if torch.equal(run.data.portrait[i], portrait)]
        assert torch.equal(run.data.mel[row], mel)


def test_a_shift_by_the_measured_lateness_puts_sound_in_time(run):
    net, [clip] = load_sync(DEFAULT_SYNC), list(synthetic_clips(1, 64, 4.0, 7, world="flawless"))
    frames = len(clip.frames)
    early = rivals.shifted(clip, -4)                                 # so its lips come 4 frames late
    by = int(sync_metrics(net, clip.frames[None] / 255, early.audio[None])["sync_offset"])
    assert by == 4 and frames == 100
    assert torch.equal(rivals.shifted(early, by).audio, clip.audio)


def test_a_run_without_its_stages_is_refused_and_a_stopped_one_says_how_to_go_on(run, tmp_path, monkeypatch):
    """Or without a network, or of another script. It was --resume, a flag that this command does not have."""
    config = tmp_path / "config.json"
    for name in ("log.jsonl", *STAGES):
        (tmp_path / name).touch()
    for missing in (*STAGES, "reward_sync"):
        training = {"reward_sync": "none"} if missing == "reward_sync" else {}
        config.write_text(json.dumps({"model": {}, "training": training}))
        (tmp_path / missing).unlink(missing_ok=True)
        with pytest.raises(MediaError, match="sync network of the reward and all three stages"):
            rivals.main([str(tmp_path)])
        (tmp_path / missing).touch()
    config.write_text('{"model": {}, "training": {"program": "python -m extras.examples.own_judge"}}')
    with pytest.raises(MediaError, match="is a run of another script, whose judge"):
        rivals.main([str(tmp_path)])
    config.write_text('{"model": {}, "training": {"program": "python train.py"}}')
    for name in ("make_judge", "reward_sync", "measuring_sync"):
        monkeypatch.setattr(rivals, name, lambda args: None)
    monkeypatch.setattr(train, "load_clips", lambda args, watched: pytest.fail(go_on(args)))
    with pytest.raises(pytest.fail.Exception) as stopped:
        rivals.main([str(tmp_path)])
    assert str(stopped.value).endswith(f" {tmp_path}") and "--resume" not in str(stopped.value)
    monkeypatch.setattr(train, "load_clips", lambda args, watched: ([], [], []))
    monkeypatch.setattr(rivals, "load_generator", lambda folder: run.model)
    with pytest.raises(MediaError, match=r"post.pt: cannot be read \(.+\); delete it and resume the run"):
        rivals.main([str(tmp_path)])
