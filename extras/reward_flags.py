"""The flags that define a judge and a reward, the same for every command, and what is made of them.

    train.py, python -m extras.score, python -m extras.people, python -m extras.school validate

What is shipped, the embedded judge and two sync networks, knows drawn talkers only. So where --judge, --sync
or --reward-sync is not given, it means the shipped one, or, with --data, none: but train.py teaches two sync
networks where neither --sync nor --reward-sync is given (extras/footage.py). What a flag names is used.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import reward
from data import Clip
from extras.arguments import device_argument
from extras.files import MediaError
from extras.sync import load_sync
from reward import (ASPECTS, COMPONENTS, DEFAULT_JUDGE, DEFAULT_SYNC, REWARD_SYNC, WEIGHTS,
                    Exemplars, Judge, Scores, SyncNetwork)

# ---------------------------------------------------------------- the judge

def judge_flags(p: argparse.ArgumentParser) -> list[str]:
    """Add the flags that name a judge, as `make_judge` reads them. Returns: their names."""
    p.add_argument("--device", type=device_argument, default=device_argument(), help="(%(default)s)")
    g = p.add_argument_group("judge")
    flags = [
        g.add_argument("--judge", default="default", metavar="NAME", help="a folder, or a model of the hub "
                       "such as Qwen/Qwen2.5-Omni-3B, which is then downloaded; or none (the embedded one; "
                       "with --data none)"),
        g.add_argument("--judge-url", metavar="URL", help="ask an OpenAI-compatible endpoint, "
                       "http://host:port/v1, instead"),
        g.add_argument("--judge-model", metavar="NAME", help="the model's name at that endpoint"),
        g.add_argument("--judge-timeout", type=float, default=120.0, metavar="SECONDS", help="of its silence "
                       "after which a request is sent again (%(default)g)"),
        g.add_argument("--judge-patience", type=float, default=180.0, metavar="SECONDS", help="for which an "
                       "endpoint that is down or busy is waited for; then the run is saved and stops "
                       "(%(default)g)"),
        g.add_argument("--judge-dtype", choices=("float32", "bfloat16", "float16"), help="(its own, else "
                       "float32 on a CPU and bfloat16 elsewhere)"),
        g.add_argument("--judge-size", type=int, metavar="S", help="pixels per side at which it sees frames "
                       "(its own)"),
        g.add_argument("--judge-batch", type=int, default=8, help="clips at once, or requests under way "
                       "(%(default)s)"),
        g.add_argument("--judge-offload", action="store_true", help="keep the judge in main memory between "
                       "two uses"),
    ]
    return [flag.dest for flag in flags]


def make_judge(args: argparse.Namespace):
    """Make the judge that the flags name. Returns: a Judge, a RemoteJudge, or None."""
    if not 1 <= args.judge_batch < 1e9 or not 32 <= (args.judge_size or 32) < 1e5:
        raise MediaError("--judge-batch and --judge-size", "must be at least 1 and 32, and not absurd")
    if args.judge_url:
        if not args.judge_model:
            raise MediaError("--judge-url", "needs --judge-model, the model's name at that server")
        from extras.endpoint import RemoteJudge      # here alone: it needs the openai client
        return RemoteJudge(args.judge_url, args.judge_model, args.judge_timeout, args.judge_patience,
                           args.judge_batch)
    if args.judge == "none":
        return None
    if args.judge == "default" and args.data:
        teach = shlex.join(["python", "-m", "extras.school", "teach", "--data", str(args.data)])
        print(f"note: no judge, as the embedded one knows drawn talkers only; --judge names one, and {teach} "
              "teaches one", file=sys.stderr)
        return None
    name = DEFAULT_JUDGE if args.judge == "default" else args.judge
    size = {"side": args.judge_size} if args.judge_size else {}
    return Judge.load(name, args.judge_dtype, batch=args.judge_batch, device=args.device,
                      offload=args.judge_offload, **size)


# ---------------------------------------------------------------- the reward

def weights_argument(text: str) -> dict[str, float]:
    """Read 'judge_lip_sync=1,seams=0.5' into {name: weight}."""
    try:
        weights = {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
        if not weights.keys() <= COMPONENTS.keys() or not all(0 <= w < 1e9 for w in weights.values()):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"want name=weight,... with weights of 0 or more and names among "
                                         f"{', '.join(COMPONENTS)}; got {text!r}") from None
    return weights


def reward_flags(p: argparse.ArgumentParser) -> list[str]:
    """Add the flags that define a reward, its judge's too. Returns: their names."""
    of_judge, g = judge_flags(p), p.add_argument_group("reward")
    flags = [
        g.add_argument("--calibration", metavar="FILE", help="map ratings to people's scale, by what "
                       "python -m extras.people align wrote"),
        g.add_argument("--reward-sync", metavar="DIR", help="a sync network for the reward, from "
                       "python -m extras.school sync --seed 1; not the one of --sync, which measures; or "
                       "none (the one for drawn talkers; with --data one that is taught on them)"),
        g.add_argument("--weights", type=weights_argument, default={}, metavar="NAME=W,...",
                       help="of components: " + ", ".join(f"{k} {w:g}" for k, w in WEIGHTS.items())),
    ]
    return of_judge + [flag.dest for flag in flags]


