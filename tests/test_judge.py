"""What reward.py promises of its judges and of the composite reward."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import reward
from data import FPS, Clip, MediaError, write_video
from extras.talkers import render_talker
from model import warp
from reward import (ASPECTS, CHAT, COMPONENTS, DEFAULT_JUDGE, FAULTS, RUBRIC, SPECIAL, TINY_RUBRIC, Hints, Judge,
                    Material, PretrainedLikeness, Ratings, RealClips, Reward, Weights, act, among_rivals, apart,
                    battery, correlation, exam, good_material, heard_loss, lessons, likeness, mouths, prompt,
                    rating_loss, save_judge, seen_loss, spans, spoil, straying, teach, temporal, tiny_judge)

# transformers 5.17 counts tokens with np.arange(tensor), which NumPy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning",
                                        "ignore:Initializing zero-element:UserWarning")


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    """Sixteen talkers of a world that no judge was taught on, 64 frames of 64 pixels."""
    return [render_talker(i, 31, 64, 64) for i in range(16)]


@pytest.fixture(scope="module")
def good(clips) -> Material:
    return good_material(clips)


@pytest.fixture(scope="module")
def batch(clips):
    """Four of them, 48 frames: frames in [0, 1], sound, names."""
    return (torch.stack([c.frames[:48] for c in clips[:4]]) / 255, torch.stack([c.audio[:48 * 640] for c in clips[:4]]),
            [c.name for c in clips[:4]])


@pytest.fixture(scope="module")
def embedded() -> Judge:
    return Judge.load()


# ---------------------------------------------------------------- checkpoints of the real architectures

def save_omni(folder, generation: str) -> torch.nn.Module:
    """Write a whole Qwen-Omni checkpoint, random and tiny, as transformers would. Returns its thinker."""
    tiny = tiny_judge()
    tokenizer = tiny.processor.tokenizer
    token = {f"{k.removesuffix('_token')}_token_id": tokenizer.convert_tokens_to_ids(v) for k, v in SPECIAL.items()
             if k in ("image_token", "audio_token", "video_token")}
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
                                                       processor.feature_extractor, tokenizer, chat_template=CHAT)
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
    for rubric in (RUBRIC, TINY_RUBRIC):
        for aspect in ASPECTS:
            up, down = prompt(aspect, False, rubric), prompt(aspect, True, rubric)
            words = rubric[aspect]
            assert all(words[k] in up and words[k] in down for k in ("look", "ignore", "1", "3", "5"))
            assert up.index(f"1: {words['1']}") < up.index(f"5: {words['5']}")
            assert down.index(f"5: {words['5']}") < down.index(f"1: {words['1']}")


# ---------------------------------------------------------------- lessons

def test_mouths_are_apart_by_what_their_correlation_lacks():
    """sqrt(1 - correlation), whatever their size and rest; of a mouth that hardly stirs, what it still moves counts."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 2000, dtype=torch.float64)
    b = 0.9 * a + 0.3 * b
    want = (1 - torch.corrcoef(torch.stack([a, b]))[0, 1]).sqrt()
    assert apart(a, a) == 0 and apart(a, -a) == 1 and abs(apart(0.5 * a + 1, 3 * b) - want) < 1e-12
    unit = (a - a.mean()) / a.std(correction=0)
    assert abs(apart(0.15 * unit, unit) - 0.125 ** 0.5) < 1e-12                      # half of STIR: half as much


def test_the_mouths_of_real_clips_are_read_by_a_proxy_that_follows_the_truth(clips):
    """Without their truth, drawn talkers are real clips; one talker at a time, as the axis is that of one face. The
    truth is unknown to the proxy, its sign included: open is where sound is loud."""
    follow = []
    for i in range(4):
        clip = render_talker(i, 31, 64, 256)
        truth = clip.truth["opening"] * clip.truth["width"]
        parts = [Clip("part", clip.frames[a:a + 64], clip.audio[a * 640:(a + 64) * 640]) for a in range(0, 256, 64)]
        proxy = mouths(parts, 64)
        assert abs(proxy.mean()) < 1e-4 and abs(proxy.std() - 1) < 1e-4
        follow.append(torch.corrcoef(torch.stack([proxy.flatten(), truth]))[0, 1].item())
    assert min(follow) > 0.8, follow


