"""Teach portraits to speak: pretrain on what is found, fine-tune on what the judge picks, reinforce by it.

    python train.py                                    drawn talkers as found, two CPU cores, minutes
    python train.py --data me.mp4 --out runs/me        your own video, or a folder of videos
    python train.py --resume runs/tiny                 go on where a run stopped, or, with --steps, further
    python train.py --control                          and what post-training's time would buy otherwise
    python train.py --pretrained runs/tiny --out runs/other     curate and post-train a finished run anew
    python train.py --pretrained runs/tiny --data my_clips --out runs/mine     train it first on other clips
    torchrun --nproc_per_node=2 train.py               the same on two GPUs, or on two processes of a CPU

1. Pretraining by flow matching on all clips. Each chunk of a clip is noised to a level of its own,

       x_sigma = (1 - sigma) * clean + sigma * noise,      sigma ~ max(U(0, 1), 0.02) per chunk

   and the generator, which sees the portrait, the sound and the past of each chunk (with noise, as its own
   past will have errors), learns the velocity

       loss = w(sigma) * |predicted velocity - (noise - clean)|^2,      w = min(sigma / 0.2, 1)^2.

   The weight tames the division by sigma near the clean end, where the network predicts the clean latent.
   The generator learns what it is shown: late lips, mumbling mouths, trembling cameras.
2. Curation. The sound of every clip is put in time by what a sync network measures (of footage, before 1),
   the judge rates the clip, and training goes on with the same loss on those that it rates highest. What is
   fine-tuned on these can only become as good as they are.
3. Post-training by GRPO (grpo.py explains it). Groups of videos of training prompts are generated and scored
   by the reward (reward.py), and their draws are made more likely or less. This can go beyond the best clips.

Every stage after pretraining looks at watched clips on the way, and keeps the moving average of the weights
that did best on them; where few are watched, flow matching keeps its last. Other clips are reported.
`--control` adds three arms, models that are reported beside the stages: more curation for the CPU time of
post-training; GRPO without curation, as many updates; more pretraining for the CPU time of that.

All random numbers of a step come from a generator keyed by (seed, step), so a resumed run repeats an unbroken
one (but for controls that end by CPU time). What stands beside the method is in extras: flags.py,
session.py (a stage's loop, log, checkpoints, Ctrl-C), processes.py (torchrun), muon.py (an optimizer),
measuring.py and report.py.

Shapes: B batch, K chunks, T frames per chunk, F = K T frames, N tokens, C channels, S pixels per side.
"""

import argparse
import copy
import math
import shlex
import sys
import time
from collections import deque
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import grpo
from data import Clip, Clips, cached, pixels, sounds
from extras.files import MediaError, fitting, one_line
from extras.media import FPS
from extras.flags import parse_arguments
from extras.footage import footage_clips, learn, put_in_time
from extras.measuring import HELD_OUT_SEED, conclude, describe, held_out_score, loaded, validate
from extras.muon import Muon
from extras.pretrained import load_trunk
from extras.processes import (all_gather, by_noise_level, ddp, gather_groups, join_processes,
                              keep_freed_memory, rank, rank_zero_first, shard, summed_up, world)
from extras.report import (CURATED, MORE_CURATION, MORE_PRETRAINING, POST_TRAINED, PRETRAINED, UNCURATED,
                           funnel)
from extras.reward_flags import (calibration, later_stages, make_judge, make_reward, measuring_sync,
                                 reward_sync)
from extras.session import (Log, at_once, carry_out, check_program, clear, continues, fingerprint,
                            keep_arm, load, lock, resumable, save)
from extras.talkers import faults_of, synthetic_clips
from model import Generator, load_generator
from reward import ASPECTS, NO_JUDGE, JudgeError, Reward, Scores, rate_whole
from sample import hear_all, seeded_rng, sync_metrics

