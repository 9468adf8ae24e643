"""The head is found and framed: one steady square, or one line that says what to do."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from data import folder_clips, write_video
from extras import face
from extras.files import MediaError
from extras.media import FPS, SAMPLES_PER_FRAME

PHOTO = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")      # a real face, always there


@pytest.fixture
def photo():
    pytest.importorskip("dlib", reason="faces are found with dlib: pip install dlib-bin")
    return Image.open(PHOTO).convert("RGB")


def on_a_wall(photo, width, height, x, y, side):
    """The photo, scaled to `side` pixels of width, on a plain wall."""
    wall = Image.new("RGB", (width, height), (120, 130, 140))
    wall.paste(photo.resize((side, round(side * photo.height / photo.width)), Image.LANCZOS), (x, y))
    return np.asarray(wall)


def box(x, y, size, score=1.0):
    return x, y, size, size, score


TALKER, PAIR = [box(100, 80, 60)], [box(100, 80, 60), box(300, 80, 60)]


def test_the_same_head_is_cut_alike_wherever_it_is_and_however_large(photo):
    """Moved and scaled like the photo; and a picture that is framed already stays nearly whole."""
    x, y, side = face.frame_of([np.asarray(photo)])
    scale = 300 / photo.width
    picture = on_a_wall(photo, 640, 360, 200, 8, 300)
    found = face.frame_of([picture.transpose(2, 0, 1)] * 3)                      # (3, H, W), more than one
    expected = np.array([200 + x * scale, 8 + y * scale, side * scale])
    assert np.abs(found - expected).max() < 0.07 * expected[2]
    again = np.array(face.frame_of([np.asarray(photo.crop((x, y, x + side, y + side)))]))
    assert again[2] > 0.9 * side and again[:2].max() < 0.07 * side


def test_one_square_inside_the_picture_serves_a_clip_and_a_slip_does_not_move_it():
    steady = [TALKER] * 9
    slips = [*steady[:4], [box(300, 10, 90)], *steady[5:], []]
    assert face.square_of(slips, 640, 360) == face.square_of(steady, 640, 360)
    assert face.square_of([[box(0, 0, 50), box(300, 100, 100)]], 640, 360)[0] > 200     # of two, the larger
    for size, (x, y) in product((60, 250), ((0, 0), (580, 0), (0, 300), (580, 300), (250, 100))):
        left, top, side = face.square_of([[box(x, y, size)]], 640, 360)
        assert left >= 0 and top >= 0 and left + side <= 640 and top + side <= 360 and side > size


@pytest.mark.parametrize("found, says", [
    ([[]], "shows no face; .*--crop x,y,size.*--crop none"),
    ([[box(0, 0, 90), box(300, 0, 100)]], "shows two faces.*--crop x,y,size"),
    ([[box(40 * i, 100, 60)] for i in range(10)], "moves")])
def test_what_cannot_be_framed_is_refused_in_one_line_that_names_the_flag(found, says):
    with pytest.raises(MediaError, match=f"^me.jpg: [^\n]*{says}[^\n]*$"):
        face.square_of(found, 640, 360, "me.jpg")


@pytest.mark.parametrize("turn, says", [(np.rot90, "turn the picture"), (np.zeros_like, "no face")])
def test_a_picture_that_lies_on_its_side_is_to_be_turned_and_a_wall_has_no_face(photo, turn, says):
    with pytest.raises(MediaError, match=says):
        face.frame_of([turn(np.asarray(photo))])


def test_without_dlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    face._detector.cache_clear()
    with pytest.raises(MediaError, match="pip install dlib-bin"):
        face.find_faces(np.zeros((64, 64, 3), np.uint8))


def test_a_video_is_watched_scene_by_scene(photo, tmp_path):
    """2 s of a wall, then 3 s of a face: the cut is at frame 50, and faces are seen after it alone."""
    wall, scene = np.full((180, 320, 3), 90, np.uint8), on_a_wall(photo, 320, 180, 80, 0, 150)
    frames = torch.from_numpy(np.stack([wall] * 2 * FPS + [scene] * 3 * FPS)).permute(0, 3, 1, 2)
    write_video(tmp_path / "me.mp4", frames, 0.1 * torch.randn(5 * FPS * SAMPLES_PER_FRAME))
    kept, left_out = face.pieces(tmp_path / "me.mp4")
    assert [piece[:2] for piece in kept] == [(50, 125)] and left_out == [(0, 50, "no face")]
    assert face.told(kept, left_out) == "3 s in 1 pieces; left out: no face 2 s (at 0:00)"
    many = [(25 * second, 25 * second + 50, "no face") for second in (9, 65, 125, 3600)]
    assert face.reasons(many) == "no face 8 s (at 0:09, 1:05, 2:05, ...)"


def test_a_broken_video_is_one_line_whatever_its_name(tmp_path):
    """ffmpeg repeats the name, which need not be UTF-8."""
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes(b"no video")
    with pytest.raises(MediaError, match="is not audio or video, [^\n]*$"):
        face.watch(path)


MOVED, DRIFT = [box(300, 80, 90)], [[box(100 + 7 * i, 80, 60)] for i in range(12)]


@pytest.mark.parametrize("found, cuts, silent, kept, left_out", [
    ([TALKER] * 17 + [[]] + [TALKER] * 6 + [PAIR] * 12 + [TALKER] * 2, [144, 288, 432], slice(84, 144),
     [(0, 84, 111), (144, 288, 111)],
     [(84, 144, "no speech"), (288, 432, "two faces"), (432, 456, "too short")]),
    ([TALKER] * 6 + [MOVED] * 6, [], slice(0), [(0, 54, 111), (90, 144, 166)], [(54, 90, "head jumps")]),
    (DRIFT, [], slice(0), [(0, 72, 111), (72, 144, 111)], []),
    *(([other] * 4 + [TALKER] * 8 + [other] * 4, [], slice(0), [(72, 120, 111)],
       [(0, 72, why), (120, 192, why)]) for other, why in (([], "no face"), (PAIR, "two faces")))],
    ids=["scenes", "dissolve", "drift", "no face first", "two faces first"])
def test_a_long_video_is_cut_where_scene_face_or_speech_end(monkeypatch, found, cuts, silent, kept, left_out):
    """By looks, of half a second each. A slip in one look is none. Where a head jumps without a cut, half a
    look more is left out on either side; where it drifts too far for one square, each half has its own. A
    face that fades in or out is left out for two looks more, as a portrait may not be a ghost."""
    heard = np.ones(len(found) * face.LOOK, bool)
    heard[silent] = False
    monkeypatch.setattr(face, "watch", lambda path: face.Seen(found, 640, 360, cuts))
    monkeypatch.setattr(face, "speaks", lambda path: heard)
    got = face.pieces("me.mp4")
    assert [(start, stop, square[2]) for start, stop, square in got[0]] == kept and got[1] == left_out


def test_one_video_becomes_clips_of_its_stretches(tmp_path, monkeypatch, capsys):
    """Red on the left, blue on the right: each stretch is cut by its square, what is between is left out.
    cut.jpg shows both, a red square in the picture, and beside it what is cut."""
    picture = torch.zeros(150, 3, 64, 128, dtype=torch.uint8)
    picture[:, 0, :, :64] = 200
    picture[:, 2, :, 64:] = 200
    picture[:, :, 20:40] += 40                       # a plain portrait would be taken for an empty picture
    write_video(tmp_path / "me.mp4", picture, 0.1 * torch.randn(150 * SAMPLES_PER_FRAME))
    monkeypatch.setattr(face, "detector", lambda: None)
    kept, left_out = [(0, 60, (0, 0, 60)), (90, 150, (66, 2, 60))], [(60, 90, "no face")]
    monkeypatch.setattr(face, "pieces", lambda path: (kept, left_out))
    clips, held_out = folder_clips(tmp_path / "me.mp4", 16, 1.0, "face", tmp_path / "cache")
    assert "skipped parts of me.mp4: no face 1 s (at 0:02)" in capsys.readouterr().out
    both = [*clips, *held_out]
    assert [len(clip.frames) for clip in both] == [25, 25, 25, 25]
    red = [clip.frames.float().mean((0, 2, 3))[0] > clip.frames.float().mean((0, 2, 3))[2] for clip in both]
    assert red == [True, True, False, False]
    shown = np.asarray(Image.open(clips.folder / "cut.jpg")).astype(int)
    assert shown.shape == (2 * 256, 512 + 256, 3)
    assert abs(shown[450, 600] - [0, 0, 200]).max() < 20 and shown[266, 400, 0] > 100     # it begins at 264


@pytest.mark.parametrize("trained, given, found", [
    (None, (), None), ("face", (), (1, 2, 3)), ([5, 5, 50], (), (1, 2, 3)),
    ("face", None, None), (None, "face", (1, 2, 3)), ("face", (7, 8, 9), (7, 8, 9))])
def test_a_photo_is_cut_as_the_clips_of_the_run_unless_told(trained, given, found, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"training": {"crop": trained}}))
    Image.new("RGB", (64, 64)).save(tmp_path / "me.png")
    monkeypatch.setattr(face, "frame_of", lambda pictures, path: (1, 2, 3))
    monkeypatch.setattr(face, "find_spec", lambda name: True)
    assert face.photo_square(tmp_path / "me.png", given, tmp_path) == found


def test_short_pauses_belong_to_speech_and_long_ones_do_not(monkeypatch):
    sound = 0.1 * torch.randn(10 * FPS, SAMPLES_PER_FRAME)
    sound[50:75], sound[125:200] = 0, 0              # one second, three seconds
    monkeypatch.setattr(face, "load_speech", lambda path: sound.flatten())
    assert face.runs(face.speaks("me.wav")) == [(0, 125), (125, 200), (200, 250)]


def test_a_still_that_is_held_for_long_is_seen_at_any_second(tmp_path):
    """One frame of eight seconds: none begins after the fourth."""
    still = "color=red:s=64x48:r=1/8:d=8"
    subprocess.run([*face.FFMPEG, "error", "-f", "lavfi", "-i", still, tmp_path / "a.mp4"], check=True)
    assert face.frame_at(tmp_path / "a.mp4", 4.0).shape == (48, 64, 3)
