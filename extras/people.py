"""Ask people: does the judge agree with them, and which of two runs do they prefer?

    python -m extras.people align ratings.csv                        columns video, aspect, rating; --judge names one
    python -m extras.people study runs/one runs/other --out study    a page of pairs of videos, blind
    python -m extras.people tally votes-*.json --key study/key.json  what they preferred

1. Agreement. Correlations of the judge's ratings with people's, how well people agree with people, and a monotone
   calibration of the judge's scale to theirs, which --calibration of train.py takes.
2. A study. Pairs of videos of two runs, same portrait, same speech, same noise; and its votes, counted exactly.
"""

import argparse
import csv
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor
from tqdm import tqdm

from data import FPS, Clip, MediaError, folder_clips, load_clip, one_line, replacing, sounds, video_uri, writing
from extras import reward_flags
from extras.reward_flags import read_json
from extras.talkers import synthetic_clips
from model import SAMPLING_STEPS, Generator, load_generator
from reward import ASPECTS, rate_whole, to_bytes
from sample import check_numbers, crop_argument, device_argument, generator, imitate

# ---------------------------------------------------------------- agreement with people

MIN_RATED = 5                                        # videos below which a calibration would fit noise


def read_ratings(path: str | Path) -> list[tuple[str, str, list[float]]]:
    """Read a CSV with the columns video, aspect, rating (1..5), one line for each rater and aspect of a video.

    Returns: (video, aspect, ratings) in order of first appearance. Raises: MediaError naming the file and the line.
    """
    rows: dict[tuple[str, str], list[float]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:                   # Excel writes a byte order mark
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if missing := [name for name in ("video", "aspect", "rating") if name not in columns]:
                raise MediaError(path, f"line 1 lacks {', '.join(missing)}; begin it with video,aspect,rating")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                video, aspect, rating = ((row[name] or "").strip() for name in ("video", "aspect", "rating"))
                if not video or aspect not in ASPECTS:
                    raise MediaError(where, f"{video=} {aspect=}; name a video and one of {', '.join(ASPECTS)}")
                with suppress(ValueError):
                    if 1 <= float(rating) <= 5:
                        rows.setdefault((video, aspect), []).append(float(rating))
                        continue
                raise MediaError(where, f"{rating=} is not a rating; write a number from 1 to 5")
    except OSError as error:
        raise MediaError(path, f"cannot be read ({error.strerror}); name a CSV of ratings") from None
    except (UnicodeDecodeError, csv.Error):
        raise MediaError(path, "is not text; save it as CSV in UTF-8") from None
    if not rows:
        raise MediaError(path, "holds no ratings; write one a line: video,aspect,rating")
    return [(video, aspect, ratings) for (video, aspect), ratings in rows.items()]


def spearman(a, b) -> float:
    return float(stats.spearmanr(a, b).statistic)


def kendall(a, b) -> float:
    return float(stats.kendalltau(a, b).statistic)


def pairwise_accuracy(judge, truth, groups=None, least: float = 0.0) -> float:
    """Share of the pairs that differ in the truth, by `least` or more, that the judge ranks alike.

    A tie is half right. Args: judge, truth (n,); groups (n,): only pairs inside a group count, as in GRPO.
    Returns: 0..1, nan without a pair.
    """
    judge, truth = np.asarray(judge, float), np.asarray(truth, float)
    by_judge = judge[:, None] - judge                # (n, n): item i against item j
    by_truth = truth[:, None] - truth
    counts = (by_truth != 0) & (np.abs(by_truth) >= least)
    if groups is not None:
        counts &= np.equal.outer(np.asarray(groups), np.asarray(groups))
    right = (1 + np.sign(by_judge) * np.sign(by_truth)) / 2
    return float(right[counts].mean()) if counts.any() else math.nan


def bootstrap(statistic: Callable, *samples) -> tuple[float, float, float]:
    """Return statistic(*samples) and its 95% percentile interval over 1000 resamplings of the items.

    Resamplings for which it is not defined are left out; of fewer than two items all three are nan.
    """
    samples = [np.asarray(x, float) for x in samples]
    if len(samples[0]) < 2:
        return math.nan, math.nan, math.nan
    with warnings.catch_warnings():                  # a resampling of equal items has no correlation
        warnings.simplefilter("ignore")
        draws = stats.bootstrap(samples, statistic, paired=True, vectorized=False, n_resamples=1000,
                                method="percentile", rng=0).bootstrap_distribution
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        return float(statistic(*samples)), float(low), float(high)


def rater_ceiling(ratings: Sequence[Sequence[float]], n: int = 200, seed: int = 0) -> float:
    """Measure how well people agree with people: Spearman between the means of two random halves of the raters.

    Raters are anonymous, so every video's ratings are split by themselves, n times; the mean is returned. Half of the
    raters are noisier than all: a judge compared with the mean of all may come out above it. Videos with one rating
    say nothing; nan when fewer than two videos have more.
    """
    ratings, rng = [np.array(r, float) for r in ratings if len(r) > 1], np.random.default_rng(seed)
    split = lambda r: (r[: len(r) // 2].mean(), r[len(r) // 2 :].mean())
    if len(ratings) < 2:
        return math.nan
    with warnings.catch_warnings():                  # halves in which all videos are equal
        warnings.simplefilter("ignore")
        trials = [spearman(*zip(*(split(rng.permutation(r)) for r in ratings))) for _ in range(n)]
        return float(np.nanmean(trials))


def isotonic(x, y) -> tuple[np.ndarray, np.ndarray]:
    """Fit the non-decreasing function with the least squared error, a staircase of blocks.

    Args: x, y (n,). Returns: the blocks' mean x and mean y (K,), both strictly increasing.
    """
    x, place, count = np.unique(x, return_inverse=True, return_counts=True)    # equal x must get equal y
    fit = optimize.isotonic_regression(np.bincount(place, y) / count, weights=count)
    starts = fit.blocks[:-1]
    mean_x = np.add.reduceat(x * count, starts) / np.add.reduceat(count, starts)
    return mean_x, fit.x[starts]


def save_calibration(path: str | Path, calibration: dict) -> None:
    """Write {aspect: (knots_x, knots_y)} as JSON."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps({aspect: [list(map(float, k)) for k in knots]
                                         for aspect, knots in calibration.items()}, indent=1) + "\n")


def align(judge_scores: dict[tuple[str, str], float], rows: list[tuple[str, str, list[float]]],
          out: Path | None = None) -> str:
    """Compare the judge with the mean of the raters, aspect by aspect, and save monotone calibrations to `out`.

    Args:    judge_scores {(video, aspect): score}; rows as read_ratings gives. Returns: the table, to be printed.
    """
    lines = [f"{'aspect':15}{'videos':>7}{'ratings':>9}   {'Spearman':22}{'Kendall':22}{'pairs ranked alike':22}raters"]
    notes, calibration = [], {}
    for aspect in ASPECTS:
        rated = {video: ratings for video, name, ratings in rows if name == aspect}
        if missing := [video for video in rated if (video, aspect) not in judge_scores]:
            raise MediaError(missing[0], f"people rated its {aspect}, the judge did not; score it or drop the rating")
        judge, people = [judge_scores[video, aspect] for video in rated], [np.mean(r) for r in rated.values()]
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(f, judge, people))
                 for f in (spearman, kendall, pairwise_accuracy)]
        lines.append(f"{aspect:15}{len(rated):7}{sum(map(len, rated.values())):9}   "
                     f"{''.join(f'{cell:22}' for cell in cells)}{rater_ceiling(list(rated.values())):.2f}")
        knots = isotonic(judge, people) if len(rated) >= MIN_RATED else ()
        if knots and len(knots[0]) > 1:
            calibration[aspect] = knots
        else:                                        # a single block would give every video the same reward
            notes.append(f"{aspect}: no calibration; " + ("the judge does not rise with people's ratings" if knots else
                                                          f"{len(rated)} videos rated, {MIN_RATED} needed"))
    if out and calibration:
        save_calibration(out, calibration)
        notes.append(f"calibration of {', '.join(calibration)} saved to {out}")
    return "\n".join(lines + notes)


def align_judge(args: argparse.Namespace) -> None:
    """Rate every video that people rated, compare, and fit the calibration. Paths are relative to the table."""
    rows, scores = read_ratings(args.ratings), {}    # a calibration fits raw ratings
    judge = reward_flags.make_judge(args)
    if judge is None:
        raise MediaError("--judge none", "rates nothing; name a judge")
    for video in tqdm(dict.fromkeys(video for video, _, _ in rows), "rating", leave=False):
        clip = load_clip(args.ratings.parent / video, args.size, args.crop)
        rated = rate_whole(judge, clip.frames[None] / 255, clip.audio[None], [video])[0][0]
        scores |= {(video, aspect): score for aspect, score in zip(ASPECTS, rated.tolist())}
    print(align(scores, rows, args.out))


# ---------------------------------------------------------------- votes on pairs of videos

CHOICES = ("left", "right", "tie")                   # of a rater, for each of ASPECTS and "overall"


def share(k: int, n: int) -> str:
    """Write k of n with its exact 95% interval (Clopper and Pearson, 1934)."""
    if n == 0:
        return "no vote"
    low, high = stats.binomtest(k, n).proportion_ci(method="exact")
    return f"{k / n:.3f} [{low:.3f}, {high:.3f}]"


def tally(paths: Sequence[Path], key_path: Path) -> str:
    """Count the votes of a study, aspect by aspect, and compare them with the judge's ratings if the key has any.

    Intervals take every vote as independent: those of one rater, or on one pair, are not quite.
    Returns: the table. Raises: MediaError for bad files, unknown pairs, another study's votes, a rater counted twice.
    """
    key = read_json(key_path, "the key of a study", lambda k: {k["study"], k["a"], k["b"]} and all(
        {pair["left"], pair["right"]} == {"a", "b"} for pair in k["pairs"].values()))
    raters, votes = {}, []                           # votes: (aspect, "a", "b" or "tie", the judge's choice or None)
    for path in paths:
        read = read_json(path, "a file of votes", lambda v: {v["study"], v["rater"]} and all(
            a in (*ASPECTS, "overall") and c in CHOICES for pair in v["votes"].values() for a, c in pair.items()))
        if read["study"] != key["study"]:
            raise MediaError(path, f"holds votes of study {read['study']}; the key is of {key['study']}")
        if read["rater"] in raters:
            raise MediaError(path, f"is of the same rater as {raters[read['rater']]}; leave one out")
        raters[read["rater"]] = path
        if unknown := sorted(read["votes"].keys() - key["pairs"].keys()):
            raise MediaError(path, f"votes on the unknown pair {unknown[0]}; the key has {len(key['pairs'])} pairs")
        for name, choices in read["votes"].items():
            pair = key["pairs"][name]
            rated = {a: dict(zip(ASPECTS, scores)) for a, scores in pair.get("judge", {}).items()}
            for aspect, choice in choices.items():
                a, b = (rated.get(run, {}).get(aspect) for run in "ab")
                votes.append((aspect, pair.get(choice, "tie"), None if a is None or a == b else "a" if a > b else "b"))
    lines = [f"{len(raters)} raters, {len(key['pairs'])} pairs; a: {key['a']}, b: {key['b']}; exact 95% intervals",
             f"{'':15}{'a':>5}{'b':>5}{'no difference':>15}   {'a wins of a + b':24}the judge chooses alike"]
    for aspect in (*ASPECTS, "overall"):
        cast = [(choice, judged) for name, choice, judged in votes if name == aspect]
        a, b, ties = (sum(choice == name for choice, _ in cast) for name in ("a", "b", "tie"))
        both = [choice == judged for choice, judged in cast if choice != "tie" and judged]
        alike = f"{share(sum(both), len(both))} of {len(both)}" if both else "-"
        lines.append(f"{aspect:15}{a:5}{b:5}{ties:15}   {share(a, a + b):24}{alike}")
    return "\n".join(lines)


# ---------------------------------------------------------------- a study: let people choose

STUDY_PAGE = Path(__file__).parents[1] / "assets" / "study.html"
HELD_OUT_SEED = 2_000_000                            # drawn talkers of studies and exams: other people and speech
STUDY_SECONDS = 3.0                                  # of a clip, unless --max-seconds says otherwise
STUDY_SIDE = 256                                     # pixels that small pictures are enlarged to, at least half of it


def study_clips(args: argparse.Namespace, models: Sequence[Generator]) -> tuple[list[Clip], int]:
    """Return held-out clips and their frames, which are whole chunks of both models. Raises: MediaError for none."""
    sizes = [model.config.size for model in models]
    if sizes[0] != sizes[1]:
        raise MediaError(args.runs[1], f"makes pictures of {sizes[1]} pixels, {args.runs[0]} of {sizes[0]}; compare "
                                        "runs of one size")
    seconds, chunk = args.max_seconds or STUDY_SECONDS, math.lcm(*(model.config.chunk_frames for model in models))
    frames = round(seconds * FPS) // chunk * chunk
    if args.data:
        clips = folder_clips(args.data, sizes[0], seconds, args.crop, frames=frames)[1]
    else:
        clips = synthetic_clips(args.clips, sizes[0], seconds, HELD_OUT_SEED + args.seed)
    if not clips or not frames:
        raise MediaError(args.data or "--max-seconds", f"gives no held-out clip of {max(frames, chunk)} frames")
    chosen = torch.randperm(len(clips), generator=generator(args.seed, 0))[:args.clips]
    return [clips[i] for i in chosen.tolist()], frames


def data_uri(frames: Tensor, audio: Tensor) -> str:
    """Write a video (F, 3, S, S) in [0, 1] with its sound, enlarged, as an mp4 in a base64 data URI."""
    scale = max(1, STUDY_SIDE // frames.shape[-1])
    return video_uri(to_bytes(frames).repeat_interleave(scale, -1).repeat_interleave(scale, -2), audio)


def study(args: argparse.Namespace) -> None:
    """Write DIR/study.html, pairs of videos of two runs to choose from, and DIR/key.json, which alone tells whose is
    whose: the same portrait, speech and noise for both, each run on the left in half of the pairs, drawn by the seed.

    Noise is the same where the runs' chunks are; else it comes from the same seed.
    """
    out, judge = Path(args.out), reward_flags.make_judge(args)
    if (out / "key.json").exists():
        raise MediaError(out / "key.json", "is the key of a study that may have votes; choose another --out")
    models = [load_generator(run).to(args.device).eval() for run in args.runs]
    clips, frames = study_clips(args, models)
    with writing(out):                                   # before the work that would be lost
        out.mkdir(parents=True, exist_ok=True)
    audio = sounds(clips, frames)
    videos = {run: imitate(model, clips, frames, args.steps, args.guidance, args.seed)
              for run, model in zip("ab", models)}
    names = [clip.name for clip in clips]
    ratings = {run: rate_whole(judge, v, audio, names)[0].tolist() for run, v in videos.items()} if judge else {}
    swapped = torch.randperm(len(clips), generator=generator(args.seed, 1)) % 2 == 1
    pairs, key = [], {}
    for i, clip in enumerate(tqdm(clips, "pairs", leave=False)):
        name, sides = f"{i + 1:03}", dict(zip(("left", "right"), "ba" if swapped[i] else "ab"))
        pairs.append({"id": name, **{side: data_uri(videos[run][i], audio[i]) for side, run in sides.items()}})
        key[name] = sides | {"clip": clip.name} | ({"judge": {r: s[i] for r, s in ratings.items()}} if judge else {})
    number = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:12]             # of what the page shows anyway
    page = STUDY_PAGE.read_text().replace("STUDY</", json.dumps({"study": number, "pairs": pairs}) + "</")
    runs = dict(zip("ab", args.runs))
    for name, text in (("study.html", page),
                       ("key.json", json.dumps({"study": number, **runs, "seed": args.seed, "pairs": key}, indent=1))):
        with replacing(out / name) as path:
            path.write_text(text)
    print(f"{out}/study.html: {len(pairs)} pairs, to be opened in a browser or sent; keep {out}/key.json to yourself\n"
          f"then: python -m extras.people tally votes.json --key {out}/key.json")


# ---------------------------------------------------------------- command line

def study_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of a study; a judge that they name rates the same clips."""
    p.add_argument("runs", nargs=2, metavar="RUN", help="the two runs to be compared")
    p.add_argument("--out", required=True, help="the folder of the study")
    p.add_argument("--clips", type=int, default=12, help="pairs, of held-out clips (default 12)")
    p.add_argument("--data", type=Path, help="a folder of real clips; without it, drawn talkers")
    p.add_argument("--crop", type=crop_argument, help="x,y,size: use this square of the clips, in pixels")
    p.add_argument("--steps", type=int, default=SAMPLING_STEPS, help="flow steps per chunk (default %(default)s)")
    p.add_argument("--guidance", type=float, default=1.0,
                   help="how far to exaggerate what the sound adds; 1: as learned (default 1)")
    p.add_argument("--seed", type=int, default=0, help="of clips, noise and sides (default 0)")
    p.add_argument("--max-seconds", type=float, help=f"the length of a clip (default {STUDY_SECONDS:g})")
    p.add_argument("--device", type=device_argument, default=device_argument(), help="default: cuda if present")
    reward_flags.judge_flags(p)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m extras.people", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="command", required=True)
    study_flags(of_study := commands.add_parser("study", help="which of two runs do people prefer?"))
    of_tally = commands.add_parser("tally", help="count the votes of a study")
    of_tally.add_argument("votes", nargs="+", type=Path, help="what the raters saved")
    of_tally.add_argument("--key", type=Path, required=True, help="the key.json that the study wrote")
    of_align = commands.add_parser("align", help="compare the judge with people's ratings and fit a calibration")
    of_align.add_argument("ratings", type=Path, help="a CSV with the columns video, aspect, rating")
    of_align.add_argument("--out", type=Path, default="calibration.json",
                          help="the calibration to write (%(default)s)")
    of_align.add_argument("--size", type=int, default=64, help="pixels per side of what is seen (%(default)s)")
    of_align.add_argument("--crop", type=crop_argument, help="x,y,size in pixels; without it, the centre square")
    of_align.add_argument("--device", type=device_argument, default=device_argument(),
                          help="for the judge (%(default)s)")
    of_align.set_defaults(data=None)
    reward_flags.judge_flags(of_align)
    args = p.parse_args(argv)
    if args.command == "study":
        check_numbers(of_study, args, steps=1, guidance=0, seed=0, clips=1, max_seconds=1)
    if args.command == "align":
        check_numbers(of_align, args, size=32)
        if args.out.is_dir():
            of_align.error(f"--out {args.out} is a folder; name the file to write the calibration to")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.command == "study":
        study(args)
    elif args.command == "tally":
        print(tally(args.votes, args.key))
    else:
        align_judge(args)


if __name__ == "__main__":
    with one_line("stopped; nothing was written", "lower --max-seconds, --clips or --size, or use --device cpu"):
        main()
