"""The command that evaluates a checkpoint: both directions, its output, its files, and its errors."""

import json
import resource

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import tiny_training, write_image

from upperson.config import SELECTIONS
from upperson.data import load_image
from upperson.data.splits import read_splits
from upperson.evaluate import evaluation
from upperson.evaluate.__main__ import main
from upperson.evaluate.embed import embed
from upperson.model import AdaptedCLIP
from upperson.model.checkpoint import load_model, save_checkpoint

FILES = ["queries-image-to-text.jsonl", "queries-text-to-image.jsonl", "results.json", "results.md"]
RESULTS = {"selection": "val", "epoch": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_training(tmp_path_factory.mktemp("model"), embedded_identities=(2, 2, 6))


@pytest.fixture(scope="module")
def parameters(config):
    """Trained parameters that change the features, unlike fresh ones."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: parameter.detach() + 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in AdaptedCLIP(config.model).trained_parameters().items()
    }


@pytest.fixture
def checkpoint(config, parameters, tmp_path):
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, parameters, config, RESULTS)
    return path


def run(*arguments):
    """The exit status of the command, on the CPU in float32 unless a test asks for something else."""
    return main([str(argument) for argument in ("--device", "cpu", *arguments)])


def json_of(path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_hand(checkpoint, samples):
    """Cosine similarity of all captions (rows) and distinct images (columns), as numpy, and the images' samples."""
    model = load_model(checkpoint)
    images = list({sample.image_id: sample for sample in samples}.values())
    with torch.no_grad():
        seen = model.encode_image(torch.stack([model.preprocess(load_image(sample.image)) for sample in images]))
        read = model.encode_text(model.tokenizer([sample.caption for sample in samples]))
    seen, read = (features.double().numpy() for features in (seen, read))
    seen, read = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (seen, read))
    return read @ seen.T, images


def check_direction(lines, found, similarity, queries, entries):
    """Lines and averages against ranks that are counted one query after the other."""
    assert len(lines) == len(queries)
    totals = dict.fromkeys(("R@1", "R@5", "R@10", "mAP", "mINP"), 0.0)
    for index, (line, query, scores) in enumerate(zip(lines, queries, similarity, strict=True)):
        order = np.argsort(-scores, kind="stable")
        ranks = [rank for rank, g in enumerate(order, 1) if entries[g].person_id == query.person_id]
        precision = 100 * sum(k / rank for k, rank in enumerate(ranks, 1)) / len(ranks)
        penalty = 100 * len(ranks) / ranks[-1]
        assert (line["index"], line["person_id"], line["first_match"]) == (index, query.person, ranks[0])
        assert line["average_precision"] == pytest.approx(precision)
        assert line["inverse_negative_penalty"] == pytest.approx(penalty)
        assert [entry["person_id"] for entry in line["top"]] == [entries[g].person for g in order[:10]]
        assert [entry["similarity"] for entry in line["top"]] == pytest.approx(scores[order[:10]], abs=2e-6)
        for k in (1, 5, 10):
            totals[f"R@{k}"] += 100 * (ranks[0] <= k) / len(queries)
        totals["mAP"] += precision / len(queries)
        totals["mINP"] += penalty / len(queries)
    assert {name: found[name] for name in totals} == pytest.approx(totals)


def check_output(output, checkpoint, samples):
    similarity, images = by_hand(checkpoint, samples)
    results = json_of(output / "results.json")
    forward, backward = (lines_of(output / f"queries-{name}.jsonl") for name in ("text-to-image", "image-to-text"))
    check_direction(forward, results["text_to_image"], similarity, samples, images)
    check_direction(backward, results["image_to_text"], similarity.T, images, samples)
    assert (results["captions"], results["images"]) == (len(samples), len(images))
    assert [line["caption"] for line in forward] == [sample.caption for sample in samples]
    assert {entry["caption"] for line in backward for entry in line["top"]} <= {sample.caption for sample in samples}
    return forward, backward, images


# ------------------------------------------------------------------------------------ what it finds and says


def test_both_directions_against_metrics_by_hand(checkpoint, config, capsys):
    assert run(checkpoint) == 0
    output = checkpoint.parent / "best-embedded-test"
    assert sorted(path.name for path in output.iterdir()) == FILES
    samples = read_splits(config.data)["test"]
    forward, backward, images = check_output(output, checkpoint, samples)
    assert [line["image_id"] for line in backward] == [sample.image_id for sample in images]
    similarity, _ = by_hand(checkpoint, samples)
    best = [images[g].image_id for g in similarity.argmax(1)]
    assert [line["top"][0]["image_id"] for line in forward] == best

    results = json_of(output / "results.json")
    assert (results["domain"], results["split"], results["epoch"], results["selection"]) == (
        "in-domain", "test", 1, "val",
    )  # fmt: skip
    shown = capsys.readouterr().out
    table = (output / "results.md").read_text(encoding="utf-8")
    assert table in shown and "in-domain" in table and str(checkpoint) in table
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "→" in line]
    for row, direction in zip(rows, ("text_to_image", "image_to_text"), strict=True):
        found = results[direction]
        assert row[0] == direction.replace("_to_", " → ")
        assert row[1:6] == [f"{found[name]:.2f}" for name in ("R@1", "R@5", "R@10", "mAP", "mINP")]
    assert [row[6:] for row in rows] == [["24", "12"], ["12", "24"]]


