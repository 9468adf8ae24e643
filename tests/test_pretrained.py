"""Models that others trained: each feature of a speech encoder at its instant, kept per clip, the same in
training and sampling; and a trunk that starts as a language model."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import model as m
import sample
import train
from data import hear, log_mel
from extras import pretrained
from extras.media import SAMPLES_PER_FRAME
from extras.pretrained import SpeechEncoder, encoder_width, load_trunk, trunk_shape
from kernels.attention import Layout
from model import Config, Generator
from test_model import SMALL as TRUNK
from tiny import WHOLE

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
             conv_dim=(8,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
KINDS = {"wav2vec2": transformers.Wav2Vec2Config(**SMALL), "hubert": transformers.HubertConfig(**SMALL),
         "wavlm": transformers.WavLMConfig(**SMALL),
         "whisper": transformers.WhisperConfig(
             d_model=16, encoder_layers=1, encoder_attention_heads=2, vocab_size=8, encoder_ffn_dim=16,
             decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A folder per kind of encoder: tiny, random, its convolutions the same forwards and backwards in time,
    attention and positional convolution silenced: both spread a change over all the sound."""
    root = tmp_path_factory.mktemp("encoders")
    for kind, config in KINDS.items():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "conv" in name and weight.ndim == 3 and "pos_conv" not in name:
                    weight.copy_(weight + weight.flip(-1))           # a random kernel would lean to one side
                if "out_proj" in name or "pos_conv" in name and "original1" not in name:
                    weight.zero_()
        model.save_pretrained(root / kind)
        extractor = "WhisperFeatureExtractor" if kind == "whisper" else "Wav2Vec2FeatureExtractor"
        getattr(transformers, extractor)().save_pretrained(root / kind)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_a_click_changes_the_features_of_its_half_frame_most_neither_early_nor_late(encoders, kind):
    """19 s of noise are heard in two pieces; the clicks lie in either, and at the seam. The place of a
    change, its mean weighted by the squared change and averaged over clicks all over a frame, is where the
    clicks are, to within 2 ms, a tenth of a feature."""
    encoder, frames, rng = SpeechEncoder(str(encoders / kind)), 475, np.random.default_rng(0)
    sound = 0.1 * torch.from_numpy(rng.standard_normal(frames * SAMPLES_PER_FRAME).astype(np.float32))
    before = encoder(sound, frames)
    assert before.shape == (frames, encoder_width(str(encoders / kind))) and before.isfinite().all()

    def change(sound, frames, before, at):           # (2 * frames,)
        clicked = sound.clone()
        clicked[at] += 1
        return (encoder(clicked, frames) - before).view(2 * frames, -1).square().sum(1)

    for frame in 1, 200, 399, 400, 473:
        for half, x in enumerate((rng.integers(100, 221), rng.integers(420, 541))):
            changed = change(sound, frames, before, frame * SAMPLES_PER_FRAME + x)
            assert changed.argmax() == 2 * frame + half, (frame, x, changed.argmax())
    short, late = sound[:40 * SAMPLES_PER_FRAME], []
    before = encoder(short, 40)
    for at in range(10 * SAMPLES_PER_FRAME + 5, 11 * SAMPLES_PER_FRAME, 20):
        changed, middle = change(short, 40, before, at)[15:27], 320 * torch.arange(15, 27) + 160
        late.append((changed * middle).sum() / changed.sum() - (at + 0.5))
    assert abs(torch.stack(late).mean()) < 32, torch.stack(late).mean()


def test_features_are_kept_per_clip_and_not_mixed_up(encoders, tmp_path, monkeypatch):
    """Another sound, encoder or length is another entry. Sound that is too short is continued by silence."""
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path))
    sound = torch.randn(10 * SAMPLES_PER_FRAME)
    name, other = str(encoders / "hubert"), str(encoders / "wavlm")
    first = hear(sound, 10, name)
    assert torch.equal(first, SpeechEncoder(name)(sound, 10)) and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(first, hear(sound, 10, name)) and len(list(tmp_path.iterdir())) == 1
    for unlike in (hear(sound + 0.1, 10, name), hear(sound, 10, other),
                   hear(sound, 12, name)[:10]):
        assert not torch.equal(first, unlike)
    assert len(list(tmp_path.iterdir())) == 4 and torch.equal(hear(sound, 10), log_mel(sound, 10))


def test_training_post_training_and_sampling_hear_by_the_encoder_of_the_run(encoders, tmp_path, monkeypatch,
                                                                            capsys):
    """The run remembers the encoder; rollouts get the features of `hear`, and so does sample.py."""
    heard, roll_out = [], train.grpo.roll_out
    monkeypatch.setattr(train.grpo, "roll_out", lambda model, portrait, mel, *rest: (
        heard.append(mel), roll_out(model, portrait, mel, *rest))[1])
    monkeypatch.chdir(encoders)
    less = "--steps 2 --curate 0 --updates 1 --parts 1 --looks 1 --audio-encoder wav2vec2".split()
    train.main([*WHOLE, *less, "--out", str(tmp_path / "run")])
    monkeypatch.chdir(tmp_path)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert config["audio_encoder"] == str(encoders / "wav2vec2") and config["mel_channels"] == 32
    args = train.parse_arguments(["--resume", str(tmp_path / "run")])
    clips, _ = train.put_in_time(train.load_clips(args)[0], args)
    features = [hear(clip.audio, args.frames, str(encoders / "wav2vec2")) for clip in clips]
    assert all(any(torch.equal(mel, feature) for feature in features) for mel in heard[0])
    sample.main("--checkpoint run --image run/portrait.png --audio run/speech.wav --out v.mp4".split())
    assert "all of the sound, which the speech encoder hears first" in capsys.readouterr().out


