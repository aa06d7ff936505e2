"""A data set looked through as a whole: how large it is, what is broken, what is odd. `train.py --check-data`."""

from collections.abc import Iterable, Sequence
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

CONTEXT_LENGTH = 77  # tokens of CLIP, start and end among them

Person = str | int  # as the data set names them

MOST_IMAGES = 50  # broken ones that are listed one by one
MOST_EXAMPLES = 5  # of everything else


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of many numbers."""

    minimum: float
    median: float
    maximum: float

    @staticmethod
    def of(numbers: Sequence[int]) -> "Spread":
        return Spread(min(numbers), median(numbers), max(numbers))


@dataclass(frozen=True)
class SplitReport:
    """One split. Identities are those of this split, whatever they mean in another."""

    counts: Counts
    published: Counts | None  # None: nobody published any
    in_train: dict[Person, Path | Drawing]  # identities that are in "train" too, and an image of each; none for "train"
    single_image: list[Person]  # identities with a single image
    repeated_captions: dict[str, list[Person]]  # by caption, without case and extra white space: its identities


@dataclass(frozen=True)
class DataReport:
    """The result of `check_dataset`."""

    title: str
    splits: dict[str, SplitReport]  # also a published split that is not there
    images: int  # distinct ones, over all splits
    unreadable: list[str]  # "PATH: image is missing" or "PATH: image is broken (why)"
    of_several: list[tuple[Path | Drawing, list[Person]]]  # images that are listed under several identities
    cut_captions: list[tuple[Sample, int]]  # those of more than CONTEXT_LENGTH tokens, and how many they have
    caption_tokens: Spread  # start and end among them
    widths: Spread | None  # pixels of the images that can be read; None: there are none
    heights: Spread | None

    @property
    def usable(self) -> bool:
        """Whether every image can be read."""
        return not self.unreadable


def check_dataset(name: str, splits: dict[str, list[Sample]], *, progress: bool = True) -> DataReport:
    """Looks through the samples of data set `name`, decoding every image and tokenising every caption once.

    Missing and broken images go into the report; nothing is raised.
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
        f"captions longer than {CONTEXT_LENGTH} tokens, of which the model reads the beginning",
        [f"{_name(sample.image)}, {length} tokens: {short(sample.caption)}" for sample, length in report.cut_captions],
    )
    for split, found in report.splits.items():
        if split != "train":
            shared = [f"{identity}, such as {_name(image)}" for identity, image in found.in_train.items()]
            lines += _finding(f"identities of {split} that are in train too", shared)
    for split, found in report.splits.items():
        repeated = [
            f"{short(caption)}: identities {_joined(identities)}"
            for caption, identities in found.repeated_captions.items()
        ]
        lines += _finding(f"captions of {split} that stand under several identities", repeated)
    for split, found in report.splits.items():
        lines.append(f"{len(found.single_image):>8,} identities of {split} with a single image")
    return "\n".join(lines)


def _row(name: str, of: Counts) -> str:
    return f"{name:<22}{of.identities:>12,}{of.images:>12,}{of.captions:>12,}"


def _finding(what: str, instances: Sequence[str], most: int = MOST_EXAMPLES) -> list[str]:
    return [f"{len(instances):>8,} {what}", *(f"{'':>11}{line}" for line in first_of(instances, most))]


def _name(image: Path | Drawing) -> str:
    return str(image) if isinstance(image, Path) else "a drawn image"


def _joined(identities: Sequence[Person]) -> str:
    return ", ".join(first_of([str(identity) for identity in identities], MOST_EXAMPLES))


def _images_of(identities: Sequence[int], samples: Iterable[Sample]) -> dict[Person, Path | Drawing]:
    """An image of each identity. Where several fit, it is the last one."""
    last = {sample.person_id: sample for sample in samples}
    return {last[identity].person: last[identity].image for identity in identities}


def _single_image(samples: Iterable[Sample]) -> list[Person]:
    images: dict[Person, set[int]] = {}
    for sample in samples:
        images.setdefault(sample.person, set()).add(sample.image_id)
    return [person for person, found in images.items() if len(found) == 1]


def _repeated_captions(samples: Iterable[Sample]) -> dict[str, list[Person]]:
    """Captions that the tokenizer turns into the same tokens: it ignores case and the amount of white space."""
    people: dict[str, dict[Person, None]] = {}
    for sample in samples:
        caption = " ".join(sample.caption.lower().split())
        people.setdefault(caption, {})[sample.person] = None
    return {caption: list(found) for caption, found in people.items() if len(found) > 1}
