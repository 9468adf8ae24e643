"""Teach portraits to speak: pretrain, post-train by reinforcement, report.

    python train.py                                    synthetic talkers, two CPU cores, minutes
    python train.py --data my_clips --size 64          your own video clips
    python train.py --resume runs/tiny                 go on where a run was stopped
    python train.py --updates 0                        pretraining alone
    python train.py --control                          ask whether more pretraining would have done as well
    python train.py --pretrained runs/tiny --out runs/other    post-train a finished run, again and again
    python train.py --codec learned                    first train a codec that knows what moves with a head
    torchrun --nproc_per_node=2 train.py --batch 16    the same on two GPUs, or on two processes of a CPU

Pretraining by flow matching: a clip's latent chunks are noised, each to a noise level of its own,

    x_sigma = (1 - sigma) * clean + sigma * noise,      sigma ~ U(0.02, 1) per chunk

and the generator, which sees the portrait, the sound and the clean past of each chunk, learns the velocity

    loss = w(sigma) * |predicted velocity - (noise - clean)|^2,      w = min(sigma / 0.2, 1)^2.

The weight tames the division by sigma near the clean end, where the network predicts the clean latent.

Post-training by GRPO (grpo.py explains it): groups of videos of training prompts are generated, judged by the reward
that `make_reward` builds, and their draws made likelier or less so. The reference is the moving average of
pretraining; what is kept is the moving average of the policy where it did best on prompts that are watched on the way
and reported nowhere else, by metrics that no reward contains.

All randomness of step s, or update u, comes from a generator keyed by (seed, s), so that a resumed run repeats an
unbroken one.
"""

import argparse
import atexit
import copy
import ctypes
import fcntl
import json
import math
import os
import pickle
import platform
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partialmethod
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import grpo
from data import (FPS, SAMPLES_PER_FRAME, Clip, MediaError, encoder_width, first_line, fitting, folder_clips, hear,
                  one_line, pixels, replacing, sounds, write_speech, write_video, writing)
from extras.talkers import synthetic_clips
from model import (PRESETS, SAMPLING_STEPS, Config, Generator, LearnedCodec, load_generator, load_trunk, ode_step,
                   save_generator, trunk_shape)
from reward import DEFAULT_SYNC, Reward, Scores, frechet, load_sync, make_reward, reward_flags, table, to_bytes
from sample import (check_numbers, crop_argument, device_argument, evaluate, generator, imitate, seeded_noise, summary,
                    with_interval)

# What a preset trains with, beside its Config in model.py.
TRAINING = {
    "tiny": dict(steps=4500, batch=8, clips=1000, ema=0.98, warmup=50, prompts=4, micro_batch=8,
                 codec_steps=900, checkpointing=False),
    "small": dict(steps=40_000, batch=16, clips=4000, ema=0.999, warmup=500, prompts=8, micro_batch=4,
                  codec_steps=5000, checkpointing=False),
    "base": dict(steps=200_000, batch=32, clips=4000, ema=0.9999, warmup=1000, prompts=8, micro_batch=1,
                 codec_steps=20_000, checkpointing=True),
}
HELD_OUT_SEED = 1_000_000          # talkers with another seed: other identities, other speech
POST_WARMUP = 10                   # updates: Adam's first steps, of few gradients, would be its largest
POST_STREAM = 500_000              # where the random numbers of updates begin, beyond those of any pretraining step
NOT_FLAGS = "mel_channels", "norm_eps", "audio_encoder"       # of Config: these follow from flags of their own
CODEC_CLIPS = 256                  # enough to fit the codec's components
CODEC_BATCH, CODEC_LR = 24, 4e-3   # of the learned codec's network: frames per step, rate of AdamW
CODEC_STREAM = 700_000_000         # where the random numbers of its steps begin, beyond all others
SIGMA_BINS = 5
PRETRAINED, POST_TRAINED, CONTROL = "pretrained", "post-trained", "control"          # the arms of the report


# ---------------------------------------------------------------- several processes
#
# Under torchrun each of N processes takes every N-th clip of a batch, or group of an update, and DDP averages their
# gradients: the step is that of one process to rounding. For that every process draws the random numbers of the whole
# batch, and rewards are compared only when all are there. The first process alone prints, measures and writes.

def join_processes() -> None:
    """Meet the other processes, if torchrun started any, and let all but the first be quiet."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))
    atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mine() -> slice:
    """The rows of a batch, or the prompts of an update, that this process works on."""
    return slice(rank(), None, world())


def everyone(value) -> list:
    """Collect a value (on the CPU) of every process, in their order."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def in_step(model: Generator, unused: bool = False) -> torch.nn.Module:
    """Give all processes the first one's weights and make them average their gradients from now on.

    Args: unused: whether some weights may have no gradient, as `no_audio` where every clip is heard.
    """
    if world() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=unused)


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process go through a block before the others: what it leaves in a cache they find there."""
    if rank():
        dist.barrier()
    yield
    if world() > 1 and not rank():
        dist.barrier()


# ---------------------------------------------------------------- data

@dataclass
class Latents:
    """A set of clips as the trainer sees it, all in memory: pixels appear only in the portraits."""

    portrait: Tensor               # (N, 3, S, S) uint8
    mel: Tensor                    # (N, K T, mel_channels)
    clean: Tensor                  # (N, K, tokens, C)

    def __len__(self) -> int:
        return len(self.clean)


def load_clips(args: argparse.Namespace) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """Return the clips to train on, to report on, and to watch while post-training, each `args.frames` long or longer.

    Training sees neither of the latter; the watched choose the checkpoint, so the reported may not be among them.
    """
    watch = args.watch_clips if args.updates else 0
    if args.data:
        train, held_out = folder_clips(args.data, args.config.size, args.seconds, args.crop, frames=args.frames)
    else:
        size, seed = args.config.size, HELD_OUT_SEED + args.seed
        train = synthetic_clips(args.clips, size, args.seconds, args.seed)
        held_out = list(synthetic_clips(args.validate_clips, size, args.seconds, seed))
        if watch:
            held_out += synthetic_clips(watch, size, args.seconds, seed, first=args.validate_clips)
    if not (train and held_out):
        raise MediaError(args.data, f"has too few clips of {args.frames / FPS:.2f} s ({len(train)} to train on, "
                                    f"{len(held_out)} held out); add files or lower --seconds")
    if args.updates and len(train) < args.prompts:
        raise MediaError(args.data or "--clips", f"has {len(train)} clips for {args.prompts} --prompts; lower these")
    watch = min(watch, len(held_out) // 2)
    if args.updates and not watch:
        raise MediaError(args.data, "has one held-out clip, and post-training wants one more to watch; add files")
    reported = held_out[: len(held_out) - watch]
    return train, reported[: args.validate_clips], held_out[len(reported):]


def codec_loss(codec: LearnedCodec, clips: list[Clip], args: argparse.Namespace, step: int) -> Tensor:
    """Draw the frames of a step of the codec's stage, each of a clip of its own, and carry the portraits there."""
    rng = generator(args.seed, CODEC_STREAM + step)
    rows = torch.randint(len(clips), (CODEC_BATCH,), generator=rng).tolist()
    times = torch.randint(1, args.frames, (CODEC_BATCH,), generator=rng).tolist()
    pairs = torch.stack([clips[row].frames[[0, time]] for row, time in zip(rows, times)]).to(args.device) / 255
    return codec.loss(*pairs.unbind(1))


