"""Reinforcing an autoregressive flow model: group-relative policy optimisation (GRPO), in six steps.

1. A policy. Generation by the flow's ODE is deterministic: there is nothing to reinforce. With fresh noise a
   flow step is a draw whose probability is known (kernels/flow_step.py),

       x' = mean + step_std eps,     mean = c_x x + c_v velocity,     p(x' | x) = N(mean, step_std^2).

   Only some neighbouring steps, the drawing steps, are made so: never the first (sigma = 1, where there is
   nothing yet to choose from), never the last (whose noise would stay in the picture). The others stay ODE
   steps.
2. A rollout. G videos of one portrait and one speech, a group, are generated chunk by chunk by the same
   `generate()`, cache and all, that serves sampling. Every draw is kept: x, x', log-probability.
3. A reward. Each video is judged as a whole, and, where a component can say when, chunk by chunk: a draw is
   then credited with its own chunk and, discounted, with the later ones. Sound and lips are a matter of the
   moment, and credit that is not shared with the rest of the video is less noisy.
4. An advantage: how much better than its group a chunk is. Each component, after the credit of step 3, is a
   z-score over the group, chunk by chunk,

       z_i = (component_i - group mean) / max(group std, floor)
       advantage = clamp( sum_i weight_i z_i, -5, 5 ).

   A judge may fail to rate a video. Its advantage is 0, and the others are compared as if it were not there.

5. Rescoring. The gradient needs the log-probability of every draw under the present weights. Since the clean
   past of each chunk is known, all K chunks and all M draws of a rollout are rescored in ONE pass over

       [clean context | noisy chunks before draw 1 | noisy chunks before draw 2 | ...]

   whose mask (kernels/attention.py) lets every noisy chunk see exactly what the cache held. Public trainers
   replay the denoising chunk by chunk and step by step instead. `check_rescoring` asserts that both agree.
6. A loss, per chunk k and draw m, averaged with equal weight over videos, chunks and draws:

       ratio = exp(log_prob - old_log_prob)
       loss  = -min(ratio advantage, clamp(ratio, 1 - clip, 1 + clip) advantage) + kl_weight kl

There is one ratio per chunk and draw, not one per video: each draw is an action of its own, and a product
over all draws would clip them together. Weights are equal, gradients are not: that of a log-probability
scales with c_v / step_std, which is larger for late draws. Log-probabilities are means over a chunk's N x C
latent elements, so a ratio moves N x C times less than that of a sum would: clip is 1e-4 where PPO has 0.2
(at N x C = 1280, 0.2 / 1280 = 1.6e-4). All is fp32, where cached and parallel log-probabilities are 1e-7
apart; in bf16 it is 5e-4, more than the clip.

Deviations from the papers. Flow-GRPO (2505.05470) normalises the total reward, here each component (as
DanceGRPO, 2505.07818); its KL is the closed form, here the squared velocity difference, which weighs all
noise levels alike. The drawing steps are MixGRPO's window (2507.21802), but chosen anew for every update. The
parallel rescoring and the credit per chunk are this project's. FlowPortrait's own hyper-parameters are not
public.

Shapes: P prompts (a portrait and a speech each), G group, B = P G rollouts (a group stands together),
K chunks, M draws, F frames, N tokens, C channels, S pixels per side.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

import torch
from einops import rearrange
from torch import Tensor

from kernels.flow_step import STOCHASTIC, flow_step, sigma_schedule, step_coefficients, stochastic_step
from model import Generator

MOST_ADVANTAGE = 5.0
TOLERANCE = 1e-6           # between the means of a rollout and its rescoring
DISCOUNT = 0.5             # of each later chunk, in the credit of a chunk


def setting(default, text: str, *choices: str):
    """A field of Settings with the help and choices of its flag in train.py."""
    return field(default=default, metadata={"help": text, "choices": choices or None})


@dataclass
class Settings:
    """What defines the algorithm."""

    group: int = setting(8, "videos per prompt, G")
    sampler: str = setting("cps", "stochastic flow step", *STOCHASTIC)
    noise_level: float = setting(0.8, "how much noise is fresh; the papers: cps 0.8, flow-sde 0.7")
    rollout_steps: int = setting(6, "flow steps per chunk of a rollout; sampling takes 2")
    draws: int = setting(2, "how many of them draw, M; the others follow the ODE")
    group_noise: str = setting("same", "initial noise within a group", "same", "different")
    credit: str = setting("chunk", "reward whole videos, or each chunk by itself and what comes after it",
                          "video", "chunk")
    clip: float = setting(1e-4, "how far a ratio may leave 1, of mean log-probabilities")
    kl_weight: float = setting(0.03, "of the KL to the reference; 0: none is computed")

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
            if not choices and not value >= 0:
                raise ValueError(f"{f.name} must be at least 0, got {value}")
        if self.group < 2:
            raise ValueError(f"a group of {self.group} has no one to compare with; take at least 2")
        if not 1 <= self.draws <= self.rollout_steps - 2:
            raise ValueError(f"draws must be 1 to rollout_steps - 2 = {self.rollout_steps - 2}, since "
                             f"neither the first step nor the last is one; got {self.draws}")
        if not self.clip > 0:
            raise ValueError("clip must be above 0")
        step_coefficients(self.sampler, 0.5, 0.25, self.noise_level)   # raises for a noise level out of range
        if self.noise_level < 1e-3:
            raise ValueError(f"noise_level must be at least 0.001, got {self.noise_level}: with less, "
                             "rounding moves ratios by as much as the clip allows; 0 draws nothing")

    def coefficients(self, step: tuple[float, float]) -> tuple[float, float, float]:
        """(c_x, c_v, step_std) of a step (sigma, next_sigma) that draws."""
        return step_coefficients(self.sampler, *step, self.noise_level)


# ---------------------------------------------------------------- 1. the policy

def stochastic_steps(rollout_steps: int) -> list[tuple[float, float]]:
    """List the (sigma, next_sigma) that may draw: all but the first and the last."""
    sigmas = sigma_schedule(rollout_steps)
    return list(zip(sigmas, sigmas[1:]))[1:-1]


def drawing_steps(settings: Settings, rng: torch.Generator) -> list[tuple[float, float]]:
    """Choose the M neighbouring steps (sigma, next_sigma) that draw in an update."""
    steps = stochastic_steps(settings.rollout_steps)
    at = int(torch.randint(len(steps) - settings.draws + 1, (), generator=rng))
    return steps[at:at + settings.draws]


def drawing_step(settings: Settings, steps: list[tuple[float, float]], noise: Callable[[], Tensor],
                 record: Callable[..., None] = lambda *draw: None) -> Callable[..., Tensor]:
    """Make the `step` of `generate` that draws on the given steps and follows the ODE on the others.

    Args: noise: () -> fresh noise (B, N, C), once per draw; record: is given (x, x', log_prob).
    """
    def step(x, velocity, sigma, next_sigma):
        if (sigma, next_sigma) not in steps:
            return flow_step(x, velocity, sigma, next_sigma)
        coefficients = settings.coefficients((sigma, next_sigma))
        next_x, log_prob = stochastic_step(x, velocity, coefficients, noise=noise())
        record(x, next_x, log_prob)
        return next_x
    return step


# ---------------------------------------------------------------- 2. rollouts

@dataclass
class Rollout:
    """Generated videos with every draw on the way; `rollout[rows]` is a part of them."""

    portrait: Tensor                     # (B, 3, S, S) in [0, 1]
    mel: Tensor                          # (B, K T, mel_channels)
    frames: Tensor                       # (B, F, 3, S, S) in [0, 1]
    latents: Tensor                      # (B, K, N, C) the finished chunks: the clean context
    x: Tensor                            # (B, M, K, N, C) before each draw, fp32
    next_x: Tensor                       # (B, M, K, N, C) after it, fp32
    old_log_prob: Tensor                 # (B, M, K)
    steps: list[tuple[float, float]]     # the M (sigma, next_sigma)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: slice) -> "Rollout":
        return Rollout(**{k: v[rows] if torch.is_tensor(v) else v for k, v in vars(self).items()})


@torch.no_grad()
def roll_out(model: Generator, portrait: Tensor, mel: Tensor, settings: Settings,
             steps: list[tuple[float, float]], rng: torch.Generator, mine: slice = slice(None)) -> Rollout:
    """Generate G videos of each prompt.

    Args:
        portrait: (P, 3, S, S) in [0, 1].    mel: (P, K T, mel_channels).
        steps: (sigma, next_sigma) of each of the M draws.
        rng: on the CPU; of the initial and of the fresh noise.
        mine: the prompts to make here; the noise of all is drawn, so that it is the same whoever makes it.

    Returns: B = P G rollouts, group after group.
    """
    g, p = settings.group, len(portrait)
    shape = model.config.video_tokens, model.config.channels
    portrait, mel = portrait[mine].repeat_interleave(g, 0), mel[mine].repeat_interleave(g, 0)

    def gaussian(each):
        return torch.randn(p, each, *shape, generator=rng)[mine].flatten(0, 1).to(mel.device)

    def initial():
        return gaussian(g) if settings.group_noise == "different" else gaussian(1).repeat_interleave(g, 0)

    draws = []
    step = drawing_step(settings, steps, lambda: gaussian(g), lambda *draw: draws.append(draw))
    chunks = model.generate(portrait, mel, initial, settings.rollout_steps, step=step)
    latents, frames = zip(*chunks)
    x, next_x, log_prob = (
        rearrange(list(kept), "(k m) b ... -> b m k ...", m=len(steps)) for kept in zip(*draws))
    frames, latents = torch.cat(frames, 1), torch.stack(latents, 1)
    return Rollout(portrait, mel, frames, latents, x, next_x, log_prob, steps)


# ---------------------------------------------------------------- 3 and 4. advantages

def reward_to_go(reward: Tensor, discount: float) -> Tensor:
    """Give chunk k the mean reward (B, K) of chunks j >= k, each with weight discount^(j - k).

    A draw changes its own chunk most, later ones less and less, earlier ones never.
    """
    later = torch.arange(reward.shape[1], device=reward.device)
    weight = (discount ** (later[:, None] - later)).tril().to(reward)   # (K later, K now)
    return reward @ (weight / weight.sum(0))


def advantages(scores, weights: Mapping[str, float], settings: Settings, chunks: int,
               floors: Mapping[str, float]) -> tuple[Tensor, dict[str, dict[str, float]]]:
    """Compare every video with its group, component by component (step 4 above), in float64.

    Args:
        scores: components name -> (B,), and with credit "chunk" per_chunk name -> (B, K). A video of
            which any component is NaN is unrated: its advantage is 0, mean and std of its group the others'.
        weights: name -> weight; a weight of 0 leaves a component out.
        floors: name -> least std to divide by, above 0. Differences below it are noise; a z-score would
            blow them up, above all those of a penalty that is rarely met.

    Returns:
        advantage (B, K) fp32; and per component its mean, its mean group std, and `flat`, the share of groups
        and chunks whose std is not above the floor; under "total" the share of groups in which every
        advantage is 0, and the number of unrated videos.

    Raises: ValueError where a reward is infinite.
    """
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise ValueError("every reward has weight 0; there is nothing to learn from")
    unrated = torch.stack([scores.components[name] for name in weights]).isnan().any(0)        # (B,)
    total, report = 0.0, {}
    for name, weight in weights.items():
        reward = scores.components[name].double().masked_fill(unrated, math.nan)
        if reward.isinf().any():
            raise ValueError(f"reward {name} is {reward.tolist()}: infinite")
        report[name] = {"mean": reward.nanmean().item()}
        if settings.credit == "chunk" and name in scores.per_chunk:
            reward = reward_to_go(scores.per_chunk[name].double(), DISCOUNT)               # (B, K)
            reward = reward.masked_fill(unrated[:, None], math.nan)
        else:
            reward = reward[:, None].expand(-1, chunks)
        reward = rearrange(reward, "(p g) k -> p g k", g=settings.group)
        gap = reward - reward.nanmean(1, keepdim=True)                                     # NaN where unrated
        std = gap.square().nanmean(1, keepdim=True).sqrt().nan_to_num(0)
        total = total + weight * gap / std.clamp_min(floors[name])
        report[name] |= {"group_std": std.mean().item(), "flat": (std <= floors[name]).double().mean().item()}
    total = total.nan_to_num(0)
    flat = (total == 0).all(2).all(1).double().mean().item()
    report["total"] = {"flat": flat, "unrated": int(unrated.sum())}
    return total.clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE).flatten(0, 1).float(), report


# ---------------------------------------------------------------- 5. rescoring

def rescore(model: Generator, rollout: Rollout, settings: Settings) -> tuple[Tensor, Tensor]:
    """Score every draw of a rollout under a model, in one parallel pass.

    Returns: log_prob (B, M, K), velocity (B, M, K, N, C).
    """
    sigma = torch.tensor([sigma for sigma, _ in rollout.steps], device=rollout.x.device)
    sigma = sigma[None, :, None].expand(rollout.old_log_prob.shape)
    velocity = model(rollout.portrait, rollout.mel, rollout.latents, rollout.x, sigma)
    scored = [stochastic_step(rollout.x[:, m], velocity[:, m], settings.coefficients(step),
                              next_x=rollout.next_x[:, m])[1] for m, step in enumerate(rollout.steps)]
    return torch.stack(scored, 1), velocity


@torch.no_grad()
def check_rescoring(model: Generator, rollout: Rollout, settings: Settings) -> float:
    """Assert that rollout and rescoring agree, up to rounding, while the weights are still the same.

    This is the correctness test of the whole method: were they apart, every ratio would be wrong from the
    start. Measured, trained `tiny` model: 1e-7 apart in fp32, 2e-4 to 5e-4 in bf16.

    Returns: the largest difference of log-probabilities. Raises: RuntimeError where means are more than
    TOLERANCE apart.
    """
    gap = (rescore(model, rollout, settings)[0] - rollout.old_log_prob).abs()
    # log_prob is the mean of -eps^2 / 2 over elements, eps = (x' - mean) / step_std ~ N(0, 1).
    # Two passes whose means are d apart give log-probabilities mean(eps d) / step_std apart.
    # So rounding, which moves means, moves log-probabilities the more, the less noise there is.
    step_std = gap.new_tensor([settings.coefficients(step)[2] for step in rollout.steps])[:, None]    # (M, 1)
    if not (gap * step_std <= TOLERANCE).all():
        row, draw, chunk = (int(i) for i in torch.unravel_index((gap * step_std).argmax(), gap.shape))
        raise RuntimeError(
            f"rescoring does not repeat the rollout: log-probabilities differ by {gap[row, draw, chunk]:.1e},"
            f" more than {TOLERANCE / step_std[draw, 0]:.0e} (rollout {row}, draw {draw}, chunk {chunk}); "
            "the cached and the parallel pass must see the same context, in fp32, with the same weights")
    return gap.max().item()


# ---------------------------------------------------------------- 6. the loss

def surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clipped objective of PPO (1707.06347, eq. 7), negated: no gain beyond a ratio of 1 ± clip.

    Args: log_ratio, advantage: of any one shape.
    Returns: loss, ratio, and where the clip stops the gradient, ratio too high and too low; of that shape.
    """
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return loss, ratio, (advantage > 0) & (ratio > 1 + clip), (advantage < 0) & (ratio < 1 - clip)


def grpo_loss(model: Generator, reference: Generator, rollout: Rollout, advantage: Tensor,
              settings: Settings) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of rollouts with their advantages (B, K), and what to log.

    Logged: loss, without the KL; ratio_mean and ratio_max, (M,), highest sigma first; clip_high and clip_low,
    the share of draws whose gradient the clip stops; kl to the reference, the squared velocity difference.
    """
    log_prob, velocity = rescore(model, rollout, settings)
    log_ratio = log_prob - rollout.old_log_prob                                            # (B, M, K)
    advantage = advantage[:, None].expand_as(log_ratio)
    loss, ratio, high, low = surrogate(log_ratio, advantage, settings.clip)
    loss, kl = loss.mean(), loss.new_zeros(())
    if settings.kl_weight:
        with torch.no_grad():
            reference_velocity = rescore(reference, rollout, settings)[1]
        kl = (velocity - reference_velocity).square().mean()
    log = {"loss": loss, "kl": kl,
           "ratio_mean": ratio.mean((0, 2)), "ratio_max": ratio.amax((0, 2)),
           "clip_high": high.float().mean(), "clip_low": low.float().mean()}
    return loss + settings.kl_weight * kl, {k: v.detach() for k, v in log.items()}
