"""The whole job: settle the configuration, read the data, build the model, train each stage, report."""

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from upperson.config import Config
from upperson.data import ImageCache, Sample, check_images, read_splits
from upperson.errors import DataError, MethodError, RunError, RunInterrupted
from upperson.evaluate.embed import evaluate
from upperson.evaluate.evaluation import name_of
from upperson.evaluate.pictures import curve, shown_queries, top_ten
from upperson.evaluate.results import RESULTS, Results
from upperson.evaluate.tables import short, text
from upperson.files import require_folder, write_atomically
from upperson.losses.names import parse_losses
from upperson.machine import Group, contact, device_and_precision, enough_memory, process_group
from upperson.methods import Stage
from upperson.model import AdaptedCLIP
from upperson.model.adapted_clip import nothing_to_train, require_backend
from upperson.model.checkpoint import parameters_to_start_from, save_checkpoint
from upperson.train.interruption import Interruption
from upperson.train.log import METRICS_FILE, history_of
from upperson.train.loop import SHOWN_QUERIES, Job, Training, build_objective, conclude, optimizer_of
from upperson.train.resume import RESUME, changes_of_data, load_state
from upperson.train.run_folder import (
    BEST,
    CONFIG,
    CURVE,
    LAST,
    TOP_TEN,
    claim_folder,
    locked,
    refuse_used,
    remove_leftovers,
    require_same_run,
    require_same_stage,
    write_configuration,
)


@dataclass(frozen=True)
class Run:
    """A finished run."""

    run_dir: Path
    results: Results


def fit(config: Config) -> Run:
    """Trains and tests the method of `config` in all its stages, and writes everything to one run folder.

    A method without stages has a single stage, whose folder is the run folder. All processes of torchrun call this
    function: each trains on its share of every batch, the results are those of one process, and the first process
    writes. All processes need access to the run folder.

    Raises DataError, BackboneError, MethodError, CheckpointError or RunError for errors that the user can correct,
    OSError for a file that cannot be written, and RunInterrupted after Ctrl-C, SIGTERM or SIGHUP. A run interrupted in
    any way, also by SIGKILL, is resumed with `resume=True`; its results are those of an uninterrupted run.
    """
    config = config.settled()
    group = Group.from_environment()
    device, precision = device_and_precision(config.train.device, config.train.precision, group)
    require_settings(config, group, device)
    where = "before anything was saved; see the message of that process"
    with contact(lambda: where), process_group(group, device), ExitStack() as lock:
        stages, resume = config.stages(), config.train.resume
        require_folders(config, stages, group)
        if resume and group.is_main:
            occupy(config, stages, lock)
        splits = read_splits(config.data)
        # An invalid model raises an error before images are read and a folder is created.
        first = None if resume else build_first(stages, splits["train"], device)
        cache = read_images(config, list(itertools.chain.from_iterable(splits.values())), group)
        run_dir = config.train.run_dir
        if not resume:
            run_dir = group.broadcast(occupy(config, stages, lock) if group.is_main else None)
        assert run_dir is not None  # ensured by require_folders
        job = Job(run_dir, group, device, precision, splits, cache, Interruption(group))

        finished: list[Results] = []
        for number, (stage, own) in enumerate(stages, 1):
            folder = run_dir / stage.name
            title = f"stage {number} of {len(stages)}: {stage.title}" if len(stages) > 1 else f"{run_dir}"
            begun, done = group.broadcast([(folder / name).exists() for name in (CONFIG, RESULTS)])
            if resume:
                require_same_data(folder, job)
            if done:
                results = Results.read(folder / RESULTS)
                group.print(f"{title}, is finished; test {short(results.text_to_image)}")
            else:
                if job.interruption.agreed:
                    raise RunInterrupted(
                        f"stopped before {title}; resume with --resume {run_dir}", job.interruption.agreed
                    )
                if len(stages) > 1:
                    group.print(f"\n{title}")
                    start_from = run_dir / stages[number - 2][0].name / BEST if number > 1 else config.train.start_from
                    own = own.replace(start_from=start_from, resume=begun)
                own = own.replace(run_dir=folder)
                model = first if number == 1 and first is not None else build_model(own).to(device)
                results = train(own, model, job, folder)
            finished.append(results.replace(stage=stage.name, title=stage.title) if stage.name else results)

        results = finished[0]
        if len(stages) > 1:
            results = combine(config, finished)
            if group.is_main:
                write_combined(job, [stage for stage, _ in stages], results)
        elif done:
            group.print(text(results))
        group.wait()
        return Run(run_dir, results)