def train_codec(codec: LearnedCodec, clips: list[Clip], args: argparse.Namespace, log: "Log | None" = None) -> None:
    """Train the network of a learned codec: warm up, hold, decay to zero over the last two thirds."""
    optimizer = torch.optim.AdamW(codec.requires_grad_(True).net.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    bar, losses, start = tqdm(range(args.codec_steps), "codec", unit="step"), [], time.process_time()
    for step in bar:
        optimizer.param_groups[0]["lr"] = CODEC_LR * min((step + 1) / 30, 1.5 * (1 - step / args.codec_steps), 1)
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


def fit_codec(model: Generator, clips: list[Clip], args: argparse.Namespace, log: "Log | None" = None) -> None:
    """Fit the motion codec to clips that are spread over the training set; first train its network, if it has one."""
    if len(clips) * args.frames < args.config.space_channels:
        raise MediaError(args.data or "--clips", f"{len(clips)} clips are too few to fit the codec; add some")
    if args.config.codec == "learned":
        train_codec(model.codec, clips, args, log)
    spread = np.linspace(0, len(clips) - 1, min(len(clips), CODEC_CLIPS)).astype(int)
    model.codec.fit(pixels([clips[i] for i in spread], args.frames).to(args.device))


def encode(model: Generator, clips: list[Clip], frames: int, device: str) -> Latents:
    """Encode clips once, so that a training step never touches a pixel."""
    latents, batch = [], 16
    for i in tqdm(range(0, len(clips), batch), "encoding", leave=False):
        latents.append(model.codec.encode(pixels(clips[i:i + batch], frames).to(device)).cpu())
    mel = torch.stack([hear(clip.audio, frames, model.config.audio_encoder, device) for clip in clips])
    portrait = torch.stack([clip.frames[0].clone() for clip in clips])       # a view would hold its file's map
    return Latents(portrait, mel, torch.cat(latents))


# ---------------------------------------------------------------- one step

def flow_matching_loss(model: Generator, data: Latents, args: argparse.Namespace, step: int) -> tuple[Tensor, Tensor]:
    """Draw the batch of a step.

    Returns: the loss on the rows that are mine, and the loss on all per chunk's noise level, (bins,), nan where empty.
    """
    device = args.device
    draw = dict(generator=generator(args.seed, step, device), device=device)
    rows = torch.randint(len(data), (args.batch,), **draw).cpu()
    clean = data.clean[rows].to(device)                                              # (B, K, N, C)
    sigma = torch.rand(clean.shape[:2], **draw).clamp_min(0.02)[:, None]             # (B, 1, K)
    noise = torch.randn(clean.shape, **draw)[:, None]                                # (B, 1, K, N, C)
    heard = torch.rand(args.batch, **draw) >= args.audio_dropout
    # Noise on the past, anything from none to as much as there is signal: generation's own past is never perfect,
    # and a trunk that trusts it copies and sharpens its own errors until, within seconds, the face falls apart.
    slip = args.context_noise * torch.rand(args.batch, 1, 1, 1, **draw)
    context = clean + slip * torch.randn(clean.shape, **draw)
    rows, clean, context, noise, sigma, heard = (x[mine()] for x in (rows, clean, context, noise, sigma, heard))
    clean = clean[:, None]
    level = sigma[..., None, None]
    noisy = (1 - level) * clean + level * noise
    with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
        velocity = model(data.portrait[rows].to(device) / 255, data.mel[rows].to(device), context, noisy, sigma, heard)
    error = (velocity - (noise - clean)).square().mean((-1, -2))                     # (B, 1, K)
    error = error * (sigma / 0.2).clamp_max(1).square()
    sigma, errors = (torch.cat(x).flatten() for x in zip(*everyone((sigma.cpu(), error.detach().cpu()))))
    bins = (sigma * SIGMA_BINS).long().clamp_max(SIGMA_BINS - 1)
    per_bin = torch.stack([errors[bins == i].mean() for i in range(SIGMA_BINS)])
    return error.mean(), per_bin


def optimizers(model: Generator, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the trunk (Jordan et al., 2024), AdamW for the rest, as nanochat has it."""
    trunk = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and "modulation" not in name]
    inside = {id(p) for p in trunk}
    rest = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    return [torch.optim.Muon(trunk, lr=args.muon_lr, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01,
                              fused=args.device.startswith("cuda"))]


def schedule(step: int, args: argparse.Namespace) -> float:
    """Warm up over the first steps, then decay linearly to zero. Returns a factor on the learning rates."""
    return min((step + 1) / args.warmup, 1 - step / args.steps, 1.0)


def blend(average: dict[str, Tensor], model: Generator, decay: float) -> None:
    """Move an average of weights towards a model's."""
    weights = model.state_dict()
    floats = [k for k, v in weights.items() if v.is_floating_point()]
    torch._foreach_lerp_([average[k] for k in floats], [weights[k] for k in floats], 1 - decay)


def snapshot(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in weights.items()}


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Turn whatever a missing or broken checkpoint raises into a MediaError."""
    try:
        yield path
    except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise MediaError(path, f"cannot be resumed from ({first_line(error)}); "
                               "start the run anew without --resume") from None


class Pretraining:
    """Weights, optimizers and moving average of a run: what a step changes, and what a checkpoint holds."""

    def __init__(self, model: Generator, args: argparse.Namespace):
        self.model, self.args, self.step = model, args, 0
        model.checkpointing = args.checkpointing
        self.average = snapshot(model.state_dict())
        self.optimizers = optimizers(model, args)
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.trained = torch.compile(in_step(model)) if args.compile else in_step(model)

    def advance(self, data: Latents, factor: float | None = None) -> dict:
        """Take one step, at the scheduled rate or at `factor` times the highest. Returns what to log."""
        factor = schedule(self.step, self.args) if factor is None else factor
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = factor * rate
            optimizer.zero_grad()
        loss, per_bin = flow_matching_loss(self.trained, data, self.args, self.step)
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        blend(self.average, self.model, min(self.args.ema, self.step / (self.step + 10)))      # a short memory at first
        return {"loss": sum(everyone(loss.item())) / world(), "grad_norm": norm.item(), "lr_factor": factor,
                "loss_by_sigma": [None if math.isnan(x) else round(x, 5) for x in per_bin.tolist()]}

    def save(self, folder: Path) -> None:
        """Write the averaged weights for sample.py, and the training state apart, each renamed into place."""
        if rank():
            return
        save_generator(self.model, folder, self.average, training=flags(self.args))
        with replacing(folder / "state.pt") as path:
            torch.save({"step": self.step, "model": self.model.state_dict(), "average": self.average,
                        "optimizers": [o.state_dict() for o in self.optimizers]}, path)

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote. Raises: MediaError where it is missing or broken."""
        with reading(folder / "state.pt") as path:
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            self.step, self.average = state["step"], state["average"]
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)


# ---------------------------------------------------------------- one update

def settings(args: argparse.Namespace) -> grpo.Settings:
    return grpo.Settings(**{f.name: getattr(args, f.name) for f in fields(grpo.Settings)})


class PostTraining:
    """Policy, optimizer, moving average and the best so far: what an update changes, and what a checkpoint holds."""

    def __init__(self, reference: Generator, reward: Reward, args: argparse.Namespace):
        self.reference, self.reward, self.args, self.settings = reference, reward, args, settings(args)
        self.model = copy.deepcopy(reference)
        self.model.checkpointing = args.checkpointing
        self.reference.requires_grad_(False)
        self.trained = in_step(self.model, unused=True)
        self.average = snapshot(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.post_lr, betas=(0.9, 0.95), weight_decay=0)
        self.update, self.worse, self.cpu_seconds, self.checked = 0, 0, 0.0, False
        self.best = {"update": 0, "score": -math.inf, "weights": self.average}

    @property
    def finished(self) -> bool:
        """True when all updates are done, or the last looks showed nothing better."""
        return self.update >= self.args.updates or self.worse >= self.args.patience

    def advance(self, data: Latents, clips: list[Clip]) -> dict:
        """Make one update: roll out, judge, and take a gradient step on each part of the rollouts.

        The first part is on-policy, its ratios are 1; on the later ones they are not, and the clip is at work.
        Returns: what to log.
        """
        args, device, clock = self.args, self.args.device, [time.perf_counter()]
        rng = generator(args.seed, POST_STREAM + self.update)
        rows = torch.randperm(len(data), generator=rng)[: args.prompts]
        steps = grpo.window(self.settings, self.update, rng)
        rollout = grpo.roll_out(self.model, (data.portrait[rows] / 255).to(device), data.mel[rows].to(device),
                                self.settings, steps, rng, mine())
        if not self.checked:                                       # on the first batch of every run
            grpo.check_rescoring(self.model, rollout, self.settings)
            self.checked = True
        clock.append(time.perf_counter())
        scores = self.score(rollout, [clips[i] for i in rows[mine()]])
        advantage, components = grpo.advantages(scores, self.reward.weights, self.settings, rollout.latents.shape[1],
                                                self.reward.floors)
        advantage = advantage.unflatten(0, (-1, self.settings.group))[mine()].flatten(0, 1)
        clock.append(time.perf_counter())
        self.optimizer.param_groups[0]["lr"] = args.post_lr * min(
            (self.update + 1) / POST_WARMUP, 1 - self.update / args.updates)
        size = math.ceil(len(rollout) / self.settings.group / args.parts) * self.settings.group      # whole groups
        parts = [self.improve(rollout[at:at + size], advantage[at:at + size].to(device))
                 for at in range(0, len(rollout), size)]
        self.update += 1
        blend(self.average, self.model, min(args.post_ema, self.update / (self.update + 10)))
        clock.append(time.perf_counter())
        seconds = [round(b - a, 3) for a, b in zip(clock, clock[1:])]
        return {"reward": scores.total.mean().item(), "components": components, "sigma": steps[0][0], "parts": parts,
                "seconds_for": dict(zip(("rollout", "reward", "update"), seconds))}

    @torch.no_grad()
    def score(self, rollout: grpo.Rollout, prompts: list[Clip]) -> Scores:
        """Judge a rollout of these prompts. Returns: the Scores of all processes' rollouts, in the prompts' order."""
        group = self.settings.group
        audio = sounds(prompts, rollout.frames.shape[1]).repeat_interleave(group, 0)
        names = [f"{clip.name} rollout {i}" for clip in prompts for i in range(group)]
        scores = self.reward(rollout.frames, audio, rollout.portrait, names, per_chunk=self.settings.credit == "chunk")

        def join(parts):
            return rearrange(list(parts), "w (p g) ... -> (p w g) ...", g=group)
        parts = everyone([{k: v.cpu() for k, v in x.items()} for x in (
            {"total": scores.total}, scores.components, scores.per_chunk)])
        total, components, per_chunk = ({k: join(part[k] for part in some) for k in some[0]} for some in zip(*parts))
        return Scores(total["total"], components, per_chunk)

    def improve(self, rollout: grpo.Rollout, advantage: Tensor) -> dict:
        """Take a gradient step on some rollouts, a few at a time as memory allows. Returns: what to log."""
        logs, micro = [], self.args.micro_batch
        self.optimizer.zero_grad()
        for at in range(0, len(rollout), micro):
            few = rollout[at:at + micro]
            loss, log = grpo.grpo_loss(self.trained, self.reference, few, advantage[at:at + micro], self.settings)
            (loss * len(few) / len(rollout)).backward()
            logs.append(({k: v.cpu() for k, v in log.items()}, len(few) / len(rollout) / world()))
        norm = clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        self.optimizer.step()
        logs = [part for parts in everyone(logs) for part in parts]
        entry = {k: sum(log[k] * share for log, share in logs).tolist() for k in logs[0][0]}
        return entry | {"ratio_max": torch.stack([log["ratio_max"] for log, _ in logs]).amax(0).tolist(),
                        "grad_norm": norm.item()}

    def watch(self, clips: list[Clip]) -> dict[str, Tensor]:
        """Measure the moving average on the watched clips, always from the same noise, and keep it if it is best."""
        metrics = None if rank() else validate(loaded(self.average, self.args), clips, self.args)[0]
        metrics = everyone(metrics)[0]
        score = held_out_score(metrics)
        self.worse += 1
        if score > self.best["score"]:
            self.worse = 0
            self.best = {"update": self.update, "score": score, "weights": snapshot(self.average)}
        return metrics

    def save(self, folder: Path) -> None:
        """Write the best weights for sample.py, and the state apart, each renamed into place."""
        if rank():
            return
        save_generator(self.model, folder, self.best["weights"], training=flags(self.args))
        with replacing(folder / "post.pt") as path:
            torch.save({"update": self.update, "model": self.model.state_dict(), "average": self.average,
                        "optimizer": self.optimizer.state_dict(), "best": self.best, "worse": self.worse,
                        "cpu_seconds": self.cpu_seconds}, path)

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote. Raises: MediaError where it is broken."""
        with reading(folder / "post.pt") as path:
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            self.update, self.average, self.best = state["update"], state["average"], state["best"]
            self.worse, self.cpu_seconds = state["worse"], state["cpu_seconds"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])


# ---------------------------------------------------------------- reporting

def loaded(weights: dict[str, Tensor], args: argparse.Namespace) -> Generator:
    """A generator with these weights."""
    model = Generator(args.config).to(args.device).eval()
    model.load_state_dict(weights)
    return model


def averaged(run: Pretraining) -> Generator:
    """The generator with the moving average of its weights."""
    return loaded(run.average, run.args)


def held_out_metrics(videos: Tensor, clips: list[Clip], args: argparse.Namespace) -> dict[str, Tensor]:
    """Measure videos by what no reward uses, with the sync network of --sync."""
    return evaluate(videos, clips, args.config.chunk_frames, None if args.sync == "none" else load_sync(args.sync))


def validate(model: Generator, clips: list[Clip], args: argparse.Namespace,
             noisy: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Generate the held-out clips, by the ODE or as rollouts are, with noise on all steps that may have it, and
    measure them.

    Returns: metrics, name -> (B,), and the videos.
    """
    steps, step = args.sampling_steps, ode_step
    if noisy:
        steps, shape = args.rollout_steps, (model.config.video_tokens, model.config.channels)
        noise = seeded_noise(HELD_OUT_SEED + args.seed, range(len(clips)), shape, args.device)
        step = grpo.drawing_step(settings(args), grpo.stochastic_steps(steps), noise)
    videos = imitate(model, clips, args.frames, steps, seed=args.seed, step=step)
    return held_out_metrics(videos, clips, args), videos


def mouth_distance(videos: Tensor, clips: list[Clip], args: argparse.Namespace) -> float:
    """Return the Frechet distance of generated mouths in motion, windows of five frames, to the true clips'."""
    net = load_sync(args.sync)
    return frechet(*(net.visual(v).flatten(0, 1) for v in (videos, pixels(clips, videos.shape[1])))).item()


def rewarded(reward: Reward, arms: dict[str, Tensor], clips: list[Clip]) -> str:
    """Tell, apart from the held-out metrics, what the reward says of every arm's videos and of the true clips."""
    frames = next(iter(arms.values())).shape[1]
    true, audio = pixels(clips, frames), sounds(clips, frames)
    return f"the same {len(clips)} clips by the reward:\n" + table(reward, {
        name: reward(videos, audio, true[:, 0], [f"{name} {clip.name}" for clip in clips])
        for name, videos in (arms | {"truth": true}).items()})


def held_out_score(metrics: dict[str, Tensor]) -> float:
    """What chooses the checkpoint, by metrics that no reward contains: the correlation of the mouth with the true one;
    10% too much or too little motion, of the mouth or of all, costs 0.01 of it, 10% too much of the head half as much.
    (A head sways as it likes, and how little differs from look to look more than lips do. Nor is it the distance to the
    true frames: a head that stands still is nearest to one that moves.)"""
    mouth = metrics["lip_sync"] if "lip_sync" in metrics else metrics["mouth_own"]
    off = {name: math.log(max(metrics[name].mean().item(), 1e-6)) for name in ("amplitude", "motion", "head")}
    return mouth.mean().item() - 0.1 * (abs(off["amplitude"]) + abs(off["motion"])) - 0.05 * max(off["head"], 0)


def report(arms: dict[str, Generator], clips: list[Clip], step: int, args: argparse.Namespace,
           log: "Log") -> list[Tensor]:
    """Measure every arm on the same held-out clips from the same noise, and print means and paired differences.

    held_out.json keeps the value of every clip. Returns: the videos of each arm, (B, F, 3, S, S), by the ODE.
    """
    values, shown = {}, []
    for sampler in ("ode", args.sampler) if len(arms) > 1 else ("ode",):
        made = {}
        for name, model in arms.items():
            made[name], videos = validate(model, clips, args, noisy=sampler != "ode")
            if sampler == "ode":
                shown.append(videos)
            print(f"{len(clips)} held-out clips, generated from portrait and sound, {name}, {sampler}:\n"
                  f"{summary(made[name])}")
            together = {}
            if args.sync != "none":
                together["mouth_distance"] = mouth_distance(videos, clips, args)
                print(f"  all clips together   Frechet distance of mouths {together['mouth_distance']:.3f}")
            log(step=step, arm=name, sampler=sampler, held_out=means(made[name]), **together)
        for title, difference in paired(made).items():
            print(f"{title}, clip by clip, {sampler}:\n{summary(difference)}")
        values[sampler] = {name: {k: v.tolist() for k, v in metrics.items()} for name, metrics in made.items()}
    with replacing(args.out / "held_out.json") as path:
        path.write_text(json.dumps(values))
    return shown


def means(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(values.mean().item(), 5) for name, values in metrics.items()}


def paired(made: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Subtract every other arm's metrics from the post-trained one's, clip by clip. Returns: title -> metrics."""
    return {f"{POST_TRAINED} minus {name}": {k: v - metrics[k] for k, v in made[POST_TRAINED].items()}
            for name, metrics in made.items() if POST_TRAINED in made and name != POST_TRAINED}


def write_sheet(path: Path, videos: list[Tensor], columns: int = 12) -> None:
    """Write a picture of videos (B, F, 3, S, S): of each clip, some frames of the first above those of the others."""
    at = torch.linspace(0, videos[0].shape[1] - 1, columns).long()
    sheet = rearrange([to_bytes(video[:, at]) for video in videos], "arm b column c y x -> (b arm y) (column x) c")
    with replacing(path) as written:
        Image.fromarray(sheet.numpy()).save(written, format="png")


def write_pictures(folder: Path, arms: list[Tensor], clips: list[Clip], rows: int = 6) -> None:
    """Write sheet.png, truth above what each arm generated for some clips, and sample.mp4, truth beside generated, with
    sound; and the portrait and the speech of the first clip, to try sample.py with."""
    frames = arms[0].shape[1]
    videos = [pixels(clips[:rows], frames)] + [arm[:rows] for arm in arms]
    write_sheet(folder / "sheet.png", videos)
    with replacing(folder / "portrait.png") as path:
        Image.fromarray(clips[0].frames[0].permute(1, 2, 0).numpy()).save(path, format="png")
    write_speech(folder / "speech.wav", clips[0].audio)
    beside = to_bytes(torch.cat([video[0] for video in videos], -1))
    enlarged = beside.repeat_interleave(4, -1).repeat_interleave(4, -2)
    write_video(folder / "sample.mp4", enlarged, clips[0].audio[: frames * SAMPLES_PER_FRAME])


class Log:
    """One line of JSON per event in RUN/log.jsonl; a resumed run drops the steps and updates that it will repeat."""

    def __init__(self, folder: Path, step: int, start: float):
        self.path, self.start = folder / "log.jsonl", start
        self.rewind("step", step)

    def rewind(self, counter: str, to: int) -> None:
        if rank():
            return
        old = self.path.read_text().splitlines() if self.path.exists() else []
        kept = []
        for line in old:
            with suppress(ValueError):               # the last line, cut short by a full disk or a power cut
                kept += [line] * (json.loads(line).get(counter, 0) <= to)
        with replacing(self.path) as path:
            path.write_text("".join(line + "\n" for line in kept))

    def __call__(self, **entry) -> None:
        if rank():
            return
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps({"seconds": round(time.perf_counter() - self.start, 2), **entry}) + "\n")


# ---------------------------------------------------------------- the report of a run
#
# Made of log.jsonl and held_out.json alone, so that a resumed run reports the whole of itself.

STAGES = {"codec_step": "the codec", "config": "preparation", "loss": "pretraining", "parts": "post-training",
          "watched": "watching", "control_steps": "control", "held_out": "measuring",
          "rewarded": "measuring"}                                                       # what a line of the log ends


def having(entries: list[dict], key: str) -> list[dict]:
    """Choose the entries of a log that have this key."""
    return [e for e in entries if key in e]


def hardware(device: str) -> str:
    """Name the GPU, or the CPU, and the threads of each process."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in (info.read_text().splitlines() if info.exists() else ())
             if line.startswith("model name")]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else (names or [platform.machine()])[0]
    return f"{name}, {torch.get_num_threads()} CPU threads" + f" in each of {world()} processes" * (world() > 1)


def draw(path: Path, panels: dict[str, list[tuple]], unit: str, scale: str = "linear") -> None:
    """Draw title -> curves (x, y, deviation, label), five panels a row; the deviation is shaded, 0 for none."""
    from matplotlib.figure import Figure             # here: it takes a second, and only the report draws
    columns, rows = min(len(panels), 5), math.ceil(len(panels) / 5)
    figure = Figure(figsize=(max(6, 2.8 * columns), max(3, 2.2 * rows)), layout="constrained")
    for place, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel=unit, yscale=scale)
        for x, y, deviation, label in curves:
            x, y = np.array(x), np.array(y, float)
            axes.plot(x, y, ".-" if len(x) < 20 else "-", label=label)
            if np.any(deviation):
                axes.fill_between(x, y - deviation, y + deviation, alpha=0.2)
        if len(curves) > 1:
            axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def facts(entries: list[dict]) -> str:
    """Tell how a run was made: commands, hardware, seed, and where its time went."""
    sessions, updates = having(entries, "config"), having(entries, "parts")
    spent, before = Counter(), {"seconds": 0}
    for e in entries:                                # seconds count from the start of each session
        stage = next(name for key, name in STAGES.items() if key in e)
        goes_on = "config" not in e or "codec_step" in before
        spent[stage] += e["seconds"] - before["seconds"] * goes_on
        before = e
    last, flags = sessions[-1], sessions[-1]["training"]
    rows = [("hardware", " / ".join(dict.fromkeys(s["hardware"] for s in having(sessions, "hardware")))),
            ("seed", f"{flags['seed']}"),
            ("generator", f"{last['parameters'] / 1e6:.2f} M parameters, {last['config']['size']} pixels"),
            ("minutes", f"{sum(spent.values()) / 60:.1f}"),
            *((f"minutes of {stage}", f"{seconds / 60:.1f}") for stage, seconds in spent.items())]
    for stage in updates[0]["seconds_for"] if updates else ():
        rows.append((f"seconds an update, {stage}", f"{np.mean([e['seconds_for'][stage] for e in updates]):.2f}"))
    for e in having(entries, "watched")[-1:]:
        rows.append(("kept", f"update {e['best']} of {e['update']}"))
    for e in having(entries, "control_steps")[-1:]:
        rows.append(("control", f"{e['control_steps']} more steps of pretraining in "
                                f"{e['cpu_seconds']:.0f} CPU-seconds"))
    commands = "\n".join(s["command"] for s in having(sessions, "command"))
    return f"```sh\n{commands}\n```\n\n" + grid(("", ""), rows)


