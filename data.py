"""Portraits, speech and video clips: everything that enters or leaves the generator.

1. Media in. ffmpeg turns any video or sound into 25 RGB frames and 16,000 mono samples a second: a frame is exactly
   640 samples.
2. Sound as the generator hears it: log-mel energies of a frame's own 40 ms, of 40 ms before and of 80 ms after. Those
   80 ms are the *latency* of the whole system: a speaker's lips round before the vowel is heard. Or the features of a
   frozen speech encoder, which hears the whole speech before the first frame: no latency to speak of, no streaming.
3. Synthetic talkers: drawn portraits with synthesised speech and exact truth, for training without any data.
4. Clips on disk. Either source is decoded once into a cache; clips are mapped from it when they are used.
5. Media out: an H.264 + AAC mp4, frame for frame, sample for sample.

Every file that cannot be used raises `MediaError`: one line that names the file, what is wrong and what to do.
"""

import base64
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as nnf
import torchaudio
from PIL import Image, ImageOps
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
AUDIO_SLACK = 5                                      # frames of sound a clip may lack (GRID: 75 frames, 2.98 s)

HOP = 160                                            # 10 ms between spectra: four hops make a frame
WINDOW = 400                                         # 25 ms under each spectrum, the usual choice for speech
MELS = 32
LOOK_BACK, LOOK_AHEAD = 4, 8                         # hops before and after a frame's own four: 40 and 80 ms
MEL_DIM = (LOOK_BACK + 4 + LOOK_AHEAD) * MELS        # 512
LATENCY = LOOK_AHEAD * HOP / SAMPLE_RATE             # 0.08 s of future sound that a frame waits for
LOG_FLOOR = 1e-3                                     # mel power below this is room noise at ACTIVE_RMS
LOG_MEAN, LOG_STD = -4.1, 3.3                        # of log(mel + LOG_FLOOR), GRID and synthetic talkers mixed

KINDS = "mp4, mov, mkv, webm, avi, mpg, mpeg, m4v"   # of video files, by suffix
MIN_FRAMES = FPS                                     # a clip lasts at least a second
BLANK_STD = 4.0                                      # of 255: 11 of 900 GRID clips start as a plain grey field
HELD_OUT = 0.1                                       # share of the files that training never sees
CACHE_VERSION = 4                                    # raise it when the decoding below changes its result


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


# ---- Reading media ---------------------------------------------------------------------------------------------------

FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y"]
FFMPEG_WORDS = {                                     # what ffmpeg says -> what it means
    "'0:a:0'": "has no audio track; use a file with sound",
    "'0:V:0'": "has no video track; use a file with a picture",
    "non positive size": "is smaller than the crop; choose x,y,size inside the picture",
    "no decoder found": "is in a format that ffmpeg cannot decode; convert it",
    "Invalid data found": "is not audio or video, or is cut off; convert it or copy it again",
}
# Both streams count from the file's common zero: a track that starts late is padded (the picture with its first frame,
# the sound with silence) and gaps in the sound are filled, so lips and sound stay together.
SOUND = ["-map", "0:a:0", "-ac", "1", "-ar", str(SAMPLE_RATE), "-af", "aresample=async=1:first_pts=0", "-f", "f32le"]


