"""Two processes compute what one does: losses, gradients, embeddings, trainings; and one that dies is reported."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed_worker
import pytest
import torch
from tiny import (
    TRAIN_PY,
    assert_same_run,
    fail_at,
    flags_of,
    inputs,
    interrupt,
    log_of,
    tiny_config,
    tiny_training,
    wait_for,
)
from upperson_kernels import resolve_backend

from upperson.config import DataConfig
from upperson.data.splits import read_splits
from upperson.errors import RunError
from upperson.losses.names import NOT_MASKED
from upperson.machine import SINGLE_PROCESS, Group, device_and_precision
from upperson.model.checkpoint import load_checkpoint
from upperson.train.fit import fit
from upperson.train.resume import load_state

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
WORLD_SIZE = 2


def start(rank, port, *command):
    """One of two processes of a Python program, as torchrun starts it."""
    variables = dict(
        WORLD_SIZE=WORLD_SIZE, RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1
    )
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {k: str(v) for k, v in variables.items()},
    )


def start_all(*command):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(rank, port, *command) for rank in range(WORLD_SIZE)]


def finish_all(processes):
    """What they print, rank by rank, when all have ended well."""
    ended = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in ended]


# ------------------------------------------------------------------------------------ losses, gradients, embeddings


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """What one process and each of two computed from the same inputs."""
    folder = tmp_path_factory.mktemp("computed")
    config = tiny_config(folder)
    size = max(size for _, size in distributed_worker.CASES)
    images, captions = (
        torch.cat([tensor, tensor.flip(-1) if tensor.is_floating_point() else tensor])[:size]
        for tensor in inputs(torch.float64)
    )
    labels = torch.full_like(captions, NOT_MASKED)
    labels[:, 1] = captions[:, 1]  # one masked word in a caption, in one of them two, in another none
    labels[2, 2], labels[4] = captions[2, 2], NOT_MASKED
    masked = captions.where(labels == NOT_MASKED, 49405)
    batch = dict(
        images=images,
        captions=captions,
        person_ids=torch.tensor(distributed_worker.PEOPLE[:size]),
        masked_captions=masked,
        mask_labels=labels,
    )
    samples = read_splits(DataConfig(embedded_identities=(2, 2, 5), embedded_views=3))["test"][:27]
    torch.save((config, batch, samples), folder / "inputs.pt")
    finish_all(start_all(TESTS / "distributed_worker.py", folder))
    alone = distributed_worker.compute(config, batch, samples, SINGLE_PROCESS)
    return alone, [torch.load(folder / f"rank-{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize(("losses", "size"), distributed_worker.CASES)
def test_losses_and_gradients_are_those_of_one_process(computed, losses, size):
    alone, together = computed
    expected = alone[losses, size]
    assert expected["loss"] != 0 and sum(values.abs().max() > 1e-6 for values in expected.values()) > 20
    for found in (process[losses, size] for process in together):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_embeddings_are_those_of_one_process(computed):
    alone, together = computed
    counts = [count for kind, count in alone if kind == "embed"]
    assert counts == [27, 1]  # shares of 14 and 13, and of 1 and 0
    for count in counts:
        for found in (process["embed", count] for process in together):
            assert len(found["captions"]) == count
            for name, features in alone["embed", count].items():
                torch.testing.assert_close(found[name], features, rtol=1e-5, atol=1e-6)
    assert torch.equal(together[0]["embed", 27]["images"], together[1]["embed", 27]["images"])


# ------------------------------------------------------------------------------------ trainings


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two epochs of seven batches of 11 pairs and one of 3, with a tiny random CLIP and heads to train along."""
    folder = tmp_path_factory.mktemp("trained")
    return tiny_training(
        folder, losses="sdm+id+mlm", embedded_identities=(20, 3, 4), batch_size=11, save_every=1,
        run_dir=folder / "together",
    )  # fmt: skip