def pretraining_part(folder: Path, entries: list[dict]) -> str:
    """Draw the loss by noise level, and what was validated on the way. Returns: Markdown, empty without such steps."""
    steps, looks = having(entries, "loss_by_sigma"), [e for e in having(entries, "held_out") if "arm" not in e]
    if not steps:
        return ""
    blocks = np.array_split(np.array([[e["step"], *e["loss_by_sigma"]] for e in steps], float), min(len(steps), 100))
    with np.errstate(invalid="ignore"):              # a level that a short run never drew stays nan
        x, *bins = np.stack([np.nansum(b, 0) / np.isfinite(b).sum(0) for b in blocks], 1)
    edges = np.linspace(0, 1, SIGMA_BINS + 1)
    labels = [f"sigma {a:.1f} to {b:.1f}" for a, b in zip(edges, edges[1:])]
    draw(folder / "pretraining.png", {"velocity loss": [(x, y, 0, name) for y, name in zip(bins, labels)]}, "step",
         "log")
    text = ("\n## Pretraining\n\nThe weighted error of the velocity by noise level; below the picture, its mean over "
            "the last hundredth.\n\n![loss by noise level](pretraining.png)\n\n"
            + grid(labels, [[f"{y[-1]:.4f}" for y in bins]]))
    if looks:
        draw(folder / "validation.png", metric_panels(looks, "step", "held_out"), "step")
        text += "\n![held-out metrics on the way](validation.png)\n"
    return text


