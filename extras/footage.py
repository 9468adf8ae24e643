"""Footage of people who speak: a sync network that it teaches itself finds what is out of sync.

    python train.py --data me.mp4                  with neither --sync nor --reward-sync

1. Teach a network (extras/sync.py) on the training clips, briefly. The largest part of the sound is in time,
   and that is what it learns. So a delay that all clips share is not found: it is what goes together.
2. Try the sound of every clip, of held-out ones too, up to 15 frames early and late. With the distances D_k
   between lips and the sound k frames later (sample.offset_curve), the k of the least is the best shift.
3. Teach a new network on the clips whose best shift is less than CLEAR frames, for longer, and try all
   again. This one measures. How well the best shift fits is

       depth = median_k D_k - min_k D_k.

   Other clips' sound, which fits at no shift, tells what depth is by chance: a share CHANCE of it is above
   the limit. A clip below is left out, as no shift fits. Where the best shift is CLEAR frames or more, sound
   is shifted back. All others are in time.
4. Teach the reward's network, of another seed, on what is then in time. It also ranks clips for curation.

Where the network cannot tell held-out clips' own sound from another's by its depth, in a share TELLS of all
pairs, footage cannot teach: sound is taken as it is. All is kept in the cache, so it is done once.

Drawn talkers have a network already, which was taught on flawless ones: `put_in_time` shifts each clip by
what that measures, once pretraining has seen them as found.

B clips, F frames.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import Clips, cached, folder_clips, pixels, sounds
from extras.media import FPS
from extras.reward_flags import reward_sync
from extras.session import fingerprint
from extras.sync import load_sync, save_sync, train_sync
from reward import SYNC_SHIFTS
from sample import depth, offset_curve, sync_metrics

FIRST_STEPS, STEPS = 150, 300      # of the first network, and of those that stay
LEAST_CLIPS = 20                   # a minute: fewer are not even tried
OTHERS = 8                         # clips whose sound is tried with each picture, to know what chance gives
CHANCE = 0.05                      # of them are above a limit
CLEAR = 2                          # frames: the networks miss one, and so do most people
TELLS = 0.8                        # of held-out pairs of own and another's sound, a network must rank right


@dataclass
class Footage:
    """The clips of --data, and what they taught; "none" where nothing."""

    clips: tuple[Clips, Clips]     # to train on, and held out
    said: str                      # what was found
    sync: Path | str = "none"
    reward_sync: Path | str = "none"
    cpu_seconds: float = 0.0       # that the reward's network took


def footage_clips(folder: str, args: argparse.Namespace) -> tuple[Clips, Clips]:
    """Read the clips of --data: those to train on, and the held-out ones."""
    return folder_clips(folder, args.config.size, args.seconds, args.crop, frames=args.frames)


def lesson(clips: Clips, seed: int, steps: int = STEPS) -> Path:
    """Teach a sync network on clips, once. Returns: its folder in the cache."""
    def teach(to: Path) -> None:
        start = time.process_time()
        save_sync(train_sync(clips, seed, steps), to, clips=clips.folder.name, seed=seed)
        (to / "cpu_seconds").write_text(f"{time.process_time() - start}")

    rows = [(row, clips.late(i)) for i, row in enumerate(clips.rows)]
    recipe = {"sync network": clips.folder.name, "rows": rows, "seed": seed, "steps": steps}
    return cached(recipe, teach)


# ---- What goes together --------------------------------------------------------------------------------

@torch.no_grad()
def distances(network: Path, clips: Clips, frames: int) -> tuple[Tensor, Tensor]:
    """Try the sound of clips early and late. Returns: D_k of their own (B, 31) and of others' (B, n, 31)."""
    net = load_sync(network)
    visual, sound = [], []
    for clip in tqdm(clips, "looking at lips", leave=False):
        visual.append(net.visual(pixels([clip], frames)))
        sound.append(net.sound(sounds([clip], frames)))
    visual, sound = torch.cat(visual), torch.cat(sound)
    others = [offset_curve(visual, sound.roll(by, 0)) for by in range(1, min(OTHERS, len(clips) - 1) + 1)]
    return offset_curve(visual, sound), torch.stack(others, 1)


def best_shift(curves: Tensor) -> Tensor:
    """Say by how many frames sound is late, 0 where it is less than CLEAR: (B, 31) -> (B,)."""
    late = curves.argmin(-1) - SYNC_SHIFTS
    return torch.where(late.abs() >= CLEAR, late, 0)


def verdicts(own: Tensor, others: Tensor) -> list[int | None]:
    """Say of each clip by how many frames its sound is late: 0 is in time, None fits at no shift."""
    fits = depth(own) > depth(others).quantile(1 - CHANCE)
    return [by if fit else None for by, fit in zip(best_shift(own).tolist(), fits.tolist())]


