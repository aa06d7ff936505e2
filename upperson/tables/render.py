"""Tables as Markdown and CSV with the paper's numbers, and plots: sweeps, rows, and accuracy by parameters."""

import csv
import io
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import matplotlib
from matplotlib.figure import Figure

from upperson.config import Config
from upperson.evaluate.pictures import MAIN, QUIET, SECOND, STYLE, as_png
from upperson.evaluate.results import METRICS, Results
from upperson.evaluate.tables import pipe_table
from upperson.tables.costs import Cost, Costs
from upperson.tables.orderings import Ordering, orderings, summary
from upperson.tables.paper import SOURCE, Published, number_of, published
from upperson.tables.rows import Table, trainings

ARROWS = {"text_to_image": "text → image", "image_to_text": "image → text"}
COSTS = {
    "trained_parameters": ("trained", "{:,.0f}"),
    "all_parameters": ("all", "{:,.0f}"),
    "inference_gflops": ("GFLOPs, image + caption", "{:.2f}"),
    "step_gflops": ("GFLOPs, step, a pair", "{:.2f}"),
    "paper_mflops": ("MFLOPs as the paper counts", "{:,.2f}"),
    "step_megabytes": ("MB, step", "{:,.0f}"),
    "step_milliseconds": ("ms, step", "{:,.1f}"),
    "query_seconds": ("s, 1,000 queries", "{:.2f}"),
}
OF_A_STEP = ("step_gflops", "step_megabytes", "step_milliseconds")
OF_A_STAGE = (
    "trained_parameters",
    "paper_mflops",
    *OF_A_STEP,
)  # the other costs are those of the model, the same for all stages


@dataclass(frozen=True)
class Measured:
    """The results of the runs of a row, one for each seed; None for a run that diverged."""

    name: str
    runs: Sequence[Results | None]

    def values(self, direction: str, metric: str) -> list[float]:
        return [getattr(run, direction)[metric] for run in self.runs if run is not None]

    @property
    def parameters(self) -> int | None:
        """The number of trained parameters; None if all runs diverged."""
        return next((run.trained_parameters for run in self.runs if run is not None), None)

    @property
    def trained(self) -> str:
        return "" if self.parameters is None else f"{self.parameters:,}"

    def cell(self, direction: str, metric: str) -> str:
        """Mean ± sample standard deviation over the seeds, and the number of converged runs if some diverged."""
        values = self.values(direction, metric)
        if not values:
            return "diverged"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        others = f" ({len(values)} of {len(self.runs)})" if len(values) < len(self.runs) else ""
        return f"{statistics.mean(values):.2f}{spread}{others}"


def markdown(
    number: str,
    title: str,
    rows: Sequence[Measured],
    directions: Sequence[str],
    conditions: str,
    costs: dict[str, list[Cost]] | None = None,
) -> str:
    """The table with its title, the conditions, and all figures of the paper's table.

    Rows that only the paper has are below the others. `costs`: the costs of a step of each row, for further columns.
    """
    paper = published(number)
    metrics = tuple(dict.fromkeys(metric for row in paper for metric in row.figures))
    header = [
        "",
        "trained",
        *(
            f"{metric}, {ARROWS[direction]}" if len(directions) > 1 else metric
            for direction in directions
            for metric in METRICS
        ),
    ]
    header += [COSTS[key][0] for key in OF_A_STEP] if costs else []
    own = len(header) - 1
    of_row = {row.ours: row for row in paper}
    body = []
    for row in rows:
        cells = [row.cell(direction, metric) for direction in directions for metric in METRICS]
        cells += [cost_cell(costs[row.name], key) for key in OF_A_STEP] if costs else []
        body.append([row.name, row.trained, *cells, *paper_cells(of_row.get(row.name), metrics)])
    names = {row.name for row in rows}
    several = len({row.dataset for row in paper}) > 1
    for row in paper:
        if row.ours not in names:
            name = f"{row.row}, {row.dataset}" if several else row.row
            body.append([name, *[""] * own, *paper_cells(row, metrics)])
    header += [f"{metric}, paper" for metric in metrics]
    lines = [f"# {heading(number, title)}", "", conditions, "", pipe_table(header, body), ""]
    if paper:
        lines += [about_the_paper(paper), ""]
    if len(directions) == 1:
        lines += [line for metric in ("R@1", "mAP") for line in summary(compared(rows, paper, metric), metric)]
    return "\n".join(lines)


