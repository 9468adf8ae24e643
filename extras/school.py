"""School: how the embedded judge is taught, examined and tried; and the command that trains a sync network.

    python -m extras.school teach [--data DIR]         teach the judge, on drawn talkers or your clips
    python -m extras.school validate [--judge NAME]    can this judge hear, see and tell? on your clips?
    python -m extras.school sync [--data DIR]          train a sync network, for the reward or to measure

Lessons (extras/lessons.py) are labelled by the truth of drawn talkers; on real clips, and on what a generator
made, by the mouth readers and held-out metrics of sample.py. So the judge learns from the signal that the lip
correlation measures. It is shown a clip and nothing else, and no reward computes that correlation; but a
generator that is trained by this judge is measured by what its judge was taught to see. Sync confidence, by
another network, and your own eyes are the independent checks.

B clips, F frames.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from tqdm import trange

from data import Clip, folder_clips, pixels, sounds
from extras.arguments import CROP_HELP, Parser, check_numbers, crop_argument
from extras.files import MediaError, one_line, writing
from extras.media import FPS, SAMPLES_PER_FRAME, SAMPLE_RATE
from extras import reward_flags
from extras.lessons import (FAULTS, GROUP, LESSON_FRAMES, MATERIAL_FRAMES, VERSIONS, Lessons, Material, act,
                            draw_lessons, generated_material, good_material, spoil, whole)
from extras.muon import Muon
from extras.people import STUDY_SEED, bootstrap, pairwise_accuracy, spearman
from extras.sync import save_sync, train_sync
from extras.talkers import synthetic_clips
from model import load_generator
from reward import ASPECTS, Judge, rate_whole
from sample import seeded_rng, sync_metrics

# ---------------------------------------------------------------- the tiny judge, and how it learns

GROUP_WEIGHT = 0.25                 # of ratings inside groups: at 1 other aspects are unlearned
GROUP_MOUTHS = 4.0                  # of mouths inside groups, in the loss of mouths
TOWER_PAIRS = 40                    # pairs of good frames that the vision tower sees in a step
TOWER_FRAMES = 1500                 # frames of sound that the audio tower hears in a step
TOWER_STREAM = 10 ** 12             # where the random numbers of these steps begin
LEARNING_RATE, MUON_RATE = 1.5e-3, 0.02


def tiny_judge(seed: int = 0) -> Judge:
    """Return the embedded judge with random weights: a Qwen2.5-Omni thinker as small as it can be.

    Classes, files and code path are those of a judge of 3 or 30 billion parameters. assets/judge holds its
    shape (64 pixels in patches of 8, two frames to four tokens, four layers of width 128), its rubric of few
    words, and a tokenizer whose merges are these words: it knows no other language.
    """
    shipped = Judge.load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(shipped.model)(shipped.model.config)
    return Judge(model, shipped.processor, shipped.rubric, shipped.side, shipped.window)


def within_groups(error: Tensor, of: int) -> Tensor:
    """Subtract its mean from each group, (n of, ...) -> (n, of, ...): GRPO sees differences alone."""
    error = error.unflatten(0, (-1, of))
    return error - error.mean(1, keepdim=True)


def mouth_loss(error: Tensor, grouped: int, of: int) -> Tensor:
    """Return the mean square error of mouths, and, of the last `grouped`, of what they are in groups `of`."""
    loss = error.square().mean()
    if grouped:
        loss = loss + GROUP_MOUTHS * within_groups(error[-grouped:], of).square().mean()
    return loss


class Hints(nn.Module):
    """Questions on the way, without which so small a model does not learn to compare lips and sound at all.

    Linear readouts ask the vision tower how open the mouth is, how much changes between two frames, how sharp
    they are, and which faults there are; the audio tower, how open the sound wants the mouth, and how loud it
    is; the second layer, at the audio tokens, for both mouths, so it must fetch the picture of the same
    instant; the third for the square of their difference, whose mean is the distance, and, at the video
    tokens, for the faults again. They are thrown away after training.
    """

    def __init__(self, judge: Judge):
        super().__init__()
        model, self.answers = judge.model, {}
        w = model.config.text_config.hidden_size
        self.video_token, self.audio_token = model.config.video_token_id, model.config.audio_token_id
        self.sight, self.look = nn.Linear(4 * w, 2), nn.Linear(4 * w, 2)
        self.sound, self.both, self.gap = nn.Linear(w, 2), nn.Linear(w, 2), nn.Linear(w, 1)
        self.faults, self.faults_again = nn.Linear(8 * w, len(FAULTS)), nn.Linear(2 * w, len(FAULTS))
        for readout in self.children():                   # at zero they ask nothing yet: a judge that is
            nn.init.zeros_(readout.weight)                # taught on is not upset by random questions
        self.hooks = [
            self.listen("sight", model.visual, lambda inputs, out: out.pooler_output),
            self.listen("sound", model.audio_tower, lambda inputs, out: out.last_hidden_state),
            self.listen("ids", model.get_input_embeddings(), lambda inputs, out: inputs[0]),
            self.listen("second", model.model.layers[1], lambda inputs, out: out),
            self.listen("third", model.model.layers[2], lambda inputs, out: out)]

    def listen(self, name: str, module: nn.Module, of: Callable):
        """Keep what a module says of a clip until a loss takes it; the questions that follow are ignored."""
        def hook(module, inputs, out) -> None:
            self.answers.setdefault(name, of(inputs, out))
        return module.register_forward_hook(hook)

    def loss(self, lessons: Lessons) -> Tensor:
        """Return the weighted squared errors of all readouts of the last forward pass."""
        error = lambda guess, target: (guess - target).square().mean()
        grey = lambda difference: (difference.abs().mean((2, 3, 4, 5)) + 0.3).log()       # of 255 levels
        spread = lambda tokens: torch.cat([tokens.mean(1), tokens.std(1)], -1)
        b, f = lessons.mouth_seen.shape
        ids = self.answers.pop("ids")
        vision = self.answers.pop("sight").view(b, f // 2, -1)
        audio = self.answers.pop("sound").view(b, f, -1)
        second = self.answers.pop("second")[ids == self.audio_token].view(b, f, -1)
        third = self.answers.pop("third")
        third_audio = third[ids == self.audio_token].view(b, f, -1)
        third_video = third[ids == self.video_token].view(b, -1, third.shape[-1])
        seen, heard = lessons.mouth_seen, lessons.mouth_heard
        frames = lessons.frames.float().unflatten(1, (-1, 2))                     # (B, F/2, 2, 3, S, S)
        look = torch.stack([grey(frames.diff(dim=2)), grey(frames.diff(dim=-1)) - 2], -1)
        loud = (lessons.audio.view(b, f, -1).square().mean(-1) + 1e-3).log() / 2 + 2.5
        gap = (seen - heard).square().clamp_max(4)
        known = ~lessons.faults.isnan()
        return (2.0 * mouth_loss(self.sight(vision) - seen.view(b, -1, 2), lessons.grouped, GROUP)
                + 0.25 * error(self.look(vision), look)
                + 0.5 * error(self.sound(audio), torch.stack([heard, loud], -1))
                + 1.0 * error(self.both(second), torch.stack([seen, heard], -1))
                + 0.5 * error(self.gap(third_audio)[..., 0], gap)
                + 3.0 * error(self.faults(spread(vision))[known], lessons.faults[known])
                + 3.0 * error(self.faults_again(spread(third_video))[known], lessons.faults[known]))


def rating_loss(logits: Tensor, digits: Sequence[int], lessons: Lessons) -> Tensor:
    """Cross-entropy with soft labels: for quality 3.4, digit 3 counts .6 and 4 counts .4.

    And, inside groups, the error in the differences of lip-sync, which is all that GRPO sees of a judge: they
    are of a tenth of a point, where the loss of each rating alone hardly rises. logits (B, 3, vocabulary).
    """
    log_p = logits.log_softmax(-1)[..., list(digits)]                             # (B, 3, 5)
    scale = torch.arange(1.0, 6.0)
    soft = (1 - (lessons.quality[..., None] - scale).abs()).clamp_min(0)
    loss = -(soft * log_p).sum(-1).mean((0, 1))
    if lessons.grouped:
        rating = log_p[-lessons.grouped:, 0].softmax(-1) @ scale
        error = within_groups(rating - lessons.quality[-lessons.grouped:, 0], GROUP)
        loss = loss + GROUP_WEIGHT * nnf.smooth_l1_loss(error, torch.zeros_like(error), beta=0.1) / 0.1
    return loss


def vision_loss(judge: Judge, hints: Hints, good: Material, generated: Material | None,
                rng: torch.Generator) -> Tensor:
    """Show the vision tower pairs of frames, which is as far as it sees at once, and ask for the mouth.

    Of generated clips all versions are shown: GRPO will ask for their differences.
    """
    def draw(clips, count):
        rows = torch.randint(clips, (count,), generator=rng)
        at = 2 * torch.randint(good.frames.shape[1] // 2, (count,), generator=rng)
        return [(row, slice(t, t + 2)) for row, t in zip(rows.tolist(), at.tolist())]

    chosen = [(good, row, pair) for row, pair in draw(len(good), TOWER_PAIRS)]
    if generated:
        chosen += [(generated, clip * VERSIONS + version, pair)
                   for clip, pair in draw(len(generated) // VERSIONS, TOWER_PAIRS // 2)
                   for version in range(VERSIONS)]
    frames = torch.cat([material.frames[row, pair] for material, row, pair in chosen])
    mouth = torch.stack([material.mouth_seen[row, pair] for material, row, pair in chosen])
    inputs = judge.processor.video_processor(frames[None], do_sample_frames=False, return_tensors="pt")
    judge.model.visual(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    error = hints.sight(hints.answers.pop("sight").view(len(chosen), -1)) - mouth
    return mouth_loss(error, len(chosen) - TOWER_PAIRS, VERSIONS)


def audio_loss(judge: Judge, hints: Hints, good: Material, rng: torch.Generator) -> Tensor:
    """Play stretches of speech of one length to the audio tower and ask for the mouth that they call for."""
    frames = 2 * whole(rng, LESSON_FRAMES[0] // 2, LESSON_FRAMES[1] // 2 + 1)
    rows = torch.randint(len(good), (TOWER_FRAMES // frames,), generator=rng)
    start = whole(rng, 0, good.frames.shape[1] - frames + 1)
    hear = judge.processor.feature_extractor
    hear.n_samples = frames * SAMPLES_PER_FRAME
    inputs = hear(list(good.audio[rows, start:start + frames].flatten(1).numpy()), sampling_rate=SAMPLE_RATE,
                  return_attention_mask=True, return_tensors="pt")
    judge.model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
    guess = hints.sound(hints.answers.pop("sound").view(len(rows), frames, -1))[..., 0]
    return (guess - good.mouth_heard[rows, start:start + frames]).square().mean()


def descend(model: nn.Module, hints: Hints, steps: int, losses: Callable[[int], dict[str, Tensor]],
            title: str) -> None:
    """Step down a sum of losses: Muon for the matrices inside, AdamW for the rest; warm up, then decay."""
    trunk = [p for name, p in model.named_parameters()
             if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    inside = {id(p) for p in trunk}
    rest = [p for module in (model, hints) for p in module.parameters() if id(p) not in inside]
    optimizers = [Muon(trunk, lr=MUON_RATE, weight_decay=0.01),
                  torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)]
    rate = lambda step: min((step + 1) / 20, 1, 1.02 - step / max(steps, 1))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step in (bar := trange(steps, desc=title, unit="step")):
        parts = losses(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(parts.values()).backward()
        nn.utils.clip_grad_norm_([*trunk, *rest], 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in parts.items()}, refresh=False)


def teach(judge: Judge, good: Material, generated: Material | None, steps: int, tower_steps: int,
          seed: int = 0, batch: int = 32) -> None:
    """Train the embedded judge: first its towers alone, on mouths, for a quarter of a lesson's cost; then all
    of it together, on whole lessons, and still on mouths, or what the towers know of them would fade."""
    torch.manual_seed(seed)
    model, hints = judge.model.requires_grad_(True).train(), Hints(judge)
    rubric = judge.rubric
    descending = rubric | {aspect: dict(reversed(rubric[aspect].items())) for aspect in ASPECTS}

    def mouths_alone(step):
        rng = seeded_rng(seed, TOWER_STREAM + step)
        return {"vision": vision_loss(judge, hints, good, generated, rng),
                "audio": audio_loss(judge, hints, good, rng)}

    def whole_lessons(step):
        lessons = draw_lessons(good, generated, batch, seed * 1_000_003 + step)
        judge.rubric = descending if step % 2 else rubric        # both orders of the scale
        logits = judge.logits(lessons.frames, lessons.audio)
        return {"ratings": rating_loss(logits, judge.digits, lessons), "hints": hints.loss(lessons),
                **mouths_alone(step)}

    descend(model, hints, tower_steps, mouths_alone, "teaching the towers")
    descend(model, hints, steps, whole_lessons, "teaching the judge")
    judge.rubric = rubric
    for hook in hints.hooks:
        hook.remove()
    model.eval().requires_grad_(False)


def save_judge(judge: Judge, folder: Path, card: str) -> None:
    """Write the judge as transformers does; beside it judge.json (rubric, pixels, window, dtype: what counts
    are differences that bf16 would round away) and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        judge.model.half().save_pretrained(temporary)
        judge.model.float()
        judge.processor.save_pretrained(temporary)
        own = {"rubric": judge.rubric, "side": judge.side, "window": judge.window, "dtype": "float32"}
        Path(temporary, "judge.json").write_text(json.dumps(own, indent=1) + "\n")
        Path(temporary, "README.md").write_text(card, "utf-8", "backslashreplace")
        for path in Path(temporary).iterdir():
            os.replace(path, folder / path.name)


