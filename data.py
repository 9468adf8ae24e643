"""Portraits, speech and video clips: everything that enters or leaves the generator.

1. Sound as the generator hears it: log-mel energies of a frame's own 40 ms, of 55 ms before and 80 ms after.
   These 80 ms, since lips round before a vowel is heard, and the length of a chunk are the latency of the
   whole system. Or the features of a frozen speech encoder, which hears the whole speech first.
2. Media in. Any video or sound becomes 25 RGB frames and 16,000 mono samples a second, so a frame is exactly
   640 samples. How ffmpeg and Pillow do that with odd files is in extras/media.py.
3. Clips on disk. A folder of videos is decoded once into a cache; clips are mapped from it when used.
4. Media out: an H.264 + AAC mp4, frame for frame, sample for sample.

A file that cannot be used raises `MediaError`: one line that names the file, what is wrong and what to do.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
import torchaudio
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from extras.files import VIDEOS, MediaError, cores, find_videos, first_line, printable, refusing
from extras.media import (FPS, PIECE, SAMPLES_PER_FRAME, SAMPLE_RATE, Track, carry_sound, decode,
                          encode, read_picture)

HOP = 160                                            # 10 ms between spectra: four hops make a frame
WINDOW = 400                                         # 25 ms under each spectrum, the usual choice for speech
MELS = 32
LOOK_BACK, LOOK_AHEAD = 4, 8                         # hops before and after a frame's own four
MEL_DIM = (LOOK_BACK + 4 + LOOK_AHEAD) * MELS        # 512
LATENCY = LOOK_AHEAD * HOP / SAMPLE_RATE             # 0.08 s of future sound that a chunk waits for
LOG_FLOOR = 1e-3                                     # mel power below this is room noise at our loudness
LOG_MEAN, LOG_STD = -4.1, 3.3                        # of log(mel + LOG_FLOOR): real (GRID) and drawn talkers

MIN_FRAMES = FPS                                     # a clip lasts at least a second
AUDIO_SLACK = 5                                      # frames of sound a clip may lack (GRID: 0.5)
BLANK_STD = 4.0                                      # of 255: 11 of 900 GRID clips begin plain grey
HELD_OUT = 0.1                                       # share of the files that training never sees
STOPPED = threading.Event()                          # set while threads at work should end
AROUND = 15                                          # frames of sound kept before and after a clip
CACHE_VERSION = 6                                    # raise it when decoding changes its result

Crop = tuple[int, int, int] | str | None             # x, y, side; "face": where the head is; None: the centre


@dataclass
class Clip:
    """A talking portrait."""

    name: str                                        # where it came from
    frames: Tensor                                   # (F, 3, S, S) uint8 RGB; frames[0] is the portrait
    audio: Tensor                                    # (F * 640,) float32 at 16 kHz
    truth: dict[str, Tensor] | None = None           # {name: (F, ...), (n,) or ()}, of drawn talkers


def pixels(clips: Sequence[Clip], frames: int) -> Tensor:
    """Stack the first frames of clips: (B, F, 3, S, S) in [0, 1]."""
    return torch.stack([clip.frames[:frames] for clip in clips]) / 255


def sounds(clips: Sequence[Clip], frames: int) -> Tensor:
    """Stack the sound of the first frames of clips: (B, F * 640)."""
    return torch.stack([clip.audio[:frames * SAMPLES_PER_FRAME] for clip in clips])


def to_bytes(frames: Tensor) -> Tensor:
    """[0, 1] float -> uint8."""
    return (frames.clamp(0, 1) * 255).round().byte()


# ---- Speech as the generator hears it -----------------------------------------------------------------

@lru_cache(maxsize=None)
def _mel(device: torch.device) -> torchaudio.transforms.MelSpectrogram:
    """The filter bank: from 60 Hz (below the lowest voice) to 7.6 kHz (below the resampler's edge)."""
    return torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=WINDOW, hop_length=HOP, n_mels=MELS,
                                                f_min=60.0, f_max=7600.0, center=False).to(device)


