"""Augmentation in batches, against torchvision's transforms one image at a time."""

import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from operators import slow_case
from PIL import Image
from tiny import write_image
from torchvision.transforms import v2

from upperson.data import DeviceBatches, Preprocess, augment, to_device
from upperson.data.augmentation import COLUMNS, RandomAugmentation, normalise
from upperson.data.images import load_pixels
from upperson.model.captions import pack_captions

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = [(384, 128), (224, 224), (192, 64), (48, 16), (12, 8)]  # the last so low that there is no border


def one_at_a_time(size: tuple[int, int], *, train: bool = True) -> v2.Compose:
    """The released code's recipe, by torchvision alone: PIL image -> [3, H, W] float32."""
    border = 10 if size[0] >= 224 else round(10 * size[0] / 384)
    return v2.Compose(
        [
            v2.Resize(size, v2.InterpolationMode.BILINEAR, antialias=True),
            *([v2.RandomHorizontalFlip(0.5), v2.RandomCrop(size, padding=border)] if train else []),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            *([v2.RandomErasing(p=0.5, scale=(0.02, 0.4), value=list(MEAN))] if train else []),
            v2.ToPureTensor(),
        ]
    )


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    """Noise of eight sizes."""
    folder = tmp_path_factory.mktemp("images")
    return [write_image(folder / f"{i}.png", i, (50 + 11 * i, 90 + 40 * i)) for i in range(8)]


def drawn(size: tuple[int, int], seeds: range) -> torch.Tensor:
    """[seeds, 7]: the random choices of each seed."""
    random = RandomAugmentation(size)
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        rows.append(random.draw())
    return torch.stack(rows)


def augmented(image: torch.Tensor, augmentation: torch.Tensor) -> torch.Tensor:
    """[3, H, W] uint8 and [B, 7] -> that one image in B augmentations."""
    return augment(image.expand(len(augmentation), *image.shape), augmentation, MEAN, STD)


def chosen(**columns: int) -> torch.Tensor:
    """[1, 7], all else 0."""
    return torch.tensor([[columns.get(name, 0) for name in COLUMNS]])


class TestAgainstTorchvision:
    @pytest.mark.slow
    @pytest.mark.parametrize("size", SIZES)
    def test_training_is_equal_to_the_bit(self, paths, size):
        transform, random = one_at_a_time(size), RandomAugmentation(size)
        images, augmentation, expected = [], [], []
        for seed in range(200):
            path = paths[seed % len(paths)]
            torch.manual_seed(seed)
            expected.append(transform(Image.open(path)))
            after = torch.get_rng_state()
            torch.manual_seed(seed)
            augmentation.append(random.draw())
            assert torch.equal(torch.get_rng_state(), after)
            images.append(load_pixels(path, size))
        found = augment(torch.stack(images), torch.stack(augmentation), MEAN, STD)
        assert torch.equal(found, torch.stack(expected))

    @pytest.mark.parametrize("size", SIZES)
    def test_evaluation_is_equal_to_the_bit(self, paths, size):
        transform = one_at_a_time(size, train=False)
        expected = torch.stack([transform(Image.open(path)) for path in paths])
        assert torch.equal(normalise(torch.stack([load_pixels(path, size) for path in paths]), MEAN, STD), expected)
        ours = Preprocess(size, MEAN, STD)
        assert torch.equal(torch.stack([ours(Image.open(path)) for path in paths]), expected)


