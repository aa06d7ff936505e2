"""Flickr30k and MSCOCO in both formats, and a user's own data, in tiny files made here."""

import json
import os
import re
import warnings
from pathlib import Path

import pytest

from upperson.config import DataConfig
from upperson.data import DATASETS, gallery, queries, read_dataset
from upperson.data.splits import read_splits
from upperson.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*published are.*:UserWarning")

TITLES = {"flickr30k": "Flickr30k", "mscoco": "MSCOCO"}
KARPATHY = {"flickr30k": "dataset_flickr30k.json", "mscoco": "dataset_coco.json"}
FLAT = {"flickr30k": "flickr30k_{}.json", "mscoco": "coco_karpathy_{}.json"}
FOLDERS = {"flickr30k": "flickr30k-images", "mscoco": "val2014"}

# split, as Karpathy calls it, file name, captions
ROWS = [
    ("train", "1.jpg", ["a dog", "the dog runs"]),
    ("test", "2.jpg", ["a cat", "the cat sleeps", "a tabby"]),
    ("restval", "3.jpg", ["a bus"]),
    ("val", "4.jpg", ["a tree", "an oak"]),
    ("test", "5.jpg", ["a man", "a man again"]),
]


def split_of(row: tuple) -> str:
    return "train" if row[0] == "restval" else row[0]


def karpathy(name: str) -> dict:
    images = []
    for number, (split, file, captions) in enumerate(ROWS):
        image = {"split": split, "filename": file, "imgid": number, "sentences": [{"raw": c} for c in captions]}
        images.append(image | ({"filepath": "val2014"} if name == "mscoco" else {}))
    return {"dataset": name, "images": images}


def flat(name: str) -> dict[str, list]:
    """By split. In train an entry a caption, elsewhere an entry an image."""
    lists: dict[str, list] = {"train": [], "val": [], "test": []}
    for row in ROWS:
        image, captions = f"{FOLDERS[name]}/{row[1]}", row[2]
        lists[split_of(row)] += (
            [{"image": image, "caption": caption, "image_id": image} for caption in captions]
            if split_of(row) == "train"
            else [{"image": image, "caption": captions}]
        )
    return lists


def write(folder: Path, name: str, kind: str, content: object = None) -> Path:
    """Annotation files of one kind, and the empty folder of the images."""
    (folder / FOLDERS[name]).mkdir(parents=True)
    if kind == "karpathy":
        (folder / KARPATHY[name]).write_text(json.dumps(karpathy(name) if content is None else content))
    else:
        for split, listed in (flat(name) if content is None else content).items():
            (folder / FLAT[name].format(split)).write_text(json.dumps(listed))
    return folder


def altered(entry: dict, change: dict) -> dict:
    """None removes a field."""
    return {key: value for key, value in (entry | change).items() if value is not None}


both_sets = pytest.mark.parametrize("name", TITLES)
both_kinds = pytest.mark.parametrize("kind", ["karpathy", "flat"])