# ---------------------------------------------------------------- is a judge to be trusted?

TRUSTED = 0.8                       # share of pairs that a judge must rank right, of each kind


def exam(judge, good: Material, groups: int, of: int = 8) -> dict[str, tuple[tuple, tuple]]:
    """Compare ratings of fresh lessons, `of` made from each of `groups` clips, with their quality.

    Returns: aspect -> Spearman over all clips, and the share of pairs, made from one clip and at least half a
    point apart, that are ranked right, as in GRPO's groups; each as (value, low, high) with a 95% interval.
    """
    score, quality = [], []
    for g in range(groups):
        lessons = draw_lessons(good, None, of, 99 * 1_000_003 + g, LESSON_FRAMES[1], [g % len(good)] * of)
        names = [f"lesson {g}.{i}" for i in range(of)]
        score.append(rate_whole(judge, lessons.frames / 255, lessons.audio, names))
        quality.append(lessons.quality)
    group = torch.arange(groups).repeat_interleave(of)
    pairs = lambda s, q, g: pairwise_accuracy(s, q, g, least=0.5)
    return {aspect: (bootstrap(spearman, s, q), bootstrap(pairs, s, q, group))
            for aspect, s, q in zip(ASPECTS, torch.cat(score).T, torch.cat(quality).T)}


