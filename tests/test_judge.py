"""What reward.py promises of its judges and of the composite reward."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reward
from data import FPS, Clip, MediaError
from extras.lessons import FAULTS, blur, spoil
from extras.school import save_judge, tiny_judge
from extras.talkers import render_talker
from reward import (ASPECTS, COMPONENTS, JUDGED, RUBRIC, Exemplars, Judge, PretrainedLikeness, Ratings, Reward,
                    likeness, prompt, spans, straying, temporal)
from sample import correlation


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Sixteen talkers of a world that no judge was taught on, 64 frames of 64 pixels."""
    return [render_talker(i, 31, 64, 64) for i in range(16)]


@pytest.fixture(scope="module")
def batch(clips):
    """Four of them, 48 frames: frames in [0, 1], sound, names."""
    return (torch.stack([c.frames[:48] for c in clips[:4]]) / 255, torch.stack([c.audio[:48 * 640] for c in clips[:4]]),
            [c.name for c in clips[:4]])


# ---------------------------------------------------------------- checkpoints of the real architectures

def save_omni(folder, generation: str) -> torch.nn.Module:
    """Write a whole Qwen-Omni checkpoint, random and tiny, as transformers would. Returns its thinker."""
    tiny = tiny_judge()
    tokenizer = tiny.processor.tokenizer
    token = {f"{modality}_token_id": tokenizer.convert_tokens_to_ids(f"<|{modality.upper()}|>")
             for modality in ("image", "audio", "video")}
    token |= {f"{modality}_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|{modality}_{short}|>")
              for modality in ("vision", "audio") for end, short in (("start", "bos"), ("end", "eos"))}
    processor = tiny.processor
    if generation == "qwen2_5":                      # with talker and vocoder, which a judge does not need
        config = transformers.Qwen2_5OmniConfig(
            thinker_config=tiny.model.config.to_dict(), enable_audio_output=True,
            talker_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                               num_key_value_heads=1, vocab_size=64, embedding_size=128, head_dim=16),
            token2wav_config=dict(
                dit_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ff_mult=1, emb_dim=16,
                                head_dim=16, enc_dim=16, enc_emb_dim=16, enc_channels=[16, 16, 16, 16, 48],
                                enc_attention_channels=8, enc_se_channels=8),
                bigvgan_config=dict(upsample_initial_channel=32)))
        model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    else:                                            # mixture of experts, deep-stacked vision, finer interleaving
        config = transformers.Qwen3OmniMoeConfig(enable_audio_output=False, thinker_config=dict(
            audio_config=dict(num_mel_bins=64, d_model=32, encoder_layers=1, encoder_attention_heads=2,
                              encoder_ffn_dim=32, output_dim=32, n_window=50, downsample_hidden_size=16),
            vision_config=dict(depth=2, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=8,
                               temporal_patch_size=2, spatial_merge_size=4, out_hidden_size=32,
                               deepstack_visual_indexes=[0], num_position_embeddings=16),
            text_config=dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=2, head_dim=16, moe_intermediate_size=16,
                             num_experts=4, num_experts_per_tok=2,
                             rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2],
                                                  mrope_interleaved=True)), **token))
        model = transformers.Qwen3OmniMoeForConditionalGeneration(config)
        processor = transformers.Qwen3OmniMoeProcessor(processor.image_processor, processor.video_processor,
                                                       processor.feature_extractor, tokenizer,
                                                       chat_template=tiny.processor.chat_template)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.thinker


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3"])
def omni(request, tmp_path_factory):
    """A judge loaded from a whole checkpoint of either generation, and the thinker that was saved."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    thinker = save_omni(folder, request.param)
    return Judge.load(folder, side=64), thinker


def bytes_of(frames):
    return (frames * 255).round().byte()


def test_a_whole_checkpoint_loads_as_its_thinker_with_every_weight(omni):
    judge, thinker = omni
    assert type(judge.model) is type(thinker) and judge.rubric is RUBRIC and judge.window is None
    loaded = judge.model.state_dict()
    for name, weight in thinker.state_dict().items():
        assert torch.equal(weight, loaded[name]), name


def test_questions_that_share_the_clip_get_the_answers_of_separate_prompts(omni, batch):
    """Keys and values of the clip are computed once; every question's logits equal those of the whole prompt alone."""
    judge, _ = omni
    frames, audio, _ = batch
    judge.orders = (False, True)
    try:
        prefix, questions = judge.questions()
        with torch.no_grad():
            shared = judge.logits(bytes_of(frames), audio)
            for i, question in enumerate(questions):
                inputs = judge.read(bytes_of(frames), audio, prefix + question)
                alone = judge.model(**inputs, use_audio_in_video=True).logits[:, -1]
                torch.testing.assert_close(shared[:, i], alone, atol=1e-5, rtol=0)
    finally:
        judge.orders = (False,)


