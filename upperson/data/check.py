"""The report of `train.py --check-data`: the size of a data set, broken images, and unusual entries."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from statistics import median

from open_clip import SimpleTokenizer
from tqdm import tqdm

from upperson.data.images import first_of, inspect_images
from upperson.data.oddities import Counts, all_samples, counts, identities_in_train, images_of_several
from upperson.data.readers import DATASETS
from upperson.data.samples import Sample, names_of
from upperson.embedded.drawing import Drawing

CONTEXT_LENGTH = 77  # CLIP's tokens, including the start and end tokens

Person = str | int  # name or id of a person in the data set

MOST_IMAGES = 50  # limit of listed broken images
MOST_EXAMPLES = 5  # limit of listed examples of everything else


@dataclass(frozen=True)
class Spread:
    """The median and the range of a list of numbers."""

    minimum: float
    median: float
    maximum: float

    @staticmethod
    def of(numbers: Sequence[int]) -> "Spread":
        return Spread(min(numbers), median(numbers), max(numbers))


@dataclass(frozen=True)
class SplitReport:
    """One split. The same identity in two splits may be two persons."""

    counts: Counts
    published: Counts | None  # None: no published counts
    in_train: dict[Person, Path | Drawing]  # identities that are also in "train", with an image; empty for "train"
    single_image: list[Person]  # identities with a single image
    repeated_captions: dict[str, list[Person]]  # identities by caption, without case and extra white space
    without_image: list[Person]  # identities whose images all have another identity; empty for "train"


@dataclass(frozen=True)
class DataReport:
    """The result of `check_dataset`."""

    title: str
    splits: dict[str, SplitReport]  # includes published splits that are missing
    images: int  # number of distinct images in all splits
    unreadable: list[str]  # "PATH: image is missing" or "PATH: image is broken (why)"
    of_several: list[tuple[Path | Drawing, list[Person]]]  # images that are listed under several identities
    cut_captions: list[tuple[Sample, int]]  # captions of more than CONTEXT_LENGTH tokens, with their number of tokens
    caption_tokens: Spread  # including start and end tokens
    widths: Spread | None  # in pixels, of the readable images; None: no image is readable
    heights: Spread | None
    similar_identities: list[list[str]]  # names that differ only in case, white space, leading zeros or Unicode form
    similar_images: list[list[str]]  # paths that differ only in case, Unicode form or ".."
    untrainable: str | None  # why the data can be evaluated but not trained on

    @property
    def usable(self) -> bool:
        """Whether every image can be read, and every caption of val and test has an image to find."""
        return not self.unreadable and not any(split.without_image for split in self.splits.values())

    @property
    def as_published(self) -> bool:
        """Whether the counts of all splits are the published ones, if there are any."""
        return all(split.published in (None, split.counts) for split in self.splits.values())


def check_dataset(name: str, splits: dict[str, list[Sample]], *, progress: bool = True) -> DataReport:
    """Checks the samples of data set `name`. Every image is decoded and every caption is tokenised once.

    Missing and broken images are listed in the report; no error is raised.
    """
    published = DATASETS[name].published if name in DATASETS else {}
    shared = identities_in_train(splits)
    samples = list(all_samples(splits))
    names = names_of(samples)
    images = list(dict.fromkeys(sample.image for sample in samples))
    inspected = inspect_images(images, progress=progress)
    sizes = [found for found in inspected if not isinstance(found, str)]
    tokenizer = SimpleTokenizer()
    bar = tqdm(samples, desc="counting tokens", unit="caption", disable=not progress)
    tokens = [len(tokenizer.encode(sample.caption)) + 2 for sample in bar]
    return DataReport(
        title=DATASETS[name].title if name in DATASETS else name,
        splits={
            split: SplitReport(
                counts=counts(splits.get(split, [])),
                published=published.get(split),
                in_train=_images_of(shared.get(split, []), splits.get(split, [])),
                single_image=_single_image(splits.get(split, [])),
                repeated_captions=_repeated_captions(splits.get(split, [])),
                without_image=[] if split == "train" else _without_image(splits.get(split, [])),
            )
            for split in published | splits
        },
        images=len(images),
        unreadable=[found for found in inspected if isinstance(found, str)],
        of_several=[
            (sample.image, [names[identity] for identity in identities])
            for sample, identities in images_of_several(samples)
        ],
        cut_captions=[
            (sample, length) for sample, length in zip(samples, tokens, strict=True) if length > CONTEXT_LENGTH
        ],
        caption_tokens=Spread.of(tokens),
        widths=Spread.of([width for width, _ in sizes]) if sizes else None,
        heights=Spread.of([height for _, height in sizes]) if sizes else None,
        similar_identities=_similar({sample.person_name for sample in samples if sample.person_name}, _plain_name),
        similar_images=_similar({str(image) for image in images if isinstance(image, Path)}, _plain_path),
        untrainable=_untrainable(splits),
    )


def text(report: DataReport) -> str:
    """The report for a terminal."""
    lines = [report.title, "", f"{'':<22}{'identities':>12}{'images':>12}{'captions':>12}"]
    for split, found in report.splits.items():
        lines.append(_row(split, found.counts))
        if found.published:
            lines.append(
                _row("  published", found.published) + ("" if found.counts == found.published else "  DIFFERS")
            )
    lines += ["", f"{'':<22}{'minimum':>12}{'median':>12}{'maximum':>12}"]
    spreads = {
        "image width, pixels": report.widths,
        "image height, pixels": report.heights,
        "caption, tokens": report.caption_tokens,
    }
    lines += [
        f"{name:<22}{spread.minimum:>12g}{spread.median:>12g}{spread.maximum:>12g}"
        for name, spread in spreads.items()
        if spread
    ]
    lines += ["", *_finding(f"of {report.images:,} images missing or broken", report.unreadable, MOST_IMAGES)]
    lines += _finding(
        "images listed under several identities",
        [f"{_name(image)}: identities {_joined(identities)}" for image, identities in report.of_several],
    )
    lines += _finding(
        f"captions longer than {CONTEXT_LENGTH} tokens, which the tokenizer truncates",
        [f"{_name(sample.image)}, {length} tokens: {short(sample.caption)}" for sample, length in report.cut_captions],
    )
    for split, found in report.splits.items():
        if split != "train":
            shared = [f"{identity}, such as {_name(image)}" for identity, image in found.in_train.items()]
            lines += _finding(f"identities of {split} that are also in train", shared)
    for split, found in report.splits.items():
        repeated = [
            f"{short(caption)}: identities {_joined(identities)}"
            for caption, identities in found.repeated_captions.items()
        ]
        lines += _finding(f"captions of {split} that describe several identities", repeated)
    for split, found in report.splits.items():
        lines.append(f"{len(found.single_image):>8,} identities of {split} with a single image")
    lines += _finding(
        "groups of identities that differ only in case, white space, leading zeros or Unicode form",
        [" and ".join(map(repr, names)) for names in report.similar_identities],
    )
    lines += _finding(
        "groups of image paths that differ only in case, Unicode form or '..'",
        [" and ".join(paths) for paths in report.similar_images],
    )
    for split, found in report.splits.items():
        if found.without_image:
            lines += _finding(
                f"identities of {split} that cannot be evaluated, since another identity has all their images",
                list(map(str, found.without_image)),
            )
    if report.untrainable:
        lines += ["", f"The data cannot be trained on: {report.untrainable}."]
    if not report.as_published:
        lines += ["", "The counts differ from the published ones: another version of the data set, or a part of it."]
    return "\n".join(lines)


def _row(name: str, counts: Counts) -> str:
    return f"{name:<22}{counts.identities:>12,}{counts.images:>12,}{counts.captions:>12,}"


def _finding(title: str, instances: Sequence[str], most: int = MOST_EXAMPLES) -> list[str]:
    return [f"{len(instances):>8,} {title}", *(f"{'':>11}{line}" for line in first_of(instances, most))]


def _name(image: Path | Drawing) -> str:
    return str(image) if isinstance(image, Path) else "a synthetic image"


def _joined(identities: Sequence[Person]) -> str:
    return ", ".join(first_of([str(identity) for identity in identities], MOST_EXAMPLES))


def _images_of(identities: Sequence[int], samples: Iterable[Sample]) -> dict[Person, Path | Drawing]:
    """The last image of each identity."""
    last = {sample.person_id: sample for sample in samples}
    return {last[identity].person: last[identity].image for identity in identities}


def _single_image(samples: Iterable[Sample]) -> list[Person]:
    images: dict[Person, set[int]] = {}
    for sample in samples:
        images.setdefault(sample.person, set()).add(sample.image_id)
    return [person for person, found in images.items() if len(found) == 1]


def _repeated_captions(samples: Iterable[Sample]) -> dict[str, list[Person]]:
    """Captions with the same tokens. The tokenizer ignores case and the amount of white space."""
    people: dict[str, dict[Person, None]] = {}
    for sample in samples:
        caption = " ".join(sample.caption.lower().split())
        people.setdefault(caption, {})[sample.person] = None
    return {caption: list(found) for caption, found in people.items() if len(found) > 1}


def _without_image(samples: Sequence[Sample]) -> list[Person]:
    """The identities without an image in `gallery`, where an image has one identity. Their queries have no match."""
    identities: dict[int, int] = {}
    for sample in samples:
        identities.setdefault(sample.image_id, sample.person_id)
    found = set(identities.values())
    return list(dict.fromkeys(sample.person for sample in samples if sample.person_id not in found))


def _untrainable(splits: dict[str, list[Sample]]) -> str | None:
    missing = [split for split in ("train", "test") if not splits.get(split)]
    if missing:
        return f"training needs the split {' and '.join(missing)}"
    return "training needs at least 2 pairs of image and caption" if len(splits["train"]) < 2 else None


def _similar(texts: Iterable[str], key: Callable[[str], str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for text in sorted(texts):
        groups.setdefault(key(text), []).append(text)
    return [group for group in groups.values() if len(group) > 1]


def _plain_name(name: str) -> str:
    visible = (character for character in name if unicodedata.category(character) != "Cf")
    return "".join(_folded("".join(visible)).split()).lstrip("0")


def _plain_path(path: str) -> str:
    return _folded(os.path.normpath(path))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
