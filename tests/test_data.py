"""What data.py promises: every odd file has one stated fate, no frame hears the future, nothing written is half there.

All files are made on the fly with ffmpeg and Pillow. The picture that they show is a clock: a bar that grows by one
column a frame, so that a decoded frame says which one it is.
"""

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import data
from extras import talkers as drawn_talkers

ROOT = Path(__file__).resolve().parents[1]
EDGE = ROOT.parent / "shared" / "data" / "edge"
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SPEECH = "aevalsrc='0.3*sin(2*PI*220*t)*abs(sin(2*PI*2*t))':s=48000:d=3"     # a hum of four syllables a second


def ffmpeg(*arguments) -> bytes:
    """Run ffmpeg as the oracle or to make a file."""
    return subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, arguments)], check=True, capture_output=True).stdout


def clock(fps: str = "25", seconds: float = 3, width: int = 128, height: int = 96) -> list[str]:
    """ffmpeg input: red from the left to x = width * t / 3 s at the time t, over green that grows downwards."""
    ratio = f"if(lt(X,{width}*T/3),220,0)"
    return ["-f", "lavfi", "-i", f"color=black:s={width}x{height}:r={fps}:d={seconds},format=rgb24,"
            f"geq=r='{ratio}':g='90*Y/H':b=0"]


def time_shown(frames: torch.Tensor) -> torch.Tensor:
    """Read the clock: frames (F, 3, S, S) of the centre square of a 4:3 clock -> seconds (F,)."""
    red = (frames[:, 0].float() / 220).clamp(0, 1).mean((1, 2))               # share of the square that is red
    return (0.125 + 0.75 * red) * 3


def make_video(path: Path, *extra, fps: str = "25", seconds: float = 3, sound: str = SPEECH) -> Path:
    ffmpeg(*clock(fps, seconds), "-f", "lavfi", "-i", sound, "-t", seconds, "-c:v", "libx264", "-preset", "ultrafast",
           "-pix_fmt", "yuv420p", *extra, path)
    return path


