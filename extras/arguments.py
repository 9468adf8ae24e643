"""Checks of arguments that several commands share: a wrong one ends with one clear line."""

import argparse

import torch

CROP_HELP = "face: a square around the head; none: the centre; or x,y,size in pixels (%(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of all flags."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def check_numbers(p: argparse.ArgumentParser, args: argparse.Namespace, **least: float) -> None:
    """End with one clear line where a number is below its least value, or absurdly large."""
    for name, low in least.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value < 1e10:
            bound = "below 1e10" if value > low else f"at least {low}"
            p.error(f"--{name.replace('_', '-')} must be {bound}, got {value}")


def crop_argument(text: str) -> tuple[int, int, int] | str | None:
    """Read 'face', 'none', or 'x,y,size' into three whole numbers."""
    if text in ("face", "none"):
        return None if text == "none" else text
    try:
        x, y, size = (int(part) for part in text.split(","))
        if min(x, y) < 0 or size < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError("want face, none, or x,y,size in pixels, such as 40,0,320, "
                                         f"got {text!r}") from None
    return x, y, size


def track_argument(text: str) -> tuple[int, int]:
    """Read 'TRACK' or 'TRACK:CHANNEL' into two numbers from 1, the second 0 where it is left open."""
    track, _, channel = text.partition(":")
    if not (track.isdecimal() and int(track) and (channel or "1").isdecimal() and int(channel or "1")):
        raise argparse.ArgumentTypeError(f"want TRACK or TRACK:CHANNEL, such as 2 or 2:1, got {text!r}")
    return int(track), int(channel or 0)


def device_argument(text: str | None = None) -> str:
    """Check the name of a device by using it; without a name, choose CUDA where it is present."""
    text = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used ({str(error).splitlines()[0]})") from None
    return text
