"""What extras/people.py promises of agreement, studies and votes."""

import base64
import json
import math
import re

import numpy as np
import pytest
import torch

import sample
from data import MediaError, load_clip, write_video
from extras import people, reward_flags
from extras.people import (align, bootstrap, isotonic, pairwise_accuracy, rater_ceiling, read_ratings, save_calibration,
                           spearman, tally)
from extras.reward_flags import load_calibration
from extras.talkers import render_talker
from model import Config, Generator, save_generator
from reward import ASPECTS, Ratings, calibrate

# ---------------------------------------------------------------- agreement with people

def write(path, text: str):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_ratings_are_gathered_by_video_and_aspect(tmp_path):
    path = write(tmp_path / "r.csv", "\ufeffvideo,rater,aspect,rating\r\nv1,a,motion,4\r\nv1,b,motion, 2.5\r\n\r\n"
                                     "v1,a,lip_sync,1\r\n\"v,2\",a,motion,5\r\n")
    assert read_ratings(path) == [("v1", "motion", [4, 2.5]), ("v1", "lip_sync", [1]), ("v,2", "motion", [5])]


@pytest.mark.parametrize("text, said", [
    ("", "line 1 lacks video, aspect, rating"), ("video,rating\nv,3\n", "line 1 lacks aspect"),
    ("video,aspect,rating\n", "holds no ratings"), ("video,aspect,rating\nv,motion,3\nv,beauty,3\n", "line 3.*beauty"),
    ("video,aspect,rating\nv,motion,good\n", "line 2.*'good' is not a rating"),
    ("video,aspect,rating\nv,motion,6\n", "line 2.*'6'"), ("video,aspect,rating\nv,motion,0.9\n", "line 2.*'0.9'"),
    ("video,aspect,rating\nv,motion,nan\n", "line 2.*'nan'"), ("video,aspect,rating\nv,motion\n", "line 2.*rating=''"),
    ("video,aspect,rating\n,motion,3\n", "line 2.*video=''"), (b"\xff\xd8\xff\xe0\x00", "is not text"),
])
def test_malformed_ratings_name_the_file_and_the_line(tmp_path, text, said):
    path = write(tmp_path / "r.csv", text)
    with pytest.raises(MediaError, match=f"r.csv.*{said}") as caught:
        read_ratings(path)
    assert "\n" not in str(caught.value)


