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
import base64
import http.client
import json
import math
import os
import random
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import trange

from data import (FPS, LOOK_AHEAD, LOOK_BACK, MELS, SAMPLE_RATE, SAMPLES_PER_FRAME, Clip, MediaError, fitting, loading,
                  log_mel, reading_weights, video_uri, whole_model, write_speech, write_weights)
from model import estimate_pose

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
STIR = 0.3                                           # deviations of a mouth: less is rest
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

    score: Tensor                                    # (B, 3) expected rating, 1..5
    mass: Tensor                                     # (B, 3) probability that the answer is a digit 1..5 at all
    courses: Tensor | None = None                    # (B, F, 2) the mouth that it sees and the one that it hears


def expected_rating(p: Tensor) -> Ratings:
    """score = sum_d d p(d) / mass,  mass = sum_d p(d),  over the digits d = 1..5.

    The mean over the digits ranks better than the one digit that would be written (Q-Align, 2312.17090).

    Args: p (B, 3, orders, 5), for each order of the scale; scores are averaged over the orders, the least mass counts.
    """
    mass = p.sum(-1)
    score = p @ torch.arange(1.0, 6.0, device=p.device) / mass
    return Ratings(score.mean(-1), mass.amin(-1))


def course(mouth: Tensor) -> Tensor:
    """Take mean and deviation, if it is STIR or more, off a mouth (..., F)."""
    return (mouth - mouth.mean(-1, keepdim=True)) / mouth.std(-1, correction=0, keepdim=True).clamp_min(STIR)


