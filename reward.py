"""What a good talking portrait is, in numbers: a judge, regularisers, a sync network, and their weighted sum.

What you learn here, in the order of the file:

1. The judge. A multimodal language model (any Qwen-Omni thinker: a tiny one is embedded, a real one is loaded
   by name or asked over HTTP) watches and hears a clip and answers one question each about lip-sync,
   expressiveness and motion quality with a digit.
2. The regularisers: still background, identity, trembling and chunk seams, each compared with what real
   clips show.
3. The sync network. It tells the lips of this very moment from those of another. extras/sync.py trains it.
4. The components and their weights. All but the ratings are also scored chunk by chunk. The weighted sum is
   logged; grpo.py weighs how far each component is from its mean in a group instead.

extras/reward_flags.py makes all this from the flags of a command. The paper's judge, prompts and weights are
not public; what is chosen here is said where it is chosen.

A video is (F, 3, S, S), uint8 or float in [0, 1]; frames are 40 ms apart; sound is 640 samples a frame.
B clips, F frames, K chunks of T frames, S pixels per side.
"""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from data import LOOK_AHEAD, LOOK_BACK, MELS, Clip, log_mel, to_bytes
from extras.files import MediaError, fitting, loading, whole_model
from extras.media import FPS, SAMPLES_PER_FRAME, SAMPLE_RATE

ASSETS = Path(__file__).parent / "assets"
DEFAULT_JUDGE = ASSETS / "judge"                     # the embedded one
DEFAULT_SYNC = ASSETS / "sync"                       # this network measures,
REWARD_SYNC = ASSETS / "reward_sync"                 # and this one, of other talkers, is in the reward

# ---------------------------------------------------------------- the judge: a multimodal language model

ASPECTS = ("lip_sync", "expressiveness", "motion")

# What each aspect looks at, ignores, and means by 1, 3 and 5. A folder may have its own, in judge.json.
RUBRIC = {
    "template": "{look} {ignore} Answer with one digit from 1 to 5. {scale} Your rating:",
    "lip_sync": {
        "look": "Rate how well the lips follow the speech: do they open, close and round when the sound "
                "does?",
        "ignore": "Ignore picture quality, head motion and what is said.",
        "1": "the lips have nothing to do with the sound",
        "3": "they follow it loosely, or early, or late",
        "5": "every sound is seen on the lips at its moment"},
    "expressiveness": {
        "look": "Rate how lively the person speaks: how far the mouth opens, whether brows, eyes and head "
                "move along.",
        "ignore": "Ignore whether the motion fits the sound, and picture quality.",
        "1": "a still face, or lips that barely part",
        "3": "subdued",
        "5": "as lively as in a conversation"},
    "motion": {
        "look": "Rate how natural and clean the motion is: continuous, steady and sharp.",
        "ignore": "Ignore the sound, and how much the face moves.",
        "1": "broken: trembling, freezing, jumping, ghosting, blurred or noisy",
        "3": "visible faults",
        "5": "as filmed"},
}

# model_type of a checkpoint -> the part of it that watches, listens and answers in text (its "thinker").
THINKERS = {"qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
            "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration"}
MIN_MASS = 0.5                                       # below it, most of the answer is not a rating
NO_JUDGE = ("use an instruction-tuned model that answers at once, in a dtype it was made for, and, behind an "
            "endpoint, a server that supports logprobs")


def prompt(aspect: str, rubric: dict = RUBRIC) -> str:
    """Write the question about one aspect, its scale in the order of the rubric."""
    words = rubric[aspect]
    scale = " ".join(f"{digit}: {meaning}." for digit, meaning in words.items() if digit.isdigit())
    return rubric["template"].format(look=words["look"], ignore=words["ignore"], scale=scale)


@dataclass
class Ratings:
    """What a judge says of B clips, aspects in the order of ASPECTS."""

    score: Tensor                                    # (B, 3) expected rating, 1..5; NaN: the answer was none
    mass: Tensor                                     # (B, 3) probability that the answer is a digit at all


