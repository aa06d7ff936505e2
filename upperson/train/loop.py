"""A training: steps, epochs and evaluations, with logging, saving and resuming."""

import functools
import math
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam
from tqdm import tqdm

from upperson.config import Config
from upperson.data import DeviceBatches, ImageCache, Sample, batches_per_epoch, train_loader
from upperson.data.fingerprint import Fingerprint, fingerprint
from upperson.data.loaders import EpochBatches
from upperson.errors import CheckpointError, Diverged, RunError, RunInterrupted
from upperson.evaluate.embed import evaluate
from upperson.evaluate.evaluation import name_of
from upperson.evaluate.metrics import Retrieval
from upperson.evaluate.pictures import curve, shown_queries, top_ten
from upperson.evaluate.results import METRICS, RESULTS, TABLE, Metrics, Results
from upperson.evaluate.tables import markdown, short, text
from upperson.files import write_atomically
from upperson.losses.objective import LossesOfModel, Objective
from upperson.machine import SINGLE_PROCESS, Group, autocast, data_parallel, frozen_dtype
from upperson.model import AdaptedCLIP
from upperson.model.checkpoint import copy_parameters, save_checkpoint
from upperson.model.weights import DTYPES, mismatch, not_finite, unusable
from upperson.train.interruption import Interruption
from upperson.train.log import MetricsLog
from upperson.train.optimizer import build_optimizer, build_schedule, require_names
from upperson.train.progress import Clock, Progress
from upperson.train.resume import RESUME, random_states, save_state, set_random_states
from upperson.train.run_folder import BEST, CURVE, LAST, SHOWN, TOP_TEN

SHOWN_QUERIES = 4  # queries in the picture, each with the images of zero-shot CLIP above those of the trained model


