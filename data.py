"""Portraits, speech and video clips: everything that enters or leaves the generator.

1. Media in. ffmpeg turns any video or sound into 25 RGB frames and 16,000 mono samples a second: a frame is exactly
   640 samples.
2. Sound as the generator hears it: log-mel energies of a frame's own 40 ms, of 40 ms before and of 80 ms after. Those
   80 ms are the *latency* of the whole system: a speaker's lips round before the vowel is heard. Or the features of a
   frozen speech encoder, which hears the whole speech before the first frame: no latency to speak of, no streaming.
3. Clips on disk. A folder of videos is decoded once into a cache; clips are mapped from it when they are used.
4. Media out: an H.264 + AAC mp4, frame for frame, sample for sample.

Every file that cannot be used raises `MediaError`: one line that names the file, what is wrong and what to do.
"""

import base64
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as nnf
import torchaudio
from PIL import Image, ImageCms, ImageOps
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

FPS = 25                                             # frames a second, everywhere
SAMPLE_RATE = 16_000                                 # samples a second, everywhere
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS               # 640: 40 ms
ACTIVE_RMS = 0.1                                     # loudness of speech, pauses left out; full scale is 1
SILENCE_PEAK = 1e-3                                  # -60 dB of full scale: nothing louder is silence
KNOCK, BLOCK = 10, 320                               # a clap is loud in ten of such blocks of 20 ms at most
CLEARLY = 3.0                                        # 10 dB: so much more speech has the better channel
AUDIO_SLACK = 5                                      # frames of sound a clip may lack (GRID: 75 frames, 2.98 s)

PIECE = 16 * FPS                                     # frames of long sound that are worked on at once
HOP = 160                                            # 10 ms between spectra: four hops make a frame
WINDOW = 400                                         # 25 ms under each spectrum, the usual choice for speech
MELS = 32
LOOK_BACK, LOOK_AHEAD = 4, 8                         # hops before and after a frame's own four: 40 and 80 ms
MEL_DIM = (LOOK_BACK + 4 + LOOK_AHEAD) * MELS        # 512
LATENCY = LOOK_AHEAD * HOP / SAMPLE_RATE             # 0.08 s of future sound that a frame waits for
LOG_FLOOR = 1e-3                                     # mel power below this is room noise at ACTIVE_RMS
LOG_MEAN, LOG_STD = -4.1, 3.3                        # of log(mel + LOG_FLOOR), GRID and synthetic talkers mixed

KINDS = "mp4, mov, mkv, webm, avi, mpg, mpeg, m4v"   # of video files, by suffix
LARGEST_PICTURE = 100e6                              # pixels that are decoded: 400 MB
MIN_FRAMES = FPS                                     # a clip lasts at least a second
BLANK_STD = 4.0                                      # of 255: 11 of 900 GRID clips start as a plain grey field
HELD_OUT = 0.1                                       # share of the files that training never sees
CACHE_VERSION = 5                                    # raise it when the decoding below changes its result


class MediaError(ValueError):
    """A file that cannot be used: `MediaError(path, "what is wrong; what to do")`, printed as one line."""

    def __str__(self) -> str:
        return ": ".join(str(part) for part in self.args)