def pixels(path: Path) -> np.ndarray:
    """The frames of a video as ffmpeg sees them, (F, H, W, 3)."""
    width, height = next(imageio_ffmpeg.read_frames(str(path)))["size"]
    raw = ffmpeg("-i", path, "-map", "0:v", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def samples(path: Path) -> np.ndarray:
    """The sound of a file at 16 kHz mono, as ffmpeg hears it."""
    return np.frombuffer(ffmpeg("-i", path, "-map", "0:a", "-ac", 1, "-ar", 16000, "-f", "f32le", "-"), np.float32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder with one file of every kind, good and bad."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "deep" / "er").mkdir(parents=True)
    plain = make_video(folder / "plain.mp4")
    make_video(folder / "fps23976.mkv", "-ar", 48000, fps="24000/1001")
    make_video(folder / "deep" / "er" / "fps30.MOV", "-ar", 44100, "-ac", 2, fps="30")
    make_video(folder / "mpeg1.mpg", "-c:v", "mpeg1video", "-q:v", 2, "-c:a", "mp2")
    make_video(folder / "vfr.mp4", "-vf", "select='not(mod(n,3))+lt(n,20)+eq(n,74)'", "-fps_mode", "vfr")
    ffmpeg("-display_rotation:v:0", 90, "-i", plain, "-c", "copy", folder / "rotated.mp4")
    make_video(folder / "anamorphic.mp4", "-vf", "scale=64:96,setsar=2")              # pixels twice as wide as high
    make_video(folder / "late_sound.mkv", "-af", "atrim=start=1", "-c:a", "pcm_s16le")
    # the bad ones
    make_video(folder / "bad_silence.mp4", sound="anullsrc=r=16000:d=3")
    ffmpeg("-i", plain, "-an", "-c", "copy", folder / "bad_no_audio.mp4")
    make_video(folder / "bad_short.mp4", seconds=0.2)
    ffmpeg(*clock(), "-f", "lavfi", "-i", SPEECH, "-t", 3, "-vf", "drawbox=c=gray:t=fill:enable='lt(n,5)'",
           folder / "bad_blank_start.mp4")
    whole = plain.read_bytes()
    (folder / "bad_truncated.mp4").write_bytes(whole[: whole.rindex(b"moov") - 100])
    (folder / "bad_empty.mp4").touch()
    (folder / "bad_text.mp4").write_text("not a video\n")
    (folder / "notes.txt").write_text("not even named like one\n")
    (folder / "._plain.mp4").write_text("a Finder leftover\n")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def clips(videos, cache) -> dict[str, data.Clip]:
    train, held_out = data.folder_clips(videos, 32, cache=cache)
    return {clip.name: clip for part in (train, held_out) for clip in part}


# ---- Folders of video ------------------------------------------------------------------------------------------------

def test_every_usable_file_becomes_clips_and_every_other_is_skipped_with_its_reason(videos, cache, clips, capsys):
    """Kept or skipped, with one line that says why; the same lines when the cache answers."""
    good = {"plain.mp4", "fps23976.mkv", "deep/er/fps30.MOV", "mpeg1.mpg", "vfr.mp4", "rotated.mp4", "late_sound.mkv",
            "anamorphic.mp4"}
    reasons = {"bad_silence.mp4": "silent", "bad_no_audio.mp4": "no audio track", "bad_short.mp4": "a clip needs 25",
               "bad_truncated.mp4": "cut off", "bad_empty.mp4": "is empty", "bad_text.mp4": "not audio or video",
               "bad_blank_start.mp4#0": "empty picture"}
    data.folder_clips(videos, 32, cache=cache)
    lines = capsys.readouterr().out.splitlines()
    assert set(clips) == {f"{name}#0" for name in good}
    told = dict(line.removeprefix("skipped ").split(": ", 1) for line in lines if line.startswith("skipped "))
    assert set(told) == set(reasons)
    assert all(words in told[name] for name, words in reasons.items()), told
    assert "8 files kept" in lines[-1] and "7 skipped" in lines[-1]


@pytest.mark.parametrize("name", ["plain.mp4", "fps23976.mkv", "deep/er/fps30.MOV", "mpeg1.mpg", "vfr.mp4",
                                  "anamorphic.mp4"])
def test_frame_f_shows_the_time_f_over_25_whatever_the_file_s_rate(clips, name):
    """75 frames; the clock in frame f reads f / 25 s to within a frame of the source, once its bar is in the square."""
    clip = clips[f"{name}#0"]
    assert clip.frames.shape == (75, 3, 32, 32) and clip.frames.dtype == torch.uint8
    assert clip.audio.shape == (75 * 640,) and clip.audio.dtype == torch.float32
    inside = slice(12, 63)                                         # the square shows x from 1/8 to 7/8 of the width
    error = time_shown(clip.frames)[inside] - torch.arange(75)[inside] / 25
    assert error.abs().max() < (0.13 if name == "vfr.mp4" else 0.065)   # vfr keeps every third frame
    assert error.mean().abs() < (0.06 if name == "vfr.mp4" else 0.03)


def test_a_rotated_file_stands_upright(clips):
    """The bar grows along x in the file; after a turn by 90 degrees (counter-clockwise) it grows upwards."""
    rows = clips["rotated.mp4#0"].frames[37, 0].float().mean(1)    # (32,)
    assert rows[-8:].mean() > 180 and rows[:8].mean() < 30


def test_a_sound_track_that_starts_late_stays_in_time(clips):
    """Sound that begins at 1 s is padded, not pulled to the front: lips and sound share one clock."""
    audio = clips["late_sound.mkv#0"].audio
    assert audio[:15500].abs().max() < 0.01 and audio[16000:].abs().max() > 0.1


def test_the_centre_square_and_a_crop_are_the_pixels_named(tmp_path, cache):
    """A white box at x, y, side with a black core fills the crop, and the file too small for it is skipped."""
    box = "drawbox=x=40:y=10:w=48:h=48:c=white:t=fill,drawbox=x=52:y=22:w=24:h=24:c=black:t=fill"
    make_video(tmp_path / "box.mp4", "-vf", box, seconds=1.2)
    make_video(tmp_path / "small.mp4", "-vf", "scale=64:48", seconds=1.2)
    train, held_out = data.folder_clips(tmp_path, 16, crop=(40, 10, 48), cache=cache)
    assert train.names == ["box.mp4#0"] and len(held_out) == 0
    frame = train[0].frames[0].float()                             # (3, 16, 16): 48 pixels became 16
    assert frame[:, 5:11, 5:11].max() < 25 and frame[:, [0, 0, -1, -1], [0, -1, 0, -1]].min() > 230
    with pytest.raises(data.MediaError, match="none of its 2 videos"):
        data.folder_clips(tmp_path, 16, crop=(100, 10, 48), cache=cache)


def test_a_long_file_becomes_consecutive_clips_without_a_gap(videos, cache):
    """3 s cut by 1.24 s: 31 + 31 frames and a rest of 13, below a second, dropped; the clock runs on."""
    train, held_out = data.folder_clips(videos, 32, seconds=1.24, cache=cache)
    cut = {clip.name: clip for part in (train, held_out) for clip in part if clip.name.startswith("plain")}
    assert [len(clip.frames) for clip in cut.values()] == [31, 31] and list(cut) == ["plain.mp4#0", "plain.mp4#1"]
    assert time_shown(cut["plain.mp4#1"].frames)[0] == pytest.approx(31 / 25, abs=0.065)
    assert all(len(clip.audio) == 31 * 640 for clip in cut.values())


@pytest.mark.parametrize("lag, frames", [(0.12, 50), (0.4, 40)])
def test_missing_sound_is_padded_if_short_and_cuts_the_picture_if_long(tmp_path, cache, lag, frames):
    """Two seconds of picture: sound up to five frames short is padded with zeros, beyond that the clip is cut."""
    make_video(tmp_path / "a.mkv", "-af", f"atrim=end={2 - lag}", "-c:a", "pcm_s16le", seconds=2)
    clip = data.folder_clips(tmp_path, 16, cache=cache)[0][0]
    assert len(clip.frames) == frames and len(clip.audio) == frames * 640
    assert (clip.audio[-640:] == 0).all() == (lag == 0.12)


def test_folders_that_cannot_serve_are_errors_in_plain_words(tmp_path, cache):
    with pytest.raises(data.MediaError, match="nowhere: is not a folder"):
        data.folder_clips(tmp_path / "nowhere", 32, cache=cache)
    with pytest.raises(data.MediaError, match="none of its 0 videos"):
        data.folder_clips(tmp_path, 32, cache=cache)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(data.MediaError, match="cache cannot be written"):
        data.folder_clips(tmp_path, 32, cache=blocked / "cache")
    with pytest.raises(ValueError, match="seconds"):
        data.folder_clips(tmp_path, 32, seconds=0.5, cache=cache)


def test_one_long_video_of_one_person_holds_its_end_out(tmp_path, cache, capsys):
    """Eleven clips: the last two, a tenth rounded up, are held out; of a long and a short file, not the long."""
    make_video(tmp_path / "talk.mp4", seconds=11, sound=SPEECH.replace("d=3", "d=11"))
    train, held_out = data.folder_clips(tmp_path, 16, 1.0, cache=cache)
    assert held_out.names == ["talk.mp4#9", "talk.mp4#10"] and train.names == [f"talk.mp4#{i}" for i in range(9)]
    assert "the last 2 clips of talk.mp4" in capsys.readouterr().out
    for sources in (["a"] * 20 + ["b"], ["b"] * 20 + ["a"]):
        assert data._split(sources)[0] in ({18, 19}, {17, 18, 19}, {20})


def test_what_is_too_short_is_named_and_no_held_out_clip_is(tmp_path, cache, capsys):
    """Whichever file a hash would hold out, with a window of 2.9 s it is one of the two that are long enough."""
    for name, seconds in (("a.mp4", 3), ("b.mp4", 2), ("c.mp4", 2), ("d.mp4", 3)):
        make_video(tmp_path / name, seconds=seconds)
    train, held_out = data.folder_clips(tmp_path, 16, cache=cache, frames=72)
    assert sorted(train.names + held_out.names) == ["a.mp4#0", "d.mp4#0"] and len(held_out) == 1
    assert "2 clips are shorter than 2.88 s and left out: b.mp4#0, c.mp4#0" in capsys.readouterr().out
    with pytest.raises(data.MediaError, match="no clip of 4.00 s"):
        data.folder_clips(tmp_path, 16, cache=cache, frames=100)


def test_links_are_followed_once_odd_names_are_names_and_runs_are_left_out(tmp_path, capsys, monkeypatch):
    """A loop ends, a second way to a file gives no second clip, and a generated sample is no training clip."""
    folder, elsewhere = tmp_path / "12:30", tmp_path / "elsewhere"
    for place in (folder / "run", folder / ".hidden", elsewhere):
        place.mkdir(parents=True)
    plain = make_video(elsewhere / "linked.mp4", seconds=1.2)
    for name in (b"-dash.mp4", b"a: b 50%d.MP4", b"caf\xe9.mp4", b"run/sample.mp4", b".hidden/x.mp4"):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(plain.read_bytes())
    (folder / "run" / "log.jsonl").touch()
    (folder / "loop").symlink_to(folder)
    (folder / "far").symlink_to(elsewhere)
    (folder / "again.mp4").symlink_to(folder / "-dash.mp4")
    (folder / "broken.mp4").symlink_to(folder / "nowhere")
    monkeypatch.chdir(tmp_path)
    train, held_out = data.folder_clips("12:30", 16, cache="12:30/cache")
    assert sorted(train.names + held_out.names) == ["-dash.mp4#0", "a: b 50%d.MP4#0", "caf\\xe9.mp4#0",
                                                    "far/linked.mp4#0"]
    said = capsys.readouterr().out
    assert "skipped run: is the folder of a run" in said and "skipped broken.mp4: cannot be read (no such file" in said


# ---- Colour ----------------------------------------------------------------------------------------------------------

SHOWN = np.array([(224, 172, 140), (220, 40, 40), (128, 128, 128), (255, 255, 255)])       # skin, lips, greys
WIDE = np.array([[.6274, .3293, .0433], [.0691, .9195, .0114], [.0164, .0880, .8956]])     # BT.709 to BT.2020


def stored(transfer: str) -> np.ndarray:
    """The colours SHOWN as a file stores them, (4, 3) in [0, 1]: white is 203 cd/m2 where range is high (BT.2408)."""
    light = (SHOWN / 255) ** 2.4
    if transfer == "bt709":
        return SHOWN / 255
    if transfer == "bt2020-10":
        return (light @ WIDE.T) ** (1 / 2.4)
    nits = 203 * light @ WIDE.T
    if transfer == "smpte2084":
        y = (nits / 10000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    scene = nits / 1000 / (nits / 1000 @ [0.2627, 0.678, 0.0593])[:, None] ** (0.2 / 1.2)
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene),
                    0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073)


@pytest.mark.parametrize("matrix, primaries, transfer, extent, width", [
    ("bt709", "bt709", "bt709", "tv", 320), ("bt709", "bt709", "bt709", "pc", 320),
    ("bt709", "unknown", "bt709", "tv", 1280), ("bt601", "unknown", "bt709", "tv", 320),
    ("bt2020nc", "bt2020", "bt2020-10", "tv", 320), ("bt2020nc", "bt2020", "smpte2084", "tv", 320),
    ("bt2020nc", "bt2020", "arib-std-b67", "tv", 320)])
def test_a_video_shows_its_colours_in_srgb(tmp_path, matrix, primaries, transfer, extent, width):
    """Full and limited range, untagged large and small pictures, wide gamut, PQ and HLG: skin is skin, to within 8."""
    height = width * 9 // 16
    picture = np.repeat(stored(transfer)[None], width // 4, 1).repeat(height, 0)     # four upright stripes
    tags = "color_primaries={0}:color_trc={1}:colorspace={2}:range={3}".format(
        *(["unknown"] * 4 if primaries == "unknown" else
          [primaries, transfer, matrix.replace("bt601", "smpte170m"), extent]))
    subprocess.run([FFMPEG, "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", f"{width}x{height}",
                    "-r", "25", "-i", "-", "-f", "lavfi", "-i", SPEECH, "-shortest", "-vf",
                    f"scale=out_color_matrix={matrix}:out_range={extent},format=yuv444p10le,setparams={tags}",
                    "-c:v", "libx264", "-crf", "8", "-preset", "ultrafast", tmp_path / "a.mp4"],
                   input=(picture * 65535).round().astype("<u2").tobytes() * 25, check=True)
    frame = data.load_clip(tmp_path / "a.mp4", 90, crop=(0, 0, height)).frames[5].float()    # (3, 90, 90)
    step = 90 * width // 4 // height                         # a stripe in it, of which the first two are whole
    assert (frame[:, 45, step // 2] - torch.tensor(SHOWN[0])).abs().max() <= 8
    assert (frame[:, 45, step + step // 2] - torch.tensor(SHOWN[1])).abs().max() <= 8


def test_an_interlaced_video_has_no_combs(tmp_path):
    """A bar that moves 4 pixels a field has, in a frame, the same edge in rows that are neighbours."""
    ffmpeg("-f", "lavfi", "-i", "color=black:s=128x96:r=50:d=2,format=yuv420p,geq=lum='if(lt(X,mod(200*T,128)),200,30)'"
           ":cb=128:cr=128,tinterlace=interleave_top,setfield=tff", "-f", "lavfi", "-i", SPEECH, "-t", 2,
           "-flags", "+ilme+ildct", "-c:v", "mpeg2video", "-q:v", 2, tmp_path / "a.mpg")
    frames = data.load_clip(tmp_path / "a.mpg", 96).frames[5:30, 0].float()          # (25, 96, 96)
    assert (frames[:, 2:-2] - frames[:, 3:-1]).abs().mean() < 1.5     # 7 as it is stored


def test_adding_files_never_moves_one_from_training_to_held_out():
    """Grow a folder name by name: held-out files stay, but for the stand-in of the time when no hash is below 10%."""
    names = [f"clip{i}.mp4" for i in range(300)]
    before: set[str] = set()
    for n in range(3, 301):
        now = data._held_out(names[:n])
        assert 1 <= len(now) < n
        assert not (now - before) & set(names[: n - 1]) or n == 3            # only the newcomer may enter
        assert len(before - now) <= (len(before) == 1)
        before = now
    assert 15 <= len(before) <= 45
    assert data._held_out(["one.mp4"]) == set()
    assert all(len(data._held_out([a, b])) == 1 for a, b in zip(names, names[1:]))


# ---- The cache -------------------------------------------------------------------------------------------------------

def fake_talker(index: int, seed: int, size: int, frames: int) -> data.Clip:
    """Stands in for render_talker: numbers that tell which talker this is."""
    truth = {"opening": torch.full((frames,), float(index)), "identity": torch.tensor(index)}
    return data.Clip(f"talker{index}", torch.full((frames, 3, size, size), index, dtype=torch.uint8),
                     torch.full((frames * 640,), float(seed)), truth)


@pytest.fixture
def talkers(monkeypatch) -> list[int]:
    """Replaces the renderer; the list receives the index of each talker that is really rendered."""
    rendered: list[int] = []

    def render(index, seed, size, frames, faults=None):
        rendered.append(index)
        return fake_talker(index, seed, size, frames)

    monkeypatch.setattr(drawn_talkers, "render_talker", render)
    return rendered


def test_clips_come_back_as_they_were_and_writing_to_one_harms_nothing(tmp_path, talkers):
    """Reading is zero-copy from the file; a change in memory never reaches the disk."""
    clips = drawn_talkers.synthetic_clips(3, 8, seconds=1, seed=5, first=10, cache=tmp_path)
    assert clips.names == ["talker10", "talker11", "talker12"] and [c.name for c in clips[1:]] == clips.names[1:]
    want = fake_talker(11, 5, 8, 25)
    clips[1].frames.zero_()
    clip = data.Clips(clips.folder)[1]
    assert torch.equal(clip.frames, want.frames) and torch.equal(clip.audio, want.audio)
    assert all(torch.equal(clip.truth[key], want.truth[key]) for key in want.truth) and len(clip.truth) == 2


def test_the_same_recipe_is_read_back_and_any_other_is_made_anew(tmp_path, talkers, monkeypatch):
    """The key holds all that shapes the clips: count, size, seconds, seed, first, world and the renderer's source."""
    recipe = dict(count=2, size=8, seconds=1, seed=0, first=0, cache=tmp_path)
    drawn_talkers.synthetic_clips(**recipe)
    drawn_talkers.synthetic_clips(**recipe)
    assert talkers == [0, 1]
    for change in (dict(count=1), dict(size=9), dict(seconds=2), dict(seed=1), dict(first=1), dict(world="found")):
        talkers.clear()
        drawn_talkers.synthetic_clips(**(recipe | change))
        assert talkers, change
    talkers.clear()
    (edited := tmp_path / "talkers.py").write_text("an edited renderer")
    monkeypatch.setattr(drawn_talkers, "__file__", str(edited))
    drawn_talkers.synthetic_clips(**recipe)
    assert talkers


def test_a_changed_file_changes_the_key(tmp_path, cache):
    video = make_video(tmp_path / "a.mp4", seconds=1.2)
    first = data.folder_clips(tmp_path, 16, cache=cache)[0].folder
    assert data.folder_clips(tmp_path, 16, cache=cache)[0].folder == first
    os.utime(video, (1, 1))
    assert data.folder_clips(tmp_path, 16, cache=cache)[0].folder != first


def test_what_a_killed_run_left_is_removed_and_a_living_run_is_left_alone(tmp_path, talkers):
    """A run touches its temporary folder at every clip: a folder that was quiet for a day has no run."""
    alive, dead = tmp_path / "tmp-a", tmp_path / "tmp-b"
    for folder in (alive, dead):
        folder.mkdir()
        (folder / "0.safetensors").write_bytes(b"half")
    day_ago = time.time() - 25 * 3600
    os.utime(dead, (day_ago, day_ago))
    drawn_talkers.synthetic_clips(1, 8, seconds=1, cache=tmp_path)
    assert alive.exists() and not dead.exists()


def test_a_run_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def render(index, seed, size, frames, faults=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn_talkers, "render_talker", render)
    with pytest.raises(KeyboardInterrupt):
        drawn_talkers.synthetic_clips(2, 8, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_of_two_runs_at_once_both_get_the_same_whole_cache(tmp_path, talkers, monkeypatch):
    """The loser of the race throws its own away: here the winner appears while the loser is still rendering."""
    render = drawn_talkers.render_talker

    def slow(index, seed, size, frames, faults=None):
        if index == 0 and len(talkers) == 0:
            talkers.append(-1)
            drawn_talkers.synthetic_clips(2, 8, seconds=1, cache=tmp_path)      # the other run, finishing first
        return render(index, seed, size, frames)

    monkeypatch.setattr(drawn_talkers, "render_talker", slow)
    clips = drawn_talkers.synthetic_clips(2, 8, seconds=1, cache=tmp_path)
    assert talkers == [-1, 0, 1, 0, 1]                                 # both rendered, one cache is left
    assert [folder.name for folder in tmp_path.iterdir()] == [clips.folder.name] and len(clips) == 2


def test_two_processes_started_together_agree(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        make_video(tmp_path / "in" / f"{name}.mp4", seconds=1.2)
    code = ("import sys, data; t, h = data.folder_clips(sys.argv[1], 16, cache=sys.argv[2]);"
            "print([int(c.frames.sum()) for p in (t, h) for c in p], t.folder)")
    command = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "cache")]
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [run.communicate() for run in runs]
    assert all(run.returncode == 0 for run in runs), said
    assert said[0][0] == said[1][0] and len(list((tmp_path / "cache").iterdir())) == 1


# ---- Portraits -------------------------------------------------------------------------------------------------------

def colours(width: int = 80, height: int = 60) -> np.ndarray:
    """(H, W, 3): smooth, and different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 / (width - 1), y * 255 / (height - 1), 255 - x * 255 / (width - 1)], -1).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp"])
def test_a_portrait_is_the_centre_square_in_rgb(tmp_path, suffix):
    Image.fromarray(colours()).save(tmp_path / f"a.{suffix}")
    portrait = data.load_portrait(tmp_path / f"a.{suffix}", 60)
    assert portrait.dtype == torch.uint8 and portrait.shape == (3, 60, 60)
    want = torch.from_numpy(colours()[:, 10:70]).permute(2, 0, 1)
    assert (portrait.float() - want.float()).abs().mean() < 6


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "CMYK", "I;16", "I", "F"])
def test_any_mode_gives_the_same_grey(tmp_path, mode):
    """A grey ramp reads alike whether stored in 1, 8, 16 or 32 bits, with a palette, as ink or as light."""
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None], 64, 0)
    if mode in ("I;16", "I"):
        image = Image.fromarray(ramp.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    else:
        image = Image.fromarray(ramp).convert(mode)
    image.save(tmp_path / "a.tiff")
    assert Image.open(tmp_path / "a.tiff").mode == mode
    portrait = data.load_portrait(tmp_path / "a.tiff", 32).float().mean((0, 1))
    want = torch.from_numpy(ramp[0]).float().view(32, 2).mean(1)
    assert (portrait - want).abs().max() < (90 if mode == "1" else 6)


def test_transparency_is_white(tmp_path):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, 32:] = (0, 0, 200, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    portrait = data.load_portrait(tmp_path / "a.png", 64)
    assert portrait[:, 5, 5].tolist() == [255, 255, 255] and portrait[:, 5, 60].tolist() == [0, 0, 200]


def test_exif_orientation_is_undone(tmp_path):
    """Orientation 6 says: stored lying, show turned clockwise by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colours(64, 64)).save(tmp_path / "a.png", exif=exif)
    want = torch.from_numpy(np.rot90(colours(64, 64), -1).copy()).permute(2, 0, 1)
    assert torch.equal(data.load_portrait(tmp_path / "a.png", 64), want)


def test_a_crop_is_the_square_named_and_must_lie_inside(tmp_path):
    Image.fromarray(colours()).save(tmp_path / "a.png")
    portrait = data.load_portrait(tmp_path / "a.png", 40, crop=(30, 15, 40))
    assert torch.equal(portrait, torch.from_numpy(colours()[15:55, 30:70]).permute(2, 0, 1))
    with pytest.raises(data.MediaError, match="leaves the picture of 80x60"):
        data.load_portrait(tmp_path / "a.png", 40, crop=(50, 15, 40))


def test_unusable_portraits_are_errors_that_name_the_file(tmp_path):
    Image.fromarray(colours(8, 8)).save(tmp_path / "8px.png")
    Image.fromarray(colours(40, 900)).save(tmp_path / "strip.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    words = {"8px.png": "too few", "strip.png": "strip", "truncated.png": "truncated", "text.png": "not a picture",
             "empty.jpg": "not a picture", "missing.png": "no such file", ".": "is a directory"}
    for name, reason in words.items():
        with pytest.raises(data.MediaError) as caught:
            data.load_portrait(tmp_path / name, 64)
        message = str(caught.value)
        assert reason in message and message.startswith(str(tmp_path / name)) and "\n" not in message


def profile_of(*primaries: tuple[float, float, float]) -> bytes:
    """The sRGB profile with other primaries, each (X, Y, Z)."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for at in range(132, 132 + 12 * int.from_bytes(raw[128:132], "big"), 12):         # the table of tags
        tag, start = raw[at : at + 4], int.from_bytes(raw[at + 4 : at + 8], "big") + 8
        if tag in (b"rXYZ", b"gXYZ", b"bXYZ"):
            xyz = primaries[b"rgb".index(tag[0])]
            raw[start : start + 12] = b"".join(round(x * 65536).to_bytes(4, "big", signed=True) for x in xyz)
    return bytes(raw)


DISPLAY_P3 = (0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)


@pytest.mark.parametrize("mode, alpha", [("RGB", 255), ("RGBA", 255), ("P", 255), ("RGBA", 0)])
def test_a_photo_of_a_wide_gamut_shows_its_colours_in_srgb(tmp_path, mode, alpha):
    """Red 220, 40, 40 as a phone stores it, in Display P3, comes back as 220, 40, 40, and the transparent as white."""
    p3 = ImageCms.ImageCmsProfile(io.BytesIO(profile_of(*DISPLAY_P3)))
    red = Image.new("RGB", (64, 64), (220, 40, 40))
    photo = ImageCms.profileToProfile(red, ImageCms.createProfile("sRGB"), p3, outputMode="RGB").convert(mode)
    if mode == "RGBA":
        photo.putalpha(alpha)
    photo.save(tmp_path / "a.png", icc_profile=p3.tobytes())
    want = torch.tensor([220, 40, 40]) if alpha else torch.tensor([255, 255, 255])
    assert (data.load_portrait(tmp_path / "a.png", 32)[:, 5, 5] - want).abs().max() <= 2


LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@pytest.mark.parametrize("profile", [b"no profile", LAB])
def test_a_profile_that_does_not_fit_is_as_if_there_were_none(tmp_path, profile):
    Image.fromarray(colours(64, 64)).save(tmp_path / "a.png", icc_profile=profile)
    portrait = data.load_portrait(tmp_path / "a.png", 64).permute(1, 2, 0)
    assert torch.equal(portrait, torch.from_numpy(colours(64, 64)))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_huge_photo_is_scaled_down_while_it_is_read(tmp_path, orientation):
    """A crop of a JPEG of 25 megapixels is the same place and colour as in the same scene at a hundredth of that."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name, times in (("small", 1), ("large", 10)):
        Image.fromarray(colours(600, 420)).resize((600 * times, 420 * times)).save(
            tmp_path / f"{name}.jpg", exif=exif, quality=95)
    small = data.load_portrait(tmp_path / "small.jpg", 60, (100, 200, 180)).float()
    large = data.load_portrait(tmp_path / "large.jpg", 60, (1000, 2000, 1800)).float()
    assert (small - large).abs().mean() < 2


def test_what_is_too_large_or_too_new_for_pillow_is_told_what_to_do(tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "200_megapixels.png")
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for name, words in (("200_megapixels.png", "20000x10000 are too many"), ("phone.jpg", "is HEIC; export it")):
        with pytest.raises(data.MediaError, match=words):
            data.load_portrait(tmp_path / name, 64)


# ---- Speech ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, arguments", [
    ("8k_u8.wav", ["-ar", 8000, "-ac", 1, "-c:a", "pcm_u8"]), ("48k_s24.wav", ["-ac", 2, "-c:a", "pcm_s24le"]),
    ("speech.mp3", ["-b:a", "128k"]), ("mp3_named.wav", ["-f", "mp3"]), ("speech.flac", []), ("speech.ogg", []),
    ("quiet.wav", ["-af", "volume=0.02"])])
def test_speech_of_any_container_and_rate_comes_out_alike(tmp_path, name, arguments):
    """3 s at 16 kHz, in time with the original, rms 0.1 over what is louder than -40 dB of the peak."""
    ffmpeg("-f", "lavfi", "-i", SPEECH, *arguments, tmp_path / name)
    sound = data.load_speech(tmp_path / name)
    assert sound.dtype == torch.float32 and sound.ndim == 1 and abs(len(sound) - 48000) < 640
    active = sound[sound.abs() > 0.01 * sound.abs().max()]
    assert active.square().mean().sqrt() == pytest.approx(0.1, rel=0.02)
    t = torch.arange(len(sound)) / 16000
    want = torch.sin(2 * torch.pi * 220 * t) * torch.sin(2 * torch.pi * 2 * t).abs()
    loudness = [x[:47360].view(-1, 160).square().mean(1) for x in (sound, want)]
    assert torch.corrcoef(torch.stack(loudness))[0, 1] > 0.98


def test_max_seconds_limits_what_is_read(tmp_path):
    ffmpeg("-f", "lavfi", "-i", SPEECH, tmp_path / "a.wav")
    assert len(data.load_speech(tmp_path / "a.wav", max_seconds=1.5)) == 24000


def test_a_knock_does_not_make_the_speech_quiet():
    """Loudness comes from the rms, so a single full-scale click is clipped instead of setting the level."""
    speech = 0.02 * torch.sin(torch.arange(48000) / 10)
    knocked = speech.clone()
    knocked[1000:1010] = 0.9
    assert data.normalise_loudness(knocked).abs().max() <= 1
    ratio = data.normalise_loudness(knocked)[5000:].std() / data.normalise_loudness(speech)[5000:].std()
    assert 0.6 < ratio < 1.4


def test_an_offset_is_not_loudness():
    """A constant is inaudible: it neither changes the level of speech nor makes silence into sound."""
    speech = 0.02 * torch.sin(torch.arange(48000) / 10)
    shifted, plain = data.normalise_loudness(speech + 0.3), data.normalise_loudness(speech)
    torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=0)
    with pytest.raises(data.MediaError, match="silent"):
        data.normalise_loudness(torch.full((16000,), 0.3))


def test_unusable_speech_is_an_error_in_plain_words(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "anullsrc=r=16000:d=2", tmp_path / "silence.wav")
    ffmpeg("-f", "lavfi", "-i", SPEECH, "-t", 0.01, "-ar", 16000, tmp_path / "10ms.wav")
    ffmpeg(*clock(seconds=0.2), tmp_path / "no_audio.mp4")
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.mp3").write_text("hello")
    words = {"silence.wav": "is silent", "10ms.wav": "10 ms", "no_audio.mp4": "no audio track", "empty.wav": "is empty",
             "corrupt.wav": "not audio or video", "text.mp3": "not audio or video",
             "missing.wav": "does not exist", ".": "is a folder"}
    for name, reason in words.items():
        with pytest.raises(data.MediaError) as caught:
            data.load_speech(tmp_path / name)
        message = str(caught.value)
        assert reason in message and message.startswith(str(tmp_path / name)) and "\n" not in message


HUM = "aevalsrc='0.5*sin(2*PI*50*t)':s=48000:d=3"                            # louder than SPEECH, but it says nothing
SILENCE = "anullsrc=r=48000:cl=mono:d=3"


def mixed(path: Path, *sounds: str, merge: bool = True) -> Path:
    """A file with each of the sounds, as channels of one track or as tracks."""
    inputs = [word for sound in sounds for word in ("-f", "lavfi", "-i", sound)]
    tracks = (["-filter_complex", f"{''.join(f'[{i}]' for i in range(len(sounds)))}join=inputs={len(sounds)}"
               f":channel_layout={len(sounds)}c"] if merge else
              [word for i in range(len(sounds)) for word in ("-map", f"{i}:a")])
    ffmpeg(*inputs, *tracks, "-c:a", "pcm_s16le", path)
    return path


@pytest.mark.parametrize("sounds, merge, number, channel", [
    ([SPEECH], True, 1, 0), ([SILENCE, SPEECH], False, 2, 0), ([HUM, SPEECH], False, 2, 0),
    ([SPEECH, SPEECH], False, 1, 0), ([SPEECH, SPEECH.replace("0.3*", "-0.3*")], True, 1, 1),
    ([SILENCE] * 3 + [SPEECH], True, 1, 4), ([SILENCE] * 11 + [SPEECH], True, 1, 12)])
def test_the_track_and_the_channel_with_speech_are_heard(tmp_path, sounds, merge, number, channel):
    """A desktop's track before the microphone's, an inverted channel, four or twelve channels of which one speaks."""
    sound, track = data.read_speech(mixed(tmp_path / "a.mkv", *sounds, merge=merge))
    assert (track.number, track.channel) == (number, channel) and ("hears" in track.note()) == (len(sounds) > 1)
    alone = data.load_speech(mixed(tmp_path / "b.wav", SPEECH))
    assert np.corrcoef(sound[:47000], alone[:47000])[0, 1] > 0.99


def test_a_flag_chooses_another_track_or_channel(tmp_path):
    path = mixed(tmp_path / "a.mkv", HUM, SPEECH, merge=False)
    assert data.read_speech(path, choice=(1, 0))[1].number == 1
    with pytest.raises(data.MediaError, match="track 1 with 1 channels, track 2 with 1 channels"):
        data.read_speech(path, choice=(2, 2))


def test_a_clap_leaves_the_speech_as_loud_as_it_is_without(tmp_path):
    """44 dB above quiet speech, with an echo: the speech still has the loudness of all speech."""
    torch.manual_seed(0)
    speech = 0.006 * torch.sin(torch.arange(80000) / 10) * torch.sin(torch.arange(80000) / 2500).abs()
    clapped = speech.clone()
    clapped[40000:41600] += 0.95 * torch.exp(-torch.arange(1600) / 300) * torch.randn(1600).clamp(-1, 1)
    ratio = data.normalise_loudness(clapped)[:38000].std() / data.normalise_loudness(speech)[:38000].std()
    assert 0.8 < ratio < 1.25


# ---- Log-mel ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frame", [0, 7, 19])
def test_frame_f_hears_its_look_ahead_and_not_one_sample_more(frame):
    """d feature[f] / d sample[t] = 0 for t >= 640 (f + 1) + 1280 and for t < 640 f - 880; just inside it is not."""
    torch.manual_seed(0)
    audio, f = torch.randn(20 * 640 + 1280) * 0.1, frame
    feature = data.log_mel(audio, 20)[f]
    first, last = 640 * f - 880, 640 * (f + 1) + 1280
    assert data.LATENCY == 1280 / 16000
    assert torch.equal(data.log_mel(torch.cat([audio[:last], torch.full((5000,), 9.0)]), 20)[f], feature)
    nearly = audio.clone()
    nearly[last - 30 : last] += 9                                   # the window's last samples weigh almost nothing
    assert not torch.equal(data.log_mel(nearly, 20)[f], feature)
    if first > 0:
        past = audio.clone()
        past[:first] = 9
        assert torch.equal(data.log_mel(past, 20)[f], feature)
        past[first : first + 30] = 9
        assert not torch.equal(data.log_mel(past, 20)[f], feature)


def test_a_click_is_loudest_in_the_hops_that_hold_it():
    """Sample t is in hop j if 160 (j + 1) - 400 <= t < 160 (j + 1); frame f has hops 4f - 4 to 4f + 11."""
    t, audio = 640 * 12 + 10, torch.zeros(30 * 640)                 # in the first own hop of frame 12
    audio[t] = 1.0
    hops = data.log_mel(audio, 30).view(30, 16, 32).mean(-1)        # (F, hops around the frame)
    heard = {(f, 4 * f - 4 + k) for f, k in (hops > hops.min() + 1e-3).nonzero().tolist()}
    assert heard == {(f, j) for f in range(30) for j in range(4 * f - 4, 4 * f + 12)
                     if 160 * (j + 1) - 400 <= t < 160 * (j + 1)}
    assert {f for f, _ in heard} == {10, 11, 12, 13}                # 80 ms of look-ahead, 40 ms of look-back


def test_log_mel_equals_the_definition_written_as_loops():
    """log(mel + floor) of a Hann-windowed DFT in float64, with torchaudio's filter bank as the only thing shared."""
    torch.manual_seed(0)
    audio, n_frames = torch.randn(4 * 640) * 0.1, 4
    bank = data._mel(torch.device("cpu")).mel_scale.fb.double().numpy()             # (201, 32)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    padded = np.concatenate([np.zeros(5000), audio.double().numpy(), np.zeros(5000)])
    for f in range(n_frames):
        for k in range(16):
            end = 160 * (4 * f - 4 + k + 1) + 5000
            power = np.abs(np.fft.rfft(hann * padded[end - 400 : end])) ** 2
            want = (np.log(power @ bank + data.LOG_FLOOR) - data.LOG_MEAN) / data.LOG_STD
            np.testing.assert_allclose(data.log_mel(audio, n_frames)[f].view(16, 32)[k], want, atol=2e-3)


def test_a_batch_is_its_rows_and_short_audio_is_zero_padded():
    torch.manual_seed(0)
    audio = torch.randn(3, 5000) * 0.1
    batch = data.log_mel(audio, 10)
    assert batch.shape == (3, 10, data.MEL_DIM) and batch.dtype == torch.float32
    torch.testing.assert_close(batch[1], data.log_mel(audio[1], 10))
    padded = torch.cat([audio, torch.zeros(3, 20000)], 1)
    assert torch.equal(batch, data.log_mel(padded, 10))


def test_long_speech_is_heard_in_pieces_that_are_the_whole():
    """Frames 390 to 410 lie on either side of a piece's end, and a chunk alone is what it is among all."""
    torch.manual_seed(0)
    audio = torch.randn(900 * 640) * 0.1
    whole, lazy = data.log_mel(audio, 900), data.LogMel(audio, 900)
    alone = data.log_mel(audio[380 * 640 : 420 * 640], 40)
    assert whole.shape == (900, data.MEL_DIM) and lazy.shape == (1, 900, data.MEL_DIM)
    torch.testing.assert_close(whole[390:410], alone[10:30], atol=1e-4, rtol=0)
    torch.testing.assert_close(lazy[:, 396:404], whole[None, 396:404], atol=1e-4, rtol=0)


# ---- Writing video ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_samples", [640, 16001, 47648])
@pytest.mark.parametrize("shape", [(64, 64), (33, 47)])
def test_the_video_has_every_frame_and_all_of_the_sound(tmp_path, n_samples, shape):
    """ceil(T / 640) frames in; the same number out, in order; the sound as long as it was to within one frame."""
    n_frames = -(-n_samples // 640)
    grey = torch.arange(n_frames) * 3 % 200 + 20
    frames = grey.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, *shape)
    audio = 0.3 * torch.sin(torch.arange(n_samples) / 10)
    data.write_video(tmp_path / "a.mp4", iter(frames), audio)
    out, sound = pixels(tmp_path / "a.mp4"), samples(tmp_path / "a.mp4")
    assert out.shape == (n_frames, shape[0] + shape[0] % 2, shape[1] + shape[1] % 2, 3)
    assert np.abs(out[..., 1].mean((1, 2)) - grey.numpy()).max() < 3
    assert abs(len(sound) - n_samples) <= 640
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))[1] == pytest.approx(n_frames / 25, abs=0.041)
    if n_samples > 640:
        overlap = min(len(sound), n_samples)
        assert np.corrcoef(sound[:overlap], audio[:overlap])[0, 1] > 0.95    # 4 samples late would read 0.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


