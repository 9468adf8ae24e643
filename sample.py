"""Animate a portrait with speech, and measure how well it is done.

    python sample.py --checkpoint runs/tiny --image portrait.jpg --audio speech.wav --out video.mp4
    python sample.py --study runs/one runs/other --out study      which of two runs do people prefer?

The video is generated chunk by chunk and written as it comes, in constant memory: speech may be of any length.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import reward
from data import (FPS, LATENCY, SAMPLE_RATE, SAMPLES_PER_FRAME, Clip, LogMel, MediaError, folder_clips, hear,
                  load_portrait, one_line, pixels, read_speech, replacing, sounds, video_uri, write_video, writing)
from model import SAMPLING_STEPS, Generator, estimate_pose, load_generator, ode_step, unwarp


def generator(seed: int, index: int, device="cpu") -> torch.Generator:
    """Return a random generator of its own for each (seed, index). On the CPU it gives the same numbers for any device
    that they are moved to; the many of a pretraining step are quicker drawn where they are used."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + index)


def seeded_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...], device="cpu") -> Callable[[int], Tensor]:
    """Return a function that draws the noise of each next chunk, (len(indices), *shape), on `device`.

    Every video has a generator of its own, so that it does not change with the batch it is made in.
    """
    generators = [generator(seed, i) for i in indices]
    return lambda chunk: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


# ---------------------------------------------------------------- measure

@torch.no_grad()
def imitate(model: Generator, clips: Sequence[Clip], frames: int, steps: int = SAMPLING_STEPS,
            guidance: float = 1.0, seed: int = 0, step: Callable[..., Tensor] = ode_step) -> Tensor:
    """Generate each clip anew from its own first frame and its own sound. Returns (B, frames, 3, S, S) in [0, 1]."""
    device = next(model.parameters()).device
    portrait = torch.stack([clip.frames[0] for clip in clips]).to(device) / 255
    mel = torch.stack([hear(clip.audio, frames, model.config.audio_encoder, device) for clip in clips]).to(device)
    shape = (model.config.video_tokens, model.config.channels)
    noise = seeded_noise(seed, range(len(clips)), shape, device)
    return torch.cat([video.cpu() for _, video in model.generate(portrait, mel, noise, steps, guidance, step)], 1)


NEED_NO_TRUTH = "still_psnr", "jerk", "seam", "sync_confidence", "sync_own", "identity"      # reported on a line apart


def lips_drawn(videos: Tensor, truths: Tensor, clips: Sequence[Clip]) -> tuple[dict, list[Tensor], list[Tensor]]:
    """Measure lips of drawn talkers: lip_sync, the correlation with the true mouth, and amplitude.

    Returns: name -> values; the mouths (F,) of the videos, and the true ones.
    """
    frames = videos.shape[1]
    truth = [{k: x[:frames] if x.ndim and len(x) >= frames else x for k, x in c.truth.items()} for c in clips]
    made = [reward.mouth_opening_from_pixels(v, t) for v, t in zip(videos, truth)]
    seen = [reward.mouth_opening_from_pixels(t, k) for t, k in zip(truths, truth)]
    true = [t["opening"] * t["width"] for t in truth]
    return {"lip_sync": [reward.correlation(m, t) for m, t in zip(made, true)],
            "amplitude": [m.std() / s.std().clamp_min(1e-6) for m, s in zip(made, seen)]}, made, true


def lips_real(mouths: Tensor, true_mouths: Tensor, audio: Tensor) -> tuple[dict, list[Tensor], list[Tensor]]:
    """Measure lips of real clips: mouth_own, the correlation of their quick motion with the true clip's, and amplitude.

    mouth_late is the same against the true clip 5 frames later, mouth_other against another clip; over_late and
    over_other are by how much mouth_own exceeds these. Args: mouth boxes (B, F, P). Returns: as lips_drawn.
    """
    axis = reward.mouth_axis(true_mouths, audio)
    made, true = (list(reward.quicken(boxes @ axis)) for boxes in (mouths, true_mouths))
    own = [reward.correlation(m, t) for m, t in zip(made, true)]
    late = [reward.shifted_correlation(m, t, -5) for m, t in zip(made, true)]
    values = {"mouth_own": own, "mouth_late": late, "over_late": [a - b for a, b in zip(own, late)]}
    if len(true) > 1:
        values["mouth_other"] = other = [reward.correlation(m, t) for m, t in zip(made, true[1:] + true[:1])]
        values["over_other"] = [a - b for a, b in zip(own, other)]
    return values | {"amplitude": [m.std() / t.std() for m, t in zip(made, true)]}, made, true


