"""What a good talking portrait is, in numbers: a judge, regularisers, a sync network, and their weighted sum.

What you learn here, in the order of the file:

1. The judge: a multimodal language model (any Qwen-Omni thinker: a tiny one is embedded, a real one is loaded by name
   or asked over HTTP) watches and hears a clip and answers one question per aspect with a digit,

       score = sum_d d p(d) / sum_d p(d),    d = 1..5,    aspects: lip-sync, expressiveness, motion quality

2. The regularisers: still background, identity, amount of motion, jerk, flicker, chunk seams, each held against what
   real clips show; a sync network, which knows this very moment's lips from another's; and the composite
   reward = sum_i weight_i component_i.

The paper's judge, prompts and weights are not public; what is chosen here is said where it is chosen.

A video is (F, 3, S, S), uint8 or float in [0, 1]; frames are 40 ms apart; sound is 640 samples a frame.
B clips, F frames, K chunks, S pixels per side.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm, trange

from data import (FPS, LOOK_AHEAD, LOOK_BACK, MELS, SAMPLE_RATE, SAMPLES_PER_FRAME, Clip, MediaError, fitting, loading,
                  log_mel, reading_weights, whole_model, write_weights)

# ---------------------------------------------------------------- the judge: a multimodal language model

ASPECTS = ("lip_sync", "expressiveness", "motion")

# What each aspect looks at, ignores, and means by 1, 3 and 5. A folder may carry wording of its own, in judge.json.
RUBRIC = {
    "template": "{look} {ignore} Answer with one digit from 1 to 5. {scale} Your rating:",
    "lip_sync": {
        "look": "Rate how well the lips follow the speech: do they open, close and round when the sound does?",
        "ignore": "Ignore picture quality, head motion and what is said.",
        "1": "the lips have nothing to do with the sound", "3": "they follow it loosely, or early, or late",
        "5": "every sound is seen on the lips at its moment"},
    "expressiveness": {
        "look": "Rate how lively the person speaks: how far the mouth opens, whether brows, eyes and head move along.",
        "ignore": "Ignore whether the motion fits the sound, and picture quality.",
        "1": "a still face, or lips that barely part", "3": "subdued", "5": "as lively as in a conversation"},
    "motion": {
        "look": "Rate how natural and clean the motion is: continuous, steady and sharp.",
        "ignore": "Ignore the sound, and how much the face moves.",
        "1": "broken: trembling, freezing, jumping, ghosting, blurred or noisy", "3": "visible faults",
        "5": "as filmed"},
}

# model_type of a checkpoint -> the part of it that watches, listens and answers in text (its "thinker").
THINKERS = {"qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
            "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration"}
MIN_MASS = 0.5                                       # below it, most of the answer is not a rating
NO_JUDGE = ("use an instruction-tuned model that answers at once, in a dtype it was made for, and, behind an "
            "endpoint, a server that supports logprobs")
DEFAULT_JUDGE = Path(__file__).parent / "assets" / "judge"


def to_bytes(frames: Tensor) -> Tensor:
    """[0, 1] float -> uint8."""
    return (frames.clamp(0, 1) * 255).round().byte()


def prompt(aspect: str, descending: bool = False, rubric: dict = RUBRIC) -> str:
    """Write the question about one aspect; `descending` lists the scale from 5 to 1."""
    words = rubric[aspect]
    scale = [f"{digit}: {words[digit]}." for digit in ("531" if descending else "135")]
    return rubric["template"].format(look=words["look"], ignore=words["ignore"], scale=" ".join(scale))


@dataclass
class Ratings:
    """What a judge says of B clips, aspects in the order of ASPECTS."""

    score: Tensor                                    # (B, 3) expected rating, 1..5; NaN: the answer was none
    mass: Tensor                                     # (B, 3) probability that the answer is a digit 1..5 at all


def expected_rating(p: Tensor) -> Ratings:
    """score = sum_d d p(d) / mass,  mass = sum_d p(d),  over the digits d = 1..5.

    The mean over the digits ranks better than the one digit that would be written (Q-Align, 2312.17090).

    Args: p (B, 3, orders, 5), for each order of the scale; scores are averaged over the orders, the least mass counts.
    """
    mass = p.sum(-1)
    score = p @ torch.arange(1.0, 6.0, device=p.device) / mass
    return Ratings(score.mean(-1), mass.amin(-1))


class JudgeError(MediaError):
    """A judge that cannot be asked, or does not rate: what was reached is to be saved, and can be resumed."""


def drop_unrated(ratings: Ratings, names: Sequence[str]) -> Ratings:
    """Make a score NaN where it is no number or hardly any of the answer is a digit.

    Raises: JudgeError where no clip is rated: such a model is no judge.
    """
    unrated = ~(ratings.mass >= MIN_MASS) | ~ratings.score.isfinite()                # (B, 3)
    if unrated.any():
        clip, aspect = unrated.nonzero()[0].tolist()
        said = (f"the judge does not rate its {ASPECTS[aspect]}: the digits 1..5 have probability "
                f"{ratings.mass[clip, aspect]:.2g}")
        if unrated.any(1).all():
            raise JudgeError(names[clip], f"{said}; {NO_JUDGE}")
        tqdm.write(f"note: {names[clip]}: {said}; {unrated.any(1).sum()} of {len(names)} clips are unrated",
                   file=sys.stderr)
    ratings.score = ratings.score.masked_fill(unrated, math.nan)
    return ratings


class Judge:
    """A multimodal language model that watches and hears a clip and answers each question with a digit.

    The clip comes first and the question last, so the clip is read once: its keys and values are kept and every
    aspect's question is asked against them. transformers places pictures and sound on one clock (TMRoPE, 2503.20215).

    Args:    model, processor: a thinker of transformers and its processor; rubric: the wording, as RUBRIC.
             side: pixels per side at which a frame is shown, None for the processor's own choice.
             window: frames that are judged at once, None for any number; longer videos are cut (see Reward).
             orders: False asks with the scale from 1 to 5, True from 5 to 1; several are averaged.
             batch: clips at once.    offload: keep the model on the CPU between two uses.
    """

    def __init__(self, model: nn.Module, processor, rubric: dict = RUBRIC, side: int | None = None,
                 window: int | None = None, orders: Sequence[bool] = (False,), batch: int = 8, device: str = "cpu",
                 offload: bool = False):
        self.model, self.processor, self.rubric, self.side, self.window = model, processor, rubric, side, window
        self.orders, self.batch, self.device, self.offload = tuple(orders), batch, device, offload
        self.digits = [processor.tokenizer.encode(d, add_special_tokens=False)[-1] for d in "12345"]
        # Only the next token counts: without this, a clip of 3000 tokens would give 3000 rows of 150,000 logits.
        model.lm_head.register_forward_pre_hook(lambda head, inputs: (inputs[0][:, -1:],))
        if not offload:
            model.to(device)

    @classmethod
    def load(cls, name: str | Path = DEFAULT_JUDGE, dtype: str | None = None, device: str = "cpu",
             **settings) -> "Judge":
        """Load a folder, or, where `name` is no folder, a model of the hub: naming one asks for its download.

        Args: dtype: of torch, by name; None: that of judge.json, else float32 on a CPU and bfloat16 elsewhere.
        settings: of the constructor; judge.json may hold others.
        Raises: MediaError where there is no such model, or one that cannot watch and hear.
        """
        import transformers                          # here: it takes seconds, and not every use needs a judge
        name, local = str(name), Path(name).is_dir()
        with loading(name, "a judge"):
            kind = transformers.AutoConfig.from_pretrained(name, local_files_only=local).model_type
            if (kind := kind.removesuffix("_thinker")) not in THINKERS:
                raise MediaError(name, f"is a {kind}, which cannot watch and hear; use one of {', '.join(THINKERS)}")
            own = Path(name) / "judge.json"
            settings = (json.loads(own.read_text()) if own.exists() else {}) | settings
            usual = settings.pop("dtype", "float32" if device == "cpu" else "bfloat16")
            model = whole_model(getattr(transformers, THINKERS[kind]), name, dtype=dtype or usual)
            processor = transformers.AutoProcessor.from_pretrained(name, local_files_only=local)
            return cls(model, processor, device=device, **settings)

    @property
    def fingerprint(self) -> str:
        """What its ratings depend on, for a cache of them."""
        sums = [f"{name} {weight.float().sum().item()}" for name, weight in self.model.state_dict().items()]
        return hashlib.sha256(json.dumps([sums, self.rubric, self.side, self.window, self.orders]).encode()).hexdigest()

    def questions(self) -> tuple[str, list[str]]:
        """Return the text up to the end of the clip, and, for each aspect and order, the text that follows."""
        texts = []
        for aspect, order in product(ASPECTS, self.orders):
            content = [{"type": "video"}, {"type": "text", "text": prompt(aspect, order, self.rubric)}]
            texts.append(self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                            add_generation_prompt=True))
        end = texts[0].index(self.processor.vision_eos_token) + len(self.processor.vision_eos_token)
        return texts[0][:end], [text[end:] for text in texts]

    def read(self, frames: Tensor, audio: Tensor, text: str) -> dict:
        """Tokenize clips (B, F, 3, S, S) uint8 with sound (B, F * 640), each after the same text, for the model."""
        # Silent defaults: 2 frames a second, 317 pixels, 30 s of sound, pictures before sound. All are said here.
        size = {} if self.side is None else {"min_pixels": self.side ** 2, "max_pixels": self.side ** 2}
        self.processor.feature_extractor.n_samples = audio.shape[1]
        return self.processor(text=[text] * len(frames), videos=list(frames), audio=list(audio.numpy()), **size,
                              fps=float(FPS), do_sample_frames=False, cap_pixels_per_frame=False,
                              sampling_rate=SAMPLE_RATE, use_audio_in_video=True,
                              return_tensors="pt").to(self.device)

    def logits(self, frames: Tensor, audio: Tensor) -> Tensor:
        """Return (B, 3 * orders, vocabulary): of the first token of each answer. Gradients flow where they are on."""
        prefix, questions = self.questions()
        inputs = self.read(frames, audio, prefix)
        cache = self.model(**inputs, use_audio_in_video=True, use_cache=True).past_key_values
        logits, length = [], inputs["input_ids"].shape[1]
        for question in questions:
            ids = self.processor.tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
            ids = ids.to(self.device).expand(len(frames), -1)
            # The clip spans fewer instants than tokens: text goes on at the last instant + 1, on all three axes.
            place = length + torch.arange(ids.shape[1], device=self.device) + self.model.rope_deltas.view(-1, 1)
            place = place.expand(3, len(frames), -1)
            logits.append(self.model(input_ids=ids, position_ids=place, past_key_values=cache).logits[:, -1])
            cache.crop(-ids.shape[1])
        return torch.stack(logits, 1)

    @torch.no_grad()
    def rate(self, frames: Tensor, audio: Tensor, names: Sequence[str]) -> Ratings:
        """Rate clips of one length.

        Args:    frames (B, F, 3, S, S) in [0, 1]; audio (B, F * 640); B names, for messages.
        Returns: Ratings on the CPU, fp32. Raises: JudgeError where no clip is rated.
        """
        self.model.to(self.device)
        p = []
        for i in range(0, len(frames), self.batch):
            pictures = to_bytes(frames[i:i + self.batch].detach()).cpu()
            logits = self.logits(pictures, audio[i:i + self.batch].detach().cpu().float())
            p.append(logits.float().softmax(-1)[..., self.digits].cpu())
        if self.offload:
            self.model.to("cpu")
        return drop_unrated(expected_rating(torch.cat(p).unflatten(1, (len(ASPECTS), -1))), names)


# ---------------------------------------------------------------- regularisers: what needs no judge
#
# Perceptual: is it still the portrait? Temporal: does it move as real clips do? Both are compared with real clips of
# the same kind, so that a frozen face, as still and smooth as can be, does not win.

STILL_SCALES = 1, 2, 4                               # pixels are averaged over squares of this side
STILL_DEVIATION = 0.02                               # grey levels of 1 by which a place may stray and count as still
REACH = 8                                            # frames, a third of a second, over which activity is measured
TEXTURE_WINDOW = 8                                   # pixels under a local mean and contrast, as in SSIM
AT_ONCE = 8                                          # clips at once: bounds the memory


def in_chunks(signal: Tensor, frames: int, chunk_frames: int) -> Tensor:
    """Cut (B, F - n), a difference of n + 1 frames filed under its last, into chunks (B, K, T); ends are repeated."""
    tail = -frames % chunk_frames
    return nnf.pad(signal, (frames - signal.shape[1], tail), "replicate").unflatten(1, (-1, chunk_frames))


def straying(frames: Tensor, portrait: Tensor, still: Tensor) -> Tensor:
    """Measure how far the background strays from the portrait's: |difference| at three scales, in grey levels of 1.

    Args: frames (B, F, 3, S, S), portrait (B, 3, S, S), still (S, S) weights. Returns: (B, F).
    """
    error, total = (frames - portrait[:, None]).flatten(0, 1), 0
    for scale in STILL_SCALES:
        pooled, weight = nnf.avg_pool2d(error, scale), nnf.avg_pool2d(still[None, None], scale)
        total = total + (pooled.abs().mean(1, keepdim=True) * weight).sum((1, 2, 3)) / weight.sum().clamp_min(1e-6)
    return total.view(frames.shape[:2]) / len(STILL_SCALES)


def likeness(frames: Tensor, portrait: Tensor) -> Tensor:
    """Compare local brightness, colour and contrast with the portrait's, at three scales: 1 is the portrait itself.

    SSIM's first two factors (Wang et al. 2004), at several scales (Wang et al. 2003), without the third: lips and lids
    move, so pixels need not agree, but a face that is blurred, noisy, tinted or another's has other means or contrasts.

    Args: frames (B, F, 3, S, S), portrait (B, 3, S, S). Returns: (B, F) in 0..1.
    """
    def moments(x):
        mean = nnf.avg_pool2d(x, TEXTURE_WINDOW, TEXTURE_WINDOW // 2)
        return mean, (nnf.avg_pool2d(x * x, TEXTURE_WINDOW, TEXTURE_WINDOW // 2) - mean * mean).clamp_min(0)

    similarity, x, y = [], frames.flatten(0, 1), portrait.repeat_interleave(frames.shape[1], 0)
    while len(similarity) < 3 and x.shape[-1] >= TEXTURE_WINDOW:
        (mean_x, var_x), (mean_y, var_y) = moments(x), moments(y)
        light = (2 * mean_x * mean_y + 0.01 ** 2) / (mean_x ** 2 + mean_y ** 2 + 0.01 ** 2)
        contrast = (2 * (var_x * var_y).sqrt() + 0.03 ** 2) / (var_x + var_y + 0.03 ** 2)
        similarity.append((light * contrast).mean((1, 2, 3)))
        x, y = nnf.avg_pool2d(x, 2), nnf.avg_pool2d(y, 2)
    return torch.stack(similarity).mean(0).view(frames.shape[:2])


class PretrainedLikeness:
    """Compare frames with the portrait by the features of a vision model of transformers, such as DINOv2 or CLIP."""

    def __init__(self, name: str, device: str = "cpu"):
        import transformers
        local = Path(name).is_dir()
        with loading(name, "a vision model"):
            model = transformers.AutoModel.from_pretrained(name, local_files_only=local)
            self.model = getattr(model, "vision_model", model).eval().requires_grad_(False).to(device)
            self.processor = transformers.AutoImageProcessor.from_pretrained(name, local_files_only=local)
        self.device = device

    def features(self, pictures: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] -> (N, D), of length 1."""
        inputs = self.processor(list(to_bytes(pictures).cpu()), return_tensors="pt").to(self.device)
        return nnf.normalize(self.model(pixel_values=inputs["pixel_values"]).pooler_output, dim=-1).cpu()

    def __call__(self, frames: Tensor, portrait: Tensor) -> Tensor:
        """frames (B, F, 3, S, S), portrait (B, 3, S, S) -> cosine (B, F)."""
        seen = self.features(frames.flatten(0, 1)).view(*frames.shape[:2], -1)
        return (seen * self.features(portrait)[:, None]).sum(-1)


