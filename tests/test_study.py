"""A study of people's preferences: blind, paired, exact. From two runs to a page, and from votes to win rates."""

import base64
import json
import re

import pytest
import torch

import reward
import sample
from data import MediaError, load_clip
from extras.talkers import render_talker
from model import Config, Generator, save_generator
from reward import clopper_pearson, tally

SHAPE = dict(size=32, grid=3, width=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp_width=32, space_channels=6,
             channels=8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three generators of random weights, the last of other pictures, and a cache of clips."""
    folder = tmp_path_factory.mktemp("secretly")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        for seed, (name, more) in enumerate({"amber": {}, "birch": {}, "large": {"size": 64}}.items()):
            torch.manual_seed(seed)
            model = Generator(Config(**SHAPE | more))
            model.codec.space.normal_(std=0.05), model.codec.time.normal_(std=0.05)
            for weight in model.parameters():        # those that start at zero would hide the noise
                weight.data.normal_(std=0.2)
            save_generator(model, folder / name, model.state_dict())
        yield folder


def make(runs, out, one="amber", other="birch", *more):
    sample.main(["--study", str(runs / one), str(runs / other), "--out", str(out), "--steps", "1",
                 "--max-seconds", "1.2", "--judge", "none", *more])
    html = (out / "study.html").read_text()
    page = json.loads(re.search(r'<script id="study" type="application/json">(.*?)</script>', html)[1])
    return html, page, json.loads((out / "key.json").read_text())


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    return make(runs, tmp_path_factory.mktemp("made"), "amber", "birch", "--clips", "8")


def clip(uri, path):
    path.write_bytes(base64.b64decode(uri.removeprefix("data:video/mp4;base64,"), validate=True))
    return load_clip(path, 256)


# ---------------------------------------------------------------- the page

def test_the_page_knows_pairs_and_nothing_of_runs(made, runs):
    """No name of a run, folder or clip in the page or in its videos; sides differ between pairs, four of eight each."""
    html, page, key = made
    assert set(page) == {"study", "pairs"} and all(set(pair) == {"id", "left", "right"} for pair in page["pairs"])
    assert [pair["id"] for pair in page["pairs"]] == list(key["pairs"]) and page["study"] == key["study"]
    videos = b"".join(base64.b64decode(pair[side].partition(",")[2])
                      for pair in page["pairs"] for side in ("left", "right"))
    for word in ("amber", "birch", "secretly", "key.json", *(pair["clip"] for pair in key["pairs"].values())):
        assert word not in re.sub("base64,[^\"]*", "", html) and word.encode() not in videos
    lefts = [pair["left"] for pair in key["pairs"].values()]
    assert sorted(lefts) == ["a"] * 4 + ["b"] * 4 and lefts != sorted(lefts) and lefts != sorted(lefts)[::-1]
    assert "http" not in html                                          # it loads nothing


def test_the_seed_makes_the_study(made, runs, tmp_path):
    """The same seed: the same page and key, byte for byte; another: other clips and another order."""
    again = make(runs, tmp_path / "same", "amber", "birch", "--clips", "8")
    assert again == made
    html, page, key = make(runs, tmp_path / "other", "amber", "birch", "--clips", "8", "--seed", "1")
    assert page["study"] != made[1]["study"]
    assert [p["left"] for p in key["pairs"].values()] != [p["left"] for p in made[2]["pairs"].values()]


def test_both_videos_of_a_pair_have_one_noise_and_one_sound(made, runs, tmp_path):
    """A run against itself gives the same bytes on both sides; two runs differ in the picture and not in the sound."""
    _, page, _ = make(runs, tmp_path / "self", "amber", "amber", "--clips", "2")
    assert all(pair["left"] == pair["right"] for pair in page["pairs"])
    assert page["pairs"][0]["left"] != page["pairs"][1]["left"]
    model, one = sample.load_generator(runs / "amber").eval(), [render_talker(0, 0, 32, 28)]
    assert not torch.allclose(*(sample.imitate(model, one, 28, 1, seed=seed) for seed in (0, 1)), atol=0.01)
    left, right = (clip(made[1]["pairs"][0][side], tmp_path / "v.mp4") for side in ("left", "right"))
    assert left.frames.shape == right.frames.shape == (28, 3, 256, 256)
    assert torch.equal(left.audio, right.audio) and left.audio.abs().max() > 0.1
    assert not torch.equal(left.frames, right.frames)


def test_the_key_says_which_side_is_whose(made, runs):
    """Against a study of the same runs named in the other order: where the key says a, the video is a's."""
    one = {pair["id"]: pair for pair in made[1]["pairs"]}
    model = sample.load_generator(runs / "amber").eval()
    args = sample.parse_arguments(["--study", str(runs / "amber"), str(runs / "birch"), "--out", "x", "--clips", "8",
                                   "--max-seconds", "1.2", "--steps", "1"])
    clips, frames = sample.study_clips(args, [model, model])
    videos = sample.imitate(model, clips, frames, 1, 1.0, 0)
    for i, (name, pair) in enumerate(list(made[2]["pairs"].items())[:3]):
        uri = sample.data_uri(videos[i], clips[i].audio[:frames * 640])
        side = next(side for side in ("left", "right") if pair[side] == "a")
        assert one[name][side] == uri and pair["clip"] == clips[i].name


def test_the_judge_rates_what_the_page_shows(runs, tmp_path, monkeypatch):
    class Bright:
        window = None

        def rate(self, frames, audio, names):
            bright = frames.mean((1, 2, 3, 4))[:, None]
            return reward.Ratings(1 + bright * torch.tensor([1.0, 2, 3]), torch.ones(len(frames), 3))
    monkeypatch.setattr(reward, "make_judge", lambda args: Bright())
    _, page, key = make(runs, tmp_path / "s", "amber", "birch", "--clips", "2")
    for pair in page["pairs"]:
        for side in ("left", "right"):
            rated = key["pairs"][pair["id"]]["judge"][key["pairs"][pair["id"]][side]]
            bright = clip(pair[side], tmp_path / "v.mp4").frames.float().mean().item() / 255
            assert rated == pytest.approx([1 + bright, 1 + 2 * bright, 1 + 3 * bright], abs=0.03)


@pytest.mark.parametrize("one, other, more, says", [
    ("amber", "nowhere", [], "holds no config.json"),
    ("amber", "large", [], "makes pictures of 64 pixels"),
    ("amber", "birch", ["--data", "nowhere"], "is not a folder")])
def test_a_study_that_cannot_be_made_ends_with_one_line(runs, tmp_path, one, other, more, says):
    with pytest.raises(MediaError, match=says) as error:
        make(runs, tmp_path / "s", one, other, *more)
    assert "\n" not in str(error.value) and not (tmp_path / "s").exists()


def test_the_key_of_an_earlier_study_is_not_overwritten(runs, tmp_path):
    (tmp_path / "key.json").write_text("{}")
    with pytest.raises(MediaError, match="is the key of a study that may have votes"):
        make(runs, tmp_path)
    assert (tmp_path / "key.json").read_text() == "{}"


@pytest.mark.parametrize("wrong", ["--study a b --out x --clips 0", "--study a --out x", "--out x", "--image a --out x",
                                   "--study a b --out x --max-seconds 0.5"])
def test_bad_flags_of_a_study(wrong, capsys):
    with pytest.raises(SystemExit):
        sample.main(wrong.split())
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- the votes

@pytest.mark.parametrize("k, n, low, high", [(8, 10, 0.4439, 0.9748), (0, 10, 0, 0.3085), (10, 10, 0.6915, 1),
                                             (5, 10, 0.1871, 0.8129), (1, 1, 0.025, 1), (500, 1000, 0.4685, 0.5315)])
def test_intervals_are_those_of_clopper_and_pearson(k, n, low, high):
    """Known values; at the ends also by hand: 1 - .025^(1/10) = .3085."""
    assert clopper_pearson(k, n) == pytest.approx((low, high), abs=6e-5)


@pytest.fixture
def files(tmp_path):
    """A key of three pairs: a stands left, right, left; the judge prefers a, b, a, in lip_sync."""
    key = {"study": "s1", "a": "runs/one", "b": "runs/other", "pairs": {
        "001": {"left": "a", "right": "b", "judge": {"a": [4, 3, 3], "b": [3, 4, 3]}},
        "002": {"left": "b", "right": "a", "judge": {"a": [3, 4, 3], "b": [4, 3, 3]}},
        "003": {"left": "a", "right": "b", "judge": {"a": [5, 3, 3], "b": [1, 4, 3]}}}}
    (tmp_path / "key.json").write_text(json.dumps(key))
    votes = {"study": "s1", "rater": "r1", "votes": {"001": {"lip_sync": "left", "overall": "tie"},
                                                     "002": {"lip_sync": "right", "motion": "right"},
                                                     "003": {"lip_sync": "left"}}}
    (tmp_path / "votes.json").write_text(json.dumps(votes))
    (tmp_path / "more.json").write_text(json.dumps(votes | {"rater": "r2", "votes": {"001": {"lip_sync": "right"},
                                                                                     "002": {"lip_sync": "tie"}}}))
    return tmp_path


def test_votes_are_counted_for_the_run_that_stood_there(files, capsys):
    """lip_sync by hand: a, a, a of the first rater, b and a tie of the second: 3 of 4. The judge: a, b, a, and a
    against the vote for b: alike in 2 of 4. motion: a once, and the judge sees no difference."""
    reward.main(["--tally", str(files / "votes.json"), str(files / "more.json"), "--key", str(files / "key.json")])
    lines = {line.split()[0]: re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()}
    assert lines["2"].startswith("2 raters, 3 pairs; a: runs/one, b: runs/other")
    assert lines["lip_sync"] == "lip_sync 3 1 1 0.750 [0.194, 0.994] 0.500 [0.068, 0.932] of 4"
    assert lines["motion"] == "motion 1 0 0 1.000 [0.025, 1.000] -"
    assert lines["overall"] == "overall 0 0 1 no vote -"
    assert lines["expressiveness"] == "expressiveness 0 0 0 no vote -"


@pytest.mark.parametrize("change, says", [
    (lambda v: v | {"study": "s2"}, "holds votes of study s2; the key is of s1"),
    (lambda v: v | {"votes": {"009": {}}}, "votes on the unknown pair 009"),
    (lambda v: v | {"votes": {"001": {"lip_sync": "both"}}}, "is not a file of votes"),
    (lambda v: v | {"votes": {"001": {"beauty": "left"}}}, "is not a file of votes"),
    (lambda v: v | {"votes": []}, "is not a file of votes"),
    (lambda v: [1], "is not a file of votes"),
    (lambda v: {"study": "s1", "votes": {}}, "is not a file of votes"),
    (lambda v: v | {"rater": "r2"}, "is of the same rater as")])
def test_votes_that_cannot_be_counted_end_with_one_line(files, change, says):
    (files / "votes.json").write_text(json.dumps(change(json.loads((files / "votes.json").read_text()))))
    with pytest.raises(MediaError, match=says) as error:
        tally([files / "more.json", files / "votes.json"], files / "key.json")
    assert "\n" not in str(error.value) and "votes.json" in str(error.value)


def test_missing_and_broken_files_are_named(files):
    with pytest.raises(MediaError, match="none.json: cannot be read"):
        tally([files / "none.json"], files / "key.json")
    with pytest.raises(MediaError, match="votes.json: is not the key of a study"):
        tally([files / "votes.json"], files / "votes.json")
    (files / "votes.json").write_text("{")
    with pytest.raises(MediaError, match="votes.json: is not a file of votes"):
        tally([files / "votes.json"], files / "key.json")
    with pytest.raises(SystemExit):
        reward.main(["--tally", str(files / "votes.json")])
