"""What a run shows at its end: the funnel, against loops; the report itself is tested with a run, in test_train.py."""

import json
import math

import pytest
import torch

from extras.report import PAIRS, funnel, funnel_table, paired


def test_the_funnel_counts_pairs_in_which_the_flawless_clip_is_rated_higher():
    """AUC by a loop over pairs, a tie is half; the aspect that finds best; a clip without a rating counts in shares and
    in no rating."""
    rng = torch.Generator().manual_seed(0)
    strength = torch.randint(-2, 3, (40,), generator=rng) * 0.5
    ratings = torch.randint(1, 6, (40, 3), generator=rng).float()                    # many ties
    ratings[:, 2] -= 2 * strength.abs()
    ratings[5, 1] = math.nan
    picked = torch.tensor([1, 4, 5, 30])
    row, = funnel({"offset": strength}, ratings, picked)
    aucs = []
    for aspect in range(3):
        wins = [1.0 * (good > bad) + 0.5 * (good == bad)
                for i, good in enumerate(ratings[:, aspect].tolist()) if strength[i] == 0 and i != 5
                for j, bad in enumerate(ratings[:, aspect].tolist()) if strength[j] != 0 and j != 5]
        aucs.append(sum(wins) / len(wins))
    assert row["auc"] == pytest.approx(max(aucs)) and row["aspect"] == aucs.index(max(aucs)) == 2
    has = [i for i in range(40) if strength[i] != 0]
    assert row["share"] == len(has) / 40 and row["strength"] == pytest.approx(sum(map(abs, strength.tolist())) / 40)
    assert row["rated_with"] == pytest.approx([ratings[[i for i in has if i != 5], a].mean().item() for a in range(3)])
    assert row["share_picked"] == sum(i in has for i in picked.tolist()) / 4
    assert row["strength_picked"] == pytest.approx(sum(abs(strength[i].item()) for i in picked) / 4)
    assert "| offset |" in funnel_table([row]) and "| motion |" in funnel_table([row])


@pytest.mark.filterwarnings("error")
def test_a_fault_that_all_clips_have_or_none_has_a_row_without_an_auc():
    rows = funnel({"all": torch.ones(5), "none": torch.zeros(5)}, torch.rand(5, 3), torch.arange(2))
    assert [row["share"] for row in rows] == [1, 0] and all(math.isnan(row["auc"]) for row in rows)
    assert json.loads(json.dumps(rows)) and funnel_table(rows).count("\n") == 4


def test_pairs_are_subtracted_clip_by_clip():
    made = {arm: {"psnr": torch.tensor([float(i), 2.0 * i])} for i, arm in enumerate({b for _, b in PAIRS[:2]} | {"x"})}
    made["post-trained"] = {"psnr": torch.tensor([5.0, 7.0])}
    for title, metrics in paired(made).items():
        first, _, second = title.partition(" minus ")
        assert (first, second) in PAIRS and torch.equal(metrics["psnr"], made[first]["psnr"] - made[second]["psnr"])
