"""What school promises: lessons of known quality, a judge that learns from them, and an exam that can be failed."""

from types import SimpleNamespace

import pytest
import torch

from data import Clip, MediaError, pixels, sounds
from extras import school
from extras.lessons import FAULTS, Material, act, apart, good_material, lessons, mouths, spoil
from extras.school import (Hints, among_rivals, battery, exam, heard_loss, rating_loss, save_judge, seen_loss, teach,
                           tiny_judge)
from extras.talkers import render_talker
from reward import ASPECTS, DEFAULT_JUDGE, Judge, rate_whole


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Sixteen talkers of a world that no judge was taught on, 64 frames of 64 pixels."""
    return [render_talker(i, 31, 64, 64) for i in range(16)]


@pytest.fixture(scope="module")
def good(clips) -> Material:
    return good_material(clips)


@pytest.fixture(scope="module")
def batch(clips):
    """Four of them, 48 frames: frames in [0, 1], sound, names."""
    return (torch.stack([c.frames[:48] for c in clips[:4]]) / 255, torch.stack([c.audio[:48 * 640] for c in clips[:4]]),
            [c.name for c in clips[:4]])


@pytest.fixture(scope="module")
def embedded() -> Judge:
    return Judge.load()


# ---------------------------------------------------------------- lessons

def test_mouths_are_apart_by_what_their_correlation_lacks():
    """sqrt(1 - correlation), whatever their size and rest; of a mouth that hardly stirs, what it still moves counts."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 2000, dtype=torch.float64)
    b = 0.9 * a + 0.3 * b
    want = (1 - torch.corrcoef(torch.stack([a, b]))[0, 1]).sqrt()
    assert apart(a, a) == 0 and apart(a, -a) == 1 and abs(apart(0.5 * a + 1, 3 * b) - want) < 1e-12
    unit = (a - a.mean()) / a.std(correction=0)
    assert abs(apart(0.15 * unit, unit) - 0.125 ** 0.5) < 1e-12                      # half of STIR: half as much


def test_the_mouths_of_real_clips_are_read_by_a_proxy_that_follows_the_truth(clips):
    """Without their truth, drawn talkers are real clips; one talker at a time, as the axis is that of one face. The
    truth is unknown to the proxy, its sign included: open is where sound is loud."""
    follow = []
    for i in range(4):
        clip = render_talker(i, 31, 64, 256)
        truth = clip.truth["opening"] * clip.truth["width"]
        parts = [Clip("part", clip.frames[a:a + 64], clip.audio[a * 640:(a + 64) * 640]) for a in range(0, 256, 64)]
        proxy = mouths(parts, 64)
        assert abs(proxy.mean()) < 1e-4 and abs(proxy.std() - 1) < 1e-4
        follow.append(torch.corrcoef(torch.stack([proxy.flatten(), truth]))[0, 1].item())
    assert min(follow) > 0.8, follow