def test_the_checkpoint_is_what_is_evaluated(checkpoint, config):
    samples = read_splits(config.data)["test"]
    adapted = load_model(checkpoint)
    with adapted.zero_shot():
        frozen = embed(adapted, samples).text_to_image()
    assert run(checkpoint) == 0
    found = lines_of(checkpoint.parent / "best-embedded-test" / "queries-text-to-image.jsonl")
    assert [line["average_precision"] for line in found] != pytest.approx(frozen.average_precision.tolist())


@pytest.mark.parametrize(
    ("dataset", "split", "captions", "images"),
    [("embedded-night", "val", 8, 4), ("embedded-scenes", "test", 6, 6), ("embedded-scenes-night", "train", 2, 2)],
)
def test_cross_domain(checkpoint, config, capsys, dataset, split, captions, images):
    assert run(checkpoint, "--data", dataset, "--split", split) == 0
    output = checkpoint.parent / f"best-{dataset}-{split}"
    samples = read_splits(config.replace(dataset=dataset).data)[split]
    check_output(output, checkpoint, samples)
    results = json_of(output / "results.json")
    assert (results["trained_on"], results["evaluated_on"], results["split"]) == ("embedded", dataset, split)
    assert (results["captions"], results["images"]) == (captions, images)
    shown = capsys.readouterr().out
    assert f"trained on: embedded, epoch 1 of 2, selection val ({SELECTIONS['val']})" in shown
    assert f"evaluated on: {dataset}, {split} split, cross-domain" in shown


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({"selection": "val", "epoch": 2}, "epoch 2 of 2, selection val (best R@1 on the validation split)"),
        ({"selection": "best-on-test", "epoch": 1}, f"selection best-on-test ({SELECTIONS['best-on-test']})"),
        ({"selection": "last", "epoch": 2}, f"epoch 2 of 2, selection last ({SELECTIONS['last']})"),
        ({"epoch": 2}, "epoch 2 of 2, no selection recorded"),
        ({}, "epoch not recorded"),
    ],
)
def test_the_output_names_how_the_epoch_was_selected(checkpoint, config, parameters, capsys, results, words):
    save_checkpoint(checkpoint, parameters, config, results)
    assert run(checkpoint, "--output", checkpoint.parent / "out") == 0
    assert words in capsys.readouterr().out
    assert words in (checkpoint.parent / "out" / "results.md").read_text(encoding="utf-8")


def test_how_it_is_computed_is_chosen_on_the_command_line(checkpoint, monkeypatch):
    chosen = []

    def recorded(*given, **options):
        chosen.append(options)
        return embed(*given, **options)

    monkeypatch.setattr(evaluation, "embed", recorded)
    assert run(checkpoint) == 0
    assert run(checkpoint, "--batch-size", 5, "--workers", 1, "--precision", "bf16") == 0
    assert chosen == [
        {"batch_size": 256, "workers": 0, "precision": "fp32"},  # as in the checkpoint
        {"batch_size": 5, "workers": 1, "precision": "bf16"},
    ]
    assert json_of(checkpoint.parent / "best-embedded-test" / "results.json")["precision"] == "bf16"


