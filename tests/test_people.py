"""What reward.py promises of the judge behind an endpoint and of its agreement with people."""

import base64
import json
import math
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations, product

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import reward
from data import MediaError, load_speech
from reward import (ASPECTS, Ratings, RemoteJudge, align, bootstrap, calibrate, check_ratings, isotonic, kendall,
                    load_calibration, pairwise_accuracy, prompt, rater_ceiling, read_ratings, save_calibration,
                    spearman)

# ---------------------------------------------------------------- the judge behind an endpoint


def completion(**p: float) -> bytes:
    """A chat completion whose first token has the probabilities p, with tokens spelt _5 for ' 5'."""
    top = [{"token": token.replace("_", " "), "logprob": math.log(value), "bytes": None} for token, value in p.items()]
    token = {"token": top[0]["token"], "logprob": top[0]["logprob"], "top_logprobs": top}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": token["token"]},
                                    "logprobs": {"content": [token]}}]}).encode()


GOOD = completion(**{"4": 0.5, "3": 0.25, "_4": 0.05, "The": 0.2})                   # (4 * 0.55 + 3 * 0.25) / 0.8
GOOD_SCORE = 3.6875


@contextmanager
def endpoint(answer):
    """Serve answer(k, request) -> (status, headers, bytes) to the k-th request. Yields: url, list of requests."""
    seen, lock = [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.append({"path": self.path, "headers": dict(self.headers), "body": body})
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
    """No long pauses, no proxy, no key of the user's."""
    monkeypatch.setattr(reward, "BACKOFF", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def no_media(monkeypatch):
    """Most tests are about the talk, not about ffmpeg."""
    monkeypatch.setattr(RemoteJudge, "_media", lambda self, frames, audio: [])


def clips(n: int, frames: int = 2) -> tuple:
    torch.manual_seed(0)
    return torch.rand(n, frames, 3, 4, 4), torch.zeros(n, frames * 640), [f"clip{i}" for i in range(n)]


def failure(answer, n: int = 1, **options) -> tuple[str, int]:
    """Rate n clips with a server that answers so. Returns: the one line of the error, the number of requests."""
    with endpoint(answer) as (url, seen):
        with pytest.raises(MediaError) as caught:
            RemoteJudge(url, "m", **{"retries": 2, **options}).rate(*clips(n))
        assert "\n" not in str(caught.value) and url in str(caught.value)
        return str(caught.value), len(seen)


def test_the_score_is_the_expected_rating_over_the_digits_and_mass_is_theirs(no_media):
    """' 4' and '4' are one digit; 'The' is none."""
    with endpoint(lambda k, body: (200, {}, GOOD)) as (url, seen):
        ratings = RemoteJudge(url, "m").rate(*clips(2))
    torch.testing.assert_close(ratings.score, torch.full((2, 3), GOOD_SCORE))
    torch.testing.assert_close(ratings.mass, torch.full((2, 3), 0.8))
    assert len(seen) == 6


def test_scores_stand_at_their_clip_and_aspect_and_orders_are_averaged(no_media, monkeypatch):
    monkeypatch.setattr(RemoteJudge, "_media", lambda self, f, a: [{"type": "text", "text": f"{int(f[0, 0, 0, 0])}"}])
    asked = {(aspect, order): prompt(aspect, order) for aspect, order in product(ASPECTS, (False, True))}

    def answer(k, body):
        clip, text = (part["text"] for part in body["messages"][0]["content"])
        (aspect, order), = (key for key, value in asked.items() if value == text)
        return 200, {}, completion(**{str(1 + (int(clip) + ASPECTS.index(aspect)) % 4 + order): 0.6 + 0.2 * order})

    frames = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 2, 3, 4, 4)
    with endpoint(answer) as (url, seen):
        ratings = RemoteJudge(url, "m", orders=(False, True)).rate(frames, *clips(5)[1:])
    torch.testing.assert_close(ratings.score, torch.tensor([[1.5 + (i + j) % 4 for j in range(3)] for i in range(5)]))
    assert ratings.mass.flatten().tolist() == pytest.approx([0.6] * 15) and len(seen) == 30


def video_in(request: dict, folder) -> tuple[int, torch.Tensor]:
    """Decode what was sent. Returns: the number of frames, the sound (T,)."""
    url = request["body"]["messages"][0]["content"][0]["video_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:video/mp4;base64"
    path = folder / "sent.mp4"
    path.write_bytes(base64.b64decode(data, validate=True))
    return imageio_ffmpeg.count_frames_and_secs(str(path))[0], load_speech(path)


@pytest.mark.parametrize("interleave", [True, False])
def test_a_request_holds_the_whole_clip_before_the_prompt_and_asks_for_log_probs(tmp_path, interleave):
    frames, _, names = clips(1, 30)
    audio = torch.sin(torch.arange(30 * 640) / 5)[None]
    with endpoint(lambda k, body: (200, {}, GOOD)) as (url, seen):
        RemoteJudge(url + "/", "judge", key="secret\n", interleave=interleave).rate(frames, audio, names)
    body = seen[0]["body"]
    assert seen[0]["path"] == "/v1/chat/completions" and seen[0]["headers"]["Authorization"] == "Bearer secret"
    assert {k: body[k] for k in ("model", "max_tokens", "temperature", "logprobs", "top_logprobs")} == {
        "model": "judge", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    count, sound = video_in(seen[0], tmp_path)
    assert count == 30 and abs(len(sound) - 30 * 640) <= 1024
    content = [request["body"]["messages"][0]["content"] for request in seen]
    assert [c[-1] for c in content] == [{"type": "text", "text": prompt(aspect)} for aspect in ASPECTS]
    assert content[0][:-1] == content[1][:-1] == content[2][:-1]                    # a prefix that all aspects share
    if interleave:
        assert [part["type"] for part in content[0]] == ["video_url", "text"]
        assert body["mm_processor_kwargs"]["use_audio_in_video"] is True
    else:
        assert [part["type"] for part in content[0]] == ["video_url", "input_audio", "text"]
        assert content[0][1]["input_audio"]["format"] == "wav" and "mm_processor_kwargs" not in body
        assert base64.b64decode(content[0][1]["input_audio"]["data"])[:4] == b"RIFF"


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

    with endpoint(answer) as (url, _):
        RemoteJudge(url, "m", at_once=3).rate(*clips(8))
    assert most == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_server_is_asked_again(no_media, status):
    with endpoint(lambda k, body: (status, {}, b"busy") if k < 2 else (200, {}, GOOD)) as (url, seen):
        ratings = RemoteJudge(url, "m", retries=2).rate(*clips(1))
    assert ratings.score.flatten().tolist() == pytest.approx([GOOD_SCORE] * 3) and len(seen) == 5


def test_retry_after_is_honoured(no_media):
    with endpoint(lambda k, body: (429, {"Retry-After": "1"}, b"") if k == 0 else (200, {}, GOOD)) as (url, _):
        start = time.monotonic()
        RemoteJudge(url, "m").rate(*clips(1))
    assert 1 <= time.monotonic() - start < 3


def test_an_absurd_retry_after_is_bounded(no_media, monkeypatch):
    monkeypatch.setattr(reward, "LONGEST_PAUSE", 0.02)
    with endpoint(lambda k, body: (429, {"Retry-After": "86400"}, b"") if k == 0 else (200, {}, GOOD)) as (url, _):
        RemoteJudge(url, "m").rate(*clips(1))


def test_retries_end_with_the_clip_the_endpoint_and_the_reason(no_media):
    said, asked = failure(lambda k, body: (503, {}, b'{"error": {"message": "still\\nloading"}}'))
    assert asked == 3 and said.startswith("clip0: ") and "failed 3 times" in said and "HTTP 503: still loading" in said


def test_a_refusal_is_final_and_carries_the_server_s_words(no_media):
    said, asked = failure(lambda k, body: (404, {}, b'{"error": {"message": "The model `m` does not exist."}}'))
    assert asked == 1 and "HTTP 404: The model `m` does not exist." in said


def test_a_silent_server_times_out(no_media):
    start = time.monotonic()
    said, asked = failure(lambda k, body: (time.sleep(0.6), (200, {}, GOOD))[1], timeout=0.1, retries=1)
    assert "timed out" in said and asked == 2 and time.monotonic() - start < 2


def test_a_lost_connection_and_a_cut_answer_are_errors_not_zeros(no_media):
    with endpoint(lambda k, body: (200, {}, GOOD)) as (url, _):
        pass                                         # the server is gone now
    with pytest.raises(MediaError, match="clip0: .*failed 2 times.*refused"):
        RemoteJudge(url, "m", retries=1).rate(*clips(1))
    for status in (200, 503):
        assert "failed 3 times" in failure(lambda k, body: (status, {"Content-Length": "9999"}, GOOD))[0]


@pytest.mark.parametrize("answer", [
    b"", b"<html>502</html>", b"\xff\xfe", b"null", b"[]", b'{"choices": []}', b'{"choices": [{"logprobs": null}]}',
    b'{"choices": [{"logprobs": {"content": []}}]}', b'{"choices": [{"message": {"content": "4"}}]}',
    GOOD.replace(b'"logprob": -1.38', b'"logprob": NaN, "x": -1.38'),
    GOOD.replace(b'"logprob": -1.38', b'"logprob": 900.0, "x": -1.38'),
    GOOD.replace(b'"logprob": -1.38', b'"logprob": "a", "x": -1.38'),
])
def test_an_answer_that_cannot_be_read_names_the_clip_and_says_what_came(no_media, answer):
    assert answer != GOOD
    said, asked = failure(lambda k, body: (200, {}, answer))
    assert asked == 1 and said.startswith("clip0: ") and "top_logprobs" in said
    assert " ".join(answer.decode(errors="replace").split())[:30] in said


def test_a_model_that_answers_in_prose_is_refused(no_media):
    with endpoint(lambda k, body: (200, {}, completion(The=0.9, **{"5": 0.1}))) as (url, seen):
        with pytest.raises(MediaError, match="clip0: the judge does not rate its lip_sync.* probability 0.1,"):
            RemoteJudge(url, "m").rate(*clips(1))
    with pytest.raises(MediaError, match="x: .* its motion: the digits 1..5 have probability 0,"):
        check_ratings(Ratings(torch.ones(1, 3), torch.tensor([[0.5, 0.9, 0.0]])), ["x"])
    with pytest.raises(MediaError, match="x: .* the rating is nan"):
        check_ratings(Ratings(torch.full((1, 3), math.nan), torch.ones(1, 3)), ["x"])
    check_ratings(Ratings(torch.ones(1, 3), torch.full((1, 3), 0.5)), ["x"])


def test_after_one_failure_no_other_request_is_started(no_media):
    """Two at once: the clip under way when another is refused asks nothing more, and the other 18 never begin."""
    def answer(k, body):
        time.sleep(0.1 if k else 0.02)
        return (200, {}, GOOD) if k else (400, {}, b"no")

    with endpoint(answer) as (url, seen):
        with pytest.raises(MediaError, match="HTTP 400: no"):
            RemoteJudge(url, "m", at_once=2).rate(*clips(20))
        time.sleep(0.3)
        assert len(seen) <= 2


def test_waiting_for_a_retry_ends_when_another_clip_has_failed(no_media, monkeypatch):
    monkeypatch.setattr(reward, "BACKOFF", 30.0)
    failure(lambda k, body: (time.sleep(0.1 * k), (503 if k == 0 else 400, {}, b"no"))[1], n=2, at_once=2)
    time.sleep(0.2)
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]


def test_an_address_without_http_is_refused_and_disagreeing_clips_too():
    with pytest.raises(MediaError, match="localhost:8000: is not the address"):
        RemoteJudge("localhost:8000", "m")
    frames, audio, names = clips(2)
    with pytest.raises(ValueError, match="clips disagree"):
        RemoteJudge("http://x", "m").rate(frames, audio[:, :-1], names)


# ---------------------------------------------------------------- agreement with people

def write(path, text: str):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_ratings_are_gathered_by_video_and_aspect(tmp_path):
    path = write(tmp_path / "r.csv", "\ufeffvideo,rater,aspect,rating\r\nv1,a,motion,4\r\nv1,b,motion, 2.5\r\n\r\n"
                                     "v1,a,lip_sync,1\r\n\"v,2\",a,motion,5\r\n")
    assert read_ratings(path) == [("v1", "motion", [4, 2.5]), ("v1", "lip_sync", [1]), ("v,2", "motion", [5])]


@pytest.mark.parametrize("text, said", [
    ("", "line 1 lacks video, aspect, rating"), ("video,rating\nv,3\n", "line 1 lacks aspect"),
    ("video,aspect,rating\n", "holds no ratings"), ("video,aspect,rating\nv,motion,3\nv,beauty,3\n", "line 3.*beauty"),
    ("video,aspect,rating\nv,motion,good\n", "line 2.*'good' is not a rating"),
    ("video,aspect,rating\nv,motion,6\n", "line 2.*'6'"), ("video,aspect,rating\nv,motion,0.9\n", "line 2.*'0.9'"),
    ("video,aspect,rating\nv,motion,nan\n", "line 2.*'nan'"), ("video,aspect,rating\nv,motion\n", "line 2.*rating=''"),
    ("video,aspect,rating\n,motion,3\n", "line 2.*video=''"), (b"\xff\xd8\xff\xe0\x00", "is not text"),
])
def test_malformed_ratings_name_the_file_and_the_line(tmp_path, text, said):
    path = write(tmp_path / "r.csv", text)
    with pytest.raises(MediaError, match=f"r.csv.*{said}") as caught:
        read_ratings(path)
    assert "\n" not in str(caught.value)


def test_ratings_that_are_not_there_are_reported(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(MediaError, match="cannot be read"):
            read_ratings(path)


def test_rank_correlations_of_hand_computed_cases():
    a, b = [1, 2, 2, 4], [1, 3, 2, 4]                # ranks of a: 1 2.5 2.5 4
    assert spearman(a, b) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert kendall(a, b) == pytest.approx(5 / math.sqrt(5 * 6))
    assert pairwise_accuracy(a, b) == pytest.approx(5.5 / 6)
    assert spearman([1, 5, 9], [3, 2, 1]) == kendall([1, 5, 9], [3, 2, 1]) == -1


def cases():
    rng = np.random.default_rng(0)
    for n, levels in product((2, 3, 7, 20), (2, 4, 1000)):
        yield rng.integers(0, levels, n), rng.integers(0, levels, n) / 7, rng.integers(0, 3, n)


def test_rank_statistics_equal_loops_over_pairs():
    """tau-b = (alike - apart) / sqrt((pairs - ties in a)(pairs - ties in b)); Spearman: Pearson of counted ranks."""
    for a, b, group in cases():
        alike = apart = tied_a = tied_b = pairs = right = inside = 0
        for i, j in combinations(range(len(a)), 2):
            product_ = (a[i] - a[j]) * (b[i] - b[j])
            pairs, alike, apart = pairs + 1, alike + (product_ > 0), apart + (product_ < 0)
            tied_a, tied_b = tied_a + (a[i] == a[j]), tied_b + (b[i] == b[j])
            if b[i] != b[j] and group[i] == group[j]:
                inside += 1
                right += 1 if product_ > 0 else 0.5 if product_ == 0 else 0
        below = math.sqrt((pairs - tied_a) * (pairs - tied_b))
        same = lambda x, y: x == pytest.approx(y, abs=1e-9, nan_ok=True)
        assert same(kendall(a, torch.tensor(b)), (alike - apart) / below if below else math.nan)
        assert same(pairwise_accuracy(a, b, group), right / inside if inside else math.nan)
        total = pairs - tied_b
        assert same(pairwise_accuracy(torch.tensor(a), b),
                    (alike + (total - alike - apart) / 2) / total if total else math.nan)
        counted = [[sum(y < x for y in s) + (sum(y == x for y in s) + 1) / 2 for x in s] for s in (a, b)]
        assert same(spearman(a, b), np.corrcoef(counted)[0, 1] if below else math.nan)


def test_statistics_are_nan_where_they_are_undefined():
    for f in (spearman, kendall):
        assert all(math.isnan(f(*pair)) for pair in [([], []), ([1], [2]), ([1, 1], [1, 2]), ([1, math.nan], [1, 2])])
    assert math.isnan(pairwise_accuracy([1, 2], [3, 3])) and math.isnan(pairwise_accuracy([1, 2], [3, 4], [0, 1]))
    assert all(map(math.isnan, bootstrap(spearman, [], []))) and all(map(math.isnan, bootstrap(spearman, [1], [1])))


def test_the_bootstrap_interval_is_that_of_the_mean_s_normal_theory():
    """For the mean of n items: value +- 1.96 std / sqrt(n)."""
    x = np.random.default_rng(1).normal(size=400)
    value, low, high = bootstrap(lambda x: x.mean(), x)
    assert value == x.mean()
    assert (low, high) == pytest.approx((value - 1.96 * x.std() / 20, value + 1.96 * x.std() / 20), abs=0.012)
    assert (low, high) == bootstrap(lambda x: x.mean(), x)[1:] != bootstrap(lambda x: x.mean(), x, seed=1)[1:]


def test_bootstrap_resamples_items_not_each_array():
    """A judge that is the truth agrees with it in every resampling."""
    assert bootstrap(spearman, torch.arange(9), torch.arange(9)) == pytest.approx((1, 1, 1))


def test_the_ceiling_is_one_for_raters_of_one_mind_and_zero_for_noise():
    assert rater_ceiling([[k, k, k] for k in range(1, 6)]) == pytest.approx(1)
    noise = np.random.default_rng(0).integers(1, 6, (300, 4)).tolist()
    assert abs(rater_ceiling(noise, 20)) < 0.15
    assert rater_ceiling(noise, 1) == rater_ceiling(noise, 1) != rater_ceiling(noise, 1, seed=1)
    assert math.isnan(rater_ceiling([])) and math.isnan(rater_ceiling([[1], [2], [3]]))
    assert math.isnan(rater_ceiling([[1, 2], [3]]))


def test_the_ceiling_equals_the_reliability_of_half_the_raters():
    """Truth t, noise e of variance 1 in each of 4 raters: halves correlate by var t / (var t + 1 / 2)."""
    rng = np.random.default_rng(0)
    ratings = rng.normal(size=(2000, 1)) + rng.normal(size=(2000, 4))
    rank = 6 / math.pi * math.asin(1 / 1.5 / 2)                                      # Spearman of a Gaussian pair
    assert rater_ceiling(ratings.tolist(), 5) == pytest.approx(rank, abs=0.03)


def test_isotonic_pools_by_hand():
    x, y = isotonic([4, 1, 2, 3, 5, 5], [3, 1, 4, 2, 6, 4])
    assert x.tolist() == [1, 3, 5] and y.tolist() == [1, 3, 5]                      # (4, 2, 3) is one block; ties at 5
    x, y = isotonic(torch.tensor([1.0, 2.0, 3.0]), [3, 2, 1])
    assert x.tolist() == [2] and y.tolist() == [2]


def test_isotonic_has_the_least_squared_error_of_all_monotone_fits():
    """The best monotone fit is piecewise constant on some split of the sorted items: try all of them."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        n = rng.integers(1, 8)
        x, y = np.arange(n), rng.integers(0, 6, n).astype(float)
        best = math.inf
        for cuts in product((0, 1), repeat=n - 1):
            block = np.cumsum([0, *cuts])
            mean = np.array([y[block == k].mean() for k in range(block[-1] + 1)])
            if (np.diff(mean) >= 0).all():
                best = min(best, ((mean[block] - y) ** 2).sum())
        kx, ky = isotonic(x, y)
        assert (np.diff(kx) > 0).all() and (np.diff(ky) > 0).all()
        sizes, start = [], 0                         # items lie at 0, 1, ..: a block's centre tells its size
        for centre in kx:
            sizes.append(round(2 * (centre - start)) + 1)
            start += sizes[-1]
        owner = np.repeat(np.arange(len(kx)), sizes)
        assert ((ky[owner] - y) ** 2).sum() == pytest.approx(best)


def test_calibration_rises_between_centres_and_is_clamped_outside():
    knots = isotonic([1, 2, 3, 4], [1, 3, 2, 5])     # centres (1, 1), (2.5, 2.5), (4, 5)
    scores = torch.tensor([[0.0, 1.0], [1.75, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(calibrate(scores, knots), torch.tensor([[1, 1], [1.75, 5]], dtype=torch.float64))
    assert (np.diff(calibrate(np.linspace(1, 4, 50), knots)) > 0).all()
    assert calibrate(torch.zeros(3), knots).dtype == torch.float32


def test_a_calibration_survives_the_disk(tmp_path):
    knots = isotonic(torch.rand(9), torch.rand(9))
    save_calibration(tmp_path / "c.json", {"motion": knots})
    read = load_calibration(tmp_path / "c.json")
    assert list(read) == ["motion"] and all((a == b).all() for a, b in zip(read["motion"], knots))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "\x00", '{"beauty": [[1], [1]]}', '{"motion": [[1, 2], [1]]}',
                                  '{"motion": [[], []]}', '{"motion": [[1, 2]]}', '{"motion": [[2, 1], [1, 2]]}',
                                  '{"motion": [[1, 2], [NaN, 2]]}', '{"motion": [["a"], [1]]}', '{"motion": null}',
                                  '{"motion": {"x": 1}}'])
def test_a_malformed_calibration_is_one_clear_line(tmp_path, text):
    with pytest.raises(MediaError, match="c.json: is not a calibration") as caught:
        load_calibration(write(tmp_path / "c.json", text))
    assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="cannot be read"):
        load_calibration(tmp_path / "none.json")


def test_the_table_tells_agreement_and_saves_what_can_be_fitted(tmp_path):
    """lip_sync: seven videos, judged in order; expressiveness: judged upside down; motion: two videos."""
    rows = [(f"v{i}", "lip_sync", [1 + i / 2, 1 + i / 2]) for i in range(7)]
    rows += [(f"v{i}", "expressiveness", [1 + i / 2]) for i in range(7)] + [(f"v{i}", "motion", [2, 3]) for i in (0, 1)]
    judge = {(video, aspect): int(video[1]) * (-1 if aspect == "expressiveness" else 1) for video, aspect, _ in rows}
    table = align(judge, rows, tmp_path / "c.json").splitlines()
    assert table[1].split()[:3] == ["lip_sync", "7", "14"] and table[1].count("1.00 [1.00, 1.00]") == 3
    assert table[1].endswith(" 1.00") and table[2].endswith(" nan")
    assert table[2].count("-1.00 [-1.00, -1.00]") == 2 and "0.00 [0.00, 0.00]" in table[2]
    assert table[3].split()[:6] == ["motion", "2", "4", "nan", "[nan,", "nan]"]
    assert "expressiveness: no calibration; the judge does not rise" in table[4]
    assert "motion: no calibration; 2 videos rated, 5 needed" in table[5]
    x, y = load_calibration(tmp_path / "c.json")["lip_sync"]
    assert x.tolist() == list(range(7)) and y.tolist() == [1 + i / 2 for i in range(7)]
    with pytest.raises(MediaError, match="v9: people rated its motion"):
        align(judge, rows + [("v9", "motion", [3])])
