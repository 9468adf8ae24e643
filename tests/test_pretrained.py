"""Models that others trained: each feature of a speech encoder at its instant, kept per clip, the same in training and
sampling; and a trunk that starts as a language model."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

import model as m
import sample
import train
from data import MEL_DIM, SAMPLES_PER_FRAME, MediaError, hear, log_mel
from extras import pretrained
from extras.pretrained import SpeechEncoder, encoder_width, load_trunk, trunk_shape
from kernels.attention import Layout
from model import Config, Generator, load_generator
from test_model import SMALL as TRUNK
from test_model import inputs

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7,
             num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
KINDS = {"wav2vec2": transformers.Wav2Vec2Config(**SMALL), "hubert": transformers.HubertConfig(**SMALL),
         "wavlm": transformers.WavLMConfig(**SMALL),
         "whisper": transformers.WhisperConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2, vocab_size=8,
                                               encoder_ffn_dim=16, decoder_layers=1, decoder_attention_heads=2,
                                               decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """One folder per kind of encoder: tiny, random, its convolutions the same forwards and backwards in time, its
    attention and the convolution that tells it positions silenced: both spread a change over all the sound."""
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
        extractor = transformers.WhisperFeatureExtractor if kind == "whisper" else transformers.Wav2Vec2FeatureExtractor
        extractor().save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory


@pytest.mark.parametrize("kind", KINDS)
def test_a_click_lands_in_its_frame_and_in_its_half_of_it(encoders, kind):
    """A click near the middle of a half of frame f, sample 640 f + 160 or + 480, changes this half's features most.
    19 s of noise are heard in two pieces; the clicks lie in either, and at the seam."""
    encoder, frames, rng = SpeechEncoder(str(encoders / kind)), 475, np.random.default_rng(0)
    sound = 0.1 * torch.from_numpy(rng.standard_normal(frames * SAMPLES_PER_FRAME).astype(np.float32))
    before = encoder(sound, frames)
    assert before.shape == (frames, encoder_width(str(encoders / kind))) and before.isfinite().all()
    for frame in (1, 40, 200, 399, 400, 401, 473):
        for half, x in enumerate((rng.integers(100, 221), rng.integers(420, 541))):
            clicked = sound.clone()
            clicked[frame * SAMPLES_PER_FRAME + x] += 1
            change = (encoder(clicked, frames) - before).view(2 * frames, -1).norm(dim=1)
            assert change.argmax() == 2 * frame + half, (frame, x, change.argmax())


@pytest.mark.parametrize("kind", KINDS)
def test_the_features_are_neither_early_nor_late(encoders, kind):
    """Where the features of a click lie, their mean place weighted by the squared change, averaged over clicks all over
    a frame, is where the clicks are to within 2 ms, a tenth of a feature."""
    encoder, frames, late = SpeechEncoder(str(encoders / kind)), 100, []
    sound = 0.1 * torch.randn(frames * SAMPLES_PER_FRAME, generator=torch.Generator().manual_seed(0))
    before = encoder(sound, frames)
    for at in range(10 * SAMPLES_PER_FRAME + 5, 11 * SAMPLES_PER_FRAME, 20):
        clicked = sound.clone()
        clicked[at] += 1
        change = (encoder(clicked, frames) - before).view(2 * frames, -1).square().sum(1)[15:27]
        middle = 320 * torch.arange(15, 27) + 160
        late.append((change * middle).sum() / change.sum() - (at + 0.5))
    assert abs(torch.stack(late).mean()) < 32, torch.stack(late).mean()


def test_a_feature_stands_for_the_middle_of_the_samples_that_it_is_made_of():
    """A ramp through the kernels and strides of the convolutions, all weights equal: what comes out is the mean sample
    number under each feature. Padded by 40 zeros that is the middle of every half frame."""
    ramp = torch.arange(-40, 3 * SAMPLES_PER_FRAME + 40, dtype=torch.float64)[None, None]
    for kernel, stride in zip(KINDS["wav2vec2"].conv_kernel, KINDS["wav2vec2"].conv_stride):
        ramp = torch.nn.functional.avg_pool1d(ramp, kernel, stride)
    assert torch.allclose(ramp.flatten() + 0.5, 320 * torch.arange(6, dtype=torch.float64) + 160)


def test_features_are_kept_per_clip_and_not_mixed_up(encoders, tmp_path, monkeypatch):
    """Heard once; another sound, another encoder or another length is another entry. The encoder's own answer comes
    back; sound that is too short is continued by silence."""
    sound, name = torch.randn(10 * SAMPLES_PER_FRAME), str(encoders / "hubert")
    calls, listen = [], SpeechEncoder.listen
    monkeypatch.setattr(SpeechEncoder, "listen", lambda self, sound: (calls.append(len(sound)), listen(self, sound))[1])
    pretrained.speech_encoder.cache_clear()
    first = hear(sound, 10, name, cache=tmp_path)
    assert torch.equal(first, hear(sound, 10, name, cache=tmp_path)) and calls.count(6400) == 1
    assert torch.equal(first, SpeechEncoder(name)(sound, 10))
    kept = len(list(tmp_path.iterdir()))
    others = [hear(sound + 0.1, 10, name, cache=tmp_path), hear(sound, 10, str(encoders / "wavlm"), cache=tmp_path),
              hear(sound, 12, name, cache=tmp_path)[:10]]
    assert all(not torch.equal(first, other) for other in others)
    assert kept == 1 and len(list(tmp_path.iterdir())) == 4
    assert torch.equal(hear(sound, 10), log_mel(sound, 10))


RUN = ("--size 32 --width 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --mlp-width 32 --space-channels 6 "
       "--channels 8 --clips 6 --seconds 1 --validate-clips 2 --batch 2 --sampling-steps 1 --steps 2 --judge none "
       "--updates 1 --prompts 2 --group 2 --parts 1 --watch-clips 1").split()


def test_training_post_training_and_sampling_hear_by_the_encoder_of_the_run(encoders, tmp_path, monkeypatch, capsys):
    """The run remembers the encoder; rollouts get the features of `hear`, and so does sample.py, from config.json."""
    heard, roll_out = [], train.grpo.roll_out
    monkeypatch.setattr(train.grpo, "roll_out", lambda model, portrait, mel, *rest: (
        heard.append(mel), roll_out(model, portrait, mel, *rest))[1])
    monkeypatch.chdir(encoders)
    train.main([*RUN, "--audio-encoder", "wav2vec2", "--out", str(tmp_path / "run")])
    monkeypatch.chdir(tmp_path)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert config["audio_encoder"] == str(encoders / "wav2vec2") and config["mel_channels"] == 32
    args = train.parse_arguments(["--resume", str(tmp_path / "run")])
    features = [hear(clip.audio, args.frames, str(encoders / "wav2vec2")) for clip in train.load_clips(args)[0]]
    assert all(any(torch.equal(mel, feature) for feature in features) for mel in heard[0])
    sample.main(["--checkpoint", "run", "--image", "run/portrait.png", "--audio", "run/speech.wav", "--out", "v.mp4"])
    assert "all of the sound, which the speech encoder hears first" in capsys.readouterr().out
    model, speech = load_generator("run").eval(), torch.randn(9 * SAMPLES_PER_FRAME)
    made = list(sample.animate(model, torch.zeros(3, 32, 32, dtype=torch.uint8), speech, 1, 1.0, 0))
    assert len(made) == 9


def test_what_is_no_speech_encoder_is_named_with_the_reason(encoders, tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    transformers.Wav2Vec2Config(**SMALL | {"conv_stride": (5, 2, 2, 2, 2, 2, 1)}).save_pretrained(tmp_path / "fast")
    transformers.HubertModel(KINDS["hubert"]).save_pretrained(tmp_path / "deaf")
    transformers.HubertModel(KINDS["hubert"]).save_pretrained(tmp_path / "phone")
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path / "phone")
    for name, message in {"bert": "is a bert and cannot serve as a speech encoder; use wav2vec2, hubert",
                          "empty": "cannot be loaded as a speech encoder", "fast": "a feature of 160 samples",
                          "deaf": "cannot be loaded as a speech encoder", "phone": "cannot be loaded"}.items():
        with pytest.raises(MediaError, match=message):
            SpeechEncoder(str(tmp_path / name))
    with pytest.raises(MediaError, match="cannot be loaded as a speech encoder"):
        train.main(["--audio-encoder", str(tmp_path / "empty"), "--out", str(tmp_path / "run")])
    assert train.parse_arguments(["--out", str(tmp_path / "run")]).config.mel_channels == MEL_DIM


# ---------------------------------------------------------------- a trunk that was a language model

QWEN3 = dict(vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-4, rope_parameters={"rope_type": "default",
                                                                                    "rope_theta": 5000.0})


def language_model(folder, **changes):
    """A tiny Qwen3 whose every weight is random, its norms too, saved to a folder as transformers does."""
    torch.manual_seed(0)
    language = transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3 | changes)).eval()
    with torch.no_grad():
        for p in language.parameters():
            p.copy_(1 + 0.3 * torch.randn(p.shape) if p.ndim == 1 else torch.randn(p.shape) / p.shape[-1] ** 0.5)
    language.save_pretrained(folder)
    return language


def generator_from(folder) -> Generator:
    model = Generator(Config(**{**TRUNK, **trunk_shape(folder)})).eval()
    load_trunk(model, folder)
    return model


def test_the_trunk_under_a_causal_mask_is_the_language_model(tmp_path):
    """One token a chunk and no sound make the mask causal; time, row and column are the token's index. Then hidden
    states are transformers', and the gradients of a sum of them with respect to the tokens and to every weight of
    the trunk, all to 1e-5 in fp32, whatever the noise level."""
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


def test_rows_and_columns_and_the_portrait_still_count_in_such_a_trunk(tmp_path):
    """It generates; its rotary frequencies are the language model's, dealt out: time alone does not place a token."""
    language_model(tmp_path)
    model = generator_from(str(tmp_path))
    rope = lambda *at: torch.cat(model.rope(torch.tensor([at], dtype=torch.float64)))
    assert len({tuple(rope(*at).flatten().tolist()) for at in [(3, 3, 3), (3, 4, 3), (3, 3, 4), (4, 3, 3)]}) == 4
    made = next(model.generate(*inputs(model, 1, 1), lambda chunk: torch.randn(1, 10, 8), 1))[1]
    assert made.isfinite().all()


