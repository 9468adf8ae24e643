"""The generator: its cache against its parallel pass, its causality, its positions, its codec."""

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import scipy
import torch

import model as m
from data import HOP, LOOK_AHEAD, log_mel
from extras.files import MediaError
from extras.media import SAMPLES_PER_FRAME
from model import Config, Generator, KVCache, MotionCodec
from sample import seeded_noise

SMALL = dict(size=32, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, space_channels=6,
             channels=8)


def generator(**changes) -> Generator:
    """A small generator whose every weight matters: nothing is left at its zero initialisation."""
    torch.manual_seed(0)
    model = Generator(Config(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.abs().sum() == 0 or "modulation" in name:
                p.normal_(std=0.2)
        model.codec.space.normal_(std=0.05)
        model.codec.time.normal_(std=0.05)
    return model


def inputs(model: Generator, chunks: int, batch: int = 2, seed: int = 1):
    g, c = torch.Generator().manual_seed(seed), model.config
    return (torch.rand(batch, 3, c.size, c.size, generator=g),
            torch.randn(batch, chunks * c.chunk_frames, c.mel_channels, generator=g))


def noise_for(model: Generator, batch: int = 2, seed: int = 0):
    return seeded_noise(seed, range(batch), (model.config.video_tokens, model.config.channels))


def roll(model: Generator, chunks: int, steps: int = 3):
    """Generate, keeping every (x, velocity, sigma) that the flow step was given."""
    seen = []

    def step(x, velocity, sigma, next_sigma):
        seen.append((x, velocity, sigma))
        return x + (next_sigma - sigma) * velocity
    latents = [x for x, _ in model.generate(*inputs(model, chunks), noise_for(model), steps, step=step)]
    x, velocity = (torch.stack([s[i] for s in seen], 1).unflatten(1, (chunks, steps)).transpose(1, 2)
                   for i in (0, 1))
    sigma = torch.tensor([s[2] for s in seen[:steps]])[None, :, None].expand(len(x), steps, chunks)
    return torch.stack(latents, 1), x, velocity, sigma             # x (B, S, K, N, C)


@pytest.mark.parametrize("window", [1, 2, 3, 50])
def test_generation_against_the_cache_equals_one_parallel_pass(window):
    """All chunks and all steps of a rollout, rescored at once as M noisy segments: the same velocities. With
    9 chunks and a window of 1 to 3 the ring has rolled over several times."""
    model = generator(window=window)
    clean, x, velocity, sigma = roll(model, chunks=9)
    with torch.no_grad():
        parallel = model(*inputs(model, 9), clean, x, sigma)
    assert velocity.abs().max() > 0.1
    assert (parallel - velocity).abs().max() <= 1e-5 * max(1, velocity.abs().max().item())


def test_the_sink_stands_outside_time():
    """Time zero moved by a million frames changes nothing: time is relative, and the portrait has none."""
    model = generator(window=2)
    with torch.no_grad():
        near = model(*inputs(model, 4), *parallel_inputs(model, 4))
        positions = model.positions
        model.positions = lambda chunk, kind: positions(chunk + 250_000, kind)
        far = model(*inputs(model, 4), *parallel_inputs(model, 4))
        model.positions = lambda chunk, kind: positions(2 * chunk, kind)
        stretched = model(*inputs(model, 4), *parallel_inputs(model, 4))
    assert torch.allclose(near, far, atol=1e-5)
    assert not torch.allclose(near, stretched, atol=1e-3)           # time does matter


def parallel_inputs(model: Generator, chunks: int, segments: int = 1, batch: int = 2):
    g, c = torch.Generator().manual_seed(2), model.config
    shape = (batch, segments, chunks, c.video_tokens, c.channels)
    return (torch.randn(shape[:1] + shape[2:], generator=g), torch.randn(shape, generator=g),
            torch.rand(shape[:3], generator=g).clamp_min(0.1))


def test_a_chunk_never_depends_on_the_clean_answer_or_on_later_chunks():
    model = generator()
    clean, noisy, sigma = parallel_inputs(model, 4)
    clean.requires_grad_(), noisy.requires_grad_()
    model(*inputs(model, 4), clean, noisy, sigma)[:, :, 2].sum().backward()
    assert clean.grad[:, :2].abs().amax((0, 2, 3)).min() > 0 and clean.grad[:, 2:].abs().max() == 0
    others = [0, 1, 3]
    assert noisy.grad[:, :, 2].abs().max() > 0 and noisy.grad[:, :, others].abs().max() == 0


def test_a_finished_chunk_never_changes_with_sound_beyond_the_look_ahead():
    model = generator(mel_channels=m.MEL_DIM)
    c, portrait = model.config, inputs(model, 1, batch=1)[0]
    sound = torch.randn(1, 16 * SAMPLES_PER_FRAME, generator=torch.Generator().manual_seed(3))
    limit = 2 * c.chunk_frames * SAMPLES_PER_FRAME + LOOK_AHEAD * HOP    # chunks 0 and 1 hear no later sample

    def first_chunks(sound):
        made = model.generate(portrait, log_mel(sound, 16), noise_for(model, 1), 2)
        return torch.cat([next(made)[0], next(made)[0]])
    late, early = sound.clone(), sound.clone()
    late[:, limit:] = 0.5
    early[:, limit - 1] += 0.5
    assert torch.equal(first_chunks(sound), first_chunks(late))
    assert not torch.equal(first_chunks(sound), first_chunks(early))


def test_cache_slots_that_were_never_written_change_nothing(monkeypatch):
    model = generator(window=4)
    before = roll(model, chunks=3)[0]
    create = KVCache.__init__

    def poisoned(self, *args):
        create(self, *args)
        self.keys.fill_(float("nan"))
        self.values.fill_(float("nan"))
    monkeypatch.setattr(KVCache, "__init__", poisoned)
    assert torch.equal(roll(model, chunks=3)[0], before)


def test_a_chunk_costs_the_same_however_many_came_before(monkeypatch):
    """The number of keys that attention reads stops growing once the window is full."""
    model, seen, attend = generator(window=2), [], m.attention
    monkeypatch.setattr(m, "attention", lambda q, k, *rest: (seen.append(k.shape[2]), attend(q, k, *rest))[1])
    lengths, c = [], model.config
    for _ in model.generate(*inputs(model, 12, 1), noise_for(model, 1), 1):
        lengths.append(max(seen))
        seen.clear()
    full = c.video_tokens + 2 * (c.video_tokens + c.chunk_frames) + c.video_tokens   # portrait, window, chunk
    assert lengths[0] < full and lengths[2:] == [full] * 10


def test_the_seed_reproduces_and_changes_and_a_video_does_not_depend_on_its_batch():
    model = generator()
    portrait, mel = inputs(model, 3)

    def make(seed, rows=slice(None)):
        noise = seeded_noise(seed, range(2)[rows], (model.config.video_tokens, model.config.channels))
        return torch.cat([f for _, f in model.generate(portrait[rows], mel[rows], noise, 2)], 1)
    assert torch.equal(make(0), make(0))
    assert (make(0) - make(1)).abs().max() > 1e-3
    assert torch.allclose(make(0)[1:], make(0, slice(1, 2)), atol=1e-5)


def test_guidance_is_the_formula_and_one_is_no_guidance(monkeypatch):
    """velocity = unheard + g (heard - unheard): one chunk and one step, against two plain runs."""
    model = generator()
    first = lambda guidance: next(model.generate(*inputs(model, 1), noise_for(model), 1, guidance))[0]
    heard, guided = first(1.0), first(2.5)
    embed = model.embed_audio
    monkeypatch.setattr(model, "embed_audio", lambda mel: model.no_audio.expand_as(embed(mel)))
    unheard = first(1.0)
    assert not torch.allclose(heard, unheard, atol=1e-3)
    assert torch.allclose(guided, unheard + 2.5 * (heard - unheard), atol=1e-4)


def test_the_codec_finds_a_head_motion_that_was_put_in():
    torch.manual_seed(0)
    portrait = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 8), 64, mode="bicubic").clamp(0, 1)
    pose = torch.tensor([[0, 0, 0, 0, 0, 0], [0.06, 0.02, 0, -0.04, 0, 0.02],
                         [-0.05, 0, 0.05, 0.05, -0.05, 0]])
    frames = m.warp(portrait.expand(3, -1, -1, -1), pose)
    found = m.estimate_pose(frames[None])[0]
    assert (found - pose).abs().max() < 0.01
    assert (m.unwarp(frames, pose)[:, :, 8:-8, 8:-8] - portrait[:, :, 8:-8, 8:-8]).abs().mean() < 0.02