def train(config: Config, model: AdaptedCLIP, job: Job, folder: Path) -> Results:
    """Trains one stage, from the start or from its saved state."""
    saved = load_state(folder) if config.train.resume else None
    if saved is None and (folder / LAST).exists():  # the state is always saved before the checkpoints
        raise RunError(
            f"{folder / RESUME} is missing, but {LAST} of this run is there, which a training from the start would "
            "overwrite; restore the file, or start another run"
        )
    start: dict[str, Tensor] = {}
    if saved is None and config.train.start_from is not None:
        start = parameters_to_start_from(config.train.start_from, config, model)
    if job.group.is_main and folder != job.run_dir:
        write_configuration(folder, config)
    job.group.wait()
    announce(config, model, job, folder, start)
    if not config.model.method.trains:
        return evaluate_zero_shot(config, model, job, folder)
    training = Training(config, model, job, folder)
    with contact(training.position), enough_memory(training.memory), closing(training.log):
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


def require_settings(config: Config, group: Group, device: torch.device) -> None:
    """Raises RunError for a configuration that cannot be trained on this machine."""
    method = config.model.method
    if method.continues and config.train.start_from is None and not config.train.resume:
        raise RunError(
            f"start_from: with these options --method {method.name} continues an earlier training; expected its "
            "checkpoint, --start-from RUN_DIR/best.safetensors"
        )
    require_backend(config.model.backend, device)
    if config.train.tensorboard and find_spec("tensorboard") is None:
        raise RunError("tensorboard: the package is not installed; pip install 'upperson[tensorboard]'")
    if config.train.batch_size < group.world_size:
        raise RunError(
            f"batch_size: {config.train.batch_size} pairs are too few for {group.world_size} processes; raise "
            "--batch-size or start fewer processes"
        )


def require_folders(config: Config, stages: Sequence[tuple[Stage, Config]], group: Group) -> None:
    """Raises RunError for a used run folder, and for a missing or different run to resume."""
    run_dir = config.train.run_dir
    if config.train.resume:
        if run_dir is None:
            raise RunError("run_dir: expected the folder of the run to resume, found none")
        require_same_run(config, run_dir)
        for number, (stage, own) in enumerate(stages):
            if stage.name:
                require_same_stage(own, run_dir / stage.name, first=number == 0)
    elif run_dir is not None and group.is_main:
        require_folder(run_dir, "run_dir")
        refuse_used([run_dir, *(run_dir / stage.name for stage, _ in stages)])


def occupy(config: Config, stages: Sequence[tuple[Stage, Config]], lock: ExitStack) -> Path:
    """Locks the run folder as long as `lock` is open; a new run also creates it and writes its configuration there.

    Raises RunError for a folder that another process uses, or, for a new run, has used since `require_folders`.
    """
    run_dir = claim_folder(config)
    lock.enter_context(locked(run_dir))
    folders = list(dict.fromkeys([run_dir, *(run_dir / stage.name for stage, _ in stages)]))
    for folder in folders:
        remove_leftovers(folder)
    if not config.train.resume:
        refuse_used(folders)
        write_configuration(run_dir, config.replace(run_dir=run_dir))
    return run_dir


def require_same_data(folder: Path, job: Job) -> None:
    """Raises RunError if the data is not that of the state in `folder`; prints a warning if this is unknown."""
    path = folder / RESUME
    changes = job.group.broadcast(changes_of_data(folder, job.fingerprint) if job.group.is_main else [])
    if changes is None:
        job.group.print(f"warning: {path} is of an earlier version; whether the data has changed could not be checked")
    elif changes:
        raise RunError(
            f"{path}: the run was saved with other data: {'; '.join(changes)}; restore the data, or start another run"
        )


def build_model(config: Config) -> AdaptedCLIP:
    """The model with the initial values of the seed, and with its frozen parameters.

    Raises RunError if no parameter is left to train, and MethodError for losses that the method does not have.
    """
    torch.manual_seed(config.train.seed)
    model = AdaptedCLIP(config.model)
    require_losses(config, model)
    model.freeze(config.train.freeze)
    if config.model.method.trains and not model.trained_parameters():
        raise RunError(nothing_to_train(config.model, config.train.freeze))
    return model


def require_losses(config: Config, model: AdaptedCLIP) -> None:
    """Raises MethodError for a balance loss without experts, or with a method that would leave out tokens it counts."""
    if "balance" not in parse_losses(config.train.losses):
        return
    method = config.model.method
    if not model.mixtures():
        raise MethodError(f"losses: balance needs experts among which tokens choose; method {method.name} has none")
    if method.savings:
        raise MethodError(
            f"losses: balance counts all tokens, but method {method.name} allows {' and '.join(method.savings)}"
        )


