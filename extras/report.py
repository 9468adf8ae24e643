"""What a run shows at its end: report.md and its curves.

Made of log.jsonl and held_out.json alone, so that a resumed run reports the whole of itself.
"""

import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from data import replacing, with_interval

PRETRAINED, CURATED, POST_TRAINED = "pretrained", "curated", "post-trained"          # the arms
MORE_PRETRAINING, MORE_CURATION, UNCURATED = "more pretraining", "more curation", "GRPO without curation"
# Which arm is compared with which: with what it started from, and with the same CPU time spent otherwise.
PAIRS = [(CURATED, PRETRAINED), (POST_TRAINED, CURATED), (POST_TRAINED, PRETRAINED), (POST_TRAINED, MORE_CURATION),
         (UNCURATED, MORE_PRETRAINING), (POST_TRAINED, MORE_PRETRAINING)]
ENDS = {"codec_step": "the codec", "config": "preparation", "funnel": "rating", "control": "measuring",
        "held_out": "measuring", "rewarded": "measuring"}              # what a line without a stage of training ends
GROUPS = {  # how independent of the reward a metric is
    "no part of the reward contains or resembles them": (
        "lip_sync", "mouth_own", "mouth_late", "mouth_other", "over_late", "over_other", "offset", "mouth_psnr",
        "psnr"),
    "measured by another network of the same make as the reward's": (
        "sync_confidence", "sync_own", "mouth_distance", "identity"),
    "resembled by a part of the reward": (
        "amplitude", "head", "motion", "jerk_ratio", "jerk", "seam", "still_psnr")}


def hardware(device: str, processes: int) -> str:
    """Name the GPU, or the CPU, and the threads of each process."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in (info.read_text().splitlines() if info.exists() else ())
             if line.startswith("model name")]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else (names or [platform.machine()])[0]
    return f"{name}, {torch.get_num_threads()} CPU threads" + f" in each of {processes} processes" * (processes > 1)


def paired(made: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Subtract metrics of one arm from another's, clip by clip, as PAIRS lists them. Returns: title -> metrics."""
    shown = [(a, b) for a, b in PAIRS if a in made and b in made]
    return {f"{a} minus {b}": {k: v - made[b][k] for k, v in made[a].items()} for a, b in shown}


def read(text: str):
    """Read JSON, in which null stands for what is no number."""
    def numbers(value):
        if isinstance(value, dict):
            return {key: numbers(part) for key, part in value.items()}
        if isinstance(value, list):
            return [numbers(part) for part in value]
        return math.nan if value is None else value
    return numbers(json.loads(text))


def having(entries: list[dict], key: str) -> list[dict]:
    """Choose the entries of a log that have this key."""
    return [e for e in entries if key in e]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


# ---------------------------------------------------------------- the funnel: what was found, and what was picked

def funnel(strengths: dict[str, Tensor], ratings: Tensor, picked: Tensor) -> list[dict]:
    """Say of each fault how many clips have it, what the judge rates them, and what is left among those it picks.

    Args:    strengths: fault -> (N,), 0 for none; ratings (N, 3); picked (n,) rows.
    Returns: a row for each fault. `auc` is the chance that a rating tells a clip with the fault from one without, for
             the aspect that tells best: .5 is guessing, 1 is always.
    """
    def auc(good, bad):
        return mannwhitneyu(good, bad).statistic / (len(good) * len(bad)) if len(good) and len(bad) else math.nan

    rows, known = [], ratings.isfinite().all(1)
    for name, strength in strengths.items():
        has = strength != 0
        aucs = [auc(ratings[~has & known, a], ratings[has & known, a]) for a in range(ratings.shape[1])]
        best = int(np.argmax(aucs))
        rows.append({"fault": name, "share": has.double().mean().item(), "strength": size(strength),
                     "rated_with": ratings[has & known].mean(0).tolist(),
                     "rated_without": ratings[~has & known].mean(0).tolist(), "auc": float(aucs[best]), "aspect": best,
                     "share_picked": has[picked].double().mean().item(), "strength_picked": size(strength[picked])})
    return rows


def size(strength: Tensor) -> float:
    """Return the mean strength over all clips, those without the fault included."""
    return strength.abs().double().mean().item()


