"""The judge behind an endpoint: a server that speaks OpenAI's chat completions, such as vLLM's.

    vllm serve Qwen/Qwen2.5-Omni-7B                        # of April 2026 or later
    python train.py --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen2.5-Omni-7B

A clip is sent as an mp4 with its sound. The answer is one token, whose log-probabilities give the rating.
The openai client retries with backoff, which bridges seconds; `patience` bridges the minutes of a restart.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from urllib.parse import urlsplit

import openai
import torch
from torch import Tensor
from tqdm import tqdm

from data import to_bytes
from extras.files import MediaError, first_line
from extras.media import FPS
from extras.page import video_uri
from reward import (ASPECTS, NO_JUDGE, RUBRIC, JudgeError, Ratings, Unrated, drop_unrated, expected_rating,
                    prompt)

# What vLLM needs to see and hear a clip as it is (chat_utils.py, qwen2_5_omni_thinker.py). It takes the sound
# out of the mp4 only if the *request* says so (vllm#36319); the server's own flag does not (vllm#47788). It
# takes two frames for a second and keeps 32 frames of a video unless told otherwise.
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

    One worker asks all questions about a clip in turn, video first: the server finds it in its prefix cache.

    Args: timeout: seconds of silence after which a request has failed; patience: seconds for which an
          endpoint that is down or busy is asked again; at_once: requests under way.
    """

    window = None                                    # videos are judged whole

    def __init__(self, url: str, model: str, timeout: float = 120.0, patience: float = 180.0,
                 at_once: int = 4):
        if not url.startswith(("http://", "https://")):
            raise MediaError(url, "is not the address of a judge; pass one like http://localhost:8000/v1")
        if not (timeout > 0 and patience >= 0):
            raise MediaError("--judge-timeout and --judge-patience", "must be above 0, and at least 0")
        self.url, self.model, self.patience, self.at_once = url, model, patience, at_once
        self.fingerprint = json.dumps([model, RUBRIC])          # for a cache of its ratings
        self.waiting = False                         # in an outage
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"             # a file ends in a newline
        if not key.isascii():
            raise MediaError("OPENAI_API_KEY", "holds a character that no key has; copy it again")
        try:
            host = urlsplit(url).hostname or ""
            local = host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")
            http = openai.DefaultHttpxClient(trust_env=not local)                # which would name a proxy
            self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, http_client=http)
        except Exception as error:                   # no address, or a proxy that httpx cannot use
            raise MediaError(url, f"cannot be asked: {first_line(error)}") from None

    def rate(self, frames: Tensor, audio: Tensor, names: Sequence[str]) -> Ratings:
        """Rate clips as `Judge.rate` does. Raises: JudgeError where a request fails; no other is begun."""
        stop, pool = threading.Event(), ThreadPool(self.at_once)
        try:
            clips = [(i, frames[i], audio[i], stop) for i in range(len(names))]
            answers = sorted(pool.imap_unordered(self.ask_all, clips))           # raises as soon as one fails
            p = torch.stack([p for _, p in answers])
            if p.isnan().all():
                raise Unrated(self.url, "answers without log-probabilities; name the address that ends in /v1, "
                                        f"and {NO_JUDGE}")
            return drop_unrated(expected_rating(p), names)
        except openai.OpenAIError as error:
            remedy = "check --judge-model, the key in OPENAI_API_KEY and the server"
            if isinstance(error, OUTAGE):
                remedy = "raise --judge-timeout or --judge-patience; does the server run, and need no proxy?"
            raise JudgeError(self.url, f"{reason(error)}; {remedy}") from None
        finally:
            stop.set()                               # after Ctrl-C
            pool.terminate()

    def ask_all(self, clip: tuple[int, Tensor, Tensor, threading.Event]) -> tuple[int, Tensor]:
        """Ask all questions about one clip. Returns: its number, and p (aspects, digits)."""
        i, frames, audio, stop = clip
        video = {"type": "video_url", "video_url": {"url": video_uri(to_bytes(frames.detach()).cpu(), audio)}}
        answers = [self.ask([video, {"type": "text", "text": prompt(aspect)}], stop) for aspect in ASPECTS]
        return i, torch.stack([digit_probabilities(answer) for answer in answers])

    def ask(self, content: list[dict], stop: threading.Event):
        """Send a request, and again in an outage for `patience` seconds. Returns: the completion, if any."""
        until = time.monotonic() + self.patience
        while not stop.is_set():
            try:
                answer = self.client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": content}], max_tokens=1,
                    temperature=0, logprobs=True, top_logprobs=20, extra_body=VLLM)
                self.waiting = False
                return answer
            except openai.OpenAIError as error:
                if not isinstance(error, OUTAGE) or time.monotonic() >= until:
                    stop.set()                       # for the other workers
                    raise
                if not self.waiting:
                    self.waiting = True              # of several workers one says so
                    tqdm.write(f"note: {self.url}: {reason(error)}; asking again for {self.patience:.0f} s",
                               file=sys.stderr)
                stop.wait(PAUSE)
            except (ValueError, RecursionError):     # what came is no JSON
                return None