WATCHED = 100_000                  # the first of the talkers that are watched, beyond any that are reported
CODEC_CLIPS = 256                  # enough to fit the codec's components
EXEMPLARS = 64                     # clips that say what is normal: enough for means, few enough to be good
RATED_AT_ONCE = 32                 # clips: a judge that rates none of so many is no judge
AUDIO_DROPOUT = 0.1                # share of clips without sound, which guidance compares with
GRAD_CLIP = 1.0                    # largest norm of a gradient
POST_WARMUP = 10                   # updates: Adam's first steps, of few gradients, would be its largest
POST_EMA = 0.95                    # of the policy's moving average
UNCURATED_LR = 8e-4                # of GRPO without curation
POST_STREAM = 500_000              # where the random numbers of updates begin, beyond any training step's
ENOUGH_WATCHED = 24                # clips: by nine, the start was chosen over a curation that was better
UNRATED_OVER, MOST_UNRATED = 10, 0.1      # the run stops where, over so many updates, this share is unrated


# ---------------------------------------------------------------- data

@dataclass
class Latents:
    """A set of clips as the trainer sees it, all in memory: pixels appear only in the portraits."""

    portrait: Tensor               # (B, 3, S, S) uint8
    mel: Tensor                    # (B, F, mel_channels) of log_mel, or of a speech encoder
    clean: Tensor                  # (B, K, N, C)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows) -> "Latents":
        return Latents(self.portrait[rows], self.mel[rows], self.clean[rows])