def funnel_table(rows: list[dict], aspects=("lip-sync", "expressiveness", "motion")) -> str:
    """Write the funnel as a table in Markdown."""
    def rated(values):
        return " / ".join(f"{value:.1f}" for value in values)

    head = ("fault", "share of clips", "mean strength", f"rated ({' / '.join(aspects)}) with it", "without",
            "found by", "AUC", "share of picks", "mean strength")
    return markdown_table(head, [
        (r["fault"], f"{r['share']:.0%}", f"{r['strength']:.2f}", rated(r["rated_with"]), rated(r["rated_without"]),
         aspects[r["aspect"]], f"{r['auc']:.2f}", f"{r['share_picked']:.0%}", f"{r['strength_picked']:.2f}")
        for r in rows])


# ---------------------------------------------------------------- curves

def draw_curves(path: Path, panels: dict[str, list[tuple]], unit: str, scale: str = "linear") -> None:
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


def facts(entries: list[dict]) -> str:
    """Tell how a run was made: commands, hardware, seed, and where its time went."""
    sessions, updates = having(entries, "config"), having(entries, "parts")
    spent, before = Counter(), {"seconds": 0}
    for e in entries:                                # seconds count from the start of each session
        stage = e.get("stage") or next(name for key, name in ENDS.items() if key in e)
        goes_on = e["seconds"] >= before["seconds"]
        spent[stage] += e["seconds"] - before["seconds"] * goes_on
        before = e
    last = sessions[-1]
    rows = [("hardware", " / ".join(dict.fromkeys(s["hardware"] for s in having(sessions, "hardware")))),
            ("seed", f"{last['seed']}"),
            ("generator", f"{last['parameters'] / 1e6:.2f} M parameters, {last['config']['size']} pixels"),
            ("minutes", f"{sum(spent.values()) / 60:.1f}"),
            *((f"minutes of {stage}", f"{seconds / 60:.1f}") for stage, seconds in spent.items())]
    for stage in updates[0]["seconds_for"] if updates else ():
        rows.append((f"seconds an update, {stage}", f"{np.mean([e['seconds_for'][stage] for e in updates]):.2f}"))
    if updates:
        rows.append(("unrated videos", f"{sum(e['components']['total']['unrated'] for e in updates)}"))
    for e in having(entries, "control"):
        rows.append((e["control"], f"{e['steps']} steps in {e['cpu_seconds']:.0f} CPU-seconds"))
    commands = "\n".join(s["command"] for s in having(sessions, "command"))
    return f"```sh\n{commands}\n```\n\n" + markdown_table(("", ""), rows)


# ---------------------------------------------------------------- parts of the report

def funnel_part(entries: list[dict]) -> str:
    """Tabulate what was found and what the judge picked. Returns: Markdown, empty without a funnel."""
    found = having(entries, "funnel")
    if not found:
        return ""
    return ("\n## What was found, and what the judge picked\n\nEach clip's faults are kept with its truth; nothing "
            "that trains, judges or picks reads them. The embedded judge knows what to look for: it was taught on "
            "flawless talkers with faults of these kinds, labelled by the mouth that lip_sync reads, but for "
            "compression, which it never met.\n\n" + funnel_table(found[-1]["funnel"]))


def loss_part(folder: Path, entries: list[dict]) -> str:
    """Draw the loss of pretraining by noise level. Returns: Markdown, empty without such steps."""
    steps = [e for e in having(entries, "loss_by_sigma") if e["stage"] == "pretraining"]
    if not steps:
        return ""
    blocks = np.array_split(np.array([[e["step"], *e["loss_by_sigma"]] for e in steps], float), min(len(steps), 100))
    with np.errstate(invalid="ignore"):              # a level that a short run never drew stays nan
        x, *bins = np.stack([np.nansum(b, 0) / np.isfinite(b).sum(0) for b in blocks], 1)
    edges = np.linspace(0, 1, len(bins) + 1)
    labels = [f"sigma {a:.1f} to {b:.1f}" for a, b in zip(edges, edges[1:])]
    draw_curves(folder / "pretraining.png", {"velocity loss": [(x, y, 0, name) for y, name in zip(bins, labels)]},
                "step", "log")
    return ("\n## Pretraining\n\nThe weighted error of the velocity by noise level; below the picture, its mean over "
            "the last hundredth.\n\n![loss by noise level](pretraining.png)\n\n"
            + markdown_table(labels, [[f"{y[-1]:.4f}" for y in bins]]))