def check_ratings(ratings: Ratings, names: Sequence[str]) -> Ratings:
    """Return the ratings, or raise MediaError where one is no number or hardly any of the answer is a digit."""
    for name, scores, masses in zip(names, ratings.score.tolist(), ratings.mass.tolist()):
        for aspect, score, mass in zip(ASPECTS, scores, masses):
            if not (mass >= MIN_MASS and 1 <= score <= 5):                           # not a number is refused, too
                raise MediaError(name, f"the judge does not rate its {aspect}: the digits 1..5 have probability "
                                       f"{mass:.2g}, the rating is {score:.2g}; use an instruction-tuned model that "
                                       "does not think aloud, in a dtype it was made for")
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
        self.readouts, self.towers = None, {}        # what its towers said of the clips that were read last
        model.visual.register_forward_hook(lambda *call: self.towers.update(sight=call[-1].pooler_output))
        model.audio_tower.register_forward_hook(lambda *call: self.towers.update(sound=call[-1].last_hidden_state))
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
            judge = cls(model, processor, device=device, **settings)
            if (readouts := Path(name) / "readouts.safetensors").exists():
                judge.read_out_by(load_file(readouts))
        return judge

    def read_out_by(self, readouts: dict[str, Tensor]) -> None:
        """Let `rate` also say, frame by frame, which mouth it sees and which it hears: linear readouts of its towers.

        Args: readouts: sight.weight (2, 4 w) and sound.weight (2, w) for towers of width w, with biases (see Hints).
        """
        self.readouts = {k: v.float().to(self.device) for k, v in readouts.items()}

    def courses(self, clips: int, frames: int) -> Tensor:
        """Read out (B, F, 2), the mouth seen and the mouth heard, of the clips that were read last."""
        out = {name: nnf.linear(seen.float().view(clips, -1, self.readouts[f"{name}.weight"].shape[1]),
                                self.readouts[f"{name}.weight"], self.readouts[f"{name}.bias"])
               for name, seen in self.towers.items()}
        return torch.stack([out["sight"].flatten(1)[:, :frames], out["sound"][:, :frames, 0]], -1).cpu()

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
        Returns: Ratings on the CPU, fp32. Raises: MediaError, naming the clip, where the answer is no rating.
        """
        self.model.to(self.device)
        p, courses = [], []
        for i in range(0, len(frames), self.batch):
            pictures = to_bytes(frames[i:i + self.batch].detach()).cpu()
            logits = self.logits(pictures, audio[i:i + self.batch].detach().cpu().float())
            p.append(logits.float().softmax(-1)[..., self.digits].cpu())
            if self.readouts:
                courses.append(self.courses(len(pictures), frames.shape[1]))
        if self.offload:
            self.model.to("cpu")
        ratings = check_ratings(expected_rating(torch.cat(p).unflatten(1, (len(ASPECTS), -1))), names)
        ratings.courses = torch.cat(courses) if courses else None
        return ratings


# ---------------------------------------------------------------- the judge behind an endpoint

BACKOFF, LONGEST_PAUSE = 0.5, 60.0                   # seconds before the first retry, and before any

# What vLLM needs to see and hear a clip as it is (chat_utils.py, qwen2_5_omni_thinker.py). It takes the sound out of
# the mp4 only if the *request* says use_audio_in_video (vllm#36319; the server's own flag does not, vllm#47788), and
# an input_audio part beside it would be a second sound. It keeps 32 frames of a video unless told to keep all, and
# takes two frames for a whole second unless told otherwise: once for positions, once for weaving in the sound.
VLLM = {"mm_processor_kwargs": {"use_audio_in_video": True, "fps": FPS, "second_per_grid_ts": [2 / FPS]},
        "media_io_kwargs": {"video": {"num_frames": -1}}}


def _gist(answer: bytes) -> str:
    """Return what a server said on one line: its error message, else the beginning of the answer."""
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        answer = json.loads(answer)["error"]["message"].encode()
    return " ".join(answer.decode(errors="replace").split())[:200] or "nothing"


def digit_probabilities(answer: bytes) -> Tensor:
    """Read p (5,) of the digits 1..5 from a chat completion: the top log-probabilities of its first token.

    Tokens that differ in white space alone are one digit. Raises: ValueError for anything else than such an answer.
    """
    try:
        p = [0.0] * 5
        for token in json.loads(answer)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            if (digit := token["token"].strip()) in tuple("12345"):
                p[int(digit) - 1] += math.exp(token["logprob"])
    except (LookupError, TypeError, AttributeError, OverflowError, ValueError):
        raise ValueError("no log-probabilities") from None
    if not sum(p) <= 1.01:                           # not a number is also refused
        raise ValueError("no probabilities")
    return torch.tensor(p)


class RemoteJudge:
    """A multimodal language model that rates clips behind an OpenAI-compatible endpoint, such as vLLM's.

        vllm serve Qwen/Qwen2.5-Omni-7B                        # of April 2026 or later
        RemoteJudge("http://localhost:8000/v1", "Qwen/Qwen2.5-Omni-7B").rate(frames, audio, names)

    One worker asks all prompts of one clip in turn, media first: the server finds the clip in its prefix cache.

    Args:    timeout: seconds of silence after which a request has failed; retries: of a request that may succeed
             later; at_once: requests under way; key: of the endpoint, else OPENAI_API_KEY; interleave: send VLLM's
             fields. Turn it off for a server that ignores them, as it would judge without sound: it then gets a wav
             after the video, which says less about lips than sound woven into the pictures. orders: as of Judge.
    """

    def __init__(self, url: str, model: str, timeout: float = 120.0, retries: int = 4, at_once: int = 4,
                 key: str | None = None, interleave: bool = True, orders: Sequence[bool] = (False,)):
        if not url.startswith(("http://", "https://")):
            raise MediaError(url, "is not the address of a judge; pass one like http://localhost:8000/v1")
        self.url, self.model, self.interleave = f"{url.rstrip('/')}/chat/completions", model, interleave
        self.timeout, self.retries, self.at_once, self.orders, self.window = timeout, retries, at_once, orders, None
        self.key = (key or os.environ.get("OPENAI_API_KEY", "")).strip()              # files of keys end in a newline

    def rate(self, frames: Tensor, audio: Tensor, names: Sequence[str]) -> Ratings:
        """Rate clips as `Judge.rate` does. Raises: MediaError when a request fails for good or its answer is no rating;
        no other request is then started."""
        if audio.shape != (len(names), frames.shape[1] * SAMPLES_PER_FRAME) or len(frames) != len(names):
            raise ValueError(f"clips disagree: {frames.shape=} {audio.shape=} {len(names)=}")
        stop, pool = threading.Event(), ThreadPoolExecutor(self.at_once)
        try:
            jobs = [pool.submit(self._rate_clip, *clip, stop) for clip in zip(frames, audio, names)]
            for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                job.result()                         # raises what went wrong, if anything did
            ratings = [job.result() for job in jobs]
            return Ratings(torch.cat([r.score for r in ratings]), torch.cat([r.mass for r in ratings]))
        finally:
            stop.set()                               # after an error or Ctrl-C: wait for nobody
            pool.shutdown(wait=False, cancel_futures=True)

    def _rate_clip(self, frames: Tensor, audio: Tensor, name: str, stop: threading.Event) -> Ratings | None:
        """Ask all questions about one clip; none once another clip has failed."""
        try:
            media, p = self._media(frames, audio), []
            for aspect, order in product(ASPECTS, self.orders):
                if stop.is_set():
                    return None
                content = [*media, {"type": "text", "text": prompt(aspect, order)}]
                body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 1,
                        "temperature": 0, "logprobs": True, "top_logprobs": 20, **(VLLM if self.interleave else {})}
                answer = self._post(json.dumps(body).encode(), name, stop)
                try:
                    p.append(digit_probabilities(answer))
                except ValueError as error:
                    raise MediaError(name, f"{self.url} answered with {error} of a first token but: {_gist(answer)}; "
                                           "use a server that supports logprobs and top_logprobs") from None
            p = torch.stack(p).view(1, len(ASPECTS), -1, 5)                          # (1, aspects, orders, digits)
            return check_ratings(expected_rating(p), [name])
        except Exception:
            stop.set()
            raise

    def _media(self, frames: Tensor, audio: Tensor) -> list[dict]:
        """Encode a clip as the parts of a message: an mp4 with its sound, and the sound alone if not interleaved."""
        video = {"type": "video_url", "video_url": {"url": video_uri(to_bytes(frames.detach()).cpu(), audio)}}
        if self.interleave:
            return [video]
        with tempfile.TemporaryDirectory() as folder:
            write_speech(wav := Path(folder, "clip.wav"), audio.detach().cpu())
            sound = base64.b64encode(wav.read_bytes()).decode()
        return [video, {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}]

    def _post(self, body: bytes, name: str, stop: threading.Event) -> bytes:
        """Send a request, again after time-outs, lost connections, HTTP 429 and 5xx. Returns: the answer's body."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        for attempt in range(self.retries + 1):
            # Jitter keeps the workers from coming back together; SystemRandom leaves every seed alone.
            pause = BACKOFF * 2**attempt * random.SystemRandom().uniform(0.5, 1)
            try:
                request = urllib.request.Request(self.url, body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code}"
                with error, suppress(OSError, http.client.HTTPException):             # its words may be cut off
                    said += f": {_gist(error.read())}"
                if error.code != 429 and error.code < 500:
                    raise MediaError(name, f"{self.url} refuses it ({said}); check model, key and server") from None
                if (after := error.headers.get("Retry-After", "")).isdecimal():       # seconds; a date is left aside
                    pause = max(pause, int(after))
            except (OSError, http.client.HTTPException) as error:
                said = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt == self.retries or stop.wait(min(pause, LONGEST_PAUSE)):
                raise MediaError(name, f"{self.url} failed {attempt + 1} times (last: {said}); "
                                       "check that the server runs, or allow more time or retries")