def load_clips(args: argparse.Namespace, watch: int = 0) -> tuple[Clips, list[Clip], list[Clip]]:
    """Return the clips to train on, to report on, and to watch on the way, each `args.frames` long or longer.

    The watched clips choose the checkpoints, so the reported ones may not be among them.
    """
    size, seed = args.config.size, HELD_OUT_SEED + args.seed
    if args.data:
        train, held_out = args.footage.clips if args.footage else footage_clips(args.data, args)
    else:
        train = synthetic_clips(args.clips, size, args.seconds, args.seed, world=args.world)
        held_out = list(synthetic_clips(args.validate_clips, size, args.seconds, seed))
        if watch:
            held_out += synthetic_clips(watch, size, args.seconds, seed, first=WATCHED)
    if not (train and held_out):
        raise MediaError(args.data or "--clips",
                         f"has too few clips of {args.frames / FPS:.2f} s, {len(train)} to train on, "
                         f"{len(held_out)} held out; add files or lower --seconds")
    watch = min(watch, len(held_out) // 2) if args.data else watch       # a folder has what it has
    reported = held_out[: len(held_out) - watch]
    return train, reported[: args.validate_clips], held_out[len(reported):]


def spread(clips: list[Clip], most: int) -> list[Clip]:
    """Choose clips that are spread over a set."""
    return [clips[i] for i in np.linspace(0, len(clips) - 1, min(len(clips), most)).astype(int)]


def fit_codec(model: Generator, clips: list[Clip], args: argparse.Namespace) -> None:
    """Fit the motion codec to clips that are spread over the training set."""
    if len(clips) * args.frames < args.config.space_channels:
        raise MediaError(args.data or "--clips", f"{len(clips)} clips are too few to fit the codec; add some")
    model.codec.fit(pixels(spread(clips, CODEC_CLIPS), args.frames).to(args.device))
    if not model.codec.scale.min() > 0:
        raise MediaError(args.data or "--clips", "shows nothing that moves; add videos of people who speak")


def encode(model: Generator, clips: list[Clip], frames: int, device: str) -> Latents:
    """Encode clips once, so that a training step never touches a pixel."""
    latents, batch = [], 16
    for i in tqdm(range(0, len(clips), batch), "encoding", leave=False):
        latents.append(model.codec.encode(pixels(clips[i:i + batch], frames).to(device)).cpu())
    portrait = torch.stack([clip.frames[0].clone() for clip in clips])      # a view would hold its file's map
    return Latents(portrait, hear_all(model, clips, frames), torch.cat(latents))


# ---------------------------------------------------------------- what the judge picks

@dataclass
class Picks:
    """Which of the training clips are good."""

    curated: Tensor                # (n,) rows to fine-tune on; empty where nothing can rank the clips
    exemplars: list[Clip]          # of smooth motion, for the reward
    ratings: Tensor | None = None  # (B, 3) of all training clips, by the judge
    cpu_seconds: float = 0.0       # that measuring and rating took


def rate_clips(judge, clips: Clips, args: argparse.Namespace) -> tuple[Tensor, float]:
    """Ask for ratings (B, 3) of all training clips, NaN where there is none. Each group is kept on disk.

    A judge that rates none of a group raises JudgeError. So groups are spread over the set: neighbours may be
    parts of one video that nobody could rate. Returns: ratings, and the CPU time that they took.
    """
    def rate(rows: range, to: Path) -> None:
        start, some = time.process_time(), [clips[row] for row in rows]
        scores = rate_whole(judge, pixels(some, args.frames), sounds(some, args.frames),
                            [clip.name for clip in some])
        np.save(to / "ratings.npy", scores.numpy())
        (to / "cpu_seconds").write_text(f"{time.process_time() - start}")

    groups, judged = math.ceil(len(clips) / RATED_AT_ONCE), judge.fingerprint
    ratings, spent = torch.empty(len(clips), len(ASPECTS)), 0.0
    for i in tqdm(range(groups), "rating", leave=False):
        rows = range(i, len(clips), groups)
        recipe = {"clips": clips.folder.name, "rows": [clips.rows[row] for row in rows],
                  "frames": args.frames, "late": [clips.late(row) for row in rows], "judge": judged}
        kept = cached(recipe, partial(rate, rows))
        ratings[i::groups] = torch.from_numpy(np.load(kept / "ratings.npy"))
        if missing := int(ratings[i::groups].isnan().any(1).sum()):
            print(f"note: {missing} of {len(rows)} clips are unrated; to ask again, delete {kept}")
        spent += float((kept / "cpu_seconds").read_text())
    if not ratings.isfinite().all(1).any():
        raise JudgeError("the judge", f"rates none of the {len(clips)} training clips; {NO_JUDGE}")
    return ratings, spent


def pick_clips(judge, clips: Clips, args: argparse.Namespace) -> Picks:
    """Rank the training clips by the judge, or else by the reward's sync network, and choose the best.

    Curated is the share with the highest sum of ratings. Exemplars are those whose motion is rated highest:
    by the sum they would tremble as all clips do. With neither a judge nor a network, nothing is curated.
    """
    if judge is not None:
        ratings, spent = rate_clips(judge, clips, args)
    elif (sync := reward_sync(args)) is not None:
        start = time.process_time()
        measured = [sync_metrics(sync, pixels([clip], args.frames), sounds([clip], args.frames))
                    for clip in tqdm(clips, "rating", leave=False)]
        ratings = torch.stack([m["sync_confidence"] for m in measured]).expand(-1, len(ASPECTS))
        spent = time.process_time() - start
    else:
        return Picks(torch.empty(0, dtype=torch.long), spread(clips, EXEMPLARS))

    def best(values: Tensor, n: int) -> Tensor:
        order = values.nan_to_num(-math.inf).argsort(descending=True, stable=True)[:n]
        return order[values[order].isfinite()]

    curated = best(ratings.sum(1), round(args.curate * len(clips)))
    print(f"{len(curated)} of {len(clips)} training clips are picked")
    exemplars = [clips[i] for i in best(ratings[:, ASPECTS.index("motion")], EXEMPLARS)]
    spent += getattr(args.footage, "cpu_seconds", 0.0)               # that its sync network took
    return Picks(curated, exemplars, None if judge is None else ratings, spent)


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

    Returns: portrait (B, 3, S, S) in [0, 1], mel (B, F, mel_channels), clean (B, 1, K, N, C),
    context (B, K, N, C), the past to show, noise (B, 1, K, N, C), sigma (B, 1, K), heard (B,).
    """
    device = args.device
    draw = dict(generator=seeded_rng(args.seed, step, device), device=device)
    rows = torch.randint(len(data), (args.batch,), **draw).cpu()
    clean = data.clean[rows].to(device)                                              # (B, K, N, C)
    sigma = torch.rand(clean.shape[:2], **draw).clamp_min(0.02)[:, None]
    noise = torch.randn(clean.shape, **draw)[:, None]
    heard = torch.rand(args.batch, **draw) >= AUDIO_DROPOUT
    # Noise on the past, from none to the deviation of the strongest window channel: generation's own past is
    # never perfect, and a trunk that trusts it copies and sharpens its own errors until, within seconds, the
    # face falls apart.
    slip = args.context_noise * torch.rand(args.batch, 1, 1, 1, **draw)
    # Each head moves half as another clip's: a hundred ways of swaying would be learned by heart, and all
    # videos of one speech be alike. The pose comes last; of two independent ones the variance stays.
    others = data.clean[torch.randint(len(data), (args.batch,), **draw).cpu(), :, -1].to(device)
    clean[:, :, -1] = (clean[:, :, -1] + others) / math.sqrt(2)
    context = clean + slip * torch.randn(clean.shape, **draw)
    portrait, mel = data.portrait[rows].to(device) / 255, data.mel[rows].to(device)
    return tuple(x[shard()] for x in (portrait, mel, clean[:, None], context, noise, sigma, heard))


def optimizers(model: Generator, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the trunk (Jordan et al., 2024), AdamW for the rest, as nanochat has it."""
    trunk = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and "modulation" not in name]
    inside = {id(p) for p in trunk}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [Muon(trunk, lr=args.muon_lr, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01,
                              fused=args.device.startswith("cuda"))]


