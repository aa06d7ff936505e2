"""Shares a trained model as a folder, or on the Hugging Face hub.

    save_pretrained("runs/cuhk-pedes-1/best.safetensors", "my-model")      # then: hf upload NAME/my-model my-model
    model = from_pretrained("my-model")                                    # or "NAME/my-model", from the hub

The folder holds the checkpoint, its configuration as config.json, and a model card, README.md. A backbone that is a
local file, and a JSON model configuration, are copied into the folder. Paths of this computer are left out.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from upperson.config import SELECTIONS, Config
from upperson.deploy.outputs import new_folder
from upperson.errors import CheckpointError, one_line
from upperson.evaluate.results import METRICS
from upperson.evaluate.tables import pipe_table
from upperson.files import A_FOLDER, NOTHING, REGULAR, found_at, write_atomically
from upperson.model import AdaptedCLIP
from upperson.model.backbone import configuration_file
from upperson.model.checkpoint import Checkpoint, build_model, load_checkpoint, read_checkpoint, save_checkpoint

CHECKPOINT, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
CLIP, CLIP_CONFIG = "clip", "clip.json"  # the backbone's file has its own suffix
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# The files that are downloaded. Nothing else of a repository is.
PATTERNS = [CHECKPOINT, CONFIG, CLIP_CONFIG, *(f"{CLIP}{suffix}" for suffix in SUFFIXES)]

UNRECORDED = "not recorded"


def save_pretrained(checkpoint: Path | str, folder: Path | str, *, license: str | None = None) -> Path:
    """Writes a checkpoint to a new folder, which from_pretrained reads, and returns the folder.

    `license`: an identifier of the hub, such as "mit", for the model card; None: the card has none.

    The folder is complete or not there. Raises CheckpointError for a file that is not a checkpoint, or whose backbone
    is missing, and OSError for a folder that has content or cannot be written.
    """
    source, folder = load_checkpoint(checkpoint), Path(folder)
    backbone, description = local_files(source)
    config, results = without_paths(source, backbone, description)
    build_model(source, backend="torch")  # raises the errors of a reader, while the author can still act
    with new_folder(folder, "folder") as written:
        for file, name in ((backbone, config.model.pretrained), (description, config.model.model)):
            if file is not None:
                shutil.copyfile(file, written / name)
        save_checkpoint(written / CHECKPOINT, source.parameters, config, results, source.fingerprint)
        write_atomically(written / CONFIG, config.to_json())
        write_atomically(written / CARD, model_card(folder.absolute().name, config, results, license))
    return folder


def from_pretrained(name: Path | str, *, revision: str | None = None, **changes: Any) -> AdaptedCLIP:
    """The model of a folder of save_pretrained, or of a repository on the hub, on the CPU.

    Args:
        name: a folder, or the name of a repository, such as "NAME/my-model".
        revision: a branch, tag or commit on the hub; None: the newest.
        changes: fields of the configuration, as in build_model.

    Files are read as data. Raises CheckpointError for a name that is neither, for a repository that cannot be
    downloaded, and for content that save_pretrained did not write.
    """
    is_folder = str(name).strip() and found_at(Path(name)) == A_FOLDER
    folder = Path(name) if is_folder else downloaded(str(name), revision)
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    require_same_configuration(folder, checkpoint.config)
    own = checkpoint.config.model
    found = {
        field: str(folder / value)
        for field, value in (("model", own.model), ("pretrained", own.pretrained))
        if value in PATTERNS
    }
    return build_model(checkpoint, **found | changes)


def downloaded(name: str, revision: str | None) -> Path:
    """The folder in the hub's cache with a repository's files. Raises CheckpointError."""
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except HFValidationError as error:
        raise CheckpointError(f"{name}: expected a folder, or a repository of the hub such as NAME/MODEL") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{name} is no folder, and cannot be downloaded from the hub: {reason}") from error


def require_same_configuration(folder: Path, config: Config) -> None:
    """Raises CheckpointError if config.json, which people read, is not the configuration of the checkpoint."""
    path = folder / CONFIG
    if found_at(path) != REGULAR or path.read_bytes() != config.to_json().encode():
        found = NOTHING if found_at(path) == NOTHING else "another content"
        raise CheckpointError(f"{path}: expected the configuration of {CHECKPOINT}, found {found}")


def local_files(checkpoint: Checkpoint) -> tuple[Path | None, Path | None]:
    """The backbone's weights and its model configuration, if they are local files. Raises CheckpointError."""
    config = checkpoint.config.model
    description = None if config.model == "embedded" else configuration_file(config.model)
    if config.pretrained in ("embedded", "none", *open_clip.list_pretrained_tags_by_model(config.model)):
        return None, description
    weights = Path(config.pretrained)
    if found_at(weights) != REGULAR or weights.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{checkpoint.path}: the backbone is {weights}, {found_at(weights)}; expected a file whose name ends in "
            f"{', '.join(SUFFIXES)}"
        )
    return weights, description