def test_browsers_can_play_it_and_colours_survive(tmp_path):
    """H.264 4:2:0 with AAC, the index in front, and a stated colour matrix: red stays red to within 4 of 255."""
    colour = torch.tensor([[200, 40, 60], [10, 220, 30], [30, 60, 230]], dtype=torch.uint8)
    data.write_video(tmp_path / "a.mp4", colour[:, :, None, None].expand(3, 3, 64, 64), torch.zeros(1920))
    assert np.abs(pixels(tmp_path / "a.mp4").mean((1, 2)) - colour.numpy()).max() < 4
    streams = subprocess.run([FFMPEG, "-i", tmp_path / "a.mp4"], capture_output=True, text=True).stderr
    assert "h264" in streams and "yuv420p(tv, bt709" in streams and "aac (LC)" in streams
    raw = (tmp_path / "a.mp4").read_bytes()
    assert raw.index(b"moov") < raw.index(b"mdat")


@pytest.mark.parametrize("name, arguments, seconds, kept", [
    ("a.wav", ["-ac", 2, "-ar", 44100], None, "aac (LC).*44100 Hz, stereo"),
    ("a.mp3", ["-ac", 2, "-ar", 44100], None, "mp3.*44100 Hz, stereo"), ("a.flac", ["-ac", 2], None, "flac.*stereo"),
    ("a.mp3", ["-ac", 2], 1.5, "aac (LC).*48000 Hz, stereo"), ("a.wav", ["-ar", 8000], None, "aac.*48000 Hz, mono"),
    ("a.mka", ["-af", "atrim=start=1"], None, "aac.*48000 Hz, mono"),
    ("a.wav", ["-af", "pan=12c|c11=c0"], None, "aac.*48000 Hz, mono")])
