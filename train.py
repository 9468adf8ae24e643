"""Teach portraits to speak.

    python train.py                                    synthetic talkers, two CPU cores, minutes
    python train.py --data my_clips --size 64          your own video clips
    python train.py --resume runs/tiny                 go on where a run was stopped

Pretraining by flow matching: a clip's latent chunks are noised, each to a noise level of its own,

    x_sigma = (1 - sigma) * clean + sigma * noise,      sigma ~ U(0.02, 1) per chunk

and the generator, which sees the portrait, the sound and the clean past of each chunk, learns the velocity

    loss = w(sigma) * |predicted velocity - (noise - clean)|^2,      w = min(sigma / 0.2, 1)^2.

The weight tames the division by sigma near the clean end, where the network predicts the clean latent.
All randomness of step s comes from a generator keyed by (seed, s), so that a resumed run repeats an unbroken one.
"""

import argparse
import json
import math
import pickle
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import (FPS, SAMPLES_PER_FRAME, Clip, MediaError, folder_clips, log_mel, replacing, synthetic_clips,
                  write_speech, write_video)
from model import PRESETS, Config, Generator, save_generator
from reward import DEFAULT_SYNC, load_sync, make_reward, reward_flags, table
from sample import crop_argument, device_argument, evaluate, generator, imitate, summary

# What a preset trains with, beside its Config in model.py.
TRAINING = {
    "tiny": dict(steps=1800, batch=8, clips=1000, ema=0.98, warmup=50),
    "small": dict(steps=40_000, batch=16, clips=4000, ema=0.999, warmup=500),
}
HELD_OUT_SEED = 1_000_000          # talkers with another seed: other identities, other speech
CODEC_CLIPS = 256                  # enough to fit the codec's components
SIGMA_BINS = 5


# ---------------------------------------------------------------- data

@dataclass
class Latents:
    """A set of clips as the trainer sees it, all in memory: pixels appear only in the portraits."""

    portrait: Tensor               # (N, 3, S, S) uint8
    mel: Tensor                    # (N, K T, mel_channels)
    clean: Tensor                  # (N, K, tokens, C)

    def __len__(self) -> int:
        return len(self.clean)


def load_clips(args: argparse.Namespace) -> tuple[list[Clip], list[Clip]]:
    """Return the training and held-out clips, each at least `args.frames` frames long."""
    if args.data:
        train, held_out = folder_clips(args.data, args.config.size, args.seconds, args.crop)
    else:
        train = synthetic_clips(args.clips, args.config.size, args.seconds, args.seed)
        held_out = synthetic_clips(args.validate_clips, args.config.size, args.seconds, HELD_OUT_SEED + args.seed)
    long = [[clip for clip in clips if len(clip.frames) >= args.frames] for clips in (train, held_out)]
    if not all(long):
        raise MediaError(args.data, f"has too few clips of {args.frames / FPS:.2f} s ({len(long[0])} to train on, "
                                    f"{len(long[1])} held out); add files or lower --seconds")
    return long[0], long[1][: args.validate_clips]


def pixels(clips: Sequence[Clip], frames: int) -> Tensor:
    """(B, F, 3, S, S) in [0, 1]"""
    return torch.stack([clip.frames[:frames] for clip in clips]) / 255


def fit_codec(model: Generator, clips: list[Clip], args: argparse.Namespace) -> None:
    """Fit the motion codec to clips that are spread over the training set."""
    if len(clips) * args.frames < args.config.space_channels:
        raise MediaError(args.data or "--clips", f"{len(clips)} clips are too few to fit the codec; add some")
    spread = np.linspace(0, len(clips) - 1, min(len(clips), CODEC_CLIPS)).astype(int)
    model.codec.fit(pixels([clips[i] for i in spread], args.frames).to(args.device))


