"""Readers, checks, transforms and loaders, on small JPEG files made here."""

import importlib
import json
import multiprocessing
import os
import pickle
import random
import re
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_image

from upperson.data import (
    Preprocess,
    Sample,
    batches_per_epoch,
    caption_loader,
    check_images,
    gallery,
    image_loader,
    load_image,
    mask_caption,
    queries,
    read_dataset,
    train_loader,
)
from upperson.data.augmentation import RandomAugmentation
from upperson.data.loaders import stable_seed
from upperson.errors import DataError
from upperson.losses.names import NOT_MASKED
from upperson.machine import share_of
from upperson.model.captions import CaptionPacker, PackedCaptions, pack_captions, words_of

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
START_ID, END_ID, MASK_ID = 49406, 49407, 49405
TITLES = {"cuhk-pedes": "CUHK-PEDES", "icfg-pedes": "ICFG-PEDES", "rstpreid": "RSTPReid"}
ANNOTATIONS = {
    "cuhk-pedes": "reid_raw.json",
    "icfg-pedes": "ICFG-PEDES.json",
    "rstpreid": "data_captions.json",
}

pytestmark = pytest.mark.filterwarnings("ignore:.*published are.*:UserWarning")


def entries_of(name: str) -> list[dict]:
    """A small data set in the format of `name`. Ids have gaps; the first CUHK image has three captions."""
    key = "img_path" if name == "rstpreid" else "file_path"
    rows = [("train", 5, "a/1.jpg"), ("train", 5, "a/2.jpg"), ("train", 90, "b/3.jpg")]
    rows += [] if name == "icfg-pedes" else [("val", 200, "b/4.jpg")]
    rows += [("test", 301, "c/5.jpg"), ("test", 301, "c/6.jpg"), ("test", 17, "c/7.jpg")]
    wording = ["{} first"] if name == "icfg-pedes" else ["{} first", "{} second"]
    entries = [
        {"split": split, "id": person, key: path, "captions": [words.format(path) for words in wording]}
        for split, person, path in rows
    ]
    if name == "cuhk-pedes":
        entries[0]["captions"].append("a third caption")
    return entries


def image_path(entry: dict) -> str:
    return entry.get("file_path") or entry["img_path"]