def test_ratings_that_are_not_there_are_reported(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(MediaError, match="cannot be read"):
            read_ratings(path)


def test_pairs_that_differ_in_the_truth_are_counted_and_a_tie_is_half_right():
    """By hand: of the six pairs the judge ties one; only pairs of one group count, or those a point apart."""
    judge, truth = [1, 2, 2, 4], [1, 3, 2, 4]
    assert pairwise_accuracy(judge, truth) == pytest.approx(5.5 / 6)
    assert pairwise_accuracy(judge, truth, [0, 1, 1, 0]) == pytest.approx(1.5 / 2)
    assert pairwise_accuracy(judge, truth, least=2) == 1 and pairwise_accuracy([3, 2, 1], [1, 2, 2.1], least=1) == 0
    assert math.isnan(pairwise_accuracy([1, 2], [3, 3])) and math.isnan(pairwise_accuracy([1, 2], [3, 4], [0, 1]))


def test_an_interval_resamples_items_and_leaves_out_what_is_not_defined():
    """A judge that is the truth agrees with it in every resampling, also where some are of one video alone."""
    for n in (3, 9):
        assert bootstrap(spearman, torch.arange(n), torch.arange(n)) == pytest.approx((1, 1, 1))
    for few in ([], [1]):
        assert all(map(math.isnan, bootstrap(spearman, few, few)))
    value, low, high = bootstrap(np.mean, np.arange(100))
    assert value == 49.5 and (low, high) == pytest.approx((49.5 - 5.66, 49.5 + 5.66), abs=0.6)      # 1.96 std / 10


def test_the_ceiling_is_one_for_raters_of_one_mind_and_zero_for_noise():
    assert rater_ceiling([[k, k, k] for k in range(1, 6)]) == pytest.approx(1)
    noise = np.random.default_rng(0).integers(1, 6, (300, 4)).tolist()
    assert abs(rater_ceiling(noise, 20)) < 0.15
    assert rater_ceiling(noise, 1) == rater_ceiling(noise, 1) != rater_ceiling(noise, 1, seed=1)
    assert math.isnan(rater_ceiling([])) and math.isnan(rater_ceiling([[1], [2], [3]]))
    assert math.isnan(rater_ceiling([[1, 2], [3]]))


def test_the_ceiling_equals_the_reliability_of_half_the_raters():
    """Truth t, noise e of variance 1 in each of 4 raters: halves correlate by var t / (var t + 1 / 2)."""
    rng = np.random.default_rng(0)
    ratings = rng.normal(size=(2000, 1)) + rng.normal(size=(2000, 4))
    rank = 6 / math.pi * math.asin(1 / 1.5 / 2)                                      # Spearman of a Gaussian pair
    assert rater_ceiling(ratings.tolist(), 5) == pytest.approx(rank, abs=0.03)


def test_knots_are_the_centres_of_blocks_and_ties_are_one_block():
    x, y = isotonic([4, 1, 2, 3, 5, 5], [3, 1, 4, 2, 6, 4])
    assert x.tolist() == [1, 3, 5] and y.tolist() == [1, 3, 5]                      # (4, 2, 3) is one block; ties at 5
    x, y = isotonic(torch.tensor([1.0, 2.0, 3.0]), [3, 2, 1])
    assert x.tolist() == [2] and y.tolist() == [2]


def test_calibration_rises_between_centres_and_is_clamped_outside():
    knots = isotonic([1, 2, 3, 4], [1, 3, 2, 5])     # centres (1, 1), (2.5, 2.5), (4, 5)
    scores = torch.tensor([[0.0, 1.0], [1.75, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(calibrate(scores, knots), torch.tensor([[1, 1], [1.75, 5]], dtype=torch.float64))
    assert (calibrate(torch.linspace(1, 4, 50), knots).diff() > 0).all()
    assert calibrate(torch.zeros(3), knots).dtype == torch.float32


def test_a_calibration_survives_the_disk(tmp_path):
    knots = isotonic(torch.rand(9), torch.rand(9))
    save_calibration(tmp_path / "c.json", {"motion": knots})
    read = load_calibration(tmp_path / "c.json")
    assert list(read) == ["motion"] and all((a == b).all() for a, b in zip(read["motion"], knots))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "\x00", '{"beauty": [[1], [1]]}', '{"motion": [[1, 2], [1]]}',
                                  '{"motion": [[], []]}', '{"motion": [[1, 2]]}', '{"motion": [[2, 1], [1, 2]]}',
                                  '{"motion": [[1, 2], [NaN, 2]]}', '{"motion": [["a"], [1]]}', '{"motion": null}',
                                  '{"motion": {"x": 1}}'])
def test_a_malformed_calibration_is_one_clear_line(tmp_path, text):
    with pytest.raises(MediaError, match="c.json: is not a calibration") as caught:
        load_calibration(write(tmp_path / "c.json", text))
    assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="cannot be read"):
        load_calibration(tmp_path / "none.json")


def test_the_table_tells_agreement_and_saves_what_can_be_fitted(tmp_path):
    """lip_sync: seven videos, judged in order; expressiveness: judged upside down; motion: two videos."""
    rows = [(f"v{i}", "lip_sync", [1 + i / 2, 1 + i / 2]) for i in range(7)]
    rows += [(f"v{i}", "expressiveness", [1 + i / 2]) for i in range(7)] + [(f"v{i}", "motion", [2, 3]) for i in (0, 1)]
    judge = {(video, aspect): int(video[1]) * (-1 if aspect == "expressiveness" else 1) for video, aspect, _ in rows}
    table = align(judge, rows, tmp_path / "c.json").splitlines()
    assert table[1].split()[:3] == ["lip_sync", "7", "14"] and table[1].count("1.00 [1.00, 1.00]") == 3
    assert table[1].endswith(" 1.00") and table[2].endswith(" nan")
    assert table[2].count("-1.00 [-1.00, -1.00]") == 2 and "0.00 [0.00, 0.00]" in table[2]
    assert table[3].split()[:6] == ["motion", "2", "4", "nan", "[nan,", "nan]"]
    assert "expressiveness: no calibration; the judge does not rise" in table[4]
    assert "motion: no calibration; 2 videos rated, 5 needed" in table[5]
    x, y = load_calibration(tmp_path / "c.json")["lip_sync"]
    assert x.tolist() == list(range(7)) and y.tolist() == [1 + i / 2 for i in range(7)]
    with pytest.raises(MediaError, match="v9: people rated its motion"):
        align(judge, rows + [("v9", "motion", [3])])


def test_people_s_ratings_give_a_table_and_a_calibration(tmp_path, capsys):
    """The path from a folder of videos to a table."""
    for i in range(6):
        talker = render_talker(i, 31, 64, 30)
        write_video(tmp_path / f"{i}.mp4", talker.frames, talker.audio)
    ratings = [f"{i}.mp4,{aspect},{1 + (i + r) % 5}" for i in range(6) for aspect in ASPECTS for r in range(2)]
    (tmp_path / "ratings.csv").write_text("video,aspect,rating\n" + "\n".join(ratings))
    people.main(["align", str(tmp_path / "ratings.csv"), "--out", str(tmp_path / "c.json")])
    said = capsys.readouterr().out
    assert "Spearman" in said and said.count("[") == 9
    with pytest.raises(MediaError, match="nothing.csv: cannot be read"):
        people.main(["align", "nothing.csv"])
    with pytest.raises(SystemExit):
        people.main(["align", "nothing.csv", "--out", str(tmp_path)])
    assert "name the file to write the calibration to" in capsys.readouterr().err


# ---------------------------------------------------------------- a study of preferences: blind, paired, exact

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
    people.main(["study", str(runs / one), str(runs / other), "--out", str(out), "--steps", "1",
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
    args = people.parse_arguments(["study", str(runs / "amber"), str(runs / "birch"), "--out", "x", "--clips", "8",
                                   "--max-seconds", "1.2", "--steps", "1"])
    clips, frames = people.study_clips(args, [model, model])
    videos = sample.imitate(model, clips, frames, 1, 1.0, 0)
    for i, (name, pair) in enumerate(list(made[2]["pairs"].items())[:3]):
        uri = people.data_uri(videos[i], clips[i].audio[:frames * 640])
        side = next(side for side in ("left", "right") if pair[side] == "a")
        assert one[name][side] == uri and pair["clip"] == clips[i].name


def test_the_judge_rates_what_the_page_shows(runs, tmp_path, monkeypatch):
    class Bright:
        window = None

        def rate(self, frames, audio, names):
            bright = frames.mean((1, 2, 3, 4))[:, None]
            return Ratings(1 + bright * torch.tensor([1.0, 2, 3]), torch.ones(len(frames), 3))
    monkeypatch.setattr(reward_flags, "make_judge", lambda args: Bright())
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


@pytest.mark.parametrize("wrong", ["study a b --out x --clips 0", "study a --out x", "study a b", "",
                                   "study a b --out x --max-seconds 0.5", "tally votes.json"])
def test_bad_flags_end_with_a_usage_line(wrong, capsys):
    with pytest.raises(SystemExit):
        people.main(wrong.split())
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------- the votes

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
    people.main(["tally", str(files / "votes.json"), str(files / "more.json"), "--key", str(files / "key.json")])
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