# ---------------------------------------------------------------- regularisers: what needs no judge
#
# Perceptual: is it still the portrait? Temporal: does it move as real clips do? Both are compared with real clips of
# the same kind, so that a frozen face, as still and smooth as can be, does not win.

STILL_SCALES = 1, 2, 4                               # pixels are averaged over squares of this side
STILL_DEVIATION = 0.02                               # grey levels of 1 by which a place may stray and count as still
REACH = 8                                            # frames, a third of a second, over which activity is measured
HEAD_PYRAMID = (16, 3), (32, 2)                      # every second head is measured, coarsely: a seventh of the time
HEAD_AT_REST = 0.005                                 # of 2, the picture's side: a head that is nearer has not moved
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


def temporal(frames: Tensor, portrait: Tensor, chunk_frames: int) -> dict[str, Tensor]:
    """Measure motion per chunk, as logarithms: name -> (B, K).

    Args: frames (B, F, 3, S, S), portrait (B, 3, S, S), in [0, 1].

    drift       mean distance of the head to its place on the portrait, 2 is the picture's side: a head that wanders off
    activity    mean change over a third of a second, in grey levels of 1: how far things move; flicker adds nothing
    jerk        mean third difference: trembling
    flicker     mean second difference of areas of S/8: light that trembles
    seam        change across the border to the chunk before over change inside; 0 in the first chunk
    """
    cut = lambda d: in_chunks(d.abs().mean((2, 3, 4)), frames.shape[1], chunk_frames) + 1e-4     # (B, K, T)
    areas = nnf.adaptive_avg_pool2d(frames.flatten(0, 1), 8).unflatten(0, frames.shape[:2])
    pose = estimate_pose(torch.cat([portrait[:, None], frames[:, ::2]], 1), pyramid=HEAD_PYRAMID)[:, 1:]
    away = pose[..., [0, 3]].norm(dim=-1).repeat_interleave(2, 1)[:, :frames.shape[1]]           # (B, F)
    away = in_chunks(away, frames.shape[1], chunk_frames).mean(2)
    change = cut(frames.diff(dim=1))
    reach = frames[:, REACH:] - frames[:, :-REACH]
    seam = (change[:, :, 0] / change[:, :, 1:].mean(2)).log()
    return {"drift": (away + HEAD_AT_REST).log(), "activity": cut(reach).mean(2).log(),
            "jerk": cut(frames.diff(n=3, dim=1)).mean(2).log(), "flicker": cut(areas.diff(n=2, dim=1)).mean(2).log(),
            "seam": torch.cat([torch.zeros_like(seam[:, :1]), seam[:, 1:]], 1)}


