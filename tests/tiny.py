"""The smallest run that does everything, for the tests of train.py: its flags, and judges and a reward that
anyone can compute; a generator; and files of sound and pictures."""

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import torch

from extras.media import SAMPLES_PER_FRAME
from model import Config, Generator, load_generator, save_generator
from reward import Ratings

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ("--size 32 --width 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --mlp-width 32 "
         "--space-channels 6 --channels 8 --seconds 1 --validate-clips 2 --batch 2 --sampling-steps 1 "
         "--warmup 2 --device cpu").split()
CONFIG = dict(size=32, width=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp_width=32, space_channels=6,
              channels=8)                                              # as SHAPE has it
TINY = [*SHAPE, *"--clips 6 --steps 6 --judge none".split()]
ALONE = [*TINY, *"--curate 0 --updates 0".split()]                     # pretraining alone
POST = ("--curate 0.5 --curate-steps 3 --updates 4 --prompts 2 --group 3 --rollout-steps 3 --draws 1 "
        "--micro-batch 2 --looks 2 --watch-clips 2 --post-lr 1e-3").split()
WHOLE = [*TINY, *POST]
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SPEECH = "aevalsrc='0.3*sin(2*PI*220*t)*abs(sin(2*PI*2*t))':s=48000:d=3"     # four syllables a second


def ffmpeg(*arguments, given: bytes = b"") -> bytes:
    """Run ffmpeg as the oracle or to make a file."""
    command = [FFMPEG, "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=given, check=True, capture_output=True).stdout


def streams(path: Path | str) -> str:
    return subprocess.run([FFMPEG, "-i", f"file:{path}"], capture_output=True, text=True).stderr


def random_generator(folder: Path, seed: int, **more) -> None:
    """Save a generator of which no weight is zero, as some are at the start: they would hide the noise."""
    torch.manual_seed(seed)
    model = Generator(Config(**CONFIG | more))
    for weight in model.parameters():
        weight.data.normal_(std=0.2)
    model.codec.space.normal_(std=0.05), model.codec.time.normal_(std=0.05)
    save_generator(model, folder)


class Taste:
    """A judge of known ratings: of the six training clips these, of others how bright and lively they are."""

    window, fingerprint = None, "taste"
    known = torch.tensor([[1.0, 5, 4], [4, 1, 1], [3, 2, 5], [2, 4, 2], [5, 3, 3], [1, 1, 1]])
    # Their sums are 10, 6, 10, 8, 11 and 3.

    def __init__(self):
        self.asked = []

    def rate(self, frames, audio, names):
        assert 0 <= frames.min() and frames.max() <= 1 and audio.shape == (len(frames), frames.shape[1] * 640)
        self.asked += names
        bright = 1 + 4 * frames.mean((1, 2, 3, 4))
        lively = 1 + 4 * frames.diff(dim=1).abs().mean((1, 2, 3, 4))
        score = torch.stack([bright, lively, bright], 1)
        for i, name in enumerate(names):
            if name.startswith("talker-0-") and "rollout" not in name:
                score[i] = self.known[int(name.split("-")[2])]
        return Ratings(score, torch.ones_like(score))


class Bright:
    """A judge that rates how bright a clip is, some frames at once."""

    def __init__(self, unrated=(), window=20):
        self.unrated, self.window = list(unrated), window

    def rate(self, frames, audio, names):
        score = 1 + 4 * frames.mean((1, 2, 3, 4))
        score[self.unrated] = math.nan
        return Ratings(torch.stack([score, score, score], 1), torch.ones(len(frames), 3))


class Brightness:
    """A reward that anyone can compute: bright frames, and bright last ones."""

    def __init__(self):
        self.weights, self.asked = {"bright": 1.0, "end": 0.5}, []
        self.floors = dict.fromkeys(self.weights, 1e-3)

    def __call__(self, frames, audio, portrait, names):
        assert audio.shape == (len(frames), frames.shape[1] * SAMPLES_PER_FRAME) and len(names) == len(frames)
        assert portrait.shape == (len(frames), *frames.shape[2:]) and 0 <= frames.min() and frames.max() <= 1
        assert not frames.requires_grad
        self.asked.append(tuple(names))
        components = {"bright": frames.mean((1, 2, 3, 4)), "end": frames[:, -1].mean((1, 2, 3))}
        chunks = {"bright": frames.unflatten(1, (-1, 4)).mean((2, 3, 4, 5))}
        return SimpleNamespace(total=components["bright"] + 0.5 * components["end"], components=components,
                               per_chunk=chunks)


def state(folder: Path, name: str = "state.pt") -> dict:
    return torch.load(folder / name, weights_only=True)


def same_weights(one: Path, other: Path) -> bool:
    one, other = (load_generator(folder).state_dict() for folder in (one, other))
    return all(torch.equal(value, other[name]) for name, value in one.items())


def flat(value, name="") -> dict:
    """Name every value of nested dicts and lists."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in pairs for k, v in flat(part, f"{name}.{key}").items()}
    return {name: value}


def assert_same_bits(one: Path, other: Path, *names: str) -> None:
    """All that checkpoints hold is the same, but for the CPU time."""
    for name in names:
        one_state, other_state = (flat(state(folder, name) | {"cpu_seconds": 0}) for folder in (one, other))
        assert one_state.keys() == other_state.keys() and len(one_state) > 50
        for key, value in one_state.items():
            other_value = other_state[key]
            same = torch.equal(value, other_value) if torch.is_tensor(value) else value == other_value
            assert same, (name, key)


def logged(folder: Path, stage: str | None = None) -> list[dict]:
    """The entries of a run's log, or those of the steps of a stage."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if stage is None:
        return entries
    return [e for e in entries if e.get("stage") == stage and "watched" not in e]
