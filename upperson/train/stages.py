"""A training in stages: each is a run of its own, in a folder of the run folder, and starts from the one before.

    RUN_DIR/                 config.json of the whole; at the end what any run leaves, its checkpoint the last stage's
    RUN_DIR/STAGE/           everything that a run leaves, of one stage

A stage that has results is finished: a resumed training leaves it as it is.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from upperson.errors import RunInterrupted
from upperson.files import write_atomically
from upperson.evaluate import pictures as report
from upperson.train import run_folder
from upperson.config import Config
from upperson.machine import Group
from upperson.train.interruption import Interruption
from upperson.methods import Stage
from upperson.train.results import RunResult, conclude, short
from upperson.train.run_folder import MetricsLog, history_of, read_results


def stages_of(config: Config) -> list[tuple[Stage, Config]]:
    """The stages of a training, each with the configuration of its run but for what the run folder decides."""
    return [(stage, config.replace(**stage.changes).settled()) for stage in config.model.method.stages()]


def train_stages(
    config: Config,
    run_dir: Path,
    train: Callable[[Config], RunResult],
    trained_parameters: int,
    group: Group,
    interruption: Interruption,
) -> RunResult:
    """Trains what is left of the stages, each by `train`, in `run_dir`, which is claimed, and writes its results.

    `trained_parameters`: how many are trained in one stage or another. All processes of `group` call it alike.
    """
    stages = stages_of(config)
    finished: list[tuple[Stage, dict[str, Any]]] = []
    with closing(MetricsLog(run_dir, tensorboard=False, writes=group.is_main)) as log:
        log.start(after=0)
        start_from = config.train.start_from
        for number, (stage, of_stage) in enumerate(stages, 1):
            place = run_dir / stage.name
            title = f"stage {number} of {len(stages)}: {stage.title}"
            begun, done = group.broadcast([(place / name).exists() for name in (run_folder.CONFIG, run_folder.RESULTS)])
            if done:
                results = read_results(place / run_folder.RESULTS)
                group.say(f"{title}, is done; test {short(results['adapted'])}")
            else:
                if interruption.agreed:
                    raise RunInterrupted(f"stopped before {title}; continue with --resume {run_dir}")
                group.say(f"\n{title}")
                results = train(of_stage.replace(start_from=start_from, run_dir=place, resume=begun)).results
            log.write("stage", number, name=stage.name, title=stage.title, split="test", **results["adapted"])
            finished.append((stage, results))
            start_from = place / run_folder.BEST
        results = results_of_stages(config, finished, trained_parameters)
        if group.is_main:
            write_whole(run_dir, finished, results)
    group.wait()
    return RunResult(run_dir, results)


def results_of_stages(
    config: Config, finished: list[tuple[Stage, dict[str, Any]]], trained_parameters: int
) -> dict[str, Any]:
    """What results.json of the whole holds: that of the last stage, with what was there before the first, and all."""
    first, last = finished[0][1], finished[-1][1]
    before = {name: first[name] for name in ("zero_shot", "start") if name in first}
    return {
        **{name: value for name, value in last.items() if name != "start"},
        **before,
        "method": config.model.method.title,
        "trained_parameters": trained_parameters,
        "stages": [{"name": stage.name, "title": stage.title, **results} for stage, results in finished],
    }


def write_whole(run_dir: Path, finished: list[tuple[Stage, dict[str, Any]]], results: dict[str, Any]) -> None:
    """What any run leaves at its end: the last stage's checkpoint and picture; curve, table and results of all."""
    histories = [history_of(run_dir / stage.name) for stage, _ in finished]
    write_atomically(run_dir / run_folder.CURVE, report.curve(histories, histories[0][0]["split"], results))
    for name in (run_folder.BEST, run_folder.TOP_TEN):
        write_atomically(run_dir / name, (run_dir / finished[-1][0].name / name).read_bytes())
    conclude(run_dir, results)
