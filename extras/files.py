"""Files and their errors: whatever goes wrong is one line that names the file, what is wrong and what to do.

Nothing is half-written: a file gets its name when it is whole. Weights are safetensors and a config.json.
"""

import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

VIDEOS = "mp4, mov, mkv, webm, avi, mpg, mpeg, m4v"  # by suffix
FULL = MemoryError, torch.OutOfMemoryError, BrokenExecutor     # the last: the system has ended a worker
BROKEN = OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError     # what bad weights raise


class MediaError(ValueError):
    """A file, flag or server that is of no use: `MediaError(it, "what is wrong; what to do")` is one line."""

    def __str__(self) -> str:
        return ": ".join(str(part) for part in self.args)


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def one_line(stopped: str, smaller: str) -> Iterator[None]:
    """Run a command that ends with one line and a failing exit where it cannot go on.

    Args:    stopped: what to say after Ctrl-C; smaller: what to do where memory does not suffice.
    """
    with suppress(AttributeError):                   # names and signs that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    if "TORCHELASTIC_RUN_ID" not in os.environ:      # SIGTERM tidies up as Ctrl-C does; torchrun ends its own
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    if cores() < torch.get_num_threads():            # PyTorch does not see the quota of a container
        torch.set_num_threads(cores())
    try:
        with fitting("this", smaller):
            yield
    except (MediaError, OSError) as error:
        said = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        rank = os.environ.get("RANK", "0")           # under torchrun
        sys.exit(f"error{f' of process {rank}' if rank != '0' else ''}: {' '.join(said.split())}")
    except KeyboardInterrupt:
        sys.exit(stopped)


@contextmanager
def fitting(what: str, remedy: str) -> Iterator[None]:
    """Turn a lack of memory, the machine's or the GPU's, into a MediaError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:     # on the CPU, PyTorch raises a plain RuntimeError
        full = isinstance(error, FULL) or "t allocate memory" in str(error)
        if not full:
            raise
        raise MediaError(what, f"does not fit into memory; {remedy}") from None


@contextmanager
def refusing(path: str | Path, errors: tuple, words: Callable[[Exception], str]) -> Iterator[None]:
    """Turn errors of these classes into a MediaError about `path`, in words made of the error."""
    try:
        yield
    except MediaError:                               # has its words
        raise
    except errors as error:
        raise MediaError(path, words(error)) from None


# ---- Writing ------------------------------------------------------------------------------------------

def check_new(path: Path) -> None:
    """Raise MediaError where a file to be made exists, or is in no folder that can be written."""
    if path.exists():
        raise MediaError(path, "exists; choose another --out, or delete it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise MediaError(path, "is in no folder that can be written; choose another --out")


def writing(path: Path) -> AbstractContextManager:
    """Turn whatever a full disk or a forbidden place raises into a MediaError."""
    def words(error: Exception) -> str:
        reason = getattr(error, "strerror", None) or f"is the disk full? {first_line(error)}"
        return f"cannot be written ({reason}); make room there or choose another place"
    return refusing(path, (OSError, RuntimeError, SafetensorError), words)     # PyTorch's are no OSErrors


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to, and move it to `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


# ---- Weights, ours and those of transformers ----------------------------------------------------------

def write_weights(folder: Path, weights: dict[str, Tensor], config: dict) -> None:
    """Write folder/model.safetensors and config.json."""
    with replacing(folder / "model.safetensors") as path:
        # Not save_file: it leaves a file that only its owner may read.
        path.write_bytes(save({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}))
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1))


def reading_weights(folder: Path, kind: str, source: str) -> AbstractContextManager:
    """Turn whatever a missing or broken folder of weights raises into a MediaError."""
    def words(error: Exception) -> str:
        if isinstance(error, OSError):
            missing = Path(error.filename or "model.safetensors").name
            return f"holds no {missing}; give the folder of {source}"
        return f"is not {kind} of this version ({first_line(error)}); train it again"
    return refusing(folder, BROKEN, words)


def loading(name: str | Path, what: str) -> AbstractContextManager:
    """Turn whatever transformers raises into a MediaError, and load without its chatter."""
    import transformers                              # here: it takes seconds, and few uses need it
    from huggingface_hub.errors import StrictDataclassError
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    remedy = "give a folder that transformers wrote, or a name on the hub"
    errors = *BROKEN, StrictDataclassError
    return refusing(name, errors, lambda error: f"cannot be loaded as {what} ({first_line(error)}); {remedy}")


def whole_model(kind, name: str | Path, **settings) -> torch.nn.Module:
    """Load a frozen model by a class of transformers, from a folder or, where `name` is none, from the hub.
    Raises: MediaError where weights are missing; else what transformers raises."""
    model, loaded = kind.from_pretrained(str(name), local_files_only=Path(name).is_dir(),
                                         output_loading_info=True, **settings)
    missing = sorted(set(loaded["missing_keys"]) - {"masked_spec_embed"})            # only training reads it
    if missing:
        raise MediaError(name, f"lacks the weights {', '.join(missing[:3])}; copy the folder again")
    return model.eval().requires_grad_(False)


# ---- Folders ------------------------------------------------------------------------------------------

def printable(name: str) -> str:
    """Spell a file's name in UTF-8, whatever its bytes are."""
    return os.fsencode(name).decode(errors="backslashreplace")


def find_videos(folder: Path) -> tuple[list[tuple[str, int, int]], dict[str, str]]:
    """List each video under a folder once, or the one that is named. Links are followed; what is hidden is
    left out, and so is the folder of a run, which holds generated videos.

    Returns: (name, size, time of change) of each, and what was left out with the reason.
    """
    found, left_out, seen = [], {}, set()

    def leave_out(error: OSError) -> None:
        name = printable(os.path.relpath(error.filename, folder))
        left_out[name] = f"cannot be read ({error.strerror.lower()})"

    def is_new(status: os.stat_result) -> bool:
        known = len(seen)
        seen.add((status.st_dev, status.st_ino))
        return len(seen) > known

    if folder.is_file():
        status = folder.stat()
        return [(folder.name, status.st_size, status.st_mtime_ns)], {}
    for here, folders, files in os.walk(folder, onerror=leave_out, followlinks=True):
        is_run = "log.jsonl" in files
        if is_run:
            left_out[printable(os.path.relpath(here, folder))] = "is the folder of a run; keep runs elsewhere"
        if is_run or not is_new(os.stat(here)):
            folders.clear()                          # os.walk goes no deeper here
            continue
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for path in (Path(here, name) for name in sorted(files) if name[0] != "."):
            if path.suffix[1:].lower() not in VIDEOS.split(", "):
                continue
            try:
                status = path.stat()
            except OSError as error:
                leave_out(error)
                continue
            if stat.S_ISREG(status.st_mode) and is_new(status):
                found.append((path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns))
    return sorted(found), left_out


def cores() -> int:
    """Count the cores that this process may use, by its affinity and the quota of its container."""
    count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):              # no such file, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = max(1, min(count, quota // period))
    return count


def begin_worker() -> None:
    """Set up a worker process: it has one thread, and ends when its parent does, even by kill -9."""
    torch.set_num_threads(1)
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
