"""Exported towers: the features of images and sentences, by onnxruntime, NumPy and Pillow alone.

This file imports nothing of this project. `upperson export` puts a copy beside the towers:

    towers = Towers("OUT")
    images = towers.embed_images(["photos/1.jpg", "photos/2.jpg"])      # (2, E)
    sentences = towers.embed_texts(["a woman in a red coat"])           # (1, E)
    similarities = sentences @ images.T                                 # cosines, (1, 2)
"""

import html
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# Otherwise onnxruntime sends events to its maker, and keeps an identifier of the computer in the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime  # noqa: E402 (after the setting, which it reads once)

try:
    from ftfy import fix_text  # repairs text of a wrong encoding, as CLIP's tokenizer does
except ImportError:

    def fix_text(text: str) -> str:
        """The common part of ftfy's repairs: straight quotation marks, and composed characters."""
        return unicodedata.normalize("NFC", text.translate(STRAIGHT))


STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})
ABOUT = "export.json"
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # of Pillow
LARGEST = 67_108_864  # pixels of an image


class Towers:
    """The towers of an export. Errors are those of the libraries that read the files.

    Args:
        folder: the folder of the export.
        threads: number of threads of each tower; 0: onnxruntime decides.
    """

    def __init__(self, folder: Path | str, threads: int = 0):
        folder = Path(folder)
        self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        self.image, self.text = self.about["image"], self.about["text"]
        vocabulary = json.loads((folder / self.text["vocabulary"]).read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer(vocabulary["tokens"], vocabulary["merges"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        self.sessions = {
            tower: onnxruntime.InferenceSession(folder / self.about[tower]["file"], options)
            for tower in ("image", "text")
        }

    def embed_images(self, images: Iterable[Path | str | Image.Image], batch: int = 16) -> np.ndarray:
        """The features of images or their paths, (images, E) float32, each of length 1."""
        return self.embed("image", [self.preprocess, np.stack], images, batch)

    def embed_texts(self, texts: Iterable[str], batch: int = 16) -> np.ndarray:
        """The features of sentences, (sentences, E) float32, each of length 1."""
        return self.embed("text", [self.tokenizer.encode, self.padded], texts, batch)

    def embed(self, tower: str, steps: Sequence[Any], inputs: Iterable[Any], batch: int) -> np.ndarray:
        if isinstance(inputs, str):  # whose letters would be embedded one by one
            raise TypeError(f"expected a list, such as [{inputs[:60]!r}], found a string")
        if batch < 1:
            raise ValueError(f"batch is {batch}; expected at least 1")
        (each, together), inputs = steps, list(inputs)
        features = [
            self.run(tower, together([each(one) for one in inputs[start : start + batch]]))
            for start in range(0, len(inputs), batch)
        ]
        found = np.concatenate(features) if features else np.empty((0, self.about["width"]), np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def run(self, tower: str, inputs: np.ndarray) -> np.ndarray:
        """The features of a batch as the tower gives them, not normalised."""
        (features,) = self.sessions[tower].run(None, {self.about[tower]["input"]: inputs})
        return np.asarray(features)

    def preprocess(self, image: Path | str | Image.Image) -> np.ndarray:
        """An image or its path -> (3, H, W) float32. Transparency is composed over the background of the export."""
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        if image.width * image.height > LARGEST:
            raise ValueError(f"expected an image of at most {LARGEST:,} pixels, found {image.width} x {image.height}")
        if image.mode not in MODES or (image.mode == "CMYK" and "icc_profile" in image.info):
            raise ValueError(
                f"expected an image of 8 bits a channel without a profile of CMYK, found mode {image.mode}"
            )
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            below = Image.new("RGBA", image.size, tuple(self.image["background"]))
            image = Image.alpha_composite(below, image.convert("RGBA"))
        image = image.convert("RGB").resize((self.image["width"], self.image["height"]), Image.Resampling.BILINEAR)
        pixels = np.asarray(image, np.float32) / 255
        mean, std = (np.asarray(self.image[name], np.float32) for name in ("mean", "std"))
        return ((pixels - mean) / std).transpose(2, 0, 1)

    def padded(self, captions: list[list[int]]) -> np.ndarray:
        """Token ids of words -> (captions, length) int64, with start and end tokens, cut to the longest length."""
        start, end, longest = (self.text[name] for name in ("start", "end", "length"))
        rows = [[start, *caption[: longest - 2], end] for caption in captions]
        length = max(map(len, rows)) if self.text["open_length"] else longest
        return np.asarray([row + [self.text["padding"]] * (length - len(row)) for row in rows], np.int64)


class Tokenizer:
    """CLIP's byte pair encoding (arXiv 2103.00020), in lower case.

    Args:
        tokens: the vocabulary in the order of its ids; the last two are the start and the end token.
        merges: the pairs of parts that are joined, the most frequent first.
    """

    def __init__(self, tokens: Sequence[str], merges: Sequence[Sequence[str]]):
        self.ids = {token: number for number, token in enumerate(tokens)}
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        self.characters = byte_characters()
        controls = "|".join(map(re.escape, tokens[-2:]))
        self.fixed = re.compile(f"{controls}|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)  # ſ is an s
        self.controls = set(tokens[-2:])
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without start and end tokens."""
        text = " ".join(html.unescape(html.unescape(fix_text(text))).split()).lower()
        return [number for word in self.words(text) for number in self.pieces(word)]

    def words(self, text: str) -> Iterable[str]:
        """Control tokens, English endings, runs of letters, single digits, and runs of other characters."""
        position = 0
        while position < len(text):
            fixed = self.fixed.match(text, position)
            kind, end = kind_of(text[position]), position + 1
            if fixed:
                end = fixed.end()
            elif kind in "LO":
                while end < len(text) and kind_of(text[end]) == kind:
                    end += 1
            if kind != " ":
                yield text[position:end]
            position = end

    def pieces(self, word: str) -> list[int]:
        """The token ids of a word. Its parts are joined as long as two neighbours are a pair of `merges`."""
        if word not in self.known:
            parts = [word] if word in self.controls else [self.characters[byte] for byte in word.encode()]
            if word not in self.controls:
                parts[-1] += "</w>"
            while len(parts) > 1:
                pair = min(zip(parts, parts[1:], strict=False), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
                if pair not in self.ranks:
                    break
                joined, position = [], 0
                while position < len(parts):
                    both = tuple(parts[position : position + 2]) == pair
                    joined.append("".join(pair) if both else parts[position])
                    position += 2 if both else 1
                parts = joined
            self.known[word] = [self.ids[part] for part in parts]
        return self.known[word]


def kind_of(character: str) -> str:
    """L: a letter, N: a number, " ": a space, O: another character."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def byte_characters() -> list[str]:
    """The character that stands for each byte: the printable ones for themselves, others for U+0100 and following."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
