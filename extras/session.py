"""How a run lives and ends: one at a time in a folder, logged, kept in checkpoints, stopped and taken up.

A run can be stopped at any time. A gradient step is finished first; rollouts, rewards and looks, which change
nothing, end at once.
"""

import argparse
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from extras.files import MediaError, first_line, replacing, writing
from extras.flags import flags
from extras.processes import all_gather, rank, world
from extras.report import CURATED, PRETRAINED, summary
from model import save_generator
from reward import JudgeError

SAVE_MINUTES = 2.0                 # between checkpoints
CHECKPOINTS = {"pretraining": "state.pt", "curation": "curate.pt", "post-training": "post.pt"}


# ---------------------------------------------------------------- one run at a time

@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder. The lock is the system's: it ends with the process, by kill -9 too."""
    if rank():
        yield
        return
    made = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in folder.rglob(".*.[0-9]*.part"):  # half-written by a run that was killed, see `replacing`
            left.unlink()
        for left in folder.glob(".writing-*"):       # see `write_video`; one of today may be at work
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left)
    except BlockingIOError:
        raise MediaError(folder, "another run is at work there; wait for its end, or choose another "
                                 "--out") from None
    except OSError:                                  # a file system without locks
        pass
    try:
        yield
    finally:
        if made:
            with suppress(OSError):                  # a run that was refused leaves no empty folder
                folder.rmdir()
        os.close(held)


def clear(folder: Path) -> None:
    """Remove what an earlier run left in the folder, so that nothing of it is taken up, and begin a log."""
    with writing(folder):
        (folder / "log.jsonl").write_text("")        # first: by its log a folder is known as that of a run
    for name in *CHECKPOINTS.values(), "config.json", "cut.jpg", "held_out.json", "report.html", "report.md":
        (folder / name).unlink(missing_ok=True)
    for name in ("control", "tensorboard", "rivals", PRETRAINED, CURATED):
        shutil.rmtree(folder / name, ignore_errors=True)


# ---------------------------------------------------------------- the log

def plain_json(entry: dict) -> str:
    """Write strict JSON: NaN and infinity become null."""
    return json.dumps(json.loads(json.dumps(entry), parse_constant=lambda name: None))


def scalars(value, name: str) -> Iterator[tuple[str, float]]:
    """List the numbers of a nested entry by name, such as post-training/parts/0/kl."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from scalars(part, f"{name}/{key}")
    elif isinstance(value, int | float):
        yield name, value


def means(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Average metrics over clips, for the log."""
    return {name: round(values.mean().item(), 5) for name, values in metrics.items()}


class Log:
    """A line of JSON per event in RUN/log.jsonl; with --tensorboard, steps' numbers in RUN/tensorboard."""

    def __init__(self, folder: Path, start: float, tensorboard: bool = False):
        self.path, self.start, self.board, self.writer = folder / "log.jsonl", start, None, None
        if tensorboard and not rank():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MediaError("--tensorboard", "wants the package of this name; pip install tensorboard, "
                                                  "or leave the flag out") from None
            self.writer = partial(SummaryWriter, folder / "tensorboard")

    def __call__(self, **entry) -> None:
        if rank():
            return
        with writing(self.path), open(self.path, "a") as file:
            seconds = round(time.perf_counter() - self.start, 2)
            file.write(plain_json({"seconds": seconds, **entry}) + "\n")
        step = entry.get("step", entry.get("update"))
        if self.writer and step is not None:
            self.board = self.board or self.writer()
            for name, value in scalars(entry, entry["stage"]):
                self.board.add_scalar(name, value, step)

    def rewind(self, stage) -> None:
        """Drop what a stage did after its checkpoint and will log again, and a line that was cut short."""
        if rank():
            return
        kept = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else []:
            with suppress(ValueError):               # the last line, cut short by a full disk or a power cut
                entry = json.loads(line)
                step = entry[stage.unit] if entry.get("stage") == stage.name else -1
                looks_again = "watched" in entry and step == stage.step and stage.look_is_due
                if step <= stage.step and not looks_again:
                    kept.append(line)
        with replacing(self.path) as path:
            path.write_text("".join(line + "\n" for line in kept))