def test_the_same_seed_gives_the_same_lessons_and_another_gives_others(good):
    one, two, other = (lessons(good, None, 6, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(vars(one).values(), vars(two).values())
               if torch.is_tensor(a))
    assert one.frames.shape != other.frames.shape or not torch.equal(one.frames, other.frames)


def test_quality_falls_with_what_was_done(good):
    """Of 200 lessons: sound of its own agrees, a strong fault is a low rating of motion, and all stay within 1..5."""
    truth = lessons(good, None, 200, 0, 36)
    assert 1 <= truth.quality.min() and truth.quality.max() <= 5
    worst = truth.faults.amax(1)
    assert (truth.quality[:, 2] <= 5 - 4 * worst + 1e-4).all() and (worst > 0).float().mean() > 0.3
    expected = 5 - 4 * torch.stack([apart(*pair) for pair in zip(truth.shown, truth.called)])
    torch.testing.assert_close(truth.quality[:, 0], expected)
    assert (truth.quality[:, 0] > 4.5).float().mean() > 0.1 and (truth.quality[:, 0] < 2).float().mean() > 0.1


def test_rivals_share_window_sound_and_fault_and_differ_in_what_was_generated(good):
    """Six versions of each clip, here the same mouth at six brightnesses: what is left to differ is the version."""
    frames = good.frames[:3].repeat_interleave(6, 0)
    frames = frames // torch.arange(1, 7).repeat(3).view(-1, 1, 1, 1, 1).byte()
    rows = [x[:3].repeat_interleave(6, 0) for x in (good.audio, good.called, good.shown, good.lively, good.fault)]
    generated = Material(frames, *rows)
    truth = lessons(good, generated, 16, 5)
    assert truth.rivals == 4
    same = lambda x: (x[-4:].nan_to_num() == x[-4:-3].nan_to_num()).all()
    assert same(truth.audio) and same(truth.called) and same(truth.shown) and same(truth.quality)
    assert not any(torch.equal(a, b) for i, a in enumerate(truth.frames[-4:]) for b in truth.frames[-4:][:i])
    assert lessons(good, None, 16, 5).rivals == 0


def test_the_loss_of_rivals_asks_for_differences_alone():
    """Two groups: ratings that are all too high by the same cost no more; one that is .4 off its group costs."""
    log_p = torch.full((8, 3, 9), -30.0)
    ratings = torch.tensor([1., 2, 3, 4, 5, 4, 4, 2])
    log_p[torch.arange(8), 0, 2 + ratings.long()] = 0.0                               # digit d is token 2 + d
    quality = torch.zeros(8, 3)
    quality[:, 0] = ratings - torch.tensor([0.7] * 4 + [0.2] * 4)
    loss = lambda rivals: rating_loss(log_p, range(3, 8), SimpleNamespace(quality=quality, rivals=rivals)).item()
    assert loss(8) - loss(0) == pytest.approx(0, abs=1e-5)
    quality[7, 0] -= 0.4                                                              # off by -.1 -.1 -.1 .3
    expected = (3 * 0.5 + 2.5) / 8                                                    # Huber's, in tenths of a point
    assert loss(8) - loss(0) == pytest.approx(reward.RIVALRY * expected, abs=1e-5)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_seen_and_grows_with_its_strength(good, fault):
    x, mouth = good.frames[0, :48] / 255, good.shown[0, :48]
    change = [(spoil(fault, u, x, mouth, torch.Generator().manual_seed(0))[0] - x).abs().mean() for u in (0.2, 0.9)]
    assert 1e-4 < change[0] < change[1]


def test_acting_with_gain_one_is_the_clip_and_with_gain_zero_its_first_frame(good):
    face, pose, frames = good.face[0] / 255, good.pose[0], good.frames[0] / 255
    assert (act(face, pose, 1.0, 1.0) - frames).abs().mean() < 0.015
    assert (act(face, pose, 0.0, 0.0) - frames[:1]).abs().mean() < 0.01
    half = act(face, pose, 0.5, 0.5)
    assert half.diff(dim=0).abs().mean() < 0.75 * frames.diff(dim=0).abs().mean()


def test_rating_loss_is_the_cross_entropy_with_two_digits(good):
    logits = torch.randn(2, 3, 20, dtype=torch.float64)
    quality = torch.tensor([[1.0, 3.4, 5.0], [2.5, 4.75, 1.25]])
    expected = 0
    for b in range(2):
        for a in range(3):
            low = min(int(quality[b, a]), 4)
            share = quality[b, a].item() - low
            log_p = logits[b, a] - torch.logsumexp(logits[b, a], 0)
            expected -= ((1 - share) * log_p[7 + low] + share * log_p[8 + low]) / 6   # digit d is token 7 + d
    truth = SimpleNamespace(quality=quality, rivals=0)
    torch.testing.assert_close(rating_loss(logits, range(8, 13), truth), expected)


def test_a_few_lessons_lower_the_loss_and_the_judge_survives_the_disk(good, batch, tmp_path):
    judge, truth = tiny_judge(), lessons(good, None, 8, 0)
    loss = lambda: rating_loss(judge.logits(truth.frames, truth.audio), judge.digits, truth).item()
    before = loss()
    teach(judge, good, None, 10, batch=4)
    assert loss() < before - 0.3
    assert not judge.model.model.layers[1]._forward_hooks                            # the hints are gone
    save_judge(judge, tmp_path / "judge", "a card")
    again = Judge.load(tmp_path / "judge")
    assert (again.rubric, again.side, again.window) == (judge.rubric, judge.side, judge.window)
    logits = [j.logits(truth.frames, truth.audio) for j in (judge, again)]
    torch.testing.assert_close(*logits, atol=0.02, rtol=0)                           # half precision on disk


# ---------------------------------------------------------------- the embedded judge

def test_the_embedded_judge_is_small_and_carries_its_card():
    size = sum(path.stat().st_size for path in DEFAULT_JUDGE.iterdir())
    assert size < 8e6 and "reward.py --train-judge" in (DEFAULT_JUDGE / "README.md").read_text()


def test_the_embedded_judge_agrees_with_the_quality_of_fresh_clips(embedded, good):
    result = exam(embedded, good, 64)                                                # as many as its card says
    for aspect, least in zip(ASPECTS, (0.93, 0.80, 0.70)):
        (rank, *_), (pairs, *_) = result[aspect]
        assert rank > least and pairs > 0.80, (aspect, rank, pairs)


def test_the_better_clip_wins_on_each_aspect(embedded, good):
    verdict = battery(embedded, good)
    shares = {}
    for line in verdict.splitlines()[1:-3]:
        shares.setdefault(line.split()[0], []).append(float(line.split("[")[0].split()[-1]))
    assert set(shares) == set(ASPECTS) and all(sum(s) / len(s) > 0.8 for s in shares.values()), verdict


def test_the_embedded_judge_fails_a_judge_that_is_deaf(embedded, good):
    """The battery must be able to fail: this one hears the same sound with every clip."""
    deaf = SimpleNamespace(rate=lambda x, audio, names: embedded.rate(x, audio[:1].expand_as(audio), names))
    assert "lip_sync: do not trust it" in battery(deaf, good)


# ---------------------------------------------------------------- regularisers and the composite

@pytest.fixture(scope="module")
def real(clips) -> RealClips:
    return RealClips.measure(clips, 4)


def frozen(frames):
    return frames[:, :1].repeat(1, frames.shape[1], 1, 1, 1)


REGULARISERS = Weights(**dict.fromkeys(reward.JUDGED, 0.0))


def score(real, frames, audio, names, weights=REGULARISERS, judge=None, **options):
    return Reward(judge, real, weights, **options)(frames, audio, frames[:, 0], names)


def test_temporal_measures_equal_hand_computed_values():
    """Brightness n / 100: .08 over 8 frames, no second or third difference; a jump of .03 at a border: seam log 3."""
    frames = torch.zeros(1, 12, 3, 16, 16)
    steady = frames + torch.arange(12.0)[None, :, None, None, None] / 100
    measured = temporal(steady, steady[:, 0], 4)
    torch.testing.assert_close(measured["activity"], torch.full((1, 3), math.log(0.08 + 1e-4)), atol=1e-3, rtol=0)
    assert measured["seam"].abs().max() < 1e-3 and (measured["jerk"] < -4).all() and (measured["flicker"] < -4).all()
    stairs = frames + torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15.0])[None, :, None, None, None] / 100
    expected = torch.tensor([[0, 1, 1]]) * math.log(0.0301 / 0.0101)
    torch.testing.assert_close(temporal(stairs, stairs[:, 0], 4)["seam"], expected, atol=1e-3, rtol=0)


