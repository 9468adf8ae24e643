"""What data.py promises: odd files have one stated fate, no frame hears the future, nothing is half-written.

All files are made on the fly with ffmpeg and Pillow. The picture that they show is a clock: a bar that grows
by one column a frame, so that a decoded frame says which one it is.
"""

import os
import re
import subprocess
import time
from functools import partial
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors import SafetensorError

import data
from extras.files import MediaError
from extras.media import normalise_loudness
from extras.talkers import synthetic_clips
from tiny import FFMPEG, SPEECH, ffmpeg, streams

HUM = "aevalsrc='0.5*sin(2*PI*50*t)':s=48000:d=3"                            # louder, but it says nothing
SILENCE = "anullsrc=r=48000:cl=mono:d=3"


def clock(fps: str = "25", seconds: float = 3) -> list[str]:
    """ffmpeg input: red from the left to x = width * t / 3 s at time t, over green that grows downwards."""
    return ["-f", "lavfi", "-i", f"color=black:s=128x96:r={fps}:d={seconds},format=rgb24,"
            "geq=r='if(lt(X,128*T/3),220,0)':g='90*Y/H':b=0"]


def time_shown(frames: torch.Tensor) -> torch.Tensor:
    """Read the clock: frames (F, 3, S, S) of the centre square of a 4:3 clock -> seconds (F,)."""
    red = (frames[:, 0].float() / 220).clamp(0, 1).mean((1, 2))    # share of the square that is red
    return (0.125 + 0.75 * red) * 3


def make_video(path: Path, *extra, fps: str = "25", seconds: float = 3, sound: str = SPEECH) -> Path:
    ffmpeg(*clock(fps, seconds), "-f", "lavfi", "-i", sound, "-t", seconds, "-c:v", "libx264",
           "-preset", "ultrafast", "-pix_fmt", "yuv420p", *extra, path)
    return path


def mixed(path: Path, *sounds: str, merge: bool) -> Path:
    """A file with each of the sounds, as channels of one track or as tracks."""
    n = len(sounds)
    inputs = [word for sound in sounds for word in ("-f", "lavfi", "-i", sound)]
    channels = ["-filter_complex", f"join=inputs={n}:channel_layout={n}c"]
    tracks = [word for i in range(n) for word in ("-map", f"{i}:a")]
    ffmpeg(*inputs, *(channels if merge else tracks), "-c:a", "pcm_s16le", path)
    return path


def pixels(path: Path) -> np.ndarray:
    """The frames of a video as ffmpeg sees them, (F, H, W, 3)."""
    width, height = next(imageio_ffmpeg.read_frames(str(path)))["size"]
    raw = ffmpeg("-i", path, "-map", "0:v", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


# ---- What cannot be used ------------------------------------------------------------------------------

picture, clip = partial(data.load_portrait, size=64), partial(data.load_clip, size=32)
decode = partial(data.folder_clips, size=16)
INPUT = ["-f", "lavfi", "-i"]


@pytest.mark.parametrize("load, name, made_of, words", [
    (picture, "8px.png", (8, 8), "too few"), (picture, "strip.png", (40, 900), "strip"),
    (picture, "200_megapixels.png", (20000, 10000), "20000x10000 are too many"),
    (picture, "text.png", b"hello", "not a picture"),
    (picture, "phone.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC; export it"),
    (data.read_speech, "silence.wav", [*INPUT, SILENCE], "is silent"),
    (data.read_speech, "10ms.wav", [*INPUT, SPEECH, "-t", 0.01], "10 ms"),
    (data.read_speech, "no_audio.mp4", clock(), "no audio track"),
    (data.read_speech, "riff.wav", b"RIFF", "not audio or video"),
    (data.read_speech, "empty.wav", b"", "is empty"),
    (data.read_speech, "missing.wav", None, "does not exist"),
    (clip, "sound.mp4", [*INPUT, SPEECH], "no video track"),
    (clip, "short.mp4", [*clock(seconds=0.2), *INPUT, SPEECH, "-t", 0.2], "a clip needs 25"),
    (decode, "nowhere", None, "is not there")])
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(tmp_path, load, name, made_of, words):
    path = tmp_path / name
    if isinstance(made_of, bytes):
        path.write_bytes(made_of)
    elif isinstance(made_of, tuple):
        Image.new("1", made_of).save(path)
    elif made_of:
        ffmpeg(*made_of, path)
    with pytest.raises(MediaError) as caught:
        load(path)
    message = str(caught.value)
    assert words in message and message.startswith(str(path)) and "\n" not in message


# ---- Videos -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, fps, extra", [
    ("a.mkv", "24000/1001", []),
    ("vfr.mp4", "25", ["-vf", "select='not(mod(n,3))+lt(n,20)+eq(n,74)'", "-fps_mode", "vfr"]),
    ("anamorphic.mp4", "25", ["-vf", "scale=64:96,setsar=2"])])    # pixels twice as wide as high
