"""What a checkpoint finds among real photographs: 63 crops of eight people on a street, text → image.

    python bench/street.py runs/embedded-1/best.safetensors                      gets 96 MB from Debian's archive
    python bench/street.py runs/embedded-1/best.safetensors --video vtest.avi    the video is at hand

street.csv has the crops and a caption for each: frame, x, y, width, height, identity, caption; frames count from 0, and
the rest is in pixels. The video is vtest.avi of Debian's package opencv-doc, whose files are under Apache-2.0 and
BSD-3-Clause. The crops stay in memory, the video in a temporary folder. PyAV decodes the video: pip install
'upperson[video]'. This is a test set: nothing may be trained or chosen on it.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from upperson.data import Sample
from upperson.errors import DataError, RunError, exit_status, path_argument
from upperson.evaluate.embed import evaluate
from upperson.model import load_model

CROPS = Path(__file__).with_name("street.csv")
PACKAGE, IN_PACKAGE = "opencv-doc", "usr/share/doc/opencv-doc/examples/data/vtest.avi"
FRAME_SIZE = (768, 576)  # width, height


class Place(NamedTuple):
    """A line of street.csv."""

    frame: int
    x: int
    y: int
    width: int
    height: int
    identity: str
    caption: str


class Crop:
    """A part of a frame, as a drawing: `draw` returns the RGB image."""

    def __init__(self, image: Image.Image):
        self.image = image

    def draw(self) -> Image.Image:
        return self.image


def read_places() -> list[Place]:
    with CROPS.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [Place(*(int(row[name]) for name in Place._fields[:5]), row["identity"], row["caption"]) for row in rows]


@contextmanager
def video_of_debian() -> Iterator[Path]:
    """The video in a temporary folder, from Debian's archive. Raises RunError."""
    with tempfile.TemporaryDirectory() as folder:
        _run("apt-get", "download", PACKAGE, folder=folder)
        packages = list(Path(folder).glob(f"{PACKAGE}_*.deb"))
        if len(packages) != 1:
            raise RunError(f"apt-get download {PACKAGE} left {len(packages)} packages, expected one; use --video")
        _run("dpkg-deb", "--extract", str(packages[0]), folder, folder=folder)
        yield Path(folder) / IN_PACKAGE


def _run(*command: str, folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise RunError(f"{command[0]} is missing, as on systems other than Debian's; use --video FILE") from None
    if done.returncode:
        raise RunError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}; use --video FILE")


def crops_of(video: Path, places: list[Place]) -> list[Crop]:
    """The crops of the places, in their order. Raises DataError for another video, RunError without PyAV."""
    try:
        import av
    except ImportError:
        raise RunError("PyAV is missing; pip install 'upperson[video]'") from None
    wanted = {place.frame for place in places}
    frames: dict[int, Image.Image] = {}
    try:
        with av.open(str(video)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    frames[number] = frame.to_image()
                if len(frames) == len(wanted):
                    break
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(f"{video} is not a video that PyAV can read ({error})") from None
    sizes = {image.size for image in frames.values()}
    if sizes != {FRAME_SIZE} or len(frames) < len(wanted):
        raise DataError(f"{video}: expected vtest.avi, with frames of 768×576 up to number {max(wanted)}")
    boxes = [(place.x, place.y, place.x + place.width, place.y + place.height) for place in places]
    return [Crop(frames[place.frame].crop(box)) for place, box in zip(places, boxes, strict=True)]


def samples_of(video: Path) -> list[Sample]:
    places = read_places()
    identities = sorted({place.identity for place in places})
    crops = crops_of(video, places)
    return [
        Sample(crop, place.caption, identities.index(place.identity), number, place.identity)
        for number, (crop, place) in enumerate(zip(crops, places, strict=True))
    ]


def chance(samples: list[Sample]) -> float:
    """R@1 in percent of a ranking at random: the mean share of images that match a query."""
    counts = Counter(sample.person_id for sample in samples)
    return 100 * sum(counts[sample.person_id] for sample in samples) / len(samples) ** 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=path_argument, help="checkpoint of a run")
    parser.add_argument(
        "--video", type=path_argument, metavar="FILE", help="vtest.avi (default: from Debian's archive)"
    )
    arguments = parser.parse_args()
    model = load_model(arguments.checkpoint, backend="auto").eval()
    if arguments.video:
        samples = samples_of(arguments.video)
    else:
        with video_of_debian() as video:
            samples = samples_of(video)
    metrics = evaluate(model, samples).metrics
    people = len({sample.person_id for sample in samples})
    print(f"text → image, {len(samples)} queries, {len(samples)} images of {people} people in one video:")
    print(f"R@1 {metrics['R@1']:.2f}, mAP {metrics['mAP']:.2f}; R@1 by chance {chance(samples):.2f}")
    print(f"Few people, one camera: the 95 % interval of {people} people is wide, and says little about other places.")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
