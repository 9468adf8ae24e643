"""What train.py teaches, and by what: the loss, the clips that are picked, updates of GRPO, looks and
controls."""

import json
import math
import shutil
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import grpo
import sample
import train
from data import Clip, Clips, log_mel
from extras.files import MediaError, fitting
from extras.media import SAMPLES_PER_FRAME
from extras.sync import load_sync
from extras.talkers import FAULTS, render_talker
from model import Generator, load_generator
from reward import ASPECTS, COMPONENTS, REWARD_SYNC, JudgeError, rate_whole
from tiny import ALONE, POST, TINY, WHOLE, Brightness, Taste, assert_same_bits, logged, same_weights, state

ARMS = "pretrained", "curated", "post-trained", "more curation", "GRPO without curation", "more pretraining"


def random_latents() -> train.Latents:
    return train.Latents(torch.zeros(5, 3, 32, 32).byte(), torch.zeros(5, 12, 4), torch.randn(5, 3, 10, 8))


def test_the_loss_is_the_velocity_error_of_the_levels_it_draws():
    """Of a stand-in that predicts half of what it sees, a loop computes the weighted mean square."""
    args, seen = train.parse_arguments([*TINY, "--context-noise", "0", "--batch", "16"]), {}

    def velocity(portrait, mel, context, noisy, sigma, heard):
        seen.update(noisy=noisy, sigma=sigma, clean=context)
        return noisy / 2
    error, level = train.flow_matching_loss(velocity, train.draw_batch(random_latents(), args, step=7))
    bins = train.by_noise_level(error, level)
    total, by_bin = [], [[] for _ in bins]
    for b in range(16):
        for k in range(3):
            sigma, clean, noisy = seen["sigma"][b, 0, k].item(), seen["clean"][b, k], seen["noisy"][b, 0, k]
            noise = (noisy - (1 - sigma) * clean) / sigma
            gap = noisy / 2 - (noise - clean)
            total.append(min(sigma / 0.2, 1) ** 2 * (gap ** 2).mean().item())
            by_bin[int(sigma * len(bins))].append(total[-1])
    assert level.min() < 0.2 and error.flatten().tolist() == pytest.approx(total, rel=1e-4)
    for value, members in zip(bins, by_bin):
        assert value == (pytest.approx(sum(members) / len(members), abs=1e-4) if members else None)


def test_seed_and_step_draw_the_batch_a_tenth_of_it_without_sound():
    data = random_latents()

    def drawn(seed, step):
        args = train.parse_arguments([*TINY, "--batch", "1000", "--seed", f"{seed}"])
        *_, noise, _, heard = train.draw_batch(data, args, step)
        assert heard.float().mean().item() == pytest.approx(0.9, abs=0.03)
        return noise
    assert torch.equal(drawn(0, 3), drawn(0, 3))
    assert not torch.equal(drawn(0, 3), drawn(1, 3)) and not torch.equal(drawn(0, 3), drawn(0, 4))


def test_a_head_moves_half_as_that_of_another_clip_and_a_face_as_its_own():
    """Where pose i is the unit vector e_i, a mixed one is (e_own + e_other) / sqrt(2), with any other clip,
    and all have the variance of unmixed ones, 1/5 * 4/5 a channel."""
    data, args = random_latents(), train.parse_arguments([*TINY, "--batch", "1000"])
    data.clean[:, :, -1] = torch.eye(5, 8)[:, None]
    faces = data.clean[:, :, :-1].clone()
    clean = train.draw_batch(data, args, step=0)[2][:, 0]                            # (B, K, N, C)
    own = (clean[:, None, :, :-1] == faces).flatten(2).all(2).long().argmax(1)
    assert torch.equal(clean[:, :, :-1], faces[own]) and own.unique().tolist() == [0, 1, 2, 3, 4]
    other = clean[:, :, -1] * math.sqrt(2) - torch.eye(5, 8)[own][:, None]
    which = other.argmax(-1)
    torch.testing.assert_close(other, torch.eye(5, 8)[which])
    assert (which == which[:, :1]).all()                                             # one path, all along
    assert torch.bincount(5 * own + which[:, 0]).min() > 20
    assert clean[:, 0, -1, :5].var(0).tolist() == pytest.approx([0.16] * 5, abs=0.02)


