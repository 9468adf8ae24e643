"""Find the head in a photo or a video, and frame it as the training clips do.

    python -m extras.face me.jpg         # writes me.jpg.frame.png: what would be cut
    python -m extras.face me.mp4         # a long video: what of it can be used, and why the rest cannot

A detector gives a box around the face; the square is HEAD times as large, its centre UP boxes above its own.
Both constants were measured on training clips, so a photo and a video are cut alike. One square serves a
whole clip, so the cut adds no motion. Near an edge it is moved; where the picture is too small it shrinks.

The detector is dlib's for frontal faces: histograms of oriented gradients under a linear filter, at every
place and scale. Its weights are part of the library, so nothing is downloaded.
"""

import argparse
import io
import json
import mimetypes
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data import MIN_FRAMES, STOPPED, Crop, read_speech
from extras.files import MediaError, one_line, printable, replacing
from extras.media import (ACTIVE_RMS, FFMPEG, FPS, PLAIN_FRAMES, SAMPLES_PER_FRAME, read_picture,
                          run_ffmpeg)

HEAD, UP = 1.85, 0.21            # the square's side, and its centre's height above the box's, in boxes
WORK = 480                       # pixels of the shorter side in which faces of 80 pixels and more are found
SCALES = 5                       # boxes come in sizes 6/5 apart; looks at 5 scales in between make it 4%
ALIKE = 0.7                      # a second face of this share of the first one's size is a rival
WANDER = 0.2                     # of the square's side, that a head may move from where it usually is
JUMP = 0.35                      # of a box: more from one look to the next is another scene
FADE = 2                         # looks in which a face may be half there, before and after those without
PAUSE = 2 * FPS                  # frames of silence that belong to speech
STRIP = 4                        # a picture of more than these sides is none of a head
CUT = 10                         # of 100: ffmpeg's default score for a change of scene
LOOK = FPS // 2                  # frames from one look at a video to the next
REMEDY = "name the square with --crop x,y,size"

Box = tuple[float, float, float, float, float]       # x, y, width, height in pixels, score
Square = tuple[int, int, int]                        # x, y, side in pixels


# ---- One picture -------------------------------------------------------------------------------------------

def detector():
    """Load dlib's detector, one for each thread. Raises: MediaError where dlib, which is optional, is not."""
    return _detector(threading.get_ident())


@lru_cache
def _detector(thread: int):
    try:
        import dlib
    except ImportError:
        raise MediaError("--crop face", "needs dlib: pip install dlib-bin; or take the centre square with "
                                        "--crop none") from None
    return dlib.get_frontal_face_detector()


def find_faces(picture: np.ndarray, work: int = WORK) -> list[Box]:
    """Find upright faces in a picture (H, W, 3) uint8, seen with `work` pixels of the shorter side. The
    surest comes first. Raises: MediaError without dlib."""
    image = Image.fromarray(picture)
    up = work / min(image.size)
    image = image.resize([max(1, round(side * up)) for side in image.size], Image.BICUBIC)
    found, scores, _ = detector().run(np.array(image), 0, 0.0)
    return [(box.left() / up, box.top() / up, box.width() / up, box.height() / up, score)
            for box, score in zip(found, scores)]


def verdict(boxes: Sequence[Box]) -> str:
    """Say what is wrong with the faces of one picture: "no face", "two faces", or nothing."""
    widths = sorted((box[2] for box in boxes), reverse=True)
    if not widths:
        return "no face"
    return "two faces" if len(widths) > 1 and widths[1] >= ALIKE * widths[0] else ""


# ---- One square for a clip ---------------------------------------------------------------------------------

def square_of(found: Sequence[Sequence[Box]], width: int, height: int,
              name: str | Path = "picture") -> Square:
    """Frame the largest head by the boxes of several pictures of one clip. Medians: one slip changes nothing.
    Raises: MediaError unless most pictures show one head in one place."""
    refusals = {"no face": f"shows no face; {REMEDY}, or take the centre with --crop none",
                "two faces": f"shows two faces alike in size; {REMEDY}"}
    verdicts = [verdict(boxes) for boxes in found]
    for wrong, words in refusals.items():
        if verdicts.count(wrong) >= max(1, len(found) / 2):
            raise MediaError(name, words)
    boxes = np.array([max(boxes, key=lambda box: box[2]) for boxes in found if boxes])         # (F, 5)
    size = np.median(boxes[:, 2])
    centres = boxes[:, :2] + boxes[:, 2:4] / 2 - [0, UP * size]                                # (F, 2)
    centre = np.median(centres, 0)
    if np.quantile(np.abs(centres - centre).max(1), 0.8) > WANDER * HEAD * size:
        raise MediaError(name, f"the head moves through the picture; take a part where it stays, or {REMEDY}")
    side = round(min(HEAD * size, width, height))
    x, y = (round(min(max(0, at - side / 2), most - side)) for at, most in zip(centre, (width, height)))
    return x, y, side


