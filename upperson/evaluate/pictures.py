"""What a run shows: the table, the curve, and the picture of the top ten."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import ImageOps
from torch import Tensor

from upperson.data import Sample, gallery, load_image

METRICS = ("R@1", "R@5", "R@10", "mAP", "mINP")
RIGHT, WRONG = "#1a8a3c", "#c8322b"
LOSS, MAIN, SECOND, QUIET = "#555555", "#1f5fa8", "#7fb0e0", "#888888"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 11,
    "savefig.dpi": 120,
}
THUMBNAIL = (192, 64)  # height, width of an image in the picture, whatever its own size
CAPTION_WIDTH = 150  # characters


def text(results: dict[str, Any]) -> str:
    """The results table for a terminal."""
    measured = _rows(results)
    width = max(18, *(len(name) for name, _ in measured))
    rows = ["".join([" " * width, *(f"{name:>8}" for name in METRICS)])]
    rows += ["".join([name.ljust(width), *(f"{metrics[key]:8.2f}" for key in METRICS)]) for name, metrics in measured]
    return "\n".join([_title(results), "", *rows, "", *_footnotes(results)])


def markdown(results: dict[str, Any]) -> str:
    """The same as Markdown."""
    rows = [f"| | {' | '.join(METRICS)} |", "|---|" + "---:|" * len(METRICS)]
    rows += [f"| {name} | {' | '.join(f'{metrics[key]:.2f}' for key in METRICS)} |" for name, metrics in _rows(results)]
    return "\n".join([_title(results), "", *rows, "", "\n\n".join(_footnotes(results)), ""])


def curve(histories: Sequence[Sequence[dict[str, Any]]], split: str, results: dict[str, Any]) -> bytes:
    """PNG of training loss, and R@1 and mAP on the split that was watched, by epoch; stages stand beside each other.

    A history, one for each stage of the training, holds one entry an epoch with the keys epoch, loss, R@1 and mAP; the
    first, of epoch 0, is what was measured before and has no loss.
    """
    stages = results.get("stages", [results])
    losses = ", then ".join(dict.fromkeys(stage["losses"] for stage in stages))
    before = "at the start" if "start" in stages[0] else "zero-shot CLIP"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        ended = 0
        for history, stage in zip(histories, stages, strict=True):
            epochs = history[1:]
            numbers = [ended + entry["epoch"] for entry in epochs]
            left.plot(numbers, [entry["loss"] for entry in epochs], color=LOSS, marker=".")
            for key, colour in (("R@1", MAIN), ("mAP", SECOND)):
                label = key if not ended else None
                right.plot(numbers, [entry[key] for entry in epochs], color=colour, marker=".", label=label)
                if not ended:
                    right.axhline(history[0][key], color=colour, linestyle=":", label=f"{key}, {before}")
            chosen = ended + stage["epoch"]
            right.plot(
                chosen,
                history[stage["epoch"]]["R@1"],
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
                        stage["title"], (ended + 0.6, 0.02), xycoords=("data", "axes fraction"), fontsize=8, color=QUIET
                    )
            ended = numbers[-1]
        left.set(title=f"Training loss ({losses})", xlabel="epoch", ylabel="loss, mean over the epoch")
        right.set(
            title=f"Text → image retrieval, {results['dataset']}, {split} split", xlabel="epoch", ylabel="percent"
        )
        right.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
        for axes in (left, right):
            axes.margins(y=0.1)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return as_png(figure)


def top_ten(samples: Sequence[Sample], tops: dict[str, Tensor], shown: int = 4) -> bytes:
    """PNG of what a few captions found: ten images each, best first, right and wrong ones marked.

    `tops` holds by method what it found, (queries, at most 10) indices of the distinct images of `samples`
    (Retrieval.top); methods stand below each other, named if there are several. The queries are evenly spaced through
    the split, so the picture is no selection of good ones.
    """
    images, image_ids = gallery(samples)
    shown = min(shown, len(samples))
    chosen = [(2 * i + 1) * len(samples) // (2 * shown) for i in range(shown)]
    columns = next(iter(tops.values())).shape[1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 0.4 + 3 * shown * len(tops)))
        rows = figure.add_gridspec(
            shown * len(tops),
            columns,
            left=0.01 if len(tops) == 1 else 0.04,
            right=0.99,
            bottom=0.25 / figure.get_figheight(),
            top=1 - 0.85 / figure.get_figheight(),
            wspace=0.1,
            hspace=0.35,
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
        for row, (query, (method, top)) in enumerate((query, item) for query in chosen for item in tops.items()):
            sample = samples[query]
            for column, index in enumerate(top[query].tolist()):
                axes = figure.add_subplot(rows[row, column])
                thumbnail = ImageOps.pad(load_image(images[index]), THUMBNAIL[::-1], color="white")
                _framed(axes, thumbnail, column + 1, image_ids[index].item() == sample.person_id)
                if column:
                    continue
                if row % len(tops) == 0:
                    axes.set_title(
                        _caption(sample.caption), loc="left", fontsize=9.5, pad=6, linespacing=1.3, parse_math=False
                    )
                if len(tops) > 1:
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


def _rows(results: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Before the training, and after it or after each of its stages."""
    rows = [("zero-shot CLIP", results["zero_shot"])]
    if "start" in results:
        rows.append(("start", results["start"]))
    if "stages" in results:
        return rows + [(stage["title"], stage["adapted"]) for stage in results["stages"]]
    return rows if results["selection"] == "none" else [*rows, (results["method"], results["adapted"])]


def _title(results: dict[str, Any]) -> str:
    return (
        f"Text → image retrieval on {results['dataset']}, {results['split']} split: {results['queries']:,} "
        f"queries, {results['gallery']:,} images; percent"
    )


def _footnotes(results: dict[str, Any]) -> list[str]:
    trained = f"{results['trained_parameters']:,} of {results['all_parameters']:,} parameters trained."
    if "stages" in results:
        stages = [note for stage in results["stages"] for note in _footnotes(stage | {"method": stage["title"]})]
        return [*stages, f"{results['method']}, all stages: {trained}"]
    return [
        f"{results['method']}: epoch {results['epoch']} of {results['epochs']}, selection {results['selection']} "
        f"({results['selection_meaning']}); {trained}"
    ]


def aligned(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table that a terminal shows well, too: the first column to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for cells in (header, rule, *body):
        others = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        lines.append(f"| {' | '.join([cells[0].ljust(widths[0]), *others])} |")
    return lines


def as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
