"""What reward.py promises of its judges, of the regularisers and of the composite reward."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import gaussian_blur

import reward
from extras import score
from extras.endpoint import RemoteJudge
from data import Clip, to_bytes
from extras.files import MediaError
from extras.lessons import FAULTS, spoil
from extras.media import FPS
from extras.reward_flags import make_judge
from extras.school import save_judge, tiny_judge
from reward import (COMPONENTS, JUDGED, RUBRIC, Exemplars, Judge, Reward, beyond, likeness, spans, straying,
                    temporal)
from tiny import Bright


@pytest.fixture(scope="module")
def batch(strangers):
    """Four of them, 48 frames: frames in [0, 1], sound, names."""
    four = strangers[:4]
    return (torch.stack([c.frames[:48] for c in four]) / 255, torch.stack([c.audio[:48 * 640] for c in four]),
            [c.name for c in four])


def save_omni(folder, generation: str) -> torch.nn.Module:
    """Write a Qwen-Omni checkpoint, random and tiny, as transformers would. Returns: its thinker."""
    tiny = tiny_judge()
    processor, tokenizer = tiny.processor, tiny.processor.tokenizer
    if generation == "qwen2_5":
        model = transformers.Qwen2_5OmniForConditionalGeneration(transformers.Qwen2_5OmniConfig(
            thinker_config=tiny.model.config.to_dict(), enable_audio_output=False))
    else:                             # mixture of experts, deep-stacked vision, finer interleaving
        token = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind.upper()}|>")
                 for kind in ("image", "audio", "video")}
        token |= {f"{kind}_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_{short}|>")
                  for kind in ("vision", "audio") for end, short in (("start", "bos"), ("end", "eos"))}
        rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], mrope_interleaved=True)
        model = transformers.Qwen3OmniMoeForConditionalGeneration(transformers.Qwen3OmniMoeConfig(
            enable_audio_output=False, thinker_config=dict(
                audio_config=dict(num_mel_bins=64, d_model=32, encoder_layers=1, encoder_attention_heads=2,
                                  encoder_ffn_dim=32, output_dim=32, n_window=50, downsample_hidden_size=16),
                vision_config=dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=8,
                                   temporal_patch_size=2, spatial_merge_size=4, out_hidden_size=32,
                                   deepstack_visual_indexes=[0], num_position_embeddings=16),
                text_config=dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32,
                                 num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                                 head_dim=16, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
                                 rope_parameters=rope), **token)))
        processor = transformers.Qwen3OmniMoeProcessor(processor.image_processor, processor.video_processor,
                                                       processor.feature_extractor, tokenizer,
                                                       chat_template=processor.chat_template)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.thinker


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3"])
def omni(request, tmp_path_factory):
    """A judge loaded from a checkpoint of either generation, and the thinker that was saved."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    thinker = save_omni(folder, request.param)
    return Judge.load(folder, side=64), thinker


def test_questions_that_share_a_clip_get_the_answers_of_separate_prompts(omni, batch):
    """Keys and values of the clips are computed once. All logits equal those of each whole prompt alone."""
    judge, frames, audio = omni[0], to_bytes(batch[0]), batch[1]
    prefix, questions = judge.questions()
    with torch.no_grad():
        shared = judge.logits(frames, audio)
        for clip in 0, 3:
            for i, question in enumerate(questions):
                inputs = judge.read(frames[clip:clip + 1], audio[clip:clip + 1], prefix + question)
                alone = judge.model(**inputs, use_audio_in_video=True).logits[0, -1]
                torch.testing.assert_close(shared[clip, i], alone, atol=1e-5, rtol=0)


def test_every_weight_frame_and_sample_reaches_the_model(omni, batch):
    """Two frames are 2 x 2 merged tokens; 25 tokens of sound a second; at 25 frames a second, not at 2."""
    judge, thinker = omni
    loaded = judge.model.state_dict()
    assert type(judge.model) is type(thinker) and judge.rubric is RUBRIC
    assert all(torch.equal(weight, loaded[name]) for name, weight in thinker.state_dict().items())
    inputs = judge.read(to_bytes(batch[0]), batch[1], judge.questions()[0])
    assert (inputs["input_ids"] == judge.model.config.video_token_id).sum(1).tolist() == [24 * 4] * 4
    assert inputs["feature_attention_mask"].sum(1).tolist() == [48 * 4] * 4
    assert inputs["video_second_per_grid"].tolist() == pytest.approx([2 / FPS] * 4)