def test_the_average_forgets_slowly_and_at_first_fast():
    """After 90 steps its decay is 90 / 100 at most: of zeros and ones .1, and with a decay of .5 then .55."""
    args = train.parse_arguments(TINY)
    stage = train.Stage("a stage", Generator(args.config), args, 100)
    stage.step = 90
    stage.average["no_audio"].fill_(0), stage.model.no_audio.data.fill_(1)
    for decay, want in (0.95, 0.1), (0.5, 0.55):
        stage.blend(decay)
        assert stage.average["no_audio"].mean().item() == pytest.approx(want)


def test_what_chooses_the_checkpoint_is_not_reported_and_neither_has_faults():
    parts = train.load_clips(train.parse_arguments([*WHOLE, "--validate-clips", "3"]), watch=2)
    faulty = [{name for clip in clips for name in clip.truth if name.startswith("fault")} for clips in parts]
    assert faulty == [{f"fault_{name}" for name in FAULTS}, set(), set()]
    clips, reported, watched = ({clip.name for clip in clips} for clips in parts)
    assert len(clips) == 6 and len(reported) == 3 and len(watched) == 2
    assert not clips & reported and not clips & watched and not reported & watched


def picks(judge, *flags, change=lambda clips: clips):
    args = train.parse_arguments([*TINY, "--curate", "0.5", *flags])
    clips = change(train.load_clips(args)[0])
    return train.pick_clips(judge, clips, args), clips


def numbers(clips) -> list[int]:
    return sorted(int(clip.name.split("-")[2]) for clip in clips)


def judge_of(name: str, change=lambda known: None) -> Taste:
    """A judge whose ratings are not kept for another's."""
    judge = Taste()
    judge.fingerprint, judge.known = name, Taste.known.clone()
    change(judge.known)
    return judge


def test_what_a_judge_could_not_rate_is_said_every_time_and_asked_again_where_it_is_deleted(capsys):
    judge = judge_of("odd", lambda known: known[1].fill_(math.nan))
    for asked in 6, 6, 12:
        ratings = picks(judge)[0].ratings
        assert len(judge.asked) == asked and ratings.isnan().any() == (asked == 6)
        if asked == 6:
            note = "note: 1 of 6 clips are unrated; to ask again, delete "
            _, _, kept = capsys.readouterr().out.partition(note)
        if judge.known.isnan().any():
            judge.known = Taste.known
        else:
            shutil.rmtree(kept.splitlines()[0])
    assert "unrated" not in capsys.readouterr().out


def test_the_judge_picks_by_its_ratings_alone(monkeypatch):
    """By hand: half of six clips by the sum, two exemplars by motion, in whatever order the clips
    come. They are rated once, and the CPU time of that is kept."""
    monkeypatch.setattr(train, "EXEMPLARS", 2)
    monkeypatch.setattr(train, "RATED_AT_ONCE", 4)
    judge = judge_of("once")
    for change in (lambda clips: clips, lambda clips: clips[::-1], lambda clips: clips):
        picked, clips = picks(judge, change=change)
        assert numbers(clips[i] for i in picked.curated) == [0, 2, 4]
        assert numbers(picked.exemplars) == [0, 2]
        assert picked.cpu_seconds > 0
    assert len(judge.asked) == 12                                      # once in either order
    assert len(picks(judge, "--curate", "0")[0].curated) == 0          # no curation, but exemplars


