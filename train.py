"""Teach portraits to speak: pretrain on what is found, fine-tune on what the judge picks, reinforce with what it says.

    python train.py                                    drawn talkers as found, two CPU cores, minutes
    python train.py --data my_clips --size 64          your own video clips
    python train.py --resume runs/tiny                 go on where a run was stopped
    python train.py --curate 0 --updates 0             pretraining alone
    python train.py --control                          and what each stage's time would have bought otherwise
    python train.py --pretrained runs/tiny --out runs/other    curate and post-train a finished run anew
    python train.py --pretrained runs/tiny --data my_clips --out runs/mine    train it first on your own clips
    python train.py --resume runs/tiny --steps 6000    give a run more; its later stages are then done anew
    torchrun --nproc_per_node=2 train.py --batch 16    the same on two GPUs, or on two processes of a CPU

1. Pretraining by flow matching on all clips. A clip's chunks are noised, each to a noise level of its own,

       x_sigma = (1 - sigma) * clean + sigma * noise,      sigma ~ U(0.02, 1) per chunk

   and the generator, which sees the portrait, the sound and the clean past of each chunk, learns the velocity

       loss = w(sigma) * |predicted velocity - (noise - clean)|^2,      w = min(sigma / 0.2, 1)^2.

   The weight tames the division by sigma near the clean end, where the network predicts the clean latent.
   What is taught is what was found: lips late, mouths mumbling, cameras trembling. More of it teaches that better.
2. Curation: the judge rates every clip once, and the same loss goes on, on the share of clips with the highest ratings.
   A network fine-tuned on these can only become as good as they are.
3. Post-training by GRPO (grpo.py explains it): groups of videos of training prompts are generated, scored by the
   reward (reward.py), and their draws made likelier or less so. This can go beyond the best data.

Every stage looks at watched clips on the way and keeps the moving average of the weights that did best on them; the
reported clips are others. `--control` spends the CPU time of post-training otherwise: on more pretraining, on more
curation, and on GRPO without curation.

All randomness of a step comes from a generator keyed by (seed, step), so that a resumed run repeats an unbroken one.
"""

import argparse
import atexit
import copy
import ctypes
import fcntl
import hashlib
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
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
from data import (FPS, SAMPLES_PER_FRAME, Clip, MediaError, cached, first_line, fitting, folder_clips, hear,
                  one_line, pixels, replacing, sounds, write_speech, write_video, writing)
from extras.pretrained import encoder_width, load_trunk, trunk_shape
from extras.report import (CURATED, MORE_CURATION, MORE_PRETRAINING, POST_TRAINED, PRETRAINED, UNCURATED, funnel,
                           funnel_table, hardware, paired, write_report)
from extras.reward_flags import make_judge, make_reward, measuring_sync, reward_flags, reward_sync, table
from extras.talkers import FAULTS, synthetic_clips
from model import PRESETS, SAMPLING_STEPS, Config, Generator, ode_step, save_generator
from reward import ASPECTS, NO_JUDGE, JudgeError, Reward, Scores, rate_whole, to_bytes
from sample import (check_numbers, crop_argument, device_argument, evaluate, frechet, generator, imitate, seeded_noise,
                    summary, sync_metrics)

# What a preset trains with, beside its Config in model.py.
TRAINING = {
    "tiny": dict(steps=3000, curate_steps=1000, updates=60, batch=8, clips=1000, ema=0.98, warmup=50, prompts=4,
                 micro_batch=8, checkpointing=False),
    "small": dict(steps=40_000, curate_steps=5000, updates=80, batch=16, clips=4000, ema=0.999, warmup=500, prompts=8,
                  micro_batch=4, checkpointing=False),
    "base": dict(steps=200_000, curate_steps=20_000, updates=80, batch=32, clips=4000, ema=0.9999, warmup=1000,
                 prompts=8, micro_batch=1, checkpointing=True),
}
HELD_OUT_SEED = 1_000_000          # talkers with another seed: other identities, other speech
WATCHED = 100_000                  # the first of the talkers that are watched, beyond any that are reported
POST_WARMUP = 10                   # updates: Adam's first steps, of few gradients, would be its largest
POST_STREAM = 500_000              # where the random numbers of updates begin, beyond those of any training step
NOT_FLAGS = "mel_channels", "norm_eps", "audio_encoder"       # of Config: these follow from flags of their own
CODEC_CLIPS = 256                  # enough to fit the codec's components
EXEMPLARS = 64                     # clips that say what is normal: enough for means, few enough to be good
SIGMA_BINS = 5
LOADS = {"validate_clips", "sampling_steps", "micro_batch", "save_minutes", "judge_batch", "judge_timeout",
         "judge_patience"}         # flags that say how much at once, or how long to wait
LOCAL = "data", "exemplars", "judge", "sync", "reward_sync", "calibration", "init_from"
PLACES = {*LOCAL, "audio_encoder", "judge_url", "judge_model"}     # where a thing is: it may have moved
GROW = {"steps", "curate_steps", "updates", "control"}             # of these a run may be given more
SESSION = {"config", "command", "resume", "pretrained", "further", "refit_codec", "overwrite", "out",
           "device"}               # these are no part of a run
UNRATED_OVER, MOST_UNRATED = 10, 0.1       # updates over which a judge may leave less than this share of videos unrated


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


def shard() -> slice:
    """The rows of a batch, or the prompts of an update, that this process works on."""
    return slice(rank(), None, world())


