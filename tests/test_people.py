"""What reward.py promises of a judge's agreement with people."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch

from data import MediaError
from reward import (align, bootstrap, calibrate, isotonic, kendall, load_calibration, pairwise_accuracy, rater_ceiling,
                    read_ratings, save_calibration, spearman)

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
