"""Training in several processes: what makes N processes of torchrun do together what one would do alone.

Each takes every N-th clip of a batch, or every N-th group of an update, and DDP averages their gradients: a
step is that of one process, up to rounding. So every process draws the random numbers of the whole batch, and
rewards are compared only when all are there. The first process alone prints, measures and writes.
"""

import atexit
import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

SIGMA_BINS = 5


def join_processes() -> None:
    """Meet the other processes, if torchrun started any, and let all but the first be quiet."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    atexit.register(dist.destroy_process_group)
    if rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shard() -> slice:
    """The rows of a batch, or the prompts of an update, that this process works on."""
    return slice(rank(), None, world())


def all_gather(value) -> list:
    """Collect a value (on the CPU) of every process, in their order."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_groups(values: Tensor, group: int) -> Tensor:
    """Collect the values (B, ...) of all processes' videos, in the order of their prompts before `shard`."""
    return rearrange(all_gather(values.cpu()), "w (p g) ... -> (p w g) ...", g=group)


def by_noise_level(error: Tensor, sigma: Tensor) -> list[float | None]:
    """Average errors of all processes over bins of sigma; None where a bin is empty."""
    pairs = all_gather((sigma.cpu(), error.detach().cpu()))
    sigma, error = (torch.cat(part).flatten() for part in zip(*pairs))
    bins = (sigma * SIGMA_BINS).long().clamp_max(SIGMA_BINS - 1)
    means = [error[bins == i].mean().item() for i in range(SIGMA_BINS)]
    return [None if math.isnan(mean) else round(mean, 5) for mean in means]


def summed_up(logs: list[tuple[dict, float]]) -> dict:
    """Average what grpo_loss logged over the micro-batches of all processes, each with its share."""
    mine = [({k: v.cpu() for k, v in log.items()}, share) for log, share in logs]
    logs = [entry for entries in all_gather(mine) for entry in entries]
    mean = {k: sum(log[k] * share for log, share in logs).tolist() for k in logs[0][0]}
    return mean | {"ratio_max": torch.stack([log["ratio_max"] for log, _ in logs]).amax(0).tolist()}


def ddp(model: torch.nn.Module, unused: bool = False) -> torch.nn.Module:
    """Give all processes the first one's weights and make them average their gradients from now on.

    Args: unused: whether some weights may have no gradient, as `no_audio` where every clip is heard.
    """
    if world() == 1:
        return model
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=unused)


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Let the first process go through a block before the others, which then find its cache."""
    if rank():
        dist.barrier()
    yield
    if world() > 1 and not rank():
        dist.barrier()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed. Tensors of the same sizes come again every step, and fetching their
    pages from the system anew took a quarter of the reward's CPU time."""
    with suppress(OSError, AttributeError):                          # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option in (-3, -1):                                      # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, 2 ** 31 - 1)
