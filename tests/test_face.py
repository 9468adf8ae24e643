"""The head is found and framed: one steady square, or one line that says what to do."""

import json
import sys
from itertools import product

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from scipy import ndimage

from data import STOPPED, folder_clips, write_video
from extras import face
from extras.files import MediaError
from extras.media import FPS, SAMPLES_PER_FRAME
from tiny import ffmpeg


def box(x, y, size, score=1.0):
    return x, y, size, size, score


TALKER, PAIR = [box(100, 80, 60)], [box(100, 80, 60), box(300, 80, 60)]


def test_dlib_finds_the_same_head_wherever_it_is_and_one_that_lies_on_its_side():
    """Moved and scaled like the photo; what is framed already stays nearly whole."""
    pytest.importorskip("dlib", reason="faces are found with dlib: pip install dlib-bin")
    photo, wall = Image.open(get_sample_data("grace_hopper.jpg", False)), Image.new("RGB", (640, 360))
    x, y, side = face.frame_of(np.asarray(photo))
    scale = 300 / photo.width
    wall.paste(photo.resize((300, round(scale * photo.height)), Image.LANCZOS), (200, 8))
    found = face.frame_of(np.asarray(wall))
    expected = np.array([200 + x * scale, 8 + y * scale, side * scale])
    assert np.abs(found - expected).max() < 0.07 * expected[2]
    again = face.frame_of(np.asarray(photo.crop((x, y, x + side, y + side))))
    assert again[2] > 0.9 * side and max(again[:2]) < 0.07 * side
    with pytest.raises(MediaError, match="turn the picture"):
        face.frame_of(np.rot90(photo))


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


def test_the_tool_names_what_is_wrong_with_a_picture_and_leaves_other_files_alone(
        tmp_path, monkeypatch, capsys):
    """A picture that is cut short is no video without sound; a strip is not enlarged to be searched."""
    whole = tmp_path / "me.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(whole)
    monkeypatch.setattr(face, "find_faces", lambda picture, work: TALKER)
    for name, content, says in (("cut.png", b"\x89PNG\r\n\x1a\n0000", "not a picture, or is truncated"),
                                ("me.heic", b"\0\0\0\x18ftypheic" + bytes(12), "is HEIC"),
                                ("me.jpg", whole.read_bytes(), "")):
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(sys, "argv", ["face", str(tmp_path / name)])
        if says:
            with pytest.raises(SystemExit, match=f"{name}: .*{says}"):
                face.main()
        else:
            face.main()
    assert {p.name for p in tmp_path.iterdir()} == {"cut.png", "me.heic", "me.jpg", "me.jpg.frame.png"}
    (tmp_path / "me.3gp").touch()                                # folders are not searched for this suffix
    monkeypatch.setattr(face, "pieces", lambda path: ([(0, 50, (1, 2, 3))], []))
    monkeypatch.setattr(sys, "argv", ["face", str(tmp_path / "me.3gp")])
    face.main()
    assert "2 s in 1 pieces" in capsys.readouterr().out
    with pytest.raises(MediaError, match="strip of 40x900 pixels; name the square"):
        face.frame_of(np.zeros((900, 40, 3), np.uint8))


def test_without_dlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    face._detector.cache_clear()
    with pytest.raises(MediaError, match="pip install dlib-bin"):
        face.find_faces(np.zeros((64, 64, 3), np.uint8))


def bright_squares(picture, work):
    """A detector: what is bright is a face."""
    found = ndimage.find_objects(ndimage.label(picture.mean(-1) > 170)[0])
    return [(x.start, y.start, x.stop - x.start, y.stop - y.start, 1.0) for y, x in found]


def test_a_video_is_watched_and_a_stretch_ends_where_the_face_goes_a_second_comes_or_it_jumps(
        tmp_path, monkeypatch):
    """It goes at frame 64, two looks earlier for a fade, a second one comes at 240, and it jumps at 372,
    with a look and a half left out; the scene is cut at 444."""
    monkeypatch.setattr(face, "find_faces", bright_squares)
    here, beside, there = (50, 40, 24), (110, 8, 24), (100, 60, 28)
    frames = np.full((516, 3, 120, 160), 60, np.uint8)
    frames[444:] = 110
    for start, stop, (x, y, size) in ((0, 64, here), (108, 372, here), (240, 276, beside), (372, 444, there),
                                      (444, 516, here)):
        frames[start:stop, :, y:y + size, x:x + size] = 230
    write_video(tmp_path / "me.mp4", torch.from_numpy(frames), 0.1 * torch.randn(516 * SAMPLES_PER_FRAME))
    kept, left_out = face.pieces(tmp_path / "me.mp4")
    near, far = (40, 25, 44), (88, 42, 52)
    assert kept == [(0, 36, near), (132, 216, near), (300, 354, near), (390, 444, far), (444, 516, near)]
    assert left_out == [(36, 132, "no face"), (216, 300, "two faces"), (354, 390, "head jumps")]
    assert face.told(kept, left_out) == ("12 s in 5 pieces; left out: head jumps 1 s (at 0:14), "
                                         "no face 4 s (at 0:01), two faces 3 s (at 0:08)")
    STOPPED.set()                                    # by Ctrl-C
    with pytest.raises(MediaError, match="me.mp4: was not looked through to its end"):
        face.pieces(tmp_path / "me.mp4")
    STOPPED.clear()
    many = [(25 * second, 25 * second + 50, "no face") for second in (9, 65, 125, 3600)]
    assert face.reasons(many) == "no face 8 s (at 0:09, 1:05, 2:05, ...)"


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
    monkeypatch.setattr(face, "speaks", lambda path: heard[:-36])       # the sound ends before the picture
    assert face.pieces("me.mp4")[1][-1] == (len(heard) - 36, len(heard), "no sound")


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
    clips, held_out = folder_clips(tmp_path / "me.mp4", 16, 1.0, "face")
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
    monkeypatch.setattr(face, "frame_of", lambda picture, path: (1, 2, 3))
    monkeypatch.setattr(face, "find_spec", lambda name: True)
    assert face.photo_square(tmp_path / "me.png", given, tmp_path) == found


def test_short_pauses_belong_to_speech_and_long_ones_do_not(monkeypatch):
    sound = 0.1 * torch.randn(10 * FPS, SAMPLES_PER_FRAME)
    sound[50:75], sound[125:200] = 0, 0              # one second, three seconds
    monkeypatch.setattr(face, "read_speech", lambda path: (sound.flatten(), None))
    assert face.runs(face.speaks("me.wav")) == [(0, 125), (125, 200), (200, 250)]


def test_a_still_that_is_held_for_long_is_seen_at_any_second(tmp_path):
    """One frame of eight seconds: none begins after the fourth."""
    still = "color=red:s=64x48:r=1/8:d=8"
    ffmpeg("-f", "lavfi", "-i", still, tmp_path / "a.mp4")
    assert face.frame_at(tmp_path / "a.mp4", 4.0).shape == (48, 64, 3)