# ---------------------------------------------------------------- stages

def snapshot(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in weights.items()}


class Stage:
    """Weights that change step by step, their moving average, and the average to keep: the best of those that
    the watched clips were looked at with. Where few are watched, flow matching, which does not overshoot,
    keeps the last.

    A stage ends after `total` steps or, if it has a budget, when it has spent these seconds of CPU time.
    """

    unit, overshoots = "step", False

    def __init__(self, name: str, model: Generator, args: argparse.Namespace, total: int = 0,
                 budget: float = 0.0):
        self.name, self.model, self.args, self.total, self.budget = name, model, args, total, budget
        model.checkpointing = args.checkpointing
        self.optimizers: list[torch.optim.Optimizer] = []
        self.step, self.looks, self.cpu_seconds = 0, 0, 0.0
        self.recipe = {}               # what else must agree where the stage goes on from a checkpoint
        self.restart()

    def restart(self) -> None:
        """Begin the moving average at the model's weights; nothing is best yet."""
        self.average = snapshot(self.model.state_dict())
        self.best = {"step": 0, "score": -math.inf, "weights": self.average}

    @property
    def progress(self) -> float:
        """How much of the stage is done, 0..1."""
        return self.step / self.total if self.total else min(self.cpu_seconds / self.budget, 1.0)

    @property
    def look_is_due(self) -> bool:
        """Looks are spread evenly over the stage, the first one before the first step."""
        return self.looks <= self.args.looks * self.progress + 1e-9

    @property
    def kept(self) -> dict[str, Tensor]:
        """The weights to go on with: the best that was looked at; without looks the moving average."""
        return self.best["weights"] if self.looks else self.average

    def advance(self) -> dict:
        """Take a step and charge its CPU time. Returns: what to log.

        Raises: JudgeError or KeyboardInterrupt before anything has changed; MediaError where the loss is nan.
        """
        start = time.process_time()
        entry = self.take_step()
        self.cpu_seconds = all_gather(self.cpu_seconds + time.process_time() - start)[0]
        return entry

    def blend(self, decay: float) -> None:
        """Move the average towards the weights; its memory is short at first."""
        weights, decay = self.model.state_dict(), min(decay, self.step / (self.step + 10))
        floats = [k for k, v in weights.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in floats], [weights[k] for k in floats], 1 - decay)

    def look(self, watched: list[Clip]) -> dict[str, Tensor]:
        """Measure the moving average on the watched clips, always from the same noise, and choose."""
        with at_once():
            metrics = None if rank() else validate(loaded(self.average, self.args), watched, self.args)[0]
        metrics = all_gather(metrics)[0]
        score = held_out_score(metrics)
        self.looks += 1
        if score > self.best["score"] or len(watched) < ENOUGH_WATCHED and not self.overshoots:
            self.best = {"step": self.step, "score": score, "weights": snapshot(self.average)}
        return metrics