def test_drift_is_the_distance_of_the_head_to_its_place_on_the_portrait(batch):
    """Heads that stand still, then move to the side by 4% of the picture and stay: as moved here, so it is measured."""
    portrait, pose = batch[0][:, 0], torch.zeros(4, 6)
    pose[:, 0] = 0.08
    frames = torch.stack([portrait] * 4 + [warp(portrait, pose)] * 8, 1)
    still, *moved = (temporal(frames, portrait, 4)["drift"].exp() - reward.HEAD_AT_REST).unbind(1)
    assert still.abs().max() < 1e-3 and all((distance - 0.08).abs().max() < 0.008 for distance in moved)
    tinted = temporal(frames[:, :1].repeat(1, 12, 1, 1, 1) * 0.9, portrait, 4)["drift"].exp() - reward.HEAD_AT_REST
    assert tinted.max() < 0.02, "light is no motion"


def test_likeness_is_one_for_the_portrait_and_falls_with_blur_noise_and_tint(batch):
    frames = batch[0][:, :1]
    portrait = frames[:, 0]
    torch.testing.assert_close(likeness(frames, portrait), torch.ones(4, 1))
    noisy = likeness((frames + 0.1 * torch.randn_like(frames)).clamp(0, 1), portrait)
    blurred = likeness(reward.blur(frames[:, 0], 2.0)[:, None], portrait)
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