def evaluate(videos: Tensor, clips: Sequence[Clip], chunk_frames: int,
             sync: reward.SyncNetwork | None = None) -> dict[str, Tensor]:
    """Measure videos (B, F, 3, S, S) in [0, 1] against their true clips by the held-out metrics of reward.py.

    Returns: name -> (B,) values. psnr is the distance to the true frames, most of it where a head went that is free to
    go elsewhere; mouth_psnr that of mouths, heads held still and the first frame taken off. head is relative to the
    mean of the true clips: one that sways as far as another clip's is no worse for it. With a sync network, also
    sync_confidence and sync_own of its offset curve, and identity, the mean cosine to the portrait. The rest is what
    lips_drawn or lips_real gives.
    """
    frames = videos.shape[1]
    truths = pixels(clips, frames)
    poses = [[estimate_pose(v[None])[0] for v in vs] for vs in (videos, truths)]
    heads, true_heads = (torch.stack([reward.head_motion(pose) for pose in some]) for some in poses)
    mouths = [[reward.mouth_box(unwarp(v, pose)) for v, pose in zip(vs, some)]
              for vs, some in zip((videos, truths), poses)]
    values = {"psnr": [reward.psnr(v, t) for v, t in zip(videos, truths)],
              "mouth_psnr": [reward.psnr(made, true) for made, true in zip(*mouths)],
              "motion": [reward.motion(v) / reward.motion(t) for v, t in zip(videos, truths)],
              "head": heads / true_heads.mean(),
              "jerk_ratio": [reward.jerk(v) / reward.jerk(t) for v, t in zip(videos, truths)],
              "still_psnr": [reward.still_psnr(v, t[0]) for v, t in zip(videos, truths)],
              "jerk": [reward.jerk(v) for v in videos],
              "seam": [reward.seam(v, chunk_frames) for v in videos]}
    if sync is not None:
        offsets = reward.sync_metrics(sync, videos, sounds(clips, frames))
        values |= {k: v for k, v in offsets.items() if k in NEED_NO_TRUTH}
        values["identity"] = reward.identity_cosine(sync, videos, truths[:, 0]).mean(1)
    if clips[0].truth:
        lips, made, true = lips_drawn(videos, truths, clips)
    else:
        lips, made, true = lips_real(*map(torch.stack, mouths), sounds(clips, frames))
    values |= lips
    values["offset"] = [reward.sync_offset(m, t) for m, t in zip(made, true)]
    return {name: torch.stack(tuple(v)) for name, v in values.items()}


def with_interval(values: Tensor) -> str:
    """Write the mean of (B,) values ± its 95% confidence interval, nan of a single value."""
    half = 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean().item():.3f}±{half:.3f}"


def summary(metrics: dict[str, Tensor]) -> str:
    """Write metrics, name -> (B,), as means with 95% confidence intervals; on a second line what needs no truth."""
    apart = [f"{k} {with_interval(v)}" for k, v in metrics.items() if k in NEED_NO_TRUTH]
    rest = [f"{k} {with_interval(v)}" for k, v in sorted(metrics.items()) if k not in NEED_NO_TRUTH]
    return f"  against the truth  {'  '.join(rest)}\n  without it         {'  '.join(apart)}"


# ---------------------------------------------------------------- animate

def animate(model: Generator, portrait: Tensor, speech: Tensor, steps: int, guidance: float,
            seed: int) -> Iterator[Tensor]:
    """Yield the frames (3, S, S) uint8 of a portrait (3, S, S) uint8 speaking (T,) 16 kHz; ceil(T / 640) of them."""
    c, device = model.config, next(model.parameters()).device
    frames = math.ceil(len(speech) / SAMPLES_PER_FRAME)
    whole = math.ceil(frames / c.chunk_frames) * c.chunk_frames
    mel = (hear(speech, whole, c.audio_encoder, device)[None].to(device) if c.audio_encoder else
           LogMel(speech, whole, device))
    noise = seeded_noise(seed, [0], (c.video_tokens, c.channels), device)
    left = frames
    for _, chunk in model.generate(portrait[None].to(device) / 255, mel, noise, steps, guidance):
        yield from (chunk[0, :left] * 255).round().byte().cpu()
        left -= chunk.shape[1]


# ---------------------------------------------------------------- let people choose