def test_frame_f_shows_the_time_f_over_25_whatever_the_file_s_rate(tmp_path, name, fps, extra):
    """75 frames; the clock reads f / 25 s to within a frame of the source, once its bar is in the square."""
    shown = clip(make_video(tmp_path / name, *extra, fps=fps))
    assert shown.frames.shape == (75, 3, 32, 32) and shown.frames.dtype == torch.uint8
    assert shown.audio.shape == (75 * 640,) and shown.audio.dtype == torch.float32
    inside = slice(12, 63)                                         # the square shows 1/8 to 7/8 of the width
    error = time_shown(shown.frames)[inside] - torch.arange(75)[inside] / 25
    frame = 0.12 if name == "vfr.mp4" else 0.06                    # vfr keeps every third frame
    assert error.abs().max() < frame + 0.01 and error.mean().abs() < frame / 2


@pytest.mark.parametrize("trim, frames, silent", [
    ("start=1", 50, slice(0, 15500)), ("end=1.88", 50, slice(-640, None)), ("end=1.6", 40, slice(0))])
def test_missing_sound_is_padded_if_it_starts_late_or_lacks_little_and_else_cuts_the_picture(
        tmp_path, trim, frames, silent):
    """Two seconds of picture: sound that starts late stays in time, up to five frames may lack at its end."""
    got = clip(make_video(tmp_path / "a.mkv", "-af", f"atrim={trim}", "-c:a", "pcm_s16le", seconds=2))
    assert len(got.frames) == frames and len(got.audio) == frames * 640
    assert not got.audio[silent].abs().gt(0.01).any() and got.audio[16500:25600].abs().max() > 0.1


SHOWN = np.array([(224, 172, 140), (220, 40, 40), (128, 128, 128), (255, 255, 255)])       # skin, lips, greys
WIDE = np.array([[.6274, .3293, .0433], [.0691, .9195, .0114], [.0164, .0880, .8956]])     # BT.709 to BT.2020


def stored(transfer: str) -> np.ndarray:
    """SHOWN as a file stores them, (4, 3) in [0, 1]: white is 203 cd/m2 where range is high (BT.2408)."""
    if transfer == "bt709":
        return SHOWN / 255
    nits = 203 * (SHOWN / 255) ** 2.4 @ WIDE.T
    if transfer == "smpte2084":
        y = (nits / 10000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    scene = nits / 1000 / (nits / 1000 @ [0.2627, 0.678, 0.0593])[:, None] ** (0.2 / 1.2)
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene),
                    0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073)


@pytest.mark.parametrize("matrix, tags, extent, width", [
    ("bt709", ("bt709", "bt709"), "pc", 320),
    ("bt709", None, "tv", 1280), ("bt601", None, "tv", 320),
    ("bt2020nc", ("bt2020", "smpte2084"), "tv", 320), ("bt2020nc", ("bt2020", "arib-std-b67"), "tv", 320)])
