"""What a run shows at its end: report.html, one file to look at and to send, and report.md with the same.

Made of log.jsonl, held_out.json and the pictures beside them, so a resumed run reports the whole of itself.
"""

import json
import math
import platform
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data import Clip, pixels, to_bytes, write_video
from extras.media import SAMPLES_PER_FRAME
from extras.page import Part, code, curves, heading, picture, table, text, videos, write_page

PRETRAINED, CURATED, POST_TRAINED = "pretrained", "curated", "post-trained"          # the arms
MORE_PRETRAINING, MORE_CURATION, UNCURATED = "more pretraining", "more curation", "GRPO without curation"
PAIRS = [  # an arm, and what it is compared with: what it started from, or time spent otherwise
    (CURATED, PRETRAINED), (POST_TRAINED, CURATED), (POST_TRAINED, PRETRAINED), (POST_TRAINED, MORE_CURATION),
    (UNCURATED, MORE_PRETRAINING), (POST_TRAINED, MORE_PRETRAINING)]
ENDS = {  # an entry of the log -> what it ends, for the table of times
    "config": "preparation", "funnel": "rating", "control": "measuring",
    "held_out": "measuring", "rewarded": "measuring"}
GROUPS = {  # how independent of the reward a metric is
    "no part of the reward contains or resembles them": (
        "lip_correlation", "late_correlation", "other_correlation", "over_late", "over_other", "offset",
        "mouth_psnr", "psnr", "head_spread"),
    "measured by another network of the same make as the reward's": (
        "sync_confidence", "sync_own", "mouth_distance", "identity_cosine"),
    "resembled by a part of the reward, amplitude by the judge's expressiveness": (
        "amplitude", "head", "frame_change", "jerk_ratio", "jerk", "seam_ratio", "still_psnr")}
NEED_NO_TRUTH = "still_psnr", "jerk", "seam_ratio", "sync_confidence", "sync_own", "identity_cosine"
ASPECTS = "lip-sync", "expressiveness", "motion"     # of the judge's ratings
SHOWN = 4                                            # held-out clips that play in the report
PANEL = 192                                          # pixels per side of a face in them


def hardware(device: str, processes: int) -> str:
    """Name the GPU, or the CPU, and the threads of each process."""
    info, name = Path("/proc/cpuinfo"), platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    elif info.exists() and (found := re.search(r"^model name\s*: (.+)", info.read_text(), re.M)):
        name = found[1]
    each = f" in each of {processes} processes" if processes > 1 else ""
    return f"{name}, {torch.get_num_threads()} CPU threads{each}"


def with_interval(values: Tensor) -> str:
    """Write the mean of (B,) values ± its 95% confidence interval, a single value without one."""
    if len(values) == 1:
        return f"{values.item():.3f}"
    return f"{values.mean().item():.3f}±{1.96 * values.std().item() / math.sqrt(len(values)):.3f}"


def summary(metrics: dict[str, Tensor]) -> str:
    """Write metrics, name -> (B,), as means with 95% intervals; on a second line what needs no truth."""
    apart = [f"{k} {with_interval(v)}" for k, v in metrics.items() if k in NEED_NO_TRUTH]
    rest = [f"{k} {with_interval(v)}" for k, v in sorted(metrics.items()) if k not in NEED_NO_TRUTH]
    return f"  against the truth  {'  '.join(rest)}\n  without it         {'  '.join(apart)}"