def _ffmpeg(path: Path, *arguments: str) -> bytes:
    """Run ffmpeg on one input and return its standard output, or raise MediaError with plain words."""
    if not path.is_file() or not path.stat().st_size:
        state = "is a folder" if path.is_dir() else "is empty" if path.exists() else "does not exist"
        raise MediaError(path, f"{state}; name a file with sound or a picture")
    done = subprocess.run([*FFMPEG, "-i", f"file:{path}", *arguments], capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or "ffmpeg failed"
        if (full := os.strerror(errno.ENOSPC)) in said:              # no fault of the file
            raise OSError(errno.ENOSPC, full, str(path))
        last_resort = said.splitlines()[0].split("] ")[-1]
        raise MediaError(path, next((words for sign, words in FFMPEG_WORDS.items() if sign in said), last_resort))
    return done.stdout


def normalise_loudness(sound: Tensor, path: str | Path = "sound") -> Tensor:
    """Bring speech to one loudness: rms ACTIVE_RMS over the samples above -40 dB of the peak, then clip to [-1, 1].

    Leaving pauses out keeps a hesitant speaker from becoming louder than a fluent one; clipping touches only knocks
    on the microphone. Raises: MediaError if there is nothing to hear.
    """
    sound = sound - sound.mean()                     # cheap recorders leave an offset
    level = sound.abs()
    if not (level.numel() and SILENCE_PEAK <= level.max() < math.inf):           # not a number is also refused
        raise MediaError(path, "is silent or damaged; use a recording in which someone speaks")
    active = sound[level > 0.01 * level.max()]
    return (sound * (ACTIVE_RMS / active.square().mean().sqrt())).clamp(-1, 1)


def load_speech(path: str | Path, max_seconds: float | None = None) -> Tensor:
    """Read the sound of any file that ffmpeg can decode: (T,) float32, 16 kHz mono at one loudness, T >= 640."""
    limit = [] if max_seconds is None else ["-t", str(max_seconds)]
    sound = torch.from_numpy(np.frombuffer(_ffmpeg(Path(path), *limit, *SOUND, "-"), np.float32).copy())
    if len(sound) < SAMPLES_PER_FRAME:
        raise MediaError(path, f"holds {1000 * len(sound) // SAMPLE_RATE} ms of sound; one frame needs 40 ms")
    return normalise_loudness(sound, path)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Turn upright any picture, flatten transparency over white, and scale 16 and 32 bit greys to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":                        # Pillow would cut these off at 255 instead of scaling them
        grey = np.asarray(image, np.float32)
        full = 65535 if image.mode[0] == "I" else max(1, grey.max())
        image = Image.fromarray((grey * (255 / full)).clip(0, 255).astype(np.uint8))
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def load_portrait(path: str | Path, size: int, crop: tuple[int, int, int] | None = None) -> Tensor:
    """Read a picture of a face and scale its centre square, or the square `crop`, to `size` pixels.

    Args: crop: (x, y, side) in pixels of the upright picture. Returns: (3, size, size) uint8 RGB.
    """
    try:
        with Image.open(path) as image:
            image = _to_rgb(image)
    except Exception as error:                       # Pillow's readers raise nearly anything on damaged files
        reason = (getattr(error, "strerror", None) or "is not a picture, or is truncated").lower()
        raise MediaError(path, f"{reason}; name a picture, or export it again as PNG or JPEG") from None
    width, height = image.size
    side = min(width, height)
    x, y, side = crop or ((width - side) // 2, (height - side) // 2, side)
    if side < 32:
        raise MediaError(path, f"{side} pixels are too few for a face; use at least 32, better {size}")
    if not (0 <= x <= width - side and 0 <= y <= height - side):
        raise MediaError(path, f"crop {x},{y},{side} leaves the picture of {width}x{height}; choose it inside")
    if crop is None and max(width, height) > 4 * side:
        raise MediaError(path, f"{width}x{height} is a strip, not a portrait; crop it to a square around the face")
    image = image.resize((size, size), Image.LANCZOS, box=(x, y, x + side, y + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ---- Speech as the generator hears it --------------------------------------------------------------------------------

@lru_cache(maxsize=None)
def _mel(device: torch.device) -> torchaudio.transforms.MelSpectrogram:
    """The filter bank: triangles between 60 Hz (below the lowest voice) and 7.6 kHz (below the resampler's edge)."""
    return torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=WINDOW, hop_length=HOP, n_mels=MELS,
                                                f_min=60.0, f_max=7600.0, center=False).to(device)


def log_mel(audio: Tensor, n_frames: int) -> Tensor:
    """Describe the sound around each frame.

        feature[f] = (log(mel[4f - LOOK_BACK : 4f + 4 + LOOK_AHEAD] + LOG_FLOOR) - LOG_MEAN) / LOG_STD,  flattened

    where hop j's window *ends* with sample 160 (j + 1) - 1, so frame f hears [640 f - 880, 640 (f + 1) + 1280) exactly.

    Args:    audio (T,) or (B, T) float32; what is missing up to n_frames plus the look-ahead counts as zeros.
    Returns: (n_frames, MEL_DIM) or (B, n_frames, MEL_DIM) float32, about zero mean and unit variance on speech.
    """
    before = WINDOW - HOP + LOOK_BACK * HOP                           # samples heard before frame 0
    end = n_frames * SAMPLES_PER_FRAME + LOOK_AHEAD * HOP
    audio = audio[..., :end].float()
    audio = nnf.pad(audio, (before, end - audio.shape[-1]))           # (..., before + end)
    mel = _mel(audio.device)(audio)                                   # (..., MELS, hops)
    mel = ((mel + LOG_FLOOR).log() - LOG_MEAN) / LOG_STD
    return mel.unfold(-1, MEL_DIM // MELS, 4).movedim(-3, -1).flatten(-2)   # (..., F, MEL_DIM)


ENCODERS = "wav2vec2", "hubert", "wavlm", "whisper"
ENCODER_HOP = 320                                    # samples per feature of all of them: two features make a frame
PIECE, AROUND = 16 * FPS, 2 * FPS                    # frames that are heard at once, and heard more on either side


def encoder_width(name: str) -> int:
    """Read how many features `hear` will give per frame. Raises: MediaError where `name` is no speech encoder."""
    c = pretrained_config(name, ENCODERS, "a speech encoder")
    if math.prod(getattr(c, "conv_stride", [ENCODER_HOP])) != ENCODER_HOP:
        raise MediaError(name, f"makes a feature of {math.prod(c.conv_stride)} samples, not of {ENCODER_HOP}")
    return 2 * c.hidden_size


class SpeechEncoder:
    """A frozen speech encoder of transformers that gives two features a frame, aligned with it to the sample.

    Feature i of wav2vec2, HuBERT and WavLM is computed from samples [320 i, 320 i + 400) and stands for their middle,
    320 i + 200; that of Whisper stands for 320 i. With 40 zeros before the sound, or 160 and Whisper's first feature
    left out, both stand for 320 i + 160, the middle of the i-th half frame: frame f owns features 2f and 2f + 1, and
    nothing is interpolated. Attention then lets each feature know of all the sound, past and future.
    """

    def __init__(self, name: str, device: str = "cpu"):
        import transformers
        encoder_width(name)
        local, model = Path(name).is_dir(), pretrained(name, ENCODERS, "a speech encoder")
        whisper = model.config.model_type == "whisper"
        self.before, self.after, self.skip = (160, 0, 1) if whisper else (40, 40, 0)
        self.device, self.model = device, (model.get_encoder() if whisper else model).to(device)
        with loading(name, "a speech encoder"):
            self.extractor = transformers.AutoFeatureExtractor.from_pretrained(name, local_files_only=local)
            self.listen(torch.ones(SAMPLES_PER_FRAME))                # what cannot hear is found out now
        sign = hashlib.sha256(f"{self.model.config.to_json_string()}{self.extractor.to_json_string()}".encode())
        for weight in self.model.state_dict().values():
            sign.update(weight.cpu().numpy())
        self.fingerprint = sign.hexdigest()

    def listen(self, sound: Tensor) -> Tensor:
        """(F * 640,) -> (F, 2 hidden) of zero mean and unit variance: speech of one piece."""
        padded = nnf.pad(sound, (self.before, self.after)).numpy()
        inputs = self.extractor(padded, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(self.device)
        heard = self.model(**inputs).last_hidden_state[0, self.skip:][: len(sound) // ENCODER_HOP]
        return nnf.layer_norm(heard, heard.shape[-1:]).reshape(len(sound) // SAMPLES_PER_FRAME, -1).cpu()

    @torch.no_grad()
    def __call__(self, sound: Tensor, n_frames: int) -> Tensor:
        """(n_frames * 640,) -> (n_frames, 2 hidden): long speech piece by piece, each with two seconds around it."""
        parts = []
        for start in range(0, n_frames, PIECE):
            first, stop = max(0, start - AROUND), start + PIECE + AROUND
            heard = self.listen(sound[first * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME])
            parts.append(heard[start - first :][:PIECE])
        return torch.cat(parts)


speech_encoder = lru_cache(maxsize=1)(SpeechEncoder)


def hear(audio: Tensor, n_frames: int, encoder: str = "", device: str = "cpu",
         cache: str | Path | None = None) -> Tensor:
    """Describe the sound around each frame, (n_frames, C): `log_mel`, or by a speech encoder, once for each clip."""
    if not encoder:
        return log_mel(audio, n_frames)
    listener, samples = speech_encoder(encoder, str(device)), n_frames * SAMPLES_PER_FRAME
    sound = nnf.pad(audio[:samples].float(), (0, max(0, samples - len(audio))))
    recipe = {"encoder": listener.fingerprint, "sound": hashlib.sha256(sound.numpy()).hexdigest()}
    folder = _cached(cache, recipe, lambda to: np.save(to / "heard.npy", listener(sound, n_frames).numpy()))
    return torch.from_numpy(np.load(folder / "heard.npy"))


# ---- Synthetic talkers -----------------------------------------------------------------------------------------------
#
# One plan, a string of phones such as `_pPanaes_`, drives both halves of a clip, as tongue and lips do in one person.
# Shapes are fractions of the frame, x to the right and y down, so a talker is the same person at any size.

TICK = 80                                            # samples: the articulators are tracked every 5 ms
LIP_LEAD = 0.06      # seconds by which lips precede the sound; 100 ms is the high end (Chandrasekaran et al. 2009)
MOUTH = 0.185                                        # how far below the centre of the face

# A man's formants in Hz (Peterson & Barney 1952). `_` is silence, @ the e of "the", x the sh of "she"; an upper-case
# letter is the burst that ends a plosive. A phone of high dominance is never blurred away: lips do meet for an m.
PHONES = {  # F1   F2    F3  | voice noise  noise Hz | open width teeth (0..1) | dominance | seconds
    "_": (500, 1500, 2500,   .00, .00, 1000,   .00, .50, .0,   2.0, .300),
    "a": (750, 1200, 2550,   1.0, .00, 1000,   1.0, .60, .4,   1.0, .125),
    "e": (540, 1850, 2500,   .95, .00, 1000,   .60, .80, .6,   1.0, .110),
    "i": (290, 2250, 3000,   .80, .00, 1000,   .36, 1.0, .9,   1.0, .105),
    "o": (480,  850, 2450,   .95, .00, 1000,   .62, .15, .0,   1.2, .115),
    "u": (310,  800, 2300,   .80, .00, 1000,   .30, .00, .0,   1.3, .105),
    "@": (500, 1450, 2500,   .80, .00, 1000,   .42, .50, .3,   0.7, .070),
    "m": (250, 1100, 2200,   .28, .00, 1000,   .00, .45, .0,   8.0, .075),
    "n": (250, 1500, 2500,   .28, .00, 1000,   .20, .60, .5,   0.7, .065),
    "r": (350, 1150, 1650,   .50, .00, 1000,   .25, .35, .2,   0.8, .060),
    "w": (300,  650, 2200,   .45, .00, 1000,   .10, .00, .0,   3.0, .065),
    "s": (350, 1700, 2600,   .00, .55, 6000,   .15, .80, 1.,   2.0, .100),
    "f": (350, 1400, 2500,   .00, .28, 4500,   .07, .60, 1.,   5.0, .090),
    "x": (350, 1800, 2500,   .00, .55, 3000,   .20, .15, 1.,   2.0, .105),
    "p": (300,  900, 2200,   .00, .00, 1000,   .00, .50, .0,   8.0, .070),
    "t": (350, 1700, 2600,   .00, .00, 1000,   .18, .60, .7,   0.8, .060),
    "P": (400, 1000, 2300,   .00, .50,  900,   .10, .50, .0,   1.0, .015),
    "T": (400, 1700, 2600,   .00, .60, 4500,   .20, .60, .6,   0.6, .020),
}
TABLE = np.array(list(PHONES.values()), np.float32)  # (phones, 11)
ONSETS, VOWELS = "m n r w s f x pP tT m pP n".split(), list("aaaeeiioou@")
CODAS = [""] * 11 + "n s m tT r".split()


def plan_speech(rng: np.random.Generator, rate: float, n_ticks: int) -> tuple[np.ndarray, np.ndarray]:
    """Babble with the rhythm of speech: about five syllables a second, stresses, breaths.

    Returns: phone (T,) row of TABLE at each tick; stress (T,) 0 or 1.
    """
    n = n_ticks // 28 + 8                                     # enough: no syllable is below 140 ms on average
    stress, pause = rng.random(n) < 0.38, rng.random(n) < 0.13
    pause[:2] = False
    words = zip(rng.choice(ONSETS, n), rng.choice(VOWELS, n), rng.choice(CODAS, n))
    text = ["_"] + [o + v + c + "_" * int(p) for (o, v, c), p in zip(words, pause)]
    phone = np.array([list(PHONES).index(letter) for letter in "".join(text)])
    stress = np.repeat([False, *stress], [len(syllable) for syllable in text]) & (phone > 0)
    seconds = TABLE[phone, 10] / rate * rng.uniform(0.8, 1.25, len(phone)) * np.where(stress, 1.2, 1.0)
    seconds[phone == 0] = rng.uniform(0.18, 0.6, (phone == 0).sum())
    seconds[0] = rng.uniform(0.14, 0.4)
    now = np.searchsorted(np.cumsum(seconds), (np.arange(n_ticks) + 0.5) * TICK / SAMPLE_RATE)
    return phone[now], stress[now].astype(np.float32)


def smooth(track: np.ndarray, seconds: float) -> np.ndarray:
    """Average a track (T,) or (T, C) over a Hann window of the given length."""
    n = int(seconds * SAMPLE_RATE / TICK) // 2
    window = np.hanning(2 * n + 3)[1:-1] / (n + 1)
    padded = np.pad(track, [(n, n)] + [(0, 0)] * (track.ndim - 1), mode="edge")
    return np.apply_along_axis(np.convolve, 0, padded, window, "valid").astype(np.float32)


def speak(rng: np.random.Generator, voice: dict, phone: np.ndarray, stress: np.ndarray) -> Tensor:
    """Speak (T * 80,) samples in a quiet room. Source and filter (Fant 1960), in windows of 20 ms:

        speech(f) = pulses(f) * prod_k F_k^2 / (F_k^2 - f^2 + i f B_k) + noise(f) * band(f)
    """
    control, n = TABLE[phone], len(phone) * TICK
    formants = np.concatenate([smooth(control[:, :3], 0.05), np.tile(np.float32([3500, 4500]), (len(phone), 1))], 1)
    gain = smooth(control[:, 3:5] * (0.75 + 0.35 * stress[:, None]), 0.015)
    noise_hz = smooth(control[:, 5], 0.02)
    semitones = 3.5 * voice["melody"] * smooth(stress, 0.25) + 0.25 * rng.standard_normal(len(phone))   # and jitter
    at, ticks = np.arange(n), (np.arange(len(phone)) + 0.5) * TICK
    phase = np.cumsum(np.interp(at, ticks, voice["pitch"] * 2 ** (semitones / 12)) / SAMPLE_RATE) % 1.0

    # The derivative of Rosenberg's glottal flow (1971): the folds open slowly, then shut at once.
    opening, closing = voice["open"], 0.16
    shutting = np.where(phase < opening + closing, -np.sin(np.pi * (phase - opening) / (2 * closing)) / closing, 0)
    pulses = np.where(phase < opening, np.sin(np.pi * phase / opening) / opening, shutting)
    hiss = rng.standard_normal(n)
    sources = np.stack([np.interp(at, ticks, gain[:, 0]) * (pulses + voice["breath"] * hiss * (phase < opening)),
                        np.interp(at, ticks, gain[:, 1]) * hiss]).astype(np.float32)

    hz = np.fft.rfftfreq(6 * TICK, 1 / SAMPLE_RATE).astype(np.float32) + 1.0
    window = np.hanning(4 * TICK + 1)[:-1].astype(np.float32) / 2  # 20 ms, hop 5 ms: shifted copies add up to one
    short = np.lib.stride_tricks.sliding_window_view(np.pad(sources, ((0, 0), (120, 120))), 4 * TICK, 1)[:, ::TICK]
    audio = np.zeros((len(phone) + 5, TICK), np.float32)
    for t in range(0, len(phone), 1024):                           # 5 s at a time, so that memory is bounded
        part = slice(t, min(t + 1024, len(phone)))
        spectrum = np.fft.rfft(short[:, part] * window, 6 * TICK).astype(np.complex64)            # (2, T, 241)
        for f, b in zip(voice["tract"] * formants[part].T[:, :, None], (80, 100, 150, 250, 300)):
            spectrum[0] *= f * f / (f * f - hz * hz + 1j * hz * b)
        spectrum[1] *= np.exp(-0.5 * (np.log2(hz / noise_hz[part, None]) / 0.45) ** 2)
        wave = np.fft.irfft(0.12 * spectrum[0] + spectrum[1]).reshape(-1, 6, TICK)
        for k in range(6):                                         # overlap and add
            audio[t + k : part.stop + k] += wave[:, k]
    audio = audio.reshape(-1)[120 : 120 + n] + 0.003 * rng.standard_normal(n)
    return torch.from_numpy(audio.astype(np.float32))


def move(rng: np.random.Generator, who: dict, phone: np.ndarray, stress: np.ndarray) -> dict[str, np.ndarray]:
    """Move lips with the phones, brows and head with the stress; sway and blink. Neighbouring phones blend:

        lip(t) = <dominance * target> / <dominance>,  averaged over 120 ms around t + LIP_LEAD (Cohen & Massaro 1993)

    Returns: opening, width (F,) in units of the face; teeth, blink, brow (F,); head (F, 4) dx dy roll log-scale.
    """
    n_frames, lead = len(phone) // 8, int(LIP_LEAD * SAMPLE_RATE / TICK)
    ahead, accent = (np.pad(track, (0, lead), mode="edge")[lead:] for track in (phone, stress))
    target, dominance = TABLE[ahead, 6:9].copy(), TABLE[ahead, 9:10]
    target[:, 0] *= 0.85 + 0.25 * accent
    lips = smooth(dominance * target, 0.12) / smooth(dominance, 0.12)                  # (T, 3)
    opening, width, teeth = lips[4::8].T                                               # at the middle of each frame
    accent = smooth(accent, 0.3)[4::8]

    seconds = np.arange(n_frames) / FPS
    hz, turn = rng.uniform(0.2, 0.75, (4, 3)), rng.uniform(0, 2 * np.pi, (4, 3))
    sway = np.sin(2 * np.pi * seconds[:, None, None] * hz + turn) @ np.array([0.8, 0.7, 0.6])         # (F, 4)
    head = sway * [0.012, 0.0115, 0.0245, 0.0087] + accent[:, None] * [0, 0.012, 0, 0]   # a nod on each stress
    shut = np.cumsum(rng.uniform(50, 105, n_frames // 50 + 2)) - rng.uniform(0, 50)
    away = np.abs(np.arange(n_frames)[:, None] - shut.clip(8)).min(1)                  # frames from the nearest blink
    return {"opening": (opening - 0.05).clip(0) / 0.95 * who["gape"],                  # lips below 5% are pressed
            "width": who["mouth"] * (0.66 + 0.54 * width), "teeth": teeth, "blink": (1.5 - 0.9 * away).clip(0, 1),
            "brow": who["liveliness"] * (0.9 * accent + 0.15 * np.sin(seconds * 1.3 + turn[0, 0])),
            "head": who["liveliness"] * (head - head[0])}                              # a clip begins at rest


ANGLES = np.radians([0, 25, 50, 75, 100, 140, 180])                     # from the chin up
FACES = {"man": np.array([.318, .296, .264, .246, .248, .298, .338]),   # radii at ANGLES: chin, jaw, cheek .. crown
         "woman": np.array([.312, .284, .256, .245, .247, .296, .336])}
SKINS = np.array([(253, 226, 208), (246, 206, 178), (232, 184, 148), (208, 153, 113), (96, 61, 43)]) / 255
HAIRS = np.array([(34, 27, 27), (58, 38, 28), (98, 60, 36), (138, 66, 34), (216, 180, 112), (190, 182, 172)]) / 255
IRISES = np.array([(78, 48, 28), (104, 70, 38), (96, 110, 62), (70, 112, 150), (98, 128, 142)]) / 255
CLOTHES = np.array([(44, 58, 92), (122, 42, 54), (52, 92, 84), (226, 222, 212), (196, 146, 62), (188, 96, 78)]) / 255
WALLS = np.array([(176, 196, 206), (206, 178, 150), (150, 168, 150), (110, 126, 150), (214, 206, 192)]) / 255
STYLES = {  # lift of the hair over the skull at ANGLES | hairline y, temple, squareness | length at the back | waviness
    "short": ([.000, .000, .000, .010, .016, .026, .036], .275, .226, 2.5, 0.00, .004),
    "curly": ([.000, .000, .000, .030, .044, .048, .044], .290, .222, 2.2, 0.00, .014),
    "bald":  ([.000, .000, .000, .010, .010, .000, .000], .100, .236, 2.0, 0.00, .002),
    "long":  ([.030, .030, .034, .036, .036, .036, .036], .285, .214, 2.1, 0.46, .005),
    "bob":   ([.020, .020, .034, .044, .044, .040, .038], .372, .206, 4.0, 0.24, .003),
}


def cast(rng: np.random.Generator) -> dict:
    """Choose a person: all that never changes in a clip."""
    uniform, normal, tone = rng.uniform, rng.normal, rng.uniform(0, len(SKINS) - 1)
    man, light = bool(rng.random() < 0.5), rng.choice([-1, 1])           # the side that light comes from
    skin = np.array([np.interp(tone, np.arange(len(SKINS)), c) for c in SKINS.T]) * uniform(0.98, 1.01, 3)
    rouge, rose = 0.25 if man else uniform(0.3, 0.75), np.array([0.80, uniform(0.2, 0.38), 0.32]) * skin[0] ** 0.5
    styles = "short short short curly bald" if man else "long long bob bob curly short"
    who = {
        # Inside the mouth is plum and white, off the plane of skin and lips, so that the pixel oracle can tell.
        "skin": skin, "lip": skin * (0.88, 0.66, 0.66) * (1 - rouge) + rouge * rose,
        "interior": np.array([0.25, 0.02, 0.135]) * uniform(0.85, 1.1),
        "teeth": np.array([0.95, 0.955, 0.955]) * uniform(0.95, 1),
        "hair": HAIRS[rng.integers(0, 2 if tone > 3.2 else 6)] * uniform(0.9, 1.1),
        "iris": IRISES[rng.integers(0, 2 if tone > 2.8 else 5)] * uniform(0.85, 1.15),
        "wall": rng.choice(WALLS), "cloth": rng.choice(CLOTHES), "style": rng.choice(styles.split()),
        "x": 0.5 + normal(0, 0.005), "y": 0.51 + normal(0, 0.005), "zoom": uniform(1.18, 1.26),
        "radii": FACES["man" if man else "woman"] * normal(1, 0.015) + normal(0, 0.004, 7),
        "eye": uniform(0.049, 0.058), "lid": uniform(0.021, 0.027) + 0.004 * (not man), "light": light,
        "tilt": normal(0.04, 0.05), "apart": normal(0.107, 0.003), "lash": 0.0055 if man else 0.008,
        "brow": uniform(0.010, 0.014) if man else uniform(0.006, 0.010), "arch": uniform(0.006, 0.015),
        "nose": uniform(0.8, 1.15), "mouth": uniform(0.145, 0.172), "gape": uniform(0.066, 0.086),
        "lips": uniform(0.8, 1.25) * (0.9 if man else 1.1), "smile": uniform(0.002, 0.010), "man": man,
        "beard": rng.choice([0, 0, 0.3, 0.92]) if man else 0, "part": rng.choice([-1, 1]) * uniform(0, 0.35),
        "grain": uniform(0, 2 * np.pi, 6), "liveliness": uniform(0.85, 1.2), "glasses": rng.random() < 0.22,
        "voice": {"pitch": uniform(92, 140) if man else uniform(170, 260), "melody": uniform(0.7, 1.3),
                  "tract": (1 if man else 1.16) * uniform(0.95, 1.06),
                  "open": uniform(0.42, 0.6), "breath": uniform(0.02, 0.12), "rate": uniform(0.88, 1.12)},
    }
    return {k: x.astype(np.float32) if isinstance(x, np.ndarray) else x.item() if isinstance(x, np.generic) else x
            for k, x in who.items()}                                      # float64 would double the cost


def cover(distance: np.ndarray, soft: float) -> np.ndarray:
    """Turn a signed distance (inside is positive) into coverage 0..1, a smoothstep as wide as `soft`."""
    t = (distance / np.float32(soft) + np.float32(0.5)).clip(0, 1)
    return t * t * (3 - 2 * t)


def between(v: np.ndarray, upper: np.ndarray, lower: np.ndarray, soft: float) -> np.ndarray:
    """Cover the band between two curves; its area is exact however thin it is, so closed lips or lids leave nothing."""
    return cover(lower - v, soft) - cover(upper - v, soft)


def ellipse(u: np.ndarray, v: np.ndarray, rx: float, ry: float) -> np.ndarray:
    """Signed distance to an ellipse, exact near its edge: k (1 - k) / |grad k| with k = |(u/rx, v/ry)| (Quilez)."""
    k = np.hypot(u / rx, v / ry)
    return k * (1 - k) / (np.hypot(u / rx**2, v / ry**2) + 1e-6)


def outline(u: np.ndarray, v: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Signed distance to r(a) = sum_k c_k cos(k a), the symmetric curve through `radii` at ANGLES."""
    series = np.linalg.solve(np.cos(ANGLES[:, None] * np.arange(7)), radii).astype(np.float32)
    r = np.hypot(u, v) + np.float32(1e-6)
    return np.polynomial.chebyshev.chebval(v / r, series) - r           # cos(k a) is the k-th polynomial of cos(a)


def paint(canvas: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    """Lay a colour (3,) or (3, ...) over a canvas (3, ...), or opaquely over one with alpha (4, ...), in place."""
    colour = np.float32(colour).reshape(np.shape(colour) + (1,) * (canvas.ndim - np.ndim(colour)))
    canvas[:3] += coverage * (colour - canvas[:3])
    canvas[3:] += coverage * (1 - canvas[3:])


class Sheet:
    """What does not move by itself, painted back to front: pixels (4, T, T), colours multiplied by alpha."""

    def __init__(self, who: dict, size: int, soft: float):
        centre = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.u, self.v = np.meshgrid((centre - who["x"]) / who["zoom"], (centre - who["y"]) / who["zoom"])
        self.pixels, self.who, self.size, self.soft = np.zeros((4, size, size), np.float32), who, size, soft
        self.shadow, self.glow = who["skin"] * (0.70, 0.56, 0.53), who["skin"] * 0.55 + np.array([0.45, 0.43, 0.40])
        self.inner = outline(self.u, self.v, who["radii"])
        self.face = cover(self.inner, soft)
        self.comb(), self.paint_body(), self.paint_face(), self.paint_hair()

    def comb(self) -> None:
        """Shape and colour the hair: strands fan out from the parting, light runs across them, curls are a weave."""
        u, v, who, g, light = self.u, self.v, self.who, self.who["grain"], self.who["light"]
        lift, *_, wave = STYLES[who["style"]]
        whorl, around = np.arctan2(u - 0.3 * who["part"], v + 0.58), np.arctan2(u, v)
        strands = sum(a * np.sin(whorl * k + p) for a, k, p in ((0.5, 47, g[0]), (0.35, 83, g[1]), (0.3, 131, g[2])))
        if who["style"] == "curly":
            strands = 0.8 * np.sin(u * 110 + 2 * np.sin(v * 60 + g[0])) * np.sin(v * 100 + 2 * np.sin(u * 70 + g[1]))
        self.waves = wave * (np.sin(around * 11 + g[3]) * 0.5 + np.sin(around * 29 + g[4]) * 0.5)
        self.skull, self.strands = outline(u, v, who["radii"] + np.array(lift)) + self.waves, strands
        sheen = np.exp(-((self.skull - 0.05) / 0.022) ** 2) * (0.55 + 1.6 * light * u).clip(0, 1)
        fade = 1 - 0.35 * (v * 1.2 + 0.2).clip(0, 1) - 0.25 * (0.5 - light * u * 2).clip(0, 1)
        hair, shine = who["hair"][:, None, None], who["hair"][:, None, None] + np.float32(0.35)
        self.hair = (hair * fade * (1 + 0.16 * strands) + shine * 0.14 * sheen * (1 + 0.5 * strands)).clip(0, 1)

    def paint_body(self) -> None:
        """Paint the hair that falls behind, the neck in the shadow of the head, and a jumper."""
        u, v, soft, who, sheet, beside = self.u, self.v, self.soft, self.who, self.pixels, np.abs(self.u)
        length, wave = STYLES[who["style"]][-2:]
        if length:
            wide = 0.235 + 0.055 * cover(v - 0.04, 0.34) + 1.5 * wave * np.sin(v * 30 + who["grain"][5] + np.sign(u))
            curtain = np.minimum.reduce([wide - beside, length - 0.1 * beside - v + self.waves, v + 0.12])
            paint(sheet, cover(curtain, soft), self.hair * 0.72)
        dim = cover(-u * who["light"], 0.35)                               # 0 on the lit side, 1 in the shade
        width = (0.128 if who["man"] else 0.104) + 0.09 * ((v - 0.33).clip(0) / 0.12) ** 2
        neck = cover(np.minimum(width - beside, v), soft)
        paint(sheet, neck, who["skin"] * 0.95)
        paint(sheet, neck * 0.6 * dim, self.shadow)
        under = cover(outline(u + 0.02 * who["light"], v - 0.05, who["radii"]), 0.05)
        paint(sheet, neck * 0.55 * under, self.shadow * 0.9)
        shoulder = v - 0.355 - 0.12 * ((beside - 0.10).clip(0) / 0.38) ** (1.25 if who["man"] else 1.0)
        hole = v - 0.362 - 0.036 * (1 - (u / 0.145) ** 2)                  # for the neck, with a hem
        torso = cover(np.minimum(shoulder, hole), soft)
        paint(sheet, torso, who["cloth"])
        paint(sheet, torso * (0.3 * dim + 0.2 * cover(0.013 - hole, soft)), who["cloth"] * 0.1)

    def blob(self, x, y, rx, ry, colour, opacity=1.0, blur=None, inside=None) -> None:
        """Paint an ellipse in its own crop of the sheet; `blur` widens its edge, `inside` (T, T) confines it."""
        blur, (row, column) = blur or self.soft, np.array([y, x]) * self.who["zoom"] + (self.who["y"], self.who["x"])
        half = np.array([ry + blur, rx + blur]) * self.who["zoom"]
        low, high = (((row, column) + sign * half) * self.size for sign in (-1, 1))
        crop = tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high))
        mask = opacity * cover(ellipse(self.u[crop] - x, self.v[crop] - y, rx, ry), blur)
        paint(self.pixels[(slice(None), *crop)], mask if inside is None else mask * inside[crop], colour)

    def paint_face(self) -> None:
        """Paint ears and face, lit from one side; cheeks and nose are only light and shade."""
        who, skin, light, shadow, glow = self.who, self.who["skin"], self.who["light"], self.shadow, self.glow
        ear, n = who["radii"][3] + 0.008, who["nose"]
        for side in (-1, 1):
            self.blob(side * ear, 0.005, 0.030, 0.062, skin * (0.94 if side == light else 0.78))
        turn = np.tanh(light * self.u * 3.4 - self.v * 0.9 - 0.1)          # 1 towards the light, -1 away from it
        rim = 0.45 * (1 - self.inner / 0.05).clip(0, 1) ** 2 * (1 - 0.6 * (turn > 0.4))
        paint(self.pixels, self.face, skin)
        paint(self.pixels, self.face * ((0.25 - turn).clip(0) * 0.5 + rim).clip(0, 1) * 0.9, shadow)
        paint(self.pixels, self.face * 0.12 * turn.clip(0), glow)
        for sides, x, *spot in (  # x, y, radii, colour, opacity, blur; +- stands for one on each side
                ("+-", who["apart"], -0.055, 0.085, 0.055, shadow, 0.32, 0.09),                    # eye sockets
                ("+-", 0.135, 0.085, 0.075, 0.055, skin * (0.95, 0.66, 0.62), 0.34, 0.10),         # cheeks
                ("+", light * 0.05, -0.185, 0.13, 0.06, glow, 0.30, 0.12),                         # forehead
                ("+", light * 0.01, 0.278, 0.04, 0.022, glow, 0.22, 0.045),                        # chin
                ("+", -light * 0.021, 0.02, 0.017, 0.085, shadow, 0.30, 0.034),                    # nose: the dark side
                ("+", light * 0.004, 0.00, 0.010, 0.085, glow, 0.45, 0.022),                       # its bridge
                ("+", 0, 0.104, 0.046 * n, 0.016, shadow, 0.50, 0.026),                            # the shadow below
                ("+-", 0.029 * n, 0.083, 0.016, 0.019, shadow, 0.46, 0.018),                       # its wings
                ("+", 0, 0.076, 0.028 * n, 0.025, skin * 0.99, 0.85, 0.026),                       # its tip,
                ("+", light * 0.007, 0.070, 0.012, 0.010, glow, 0.75, 0.016),                      # and the light on it
                ("+-", 0.0155 * n, 0.098, 0.0095 * n, 0.0055, skin * (0.48, 0.36, 0.33), 0.85, 1.3 * self.soft)):
            for sign in sides:
                self.blob(float(f"{sign}1") * x, *spot, self.face)

    def paint_hair(self) -> None:
        """Paint stubble or a beard, then the cap of hair: the skull less a window for the face."""
        u, v, soft, who, sheet, beside = self.u, self.v, self.soft, self.who, self.pixels, np.abs(self.u)
        bristle = np.minimum(self.hair * 0.85, np.float32([0.52, 0.43, 0.34])[:, None, None])
        cheek = cover(-ellipse(u, v + 0.03, 0.195, 0.215) - 0.01 * self.strands, 0.03) * cover(v - 0.05, 0.14)
        moustache = cover(ellipse(beside - 0.035, v - 0.143 - 0.25 * (beside - 0.03).clip(0), 0.052, 0.017), 0.016)
        paint(sheet, np.maximum(cheek, moustache) * self.face * who["beard"], bristle)
        _, hairline, temple, square, length, _ = STYLES[who["style"]]
        across, fringe = np.abs(u - 0.05 * who["part"] * (v < 0)) / temple, 0.008 * self.strands * (square > 2.2)
        above = (0.10 - v + 0.35 * who["part"] * u + fringe).clip(0) / (0.62 - hairline)
        window = (1 - (across**square + above**square) ** (1 / square)) * 0.26
        cap = cover(np.minimum(self.skull, -window), soft)
        if not length:                                                     # short hair ends above the ears
            cap = cap * cover(0.005 - v + 0.012 * self.strands, 0.02)
        if who["style"] != "bald":
            paint(sheet, 0.38 * self.face * cover(0.012 - window, 0.055) * cover(0.05 - v, 0.1), self.shadow)
        paint(sheet, cap, self.hair * (0.72 + 0.28 * (-window / 0.04).clip(0, 1)))


def draw_eyes(canvas: np.ndarray, u: np.ndarray, v: np.ndarray, who: dict, m: dict, soft: float) -> None:
    """Paint both eyes, brows and glasses on crops (3, F, h, w); eyes mirror one another, gazes do not."""
    side, a = np.sign(u), np.abs(u) - np.float32(who["apart"])                 # a grows outwards
    y, t, skin, dark = v + 0.05 + who["tilt"] * a, a / who["eye"], who["skin"], np.array([0.10, 0.065, 0.06])
    arch = (1 - t * t).clip(0)
    top, bottom = -who["lid"] * arch * (1.08 - 0.12 * t), 0.62 * who["lid"] * arch
    lid = top + m["blink"] * (bottom - top)
    paint(canvas, between(y, top, lid, soft), skin * (0.90, 0.80, 0.77))
    eye = between(y, lid, bottom, soft)
    paint(canvas, eye, (0.95, 0.94, 0.92))
    gaze = a - side * (0.004 - 0.25 * m["head"][0]), y - 0.001                 # they stay on you while the head sways
    disc = 0.022 - np.hypot(*gaze)
    paint(canvas, eye * cover(disc, soft), who["iris"] * 0.45)
    paint(canvas, eye * cover(disc - 0.004, soft + 0.004), who["iris"] * 1.12)
    paint(canvas, eye * cover(disc - 0.0115, soft), dark * 0.5)
    paint(canvas, eye * 0.45 * between(y, lid, lid + 0.011, 0.01 + soft), dark * 2)
    spark = 0.0058 - np.hypot(gaze[0] - side * who["light"] * 0.007, gaze[1] + 0.008)
    paint(canvas, 0.95 * eye * cover(spark, soft), (1, 1, 1))
    lash = who["lash"] * arch**0.3 * (1 + 0.5 * t)
    paint(canvas, 0.92 * between(y, lid - lash, lid + 0.0015, soft) * (arch > 0), dark)

    t = (a + 0.004) / 0.068
    ridge = v + 0.104 + 0.018 * m["brow"] + who["arch"] * (1 - (t - 0.1) ** 2)
    half = who["brow"] * (0.95 - 0.45 * t) * (1 - t * t).clip(0) ** 0.4
    paint(canvas, 0.88 * between(ridge, -half, half, soft + 0.003), who["hair"] * 0.7)
    if who["glasses"]:
        rim = np.abs((np.abs(a / 0.078) ** 3 + np.abs((v + 0.04) / 0.060) ** 3) ** (1 / 3) - 1) * 0.066
        bar = between(v + 0.05, -0.004, 0.004, soft) * ((a < -0.076) | (a > 0.078))
        paint(canvas, 0.9 * np.maximum(cover(0.0042 - rim, soft), bar), who["cloth"] * 0.3)


def draw_mouth(canvas: np.ndarray, u: np.ndarray, v: np.ndarray, who: dict, m: dict, soft: float) -> None:
    """Paint lips and what is between them on crops (3, F, h, w); the open area is 2/3 opening * width exactly."""
    lip, light, t = who["lip"], who["light"], u / (m["width"] / 2)
    y = v - MOUTH + who["smile"] * np.minimum(t * t, 1.1)
    arch = (1 - t * t).clip(0)
    top, bottom = -0.28 * m["opening"] * arch, 0.72 * m["opening"] * arch
    outer = u / (m["width"] / 2 * 1.08 + 0.006)
    swell = (1 - outer * outer).clip(0)
    full = who["lips"] * (1.25 - 0.25 * m["width"] / who["mouth"])                # round lips are thick
    bow = 1 - 0.30 * np.exp(-((u / 0.012) ** 2))
    upper, lower = top - 0.0185 * full * bow * swell**0.8, bottom + 0.024 * full * swell**0.65
    paint(canvas, 0.30 * between(y, lower, lower + 0.018, 0.02) * swell, who["skin"] * (0.62, 0.48, 0.46))
    paint(canvas, between(y, upper, lower, soft), lip)
    paint(canvas, 0.55 * between(y, upper, top, soft), lip * (0.76, 0.70, 0.70))
    wet = cover(0.4 - np.hypot((u - 0.01 * light) / 0.05, (y - bottom - 0.010 * full) / 0.010), 0.8)
    paint(canvas, 0.40 * wet * swell, lip * 0.4 + 0.58)
    paint(canvas, 0.85 * between(y, top - 0.0028, bottom + 0.0028, soft) * swell, lip * (0.50, 0.40, 0.40))
    mouth = between(y, top, bottom, soft)
    paint(canvas, mouth, who["interior"])
    tongue = mouth * cover(ellipse(u, y - bottom - 0.004, 0.042, 0.024), 0.016) * 0.55
    paint(canvas, tongue * (m["opening"] > 0.02), (0.70, 0.26, 0.36))
    edge = np.minimum(bottom, top + (0.010 + 0.010 * m["teeth"]) * (1 - 0.5 * t * t).clip(0))
    paint(canvas, between(y, top, edge, soft) * (1 - 0.25 * t * t).clip(0), who["teeth"])


def draw_frames(who: dict, m: dict, sheet: Tensor, wall: Tensor, size: int) -> Tensor:
    """Bend the sheet and paint what moves by itself. Returns: (F, 3, size, size) uint8.

    q = pivot + exp(-log_scale) R(-roll) (p - pivot - shift) is where pixel p was before the head moved; the sheet is
    read at p + w (q - p), w falling from 1 at the chin to 0 at the chest, and higher up where the jaw drops.
    """
    pixel, zoom = (np.arange(size, dtype=np.float32) + 0.5) / size, who["zoom"]
    m = {k: z.T[..., None, None] for k, z in m.items()}                   # (F, 1, 1); head (4, F, 1, 1)
    dx, dy, roll, log_scale = m["head"]
    cos, sin = np.exp(-log_scale) * np.cos(roll), np.exp(-log_scale) * np.sin(roll)
    x, y, px, py = pixel[None, None, :], pixel[None, :, None], who["x"], who["y"] + 0.3 * zoom
    ax, ay = x - px - dx, y - py - dy
    qx, qy = px + cos * ax + sin * ay, py - sin * ax + cos * ay           # (F, S, S), where the sheet has the pixel
    u, v = (qx - who["x"]) / zoom, (qy - who["y"]) / zoom
    weight = cover(who["y"] + 0.38 * zoom - y, 0.13 * zoom)
    middle = v[:, :, size // 2 : size // 2 + 1]
    jaw = 0.45 * zoom * m["opening"] * cover(middle - 0.21, 0.08) * cover(0.37 - middle, 0.10)
    grid = np.stack([x + weight * (qx - x), y + weight * (qy - y) - jaw], -1).reshape(1, -1, size, 2)
    bent = nnf.grid_sample(sheet[None], torch.from_numpy(grid * 2 - 1), padding_mode="border", align_corners=False)
    bent = bent[0].view(4, -1, size, size)
    frames = (bent[:3] + (1 - bent[3:]) * wall[:, None]).numpy()          # (3, F, S, S)
    for draw, at, wide, high in ((draw_eyes, -0.06, 0.25, 0.095), (draw_mouth, MOUTH + 0.02, 0.12, 0.095)):
        near = (np.abs(u) < wide) & (np.abs(v - at) < high)               # the part, wherever the head has taken it
        rows, columns = (np.flatnonzero(near.any(axes)) for axes in ((0, 2), (0, 1)))
        crop = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        draw(frames[(slice(None), *crop)], u[crop], v[crop], who, m, 1 / size)
    return torch.from_numpy((frames.clip(0, 1) * 255 + 0.5).astype(np.uint8).swapaxes(0, 1))


def render_talker(index: int, seed: int, size: int, n_frames: int) -> Clip:
    """Draw talker `index` of world `seed`, speaking; the same person and speech at any size.

    Truth: opening, width (F,) of the open mouth in fractions of the frame; blink, brow (F,); head (F, 4) = dx, dy
    (fractions), roll (radians), log-scale; mouth_box (4,) x0 y0 x1 y1 wide enough for any sway; four colours (3,).
    """
    who = cast(np.random.default_rng([seed, index, 0]))
    speech, motion = (np.random.default_rng([seed, index, k]) for k in (1, 2))
    plan = plan_speech(speech, who["voice"]["rate"], max(n_frames, 50) * SAMPLES_PER_FRAME // TICK)
    audio = normalise_loudness(speak(speech, who["voice"], *plan))[: n_frames * SAMPLES_PER_FRAME]
    m = {k: x[:n_frames].astype(np.float32) for k, x in move(motion, who, *plan).items()}
    sheet = torch.from_numpy(Sheet(who, 2 * size, 0.8 / size).pixels)     # twice as fine: bending it blurs nothing
    x, y = np.meshgrid(*2 * [(np.arange(size, dtype=np.float32) + 0.5) / size])
    near = np.exp(-((x - 0.5 - 0.3 * who["light"]) ** 2 + (y - 0.3) ** 2) / 0.25)
    wall = torch.from_numpy((who["wall"][:, None, None] * (0.72 + 0.34 * near - 0.18 * y)).clip(0, 1))
    frames = torch.cat([draw_frames(who, {k: x[f : f + 8] for k, x in m.items()}, sheet, wall, size)
                        for f in range(0, n_frames, 8)])                  # 8 frames at a time stay in the cache
    scale = who["zoom"] * np.exp(m["head"][:, 3])
    box = [who["x"] - 0.18, who["y"] + 0.12, who["x"] + 0.18, who["y"] + 0.37]
    truth = m | {"opening": m["opening"] * scale, "width": m["width"] * scale, "mouth_box": box}
    truth |= {k: who[k] for k in ("skin", "lip", "interior", "teeth")}
    return Clip(f"talker-{seed}-{index}", frames, audio,
                {k: torch.as_tensor(np.asarray(x, np.float32)) for k, x in truth.items()})


# ---- Clips on disk ---------------------------------------------------------------------------------------------------
#
# A cache folder holds one file of tensors per clip, and index.json; its name hashes all that shaped it. It is renamed
# from a temporary name when complete, so whoever sees the name sees the whole.

class Clips(Sequence):
    """The clips `rows` of a cache folder: `clips[i]` is a Clip, `clips[a:b]` are Clips.

    safetensors maps a clip's file: pages are read when touched, and writing to a tensor never reaches the file.
    """

    def __init__(self, folder: str | Path, rows: Sequence[int] | None = None):
        self.folder = Path(folder)
        self.index = json.loads((self.folder / "index.json").read_text())
        self.rows = list(range(len(self.index["clips"])) if rows is None else rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int | slice) -> "Clip | Clips":
        if isinstance(i, slice):
            return Clips(self.folder, self.rows[i])
        row = self.rows[i]
        truth = load_file(self.folder / f"{row}.safetensors")
        return Clip(self.index["clips"][row][0], truth.pop("frames"), truth.pop("audio"), truth or None)

    @property
    def names(self) -> list[str]:
        return [self.index["clips"][row][0] for row in self.rows]


def _write_clips(folder: Path, clips: Iterable[tuple], skipped: dict[str, str]) -> None:
    """Write clips (name, source file, frames, audio, truth) to a cache folder, none of them kept in memory."""
    index = []
    for name, source, frames, audio, truth in clips:
        arrays = {"frames": frames, "audio": audio, **truth}
        arrays = {key: np.asarray(x, order="C") for key, x in arrays.items()}        # safetensors ignores strides
        save_arrays(arrays, folder / f"{len(index)}.safetensors")
        index.append((name, source))
        os.utime(folder)                             # a sign of life, see _cached
    (folder / "index.json").write_text(json.dumps({"clips": index, "skipped": skipped}))


def _cached(cache: str | Path | None, recipe: dict, build: Callable[[Path], None]) -> Path:
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

def _decode(path: Path, size: int, crop: tuple[int, int, int] | None, part: Path) -> tuple[np.ndarray, Tensor]:
    """Decode one video file to frames (F, 3, S, S) uint8, mapped from `part`.rgb, and audio (F * 640,) float32."""
    x, y, side = crop or ("(iw-ow)/2", "(ih-oh)/2", "min(iw,ih)")
    # ffmpeg would move a crop that leaves the picture back inside: ask for an impossible width instead.
    width = f"if(lte({x}+{side},iw)*lte({y}+{side},ih),{side},0)" if crop else side
    picture = (f"fps={FPS}:start_time=0,scale=w='round(iw*sar)':h=ih,"                # square pixels, upright
               f"crop=w='{width}':h='{side}':x='{x}':y='{y}':exact=1,"
               f"scale={size}:{size}:flags=lanczos+accurate_rnd+full_chroma_int")
    rgb, f32 = part.with_suffix(".rgb"), part.with_suffix(".f32")
    _ffmpeg(path, "-map", "0:V:0", "-vf", picture, "-pix_fmt", "rgb24", "-f", "rawvideo", str(rgb), *SOUND, str(f32))
    sound = torch.from_numpy(np.fromfile(f32, np.float32))
    f32.unlink()
    n_video, n_audio = rgb.stat().st_size // (3 * size * size), len(sound) // SAMPLES_PER_FRAME
    n_frames = n_video if n_video <= n_audio + AUDIO_SLACK else n_audio
    if n_frames < MIN_FRAMES:
        raise MediaError(path, f"has {n_frames} frames with sound; a clip needs {MIN_FRAMES}")
    n_samples = n_frames * SAMPLES_PER_FRAME
    sound = nnf.pad(normalise_loudness(sound, path), (0, max(0, n_samples - len(sound))))[:n_samples]
    return np.memmap(rgb, np.uint8, "r", shape=(n_frames, size, size, 3)).transpose(0, 3, 1, 2), sound.numpy()


def load_clip(path: str | Path, size: int, crop: tuple[int, int, int] | None = None) -> Clip:
    """Read one video file as a Clip at `size` pixels, of a second or more. Raises: MediaError if it cannot be used."""
    with tempfile.TemporaryDirectory() as folder:
        frames, audio = _decode(Path(path), size, crop, Path(folder) / "clip")
        return Clip(str(path), torch.from_numpy(frames.copy()), torch.from_numpy(audio))


def _decode_all(folder: Path, names: list[str], size: int, length: int, crop, parts: Path, skipped: dict) -> Iterator:
    """Decode files side by side (ffmpeg works, threads wait) and cut them, in order, into clips of `length` frames."""
    def attempt(i: int):
        try:
            return _decode(folder / names[i], size, crop, parts / f"{i}")
        except MediaError as error:
            skipped[names[i]] = error.args[-1]
            return (), ()

    parts.mkdir()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = pool.map(attempt, range(len(names)))
        for i, (frames, sound) in enumerate(tqdm(results, "decoding", len(names), unit="file")):
            for k, start in enumerate(range(0, len(frames) - MIN_FRAMES + 1, length)):
                clip, first, name = frames[start : start + length], start * SAMPLES_PER_FRAME, f"{names[i]}#{k}"
                if clip[0].std((1, 2)).max() < BLANK_STD:
                    skipped[name] = "begins with an empty picture, so it has no portrait; trim it"
                else:
                    yield name, names[i], clip, sound[first : first + len(clip) * SAMPLES_PER_FRAME], {}
            (parts / f"{i}.rgb").unlink(missing_ok=True)
    finally:
        pool.shutdown(cancel_futures=True)           # after Ctrl-C do not decode the rest first
        shutil.rmtree(parts)


def _held_out(names: Iterable[str]) -> set[str]:
    """Choose the held-out files by the hash of their names: those below HELD_OUT, but at least one and never all.
    A file's hash never changes, so adding files moves none from training to held-out."""
    rank = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 for name in names}
    below = sum(value < HELD_OUT for value in rank.values())
    return set(sorted(rank, key=rank.get)[: min(max(below, 1), len(rank) - 1)])


def folder_clips(folder: str | Path, size: int, seconds: float = 3.0, crop: tuple[int, int, int] | None = None,
                 cache: str | Path | None = None) -> tuple[Clips, Clips]:
    """Decode every video under `folder` once and return (training clips, held-out clips), split by file.

    A long file becomes consecutive clips of `seconds`, the last at least one second. Files that cannot be used are
    listed with the reason; if none can, MediaError is raised.

    Args:    size: pixels of the square; crop: (x, y, side) in pixels of the upright picture, else its centre square.
    """
    if seconds < 1 or size < 1 or (crop and (min(crop) < 0 or crop[2] < 1)):
        raise ValueError(f"want seconds >= 1, size >= 1, crop x,y,side in the picture: {seconds=} {size=} {crop=}")
    folder, length = Path(folder), round(seconds * FPS)
    if not folder.is_dir():
        raise MediaError(folder, "is not a folder; name one that holds videos")
    paths = [path for path in folder.rglob("*") if path.suffix[1:].lower() in KINDS.split(", ") and path.is_file()]
    files = sorted((path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
                   for path in paths if not path.name.startswith("."))
    names, skipped = [name for name, _, _ in files], {}
    recipe = {"files": files, "size": size, "frames": length, "crop": crop}
    target = _cached(cache, recipe, lambda to: _write_clips(
        to, _decode_all(folder, names, size, length, crop, to / "parts", skipped), skipped))
    index = json.loads((target / "index.json").read_text())
    for name, reason in index["skipped"].items():    # told again on every run: the cache keeps what was left out
        print(f"skipped {name}: {reason}")
    if not index["clips"]:
        raise MediaError(folder, f"none of its {len(names)} videos can be used; put in {KINDS} with sound")
    sources = [source for _, source in index["clips"]]
    held_out = _held_out(set(sources))
    print(f"{folder}: {len(set(sources))} files kept ({len(held_out)} held out), {len(index['skipped'])} skipped, "
          f"{len(sources)} clips")
    return tuple(Clips(target, [row for row, source in enumerate(sources) if (source in held_out) == held])
                 for held in (False, True))


# ---- Synthetic clips -------------------------------------------------------------------------------------------------

def _renderer_source() -> str:
    """The text that decides what a talker looks and sounds like: the section above."""
    return Path(__file__).read_text().partition("\n# ---- Synthetic talkers")[2].partition("\n# ---- ")[0]


def _render(index: int, seed: int, size: int, frames: int) -> tuple:
    """Render one talker as arrays, which travel between processes without shared-memory handles."""
    clip = render_talker(index, seed, size, frames)
    truth = {key: value.numpy() for key, value in clip.truth.items()}
    return clip.name, f"{index}", clip.frames.numpy(), clip.audio.numpy(), truth


def _render_all(jobs: list[tuple]) -> Iterator[tuple]:
    """Render talkers, one process per core; a handful is not worth starting processes for."""
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})       # for the workers: only one process speaks
    try:
        clips = pool.map(_render, *zip(*jobs), chunksize=4) if len(jobs) >= 32 else itertools.starmap(_render, jobs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from tqdm(clips, "rendering", len(jobs), unit="clip")
    finally:
        pool.shutdown(cancel_futures=True)


def synthetic_clips(count: int, size: int, seconds: float = 2.0, seed: int = 0, first: int = 0,
                    cache: str | Path | None = None) -> Clips:
    """Render talkers first .. first + count - 1 once; hold out talkers by a `first` beyond the training's."""
    frames = round(seconds * FPS)
    recipe = {"count": count, "size": size, "frames": frames, "seed": seed, "first": first,
              "renderer": hashlib.sha256(_renderer_source().encode()).hexdigest()}
    jobs = [(index, seed, size, frames) for index in range(first, first + count)]
    return Clips(_cached(cache, recipe, lambda to: _write_clips(to, _render_all(jobs), {})))


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


def pretrained_config(name: str | Path, kinds: Sequence[str], what: str):
    """Read the configuration of a model of one of `kinds`. Raises: MediaError where there is none, or another kind."""
    import transformers
    with loading(name, what):
        config = transformers.AutoConfig.from_pretrained(str(name), local_files_only=Path(name).is_dir())
        if config.model_type not in kinds:
            raise MediaError(name, f"is a {config.model_type} and cannot serve as {what}; use {', '.join(kinds)}")
        return config


def pretrained(name: str | Path, kinds: Sequence[str], what: str) -> torch.nn.Module:
    """Load the bare model whose configuration `pretrained_config` reads, in fp32. Raises: MediaError, likewise."""
    import transformers
    pretrained_config(name, kinds, what)
    with loading(name, what):
        return whole_model(transformers.AutoModel, name, dtype=torch.float32)


# ---- Writing speech and video ----------------------------------------------------------------------------------------

def write_speech(path: Path, audio: Tensor) -> None:
    """Write (T,) float32 in [-1, 1] at 16 kHz as a 16-bit wav file."""
    with replacing(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(SAMPLE_RATE)
        file.writeframes((audio.clamp(-1, 1) * 32767).round().short().numpy().tobytes())


def write_video(path: str | Path, frames: Iterable[Tensor], audio: Tensor) -> None:
    """Write an mp4 that plays in browsers: H.264 4:2:0 and AAC, every frame and all of the sound.

    Frames are streamed; the file appears under its name only when it is complete. An odd width or height grows by one
    repeated pixel, as 4:2:0 wants pairs.

    Args:    frames: (F, 3, H, W) uint8, or an iterator of (3, H, W); audio (T,) float32 in [-1, 1] at 16 kHz.
    """
    path, frames = Path(path), iter(frames)
    first = next(frames, None)
    if first is None:
        raise MediaError(path, "there is no frame to write; pass at least one")
    try:
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
            audio.detach().cpu().float().numpy().tofile(f"{folder}/audio.f32")
            said = _encode(folder, *first.shape[1:], itertools.chain([first], frames))
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


def _encode(folder: str, height: int, width: int, frames: Iterable[Tensor]) -> str:
    """Pipe frames into ffmpeg, which muxes them with folder/audio.f32 into folder/video.mp4. Returns: its complaint."""
    # AAC starts with 1024 samples that players shall skip: one that does not is late by half a frame at 48 kHz, by one
    # and a half at 16. The colour matrix is BT.709 and says so: players guess when none does.
    command = [*FFMPEG, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width + width % 2}x{height + height % 2}",
               "-r", str(FPS), "-i", "pipe:0", "-f", "f32le", "-ar", str(SAMPLE_RATE), "-i", f"{folder}/audio.f32",
               "-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd,format=yuv420p",
               "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv",
               "-c:v", "libx264", "-crf", "16", "-c:a", "aac", "-ar", "48000", "-b:a", "128k",
               "-movflags", "+faststart", f"{folder}/video.mp4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as ffmpeg:
        with suppress(BrokenPipeError):                                            # ffmpeg gave up: it says why
            for frame in frames:
                frame = np.pad(frame.cpu().permute(1, 2, 0), ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                ffmpeg.stdin.write(np.ascontiguousarray(frame))
        said = ffmpeg.communicate()[1].decode(errors="replace").strip()
    return (said or "no reason given") if ffmpeg.returncode else ""
