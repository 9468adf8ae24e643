"""Chunk-causal attention: the one mask rule of the project, and the function that applies it.

The sequence of a clip of K chunks is a clean context followed by M noisy copies ("segments") of the video:

    context  [portrait | audio 0] [video 0 | audio 1] ... [video K-2 | audio K-1]      K blocks
    noisy    [video 0] [video 1] ... [video K-1]                                       M times

Blocks are equally long, because the portrait is "video -1". The rule, for a query of block or chunk i:

    the portrait      sees itself only: it is a sink whose keys never depend on the sound
    a context token   sees the portrait and the context of blocks i-W+1 .. i
    a noisy token     sees the portrait and the context of blocks i-W+1 .. i, and its own noisy chunk

so noisy chunk i, which follows the clean past (video < i) and the sound up to its own chunk (audio <= i),
never sees the clean answer (video i, which stands in block i+1) nor another noisy chunk. W is the window.

                 keys:  portrait |  block 0   block 1   block 2   | noisy 0  noisy 1  noisy 2
    block 0                 x    |     x                          |
    block 1                 x    |     x         x                |
    block 2                 x    |               x         x      |                              W = 2
    noisy 1                 x    |     x         x                |             x
    noisy 2                 x    |               x         x      |                      x

The same rule read row by row is what a rolling key/value cache of W blocks holds, which is why one
parallel pass can rescore what was generated chunk by chunk.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The shape of one sequence: how many chunks, tokens per kind, noisy segments, and the window.

    Attributes:
        chunks: K, number of chunks of the clip, and of context blocks.
        video, audio: tokens per chunk of each kind; the portrait has `video` tokens too.
        segments: M, number of noisy copies of the video that follow the context (0: context alone).
        window: W, how many context blocks a token sees, its own included; the portrait comes on top.
    """

    chunks: int
    video: int
    audio: int
    segments: int = 1
    window: int = 1_000_000

    @property
    def context_length(self) -> int:
        return self.chunks * (self.video + self.audio)

    @property
    def length(self) -> int:
        return self.context_length + self.segments * self.chunks * self.video


@lru_cache(maxsize=16)
def chunk_causal_mask(layout: Layout, device: torch.device) -> Tensor:
    """Return the (L, L) boolean mask of the rule above; True where a query (row) may see a key (column)."""
    chunk = torch.arange(layout.chunks, device=device)
    block = chunk.repeat_interleave(layout.video + layout.audio)
    block[: layout.video] = -1                                     # the portrait, before all time
    noisy = chunk.repeat_interleave(layout.video).repeat(layout.segments)
    index = torch.cat([block, noisy])                              # (L,) block or chunk of each token
    segment = torch.zeros_like(index)                              # (L,) 0 is the context
    segment[layout.context_length:] = 1 + torch.arange(
        layout.segments, device=device).repeat_interleave(layout.chunks * layout.video)

    query, key = index[:, None], index[None, :]
    in_context = segment[None, :] == 0
    past = in_context & (key <= query) & ((key > query - layout.window) | (key == -1))
    own_chunk = (segment[:, None] == segment[None, :]) & (key == query) & ~in_context
    return past | own_chunk


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v under the chunk-causal mask, or unmasked.

    Args:
        q: (B, H, Lq, D) queries.
        k, v: (B, H_kv, Lk, D) keys and values; query head h reads key head h // (H / H_kv).
        layout: the sequence's shape, Lq = Lk = layout.length. None: every query sees every key, which is
            right when generating, where the rolling cache holds exactly what the rule allows.

    Returns: (B, H, Lq, D), dtype of q.

    Raises: ValueError when the lengths do not fit the layout or the heads do not divide.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads")
    if layout is not None and not (q.shape[2] == k.shape[2] == layout.length):
        raise ValueError(f"layout of {layout.length} tokens, but {q.shape[2]} queries and {k.shape[2]} keys")
    mask = None if layout is None else chunk_causal_mask(layout, q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