def test_a_video_shows_its_colours_in_srgb(tmp_path, matrix, tags, extent, width):
    """Full and limited range, untagged large and small pictures, PQ and HLG of wide gamut: within 8."""
    height = width * 9 // 16
    stripes = np.repeat(stored(tags[1] if tags else "bt709")[None], width // 4, 1).repeat(height, 0)
    primaries, transfer, *rest = (*tags, matrix, extent) if tags else ["unknown"] * 4
    params = f"color_primaries={primaries}:color_trc={transfer}:colorspace={rest[0]}:range={rest[1]}"
    ffmpeg("-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", f"{width}x{height}", "-r", "25", "-i", "-",
           "-f", "lavfi", "-i", SPEECH, "-shortest",
           "-vf", f"scale=out_color_matrix={matrix}:out_range={extent},format=yuv444p10le,setparams={params}",
           "-c:v", "libx264", "-crf", "8", "-preset", "ultrafast", tmp_path / "a.mp4",
           given=(stripes * 65535).round().astype("<u2").tobytes() * 25)
    frame = data.load_clip(tmp_path / "a.mp4", 90, crop=(0, 0, height)).frames[5].float()    # (3, 90, 90)
    step = 90 * width // 4 // height                         # a stripe in it; the first two are whole
    for i in (0, 1):
        assert (frame[:, 45, i * step + step // 2] - torch.tensor(SHOWN[i])).abs().max() <= 8


def test_an_interlaced_video_has_no_combs(tmp_path):
    """A bar that moves 4 pixels a field has, in a frame, the same edge in rows that are neighbours."""
    bar = "color=black:s=128x96:r=50:d=2,geq=lum='if(lt(X,mod(200*T,128)),200,30)':cb=128:cr=128,tinterlace=4"
    ffmpeg("-f", "lavfi", "-i", bar, "-f", "lavfi", "-i", SPEECH, "-t", 2, "-flags", "+ilme+ildct",
           tmp_path / "a.mp4")
    frames = data.load_clip(tmp_path / "a.mp4", 96).frames[5:30, 0].float()          # (25, 96, 96)
    assert (frames[:, 2:-2] - frames[:, 3:-1]).abs().mean() < 1.5     # 7 as it is stored


# ---- Folders of video, and their cache ----------------------------------------------------------------

def test_a_crop_is_the_pixels_named_and_what_lacks_them_is_skipped_with_the_reason(tmp_path, capsys):
    """A white box at x, y, side with a black core fills the crop. The cache answers with the same lines, and
    with the same clips whatever was written to them in memory, until a file changes."""
    box = "drawbox=x=40:y=10:w=48:h=48:c=white:t=fill,drawbox=x=52:y=22:w=24:h=24:c=black:t=fill"
    make_video(tmp_path / "box.mp4", "-vf", box, seconds=1.2)
    make_video(tmp_path / "small.mp4", "-vf", "scale=64:48", seconds=1.2)
    make_video(tmp_path / "blank.mp4", "-vf", "drawbox=c=gray:t=fill:enable='lt(n,5)'", seconds=1.2)
    (tmp_path / "notes.txt").write_text("not even named like a video")
    (tmp_path / "._box.mp4").write_text("a Finder leftover")
    for _ in range(2):
        train, held_out = decode(tmp_path, crop=(40, 10, 48))
        train[0].frames.zero_()
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("skipped blank.mp4#0: begins with an empty picture")
        assert said[1].startswith("skipped small.mp4: is smaller than the crop")
        assert said[2].endswith("1 files kept (0 held out), 1 clips")
    assert train.names == ["box.mp4#0"] and len(held_out) == 0
    frame = train[0].frames[0].float()                             # (3, 16, 16): 48 pixels became 16
    assert frame[:, 5:11, 5:11].max() < 25 and frame[:, [0, 0, -1, -1], [0, -1, 0, -1]].min() > 230
    assert train[:1].names == train.names and decode(tmp_path, crop=(40, 10, 48))[0].folder == train.folder
    os.utime(tmp_path / "box.mp4", (1, 1))
    assert decode(tmp_path, crop=(40, 10, 48))[0].folder != train.folder


def test_one_long_video_is_cut_without_a_gap_and_its_end_is_held_out(tmp_path, capsys):
    """Eleven seconds: the last two clips, a tenth rounded up, are held out; of a long and a short file, not
    the long. Cut by 1.24 s, the clock runs on, and a rest below a second is dropped."""
    make_video(tmp_path / "talk.mp4", seconds=11, sound=SPEECH.replace("d=3", "d=11"))
    train, held_out = decode(tmp_path, seconds=1.0)
    assert train.names + held_out.names == [f"talk.mp4#{i}" for i in range(11)] and len(held_out) == 2
    assert "the last 2 clips of talk.mp4" in capsys.readouterr().out
    for sources in (["a"] * 20 + ["b"], ["b"] * 20 + ["a"]):
        assert data._split(sources)[0] in ({18, 19}, {17, 18, 19}, {20})
    train, held_out = decode(tmp_path, seconds=1.24)               # 8 clips of 31 frames, 27 are left
    assert train.lengths + held_out.lengths == [31] * 8 + [27] and len(train[1].audio) == 31 * 640
    assert time_shown(train[1].frames)[0] == pytest.approx(31 / 25, abs=0.065)


def test_what_is_too_short_is_named_and_no_held_out_clip_is(tmp_path, capsys):
    """Whichever file a hash would hold out, with a window of 1.9 s it is one of the two long enough."""
    for name, seconds in (("a.mp4", 2), ("b.mp4", 1.2), ("c.mp4", 1.2), ("d.mp4", 2)):
        make_video(tmp_path / name, seconds=seconds)
    train, held_out = decode(tmp_path, frames=48)
    assert {*train.names, *held_out.names} == {"a.mp4#0", "d.mp4#0"} and len(held_out) == 1
    assert "2 clips are shorter than 1.92 s and left out: b.mp4#0, c.mp4#0" in capsys.readouterr().out
    with pytest.raises(MediaError, match="no clip of 4.00 s"):
        decode(tmp_path, frames=100)


def test_links_are_followed_once_odd_names_are_names_and_runs_are_left_out(tmp_path, capsys, monkeypatch):
    """A loop ends, a second way to a file gives no second clip, a generated sample is no training clip."""
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
    train, held_out = decode("12:30")
    assert sorted(train.names + held_out.names) == ["-dash.mp4#0", "a: b 50%d.MP4#0", "caf\\xe9.mp4#0",
                                                    "far/linked.mp4#0"]
    said = capsys.readouterr().out
    assert "skipped run: is the folder of a run" in said
    assert "skipped broken.mp4: cannot be read (no such file" in said


def test_adding_files_never_moves_one_from_training_to_held_out():
    """A folder grows by one: held-out files stay, but for stand-ins while less than two are below 10%."""
    names = [f"clip{i}.mp4" for i in range(300)]
    before = data._held_out(names[:4])
    for n in range(5, 301):
        now = data._held_out(names[:n])
        assert 2 <= len(now) <= n / 2 and now - before <= {names[n - 1]}      # only the newcomer may enter
        assert before <= now or len(before) == 2
        before = now
    assert 15 <= len(before) <= 45 and data._held_out(["one.mp4"]) == set()


def test_a_cache_is_built_once_and_whole_or_not_at_all(tmp_path, monkeypatch):
    """Of two runs at once both get the same; what fails, or was killed a day ago, leaves nothing."""
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path))
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        if len(built) == 1:
            data.cached({"size": 1}, build)              # another run, which finishes first
        (folder / "clip").write_text("whole")

    def fill(folder: Path) -> None:
        raise SafetensorError("I/O error: No space left on device")

    alive, dead = tmp_path / "tmp-a", tmp_path / "tmp-b"
    alive.mkdir()
    dead.mkdir()
    os.utime(dead, (0, time.time() - 25 * 3600))
    one = data.cached({"size": 1}, build)
    assert len(built) == 2 and data.cached({"size": 1}, build) == one and len(built) == 2
    two = data.cached({"size": 2}, build)
    for root, wrong in ((one / "clip", build), (tmp_path, fill)):
        monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(root))
        with pytest.raises(MediaError, match="cache cannot be written"):
            data.cached({}, wrong)
    assert set(tmp_path.iterdir()) == {alive, one, two} and (one / "clip").read_text() == "whole"