def test_a_model_that_cannot_be_the_trunk_is_named_with_the_reason(tmp_path):
    language_model(tmp_path / "good")
    language_model(tmp_path / "bias", attention_bias=True)
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "good", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "good", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"half")
    for name, message in {"bias": "attention_bias True", "bert": "is a bert and cannot",
                          "empty": "cannot be loaded"}.items():
        with pytest.raises(MediaError, match=message):
            trunk_shape(str(tmp_path / name))
    for name in ("bare", "cut"):
        with pytest.raises(MediaError, match="cannot be loaded"):
            generator_from(str(tmp_path / name))
    language_model(tmp_path / "short", num_hidden_layers=2)
    shutil.copy(tmp_path / "short" / "model.safetensors", tmp_path / "bare")
    with pytest.raises(MediaError, match="lacks the weights layers.2"):
        generator_from(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="width"):
        load_trunk(Generator(Config(**TRUNK)), str(tmp_path / "good"))


FLAGS = ("--size 32 --space-channels 6 --channels 8 --clips 6 --seconds 1 --validate-clips 2 --batch 2 "
         "--sampling-steps 1 --steps 2 --judge none --curate 0 --checkpointing").split()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path / "cache"))


def test_a_run_starts_from_the_language_model_and_goes_on_without_it(own_cache, tmp_path, monkeypatch):
    """With learning rates of 0 and --checkpointing, the trunk that is saved is the language model's; its folder may
    go away afterwards. Every block of every step, of pretraining and of post-training, runs through checkpoint."""
    language, calls = language_model(tmp_path / "qwen"), []
    real = m.checkpoint
    monkeypatch.setattr(m, "checkpoint", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    folder, post = tmp_path / "run", "--updates 1 --prompts 1 --group 2 --parts 1 --micro-batch 2 --watch-clips 1"
    train.main([*FLAGS, *post.split(), "--init-from", str(tmp_path / "qwen"), "--lr", "0", "--muon-lr", "0",
                "--post-lr", "0", "--out", str(folder)])
    assert len(calls) == 3 * (2 + 2)              # blocks * (steps + a rescoring that is checked and one that teaches)
    saved = m.load_generator(folder)
    assert saved.config.rope_base == 5000 and saved.config.norm_eps == 1e-4
    assert torch.equal(saved.blocks[2].down.weight, language.layers[2].mlp.down_proj.weight)
    assert torch.equal(saved.norm.weight, language.norm.weight)
    shutil.rmtree(tmp_path / "qwen")
    train.main(["--resume", str(folder)])


@pytest.mark.parametrize("wrong, code, message", [
    ("--init-from good --width 64", 2, "--init-from fixes --width; leave it out"),
    ("--init-from good --rope-base 10 --heads 4", 2, "--init-from fixes --heads"),
    ("--init-from odd", 2, "8 head_dim 12"), ("--init-from empty", 1, "cannot be loaded as a language model")])
def test_flags_that_do_not_fit_it_end_with_one_line(tmp_path, monkeypatch, capsys, wrong, code, message):
    language_model(tmp_path / "good")
    language_model(tmp_path / "odd", head_dim=12)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit if code == 2 else MediaError) as stop:
        train.main([*wrong.split(), "--out", "run"])
    last = capsys.readouterr().err.splitlines()[-1] if code == 2 else str(stop.value)
    assert message in last and "\n" not in last