def test_the_video_carries_the_sound_that_was_given(tmp_path, name, arguments, seconds, kept):
    """At its own rate and with its channels, in time, as long as the video: a copy where browsers play it."""
    ffmpeg("-f", "lavfi", "-i", SPEECH, *arguments, tmp_path / name)
    speech, track = data.read_speech(tmp_path / name, seconds)
    n_frames = -(-len(speech) // 640)
    data.write_video(tmp_path / "a.mp4", torch.zeros(n_frames, 3, 32, 32, dtype=torch.uint8), track)
    streams = subprocess.run([FFMPEG, "-i", tmp_path / "a.mp4"], capture_output=True, text=True).stderr
    assert re.search(kept.replace("(LC)", r"\(LC\)"), streams), streams
    heard, written = data.load_speech(tmp_path / "a.mp4"), pixels(tmp_path / "a.mp4")
    assert abs(len(heard) - len(speech)) <= 640 and len(written) == n_frames
    overlap = min(len(heard), len(speech))
    assert np.corrcoef(heard[:overlap], speech[:overlap])[0, 1] > 0.95


def test_an_error_on_the_way_leaves_the_old_file_and_nothing_else(tmp_path):
    """The name changes hands only when the new file is whole."""
    (tmp_path / "a.mp4").write_bytes(b"old")

    def frames():
        yield torch.zeros(3, 64, 64, dtype=torch.uint8)
        raise RuntimeError("generator failed")

    with pytest.raises(RuntimeError, match="generator failed"):
        data.write_video(tmp_path / "a.mp4", frames(), torch.zeros(6400))
    with pytest.raises(data.MediaError, match="no frame"):
        data.write_video(tmp_path / "a.mp4", iter([]), torch.zeros(6400))
    assert (tmp_path / "a.mp4").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_place_that_cannot_be_written_is_an_error_in_plain_words(tmp_path):
    frames = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for path, words in ((tmp_path / "no" / "a.mp4", "make its folder"), (tmp_path, "choose a name")):
        with pytest.raises(data.MediaError, match=words):
            data.write_video(path, frames, torch.zeros(1280))


def test_what_cannot_be_written_is_refused_before_the_first_frame(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    asked = []
    for path in (tmp_path / "folder.mp4", tmp_path / ("x" * 256 + ".mp4"), tmp_path / "no" / "a.mp4"):
        with pytest.raises(data.MediaError, match="cannot be written"):
            data.write_video(path, (asked.append(i) for i in range(3)), torch.zeros(1280))
    assert not asked and [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]


# ---- The real collection ---------------------------------------------------------------------------------------------

@pytest.mark.skipif(not EDGE.is_dir(), reason="the collection of odd files is not beside the repository")
def test_every_file_of_the_real_collection_meets_its_fate(tmp_path, cache):
    """The files of which the ones above are equivalents."""
    good_video = {"fps23976_48k.mp4", "fps30_stereo44k.mp4", "rotated.mp4", "vfr.mp4"}
    good_sound = good_video | {"mp3_named.wav", "speech.mp3", "speech_48k_s24_stereo.wav", "speech_8k_u8.wav",
                               "too_short.mp4"}
    good_picture = {f"portrait{name}" for name in (".jpg", ".png", ".webp", "_gray.png", "_rgba.png")}
    train, held_out = data.folder_clips(EDGE, 32, cache=cache)
    assert {name.split("#")[0] for name in train.names + held_out.names} == good_video
    assert all(len(clip.frames) == 75 for part in (train, held_out) for clip in part)
    for path in EDGE.iterdir():
        picture = path.suffix in (".png", ".jpg", ".webp")
        load = (lambda: data.load_portrait(path, 64)) if picture else (lambda: data.load_speech(path))
        if path.name in good_sound | good_picture:
            assert load().numel()
        else:
            with pytest.raises(data.MediaError, match=path.name):
                load()
