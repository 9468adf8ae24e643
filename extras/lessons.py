"""Lessons for a judge: clips of known quality.

Clips are made from good ones by graded faults. Three numbers say how good a lesson is:

    lip_sync         5 - 4 d         d: how far apart the mouth that is shown and the one that the sound calls for are
    expressiveness   1 + 4 l         l: liveliness, the amplitude of mouth (.65) and of brows, eyes, head (.35)
    motion           5 - 4 u         u: strength of the worst fault: tremble, freeze, ghost, blur, noise, ...

Real clips carry no truth, so there the mouth is read by a proxy: how far the lower middle of the face has moved along
the one direction that follows the sound most closely (mouth_axis).

The takes of generators among them (generated_material) are labelled by sample.evaluate: see extras/school.py, which
teaches, for what that means.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from data import FPS, Clip, MediaError, normalise_loudness, pixels, sounds
from extras.mouths import mouth_axis, mouth_boxes, mouth_opening_from_pixels
from grpo import Settings, drawing_step, stochastic_steps
from model import estimate_pose, load_generator, pixel_grid, unwarp, warp
from reward import to_bytes
from sample import evaluate, imitate, seeded_noise

MATERIAL_FRAMES = 64                                 # of a clip; lessons are windows of it, so sound can be shifted
LESSON_FRAMES = 16, 48                               # shortest and longest lesson
SHIFT = 6                                            # frames by which sound is moved at most
STIR = 0.3                                           # deviations of a mouth: less is rest
MOUTH_SHARE = 0.65                                   # of the mouth in liveliness
VERSIONS, RIVALS = 6, 4                              # ways to show a clip that generators imitate; and of a lesson


@dataclass
class Material:
    """N clips of P frames to make lessons of. Mouths are in deviations of the whole set."""

    frames: Tensor                                   # (N, P, 3, S, S) uint8
    audio: Tensor                                    # (N, P, 640)
    called: Tensor                                   # (N, P) the mouth that the sound calls for
    shown: Tensor                                    # (N, P) the mouth that is seen
    lively: Tensor                                   # (N,) 0..1
    fault: Tensor                                    # (N,) 0..1
    pose: Tensor | None = None                       # (N, P, 6) of the head, and (N, P, 3, S, S) uint8 the face with
    face: Tensor | None = None                       # its pose undone; None where a clip cannot be acted anew

    def __len__(self) -> int:
        return len(self.frames)

    @classmethod
    def joined(cls, parts: Sequence["Material"]) -> "Material":
        fields = zip(*(vars(part).values() for part in parts))
        return cls(*(None if field[0] is None else torch.cat(field) for field in fields))


def mouths(clips: Sequence[Clip], frames: int) -> Tensor:
    """Return how open the mouth is, (N, F): of drawn talkers the truth, of real ones the proxy. Unit deviation."""
    if clips[0].truth:
        mouth = torch.stack([(clip.truth["opening"] * clip.truth["width"])[:frames] for clip in clips])
    else:
        boxes = mouth_boxes(clip.frames[:frames] / 255 for clip in clips)
        mouth = boxes @ mouth_axis(boxes[:200], sounds(clips[:200], frames))
    return (mouth - mouth.mean()) / mouth.std()


def course(mouth: Tensor) -> Tensor:
    """Take mean and deviation, if it is STIR or more, off a mouth (..., F)."""
    return (mouth - mouth.mean(-1, keepdim=True)) / mouth.std(-1, correction=0, keepdim=True).clamp_min(STIR)


def apart(shown: Tensor, called: Tensor) -> Tensor:
    """Return how far apart the courses of two mouths (..., F) are: 0 alike, 1 as far as unrelated ones or farther.

    It is sqrt(1 - correlation): .95 is .22 and .97 is .17 here, where a correlation would hardly tell good from very
    good. How far lips open is left to expressiveness: a generator whose lips move too little would else learn to open
    them more rather than in time. A mouth at rest, where a correlation means nothing, counts as if it moved by STIR.
    """
    return ((course(shown) - course(called)).square().mean(-1) / 2).sqrt().clamp_max(1)


def good_material(clips: Sequence[Clip], frames: int = MATERIAL_FRAMES) -> Material:
    """Take real or drawn clips of `frames` frames or more as they are, and take head and face apart."""
    clips = [clip for clip in clips if len(clip.frames) >= frames]
    if not clips:
        raise MediaError("the judge's clips", f"are all shorter than {frames / FPS:.2f} s; give longer ones")
    pictures = torch.stack([clip.frames[:frames] for clip in clips])
    pose, face = [], torch.empty_like(pictures)
    for i in tqdm(range(0, len(clips), 8), "taking faces apart", leave=False):
        part = pictures[i:i + 8] / 255
        pose.append(estimate_pose(part))
        face[i:i + 8] = to_bytes(unwarp(part.flatten(0, 1), pose[-1].flatten(0, 1)).view_as(part))
    mouth, audio = mouths(clips, frames), sounds(clips, frames).unflatten(1, (frames, -1))
    return Material(pictures, audio, mouth, mouth, torch.ones(len(clips)), torch.zeros(len(clips)),
                    torch.cat(pose), face)


def generated_material(run: str | Path, clips: Sequence[Clip], seed: int = 0) -> Material:
    """Show every clip in VERSIONS ways: four takes of a generator, its codec alone, and that with noise on the latents.

    The takes are such as GRPO compares: of one initial noise, with other draws on the way. Quality is measured against
    the true clips: mouth and head by `sample.evaluate`; the fault is log(jerk / true jerk) / log 3, which puts the
    codec alone at .2 and a generator of 150 steps at .8. Returns: Material, the versions of a clip one after the other.
    """
    model = load_generator(run).eval()
    c = model.config
    frames = min(len(clip.frames) for clip in clips) // c.chunk_frames * c.chunk_frames
    true = pixels(clips, frames)
    with torch.no_grad():
        latents = torch.cat([model.codec.encode(part) for part in true.split(16)])
        rng = torch.Generator().manual_seed(seed)
        noise = torch.rand(len(clips), 1, 1, 1, generator=rng) * torch.randn(latents.shape, generator=rng)
        videos = [model.codec.decode(true[:, 0], z) for z in (latents, latents + 0.5 * noise)]
        for take in range(VERSIONS - 2):
            fresh = seeded_noise(seed + 1 + take, range(len(clips)), (c.video_tokens, c.channels))
            step = drawing_step(Settings(), stochastic_steps(Settings.rollout_steps), fresh)
            videos.append(imitate(model, clips, frames, Settings.rollout_steps, seed=seed, step=step))
    called, audio = mouths(clips, frames), sounds(clips, frames).unflatten(1, (frames, -1))
    measured, versions = [evaluate(video, clips, c.chunk_frames) for video in videos], []
    for video, shown, seen in zip(videos, read_mouths(videos, clips, called), measured):
        head = seen["head"] / measured[0]["head"].clamp_min(1e-6)                    # the codec's moves as the true one
        lively = MOUTH_SHARE * seen["amplitude"].clamp(0, 1) + (1 - MOUTH_SHARE) * head.clamp(0, 1)
        fault = (seen["jerk_ratio"].log() / math.log(3)).clamp(0, 1)
        versions.append((to_bytes(video), audio, called, shown, lively, fault))
    return Material(*(rearrange(list(field), "v n ... -> (n v) ...") for field in zip(*versions)))


def read_mouths(versions: Sequence[Tensor], clips: Sequence[Clip], called: Tensor) -> list[Tensor]:
    """Read the mouths of versions of clips, each (N, F, 3, S, S), on the scale of `called`, the `mouths` of the true
    clips. Returns: (N, F) of each version."""
    truths = [clip.frames[:called.shape[1]] / 255 for clip in clips]
    if clips[0].truth:
        true, *made = (torch.stack([mouth_opening_from_pixels(v, clip.truth) for v, clip in zip(videos, clips)])
                       for videos in (truths, *versions))
    else:
        boxes = mouth_boxes(truths)
        axis = mouth_axis(boxes[:200], sounds(clips[:200], called.shape[1]))
        true, *made = boxes @ axis, *(mouth_boxes(videos) @ axis for videos in versions)
    slope = ((true - true.mean()) * called).mean() / true.var()                      # pixels -> unit deviation
    return [(shown - true.mean()) * slope for shown in made]


def act(face: Tensor, pose: Tensor, mouth: float, rest: float) -> Tensor:
    """Act a clip with less or more expression: frame = warp(first + gain (face - first), rest * pose).

    The gain is `mouth` near the mouth and `rest` elsewhere. face (F, 3, S, S) in [0, 1], pose (F, 6). Returns frames.
    """
    x, y = pixel_grid(face.shape[-1]).unbind(-1)
    near = (1.6 * torch.exp(-(x ** 2 + (y - 0.47) ** 2) / (2 * 0.2 ** 2))).clamp_max(1)      # the codec's focus
    return warp(face[:1] + (rest + (mouth - rest) * near) * (face - face[:1]), rest * pose)


def blur(x: Tensor, radius: float) -> Tensor:
    """Blur (F, 3, S, S) by a Gaussian of this deviation in pixels."""
    from torchvision.transforms.functional import gaussian_blur
    return gaussian_blur(x, 2 * math.ceil(2.5 * radius) + 1, radius)


def whole(rng: torch.Generator, low: int, high: int) -> int:
    """Draw a whole number from low .. high - 1."""
    return torch.randint(low, high, (), generator=rng).item()


def uniform(rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """Draw a number from low to high."""
    return low + (high - low) * torch.rand((), generator=rng).item()


FAULTS = ("tremble", "freeze", "ghost", "blur", "noise", "flicker", "seam")


def spoil(fault: str, strength: float, x: Tensor, mouth: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Add one fault of a strength in 0..1 to a clip.

    Args: x (F, 3, S, S) in [0, 1]; mouth (F,) that is shown. Returns: both, as they are seen afterwards.
    """
    u, f, at = strength, len(x), torch.arange(len(x))
    normal = lambda *shape: torch.randn(*shape, generator=rng)
    if fault == "tremble":                           # the head jumps, each frame by itself
        pose = torch.zeros(f, 6)
        pose[:, [0, 3]], pose[:, [2, 4]] = 0.035 * u * normal(f, 2), 0.02 * u * normal(f, 1) * torch.tensor([1, -1.0])
        return warp(x, pose, "bilinear"), mouth
    if fault == "freeze":                            # up to three quarters of the frames are held
        shown = at.clone()
        for _ in range(30):
            if (shown != at).sum() < 0.75 * u * f:
                start = whole(rng, 0, f - 3)
                shown[start:start + whole(rng, 3, 9)] = shown[start].item()
        return x[shown], mouth[shown]
    if fault == "ghost":                             # an earlier frame shines through
        past, w = (at - whole(rng, 2, 8)).clamp_min(0), 0.55 * u
        return (1 - w) * x + w * x[past], (1 - w) * mouth + w * mouth[past]
    if fault == "blur":
        return blur(x, (0.25 + 2 * u) * x.shape[-1] / 64), mouth
    if fault == "noise":
        return x + 0.1 * u * normal(*x.shape), mouth
    if fault == "flicker":                           # light and tint tremble
        return x * (1 + 0.12 * u * normal(f, 1, 1, 1)) + 0.06 * u * normal(f, 3, 1, 1), mouth
    chunk = at // whole(rng, 3, 7)                   # seam: every few frames head and shading jump
    n = chunk[-1].item() + 1
    pose = torch.zeros(n, 6)
    pose[:, [0, 3]], pose[:, [1, 5]] = 0.04 * u * normal(n, 2), 0.03 * u * normal(n, 2)
    shade = nnf.interpolate(0.06 * u * normal(n, 3, 6, 6), x.shape[-2:], mode="bicubic")
    return warp(x, pose[chunk], "bilinear") + shade[chunk], mouth


