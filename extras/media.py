"""Odd files: whatever ffmpeg and Pillow can read becomes plain frames, samples and pixels.

1. Sound. Of several tracks and channels the one with speech, at one loudness.
2. Pictures. Upright, 8 bits, sRGB, no transparency.
3. Video. Both streams count from the file's common zero: a track that starts late is padded (the picture with
   its first frame, the sound with silence) and gaps in the sound are filled, so lips and sound stay together.
4. An mp4 that browsers play, with the sound that was given: as it was where they can play it.
"""

import errno
import io
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from extras.files import MediaError

FPS = 25                                             # frames a second, everywhere
SAMPLE_RATE = 16_000                                 # samples a second, everywhere
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS               # 640: 40 ms
PIECE = 16 * FPS                                     # frames of long sound that are worked on at once

ACTIVE_RMS = 0.1                                     # loudness of speech, pauses left out; full scale is 1
SILENCE_PEAK = 1e-3                                  # -60 dB of full scale: nothing louder is silence
BLOCK, KNOCK = 320, 10                               # a clap is loud in ten blocks of 20 ms at most
CLEARLY = 3.0                                        # 10 dB: so much more speech has the better channel
LARGEST_PICTURE = 100e6                              # pixels that are decoded: 400 MB
HEIC = b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1"
COPIED = "aac", "mp3", "opus", "flac"                # browsers play them in an mp4: not encoded anew

FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-y", "-v"]
FFMPEG_WORDS = {                                     # what ffmpeg says -> what it means
    "matches no streams": "has no video track; use a file with a picture",
    "non positive size": "is smaller than the crop; choose x,y,size inside the picture",
    "out_primaries": "needs a newer ffmpeg for its colours; pip install -U imageio-ffmpeg",
    "Invalid data found": "is not audio or video, or is cut off; convert it or copy it again",
}
IN_TIME = "aresample=async=1:first_pts=0"            # pad sound that starts late, fill its gaps
PLAIN_FRAMES = (f"bwdif=mode=send_frame:deint=interlaced,fps={FPS}:start_time=0,"   # whole, 25 a second
                "scale=w='round(iw*sar)':h=ih")                                     # of square pixels


def run_ffmpeg(path: Path, *arguments: str, folder: str | None = None) -> str:
    """Run ffmpeg on one input, without arguments only to list its streams; `folder` is where it writes.
    Returns: what it says. Raises: MediaError with plain words."""
    if not path.is_file() or not path.stat().st_size:
        state = "is a folder" if path.is_dir() else "is empty" if path.exists() else "does not exist"
        raise MediaError(path, f"{state}; name a file with sound or a picture")
    level = "error" if arguments else "info"
    command = [*FFMPEG, level, "-i", f"file:{path.absolute()}", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True)
    said = done.stderr.decode(errors="replace").strip()
    if done.returncode and (arguments or "Input #0" not in said):
        if (full := os.strerror(errno.ENOSPC)) in said:              # no fault of the file
            raise OSError(errno.ENOSPC, full, tempfile.gettempdir())
        damage = (said or "ffmpeg failed").splitlines()[0].split("] ")[-1]
        words = (words for sign, words in FFMPEG_WORDS.items() if sign in said)
        raise MediaError(path, next(words, f"is damaged ({damage}); convert it or copy it again"))
    return said


# ---- Sound --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Track:
    """A sound track of a file, and what of it is heard."""

    path: Path
    stream: int                                      # among the streams of the file, from 0
    number: int                                      # among its sound tracks, from 1
    codec: str
    rate: int                                        # Hz
    tracks: int                                      # of the file
    channels: int = 1
    channel: int = 0                                 # the one that is heard, from 1; 0: the mean of all
    seconds: float | None = None                     # of its start that are used, if not all
    whole: bool = True                               # decoded without a complaint

    def note(self) -> str:
        """Say what is heard, where that is not all there is."""
        parts = [f"channel {self.channel} of {self.channels}"] if self.channel else []
        parts += [f"sound track {self.number} of {self.tracks}"] if self.tracks > 1 else []
        return f"hears {' of '.join(parts)}" if parts else ""


def sound_tracks(path: Path, streams: str) -> list[Track]:
    """List the sound tracks that can be decoded, default ones first. Raises: MediaError if there is none."""
    pattern = r"^ *Stream #0:(\d+)[^:]*: Audio: (\w+)(?:.*, (\d+) Hz, (?!0 ch))?(.*)"
    found = re.findall(pattern, streams, re.M)
    default_first = sorted(enumerate(found, 1), key=lambda item: "(default)" not in item[1][-1])
    tracks = [Track(path, int(stream), number, codec, int(rate), len(found))
              for number, (stream, codec, rate, _) in default_first if codec != "none" and rate]
    if not tracks:
        raise MediaError(path, "has no audio track; use a file with sound")
    return tracks


