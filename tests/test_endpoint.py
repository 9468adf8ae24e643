"""The judge behind an endpoint, against a real local server: what is sent, what is read, and what may go
wrong."""

import base64
import json
import math
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace

import pytest
import torch

import train
from data import load_clip
from extras import endpoint
from extras.endpoint import RemoteJudge
from extras.files import MediaError
from reward import ASPECTS, JudgeError, prompt
from tiny import POST, SHAPE, logged, state


def completion(**p: float) -> bytes:
    """A chat completion whose first token has the probabilities p, with tokens spelt _5 for ' 5'."""
    top = [{"token": token.replace("_", " "), "logprob": math.log(value)} for token, value in p.items()]
    return json.dumps({"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}).encode()


GOOD = completion(**{"4": 0.5, "3": 0.25, "_4": 0.05, "The": 0.2})
GOOD_SCORE = (4 * 0.55 + 3 * 0.25) / 0.8
ODD = completion(**{"4": 0.45, "The": 0.55})
BUSY = 503, {"Retry-After": "0.01"}, b'{"error": {"message": "still\\nloading"}}'


@contextmanager
def serving(answer):
    """Serve answer(k, body) -> (status, headers, bytes) to the k-th request. Yields: url, requests."""
    seen, numbers = [], count()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers["Authorization"], "body": body})
            status, headers, data = answer(next(numbers), body)
            with suppress(OSError):                  # the client gave up, as it should
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
        server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses, and a proxy that would fail every request that takes it."""
    monkeypatch.setattr(endpoint, "PAUSE", 0.05)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://user:secret@127.0.0.1:9")
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("no_proxy", "NO_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_media(monkeypatch):
    """Most tests are about the talk, not about ffmpeg: a clip is sent as its brightness."""
    monkeypatch.setattr(endpoint, "video_uri", lambda frames, audio: f"{frames[0, 0, 0, 0]}")


def clips(n: int) -> tuple:
    """n clips, the i-th of brightness i of 255."""
    shades = torch.arange(n).view(-1, 1, 1, 1, 1) / 255
    return shades.expand(n, 2, 3, 4, 4), torch.zeros(n, 2 * 640), [f"clip{i}" for i in range(n)]


def test_a_request_holds_the_whole_clip_before_the_question_and_asks_for_log_probs(tmp_path, monkeypatch):
    """Its answer is read digit by digit: ' 4' and '4' are one, 'The' is none. A proxy is gone around."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    frames, audio = torch.rand(1, 30, 3, 32, 32), torch.sin(torch.arange(30 * 640) / 5)[None]
    with serving(lambda k, body: (200, {}, GOOD)) as (url, seen):
        ratings = RemoteJudge(url + "/", "judge").rate(frames, audio, ["clip"])
    torch.testing.assert_close(ratings.score, torch.full((1, 3), GOOD_SCORE))
    torch.testing.assert_close(ratings.mass, torch.full((1, 3), 0.8))
    body = seen[0]["body"]
    assert seen[0]["path"] == "/v1/chat/completions" and seen[0]["key"] == "Bearer secret"
    asked = {"model": "judge", "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    assert body | endpoint.VLLM | asked == body
    content = [request["body"]["messages"][0]["content"] for request in seen]
    assert [c[1]["text"] for c in content] == [prompt(aspect) for aspect in ASPECTS]
    assert content[0][0] == content[1][0] == content[2][0]               # a prefix that all aspects share
    head, _, data = content[0][0]["video_url"]["url"].partition(",")
    assert head == "data:video/mp4;base64"
    (tmp_path / "sent.mp4").write_bytes(base64.b64decode(data, validate=True))
    assert len(load_clip(tmp_path / "sent.mp4", 32).frames) == 30        # with sound, or it would be refused


def test_scores_stand_at_their_clip_and_aspect_and_as_many_requests_as_asked_for_are_under_way(no_media):
    under_way, counts = [], []

    def answer(k, body):
        under_way.append(k)
        counts.append(len(under_way))
        time.sleep(0.03)
        under_way.remove(k)
        video, question = body["messages"][0]["content"]
        aspect = [prompt(aspect) for aspect in ASPECTS].index(question["text"])
        return 200, {}, completion(**{f"{1 + (int(video['video_url']['url']) + aspect) % 5}": 0.9})

    with serving(answer) as (url, seen):
        score = RemoteJudge(url.replace("127.0.0.1", "0.0.0.0"), "m", at_once=3).rate(*clips(8)).score
    assert score.tolist() == [pytest.approx([1 + (i + j) % 5 for j in range(3)]) for i in range(8)]
    assert max(counts) == 3 and len(seen) == 24


@pytest.mark.parametrize("odd", [
    ODD, b"<html>502</html>", b'{"choices": [{"logprobs": null}]}',
    GOOD.replace(b"-1.38", b'900, "x": -1.38')])
def test_an_answer_that_is_no_rating_drops_one_clip_and_says_so(no_media, capsys, odd):
    assert odd != GOOD
    answer = lambda k, body: (200, {"Content-Type": "application/json"}, odd if k == 4 else GOOD)
    with serving(answer) as (url, _):
        score = RemoteJudge(url, "m", at_once=1, patience=0).rate(*clips(3)).score
    assert score.isnan().tolist() == [[False] * 3, [False, True, False], [False] * 3]
    assert "note: clip1: the judge does not rate its expressiveness" in capsys.readouterr().err


def test_an_outage_is_waited_out_and_told_once(no_media, capsys):
    """The first 12 requests find the server busy: more than the client's own retries bridge."""
    with serving(lambda k, body: BUSY if k < 12 else (200, {}, GOOD)) as (url, seen):
        ratings = RemoteJudge(url, "m", patience=30, at_once=2).rate(*clips(2))
    assert ratings.score.flatten().tolist() == pytest.approx([GOOD_SCORE] * 6) and len(seen) == 12 + 6
    assert capsys.readouterr().err.count("asking again for 30 s") == 1


def silent(k, body):
    time.sleep(0.4)
    return 200, {}, GOOD


@pytest.mark.parametrize("answer, said", [
    (None, "refused.*--judge-patience"), (silent, "timed out.*--judge-patience"),
    (lambda *_: (401, {}, b'{"error": {"message": "No key"}}'), "401.*No key.*check --judge-model")],
    ids=["gone", "silent", "refused"])
def test_what_fails_for_good_ends_with_one_line_and_nothing_more_is_asked(no_media, answer, said):
    """Of twenty clips no more than those that two workers had begun, three tries each."""
    with serving(answer) as (url, seen):
        url = url if answer else "http://127.0.0.1:9/v1"
        with pytest.raises(JudgeError, match=f"http://127.*: .*{said}") as caught:
            RemoteJudge(url, "m", timeout=0.1, patience=0, at_once=2).rate(*clips(20))
        time.sleep(0.1)
        assert "\n" not in str(caught.value) and len(seen) <= 2 * 3


@pytest.mark.parametrize("page", [b"<html>log in</html>", b"null", b'{"choices": []}'])
def test_a_server_that_is_no_judge_is_named_by_its_address(no_media, page):
    with serving(lambda *_: (200, {"Content-Type": "application/json"}, page)) as (url, _):
        with pytest.raises(JudgeError, match=f"^{url}: answers without log-probabilities; .*/v1"):
            RemoteJudge(url, "m", patience=0).rate(*clips(2))


def test_what_cannot_be_asked_is_named_and_a_server_elsewhere_is_asked_by_proxy(no_media, monkeypatch):
    """The proxy's password stays secret."""
    with pytest.raises(JudgeError, match=r"http://judge\.invalid/v1: .*refused.*proxy") as caught:
        RemoteJudge("http://judge.invalid/v1", "m", patience=0).rate(*clips(1))
    assert "secret" not in str(caught.value)
    with pytest.raises(MediaError, match="is not the address"):
        RemoteJudge("localhost:8000", "m")
    with pytest.raises(MediaError, match="must be above 0"):
        RemoteJudge("http://localhost/v1", "m", timeout=0)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-–abc")                  # a dash that a page has made long
    with pytest.raises(MediaError, match="OPENAI_API_KEY: holds a character that no key has"):
        RemoteJudge("http://localhost/v1", "m")


RUN = [*SHAPE, *POST, *"--clips 6 --steps 2 --curate 0 --looks 1 --parts 1 --judge-batch 1".split()]
REQUESTS = 2 * 3 * 3                                 # of an update: prompts, group, aspects
RATING = 6 * 3                                       # of all training clips, once, before the first update


def rated(k: int, body: dict) -> tuple:
    """Answer by what is asked, so that a repeated request has the same rating."""
    p = 0.3 + 0.4 * (hash(json.dumps(body)) % 1000) / 1000
    return 200, {}, completion(**{"4": p, "2": 0.95 - p})


def test_a_run_whose_judge_is_away_is_saved_and_resumes_bit_equal(unmeasured, tmp_path):
    """It goes in the third update: two are saved. Once it is back, the run ends as if nothing had been."""
    away, whole, stopped = [math.inf], tmp_path / "whole", tmp_path / "stopped"
    with serving(lambda k, body: BUSY if k >= away[0] else rated(k, body)) as (url, seen):
        flags = [*RUN, "--judge-model", "m", "--judge-url", url, "--judge-patience", "0"]
        train.main([*flags, "--out", str(whole)])
        away[0] = len(seen) + 2 * REQUESTS + 5
        with pytest.raises(SystemExit, match="503.*; then go on with: python train.py --resume .*stopped"):
            train.main([*flags, "--out", str(stopped)])
        assert state(stopped, "post.pt")["update"] == len(logged(stopped, "post-training")) == 2
        away[0] = math.inf
        train.main(["--resume", str(stopped), "--judge-patience", "1"])
    one, other = (state(folder, "post.pt") for folder in (whole, stopped))
    assert other["update"] == 4 and all(torch.equal(v, other["model"][k]) for k, v in one["model"].items())


def test_a_run_leaves_an_unrated_video_out_and_counts_it_and_ends_where_a_tenth_is_unrated(tmp_path):
    """One odd answer, in the second update: in the log and in the report. Six videos are a tenth of ten
    updates' sixty; what lies ten updates back is forgotten."""
    with serving(lambda k, body: (200, {}, ODD) if k == RATING + 20 else rated(k, body)) as (url, _):
        flags = ["--updates", "2", "--judge-url", url, "--judge-model", "odd"]
        train.main([*RUN, *flags, "--out", str(tmp_path)])
    unrated = [e["components"]["total"]["unrated"] for e in logged(tmp_path, "post-training")]
    assert unrated == [0, 1] and "| unrated videos | 1 |" in (tmp_path / "report.md").read_text()
    stage = SimpleNamespace(unrated=deque(maxlen=train.UNRATED_OVER))
    for unrated in [5, *[0] * 9, 5, 0]:
        train.PostTraining.count_unrated(stage, unrated, 6)
    with pytest.raises(JudgeError, match="the judge: left 6 videos unrated in 10 updates"):
        train.PostTraining.count_unrated(stage, 1, 6)
