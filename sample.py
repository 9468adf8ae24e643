"""Animate a portrait with speech, and measure how well it is done.

    python sample.py --checkpoint runs/tiny --image portrait.jpg --audio speech.wav --out video.mp4

The video is generated chunk by chunk and written as it comes, in constant memory: speech may have any length.

The held-out metrics are here, too. Some resemble a part of the reward (sync_confidence, jerk, seam_ratio,
still_psnr); lip_correlation, offset, mouth_psnr and head_spread do not. (The embedded judge was taught by
some of the same signals, as amplitude; extras/school.py says how far.) extras/mouths.py reads mouths from
pixels.

A video is (F, 3, S, S), uint8 or float in [0, 1]; B clips, F frames, S pixels per side.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import (LATENCY, Clip, LogMel, hear, load_portrait, pixels, read_speech, sounds, to_bytes,
                  write_video)
from extras.arguments import Parser, check_numbers, crop_argument, device_argument, track_argument
from extras.face import photo_square
from extras.files import check_new, one_line
from extras.media import FPS, SAMPLES_PER_FRAME, SAMPLE_RATE
from kernels.flow_step import flow_step
from extras.mouths import high_pass, head_pose, mouth_axis, mouth_box, mouth_opening_from_pixels
from model import SAMPLING_STEPS, Generator, hub_folder, load_generator
from reward import SYNC_SHIFTS, SyncNetwork


# ---------------------------------------------------------------- generate

def seeded_rng(seed: int, index: int, device="cpu") -> torch.Generator:
    """Return a random generator of its own for each (seed, index). On the CPU its numbers are the same on
    every machine; training steps take theirs on the GPU, which is faster."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + index)


def seeded_noise(seed: int, indices: Sequence[int], shape: tuple[int, ...],
                 device="cpu") -> Callable[[], Tensor]:
    """Return a function that draws the noise of each next chunk, (len(indices), *shape), on `device`.

    Every video has a random generator of its own, so it does not depend on the batch in which it is made.
    """
    rngs = [seeded_rng(seed, i) for i in indices]
    return lambda: torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)


def hear_all(model: Generator, clips: Sequence[Clip], frames: int) -> Tensor:
    """Describe the sound of clips as the generator hears it, (B, F, mel_channels), on the CPU."""
    encoder, device = model.config.audio_encoder, next(model.parameters()).device
    return torch.stack([hear(clip.audio, frames, encoder, device) for clip in clips])


@torch.no_grad()
def imitate(model: Generator, clips: Sequence[Clip], frames: int, steps: int = SAMPLING_STEPS,
            seed: int = 0, step: Callable[..., Tensor] = flow_step, guidance: float = 1.0) -> Tensor:
    """Generate each clip anew from its first frame and its sound. Returns: (B, frames, 3, S, S) in [0, 1]."""
    c, device = model.config, next(model.parameters()).device
    portrait = torch.stack([clip.frames[0] for clip in clips]).to(device) / 255
    mel = hear_all(model, clips, frames).to(device)
    noise = seeded_noise(seed, range(len(clips)), (c.video_tokens, c.channels), device)
    chunks = model.generate(portrait, mel, noise, steps, guidance, step)
    return torch.cat([video.cpu() for _, video in chunks], 1)


def animate(model: Generator, portrait: Tensor, speech: Tensor, steps: int, guidance: float,
            seed: int) -> Iterator[Tensor]:
    """Yield the frames (3, S, S) uint8 of a portrait (3, S, S) uint8 speaking (T,) 16 kHz, ceil(T / 640)."""
    c, device = model.config, next(model.parameters()).device
    left = math.ceil(len(speech) / SAMPLES_PER_FRAME)
    whole = math.ceil(left / c.chunk_frames) * c.chunk_frames
    if c.audio_encoder:
        mel = hear(speech, whole, c.audio_encoder, device)[None].to(device)
    else:
        mel = LogMel(speech, whole, device)
    noise = seeded_noise(seed, [0], (c.video_tokens, c.channels), device)
    for _, chunk in model.generate(portrait[None].to(device) / 255, mel, noise, steps, guidance):
        yield from to_bytes(chunk[0, :left]).cpu()
        left -= chunk.shape[1]


