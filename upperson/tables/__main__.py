"""The tables of the paper: each row is trained, tested and printed beside the paper's figures.

python -m upperson.tables V                                                  on the drawn data, no network
python -m upperson.tables V VII --seeds 3                                    mean ± standard deviation
python -m upperson.tables X --data-root /data --dataset cuhk-pedes           on a real data set
python -m upperson.tables all --list                                         what would be run

What has been trained already is not trained again, whichever table asked for it; a run that was stopped goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from upperson.checkpoint import load_model, write_atomically
from upperson.config import Config
from upperson.errors import USER_ERRORS
from upperson.report import top_ten
from upperson.resources import resources
from upperson.retrieval import evaluate
from upperson.run_folder import BEST
from upperson.splits import read_splits
from upperson.tables import efficiency
from upperson.tables.render import (
    Measured,
    bars,
    comma_separated,
    costs_csv,
    costs_markdown,
    label,
    markdown,
    sweep_plot,
)
from upperson.tables.rows import Setting, Table, build_tables, embedded_setting, real_setting
from upperson.tables.runs import Runs, distinct, seconds_of

NUMBERS = ("IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "figure6", "figure7")
EMBEDDED_BATCH, REAL_BATCH = 64, 128  # of Table IV
FULL_SIZE, FULL_SIZE_BATCH = "cuhk-pedes", 2  # whose model stands beside the embedded one there


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after one line on what went wrong; wrong arguments exit with 2, as argparse does."""
    options = parse(argv)
    setting = options.setting
    dataset = options.dataset or next(iter(setting.people))
    runs = Runs(options.output / "runs", {"device": options.device, "workers": options.workers}, options.jobs)
    seeds = range(1, options.seeds + 1)
    numbers = NUMBERS if "all" in options.tables else tuple(dict.fromkeys(options.tables))
    tables = {number: table for number, table in build_tables(setting, dataset).items() if number in numbers}
    try:
        train_missing(tables, runs, seeds, only_list=options.list)
        if options.list:
            return 0
        for number in numbers:
            if number == "IV":
                write_costs(setting, dataset, options)
            else:
                write(number, tables[number], runs, seeds, options)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("error: a process that trained was killed, perhaps for want of memory; the same command goes on where it "
              "was", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m upperson.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", choices=[*NUMBERS, "all"], metavar="TABLE",
                        help=f"{', '.join(NUMBERS)}, or all")
    parser.add_argument("--data-root", type=Path, metavar="DIR",
                        help="folder that holds the data sets' own folders; without it the drawn data sets are used")
    parser.add_argument("--dataset", metavar="NAME", help="the data set of tables IV to X and of the figures "
                        "(default: embedded, or with --data-root cuhk-pedes)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs a row, with seeds 1 to N (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("runs/tables"), metavar="DIR",
                        help="where runs and tables go (default: runs/tables)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--workers", type=int, default=None, metavar="N",
                        help="processes that load images (default: 0 for the drawn data sets, 4 for others)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="runs at once, each on its share of the cores; on two cores 2 is faster (default: 1)")
    parser.add_argument("--list", action="store_true", help="show what would be run, and end")
    options = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, found {getattr(options, name)}")
    if options.workers is None:
        options.workers = 4 if options.data_root else 0
    options.setting = setting = real_setting(options.data_root) if options.data_root else embedded_setting()
    try:
        next(iter(setting.people.values())).replace(device=options.device, workers=options.workers)
    except ValueError as error:
        parser.error(str(error))
    known = [*setting.people, *setting.general]
    if options.dataset is not None and options.dataset not in known:
        parser.error(f"--dataset: expected one of {', '.join(known)}, found {options.dataset}"
                     + ("" if options.data_root else "; the real ones need --data-root"))
    return options


def train_missing(tables: dict[str, Table], runs: Runs, seeds: Sequence[int], only_list: bool) -> None:
    """Trains all runs that are not there yet, after saying how many there are and about how long that takes."""
    wanted = distinct(
        (row.config.replace(seed=seed) for seed in seeds for table in tables.values() for row in table.rows
         if seed == 1 or row.config.model.method != "zero-shot"), runs)
    missing = [config for config in wanted if not runs.is_done(config)]
    if not wanted:
        return
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them are there already, in {runs.folder}", flush=True)
    if only_list:
        for config in wanted:
            print(f"  {'done   ' if runs.is_done(config) else 'missing'}  {described(config)}: {runs.place(config)}")
        return
    if not missing:
        return
    left = sum(config.model.method != "zero-shot" for config in missing)  # zero-shot takes seconds
    times: list[float] = []
    with runs.processes() as processes:
        if left:
            trained = [config for config in missing if config.model.method != "zero-shot"]
            examples = {config.data.dataset: config for config in reversed(trained)}
            each = {name: processes.submit(seconds_of, config.replace(**runs.settings)).result()
                    for name, config in examples.items()}
            total = sum(each[config.data.dataset] for config in trained)
            print(f"{len(missing)} to run, at about {total / left:.0f} s each on this machine, {runs.jobs} at once: "
                  f"{duration(total / runs.jobs)}", flush=True)
        for number, (config, seconds) in enumerate(runs.train_all(missing, processes), 1):
            if config.model.method != "zero-shot":
                times.append(seconds)
                left -= 1
            remaining = duration(sum(times) / len(times) * left / runs.jobs) if times else "some time"
            print(f"[{number}/{len(missing)}] {described(config)}   {seconds:.0f} s, {remaining} left", flush=True)


def write(number: str, table: Table, runs: Runs, seeds: Sequence[int], options: argparse.Namespace) -> None:
    """Prints a table, and writes it as Markdown and CSV with its picture."""
    directions = ["text_to_image", "image_to_text"] if table.both_directions else ["text_to_image"]
    rows = []
    for row in table.rows:
        # Zero-shot CLIP is the same for every seed.
        own = [1] if row.config.model.method == "zero-shot" else seeds
        found = [runs.measured(row, row.config.replace(seed=seed), table.both_directions) for seed in own]
        rows.append(Measured(row.name, found))
    text = markdown(number, table.title, rows, directions, conditions(table, seeds))
    print(f"\n{text}", flush=True)
    name = f"{number}-{table.rows[0].config.data.dataset}"
    files: dict[str, bytes] = {
        f"{name}.md": text.encode(),
        f"{name}.csv": comma_separated(number, rows, directions, seeds).encode(),
    }
    if number == "figure6":
        files[f"{name}.png"] = sweep_plot(rows, f"{label(number)}. {table.title}")
    elif number == "figure7":
        files[f"{name}.png"] = found_images(table, runs)
    elif not table.both_directions:
        files[f"{name}.png"] = bars(rows, f"{label(number)}. {table.title}")
    save(options.output, files)


def found_images(table: Table, runs: Runs) -> bytes:
    """Figure 7: what zero-shot CLIP and UP-Person find for the same captions."""
    config = table.rows[0].config
    model = load_model(runs.place(config) / BEST)
    device, precision = resources(config.replace(**runs.settings).train)
    test = read_splits(config.data)["test"]
    adapted = evaluate(model.to(device), test, precision=precision)
    with model.zero_shot():
        frozen = evaluate(model, test, precision=precision)
    return top_ten(test, {"zero-shot CLIP": frozen.top, "UP-Person": adapted.top}, shown=3)


def write_costs(setting: Setting, dataset: str, options: argparse.Namespace) -> None:
    """Prints and writes Table IV, of the setting's model; of ViT-B/16 as well where that is another."""
    parts = [(setting, dataset, REAL_BATCH if options.data_root else EMBEDDED_BATCH)]
    if not options.data_root:
        parts.append((real_setting(Path()), FULL_SIZE, FULL_SIZE_BATCH))
    device, precision = resources(setting[dataset].replace(device=options.device).train)
    tables: dict[str, dict[str, Any]] = {}
    for source, name, batch in parts:
        model = source[name].model
        title = f"{model.model}, {model.image_size[0]}×{model.image_size[1]}, batch {batch}"
        for method, config in efficiency.methods(source, name).items():
            print(f"measuring {method}, {title}", file=sys.stderr, flush=True)
            # What the weights are changes no cost, and random ones need no download.
            config = config.replace(device=options.device, pretrained="none")
            tables.setdefault(title, {})[method] = efficiency.measure_apart(config, batch)
    text = costs_markdown(tables, f"Measured on {device.type} in {precision}, with random images and captions of full "
                                  "length; memory is what forward and backward pass allocate, gradients included; "
                                  "FLOPs of inference at batch 1, low-rank updates merged in them.")
    print(f"\n{text}", flush=True)
    save(options.output, {f"IV-{dataset}.md": text.encode(), f"IV-{dataset}.csv": costs_csv(tables).encode()})


def conditions(table: Table, seeds: Sequence[int]) -> str:
    config, datasets = table.rows[0].config, {row.config.data.dataset for row in table.rows}
    spread = f"{len(seeds)} seeds, mean ± standard deviation" if len(seeds) > 1 else "one seed"
    size = f", {config.data.embedded_identities[0]:,} identities to train on" if config.data.is_drawn else ""
    return (f"Percent on the test split; {spread}; the epoch that is best on the validation split (the last one where "
            f"there is none); model {config.model.model}, {config.train.epochs} epochs{size}"
            + ("." if len(datasets) == 1 else "; each data set with its own preset."))


def described(config: Config) -> str:
    base = f"{config.model.title}, {config.data.dataset}, seed {config.train.seed}"
    return base + (f", {config.train.losses}" if config.train.losses != "sdm" else "")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def save(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    print(f"in {folder}: {', '.join(files)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
