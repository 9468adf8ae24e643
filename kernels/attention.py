"""Chunk-causal attention: the one mask rule of the project, and the function that applies it.

The sequence of a clip of K chunks is a clean context followed by M noisy copies ("segments") of the video:

    context  [portrait | audio 0] [video 0 | audio 1] ... [video K-2 | audio K-1]      K blocks
    noisy    [video 0] [video 1] ... [video K-1]                                       M times

Blocks are equally long if the portrait, as "video -1", is counted in block 0; the mask treats it apart. The
rule, for a query of block or chunk i:

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

The rest is about the kernels; skip it at first. In PyTorch the mask is an (L, L) matrix of booleans, read by
an attention that multiplies every query with every key. But row by row the rule is at most three runs of
keys, and column by column a few runs of queries, so that the kernels need no mask, only bounds. Tiles are
aligned with blocks and chunks, so that all rows of a tile have the same bounds:

    a tile of queries of noisy chunk i sees         a tile of keys of block i is seen by

      [portrait] [blocks i-W+1 .. i] [own chunk]      [blocks i .. i+W-1] [noisy chunks i .. i+W-1], M times
      |  |  |    |  |  |  |  |  |    |  |  |          (the portrait: by everyone; a noisy chunk: by itself)
      tiles of keys, one after the other              tiles of queries, one after the other

        s      = q k^T / sqrt(D)                        p     = e^(s - lse)
        peak'  = max(peak, max s)                       delta = sum(out dout)
        p      = e^(s - peak')                          ds    = p (dout v^T - delta)
        total' = total e^(peak - peak') + sum p         dv    = p^T dout
        acc'   = acc e^(peak - peak') + p v             dk    = ds^T q / sqrt(D)
        out = acc / total,  lse = peak + log total      dq    = ds k / sqrt(D), by tiles of queries again

The tile itself stays on the chip, and no score ever leaves it (FlashAttention, 2205.14135; 2307.08691).

Each output tile has one owner, which adds in a fixed order: no atomics, equal inputs give equal bits. Tiles
with the longest runs are launched first, so that none of them is left to run alone at the end.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import jit, tl, triton, use_triton


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

    @property
    def bounds(self) -> list[int]:
        """The layout as the kernels read it: chunks, tokens of a chunk and of a block, window, segments."""
        block, window = self.video + self.audio, min(self.window, self.chunks)
        return [self.chunks, self.video, block, window, self.segments]


def coordinates(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (L,) the block or chunk of each token (portrait: -1), and (L,) its segment (context: 0)."""
    chunk = torch.arange(layout.chunks, device=device)
    block = chunk.repeat_interleave(layout.video + layout.audio)
    block[: layout.video] = -1                                     # the portrait, before all time
    noisy = chunk.repeat_interleave(layout.video)                  # of one segment
    segment = torch.arange(1, layout.segments + 1, device=device).repeat_interleave(len(noisy))
    return (torch.cat([block, noisy.repeat(layout.segments)]),
            torch.cat([torch.zeros_like(block), segment]))


def may_see(query: Tensor, query_segment: Tensor, key: Tensor, key_segment: Tensor, window: int) -> Tensor:
    """The rule above. query, key: block or chunk (portrait: -1); segments: 0 is context, 1.. noisy copies."""
    past = (key_segment == 0) & (key <= query) & ((key > query - window) | (key == -1))
    own_chunk = (query_segment == key_segment) & (key == query) & (key_segment != 0)
    return past | own_chunk


