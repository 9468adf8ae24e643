"""A trunk that starts as a language model, and blocks that keep less and compute twice."""

import shutil

import pytest
import torch
import transformers

import model as m
import train
from data import MediaError
from model import Config, Generator, load_trunk, trunk_shape
from test_model import SMALL, generator, inputs, parallel_inputs

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
    model = Generator(Config(**{**SMALL, **trunk_shape(folder)})).eval()
    load_trunk(model, folder)
    return model


def causal(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def test_the_trunk_under_a_causal_mask_is_the_language_model(tmp_path):
    """Time, row and column all the token's index: transformers' hidden states, and the gradients of a sum of them with
    respect to the tokens and to every weight of the trunk, all to 1e-5 in fp32, whatever the noise level."""
    language = language_model(tmp_path)
    model, length = generator_from(str(tmp_path)), 40
    tokens = torch.randn(2, length, QWEN3["hidden_size"])
    ours, theirs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    positions = torch.arange(length, dtype=torch.float64)[:, None].expand(-1, 3)
    condition = torch.randn(2, 1, QWEN3["hidden_size"])
    x = ours
    for block in model.blocks:
        x = block(x, lambda linear: linear(condition), model.rope(positions), causal)
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
            next(k for k, v in m.QWEN3_LAYER.items() if v in name))
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
        load_trunk(Generator(Config(**SMALL)), str(tmp_path / "good"))


def kept_by(model, *given) -> tuple[int, dict]:
    """Bytes that the forward pass keeps for the backward one, weights left out, and the gradients."""
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        held.append(x)                                            # or storages would be freed and counted once
        return x
    held = []
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(*given).square().mean()
    loss.backward()
    return sum(kept.values()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_keeps_less_and_changes_no_gradient():
    """Of every block only its input is kept: with 6 layers less than a third of the bytes, and the same gradients."""
    model = generator(layers=6)
    given = *inputs(model, 4), *parallel_inputs(model, 4)
    (much, plain), model.checkpointing = kept_by(model, *given), True
    little, same = kept_by(model, *given)
    assert plain.keys() == same.keys() and all(torch.equal(plain[k], same[k]) for k in plain)
    assert little < much / 3, (little, much)


FLAGS = ("--size 32 --space-channels 6 --channels 8 --clips 6 --seconds 1 --validate-clips 2 --batch 2 "
         "--sampling-steps 1 --steps 2 --judge none --checkpointing").split()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path / "cache"))


def test_a_run_starts_from_the_language_model_and_goes_on_without_it(cache, tmp_path, monkeypatch):
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
