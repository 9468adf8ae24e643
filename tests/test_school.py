"""What school promises: lessons of known quality, a judge that learns, and an exam that can be failed."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as nnf
from scipy.stats import spearmanr

from data import Clip
from extras import school
from extras.files import MediaError
from extras.lessons import (FAULTS, LESSON_FRAMES, MATERIAL_FRAMES, REST, VERSIONS, Material, act,
                            draw_lessons, generated_material, good_material, lip_mismatch, spoil, true_mouths)
from extras.school import (Hints, audio_loss, battery, exam, rating_loss, save_judge, spoilt_in_known_ways,
                           teach, tiny_judge, vision_loss)
from extras.talkers import render_talker
from reward import ASPECTS, DEFAULT_JUDGE, Judge
from tiny import random_generator


@pytest.fixture(scope="module")
def good(strangers) -> Material:
    return good_material(strangers)


@pytest.fixture(scope="module")
def half(good) -> Material:
    return Material(*[field[:8] for field in vars(good).values()])


@pytest.fixture(scope="module")
def generated(good) -> Material:
    """Three clips in six versions that differ in brightness alone."""
    frames, *rest = [field[:3].repeat_interleave(6, 0) for field in list(vars(good).values())[:6]]
    return Material(frames // torch.arange(1, 7).repeat(3).view(-1, 1, 1, 1, 1).byte(), *rest)


@pytest.fixture(scope="module")
def embedded() -> Judge:
    return Judge.load()


# ---------------------------------------------------------------- lessons

def test_a_lesson_is_labelled_by_what_was_done(good):
    """Of 200 lessons: lips by 5 - 4 sqrt(1 - correlation) where both mouths move, motion by the worst fault;
    liveliness follows how much changes from frame to frame."""
    lessons = draw_lessons(good, None, 200, 0, 36)
    lips, lively, motion = lessons.quality.T
    assert 1 <= lessons.quality.min() and lessons.quality.max() <= 5
    seen, heard = lessons.mouth_seen, lessons.mouth_heard
    moving = torch.minimum(seen.std(1), heard.std(1)) > 1.1 * REST
    r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(seen, heard)])
    assert moving.sum() > 100
    torch.testing.assert_close(lips[moving], 5 - 4 * (1 - r[moving]).clamp(0, 1).sqrt(), atol=5e-3, rtol=0)
    assert (lips > 4.5).float().mean() > 0.1 and (lips < 2).float().mean() > 0.1
    worst = lessons.faults.amax(1)
    strong = worst > 0.15                                                 # what a splice counts for
    torch.testing.assert_close(motion[strong], 5 - 4 * worst[strong])
    assert strong.float().mean() > 0.3 and (motion[~strong] > 4.39).all()
    change = lessons.frames.float().diff(dim=1).abs().mean((1, 2, 3, 4))
    assert spearmanr(lively[worst == 0], change[worst == 0]).statistic > 0.5


def test_a_seed_gives_the_same_lessons_and_another_gives_others(good, generated):
    one, two, other = (draw_lessons(good, generated, 12, seed) for seed in (3, 3, 4))
    for a, b in zip(vars(one).values(), vars(two).values()):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert one.frames.shape != other.frames.shape or not torch.equal(one.frames, other.frames)


def test_generators_imitate_clips_that_are_long_enough(good, strangers, tmp_path):
    """Of four clips one is too short and one longer: two runs, of other clips, make clips of one length."""
    random_generator(tmp_path, 0, size=64)
    longer = render_talker(40, 31, 64, 70)
    short = replace(strangers[0], frames=strangers[0].frames[:40], audio=strangers[0].audio[:40 * 640])
    made = generated_material([tmp_path, tmp_path], [short, strangers[1], strangers[2], longer])
    assert made.frames.shape[:2] == ((3 + 2) * VERSIONS, MATERIAL_FRAMES)
    lessons = draw_lessons(good, made, 8, 0, LESSON_FRAMES[1])
    assert lessons.quality.isfinite().all() and 1 <= lessons.quality.min()


def test_mouths_at_rest_count_as_if_they_moved_a_little():
    torch.manual_seed(0)
    a = torch.randn(2000, dtype=torch.float64)
    unit = (a - a.mean()) / a.std(correction=0)
    assert lip_mismatch(a, 3 * a + 1) < 1e-7 and lip_mismatch(a, -a) == 1
    assert lip_mismatch(0.5 * REST * unit, unit).item() == pytest.approx(0.125 ** 0.5)     # half of REST


def test_the_mouths_of_real_clips_are_read_by_a_proxy_that_follows_the_truth():
    """Without their truth, drawn talkers are real clips; one at a time, as the axis is that of one face."""
    for i in range(2):
        clip = render_talker(i, 31, 64, 256)
        parts = [Clip("part", *part) for part in zip(clip.frames.split(64), clip.audio.split(64 * 640))]
        truth = clip.truth["opening"] * clip.truth["width"]
        assert torch.corrcoef(torch.stack([true_mouths(parts, 64).flatten(), truth]))[0, 1] > 0.8


def held(y):
    return (y.diff(dim=0) == 0).all((1, 2, 3)).float().mean()


# What each fault of strength .9 does to a clip x, and y is left; borders of seams are every 3 to 6 frames.
DONE = {
    "tremble": lambda x, y: y.diff(n=3, dim=0).abs().mean() > 3 * x.diff(n=3, dim=0).abs().mean(),
    "freeze": lambda x, y: held(x) == 0 and 0.4 < held(y) <= 0.75,
    "ghost": lambda x, y: min((y[7:] - 0.505 * x[7:] - 0.495 * x[7 - n:len(x) - n]).abs().max()
                              for n in range(2, 8)) < 1e-6,
    "blur": lambda x, y: y.diff(dim=-1).abs().mean() < 0.7 * x.diff(dim=-1).abs().mean(),
    "noise": lambda x, y: abs((y - x).std() - 0.09) < 0.002,
    "flicker": lambda x, y: min(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
                                for a, b in zip(x.flatten(0, 1), y.flatten(0, 1))) > 0.999,
    "seam": lambda x, y: max((d := (y - x).diff(dim=0).abs().mean((1, 2, 3)))[n - 1::n].mean() / d.median()
                             for n in range(3, 7)) > 5,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_does_what_it_says_and_grows_with_its_strength(good, fault):
    x, mouth = good.frames[0, :48] / 255, good.mouth_seen[0, :48]
    weak, strong = (spoil(fault, u, x, mouth, torch.Generator().manual_seed(0))[0] for u in (0.2, 0.9))
    assert 1e-4 < (weak - x).abs().mean() < (strong - x).abs().mean()
    assert DONE[fault](x, strong)


def test_acting_with_gain_one_is_the_clip_and_with_gain_zero_its_first_frame(good):
    face, pose, frames = good.face[0] / 255, good.pose[0], good.frames[0] / 255
    assert (act(face, pose, 1.0, 1.0) - frames).abs().mean() < 0.015
    assert (act(face, pose, 0.0, 0.0) - frames[:1]).abs().mean() < 0.01
    assert act(face, pose, 0.5, 0.5).diff(dim=0).abs().mean() < 0.75 * frames.diff(dim=0).abs().mean()


# ---------------------------------------------------------------- teaching

def test_rating_loss_is_the_cross_entropy_with_two_digits_and_inside_groups_huber_s_of_differences():
    """Two groups: ratings that are all too high by the same cost no more; one that is .4 off does."""
    logits = torch.randn(2, 3, 20, dtype=torch.float64)
    quality = torch.tensor([[1.0, 3.4, 5.0], [2.5, 4.75, 1.25]])
    low = quality.long().clamp_max(4)
    cross = lambda digit: nnf.cross_entropy(logits.flatten(0, 1), 7 + digit.flatten(), reduction="none")
    share = (quality - low).flatten()                                     # digit d is token 7 + d
    expected = ((1 - share) * cross(low) + share * cross(low + 1)).mean()
    lessons = SimpleNamespace(quality=quality, grouped=0)
    torch.testing.assert_close(rating_loss(logits, range(8, 13), lessons), expected)
    log_p = torch.full((8, 3, 9), -30.0)
    ratings = torch.tensor([1., 2, 3, 4, 5, 4, 4, 2])
    log_p[torch.arange(8), 0, 2 + ratings.long()] = 0.0                   # digit d is token 2 + d
    quality = torch.zeros(8, 3)
    quality[:, 0] = ratings - torch.tensor([0.7] * 4 + [0.2] * 4)

    def loss(grouped):
        return rating_loss(log_p, range(3, 8), SimpleNamespace(quality=quality, grouped=grouped)).item()

    assert loss(8) - loss(0) == pytest.approx(0, abs=1e-5)
    quality[7, 0] -= 0.4                                                  # off by -.1 -.1 -.1 .3
    expected = (3 * 0.5 + 2.5) / 8                                        # Huber's, in tenths of a point
    assert loss(8) - loss(0) == pytest.approx(school.GROUP_WEIGHT * expected, abs=1e-5)


def test_a_few_lessons_lower_the_loss_and_the_judge_survives_the_disk(good, tmp_path, monkeypatch):
    monkeypatch.setattr(school, "TOWER_PAIRS", 8)
    monkeypatch.setattr(school, "TOWER_FRAMES", 100)
    judge, lessons = tiny_judge(), draw_lessons(good, None, 8, 0)
    loss = lambda: rating_loss(judge.logits(lessons.frames, lessons.audio), judge.digits, lessons).item()
    before = loss()
    teach(judge, good, None, 10, 0, batch=4)
    assert loss() < before - 0.3
    assert not judge.model.model.layers[1]._forward_hooks                # the hints are gone
    save_judge(judge, tmp_path / "judge", "a card")
    again = Judge.load(tmp_path / "judge")
    assert (again.rubric, again.side, again.window) == (judge.rubric, judge.side, judge.window)
    logits = [j.logits(lessons.frames, lessons.audio) for j in (judge, again)]
    torch.testing.assert_close(*logits, atol=0.02, rtol=0)               # half precision on disk


def test_towers_are_taught_alone_to_see_and_to_hear_mouths(good, generated, monkeypatch):
    """Sixty small steps without the language model: both mouths are read better, by the same readouts."""
    judge = tiny_judge()
    text, readouts = judge.model.model.layers[0].mlp.up_proj.weight.clone(), Hints(judge)
    monkeypatch.setattr(school, "Hints", lambda judge: readouts)

    @torch.no_grad()
    def errors():
        hints, rng = Hints(judge), torch.Generator().manual_seed(7)
        hints.load_state_dict(readouts.state_dict())
        losses = vision_loss(judge, hints, good, None, rng), audio_loss(judge, hints, good, rng)
        for hook in hints.hooks:
            hook.remove()
        readouts.answers.clear()                                          # they heard it, too
        return [loss.item() for loss in losses]

    before = errors()
    with monkeypatch.context() as patch:
        patch.setattr(school, "TOWER_PAIRS", 16)
        patch.setattr(school, "TOWER_FRAMES", 300)
        teach(judge, good, None, 0, tower_steps=60)
    assert all(after < 0.8 * first for first, after in zip(before, errors()))
    assert torch.equal(text, judge.model.model.layers[0].mlp.up_proj.weight)
    of_generated = vision_loss(judge, Hints(judge), good, generated, torch.Generator().manual_seed(7))
    assert of_generated.isfinite() and of_generated != before[0]


# ---------------------------------------------------------------- the embedded judge

def test_the_embedded_judge_is_small_and_agrees_with_the_quality_of_fresh_lessons(embedded, good):
    size = sum(path.stat().st_size for path in DEFAULT_JUDGE.iterdir())
    assert size < 8e6 and "extras.school teach" in (DEFAULT_JUDGE / "README.md").read_text()
    result = exam(embedded, good, 24)                                     # its card says as much, of 64 clips
    for aspect, least in zip(ASPECTS, (0.93, 0.80, 0.70)):
        (rank, *_), (pairs, *_) = result[aspect]
        assert rank > least and pairs > 0.80, (aspect, rank, pairs)


def test_the_better_clip_wins_on_each_aspect_and_a_deaf_judge_fails(embedded, half, monkeypatch):
    verdict, shares = battery(embedded, half), {}
    for line in verdict.splitlines()[1:-3]:
        shares.setdefault(line.split()[0], []).append(float(line.split("[")[0].split()[-1]))
    assert [len(shares[aspect]) for aspect in ASPECTS] == [5, 3, 14]
    assert all(sum(some) / len(some) > 0.8 for some in shares.values()), verdict

    monkeypatch.setattr(school, "spoilt_in_known_ways", lambda good: islice(spoilt_in_known_ways(good), 6))
    widths = set()

    def deaf(frames, audio, names):
        widths.add(frames.shape[1])
        return embedded.rate(frames, audio[:1].expand_as(audio), names)
    assert "lip_sync: do not trust it" in battery(SimpleNamespace(rate=deaf, window=32), half)
    assert max(widths) == 32                         # no more at once than it says


# ---------------------------------------------------------------- the command line

@pytest.mark.parametrize("command, said", [
    ("validate --judge none", "cannot be validated"),
    ("validate --judge-url http://127.0.0.1:9/v1", "needs --judge-model"),
    ("validate --clips 0", "--clips must be at least 2"),
    ("sync --out assets", "assets: holds files; choose another --out"),
    ("teach --from-judge assets/sync --out {tmp}", "assets/sync: cannot be loaded as a judge"),
    ("teach --generator nothing --out {tmp}", "nothing: holds no config.json")])
def test_what_cannot_be_done_is_one_line_and_leaves_no_folder(command, said, monkeypatch, tmp_path, capsys):
    """And is told before there are clips."""
    monkeypatch.setattr(school, "synthetic_clips", lambda *a, **k: pytest.fail("minutes are lost"))
    with pytest.raises((MediaError, SystemExit)) as end:
        school.main(command.format(tmp=tmp_path / "judge").split())
    assert said in (str(end.value) + capsys.readouterr().err).splitlines()[-1]
    assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize("command, learn, hold_out, said", [
    ("sync", 1, 1, "has 1 clips to learn from and 1 held out, too few"),
    ("sync", 2, 0, "has 2 clips to learn from and 0 held out, too few"),
    ("teach", 2, 0, "has no clips to hold out")])
def test_too_few_clips_are_refused_before_anything_is_taught(command, learn, hold_out, said, strangers,
                                                             tmp_path, monkeypatch):
    monkeypatch.setattr(school, "folder_clips", lambda *_: (strangers[:learn], strangers[:hold_out]))
    monkeypatch.setattr(school, "teach", lambda *_, **__: pytest.fail("an hour is lost"))
    with pytest.raises(MediaError, match=said):
        school.main([command, "--data", "clips", "--out", str(tmp_path)])
