"""A component of your own in the reward.

    python -m extras.examples.own_reward --pretrained runs/tiny --out runs/hush     with the flags of train.py

`hush`: while nobody speaks, the lower face should rest. It is measured per chunk, so that GRPO can credit the
moment. What needs no chunks, a mark for the whole video, is added in `__call__` instead, to `components` and
`total`.
"""

from torch import Tensor

import reward
import train
from extras.files import one_line
from extras.media import SAMPLES_PER_FRAME

QUIET = 0.02                                         # loudness; speech has 0.1 (extras.media.ACTIVE_RMS)


class OwnReward(reward.Reward):
    """The reward of the flags, and one more component."""

    def chunk_scores(self, frames: Tensor, audio: Tensor, portrait: Tensor) -> dict[str, Tensor]:
        """Return name -> (B, K), on the CPU.

        frames (B, F, 3, S, S) in [0, 1], audio (B, F * 640), portrait (B, 3, S, S).
        """
        chunks = super().chunk_scores(frames, audio, portrait)
        loudness = audio.unflatten(1, (-1, SAMPLES_PER_FRAME)).std(-1)[:, 1:]            # (B, F - 1)
        lower = frames[..., frames.shape[-2] // 2:, :]                                   # (B, F, 3, S/2, S)
        change = lower.diff(dim=1).abs().mean((2, 3, 4)).cpu() * (loudness.cpu() < QUIET)
        chunks["hush"] = -reward.in_chunks(change, frames.shape[1], self.chunk_frames).mean(2)
        return chunks


if __name__ == "__main__":                           # processes that draw talkers import this file, too
    # Choose a floor below the group_std that log.jsonl shows. Where "flat" is 1 there, all differences are
    # below the floor, and count for less than the weight says.
    reward.COMPONENTS["hush"] = reward.Component(weight=1.0, floor=0.0005, scale="-1..0",
                                                 meaning="the lower face rests while nobody speaks")
    reward.WEIGHTS["hush"] = 1.0                     # now --weights knows it
    reward.Reward = OwnReward
    with one_line("stopped", "choose fewer --clips"):
        train.main()