def test_components_add_up_to_the_total(real, batch):
    frames, audio, names = batch
    weights = Weights(lip_sync=0, expressiveness=0, motion=0, lip_course=0, lip_range=0, still=2.0, identity=0.5,
                      drift=0, activity=0.25, jerk=0.7, flicker=0, seam=0.3)
    scores = score(real, frames, audio, names, weights)
    assert set(scores.components) == {"still", "identity", "activity", "jerk", "seam"} and scores.mass is None
    expected = (2.0 * scores.components["still"] + 0.5 * scores.components["identity"]
                + 0.25 * scores.components["activity"] + 0.7 * scores.components["jerk"]
                + 0.3 * scores.components["seam"])
    torch.testing.assert_close(scores.total, expected)
    assert set(COMPONENTS) == set(vars(Weights()))


def test_a_real_clip_beats_a_frozen_one_and_each_spoilt_one(real, batch):
    """The regularisers alone: stillness and smoothness without end do not win."""
    frames, audio, names = batch
    best = score(real, frames, audio, names).total
    rng = torch.Generator().manual_seed(0)
    spoilt = {fault: torch.stack([spoil(fault, 0.8, x, torch.zeros(48), rng)[0].clamp(0, 1) for x in frames])
              for fault in FAULTS}
    for name, worse in {"frozen": frozen(frames), **spoilt}.items():
        made = Reward(None, real, REGULARISERS)(worse, audio, frames[:, 0], names)
        assert (made.total < best).all(), (name, made.total, best)


def test_each_regulariser_falls_with_the_fault_that_is_its_own(real, batch):
    frames, audio, names = batch
    rng = torch.Generator().manual_seed(0)
    worse = {"seam": torch.stack([spoil("seam", 0.0, x, x, rng)[0] for x in frames]), "activity": frozen(frames),
             "identity": torch.stack([reward.blur(x, 2.0) for x in frames]),
             "flicker": (frames + 0.05 * torch.randn(4, 48, 1, 1, 1)).clamp(0, 1),
             "jerk": (frames + 0.05 * torch.randn(frames.shape)).clamp(0, 1), "still": (frames + 0.1).clamp(0, 1)}
    step = torch.arange(48).div(4, rounding_mode="floor").view(1, 48, 1, 1, 1)
    worse["seam"] = (frames + 0.05 * (step % 2)).clamp(0, 1)
    best = score(real, frames, audio, names).components
    for name, made in worse.items():
        fallen = Reward(None, real, REGULARISERS)(made, audio, frames[:, 0], names).components[name]
        assert (fallen < best[name] - 0.01).all(), (name, fallen, best[name])


