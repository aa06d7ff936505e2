"""Seeded mutations of right images and annotations: each is read, or refused in one line that names the file."""

import io
import json
import random
import re

import pytest
from PIL import Image
from tiny import write_image

from upperson.data import gallery, load_image, queries, read_dataset
from upperson.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "P", "LA", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "RGBA", "P", "CMYK", "L", "1", "I;16", "F", "YCbCr"),
    "GIF": ("P",),
    "BMP": ("RGB", "L"),
    "JPEG2000": ("RGB", "LA"),
    "PPM": ("RGB", "L"),
}
TEXTS = {
    ("folder", "own.jsonl"): "\n".join(
        json.dumps({"image": f"{i}.jpg", "caption": "a man", "identity": i, "split": "test"}) for i in range(3)
    ),
    ("folder", "own.csv"): 'image,caption,identity,split\na.jpg,"a man, old",1,train\nb.jpg,a boy,2,test\n',
    ("cuhk-pedes", "reid_raw.json"): json.dumps(
        [{"split": "test", "id": i, "file_path": "a.jpg", "captions": ["a man", "he"]} for i in range(2)]
    ),
    ("flickr30k", "dataset_flickr30k.json"): json.dumps(
        {"images": [{"split": "test", "filename": "a.jpg", "sentences": [{"raw": "a man"}]}]}
    ),
    ("mscoco", "coco_karpathy_test.json"): json.dumps([{"image": "val2014/a.jpg", "caption": ["a man"]}]),
}
VALUES = [
    "NaN",
    "-Infinity",
    "1e999",
    "-0",
    str(10**20),
    "1" * 500,
    "9" * 5000,
    "1.5",
    "null",
    "true",
    "[]",
    "{}",
    '""',
] + [r'"\ud83d"', r'"\u0000"', '" "', '"nan"', '"a"', '["a"]', '{"raw": "x"}', '"../x"', f'"{"a" * 6000}"', "[" * 5000]
MARKS = [";", "\t", '"', "\0", "\\", "\ufeff", "é", "[", "{" * 3000, "\r", ",", "\n", "\x1b", "\ud83d"]
VALUE = re.compile(r'"[^"\n]*"|-?\d[\d.e-]*|[\[{]')


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    noise = Image.open(write_image(tmp_path_factory.mktemp("noise") / "noise.png", 0, (30, 40)))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for suffix, modes in MODES.items():
        for mode in modes:
            buffer = io.BytesIO()
            image = Image.new(mode, noise.size, 7) if mode in ("I;16", "F") else noise.convert(mode)
            image.save(buffer, suffix, **({"exif": exif} if suffix in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
            found.append(buffer.getvalue())
    return found


def mutated_bytes(content, generator):
    content = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5, 20])):
        place = generator.randrange(min(len(content), generator.choice([60, 300, len(content)])))
        change = generator.randrange(5)
        if change == 0:
            content[place] = generator.randrange(256)
        elif change == 1:
            content[place : place + 4] = generator.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
        elif change == 2:
            content[place:place] = generator.randbytes(9)
        elif change == 3:
            content[place] ^= 1 << generator.randrange(8)
        else:
            del content[place + 1 : generator.choice([place + 9, None])]
    return bytes(content)


def mutated_text(text, generator):
    for _ in range(generator.choice([1, 1, 2, 4])):
        place = generator.randrange(len(text) + 1)
        values = list(VALUE.finditer(text))
        change = generator.randrange(5)
        if change < 3 and values:
            value = generator.choice(values)
            text = text[: value.start()] + generator.choice(VALUES) + text[value.end() :]
        elif change == 3:
            text = text[:place] + generator.choice(MARKS) + text[place:]
        else:
            text = text[:place] + text[generator.choice([place + 5, len(text)]) :]
    encoding = generator.choice(["utf-8"] * 9 + ["utf-16", "cp1252", "utf-8-sig"])
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf-8") else "replace")


def assert_one_line(refusal, path):
    assert len(str(refusal).splitlines()) == 1 and len(str(refusal)) < 1500 and str(path.parent) in str(refusal)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_images(tmp_path, images, count):
    path, generator, read = tmp_path / "image", random.Random(count), 0
    for _ in range(count):
        path.write_bytes(mutated_bytes(generator.choice(images), generator))
        try:
            assert load_image(path).mode == "RGB"
            read += 1
        except DataError as refusal:
            assert_one_line(refusal, path)
    assert 0 < read < count


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_annotations(tmp_path, count):
    generator, read = random.Random(count), 0
    for name in {name for name, _ in TEXTS}:
        for folder in ("imgs", "flickr30k-images", "val2014"):
            (tmp_path / name / folder).mkdir(parents=True)
    for _ in range(count):
        (name, file), text = generator.choice(list(TEXTS.items()))
        path = tmp_path / name / file
        path.write_bytes(mutated_text(text, generator))
        try:
            for samples in read_dataset(name, path if name == "folder" else path.parent, need=()).values():
                assert len(gallery(samples)[0]) <= len(queries(samples)[0])
            read += 1
        except DataError as refusal:
            assert_one_line(refusal, path)
    assert 0 < read < count