def write_dataset(parent: Path, name: str, entries: object = None) -> Path:
    """Writes `entries` (text is written as it is) and images; returns the data set's own folder."""
    folder = parent / TITLES[name]
    for number, entry in enumerate(entries_of(name)):
        write_image(folder / "imgs" / image_path(entry), number)
    if entries is None:
        entries = entries_of(name)
    (folder / ANNOTATIONS[name]).write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """Eleven pairs of six images."""
    folder = tmp_path_factory.mktemp("images")
    images = [write_image(folder / f"{i}.jpg", i, (32 + i, 96)) for i in range(6)]
    text = "person {} wears a long red coat, black leggings and white sneakers"
    return [Sample(images[i // 2], text.format(i), 10 * (i // 4), i // 2) for i in range(11)]


class TestReaders:
    @pytest.mark.parametrize("name", TITLES)
    @pytest.mark.parametrize("own_folder", [True, False])
    def test_reads_every_caption(self, tmp_path, name, own_folder):
        folder = write_dataset(tmp_path, name)
        splits = read_dataset(name, folder if own_folder else tmp_path)
        assert list(splits) == (["train", "test"] if name == "icfg-pedes" else ["train", "val", "test"])
        expected = [
            (entry["split"], folder / "imgs" / image_path(entry), entry["id"], caption)
            for entry in entries_of(name)
            for caption in entry["captions"]
        ]
        found = [(split, s.image, s.person_id, s.caption) for split in splits for s in splits[split]]
        assert found == expected
        assert all(s.person == s.person_id for split in splits.values() for s in split)  # the number that is published
        images = {s.image: s.image_id for split in splits.values() for s in split}
        assert len(set(images.values())) == len(images) == len(entries_of(name))
        check_images([s for split in splits.values() for s in split], progress=False)

    def test_all_captions_of_an_image(self, tmp_path):
        train = read_dataset("cuhk-pedes", write_dataset(tmp_path, "cuhk-pedes"))["train"]
        assert [s.caption for s in train if s.image_id == 0][-1] == "a third caption"
        assert len(train) == 7

    def test_an_image_listed_twice_is_one_image(self, tmp_path):
        entries = entries_of("icfg-pedes")
        entries.append(entries[-1] | {"captions": ["seen again"]})
        splits = read_dataset("icfg-pedes", write_dataset(tmp_path, "icfg-pedes", entries))
        images, person_ids = gallery(splits["test"])
        assert len(images) == 3 and person_ids.tolist() == [301, 301, 17]
        captions, person_ids = queries(splits["test"])
        assert captions[-1] == "seen again" and person_ids.tolist() == [301, 301, 17, 17]

    @pytest.mark.filterwarnings("default")
    def test_warns_of_other_counts(self, tmp_path):
        with pytest.warns(UserWarning) as caught:
            read_dataset("cuhk-pedes", write_dataset(tmp_path, "cuhk-pedes"))
        messages = [str(w.message) for w in caught]
        assert messages == [
            "CUHK-PEDES, split 'train': found 2 identities, 3 images, 7 captions; "
            "published are 11003 identities, 34054 images, 68126 captions",
            "CUHK-PEDES, split 'val': found 1 identities, 1 images, 2 captions; "
            "published are 1000 identities, 3078 images, 6158 captions",
            "CUHK-PEDES, split 'test': found 2 identities, 3 images, 6 captions; "
            "published are 1000 identities, 3074 images, 6156 captions",
        ]
        assert caught[0].filename == __file__

    @pytest.mark.filterwarnings("error")
    def test_published_counts_give_no_warning(self, tmp_path):
        # RSTPReid in full, but for the images: 5 an identity, 2 captions each.
        split_of = ["train"] * 3701 + ["val"] * 200 + ["test"] * 200
        entries = [
            {"split": split, "id": person, "img_path": f"{person}_{i}.jpg", "captions": ["one", "two"]}
            for person, split in enumerate(split_of)
            for i in range(5)
        ]
        splits = read_dataset("rstpreid", write_dataset(tmp_path, "rstpreid", entries))
        assert {split: len(samples) for split, samples in splits.items()} == {
            "train": 37010,
            "val": 2000,
            "test": 2000,
        }

    def test_warns_of_test_identities_in_train(self, tmp_path):
        entries = entries_of("icfg-pedes")
        entries[-1]["id"] = 5
        folder = write_dataset(tmp_path, "icfg-pedes", entries)
        with pytest.warns(UserWarning, match="split 'test': 1 identities are also in split 'train'.* 5[.]"):
            read_dataset("icfg-pedes", folder)

    def test_warns_of_an_image_of_two_people(self, tmp_path):
        entries = entries_of("icfg-pedes")
        entries[-1]["file_path"] = entries[-2]["file_path"]
        folder = write_dataset(tmp_path, "icfg-pedes", entries)
        with pytest.warns(UserWarning, match="c/6.jpg is listed under the identities 301 and 17"):
            read_dataset("icfg-pedes", folder)

    def test_an_ordinary_data_set_warns_of_its_counts_alone(self, tmp_path):
        folder = write_dataset(tmp_path, "icfg-pedes")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read_dataset("icfg-pedes", folder)
        assert all("published are" in str(w.message) for w in caught) and len(caught) == 2


def altered(change: dict, number: int = 2) -> list[dict]:
    """CUHK entries of which one has other fields; None removes a field."""
    entries = entries_of("cuhk-pedes")
    entries[number] = {k: v for k, v in (entries[number] | change).items() if v is not None}
    return entries


class TestBadAnnotations:
    def test_unknown_name(self, tmp_path):
        with pytest.raises(DataError, match="unknown data set 'cuhk': expected one of cuhk-pedes, icfg"):
            read_dataset("cuhk", tmp_path)

    @pytest.mark.parametrize("name", TITLES)
    def test_missing_folder_or_annotation(self, tmp_path, name):
        root = tmp_path / "data"
        first, second = root / ANNOTATIONS[name], root / TITLES[name] / ANNOTATIONS[name]
        looked_for = re.escape(f"looked for {first} and {second}")
        with pytest.raises(DataError, match=f"{TITLES[name]}: folder .*data does not exist; {looked_for}"):
            read_dataset(name, root)
        root.mkdir()
        with pytest.raises(DataError, match=f"{TITLES[name]}: annotation file not found; {looked_for}"):
            read_dataset(name, root)

    def test_missing_image_folder(self, tmp_path):
        (tmp_path / "reid_raw.json").write_text("[]")
        with pytest.raises(DataError, match="CUHK-PEDES: image folder .*imgs does not exist"):
            read_dataset("cuhk-pedes", tmp_path)

    @pytest.mark.parametrize("kept", [0, 1, 100, -1])
    def test_cut_off_json(self, tmp_path, kept):
        text = json.dumps(entries_of("cuhk-pedes"))[:kept]
        folder = write_dataset(tmp_path, "cuhk-pedes", text)
        with pytest.raises(DataError, match=rf"reid_raw.json: invalid or truncated JSON.*of {len(text)}\)"):
            read_dataset("cuhk-pedes", folder)

    def test_not_text(self, tmp_path):
        folder = write_dataset(tmp_path, "cuhk-pedes")
        (folder / "reid_raw.json").write_bytes(b'[{"split": "\xff"}]')
        with pytest.raises(DataError, match="reid_raw.json: expected UTF-8 text; byte 12 is invalid"):
            read_dataset("cuhk-pedes", folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"split": None}, ": expected a field 'split', found the fields 'id', 'file_path', 'captions'"),
            ({"id": None}, ": expected a field 'id', found"),
            ({"file_path": None}, ": expected a field 'file_path', found"),
            ({"captions": None}, ": expected a field 'captions', found"),
            ({"split": 3}, ", field 'split': expected a string, found an integer, 3"),
            ({"split": "Train"}, ", field 'split': expected one of train, val, test, found 'Train'"),
            ({"id": "5"}, ", field 'id': expected an integer, found a string, '5'"),
            ({"id": 5.0}, ", field 'id': expected an integer, found a number, 5.0"),
            ({"id": True}, ", field 'id': expected an integer, found true"),
            ({"id": 2**63}, ", field 'id': expected an integer of at most 64 bits, found 9223372036854775808"),
            ({"id": -(10**20)}, ", field 'id': expected an integer of at most 64 bits, found -1"),
            ({"file_path": "a\0"}, ", field 'file_path': expected a path, found a NUL character in 'a\\x00'"),
            (
                {"file_path": "a/" + 256 * "b"},
                ", field 'file_path': expected names of at most 255 bytes in a path, found",
            ),
            ({"captions": ["a\0"]}, ", field 'captions', caption 0: expected plain text, found a NUL character in "),
            ({"file_path": 1}, ", field 'file_path': expected a string, found an integer, 1"),
            ({"file_path": " "}, ", field 'file_path': expected a path, found an empty string"),
            ({"captions": "a man"}, ", field 'captions': expected a list, found a string, 'a man'"),
            ({"captions": []}, ", field 'captions': expected at least one caption, found an empty list"),
            ({"captions": ["a", 3]}, ", field 'captions', caption 1: expected a string, found an integer, 3"),
            ({"captions": ["a", ""]}, ", field 'captions', caption 1: expected text, found an empty string"),
            ({"captions": [" \t\n"]}, ", field 'captions', caption 0: expected text, found only white space"),
            (
                {"captions": ["\u200b"]},
                ", field 'captions', caption 0: expected text, found only invisible characters, '\\u200b'",
            ),
            ({"captions": ["\ufeff"]}, ", field 'captions', caption 0: expected text, found only invisible characters"),
            (
                {"captions": ["\u202e \u00ad"]},
                ", field 'captions', caption 0: expected text, found only invisible characters",
            ),
            ({"captions": ["a" * 5001]}, ", field 'captions', caption 0: expected at most 5000 characters"),
        ],
    )
    def test_wrong_field(self, tmp_path, change, message):
        folder = write_dataset(tmp_path, "cuhk-pedes", altered(change))
        with pytest.raises(DataError, match=re.escape(f"{folder / 'reid_raw.json'}, entry 2{message}")):
            read_dataset("cuhk-pedes", folder)

    def test_the_largest_ids(self, tmp_path):
        folder = write_dataset(tmp_path, "cuhk-pedes", altered({"id": 2**63 - 1}))
        assert queries(read_dataset("cuhk-pedes", folder)["train"])[1][-1].item() == 2**63 - 1

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[{"id": NaN}]', "field 'id': NaN is not a number that JSON allows; found at column 9 "),
            ('[{"id": 1, "id": 2}]', "the key 'id' stands twice in one object, {'id': 2}"),
            ('[{"captions": ["\\udc00"]}]', "the string at entry 0.captions[0] holds half of a surrogate pair"),
            ("[" * 100_000, "the JSON is nested too deeply"),
            ('[{"id": ' + "1" * 5000 + "}]", "field 'id': a number of 5000 digits; expected at most 400"),
        ],
    )
    def test_json_that_python_would_accept_or_fail_on(self, tmp_path, text, message):
        folder = write_dataset(tmp_path, "cuhk-pedes", text)
        with pytest.raises(DataError, match=re.escape(f"{folder / 'reid_raw.json'}: {message}")):
            read_dataset("cuhk-pedes", folder)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"train": []}, ": expected a list of entries, found an object"),
            ([*entries_of("cuhk-pedes"), "x"], ", entry 7: expected an object, found a string, 'x'"),
            (entries_of("cuhk-pedes")[4:], ": no entry of split 'train'"),
            (entries_of("cuhk-pedes")[:4], ": no entry of split 'test'"),
            ([], ": no entry of split 'train'"),
        ],
        ids=["object", "text", "train", "test", "empty"],
    )
    def test_wrong_entry(self, tmp_path, entries, message):
        folder = write_dataset(tmp_path, "cuhk-pedes", entries)
        with pytest.raises(DataError, match=re.escape(f"{folder / 'reid_raw.json'}{message}")):
            read_dataset("cuhk-pedes", folder)

    @pytest.mark.parametrize(
        "token",
        [
            "<|startoftext|>",
            "<|endoftext|>",
            "<|mask|>",
            "<start_of_text>",
            "<end_of_text>",
            "<END_of_text>",
            "&amp;lt;end_of_text&amp;gt;",
            "\uff1cend_of_text\uff1e",
        ],
    )
    def test_control_tokens(self, tmp_path, token):
        folder = write_dataset(tmp_path, "cuhk-pedes", altered({"captions": ["a man", f"a {token} hat"]}))
        with pytest.raises(DataError, match="entry 2, field 'captions', caption 1: .* the control token <"):
            read_dataset("cuhk-pedes", folder)

    def test_golden_captions(self, tmp_path, golden):
        """Those with control tokens are refused; all others that have text are read as they are."""
        tokens = golden("tokens")
        for caption in tokens["special_captions"]:
            folder = write_dataset(tmp_path, "cuhk-pedes", altered({"captions": [str(caption)]}))
            with pytest.raises(DataError, match="control token"):
                read_dataset("cuhk-pedes", folder)
        ordinary = [str(caption) for caption in tokens["captions"] if caption.strip()]
        folder = write_dataset(tmp_path, "cuhk-pedes", altered({"captions": ordinary}))
        assert [s.caption for s in read_dataset("cuhk-pedes", folder)["train"]][-len(ordinary) :] == ordinary


