"""School: how the embedded judge is taught, examined and tried; and the command that trains a sync network.

    python -m extras.school teach [--data DIR]           teach the embedded judge, on drawn talkers or your clips
    python -m extras.school validate [--judge NAME]      can this judge hear, see and tell? on your clips?
    python -m extras.school sync [--data DIR]            train a sync network, for the reward or to measure

1. Lessons (extras/lessons.py): good clips spoilt in graded ways, and takes of early generators.
2. The tiny judge: a multimodal language model of 2.4 M parameters. First its towers learn to see and to hear mouths,
   then all of it learns to rate whole lessons.
3. An exam on fresh lessons, and a battery of known faults for any judge.

Where the labels come from. Lessons are labelled by the truth of drawn talkers. On real clips, and on what a generator
made, they are labelled by the readers of mouths and by the held-out metrics of sample.py. So the judge learns from the
same signal that the lip correlation measures. A judge is shown a clip and nothing else, and no reward computes that
correlation; but a generator that is trained by this judge is measured by what its judge was taught to see. Sync
confidence, by another network, and the eye are the checks that stand apart.

School may import everything. B clips, F frames, S pixels per side.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from tqdm import trange

from data import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, Clip, MediaError, folder_clips, one_line, pixels, sounds, writing
from extras import reward_flags
from extras.lessons import (FAULTS, LESSON_FRAMES, MATERIAL_FRAMES, RIVALS, VERSIONS, Lesson, Material, act,
                            generated_material, good_material, lessons, spoil, whole)
from extras.people import HELD_OUT_SEED, bootstrap, pairwise_accuracy, spearman
from extras.sync import save_sync, train_sync
from extras.talkers import synthetic_clips
from reward import ASPECTS, Judge, prompt
from sample import check_numbers, crop_argument, device_argument, sync_metrics

# ---------------------------------------------------------------- the tiny judge, and how it learns
#
# A thinker of the Qwen2.5-Omni architecture, as small as it can be: the same classes, files and code path as a judge of
# 3 or 30 billion parameters, from scratch, on a laptop.

RIVALRY = 0.25                                       # weight of the loss of rivals: at 1 other aspects are unlearned
RIVAL_MOUTHS = 4.0                                   # the same of the mouths that the vision tower sees
TOWER_PAIRS, TOWER_FRAMES = 40, 1500                 # of a step of the towers: pairs of good frames, frames of sound
TOWER_STREAM = 10 ** 12                              # where the random numbers of these steps begin

TINY_SIDE, TINY_MELS, TINY_WIDTH, TINY_LAYERS, TINY_HEADS = 64, 64, 128, 4, 4
TINY_RUBRIC = {                                      # few words: it knows no language but these
    "template": "{look}, {ignore}: {scale}?",
    "lip_sync": {"look": "lips and sound", "ignore": "not head", "1": "unrelated", "3": "loose", "5": "exact"},
    "expressiveness": {"look": "liveliness of mouth, brows, head", "ignore": "not sound", "1": "still",
                       "3": "subdued", "5": "lively"},
    "motion": {"look": "clean, steady motion", "ignore": "not sound", "1": "broken", "3": "faulty", "5": "as filmed"},
}
SPECIAL = {"image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
           "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
           "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
CHAT = ("{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'video' %}<|vision_bos|><|VIDEO|>"
        "<|vision_eos|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}")


def both_orders(rubric: dict) -> tuple[dict, dict]:
    """Return a rubric as it is, and with its scales from 5 to 1."""
    return rubric, rubric | {aspect: dict(reversed(rubric[aspect].items())) for aspect in ASPECTS}


def tiny_processor(rubric: dict = TINY_RUBRIC):
    """Build a processor: a byte-level tokenizer whose merges are the rubric's words, 64x64 pixels, 64 mel bands."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    texts = [prompt(aspect, order) for aspect, order in product(ASPECTS, both_orders(rubric))]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|pad|>", *SPECIAL.values()]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>",
                                                     extra_special_tokens=SPECIAL)
    patches = dict(patch_size=8, temporal_patch_size=2, merge_size=4,
                   size={"shortest_edge": TINY_SIDE ** 2, "longest_edge": TINY_SIDE ** 2})
    hear = transformers.WhisperFeatureExtractor(feature_size=TINY_MELS, sampling_rate=SAMPLE_RATE, hop_length=160,
                                                n_fft=400, chunk_length=30)
    return transformers.Qwen2_5OmniProcessor(transformers.Qwen2VLImageProcessor(**patches),
                                             transformers.Qwen2VLVideoProcessor(**patches), hear, tokenizer,
                                             chat_template=CHAT)