def metric_panels(looks: list[dict], unit: str, key: str) -> dict[str, list[tuple]]:
    """One panel for each metric that was looked at, name -> value under `key`, over steps or updates."""
    return {name: [([e[unit] for e in looks], [e[key][name] for e in looks], 0, name)] for name in looks[0][key]}


def post_training_part(folder: Path, entries: list[dict]) -> str:
    """Draw the reward's components and the watched metrics over updates. Returns: Markdown, empty without updates."""
    updates, looks = having(entries, "parts"), having(entries, "watched")
    if not updates:
        return ""
    x, panels = [e["update"] for e in updates], {}
    for name in [name for name, of in updates[0]["components"].items() if "mean" in of]:
        mean, std = ([e["components"][name][of] for e in updates] for of in ("mean", "group_std"))
        panels[name] = [(x, mean, np.array(std), name)]
    draw(folder / "rewards.png", panels | {"reward": [(x, [e["reward"] for e in updates], 0, "")]}, "update")
    draw(folder / "watched.png", metric_panels(looks, "update", "watched"), "update")
    return ("\n## Post-training\n\nThe reward of rollouts and its components; shaded, a group's standard deviation.\n\n"
            "![reward over updates](rewards.png)\n\nHeld-out metrics of the moving average, on the watched "
            "clips.\n\n![watched metrics over updates](watched.png)\n")