def make_reward(args: argparse.Namespace, judge, good: Sequence[Clip], chunk_frames: int,
                codec=None) -> reward.Reward:
    """Make the reward that the flags define, from a judge or None and clips for Exemplars.measure."""
    exemplars = Exemplars.measure(good, chunk_frames, codec)
    # Looked up as this runs: a class of your own can stand in its place (extras/examples/own_reward.py).
    return reward.Reward(judge, exemplars, args.weights, chunk_frames, calibration(args), reward_sync(args))


def sync_name(name: str | None, shipped: Path, args: argparse.Namespace) -> Path | None:
    """Say which sync network a flag means."""
    taught = getattr(vars(args).get("footage"), shipped.name, "none")        # by --data (extras/footage.py)
    name = name or (taught if args.data else shipped)
    return None if name == "none" else Path(name)


def measuring_sync(args: argparse.Namespace) -> SyncNetwork | None:
    """Load the sync network that measures. Raises: MediaError where it is broken."""
    name = sync_name(args.sync, DEFAULT_SYNC, args)
    return name and load_sync(name)


def reward_sync(args: argparse.Namespace) -> SyncNetwork | None:
    """Load the reward's sync network. Raises: MediaError where it is broken, or the one that measures."""
    name, measures = sync_name(args.reward_sync, REWARD_SYNC, args), sync_name(args.sync, DEFAULT_SYNC, args)
    if name is None:
        return None
    if measures and name.resolve() == measures.resolve():
        raise MediaError(name, "is the sync network of --sync, which measures what the reward does; teach "
                               "the reward another: python -m extras.school sync --seed 1")
    return load_sync(name).to(args.device)


def later_stages(args: argparse.Namespace, judge) -> tuple[bool, bool]:
    """Say whether there is curation and post-training.

    Both want something that knows the clips: a judge, or the reward's sync network. Drawn talkers may be
    reinforced by the regularisers alone, as an experiment.
    """
    known = judge is not None or reward_sync(args) is not None
    curates, reinforces = bool(args.curate and known), bool(args.updates and (known or not args.data))
    left_out = ["curation"] if args.curate and not curates else []
    left_out += ["post-training"] if args.updates and not reinforces else []
    if left_out:
        print(f"no {' and no '.join(left_out)}: neither a judge nor a sync network knows these clips; "
              "give --judge, --reward-sync, or more footage")
    return curates, reinforces


def read_json(path: Path, what: str, complete: Callable[[dict], bool]) -> dict:
    """Read a JSON file. Raises: MediaError where it is missing, broken, or `complete` does not hold of it."""
    try:
        read = json.loads(path.read_text())
        if not complete(read):
            raise ValueError("something is missing or misspelt")
    except OSError as error:
        raise MediaError(path, f"cannot be read ({error.strerror}); name {what}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MediaError(path, f"is not {what} ({str(error)[:80]}); save it again") from None
    return read


def calibration(args: argparse.Namespace) -> dict | None:
    """Read the calibration that --calibration names, if any."""
    return load_calibration(args.calibration) if args.calibration else None


def load_calibration(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read a calibration that extras/people.py fitted. Raises: MediaError if it is anything else."""
    def increasing(knots):
        knots = np.array(knots, float)
        paired = knots.ndim == 2 and len(knots) == 2 and knots.size
        return paired and np.isfinite(knots).all() and (np.diff(knots) > 0).all()

    read = read_json(Path(path), "a calibration that extras.people align wrote",
                     lambda c: c and set(c) <= set(ASPECTS) and all(map(increasing, c.values())))
    return {aspect: tuple(np.array(knots, float)) for aspect, knots in read.items()}


def table(rewarded: reward.Reward, columns: dict[str, Scores]) -> str:
    """Write components and totals, means over clips, one column each."""
    wide = 2 + max(12, *map(len, columns))
    lines = [f"{'':22}" + "".join(f"{name:>{wide}}" for name in columns) + "   weight  range  meaning"]
    for name, weight in rewarded.weights.items():
        values = "".join(f"{of.components[name].nanmean().item():{wide}.4g}" for of in columns.values())
        lines.append(f"{name:22}{values}{weight:9.2f}  {COMPONENTS[name].scale:6} {COMPONENTS[name].meaning}")
    totals = "".join(f"{scores.total.nanmean().item():{wide}.3f}" for scores in columns.values())
    lines.append(f"{'total':22}{totals}           sum of weight * component: more is better")
    if unrated := sum(scores.total.isnan().sum().item() for scores in columns.values()):
        lines.append(f"unrated videos, in no mean of ratings and totals: {unrated}")
    return "\n".join(lines)