def encode(model: Generator, clips: list[Clip], frames: int, device: str) -> Latents:
    """Encode clips once, so that a training step never touches a pixel."""
    latents, batch = [], 16
    for i in tqdm(range(0, len(clips), batch), "encoding", leave=False):
        latents.append(model.codec.encode(pixels(clips[i:i + batch], frames).to(device)).cpu())
    mel = torch.stack([log_mel(clip.audio, frames) for clip in clips])
    return Latents(torch.stack([clip.frames[0] for clip in clips]), mel, torch.cat(latents))


# ---------------------------------------------------------------- one step

def flow_matching_loss(model: Generator, data: Latents, args: argparse.Namespace, step: int) -> tuple[Tensor, Tensor]:
    """Draw the batch of a step and return its loss and the loss per chunk's noise level, (bins,), nan where empty."""
    rng, device = generator(args.seed, step), args.device
    rows = torch.randint(len(data), (args.batch,), generator=rng)
    clean = data.clean[rows]                                                         # (B, K, N, C)
    sigma = torch.rand(clean.shape[:2], generator=rng).clamp_min(0.02)[:, None]      # (B, 1, K)
    noise = torch.randn(clean.shape, generator=rng)[:, None]                         # (B, 1, K, N, C)
    heard = torch.rand(args.batch, generator=rng) >= args.audio_dropout
    # Noise on the past, anything from none to as much as there is signal: generation's own past is never perfect,
    # and a trunk that trusts it copies and sharpens its own errors until, within seconds, the face falls apart.
    slip = args.context_noise * torch.rand(args.batch, 1, 1, 1, generator=rng)
    context = clean + slip * torch.randn(clean.shape, generator=rng)
    clean = clean[:, None]
    level = sigma[..., None, None]
    noisy = (1 - level) * clean + level * noise
    with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
        velocity = model((data.portrait[rows] / 255).to(device), data.mel[rows].to(device), context.to(device),
                         noisy.to(device), sigma.to(device), heard.to(device))
    error = (velocity - (noise - clean).to(device)).square().mean((-1, -2))          # (B, 1, K)
    error = error * (sigma.to(device) / 0.2).clamp_max(1).square()
    bins = (sigma * SIGMA_BINS).long().clamp_max(SIGMA_BINS - 1).flatten()
    per_bin = torch.stack([error.detach().cpu().flatten()[bins == i].mean() for i in range(SIGMA_BINS)])
    return error.mean(), per_bin


