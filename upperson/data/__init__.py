"""Pairs of image and caption: reading data sets, checking, augmenting and batching them."""

from upperson.data.augmentation import augment
from upperson.data.cache import ImageCache
from upperson.data.device import DeviceBatches, to_device
from upperson.data.images import check_images, load_image
from upperson.data.loaders import batches_per_epoch, caption_loader, image_loader, train_loader
from upperson.data.masking import mask_caption
from upperson.data.preprocess import Preprocess
from upperson.data.readers import DATASETS, read_dataset
from upperson.data.samples import Sample, gallery, queries
from upperson.data.splits import read_splits

__all__ = [
    "DATASETS",
    "DeviceBatches",
    "ImageCache",
    "Preprocess",
    "Sample",
    "augment",
    "batches_per_epoch",
    "caption_loader",
    "check_images",
    "gallery",
    "image_loader",
    "load_image",
    "mask_caption",
    "queries",
    "read_dataset",
    "read_splits",
    "to_device",
    "train_loader",
]