def test_what_lies_between_a_real_clip_and_the_codecs_view_of_it_costs_nothing(clips):
    """A codec that loses trembling: neither the clip nor its smooth version nor what lies between is held to the other;
    what trembles more, or stands still, is."""
    clip = Clip("short", clips[0].frames[:48], clips[0].audio[: 48 * 640])
    frames, sound = clip.frames[None] / 255, clip.audio[None]
    smooth = torch.cat([frames[:, :1], (frames[:, :-2] + frames[:, 1:-1] + frames[:, 2:]) / 3, frames[:, -1:]], 1)
    codec = SimpleNamespace(scale=torch.ones(1), encode=lambda video: video, decode=lambda portrait, latents: smooth)
    rate = Reward(None, RealClips.measure([clip], 4), Weights(**dict.fromkeys(vars(Weights()), 0.0) | {"jerk": 1.0}))
    alone = rate(smooth, sound, frames[:, 0], "a").total
    rate.resemble([clip], codec)
    low, high = rate.real.temporal["jerk"]
    assert low == pytest.approx(temporal(smooth, frames[:, 0], 4)["jerk"].mean().item(), abs=1e-6)
    assert high == pytest.approx(temporal(frames, frames[:, 0], 4)["jerk"].mean().item(), abs=1e-6)
    assert alone < -0.1 and low < high - 0.1
    shaken = (frames + 0.05 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for made, free in ((frames, True), (smooth, True), ((frames + smooth) / 2, True), (shaken, False),
                       (frozen(frames), False)):
        scores = rate(made, sound, frames[:, 0], "a", per_chunk=True)
        assert (scores.total.abs() < 1e-5 if free else scores.total < -0.5).all()
        torch.testing.assert_close(scores.per_chunk["jerk"].mean(1), scores.components["jerk"])


class Fixed:
    """A judge with a mind of its own: what it says of a clip is the clip's brightness."""

    window = 20

    def __init__(self, unrated=None):
        self.unrated = [] if unrated is None else [unrated]

    def rate(self, frames, audio, names):
        self.asked = names
        score = 1 + 4 * frames.mean((1, 2, 3, 4))
        score[self.unrated] = math.nan
        return Ratings(torch.stack([score, score, score], 1), torch.ones(len(frames), 3))


def test_long_videos_are_judged_in_windows_and_earn_their_mean(real):
    """Brightness rises with time; a rating is of the whole, and of no chunk."""
    frames = (torch.arange(60.0) / 60).view(1, 60, 1, 1, 1).expand(1, 60, 3, 64, 64)
    judge, audio = Fixed(), torch.zeros(1, 60 * 640)
    scores = Reward(judge, real)(frames, audio, frames[:, 0], ["a"])
    windows = [1 + 4 * torch.arange(a, b).float().mean() / 60 for a, b in ((0, 20), (20, 40), (40, 60))]
    assert scores.components["lip_sync"].item() == pytest.approx(torch.stack(windows).mean().item(), abs=1e-5)
    assert scores.per_chunk == {}


def test_the_course_of_lips_is_the_correlation_of_what_the_judge_sees_and_hears_and_says_when_they_part(real):
    """Read out in windows of 20 frames, joined: over the video correlation - 1; where they part a chunk earns least."""
    torch.manual_seed(0)
    heard = torch.randn(48)
    seen = 3 * heard + 2
    seen[20:24] = -seen[20:24]
    judge = Fixed()
    rate = judge.rate

    def with_courses(frames, audio, names):
        ratings = rate(frames, audio, names)
        at = audio.view(len(audio), -1, 640)[:, :, 0].long()                         # the sound is the frame's number
        ratings.courses = torch.stack([seen[at], heard[at]], -1)
        return ratings
    judge.rate, judge.readouts = with_courses, True
    audio = torch.arange(48.0).repeat_interleave(640)[None]
    frames = torch.rand(1, 48, 3, 64, 64)
    for per_chunk in (False, True):
        scores = Reward(judge, real)(frames, audio, frames[:, 0], ["a"], per_chunk=per_chunk)
        expected = torch.corrcoef(torch.stack([seen, heard]))[0, 1] - 1
        torch.testing.assert_close(scores.components["lip_course"], expected[None])
        torch.testing.assert_close(scores.components["lip_range"], -(seen.std() / heard.std()).log().abs()[None])
    assert scores.per_chunk["lip_course"].argmin() == 5 and scores.per_chunk["lip_course"].shape == (1, 12)
    torch.testing.assert_close(scores.per_chunk["lip_course"].mean(1), scores.components["lip_course"])


def test_readouts_of_the_towers_are_taught_kept_on_disk_and_read_while_rating(good, batch, tmp_path):
    """By hand: the linear readout of what the towers gave for the same clip."""
    judge, (frames, audio, _) = tiny_judge(), batch
    assert judge.readouts is None
    teach(judge, good, None, 3, batch=4)
    save_judge(judge, tmp_path / "judge", "a card")
    again, seen = Judge.load(tmp_path / "judge"), {}
    again.model.visual.register_forward_hook(lambda m, a, out: seen.update(sight=out.pooler_output))
    again.logits((frames * 255).round().byte(), audio)
    courses = again.courses(4, 48)
    assert courses.shape == (4, 48, 2) and courses.std() > 0
    weight, bias = (again.readouts[f"sight.{k}"] for k in ("weight", "bias"))
    by_hand = torch.stack([weight @ pair.flatten() + bias for pair in seen["sight"].view(96, -1)]).view(4, 48)
    torch.testing.assert_close(courses[..., 0], by_hand, atol=1e-4, rtol=1e-4)


def test_towers_are_taught_alone_to_see_and_to_hear_mouths(good, monkeypatch):
    """Sixty small steps without the language model: both mouths are read better, and the readouts are kept."""
    monkeypatch.setattr(reward, "TOWER_PAIRS", 8), monkeypatch.setattr(reward, "TOWER_FRAMES", 200)
    judge, versions = tiny_judge(), [field.repeat_interleave(6, 0) for field in vars(good).values()]
    text = judge.model.model.layers[0].mlp.up_proj.weight.clone()

    def errors():
        hints, rng = Hints(judge), torch.Generator().manual_seed(7)
        with torch.no_grad():
            return [loss(rng).item() for loss in (lambda rng: seen_loss(judge, hints, good, Material(*versions), rng),
                                                  lambda rng: heard_loss(judge, hints, good, rng))]
    before = errors()
    teach(judge, good, Material(*versions), 0, tower_steps=60)
    assert all(b < 0.8 * a for a, b in zip(before, errors())), (before, errors())
    assert torch.equal(text, judge.model.model.layers[0].mlp.up_proj.weight)


def test_rivals_are_compared_with_their_mean():
    error = torch.tensor([[1.0, 5.0], [3.0, 5.0], [0.0, 1.0], [4.0, 3.0]])
    torch.testing.assert_close(among_rivals(error, 2), torch.tensor([[[-1.0, 0], [1, 0]], [[-2, -1], [2, 1]]]))


def test_a_regulariser_is_the_mean_of_its_chunks_and_none_is_above_zero(real, clips):
    """The credit of a chunk points where the whole video should go: where a video moves too little on the average, a
    chunk that moves more earns more."""
    frames = torch.stack([c.frames[:48] for c in clips[:4]]) / 255
    frames = frames[:, :1] + torch.tensor([0.2, 0.8, 1.2, 2.0]).view(-1, 1, 1, 1, 1) * (frames - frames[:, :1])
    scores = Reward(Fixed(), real)(frames, torch.zeros(4, 48 * 640), frames[:, 0], list("abcd"), per_chunk=True)
    assert set(scores.per_chunk) == set(scores.components) - set(ASPECTS)
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


def test_calibration_maps_ratings_before_they_count(real):
    frames, audio = torch.full((1, 16, 3, 64, 64), 0.5), torch.zeros(1, 16 * 640)
    plain, mapped = (Reward(Fixed(), real, calibration=c)(frames, audio, frames[:, 0], ["a"]).components
                     for c in ({}, {"motion": ([1.0, 5.0], [2.0, 2.5])}))
    assert plain["motion"].item() == pytest.approx(3) and mapped["motion"].item() == pytest.approx(2.25)
    assert mapped["lip_sync"].item() == pytest.approx(3)


def test_what_is_not_a_number_names_the_clip(real, batch):
    frames, audio, names = batch
    broken = frames.clone()
    broken[2, 5, 0, 3, 3] = math.nan
    with pytest.raises(MediaError, match=f"{names[2]}: its .* is nan"):
        Reward(None, real, REGULARISERS)(broken, audio, frames[:, 0], names)
    scores = Reward(Fixed(unrated=2), real)(frames, audio, frames[:, 0], names)      # but a rating may be missing
    assert scores.total.isnan().tolist() == scores.components["motion"].isnan().tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="640 samples"):
        Reward(None, real, REGULARISERS)(frames, audio[:, :-1], frames[:, 0], names)
    with pytest.raises(ValueError, match="there is no judge"):
        Reward(None, real)


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