def optimizers(model: Generator, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the trunk (Jordan et al., 2024), AdamW for the rest, as nanochat has it."""
    trunk = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and "modulation" not in name]
    inside = {id(p) for p in trunk}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [torch.optim.Muon(trunk, lr=args.muon_lr, weight_decay=0.01),
            torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01,
                              fused=args.device.startswith("cuda"))]


def schedule(step: int, args: argparse.Namespace) -> float:
    """Warm up over the first steps, then decay linearly to zero. Returns a factor on the learning rates."""
    return min((step + 1) / args.warmup, 1 - step / args.steps, 1.0)


class Pretraining:
    """Weights, optimizers and moving average of a run: what a step changes, and what a checkpoint holds."""

    def __init__(self, model: Generator, args: argparse.Namespace):
        self.model, self.args, self.step = model, args, 0
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.optimizers = optimizers(model, args)
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.compiled = torch.compile(model) if args.compile else model

    def advance(self, data: Latents) -> dict:
        """Take one step. Returns what to log."""
        factor = schedule(self.step, self.args)
        for optimizer, rate in zip(self.optimizers, self.rates):
            optimizer.param_groups[0]["lr"] = factor * rate
            optimizer.zero_grad()
        loss, per_bin = flow_matching_loss(self.compiled, data, self.args, self.step)
        loss.backward()
        norm = clip_grad_norm_(self.model.parameters(), self.args.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(self.args.ema, self.step / (self.step + 10))           # a short memory at first
        weights = self.model.state_dict()
        floats = [k for k, v in weights.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in floats], [weights[k] for k in floats], 1 - decay)
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr_factor": factor,
                "loss_by_sigma": [None if math.isnan(x) else round(x, 5) for x in per_bin.tolist()]}

    def save(self, folder: Path) -> None:
        """Write the averaged weights for sample.py, and the training state apart, each renamed into place."""
        save_generator(self.model, folder, self.average, training=flags(self.args))
        with replacing(folder / "state.pt") as path:
            torch.save({"step": self.step, "model": self.model.state_dict(), "average": self.average,
                        "optimizers": [o.state_dict() for o in self.optimizers]}, path)

    def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote. Raises: MediaError where it is missing or broken."""
        try:
            state = torch.load(folder / "state.pt", map_location=self.args.device, weights_only=True)
            self.step, self.average = state["step"], state["average"]
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
        except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise MediaError(folder / "state.pt", f"cannot be resumed from ({str(error).splitlines()[0]}); "
                                                  "start the run anew without --resume") from None


# ---------------------------------------------------------------- reporting

def averaged(run: Pretraining) -> Generator:
    """The generator with the moving average of its weights."""
    model = Generator(run.model.config).to(run.args.device).eval()
    model.load_state_dict(run.average)
    return model


def validate(model: Generator, clips: list[Clip], args: argparse.Namespace) -> tuple[dict[str, Tensor], Tensor]:
    """Generate the held-out clips and measure them. Returns metrics, name -> (B,), and the videos."""
    videos = imitate(model, clips, args.frames, args.sampling_steps, seed=args.seed)
    return held_out_metrics(videos, clips, args), videos


def held_out_metrics(videos: Tensor, clips: list[Clip], args: argparse.Namespace) -> dict[str, Tensor]:
    """Measure videos by what no reward uses, with the sync network of --sync."""
    return evaluate(videos, clips, args.config.chunk_frames, None if args.sync == "none" else load_sync(args.sync))


def rewarded(videos: Tensor, held_out: list[Clip], clips: Sequence[Clip], args: argparse.Namespace) -> str:
    """Tell, apart from the metrics, what the reward says of videos and of their true clips."""
    reward = make_reward(args, clips, args.config.chunk_frames)
    true, audio = pixels(held_out, args.frames), torch.stack([c.audio[:args.frames * SAMPLES_PER_FRAME] for c in held_out])
    names = [clip.name for clip in held_out]
    return "the reward, which no metric above is part of:\n" + table(reward, {
        "generated": reward(videos, audio, true[:, 0], names), "truth": reward(true, audio, true[:, 0], names)})


def write_pictures(folder: Path, videos: Tensor, clips: list[Clip], rows: int = 6, columns: int = 12) -> None:
    """Write sheet.png, truth above generated for some clips, and sample.mp4, truth beside generated, with sound;
    and the portrait and the speech of the first clip, to try sample.py with."""
    frames = videos.shape[1]
    truths, size = pixels(clips[:rows], frames), videos.shape[-1]
    at = torch.linspace(0, frames - 1, columns).long()
    pairs = torch.stack([truths[:, at], videos[: len(truths), at]], 1).flatten(0, 1)         # (2 rows, columns, ...)
    sheet = (pairs.permute(0, 3, 1, 4, 2).reshape(len(pairs) * size, columns * size, 3) * 255).round().byte()
    with replacing(folder / "sheet.png") as path:
        Image.fromarray(np.ascontiguousarray(sheet)).save(path, format="png")
    with replacing(folder / "portrait.png") as path:
        Image.fromarray(clips[0].frames[0].permute(1, 2, 0).numpy()).save(path, format="png")
    write_speech(folder / "speech.wav", clips[0].audio)
    pair = (torch.cat([truths[0], videos[0]], -1) * 255).round().byte()
    enlarged = pair.repeat_interleave(4, -1).repeat_interleave(4, -2)
    write_video(folder / "sample.mp4", enlarged, clips[0].audio[: frames * SAMPLES_PER_FRAME])


class Log:
    """One line of JSON per event in RUN/log.jsonl; a resumed run drops the steps that it will repeat."""

    def __init__(self, folder: Path, step: int):
        self.path, self.start = folder / "log.jsonl", time.perf_counter()
        old = self.path.read_text().splitlines() if step and self.path.exists() else []
        kept = [line for line in old if json.loads(line).get("step", 0) <= step]
        with replacing(self.path) as path:
            path.write_text("".join(line + "\n" for line in kept))

    def __call__(self, **entry) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"seconds": round(time.perf_counter() - self.start, 2), **entry}) + "\n")


