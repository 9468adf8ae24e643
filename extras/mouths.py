"""Read from a video's pixels how far the mouth is open, frame by frame.

1. Drawn talkers: the colours of skin, lips and mouth are known, so the open area is measured.
2. Real clips: nothing is known. The mouth's position along the one direction that follows the sound is read.

sample.py compares generated mouths with true ones by these readers; extras/lessons.py labels lessons by them.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as nnf
from torch import Tensor

from data import MEL_DIM, MELS, log_mel
from model import estimate_pose, unwarp


# ---------------------------------------------------------------- drawn talkers

def mouth_palette(truth: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """List the colours a pixel near the mouth can have: mixtures of two neighbours among skin, lips, inside.

    Returns: colours (K, 3) in 0..1; inside (K,), the part of such a pixel that is open mouth.
    """
    skin, lip, interior, teeth = (truth[name] for name in ("skin", "lip", "interior", "teeth"))
    tint = lambda colour, *shades: torch.stack([colour * torch.tensor(shade) for shade in shades])
    skins = torch.cat([tint(skin, 0.5, 0.65, 0.8, 0.9, 1.0, (0.70, 0.56, 0.53), (0.82, 0.74, 0.72),
                            (0.48, 0.36, 0.33), (0.97, 0.80, 0.78)), 0.75 * skin[None] + 0.22])
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

    A quadratic in (r, g, b), fitted to the palette's mixtures, says how much of a pixel is open mouth. A
    colour far from every mixture (wall, hair, clothes) counts for nothing. The mouth is the mouth-sized
    window that holds most, wherever in the box the head has taken it.

    Args:    frames (F, 3, S, S) uint8, or float in 0..1; truth of the clip: only its colours and mouth_box.
    Returns: area (F,) float32.
    """
    size = frames.shape[-1]
    colours, inside = mouth_palette(truth)
    pairs = torch.triu_indices(3, 3)
    features = lambda c: torch.cat([torch.ones_like(c[:, :1]), c, c[:, pairs[0]] * c[:, pairs[1]]], 1)
    degree = (inside * 4).long()
    weight = torch.bincount(degree).float()[degree].rsqrt().double()[:, None]   # each degree weighs the same
    design, target = features(colours).double() * weight, inside.double()[:, None] * weight
    fit = torch.linalg.lstsq(design, target).solution.float()                   # (10, 1)
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


# ---------------------------------------------------------------- real clips

def head_pose(video: Tensor) -> Tensor:
    """Measure the pose of the head, (F, 6), in a video (F, 3, S, S) in [0, 1]."""
    return estimate_pose(video[None])[0]


def mouth_box(video: Tensor, pose: Tensor) -> Tensor:
    """Hold the head still and cut out the lower middle of the face, where a real mouth moves.

    Args: video (F, 3, S, S) in [0, 1], pose (F, 6) of its head. Returns: (F, P) grey, less the first frame's.
    """
    size = video.shape[-1]
    top, bottom, left, right = (round(share * size) for share in (0.60, 0.95, 0.30, 0.70))
    box = unwarp(video, pose)[:, :, top:bottom, left:right].mean(1).flatten(1)
    return box - box[:1]


def mouth_boxes(videos: Iterable[Tensor]) -> Tensor:
    """Cut out the mouth boxes of videos (F, 3, S, S) in [0, 1]. Returns: (N, F, P)."""
    return torch.stack([mouth_box(video, head_pose(video)) for video in videos])


def mouth_axis(boxes: Tensor, audio: Tensor, components: int = 16, bands: int = 4,
               ridge: float = 0.01) -> Tensor:
    """Find the direction in which the mouth boxes of true clips follow the sound most closely.

    How far a mouth is open is read as its position along this one axis: the first canonical correlate
    (Hotelling 1936) of the boxes' principal components and the log-mel around each frame in a few bands.
    (The first principal component itself may be light or a turning head.)

    Args:    boxes (N, F, P) of true clips; audio (N, F * 640); ridge: added to unit variances.
    Returns: (P,); a mouth's position along it is larger where sound is louder.
    """
    box = boxes.flatten(0, 1).double()
    box = box - box.mean(0)
    axes = torch.linalg.eigh(box.T @ box).eigenvectors[:, -components:]
    axes = axes / (box @ axes).std(0).clamp_min(1e-6)
    mel = log_mel(audio, boxes.shape[1]).double().flatten(0, 1)
    mel = mel.unflatten(1, (MEL_DIM // MELS, bands, -1)).mean(-1).flatten(1)    # (N F, instants * bands)
    mel = (mel - mel.mean(0)) / mel.std(0).clamp_min(1e-6)
    moves = box @ axes

    def covariance(x, y):
        return x.T @ y / len(x) + (ridge * torch.eye(x.shape[1], dtype=x.dtype) if x is y else 0)
    heard = covariance(moves, mel) @ torch.linalg.solve(covariance(mel, mel), covariance(mel, moves))
    found = torch.linalg.eig(torch.linalg.solve(covariance(moves, moves), heard))
    axis = axes @ found.eigenvectors[:, found.eigenvalues.real.argmax()].real
    return (axis * (box @ axis @ mel.sum(1)).sign()).float()


def high_pass(signals: Tensor, frames: int = 25) -> Tensor:
    """Subtract from signals (N, F) their running mean over a second. What is left is lips, not where a
    sentence begins and ends, in which any two videos agree."""
    return signals - nnf.avg_pool1d(signals, frames, 1, frames // 2, count_include_pad=False)
