"""A training on its way: steps, epochs and evaluations, and how they are logged, saved and taken up again."""

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from upperson.errors import Diverged, RunError, RunInterrupted
from upperson.files import write_atomically
from upperson.evaluate import pictures as report
from upperson.train import run_folder
from upperson.model.checkpoint import copy_parameters, save_checkpoint, save_resume_state
from upperson.config import Config
from upperson.data import DeviceBatches, ImageCache, Sample, batches_per_epoch, train_loader
from upperson.machine import ALONE, Group, data_parallel
from upperson.train.interruption import Interruption
from upperson.evaluate.metrics import Retrieval
from upperson.model import AdaptedCLIP
from upperson.losses.objective import LossesOfModel, Objective
from upperson.train.optimizer import build_optimizer, build_schedule
from upperson.train.progress import Clock, Progress
from upperson.train.resume import random_states, set_random_states
from upperson.train.results import RunResult, count, results_of, short, write_results
from upperson.evaluate.embed import autocast, search
from upperson.train.run_folder import MetricsLog


class Training:
    """Model, optimizer and position of a run, and how they move, are saved and come back."""

    def __init__(
        self,
        config: Config,
        model: AdaptedCLIP,
        splits: dict[str, list[Sample]],
        run_dir: Path,
        device: torch.device,
        precision: str,
        interruption: Interruption,
        group: Group = ALONE,
        cache: ImageCache | None = None,
        whole: Path | None = None,
    ):
        """`whole`: the folder to resume, where `run_dir` is that of a stage in it."""
        self.whole = whole or run_dir
        self.config, self.model, self.splits, self.run_dir, self.cache = config, model, splits, run_dir, cache
        self.device, self.precision, self.interruption, self.group = device, precision, interruption, group
        self.objective = build_objective(config, model, splits, group).to(device)
        if config.train.compile:
            model.compile_blocks()
        self.losses = data_parallel(LossesOfModel(self.objective, model), group)
        self.adaptation = model.adaptation()  # what checkpoints hold
        self.state = self.adaptation | self.objective.trained_parameters()  # what the run needs to go on
        self.parameters = {name: parameter for name, parameter in self.state.items() if parameter.requires_grad}
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
            # Cut to the room beside prompts here, so that mlm asks for no word that is cut off later.
            tokenizer=functools.partial(model.tokenizer, context_length=model.caption_length),
            image_size=config.model.image_size,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            mask_captions=config.data.mask_captions,
            mask_labels=self.objective.mlm is not None,
            workers=config.data.workers,
            epoch=1,
            rank=group.rank,
            world_size=group.world_size,
            cache=cache,
        )
        self.batches = DeviceBatches(self.loader, device, model.image_mean, model.image_std, model.pack_captions)
        self.log = MetricsLog(run_dir, config.train.tensorboard, writes=group.is_main)

    def begin(self, start: Mapping[str, Tensor]) -> None:
        """Measures the backbone alone; then takes the parameters `start`, if there are any, and measures those, too."""
        self.log.start(after=0)
        with self.model.zero_shot():
            measured = self.measure("zero_shot", "zero-shot CLIP")
        self.progress.zero_shot = measured["test"]
        if start:
            copy_parameters(start, {name: self.adaptation[name] for name in start}, str(self.config.train.start_from))
            measured = self.measure("start", "start")
            self.progress.start = measured["test"]
        self.progress.history.append({"epoch": 0, **measured[self.watched]})
        self.save_state()

    def measure(self, kind: str, name: str) -> dict[str, dict[str, float]]:
        """The metrics before the first epoch on the test split and on the split that is watched, logged and said."""
        measured = {split: self.evaluate(split).metrics for split in dict.fromkeys(("test", self.watched))}
        for split, metrics in measured.items():
            self.log.write(kind, 0, split=split, **metrics)
        self.group.say(f"{name:<14}   {self.watched} {short(measured[self.watched])}")
        return measured

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
            disable=None if self.group.is_main else True,
        ) as bar:
            for batch in self.interruption.pass_on(self.batches):
                pairs = min(settings.batch_size, len(self.splits["train"]) - progress.batch * settings.batch_size)
                measured = self.step(batch, pairs)
                progress.batch += 1
                progress.step += 1
                progress.loss_sum += measured["loss"]
                bar.set_postfix(loss=f"{measured['loss']:.3f}", refresh=False)
                bar.update(pairs)
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

    def step(self, batch: dict[str, Tensor], pairs: int | None = None) -> dict[str, float]:
        """One optimizer step; the loss before it, its parts where it is a sum, and the norm of its gradient.

        `batch` is this process's share, from `self.batches`, of `pairs` in all; None: it is the whole.
        """
        with autocast(self.device, self.precision):
            loss, parts = self.losses(batch, pairs)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        tensors = {"loss": loss, "gradient_norm": nn.utils.get_total_norm(gradients)}
        if len(parts) > 1:
            tensors |= {f"loss_{name}": part for name, part in parts.items()}
        tensors["stop"] = self.interruption.asked(self.device)
        # One transfer for all.
        measured = dict(zip(tensors, torch.stack([t.detach().float() for t in tensors.values()]).tolist(), strict=True))
        self.interruption.agreed = measured.pop("stop") > 0
        checked = {"loss": "loss"}
        if not self.scaler.is_enabled():  # in fp16 gradients may overflow; the scaler then skips the step
            checked["gradient_norm"] = "gradient's norm"
        for name, words in checked.items():
            if not math.isfinite(measured[name]):
                raise Diverged(
                    f"epoch {self.progress.epoch}, step {self.progress.step + 1}: the {words} is {measured[name]}, and "
                    f"the step was not taken. What was saved in {self.run_dir} before is good and stays. A lower "
                    "learning rate, a longer warm-up or --precision fp32 may help"
                )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return measured

    def finish_epoch(self) -> None:
        """Evaluates, keeps the best parameters, and saves."""
        progress, epochs = self.progress, self.config.train.epochs
        metrics = self.group.broadcast(self.evaluate(self.watched).metrics)  # all select the same epoch
        best_so_far = max((entry["R@1"] for entry in progress.history[1:]), default=-1.0)
        if self.selection == "last" or metrics["R@1"] > best_so_far:
            progress.best_epoch = progress.epoch
            self.best = {name: parameter.detach().cpu().clone() for name, parameter in self.adaptation.items()}
        loss = progress.loss_sum / progress.batch
        progress.history.append({"epoch": progress.epoch, "loss": loss, **metrics})
        self.log.write("evaluation", progress.step, epoch=progress.epoch, split=self.watched, **metrics)
        self.group.say(
            f"epoch {progress.epoch:>{len(str(epochs))}}/{epochs}   loss {loss:7.4f}   {self.watched} "
            f"{short(metrics)}   {self.clock.time_left(self.epochs_done(), epochs)} left"
        )

        self.schedule.step()
        progress.epoch, progress.batch, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self.save_state()
        self.save_checkpoints()
        self.interruption.agreed = self.interruption.asked(self.device).item() > 0
        if self.interruption.agreed and progress.epoch <= epochs:
            self.stop()

    def finish(self) -> RunResult:
        """Tests the selected epoch and writes the results, the curve and the picture."""
        progress = self.progress
        copy_parameters(self.best, self.adaptation, run_folder.RESUME)
        retrieval = self.evaluate("test")
        results = results_of(
            self.config,
            self.splits["test"],
            progress.zero_shot,
            retrieval.metrics,
            start=progress.start,
            selection=self.selection,
            epoch=progress.best_epoch,
            trained_parameters=count(self.parameters.values()),
            all_parameters=count(self.model.parameters()) + count(self.objective.parameters()),
        )
        self.log.write("result", progress.step, epoch=progress.best_epoch, split="test", **retrieval.metrics)
        if self.group.is_main:
            write_atomically(self.run_dir / run_folder.CURVE, report.curve([progress.history], self.watched, results))
            write_results(self.run_dir, self.config, self.best, results, self.splits["test"], retrieval)
        self.log.close()
        self.group.wait()
        return RunResult(self.run_dir, results)

    def evaluate(self, split: str) -> Retrieval:
        return search(self.config, self.model, self.splits[split], self.precision, self.group, self.cache)

    def start_clock(self) -> None:
        """From here on, time is measured for what is said to be left."""
        self.clock = Clock(self.epochs_done())

    def epochs_done(self) -> float:
        batches = batches_per_epoch(len(self.splits["train"]), self.config.train.batch_size)
        return self.progress.epoch - 1 + self.progress.batch / batches

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def position(self) -> str:
        """Where the run stands, and what becomes of it if it ends here."""
        return (
            f"in epoch {self.progress.epoch}, after step {self.progress.step}; see its message; what was saved in "
            f"{self.run_dir} is good, continue with --resume {self.whole}"
        )

    def stop(self) -> None:
        self.save_state()
        self.log.close()
        self.group.wait()
        raise RunInterrupted(
            f"stopped in epoch {self.progress.epoch} after step {self.progress.step}, all is saved; "
            f"continue with --resume {self.whole}"
        )

    def save_state(self) -> None:
        """Everything that the run needs to go on, in one file; nothing is ever read from another.

        Every process holds the same, and one writes it.
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
        }
        save_resume_state(self.run_dir / run_folder.RESUME, state, self.config)

    def load_state(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.log.start(self.progress.log_bytes, self.progress.step)
        copy_parameters(state["parameters"], self.state, str(self.run_dir / run_folder.RESUME))
        self.best = state["best"]
        for saved, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            saved["fused"] = own["fused"]  # of this device, which need not be the one where the state was saved
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        set_random_states(state["random"])
        self.group.say(f"continuing in epoch {self.progress.epoch} after step {self.progress.step}")

    def save_checkpoints(self) -> None:
        """The parameters of the epoch that has just ended, and of the best so far."""
        if not self.group.is_main:
            return
        history = self.progress.history
        best = {"selection": self.selection, "split": self.watched, **history[self.progress.best_epoch]}
        save_checkpoint(self.run_dir / run_folder.BEST, self.best, self.config, best)
        last = {"selection": "last", "split": self.watched, **history[-1]}
        save_checkpoint(self.run_dir / run_folder.LAST, self.adaptation, self.config, last)


def build_objective(
    config: Config, model: AdaptedCLIP, splits: dict[str, list[Sample]], group: Group = ALONE
) -> Objective:
    return Objective(
        config.train.losses,
        temperature=config.train.temperature,
        width=model.embedding_width,
        vocabulary=model.tokenizer.vocab_size,
        person_ids=(sample.person_id for sample in splits["train"]),
        mask_captions=config.data.mask_captions,
        group=group,
    )