def test_clips_rated_together_are_rated_as_one_by_one(omni, batch):
    judge, _ = omni
    frames, audio, _ = batch
    with torch.no_grad():
        together = judge.logits(bytes_of(frames), audio)
        alone = torch.cat([judge.logits(bytes_of(f[None]), a[None]) for f, a in zip(frames, audio)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_every_frame_and_every_sample_reach_the_model(omni, batch):
    """Two frames are 2 x 2 merged tokens; 25 tokens of sound a second; at 25 frames a second, not at the default 2."""
    judge, _ = omni
    frames, audio, _ = batch
    inputs = judge.read(bytes_of(frames), audio, judge.questions()[0])
    ids, config = inputs["input_ids"], judge.model.config
    assert (ids == config.video_token_id).sum(1).tolist() == [24 * 4] * 4
    assert inputs["feature_attention_mask"].sum(1).tolist() == [48 * 4] * 4
    assert inputs["video_second_per_grid"].tolist() == pytest.approx([2 / FPS] * 4)


def test_a_random_model_is_refused_because_it_answers_with_anything(omni, batch):
    with pytest.raises(MediaError, match=f"{batch[2][0]}: the judge does not rate its lip_sync"):
        omni[0].rate(*batch)


def test_the_rating_is_the_expectation_over_the_digits(omni, batch, monkeypatch):
    """p(2) = .1, p(3) = .2, p(5) = .5, the rest elsewhere: (.2 + .6 + 2.5) / .8."""
    judge, _ = omni
    logits = torch.full((4, 3, len(judge.processor.tokenizer)), -40.0)
    for digit, p in (("2", 0.1), ("3", 0.2), ("5", 0.5)):
        logits[..., judge.digits[int(digit) - 1]] = math.log(p)
    logits[..., 0] = math.log(0.2)
    monkeypatch.setattr(judge, "logits", lambda frames, audio: logits[:len(frames)])
    ratings = judge.rate(*batch)
    torch.testing.assert_close(ratings.score, torch.full((4, 3), 3.3 / 0.8))
    torch.testing.assert_close(ratings.mass, torch.full((4, 3), 0.8))
    logits[1, 2, judge.digits[2]] = logits[1, 2, judge.digits[4]] = -40              # mass 1/3: no rating
    score = judge.rate(*batch).score
    assert score.isnan().nonzero().tolist() == [[1, 2]]


def test_what_is_no_judge_is_named_in_one_line(tmp_path):
    with pytest.raises(MediaError, match="cannot be loaded as a judge"):
        Judge.load(tmp_path)
    transformers.Qwen3Config(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(MediaError, match="is a qwen3, which cannot watch and hear"):
        Judge.load(tmp_path)
    with pytest.raises(MediaError) as said:
        Judge.load(tmp_path / "not-there")
    assert "\n" not in str(said.value)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    judge = tiny_judge()
    save_judge(judge, tmp_path / "judge", "a card")
    state = load_file(tmp_path / "judge" / "model.safetensors")
    state.pop("visual.merger.mlp.0.weight")
    save_file(state, tmp_path / "judge" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MediaError, match="lacks the weights visual.merger.mlp.0.weight"):
        Judge.load(tmp_path / "judge")


def test_rubrics_say_what_to_look_at_and_list_the_scale_either_way():
    for rubric in (RUBRIC, tiny_judge().rubric):
        for aspect in ASPECTS:
            up, down = prompt(aspect, False, rubric), prompt(aspect, True, rubric)
            words = rubric[aspect]
            assert all(words[k] in up and words[k] in down for k in ("look", "ignore", "1", "3", "5"))
            assert up.index(f"1: {words['1']}") < up.index(f"5: {words['5']}")
            assert down.index(f"5: {words['5']}") < down.index(f"1: {words['1']}")


# ---------------------------------------------------------------- regularisers and the composite

@pytest.fixture(scope="module")
def exemplars(clips) -> Exemplars:
    return Exemplars.measure(clips, clips, 4)


def frozen(frames):
    return frames[:, :1].repeat(1, frames.shape[1], 1, 1, 1)


def only(**weights) -> dict[str, float]:
    """Weights of 0 but for these."""
    return dict.fromkeys(COMPONENTS, 0.0) | weights


def test_temporal_measures_equal_hand_computed_values():
    """Brightness n / 100: .08 over 8 frames, no third difference; a jump of .03 at a border: seams log 3."""
    frames = torch.zeros(1, 12, 3, 16, 16)
    measured = temporal(frames + torch.arange(12.0)[None, :, None, None, None] / 100, 4)
    torch.testing.assert_close(measured["activity"], torch.full((1, 3), math.log(0.08 + 1e-4)), atol=1e-3, rtol=0)
    assert measured["seams"].abs().max() < 1e-3 and (measured["smoothness"] < -4).all()
    stairs = frames + torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15.0])[None, :, None, None, None] / 100
    expected = torch.tensor([[0, 1, 1]]) * math.log(0.0301 / 0.0101)
    torch.testing.assert_close(temporal(stairs, 4)["seams"], expected, atol=1e-3, rtol=0)


def test_likeness_is_one_for_the_portrait_and_falls_with_blur_noise_and_tint(batch):
    frames = batch[0][:, :1]
    portrait = frames[:, 0]
    torch.testing.assert_close(likeness(frames, portrait), torch.ones(4, 1))
    noisy = likeness((frames + 0.1 * torch.randn_like(frames)).clamp(0, 1), portrait)
    blurred = likeness(blur(frames[:, 0], 2.0)[:, None], portrait)
    tinted = likeness(frames * torch.tensor([1.2, 1.0, 0.8])[:, None, None], portrait)
    other = likeness(frames.roll(1, 0), portrait)
    assert max(noisy.max(), blurred.max(), tinted.max()) < 0.99 and (other < torch.minimum(noisy, blurred)).all()


def test_straying_sees_the_still_places_only():
    portrait, still = torch.rand(1, 3, 32, 32), torch.zeros(32, 32)
    still[:, :8] = 1
    frames = portrait[:, None].repeat(1, 2, 1, 1, 1)
    frames[:, 0, :, :, 16:] = 0
    frames[:, 1, :, :, :8] += 0.1
    torch.testing.assert_close(straying(frames, portrait, still), torch.tensor([[0.0, 0.1]]))


def test_components_add_up_to_the_total_and_what_nobody_can_say_is_left_out(exemplars, batch):
    """Nine components at most; without a judge or a sync network theirs are no part of it."""
    frames, audio, names = batch
    weights = dict(background=2.0, identity=0.5, activity=0.25, smoothness=0.7, seams=0)
    scores = Reward(None, exemplars, weights)(frames, audio, frames[:, 0], names)
    assert set(scores.components) == {"background", "identity", "activity", "smoothness"} and scores.mass is None
    torch.testing.assert_close(scores.total, sum(weights[name] * value for name, value in scores.components.items()))
    every = Reward(Fixed(), exemplars, sync=reward.SyncNetwork(8, 8))(frames, audio, frames[:, 0], names)
    assert set(every.components) == set(COMPONENTS) and len(COMPONENTS) <= 9


def test_a_real_clip_beats_a_frozen_one_and_each_spoilt_one(exemplars, batch):
    """The regularisers alone: stillness and smoothness without end do not win."""
    frames, audio, names = batch
    rate, rng = Reward(None, exemplars), torch.Generator().manual_seed(0)
    best = rate(frames, audio, frames[:, 0], names).total
    spoilt = {fault: torch.stack([spoil(fault, 0.8, x, torch.zeros(48), rng)[0].clamp(0, 1) for x in frames])
              for fault in FAULTS}
    for name, worse in {"frozen": frozen(frames), **spoilt}.items():
        made = rate(worse, audio, frames[:, 0], names)
        assert (made.total < best).all(), (name, made.total, best)


def test_each_regulariser_falls_with_the_fault_that_is_its_own(exemplars, batch):
    frames, audio, names = batch
    step = torch.arange(48).div(4, rounding_mode="floor").view(1, 48, 1, 1, 1)
    rng = torch.Generator().manual_seed(0)
    worse = {"activity": frozen(frames), "identity": torch.stack([blur(x, 2.0) for x in frames]),
             "smoothness": frames + 0.05 * torch.randn(frames.shape, generator=rng), "background": frames + 0.1,
             "seams": frames + 0.05 * (step % 2)}
    rate = Reward(None, exemplars)
    best = rate(frames, audio, frames[:, 0], names).components
    assert worse.keys() == best.keys()
    for name, made in worse.items():
        fallen = rate(made.clamp(0, 1), audio, frames[:, 0], names).components[name]
        assert (fallen < best[name] - 0.01).all(), (name, fallen, best[name])


def test_the_lively_exemplars_say_how_much_should_move_and_the_smooth_ones_all_else(clips):
    """Both sets measured apart, by hand: only activity follows the lively ones."""
    lively, smooth = clips[:3], clips[3:6]
    measured = Exemplars.measure(lively, smooth, 4)
    for name, some in {"activity": lively, "smoothness": smooth, "seams": smooth}.items():
        mean = torch.stack([temporal(c.frames[None] / 255, 4)[name].mean() for c in some]).mean().item()
        assert measured.temporal[name] == pytest.approx((mean, mean), abs=1e-5), name
    frames = torch.stack([c.frames for c in smooth]) / 255
    stray = (frames - frames[:, :1]).abs().mean((0, 1, 2))
    torch.testing.assert_close(measured.still, torch.exp(-stray / 0.02))
    assert measured.likeness == pytest.approx(likeness(frames, frames[:, 0]).mean().item(), abs=1e-5)
    assert measured.straying == pytest.approx(straying(frames, frames[:, 0], measured.still).mean().item(), abs=1e-5)


def test_what_lies_between_a_real_clip_and_the_codecs_view_of_it_costs_nothing(clips):
    """A codec that loses trembling: neither the clip nor its smooth version nor what lies between is held to the other;
    what trembles more, or stands still, is."""
    clip = Clip("short", clips[0].frames[:48], clips[0].audio[: 48 * 640])
    frames, sound = clip.frames[None] / 255, clip.audio[None]
    smooth = torch.cat([frames[:, :1], (frames[:, :-2] + frames[:, 1:-1] + frames[:, 2:]) / 3, frames[:, -1:]], 1)
    codec = SimpleNamespace(scale=torch.ones(1), encode=lambda video: video, decode=lambda portrait, latents: smooth)
    alone, rate = (Reward(None, Exemplars.measure([clip], [clip], 4, codec=c), only(smoothness=1.0))
                   for c in (None, codec))
    low, high = rate.exemplars.temporal["smoothness"]
    assert low == pytest.approx(temporal(smooth, 4)["smoothness"].mean().item(), abs=1e-6)
    assert high == pytest.approx(temporal(frames, 4)["smoothness"].mean().item(), abs=1e-6)
    assert alone(smooth, sound, frames[:, 0], "a").total < -0.1 and low < high - 0.1
    shaken = (frames + 0.05 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for made, free in ((frames, True), (smooth, True), ((frames + smooth) / 2, True), (shaken, False),
                       (frozen(frames), False)):
        scores = rate(made, sound, frames[:, 0], "a", per_chunk=True)
        assert (scores.total.abs() < 1e-5 if free else scores.total < -0.5).all()
        torch.testing.assert_close(scores.per_chunk["smoothness"].mean(1), scores.components["smoothness"])


class Fixed:
    """A judge with a mind of its own: what it says of a clip is the clip's brightness."""

    window = 20

    def __init__(self, unrated=None):
        self.unrated = [] if unrated is None else [unrated]

    def rate(self, frames, audio, names):
        score = 1 + 4 * frames.mean((1, 2, 3, 4))
        score[self.unrated] = math.nan
        return Ratings(torch.stack([score, score, score], 1), torch.ones(len(frames), 3))


def test_long_videos_are_judged_in_windows_and_earn_their_mean(exemplars):
    """Brightness rises with time; a rating is of the whole, and of no chunk."""
    frames = (torch.arange(60.0) / 60).view(1, 60, 1, 1, 1).expand(1, 60, 3, 64, 64)
    scores = Reward(Fixed(), exemplars)(frames, torch.zeros(1, 60 * 640), frames[:, 0], ["a"])
    windows = [1 + 4 * torch.arange(a, b).float().mean() / 60 for a, b in ((0, 20), (20, 40), (40, 60))]
    assert scores.components["judge_lip_sync"].item() == pytest.approx(torch.stack(windows).mean().item(), abs=1e-5)
    assert scores.per_chunk == {}


def test_a_regulariser_is_the_mean_of_its_chunks_and_none_is_above_zero(exemplars, clips):
    """The credit of a chunk points where the whole video should go: where a video moves too little on the average, a
    chunk that moves more earns more."""
    frames = torch.stack([c.frames[:48] for c in clips[:4]]) / 255
    frames = frames[:, :1] + torch.tensor([0.2, 0.8, 1.2, 2.0]).view(-1, 1, 1, 1, 1) * (frames - frames[:, :1])
    rate, audio = Reward(Fixed(), exemplars), torch.zeros(4, 48 * 640)
    scores = rate(frames, audio, frames[:, 0], list("abcd"), per_chunk=True)
    assert set(scores.per_chunk) == set(scores.components) - set(JUDGED)
    for name in scores.per_chunk:
        torch.testing.assert_close(scores.per_chunk[name].mean(1), scores.components[name])
        assert (scores.components[name] <= 0).all()
    activity = [scores.per_chunk["activity"][i] for i in (0, 3)]                     # far too little, far too much
    swing = (frames[:, 8:] - frames[:, :-8]).abs().mean((2, 3, 4))
    swing = torch.cat([swing[:, :1].expand(-1, 8), swing], 1).unflatten(1, (12, 4)).mean(2)
    assert correlation(activity[0], swing[0]) > 0.9 and correlation(activity[1], swing[3]) < -0.9


def test_spans_cover_every_frame_evenly():
    assert spans(48, None) == [(0, 48)] and spans(48, 48) == [(0, 48)] and spans(30, 48) == [(0, 30)]
    for frames, width in ((75, 48), (100, 48), (48, 25), (49, 48)):
        parts = spans(frames, width)
        assert parts[0][0] == 0 and parts[-1][1] == frames and all(b - a == width for a, b in parts)
        assert all(b[0] - a[0] <= width for a, b in zip(parts, parts[1:]))


def test_calibration_maps_ratings_before_they_count(exemplars):
    frames, audio = torch.full((1, 16, 3, 64, 64), 0.5), torch.zeros(1, 16 * 640)
    plain, mapped = (Reward(Fixed(), exemplars, calibration=c)(frames, audio, frames[:, 0], ["a"]).components
                     for c in ({}, {"motion": ([1.0, 5.0], [2.0, 2.5])}))
    assert plain["judge_motion"].item() == pytest.approx(3) and mapped["judge_motion"].item() == pytest.approx(2.25)
    assert mapped["judge_lip_sync"].item() == pytest.approx(3)


def test_what_is_not_a_number_names_the_clip(exemplars, batch):
    frames, audio, names = batch
    broken = frames.clone()
    broken[2, 5, 0, 3, 3] = math.nan
    with pytest.raises(MediaError, match=f"{names[2]}: its .* is nan"):
        Reward(None, exemplars)(broken, audio, frames[:, 0], names)
    scores = Reward(Fixed(unrated=2), exemplars)(frames, audio, frames[:, 0], names)  # but a rating may be missing
    assert scores.total.isnan().tolist() == [False, False, True, False]
    assert torch.equal(scores.components["judge_motion"].isnan(), scores.total.isnan())
    with pytest.raises(ValueError, match="640 samples"):
        Reward(None, exemplars)(frames, audio[:, :-1], frames[:, 0], names)


def test_pretrained_features_compare_frames_with_the_portrait(tmp_path, batch):
    """Random DINOv2 and CLIP of a few thousand weights: the path, not the taste."""
    frames = batch[0][:, :6]
    dino = transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8))
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                           image_size=32, patch_size=8),
        text_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)))
    for model in (dino, clip):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
        alike = PretrainedLikeness(str(folder))
        cosine = alike(frames, frames[:, 0])
        assert cosine.shape == (4, 6) and (cosine[:, 0] > 0.9999).all() and (cosine <= 1.0001).all()
    with pytest.raises(MediaError, match="cannot be loaded as a vision model"):
        PretrainedLikeness(str(tmp_path))
