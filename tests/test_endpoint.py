"""The judge behind an endpoint, against a real local server: what is sent, what is read, and what may go wrong."""

import base64
import json
import math
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import imageio_ffmpeg
import pytest
import torch

import train
from data import MediaError, load_speech
from extras import endpoint
from extras.endpoint import RemoteJudge
from reward import ASPECTS, JudgeError, Ratings, drop_unrated, prompt


def completion(**p: float) -> bytes:
    """A chat completion whose first token has the probabilities p, with tokens spelt _5 for ' 5'."""
    top = [{"token": token.replace("_", " "), "logprob": math.log(value), "bytes": None}
           for token, value in p.items()]
    token = {"token": top[0]["token"], "logprob": top[0]["logprob"], "top_logprobs": top}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": token["token"]},
                                    "logprobs": {"content": [token]}}]}).encode()


GOOD = completion(**{"4": 0.5, "3": 0.25, "_4": 0.05, "The": 0.2})                   # (4 * 0.55 + 3 * 0.25) / 0.8
GOOD_SCORE = 3.6875
BUSY = 503, {"Retry-After": "0.01"}, b'{"error": {"message": "still\\nloading"}}'


@contextmanager
def serving(answer):
    """Serve answer(k, request) -> (status, headers, bytes) to the k-th request. Yields: url, list of requests."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append({"path": self.path, "key": self.headers["Authorization"], "body": body})
                k = len(seen) - 1
            status, headers, data = answer(k, body)
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass                                 # the client gave up, as it should

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses, and a proxy that would fail every request; no key of the user's."""
    monkeypatch.setattr(endpoint, "PAUSE", 0.05)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("no_proxy", "NO_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_media(monkeypatch):
    """Most tests are about the talk, not about ffmpeg."""
    monkeypatch.setattr(RemoteJudge, "_media", lambda self, frames, audio: [])


def clips(n: int, frames: int = 2) -> tuple:
    torch.manual_seed(0)
    return torch.rand(n, frames, 3, 4, 4), torch.zeros(n, frames * 640), [f"clip{i}" for i in range(n)]


# ---------------------------------------------------------------- what is sent and read

def test_scores_stand_at_their_clip_and_aspect_and_orders_are_averaged(no_media, monkeypatch):
    monkeypatch.setattr(RemoteJudge, "_media",
                        lambda self, f, a: [{"type": "text", "text": f"{int(f[0, 0, 0, 0])}"}])
    asked = {(aspect, order): prompt(aspect, order) for aspect, order in product(ASPECTS, (False, True))}

    def answer(k, body):
        clip, text = (part["text"] for part in body["messages"][0]["content"])
        (aspect, order), = (key for key, value in asked.items() if value == text)
        digit = 1 + (int(clip) + ASPECTS.index(aspect)) % 4 + order
        return 200, {}, completion(**{f"{digit}": 0.6 + 0.2 * order})

    frames = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 2, 3, 4, 4)
    with serving(answer) as (url, seen):
        ratings = RemoteJudge(url, "m", orders=(False, True)).rate(frames, *clips(5)[1:])
    want = torch.tensor([[1.5 + (i + j) % 4 for j in range(3)] for i in range(5)])
    torch.testing.assert_close(ratings.score, want)
    assert ratings.mass.flatten().tolist() == pytest.approx([0.6] * 15) and len(seen) == 30


@pytest.mark.parametrize("interleave", [True, False])
def test_a_request_holds_the_whole_clip_before_the_prompt_and_asks_for_log_probs(tmp_path, interleave):
    """Its answer is read digit by digit: ' 4' and '4' are one, 'The' is none."""
    frames, _, names = clips(1, 30)
    audio = torch.sin(torch.arange(30 * 640) / 5)[None]
    with serving(lambda k, body: (200, {}, GOOD)) as (url, seen):
        ratings = RemoteJudge(url + "/", "judge", key="secret\n", interleave=interleave).rate(frames, audio, names)
    torch.testing.assert_close(ratings.score, torch.full((1, 3), GOOD_SCORE))
    torch.testing.assert_close(ratings.mass, torch.full((1, 3), 0.8))
    body = seen[0]["body"]
    assert seen[0]["path"] == "/v1/chat/completions" and seen[0]["key"] == "Bearer secret"
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "logprobs", "top_logprobs")} == {
        "model": "judge", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    content = [request["body"]["messages"][0]["content"] for request in seen]
    assert [c[-1] for c in content] == [{"type": "text", "text": prompt(aspect)} for aspect in ASPECTS]
    assert content[0][:-1] == content[1][:-1] == content[2][:-1]                    # a prefix that all aspects share
    head, _, data = content[0][0]["video_url"]["url"].partition(",")
    assert head == "data:video/mp4;base64"
    (tmp_path / "sent.mp4").write_bytes(base64.b64decode(data, validate=True))
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "sent.mp4"))[0] == 30
    assert abs(len(load_speech(tmp_path / "sent.mp4")) - 30 * 640) <= 1024
    if interleave:
        assert len(content[0]) == 2 and {k: body[k] for k in endpoint.VLLM} == endpoint.VLLM
    else:
        assert len(content[0]) == 3 and "mm_processor_kwargs" not in body
        sound = content[0][1]["input_audio"]
        assert sound["format"] == "wav" and base64.b64decode(sound["data"])[:4] == b"RIFF"


