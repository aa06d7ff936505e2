"""The whole job: read, check, build, measure zero-shot, train, select, test, report. It can be killed and resumed."""

import importlib.util
import itertools
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kernels.backend import resolve
from upperson import report, run_folder
from upperson.checkpoint import copy_parameters, save_checkpoint, save_resume_state, write_atomically
from upperson.config import SELECTIONS, Config, TrainConfig
from upperson.data import Sample, batches_per_epoch, check_images, train_loader
from upperson.interruption import Interruption
from upperson.metrics import Retrieval
from upperson.model import UPPerson
from upperson.objective import Objective
from upperson.optimization import build_optimizer, build_schedule
from upperson.retrieval import autocast, evaluate
from upperson.run_folder import MetricsLog, RunError, claim_folder, refuse_used_folder, saved_state
from upperson.splits import read_splits


class Diverged(RunError):
    """A loss or a gradient that is no finite number."""


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run, and its state was saved."""


@dataclass(frozen=True)
class RunResult:
    """Where everything lies, and what results.json holds."""

    run_dir: Path
    results: dict[str, Any]


@dataclass
class Progress:
    """Where a run stands, and what it has found so far."""

    epoch: int = 1  # the one that is being trained, or next
    batch: int = 0  # batches of it that are done
    step: int = 0  # optimizer steps in all
    loss_sum: float = 0.0  # over the batches of this epoch
    zero_shot: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # one evaluation an epoch, 0: zero-shot
    log_bytes: int = 0  # length of metrics.jsonl


def fit(config: Config) -> RunResult:
    """Trains, selects and tests UP-Person as `config` says, and writes everything to one run folder.

    Raises DataError, BackboneError, CheckpointError or RunError for what the user can mend, OSError where nothing
    can be written, RunInterrupted after Ctrl-C. A run that was stopped in any way, by SIGKILL too, continues with
    `resume=True` and ends with the numbers of a run that was not.
    """
    device, precision = resources(config.train)
    try:
        resolve(None if config.model.backend == "auto" else config.model.backend, torch.empty(0, device=device))
    except RuntimeError as error:
        raise RunError(f"backend: {error}") from error
    saved = saved_state(config) if config.train.resume else None
    if config.train.run_dir is not None and not config.train.resume:
        refuse_used_folder(config.train.run_dir)

    splits = read_splits(config.data)
    torch.manual_seed(config.train.seed)
    model = UPPerson(config.model).to(device)
    if not model.trained_parameters() and config.model.method != "zero-shot":
        raise RunError("nothing to train: prefix, lora, the adapters and their depths leave no module in any block; "
                       "--method zero-shot evaluates without training")
    if config.data.check_images and not config.data.is_drawn:
        check_images(itertools.chain.from_iterable(splits.values()))
    run_dir = config.train.run_dir if config.train.resume else claim_folder(config)
    announce(config, model, splits, run_dir, device, precision)

    if config.model.method == "zero-shot":
        return measure(config, model, splits["test"], run_dir, precision)
    with Interruption() as interruption:
        training = Training(config, model, splits, run_dir, device, precision, interruption)
        if saved is None:
            training.measure_zero_shot()
        else:
            training.load_state(saved)
        training.start_clock()
        while training.progress.epoch <= config.train.epochs:
            training.train_epoch()
            training.finish_epoch()
    return training.finish()


def measure(config: Config, model: UPPerson, test: list[Sample], run_dir: Path, precision: str) -> RunResult:
    """The results of a model that is not trained, and a checkpoint that says so."""
    retrieval = search(config, model, test, precision)
    results = {
        "method": config.model.title,
        "dataset": config.data.dataset,
        "split": "test",
        "selection": "none",
        "selection_meaning": SELECTIONS["none"],
        "epoch": 0,
        "epochs": 0,
        "queries": len(test),
        "gallery": len({s.image_id for s in test}),
        "trained_parameters": 0,
        "all_parameters": count(model.parameters()),
        "zero_shot": retrieval.metrics,
        "adapted": retrieval.metrics,
    }
    save_checkpoint(run_dir / run_folder.BEST, {}, config, results)
    return write_results(run_dir, results, test, retrieval)


def search(config: Config, model: UPPerson, samples: list[Sample], precision: str) -> Retrieval:
    """What the captions of `samples` find among their images, embedded as `config` says."""
    return evaluate(
        model,
        samples,
        batch_size=config.train.evaluate_batch_size,
        workers=config.data.workers,
        precision=precision,
    )


def write_results(run_dir: Path, results: dict[str, Any], test: list[Sample], retrieval: Retrieval) -> RunResult:
    write_atomically(run_dir / run_folder.RESULTS, (json.dumps(results, indent=2) + "\n").encode())
    write_atomically(run_dir / run_folder.TABLE, report.markdown(results).encode())
    write_atomically(run_dir / run_folder.TOP_TEN, report.top_ten(test, {results["method"]: retrieval.top}))
    written = [name for name in run_folder.SHOWN if (run_dir / name).exists()]
    print(f"\n{report.text(results)}\n\nin {run_dir}: {', '.join(written)}", flush=True)
    return RunResult(run_dir, results)


class Training:
    """Model, optimizer and position of a run, and how they move, are saved and come back."""

    def __init__(
        self,
        config: Config,
        model: UPPerson,
        splits: dict[str, list[Sample]],
        run_dir: Path,
        device: torch.device,
        precision: str,
        interruption: Interruption,
    ):
        self.config, self.model, self.splits, self.run_dir = config, model, splits, run_dir
        self.device, self.precision, self.interruption = device, precision, interruption
        self.objective = Objective(
            config.train.losses,
            temperature=config.train.temperature,
            width=model.embedding_width,
            vocabulary=model.tokenizer.vocab_size,
            person_ids=(sample.person_id for sample in splits["train"]),
        ).to(device)
        self.adaptation = model.trained_parameters()  # what checkpoints hold
        self.parameters = self.adaptation | self.objective.trained_parameters()
        self.optimizer = build_optimizer(self.parameters, config.train)
        self.schedule = build_schedule(self.optimizer, config.train)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.selection = config.train.selection
        if self.selection == "val" and "val" not in splits:
            self.selection = "last"
        self.watched = "val" if self.selection == "val" else "test"  # the split that is evaluated every epoch
        self.loader = train_loader(
            splits["train"],
            tokenizer=model.tokenizer,
            image_size=config.model.image_size,
            mean=model.image_mean,
            std=model.image_std,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            mask_captions=config.data.mask_captions,
            mask_labels=self.objective.mlm is not None,
            workers=config.data.workers,
            epoch=1,
        )
        self.log = MetricsLog(run_dir, config.train.tensorboard)

    def measure_zero_shot(self) -> None:
        """The frozen backbone alone, on the test split and on the split that is watched."""
        self.log.start(after=0)
        with self.model.zero_shot():
            self.progress.zero_shot = self.evaluate("test").metrics
            watched = self.progress.zero_shot if self.watched == "test" else self.evaluate(self.watched).metrics
        self.progress.history.append({"epoch": 0, **watched})
        for split, metrics in {"test": self.progress.zero_shot, self.watched: watched}.items():
            self.log.write("zero_shot", 0, split=split, **metrics)
        print(f"zero-shot CLIP   {self.watched} {short(watched)}", flush=True)
        self.save_state()

    def train_epoch(self) -> None:
        """The batches of this epoch that are still to do."""
        progress, settings = self.progress, self.config.train
        batches = batches_per_epoch(len(self.splits["train"]), settings.batch_size)
        images = min(len(self.splits["train"]), batches * settings.batch_size)
        images_before = progress.batch * settings.batch_size
        self.loader.batch_sampler.set_epoch(progress.epoch, progress.batch)
        started = time.monotonic()
        with tqdm(
            total=images,
            initial=images_before,
            desc=f"epoch {progress.epoch}/{settings.epochs}",
            unit="image",
            leave=False,
            disable=None,
        ) as bar:
            for batch in self.interruption.pass_on(self.loader):
                measured = self.step(batch)
                progress.batch += 1
                progress.step += 1
                progress.loss_sum += measured["loss"]
                bar.set_postfix(loss=f"{measured['loss']:.3f}", refresh=False)
                bar.update(len(batch["person_ids"]))
                if progress.step % settings.log_every == 0:
                    self.log.write(
                        "step",
                        progress.step,
                        epoch=progress.epoch,
                        **measured,
                        learning_rate=self.learning_rate,
                    )
                # The end of an epoch saves by itself, when the epoch has been evaluated.
                if settings.save_every and progress.step % settings.save_every == 0 and progress.batch < batches:
                    self.save_state()
        if progress.batch < batches:
            self.stop()
        seconds = time.monotonic() - started
        self.log.write(
            "epoch",
            progress.step,
            epoch=progress.epoch,
            loss=progress.loss_sum / batches,
            images_per_second=(images - images_before) / seconds,
        )

    def step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One optimizer step; the loss before it, its parts where it is a sum, and the norm of its gradient."""
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(self.device, self.precision):
            loss, parts = self.objective(self.model, batch)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        tensors = {"loss": loss, "gradient_norm": nn.utils.get_total_norm(gradients)}
        if len(parts) > 1:
            tensors |= {f"loss_{name}": part for name, part in parts.items()}
        # One transfer for all.
        measured = dict(zip(tensors, torch.stack([t.detach().float() for t in tensors.values()]).tolist(), strict=True))
        checked = {"loss": "loss"}
        if not self.scaler.is_enabled():  # in fp16 gradients may overflow; the scaler then skips the step
            checked["gradient_norm"] = "gradient's norm"
        for name, words in checked.items():
            if not math.isfinite(measured[name]):
                raise Diverged(
                    f"epoch {self.progress.epoch}, step {self.progress.step + 1}: the {words} is {measured[name]}, and "
                    f"the step was not taken. What was saved in {self.run_dir} before is good and stays. A lower "
                    "--learning-rate, a longer --warmup-epochs or --precision fp32 may help"
                )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return measured

    def finish_epoch(self) -> None:
        """Evaluates, keeps the best parameters, and saves."""
        progress, epochs = self.progress, self.config.train.epochs
        metrics = self.evaluate(self.watched).metrics
        best_so_far = max((entry["R@1"] for entry in progress.history[1:]), default=-1.0)
        if self.selection == "last" or metrics["R@1"] > best_so_far:
            progress.best_epoch = progress.epoch
            self.best = {name: parameter.detach().cpu().clone() for name, parameter in self.adaptation.items()}
        loss = progress.loss_sum / progress.batch
        progress.history.append({"epoch": progress.epoch, "loss": loss, **metrics})
        self.log.write("evaluation", progress.step, epoch=progress.epoch, split=self.watched, **metrics)
        print(
            f"epoch {progress.epoch:>{len(str(epochs))}}/{epochs}   loss {loss:7.4f}   {self.watched} "
            f"{short(metrics)}   {self.time_left()} left",
            flush=True,
        )

        self.schedule.step()
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self.save_state()
        self.save_checkpoints()
        if self.interruption.requested and progress.epoch <= epochs:
            self.stop()

    def finish(self) -> RunResult:
        """Tests the selected epoch and writes the results, the curve and the picture."""
        progress = self.progress
        copy_parameters(self.best, self.adaptation, run_folder.RESUME)
        retrieval = self.evaluate("test")
        results = {
            "method": self.config.model.title,
            "dataset": self.config.data.dataset,
            "split": "test",
            "selection": self.selection,
            "selection_meaning": SELECTIONS[self.selection],
            "epoch": progress.best_epoch,
            "epochs": self.config.train.epochs,
            "losses": self.config.train.losses,
            "seed": self.config.train.seed,
            "queries": len(self.splits["test"]),
            "gallery": len({s.image_id for s in self.splits["test"]}),
            "trained_parameters": count(self.parameters.values()),
            "all_parameters": count(self.model.parameters()) + count(self.objective.parameters()),
            "zero_shot": progress.zero_shot,
            "adapted": retrieval.metrics,
        }
        self.log.write("result", progress.step, epoch=progress.best_epoch, split="test", **retrieval.metrics)
        self.log.close()
        save_checkpoint(self.run_dir / run_folder.BEST, self.best, self.config, results)
        write_atomically(self.run_dir / run_folder.CURVE, report.curve(progress.history, self.watched, results))
        return write_results(self.run_dir, results, self.splits["test"], retrieval)

    def evaluate(self, split: str) -> Retrieval:
        return search(self.config, self.model, self.splits[split], self.precision)

    def start_clock(self) -> None:
        """From here on, time is measured for `time_left`."""
        self.clock = time.monotonic(), self.epochs_done()

    def epochs_done(self) -> float:
        batches = batches_per_epoch(len(self.splits["train"]), self.config.train.batch_size)
        return self.progress.epoch - 1 + self.progress.batch / batches

    def time_left(self) -> str:
        """Until the last epoch ends, at the pace of this process so far."""
        started, done_before = self.clock
        done = self.epochs_done()
        seconds = (time.monotonic() - started) / (done - done_before) * (self.config.train.epochs - done)
        return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def stop(self) -> None:
        self.save_state()
        self.log.close()
        raise RunInterrupted(
            f"stopped in epoch {self.progress.epoch} after step {self.progress.step}, all is saved; "
            f"continue with --resume {self.run_dir}"
        )

    def save_state(self) -> None:
        """Everything that the run needs to go on, in one file; nothing is ever read from another."""
        self.progress.log_bytes = self.log.sync()
        state = {
            "progress": asdict(self.progress),
            "parameters": self.parameters,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states(),
        }
        save_resume_state(self.run_dir / run_folder.RESUME, state, self.config)

    def load_state(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.log.start(self.progress.log_bytes, self.progress.step)
        copy_parameters(state["parameters"], self.parameters, str(self.run_dir / run_folder.RESUME))
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_states(state["random"])
        print(f"continuing in epoch {self.progress.epoch} after step {self.progress.step}", flush=True)

    def save_checkpoints(self) -> None:
        """The parameters of the epoch that has just ended, and of the best so far."""
        history = self.progress.history
        best = {"selection": self.selection, "split": self.watched, **history[self.progress.best_epoch]}
        save_checkpoint(self.run_dir / run_folder.BEST, self.best, self.config, best)
        last = {"selection": "last", "split": self.watched, **history[-1]}
        save_checkpoint(self.run_dir / run_folder.LAST, self.adaptation, self.config, last)


def resources(settings: TrainConfig) -> tuple[torch.device, str]:
    """The device and the precision that "auto" stands for; RunError for what this machine does not have."""
    available = torch.cuda.is_available()
    device = torch.device(settings.device if settings.device != "auto" else "cuda" if available else "cpu")
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise RunError(f"device: {settings.device} is not there; PyTorch sees {torch.cuda.device_count()} CUDA devices")
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise RunError("precision: fp16 needs a GPU; use fp32 or bf16 on a CPU")
    if settings.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RunError("tensorboard: the package is not installed; pip install 'upperson[tensorboard]'")
    return device, precision


def announce(
    config: Config,
    model: UPPerson,
    splits: dict[str, list[Sample]],
    run_dir: Path,
    device: torch.device,
    precision: str,
) -> None:
    print(f"run     {run_dir}, on {device} in {precision}")
    for split, samples in splits.items():
        print(
            f"{split:<7} {len(samples):,} captions of {len({s.image_id for s in samples}):,} images of "
            f"{len({s.person_id for s in samples}):,} identities"
        )
    trained, everything = count(model.trained_parameters().values()), count(model.parameters())
    print(
        f"model   {config.model.model}; {trained:,} of {everything:,} parameters are trained "
        f"({100 * trained / everything:.1f} %)",
        flush=True,
    )


def random_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
    }


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])


def short(metrics: dict[str, float]) -> str:
    return f"R@1 {metrics['R@1']:5.2f}  mAP {metrics['mAP']:5.2f}"


def count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
