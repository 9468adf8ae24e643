"""Find the head in a photo or a video, and frame it as the training clips do.

    python -m extras.face me.jpg                     # writes me.frame.png: what would be cut, to look at
    python -m extras.face me.mp4                     # a long video: what of it can be used, and why the rest cannot

The generator has seen heads of one size in one place of a square. `frame_of` finds that square in any picture: a
detector gives a box around the face, and the square is HEAD times as large, with its centre UP boxes above the box's.
Both constants were measured on training clips, so a photo and a video of the same person are cut alike. One square
serves a whole clip, so the cut adds no motion of its own. It lies inside the picture: near an edge it is moved, and
where the picture is too small it shrinks. `--crop x,y,size` replaces all this, `--crop none` takes the centre square.

`pieces` cuts a long video into stretches in which one person is seen and heard.

The detector is dlib's for frontal faces: histograms of oriented gradients under a linear filter, at every place and
scale. Its weights are part of the library, so nothing is downloaded.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data import ACTIVE_RMS, FFMPEG, FPS, SAMPLES_PER_FRAME, MediaError, first_line, load_speech, one_line

HEAD, UP = 1.85, 0.21            # side of the square, and how far its centre is above the box's, in sides of the box
WORK = 480                       # pixels of the shorter side in which faces of 80 pixels and more are found
SCALES = 5                       # sizes of box come in steps of 6/5: looking at 5 scales in between makes it 4%
ALIKE = 0.7                      # a second face that is this large beside the first is a rival, not a bystander
WANDER = 0.2                     # of the square's side, that a head may move from where it usually is
PAUSE = 2 * FPS                  # frames of silence that belong to speech
CUT = 10                         # of 100: ffmpeg's default score for a change of scene
LOOK = FPS // 2                  # frames from one look at a video to the next
REMEDY = "name the square with --crop x,y,size"

Box = tuple[float, float, float, float, float]       # x, y, width, height in pixels, score
Square = tuple[int, int, int]                        # x, y, side in pixels


# ---- One picture -----------------------------------------------------------------------------------------------------

def find_faces(picture: np.ndarray, work: int = WORK) -> list[Box]:
    """Find upright faces in a picture, the surest first.

    Args:    picture: (3, H, W) or (H, W, 3) uint8 RGB; work: pixels of the shorter side while looking.
    Returns: boxes (x, y, width, height, score) in pixels of the picture. Raises: MediaError without dlib.
    """
    try:
        import dlib                                  # here: it is optional
    except ImportError:
        raise MediaError("finding faces", "needs dlib; pip install dlib-bin, or use --crop none") from None
    picture = np.asarray(picture)
    if picture.shape[-1] != 3:
        picture = picture.transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(picture))
    scale = work / min(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.BICUBIC)
    found, scores, _ = dlib.get_frontal_face_detector().run(np.array(ImageOps.autocontrast(small, cutoff=1)), 0, 0.0)
    return [(box.left() / scale, box.top() / scale, box.width() / scale, box.height() / scale, score)
            for box, score in zip(found, scores)]


def verdict(boxes: Sequence[Box]) -> str:
    """Say what is wrong with the faces of one picture: "no face", "two faces", or nothing."""
    widths = sorted((box[2] for box in boxes), reverse=True)
    if not widths:
        return "no face"
    return "two faces" if len(widths) > 1 and widths[1] >= ALIKE * widths[0] else ""


# ---- One square for a clip -------------------------------------------------------------------------------------------

def square_of(found: Sequence[Sequence[Box]], width: int, height: int, name: str | Path = "picture") -> Square:
    """Frame the largest head by the boxes of several pictures of one clip: medians, so a single slip changes nothing.

    Returns: (x, y, side) inside width x height. Raises: MediaError unless most pictures show one head in one place.
    """
    verdicts = [verdict(boxes) for boxes in found]
    for wrong, remedy in (("no face", f"{REMEDY}, or take the centre with --crop none"),
                          ("two faces", f"two are alike in size; {REMEDY}")):
        if verdicts.count(wrong) >= max(1, len(found) / 2):
            raise MediaError(name, f"{wrong} found; {remedy}" if wrong == "no face" else f"{wrong} found: {remedy}")
    boxes = np.array([max(boxes, key=lambda box: box[2]) for boxes in found if boxes])         # (F, 5)
    size = np.median(boxes[:, 2])
    centres = boxes[:, :2] + boxes[:, 2:4] / 2 - [0, UP * size]                                # (F, 2)
    centre = np.median(centres, 0)
    if np.quantile(np.abs(centres - centre).max(1), 0.9) > WANDER * HEAD * size:
        raise MediaError(name, f"the head moves through the picture; use a part in which it stays, or {REMEDY}")
    side = round(min(HEAD * size, width, height))
    x, y = (round(min(max(0, at - side / 2), most - side)) for at, most in zip(centre, (width, height)))
    return x, y, side


def frame_of(pictures: Sequence[np.ndarray], name: str | Path = "picture") -> Square:
    """Find the square of a photo, [picture], or of some frames of a clip.

    Args:    pictures: each (3, H, W) or (H, W, 3) uint8 of one size; name: of the file, for messages.
    Returns: (x, y, side) in pixels. Raises: MediaError in one line that says what to do.
    """
    pictures = [np.asarray(picture) for picture in pictures]
    pictures = [picture if picture.shape[-1] == 3 else picture.transpose(1, 2, 0) for picture in pictures]
    height, width, _ = pictures[0].shape
    looks = list(pictures) * -(-SCALES // len(pictures))
    found = [find_faces(picture, scale(i)) for i, picture in enumerate(looks)]
    if not any(found):                               # a small face, or one that lies on its side
        found = [find_faces(picture, 2 * scale(i)) for i, picture in enumerate(looks)]
    if not any(found) and any(find_faces(np.rot90(pictures[0], turn)) for turn in (1, 2, 3)):
        raise MediaError(name, "the head is not upright; turn the picture")
    return square_of(found, width, height, name)


def scale(look: int) -> int:
    """The working size of the look-th look: between one step of the detector's sizes and the next."""
    return round(WORK * 1.2 ** (look % SCALES / SCALES))


