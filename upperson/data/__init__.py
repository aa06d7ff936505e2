"""Pairs of image and caption: reading data sets, checking, augmenting and batching them."""

from upperson.errors import DataError
from upperson.data.augmentation import augment
from upperson.data.cache import ImageCache
from upperson.data.device import DeviceBatches, to_device
from upperson.data.images import check_images, load_image
from upperson.data.loaders import batches_per_epoch, caption_loader, image_loader, share_of, train_loader
from upperson.data.readers import DATASETS, read_dataset
from upperson.data.samples import Drawing, Sample, gallery, queries
from upperson.data.masking import NOT_MASKED, image_transform, mask_caption

__all__ = [
    "DATASETS",
    "NOT_MASKED",
    "DataError",
    "DeviceBatches",
    "Drawing",
    "ImageCache",
    "Sample",
    "augment",
    "batches_per_epoch",
    "caption_loader",
    "check_images",
    "gallery",
    "image_loader",
    "image_transform",
    "load_image",
    "mask_caption",
    "queries",
    "read_dataset",
    "share_of",
    "to_device",
    "train_loader",
]
