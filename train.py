"""Teach portraits to speak.

    python train.py                                    synthetic talkers, two CPU cores, minutes
    python train.py --data my_clips --size 64          your own video clips
    python train.py --resume runs/tiny                 go on where a run was stopped

Pretraining by flow matching: a clip's latent chunks are noised, each to a noise level of its own,

    x_sigma = (1 - sigma) * clean + sigma * noise,      sigma ~ U(0, 1) per chunk

and the generator, which sees the portrait, the sound and the clean past of each chunk, learns the velocity

    loss = w(sigma) * |predicted velocity - (noise - clean)|^2,      w = min(sigma / 0.2, 1)^2.

The weight tames the division by sigma near the clean end, where the network predicts the clean latent.
All randomness of step s comes from a generator keyed by (seed, s), so that a resumed run repeats an unbroken one.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from data import FPS, Clip, MediaError, folder_clips, log_mel, synthetic_clips, write_video
from model import PRESETS, Config, Generator, replacing, save_generator
from sample import crop_argument, evaluate, imitate, interval

# What a preset trains with, beside its Config in model.py.
TRAINING = {
    "tiny": dict(steps=2200, batch=8, clips=1000),
    "small": dict(steps=40_000, batch=32, clips=20_000),
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
        train, held_out = folder_clips(args.data, args.config.size, args.frames / FPS, args.crop)
    else:
        seconds = args.frames / FPS
        train = synthetic_clips(args.clips, args.config.size, seconds, args.seed)
        held_out = synthetic_clips(args.validate_clips, args.config.size, seconds, HELD_OUT_SEED + args.seed)
    long = [[clip for clip in clips if len(clip.frames) >= args.frames] for clips in (train, held_out)]
    if not all(long):
        raise MediaError(args.data, f"has too few clips of {args.frames / FPS:.2f} s ({len(long[0])} to train on, "
                                    f"{len(long[1])} held out); add files or lower --seconds")
    return long[0], long[1][: args.validate_clips]


def pixels(clips: Sequence[Clip], frames: int) -> Tensor:
    """(B, F, 3, S, S) in [0, 1]"""
    return torch.stack([clip.frames[:frames] for clip in clips]) / 255


def encode(model: Generator, clips: list[Clip], frames: int, device: str) -> Latents:
    """Encode clips once, so that a training step never touches a pixel."""
    latents, batch = [], 16
    for i in tqdm(range(0, len(clips), batch), "encoding", leave=False):
        latents.append(model.codec.encode(pixels(clips[i:i + batch], frames).to(device)).cpu())
    mel = torch.stack([log_mel(clip.audio, frames) for clip in clips])
    return Latents(torch.stack([clip.frames[0] for clip in clips]), mel, torch.cat(latents))


# ---------------------------------------------------------------- one step

def seeded(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def flow_matching_loss(model: Generator, data: Latents, args: argparse.Namespace, step: int) -> tuple[Tensor, Tensor]:
    """Draw the batch of a step and return its loss and the loss per chunk's noise level, (bins,), nan where empty."""
    rng, device = seeded(args.seed, step), args.device
    rows = torch.randint(len(data), (args.batch,), generator=rng)
    clean = data.clean[rows]                                                         # (B, K, N, C)
    sigma = torch.rand(clean.shape[:2], generator=rng).clamp_min(0.02)[:, None]      # (B, 1, K)
    noise = torch.randn(clean.shape, generator=rng)[:, None]                         # (B, 1, K, N, C)
    heard = torch.rand(args.batch, generator=rng) >= args.audio_dropout
    # A little noise on the past, so that generation, whose past is never perfect, does not drift.
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
    """Muon for the matrices of the trunk, AdamW for the rest (Jordan et al., 2024; as in nanochat)."""
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
        try:
            state = torch.load(folder / "state.pt", map_location=self.args.device, weights_only=True)
        except FileNotFoundError:
            raise MediaError(folder, "holds no state.pt to resume from; start it anew without --resume") from None
        self.step, self.average = state["step"], state["average"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)


# ---------------------------------------------------------------- reporting

def averaged(run: Pretraining) -> Generator:
    """The generator with the moving average of its weights."""
    model = Generator(run.model.config).to(run.args.device).eval()
    model.load_state_dict(run.average)
    return model