class TestImages:
    def test_names_missing_and_broken_images(self, tmp_path):
        names = ("good.jpg", "cut.jpg", "text.jpg")
        good, cut, text = (write_image(tmp_path / name, size=(64, 128)) for name in names)
        cut.write_bytes(cut.read_bytes()[:-500])
        text.write_text("not an image")
        missing = tmp_path / "missing.jpg"
        pairs = [Sample(p, "x", 0, i) for i, p in enumerate([good, cut, text, missing, cut])]
        with pytest.raises(DataError) as caught:
            check_images(pairs, progress=False)
        parts = str(caught.value).split("; ")
        assert (
            parts[0].startswith(f"3 of 4 images cannot be read: {cut}: image is broken (") and "truncated" in parts[0]
        )
        assert parts[1].startswith(f"{text}: image is broken (")
        assert parts[2:] == [f"{missing}: image is missing"]
        check_images(pairs[:1], progress=False)

    def test_names_the_first_few(self, tmp_path):
        pairs = [Sample(tmp_path / f"{i}.jpg", "x", 0, i) for i in range(9)]
        with pytest.raises(DataError) as caught:
            check_images(pairs, progress=False)
        parts = str(caught.value).split("; ")
        assert len(parts) == 6 and parts[0].startswith("9 of 9 images") and parts[-1] == "and 4 more"

    def test_progress_bar(self, samples, capsys):
        check_images(samples)
        assert "checking images" in capsys.readouterr().err
        check_images(samples, progress=False)
        assert capsys.readouterr().err == ""

    def test_every_mode_becomes_rgb(self, tmp_path):
        for mode in ("L", "P", "RGBA", "CMYK"):
            path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
            Image.new(mode, (4, 8)).save(path)
            assert load_image(path).mode == "RGB"

    def test_a_drawing_is_drawn_once(self):
        drawing = Stripes(3)
        first = np.asarray(load_image(drawing))
        count = DRAWN.count(drawing)
        assert (np.asarray(load_image(Stripes(3))) == first).all()
        assert DRAWN.count(drawing) == count == 1
        check_images([Sample(drawing, "x", 0, 0)], progress=False)