class TestDrawing:
    def test_flips_half(self):
        assert 450 <= drawn((192, 64), range(1000))[:, 0].sum() <= 550  # 3.2 standard deviations

    @pytest.mark.parametrize(
        ("size", "border"),
        [
            slow_case((384, 128), 10),
            slow_case((224, 224), 10),
            slow_case((192, 64), 5),
            ((48, 16), 1),
            ((12, 8), 0),
        ],
    )
    def test_crops_reach_every_border(self, size, border):
        for column in drawn(size, range(400))[:, 1:3].unbind(1):
            assert column.unique().tolist() == list(range(-border, border + 1))

    def test_erases_2_to_40_percent_of_half(self):
        rectangles = drawn((192, 64), range(1000))[:, 3:]
        rectangles = rectangles[rectangles[:, 2] > 0]
        assert 450 <= len(rectangles) <= 550
        top, left, height, width = rectangles.unbind(1)
        assert min(top.min(), left.min()) >= 0 and (top + height).max() <= 192 and (left + width).max() <= 64
        areas = height * width / (192 * 64)
        assert 0.018 < areas.min() < 0.03 and 0.38 < areas.max() < 0.41

    def test_no_rectangle_fits(self):
        """In an image of one row and 1000 columns every random rectangle is too high."""
        assert (drawn((1, 1000), range(40))[:, 3:] == 0).all()

    def test_can_be_sent_to_another_process(self):
        random = pickle.loads(pickle.dumps(RandomAugmentation((48, 16))))
        torch.manual_seed(3)
        assert torch.equal(random.draw(), drawn((48, 16), range(3, 4))[0])


class TestAugment:
    image = torch.arange(3 * 4 * 2, dtype=torch.uint8).view(3, 4, 2) + 100
    plain = normalise(image, MEAN, STD)
    black = normalise(torch.zeros(3, 4, 2, dtype=torch.uint8), MEAN, STD)

    def test_no_augmentation(self):
        assert torch.equal(augmented(self.image, chosen())[0], self.plain)

    def test_flip(self):
        assert torch.equal(augmented(self.image, chosen(flip=1))[0], self.plain.flip(2))

    def test_crop_moves_the_image_and_shows_black(self):
        found = augmented(self.image, chosen(top=1, left=-1))[0]
        assert torch.equal(found[:, :3, 1], self.plain[:, 1:, 0])
        assert torch.equal(found[:, 3], self.black[:, 0]) and torch.equal(found[:, :, 0], self.black[:, :, 0])

    def test_flip_comes_before_the_crop(self):
        found = augmented(self.image, chosen(flip=1, left=1))[0]
        assert torch.equal(found[:, :, 0], self.plain[:, :, 0]) and torch.equal(found[:, :, 1], self.black[:, :, 0])

    def test_erases_with_the_mean_after_normalising(self):
        rectangle = {"erased_top": 1, "erased_left": 1, "erased_height": 2, "erased_width": 1}
        expected = self.plain.clone()
        expected[:, 1:3, 1:] = torch.tensor(MEAN)[:, None, None]
        assert torch.equal(augmented(self.image, chosen(**rectangle))[0], expected)

    def test_inputs_stay(self):
        images, augmentation = self.image[None].clone(), chosen(flip=1, top=2)
        augment(images, augmentation, MEAN, STD)
        assert torch.equal(images[0], self.image) and torch.equal(augmentation, chosen(flip=1, top=2))

    @pytest.mark.parametrize(
        ("images", "augmentation", "message"),
        [
            (torch.zeros(3, 4, 2), chosen(), r"images: expected \[B, 3, H, W\] uint8, found \[3, 4, 2\] torch.float32"),
            (torch.zeros(1, 3, 4, 2), chosen(), r"found \[1, 3, 4, 2\] torch.float32"),
            (image[None], chosen()[:, :6], r"augmentation: expected \[1, 7\] int64, found \[1, 6\] torch.int64"),
            (image[None], chosen().float(), r"expected \[1, 7\] int64, found \[1, 7\] torch.float32"),
            (image[None].expand(2, 3, 4, 2), chosen(), r"expected \[2, 7\] int64, found \[1, 7\]"),
        ],
    )
    def test_refuses(self, images, augmentation, message):
        with pytest.raises(ValueError, match=message):
            augment(images, augmentation, MEAN, STD)