def some_videos(clips: Sequence[Clip], chunk_frames: int, most: int = 64) -> list[Tensor]:
    """Choose clips spread over a set: each (1, F, 3, S, S) in [0, 1], whole chunks long."""
    chosen = torch.linspace(0, len(clips) - 1, min(most, len(clips))).long().tolist()
    frames = [clips[i].frames for i in chosen]
    return [f[None, : len(f) // chunk_frames * chunk_frames] / 255 for f in frames]


@dataclass
class RealClips:
    """What real clips of the same set show: the measure that regularisers hold generated ones against."""

    still: Tensor                                    # (S, S) in 0..1, high where real clips do not move
    straying: float                                  # their own distance to their first frame, where still
    likeness: float                                  # and likeness to it
    temporal: dict[str, tuple[float, float]]         # mean of each of `temporal`, from and to

    @classmethod
    @torch.no_grad()
    def measure(cls, clips: Sequence[Clip], chunk_frames: int, likeness=likeness) -> "RealClips":
        """Measure clips spread over the set, at the size that will be compared with them."""
        videos = some_videos(clips, chunk_frames)
        stray = torch.stack([(v - v[:, :1]).abs().mean((0, 1, 2)) for v in videos]).mean(0)
        still = torch.exp(-stray / STILL_DEVIATION)
        mean = lambda values: torch.cat([v.flatten() for v in values]).mean().item()
        motion = [temporal(v, v[:, 0], chunk_frames) for v in videos]
        means = {name: mean(m[name] for m in motion) for name in motion[0]}
        return cls(still, mean(straying(v, v[:, 0], still) for v in videos),
                   mean(likeness(v, v[:, 0]) for v in videos), {name: (value, value) for name, value in means.items()})

    @torch.no_grad()
    def widen(self, clips: Sequence[Clip], chunk_frames: int, codec) -> None:
        """Take how things move in the same clips as a generator's codec shows them for real, too: a camera's noise is
        lost in it (on GRID .6 of log jerk), and only shaking heads could make up for it."""
        device = codec.scale.device
        motion = []
        for v in some_videos(clips, chunk_frames):
            shown = codec.decode(v[:, 0].to(device), codec.encode(v.to(device))).cpu()
            motion.append(temporal(shown, v[:, 0], chunk_frames))
        for name, (low, high) in self.temporal.items():
            value = torch.cat([m[name].flatten() for m in motion]).mean().item()
            self.temporal[name] = min(low, value), max(high, value)


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
class Weights:
    """What each component counts for in the total. 0 switches it off; a judge is only asked if an aspect counts."""

    lip_sync: float = 1.0
    expressiveness: float = 0.1
    motion: float = 0.25
    lip_course: float = 3.0
    lip_range: float = 0.5
    sync: float = 2.0
    still: float = 0.25
    identity: float = 0.25
    drift: float = 0.5
    activity: float = 0.5
    jerk: float = 0.5
    flicker: float = 0.25
    seam: float = 1.0


# Name -> range, unit and meaning. Of all, more is better; the regularisers reach 0 where real clips are.
COMPONENTS = {
    "lip_sync": ("1..5", "rating", "judge: do the lips follow the sound"),
    "expressiveness": ("1..5", "rating", "judge: how lively"),
    "motion": ("1..5", "rating", "judge: how natural and clean"),
    "lip_course": ("-2..0", "correlation - 1", "embedded judge: of the mouth it sees with the mouth it hears"),
    "lip_range": ("..0", "log ratio", "embedded judge: how far it sees the mouth move against how far it hears it"),
    "sync": ("-2..0", "distance", "the reward's sync network: of lips and sound, moment by moment"),
    "still": ("-1..0", "grey level", "background's distance to the portrait, beyond that of real clips"),
    "identity": ("-1..0", "similarity", "likeness to the portrait, as far as below that of real clips"),
    "drift": ("..0", "log ratio", "the head's distance to its place on the portrait against real clips, more or less"),
    "activity": ("..0", "log ratio", "range of motion against real clips, more or less"),
    "jerk": ("..0", "log ratio", "trembling against real clips, more or less"),
    "flicker": ("..0", "log ratio", "trembling light against real clips, more or less"),
    "seam": ("..0", "log ratio", "jumps at chunk borders against real clips, more or less"),
}
# Deviations within a group that are not worth learning from: less cannot be seen, and a z-score would blow it up.
FLOORS = {"lip_sync": 0.02, "expressiveness": 0.05, "motion": 0.05, "lip_course": 0.005, "lip_range": 0.03,
          "sync": 0.005, "still": 0.003, "identity": 0.01, "drift": 0.05, "activity": 0.05, "jerk": 0.03,
          "flicker": 0.03, "seam": 0.03}
READ_OUT = "lip_course", "lip_range"                 # what needs a judge with readouts
JUDGED = *ASPECTS, *READ_OUT                         # what needs a judge at all


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


class Reward:
    """The composite reward: a judge's ratings and the regularisers, each named, and their weighted sum.

    Args:    judge: anything with `rate(frames, audio, names)` and `window`; None if no aspect has a weight.
             real: of the clips that generated ones shall resemble; calibration: aspect -> knots, from `align`.
             likeness: how frames are compared with the portrait, `likeness` or a PretrainedLikeness.
             sync: the reward's own SyncNetwork; without one the component is left out.
    """

    def __init__(self, judge, real: RealClips, weights: Weights = Weights(), chunk_frames: int = 4,
                 calibration: dict | None = None, likeness=likeness, sync: SyncNetwork | None = None):
        self.judge, self.real, self.chunk_frames, self.likeness = judge, real, chunk_frames, likeness
        self.sync = sync
        self.weights, self.calibration = {k: w for k, w in asdict(weights).items() if w}, calibration or {}
        if judge is not None and not getattr(judge, "readouts", None):
            for name in READ_OUT:                                # most judges say a digit, and nothing frame by frame
                self.weights.pop(name, None)
        if sync is None:
            self.weights.pop("sync", None)
        self.floors = {name: FLOORS[name] for name in self.weights}
        if judge is None and set(JUDGED) & set(self.weights):
            raise ValueError("the weights count a judge's ratings, but there is no judge")

    @torch.no_grad()
    def __call__(self, frames: Tensor, audio: Tensor, portrait: Tensor, names: Sequence[str],
                 per_chunk: bool = False) -> Scores:
        """Score clips of one length.

        Args:    frames (B, F, 3, S, S) in [0, 1]; audio (B, F * 640); portrait (B, 3, S, S); B names, for messages.
                 per_chunk: also say when, of what is localised in time: the regularisers, sync and lip_course, which
                 are means over chunks. A rating is of the whole.
        Raises:  MediaError, naming the clip, where the judge fails or a component is not a number.
        """
        if frames.shape[1] <= REACH or audio.shape[1] != frames.shape[1] * SAMPLES_PER_FRAME:
            raise ValueError(f"want more than {REACH} frames and {SAMPLES_PER_FRAME} samples for each: "
                             f"got {tuple(frames.shape)} and {tuple(audio.shape)}")
        parts = [self.localised(*part) for part in zip(*(x.float().split(AT_ONCE) for x in (frames, audio, portrait)))]
        chunks, mass = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, None
        for name, (low, high) in self.real.temporal.items():     # beyond real clips' range, by the video's average
            mean = chunks[name].mean(1, keepdim=True)
            nearest = mean.clamp(low, high)
            chunks[name] = -(chunks[name] - nearest) * (mean - nearest).sign()
        components = {name: values.mean(1) for name, values in chunks.items()}
        if set(JUDGED) & set(self.weights):
            score, mass, courses = self.rate(frames, audio, names)
            components |= dict(zip(ASPECTS, score.T))
            if courses is not None:
                chunks["lip_course"] = self.lip_course(courses)
                components["lip_course"] = chunks["lip_course"].mean(1)
                seen, heard = courses.std(1).clamp_min(STIR).unbind(-1)
                components["lip_range"] = -(seen / heard).log().abs()
        components = {name: components[name] for name in self.weights if name in components}
        for name, values in components.items():
            if not values.isfinite().all():
                bad = (~values.isfinite()).nonzero()[0].item()
                raise MediaError(names[bad], f"its {name} is {values[bad]}; look at the frames that were generated")
        total = sum(self.weights[name] * values for name, values in components.items())
        return Scores(total, components, {k: v for k, v in chunks.items() if per_chunk and k in self.weights}, mass)

    def resemble(self, clips: Sequence[Clip], codec) -> None:
        """Hold what is generated against real clips as they are and as the generator's codec shows them."""
        self.real.widen(clips, self.chunk_frames, codec)

    def localised(self, frames: Tensor, audio: Tensor, portrait: Tensor) -> dict[str, Tensor]:
        """Measure what needs no judge: name -> (B, K), on the CPU. All but the temporal measures are final."""
        cut = lambda values: in_chunks(values, frames.shape[1], self.chunk_frames).mean(2)
        portrait, still = portrait.to(frames.device), self.real.still.to(frames.device)
        if still.shape[-1] != frames.shape[-1]:
            still = nnf.interpolate(still[None, None], frames.shape[-2:], mode="bilinear")[0, 0]
        stray = cut(straying(frames, portrait, still)) - self.real.straying
        alike = cut(self.likeness(frames, portrait)) - self.real.likeness
        chunks = {"still": -stray.clamp_min(0), "identity": alike.clamp_max(0),
                  **temporal(frames, portrait, self.chunk_frames)}
        if "sync" in self.weights:                               # the five frames around each one, seen and heard
            device = next(self.sync.parameters()).device
            apart = (self.sync.visual(frames.to(device)) - self.sync.sound(audio.to(device))).norm(dim=-1)
            chunks["sync"] = -cut(nnf.pad(apart[:, None], (SYNC_FRAMES // 2, SYNC_FRAMES // 2), "replicate")[:, 0])
        return {name: values.cpu() for name, values in chunks.items()}

    def rate(self, frames: Tensor, audio: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Judge every clip, long ones in spans.

        Returns: score (B, 3), calibrated; mass (B, 3); courses (B, F, 2), or None.
        """
        samples, parts = audio.unflatten(1, (-1, SAMPLES_PER_FRAME)), spans(frames.shape[1], self.judge.window)
        with fitting("the judge", "lower --judge-batch, or --judge-size"):
            ratings = [self.judge.rate(frames[:, a:b], samples[:, a:b].flatten(1), names) for a, b in parts]
        score = torch.stack([r.score for r in ratings])          # (spans, B, 3)
        for i, aspect in enumerate(ASPECTS):
            if aspect in self.calibration:
                score[..., i] = calibrate(score[..., i], self.calibration[aspect])
        courses = None
        if ratings[0].courses is not None:                       # where spans overlap, the later one counts
            courses = torch.zeros(*frames.shape[:2], 2)
            for r, (a, b) in zip(ratings, parts):
                courses[:, a:b] = r.courses
        return score.mean(0), torch.stack([r.mass for r in ratings]).amin(0), courses

    def lip_course(self, courses: Tensor) -> Tensor:
        """Say when the mouth seen leaves the mouth heard, (B, F, 2) -> (B, K): -(seen - heard)^2 / 2, each of mean 0
        and deviation 1 over the video, so that the mean over a video is their correlation - 1."""
        gap = course(courses.mT).diff(dim=1)[:, 0].square() / 2                              # (B, F)
        return -in_chunks(gap, gap.shape[1], self.chunk_frames).mean(2)


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
    """Read 'lip_sync=1,seam=0.5' into {name: weight}."""
    try:
        weights = {name: float(weight) for name, weight in (part.split("=") for part in text.split(","))}
        Weights(**weights)                           # a TypeError for names that it lacks
        if not all(0 <= weight < 1e9 for weight in weights.values()):
            raise ValueError
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"want name=weight,... with weights of 0 or more and names among "
                                         f"{', '.join(COMPONENTS)}; got {text!r}") from None
    return weights


def judge_flags(p: argparse.ArgumentParser) -> list[str]:
    """Add the flags that name a judge, as `make_judge` reads them. Returns: their names."""
    g, names = p.add_argument_group("judge"), []
    flag = lambda *name, **settings: names.append(g.add_argument(*name, **settings).dest)
    flag("--judge", default=str(DEFAULT_JUDGE), metavar="NAME", help="a folder, or a model of the hub such as "
         "Qwen/Qwen2.5-Omni-3B, which is then downloaded; none: no judge (the embedded one)")
    flag("--judge-url", metavar="URL", help="ask an OpenAI-compatible endpoint, http://host:port/v1, instead")
    flag("--judge-model", metavar="NAME", help="the model's name at that endpoint")
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
         help="of components: " + ", ".join(f"{k} {w:g}" for k, w in asdict(Weights()).items()))
    return names


def make_judge(args: argparse.Namespace):
    """Make the judge that the flags name. Returns: a Judge, a RemoteJudge, or None for --judge none."""
    orders = {"ascending": (False,), "descending": (True,), "both": (False, True)}[args.judge_order]
    if not 1 <= args.judge_batch < 1e9 or not 32 <= (args.judge_size or 32) < 1e5:
        raise MediaError("--judge-batch and --judge-size", "must be at least 1 and 32, and not absurdly large")
    if args.judge_url:
        if not args.judge_model:
            raise MediaError("--judge-url", "needs --judge-model, the name under which the server knows the model")
        return RemoteJudge(args.judge_url, args.judge_model, at_once=args.judge_batch, orders=orders)
    if args.judge == "none":
        return None
    size = {} if args.judge_size is None else {"side": args.judge_size}
    if args.data and args.judge == str(DEFAULT_JUDGE):
        print("note: the embedded judge knows drawn talkers only; teach one on your clips: "
              f"python -m extras.school teach --data {args.data}", file=sys.stderr)
    return Judge.load(args.judge, args.judge_dtype, orders=orders, batch=args.judge_batch, device=args.device,
                      offload=args.judge_offload, **size)


def make_reward(args: argparse.Namespace, real: Sequence[Clip], chunk_frames: int) -> Reward:
    """Make the reward that the flags define, for clips like the real ones."""
    judge = make_judge(args)
    weights = Weights(**args.weights if judge else args.weights | dict.fromkeys(JUDGED, 0.0))
    alike = PretrainedLikeness(args.perceptual, args.device) if args.perceptual else likeness
    calibration = load_calibration(args.calibration) if args.calibration else None
    name = args.reward_sync or ("none" if args.data else str(REWARD_SYNC))
    if name != "none" and args.sync and Path(name).resolve() == Path(args.sync).resolve():
        raise MediaError(name, "is the sync network of --sync, which measures what the reward does; teach the reward "
                               "another: python reward.py --train-sync --seed 1")
    sync = None if name == "none" else load_sync(name).to(args.device)
    return Reward(judge, RealClips.measure(real, chunk_frames, alike), weights, chunk_frames, calibration, alike, sync)


def table(reward: Reward, columns: dict[str, Scores]) -> str:
    """Write components and totals, means over clips, one column each."""
    lines = [f"{'':16}" + "".join(f"{name:>14}" for name in columns) + "   weight  range  unit, meaning"]
    for name, weight in reward.weights.items():
        values = "".join(f"{scores.components[name].mean().item():14.3f}" for scores in columns.values())
        scale, *meaning = COMPONENTS.get(name, ("",))                                # a reward of your own has others
        lines.append(f"{name:16}{values}{weight:9.2f}  {scale:6} {', '.join(meaning)}")
    lines.append(f"{'total':16}" + "".join(f"{scores.total.mean().item():14.3f}" for scores in columns.values())
                 + "           sum of weight * component: more is better")
    if masses := [s.mass for s in columns.values() if getattr(s, "mass", None) is not None]:
        lines.append(f"the judge answers with digits, probability {min(m.min().item() for m in masses):.3f} or more")
    return "\n".join(lines)