def test_the_rating_is_the_expectation_over_the_digits(omni, batch, monkeypatch):
    """p(2) = .1, p(3) = .2, p(5) = .5, the rest elsewhere: (.2 + .6 + 2.5) / .8. A third on digits is no
    rating, and a model that answers with anything is no judge."""
    judge = omni[0]
    with pytest.raises(MediaError, match=f"{batch[2][0]}: the judge does not rate its lip_sync"):
        judge.rate(*batch)
    logits = torch.full((4, 3, len(judge.processor.tokenizer)), -40.0)
    for digit, p in ((2, 0.1), (3, 0.2), (5, 0.5)):
        logits[..., judge.digits[digit - 1]] = math.log(p)
    logits[..., 0] = math.log(0.2)
    monkeypatch.setattr(judge, "logits", lambda frames, audio: logits[:len(frames)])
    ratings = judge.rate(*batch)
    torch.testing.assert_close(ratings.score, torch.full((4, 3), 3.3 / 0.8))
    torch.testing.assert_close(ratings.mass, torch.full((4, 3), 0.8))
    logits[1, 2, judge.digits[2]] = logits[1, 2, judge.digits[4]] = -40
    assert judge.rate(*batch).score.isnan().nonzero().tolist() == [[1, 2]]


def test_ratings_are_kept_for_one_judge_alone_however_many_threads_it_has():
    judge = Judge.load()
    before, threads = judge.fingerprint, torch.get_num_threads()
    torch.set_num_threads(1 + threads)
    assert judge.fingerprint == before
    torch.set_num_threads(threads)
    weight = judge.model.model.norm.weight
    weight.copy_(weight.flip(0))                                         # the same numbers, in another order
    turned = judge.fingerprint
    judge.rubric = judge.rubric | {"lip_sync": judge.rubric["motion"]}
    assert len({before, turned, judge.fingerprint}) == 3
    asked = [RemoteJudge(f"http://localhost:{at}/v1", model) for at, model in ((1, "a"), (1, "b"), (2, "a"))]
    assert asked[0].fingerprint == asked[2].fingerprint != asked[1].fingerprint          # it may have moved


def test_what_is_no_judge_is_named_in_one_line(tmp_path):
    """Nothing at all, a model of text alone, a shape that is no number, and a judge that lacks a weight."""
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text('{"model_type": "qwen3", "num_hidden_layers": "two"}')
    transformers.Qwen3Config(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "text")
    save_judge(tiny_judge(), tmp_path / "cut", "a card")
    state = load_file(tmp_path / "cut" / "model.safetensors")
    state.pop("visual.merger.mlp.0.weight")
    save_file(state, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    for name, words in {"nothing": "cannot be loaded as a judge", "text": "is a qwen3, which cannot watch",
                        "shape": "cannot be loaded as a judge .*num_hidden_layers",
                        "cut": "lacks the weights visual.merger.mlp.0.weight"}.items():
        with pytest.raises(MediaError, match=f"{words}[^\n]*$"):
            Judge.load(tmp_path / name)


def test_the_embedded_judge_rates_drawn_talkers_only_and_a_named_one_whatever_there_is(capsys):
    """With --data and no --judge there is no judge, and one line says how to have one."""
    flags = ["v.mp4", "--device", "cpu"]
    assert make_judge(score.parse_arguments(flags)).window == 48
    assert make_judge(score.parse_arguments([*flags, "--judge", "none"])) is None
    assert capsys.readouterr().err == ""
    assert make_judge(score.parse_arguments([*flags, "--data", "my clips"])) is None
    assert "python -m extras.school teach --data 'my clips'" in capsys.readouterr().err
    named = [*flags, "--data", "my clips", "--judge", str(reward.DEFAULT_JUDGE)]
    assert isinstance(make_judge(score.parse_arguments(named)), Judge)


@pytest.fixture(scope="module")
def exemplars(strangers) -> Exemplars:
    return Exemplars.measure(strangers, 4)


def frozen(frames):
    return frames[:, :1].repeat(1, frames.shape[1], 1, 1, 1)


def test_regularisers_equal_hand_computed_values():
    """Brightness n / 100 has no third difference; a jump of .03 at a border: seams log 3.
    Straying counts where the exemplars are still. Chunks earn what moves a video into the range 2 to 3."""
    frames = torch.zeros(1, 12, 3, 16, 16)
    measured = temporal(frames + torch.arange(12.0)[None, :, None, None, None] / 100, 4)
    assert measured["seams"].abs().max() < 1e-3 and (measured["smoothness"] < -4).all()
    stairs = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15.0])[None, :, None, None, None] / 100
    expected = torch.tensor([[0, 1, 1]]) * math.log(0.0301 / 0.0101)
    torch.testing.assert_close(temporal(frames + stairs, 4)["seams"], expected, atol=1e-3, rtol=0)
    portrait, still = torch.rand(1, 3, 32, 32), torch.zeros(32, 32)
    still[:, :8] = 1
    frames = portrait[:, None].repeat(1, 2, 1, 1, 1)
    frames[:, 0, :, :, 16:] = 0
    frames[:, 1, :, :, :8] += 0.1
    torch.testing.assert_close(straying(frames, portrait, still), torch.tensor([[0.0, 0.1]]))
    scores = beyond(torch.tensor([[3.0, 5.0], [1.0, 2.0], [0.0, 5.0]]), 2.0, 3.0)
    assert scores.tolist() == [[0, -2], [-1, 0], [0, 0]]