def spoilt_in_known_ways(good: Material) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield (aspect, what was done, frames, sound) of all clips, one way after the other.

    Each aspect begins with the clips as they are; for expressiveness acted anew with gain 1, as the acting
    itself must cost nothing.
    """
    rng = torch.Generator().manual_seed(0)
    start, frames = (good.frames.shape[1] - LESSON_FRAMES[1]) // 2, LESSON_FRAMES[1]
    now = slice(start, start + frames)
    true = good.frames[:, now] / 255

    def sound(late):
        return good.audio[:, start - late:start - late + frames].flatten(1)

    def acted(mouth, rest):
        return torch.stack([act(f / 255, p, mouth, rest)[now] for f, p in zip(good.face, good.pose)])

    yield "lip_sync", "", true, sound(0)
    for late in (-5, -3, 3, 5):
        yield "lip_sync", f"sound {40 * late:+d} ms", true, sound(late)
    yield "lip_sync", "another's sound", true, sound(0).roll(1, 0)
    yield "expressiveness", "", acted(1, 1), sound(0)
    for mouth, rest in (0.5, 1), (0.5, 0.5), (0, 0):
        yield "expressiveness", f"mouth x {mouth}, rest x {rest}", acted(mouth, rest), sound(0)
    yield "motion", "", true, sound(0)
    for fault, u in product(FAULTS, (0.4, 0.8)):
        spoilt = [spoil(fault, u, x, mouth, rng)[0] for x, mouth in zip(true, good.mouth_seen[:, now])]
        yield "motion", f"{fault} {u}", torch.stack(spoilt), sound(0)


def battery(judge, good: Material) -> str:
    """Compare each clip with the same clip spoilt in one known way, and say which aspects can be trusted.

    Returns: a table: aspect, what was done, share of pairs ranked right with a 95% interval, verdict.
    """
    names = [f"clip {i}" for i in range(len(good))]
    lines, failed = [f"{'aspect':16}{'spoilt by':26}true clip rated higher"], set()
    for aspect, done, frames, sound in spoilt_in_known_ways(good):
        score = rate_whole(judge, frames, sound, names)[:, ASPECTS.index(aspect)]
        if not done:
            true = score
            continue
        share, low, high = bootstrap(np.mean, (true > score).float())
        fails = not share >= TRUSTED                     # nor where a single clip gives no interval
        if fails:
            failed.add(aspect)
        lines.append(f"{aspect:16}{done:26}{share:.2f} [{low:.2f}, {high:.2f}]{'  fails' if fails else ''}")
    for aspect in ASPECTS:
        verdict = "do not trust it: it misses faults above" if aspect in failed else "to be trusted"
        lines.append(f"{aspect}: {verdict}")
    return "\n".join(lines)


# ---------------------------------------------------------------- command line

SIDE = 64                           # pixels that the embedded judge sees
JUDGE_CLIPS, SYNC_CLIPS, EXAM_CLIPS = 1500, 1000, 64          # drawn talkers to teach on, and to examine

CARD = """# The embedded judge