def test_no_more_than_at_once_requests_are_under_way_and_as_many_are(no_media):
    now, most, lock = 0, 0, threading.Lock()

    def answer(k, body):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.03)
        with lock:
            now -= 1
        return 200, {}, GOOD

    with serving(answer) as (url, _):
        RemoteJudge(url, "m", at_once=3).rate(*clips(8))
    assert most == 3


# ---------------------------------------------------------------- answers that are no rating

@pytest.mark.parametrize("odd", [
    completion(**{"4": 0.45, "The": 0.55}), b"", b"<html>502</html>", b"null", b'{"choices": []}',
    b'{"choices": [{"logprobs": null}]}', b'{"choices": [{"message": {"content": "4"}}]}',
    GOOD.replace(b'"logprob": -1.38', b'"logprob": NaN, "x": -1.38'),
    GOOD.replace(b'"logprob": -1.38', b'"logprob": 900.0, "x": -1.38'),
    GOOD.replace(b'"logprob": -1.38', b'"logprob": "a", "x": -1.38')])
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_an_answer_that_is_no_rating_drops_one_clip_and_says_so(no_media, capsys, odd, kind):
    assert odd != GOOD
    answer = lambda k, body: (200, {"Content-Type": kind}, odd if k == 4 else GOOD)
    with serving(answer) as (url, _):
        score = RemoteJudge(url, "m", at_once=1, patience=0).rate(*clips(3)).score
    assert score.isnan().tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert "note: clip1: the judge does not rate its expressiveness" in capsys.readouterr().err


def test_a_judge_that_rates_nothing_is_none():
    some = Ratings(torch.ones(2, 3), torch.tensor([[0.9, 0.1, 0.9], [0.5, 0.5, 0.5]]))
    assert drop_unrated(some, ["a", "b"]).score.isnan().sum() == 1
    for ratings in (Ratings(torch.ones(1, 3), torch.tensor([[0.5, 0.9, 0.0]])),
                    Ratings(torch.full((1, 3), math.nan), torch.ones(1, 3))):
        with pytest.raises(JudgeError, match="^x: the judge does not rate its (motion|lip_sync): .*instruction-tuned"):
            drop_unrated(ratings, ["x"])


# ---------------------------------------------------------------- an endpoint that fails

def test_an_outage_is_waited_out_and_told_once(no_media, capsys):
    """The first 12 requests find the server busy: more than the client's own retries bridge."""
    with serving(lambda k, body: BUSY if k < 12 else (200, {}, GOOD)) as (url, seen):
        ratings = RemoteJudge(url, "m", patience=30, at_once=2).rate(*clips(2))
    assert ratings.score.flatten().tolist() == pytest.approx([GOOD_SCORE] * 6) and len(seen) == 12 + 6
    assert capsys.readouterr().err.count("asking again for 30 s") == 1
    with pytest.raises(JudgeError, match=f"{url}: .*refused.*--judge-patience"):           # the server is gone now
        RemoteJudge(url, "m", patience=0).rate(*clips(1))


@pytest.mark.parametrize("answer, said", [
    (lambda k, body: BUSY, "503.*still"), (lambda k, body: (200, {"Content-Length": "9999"}, GOOD), "peer closed"),
    (lambda k, body: (time.sleep(0.4), (200, {}, GOOD))[1], "timed out")], ids=["busy", "cut off", "silent"])
def test_an_outage_beyond_patience_ends_with_one_line(no_media, answer, said):
    with serving(answer) as (url, _):
        with pytest.raises(JudgeError, match=f"{url}: .*{said}.*--judge-patience") as caught:
            RemoteJudge(url, "m", timeout=0.1, patience=0).rate(*clips(4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status, words", [(401, "Invalid key"), (404, "The model `m` does not exist."), (400, "no")])
def test_a_refusal_is_final(no_media, status, words):
    """Two clips are under way when one is refused: nothing more is asked, but for what each worker has begun."""
    def answer(k, body):
        time.sleep(0.1 if k else 0.02)
        return (200, {}, GOOD) if k else (status, {}, json.dumps({"error": {"message": words}}).encode())

    with serving(answer) as (url, seen):
        with pytest.raises(JudgeError, match=f"{status}.*{re.escape(words)}.*; check --judge-model") as caught:
            RemoteJudge(url, "m", at_once=2).rate(*clips(20))
        time.sleep(0.3)
        assert len(seen) <= 4 and "\n" not in str(caught.value) and "proxy" not in str(caught.value)


def test_a_proxy_in_the_way_is_named_without_its_password(no_media):
    """Other tests run with this proxy set, too: a server on this machine is asked directly."""
    with pytest.raises(JudgeError, match=r"http://judge\.invalid/v1: .*proxy 127\.0\.0\.1:9") as caught:
        RemoteJudge("http://judge.invalid/v1", "m", patience=0).rate(*clips(1))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url, more, said", [
    ("localhost:8000", {}, "is not the address"), ("http://localhost:port/v1", {}, "cannot be asked"),
    ("http://localhost/v1", {"timeout": 0}, "must be above 0"),
    ("http://localhost/v1", {"patience": math.nan}, "must be above 0")])