def without_paths(
    checkpoint: Checkpoint, backbone: Path | None, description: Path | None
) -> tuple[Config, dict[str, Any]]:
    """The configuration and the results without paths of this computer."""
    changes: dict[str, Any] = {"data_root": None, "run_dir": None, "image_cache": None, "start_from": None}
    if backbone is not None:
        changes["pretrained"] = f"{CLIP}{backbone.suffix}"
    if description is not None:
        changes["model"] = CLIP_CONFIG
    known = checkpoint.config.values()
    config = checkpoint.config.replace(**{name: value for name, value in changes.items() if name in known})
    return config, bare(checkpoint.results, config)


def bare(results: Mapping[str, Any], config: Config) -> dict[str, Any]:
    kept = {name: value for name, value in results.items() if name != "checkpoint"}
    for name in ("trained_on", "evaluated_on"):
        if str(kept.get(name, "")).startswith("folder "):
            kept[name] = "folder"
    if "model" in kept:
        kept["model"] = config.model.model
    if isinstance(kept.get("stages"), list):
        kept["stages"] = [bare(stage, config) for stage in kept["stages"] if isinstance(stage, Mapping)]
    return kept


# ------------------------------------------------------------------------------------ the model card


def model_card(name: str, config: Config, results: Mapping[str, Any], license: str | None) -> str:
    """The text of README.md. What the checkpoint does not record is named as such."""
    name = one_line(name)
    method, data = config.model.method, results.get("trained_on", config.data.dataset)
    head = ["---", "library_name: upperson"]
    head += [f"license: {json.dumps(license)}"] if license else []
    head += ["tags:", "- text-based-person-retrieval", "- clip", f"- {method.name}", "---", ""]
    synthetic = " (synthetic pedestrians, no real people)" if config.data.is_synthetic else ""
    body = [
        f"# {name}",
        "",
        f"{method.title} for text-based person retrieval: it finds the images of a person from a sentence.",
        "",
        "```python",
        "from upperson.deploy.share import from_pretrained",
        "",
        f"model = from_pretrained({name!r})  # a folder, or the name of a repository of the hub",
        "```",
        "",
        "## Training",
        "",
        f"* **Data:** {data}{synthetic}.",
        f"* **Backbone:** {config.model.model}, weights {config.model.pretrained}, images of "
        f"{config.model.image_size[0]}×{config.model.image_size[1]} pixels.",
        f"* **Selection:** {selection_of(results)}.",
        f"* **Trained parameters:** {trained_of(results)}.",
        "",
        "## Results",
        "",
        *figures_of(results),
        "",
        "## Limits",
        "",
        "* The figures are of one run, on one split. Another seed or version of PyTorch gives other figures.",
        "* On other cameras, countries, seasons and ways to describe people the model finds less.",
        "* Captions are English. Words beyond the context length are cut.",
        *(["* The training data are drawn. The model has never seen a photograph."] if synthetic else []),
        "",
        "## Responsible use",
        "",
        "For research. A search for people by description can do harm: it can be used against persons who never agreed "
        "to it, and it is wrong more often for some groups than for others, as is the data that it learns from. Use it "
        "only on images whose subjects consented, or where the law and an ethics board allow it. Keep to the licences "
        "of the data and of the backbone. Do not use it to identify, track or monitor people.",
        "",
    ]
    return "\n".join([*head, *body])


def selection_of(results: Mapping[str, Any]) -> str:
    selection, epoch = results.get("selection"), results.get("epoch")
    if selection is None:
        return UNRECORDED
    at = "" if epoch is None else f"; epoch {epoch}" + (f" of {results['epochs']}" if "epochs" in results else "")
    return f"{SELECTIONS[selection]}{at}"


def trained_of(results: Mapping[str, Any]) -> str:
    trained, every = results.get("trained"), results.get("all_parameters")
    if not isinstance(trained, Mapping) or not all(type(count) is int for count in trained.values()):
        return UNRECORDED
    return f"{sum(trained.values()):,}" + (f" of {every:,}" if type(every) is int else "")


def figures_of(results: Mapping[str, Any]) -> list[str]:
    """The table of the metrics, and what was searched."""
    rows = [
        (title, *(f"{metrics[name]:.2f}" for name in METRICS))
        for title, metrics in (
            ("text → image", results.get("text_to_image")),
            ("image → text", results.get("image_to_text")),
            ("text → image, zero-shot CLIP", results.get("zero_shot")),
        )
        if isinstance(metrics, Mapping) and all(isinstance(metrics.get(name), int | float) for name in METRICS)
    ]
    if not rows:
        return ["The checkpoint records no results."]
    what = (
        f"In percent, on the {results.get('split', 'unknown')} split of {results.get('evaluated_on', UNRECORDED)}: "
        f"{results.get('captions', '?')} captions, {results.get('images', '?')} images."
    )
    return [pipe_table(("", *METRICS), rows), "", what]