class FlowMatching(Stage):
    """Learning by flow matching, on all clips or the curated ones. first: where its random numbers begin."""

    def __init__(self, name: str, data: Latents, args: argparse.Namespace, total: int = 0,
                 budget: float = 0.0, first: int = 0):
        super().__init__(name, Generator(args.config).to(args.device), args, total, budget)
        self.data, self.first = data, first
        self.optimizers = optimizers(self.model, args)
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.trained = ddp(self.model)

    def take_step(self) -> dict:
        factor = min((self.step + 1) / self.args.warmup, 1 - self.progress)      # warm up, then decay to zero
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = factor * rate
            optimizer.zero_grad()
        batch = draw_batch(self.data, self.args, self.first + self.step)
        error, sigma = flow_matching_loss(self.trained, batch)
        loss = error.mean()
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self.blend(self.args.ema)
        loss = sum(all_gather(loss.item())) / world()
        if not math.isfinite(loss):
            raise MediaError(self.args.out, f"the loss is {loss} at step {self.step}; lower --lr, --muon-lr")
        return {"loss": loss, "grad_norm": norm.item(), "lr_factor": factor,
                "loss_by_sigma": by_noise_level(error, sigma)}


class PostTraining(Stage):
    """Learning by GRPO. The policy starts at the reference and is held to it."""

    unit, overshoots = "update", True

    def __init__(self, name: str, reference: Generator, reward: Reward, data: Latents, clips: list[Clip],
                 args: argparse.Namespace):
        super().__init__(name, copy.deepcopy(reference), args, args.updates)
        self.reference = reference.requires_grad_(False)
        self.reward, self.data, self.clips = reward, data, clips
        self.settings, self.checked = args.settings, False
        self.trained = ddp(self.model, unused=True)
        weights = self.model.parameters()
        self.optimizers = [torch.optim.AdamW(weights, args.post_lr, betas=(0.9, 0.95), weight_decay=0)]
        self.unrated = deque(maxlen=UNRATED_OVER)        # videos without a rating, in each of these updates

    def take_step(self) -> dict:
        """One update of GRPO: roll out, score, compare, and take a gradient step on each part of rollouts.

        The first part is on-policy: ratios are 1, up to rounding. On later ones they are not: the clip works.
        """
        args, group, optimizer = self.args, self.settings.group, self.optimizers[0]
        clock = [time.perf_counter()]
        rng = seeded_rng(args.seed, POST_STREAM + self.step)
        rows = torch.randperm(len(self.data), generator=rng)[: args.prompts]
        steps = grpo.drawing_steps(self.settings, rng)
        prompts = self.data[rows]

        # Roll out: a group of videos of each prompt. Then score. Ctrl-C ends these at once.
        with at_once():
            rollout = grpo.roll_out(self.model, (prompts.portrait / 255).to(args.device),
                                    prompts.mel.to(args.device), self.settings, steps, rng, shard())
            if not self.checked:                                   # once a run
                grpo.check_rescoring(self.model, rollout, self.settings)
                self.checked = True
            clock.append(time.perf_counter())
            scores = self.score(rollout, [self.clips[i] for i in rows[shard()]])

        # Advantage: compare each video with its group, then keep the rows of this process.
        advantage, components = grpo.advantages(scores, self.reward.weights, self.settings,
                                                rollout.latents.shape[1], self.reward.floors)        # (B, K)
        self.count_unrated(components["total"]["unrated"], len(advantage))
        advantage = advantage.unflatten(0, (-1, group))[shard()].flatten(0, 1).to(args.device)
        clock.append(time.perf_counter())

        # Loss and step: one gradient step on each part of whole groups, a few rollouts at a time.
        optimizer.param_groups[0]["lr"] = args.post_lr * min((self.step + 1) / POST_WARMUP, 1 - self.progress)
        size, parts = math.ceil(len(rollout) / group / args.parts) * group, []
        for at in range(0, len(rollout), size):
            part, part_advantage, logs = rollout[at:at + size], advantage[at:at + size], []
            optimizer.zero_grad()
            for i in range(0, len(part), args.micro_batch):
                few, credit = part[i:i + args.micro_batch], part_advantage[i:i + args.micro_batch]
                loss, log = grpo.grpo_loss(self.trained, self.reference, few, credit, self.settings)
                (loss * len(few) / len(part)).backward()
                logs.append((log, len(few) / len(part) / world()))
            norm = clip_grad_norm_(self.model.parameters(), GRAD_CLIP)
            optimizer.step()
            parts.append(summed_up(logs) | {"grad_norm": norm.item()})
        self.step += 1
        self.blend(POST_EMA)
        clock.append(time.perf_counter())

        if not all(math.isfinite(part["loss"] + part["grad_norm"]) for part in parts):
            raise MediaError(args.out, f"the loss is no number at update {self.step}; lower --post-lr")
        seconds = [round(b - a, 3) for a, b in zip(clock, clock[1:])]
        return {"reward": scores.total.nanmean().item(), "components": components, "sigma": steps[0][0],
                "parts": parts, "seconds_for": dict(zip(("rollout", "reward", "update"), seconds))}

    @torch.no_grad()
    def score(self, rollout: grpo.Rollout, prompts: list[Clip]) -> Scores:
        """Judge a rollout of these prompts. Returns: the Scores of all processes' rollouts, in order."""
        group = self.settings.group
        audio = sounds(prompts, rollout.frames.shape[1]).repeat_interleave(group, 0)
        names = [f"{clip.name} rollout {i}" for clip in prompts for i in range(group)]
        scores = self.reward(rollout.frames, audio, rollout.portrait, names)
        components, per_chunk = ({name: gather_groups(values, group) for name, values in part.items()}
                                 for part in (scores.components, scores.per_chunk))
        return Scores(gather_groups(scores.total, group), components, per_chunk)

    def count_unrated(self, unrated: int, videos: int) -> None:
        """Raise JudgeError where the judge leaves too many videos unrated; single ones are only left out."""
        self.unrated.append(unrated)
        if sum(self.unrated) >= MOST_UNRATED * UNRATED_OVER * videos:
            raise JudgeError("the judge", f"left {sum(self.unrated)} videos unrated in {len(self.unrated)} "
                                          f"updates of {videos} videos; {NO_JUDGE}")


