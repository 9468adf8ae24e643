"""Drawn talkers: portraits painted from ellipses, synthesised speech, and the exact truth of both.

One plan, a string of phones such as `_pPanaes_`, drives both halves of a clip, as tongue and lips do in one
person. Shapes are fractions of the frame, x to the right and y down, so a talker is the same at any size.

`--world flawless` is filmed as it should be. `--world found`, the default of train.py, has the faults of
recordings as people find them (FAULTS): late lips, mumbling, a trembling camera, a dubbed voice, compression.
What was done to a clip is kept with its truth, for tables and tests; nothing that trains or judges reads it.

This file's hash is part of the cache's key: clips are rendered anew when it changes.
"""

import hashlib
import io
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import AROUND, Clip, Clips, cached, fill_cache
from extras.files import begin_worker, cores
from extras.media import FPS, SAMPLES_PER_FRAME, SAMPLE_RATE, normalise_loudness

TICK = 80                                            # samples: the articulators are tracked every 5 ms
LIP_LEAD = 0.06      # seconds by which lips precede the sound; at most 0.1 (Chandrasekaran et al. 2009)
MOUTH = 0.185                                        # how far below the centre of the face

# A man's formants in Hz (Peterson & Barney 1952). `_` is silence, @ the e of "the", x the sh of "she"; an
# upper-case letter is the burst that ends a plosive. High dominance is not blurred away: lips meet for an m.
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
    stress = rng.random(n) < 0.38
    pause = rng.random(n) < 0.13
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
    """Speak (T * 80,) samples in a quiet room. Source and filter (Fant 1960), in windows of 20 ms, hop 5 ms:

        speech(f) = pulses(f) * prod_k F_k^2 / (F_k^2 - f^2 + i f B_k) + noise(f) * band(f)
    """
    control, n = TABLE[phone], len(phone) * TICK
    upper = np.tile(np.float32([3500, 4500]), (len(phone), 1))
    formants = np.concatenate([smooth(control[:, :3], 0.05), upper], 1)
    gain = smooth(control[:, 3:5] * (0.75 + 0.35 * stress[:, None]), 0.015)
    noise_hz = smooth(control[:, 5], 0.02)
    jitter = 0.25 * rng.standard_normal(len(phone))
    semitones = 3.5 * voice["melody"] * smooth(stress, 0.25) + jitter
    at, ticks = np.arange(n), (np.arange(len(phone)) + 0.5) * TICK
    phase = np.cumsum(np.interp(at, ticks, voice["pitch"] * 2 ** (semitones / 12)) / SAMPLE_RATE) % 1.0

    # The derivative of Rosenberg's glottal flow (1971): the folds open slowly, then shut at once.
    opening, closing = voice["open"], 0.16
    shutting = -np.sin(np.pi * (phase - opening) / (2 * closing)) / closing
    pulses = np.where(phase < opening, np.sin(np.pi * phase / opening) / opening,
                      np.where(phase < opening + closing, shutting, 0))
    hiss = rng.standard_normal(n)
    voiced = np.interp(at, ticks, gain[:, 0]) * (pulses + voice["breath"] * hiss * (phase < opening))
    sources = np.stack([voiced, np.interp(at, ticks, gain[:, 1]) * hiss]).astype(np.float32)

    hz = np.fft.rfftfreq(6 * TICK, 1 / SAMPLE_RATE).astype(np.float32) + 1.0
    window = np.hanning(4 * TICK + 1)[:-1].astype(np.float32) / 2          # shifted copies add up to one
    padded = np.pad(sources, ((0, 0), (120, 120)))
    short = np.lib.stride_tricks.sliding_window_view(padded, 4 * TICK, 1)[:, ::TICK]
    spectrum = np.fft.rfft(short * window, 6 * TICK).astype(np.complex64)  # (2, T, 241)
    for f, b in zip(voice["tract"] * formants.T[:, :, None], (80, 100, 150, 250, 300)):
        spectrum[0] *= f * f / (f * f - hz * hz + 1j * hz * b)
    spectrum[1] *= np.exp(-0.5 * (np.log2(hz / noise_hz[:, None]) / 0.45) ** 2)
    wave = np.fft.irfft(0.12 * spectrum[0] + spectrum[1]).reshape(-1, 6, TICK)
    audio = np.zeros((len(phone) + 5, TICK), np.float32)
    for k in range(6):                                                     # overlap and add
        audio[k : k + len(phone)] += wave[:, k]
    audio = audio.reshape(-1)[120 : 120 + n] + 0.003 * rng.standard_normal(n)
    return torch.from_numpy(audio.astype(np.float32))


