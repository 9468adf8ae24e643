"""What a good talking portrait is, in numbers.

This file holds the held-out metrics: measurements that no training ever sees as a target, so that they can judge it.
They come in two kinds, reported apart.

    need the truth      lip-sync correlation and mouth amplitude of drawn talkers (the pixel oracle), mouth-motion
                        correlation with a real clip, distance to the true frames, motion relative to the true clip
    need no truth       still background, jerk, seams at chunk borders: a reward may one day optimise these

A video is (F, 3, S, S), uint8 or float in [0, 1]; frames are 40 ms apart.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

# ---------------------------------------------------------------- metrics that need the truth: drawn talkers


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
        pixels = part.movedim(1, 3).reshape(-1, 3).float() / (255 if frames.dtype == torch.uint8 else 1)
        known = torch.exp(-(torch.cdist(pixels, colours).amin(1) / 0.1) ** 2)
        coverage = (features(pixels) @ fit)[:, 0].clamp(0, 1.2) * known
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


def mouth_amplitude(frames: Tensor, true_frames: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """Compare how much the mouth moves with the true clip's, measured alike. Returns: scalar, 1 is the truth."""
    made, true = (mouth_opening_from_pixels(x, truth).std() for x in (frames, true_frames))
    return made / true.clamp(min=1e-6)


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


def mouth_box(frames: Tensor) -> Tensor:
    """Return (F, P), the grey lower middle of each frame minus that of the first, in which a real mouth moves."""
    size = frames.shape[-1]
    top, bottom, left, right = (round(share * size) for share in (0.60, 0.95, 0.30, 0.70))
    box = frames[:, :, top:bottom, left:right].mean(1).flatten(1)
    return box - box[:1]


def mouth_axis(clips: list[Tensor]) -> Tensor:
    """Find the direction (P,) in which the mouth boxes of real clips vary most: their first principal component.

    Real clips carry no truth, so how far a mouth is open is read as the position along this one axis. It is
    fitted to the true clips alone.
    """
    boxes = torch.cat([quicken(mouth_box(clip)) for clip in clips])
    return torch.linalg.eigh(boxes.T @ boxes).eigenvectors[:, -1]


def quicken(signal: Tensor, frames: int = 25) -> Tensor:
    """Subtract from (F, ...) its running mean over a second: lips are quick, heads are slow."""
    flat = signal.flatten(1).T[:, None]                                              # (P, 1, F)
    ones = torch.ones_like(flat)
    mean = nnf.avg_pool1d(flat, frames, 1, frames // 2) / nnf.avg_pool1d(ones, frames, 1, frames // 2)
    return (flat - mean)[:, 0].T.view_as(signal)


def mouth_motion(frames: Tensor, axis: Tensor) -> Tensor:
    """Return (F,), how the mouth of a real face moves: its box along `axis`, without the head's slow motion."""
    return quicken(mouth_box(frames)) @ axis


def shifted_correlation(made: Tensor, true: Tensor, shift: int = 0) -> Tensor:
    """Correlate two signals (F,), `made` at frame f + shift with `true` at frame f, over the frames that both have."""
    n = len(true) - abs(shift)
    made, true = (made[shift:], true[:n]) if shift >= 0 else (made[:n], true[-shift:])
    return correlation(made, true)


def sync_offset(made: Tensor, true: Tensor, most: int = 8) -> Tensor:
    """Return by how many frames `made` (F,) comes after `true` (F,): the shift at which they correlate best."""
    shifts = range(-most, most + 1)
    best = torch.stack([shifted_correlation(made, true, shift) for shift in shifts]).argmax()
    return torch.tensor(float(shifts[best]))


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