def expected_rating(p: Tensor) -> Ratings:
    """score = sum_d d p(d) / mass,  mass = sum_d p(d),  over the digits d = 1..5. Args: p (B, 3, 5).

    The mean over the digits ranks better than the one digit that would be written (Q-Align, 2312.17090).
    """
    mass = p.sum(-1)
    return Ratings(p @ torch.arange(1.0, 6.0, device=p.device) / mass, mass)


class JudgeError(MediaError):
    """A judge that cannot be asked, or does not rate: what was reached is to be saved, and can be resumed."""


class Unrated(JudgeError):
    """None of some clips got a rating."""


def drop_unrated(ratings: Ratings, names: Sequence[str]) -> Ratings:
    """Make a score NaN where too little of the answer is a digit. Raises: Unrated if no clip is rated."""
    unrated = ~(ratings.mass >= MIN_MASS) | ~ratings.score.isfinite()                # (B, 3)
    if unrated.any():
        clip, aspect = unrated.nonzero()[0].tolist()
        said = (f"the judge does not rate its {ASPECTS[aspect]}: the digits 1..5 have probability "
                f"{ratings.mass[clip, aspect]:.2g}")
        if unrated.any(1).all():
            raise Unrated(names[clip], f"{said}; {NO_JUDGE}")
        tqdm.write(f"note: {names[clip]}: {said}; {unrated.any(1).sum()} of {len(names)} clips are unrated",
                   file=sys.stderr)
    ratings.score = ratings.score.masked_fill(unrated, math.nan)
    return ratings