@dataclass
class Lesson:
    """A batch of clips of F frames and what to say of them."""

    frames: Tensor                                   # (B, F, 3, S, S) uint8
    audio: Tensor                                    # (B, F * 640)
    quality: Tensor                                  # (B, 3) ratings, 1..5
    shown: Tensor                                    # (B, F) mouth, as in Material
    called: Tensor                                   # (B, F)
    faults: Tensor                                   # (B, 7) strength of each of FAULTS, nan where it is not known
    rivals: int                                      # how many, the last ones, are groups of RIVALS


def lesson_sound(material: Material, other: Material, row: int, start: int, frames: int,
                 rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose the sound of a window: mostly its own, or early or late, or mixed with another's, or another's.

    Returns: sound (F * 640,), and the mouth that it calls for (F,).
    """
    kind = uniform(rng)
    move = whole(rng, 1, SHIFT + 1) * (1 if uniform(rng) < 0.5 else -1) if 0.35 < kind < 0.8 else 0
    at = max(0, min(start + move, material.frames.shape[1] - frames))
    sound, called = material.audio[row, at:at + frames].flatten(), material.called[row, at:at + frames]
    if kind >= 0.8:
        w = uniform(rng, 0.2, 0.8) if kind < 0.92 else 1.0
        j, k = whole(rng, 0, len(other)), whole(rng, 0, other.frames.shape[1] - frames + 1)
        sound = normalise_loudness((1 - w) * sound + w * other.audio[j, k:k + frames].flatten())
        called = (1 - w) * called + w * other.called[j, k:k + frames]
    return sound, called


def lesson(material: Material, other: Material, row: int, frames: int, rng: torch.Generator) -> tuple:
    """Make one clip of known quality: which window, how lively, which sound, which fault. `other` lends its voices."""
    start = whole(rng, 0, material.frames.shape[1] - frames + 1)
    window = slice(start, start + frames)
    x, shown = material.frames[row, window] / 255, material.shown[row, window]
    lively, fault = material.lively[row].item(), material.fault[row].item()
    if material.face is not None and uniform(rng) < 0.6:         # act it, with less or more expression
        mouth, rest = uniform(rng, 0, 1.25), uniform(rng, 0, 1.25)
        x = act(material.face[row, window] / 255, material.pose[row, window], mouth, rest)
        shown = shown[0] + mouth * (shown - shown[0])
        lively = MOUTH_SHARE * min(mouth, 1) + (1 - MOUTH_SHARE) * min(rest, 1)
    if uniform(rng) < 0.1:                           # splice: for a while the mouth does what it did at another time
        length = whole(rng, frames // 5, frames // 2)
        at, source = whole(rng, 0, frames - length), whole(rng, 0, frames - length)
        order = torch.arange(frames)
        order[at:at + length] = torch.arange(source, source + length)
        x, shown, fault = x[order], shown[order], max(fault, 0.15)
    sound, called = lesson_sound(material, other, row, start, frames, rng)
    faults = torch.full((len(FAULTS),), 0.0 if material.face is not None else math.nan)
    if fault < 0.3 and uniform(rng) < 0.65:
        kind, strength, amplitude = whole(rng, 0, len(FAULTS)), uniform(rng), shown.std().clamp_min(1e-3)
        x, shown = spoil(FAULTS[kind], strength, x, shown, rng)
        lively = lively * (1 - MOUTH_SHARE + MOUTH_SHARE * (shown.std() / amplitude).clamp_max(1).item())
        fault, faults[kind] = max(fault, strength), strength
    quality = 1 + 4 * torch.tensor([1 - apart(shown, called), lively, 1 - fault]).clamp(0, 1)
    return to_bytes(x), sound, quality, shown, called, faults


@torch.no_grad()
def lessons(good: Material, generated: Material | None, batch: int, seed: int, frames: int | None = None,
            rows: Sequence[int] | None = None) -> Lesson:
    """Draw a batch, all of one length: of good clips, or of the given rows of them, and, last, three eighths of rivals.

    Rivals are RIVALS versions of one clip, with one window, sound and fault: they differ in what was generated, as
    those differ that GRPO compares. A seed gives the same lessons always.
    """
    rng = torch.Generator().manual_seed(seed)
    frames = frames or 2 * whole(rng, LESSON_FRAMES[0] // 2, LESSON_FRAMES[1] // 2 + 1)
    rivals = 0 if generated is None else batch * 3 // 8 // RIVALS * RIVALS
    made = [lesson(good, good, whole(rng, 0, len(good)) if rows is None else rows[i], frames, rng)
            for i in range(batch - rivals)]
    while len(made) < batch:
        clip, twist = whole(rng, 0, len(generated) // VERSIONS), whole(rng, 0, 2 ** 31)
        for version in torch.randperm(VERSIONS, generator=rng)[:RIVALS].tolist():
            same = torch.Generator().manual_seed(twist)
            made.append(lesson(generated, good, clip * VERSIONS + version, frames, same))
    return Lesson(*(torch.stack(field) for field in zip(*made)), rivals)
