"""Models that others trained: a speech encoder to hear by, a language model for a trunk.

A run names them with --audio-encoder and --init-from. Each is a folder that transformers wrote, or a name on
the hub, which is then downloaded. A run keeps what it needs: the trunk is saved with the generator, the name
of the encoder in config.json, and the features of a clip in the cache.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from data import cached
from extras.files import MediaError, loading, whole_model
from extras.media import FPS, SAMPLES_PER_FRAME, SAMPLE_RATE
from model import Generator


def pretrained_config(name: str | Path, kinds: Sequence[str], what: str):
    """Read the configuration of a model of one of `kinds`. Raises: MediaError for any other."""
    import transformers
    with loading(name, what):
        config = transformers.AutoConfig.from_pretrained(str(name), local_files_only=Path(name).is_dir())
        if config.model_type not in kinds:
            raise MediaError(name, f"is a {config.model_type}, not {what}; use {', '.join(kinds)}")
        return config


def bare_model(name: str | Path, what: str) -> torch.nn.Module:
    """Load a model without its head, in fp32. Raises: MediaError where it cannot be loaded."""
    import transformers
    with loading(name, what):
        return whole_model(transformers.AutoModel, name, dtype=torch.float32)


# ---------------------------------------------------------------- speech, heard by a frozen encoder

ENCODERS = "wav2vec2", "hubert", "wavlm", "whisper"
ENCODER_HOP = 320                                    # samples per feature: two features make a frame
PIECE, AROUND = 16 * FPS, 2 * FPS                    # frames heard at once, and more on either side


def encoder_width(name: str) -> int:
    """Read how many numbers `features` gives per frame. Raises: MediaError for what is no speech encoder."""
    c = pretrained_config(name, ENCODERS, "a speech encoder")
    if math.prod(getattr(c, "conv_stride", [ENCODER_HOP])) != ENCODER_HOP:
        raise MediaError(name, f"makes a feature of {math.prod(c.conv_stride)} samples, not of {ENCODER_HOP}")
    return 2 * c.hidden_size


class SpeechEncoder:
    """A frozen speech encoder of transformers that gives two features a frame, aligned with it to the sample.

    Feature i of wav2vec2, HuBERT and WavLM is computed from samples [320 i, 320 i + 400) and stands for their
    middle, 320 i + 200; that of Whisper stands for 320 i. With 40 zeros before the sound, or 160 and without
    Whisper's first feature, both stand for 320 i + 160, the middle of the i-th half frame: frame f owns
    features 2f and 2f + 1. Attention then lets each feature know of all the sound, past and future.
    """

    def __init__(self, name: str, device: str = "cpu"):
        import transformers
        encoder_width(name)                                           # refuses what is none
        local, model = Path(name).is_dir(), bare_model(name, "a speech encoder")
        whisper = model.config.model_type == "whisper"
        self.before, self.after, self.skip = (160, 0, 1) if whisper else (40, 40, 0)
        self.device, self.model = device, (model.get_encoder() if whisper else model).to(device)
        with loading(name, "a speech encoder"):
            self.extractor = transformers.AutoFeatureExtractor.from_pretrained(name, local_files_only=local)
            self.listen(torch.ones(SAMPLES_PER_FRAME))                # what cannot hear is found out now
        sign = hashlib.sha256((self.model.config.to_json_string() + self.extractor.to_json_string()).encode())
        for weight in self.model.state_dict().values():
            sign.update(weight.cpu().numpy())
        self.fingerprint = sign.hexdigest()

    def listen(self, sound: Tensor) -> Tensor:
        """(F * 640,) -> (F, 2 hidden) of zero mean and unit variance: speech of one piece."""
        padded = nnf.pad(sound, (self.before, self.after)).numpy()
        inputs = self.extractor(padded, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(self.device)
        heard = self.model(**inputs).last_hidden_state[0, self.skip:][: len(sound) // ENCODER_HOP]
        return nnf.layer_norm(heard, heard.shape[-1:]).reshape(len(sound) // SAMPLES_PER_FRAME, -1).cpu()

    @torch.no_grad()
    def __call__(self, sound: Tensor, n_frames: int) -> Tensor:
        """(n_frames * 640,) -> (n_frames, 2 hidden): piece by piece, each with two seconds around it."""
        parts = []
        for start in range(0, n_frames, PIECE):
            first, stop = max(0, start - AROUND), start + PIECE + AROUND
            heard = self.listen(sound[first * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME])
            parts.append(heard[start - first :][:PIECE])
        return torch.cat(parts)


speech_encoder = lru_cache(maxsize=1)(SpeechEncoder)


def features(audio: Tensor, n_frames: int, encoder: str, device: str = "cpu") -> Tensor:
    """Describe the sound around each frame by a speech encoder, (n_frames, C), once for each clip."""
    listener, samples = speech_encoder(encoder, str(device)), n_frames * SAMPLES_PER_FRAME
    sound = nnf.pad(audio[:samples].float(), (0, max(0, samples - len(audio))))
    recipe = {"encoder": listener.fingerprint, "sound": hashlib.sha256(sound.numpy()).hexdigest()}
    folder = cached(recipe, lambda to: np.save(to / "heard.npy", listener(sound, n_frames).numpy()))
    return torch.from_numpy(np.load(folder / "heard.npy"))


# ---------------------------------------------------------------- a trunk that was a language model
#
# A Block is a layer of Qwen3: the same norms, the same halves in the rotation, 1 + gate = 1 at the start. So
# are the rotary frequencies, only dealt out over time, row and column. Where all three are the token's index,
# the trunk under a causal mask is the language model (tests/test_pretrained.py).

QWEN3_SHAPE = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
               "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "mlp_width": "intermediate_size",
               "norm_eps": "rms_norm_eps"}                                    # Config's fields: Qwen3Config's
QWEN3_LAYER = {"attention_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
               "v": "self_attn.v_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
               "out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj",
               "up": "mlp.up_proj", "down": "mlp.down_proj"}                 # a Block's: a Qwen3 layer's


def trunk_shape(name: str) -> dict:
    """Read the fields of Config that a Qwen3 model fixes. Raises: MediaError for any other model."""
    c = pretrained_config(name, ["qwen3"], "a language model")
    if c.attention_bias or c.hidden_act != "silu" or c.rope_parameters["rope_type"] != "default":
        raise MediaError(name, f"has attention_bias {c.attention_bias}, hidden_act {c.hidden_act}, rope_type "
                               f"{c.rope_parameters['rope_type']}; the trunk has no bias, silu, default rope")
    return {ours: getattr(c, theirs) for ours, theirs in QWEN3_SHAPE.items()} | {
        "rope_base": float(c.rope_parameters["rope_theta"])}


@torch.no_grad()
def load_trunk(model: Generator, name: str) -> None:
    """Give a generator a Qwen3 model's layers and last norm: of `trunk_shape`, as the flags have it."""
    weights = bare_model(name, "a language model").state_dict()
    model.norm.weight.copy_(weights["norm.weight"])
    for i, block in enumerate(model.blocks):
        for ours, theirs in QWEN3_LAYER.items():
            block.get_submodule(ours).weight.copy_(weights[f"layers.{i}.{theirs}.weight"])