A Qwen2.5-Omni thinker that knows no language but its rubric (judge.json) and no clips but those like its
training data: {data}. Made by `{command}`.

Agreement with the quality of fresh held-out lessons (64 clips, 8 variants each; 95% intervals):

{table}

The lessons are graded faults, not ratings of people. It is for experiments and does not measure people.
"""


def clips_for(args: argparse.Namespace, count: int, held_out: int = EXAM_CLIPS
              ) -> tuple[Sequence[Clip], Sequence[Clip]]:
    """Return clips to learn from, and held-out ones, at the embedded judge's size; so many of drawn talkers."""
    if args.data:
        return folder_clips(args.data, SIDE, 3.0, args.crop)
    return tuple(synthetic_clips(n, SIDE, MATERIAL_FRAMES / FPS, seed + args.seed)
                 for n, seed in ((count, 0), (held_out, STUDY_SEED)))


def train_judge(args: argparse.Namespace) -> None:
    """Teach the embedded judge and write it to --out with its card."""
    judge = Judge.load(args.from_judge) if args.from_judge else tiny_judge(args.seed)
    for run in args.generator:
        load_generator(run)                              # what is missing is told now
    clips, held_out = clips_for(args, JUDGE_CLIPS)
    if not held_out:
        raise MediaError(args.data, "has no clips to hold out; add files")
    good, unseen = good_material(clips), good_material(held_out)         # what is too short is told now
    generated = generated_material(args.generator, clips, args.seed) if args.generator else None
    teach(judge, good, generated, args.steps, args.tower_steps, seed=args.seed)
    table = "| aspect | Spearman | pairs of one clip ranked right |\n|---|---|---|"
    for aspect, cells in exam(judge, unseen, EXAM_CLIPS).items():
        table += f"\n| {aspect} |" + "".join(" {:.3f} ({:.3f} to {:.3f}) |".format(*cell) for cell in cells)
    data = f"{len(good)} clips of {args.data}" if args.data else f"{len(good)} drawn talkers"
    data += f", and {len(generated)} clips made by early generators" if generated else ""
    command = shlex.join(["python", "-m", "extras.school", *sys.argv[1:]])
    save_judge(judge, args.out, CARD.format(data=data, command=command, table=table))
    print(f"{table}\n{args.out}: the judge and its card; to use it: --judge {args.out}")


