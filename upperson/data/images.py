"""Loading of images, and a check before a long training that every image can be decoded.

`load_image` is the only function that opens images. The image that it returns is the picture that a viewer shows:

* EXIF's orientation is applied.
* Values of 16 bits are scaled to 8 bits. The range of 32-bit and floating-point values is unknown, so such images are
  refused.
* Transparency is composed over BACKGROUND, so that hidden colours have no influence.
* CMYK is converted by the image's colour profile, or without a profile by Pillow's formula. Profiles of RGB and grey
  images are ignored, as in CLIP's own preprocessing.
* The first frame of an animation and the first page of a document are read.
"""

import io
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image, ImageCms
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torchvision.transforms import v2
from tqdm import tqdm

from upperson.data.samples import Sample
from upperson.embedded.drawing import Drawing
from upperson.errors import DataError
from upperson.files import require_regular

NAMED_IN_ERROR = 5  # limit of broken images listed in an error
MAX_PIXELS = 2**26  # 8192 x 8192, more than a camera of 64 megapixels; a decoded image takes 4 bytes for each pixel
MAX_SCANS = 100  # of a JPEG image, each of which takes as long as a whole image; encoders write about ten
START_OF_SCAN = b"\xff\xda"
BACKGROUND = (255, 255, 255)

# Pillow's other formats are rare, and its reader of EPS runs Ghostscript. HEIF, which telephones write, is read by
# pillow-heif, where it is installed.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
HEIF = re.compile(rb".{4}ftyp(hei[cxms]|hev[cx]|mif1|msf1)", re.DOTALL)  # how such a file begins

DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16-bit grey values
REFUSED = {"I": "whole numbers of 32 bits", "F": "floating-point numbers", "LAB": "values of CIE L*a*b*"}
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow multiplies PNG's grey values of 2 and 4 bits, but not the transparent one
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, UNSIGNED, UNDEFINED = 0, 1, 4  # values of the last two tags

ORIENTATION = 0x0112  # tag of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Drawing an image takes longer than decoding a JPEG. Each process caches the pixels for the lifetime of the drawing.
_drawn: WeakKeyDictionary[Drawing, np.ndarray] = WeakKeyDictionary()


def load_image(image: Path | bytes | Drawing | Image.Image) -> Image.Image:
    """The decoded RGB image, upright and without transparency, of a file, the content of a file, or a drawing.

    Raises DataError with the path of an image that is missing, broken, larger than MAX_PIXELS, of more than MAX_SCANS,
    of an unsupported format or mode, or that is not a regular file, and TypeError for an argument of another type.
    """
    if isinstance(image, Image.Image):
        return _decoded(image, getattr(image, "filename", "") or "the image")
    if not isinstance(image, (Path, bytes)):
        if not hasattr(image, "draw"):
            raise TypeError(f"image: expected a PIL image, a path, bytes or a drawing, found a {type(image).__name__}")
        pixels = _drawn.get(image)
        if pixels is None:
            pixels = _drawn[image] = np.asarray(image.draw().convert("RGB"))
        return Image.fromarray(pixels)
    name = image if isinstance(image, Path) else "the image"
    try:
        with _opened(image) as file, Image.open(file, formats=readable_formats()) as opened:
            if opened.format in ("JPEG", "MPO"):
                file.seek(0)
                scans = file.read().count(START_OF_SCAN)
                if scans > MAX_SCANS:
                    raise DataError(f"{name}: expected a JPEG image of at most {MAX_SCANS} scans, found {scans}")
            return _decoded(opened, name)
    except (DataError, MemoryError):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{name}: image is missing") from error
    except Image.UnidentifiedImageError as error:
        if "HEIF" not in readable_formats() and HEIF.match(_beginning(image)):
            raise DataError(f"{name}: HEIF images need pillow-heif; pip install 'upperson[heif]'") from error
        raise DataError(
            f"{name}: image is broken (expected one of the formats {', '.join(readable_formats())})"
        ) from error
    except Image.DecompressionBombError as error:  # raised by Image.open for much more than MAX_PIXELS
        raise DataError(f"{name}: expected an image of at most {MAX_PIXELS:,} pixels ({error})") from error
    except OSError as error:
        problem = f"cannot be read ({error.strerror})" if error.errno else f"is broken ({error})"  # by system or Pillow
        raise DataError(f"{name}: image {problem}") from error
    except Exception as error:  # the formats raise many types: SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{name}: image is broken ({error})") from error


def _opened(image: Path | bytes) -> BinaryIO:
    """The content of an image file. Pillow maps a file that it opens by its path, and then garbles a TIFF image that
    EXIF turns by 90 degrees."""
    if isinstance(image, bytes):
        return io.BytesIO(image)
    require_regular(image)
    return open(image, "rb")


def _beginning(image: Path | bytes) -> bytes:
    with _opened(image) as file:
        return file.read(12)