# ---- Portraits ----------------------------------------------------------------------------------------

def colours(width: int = 80, height: int = 60) -> np.ndarray:
    """(H, W, 3): smooth, and different in every corner and channel."""
    y, x = np.mgrid[0:height, 0:width]
    down, across = y * 255 / (height - 1), x * 255 / (width - 1)
    return np.stack([across, down, 255 - across], -1).astype(np.uint8)


def test_a_portrait_is_the_centre_square_or_the_crop_named_and_no_grey_is_cut_off(tmp_path):
    """To the bit in 8 bits; greys of 16 and of 32 bits have all of their range."""
    Image.fromarray(colours()).save(path := tmp_path / "a.png")
    for crop, want in ((None, colours()[:, 10:70]), ((30, 15, 40), colours()[15:55, 30:70])):
        assert torch.equal(data.load_portrait(path, len(want), crop), torch.from_numpy(want).permute(2, 0, 1))
    with pytest.raises(MediaError, match="leaves the picture of 80x60"):
        data.load_portrait(path, 40, crop=(50, 15, 40))
    ramp = np.tile(np.linspace(0, 255, 64), (64, 1))
    for kind, full in ((np.uint16, 65535), (np.int32, 65535), (np.float32, 1)):
        Image.fromarray((ramp * (full / 255)).astype(kind)).save(tmp_path / "a.tiff")
        grey = data.load_portrait(tmp_path / "a.tiff", 64).float().mean((0, 1))
        assert (grey - torch.from_numpy(ramp[0])).abs().max() < 6, kind


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")   # red is green


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_a_photo_is_brought_to_srgb_by_a_profile_that_fits_it(tmp_path, mode):
    """220, 40, 90 are other colours in other primaries; a profile that is broken or for other channels is
    none. What is transparent is white."""
    photo = Image.new("RGB", (64, 64), (220, 40, 90)).convert(mode)
    for profile, shown in (SWAPPED, (40, 220, 90)), (b"no profile", (220, 40, 90)), (LAB, (220, 40, 90)):
        if mode == "RGBA":
            photo.putalpha(0)
            shown = 255, 255, 255
        photo.save(tmp_path / "a.png", icc_profile=profile)
        got = data.load_portrait(tmp_path / "a.png", 32)[:, 5, 5]
        assert (got - torch.tensor(shown)).abs().max() <= 2, profile[:8]


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_huge_photo_is_upright_and_scaled_down_while_it_is_read(tmp_path, orientation):
    """A crop of a JPEG of 25 megapixels is the same place as in the scene, and as in a hundredth of that.
    Orientation 6 says: stored lying, show turned clockwise by 90 degrees."""
    exif, scene = Image.Exif(), Image.fromarray(colours(600, 420))
    exif[0x0112] = orientation
    upright = scene.rotate(-90, expand=True) if orientation == 6 else scene
    want = torch.from_numpy(np.array(upright.resize((60, 60), box=(100, 200, 280, 380)))).permute(2, 0, 1)
    for times in (1, 10):
        scene.resize((600 * times, 420 * times)).save(tmp_path / "a.jpg", exif=exif, quality=95)
        got = data.load_portrait(tmp_path / "a.jpg", 60, (100 * times, 200 * times, 180 * times))
        assert (got.float() - want).abs().mean() < 3


