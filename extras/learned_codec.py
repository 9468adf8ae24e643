"""The learned codec, --codec learned: a network in the place of the motion codec's warp, and the stage that trains it.

An affine pose moves whatever lies under a fixed mask: it stretches the wall behind a head, and knows no nose that
hides a cheek. A small network that sees the portrait and the pose learns what does move, and what comes to light:

    carried = moved + shade * (portrait - moved) + light,     moved(p) = portrait(p + displacement(p) + flow(p))
    frame   = carried + warp(residual, pose)

with flow, shade and light from the network, zero at its start (then carried is the linear codec's) and zero, always,
where the pose is (then latent zero is the portrait). Only what carrying leaves over is written in principal
components, refitted after the network is trained. The latents' layout and scale are the linear codec's; a frame's
depend on no frame but its chunk's own and the portrait.
"""

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import Clip, MediaError
from model import Config, MotionCodec, displacement, estimate_pose, look_up, pixel_grid, unwarp, warp

WIDTHS = 24, 48, 64                # of the network, at a half, a quarter and an eighth of the resolution
CARRIED = 64                       # frames that it carries at once: bounds the memory of long clips
BATCH, LR = 24, 4e-3               # of its stage: frames per step, rate of AdamW
STREAM = 700_000_000               # where the random numbers of its steps begin, beyond all others


class Residual(nn.Module):
    """Two convolutions beside a skip connection; the second starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight), nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class UNet(nn.Module):
    """Pictures in, pictures of the same size out, at half their resolution and below; starts at zero."""

    def __init__(self, inputs: int, outputs: int, widths: tuple[int, ...]):
        super().__init__()
        steps = list(zip(widths, widths[1:]))
        self.inward = nn.Conv2d(4 * inputs, widths[0], 3, padding=1)
        self.left, self.right = (nn.ModuleList(Residual(w) for w in side) for side in (widths, widths[:-1]))
        self.down = nn.ModuleList(nn.Conv2d(wide, deep, 2, 2) for wide, deep in steps)
        self.up = nn.ModuleList(nn.Conv2d(deep, wide, 1) for wide, deep in steps)
        self.outward = nn.Conv2d(widths[0], 4 * outputs, 3, padding=1)
        nn.init.zeros_(self.outward.weight), nn.init.zeros_(self.outward.bias)

    def forward(self, x: Tensor) -> Tensor:                                   # (B, inputs, S, S)
        x, seen = self.left[0](self.inward(F.pixel_unshuffle(x, 2))), []      # (B, w, S/2, S/2)
        for down, block in zip(self.down, self.left[1:]):
            seen.append(x)
            x = block(down(x))                                                # S/4, S/8
        for up, block in zip(reversed(self.up), reversed(self.right)):
            x = block(F.interpolate(up(x), scale_factor=2) + seen.pop())
        return F.pixel_shuffle(self.outward(F.silu(x)), 2)                    # (B, outputs, S, S)


class LearnedCodec(MotionCodec):
    """The motion codec with a network in the place of its warp; train `loss`, then `fit`."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.net = UNet(8, 6, WIDTHS)

    def carry(self, portrait: Tensor, pose: Tensor) -> Tensor:
        """Predict frames (B, 3, S, S) from portraits (B, 3, S, S) and poses (B, 6) alone."""
        grid = pixel_grid(portrait.shape[-1], portrait.device)[None]
        path = displacement(pose, grid)
        moved = look_up(portrait, grid + path)
        seen = torch.cat([2 * portrait - 1, 3 * (moved - portrait), 10 * path.movedim(-1, 1)], 1)    # of unit scale
        still = 1 - torch.exp(-pose.square().sum(-1) / 0.01 ** 2)             # 0 at rest, 1 from half a pixel on
        flow, shade, light = (self.net(seen) * still[:, None, None, None]).split([2, 1, 3], 1)
        path = path + 0.03 * flow.movedim(1, -1)
        moved = look_up(portrait, grid + path)
        return moved + shade * (portrait - moved) + 0.1 * light

    def loss(self, portrait: Tensor, frame: Tensor) -> Tensor:
        """Mean absolute error of carried portraits (B, 3, S, S) and of their gradients. (No mouth opens by a pose: the
        absolute error lets the network ignore mouths, which are the components' task, under the linear focus.)"""
        pose = estimate_pose(torch.stack([portrait, frame], 1))[:, 1]
        error = self.carry(portrait, pose) - frame
        return error.abs().mean() + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())

    @torch.no_grad()
    def analyse(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        pose = estimate_pose(frames)
        left = torch.stack([clip - self.carry(clip[:1].expand_as(clip), p) for clip, p in zip(frames, pose)])
        return pose, unwarp(left.flatten(0, 1), pose.flatten(0, 1)).view_as(frames)

    def compose(self, portrait: Tensor, residual: Tensor, pose: Tensor) -> Tensor:
        carried = [self.carry(*part) for part in zip(portrait.split(CARRIED), pose.split(CARRIED))]
        return torch.cat(carried) + warp(residual, pose)


# ---------------------------------------------------------------- its stage

def codec_loss(codec: LearnedCodec, clips: list[Clip], args: argparse.Namespace, step: int) -> Tensor:
    """Draw the frames of a step of the codec's stage, each of a clip of its own, and carry the portraits there."""
    rng = torch.Generator().manual_seed(args.seed * 1_000_003 + STREAM + step)
    rows = torch.randint(len(clips), (BATCH,), generator=rng).tolist()
    times = torch.randint(1, args.frames, (BATCH,), generator=rng).tolist()
    pairs = torch.stack([clips[row].frames[[0, time]] for row, time in zip(rows, times)]).to(args.device) / 255
    return codec.loss(*pairs.unbind(1))


def train_codec(codec: LearnedCodec, clips: list[Clip], args: argparse.Namespace,
                log: Callable[..., None] | None = None) -> None:
    """Train the network of a learned codec: warm up, hold, decay to zero over the last two thirds."""
    optimizer = torch.optim.AdamW(codec.requires_grad_(True).net.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    bar, losses, start = tqdm(range(args.codec_steps), "codec", unit="step"), [], time.process_time()
    for step in bar:
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / 30, 1.5 * (1 - step / args.codec_steps), 1)
        optimizer.zero_grad()
        loss = codec_loss(codec, clips, args, step)
        loss.backward()
        clip_grad_norm_(codec.net.parameters(), args.grad_clip)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise MediaError(args.out, f"the codec's loss is {losses[-1]} at its step {step + 1}; look at the clips, "
                                       "or use --codec linear")
        if log:                                               # kernels/bench.py has none
            log(stage="codec", codec_step=step + 1, loss=losses[-1])
        bar.set_postfix(loss=f"{losses[-1]:.4f}")
    optimizer.zero_grad()                                     # or they would count in the norm of the trunk's gradients
    codec.requires_grad_(False)
    few = max(1, min(50, len(losses) // 4))
    print(f"codec: {len(losses)} steps, loss of the first and last {few}: {np.mean(losses[:few]):.4f}, "
          f"{np.mean(losses[-few:]):.4f}; {time.process_time() - start:.0f} s of CPU time")