def test_the_codec_returns_what_lies_in_its_components():
    """Clips whose residual has few degrees of freedom survive the codec; latent zero is the portrait."""
    torch.manual_seed(0)
    config = Config(size=32, space_channels=6, channels=24)
    smooth = lambda n, side: torch.nn.functional.interpolate(torch.rand(n, 3, side, side), 32, mode="bicubic")
    portrait = (smooth(24, 16) * 0.6 + 0.1).clamp(0, 0.8)             # texture, so that no motion is imagined
    spot = torch.exp(-((m.pixel_grid(32) - torch.tensor([0.0, 0.5])) ** 2).sum(-1) / 0.02)
    opening = torch.rand(24, 8, 1, 1, 1) * 0.2
    opening[:, 0] = 0
    frames = portrait[:, None] + opening * spot
    codec = MotionCodec(config)
    codec.fit(frames)
    latents = codec.encode(frames)
    assert latents.shape == (24, 2, config.video_tokens, config.channels)
    made = codec.decode(frames[:, 0], latents)
    still = (frames - frames[:, :1]).square().mean()
    assert (made - frames).square().mean() < 0.02 * still
    nothing = codec.decode(frames[:, 0], torch.zeros_like(latents))
    assert torch.allclose(nothing, frames[:, :1].expand_as(nothing), atol=1e-4)