def examine(train: Clips, held_out: Clips, frames: int) -> dict:
    """Teach a network, teach another on what that finds in time, and have it find what is late.

    Returns: "tells", the share of held-out pairs that it ranks right; the rows "lessons" that it was taught
    on; and "late", the verdicts on all rows, held-out ones last.
    """
    every = Clips(train.folder, train.rows + held_out.rows, train.index)
    own, _ = distances(lesson(train, 0, FIRST_STEPS), every, frames)
    shift = best_shift(own)
    taught = train.select(lambda i: shift[i] == 0)
    taught = taught if len(taught) >= LEAST_CLIPS else train
    own, others = distances(lesson(taught, 0), every, frames)
    tells = (depth(own)[len(train):, None] > depth(others)[len(train):]).float().mean().item()
    return {"tells": tells, "lessons": taught.rows, "late": verdicts(own, others)}


# ---- What is done about it -----------------------------------------------------------------------------

def in_time(clips: Clips, late: dict[int, int | None], frames: int) -> Clips:
    """Shift sound back, and leave out what fits at no shift or is then too short."""
    back = clips.index | {"late": {row: by for row, by in late.items() if by}}
    kept = Clips(clips.folder, [row for row in clips.rows if late[row] is not None], back)
    return kept.select(lambda i: len(kept[i].frames) >= frames)


def told(clips: Clips, kept: set[int], late: dict[int, int | None]) -> str:
    """Say in one line how many clips, of how many seconds, are in time, shifted back and left out."""
    def kind(row: int) -> str:
        if late[row] is None or row not in kept:
            return f"left out: {'no shift fits' if late[row] is None else 'too short once shifted'}"
        return "in time" if not late[row] else f"{'late' if late[row] > 0 else 'early'}, shifted back"

    found: dict[str, list[tuple]] = {}
    for row, count in zip(clips.rows, clips.lengths):
        found.setdefault(kind(row), []).append((count / FPS, abs(late[row] or 0)))
    parts = []
    for name in sorted(found, key=lambda name: (name != "in time", name)):
        seconds, by = zip(*found[name])
        how = f", by {' to '.join(map(str, sorted({min(by), max(by)})))} frames" if max(by) else ""
        parts.append(f"{len(by)} {name} ({sum(seconds):.0f} s{how})")
    return f"sound of {len(clips)} clips: {'; '.join(parts)}"


def learn(args: argparse.Namespace) -> Footage | None:
    """Teach networks on the clips of --data, and put the clips in time; None where there are none, or a
    network is named."""
    if not args.data or args.sync or args.reward_sync:
        return None
    train, held_out = footage_clips(args.data, args)

    def as_it_is(why: str) -> Footage:
        print(said := f"sound is taken as it is: {why}; add footage")
        return Footage((train, held_out), said)

    if len(train) < LEAST_CLIPS:
        return as_it_is(f"{len(train)} clips are too few to teach a sync network, which takes {LEAST_CLIPS}")
    recipe = {"footage, by its best shift": train.folder.name, "rows": [train.rows, held_out.rows],
              "frames": args.frames, "steps": [FIRST_STEPS, STEPS, CHANCE, CLEAR]}
    kept = cached(recipe, lambda to: (to / "found.json").write_text(
        json.dumps(examine(train, held_out, args.frames))))
    found = json.loads((kept / "found.json").read_text())
    tells = found["tells"]
    if tells < TELLS:
        return as_it_is(f"what {len(train)} clips teach tells own sound from another's in {tells:.0%} of "
                        f"held-out pairs, and should in {TELLS:.0%} (near or below 50%, is theirs in time?)")
    every = Clips(train.folder, train.rows + held_out.rows, train.index)
    late = dict(zip(every.rows, found["late"]))
    clips = in_time(train, late, args.frames), in_time(held_out, late, args.frames)
    if not all(clips):
        return as_it_is("no clip to train on, or none to hold out, is found in time")
    print(said := told(every, {*clips[0].rows, *clips[1].rows}, late))
    network = lesson(Clips(train.folder, found["lessons"], train.index), 0)
    footage = Footage(clips, said, network)
    if args.curate or args.updates:
        footage.reward_sync = lesson(clips[0], 1)
        footage.cpu_seconds = float((footage.reward_sync / "cpu_seconds").read_text())
    return footage


def put_in_time(clips: Clips, args: argparse.Namespace) -> tuple[Clips, float]:
    """Shift the sound of each drawn clip by the offset that the reward's sync network measures (LatentSync's
    rule, 2412.09262); footage is in time by now. Returns: the clips, and the CPU time that it took."""
    net = None if args.data else reward_sync(args)
    if net is None:
        return clips, 0.0

    def measure(to: Path) -> None:
        start = time.process_time()
        late = []
        for clip in tqdm(clips, "measuring offsets", leave=False):
            video, audio = pixels([clip], args.frames), sounds([clip], args.frames)
            late.append(-int(sync_metrics(net, video, audio)["sync_offset"]))
        measured = {"late": late, "cpu_seconds": time.process_time() - start}
        (to / "offsets.json").write_text(json.dumps(measured))

    recipe = {"offsets": clips.folder.name, "rows": clips.rows, "frames": args.frames,
              "network": fingerprint(net.state_dict())}
    measured = json.loads((cached(recipe, measure) / "offsets.json").read_text())
    return in_time(clips, dict(zip(clips.rows, measured["late"])), args.frames), measured["cpu_seconds"]