def test_a_real_clip_beats_a_frozen_and_each_spoilt_one_and_each_fault_lowers_its_own_regulariser(
        exemplars, batch):
    """The regularisers alone: stillness and smoothness without end do not win."""
    frames, audio, names = batch
    rate, rng = Reward(None, exemplars), torch.Generator().manual_seed(0)
    real = rate(frames, audio, frames[:, 0], names)
    spoilt = {fault: torch.stack([spoil(fault, 0.8, x, torch.zeros(48), rng)[0].clamp(0, 1) for x in frames])
              for fault in FAULTS}
    for name, made in {"frozen": frozen(frames), **spoilt}.items():
        total = rate(made, audio, frames[:, 0], names).total
        assert (total < real.total).all(), (name, total, real.total)
    step = torch.arange(48).div(4, rounding_mode="floor").view(1, 48, 1, 1, 1)
    worse = {"identity": torch.stack([gaussian_blur(x, 11, 2.0) for x in frames]),
             "smoothness": frames + 0.05 * torch.randn(frames.shape, generator=rng),
             "background": frames + 0.1, "seams": frames + 0.05 * (step % 2)}
    assert worse.keys() == real.components.keys()
    for name, made in worse.items():
        fallen = rate(made.clamp(0, 1), audio, frames[:, 0], names).components[name]
        assert (fallen < real.components[name] - 0.01).all(), (name, fallen, real.components[name])


def test_exemplars_are_measured_as_by_hand(strangers):
    smooth = strangers[3:6]
    measured = Exemplars.measure(smooth, 4)
    assert measured.temporal.keys() == {"smoothness", "seams"}
    for name in measured.temporal:
        mean = torch.stack([temporal(c.frames[None] / 255, 4)[name].mean() for c in smooth]).mean().item()
        assert measured.temporal[name] == pytest.approx((mean, mean), abs=1e-5), name
    frames = torch.stack([c.frames for c in smooth]) / 255
    stray = (frames - frames[:, :1]).abs().mean((0, 1, 2))
    torch.testing.assert_close(measured.still, torch.exp(-stray / 0.02))
    assert measured.likeness == pytest.approx(likeness(frames, frames[:, 0]).mean().item(), abs=1e-5)
    strays = straying(frames, frames[:, 0], measured.still)
    assert measured.straying == pytest.approx(strays.mean().item(), abs=1e-5)


def test_what_lies_between_a_real_clip_and_the_codecs_view_of_it_costs_nothing(strangers):
    """A codec that loses trembling: neither the clip nor its smooth version nor what lies between is held to
    the other; what trembles more, or stands still, is."""
    clip = Clip("short", strangers[0].frames[:48], strangers[0].audio[: 48 * 640])
    frames, sound = clip.frames[None] / 255, clip.audio[None]
    inner = (frames[:, :-2] + frames[:, 1:-1] + frames[:, 2:]) / 3
    smooth = torch.cat([frames[:, :1], inner, frames[:, -1:]], 1)
    codec = SimpleNamespace(scale=torch.ones(1), encode=lambda video: video,
                            decode=lambda portrait, code: smooth)
    weights = dict.fromkeys(COMPONENTS, 0.0) | {"smoothness": 1.0}
    alone, rate = (Reward(None, Exemplars.measure([clip], 4, c), weights) for c in (None, codec))
    low, high = rate.exemplars.temporal["smoothness"]
    assert low == pytest.approx(temporal(smooth, 4)["smoothness"].mean().item(), abs=1e-6)
    assert high == pytest.approx(temporal(frames, 4)["smoothness"].mean().item(), abs=1e-6)
    assert alone(smooth, sound, frames[:, 0], "a").total < -0.1 and low < high - 0.1
    shaken = frames + 0.05 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    for made in frames, smooth, (frames + smooth) / 2:
        assert rate(made, sound, frames[:, 0], "a").total.abs() < 1e-5
    for made in shaken.clamp(0, 1), frozen(frames):
        assert rate(made, sound, frames[:, 0], "a").total < -0.5