def means(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: round(values.mean().item(), 5) for name, values in metrics.items()}


# ---------------------------------------------------------------- command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    g = p.add_argument_group("run")
    g.add_argument("--preset", choices=PRESETS, default="tiny", help="generator and training defaults (%(default)s)")
    g.add_argument("--out", type=Path, help="folder of the run (runs/PRESET)")
    g.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run, with the flags it had")
    g.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    g.add_argument("--device", type=device_argument, default=device_argument(), help="cpu or cuda (%(default)s)")
    g.add_argument("--compile", action="store_true", help="torch.compile the generator: slow to start, faster steps")
    g = p.add_argument_group("data")
    g.add_argument("--data", type=Path, help="a folder of video clips; without it, synthetic talkers")
    g.add_argument("--crop", type=crop_argument, help="x,y,size in pixels of the clips; without it, the centre square")
    g.add_argument("--clips", type=int, help="how many synthetic talkers to train on (by preset)")
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
    g = p.add_argument_group("validation and checkpoints")
    g.add_argument("--validate-every", type=int, help="steps between validations (only at the end)")
    g.add_argument("--validate-clips", type=int, default=48, help="held-out clips to generate (%(default)s)")
    g.add_argument("--sampling-steps", type=int, default=4, help="flow steps per chunk when generating (%(default)s)")
    g.add_argument("--save-every", type=int, default=200, help="steps between checkpoints (%(default)s)")
    g.add_argument("--sync", help="folder of a sync network for these clips, from reward.py --train-sync; none: no sync "
                   "metrics (the one for drawn talkers; with --data none)")
    reward_flags(p)
    g = p.add_argument_group("generator", "shape of the generator (by preset); model.Config explains each")
    for field in fields(Config):
        if field.name != "mel_channels":
            g.add_argument("--" + field.name.replace("_", "-"), type=field.type, help=f"tiny: {field.default}")
    args = p.parse_args(argv)
    return resumed(p, args) if args.resume else complete(p, args)