def all_gather(value) -> list:
    """Collect a value (on the CPU) of every process, in their order."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def ddp(model: Generator, unused: bool = False) -> torch.nn.Module:
    """Give all processes the first one's weights and make them average their gradients from now on.

    Args: unused: whether some weights may have no gradient, as `no_audio` where every clip is heard.
    """
    if world() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=unused)


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Let the first process go through a block before the others: what it leaves in a cache they find there."""
    if rank():
        dist.barrier()
    yield
    if world() > 1 and not rank():
        dist.barrier()


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise a MediaError that ends this block in one process in all of them, so that the first can save."""
    failed = None
    try:
        yield
    except MediaError as error:
        failed = error
    for error in all_gather(failed):
        if error:
            raise error


# ---------------------------------------------------------------- data

@dataclass
class Latents:
    """A set of clips as the trainer sees it, all in memory: pixels appear only in the portraits."""

    portrait: Tensor               # (N, 3, S, S) uint8
    mel: Tensor                    # (N, K T, mel_channels)
    clean: Tensor                  # (N, K, tokens, C)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows) -> "Latents":
        return Latents(self.portrait[rows], self.mel[rows], self.clean[rows])


def load_clips(args: argparse.Namespace) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """Return the clips to train on, to report on, and to watch on the way, each `args.frames` long or longer.

    Training sees neither of the latter; the watched choose the checkpoints, so the reported may not be among them.
    """
    rated = args.judge_url or args.judge not in ("none", "default") or args.judge == "default" and not args.data
    watch = args.watch_clips if args.updates or args.curate and (rated or reward_sync(args)) else 0
    if args.data:
        train, held_out = folder_clips(args.data, args.config.size, args.seconds, args.crop, frames=args.frames)
    else:
        size, seed = args.config.size, HELD_OUT_SEED + args.seed
        train = synthetic_clips(args.clips, size, args.seconds, args.seed, world=args.world)
        held_out = list(synthetic_clips(args.validate_clips, size, args.seconds, seed))
        if watch:
            held_out += synthetic_clips(watch, size, args.seconds, seed, first=WATCHED)
    if not (train and held_out):
        raise MediaError(args.data, f"has too few clips of {args.frames / FPS:.2f} s ({len(train)} to train on, "
                                    f"{len(held_out)} held out); add files or lower --seconds")
    if args.updates and len(train) < args.prompts:
        raise MediaError(args.data or "--clips", f"has {len(train)} clips for {args.prompts} --prompts; lower these")
    wanted, watch = watch, min(watch, len(held_out) // 2)
    if wanted and not watch:
        raise MediaError(args.data, "has one held-out clip, and the stages after pretraining want one more to watch; "
                                    "add files, or give --curate 0 --updates 0")
    reported = held_out[: len(held_out) - watch]
    return train, reported[: args.validate_clips], held_out[len(reported):]


def fit_codec(model: Generator, clips: list[Clip], args: argparse.Namespace) -> None:
    """Fit the motion codec to clips that are spread over the training set."""
    if len(clips) * args.frames < args.config.space_channels:
        raise MediaError(args.data or "--clips", f"{len(clips)} clips are too few to fit the codec; add some")
    model.codec.fit(pixels(spread(clips, CODEC_CLIPS), args.frames).to(args.device))


def spread(clips: list[Clip], most: int) -> list[Clip]:
    """Choose clips that are spread over a set."""
    return [clips[i] for i in np.linspace(0, len(clips) - 1, min(len(clips), most)).astype(int)]


def encode(model: Generator, clips: list[Clip], frames: int, device: str) -> Latents:
    """Encode clips once, so that a training step never touches a pixel."""
    latents, batch = [], 16
    for i in tqdm(range(0, len(clips), batch), "encoding", leave=False):
        latents.append(model.codec.encode(pixels(clips[i:i + batch], frames).to(device)).cpu())
    mel = torch.stack([hear(clip.audio, frames, model.config.audio_encoder, device) for clip in clips])
    portrait = torch.stack([clip.frames[0].clone() for clip in clips])       # a view would hold its file's map
    return Latents(portrait, mel, torch.cat(latents))


# ---------------------------------------------------------------- what the judge picks

@dataclass
class Picks:
    """Which of the training clips are good."""

    curated: Tensor                # (n,) rows to fine-tune on; empty where nothing can rank the clips
    lively: list[Clip]             # exemplars of how much should move,
    smooth: list[Clip]             # and of how
    cpu_seconds: float = 0.0       # that the rating took


def rate_clips(judge, clips: list[Clip], args: argparse.Namespace) -> tuple[Tensor, float]:
    """Ask for ratings of all training clips, (N, 3), once: they are kept on disk. NaN where the judge gives none.

    Returns: ratings, and the CPU time that they took.
    """
    def rate(to: Path) -> None:
        start, scores = time.process_time(), []
        for i in tqdm(range(0, len(clips), args.judge_batch), "rating", leave=False):
            part = clips[i:i + args.judge_batch]
            scores.append(rate_whole(judge, pixels(part, args.frames), sounds(part, args.frames),
                                     [clip.name for clip in part])[0])
        np.save(to / "ratings.npy", torch.cat(scores).numpy())
        (to / "cpu_seconds").write_text(f"{time.process_time() - start}")

    sign = hashlib.sha256()
    for clip in clips:
        sign.update(clip.frames[:: max(1, len(clip.frames) // 4)].numpy().tobytes() + clip.audio.numpy().tobytes())
    recipe = {"clips": sign.hexdigest(), "frames": args.frames, "judge": judge.fingerprint}
    kept = cached(None, recipe, rate)
    return torch.from_numpy(np.load(kept / "ratings.npy")), float((kept / "cpu_seconds").read_text())


def pick_clips(judge, clips: list[Clip], args: argparse.Namespace, log: "Log") -> Picks:
    """Rank the training clips by the judge, or else by a sync network taught on such clips, and choose the best.

    Curated is the share with the highest sum of ratings. Exemplars are chosen aspect by aspect: those with the highest
    sum tremble as all clips do. With neither a judge nor a network that knows the clips, nothing is picked.
    """
    count, most = round(args.curate * len(clips)), min(EXEMPLARS, len(clips))
    sync, ratings, start = reward_sync(args), None, time.process_time()
    if judge is not None:
        ratings, spent = rate_clips(judge, clips, args)
        score = ratings.sum(1)
    elif sync is not None:
        score = torch.cat([sync_metrics(sync, pixels([c], args.frames), sounds([c], args.frames))["sync_confidence"]
                           for c in tqdm(clips, "rating", leave=False)])
        spent = time.process_time() - start
    else:
        if args.curate:
            print("no curation: neither a judge nor a --reward-sync network knows these clips")
        return Picks(torch.empty(0, dtype=torch.long), spread(clips, most), spread(clips, most))

    def best(values: Tensor, n: int) -> Tensor:
        order = values.nan_to_num(-math.inf).argsort(descending=True, stable=True)[:n]
        return order[values[order].isfinite()]

    curated = best(score, count)
    lively, smooth = (best(score if ratings is None else ratings[:, ASPECTS.index(aspect)], most)
                      for aspect in ("expressiveness", "motion"))
    if ratings is not None and clips[0].truth and "fault_offset" in clips[0].truth:
        strengths = {name: torch.stack([clip.truth[f"fault_{name}"] for clip in clips]) for name in FAULTS}
        log(funnel=(rows := funnel(strengths, ratings, curated)))
        print(f"{len(clips)} clips as found, and the {len(curated)} that the judge picks:\n{funnel_table(rows)}")
    lively, smooth = ([clips[i] for i in rows] for rows in (lively, smooth))
    return Picks(curated, lively, smooth, spent)


# ---------------------------------------------------------------- flow matching

def flow_matching_loss(model: Generator, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Noise the clean chunks, predict the velocity, compare.

    Args: batch, as `draw_batch` gives it. Returns: the weighted error and sigma, both (B, 1, K).
    """
    portrait, mel, clean, context, noise, sigma, heard = batch
    level = sigma[..., None, None]
    noisy = (1 - level) * clean + level * noise                                      # (B, 1, K, N, C)
    with torch.autocast("cuda", torch.bfloat16, enabled=clean.is_cuda):
        velocity = model(portrait, mel, context, noisy, sigma, heard)                # (B, 1, K, N, C)
    error = (velocity - (noise - clean)).square().mean((-1, -2))
    return error * (sigma / 0.2).clamp_max(1).square(), sigma


