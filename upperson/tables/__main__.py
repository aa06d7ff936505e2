"""Trains, tests and prints the rows of tables. The paper's tables also show the paper's numbers.

upperson tables V                                                  on the synthetic data, no network
upperson tables V VII --seeds 3                                    mean ± standard deviation
upperson tables X --data-root /data --dataset cuhk-pedes           on a real data set
upperson tables methods --seeds 3                                  every method, with the cost of a step
upperson tables sweeps --method NAME                               a method with other options
upperson tables all --list                                         lists the runs without training

Each run is cached and shared by all tables; an interrupted run is resumed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from upperson.config import Config
from upperson.data import read_splits
from upperson.errors import Parser, RunError, exit_status, path_argument
from upperson.evaluate.embed import evaluate
from upperson.evaluate.pictures import shown_queries, top_ten
from upperson.files import A_FOLDER, NOTHING, found_at, make_folder, require_folder, write_atomically
from upperson.machine import device_and_precision
from upperson.methods import METHODS
from upperson.model import load_model
from upperson.tables.costs import how_measured, measure_costs
from upperson.tables.render import (
    Costs,
    Measured,
    bars,
    comma_separated,
    costs_csv,
    costs_markdown,
    heading,
    how_trained,
    markdown,
    parameters_plot,
    published_costs,
    sweep_plot,
)
from upperson.tables.rows import (
    COMPARED,
    Table,
    build_tables,
    embedded_setting,
    every_method,
    real_setting,
    rows_of_costs,
    sweep_table,
)
from upperson.tables.runs import Runs, distinct, seconds_of
from upperson.train.run_folder import BEST

PAPER = (
    "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "figure5", "figure6", "figure7",
)  # fmt: skip
ALL = (*PAPER, "methods")
OWN_DATASETS = ("XI", "XII", "XIII")  # tables that --dataset does not change


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    return exit_status(lambda: make_tables(parse(argv)), stopped="stopped; the same command resumes the runs")


def make_tables(options: argparse.Namespace) -> int:
    setting = options.setting
    dataset = options.dataset or next(iter(setting.people))
    runs = Runs(options.output / "runs", {"device": options.device, "workers": options.workers}, options.jobs)
    require_folder(options.output, "--output", writable=not options.list)  # fails before any work
    seeds = range(1, options.seeds + 1)
    numbers = requested(options.tables)
    tables = {number: table for number, table in build_tables(setting, dataset).items() if number in numbers}
    if options.method:
        tables["sweeps"] = sweep_table(setting, dataset, options.method)
    try:
        train_missing(tables, runs, seeds, only_list=options.list)
    except BrokenProcessPool:
        raise RunError(
            "a training process was killed, possibly for lack of memory; the same command resumes the runs"
        ) from None
    if options.list:
        return 0
    for number in numbers:
        if number == "IV":
            write_costs(setting[dataset], options)
        else:
            costs = measure_costs(every_method, setting[dataset], options.device) if number == "methods" else None
            write(number, tables[number], runs, seeds, options, costs)
    return 0


def requested(names: Sequence[str]) -> tuple[str, ...]:
    """The tables of a command line, in its order."""
    return tuple(dict.fromkeys(table for name in names for table in (ALL if name == "all" else (name,))))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="upperson tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tables",
        nargs="+",
        choices=[*ALL, "sweeps", "all"],
        metavar="TABLE",
        help=f"{', '.join(ALL)}; all for all of these; or sweeps",
    )
    parser.add_argument("--method", choices=list(METHODS), help="the method of the table sweeps")
    parser.add_argument(
        "--data-root",
        type=path_argument,
        metavar="DIR",
        help="folder above the data sets' own folders (default: the synthetic data sets are used)",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="the data set of tables IV to X, the figures, methods and sweeps, and without --data-root of tables I to "
        "III (default: embedded; cuhk-pedes with --data-root)",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run each row with seeds 1 to N (default: 1)")
    parser.add_argument(
        "--output",
        type=path_argument,
        default=Path("runs/tables"),
        metavar="DIR",
        help="folder of runs and tables (default: runs/tables)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="processes that load images (default: 0 for synthetic data sets, 4 for others)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="number of runs at once, each on its share of the cores; on two cores 2 is faster (default: 1)",
    )
    parser.add_argument("--list", action="store_true", help="list the runs without training, and exit")
    options = parser.parse_args(argv)
    for name, most in (("seeds", 1000), ("jobs", 256)):
        if not 1 <= getattr(options, name) <= most:
            parser.error(f"--{name}: expected 1 to {most}, found {getattr(options, name)}")
    varied = [name for name, method in METHODS.items() if method.sweeps(synthetic=not options.data_root)]
    if "sweeps" in options.tables and options.method not in varied:
        parser.error(
            f"--method: the table sweeps needs a method with sweeps, {' or '.join(varied)}; found "
            f"{options.method or 'none'}"
        )
    if "sweeps" not in options.tables and options.method:
        parser.error("--method: only for the table sweeps")
    if options.workers is None:
        options.workers = 4 if options.data_root else 0
    if options.data_root and (found := found_at(options.data_root)) not in (A_FOLDER, NOTHING):
        parser.error(f"--data-root: {options.data_root} is {found}; expected a folder")
    try:
        options.setting = setting = real_setting(options.data_root) if options.data_root else embedded_setting()
        next(iter(setting.people.values())).replace(device=options.device, workers=options.workers)
    except ValueError as error:
        parser.error(str(error))
    known = [*setting.people, *setting.general]
    if options.dataset is not None and options.dataset not in known:
        parser.error(
            f"--dataset: expected one of {', '.join(known)}, found {options.dataset}"
            + ("" if options.data_root else "; real data sets need --data-root")
        )
    numbers = set(requested(options.tables))
    if options.dataset is not None and numbers <= {*OWN_DATASETS, *(COMPARED if options.data_root else ())}:
        parser.error(f"--dataset: the data sets of {' and '.join(options.tables)} are fixed; expected none")
    for name in ("seeds", "jobs"):
        if numbers == {"IV"} and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name}: table IV trains nothing; expected none")
    return options


def train_missing(tables: dict[str, Table], runs: Runs, seeds: Sequence[int], only_list: bool) -> None:
    """Trains all missing runs, after printing their number and an estimate of the time."""
    wanted = distinct(
        (
            row.config.replace(seed=seed)
            for seed in seeds
            for table in tables.values()
            for row in table.rows
            if seed == 1 or row.config.model.method.trains
        ),
        runs,
    )
    missing = [config for config in wanted if not runs.is_done(config)]
    if not wanted:
        if only_list:
            print("no runs: table IV trains nothing")
        return
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them already done, in {runs.folder}", flush=True)
    if only_list:
        for config in wanted:
            print(
                f"  {'done   ' if runs.is_done(config) else 'missing'}  {described(config)}: {runs.folder_of(config)}"
            )
        return
    if not missing:
        return
    left = sum(config.model.method.trains for config in missing)  # zero-shot takes seconds
    times: list[float] = []
    with runs.processes() as processes:
        if left:
            trained = [config for config in missing if config.model.method.trains]
            examples = {(config.data.dataset, config.model.method.name): config for config in reversed(trained)}
            each = {
                kind: processes.submit(seconds_of, config.replace(**runs.settings)).result()
                for kind, config in examples.items()
            }
            total = sum(each[config.data.dataset, config.model.method.name] for config in trained)
            at_once = min(runs.jobs, left)
            print(
                f"{len(missing)} to run, about {total / left:.0f} s each on this machine, {at_once} at once: "
                f"{duration(total / at_once)}",
                flush=True,
            )
        for number, (config, seconds) in enumerate(runs.train_all(missing, processes), 1):
            if config.model.method.trains:
                times.append(seconds)
                left -= 1
            at_once = max(1, min(runs.jobs, left))
            remaining = duration(sum(times) / len(times) * left / at_once) if times else "an unknown time"
            print(f"[{number}/{len(missing)}] {described(config)}   {seconds:.0f} s, {remaining} left", flush=True)


def write(
    number: str, table: Table, runs: Runs, seeds: Sequence[int], options: argparse.Namespace, costs: Costs | None
) -> None:
    """Prints a table, and writes Markdown, CSV and the picture. `costs` of the rows add columns."""
    directions = ["text_to_image", "image_to_text"] if table.both_directions else ["text_to_image"]
    rows = []
    for row in table.rows:
        # Results without training are the same for every seed.
        own = [1] if not row.config.model.method.trains else seeds
        found = [runs.results(row, row.config.replace(seed=seed), table.both_directions) for seed in own]
        rows.append(Measured(row.name, found))
    name = f"{number}-{options.method}" if number == "sweeps" else number
    name = f"{name}-{table.rows[0].config.data.dataset}"
    title = heading(number, table.title)
    first = next(iter(costs)) if costs else None
    costs_of_rows = costs[first] if costs and first else None
    text = markdown(number, table.title, rows, directions, how_trained(table, seeds), costs_of_rows)
    if costs:
        others = {model: of_rows for model, of_rows in costs.items() if model != first}
        text += (
            f"\nThe costs are those of {first}; a / b, of the first and the second stage. "
            f"{how_measured(table.rows[0].config, options.device)}\n\n{costs_markdown(others)}"
        )
    print(f"\n{text}", flush=True)
    files: dict[str, bytes | str] = {
        f"{name}.md": text,
        f"{name}.csv": comma_separated(number, rows, directions, seeds),
    }
    if costs:
        files[f"{name}-costs.csv"] = costs_csv(costs)
    points = [(*row.point, measured) for row, measured in zip(table.rows, rows, strict=True) if row.point]
    if points:
        files[f"{name}.png"] = sweep_plot(points, title)
    elif number == "figure5":
        files[f"{name}.png"] = parameters_plot(rows, title)
    elif number == "figure7":
        files[f"{name}.png"] = found_images(table, runs)
    elif not table.both_directions:
        files[f"{name}.png"] = bars(rows, title)
    save(options.output, files)


def found_images(table: Table, runs: Runs) -> bytes:
    """Figure 7: the first images of zero-shot CLIP and of the trained model for the same captions."""
    config = table.rows[0].config
    model = load_model(runs.folder_of(config) / BEST)
    device, precision = device_and_precision(runs.settings["device"], config.train.precision)
    test = read_splits(config.data)["test"]
    adapted = evaluate(model.to(device), test, precision=precision)
    with model.zero_shot():
        zero_shot = evaluate(model, test, precision=precision)
    queries = shown_queries(test, 3)
    tops = {"zero-shot CLIP": zero_shot.top, config.model.method.title: adapted.top}
    return top_ten(test, queries, {name: top[queries].tolist() for name, top in tops.items()})


def write_costs(base: Config, options: argparse.Namespace) -> None:
    """Prints and writes Table IV."""
    costs = measure_costs(rows_of_costs, base, options.device)
    text = "\n".join([
        f"# {heading('IV', 'What the methods cost')}", "", how_measured(base, options.device), "",
        "What the paper counts as FLOPs are the multiply-adds of linear modules and of the patch convolution in a "
        "training forward of one pair. It leaves out the attention, and what LoRA and prefixes add inside of it: about "
        "36 % of a plain CLIP. The other columns leave out nothing.", "",
        costs_markdown(costs), published_costs(),
    ])  # fmt: skip
    print(f"\n{text}", flush=True)
    name = f"IV-{base.data.dataset}"
    save(options.output, {f"{name}.md": text, f"{name}.csv": costs_csv(costs)})


def described(config: Config) -> str:
    backbone = "" if config.data.is_synthetic else f" on {config.model.model}"  # Tables I to III have two
    base = f"{config.model.method.title}{backbone}, {config.data.dataset}, seed {config.train.seed}"
    return base + (f", {config.train.losses}" if config.train.losses != "sdm" else "")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def save(folder: Path, files: Mapping[str, bytes | str]) -> None:
    make_folder(folder, "--output")
    for name, content in files.items():
        write_atomically(folder / name, content)
    print(f"in {folder}: {', '.join(files)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
