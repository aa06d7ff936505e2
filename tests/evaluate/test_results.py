"""Results: the same record on disk and in memory."""

import json

import pytest

from upperson.errors import RunError
from upperson.evaluate.results import Results

METRICS = {"R@1": 8.125, "R@5": 20.5, "R@10": 31.25, "mAP": 9.75, "mINP": 4.0}
RESULTS = Results(
    method="UP-Person", model="embedded", trained_on="embedded", evaluated_on="embedded-night", split="test",
    captions=16, images=8, text_to_image=METRICS, selection="val", epoch=2, epochs=3, trained={"lora": 3, "prefix": 4},
)  # fmt: skip


def test_there_and_back(tmp_path):
    stages = tuple(RESULTS.replace(stage=name, title=f"the {name}", start=METRICS) for name in ("first", "second"))
    for results in (RESULTS, RESULTS.replace(image_to_text=METRICS, zero_shot=METRICS, stages=stages)):
        results.write(tmp_path / "results.json")
        assert Results.read(tmp_path / "results.json") == results


def test_what_a_reader_of_the_file_finds(tmp_path):
    RESULTS.write(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert (content["trained_parameters"], content["domain"]) == (7, "cross-domain")
    assert content["selection_meaning"] == "best R@1 on the validation split"
    assert "image_to_text" not in content and "stages" not in content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("captions"), "missing: captions; unknown: none"),
        (lambda content: content.update(adapted={}), "missing: none; unknown: adapted"),
        (lambda content: content.update(stages=[{}]), "missing: method, model"),
        (lambda content: content.update(stages=3), "expected results of this version"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, change, message):
    content = RESULTS.to_dict()
    change(content)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=f"results.json: .*{message}"):
        Results.read(path)


@pytest.mark.parametrize(
    "text",
    ["{", "[" * 100_000, '{"stages": [' * 400 + "]}" * 400, '{"seed": NaN}', '{"a": 1, "a": 1}', "9" * 5000, "3"],
)
def test_other_texts_are_refused_by_name(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(RunError, match="results.json: expected results of this version"):
        Results.read(path)