def paper_cells(row: Published | None, metrics: Sequence[str]) -> list[str]:
    return ["" if row is None else row.figures.get(metric, "") for metric in metrics]


def about_the_paper(paper: Sequence[Published]) -> str:
    datasets = ", ".join(dict.fromkeys(row.dataset for row in paper if row.dataset))
    where = f", on {datasets}" if datasets else ""
    return f'Columns "paper": {SOURCE}, Table {paper[0].table}{where}. Rows with these columns alone were not run here.'


def compared(rows: Sequence[Measured], paper: Sequence[Published], metric: str) -> list[Ordering]:
    """The orderings of the paper among these rows; on the first data set, CUHK-PEDES, if its table has several."""
    columns = {name: None for row in paper for name in row.figures}
    column = next((name for name in columns if name == metric or name.startswith(f"{metric} ")), metric)
    figures = {row.ours: number_of(row.figures[column]) for row in paper if row.ours and column in row.figures}
    return orderings(figures, {row.name: row.values("text_to_image", metric) for row in rows})


def how_trained(table: Table, seeds: Sequence[int]) -> str:
    config, datasets = table.rows[0].config, {row.config.data.dataset for row in table.rows}
    spread = f"{len(seeds)} seeds, mean ± standard deviation" if len(seeds) > 1 else "one seed"
    usual = epochs(config)
    others = ", ".join(f"{row.name} {epochs(row.config)}" for row in table.rows if epochs(row.config) != usual)
    size = f", {config.data.embedded_identities[0]:,} identities to train on" if config.data.is_synthetic else ""
    return (
        f"Percent on the test split; {spread}; the epoch that is best on the validation split (the last one where "
        f"there is none); model {config.model.model}, {usual} epochs{f' ({others})' if others else ''}{size}"
        + ("." if len(datasets) == 1 else "; each data set with its own preset.")
    )


def epochs(config: Config) -> str:
    """The epochs of each stage."""
    return " + ".join(str(part.train.epochs) for part in trainings(config))


def comma_separated(number: str, rows: Sequence[Measured], directions: Sequence[str], seeds: Sequence[int]) -> str:
    """CSV with one line for each row, seed, direction and metric: percent, empty if the run diverged."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "seed", "trained_parameters", "direction", "metric", "percent"])
    for row in rows:
        for seed, run in zip(seeds, row.runs, strict=False):  # zero-shot CLIP has one run for all seeds
            for direction in directions:
                for metric in METRICS:
                    trained = run.trained_parameters if run else ""
                    percent = getattr(run, direction)[metric] if run else ""
                    writer.writerow([number, row.name, seed, trained, direction, metric, percent])
    return text.getvalue()


def costs_markdown(tables: Costs) -> str:
    """All costs as Markdown, one table for each model."""
    lines = []
    for model, rows in tables.items():
        header = [model, *(title for title, _ in COSTS.values())]
        body = [[name, *(cost_cell(costs, key) for key in COSTS)] for name, costs in rows.items()]
        lines += [pipe_table(header, body), ""]
    return "\n".join(lines)


def published_costs() -> str:
    """The paper's Table IV as Markdown."""
    paper = published("IV")
    metrics = tuple(paper[0].figures)
    body = [[row.row, *paper_cells(row, metrics)] for row in paper]
    return "\n".join([pipe_table([f"{SOURCE}, Table IV", *metrics], body), ""])


def cost_cell(costs: Sequence[Cost], key: str) -> str:
    """One cost of a row; "a / b" if the stages differ."""
    values = [getattr(cost, key) for cost in (costs if key in OF_A_STAGE else costs[-1:])]
    return " / ".join("" if value is None else COSTS[key][1].format(value) for value in values)