def draw_batch(data: Latents, args: argparse.Namespace, step: int) -> tuple[Tensor, ...]:
    """Draw the batch of a step; every process draws all of it and returns its own rows.

    Returns: portrait (B, 3, S, S) in [0, 1], mel (B, K T, mel_channels), clean (B, 1, K, N, C), context (B, K, N, C),
    noise (B, 1, K, N, C), sigma (B, 1, K), heard (B,).
    """
    device = args.device
    draw = dict(generator=generator(args.seed, step, device), device=device)
    rows = torch.randint(len(data), (args.batch,), **draw).cpu()
    clean = data.clean[rows].to(device)                                              # (B, K, N, C)
    sigma = torch.rand(clean.shape[:2], **draw).clamp_min(0.02)[:, None]
    noise = torch.randn(clean.shape, **draw)[:, None]
    heard = torch.rand(args.batch, **draw) >= args.audio_dropout
    # Noise on the past, anything from none to as much as there is signal: generation's own past is never perfect,
    # and a trunk that trusts it copies and sharpens its own errors until, within seconds, the face falls apart.
    slip = args.context_noise * torch.rand(args.batch, 1, 1, 1, **draw)
    context = clean + slip * torch.randn(clean.shape, **draw)
    rows, clean, context, noise, sigma, heard = (x[shard()] for x in (rows, clean, context, noise, sigma, heard))
    return (data.portrait[rows].to(device) / 255, data.mel[rows].to(device), clean[:, None], context, noise, sigma,
            heard)


def by_noise_level(error: Tensor, sigma: Tensor) -> list[float | None]:
    """Average errors of all processes over bins of sigma; None where a bin is empty."""
    sigma, error = (torch.cat(x).flatten() for x in zip(*all_gather((sigma.cpu(), error.detach().cpu()))))
    bins = (sigma * SIGMA_BINS).long().clamp_max(SIGMA_BINS - 1)
    means = [error[bins == i].mean().item() for i in range(SIGMA_BINS)]
    return [None if math.isnan(mean) else round(mean, 5) for mean in means]


