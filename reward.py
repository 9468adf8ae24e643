"""What a good talking portrait is, in numbers: a judge, a composite reward, and metrics that no reward may use.

    python reward.py --video V.mp4 [--portrait P.png]       every component, the total, and the held-out metrics
    python reward.py --train-judge [--data DIR]             teach the embedded judge, on drawn talkers or your clips
    python reward.py --validate-judge [--judge NAME]        can this judge hear, see and tell? on your clips?
    python reward.py --align ratings.csv                    does it agree with people? and a calibration to their scale
    python reward.py --train-sync [--data DIR]              train a sync network, for the reward or to measure
    python reward.py --tally VOTES.json --key KEY.json      what people preferred in a study of sample.py

What you learn here, in the order of the file:

1. The judge: a multimodal language model (any Qwen-Omni thinker: a tiny one is embedded, a real one is loaded by name
   or asked over HTTP) watches and hears a clip and answers one question per aspect with a digit,

       score = sum_d d p(d) / sum_d p(d),    d = 1..5,    aspects: lip-sync, expressiveness, motion quality

2. The regularisers: still background, identity, amount of motion, jerk, flicker, chunk seams, each held against what
   real clips show; a sync network, which knows this very moment's lips from another's; and the composite
   reward = sum_i weight_i component_i.
3. How the embedded judge is taught: its towers to see and to hear mouths, then all of it on clips of known quality,
   spoilt in graded ways.
4. Whether to trust a judge: known faults, and ratings of people.
5. Held-out metrics. Nothing in 1..3 uses them: a generator that is trained on the reward is measured by them.

The paper's judge, prompts and weights are not public; what is chosen here is said where it is chosen.

A video is (F, 3, S, S), uint8 or float in [0, 1]; frames are 40 ms apart; sound is 640 samples a frame.
B clips, F frames, K chunks, S pixels per side.
"""

import argparse
import base64
import csv
import http.client
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm, trange

from data import (FPS, LOOK_AHEAD, LOOK_BACK, MEL_DIM, MELS, SAMPLE_RATE, SAMPLES_PER_FRAME, Clip, MediaError, fitting,
                  folder_clips, load_clip, load_portrait, loading, log_mel, normalise_loudness, one_line, pixels,
                  reading_weights, replacing, sounds, video_uri, whole_model, write_speech,
                  write_weights, writing)
from model import estimate_pose, load_generator, pixel_grid, unwarp, warp

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


# ---------------------------------------------------------------- the embedded judge: what it is taught on
#
# Clips of known quality, made from good ones by graded faults. Three numbers say how good a lesson is:
#
#     lip_sync         5 - 4 d         d: how far apart the mouth that is shown and the one that the sound calls for are
#     expressiveness   1 + 4 l         l: liveliness, the amplitude of mouth (.65) and of brows, eyes, head (.35)
#     motion           5 - 4 u         u: strength of the worst fault: tremble, freeze, ghost, blur, noise, ...
#
# Real clips carry no truth, so there the mouth is read by a proxy: how far the lower middle of the face has moved along
# the one direction that follows the sound most closely (mouth_axis).

MATERIAL_FRAMES = 64                                 # of a clip; lessons are windows of it, so sound can be shifted
LESSON_FRAMES = 16, 48                               # shortest and longest lesson
SHIFT = 6                                            # frames by which sound is moved at most
STIR = 0.3                                           # deviations of a mouth: less is rest
MOUTH_SHARE = 0.65                                   # of the mouth in liveliness
VERSIONS, RIVALS = 6, 4                              # ways to show a clip that generators imitate; and of a lesson
RIVALRY = 0.25                                       # weight of the loss of rivals: at 1 other aspects are unlearned
RIVAL_MOUTHS = 4.0                                   # the same of the mouths that the vision tower sees
TOWER_PAIRS, TOWER_FRAMES = 40, 1500                 # of a step of the towers: pairs of good frames, frames of sound
TOWER_STREAM = 10 ** 12                              # where the random numbers of these steps begin


@dataclass
class Material:
    """N clips of P frames to make lessons of. Mouths are in deviations of the whole set."""

    frames: Tensor                                   # (N, P, 3, S, S) uint8
    audio: Tensor                                    # (N, P, 640)
    called: Tensor                                   # (N, P) the mouth that the sound calls for
    shown: Tensor                                    # (N, P) the mouth that is seen
    lively: Tensor                                   # (N,) 0..1
    fault: Tensor                                    # (N,) 0..1
    pose: Tensor | None = None                       # (N, P, 6) of the head, and (N, P, 3, S, S) uint8 the face with
    face: Tensor | None = None                       # its pose undone; None where a clip cannot be acted anew

    def __len__(self) -> int:
        return len(self.frames)

    @classmethod
    def joined(cls, parts: Sequence["Material"]) -> "Material":
        fields = zip(*(vars(part).values() for part in parts))
        return cls(*(None if field[0] is None else torch.cat(field) for field in fields))


def mouths(clips: Sequence[Clip], frames: int) -> Tensor:
    """Return how open the mouth is, (N, F): of drawn talkers the truth, of real ones the proxy. Unit deviation."""
    if clips[0].truth:
        mouth = torch.stack([(clip.truth["opening"] * clip.truth["width"])[:frames] for clip in clips])
    else:
        boxes = mouth_boxes(clip.frames[:frames] / 255 for clip in clips)
        mouth = boxes @ mouth_axis(boxes[:200], sounds(clips[:200], frames))
    return (mouth - mouth.mean()) / mouth.std()


def course(mouth: Tensor) -> Tensor:
    """Take mean and deviation, if it is STIR or more, off a mouth (..., F)."""
    return (mouth - mouth.mean(-1, keepdim=True)) / mouth.std(-1, correction=0, keepdim=True).clamp_min(STIR)


def apart(shown: Tensor, called: Tensor) -> Tensor:
    """Return how far apart the courses of two mouths (..., F) are: 0 alike, 1 as far as unrelated ones or farther.

    It is sqrt(1 - correlation): .95 is .22 and .97 is .17 here, where a correlation would hardly tell good from very
    good. How far lips open is left to expressiveness: a generator whose lips move too little would else learn to open
    them more rather than in time. A mouth at rest, where a correlation means nothing, counts as if it moved by STIR.
    """
    return ((course(shown) - course(called)).square().mean(-1) / 2).sqrt().clamp_max(1)


def good_material(clips: Sequence[Clip], frames: int = MATERIAL_FRAMES) -> Material:
    """Take real or drawn clips of `frames` frames or more as they are, and take head and face apart."""
    clips = [clip for clip in clips if len(clip.frames) >= frames]
    if not clips:
        raise MediaError("the judge's clips", f"are all shorter than {frames / FPS:.2f} s; give longer ones")
    pictures = torch.stack([clip.frames[:frames] for clip in clips])
    pose, face = [], torch.empty_like(pictures)
    for i in tqdm(range(0, len(clips), 8), "taking faces apart", leave=False):
        part = pictures[i:i + 8] / 255
        pose.append(estimate_pose(part))
        face[i:i + 8] = to_bytes(unwarp(part.flatten(0, 1), pose[-1].flatten(0, 1)).view_as(part))
    mouth, audio = mouths(clips, frames), sounds(clips, frames).unflatten(1, (frames, -1))
    return Material(pictures, audio, mouth, mouth, torch.ones(len(clips)), torch.zeros(len(clips)),
                    torch.cat(pose), face)