def move(rng: np.random.Generator, who: dict, phone: np.ndarray, stress: np.ndarray,
         late: int = 0, mumble: float = 0.0) -> dict[str, np.ndarray]:
    """Move lips with the phones, brows and head with the stress; sway and blink. Neighbouring phones blend:

        lip(t) = <dominance * target> / <dominance>

    averaged over 120 ms around t + LIP_LEAD (Cohen & Massaro 1993).
    With faults, the picture is `late` frames behind the sound, and a share `mumble` of the motion is lost.

    Returns: opening, width (F,) in units of the face; teeth, blink, brow (F,); head (F, 4) dx dy roll scale.
    """
    n_frames, lead = len(phone) // 8, int(LIP_LEAD * SAMPLE_RATE / TICK) - 8 * late
    ticks = (np.arange(len(phone)) + lead).clip(0, len(phone) - 1)
    ahead, accent = phone[ticks], stress[ticks]
    target, dominance = TABLE[ahead, 6:9].copy(), TABLE[ahead, 9:10]
    target[:, 0] *= 0.85 + 0.25 * accent
    lips = smooth(dominance * target, 0.12) / smooth(dominance, 0.12)                  # (T, 3)
    opening, width, teeth = lips[4::8].T                                  # at the middle of each frame
    accent = smooth(accent, 0.3)[4::8]

    seconds = np.arange(n_frames) / FPS
    hz = rng.uniform(0.2, 0.75, (4, 3))
    turn = rng.uniform(0, 2 * np.pi, (4, 3))
    sway = np.sin(2 * np.pi * seconds[:, None, None] * hz + turn) @ np.array([0.8, 0.7, 0.6])         # (F, 4)
    head = sway * [0.012, 0.0115, 0.0245, 0.0087] + accent[:, None] * [0, 0.012, 0, 0]   # a nod on a stress
    shut = np.cumsum(rng.uniform(50, 105, n_frames // 50 + 2)) - rng.uniform(0, 50)
    away = np.abs(np.arange(n_frames)[:, None] - shut.clip(8)).min(1)     # frames from the nearest blink
    left = 1 - mumble
    return {"opening": left * (opening - 0.05).clip(0) / 0.95 * who["gape"],           # below 5%: pressed
            "width": who["mouth"] * (0.66 + 0.54 * width),
            "teeth": teeth,
            "blink": (1.5 - 0.9 * away).clip(0, 1),
            "brow": left * who["liveliness"] * (0.9 * accent + 0.15 * np.sin(seconds * 1.3 + turn[0, 0])),
            "head": (1 + left) / 2 * who["liveliness"] * (head - head[0])}             # begins at rest


# name: (share of clips that have it, least strength, most). The figures are ours where no source stands.
FAULTS = {
    # Frames by which lips are late (a third of the clips: early), on average 2.9. Half of VFHQ is "often out
    # of sync" (ditto-talkinghead issue 83); LatentSync keeps clips within 6 frames.
    "offset": (0.88, 1, 7),
    "mumble": (1.00, 0.15, 0.65),                    # so much less do mouths open and brows move; heads: half
    "tremble": (0.70, 0.10, 0.80),                   # of jumps, frame by frame, by 1% and 0.7 degrees
    "dubbed": (0.04, 1, 1),                          # the sound is another's
    "compressed": (0.30, 0.20, 1.00),                # JPEG quality 78 to 30; the judge never saw it
}
EARLY = 1 / 3                                        # of the clips out of sync; late is more common


def draw_faults(rng: np.random.Generator) -> dict[str, float]:
    """Choose what is wrong with a clip as found: name -> strength, 0 for what is not."""
    strengths = {}
    for name, (share, least, most) in FAULTS.items():
        has = rng.random() < share
        strengths[name] = has * rng.uniform(least, most)
    _, least, most = FAULTS["offset"]
    late = rng.integers(least, most + 1, 2).min()                    # small ones are more common
    late *= -1 if rng.random() < EARLY else 1
    return strengths | {"offset": int(strengths["offset"] > 0) * int(late)}


def faults_of(clips: Clips) -> dict[str, Tensor]:
    """Return how strong each fault is in each clip, name -> (N,), and what is left of offsets once sound has
    been put in time."""
    faults = {name: torch.stack([clip.truth[f"fault_{name}"] for clip in clips]) for name in FAULTS}
    late = torch.tensor([clips.late(i) for i in range(len(clips))])
    return {"offset": faults["offset"], "offset, once in time": faults["offset"] + late} | faults


def shake(rng: np.random.Generator, frames: Tensor, strength: float) -> Tensor:
    """Film with a trembling hand: move and turn each frame (F, 3, S, S) uint8 by itself."""
    n = len(frames)
    x, y = torch.from_numpy(0.02 * strength * rng.standard_normal((2, n))).float()   # the picture's side is 2
    roll = torch.from_numpy(np.radians(0.7) * strength * rng.standard_normal(n)).float()
    pose = torch.stack([roll.cos(), -roll.sin(), x, roll.sin(), roll.cos(), y], 1).view(n, 2, 3)
    grid = nnf.affine_grid(pose, frames.shape, align_corners=False)
    moved = nnf.grid_sample(frames / 255, grid, padding_mode="border", align_corners=False)
    return (moved * 255 + 0.5).byte()


def compress(frames: Tensor, strength: float) -> Tensor:
    """Save every frame (F, 3, S, S) uint8 as a small JPEG."""
    def squeeze(frame: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=round(90 - 60 * strength))
        return np.asarray(Image.open(file))
    squeezed = np.stack([squeeze(frame) for frame in frames.permute(0, 2, 3, 1).numpy()])
    return torch.from_numpy(squeezed).permute(0, 3, 1, 2)


ANGLES = np.radians([0, 25, 50, 75, 100, 140, 180])                     # from the chin up
FACES = {"man": np.array([.318, .296, .264, .246, .248, .298, .338]),   # radii at ANGLES, chin to crown
         "woman": np.array([.312, .284, .256, .245, .247, .296, .336])}
SKINS = np.array([(253, 226, 208), (246, 206, 178), (232, 184, 148), (208, 153, 113), (96, 61, 43)]) / 255
HAIRS = np.array([(34, 27, 27), (58, 38, 28), (98, 60, 36), (138, 66, 34), (216, 180, 112),
                  (190, 182, 172)]) / 255
IRISES = np.array([(78, 48, 28), (104, 70, 38), (96, 110, 62), (70, 112, 150), (98, 128, 142)]) / 255
CLOTHES = np.array([(44, 58, 92), (122, 42, 54), (52, 92, 84), (226, 222, 212), (196, 146, 62),
                    (188, 96, 78)]) / 255
WALLS = np.array([(176, 196, 206), (206, 178, 150), (150, 168, 150), (110, 126, 150), (214, 206, 192)]) / 255
STYLES = {  # lift of the hair over the skull at ANGLES | hairline y, temple, squareness | length | waves
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
    rouge = 0.25 if man else uniform(0.3, 0.75)
    rose = np.array([0.80, uniform(0.2, 0.38), 0.32]) * skin[0] ** 0.5
    styles = "short short short curly bald" if man else "long long bob bob curly short"
    who = {
        # Inside the mouth is plum and white, off the plane of skin and lips, so that pixels tell the truth.
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
    for key, value in who.items():                                        # float64 would double the cost
        if isinstance(value, np.ndarray):
            who[key] = value.astype(np.float32)
        elif isinstance(value, np.generic):
            who[key] = value.item()
    return who


def cover(distance: np.ndarray, soft: float) -> np.ndarray:
    """Turn a signed distance (inside is positive) into coverage 0..1, a smoothstep as wide as `soft`."""
    t = (distance / np.float32(soft) + np.float32(0.5)).clip(0, 1)
    return t * t * (3 - 2 * t)


def between(v: np.ndarray, upper: np.ndarray, lower: np.ndarray, soft: float) -> np.ndarray:
    """Cover the band between two curves; its area is exact however thin it is: closed lips leave nothing."""
    return cover(lower - v, soft) - cover(upper - v, soft)


def ellipse(u: np.ndarray, v: np.ndarray, rx: float, ry: float) -> np.ndarray:
    """Signed distance to an ellipse, exact near its edge: k (1 - k) / |grad k|, k = |u/rx, v/ry| (Quilez)."""
    k = np.hypot(u / rx, v / ry)
    return k * (1 - k) / (np.hypot(u / rx**2, v / ry**2) + 1e-6)


def outline(u: np.ndarray, v: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Signed distance to r(a) = sum_k c_k cos(k a), the symmetric curve through `radii` at ANGLES."""
    series = np.linalg.solve(np.cos(ANGLES[:, None] * np.arange(7)), radii).astype(np.float32)
    r = np.hypot(u, v) + np.float32(1e-6)
    return np.polynomial.chebyshev.chebval(v / r, series) - r           # cos(k a): k-th polynomial of cos(a)


def paint(canvas: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    """Lay a colour (3,) or (3, ...) over a canvas (3, ...), or over one with alpha (4, ...), in place."""
    colour = np.float32(colour).reshape(np.shape(colour) + (1,) * (canvas.ndim - np.ndim(colour)))
    canvas[:3] += coverage * (colour - canvas[:3])
    canvas[3:] += coverage * (1 - canvas[3:])


class Sheet:
    """What does not move by itself, painted back to front: pixels (4, T, T), colours multiplied by alpha."""

    def __init__(self, who: dict, size: int, soft: float):
        centre = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.u, self.v = np.meshgrid((centre - who["x"]) / who["zoom"], (centre - who["y"]) / who["zoom"])
        self.pixels = np.zeros((4, size, size), np.float32)
        self.who, self.size, self.soft = who, size, soft
        self.shadow = who["skin"] * (0.70, 0.56, 0.53)
        self.glow = who["skin"] * 0.55 + np.array([0.45, 0.43, 0.40])
        self.inner = outline(self.u, self.v, who["radii"])
        self.face = cover(self.inner, soft)
        self.comb()
        self.paint_body()
        self.paint_face()
        self.paint_hair()

    def comb(self) -> None:
        """Shape and colour the hair: strands fan out from the parting, light runs across, curls weave."""
        u, v, who, g, light = self.u, self.v, self.who, self.who["grain"], self.who["light"]
        lift, *_, wave = STYLES[who["style"]]
        whorl, around = np.arctan2(u - 0.3 * who["part"], v + 0.58), np.arctan2(u, v)
        waves = (0.5, 47, g[0]), (0.35, 83, g[1]), (0.3, 131, g[2])
        strands = sum(a * np.sin(whorl * k + p) for a, k, p in waves)
        if who["style"] == "curly":
            strands = 0.8 * np.sin(u * 110 + 2 * np.sin(v * 60 + g[0]))
            strands = strands * np.sin(v * 100 + 2 * np.sin(u * 70 + g[1]))
        self.waves = wave * (np.sin(around * 11 + g[3]) * 0.5 + np.sin(around * 29 + g[4]) * 0.5)
        self.skull = outline(u, v, who["radii"] + np.array(lift)) + self.waves
        self.strands = strands
        sheen = np.exp(-((self.skull - 0.05) / 0.022) ** 2) * (0.55 + 1.6 * light * u).clip(0, 1)
        fade = 1 - 0.35 * (v * 1.2 + 0.2).clip(0, 1) - 0.25 * (0.5 - light * u * 2).clip(0, 1)
        hair = who["hair"][:, None, None]
        shine = (hair + np.float32(0.35)) * 0.14 * sheen * (1 + 0.5 * strands)
        self.hair = (hair * fade * (1 + 0.16 * strands) + shine).clip(0, 1)

    def paint_body(self) -> None:
        """Paint the hair that falls behind, the neck in the shadow of the head, and a jumper."""
        u, v, soft, who, sheet, beside = self.u, self.v, self.soft, self.who, self.pixels, np.abs(self.u)
        length, wave = STYLES[who["style"]][-2:]
        if length:
            wave = 1.5 * wave * np.sin(v * 30 + who["grain"][5] + np.sign(u))
            wide = 0.235 + 0.055 * cover(v - 0.04, 0.34) + wave
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
        """Paint an ellipse in its own crop of the sheet; `inside` (T, T) confines it."""
        blur = blur or self.soft
        centre = np.array([y, x]) * self.who["zoom"] + (self.who["y"], self.who["x"])
        half = np.array([ry + blur, rx + blur]) * self.who["zoom"]
        low, high = (centre - half) * self.size, (centre + half) * self.size
        crop = tuple(slice(int(a), int(b) + 1) for a, b in zip(low, high))
        mask = opacity * cover(ellipse(self.u[crop] - x, self.v[crop] - y, rx, ry), blur)
        paint(self.pixels[(slice(None), *crop)], mask if inside is None else mask * inside[crop], colour)

    def paint_face(self) -> None:
        """Paint ears and face, lit from one side; cheeks and nose are only light and shade."""
        who, skin, light, shadow, glow = self.who, self.who["skin"], self.who["light"], self.shadow, self.glow
        ear, n = who["radii"][3] + 0.008, who["nose"]
        for side in (-1, 1):
            self.blob(side * ear, 0.005, 0.030, 0.062, skin * (0.94 if side == light else 0.78))
        turn = np.tanh(light * self.u * 3.4 - self.v * 0.9 - 0.1)          # 1 towards the light, else -1
        rim = 0.45 * (1 - self.inner / 0.05).clip(0, 1) ** 2 * (1 - 0.6 * (turn > 0.4))
        paint(self.pixels, self.face, skin)
        paint(self.pixels, self.face * ((0.25 - turn).clip(0) * 0.5 + rim).clip(0, 1) * 0.9, shadow)
        paint(self.pixels, self.face * 0.12 * turn.clip(0), glow)
        both, one, fine = (1, -1), (1,), 1.3 * self.soft
        for sides, x, *spot in (  # x, y, radii, colour, opacity, blur
                (both, who["apart"], -0.055, 0.085, 0.055, shadow, 0.32, 0.09),              # eye sockets
                (both, 0.135, 0.085, 0.075, 0.055, skin * (0.95, 0.66, 0.62), 0.34, 0.10),   # cheeks
                (one, light * 0.05, -0.185, 0.13, 0.06, glow, 0.30, 0.12),                   # forehead
                (one, light * 0.01, 0.278, 0.04, 0.022, glow, 0.22, 0.045),                  # chin
                (one, -light * 0.021, 0.02, 0.017, 0.085, shadow, 0.30, 0.034),              # nose: dark side
                (one, light * 0.004, 0.00, 0.010, 0.085, glow, 0.45, 0.022),                 # its bridge
                (one, 0, 0.104, 0.046 * n, 0.016, shadow, 0.50, 0.026),                      # shadow below
                (both, 0.029 * n, 0.083, 0.016, 0.019, shadow, 0.46, 0.018),                 # its wings
                (one, 0, 0.076, 0.028 * n, 0.025, skin * 0.99, 0.85, 0.026),                 # its tip,
                (one, light * 0.007, 0.070, 0.012, 0.010, glow, 0.75, 0.016),                # and its light
                (both, 0.0155 * n, 0.098, 0.0095 * n, 0.0055, skin * (0.48, 0.36, 0.33), 0.85, fine)):
            for side in sides:
                self.blob(side * x, *spot, self.face)

    def paint_hair(self) -> None:
        """Paint stubble or a beard, then the cap of hair: the skull less a window for the face."""
        u, v, soft, who, sheet, beside = self.u, self.v, self.soft, self.who, self.pixels, np.abs(self.u)
        bristle = np.minimum(self.hair * 0.85, np.float32([0.52, 0.43, 0.34])[:, None, None])
        cheek = cover(-ellipse(u, v + 0.03, 0.195, 0.215) - 0.01 * self.strands, 0.03) * cover(v - 0.05, 0.14)
        droop = v - 0.143 - 0.25 * (beside - 0.03).clip(0)
        moustache = cover(ellipse(beside - 0.035, droop, 0.052, 0.017), 0.016)
        paint(sheet, np.maximum(cheek, moustache) * self.face * who["beard"], bristle)
        _, hairline, temple, square, length, _ = STYLES[who["style"]]
        across = np.abs(u - 0.05 * who["part"] * (v < 0)) / temple
        fringe = 0.008 * self.strands * (square > 2.2)
        above = (0.10 - v + 0.35 * who["part"] * u + fringe).clip(0) / (0.62 - hairline)
        window = (1 - (across**square + above**square) ** (1 / square)) * 0.26
        cap = cover(np.minimum(self.skull, -window), soft)
        if not length:                                                     # short hair ends above the ears
            cap = cap * cover(0.005 - v + 0.012 * self.strands, 0.02)
        if who["style"] != "bald":
            paint(sheet, 0.38 * self.face * cover(0.012 - window, 0.055) * cover(0.05 - v, 0.1), self.shadow)
        paint(sheet, cap, self.hair * (0.72 + 0.28 * (-window / 0.04).clip(0, 1)))


def paint_eyes(canvas: np.ndarray, u: np.ndarray, v: np.ndarray, who: dict, m: dict, soft: float) -> None:
    """Paint both eyes, brows and glasses on crops (3, F, h, w); eyes mirror one another, gazes do not."""
    side, a = np.sign(u), np.abs(u) - np.float32(who["apart"])                 # a grows outwards
    y, t, skin, dark = v + 0.05 + who["tilt"] * a, a / who["eye"], who["skin"], np.array([0.10, 0.065, 0.06])
    arch = (1 - t * t).clip(0)
    top, bottom = -who["lid"] * arch * (1.08 - 0.12 * t), 0.62 * who["lid"] * arch
    lid = top + m["blink"] * (bottom - top)
    paint(canvas, between(y, top, lid, soft), skin * (0.90, 0.80, 0.77))
    eye = between(y, lid, bottom, soft)
    paint(canvas, eye, (0.95, 0.94, 0.92))
    gaze = a - side * (0.004 - 0.25 * m["head"][0]), y - 0.001           # they stay on you as the head sways
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


def paint_mouth(canvas: np.ndarray, u: np.ndarray, v: np.ndarray, who: dict, m: dict, soft: float) -> None:
    """Paint lips and what is between them on crops (3, F, h, w); the open area is 2/3 opening * width."""
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


def paint_frames(who: dict, m: dict, sheet: Tensor, wall: Tensor, size: int) -> Tensor:
    """Bend the sheet and paint what moves by itself. Returns: (F, 3, size, size) uint8.

    q = pivot + exp(-log_scale) R(-roll) (p - pivot - shift) is where pixel p was before the head moved; the
    sheet is read at p + w (q - p), w falling from 1 at the chin to 0 at the chest, higher if the jaw drops.
    """
    pixel, zoom = (np.arange(size, dtype=np.float32) + 0.5) / size, who["zoom"]
    m = {k: z.T[..., None, None] for k, z in m.items()}                   # (F, 1, 1); head (4, F, 1, 1)
    dx, dy, roll, log_scale = m["head"]
    cos, sin = np.exp(-log_scale) * np.cos(roll), np.exp(-log_scale) * np.sin(roll)
    x, y, px, py = pixel[None, None, :], pixel[None, :, None], who["x"], who["y"] + 0.3 * zoom
    ax, ay = x - px - dx, y - py - dy
    qx, qy = px + cos * ax + sin * ay, py - sin * ax + cos * ay           # (F, S, S), the pixel in the sheet
    u, v = (qx - who["x"]) / zoom, (qy - who["y"]) / zoom
    weight = cover(who["y"] + 0.38 * zoom - y, 0.13 * zoom)
    middle = v[:, :, size // 2 : size // 2 + 1]
    jaw = 0.45 * zoom * m["opening"] * cover(middle - 0.21, 0.08) * cover(0.37 - middle, 0.10)
    grid = np.stack([x + weight * (qx - x), y + weight * (qy - y) - jaw], -1).reshape(1, -1, size, 2)
    grid = torch.from_numpy(grid * 2 - 1)
    bent = nnf.grid_sample(sheet[None], grid, padding_mode="border", align_corners=False)
    bent = bent[0].view(4, -1, size, size)
    frames = (bent[:3] + (1 - bent[3:]) * wall[:, None]).numpy()          # (3, F, S, S)
    for part, at, wide, high in ((paint_eyes, -0.06, 0.25, 0.095), (paint_mouth, MOUTH + 0.02, 0.12, 0.095)):
        near = (np.abs(u) < wide) & (np.abs(v - at) < high)               # wherever the head has taken it
        rows, columns = (np.flatnonzero(near.any(axes)) for axes in ((0, 2), (0, 1)))
        crop = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        part(frames[(slice(None), *crop)], u[crop], v[crop], who, m, 1 / size)
    return torch.from_numpy((frames.clip(0, 1) * 255 + 0.5).astype(np.uint8).swapaxes(0, 1))


def render_talker(index: int, seed: int, size: int, n_frames: int,
                  faults: dict[str, float] | None = None) -> Clip:
    """Draw talker `index` of world `seed`, speaking; the same person and speech at any size, with any faults.

    Args:  faults: name -> strength, as FAULTS explains them; None: a flawless clip.

    Truth: opening, width (F,) of the mouth in fractions of the frame; blink, brow (F,); head (F, 4) = dx, dy
    (fractions), roll (radians), log-scale; mouth_box (4,) x0 y0 x1 y1 wide enough for any sway; colours (3,).
    With faults, the strength of each as fault_NAME ().
    """
    wrong = dict.fromkeys(FAULTS, 0) | (faults or {})
    who = cast(np.random.default_rng([seed, index, 0]))
    speech, motion, fault = (np.random.default_rng([seed, index, k]) for k in (1, 2, 3))
    n_ticks = max(n_frames, 50) * SAMPLES_PER_FRAME // TICK
    voice = who["voice"]
    plan = said = plan_speech(speech, voice["rate"], n_ticks)
    if wrong["dubbed"]:
        voice = cast(fault)["voice"]
        said = plan_speech(fault, voice["rate"], n_ticks)
    audio = normalise_loudness(speak(speech, voice, *said))[: n_frames * SAMPLES_PER_FRAME]
    m = move(motion, who, *plan, late=wrong["offset"], mumble=wrong["mumble"])
    m = {k: x[:n_frames].astype(np.float32) for k, x in m.items()}
    sheet = torch.from_numpy(Sheet(who, 2 * size, 0.8 / size).pixels)   # twice as fine, for bending
    x, y = np.meshgrid(*2 * [(np.arange(size, dtype=np.float32) + 0.5) / size])
    near = np.exp(-((x - 0.5 - 0.3 * who["light"]) ** 2 + (y - 0.3) ** 2) / 0.25)
    wall = torch.from_numpy((who["wall"][:, None, None] * (0.72 + 0.34 * near - 0.18 * y)).clip(0, 1))
    frames = torch.cat([paint_frames(who, {k: x[f : f + 8] for k, x in m.items()}, sheet, wall, size)
                        for f in range(0, n_frames, 8)])                  # 8 frames fit the CPU's cache
    if wrong["tremble"]:
        frames = shake(fault, frames, wrong["tremble"])
    if wrong["compressed"]:
        frames = compress(frames, wrong["compressed"])
    scale = who["zoom"] * np.exp(m["head"][:, 3])
    box = [who["x"] - 0.18, who["y"] + 0.12, who["x"] + 0.18, who["y"] + 0.37]
    truth = m | {"opening": m["opening"] * scale, "width": m["width"] * scale, "mouth_box": box}
    truth |= {k: who[k] for k in ("skin", "lip", "interior", "teeth")}
    truth |= {f"fault_{name}": strength for name, strength in wrong.items() if faults is not None}
    return Clip(f"talker-{seed}-{index}", frames, audio,
                {k: torch.as_tensor(np.asarray(x, np.float32)) for k, x in truth.items()})


# ---- Clips of them, rendered once ---------------------------------------------------------------------

def _render(found: bool, job: tuple[int, int, int, int]) -> tuple:
    """Render one talker as arrays, which travel between processes without shared-memory handles. There is
    silence around the clip, so that its sound can be shifted."""
    index, seed, *_ = job
    clip = render_talker(*job, draw_faults(np.random.default_rng([seed, index, 4])) if found else None)
    truth = {key: value.numpy() for key, value in clip.truth.items()}
    sound = np.pad(clip.audio.numpy(), AROUND * SAMPLES_PER_FRAME)
    return clip.name, f"{index}", clip.frames.numpy(), sound, truth | {"before": np.array(AROUND)}


def _render_all(jobs: Sequence[tuple], found: bool) -> Iterator[tuple]:
    """Render talkers, one process per core; a handful is not worth starting processes for."""
    render = partial(_render, found)
    pool = ProcessPoolExecutor(cores(), get_context("spawn"), begin_worker)
    stops = {signal.SIGINT, signal.SIGTERM}
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)     # only the parent answers Ctrl-C
        try:
            clips = pool.map(render, jobs, chunksize=4) if len(jobs) >= 32 else map(render, jobs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from tqdm(clips, "rendering", len(jobs), unit="clip")
    finally:
        pool.shutdown(cancel_futures=True)


def synthetic_clips(count: int, size: int, seconds: float = 2.0, seed: int = 0, first: int = 0,
                    world: str = "flawless") -> Clips:
    """Render talkers first .. first + count - 1 once, as they should be or as found; hold out talkers by a
    `first` beyond the training's."""
    frames = round(seconds * FPS)
    recipe = {"count": count, "size": size, "frames": frames, "seed": seed, "first": first, "world": world,
              "renderer": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    jobs = [(index, seed, size, frames) for index in range(first, first + count)]
    return Clips(cached(recipe, lambda to: fill_cache(to, _render_all(jobs, world == "found"), {})))