def optimizers(model: Generator, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the trunk (Jordan et al., 2024), AdamW for the rest, as nanochat has it."""
    trunk = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and "modulation" not in name]
    inside = {id(p) for p in trunk}
    rest = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
    return [torch.optim.Muon(trunk, lr=args.muon_lr, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01,
                              fused=args.device.startswith("cuda"))]


def blend(average: dict[str, Tensor], model: Generator, decay: float) -> None:
    """Move an average of weights towards a model's."""
    weights = model.state_dict()
    floats = [k for k, v in weights.items() if v.is_floating_point()]
    torch._foreach_lerp_([average[k] for k in floats], [weights[k] for k in floats], 1 - decay)


def snapshot(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in weights.items()}


def fingerprint(weights: dict[str, Tensor]) -> str:
    """Tell weights from others: a stage that went on from them is only as old as they are."""
    sign = hashlib.sha256()
    for tensor in weights.values():
        sign.update(tensor.cpu().numpy().tobytes())
    return sign.hexdigest()


# ---------------------------------------------------------------- stages

class Stage:
    """Weights that change step by step: what --resume needs of them, and the best that the looks have seen.

    A stage ends after `total` steps or, if it is a control, when it has spent `budget` seconds of CPU time.
    """

    unit = "step"

    def __init__(self, name: str, model: Generator, args: argparse.Namespace, total: int = 0, budget: float = 0.0):
        self.name, self.model, self.args, self.total, self.budget = name, model, args, total, budget
        model.checkpointing = args.checkpointing
        self.average = snapshot(model.state_dict())
        self.optimizers: list[torch.optim.Optimizer] = []
        self.step, self.looks, self.cpu_seconds = 0, 0, 0.0
        self.recipe = {}               # what else must agree where the stage goes on from a checkpoint
        self.best = {"step": 0, "score": -math.inf, "weights": self.average}

    @property
    def progress(self) -> float:
        """How much of the stage is done, 0..1."""
        return self.step / self.total if self.total else min(self.cpu_seconds / self.budget, 1.0)

    @property
    def kept(self) -> dict[str, Tensor]:
        """The weights to go on with: the best that was looked at; without looks the moving average."""
        return self.best["weights"] if self.looks else self.average

    def advance(self) -> dict:
        """Take a step and charge its CPU time. Returns: what to log.

        Raises: JudgeError or KeyboardInterrupt before anything has changed.
        MediaError where the loss is no number.
        """
        start = time.process_time()
        entry = self.take_step()
        self.cpu_seconds = all_gather(self.cpu_seconds + time.process_time() - start)[0]
        return entry

    def look(self, watched: list[Clip]) -> dict[str, Tensor]:
        """Measure the moving average on the watched clips, always from the same noise, and keep it if it is best."""
        with signals(signal.default_int_handler):
            metrics = None if rank() else validate(loaded(self.average, self.args), watched, self.args)[0]
        metrics = all_gather(metrics)[0]
        score = held_out_score(metrics)
        self.looks += 1
        if score > self.best["score"]:
            self.best = {"step": self.step, "score": score, "weights": snapshot(self.average)}
        return metrics

    def save(self, folder: Path) -> None:
        """Write the state, then the weights for sample.py with the flags, each renamed into place.

        Flags come last: where they are, there is a state to go on from.
        """
        if rank():
            return
        checkpoint = self.checkpoint(folder)
        with writing(folder):
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
        with replacing(checkpoint) as path:
            torch.save({self.unit: self.step, "model": self.model.state_dict(), "average": self.average,
                        "optimizers": [o.state_dict() for o in self.optimizers], "best": self.best,
                        "looks": self.looks, "cpu_seconds": self.cpu_seconds, "recipe": self.recipe}, path)
        save_generator(self.model, checkpoint.parent, self.kept, training=flags(self.args))

    def checkpoint(self, folder: Path) -> Path:
        """Name the stage's file in the folder of a run; a control has a folder of its own."""
        control = f"control/{self.name.replace(' ', '-')}/state.pt"
        return folder / CHECKPOINTS.get(self.name, control)

    def continues(self, folder: Path) -> bool:
        """Take up the stage's own checkpoint, if a folder has one of the same recipe."""
        path = self.checkpoint(folder)
        if not path.is_file():
            return False
        if torch.load(path, map_location="cpu", weights_only=True)["recipe"] != self.recipe:
            print(f"{self.name} is done anew: {path} went on from other weights, or is of other clips")
            return False
        self.load(path)
        return True

    def load(self, path: Path, anew: bool = False) -> None:
        """Take up what `save` wrote; `anew` begins a stage there: its steps count from 0, and nothing is best yet.

        Raises: MediaError where it is missing or broken.
        """
        all_gather(None)                                   # the first process may still be writing it
        try:
            state = torch.load(path, map_location=self.args.device, weights_only=True)
            self.average = state["average"]
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            if anew:
                self.best = {"step": 0, "score": -math.inf, "weights": self.average}
            else:
                self.step, self.best, self.cpu_seconds = state[self.unit], state["best"], state["cpu_seconds"]
                due = math.floor(self.args.looks * self.progress + 1e-9) + 1
                self.looks = min(state["looks"], due)      # fewer where the stage has been given more steps
        except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise MediaError(path, f"cannot be resumed from ({first_line(error)}); "
                                   "start the run anew without --resume") from None


CHECKPOINTS = {"pretraining": "state.pt", "curation": "curate.pt", "post-training": "post.pt"}


class FlowMatching(Stage):
    """Learning by flow matching, on all clips or on the curated ones.

    Args: first: where its random numbers begin.
    """

    def __init__(self, name: str, data: Latents, args: argparse.Namespace, total: int = 0, budget: float = 0.0,
                 first: int = 0):
        super().__init__(name, Generator(args.config).to(args.device), args, total, budget)
        self.data, self.first = data, first
        self.optimizers = optimizers(self.model, args)
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.trained = torch.compile(ddp(self.model)) if args.compile else ddp(self.model)

    def take_step(self) -> dict:
        factor = min((self.step + 1) / self.args.warmup, 1 - self.progress)          # warm up, then decay to zero
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = factor * rate
            optimizer.zero_grad()
        error, sigma = flow_matching_loss(self.trained, draw_batch(self.data, self.args, self.first + self.step))
        loss = error.mean()
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        blend(self.average, self.model, min(self.args.ema, self.step / (self.step + 10)))      # a short memory at first
        loss = sum(all_gather(loss.item())) / world()
        if not math.isfinite(loss):
            raise MediaError(self.args.out, f"the loss is {loss} at step {self.step}; lower --lr and --muon-lr")
        return {"loss": loss, "grad_norm": norm.item(), "lr_factor": factor,
                "loss_by_sigma": by_noise_level(error, sigma)}


def settings(args: argparse.Namespace) -> grpo.Settings:
    return grpo.Settings(**{f.name: getattr(args, f.name) for f in fields(grpo.Settings)})


class PostTraining(Stage):
    """Learning by GRPO. The reference, which the policy starts from and is held to, are the weights to begin with."""

    unit = "update"

    def __init__(self, name: str, reference: Generator, reward: Reward, data: Latents, clips: list[Clip],
                 args: argparse.Namespace):
        super().__init__(name, copy.deepcopy(reference), args, args.updates)
        self.reference, self.reward, self.data, self.clips = reference.requires_grad_(False), reward, data, clips
        self.settings, self.checked = settings(args), False
        self.trained = ddp(self.model, unused=True)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), args.post_lr, betas=(0.9, 0.95), weight_decay=0)]
        self.unrated = deque(maxlen=UNRATED_OVER)                  # videos without a rating, of the last updates

    def take_step(self) -> dict:
        """Roll out, score, compare, and take a gradient step on each part of the rollouts.

        The first part is on-policy, its ratios are 1; on the later ones they are not, and the clip is at work.
        """
        clock = [time.perf_counter()]
        rng = generator(self.args.seed, POST_STREAM + self.step)
        rows = torch.randperm(len(self.data), generator=rng)[: self.args.prompts]
        steps = grpo.window(self.settings, rng)
        with signals(signal.default_int_handler):          # this may take long, and changes nothing
            rollout = self.roll_out(rows, steps, rng)
            clock.append(time.perf_counter())
            scores = self.score(rollout, [self.clips[i] for i in rows[shard()]])
        advantage, components = grpo.advantages(scores, self.reward.weights, self.settings, rollout.latents.shape[1],
                                                self.reward.floors)                  # (B, K) of all processes
        self.count_unrated(components, len(advantage))
        advantage = advantage.unflatten(0, (-1, self.settings.group))[shard()].flatten(0, 1).to(self.args.device)
        clock.append(time.perf_counter())

        self.optimizers[0].param_groups[0]["lr"] = self.args.post_lr * min(
            (self.step + 1) / POST_WARMUP, 1 - self.progress)
        size = math.ceil(len(rollout) / self.settings.group / self.args.parts) * self.settings.group  # whole groups
        parts = [self.improve(rollout[at:at + size], advantage[at:at + size]) for at in range(0, len(rollout), size)]
        self.step += 1
        blend(self.average, self.model, min(self.args.post_ema, self.step / (self.step + 10)))
        clock.append(time.perf_counter())
        seconds = [round(b - a, 3) for a, b in zip(clock, clock[1:])]
        return {"reward": scores.total.nanmean().item(), "components": components, "sigma": steps[0][0],
                "parts": parts, "seconds_for": dict(zip(("rollout", "reward", "update"), seconds))}

    def roll_out(self, rows: Tensor, steps: list[tuple[float, float]], rng: torch.Generator) -> grpo.Rollout:
        """Generate the groups of these prompts; the first ones of every run check that rescoring repeats them."""
        portrait = (self.data.portrait[rows] / 255).to(self.args.device)
        rollout = grpo.roll_out(self.model, portrait, self.data.mel[rows].to(self.args.device), self.settings, steps,
                                rng, shard())
        if not self.checked:
            grpo.check_rescoring(self.model, rollout, self.settings)
            self.checked = True
        return rollout

    @torch.no_grad()
    def score(self, rollout: grpo.Rollout, prompts: list[Clip]) -> Scores:
        """Judge a rollout of these prompts. Returns: the Scores of all processes' rollouts, in the prompts' order."""
        group = self.settings.group
        audio = sounds(prompts, rollout.frames.shape[1]).repeat_interleave(group, 0)
        names = [f"{clip.name} rollout {i}" for clip in prompts for i in range(group)]
        with failing_together():
            scores = self.reward(rollout.frames, audio, rollout.portrait, names, self.settings.credit == "chunk")

        def join(parts):
            return rearrange(list(parts), "w (p g) ... -> (p w g) ...", g=group)
        parts = all_gather([{k: v.cpu() for k, v in x.items()} for x in (
            {"total": scores.total}, scores.components, scores.per_chunk)])
        total, components, per_chunk = ({k: join(part[k] for part in some) for k in some[0]} for some in zip(*parts))
        return Scores(total["total"], components, per_chunk)

    def count_unrated(self, components: dict, videos: int) -> None:
        """Raise JudgeError where the judge leaves too many videos unrated; single ones are only left out."""
        self.unrated.append(components["total"]["unrated"])
        if sum(self.unrated) >= MOST_UNRATED * UNRATED_OVER * videos:
            raise JudgeError("the judge", f"left {sum(self.unrated)} videos unrated in {len(self.unrated)} updates of "
                                          f"{videos} videos; {NO_JUDGE}")

    def improve(self, rollout: grpo.Rollout, advantage: Tensor) -> dict:
        """Take a gradient step on some rollouts, a few at a time as memory allows. Returns: what to log."""
        logs, micro = [], self.args.micro_batch
        self.optimizers[0].zero_grad()
        for at in range(0, len(rollout), micro):
            few = rollout[at:at + micro]
            loss, log = grpo.grpo_loss(self.trained, self.reference, few, advantage[at:at + micro], self.settings)
            (loss * len(few) / len(rollout)).backward()
            logs.append(({k: v.cpu() for k, v in log.items()}, len(few) / len(rollout) / world()))
        norm = clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        self.optimizers[0].step()
        logs = [part for parts in all_gather(logs) for part in parts]
        entry = {k: sum(log[k] * share for log, share in logs).tolist() for k in logs[0][0]}
        entry |= {"ratio_max": torch.stack([log["ratio_max"] for log, _ in logs]).amax(0).tolist(),
                  "grad_norm": norm.item()}
        if not math.isfinite(entry["loss"] + entry["grad_norm"]):
            raise MediaError(self.args.out, f"the loss is {entry['loss']} at update {self.step + 1}; lower --post-lr")
        return entry


