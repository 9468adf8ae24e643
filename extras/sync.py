"""How a sync network is trained: lips and sound of one moment are drawn together, all others pushed apart.

    python -m extras.school sync [--data DIR]            train one, for the reward or to measure

A batch holds windows of five frames, from several clips and from many moments of each. For every window of
lips the network has to find its own sound among all of them, and the other way round:

    loss = -mean_i log softmax_j(lips_i . sound_j / TEMPERATURE) at j = i              (InfoNCE, 1807.03748)

The hardest of the wrong answers are other moments of the same clip. They share voice, face and light, so only
timing tells them apart. The identity encoder learns in the same way from two pictures of one clip.

F frames, S pixels per side, N windows or pictures.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file
from torch import Tensor
from tqdm import trange

from data import Clip
from extras.files import reading_weights, write_weights
from extras.media import SAMPLES_PER_FRAME
from reward import SYNC_FRAMES, SYNC_SHIFTS, SyncNetwork

SYNC_SPAN = 50                                       # frames of a clip in a step: 45 wrong moments
TEMPERATURE = 0.07                                   # of the contrast, as in MoCo (He et al. 2020)


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    """Contrast pairs a, b (N, D), of length 1, either way round. Returns: the loss, log N for chance."""
    logits, own = a @ b.T / TEMPERATURE, torch.arange(len(a), device=a.device)
    return (nnf.cross_entropy(logits, own) + nnf.cross_entropy(logits.T, own)) / 2


def sync_loss(net: SyncNetwork, frames: Tensor, audio: Tensor) -> Tensor:
    """Contrast all windows of clips, frames (B, F, 3, S, S) and audio (B, F * 640)."""
    return info_nce(net.visual(frames).flatten(0, 1), net.sound(audio).flatten(0, 1))


def jitter(frames: Tensor, rng: torch.Generator) -> Tensor:
    """Vary what should not matter: move a clip (F, 3, S, S) uint8 by up to 3%, mirror it at random, make it
    float, and change each colour's gain by up to 15% and the brightness by up to 0.15."""
    reach = frames.shape[-1] / 32
    move, turn, gain, lift = torch.rand(7, generator=rng).split([2, 1, 3, 1])
    moved = frames.roll([round((2 * x - 1) * reach) for x in move.tolist()], (-2, -1))
    moved = moved.flip(-1) if turn < 0.5 else moved
    return (moved / 255 * (0.85 + 0.3 * gain)[:, None, None] + 0.3 * (lift - 0.5)).clamp(0, 1)


def train_sync(clips: Sequence[Clip], seed: int = 0, steps: int = 400, batch: int = 16) -> SyncNetwork:
    """Train a sync network, with its identity encoder, for which two pictures of one clip are one person.

    Args: clips: of at least 20 frames each, best 2 * batch of them or more; seed: of everything.
    Returns: the network, frozen. Raises: ValueError if there is nothing to contrast.
    """
    span = min([SYNC_SPAN] + [len(clip.frames) for clip in clips])
    if len(clips) < 2 or span < SYNC_FRAMES + SYNC_SHIFTS:
        raise ValueError(f"want two clips or more, of {SYNC_FRAMES + SYNC_SHIFTS} frames or more: "
                         f"got {len(clips)}, the shortest of {span}")
    rng = torch.Generator().manual_seed(seed)

    def draw(below, count=1):
        return torch.randint(below, (count,), generator=rng).tolist()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SyncNetwork()
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    warmup = 0.05 if steps != 20 else 0.1            # PyTorch divides by warmup * steps - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=warmup)
    for _ in (bar := trange(steps, desc="sync network", unit="step")):
        frames, audio, faces = [], [], []
        for clip in (clips[row] for row in draw(len(clips), batch)):
            first, = draw(len(clip.frames) - span + 1)
            frames.append(jitter(clip.frames[first : first + span], rng))
            audio.append(clip.audio[first * SAMPLES_PER_FRAME : (first + span) * SAMPLES_PER_FRAME])
        for row in torch.randperm(len(clips), generator=rng)[: 2 * batch].tolist():   # each person once
            pair = clips[row].frames[draw(len(clips[row].frames), 2)]
            faces.append(torch.stack([jitter(picture[None], rng)[0] for picture in pair]))
        loss = sync_loss(net, torch.stack(frames), torch.stack(audio))
        same = info_nce(*net.identity(torch.stack(faces, 1)))
        optimiser.zero_grad()
        (loss + same).backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(sync=f"{loss.item():.2f}", identity=f"{same.item():.2f}", refresh=False)
    return net.requires_grad_(False)


def save_sync(net: SyncNetwork, folder: str | Path, **more) -> None:
    """Write folder/model.safetensors in half precision, and config.json with `more` in it."""
    write_weights(Path(folder), {name: weight.half() for name, weight in net.state_dict().items()},
                  {"sync": net.config, **more})


def load_sync(folder: str | Path) -> SyncNetwork:
    """Load, frozen, what `save_sync` wrote. Raises: MediaError where there is none, or a broken one."""
    folder = Path(folder)
    with reading_weights(folder, "a sync network", "a sync network"):
        net = SyncNetwork(**json.loads((folder / "config.json").read_text())["sync"])
        net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.requires_grad_(False)
