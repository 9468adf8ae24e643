"""The examples of extras/examples, run as README says, with the flags of train.py."""

import runpy
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest

import reward
import train
from extras import reward_flags, session
from extras.files import MediaError
from tiny import POST, SHAPE, logged

LESS = "--clips 6 --steps 2 --curate-steps 1 --updates 2 --group 2 --parts 1 --looks 1".split()


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Run an example as a command. Returns: its run's log. What it puts in place is undone after the test."""
    def run(name, *more):
        monkeypatch.setattr(sys, "argv", [name, *SHAPE, *POST, *LESS, "--out", str(tmp_path / "run"), *more])
        runpy.run_module(f"extras.examples.{name}", run_name="__main__")
        return logged(tmp_path / "run")

    with (patch.object(train, "make_judge", train.make_judge), patch.object(reward, "Reward", reward.Reward),
          patch.object(reward_flags, "make_judge", reward_flags.make_judge),
          patch.dict(reward.COMPONENTS), patch.dict(reward.WEIGHTS)):
        yield run


def test_a_judge_of_your_own_picks_and_rewards_and_can_be_validated(example, monkeypatch, capsys):
    """As its file says, it cannot tell a shift of three frames."""
    log = example("own_judge")
    assert any("funnel" in entry for entry in log)
    updates = [entry for entry in log if "parts" in entry]
    assert len(updates) == 2
    for entry in updates:
        assert all(1 <= entry["components"][f"judge_{aspect}"]["mean"] <= 5 for aspect in reward.ASPECTS)
    monkeypatch.setattr(sys, "argv", ["own_judge", "validate", "--clips", "4"])
    runpy.run_module("extras.examples.own_judge", run_name="__main__")
    assert "lip_sync: do not trust it" in capsys.readouterr().out


def test_a_component_of_your_own_is_one_like_the_others(example):
    """It is logged, has a weight that --weights changes, and counts in the total."""
    log = example("own_reward", "--judge", "none", "--reward-sync", "none", "--weights", "hush=2")
    updates = [entry for entry in log if "parts" in entry]
    assert len(updates) == 2 and all("hush" in entry["components"] for entry in updates)
    said = next(entry["rewarded"] for entry in log if "rewarded" in entry)
    assert "the lower face rests while nobody speaks" in said and "2.00" in said


def test_a_run_goes_on_by_the_script_that_began_it(example, monkeypatch, tmp_path):
    """Another one has another judge or reward. The report names the script, too."""
    mine = SimpleNamespace(train=train, __file__="mine.py", __spec__=None)
    with monkeypatch.context() as main:
        main.setitem(sys.modules, "__main__", mine)
        log = example("own_reward", "--judge", "none", "--reward-sync", "none")
    assert log[0]["command"].startswith("python own_reward --size 32")
    with pytest.raises(MediaError, match="a run of another script, whose .*; python own_reward --resume"):
        train.main(["--resume", str(tmp_path / "run"), "--updates", "3"])
    with monkeypatch.context() as main:                                          # a notebook has no file
        main.setitem(sys.modules, "__main__", SimpleNamespace(train=train))
        assert train.parse_arguments([]).program == "python train.py"
    for same in "python ./own_reward.py", "python -m somewhere.own_reward":
        session.check_program(SimpleNamespace(resume=True, out=tmp_path / "run", program=same))
