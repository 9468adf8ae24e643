"""What sample.py's command line promises: the sound that was given comes out, and nothing given is harmed."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import imageio_ffmpeg
import pytest
from PIL import Image

import data
import sample
from model import Config, Generator, save_generator
from tiny import CONFIG

ROOT = Path(__file__).resolve().parents[1]
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
ASCII = {"PYTHONIOENCODING": "ascii"}
SPEECH = "aevalsrc='0.3*sin(2*PI*220*t)*abs(sin(2*PI*2*t))':s=48000:d=1.3"


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """A generator of random weights, a portrait, and speech in the second track, beside a silent one."""
    folder = tmp_path_factory.mktemp("given")
    save_generator(Generator(Config(**CONFIG)), folder / "run")
    Image.linear_gradient("L").convert("RGB").save(folder / "face.png")
    subprocess.run([FFMPEG, "-v", "error", "-f", "lavfi", "-i", "anullsrc=d=1.3", "-f", "lavfi", "-i", SPEECH,
                    "-map", "0", "-map", "1", "-ac", "2", "-c:a", "flac", folder / "speech.mkv"], check=True)
    names = {"--checkpoint": "run", "--image": "face.png", "--audio": "speech.mkv"}
    return {flag: str(folder / name) for flag, name in names.items()}


def command(given: dict[str, str], *more: str) -> list[str]:
    return [word for pair in given.items() for word in pair] + ["--steps", "1", *more]


@pytest.mark.parametrize("out", ["A.MP4", "12:30/-50%d.mp4"])
def test_any_name_is_written_with_the_sound_that_was_chosen(given, out, tmp_path, monkeypatch, capsys):
    """The track with speech, as it was: FLAC, stereo. A message names it, and the flag for another."""
    monkeypatch.chdir(tmp_path)
    Path(out).parent.mkdir(exist_ok=True)
    sample.main(command(given, f"--out={out}"))
    assert "hears sound track 2 of 2; --track TRACK[:CHANNEL] chooses another" in capsys.readouterr().out
    streams = subprocess.run([FFMPEG, "-i", f"file:{out}"], capture_output=True, text=True).stderr
    assert re.search("flac.*48000 Hz, stereo", streams)
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / out))[0] == 33


@pytest.mark.parametrize("flag", ["--image", "--audio"])
def test_what_is_read_is_never_overwritten_not_even_by_a_link(given, flag, tmp_path):
    (copy := tmp_path / "source").write_bytes(Path(given[flag]).read_bytes())
    (tmp_path / "link.mp4").symlink_to(copy)
    with pytest.raises(data.MediaError, match="would be overwritten"):
        sample.main(command(given | {flag: str(copy)}, "--out", f"{tmp_path}/link.mp4"))
    assert (tmp_path / "link.mp4").is_symlink() and copy.read_bytes() == Path(given[flag]).read_bytes()


@pytest.mark.parametrize("flags, words", [
    ("--track 1", "is silent"), ("--track 3", "track 1 with 2 channels, track 2 with 2 channels"),
    ("--out no/a.mp4", "in none that can be written"), ("--crop 1,2", "x,y,size")])
def test_what_cannot_be_done_is_said_and_leaves_nothing(given, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((data.MediaError, OSError, SystemExit)) as caught:
        sample.main(command(given, "--out", "a.mp4", *flags.split()))
    assert words.lower() in f"{caught.value} {capsys.readouterr().err}".lower()
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_line_and_any_sign_is_spelled_out_in_any_encoding(given, tmp_path):
    """On a terminal that knows only ASCII, with a name that is no UTF-8 among the arguments."""
    odd = os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.mkv")
    Path(odd).write_bytes(Path(given["--audio"]).read_bytes())
    code = ("import sample, sys\nfrom extras.files import one_line\n"
            "with one_line('', ''):\n    print('0.1±0.2')\n    sample.main(sys.argv[1:])")
    arguments = command(given | {"--audio": odd}, "--out", str(tmp_path / "a.mp4"), "--track", "1")
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | ASCII,
                          capture_output=True)
    assert done.returncode and done.stdout.strip() == rb"0.1\xb10.2"
    assert done.stderr.count(b"\n") == 1 and rb"caf\udce9.mkv: is silent" in done.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_sigterm_leaves_nothing_behind(given, tmp_path):
    """Ten minutes of speech are on their way into a video."""
    subprocess.run([FFMPEG, "-v", "error", "-f", "lavfi", "-i", SPEECH.replace("d=1.3", "d=600"),
                    tmp_path / "long.wav"], check=True)
    arguments = command(given | {"--audio": str(tmp_path / "long.wav")}, "--out", str(tmp_path / "a.mp4"))
    process = subprocess.Popen([sys.executable, "sample.py", *arguments], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True)
    while not [*tmp_path.glob(".writing-*/video.mp4")]:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.communicate(timeout=60)[1].rstrip().endswith("stopped; nothing was written")
    assert process.returncode == 1 and [path.name for path in tmp_path.iterdir()] == ["long.wav"]