def costs_csv(tables: Costs) -> str:
    """CSV with one line for each model, row and stage."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "method", "stage", *COSTS])
    for model, rows in tables.items():
        for name, costs in rows.items():
            for stage, cost in enumerate(costs, 1):
                writer.writerow([model, name, stage, *asdict(cost).values()])
    return text.getvalue()


def sweep_plot(rows: Sequence[tuple[str, str, Measured]], title: str) -> bytes:
    """A PNG of a sweep: R@1 over the labels of each axis, as means with the range over the seeds.

    `rows`: title of the axis, label of the point, and the point's results.
    """
    axes_of: dict[str, list[tuple[str, list[float]]]] = {}
    for axis, point, row in rows:
        axes_of.setdefault(axis, []).append((point, row.values("text_to_image", "R@1")))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        panels = figure.subplots(1, len(axes_of), sharey=True, squeeze=False)[0]
        for axes, (axis, points) in zip(panels, axes_of.items(), strict=True):
            found = [(index, values) for index, (_, values) in enumerate(points) if values]  # no values: diverged
            means = [statistics.mean(values) for _, values in found]
            axes.errorbar(
                [index for index, _ in found],
                means,
                yerr=[
                    [mean - min(values) for mean, (_, values) in zip(means, found, strict=True)],
                    [max(values) - mean for mean, (_, values) in zip(means, found, strict=True)],
                ],
                color=MAIN, marker="o", capsize=3,
            )  # fmt: skip
            axes.set_xticks(range(len(points)), [point for point, _ in points])
            axes.set_xlabel(textwrap.fill(axis.replace("_", " "), 34))
        panels[0].set_ylabel("R@1, percent")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return as_png(figure)


def bars(rows: Sequence[Measured], title: str) -> bytes:
    """A PNG of R@1 and mAP by row, with means as bars and each seed as a dot."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 0.8 + 0.42 * len(rows)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, metric, colour in zip(panels, ("R@1", "mAP"), (MAIN, SECOND), strict=True):
            for index, row in enumerate(rows):
                values = row.values("text_to_image", metric)
                if not values:
                    axes.text(0.5, index, "diverged", va="center", color=QUIET)
                    continue
                axes.barh(index, statistics.mean(values), color=colour, alpha=0.55)
                axes.plot(values, [index] * len(values), "o", color=colour, markersize=4)
                axes.text(max(values) + 0.6, index, row.cell("text_to_image", metric), va="center", fontsize=9)
            axes.set(title=f"{metric}, percent", yticks=range(len(rows)), yticklabels=[row.name for row in rows])
            axes.margins(x=0.22)
            axes.grid(visible=False, axis="y")
        figure.axes[0].invert_yaxis()
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return as_png(figure)


def parameters_plot(rows: Sequence[Measured], title: str) -> bytes:
    """A PNG of R@1 over the trained parameters: the rows here with each seed as a dot, and beside them the paper's."""
    here = [(row.name, row.parameters, row.values("text_to_image", "R@1")) for row in rows]
    paper = [
        (row.row, number_of(row.figures["trained parameters"]), [float(row.figures["R@1 CUHK-PEDES"])])
        for row in published("figure5")
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        panels = zip(
            figure.subplots(1, 2), (here, paper), ("here", f"{SOURCE}, CUHK-PEDES"), (MAIN, SECOND), strict=True
        )
        for axes, points, where, colour in panels:
            for name, parameters, values in points:
                if not parameters or not values:  # zero-shot CLIP, or diverged
                    continue
                axes.semilogx([parameters] * len(values), values, "o", color=colour, markersize=5)
                axes.annotate(
                    name, (parameters, max(values)), (0, 6), textcoords="offset points", ha="center", fontsize=9
                )
            axes.set(title=where, xlabel="trained parameters", ylabel="R@1, percent")
            axes.margins(x=0.25, y=0.18)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        return as_png(figure)


def heading(number: str, title: str) -> str:
    """The title, preceded by the number of the paper's table or figure."""
    if number.startswith("figure"):
        return f"Figure {number.removeprefix('figure')}. {title}"
    return f"Table {number}. {title}" if number.isupper() else title