@lru_cache(maxsize=16)
def chunk_causal_mask(layout: Layout, device: torch.device) -> Tensor:
    """Return the (L, L) boolean mask of the rule above; True where a query (row) may see a key (column)."""
    index, segment = coordinates(layout, device)
    return may_see(index[:, None], segment[:, None], index, segment, layout.window)


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout | None = None, impl: str = "auto") -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v under the chunk-causal mask, or unmasked.

    Args:
        q: (B, H, Lq, D) queries.
        k, v: (B, H_kv, Lk, D) keys and values; query head h reads key head h // (H / H_kv).
        layout: the sequence's shape, Lq = Lk = layout.length. None: every query sees every key, which is
            right when generating, where the rolling cache holds exactly what the rule allows. That is
            PyTorch's own attention, whatever `impl`: there is no mask to do without.
        impl: "auto", "torch" or "triton". The kernels take one dtype of bf16, fp16, fp32, and D of 32, 64 or
            128; fp32 is not rounded to TF32.

    Returns: (B, H, Lq, D), dtype of q; under autocast its dtype.

    Raises: ValueError when lengths do not fit the layout, heads do not divide, or the kernels cannot run.
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads")
    if layout is not None and not (q.shape[2] == k.shape[2] == layout.length):
        raise ValueError(f"layout of {layout.length} tokens, but {q.shape[2]} queries and {k.shape[2]} keys")
    if torch.is_autocast_enabled(q.device.type):                   # as it does for PyTorch's own attention
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if layout is not None and use_triton(impl, q, unsuitable(q, k, v)):
        return fused_attention(q, k, v, layout.bounds)[0]
    mask = None if layout is None else chunk_causal_mask(layout, q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# ---------------------------------------------------------------- the kernels: which tile, which runs

@jit
def unit_start(index, segment, shape):
    """First token of context block `index` (-1: the portrait), or of noisy chunk `index` if segment > 0."""
    chunks, video, block, window, segments = shape
    context = tl.where(index < 0, 0, tl.maximum(video, index * block))
    return tl.where(segment > 0, chunks * block + ((segment - 1) * chunks + index) * video, context)


@jit
def locate(program, shape, TILE: tl.constexpr, LATE_FIRST: tl.constexpr):
    """Return (index, segment, first, last) of a program's tile, tokens first .. min(first + TILE, last) - 1.

    Tiles are dealt out index by index, noisy chunks' before the block's. Some have no tokens (last <= first).
    """
    chunks, video, block, window, segments = shape
    per_chunk = tl.cdiv(video, TILE)
    per_index = segments * per_chunk + tl.cdiv(block, TILE)
    index, rank = program // per_index - 1, program % per_index
    if LATE_FIRST:
        index = chunks - 2 - index
    noisy = rank < segments * per_chunk
    segment = tl.where(noisy, rank // per_chunk + 1, 0)
    start = unit_start(index, segment, shape)
    first = start + tl.where(noisy, rank % per_chunk, rank - segments * per_chunk) * TILE
    last = tl.where(noisy, start + video, tl.maximum(video, (index + 1) * block))
    return index, segment, first, tl.where(noisy & (index < 0), 0, last)     # the portrait has no noisy copy


@jit
def key_runs(index, segment, shape):
    """Return the runs of keys that a query tile sees: (last of the sink, past, its last, own, its last)."""
    chunks, video, block, window, segments = shape
    past, past_last = (index - window + 1) * block, tl.maximum(video, (index + 1) * block)
    joined = past <= video                                         # the window reaches the portrait: one run
    sink_last, past = tl.where(joined, past_last, video), tl.where(joined, past_last, past)
    own = unit_start(index, segment, shape)
    return sink_last, past, past_last, own, tl.where(segment > 0, own + video, own)


@jit
def query_runs(index, segment, shape, length):
    """Return the runs of queries that see a key tile: (first, last, first in segment 1, count in each)."""
    chunks, video, block, window, segments = shape
    until = tl.minimum(index + window, chunks)
    first = unit_start(index, segment, shape)
    last = tl.where(segment > 0, first + video, tl.maximum(first, until * block))
    last = tl.where(index < 0, length, last)                       # everyone sees the portrait
    count = tl.where((segment > 0) | (index < 0), 0, (until - index) * video)
    return first, last, unit_start(index, 1, shape), count


@jit
def row_pointers(pointer, stride, b, h, rows, D: tl.constexpr):
    """Where rows (R,) of head h of clip b lie in a tensor (B, H, L, D), (R, D)."""
    return pointer + b * stride[0] + h * stride[1] + rows[:, None] * stride[2] + tl.arange(0, D)[None, :]


@jit
def load_rows(pointer, stride, b, h, rows, seen, D: tl.constexpr):
    """Load them; zeros where they are not `seen`, whatever stands there."""
    return tl.load(row_pointers(pointer, stride, b, h, rows, D), mask=seen[:, None], other=0.0)


@jit
def store_rows(pointer, stride, b, h, rows, seen, value, D: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    tl.store(row_pointers(pointer, stride, b, h, rows, D), value, mask=seen[:, None])


@jit
def key_tile(t, runs, TILE: tl.constexpr):
    """Return the keys of tile t of the three runs in a row, and which of them belong to the run."""
    sink_last, past, past_last, own, own_last = runs
    t_past = t - tl.cdiv(sink_last, TILE)
    t_own = t_past - tl.cdiv(past_last - past, TILE)
    keys = tl.where(t_past < 0, t * TILE, tl.where(t_own < 0, past + t_past * TILE, own + t_own * TILE))
    last = tl.where(t_past < 0, sink_last, tl.where(t_own < 0, past_last, own_last))
    keys += tl.arange(0, TILE)
    return keys, keys < last


@jit
def key_tiles(runs, TILE: tl.constexpr):
    sink_last, past, past_last, own, own_last = runs
    return tl.cdiv(sink_last, TILE) + tl.cdiv(past_last - past, TILE) + tl.cdiv(own_last - own, TILE)


# ---------------------------------------------------------------- the kernels: forward, dq, dk and dv

LOG2E = 1.4426950408889634              # exponentials are 2^x on the chip: s and lse are in units of log 2


@jit
def forward_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stride, k_stride, v_stride, out_stride,
                   shape, heads, groups, length, SCALE: tl.constexpr, D: tl.constexpr,
                   BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """One program: one tile of queries of one head. Grid (B H, tiles)."""
    b, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    index, segment, first, last = locate(tl.program_id(1), shape, BLOCK_Q, True)
    if first < last:
        rows = first + tl.arange(0, BLOCK_Q)
        q = load_rows(q_ptr, q_stride, b, h, rows, rows < last, D)
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        acc = tl.zeros([BLOCK_Q, D], tl.float32)
        runs = key_runs(index, segment, shape)
        for t in range(0, key_tiles(runs, BLOCK_K)):
            keys, seen = key_tile(t, runs, BLOCK_K)
            k = load_rows(k_ptr, k_stride, b, h // groups, keys, seen, D)
            v = load_rows(v_ptr, v_stride, b, h // groups, keys, seen, D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
            s += tl.where(seen, 0.0, float("-inf"))[None, :]       # after the scale: one fused multiply-add
            new_peak = tl.maximum(peak, tl.max(s, 1))              # finite: every tile of a run has a key
            p = tl.exp2(s - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            peak = new_peak
        store_rows(out_ptr, out_stride, b, h, rows, rows < last, acc / total[:, None], D)
        tl.store(lse_ptr + (b * heads + h) * length + rows, peak + tl.log2(total), mask=rows < last)


@jit
def dq_kernel(q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
              q_stride, k_stride, v_stride, out_stride, dout_stride, dq_stride,
              shape, heads, groups, length, SCALE: tl.constexpr, D: tl.constexpr,
              BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """One program: dq of one tile of queries of one head, and delta for dkdv_kernel. Grid (B H, tiles)."""
    b, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    index, segment, first, last = locate(tl.program_id(1), shape, BLOCK_Q, True)
    if first < last:
        rows = first + tl.arange(0, BLOCK_Q)
        seen_rows = rows < last
        q = load_rows(q_ptr, q_stride, b, h, rows, seen_rows, D)
        out = load_rows(out_ptr, out_stride, b, h, rows, seen_rows, D)
        dout = load_rows(dout_ptr, dout_stride, b, h, rows, seen_rows, D)
        at = (b * heads + h) * length + rows
        lse = tl.load(lse_ptr + at, mask=seen_rows, other=float("inf"))
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        tl.store(delta_ptr + at, delta, mask=seen_rows)
        dq = tl.zeros([BLOCK_Q, D], tl.float32)
        runs = key_runs(index, segment, shape)
        for t in range(0, key_tiles(runs, BLOCK_K)):
            keys, seen = key_tile(t, runs, BLOCK_K)
            k = load_rows(k_ptr, k_stride, b, h // groups, keys, seen, D)
            v = load_rows(v_ptr, v_stride, b, h // groups, keys, seen, D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
            p = tl.exp2(s + tl.where(seen, 0.0, float("-inf"))[None, :] - lse[:, None])
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            ds = (p * (dp - delta[:, None])).to(k.dtype)
            dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        store_rows(dq_ptr, dq_stride, b, h, rows, seen_rows, dq * (D ** -0.5), D)


@jit
def dkdv_kernel(q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
                q_stride, k_stride, v_stride, dout_stride, dk_stride, dv_stride,
                shape, kv_heads, groups, length, SCALE: tl.constexpr, D: tl.constexpr,
                BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """One program: dk and dv of a tile of keys, over the query heads that share it. Grid (B H_kv, tiles)."""
    b, h = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    index, segment, begin, end = locate(tl.program_id(1), shape, BLOCK_K, False)
    if begin < end:
        keys = begin + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, k_stride, b, h, keys, keys < end, D)
        v = load_rows(v_ptr, v_stride, b, h, keys, keys < end, D)
        dk = tl.zeros([BLOCK_K, D], tl.float32)
        dv = tl.zeros([BLOCK_K, D], tl.float32)
        first, last, noisy, count = query_runs(index, segment, shape, length)
        tiles, per_segment = tl.cdiv(last - first, BLOCK_Q), tl.cdiv(count, BLOCK_Q)
        per_head = tiles + shape[4] * per_segment
        for t in range(0, groups * per_head):
            q_head, u = h * groups + t // per_head, t % per_head
            w = u - tiles                                          # from 0 on: a tile of the noisy runs
            start = noisy + w // tl.maximum(per_segment, 1) * shape[0] * shape[1]
            rows = tl.where(w < 0, first + u * BLOCK_Q, start + w % tl.maximum(per_segment, 1) * BLOCK_Q)
            seen = rows + tl.arange(0, BLOCK_Q) < tl.where(w < 0, last, start + count)
            rows += tl.arange(0, BLOCK_Q)
            q = load_rows(q_ptr, q_stride, b, q_head, rows, seen, D)
            dout = load_rows(dout_ptr, dout_stride, b, q_head, rows, seen, D)
            at = (b * kv_heads * groups + q_head) * length + rows
            lse = tl.load(lse_ptr + at, mask=seen, other=float("inf"))       # p = 0 where there is no query
            delta = tl.load(delta_ptr + at, mask=seen, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * SCALE
            p = tl.exp2(s - lse[None, :])
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        store_rows(dk_ptr, dk_stride, b, h, keys, keys < end, dk * (D ** -0.5), D)
        store_rows(dv_ptr, dv_stride, b, h, keys, keys < end, dv, D)


# ---------------------------------------------------------------- launching them

def unsuitable(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Say why the kernels cannot take these inputs; None: they can."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"q, k, v must share one dtype of bf16, fp16 or fp32, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] not in (32, 64, 128):
        return f"head dim must be 32, 64 or 128, got {q.shape[-1]}"
    return None if q.numel() and k.numel() else "there are no queries or no keys"


def tiling(bounds: list[int], head_dim: int, dtype: torch.dtype, backward: bool) -> tuple[int, int, dict]:
    """Choose a program's own rows, the rows that pass by at a time, and the other compile-time arguments.

    Own tiles are 128 rows where these fill blocks and chunks, else as long as a block, 16 to 64. The rest is
    as much as compiles without spilled registers (tests/test_kernels.py). Other choices have not been timed.

    fp32 is multiplied as three products of TF32, which keep nearly its precision on tensor cores: in GRPO,
    cached and parallel means must not be further apart than 1e-6 (`grpo.check_rescoring`).
    """
    filled = bounds[1] % 128 == bounds[2] % 128 == 0
    own = 128 if filled else min(64, max(16, triton.next_power_of_2(bounds[2])))
    if dtype == torch.float32:
        passing, warps = (16, 4) if head_dim == 128 else (32, 8)
        own = min(own, passing)
    elif backward and head_dim == 128:
        own, passing, warps = min(own, 64), 32, 8
    else:
        passing, warps = 32 if backward and own == 64 else 64, 8 if own == 128 else 4
    stages = 2 if backward and dtype == torch.float32 else 3
    return own, passing, {"SCALE": LOG2E * head_dim ** -0.5, "D": head_dim, "num_warps": warps,
                          "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", "num_stages": stages}


def programs(bounds: list[int], tile: int) -> int:
    """How many tiles `locate` deals out to each head."""
    chunks, video, block, _, segments = bounds
    return (chunks + 1) * (segments * triton.cdiv(video, tile) + triton.cdiv(block, tile))


def like_tokens(x: Tensor) -> Tensor:
    """An empty (B, H, L, D) that lies in memory as (B, L, H, D): gathering the heads afterwards is free."""
    b, h, l, d = x.shape
    return x.new_empty(b, l, h, d).transpose(1, 2)


@torch.library.custom_op("flowportrait::attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> tuple[Tensor, Tensor]:
    """Return attention (B, H, L, D) and the log-sum-exp of its scores (B, H, L), in units of log 2."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (b, h, length, d), out = q.shape, like_tokens(q)
    lse = q.new_empty(b, h, length, dtype=torch.float32)
    own, passing, options = tiling(bounds, d, q.dtype, backward=False)
    forward_kernel[b * h, programs(bounds, own)](
        q, k, v, out, lse, *(x.stride()[:3] for x in (q, k, v, out)),
        tuple(bounds), h, h // k.shape[1], length, BLOCK_Q=own, BLOCK_K=passing, **options)
    return out, lse


@torch.library.custom_op("flowportrait::attention_backward", mutates_args=())
def fused_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
                   bounds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv."""
    q, k, v, dout = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, dout))
    (b, h, length, d), h_kv, shape = q.shape, k.shape[1], tuple(bounds)
    dq, dk, dv, delta = like_tokens(q), like_tokens(k), like_tokens(v), torch.empty_like(lse)
    own, passing, options = tiling(bounds, d, q.dtype, backward=True)
    grid = programs(bounds, own)
    dq_kernel[b * h, grid](
        q, k, v, out, dout, lse, delta, dq, *(x.stride()[:3] for x in (q, k, v, out, dout, dq)),
        shape, h, h // h_kv, length, BLOCK_Q=own, BLOCK_K=passing, **options)
    dkdv_kernel[b * h_kv, grid](
        q, k, v, dout, lse, delta, dk, dv, *(x.stride()[:3] for x in (q, k, v, dout, dk, dv)),
        shape, h_kv, h // h_kv, length, BLOCK_Q=passing, BLOCK_K=own, **options)
    return dq, dk, dv


@fused_attention.register_fake
def _(q, k, v, bounds):
    return like_tokens(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@fused_backward.register_fake
def _(q, k, v, out, lse, dout, bounds):
    return like_tokens(q), like_tokens(k), like_tokens(v)


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.bounds = inputs[3]


def backward(ctx, dout, _):
    return *fused_backward(*ctx.saved_tensors, dout, ctx.bounds), None


fused_attention.register_autograd(backward, setup_context=keep_for_backward)