# ---------------------------------------------------------------- the command line

def test_a_video_is_scored_with_the_held_out_metrics_apart(tmp_path, capsys, monkeypatch, clips):
    monkeypatch.setenv("FLOWPORTRAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("extras.talkers.synthetic_clips", lambda *a, **k: clips)
    write_video(tmp_path / "v.mp4", clips[0].frames, clips[0].audio)
    reward.main(["--video", str(tmp_path / "v.mp4")])
    said = capsys.readouterr().out
    before, _, after = said.partition("held out, no part of the reward:")
    assert all(name in before for name in (*COMPONENTS, "total")) and "sync_confidence" in after


def test_people_s_ratings_give_a_table_and_a_calibration(tmp_path, capsys, clips):
    """Raters who say what the judge says: perfect apart, and a calibration that train.py can read."""
    for i, clip in enumerate(clips[:6]):
        write_video(tmp_path / f"{i}.mp4", clip.frames[:30], clip.audio[:30 * 640])
    ratings = [f"{i}.mp4,{aspect},{1 + (i + r) % 5}" for i in range(6) for aspect in ASPECTS for r in range(2)]
    (tmp_path / "ratings.csv").write_text("video,aspect,rating\n" + "\n".join(ratings))
    reward.main(["--align", str(tmp_path / "ratings.csv"), "--out", str(tmp_path / "c.json")])
    said = capsys.readouterr().out
    assert "Spearman" in said and said.count("[") == 9


@pytest.mark.parametrize("flags, said", [
    (["--video", "nothing.mp4"], "nothing.mp4: does not exist"),
    (["--align", "nothing.csv"], "nothing.csv: cannot be read"),
    (["--validate-judge", "--judge", "none"], "cannot be validated"),
    (["--validate-judge", "--judge-url", "http://127.0.0.1:9/v1"], "needs --judge-model"),
    (["--validate-judge", "--judge", "nothing/at/all"], "cannot be loaded as a judge"),
])
def test_what_cannot_be_done_is_one_line(flags, said, clips, monkeypatch, tmp_path):
    monkeypatch.setattr("extras.talkers.synthetic_clips", lambda *a, **k: clips)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MediaError, match=said):
        reward.main(flags)


def test_a_silent_clip_is_named(tmp_path):
    write_video(tmp_path / "mute.mp4", torch.zeros(30, 3, 64, 64, dtype=torch.uint8), torch.zeros(30 * 640))
    with pytest.raises(MediaError, match="mute.mp4: is silent"):
        reward.main(["--video", str(tmp_path / "mute.mp4")])


@pytest.mark.parametrize("flag", [
    ["--size", "8"], ["--clips", "0"], ["--weights", "beauty=1"], ["--weights", "seam=-1"], ["--weights", "seam"],
    ["--judge-order", "random"], ["--steps", "0"]])
def test_bad_flags_end_with_a_usage_line(flag, capsys):
    with pytest.raises(SystemExit) as end:
        reward.main(["--validate-judge", *flag])
    assert end.value.code == 2 and flag[0] in capsys.readouterr().err