# ---------------------------------------------------------------- checkpoints

def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """Hash weights, by which a stage knows whether it went on from the same."""
    sign = hashlib.sha256()
    for tensor in weights.values():
        sign.update(tensor.cpu().numpy().tobytes())
    return sign.hexdigest()


def checkpoint(stage, folder: Path) -> Path:
    """Name a stage's file in the folder of a run; a control has a folder of its own."""
    control = f"control/{stage.name.replace(' ', '-')}/state.pt"
    return folder / CHECKPOINTS.get(stage.name, control)


def save(stage, folder: Path) -> None:
    """Write a stage's state, then its weights for sample.py with the flags, each renamed into place.

    Flags come last: where they are, there is a state to go on from.
    """
    if rank():
        return
    file = checkpoint(stage, folder)
    with replacing(file) as path:
        torch.save({stage.unit: stage.step, "model": stage.model.state_dict(), "average": stage.average,
                    "optimizers": [o.state_dict() for o in stage.optimizers], "best": stage.best,
                    "looks": stage.looks, "cpu_seconds": stage.cpu_seconds, "recipe": stage.recipe}, path)
    save_generator(stage.model, file.parent, stage.kept, training=flags(stage.args))


def keep_arm(model, name: str, args: argparse.Namespace) -> None:
    """Write an arm to a folder of its own, for sample.py: the run's folder holds the last stage's weights."""
    if not rank():
        save_generator(model, args.out / name, training=flags(args))


def load(stage, path: Path, anew: bool = False) -> bool:
    """Take up what `save` wrote; `anew` begins a stage there, at step 0 and with nothing best yet.

    Returns: False where the state is of another recipe. Raises: MediaError where it is missing or broken.
    """
    all_gather(None)                                   # the first process may still be writing it
    try:
        state = torch.load(path, map_location=stage.args.device, weights_only=True)
        if not anew and state["recipe"] != stage.recipe:
            print(f"{stage.name} is done anew: {path} went on from other weights, or is of other clips")
            return False
        stage.average = state["average"]
        stage.model.load_state_dict(state["model"])
        for optimizer, saved in zip(stage.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if anew:
            stage.best = {"step": 0, "score": -math.inf, "weights": stage.average}
        else:
            stage.step, stage.best, stage.cpu_seconds = state[stage.unit], state["best"], state["cpu_seconds"]
            due = math.floor(stage.args.looks * stage.progress + 1e-9) + 1
            stage.looks = min(state["looks"], due)     # fewer where the stage has been given more steps
    except (OSError, RuntimeError, KeyError, EOFError, ValueError, pickle.UnpicklingError) as error:
        remedy = "start the run anew" if path.name == "state.pt" else "delete it, and this stage is done anew"
        raise MediaError(path, f"cannot be resumed from ({first_line(error)}); {remedy}") from None
    return True


def continues(stage, folder: Path) -> bool:
    """Take up the stage's own checkpoint, if a folder has one of the same recipe."""
    return checkpoint(stage, folder).is_file() and load(stage, checkpoint(stage, folder))


# ---------------------------------------------------------------- stopped

@contextmanager
def signals(handler) -> Iterator[None]:
    """Have a handler answer Ctrl-C, SIGTERM and the end of a terminal, unless nohup ignores that, in a block.
    Not under torchrun, which ends all processes."""
    stops = [signal.SIGINT, signal.SIGTERM] if world() == 1 else []
    if stops and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stops.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in stops}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def at_once():
    """Let Ctrl-C and SIGTERM end a block at once, by KeyboardInterrupt."""
    return signals(signal.default_int_handler)


@contextmanager
def after_the_step() -> Iterator[list]:
    """Let Ctrl-C and SIGTERM wait: the list that is yielded is then no longer empty. A second one ends the
    run in the middle of a step, and what that tore is not saved."""
    asked = []

    def note(number, frame):
        if asked and number != signal.SIGHUP:        # which comes twice where a terminal is closed
            sys.exit("stopped in the middle of a step; --resume goes on from the last checkpoint, if any")
        asked.append(True)
    with signals(note):
        yield asked


