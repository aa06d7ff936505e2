"""Pictures of a training: the curve, and the first ten images of captions."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.font_manager import findfont as find_font
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from upperson.data import Sample, gallery, load_image
from upperson.evaluate.results import Results

RIGHT, WRONG = "#1a8a3c", "#c8322b"
LOSS, MAIN, SECOND, QUIET = "#555555", "#1f5fa8", "#7fb0e0", "#888888"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 11,
    "savefig.dpi": 120,
}
# The first ten, in pixels: width and height of an image, the same with its frame, and the space between and around.
THUMBNAIL, FRAME = (80, 240), 4
CELL = (THUMBNAIL[0] + 2 * FRAME, THUMBNAIL[1] + 2 * FRAME)
GAP, MARGIN, TITLE, CAPTION, RANK, NAME = 14, 14, 50, 50, 28, 30


def curve(histories: Sequence[Sequence[dict[str, Any]]], split: str, results: Results) -> bytes:
    """A PNG of the training loss, and of R@1 and mAP on the watched split, by epoch. Stages are side by side.

    There is one history for each stage of the training, with one entry for each epoch: epoch, loss, R@1 and mAP. The
    first entry, of epoch 0, was measured before training and has no loss.
    """
    stages = results.stages or (results,)
    losses = ", then ".join(dict.fromkeys(stage.losses or "" for stage in stages))
    before = "zero-shot CLIP" if stages[0].start is None else "at the start"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        ended = 0
        for history, stage in zip(histories, stages, strict=True):
            epochs = history[1:]
            numbers = [ended + entry["epoch"] for entry in epochs]
            left.plot(numbers, [entry["loss"] for entry in epochs], color=LOSS, marker=".", clip_on=False)
            for key, colour in (("R@1", MAIN), ("mAP", SECOND)):
                label = key if not ended else None
                values = [entry[key] for entry in epochs]
                right.plot(numbers, values, color=colour, marker=".", label=label, clip_on=False)
                if not ended:
                    right.axhline(history[0][key], color=colour, linestyle=":", label=f"{key}, {before}")
            selected = stage.epoch or 0
            right.plot(
                ended + selected,
                history[selected]["R@1"],
                "o",
                color=MAIN,
                markersize=9,
                markerfacecolor="none",
                clip_on=False,
                label="selected" if not ended else None,
            )
            if ended:
                left.axvline(ended + 0.5, color=QUIET)
                right.axvline(ended + 0.5, color=QUIET)
            if len(stages) > 1:
                for axes in (left, right):
                    axes.annotate(
                        stage.title or stage.method,
                        (ended + 0.6, 0.02),
                        xycoords=("data", "axes fraction"),
                        fontsize=8,
                        color=QUIET,
                    )
            ended = numbers[-1]
        left.set(title=f"Training loss ({losses})", xlabel="epoch", ylabel="loss, mean over the epoch")
        right.set(
            title=f"Text → image retrieval, {results.evaluated_on}, {split} split", xlabel="epoch", ylabel="percent"
        )
        right.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
        for axes in (left, right):
            axes.margins(y=0.1)
            axes.set_ylim(bottom=0)
            axes.set_xlim(0.5, ended + 0.5)  # half an epoch before the first and after the last point
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        return as_png(figure)


def shown_queries(samples: Sequence[Sample], number: int) -> list[int]:
    """The queries of a picture, evenly spaced in the split, so that good results are not selected."""
    number = min(number, len(samples))
    return [(2 * i + 1) * len(samples) // (2 * number) for i in range(number)]


def top_ten(samples: Sequence[Sample], queries: Sequence[int], tops: Mapping[str, Sequence[Sequence[int]]]) -> bytes:
    """A PNG of the first ten images of captions, best first, with frames for right and wrong images.

    Args:
        samples: the split.
        queries: the captions to show, as indices into `samples`.
        tops: for each method and caption, indices of at most ten distinct images of `samples`. The rows of one caption
            are below each other, with the name of the method if there are several.
    """
    images, image_ids = gallery(samples)
    left = MARGIN + NAME * (len(tops) > 1)
    row_height = CELL[1] + RANK
    query_height = CAPTION + len(tops) * row_height + MARGIN
    canvas = Image.new("RGB", (left + 10 * (CELL[0] + GAP), TITLE + len(queries) * query_height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), "The ten images that each caption finds, best first", "black", _font(22, bold=True))
    for number, query in enumerate(queries):
        y = TITLE + number * query_height + CAPTION
        caption = _caption(samples[query].caption, _font(16), canvas.width - left - MARGIN)
        draw.text((left, y - 6), caption, "black", _font(16), anchor="ld")
        for method, rows in tops.items():
            if len(tops) > 1:
                name = Image.new("RGB", (CELL[1], NAME), "white")
                ImageDraw.Draw(name).text((CELL[1] / 2, 0), method, "black", _font(18, bold=True), anchor="ma")
                canvas.paste(name.transpose(Image.Transpose.ROTATE_90), (left - NAME, y))
            for column, index in enumerate(rows[number]):
                right = image_ids[index].item() == samples[query].person_id
                x, colour = left + column * (CELL[0] + GAP), RIGHT if right else WRONG
                thumbnail = ImageOps.pad(load_image(images[index]), THUMBNAIL, color="white")
                canvas.paste(ImageOps.expand(thumbnail, FRAME, colour), (x, y))
                rank = f"{column + 1}  {'✓' if right else '✗'}"
                draw.text((x + CELL[0] / 2, y + CELL[1] + 3), rank, colour, _font(18, bold=True), anchor="ma")
            y += row_height
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", compress_level=4)  # as small as level 6, in two thirds of the time
    return buffer.getvalue()


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings along; `size` in pixels."""
    return ImageFont.truetype(find_font(FontProperties(weight="bold" if bold else "normal")), size)


def _caption(caption: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    """The caption on at most two lines, none wider than `room` pixels: letters differ in width."""
    tried = (textwrap.wrap(f"“{caption}”", length, max_lines=2, placeholder=" …”") for length in range(300, 5, -5))
    return "\n".join(next(lines for lines in tried if max(map(font.getlength, lines)) <= room))


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