class Judge:
    """A multimodal language model that watches and hears a clip and answers each question with a digit.

    The clip comes first and the question last, so the clip is read once: its keys and values are kept and all
    questions are asked against them. Pictures and sound are placed on one clock (TMRoPE, 2503.20215).

    Args:    model, processor: a thinker of transformers and its processor; rubric: the wording, as RUBRIC.
             side: pixels per side at which a frame is shown, None for the processor's own choice.
             window: frames that are judged at once, None for any number; rate_whole cuts longer videos.
             batch: clips at once.    offload: keep the model on the CPU between two uses.
    """

    def __init__(self, model: nn.Module, processor, rubric: dict = RUBRIC, side: int | None = None,
                 window: int | None = None, batch: int = 8, device: str = "cpu", offload: bool = False):
        self.model, self.processor, self.rubric = model, processor, rubric
        self.side, self.window, self.batch = side, window, batch
        self.device, self.offload = device, offload
        self.digits = [processor.tokenizer.encode(d, add_special_tokens=False)[-1] for d in "12345"]
        # Only the next token counts. Without this, 3000 tokens would give 3000 rows of 150,000 logits.
        model.lm_head.register_forward_pre_hook(lambda head, inputs: (inputs[0][:, -1:],))

    @classmethod
    def load(cls, name: str | Path = DEFAULT_JUDGE, dtype: str | None = None, device: str = "cpu",
             **settings) -> "Judge":
        """Load a folder, or, where `name` is no folder, a model of the hub: naming one asks for its download.

        Args:   dtype: None for judge.json's, else float32 on a CPU and bfloat16 elsewhere; settings: of the
                constructor; they override judge.json's.
        Raises: MediaError where there is no such model, or one that cannot watch and hear.
        """
        import transformers                          # here: it takes seconds, and not every use needs a judge
        name, local = str(name), Path(name).is_dir()
        with loading(name, "a judge"):
            kind = transformers.AutoConfig.from_pretrained(name, local_files_only=local).model_type
            kind = kind.removesuffix("_thinker")
            if kind not in THINKERS:
                raise MediaError(name, f"is a {kind}, which cannot watch and hear; use one of "
                                       f"{', '.join(THINKERS)}")
            own = Path(name) / "judge.json"
            settings = (json.loads(own.read_text()) if own.exists() else {}) | settings
            usual = settings.pop("dtype", "float32" if device == "cpu" else "bfloat16")
            model = whole_model(getattr(transformers, THINKERS[kind]), name, dtype=dtype or usual)
            processor = transformers.AutoProcessor.from_pretrained(name, local_files_only=local)
            return cls(model, processor, device=device, **settings)

    @property
    def fingerprint(self) -> str:
        """What its ratings depend on, for a cache of them."""
        sign = hashlib.sha256(json.dumps([self.rubric, self.side, self.window]).encode())
        for name, weight in self.model.state_dict().items():
            sign.update(f"{name} {weight.dtype}".encode())       # of a large weight the beginning will do
            sign.update(weight.flatten()[:2 ** 18].cpu().contiguous().view(torch.uint8).numpy())
        return sign.hexdigest()

    def questions(self) -> tuple[str, list[str]]:
        """Return the text up to the end of the clip, and, for each aspect, the text that follows."""
        texts = []
        for aspect in ASPECTS:
            content = [{"type": "video"}, {"type": "text", "text": prompt(aspect, self.rubric)}]
            texts.append(self.processor.apply_chat_template([{"role": "user", "content": content}],
                                                            tokenize=False, add_generation_prompt=True))
        end = texts[0].index(self.processor.vision_eos_token) + len(self.processor.vision_eos_token)
        return texts[0][:end], [text[end:] for text in texts]

    def read(self, frames: Tensor, audio: Tensor, text: str) -> dict:
        """Tokenize clips (B, F, 3, S, S) uint8 with sound (B, F * 640), each after the same text."""
        # By default the processor takes 2 frames a second, 317 pixels, 30 s of sound, pictures before sound.
        size = {} if self.side is None else {"min_pixels": self.side ** 2, "max_pixels": self.side ** 2}
        self.processor.feature_extractor.n_samples = audio.shape[1]
        return self.processor(text=[text] * len(frames), videos=list(frames), audio=list(audio.numpy()),
                              **size, fps=float(FPS), do_sample_frames=False, cap_pixels_per_frame=False,
                              sampling_rate=SAMPLE_RATE, use_audio_in_video=True,
                              return_tensors="pt").to(self.device)

    def logits(self, frames: Tensor, audio: Tensor) -> Tensor:
        """Return (B, 3, vocabulary): of the first token of each answer. Gradients flow where they are on."""
        prefix, questions = self.questions()
        inputs = self.read(frames, audio, prefix)
        cache = self.model(**inputs, use_audio_in_video=True, use_cache=True).past_key_values
        logits, length = [], inputs["input_ids"].shape[1]
        for question in questions:
            ids = self.processor.tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids
            ids = ids.to(self.device).expand(len(frames), -1)
            # Positions count instants, and a clip has fewer of them than tokens. Text goes on at its last
            # instant + 1, on all three axes.
            after = length + torch.arange(ids.shape[1], device=self.device)
            place = (after + self.model.rope_deltas.view(-1, 1)).expand(3, len(frames), -1)
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
        return drop_unrated(expected_rating(torch.cat(p)), names)


def spans(frames: int, width: int | None) -> list[tuple[int, int]]:
    """Cover a video by spans (start, stop) of `width` frames, as few and as even as can be."""
    if width is None or frames <= width:
        return [(0, frames)]
    gaps = math.ceil((frames - width) / width)
    starts = [round(i * (frames - width) / gaps) for i in range(gaps + 1)]
    return [(start, start + width) for start in starts]


def rate_whole(judge, frames: Tensor, audio: Tensor, names: Sequence[str]) -> Tensor:
    """Rate clips as Judge.rate does, long ones in spans. Returns: mean score (B, 3)."""
    samples = audio.unflatten(1, (-1, SAMPLES_PER_FRAME))
    try:
        with fitting("the judge", "lower --judge-batch, or --judge-size"):
            ratings = [judge.rate(frames[:, a:b], samples[:, a:b].flatten(1), names).score
                       for a, b in spans(frames.shape[1], judge.window)]
    except OSError as error:                         # of a judge of your own that asks a server
        raise JudgeError("the judge", f"cannot be asked ({error}); is its server up?") from None
    return torch.stack(ratings).mean(0)


