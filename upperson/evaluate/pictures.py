"""Pictures of a training: the curve, and the first ten images of captions."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import ImageOps

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
THUMBNAIL = (64, 192)  # width and height of every image in the picture, in pixels
CAPTION_WIDTH = 150  # characters


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
        tops: for each method and caption, indices of the distinct images of `samples`. The rows of one caption are
            below each other, with the name of the method if there are several.
    """
    images, image_ids = gallery(samples)
    columns = max(len(top) for rows in tops.values() for top in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 0.4 + 2.75 * len(queries) * len(tops)))
        grid = figure.add_gridspec(
            len(queries),
            1,
            left=0.01 if len(tops) == 1 else 0.04,
            right=0.99,
            bottom=0.25 / figure.get_figheight(),
            top=1 - 0.85 / figure.get_figheight(),
            hspace=0.35 / len(tops),
        )
        figure.suptitle(
            "The ten images that each caption finds, best first",
            x=0.01,
            ha="left",
            fontsize=13,
            y=1 - 0.12 / figure.get_figheight(),
            va="top",
            fontweight="bold",
        )
        for number, query in enumerate(queries):
            sample = samples[query]
            below_caption = grid[number].subgridspec(len(tops), columns, wspace=0.1, hspace=0.12)
            for below, (method, rows) in enumerate(tops.items()):
                for column, index in enumerate(rows[number]):
                    axes = figure.add_subplot(below_caption[below, column])
                    thumbnail = ImageOps.pad(load_image(images[index]), THUMBNAIL, color="white")
                    _framed(axes, thumbnail, column + 1, image_ids[index].item() == sample.person_id)
                    if column == 0 and below == 0:
                        axes.set_title(
                            _caption(sample.caption), loc="left", fontsize=9.5, pad=6, linespacing=1.3, parse_math=False
                        )
                    if column == 0 and len(tops) > 1:
                        axes.set_ylabel(method, fontsize=10.5, fontweight="bold")
        return as_png(figure)


def _framed(axes: Axes, image: Any, rank: int, right: bool) -> None:
    colour = RIGHT if right else WRONG
    axes.imshow(image)
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=3)
    axes.set_xlabel(f"{rank}  {'✓' if right else '✗'}", color=colour, fontsize=10.5, fontweight="bold", labelpad=3)


def _caption(caption: str) -> str:
    return "\n".join(textwrap.wrap(f"“{caption}”", CAPTION_WIDTH, max_lines=2, placeholder=" …”"))


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
