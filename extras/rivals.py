"""What else the judge and the minutes of post-training could buy: the rivals of GRPO, on a finished run.

    python train.py --control                          first, a run with its controls
    python -m extras.rivals runs/tiny                  then this; it writes runs/tiny/rivals/rivals.json

shifted sound       the pretrained model, with its sound shifted by the median offset that the reward's sync
                    network measures in its videos of watched clips
curated as found    curation of clips whose sound was not put in time first
guidance g          the curated model, the sound weighing g times (classifier-free guidance, 2207.12598)
best of N           the curated model: N videos of each clip, from other noise; the one with the best ratings
rejection sampling  the curated model, fine-tuned for the CPU time of post-training on the best of N videos of
                    its own of training prompts (RAFT, 2304.06767)

All are measured as train.py measures its arms: on the run's held-out clips, by the ODE and with noise on the
way, from the same noise. What is finished is kept in rivals.json; a rival that was stopped begins anew.
"""

import argparse
import json
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import train
from data import Clip, Clips, pixels, sounds
from extras.arguments import Parser
from extras.files import BROKEN, MediaError, first_line, one_line, refusing, replacing
from extras.flags import parse_arguments
from extras.measuring import generated, loaded, mouth_distance
from extras.media import SAMPLES_PER_FRAME
from extras.report import CURATED, PRETRAINED, summary
from extras.reward_flags import make_judge, measuring_sync, reward_sync
from extras.session import Log, check_program, fingerprint, lock, plain_json
from model import load_generator
from reward import rate_whole
from sample import evaluate, head_spread, seeded_noise, seeded_rng, sync_metrics

BEST_OF = 4, 16
GUIDANCE = 1.25, 1.5
PROMPTS, SAMPLES = 32, 4           # of a round of rejection sampling,
ROUND = 50                         # and the training steps until the next
OWN_STREAM = 900_000               # where the random numbers of its own videos begin


def shifted(clip: Clip, frames: int) -> Clip:
    """Let a clip's sound come some frames later."""
    return replace(clip, audio=clip.audio.roll(frames * SAMPLES_PER_FRAME))


def rated(judge, videos: Tensor, clips: list[Clip]) -> Tensor:
    """Return the sum of the judge's ratings, (B,); what it leaves unrated is below all others."""
    names = [clip.name for clip in clips]
    return rate_whole(judge, videos, sounds(clips, videos.shape[1]), names).sum(1).nan_to_num(-torch.inf)


def best_of(n: int, model, judge, clips: list[Clip], args: argparse.Namespace, seed: int,
            noisy: bool = False) -> Tensor:
    """Generate each clip n times, and keep the video that the judge rates best."""
    best, most = None, torch.full((len(clips),), -torch.inf)
    for take in tqdm(range(n), f"best of {n}", leave=False):
        videos = generated(model, clips, args, seed + 1000 * take, noisy)
        ratings = rated(judge, videos, clips)
        best = videos if best is None else best
        best[ratings > most] = videos[ratings > most]
        most = most.maximum(ratings)
    return best


def curated_as_found(run: train.Run, judge, found: Clips) -> train.FlowMatching:
    """Fine-tune on what is rated highest of the clips as found."""
    args, picks = run.args, train.pick_clips(judge, found, run.args)
    data = run.found[picks.curated]
    return train.FlowMatching("curated as found", data, args, args.curate_steps, first=args.steps)


class RejectionSampling(train.FlowMatching):
    """Fine-tuning on the generator's own videos of training prompts, the best of each so far."""

    overshoots = True

    def __init__(self, run: train.Run, judge, budget: float):
        super().__init__("rejection sampling", None, run.args, budget=budget, first=run.args.steps)
        self.run, self.judge = run, judge

    def take_step(self) -> dict:
        if self.data is None or self.step % ROUND == 0:
            own = self.best_own()
            self.data = own if self.data is None else train.Latents(
                *(torch.cat(pair) for pair in zip(vars(self.data).values(), vars(own).values())))
        return super().take_step()

    @torch.no_grad()
    def best_own(self) -> train.Latents:
        """Generate SAMPLES videos of each of PROMPTS training prompts. Returns: the best of each."""
        run, args = self.run, self.args
        rng = seeded_rng(args.seed, OWN_STREAM + self.step)
        rows = torch.randperm(len(run.clips), generator=rng)[:PROMPTS].repeat_interleave(SAMPLES)
        prompts, model = run.data[rows], loaded(self.average, args)
        noise = seeded_noise(args.seed + OWN_STREAM + self.step, range(len(rows)),
                             (args.config.video_tokens, args.config.channels), args.device)
        made = model.generate((prompts.portrait / 255).to(args.device), prompts.mel.to(args.device), noise,
                              args.sampling_steps)
        latents, videos = zip(*((latent.cpu(), video.cpu()) for latent, video in made))
        ratings = rated(self.judge, torch.cat(videos, 1), [run.clips[row] for row in rows])
        best = ratings.view(-1, SAMPLES).argmax(1) + torch.arange(0, len(rows), SAMPLES)
        return train.Latents(prompts.portrait[best], prompts.mel[best], torch.stack(latents, 1)[best])


