"""Animate a portrait with speech, and measure how well it is done.

    python sample.py --checkpoint runs/tiny --image portrait.jpg --audio speech.wav --out video.mp4
    python sample.py --score video.mp4 --portrait portrait.jpg        the reward, component by component, and metrics

The video is generated chunk by chunk and written as it comes, in constant memory: speech may be of any length.

All metrics that no reward contains stand here. The arrow goes one way: sample.py imports reward.py, never the reverse,
so a generator that is trained on the reward can be measured by them.

A video is (F, 3, S, S), uint8 or float in [0, 1]; B clips, F frames, S pixels per side.
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor
from tqdm import tqdm

from data import (FPS, LATENCY, MEL_DIM, MELS, SAMPLE_RATE, SAMPLES_PER_FRAME, Clip, LogMel, MediaError, folder_clips,
                  hear, load_clip, load_portrait, log_mel, one_line, pixels, read_speech, sounds, with_interval,
                  write_video)
from extras.reward_flags import make_judge, make_reward, reward_flags, table
from model import SAMPLING_STEPS, Generator, estimate_pose, load_generator, ode_step, unwarp
from reward import DEFAULT_SYNC, SYNC_FRAMES, SYNC_SHIFTS, SyncNetwork, load_sync


def generator(seed: int, index: int, device="cpu") -> torch.Generator:
    """Return a random generator of its own for each (seed, index). On the CPU it gives the same numbers for any device
    that they are moved to; the many of a pretraining step are quicker drawn where they are used."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + index)


def seeded_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], device="cpu") -> Callable[[int], Tensor]:
    """Return a function that draws the noise of each next chunk, (len(indices), *shape), on `device`.

    Every video has a generator of its own, so that it does not change with the batch it is made in.
    """
    generators = [generator(seed, i) for i in indices]
    return lambda chunk: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


# ---------------------------------------------------------------- held-out metrics
#
# No reward may use what stands here: reward.py imports nothing of this file, so that what it has trained can be
# measured. (How far the embedded judge was taught by the same signal, extras/school.py says.) First, what needs the
# truth of drawn talkers.