def generated_material(run: str | Path, clips: Sequence[Clip], seed: int = 0) -> Material:
    """Show every clip in VERSIONS ways: four takes of a generator, its codec alone, and that with noise on the latents.

    The takes are such as GRPO compares: of one initial noise, with other draws on the way. Quality is measured against
    the true clips: mouth and head by `sample.evaluate`; the fault is log(jerk / true jerk) / log 3, which puts the
    codec alone at .2 and a generator of 150 steps at .8. Returns: Material, the versions of a clip one after the other.
    """
    from grpo import Settings, drawing_step, stochastic_steps
    from sample import evaluate, imitate, seeded_noise
    model = load_generator(run).eval()
    c = model.config
    frames = min(len(clip.frames) for clip in clips) // c.chunk_frames * c.chunk_frames
    true = pixels(clips, frames)
    with torch.no_grad():
        latents = torch.cat([model.codec.encode(part) for part in true.split(16)])
        rng = torch.Generator().manual_seed(seed)
        noise = torch.rand(len(clips), 1, 1, 1, generator=rng) * torch.randn(latents.shape, generator=rng)
        videos = [model.codec.decode(true[:, 0], z) for z in (latents, latents + 0.5 * noise)]
        for take in range(VERSIONS - 2):
            fresh = seeded_noise(seed + 1 + take, range(len(clips)), (c.video_tokens, c.channels))
            step = drawing_step(Settings(), stochastic_steps(Settings.rollout_steps), fresh)
            videos.append(imitate(model, clips, frames, Settings.rollout_steps, seed=seed, step=step))
    called, audio = mouths(clips, frames), sounds(clips, frames).unflatten(1, (frames, -1))
    measured, versions = [evaluate(video, clips, c.chunk_frames) for video in videos], []
    for video, shown, seen in zip(videos, read_mouths(videos, clips, called), measured):
        head = seen["head"] / measured[0]["head"].clamp_min(1e-6)                    # the codec's moves as the true one
        lively = MOUTH_SHARE * seen["amplitude"].clamp(0, 1) + (1 - MOUTH_SHARE) * head.clamp(0, 1)
        fault = (seen["jerk_ratio"].log() / math.log(3)).clamp(0, 1)
        versions.append((to_bytes(video), audio, called, shown, lively, fault))
    return Material(*(rearrange(list(field), "v n ... -> (n v) ...") for field in zip(*versions)))


def read_mouths(versions: Sequence[Tensor], clips: Sequence[Clip], called: Tensor) -> list[Tensor]:
    """Read the mouths of versions of clips, each (N, F, 3, S, S), on the scale of `called`, the `mouths` of the true
    clips. Returns: (N, F) of each version."""
    truths = [clip.frames[:called.shape[1]] / 255 for clip in clips]
    if clips[0].truth:
        true, *made = (torch.stack([mouth_opening_from_pixels(v, clip.truth) for v, clip in zip(videos, clips)])
                       for videos in (truths, *versions))
    else:
        boxes = mouth_boxes(truths)
        axis = mouth_axis(boxes[:200], sounds(clips[:200], called.shape[1]))
        true, *made = boxes @ axis, *(mouth_boxes(videos) @ axis for videos in versions)
    slope = ((true - true.mean()) * called).mean() / true.var()                      # pixels -> unit deviation
    return [(shown - true.mean()) * slope for shown in made]


def act(face: Tensor, pose: Tensor, mouth: float, rest: float) -> Tensor:
    """Act a clip with less or more expression: frame = warp(first + gain (face - first), rest * pose).

    The gain is `mouth` near the mouth and `rest` elsewhere. face (F, 3, S, S) in [0, 1], pose (F, 6). Returns frames.
    """
    x, y = pixel_grid(face.shape[-1]).unbind(-1)
    near = (1.6 * torch.exp(-(x ** 2 + (y - 0.47) ** 2) / (2 * 0.2 ** 2))).clamp_max(1)      # the codec's focus
    return warp(face[:1] + (rest + (mouth - rest) * near) * (face - face[:1]), rest * pose)


def blur(x: Tensor, radius: float) -> Tensor:
    """Blur (F, 3, S, S) by a Gaussian of this deviation in pixels."""
    from torchvision.transforms.functional import gaussian_blur
    return gaussian_blur(x, 2 * math.ceil(2.5 * radius) + 1, radius)


def whole(rng: torch.Generator, low: int, high: int) -> int:
    """Draw a whole number from low .. high - 1."""
    return torch.randint(low, high, (), generator=rng).item()