# ---------------------------------------------------------------- the three stages, and controls

@dataclass
class Run:
    """What the stages of a run share."""

    args: argparse.Namespace
    log: Log
    clips: Clips                   # to train on; drawn ones are put in time after pretraining
    watched: list[Clip]
    found: Latents                 # of these, as found
    data: Latents                  # of these, put in time
    picks: Picks | None = None
    reward: Reward | None = None


def begin_pretraining(args: argparse.Namespace, clips: list[Clip], log: Log) -> FlowMatching:
    """Make the stage of pretraining, with a new generator or a loaded one. The caller sets its data."""
    torch.manual_seed(args.seed)
    stage = FlowMatching("pretraining", None, args, args.steps)
    if args.resume:
        load(stage, args.out / "state.pt")
        log.rewind(stage)
    elif args.pretrained:
        if (args.pretrained / "state.pt").exists():
            load(stage, args.pretrained / "state.pt", anew=args.further)
        else:                                              # as published: weights alone
            stage.model.load_state_dict(load_generator(args.pretrained).state_dict())
            stage.restart()
            stage.step = 0 if args.further else args.steps
    elif args.init_from:
        load_trunk(stage.model, args.init_from)
    if not (args.resume or args.pretrained) or args.further:
        if not rank():
            fit_codec(stage.model, clips, args)
        codec = stage.model.codec
        codec.load_state_dict(all_gather({k: v.cpu() for k, v in codec.state_dict().items()})[0])
        stage.restart()
    return stage


