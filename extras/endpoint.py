"""The judge behind an endpoint: a server that speaks OpenAI's chat completions, such as vLLM's.

    vllm serve Qwen/Qwen2.5-Omni-7B                        # of April 2026 or later
    python train.py --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen2.5-Omni-7B

A clip is sent as an mp4 with its sound. The answer is one token, whose log-probabilities give the rating.
The openai client retries with backoff and honours Retry-After, which bridges seconds.
`patience` bridges the minutes that a server takes to restart. B clips, F frames.
"""

import base64
import math
import os
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from itertools import product
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import urlsplit

import openai
import torch
from torch import Tensor
from tqdm import tqdm

from data import FPS, SAMPLES_PER_FRAME, MediaError, first_line, video_uri, write_speech
from reward import ASPECTS, JudgeError, Ratings, drop_unrated, expected_rating, prompt, to_bytes

# What vLLM needs to see and hear a clip as it is (chat_utils.py, qwen2_5_omni_thinker.py).
# It takes the sound out of the mp4 only if the *request* says use_audio_in_video (vllm#36319).
# The server's own flag does not do (vllm#47788); an input_audio part beside it would be a second sound.
# It keeps 32 frames of a video unless told to keep all.
# It takes two frames for a second unless told otherwise: once for positions, once for weaving in the sound.
VLLM = {"mm_processor_kwargs": {"use_audio_in_video": True, "fps": FPS, "second_per_grid_ts": [2 / FPS]},
        "media_io_kwargs": {"video": {"num_frames": -1}}}
OUTAGE = openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError      # these may pass
PAUSE = 5.0                                          # seconds between two rounds of the client's own retries


def digit_probabilities(answer) -> Tensor:
    """Read p (5,) of the digits 1..5 from a chat completion: the top log-probabilities of its first token.

    Tokens that differ in white space alone are one digit. Returns: NaN for anything else than such an answer.
    """
    p = torch.zeros(5)
    try:
        for token in answer.choices[0].logprobs.content[0].top_logprobs:
            if (digit := token.token.strip()) in tuple("12345"):
                p[int(digit) - 1] += math.exp(token.logprob)
    except (AttributeError, LookupError, TypeError, OverflowError):
        return torch.full((5,), math.nan)
    return p if p.sum() <= 1.01 else torch.full((5,), math.nan)


def reason(error: openai.OpenAIError) -> str:
    """Say on one line what went wrong with a request."""
    said, status = first_line(error.__cause__ or error), f"{getattr(error, 'status_code', '')}"
    return said if status in said else f"HTTP {status}: {said}"