def held_out_part(values: dict[str, dict], entries: list[dict]) -> str:
    """Tabulate the held-out metrics of every arm and their paired differences. Returns: Markdown."""
    text, codec = "", having(entries, "codec")[-1]["codec"]
    for sampler, made in values.items():
        made = {arm: {k: torch.tensor(v) for k, v in metrics.items()} for arm, metrics in made.items()}
        logged = {e["arm"]: e for e in entries if e.get("sampler") == sampler}                   # the last one counts
        columns, names = made | paired(made), next(iter(made.values()))
        rows = [[name, f"{codec[name]:.3f}", *(with_interval(c[name]) for c in columns.values())] for name in names]
        if all("mouth_distance" in e for e in logged.values()):
            rows.append(["mouth_distance", "", *(f"{logged[arm]['mouth_distance']:.3f}" for arm in made),
                         *[""] * len(paired(made))])
        text += (f"\n## Held-out clips, {sampler}\n\n{len(names['psnr'])} clips, generated from portrait and sound; "
                 "mean ± 95% interval, differences clip by clip.\n\n" + grid(("", "codec alone", *columns), rows))
    return text


def write_report(folder: Path) -> None:
    """Write report.md and the curves that it shows, of what the run has logged and measured."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    values = json.loads((folder / "held_out.json").read_text())
    text = (f"# {folder.resolve().name}\n\n" + facts(entries) + pretraining_part(folder, entries)
            + post_training_part(folder, entries) + held_out_part(values, entries)
            + f"\n## By the reward\n\n```\n{having(entries, 'rewarded')[-1]['rewarded']}\n```\n"
              f"\n## Pictures\n\nTruth above {', '.join(values['ode'])}; all side by side, with sound, in "
              "[sample.mp4](sample.mp4).\n\n![truth above generated](sheet.png)\n")
    with replacing(folder / "report.md") as path:
        path.write_text(text)


# ---------------------------------------------------------------- command line

def pretraining_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of a run, of its data and of pretraining."""
    g = p.add_argument_group("run")
    g.add_argument("--preset", choices=PRESETS, default="tiny", help="generator and training defaults (%(default)s)")
    g.add_argument("--out", type=Path, help="folder of the run (runs/PRESET)")
    g.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run, with the flags it had")
    g.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    g.add_argument("--device", type=device_argument, default=device_argument(), help="cpu or cuda (%(default)s)")
    g.add_argument("--compile", action="store_true", help="torch.compile the generator: slow to start, faster steps")
    g.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="keep the inputs of blocks alone for "
                   "the backward pass and compute the rest again: less memory, slower steps (by preset)")
    g = p.add_argument_group("data")
    g.add_argument("--data", type=Path, help="a folder of video clips; without it, synthetic talkers")
    g.add_argument("--crop", type=crop_argument, help="x,y,size in pixels of the clips; without it, the centre square")
    g.add_argument("--clips", type=int, help="how many synthetic talkers to train on (by preset)")
    g.add_argument("--seconds", type=float, help="length of a training clip (2, with --data 3)")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int, help="training steps (by preset)")
    g.add_argument("--batch", type=int, help="clips per step (by preset)")
    g.add_argument("--codec-steps", type=int, help="training steps of the learned codec, before (by preset)")
    g.add_argument("--lr", type=float, default=2e-3, help="of AdamW: embeddings, norms, modulation (%(default)s)")
    g.add_argument("--muon-lr", type=float, default=0.02, help="of Muon: the trunk's matrices (%(default)s)")
    g.add_argument("--warmup", type=int, help="steps of warm-up (by preset)")
    g.add_argument("--ema", type=float, help="decay of the moving average of the weights (by preset)")
    g.add_argument("--grad-clip", type=float, default=1.0, help="largest norm of the gradient (%(default)s)")
    g.add_argument("--audio-dropout", type=float, default=0.1, help="share of clips without sound (%(default)s)")
    g.add_argument("--context-noise", type=float, default=1.0, help="most noise on the clean past (%(default)s)")


