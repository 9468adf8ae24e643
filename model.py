"""The generator: a motion codec, a chunk-causal multimodal transformer, and a cache that makes it stream.

What you learn here, in the order of the file:

1. The motion codec. A frame is the portrait plus a residual, carried by a head pose, both in a few numbers:

       frame = warp(portrait + residual, pose)
       latent chunk (N, C) = [windows of the residual | pose] of T frames

2. The transformer. Portrait, sound and video are tokens of one sequence (drawn in kernels/attention.py).
   Context block i = [video chunk i-1 | sound of chunk i]; the portrait stands in for video chunk -1. Every
   chunk is denoised given the blocks up to its own: one mask serves training, generation, and rescoring.
3. Flow matching. The network predicts the clean latent, which becomes a velocity, (x_sigma - clean) / sigma
   (kernels/flow_step.py). Each chunk has a noise level sigma of its own.
4. Generation. `generate` writes a block, the last finished chunk and the next sound, into a rolling cache of
   keys and values, and denoises the next chunk against it: constant memory and time per chunk, for speech of
   any length.

The paper's sizes and training data are not public. Chosen here: a linear codec (it fits in seconds), a trunk
shaped like a Qwen3 layer (so that one can be loaded), a portrait outside rotary time (never far away).

Shapes: B batch, K chunks, T frames per chunk, F = K T frames, M noisy copies of the video ("segments"; in
GRPO one per draw), N video tokens per chunk, C channels, S pixels per side, L tokens of a sequence, H heads,
D head dim.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import MEL_DIM
from extras.files import MediaError, first_line, reading_weights, write_weights
from kernels.attention import Layout, attention
from kernels.flow_step import flow_step, sigma_schedule

POSE = 6                    # affine: the factors of 1, x, y in a shift in x, then in y; 1 is half a picture
POSE_PYRAMID = (16, 3), (32, 3), (64, 1)     # the pose is measured on pictures of this size, in so many steps
SAMPLING_STEPS = 2          # flow steps per chunk; with more, lips of a small model follow less well
PATCH = 16                  # pixels per side of the appearance patches that the transformer sees


@dataclass
class Config:
    """Everything that defines a generator; saved as config.json beside the weights."""

    size: int = 64                # S, pixels per side
    chunk_frames: int = 4         # T, frames per chunk
    grid: int = 3                 # windows per side of the motion codec (odd: a window stands on the mouth)
    space_channels: int = 64      # principal components kept per window and frame
    channels: int = 128           # C, channels per video token
    mel_channels: int = MEL_DIM   # audio features per frame
    audio_encoder: str = ""       # the speech encoder that makes them, a folder or a name; "": data.log_mel
    width: int = 96               # of a token in the trunk
    layers: int = 4
    heads: int = 3                # query heads
    kv_heads: int = 3             # key and value heads, shared by groups of query heads
    head_dim: int = 32            # D
    mlp_width: int = 256          # hidden width of SwiGLU
    window: int = 8               # W, context blocks that a token sees
    rope_base: float = 100.0      # slowest rotary wavelength, about 350 frames: the window is far shorter
    norm_eps: float = 1e-6        # added to the mean square in every RMSNorm

    def __post_init__(self):
        at_least_1 = asdict(self).keys() - {"audio_encoder", "norm_eps"}
        wrong = [name for name in at_least_1 if not 1 <= getattr(self, name) < 1e8]
        if wrong:
            raise ValueError(f"{', '.join(sorted(wrong))} must be at least 1 and below 1e8")
        if self.grid % 2 == 0 or self.size % (self.grid + 1):
            raise ValueError(f"grid {self.grid} must be odd, size {self.size} a multiple of {self.grid + 1}")
        if self.heads % self.kv_heads or self.head_dim % 8:
            raise ValueError(f"{self.kv_heads} kv_heads must divide {self.heads} heads, "
                             f"and 8 head_dim {self.head_dim}")
        if self.chunk_frames * self.space_channels < max(self.channels, self.chunk_frames * POSE):
            raise ValueError(f"chunk_frames {self.chunk_frames} x space_channels {self.space_channels} must "
                             f"be at least channels {self.channels}, and chunk_frames x {POSE}")
        pixels = 3 * (2 * self.size // (self.grid + 1)) ** 2
        if self.space_channels > pixels:
            raise ValueError(f"space_channels {self.space_channels} are more than the {pixels} values of a "
                             "window of the codec; take a smaller grid or a larger size")

    @property
    def video_tokens(self) -> int:
        """N, tokens per chunk: one per window of the codec, one for the head pose."""
        return self.grid ** 2 + 1


# ---------------------------------------------------------------- the motion codec

def pixel_grid(size: int, device=None) -> Tensor:
    """Return (S, S, 2), the x and y of every pixel centre in [-1, 1]."""
    c = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    return torch.stack(torch.meshgrid(c, c, indexing="xy"), -1)


def head_basis(grid: Tensor) -> Tensor:
    """Return (..., 3): 1, x, y under a soft mask, 1 on the head, 0 at the sides. A displacement linear in
    this basis moves the head as one affine piece, and stretches the background in between."""
    def ramp(t):
        t = t.clamp(0, 1)
        return t * t * (3 - 2 * t)
    x, y = grid.unbind(-1)
    mask = ramp((1 - x.abs()) / 0.3) * ramp((1.3 - y) / 0.6)      # shoulders follow by half
    return mask[..., None] * torch.stack([torch.ones_like(x), x, y], -1)


def displacement(pose: Tensor, grid: Tensor) -> Tensor:
    """Return (B, S, S, 2), how far each point of `grid` (1 or B, S, S, 2) moves under a pose (B, 6)."""
    return head_basis(grid) @ rearrange(pose, "b (xy k) -> b 1 k xy", xy=2)


def warp(picture: Tensor, pose: Tensor, mode: str = "bicubic") -> Tensor:
    """Move the head: output(p) = picture(p + displacement(p)). picture (B, C, S, S), pose (B, 6)."""
    grid = pixel_grid(picture.shape[-1], picture.device)[None]
    return F.grid_sample(picture, grid + displacement(pose, grid), mode, "border", align_corners=False)


def unwarp(picture: Tensor, pose: Tensor) -> Tensor:
    """Undo `warp`: q = p + displacement(p) is solved for p by fixed-point iteration."""
    grid = pixel_grid(picture.shape[-1], picture.device)[None]
    p = grid
    for _ in range(3):
        p = grid - displacement(pose, p)
    return F.grid_sample(picture, p, "bicubic", "border", align_corners=False)


def estimate_pose(frames: Tensor) -> Tensor:
    """Find the poses (B, F, 6) that carry each clip's first frame onto its frames (B, F, 3, S, S) in [0, 1].

    By Gauss-Newton on the grey difference (Lucas and Kanade, 1981), coarse to fine for motion of many pixels.
    """
    b, f = frames.shape[:2]
    grey = frames.mean(2).flatten(0, 1)[:, None]                                     # (B F, 1, S, S)
    pose = frames.new_zeros(b * f, POSE)
    for size, steps in POSE_PYRAMID:
        target = F.interpolate(grey, (size, size), mode="area")                      # (B F, 1, s, s)
        first = target[::f].repeat_interleave(f, 0)
        basis = head_basis(pixel_grid(size, frames.device))                          # (s, s, 3)
        damping = 1e-4 * size ** 2 * torch.eye(POSE, device=frames.device)
        for _ in range(steps):
            moved = warp(first, pose, "bilinear")
            error = (target - moved).flatten(1)[:, None]                             # (B F, 1, s s)
            dy, dx = torch.gradient(moved[:, 0], spacing=2 / size, dim=(1, 2))
            slopes = torch.cat([dx[..., None] * basis, dy[..., None] * basis], -1)
            jacobian = slopes.flatten(1, 2)                                          # (B F, s s, 6)
            normal = jacobian.mT @ jacobian + damping                                # pulls to 0
            pose = pose + torch.linalg.solve(normal, (error @ jacobian)[:, 0] - pose @ damping)
    return pose.view(b, f, POSE)


def rotation(new: Tensor, old: Tensor) -> Tensor:
    """Return the rotation (..., k, k) that takes the columns of `new` (..., P, k) nearest to those of `old`
    (orthogonal Procrustes, Schonemann 1966); none where `old` is not there yet, all zeros."""
    if not old.any():
        return torch.eye(new.shape[-1], device=new.device)
    u, _, vh = torch.linalg.svd(new.mT @ old)
    return u @ vh


class MotionCodec(nn.Module):
    """Frames of a talking head as a few numbers: how the head moved, and what changed on the face.

    In frame = warp(portrait + residual, pose), identity comes from the portrait for free, and mouth and eyes
    stay in place in the residual. It is cut into grid x grid windows that overlap by half under a sine window
    s (sum of s^2 = 1: no seams), each written in its principal components, first in space, then over the
    frames of a chunk. The pose comes last.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.stride, self.side = c.size // (c.grid + 1), 2 * c.size // (c.grid + 1)
        tokens, pixels = c.video_tokens, 3 * self.side ** 2
        self.register_buffer("space", torch.zeros(tokens - 1, pixels, c.space_channels))
        self.register_buffer("time", torch.zeros(tokens, c.chunk_frames * c.space_channels, c.channels))
        self.register_buffer("scale", torch.ones(tokens, c.channels))
        sine, focus = self._sine_windows(), self.cut(self._focus())                  # (N-1, 1, 1, side, side)
        self.register_buffer("analysis", sine * focus, persistent=False)
        self.register_buffer("synthesis", sine / focus, persistent=False)

    def _sine_windows(self) -> Tensor:
        at = torch.arange(self.config.size) + 0.5
        centre = (torch.arange(self.config.grid)[:, None] + 1) * self.stride
        hann = 0.5 + 0.5 * torch.cos((at - centre) / self.stride * math.pi)
        hann = hann * ((at - centre).abs() < self.stride)
        hann = hann / hann.sum(0)                                # the outer windows reach the border alone
        one = torch.stack([h[i * self.stride:][: self.side] for i, h in enumerate(hann.sqrt())])
        return rearrange(torch.einsum("iy,jx->ijyx", one, one), "i j y x -> (i j) 1 1 y x")

    def _focus(self) -> Tensor:
        """(1, 1, S, S): how much an error matters. A mouth is a few pixels wide, and hair and collar, never
        quite aligned, would take its components. A portrait's mouth lies at about y = 0.47 of -1..1; width
        and strength were chosen by the lip-sync and amplitude that are left after the codec."""
        x, y = pixel_grid(self.config.size).unbind(-1)
        return (1 + 12 * torch.exp(-(x ** 2 + (y - 0.47) ** 2) / (2 * 0.2 ** 2)))[None, None]

    def view(self, picture: Tensor, n: int) -> Tensor:
        """Return window n of pictures (B, C, S, S), (B, C, side, side)."""
        i, j = (self.stride * at for at in divmod(n, self.config.grid))
        return picture[..., i:i + self.side, j:j + self.side]

    def cut(self, picture: Tensor) -> Tensor:
        """Cut (B, C, S, S) into its overlapping windows, (N-1, B, C, side, side)."""
        return torch.stack([self.view(picture, n) for n in range(self.config.grid ** 2)])

    def analyse(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Split clips into pose (B, F, 6) and residual (B, F, 3, S, S); frames (B, F, 3, S, S) in [0, 1]."""
        pose = estimate_pose(frames)
        still = unwarp(frames.flatten(0, 1), pose.flatten(0, 1)).view_as(frames)
        return pose, still - frames[:, :1]

    def _gather(self, pose: Tensor, space: Tensor) -> Tensor:
        """Chunk up pose (B, F, 6) and space (N-1, B F, k): (N, B K, T k), the pose last and zero-padded."""
        t = self.config.chunk_frames
        space = rearrange(space, "n (bk t) k -> n bk (t k)", t=t)
        pose = rearrange(pose, "b (k t) p -> 1 (b k) (t p)", t=t)
        return torch.cat([space, F.pad(pose, (0, space.shape[-1] - pose.shape[-1]))])

    @torch.no_grad()
    def fit(self, frames: Tensor) -> None:
        """Fit the components to clips (B, F, 3, S, S) in [0, 1], F a multiple of T; first frames: portraits.
        Components are not centred: latent zero is the portrait itself. Where the codec has been fitted
        before, they are turned towards the old ones: a trunk keeps what it has learned of these."""
        c = self.config
        parts = [self.analyse(batch) for batch in frames.split(16)]
        pose, residual = (torch.cat(p) for p in zip(*parts))
        residual = residual.flatten(0, 1)                                        # (B F, 3, S, S)
        some = torch.linspace(0, len(residual) - 1, min(len(residual), 6000), device=frames.device).long()
        space = []
        with torch.random.fork_rng():
            torch.manual_seed(0)                                                 # of svd_lowrank's probes
            for n in range(c.grid ** 2):
                window = (self.view(residual, n) * self.analysis[n]).flatten(1)  # (B F, 3 side side)
                found = torch.svd_lowrank(window[some], q=c.space_channels, niter=2)[2]
                self.space[n] = found @ rotation(found, self.space[n])
                space.append(window @ self.space[n])
        tokens = self._gather(pose, torch.stack(space))                          # (N, B K, T k)
        variance, axes = torch.linalg.eigh(tokens.mT @ tokens / tokens.shape[1])
        axes = axes.flip(-1)[..., : c.channels]
        turn = rotation(axes, self.time)
        self.time.copy_(axes @ turn)
        variance = variance.flip(-1)[..., None, : c.channels].clamp_min(0) @ turn.square()
        std = variance[:, 0].sqrt()                                              # (N, C)
        # Half-whitening: latents deviate by sqrt(std / strongest), so 1, 1/4, 1/100 become 1, 1/2, 1/10.
        # Unscaled, the last would drown in the flow's noise; whitened, what is hardly seen counts like lips.
        # Windows share one `strongest`. The pose's is divided by 16, for a deviation of 4, as few flow steps
        # smooth the small motion of a head away.
        strongest = std.amax(-1, keepdim=True)
        strongest[:-1] = strongest[:-1].max()
        strongest[-1] /= 4 ** 2
        self.scale.copy_((std.clamp_min(1e-3 * strongest) * strongest).sqrt())

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Encode clips (B, F, 3, S, S) in [0, 1], F = K T, to latents (B, K, N, C).

        On the clips of `fit` their deviation is 1 at most, the pose's 4.
        """
        pose, residual = self.analyse(frames)
        windows = self.cut(residual.flatten(0, 1)) * self.analysis               # (N-1, B F, 3, side, side)
        tokens = self._gather(pose, windows.flatten(2) @ self.space)             # (N, B K, T k)
        return rearrange(tokens @ self.time, "n (b k) c -> b k n c", b=len(frames)) / self.scale

    def decode(self, portrait: Tensor, latents: Tensor) -> Tensor:
        """Decode latents (B, K, N, C) of a portrait (B, 3, S, S) to frames (B, K T, 3, S, S) in [0, 1]."""
        c, (b, k) = self.config, latents.shape[:2]
        tokens = rearrange(latents * self.scale, "b k n c -> n (b k) c") @ self.time.mT
        space = rearrange(tokens[:-1], "n bk (t k) -> n (bk t) k", t=c.chunk_frames)
        pose = rearrange(tokens[-1, :, : c.chunk_frames * POSE], "bk (t p) -> (bk t) p", p=POSE)
        windows = rearrange(space @ self.space.mT, "n b (c y x) -> n b c y x", c=3, y=self.side)
        windows = rearrange(windows * self.synthesis, "n b c y x -> b (c y x) n")
        residual = F.fold(windows, c.size, self.side, stride=self.stride)        # overlap-add: (B F, 3, S, S)
        frames = warp(portrait.repeat_interleave(k * c.chunk_frames, 0) + residual, pose)
        return frames.clamp(0, 1).unflatten(0, (b, k * c.chunk_frames))


# ---------------------------------------------------------------- the transformer

def rotary(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin (L, D/2) of three-part rotary positions (L, 3): time in frames, row, column.

    Frequencies are dealt out in turn (time, row, time, column), so that each part has fast and slow ones. A
    token whose time is nan stands outside time: its time channels are zeroed, in queries and keys alike, so
    that it looks the same from every instant, as the portrait must, however far the video has gone.
    """
    index = torch.arange(head_dim // 2, device=positions.device)
    part = torch.where(index % 2 == 0, 0, 1 + index % 4 // 2)          # 0 1 0 2, 0 1 0 2, ...
    frequency = base ** (-index.double() / len(index))
    angle = positions.double()[:, part] * frequency                    # (L, D/2), exact after hours of video
    return angle.cos().nan_to_num(0).float(), angle.sin().nan_to_num(0).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, L, D) by (L, D/2) angles: channel i pairs with channel i + D/2, as in Llama and Qwen."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class KVCache:
    """A layer's keys and values of the portrait and of the last W context blocks, in constant memory.

    First the portrait's, never overwritten; then a ring of W blocks, oldest replaced first; behind it room
    for the chunk that is being denoised. Order inside the ring is free: keys are rotated by absolute position
    before they are stored. Block 0 lacks the tokens of a video, so the ring is first full when block W
    replaces it; from then on each write evicts one block.
    """

    def __init__(self, config: Config, batch: int, device, dtype):
        self.sink, self.written = config.video_tokens, 0
        self.ring = config.window * (config.video_tokens + config.chunk_frames)
        shape = batch, config.kv_heads, self.sink + self.ring + config.video_tokens, config.head_dim
        self.keys, self.values = torch.empty((2, *shape), device=device, dtype=dtype)

    def update(self, k: Tensor, v: Tensor, write: bool) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H_kv, L, D), for good if `write`. Returns: all that queries may see."""
        n, held = k.shape[2], min(self.written, self.sink + self.ring)
        at = slice(held, held + n)                               # behind the ring, to be overwritten
        if write:
            at = torch.arange(self.written, self.written + n, device=k.device)
            at = torch.where(at < self.sink, at, self.sink + (at - self.sink) % self.ring)
            self.written += n
        self.keys[:, :, at], self.values[:, :, at] = k.to(self.keys.dtype), v.to(self.values.dtype)
        held = min(self.written, self.sink + self.ring) if write else held + n
        return self.keys[:, :, :held], self.values[:, :, :held]


class RMSNorm(nn.RMSNorm):
    """PyTorch's, in the dtype of what comes in: it has no fused kernel for bf16 with fp32 weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Let the noise level shift and scale tokens (B, L, width): adaLN, as in DiT (2212.09748)."""
    return x * (1 + scale) + shift


def per_token(levels: Tensor, layout: Layout) -> Tensor:
    """Repeat a vector per noise level, (B, 1 + M K, width), for the tokens that have it: (B, L, width).

    The first level is the context's, the others are the noisy chunks'.
    """
    context = levels[:, :1].expand(-1, layout.context_length, -1)
    return torch.cat([context, levels[:, 1:].repeat_interleave(layout.video, 1)], 1)


class Block(nn.Module):
    """A decoder layer of a modern language model, modulated by the noise level.

    As adaLN-zero in DiT, but gates begin at 1 and not at 0, so that a pretrained layer works as before.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads = c.heads, c.kv_heads
        self.attention_norm = RMSNorm(c.width, eps=c.norm_eps)
        self.q = nn.Linear(c.width, c.heads * c.head_dim, bias=False)
        self.k = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.v = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=False)
        self.out = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.q_norm = RMSNorm(c.head_dim, eps=c.norm_eps)
        self.k_norm = RMSNorm(c.head_dim, eps=c.norm_eps)
        self.mlp_norm = RMSNorm(c.width, eps=c.norm_eps)
        self.gate = nn.Linear(c.width, c.mlp_width, bias=False)
        self.up = nn.Linear(c.width, c.mlp_width, bias=False)
        self.down = nn.Linear(c.mlp_width, c.width, bias=False)
        self.modulation = nn.Linear(c.width, 6 * c.width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor], layout: Layout | None = None,
                cache: KVCache | None = None, write: bool = False) -> Tensor:
        """Transform tokens (B, L, width).

        Training: layout, and condition (B, 1 + M K, width), of the context and of each noisy chunk.
        Generation: cache, and condition (B, 1, width), as all tokens have one noise level.
        """
        modulation = self.modulation(condition)
        if layout is not None:
            modulation = per_token(modulation, layout)                           # (B, L, 6 width)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, -1)

        h = modulate(self.attention_norm(x), shift_a, scale_a)                   # (B, L, width)
        q = self.q_norm(rearrange(self.q(h), "b l (h d) -> b h l d", h=self.heads))
        k = self.k_norm(rearrange(self.k(h), "b l (h d) -> b h l d", h=self.kv_heads))
        v = rearrange(self.v(h), "b l (h d) -> b h l d", h=self.kv_heads)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, write)
        h = attention(q, k, v, layout)                                           # (B, H, L, D)
        x = x + (1 + gate_a) * self.out(rearrange(h, "b h l d -> b l (h d)"))

        h = modulate(self.mlp_norm(x), shift_m, scale_m)                         # (B, L, width)
        return x + (1 + gate_m) * self.down(F.silu(self.gate(h)) * self.up(h))


class TokenLinear(nn.Module):
    """A linear map of its own for each token of a chunk, since each codec window has its own components."""

    def __init__(self, tokens: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(tokens, outputs))

    def forward(self, x: Tensor) -> Tensor:                      # (..., N, inputs) -> (..., N, outputs)
        return torch.einsum("...ni,nio->...no", x, self.weight) + self.bias


class Generator(nn.Module):
    """Portrait, sound and clean past in; velocity of the noisy chunks out."""

    checkpointing = False         # True: training keeps only the layers' inputs, and computes the rest twice

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.codec = MotionCodec(c)
        self.portrait_in = nn.Linear(3 * PATCH ** 2, c.width)
        self.portrait_place = nn.Parameter(0.02 * torch.randn(c.video_tokens, c.width))
        self.audio_in = nn.Sequential(
            nn.Linear(c.mel_channels, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.no_audio = nn.Parameter(0.02 * torch.randn(c.width))
        self.video_in = TokenLinear(c.video_tokens, c.channels, c.width)
        self.sigma_in = nn.Sequential(nn.Linear(64, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, eps=c.norm_eps)
        self.video_out = TokenLinear(c.video_tokens, c.width, c.channels)
        nn.init.zeros_(self.video_out.weight)
        g = c.grid
        place = torch.cartesian_prod(torch.arange(g), torch.arange(g))
        self.register_buffer("place", torch.cat([place, torch.tensor([[g, g]])]).double(), persistent=False)

    # -- tokens

    def embed_portrait(self, portrait: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> (B, N, width): the codec's windows, and last the whole picture."""
        pictures = [*self.codec.cut(portrait), portrait]                         # N of (B, 3, s, s)
        small = [F.interpolate(picture, (PATCH, PATCH), mode="area") for picture in pictures]
        patches = torch.stack(small, 1).flatten(2)                               # (B, N, 3 PATCH PATCH)
        return self.portrait_in(patches * 2 - 1) + self.portrait_place

    def embed_audio(self, mel: Tensor, heard: Tensor | None = None) -> Tensor:
        """(B, F, mel_channels) -> (B, F, width); where `heard` (B,) is false the clip has no sound at all."""
        tokens = self.audio_in(mel)
        return tokens if heard is None else torch.where(heard[:, None, None], tokens, self.no_audio)

    def embed_sigma(self, sigma: Tensor) -> Tensor:
        """(...) in [0, 1] -> (..., width)"""
        frequency = torch.exp(torch.linspace(0, math.log(1000), 32, device=sigma.device))
        angle = sigma[..., None].float() * frequency
        return self.sigma_in(torch.cat([angle.cos(), angle.sin()], -1))

    def positions(self, chunk: Tensor, kind: str) -> Tensor:
        """(..., L, 3) of the tokens of chunks (...): time in frames, row, column."""
        c, time = self.config, chunk.double()[..., None] * self.config.chunk_frames
        if kind == "audio":
            time = time + torch.arange(c.chunk_frames, device=time.device)
            return F.pad(time[..., None], (0, 2), value=c.grid)
        if kind == "portrait":
            time = torch.full_like(time, float("nan"))
        place = self.place.expand(*chunk.shape, -1, -1)
        return torch.cat([time[..., None].expand(*place.shape[:-1], 1), place], -1)

    def rope(self, *positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(torch.cat(positions), self.config.head_dim, self.config.rope_base)

    def to_velocity(self, x: Tensor, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        """Read the network's output, the clean latent, out as velocity = (x_sigma - clean) / sigma."""
        clean = self.video_out(self.norm(x)).float()
        return (noisy - clean) / sigma

    # -- training: all chunks in one pass

    def forward(self, portrait: Tensor, mel: Tensor, clean: Tensor, noisy: Tensor, sigma: Tensor,
                heard: Tensor | None = None) -> Tensor:
        """Predict the velocity of every noisy chunk, each given the clean past of its own clip.

        Args:
            portrait: (B, 3, S, S) in [0, 1].
            mel: (B, K T, mel_channels).
            clean: (B, K, N, C) the past that is shown; its last chunk is no one's past and is not read.
            noisy: (B, M, K, N, C), M independently noised copies.    sigma: (B, M, K).
            heard: (B,) bool, false where the sound is dropped.

        Returns: (B, M, K, N, C) velocity, fp32.
        """
        c, (b, m, k, n, _) = self.config, noisy.shape
        layout = Layout(k, n, c.chunk_frames, m, c.window)
        audio = rearrange(self.embed_audio(mel, heard), "b (k t) w -> b k t w", k=k)
        past = torch.cat([self.embed_portrait(portrait)[:, None], self.video_in(clean[:, :-1])], 1)
        context = torch.cat([past, audio], 2).flatten(1, 2)                      # (B, K (N+T), width)
        x = torch.cat([context, self.video_in(noisy).flatten(1, 3)], 1)          # (B, L, width)

        level = self.embed_sigma(sigma)                                          # (B, M, K, width)
        at_rest = self.embed_sigma(sigma.new_zeros(b, 1))                        # (B, 1, width)
        condition = F.silu(torch.cat([at_rest, level.flatten(1, 2)], 1))         # (B, 1 + M K, width)

        at = torch.arange(k, device=x.device)
        video = self.positions(at, "video")                                      # (K, N, 3)
        past = torch.cat([self.positions(at[:1], "portrait"), video[:-1]])       # (K, N, 3)
        context = torch.cat([past, self.positions(at, "audio")], 1)              # (K, N+T, 3)
        rope = self.rope(context.flatten(0, 1), video.flatten(0, 1).repeat(m, 1))
        for block in self.blocks:
            if self.checkpointing:
                x = checkpoint(block, x, condition, rope, layout, use_reentrant=False)
            else:
                x = block(x, condition, rope, layout)                            # (B, L, width)
        x = rearrange(x[:, layout.context_length:], "b (m k n) w -> b m k n w", m=m, k=k)
        return self.to_velocity(x, noisy, sigma[..., None, None])

    # -- generation: chunk by chunk against the cache

    def read(self, caches: list[KVCache], x: Tensor, sigma: float, rope: tuple[Tensor, Tensor],
             write: bool) -> Tensor:
        """Run tokens (B, L, width) of one noise level through the trunk, against its layers' caches."""
        condition = F.silu(self.embed_sigma(torch.full((len(x), 1), sigma, device=x.device)))
        for block, cache in zip(self.blocks, caches):
            x = block(x, condition, rope, cache=cache, write=write)
        return x

    @torch.no_grad()
    def generate(self, portrait: Tensor, mel: Tensor, noise: Callable[[], Tensor],
                 steps: int = SAMPLING_STEPS, guidance: float = 1.0,
                 step: Callable[..., Tensor] = flow_step) -> Iterator[tuple[Tensor, Tensor]]:
        """Generate chunk by chunk: write the chunk before and the next sound into the cache, then denoise.

        Args:
            portrait: (B, 3, S, S) in [0, 1].
            mel: (B, K T, mel_channels), or a data.LogMel, which is made as it is read.
            noise: () -> (B, N, C), what the next chunk starts from.    steps: of the flow, per chunk.
            guidance: g in velocity = unheard + g (heard - unheard); 1 leaves it as learned and costs half.
            step: step(x, velocity, sigma, next_sigma) -> x at next_sigma; with GRPO a stochastic one.

        Yields: per chunk its latent (B, N, C) and its frames (B, T, 3, S, S) in [0, 1].
        """
        t, guided = self.config.chunk_frames, guidance != 1
        twice = (lambda x: torch.cat([x, x])) if guided else (lambda x: x)    # the second half hears nothing
        face = twice(self.embed_portrait(portrait))
        caches = [KVCache(self.config, len(face), face.device, face.dtype) for _ in self.blocks]
        chunks = torch.arange(mel.shape[1] // t, device=face.device)
        self.read(caches, face, 0.0, self.rope(self.positions(chunks[0], "portrait")), write=True)
        sigmas = sigma_schedule(steps)
        past, places = [], []                                    # of the chunk before; chunk 0 has none
        for chunk, at in enumerate(chunks):
            sound = self.embed_audio(mel[:, chunk * t:(chunk + 1) * t])          # (B, T, width)
            if guided:
                sound = torch.cat([sound, self.no_audio.expand_as(sound)])
            rope = self.rope(*places, self.positions(at, "audio"))
            self.read(caches, torch.cat([*past, sound], 1), 0.0, rope, write=True)
            x, places = noise(), [self.positions(at, "video")]
            rope = self.rope(*places)
            for sigma, next_sigma in zip(sigmas, sigmas[1:]):
                noisy = twice(x)                                                 # (B or 2 B, N, C)
                tokens = self.read(caches, self.video_in(noisy), sigma, rope, write=False)
                velocity = self.to_velocity(tokens, noisy, sigma)
                if guided:
                    heard, unheard = velocity.chunk(2)
                    velocity = unheard + guidance * (heard - unheard)
                x = step(x, velocity, sigma, next_sigma)
            past = [twice(self.video_in(x))]
            yield x, self.codec.decode(portrait, x[:, None])


# ---------------------------------------------------------------- saving, loading, presets

def save_generator(model: Generator, folder: Path, weights: dict[str, Tensor] | None = None, **more) -> None:
    """Write folder/model.safetensors and config.json.

    Args: weights: instead of the model's own (its moving average); more: other entries of config.json.
    """
    write_weights(folder, weights or model.state_dict(), {"model": asdict(model.config), **more})


def hub_folder(name: str | Path) -> Path:
    """Return a folder of weights; one that is not here, but is called owner/name, is downloaded from the hub.

    Raises: MediaError where there is neither such a folder nor such a repository.
    """
    if Path(name).is_dir():
        return Path(name)
    why = ""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) and not Path(name).parent.is_dir():
        from httpx import HTTPError                          # here: only a name needs them
        from huggingface_hub import snapshot_download
        try:
            return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, ValueError, HTTPError) as error:
            why = f", nor does the hub ({first_line(error)})"
    raise MediaError(name, f"holds no config.json{why}; give the folder of a run, or owner/name on the hub")


def load_generator(name: str | Path) -> Generator:
    """Load what `save_generator` wrote, from a folder or the hub. Raises: MediaError where it cannot be."""
    folder = hub_folder(name)
    with reading_weights(folder, "a checkpoint", "a run that train.py wrote"):
        model = Generator(Config(**json.loads((folder / "config.json").read_text())["model"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


PRESETS = {
    "tiny": Config(),
    "small": Config(size=128, grid=7, width=512, layers=8, heads=8, kv_heads=4, head_dim=64,
                    mlp_width=1408),
    "base": Config(size=256, grid=15, width=1024, layers=16, heads=16, kv_heads=8, head_dim=64,
                   mlp_width=2816),
}