class RemoteJudge:
    """A multimodal language model that rates clips behind an OpenAI-compatible endpoint.

    One worker asks all prompts of a clip in turn, media first: the server finds the clip in its prefix cache.

    Args:
        timeout: seconds of silence after which a request has failed.
        patience: seconds for which an endpoint that is down or busy is asked again.
        at_once: requests under way.    key: else OPENAI_API_KEY.    orders: as of Judge.
        interleave: send VLLM's fields. A server that ignores them would judge without sound; turned off, it
            gets a wav after the video, which says less about lips than sound woven into the pictures.
    """

    def __init__(self, url: str, model: str, timeout: float = 120.0, patience: float = 180.0,
                 at_once: int = 4, key: str | None = None, interleave: bool = True,
                 orders: Sequence[bool] = (False,)):
        if not url.startswith(("http://", "https://")):
            raise MediaError(url, "is not the address of a judge; pass one like http://localhost:8000/v1")
        if not (timeout > 0 and patience >= 0):
            raise MediaError("--judge-timeout and --judge-patience", "must be above 0, and at least 0")
        self.url, self.model, self.interleave, self.orders = url, model, interleave, orders
        self.patience, self.at_once = patience, at_once
        self.fingerprint = f"{model} {tuple(orders)} {interleave}"               # for a cache of its ratings
        self.window, self.waiting = None, False      # videos are judged whole; no outage is being waited out
        key = (key or os.environ.get("OPENAI_API_KEY", "")).strip() or "none"    # files end in a newline
        try:
            scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
            local = host in ("localhost", "::1") or host.startswith("127.")
            proxies = {} if local or urllib.request.proxy_bypass(host) else urllib.request.getproxies()
            self.proxy = proxies.get(scheme) or proxies.get("all")
            http = openai.DefaultHttpxClient(trust_env=not local)                # of a proxy, too
            self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, http_client=http)
        except Exception as error:                   # no address, or a proxy of a kind that httpx cannot use
            raise MediaError(url, f"cannot be asked: {first_line(error)}") from None

    def rate(self, frames: Tensor, audio: Tensor, names: Sequence[str]) -> Ratings:
        """Rate clips as `Judge.rate` does.

        Raises: JudgeError for a request that fails for good; no other is then started.
        """
        if audio.shape != (len(names), frames.shape[1] * SAMPLES_PER_FRAME) or len(frames) != len(names):
            raise ValueError(f"clips disagree: {frames.shape=} {audio.shape=} {len(names)=}")
        stop, pool = threading.Event(), ThreadPool(self.at_once)
        try:
            jobs = pool.imap_unordered(lambda i: (i, self._rate_clip(frames[i], audio[i], stop)), range(len(names)))
            answers = [p for _, p in sorted(jobs)]   # raises what goes wrong as soon as it does
            return drop_unrated(expected_rating(torch.stack(answers)), names)
        except openai.OpenAIError as error:
            remedy = "check --judge-model, the key in OPENAI_API_KEY and the server"
            if isinstance(error, OUTAGE):
                remedy = "wait longer with --judge-patience, or check that the server runs"
            if self.proxy:                           # named without its user and password
                remedy += f", or the proxy {self.proxy.rpartition('@')[2]}, which NO_PROXY=host goes around"
            raise JudgeError(self.url, f"{reason(error)}; {remedy}") from None
        finally:
            stop.set()                               # after an error or Ctrl-C: wait for nobody,
            pool.terminate()                         # nor does Python at its end, as these threads are daemons

    def _rate_clip(self, frames: Tensor, audio: Tensor, stop: threading.Event) -> Tensor:
        """Ask all questions about one clip. Returns: p (aspects, orders, digits)."""
        media = self._media(frames, audio)
        p = [digit_probabilities(self._ask([*media, {"type": "text", "text": prompt(aspect, order)}], stop))
             for aspect, order in product(ASPECTS, self.orders)]
        return torch.stack(p).unflatten(0, (len(ASPECTS), -1))

    def _media(self, frames: Tensor, audio: Tensor) -> list[dict]:
        """Encode a clip as parts of a message: an mp4 with its sound, and if not interleaved that sound."""
        uri = video_uri(to_bytes(frames.detach()).cpu(), audio)
        video = {"type": "video_url", "video_url": {"url": uri}}
        if self.interleave:
            return [video]
        with tempfile.TemporaryDirectory() as folder:
            write_speech(wav := Path(folder, "clip.wav"), audio.detach().cpu())
            sound = base64.b64encode(wav.read_bytes()).decode()
        return [video, {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}}]

    def _ask(self, content: list[dict], stop: threading.Event):
        """Send a request, and again in an outage for `patience` seconds. Returns: the completion, if any."""
        until = time.monotonic() + self.patience
        while not stop.is_set():
            try:
                answer = self.client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": content}],
                    max_tokens=1, temperature=0, logprobs=True, top_logprobs=20,
                    extra_body=VLLM if self.interleave else None)
                self.waiting = False
                return answer
            except OUTAGE as error:
                if time.monotonic() >= until:
                    raise
                if not self.waiting:
                    self.waiting = True              # of several workers one says so
                    tqdm.write(f"note: {self.url}: {reason(error)}; asking again for {self.patience:.0f} s",
                               file=sys.stderr)
                stop.wait(PAUSE)
            except ValueError:                       # what came is no JSON
                return None