STUDY_PAGE = Path(__file__).parent / "assets" / "study.html"
STUDY_SECONDS = 3.0                                  # of a clip, unless --max-seconds says otherwise
STUDY_SIDE = 256                                     # pixels that small pictures are enlarged to, at least half of it


def study_clips(args: argparse.Namespace, models: Sequence[Generator]) -> tuple[list[Clip], int]:
    """Return held-out clips and their frames, which are whole chunks of both models. Raises: MediaError for none."""
    sizes = [model.config.size for model in models]
    if sizes[0] != sizes[1]:
        raise MediaError(args.study[1], f"makes pictures of {sizes[1]} pixels, {args.study[0]} of {sizes[0]}; compare "
                                        "runs of one size")
    seconds, chunk = args.max_seconds or STUDY_SECONDS, math.lcm(*(model.config.chunk_frames for model in models))
    frames = round(seconds * FPS) // chunk * chunk
    if args.data:
        clips = folder_clips(args.data, sizes[0], seconds, args.crop, frames=frames)[1]
    else:
        from extras.talkers import synthetic_clips
        clips = synthetic_clips(args.clips, sizes[0], seconds, reward.HELD_OUT_SEED + args.seed)
    if not clips or not frames:
        raise MediaError(args.data or "--max-seconds", f"gives no held-out clip of {max(frames, chunk)} frames")
    chosen = torch.randperm(len(clips), generator=generator(args.seed, 0))[:args.clips]
    return [clips[i] for i in chosen.tolist()], frames


def data_uri(frames: Tensor, audio: Tensor) -> str:
    """Write a video (F, 3, S, S) in [0, 1] with its sound, enlarged, as an mp4 in a base64 data URI."""
    scale = max(1, STUDY_SIDE // frames.shape[-1])
    return video_uri(reward.to_bytes(frames).repeat_interleave(scale, -1).repeat_interleave(scale, -2), audio)


def study(args: argparse.Namespace) -> None:
    """Write DIR/study.html, pairs of videos of two runs to choose from, and DIR/key.json, which alone tells whose is
    whose: the same portrait, speech and noise for both, each run on the left in half of the pairs, drawn by the seed.

    Noise is the same where the runs' chunks are; else it comes from the same seed.
    """
    out, judge = Path(args.out), reward.make_judge(args)
    if (out / "key.json").exists():
        raise MediaError(out / "key.json", "is the key of a study that may have votes; choose another --out")
    models = [load_generator(run).to(args.device).eval() for run in args.study]
    clips, frames = study_clips(args, models)
    with writing(out):                                   # before the work that would be lost
        out.mkdir(parents=True, exist_ok=True)
    audio = sounds(clips, frames)
    videos = {run: imitate(model, clips, frames, args.steps, args.guidance, args.seed)
              for run, model in zip("ab", models)}
    names = [clip.name for clip in clips]
    ratings = {run: reward.rate_whole(judge, v, audio, names).tolist() for run, v in videos.items()} if judge else {}
    swapped = torch.randperm(len(clips), generator=generator(args.seed, 1)) % 2 == 1
    pairs, key = [], {}
    for i, clip in enumerate(tqdm(clips, "pairs", leave=False)):
        name, sides = f"{i + 1:03}", dict(zip(("left", "right"), "ba" if swapped[i] else "ab"))
        pairs.append({"id": name, **{side: data_uri(videos[run][i], audio[i]) for side, run in sides.items()}})
        key[name] = sides | {"clip": clip.name} | ({"judge": {r: s[i] for r, s in ratings.items()}} if judge else {})
    number = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:12]             # of what the page shows anyway
    page = STUDY_PAGE.read_text().replace("STUDY</", json.dumps({"study": number, "pairs": pairs}) + "</")
    runs = dict(zip("ab", args.study))
    for name, text in (("study.html", page),
                       ("key.json", json.dumps({"study": number, **runs, "seed": args.seed, "pairs": key}, indent=1))):
        with replacing(out / name) as path:
            path.write_text(text)
    print(f"{out}/study.html: {len(pairs)} pairs, to be opened in a browser or sent; keep {out}/key.json to yourself\n"
          f"then: python reward.py --tally votes.json --key {out}/key.json")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--checkpoint", help="the folder of a run, as train.py writes it")
    p.add_argument("--image", help="the portrait: any picture, its centre square is used")
    p.add_argument("--crop", type=crop_argument, help="x,y,size: use this square of the picture, in pixels")
    p.add_argument("--audio", help="the speech: any file with sound that ffmpeg reads")
    p.add_argument("--track", type=track_argument, metavar="TRACK[:CHANNEL]",
                   help="which sound of that file, from 1 (default: what has speech in it)")
    p.add_argument("--out", required=True, help="the mp4 to write, or the folder of the study")
    g = p.add_argument_group("study", "instead of --checkpoint, --image and --audio")
    g.add_argument("--study", nargs=2, metavar=("RUN_A", "RUN_B"), help="two runs to be compared by people")
    g.add_argument("--clips", type=int, default=12, help="pairs, of held-out clips (default 12)")
    g.add_argument("--data", type=Path, help="a folder of real clips; without it, drawn talkers")
    reward.judge_flags(p)
    p.add_argument("--steps", type=int, default=SAMPLING_STEPS, help="flow steps per chunk (default %(default)s)")
    p.add_argument("--guidance", type=float, default=1.0,
                   help="how far to exaggerate what the sound adds; 1: as learned (default 1)")
    p.add_argument("--seed", type=int, default=0, help="what the sound leaves open: head, blinks (default 0)")
    p.add_argument("--max-seconds", type=float, help="use only the start of the speech; in a study: "
                   f"the length of a clip (default {STUDY_SECONDS:g})")
    p.add_argument("--device", type=device_argument, default=device_argument(), help="default: cuda if present")
    args = p.parse_args(argv)
    check_numbers(p, args, steps=1, guidance=0, seed=0, clips=1, max_seconds=1 if args.study else 1 / FPS)
    one = args.checkpoint, args.image, args.audio
    if any(one) if args.study else not all(one):
        p.error("want either --checkpoint, --image and --audio, or --study")
    if not args.study and Path(args.out).suffix.lower() != ".mp4":
        p.error(f"--out is the video to write, so let it end in .mp4: got {args.out}")
    return args