def test_a_clip_without_a_rating_is_never_picked_and_a_judge_that_rates_none_is_refused(monkeypatch):
    """Also where fewer clips are rated than are wanted: of six with two sums, three shall be picked. Of a
    judge that goes away after the first of two groups of three, spread over the set, those three are kept."""
    def silence(known):
        known[[0, 2, 4], 0], known[3] = math.nan, math.nan
    picked, _ = picks(judge_of("silent", silence))
    assert picked.curated.tolist() == [1, 5]
    assert numbers(picked.exemplars) == [0, 1, 2, 4, 5]
    with pytest.raises(JudgeError, match="the judge: rates none of the 6 training clips; use an"):
        picks(judge_of("mute", lambda known: known[:, 0].fill_(math.nan)))
    monkeypatch.setattr(train, "RATED_AT_ONCE", 3)
    judge = judge_of("away")
    rate = judge.rate

    def away(*clips):
        if judge.asked:
            raise ConnectionRefusedError("is away")                   # as a judge of your own may raise
        return rate(*clips)
    judge.rate = away
    with pytest.raises(JudgeError, match="the judge: cannot be asked .is away.; is its server up"):
        picks(judge)
    judge.rate = rate
    assert numbers(picks(judge)[0].exemplars) == [0, 1, 2, 3, 4, 5]
    assert [name.split("-")[2] for name in judge.asked] == ["0", "2", "4", "1", "3", "5"]


def test_without_a_judge_the_confidence_of_a_sync_network_ranks_the_clips(videos):
    data = ["--data", str(videos[0]), "--crop", "none"]
    picked, clips = picks(None, *data, "--reward-sync", str(REWARD_SYNC))
    confidence = sample.sync_metrics(load_sync(REWARD_SYNC), train.pixels(clips, 24),
                                     train.sounds(clips, 24))["sync_confidence"]
    best = confidence.argsort()[len(clips) - round(len(clips) / 2):]
    assert sorted(picked.curated.tolist()) == sorted(best.tolist())


def test_later_stages_are_left_out_where_nothing_knows_the_clips(videos, tmp_path, capsys):
    """--data with neither a judge nor a sync network: one line says so, and the run is one of pretraining,
    with the metrics of real clips. It can be resumed, and with a sync network it does the rest."""
    folder = tmp_path / "run"
    few = "--steps 1 --curate-steps 1 --updates 1 --crop 0,0,32".split()
    train.main([*WHOLE, *few, "--data", str(videos[0]), "--crop", "none", "--out", str(folder)])
    said = capsys.readouterr().out
    assert said.count("no curation and no post-training: neither a judge nor a sync network knows") == 1
    arm, = (e for e in logged(folder) if "held_out" in e)
    assert arm["arm"] == "pretrained"
    assert {"lip_correlation", "late_correlation", "over_late", "amplitude", "offset"} <= set(arm["held_out"])
    train.main(["--resume", str(folder), "--reward-sync", str(REWARD_SYNC)])
    assert len(logged(folder, "curation")) == len(logged(folder, "post-training")) == 1


def test_flags_choose_the_reward():
    args = train.parse_arguments([*TINY, "--weights", "background=2,seams=0"])
    clips, _, _ = train.load_clips(args)
    make = lambda args: train.make_reward(args, None, clips, args.config.chunk_frames)
    weights = {k: c.weight for k, c in COMPONENTS.items() if k[6:] not in ASPECTS and k != "seams"}
    assert make(args).weights == weights | {"background": 2.0}
    alone = make(train.parse_arguments([*TINY, "--reward-sync", "none"]))
    assert alone.sync is None and "sync" not in alone.weights


