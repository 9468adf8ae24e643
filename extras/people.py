"""Ask people: does the judge agree with them, and which of two runs do they prefer?

    python -m extras.people align ratings.csv                         a table of video, aspect, rating
    python -m extras.people study runs/one runs/other --out study     a page of pairs of videos, blind
    python -m extras.people tally votes-*.json --key study/key.json   what they preferred

1. Agreement. The correlation of the judge's ratings with people's, how well people agree with people, and a
   monotone calibration of the judge's scale to theirs, which --calibration of train.py takes.
2. A study. Pairs of videos of two runs, same portrait, speech and noise; and its votes, with exact intervals.
"""

import argparse
import csv
import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import optimize, stats
from tqdm import tqdm

from data import Clip, folder_clips, load_clip, sounds, to_bytes
from extras.arguments import CROP_HELP, Parser, check_numbers, crop_argument
from extras.files import MediaError, check_new, one_line, replacing, writing
from extras.media import FPS
from extras.page import video_uri
from extras import reward_flags
from extras.reward_flags import read_json
from extras.talkers import synthetic_clips
from model import Generator, load_generator
from reward import ASPECTS, NO_JUDGE, Unrated, rate_whole
from sample import imitate

# ---------------------------------------------------------------- agreement with people

MIN_RATED = 5                       # videos below which a calibration would fit noise
RatingTable = dict[str, dict[str, list[float]]]      # aspect -> video -> the ratings of its raters


def read_ratings(path: Path) -> RatingTable:
    """Read a CSV of video, aspect, rating (1..5), one line for each rater and aspect of a video."""
    ratings = {aspect: {} for aspect in ASPECTS}
    with open(path, newline="", encoding="utf-8-sig") as file:            # Excel writes a byte order mark
        reader = csv.DictReader(file)
        try:
            for row in reader:
                video, rating = row["video"].strip(), float(row["rating"])
                if not video or not 1 <= rating <= 5:
                    raise ValueError
                ratings[row["aspect"].strip()].setdefault(video, []).append(rating)
        except (KeyError, ValueError, TypeError, AttributeError, csv.Error):
            raise MediaError(f"{path}, line {reader.line_num}", "want text in UTF-8 that begins with "
                             "video,aspect,rating, then names a video, an aspect of "
                             f"{', '.join(ASPECTS)}, and a rating from 1 to 5") from None
    if not any(ratings.values()):
        raise MediaError(path, "holds no ratings; write one a line: video,aspect,rating")
    return ratings


def spearman(a, b) -> float:
    return float(stats.spearmanr(a, b).statistic)


def pairwise_accuracy(judge, truth, groups=None, least: float = 0.0) -> float:
    """Share of the pairs that differ in the truth, by `least` or more, that the judge ranks alike.

    A tie is half right. Args: judge, truth (n,); groups (n,): only pairs inside a group count, as in GRPO.
    Returns: 0..1, nan without a pair.
    """
    judge, truth = np.asarray(judge, float), np.asarray(truth, float)
    by_judge = judge[:, None] - judge                       # (n, n): item i against item j
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
        return float(statistic(*samples)), *np.nanpercentile(draws, [2.5, 97.5]).tolist()


def rater_ceiling(ratings: Sequence[Sequence[float]]) -> float:
    """Measure how well people agree: Spearman between the means of two random halves of the raters.

    Raters are anonymous, so every video's ratings are split by themselves, 200 times, for the mean. Half of
    the raters are noisier than all: a judge compared with the mean of all may come out above it. Videos with
    one rating say nothing; nan when fewer than two videos have more.
    """
    ratings, rng = [np.array(r, float) for r in ratings if len(r) > 1], np.random.default_rng(0)
    if len(ratings) < 2:
        return math.nan
    trials = []
    with warnings.catch_warnings():                  # halves in which all videos are equal have none
        warnings.simplefilter("ignore")
        for _ in range(200):
            halves = [np.array_split(rng.permutation(r), 2) for r in ratings]
            trials.append(spearman(*zip(*((a.mean(), b.mean()) for a, b in halves))))
        return float(np.nanmean(trials))