# ---- Speech -------------------------------------------------------------------------------------------

AT = torch.arange(80000)
CLAP = torch.exp(-(AT - 40000) / 300) * torch.randn(80000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spoilt", [torch.where((AT >= 40000) & (AT < 41600), CLAP.clamp(-1, 1), 0),
                                    0.3 + 0 * AT, 0.9 * (AT // 10 == 4100)], ids=["clap", "offset", "knock"])
def test_what_is_no_speech_does_not_change_its_loudness(spoilt):
    """44 dB above the speech and with an echo; inaudible; a click of ten samples. Speech has an rms of 0.1
    over what is louder than -40 dB of its peak."""
    speech = 0.006 * torch.sin(AT / 10) * torch.sin(AT / 2500).abs()
    got, want = normalise_loudness(speech + spoilt), normalise_loudness(speech)
    assert got.abs().max() <= 1 and 0.8 < got[:38000].std() / want[:38000].std() < 1.25
    active = want[want.abs() > 0.01 * want.abs().max()]
    assert active.square().mean().sqrt() == pytest.approx(0.1, rel=0.02)
    with pytest.raises(MediaError, match="silent"):
        normalise_loudness(0.3 + 0 * speech)


@pytest.mark.parametrize("sounds, merge, number, channel", [
    ([SPEECH], True, 1, 0), ([SILENCE, SPEECH], False, 2, 0), ([HUM, SPEECH], False, 2, 0),
    ([SPEECH, SPEECH], False, 1, 0), ([SPEECH, SPEECH.replace("0.3*", "-0.3*")], True, 1, 1),
    ([SILENCE] * 11 + [SPEECH], True, 1, 12)])
def test_the_track_and_the_channel_with_speech_are_heard(tmp_path, sounds, merge, number, channel):
    """A desktop's track before the microphone's, an inverted channel, one that speaks of twelve."""
    heard, track = data.read_speech(mixed(tmp_path / "a.mkv", *sounds, merge=merge))
    assert (track.number, track.channel) == (number, channel)
    assert ("hears" in track.note()) == (len(sounds) > 1)
    alone = data.read_speech(mixed(tmp_path / "b.wav", SPEECH, merge=True))[0]
    assert np.corrcoef(heard[:47000], alone[:47000])[0, 1] > 0.99


def test_log_mel_equals_the_definition_written_as_loops_in_batches_and_in_pieces():
    """log(mel + floor) of a Hann-windowed DFT in float64; only torchaudio's filter bank is shared. Frames 390
    to 410 lie on either side of a piece's end; audio that ends early goes on in zeros."""
    assert data.LATENCY == 1280 / 16000
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
    audio = torch.randn(2, 890 * 640) * 0.1
    whole, lazy = data.log_mel(audio, 900), data.LogMel(audio[1], 900)
    assert whole.shape == (2, 900, data.MEL_DIM) and lazy.shape == (1, 900, data.MEL_DIM)
    assert torch.equal(whole, data.log_mel(torch.cat([audio, torch.zeros(2, 20000)], 1), 900))
    alone = data.log_mel(audio[1, 380 * 640 : 420 * 640], 40)
    torch.testing.assert_close(whole[1, 390:410], alone[10:30], atol=1e-4, rtol=0)
    torch.testing.assert_close(lazy[:, 396:404], whole[1:, 396:404], atol=1e-4, rtol=0)


# ---- Writing video ------------------------------------------------------------------------------------

def test_the_video_has_every_frame_and_all_of_the_sound_as_browsers_play_them(tmp_path):
    """ceil(T / 640) frames of an odd size in; as many out, in order, and red stays red; the sound as long as
    it was to within one frame. H.264 4:2:0 with AAC, the index in front, a stated colour matrix."""
    shade = torch.arange(26) * 3 + 20
    colour = torch.stack([shade, 240 - shade, 60 + 0 * shade], 1)
    frames = colour.to(torch.uint8)[:, :, None, None].expand(-1, 3, 33, 47)
    audio = 0.3 * torch.sin(torch.arange(16001) / 10)
    path = tmp_path / "a.mp4"
    data.write_video(path, iter(frames), audio)
    out = pixels(path)
    assert out.shape == (26, 34, 48, 3) and np.abs(out.mean((1, 2)) - colour.numpy()).max() < 3
    assert all(words in streams(path) for words in ("h264", "yuv420p(tv, bt709", "aac (LC)"))
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")
    heard = np.frombuffer(ffmpeg("-i", path, "-map", "0:a", "-ar", 16000, "-f", "f32le", "-"), np.float32)
    assert abs(len(heard) - 16001) <= 640
    overlap = min(len(heard), 16001)
    assert np.corrcoef(heard[:overlap], audio[:overlap])[0, 1] > 0.95        # 4 samples late would read 0.9
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name, arguments, seconds, kept", [
    ("a.wav", ["-ac", 2, "-ar", 44100], None, r"aac \(LC\).*44100 Hz, stereo"),
    ("a.mp3", ["-ac", 2, "-ar", 44100], None, "mp3.*44100 Hz, stereo"),
    ("a.mp3", ["-ac", 2], 1.5, r"aac \(LC\).*48000 Hz, stereo"),
    ("a.wav", ["-ar", 8000], None, "aac.*48000 Hz, mono"),
    ("a.mka", ["-af", "atrim=start=1"], None, "aac.*48000 Hz, mono"),
    ("a.wav", ["-af", "pan=12c|c11=c0"], None, "aac.*48000 Hz, mono")])
