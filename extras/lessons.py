"""Lessons for a judge: clips of known quality, made from good clips by graded faults.

Three ratings from 1 to 5 say how good a lesson is:

    lip_sync         5 - 4 d    d: distance of the mouth that is seen and the one that the sound calls for
    expressiveness   1 + 4 l    l: liveliness, the amplitude of mouth (.65) and of brows, eyes, head (.35)
    motion           5 - 4 u    u: strength of the worst fault: tremble, freeze, ghost, blur, noise, ...

The mouth of a drawn talker is known. That of a real clip is read by a proxy: how far the lower middle of the
face has moved along the direction that follows the sound most closely (mouths.mouth_axis). Takes of
generators are labelled by sample.evaluate; extras/school.py says what that means for the judge.

N clips of P frames are the material; B lessons have F frames; S pixels per side.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from data import Clip, pixels, sounds, to_bytes
from extras.files import MediaError
from extras.media import FPS, normalise_loudness
from extras.mouths import mouth_axis, mouth_boxes, mouth_opening_from_pixels
from grpo import Settings, drawing_step, stochastic_steps
from model import estimate_pose, load_generator, pixel_grid, unwarp, warp
from sample import evaluate, imitate, seeded_noise

MATERIAL_FRAMES = 64                # of a clip; lessons are windows of it, so sound can be shifted
LESSON_FRAMES = 16, 48              # shortest and longest lesson
SHIFT = 6                           # frames by which sound is moved at most
REST = 0.3                          # deviation of a mouth; one that moves less is at rest
MOUTH_SHARE = 0.65                  # of the mouth in liveliness
GENERATED_CLIPS = 160               # clips that each generator imitates
VERSIONS, GROUP = 6, 4              # of a clip that is imitated; of these, in a group of lessons
FAULTS = ("tremble", "freeze", "ghost", "blur", "noise", "flicker", "seam")


@dataclass
class Material:
    """N clips of P frames to make lessons of. Mouths are in deviations of the whole set."""

    frames: Tensor                  # (N, P, 3, S, S) uint8
    audio: Tensor                   # (N, P, 640)
    mouth_heard: Tensor             # (N, P) opening that the sound calls for
    mouth_seen: Tensor              # (N, P) opening in the picture
    lively: Tensor                  # (N,) 0..1
    fault: Tensor                   # (N,) 0..1
    pose: Tensor | None = None      # (N, P, 6) of the head, and
    face: Tensor | None = None      # (N, P, 3, S, S) uint8, the face with its pose undone; generated: None

    def __len__(self) -> int:
        return len(self.frames)


def mouth_reader(clips: Sequence[Clip], frames: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return a function that reads the mouths (N, F) off videos (F, 3, S, S) in [0, 1] of these N clips."""
    if clips[0].truth:
        return lambda videos: torch.stack([mouth_opening_from_pixels(video, clip.truth)
                                           for video, clip in zip(videos, clips)])
    some = clips[:200]
    axis = mouth_axis(mouth_boxes(clip.frames[:frames] / 255 for clip in some), sounds(some, frames))
    return lambda videos: mouth_boxes(videos) @ axis


def true_mouths(clips: Sequence[Clip], frames: int) -> Tensor:
    """Return how open mouths are, (N, F): of drawn talkers the truth, of others the proxy. Unit deviation."""
    if clips[0].truth:
        mouth = torch.stack([(clip.truth["opening"] * clip.truth["width"])[:frames] for clip in clips])
    else:
        mouth = mouth_reader(clips, frames)(clip.frames[:frames] / 255 for clip in clips)
    return (mouth - mouth.mean()) / mouth.std()


def long_enough(clips: Sequence[Clip]) -> list[Clip]:
    """Leave out clips that are shorter than the material. Raises: MediaError where all are."""
    kept = [clip for clip in clips if len(clip.frames) >= MATERIAL_FRAMES]
    if not kept:
        raise MediaError("the judge's clips",
                         f"are all shorter than {MATERIAL_FRAMES / FPS:.2f} s; give longer ones")
    return kept