def isotonic(x, y) -> tuple[np.ndarray, np.ndarray]:
    """Fit the non-decreasing function with the least squared error, a staircase of blocks.

    Args: x, y (n,). Returns: the blocks' mean x and mean y (K,), both strictly increasing.
    """
    x, place, count = np.unique(x, return_inverse=True, return_counts=True)     # equal x must get equal y
    fit = optimize.isotonic_regression(np.bincount(place, y) / count, weights=count)
    starts = fit.blocks[:-1]
    mean_x = np.add.reduceat(x * count, starts) / np.add.reduceat(count, starts)
    return mean_x, fit.x[starts]


def align(scores: dict[str, Sequence[float]], ratings: RatingTable, out: Path) -> str:
    """Compare the judge with the mean of the raters, aspect by aspect, and save calibrations to `out`.

    Args: scores: video -> the judge's, in the order of ASPECTS. Returns: the table, to be printed.
    """
    lines = [f"{'aspect':15}{'videos':>7}{'ratings':>9}   {'Spearman':22}{'pairs ranked alike':22}raters"]
    notes, calibration = [], {}
    for i, (aspect, rated) in enumerate(ratings.items()):
        judge, people = [scores[video][i] for video in rated], [np.mean(r) for r in rated.values()]
        rank, pairs = ("{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(agreement, judge, people))
                       for agreement in (spearman, pairwise_accuracy))
        lines.append(f"{aspect:15}{len(rated):7}{sum(map(len, rated.values())):9}   {rank:22}{pairs:22}"
                     f"{rater_ceiling(list(rated.values())):.2f}")
        knots = np.array(isotonic(judge, people)) if len(rated) >= MIN_RATED else np.empty((2, 0))
        if knots.shape[1] > 1:                       # a single block would give every video the same reward
            calibration[aspect] = knots.tolist()
        else:
            notes.append(f"{aspect}: no calibration; it needs {MIN_RATED} videos, and a judge that agrees")
    if calibration:
        with replacing(out) as temporary:
            temporary.write_text(json.dumps(calibration, indent=1) + "\n")
        notes.append(f"calibration of {', '.join(calibration)} saved to {out}")
    return "\n".join(lines + notes)


def align_judge(args: argparse.Namespace) -> None:
    """Rate every video that people rated, and compare. Paths are relative to the table."""
    check_new(args.out)                              # before the judge is asked
    ratings, scores = read_ratings(args.ratings), {}
    judge = reward_flags.make_judge(args)
    if judge is None:
        raise MediaError("--judge none", "rates nothing; name a judge")
    videos = {video for rated in ratings.values() for video in rated}
    for video in tqdm(sorted(videos), "rating", leave=False):
        clip = load_clip(args.ratings.parent / video, args.size, args.crop)
        try:
            score = rate_whole(judge, clip.frames[None] / 255, clip.audio[None], [video])
            scores[video] = score[0].tolist()
        except Unrated as error:
            print(f"note: it is left out: {error}", file=sys.stderr)
    if not scores:
        raise MediaError(args.ratings, f"names no video that the judge rates; {NO_JUDGE}")
    ratings = {aspect: {video: rated[video] for video in rated if video in scores}
               for aspect, rated in ratings.items()}
    print(align(scores, ratings, args.out))


# ---------------------------------------------------------------- a study: let people choose

STUDY_PAGE = Path(__file__).parents[1] / "assets" / "study.html"
CHOICES = ("left", "right", "tie")                   # of a rater, for each of ASPECTS and "overall"
STUDY_SEED = 2_000_000           # drawn talkers of studies and exams: other people and speech
STUDY_SECONDS = 3.0                 # of a clip, unless --max-seconds says otherwise
STUDY_SIDE = 256                    # pixels that small pictures are enlarged to, at least half of it