class TestCaptioned:
    @both_sets
    @both_kinds
    @pytest.mark.parametrize("own_folder", [True, False])
    def test_reads_every_caption(self, tmp_path, name, kind, own_folder):
        folder = write(tmp_path / TITLES[name], name, kind)
        splits = read_dataset(name, folder if own_folder else tmp_path)
        assert list(splits) == ["train", "val", "test"]
        for split, samples in splits.items():
            expected = [
                (folder / FOLDERS[name] / file, caption)
                for row in ROWS
                if split_of(row) == split
                for _, file, captions in [row]
                for caption in captions
            ]
            assert [(sample.image, sample.caption) for sample in samples] == expected
        everything = [sample for samples in splits.values() for sample in samples]
        assert all(sample.person_id == sample.image_id for sample in everything)
        assert len({sample.image_id for sample in everything}) == len(ROWS)

    @both_kinds
    def test_every_image_is_searched_by_its_own_captions(self, tmp_path, kind):
        test = read_dataset("mscoco", write(tmp_path, "mscoco", kind))["test"]
        images, image_ids = gallery(test)
        captions, caption_ids = queries(test)
        assert [image.name for image in images] == ["2.jpg", "5.jpg"] and len(captions) == 5
        assert (caption_ids == image_ids[[0, 0, 0, 1, 1]]).all() and image_ids[0] != image_ids[1]

    def test_karpathys_file_goes_before_the_lists(self, tmp_path):
        write(tmp_path, "flickr30k", "flat", {"test": ["nonsense"]})
        (tmp_path / KARPATHY["flickr30k"]).write_text(json.dumps(karpathy("flickr30k")))
        assert len(read_dataset("flickr30k", tmp_path)["test"]) == 5

    def test_lists_may_hold_strings_or_lists_everywhere(self, tmp_path):
        lists = {
            "train": [{"image": "val2014/1.jpg", "caption": ["a", "b"]}],
            "test": [{"image": "val2014/2.jpg", "caption": "c"}],
        }
        splits = read_dataset("mscoco", write(tmp_path, "mscoco", "flat", lists))
        found = {split: [s.caption for s in samples] for split, samples in splits.items()}
        assert found == {"train": ["a", "b"], "test": ["c"]}

    @pytest.mark.parametrize(
        ("name", "kind", "folder"),
        [
            ("flickr30k", "karpathy", "flickr30k-images"),
            ("flickr30k", "karpathy", "flickr30k_images"),
            ("flickr30k", "karpathy", "imgs"),
            ("flickr30k", "karpathy", "images"),
            ("flickr30k", "flat", "flickr30k-images"),
            ("flickr30k", "flat", "images/flickr30k-images"),
            ("mscoco", "karpathy", "val2014"),
            ("mscoco", "karpathy", "images/val2014"),
            ("mscoco", "flat", "imgs/val2014"),
        ],
    )
    def test_where_the_images_may_lie(self, tmp_path, name, kind, folder):
        write(tmp_path, name, kind)
        (tmp_path / FOLDERS[name]).rmdir()
        (tmp_path / folder).mkdir(parents=True)
        assert read_dataset(name, tmp_path)["train"][0].image == tmp_path / folder / "1.jpg"

    @pytest.mark.parametrize(
        ("name", "kind", "tried"),
        [
            ("flickr30k", "karpathy", ["flickr30k-images", "flickr30k_images", "imgs", "images"]),
            (
                "flickr30k",
                "flat",
                [
                    "flickr30k-images",
                    "flickr30k-images/flickr30k-images",
                    "flickr30k_images/flickr30k-images",
                    "imgs/flickr30k-images",
                    "images/flickr30k-images",
                ],
            ),
            ("mscoco", "karpathy", ["val2014", "images/val2014", "imgs/val2014"]),
        ],
    )
    def test_missing_image_folder(self, tmp_path, name, kind, tried):
        write(tmp_path, name, kind)
        (tmp_path / FOLDERS[name]).rmdir()
        message = f"{TITLES[name]}: image folder not found; looked for " + ", ".join(str(tmp_path / f) for f in tried)
        with pytest.raises(DataError, match=re.escape(message) + "$"):
            read_dataset(name, tmp_path)

    @both_sets
    def test_missing_annotation(self, tmp_path, name):
        names = [KARPATHY[name], *(FLAT[name].format(split) for split in ("train", "val", "test"))]
        *others, last = [str(folder / file) for folder in (tmp_path, tmp_path / TITLES[name]) for file in names]
        message = f"{TITLES[name]}: annotation file not found; looked for {', '.join(others)} and {last}"
        with pytest.raises(DataError, match=re.escape(message)):
            read_dataset(name, tmp_path)

    def test_missing_split(self, tmp_path):
        write(tmp_path, "mscoco", "flat", {"test": flat("mscoco")["test"]})
        source = re.escape(str(tmp_path / "coco_karpathy_{train,val,test}.json"))
        with pytest.raises(DataError, match=f"{source}: no entry of split 'train', expected at least one$"):
            read_dataset("mscoco", tmp_path)
        assert list(read_dataset("mscoco", tmp_path, need=("test",))) == ["test"]

    @both_sets
    def test_no_entry(self, tmp_path, name):
        write(tmp_path, name, "karpathy", {"images": []})
        with pytest.raises(DataError, match=f"{KARPATHY[name]}: no entry, expected at least one"):
            read_dataset(name, tmp_path, need=())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"split": "dev"}, ", field 'split': expected one of train, val, test, restval, found 'dev'"),
            (
                {"filename": None},
                ": expected a field 'filename', found the fields 'split', 'imgid', 'sentences', 'file",
            ),
            ({"filename": ""}, ", field 'filename': expected a path, found an empty string"),
            ({"filepath": None}, ": expected a field 'filepath', found"),
            ({"sentences": "a dog"}, ", field 'sentences': expected a list, found a string, 'a dog'"),
            ({"sentences": []}, ", field 'sentences': expected at least one sentence, found an empty list"),
            ({"sentences": ["a"]}, ", field 'sentences', sentence 0: expected an object, found a string, 'a'"),
            (
                {"sentences": [{"raw": "a"}, {"tokens": []}]},
                ", field 'sentences', sentence 1: expected a field 'raw', found the fields 'tokens'",
            ),
            (
                {"sentences": [{"raw": " "}]},
                ", field 'sentences', sentence 0, field 'raw': expected text, found only white space",
            ),
            (
                {"sentences": [{"raw": "<end_of_text>"}]},
                ", field 'sentences', sentence 0, field 'raw': expected plain text, found the control token",
            ),
        ],
    )
    def test_wrong_field_of_karpathys(self, tmp_path, change, message):
        content = karpathy("mscoco")
        content["images"][2] = altered(content["images"][2], change)
        write(tmp_path, "mscoco", "karpathy", content)
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'dataset_coco.json'}, entry 2{message}")):
            read_dataset("mscoco", tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([], ": expected an object, found a list, []"),
            ({"annotations": []}, ": expected a field 'images', found the fields 'annotations'"),
            ({"images": {}}, ", field 'images': expected a list, found an object, {}"),
            ({"images": [3]}, ", entry 0: expected an object, found an integer, 3"),
        ],
    )
    def test_wrong_file_of_karpathys(self, tmp_path, content, message):
        write(tmp_path, "flickr30k", "karpathy", content)
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'dataset_flickr30k.json'}{message}")):
            read_dataset("flickr30k", tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image": None}, ": expected a field 'image', found the fields 'caption'"),
            ({"image": 5}, ", field 'image': expected a string, found an integer, 5"),
            ({"caption": None}, ": expected a field 'caption', found the fields 'image'"),
            ({"caption": 5}, ", field 'caption': expected a string or a list, found an integer, 5"),
            ({"caption": ""}, ", field 'caption': expected text, found an empty string"),
            ({"caption": []}, ", field 'caption': expected at least one caption, found an empty list"),
            ({"caption": ["a", 5]}, ", field 'caption', caption 1: expected a string, found an integer, 5"),
        ],
    )
    def test_wrong_field_of_a_list(self, tmp_path, change, message):
        lists = flat("flickr30k")
        lists["test"][1] = altered(lists["test"][1], change)
        write(tmp_path, "flickr30k", "flat", lists)
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'flickr30k_test.json'}, entry 1{message}")):
            read_dataset("flickr30k", tmp_path)

    @pytest.mark.filterwarnings("default")
    def test_warns_of_other_counts(self, tmp_path):
        with pytest.warns(UserWarning) as caught:
            read_dataset("mscoco", write(tmp_path, "mscoco", "karpathy"))
        assert [str(w.message) for w in caught] == [
            "MSCOCO, split 'train': found 2 identities, 2 images, 3 captions; "
            "published are 113287 identities, 113287 images, 566747 captions",
            "MSCOCO, split 'val': found 1 identities, 1 images, 2 captions; "
            "published are 5000 identities, 5000 images, 25010 captions",
            "MSCOCO, split 'test': found 2 identities, 2 images, 5 captions; "
            "published are 5000 identities, 5000 images, 25010 captions",
        ]

    @pytest.mark.slow
    @pytest.mark.filterwarnings("error")
    def test_published_counts_give_no_warning(self, tmp_path):
        lists = {
            split: [{"image": f"flickr30k-images/{split}{i}.jpg", "caption": list("abcde")} for i in range(images)]
            for split, images in (("train", 29000), ("val", 1014), ("test", 1000))
        }
        splits = read_dataset("flickr30k", write(tmp_path, "flickr30k", "flat", lists))
        assert [len(samples) for samples in splits.values()] == [145000, 5070, 5000]

    def test_warns_of_an_image_in_two_splits(self, tmp_path):
        lists = flat("mscoco")
        lists["test"][0]["image"] = lists["train"][0]["image"]
        with pytest.warns(UserWarning, match="split 'test': 1 identities are also in split 'train'"):
            read_dataset("mscoco", write(tmp_path, "mscoco", "flat", lists))