def good_material(clips: Sequence[Clip]) -> Material:
    """Take the start of real or drawn clips as it is, and take head and face apart."""
    clips, frames = long_enough(clips), MATERIAL_FRAMES
    poses, faces = [], []
    for clip in tqdm(clips, "taking faces apart", leave=False):
        video = clip.frames[:frames] / 255
        poses.append(estimate_pose(video[None])[0])
        faces.append(to_bytes(unwarp(video, poses[-1])))
    pictures = torch.stack([clip.frames[:frames] for clip in clips])
    audio, mouth = sounds(clips, frames).unflatten(1, (frames, -1)), true_mouths(clips, frames)
    lively, fault = torch.ones(len(clips)), torch.zeros(len(clips))
    return Material(pictures, audio, mouth, mouth, lively, fault, torch.stack(poses), torch.stack(faces))


def generated_material(runs: Sequence[str | Path], clips: Sequence[Clip], seed: int = 0) -> Material:
    """Let the generator of each run imitate clips, each run other ones, in VERSIONS ways.

    These are four takes, the codec alone, and that with noise on the latents. Takes are as GRPO's, of
    one initial noise, with other draws on the way. Quality is measured against the true clips: mouth and
    head by `sample.evaluate`; the fault is log(jerk / true jerk) / log 3, which puts the codec alone at .2
    and a generator of 150 steps at .8. Returns: Material, the versions of a clip one after the other.
    """
    clips = long_enough(clips)
    every = max(1, len(clips) // GENERATED_CLIPS)
    parts = [imitations(run, clips[i::every], seed) for i, run in enumerate(runs)]
    return Material(*(torch.cat(field) for field in zip(*parts)))


@torch.no_grad()
def imitations(run: str | Path, clips: Sequence[Clip], seed: int) -> list[Tensor]:
    """Show each clip in VERSIONS ways. Returns: the fields of Material."""
    model = load_generator(run).eval()
    c = model.config
    if c.size != clips[0].frames.shape[-1]:
        raise MediaError(run, f"makes pictures of {c.size} pixels, where the judge sees "
                              f"{clips[0].frames.shape[-1]}; name a run of that size")
    frames = MATERIAL_FRAMES // c.chunk_frames * c.chunk_frames
    true = pixels(clips, frames)
    latents = torch.cat([model.codec.encode(part) for part in true.split(16)])
    rng = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(clips), 1, 1, 1, generator=rng) * torch.randn(latents.shape, generator=rng)
    videos = [model.codec.decode(true[:, 0], z) for z in (latents, latents + 0.5 * noise)]
    for take in range(VERSIONS - 2):
        fresh = seeded_noise(seed + 1 + take, range(len(clips)), (c.video_tokens, c.channels))
        step = drawing_step(Settings(), stochastic_steps(Settings.rollout_steps), fresh)
        videos.append(imitate(model, clips, frames, Settings.rollout_steps, seed=seed, step=step))

    heard, audio = true_mouths(clips, frames), sounds(clips, frames).unflatten(1, (frames, -1))
    read = mouth_reader(clips, frames)
    mouth = read(true)
    slope = ((mouth - mouth.mean()) * heard).mean() / mouth.var()      # what is read -> unit deviation
    measured = [evaluate(video, clips, c.chunk_frames) for video in videos]
    true_head = measured[0]["head"].clamp_min(1e-6)                    # the codec moves it as it was
    versions = []
    for video, metrics in zip(videos, measured):
        seen = (read(video) - mouth.mean()) * slope
        head = (metrics["head"] / true_head).clamp(0, 1)
        lively = MOUTH_SHARE * metrics["amplitude"].clamp(0, 1) + (1 - MOUTH_SHARE) * head
        fault = (metrics["jerk_ratio"].log() / math.log(3)).clamp(0, 1)
        versions.append((to_bytes(video), audio, heard, seen, lively, fault))
    return [rearrange(list(field), "v n ... -> (n v) ...") for field in zip(*versions)]


def lip_mismatch(seen: Tensor, heard: Tensor) -> Tensor:
    """Return the distance of two mouths (..., F): 0 alike, 1 as far apart as unrelated ones or farther.

    It is sqrt(1 - correlation): .95 is .22 and .97 is .17 here, where a correlation would hardly tell good
    from very good. How far lips open is left to expressiveness: a generator whose lips move too little would
    else learn to open them more rather than in time. A mouth at rest, where a correlation means nothing,
    counts as if it moved by REST.
    """
    def standardised(mouth):
        deviation = mouth.std(-1, correction=0, keepdim=True).clamp_min(REST)
        return (mouth - mouth.mean(-1, keepdim=True)) / deviation

    return ((standardised(seen) - standardised(heard)).square().mean(-1) / 2).sqrt().clamp_max(1)


