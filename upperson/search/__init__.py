"""Search of one's own images by a sentence: an index of a folder, and queries of it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upperson.search.entry import Entry, Hit, Query
    from upperson.search.gallery import Gallery

# As in upperson: a module is imported at the first use of a name, since importing torch takes seconds.
_MODULES = {"Entry": "entry", "Hit": "entry", "Query": "entry", "Gallery": "gallery"}

__all__ = ["Entry", "Gallery", "Hit", "Query"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
