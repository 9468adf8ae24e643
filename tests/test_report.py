"""What a run shows at its end: the funnel against loops, and a report that is the same in both languages."""

import base64
import json
import math
import re
from html import unescape

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from data import Clip, read_speech
from extras.report import funnel, how_it_was_made, watched_parts, write_clips, write_report


def test_the_funnel_counts_pairs_in_which_the_flawless_clip_is_rated_higher():
    """AUC by a loop over pairs, a tie is half; the aspect that finds best. A clip without a rating counts in
    shares and in no rating. Where all clips have a fault, the worse half counts."""
    rng = torch.Generator().manual_seed(0)
    strength = torch.randint(-2, 3, (40,), generator=rng) * 0.5
    ratings = torch.randint(1, 6, (40, 3), generator=rng).float()                    # many ties
    ratings[:, 2] -= 2 * strength.abs()
    ratings[5, 1] = math.nan
    picked = torch.tensor([1, 4, 5, 30])
    row, = funnel({"offset": strength}, ratings, picked)
    has = [i for i in range(40) if strength[i] != 0]
    rated = [i for i in has if i != 5]
    without = [i for i in range(40) if strength[i] == 0 and i != 5]
    aucs = []
    for scores in ratings.T.tolist():
        pairs = [(scores[i], scores[j]) for i in without for j in rated]
        aucs.append(sum((good > bad) + 0.5 * (good == bad) for good, bad in pairs) / len(pairs))
    assert row["auc"] == pytest.approx(max(aucs)) and row["aspect"] == aucs.index(max(aucs)) == 2
    assert row["rated_with"] == pytest.approx(ratings[rated].mean(0).tolist())
    assert row["share"] == len(has) / 40 and row["share_picked"] == len({1, 4, 5, 30} & set(has)) / 4
    assert row["strength"] == pytest.approx(sum(map(abs, strength.tolist())) / 40)
    assert row["strength_picked"] == pytest.approx(sum(abs(strength[i].item()) for i in picked) / 4)
    assert math.isnan(funnel({"none": torch.zeros(40)}, ratings, picked)[0]["auc"])
    graded = 1 + torch.rand(40, generator=rng)
    all_have, worse = (funnel({"": s}, ratings, picked)[0] for s in (graded, graded > graded.median()))
    assert all(all_have[name] == worse[name] for name in ("auc", "aspect", "rated_with", "rated_without"))
    assert all_have["share"] == all_have["share_picked"] == 1


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run of one arm: five red clips that it made blue, 26 frames of 32 pixels, with a tone."""
    folder = tmp_path_factory.mktemp("shown")
    red, blue = (torch.eye(3)[i, :, None, None].expand(26, 3, 32, 32) for i in (0, 2))
    tone = 0.1 * torch.sin(torch.arange(30 * 640) * 0.1)
    clips = [Clip(str(i), (red * 255).byte(), tone) for i in range(5)]
    (folder / "clip-9.mp4").write_text("of an earlier run")
    write_clips(folder, ["pretrained"], [blue.expand(5, -1, -1, -1, -1)], clips)
    run = {"seconds": 1, "config": {"size": 32}, "seed": 0, "parameters": 9, "codec": {"psnr": 31.25},
           "command": "python train.py --data 'a<b'", "hardware": "a CPU"}
    (folder / "log.jsonl").write_text(json.dumps(run) + "\n")
    values = {"pretrained": {"psnr": [21.5, None], "seam_ratio": [1.5, 1.5]}}
    (folder / "held_out.json").write_text(json.dumps({"ode": values}))
    write_report(folder)
    return folder


def test_clips_play_the_truth_beside_each_arm_above_their_names_with_sound(shown):
    assert sorted(path.name for path in shown.glob("*.mp4")) == [f"clip-{i}.mp4" for i in (1, 2, 3, 4)]
    reader = imageio_ffmpeg.read_frames(str(shown / "clip-1.mp4"))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3).astype(int) for frame in reader]
    assert len(frames) == 26 and width == 2 * 192 and height > 192
    for frame in frames[0], frames[-1]:
        assert abs(frame[96, 96] - [255, 0, 0]).max() < 12 and abs(frame[96, 288] - [0, 0, 255]).max() < 12
        for names in frame[194:, :192], frame[194:, 192:]:                           # dark letters on white
            assert names.min() < 80 and np.median(names) > 240
    assert abs(len(read_speech(shown / "clip-1.mp4")[0]) - 26 * 640) < 1600


def test_the_report_is_one_file_that_embeds_what_it_shows_and_its_rows_are_those_in_markdown(shown):
    page, markdown = (shown / "report.html").read_text(), (shown / "report.md").read_text()
    sources = re.findall('src="([^"]*)"', page)
    assert len(sources) == 4 and all(source.startswith("data:video/mp4;base64,") for source in sources)
    assert base64.b64decode(sources[1].partition(",")[2]) == (shown / "clip-2.mp4").read_bytes()
    assert "http" not in re.sub('src="[^"]*"', "", page)
    assert page.index("<video") < page.index("<table") and "[clip-4.mp4](clip-4.mp4)" in markdown
    rows = [[unescape(re.sub("<.*?>", "", cell)).strip() for cell in re.findall("<t[dh].*?</t[dh]>", row)]
            for row in re.findall("<tr>.*?</tr>", page)]
    rows = [row for row in rows if len(row) > 1]
    assert ["psnr", "31.250", "nan±nan"] in rows
    assert ["seam_ratio", "", "1.500±0.000"] in rows and ["seed", "0"] in rows
    for row in rows:
        assert f"| {' | '.join(row)} |" in markdown.splitlines()


def test_a_stage_of_another_run_that_kept_a_look_before_this_one_is_reported(tmp_path):
    """--pretrained takes up a half-finished curation: its best look is in the log of the other run alone."""
    log = [{"stage": "curation", "step": step, "watched": {"psnr": 20.0 + step}, "best": 250}
           for step in (750, 1000)]
    markdown = "\n".join(part.markdown for part in watched_parts(tmp_path, log))
    assert "| curation | last, 1000 | 1020.000 |" in markdown and "kept" not in markdown.split("|", 1)[1]


def test_minutes_are_those_of_all_sessions():
    """Two sessions of 60 and 120 seconds, the second slower to begin than the first to end: 3 minutes."""
    run = {"config": {"size": 32}, "seed": 0, "parameters": 9, "codec": {}}
    log = [run | {"seconds": 30}, {"stage": "pretraining", "step": 1, "seconds": 60},
           run | {"seconds": 90}, {"stage": "pretraining", "step": 2, "seconds": 120}]
    markdown = "\n".join(part.markdown for part in how_it_was_made(log))
    for minutes in "| minutes | 3.0 |", "preparation | 2.0 |", "| minutes of pretraining | 1.0 |":
        assert minutes in markdown