def mouth_palette(truth: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """List the colours a pixel near the mouth can have: mixtures of two neighbours among skin, lips and what is inside.

    Returns: colours (K, 3) in 0..1; inside (K,), the part of such a pixel that is open mouth.
    """
    skin, lip, interior, teeth = (truth[k] for k in ("skin", "lip", "interior", "teeth"))
    tint = lambda colour, *shades: torch.stack([colour * torch.tensor(s) for s in shades])
    skins = torch.cat([tint(skin, 0.5, 0.65, 0.8, 0.9, 1.0, (0.70, 0.56, 0.53), (0.82, 0.74, 0.72), (0.48, 0.36, 0.33),
                            (0.97, 0.80, 0.78)), 0.75 * skin[None] + 0.22])
    lips = torch.cat([tint(lip, 1.0, (0.76, 0.70, 0.70), (0.88, 0.85, 0.85), (0.55, 0.45, 0.45)),
                      0.7 * lip[None] + 0.3])
    tongue = 0.6 * interior + 0.4 * torch.tensor([0.70, 0.26, 0.36])
    opens = torch.stack([interior, teeth, 0.85 * teeth, (interior + teeth) / 2, tongue])
    part = torch.linspace(0, 1, 5)
    mix = lambda a, b: (a[:, None, None] + part[:, None] * (b - a[:, None])[:, :, None]).reshape(-1, 3)
    kinds = [mix(skins, lips), mix(lips, opens), mix(opens, opens)]
    inside = [torch.zeros(len(kinds[0])), part.repeat(len(lips) * len(opens)), torch.ones(len(kinds[2]))]
    return torch.cat(kinds), torch.cat(inside)


def mouth_opening_from_pixels(frames: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """Measure the open area of the mouth, in fractions of the frame; it grows as opening * width.

    A quadratic in (r, g, b), fitted to the palette's mixtures, says how much of a pixel is open mouth; a colour far
    from every mixture (wall, hair, clothes) counts for nothing; the mouth is the mouth-sized window that holds most,
    wherever in the box the head has taken it.

    Args: frames (F, 3, S, S) uint8, or float in 0..1; truth of the clip: only its colours and mouth_box are read.
    Returns: area (F,) float32.
    """
    size = frames.shape[-1]
    colours, inside = mouth_palette(truth)
    pairs = torch.triu_indices(3, 3)
    features = lambda c: torch.cat([torch.ones_like(c[:, :1]), c, c[:, pairs[0]] * c[:, pairs[1]]], 1)  # (N, 10)
    count = torch.bincount((inside * 4).long()).float()[(inside * 4).long()]   # each degree weighs the same
    design, weight = features(colours).double(), count.rsqrt().double()
    fit = torch.linalg.lstsq(design * weight[:, None], inside.double()[:, None] * weight[:, None]).solution.float()
    x0, y0, x1, y1 = (truth["mouth_box"] * size).round().long().clamp(0, size).tolist()
    window = min(round(0.12 * size), y1 - y0), min(round(0.25 * size), x1 - x0)
    areas = []
    for part in frames[:, :, y0:y1, x0:x1].split(64):
        seen = part.movedim(1, 3).reshape(-1, 3).float() / (255 if frames.dtype == torch.uint8 else 1)
        known = torch.exp(-(torch.cdist(seen, colours).amin(1) / 0.1) ** 2)
        coverage = (features(seen) @ fit)[:, 0].clamp(0, 1.2) * known
        coverage = coverage.view(-1, 1, y1 - y0, x1 - x0)
        areas.append(nnf.avg_pool2d(coverage, window, 1).amax((1, 2, 3)) * window[0] * window[1] / size**2)
    return torch.cat(areas)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of two signals (F,); 0 when either never moves."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = a.norm() * b.norm()
    return torch.where(scale > 1e-9, (a * b).sum() / scale.clamp(min=1e-9), 0.0).nan_to_num().float()


def lip_sync_correlation(frames: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """Correlate the measured open area with the true one. Returns: scalar in -1..1, 0 for a frozen mouth."""
    return correlation(mouth_opening_from_pixels(frames, truth), truth["opening"] * truth["width"])


# ---------------------------------------------------------------- metrics that need the truth: any clip

def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of two pictures or videos of any equal shape, in [0, 1]."""
    return -10 * torch.log10((a - b).square().mean().clamp_min(1e-10))


def motion(frames: Tensor) -> Tensor:
    """Return the mean absolute change from one frame to the next, in grey levels of 1. frames float in [0, 1]."""
    return frames.diff(dim=0).abs().mean()


def head_motion(pose: Tensor) -> Tensor:
    """Return how far a head wanders: the deviation of its measured shift, poses (F, 6) as model.estimate_pose gives."""
    return pose[:, [0, 3]].std(0).norm()


def mouth_box(face: Tensor) -> Tensor:
    """Return (F, P), the grey lower middle of a face whose head is held still, minus that of the first frame: there a
    real mouth moves. face (F, 3, S, S), as model.unwarp gives."""
    size = face.shape[-1]
    top, bottom, left, right = (round(share * size) for share in (0.60, 0.95, 0.30, 0.70))
    box = face[:, :, top:bottom, left:right].mean(1).flatten(1)
    return box - box[:1]


def mouth_boxes(videos: Iterable[Tensor]) -> Tensor:
    """Hold the heads of videos (F, 3, S, S) in [0, 1] still and return their mouth boxes, (N, F, P)."""
    return torch.stack([mouth_box(unwarp(video, estimate_pose(video[None])[0])) for video in videos])


def mouth_axis(boxes: Tensor, audio: Tensor, components: int = 16, bands: int = 4, ridge: float = 0.01) -> Tensor:
    """Find the direction in which the mouth boxes of real clips follow the sound most closely.

    Real clips carry no truth, so how far a mouth is open is read as the position along this one axis, which is fitted
    to true clips alone: the first canonical correlate (Hotelling 1936) of the boxes' principal components and the
    log-mel around each frame in a few bands. (The first principal component itself may be light or a turning head.)

    Args:    boxes (N, F, P) of true clips; audio (N, F * 640); ridge: added to unit variances.
    Returns: (P,); a mouth's position along it is larger where sound is louder.
    """
    box = boxes.flatten(0, 1).double()
    box = box - box.mean(0)
    axes = torch.linalg.eigh(box.T @ box).eigenvectors[:, -components:]
    axes = axes / (box @ axes).std(0).clamp_min(1e-6)
    mel = log_mel(audio, boxes.shape[1]).double().flatten(0, 1)
    mel = mel.unflatten(1, (MEL_DIM // MELS, bands, -1)).mean(-1).flatten(1)         # (N F, instants * bands)
    mel = (mel - mel.mean(0)) / mel.std(0).clamp_min(1e-6)
    moves = box @ axes

    def covariance(x, y):
        return x.T @ y / len(x) + (ridge * torch.eye(x.shape[1], dtype=x.dtype) if x is y else 0)
    heard = covariance(moves, mel) @ torch.linalg.solve(covariance(mel, mel), covariance(mel, moves))
    found = torch.linalg.eig(torch.linalg.solve(covariance(moves, moves), heard))
    axis = axes @ found.eigenvectors[:, found.eigenvalues.real.argmax()].real
    return (axis * correlation(box @ axis, mel.sum(1)).sign()).float()


def quicken(signal: Tensor, frames: int = 25) -> Tensor:
    """Subtract from signals (N, F) their running mean over a second: what is left is lips, not where a sentence begins
    and ends, in which any two videos agree."""
    ones = torch.ones_like(signal)
    mean = nnf.avg_pool1d(signal, frames, 1, frames // 2) / nnf.avg_pool1d(ones, frames, 1, frames // 2)
    return signal - mean


def shifted_correlation(made: Tensor, true: Tensor, shift: int = 0) -> Tensor:
    """Correlate two signals (F,), `made` at frame f + shift with `true` at frame f, over the frames that both have."""
    n = len(true) - abs(shift)
    made, true = (made[shift:], true[:n]) if shift >= 0 else (made[:n], true[-shift:])
    return correlation(made, true)


def sync_offset(made: Tensor, true: Tensor, most: int = 8) -> Tensor:
    """Return by how many frames `made` (F,) comes after `true` (F,): the shift at which they correlate best."""
    tried = torch.stack([shifted_correlation(made, true, shift) for shift in range(-most, most + 1)])
    return (tried.argmax() - most).float()


# ---------------------------------------------------------------- metrics that need no truth

def still_psnr(frames: Tensor, portrait: Tensor) -> Tensor:
    """Compare the background with the portrait's, in dB: the outer eighth at either side of the upper half.

    Args: frames (F, 3, S, S), portrait (3, S, S), float in [0, 1].
    """
    size = frames.shape[-1]
    sides = torch.cat([torch.arange(size // 8), torch.arange(size - size // 8, size)])
    return psnr(frames[:, :, : size // 2, sides], portrait[None, :, : size // 2, sides])


def jerk(frames: Tensor) -> Tensor:
    """Return the mean absolute third difference in time, in grey levels of 1: trembling, flicker and jumps."""
    return frames.diff(n=3, dim=0).abs().mean()


def seam(frames: Tensor, chunk_frames: int) -> Tensor:
    """Return the mean change across chunk borders divided by that inside chunks; 1 is no seam."""
    change = frames.diff(dim=0).abs().mean((1, 2, 3))                                # (F - 1,)
    border = torch.arange(1, len(frames)) % chunk_frames == 0
    return change[border].mean() / change[~border].mean().clamp_min(1e-8)


# ---------------------------------------------------------------- held-out metrics: the other sync network
#
# The metrics follow SyncNet's definitions, but the network is our own and small: they are *not* the LSE-D and LSE-C of
# the literature, nor comparable with them, nor comparable between two networks trained on different clips.

def offset_curve(visual: Tensor, sound: Tensor) -> Tensor:
    """Try the sound early and late: D_k = mean_i |v_i - a_(i+k)|, k in -15..15, over the windows i that both have
    (SyncNet's code pads with zeros instead). Args: (B, W, D) each, W > 15. Returns: (B, 31)."""
    n = visual.shape[1]
    if visual.shape != sound.shape or n <= SYNC_SHIFTS:
        raise ValueError(f"want picture and sound of one length, {SYNC_FRAMES + SYNC_SHIFTS} frames or more, "
                         f"got {tuple(visual.shape)} and {tuple(sound.shape)} windows")
    return torch.stack([(visual[:, max(0, -k) : n - max(0, k)] - sound[:, max(0, k) : n - max(0, -k)])
                        .norm(dim=-1).mean(1) for k in range(-SYNC_SHIFTS, SYNC_SHIFTS + 1)], 1)


@torch.no_grad()
def sync_metrics(net: SyncNetwork, frames: Tensor, audio: Tensor) -> dict[str, Tensor]:
    """Measure how well lips and sound go together, in SyncNet's definitions but by a network of our own (see above).

    Args:    frames (B, F, 3, S, S) float in [0, 1], audio (B, F * 640), F >= 20.
    Returns: {name: (B,)}: sync_distance = min_k D_k, in 0..2, low is good; sync_confidence = median_k D_k - min_k D_k,
             high is good; sync_offset = -argmin_k D_k, the frames by which the picture comes after its sound, 0 is
             good; sync_own = D_0, the distance as the clip plays, which no lucky shift can lower.

    An offset means nothing where confidence is low: a frozen GRID mouth has offset 0, as its silences match. Compare
    clips of one length, as fewer windows make a deeper minimum.
    """
    curve = offset_curve(net.visual(frames), net.sound(audio))
    least, best = curve.min(1)
    return {"sync_distance": least, "sync_confidence": curve.median(1).values - least,
            "sync_offset": (SYNC_SHIFTS - best).float(), "sync_own": curve[:, SYNC_SHIFTS]}


@torch.no_grad()
def identity_cosine(net: SyncNetwork, frames: Tensor, portrait: Tensor) -> Tensor:
    """Compare who is seen in each frame with who is on the portrait.

    The encoder knows no people but those it was trained on: where all clips are of one talker, it can only tell
    pictures of his apart. A frozen portrait scores 1.

    Args: frames (B, F, 3, S, S), portrait (B, 3, S, S), float in [0, 1]. Returns: cosines (B, F).
    """
    return (net.identity(frames) * net.identity(portrait)[:, None]).sum(-1)


def frechet(a: Tensor, b: Tensor) -> Tensor:
    """Return the Frechet distance between Gaussians fitted to two sets of features (Dowson & Landau 1982; FID's):

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2)

    Used on `net.visual(frames).flatten(0, 1)`, so it compares mouths in motion. Few samples make it too large, the more
    so as neighbouring windows overlap: compare sets of one size only, of many more windows than dimensions.

    Args: a (N, D), b (M, D), N and M >= 2. Returns: float64 scalar, at least 0 but for rounding.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"want two sets of features (2 or more, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()       # the trace of the root
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


# ---------------------------------------------------------------- measure

STILL = 0.25                       # of the mean of the true clips: drawn talkers and GRID have more

@torch.no_grad()
def imitate(model: Generator, clips: Sequence[Clip], frames: int, steps: int = SAMPLING_STEPS,
            guidance: float = 1.0, seed: int = 0, step: Callable[..., Tensor] = ode_step) -> Tensor:
    """Generate each clip anew from its own first frame and its own sound. Returns (B, frames, 3, S, S) in [0, 1]."""
    device = next(model.parameters()).device
    portrait = torch.stack([clip.frames[0] for clip in clips]).to(device) / 255
    mel = torch.stack([hear(clip.audio, frames, model.config.audio_encoder, device) for clip in clips]).to(device)
    shape = (model.config.video_tokens, model.config.channels)
    noise = seeded_noise(seed, range(len(clips)), shape, device)
    return torch.cat([video.cpu() for _, video in model.generate(portrait, mel, noise, steps, guidance, step)], 1)


def relative(made: Sequence[Tensor], true: Sequence[Tensor]) -> Tensor:
    """Divide by what the true clips have, but by no less than STILL of their mean.

    A clip in which nothing moves would have a ratio beyond all bounds, and decide the mean of all.
    Args: values of B clips. Returns: (B,).
    """
    made, true = torch.stack(tuple(made)), torch.stack(tuple(true))
    return made / true.clamp_min(STILL * true.mean()).clamp_min(1e-6)


NEED_NO_TRUTH = "still_psnr", "jerk", "seam", "sync_confidence", "sync_own", "identity"      # reported on a line apart


def lips_drawn(videos: Tensor, truths: Tensor, clips: Sequence[Clip]) -> tuple[dict, list[Tensor], list[Tensor]]:
    """Measure lips of drawn talkers: lip_sync, the correlation with the true mouth, and amplitude.

    Returns: name -> values; the mouths (F,) of the videos, and the true ones.
    """
    frames = videos.shape[1]
    truth = [{k: x[:frames] if x.ndim and len(x) >= frames else x for k, x in c.truth.items()} for c in clips]
    made = [mouth_opening_from_pixels(v, t) for v, t in zip(videos, truth)]
    seen = [mouth_opening_from_pixels(t, k) for t, k in zip(truths, truth)]
    true = [t["opening"] * t["width"] for t in truth]
    return {"lip_sync": [correlation(m, t) for m, t in zip(made, true)],
            "amplitude": relative([m.std() for m in made], [s.std() for s in seen])}, made, true


def lips_real(mouths: Tensor, true_mouths: Tensor, audio: Tensor) -> tuple[dict, list[Tensor], list[Tensor]]:
    """Measure lips of real clips: mouth_own, the correlation of their quick motion with the true clip's, and amplitude.

    mouth_late is the same against the true clip 5 frames later, mouth_other against another clip; over_late and
    over_other are by how much mouth_own exceeds these. Args: mouth boxes (B, F, P). Returns: as lips_drawn.
    """
    axis = mouth_axis(true_mouths, audio)
    made, true = (list(quicken(boxes @ axis)) for boxes in (mouths, true_mouths))
    own = [correlation(m, t) for m, t in zip(made, true)]
    late = [shifted_correlation(m, t, -5) for m, t in zip(made, true)]
    values = {"mouth_own": own, "mouth_late": late, "over_late": [a - b for a, b in zip(own, late)]}
    if len(true) > 1:
        values["mouth_other"] = other = [correlation(m, t) for m, t in zip(made, true[1:] + true[:1])]
        values["over_other"] = [a - b for a, b in zip(own, other)]
    return values | {"amplitude": relative([m.std() for m in made], [t.std() for t in true])}, made, true


def evaluate(videos: Tensor, clips: Sequence[Clip], chunk_frames: int,
             sync: SyncNetwork | None = None) -> dict[str, Tensor]:
    """Measure videos (B, F, 3, S, S) in [0, 1] against their true clips by the held-out metrics.

    Returns: name -> (B,) values. psnr is the distance to the true frames, most of it where a head went that is free to
    go elsewhere; mouth_psnr that of mouths, heads held still and the first frame taken off. head is relative to the
    mean of the true clips: one that sways as far as another clip's is no worse for it. With a sync network, also
    sync_confidence and sync_own of its offset curve, and identity, the mean cosine to the portrait. The rest is what
    lips_drawn or lips_real gives.
    """
    frames = videos.shape[1]
    truths = pixels(clips, frames)
    poses = [[estimate_pose(v[None])[0] for v in vs] for vs in (videos, truths)]
    heads, true_heads = (torch.stack([head_motion(pose) for pose in some]) for some in poses)
    mouths = [[mouth_box(unwarp(v, pose)) for v, pose in zip(vs, some)]
              for vs, some in zip((videos, truths), poses)]
    values = {"psnr": [psnr(v, t) for v, t in zip(videos, truths)],
              "mouth_psnr": [psnr(made, true) for made, true in zip(*mouths)],
              "motion": relative(map(motion, videos), map(motion, truths)),
              "head": relative(heads, true_heads.mean().expand(len(heads))),
              "jerk_ratio": relative(map(jerk, videos), map(jerk, truths)),
              "still_psnr": [still_psnr(v, t[0]) for v, t in zip(videos, truths)],
              "jerk": [jerk(v) for v in videos],
              "seam": [seam(v, chunk_frames) for v in videos]}
    if sync is not None:
        offsets = sync_metrics(sync, videos, sounds(clips, frames))
        values |= {k: v for k, v in offsets.items() if k in NEED_NO_TRUTH}
        values["identity"] = identity_cosine(sync, videos, truths[:, 0]).mean(1)
    if clips[0].truth:
        lips, made, true = lips_drawn(videos, truths, clips)
    else:
        lips, made, true = lips_real(*map(torch.stack, mouths), sounds(clips, frames))
    values |= lips
    values["offset"] = [sync_offset(m, t) for m, t in zip(made, true)]
    return {name: torch.stack(tuple(v)) for name, v in values.items()}


def summary(metrics: dict[str, Tensor]) -> str:
    """Write metrics, name -> (B,), as means with 95% confidence intervals; on a second line what needs no truth."""
    apart = [f"{k} {with_interval(v)}" for k, v in metrics.items() if k in NEED_NO_TRUTH]
    rest = [f"{k} {with_interval(v)}" for k, v in sorted(metrics.items()) if k not in NEED_NO_TRUTH]
    return f"  against the truth  {'  '.join(rest)}\n  without it         {'  '.join(apart)}"


# ---------------------------------------------------------------- animate

def animate(model: Generator, portrait: Tensor, speech: Tensor, steps: int, guidance: float,
            seed: int) -> Iterator[Tensor]:
    """Yield the frames (3, S, S) uint8 of a portrait (3, S, S) uint8 speaking (T,) 16 kHz; ceil(T / 640) of them."""
    c, device = model.config, next(model.parameters()).device
    frames = math.ceil(len(speech) / SAMPLES_PER_FRAME)
    whole = math.ceil(frames / c.chunk_frames) * c.chunk_frames
    mel = (hear(speech, whole, c.audio_encoder, device)[None].to(device) if c.audio_encoder else
           LogMel(speech, whole, device))
    noise = seeded_noise(seed, [0], (c.video_tokens, c.channels), device)
    left = frames
    for _, chunk in model.generate(portrait[None].to(device) / 255, mel, noise, steps, guidance):
        yield from (chunk[0, :left] * 255).round().byte().cpu()
        left -= chunk.shape[1]


# ---------------------------------------------------------------- command line

def score_videos(args: argparse.Namespace) -> None:
    """Score videos one by one: the components and the total, and, apart, what no reward uses."""
    from extras.talkers import synthetic_clips       # the one place of this file that needs an extra
    clips, broken = [], []
    for path in args.score:
        try:
            clips.append(load_clip(path, args.size, args.crop))
        except MediaError as error:
            broken.append(str(error))
    if not clips:
        raise MediaError("; ".join(broken))
    real = folder_clips(args.data, args.size, 3.0, args.crop)[0] if args.data else synthetic_clips(64, args.size, 2.0)
    reward, sync = make_reward(args, make_judge(args), real, real, args.chunk_frames), load_sync(args.sync)
    for clip in clips:
        portrait = load_portrait(args.portrait, args.size) if args.portrait else clip.frames[0]
        frames, portrait = clip.frames[None] / 255, portrait[None] / 255
        print(f"{clip.name}: {frames.shape[1]} frames\n" + table(reward, {"": reward(
            frames, clip.audio[None], portrait, [clip.name])}))
        held_out = {k: v.item() for k, v in sync_metrics(sync, frames, clip.audio[None]).items()}
        held_out["identity"] = identity_cosine(sync, frames, portrait).mean().item()
        print("held out, no part of the reward:  " + "  ".join(f"{k} {v:.3f}" for k, v in held_out.items()))
    if broken:
        raise MediaError(f"{len(broken)} of {len(args.score)} videos could not be scored", "; ".join(broken))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    g = p.add_argument_group("animate")
    g.add_argument("--checkpoint", help="the folder of a run, as train.py writes it")
    g.add_argument("--image", help="the portrait: any picture, its centre square is used")
    g.add_argument("--audio", help="the speech: any file with sound that ffmpeg reads")
    g.add_argument("--track", type=track_argument, metavar="TRACK[:CHANNEL]",
                   help="which sound of that file, from 1 (default: what has speech in it)")
    g.add_argument("--out", help="the mp4 to write")
    g.add_argument("--steps", type=int, default=SAMPLING_STEPS, help="flow steps per chunk (default %(default)s)")
    g.add_argument("--guidance", type=float, default=1.0,
                   help="how far to exaggerate what the sound adds; 1: as learned (default 1)")
    g.add_argument("--seed", type=int, default=0, help="what the sound leaves open: head, blinks (default 0)")
    g.add_argument("--max-seconds", type=float, help="use only the start of the speech")
    g = p.add_argument_group("score", "instead of animating")
    g.add_argument("--score", nargs="+", metavar="FILE", help="videos: every component of the reward, its total, and "
                   "the held-out metrics")
    g.add_argument("--portrait", help="of the videos (their first frame)")
    g.add_argument("--data", type=Path, help="a folder of real clips to compare with (drawn talkers)")
    g.add_argument("--size", type=int, default=64, help="pixels per side at which videos are scored (%(default)s)")
    g.add_argument("--chunk-frames", type=int, default=4, help="of the generator that made them (%(default)s)")
    g.add_argument("--sync", type=Path, default=DEFAULT_SYNC, help="folder of the sync network (drawn talkers')")
    reward_flags(p)
    p.add_argument("--crop", type=crop_argument, help="x,y,size: use this square, in pixels, of the picture or videos")
    p.add_argument("--device", type=device_argument, default=device_argument(), help="default: cuda if present")
    args = p.parse_args(argv)
    check_numbers(p, args, steps=1, guidance=0, seed=0, max_seconds=1 / FPS, size=32, chunk_frames=2)
    needed = args.checkpoint, args.image, args.audio, args.out
    if args.score:
        if any(needed):
            p.error("--score stands alone; leave out --checkpoint, --image, --audio and --out")
        return args
    if not all(needed):
        p.error("want --checkpoint, --image, --audio and --out; or --score")
    if Path(args.out).suffix.lower() != ".mp4":
        p.error(f"--out is the video to write, so let it end in .mp4: got {args.out}")
    return args


def check_numbers(p: argparse.ArgumentParser, args: argparse.Namespace, **least: float) -> None:
    """End with one clear line where a number that was given is below its least value, or is absurdly large."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 1e10:
            bound = "below 1e10" if value > low else f"at least {low}"
            p.error(f"--{name.replace('_', '-')} must be {bound}, got {value}")


def crop_argument(text: str) -> tuple[int, int, int]:
    """Read 'x,y,size' into three whole numbers."""
    try:
        x, y, size = (int(part) for part in text.split(","))
        if min(x, y) < 0 or size < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"want x,y,size in pixels, such as 40,0,320, got {text!r}") from None
    return x, y, size


def track_argument(text: str) -> tuple[int, int]:
    """Read 'TRACK' or 'TRACK:CHANNEL' into two numbers from 1, the second 0 where it is left open."""
    track, _, channel = text.partition(":")
    if not (track.isdecimal() and int(track) and (channel or "1").isdecimal() and int(channel or "1")):
        raise argparse.ArgumentTypeError(f"want TRACK or TRACK:CHANNEL, such as 2 or 2:1, got {text!r}")
    return int(track), int(channel or 0)


def device_argument(text: str | None = None) -> str:
    """Check the name of a device by using it; without a name, choose CUDA where it is present."""
    text = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({str(error).splitlines()[0]})") from None
    return text


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.score:
        score_videos(args)
        return
    out = Path(args.out)
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):      # before the speech is read
        raise MediaError(out, "is a folder, or in none that can be written; choose another --out")
    if out.exists() and any(out.samefile(given) for given in (args.image, args.audio)):
        raise MediaError(out, "is read and would be overwritten; choose another --out")
    model = load_generator(args.checkpoint).to(args.device).eval()
    portrait = load_portrait(args.image, model.config.size, args.crop)
    speech, track = read_speech(args.audio, args.max_seconds, args.track)
    if note := track.note():
        print(f"{args.audio}: {note}; --track TRACK[:CHANNEL] chooses another")
    seconds = len(speech) / SAMPLE_RATE
    frames = animate(model, portrait, speech, args.steps, args.guidance, args.seed)
    start = time.perf_counter()
    write_video(args.out, tqdm(frames, "frames", math.ceil(seconds * FPS), leave=False), track)
    spent = time.perf_counter() - start
    latency = f"{1000 * (LATENCY + model.config.chunk_frames / FPS):.0f} ms of sound"
    if model.config.audio_encoder:
        latency = "all of the sound, which the speech encoder hears first"
    print(f"{args.out}: {seconds:.2f} s of video in {spent:.1f} s, {spent / seconds:.2f} s per second; "
          f"streaming latency {latency}")


if __name__ == "__main__":
    with one_line("stopped; nothing was written", "lower --max-seconds, --steps or --size, or use --device cpu"):
        main()