def decode(path: Path, part: Path, square: tuple | None = None, seconds: float | None = None,
           choice: tuple[int, int] | None = None) -> tuple[Tensor, Track]:
    """Decode what is heard of a file and, if a `square` of pixels is asked for, its frames to `part`.rgb.

    Args:    part: a path in a temporary folder, without suffix; square: (size, crop) as in `video_filter`;
             seconds: the most that is read; choice: (track, channel or 0), each from 1.
    Returns: (T,) at 16 kHz and one loudness, T >= 640, mapped from `part`.f32; and the track that it is from.
    """
    streams = run_ffmpeg(path)
    tracks = sound_tracks(path, streams)
    outputs = []
    if square:
        outputs += ["-map", "0:V:0", "-vf", video_filter(streams, *square)]
        outputs += ["-pix_fmt", "rgb24", "-f", "rawvideo", f"file:{part}.rgb"]
    for track in tracks:                             # an .au file tells its number of channels
        outputs += [] if seconds is None else ["-t", str(seconds)]
        outputs += ["-map", f"0:{track.stream}", "-af", IN_TIME, "-ar", str(SAMPLE_RATE)]
        outputs += ["-c:a", "pcm_f32be", "-f", "au", f"file:{part}.{track.number}.au"]
    complaint = run_ffmpeg(path, *outputs)

    sounds = {track.number: _map_au(f"{part}.{track.number}.au") for track in tracks}
    number, channel = _choose(path, sounds, choice)
    sound, track = sounds[number], next(track for track in tracks if track.number == number)
    if len(sound) < SAMPLES_PER_FRAME:
        held = 1000 * len(sound) // SAMPLE_RATE
        raise MediaError(path, f"holds {held} ms of sound; one frame needs 40 ms")
    mono = _map_new(f"{part}.f32", len(sound))
    if channel:
        mono[:] = sound[:, channel - 1]
    else:
        sound.mean(1, out=mono)
    speech = torch.from_numpy(mono)
    normalise_loudness(speech, path, out=speech)
    return speech, replace(track, channels=sound.shape[1], channel=channel, seconds=seconds,
                           whole=not complaint)


def _map_au(path: str) -> np.ndarray:
    """Map the samples (T, C) of an .au file of big-endian float32."""
    start, channels = np.fromfile(path, ">u4", 6)[[1, 5]].tolist()
    if os.path.getsize(path) == start:
        return np.zeros((0, channels), np.float32)
    return np.memmap(path, ">f4", "r", start).reshape(-1, channels)