def post_training_flags(p: argparse.ArgumentParser) -> list[str]:
    """Add the flags of post-training. Returns: the names of those that define it."""
    g, names = p.add_argument_group("post-training"), []
    flag = lambda *name, **settings: names.append(g.add_argument(*name, **settings).dest)
    flag("--updates", type=int, default=80, help="of post-training; 0 leaves it out (%(default)s)")
    flag("--prompts", type=int, help="portraits and speeches per update (by preset)")
    flag("--parts", type=int, default=2, help="gradient steps per update, each on a part of its rollouts; with one the "
         "clip is never met (%(default)s)")
    flag("--micro-batch", type=int, help="rollouts per backward pass (by preset)")
    flag("--post-lr", type=float, default=3e-4, help="of AdamW, which falls to zero by the last update (%(default)s)")
    flag("--post-ema", type=float, default=0.95, help="decay of the moving average of the policy (%(default)s)")
    flag("--watch-every", type=int, default=20, help="updates between looks at the watched clips (%(default)s)")
    flag("--watch-clips", type=int, default=48, help="held-out clips that choose the checkpoint (%(default)s)")
    flag("--patience", type=int, default=4, help="stop after so many looks without a better checkpoint (%(default)s)")
    g.add_argument("--control", action="store_true", help="spend its CPU time on more pretraining too, and compare")
    g.add_argument("--pretrained", type=Path, metavar="RUN", help="post-train a finished run anew, with these flags "
                   "and its other ones, into --out")
    g = p.add_argument_group("GRPO", "grpo.Settings; grpo.py explains it")
    for f in fields(grpo.Settings):
        flag("--" + f.name.replace("_", "-"), type=f.type, default=f.default, choices=f.metadata["choices"],
             help=f.metadata["help"] + " (%(default)s)")
    return names