def study_clips(args: argparse.Namespace, models: Sequence[Generator],
                rng: torch.Generator) -> tuple[list[Clip], int]:
    """Draw held-out clips. Returns: them, and their frames that are shown, whole chunks of both models."""
    one, other = (model.config for model in models)
    if one.size != other.size:
        raise MediaError(args.runs[1], f"makes pictures of {other.size} pixels, the other run of {one.size}; "
                         "compare runs of one size")
    chunk = math.lcm(one.chunk_frames, other.chunk_frames)
    frames = round(args.max_seconds * FPS) // chunk * chunk
    if args.data:
        clips = folder_clips(args.data, one.size, args.max_seconds, args.crop, frames=frames)[1]
    else:
        clips = synthetic_clips(args.clips, one.size, args.max_seconds, STUDY_SEED + args.seed)
    if not clips or not frames:
        raise MediaError(args.data or "--max-seconds", f"gives no held-out clip of {frames or chunk} frames")
    return [clips[i] for i in torch.randperm(len(clips), generator=rng)[:args.clips].tolist()], frames


def study(args: argparse.Namespace) -> None:
    """Write study.html, pairs of videos of two runs to choose from, and key.json, which alone tells whose is
    whose: the same portrait, speech and noise for both, each run on the left in half of the pairs, drawn by
    the seed. Noise is the same where the runs' chunks are; else it comes from the same seed."""
    page, key_path = args.out / "study.html", args.out / "key.json"
    for path in page, key_path:
        if path.exists():
            raise MediaError(path, "is of a study that may have votes; choose another --out")
    rng = torch.Generator().manual_seed(args.seed)
    models = [load_generator(run).to(args.device).eval() for run in args.runs]
    clips, frames = study_clips(args, models, rng)
    judge = reward_flags.make_judge(args)
    with writing(args.out):                          # before the work that would be lost
        args.out.mkdir(parents=True, exist_ok=True)
    audio, names = sounds(clips, frames), [clip.name for clip in clips]
    videos = {run: imitate(model, clips, frames, seed=args.seed) for run, model in zip("ab", models)}
    a_left = torch.randperm(len(clips), generator=rng) % 2 == 0
    scale = max(1, STUDY_SIDE // videos["a"].shape[-1])
    large = {run: to_bytes(video).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
             for run, video in videos.items()}
    pairs, key = [], {}
    for i, name in enumerate(tqdm(names, "pairs", leave=False)):
        pair, sides = f"{i + 1:03}", dict(zip(("left", "right"), "ab" if a_left[i] else "ba"))
        pairs.append({"id": pair} | {side: video_uri(large[run][i], audio[i]) for side, run in sides.items()})
        key[pair] = sides | {"clip": name}
    if judge:
        a, b = (rate_whole(judge, video, audio, names).tolist() for video in videos.values())
        for i, pair in enumerate(key.values()):
            pair["judge"] = {"a": a[i], "b": b[i]}
    number = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:12]       # of what the page shows anyway
    content = json.dumps({"study": number, "pairs": pairs})
    about = {"study": number, "a": args.runs[0], "b": args.runs[1], "seed": args.seed, "pairs": key}
    with replacing(page) as path:
        path.write_text(STUDY_PAGE.read_text().replace("STUDY</", content + "</"))
    with replacing(key_path) as path:
        path.write_text(json.dumps(about, indent=1))
    print(f"{page}: {len(pairs)} pairs, to be opened in a browser or sent; keep {key_path} to yourself\n"
          f"then: python -m extras.people tally votes.json --key {key_path}")


def share(k: int, n: int) -> str:
    """Write k of n with its exact 95% interval (Clopper and Pearson, 1934)."""
    if n == 0:
        return "no vote"
    low, high = stats.binomtest(k, n).proportion_ci(method="exact")
    return f"{k / n:.3f} [{low:.3f}, {high:.3f}]"


def preferred_by_judge(pair: dict, aspect: str) -> str | None:
    """Return "a" or "b", the run whose video of a pair the judge rated higher; None where it did not say."""
    if "judge" not in pair or aspect not in ASPECTS:
        return None
    a, b = (pair["judge"][run][ASPECTS.index(aspect)] for run in "ab")
    return "a" if a > b else "b" if b > a else None                            # a rating may be missing: NaN