def log_mel(audio: Tensor, n_frames: int, start: int = 0) -> Tensor:
    """Describe the sound around each frame, from frame `start` on.

        feature[f] = (log(mel[4f - LOOK_BACK : 4f + 4 + LOOK_AHEAD] + LOG_FLOOR) - LOG_MEAN) / LOG_STD

    flattened, where hop j's window *ends* with sample 160 (j + 1) - 1, so frame f hears exactly the samples
    [640 f - 880, 640 (f + 1) + 1280).

    Args:    audio (T,) or (B, T) float32; what is missing up to n_frames plus the look-ahead counts as zeros.
    Returns: (n_frames, MEL_DIM) or (B, n_frames, MEL_DIM) float32, on speech about zero mean, unit variance.
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


def hear(audio: Tensor, n_frames: int, encoder: str = "", device: str = "cpu") -> Tensor:
    """Describe the sound around each frame, (n_frames, C): `log_mel`, or what a speech encoder hears."""
    if not encoder:
        return log_mel(audio, n_frames)
    from extras.pretrained import features           # the one place of this file that needs a model of others
    return features(audio, n_frames, encoder, device)


# ---- Media in -----------------------------------------------------------------------------------------

def read_speech(path: str | Path, max_seconds: float | None = None,
                choice: tuple[int, int] | None = None) -> tuple[Tensor, Track]:
    """Read the sound of any file that ffmpeg can decode.

    Args:    choice: (track, channel or 0), each from 1; else what has speech in it.
    Returns: (T,) float32, 16 kHz mono at one loudness, T >= 640, mapped from a nameless file; its track.
    """
    with tempfile.TemporaryDirectory() as folder:
        return decode(Path(path), Path(folder, "speech"), seconds=max_seconds, choice=choice)


def load_portrait(path: str | Path, size: int, crop: tuple[int, int, int] | None = None) -> Tensor:
    """Read a picture of a face and scale its centre square, or the square `crop`, to `size` pixels.

    Args: crop: (x, y, side) in pixels of the upright picture. Returns: (3, size, size) uint8 RGB.
    """
    image, (width, height) = read_picture(path, size, crop and crop[2])
    side = min(width, height)
    x, y, side = crop or ((width - side) // 2, (height - side) // 2, side)
    if side < 32:
        raise MediaError(path, f"{side} pixels are too few for a face; use at least 32, better {size}")
    if not (0 <= x <= width - side and 0 <= y <= height - side):
        raise MediaError(path, f"crop {x},{y},{side} leaves the picture of {width}x{height}; "
                               "choose it inside")
    if crop is None and max(width, height) > 4 * side:
        raise MediaError(path, f"{width}x{height} is a strip, not a portrait; "
                               "crop it to a square around the face")
    across, down = image.width / width, image.height / height          # below 1 if it was scaled down
    box = x * across, y * down, (x + side) * across, (y + side) * down
    image = image.resize((size, size), Image.LANCZOS, box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _decode_clip(path: Path, size: int, crop: tuple[int, int, int] | dict | None,
                 part: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decode one video file to frames (F, 3, S, S) uint8, mapped from `part`.rgb, and audio (F * 640,)."""
    sound, _ = decode(path, part, square=(size, crop))
    n_frames = os.path.getsize(f"{part}.rgb") // (3 * size * size)
    n_heard = len(sound) // SAMPLES_PER_FRAME
    if n_frames > n_heard + AUDIO_SLACK:
        n_frames = n_heard
    if n_frames < MIN_FRAMES:
        raise MediaError(path, f"has {n_frames} frames with sound; a clip needs {MIN_FRAMES}")
    n_samples = n_frames * SAMPLES_PER_FRAME
    sound = nnf.pad(sound, (0, max(0, n_samples - len(sound))))[:n_samples]
    frames = np.memmap(f"{part}.rgb", np.uint8, "r", shape=(n_frames, size, size, 3))
    return frames.transpose(0, 3, 1, 2), sound.numpy()