def _map_new(path: str, count: int) -> np.ndarray:
    """Map a new file of float32. Reserve its space: a disk found full later would be SIGBUS."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 4 * count)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
    return np.memmap(path, np.float32, "r+")


def _choose(path: Path, sounds: dict[int, np.ndarray], choice: tuple[int, int] | None) -> tuple[int, int]:
    """Choose what has speech in it of decoded tracks {number: (T, C)}: the number, and a channel or 0.

    That is the mean of all channels of the first track, if not another track or a single channel has
    clearly more: inverted channels cancel out, and of twelve perhaps one has a microphone.
    """
    swells = {number: _swell(sound) for number, sound in sounds.items()}
    if choice:
        number, channel = choice
    else:
        first = next(iter(sounds))
        channel = 0
        best = max(swells, key=lambda number: swells[number].max())
        number = best if swells[best].max() > CLEARLY * swells[first].max() else first
    if number not in sounds or channel > sounds[number].shape[1]:
        has = ", ".join(f"track {n} with {sound.shape[1]} channels" for n, sound in sorted(sounds.items()))
        raise MediaError(path, f"has no such sound; choose --track TRACK[:CHANNEL] from {has}")
    if not channel and swells[number].max() > CLEARLY * swells[number][0]:
        channel = int(swells[number].argmax())
    return number, channel


def _swell(sound: np.ndarray) -> np.ndarray:
    """Measure how far loudness rises and falls, as it does in speech and hardly in hum, noise or silence.

    Args: sound (T, C). Returns: (1 + C,), the deviation of the rms of 40 ms: of the channels' mean, of each.
    """
    whole = len(sound) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
    frames = sound[:whole].reshape(-1, SAMPLES_PER_FRAME, sound.shape[1])            # (F, 640, C)
    pieces = (frames[at : at + PIECE] for at in range(0, len(frames), PIECE))
    rms = [np.concatenate([piece.mean(2, keepdims=True), piece], 2).std(1) for piece in pieces]
    return np.nan_to_num(np.concatenate(rms).std(0)) if rms else np.zeros(1 + sound.shape[1])


def normalise_loudness(sound: Tensor, path: str | Path = "sound", out: Tensor | None = None) -> Tensor:
    """Bring the speech of a sound (T,) to the rms ACTIVE_RMS, then clip to [-1, 1]: that touches only knocks.

    Speech is what is above -40 dB of the peak: leaving pauses out keeps a hesitant speaker from becoming
    louder than a fluent one. A clap is no speech: blocks that are 12 dB above all but KNOCK others are left
    out as well. `out` may be the sound itself. Raises: MediaError if it is silent.
    """
    offset = sound.mean()                            # cheap recorders leave one

    def pieces() -> Iterator[Tensor]:                # an hour is measured in the memory of 16 seconds
        for piece in sound.split(PIECE * SAMPLES_PER_FRAME):
            yield nnf.pad(piece - offset, (0, -len(piece) % BLOCK)).view(-1, BLOCK)

    peaks = torch.cat([blocks.abs().amax(1) for blocks in pieces()])
    if not (len(peaks) and SILENCE_PEAK <= peaks.max() < math.inf):    # not a number is also refused
        raise MediaError(path, "is silent or damaged; use a recording in which someone speaks")
    loudest = peaks[peaks >= SILENCE_PEAK].sort(descending=True).values
    limit = 4 * loudest[min(KNOCK, len(loudest) // 4)]
    floor = 0.01 * peaks[peaks <= limit].max()
    energy, count = 0.0, 0
    for blocks, peak in zip(pieces(), peaks.split(PIECE * SAMPLES_PER_FRAME // BLOCK)):
        speech = blocks[peak <= limit]
        active = speech[speech.abs() > floor]
        energy += active.square().sum(dtype=torch.float64)
        count += len(active)
    rms = (energy / count).sqrt().float()
    return torch.sub(sound, offset, out=out).mul_(ACTIVE_RMS / rms).clamp_(-1, 1)


# ---- Pictures -----------------------------------------------------------------------------------------

def read_picture(path: str | Path, size: int, side: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Read a picture, upright and in sRGB. Returns: it, and the width and height that it has in the file.

    A large one, of which a square of `side` (else the largest) is to become `size` pixels, is scaled down
    while it is decoded.
    """
    Image.MAX_IMAGE_PIXELS = None                    # LARGEST_PICTURE instead: a JPEG is scaled while decoded
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > LARGEST_PICTURE and image.format != "JPEG":
                raise MediaError(path, f"{width}x{height} are too many pixels; "
                                       "scale it down or export a JPEG")
            times = (side or min(image.size)) / (4 * size)
            if times > 1 and image.mode in ("L", "RGB", "RGBA", "CMYK"):
                image.thumbnail((width / times, height / times))
            if image.getexif().get(0x0112, 1) > 4:   # turned by a right angle
                width, height = height, width
            return _to_srgb(ImageOps.exif_transpose(image)), (width, height)
    except (MediaError, MemoryError):
        raise
    except Exception as error:                       # Pillow's readers raise nearly anything on damaged files
        raise MediaError(path, _no_picture(path, error)) from None


def _to_srgb(image: Image.Image) -> Image.Image:
    """Scale 16 and 32 bit greys to 8, bring colours to sRGB by the profile that a picture carries, and
    flatten transparency over white."""
    profile = image.info.get("icc_profile")
    if image.mode[0] in "IF":                        # Pillow would cut these off at 255
        grey = np.asarray(image, np.float32)
        full = 65535 if image.mode[0] == "I" else max(1, grey.max())
        image = Image.fromarray((grey * (255 / full)).clip(0, 255).astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if profile:
        with suppress(OSError, ImageCms.PyCMSError): # damaged, or for other channels: as if there were none
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), alpha)