def tally(paths: Sequence[Path], key_path: Path) -> str:
    """Count the votes of a study, aspect by aspect, and compare them with the judge's ratings in its key.

    Intervals take every vote as independent: those of one rater, or on one pair, are not quite.
    Returns: the table. Raises: MediaError for bad files, another study's votes, a rater counted twice.
    """
    aspects = (*ASPECTS, "overall")
    key = read_json(key_path, "the key of a study", lambda k: {k["study"], k["a"], k["b"]} and all(
        {pair["left"], pair["right"]} == {"a", "b"} == {*pair.get("judge", "ab")}
        for pair in k["pairs"].values()))
    raters = {}
    votes = {aspect: [] for aspect in aspects}       # (a, b or tie; what the judge prefers)
    for path in paths:
        read = read_json(path, "a file of votes on this study", lambda v: isinstance(v["rater"], str) and (
            v["study"] == key["study"] and v["votes"].keys() <= key["pairs"].keys()
            and all(aspect in aspects and choice in CHOICES
                    for choices in v["votes"].values() for aspect, choice in choices.items())))
        if read["rater"] in raters:
            raise MediaError(path, f"is of the same rater as {raters[read['rater']]}; leave one out")
        raters[read["rater"]] = path
        for name, choices in read["votes"].items():
            pair = key["pairs"][name]
            for aspect, choice in choices.items():
                votes[aspect].append((pair.get(choice, "tie"), preferred_by_judge(pair, aspect)))
    lines = [f"{len(raters)} raters, {len(key['pairs'])} pairs; a: {key['a']}, b: {key['b']}; 95% intervals",
             f"{'':15}{'a':>5}{'b':>5}{'no difference':>15}   {'a wins of a + b':24}the judge chooses alike"]
    for aspect, cast in votes.items():
        a, b, ties = (sum(choice == name for choice, _ in cast) for name in ("a", "b", "tie"))
        both = [choice == judged for choice, judged in cast if choice != "tie" and judged]
        alike = f"{share(sum(both), len(both))} of {len(both)}" if both else "-"
        lines.append(f"{aspect:15}{a:5}{b:5}{ties:15}   {share(a, a + b):24}{alike}")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m extras.people", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(required=True)
    c = commands.add_parser("tally", help="count the votes of a study")
    c.set_defaults(run=lambda args: print(tally(args.votes, args.key)))
    c.add_argument("votes", nargs="+", type=Path, help="what the raters saved")
    c.add_argument("--key", type=Path, required=True, help="the key.json that the study wrote")
    aligns = commands.add_parser("align", help="compare the judge with people and fit a calibration")
    aligns.set_defaults(run=align_judge, data=None)
    aligns.add_argument("ratings", type=Path, help="a CSV with the columns video, aspect, rating")
    aligns.add_argument("--out", type=Path, default="calibration.json", help="to write (%(default)s)")
    aligns.add_argument("--size", type=int, default=64, help="pixels per side of what is seen (%(default)s)")
    studies = commands.add_parser("study", help="which of two runs do people prefer?")
    studies.set_defaults(run=study)
    studies.add_argument("runs", nargs=2, metavar="RUN", help="the two runs to be compared")
    studies.add_argument("--out", type=Path, required=True, help="the folder of the study")
    studies.add_argument("--clips", type=int, default=12, help="pairs, of held-out clips (%(default)s)")
    studies.add_argument("--data", type=Path, help="a video, or a folder of videos (drawn talkers)")
    studies.add_argument("--seed", type=int, default=0, help="of clips, noise and sides (%(default)s)")
    studies.add_argument("--max-seconds", type=float, default=STUDY_SECONDS, help="of a clip (%(default)s)")
    for c in aligns, studies:
        crop = "face" if c is studies else "none"
        c.add_argument("--crop", type=crop_argument, default=crop, help=CROP_HELP)
        reward_flags.judge_flags(c)
    args = p.parse_args(argv)
    check_numbers(p, args, seed=0, clips=1, max_seconds=1, size=32)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.run(args)


if __name__ == "__main__":
    with one_line("stopped; nothing was written", "lower --max-seconds, --clips or --size"):
        main()