def first_line(error: Exception) -> str:
    """The first line of what an error says, for messages of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def fitting(what: str, remedy: str) -> Iterator[None]:
    """Turn a lack of memory, the machine's or the GPU's, into a MediaError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:     # PyTorch's own for the CPU has no class
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "t allocate memory" not in str(error):
            raise
        raise MediaError(what, f"does not fit into memory; {remedy}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn whatever a full disk or a forbidden place raises into a MediaError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:        # PyTorch and safetensors have their own
        reason = getattr(error, "strerror", None) or f"is the disk full? {first_line(error)}"
        raise MediaError(path, f"cannot be written ({reason}); make room there or choose another place") from None


@contextmanager
def one_line(stopped: str, smaller: str) -> Iterator[None]:
    """Run a command that, where it cannot go on, ends with one line and a failing exit.

    Args:    stopped: what to say after Ctrl-C; smaller: what to do where memory does not suffice.
    """
    number = os.environ.get("RANK", "0")             # of the process, under torchrun
    with suppress(AttributeError):                   # names and signs that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with fitting("this", smaller):
            yield
    except (MediaError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        sys.exit(f"error{f' of process {number}' if number != '0' else ''}: {' '.join(said.split())}")
    except KeyboardInterrupt:
        sys.exit(stopped)


@dataclass
class Clip:
    """A talking portrait."""

    name: str                                        # where it came from
    frames: Tensor                                   # (F, 3, S, S) uint8 RGB; frames[0] is the portrait
    audio: Tensor                                    # (F * 640,) float32 at 16 kHz
    truth: dict[str, Tensor] | None = None           # {name: (F, ...) or per clip}, known only of synthetic talkers


def pixels(clips: Sequence[Clip], frames: int) -> Tensor:
    """Stack the first frames of clips: (B, F, 3, S, S) in [0, 1]."""
    return torch.stack([clip.frames[:frames] for clip in clips]) / 255


def sounds(clips: Sequence[Clip], frames: int) -> Tensor:
    """Stack the sound of the first frames of clips: (B, F * 640)."""
    return torch.stack([clip.audio[:frames * SAMPLES_PER_FRAME] for clip in clips])


def with_interval(values: Tensor) -> str:
    """Write the mean of (B,) values ± its 95% confidence interval, nan of a single value."""
    half = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean().item():.3f}±{half:.3f}"


# ---- Reading media ---------------------------------------------------------------------------------------------------

FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-y", "-v"]
FFMPEG_WORDS = {                                     # what ffmpeg says -> what it means
    "'0:V:0'": "has no video track; use a file with a picture",
    "non positive size": "is smaller than the crop; choose x,y,size inside the picture",
    "no decoder found": "is in a format that ffmpeg cannot decode; convert it",
    "out_primaries": "needs a newer ffmpeg for its colours; pip install -U imageio-ffmpeg",
    "Invalid data found": "is not audio or video, or is cut off; convert it or copy it again",
}
# Both streams count from the file's common zero: a track that starts late is padded (the picture with its first frame,
# the sound with silence) and gaps in the sound are filled, so lips and sound stay together.
IN_TIME = "aresample=async=1:first_pts=0"


def _ffmpeg(path: Path, *arguments: str) -> str:
    """Run ffmpeg on one input, without arguments only to list its streams. Returns: what it says.
    Raises: MediaError with plain words."""
    if not path.is_file() or not path.stat().st_size:
        state = "is a folder" if path.is_dir() else "is empty" if path.exists() else "does not exist"
        raise MediaError(path, f"{state}; name a file with sound or a picture")
    level = "error" if arguments else "info"
    done = subprocess.run([*FFMPEG, level, "-i", f"file:{path}", *arguments], capture_output=True)
    said = done.stderr.decode(errors="replace").strip() or "ffmpeg failed"
    if done.returncode and (arguments or "Input #0" not in said):
        if (full := os.strerror(errno.ENOSPC)) in said:              # no fault of the file
            raise OSError(errno.ENOSPC, full, str(path))
        last_resort = f"is damaged ({said.splitlines()[0].split('] ')[-1]}); convert it or copy it again"
        raise MediaError(path, next((words for sign, words in FFMPEG_WORDS.items() if sign in said), last_resort))
    return said


@dataclass(frozen=True)
class Track:
    """A sound track of a file, and what of it is heard."""

    path: Path
    stream: int                                      # among the streams of the file, from 0
    number: int                                      # among its sound tracks, from 1
    codec: str
    rate: int                                        # Hz
    channels: int = 1
    channel: int = 0                                 # the one that is heard, from 1; 0: the mean of all
    tracks: int = 1                                  # of the file
    seconds: float | None = None                     # of its start that are used, if not all

    def note(self) -> str:
        """Say what is heard, where that is not all there is."""
        channel = f"channel {self.channel} of {self.channels}" if self.channel else ""
        track = f"sound track {self.number} of {self.tracks}" if self.tracks > 1 else ""
        return f"hears {' of '.join(filter(None, (channel, track)))}" if channel or track else ""


def _tracks(path: Path, streams: str) -> list[Track]:
    """List the sound tracks that can be decoded, the default ones first. Raises: MediaError if there is none."""
    found = re.findall(r"^ *Stream #0:(\d+)[^:]*: Audio: (\w+)(?:.*, (\d+) Hz, (?!0 ch))?(.*)", streams, re.M)
    tracks = {Track(path, int(stream), number, codec, int(rate), tracks=len(found)): "(default)" in rest
              for number, (stream, codec, rate, rest) in enumerate(found, 1) if codec != "none" and rate}
    if not tracks:
        raise MediaError(path, "has no audio track; use a file with sound")
    return sorted(tracks, key=tracks.get, reverse=True)


def _decoding(tracks: list[Track], part: Path, *limit: str) -> list[str]:
    """Arguments for ffmpeg: decode tracks at 16 kHz into part.NUMBER.au, which tells its number of channels."""
    return [word for track in tracks for word in (
        *limit, "-map", f"0:{track.stream}", "-af", IN_TIME, "-ar", str(SAMPLE_RATE), "-c:a", "pcm_f32be",
        "-f", "au", f"file:{part}.{track.number}.au")]


def _swell(sound: np.ndarray) -> np.ndarray:
    """Measure how far loudness rises and falls, as it does in speech and hardly in hum, noise or silence.

    Args: sound (T, C). Returns: (1 + C,), the deviation of the rms of 40 ms: of all channels' mean, and of each.
    """
    whole = len(sound) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
    frames = sound[:whole].reshape(-1, SAMPLES_PER_FRAME, sound.shape[1])            # (F, 640, C)
    loudness = [np.concatenate([piece.mean(2, keepdims=True), piece], 2).std(1)
                for piece in (frames[at : at + PIECE] for at in range(0, len(frames), PIECE))]
    return np.nan_to_num(np.concatenate(loudness).std(0)) if loudness else np.zeros(1 + sound.shape[1])


def _hear(tracks: list[Track], part: Path, choice: tuple[int, int] | None = None) -> tuple[Tensor, Track]:
    """Choose what has speech in it of decoded tracks.

    That is the mean of all channels of the default track, if not another track or a single channel has clearly
    more: inverted channels cancel out, and of twelve perhaps one has a microphone.

    Args:    choice: (track, channel or 0), each from 1.
    Returns: (T,) at one loudness, mapped from part.f32, and where it is from.
    """
    sounds = {}
    for track in tracks:
        with open(f"{part}.{track.number}.au", "rb") as file:
            start, channels = np.frombuffer(file.read(24), ">u4")[[1, 5]].tolist()
            length = (file.seek(0, os.SEEK_END) - start) // (4 * channels)
            shape = length, channels
            sounds[track.number] = np.memmap(file, ">f4", "r", start, shape) if length else np.zeros(shape)
    swells = {number: _swell(sound) for number, sound in sounds.items()}
    number, channel = choice or (max(swells, key=lambda n: swells[n].max()), 0)
    if not choice and swells[number].max() <= CLEARLY * swells[tracks[0].number].max():
        number = tracks[0].number
    if number not in sounds or channel > sounds[number].shape[1]:
        has = ", ".join(f"track {n} with {sound.shape[1]} channels" for n, sound in sorted(sounds.items()))
        raise MediaError(tracks[0].path, f"has no such sound; choose --track TRACK[:CHANNEL] from {has}")
    if not channel and swells[number].max() > CLEARLY * swells[number][0]:
        channel = int(swells[number].argmax())
    sound, track = sounds[number], next(track for track in tracks if track.number == number)
    track = replace(track, channels=sound.shape[1], channel=channel)
    if len(sound) < SAMPLES_PER_FRAME:
        held = 1000 * len(sound) // SAMPLE_RATE
        raise MediaError(track.path, f"holds {held} ms of sound; one frame needs 40 ms")
    mono = np.memmap(f"{part}.f32", np.float32, "w+", shape=len(sound))
    for at in range(0, len(sound), PIECE * SAMPLES_PER_FRAME):
        piece = sound[at : at + PIECE * SAMPLES_PER_FRAME]
        mono[at : at + len(piece)] = piece[:, channel - 1] if channel else piece.mean(1)
    mono = torch.from_numpy(mono)
    offset, rms = _loudness(mono, track.path)
    for piece in mono.split(PIECE * SAMPLES_PER_FRAME):
        piece.sub_(offset).mul_(ACTIVE_RMS / rms).clamp_(-1, 1)
    return mono, track


def _loudness(sound: Tensor, path: str | Path) -> tuple[Tensor, Tensor]:
    """Measure the offset of a sound, and the rms of its speech: of the samples above -40 dB of the peak.

    Leaving pauses out keeps a hesitant speaker from becoming louder than a fluent one. A clap is no speech: blocks
    that are 12 dB above all but KNOCK others are left out as well. Raises: MediaError if there is nothing to hear.
    """
    offset = sound.mean()                            # cheap recorders leave one
    pieces = sound.split(PIECE * SAMPLES_PER_FRAME)  # an hour is measured in the memory of one

    def blocks(piece: Tensor) -> Tensor:
        return nnf.pad(piece - offset, (0, -len(piece) % BLOCK)).view(-1, BLOCK)

    peaks = sound.new_empty(-(-len(sound) // BLOCK))
    parts = list(zip(pieces, peaks.split(PIECE * SAMPLES_PER_FRAME // BLOCK)))
    for piece, peak in parts:
        peak.copy_(blocks(piece).abs().amax(1))
    if not (len(peaks) and SILENCE_PEAK <= peaks.max() < math.inf):    # not a number is also refused
        raise MediaError(path, "is silent or damaged; use a recording in which someone speaks")
    loudest = peaks[peaks >= SILENCE_PEAK].sort(descending=True).values
    limit = 4 * loudest[min(KNOCK, len(loudest) // 4)]
    floor, energy, count = 0.01 * peaks[peaks <= limit].max(), 0.0, 0
    for piece, peak in parts:
        level = blocks(piece)[peak <= limit]
        active = level[level.abs() > floor]
        energy, count = energy + active.square().sum(dtype=torch.float64), count + len(active)
    return offset, (energy / count).sqrt().float()


def normalise_loudness(sound: Tensor, path: str | Path = "sound") -> Tensor:
    """Bring speech to one loudness, rms ACTIVE_RMS, then clip to [-1, 1]: that touches only knocks."""
    offset, rms = _loudness(sound, path)
    return ((sound - offset) * (ACTIVE_RMS / rms)).clamp(-1, 1)


def read_speech(path: str | Path, max_seconds: float | None = None,
                choice: tuple[int, int] | None = None) -> tuple[Tensor, Track]:
    """Read the sound of any file that ffmpeg can decode.

    Args:    choice: (track, channel or 0), each from 1; else what has speech in it.
    Returns: (T,) float32, 16 kHz mono at one loudness, T >= 640, mapped from a file without a name; and its track.
    """
    tracks = _tracks(Path(path), _ffmpeg(Path(path)))
    with tempfile.TemporaryDirectory() as folder:
        part, limit = Path(folder) / "speech", [] if max_seconds is None else ["-t", str(max_seconds)]
        _ffmpeg(Path(path), *_decoding(tracks, part, *limit))
        sound, track = _hear(tracks, part, choice)
    return sound, replace(track, seconds=max_seconds)


def load_speech(path: str | Path, max_seconds: float | None = None) -> Tensor:
    """Read the sound of a file alone, as `read_speech` does."""
    return read_speech(path, max_seconds)[0]


def _to_rgb(image: Image.Image) -> Image.Image:
    """Turn upright any picture, scale 16 and 32 bit greys to 8, bring its colours to sRGB by the profile that
    it carries, and flatten transparency over white."""
    image, profile = ImageOps.exif_transpose(image), image.info.get("icc_profile")
    if image.mode[0] in "IF":                        # Pillow would cut these off at 255 instead of scaling them
        grey = np.asarray(image, np.float32)
        full = 65535 if image.mode[0] == "I" else max(1, grey.max())
        image = Image.fromarray((grey * (255 / full)).clip(0, 255).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if profile:
        with suppress(OSError, ImageCms.PyCMSError): # damaged, or for other channels: as if there were none
            profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), alpha)


def _no_picture(path: str | Path, error: Exception) -> str:
    """Say what is wrong with a file that Pillow cannot read, and what to do."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(12)[4:] in (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1"):
            return "is HEIC; export it as JPEG (iPhone: Settings, Camera, Formats, Most Compatible)"
    reason = (getattr(error, "strerror", None) or "is not a picture, or is truncated").lower()
    return f"{reason}; name a picture, or export it again as PNG or JPEG"


def load_portrait(path: str | Path, size: int, crop: tuple[int, int, int] | None = None) -> Tensor:
    """Read a picture of a face and scale its centre square, or the square `crop`, to `size` pixels.

    Args: crop: (x, y, side) in pixels of the upright picture. Returns: (3, size, size) uint8 RGB.
    """
    Image.MAX_IMAGE_PIXELS = None                    # LARGEST_PICTURE instead: a JPEG is scaled while decoded
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > LARGEST_PICTURE and image.format != "JPEG":
                raise MediaError(path, f"{width}x{height} are too many pixels; scale it down or export a JPEG")
            many = (crop[2] if crop else min(image.size)) / (4 * size)
            if many > 1 and image.mode in ("L", "RGB", "RGBA", "CMYK"):
                image.thumbnail((width / many, height / many))
            if image.getexif().get(0x0112, 1) > 4:   # turned by a right angle
                width, height = height, width
            image = _to_rgb(image)
    except (MediaError, MemoryError):
        raise
    except Exception as error:                       # Pillow's readers raise nearly anything on damaged files
        raise MediaError(path, _no_picture(path, error)) from None
    side = min(width, height)
    x, y, side = crop or ((width - side) // 2, (height - side) // 2, side)
    if side < 32:
        raise MediaError(path, f"{side} pixels are too few for a face; use at least 32, better {size}")
    if not (0 <= x <= width - side and 0 <= y <= height - side):
        raise MediaError(path, f"crop {x},{y},{side} leaves the picture of {width}x{height}; choose it inside")
    if crop is None and max(width, height) > 4 * side:
        raise MediaError(path, f"{width}x{height} is a strip, not a portrait; crop it to a square around the face")
    across, down = image.width / width, image.height / height          # below 1 if it was scaled down
    box = x * across, y * down, (x + side) * across, (y + side) * down
    image = image.resize((size, size), Image.LANCZOS, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ---- Speech as the generator hears it --------------------------------------------------------------------------------

@lru_cache(maxsize=None)
def _mel(device: torch.device) -> torchaudio.transforms.MelSpectrogram:
    """The filter bank: triangles between 60 Hz (below the lowest voice) and 7.6 kHz (below the resampler's edge)."""
    return torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=WINDOW, hop_length=HOP, n_mels=MELS,
                                                f_min=60.0, f_max=7600.0, center=False).to(device)


def log_mel(audio: Tensor, n_frames: int, start: int = 0) -> Tensor:
    """Describe the sound around each frame, from frame `start` on.

        feature[f] = (log(mel[4f - LOOK_BACK : 4f + 4 + LOOK_AHEAD] + LOG_FLOOR) - LOG_MEAN) / LOG_STD,  flattened

    where hop j's window *ends* with sample 160 (j + 1) - 1, so frame f hears [640 f - 880, 640 (f + 1) + 1280) exactly.

    Args:    audio (T,) or (B, T) float32; what is missing up to n_frames plus the look-ahead counts as zeros.
    Returns: (n_frames, MEL_DIM) or (B, n_frames, MEL_DIM) float32, about zero mean and unit variance on speech.
    """
    if n_frames > PIECE:                                              # an hour at once would be 1.4 GB
        pieces = [(at, min(PIECE, n_frames - at)) for at in range(0, n_frames, PIECE)]
        return torch.cat([log_mel(audio, frames, start + at) for at, frames in pieces], -2)
    first = start * SAMPLES_PER_FRAME - (WINDOW - HOP + LOOK_BACK * HOP)
    end = (start + n_frames) * SAMPLES_PER_FRAME + LOOK_AHEAD * HOP
    audio = audio[..., max(0, first) : end].float()
    left = max(0, -first)
    audio = nnf.pad(audio, (left, end - first - left - audio.shape[-1]))     # (..., end - first)
    mel = _mel(audio.device)(audio)                                   # (..., MELS, hops)
    mel = ((mel + LOG_FLOOR).log() - LOG_MEAN) / LOG_STD
    return mel.unfold(-1, MEL_DIM // MELS, 4).movedim(-3, -1).flatten(-2)   # (..., F, MEL_DIM)


@dataclass
class LogMel:
    """The `log_mel` of long speech (T,), made where it is read: x[:, a:b] is (1, b - a, MEL_DIM)."""

    audio: Tensor
    n_frames: int
    device: torch.device | str = "cpu"

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.n_frames, MEL_DIM

    def __getitem__(self, key: tuple[slice, slice]) -> Tensor:
        start, stop, _ = key[1].indices(self.n_frames)
        return log_mel(self.audio, stop - start, start)[None].to(self.device)


def hear(audio: Tensor, n_frames: int, encoder: str = "", device: str = "cpu",
         cache: str | Path | None = None) -> Tensor:
    """Describe the sound around each frame, (n_frames, C): `log_mel`, or by a speech encoder, once for each clip."""
    if not encoder:
        return log_mel(audio, n_frames)
    from extras.pretrained import features           # the one place of this file that needs an extra
    return features(audio, n_frames, encoder, device, cache)


# ---- Clips on disk ---------------------------------------------------------------------------------------------------
#
# A cache folder holds one file of tensors per clip, and index.json; its name hashes all that shaped it. It is renamed
# from a temporary name when complete, so whoever sees the name sees the whole.

class Clips(Sequence):
    """The clips `rows` of a cache folder: `clips[i]` is a Clip, `clips[a:b]` are Clips.

    safetensors maps a clip's file while the clip is held: pages are read when touched, and writing to a tensor
    never reaches the file.
    """

    def __init__(self, folder: str | Path, rows: Sequence[int] | None = None, index: dict | None = None):
        self.folder = Path(folder)
        self.index = index or json.loads((self.folder / "index.json").read_text())
        self.rows = list(range(len(self.index["clips"]))) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int | slice) -> "Clip | Clips":
        if isinstance(i, slice):
            return Clips(self.folder, self.rows[i], self.index)
        row = self.rows[i]
        truth = load_file(self.folder / f"{row}.safetensors")
        return Clip(self.index["clips"][row][0], truth.pop("frames"), truth.pop("audio"), truth or None)

    @property
    def names(self) -> list[str]:
        return [self.index["clips"][row][0] for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        """Frames of each clip, by the index: a hundred thousand files are more than a process may map."""
        return [self.index["clips"][row][2] for row in self.rows]


def write_clips(folder: Path, clips: Iterable[tuple], skipped: dict[str, str]) -> None:
    """Write clips (name, source file, frames, audio, truth) to a cache folder, none of them kept in memory."""
    index = []
    for name, source, frames, audio, truth in clips:
        arrays = {"frames": frames, "audio": audio, **truth}
        arrays = {key: np.asarray(x, order="C") for key, x in arrays.items()}        # safetensors ignores strides
        save_arrays(arrays, folder / f"{len(index)}.safetensors")
        index.append((name, source, len(frames)))
        os.utime(folder)                             # a sign of life, see `cached`
    (folder / "index.json").write_text(json.dumps({"clips": index, "skipped": skipped}))


def cached(cache: str | Path | None, recipe: dict, build: Callable[[Path], None]) -> Path:
    """Return the cache folder of `recipe`; call `build(temporary folder)` to fill it if there is none yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(cache or os.environ.get("FLOWPORTRAIT_CACHE") or Path(base) / "flowportrait")
    target = root / hashlib.sha256(json.dumps([CACHE_VERSION, recipe]).encode()).hexdigest()[:20]
    try:
        root.mkdir(parents=True, exist_ok=True)
        for folder in root.glob("tmp-*"):            # left by a killed run, if quiet for a day
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > 24 * 3600:
                    shutil.rmtree(folder)
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix="tmp-", dir=root, ignore_cleanup_errors=True) as temporary:
                build(Path(temporary))
                os.rename(temporary, target)
    except OSError as error:
        if not target.exists():                      # else another run was first, with the same clips
            raise MediaError(root, f"cache cannot be written ({error.strerror or error}); "
                                   "set FLOWPORTRAIT_CACHE") from None
    return target


# ---- Real clips ------------------------------------------------------------------------------------------------------

def _srgb(streams: str) -> str:
    """Options of ffmpeg's scale that bring a video to sRGB: primaries to those of BT.709, high dynamic range to
    standard by its tone mapping. What is large and has no tag was meant as BT.709: so players have it."""
    coding, height = next(iter(re.findall(r": Video: (.*?), \d+x(\d+)", streams)), ("", 0))
    transfer = ":out_transfer=bt709" if re.search("smpte2084|arib-std-b67", coding) else ""
    tagged = int(height) <= 576 or re.search(r"[(/ ](bt\d|smpte|gbr|fcc|ycgco|ictcp)", coding)
    return f"out_primaries=bt709{transfer}{'' if tagged else ':in_color_matrix=bt709'}"


def _decode(path: Path, size: int, crop: tuple[int, int, int] | None,
            part: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decode one video file to frames (F, 3, S, S) uint8, mapped from `part`.rgb, and audio (F * 640,) float32."""
    x, y, side = crop or ("(iw-ow)/2", "(ih-oh)/2", "min(iw,ih)")
    # ffmpeg would move a crop that leaves the picture back inside: ask for an impossible width instead.
    width = f"if(lte({x}+{side},iw)*lte({y}+{side},ih),{side},0)" if crop else side
    streams = _ffmpeg(path)
    tracks = _tracks(path, streams)
    picture = (f"bwdif=mode=send_frame:deint=interlaced,fps={FPS}:start_time=0,"
               "scale=w='round(iw*sar)':h=ih,"                                        # square pixels, upright
               f"crop=w='{width}':h='{side}':x='{x}':y='{y}':exact=1,"
               f"scale={size}:{size}:flags=lanczos+accurate_rnd+full_chroma_int:{_srgb(streams)}")
    rgb = part.with_suffix(".rgb")
    _ffmpeg(path, "-map", "0:V:0", "-vf", picture, "-pix_fmt", "rgb24", "-f", "rawvideo", f"file:{rgb}",
            *_decoding(tracks, part))
    sound, _ = _hear(tracks, part)
    n_video, n_audio = rgb.stat().st_size // (3 * size * size), len(sound) // SAMPLES_PER_FRAME
    n_frames = n_video if n_video <= n_audio + AUDIO_SLACK else n_audio
    if n_frames < MIN_FRAMES:
        raise MediaError(path, f"has {n_frames} frames with sound; a clip needs {MIN_FRAMES}")
    n_samples = n_frames * SAMPLES_PER_FRAME
    sound = nnf.pad(sound, (0, max(0, n_samples - len(sound))))[:n_samples]
    return np.memmap(rgb, np.uint8, "r", shape=(n_frames, size, size, 3)).transpose(0, 3, 1, 2), sound.numpy()


def load_clip(path: str | Path, size: int, crop: tuple[int, int, int] | None = None) -> Clip:
    """Read one video file as a Clip at `size` pixels, of a second or more. Raises: MediaError if it cannot be used."""
    with tempfile.TemporaryDirectory() as folder:
        frames, audio = _decode(Path(path), size, crop, Path(folder) / "clip")
        return Clip(str(path), torch.from_numpy(frames.copy()), torch.from_numpy(audio.copy()))


def cores() -> int:
    """Count the cores that this process may use, by its affinity and the quota of its container."""
    with suppress(OSError, ValueError):              # no such file, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        return max(1, min(len(os.sched_getaffinity(0)), quota // period))
    return len(os.sched_getaffinity(0))


def _decode_all(folder: Path, names: list[str], size: int, length: int, crop, parts: Path, skipped: dict) -> Iterator:
    """Decode files side by side (ffmpeg works, threads wait) and cut them, in order, into clips of `length` frames."""
    def attempt(i: int):
        try:
            return _decode(folder / names[i], size, crop, parts / f"{i}")
        except MediaError as error:
            skipped[printable(names[i])] = error.args[-1]
            return (), ()

    parts.mkdir()
    pool = ThreadPoolExecutor(cores())
    try:
        results = pool.map(attempt, range(len(names)))
        for i, (frames, sound) in enumerate(tqdm(results, "decoding", len(names), unit="file")):
            source = printable(names[i])
            for k, start in enumerate(range(0, len(frames) - MIN_FRAMES + 1, length)):
                clip, first, name = frames[start : start + length], start * SAMPLES_PER_FRAME, f"{source}#{k}"
                if clip[0].std((1, 2)).max() < BLANK_STD:
                    skipped[name] = "begins with an empty picture, so it has no portrait; trim it"
                else:
                    yield name, source, clip, sound[first : first + len(clip) * SAMPLES_PER_FRAME], {}
            for path in parts.glob(f"{i}.*"):
                path.unlink()
    finally:
        pool.shutdown(cancel_futures=True)           # after Ctrl-C do not decode the rest first
        shutil.rmtree(parts)


def _held_out(names: Iterable[str]) -> set[str]:
    """Choose the held-out files by the hash of their names: those below HELD_OUT, but at least one and never all.
    A file's hash never changes, so adding files moves none from training to held-out."""
    rank = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names}
    below = sum(value < HELD_OUT for value in rank.values())
    return set(sorted(rank, key=rank.get)[: min(max(below, 1), len(rank) - 1)])


def _split(sources: list[str]) -> tuple[set[int], str]:
    """Choose the held-out clips by the files that they are from. Returns: their rows, and what they are in words.

    Where that gives none or more than half, as with one long video of one person, the longest file's end is held
    out.
    """
    held_out = _held_out(set(sources))
    rows = {row for row, source in enumerate(sources) if source in held_out}
    if 0 < len(rows) <= len(sources) / 2:
        return rows, f"{len(held_out)} held out"
    longest = max(sources, key=sources.count)
    count = min(max(math.ceil(HELD_OUT * len(sources)), min(2, len(sources) // 2)), len(sources) - 1)
    rows = [row for row, source in enumerate(sources) if source == longest][-count:] if count else []
    return set(rows), f"0 held out, but the last {count} clips of {longest}" if count else "0 held out"


def printable(name: str) -> str:
    """Spell a file's name in UTF-8, whatever its bytes are."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _videos(folder: Path, skipped: dict[str, str]) -> list[tuple[str, int, int]]:
    """List each video under a folder once, with its size and time. Links are followed; what is hidden or the
    folder of a run, which holds generated videos, is left out."""
    seen, found = set(), []

    def unreadable(error: OSError) -> None:
        name = printable(os.path.relpath(error.filename, folder))
        skipped[name] = f"cannot be read ({error.strerror.lower()})"

    def is_new(status: os.stat_result) -> bool:
        known = len(seen)
        seen.add((status.st_dev, status.st_ino))
        return len(seen) > known

    for here, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        if "log.jsonl" in files:
            skipped[printable(os.path.relpath(here, folder))] = "is the folder of a run; keep runs elsewhere"
        if "log.jsonl" in files or not is_new(os.stat(here)):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for path in sorted(Path(here, name) for name in files if name[0] != "."):
            if path.suffix[1:].lower() in KINDS.split(", "):
                try:
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode) and is_new(status):
                        name = path.relative_to(folder).as_posix()
                        found.append((name, status.st_size, status.st_mtime_ns))
                except OSError as error:
                    unreadable(error)
    return sorted(found)


def folder_clips(folder: str | Path, size: int, seconds: float = 3.0, crop: tuple[int, int, int] | None = None,
                 cache: str | Path | None = None, frames: int = MIN_FRAMES) -> tuple[Clips, Clips]:
    """Decode every video under `folder` once and return (training clips, held-out clips), split by file.

    A long file becomes consecutive clips of `seconds`, the last at least one second. Files that cannot be used are
    listed with the reason; if none can, MediaError is raised.

    Args:    size: pixels of the square; frames: the shortest clip that is of use;
             crop: (x, y, side) in pixels of the upright picture, else its centre square.
    """
    if seconds < 1 or size < 1 or (crop and (min(crop) < 0 or crop[2] < 1)):
        raise ValueError(f"want seconds >= 1, size >= 1, crop x,y,side in the picture: {seconds=} {size=} {crop=}")
    folder, length, left_out, skipped = Path(folder), round(seconds * FPS), {}, {}
    if not folder.is_dir():
        raise MediaError(folder, "is not a folder; name one that holds videos")
    files = _videos(folder, left_out)
    names = [name for name, _, _ in files]
    recipe = {"files": files, "size": size, "frames": length, "crop": crop}
    target = cached(cache, recipe, lambda to: write_clips(
        to, _decode_all(folder, names, size, length, crop, to / "parts", skipped), skipped))
    clips = Clips(target)
    skipped = left_out | clips.index["skipped"]      # told on every run: the cache keeps what was left out
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    if not clips:
        raise MediaError(folder, f"none of its {len(names)} videos can be used; put in {KINDS} with sound")
    short = [name for name, held in zip(clips.names, clips.lengths) if held < frames]
    rows = [row for row, held in enumerate(clips.lengths) if held >= frames]
    if short:
        print(f"{len(short)} clips are shorter than {frames / FPS:.2f} s and left out: {', '.join(short[:5])}"
              f"{', ...' if short[5:] else ''}")
    if not rows:
        raise MediaError(folder, f"has no clip of {frames / FPS:.2f} s; add longer videos or lower --seconds")
    sources = [clips.index["clips"][row][1] for row in rows]
    held_out, words = _split(sources)
    print(f"{printable(str(folder))}: {len(set(sources))} files kept ({words}), {len(skipped)} skipped, "
          f"{len(rows)} clips")
    return tuple(Clips(target, [row for i, row in enumerate(rows) if (i in held_out) == held], clips.index)
                 for held in (False, True))


# ---- Weights, ours and those of transformers -------------------------------------------------------------------------

@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, and move it to `path` when the block ends well: nothing is half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_weights(folder: Path, weights: dict[str, Tensor], config: dict) -> None:
    """Write folder/model.safetensors and config.json, each to a temporary name first."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as path:
        # Not save_file: it leaves a file that only its owner may read.
        path.write_bytes(save({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}))
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1))


@contextmanager
def reading_weights(folder: Path, kind: str, source: str) -> Iterator[None]:
    """Turn whatever a missing or broken folder of weights raises into a MediaError that says what it should hold."""
    try:
        yield
    except OSError as error:
        raise MediaError(folder, f"holds no {Path(error.filename or 'model.safetensors').name}; "
                                 f"give the folder of {source}") from None
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise MediaError(folder, f"is not {kind} of this version ({first_line(error)}); train it again") from None


@contextmanager
def loading(name: str | Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises into a MediaError, and load without its chatter."""
    import transformers                              # here: it takes seconds, and few uses need it
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except MediaError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise MediaError(name, f"cannot be loaded as {what} ({first_line(error)}); give a folder that transformers "
                               "wrote, or a name on the hub") from None


def whole_model(kind, name: str | Path, **settings) -> torch.nn.Module:
    """Load a frozen model by a class of transformers, from a folder or, where `name` is none, from the hub.
    Raises: MediaError where weights are missing; else what transformers raises."""
    model, loaded = kind.from_pretrained(str(name), local_files_only=Path(name).is_dir(), output_loading_info=True,
                                         **settings)
    missing = sorted(set(loaded["missing_keys"]) - {"masked_spec_embed"})            # only training reads that one
    if missing:
        raise MediaError(name, f"lacks the weights {', '.join(missing[:3])}; copy the folder again")
    return model.eval().requires_grad_(False)


# ---- Writing speech and video ----------------------------------------------------------------------------------------

def write_speech(path: Path, audio: Tensor) -> None:
    """Write (T,) float32 in [-1, 1] at 16 kHz as a 16-bit wav file."""
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(SAMPLE_RATE)
        file.writeframes((audio.clamp(-1, 1) * 32767).round().short().numpy().tobytes())


COPIED = "aac", "mp3", "opus", "flac"                # browsers play them in an mp4: not encoded anew


def _carrying(audio: Tensor | Track, folder: str) -> tuple[list[str], list[str]]:
    """Find arguments of ffmpeg's second input and of its output that carry sound into an mp4: a track's as it is,
    or encoded once at its rate with its channels, or, where AAC knows no such channels, what is heard of it."""
    if isinstance(audio, Tensor):
        audio.detach().cpu().float().numpy().tofile(f"{folder}/audio.f32")
        return (["-f", "f32le", "-ar", str(SAMPLE_RATE), "-i", f"{folder}/audio.f32"],
                ["-c:a", "aac", "-ar", "48000", "-b:a", "128k"])
    heard = [audio.channel - 1] if audio.channel else range(audio.channels)
    mix = "pan=mono|c0=" + "+".join(f"{1 / len(heard):.6f}*c{channel}" for channel in heard)
    # AAC starts with 1024 samples that players shall skip: one that does not is late by half a frame at 48 kHz,
    # by one and a half at 16.
    rate = ["-ar", "48000"] if audio.rate < 32000 else []
    encoded = ["-c:a", "aac", "-b:a", f"{128 * min(audio.channels, 8)}k", *rate]
    whole = audio.codec in COPIED and audio.seconds is None            # a limit would cut packets
    copied = [["-c:a", "copy"]] if whole else []
    for way in (*copied, [*encoded, "-af", IN_TIME], [*encoded, "-af", f"{IN_TIME},{mix}"]):
        with suppress(MediaError):
            _ffmpeg(audio.path, "-map", f"0:{audio.stream}", "-t", "1", *way, f"{folder}/trial.mp4")
            limit = [] if audio.seconds is None else ["-t", str(audio.seconds)]
            return [*limit, "-i", f"file:{audio.path}"], ["-map", "0:v", "-map", f"1:{audio.stream}", *way]
    raise MediaError(audio.path, "holds sound that no mp4 can; convert it to wav")


def write_video(path: str | Path, frames: Iterable[Tensor], audio: Tensor | Track) -> None:
    """Write an mp4 that plays in browsers: H.264 4:2:0, every frame, and all of the sound.

    Frames are streamed; the file appears under its name only when it is complete, and what could not be written
    is refused before the first frame is asked for. An odd width or height grows by one repeated pixel, as 4:2:0
    wants pairs.

    Args:    frames: (F, 3, H, W) uint8, or an iterator of (3, H, W);
             audio: (T,) float32 in [-1, 1] at 16 kHz, or a track of a file.
    """
    path, frames = Path(path), iter(frames)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR).lower())
        with suppress(FileNotFoundError):
            path.lstat()                             # a name that is too long
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent.absolute()) as folder:
            sound = _carrying(audio, folder)
            first = next(frames, None)
            if first is None:
                raise MediaError(path, "there is no frame to write; pass at least one")
            said = _encode(folder, *first.shape[1:], itertools.chain([first], frames), *sound)
            if said:
                raise MediaError(path, f"cannot be encoded ({said.splitlines()[0]}); check frames and sound")
            os.replace(f"{folder}/video.mp4", path)
    except OSError as error:
        raise MediaError(path, f"cannot be written ({error.strerror}); make its folder or choose a name") from None


def video_uri(frames: Tensor, audio: Tensor) -> str:
    """Write a video (F, 3, H, W) uint8 with its sound (T,) as an mp4 in a base64 data URI."""
    with tempfile.TemporaryDirectory() as folder:
        write_video(path := Path(folder, "video.mp4"), frames, audio)
        return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def _encode(folder: str, height: int, width: int, frames: Iterable[Tensor], source: list[str],
            sound: list[str]) -> str:
    """Pipe frames into ffmpeg, which muxes them with the sound of a source into folder/video.mp4.
    Returns: its complaint."""
    # The colour matrix is BT.709 and says so: players guess when none does.
    command = [*FFMPEG, "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s",
               f"{width + width % 2}x{height + height % 2}", "-r", str(FPS), "-i", "pipe:0", *source,
               "-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd,format=yuv420p",
               "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv",
               "-c:v", "libx264", "-crf", "16", *sound, "-movflags", "+faststart", f"{folder}/video.mp4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as ffmpeg:
        with suppress(BrokenPipeError):                                            # ffmpeg gave up: it says why
            for frame in frames:
                frame = np.pad(frame.cpu().permute(1, 2, 0), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                ffmpeg.stdin.write(np.ascontiguousarray(frame))
        said = ffmpeg.communicate()[1].decode(errors="replace").strip()
    return (said or "no reason given") if ffmpeg.returncode else ""