def torchrun(*flags):
    """What two processes of train.py print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
    ended = subprocess.run([*command, TRAIN_PY, *map(str, flags)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                           text=True, capture_output=True, timeout=120)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def together(config):
    """The folder of that run of two processes, started by torchrun."""
    shown = torchrun(*flags_of(config))
    assert shown.count("zero-shot CLIP   val") == shown.count("epoch 2/2") == 1, shown
    return config.train.run_dir


def test_a_training_of_two_processes_is_that_of_one(config, together):
    alone = fit(config.replace(run_dir=together.with_name("alone"))).run_dir
    assert list(together.parent.glob("*.safetensors")) == [] and not (together / "runs").exists()
    assert_alike(together, alone)


def test_stages_of_two_processes_are_those_of_one(config, tmp_path):
    """A process dies in the second one, which both then go on with. Adam's epsilon is above the rounding of gradients
    that are 0, as those of CLIP's key biases.
    """
    config = config.replace(method="prompt-decoupling", losses="sdm", encoder_epochs=2, encoder_warmup_epochs=0,
                            encoder_learning_rate=1e-4, adam_epsilon=1e-3, run_dir=tmp_path / "together")  # fmt: skip
    run_dir = config.train.run_dir
    processes = start_all(TRAIN_PY, *flags_of(config))
    wait_for(processes, run_dir / "encoders", "step", 3)
    processes[1].kill()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert processes[0].returncode == 1 and errors[0].strip().endswith(f"resume with --resume {run_dir}")
    shown = torchrun("--resume", run_dir)
    assert shown.count("stage 1 of 2: domain adaptation, prompts, is finished; test R@1") == 1, shown
    assert shown.count("stage 2 of 2: task adaptation, encoders\n") == 1, shown
    alone = fit(config.replace(run_dir=tmp_path / "alone")).run_dir
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(path.name for path in alone.iterdir())
    for stage in ("prompts", "encoders"):
        assert_alike(run_dir / stage, alone / stage)


def assert_alike(together, alone):
    """The same but for rounding."""
    assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in alone.iterdir())
    found, expected = log_of(together), log_of(alone)
    assert [(line["kind"], line["step"]) for line in found] == [(line["kind"], line["step"]) for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name, value in line.items():  # rounding grows from step to step, from 1e-7 to 1e-5 in 32 steps
            if name.startswith(("loss", "gradient")):
                bound = 5e-5 if name.startswith("loss") else 2e-3
                assert value == pytest.approx(other[name], rel=bound), (line, other)
    for name, value in load_checkpoint(alone / "last.safetensors").parameters.items():
        torch.testing.assert_close(
            load_checkpoint(together / "last.safetensors").parameters[name], value, rtol=1e-2, atol=5e-4
        )  # Adam magnifies what rounding leaves of 0


def test_a_process_that_dies_ends_the_job_and_the_run_goes_on(config, together, tmp_path):
    """First the second process is killed, then, when the run has been taken up again, the one that writes."""
    config = config.replace(run_dir=tmp_path / "run")
    run_dir = config.train.run_dir
    for killed, step, flags in ((1, 5, flags_of(config)), (0, 11, ["--resume", run_dir])):
        processes = start_all(TRAIN_PY, *flags)
        wait_for(processes, run_dir, "step", step)
        processes[killed].kill()
        _, errors = processes[1 - killed].communicate(timeout=60)
        processes[killed].communicate()
        assert processes[1 - killed].returncode == 1
        assert re.fullmatch(
            f"error: process {1 - killed} of 2: lost contact with another process [(].*Connection .* by peer.*[)] in "
            "epoch [12], after step [0-9]+; see the message of that process; the saved files "
            f"in {re.escape(str(run_dir))} are intact, resume with --resume {re.escape(str(run_dir))}",
            errors.strip().splitlines()[-1],
        ), errors
        assert not (run_dir / "results.json").exists()
    out, silence = finish_all(start_all(TRAIN_PY, "--resume", run_dir))
    assert "resuming in epoch 2 after step" in out and silence == ""
    assert_same_run(together, run_dir)


def test_ctrl_c_at_one_process_stops_both_at_the_same_step(config, together, tmp_path):
    config = config.replace(run_dir=tmp_path / "run")
    run_dir = config.train.run_dir
    processes = start_all(TRAIN_PY, *flags_of(config))
    wait_for(processes, run_dir, "step", 2)
    processes[1].send_signal(signal.SIGINT)
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [130, 130]
    assert f"the state is saved; resume with --resume {run_dir}" in errors[0]
    last = log_of(run_dir)[-1]["step"]
    assert load_state(run_dir)["progress"]["step"] == last < 16
    fit(config.replace(resume=True))  # and one process can go on
    assert log_of(run_dir)[-1]["kind"] == "result"


def test_a_run_of_one_process_goes_on_with_two(config, together, tmp_path):
    """Two processes compute the same but for rounding."""
    config = config.replace(run_dir=tmp_path / "run")
    run_dir = config.train.run_dir
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 11, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert "resuming in epoch 2 after step 11" in torchrun("--resume", run_dir)
    assert_alike(run_dir, together)


# ------------------------------------------------------------------------------------ the group, and what it refuses


def test_one_process_is_the_whole_group():
    assert Group.from_environment({}) == Group.from_environment({"WORLD_SIZE": "1", "RANK": "0"}) == SINGLE_PROCESS
    assert SINGLE_PROCESS.is_main and list(SINGLE_PROCESS.share_of(3)) == SINGLE_PROCESS.own([0, 1, 2]) == [0, 1, 2]
    x = torch.ones(2, requires_grad=True)
    assert (
        SINGLE_PROCESS.gather(x, 2)
        is SINGLE_PROCESS.total(x)
        is SINGLE_PROCESS.largest(x)
        is SINGLE_PROCESS.broadcast(x)
        is x
    )
    assert not torch.distributed.is_initialized()


def test_a_group_of_torchrun():
    variables = dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1234")
    group = Group.from_environment(variables)
    assert group == Group(rank=5, world_size=8, local_rank=1) and not group.is_main
    assert [group.share_of(total) for total in (16, 6, 3)] == [range(10, 12), range(5, 6), range(3, 3)]
    del variables["RANK"], variables["MASTER_PORT"]
    with pytest.raises(RunError, match="WORLD_SIZE to '8', .* RANK, MASTER_PORT; start with torchrun"):
        Group.from_environment(variables)
    with pytest.raises(RunError, match="WORLD_SIZE to 'many', .* RANK, MASTER_PORT, WORLD_SIZE; start with torchrun"):
        Group.from_environment(variables | {"WORLD_SIZE": "many"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "8", "RANK to 8, not below WORLD_SIZE, 8"),
        ("RANK", "-1", "not a number: RANK"),
        ("RANK", "", "missing or not a number: RANK"),
        ("RANK", "\u0663", "not a number: RANK"),
        ("LOCAL_RANK", "9", "LOCAL_RANK to 9, not below WORLD_SIZE, 8"),
        ("WORLD_SIZE", "0", "RANK to 5, not below WORLD_SIZE, 0"),
        ("WORLD_SIZE", "", "WORLD_SIZE to '', but .*: WORLD_SIZE"),
        ("WORLD_SIZE", "1e3", "not a number: WORLD_SIZE"),
        ("WORLD_SIZE", "9" * 30, "not a number: WORLD_SIZE"),
        ("MASTER_PORT", "0", "MASTER_PORT to 0; expected 1 to 65535"),
        ("MASTER_PORT", "99999", "MASTER_PORT to 99999; expected 1 to 65535"),
        ("MASTER_PORT", "http", "not a number: MASTER_PORT"),
        ("MASTER_ADDR", "", "missing or not a number: MASTER_ADDR"),
    ],
)
def test_a_group_that_cannot_be(name, value, message):
    """Its processes would wait for others that never come."""
    variables = dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1234")
    with pytest.raises(RunError, match=f"{message}.*start with torchrun"):
        Group.from_environment(variables | {name: value})


def test_devices_of_a_group(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second, third = Group(5, 8, 1), Group(6, 8, 2)
    for name in ("auto", "cuda"):
        assert device_and_precision(name, "auto", second) == (torch.device("cuda:1"), "bf16")
    assert device_and_precision("cpu", "auto", second)[0] == torch.device("cpu")
    assert device_and_precision("cuda:1", "auto") == (torch.device("cuda:1"), "bf16")
    with pytest.raises(RunError, match="cuda:0 is a single GPU for 8 processes; use --device cuda"):
        device_and_precision("cuda:0", "auto", second)
    with pytest.raises(RunError, match="cuda:2 is not available; PyTorch finds 2"):
        device_and_precision("cuda", "auto", third)


def test_an_apple_gpu_runs_the_pytorch_backend(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = torch.device("mps")
    assert device_and_precision("mps", "auto") == (mps, "fp32")
    assert device_and_precision("mps", "bf16") == (mps, "bf16")
    with pytest.raises(RunError, match="precision: fp16 needs a CUDA GPU; expected fp32 or bf16 on mps"):
        device_and_precision("mps", "fp16")
    assert device_and_precision("auto", "auto")[0].type != "mps"  # only where it is asked for
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_backend(None, SimpleNamespace(is_cuda=False, device=mps, dtype=torch.float32)) == "torch"


def test_a_batch_that_is_too_small_for_the_group(config, monkeypatch):
    monkeypatch.setattr(Group, "from_environment", lambda: Group(0, 12, 0))
    with pytest.raises(RunError, match="batch_size: 11 pairs are too few for 12 processes"):
        fit(config)