def curate(run: Run, start: dict[str, Tensor]) -> FlowMatching:
    """Fine-tune the pretrained generator on the clips that were picked.

    It goes on from the raw weights and optimizers of state.pt. `start`, their moving average, only tells
    whether a checkpoint of curation went on from the same.
    """
    args, picked = run.args, run.picks.curated
    stage = FlowMatching("curation", run.data[picked], args, args.curate_steps, first=args.steps)
    stage.recipe = {"picked": picked.tolist(), "start": fingerprint(start)}
    if run.data is not run.found:
        stage.recipe["late"] = [run.clips.late(row) for row in picked]
    if not (continues(stage, args.out) or args.curates_alike and continues(stage, args.pretrained)):
        load(stage, args.out / "state.pt", anew=True)
        stage.cpu_seconds = run.picks.cpu_seconds
    carry_out(stage, run.watched, run.log)
    return stage


def post_train(run: Run, start: dict[str, Tensor], name: str = "post-training") -> PostTraining:
    """Reinforce a generator by the reward."""
    stage = PostTraining(name, loaded(start, run.args), run.reward, run.data, run.clips, run.args)
    stage.recipe = {"start": fingerprint(start)}
    continues(stage, run.args.out)
    carry_out(stage, run.watched, run.log)
    return stage


def control_arms(run: Run, arms: dict[str, dict], spent: float) -> dict[str, dict[str, Tensor]]:
    """Train the controls from the same starts. Returns: arm -> weights.

    More curation goes on from the curated generator, for as long as its post-training took. GRPO without
    curation starts from the pretrained one, and more pretraining takes as long as that.
    """
    args = run.args

    def longer(name: str, start: str, data: Latents, first: int, seconds: float) -> Stage:
        stage = FlowMatching(name, data, args, budget=seconds, first=first)
        stage.recipe = {"start": fingerprint(arms[start]), "budget": seconds}
        if not continues(stage, args.out):
            load(stage, args.out / ("curate.pt" if start == CURATED else "state.pt"), anew=True)
        carry_out(stage, run.watched, run.log)
        return stage

    # Without curation, videos from shared noise are equally late: there is nothing to compare. There is also
    # farther to go: at a rate of 6e-4 lip_correlation was only .38 after 75 updates.
    settings = replace(args.settings, group_noise="different")
    apart = argparse.Namespace(**vars(args) | {"settings": settings, "group_noise": "different",
                                               "post_lr": UNCURATED_LR})
    stages = []
    if CURATED in arms:
        picked = run.data[run.picks.curated]
        stages = [longer(MORE_CURATION, CURATED, picked, args.steps + args.curate_steps, spent),
                  post_train(replace(run, args=apart), arms[PRETRAINED], UNCURATED)]
        spent = stages[-1].cpu_seconds
    stages += [longer(MORE_PRETRAINING, PRETRAINED, run.found, args.steps, spent)]
    return {stage.name: stage.kept for stage in stages}