def uniform(rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """Draw a number from low to high."""
    return low + (high - low) * torch.rand((), generator=rng).item()


FAULTS = ("tremble", "freeze", "ghost", "blur", "noise", "flicker", "seam")


def spoil(fault: str, strength: float, x: Tensor, mouth: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Add one fault of a strength in 0..1 to a clip.

    Args: x (F, 3, S, S) in [0, 1]; mouth (F,) that is shown. Returns: both, as they are seen afterwards.
    """
    u, f, at = strength, len(x), torch.arange(len(x))
    normal = lambda *shape: torch.randn(*shape, generator=rng)
    if fault == "tremble":                           # the head jumps, each frame by itself
        pose = torch.zeros(f, 6)
        pose[:, [0, 3]], pose[:, [2, 4]] = 0.035 * u * normal(f, 2), 0.02 * u * normal(f, 1) * torch.tensor([1, -1.0])
        return warp(x, pose, "bilinear"), mouth
    if fault == "freeze":                            # up to three quarters of the frames are held
        shown = at.clone()
        for _ in range(30):
            if (shown != at).sum() < 0.75 * u * f:
                start = whole(rng, 0, f - 3)
                shown[start:start + whole(rng, 3, 9)] = shown[start].item()
        return x[shown], mouth[shown]
    if fault == "ghost":                             # an earlier frame shines through
        past, w = (at - whole(rng, 2, 8)).clamp_min(0), 0.55 * u
        return (1 - w) * x + w * x[past], (1 - w) * mouth + w * mouth[past]
    if fault == "blur":
        return blur(x, (0.25 + 2 * u) * x.shape[-1] / 64), mouth
    if fault == "noise":
        return x + 0.1 * u * normal(*x.shape), mouth
    if fault == "flicker":                           # light and tint tremble
        return x * (1 + 0.12 * u * normal(f, 1, 1, 1)) + 0.06 * u * normal(f, 3, 1, 1), mouth
    chunk = at // whole(rng, 3, 7)                   # seam: every few frames head and shading jump
    n = chunk[-1].item() + 1
    pose = torch.zeros(n, 6)
    pose[:, [0, 3]], pose[:, [1, 5]] = 0.04 * u * normal(n, 2), 0.03 * u * normal(n, 2)
    shade = nnf.interpolate(0.06 * u * normal(n, 3, 6, 6), x.shape[-2:], mode="bicubic")
    return warp(x, pose[chunk], "bilinear") + shade[chunk], mouth


@dataclass
class Lesson:
    """A batch of clips of F frames and what to say of them."""

    frames: Tensor                                   # (B, F, 3, S, S) uint8
    audio: Tensor                                    # (B, F * 640)
    quality: Tensor                                  # (B, 3) ratings, 1..5
    shown: Tensor                                    # (B, F) mouth, as in Material
    called: Tensor                                   # (B, F)
    faults: Tensor                                   # (B, 7) strength of each of FAULTS, nan where it is not known
    rivals: int                                      # how many, the last ones, are groups of RIVALS


def lesson_sound(material: Material, other: Material, row: int, start: int, frames: int,
                 rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose the sound of a window: mostly its own, or early or late, or mixed with another's, or another's.

    Returns: sound (F * 640,), and the mouth that it calls for (F,).
    """
    kind = uniform(rng)
    move = whole(rng, 1, SHIFT + 1) * (1 if uniform(rng) < 0.5 else -1) if 0.35 < kind < 0.8 else 0
    at = max(0, min(start + move, material.frames.shape[1] - frames))
    sound, called = material.audio[row, at:at + frames].flatten(), material.called[row, at:at + frames]
    if kind >= 0.8:
        w = uniform(rng, 0.2, 0.8) if kind < 0.92 else 1.0
        j, k = whole(rng, 0, len(other)), whole(rng, 0, other.frames.shape[1] - frames + 1)
        sound = normalise_loudness((1 - w) * sound + w * other.audio[j, k:k + frames].flatten())
        called = (1 - w) * called + w * other.called[j, k:k + frames]
    return sound, called


def lesson(material: Material, other: Material, row: int, frames: int, rng: torch.Generator) -> tuple:
    """Make one clip of known quality: which window, how lively, which sound, which fault. `other` lends its voices."""
    start = whole(rng, 0, material.frames.shape[1] - frames + 1)
    window = slice(start, start + frames)
    x, shown = material.frames[row, window] / 255, material.shown[row, window]
    lively, fault = material.lively[row].item(), material.fault[row].item()
    if material.face is not None and uniform(rng) < 0.6:         # act it, with less or more expression
        mouth, rest = uniform(rng, 0, 1.25), uniform(rng, 0, 1.25)
        x = act(material.face[row, window] / 255, material.pose[row, window], mouth, rest)
        shown = shown[0] + mouth * (shown - shown[0])
        lively = MOUTH_SHARE * min(mouth, 1) + (1 - MOUTH_SHARE) * min(rest, 1)
    if uniform(rng) < 0.1:                           # splice: for a while the mouth does what it did at another time
        length = whole(rng, frames // 5, frames // 2)
        at, source = whole(rng, 0, frames - length), whole(rng, 0, frames - length)
        order = torch.arange(frames)
        order[at:at + length] = torch.arange(source, source + length)
        x, shown, fault = x[order], shown[order], max(fault, 0.15)
    sound, called = lesson_sound(material, other, row, start, frames, rng)
    faults = torch.full((len(FAULTS),), 0.0 if material.face is not None else math.nan)
    if fault < 0.3 and uniform(rng) < 0.65:
        kind, strength, amplitude = whole(rng, 0, len(FAULTS)), uniform(rng), shown.std().clamp_min(1e-3)
        x, shown = spoil(FAULTS[kind], strength, x, shown, rng)
        lively = lively * (1 - MOUTH_SHARE + MOUTH_SHARE * (shown.std() / amplitude).clamp_max(1).item())
        fault, faults[kind] = max(fault, strength), strength
    quality = 1 + 4 * torch.tensor([1 - apart(shown, called), lively, 1 - fault]).clamp(0, 1)
    return to_bytes(x), sound, quality, shown, called, faults


@torch.no_grad()
def lessons(good: Material, generated: Material | None, batch: int, seed: int, frames: int | None = None,
            rows: Sequence[int] | None = None) -> Lesson:
    """Draw a batch, all of one length: of good clips, or of the given rows of them, and, last, three eighths of rivals.

    Rivals are RIVALS versions of one clip, with one window, sound and fault: they differ in what was generated, as
    those differ that GRPO compares. A seed gives the same lessons always.
    """
    rng = torch.Generator().manual_seed(seed)
    frames = frames or 2 * whole(rng, LESSON_FRAMES[0] // 2, LESSON_FRAMES[1] // 2 + 1)
    rivals = 0 if generated is None else batch * 3 // 8 // RIVALS * RIVALS
    made = [lesson(good, good, whole(rng, 0, len(good)) if rows is None else rows[i], frames, rng)
            for i in range(batch - rivals)]
    while len(made) < batch:
        clip, twist = whole(rng, 0, len(generated) // VERSIONS), whole(rng, 0, 2 ** 31)
        for version in torch.randperm(VERSIONS, generator=rng)[:RIVALS].tolist():
            same = torch.Generator().manual_seed(twist)
            made.append(lesson(generated, good, clip * VERSIONS + version, frames, same))
    return Lesson(*(torch.stack(field) for field in zip(*made)), rivals)


# ---------------------------------------------------------------- the embedded judge: what it is, and how it learns
#
# A thinker of the Qwen2.5-Omni architecture, as small as it can be: the same classes, files and code path as a judge of
# 3 or 30 billion parameters, from scratch, on a laptop.

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


def tiny_processor(rubric: dict = TINY_RUBRIC):
    """Build a processor: a byte-level tokenizer whose merges are the rubric's words, 64x64 pixels, 64 mel bands."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    texts = [prompt(aspect, order, rubric) for aspect, order in product(ASPECTS, (False, True))]
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
    thrown away after training, but for those of the mouth in the two towers (Judge.read_out_by).
    """

    def __init__(self, judge: Judge):
        super().__init__()
        w, self.towers, self.seen, model = TINY_WIDTH, judge.towers, {}, judge.model
        self.tokens = model.config.video_token_id, model.config.audio_token_id
        self.sight, self.look, self.sound, self.both, self.gap = (
            nn.Linear(*n) for n in ((4 * w, 2), (4 * w, 2), (w, 2), (w, 2), (w, 1)))
        self.faults, self.faults_again = nn.Linear(8 * w, len(FAULTS)), nn.Linear(2 * w, len(FAULTS))
        for readout in self.children():                          # at zero they ask nothing yet: a judge that is
            nn.init.zeros_(readout.weight)                       # taught on is not upset by random questions
        if judge.readouts:
            self.load_state_dict(judge.readouts, strict=False)
        self.hooks = [model.register_forward_pre_hook(self.keep_ids, with_kwargs=True)] + [
            model.model.layers[i].register_forward_hook(self.keep(name)) for i, name in ((1, "second"), (2, "third"))]

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
    error = hints.sight(judge.towers["sight"].view(len(at), -1)) - shown
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
    heard = hints.sound(judge.towers["sound"].view(len(rows), frames, -1))[..., 0]
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

    def mouths_alone(step):
        rng = torch.Generator().manual_seed(TOWER_STREAM + seed * 1_000_003 + step)
        return {"seen": seen_loss(judge, hints, good, generated, rng), "heard": heard_loss(judge, hints, good, rng)}

    def whole_lessons(step):
        truth = lessons(good, generated, batch, seed * 1_000_003 + step)
        judge.orders = (step % 2 == 1,)                                              # learns both orders of the scale
        logits = judge.logits(truth.frames, truth.audio)
        losses = {"ratings": rating_loss(logits, judge.digits, truth), "hints": hints.loss(truth)}
        return losses | (mouths_alone(step) if tower_steps else {})
    descend(model, hints, tower_steps, mouths_alone, "teaching the towers", lr, muon_lr)
    descend(model, hints, steps, whole_lessons, "teaching the judge", lr, muon_lr)
    judge.orders = (False,)
    for hook in hints.hooks:
        hook.remove()
    judge.read_out_by({k: v.detach().clone() for k, v in hints.state_dict().items() if k[:5] in ("sight", "sound")})
    model.eval().requires_grad_(False)


def save_judge(judge: Judge, folder: Path, card: str) -> None:
    """Write the judge as transformers does; beside it readouts, judge.json (rubric, pixels, window, dtype: what counts
    are differences that bf16 would round away) and the card."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "readouts.safetensors").unlink(missing_ok=True)        # of an earlier judge there
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        judge.model.half().save_pretrained(temporary)
        judge.model.float()
        judge.processor.save_pretrained(temporary)
        if judge.readouts:
            save_file({k: v.half().cpu() for k, v in judge.readouts.items()}, Path(temporary, "readouts.safetensors"))
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


# ---------------------------------------------------------------- agreement with people

MIN_RATED = 5                                        # videos below which a calibration would fit noise


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


def read_ratings(path: str | Path) -> list[tuple[str, str, list[float]]]:
    """Read a CSV with the columns video, aspect, rating (1..5), one line for each rater and aspect of a video.

    Returns: (video, aspect, ratings) in order of first appearance. Raises: MediaError naming the file and the line.
    """
    rows: dict[tuple[str, str], list[float]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:                   # Excel writes a byte order mark
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if missing := [name for name in ("video", "aspect", "rating") if name not in columns]:
                raise MediaError(path, f"line 1 lacks {', '.join(missing)}; begin it with video,aspect,rating")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                video, aspect, rating = ((row[name] or "").strip() for name in ("video", "aspect", "rating"))
                if not video or aspect not in ASPECTS:
                    raise MediaError(where, f"{video=} {aspect=}; name a video and one of {', '.join(ASPECTS)}")
                with suppress(ValueError):
                    if 1 <= float(rating) <= 5:
                        rows.setdefault((video, aspect), []).append(float(rating))
                        continue
                raise MediaError(where, f"{rating=} is not a rating; write a number from 1 to 5")
    except OSError as error:
        raise MediaError(path, f"cannot be read ({error.strerror}); name a CSV of ratings") from None
    except (UnicodeDecodeError, csv.Error):
        raise MediaError(path, "is not text; save it as CSV in UTF-8") from None
    if not rows:
        raise MediaError(path, "holds no ratings; write one a line: video,aspect,rating")
    return [(video, aspect, ratings) for (video, aspect), ratings in rows.items()]


def _array(x) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    scale = math.sqrt(np.vdot(a, a) * np.vdot(b, b))
    return float(np.vdot(a, b) / scale) if scale > 0 else math.nan


def _order(x) -> np.ndarray:
    """Return (n, n) in {-1, 0, 1}, or nan: how item i compares with item j."""
    x = _array(x).astype(float)
    return np.sign(x[:, None] - x)


def ranks(x) -> np.ndarray:
    """Return the ranks 1..n of (n,) values; equal values share the mean of their ranks."""
    _, place, count = np.unique(_array(x), return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def spearman(a, b) -> float:
    """Pearson's correlation of the ranks of (n,) values, in -1..1; nan for constant values or fewer than two."""
    if np.isnan(_array(a)).any() or np.isnan(_array(b)).any():
        return math.nan
    return _cosine(*(r - (len(r) + 1) / 2 for r in (ranks(a), ranks(b))))


def kendall(a, b) -> float:
    """Kendall's tau-b: pairs ranked alike minus pairs ranked apart, over sqrt(pairs not tied in a * not tied in b)."""
    return _cosine(_order(a), _order(b))


def pairwise_accuracy(a, b, groups=None, least: float = 0.0) -> float:
    """Share of the pairs that differ in the truth `b`, by `least` or more, that `a` ranks alike; a tie is half right.

    Args:    a, b (n,); groups (n,): only pairs inside a group count, as in GRPO. Returns: 0..1, nan without a pair.
    """
    order, truth = _order(b), _array(b)
    counts = (order != 0) & (np.abs(truth[:, None] - truth) >= least)
    if groups is not None:
        counts &= _array(groups)[:, None] == _array(groups)
    return float(((1 + _order(a) * order) / 2)[counts].mean()) if counts.any() else math.nan


def bootstrap(statistic: Callable, *arrays, n: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Return statistic(*arrays) and its 95 % percentile interval over n resamplings of the items, nan ones left out."""
    arrays, rng = [_array(x) for x in arrays], np.random.default_rng(seed)
    items = len(arrays[0])
    draws = [statistic(*(x[chosen] for x in arrays)) for chosen in rng.integers(0, items, (n, items))] if items else []
    draws = [value for value in draws if not math.isnan(value)]
    low, high = np.percentile(draws, [2.5, 97.5]) if draws else (math.nan, math.nan)
    return statistic(*arrays), float(low), float(high)


def rater_ceiling(ratings: Sequence[Sequence[float]], n: int = 200, seed: int = 0) -> float:
    """Measure how well people agree with people: Spearman between the means of two random halves of the raters.

    Raters are anonymous, so every video's ratings are split by themselves, n times; the mean is returned. Half of the
    raters are noisier than all: a judge compared with the mean of all may come out above it. Videos with one rating
    say nothing; nan when fewer than two videos have more.
    """
    ratings, rng = [np.array(r, float) for r in ratings if len(r) > 1], np.random.default_rng(seed)
    split = lambda r: (r[: len(r) // 2].mean(), r[len(r) // 2 :].mean())
    trials = [spearman(*zip(*(split(rng.permutation(r)) for r in ratings))) for _ in range(n if ratings else 0)]
    trials = [value for value in trials if not math.isnan(value)]
    return float(np.mean(trials)) if trials else math.nan


def isotonic(x, y) -> tuple[np.ndarray, np.ndarray]:
    """Fit the non-decreasing function with the least squared error, by pooling adjacent violators.

    Neighbours in the wrong order become one block with their mean, until none are left (Ayer et al. 1955).

    Args:    x, y (n,). Returns: the blocks' mean x and mean y (K,), both strictly increasing.
    """
    x, y = _array(x).astype(float), _array(y).astype(float)
    mean = lambda block: block[1:] / block[0]
    blocks = []                                      # sums of (1, x, y)
    for value in np.unique(x):                       # equal x must get equal y
        blocks.append(np.array([(x == value).sum(), x[x == value].sum(), y[x == value].sum()]))
        while len(blocks) > 1 and mean(blocks[-2])[1] >= mean(blocks[-1])[1]:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return tuple(np.stack([mean(block) for block in blocks], 1))


def calibrate(scores, knots: tuple[Sequence[float], Sequence[float]]):
    """Map scores of any shape to people's scale, linearly between the knots, which are the centres of blocks.

    The fit itself is a staircase: inside a block two videos would earn the same reward and GRPO would learn nothing.
    Between centres every improvement counts; beyond the outermost, where nobody rated, the scale ends.

    Returns: a Tensor like `scores` if that is one, else an array.
    """
    value = np.interp(_array(scores), *knots)
    return torch.as_tensor(value, dtype=scores.dtype, device=scores.device) if isinstance(scores, Tensor) else value


def save_calibration(path: str | Path, calibration: dict) -> None:
    """Write {aspect: (knots_x, knots_y)} as JSON."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps({aspect: [list(map(float, k)) for k in knots]
                                         for aspect, knots in calibration.items()}, indent=1) + "\n")


def load_calibration(path: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read what save_calibration wrote. Raises: MediaError if it is anything else."""
    def increasing(knots):
        knots = np.array(knots, float)
        return knots.ndim == 2 and len(knots) == 2 and knots.size and np.isfinite(knots).all() and \
            (np.diff(knots) > 0).all()
    read = read_json(Path(path), "a calibration that --align wrote",
                     lambda c: c and set(c) <= set(ASPECTS) and all(map(increasing, c.values())))
    return {aspect: tuple(np.array(knots, float)) for aspect, knots in read.items()}


def align(judge_scores: dict[tuple[str, str], float], rows: list[tuple[str, str, list[float]]],
          out: Path | None = None) -> str:
    """Compare the judge with the mean of the raters, aspect by aspect, and save monotone calibrations to `out`.

    Args:    judge_scores {(video, aspect): score}; rows as read_ratings gives. Returns: the table, to be printed.
    """
    lines = [f"{'aspect':15}{'videos':>7}{'ratings':>9}   {'Spearman':22}{'Kendall':22}{'pairs ranked alike':22}raters"]
    notes, calibration = [], {}
    for aspect in ASPECTS:
        rated = {video: ratings for video, name, ratings in rows if name == aspect}
        if missing := [video for video in rated if (video, aspect) not in judge_scores]:
            raise MediaError(missing[0], f"people rated its {aspect}, the judge did not; score it or drop the rating")
        judge, people = [judge_scores[video, aspect] for video in rated], [np.mean(r) for r in rated.values()]
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(f, judge, people))
                 for f in (spearman, kendall, pairwise_accuracy)]
        lines.append(f"{aspect:15}{len(rated):7}{sum(map(len, rated.values())):9}   "
                     f"{''.join(f'{cell:22}' for cell in cells)}{rater_ceiling(list(rated.values())):.2f}")
        knots = isotonic(judge, people) if len(rated) >= MIN_RATED else ()
        if knots and len(knots[0]) > 1:
            calibration[aspect] = knots
        else:                                        # a single block would give every video the same reward
            notes.append(f"{aspect}: no calibration; " + ("the judge does not rise with people's ratings" if knots else
                                                          f"{len(rated)} videos rated, {MIN_RATED} needed"))
    if out and calibration:
        save_calibration(out, calibration)
        notes.append(f"calibration of {', '.join(calibration)} saved to {out}")
    return "\n".join(lines + notes)


# ---------------------------------------------------------------- what people prefer: votes on pairs of videos

CHOICES = ("left", "right", "tie")                   # of a rater, for each of ASPECTS and "overall"


def rate_whole(judge, frames: Tensor, audio: Tensor, names: Sequence[str]) -> Tensor:
    """Rate clips (B, F, 3, S, S) in [0, 1] with sound (B, F * 640), long ones in spans. Returns: (B, 3)."""
    return Reward(judge, None).rate(frames, audio, names)[0]


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(at most k successes in n trials), 0 < p < 1."""
    choose = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    return math.fsum(math.exp(c + i * math.log(p) + (n - i) * math.log1p(-p)) for i, c in enumerate(choose))


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a probability after k successes in n independent trials (Clopper, Pearson 1934):
    the p under which so many, or so few, are as unlikely as (1 - level) / 2."""
    def solve(k, target):
        low, high = 0.0, 1.0
        for _ in range(60):                          # the CDF falls with p
            p = (low + high) / 2
            low, high = (p, high) if binomial_cdf(k, n, p) > target else (low, p)
        return low
    tail = (1 - level) / 2
    return (solve(k - 1, 1 - tail) if k else 0.0), (solve(k, tail) if k < n else 1.0)


def share(k: int, n: int) -> str:
    """Write k of n with its exact 95 % interval."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(k / n, *clopper_pearson(k, n)) if n else "no vote"


def tally(paths: Sequence[Path], key_path: Path) -> str:
    """Count the votes of a study, aspect by aspect, and compare them with the judge's ratings if the key has any.

    Intervals take every vote as independent: those of one rater, or on one pair, are not quite.
    Returns: the table. Raises: MediaError for bad files, unknown pairs, another study's votes, a rater counted twice.
    """
    key = read_json(key_path, "the key of a study", lambda k: {k["study"], k["a"], k["b"]} and all(
        {pair["left"], pair["right"]} == {"a", "b"} for pair in k["pairs"].values()))
    raters, votes = {}, []                           # votes: (aspect, "a", "b" or "tie", the judge's choice or None)
    for path in paths:
        read = read_json(path, "a file of votes", lambda v: {v["study"], v["rater"]} and all(
            a in (*ASPECTS, "overall") and c in CHOICES for pair in v["votes"].values() for a, c in pair.items()))
        if read["study"] != key["study"]:
            raise MediaError(path, f"holds votes of study {read['study']}; the key is of {key['study']}")
        if read["rater"] in raters:
            raise MediaError(path, f"is of the same rater as {raters[read['rater']]}; leave one out")
        raters[read["rater"]] = path
        if unknown := sorted(read["votes"].keys() - key["pairs"].keys()):
            raise MediaError(path, f"votes on the unknown pair {unknown[0]}; the key has {len(key['pairs'])} pairs")
        for name, choices in read["votes"].items():
            pair = key["pairs"][name]
            rated = {a: dict(zip(ASPECTS, scores)) for a, scores in pair.get("judge", {}).items()}
            for aspect, choice in choices.items():
                a, b = (rated.get(run, {}).get(aspect) for run in "ab")
                votes.append((aspect, pair.get(choice, "tie"), None if a is None or a == b else "a" if a > b else "b"))
    lines = [f"{len(raters)} raters, {len(key['pairs'])} pairs; a: {key['a']}, b: {key['b']}; exact 95% intervals",
             f"{'':15}{'a':>5}{'b':>5}{'no difference':>15}   {'a wins of a + b':24}the judge chooses alike"]
    for aspect in (*ASPECTS, "overall"):
        cast = [(choice, judged) for name, choice, judged in votes if name == aspect]
        a, b, ties = (sum(choice == name for choice, _ in cast) for name in ("a", "b", "tie"))
        both = [choice == judged for choice, judged in cast if choice != "tie" and judged]
        alike = f"{share(sum(both), len(both))} of {len(both)}" if both else "-"
        lines.append(f"{aspect:15}{a:5}{b:5}{ties:15}   {share(a, a + b):24}{alike}")
    return "\n".join(lines)


# ---------------------------------------------------------------- held-out metrics
#
# From here on stands what no reward may use: `Reward` calls nothing below, so that what it has trained can be measured
# by it. (The embedded judge's lessons are labelled by the truth; the judge itself sees a clip and nothing else.) First,
# what needs the truth of drawn talkers.

def mouth_palette(truth: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """List the colours a pixel near the mouth can have: mixtures of two neighbours among skin, lips and what is inside.

    Returns: colours (K, 3) in 0..1; inside (K,), the part of such a pixel that is open mouth.
    """
    skin, lip, interior, teeth = (truth[k] for k in ("skin", "lip", "interior", "teeth"))
    tint = lambda colour, *shades: torch.stack([colour * torch.tensor(s) for s in shades])
    skins = torch.cat([tint(skin, 0.5, 0.65, 0.8, 0.9, 1.0, (0.70, 0.56, 0.53), (0.82, 0.74, 0.72), (0.48, 0.36, 0.33),
                            (0.97, 0.80, 0.78)), 0.75 * skin[None] + 0.22])
    lips = torch.cat([tint(lip, 1.0, (0.76, 0.70, 0.70), (0.88, 0.85, 0.85), (0.55, 0.45, 0.45)),
                      0.7 * lip[None] + 0.3])
    tongue = 0.6 * interior + 0.4 * torch.tensor([0.70, 0.26, 0.36])
    opens = torch.stack([interior, teeth, 0.85 * teeth, (interior + teeth) / 2, tongue])
    part = torch.linspace(0, 1, 5)
    mix = lambda a, b: (a[:, None, None] + part[:, None] * (b - a[:, None])[:, :, None]).reshape(-1, 3)
    kinds = [mix(skins, lips), mix(lips, opens), mix(opens, opens)]
    inside = [torch.zeros(len(kinds[0])), part.repeat(len(lips) * len(opens)), torch.ones(len(kinds[2]))]
    return torch.cat(kinds), torch.cat(inside)


def mouth_opening_from_pixels(frames: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """Measure the open area of the mouth, in fractions of the frame; it grows as opening * width.

    A quadratic in (r, g, b), fitted to the palette's mixtures, says how much of a pixel is open mouth; a colour far
    from every mixture (wall, hair, clothes) counts for nothing; the mouth is the mouth-sized window that holds most,
    wherever in the box the head has taken it.

    Args: frames (F, 3, S, S) uint8, or float in 0..1; truth of the clip: only its colours and mouth_box are read.
    Returns: area (F,) float32.
    """
    size = frames.shape[-1]
    colours, inside = mouth_palette(truth)
    pairs = torch.triu_indices(3, 3)
    features = lambda c: torch.cat([torch.ones_like(c[:, :1]), c, c[:, pairs[0]] * c[:, pairs[1]]], 1)  # (N, 10)
    count = torch.bincount((inside * 4).long()).float()[(inside * 4).long()]   # each degree weighs the same
    design, weight = features(colours).double(), count.rsqrt().double()
    fit = torch.linalg.lstsq(design * weight[:, None], inside.double()[:, None] * weight[:, None]).solution.float()
    x0, y0, x1, y1 = (truth["mouth_box"] * size).round().long().clamp(0, size).tolist()
    window = min(round(0.12 * size), y1 - y0), min(round(0.25 * size), x1 - x0)
    areas = []
    for part in frames[:, :, y0:y1, x0:x1].split(64):
        seen = part.movedim(1, 3).reshape(-1, 3).float() / (255 if frames.dtype == torch.uint8 else 1)
        known = torch.exp(-(torch.cdist(seen, colours).amin(1) / 0.1) ** 2)
        coverage = (features(seen) @ fit)[:, 0].clamp(0, 1.2) * known
        coverage = coverage.view(-1, 1, y1 - y0, x1 - x0)
        areas.append(nnf.avg_pool2d(coverage, window, 1).amax((1, 2, 3)) * window[0] * window[1] / size**2)
    return torch.cat(areas)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of two signals (F,); 0 when either never moves."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = a.norm() * b.norm()
    return torch.where(scale > 1e-9, (a * b).sum() / scale.clamp(min=1e-9), 0.0).nan_to_num().float()


def lip_sync_correlation(frames: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """Correlate the measured open area with the true one. Returns: scalar in -1..1, 0 for a frozen mouth."""
    return correlation(mouth_opening_from_pixels(frames, truth), truth["opening"] * truth["width"])


# ---------------------------------------------------------------- metrics that need the truth: any clip

def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of two pictures or videos of any equal shape, in [0, 1]."""
    return -10 * torch.log10((a - b).square().mean().clamp_min(1e-10))


def motion(frames: Tensor) -> Tensor:
    """Return the mean absolute change from one frame to the next, in grey levels of 1. frames float in [0, 1]."""
    return frames.diff(dim=0).abs().mean()


def head_motion(pose: Tensor) -> Tensor:
    """Return how far a head wanders: the deviation of its measured shift, poses (F, 6) as model.estimate_pose gives."""
    return pose[:, [0, 3]].std(0).norm()


def mouth_box(face: Tensor) -> Tensor:
    """Return (F, P), the grey lower middle of a face whose head is held still, minus that of the first frame: there a
    real mouth moves. face (F, 3, S, S), as model.unwarp gives."""
    size = face.shape[-1]
    top, bottom, left, right = (round(share * size) for share in (0.60, 0.95, 0.30, 0.70))
    box = face[:, :, top:bottom, left:right].mean(1).flatten(1)
    return box - box[:1]


def mouth_boxes(videos: Iterable[Tensor]) -> Tensor:
    """Hold the heads of videos (F, 3, S, S) in [0, 1] still and return their mouth boxes, (N, F, P)."""
    return torch.stack([mouth_box(unwarp(video, estimate_pose(video[None])[0])) for video in videos])


def mouth_axis(boxes: Tensor, audio: Tensor, components: int = 16, bands: int = 4, ridge: float = 0.01) -> Tensor:
    """Find the direction in which the mouth boxes of real clips follow the sound most closely.

    Real clips carry no truth, so how far a mouth is open is read as the position along this one axis, which is fitted
    to true clips alone: the first canonical correlate (Hotelling 1936) of the boxes' principal components and the
    log-mel around each frame in a few bands. (The first principal component itself may be light or a turning head.)

    Args:    boxes (N, F, P) of true clips; audio (N, F * 640); ridge: added to unit variances.
    Returns: (P,); a mouth's position along it is larger where sound is louder.
    """
    box = boxes.flatten(0, 1).double()
    box = box - box.mean(0)
    axes = torch.linalg.eigh(box.T @ box).eigenvectors[:, -components:]
    axes = axes / (box @ axes).std(0).clamp_min(1e-6)
    mel = log_mel(audio, boxes.shape[1]).double().flatten(0, 1)
    mel = mel.unflatten(1, (MEL_DIM // MELS, bands, -1)).mean(-1).flatten(1)         # (N F, instants * bands)
    mel = (mel - mel.mean(0)) / mel.std(0).clamp_min(1e-6)
    moves = box @ axes

    def covariance(x, y):
        return x.T @ y / len(x) + (ridge * torch.eye(x.shape[1], dtype=x.dtype) if x is y else 0)
    heard = covariance(moves, mel) @ torch.linalg.solve(covariance(mel, mel), covariance(mel, moves))
    found = torch.linalg.eig(torch.linalg.solve(covariance(moves, moves), heard))
    axis = axes @ found.eigenvectors[:, found.eigenvalues.real.argmax()].real
    return (axis * correlation(box @ axis, mel.sum(1)).sign()).float()


def quicken(signal: Tensor, frames: int = 25) -> Tensor:
    """Subtract from signals (N, F) their running mean over a second: what is left is lips, not where a sentence begins
    and ends, in which any two videos agree."""
    ones = torch.ones_like(signal)
    mean = nnf.avg_pool1d(signal, frames, 1, frames // 2) / nnf.avg_pool1d(ones, frames, 1, frames // 2)
    return signal - mean


def shifted_correlation(made: Tensor, true: Tensor, shift: int = 0) -> Tensor:
    """Correlate two signals (F,), `made` at frame f + shift with `true` at frame f, over the frames that both have."""
    n = len(true) - abs(shift)
    made, true = (made[shift:], true[:n]) if shift >= 0 else (made[:n], true[-shift:])
    return correlation(made, true)


def sync_offset(made: Tensor, true: Tensor, most: int = 8) -> Tensor:
    """Return by how many frames `made` (F,) comes after `true` (F,): the shift at which they correlate best."""
    tried = torch.stack([shifted_correlation(made, true, shift) for shift in range(-most, most + 1)])
    return (tried.argmax() - most).float()


# ---------------------------------------------------------------- metrics that need no truth

def still_psnr(frames: Tensor, portrait: Tensor) -> Tensor:
    """Compare the background with the portrait's, in dB: the outer eighth at either side of the upper half.

    Args: frames (F, 3, S, S), portrait (3, S, S), float in [0, 1].
    """
    size = frames.shape[-1]
    sides = torch.cat([torch.arange(size // 8), torch.arange(size - size // 8, size)])
    return psnr(frames[:, :, : size // 2, sides], portrait[None, :, : size // 2, sides])


def jerk(frames: Tensor) -> Tensor:
    """Return the mean absolute third difference in time, in grey levels of 1: trembling, flicker and jumps."""
    return frames.diff(n=3, dim=0).abs().mean()


def seam(frames: Tensor, chunk_frames: int) -> Tensor:
    """Return the mean change across chunk borders divided by that inside chunks; 1 is no seam."""
    change = frames.diff(dim=0).abs().mean((1, 2, 3))                                # (F - 1,)
    border = torch.arange(1, len(frames)) % chunk_frames == 0
    return change[border].mean() / change[~border].mean().clamp_min(1e-8)


# ---------------------------------------------------------------- held-out metrics: the other sync network
#
# The metrics follow SyncNet's definitions, but the network is our own and small: they are *not* the LSE-D and LSE-C of
# the literature, nor comparable with them, nor comparable between two networks trained on different clips.

def offset_curve(visual: Tensor, sound: Tensor) -> Tensor:
    """Try the sound early and late: D_k = mean_i |v_i - a_(i+k)|, k in -15..15, over the windows i that both have
    (SyncNet's code pads with zeros instead). Args: (B, W, D) each, W > 15. Returns: (B, 31)."""
    n = visual.shape[1]
    if visual.shape != sound.shape or n <= SYNC_SHIFTS:
        raise ValueError(f"want picture and sound of one length, {SYNC_FRAMES + SYNC_SHIFTS} frames or more, "
                         f"got {tuple(visual.shape)} and {tuple(sound.shape)} windows")
    return torch.stack([(visual[:, max(0, -k) : n - max(0, k)] - sound[:, max(0, k) : n - max(0, -k)])
                        .norm(dim=-1).mean(1) for k in range(-SYNC_SHIFTS, SYNC_SHIFTS + 1)], 1)


@torch.no_grad()
def sync_metrics(net: SyncNetwork, frames: Tensor, audio: Tensor) -> dict[str, Tensor]:
    """Measure how well lips and sound go together, in SyncNet's definitions but by a network of our own (see above).

    Args:    frames (B, F, 3, S, S) float in [0, 1], audio (B, F * 640), F >= 20.
    Returns: {name: (B,)}: sync_distance = min_k D_k, in 0..2, low is good; sync_confidence = median_k D_k - min_k D_k,
             high is good; sync_offset = -argmin_k D_k, the frames by which the picture comes after its sound, 0 is
             good; sync_own = D_0, the distance as the clip plays, which no lucky shift can lower.

    An offset means nothing where confidence is low: a frozen GRID mouth has offset 0, as its silences match. Compare
    clips of one length, as fewer windows make a deeper minimum.
    """
    curve = offset_curve(net.visual(frames), net.sound(audio))
    least, best = curve.min(1)
    return {"sync_distance": least, "sync_confidence": curve.median(1).values - least,
            "sync_offset": (SYNC_SHIFTS - best).float(), "sync_own": curve[:, SYNC_SHIFTS]}


@torch.no_grad()
def identity_cosine(net: SyncNetwork, frames: Tensor, portrait: Tensor) -> Tensor:
    """Compare who is seen in each frame with who is on the portrait.

    The encoder knows no people but those it was trained on: where all clips are of one talker, it can only tell
    pictures of his apart. A frozen portrait scores 1.

    Args: frames (B, F, 3, S, S), portrait (B, 3, S, S), float in [0, 1]. Returns: cosines (B, F).
    """
    return (net.identity(frames) * net.identity(portrait)[:, None]).sum(-1)


def frechet(a: Tensor, b: Tensor) -> Tensor:
    """Return the Frechet distance between Gaussians fitted to two sets of features (Dowson & Landau 1982; FID's):

        |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a^1/2 cov_b cov_a^1/2)^1/2)

    Used on `net.visual(frames).flatten(0, 1)`, so it compares mouths in motion. Few samples make it too large, the more
    so as neighbouring windows overlap: compare sets of one size only, of many more windows than dimensions.

    Args: a (N, D), b (M, D), N and M >= 2. Returns: float64 scalar, at least 0 but for rounding.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"want two sets of features (2 or more, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


# ---------------------------------------------------------------- command line

JUDGE_CLIPS, SYNC_CLIPS = 1500, 1000                 # drawn talkers to teach on
GENERATED_CLIPS = 160                                # clips that each generator imitates for the judge
HELD_OUT_SEED = 2_000_000                            # drawn talkers for exams: other people, other speech
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
              f"python reward.py --train-judge --data {args.data}", file=sys.stderr)
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


def score_videos(args: argparse.Namespace) -> None:
    """Score videos one by one: the components and the total, and, apart, what no reward uses."""
    clips, broken = [], []
    for path in args.video:
        try:
            clips.append(load_clip(path, args.size, args.crop))
        except MediaError as error:
            broken.append(str(error))
    if broken and not clips:
        raise MediaError("; ".join(broken))
    from extras.talkers import synthetic_clips
    real = folder_clips(args.data, args.size, 3.0, args.crop)[0] if args.data else synthetic_clips(64, args.size, 2.0)
    reward, sync = make_reward(args, real, args.chunk_frames), load_sync(args.sync)
    for clip in clips:
        portrait = load_portrait(args.portrait, args.size) if args.portrait else clip.frames[0]
        frames, portrait = clip.frames[None] / 255, portrait[None] / 255
        print(f"{clip.name}: {frames.shape[1]} frames\n" + table(reward, {"": reward(
            frames, clip.audio[None], portrait, [clip.name])}))
        held_out = {k: v.item() for k, v in sync_metrics(sync, frames, clip.audio[None]).items()}
        held_out["identity"] = identity_cosine(sync, frames, portrait).mean().item()
        print("held out, no part of the reward:  " + "  ".join(f"{k} {v:.3f}" for k, v in held_out.items()))
    if broken:
        raise MediaError(f"{len(broken)} of {len(args.video)} videos could not be scored", "; ".join(broken))


def clips_for(args: argparse.Namespace, count: int) -> tuple[Sequence[Clip], Sequence[Clip]]:
    """Return clips to learn from, and held-out ones, at the embedded judge's size."""
    if args.data:
        return folder_clips(args.data, TINY_SIDE, 3.0, args.crop)
    from extras.talkers import synthetic_clips
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
    start, out = time.process_time(), args.out or Path("runs/judge")
    clips, held_out = clips_for(args, JUDGE_CLIPS)
    good, parts = good_material(clips), []
    for i, run in enumerate(args.generator):
        parts.append(generated_material(run, clips[i::max(1, len(clips) // GENERATED_CLIPS)], args.seed))
    generated = Material.joined(parts) if parts else None
    print(f"lessons are made of {len(good)} clips and {len(generated) if parts else 0} generated ones; "
          f"ready after {(time.process_time() - start) / 60:.1f} CPU-minutes")
    judge = Judge.load(args.from_judge) if args.from_judge else tiny_judge(args.seed)
    teach(judge, good, generated, args.steps or 1000, args.tower_steps, seed=args.seed)
    minutes = (time.process_time() - start) / 60
    lines = ["| aspect | Spearman | pairs of one clip ranked right |", "|---|---|---|"]
    for aspect, cells in exam(judge, good_material(held_out), 64).items():
        lines.append(f"| {aspect} | " + " | ".join("{:.3f} ({:.3f} to {:.3f})".format(*cell) for cell in cells) + " |")
    data = f"{len(good)} clips of {args.data}" if args.data else f"{len(good)} drawn talkers"
    data += f", and {len(generated)} clips made by early generators" if parts else ""
    given = {"from-judge": args.from_judge, "data": args.data, "steps": args.steps, "tower-steps": args.tower_steps,
             "generator": " ".join(args.generator), "seed": args.seed}
    command = "python reward.py --train-judge" + "".join(f" --{k} {v}" for k, v in given.items() if v)
    save_judge(judge, out, CARD.format(
        parameters=sum(p.numel() for p in judge.model.parameters()) / 1e6, data=data, command=command, minutes=minutes,
        agreement="\n".join(lines)))
    print("\n".join(lines) + f"\n{out}: the judge and its card, {minutes:.1f} CPU-minutes; "
          f"to use it: --judge {out}")


def train_sync_network(args: argparse.Namespace) -> None:
    """Train the sync network and say how well it finds the offset of held-out clips."""
    start, out = time.process_time(), args.out or Path("runs/sync")
    clips, held_out = clips_for(args, SYNC_CLIPS)
    net = train_sync(clips, args.seed, args.steps or 400)
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
    judge, (_, held_out) = make_judge(args), clips_for(args, 1)
    if judge is None:
        raise MediaError("--judge none", "cannot be validated; name a judge")
    good = good_material(held_out[:args.clips])
    print(f"{len(good)} held-out clips of {args.data or 'drawn talkers'}, judge {args.judge_url or args.judge}\n"
          + battery(judge, good))


def align_judge(args: argparse.Namespace) -> None:
    """Rate every video that people rated, compare, and fit the calibration. Paths are relative to the table."""
    rows, scores = read_ratings(args.align), {}                                      # a calibration fits raw ratings
    judge = make_judge(args)
    for video in tqdm(dict.fromkeys(video for video, _, _ in rows), "rating", leave=False):
        clip = load_clip(args.align.parent / video, args.size, args.crop)
        rated = rate_whole(judge, clip.frames[None] / 255, clip.audio[None], [video])[0]
        scores |= {(video, aspect): score for aspect, score in zip(ASPECTS, rated.tolist())}
    print(align(scores, rows, args.out or Path("calibration.json")))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    from sample import check_numbers, crop_argument, device_argument
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    g = p.add_argument_group("what to do").add_mutually_exclusive_group(required=True)
    g.add_argument("--video", nargs="+", metavar="FILE", help="score videos")
    g.add_argument("--train-judge", action="store_true", help="teach the embedded judge, into --out (runs/judge)")
    g.add_argument("--validate-judge", action="store_true", help="try the judge on clips with known faults")
    g.add_argument("--align", type=Path, metavar="CSV", help="compare the judge with people's ratings (columns video, "
                   "aspect, rating) and write a calibration to --out (calibration.json)")
    g.add_argument("--train-sync", action="store_true", help="train the sync network, into --out (runs/sync)")
    g.add_argument("--tally", nargs="+", type=Path, metavar="VOTES", help="count the votes of a study of sample.py")
    g = p.add_argument_group("with what")
    g.add_argument("--key", type=Path, help="of the study whose votes are counted: its key.json")
    g.add_argument("--portrait", help="of the videos (their first frame)")
    g.add_argument("--data", type=Path, help="a folder of real clips: what to learn from, try on, or compare with "
                                             "(drawn talkers)")
    g.add_argument("--crop", type=crop_argument, help="x,y,size in pixels; without it, the centre square")
    g.add_argument("--size", type=int, default=64, help="pixels per side at which videos are scored (%(default)s)")
    g.add_argument("--chunk-frames", type=int, default=4, help="of the generator that made them (%(default)s)")
    g.add_argument("--sync", type=Path, default=DEFAULT_SYNC, help="folder of the sync network (drawn talkers')")
    g.add_argument("--from-judge", metavar="DIR", help="teach this one on, such as assets/judge, instead of a new one")
    g.add_argument("--generator", nargs="+", default=[], metavar="RUN", help="runs of train.py, best of several ages, "
                   "whose videos the judge also learns from")
    g.add_argument("--steps", type=int, help="of training (1000 for the judge, 400 for the sync network)")
    g.add_argument("--tower-steps", type=int, default=2500, help="of training the judge's towers by themselves, before "
                   "(%(default)s)")
    g.add_argument("--clips", type=int, default=64, help="to validate on (%(default)s)")
    g.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    g.add_argument("--out", type=Path, help="where to write")
    g.add_argument("--device", type=device_argument, default=device_argument(), help="for the judge (%(default)s)")
    reward_flags(p)
    args = p.parse_args(argv)
    check_numbers(p, args, size=32, chunk_frames=2, steps=1, tower_steps=0, clips=2, seed=0)
    if args.tally and not args.key:
        p.error("--tally needs --key, the key.json that the study wrote")
    if args.align and args.out and args.out.is_dir():
        p.error(f"--out {args.out} is a folder; name the file to write the calibration to")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.out and (args.train_judge or args.train_sync):
        with writing(args.out):                      # before the hour of work that would be lost
            args.out.mkdir(parents=True, exist_ok=True)
    if args.video:
        score_videos(args)
    elif args.train_judge:
        train_judge(args)
    elif args.validate_judge:
        validate_judge(args)
    elif args.align:
        align_judge(args)
    elif args.tally:
        print(tally(args.tally, args.key))
    else:
        train_sync_network(args)


if __name__ == "__main__":
    with one_line("stopped; nothing was written", "lower --size or --clips, or use fewer clips"):
        main()
