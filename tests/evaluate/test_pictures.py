"""Tables and pictures: the numbers of the table, the frames of the top ten, the curve."""

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from upperson.config import SELECTIONS
from upperson.data import Sample
from upperson.evaluate import pictures
from upperson.evaluate.results import Results
from upperson.evaluate.tables import markdown, text

ZERO_SHOT = {"R@1": 8.125, "R@5": 20.5, "R@10": 31.25, "mAP": 9.75, "mINP": 4.0}
ADAPTED = {"R@1": 41.375, "R@5": 66.5, "R@10": 77.75, "mAP": 38.25, "mINP": 22.5}


@pytest.fixture
def results():
    return Results(
        method="UP-Person", model="embedded", trained_on="embedded", evaluated_on="embedded", split="test",
        captions=1600, images=800, text_to_image=ADAPTED, zero_shot=ZERO_SHOT, selection="val", epoch=2, epochs=3,
        losses="sdm+id", trained={"prefix": 74648, "lora": 100000}, all_parameters=8233145,
    )  # fmt: skip


@pytest.fixture
def samples(tmp_path):
    """Eight people with two images each, one caption an image."""
    samples = []
    for index in range(16):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (20, 48), (90, 90, 100 + 9 * index)).save(path)
        caption = f"Person {index} in a $5 \\coat, who paid $3, " + "striped " * (40 if index == 1 else 1)
        samples.append(Sample(path, caption, index // 2, index))
    return samples


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def share_of(colour, png):
    return (np.abs(pixels(png) - 255 * np.array(to_rgb(colour))).max(-1) < 2).mean()


def test_text_table_has_every_number_in_its_column(results):
    lines = text(results).splitlines()
    header = next(line.split() for line in lines if "R@10" in line)
    for name, metrics in (("zero-shot CLIP", ZERO_SHOT), ("UP-Person ", ADAPTED)):
        row = next(line for line in lines if line.startswith(name))
        assert row.split()[-5:] == [f"{metrics[column]:.2f}" for column in header]


def test_markdown_table_has_every_number_in_its_column(results):
    rows = [line.strip("|").split("|") for line in markdown(results).splitlines() if line.startswith("|")]
    header, rule, *body = rows
    assert {len(row) for row in rows} == {6} and set("".join(rule)) <= set("-:")
    for row, metrics in zip(body, (ZERO_SHOT, ADAPTED), strict=True):
        assert [cell.strip() for cell in row[1:]] == [f"{metrics[name.strip()]:.2f}" for name in header[1:]]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_tables_name_split_and_selection(results, selection):
    results = results.replace(selection=selection)
    for shown in (text(results), markdown(results)):
        assert "test split: 1,600 queries, 800 images" in shown
        assert f"epoch 2 of 3, selection {selection} ({SELECTIONS[selection]})" in shown
        assert "174,648 of 8,233,145 parameters" in shown


def test_a_model_that_was_not_trained_has_one_row(results):
    results = results.replace(method="zero-shot CLIP", selection="none", text_to_image=ZERO_SHOT)
    for shown in (text(results), markdown(results)):
        assert shown.count("8.12") == 1 and shown.count("zero-shot CLIP") == 2


@pytest.fixture
def staged(results):
    """Results of two stages, of three epochs and of two."""
    first = results.replace(title="first the one part", text_to_image=ADAPTED | {"mAP": 30.125}, trained={"lora": 4096})
    second = results.replace(title="then the other", losses="itc", epoch=1, epochs=2)
    return results.replace(method="Some Method", stages=(first, second))


def test_stages_have_a_row_and_a_footnote_each(staged):
    for shown in (text(staged), markdown(staged)):
        lines = shown.splitlines()
        names = ("zero-shot CLIP", "first the one part", "then the other")
        rows = [next(line.replace("|", " ") for line in lines if name in line) for name in names]
        values = [row.replace(name, "").split() for row, name in zip(rows, names, strict=True)]
        assert [row[3] for row in values] == ["9.75", "30.12", "38.25"] and {len(row) for row in values} == {5}
        for note in (
            "first the one part: epoch 2 of 3, selection val",
            "; 4,096 of 8,233,145 parameters trained.",
            "then the other: epoch 1 of 2, selection val",
            "Some Method, all stages: 174,648 of 8,233,145 parameters trained.",
        ):
            assert note in shown


def test_what_a_training_started_from_has_a_row(results):
    results = results.replace(start=ADAPTED | {"R@1": 12.25})
    for shown in (text(results), markdown(results)):
        row = next(line for line in shown.splitlines() if line.strip("| ").startswith("start"))
        assert row.replace("|", " ").split() == ["start", "12.25", "66.50", "77.75", "38.25", "22.50"]


def picture(samples, number=2, **tops):
    """The pixels of the picture of a few queries; `tops` by method, for all samples."""
    queries = pictures.shown_queries(samples, number)
    return pictures.top_ten(samples, queries, {name: [top[query] for query in queries] for name, top in tops.items()})


@pytest.mark.slow
def test_right_and_wrong_images_are_framed_by_person(samples):
    people = [sample.person_id for sample in samples]
    right = [[index for index, other in enumerate(people) if other == person] for person in people]
    wrong = [[(index + 2) % len(samples) for index in row] for row in right]
    mixed = [[a[0], b[0]] for a, b in zip(right, wrong, strict=True)]
    all_right, all_wrong, mixed = (picture(samples, UP=top) for top in (right, wrong, mixed))
    assert share_of(pictures.RIGHT, all_right) > 0 and share_of(pictures.WRONG, all_right) == 0
    assert share_of(pictures.WRONG, all_wrong) > 0 and share_of(pictures.RIGHT, all_wrong) == 0
    assert share_of(pictures.WRONG, mixed) == pytest.approx(share_of(pictures.RIGHT, mixed), rel=0.1)


def test_picture_shows_the_images_that_were_found(samples):
    colours = {tuple(colour) for colour in pixels(picture(samples, UP=[list(range(10))] * 16)).reshape(-1, 3)}
    assert {(90, 90, 100 + 9 * index) for index in range(10)} <= colours
    assert not {(90, 90, 100 + 9 * index) for index in range(10, 16)} & colours


@pytest.mark.slow
def test_methods_are_below_each_other(samples):
    first, second = [list(range(6, 16))] * 16, [list(range(10))] * 16
    one, two = pixels(picture(samples, 1, UP=second)), pixels(picture(samples, 1, zero_shot=first, UP=second))
    assert two.shape[0] > 1.6 * one.shape[0]
    colours = {tuple(colour) for colour in two.reshape(-1, 3)}
    assert {(90, 90, 100 + 9 * index) for index in range(16)} <= colours


@pytest.mark.parametrize(
    "caption", ["W" * 400, "WWW MMM " * 50, "iii lll " * 50, "a wide maroon coat " * 9, "東京 " * 90, ""]
)
def test_no_caption_is_cut_at_the_edge(samples, caption):
    band = pixels(picture([replace(samples[0], caption=caption)], UP=[[0]]))[: pictures.TITLE + pictures.CAPTION]
    assert (band[:, -pictures.MARGIN :] == 255).all()
    text = (band[pictures.TITLE :] < 128).any(2).any(0).nonzero()[0]
    assert len(caption) < 300 or text.max() > 0.8 * band.shape[1]  # a long one fills its line


def test_shown_queries_are_spread_evenly(samples):
    assert pictures.shown_queries(samples, 2) == [4, 12] and pictures.shown_queries(samples, 4) == [2, 6, 10, 14]
    assert pictures.shown_queries(samples[:1], 4) == [0]


def test_picture_of_a_small_split(samples):
    assert pixels(picture(samples[:1], UP=[[0]])).shape[2] == 3


def test_curve_follows_the_history(results):
    history = [{"epoch": 0, **ZERO_SHOT}]
    history += [{"epoch": epoch, "loss": 9 - epoch, **ADAPTED, "R@1": 10.0 * epoch} for epoch in (1, 2, 3)]
    first = pixels(pictures.curve([history], "val", results))
    assert first.shape[0] > 300 and first.std() > 10
    for key, value in (("loss", 1.0), ("R@1", 3.0), ("mAP", 3.0)):
        changed = [*history[:-1], history[-1] | {key: value}]
        assert (pixels(pictures.curve([changed], "val", results)) != first).any(), key
    assert (pixels(pictures.curve([history], "val", results.replace(epoch=3))) != first).any()


@pytest.mark.slow
def test_curve_shows_stages_beside_each_other(staged):
    def history(epochs):
        return [
            {"epoch": 0, **ZERO_SHOT},
            *({"epoch": e, "loss": 9 - e, **ADAPTED, "R@1": 10.0 * e} for e in range(1, epochs + 1)),
        ]

    both = pixels(pictures.curve([history(3), history(2)], "val", staged))
    changed = history(2)[:-1] + [history(2)[-1] | {"mAP": 3.0}]
    assert (pixels(pictures.curve([history(3), changed], "val", staged)) != both).any()
    before = [{"epoch": 0, **ADAPTED}, *history(2)[1:]]  # the end of the first stage, in its curve
    assert (pixels(pictures.curve([history(3), before], "val", staged)) == both).all()
    with pytest.raises(ValueError, match="argument 2 is longer"):
        pictures.curve([history(3)], "val", staged)


def test_curve_of_one_epoch(results):
    history = [{"epoch": 0, **ZERO_SHOT}, {"epoch": 1, "loss": 3.0, **ADAPTED}]
    assert pixels(pictures.curve([history], "test", results.replace(epoch=1))).std() > 0


@pytest.mark.parametrize("epochs", [1, 3])
def test_no_point_of_the_curve_is_cut(results, epochs, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "as_png", lambda figure: figures.append(figure) or b"")
    history = [{"epoch": 0, **ZERO_SHOT}, *({"epoch": e, "loss": 3.0, **ADAPTED} for e in range(1, epochs + 1))]
    pictures.curve([history], "val", results.replace(epoch=1))
    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        assert low < 1 and high > epochs
        figures[0].canvas.draw()
        shown = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
        assert shown == [str(epoch) for epoch in range(1, epochs + 1)]
