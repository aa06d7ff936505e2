"""Published weights by their open_clip tag: from the local cache, or downloaded, with an early error if offline."""

import logging
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import open_clip
from huggingface_hub import constants
from torch import nn

from upperson.errors import BackboneError

TIMEOUT = 5  # seconds to wait for a host


def load_published(model: str, tag: str) -> nn.Module:
    """The open_clip model with the weights of one of its tags.

    Raises BackboneError if the weights are not in the cache and cannot be downloaded.
    """
    source = open_clip.get_pretrained_cfg(model, tag)
    host = constants.ENDPOINT if source.get("hf_hub") else source.get("url", "")
    online = reachable(host)
    try:
        with without_messages(), nullcontext() if online else cache_only():
            return open_clip.create_model(model, pretrained=tag)
    except Exception as error:  # the libraries raise many types for a failed download
        reason = str(error).split("\n")[0] if online else f"{host} cannot be reached"
        raise BackboneError(
            f"the weights {tag!r} of {model} are not in the local cache, and could not be downloaded: {reason}; give "
            "--pretrained the path of a checkpoint file"
        ) from error


def reachable(url: str) -> bool:
    """Whether a host responds within TIMEOUT, also through a proxy."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@contextmanager
def cache_only() -> Iterator[None]:
    """A context in which the hub's library reads only its cache, without minutes of download attempts."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def without_messages() -> Iterator[None]:
    """A context without log messages.

    open_clip warns that a model is random before its weights are read, and logs the error that the caller raises.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
