"""What a run measures: each arm on held-out clips, the looks that choose a checkpoint, and the pictures.

The metrics themselves, none of which a reward contains, are in sample.py. report.py makes a page of them.
"""

import argparse
import math
import re
import shlex
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

import grpo
from data import Clip, pixels, sounds, to_bytes
from extras.files import replacing
from extras.media import SAMPLE_RATE
from extras.processes import world
from extras.report import hardware, paired, summary, write_clips, write_report
from extras.reward_flags import measuring_sync, table
from extras.session import Log, means, plain_json
from model import Generator
from reward import Reward
from sample import evaluate, frechet, head_spread, imitate, seeded_noise

HELD_OUT_SEED = 1_000_000          # talkers with another seed: other identities, other speech


def loaded(weights: dict[str, Tensor], args: argparse.Namespace) -> Generator:
    """A generator with these weights."""
    model = Generator(args.config).to(args.device).eval()
    model.load_state_dict(weights)
    return model


def generated(model: Generator, clips: list[Clip], args: argparse.Namespace, seed: int,
              noisy: bool = False, guidance: float = 1.0) -> Tensor:
    """Generate clips anew from portrait and sound, by the ODE or with noise on all steps that may have it."""
    if not noisy:
        return imitate(model, clips, args.frames, args.sampling_steps, seed, guidance=guidance)
    steps, shape = args.rollout_steps, (model.config.video_tokens, model.config.channels)
    noise = seeded_noise(HELD_OUT_SEED + seed, range(len(clips)), shape, args.device)
    step = grpo.drawing_step(args.settings, grpo.stochastic_steps(steps), noise)
    return imitate(model, clips, args.frames, steps, seed, step, guidance)


