"""GRPO: the policy, rollouts, advantages and loss, each against an oracle that shares no code with it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal

import grpo
from grpo import Settings, advantages, check_rescoring, grpo_loss, rescore, reward_to_go, surrogate
from kernels.flow_step import sigma_schedule
from test_model import generator, inputs

SMALL = Settings(group=3, rollout_steps=4, draws=2)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def roll_out(model, settings=SMALL, prompts=2, chunks=3, seed=0):
    steps = grpo.drawing_steps(settings, rng())
    return grpo.roll_out(model, *inputs(model, chunks, prompts), settings, steps, rng(seed))


def nudged(model, size=0.01):
    """The same generator after what might have been an update."""
    other = generator()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn(p.shape, generator=rng(p.numel())))
    return other


FLOORS = dict.fromkeys(("sync", "still", "seam", "hinge", "near", "size"), 1e-3)


def scores(**components):
    return SimpleNamespace(components={k: torch.tensor(v) for k, v in components.items()}, per_chunk={})


# ---------------------------------------------------------------- policy and rollouts

@pytest.mark.parametrize("steps, draws", [(3, 1), (4, 1), (4, 2), (6, 2), (10, 4), (10, 8)])
def test_the_window_never_touches_sigma_1_or_the_last_step(steps, draws):
    """M consecutive steps of the schedule; every allowed place is reached."""
    settings, levels, starts = Settings(rollout_steps=steps, draws=draws), sigma_schedule(steps), set()
    for seed in range(300):
        window = grpo.drawing_steps(settings, rng(seed))
        start = levels.index(window[0][0])
        assert window == [(levels[i], levels[i + 1]) for i in range(start, start + draws)]
        assert window[0][0] < 1 and window[-1][1] > 0
        starts.add(start)
    assert starts == set(range(1, steps - draws))


@pytest.mark.parametrize("wrong, message", [
    (dict(draws=3, rollout_steps=4), "draws must be"), (dict(draws=0), "draws must be"),
    (dict(group=1), "group of 1"), (dict(clip=0.0), "above 0"),
    (dict(sampler="ode"), "sampler must be"), (dict(noise_level=1.5), "out of range"),
    (dict(noise_level=0.0), "draws nothing"), (dict(kl_weight=-1.0), "at least 0"),
    (dict(credit="token"), "credit must")])
def test_settings_that_cannot_work_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_a_rollout_is_generation_with_noise_on_the_window_alone():
    """Replayed by hand: from the kept draws, the ODE leads on to the next draw and to the finished chunk."""
    model = generator()
    rollout = roll_out(model)
    (s0, s1), (_, s2) = rollout.steps
    assert (s0, s1, s2) == (0.75, 0.5, 0.25) and rollout.old_log_prob.shape == (6, 2, 3)
    assert torch.equal(rollout.next_x[:, 0], rollout.x[:, 1])                        # adjacent draws
    level = torch.full((6, 1, 3), s2)
    with torch.no_grad():
        velocity = model(rollout.portrait, rollout.mel, rollout.latents, rollout.next_x[:, 1:], level)[:, 0]
        frames = model.codec.decode(rollout.portrait, rollout.latents)
    assert (rollout.next_x[:, 1] - s2 * velocity - rollout.latents).abs().max() < 1e-5
    assert torch.allclose(frames, rollout.frames, atol=1e-5)


@pytest.mark.parametrize("group_noise", ["same", "different"])
def test_a_group_shares_its_initial_noise_or_not(group_noise):
    """Chunk 0 before its first draw has only followed the ODE: equal in a group if its noise was."""
    rollout = roll_out(generator(), replace(SMALL, group_noise=group_noise))
    before, after = rollout.x[:, 0, 0].unflatten(0, (2, 3)), rollout.next_x[:, 0, 0].unflatten(0, (2, 3))
    assert torch.allclose(before[:, 0], before[:, 1], atol=1e-5) == (group_noise == "same")
    assert not torch.allclose(before[0], before[1], atol=0.1)
    assert not torch.allclose(after[:, 0], after[:, 1], atol=0.1)


# ---------------------------------------------------------------- rescoring

@pytest.mark.parametrize("sampler", ["flow-sde", "cps"])
@pytest.mark.parametrize("window", [1, 50])
def test_one_parallel_pass_repeats_the_log_probs_of_a_cached_rollout(sampler, window):
    """<= 1e-6 in fp32, also when the cache has rolled over."""
    model, settings = generator(window=window), Settings(group=2, sampler=sampler, rollout_steps=6, draws=4)
    rollout = roll_out(model, settings, chunks=6)
    log_prob, _ = rescore(model, rollout, settings)
    assert (log_prob - rollout.old_log_prob).abs().max() <= 1e-6
    assert check_rescoring(model, rollout, settings) <= 1e-6


def test_the_ratio_is_1_before_the_first_update_in_batches_of_any_size():
    model = generator()
    rollout, advantage = roll_out(model), torch.randn(6, 3, generator=rng())
    for size in (1, 2, 4, 6):
        for at in range(0, 6, size):
            _, log = grpo_loss(model, model, rollout[at:at + size], advantage[at:at + size], SMALL)
            assert (log["ratio_mean"] - 1).abs().max() <= 1e-6 and (log["ratio_max"] - 1).abs().max() <= 1e-6
            assert log["clip_high"] == log["clip_low"] == 0 and log["kl"] < 1e-9


def sequential_log_prob(model, rollout, settings):
    """As public trainers rescore: replay chunk by chunk and draw by draw, each with a pass of its own."""
    b, m, k = rollout.old_log_prob.shape
    t, out = model.config.chunk_frames, []
    for i, (sigma, down) in enumerate(rollout.steps):
        for chunk in range(k):
            x = torch.zeros_like(rollout.latents)[:, None, :chunk + 1].clone()
            x[:, 0, chunk] = rollout.x[:, i, chunk]
            mel, past = rollout.mel[:, :(chunk + 1) * t], rollout.latents[:, :chunk + 1]
            level = torch.full((b, 1, chunk + 1), sigma)
            velocity = model(rollout.portrait, mel, past, x, level)[:, 0, chunk]
            before, after = rollout.x[:, i, chunk], rollout.next_x[:, i, chunk]
            deviation = down * math.sin(settings.noise_level * math.pi / 2)
            mean = (1 - down) * (before - sigma * velocity)
            mean = mean + math.sqrt(down ** 2 - deviation ** 2) * (before + (1 - sigma) * velocity)
            out.append(Normal(mean, deviation).log_prob(after).mean((1, 2)))
    return torch.stack(out, 1).unflatten(1, (m, k))


def test_the_first_gradient_is_that_of_reinforce_on_the_same_draws():
    """At ratio 1 the gradient of the surrogate is that of -mean(advantage log p), by autograd through a
    sequential replay with torch.distributions."""
    settings = replace(SMALL, kl_weight=0.0)
    model = generator()
    rollout, advantage = roll_out(model, settings), torch.randn(6, 3, generator=rng())
    grpo_loss(model, model, rollout, advantage, settings)[0].backward()
    ours = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    log_prob = sequential_log_prob(model, rollout, settings)
    assert (log_prob - rollout.old_log_prob).abs().max() <= 1e-6
    (-(advantage[:, None] * log_prob).mean()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (ours[name] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-9, name
    assert max(g.abs().max() for g in ours.values()) > 1e-5


def test_a_rescoring_that_does_not_repeat_the_rollout_is_refused():
    model = generator()
    rollout = roll_out(model)
    for wrong in (dict(latents=rollout.latents + 0.05), dict(mel=rollout.mel.roll(1, 1))):
        with pytest.raises(RuntimeError, match="does not repeat the rollout: .* differ by .*same context"):
            check_rescoring(model, replace(rollout, **wrong), SMALL)
    with pytest.raises(RuntimeError, match="same weights"):
        check_rescoring(nudged(model), rollout, SMALL)


@pytest.mark.parametrize("sampler", ["flow-sde", "cps"])
@pytest.mark.parametrize("noise_level", [0.001, 0.01, 0.8])
def test_with_little_noise_rescoring_is_as_exact_as_rounding_lets_it_be(sampler, noise_level):
    """Log-probabilities are further apart, by 1 / step_std, and a wrong context is still found."""
    model = generator()
    settings = Settings(group=2, sampler=sampler, noise_level=noise_level, rollout_steps=4)
    rollout = roll_out(model, settings)
    gap = check_rescoring(model, rollout, settings)
    assert gap < settings.clip                       # so a ratio means something
    with pytest.raises(RuntimeError, match="does not repeat the rollout"):
        check_rescoring(model, replace(rollout, latents=rollout.latents + 0.05), settings)


# ---------------------------------------------------------------- advantages

def test_two_groups_of_four_worked_by_hand():
    """sync 1 3 3 5: mean 3, std sqrt 2, z = -1.414 0 0 1.414; still -2 -2 -4 -4: mean -3, std 1,
    z = 1 1 -1 -1; advantage = 1 z_sync + 0.5 z_still. The second group is on another level, five times and
    twice as wide, and has the same: a video is compared with its own group alone."""
    made = scores(sync=[1., 3, 3, 5, 10, 20, 20, 30], still=[-2., -2, -4, -4, 0, 0, -4, -4], unused=[1.] * 8)
    weights = {"sync": 1.0, "still": 0.5, "unused": 0.0}
    value, report = advantages(made, weights, Settings(group=4), 2, FLOORS)
    want = torch.tensor([-math.sqrt(2) + 0.5, 0.5, -0.5, math.sqrt(2) - 0.5]).repeat(2)
    assert value.shape == (8, 2) and torch.allclose(value, want[:, None].expand(8, 2), atol=1e-6)
    assert report["sync"] == pytest.approx({"mean": 11.5, "group_std": 3 * math.sqrt(2), "flat": 0})
    assert set(report) == {"sync", "still", "total"} and report["total"]["flat"] == 0


def test_a_group_of_equal_rewards_has_no_advantage_and_no_gradient():
    settings = replace(SMALL, kl_weight=0.0)
    model = generator()
    rollout = roll_out(model, settings)
    for equal in (0.0, 3.3):
        value, report = advantages(scores(sync=[equal] * 6), {"sync": 1.0}, settings, 3, FLOORS)
        assert torch.equal(value, torch.zeros(6, 3))
        assert report["sync"]["flat"] == report["total"]["flat"] == 1
    for policy in (model, nudged(model)):
        grpo_loss(policy, model, rollout, value, settings)[0].backward()
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in policy.parameters())


def test_residue_of_rounding_is_not_blown_up_and_the_advantage_is_clamped():
    """Rewards equal but for the last bit stay near 0; one winner of 64 has z = 7.9 and is clamped to 5."""
    near = [3.0, 3.0000002, 3.0, 2.9999998]
    value, report = advantages(scores(sync=near), {"sync": 1.0}, Settings(group=4), 1, FLOORS)
    assert value.abs().max() < 1e-3 and report["sync"]["flat"] == 1
    value, _ = advantages(scores(sync=[0.0] * 63 + [1.0]), {"sync": 1.0}, Settings(group=64), 1, FLOORS)
    assert value.max() == 5 and value[0, 0] == pytest.approx(-math.sqrt(1 / 63), rel=1e-4)
    hinge = scores(hinge=[0, 0, 0, -1e-4])
    value, _ = advantages(hinge, {"hinge": 1.0}, Settings(group=4), 1, FLOORS)
    assert value.abs().max() < 0.1                                   # a tiny violation, in its own unit


@pytest.mark.parametrize("credit", ["video", "chunk"])
def test_an_unrated_video_is_left_out_of_its_group(credit):
    """Three groups of four, one video unrated in each: its advantage is 0, the others have those of groups of
    three that never held it."""
    settings, odd, floors = Settings(group=4, credit=credit), [1, 6, 8], {"sync": 0.2, "seam": 0.2}
    made = scores(sync=torch.randn(12, generator=rng()).tolist(),
                  seam=torch.randn(12, generator=rng(1)).tolist())
    made.per_chunk = {"seam": torch.randn(12, 3, generator=rng(2))}
    made.components["seam"][odd], made.components["sync"][odd] = 9.0, math.nan
    value, report = advantages(made, {"sync": 1.0, "seam": 0.5}, settings, 3, floors)
    others = [i for i in range(12) if i not in odd]
    alone = SimpleNamespace(components={k: v[others] for k, v in made.components.items()},
                            per_chunk={"seam": made.per_chunk["seam"][others]})
    want, without = advantages(alone, {"sync": 1.0, "seam": 0.5}, replace(settings, group=3), 3, floors)
    assert torch.allclose(value[others], want, atol=1e-6) and torch.equal(value[odd], torch.zeros(3, 3))
    assert report.pop("total")["unrated"] == 3 and without.pop("total")["unrated"] == 0
    assert all(report[name] == pytest.approx(without[name]) for name in without)


def test_a_group_with_fewer_than_two_rated_videos_has_no_advantage():
    nan = math.nan
    value, report = advantages(scores(sync=[1., nan, nan, nan, nan, nan, 1., 2, nan]), {"sync": 1.0},
                               Settings(group=3), 2, FLOORS)
    assert torch.allclose(value[:, 0], torch.tensor([0., 0, 0, 0, 0, 0, -1, 1, 0]))
    assert report["total"] == {"flat": pytest.approx(2 / 3), "unrated": 6}


def test_an_infinite_reward_is_named():
    with pytest.raises(ValueError, match="reward sync is .*inf"):
        advantages(scores(sync=[1.0, math.inf]), {"sync": 1.0}, Settings(group=2), 1, FLOORS)
    with pytest.raises(ValueError, match="nothing to learn"):
        advantages(scores(sync=[1.0, 2.0]), {"sync": 0.0}, Settings(group=2), 1, FLOORS)


def test_credit_per_chunk_looks_forward_only():
    """reward to go of 1 2 6 is 9/3 8/2 6, with a discount of 1/2 it is 3.5/1.75 5/1.5 6; what happened before
    a chunk is no part of its credit, and components without a place in time count for the whole video."""
    assert torch.allclose(reward_to_go(torch.tensor([[1., 2, 6]]), 1), torch.tensor([[3., 4, 6]]))
    assert torch.allclose(reward_to_go(torch.tensor([[1., 2, 6]]), 0.5), torch.tensor([[2, 10 / 3, 6]]))
    made = scores(seam=[0., 0], sync=[1., 3])
    made.per_chunk = {"seam": torch.tensor([[5., 0, 1], [0., 0, 3]])}
    value, _ = advantages(made, {"seam": 1.0}, Settings(group=2, credit="chunk"), 3, FLOORS)
    assert torch.allclose(value, torch.tensor([[1., -1, -1], [-1., 1, 1]]))
    both, _ = advantages(made, {"seam": 1.0, "sync": 0.5}, Settings(group=2, credit="chunk"), 3, FLOORS)
    assert torch.allclose(both, value + torch.tensor([[-0.5], [0.5]]))


# ---------------------------------------------------------------- loss

@pytest.mark.parametrize("advantage, ratio, stopped", [(1., 1.3, True), (1., 0.7, False), (-1., 1.3, False),
                                                       (-1., 0.7, True), (1., 1.1, False), (-1., 0.9, False)])
def test_the_clip_stops_the_gradient_on_the_right_side_only(advantage, ratio, stopped):
    """A good draw is not made ever likelier, a bad one not ever less likely; a wrong step can be undone."""
    log_ratio = torch.tensor(math.log(ratio), requires_grad=True)
    loss, _, high, low = surrogate(log_ratio, torch.tensor(advantage), clip=0.2)
    loss.backward()
    assert log_ratio.grad.item() == pytest.approx(0 if stopped else -advantage * ratio)
    assert (bool(high), bool(low)) == (stopped and advantage > 0, stopped and advantage < 0)


def test_the_kl_is_the_velocity_error():
    """Against the mean square of a replay."""
    model = generator()
    other, rollout, zero = nudged(model), roll_out(model), torch.zeros(6, 3)
    log = grpo_loss(other, model, rollout, zero, SMALL)[1]
    velocity, reference_velocity = (rescore(of, rollout, SMALL)[1] for of in (other, model))
    assert torch.allclose(log["kl"], ((velocity - reference_velocity) ** 2).mean()) and log["kl"] > 1e-6
    with_kl = grpo_loss(other, model, rollout, zero, replace(SMALL, kl_weight=0.5))[0]
    assert torch.allclose(with_kl, 0.5 * log["kl"])                 # no advantage: the KL alone is left


# ---------------------------------------------------------------- learning

def test_a_bandit_with_a_known_optimum_is_solved():
    """One draw a ~ N(mean, 0.5^2), reward -(a - 3)^2: advantages and surrogate must bring the mean to 3."""
    settings, g = Settings(group=16), rng()
    mean = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.05)
    for _ in range(150):
        old = mean.detach().clone()
        action = old + 0.5 * torch.randn(16, generator=g)
        near = SimpleNamespace(components={"near": -(action - 3) ** 2}, per_chunk={})
        advantage, _ = advantages(near, {"near": 1.0}, settings, 1, FLOORS)
        for _ in range(2):
            log_ratio = Normal(mean, 0.5).log_prob(action) - Normal(old, 0.5).log_prob(action)
            optimizer.zero_grad()
            surrogate(log_ratio, advantage[:, 0], clip=0.2)[0].mean().backward()
            optimizer.step()
    assert abs(mean.item() - 3) < 0.15


@pytest.mark.parametrize("credit", ["video", "chunk"])
def test_twenty_updates_raise_a_toy_reward(credit):
    """Reward: the latents shall be large. Twenty small updates must raise it for every one of 16 videos, on
    noise that was not trained on, by more than these differ."""
    settings = Settings(group=8, rollout_steps=4, credit=credit, clip=1e-2, kl_weight=0.01)
    model, reference = generator(), generator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)

    def reward(rollout):
        per_chunk = rollout.latents.mean((2, 3))
        return SimpleNamespace(components={"size": per_chunk.mean(1)}, per_chunk={"size": per_chunk})
    before = reward(roll_out(model, settings, seed=99)).components["size"]
    for update in range(20):
        rollout = roll_out(model, settings, seed=update)
        advantage, _ = advantages(reward(rollout), {"size": 1.0}, settings, 3, FLOORS)
        for part in (slice(0, 8), slice(8, 16)):
            optimizer.zero_grad()
            grpo_loss(model, reference, rollout[part], advantage[part], settings)[0].backward()
            optimizer.step()
    after = reward(roll_out(model, settings, seed=99)).components["size"]
    assert (after - before).min() > 0 and (after - before).mean() > before.std()