HEADER = "image,caption,identity"
CSV = """image,caption,identity,split
a.jpg,"a man, in red",anna,train
b/c.jpg,a man,7,train
/abs/d.jpg,"a ""tall"" man",7,val
e.jpg,a boy,anna,test
"""


def as_json_lines(csv_like: list[dict]) -> str:
    return "\n".join(json.dumps(row) for row in csv_like) + "\n"


LINES = [
    {"image": "a.jpg", "caption": "a man, in red", "identity": "anna", "split": "train"},
    {"image": "b/c.jpg", "caption": "a man", "identity": 7, "split": "train"},
    {"image": "/abs/d.jpg", "caption": 'a "tall" man', "identity": "7", "split": "val"},
    {"image": "e.jpg", "caption": "a boy", "identity": "anna", "split": "test"},
]


def read_own(file: Path, text: str | bytes, need=("test",)) -> dict:
    """The splits of a user's own file with this content."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_dataset("folder", file, need)


class TestFolder:
    @pytest.mark.filterwarnings("ignore:.*are also in split 'train'.*:UserWarning")
    @pytest.mark.parametrize(("name", "text"), [("captions.csv", CSV), ("captions.jsonl", as_json_lines(LINES))])
    @pytest.mark.parametrize("by_folder", [True, False])
    def test_reads_every_line(self, tmp_path, name, text, by_folder):
        (tmp_path / name).write_text(text)
        splits = read_dataset("folder", tmp_path if by_folder else tmp_path / name)
        found = [(split, s.image, s.caption, s.person_id) for split in splits for s in splits[split]]
        assert found == [
            ("train", tmp_path / "a.jpg", "a man, in red", 0),
            ("train", tmp_path / "b/c.jpg", "a man", 1),
            ("val", Path("/abs/d.jpg"), 'a "tall" man', 1),
            ("test", tmp_path / "e.jpg", "a boy", 0),
        ]
        assert len({s.image_id for samples in splits.values() for s in samples}) == 4

    @pytest.mark.parametrize(
        "text",
        [
            b"\xef\xbb\xbf" + CSV.encode(),
            CSV.replace("\n", "\r\n").encode(),
            CSV.replace("\n", "\n\n").encode(),
            CSV.replace(",", ", ").replace("man,  in", "man, in").encode(),
            CSV.replace("\n", ",x\n").encode(),
        ],
        ids=["BOM", "CRLF", "empty lines", "spaces", "another column"],
    )
    def test_ways_to_write_csv(self, tmp_path, text):
        splits = read_own(tmp_path / "own.csv", text)
        assert [s.caption for samples in splits.values() for s in samples] == [row["caption"] for row in LINES]
        assert [s.person_id for samples in splits.values() for s in samples] == [0, 1, 1, 0]
        assert list(splits) == ["train", "val", "test"]

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
    def test_without_split_all_is_test(self, tmp_path, suffix):
        rows = [{k: v for k, v in row.items() if k != "split"} for row in LINES]
        text = CSV.replace(",split", "")
        for split in ("train", "val", "test"):
            text = text.replace(f",{split}\n", "\n")
        file = tmp_path / f"own{suffix}"
        splits = read_own(file, text if suffix == ".csv" else as_json_lines(rows))
        assert {split: len(samples) for split, samples in splits.items()} == {"test": 4}
        assert [s.person_id for s in splits["test"]] == [0, 1, 1, 0]
        message = (
            f"{file}: no entry of split 'train', expected at least one; add 'split' with train, val or test to every "
            "line"
        )
        with pytest.raises(DataError, match=re.escape(message)):
            read_dataset("folder", file)

    def test_the_captions_of_an_image_are_of_one_image(self, tmp_path):
        text = "image,caption,identity\na.jpg,one,1\na.jpg,two,1\n./a.jpg,three,1\n"
        test = read_own(tmp_path / "own.csv", text)["test"]
        assert len(gallery(test)[0]) == 1 and queries(test)[0] == ["one", "two", "three"]

    def test_a_caption_over_two_lines_counts_both(self, tmp_path):
        text = 'image,caption,identity\na.jpg,"one\ntwo",1\nb.jpg,,1\n'
        with pytest.raises(DataError, match="own.csv, line 4, column 'caption': expected text, found an empty"):
            read_own(tmp_path / "own.csv", text)

    def test_no_published_counts(self, tmp_path):
        assert DATASETS["folder"].published == {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (tmp_path / "captions.jsonl").write_text(as_json_lines(LINES[:1]))
            read_dataset("folder", tmp_path, need=("train",))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", ": no entry of split 'test', expected at least one"),
            (HEADER, ": no entry of split 'test'"),
            ("image,text,identity", ", line 1: expected a column 'caption' in the header, found the columns 'image', "),
            ("image;caption;identity", ", line 1: expected a column 'image' in the header, found the columns 'image;"),
            (f"{HEADER},image", ", line 1: expected different names in the header, found the columns 'image', "),
            (f"{HEADER}\na.jpg,a man", ", line 2: expected 3 columns as in the header, found 2; a value with a comma"),
            (f"{HEADER}\na.jpg,a man, old,1", ", line 2: expected 3 columns as in the header, found 4; a value"),
            (f"{HEADER}\na.jpg,a,1\n ,a,1", ", line 3, column 'image': expected a path, found an empty string"),
            (f"{HEADER}\na.jpg,,1", ", line 2, column 'caption': expected text, found an empty string"),
            (f"{HEADER}\na.jpg,<|mask|>,1", ", line 2, column 'caption': expected plain text, found the control token"),
            (f"{HEADER}\na.jpg,a, ", ", line 2, column 'identity': expected a name or a number, found an empty"),
            (f"{HEADER},split\na.jpg,a,1,Test", ", line 2, column 'split': expected one of train, val, test, found 'T"),
            (f"{HEADER},split\na.jpg,a,1,", ", line 2, column 'split': expected one of train, val, test, found ''"),
            (f'{HEADER}\na.jpg,a,1\nb.jpg,"a,1\n', ", line 3: invalid CSV: unexpected end of data"),
            (f"{HEADER}\na.jpg,".encode() + b"\xff,1", ": expected UTF-8 text; byte 29 is invalid; a file in cp1252"),
            (HEADER.encode("utf-16"), ": expected UTF-8 text; byte 0 is invalid; the file seems to be UTF-16"),
            (f"{HEADER}\na.jpg,a\0b,1", ": expected UTF-8 text; character 30 is NUL"),
            (f"{HEADER}\na.jpg,{'a' * 200_000},1", ", line 2: invalid CSV: field larger than field limit"),
            (f"{HEADER}\na.jpg,a,nan", ", line 2, column 'identity': expected a name or a number, found 'nan', which"),
            (
                f"{HEADER}\na.jpg,a, <NA>",
                ", line 2, column 'identity': expected a name or a number, found '<NA>', which",
            ),
            (
                f"{HEADER}\na.jpg,NaN,1",
                ", line 2, column 'caption': expected text, found 'NaN', which stands for a miss",
            ),
        ],
    )
    def test_bad_csv(self, tmp_path, text, message):
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'own.csv'}{message}")):
            read_own(tmp_path / "own.csv", text)

    @pytest.mark.parametrize("name", ["Split", "SPLIT", "splits", "spilt", "data_split", "train/test split"])
    def test_a_misspelt_split_does_not_make_all_lines_test(self, tmp_path, name):
        with pytest.raises(DataError, match=f"own.csv, line 1: expected the column 'split', found the column '{name}'"):
            read_own(tmp_path / "own.csv", CSV.replace("split", name))
        lines = as_json_lines([*({key: row[key] for key in HEADER.split(",")} for row in LINES), LINES[0]])
        with pytest.raises(DataError, match=f"own.jsonl, line 5: expected the field 'split', found the field '{name}'"):
            read_own(tmp_path / "own.jsonl", lines.replace('"split"', f'"{name}"'))

    @pytest.mark.parametrize("name", ["site", "plot", "spot", "sleeve", "set", "clip"])
    def test_other_columns_are_left_alone(self, tmp_path, name):
        text = f"{HEADER},{name}\na.jpg,a man,1,x\n"
        assert list(read_own(tmp_path / "own.csv", text)) == ["test"]

    @pytest.mark.parametrize(("mark", "words"), [(";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")])
    def test_other_separators_get_a_hint(self, tmp_path, mark, words):
        message = f"own.csv, line 1: .*; the columns seem to be separated by {words}, and commas are expected$"
        with pytest.raises(DataError, match=message):
            read_own(tmp_path / "own.csv", f"{HEADER}\na.jpg,a man,1\n".replace(",", mark))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image": None}, ": expected a field 'image', found the fields 'caption', 'identity', 'split'"),
            ({"caption": ["a"]}, ", field 'caption': expected a string, found a list, ['a']"),
            ({"identity": True}, ", field 'identity': expected a string or an integer or a number, found true"),
            ({"identity": ""}, ", field 'identity': expected a name or a number, found an empty string"),
            ({"split": None}, ": expected a field 'split', found the fields 'image', 'caption', 'identity'"),
            ({"split": 3}, ", field 'split': expected a string, found an integer, 3"),
            ({"identity": float("nan")}, ": field 'identity': NaN is not a number that JSON allows; found at column "),
            ({"identity": float("-inf")}, ": field 'identity': -Infinity is not a number that JSON allows"),
            ({"identity": "null"}, ", field 'identity': expected a name or a number, found 'null', which stands for a"),
            (
                {"identity": 1e300},
                ", field 'identity': expected a name or an exact number, found the rounded number 1e+3",
            ),
            (
                {"identity": 2.0**53},
                ", field 'identity': expected a name or an exact number, found the rounded number 9",
            ),
            ({"identity": "a\0"}, ", field 'identity': expected a name or a number, found a NUL character in 'a\\x00'"),
            ({"image": "a\0.jpg"}, ", field 'image': expected a path, found a NUL character in 'a\\x00.jpg'"),
            ({"caption": "a\0"}, ", field 'caption': expected plain text, found a NUL character in 'a\\x00'"),
            ({"caption": "None"}, ", field 'caption': expected text, found 'None', which stands for a missing value"),
            ({"caption": "a \ud83d"}, ": the string at field 'caption' holds half of a surrogate pair: 'a \\ud83d'"),
        ],
    )
    def test_bad_json_field(self, tmp_path, change, message):
        text = as_json_lines([LINES[0], altered(LINES[1], change), *LINES[2:]])
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'own.jsonl'}, line 2{message}")):
            read_own(tmp_path / "own.jsonl", text)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"image": "a.jpg", ', ", line 6: invalid or truncated JSON at column 20 (character 19 of 19): "),
            ("[1]", ", line 6: expected an object, found a list, [1]"),
            (
                '{"identity": 1, "identity": 2}',
                ", line 6: the key 'identity' stands twice in one object, {'identity': 2}",
            ),
            ('{"identity": 1e999}', ", line 6: field 'identity': the number 1e999 exceeds the range of float64"),
            ('{"identity": ' + "1" * 5000, ", line 6: field 'identity': a number of 5000 digits; expected at most 400"),
            ("[" * 100_000, ", line 6: the JSON is nested too deeply"),
        ],
    )
    def test_bad_json_line(self, tmp_path, line, message):
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'own.jsonl'}{message}")):
            read_own(tmp_path / "own.jsonl", as_json_lines(LINES) + "\n" + line)  # line 5 is empty

    def test_line_separators_within_a_caption(self, tmp_path):
        line = json.dumps(LINES[3] | {"caption": "one\u2028two"}, ensure_ascii=False)
        assert read_own(tmp_path / "own.jsonl", line)["test"][0].caption == "one\u2028two"

    def test_numbers_and_strings_are_the_same_identity(self, tmp_path):
        rows = [LINES[3] | {"identity": identity} for identity in (5, "5", " 5", 5.5, "x", 5.0, -0.0, 0)]
        found = read_own(tmp_path / "own.jsonl", as_json_lines(rows))["test"]
        assert [s.person_id for s in found] == [0, 0, 0, 1, 2, 0, 3, 3]

    def test_numbers_beyond_64_bits_are_names(self, tmp_path):
        rows = [LINES[3] | {"identity": identity} for identity in (10**20, 10**20 + 1, 2**53 + 1, 10**399)]
        found = read_own(tmp_path / "own.jsonl", as_json_lines(rows))["test"]
        assert [s.person_id for s in found] == [0, 1, 2, 3] and found[1].person == str(10**20 + 1)
        assert queries(found)[1].tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("name", ["own.csv", "own.jsonl"])
    def test_a_fifo_does_not_hang(self, tmp_path, name):
        os.mkfifo(tmp_path / name)
        message = f"{tmp_path / name}: cannot be read (expected a regular file, found a FIFO)"
        with pytest.raises(DataError, match=re.escape(message)):
            read_dataset("folder", tmp_path / name)

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
    def test_people_keep_the_names_of_the_file(self, tmp_path, suffix):
        """People 0025 and 25 are two; ids are counted, names stay."""
        rows = [LINES[3] | {"identity": identity, "split": "test"} for identity in ("0025", "25", "Ann", "0025")]
        lines = [f"e.jpg,a boy,{row['identity']},test\n" for row in rows]
        text = f"{HEADER},split\n{''.join(lines)}" if suffix == ".csv" else as_json_lines(rows)
        test = read_own(tmp_path / f"own{suffix}", text)["test"]
        assert [sample.person for sample in test] == ["0025", "25", "Ann", "0025"]
        assert [sample.person_id for sample in test] == [0, 1, 2, 0]

    def test_warnings_name_people_as_the_file_does(self, tmp_path):
        file = tmp_path / "own.csv"
        file.write_text(
            f"{HEADER},split\na.jpg,a man,7,train\nb.jpg,a boy,0025,train\nb.jpg,he,25,test\nc.jpg,he,0025,test\n"
        )
        with pytest.warns(UserWarning) as caught:
            read_dataset("folder", file)
        first, second = (str(warning.message) for warning in caught)
        assert "split 'test': 1 identities are also in split 'train', the first is 0025." in first
        assert f"image {tmp_path / 'b.jpg'} is listed under the identities 0025 and 25; 1 images have" in second

    def test_which_file(self, tmp_path):
        csv, lines = tmp_path / "captions.csv", tmp_path / "captions.jsonl"
        with pytest.raises(DataError, match=re.escape(f"file not found; looked for {csv} and {lines}")):
            read_dataset("folder", tmp_path)
        with pytest.raises(DataError, match=f"Own data: {tmp_path / 'no'} does not exist; looked for"):
            read_dataset("folder", tmp_path / "no")
        csv.write_text(CSV)
        lines.write_text("")
        with pytest.raises(DataError, match=re.escape(f"found both {csv} and {lines}; give the path of one")):
            read_dataset("folder", tmp_path)
        assert len(read_own(csv, CSV)["train"]) == 2
        with pytest.raises(DataError, match="name ends in .csv or .jsonl, found .*own.txt"):
            read_own(tmp_path / "own.txt", CSV)


def test_splits_of_a_configuration(tmp_path):
    (tmp_path / "captions.csv").write_text("image,caption,identity\na.jpg,a man,1\n")
    data = DataConfig(dataset="folder", data_root=tmp_path)
    assert [s.caption for s in read_splits(data, need=("test",))["test"]] == ["a man"]
    with pytest.raises(DataError, match="no entry of split 'train'"):
        read_splits(data)


def test_every_data_set_that_is_read_is_a_choice():
    choices = DataConfig.__annotations__["dataset"].__args__
    assert set(DATASETS) == {choice for choice in choices if not choice.startswith("embedded")}