def show(picture: np.ndarray, square: Square, side: int = 256) -> Image.Image:
    """Draw the picture with its square, and beside it what is cut: one glance tells whether it is right."""
    picture = np.asarray(picture)
    image = Image.fromarray(np.ascontiguousarray(picture if picture.shape[-1] == 3 else picture.transpose(1, 2, 0)))
    x, y, length = square
    cut = image.crop((x, y, x + length, y + length)).resize((side, side), Image.LANCZOS)
    ImageDraw.Draw(image).rectangle((x, y, x + length - 1, y + length - 1), outline="red", width=image.height // 90 + 1)
    image = image.resize((round(image.width * side / image.height), side), Image.LANCZOS)
    return Image.fromarray(np.concatenate([np.asarray(image), np.asarray(cut)], 1))


# ---- A long video ----------------------------------------------------------------------------------------------------

@dataclass
class Seen:
    """What a look at a video twice a second gives."""

    found: list[list[Box]]                           # faces in frame LOOK * i + LOOK // 2, in pixels of the video
    width: int                                       # upright, in square pixels
    height: int
    cuts: list[int]                                  # the first frames of scenes, the very first left out


def watch(path: str | Path) -> Seen:
    """Look for faces and changes of scene in a video, in the memory of a picture. Raises: MediaError."""
    with tempfile.TemporaryDirectory() as folder:
        graph = (f"[0:V:0]bwdif=mode=send_frame:deint=interlaced,fps={FPS}:start_time=0,"
                 "scale=w='round(iw*sar)':h=ih,setsar=1,split=3[first][all][some];"
                 f"[all]scale=320:-2,scdet=t={CUT},metadata=print:key=lavfi.scd.time:file=cuts[cuts];"
                 f"[some]select='eq(mod(n,{LOOK}),{LOOK // 2})',"
                 f"scale={WORK}:{WORK}:force_original_aspect_ratio=increase[looks]")
        command = [*FFMPEG, "error", "-i", f"file:{Path(path).absolute()}", "-filter_complex", graph,
                   "-map", "[first]", "-frames:v", "1", "first.png", "-map", "[cuts]", "-f", "null", "-",
                   "-map", "[looks]", "-fps_mode", "passthrough", "-q:v", "2", "%08d.jpg"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise MediaError(path, f"cannot be watched ({first_line(Exception(done.stderr))}); use a video")
        times = [line.split("=")[1] for line in Path(folder, "cuts").read_text().splitlines() if "scd.time" in line]
        width, height = Image.open(Path(folder, "first.png")).size
        found = []
        for i, file in enumerate(sorted(Path(folder).glob("*.jpg"))):
            picture = np.asarray(Image.open(file).convert("RGB"))
            up = height / len(picture)
            found.append([(*(up * value for value in box[:4]), box[4]) for box in find_faces(picture, scale(i))])
    return Seen(found, width, height, [round(float(time) * FPS) for time in times])


def frame_of_video(path: str | Path) -> Square:
    """Find the one square of a short clip on disk, as `frame_of` does. Raises: MediaError."""
    seen = watch(path)
    return square_of(seen.found, seen.width, seen.height, path)


def runs(values: Sequence) -> list[tuple[int, int]]:
    """Cut a sequence where its value changes: [start, stop) of each run."""
    edges = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return list(zip(edges, edges[1:]))


def speaks(path: str | Path) -> np.ndarray:
    """Say for each frame whether it belongs to speech: it is 26 dB below the usual or louder, or in a short pause."""
    sound = load_speech(path).numpy()
    whole = len(sound) // SAMPLES_PER_FRAME
    loud = sound[: whole * SAMPLES_PER_FRAME].reshape(whole, -1).std(1) > ACTIVE_RMS / 20
    for start, stop in runs(loud):
        if not loud[start] and stop - start <= PAUSE:
            loud[start:stop] = True
    return loud


def pieces(path: str | Path, seconds: float = 3.0) -> tuple[list[tuple[int, int, Square]], list[tuple[int, int, str]]]:
    """Cut a long video into stretches of `seconds` or more in which one person is seen and heard.

    A stretch ends where the scene changes, the face goes, a second one comes, or nobody speaks for two seconds.

    Returns: stretches (start, stop, square) and what is left out (start, stop, why), in frames of 40 ms, in order.
    """
    seen, heard = watch(path), speaks(path)
    frames = min(len(seen.found) * LOOK, len(heard))
    scene = np.searchsorted(seen.cuts, np.arange(frames), "right")                   # (frames,) its number
    looks = np.arange(len(seen.found)) * LOOK + LOOK // 2
    why = [""] * frames
    for start, stop in runs(scene):
        at = [i for i, look in enumerate(looks) if start <= look < stop]
        said = [verdict(seen.found[i]) for i in at]
        # One look that differs from both its neighbours is a slip.
        said = [said[i - 1] if 0 < i < len(said) - 1 and said[i - 1] == said[i + 1] else said[i] for i in range(len(said))]
        for frame in range(start, stop):
            nearest = min(range(len(at)), key=lambda i: abs(looks[at[i]] - frame)) if at else None
            face = "too short" if nearest is None else said[nearest]
            why[frame] = face or ("" if heard[frame] else "no speech")
    kept, left_out = [], []
    for start, stop in runs(list(zip(scene, why))):
        reason = why[start] or ("too short" if stop - start < seconds * FPS else "")
        try:
            if not reason:
                at = [i for i, look in enumerate(looks) if start <= look < stop]
                square = square_of([seen.found[i] for i in at], seen.width, seen.height, path)
                kept.append((start, stop, square))
        except MediaError as error:
            reason = error.args[-1]
        if reason:
            left_out.append((start, stop, reason))
    return kept, left_out


def told(kept: Sequence, left_out: Sequence) -> str:
    """Say in one line how much of a video is used, and why the rest is not."""
    reasons = {why: [stop - start for start, stop, w in left_out if w == why] for _, _, why in left_out}
    rest = ", ".join(f"{why} {sum(lengths) / FPS:.0f} s ({len(lengths)})" for why, lengths in sorted(reasons.items()))
    used = sum(stop - start for start, stop, _ in kept) / FPS
    return f"{used:.0f} s in {len(kept)} pieces" + (f"; left out: {rest}" if rest else "")


def main() -> None:
    p = argparse.ArgumentParser(description="show what would be cut of a photo or a video")
    p.add_argument("file", type=Path)
    file = p.parse_args().file
    with one_line("stopped", "use a smaller picture"):
        try:
            picture = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
        except (OSError, ValueError):                # no picture: a video, or ffmpeg says what it is
            kept, left_out = pieces(file)
            for start, stop, what in sorted([*kept, *left_out], key=lambda piece: piece[:2]):
                print(f"{start / FPS:8.2f} to {stop / FPS:8.2f} s: {what if isinstance(what, str) else f'crop {what}'}")
            print(told(kept, left_out))
            return
        square = frame_of([picture], file)
        show(picture, square).save(file.with_suffix(".frame.png"))
        print(f"--crop {','.join(map(str, square))}; see {file.with_suffix('.frame.png')}")


if __name__ == "__main__":
    main()