def test_components_add_up_to_the_total_and_what_nobody_can_say_is_left_out(exemplars, batch):
    """Eight components; without a judge or a sync network theirs are no part of it."""
    frames, audio, names = batch
    weights = dict(background=2.0, identity=0.5, smoothness=0.7, seams=0)
    scores = Reward(None, exemplars, weights)(frames, audio, frames[:, 0], names)
    assert set(scores.components) == set(weights) - {"seams"}
    torch.testing.assert_close(scores.total, sum(weights[name] * x for name, x in scores.components.items()))
    every = Reward(Bright(), exemplars, sync=reward.SyncNetwork(8, 8))(frames, audio, frames[:, 0], names)
    assert set(every.components) == set(COMPONENTS)
    with pytest.raises(MediaError, match="leave nothing to reward"):
        Reward(None, exemplars, dict.fromkeys(weights, 0.0))
    with pytest.raises(MediaError, match="--weights: this code knows no charm; it knows judge_lip_sync, "):
        Reward(None, exemplars, {"charm": 1.0})              # as from a run of other code


def test_a_regulariser_is_the_mean_of_its_chunks_and_none_is_above_zero(exemplars, batch):
    """Too little motion and far too much, of more clips than are measured at once."""
    frames, names = batch[0].repeat(3, 1, 1, 1, 1), list("abcdefghijkl")
    strength = torch.linspace(0.2, 2.0, 12).view(-1, 1, 1, 1, 1)
    frames = frames[:, :1] + strength * (frames - frames[:, :1])
    rate = Reward(Bright(), exemplars, sync=reward.SyncNetwork(8, 8))
    scores = rate(frames, batch[1].repeat(3, 1), frames[:, 0], names)
    assert set(scores.per_chunk) == set(scores.components) - set(JUDGED)
    for name, chunks in scores.per_chunk.items():
        assert chunks.shape == (12, 12)
        torch.testing.assert_close(chunks.mean(1), scores.components[name])
        assert (scores.components[name] <= 0).all()


def test_long_videos_are_judged_in_windows_and_earn_their_mean_by_the_calibration(exemplars):
    """Brightness rises with time. Windows are of one width and cover every frame. A rating of 3 lies halfway
    from 1 to 5, which people call 2 and 2.5."""
    frames = (torch.arange(60.0) / 60).view(1, 60, 1, 1, 1).expand(1, 60, 3, 64, 64)
    scores = Reward(Bright(), exemplars)(frames, torch.zeros(1, 60 * 640), frames[:, 0], ["a"])
    windows = [1 + 4 * torch.arange(a, b).float().mean() / 60 for a, b in ((0, 20), (20, 40), (40, 60))]
    assert scores.components["judge_lip_sync"].item() == pytest.approx(sum(windows).item() / 3, abs=1e-5)
    assert spans(48, None) == [(0, 48)] and spans(48, 48) == [(0, 48)] and spans(30, 48) == [(0, 30)]
    for frames, width in ((75, 48), (100, 48), (48, 25), (49, 48)):
        parts = spans(frames, width)
        assert {b - a for a, b in parts} == {width}
        assert set(range(frames)) == {i for a, b in parts for i in range(a, b)}
    frames, audio = torch.full((1, 16, 3, 64, 64), 0.5), torch.zeros(1, 16 * 640)
    plain, mapped = (Reward(Bright(), exemplars, calibration=c)(frames, audio, frames[:, 0], ["a"]).components
                     for c in ({}, {"motion": ([1.0, 5.0], [2.0, 2.5])}))
    assert plain["judge_motion"].item() == pytest.approx(3)
    assert mapped["judge_motion"].item() == pytest.approx(2.25)
    assert mapped["judge_lip_sync"].item() == pytest.approx(3)


def test_what_is_not_a_number_names_the_clip_but_a_rating_may_be_missing(exemplars, batch):
    frames, audio, names = batch
    broken = frames.clone()
    broken[2, 5, 0, 3, 3] = math.nan
    for name in "background", "smoothness", "seams":
        weights = dict.fromkeys(COMPONENTS, 0.0) | {name: 1.0}
        with pytest.raises(MediaError, match=f"{names[2]}: its {name} is nan"):
            Reward(None, exemplars, weights)(broken, audio, frames[:, 0], names)
    scores = Reward(Bright(unrated=[2]), exemplars)(frames, audio, frames[:, 0], names)
    assert scores.total.isnan().tolist() == [False, False, True, False]
    assert torch.equal(scores.components["judge_motion"].isnan(), scores.total.isnan())
    with pytest.raises(ValueError, match="640 samples"):
        Reward(None, exemplars)(frames, audio[:, :-1], frames[:, 0], names)
