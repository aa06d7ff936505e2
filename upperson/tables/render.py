"""Tables as Markdown and CSV beside the paper's figures, and the plots of Figure 6 and of the report."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from upperson.report import MAIN, METRICS, QUIET, SECOND, STYLE, aligned, as_png
from upperson.tables.efficiency import Cost

ARROWS = {"text_to_image": "text → image", "image_to_text": "image → text"}
COSTS = {
    "trained_parameters": ("trained", "{:,.0f}"),
    "all_parameters": ("all", "{:,.0f}"),
    "inference_gflops": ("GFLOPs, image + caption", "{:.2f}"),
    "step_gflops": ("GFLOPs, step, a pair", "{:.2f}"),
    "step_megabytes": ("MB, step", "{:,.0f}"),
    "step_milliseconds": ("ms, step", "{:,.1f}"),
    "query_seconds": ("s, 1,000 queries", "{:.2f}"),
}


@dataclass(frozen=True)
class Measured:
    """What the runs of a row found, one a seed; a run that diverged is None."""

    name: str
    runs: Sequence[dict[str, Any] | None]

    def values(self, direction: str, metric: str) -> list[float]:
        return [run[direction][metric] for run in self.runs if run is not None]

    @property
    def trained(self) -> str:
        counts = {run["trained_parameters"] for run in self.runs if run is not None}
        return f"{counts.pop():,}" if counts else ""

    def cell(self, direction: str, metric: str) -> str:
        """Mean ± sample standard deviation over the seeds, and how many converged where not all did."""
        values = self.values(direction, metric)
        if not values:
            return "diverged"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        others = f" ({len(values)} of {len(self.runs)})" if len(values) < len(self.runs) else ""
        return f"{statistics.mean(values):.2f}{spread}{others}"


def paper_figures(number: str) -> dict[str, tuple[str, str]]:
    """R@1 of the paper by row, and where it was found."""
    with files("upperson.tables").joinpath("paper.csv").open(encoding="utf-8") as file:
        return {row["row"]: (row["value"], row["source"]) for row in csv.DictReader(file) if row["table"] == number}


def markdown(number: str, title: str, rows: Sequence[Measured], directions: Sequence[str], conditions: str) -> str:
    """The table with its title, what it was measured on, and the paper's R@1 on CUHK-PEDES where that is known."""
    paper = paper_figures(number)
    header = ["", "trained", *(f"{metric}, {ARROWS[direction]}" if len(directions) > 1 else metric
                               for direction in directions for metric in METRICS)]
    header += ["R@1, paper"] if paper else []
    body = []
    for row in rows:
        cells = [row.cell(direction, metric) for direction in directions for metric in METRICS]
        body.append([row.name, row.trained, *cells, *([paper.get(row.name, ("",))[0]] if paper else [])])
    lines = [f"# {label(number)}. {title}", "", conditions, "", *aligned(header, body), ""]
    if paper:
        sources = "; ".join(dict.fromkeys(source for _, source in paper.values()))
        lines += [f"The paper's figures are those on CUHK-PEDES that could be traced ({sources}); empty cells are "
                  "figures that this project does not have (upperson/tables/paper.csv).", ""]
    return "\n".join(lines)


def comma_separated(number: str, rows: Sequence[Measured], directions: Sequence[str], seeds: Sequence[int]) -> str:
    """One line a row, seed, direction and metric: percent, empty where the run diverged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "seed", "trained_parameters", "direction", "metric", "percent"])
    for row in rows:
        for seed, run in zip(seeds, row.runs, strict=False):  # zero-shot CLIP has one run for all seeds
            for direction in directions:
                for metric in METRICS:
                    found = [run["trained_parameters"], direction, metric, run[direction][metric]] if run else [
                        "", direction, metric, ""]
                    writer.writerow([number, row.name, seed, *found])
    return text.getvalue()


def costs_markdown(tables: dict[str, dict[str, Cost]], conditions: str) -> str:
    """Table IV: one part a model, with what was measured on it."""
    lines = ["# Table IV. What the methods cost", "", conditions, ""]
    for model, rows in tables.items():
        header = [model, *(title for title, _ in COSTS.values())]
        body = [[name, *("" if value is None else COSTS[key][1].format(value) for key, value in asdict(cost).items())]
                for name, cost in rows.items()]
        lines += [*aligned(header, body), ""]
    lines += ["Of the paper's Table IV this project has one row: UP-Person with ViT-B/16 has 7.4 M trained parameters "
              "of 157 M and needs 3,262 MB on an RTX 4090 (arXiv 2504.10084; the memory from a summary of it).", ""]
    return "\n".join(lines)


def costs_csv(tables: dict[str, dict[str, Cost]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "method", *COSTS])
    for model, rows in tables.items():
        for name, cost in rows.items():
            writer.writerow([model, name, *asdict(cost).values()])
    return text.getvalue()


def sweep_plot(rows: Sequence[Measured], title: str) -> bytes:
    """PNG of Figure 6: R@1 over each option that was varied, means with the range over the seeds."""
    panels: dict[str, list[tuple[int, list[float]]]] = {}
    for row in rows:
        option, value = row.name.rsplit(" ", 1)
        panels.setdefault(option, []).append((int(value), row.values("text_to_image", "R@1")))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        for axes, (option, points) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
            points = [(value, found) for value, found in points if found]
            axes.errorbar(
                [value for value, _ in points],
                means := [statistics.mean(found) for _, found in points],
                yerr=[
                    [mean - min(found) for mean, (_, found) in zip(means, points, strict=True)],
                    [max(found) - mean for mean, (_, found) in zip(means, points, strict=True)],
                ],
                color=MAIN, marker="o", capsize=3,
            )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_xticks([value for value, _ in points], [str(value) for value, _ in points])
            axes.minorticks_off()
            axes.set(title=option.replace("_", " "), xlabel=option.replace("_", " "))
        figure.axes[0].set_ylabel("R@1, percent")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return as_png(figure)


def bars(rows: Sequence[Measured], title: str) -> bytes:
    """PNG of R@1 and mAP by row: means as bars, each seed as a dot."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 0.8 + 0.42 * len(rows)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, metric, colour in zip(panels, ("R@1", "mAP"), (MAIN, SECOND), strict=True):
            for place, row in enumerate(rows):
                values = row.values("text_to_image", metric)
                if not values:
                    axes.text(0.5, place, "diverged", va="center", color=QUIET)
                    continue
                axes.barh(place, statistics.mean(values), color=colour, alpha=0.55)
                axes.plot(values, [place] * len(values), "o", color=colour, markersize=4)
                axes.text(max(values) + 0.6, place, row.cell("text_to_image", metric), va="center", fontsize=9)
            axes.set(title=f"{metric}, percent", yticks=range(len(rows)), yticklabels=[row.name for row in rows])
            axes.margins(x=0.22)
            axes.grid(visible=False, axis="y")
        figure.axes[0].invert_yaxis()
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return as_png(figure)


def label(number: str) -> str:
    return f"Figure {number.removeprefix('figure')}" if number.startswith("figure") else f"Table {number}"