# ---------------------------------------------------------------- metrics of one video, or of two signals

def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of two signals (F,); 0 when either never moves."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = a.norm() * b.norm()
    return torch.where(scale > 1e-9, (a * b).sum() / scale.clamp(min=1e-9), 0.0).nan_to_num().float()


def shifted_correlation(made: Tensor, true: Tensor, shift: int = 0) -> Tensor:
    """Correlate two signals (F,), `made` at f + shift with `true` at f, over the frames that both have."""
    n = len(true) - abs(shift)
    made, true = (made[shift:], true[:n]) if shift >= 0 else (made[:n], true[-shift:])
    return correlation(made, true)


def lip_offset(made: Tensor, true: Tensor, most: int = 8) -> Tensor:
    """Return by how many frames `made` (F,) comes after `true` (F,): the shift of the best correlation."""
    shifts = sorted(range(-most, most + 1), key=abs)          # of equal ones, as of a still mouth, the least
    return torch.tensor(float(max(shifts, key=lambda shift: shifted_correlation(made, true, shift))))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of two pictures or videos of any equal shape, in [0, 1]."""
    return -10 * torch.log10((a - b).square().mean().clamp_min(1e-10))


def still_psnr(frames: Tensor, portrait: Tensor) -> Tensor:
    """Compare the background with the portrait's, in dB: the outer eighth at either side of the upper half.

    Args: frames (F, 3, S, S), portrait (3, S, S), float in [0, 1].
    """
    size = frames.shape[-1]
    sides = torch.cat([torch.arange(size // 8), torch.arange(size - size // 8, size)])
    return psnr(frames[:, :, : size // 2, sides], portrait[None, :, : size // 2, sides])


def frame_change(frames: Tensor) -> Tensor:
    """Return the mean absolute change from one frame to the next. frames float in [0, 1]."""
    return frames.diff(dim=0).abs().mean()


def jerk(frames: Tensor) -> Tensor:
    """Return the mean absolute third difference in time: trembling, flicker and jumps."""
    return frames.diff(n=3, dim=0).abs().mean()


def seam_ratio(frames: Tensor, chunk_frames: int) -> Tensor:
    """Return the mean change across chunk borders divided by that inside chunks; 1 is no seam."""
    change = frames.diff(dim=0).abs().mean((1, 2, 3))                                # (F - 1,)
    border = torch.arange(1, len(frames)) % chunk_frames == 0
    return change[border].mean() / change[~border].mean().clamp_min(1e-8)


def head_motion(pose: Tensor) -> Tensor:
    """Return how far a head wanders: the standard deviation of its shift, of poses (F, 6)."""
    return pose[:, [0, 3]].std(0).norm()


# ---------------------------------------------------------------- metrics by the other sync network
#
# They follow SyncNet's definitions, but the network is our own and small: they are *not* the LSE-D and LSE-C
# of the literature, nor comparable with them, nor between two networks trained on different clips.

def offset_curve(visual: Tensor, sound: Tensor) -> Tensor:
    """Try the sound early and late: D_k = mean_i |v_i - a_(i+k)|, k in -15..15, over the windows i that both
    have (SyncNet's code pads with zeros instead). Args: (B, W, D) each, W > 15. Returns: (B, 31)."""
    n = visual.shape[1]
    apart = lambda k: visual[:, max(0, -k) : n - max(0, k)] - sound[:, max(0, k) : n - max(0, -k)]
    return torch.stack([apart(k).norm(dim=-1).mean(1) for k in range(-SYNC_SHIFTS, SYNC_SHIFTS + 1)], 1)


def depth(curve: Tensor) -> Tensor:
    """Say how well the best shift of an `offset_curve` (..., 31) fits: median_k D_k - min_k D_k."""
    return curve.median(-1).values - curve.amin(-1)


@torch.no_grad()
def sync_metrics(net: SyncNetwork, frames: Tensor, audio: Tensor) -> dict[str, Tensor]:
    """Measure how well lips and sound go together, as SyncNet does, by a network of our own.

    Args:    frames (B, F, 3, S, S) float in [0, 1], audio (B, F * 640), F >= 20.
    Returns: {name: (B,)}:
             sync_distance    min_k D_k, in 0..2; low is good
             sync_confidence  median_k D_k - min_k D_k; high is good
             sync_offset      -argmin_k D_k, the frames by which the picture comes after its sound
             sync_own         D_0, the distance as the clip plays, which no lucky shift can lower

    An offset means nothing where confidence is low: a frozen GRID mouth has offset 0, as its silences match.
    Compare clips of one length, as fewer windows make a deeper minimum.
    """
    device = next(net.parameters()).device
    curve = offset_curve(net.visual(frames.to(device)), net.sound(audio.to(device))).cpu()
    least, best = curve.min(1)
    return {"sync_distance": least, "sync_confidence": depth(curve),
            "sync_offset": (SYNC_SHIFTS - best).float(), "sync_own": curve[:, SYNC_SHIFTS]}


@torch.no_grad()
def identity_cosine(net: SyncNetwork, frames: Tensor, portrait: Tensor) -> Tensor:
    """Compare who is seen in each frame with who is on the portrait; a frozen portrait scores 1.

    The encoder knows only people it was trained on. Trained on one, it can only tell pictures of him apart.
    Args: frames (B, F, 3, S, S), portrait (B, 3, S, S), float in [0, 1]. Returns: cosines (B, F).
    """
    return (net.identity(frames) * net.identity(portrait)[:, None]).sum(-1)


def frechet(a: Tensor, b: Tensor) -> Tensor:
    """Return the Frechet distance between Gaussians fitted to two sets of features (FID's distance):

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2)

    Used on `net.visual(frames).flatten(0, 1)`, so it compares mouths in motion. Few samples make it too
    large: compare sets of one size only, of many more windows than dimensions.
    Args: a (N, D), b (M, D), N and M >= 2. Returns: float64 scalar, at least 0 but for rounding.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0).sqrt().sum()       # the trace of the root
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


# ---------------------------------------------------------------- measure

LEAST_TRUE = 0.25                  # of the mean of the true clips, see `relative`


def each(measure: Callable[..., Tensor], *batches: Sequence) -> Tensor:
    """Measure clip by clip: stack measure(a[0], b[0]), measure(a[1], b[1]) and so on."""
    return torch.stack([measure(*of_one) for of_one in zip(*batches)])


def relative(made: Tensor, true: Tensor) -> Tensor:
    """Divide by what the true clips have, (B,) each, but by no less than LEAST_TRUE of their mean: a clip in
    which nothing moves would have a ratio beyond all bounds, and decide the mean of all."""
    return made / true.clamp_min(LEAST_TRUE * true.mean()).clamp_min(1e-6)


def head_spread(videos: Tensor, others: Tensor, truths: Tensor) -> Tensor:
    """Compare how far the heads of two takes (B, F, 3, S, S) of a clip are apart with how far they are from
    the true one: 1 where the truth could be a third take, 0 where all takes are one (the ratio of spread and
    skill of ensemble forecasts, Fortin et al. 2014). Returns: (B,)."""
    one, other, true = (each(head_pose, some)[..., [0, 3]] for some in (videos, others, truths))
    apart, off, also = ((a - b).norm(dim=-1).mean(1) for a, b in ((one, other), (one, true), (other, true)))
    return apart / (off + also).mean().div(2).clamp_min(1e-6)


def evaluate(videos: Tensor, clips: Sequence[Clip], chunk_frames: int,
             sync: SyncNetwork | None = None) -> dict[str, Tensor]:
    """Measure videos (B, F, 3, S, S) in [0, 1] against their true clips by the held-out metrics.

    Lips are signals (B, F). Those of drawn talkers are the open area, compared with the true one; those of
    real clips are quick motion along the axis that follows the sound. Then their correlation with the true
    lips should exceed that with lips 5 frames later, and with another clip's. A head may go where it likes,
    so only how far it wanders counts, as a ratio to the mean of true clips.
    Returns: name -> (B,).
    """
    frames = videos.shape[1]
    truths, audio = pixels(clips, frames), sounds(clips, frames)
    poses, true_poses = each(head_pose, videos), each(head_pose, truths)
    mouths, true_mouths = each(mouth_box, videos, poses), each(mouth_box, truths, true_poses)
    if drawn := clips[0].truth:
        known = [clip.truth for clip in clips]
        lips, seen = (each(mouth_opening_from_pixels, some, known) for some in (videos, truths))
        true_lips = torch.stack([(truth["opening"] * truth["width"])[:frames] for truth in known])
    else:
        axis = mouth_axis(true_mouths, audio)
        lips, true_lips = high_pass(mouths @ axis), high_pass(true_mouths @ axis)
        seen = true_lips
    values = {                                                                  # against the true clip:
        "lip_correlation": each(correlation, lips, true_lips),
        "offset": each(lip_offset, lips, true_lips),                           # frames that lips are late
        "mouth_psnr": each(psnr, mouths, true_mouths),             # dB, of changes, heads held still
        "psnr": each(psnr, videos, truths),                                     # dB, mostly where the head is
        "amplitude": relative(each(torch.std, lips), each(torch.std, seen)),    # ratio: how far lips open
        "frame_change": relative(each(frame_change, videos), each(frame_change, truths)),       # ratio
        "jerk_ratio": relative(each(jerk, videos), each(jerk, truths)),         # ratio: trembling
        "head": each(head_motion, poses) / each(head_motion, true_poses).mean().clamp_min(1e-6),
        # without the truth:
        "still_psnr": each(still_psnr, videos, truths[:, 0]),                   # dB, the background
        "jerk": each(jerk, videos),                                             # of black to white
        "seam_ratio": each(lambda video: seam_ratio(video, chunk_frames), videos)}      # 1: no seams
    if not drawn:                                                               # and how far above chance
        late = each(lambda made, true: shifted_correlation(made, true, -5), lips, true_lips)
        values |= {"late_correlation": late, "over_late": values["lip_correlation"] - late}
        if len(clips) > 1:
            other = each(correlation, lips, true_lips.roll(-1, 0))
            values |= {"other_correlation": other, "over_other": values["lip_correlation"] - other}
    if sync is not None:
        values["identity_cosine"] = identity_cosine(sync, videos, truths[:, 0]).mean(1)
        offsets = sync_metrics(sync, videos, audio)
        values |= {name: offsets[name] for name in ("sync_confidence", "sync_own")}
    return values


# ---------------------------------------------------------------- command line

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("--checkpoint", required=True, metavar="RUN",
                   help="the folder that train.py wrote, or a name on the Hugging Face hub")
    p.add_argument("--image", required=True, help="the portrait: any picture of a head")
    p.add_argument("--audio", required=True, help="the speech: any file with sound that ffmpeg reads")
    p.add_argument("--track", type=track_argument, metavar="TRACK[:CHANNEL]",
                   help="which sound of that file, from 1 (default: what has speech in it)")
    p.add_argument("--out", required=True, help="the mp4 to write")
    p.add_argument("--steps", type=int, default=SAMPLING_STEPS, help="flow steps a chunk (%(default)s)")
    p.add_argument("--guidance", type=float, default=1.0,
                   help="how far to exaggerate what the sound adds; 1: as learned (default 1)")
    p.add_argument("--seed", type=int, default=0, help="what the sound leaves open: head, blinks (default 0)")
    p.add_argument("--max-seconds", type=float, help="use only the start of the speech")
    p.add_argument("--crop", type=crop_argument, default=(), help="face: a square around the head; none: the "
                   "centre; or x,y,size in pixels (as the run's clips were cut)")
    p.add_argument("--device", type=device_argument, default=device_argument(),
                   help="default: cuda if present")
    args = p.parse_args(argv)
    check_numbers(p, args, steps=1, guidance=0, seed=0, max_seconds=1 / FPS)
    if Path(args.out).suffix.lower() != ".mp4":
        p.error(f"--out is the video to write, so let it end in .mp4: got {args.out}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_new(Path(args.out))                                       # before the speech is read
    run = hub_folder(args.checkpoint)
    model = load_generator(run).to(args.device).eval()
    square = photo_square(args.image, args.crop, run)
    portrait = load_portrait(args.image, model.config.size, square)
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
    with one_line("stopped; nothing was written", "use --device cpu"):
        main()