@contextmanager
def signals(handler) -> Iterator[None]:
    """Have a handler answer Ctrl-C and SIGTERM in a block.

    Not under torchrun, which ends all processes, wherever each one is.
    """
    stops = (signal.SIGINT, signal.SIGTERM) if world() == 1 else ()
    before = {number: signal.signal(number, handler) for number in stops}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def carry_out(stage: Stage, watched: list[Clip], log: "Log") -> dict[str, Tensor]:
    """Take a stage to its end, with looks at the watched clips, log lines and checkpoints on the way.

    Looks are spread evenly, the first one before the first step; without watched clips there are none.
    Ctrl-C and SIGTERM wait for the end of a step, but for rollouts, rewards and looks, which change nothing.
    A second one stops at once, and then nothing is saved.
    Returns: the weights to go on with.
    """
    args, saved, asked, first = stage.args, time.monotonic(), [], stage.step
    log.rewind(stage)
    bar = tqdm(None, stage.name, initial=stage.step, total=stage.total or None, unit=stage.unit)

    def note(*signal_and_frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    def stop():
        stage.save(args.out)
        bar.close()
        sys.exit(f"stopped at {stage.unit} {stage.step} of {stage.name}; go on with: {go_on(args)}")

    with signals(note), bar:
        while True:
            try:
                if watched and stage.looks <= args.looks * stage.progress + 1e-9:
                    metrics = stage.look(watched)
                    log(stage=stage.name, **{stage.unit: stage.step}, watched=means(metrics),
                        best=stage.best["step"])
                    bar.write(f"{stage.name}, {stage.unit} {stage.step}, {len(watched)} watched clips:\n"
                              f"{summary(metrics)}")
                if stage.progress >= 1:
                    break
                entry = stage.advance()
            except KeyboardInterrupt:
                if asked:                                  # the second one: what it tore is not saved
                    raise
                stop()
            except JudgeError:                             # it is away, say: what was reached is kept
                stage.save(args.out)
                raise
            log(stage=stage.name, **{stage.unit: stage.step}, **entry)
            bar.update()
            bar.set_postfix(reward=f"{entry['reward']:.3f}") if "reward" in entry else bar.set_postfix(
                loss=f"{entry['loss']:.3f}")
            if asked:
                stop()
            if time.monotonic() - saved > 60 * args.save_minutes:
                stage.save(args.out)
                saved = time.monotonic()
        if stage.name not in CHECKPOINTS and stage.step > first:
            log(control=stage.name, steps=stage.step, cpu_seconds=stage.cpu_seconds)
        stage.save(args.out)
    if watched:
        print(f"{stage.name}: kept {stage.unit} {stage.best['step']} of {stage.step}; "
              f"{stage.cpu_seconds:.0f} s of CPU time")
    return stage.kept


def go_on(args: argparse.Namespace) -> str:
    """The command that goes on with a run: with what was given anew, if this one already did."""
    return shlex.join(["python", "train.py", *(args.command if args.resume else ["--resume", str(args.out)])])


# ---------------------------------------------------------------- measuring

def loaded(weights: dict[str, Tensor], args: argparse.Namespace) -> Generator:
    """A generator with these weights."""
    model = Generator(args.config).to(args.device).eval()
    model.load_state_dict(weights)
    return model


def held_out_metrics(videos: Tensor, clips: list[Clip], args: argparse.Namespace) -> dict[str, Tensor]:
    """Measure videos by what no reward uses, with the sync network of --sync."""
    return evaluate(videos, clips, args.config.chunk_frames, measuring_sync(args))


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
    net = measuring_sync(args)
    return frechet(*(net.visual(v).flatten(0, 1) for v in (videos, pixels(clips, videos.shape[1])))).item()


def rewarded(reward: Reward, arms: dict[str, Tensor], clips: list[Clip]) -> str:
    """Tell, apart from the held-out metrics, what the reward says of every arm's videos and of the true clips."""
    frames = next(iter(arms.values())).shape[1]
    true, audio = pixels(clips, frames), sounds(clips, frames)
    return f"the same {len(clips)} clips by the reward:\n" + table(reward, {
        name: reward(videos, audio, true[:, 0], [f"{name} {clip.name}" for clip in clips])
        for name, videos in (arms | {"truth": true}).items()})


def held_out_score(metrics: dict[str, Tensor]) -> float:
    """What chooses the checkpoint, on watched clips: the correlation of the mouth with the true one, which no reward
    contains; 10% too much or too little motion, of the mouth or of all, costs 0.01 of it, 10% too much of the head half
    as much, so that a reward that is being hacked is not kept for its lips. (A head sways as it likes, and how little
    differs from look to look more than lips do. Nor is it the distance to the true frames: a head that stands still is
    nearest to one that moves.)"""
    mouth = metrics["lip_sync"] if "lip_sync" in metrics else metrics["mouth_own"]
    off = {name: math.log(max(metrics[name].mean().item(), 1e-6)) for name in ("amplitude", "motion", "head")}
    return mouth.mean().item() - 0.1 * (abs(off["amplitude"]) + abs(off["motion"])) - 0.05 * max(off["head"], 0)


def measure(arms: dict[str, dict[str, Tensor]], clips: list[Clip], args: argparse.Namespace,
            log: "Log") -> dict[str, Tensor]:
    """Measure every arm's weights on the same held-out clips from the same noise; print means and paired differences.

    held_out.json keeps the value of every clip. Returns: the videos of each arm, (B, F, 3, S, S), by the ODE.
    """
    values, shown = {}, {}
    for sampler in ("ode", args.sampler) if len(arms) > 1 else ("ode",):
        made = {}
        for name, weights in arms.items():
            made[name], videos = validate(loaded(weights, args), clips, args, noisy=sampler != "ode")
            if sampler == "ode":
                shown[name] = videos
            print(f"{len(clips)} held-out clips, generated from portrait and sound, {name}, {sampler}:\n"
                  f"{summary(made[name])}")
            together = {}
            if measuring_sync(args):
                together["mouth_distance"] = mouth_distance(videos, clips, args)
                print(f"  all clips together   Frechet distance of mouths {together['mouth_distance']:.3f}")
            log(arm=name, sampler=sampler, held_out=means(made[name]), **together)
        for title, difference in paired(made).items():
            print(f"{title}, clip by clip, {sampler}:\n{summary(difference)}")
        values[sampler] = {name: {k: v.tolist() for k, v in metrics.items()} for name, metrics in made.items()}
    with replacing(args.out / "held_out.json") as path:
        path.write_text(plain_json(values))
    return shown


def means(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(values.mean().item(), 5) for name, values in metrics.items()}


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


def plain_json(entry: dict) -> str:
    """Write JSON as everyone reads it: null for what is no number."""
    return json.dumps(json.loads(json.dumps(entry), parse_constant=lambda name: None))


class Log:
    """One line of JSON per event in RUN/log.jsonl; a resumed run drops the steps and updates that it will repeat."""

    def __init__(self, folder: Path, start: float):
        self.path, self.start = folder / "log.jsonl", start

    def rewind(self, stage: Stage) -> None:
        """Drop what will be logged again: what a stage did after its checkpoint, and lines that were cut short."""
        if rank():
            return
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            with suppress(ValueError):               # the last line, cut short by a full disk or a power cut
                entry = json.loads(line)
                again = entry.get("stage") == stage.name and (
                    entry[stage.unit] > stage.step or "watched" in entry and entry[stage.unit] == stage.step
                    and stage.looks <= stage.args.looks * stage.progress + 1e-9)
                kept += [line] * (not again)
        with replacing(self.path) as path:
            path.write_text("".join(line + "\n" for line in kept))

    def __call__(self, **entry) -> None:
        if rank():
            return
        with writing(self.path), open(self.path, "a") as file:
            file.write(plain_json({"seconds": round(time.perf_counter() - self.start, 2), **entry}) + "\n")


# ---------------------------------------------------------------- command line

def pretraining_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of a run, of its data and of pretraining."""
    g = p.add_argument_group("run")
    g.add_argument("--preset", choices=PRESETS, default="tiny", help="generator and training defaults (%(default)s)")
    g.add_argument("--out", type=Path, help="folder of the run (runs/PRESET)")
    g.add_argument("--overwrite", action="store_true", help="begin anew where --out holds a run")
    g.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    g.add_argument("--device", type=device_argument, default=device_argument(), help="cpu or cuda (%(default)s)")
    g.add_argument("--compile", action="store_true", help="torch.compile the generator: slow to start, faster steps")
    g.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="keep the inputs of blocks alone for "
                   "the backward pass and compute the rest again: less memory, slower steps (by preset)")
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="DIR", help="a folder of video clips; without it, synthetic talkers")
    g.add_argument("--crop", type=crop_argument, help="x,y,size in pixels of the clips; without it, the centre square")
    g.add_argument("--clips", type=int, help="how many synthetic talkers to train on (by preset)")
    g.add_argument("--world", choices=("found", "flawless"), default="found", help="synthetic talkers to train on: as "
                   "recordings are found, with their faults, or flawless (%(default)s)")
    g.add_argument("--seconds", type=float, help="length of a training clip (2, with --data 3)")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int, help="training steps (by preset)")
    g.add_argument("--batch", type=int, help="clips per step (by preset)")
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
    flag("--curate", type=float, default=0.15, metavar="SHARE", help="of the training clips, the highest rated, to "
         "fine-tune on before; 0 leaves it out (%(default)s)")
    flag("--curate-steps", type=int, help="of fine-tuning (by preset)")
    flag("--exemplars", metavar="DIR", help="a folder of clips that say how much and how smoothly things "
         "should move (the training clips that the judge picks)")
    flag("--updates", type=int, help="of post-training; 0 leaves it out (by preset)")
    flag("--prompts", type=int, help="portraits and speeches per update (by preset)")
    flag("--parts", type=int, default=2, help="gradient steps per update, each on a part of its rollouts; with one the "
         "clip is never met (%(default)s)")
    flag("--micro-batch", type=int, help="rollouts per backward pass (by preset)")
    flag("--post-lr", type=float, default=6e-4, help="of AdamW, which falls to zero by the last update (%(default)s)")
    flag("--post-ema", type=float, default=0.95, help="decay of the moving average of the policy (%(default)s)")
    flag("--looks", type=int, default=4, help="at the watched clips, in each stage after pretraining (%(default)s)")
    flag("--watch-clips", type=int, default=48, help="held-out clips that choose the checkpoint (%(default)s)")
    g.add_argument("--control", action="store_true", help="spend its CPU time otherwise too, and compare")
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


def run_flags() -> argparse.ArgumentParser:
    """Make the flags that name a run of before, whose own flags all others are then compared with."""
    p = argparse.ArgumentParser(add_help=False)
    g = p.add_argument_group("a run of before")
    g.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run, or, with more --steps, "
                   "--curate-steps or --updates, with a finished one; its other flags stay, but where things moved")
    g.add_argument("--pretrained", type=Path, metavar="RUN", help="curate and post-train a run anew, with these "
                   "flags and its other ones, into --out; with --data, first train it for --steps on those clips")
    g.add_argument("--refit-codec", action="store_true", help="to those clips (it stays as it is)")
    return p


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags; those of a run of before stand where none is given."""
    runs = run_flags()
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[runs])
    pretraining_flags(p)
    of_post_training = post_training_flags(p)
    g = p.add_argument_group("validation and checkpoints")
    g.add_argument("--validate-clips", type=int, default=48, help="held-out clips to generate (%(default)s)")
    g.add_argument("--sampling-steps", type=int, default=SAMPLING_STEPS,
                   help="flow steps per chunk when generating (%(default)s)")
    g.add_argument("--save-minutes", type=float, default=2.0, help="between checkpoints (%(default)s)")
    g.add_argument("--sync", metavar="DIR", help="a sync network for these clips, from extras.school sync, or "
                   "none (the one for drawn talkers; with --data none)")
    of_reward = reward_flags(p)
    generator_flags(p)
    before = runs.parse_known_args(argv)[0]
    saved = saved_flags(p, before.resume or before.pretrained)
    if before.pretrained:
        anew = {"control", "sync", *of_post_training, *of_reward} - LOADS
        saved = {name: value for name, value in saved.items() if name not in anew}
    args = p.parse_args(argv, argparse.Namespace(**saved))       # where it has a value, no default is taken
    args.command = sys.argv[1:] if argv is None else list(argv)
    for name in LOCAL:
        setattr(args, name, local_name(getattr(args, name)))
    if before.resume or before.pretrained:
        compare(p, args, saved)
    return complete(p, args)


