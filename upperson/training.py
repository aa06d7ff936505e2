"""The whole job: read, check, build, measure zero-shot, train, select, test, report. It can be killed and resumed."""

import itertools
from pathlib import Path

import torch

from kernels.backend import resolve
from upperson.config import Config
from upperson.data import DataError, ImageCache, Sample, check_images
from upperson.distributed import Group, contact, process_group
from upperson.interruption import Interruption
from upperson.model import UPPerson
from upperson.resources import resources
from upperson.results import RunResult, announce, count, results_of, write_results
from upperson.retrieval import search
from upperson.run_folder import RunError, claim_folder, refuse_used_folder, saved_state
from upperson.splits import read_splits
from upperson.trainer import Training


def fit(config: Config) -> RunResult:
    """Trains, selects and tests UP-Person as `config` says, and writes everything to one run folder.

    Started by torchrun, all processes call it alike; each trains on its share of every batch, the results are those of
    one process, and the first of them writes. The run folder must be one that all of them see.

    Raises DataError, BackboneError, CheckpointError or RunError for what the user can mend, OSError where nothing
    can be written, RunInterrupted after Ctrl-C. A run that was stopped in any way, by SIGKILL too, continues with
    `resume=True` and ends with the numbers of a run that was not.
    """
    group = Group.of_environment()
    device, precision = resources(config.train, group)
    try:
        resolve(None if config.model.backend == "auto" else config.model.backend, torch.empty(0, device=device))
    except RuntimeError as error:
        raise RunError(f"backend: {error}") from error
    if config.train.batch_size < group.world_size:
        raise RunError(f"batch_size: {config.train.batch_size} pairs leave some of {group.world_size} processes "
                       "without any; raise --batch-size or start fewer processes")
    with contact(lambda: "before anything was saved; its own message says why it ended"), process_group(group, device):
        return _fit(config, group, device, precision)


def _fit(config: Config, group: Group, device: torch.device, precision: str) -> RunResult:
    run_dir, saved = config.train.run_dir, None
    if config.train.resume:
        saved = saved_state(config)
    elif run_dir is not None and group.is_main:
        refuse_used_folder(run_dir)

    splits = read_splits(config.data)
    torch.manual_seed(config.train.seed)
    model = UPPerson(config.model).to(device)
    if not model.trained_parameters() and config.model.method != "zero-shot":
        raise RunError("nothing to train: prefix, lora, the adapters and their depths leave no module in any block; "
                       "--method zero-shot evaluates without training")
    cache = read_images(config, list(itertools.chain.from_iterable(splits.values())), group)
    if not config.train.resume:
        run_dir = group.broadcast(claim_folder(config) if group.is_main else None)
    announce(config, model, splits, run_dir, device, precision, group)

    if config.model.method == "zero-shot":
        return measure(config, model, splits["test"], run_dir, precision, group, cache)
    interruption = Interruption(group)
    training = Training(config, model, splits, run_dir, device, precision, interruption, group, cache)
    with contact(training.position):
        with interruption:
            if saved is None:
                training.measure_zero_shot()
            else:
                training.load_state(saved)
            training.start_clock()
            while training.progress.epoch <= config.train.epochs:
                training.train_epoch()
                training.finish_epoch()
        return training.finish()


def read_images(config: Config, samples: list[Sample], group: Group) -> ImageCache | None:
    """Makes or opens the cache of the images, where one is wanted; else opens each image once, where that is."""
    if config.data.is_drawn:
        return None
    if config.data.image_cache is None:
        if config.data.check_images:
            check_images(group.own(samples))
        group.wait()
        return None
    if not group.is_main:  # the first process makes it for all
        group.wait()
    images = [sample.image for sample in samples]
    try:
        cache = ImageCache.open(images, config.model.image_size, config.data.image_cache, progress=group.is_main)
    except DataError:
        check_images(samples)  # names more than the first
        raise
    if group.is_main:
        group.wait()
    return cache


def measure(
    config: Config,
    model: UPPerson,
    test: list[Sample],
    run_dir: Path,
    precision: str,
    group: Group,
    cache: ImageCache | None,
) -> RunResult:
    """The results of a model that is not trained, and a checkpoint that says so."""
    retrieval = search(config, model, test, precision, group, cache)
    results = results_of(
        config,
        test,
        retrieval.metrics,
        retrieval.metrics,
        selection="none",
        epoch=0,
        trained_parameters=0,
        all_parameters=count(model.parameters()),
    )
    if group.is_main:
        write_results(run_dir, config, {}, results, test, retrieval)
    group.wait()
    return RunResult(run_dir, results)
