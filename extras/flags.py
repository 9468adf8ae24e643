"""The command line of train.py: its flags, what a preset gives them, and how an earlier run is taken up.

An explicit flag wins over the run that --resume or --pretrained names, and that run over the preset.
Impossible settings end with one clear line before anything is done.
"""

import argparse
import json
import math
import os
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

import grpo
from extras.media import FPS
from extras.arguments import CROP_HELP, Parser, check_numbers, crop_argument
from extras.pretrained import encoder_width, trunk_shape
from extras.processes import world
from extras.reward_flags import reward_flags
from model import PRESETS, SAMPLING_STEPS, Config, hub_folder
from reward import SYNC_FRAMES, SYNC_SHIFTS

# What a preset trains with, beside its Config in model.py.
TRAINING = {
    "tiny": dict(steps=2000, curate_steps=2500, updates=75, batch=8, clips=1000, ema=0.98, warmup=50,
                 prompts=4, micro_batch=8, checkpointing=False),
    "small": dict(steps=40_000, curate_steps=5000, updates=80, batch=16, clips=4000, ema=0.999, warmup=500,
                  prompts=8, micro_batch=4, checkpointing=False),
    "base": dict(steps=200_000, curate_steps=20_000, updates=80, batch=32, clips=4000, ema=0.9999,
                 warmup=1000, prompts=8, micro_batch=1, checkpointing=True),
}

# Flags that are numbers: name, type, default (None: by preset), least value, help.
PRETRAINING = [
    ("seed", int, 0, 0, "of everything random"),
    ("steps", int, None, 1, "training steps"),
    ("batch", int, None, 1, "clips per step"),
    ("clips", int, None, 1, "how many drawn talkers to train on"),
    ("lr", float, 2e-3, 0, "of AdamW: embeddings, norms, modulation"),
    ("muon_lr", float, 0.02, 0, "of Muon: the trunk's matrices"),
    ("warmup", int, None, 1, "steps of warm-up"),
    ("ema", float, None, 0, "decay of the moving average of the weights"),
    ("context_noise", float, 1.0, 0, "most noise on the clean past"),
]
POST_TRAINING = [
    ("curate", float, 0.15, 0, "share of the training clips, the highest rated, to fine-tune on; 0: none"),
    ("curate_steps", int, None, 1, "of fine-tuning"),
    ("updates", int, None, 0, "of post-training; 0: none"),
    ("prompts", int, None, 1, "portraits and speeches per update"),
    ("parts", int, 2, 1, "gradient steps per update, at most; with one the clip is never met"),
    ("micro_batch", int, None, 1, "rollouts per backward pass"),
    ("post_lr", float, 6e-4, 0, "of AdamW; it falls to zero by the last update"),
    ("looks", int, 4, 1, "at the watched clips in each stage after pretraining, and one before it"),
    ("watch_clips", int, 48, 1, "held-out clips that choose the checkpoint"),
]
VALIDATION = [
    ("validate_clips", int, 48, 1, "held-out clips to generate at the end"),
    ("sampling_steps", int, SAMPLING_STEPS, 1, "flow steps per chunk when generating"),
]

NOT_FLAGS = "mel_channels", "norm_eps", "audio_encoder"      # of Config: they follow from flags of their own
LOCAL = "data", "judge", "sync", "reward_sync", "calibration", "init_from"
# What may differ from an earlier run: how much at once, how long to wait, where things are, and more steps.
LOADS = {"validate_clips", "micro_batch", "tensorboard", "judge_batch", "judge_timeout", "judge_patience"}
PLACES = {*LOCAL, "audio_encoder", "judge_url", "judge_model"}
GROW = {"steps", "curate_steps", "updates", "control"}
SHORTEST = SYNC_FRAMES + SYNC_SHIFTS       # frames in which all shifts of sound can be tried
# What is no part of a run.
SESSION = {"config", "settings", "command", "resume", "pretrained", "further", "curates_alike", "overwrite",
           "out", "device", "footage"}
# Where these differ, curation is done anew: it looks elsewhere, or goes on for longer.
OF_CURATION = "curate_steps", "looks", "watch_clips", "sampling_steps"


def flag(name: str) -> str:
    """How a setting is called on the command line."""
    return "--" + name.replace("_", "-")


def numbers(p: argparse.ArgumentParser, title: str, rows: list[tuple]) -> argparse._ArgumentGroup:
    """Add a group of flags that are numbers."""
    g = p.add_argument_group(title)
    for name, kind, default, _, text in rows:
        shown = "by preset" if default is None else default
        g.add_argument(flag(name), type=kind, default=default, help=f"{text} ({shown})")
    return g