def generator_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of model.Config, and what the generator may start from."""
    g = p.add_argument_group("generator", "shape of the generator (by preset); model.Config explains each")
    g.add_argument("--init-from", metavar="NAME_OR_DIR", help="start the trunk as a Qwen3 language model and take its "
                   "shape: a folder, or a name on the hub, such as Qwen/Qwen3-0.6B, to download; lower --muon-lr")
    g.add_argument("--audio-encoder", metavar="NAME_OR_DIR", help="hear speech by a frozen wav2vec2, HuBERT, WavLM or "
                   "Whisper of transformers, which hears all of it before the first frame (log-mel: 80 ms ahead)")
    for field in fields(Config):
        if field.name not in NOT_FLAGS:
            g.add_argument("--" + field.name.replace("_", "-"), type=field.type, help=f"tiny: {field.default}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    pretraining_flags(p)
    of_post_training = post_training_flags(p)
    g = p.add_argument_group("validation and checkpoints")
    g.add_argument("--validate-every", type=int, help="steps between validations (only at the end)")
    g.add_argument("--validate-clips", type=int, default=48, help="held-out clips to generate (%(default)s)")
    g.add_argument("--sampling-steps", type=int, default=SAMPLING_STEPS,
                   help="flow steps per chunk when generating (%(default)s)")
    g.add_argument("--save-every", type=int, default=200, help="steps between checkpoints (%(default)s)")
    g.add_argument("--sync", help="folder of a sync network for these clips, from reward.py --train-sync, or none "
                   "(the one for drawn talkers; with --data none)")
    of_reward = reward_flags(p)
    generator_flags(p)
    args = p.parse_args(argv)
    nothing = argparse.Namespace(**dict.fromkeys(vars(args)))                   # instead of the defaults
    given = {name for name, value in vars(p.parse_args(argv, nothing)).items() if value is not None}
    if args.resume:
        args = resumed(p, args, given, args.resume, {"resume", "device", "micro_batch", "judge_batch"})
        check_shares(p, args)
        return args
    if args.pretrained:
        if args.out is None or args.out.resolve() == args.pretrained.resolve():
            p.error("--pretrained wants an --out of its own")
        args = resumed(p, args, given, args.pretrained,
                       {"resume", "device", "out", "pretrained", "control", "sync", "validate_clips", "sampling_steps",
                        *of_post_training, *of_reward})
    return complete(p, args)


def complete(p: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Fill what was not given from the preset, which explicit flags win over."""
    if not args.pretrained:
        given = {f.name: vars(args).pop(f.name, None) for f in fields(Config)}
        given = {k: v for k, v in given.items() if v is not None}
        if args.init_from:
            shape = trunk_shape(args.init_from)
            for name in sorted(shape.keys() & given):
                p.error(f"--init-from fixes --{name.replace('_', '-')}; leave it out")
            args.init_from = local_name(args.init_from)
            given |= shape
        if encoder := given.get("audio_encoder"):
            given |= {"audio_encoder": local_name(encoder), "mel_channels": encoder_width(encoder)}
        try:
            args.config = replace(PRESETS[args.preset], **given)
        except ValueError as error:
            p.error(str(error))
    for name, value in TRAINING[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / args.preset
    args.sync = args.sync or ("none" if args.data else str(DEFAULT_SYNC))
    if args.seconds is None:
        args.seconds = 3.0 if args.data else 2.0
    check(p, args)
    args.frames = round(args.seconds * FPS) // args.config.chunk_frames * args.config.chunk_frames
    return args


def local_name(name: str) -> str:
    """Make the name of a folder whole, so that it is found from anywhere; leave one of the hub as it is."""
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one clear line where a flag cannot be used."""
    if args.out.exists() and not args.out.is_dir():
        p.error(f"--out {args.out} is a file; name a folder")
    elif args.out.is_dir() and [*args.out.glob("[!.]*")] and not (args.out / "log.jsonl").exists():
        p.error(f"--out {args.out} holds files, none of them a run's log.jsonl; name a folder of the run's own")
    if args.crop and not args.data:
        p.error("--crop is of the clips of --data; drawn talkers need none")
    check_numbers(p, args, seed=0, steps=1, codec_steps=1, batch=1, clips=1, warmup=1, validate_clips=1,
                  sampling_steps=1, save_every=1, validate_every=1, lr=0, muon_lr=0, grad_clip=1e-9, audio_dropout=0,
                  context_noise=0, ema=0, updates=0, prompts=1, parts=1, micro_batch=1, post_lr=0, post_ema=0,
                  watch_every=1, watch_clips=1, patience=1,
                  **{f.name: 0 for f in fields(grpo.Settings) if f.type in (int, float)})
    for name in ("ema", "audio_dropout", "post_ema"):
        if getattr(args, name) >= 1:
            p.error(f"--{name.replace('_', '-')} must be below 1, got {getattr(args, name)}")
    if not 1 <= args.seconds <= 3600:
        p.error(f"--seconds must be from 1 to 3600, got {args.seconds}")
    if args.control and not args.updates:
        p.error("--control compares with post-training; give it --updates")
    try:
        settings(args)
    except ValueError as error:
        p.error(str(error))
    check_shares(p, args)


def check_shares(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one clear line where the work cannot be split evenly over the processes."""
    shares = [("--batch", args.batch)]
    if args.updates:
        parts = {math.ceil(args.prompts / args.parts), args.prompts}
        shares += [("the prompts of each of --parts", n) for n in parts]
    for name, size in shares:
        if size % world():
            p.error(f"{name} must divide by the {world()} processes, got {size}")
    if args.device.startswith("cuda") and world() > 1 and (
            args.device != "cuda" or int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count()):
        p.error(f"{world()} processes on --device {args.device} want a GPU each, or cpu")


def resumed(p: argparse.ArgumentParser, args: argparse.Namespace, given: set[str], run: Path,
            free: set[str]) -> argparse.Namespace:
    """Take every flag from a run, but for those that are free to be given."""
    if fixed := sorted(given - free):
        p.error(f"--{'pretrained' if args.pretrained else 'resume'} goes on with the flags the run had; "
                f"leave out --{fixed[0].replace('_', '-')}")
    if not (run / "config.json").exists():
        p.error(f"{run} holds no run; one that stopped before its first checkpoint starts anew, without --resume")
    try:
        saved = json.loads((run / "config.json").read_text())
        new = {k: getattr(args, k) for k in free}
        for name in {"validate_clips", "sampling_steps", "micro_batch", "judge_batch"} - given:
            new.pop(name, None)                                   # as many as the run had, unless asked otherwise
        known = {k: v for k, v in vars(args).items() if not hasattr(Config, k)}     # flags that an older run lacks
        old = argparse.Namespace(**known | saved["training"] | new)
        old.config, old.data = Config(**saved["model"]), old.data and Path(old.data)
        if not args.pretrained:
            old.out, old.pretrained = run, None
            settings(old)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        p.error(f"{run} is not a run of this version ({error}); name the folder that train.py wrote")
    return old


def flags(args: argparse.Namespace) -> dict:
    """The flags that define a run, as config.json keeps them beside the generator's Config."""
    kept = {k: v for k, v in vars(args).items() if k not in ("config", "resume", "pretrained", "device", "out")}
    return kept | {"data": args.data and str(args.data.absolute())}


# ---------------------------------------------------------------- the run

@contextmanager
def deferred_interrupt() -> Iterator[list]:
    """Let Ctrl-C wait for the end of a step: the list that is given fills, and a second Ctrl-C stops at once."""
    asked, before = [], signal.getsignal(signal.SIGINT)
    if world() > 1:                                        # torchrun ends all of them, wherever each one is
        yield asked
        return

    def note(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def pretrain(run: Pretraining, data: Latents, held_out: list[Clip], log: Log) -> None:
    """Train to the last step, with validations and checkpoints on the way."""
    args, smooth = run.args, None
    bar = tqdm(range(run.step, args.steps), "training", initial=run.step, total=args.steps, unit="step")
    with deferred_interrupt() as asked:
        for _ in bar:
            entry = run.advance(data)
            if not math.isfinite(entry["loss"]):
                raise MediaError(args.out, f"the loss is {entry['loss']} at step {run.step}; lower --lr and --muon-lr")
            smooth = entry["loss"] if smooth is None else 0.98 * smooth + 0.02 * entry["loss"]
            bar.set_postfix(loss=f"{smooth:.4f}")
            log(step=run.step, **entry)
            if args.validate_every and run.step % args.validate_every == 0 and run.step < args.steps and not rank():
                metrics, _ = validate(averaged(run), held_out, args)
                log(step=run.step, held_out=means(metrics))
                bar.write(f"step {run.step}:\n{summary(metrics)}")
            if run.step % args.save_every == 0 or run.step == args.steps or asked:
                run.save(args.out)
            if asked:
                bar.close()
                sys.exit(f"stopped at step {run.step}; go on with: python train.py --resume {args.out}")


def post_train(post: PostTraining, data: Latents, clips: list[Clip], watched: list[Clip], log: Log) -> None:
    """Update until the last one, or until looks at the watched clips have shown nothing better for long."""
    args, start = post.args, time.process_time() - post.cpu_seconds

    def look():
        metrics = post.watch(watched)
        log(update=post.update, watched=means(metrics), best=post.best["update"])
        post.cpu_seconds = time.process_time() - start
        post.save(args.out)
        return metrics

    with deferred_interrupt() as asked:
        if post.update == 0:
            print(f"{len(watched)} watched clips before post-training:\n{summary(look())}")
        bar = tqdm(None, "post-training", initial=post.update, total=args.updates, unit="update")
        while not post.finished:
            entry = post.advance(data, clips)
            if not all(math.isfinite(part["loss"] + part["grad_norm"]) for part in entry["parts"]):
                raise MediaError(args.out, f"the loss is {entry['parts'][-1]['loss']} at update {post.update}; "
                                           "lower --post-lr")
            log(update=post.update, **entry)
            bar.update()
            bar.set_postfix(reward=f"{entry['reward']:.3f}", kl=f"{entry['parts'][-1]['kl']:.4f}")
            if post.update % args.watch_every == 0 or post.update == args.updates:
                bar.write(f"update {post.update}, {len(watched)} watched clips:\n{summary(look())}")
            if asked:
                post.cpu_seconds = time.process_time() - start
                post.save(args.out)
                bar.close()
                sys.exit(f"stopped at update {post.update}; go on with: python train.py --resume {args.out}")
        bar.close()
    print(f"kept update {post.best['update']} of {post.update}; {post.cpu_seconds:.0f} s of CPU time")


def pretrain_longer(args: argparse.Namespace, data: Latents, cpu_seconds: float, log: Log) -> Generator:
    """The honest alternative to post-training: the same CPU time spent on more pretraining.

    It goes on from the last state, optimizers included, warms up again and decays to zero by the time spent.
    """
    folder = args.out / CONTROL
    if args.resume and (folder / "config.json").exists():
        return load_generator(folder).to(args.device).eval()
    run = Pretraining(Generator(args.config).to(args.device), args)
    run.load(args.out)
    begin, start, spent = run.step, time.process_time(), 0.0
    with tqdm(total=round(cpu_seconds), desc="control", unit="CPU-s") as bar:
        while spent < cpu_seconds:
            run.advance(data, min((run.step - begin + 1) / args.warmup, 1 - spent / cpu_seconds))
            spent = everyone(time.process_time() - start)[0]
            bar.update(min(round(spent), bar.total) - bar.n)
    log(control_steps=run.step - begin, cpu_seconds=spent)
    print(f"control: {run.step - begin} more steps of pretraining in {spent:.0f} s of CPU time")
    if not rank():
        save_generator(run.model, folder, run.average, training=flags(args))
    return averaged(run)


def codec_alone(model: Generator, clips: list[Clip], args: argparse.Namespace) -> dict[str, Tensor]:
    """Measure the codec by itself: held-out clips, encoded and decoded. Nothing generated can be better."""
    coded = encode(model, clips, args.frames, args.device)
    videos = [model.codec.decode(p[None].to(args.device) / 255, z[None].to(args.device)).cpu()
              for p, z in zip(coded.portrait, coded.clean)]
    return held_out_metrics(torch.cat(videos), clips, args)


def begin_pretraining(args: argparse.Namespace, clips: list[Clip], start: float) -> tuple[Pretraining, Log]:
    """Make a new run with its codec fitted, or take up a stopped or a finished one. Returns: the run and its log."""
    torch.manual_seed(args.seed)
    model = Generator(args.config)
    if args.init_from and not (args.resume or args.pretrained):
        load_trunk(model, args.init_from)
    run = Pretraining(model.to(args.device), args)
    if args.resume:
        run.load(args.resume)
        return run, Log(args.out, run.step, start)
    if not rank():                                                  # nothing of an earlier run here may stay
        for stale in ("state.pt", "config.json", "post.pt", f"{CONTROL}/config.json", "log.jsonl", "codec.png"):
            (args.out / stale).unlink(missing_ok=True)
    log = Log(args.out, 0, start)
    if args.pretrained:
        run.load(args.pretrained)
        run.save(args.out)
    else:
        if not rank():
            fit_codec(run.model, clips, args, log)
        run.model.codec.load_state_dict(everyone({k: v.cpu() for k, v in run.model.codec.state_dict().items()})[0])
        run.average.update({f"codec.{k}": v.clone() for k, v in run.model.codec.state_dict().items()})
        if args.config.codec == "learned":                          # minutes of work that --resume shall not repeat
            run.save(args.out)
    return run, log


def begin_post_training(reference: Generator, reward: Reward, args: argparse.Namespace, log: Log) -> PostTraining:
    """Start from the reference, or take up where a stopped run was."""
    post = PostTraining(reference, reward, args)
    if args.resume and (args.out / "post.pt").exists():
        post.load(args.out)
    elif not rank():
        save_generator(reference, args.out / PRETRAINED, training=flags(args))
    log.rewind("update", post.update)
    return post


def describe(run: Pretraining, data: Latents, held_out: list[Clip], log: Log, argv: list[str]) -> None:
    """Say what is about to be trained, and what the codec alone can reach; draw it, if it was learned."""
    codec, args = codec_alone(run.model, held_out, run.args), run.args
    parameters = sum(p.numel() for p in run.model.parameters())
    log(config=asdict(args.config), training=flags(args), parameters=parameters, codec=means(codec),
        command=shlex.join(["python", "train.py", *argv]), hardware=hardware(args.device))
    print(f"codec alone, {len(held_out)} held-out clips:\n{summary(codec)}\n"
          f"{len(data)} training clips of {args.frames} frames; generator of {parameters / 1e6:.2f} M parameters "
          f"on {args.device}; ready after {time.perf_counter() - log.start:.0f} s")
    if args.config.codec == "learned":
        few = held_out[:3]
        true = pixels(few, args.frames)
        made = run.model.codec.decode(true[:, 0].to(args.device), run.model.codec.encode(true.to(args.device)))
        write_sheet(args.out / "codec.png", [true, made.cpu()])


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: tensors of the same sizes come again every step, and fetching their pages from the
    system anew took a quarter of the reward's CPU time."""
    with suppress(OSError, AttributeError):                          # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option in (-3, -1):                                      # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 2 ** 31 - 1)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until the block or the process ends, by kill -9 too: the lock is the system's."""
    if rank():
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise MediaError(folder, "another run is at work there; wait for its end, or choose another --out") from None
    except OSError:                                  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(held)


@contextmanager
def interruptible(args: argparse.Namespace, start: float) -> Iterator[None]:
    """End at Ctrl-C with a line that says how to go on: from a checkpoint, if this run has left one."""
    began = time.time() - (time.perf_counter() - start)
    try:
        yield
    except KeyboardInterrupt:
        state = args.out / "state.pt"
        kept = args.resume or state.exists() and state.stat().st_mtime >= began
        sys.exit(f"stopped; go on with: python train.py --resume {args.out}" if kept else
                 "stopped before the first checkpoint, so nothing was kept; start it again")


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    keep_freed_memory()
    join_processes()
    with redirect_stderr(sys.stdout if rank() else sys.stderr):         # one of them may complain of flags
        args = parse_arguments(argv)
    with alone(args.out), interruptible(args, start):
        make(args, start, sys.argv[1:] if argv is None else argv)


def make(args: argparse.Namespace, start: float, argv: list[str]) -> None:
    """Do all that the flags ask for, from data to report."""
    with first_alone():
        clips, held_out, watched = load_clips(args)
    if args.sync != "none":                                         # all this before the minutes that would be lost
        load_sync(args.sync)
    reward = make_reward(args, clips, args.config.chunk_frames)
    run, log = begin_pretraining(args, clips, start)
    reward.resemble(clips, run.model.codec)
    data = encode(run.model, clips, args.frames, args.device)
    if not rank():
        describe(run, data, held_out, log, argv)
    with fitting("pretraining", "lower --batch, or give --checkpointing"):
        pretrain(run, data, held_out, log)
    arms = {PRETRAINED: averaged(run)}
    if args.updates:
        post = begin_post_training(arms[PRETRAINED], reward, args, log)
        with fitting("post-training", f"lower --micro-batch, with --resume {args.out}; or --prompts or --group, with "
                                      f"--pretrained {args.out}"):
            post_train(post, data, clips, watched, log)
        arms[POST_TRAINED] = loaded(post.best["weights"], args)
    if args.control:
        arms[CONTROL] = pretrain_longer(args, data, post.cpu_seconds, log)

    if rank():
        return
    with fitting("measuring", f"lower --validate-clips, with --pretrained {args.out}"):
        videos = report(arms, held_out, run.step, args, log)
    write_pictures(args.out, videos, held_out)
    by_reward = rewarded(reward, dict(zip(arms, videos)), held_out)
    log(step=run.step, rewarded=by_reward)
    write_report(args.out)
    print(f"{by_reward}\n{(time.perf_counter() - start) / 60:.1f} minutes in all\nto try next:\n  python sample.py "
          f"--checkpoint {args.out} --image {args.out}/portrait.png --audio {args.out}/speech.wav --out video.mp4\n"
          f"{args.out}/report.md: metrics and curves; sheet.png (truth above {', '.join(arms)}), "
          "sample.mp4 (truth beside them), log.jsonl")


if __name__ == "__main__":
    with one_line("stopped before anything was done", "choose a smaller --preset or --size, or fewer --clips"):
        main()