def act(face: Tensor, pose: Tensor, mouth: float, rest: float) -> Tensor:
    """Act a clip with less or more expression: frame = warp(first + gain (face - first), rest * pose).

    The gain is `mouth` near the mouth and `rest` elsewhere. face (F, 3, S, S) in [0, 1], pose (F, 6).
    """
    x, y = pixel_grid(face.shape[-1]).unbind(-1)
    near = (1.6 * torch.exp(-(x ** 2 + (y - 0.47) ** 2) / (2 * 0.2 ** 2))).clamp_max(1)    # the codec's focus
    return warp(face[:1] + (rest + (mouth - rest) * near) * (face - face[:1]), rest * pose)


def whole(rng: torch.Generator, low: int, high: int) -> int:
    """Draw a whole number from low .. high - 1."""
    return torch.randint(low, high, (), generator=rng).item()


def uniform(rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """Draw a number from low to high."""
    return low + (high - low) * torch.rand((), generator=rng).item()


def spoil(fault: str, u: float, x: Tensor, mouth: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Add one fault of strength u in 0..1 to a clip.

    Args: x (F, 3, S, S) in [0, 1]; mouth (F,) that is seen. Returns: both, as they are afterwards.
    """
    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    f, at = len(x), torch.arange(len(x))
    if fault == "tremble":                           # the head jumps, each frame by itself
        pose = torch.zeros(f, 6)
        pose[:, [0, 3]] = 0.035 * u * normal(f, 2)
        pose[:, [2, 4]] = 0.02 * u * normal(f, 1) * torch.tensor([1, -1.0])
        return warp(x, pose, "bilinear"), mouth
    if fault == "freeze":                            # up to three quarters of the frames are held
        held = at.clone()
        for _ in range(30):
            if (held != at).sum() < 0.75 * u * f:
                start = whole(rng, 0, f - 3)
                held[start:start + whole(rng, 3, 9)] = held[start].item()
        return x[held], mouth[held]
    if fault == "ghost":                             # an earlier frame shines through
        past, w = (at - whole(rng, 2, 8)).clamp_min(0), 0.55 * u
        return (1 - w) * x + w * x[past], (1 - w) * mouth + w * mouth[past]
    if fault == "blur":
        deviation = (0.25 + 2 * u) * x.shape[-1] / 64
        return gaussian_blur(x, 2 * math.ceil(2.5 * deviation) + 1, deviation), mouth
    if fault == "noise":
        return x + 0.1 * u * normal(*x.shape), mouth
    if fault == "flicker":                           # light and tint tremble
        return x * (1 + 0.12 * u * normal(f, 1, 1, 1)) + 0.06 * u * normal(f, 3, 1, 1), mouth
    chunk = at // whole(rng, 3, 7)                   # seam: every few frames head and shading jump
    n = chunk[-1].item() + 1
    pose = torch.zeros(n, 6)
    pose[:, [0, 3]] = 0.04 * u * normal(n, 2)
    pose[:, [1, 5]] = 0.03 * u * normal(n, 2)
    shade = nnf.interpolate(0.06 * u * normal(n, 3, 6, 6), x.shape[-2:], mode="bicubic")
    return warp(x, pose[chunk], "bilinear") + shade[chunk], mouth


@dataclass
class Lessons:
    """A batch of clips of F frames and what to say of them."""

    frames: Tensor                  # (B, F, 3, S, S) uint8
    audio: Tensor                   # (B, F * 640)
    quality: Tensor                 # (B, 3) ratings, 1..5
    mouth_seen: Tensor              # (B, F) as in Material
    mouth_heard: Tensor             # (B, F)
    faults: Tensor                  # (B, 7) strength of each of FAULTS, nan where it is not known
    grouped: int                    # the last so many are groups of GROUP versions of a clip


def choose_sound(material: Material, voices: Material, row: int, start: int, frames: int,
                 rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose the sound of a window: mostly its own, or early or late, or mixed with another's, or another's.

    Returns: sound (F * 640,), and the mouth that it calls for (F,).
    """
    kind = uniform(rng)
    if 0.35 < kind < 0.8:
        start += whole(rng, 1, SHIFT + 1) * (1 if uniform(rng) < 0.5 else -1)
        start = max(0, min(start, material.frames.shape[1] - frames))
    own = row, slice(start, start + frames)
    sound, mouth = material.audio[own].flatten(), material.mouth_heard[own]
    if kind >= 0.8:
        w = uniform(rng, 0.2, 0.8) if kind < 0.92 else 1.0
        other, start = whole(rng, 0, len(voices)), whole(rng, 0, voices.frames.shape[1] - frames + 1)
        foreign = other, slice(start, start + frames)
        sound = normalise_loudness((1 - w) * sound + w * voices.audio[foreign].flatten())
        mouth = (1 - w) * mouth + w * voices.mouth_heard[foreign]
    return sound, mouth


def make_lesson(material: Material, voices: Material, row: int, frames: int, rng: torch.Generator) -> tuple:
    """Make one clip of known quality: which window, how lively, which sound, which fault.

    Args: voices: whose sound may be heard instead. Returns: the fields of Lessons, for one clip.
    """
    start = whole(rng, 0, material.frames.shape[1] - frames + 1)
    window = row, slice(start, start + frames)
    x, seen = material.frames[window] / 255, material.mouth_seen[window]
    lively, fault = material.lively[row].item(), material.fault[row].item()
    if material.face is not None and uniform(rng) < 0.6:         # act it, with less or more expression
        mouth, rest = uniform(rng, 0, 1.25), uniform(rng, 0, 1.25)
        x = act(material.face[window] / 255, material.pose[window], mouth, rest)
        seen = seen[0] + mouth * (seen - seen[0])
        lively = MOUTH_SHARE * min(mouth, 1) + (1 - MOUTH_SHARE) * min(rest, 1)
    if uniform(rng) < 0.1:                           # splice: for a while it does what it did at another time
        length = whole(rng, frames // 5, frames // 2)
        at, source = whole(rng, 0, frames - length), whole(rng, 0, frames - length)
        order = torch.arange(frames)
        order[at:at + length] = torch.arange(source, source + length)
        x, seen, fault = x[order], seen[order], max(fault, 0.15)
    sound, heard = choose_sound(material, voices, row, start, frames, rng)
    faults = torch.full((len(FAULTS),), 0.0 if material.face is not None else math.nan)
    if fault < 0.3 and uniform(rng) < 0.65:
        kind, strength, amplitude = whole(rng, 0, len(FAULTS)), uniform(rng), seen.std().clamp_min(1e-3)
        x, seen = spoil(FAULTS[kind], strength, x, seen, rng)
        lively *= 1 - MOUTH_SHARE + MOUTH_SHARE * (seen.std() / amplitude).clamp_max(1).item()
        fault, faults[kind] = max(fault, strength), strength
    quality = 1 + 4 * torch.tensor([1 - lip_mismatch(seen, heard), lively, 1 - fault]).clamp(0, 1)
    return to_bytes(x), sound, quality, seen, heard, faults


@torch.no_grad()
def draw_lessons(good: Material, generated: Material | None, batch: int, seed: int, frames: int | None = None,
                 rows: Sequence[int] | None = None) -> Lessons:
    """Draw a batch of one length: of good clips, or given rows of them, and, last, three eighths in groups.

    A group is of GROUP versions of one clip with one window, sound and fault: they differ in what was
    generated, as those differ that GRPO compares. A seed gives the same lessons always.
    """
    rng = torch.Generator().manual_seed(seed)
    frames = frames or 2 * whole(rng, LESSON_FRAMES[0] // 2, LESSON_FRAMES[1] // 2 + 1)
    grouped = 0 if generated is None else batch * 3 // 8 // GROUP * GROUP
    made = []
    for i in range(batch - grouped):
        row = whole(rng, 0, len(good)) if rows is None else rows[i]
        made.append(make_lesson(good, good, row, frames, rng))
    while len(made) < batch:
        clip, same = whole(rng, 0, len(generated) // VERSIONS), whole(rng, 0, 2 ** 31)
        for version in torch.randperm(VERSIONS, generator=rng)[:GROUP].tolist():
            made.append(make_lesson(generated, good, clip * VERSIONS + version, frames,
                                    torch.Generator().manual_seed(same)))
    return Lessons(*(torch.stack(field) for field in zip(*made)), grouped)
