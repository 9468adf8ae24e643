"""The judge behind an endpoint: a server that speaks OpenAI's chat completions, such as vLLM's.

    vllm serve Qwen/Qwen2.5-Omni-7B                        # of April 2026 or later
    python train.py --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen2.5-Omni-7B

A clip is sent as an mp4 with its sound. The answer is one token, whose log-probabilities give the rating.
The openai client sends a request again, in pauses of up to 8 s, until a server that restarts is back.
"""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from urllib.parse import urlsplit

import openai
import torch
from torch import Tensor

from data import to_bytes, video_uri
from extras.files import MediaError, first_line
from extras.media import FPS
from reward import ASPECTS, JudgeError, Ratings, drop_unrated, expected_rating, prompt

# What vLLM needs to see and hear a clip as it is (chat_utils.py, qwen2_5_omni_thinker.py). It takes the sound
# out of the mp4 only if the *request* says so (vllm#36319); the server's own flag does not (vllm#47788). It
# takes two frames for a second and keeps 32 frames of a video unless told otherwise.
VLLM = {"mm_processor_kwargs": {"use_audio_in_video": True, "fps": FPS, "second_per_grid_ts": [2 / FPS]},
        "media_io_kwargs": {"video": {"num_frames": -1}}}
OUTAGE = openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError      # these may pass
TIMEOUT, PAUSE = 120.0, 8.0                          # seconds of silence, and between two tries, at most


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

    Args: patience: seconds for which an endpoint that is down or busy is asked again; at_once: requests under
          way.
    """

    window = None                                    # videos are judged whole

    def __init__(self, url: str, model: str, patience: float = 180.0, at_once: int = 4):
        if not url.startswith(("http://", "https://")):
            raise MediaError(url, "is not the address of a judge; pass one like http://localhost:8000/v1")
        if not 0 <= patience < 1e6:
            raise MediaError("--judge-patience", f"must be seconds, 0 or more, got {patience}")
        self.url, self.model, self.at_once = url, model, at_once
        self.fingerprint = model                     # for a cache of its ratings
        key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"             # a file ends in a newline
        try:
            host = urlsplit(url).hostname or ""
            local = host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")
            http = openai.DefaultHttpxClient(trust_env=not local)                # which would name a proxy
            self.client = openai.OpenAI(base_url=url, api_key=key, timeout=TIMEOUT, http_client=http,
                                        max_retries=2 + math.ceil(patience / PAUSE))
        except Exception as error:                   # no address, or a proxy that httpx cannot use
            raise MediaError(url, f"cannot be asked: {first_line(error)}") from None

    def rate(self, frames: Tensor, audio: Tensor, names: Sequence[str]) -> Ratings:
        """Rate clips as `Judge.rate` does. Raises: JudgeError where a request fails."""
        with ThreadPool(self.at_once) as pool:       # an error, or Ctrl-C, ends the pool
            try:
                answers = list(pool.imap(self.ask_all, zip(frames, audio)))
            except openai.OpenAIError as error:
                remedy = "check --judge-model, the key in OPENAI_API_KEY and the server"
                if isinstance(error, OUTAGE):
                    remedy = ("wait longer with --judge-patience, or check that the server runs and needs no "
                              "proxy")
                raise JudgeError(self.url, f"{reason(error)}; {remedy}") from None
        return drop_unrated(expected_rating(torch.stack(answers)), names)

    def ask_all(self, clip: tuple[Tensor, Tensor]) -> Tensor:
        """Ask all questions about one clip, frames and sound. Returns: p (aspects, digits)."""
        frames, audio = clip
        video = {"type": "video_url", "video_url": {"url": video_uri(to_bytes(frames.detach()).cpu(), audio)}}
        return torch.stack([digit_probabilities(self.ask([video, {"type": "text", "text": prompt(aspect)}]))
                            for aspect in ASPECTS])

    def ask(self, content: list[dict]):
        """Send a request. Returns: the completion, or None where what came is no JSON."""
        with suppress(ValueError):
            return self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": content}], max_tokens=1,
                temperature=0, logprobs=True, top_logprobs=20, extra_body=VLLM)