def check_numbers(p: argparse.ArgumentParser, args: argparse.Namespace, **least: float) -> None:
    """End with one clear line where a number that was given is below its least value, or is absurdly large."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 1e10:
            bound = "below 1e10" if value > low else f"at least {low}"
            p.error(f"--{name.replace('_', '-')} must be {bound}, got {value}")


def crop_argument(text: str) -> tuple[int, int, int]:
    """Read 'x,y,size' into three whole numbers."""
    try:
        x, y, size = (int(part) for part in text.split(","))
        if min(x, y) < 0 or size < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"want x,y,size in pixels, such as 40,0,320, got {text!r}") from None
    return x, y, size


def track_argument(text: str) -> tuple[int, int]:
    """Read 'TRACK' or 'TRACK:CHANNEL' into two numbers from 1, the second 0 where it is left open."""
    track, _, channel = text.partition(":")
    if not (track.isdecimal() and int(track) and (channel or "1").isdecimal() and int(channel or "1")):
        raise argparse.ArgumentTypeError(f"want TRACK or TRACK:CHANNEL, such as 2 or 2:1, got {text!r}")
    return int(track), int(channel or 0)


def device_argument(text: str | None = None) -> str:
    """Check the name of a device by using it; without a name, choose CUDA where it is present."""
    text = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({str(error).splitlines()[0]})") from None
    return text


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.study:
        study(args)
        return
    if (out := Path(args.out)).exists() and any(out.samefile(given) for given in (args.image, args.audio)):
        raise MediaError(out, "is read and would be overwritten; choose another --out")
    model = load_generator(args.checkpoint).to(args.device).eval()
    portrait = load_portrait(args.image, model.config.size, args.crop)
    speech, track = read_speech(args.audio, args.max_seconds, args.track)
    if note := track.note():
        print(f"{args.audio}: {note}; --track TRACK[:CHANNEL] chooses another")
    seconds = len(speech) / SAMPLE_RATE
    frames = animate(model, portrait, speech, args.steps, args.guidance, args.seed)
    start = time.perf_counter()
    write_video(args.out, tqdm(frames, "frames", math.ceil(seconds * FPS), leave=False), track)
    spent = time.perf_counter() - start
    latency = f"{1000 * (LATENCY + model.config.chunk_frames / FPS):.0f} ms of sound"
    if model.config.audio_encoder:
        latency = "all of the sound, which the speech encoder hears first"
    print(f"{args.out}: {seconds:.2f} s of video in {spent:.1f} s, {spent / seconds:.2f} s per second; "
          f"streaming latency {latency}")


if __name__ == "__main__":
    with one_line("stopped; nothing was written", "lower --max-seconds, --steps or --clips, or use --device cpu"):
        main()