@dataclass(frozen=True)
class Job:
    """The machine, the data and the run folder of a training, shared by all its stages."""

    run_dir: Path  # the folder that --resume takes
    group: Group
    device: torch.device
    precision: str
    splits: dict[str, list[Sample]]
    cache: ImageCache | None
    interruption: Interruption

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the data, for the saved states."""
        return fingerprint(self.splits)

    def evaluation(self, config: Config) -> dict[str, Any]:
        """The options of upperson.evaluate.embed.evaluate."""
        return {
            "batch_size": config.train.evaluate_batch_size,
            "workers": config.data.workers,
            "precision": self.precision,
            "group": self.group,
            "cache": self.cache,
        }


class Measured:
    """What a step measured: on its way from a GPU, which goes on computing, to memory that the CPU reads."""

    def __init__(self, epoch: int, step: int, names: tuple[str, ...], values: Tensor):
        self.epoch, self.step, self.names, self.values = epoch, step, names, values
        self.arrived = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict[str, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


class Training:
    """The model, optimizer and position of a run, with methods to train, evaluate, save and resume.

    Args:
        config: configuration of the run, or of one of its stages.
        model: model on the device of the job.
        job: machine and data.
        folder: folder for all written files.
    """

    def __init__(self, config: Config, model: AdaptedCLIP, job: Job, folder: Path):
        self.config = config.replace(resume=False)  # so that a resumed run writes the same files
        self.model, self.job, self.folder = model, job, folder
        self.group, self.interruption = job.group, job.interruption
        people = (sample.person_id for sample in job.splits["train"])
        self.objective = build_objective(config, model, people, job.group).to(job.device)
        if (dtype := frozen_dtype(config.train.frozen_weights, job.device, job.precision)) is not None:
            model.keep_frozen_weights(dtype)
        if config.train.compile:
            model.compile_blocks()
        self.losses = data_parallel(LossesOfModel(self.objective, model), job.group)
        self.adaptation = model.adaptation()  # the content of checkpoints
        self.state = self.adaptation | self.objective.trained_parameters()  # the parameters that a resumed run needs
        self.parameters = {name: parameter for name, parameter in self.state.items() if parameter.requires_grad}
        self.optimizer = optimizer_of(config, model, self.objective)
        self.schedule = build_schedule(self.optimizer, config.train)
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=job.precision == "fp16")
        # A GPU is still computing a step when the next one is launched; fused Adam itself skips a step.
        self.reads_later = bool(self.optimizer.defaults["fused"])
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.selection: Literal["val", "best-on-test", "last"] = config.train.selection
        if self.selection == "val" and "val" not in job.splits:
            self.selection = "last"
        self.watched = "val" if self.selection == "val" else "test"  # the split to evaluate after every epoch
        self.loader = train_loader(
            job.splits["train"],
            # Captions are truncated to the room beside prompts, so that mlm predicts no word that the model truncates.
            tokenizer=functools.partial(model.tokenizer, context_length=model.caption_length),
            pack=model.caption_packer(),
            image_size=config.model.image_size,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            mask_captions=config.data.mask_captions,
            mask_labels=self.objective.mlm is not None,
            workers=config.data.workers,
            epoch=1,
            rank=job.group.rank,
            world_size=job.group.world_size,
            cache=job.cache,
        )
        self.batches = DeviceBatches(self.loader, job.device, model.preprocess.mean, model.preprocess.std)
        self.log = MetricsLog(folder, config.train.tensorboard, writes=job.group.is_main)

    def begin(self, start: Mapping[str, Tensor]) -> None:
        """Evaluates the backbone. If there are parameters `start`, these are copied to the model and evaluated too."""
        self.log.start(after=0)
        with self.model.zero_shot():
            found = self.evaluate_before("zero_shot", "zero-shot CLIP")
        self.progress.zero_shot = found["test"].metrics
        queries = shown_queries(self.job.splits["test"], SHOWN_QUERIES)
        self.progress.zero_shot_top = found["test"].top[queries].tolist()
        if start:
            copy_parameters(start, {name: self.adaptation[name] for name in start}, str(self.config.train.start_from))
            found = self.evaluate_before("start", "start")
            self.progress.start = found["test"].metrics
        self.progress.history.append({"epoch": 0, **found[self.watched].metrics})
        self.save_state()

    def evaluate_before(self, kind: str, name: str) -> dict[str, Retrieval]:
        """Evaluates the test split and the watched split before the first epoch; logs and prints the metrics."""
        found = {split: self.evaluate(split) for split in dict.fromkeys(("test", self.watched))}
        for split, retrieval in found.items():
            self.log.write(kind, 0, split=split, **retrieval.metrics)
        self.group.print(f"{name:<14}   {self.watched} {short(found[self.watched].metrics)}")
        return found

    def train_epoch(self) -> None:
        """Trains on the remaining batches of this epoch."""
        progress, settings = self.progress, self.config.train
        batches = batches_per_epoch(len(self.job.splits["train"]), settings.batch_size)
        images = min(len(self.job.splits["train"]), batches * settings.batch_size)
        images_before = progress.batch * settings.batch_size
        cast(EpochBatches, self.loader.batch_sampler).set_epoch(progress.epoch, progress.batch)
        started = time.monotonic()
        with tqdm(
            total=images,
            initial=images_before,
            desc=f"epoch {progress.epoch}/{settings.epochs}",
            unit="image",
            leave=False,
            disable=None if self.group.is_main else True,
        ) as bar:
            launched: list[Measured] = []  # steps whose values have not been read
            for batch in self.interruption.pass_on(self.batches):
                pairs = min(settings.batch_size, len(self.job.splits["train"]) - progress.batch * settings.batch_size)
                launched.append(self.launch(batch, pairs))
                progress.batch += 1
                progress.step += 1
                bar.update(pairs)
                # The state after the last batch is saved after the evaluation.
                saves = settings.save_every and progress.step % settings.save_every == 0 and progress.batch < batches
                while len(launched) > (self.reads_later and not saves):
                    self.record(launched.pop(0), bar)
                if saves:
                    self.save_state()
            for measured in launched:
                self.record(measured, bar)
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

    def step(self, batch: dict[str, Tensor], pairs: int | None = None) -> dict[str, float]:
        """One optimizer step. Returns the loss before the step, the parts of a summed loss, and the gradient's norm.

        `batch`, from `self.batches`, is this process's share of `pairs` pairs; None: the whole batch.
        """
        return self.read(self.launch(batch, pairs))

    def record(self, measured: "Measured", bar: tqdm) -> None:
        """Reads, sums and logs the values of a step."""
        values = self.read(measured)
        self.progress.loss_sum += values["loss"]
        bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        if measured.step % self.config.train.log_every == 0:
            self.log.write("step", measured.step, epoch=measured.epoch, **values, learning_rate=self.learning_rate)

    def launch(self, batch: dict[str, Tensor], pairs: int | None = None) -> "Measured":
        """One optimizer step, whose values are to be read. A GPU is not waited for.

        A step whose loss or gradient is not finite changes no parameter.
        """
        with autocast(self.job.device, self.job.precision):
            loss, parts = self.losses(batch, pairs)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        tensors = {"loss": loss, "gradient_norm": nn.utils.get_total_norm(gradients)}
        if len(parts) > 1:
            tensors |= {f"loss_{name}": part for name, part in parts.items()}
        tensors["stop"] = self.interruption.any_requested(self.job.device)
        values = torch.stack([tensor.detach().float() for tensor in tensors.values()])
        measured = Measured(self.progress.epoch, self.progress.step + 1, tuple(tensors), values)
        if not self.reads_later:
            self.read(measured)
        elif not self.scaler.is_enabled():  # the scaler does the same for fp16
            self.optimizer.found_inf = (~values[:2].isfinite().all()).float()  # pyright: ignore[reportAttributeAccessIssue]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return measured

    def read(self, measured: "Measured") -> dict[str, float]:
        """The values of a step. Sets whether all processes stop.

        Raises Diverged for a loss or a gradient that is not finite.
        """
        values = measured.read()
        self.interruption.agreed = int(values.pop("stop"))
        checked = {"loss": "loss"}
        if not self.scaler.is_enabled():  # fp16 gradients may overflow; the scaler then skips the step
            checked["gradient_norm"] = "gradient's norm"
        for name, words in checked.items():
            if not math.isfinite(values[name]):
                raise Diverged(
                    f"epoch {measured.epoch}, step {measured.step}: the {words} is {values[name]}, and the step was "
                    f"skipped. All files in {self.folder} are from before and intact. A lower learning rate, a longer "
                    "warm-up or --precision fp32 may help"
                )
        return values

    def finish_epoch(self) -> None:
        """Evaluates, keeps the best parameters, and saves the state."""
        progress, epochs = self.progress, self.config.train.epochs
        metrics = self.group.broadcast(self.evaluate(self.watched).metrics)  # all processes select the same epoch
        best_so_far = max((entry["R@1"] for entry in progress.history[1:]), default=-1.0)
        if self.selection == "last" or metrics["R@1"] > best_so_far:
            progress.best_epoch = progress.epoch
            self.best = {name: parameter.detach().cpu().clone() for name, parameter in self.adaptation.items()}
        loss = progress.loss_sum / progress.batch
        progress.history.append({"epoch": progress.epoch, "loss": loss, **metrics})
        self.log.write("evaluation", progress.step, epoch=progress.epoch, split=self.watched, **metrics)
        self.group.print(
            f"epoch {progress.epoch:>{len(str(epochs))}}/{epochs}   loss {loss:7.4f}   {self.watched} "
            f"{short(metrics)}   {self.clock.time_left(self.epochs_done(), epochs)} left"
        )

        self.schedule.step()
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self.save_state()
        self.save_checkpoints()
        self.interruption.agreed = int(self.interruption.any_requested(self.job.device).item())
        if self.interruption.agreed and progress.epoch <= epochs:
            self.stop()

    def finish(self) -> Results:
        """Tests the selected epoch, and writes the results, the curve and the picture."""
        progress, test = self.progress, self.job.splits["test"]
        copy_parameters(self.best, self.adaptation, RESUME)
        retrieval = self.evaluate("test")
        results = self.results(progress.best_epoch, "test", retrieval.metrics)
        results = results.replace(zero_shot=progress.zero_shot, start=progress.start)
        self.log.write("result", progress.step, epoch=progress.best_epoch, split="test", **retrieval.metrics)
        if self.group.is_main:
            queries = shown_queries(test, SHOWN_QUERIES)
            tops = {results.method: retrieval.top[queries].tolist()}
            if progress.zero_shot_top:
                tops = {"zero-shot CLIP": progress.zero_shot_top} | tops
            picture = top_ten(test, queries, tops)
            self.log.conclude(progress.step, self.config.values(), retrieval.metrics, picture)
            save_checkpoint(self.folder / BEST, self.best, self.config, results.to_dict(), self.model.fingerprint)
            write_atomically(self.folder / TOP_TEN, picture)
            write_atomically(self.folder / CURVE, curve([progress.history], self.watched, results))
            conclude(self.folder, results)
        self.group.wait()
        return results

    def results(self, epoch: int, split: str, metrics: Metrics) -> Results:
        """The results of an epoch on a split."""
        config, samples = self.config, self.job.splits[split]
        kinds = self.model.parameters_by_kind() | self.objective.heads()
        trained = {
            kind: sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
            for kind, parameters in kinds.items()
        }
        everything = (*self.model.parameters(), *self.objective.parameters())
        return Results(
            method=config.model.method.title,
            model=config.model.model,
            trained_on=name_of(config.data),
            evaluated_on=name_of(config.data),
            split=split,
            captions=len(samples),
            images=len({sample.image_id for sample in samples}),
            text_to_image=metrics,
            selection=self.selection,
            epoch=epoch,
            epochs=config.train.epochs,
            loss=self.progress.history[epoch].get("loss"),
            losses=config.train.losses,
            seed=config.train.seed,
            trained={kind: number for kind, number in trained.items() if number},
            all_parameters=sum(parameter.numel() for parameter in everything),
            precision=self.job.precision,
        )

    def evaluate(self, split: str) -> Retrieval:
        return evaluate(self.model, self.job.splits[split], **self.job.evaluation(self.config))

    def start_clock(self) -> None:
        """Starts the clock that estimates the time left."""
        self.clock = Clock(self.epochs_done())

    def epochs_done(self) -> float:
        batches = batches_per_epoch(len(self.job.splits["train"]), self.config.train.batch_size)
        return self.progress.epoch - 1 + self.progress.batch / batches

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def position(self) -> str:
        """The position of the run and the command to resume, for an error."""
        return (
            f"in epoch {self.progress.epoch}, after step {self.progress.step}; see the message of that process; the "
            f"saved files in {self.folder} are intact, resume with --resume {self.job.run_dir}"
        )

    def memory(self) -> str:
        """The position of the run, its batch and what may help, for an allocation that failed."""
        settings, progress = self.config.train, self.progress
        return (
            f"in epoch {progress.epoch}, after step {progress.step}, with batches of {settings.batch_size} pairs and "
            f"{self.config.data.workers} loader processes; a smaller --batch-size, --workers or --precision bf16 may "
            f"help, in evaluation an --evaluate-batch-size below {settings.evaluate_batch_size}; the saved files in "
            f"{self.folder} are intact, resume with --resume {self.job.run_dir}"
        )

    def stop(self) -> None:
        self.save_state()
        self.group.wait()
        raise RunInterrupted(
            f"stopped in epoch {self.progress.epoch} after step {self.progress.step}, the state is saved; "
            f"resume with --resume {self.job.run_dir}",
            self.interruption.agreed or signal.SIGINT,
        )

    def save_state(self) -> None:
        """Writes the complete state of the run to one file, from which alone the run is resumed.

        All processes have the same state, and the first process writes it.
        """
        if not self.group.is_main:
            return
        self.progress.log_bytes = self.log.sync()
        state = {
            "progress": asdict(self.progress),
            "parameters": self.state,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states(),
            "backbone": self.model.fingerprint,
        }
        save_state(self.folder, state, self.config, self.job.fingerprint)

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from a saved state. Raises CheckpointError for the state of something else."""
        try:
            self._load_state(state)
        except (CheckpointError, RunError):
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            path = self.folder / RESUME
            raise CheckpointError(
                f"{path}: expected the state of a training of this configuration ({error!r})"
            ) from error
        self.group.print(f"resuming in epoch {self.progress.epoch} after step {self.progress.step}")
        if self.progress.epoch > 1 and self.progress.batch == 0:
            self.save_checkpoints()  # the run may have been killed between this state and the checkpoints

    def _load_state(self, state: dict[str, Any]) -> None:
        backbone = state.get("backbone", self.model.fingerprint)  # earlier states have none
        if backbone != self.model.fingerprint and not self.config.model.method.trains_clip:
            raise RunError(
                f"{self.folder / RESUME}: the run was saved with a backbone of other weights, whose shapes agree; "
                f"expected the weights that --pretrained {self.config.model.pretrained} had"
            )
        for held in ("parameters", "best"):
            if problem := unusable(state[held], DTYPES) or not_finite(state[held]):
                raise CheckpointError(f"{self.folder / RESUME}: {held}: {problem}")
        self.progress = Progress(**state["progress"])
        batches = batches_per_epoch(len(self.job.splits["train"]), self.config.train.batch_size)
        self.progress.check(self.config.train.epochs, batches)
        if problem := mismatch(state["best"], self.adaptation if self.progress.best_epoch else {}):
            raise CheckpointError(f"{self.folder / RESUME}: best: {problem}")
        self.log.start(self.progress.log_bytes, self.progress.step)
        copy_parameters(state["parameters"], self.state, str(self.folder / RESUME))
        self.best = state["best"]
        for saved, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            saved["fused"] = own["fused"]  # depends on the device, which may differ from that of the saved state
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_states(state["random"])

    def save_checkpoints(self) -> None:
        """Writes the checkpoints of the last and of the best epoch so far."""
        if not self.group.is_main:
            return
        best = self.results_so_far(self.progress.best_epoch)
        save_checkpoint(self.folder / BEST, self.best, self.config, best.to_dict(), self.model.fingerprint)
        last = self.results_so_far(self.progress.epoch - 1).replace(selection="last")
        save_checkpoint(self.folder / LAST, self.adaptation, self.config, last.to_dict(), self.model.fingerprint)

    def results_so_far(self, epoch: int) -> Results:
        """The results of an epoch on the watched split."""
        entry = self.progress.history[epoch]
        return self.results(epoch, self.watched, {name: entry[name] for name in METRICS})