def train_sync_network(args: argparse.Namespace) -> None:
    """Train the sync network and say how well it finds the offset of held-out clips."""
    clips, held_out = clips_for(args, SYNC_CLIPS)
    if len(clips) < 2 or not held_out:
        raise MediaError(args.data, f"has {len(clips)} clips to learn from and {len(held_out)} held out, too "
                         "few to teach a network; add files")
    net = train_sync(clips, args.seed, args.steps)
    save_sync(net, args.out, clips=str(args.data or f"{len(clips)} drawn talkers"), seed=args.seed)
    frames = min(len(clip.frames) for clip in held_out)
    videos, audio = pixels(held_out, frames), sounds(held_out, frames)
    own, other = (sync_metrics(net, videos, sound) for sound in (audio, audio.roll(1, 0)))
    near = (own["sync_offset"].abs() <= 1).float().mean()
    print(f"{len(held_out)} held-out clips: offset within a frame in {near:.0%}; confidence "
          f"{own['sync_confidence'].mean():.3f}, with another's sound {other['sync_confidence'].mean():.3f}\n"
          f"{args.out}: the network")


def validate_judge(args: argparse.Namespace) -> None:
    """Run the battery on held-out clips."""
    judge = reward_flags.make_judge(args)
    if judge is None:
        raise MediaError("--judge none", "cannot be validated; name a judge")
    _, held_out = clips_for(args, 1, args.clips)
    if len(held_out) < 2:
        raise MediaError(args.data, f"has {len(held_out)} held-out clips, too few to validate on; add files")
    good = good_material(held_out[:args.clips])
    print(f"{len(good)} held-out clips, judge {args.judge_url or args.judge}\n{battery(judge, good)}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m extras.school", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(required=True)
    teaches = commands.add_parser("teach", help="teach the embedded judge")
    validates = commands.add_parser("validate", help="try a judge on clips with known faults")
    syncs = commands.add_parser("sync", help="train a sync network, for the reward or to measure")
    for command, run in (teaches, train_judge), (validates, validate_judge), (syncs, train_sync_network):
        command.set_defaults(run=run)
        command.add_argument("--data", type=Path, help="a video, or a folder of videos (drawn talkers)")
        command.add_argument("--crop", type=crop_argument, default="face", help=CROP_HELP)
        command.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    for command, steps, out in (teaches, 1000, "runs/judge"), (syncs, 400, "runs/sync"):
        command.add_argument("--steps", type=int, default=steps, help="of training (%(default)s)")
        command.add_argument("--out", type=Path, default=out, help="where to write (%(default)s)")
    teaches.add_argument("--tower-steps", type=int, default=2500,
                         help="of training the judge's towers by themselves, before (%(default)s)")
    teaches.add_argument("--from-judge", metavar="DIR",
                         help="teach this one on, such as assets/judge, instead of a new one")
    teaches.add_argument("--generator", nargs="+", default=[], metavar="RUN",
                         help="runs of train.py, best of several ages, to learn from their videos too")
    validates.add_argument("--clips", type=int, default=EXAM_CLIPS, help="to validate on (%(default)s)")
    reward_flags.judge_flags(validates)
    args = p.parse_args(argv)
    check_numbers(p, args, seed=0, steps=1, tower_steps=0, clips=2)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if "out" in args:                                     # before the hour of work that would be lost
        if any(args.out.glob("*")):
            raise MediaError(args.out, "holds files; choose another --out, or empty it first")
        with writing(args.out):
            args.out.mkdir(parents=True, exist_ok=True)
    try:
        args.run(args)
    finally:
        with suppress(OSError, AttributeError):          # holds the model, or there is no --out
            args.out.rmdir()


if __name__ == "__main__":
    with one_line("stopped; nothing was written", "use fewer or shorter clips"):
        main()