def test_the_video_carries_the_sound_that_was_given(tmp_path, name, arguments, seconds, kept):
    """At its own rate and with its channels, in time, as long as the video: a copy where browsers play it."""
    ffmpeg("-f", "lavfi", "-i", SPEECH, *arguments, tmp_path / name)
    speech, track = data.read_speech(tmp_path / name, seconds)
    assert seconds is None or len(speech) == seconds * 16000
    n_frames = -(-len(speech) // 640)
    data.write_video(tmp_path / "a.mp4", torch.zeros(n_frames, 3, 32, 32, dtype=torch.uint8), track)
    assert re.search(kept, streams(tmp_path / "a.mp4"))
    heard = data.read_speech(tmp_path / "a.mp4")[0]
    assert abs(len(heard) - len(speech)) <= 640 and len(pixels(tmp_path / "a.mp4")) == n_frames
    overlap = min(len(heard), len(speech))
    assert np.corrcoef(heard[:overlap], speech[:overlap])[0, 1] > 0.95


def test_what_cannot_be_written_is_refused_before_the_first_frame_and_an_error_leaves_the_old_file(tmp_path):
    """The name changes hands only when the new file is whole."""
    def frames():
        yield torch.zeros(3, 64, 64, dtype=torch.uint8)
        raise RuntimeError("generator failed")

    for path in tmp_path, tmp_path / "no" / "a.mp4":
        with pytest.raises(MediaError, match="cannot be written.*(choose a name|make its folder)"):
            data.write_video(path, frames(), torch.zeros(1280))
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(RuntimeError, match="generator failed"):
        data.write_video(tmp_path / "a.mp4", frames(), torch.zeros(6400))
    with pytest.raises(MediaError, match="no frame"):
        data.write_video(tmp_path / "a.mp4", iter([]), torch.zeros(6400))
    assert (tmp_path / "a.mp4").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_track_is_not_copied_but_carried_so_that_players_do_not_stop(tmp_path):
    """A piece is cut out of a file. The video that carries what was heard decodes without a complaint."""
    ffmpeg("-f", "lavfi", "-i", SPEECH, path := tmp_path / "a.mp3")
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + whole[middle + 1234 :])
    speech, track = data.read_speech(path)
    frames = torch.zeros(-(-len(speech) // 640), 3, 32, 32, dtype=torch.uint8)
    data.write_video(tmp_path / "out.mp4", frames, track)
    check = [FFMPEG, "-v", "error", "-i", tmp_path / "out.mp4", "-f", "null", "-"]
    assert not subprocess.run(check, capture_output=True).stderr


def test_a_cache_that_is_damaged_is_named(tmp_path, monkeypatch):
    """By a power cut, say."""
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path))
    folder = synthetic_clips(1, 16, 0.4).folder
    for name in "0.safetensors", "index.json":
        (folder / name).write_bytes(b"")
        with pytest.raises(MediaError, match=f"{folder.name}: is a damaged cache .*; delete this folder"):
            data.Clips(folder)[0]