def all_flags() -> tuple[argparse.ArgumentParser, set[str]]:
    """Make the parser. Returns: it, and the names of the flags that define curation and post-training."""
    p = Parser(description="Pretrain, curate and post-train a generator.")
    g = p.add_argument_group("an earlier run")
    g.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run, or, with more "
                   "--steps, --curate-steps or --updates, a finished one; other flags stay")
    g.add_argument("--pretrained", type=Path, metavar="RUN", help="curate and post-train a run anew to "
                   "--out: a folder or a name on the hub; with --data, first train it for --steps on them")
    g = p.add_argument_group("run")
    g.add_argument("--preset", choices=PRESETS, default="tiny", help="generator and defaults (%(default)s)")
    g.add_argument("--out", type=Path, help="folder of the run (runs/PRESET)")
    g.add_argument("--overwrite", action="store_true", help="begin anew where --out holds a run")
    g.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="compute blocks again "
                   "in the backward pass: less memory, slower steps (by preset)")
    g.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, help="write RUN/tensorboard, too")
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="PATH", help="a video, or a folder of videos (drawn talkers)")
    g.add_argument("--crop", type=crop_argument, default="face", help=CROP_HELP)
    g.add_argument("--world", choices=("found", "flawless"), default="found",
                   help="drawn talkers to train on: with the faults of recordings, or flawless (%(default)s)")
    g.add_argument("--seconds", type=float, help="length of a training clip (2, with --data 3)")
    numbers(p, "pretraining", PRETRAINING)
    g = numbers(p, "curation and post-training", POST_TRAINING)
    g.add_argument("--control", action="store_true", help="spend its time otherwise, too, and compare")
    g = p.add_argument_group("GRPO", "grpo.Settings; grpo.py explains it")
    for f in fields(grpo.Settings):
        g.add_argument(flag(f.name), type=f.type, default=f.default, choices=f.metadata["choices"],
                       help=f.metadata["help"] + " (%(default)s)")
    of_reward = reward_flags(p)
    g = numbers(p, "validation", VALIDATION)
    g.add_argument("--sync", metavar="DIR", help="a sync network for these clips, from extras.school sync, "
                   "or none (the one for drawn talkers; with --data one that is taught on them)")
    g = p.add_argument_group("generator", "its shape (by preset); model.Config explains each")
    g.add_argument("--init-from", metavar="NAME_OR_DIR", help="start the trunk as a Qwen3 language model, "
                   "and take its shape: a folder, or a name such as Qwen/Qwen3-0.6B; lower --muon-lr")
    g.add_argument("--audio-encoder", metavar="NAME_OR_DIR", help="hear by a frozen wav2vec2, HuBERT, WavLM "
                   "or Whisper, which hears all of the speech before the first frame (log-mel: 80 ms ahead)")
    for f in fields(Config):
        if f.name not in NOT_FLAGS:
            g.add_argument(flag(f.name), type=f.type, help=f"tiny: {f.default}")
    later = {"control", "sync", *of_reward, *(f.name for f in fields(grpo.Settings))}
    return p, later | {name for name, *_ in POST_TRAINING}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags; those of an earlier run stand where none is given."""
    p, later = all_flags()
    before = p.parse_args(argv)
    run = hub_folder(before.pretrained) if before.pretrained else before.resume
    known = vars(before).keys() | {f.name for f in fields(Config)}
    saved = {k: v for k, v in saved_flags(p, run).items() if k in known} if run else {}      # others are gone
    curated = {name: saved.get(name) for name in OF_CURATION}
    if before.pretrained:
        saved = {k: v for k, v in saved.items() if k in LOADS or k not in later}
        if local_name(before.data) not in (None, saved.get("data")):
            saved = {k: v for k, v in saved.items() if k not in ("crop", "seconds")}     # of other clips
    args = p.parse_args(argv, argparse.Namespace(**saved))       # where it has a value, no default is taken
    args.program, args.command = program(), sys.argv[1:] if argv is None else list(argv)
    args.pretrained = run if before.pretrained else None
    for name in LOCAL:
        setattr(args, name, local_name(getattr(args, name)))
    if run:
        compare(p, args, saved)
    args = complete(p, args)
    args.curates_alike = bool(args.pretrained) and all(vars(args)[k] == v for k, v in curated.items())
    return args


def program() -> str:
    """The command that was started: train.py, or a script with a judge or reward of its own that calls it."""
    script = sys.modules["__main__"]
    if not hasattr(script, "train") or Path(getattr(script, "__file__", "train.py")).name == "train.py":
        return "python train.py"
    module = script.__spec__
    return f"python -m {module.name}" if module else f"python {shlex.quote(sys.argv[0])}"


def local_name(name: str | None) -> str | None:
    """Make the name of a file or folder whole, so that it is found from anywhere; leave other names alone."""
    local = name not in (None, "", "none", "default") and Path(name).exists()
    return str(Path(name).absolute()) if local else name


def flags(args: argparse.Namespace) -> dict:
    """The flags that define a run, as config.json keeps them beside the generator's Config."""
    return {name: value for name, value in vars(args).items() if name not in SESSION}


# ---------------------------------------------------------------- an earlier run

