"""The report on a data set: one with planted faults, one without any, and train.py --check-data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny import write_image

from upperson.config import DataConfig
from upperson.config.presets import PRESETS
from upperson.data import DATASETS, Sample, read_splits
from upperson.data.check import Counts, DataReport, Spread, check_dataset, text
from upperson.train.__main__ import main

LONG = "a man " * 38  # 76 words: with start and end, one token too many


@pytest.fixture
def sound(tmp_path) -> dict[str, list[Sample]]:
    """Three identities with two images each in every split, and nothing wrong."""
    splits: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    number = 0
    for split, samples in splits.items():
        for _ in range(6):
            image = write_image(tmp_path / f"{split}{number}.jpg", size=(20 + number, 60 + number))
            samples.append(Sample(image, f"person {number}", number // 2, number))
            number += 1
    return splits


def check(splits: dict[str, list[Sample]]) -> DataReport:
    return check_dataset("folder", splits, progress=False)


def test_nothing_wrong(sound):
    report = check(sound)
    assert report.usable and report.images == 18
    assert not (report.unreadable or report.of_several or report.cut_captions)
    assert report.widths == Spread(20, 28.5, 37) and report.heights == Spread(60, 68.5, 77)
    assert report.caption_tokens == Spread(4, 4, 5)  # start, "person", one or two digits, end
    for split in report.splits.values():
        assert split.counts == Counts(3, 6, 6) and split.published is None
        assert not (split.in_train or split.single_image or split.repeated_captions)
    findings = text(report).split("maximum\n")[1].splitlines()[4:]
    assert len(findings) == 13 and all(line.split()[0] == "0" for line in findings)


def test_images_that_cannot_be_read(sound):
    missing, cut, *_ = (sample.image for sample in sound["val"])
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-200])
    report = check(sound)
    assert not report.usable
    first, second = report.unreadable
    assert first == f"{missing}: image is missing"
    assert second.startswith(f"{cut}: image is broken (")
    assert report.widths == Spread(20, 29.5, 37) and report.images == 18  # widths of those that can be read
    assert f"       2 of 18 images missing or broken\n           {first}\n           {second}\n" in text(report)


def test_no_image_can_be_read(tmp_path):
    report = check({"test": [Sample(tmp_path / "no.jpg", "a man", 0, 0)]})
    assert report.widths is None and report.heights is None
    assert "1 of 1 images missing" in text(report) and "width" not in text(report)


@pytest.mark.parametrize(("missing", "listed", "more"), [(50, 50, []), (60, 50, ["and 10 more"])])
def test_fifty_paths_are_listed(tmp_path, missing, listed, more):
    report = check({"test": [Sample(tmp_path / f"{i}.jpg", f"man {i}", i // 2, i) for i in range(missing)]})
    assert len(report.unreadable) == missing
    assert text(report).count("image is missing") == listed
    assert [line.strip() for line in text(report).splitlines() if " more" in line] == more


def test_an_image_is_opened_once(sound, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "upperson.data.images.load_image", lambda image: opened.append(image) or Image.new("RGB", (1, 1))
    )
    sound["test"] += [replace(sample, caption="another") for sample in sound["test"]]
    report = check(sound)
    assert report.splits["test"].counts == Counts(3, 6, 12) and report.images == len(opened) == 18


def test_an_image_of_two_identities(sound):
    first = sound["train"][0]
    sound["train"].append(replace(first, person_id=77))
    report = check(sound)
    assert report.of_several == [(first.image, [0, 77])] and report.usable
    assert f"1 images listed under several identities\n           {first.image}: identities 0, 77\n" in text(report)


def test_identities_that_are_in_train(sound):
    shared = sound["test"][3]
    sound["test"][3] = replace(shared, person_id=1)
    report = check(sound)
    assert report.splits["test"].in_train == {1: shared.image}
    assert report.splits["val"].in_train == report.splits["train"].in_train == {}
    expected = f"1 identities of test that are also in train\n           1, such as {shared.image}\n"
    assert expected in text(report)
    assert "0 identities of val that are also in train" in text(report)


def test_captions_that_are_cut(sound):
    long = replace(sound["val"][2], caption=LONG)
    just_short = replace(sound["val"][3], caption=LONG.removesuffix("man "))
    sound["val"][2:4] = long, just_short
    report = check(sound)
    assert report.cut_captions == [(long, 78)] and report.caption_tokens.maximum == 78
    assert "1 captions longer than 77 tokens" in text(report) and f"{long.image}, 78 tokens: 'a man a" in text(report)


def test_five_examples_of_the_rest_are_listed(sound):
    sound["test"] = [replace(sample, caption=LONG) for sample in sound["test"]]
    shown = text(check(sound))
    assert "6 captions longer than 77 tokens" in shown and shown.count(", 78 tokens: ") == 5
    assert "\n           and 1 more\n" in shown


def test_captions_of_several_identities(sound):
    samples = sound["train"]
    samples[1] = replace(samples[1], caption=samples[0].caption)  # of the same identity: as it should be
    samples[4] = replace(samples[4], caption=" A  man")
    samples[2] = replace(samples[2], caption="a man ")
    sound["val"][0] = replace(sound["val"][0], caption="a man")  # in another split
    report = check(sound)
    assert report.splits["train"].repeated_captions == {"a man": [1, 2]}
    assert report.splits["val"].repeated_captions == {}
    assert "1 captions of train that describe several identities\n           'a man': identities 1, 2" in text(report)


def test_identities_with_a_single_image(sound):
    del sound["val"][0]
    sound["val"].append(sound["val"][0])  # a second caption is no second image
    report = check(sound)
    assert report.splits["val"].single_image == [3] and report.splits["train"].single_image == []
    assert "1 identities of val with a single image" in text(report)


def test_published_counts_are_below_the_counts_found(sound):
    del sound["val"]
    report = check_dataset("rstpreid", sound, progress=False)
    assert report.title == "RSTPReid"
    assert report.splits["val"].counts == Counts(0, 0, 0)
    assert report.splits["val"].published == Counts(200, 1000, 2000)
    rows = [" ".join(line.split()) for line in text(report).splitlines()]
    start = rows.index("train 3 6 6")
    assert rows[start : start + 6] == [
        "train 3 6 6",
        "published 3,701 18,505 37,010 DIFFERS",
        "val 0 0 0",
        "published 200 1,000 2,000 DIFFERS",
        "test 3 6 6",
        "published 200 1,000 2,000 DIFFERS",
    ]
    same = replace(report.splits["test"], counts=Counts(200, 1000, 2000))
    rows = text(replace(report, splits={"test": same})).splitlines()
    assert sum("published" in row for row in rows) == 1 and not any("DIFFERS" in row for row in rows)


def test_synthetic_data(capsys):
    splits = read_splits(DataConfig(embedded_identities=(2, 1, 1), embedded_views=2))
    report = check_dataset("embedded", splits)
    assert report.usable and report.title == "embedded" and report.images == 8
    assert report.splits["train"].counts == Counts(2, 4, 8) and report.splits["train"].published is None
    assert report.widths == Spread(64, 64, 64) and report.heights == Spread(192, 192, 192)
    progress = capsys.readouterr().err
    assert "checking images" in progress and "counting tokens" in progress


def test_names_and_paths_that_are_almost_the_same(sound):
    names = ["Ann", "ann ", "0025", "25", "a\u0301", "\xe1", "b\u200b", "b", "c", "d"]
    samples = [replace(sound["train"][0], person_id=i, person_name=name) for i, name in enumerate(names)]
    paths = ["x/A.jpg", "x/a.jpg", "x/y/../z.jpg", "x/z.jpg", "x/w.jpg"]
    samples += [replace(samples[-1], image=Path(path), image_id=100 + i) for i, path in enumerate(paths)]
    report = check({"train": samples})
    assert report.similar_identities == [["0025", "25"], ["Ann", "ann "], ["a\u0301", "\xe1"], ["b", "b\u200b"]]
    assert report.similar_images == [["x/A.jpg", "x/a.jpg"], ["x/y/../z.jpg", "x/z.jpg"]]
    assert "4 groups of identities that differ only in case" in text(report) and "'b' and 'b\\u200b'" in text(report)
    assert "2 groups of image paths" in text(report)


def test_training_needs_two_pairs(sound):
    assert check(sound).untrainable is None
    assert check(sound | {"train": sound["train"][:1]}).untrainable == (
        "training needs at least 2 pairs of image and caption"
    )
    assert check({"val": sound["val"]}).untrainable == "training needs the split train and test"


class TestCommandLine:
    def write(self, folder: Path, entries: list[dict]) -> list[str]:
        (folder / "reid_raw.json").write_text(json.dumps(entries))
        for entry in entries:
            write_image(folder / "imgs" / entry["file_path"])
        return ["--preset", "cuhk-pedes", "--data-root", str(folder), "--check-data"]

    entries = [
        {"split": split, "id": number, "file_path": f"{number}.jpg", "captions": ["a man", "he walks"]}
        for number, split in enumerate(["train", "train", "val", "test"])
    ]

    @pytest.mark.filterwarnings("error")
    def test_sound(self, tmp_path, capsys, monkeypatch):
        arguments = self.write(tmp_path, self.entries)
        assert main(arguments) == 3
        shown = capsys.readouterr().out
        assert shown.startswith("CUHK-PEDES\n") and "       0 of 4 images missing or broken\n" in shown
        assert "2 captions of train that describe several identities" in shown
        assert shown.splitlines()[-1].startswith("The counts differ from the published ones")
        published = {"train": Counts(2, 2, 4), "val": Counts(1, 1, 2), "test": Counts(1, 1, 2)}
        monkeypatch.setitem(DATASETS, "cuhk-pedes", replace(DATASETS["cuhk-pedes"], published=published))
        assert main(arguments) == 0 and "differ from" not in capsys.readouterr().out

    def test_missing_and_broken(self, tmp_path, capsys):
        arguments = self.write(tmp_path, self.entries)
        (tmp_path / "imgs/0.jpg").unlink()
        (tmp_path / "imgs/3.jpg").write_text("no image")
        assert main(arguments) == 1
        shown = capsys.readouterr().out
        assert f"{tmp_path}/imgs/0.jpg: image is missing" in shown
        assert f"{tmp_path}/imgs/3.jpg: image is broken" in shown and "2 of 4 images missing or broken" in shown

    def test_a_split_alone(self, tmp_path, capsys):
        """Also data that can only be evaluated can be checked."""
        write_image(tmp_path / "a.jpg")
        (tmp_path / "captions.csv").write_text("image,caption,identity\na.jpg,a man,1\n")
        assert main(["--check-data", "--dataset", "folder", "--data-root", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith("Own data\n")
        assert shown.endswith("The data cannot be trained on: training needs the split train.\n")

    def test_people_keep_the_names_of_the_file(self, tmp_path, capsys):
        for name in "abc":
            write_image(tmp_path / f"{name}.jpg")
        (tmp_path / "captions.csv").write_text(
            "image,caption,identity,split\na.jpg,a man,0025,train\na.jpg,a boy,25,train\nb.jpg,a man,0007,train\n"
            "c.jpg,a man,0025,test\n"
        )
        assert main(["--check-data", "--dataset", "folder", "--data-root", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert "a.jpg: identities 0025, 25\n" in shown
        assert f"1 identities of test that are also in train\n           0025, such as {tmp_path / 'c.jpg'}\n" in shown
        assert "'a man': identities 0025, 0007\n" in shown

    def test_what_cannot_be_read_at_all(self, tmp_path, capsys):
        arguments = self.write(tmp_path, [*self.entries, {"file_path": "5.jpg"}])
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and "reid_raw.json, entry 4: expected a field 'split'" in captured.err

    @pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**20, 10**399])
    def test_ids_beyond_64_bits(self, tmp_path, capsys, number):
        assert main(self.write(tmp_path, [*self.entries[:3], self.entries[3] | {"id": number}])) == 1
        assert "reid_raw.json, entry 3, field 'id': expected an integer of at most 64 bits" in capsys.readouterr().err

    def test_a_person_without_an_image(self, tmp_path, capsys):
        """Evaluation would fail, since the captions of this person have no image to find."""
        entries = [*self.entries, self.entries[3] | {"id": 4}]
        assert main(self.write(tmp_path, entries)) == 1
        assert "1 identities of test that cannot be evaluated" in capsys.readouterr().out
        assert main(self.write(tmp_path, [*entries, self.entries[3] | {"id": 4, "file_path": "4.jpg"}])) == 3

    def test_embedded(self, capsys):
        assert main(["--check-data", "--embedded-identities", "2", "1", "1"]) == 0
        assert capsys.readouterr().out.startswith("embedded\n")

    def test_without_the_flag_it_trains(self, monkeypatch):
        trained = []
        monkeypatch.setattr("upperson.train.fit.fit", trained.append)
        assert main(["--preset", "mscoco"]) == 0
        assert trained == [PRESETS["mscoco"]]

    def test_help(self, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "--check-data" in capsys.readouterr().out

    def test_wrong_flag(self, capsys):
        with pytest.raises(SystemExit):
            main(["--check-date"])
        assert "unrecognized arguments: --check-date" in capsys.readouterr().err