def build_objective(
    config: Config, model: AdaptedCLIP, person_ids: Iterable[int], group: Group = SINGLE_PROCESS
) -> Objective:
    """The losses of `config`. `person_ids`: the people of the training split, the classes of the id loss."""
    return Objective(
        config.train.losses,
        temperature=config.train.temperature,
        width=model.embedding_width,
        vocabulary=model.tokenizer.vocab_size,
        person_ids=person_ids,
        mask_captions=config.data.mask_captions,
        mlm_reads_padding=config.model.method.mlm_reads_padding,
        group=group,
    )


def optimizer_of(config: Config, model: AdaptedCLIP, objective: Objective) -> Adam:
    """The optimizer of all trained parameters. Raises MethodError for a learning rate of parameters that there are not.

    Args:
        config: the learning rates.
        model: the model, with its frozen parameters.
        objective: the losses, with their own parameters.
    """
    parameters = model.trained_parameters() | objective.trained_parameters()
    require_names(parameters, config.train)
    return build_optimizer(parameters, config.train, model.parameters_by_kind().get("prefix", {}))


def conclude(run_dir: Path, results: Results) -> None:
    """Writes and prints the table. The results file is written last, and marks the run as complete."""
    write_atomically(run_dir / TABLE, markdown(results))
    results.write(run_dir / RESULTS)
    written = [name for name in SHOWN if (run_dir / name).exists()]
    SINGLE_PROCESS.print(f"\n{text(results)}\n\nin {run_dir}: {', '.join(written)}")  # the main process concludes
