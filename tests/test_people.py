"""What extras/people.py promises of agreement, studies and votes."""

import base64
import json
import math
import re

import numpy as np
import pytest
import torch

from data import load_clip, write_video
from extras import people, reward_flags
from extras.files import MediaError
from extras.people import align, pairwise_accuracy, read_ratings, tally
from extras.reward_flags import load_calibration
from reward import ASPECTS, Unrated
from tiny import Bright, random_generator


def test_pairs_that_differ_in_the_truth_are_counted_and_a_tie_is_half_right():
    """By hand: of the six pairs the judge ties one; only pairs of one group count, or those a point apart."""
    judge, truth = [1, 2, 2, 4], [1, 3, 2, 4]
    assert pairwise_accuracy(judge, truth) == pytest.approx(5.5 / 6)
    assert pairwise_accuracy(judge, truth, [0, 1, 1, 0]) == pytest.approx(1.5 / 2)
    assert pairwise_accuracy(judge, truth, least=2) == 1
    assert math.isnan(pairwise_accuracy([1, 2], [3, 4], [0, 1]))


def test_the_table_tells_agreement_and_saves_what_can_be_fitted(tmp_path):
    """lip_sync: seven videos, judged in order; expressiveness: judged upside down; motion: two videos."""
    ratings = {"lip_sync": {f"v{i}": [1 + i / 2, 1 + i / 2] for i in range(7)},
               "expressiveness": {f"v{i}": [1 + i / 2] for i in range(7)},
               "motion": {"v0": [2, 3], "v1": [2, 3]}}
    table = align({f"v{i}": [i, -i, i] for i in range(7)}, ratings, tmp_path / "c.json").splitlines()
    assert table[1].split()[:3] == ["lip_sync", "7", "14"] and table[1].count("1.00 [1.00, 1.00]") == 2
    assert table[1].endswith(" 1.00") and table[2].endswith(" nan")
    assert "-1.00 [-1.00, -1.00]" in table[2] and table[3].split()[:4] == ["motion", "2", "4", "nan"]
    assert "expressiveness: no calibration" in table[4] and "motion: no calibration" in table[5]
    calibration = {k: [x.tolist() for x in v] for k, v in load_calibration(tmp_path / "c.json").items()}
    assert calibration == {"lip_sync": [list(range(7)), [1 + i / 2 for i in range(7)]]}