def load_clip(path: str | Path, size: int, crop: Crop = None) -> Clip:
    """Read one video file as a Clip at `size` pixels, of a second or more. Raises: MediaError."""
    if crop == "face":
        from extras.face import frame_of_video       # here: only a crop by face needs a detector
        crop = frame_of_video(path)
    with tempfile.TemporaryDirectory() as folder:
        frames, audio = _decode_clip(Path(path), size, crop, Path(folder, "clip"))
        return Clip(str(path), torch.from_numpy(frames.copy()), torch.from_numpy(audio.copy()))


# ---- Clips on disk ------------------------------------------------------------------------------------
#
# A cache folder holds one file of tensors per clip, and index.json; its name hashes all that shaped it. It is
# renamed from a temporary name when complete, so whoever sees the name sees the whole.

class Clips(Sequence):
    """The clips `rows` of a cache folder: `clips[i]` is a Clip, `clips[a:b]` are Clips.

    safetensors maps a clip's file while the clip is held: pages are read when touched, and writing to a
    tensor never reaches the file. A file has some sound from before and after its clip. Where a row's sound
    is late by so many frames (index["late"], in memory only), it is read from so much later, and frames for
    which there is no sound are dropped.
    """

    def __init__(self, folder: str | Path, rows: Sequence[int] | None = None, index: dict | None = None):
        self.folder = Path(folder)
        with self.readable():
            self.index = index or json.loads((self.folder / "index.json").read_text())
        self.rows = list(range(len(self.index["clips"]))) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int | slice) -> "Clip | Clips":
        if isinstance(i, slice):
            return Clips(self.folder, self.rows[i], self.index)
        row = self.rows[i]
        with self.readable():
            arrays = load_file(self.folder / f"{row}.safetensors")
        frames, audio = arrays.pop("frames"), arrays.pop("audio")
        start = int(arrays.pop("before", 0)) + self.late(i)                             # of the first's sound
        lost = max(0, -start)
        frames = frames[lost : max(lost, len(audio) // SAMPLES_PER_FRAME - start)]
        audio = audio[(start + lost) * SAMPLES_PER_FRAME :][: len(frames) * SAMPLES_PER_FRAME]
        return Clip(self.index["clips"][row][0], frames, audio, arrays or None)       # the rest is the truth

    def readable(self) -> AbstractContextManager:
        """Turn what a damaged cache raises into a MediaError."""
        return refusing(self.folder, (ValueError, SafetensorError), lambda error:
                        f"is a damaged cache ({first_line(error)}); delete this folder, it is made anew")

    @property
    def names(self) -> list[str]:
        return [self.index["clips"][row][0] for row in self.rows]

    @property
    def sources(self) -> list[str]:
        """The file that each clip is from."""
        return [self.index["clips"][row][1] for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        """Frames of each clip, by the index: a hundred thousand files are more than a process may map."""
        return [self.index["clips"][row][2] for row in self.rows]

    def late(self, i: int) -> int:
        """By how many frames the sound of clip i is late in its file."""
        return self.index.get("late", {}).get(self.rows[i], 0)

    def select(self, keep: Callable[[int], bool]) -> "Clips":
        """The clips at the positions i of these for which keep(i) is true."""
        return Clips(self.folder, [row for i, row in enumerate(self.rows) if keep(i)], self.index)


def fill_cache(folder: Path, clips: Iterable[tuple], skipped: dict[str, str]) -> None:
    """Write clips (name, source file, frames, audio, truth) to a cache folder, one at a time in memory."""
    index = []
    for name, source, frames, audio, truth in clips:
        arrays = {"frames": frames, "audio": audio, **truth}
        arrays = {key: np.asarray(x, order="C") for key, x in arrays.items()}    # safetensors ignores strides
        save_arrays(arrays, folder / f"{len(index)}.safetensors")
        index.append((name, source, len(frames)))
        os.utime(folder)                             # a sign of life, see `cached`
    (folder / "index.json").write_text(json.dumps({"clips": index, "skipped": skipped}))


def cached(recipe: dict, build: Callable[[Path], None]) -> Path:
    """Return the cache folder of `recipe`; call `build(temporary folder)` to fill it if there is none yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("FLOWPORTRAIT_CACHE") or Path(base) / "flowportrait")
    target = root / hashlib.sha256(json.dumps([CACHE_VERSION, recipe]).encode()).hexdigest()[:20]
    try:
        root.mkdir(parents=True, exist_ok=True)
        for folder in root.glob("tmp-*"):            # left by a killed run, if quiet for a day
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > 24 * 3600:
                    shutil.rmtree(folder)
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix="tmp-", dir=root, ignore_cleanup_errors=True) as folder:
                build(Path(folder))
                os.rename(folder, target)
    except (OSError, SafetensorError) as error:
        if not target.exists():                      # else another run was first, with the same clips
            reason = getattr(error, "strerror", None) or first_line(error)
            raise MediaError(root, f"cache cannot be written ({reason}); set FLOWPORTRAIT_CACHE") from None
    return target


def _decode_all(folder: Path, names: list[str], size: int, length: int, crop: Crop,
                parts: Path, skipped: dict[str, str]) -> Iterator[tuple]:
    """Decode files side by side (ffmpeg works, threads wait); cut them, in order, into clips of `length`."""
    def attempt(i: int) -> tuple:
        try:
            squares, spans = crop, [(0, math.inf)]
            if crop == "face":
                squares, spans = face.cut(folder / names[i], skipped, shown)
            return *_decode_clip(folder / names[i], size, squares, parts / f"{i}"), spans
        except MediaError as error:
            skipped[printable(names[i])] = error.args[-1]
            return (), (), []

    shown = []
    if crop == "face":
        from extras import face                      # here: only a crop by face needs it
        face.detector()                              # where there is none, it is said once
    parts.mkdir()
    pool = ThreadPoolExecutor(cores())
    try:
        results = pool.map(attempt, range(len(names)))
        for i, (frames, sound, spans) in enumerate(tqdm(results, "decoding", len(names), unit="file")):
            source, spans = printable(names[i]), [(a, min(b, len(frames))) for a, b in spans]
            starts = ((a, at, b) for a, b in spans for at in range(a, b - MIN_FRAMES + 1, length))
            for k, (first, start, end) in enumerate(starts):
                name, clip = f"{source}#{k}", frames[start : min(start + length, end)]
                if clip[0].std((1, 2)).max() < BLANK_STD:
                    skipped[name] = "begins with an empty picture, so it has no portrait; trim it"
                    continue
                before = min(AROUND, start - first)
                end = min(start + len(clip) + AROUND, end)
                heard = sound[(start - before) * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME]
                yield name, source, clip, heard, {"before": np.array(before)}
            for path in parts.glob(f"{i}.*"):
                path.unlink()
        if shown:
            face.sheet(shown).save(parts.parent / "cut.jpg")
    finally:
        STOPPED.set()                                # after Ctrl-C do not decode the rest first
        pool.shutdown(cancel_futures=True)
        STOPPED.clear()
        shutil.rmtree(parts)


def _held_out(names: Iterable[str]) -> set[str]:
    """Choose the held-out files by the hash of their names: those below HELD_OUT, but at least two and at
    most half. A file's hash never changes, so adding files moves none from training to held-out, but where
    there are so few that "at most half" decides."""
    rank = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names}
    below = sum(value < HELD_OUT for value in rank.values())
    return set(sorted(rank, key=rank.get)[: min(max(below, 2), len(rank) // 2)])


def _split(sources: list[str]) -> tuple[set[int], str]:
    """Choose the held-out clips by the files that they are from. Returns: their positions, and a description.

    Where that gives none or more than half, as with one long video, the longest file's end is held out.
    """
    held_out = _held_out(set(sources))
    rows = {row for row, source in enumerate(sources) if source in held_out}
    if 0 < len(rows) <= len(sources) / 2:
        return rows, f"{len(held_out)} held out"
    count = min(max(math.ceil(HELD_OUT * len(sources)), 2), len(sources) // 2)
    if not count:
        return set(), "0 held out"
    [(longest, _)] = Counter(sources).most_common(1)
    rows = [row for row, source in enumerate(sources) if source == longest][-count:]
    return set(rows), f"0 held out, but the last {count} clips of {longest}"


def folder_clips(folder: str | Path, size: int, seconds: float = 3.0, crop: Crop = None,
                 frames: int = MIN_FRAMES) -> tuple[Clips, Clips]:
    """Decode every video under `folder` once and return (training clips, held-out clips), split by file.

    `folder` may be a video itself. A long file becomes consecutive clips of `seconds`, the last at least one
    second. Files that cannot be used are listed with the reason; if none can, MediaError is raised.

    Args:    size: pixels of the square; frames: the shortest clip that is of use;
             crop: (x, y, side) in pixels of the upright picture, "face", else its centre square.
    """
    folder, length, failed = Path(folder), round(seconds * FPS), {}
    if not folder.exists():
        raise MediaError(folder, "is not there; name a video, or a folder that holds videos")
    files, left_out = find_videos(folder)
    names, root = [name for name, _, _ in files], folder if folder.is_dir() else folder.parent
    recipe = {"files": files, "size": size, "frames": length, "crop": crop}
    clips = Clips(cached(recipe, lambda to: fill_cache(
        to, _decode_all(root, names, size, length, crop, to / "parts", failed), failed)))
    skipped = left_out | clips.index["skipped"]      # told on every run: the cache keeps what was left out
    if not clips and root != folder:
        raise MediaError(folder, "; ".join(skipped.values()))
    for name, reason in sorted(skipped.items()):
        print(f"skipped {name}: {reason}")
    if not clips:
        raise MediaError(folder, f"none of its {len(names)} videos can be used; put in {VIDEOS} with sound")
    wanted, lengths = f"{frames / FPS:.2f} s", clips.lengths
    short = clips.select(lambda i: lengths[i] < frames).names
    if short:
        print(f"{len(short)} clips are shorter than {wanted} and left out: {', '.join(short[:5])}"
              f"{', ...' if short[5:] else ''}")
    clips = clips.select(lambda i: lengths[i] >= frames)
    if not clips:
        raise MediaError(folder, f"has no clip of {wanted}; add longer videos or lower --seconds")
    held_out, words = _split(clips.sources)
    print(f"{printable(str(folder))}: {len(set(clips.sources))} files kept ({words}), {len(clips)} clips")
    return clips.select(lambda i: i not in held_out), clips.select(lambda i: i in held_out)


# ---- Media out ----------------------------------------------------------------------------------------

def write_video(path: str | Path, frames: Iterable[Tensor], audio: Tensor | Track) -> None:
    """Write an mp4 that plays in browsers: H.264 4:2:0, every frame, and all of the sound.

    Frames are streamed; the file appears under its name only when it is complete, and what could not be
    written is refused before the first frame is asked for. An odd width or height grows by one pixel.

    Args:    frames: (F, 3, H, W) uint8, or an iterator of (3, H, W);
             audio: (T,) float32 in [-1, 1] at 16 kHz, or a track of a file.
    """
    path, frames = Path(path), iter(frames)
    try:
        if path.is_dir():
            raise MediaError(path, "cannot be written (is a directory); choose a name")
        with suppress(FileNotFoundError):
            path.lstat()                             # a name that is too long
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent.absolute()) as folder:
            sound = carry_sound(audio, folder)
            first = next(frames, None)
            if first is None:
                raise MediaError(path, "there is no frame to write; pass at least one")
            said = encode(folder, itertools.chain([first], frames), first.shape, *sound)
            if said:
                raise MediaError(path, f"cannot be encoded ({said.splitlines()[0]}); make room, or check the "
                                       "frames and the sound")
            os.replace(f"{folder}/video.mp4", path)
    except OSError as error:
        raise MediaError(path, f"cannot be written ({error.strerror or error}); make its folder, "
                               "make room there, or choose another name") from None
