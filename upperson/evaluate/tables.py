"""Results as tables, for a terminal and as Markdown."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate

from upperson.evaluate.results import METRICS, Metrics, Results


def text(results: Results) -> str:
    """The table of a training for a terminal: the metrics before training and after each stage."""
    return "\n".join([_title(results), "", _table(results, "plain"), "", *_footnotes(results)])


def markdown(results: Results) -> str:
    """The same table as Markdown."""
    return "\n".join([_title(results), "", _table(results, "pipe"), "", "\n\n".join(_footnotes(results)), ""])


def both_directions(results: Results) -> str:
    """The checkpoint, the data set and the metrics of both directions, as Markdown that is readable in a terminal."""
    sizes = (f"{results.captions:,}", f"{results.images:,}")
    rows = [
        (direction, *(f"{metrics[key]:.2f}" for key in METRICS), *counts)
        for direction, metrics, counts in (
            ("text → image", results.text_to_image, sizes),
            ("image → text", results.image_to_text, sizes[::-1]),
        )
        if metrics is not None
    ]
    return "\n".join(
        [
            f"* checkpoint: {results.checkpoint}, {results.method}, backbone {results.model}",
            f"* trained on: {results.trained_on}, {_selection(results)}",
            f"* evaluated on: {results.evaluated_on}, {results.split} split, {results.domain}",
            "",
            pipe_table(("percent", *METRICS, "queries", "gallery"), rows),
            "",
        ]
    )


def pipe_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of the given cells. The first column is aligned left, the others are aligned right."""
    alignment = ("left", *("right" for _ in header[1:]))
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=alignment)


def short(metrics: Metrics) -> str:
    """The two metrics of a progress line."""
    return f"R@1 {metrics['R@1']:5.2f}  mAP {metrics['mAP']:5.2f}"


def _table(results: Results, style: str) -> str:
    rows = [(name, *(f"{metrics[key]:.2f}" for key in METRICS)) for name, metrics in _rows(results)]
    alignment = ("left", *("right" for _ in METRICS))
    return tabulate(rows, ("", *METRICS), tablefmt=style, disable_numparse=True, colalign=alignment)


def _rows(results: Results) -> list[tuple[str, Metrics]]:
    rows = [("zero-shot CLIP", results.zero_shot or results.text_to_image)]
    if results.start is not None:
        rows.append(("start", results.start))
    if results.stages:
        return rows + [(stage.title or stage.method, stage.text_to_image) for stage in results.stages]
    return rows if results.selection == "none" else [*rows, (results.method, results.text_to_image)]


def _title(results: Results) -> str:
    return (
        f"Text → image retrieval on {results.evaluated_on}, {results.split} split: {results.captions:,} queries, "
        f"{results.images:,} images; percent"
    )


def _footnotes(results: Results) -> list[str]:
    trained = f"{results.trained_parameters:,} of {results.all_parameters:,} parameters trained."
    if results.stages:
        notes = [note for stage in results.stages for note in _footnotes(stage)]
        return [*notes, f"{results.method}, all stages: {trained}"]
    return [
        f"{results.title or results.method}: epoch {results.epoch} of {results.epochs}, selection {results.selection} "
        f"({results.selection_meaning}); {trained}"
    ]


def _selection(results: Results) -> str:
    epoch = "epoch not recorded" if results.epoch is None else f"epoch {results.epoch} of {results.epochs}"
    if results.selection is None:
        return f"{epoch}, no selection recorded"
    return f"{epoch}, selection {results.selection} ({results.selection_meaning})"