def test_a_run_leaves_everything_it_names_and_logs_every_step(finished):
    """What was taught before in folders of their own, the best policy on top; each arm measured twice."""
    assert {p.name for p in finished.iterdir()} >= {
        "config.json", "model.safetensors", "state.pt", "curate.pt", "post.pt", "log.jsonl", "sheet.png",
        "clip-1.mp4", "portrait.png", "speech.wav", "held_out.json", "report.md", "pretrained", "curated",
        "control"}
    assert Image.open(finished / "sheet.png").size == (12 * 32, 2 * 7 * 32)
    entries = logged(finished)
    assert [e["step"] for e in logged(finished, "pretraining")] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in logged(finished, "curation")] == [1, 2, 3]
    looks = [e for e in entries if "watched" in e]
    assert [e["step"] for e in looks if e["stage"] == "curation"] == [0, 2, 3]        # at each half or after
    assert [e["update"] for e in looks if e["stage"] == "post-training"] == [0, 2, 4]
    updates = logged(finished, "post-training")
    assert [e["update"] for e in updates] == [1, 2, 3, 4]
    for entry in updates:
        first, second = entry["parts"]
        assert set(entry["components"]) == {*COMPONENTS, "total"}
        assert entry["seconds_for"].keys() == {"rollout", "reward", "update"}
        assert abs(first["ratio_max"][0] - 1) <= 1e-6 < abs(second["ratio_max"][0] - 1)      # 1, then off 1
        assert first["grad_norm"] > 0 and entry["sigma"] == pytest.approx(2 / 3)
    assert sorted((e["arm"], e["sampler"]) for e in entries if "arm" in e) == sorted(
        (arm, sampler) for arm in ARMS for sampler in ("ode", "cps"))
    funnel, = (e["funnel"] for e in entries if "funnel" in e)
    assert [row["fault"] for row in funnel] == ["offset", "offset, once in time", *list(FAULTS)[1:]]
    assert "rewarded" in entries[-1] and len(json.loads((finished / "held_out.json").read_text())["cps"]) == 6
    for folder in finished, finished / "pretrained", finished / "curated", *(finished / "control").iterdir():
        load_generator(folder)


class Garbled(Clips):
    """Clips with the record of another's faults, or with nonsense."""

    def __getitem__(self, i):
        clip = super().__getitem__(i)
        if isinstance(i, int):
            other = super().__getitem__((i + 1) % len(self)).truth
            faults = {k: v for k, v in other.items() if k.startswith("fault")}
            clip.truth |= faults if i else dict.fromkeys(faults, torch.tensor(math.nan))
        return clip


@pytest.mark.parametrize("way", ["with garbled faults", "from the pretrained run"])
def test_the_stages_end_with_the_same_bits(finished, taste, unmeasured, tmp_path, monkeypatch, way):
    """Nothing that trains, judges or picks reads what was done to a clip; --pretrained repeats the rest."""
    flags, load = ["--pretrained", str(finished), *POST], train.load_clips
    if way == "with garbled faults":
        flags = [*WHOLE]
        monkeypatch.setattr(train, "make_judge", lambda args: judge_of("garbled"))
        monkeypatch.setattr(train, "load_clips", lambda args, watch: (
            Garbled((found := load(args, watch))[0].folder, found[0].rows), *found[1:]))
    train.main([*flags, "--out", str(tmp_path)])
    assert_same_bits(finished, tmp_path, "state.pt", "curate.pt", "post.pt")
    one, other = (logged(folder, "post-training") for folder in (finished, tmp_path))
    assert [e["components"] for e in one] == [e["components"] for e in other] and len(one) == 4
    assert same_weights(finished, tmp_path)


def test_the_checkpoint_is_chosen_by_lips_and_loses_by_too_much_motion_and_by_too_little():
    """By hand: lip_correlation, of real clips beyond another clip's, less .1 |log amplitude|, and .1 log of
    all motion and .05 log of the head's where there is too much."""
    def score(lips, **metrics):
        right = dict(lip_correlation=lips, amplitude=[1.0, 1.0], frame_change=[0.5, 1.5], head=[0.9, 0.5])
        return train.held_out_score({k: torch.tensor(v) for k, v in (right | metrics).items()})
    half = math.log(2)
    assert score([0.9, 0.7]) == pytest.approx(0.8)
    assert score([0.9, 0.7], over_other=[0.6, 0.4]) == pytest.approx(0.5)
    assert score([0.6], amplitude=[0.5]) == pytest.approx(0.6 - 0.1 * half)
    assert score([0.6], frame_change=[2.0]) == pytest.approx(0.6 - 0.1 * half)
    assert score([0.6], head=[2.0, 2.0]) == pytest.approx(0.6 - 0.05 * half)
    assert score([0.6], frame_change=[0.5], head=[0.5]) == pytest.approx(0.6)     # it may rest


