"""The runs of a table, with one folder per run and seed. Each run is cached; an interrupted run is resumed."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import torch

from upperson.config import Config, DataConfig
from upperson.config.files import CONFIG
from upperson.data import Sample, read_splits
from upperson.errors import Diverged
from upperson.evaluate.embed import embed
from upperson.evaluate.evaluation import evaluate_checkpoint
from upperson.evaluate.results import RESULTS, Results
from upperson.files import expanded, write_atomically
from upperson.machine import SINGLE_PROCESS, device_and_precision
from upperson.model.checkpoint import load_checkpoint
from upperson.tables.rows import Row, trainings
from upperson.train.fit import build_model, fit
from upperson.train.interruption import Interruption
from upperson.train.loop import Job, Training
from upperson.train.run_folder import BEST

DIVERGED = "diverged.json"
EVALUATED = 128  # captions, with their images, that are embedded to estimate the time


class Runs:
    """The runs in a folder.

    Args:
        folder: parent of the run folders, which are named after the method and a hash of the configuration.
        settings: fields of the machine, such as device and workers, for every run.
        jobs: number of runs that are trained at once, each in its own process and on its share of the cores.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], jobs: int = 1):
        self.folder = folder
        self.settings = settings
        self.jobs = jobs

    def folder_of(self, config: Config) -> Path:
        """The folder of a run, different for every configuration, data folder and precision."""
        values: dict[str, Any] = {}
        for section in (config.model, config.model.method, config.train):
            values |= fields_that_matter(section)
        del values["seed"]
        values |= self.identity(config.data) | {"method": config.model.method.name}
        values["precision"] = precision_of(config.replace(**self.settings))
        words = re.sub(r"[^a-z0-9]+", "-", config.model.method.title.lower()).strip("-")
        return self.folder / config.data.dataset / f"{words}-{digest(values)}" / f"seed-{config.train.seed}"

    @staticmethod
    def identity(data: DataConfig) -> dict[str, Any]:
        """The fields that identify a data set."""
        values = fields_that_matter(data)
        if data.is_synthetic or data.data_root is None:
            return values
        return values | {"data_root": os.path.realpath(expanded(data.data_root))}

    def is_done(self, config: Config) -> bool:
        folder = self.folder_of(config)
        return (folder / RESULTS).exists() or (folder / DIVERGED).exists()

    def processes(self) -> ProcessPoolExecutor:
        """A pool of one process for each job, each with its share of the cores."""
        threads = max(1, torch.get_num_threads() // self.jobs)
        return ProcessPoolExecutor(
            self.jobs, multiprocessing.get_context("spawn"), initializer=begin_process, initargs=(threads,)
        )

    def train_all(self, configs: Sequence[Config], processes: ProcessPoolExecutor) -> Iterator[tuple[Config, float]]:
        """Trains runs, and yields each with its time in seconds when it has ended, in any order."""
        waiting, running = list(reversed(configs)), {}
        while waiting or running:
            # At most one run for each process is submitted, since a pool runs its queue even after Ctrl-C.
            while waiting and len(running) < self.jobs:
                config = waiting.pop()
                running[processes.submit(self.train, config)] = config
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for run in ended:
                yield running.pop(run), run.result()

    def train(self, config: Config) -> float:
        """Trains or resumes a run, and returns the time in seconds. The output is written to a log file.

        A run that diverged is recorded as a result.
        """
        begun = time.monotonic()
        folder = self.folder_of(config)
        folder.parent.mkdir(parents=True, exist_ok=True)
        config = config.replace(**self.settings, run_dir=folder, resume=(folder / CONFIG).exists())
        try:
            with ExitStack() as stack:
                log = stack.enter_context(open_log(folder))
                stack.enter_context(redirect_stdout(log))
                if self.jobs > 1:
                    stack.enter_context(redirect_stderr(log))  # several progress bars overwrite each other
                fit(config)
        except Diverged as error:
            write_atomically(folder / DIVERGED, json.dumps({"error": str(error)}))
        return time.monotonic() - begun

    def results(self, row: Row, config: Config, both_directions: bool) -> Results | None:
        """The results of a run, or of its evaluation on another data set or in both directions; None if diverged."""
        folder = self.folder_of(config)
        if (folder / DIVERGED).exists():
            return None
        results = Results.read(folder / RESULTS)
        if row.tested_on is None and not both_directions:
            return results
        tested = (row.tested_on or config).data
        output = folder / f"on-{tested.dataset}-{digest(self.identity(tested))}"
        if not (output / RESULTS).exists():
            with open_log(folder) as log, redirect_stdout(log):
                evaluate_checkpoint(
                    load_checkpoint(folder / BEST),
                    dataclasses.replace(config, data=tested).replace(**self.settings),
                    "test",
                    output,
                )
        found = Results.read(output / RESULTS)
        return results.replace(text_to_image=found.text_to_image, image_to_text=found.image_to_text)


def open_log(folder: Path) -> IO[str]:
    return open(folder.with_suffix(".log"), "a", encoding="utf-8", errors="backslashreplace")


def begin_process(threads: int) -> None:
    """Sets the number of threads of a pool process, and lets it end with the parent process, even after SIGKILL."""
    torch.set_num_threads(threads)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)  # files are written atomically, so all saved files are complete

    threading.Thread(target=follow, daemon=True).start()


def seconds_of(config: Config) -> float:
    """An estimate of the time of a run with all its stages on this machine, in seconds."""
    splits = read_splits(config.data)
    return sum(seconds_of_training(part, splits) for part in trainings(config))


def seconds_of_training(config: Config, splits: dict[str, list[Sample]]) -> float:
    """An estimate of the time of one stage in seconds, from a few training batches and a partial evaluation."""
    device, precision = device_and_precision(config.train.device, config.train.precision)
    model = build_model(config).to(device)
    watched = splits.get("val", splits["test"])
    with TemporaryDirectory() as folder:
        job = Job(Path(folder), SINGLE_PROCESS, device, precision, splits, None, Interruption())
        training = Training(config, model, job, Path(folder))
        batches, seconds = iter(training.batches), []
        for _ in range(min(3, len(training.loader))):  # the first batch includes one-time work
            started = time.monotonic()
            batch = next(batches)
            with suppress(Diverged):
                training.step(batch)
            seconds.append(time.monotonic() - started)
        step = statistics.median(seconds) / len(batch["person_ids"])
        training.log.close()
    started = time.monotonic()
    embed(model, watched[:EVALUATED], precision=precision, progress=False)
    item = (time.monotonic() - started) / len(watched[:EVALUATED])
    epochs = config.train.epochs
    return epochs * len(splits["train"]) * step + item * ((epochs + 1) * len(watched) + 2 * len(splits["test"]))


def precision_of(config: Config) -> str:
    return device_and_precision(config.train.device, config.train.precision)[1]


def fields_that_matter(section: Any) -> dict[str, Any]:
    """The fields of a section of the configuration that change results; 10 and 10.0 are equal."""
    values = {
        spec.name: getattr(section, spec.name)
        for spec in dataclasses.fields(section)
        if spec.metadata["changes_results"]
    }
    return {name: float(value) if type(value) is int else value for name, value in values.items()}


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def distinct(configs: Iterable[Config], runs: Runs) -> list[Config]:
    """The configurations in order, without those of the same run folder."""
    return list({runs.folder_of(config): config for config in configs}.values())