def paired(made: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Subtract metrics of one arm from another's, clip by clip, by PAIRS. Returns: title -> metrics."""
    return {f"{a} minus {b}": {name: value - made[b][name] for name, value in made[a].items()}
            for a, b in PAIRS if a in made and b in made}


# ---------------------------------------------------------------- clips

def write_clips(folder: Path, names: Sequence[str], arms: Sequence[Tensor], clips: Sequence[Clip]) -> None:
    """Write clip-1.mp4 and so on: the truth and what each arm generated side by side, with sound and labels.

    Args: names of the arms; their videos (B, F, 3, S, S) in [0, 1]; the B true clips.
    """
    frames, labels = arms[0].shape[1], label_strip(["truth", *names], PANEL)
    for old in folder.glob("clip-*.mp4"):
        old.unlink()
    for i, clip in enumerate(clips[:SHOWN]):
        faces = torch.cat([pixels([clip], frames)[0], *(arm[i] for arm in arms)], -1)
        faces = nnf.interpolate(faces, (PANEL, labels.shape[-1]), mode="bicubic", antialias=True)
        labelled = (torch.cat([face, labels], 1) for face in to_bytes(faces))
        write_video(folder / f"clip-{i + 1}.mp4", labelled, clip.audio[: frames * SAMPLES_PER_FRAME])


def label_strip(names: Sequence[str], width: int) -> Tensor:
    """Draw names side by side, each in the middle of `width` pixels. Returns: (3, H, N * width) uint8."""
    names = [textwrap.fill(name, 14) for name in names]
    lines = 1 + max(name.count("\n") for name in names)
    strip = Image.new("RGB", (width * len(names), width * lines // 7 + width // 16), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(width / 8)
    for i, name in enumerate(names):
        draw.text(((i + 0.5) * width, width / 32), name, "black", font, anchor="ma", align="center")
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)


# ---------------------------------------------------------------- the funnel: what was found, what was picked

def funnel(strengths: dict[str, Tensor], ratings: Tensor, picked: Tensor) -> list[dict]:
    """Say of each fault how many clips have it, how the judge rates them, and what is left among its picks.

    Args:    strengths: fault -> (N,), 0 for none; ratings (N, 3); picked (n,) rows.
    Returns: a row for each fault. `auc` is the chance that a rating tells a clip with the fault from one
             without, or, where all have it, with more of it than half of them from one with less, for the
             aspect that tells best: .5 is guessing, 1 is always.
    """
    def auc(good, bad):                              # ties count by half; no pair gives NaN
        return torch.heaviside(good[:, None] - bad, good.new_tensor(0.5)).mean().item()

    def mean(values):                                # over all clips, those without the fault included
        return values.double().abs().mean().item()

    rows, rated = [], ratings.isfinite().all(1)
    for name, strength in strengths.items():
        has = strength != 0
        more = strength.abs() > strength.abs().median() if has.all() else has
        with_it, without = ratings[more & rated], ratings[~more & rated]
        aucs = [auc(without[:, aspect], with_it[:, aspect]) for aspect in range(len(ASPECTS))]
        best = int(np.argmax(aucs))
        rows.append({"fault": name, "share": mean(has), "strength": mean(strength),
                     "rated_with": with_it.mean(0).tolist(), "rated_without": without.mean(0).tolist(),
                     "auc": float(aucs[best]), "aspect": best,
                     "share_picked": mean(has[picked]), "strength_picked": mean(strength[picked])})
    return rows


def funnel_table(rows: list[dict]) -> Part:
    def share(value):                                # none where nothing was picked
        return "" if math.isnan(value) else f"{value:.0%}"

    def three(values):
        return " / ".join(f"{value:.1f}" for value in values)

    head = ("fault", "share of clips", "mean strength", f"rated ({' / '.join(ASPECTS)}) with it", "without",
            "found by", "AUC", "share of picks", "mean strength")
    return table(head, [
        (r["fault"], f"{r['share']:.0%}", f"{r['strength']:.2f}", three(r["rated_with"]),
         three(r["rated_without"]), ASPECTS[r["aspect"]], f"{r['auc']:.2f}", share(r["share_picked"]),
         share(r["share_picked"]) and f"{r['strength_picked']:.2f}") for r in rows])


# ---------------------------------------------------------------- what the log tells

def parse_json(line: str):
    """Parse JSON in which null stands for nan."""
    nan = lambda value: math.nan if value is None else value
    return json.loads(line, object_hook=lambda found: {
        key: [*map(nan, value)] if isinstance(value, list) else nan(value) for key, value in found.items()})


def with_key(log: list[dict], key: str) -> list[dict]:
    return [entry for entry in log if key in entry]


def watched_parts(folder: Path, log: list[dict]) -> list[Part]:
    """Draw the watched metrics of every stage, and tabulate which step was kept, and the last."""
    stages = {}
    for entry in with_key(log, "watched"):
        at = entry["step"] if "step" in entry else entry["update"]
        stages.setdefault(entry["stage"], []).append((at, entry["watched"], entry["best"]))
    if not stages:
        return []
    panels, rows = {}, []
    for stage, looks in stages.items():
        last, values, best = looks[-1]
        for name in values:
            x, y = zip(*((at / max(last, 1), watched[name]) for at, watched, _ in looks))
            panels.setdefault(name, []).append((x, y, 0, stage))
        seen = {at: watched for at, watched, _ in looks}     # the best may be of the run that was taken up
        rows += [[stage, f"{what}, {at}", *(f"{value:.3f}" for value in seen[at].values())]
                 for what, at in (("kept", best), ("last", last)) if at in seen]
    return [heading("On the way"),
            text("Metrics of the moving average on the watched clips. They choose which step is kept; where "
                 "few are watched, flow matching keeps its last."),
            curves(folder / "watched.png", "watched metrics", panels, "share of the stage"),
            table(("stage", "step", *panels), rows)]


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
    labels = [f"sigma {a:.1f} to {b:.1f}" for a, b in zip(edges, edges[1:])]
    panels = {"velocity loss": [(x, y, 0, label) for y, label in zip(levels, labels)]}
    return [heading("Pretraining"),
            text("The weighted error of the velocity by noise level; in the table, over the last hundredth."),
            curves(folder / "pretraining.png", "loss by noise level", panels, "step", "log"),
            table(("", *labels), [["loss", *(f"{y[-1]:.4f}" for y in levels)]])]


def grouped_table(columns: dict[str, dict[str, str]]) -> Part:
    """Tabulate title -> metric -> cell, grouped by how independent of the reward the metrics are."""
    rows = []
    for title, names in GROUPS.items():
        rows.append([title])
        rows += [[name, *(column.get(name, "") for column in columns.values())]
                 for name in names if any(name in column for column in columns.values())]
    return table(("", *columns), rows)


def held_out_parts(values: dict[str, dict], log: list[dict]) -> list[Part]:
    """Tabulate the held-out metrics of every arm and their paired differences, sampler by sampler."""
    def cells(metrics):
        return {name: with_interval(value) for name, value in metrics.items()}

    parts, codec = [], with_key(log, "codec")[-1]["codec"]
    for sampler, arms in values.items():
        made = {arm: {name: torch.tensor(v) for name, v in metrics.items()} for arm, metrics in arms.items()}
        columns = {arm: cells(metrics) for arm, metrics in made.items()}
        for entry in with_key(log, "mouth_distance"):        # of all clips together; the last one counts
            if entry["sampler"] == sampler and entry["arm"] in columns:
                columns[entry["arm"]]["mouth_distance"] = f"{entry['mouth_distance']:.3f}"
        alone = {"codec alone": {name: f"{value:.3f}" for name, value in codec.items()}}
        count = len(next(iter(made.values()))["psnr"])
        how = "as by sample.py" if sampler == "ode" else "with noise, as in rollouts"
        parts += [heading(f"Held-out clips, {sampler}"),
                  text(f"{count} clips, generated from portrait and sound {how}; mean ± 95% interval."),
                  grouped_table(alone | columns)]
        if differences := {title: cells(metrics) for title, metrics in paired(made).items()}:
            parts += [text("Differences, clip by clip:"), grouped_table(differences)]
    return parts


def how_it_was_made(log: list[dict]) -> list[Part]:
    """List commands, hardware, seed, and where the time went."""
    sessions, updates = with_key(log, "config"), with_key(log, "parts")
    spent, before = Counter(), 0
    for entry in log:
        if "config" in entry:                        # a session begins, and its seconds count from 0
            before = 0
        stage = entry.get("stage") or next(name for key, name in ENDS.items() if key in entry)
        spent[stage] += entry["seconds"] - before
        before = entry["seconds"]
    run, machines = sessions[-1], dict.fromkeys(entry["hardware"] for entry in with_key(sessions, "hardware"))
    rows = {"hardware": " / ".join(machines), "seed": f"{run['seed']}",
            "generator": f"{run['parameters'] / 1e6:.2f} M parameters, {run['config']['size']} pixels",
            "minutes": f"{sum(spent.values()) / 60:.1f}"}
    rows |= {"sound": run["sound"]} if run.get("sound") else {}
    rows |= {f"minutes of {stage}": f"{seconds / 60:.1f}" for stage, seconds in spent.items()}
    if updates:
        rows |= {f"seconds an update, {stage}": f"{np.mean([e['seconds_for'][stage] for e in updates]):.2f}"
                 for stage in updates[0]["seconds_for"]}
        rows["unrated videos"] = f"{sum(entry['components']['total']['unrated'] for entry in updates)}"
    rows |= {entry["control"]: f"{entry['steps']} steps in {entry['cpu_seconds']:.0f} CPU-seconds"
             for entry in with_key(log, "control")}
    commands = "\n".join(entry["command"] for entry in with_key(sessions, "command"))
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
    if (sheet := folder / "sheet.png").exists():
        parts += [heading("Stills"), text(f"From top to bottom: {', '.join(arms)}."),
                  picture(sheet, "stills of the same frames")]
    write_page(folder / "report", title, parts + how_it_was_made(log))