def validate(model: Generator, clips: list[Clip], args: argparse.Namespace) -> tuple[dict[str, Tensor], Tensor]:
    """Generate the held-out clips and measure them. Returns metrics, name -> (B,), and the videos."""
    videos = imitate(model, clips, args.frames, args.sampling_steps, seed=args.seed)
    return evaluate(videos, clips, model.config.chunk_frames), videos


def summary(metrics: dict[str, Tensor]) -> str:
    return "  ".join(f"{name} {mean:.3f}±{half:.3f}" for name, (mean, half) in
                     ((name, interval(values)) for name, values in metrics.items()))


def write_pictures(folder: Path, videos: Tensor, clips: list[Clip], rows: int = 6, columns: int = 12) -> None:
    """Write sheet.png, truth above generated for some clips, and sample.mp4, truth beside generated, with sound."""
    frames = videos.shape[1]
    truths, size = pixels(clips[:rows], frames), videos.shape[-1]
    at = torch.linspace(0, frames - 1, columns).long()
    pairs = torch.stack([truths[:, at], videos[: len(truths), at]], 1).flatten(0, 1)         # (2 rows, columns, ...)
    sheet = (pairs.permute(0, 3, 1, 4, 2).reshape(len(pairs) * size, columns * size, 3) * 255).round().byte()
    with replacing(folder / "sheet.png") as path:
        Image.fromarray(np.ascontiguousarray(sheet)).save(path, format="png")
    pair = (torch.cat([truths[0], videos[0]], -1) * 255).round().byte()
    enlarged = pair.repeat_interleave(4, -1).repeat_interleave(4, -2)
    write_video(folder / "sample.mp4", enlarged, clips[0].audio[: frames * 640])


class Log:
    """One line of JSON per event, appended to RUN/log.jsonl."""

    def __init__(self, folder: Path):
        self.path, self.start = folder / "log.jsonl", time.perf_counter()

    def __call__(self, **entry) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"seconds": round(time.perf_counter() - self.start, 2), **entry}) + "\n")