def frame_of(picture: np.ndarray, name: str | Path = "picture") -> Square:
    """Find the square of a photo (H, W, 3). Raises: MediaError."""
    height, width, _ = picture.shape
    if max(width, height) > STRIP * min(width, height):          # enlarged for a look, it would take minutes
        raise MediaError(name, f"is a strip of {width}x{height} pixels; {REMEDY}")
    found = [find_faces(picture, scale(i)) for i in range(SCALES)]
    if not any(found):                               # a small face, or one that lies on its side
        found = [find_faces(picture, 2 * scale(i)) for i in range(SCALES)]
    if not any(found) and any(find_faces(np.rot90(picture, turn)) for turn in (1, 2, 3)):
        raise MediaError(name, "the head is not upright; turn the picture")
    return square_of(found, width, height, name)


def photo_square(path: str | Path, crop: Crop | tuple[()], run: Path) -> Square | None:
    """Find the square of a photo by `crop`; where that is (), as the clips of the run were cut. A square that
    was named for clips says nothing of a photo: its head is looked for, if dlib is there."""
    if crop == ():
        crop = json.loads((run / "config.json").read_text()).get("training", {}).get("crop")
        if crop not in (None, "face"):
            crop = "face" if find_spec("dlib") else None
    if crop != "face":
        return crop
    image, (width, height) = read_picture(path, WORK)            # large ones are scaled down
    across = min(width / image.width, height / image.height)
    return tuple(int(across * value) for value in frame_of(np.asarray(image), path))


def scale(look: int) -> int:
    """The working size of the look-th look: between one step of the detector's sizes and the next."""
    return round(WORK * 1.2 ** (look % SCALES / SCALES))