def build_first(stages: Sequence[tuple[Stage, Config]], samples: Sequence[Sample], device: torch.device) -> AdaptedCLIP:
    """The model of the first stage, after checks of its learning rates, its starting checkpoint and the later stages.

    samples: the training split.
    """
    (_, config), *later = stages
    model = build_model(config)
    if config.model.method.trains:
        with torch.random.fork_rng(devices=[]):  # the training builds its own
            objective = build_objective(config, model, (sample.person_id for sample in samples))
        optimizer_of(config, model, objective)
    if config.train.start_from is not None:
        parameters_to_start_from(config.train.start_from, config, model)
    for _, other in later:
        model.require_trainable(other.model, other.train.freeze)
    return model.to(device)


def read_images(config: Config, samples: list[Sample], group: Group) -> ImageCache | None:
    """Builds or opens the image cache if configured; otherwise checks each image once if configured."""
    if config.data.is_synthetic:
        return None
    if config.data.image_cache is None:
        if config.data.check_images:
            check_images(group.own(samples))
        group.wait()
        return None
    if not group.is_main:  # the first process builds the cache for all processes
        group.wait()
    images = [sample.image for sample in samples]
    try:
        cache = ImageCache.open(images, config.model.image_size, config.data.image_cache, progress=group.is_main)
    except DataError:
        check_images(samples)  # its error lists several images
        raise
    if group.is_main:
        group.wait()
    return cache


def announce(config: Config, model: AdaptedCLIP, job: Job, folder: Path, start: Mapping[str, Tensor]) -> None:
    """Prints the data and the number of trained parameters. `start`: the parameters of the starting checkpoint."""
    group = job.group
    processes = f", one of {group.world_size} processes" if group.world_size > 1 else ""
    group.print(f"run     {folder}, on {job.device}{processes} in {job.precision}")
    if config.train.frozen_weights != "auto" and config.model.method.trains and job.precision == "fp32":
        group.print("frozen_weights: has no effect in fp32")
    for split, samples in job.splits.items():
        group.print(
            f"{split:<7} {len(samples):,} captions of {len({s.image_id for s in samples}):,} images of "
            f"{len({s.person_id for s in samples}):,} identities"
        )
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    everything = sum(parameter.numel() for parameter in model.parameters())
    group.print(
        f"model   {config.model.model}; {trained:,} of {everything:,} parameters are trained "
        f"({100 * trained / everything:.1f} %)"
    )
    if start:
        others = len(model.adaptation()) - len(start)
        group.print(
            f"start   {config.train.start_from}, {len(start)} parameter tensors"
            + (f"; the other {others} have their usual initial values" if others else "")
        )


def evaluate_zero_shot(config: Config, model: AdaptedCLIP, job: Job, folder: Path) -> Results:
    """The results of an untrained model. A checkpoint without parameters is written too."""
    test = job.splits["test"]
    retrieval = evaluate(model, test, **job.evaluation(config))
    results = Results(
        method=config.model.method.title,
        model=config.model.model,
        trained_on=name_of(config.data),
        evaluated_on=name_of(config.data),
        split="test",
        captions=len(test),
        images=len({sample.image_id for sample in test}),
        text_to_image=retrieval.metrics,
        selection="none",
        epoch=0,
        epochs=0,
        all_parameters=sum(parameter.numel() for parameter in model.parameters()),
        zero_shot=retrieval.metrics,
        precision=job.precision,
    )
    if job.group.is_main:
        queries = shown_queries(test, SHOWN_QUERIES)
        picture = top_ten(test, queries, {results.method: retrieval.top[queries].tolist()})
        save_checkpoint(folder / BEST, {}, config, results.to_dict(), model.fingerprint)
        write_atomically(folder / TOP_TEN, picture)
        conclude(folder, results)
    job.group.wait()
    return results


def combine(config: Config, stages: Sequence[Results]) -> Results:
    """The results of a training in stages: those of the last stage, with the evaluations before the first stage."""
    trained = {kind: stage.trained[kind] for stage in stages for kind in stage.trained}
    return stages[-1].replace(
        method=config.model.method.title,
        zero_shot=stages[0].zero_shot,
        start=stages[0].start,
        trained=trained,
        stage=None,
        title=None,
        stages=tuple(stages),
    )


def write_combined(job: Job, stages: Sequence[Stage], results: Results) -> None:
    """Writes the usual files of a run: checkpoint and picture of the last stage; log, curve and results of all."""
    run_dir = job.run_dir
    histories = [history_of(run_dir / stage.name) for stage in stages]
    write_atomically(run_dir / CURVE, curve(histories, histories[0][0]["split"], results))
    lines = [
        {"kind": "stage", "step": number, "name": stage.stage, "title": stage.title, "split": "test"}
        | stage.text_to_image
        for number, stage in enumerate(results.stages, 1)
    ]
    write_atomically(run_dir / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))
    for name in (BEST, TOP_TEN):
        write_atomically(run_dir / name, (run_dir / stages[-1].name / name).read_bytes())
    conclude(run_dir, results)