def test_the_same_seed_gives_the_same_lessons_and_another_gives_others(good):
    one, two, other = (lessons(good, None, 6, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(vars(one).values(), vars(two).values())
               if torch.is_tensor(a))
    assert one.frames.shape != other.frames.shape or not torch.equal(one.frames, other.frames)


def test_quality_falls_with_what_was_done(good):
    """Of 200 lessons: sound of its own agrees, a strong fault is a low rating of motion, and all stay within 1..5."""
    truth = lessons(good, None, 200, 0, 36)
    assert 1 <= truth.quality.min() and truth.quality.max() <= 5
    worst = truth.faults.amax(1)
    assert (truth.quality[:, 2] <= 5 - 4 * worst + 1e-4).all() and (worst > 0).float().mean() > 0.3
    expected = 5 - 4 * torch.stack([apart(*pair) for pair in zip(truth.shown, truth.called)])
    torch.testing.assert_close(truth.quality[:, 0], expected)
    assert (truth.quality[:, 0] > 4.5).float().mean() > 0.1 and (truth.quality[:, 0] < 2).float().mean() > 0.1


def test_rivals_share_window_sound_and_fault_and_differ_in_what_was_generated(good):
    """Six versions of each clip, here the same mouth at six brightnesses: what is left to differ is the version."""
    frames = good.frames[:3].repeat_interleave(6, 0)
    frames = frames // torch.arange(1, 7).repeat(3).view(-1, 1, 1, 1, 1).byte()
    rows = [x[:3].repeat_interleave(6, 0) for x in (good.audio, good.called, good.shown, good.lively, good.fault)]
    generated = Material(frames, *rows)
    truth = lessons(good, generated, 16, 5)
    assert truth.rivals == 4
    same = lambda x: (x[-4:].nan_to_num() == x[-4:-3].nan_to_num()).all()
    assert same(truth.audio) and same(truth.called) and same(truth.shown) and same(truth.quality)
    assert not any(torch.equal(a, b) for i, a in enumerate(truth.frames[-4:]) for b in truth.frames[-4:][:i])
    assert lessons(good, None, 16, 5).rivals == 0


def test_the_loss_of_rivals_asks_for_differences_alone():
    """Two groups: ratings that are all too high by the same cost no more; one that is .4 off its group costs."""
    log_p = torch.full((8, 3, 9), -30.0)
    ratings = torch.tensor([1., 2, 3, 4, 5, 4, 4, 2])
    log_p[torch.arange(8), 0, 2 + ratings.long()] = 0.0                               # digit d is token 2 + d
    quality = torch.zeros(8, 3)
    quality[:, 0] = ratings - torch.tensor([0.7] * 4 + [0.2] * 4)
    loss = lambda rivals: rating_loss(log_p, range(3, 8), SimpleNamespace(quality=quality, rivals=rivals)).item()
    assert loss(8) - loss(0) == pytest.approx(0, abs=1e-5)
    quality[7, 0] -= 0.4                                                              # off by -.1 -.1 -.1 .3
    expected = (3 * 0.5 + 2.5) / 8                                                    # Huber's, in tenths of a point
    assert loss(8) - loss(0) == pytest.approx(school.RIVALRY * expected, abs=1e-5)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_seen_and_grows_with_its_strength(good, fault):
    x, mouth = good.frames[0, :48] / 255, good.shown[0, :48]
    change = [(spoil(fault, u, x, mouth, torch.Generator().manual_seed(0))[0] - x).abs().mean() for u in (0.2, 0.9)]
    assert 1e-4 < change[0] < change[1]


def test_acting_with_gain_one_is_the_clip_and_with_gain_zero_its_first_frame(good):
    face, pose, frames = good.face[0] / 255, good.pose[0], good.frames[0] / 255
    assert (act(face, pose, 1.0, 1.0) - frames).abs().mean() < 0.015
    assert (act(face, pose, 0.0, 0.0) - frames[:1]).abs().mean() < 0.01
    half = act(face, pose, 0.5, 0.5)
    assert half.diff(dim=0).abs().mean() < 0.75 * frames.diff(dim=0).abs().mean()


def test_rating_loss_is_the_cross_entropy_with_two_digits(good):
    logits = torch.randn(2, 3, 20, dtype=torch.float64)
    quality = torch.tensor([[1.0, 3.4, 5.0], [2.5, 4.75, 1.25]])
    expected = 0
    for b in range(2):
        for a in range(3):
            low = min(int(quality[b, a]), 4)
            share = quality[b, a].item() - low
            log_p = logits[b, a] - torch.logsumexp(logits[b, a], 0)
            expected -= ((1 - share) * log_p[7 + low] + share * log_p[8 + low]) / 6   # digit d is token 7 + d
    truth = SimpleNamespace(quality=quality, rivals=0)
    torch.testing.assert_close(rating_loss(logits, range(8, 13), truth), expected)


def test_a_few_lessons_lower_the_loss_and_the_judge_survives_the_disk(good, batch, tmp_path):
    judge, truth = tiny_judge(), lessons(good, None, 8, 0)
    loss = lambda: rating_loss(judge.logits(truth.frames, truth.audio), judge.digits, truth).item()
    before = loss()
    teach(judge, good, None, 10, batch=4)
    assert loss() < before - 0.3
    assert not judge.model.model.layers[1]._forward_hooks                            # the hints are gone
    save_judge(judge, tmp_path / "judge", "a card")
    again = Judge.load(tmp_path / "judge")
    assert (again.rubric, again.side, again.window) == (judge.rubric, judge.side, judge.window)
    logits = [j.logits(truth.frames, truth.audio) for j in (judge, again)]
    torch.testing.assert_close(*logits, atol=0.02, rtol=0)                           # half precision on disk


# ---------------------------------------------------------------- the embedded judge

def test_the_embedded_judge_is_small_and_carries_its_card():
    size = sum(path.stat().st_size for path in DEFAULT_JUDGE.iterdir())
    assert size < 8e6 and "extras.school teach" in (DEFAULT_JUDGE / "README.md").read_text()


def test_the_embedded_judge_agrees_with_the_quality_of_fresh_clips(embedded, good):
    result = exam(embedded, good, 64)                                                # as many as its card says
    for aspect, least in zip(ASPECTS, (0.93, 0.80, 0.70)):
        (rank, *_), (pairs, *_) = result[aspect]
        assert rank > least and pairs > 0.80, (aspect, rank, pairs)


def test_the_embedded_judge_finds_three_frames_of_offset(embedded):
    """Of sixty talkers that it never met, flawless but that the lips of each fourth are three frames late, and of each
    fourth as early: the share of pairs in which its rating of lips is the lower for the clip out of sync."""
    talkers = [render_talker(i, 71, 64, 48, {"offset": (0, 3, 0, -3)[i % 4]}) for i in range(60)]
    rating = rate_whole(embedded, pixels(talkers, 48), sounds(talkers, 48), [c.name for c in talkers])[0][:, 0]
    for late_or_early in rating[1::4], rating[3::4]:
        assert (rating[0::2, None] > late_or_early).float().mean() > 0.9


def test_the_better_clip_wins_on_each_aspect(embedded, good):
    verdict = battery(embedded, good)
    shares = {}
    for line in verdict.splitlines()[1:-3]:
        shares.setdefault(line.split()[0], []).append(float(line.split("[")[0].split()[-1]))
    assert set(shares) == set(ASPECTS) and all(sum(s) / len(s) > 0.8 for s in shares.values()), verdict


def test_the_embedded_judge_fails_a_judge_that_is_deaf(embedded, good):
    """The battery must be able to fail: this one hears the same sound with every clip."""
    deaf = SimpleNamespace(rate=lambda x, audio, names: embedded.rate(x, audio[:1].expand_as(audio), names))
    assert "lip_sync: do not trust it" in battery(deaf, good)


# ---------------------------------------------------------------- the towers

def test_towers_are_taught_alone_to_see_and_to_hear_mouths(good, monkeypatch):
    """Sixty small steps without the language model: both mouths are read better, by the readouts that were taught."""
    monkeypatch.setattr(school, "TOWER_PAIRS", 8), monkeypatch.setattr(school, "TOWER_FRAMES", 100)
    judge, versions = tiny_judge(), [field.repeat_interleave(6, 0) for field in vars(good).values()]
    text, readouts = judge.model.model.layers[0].mlp.up_proj.weight.clone(), Hints(judge)

    def errors():
        hints, rng = Hints(judge), torch.Generator().manual_seed(7)
        hints.load_state_dict(readouts.state_dict())
        with torch.no_grad():
            return [loss(rng).item() for loss in (lambda rng: seen_loss(judge, hints, good, Material(*versions), rng),
                                                  lambda rng: heard_loss(judge, hints, good, rng))]
    before = errors()
    monkeypatch.setattr(school, "Hints", lambda judge: readouts)
    teach(judge, good, Material(*versions), 0, tower_steps=60)
    assert all(b < 0.8 * a for a, b in zip(before, errors())), (before, errors())
    assert torch.equal(text, judge.model.model.layers[0].mlp.up_proj.weight)


def test_rivals_are_compared_with_their_mean():
    error = torch.tensor([[1.0, 5.0], [3.0, 5.0], [0.0, 1.0], [4.0, 3.0]])
    torch.testing.assert_close(among_rivals(error, 2), torch.tensor([[[-1.0, 0], [1, 0]], [[-2, -1], [2, 1]]]))


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize("flags, said", [
    (["--judge", "none"], "cannot be validated"),
    (["--judge-url", "http://127.0.0.1:9/v1"], "needs --judge-model"),
    (["--judge", "nothing/at/all"], "cannot be loaded as a judge"),
])
def test_what_cannot_be_done_is_one_line(flags, said, clips, monkeypatch, tmp_path):
    monkeypatch.setattr(school, "synthetic_clips", lambda *a, **k: clips)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MediaError, match=said):
        school.main(["validate", *flags])


@pytest.mark.parametrize("command", ["validate --clips 0", "validate --judge-dtype float8", "teach --steps 0",
                                     "sync --steps 0", "teach --tower-steps -1", "sync --seed 9999999999999999999"])
def test_bad_flags_end_with_a_usage_line(command, capsys):
    with pytest.raises(SystemExit) as end:
        school.main(command.split())
    assert end.value.code == 2 and command.split()[1] in capsys.readouterr().err.splitlines()[-1]