@cache
def readable_formats() -> list[str]:
    """Those of FORMATS that this Pillow has, with pillow-heif where it is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _decoded(image: Image.Image, name: Path | str) -> Image.Image:
    """The RGB image of an image that is opened, but need not be loaded. `name` is the start of errors."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: expected an image of at most {MAX_PIXELS:,} pixels, found {width} x {height}")
    raw = str(image.tile[0].args) if isinstance(image, ImageFile) and image.tile else ""
    problem = _unsupported(image, raw)
    if problem:
        raise DataError(f"{name}: image has {problem}; expected 8 bits a channel, or 16 bits; convert the image")
    try:
        image.load()
        turn = TURNS.get(_orientation(image))
        decoded = _as_rgb(image, raw)
        decoded.info = {}  # the orientation, the profile and the transparent colour have been applied
        return decoded if turn is None else decoded.transpose(turn)
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise many types
        raise DataError(f"{name}: image is broken ({error})") from error


def _unsupported(image: Image.Image, raw: str) -> str | None:
    """What of an image cannot be shown in 8 bits, if anything. `raw`: Pillow's name of the stored values."""
    if image.mode == "I" and image.format == "PPM":
        return None  # of 16 bits
    if image.mode in REFUSED:
        return f"{REFUSED[image.mode]} (mode {image.mode} of Pillow)"
    if raw == "RGB;16B" and "transparency" in image.info:
        return "a transparent colour of 16 bits a channel, which Pillow cuts to 8"
    formats = _tiff_tag(image, SAMPLE_FORMAT, (UNSIGNED,))
    return None if set(formats) <= {UNSIGNED, UNDEFINED} else "signed values"


def _tiff_tag(image: Image.Image, tag: int, default: Any) -> Any:
    return image.tag_v2.get(tag, default) if isinstance(image, TiffImageFile) else default


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data, which viewers ignore too
        return None


def _as_rgb(image: Image.Image, raw: str) -> Image.Image:
    hidden = image.info.get("transparency")  # a colour, a grey value, an entry of the palette, or the palette's alpha
    if image.mode in (*DEEP, "I"):
        values = np.asarray(image)
        image = Image.fromarray(_eight_bits(image)[values])
        if hidden is not None:
            image.putalpha(Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8)))
    elif hidden is not None and raw in GREY_STEPS:
        image = image.copy()
        image.info["transparency"] = hidden * GREY_STEPS[raw]
    elif image.mode == "CMYK" and image.info.get("icc_profile"):
        profile: Any = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if profile.profile.xcolor_space.strip() == "CMYK":
            to_rgb = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "CMYK", "RGB")
            return to_rgb.apply(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    below = Image.new("RGBA", image.size, BACKGROUND)
    shown = image.convert("LA") if image.mode == "La" else image  # Pillow converts La to no other mode
    return Image.alpha_composite(below, shown.convert("RGBA")).convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """[2^16] uint8: the grey value of 8 bits for each deeper value of the image."""
    bits = _tiff_tag(image, BITS_PER_SAMPLE, (16,))[0]
    largest = 2**bits - 1
    table = np.minimum(np.round(np.arange(2**16) * (255 / largest)), 255).astype(np.uint8)
    return table[::-1] if bits == 16 and _tiff_tag(image, PHOTOMETRIC, None) == WHITE_IS_ZERO else table


def load_pixels(image: Path | Drawing | Image.Image, image_size: tuple[int, int]) -> torch.Tensor:
    """[3, H, W] uint8: the image resized to `image_size` (height, width), bilinear with antialiasing.

    Raises the errors of `load_image`.
    """
    loaded: Any = load_image(image)  # torchvision's annotations omit PIL images, which it also resizes
    resized = v2.functional.resize(loaded, list(image_size), v2.InterpolationMode.BILINEAR, antialias=True)
    return v2.functional.pil_to_tensor(resized)


def check_images(samples: Iterable[Sample], *, progress: bool = True) -> None:
    """Decodes every distinct image file once, in threads. Synthetic images need no check.

    Raises DataError with the number of missing or broken images and the paths of the first ones.
    """
    paths = list(dict.fromkeys(sample.image for sample in samples if isinstance(sample.image, Path)))
    problems = [found for found in inspect_images(paths, progress=progress) if isinstance(found, str)]
    if problems:
        listed = first_of(problems, NAMED_IN_ERROR)
        raise DataError(f"{len(problems)} of {len(paths)} images cannot be read: {'; '.join(listed)}")


def inspect_images(images: Sequence[Path | Drawing], *, progress: bool = True) -> list[tuple[int, int] | str]:
    """Decodes every image once, in threads. Returns (width, height) or an error message for each image."""
    with ThreadPoolExecutor() as threads:
        inspected = threads.map(_inspect, images)
        return list(tqdm(inspected, total=len(images), desc="checking images", unit="image", disable=not progress))


def first_of(lines: Sequence[str], most: int) -> list[str]:
    """The first `most` lines, and the number of the others."""
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]


def _inspect(image: Path | Drawing) -> tuple[int, int] | str:
    try:
        return load_image(image).size
    except DataError as error:
        return str(error)
