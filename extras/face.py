"""Find the head in a photo or a video, and frame it as the training clips do.

    python -m extras.face me.jpg         # writes me.frame.png: what would be cut, to look at
    python -m extras.face me.mp4         # a long video: what of it can be used, and why the rest cannot

The generator has seen heads of one size in one place of a square. `frame_of` finds it in any picture.
A detector gives a box around the face; the square is HEAD times as large, its centre UP boxes above its own.
Both constants were measured on training clips, so a photo and a video of one person are cut alike. One square
serves a whole clip, so the cut adds no motion. It lies inside the picture: near an edge it is moved, and
where the picture is too small it shrinks. `--crop x,y,size` replaces all this; `--crop none` takes the
centre square.

`pieces` cuts a long video into stretches in which one person is seen and heard.

The detector is dlib's for frontal faces: histograms of oriented gradients under a linear filter, at every
place and scale. Its weights are part of the library, so nothing is downloaded.
"""

import argparse
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data import load_speech
from extras.files import MediaError, first_line, one_line
from extras.media import ACTIVE_RMS, FFMPEG, FPS, SAMPLES_PER_FRAME

HEAD, UP = 1.85, 0.21            # the square's side, and its centre's height above the box's, in boxes
WORK = 480                       # pixels of the shorter side in which faces of 80 pixels and more are found
SCALES = 5                       # boxes come in sizes 6/5 apart; looks at 5 scales in between make it 4%
ALIKE = 0.7                      # a second face of this share of the first one's size is a rival
WANDER = 0.2                     # of the square's side, that a head may move from where it usually is
PAUSE = 2 * FPS                  # frames of silence that belong to speech
CUT = 10                         # of 100: ffmpeg's default score for a change of scene
LOOK = FPS // 2                  # frames from one look at a video to the next
REMEDY = "name the square with --crop x,y,size"

Box = tuple[float, float, float, float, float]       # x, y, width, height in pixels, score
Square = tuple[int, int, int]                        # x, y, side in pixels


# ---- One picture -------------------------------------------------------------------------------------------

@lru_cache
def detector():
    """Load dlib's detector. Raises: MediaError where dlib is not installed, for it is optional."""
    try:
        import dlib
    except ImportError:
        raise MediaError("finding faces", "needs dlib; pip install dlib-bin, or use --crop none") from None
    return dlib.get_frontal_face_detector()


def find_faces(picture: np.ndarray, work: int = WORK) -> list[Box]:
    """Find upright faces in a picture, the surest first.

    Args:    picture: (3, H, W) or (H, W, 3) uint8 RGB; work: pixels of the shorter side while looking.
    Returns: boxes (x, y, width, height, score) in pixels of the picture. Raises: MediaError without dlib.
    """
    image = as_image(picture)
    up = work / min(image.size)
    image = image.resize([max(1, round(side * up)) for side in image.size], Image.BICUBIC)
    found, scores, _ = detector().run(np.array(image), 0, 0.0)
    return [(box.left() / up, box.top() / up, box.width() / up, box.height() / up, score)
            for box, score in zip(found, scores)]


def as_image(picture: np.ndarray) -> Image.Image:
    """Turn (3, H, W) or (H, W, 3) uint8 into Pillow's kind of picture."""
    picture = np.asarray(picture)
    picture = picture if picture.shape[-1] == 3 else picture.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(picture))


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

    Returns: (x, y, side) inside width x height.
    Raises: MediaError unless most pictures show one head in one place.
    """
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


def frame_of(pictures: Sequence[np.ndarray], name: str | Path = "picture") -> Square:
    """Find the square of a photo, [picture], or of some frames of a clip.

    Args:    pictures: each (3, H, W) or (H, W, 3) uint8 of one size; name: of the file, for messages.
    Returns: (x, y, side) in pixels. Raises: MediaError in one line that says what to do.
    """
    pictures = [np.asarray(as_image(picture)) for picture in pictures]
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
    image = as_image(picture)
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
            raise MediaError(path, f"cannot be watched ({first_line(done.stderr)}); use a video")
        lines = Path(folder, "cuts").read_text().splitlines()
        times = [float(line.split("=")[1]) for line in lines if "scd.time" in line]
        width, height = Image.open(Path(folder, "first.png")).size
        found = []
        for i, file in enumerate(sorted(Path(folder).glob("*.jpg"))):
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
    sound = load_speech(path).numpy()
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
        for frame in range(start, stop):
            face = said[min(max(first, frame // LOOK), end - 1) - first] if said else "too short"
            why.append(face or ("" if heard[frame] else "no speech"))
    return list(zip(scene, why))


def pieces(path: str | Path,
           seconds: float = 3.0) -> tuple[list[tuple[int, int, Square]], list[tuple[int, int, str]]]:
    """Cut a long video into stretches of `seconds` or more in which one person is seen and heard.

    A stretch ends where the scene changes, the face goes, a second comes, or nobody speaks for two seconds.

    Returns: stretches (start, stop, square), and what is left out (start, stop, why), in frames of 40 ms.
    """
    seen = watch(path)
    marked = marks(seen, speaks(path))
    kept, left_out = [], []
    for start, stop in runs(marked):
        _, why = marked[start]
        if not why and stop - start < seconds * FPS:
            why = "too short"
        if not why:
            looks = seen.found[start // LOOK : stop // LOOK]
            try:
                kept.append((start, stop, square_of(looks, seen.width, seen.height, path)))
            except MediaError:
                why = "the head moves"
        if why:
            left_out.append((start, stop, why))
    return kept, left_out


def told(kept: Sequence, left_out: Sequence) -> str:
    """Say in one line how much of a video is used, and why the rest is not."""
    seconds, times = Counter(), Counter()
    for start, stop, why in left_out:
        seconds[why] += (stop - start) / FPS
        times[why] += 1
    rest = ", ".join(f"{why} {seconds[why]:.0f} s ({times[why]})" for why in sorted(seconds))
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
                what = what if isinstance(what, str) else f"--crop {','.join(map(str, what))}"
                print(f"{start / FPS:8.2f} to {stop / FPS:8.2f} s: {what}")
            print(told(kept, left_out))
            return
        square = frame_of([picture], file)
        show(picture, square).save(file.with_suffix(".frame.png"))
        print(f"--crop {','.join(map(str, square))}; see {file.with_suffix('.frame.png')}")


if __name__ == "__main__":
    main()