@contextmanager
def resumable(args: argparse.Namespace, start: float) -> Iterator[None]:
    """End at Ctrl-C or SIGTERM, or where the judge is away, with a line that says how to go on: from a
    checkpoint, if this run has left one."""
    began, state = time.time() - (time.perf_counter() - start), args.out / "state.pt"
    try:
        with at_once():
            yield
    except (JudgeError, KeyboardInterrupt) as error:
        said = f"error: {error}; then" if isinstance(error, JudgeError) else "stopped;"
        kept = args.resume or state.exists() and state.stat().st_mtime >= began
        sys.exit(f"{said} go on with: {go_on(args)}" if kept else
                 f"{said} start it again: it was before the first checkpoint, so nothing was kept")


def go_on(args: argparse.Namespace) -> str:
    """The command that goes on with a run: with what was given anew, if this one already did."""
    again = args.command if args.resume else ["--resume", str(args.out)]
    return f"{args.program} {shlex.join(again)}"


def check_program(args: argparse.Namespace) -> None:
    """Raise MediaError where another script goes on with a run: judge or reward may be that script's own."""
    def script(program: str) -> str:                 # by path or by -m, it is the same
        return Path(shlex.split(program)[-1]).name.removesuffix(".py").split(".")[-1]

    if args.resume:
        kept = json.loads((args.out / "config.json").read_text()).get("training", {})
        before = kept.get("program", args.program)
        if script(before) != script(args.program):
            raise MediaError(args.out, "is a run of another script, whose judge or reward may be its own; "
                                       f"{before} --resume {args.out} goes on")


# ---------------------------------------------------------------- from beginning to end

def carry_out(stage, watched: list, log: Log) -> dict[str, torch.Tensor]:
    """Take a stage to its end, with looks at the watched clips, log lines and checkpoints on the way.

    Returns: the weights to go on with.
    """
    args, saved, first = stage.args, time.monotonic(), stage.step
    log.rewind(stage)
    bar = tqdm(None, stage.name, initial=stage.step, total=stage.total or None, unit=stage.unit)

    with after_the_step() as asked, bar:
        try:
            while True:
                if watched and stage.look_is_due:
                    metrics = stage.look(watched)
                    log(stage=stage.name, **{stage.unit: stage.step}, watched=means(metrics),
                        best=stage.best["step"])
                    bar.write(f"{stage.name}, {stage.unit} {stage.step}, {len(watched)} watched clips:\n"
                              f"{summary(metrics)}")
                if stage.progress >= 1:
                    break
                entry = stage.advance()
                log(stage=stage.name, **{stage.unit: stage.step}, **entry)
                bar.update()
                shown = "reward" if "reward" in entry else "loss"
                bar.set_postfix({shown: f"{entry[shown]:.3f}"}, refresh=False)
                if asked:
                    raise KeyboardInterrupt
                if time.monotonic() - saved > 60 * SAVE_MINUTES:
                    save(stage, args.out)
                    saved = time.monotonic()
        except JudgeError:                                 # it is away, say: what was reached is kept
            save(stage, args.out)
            raise
        except KeyboardInterrupt:
            save(stage, args.out)
            sys.exit(f"stopped at {stage.unit} {stage.step} of {stage.name}; go on with: {go_on(args)}")
        if stage.name not in CHECKPOINTS and stage.step > first:
            log(control=stage.name, steps=stage.step, cpu_seconds=stage.cpu_seconds)
        if stage.step > first or not checkpoint(stage, args.out).is_file():    # a later one's weights stay
            save(stage, args.out)
        if asked:
            sys.exit(f"stopped at the end of {stage.name}; go on with: {go_on(args)}")
    if watched:
        print(f"{stage.name}: kept {stage.unit} {stage.best['step']} of {stage.step}; "
              f"{stage.cpu_seconds:.0f} s of CPU time")
    elif stage.name != "pretraining":
        print(f"{stage.name}: too few held-out clips to watch any, so the last {stage.unit} is kept")
    return stage.kept