# ---------------------------------------------------------------- command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("run")
    g.add_argument("--preset", choices=PRESETS, default="tiny", help="the generator's shape and training defaults")
    g.add_argument("--out", type=Path, help="folder of the run (default runs/PRESET)")
    g.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run, with the flags it had")
    g.add_argument("--seed", type=int, default=0, help="of everything random")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    g.add_argument("--compile", action="store_true", help="torch.compile the generator: slow to start, faster steps")
    g = p.add_argument_group("data")
    g.add_argument("--data", type=Path, help="a folder of video clips; without it, synthetic talkers")
    g.add_argument("--crop", type=crop_argument, help="x,y,size in pixels of the clips; without it, the centre square")
    g.add_argument("--clips", type=int, help="how many synthetic talkers to train on (default by preset)")
    g.add_argument("--seconds", type=float, help="length of a training clip (default 2, with --data 3)")
    g = p.add_argument_group("training")
    g.add_argument("--steps", type=int, help="training steps (default by preset)")
    g.add_argument("--batch", type=int, help="clips per step (default by preset)")
    g.add_argument("--lr", type=float, default=2e-3, help="learning rate of AdamW (embeddings, norms, modulation)")
    g.add_argument("--muon-lr", type=float, default=0.02, help="learning rate of Muon (the trunk's matrices)")
    g.add_argument("--warmup", type=int, default=50, help="steps of warm-up")
    g.add_argument("--ema", type=float, default=0.98, help="decay of the moving average of the weights")
    g.add_argument("--grad-clip", type=float, default=1.0, help="largest norm of the gradient")
    g.add_argument("--audio-dropout", type=float, default=0.1, help="share of clips trained without sound")
    g.add_argument("--context-noise", type=float, default=0.1, help="most noise on the clean past")
    g = p.add_argument_group("validation and checkpoints")
    g.add_argument("--validate-every", type=int, default=0, help="steps between validations; 0: at the end only")
    g.add_argument("--validate-clips", type=int, default=48, help="held-out clips to generate")
    g.add_argument("--sampling-steps", type=int, default=4, help="flow steps per chunk when generating")
    g.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    g = p.add_argument_group("generator (default by preset)")
    for field in fields(Config):
        if field.name != "mel_channels":
            g.add_argument("--" + field.name.replace("_", "-"), type=field.type, help=argparse.SUPPRESS)
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
    for name in ("steps", "batch", "clips", "warmup", "validate_clips", "sampling_steps", "save_every"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    chunk, seconds = args.config.chunk_frames, args.seconds or (3 if args.data else 2)
    args.frames = round(seconds * FPS) // chunk * chunk
    if args.frames < FPS:
        p.error(f"--seconds must hold at least one second of whole chunks, got {seconds}")
    return args


def resumed(p: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Take every flag from the run that is resumed, but for --device."""
    try:
        saved = json.loads((args.resume / "config.json").read_text())
    except (OSError, ValueError):
        p.error(f"{args.resume} holds no config.json; --resume wants the folder of a run")
    old = argparse.Namespace(**saved["training"], resume=args.resume, out=args.resume, device=args.device)
    old.config, old.data = Config(**saved["model"]), old.data and Path(old.data)
    return old


def flags(args: argparse.Namespace) -> dict:
    """The flags that define a run, as config.json keeps them beside the generator's Config."""
    kept = {k: v for k, v in vars(args).items() if k not in ("config", "resume", "device", "out")}
    return kept | {"data": args.data and str(args.data.absolute())}


# ---------------------------------------------------------------- the run

def pretrain(run: Pretraining, data: Latents, held_out: list[Clip], log: Log) -> None:
    """Train to the last step, with validations and checkpoints on the way."""
    args = run.args
    bar = tqdm(range(run.step, args.steps), "training", initial=run.step, total=args.steps, unit="step")
    smooth = None
    try:
        for _ in bar:
            entry = run.advance(data)
            smooth = entry["loss"] if smooth is None else 0.98 * smooth + 0.02 * entry["loss"]
            bar.set_postfix(loss=f"{smooth:.4f}")
            log(step=run.step, **entry)
            if not math.isfinite(entry["loss"]):
                raise MediaError(args.out, f"the loss is {entry['loss']} at step {run.step}; lower --lr and --muon-lr")
            if args.validate_every and run.step % args.validate_every == 0 and run.step < args.steps:
                metrics, _ = validate(averaged(run), held_out, args)
                log(step=run.step, held_out={k: v.mean().item() for k, v in metrics.items()})
                bar.write(f"step {run.step}: {summary(metrics)}")
            if run.step % args.save_every == 0 or run.step == args.steps:
                run.save(args.out)
    except KeyboardInterrupt:
        run.save(args.out)
        sys.exit(f"\nstopped at step {run.step}; go on with: python train.py --resume {args.out}")


def prepare(args: argparse.Namespace) -> tuple[Pretraining, Latents, list[Clip]]:
    """Load the clips, make the generator, fit or load its codec, and encode the clips."""
    clips, held_out = load_clips(args)
    torch.manual_seed(args.seed)
    run = Pretraining(Generator(args.config).to(args.device), args)
    codec = run.model.codec
    if args.resume:
        run.load(args.resume)
    else:
        spread = np.linspace(0, len(clips) - 1, min(len(clips), CODEC_CLIPS)).astype(int)
        codec.fit(pixels([clips[i] for i in spread], args.frames).to(args.device))
        run.average.update({f"codec.{k}": v.clone() for k, v in codec.state_dict().items()})
    data = encode(run.model, clips, args.frames, args.device)
    truth = pixels(held_out, args.frames).to(args.device)
    coded = codec.decode(truth[:, 0], codec.encode(truth)).cpu()
    print(f"codec alone, held-out clips: {summary(evaluate(coded, held_out, args.config.chunk_frames))}")
    return run, data, held_out


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out)
    run, data, held_out = prepare(args)
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"{len(data)} training clips of {args.frames} frames, {len(held_out)} held out; "
          f"generator of {parameters / 1e6:.2f} M parameters on {args.device}; "
          f"ready after {time.perf_counter() - start:.0f} s")
    log(config=asdict(args.config), training=flags(args), parameters=parameters)
    pretrain(run, data, held_out, log)

    metrics, videos = validate(averaged(run), held_out, args)
    log(step=run.step, held_out={k: v.mean().item() for k, v in metrics.items()})
    write_pictures(args.out, videos, held_out)
    print(f"held-out clips, generated from portrait and sound: {summary(metrics)}")
    print(f"{args.out}: log.jsonl, sheet.png (truth above generated), sample.mp4 (truth beside generated), "
          f"after {(time.perf_counter() - start) / 60:.1f} minutes\ntry next:\n  python sample.py "
          f"--checkpoint {args.out} --image PORTRAIT.jpg --audio SPEECH.wav --out video.mp4")


if __name__ == "__main__":
    try:
        main()
    except MediaError as error:
        sys.exit(f"error: {error}")