def calibrate(scores: Tensor, knots: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """Map scores to people's scale, linearly between the centres of the steps that extras/people.py fitted.

    The fit itself is a staircase: on a step two videos would earn the same reward and GRPO would learn
    nothing. Between centres every improvement counts. Beyond the outermost, the scale ends.
    """
    return torch.as_tensor(np.interp(scores.cpu(), *knots), dtype=scores.dtype, device=scores.device)


# ---------------------------------------------------------------- regularisers: what needs no judge
#
# Perceptual: is it still the portrait? Temporal: is it as smooth as real clips? Both are compared with real
# clips of the same kind. So a frozen face scores badly. A frozen face with a little noise would score well:
# that a face moves with the speech is for the judge and the sync network to say.

STILL_SCALES = 1, 2, 4                               # pixels are averaged over squares of this side
STILL_DEVIATION = 0.02                               # by which a still place may stray; black is 0, white 1
TEXTURE_WINDOW = 8                                   # pixels under a local mean and contrast, as in SSIM


def in_chunks(signal: Tensor, frames: int, chunk_frames: int) -> Tensor:
    """Group a signal by chunks: (B, K, T). An n-th difference, (B, F - n), lacks the first n frames:
    there its first value is repeated, and its last one fills up the last chunk."""
    tail = -frames % chunk_frames
    return nnf.pad(signal, (frames - signal.shape[1], tail), "replicate").unflatten(1, (-1, chunk_frames))


def straying(frames: Tensor, portrait: Tensor, still: Tensor) -> Tensor:
    """Measure how far the background strays from the portrait's: mean |difference| at three scales.

    Args: frames (B, F, 3, S, S), portrait (B, 3, S, S), still (S, S) weights. Returns: (B, F).
    """
    error = (frames - portrait[:, None]).flatten(0, 1)
    total = 0
    for scale in STILL_SCALES:
        pooled, weight = nnf.avg_pool2d(error, scale), nnf.avg_pool2d(still[None, None], scale)
        weighted = (pooled.abs().mean(1, keepdim=True) * weight).sum((1, 2, 3))
        total = total + weighted / weight.sum().clamp_min(1e-6)
    return total.view(frames.shape[:2]) / len(STILL_SCALES)


def likeness(frames: Tensor, portrait: Tensor) -> Tensor:
    """Compare local brightness, colour and contrast with the portrait's, at three scales: 1 is the portrait.

    SSIM's first two factors (Wang et al. 2004), at several scales (Wang et al. 2003). The third is left out:
    lips and lids move, so pixels need not agree. But a face that is blurred, noisy, tinted or another's has
    other means or contrasts.

    Args: frames (B, F, 3, S, S), portrait (B, 3, S, S). Returns: (B, F) in 0..1.
    """
    def moments(x):
        mean = nnf.avg_pool2d(x, TEXTURE_WINDOW, TEXTURE_WINDOW // 2)
        return mean, (nnf.avg_pool2d(x * x, TEXTURE_WINDOW, TEXTURE_WINDOW // 2) - mean * mean).clamp_min(0)

    x, y = frames.flatten(0, 1), portrait.repeat_interleave(frames.shape[1], 0)
    similarity = []
    while len(similarity) < 3 and x.shape[-1] >= TEXTURE_WINDOW:
        (mean_x, var_x), (mean_y, var_y) = moments(x), moments(y)
        light = (2 * mean_x * mean_y + 0.01 ** 2) / (mean_x ** 2 + mean_y ** 2 + 0.01 ** 2)
        contrast = (2 * (var_x * var_y).sqrt() + 0.03 ** 2) / (var_x + var_y + 0.03 ** 2)
        similarity.append((light * contrast).mean((1, 2, 3)))
        x, y = nnf.avg_pool2d(x, 2), nnf.avg_pool2d(y, 2)
    return torch.stack(similarity).mean(0).view(frames.shape[:2])


def temporal(frames: Tensor, chunk_frames: int) -> dict[str, Tensor]:
    """Measure motion per chunk, as logarithms: name -> (B, K). Args: frames (B, F, 3, S, S) in [0, 1].

    smoothness    mean third difference: trembling
    seams         change across the border to the chunk before over change inside; 0 in the first chunk
    """
    def size(difference):                            # (B, F - n, 3, S, S) -> (B, K, T)
        return in_chunks(difference.abs().mean((2, 3, 4)), frames.shape[1], chunk_frames) + 1e-4

    change = size(frames.diff(dim=1))
    seams = (change[:, :, 0] / change[:, :, 1:].mean(2)).log()
    return {"smoothness": size(frames.diff(n=3, dim=1)).mean(2).log(),
            "seams": torch.cat([torch.zeros_like(seams[:, :1]), seams[:, 1:]], 1)}


def beyond(values: Tensor, low: float, high: float) -> Tensor:
    """Score chunks (B, K) by how far they take their video out of the exemplars' range, low to high.

    The mean m of a video should lie in the range. Where it does not, a chunk earns what moves m there:

        m > high:  high - value        m < low:  value - low        else:  0

    So the mean over chunks is minus the distance of m to the range. By hand, for 2 to 3: chunks of 3 and 5
    have m = 4 and earn 0 and -2, on average -1. Chunks of 1 and 2 have m = 1.5 and earn -1 and 0.
    """
    mean = values.mean(1, keepdim=True)
    too_much, too_little = (mean > high).float(), (mean < low).float()
    return too_much * (high - values) + too_little * (values - low)


@dataclass
class Exemplars:
    """What good clips show: the measure that regularisers hold generated ones against.

    Data as found tremble, so the judge picks the smoothest clips.
    """

    still: Tensor                                    # (S, S) in 0..1, high where these clips do not move
    straying: float                                  # their own distance to their first frame, where still
    likeness: float                                  # and likeness to it
    temporal: dict[str, tuple[float, float]]         # mean of each of `temporal`, from and to

    @classmethod
    @torch.no_grad()
    def measure(cls, clips: Sequence[Clip], chunk_frames: int, codec=None) -> "Exemplars":
        """Measure clips at the size that will be compared with them.

        With the generator's codec, each range also covers the clips after encoding and decoding: the codec
        loses a camera's noise, and a generator that is asked to match it would shake the head.
        """
        def by_codec(video):
            device = codec.scale.device
            return codec.decode(video[:, 0].to(device), codec.encode(video.to(device))).cpu()

        def mean(values):
            return torch.cat([v.flatten() for v in values]).mean().item()

        videos = [clip.frames[None, : len(clip.frames) // chunk_frames * chunk_frames] / 255
                  for clip in clips]                 # each (1, F, 3, S, S), of whole chunks
        stray = torch.stack([(video - video[:, :1]).abs().mean((0, 1, 2)) for video in videos]).mean(0)
        still = torch.exp(-stray / STILL_DEVIATION)
        views = [videos] if codec is None else [videos, [by_codec(video) for video in videos]]
        measured = [[temporal(video, chunk_frames) for video in view] for view in views]
        means = {name: [mean(of[name] for of in view) for view in measured] for name in measured[0][0]}
        return cls(still, mean(straying(video, video[:, 0], still) for video in videos),
                   mean(likeness(video, video[:, 0]) for video in videos),
                   {name: (min(values), max(values)) for name, values in means.items()})


# ---------------------------------------------------------------- the sync network
#
# Does this sound belong to these lips? Two encoders learn it from clips alone (Chung & Zisserman 2016, "Out
# of time"): one watches five frames of the mouth, one hears the same 200 ms, and they should agree at the
# right moment only. Large judges are reported to miss shifts of less than a second; this one notices 40 ms.
#
# There are two of them. One is in the reward, and puts drawn clips in time. The other, of another seed (the
# shipped one also of other people), measures, and puts footage in time. What both overlook stays unseen.

SYNC_FRAMES = 5                                      # frames in a window, 200 ms, as in SyncNet
SYNC_SHIFTS = 15                                     # frames by which sound is tried early and late, as there
SYNC_SIZE = 64                                       # pixels to which any picture is resized first
SYNC_BOX = 37, 63, 16, 48                            # the mouth in it: rows .58 to .98, columns .25 to .75


def resize(pictures: Tensor) -> Tensor:
    """Resize float pictures (..., 3, S, S) to (..., 3, 64, 64), averaging where pixels are lost."""
    if pictures.shape[-2:] == (SYNC_SIZE, SYNC_SIZE):
        return pictures
    flat = nnf.interpolate(pictures.flatten(0, -4), (SYNC_SIZE, SYNC_SIZE), mode="bilinear", antialias=True)
    return flat.unflatten(0, pictures.shape[:-3])


class SyncNetwork(nn.Module):
    """Places moving lips and speech on one unit sphere, faces on another. What belongs together is near."""

    def __init__(self, width: int = 48, dim: int = 64):
        super().__init__()
        self.config = {"width": width, "dim": dim}
        w = width
        self.look = nn.Sequential(                                        # each frame      (N, 1, 26, 32)
            nn.Conv2d(1, w // 2, 5, 2, 2), nn.GELU(),                     #                 (N, w/2, 13, 16)
            nn.Conv2d(w // 2, w, 3, 2, 1), nn.GELU(),                     #                 (N, w, 7, 8)
            nn.Conv2d(w, w, 3, 2, 1), nn.GELU(),                          #                 (N, w, 4, 4)
            nn.Flatten(), nn.Linear(16 * w, 2 * w), nn.GELU())            #                 (N, 2 w)
        self.watch = nn.Sequential(                                       # five frames     (B, 2 w, F)
            nn.Conv1d(2 * w, 3 * w, SYNC_FRAMES), nn.GELU(),              #                 (B, 3 w, F - 4)
            nn.Conv1d(3 * w, dim, 1))                                     #                 (B, dim, F - 4)
        # A frame is four hops of 10 ms. Kernels of 4 and 9, both at stride 2, see 20 hops: five frames.
        self.hear = nn.Sequential(                                        # their sound     (B, MELS, 4 F)
            nn.Conv1d(MELS, 2 * w, 4, 2), nn.GELU(),                      #                 (B, 2 w, 2 F - 1)
            nn.Conv1d(2 * w, 3 * w, 9, 2), nn.GELU(),                     #                 (B, 3 w, F - 4)
            nn.Conv1d(3 * w, dim, 1))                                     #                 (B, dim, F - 4)
        self.recognise = nn.Sequential(                                   # who             (N, 3, 64, 64)
            nn.Conv2d(3, w // 4, 5, 2, 2), nn.GELU(),
            nn.Conv2d(w // 4, w // 2, 3, 2, 1), nn.GELU(),
            nn.Conv2d(w // 2, w, 3, 2, 1), nn.GELU(),
            nn.Conv2d(w, w, 3, 2, 1), nn.GELU(),                          #                 (N, w, 4, 4)
            nn.Flatten(), nn.Linear(16 * w, dim))

    def visual(self, frames: Tensor) -> Tensor:
        """Embed the mouth in every five consecutive frames.

        What is seen is grey, minus the clip's mean picture, in units of the clip's contrast. Colour, light
        and the face itself are gone, and a mouth that never moves is a blank.

        Args: frames (B, F, 3, S, S) float in [0, 1], F >= 5. Returns: (B, F - 4, dim), of length 1.
        """
        top, bottom, left, right = SYNC_BOX
        mouth = resize(frames)[..., top:bottom, left:right]
        grey = torch.einsum("bfchw,c->bfhw", mouth, mouth.new_tensor((0.299, 0.587, 0.114)))         # BT.601
        contrast = grey.std((1, 2, 3), keepdim=True).clamp_min(1e-3)
        moving = 3 * (grey - grey.mean(1, keepdim=True)) / contrast                   # 3: about unit variance
        seen = self.look(rearrange(moving, "b f h w -> (b f) 1 h w"))
        windows = self.watch(rearrange(seen, "(b f) c -> b c f", b=len(frames)))
        return nnf.normalize(windows.mT, dim=-1)

    def sound(self, audio: Tensor) -> Tensor:
        """Embed the sound of every five frames: audio (B, F * 640) -> (B, F - 4, dim), of length 1."""
        mel = log_mel(audio, audio.shape[1] // SAMPLES_PER_FRAME)
        own = mel.unflatten(-1, (-1, MELS))[:, :, LOOK_BACK:-LOOK_AHEAD]              # (B, F, 4, MELS)
        return nnf.normalize(self.hear(rearrange(own, "b f hop m -> b m (f hop)")).mT, dim=-1)

    def identity(self, pictures: Tensor) -> Tensor:
        """Embed who is seen. Args: pictures (..., 3, S, S) in [0, 1]. Returns: (..., dim), of length 1."""
        flat = resize(pictures).flatten(0, -4)
        return nnf.normalize(self.recognise(3 * (flat - 0.5)), dim=-1).unflatten(0, pictures.shape[:-3])


def lip_sound_distance(net: SyncNetwork, frames: Tensor, audio: Tensor) -> Tensor:
    """Measure how far lips and sound are apart in the five frames around each one: (B, F), 0..2.

    The first two frames and the last two have that of the nearest window.
    """
    device = next(net.parameters()).device
    apart = (net.visual(frames.to(device)) - net.sound(audio.to(device))).norm(dim=-1)            # (B, F - 4)
    return nnf.pad(apart[:, None], (SYNC_FRAMES // 2, SYNC_FRAMES // 2), "replicate")[:, 0]


# ---------------------------------------------------------------- the composite reward

@dataclass(frozen=True)
class Component:
    """A part of the reward; more is better. A regulariser is 0 for a video like the exemplars, else below."""

    weight: float                  # in the total; 0 switches it off
    floor: float                   # least group deviation to divide by: smaller ones nobody can see
    scale: str
    meaning: str


COMPONENTS = {
    "judge_lip_sync": Component(1.0, 0.02, "1..5", "rating: do the lips follow the sound"),
    "judge_expressiveness": Component(0.5, 0.05, "1..5", "rating: how lively"),
    "judge_motion": Component(1.0, 0.05, "1..5", "rating: how natural and clean"),
    "sync": Component(3.0, 0.005, "-2..0", "distance of lips and sound, by the reward's sync network"),
    "background": Component(0.25, 0.003, "-1..0", "distance to the portrait's, beyond the exemplars'"),
    "identity": Component(0.25, 0.01, "-1..0", "likeness to the portrait, where it is below the exemplars'"),
    "smoothness": Component(1.0, 0.03, "..0", "log ratio of trembling to the exemplars', up or down"),
    "seams": Component(1.0, 0.03, "..0", "log ratio of jumps between chunks, up or down"),
}
WEIGHTS = {name: component.weight for name, component in COMPONENTS.items()}
JUDGED = [f"judge_{aspect}" for aspect in ASPECTS]   # what needs a judge
AT_ONCE = 8                                          # clips that are measured at once: bounds the memory


@dataclass
class Scores:
    """A reward of B clips. Components are raw: a group's mean and deviation are the business of grpo.py."""

    total: Tensor                                    # (B,) sum of weight * component
    components: dict[str, Tensor]                    # name -> (B,)
    per_chunk: dict[str, Tensor]                     # name -> (B, K), of all but ratings


class Reward:
    """The composite reward: a judge's ratings and the regularisers, each named, and their weighted sum.

    Args:    judge: anything with `rate(frames, audio, names)` and `window`; None: ratings are left out.
             exemplars: what good clips show; weights: name -> weight, where not that of COMPONENTS.
             calibration: aspect -> knots of `calibrate`; sync: the reward's SyncNetwork; None: none.
    """

    def __init__(self, judge, exemplars: Exemplars, weights: dict[str, float] | None = None,
                 chunk_frames: int = 4, calibration: dict | None = None, sync: SyncNetwork | None = None):
        self.judge, self.exemplars, self.chunk_frames = judge, exemplars, chunk_frames
        self.calibration, self.sync = calibration or {}, sync
        absent = (JUDGED if judge is None else []) + (["sync"] if sync is None else [])
        weights = WEIGHTS | (weights or {})
        self.weights = {name: w for name, w in weights.items() if w and name not in absent}
        if unknown := self.weights.keys() - COMPONENTS.keys():
            raise MediaError("--weights", f"this code knows no {', '.join(unknown)}; it knows "
                                          f"{', '.join(COMPONENTS)}")
        if not self.weights:
            raise MediaError("--weights", "leave nothing to reward; give one above 0")
        self.floors = {name: COMPONENTS[name].floor for name in self.weights}

    @torch.no_grad()
    def __call__(self, frames: Tensor, audio: Tensor, portrait: Tensor, names: Sequence[str]) -> Scores:
        """Score clips of one length.

        Args:    frames (B, F, 3, S, S) in [0, 1]; audio (B, F * 640); portrait (B, 3, S, S); B names.
        Returns: Scores; NaN where the judge gave no rating.
        Raises:  JudgeError where the judge fails; MediaError, with a name, where another score is no number.
        """
        if frames.shape[1] < SYNC_FRAMES or audio.shape[1] != frames.shape[1] * SAMPLES_PER_FRAME:
            raise ValueError(f"want {SYNC_FRAMES} frames or more, and {SAMPLES_PER_FRAME} samples for each: "
                             f"got {tuple(frames.shape)} and {tuple(audio.shape)}")
        batches = zip(*(x.float().split(AT_ONCE) for x in (frames, audio, portrait)))
        parts = [self.chunk_scores(*batch) for batch in batches]
        chunks = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}       # (B, K) each
        components = {name: values.mean(1) for name, values in chunks.items()}                # (B,) each
        if set(JUDGED) & set(self.weights):
            score = rate_whole(self.judge, frames, audio, names)                              # (B, 3)
            for aspect, values in zip(ASPECTS, score.T):
                knots = self.calibration.get(aspect)
                components[f"judge_{aspect}"] = calibrate(values, knots) if knots else values
        components = {name: components[name] for name in self.weights if name in components}
        for name, values in components.items():
            if name not in JUDGED and not values.isfinite().all():
                bad = (~values.isfinite()).nonzero()[0].item()
                raise MediaError(names[bad], f"its {name} is {values[bad]}; look at the generated frames")
        total = sum(self.weights[name] * values for name, values in components.items())
        return Scores(total, components, {name: chunks[name] for name in chunks if name in components})

    def chunk_scores(self, frames: Tensor, audio: Tensor, portrait: Tensor) -> dict[str, Tensor]:
        """Score each chunk by what needs no judge: name -> (B, K), on the CPU. Its mean is the component."""
        def mean(values):                            # (B, F) -> (B, K)
            return in_chunks(values, frames.shape[1], self.chunk_frames).mean(2)

        good = self.exemplars
        portrait, still = portrait.to(frames.device), good.still.to(frames.device)
        stray = mean(straying(frames, portrait, still)) - good.straying
        alike = mean(likeness(frames, portrait)) - good.likeness
        chunks = {"background": -stray.clamp_min(0), "identity": alike.clamp_max(0)}
        for name, values in temporal(frames, self.chunk_frames).items():
            chunks[name] = beyond(values.cpu(), *good.temporal[name])
        if "sync" in self.weights:
            chunks["sync"] = -mean(lip_sound_distance(self.sync, frames, audio))
        return {name: values.cpu() for name, values in chunks.items()}
