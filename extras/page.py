"""A page in Markdown and in HTML at once: a list of parts, each of which is written both ways.

The HTML is one file to send: pictures and videos are embedded. Tables scroll sideways inside their own box.
"""

import base64
import io
import math
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from data import write_video
from extras.files import replacing

LARGE = 1_000_000                                    # bytes of a picture; above, it is embedded as a JPEG

STYLE = """
body { margin: auto; padding: 0 1em 4em; max-width: 76rem; color: #222; font: 1em/1.5 system-ui, sans-serif }
h1, h2 { line-height: 1.2; margin: 2.5rem 0 0.5rem; overflow-wrap: break-word }
p { max-width: 44rem }
img { max-width: 100%; height: auto }
video { display: block; width: 100% }
pre, .wide { overflow-x: auto }
pre { padding: 0.75rem; background: #f4f4f4; font-size: 0.8rem; line-height: 1.4 }
.videos { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)) }
table { border-spacing: 0; font-size: 0.85rem; font-variant-numeric: tabular-nums; margin: 0.5rem 0 }
th, td { padding: 0.25rem 0.75rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom }
thead th { max-width: 9em }
tbody th, td { white-space: nowrap }
th:first-child { position: sticky; left: 0; background: white; text-align: left; font-weight: 400 }
th.title { position: static; padding-top: 1rem; color: #666 }
th.title span { position: sticky; left: 0.75rem }
"""
ONE_SOUNDS = "if (!muted) for (const v of document.querySelectorAll('video')) v.muted ||= v != this"


class Part(NamedTuple):
    markdown: str
    html: str


def heading(words: str, level: int = 2) -> Part:
    return Part(f"{'#' * level} {words}\n", f"<h{level}>{escape(words)}</h{level}>")


def text(words: str) -> Part:
    return Part(f"{words}\n", f"<p>{escape(words)}</p>")


def code(words: str) -> Part:
    return Part(f"```\n{words}\n```\n", f"<pre>{escape(words)}</pre>")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Part:
    """A row of a single cell is a title of the rows below it."""
    def html_row(row: Sequence[str], tag: str) -> str:
        if len(row) == 1:
            return f'<tr><th class="title" colspan="{len(head)}"><span>{escape(row[0])}</span></th></tr>\n'
        cells = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row[1:])
        return f"<tr><th>{escape(row[0])}</th>{cells}</tr>\n"

    wide = [row if len(row) > 1 else [f"*{row[0]}*", *[""] * (len(head) - 1)] for row in rows]
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *wide))
    html = f"<thead>{html_row(head, 'th')}</thead>\n<tbody>" + "".join(html_row(row, "td") for row in rows)
    return Part(markdown, f'<div class="wide"><table>\n{html}</tbody></table></div>')


def picture(path: Path, words: str) -> Part:
    kind, data = "png", path.read_bytes()
    if len(data) > LARGE:
        kind, file, image = "jpeg", io.BytesIO(), Image.open(path).convert("RGB")
        image.thumbnail((1600, 8000))
        image.save(file, kind, quality=90)
        data = file.getvalue()
    source = data_uri(f"image/{kind}", data)
    return Part(f"![{words}]({path.name})\n", f'<img alt="{escape(words)}" src="{source}">')


def curves(path: Path, words: str, panels: dict[str, list[tuple]], unit: str, scale: str = "linear") -> Part:
    """Draw title -> curves (x, y, deviation, label), three panels a row; the deviation, or 0, is shaded."""
    from matplotlib.figure import Figure             # here: it takes a second, and only a page draws
    columns, rows = min(len(panels), 3), math.ceil(len(panels) / 3)
    figure = Figure(figsize=(max(6, 3 * columns), max(3, 2.2 * rows)), layout="constrained")
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel=unit, yscale=scale)
        for x, y, deviation, label in lines:
            x, y = np.array(x), np.array(y, float)
            axes.plot(x, y, ".-" if len(x) < 20 else "-", label=label)
            if np.any(deviation):
                axes.fill_between(x, y - deviation, y + deviation, alpha=0.2)
        if place == 1 and len(lines) > 1:            # the others have the same colours
            axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return picture(path, words)


def videos(paths: Sequence[Path], width: str) -> Part:
    """Videos that play together and silently; turning on the sound of one turns off the others'."""
    flags = f'autoplay muted loop playsinline controls onvolumechange="{ONE_SOUNDS}"'
    sources = [data_uri("video/mp4", path.read_bytes()) for path in paths]
    boxes = [f'<div class="wide"><video style="min-width: {width}" {flags} src="{source}"></video></div>\n'
             for source in sources]
    return Part(", ".join(f"[{path.name}]({path.name})" for path in paths) + "\n",
                f'<div class="videos">\n{"".join(boxes)}</div>')


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video_uri(frames: Tensor, audio: Tensor) -> str:
    """Write a video (F, 3, H, W) uint8 with its sound (T,) as an mp4 in a data URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        write_video(path, frames, audio)
        return data_uri("video/mp4", path.read_bytes())


def write_page(path: Path, title: str, parts: Sequence[Part]) -> None:
    """Write path.md and path.html."""
    markdown = "\n".join(part.markdown for part in parts)
    html = "\n".join([
        '<!DOCTYPE html>', '<html lang="en">', '<meta charset="utf-8">', f"<title>{escape(title)}</title>",
        '<meta name="viewport" content="width=device-width, initial-scale=1">', f"<style>{STYLE}</style>",
        *(part.html for part in parts), "</html>\n"])
    for suffix, written in ((".md", markdown), (".html", html)):
        with replacing(path.with_suffix(suffix)) as temporary:
            temporary.write_text(written, "utf-8", "backslashreplace")     # a name may be no UTF-8
