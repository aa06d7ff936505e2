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
        with nullcontext() if online else cache_only():
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
    before, silenced = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    constants.HF_HUB_OFFLINE = True
    logging.disable(logging.ERROR)  # open_clip logs the error that the caller raises
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.disable(silenced)
