"""The learned codec: it begins as the linear one, carries what that cannot, and keeps its promises."""

import pytest
import torch

import model as m
from extras.learned_codec import LearnedCodec
from model import Config, Generator, MotionCodec
from test_model import SMALL


def talking(clips: int = 6, frames: int = 8):
    """Clips (B, F, 3, 32, 32) in which a textured head moves and its mouth opens, over a wall that stands still: what
    no affine pose under the linear codec's mask can carry."""
    g = torch.Generator().manual_seed(4)
    smooth = lambda side: torch.nn.functional.interpolate(torch.rand(clips, 3, side, side, generator=g), 32,
                                                          mode="bicubic").clamp(0, 1)
    wall, face, grid = smooth(12)[:, None], smooth(10)[:, None], m.pixel_grid(32)
    shift = 0.25 * torch.rand(clips, frames, 2, generator=g) * torch.linspace(0, 1, frames)[:, None]
    at = grid - shift[:, :, None, None]                                               # (B, F, S, S, 2)
    head = torch.sigmoid((0.55 - at.norm(dim=-1)) * 12)[:, :, None]
    mouth = torch.exp(-((at - torch.tensor([0.0, 0.3])) ** 2).sum(-1) / 0.01)[:, :, None]
    moved = torch.nn.functional.grid_sample(face.expand(-1, frames, -1, -1, -1).flatten(0, 1), at.flatten(0, 1),
                                            align_corners=False).view(clips, frames, 3, 32, 32)
    moved = moved * (1 - mouth * torch.rand(clips, frames, 1, 1, 1, generator=g))
    return (head * moved + (1 - head) * wall).clamp(0, 1)


def learned_codec(frames, steps: int = 60):
    """A learned codec after a short first stage on clips. Returns: the codec, its losses."""
    torch.manual_seed(0)
    codec = LearnedCodec(Config(size=32, space_channels=24, channels=48, codec="learned"))
    optimizer, losses = torch.optim.AdamW(codec.net.parameters(), lr=4e-3), []
    for step in range(steps):                                       # with warm-up, decay and clip, as train_codec
        optimizer.param_groups[0]["lr"] = 4e-3 * min((step + 1) / 15, 1.5 * (1 - step / steps), 1)
        losses.append(codec.loss(*frames[:, [0, -1]].unbind(1)))
        optimizer.zero_grad(), losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(codec.net.parameters(), 1.0)
        optimizer.step()
    codec.requires_grad_(False).fit(frames)
    return codec, [loss.item() for loss in losses]


def test_the_learned_codec_begins_as_the_linear_warp_and_learns_what_it_cannot_carry():
    frames = talking()
    codec, losses = learned_codec(frames)
    pose = m.estimate_pose(frames)[:, -1]
    untrained = LearnedCodec(codec.config)
    assert torch.allclose(untrained.carry(frames[:, 0], pose), m.warp(frames[:, 0], pose), atol=1e-6)
    assert losses[-1] < 0.8 * losses[0]
    error = lambda made: (made - frames[:, -1]).abs().mean()
    carried = error(codec.carry(frames[:, 0], pose))
    assert carried < 0.8 * error(m.warp(frames[:, 0], pose)) and carried < error(frames[:, 0])


def test_latent_zero_of_the_learned_codec_is_the_portrait_and_a_still_clip_is_latent_zero():
    frames = talking()
    codec, _ = learned_codec(frames)
    latents = codec.encode(frames)
    made = codec.decode(frames[:, 0], torch.zeros_like(latents))
    assert torch.allclose(made, frames[:, :1].expand_as(made), atol=1e-5)
    assert (codec.decode(frames[:, 0], latents) - frames).abs().mean() < 0.5 * (made - frames).abs().mean()
    assert codec.encode(frames[:, :1].expand_as(frames).contiguous()).abs().max() < 1e-3


def test_the_learned_codec_is_causal_and_decodes_chunk_by_chunk_as_all_at_once():
    """Later frames change no finished latent; a later chunk's latent changes no finished frame; a video decoded as it
    comes is the video."""
    frames = talking()
    codec, _ = learned_codec(frames, 20)
    latents, spoiled = codec.encode(frames), frames.clone()
    spoiled[:, 4:] = torch.rand_like(spoiled[:, 4:])
    other = codec.encode(spoiled)
    assert torch.allclose(other[:, 0], latents[:, 0], atol=1e-4) and (other[:, 1] - latents[:, 1]).abs().max() > 0.1
    whole = codec.decode(frames[:, 0], latents)
    stream = torch.cat([codec.decode(frames[:, 0], latents[:, k:k + 1]) for k in range(2)], 1)
    assert torch.allclose(stream, whole, atol=1e-5)


def test_latents_of_the_learned_codec_have_the_linear_ones_units():
    """Half-whitened: over the clips it was fitted to, the strongest component of all windows has variance 1, the
    pose's (which counts four times) 4^2."""
    frames = talking(24)
    learned, linear = learned_codec(frames)[0], MotionCodec(Config(size=32, space_channels=24, channels=48))
    linear.fit(frames)
    power = [codec.encode(frames).square().mean((0, 1)).amax(-1) for codec in (learned, linear)]
    for p in power:
        assert p[:-1].max().item() == pytest.approx(1, rel=0.02) and p[-1].item() == pytest.approx(16, rel=0.02)


def test_a_learned_codec_survives_its_checkpoint_bit_for_bit(tmp_path):
    frames = talking()
    codec, _ = learned_codec(frames, 20)
    model = Generator(Config(**{**SMALL, "space_channels": 24, "channels": 48}, codec="learned"))
    model.codec.load_state_dict(codec.state_dict())
    m.save_generator(model, tmp_path)
    same = m.load_generator(tmp_path)
    assert isinstance(same.codec, LearnedCodec) and not any(p.requires_grad for p in same.codec.parameters())
    latents = codec.encode(frames)
    assert torch.equal(same.codec.encode(frames), latents)
    assert torch.equal(same.codec.decode(frames[:, 0], latents), codec.decode(frames[:, 0], latents))