def tiny_judge(seed: int = 0) -> Judge:
    """Build the embedded judge with random weights: 2.4 M parameters, two frames of video to four tokens."""
    import transformers
    processor, w, heads = tiny_processor(), TINY_WIDTH, TINY_HEADS
    token = {name: processor.tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL.items()}
    config = transformers.Qwen2_5OmniThinkerConfig(
        audio_config=dict(num_mel_bins=TINY_MELS, d_model=w, encoder_layers=1, encoder_attention_heads=heads,
                          encoder_ffn_dim=2 * w, output_dim=w, n_window=100),
        vision_config=dict(depth=2, hidden_size=w // 2, intermediate_size=w, num_heads=heads, patch_size=8,
                           temporal_patch_size=2, spatial_merge_size=4, out_hidden_size=w, window_size=TINY_SIDE,
                           fullatt_block_indexes=[0, 1]),
        text_config=dict(vocab_size=len(processor.tokenizer), hidden_size=w, intermediate_size=5 * w // 2,
                         num_hidden_layers=TINY_LAYERS, num_attention_heads=heads, num_key_value_heads=heads,
                         max_position_embeddings=4096, pad_token_id=processor.tokenizer.pad_token_id,
                         rope_parameters=dict(rope_type="default", rope_theta=1000.0, mrope_section=[8, 4, 4])),
        image_token_id=token["image_token"], audio_token_id=token["audio_token"],
        video_token_id=token["video_token"], vision_start_token_id=token["vision_bos_token"],
        vision_end_token_id=token["vision_eos_token"], audio_start_token_id=token["audio_bos_token"],
        audio_end_token_id=token["audio_eos_token"], position_id_per_seconds=FPS, seconds_per_chunk=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    return Judge(model, processor, TINY_RUBRIC, TINY_SIDE, LESSON_FRAMES[1])


def among_rivals(error: Tensor, rivals: int) -> Tensor:
    """Take off each group of rivals, (n rivals, ...), what its members have in common."""
    error = error.unflatten(0, (-1, rivals))
    return error - error.mean(1, keepdim=True)


class Hints(nn.Module):
    """Questions on the way, without which so small a model learns nothing: that lips and sound can be compared at all.

    Linear readouts ask the vision tower how open the mouth is, how much changes between two frames, how sharp they are,
    and which faults there are; the audio tower, how open the sound wants the mouth, and how loud it is; the second
    layer, at the audio tokens, for both mouths, which forces it to fetch the picture of the same instant; the third for
    the square of their difference, whose mean is the distance, and, at the video tokens, for the faults again. They are
    thrown away after training.
    """

    def __init__(self, judge: Judge):
        super().__init__()
        w, self.towers, self.seen, model = TINY_WIDTH, {}, {}, judge.model
        self.tokens = model.config.video_token_id, model.config.audio_token_id
        self.sight, self.look, self.sound, self.both, self.gap = (
            nn.Linear(*n) for n in ((4 * w, 2), (4 * w, 2), (w, 2), (w, 2), (w, 1)))
        self.faults, self.faults_again = nn.Linear(8 * w, len(FAULTS)), nn.Linear(2 * w, len(FAULTS))
        for readout in self.children():                          # at zero they ask nothing yet: a judge that is
            nn.init.zeros_(readout.weight)                       # taught on is not upset by random questions
        self.hooks = [                                           # what the towers say of the clips that they read last
            model.visual.register_forward_hook(lambda *call: self.towers.update(sight=call[-1].pooler_output)),
            model.audio_tower.register_forward_hook(
                lambda *call: self.towers.update(sound=call[-1].last_hidden_state)),
            model.register_forward_pre_hook(self.keep_ids, with_kwargs=True)]
        self.hooks += [model.model.layers[i].register_forward_hook(self.keep(name))
                       for i, name in ((1, "second"), (2, "third"))]

    def keep_ids(self, model, args, inputs) -> None:
        self.reading = "input_features" in inputs                # the clip, not the questions that follow it
        if self.reading:
            self.seen["ids"] = inputs["input_ids"]

    def keep(self, name: str) -> Callable:
        def hook(module, args, out) -> None:
            if self.reading:
                self.seen[name] = out
        return hook

    def loss(self, truth: Lesson) -> Tensor:
        """Return the weighted squared errors of all readouts of the last forward pass."""
        b, f = truth.shown.shape
        video, audio = (self.seen["ids"] == token for token in self.tokens)
        at = lambda name, where: self.seen[name][where].view(b, -1, TINY_WIDTH)
        spread = lambda x: torch.cat([x.mean(1), x.std(1)], -1)
        loud = (truth.audio.view(b, f, -1).square().mean(-1) + 1e-3).log() / 2 + 2.5
        gap = (truth.shown - truth.called).square().clamp_max(4)
        vision, known = self.towers["sight"].view(b, f // 2, -1), ~truth.faults.isnan()
        x = truth.frames.float().unflatten(1, (-1, 2))                               # (B, F/2, 2, 3, S, S)
        strength = lambda d: (d.abs().mean((2, 3, 4, 5)) + 0.3).log()                # of grey levels of 255
        look = torch.stack([strength(x.diff(dim=2)), strength(x.diff(dim=-1)) - 2], -1)
        error = lambda guess, target: (guess - target).square().mean()
        mouth = self.sight(vision) - truth.shown.view(b, -1, 2)
        rivals = among_rivals(mouth[b - truth.rivals:], RIVALS).square().mean() if truth.rivals else 0.0
        return (2.0 * (mouth.square().mean() + RIVAL_MOUTHS * rivals) + 0.25 * error(self.look(vision), look)
                + 0.5 * error(self.sound(self.towers["sound"].view(b, f, -1)), torch.stack([truth.called, loud], -1))
                + 1.0 * error(self.both(at("second", audio)), torch.stack([truth.shown, truth.called], -1))
                + 0.5 * error(self.gap(at("third", audio))[..., 0], gap)
                + 3.0 * error(self.faults(spread(vision))[known], truth.faults[known])
                + 3.0 * error(self.faults_again(spread(at("third", video)))[known], truth.faults[known]))


def rating_loss(logits: Tensor, digits: Sequence[int], truth: Lesson) -> Tensor:
    """Cross-entropy with soft labels: for quality 3.4, digit 3 counts .6 and 4 counts .4. And, of rivals, the error in
    the differences of lip-sync, which is all that GRPO sees of a judge: they are of a tenth of a point, where the loss
    of each rating by itself hardly rises. logits (B, 3, vocabulary)."""
    log_p = logits.log_softmax(-1)[..., list(digits)]                                # (B, 3, 5)
    scale = torch.arange(1.0, 6.0)
    soft = (1 - (truth.quality[..., None] - scale).abs()).clamp_min(0)
    loss = -(soft * log_p).sum(-1).mean((0, 1))
    if truth.rivals:
        rating = log_p[-truth.rivals:, 0].softmax(-1) @ scale
        error = among_rivals(rating - truth.quality[-truth.rivals:, 0], RIVALS)
        loss = loss + RIVALRY * nnf.smooth_l1_loss(error, torch.zeros_like(error), beta=0.1) / 0.1
    return loss


def seen_loss(judge: Judge, hints: Hints, good: Material, generated: Material | None, rng: torch.Generator) -> Tensor:
    """Show the vision tower pairs of frames, which is as far as it sees at once, and ask for the mouth."""
    pick = lambda n, count: zip(*(torch.randint(most, (count,), generator=rng).tolist()
                                  for most in (n, good.frames.shape[1] // 2)))
    at = [(good, row, slice(2 * t, 2 * t + 2)) for row, t in pick(len(good), TOWER_PAIRS)]
    if generated:                                    # all versions of a clip: GRPO will ask for their differences
        at += [(generated, clip * VERSIONS + version, slice(2 * t, 2 * t + 2))
               for clip, t in pick(len(generated) // VERSIONS, TOWER_PAIRS // 2) for version in range(VERSIONS)]
    pairs = torch.cat([material.frames[row, t] for material, row, t in at])
    shown = torch.stack([material.shown[row, t] for material, row, t in at])
    inputs = judge.processor.video_processor(pairs[None], do_sample_frames=False, return_tensors="pt")
    judge.model.visual(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    error = hints.sight(hints.towers["sight"].view(len(at), -1)) - shown
    loss = error.square().mean()
    if generated:
        loss = loss + RIVAL_MOUTHS * among_rivals(error[TOWER_PAIRS:], VERSIONS).square().mean()
    return loss


def heard_loss(judge: Judge, hints: Hints, good: Material, rng: torch.Generator) -> Tensor:
    """Play stretches of speech, of one length, to the audio tower and ask for the mouth that they call for."""
    frames = 2 * whole(rng, LESSON_FRAMES[0] // 2, LESSON_FRAMES[1] // 2 + 1)
    rows = torch.randint(len(good), (TOWER_FRAMES // frames,), generator=rng)
    start = whole(rng, 0, good.frames.shape[1] - frames + 1)
    judge.processor.feature_extractor.n_samples = frames * SAMPLES_PER_FRAME
    inputs = judge.processor.feature_extractor(
        list(good.audio[rows, start:start + frames].flatten(1).numpy()), sampling_rate=SAMPLE_RATE,
        return_attention_mask=True, return_tensors="pt")
    judge.model.get_audio_features(inputs["input_features"], inputs["attention_mask"])
    heard = hints.sound(hints.towers["sound"].view(len(rows), frames, -1))[..., 0]
    return (heard - good.called[rows, start:start + frames]).square().mean()


def descend(model: nn.Module, hints: Hints, steps: int, losses: Callable[[int], dict[str, Tensor]], title: str,
            lr: float, muon_lr: float) -> None:
    """Step down the sum of some losses: Muon for the matrices inside, AdamW for the rest; warm up, decay to zero."""
    trunk = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    inside = {id(p) for p in trunk}
    rest = [p for module in (model, hints) for p in module.parameters() if id(p) not in inside]
    optimizers = [torch.optim.Muon(trunk, lr=muon_lr, weight_decay=0.01),
                  torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / 20, 1, 1.02 - step / max(steps, 1)))
                 for o in optimizers]
    mean = {}
    for step in (bar := trange(steps, desc=title, unit="step")):
        parts = losses(step)
        model.zero_grad(), hints.zero_grad()
        sum(parts.values()).backward()
        torch.nn.utils.clip_grad_norm_([*trunk, *rest], 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step(), schedule.step()
        for name, loss in parts.items():
            if not loss.isfinite():
                raise MediaError("the judge", f"its loss is {loss.item()} at step {step}; lower the learning rate")
            mean[name] = 0.95 * mean.get(name, loss.item()) + 0.05 * loss.item()
        bar.set_postfix({name: f"{value:.3f}" for name, value in mean.items()})


def teach(judge: Judge, good: Material, generated: Material | None, steps: int, tower_steps: int = 0, batch: int = 32,
          seed: int = 0, lr: float = 1.5e-3, muon_lr: float = 0.02) -> None:
    """Train the embedded judge: first its towers alone, on mouths, for a quarter of a lesson's cost; then all of it
    together, on whole lessons, and still on mouths, or what the towers know of them would fade. Without tower_steps
    there are whole lessons alone."""
    torch.manual_seed(seed)
    model, hints = judge.model.requires_grad_(True).train(), Hints(judge)
    rubrics = both_orders(judge.rubric)

    def mouths_alone(step):
        rng = torch.Generator().manual_seed(TOWER_STREAM + seed * 1_000_003 + step)
        return {"seen": seen_loss(judge, hints, good, generated, rng), "heard": heard_loss(judge, hints, good, rng)}

    def whole_lessons(step):
        truth = lessons(good, generated, batch, seed * 1_000_003 + step)
        judge.rubric = rubrics[step % 2]
        logits = judge.logits(truth.frames, truth.audio)
        losses = {"ratings": rating_loss(logits, judge.digits, truth), "hints": hints.loss(truth)}
        return losses | (mouths_alone(step) if tower_steps else {})
    descend(model, hints, tower_steps, mouths_alone, "teaching the towers", lr, muon_lr)
    descend(model, hints, steps, whole_lessons, "teaching the judge", lr, muon_lr)
    judge.rubric = rubrics[0]
    for hook in hints.hooks:
        hook.remove()
    model.eval().requires_grad_(False)


def save_judge(judge: Judge, folder: Path, card: str) -> None:
    """Write the judge as transformers does; beside it judge.json (rubric, pixels, window, dtype: what counts
    are differences that bf16 would round away) and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        judge.model.half().save_pretrained(temporary)
        judge.model.float()
        judge.processor.save_pretrained(temporary)
        own = {"rubric": judge.rubric, "side": judge.side, "window": judge.window, "dtype": "float32"}
        Path(temporary, "judge.json").write_text(json.dumps(own, indent=1) + "\n")
        Path(temporary, "README.md").write_text(card)
        for path in Path(temporary).iterdir():
            os.replace(path, folder / path.name)


# ---------------------------------------------------------------- is a judge to be trusted?

TRUSTED = 0.8                                        # share of pairs that a judge must rank right, of each kind


def exam(judge, good: Material, groups: int, of: int = 8, seed: int = 99) -> dict[str, tuple[tuple, tuple]]:
    """Ask for ratings of fresh lessons, `of` made from each of `groups` clips, and compare them with their quality.

    Returns: aspect -> Spearman over all clips, and the share of pairs, made from one clip and at least half a point
    apart, that are ranked right, as in GRPO's groups; each as (value, low, high) with a 95% interval.
    """
    score, quality = [], []
    for g in range(groups):
        truth = lessons(good, None, of, seed * 1_000_003 + g, LESSON_FRAMES[1], [g % len(good)] * of)
        score.append(judge.rate(truth.frames / 255, truth.audio, [f"lesson {g}.{i}" for i in range(of)]).score)
        quality.append(truth.quality)
    group = torch.arange(groups).repeat_interleave(of)
    pairs = lambda s, q, g: pairwise_accuracy(s, q, g, least=0.5)
    return {aspect: (bootstrap(spearman, s, q), bootstrap(pairs, s, q, group))
            for aspect, s, q in zip(ASPECTS, torch.cat(score).T, torch.cat(quality).T)}


def battery(judge, good: Material, seed: int = 0) -> str:
    """Compare each clip with the same clip spoilt in one known way, and say which aspects can be trusted.

    An aspect is to be trusted when the true clip is rated higher in at least 80% of the pairs of each kind.

    Returns: a table: aspect, what was done, share of pairs ranked right with a 95% interval, verdict.
    """
    rng, names = torch.Generator().manual_seed(seed), [f"clip {i}" for i in range(len(good))]
    spare = (good.frames.shape[1] - LESSON_FRAMES[1]) // 2
    now = slice(spare, spare + LESSON_FRAMES[1])
    true, heard = good.frames[:, now] / 255, good.audio[:, now].flatten(1)
    late = lambda by: good.audio[:, spare - by:spare - by + LESSON_FRAMES[1]].flatten(1)
    acted = lambda mouth, rest: torch.stack([act(f / 255, p, mouth, rest)[now] for f, p in zip(good.face, good.pose)])
    spoilt = lambda fault, u: torch.stack([spoil(fault, u, x, m[now], rng)[0] for x, m in zip(true, good.shown)])
    tests = [("lip_sync", f"sound {40 * by:+d} ms", lambda by=by: (true, late(by))) for by in (-5, -3, 3, 5)]
    tests += [("lip_sync", "another's sound", lambda: (true, heard.roll(1, 0)))]
    tests += [("expressiveness", f"mouth x {m}, rest x {r}", lambda m=m, r=r: (acted(m, r), heard))
              for m, r in ((0.5, 1), (0.5, 0.5), (0, 0))]
    tests += [("motion", f"{fault} {u}", lambda fault=fault, u=u: (spoilt(fault, u), heard))
              for fault in FAULTS for u in (0.4, 0.8)]
    best = dict.fromkeys(ASPECTS, judge.rate(true, heard, names).score)
    best["expressiveness"] = judge.rate(acted(1, 1), heard, names).score             # the acting itself costs nothing
    lines, failed = [f"{'aspect':16}{'spoilt by':26}true clip rated higher"], set()
    for aspect, name, make in tests:
        a = ASPECTS.index(aspect)
        wins = (best[aspect][:, a] > judge.rate(*make(), names).score[:, a]).float()
        share, low, high = bootstrap(lambda w: float(w.mean()), wins)
        failed |= {aspect} if share < TRUSTED else set()
        lines.append(f"{aspect:16}{name:26}{share:.2f} [{low:.2f}, {high:.2f}]{'' if share >= TRUSTED else '  fails'}")
    lines += [f"{aspect}: {'do not trust it: it misses faults above' if aspect in failed else 'to be trusted'}"
              for aspect in ASPECTS]
    return "\n".join(lines)


# ---------------------------------------------------------------- command line

JUDGE_CLIPS, SYNC_CLIPS = 1500, 1000                 # drawn talkers to teach on
GENERATED_CLIPS = 160                                # clips that each generator imitates for the judge


def clips_for(args: argparse.Namespace, count: int) -> tuple[Sequence[Clip], Sequence[Clip]]:
    """Return clips to learn from, and held-out ones, at the embedded judge's size."""
    if args.data:
        return folder_clips(args.data, TINY_SIDE, 3.0, args.crop)
    seconds = MATERIAL_FRAMES / FPS
    return (synthetic_clips(count, TINY_SIDE, seconds, args.seed),
            synthetic_clips(64, TINY_SIDE, seconds, HELD_OUT_SEED + args.seed))


CARD = """# The embedded judge

A multimodal language model of the Qwen2.5-Omni thinker architecture with {parameters:.2f} M parameters, trained from
scratch to rate talking-head clips. It knows no language but its rubric (judge.json) and no clips but those like its
training data: {data}.

Made by `{command}` in {minutes:.0f} CPU-minutes.

Agreement with the quality of fresh held-out lessons (64 clips, 8 variants each; 95% intervals):

{agreement}

The lessons are graded faults, not ratings of people. It is an instrument for experiments, not a measure of people.
"""


def train_judge(args: argparse.Namespace) -> None:
    """Teach the embedded judge and write it to --out with its card."""
    start, out = time.process_time(), args.out
    clips, held_out = clips_for(args, JUDGE_CLIPS)
    good, parts = good_material(clips), []
    for i, run in enumerate(args.generator):
        parts.append(generated_material(run, clips[i::max(1, len(clips) // GENERATED_CLIPS)], args.seed))
    generated = Material.joined(parts) if parts else None
    print(f"lessons are made of {len(good)} clips and {len(generated) if parts else 0} generated ones; "
          f"ready after {(time.process_time() - start) / 60:.1f} CPU-minutes")
    judge = Judge.load(args.from_judge) if args.from_judge else tiny_judge(args.seed)
    teach(judge, good, generated, args.steps, args.tower_steps, seed=args.seed)
    minutes = (time.process_time() - start) / 60
    lines = ["| aspect | Spearman | pairs of one clip ranked right |", "|---|---|---|"]
    for aspect, cells in exam(judge, good_material(held_out), 64).items():
        lines.append(f"| {aspect} | " + " | ".join("{:.3f} ({:.3f} to {:.3f})".format(*cell) for cell in cells) + " |")
    data = f"{len(good)} clips of {args.data}" if args.data else f"{len(good)} drawn talkers"
    data += f", and {len(generated)} clips made by early generators" if parts else ""
    given = {"from-judge": args.from_judge, "data": args.data, "steps": args.steps, "tower-steps": args.tower_steps,
             "generator": " ".join(args.generator), "seed": args.seed}
    command = "python -m extras.school teach" + "".join(f" --{k} {v}" for k, v in given.items() if v)
    save_judge(judge, out, CARD.format(
        parameters=sum(p.numel() for p in judge.model.parameters()) / 1e6, data=data, command=command, minutes=minutes,
        agreement="\n".join(lines)))
    print("\n".join(lines) + f"\n{out}: the judge and its card, {minutes:.1f} CPU-minutes; "
          f"to use it: --judge {out}")


def train_sync_network(args: argparse.Namespace) -> None:
    """Train the sync network and say how well it finds the offset of held-out clips."""
    start, out = time.process_time(), args.out
    clips, held_out = clips_for(args, SYNC_CLIPS)
    net = train_sync(clips, args.seed, args.steps)
    frames = min(len(clip.frames) for clip in held_out)
    videos, audio = pixels(held_out, frames), sounds(held_out, frames)
    own, other = (sync_metrics(net, videos, sound) for sound in (audio, audio.roll(1, 0)))
    save_sync(net, out, clips=str(args.data or f"{len(clips)} drawn talkers"), seed=args.seed)
    near = (own["sync_offset"].abs() <= 1).float().mean()
    print(f"{len(held_out)} held-out clips: offset within a frame in {near:.0%}; confidence "
          f"{own['sync_confidence'].mean():.3f}, with another's sound {other['sync_confidence'].mean():.3f}\n"
          f"{out}: the network, {(time.process_time() - start) / 60:.1f} CPU-minutes")


def validate_judge(args: argparse.Namespace) -> None:
    """Run the battery on held-out clips."""
    judge, (_, held_out) = reward_flags.make_judge(args), clips_for(args, 1)
    if judge is None:
        raise MediaError("--judge", "cannot be validated: it names none; give a folder, such as assets/judge")
    good = good_material(held_out[:args.clips])
    print(f"{len(good)} held-out clips of {args.data or 'drawn talkers'}, judge {args.judge_url or args.judge}\n"
          + battery(judge, good))


def teaching_flags(p: argparse.ArgumentParser, steps: int, out: str) -> None:
    """Add the flags of what is taught on clips and written to a folder."""
    p.add_argument("--steps", type=int, default=steps, help="of training (%(default)s)")
    p.add_argument("--out", type=Path, default=out, help="where to write (%(default)s)")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m extras.school", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="command", required=True)
    teaches = commands.add_parser("teach", help="teach the embedded judge")
    validates = commands.add_parser("validate", help="try a judge on clips with known faults")
    syncs = commands.add_parser("sync", help="train a sync network, for the reward or to measure")
    for command in (teaches, validates, syncs):
        command.add_argument("--data", type=Path, help="a folder of real clips (drawn talkers)")
        command.add_argument("--crop", type=crop_argument, help="x,y,size in pixels; without it, the centre square")
        command.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    teaching_flags(teaches, 1000, "runs/judge")
    teaches.add_argument("--tower-steps", type=int, default=2500,
                         help="of training the judge's towers by themselves, before (%(default)s)")
    teaches.add_argument("--from-judge", metavar="DIR",
                         help="teach this one on, such as assets/judge, instead of a new one")
    teaches.add_argument("--generator", nargs="+", default=[], metavar="RUN",
                         help="runs of train.py, best of several ages, whose videos the judge also learns from")
    teaching_flags(syncs, 400, "runs/sync")
    validates.add_argument("--clips", type=int, default=64, help="to validate on (%(default)s)")
    validates.add_argument("--device", type=device_argument, default=device_argument(), help="(%(default)s)")
    reward_flags.judge_flags(validates)
    args = p.parse_args(argv)
    chosen = commands.choices[args.command]
    least = {"seed": 0, "steps": 1, "tower_steps": 0, "clips": 2}
    check_numbers(chosen, args, **{name: low for name, low in least.items() if hasattr(args, name)})
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.command == "validate":
        validate_judge(args)
        return
    with writing(args.out):                          # before the hour of work that would be lost
        args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "teach":
        train_judge(args)
    else:
        train_sync_network(args)


if __name__ == "__main__":
    with one_line("stopped; nothing was written", "use fewer or shorter clips"):
        main()