class TestToDevice:
    @pytest.fixture
    def batches(self) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        return [
            {
                "images": torch.randint(0, 256, (count, 3, 48, 16), dtype=torch.uint8, generator=generator),
                "augmentation": drawn((48, 16), range(count)),
                "captions": torch.randint(0, 9, (count, 77), generator=generator),
                "person_ids": torch.arange(count),
            }
            for count in (3, 3, 2)
        ]

    def test_images_are_augmented_and_all_else_is_moved(self, batches):
        batch = batches[0]
        moved = to_device(batch, torch.device("cpu"), MEAN, STD)
        assert list(moved) == ["images", "captions", "person_ids"]
        assert torch.equal(moved["images"], augment(batch["images"], batch["augmentation"], MEAN, STD))
        assert all(torch.equal(moved[name], batch[name]) for name in ("captions", "person_ids"))
        assert batch["images"].dtype == torch.uint8 and "augmentation" in batch

    def test_packed_captions_are_moved_too(self, batches):
        batches[0]["captions"][:, 50] = 49407
        packed = batches[0] | {"captions": pack_captions(batches[0]["captions"])}
        moved = to_device(packed, torch.device("meta"), MEAN, STD)
        assert moved["captions"].longest == 51
        assert moved["captions"].token_ids.shape == (3 * 51,) and moved["captions"].token_ids.device.type == "meta"

    def test_meta_device_shows_that_nothing_waits_for_values(self, batches):
        """On the meta device there are no values: whatever the host would have to wait for raises."""
        moved = to_device(batches[0], torch.device("meta"), MEAN, STD)
        assert moved["images"].shape == (3, 3, 48, 16) and moved["images"].dtype == torch.float32

    @pytest.mark.parametrize(
        "device",
        ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
    )
    def test_device_batches(self, batches, device):
        found = list(DeviceBatches(batches, torch.device(device), MEAN, STD))
        assert len(found) == 3
        for batch, expected in zip(found, batches, strict=True):
            assert batch.keys() == {"images", "captions", "person_ids"}
            assert {tensor.device.type for tensor in batch.values()} == {device}
            expected = to_device(expected, torch.device("cpu"), MEAN, STD)
            # A GPU need not divide to the last bit as the CPU does.
            torch.testing.assert_close(batch["images"].cpu(), expected["images"], rtol=1e-6, atol=1e-6)
            assert all(torch.equal(batch[name].cpu(), expected[name]) for name in ("captions", "person_ids"))

    def test_one_ahead_on_a_stream_of_its_own(self, monkeypatch):
        """The order of events on a GPU, without one."""
        happened, last = [], {}

        class Stream:
            def __init__(self, name):
                self.name = name

            def record_event(self):
                return last["moved"]

            def wait_event(self, event):
                happened.append(f"wait for {event}")

        class Moved:
            def record_stream(self, stream):
                happened.append(f"used on {stream.name}")

        def fake_to_device(batch, *_):
            last["moved"] = f"batch {batch}"  # by the one thread that fetches
            happened.append(last["moved"])
            return {"images": Moved()}

        monkeypatch.setattr("upperson.data.device.to_device", fake_to_device)
        monkeypatch.setattr("torch.cuda.Stream", lambda device: Stream("side"))
        monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream("current"))
        monkeypatch.setattr("torch.cuda.stream", lambda stream: happened.append(f"on {stream.name}") or nullcontext())
        for _ in DeviceBatches([1, 2, 3], torch.device("cuda"), MEAN, STD):
            happened.append("step")
        # A thread fetches, so that of two neighbours in this list of orders nothing more can be said.
        assert happened.count("step") == happened.count("used on current") == happened.count("on side") == 3
        moved, waited = (
            [happened.index(f"{what} {batch}") for batch in (1, 2, 3)] for what in ("batch", "wait for batch")
        )
        steps = [position for position, what in enumerate(happened) if what == "step"]
        assert moved == sorted(moved) and waited == sorted(waited)
        assert all(m < w < step for m, w, step in zip(moved, waited, steps, strict=True))
        assert moved[2] > waited[0]  # no more than one ahead

    def test_what_the_loader_raises_comes_through(self, monkeypatch):
        """From the thread, too."""
        monkeypatch.setattr("torch.cuda.Stream", lambda device: None)
        batches = DeviceBatches(iter(()), torch.device("cuda"), MEAN, STD)
        batches.stream, batches.loader = object(), (1 / 0 for _ in range(3))
        with pytest.raises(ZeroDivisionError):
            next(iter(batches))

    def test_no_batches(self):
        assert list(DeviceBatches([], torch.device("cpu"), MEAN, STD)) == []
