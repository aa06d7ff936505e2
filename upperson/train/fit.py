"""The whole job: read, check, build, measure zero-shot, train, select, test, report. It can be killed and resumed."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from upperson.errors import DataError, RunError
from upperson_kernels.backend import resolve
from upperson.model.checkpoint import parameters_to_start_from
from upperson.config import Config
from upperson.data import ImageCache, Sample, check_images
from upperson.machine import Group, contact, process_group
from upperson.train.interruption import Interruption
from upperson.model import AdaptedCLIP
from upperson.machine import device_and_precision
from upperson.train.results import RunResult, announce, count, results_of, write_results
from upperson.evaluate.embed import search
from upperson.train.run_folder import (
    claim_folder,
    refuse_used_folder,
    require_same_run,
    require_same_stage,
    saved_state,
)
from upperson.data.splits import read_splits
from upperson.train.stages import stages_of, train_stages
from upperson.train.loop import Training, build_objective


def fit(config: Config) -> RunResult:
    """Trains, selects and tests a method as `config` says, in its stages, and writes everything to one run folder.

    Started by torchrun, all processes call it alike; each trains on its share of every batch, the results are those of
    one process, and the first of them writes. The run folder must be one that all of them see.

    Raises DataError, BackboneError, MethodError, CheckpointError or RunError for what the user can mend, OSError where
    nothing can be written, RunInterrupted after Ctrl-C. A run that was stopped in any way, by SIGKILL too, continues
    with `resume=True` and ends with the numbers of a run that was not.
    """
    config, method = config.settled(), config.model.method
    if method.continues and config.train.start_from is None:
        raise RunError(
            f"start_from: with these options --method {method.name} goes on from an earlier training; "
            "expected a checkpoint of that, --start-from RUN_DIR/best.safetensors"
        )
    group = Group.of_environment()
    device, precision = device_and_precision(config.train.device, config.train.precision, group)
    try:
        resolve(None if config.model.backend == "auto" else config.model.backend, torch.empty(0, device=device))
    except RuntimeError as error:
        raise RunError(f"backend: {error}") from error
    if config.train.batch_size < group.world_size:
        raise RunError(
            f"batch_size: {config.train.batch_size} pairs leave some of {group.world_size} processes "
            "without any; raise --batch-size or start fewer processes"
        )
    with contact(lambda: "before anything was saved; its own message says why it ended"), process_group(group, device):
        return _fit(config, group, device, precision)


@dataclass(frozen=True)
class Job:
    """Where a training takes place and what it reads: the same in all its stages."""

    group: Group
    device: torch.device
    precision: str
    splits: dict[str, list[Sample]]
    images: Callable[[], ImageCache | None]  # checks them all when it is called first
    interruption: Interruption


def _fit(config: Config, group: Group, device: torch.device, precision: str) -> RunResult:
    run_dir, stages = config.train.run_dir, stages_of(config)
    if config.train.resume:
        require_same_run(config)
        for stage, of_stage in stages:
            require_same_stage(of_stage, run_dir / stage.name)
    elif run_dir is not None and group.is_main:
        for place in (run_dir, *(run_dir / stage.name for stage, _ in stages)):
            refuse_used_folder(place)
    splits = read_splits(config.data)
    samples = list(itertools.chain.from_iterable(splits.values()))
    images = functools.cache(lambda: read_images(config, samples, group))
    job = Job(group, device, precision, splits, images, Interruption(group))
    if not stages:
        return train(config, job)
    trained_parameters = trained_in_stages(config, splits)
    images()
    run_dir = own_folder(config, group)
    return train_stages(
        config,
        run_dir,
        lambda of_stage: train(of_stage, job, whole=run_dir),
        trained_parameters,
        group,
        job.interruption,
    )


def trained_in_stages(config: Config, splits: dict[str, list[Sample]]) -> int:
    """How many parameters are trained in one stage or another. Each is built for that before the first is trained, so
    that what cannot be built is known at once.
    """
    sizes: dict[str, int] = {}
    for number, (_, of_stage) in enumerate(stages_of(config)):
        model = build_model(of_stage)
        if number == 0 and not config.train.resume:
            start_of(of_stage, model)
        parameters = model.trained_parameters() | build_objective(of_stage, model, splits).trained_parameters()
        sizes |= {name: parameter.numel() for name, parameter in parameters.items()}
    return sum(sizes.values())


def train(config: Config, job: Job, whole: Path | None = None) -> RunResult:
    """One run. `whole`: the folder to resume, where the run is a stage of what that holds."""
    group, splits = job.group, job.splits
    saved = saved_state(config.train.run_dir) if config.train.resume else None
    model = build_model(config).to(job.device)
    start = start_of(config, model) if saved is None else {}
    cache = job.images()
    run_dir = own_folder(config, group)
    announce(config, model, splits, run_dir, job.device, job.precision, group, start)

    if not config.model.method.trains:
        return measure(config, model, splits["test"], run_dir, job.precision, group, cache)
    training = Training(
        config, model, splits, run_dir, job.device, job.precision, job.interruption, group, cache, whole=whole
    )
    with contact(training.position):
        with job.interruption:
            if saved is None:
                training.begin(start)
            else:
                training.load_state(saved)
            training.start_clock()
            while training.progress.epoch <= config.train.epochs:
                training.train_epoch()
                training.finish_epoch()
        return training.finish()


def build_model(config: Config) -> AdaptedCLIP:
    """The model with its initial values, which the seed decides, and what is frozen in it. It has something to train,
    unless the method is none that does.
    """
    torch.manual_seed(config.train.seed)
    model = AdaptedCLIP(config.model)
    model.freeze(config.train.freeze)
    method = config.model.method
    if method.trains and not model.trained_parameters():
        raise RunError(
            f"nothing to train: the options of --method {method.name}"
            f"{' and --freeze' if config.train.freeze else ''} leave no parameter"
        )
    return model


def start_of(config: Config, model: AdaptedCLIP) -> dict[str, Tensor]:
    """The parameters of the checkpoint that a training starts from; none, where there is no checkpoint."""
    path = config.train.start_from
    return {} if path is None else parameters_to_start_from(path, config, model)


def own_folder(config: Config, group: Group) -> Path:
    """The run folder: that of the run that is resumed, or a new one."""
    if config.train.resume:
        return config.train.run_dir
    return group.broadcast(claim_folder(config) if group.is_main else None)


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
    model: AdaptedCLIP,
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