def _no_picture(path: str | Path, error: Exception) -> str:
    """Say what is wrong with a file that Pillow cannot read, and what to do."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(12)[4:] in HEIC:
            return "is HEIC; export it as JPEG (iPhone: Settings, Camera, Formats, Most Compatible)"
    reason = (getattr(error, "strerror", None) or "is not a picture, or is truncated").lower()
    return f"{reason}; name a picture, or export it again as PNG or JPEG"


# ---- Video --------------------------------------------------------------------------------------------

def video_filter(streams: str, size: int, crop: tuple[int, int, int] | dict | None) -> str:
    """The filter of ffmpeg that gives 25 whole frames a second, upright, in sRGB: the square `crop`
    (x, y, side) or the one in the centre, at `size` pixels. A dict {frame: square} changes it on the way."""
    moves = ""
    if isinstance(crop, dict):                       # the clock of sendcmd: half a frame before that frame
        moves = "; ".join(f"{(frame - 0.5) / FPS:.2f} crop w {side}, crop h {side}, crop x {x}, crop y {y}"
                          for frame, (x, y, side) in crop.items() if frame)
        moves, crop = moves and f"sendcmd=c='{moves}',", next(iter(crop.values()))
    x, y, side = crop or ("(iw-ow)/2", "(ih-oh)/2", "min(iw,ih)")
    # ffmpeg would move a crop that leaves the picture back inside: ask for an impossible width instead.
    width = f"if(lte({x}+{side},iw)*lte({y}+{side},ih),{side},0)" if crop else side
    # High dynamic range becomes standard by ffmpeg's tone mapping. What is large and has no tag was meant as
    # BT.709: so players have it.
    coding, height = next(iter(re.findall(r": Video: (.*?), \d+x(\d+)", streams)), ("", 0))
    colour = "out_primaries=bt709"
    if re.search("smpte2084|arib-std-b67", coding):
        colour += ":out_transfer=bt709"
    if int(height) > 576 and not re.search(r"[(/ ](bt\d|smpte|gbr|fcc|ycgco|ictcp)", coding):
        colour += ":in_color_matrix=bt709"
    return (f"{PLAIN_FRAMES},{moves}crop=w='{width}':h='{side}':x='{x}':y='{y}':exact=1,"
            f"scale={size}:{size}:flags=lanczos+accurate_rnd+full_chroma_int:{colour}")


def carry_sound(audio: Tensor | Track, folder: str) -> tuple[list[str], list[str]]:
    """Find arguments of ffmpeg's second input and of its output that carry sound into an mp4: a track's as it
    is, or encoded once at its rate with its channels, or, where AAC knows no such channels, what is heard."""
    if isinstance(audio, Tensor):
        audio.detach().cpu().float().numpy().tofile(f"{folder}/audio.f32")
        source = ["-f", "f32le", "-ar", str(SAMPLE_RATE), "-i", f"{folder}/audio.f32"]
        return source, ["-c:a", "aac", "-ar", "48000", "-b:a", "128k"]
    heard = [audio.channel - 1] if audio.channel else range(audio.channels)
    mix = "pan=mono|c0=" + "+".join(f"{1 / len(heard):.6f}*c{channel}" for channel in heard)
    # AAC starts with 1024 samples that players shall skip: one that does not is late by half a frame at
    # 48 kHz, by one and a half at 16.
    rate = ["-ar", "48000"] if audio.rate < 32000 else []
    encoded = ["-c:a", "aac", "-b:a", f"{128 * min(audio.channels, 8)}k", *rate]
    ways = [[*encoded, "-af", IN_TIME], [*encoded, "-af", f"{IN_TIME},{mix}"]]
    limit = [] if audio.seconds is None else ["-t", str(audio.seconds)]
    if not limit and audio.whole and audio.codec in COPIED:     # a limit cuts packets; players stop at damage
        ways.insert(0, ["-c:a", "copy"])
    for way in ways:
        with suppress(MediaError):
            run_ffmpeg(audio.path, "-map", f"0:{audio.stream}", "-t", "1", *way, f"{folder}/trial.mp4")
            return [*limit, "-i", f"file:{audio.path}"], ["-map", "0:v", "-map", f"1:{audio.stream}", *way]
    raise MediaError(audio.path, "holds sound that no mp4 can; convert it to wav")


def encode(folder: str, frames: Iterable[Tensor], shape: Sequence[int], source: list[str],
           sound: list[str]) -> str:
    """Pipe frames of `shape` (3, H, W) into ffmpeg, which muxes them with the sound of `carry_sound` into
    folder/video.mp4. Returns: its complaint."""
    _, height, width = shape
    odd = (0, height % 2), (0, width % 2), (0, 0)    # 4:2:0 wants pairs: the last pixels are repeated
    # The colour matrix is BT.709 and says so: players guess when none does.
    command = [*FFMPEG, "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
               "-s", f"{width + width % 2}x{height + height % 2}", "-r", str(FPS), "-i", "pipe:0", *source,
               "-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd,format=yuv420p",
               "-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709",
               "-color_range", "tv",
               "-c:v", "libx264", "-crf", "16", *sound, "-movflags", "+faststart", f"{folder}/video.mp4"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as ffmpeg:
        with suppress(BrokenPipeError):              # ffmpeg gave up: it says why
            for frame in frames:
                frame = np.pad(frame.cpu().permute(1, 2, 0), odd, mode="edge")
                ffmpeg.stdin.write(np.ascontiguousarray(frame))
        said = ffmpeg.communicate()[1].decode(errors="replace").strip()
    return (said or "no reason given") if ffmpeg.returncode else ""
