"""What footage teaches: what is late is found and put in time, what fits nowhere is left out, nothing else is
touched. The networks that "are taught" here are the shipped ones, which know drawn talkers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from data import Clip, folder_clips, load_clip, write_video
from extras import footage, session
from extras.reward_flags import measuring_sync, reward_sync
from extras.sync import load_sync
from extras.talkers import render_talker, synthetic_clips
from reward import DEFAULT_SYNC, REWARD_SYNC, SyncNetwork
from tiny import WHOLE, logged

FRAMES = 640                                         # samples of one


@pytest.fixture(scope="module")
def found(tmp_path_factory, drawn) -> Path:
    """Thirty talkers of two seconds, two of them out of sync; and two of five seconds, late and early."""
    folder = tmp_path_factory.mktemp("footage")
    clips = {f"{i}": clip for i, clip in enumerate(drawn[:30])}
    clips["late6"] = replace(drawn[30], audio=drawn[30].audio.roll(6 * FRAMES))
    clips["dubbed"] = replace(drawn[31], audio=drawn[3].audio)
    for name, late in ("long-late5", 5), ("long-early3", -3):
        clip = render_talker(abs(late), 6, 64, 130)
        clips[name] = replace(clip, audio=clip.audio.roll(late * FRAMES))
    for name, clip in clips.items():
        write_video(folder / f"{name}.mp4", clip.frames, clip.audio)
    return folder


def flags(folder: Path, *more: str):
    return train.parse_arguments(["--data", str(folder), *"--crop none --seconds 1.6".split(), *more])


@pytest.fixture
def taught(monkeypatch) -> list[int]:
    """Teach by looking up a shipped network. Returns: how many clips each lesson had."""
    lessons = []

    def teach(clips, seed, steps):
        lessons.append(len(clips))
        return load_sync((DEFAULT_SYNC, REWARD_SYNC)[seed])
    monkeypatch.setattr(footage, "train_sync", teach)
    return lessons


def by_name(parts) -> dict[str, Clip]:
    return {clip.name: clip for part in parts for clip in part}


@pytest.fixture
def before(found) -> dict[str, Clip]:
    return by_name(folder_clips(found, 64, 1.6))


def test_sound_is_put_in_time_to_the_sample_and_what_is_in_time_is_not_touched(found, before, taught, capsys):
    """Inside a stretch a clip keeps its frames, and hears the sound of its file so many frames later. At the
    beginning there is no earlier sound: that clip would be too short. One line counts them all."""
    footage_found = footage.learn(flags(found))
    clips, said = by_name(footage_found.clips), capsys.readouterr().out.splitlines()[-1]
    for file, late, numbers in ("late6", 6, [0]), ("long-late5", 5, range(3)), ("long-early3", -3, [1, 2]):
        whole = load_clip(found / f"{file}.mp4", 64)
        for k in numbers:
            clip, at = clips[f"{file}.mp4#{k}"], slice(40 * k, 40 * k + 40)
            heard = slice((at.start + late) * FRAMES, (at.stop + late) * FRAMES)
            assert torch.equal(clip.frames, whole.frames[at]) and torch.equal(clip.audio, whole.audio[heard])
    assert "long-early3.mp4#0" not in clips and "dubbed.mp4#0" not in clips
    untouched = [name for name in clips if name.split(".")[0].isdigit()]
    assert len(untouched) >= 29
    for name in untouched:
        assert torch.equal(clips[name].frames, before[name].frames)
        assert torch.equal(clips[name].audio, before[name].audio)
    assert said == footage_found.said
    assert f"sound of {len(before)} clips: {len(untouched)} in time ({1.6 * len(untouched):.0f} s); " in said
    assert all(f"; {part}" in said for part in ("4 late", "2 early", "1 left out: no", "1 left out: too"))


def test_what_was_taught_measures_and_rewards_and_a_second_call_teaches_nothing(
        found, taught, monkeypatch, tmp_path):
    """Three lessons: on all, on what that finds in time, and, for the reward, on what then is."""
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path))
    args = flags(found)
    assert measuring_sync(args) is None and reward_sync(args) is None
    first = args.footage = footage.learn(args)
    assert len(taught) == 3 and taught[0] >= taught[2] > taught[1]
    again = footage.learn(flags(found))
    assert len(taught) == 3 and again.said == first.said and first.cpu_seconds == again.cpu_seconds > 0
    assert by_name(again.clips).keys() == by_name(first.clips).keys()
    for net, folder in (measuring_sync(args), DEFAULT_SYNC), (reward_sync(args), REWARD_SYNC):
        expected = load_sync(folder).state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in net.state_dict().items())
    assert "footage" not in session.flags(args)
    for named in ["--sync", "none"], ["--reward-sync", str(REWARD_SYNC)]:
        assert footage.learn(flags(found, *named)) is None


def test_one_command_does_all_three_stages_and_its_report_says_what_was_found(found, taught, tmp_path):
    folder = tmp_path / "run"
    filmed = [*"--size 64 --seconds 1.6 --crop none --data".split(), str(found)]
    train.main([*WHOLE, *filmed, "--out", str(folder)])
    entry, = (entry for entry in logged(folder) if "sound" in entry)
    assert "in time" in entry["sound"] and entry["sound"] in (folder / "report.md").read_text()
    assert len(logged(folder, "curation")) == 3 and len(logged(folder, "post-training")) == 4
    arms = {(e["arm"], e["sampler"]): e["held_out"] for e in logged(folder) if "arm" in e}
    assert "sync_confidence" in arms["post-trained", "ode"]


def test_footage_that_cannot_teach_is_taken_as_it_is(videos, found, before, taught, monkeypatch, tmp_path):
    """Too few clips are not even tried; a network may have learned nothing, as an untrained one; or it may
    find that none of the one or two clips that a minute of footage has held out fits."""
    few = footage.learn(flags(videos[0], "--seconds", "1"))
    assert not taught and few.sync == few.reward_sync == "none"
    assert "sound is taken as it is: 6 clips are too few to teach a sync network" in few.said
    untrained = lambda *_: SyncNetwork()
    all_late = lambda train, held_out, frames: {
        "tells": 1.0, "lessons": train.rows, "late": [0] * len(train) + [None] * len(held_out)}
    for name, change, said in (
            ("train_sync", untrained, "% of held-out pairs, and should in 80% ("),
            ("examine", all_late, "or none to hold out, is found in time; add footage")):
        monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path / name))
        monkeypatch.setattr(footage, name, change)
        as_it_is = footage.learn(flags(found))
        assert said in as_it_is.said and as_it_is.sync == "none"
        assert by_name(as_it_is.clips).keys() == before.keys()


def test_limits_are_what_the_sound_of_others_exceeds_by_chance():
    """Distances of shifts by hand. Of a hundred curves of others, ten dip by 1 and the rest by .5."""
    def dips(by):                                    # {frames: depth}
        curve = torch.full((31,), 2.0)
        for frames, depth in by.items():
            curve[15 + frames] -= depth
        return curve
    others = torch.stack([dips({9: 1.0})] * 10 + [dips({9: 0.5})] * 90).view(20, 5, 31)
    expected = [({0: 1.1}, 0), ({4: 1.1}, 4), ({-7: 1.1}, -7), ({4: 0.9}, None), ({}, None), ({1: 1.1}, 0),
                ({4: 1.1, 0: 1.0}, 4)]
    own, late = zip(*expected)
    assert footage.verdicts(torch.stack([dips(by) for by in own]), others) == list(late)


def test_drawn_clips_are_put_in_time_by_the_network_of_the_reward():
    """Lips that come so many frames late get the sound of as many frames before, and silence where there is
    none; where the sound is another's nothing is known. Frames stay, and so do clips without a network."""
    args, clips = train.parse_arguments([]), synthetic_clips(24, 64, 2.0, 9, world="found")
    in_time, cpu_seconds = footage.put_in_time(clips, args)
    kinds, right = set(), 0
    for found_clip, clip in zip(clips, in_time):
        late = int(found_clip.truth["fault_offset"])
        silence = torch.zeros(abs(late) * FRAMES)
        heard = torch.cat([silence, found_clip.audio, silence])[max(0, -late) * 2 * FRAMES:][:50 * FRAMES]
        assert torch.equal(clip.frames, found_clip.frames) and len(clip.audio) == 50 * FRAMES
        right += torch.equal(clip.audio, heard)
        kinds.add((late > 0) - (late < 0))
    assert kinds == {-1, 0, 1} and right >= 22 and cpu_seconds > 0
    as_found, cpu_seconds = footage.put_in_time(clips, train.parse_arguments(["--reward-sync", "none"]))
    assert as_found is clips and cpu_seconds == 0                                       # nothing measures