def test_a_codec_that_is_fitted_anew_spans_the_new_clips_and_keeps_what_its_components_meant():
    """The old components, shuffled among themselves, come back in their order; scipy is the oracle."""
    torch.manual_seed(0)
    old, turn = (torch.linalg.qr(torch.randn(n, k))[0] for n, k in ((50, 8), (8, 8)))
    new = torch.linalg.qr(old @ turn + 0.01 * torch.randn(50, 8))[0]
    found = m.rotation(new, old)
    assert np.allclose(found, scipy.linalg.orthogonal_procrustes(new.numpy(), old.numpy())[0], atol=1e-5)
    assert (new @ found - old).abs().max() < 0.05 < (new - old).abs().max()
    frames, others = torch.rand(2, 8, 8, 3, 32, 32)
    codec, fresh = (MotionCodec(Config(size=32, space_channels=6, channels=24)) for _ in range(2))
    codec.fit(frames)
    before = codec.space.clone()
    codec.fit(others)
    fresh.fit(others)
    assert torch.allclose(codec.space @ codec.space.mT, fresh.space @ fresh.space.mT, atol=1e-3)
    assert (codec.space * before).sum() > (fresh.space * before).sum()
    clips = codec.decode(others[:, 0], codec.encode(others))
    assert torch.allclose(clips, fresh.decode(others[:, 0], fresh.encode(others)), atol=1e-2)
    assert codec.encode(others).std((0, 1)).max() < 5


@pytest.mark.parametrize("size, grid", [(32, 3), (60, 5)])
def test_windows_leave_no_seam(size, grid):
    """The squares of the sine windows add up to 1 everywhere: what every window keeps comes back whole."""
    codec = MotionCodec(Config(size=size, grid=grid))
    ones = (codec.analysis * codec.synthesis)[:, :, 0]                             # (N-1, 1, side, side)
    whole = torch.nn.functional.fold(ones.flatten(1).T[None], size, codec.side, stride=codec.stride)
    assert torch.allclose(whole, torch.ones_like(whole), atol=1e-5)


def test_a_checkpoint_returns_the_same_generator_and_says_what_is_wrong(tmp_path):
    model = generator()
    m.save_generator(model, tmp_path)
    same = m.load_generator(tmp_path)
    assert same.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(MediaError, match="holds no config.json"):
        m.load_generator(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(MediaError, match="not a checkpoint"):
        m.load_generator(tmp_path)


def test_a_checkpoint_is_downloaded_by_its_name_on_the_hub_where_no_folder_has_it(tmp_path, monkeypatch):
    """Nothing is downloaded for a folder; what the hub refuses is one line."""
    def snapshot_download(name, **only):
        if name != "someone/portrait":
            raise OSError("404 Client Error.\n\nNot Found")
        return str(tmp_path / "downloaded")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert m.hub_folder("someone/portrait") == tmp_path / "downloaded"
    with pytest.raises(MediaError, match=r"^someone/else: holds no config.json, nor .* \(404.*\); [^\n]*$"):
        m.hub_folder("someone/else")
    (tmp_path / "someone" / "portrait").mkdir(parents=True)
    assert m.hub_folder("someone/portrait") == Path("someone/portrait")