def test_videos_that_people_rated_are_rated_by_the_judge(tmp_path, monkeypatch, capsys):
    """Six grey videos, brighter and brighter: people who like light agree with a judge that does. A seventh
    gets no rating of it, and is left out."""
    class Choosy(Bright):
        def rate(self, frames, audio, names):
            if names == ["6.mp4"]:
                raise Unrated("6.mp4", "no digit")
            return super().rate(frames, audio, names)

    monkeypatch.setattr(reward_flags, "make_judge", lambda args: Choosy())
    rows = ["video,aspect,rating"]
    for i in range(7):
        frames = torch.full((25, 3, 64, 64), 40 * i, dtype=torch.uint8)
        write_video(tmp_path / f"{i}.mp4", frames, 0.1 * torch.randn(16000))
        rows += [f"{i}.mp4,{aspect},{1 + i / 2}" for aspect in ASPECTS]
    (tmp_path / "ratings.csv").write_text("\n".join(rows))
    people.main(["align", f"{tmp_path}/ratings.csv", "--out", f"{tmp_path}/c.json"])
    said = capsys.readouterr()
    assert said.out.count("1.00 [1.00, 1.00]") == 6 and "note: it is left out: 6.mp4: no digit" in said.err
    x, y = load_calibration(tmp_path / "c.json")["lip_sync"]
    assert y.tolist() == [1, 1.5, 2, 2.5, 3, 3.5]
    assert x == pytest.approx(1 + 160 / 255 * np.arange(6), abs=0.04)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three generators of random weights, the last of other pictures."""
    folder = tmp_path_factory.mktemp("secretly")
    for seed, (name, more) in enumerate({"amber": {}, "birch": {}, "large": {"size": 64}}.items()):
        random_generator(folder / name, seed, **more)
    return folder


def make(runs, out, one, other, *more):
    """Make a study. Returns: its page as text and as data, and its key."""
    people.main(["study", str(runs / one), str(runs / other), "--out", str(out), "--max-seconds", "1.2",
                 "--clips", "6", "--judge", "none", *more])
    html = (out / "study.html").read_text()
    page = json.loads(re.search(r'<script id="study" type="application/json">(.*?)</script>', html)[1])
    return html, page, json.loads((out / "key.json").read_text())


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    return make(runs, tmp_path_factory.mktemp("made"), "amber", "birch")


def test_the_page_knows_pairs_and_nothing_of_runs(made):
    """No name of a run, folder or clip in the page or its videos; each run is left in three of six."""
    html, page, key = made
    assert set(page) == {"study", "pairs"} and page["study"] == key["study"]
    assert all(set(pair) == {"id", "left", "right"} for pair in page["pairs"])
    assert [pair["id"] for pair in page["pairs"]] == list(key["pairs"])
    videos = b"".join(base64.b64decode(pair[side].partition(",")[2])
                      for pair in page["pairs"] for side in ("left", "right"))
    for word in ("amber", "birch", "secretly", "key.json", *(pair["clip"] for pair in key["pairs"].values())):
        assert word not in re.sub("base64,[^\"]*", "", html) and word.encode() not in videos
    lefts = [pair["left"] for pair in key["pairs"].values()]
    assert sorted(lefts) == ["a"] * 3 + ["b"] * 3 and lefts != sorted(lefts) and lefts != sorted(lefts)[::-1]
    assert "http" not in html                                             # it loads nothing


def test_a_pair_has_one_clip_and_one_noise_and_the_seed_makes_the_study(made, runs, tmp_path):
    """A run against itself gives the same bytes on both sides; these are a's side in a study of two. With
    another seed both are other clips."""
    _, page, key = make(runs, tmp_path / "self", "amber", "amber")
    assert key["pairs"] == made[2]["pairs"]
    for own, pair in zip(page["pairs"], made[1]["pairs"]):
        side, other = ("left", "right") if key["pairs"][pair["id"]]["left"] == "a" else ("right", "left")
        assert own["left"] == own["right"] == pair[side] != pair[other]
    assert len({own["left"] for own in page["pairs"]}) == 6
    _, _, other = make(runs, tmp_path / "other", "amber", "amber", "--seed", "1", "--clips", "2")
    clips = [{pair["clip"] for pair in each["pairs"].values()} for each in (key, other)]
    assert not clips[0] & clips[1]


def test_the_judge_rates_what_the_page_shows(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_flags, "make_judge", lambda args: Bright())
    _, page, key = make(runs, tmp_path / "s", "amber", "birch", "--clips", "2")
    for pair, side in ((pair, side) for pair in page["pairs"] for side in ("left", "right")):
        (tmp_path / "v.mp4").write_bytes(base64.b64decode(pair[side].removeprefix("data:video/mp4;base64,")))
        shown = load_clip(tmp_path / "v.mp4", 256)
        assert shown.frames.shape == (28, 3, 256, 256) and shown.audio.abs().max() > 0.1
        rated = key["pairs"][pair["id"]]["judge"][key["pairs"][pair["id"]][side]]
        assert rated == pytest.approx([1 + 4 * shown.frames.float().mean().item() / 255] * 3, abs=0.003)


VOTES = {"study": "s1", "rater": "r1", "votes": {"001": {"lip_sync": "left", "overall": "tie"},
                                                 "002": {"lip_sync": "right", "motion": "right"},
                                                 "003": {"lip_sync": "left"}}}


@pytest.fixture
def files(tmp_path):
    """A key of three pairs: a stands left, right, left; the judge prefers a, b, a, in lip_sync."""
    key = {"study": "s1", "a": "runs/one", "b": "runs/other", "pairs": {
        "001": {"left": "a", "right": "b", "judge": {"a": [4, 3, 3], "b": [3, 4, 3]}},
        "002": {"left": "b", "right": "a", "judge": {"a": [3, 4, 3], "b": [4, 3, 3]}},
        "003": {"left": "a", "right": "b", "judge": {"a": [5, 3, 3], "b": [1, 4, 3]}}}}
    more = VOTES | {"rater": "r2", "votes": {"001": {"lip_sync": "right"}, "002": {"lip_sync": "tie"}}}
    for name, content in {"key": key, "votes": VOTES, "more": more}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_votes_are_counted_for_the_run_that_stood_there(files, capsys):
    """lip_sync by hand: a, a, a of the first rater, b and a tie of the second: 3 of 4. The judge: a, b, a,
    and a against the vote for b: alike in 2 of 4. motion: a once, and the judge sees no difference."""
    people.main(f"tally {files}/votes.json {files}/more.json --key {files}/key.json".split())
    lines = {line.split()[0]: re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()}
    assert lines["2"].startswith("2 raters, 3 pairs; a: runs/one, b: runs/other")
    assert lines["lip_sync"] == "lip_sync 3 1 1 0.750 [0.194, 0.994] 0.500 [0.068, 0.932] of 4"
    assert lines["motion"] == "motion 1 0 0 1.000 [0.025, 1.000] -"
    assert lines["overall"] == "overall 0 0 1 no vote -"
    assert lines["expressiveness"] == "expressiveness 0 0 0 no vote -"


NO_RATING = "line [23]: want text in UTF-8 that begins with video,aspect,rating"
NO_VOTES = ": is not a file of votes on this study"


@pytest.mark.parametrize("name, content, said", [
    ("r.csv", "", "holds no ratings"),
    ("r.csv", "video,aspect,rating\nv,motion,3\nv,beauty,3\n", NO_RATING),
    ("r.csv", "video,aspect,rating\nv,motion,6\n", NO_RATING),
    ("c.json", None, "cannot be read"),
    ("c.json", {"motion": [[2, 1], [1, 2]]}, "is not a calibration"),
    ("key.json", VOTES, ": is not the key of a study"),
    ("votes.json", "{", NO_VOTES), ("votes.json", "[" * 100_000, NO_VOTES),
    ("votes.json", VOTES | {"study": "s2"}, NO_VOTES), ("votes.json", VOTES | {"rater": ["r"]}, NO_VOTES),
    ("votes.json", VOTES | {"votes": {"001": {"lip_sync": "both"}}}, NO_VOTES),
    ("votes.json", VOTES | {"rater": "r2"}, ": is of the same rater as .*more.json")])
def test_a_file_that_cannot_be_used_is_named_in_one_line(files, name, content, said):
    path = files / name
    path.unlink(missing_ok=True)
    if isinstance(content, dict):
        content = json.dumps(content)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    read = {"r.csv": read_ratings, "c.json": load_calibration}.get(
        name, lambda path: tally([files / "more.json", files / "votes.json"], files / "key.json"))
    with pytest.raises(MediaError, match=f"^[^\n]*{name}[^\n]*{said}[^\n]*$"):
        read(path)


@pytest.mark.parametrize("command, said", [
    ("study {runs}/amber {runs}/large --out {tmp}/s", "makes pictures of 64 pixels"),
    ("study {runs}/amber {runs}/birch --out {tmp}", "key.json: is of a study that may have votes"),
    ("study {runs}/amber {runs}/birch --out {tmp}/page", "study.html: is of a study that may have votes"),
    ("align {tmp}/nothing.csv --out {tmp}/key.json", "exists; choose another --out"),
    ("align {tmp}/nothing.csv --out {tmp}/no/c.json", "is in no folder that can be written")])
def test_a_command_that_cannot_be_done_is_one_line_and_writes_nothing(runs, tmp_path, command, said, capsys):
    (tmp_path / "page").mkdir()
    for path in (before := (tmp_path / "key.json", tmp_path / "page" / "study.html")):
        path.write_text("{}")
    with pytest.raises((MediaError, OSError, SystemExit)) as end:
        people.main(command.format(runs=runs, tmp=tmp_path).split())
    assert said in (str(end.value) + capsys.readouterr().err).splitlines()[-1]
    assert {path for path in tmp_path.rglob("*.*")} == {*before}
    assert all(path.read_text() == "{}" for path in before)