# ---------------------------------------------------------------- a run

def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    keep_freed_memory()
    join_processes()
    with redirect_stderr(sys.stdout if rank() else sys.stderr):         # errors of flags once
        args = parse_arguments(argv)
    with lock(args.out), resumable(args, start):
        train(args, start)


def train(args: argparse.Namespace, start: float) -> None:
    """Do all that the flags ask for, from data to report."""
    if (args.out / "config.json").exists() and not (args.resume or args.overwrite):
        raise MediaError(args.out, f"holds a run; go on with --resume {shlex.quote(str(args.out))}, choose "
                                   "another --out, or begin anew there with --overwrite")
    check_program(args)
    judge = make_judge(args) if args.curate or args.updates else None
    for needed in reward_sync, measuring_sync, calibration:
        needed(args)                                         # fail now, not after minutes of work
    with rank_zero_first():
        args.footage = learn(args)
    curates, reinforces = later_stages(args, judge)
    if reinforces:
        Reward(judge, None, args.weights, sync=reward_sync(args))        # refuses weights of nothing
    with rank_zero_first():
        clips, held_out, watched = load_clips(args, args.watch_clips if curates or reinforces else 0)
    if reinforces and len(clips) < args.prompts:
        raise MediaError(args.data or "--clips", f"{len(clips)} clips are too few; lower --prompts")
    log = Log(args.out, start, args.tensorboard)
    pretraining = begin_pretraining(args, clips, log)
    if not (args.resume or rank()):
        clear(args.out)                                      # not before: what fails above leaves the old run
    if args.pretrained:
        save(pretraining, args.out)
    pretraining.data = encode(pretraining.model, clips, args.frames, args.device)
    if not rank():
        describe(pretraining.model, clips, held_out, args, log)
    run = Run(args, log, clips, watched, pretraining.data, pretraining.data)
    if curates or reinforces:
        with rank_zero_first():
            run.clips, spent = put_in_time(clips, args)
            run.picks = pick_clips(judge, run.clips, args)
        run.picks.cpu_seconds += spent
        if run.clips is not clips:
            mel = hear_all(pretraining.model, run.clips, args.frames)
            run.data = replace(run.found, mel=mel)
        if run.picks.ratings is not None and not args.data and args.world == "found":
            log(funnel=funnel(faults_of(run.clips), run.picks.ratings, run.picks.curated))

    resume, anew = (shlex.join([flag, str(args.out)]) for flag in ("--resume", "--pretrained"))
    with fitting("pretraining", "lower --batch, or give --checkpointing"):
        stage = pretraining
        arms = {PRETRAINED: carry_out(stage, [], log)}           # an arm: weights that are reported
        if curates and len(run.picks.curated):
            keep_arm(loaded(arms[PRETRAINED], args), PRETRAINED, args)
            stage = curate(run, arms[PRETRAINED])
            arms[CURATED] = stage.kept
    if reinforces:
        last, weights = list(arms.items())[-1]
        keep_arm(loaded(weights, args), last, args)
        codec, picks = pretraining.model.codec, run.picks
        run.reward = make_reward(args, judge, picks.exemplars, args.config.chunk_frames, codec)
        with fitting("post-training",
                     f"lower --micro-batch, with {resume}; or --prompts or --group, with {anew}"):
            stage = post_train(run, weights)
            arms[POST_TRAINED] = stage.kept
            if args.control:
                arms |= control_arms(run, arms, stage.cpu_seconds)
    if args.resume:
        save(stage, args.out)                            # a kill may have come between its state and weights
    if not rank():
        with fitting("measuring", f"lower --validate-clips, with {resume}"):
            conclude(arms, held_out, run.reward, args, log)


if __name__ == "__main__":
    with one_line("stopped before anything was done", "choose a smaller --preset, --size or --clips"):
        main()