def show(picture: np.ndarray, square: Square, side: int = 256) -> Image.Image:
    """Draw the picture with its square, and beside it what is cut: one glance tells whether it is right."""
    image = Image.fromarray(picture)
    x, y, length = square
    cut = image.crop((x, y, x + length, y + length)).resize((side, side), Image.LANCZOS)
    edge = x, y, x + length - 1, y + length - 1
    ImageDraw.Draw(image).rectangle(edge, outline="red", width=image.height // 90 + 1)
    image = image.resize((round(image.width * side / image.height), side), Image.LANCZOS)
    return Image.fromarray(np.concatenate([np.asarray(image), np.asarray(cut)], 1))


# ---- A long video ------------------------------------------------------------------------------------------

@dataclass
class Seen:
    """What a look at a video twice a second gives."""

    found: list[list[Box]]                           # faces in frame LOOK * i + LOOK // 2
    width: int                                       # upright, in square pixels
    height: int
    cuts: list[int]                                  # the first frames of scenes, the very first left out


def watch(path: str | Path) -> Seen:
    """Look for faces and changes of scene in a video, in the memory of a picture. Raises: MediaError."""
    with tempfile.TemporaryDirectory() as folder:
        graph = (f"[0:V:0]{PLAIN_FRAMES},setsar=1,split=3[first][all][some];"
                 f"[all]scale=320:-2,scdet=t={CUT},metadata=print:key=lavfi.scd.time:file=cuts[cuts];"
                 f"[some]select='eq(mod(n,{LOOK}),{LOOK // 2})',"
                 f"scale={WORK}:{WORK}:force_original_aspect_ratio=increase[looks]")
        run_ffmpeg(Path(path), "-filter_complex", graph, "-map", "[first]", "-frames:v", "1", "first.png",
                   "-map", "[cuts]", "-f", "null", "-",
                   "-map", "[looks]", "-fps_mode", "passthrough", "-q:v", "2", "%08d.jpg", folder=folder)
        lines = Path(folder, "cuts").read_text().splitlines()
        times = [float(line.split("=")[1]) for line in lines if "scd.time" in line]
        width, height = Image.open(Path(folder, "first.png")).size
        found = []
        for i, file in enumerate(sorted(Path(folder).glob("*.jpg"))):
            if STOPPED.is_set():
                raise MediaError(path, "was not looked through to its end")
            picture = np.asarray(Image.open(file).convert("RGB"))
            up = np.array([height / len(picture)] * 4 + [1])
            found.append([tuple(up * box) for box in find_faces(picture, scale(i))])
    return Seen(found, width, height, [round(time * FPS) for time in times])


def frame_of_video(path: str | Path) -> Square:
    """Find the one square of a short clip on disk, as `frame_of` does. Raises: MediaError."""
    seen = watch(path)
    return square_of(seen.found, seen.width, seen.height, path)


def runs(values: Sequence) -> list[tuple[int, int]]:
    """Cut a sequence where its value changes: [start, stop) of each run."""
    edges = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return list(zip(edges, edges[1:]))


def speaks(path: str | Path) -> np.ndarray:
    """Say for each frame whether it is speech: above -26 dB of the usual loudness, or in a short pause."""
    sound = read_speech(path)[0].numpy()
    whole = len(sound) // SAMPLES_PER_FRAME
    loud = sound[: whole * SAMPLES_PER_FRAME].reshape(whole, -1).std(1) > ACTIVE_RMS / 20
    for start, stop in runs(loud):
        if not loud[start] and stop - start <= PAUSE:
            loud[start:stop] = True
    return loud


def marks(seen: Seen, heard: np.ndarray) -> list[tuple[int, str]]:
    """Say of each frame which scene it belongs to, and why it cannot be used, if so."""
    frames = min(len(seen.found) * LOOK + LOOK // 2, len(heard))    # looks stand in the middle
    scene = np.searchsorted(seen.cuts, np.arange(frames), "right").tolist()
    why = []
    for start, stop in runs(scene):
        first, end = -(-(start - LOOK // 2) // LOOK), -(-(stop - LOOK // 2) // LOOK)
        said = [verdict(boxes) for boxes in seen.found[first:end]]
        for i in range(1, len(said) - 1):            # a look that differs from both its neighbours is a slip
            if said[i - 1] == said[i + 1]:
                said[i] = said[i - 1]
        said = [next(filter(None, said[max(0, i - FADE) : i + FADE + 1]), "") for i in range(len(said))]
        for frame in range(start, stop):
            face = said[min(max(first, frame // LOOK), end - 1) - first] if said else "too short"
            why.append(face or ("" if heard[frame] else "no speech"))
        last, was = None, None
        for i, boxes in enumerate(seen.found[first:end], first):
            if not boxes:
                continue
            x, y, size, *_ = max(boxes, key=lambda box: box[2])
            head = np.array([x + size / 2, y + size / 2, size])
            if last is not None and (abs(head - was) > JUMP * was[2]).any():
                span = slice(max(start, last * LOOK - LOOK // 2), min(stop, (i + 1) * LOOK + LOOK // 2))
                why[span] = [reason or "head jumps" for reason in why[span]]
            last, was = i, head
    return list(zip(scene, why))


def steady(seen: Seen, start: int, stop: int, least: float, path: str | Path) -> list[tuple]:
    """Frame a stretch by one square; where the head moves too far for that, each half by its own, and so on.
    Returns: (start, stop, square, or why not)."""
    try:
        looks = seen.found[start // LOOK : -(-stop // LOOK)]
        return [(start, stop, square_of(looks, seen.width, seen.height, path))]
    except MediaError:
        half = (start + stop) // 2
        if half - start < least:
            return [(start, stop, "the head moves")]
        return [*steady(seen, start, half, least, path), *steady(seen, half, stop, least, path)]


def pieces(path: str | Path) -> tuple[list[tuple[int, int, Square]], list[tuple[int, int, str]]]:
    """Cut a long video into stretches of a second or more in which one person is seen and heard.
    Returns: stretches (start, stop, square), and what is left out (start, stop, why), in frames of 40 ms."""
    heard = speaks(path)                             # first: what has no sound need not be watched
    if len(heard) < MIN_FRAMES:
        raise MediaError(path, f"has {len(heard)} frames with sound; a clip needs {MIN_FRAMES}")
    seen = watch(path)
    marked = marks(seen, heard)
    kept, left_out = [], []
    for start, stop in runs(marked):
        _, why = marked[start]
        if not why and stop - start < MIN_FRAMES:
            why = "too short"
        parts = [(start, stop, why)] if why else steady(seen, start, stop, MIN_FRAMES, path)
        for part in parts:
            (left_out if isinstance(part[2], str) else kept).append(part)
    if (seen_until := len(seen.found) * LOOK) > len(heard) + LOOK:
        left_out.append((len(heard), seen_until, "no sound"))
    return kept, left_out


def cut(path: Path, skipped: dict[str, str],
        shown: list[tuple]) -> tuple[dict[int, Square], list[tuple[int, int]]]:
    """Cut a video for training: squares by the frame from which they count, and the stretches to use. Adds
    what is left out to `skipped`, and (path, second, square) to look at to `shown`. Raises: MediaError."""
    kept, left_out = pieces(path)
    if not kept:
        raise MediaError(path, nothing(left_out))
    if left_out:
        skipped[f"parts of {printable(path.name)}"] = reasons(left_out)
    shown += [(path, (start + stop) / 2 / FPS, square) for start, stop, square in kept]
    return {start: square for start, _, square in kept}, [piece[:2] for piece in kept]


def nothing(left_out: Sequence) -> str:
    """Say why a video shows nothing to train on, and what to do."""
    return (f"shows nothing to train on ({reasons(left_out)}); turn it if heads lie on their sides, "
            f"{REMEDY}, or take the centre with --crop none")


def sheet(shown: Sequence[tuple], most: int = 12) -> Image.Image:
    """Draw some of the stretches that are cut, one below the other."""
    some = [sorted(shown)[i] for i in np.linspace(0, len(shown) - 1, min(most, len(shown))).astype(int)]
    rows = [show(frame_at(path, second), square) for path, second, square in some]
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)))
    for i, row in enumerate(rows):
        page.paste(row, (0, i * row.height))
    return page


def frame_at(path: Path, second: float) -> np.ndarray:
    """Read one frame (H, W, 3) of a video, upright, with square pixels: the next one from `second` on, or one
    from before where the last is held for long."""
    for seek in "-accurate_seek", "-noaccurate_seek":
        command = [*FFMPEG, "error", seek, "-ss", str(second), "-i", f"file:{path}", "-frames:v", "1",
                   "-fps_mode", "passthrough", "-vf", "scale=w='round(iw*sar)':h=ih",
                   "-f", "image2pipe", "-c:v", "png", "-"]
        picture = subprocess.run(command, capture_output=True).stdout
        if picture:
            break
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def reasons(left_out: Sequence) -> str:
    """Say why parts of a video are left out: seconds by reason, and when the first three of them begin."""
    seconds, begins = Counter(), {}
    for start, stop, why in left_out:
        seconds[why] += (stop - start) / FPS
        begins.setdefault(why, []).append(f"{start // FPS // 60}:{start // FPS % 60:02}")
    return ", ".join(f"{why} {seconds[why]:.0f} s (at {', '.join(begins[why][:3])}"
                     f"{', ...' if begins[why][3:] else ''})" for why in sorted(seconds))


def told(kept: Sequence, left_out: Sequence) -> str:
    """Say in one line how much of a video is used, and why the rest is not."""
    used = sum(stop - start for start, stop, _ in kept) / FPS
    return f"{used:.0f} s in {len(kept)} pieces" + (f"; left out: {reasons(left_out)}" if left_out else "")


def main() -> None:
    p = argparse.ArgumentParser(description="show what would be cut of a photo or a video")
    p.add_argument("file", type=Path)
    file = p.parse_args().file
    with one_line("stopped", "use a smaller picture"):
        try:
            picture = np.asarray(read_picture(file, WORK)[0])
        except MediaError:                           # a damaged picture, or a video of whatever suffix
            if (mimetypes.guess_type(file.name, strict=False)[0] or "").startswith("image/"):
                raise
            kept, left_out = pieces(file)
            if not kept:
                raise MediaError(file, nothing(left_out)) from None
            for start, stop, what in sorted(kept + left_out):
                what = what if isinstance(what, str) else f"--crop {','.join(map(str, what))}"
                print(f"{start / FPS:8.2f} to {stop / FPS:8.2f} s: {what}")
            print(told(kept, left_out))
            return
        framed = file.with_name(f"{file.name}.frame.png")
        with replacing(framed) as temporary:
            show(picture, frame_of(picture, file)).save(temporary, "PNG")
        square = ",".join(map(str, photo_square(file, "face", Path())))
        print(f"--crop {square}; see {framed}")


if __name__ == "__main__":
    main()