def main(argv: list[str] | None = None) -> None:
    p = Parser(description=__doc__.splitlines()[0])
    p.add_argument("run", type=Path, help="a finished run on drawn talkers, with curation and post-training")
    folder = p.parse_args(argv).run
    args = parse_arguments(["--resume", str(folder)])
    finished = all((folder / name).exists() for name in ("curate.pt", "post.pt", CURATED, "held_out.json"))
    if args.data or "none" in (args.judge, args.reward_sync) or not finished:
        raise MediaError(folder, "is no finished run on drawn talkers with a judge, a sync network of the "
                                 "reward and all three stages")
    check_program(argparse.Namespace(**vars(args) | {"program": "train.py"}))
    args.command = [str(folder)]                     # what is said to go on with where this is stopped
    with lock(folder), lock(folder / "rivals"):
        compare(folder, args)


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Measure all rivals of a run."""
    judge, net, measures = make_judge(args), reward_sync(args), measuring_sync(args)
    clips, held_out, watched = train.load_clips(args, args.watch_clips)
    pretrained, curated = (load_generator(folder / arm).to(args.device) for arm in (PRETRAINED, CURATED))
    with refusing(folder / "post.pt", (*BROKEN, EOFError, pickle.UnpicklingError),
                  lambda error: f"cannot be read ({first_line(error)}); delete it and resume the run"):
        budget = torch.load(folder / "post.pt", map_location="cpu", weights_only=True)["cpu_seconds"]
    args.out = folder / "rivals"
    log, kept = Log(args.out, time.perf_counter()), args.out / "rivals.json"
    of = f"{fingerprint(curated.state_dict())}, {budget:.0f} s, {len(held_out)} clips"
    values = json.loads(kept.read_text()) if kept.exists() else {}
    values = values if values.get("of") == of else {"of": of}        # else of the run as it was before

    def measure(name: str, make: Callable[[int, bool], Tensor]) -> None:
        """Measure the videos that `make` gives for a seed, by the ODE or with noise."""
        for sampler in ("ode", args.sampler):
            title = name if sampler == "ode" else f"{name}, {sampler}"
            if title in values:                      # what is finished is never made twice
                continue
            start, noisy = time.process_time(), sampler != "ode"
            videos = make(args.seed, noisy)
            spent = time.process_time() - start
            metrics = evaluate(videos, held_out, args.config.chunk_frames, measures)
            if not noisy:
                others = make(args.seed + 1, noisy)
                metrics["head_spread"] = head_spread(videos, others, pixels(held_out, args.frames))
            print(f"{title}, {spent:.0f} s of CPU time:\n{summary(metrics)}")
            values[title] = {metric: of_clips.tolist() for metric, of_clips in metrics.items()}
            values[title] |= mouth_distance(videos, held_out, args) | {"cpu_seconds": spent}
            with replacing(kept) as path:
                path.write_text(plain_json(values))

    def fine_tune(name: str, stage: Callable[[], train.FlowMatching], start: str) -> None:
        if not {name, f"{name}, {args.sampler}"} <= values.keys():
            train.load(tuned := stage(), folder / start, anew=True)
            model = loaded(train.carry_out(tuned, watched, log), args)
            measure(name, partial(generated, model, held_out, args))

    lips = generated(pretrained, watched, args, args.seed)
    late = int(sync_metrics(net, lips, sounds(watched, args.frames))["sync_offset"].median())
    print(f"the pretrained model's lips are {late} frames late, says the reward's sync network")
    in_time = [shifted(clip, -late) for clip in held_out]
    measure("shifted sound", partial(generated, pretrained, in_time, args))
    for g in GUIDANCE:
        measure(f"guidance {g}", partial(generated, curated, held_out, args, guidance=g))
    for n in BEST_OF:
        measure(f"best of {n}", partial(best_of, n, curated, judge, held_out, args))
    found = train.encode(pretrained, clips, args.frames, args.device)
    run = train.Run(args, log, clips, watched, found, found)
    fine_tune("rejection sampling", partial(RejectionSampling, run, judge, budget), "curate.pt")
    fine_tune("curated as found", partial(curated_as_found, run, judge, clips), "state.pt")


if __name__ == "__main__":
    with one_line("stopped", "use a machine with more of it"):
        main()