def complete(p: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Fill what was not given from the preset, which explicit flags win over, and check it."""
    given = {f.name: vars(args).pop(f.name, None) for f in fields(Config)}
    try:
        args.config = replace(PRESETS[args.preset], **{k: v for k, v in given.items() if v is not None})
    except ValueError as error:
        p.error(str(error))
    for name, value in TRAINING[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / args.preset
    if args.out.exists() and not args.out.is_dir():
        p.error(f"--out {args.out} is a file; name a folder")
    at_least = dict(seed=0, steps=1, batch=1, clips=1, warmup=1, validate_clips=1, sampling_steps=1, save_every=1,
                    validate_every=1, lr=0, muon_lr=0, grad_clip=0, audio_dropout=0, context_noise=0, ema=0)
    for name, least in at_least.items():
        if getattr(args, name) is not None and not least <= getattr(args, name) < math.inf:
            p.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    for name in ("ema", "audio_dropout"):
        if getattr(args, name) >= 1:
            p.error(f"--{name.replace('_', '-')} must be below 1, got {getattr(args, name)}")
    args.sync = args.sync or ("none" if args.data else str(DEFAULT_SYNC))
    if args.seconds is None:
        args.seconds = 3.0 if args.data else 2.0
    if not 1 <= args.seconds < math.inf:
        p.error(f"--seconds must be at least 1, got {args.seconds}")
    args.frames = round(args.seconds * FPS) // args.config.chunk_frames * args.config.chunk_frames
    return args


def resumed(p: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Take every flag from the run that is resumed, but for --device."""
    given = [k for k, v in vars(args).items() if v != p.get_default(k) and k not in ("resume", "device")]
    if given:
        p.error(f"--resume goes on with the flags the run had; leave out --{given[0].replace('_', '-')}")
    try:
        saved = json.loads((args.resume / "config.json").read_text())
        old = argparse.Namespace(**saved["training"], resume=args.resume, out=args.resume, device=args.device)
        old.config, old.data = Config(**saved["model"]), old.data and Path(old.data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        p.error(f"{args.resume} is not a run of this version ({error}); --resume wants the folder that train.py wrote")
    return old


def flags(args: argparse.Namespace) -> dict:
    """The flags that define a run, as config.json keeps them beside the generator's Config."""
    kept = {k: v for k, v in vars(args).items() if k not in ("config", "resume", "device", "out")}
    return kept | {"data": args.data and str(args.data.absolute())}


# ---------------------------------------------------------------- the run

@contextmanager
def deferred_interrupt() -> Iterator[list]:
    """Let Ctrl-C wait for the end of a step: the list that is given fills, and a second Ctrl-C stops at once."""
    asked, before = [], signal.getsignal(signal.SIGINT)

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
            if args.validate_every and run.step % args.validate_every == 0 and run.step < args.steps:
                metrics, _ = validate(averaged(run), held_out, args)
                log(step=run.step, held_out=means(metrics))
                bar.write(f"step {run.step}:\n{summary(metrics)}")
            if run.step % args.save_every == 0 or run.step == args.steps or asked:
                run.save(args.out)
            if asked:
                bar.close()
                sys.exit(f"stopped at step {run.step}; go on with: python train.py --resume {args.out}")


def codec_alone(model: Generator, clips: list[Clip], args: argparse.Namespace) -> dict[str, Tensor]:
    """Measure the codec by itself: held-out clips, encoded and decoded. Nothing generated can be better."""
    coded = encode(model, clips, args.frames, args.device)
    videos = [model.codec.decode(p[None].to(args.device) / 255, z[None].to(args.device)).cpu()
              for p, z in zip(coded.portrait, coded.clean)]
    return held_out_metrics(torch.cat(videos), clips, args)


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    args = parse_arguments(argv)
    clips, held_out = load_clips(args)
    torch.manual_seed(args.seed)
    run = Pretraining(Generator(args.config).to(args.device), args)
    if args.resume:
        run.load(args.resume)
    else:
        fit_codec(run.model, clips, args)
        run.average.update({f"codec.{k}": v.clone() for k, v in run.model.codec.state_dict().items()})
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out, run.step)
    data = encode(run.model, clips, args.frames, args.device)
    codec = codec_alone(run.model, held_out, args)
    parameters = sum(p.numel() for p in run.model.parameters())
    log(config=asdict(args.config), training=flags(args), parameters=parameters, codec=means(codec))
    print(f"codec alone, {len(held_out)} held-out clips:\n{summary(codec)}\n"
          f"{len(data)} training clips of {args.frames} frames; generator of {parameters / 1e6:.2f} M parameters "
          f"on {args.device}; ready after {time.perf_counter() - start:.0f} s")
    pretrain(run, data, held_out, log)

    metrics, videos = validate(averaged(run), held_out, args)
    log(step=run.step, held_out=means(metrics))
    write_pictures(args.out, videos, held_out)
    print(f"{len(held_out)} held-out clips, generated from portrait and sound:\n{summary(metrics)}\n"
          f"{rewarded(videos, held_out, clips, args)}\n"
          f"{args.out}: sheet.png (truth above generated), sample.mp4 (truth beside generated), log.jsonl; "
          f"{(time.perf_counter() - start) / 60:.1f} minutes in all\nto try next:\n  python sample.py "
          f"--checkpoint {args.out} --image {args.out}/portrait.png --audio {args.out}/speech.wav --out video.mp4")


if __name__ == "__main__":
    try:
        main()
    except (MediaError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped before the next checkpoint")