def saved_flags(p: argparse.ArgumentParser, run: Path | None) -> dict:
    """Read the flags of a run of before, those of its generator too."""
    if run is None:
        return {}
    if not (run / "config.json").exists():
        p.error(f"{run} holds no run; one that stopped before its first checkpoint starts anew, "
                "without --resume")
    try:
        kept = json.loads((run / "config.json").read_text())
        return kept["training"] | kept["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        p.error(f"{run} is not a run of this version ({error}); name the folder that train.py wrote")


def compare(p: argparse.ArgumentParser, args: argparse.Namespace, saved: dict) -> None:
    """End with one clear line where a flag differs that a run of before has settled."""
    changed = {name for name, value in saved.items() if json.loads(json.dumps(getattr(args, name))) != value}
    shape, what = {f.name for f in fields(Config)} - {"audio_encoder"}, "--resume"
    if args.resume:
        if args.pretrained or args.out not in (None, args.resume):
            p.error("--resume goes on in the folder of the run; leave out --out and --pretrained")
        had_none = {name for name in ("data", "audio_encoder", "init_from") if not saved.get(name)}
        args.out, fixed = args.resume, changed - LOADS - (PLACES - had_none) - GROW
        for name in changed & GROW:
            if getattr(args, name) < saved[name]:
                p.error(f"--{name.replace('_', '-')} {getattr(args, name)} is less than the run's {saved[name]}, "
                        "and what is learned stays learned; give more")
        if "judge" in changed and "judge_url" not in changed:
            args.judge_url = None                                # the one that was named last
    else:
        if args.out is None or args.out.resolve() == args.pretrained.resolve():
            p.error("--pretrained wants an --out of its own")
        what = "--pretrained"
        fixed = changed & shape if "data" in changed else changed - LOADS - {"audio_encoder"}
    if fixed:
        p.error(f"{what} goes on with the flags the run had; leave out --{min(fixed).replace('_', '-')}")
    args.further = bool(args.pretrained and "data" in changed)
    if args.refit_codec and not args.further:
        p.error("--refit-codec is for --pretrained RUN --data OTHER")


def complete(p: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Fill what was not given from the preset, which explicit flags win over."""
    given = {f.name: vars(args).pop(f.name, None) for f in fields(Config)}
    given = {k: v for k, v in given.items() if v is not None}
    if args.init_from and not (args.resume or args.pretrained):
        shape = trunk_shape(args.init_from)
        for name in sorted(shape.keys() & given):
            p.error(f"--init-from fixes --{name.replace('_', '-')}; leave it out")
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
    if args.seconds is None:
        args.seconds = 3.0 if args.data else 2.0
    check(p, args)
    args.frames = round(args.seconds * FPS) // args.config.chunk_frames * args.config.chunk_frames
    return args


def local_name(name: str | None) -> str | None:
    """Make the name of a file or folder whole, so that it is found from anywhere; leave other names as they are."""
    local = name not in (None, "none", "default") and Path(name).exists()
    return str(Path(name).absolute()) if local else name


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one clear line where a flag cannot be used."""
    if args.out.exists() and not args.out.is_dir():
        p.error(f"--out {args.out} is a file; name a folder")
    elif args.out.is_dir() and [*args.out.glob("[!.]*")] and not (args.out / "log.jsonl").exists():
        p.error(f"--out {args.out} holds files, none of them a run's log.jsonl; name a folder of the run's own")
    if args.data and not Path(args.data).is_dir():
        p.error(f"{args.data} is not a folder; say where the clips are with --data")
    if args.crop and not args.data:
        p.error("--crop is of the clips of --data; drawn talkers need none")
    check_numbers(p, args, seed=0, steps=1, batch=1, clips=1, warmup=1, validate_clips=1,
                  sampling_steps=1, save_minutes=0, lr=0, curate=0, curate_steps=1, muon_lr=0, grad_clip=1e-9, audio_dropout=0,
                  context_noise=0, ema=0, updates=0, prompts=1, parts=1, micro_batch=1, post_lr=0, post_ema=0,
                  looks=1, watch_clips=1,
                  **{f.name: 0 for f in fields(grpo.Settings) if f.type in (int, float)})
    for name in ("ema", "audio_dropout", "post_ema", "curate"):
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


def flags(args: argparse.Namespace) -> dict:
    """The flags that define a run, as config.json keeps them beside the generator's Config."""
    return {name: value for name, value in vars(args).items() if name not in SESSION}


# ---------------------------------------------------------------- the run

def begin_pretraining(args: argparse.Namespace, clips: list[Clip], log: "Log") -> FlowMatching:
    """Make a new run with its codec fitted, or go on with one of before. Its data are set by the caller."""
    torch.manual_seed(args.seed)
    stage = FlowMatching("pretraining", None, args, args.steps)
    if args.resume:
        stage.load(args.out / "state.pt")
        log.rewind(stage)
        return stage
    if not rank():                                                  # nothing of an earlier run here may stay
        for stale in (*CHECKPOINTS.values(), "config.json", "log.jsonl"):
            (args.out / stale).unlink(missing_ok=True)
        shutil.rmtree(args.out / "control", ignore_errors=True)
    if args.pretrained:
        stage.load(args.pretrained / "state.pt", anew=args.further)
    elif args.init_from:
        load_trunk(stage.model, args.init_from)
    if args.refit_codec or not args.pretrained:
        if not rank():
            fit_codec(stage.model, clips, args)
        codec = stage.model.codec
        codec.load_state_dict(all_gather({k: v.cpu() for k, v in codec.state_dict().items()})[0])
        stage.average = snapshot(stage.model.state_dict())
    if args.pretrained:                                        # minutes of work that --resume shall not repeat
        stage.save(args.out)
    return stage


def curate(args: argparse.Namespace, start: dict[str, Tensor], data: Latents, picks: Picks,
           watched: list[Clip], log: "Log") -> FlowMatching:
    """Fine-tune the pretrained generator on the clips that were picked."""
    stage = FlowMatching("curation", data[picks.curated], args, args.curate_steps, first=args.steps)
    stage.recipe = {"picked": picks.curated.tolist(), "start": fingerprint(start)}
    if not (stage.continues(args.out) or args.pretrained and stage.continues(args.pretrained)):
        stage.load(args.out / "state.pt", anew=True)
        stage.cpu_seconds = picks.cpu_seconds
    carry_out(stage, watched, log)
    return stage


def post_train(args: argparse.Namespace, start: dict[str, Tensor], reward: Reward, data: Latents, clips: list[Clip],
               watched: list[Clip], log: "Log", name: str = "post-training") -> PostTraining:
    """Reinforce a generator by the reward."""
    stage = PostTraining(name, loaded(start, args), reward, data, clips, args)
    stage.recipe = {"start": fingerprint(start)}
    stage.continues(args.out)
    carry_out(stage, watched, log)
    return stage


def control_arms(args: argparse.Namespace, arms: dict[str, dict], spent: float, reward: Reward, data: Latents,
                 clips: list[Clip], picks: Picks, watched: list[Clip], log: "Log") -> dict[str, dict[str, Tensor]]:
    """Spend the CPU time of post-training otherwise, from the same starts. Returns: arm -> weights.

    More curation goes on from the curated generator, for as long as its post-training took. GRPO without curation
    starts from the pretrained one, and more pretraining takes as long as that.
    """
    def longer(name: str, start: str, rows: Tensor | slice, first: int, seconds: float) -> Stage:
        stage = FlowMatching(name, data[rows], args, budget=seconds, first=first)
        stage.recipe = {"start": fingerprint(arms[start]), "budget": seconds}
        if not stage.continues(args.out):
            stage.load(args.out / ("curate.pt" if start == CURATED else "state.pt"), anew=True)
        carry_out(stage, watched, log)
        return stage

    stages = []
    if CURATED in arms:
        stages = [longer(MORE_CURATION, CURATED, picks.curated, args.steps + args.curate_steps, spent),
                  post_train(args, arms[PRETRAINED], reward, data, clips, watched, log, UNCURATED)]
        spent = stages[-1].cpu_seconds
    stages += [longer(MORE_PRETRAINING, PRETRAINED, slice(None), args.steps, spent)]
    return {stage.name: stage.kept for stage in stages}


def describe(stage: FlowMatching, held_out: list[Clip], log: "Log") -> None:
    """Say what is about to be trained, and what the codec alone can reach."""
    args, model = stage.args, stage.model
    coded = encode(model, held_out, args.frames, args.device)                        # nothing generated can be better
    videos = [model.codec.decode(p[None].to(args.device) / 255, z[None].to(args.device)).cpu()
              for p, z in zip(coded.portrait, coded.clean)]
    codec = held_out_metrics(torch.cat(videos), held_out, args)
    parameters = sum(p.numel() for p in model.parameters())
    log(config=asdict(args.config), seed=args.seed, parameters=parameters, codec=means(codec),
        command=shlex.join(["python", "train.py", *args.command]), hardware=hardware(args.device, world()))
    print(f"codec alone, {len(held_out)} held-out clips:\n{summary(codec)}\n"
          f"{len(stage.data)} training clips of {args.frames} frames; generator of {parameters / 1e6:.2f} M parameters "
          f"on {args.device}; ready after {time.perf_counter() - log.start:.0f} s")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: tensors of the same sizes come again every step, and fetching their pages from the
    system anew took a quarter of the reward's CPU time."""
    with suppress(OSError, AttributeError):                          # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option in (-3, -1):                                      # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 2 ** 31 - 1)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until the block or the process ends, by kill -9 too: the lock is the system's."""
    if rank():
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in folder.glob(".*.[0-9]*"):        # half-written by a run that was killed, see `replacing`
            left.unlink()
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
    """End at Ctrl-C or SIGTERM, or where the judge is away, with a line that says how to go on: from a checkpoint, if
    this run has left one."""
    began, state = time.time() - (time.perf_counter() - start), args.out / "state.pt"
    try:
        with signals(signal.default_int_handler):
            yield
    except (JudgeError, KeyboardInterrupt) as error:
        said = f"error: {error}; then" if isinstance(error, JudgeError) else "stopped;"
        kept = args.resume or state.exists() and state.stat().st_mtime >= began
        sys.exit(f"{said} go on with: {go_on(args)}" if kept else
                 f"{said} start it again: it was before the first checkpoint, so nothing was kept")


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    keep_freed_memory()
    join_processes()
    with redirect_stderr(sys.stdout if rank() else sys.stderr):         # one of them may complain of flags
        args = parse_arguments(argv)
    with lock(args.out), interruptible(args, start):
        run(args, start)


def run(args: argparse.Namespace, start: float) -> None:
    """Do all that the flags ask for, from data to report."""
    if (args.out / "config.json").exists() and not (args.resume or args.overwrite):
        raise MediaError(args.out, f"holds a run; go on with --resume {shlex.quote(str(args.out))}, choose "
                                   "another --out, or begin anew there with --overwrite")
    with rank_zero_first():
        clips, held_out, watched = load_clips(args)
    measuring_sync(args), reward_sync(args)                    # all this before the minutes that would be lost
    judge, log = make_judge(args) if args.curate or args.updates else None, Log(args.out, start)
    pretraining = begin_pretraining(args, clips, log)
    pretraining.data = data = encode(pretraining.model, clips, args.frames, args.device)
    if not rank():
        describe(pretraining, held_out, log)
    with rank_zero_first():
        picks = pick_clips(judge, clips, args, log) if args.curate or args.updates else None
    if picks and args.exemplars:
        parts = folder_clips(args.exemplars, args.config.size, args.seconds, args.crop)
        picks.lively = picks.smooth = spread([clip for part in parts for clip in part], EXEMPLARS)

    resume, anew = (shlex.join([flag, str(args.out)]) for flag in ("--resume", "--pretrained"))
    with fitting("pretraining", "lower --batch, or give --checkpointing"):
        arms = {PRETRAINED: carry_out(pretraining, [], log)}
        if picks and len(picks.curated):
            keep_arm(args, PRETRAINED, arms)
            arms[CURATED] = curate(args, arms[PRETRAINED], data, picks, watched, log).kept
    reward = None
    if args.updates:
        *_, (last, weights) = arms.items()
        keep_arm(args, last, arms)
        reward = make_reward(args, judge, picks.lively, picks.smooth, args.config.chunk_frames,
                             pretraining.model.codec)
        with fitting("post-training",
                     f"lower --micro-batch, with {resume}; or --prompts or --group, with {anew}"):
            post = post_train(args, weights, reward, data, clips, watched, log)
            arms[POST_TRAINED] = post.kept
            if args.control:
                arms |= control_arms(args, arms, post.cpu_seconds, reward, data, clips, picks, watched, log)
    if rank():
        return
    with fitting("measuring", f"lower --validate-clips, with {resume}"):
        videos = measure(arms, held_out, args, log)
    write_pictures(args.out, list(videos.values()), held_out)
    if reward:
        log(rewarded=(said := rewarded(reward, videos, held_out)))
        print(said)
    write_report(args.out)
    tried = shlex.join(["python", "sample.py", "--checkpoint", f"{args.out}", "--image", f"{args.out}/portrait.png",
                        "--audio", f"{args.out}/speech.wav", "--out", "video.mp4"])
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes in all\nto try next:\n  {tried}\n"
          f"{args.out}/report.md: metrics and curves; sheet.png (truth above {', '.join(arms)}), "
          "sample.mp4 (truth beside them), log.jsonl")


def keep_arm(args: argparse.Namespace, name: str, arms: dict[str, dict[str, Tensor]]) -> None:
    """Write an arm's weights to a folder of their own, for sample.py: the run's folder holds the last stage's."""
    if not rank():
        save_generator(loaded(arms[name], args), args.out / name, training=flags(args))


if __name__ == "__main__":
    with one_line("stopped before anything was done", "choose a smaller --preset or --size, or fewer --clips"):
        main()
