"""What a run shows at its end: report.html, one file to look at and to send, and report.md with the same.

Made of log.jsonl, held_out.json and the pictures beside them, so a resumed run reports the whole of itself.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from scipy.stats import mannwhitneyu
from torch import Tensor

from data import Clip, pixels, to_bytes, with_interval, write_video
from extras.media import SAMPLES_PER_FRAME
from extras.page import Part, code, curves, heading, table, text, videos, write_page

PRETRAINED, CURATED, POST_TRAINED = "pretrained", "curated", "post-trained"          # the arms
MORE_PRETRAINING, MORE_CURATION, UNCURATED = "more pretraining", "more curation", "GRPO without curation"
PAIRS = [  # an arm, and what it is compared with: what it started from, or the same CPU time spent otherwise
    (CURATED, PRETRAINED), (POST_TRAINED, CURATED), (POST_TRAINED, PRETRAINED), (POST_TRAINED, MORE_CURATION),
    (UNCURATED, MORE_PRETRAINING), (POST_TRAINED, MORE_PRETRAINING)]
GROUPS = {  # how independent of the reward a metric is
    "No part of the reward contains or resembles them": (
        "lip_correlation", "late_correlation", "other_correlation", "over_late", "over_other", "offset",
        "mouth_psnr", "psnr"),
    "Measured by another network of the same make as the reward's": (
        "sync_confidence", "sync_own", "mouth_distance", "identity_cosine"),
    "Resembled by a part of the reward": (
        "amplitude", "head", "frame_change", "jerk_ratio", "jerk", "seam_ratio", "still_psnr")}
ASPECTS = "lip-sync", "expressiveness", "motion"     # of the judge's ratings
SHOWN = 4                                            # held-out clips that play in the report
PANEL = 192                                          # pixels per side of a face in them


def hardware(device: str, processes: int) -> str:
    """Name the GPU, or the CPU, and the threads of each process."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else found and found[1] or "a CPU"
    each = f" in each of {processes} processes" if processes > 1 else ""
    return f"{name}, {torch.get_num_threads()} CPU threads{each}"


