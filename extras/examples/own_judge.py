"""A judge of your own: anything with `window`, `fingerprint` and `rate`.

    python -m extras.examples.own_judge --out runs/own-judge      with the flags of train.py, --resume too
    python -m extras.examples.own_judge validate                  as python -m extras.school does

The rules below stand for whatever you have: a network, a program, a service. They are short and poor: a face
that trembles to the beat while its mouth holds still would please them.
"""

import sys

import torch
from torch import Tensor

import train
from extras import reward_flags, school
from extras.files import one_line
from extras.media import SAMPLES_PER_FRAME
from reward import Ratings
from sample import correlation, each


class OwnJudge:
    """Rate lips by how the lower face follows loudness, liveliness by its range, motion by trembling.

    Spread ratings over 1 to 5 on clips like yours: what is alike for all teaches nothing.
    """

    window = None                                    # frames that it rates at once; None: any number
    fingerprint = "own judge, first version"         # ratings are kept under it: change it with the rules

    def rate(self, frames: Tensor, audio: Tensor, names: list[str]) -> Ratings:
        """Rate B clips by lip-sync, expressiveness and motion, from 1 to 5; NaN where a clip cannot be rated.

        Args: frames (B, F, 3, S, S) in [0, 1]; audio (B, F * 640) at 16 kHz; names, B of them, for messages.
        """
        frames = frames.cpu()                                                            # as sound is
        lower = frames[..., frames.shape[-2] // 2:, :]                                   # (B, F, 3, S/2, S)
        change = lower.diff(dim=1).abs().mean((2, 3, 4))                                 # (B, F - 1)
        loudness = audio.unflatten(1, (-1, SAMPLES_PER_FRAME)).std(-1)[:, 1:]            # (B, F - 1)
        tremble = frames.diff(n=3, dim=1).abs().mean((1, 2, 3, 4))                       # (B,)

        lips = 3 + 2 * each(correlation, change, loudness)
        liveliness = 1 + 4 * (change.mean(1) / 0.02).clamp(0, 1)
        motion = 5 - 4 * (tremble / 0.04).clamp(0, 1)
        score = torch.stack([lips, liveliness, motion], 1)                               # (B, 3)
        return Ratings(score, mass=torch.ones_like(score))                               # it was an answer


if __name__ == "__main__":                           # processes that draw talkers import this file, too
    reward_flags.make_judge = train.make_judge = lambda args: OwnJudge()
    with one_line("stopped", "choose fewer --clips"):
        (school if sys.argv[1:2] == ["validate"] else train).main()