def saved_flags(p: argparse.ArgumentParser, run: Path) -> dict:
    """Read the flags of an earlier run and of its generator."""
    if not (run / "config.json").exists():
        p.error(f"{run} holds no run; one that stopped before its first checkpoint starts anew, "
                "without --resume")
    try:
        kept = json.loads((run / "config.json").read_text())
        return kept.get("training", {}) | kept["model"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        p.error(f"{run} is not a run of this version ({error}); name the folder that train.py wrote")


def compare(p: argparse.ArgumentParser, args: argparse.Namespace, saved: dict) -> None:
    """End with one clear line where a flag differs that an earlier run has settled."""
    changed = {name for name, value in saved.items() if json.loads(json.dumps(getattr(args, name))) != value}
    args.further = bool(args.pretrained and args.data != saved.get("data"))
    had_none = {name for name in ("data", "audio_encoder", "init_from") if not saved.get(name)}
    if args.resume:
        if args.pretrained or (args.out or args.resume).resolve() != args.resume.resolve():
            p.error("--resume goes on in the folder of the run; leave out --out and --pretrained")
        args.out = args.resume
        for name in changed & GROW:
            if getattr(args, name) < saved[name]:
                p.error(f"{flag(name)} {getattr(args, name)} is less than the run's {saved[name]}, "
                        "and what is learned stays learned; give more")
        if "judge" in changed and "judge_url" not in changed:
            args.judge_url = None                                # the one that was named last
        fixed = changed - LOADS - GROW - (PLACES - had_none)
    else:
        if args.out is None or args.out.resolve() == args.pretrained.resolve():
            p.error("--pretrained wants an --out of its own")
        shape = {"init_from", *(f.name for f in fields(Config))}
        fixed = (changed & shape if args.further else changed - LOADS - {"sampling_steps"}) - (
            {"audio_encoder"} - had_none)
    for name in sorted(fixed):
        p.error(f"{'--resume' if args.resume else '--pretrained'} goes on with the flags the run had; "
                f"leave out {flag(name)}")


# ---------------------------------------------------------------- what is left open, and what cannot be

def complete(p: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Fill what was not given from the preset, which explicit flags win over."""
    given = {f.name: vars(args).pop(f.name, None) for f in fields(Config)}
    given = {k: v for k, v in given.items() if v is not None}
    if args.init_from and not (args.resume or args.pretrained):
        shape = trunk_shape(args.init_from)
        for name in sorted(shape.keys() & given):
            p.error(f"--init-from fixes {flag(name)}; leave it out")
        given |= shape
    if encoder := given.get("audio_encoder"):
        given |= {"audio_encoder": local_name(encoder), "mel_channels": encoder_width(encoder)}
    try:
        args.config = replace(PRESETS[args.preset], **given)
        args.settings = grpo.Settings(**{f.name: getattr(args, f.name) for f in fields(grpo.Settings)})
    except ValueError as error:
        p.error(str(error))
    for name, value in TRAINING[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out, args.footage = args.out or Path("runs") / args.preset, None
    if str(args.out)[0] == "-":                      # in a printed command it would be a flag
        args.out = args.out.absolute()
    if args.seconds is None:
        args.seconds = 3.0 if args.data else 2.0
    check(p, args)
    return args


def check(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with one clear line where a flag cannot be used."""
    if any(args.out.glob("[!.]*")) and not (args.out / "log.jsonl").exists():
        p.error(f"{args.out} holds files, none of them a run's log.jsonl; "
                "name a folder of the run's own")
    if args.data is not None and not (args.data and Path(args.data).exists()):
        p.error(f"{args.data or 'a file without a name'} is not there; say where the clips are with --data")
    if args.crop == "face" and not args.data:
        args.crop = None                                         # that is the default
    if args.crop and not args.data:
        p.error("--crop is of the clips of --data; drawn talkers need none")
    least = {name: low for name, _, _, low, _ in PRETRAINING + POST_TRAINING + VALIDATION}
    check_numbers(p, args, **least, **{f.name: 0 for f in fields(grpo.Settings) if f.type in (int, float)})
    for name in ("ema", "curate"):
        if getattr(args, name) >= 1:
            p.error(f"--{name} must be below 1, got {getattr(args, name)}")
    if not 1 <= args.seconds <= 3600:
        p.error(f"--seconds must be from 1 to 3600, got {args.seconds}")
    chunk = args.config.chunk_frames
    args.frames = round(args.seconds * FPS) // chunk * chunk
    if chunk < 2:                                                    # one frame has no motion to compare
        p.error(f"--chunk-frames must be at least 2, got {chunk}")
    if args.frames < max(2 * chunk, SHORTEST):
        p.error(f"--seconds {args.seconds:g} is too short: whole chunks of {chunk} frames must be two or "
                f"more, and {SHORTEST} frames or more")
    if args.control and not args.updates:
        p.error("--control compares with post-training; give it --updates")
    shares = {"--batch": args.batch}
    if args.updates:
        shares |= {"--prompts": args.prompts, "--prompts / --parts": math.ceil(args.prompts / args.parts)}
    for name, size in shares.items():
        if size % world():
            p.error(f"{name} must divide by the {world()} processes, got {size}")
    if args.device.startswith("cuda") and world() > 1 and (
            args.device != "cuda" or int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count()):
        p.error(f"{world()} processes on --device {args.device} want a GPU each, or cpu")
