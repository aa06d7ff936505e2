"""What load_image makes of the images that users have: what a viewer shows, or a refusal that names the file."""

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from upperson.data import ImageCache, Preprocess, load_image
from upperson.data import images as module
from upperson.data.images import MAX_PIXELS, load_pixels
from upperson.errors import DataError

RAMP = np.linspace(0, 1, 64)[None].repeat(32, 0)  # (32, 64)
GREY = (RAMP * 255).round()


def loaded(content: bytes | Image.Image, folder: Path, **options) -> np.ndarray:
    """[H, W, 3]: the image of a file with this content, or of this image saved with the options."""
    path = folder / "image"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path, **options)
    found = np.asarray(load_image(path)).astype(int)
    assert np.array_equal(load_image(path.read_bytes()), found)  # the content alone is read as the file is
    return found


def png(pixels: np.ndarray, bits: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of packed rows; `kind` is the colour type. Pillow cannot write some of them."""
    width = pixels.shape[1] * 8 // bits if bits < 8 else pixels.shape[1]
    header = struct.pack(">IIBBBBB", width, len(pixels), bits, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(pixels: np.ndarray, bits: int, photometric: int, sample_format: int = 1) -> bytes:
    """An uncompressed grey TIFF file with little-endian values."""
    height, width = pixels.shape
    data = pixels.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def packed_in_12_bits(values: np.ndarray) -> np.ndarray:
    first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    parts = (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
    return np.stack(parts, 2).reshape(len(values), -1).astype(np.uint8)


deep = (RAMP * 65535).astype(np.uint16)
big = deep.astype(">u2")


class TestDeep:
    @pytest.mark.parametrize(
        "content",
        [
            png(big, 16, 0),
            png(big[..., None].repeat(3, 2), 16, 2),
            png(np.stack([big, np.full_like(big, 65535)], 2).astype(">u2"), 16, 4),
            png(np.stack([big, big, big, np.full_like(big, 65535)], 2).astype(">u2"), 16, 6),
            tiff(deep, 16, 1),
            tiff(65535 - deep, 16, 0),
            tiff(packed_in_12_bits((RAMP * 4095).astype(np.uint16)), 12, 1).replace(
                struct.pack("<HHII", 256, 4, 1, 96), struct.pack("<HHII", 256, 4, 1, 64)
            ),
            b"P5 64 32 65535\n" + big.tobytes(),
            b"P5 64 32 4095\n" + (RAMP * 4095).astype(">u2").tobytes(),
            b"P6 64 32 65535\n" + big[..., None].repeat(3, 2).tobytes(),
        ],
        ids=[
            "grey PNG",
            "RGB PNG",
            "LA PNG",
            "RGBA PNG",
            "TIFF",
            "inverse TIFF",
            "12-bit TIFF",
            "PGM",
            "12-bit PGM",
            "PPM",
        ],
    )
    def test_keeps_its_picture(self, tmp_path, content):
        found = loaded(content, tmp_path)
        assert np.abs(found - GREY[..., None]).max() <= 1

    @pytest.mark.parametrize(
        ("suffix", "options"), [("TIFF", {"compression": "tiff_lzw"}), ("JPEG2000", {}), ("PNG", {})]
    )
    def test_as_pillow_writes_it(self, tmp_path, suffix, options):
        found = loaded(Image.fromarray(deep), tmp_path, format=suffix, **options)
        assert np.abs(found - GREY[..., None]).max() <= 1

    def test_in_memory(self):
        assert np.abs(np.asarray(load_image(Image.fromarray(deep))) - GREY[..., None]).max() <= 1

    @pytest.mark.parametrize(
        ("image", "found"),
        [
            (Image.new("I", (4, 4)), r"whole numbers of 32 bits \(mode I of Pillow\)"),
            (Image.new("F", (4, 4)), "floating-point numbers"),
            (Image.new("LAB", (4, 4)), r"values of CIE L\*a\*b\*"),
        ],
    )
    def test_unknown_ranges_are_refused(self, tmp_path, image, found):
        with pytest.raises(DataError, match=f"/image: image has {found}.*; expected 8 bits a channel, or 16 bits"):
            loaded(image, tmp_path, format="TIFF")
        with pytest.raises(DataError, match=f"^the image: image has {found}"):
            Preprocess((8, 4), (0.5,) * 3, (0.5,) * 3)(image)

    def test_signed_values_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="image has signed values"):
            loaded(tiff(np.zeros((4, 4), np.int8), 8, 1, sample_format=2), tmp_path)


SCENE = np.zeros((48, 24, 3), np.uint8)
SCENE[:24, :12], SCENE[:24, 12:], SCENE[24:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
STORED = {  # the inverse of what EXIF's value asks for
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(value: int, mode: str = "RGB") -> tuple[Image.Image, Image.Exif]:
    image, exif = Image.fromarray(SCENE).convert(mode), Image.Exif()
    exif[0x0112] = value
    return image if STORED[value] is None else image.transpose(STORED[value]), exif


class TestOrientation:
    @pytest.mark.parametrize("value", STORED)
    @pytest.mark.parametrize(
        ("suffix", "options"),
        [("JPEG", {"quality": 100, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})],
    )
    def test_is_applied(self, tmp_path, value, suffix, options):
        stored, exif = turned(value)
        found = loaded(stored, tmp_path, format=suffix, exif=exif, **options)
        assert found.shape == SCENE.shape and np.abs(found - SCENE).max() <= (8 if suffix == "JPEG" else 0)

    @pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
    def test_in_other_modes(self, tmp_path, mode, suffix):
        if (mode, suffix) == ("CMYK", "PNG"):
            mode = "LA"
        stored, exif = turned(6, mode)
        expected = np.asarray(Image.fromarray(SCENE).convert(mode).convert("RGB"))
        assert (loaded(stored, tmp_path, format=suffix, exif=exif) == expected).all()

    @pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
    def test_of_16_bits(self, tmp_path, suffix):
        _, exif = turned(6)
        found = loaded(Image.fromarray(np.rot90(deep).copy()), tmp_path, format=suffix, exif=exif)
        assert np.abs(found - GREY[..., None]).max() <= 1

    @pytest.mark.parametrize("value", [0, 9, 65535])
    def test_values_without_a_meaning(self, tmp_path, value):
        image, exif = turned(1)
        exif[0x0112] = value
        assert (loaded(image, tmp_path, format="PNG", exif=exif) == SCENE).all()

    def test_damaged_exif(self, tmp_path):
        image, _ = turned(1)
        assert (loaded(image, tmp_path, format="PNG", exif=b"Exif\0\0nonsense") == SCENE).all()

    def test_of_an_opened_image(self, tmp_path):
        stored, exif = turned(8)
        stored.save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as opened:
            assert (np.asarray(load_image(opened)) == SCENE).all() and opened.size == (48, 24)
        assert (np.asarray(load_image(load_image(tmp_path / "a.png"))) == SCENE).all()  # once is enough

    def test_everything_that_reads_images_agrees(self, tmp_path):
        stored, exif = turned(5)
        path = tmp_path / "a.png"
        stored.save(path, exif=exif)
        expected = load_pixels(Image.fromarray(SCENE), (48, 24))
        cache = ImageCache.open([path], (48, 24), tmp_path / "cache", progress=False)
        assert torch.equal(load_pixels(path, (48, 24)), expected) and torch.equal(cache[path], expected)
        preprocess = Preprocess((48, 24), (0.5,) * 3, (0.5,) * 3)
        assert torch.equal(preprocess(path), preprocess.normalise(expected))
        assert torch.equal(preprocess(str(path)), preprocess(path))


WHITE = (255, 255, 255)


class TestTransparency:
    @pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 255)])
    @pytest.mark.parametrize(
        ("suffix", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})]
    )
    def test_rgba(self, tmp_path, hidden, suffix, options):
        pixels = np.zeros((4, 3, 4), np.uint8)
        pixels[..., :3] = hidden
        pixels[1], pixels[2] = (0, 128, 0, 255), (200, 0, 0, 51)
        found = loaded(Image.fromarray(pixels), tmp_path, format=suffix, **options)
        assert (found[[0, 3]] == WHITE).all() and (found[1] == (0, 128, 0)).all()
        assert np.abs(found[2] - (244, 204, 204)).max() <= 1  # a fifth of red over white

    @pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
    def test_grey_with_alpha(self, tmp_path, suffix):
        image = Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8))
        assert loaded(image, tmp_path, format=suffix).tolist() == [[[255] * 3, [10] * 3]]

    def test_palette_with_alpha(self, tmp_path):
        image = Image.merge("PA", [Image.new("P", (2, 1)), Image.fromarray(np.array([[0, 255]], np.uint8))])
        image.putpalette([9, 8, 7] * 256)
        assert loaded(image, tmp_path, format="TIFF").tolist() == [[[255] * 3, [9, 8, 7]]]

    @pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff"])
    def test_palette(self, tmp_path, transparency):
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        expected = [[[10, 20, 30], [255] * 3, [70, 80, 90]]]
        assert loaded(image, tmp_path, format="PNG", transparency=transparency).tolist() == expected

    def test_gif(self, tmp_path):
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        expected = [[[10, 20, 30], [255] * 3, [70, 80, 90]]]
        assert loaded(image, tmp_path, format="GIF", transparency=1).tolist() == expected

    def test_a_transparent_colour(self, tmp_path):
        image = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
        assert loaded(image, tmp_path, format="PNG", transparency=(1, 2, 3)).tolist() == [[[255] * 3, [1, 2, 4]]]

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_a_transparent_grey_value(self, tmp_path, bits):
        """Pixels from the least to the largest value; the second one is transparent."""
        count = min(2**bits, 8)
        values = [0, 1, *range(2**bits - count + 2, 2**bits)]
        packed = (
            np.array(
                [
                    int("".join(f"{value:0{bits}b}" for value in values[i : i + 8 // bits]), 2)
                    for i in range(0, count, 8 // bits)
                ]
            )
            if bits < 8
            else np.array(values)
        )
        if bits == 1:
            packed, values = np.array([0b01010101]), [0, 1] * 4
        content = png(packed[None].astype(">u2" if bits == 16 else np.uint8), bits, 0, (b"tRNS", struct.pack(">H", 1)))
        expected = [255 if value == 1 else round(value * 255 / (2**bits - 1)) for value in values]
        assert loaded(content, tmp_path)[0, : len(values), 0].tolist() == expected

    def test_a_transparent_colour_of_16_bits_is_refused(self, tmp_path):
        content = png(big[..., None].repeat(3, 2), 16, 2, (b"tRNS", struct.pack(">HHH", 1, 2, 3)))
        with pytest.raises(DataError, match="/image: image has a transparent colour of 16 bits a channel"):
            loaded(content, tmp_path)

    def test_an_opened_image_stays(self, tmp_path):
        content = png(np.array([[0b00011011]], np.uint8), 2, 0, (b"tRNS", struct.pack(">H", 1)))
        image = Image.open(io.BytesIO(content))
        assert load_image(image).getpixel((1, 0)) == WHITE and image.info["transparency"] == 1


def cmyk_profile() -> bytes:
    """A profile that takes CMYK without ink for white, with black ink for black, and with other ink for a grey."""
    lightness = [255 if corner == 0 else 0 if corner & 1 else 128 for corner in range(16)]
    lab = [bytes([value, 128, 128]) for value in lightness]
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    curve = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + curve * 4 + b"".join(lab) + curve * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    text = b"text" + bytes(4) + b"none\0" + bytes(3)
    parts = {b"A2B0": table + bytes(-len(table) % 4), b"wtpt": white, b"cprt": text, b"desc": text}
    tags, data, start = b"", b"", 132 + 12 * len(parts)
    for name, part in parts.items():
        tags += name + struct.pack(">II", start + len(data), len(part))
        data += part
    header = bytearray(128)
    struct.pack_into(
        ">I4s4s4s4s4s", header, 0, start + len(data), bytes(4), bytes([2, 16, 0, 0]), b"prtr", b"CMYK", b"Lab "
    )
    header[36:40] = b"acsp"
    struct.pack_into(">3i", header, 68, 63190, 65536, 54061)
    return bytes(header) + struct.pack(">I", len(parts)) + tags + data


class TestColours:
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0]]], np.uint8).repeat(8, 0).repeat(8, 1), "CMYK")

    @pytest.mark.parametrize("suffix", ["TIFF", "JPEG"])
    def test_cmyk(self, tmp_path, suffix):
        found = loaded(self.image, tmp_path, format=suffix, **({"quality": 100} if suffix == "JPEG" else {}))
        assert np.abs(found[4, [2, -2]] - ((255, 255, 255), (0, 255, 255))).max() <= 3

    @pytest.mark.parametrize("suffix", ["TIFF", "JPEG"])
    def test_cmyk_with_a_profile(self, tmp_path, suffix):
        found = loaded(self.image, tmp_path, format=suffix, icc_profile=cmyk_profile())
        white, grey = found[4, 2], found[4, -2]
        assert white.min() >= 250 and np.ptp(grey) <= 6 and 100 < grey.mean() < 140

    def test_a_profile_of_rgb_in_cmyk_is_ignored(self, tmp_path):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        assert loaded(self.image, tmp_path, format="TIFF", icc_profile=profile)[4, -2].tolist() == [0, 255, 255]

    def test_a_broken_profile(self, tmp_path):
        with pytest.raises(DataError, match="/image: image is broken"):
            loaded(self.image, tmp_path, format="TIFF", icc_profile=b"nonsense")

    @pytest.mark.parametrize("suffix", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
    def test_the_first_frame(self, tmp_path, suffix):
        frames = [Image.new("RGB", (16, 16), colour) for colour in ((200, 0, 0), (0, 200, 0))]
        found = loaded(frames[0], tmp_path, format=suffix, save_all=True, append_images=frames[1:])
        assert np.abs(found - (200, 0, 0)).max() <= 3

    @pytest.mark.parametrize("suffix", ["PNG", "BMP", "TIFF", "PPM"])
    def test_plain_images_are_unchanged(self, tmp_path, suffix):
        pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        assert (loaded(Image.fromarray(pixels), tmp_path, format=suffix) == pixels).all()
        assert (np.asarray(load_image(Image.fromarray(pixels))) == pixels).all()


class TestFiles:
    @pytest.mark.parametrize(
        ("kind", "found"), [("fifo", "a FIFO"), ("socket", "a socket"), ("device", "a device"), ("folder", "a folder")]
    )
    def test_only_regular_files_are_opened(self, tmp_path, kind, found, monkeypatch):
        path = tmp_path / "a.png"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            monkeypatch.chdir(tmp_path)  # the path of a socket is short
            socket.socket(socket.AF_UNIX).bind("a.png")
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        message = f"{path}: image cannot be read \\(expected a regular file, found {found}\\)"
        with pytest.raises(DataError, match=message):
            load_image(path)
        with pytest.raises(DataError, match=message):
            ImageCache.open([path], (8, 4), tmp_path / "cache", progress=False)

    @pytest.mark.parametrize(
        ("image", "kind"), [(torch.zeros(3, 4, 4), "Tensor"), (np.zeros((4, 4, 3)), "ndarray"), (3, "int")]
    )
    def test_another_type(self, image, kind):
        with pytest.raises(TypeError, match=f"image: expected a PIL image, a path, bytes or a drawing, found a {kind}"):
            Preprocess((48, 24), (0.5,) * 3, (0.5,) * 3)(image)

    def test_missing(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "no.png", tmp_path / "file" / "a.png"):
            with pytest.raises(DataError, match=f"{path}: image is missing"):
                load_image(path)

    def test_a_name_that_is_too_long(self, tmp_path):
        with pytest.raises(DataError, match=r"image cannot be read \(File name too long\)"):
            load_image(tmp_path / ("a" * 300))

    @pytest.mark.parametrize(
        ("progressive", "copies", "refused"),
        [(False, 1, False), (True, 1, False), (True, 80, False), (True, 101, True), (False, 101, True)],
    )
    def test_too_many_scans_are_not_decoded(self, tmp_path, progressive, copies, refused):
        """Each scan of a JPEG image is decoded over the whole image: a small file could take minutes."""
        path = tmp_path / "a.jpg"
        Image.fromarray(SCENE).save(path, progressive=progressive)
        content = path.read_bytes()
        start = content.rindex(b"\xff\xda")
        path.write_bytes(content[:start] + content[start:-2] * copies + content[-2:])
        if refused:
            with pytest.raises(DataError, match=f"{path}: expected a JPEG image of at most 100 scans, found 1[01]"):
                load_image(path)
        else:
            assert load_image(path).size == (24, 48)

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("size", [(8193, 8192), (12600, 12600), (2**31 - 1, 2**31 - 1)])
    def test_too_many_pixels_are_not_decoded(self, tmp_path, size, monkeypatch):
        header = struct.pack(">IIBBBBB", *size, 1, 0, 0, 0, 0)
        content = png(np.zeros((1, 1), np.uint8), 1, 0)
        start = content.index(b"IHDR")
        chunk = b"IHDR" + header
        content = content[:start] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[start + 21 :]
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
        with pytest.raises(DataError, match=f"/image: expected an image of at most {MAX_PIXELS:,} pixels"):
            loaded(content, tmp_path)

    def test_the_bound_itself(self, monkeypatch):
        monkeypatch.setattr(module, "MAX_PIXELS", 12)
        assert load_image(Image.new("RGB", (3, 4))).size == (3, 4)
        with pytest.raises(DataError, match="expected an image of at most 12 pixels, found 13 x 1"):
            load_image(Image.new("RGB", (13, 1)))

    def test_formats_that_run_programs_are_not_opened(self, tmp_path):
        with pytest.raises(DataError, match=r"image is broken \(expected one of the formats .*PNG.*\)"):
            loaded(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", tmp_path)

    @pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "JPEG2000", "BMP"])
    def test_cut_files(self, tmp_path, suffix):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, suffix)
        for length in (0, 10, len(buffer.getvalue()) // 2):
            with pytest.raises(DataError, match="/image: image is broken"):
                loaded(buffer.getvalue()[:length], tmp_path)


LOSSLESS = dict(format="HEIF", quality=-1, chroma=444, matrix_coefficients=0)


@pytest.fixture
def heif():
    return pytest.importorskip("pillow_heif", reason="the extra heif is not installed")


@pytest.mark.usefixtures("heif")
class TestHeif:
    @pytest.mark.parametrize("value", [1, 3, 6])
    def test_exif_does_not_turn_it(self, tmp_path, value):
        """HEIF has properties of its own for that, which the decoder applies; EXIF repeats them."""
        _, exif = turned(value)
        assert "HEIF" in module.readable_formats()  # from here on Pillow writes it
        assert (loaded(Image.fromarray(SCENE), tmp_path, exif=exif, **LOSSLESS) == SCENE).all()

    def test_transparency(self, tmp_path):
        image = Image.fromarray(SCENE).convert("RGBA")
        image.putalpha(0)
        assert "HEIF" in module.readable_formats()
        assert (loaded(image, tmp_path, **LOSSLESS) == 255).all()

    def test_too_many_pixels_are_not_decoded(self, tmp_path, monkeypatch):
        assert "HEIF" in module.readable_formats()
        Image.fromarray(SCENE).save(tmp_path / "a.heic", format="HEIF")
        monkeypatch.setattr(module, "MAX_PIXELS", 1000)
        with pytest.raises(DataError, match=r"a\.heic: expected an image of at most 1,000 pixels, found 24 x 48"):
            load_image(tmp_path / "a.heic")

    @pytest.mark.parametrize("name", ["a.heic", "a.jpg", "a"])
    def test_without_pillow_heif_it_is_named(self, tmp_path, name, monkeypatch):
        assert "HEIF" in module.readable_formats()
        Image.fromarray(SCENE).save(tmp_path / name, format="HEIF")
        monkeypatch.setattr(module, "readable_formats", lambda: ["JPEG", "PNG"])
        for image in (tmp_path / name, (tmp_path / name).read_bytes()):
            with pytest.raises(DataError, match=r"HEIF images need pillow-heif; pip install 'upperson\[heif\]'"):
                load_image(image)
        with pytest.raises(DataError, match=r"image is broken \(expected one of the formats JPEG, PNG\)"):
            load_image(b"\0\0\0\x18ftypisom")

    def test_cut_files(self, tmp_path):
        assert "HEIF" in module.readable_formats()
        buffer = io.BytesIO()
        Image.fromarray(SCENE).save(buffer, "HEIF")
        for length in (10, 100, len(buffer.getvalue()) // 2, len(buffer.getvalue()) - 20):
            with pytest.raises(DataError, match="/image: image is broken"):
                loaded(buffer.getvalue()[:length], tmp_path)