def temporal(frames: Tensor, chunk_frames: int) -> dict[str, Tensor]:
    """Measure motion per chunk, as logarithms: name -> (B, K). Args: frames (B, F, 3, S, S) in [0, 1].

    activity      mean change over a third of a second, in grey levels of 1: how far things move
    smoothness    mean third difference: trembling
    seams         change across the border to the chunk before over change inside; 0 in the first chunk
    """
    def cut(difference):
        return in_chunks(difference.abs().mean((2, 3, 4)), frames.shape[1], chunk_frames) + 1e-4      # (B, K, T)

    change = cut(frames.diff(dim=1))
    seams = (change[:, :, 0] / change[:, :, 1:].mean(2)).log()
    return {"activity": cut(frames[:, REACH:] - frames[:, :-REACH]).mean(2).log(),
            "smoothness": cut(frames.diff(n=3, dim=1)).mean(2).log(),
            "seams": torch.cat([torch.zeros_like(seams[:, :1]), seams[:, 1:]], 1)}


@dataclass
class Exemplars:
    """What good clips show: the measure that regularisers hold generated ones against.

    Data as found tremble and mumble. So the judge picks, aspect by aspect: the liveliest clips say how much should
    move, the smoothest how smoothly, and how still a background and how like its portrait a face should be.
    """

    still: Tensor                                    # (S, S) in 0..1, high where these clips do not move
    straying: float                                  # their own distance to their first frame, where still
    likeness: float                                  # and likeness to it
    temporal: dict[str, tuple[float, float]]         # mean of each of `temporal`, from and to

    @classmethod
    @torch.no_grad()
    def measure(cls, lively: Sequence[Clip], smooth: Sequence[Clip], chunk_frames: int, likeness=likeness,
                codec=None) -> "Exemplars":
        """Measure clips at the size that will be compared with them.

        With the generator's codec, whatever lies between a clip and the codec's view of it is as good as filmed: a
        camera's noise is lost in it (on GRID .6 of log jerk), and only shaking heads could make up for it.
        """
        def videos(clips):
            return [clip.frames[None, : len(clip.frames) // chunk_frames * chunk_frames] / 255 for clip in clips]

        def seen(video):
            device = codec.scale.device
            return codec.decode(video[:, 0].to(device), codec.encode(video.to(device))).cpu()

        def mean(values):
            return torch.cat([v.flatten() for v in values]).mean().item()

        filmed = {name: videos(clips) for name, clips in (("smooth", smooth), ("lively", lively))}
        stray = torch.stack([(v - v[:, :1]).abs().mean((0, 1, 2)) for v in filmed["smooth"]]).mean(0)
        still = torch.exp(-stray / STILL_DEVIATION)
        ranges = {}
        for name, of in (("activity", "lively"), ("smoothness", "smooth"), ("seams", "smooth")):
            views = [filmed[of]] + ([[seen(v) for v in filmed[of]]] if codec is not None else [])
            means = [mean(temporal(v, chunk_frames)[name] for v in view) for view in views]
            ranges[name] = min(means), max(means)
        return cls(still, mean(straying(v, v[:, 0], still) for v in filmed["smooth"]),
                   mean(likeness(v, v[:, 0]) for v in filmed["smooth"]), ranges)


# ---------------------------------------------------------------- the sync network
#
# Does this sound belong to these lips? Two encoders learn it from clips alone (Chung & Zisserman 2016, "Out of time"):
# one watches five frames of the mouth, one hears the same 200 ms, and they shall agree at the right moment only. Large
# judges are reported to miss shifts of less than a second; this one notices 40 ms.
#
# There are two of them. One is a part of the reward. The other, of another seed and taught on other people, measures
# what the reward has done, and is in no reward. They are of one make, so what both of them overlook stays unseen.

SYNC_FRAMES = 5                                      # frames in a window, 200 ms, as in SyncNet
SYNC_SHIFTS = 15                                     # frames by which the sound is tried early and late, as in SyncNet
SYNC_SIZE = 64                                       # pixels to which any picture is resized first
SYNC_BOX = 37, 63, 16, 48                            # of these, the mouth: rows .58 to .98, columns .25 to .75
SYNC_SPAN = 50                                       # frames of a clip in a training step: 46 windows, 45 wrong moments
TEMPERATURE = 0.07                                   # of the contrast, as in MoCo (He et al. 2020)


def resize(pictures: Tensor) -> Tensor:
    """Resize float pictures (..., 3, S, S) to (..., 3, 64, 64), averaging where pixels are lost."""
    if pictures.shape[-2:] == (SYNC_SIZE, SYNC_SIZE):
        return pictures
    flat = nnf.interpolate(pictures.flatten(0, -4), (SYNC_SIZE, SYNC_SIZE), mode="bilinear", antialias=True)
    return flat.unflatten(0, pictures.shape[:-3])


class SyncNetwork(nn.Module):
    """Places moving lips and speech on one unit sphere, and faces on another; what belongs together is near."""

    def __init__(self, width: int = 48, dim: int = 64):
        super().__init__()
        self.config = {"width": width, "dim": dim}
        w = width
        self.look = nn.Sequential(                                                   # each frame      (N, 1, 26, 32)
            nn.Conv2d(1, w // 2, 5, 2, 2), nn.GELU(),                                #                 (N, w/2, 13, 16)
            nn.Conv2d(w // 2, w, 3, 2, 1), nn.GELU(),                                #                 (N, w, 7, 8)
            nn.Conv2d(w, w, 3, 2, 1), nn.GELU(),                                     #                 (N, w, 4, 4)
            nn.Flatten(), nn.Linear(16 * w, 2 * w), nn.GELU())                       #                 (N, 2 w)
        self.watch = nn.Sequential(                                                  # five frames     (B, 2 w, F)
            nn.Conv1d(2 * w, 3 * w, SYNC_FRAMES), nn.GELU(), nn.Conv1d(3 * w, dim, 1))             # (B, dim, F - 4)
        # A frame is four hops of 10 ms. Kernels of 4 and 9, both at stride 2, see 20 hops, every 4: the same windows.
        self.hear = nn.Sequential(                                                   # their sound     (B, MELS, 4 F)
            nn.Conv1d(MELS, 2 * w, 4, 2), nn.GELU(),                                 #                 (B, 2 w, 2 F - 1)
            nn.Conv1d(2 * w, 3 * w, 9, 2), nn.GELU(), nn.Conv1d(3 * w, dim, 1))                    # (B, dim, F - 4)
        self.recognise = nn.Sequential(                                              # who             (N, 3, 64, 64)
            nn.Conv2d(3, w // 4, 5, 2, 2), nn.GELU(), nn.Conv2d(w // 4, w // 2, 3, 2, 1), nn.GELU(),
            nn.Conv2d(w // 2, w, 3, 2, 1), nn.GELU(), nn.Conv2d(w, w, 3, 2, 1), nn.GELU(),         # (N, w, 4, 4)
            nn.Flatten(), nn.Linear(16 * w, dim))

    def visual(self, frames: Tensor) -> Tensor:
        """Embed the mouth in every five consecutive frames.

        What is seen is grey, minus the clip's mean picture, in units of the clip's contrast: colour, brightness and
        the face itself are gone, and a mouth that never moves is a blank.

        Args:    frames (B, F, 3, S, S) float in [0, 1], F >= 5.
        Returns: (B, F - 4, dim), of length 1. Raises: ValueError for any other frames.
        """
        if frames.ndim != 5 or frames.shape[1] < SYNC_FRAMES or not frames.is_floating_point():
            raise ValueError(f"want float frames (B, {SYNC_FRAMES} or more, 3, S, S), "
                             f"got {frames.dtype} {tuple(frames.shape)}")
        top, bottom, left, right = SYNC_BOX
        mouth = resize(frames)[..., top:bottom, left:right]
        grey = torch.einsum("bfchw,c->bfhw", mouth, mouth.new_tensor((0.299, 0.587, 0.114)))       # ITU-R BT.601
        contrast = grey.std((1, 2, 3), keepdim=True).clamp_min(1e-3)
        moving = 3 * (grey - grey.mean(1, keepdim=True)) / contrast                  # 3: to about unit variance
        seen = self.look(rearrange(moving, "b f h w -> (b f) 1 h w"))
        windows = self.watch(rearrange(seen, "(b f) c -> b c f", b=len(frames)))
        return nnf.normalize(windows.mT, dim=-1)

    def sound(self, audio: Tensor) -> Tensor:
        """Embed the sound of every five consecutive frames.

        Args:    audio (B, F * 640) float at 16 kHz, F >= 5.
        Returns: (B, F - 4, dim), of length 1. Raises: ValueError for any other audio.
        """
        n_frames = audio.shape[-1] // SAMPLES_PER_FRAME
        if audio.ndim != 2 or audio.shape[1] % SAMPLES_PER_FRAME or n_frames < SYNC_FRAMES:
            raise ValueError(f"want audio (B, F * {SAMPLES_PER_FRAME}) of {SYNC_FRAMES} frames or more, "
                             f"got {tuple(audio.shape)}")
        mel = log_mel(audio, n_frames).unflatten(-1, (-1, MELS))[:, :, LOOK_BACK:-LOOK_AHEAD]      # a frame's own hops
        return nnf.normalize(self.hear(rearrange(mel, "b f hop m -> b m (f hop)")).mT, dim=-1)

    def identity(self, pictures: Tensor) -> Tensor:
        """Embed who is seen. Args: pictures (..., 3, S, S) float in [0, 1]. Returns: (..., dim), of length 1."""
        flat = resize(pictures).flatten(0, -4)
        return nnf.normalize(self.recognise(3 * (flat - 0.5)), dim=-1).unflatten(0, pictures.shape[:-3])


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    """Ask for each pair to be told from all others, -log softmax_j(a_i . b_j / TEMPERATURE) at j = i, either way round
    (van den Oord et al. 2018). Args: a, b (N, D), of length 1. Returns: scalar, log N for chance."""
    logits, own = a @ b.T / TEMPERATURE, torch.arange(len(a), device=a.device)
    return (nnf.cross_entropy(logits, own) + nnf.cross_entropy(logits.T, own)) / 2


def sync_loss(net: SyncNetwork, frames: Tensor, audio: Tensor) -> Tensor:
    """Contrast each window with all windows of the batch: other clips, and above all other moments of its own, which
    share voice, face and light, so that nothing but timing tells them apart."""
    return info_nce(net.visual(frames).flatten(0, 1), net.sound(audio).flatten(0, 1))


def jitter(frames: Tensor, rng: torch.Generator) -> Tensor:
    """Vary what should not matter: a clip (F, 3, S, S) uint8 is moved by up to 3%, mirrored at random, and made float,
    each colour's gain changed by up to 15% and the brightness by up to 0.15."""
    reach = frames.shape[-1] / 32
    move, turn, gain, lift = torch.rand(7, generator=rng).split([2, 1, 3, 1])
    moved = frames.roll([round((2 * x - 1) * reach) for x in move.tolist()], (-2, -1))
    moved = moved.flip(-1) if turn < 0.5 else moved
    return (moved / 255 * (0.85 + 0.3 * gain)[:, None, None] + 0.3 * (lift - 0.5)).clamp(0, 1)


def train_sync(clips: Sequence[Clip], seed: int = 0, steps: int = 400, batch: int = 16) -> SyncNetwork:
    """Train a sync network, and with it the identity encoder, for which two pictures of one clip are one person.

    Args: clips: of at least 20 frames each, at least 2 * batch of them for a fair contrast; seed: decides everything.
    Returns: the network, frozen. Raises: ValueError if there is nothing to contrast.
    """
    span = min([SYNC_SPAN] + [len(clip.frames) for clip in clips])
    if len(clips) < 2 or span <= SYNC_FRAMES + SYNC_SHIFTS - 1:
        raise ValueError(f"want two clips or more, of {SYNC_FRAMES + SYNC_SHIFTS} frames or more: "
                         f"got {len(clips)}, the shortest of {span}")
    rng = torch.Generator().manual_seed(seed)
    draw = lambda n, count=1: torch.randint(n, (count,), generator=rng).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SyncNetwork()
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps, pct_start=0.05)
    for _ in (bar := trange(steps, desc="sync network", unit="step")):
        frames, audio, faces = [], [], []
        for clip in (clips[row] for row in draw(len(clips), batch)):
            first, = draw(len(clip.frames) - span + 1)
            frames.append(jitter(clip.frames[first : first + span], rng))
            audio.append(clip.audio[first * SAMPLES_PER_FRAME : (first + span) * SAMPLES_PER_FRAME])
        for row in torch.randperm(len(clips), generator=rng)[: 2 * batch].tolist():  # no clip twice: it is a person
            pair = clips[row].frames[draw(len(clips[row].frames), 2)]
            faces.append(torch.stack([jitter(picture[None], rng)[0] for picture in pair]))
        loss = sync_loss(net, torch.stack(frames), torch.stack(audio))
        same = info_nce(*net.identity(torch.stack(faces, 1)))
        optimiser.zero_grad()
        (loss + same).backward()
        optimiser.step(), schedule.step()
        bar.set_postfix(sync=f"{loss.item():.2f}", identity=f"{same.item():.2f}", refresh=False)
    return net.requires_grad_(False)


def save_sync(net: SyncNetwork, folder: str | Path, **more) -> None:
    """Write folder/model.safetensors in half precision and config.json; more: further entries for config.json."""
    write_weights(Path(folder), {name: weight.half() for name, weight in net.state_dict().items()},
                  {"sync": net.config, **more})


def load_sync(folder: str | Path) -> SyncNetwork:
    """Load, frozen, what `save_sync` wrote. Raises: MediaError where there is no sync network or a broken one."""
    folder = Path(folder)
    with reading_weights(folder, "a sync network", "a sync network"):
        net = SyncNetwork(**json.loads((folder / "config.json").read_text())["sync"])
        net.load_state_dict(load_file(folder / "model.safetensors"))
    return net.requires_grad_(False)


# ---------------------------------------------------------------- the composite reward

@dataclass(frozen=True)
class Component:
    """A part of the reward. Of all, more is better; regularisers reach 0 where the exemplars are."""

    weight: float                                    # in the total; 0 switches it off
    floor: float       # least deviation in a group to divide by: less cannot be seen, and a z-score would blow it up
    scale: str
    meaning: str


COMPONENTS = {
    "judge_lip_sync": Component(1.0, 0.02, "1..5", "rating: do the lips follow the sound"),
    "judge_expressiveness": Component(0.5, 0.05, "1..5", "rating: how lively"),
    "judge_motion": Component(1.0, 0.05, "1..5", "rating: how natural and clean"),
    "sync": Component(3.0, 0.005, "-2..0", "distance of lips and sound, moment by moment, by the reward's sync network"),
    "background": Component(0.25, 0.003, "-1..0", "distance to the portrait's, beyond the exemplars', in grey levels"),
    "identity": Component(0.25, 0.01, "-1..0", "likeness to the portrait, as far as below the exemplars'"),
    "activity": Component(0.5, 0.05, "..0", "log ratio of the range of motion to the exemplars', more or less"),
    "smoothness": Component(1.0, 0.03, "..0", "log ratio of trembling to the exemplars', more or less"),
    "seams": Component(1.0, 0.03, "..0", "log ratio of jumps at chunk borders to the exemplars', more or less"),
}
WEIGHTS = {name: component.weight for name, component in COMPONENTS.items()}
JUDGED = [f"judge_{aspect}" for aspect in ASPECTS]   # what needs a judge


@dataclass
class Scores:
    """A reward of B clips. Components are raw: a group's mean and deviation are the business of the RL side."""

    total: Tensor                                    # (B,) sum of weight * component
    components: dict[str, Tensor]                    # name -> (B,)
    per_chunk: dict[str, Tensor]                     # name -> (B, K), what is localised in time, if asked for
    mass: Tensor | None = None                       # (B, 3) of the judge's answers


def spans(frames: int, width: int | None) -> list[tuple[int, int]]:
    """Cover a video by spans (start, stop) of `width` frames, as few and as even as can be."""
    if width is None or frames <= width:
        return [(0, frames)]
    gaps = math.ceil((frames - width) / width)
    starts = [round(i * (frames - width) / gaps) for i in range(gaps + 1)]
    return [(start, start + width) for start in starts]


def rate_whole(judge, frames: Tensor, audio: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Rate clips (B, F, 3, S, S) in [0, 1] with sound (B, F * 640), long ones in spans whose ratings are averaged.

    Returns: score (B, 3); mass (B, 3), the least of the spans.
    """
    samples = audio.unflatten(1, (-1, SAMPLES_PER_FRAME))
    with fitting("the judge", "lower --judge-batch, or --judge-size"):
        ratings = [judge.rate(frames[:, a:b], samples[:, a:b].flatten(1), names)
                   for a, b in spans(frames.shape[1], judge.window)]
    return torch.stack([r.score for r in ratings]).mean(0), torch.stack([r.mass for r in ratings]).amin(0)


class Reward:
    """The composite reward: a judge's ratings and the regularisers, each named, and their weighted sum.

    Args:    judge: anything with `rate(frames, audio, names)` and `window`; None: ratings are left out.
             exemplars: what good clips show; weights: name -> weight, for COMPONENTS that shall have another.
             calibration: aspect -> knots, from extras/people.py.
             likeness: how frames are compared with the portrait, `likeness` or a PretrainedLikeness.
             sync: the reward's own SyncNetwork; None: the component is left out.
    """

    def __init__(self, judge, exemplars: Exemplars, weights: dict[str, float] | None = None, chunk_frames: int = 4,
                 calibration: dict | None = None, likeness=likeness, sync: SyncNetwork | None = None):
        self.judge, self.exemplars, self.chunk_frames = judge, exemplars, chunk_frames
        self.calibration, self.likeness, self.sync = calibration or {}, likeness, sync
        absent = (JUDGED if judge is None else []) + (["sync"] if sync is None else [])
        self.weights = {k: w for k, w in (WEIGHTS | (weights or {})).items() if w and k not in absent}
        self.floors = {name: COMPONENTS[name].floor for name in self.weights}

    @torch.no_grad()
    def __call__(self, frames: Tensor, audio: Tensor, portrait: Tensor, names: Sequence[str],
                 per_chunk: bool = False) -> Scores:
        """Score clips of one length.

        Args:    frames (B, F, 3, S, S) in [0, 1]; audio (B, F * 640); portrait (B, 3, S, S); B names, for messages.
                 per_chunk: also say when, of what is localised in time: the regularisers and sync, which are means
                 over chunks. A rating is of the whole.
        Returns: Scores; NaN where the judge gave no rating.
        Raises:  JudgeError where the judge fails; MediaError, naming the clip, where another component is not a number.
        """
        if frames.shape[1] <= REACH or audio.shape[1] != frames.shape[1] * SAMPLES_PER_FRAME:
            raise ValueError(f"want more than {REACH} frames and {SAMPLES_PER_FRAME} samples for each: "
                             f"got {tuple(frames.shape)} and {tuple(audio.shape)}")
        parts = [self.localised(*part) for part in zip(*(x.float().split(AT_ONCE) for x in (frames, audio, portrait)))]
        chunks, mass = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, None
        for name, (low, high) in self.exemplars.temporal.items():    # beyond their range, by the video's average
            mean = chunks[name].mean(1, keepdim=True)
            nearest = mean.clamp(low, high)
            chunks[name] = -(chunks[name] - nearest) * (mean - nearest).sign()
        components = {name: values.mean(1) for name, values in chunks.items()}
        if set(JUDGED) & set(self.weights):
            score, mass = self.rate(frames, audio, names)
            components |= dict(zip(JUDGED, score.T))
        components = {name: components[name] for name in self.weights if name in components}
        for name, values in components.items():
            if name not in JUDGED and not values.isfinite().all():
                bad = (~values.isfinite()).nonzero()[0].item()
                raise MediaError(names[bad], f"its {name} is {values[bad]}; look at the frames that were generated")
        total = sum(self.weights[name] * values for name, values in components.items())
        return Scores(total, components, {k: v for k, v in chunks.items() if per_chunk and k in self.weights}, mass)

    def localised(self, frames: Tensor, audio: Tensor, portrait: Tensor) -> dict[str, Tensor]:
        """Measure what needs no judge: name -> (B, K), on the CPU. All but the temporal measures are final."""
        cut = lambda values: in_chunks(values, frames.shape[1], self.chunk_frames).mean(2)
        portrait, still = portrait.to(frames.device), self.exemplars.still.to(frames.device)
        if still.shape[-1] != frames.shape[-1]:
            still = nnf.interpolate(still[None, None], frames.shape[-2:], mode="bilinear")[0, 0]
        stray = cut(straying(frames, portrait, still)) - self.exemplars.straying
        alike = cut(self.likeness(frames, portrait)) - self.exemplars.likeness
        chunks = {"background": -stray.clamp_min(0), "identity": alike.clamp_max(0),
                  **temporal(frames, self.chunk_frames)}
        if "sync" in self.weights:                               # the five frames around each one, seen and heard
            device = next(self.sync.parameters()).device
            apart = (self.sync.visual(frames.to(device)) - self.sync.sound(audio.to(device))).norm(dim=-1)
            chunks["sync"] = -cut(nnf.pad(apart[:, None], (SYNC_FRAMES // 2, SYNC_FRAMES // 2), "replicate")[:, 0])
        return {name: values.cpu() for name, values in chunks.items()}

    def rate(self, frames: Tensor, audio: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Judge every clip. Returns: score (B, 3), calibrated; mass (B, 3)."""
        score, mass = rate_whole(self.judge, frames, audio, names)
        for i, aspect in enumerate(ASPECTS):
            if aspect in self.calibration:
                score[:, i] = calibrate(score[:, i], self.calibration[aspect])
        return score, mass


# ---------------------------------------------------------------- the scale of people, as extras/people.py fitted it

def read_json(path: Path, what: str, complete: Callable[[dict], bool]) -> dict:
    """Read a JSON file. Raises: MediaError where it is missing, broken, or `complete` does not hold of it."""
    try:
        read = json.loads(path.read_text())
        if not complete(read):
            raise ValueError("something is missing or misspelt")
    except OSError as error:
        raise MediaError(path, f"cannot be read ({error.strerror}); name {what}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MediaError(path, f"is not {what} ({str(error)[:80]}); save it again") from None
    return read


def calibrate(scores: Tensor, knots: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Map scores of any shape to people's scale, linearly between the knots, which are the centres of blocks.

    The fit itself is a staircase: inside a block two videos would earn the same reward and GRPO would learn nothing.
    Between centres every improvement counts; beyond the outermost, where nobody rated, the scale ends.
    """
    return torch.as_tensor(np.interp(scores.cpu(), *knots), dtype=scores.dtype, device=scores.device)


def load_calibration(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read a calibration that extras/people.py fitted. Raises: MediaError if it is anything else."""
    def increasing(knots):
        knots = np.array(knots, float)
        return knots.ndim == 2 and len(knots) == 2 and knots.size and np.isfinite(knots).all() and \
            (np.diff(knots) > 0).all()
    read = read_json(Path(path), "a calibration that extras.people align wrote",
                     lambda c: c and set(c) <= set(ASPECTS) and all(map(increasing, c.values())))
    return {aspect: tuple(np.array(knots, float)) for aspect, knots in read.items()}


# ---------------------------------------------------------------- command line

DEFAULT_SYNC = Path(__file__).parent / "assets" / "sync"              # it measures,
REWARD_SYNC = Path(__file__).parent / "assets" / "reward_sync"        # and this one, of other people, is in the reward


def weights_argument(text: str) -> dict[str, float]:
    """Read 'judge_lip_sync=1,seams=0.5' into {name: weight}."""
    try:
        weights = {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
        if not weights.keys() <= COMPONENTS.keys() or not all(0 <= weight < 1e9 for weight in weights.values()):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"want name=weight,... with weights of 0 or more and names among "
                                         f"{', '.join(COMPONENTS)}; got {text!r}") from None
    return weights


def judge_flags(p: argparse.ArgumentParser) -> list[str]:
    """Add the flags that name a judge, as `make_judge` reads them. Returns: their names."""
    g, names = p.add_argument_group("judge"), []
    flag = lambda *name, **settings: names.append(g.add_argument(*name, **settings).dest)
    flag("--judge", default="default", metavar="NAME", help="a folder, or a model of the hub such as "
         "Qwen/Qwen2.5-Omni-3B, which is then downloaded; none: no judge (default: the embedded one)")
    flag("--judge-url", metavar="URL", help="ask an OpenAI-compatible endpoint, http://host:port/v1, instead")
    flag("--judge-model", metavar="NAME", help="the model's name at that endpoint")
    flag("--judge-timeout", type=float, default=120.0, metavar="SECONDS", help="of its silence after which a request "
         "is sent again (%(default)g)")
    flag("--judge-patience", type=float, default=180.0, metavar="SECONDS", help="for which an endpoint that is down or "
         "busy is waited for; then the run is saved and stops (%(default)g)")
    flag("--judge-dtype", choices=("float32", "bfloat16", "float16"), help="(its own, else float32 on a CPU and "
         "bfloat16 elsewhere)")
    flag("--judge-size", type=int, metavar="S", help="pixels per side at which it sees frames (its own)")
    flag("--judge-batch", type=int, default=8, help="clips at once, or requests under way (%(default)s)")
    flag("--judge-order", choices=("ascending", "descending", "both"), default="ascending",
         help="of the scale in the question; both are averaged (%(default)s)")
    flag("--judge-offload", action="store_true", help="keep the judge in main memory between two uses")
    return names


def reward_flags(p: argparse.ArgumentParser) -> list[str]:
    """Add the flags that define a reward; train.py has the same. Returns: their names."""
    names, g = judge_flags(p), p.add_argument_group("reward")
    flag = lambda *name, **settings: names.append(g.add_argument(*name, **settings).dest)
    flag("--calibration", metavar="FILE", help="map ratings to people's scale by what --align wrote")
    flag("--perceptual", metavar="NAME", help="identity by a vision model of transformers, a folder or a name "
         "on the hub such as facebook/dinov2-small (local brightness, colour and contrast)")
    flag("--reward-sync", metavar="DIR", help="a sync network for the reward, of reward.py --train-sync with a --seed "
         "other than that of --sync, which measures; or none (the one for drawn talkers; with --data none)")
    flag("--weights", type=weights_argument, default={}, metavar="NAME=W,...",
         help="of components: " + ", ".join(f"{k} {w:g}" for k, w in WEIGHTS.items()))
    return names


def judge_knows(args: argparse.Namespace) -> bool:
    """Say whether the judge has seen such clips: the embedded one has seen drawn talkers alone."""
    return bool(args.judge_url) or not args.data or args.judge not in ("default", str(DEFAULT_JUDGE))


def make_judge(args: argparse.Namespace):
    """Make the judge that the flags name. Returns: a Judge, a RemoteJudge, or None for --judge none."""
    orders = {"ascending": (False,), "descending": (True,), "both": (False, True)}[args.judge_order]
    if not 1 <= args.judge_batch < 1e9 or not 32 <= (args.judge_size or 32) < 1e5:
        raise MediaError("--judge-batch and --judge-size", "must be at least 1 and 32, and not absurdly large")
    if args.judge_url:
        if not args.judge_model:
            raise MediaError("--judge-url", "needs --judge-model, the name under which the server knows the model")
        from extras.endpoint import RemoteJudge      # here alone: it needs the openai client
        return RemoteJudge(args.judge_url, args.judge_model, args.judge_timeout, args.judge_patience, args.judge_batch,
                           orders=orders)
    if args.judge == "none":
        return None
    size = {} if args.judge_size is None else {"side": args.judge_size}
    if not judge_knows(args):
        teach = shlex.join(["python", "-m", "extras.school", "teach", "--data", str(args.data)])
        print(f"note: the embedded judge knows drawn talkers only; teach one on your clips: {teach}", file=sys.stderr)
    name = DEFAULT_JUDGE if args.judge == "default" else args.judge
    return Judge.load(name, args.judge_dtype, orders=orders, batch=args.judge_batch, device=args.device,
                      offload=args.judge_offload, **size)


def make_reward(args: argparse.Namespace, judge, lively: Sequence[Clip], smooth: Sequence[Clip], chunk_frames: int,
                codec=None) -> Reward:
    """Make the reward that the flags define, from a judge or None and the exemplars (see Exemplars.measure)."""
    alike = PretrainedLikeness(args.perceptual, args.device) if args.perceptual else likeness
    exemplars = Exemplars.measure(lively, smooth, chunk_frames, alike, codec)
    calibration = load_calibration(args.calibration) if args.calibration else None
    return Reward(judge, exemplars, args.weights, chunk_frames, calibration, alike, reward_sync(args))


def sync_name(name: str | None, shipped: Path, args: argparse.Namespace) -> Path | None:
    """Say which sync network a flag means: without it the shipped one, which knows drawn talkers alone."""
    name = name or ("none" if args.data else shipped)
    return None if name == "none" else Path(name)


def measuring_sync(args: argparse.Namespace) -> SyncNetwork | None:
    """Load the sync network that measures. Raises: MediaError where it is broken."""
    name = sync_name(args.sync, DEFAULT_SYNC, args)
    return name and load_sync(name)


def reward_sync(args: argparse.Namespace) -> SyncNetwork | None:
    """Load the reward's sync network. Raises: MediaError where it is broken, or the one that measures."""
    name, measures = sync_name(args.reward_sync, REWARD_SYNC, args), sync_name(args.sync, DEFAULT_SYNC, args)
    if name is None:
        return None
    if measures and name.resolve() == measures.resolve():
        raise MediaError(name, "is the sync network of --sync, which measures what the reward does; teach the reward "
                               "another: python -m extras.school sync --seed 1")
    return load_sync(name).to(args.device)


def table(reward: Reward, columns: dict[str, Scores]) -> str:
    """Write components and totals, means over clips, one column each."""
    lines = [f"{'':22}" + "".join(f"{name:>14}" for name in columns) + "   weight  range  meaning"]
    for name, weight in reward.weights.items():
        values = "".join(f"{scores.components[name].nanmean().item():14.3f}" for scores in columns.values())
        own = COMPONENTS.get(name, Component(weight, 0, "", ""))                     # a reward of your own has others
        lines.append(f"{name:22}{values}{weight:9.2f}  {own.scale:6} {own.meaning}")
    lines.append(f"{'total':22}" + "".join(f"{scores.total.nanmean().item():14.3f}" for scores in columns.values())
                 + "           sum of weight * component: more is better")
    if unrated := sum(scores.total.isnan().sum().item() for scores in columns.values()):
        lines.append(f"unrated videos, in no mean of ratings and totals: {unrated}")
    if masses := [s.mass for s in columns.values() if getattr(s, "mass", None) is not None]:
        lines.append(f"the judge answers with digits, probability {min(m.min().item() for m in masses):.3f} or more")
    return "\n".join(lines)