def looks_part(folder: Path, entries: list[dict]) -> str:
    """Draw the watched metrics of every stage, and tabulate which step was kept and what the last one had come to."""
    looks, text = having(entries, "watched"), ""
    by_stage = {stage: [e for e in looks if e["stage"] == stage] for stage in dict.fromkeys(e["stage"] for e in looks)}
    if not looks:
        return text
    places = {stage: [e.get("step", e.get("update")) for e in some] for stage, some in by_stage.items()}
    panels = {name: [(np.array(places[stage]) / max(places[stage][-1], 1), [e["watched"][name] for e in some], 0, stage)
                     for stage, some in by_stage.items()] for name in looks[0]["watched"]}
    draw_curves(folder / "watched.png", panels, "share of the stage")
    rows = []
    for stage, some in by_stage.items():
        kept = next(e for e in some if e.get("step", e.get("update")) == some[-1]["best"])
        for what, e in (("kept", kept), ("last", some[-1])):
            values = [f"{value:.3f}" for value in e["watched"].values()]
            rows.append([stage, f"{what}, {e.get('step', e.get('update'))}", *values])
    return ("\n## On the way\n\nMetrics of the moving average on the watched clips, which choose what is kept.\n\n"
            "![watched metrics](watched.png)\n\n"
            + markdown_table(("stage", "step", *looks[0]["watched"]), rows))


def reward_part(folder: Path, entries: list[dict]) -> str:
    """Draw the reward's components over the updates. Returns: Markdown, empty without updates."""
    updates = [e for e in having(entries, "parts") if e["stage"] == "post-training"]
    if not updates:
        return ""
    x, panels = [e["update"] for e in updates], {}
    for name in [name for name, of in updates[0]["components"].items() if "mean" in of]:
        mean, std = ([e["components"][name][of] for e in updates] for of in ("mean", "group_std"))
        panels[name] = [(x, mean, np.array(std), name)]
    draw_curves(folder / "rewards.png", panels | {"reward": [(x, [e["reward"] for e in updates], 0, "")]}, "update")
    return ("\n## Post-training\n\nThe reward of rollouts and its components; shaded, a group's standard deviation.\n\n"
            "![reward over updates](rewards.png)\n")


def held_out_part(values: dict[str, dict], entries: list[dict]) -> str:
    """Tabulate the held-out metrics of every arm and their paired differences. Returns: Markdown."""
    text, codec = "", having(entries, "codec")[-1]["codec"]
    for sampler, made in values.items():
        made = {arm: {k: torch.tensor(v) for k, v in metrics.items()} for arm, metrics in made.items()}
        logged = {e["arm"]: e for e in entries if e.get("sampler") == sampler}                   # the last one counts
        differences, names = paired(made), next(iter(made.values()))

        def row(name, columns, codec_too):
            return [name, *([f"{codec.get(name, math.nan):.3f}"] if codec_too else []),
                    *(with_interval(c[name]) for c in columns.values())]

        def rows(columns, codec_too=False):
            for title, members in GROUPS.items():
                yield [f"*{title}*", *[""] * (len(columns) + codec_too)]
                yield from (row(name, columns, codec_too) for name in members if name in names)
                if codec_too and "mouth_distance" in members and all("mouth_distance" in e for e in logged.values()):
                    yield ["mouth_distance", "", *(f"{logged[arm]['mouth_distance']:.3f}" for arm in made)]
        text += (f"\n## Held-out clips, {sampler}\n\n{len(names['psnr'])} clips, generated from portrait and sound; "
                 "mean ± 95% interval.\n\n" + markdown_table(("", "codec alone", *made), rows(made, True)))
        if differences:
            text += ("\nDifferences, clip by clip:\n\n" + markdown_table(("", *differences), rows(differences)))
    return text


def write_report(folder: Path) -> None:
    """Write report.md and the curves that it shows, of what the run has logged and measured."""
    entries = [read(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    values = read((folder / "held_out.json").read_text())
    by_reward = "".join(f"\n## By the reward\n\n```\n{e['rewarded']}\n```\n" for e in having(entries, "rewarded")[-1:])
    text = (f"# {folder.resolve().name}\n\n" + facts(entries) + funnel_part(entries) + held_out_part(values, entries)
            + by_reward + looks_part(folder, entries) + reward_part(folder, entries) + loss_part(folder, entries)
            + f"\n## Pictures\n\nTruth above {', '.join(values['ode'])}; all side by side, with sound, in "
              "[sample.mp4](sample.mp4).\n\n![truth above generated](sheet.png)\n")
    with replacing(folder / "report.md") as path:
        path.write_text(text)