def test_a_checkpoint_of_a_gpu_is_evaluated_on_a_cpu(checkpoint, config, parameters, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    save_checkpoint(checkpoint, parameters, config.replace(backend="triton", device="cuda", precision="fp16"), RESULTS)
    assert run(checkpoint, "--device", "cpu", "--split", "val") == 0
    assert json_of(checkpoint.parent / "best-embedded-val" / "results.json")["precision"] == "fp32"


# ------------------------------------------------------------------------------------ a data set in files


def own_data(folder, people=3):
    """A user's own folder: two images a person, one caption an image, the test split alone."""
    lines = ["image,caption,identity"]
    for index in range(2 * people):
        write_image(folder / f"{index}.png", index)
        lines.append(f'{index}.png,"Ein Mädchen, Nummer {index}.",{index // 2}')
    (folder / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_a_folder_without_a_train_split(checkpoint, config, parameters, tmp_path, capsys):
    root = own_data(checkpoint.parent / "mine")
    assert run(checkpoint, "--data", "folder", "--data-root", root) == 0
    output = checkpoint.parent / "best-folder-test"
    samples = read_splits(config.replace(dataset="folder", data_root=root).data, need=["test"])["test"]
    forward, backward, _ = check_output(output, checkpoint, samples)
    assert [line["image"] for line in backward] == [str(root / f"{index}.png") for index in range(6)]
    assert {entry["image"] for entry in forward[0]["top"]} == {line["image"] for line in backward}
    assert "Mädchen" in (output / "queries-text-to-image.jsonl").read_text(encoding="utf-8")
    assert f"evaluated on: folder {root}, test split, cross-domain" in capsys.readouterr().out

    save_checkpoint(checkpoint, parameters, config.replace(dataset="folder", data_root=root), RESULTS)
    assert run(checkpoint) == 0  # the folder that it was trained on
    assert "in-domain" in capsys.readouterr().out
    other = own_data(checkpoint.parent / "other")
    before = (output / "results.json").read_bytes()
    assert run(checkpoint, "--data", "folder", "--data-root", other) == 1
    assert capsys.readouterr().err.endswith(
        f"error: {output} contains results on folder {root}, split test, which those on folder {other}, split test, "
        "would overwrite; choose another --output\n"
    )
    assert (output / "results.json").read_bytes() == before
    assert run(checkpoint, "--data", "folder", "--data-root", other, "--output", tmp_path / "others") == 0
    assert "cross-domain" in capsys.readouterr().out


def test_people_keep_the_names_of_the_file(checkpoint, tmp_path):
    root = own_data(tmp_path / "mine")
    lines = (root / "captions.csv").read_text(encoding="utf-8").splitlines()
    names = {"0": "0025", "1": "25", "2": "Ann"}
    lines[1:] = [f"{line.rpartition(',')[0]},{names[line.rpartition(',')[2]]}" for line in lines[1:]]
    (root / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    assert run(checkpoint, "--data", "folder", "--data-root", root) == 0
    for name in ("text-to-image", "image-to-text"):
        found = lines_of(checkpoint.parent / "best-folder-test" / f"queries-{name}.jsonl")
        assert [line["person_id"] for line in found] == ["0025", "0025", "25", "25", "Ann", "Ann"]
        assert {entry["person_id"] for entry in found[0]["top"]} == {"0025", "25", "Ann"}


def test_a_checkpoint_is_read_once(checkpoint, monkeypatch):
    opened = []

    def counting(path, *arguments, **options):
        opened.append(path)
        return safe_open(path, *arguments, **options)

    monkeypatch.setattr("upperson.model.tensor_files.safe_open", counting)
    assert run(checkpoint) == 0
    assert opened == [checkpoint]


# ------------------------------------------------------------------------------------ what goes wrong


def refused(capsys, status, *arguments):
    """The last line of a refused command's error."""
    try:
        found = run(*arguments)
    except SystemExit as stopped:  # of argparse
        found = stopped.code
    assert found == status
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


def test_checkpoints_that_are_none(checkpoint, capsys):
    missing = checkpoint.parent / "missing.safetensors"
    assert refused(capsys, 1, missing).startswith(f"error: {missing}: there is no such file")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert refused(capsys, 1, checkpoint).startswith(f"error: {checkpoint}: truncated")
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_features_that_are_not_finite(checkpoint, config, parameters, capsys):
    for value, message in (torch.nan, "elements that are NaN or infinite"), (1e38, "rows contain NaN or infinity"):
        broken = {name: torch.full_like(tensor, value) for name, tensor in parameters.items()}
        save_checkpoint(checkpoint, broken, config, RESULTS)
        assert message in refused(capsys, 1, checkpoint)


def test_another_backbone_than_that_of_the_training(checkpoint, config, parameters, capsys):
    save_checkpoint(checkpoint, parameters, config, RESULTS, "0" * 64)
    assert "has other weights than the backbone of the training" in refused(capsys, 1, checkpoint)


def test_arguments_that_cannot_be(checkpoint, tmp_path, capsys):
    assert "invalid choice: 'market1501'" in refused(capsys, 2, checkpoint, "--data", "market1501")
    assert "invalid choice: 'all'" in refused(capsys, 2, checkpoint, "--split", "all")
    assert "evaluate_batch_size: 0 is not allowed" in refused(capsys, 2, checkpoint, "--batch-size", 0)
    assert "workers: -1 is not allowed" in refused(capsys, 2, checkpoint, "--workers", -1)
    assert "device: 'tpu' is not allowed" in refused(capsys, 2, checkpoint, "--device", "tpu")
    assert "pretrained: 'embedded' belongs" in refused(capsys, 2, checkpoint, "--pretrained", "embedded")
    assert refused(capsys, 1, checkpoint, "--device", "cuda:99").startswith("error: device: cuda:99 is not available")
    assert refused(capsys, 1, checkpoint, "--pretrained", tmp_path / "none.pt").startswith(
        f"error: {checkpoint}: pretrained "
    )


def test_data_that_are_not_there(checkpoint, config, parameters, tmp_path, capsys):
    words = "error: data_root: rstpreid is read from a folder; set it with --data-root"
    assert refused(capsys, 1, checkpoint, "--data", "rstpreid") == words
    nowhere = tmp_path / "nowhere"
    assert f"{nowhere} does not exist" in refused(capsys, 1, checkpoint, "--data", "rstpreid", "--data-root", nowhere)
    root = own_data(tmp_path / "mine")
    own = ("--data", "folder", "--data-root", root)
    assert "no entry of split 'val'" in refused(capsys, 1, checkpoint, *own, "--split", "val")

    # The folder of the data set it was trained on is not that of another one.
    save_checkpoint(checkpoint, parameters, config.replace(dataset="folder", data_root=root), RESULTS)
    assert refused(capsys, 1, checkpoint, "--data", "rstpreid") == words
    (root / "3.png").unlink()
    assert "3.png: image is missing" in refused(capsys, 1, checkpoint)
    assert not list(tmp_path.glob("best-*"))


def test_results_of_others_are_not_overwritten(checkpoint, capsys, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert run(checkpoint, "--output", output) == 0
    monkeypatch.chdir(checkpoint.parent)
    assert run(checkpoint.name, "--output", output) == 0  # the same checkpoint, measured again
    before = {path: path.read_bytes() for path in output.iterdir()}
    capsys.readouterr()
    (tmp_path / "copy.safetensors").write_bytes(checkpoint.read_bytes())
    for file, options, other in (
        (tmp_path / "copy.safetensors", (), "embedded, split test"),
        (checkpoint, ("--split", "val"), "embedded, split val"),
        (checkpoint, ("--data", "embedded-night"), "embedded-night, split test"),
    ):
        said = refused(capsys, 1, file, "--output", output, *options)
        assert f"{output} contains results of {checkpoint} on embedded, split test, which those of {file}" in said
        assert f"on {other}, would overwrite; choose another --output" in said
    (output / "results.json").write_text('{"mine": 1}')
    assert "results.json: expected results of this version" in refused(capsys, 1, checkpoint, "--output", output)
    before[output / "results.json"] = b'{"mine": 1}'
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_output_that_cannot_be_written(checkpoint, capsys):
    file = checkpoint.parent / "file"
    file.write_text("")
    assert refused(capsys, 1, checkpoint, "--output", file).startswith("error: ")
    output = checkpoint.parent / "out"
    assert run(checkpoint, "--output", output, "--split", "val") == 0
    before = {path: path.read_bytes() for path in output.iterdir()}
    assert len(before) == len(FILES)
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        said = refused(capsys, 1, checkpoint, "--output", output, "--split", "val")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "queries-text-to-image.jsonl could not be written" in said
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_the_same_relative_path_in_another_folder_is_another_checkpoint(checkpoint, capsys, tmp_path, monkeypatch):
    output, content = tmp_path / "out", checkpoint.read_bytes()
    for name in ("one", "ö ther", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best.safetensors").write_bytes(content)
    monkeypatch.chdir(tmp_path / "one")
    assert run("best.safetensors", "--output", output) == 0
    before = {path: path.read_bytes() for path in output.iterdir()}
    capsys.readouterr()
    for name in ("ö ther", "third"):
        monkeypatch.chdir(tmp_path / name)
        said = refused(capsys, 1, "best.safetensors", "--output", output)
        assert f"results of {tmp_path / 'one' / 'best.safetensors'} on" in said and "choose another --output" in said
    assert {path: path.read_bytes() for path in output.iterdir()} == before
    assert run(tmp_path / "one" / "best.safetensors", "--output", "../out") == 0  # the same one, from elsewhere


def test_checkpoints_whose_folder_of_results_has_the_same_name(checkpoint, capsys, tmp_path):
    content = checkpoint.read_bytes()
    for first, *others in (("run.1", "run.2", "run"), ("x.safetensors", "x.bak", "x")):
        for name in (first, *others):
            (tmp_path / name).write_bytes(content)
        assert run(tmp_path / first) == 0
        capsys.readouterr()
        for name in others:
            said = refused(capsys, 1, tmp_path / name)
            assert f"contains results of {tmp_path / first} on" in said and f"those of {tmp_path / name} on" in said
        assert run(tmp_path / first) == 0  # measured again