def validate(model: Generator, clips: list[Clip], args: argparse.Namespace,
             noisy: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Measure what a model makes of clips. Returns: metrics, name -> (B,), and the videos."""
    videos = generated(model, clips, args, args.seed, noisy)
    return evaluate(videos, clips, args.config.chunk_frames, measuring_sync(args)), videos


def held_out_score(metrics: dict[str, Tensor]) -> float:
    """Score a checkpoint on watched clips: correlation of the mouth with the true one, less wrong motion.

    No reward contains the correlation. Of real clips it counts beyond chance, the correlation with another
    clip's lips: people begin and end their sentences alike. 10% too much or too little motion of the mouth,
    or too much of all, costs 0.01 of it, so that a reward that is being hacked is not kept for its lips. 10%
    too much of the head costs half as much. Too little of head or of all costs nothing: a head sways as it
    likes, and one that trembles would make up for one that rests.
    """
    off = {name: math.log(max(metrics[name].mean().item(), 1e-6))
           for name in ("amplitude", "frame_change", "head")}
    wrong = 0.1 * abs(off["amplitude"]) + 0.1 * max(off["frame_change"], 0) + 0.05 * max(off["head"], 0)
    return metrics.get("over_other", metrics["lip_correlation"]).mean().item() - wrong


# ---------------------------------------------------------------- before and after training

def describe(model: Generator, clips: list[Clip], held_out: list[Clip], args: argparse.Namespace,
             log: Log) -> None:
    """Say what is about to be trained, and what the codec alone can reach: nothing can be better."""
    cut = getattr(clips, "folder", args.out) / "cut.jpg"     # of videos in which heads were found
    if cut.exists():
        with replacing(args.out / cut.name) as temporary:
            shutil.copy(cut, temporary)
        print(f"{args.out / cut.name} shows what was cut of the videos")
    videos = []
    for clip in held_out:
        true = pixels([clip], args.frames).to(args.device)
        videos.append(model.codec.decode(true[:, 0], model.codec.encode(true)).cpu())
    codec = evaluate(torch.cat(videos), held_out, args.config.chunk_frames, measuring_sync(args))
    parameters = sum(p.numel() for p in model.parameters())
    before = re.findall(r'"clips": (\d+)', log.path.read_text()) if log.path.exists() else []
    if before and before[-1] != f"{len(clips)}":
        print(f"note: this run had {before[-1]} training clips before, and has {len(clips)} now")
    log(config=asdict(args.config), seed=args.seed, parameters=parameters, clips=len(clips),
        codec=means(codec), hardware=hardware(args.device, world()), sound=getattr(args.footage, "said", ""),
        command=f"{args.program} {shlex.join(args.command)}")
    print(f"codec alone, {len(held_out)} held-out clips:\n{summary(codec)}\n"
          f"{len(clips)} training clips of {args.frames} frames; generator of {parameters / 1e6:.2f} M "
          f"parameters on {args.device}; ready after {time.perf_counter() - log.start:.0f} s")


def mouth_distance(videos: Tensor, clips: list[Clip], args: argparse.Namespace) -> dict[str, float]:
    """Print and return the Frechet distance between generated and true mouths in windows of five frames;
    nothing where no network measures."""
    net = measuring_sync(args)
    if net is None:
        return {}
    made, true = (net.visual(some).flatten(0, 1) for some in (videos, pixels(clips, videos.shape[1])))
    distance = frechet(made, true).item()
    print(f"  all clips together   Frechet distance of mouths {distance:.3f}")
    return {"mouth_distance": distance}


def measure(arms: dict[str, dict[str, Tensor]], clips: list[Clip], args: argparse.Namespace,
            log: Log) -> dict[str, Tensor]:
    """Measure every arm's weights on the same held-out clips from the same noise, and compare them.

    held_out.json keeps the value of every clip. Returns: the videos of each arm, (B, F, 3, S, S), by the ODE.
    """
    values, shown = {}, {}
    for sampler in ("ode", args.sampler) if len(arms) > 1 else ("ode",):
        made = {}
        for name, weights in arms.items():
            model = loaded(weights, args)
            made[name], videos = validate(model, clips, args, noisy=sampler != "ode")
            if sampler == "ode":
                shown[name] = videos
                others = generated(model, clips, args, args.seed + 1)
                made[name]["head_spread"] = head_spread(videos, others, pixels(clips, args.frames))
            print(f"{len(clips)} held-out clips, generated from portrait and sound, {name}, {sampler}:\n"
                  f"{summary(made[name])}")
            together = mouth_distance(videos, clips, args)
            log(arm=name, sampler=sampler, held_out=means(made[name]), **together)
        for title, difference in paired(made).items():
            print(f"{title}, clip by clip, {sampler}:\n{summary(difference)}")
        values[sampler] = {arm: {k: v.tolist() for k, v in metrics.items()} for arm, metrics in made.items()}
    with replacing(args.out / "held_out.json") as path:
        path.write_text(plain_json(values))
    return shown


def rewarded(reward: Reward, arms: dict[str, Tensor], clips: list[Clip]) -> str:
    """Tell what the reward says of every arm's videos and of the true clips."""
    frames = next(iter(arms.values())).shape[1]
    true, audio = pixels(clips, frames), sounds(clips, frames)
    return f"the same {len(clips)} clips by the reward:\n" + table(reward, {
        name: reward(videos, audio, true[:, 0], [f"{name} {clip.name}" for clip in clips])
        for name, videos in (arms | {"truth": true}).items()})


def write_pictures(folder: Path, arms: list[Tensor], clips: list[Clip]) -> None:
    """Write sheet.png, twelve frames of six clips, truth above what each arm generated; and the portrait and
    the speech of the first clip, to try sample.py with."""
    frames = arms[0].shape[1]
    videos = [pixels(clips[:6], frames)] + [arm[:6] for arm in arms]
    at = torch.linspace(0, frames - 1, 12).long()
    sheet = rearrange([to_bytes(video[:, at]) for video in videos],
                      "arm b column c y x -> (b arm y) (column x) c")
    for name, picture in ("sheet", sheet), ("portrait", clips[0].frames[0].permute(1, 2, 0)):
        with replacing(folder / f"{name}.png") as path:
            Image.fromarray(picture.numpy()).save(path, format="png")
    from scipy.io import wavfile                     # here: it takes a quarter of a second
    with replacing(folder / "speech.wav") as path:
        wavfile.write(path, SAMPLE_RATE, (clips[0].audio.clamp(-1, 1) * 32767).round().short().numpy())


def conclude(arms: dict[str, dict[str, Tensor]], clips: list[Clip], reward: Reward | None,
             args: argparse.Namespace, log: Log) -> None:
    """Measure, draw and report what a run has come to, and say what to try next."""
    videos = measure(arms, clips, args, log)
    write_pictures(args.out, list(videos.values()), clips)
    write_clips(args.out, list(videos), list(videos.values()), clips)
    if reward:
        log(rewarded=(said := rewarded(reward, videos, clips)))
        print(said)
    write_report(args.out)
    folder = f"{args.out}"
    tried = shlex.join(["python", "sample.py", "--checkpoint", folder, "--image", f"{folder}/portrait.png",
                        "--audio", f"{folder}/speech.wav", "--out", "video.mp4"])
    print(f"{(time.perf_counter() - log.start) / 60:.1f} minutes in all\nto try next:\n  {tried}\n"
          f"{folder}/report.html: clips, metrics and curves; report.md: the same in text; sheet.png (truth "
          f"above {', '.join(arms)}); log.jsonl")