def paired(made: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Subtract metrics of one arm from another's, clip by clip, by PAIRS. Returns: title -> metrics."""
    return {f"{a} minus {b}": {name: value - made[b][name] for name, value in made[a].items()}
            for a, b in PAIRS if a in made and b in made}


# ---------------------------------------------------------------- clips

def write_clips(folder: Path, arms: Sequence[Tensor], clips: Sequence[Clip]) -> None:
    """Write clip-1.mp4 and so on: the truth and what each arm generated side by side, with sound.

    Args: the arms' videos (B, F, 3, S, S) in [0, 1]; the B true clips.
    """
    for old in folder.glob("clip-*.mp4"):
        old.unlink()
    for i, clip in enumerate(clips[:SHOWN]):
        faces = torch.cat([pixels([clip], arms[0].shape[1])[0], *(arm[i] for arm in arms)], -1)
        faces = nnf.interpolate(faces, (PANEL, PANEL * (1 + len(arms))), mode="bicubic", antialias=True)
        sound = clip.audio[: len(faces) * SAMPLES_PER_FRAME]
        write_video(folder / f"clip-{i + 1}.mp4", to_bytes(faces), sound)


# ---------------------------------------------------------------- the funnel: what was found, what was picked

def funnel(strengths: dict[str, Tensor], ratings: Tensor, picked: Tensor) -> list[dict]:
    """Say of each fault how many clips have it, how the judge rates them, and what is left among its picks.

    Args:    strengths: fault -> (N,), 0 for none; ratings (N, 3); picked (n,) rows.
    Returns: a row for each fault. `auc` is the chance that a rating tells a clip with the fault from one
             without, for the aspect that tells best: .5 is guessing, 1 is always.
    """
    def auc(good, bad):
        pairs = len(good) * len(bad)
        return mannwhitneyu(good, bad).statistic / pairs if pairs else math.nan

    def mean(values):                                # over all clips, those without the fault included
        return values.double().abs().mean().item()

    rows, rated = [], ratings.isfinite().all(1)
    for name, strength in strengths.items():
        has = strength != 0
        with_it, without = ratings[has & rated], ratings[~has & rated]
        aucs = [auc(without[:, aspect], with_it[:, aspect]) for aspect in range(len(ASPECTS))]
        best = int(np.argmax(aucs))
        rows.append({"fault": name, "share": mean(has), "strength": mean(strength),
                     "rated_with": with_it.mean(0).tolist(), "rated_without": without.mean(0).tolist(),
                     "auc": float(aucs[best]), "aspect": best,
                     "share_picked": mean(has[picked]), "strength_picked": mean(strength[picked])})
    return rows


def funnel_table(rows: list[dict]) -> Part:
    def three(values):
        return " / ".join(f"{value:.1f}" for value in np.array(values, float))

    head = ("fault", "share of clips", "mean strength", f"rated ({' / '.join(ASPECTS)}) with it", "without",
            "found by", "AUC", "share of picks", "mean strength")
    return table(head, [
        (r["fault"], f"{r['share']:.0%}", f"{r['strength']:.2f}", three(r["rated_with"]),
         three(r["rated_without"]), ASPECTS[r["aspect"]], f"{r['auc']:.2f}", f"{r['share_picked']:.0%}",
         f"{r['strength_picked']:.2f}") for r in rows])


# ---------------------------------------------------------------- what the log tells

def parse_json(text: str):
    """Parse JSON in which null stands for nan. (In lists NumPy makes it nan.)"""
    return json.loads(text, object_hook=lambda entry: {
        key: math.nan if value is None else value for key, value in entry.items()})


def with_key(log: list[dict], key: str) -> list[dict]:
    return [entry for entry in log if key in entry]


def watched_parts(folder: Path, log: list[dict]) -> list[Part]:
    """Draw the watched metrics of every stage."""
    stages = {}
    for entry in with_key(log, "watched"):
        stages.setdefault(entry["stage"], []).append(entry)
    if not stages:
        return []
    panels = {}
    for stage, looks in stages.items():
        at = np.array([entry.get("step", entry.get("update")) for entry in looks])
        for name in looks[0]["watched"]:
            y = [entry["watched"][name] for entry in looks]
            label = f"{stage}, {looks[-1]['best']} kept"
            panels.setdefault(name, []).append((at / max(at[-1], 1), y, 0, label))
    return [heading("On the way"),
            text("Metrics of the moving average on the watched clips. They choose which step is kept."),
            curves(folder / "watched.png", "watched metrics", panels, "share of the stage")]


def reward_parts(folder: Path, log: list[dict]) -> list[Part]:
    """Draw the reward's components over the updates."""
    updates = [entry for entry in with_key(log, "parts") if entry["stage"] == "post-training"]
    if not updates:
        return []
    x, panels = [entry["update"] for entry in updates], {}
    for name in [name for name, of in updates[0]["components"].items() if "mean" in of]:
        mean, std = ([e["components"][name][of] for e in updates] for of in ("mean", "group_std"))
        panels[name] = [(x, mean, np.array(std), name)]
    panels["reward"] = [(x, [entry["reward"] for entry in updates], 0, "")]
    return [heading("Post-training"),
            text("The reward of rollouts and its components. A group's standard deviation is shaded."),
            curves(folder / "rewards.png", "reward over updates", panels, "update")]


def pretraining_parts(folder: Path, log: list[dict]) -> list[Part]:
    """Draw the loss of pretraining by noise level."""
    steps = [entry for entry in with_key(log, "loss_by_sigma") if entry["stage"] == "pretraining"]
    if not steps:
        return []
    losses = np.array([[entry["step"], *entry["loss_by_sigma"]] for entry in steps], float)
    blocks = np.array_split(losses, min(len(steps), 100))
    with np.errstate(invalid="ignore"):              # a level that a short run never drew stays nan
        x, *levels = np.stack([np.nansum(b, 0) / np.isfinite(b).sum(0) for b in blocks], 1)
    edges = np.linspace(0, 1, len(levels) + 1)
    panels = {"velocity loss": [(x, y, 0, f"sigma {low:.1f} to {high:.1f}")
                                for y, low, high in zip(levels, edges, edges[1:])]}
    return [heading("Pretraining"), text("The weighted error of the velocity by noise level."),
            curves(folder / "pretraining.png", "loss by noise level", panels, "step", "log")]


def grouped_tables(columns: dict[str, dict[str, str]]) -> list[Part]:
    """Tabulate title -> metric -> cell, grouped by how independent of the reward the metrics are."""
    parts = []
    for title, names in GROUPS.items():
        rows = [[name, *(column.get(name, "") for column in columns.values())]
                for name in names if any(name in column for column in columns.values())]
        parts += [text(f"{title}:"), table(("", *columns), rows)] if rows else []
    return parts


def held_out_parts(values: dict[str, dict], log: list[dict]) -> list[Part]:
    """Tabulate the held-out metrics of every arm and their paired differences, sampler by sampler."""
    def cells(metrics):
        return {name: with_interval(value) for name, value in metrics.items()}

    parts, codec = [], with_key(log, "codec")[-1]["codec"]
    for sampler, arms in values.items():
        made = {arm: {name: torch.from_numpy(np.array(v, float)) for name, v in metrics.items()}
                for arm, metrics in arms.items()}
        columns = {arm: cells(metrics) for arm, metrics in made.items()}
        for entry in with_key(log, "mouth_distance"):        # of all clips together; the last one counts
            if entry["sampler"] == sampler and entry["arm"] in columns:
                columns[entry["arm"]]["mouth_distance"] = f"{entry['mouth_distance']:.3f}"
        alone = {"codec alone": {name: f"{value:.3f}" for name, value in codec.items()}}
        count = len(next(iter(made.values()))["psnr"])
        parts += [heading(f"Held-out clips, {sampler}"),
                  text(f"{count} clips, generated from portrait and sound; mean ± 95% interval."),
                  *grouped_tables(alone | columns)]
        if differences := {title: cells(metrics) for title, metrics in paired(made).items()}:
            parts += [heading("Differences, clip by clip", 3), *grouped_tables(differences)]
    return parts


def how_it_was_made(log: list[dict]) -> list[Part]:
    """List commands, hardware, seed and time."""
    sessions = with_key(log, "config")
    seconds = [entry["seconds"] for entry in log]                    # from the start of each session
    minutes = sum(now for now, after in zip(seconds, [*seconds[1:], 0]) if after < now) / 60
    run = sessions[-1]
    rows = {"hardware": run["hardware"], "seed": f"{run['seed']}", "minutes": f"{minutes:.1f}",
            "generator": f"{run['parameters'] / 1e6:.2f} M parameters, {run['config']['size']} pixels"}
    if updates := with_key(log, "parts"):
        rows["unrated videos"] = f"{sum(entry['components']['total']['unrated'] for entry in updates)}"
    rows |= {entry["control"]: f"{entry['steps']} steps in {entry['cpu_seconds']:.0f} CPU-seconds"
             for entry in with_key(log, "control")}
    commands = "\n".join(entry["command"] for entry in sessions)
    return [heading("How it was made"), code(commands), table(("", ""), list(rows.items()))]


def write_report(folder: Path) -> None:
    """Write report.html and report.md, with the curves, of what the run has logged, measured and shown."""
    log = [parse_json(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    values = parse_json((folder / "held_out.json").read_text())
    title, arms = folder.resolve().name, ["truth", *values["ode"]]
    parts = [heading(title, 1)]
    if clips := sorted(folder.glob("clip-*.mp4")):
        parts += [text(f"Held-out clips, from left to right: {', '.join(arms)}. Each arm was given the first "
                       "frame and the sound. Unmute a clip to hear it."),
                  videos(clips, f"{4 * len(arms)}rem")]
    parts += watched_parts(folder, log) + reward_parts(folder, log) + pretraining_parts(folder, log)
    parts += held_out_parts(values, log)
    for entry in with_key(log, "rewarded")[-1:]:
        parts += [heading("By the reward"), code(entry["rewarded"])]
    for entry in with_key(log, "funnel")[-1:]:
        parts += [heading("What was found, and what the judge picked"),
                  text("Nothing that trains, judges or picks reads what faults a clip has. But the embedded "
                       "judge was taught faults of these kinds, compression excepted, on flawless talkers."),
                  funnel_table(entry["funnel"])]
    write_page(folder / "report", title, parts + how_it_was_made(log))