def a_still_one(clip: Clip) -> Clip:
    """The picture of a clip with its sound, silent in the middle."""
    audio = clip.audio.clone()
    audio[len(audio) // 3: len(audio) // 2] = 0
    truth = clip.truth and clip.truth | {
        k: clip.truth[k][:1].expand_as(clip.truth[k]) for k in ("opening", "width")}
    return Clip("still", clip.frames[:1].expand_as(clip.frames), audio, truth)


@pytest.mark.parametrize("known", [True, False])
def test_a_still_clip_does_not_decide_a_mean_nor_change_another_s_ratio_and_stills_alone_are_refused(known):
    """By hand, for clips that move: a value divided by that of the true clip."""
    clips = [render_talker(i, 7, 32, 32) for i in range(4)]
    clips = clips if known else [Clip(c.name, c.frames, c.audio) for c in clips]
    shown = torch.stack([c.frames for c in clips]).roll(1, 1) / 255
    alone = sample.evaluate(shown, clips, 4)
    mixed = sample.evaluate(torch.cat([shown, shown[:1]]), [*clips, a_still_one(clips[0])], 4)
    assert all(values.isfinite().all() for values in mixed.values())
    for name, measure in (("frame_change", sample.frame_change), ("jerk_ratio", sample.jerk)):
        want = [measure(v).item() / measure(c.frames / 255).item() for v, c in zip(shown, clips)]
        assert alone[name].tolist() == pytest.approx(want, rel=1e-3)
        assert mixed[name][:4].tolist() == pytest.approx(want, rel=1e-3)
    for name in "frame_change", "jerk_ratio", "amplitude":
        assert mixed[name].max() < 8 and mixed[name].mean() < 3, name
    assert abs(train.held_out_score(mixed) - train.held_out_score(alone)) < 0.5
    stills = [a_still_one(clip) for clip in clips]
    nothing = sample.evaluate(torch.stack([c.frames for c in stills]) / 255, stills, 4)
    assert all(values.isfinite().all() for values in nothing.values())
    assert nothing["frame_change"].abs().max() == 0
    args = train.parse_arguments(TINY)
    with pytest.raises(MediaError, match="--clips: shows nothing that moves; add videos"):
        train.fit_codec(Generator(args.config), stills, args)


def test_the_best_that_was_looked_at_is_kept_and_later_ones_are_not(finished, bright, tmp_path, monkeypatch):
    """Held-out scores .5, .9, .8 at updates 0 .. 2: the average of update 1 it is."""
    scores, seen, look = iter([0.5, 0.9, 0.8]), [], train.Stage.look
    monkeypatch.setattr(train, "held_out_score", lambda metrics: next(scores))

    def noting(self, clips):
        seen.append({k: v.clone() for k, v in self.average.items()})
        return look(self, clips)
    monkeypatch.setattr(train.Stage, "look", noting)
    train.main(["--pretrained", str(finished), "--out", str(tmp_path), *POST, "--updates", "2"])
    post = state(tmp_path, "post.pt")
    assert (post["update"], post["best"]["step"], post["best"]["score"]) == (2, 1, 0.9) and len(seen) == 3
    assert all(torch.equal(v, seen[1][k]) for k, v in load_generator(tmp_path).state_dict().items())


@pytest.mark.parametrize("watched, kept", [(24, [0, 1, 1]), (23, [0, 1, 2])])
def test_flow_matching_keeps_its_last_where_few_clips_are_watched(watched, kept, monkeypatch):
    """Of scores .5, .9, .8: the second by enough clips, the third by fewer. GRPO, which overshoots, keeps the
    second by any number."""
    monkeypatch.setattr(train, "validate", lambda *of: ({}, None))
    for kind in train.FlowMatching, train.PostTraining:
        scores = iter([0.5, 0.9, 0.8])
        monkeypatch.setattr(train, "held_out_score", lambda metrics: next(scores))
        args = train.parse_arguments(TINY)
        stage = kind("curation", None, args) if kind is train.FlowMatching else kind(
            "post-training", Generator(args.config), None, None, [], args)
        chosen = []
        for stage.step in range(3):
            stage.look([None] * watched)
            chosen.append(stage.best["step"])
        assert chosen == (kept if kind is train.FlowMatching else [0, 1, 1])


def test_sampling_with_noise_is_paired_and_reproducible(finished):
    """The same noise for every arm: two runs agree, whatever stands in the batch, and it is no ODE."""
    args = train.parse_arguments([*TINY, "--sampling-steps", "4", "--rollout-steps", "4"])
    model, clips = load_generator(finished).eval(), train.load_clips(args)[1]
    both, one = (train.validate(model, clips[:n], args, noisy=True)[1] for n in (2, 1))
    assert torch.allclose(both[:1], one, atol=1e-5)
    assert not torch.allclose(both, train.validate(model, clips, args)[1], atol=1e-3)


def test_controls_spend_the_cpu_time_of_what_they_are_compared_with(finished):
    """More curation that of post-training, more pretraining that of uncurated GRPO: to within a step."""
    spent = {e["control"]: e for e in logged(finished) if "control" in e}
    budget = {"more curation": state(finished, "post.pt")["cpu_seconds"],
              "more pretraining": spent["GRPO without curation"]["cpu_seconds"]}
    for name, seconds in budget.items():
        one = spent[name]["cpu_seconds"]
        assert seconds <= one < seconds + 0.25 and spent[name]["steps"] > 3, name
        saved = state(finished / "control" / name.replace(" ", "-"))
        assert (saved["cpu_seconds"], saved["step"]) == (one, spent[name]["steps"])
    assert spent["GRPO without curation"]["steps"] == 4


def test_pretraining_hears_clips_as_found_and_what_the_judge_picks_among_in_time(
        tmp_path, taste, unmeasured, monkeypatch):
    """So do the controls that go on with each; and what the reward hears is what the generator does."""
    stages, carry_out = {}, train.carry_out
    late = lambda clips, args: (Clips(clips.folder, clips.rows, clips.index | {"late": {0: 3, 2: -2}}), 7.0)
    monkeypatch.setattr(train, "put_in_time", late)
    monkeypatch.setattr(train, "carry_out", lambda stage, *rest: (stages.update({stage.name: stage}),
                                                                  carry_out(stage, *rest))[1])
    train.main([*WHOLE, "--control", "--out", str(tmp_path)])
    clips = train.load_clips(stages["pretraining"].args)[0]
    found, in_time = (torch.stack([log_mel(clip.audio, 24) for clip in some])
                      for some in (clips, late(clips, None)[0]))
    picked = [4, 0, 2]                                   # the best sums of Taste: 11, 10, 10
    for name in "pretraining", "more pretraining":
        assert torch.equal(stages[name].data.mel, found)
    for name in "curation", "more curation":
        assert torch.equal(stages[name].data.mel, in_time[picked]) and stages[name].cpu_seconds > 7 * (
            name == "curation")
    for name in "post-training", "GRPO without curation":
        assert torch.equal(stages[name].data.mel, in_time)
        assert torch.equal(stages[name].clips[0].audio, late(clips, None)[0][0].audio)


@pytest.fixture
def bright(unmeasured, monkeypatch):
    """Instead of the reward, and of a judge: nothing is curated."""
    reward = Brightness()
    monkeypatch.setattr(train, "make_reward", lambda *args: reward)
    monkeypatch.setattr(train, "pick_clips", lambda judge, clips, *_: train.Picks(
        torch.empty(0).long(), clips))
    return reward


def first_updates(run, folder, *more):
    train.main(["--pretrained", str(run), "--out", str(folder), *POST, "--looks", "1", "--parts", "1", *more])
    return [e for e in logged(folder) if "parts" in e]


@pytest.mark.parametrize("more", [
    "", "--credit chunk --group-noise different --sampler flow-sde --kl-weight 0"])
def test_micro_batches_save_memory_and_change_nothing_else(finished, bright, tmp_path, more):
    """Six rollouts at once, or as 4 + 2: the same loss, gradient and statistics, whatever the choices."""
    made = [first_updates(finished, tmp_path / n, "--updates", "1", "--micro-batch", n, *more.split())
            for n in ("6", "4")]
    whole, split = (entries[0]["parts"][0] for entries in made)
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert whole["grad_norm"] > 1e-4 and [len(names) for names in bright.asked] == [6, 6]


def test_every_update_has_prompts_and_noise_of_its_own_and_repeats_its_rollout(
        finished, bright, tmp_path, monkeypatch):
    """Where nothing is learned, that tells them apart. A rescoring that is off by 1e-4 stops the run."""
    norms = [e["parts"][0]["grad_norm"] for e in first_updates(finished, tmp_path / "a", "--post-lr", "0")]
    assert len(set(bright.asked)) > 1 and len(set(norms)) == 4
    rescore = grpo.rescore
    monkeypatch.setattr(grpo, "rescore", lambda *args: [part + 1e-4 for part in rescore(*args)])
    with pytest.raises(RuntimeError, match="does not repeat the rollout"):
        first_updates(finished, tmp_path / "b")


FULL = [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        BrokenProcessPool("A process in the process pool was terminated abruptly")]


def test_too_little_memory_is_one_line_that_says_what_to_lower(unmeasured, tmp_path, monkeypatch):
    """For a run, and for a judge. Other errors stay what they are."""
    for full in FULL:
        with pytest.raises(MediaError, match="^this: does not fit.*; that$"), fitting("this", "that"):
            raise full
    with pytest.raises(RuntimeError, match="shapes"), fitting("this", "that"):
        raise RuntimeError("shapes do not match")

    def fail(*_):
        raise MemoryError
    monkeypatch.setattr(train.FlowMatching, "take_step", fail)
    with pytest.raises(MediaError, match="^pretraining: does not fit into memory; lower --batch[^\n]*$"):
        train.main([*ALONE, "--out", str(tmp_path)])
    with pytest.raises(MediaError, match="the judge: does not fit into memory; lower --judge-batch"):
        rate_whole(SimpleNamespace(window=None, rate=fail), torch.zeros(1, 8, 3, 32, 32),
                   torch.zeros(1, 8 * SAMPLES_PER_FRAME), ["clip"])


def test_controls_that_were_stopped_go_on_with_the_same_budgets(finished, taste, unmeasured, tmp_path):
    """The last was under way: it alone is done again, for the time that GRPO without curation took."""
    folder = shutil.copytree(finished, tmp_path / "run")
    name, other = "more pretraining", folder / "control" / "GRPO-without-curation" / "state.pt"
    shutil.rmtree(folder / "control" / "more-pretraining")
    torch.save(state(other.parent) | {"cpu_seconds": 0.2}, other)
    before = (folder / "log.jsonl").read_text()
    train.main(["--resume", str(folder)])
    steps = [e["step"] for e in logged(folder, name)]
    assert steps == [*range(1, len(steps) + 1)]                        # those of the first time are gone
    added = [e for e in logged(folder) if "control" in e and json.dumps(e) not in before]
    assert [e["control"] for e in added] == [name] and 0.2 <= added[0]["cpu_seconds"] < 0.8