DRAWN: list["Stripes"] = []


@dataclass(frozen=True)
class Stripes:
    """A drawing that counts how often it is drawn."""

    width: int

    def draw(self) -> Image.Image:
        DRAWN.append(self)
        columns = np.arange(32) // self.width % 2 * 255
        return Image.fromarray(np.broadcast_to(columns[None, :, None], (96, 32, 3)).astype(np.uint8))


def transformed(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    return Preprocess(size, MEAN, STD)(image)


def denormalised(image: torch.Tensor) -> torch.Tensor:
    return image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


class TestTransforms:
    @pytest.mark.parametrize("size", [(384, 128), (192, 64), (32, 16)])
    def test_shape(self, size):
        image = transformed(Image.new("RGB", (50, 70)), size)
        assert type(image) is torch.Tensor and image.shape == (3, *size) and image.dtype == torch.float32

    def test_resize_and_normalise(self):
        pixels = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        resized = np.asarray(image.resize((64, 192), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        expected = torch.from_numpy((resized - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)
        torch.testing.assert_close(transformed(image, (192, 64)), expected, rtol=0, atol=1e-5)

    def test_downscaling_is_antialiased(self):
        columns = np.arange(640) % 10 // 9 * 255  # one white column in ten: mean 25.5
        image = Image.fromarray(np.broadcast_to(columns[None, :, None], (192, 640, 3)).astype(np.uint8))
        out = denormalised(transformed(image, (192, 64)))[:, :, 2:-2]
        assert (out - 0.1).abs().max() < 0.01


def masked_copy(caption: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return mask_caption(caption, generator)[0]


@pytest.fixture(scope="module")
def many_masked(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """A caption and 4000 masked copies of it."""
    text = "the woman is wearing a long red coat with black leggings and white sneakers on her feet"
    caption = tokenizer([text])[0]
    generator = torch.Generator().manual_seed(0)
    return caption, torch.stack([masked_copy(caption, generator) for _ in range(4000)])


class TestMasking:
    def test_rates(self, many_masked):
        caption, masked = many_masked
        content = masked[:, 1 : int(caption.argmax())]
        original = caption[1 : int(caption.argmax())]
        # The chance that nothing is selected adds to the first token, so that is left out.
        content, original = content[:, 1:], original[1:]
        is_mask = (content == MASK_ID).float().mean().item()
        is_random = ((content != original) & (content != MASK_ID)).float().mean().item()
        assert content.numel() > 60000
        # Four standard deviations: 0.0053 and 0.002.
        assert is_mask == pytest.approx(0.15 * 0.8, abs=0.0053)
        assert is_random == pytest.approx(0.15 * 0.1, abs=0.002)

    def test_random_ids_span_the_vocabulary(self, many_masked):
        caption, masked = many_masked
        changed = masked[(masked != caption) & (masked != MASK_ID)]
        assert changed.min() >= 1 and changed.max() <= 49404
        assert changed.min() < 1000 and changed.max() > 48400

    def test_start_end_and_padding_stay(self, many_masked):
        caption, masked = many_masked
        end = int(caption.argmax())
        assert caption[0] == START_ID and caption[end] == END_ID
        assert (masked[:, 0] == START_ID).all() and (masked[:, end:] == caption[end:]).all()
        assert (masked[:, 1:end] < MASK_ID + 1).all()

    def test_full_context(self, tokenizer):
        caption = tokenizer(["red " * 100])[0]
        generator = torch.Generator().manual_seed(0)
        masked = torch.stack([masked_copy(caption, generator) for _ in range(300)])
        assert (masked[:, 0] == START_ID).all() and (masked[:, 76] == END_ID).all()
        assert (masked[:, 1:76] == MASK_ID).any(0).all()

    def test_the_first_is_masked_when_none_is_selected(self, tokenizer):
        """Of two tokens none is selected in 72 % of the draws."""
        caption = tokenizer(["red coat"])[0]
        generator = torch.Generator().manual_seed(0)
        masked = torch.stack([masked_copy(caption, generator) for _ in range(2000)])
        rate = (masked[:, 1] == MASK_ID).float().mean().item()
        assert rate == pytest.approx(0.85 * 0.85 + 0.15 * 0.8, abs=0.035)
        assert (masked[:, 2] == MASK_ID).float().mean().item() == pytest.approx(0.12, abs=0.03)
        single = tokenizer(["coat"])[0]
        drawn = [int(masked_copy(single, generator)[1]) for _ in range(2000)]
        assert drawn.count(MASK_ID) / 2000 == pytest.approx(0.85 + 0.12, abs=0.016)

    def test_labels_are_the_selected_words(self, tokenizer):
        """What changed is labelled with what was there, and so are the tenth of the selected that stay."""
        caption = tokenizer(["red coat and black shoes"])[0]
        drawn = [mask_caption(caption, torch.Generator().manual_seed(seed)) for seed in range(2000)]
        masked, labels = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
        labelled = labels != NOT_MASKED
        assert labelled[:, 1:6].any(1).all() and not labelled[:, 0].any() and not labelled[:, 6:].any()
        assert torch.equal(labels[labelled], caption.expand_as(labels)[labelled])
        assert ((masked != caption) <= labelled).all()
        later = labelled[:, 2:6]  # the first word is also the one for want of others
        assert later.float().mean().item() == pytest.approx(0.15, abs=0.016)
        stayed = (masked == caption)[:, 2:6][later]
        assert stayed.float().mean().item() == pytest.approx(0.1, abs=0.035)

    def test_without_content_nothing_changes(self, tokenizer):
        caption = tokenizer([""])[0]
        masked, labels = mask_caption(caption, torch.Generator())
        assert torch.equal(masked, caption) and (labels == NOT_MASKED).all()

    def test_a_function_of_the_generator(self, tokenizer):
        caption = tokenizer(["a " * 40])[0]
        before = caption.clone()
        first, second, third = (masked_copy(caption, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
        assert torch.equal(first, second) and not torch.equal(first, third)
        assert torch.equal(caption, before)

    def test_the_mask_id_is_the_reference_one(self, golden):
        assert golden("tokens")["vocabulary"].tolist() == [49408, MASK_ID, START_ID, END_ID]

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (torch.zeros(2, 77, dtype=torch.int64), r"expected \[L\] int64, found \[2, 77\] torch.int64"),
            (torch.zeros(77), r"expected \[L\] int64, found \[77\] torch.float32"),
            (torch.arange(77), "expected an end token"),
        ],
    )
    def test_refuses(self, tokens, message):
        with pytest.raises(ValueError, match=message):
            mask_caption(tokens, torch.Generator())


@pytest.fixture
def loader(samples, tokenizer):
    """loader(...) is a training loader of the eleven pairs, with the given options."""

    def make(pairs=samples, **options):
        defaults = {"batch_size": 3, "seed": 1, "mask_captions": True, "workers": 0, "epoch": 0}
        return train_loader(pairs, tokenizer=tokenizer, image_size=(96, 32), **(defaults | options))

    return make


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


class TestTrainLoader:
    def test_batches(self, loader, samples):
        batches = list(loader())
        assert len(loader()) == len(batches) == 4
        for batch, count in zip(batches, [3, 3, 3, 2], strict=True):
            assert list(batch) == ["images", "augmentation", "captions", "person_ids"]
            assert batch["images"].shape == (count, 3, 96, 32) and batch["images"].dtype == torch.uint8
            assert batch["augmentation"].shape == (count, 7) and batch["augmentation"].dtype == torch.int64
            assert batch["captions"].shape == (count, 77) and batch["captions"].dtype == torch.int64
            assert batch["person_ids"].shape == (count,) and batch["person_ids"].dtype == torch.int64
        person_ids = torch.cat([batch["person_ids"] for batch in batches]).tolist()
        assert sorted(person_ids) == [sample.person_id for sample in samples]

    def test_pairs_belong_together(self, loader, samples, tokenizer):
        tokens = tokenizer([sample.caption for sample in samples])
        seen = []
        for batch in loader(mask_captions=False):
            for caption, person_id in zip(batch["captions"], batch["person_ids"], strict=True):
                seen.append(int((tokens == caption).all(1).nonzero()))
                assert samples[seen[-1]].person_id == person_id
        assert sorted(seen) == list(range(11)) and seen != list(range(11))

    def test_an_image_keeps_its_caption(self, loader, tokenizer):
        """Pictures of one brightness each, which the caption tells."""
        pairs = [Sample(Plain(40 * i), f"{i}", i, i) for i in range(6)]
        numbers = tokenizer([pair.caption for pair in pairs])
        (batch,) = loader(pairs, batch_size=6, mask_captions=False)
        for image, _, caption, person in zip(*batch.values(), strict=True):
            assert torch.equal(caption, numbers[person])
            assert (image == 40 * person).all()

    def test_labels_belong_to_the_masked_captions(self, loader):
        for masks in (True, False):
            for plain, batch in zip(
                loader(mask_captions=masks), loader(mask_captions=masks, mask_labels=True), strict=True
            ):
                assert set(plain) == {"images", "augmentation", "captions", "person_ids"}
                assert all(torch.equal(plain[name], batch[name]) for name in plain)
                masked, labels = batch["masked_captions"], batch["mask_labels"]
                assert torch.equal(masked, batch["captions"]) is masks
                assert torch.equal(batch["mask_positions"], (labels != NOT_MASKED).nonzero())
                assert (masked == MASK_ID).any() and ((masked == MASK_ID) <= (labels != NOT_MASKED)).all()

    @pytest.mark.parametrize("mask_captions", [True, False])
    def test_masking_is_a_choice(self, loader, mask_captions):
        captions = torch.cat([batch["captions"] for batch in loader(mask_captions=mask_captions)])
        assert (captions == MASK_ID).any().item() is mask_captions

    def test_a_function_of_seed_and_epoch(self, loader):
        first = list(loader())
        assert same(first, list(loader()))
        for options in ({"seed": 2}, {"epoch": 1}):
            other = list(loader(**options))
            for key in first[0]:
                assert not torch.equal(*(torch.cat([batch[key] for batch in run]) for run in (first, other)))

    @pytest.mark.parametrize("what", ["seed", "epoch"])
    def test_augmentation_differs(self, samples, loader, what):
        """Not the order alone: one image, eight times, with few chances of the same treatment."""
        pairs = [samples[0], samples[0]]
        drawn = torch.cat([batch["augmentation"] for number in range(4) for batch in loader(pairs, **{what: number})])
        assert len(drawn) == 8 and len(drawn.unique(dim=0)) >= 6

    def test_random_choices_depend_on_seed_epoch_and_index_alone(self, loader):
        """They come from torch's generator, seeded by SHA-256."""
        (batch,) = loader(batch_size=11, seed=4, epoch=2)
        order = torch.randperm(11, generator=torch.Generator().manual_seed(stable_seed("order", 4, 2)))
        for index, found in zip(order.tolist(), batch["augmentation"], strict=True):
            torch.manual_seed(stable_seed("image", 4, 2, index))
            assert torch.equal(found, RandomAugmentation((96, 32)).draw())

    def test_seeds_are_the_same_in_every_process(self):
        """Unlike those of hash(): this is SHA-256 of the text ('image', 1, 2, 3), first 8 bytes."""
        assert stable_seed("image", 1, 2, 3) == 6203637106530499380

    def test_workers_make_no_difference(self, loader):
        alone, shared = loader(), loader(workers=2)
        assert same(list(alone), list(shared))
        for loader_ in (alone, shared):
            loader_.batch_sampler.set_epoch(1)
        second = list(alone)
        assert same(second, list(shared)) and same(second, list(loader(epoch=1)))

    def test_signals_to_the_group_of_a_training_spare_its_loaders(self, loader):
        batches = iter(loader(workers=2))
        _ = next(batches), next(batches)  # one of each process, so both have started
        groups = {os.getpgid(process.pid) for process in multiprocessing.active_children()}
        assert len(groups) == 2 and os.getpgrp() not in groups

    @pytest.mark.parametrize("workers", [0, 2])
    def test_resumes_in_the_middle(self, loader, workers):
        whole = list(loader(epoch=3))
        resumed = loader(epoch=3, first_batch=2, workers=workers)
        assert len(resumed) == 2 and same(list(resumed), whole[2:])
        assert list(loader(epoch=3, first_batch=4)) == []

    def test_skipped_batches_are_not_loaded(self, loader):
        pairs = [Sample(Stripes(100 + i), "a man", i, i) for i in range(8)]
        list(loader(pairs, first_batch=2))
        assert sum(drawing.width >= 100 for drawing in DRAWN) == 2

    def test_global_random_state_stays(self, loader, samples):
        torch.manual_seed(5)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        for workers in (0, 2):
            list(loader(workers=workers))
        images = gallery(samples)[0]
        list(image_loader(images, preprocess=Preprocess((96, 32), MEAN, STD), batch_size=4, workers=0))
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        assert (np.random.get_state()[1] == before[2]).all()

    def test_other_random_state_makes_no_difference(self, loader):
        torch.manual_seed(5)
        first = list(loader())
        torch.manual_seed(6)
        assert same(first, list(loader()))

    @pytest.mark.parametrize(("pairs", "sizes"), [(11, [5, 5]), (10, [5, 5]), (12, [5, 5, 2]), (3, [3]), (6, [5])])
    def test_last_batch_of_one_is_left_out(self, samples, loader, pairs, sizes):
        batches = loader((samples + samples)[:pairs], batch_size=5)
        assert [len(batch["person_ids"]) for batch in batches] == sizes
        assert batches_per_epoch(pairs, 5) == len(batches) == len(sizes)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_broken_image_is_named(self, samples, loader, tmp_path, workers):
        missing = tmp_path / "gone.jpg"
        pairs = [*samples, Sample(missing, "a man", 0, 99)]
        with pytest.raises(DataError, match=re.escape(f"{missing}: image is missing")) as caught:
            list(loader(pairs, workers=workers))
        traceback.clear_frames(caught.tb)  # they keep the worker processes, which else take 5 s each to end

    def test_bad_arguments(self, samples, loader):
        with pytest.raises(ValueError, match="rank: expected 0 to 1, as world_size is 2, found 2"):
            loader(rank=2, world_size=2)
        with pytest.raises(ValueError, match="batch_size: expected at least 2, .* found 1"):
            loader(batch_size=1)
        with pytest.raises(ValueError, match="first_batch: expected 0 to 4, .* found 5"):
            loader(first_batch=5)
        with pytest.raises(DataError, match="at least 2 pairs of image and caption, found 1"):
            loader(samples[:1])


class TestShares:
    """A batch shared between processes."""

    @pytest.mark.parametrize("world_size", range(1, 6))
    @pytest.mark.parametrize("total", [0, 1, 2, 5, 64, 127, 128])
    def test_as_tensor_split(self, total, world_size):
        expected = [part.tolist() for part in torch.arange(total).tensor_split(world_size)]
        assert [list(share_of(total, rank, world_size)) for rank in range(world_size)] == expected

    @pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
    def test_no_such_rank(self, rank, world_size):
        with pytest.raises(ValueError, match=f"rank: expected 0 to .* world_size is {world_size}, found {rank}"):
            share_of(8, rank, world_size)

    @pytest.mark.parametrize("world_size", range(1, 6))
    @pytest.mark.parametrize(("batch_size", "first_batch"), [(2, 0), (3, 0), (4, 1), (8, 0), (11, 0)])
    def test_together_they_are_the_batch(self, loader, world_size, batch_size, first_batch):
        """Nothing is repeated or dropped, and the random choices are those of a single process."""
        options = {"batch_size": batch_size, "first_batch": first_batch, "epoch": 1, "mask_labels": True}
        whole = list(loader(**options))
        shares = [list(loader(rank=rank, world_size=world_size, **options)) for rank in range(world_size)]
        assert {len(share) for share in shares} == {len(whole)}
        for batch, *parts in zip(whole, *shares, strict=True):
            size = len(batch["person_ids"])
            for share in (batch, *parts):  # the positions count within a share
                assert torch.equal(share.pop("mask_positions"), (share["mask_labels"] != NOT_MASKED).nonzero())
            own = [part for rank, part in enumerate(parts) if share_of(size, rank, world_size)]
            assert same([{name: torch.cat([part[name] for part in own]) for name in batch}], [batch])
            for part in parts[len(own) :]:  # those without a share
                assert same([part], [{name: tensor[:1] for name, tensor in batch.items()}])

    def test_over_epochs(self, loader):
        """With the same loader, as in training."""
        loaders = [loader(rank=rank, world_size=2) for rank in range(2)]
        for epoch in range(2):
            whole = list(loader(epoch=epoch))
            for each in loaders:
                each.batch_sampler.set_epoch(epoch)
            for batch, first, second in zip(whole, *loaders, strict=True):
                assert len(first["person_ids"]) - len(second["person_ids"]) in (0, 1)
                assert same([{name: torch.cat([first[name], second[name]]) for name in batch}], [batch])


@dataclass(frozen=True)
class Plain:
    """A picture of one grey."""

    brightness: int

    def draw(self) -> Image.Image:
        return Image.new("RGB", (32, 96), (self.brightness,) * 3)


class TestPackedCaptions:
    """Captions are packed where they are loaded, by the object that the loader is given."""

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("mask_labels", [False, True])
    def test_in_training(self, samples, tokenizer, workers, mask_labels):
        options = dict(
            tokenizer=tokenizer, image_size=(48, 16), batch_size=4, seed=1, mask_captions=True, workers=workers,
            epoch=1, mask_labels=mask_labels,
        )  # fmt: skip
        packer = CaptionPacker(packs=True, first_position=0, room=77)
        plain, packed = (list(train_loader(samples, **options, pack=pack)) for pack in (None, packer))
        for first, second in zip(plain, packed, strict=True):
            assert first.keys() == second.keys()
            for name, values in first.items():
                if name in ("captions", "masked_captions"):
                    assert isinstance(second[name], PackedCaptions)
                    expected, found = pack_captions(values), second[name]
                    assert torch.equal(found.token_ids, expected.token_ids) and found.longest == expected.longest
                    assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
                else:
                    assert torch.equal(values, second[name])

    def test_in_evaluation(self, samples, tokenizer):
        captions, _ = queries(samples)
        packer = CaptionPacker(packs=True, first_position=3, room=20)
        for tokens, packed in zip(
            caption_loader(captions, tokenizer=tokenizer, batch_size=4),
            caption_loader(captions, tokenizer=tokenizer, batch_size=4, pack=packer),
            strict=True,
        ):
            expected = pack_captions(words_of(tokens, 20), 3)
            assert torch.equal(packed.token_ids, expected.token_ids) and packed.first_position == 3
            assert torch.equal(packed.positions, expected.positions)

    def test_or_left_as_they_are(self, tokenizer):
        tokens = tokenizer(["a man"])
        assert CaptionPacker(packs=False, first_position=0, room=77)(tokens) is tokens

    def test_a_packer_reaches_processes_that_are_spawned(self):
        packer = CaptionPacker(packs=True, first_position=3, room=20)
        assert pickle.loads(pickle.dumps(packer)) == packer


class TestEvaluationLoaders:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_images_in_order(self, samples, workers):
        images, person_ids = gallery(samples)
        assert person_ids.tolist() == [0, 0, 10, 10, 20, 20] and person_ids.dtype == torch.int64
        preprocess = Preprocess((96, 32), MEAN, STD)
        batches = list(image_loader(images, preprocess=preprocess, batch_size=4, workers=workers))
        assert [len(batch) for batch in batches] == [4, 2]
        expected = torch.stack([preprocess(load_image(image)) for image in images])
        assert torch.equal(torch.stack([preprocess(image) for image in images]), expected)
        assert torch.equal(torch.cat(batches), expected)

    def test_drawings(self):
        images = [Plain(255), Plain(0)]
        (batch,) = image_loader(images, preprocess=Preprocess((96, 32), MEAN, STD), batch_size=2, workers=0)
        assert (denormalised(batch[0]) - 1).abs().max() < 1e-5 and denormalised(batch[1]).abs().max() < 1e-5

    def test_captions_in_order(self, samples, tokenizer):
        captions, person_ids = queries(samples)
        assert person_ids.tolist() == [sample.person_id for sample in samples]
        batches = list(caption_loader(captions, tokenizer=tokenizer, batch_size=4))
        assert [len(batch) for batch in batches] == [4, 4, 3]
        assert torch.equal(torch.cat(batches), tokenizer([sample.caption for sample in samples]))

    def test_token_ids_are_the_golden_ones(self, golden, tokenizer):
        """Among them captions that are longer than 77 tokens and get cut."""
        tokens = golden("tokens")
        captions = [str(caption) for caption in tokens["captions"]]
        assert max(tokens["lengths"]) > 77
        ids = torch.cat(list(caption_loader(captions, tokenizer=tokenizer, batch_size=16)))
        assert torch.equal(ids, torch.from_numpy(tokens["token_ids"]))


def test_loader_benchmark(tmp_path, monkeypatch, capsys):
    """bench/loader.py, on few small images."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    benchmark = importlib.import_module("loader")
    monkeypatch.setattr(benchmark, "IMAGE_SIZE", (48, 16))
    file = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["loader.py", "--images", "5", "--workers", "2", "--json", str(file)])
    assert benchmark.main() == 0
    found = json.loads(file.read_text())
    assert [row["source"] for row in found["rows"]] == ["JPEG files", "decoded cache"]
    for row in found["rows"]:
        assert row["images"] == 5 and row["workers"] == 2
        assert row["images_per_second_per_core"] * row["cores_for_target"] == pytest.approx(7000)
        assert row["images_per_second"] == pytest.approx(2 * row["images_per_second_per_worker"])
    assert found["augmentation"]["milliseconds"] > 0 and "decoded cache" in capsys.readouterr().out
