"""What a run says at its start and leaves at its end."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upperson.files import write_atomically
from upperson.evaluate import pictures as report
from upperson.train import run_folder
from upperson.model.checkpoint import save_checkpoint
from upperson.config import SELECTIONS, Config
from upperson.data import Sample
from upperson.machine import Group
from upperson.evaluate.metrics import Retrieval
from upperson.model import AdaptedCLIP


@dataclass(frozen=True)
class RunResult:
    """Where everything lies, and what results.json holds."""

    run_dir: Path
    results: dict[str, Any]


def announce(
    config: Config,
    model: AdaptedCLIP,
    splits: dict[str, list[Sample]],
    run_dir: Path,
    device: torch.device,
    precision: str,
    group: Group,
    start: Mapping[str, Tensor],
) -> None:
    """Prints what is about to be trained, on what; `start`: the parameters of the checkpoint that it starts from."""
    processes = f", one of {group.world_size} processes" if group.world_size > 1 else ""
    group.say(f"run     {run_dir}, on {device}{processes} in {precision}")
    for split, samples in splits.items():
        group.say(
            f"{split:<7} {len(samples):,} captions of {len({s.image_id for s in samples}):,} images of "
            f"{len({s.person_id for s in samples}):,} identities"
        )
    trained, everything = count(model.trained_parameters().values()), count(model.parameters())
    group.say(
        f"model   {config.model.model}; {trained:,} of {everything:,} parameters are trained "
        f"({100 * trained / everything:.1f} %)"
    )
    if start:
        others = len(model.adaptation()) - len(start)
        group.say(
            f"start   {config.train.start_from}, {len(start)} parameter tensors"
            + (f"; the other {others} start as without it" if others else "")
        )


def results_of(
    config: Config,
    test: list[Sample],
    zero_shot: dict[str, float],
    adapted: dict[str, float],
    *,
    start: dict[str, float] | None = None,
    selection: str,
    epoch: int,
    trained_parameters: int,
    all_parameters: int,
) -> dict[str, Any]:
    """What results.json holds: what was trained how, and the metrics on the test split before and after.

    `start` are those of the checkpoint that the training started from, if it started from one.
    """
    trained = config.model.method.trains
    return {
        "method": config.model.method.title,
        "dataset": config.data.dataset,
        "split": "test",
        "selection": selection,
        "selection_meaning": SELECTIONS[selection],
        "epoch": epoch,
        "epochs": config.train.epochs if trained else 0,
        **({"losses": config.train.losses, "seed": config.train.seed} if trained else {}),
        "queries": len(test),
        "gallery": len({s.image_id for s in test}),
        "trained_parameters": trained_parameters,
        "all_parameters": all_parameters,
        "zero_shot": zero_shot,
        **({} if start is None else {"start": start}),
        "adapted": adapted,
    }


def write_results(
    run_dir: Path,
    config: Config,
    parameters: dict[str, Tensor],
    results: dict[str, Any],
    test: list[Sample],
    retrieval: Retrieval,
) -> None:
    """The checkpoint of the selected `parameters`, the picture, the results and their table; and says so."""
    save_checkpoint(run_dir / run_folder.BEST, parameters, config, results)
    write_atomically(run_dir / run_folder.TOP_TEN, report.top_ten(test, {results["method"]: retrieval.top}))
    conclude(run_dir, results)


def conclude(run_dir: Path, results: dict[str, Any]) -> None:
    """Writes the table, and the results last: a run that has them has everything."""
    write_atomically(run_dir / run_folder.TABLE, report.markdown(results).encode())
    write_atomically(run_dir / run_folder.RESULTS, (json.dumps(results, indent=2) + "\n").encode())
    written = [name for name in run_folder.SHOWN if (run_dir / name).exists()]
    print(f"\n{report.text(results)}\n\nin {run_dir}: {', '.join(written)}", flush=True)


def short(metrics: dict[str, float]) -> str:
    return f"R@1 {metrics['R@1']:5.2f}  mAP {metrics['mAP']:5.2f}"


def count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