QWEN3 = dict(vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-4, rope_parameters={"rope_type": "default",
                                                                                    "rope_theta": 1e6})


def language_model(folder, **changes):
    """A tiny Qwen3 whose every weight is random, its norms too, saved to a folder as transformers does."""
    torch.manual_seed(0)
    language = transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3 | changes)).eval()
    with torch.no_grad():
        for p in language.parameters():
            noise = torch.randn(p.shape)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise / p.shape[-1] ** 0.5)
    language.save_pretrained(folder)
    return language


def generator_from(folder) -> Generator:
    model = Generator(Config(**{**TRUNK, **trunk_shape(folder)})).eval()
    load_trunk(model, folder)
    return model


def test_the_trunk_under_a_causal_mask_is_the_language_model(tmp_path):
    """One token a chunk and no sound make the mask causal. Then hidden states are transformers', and so are
    the gradients for the tokens and for every weight, to 1e-5 in fp32, whatever the noise level."""
    language = language_model(tmp_path)
    model, length = generator_from(str(tmp_path)), 40
    tokens = torch.randn(2, length, QWEN3["hidden_size"])
    ours, theirs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    positions = torch.arange(length, dtype=torch.float64)[:, None].expand(-1, 3)
    condition = torch.randn(2, 1, QWEN3["hidden_size"])
    x, causal = ours, Layout(length, video=1, audio=0, segments=0)
    for block in model.blocks:
        x = block(x, condition, model.rope(positions), causal)
    want = language(inputs_embeds=theirs).last_hidden_state
    weigh = torch.randn(want.shape)
    assert (model.norm(x) - want).abs().max() <= 1e-5 and want.std() > 0.5
    (model.norm(x) * weigh).mean().backward()
    language.requires_grad_().train()
    (language(inputs_embeds=theirs).last_hidden_state * weigh).mean().backward()
    assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()
    grads = {name: p.grad for name, p in language.named_parameters() if "embed" not in name}
    assert len(grads) == 3 * 11 + 1
    for name, grad in grads.items():
        ours = model.norm if name == "norm.weight" else model.blocks[int(name.split(".")[1])].get_submodule(
            next(k for k, v in pretrained.QWEN3_LAYER.items() if v in name))
        assert (ours.weight.grad - grad).abs().max() <= 1e-5 * grad.abs().max(), name


FLAGS = ("--size 32 --space-channels 6 --channels 8 --clips 6 --seconds 1 --validate-clips 2 --batch 2 "
         "--sampling-steps 1 --steps 2 --looks 1 --judge none --curate 0 --checkpointing").split()


def test_a_run_starts_from_the_language_model_and_goes_on_without_it(unmeasured, tmp_path, monkeypatch):
    """With learning rates of 0, the trunk that is saved is the language model's; its folder may go away then.
    Every block of every step runs through checkpoint."""
    language, calls = language_model(tmp_path / "qwen"), []
    real = m.checkpoint
    monkeypatch.setattr(m, "checkpoint", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    folder = tmp_path / "run"
    post = "--updates 1 --prompts 1 --group 2 --parts 1 --micro-batch 2 --watch-clips 1"
    train.main([*FLAGS, *post.split(), "--init-from", str(tmp_path / "qwen"), "--lr", "0", "--muon-lr", "0",
                "--post-lr", "0", "--out", str(folder)])
    assert len(calls) == 3 * (2 + 2)     # blocks * (steps + a rescoring that is checked and one that teaches)
    saved = m.load_generator(folder)
    assert saved.config.rope_base == 1e6 and saved.config.norm_eps == 1e-4
    assert torch.equal(saved.blocks[2].down.weight, language.layers[2].mlp.down_proj.weight)
    assert torch.equal(saved.norm.weight, language.norm.weight)
    shutil.rmtree(tmp_path / "qwen")
    train.main(["--resume", str(folder)])


@pytest.mark.parametrize("load, make, words", [
    (SpeechEncoder, transformers.BertConfig().save_pretrained, "is a bert, not a speech encoder"),
    (SpeechEncoder, transformers.Wav2Vec2Config(**SMALL, conv_stride=(5, 2, 2, 2, 2, 2, 1)).save_pretrained,
     "a feature of 160 samples"),
    (trunk_shape, transformers.BertConfig().save_pretrained, "is a bert, not a language model"),
    (trunk_shape, lambda to: language_model(to, attention_bias=True), "attention_bias True"),
    (lambda path: train.parse_arguments(["--init-from", path, "--width", "64", "--out", "run"]),
     language_model, "--init-from fixes --width; leave it out")])
def test_a_model_that_cannot_be_used_is_named_with_the_reason(tmp_path, load, make, words, capsys):
    make(tmp_path)
    with pytest.raises((ValueError, SystemExit)) as end:
        load(str(tmp_path))
    assert words in str(end.value) + capsys.readouterr().err