def test_what_cannot_be_asked_is_named(url, more, said):
    with pytest.raises(MediaError, match=said):
        RemoteJudge(url, "m", **more)


def test_disagreeing_clips_are_refused():
    frames, audio, names = clips(2)
    with pytest.raises(ValueError, match="clips disagree"):
        RemoteJudge("http://x", "m").rate(frames, audio[:, :-1], names)


# ---------------------------------------------------------------- a run whose judge fails

RUN = ("--size 32 --width 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --mlp-width 32 --space-channels 6 "
       "--channels 8 --clips 6 --seconds 1 --validate-clips 2 --batch 2 --sampling-steps 1 --warmup 2 --steps 2 "
       "--updates 4 --looks 1 --watch-clips 2 --prompts 2 --group 3 --rollout-steps 3 --draws 1 --parts 1 "
       "--judge-model m --judge-batch 1 --curate 0").split()
REQUESTS = 2 * 3 * 3                                 # of an update: prompts, group, aspects
RATING = 6 * 3                                       # of all training clips, once, before the first update


def rated(k: int, body: dict) -> tuple:
    """Answer by what is asked, so that a repeated request has the same rating."""
    p = 0.3 + 0.4 * (hash(json.dumps(body)) % 1000) / 1000
    return 200, {}, completion(**{"4": p, "2": 0.95 - p})


def updates(folder) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [e for e in entries if "seconds_for" in e]


def test_a_run_whose_judge_is_away_is_saved_and_resumes_bit_equal(tmp_path, monkeypatch):
    """The endpoint goes for good in the third update: two are saved. Where it is back, the run ends as it would have
    without the outage."""
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path / "cache"))
    away = [math.inf]
    with serving(lambda k, body: BUSY if k >= away[0] else rated(k, body)) as (url, seen):
        flags = [*RUN, "--judge-url", url, "--judge-patience", "0"]
        train.main([*flags, "--out", str(tmp_path / "whole")])
        away[0] = len(seen) + 2 * REQUESTS + 5
        with pytest.raises(SystemExit, match="503.*; then go on with: python train.py --resume .*stopped"):
            train.main([*flags, "--out", str(tmp_path / "stopped")])
        saved = torch.load(tmp_path / "stopped" / "post.pt", weights_only=True)
        assert saved["update"] == len(updates(tmp_path / "stopped")) == 2
        away[0] = math.inf
        train.main(["--resume", str(tmp_path / "stopped"), "--judge-patience", "1"])
    whole, stopped = (torch.load(tmp_path / name / "post.pt", weights_only=True) for name in ("whole", "stopped"))
    assert all(torch.equal(v, stopped["model"][k]) for k, v in whole["model"].items()) and stopped["update"] == 4


def test_a_run_leaves_an_unrated_video_out_and_ends_where_a_tenth_is_unrated(tmp_path, monkeypatch):
    """One odd answer among 72: counted in log and report. Two in each update, of six videos: six are a tenth of ten
    updates' sixty, so the third update is refused, and two are saved."""
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path / "cache"))
    odd = completion(**{"4": 0.45, "The": 0.55})
    with serving(lambda k, body: (200, {}, odd) if k == RATING + 20 else rated(k, body)) as (url, _):
        train.main([*RUN, "--judge-url", url, "--out", str(tmp_path / "one")])
    assert [e["components"]["total"]["unrated"] for e in updates(tmp_path / "one")] == [0, 1, 0, 0]
    assert "| unrated videos | 1 |" in (tmp_path / "one" / "report.md").read_text()
    with serving(lambda k, body: (200, {}, odd) if k % 9 == 0 else rated(k, body)) as (url, _):
        with pytest.raises(SystemExit, match="the judge: left 6 videos unrated in 3 updates.*--resume"):
            train.main([*RUN, "--judge-url", url, "--out", str(tmp_path / "many")])
    assert len(updates(tmp_path / "many")) == 2
    assert torch.load(tmp_path / "many" / "post.pt", weights_only=True)["update"] == 2
