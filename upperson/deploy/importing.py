"""Makes checkpoints of this project from those of other programs.

    upperson import best.pth --as up-person -o OUT.safetensors
    upperson import best.pth --as irra -o OUT.safetensors
    upperson import model.safetensors --as huggingface-clip -o OUT.safetensors

Every key of the file is either read, or known to affect no feature, or refused by name. No code in the file runs.

OUT is a checkpoint. A method that trains all of CLIP (IRRA) has all weights in OUT. Other methods have a frozen CLIP,
which a checkpoint does not contain: the CLIP of the file is written beside OUT, as OUT-clip.safetensors, for
--pretrained. If `--pretrained` names the backbone of the training, and its weights are those in the file, OUT contains
the adapters alone, and refers to that backbone. A file with only a CLIP becomes a zero-shot checkpoint.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from safetensors import safe_open
from torch import Tensor

from upperson.config import PRESETS, Config, ModelConfig, preset
from upperson.deploy.formats import FORMATS, Format, Source, Told
from upperson.deploy.merge import TOLERANCE, largest_difference
from upperson.deploy.outputs import check_outputs, staged
from upperson.errors import BackboneError, CheckpointError, MethodError, Parser, exit_status, path_argument
from upperson.files import require_regular, write_atomically
from upperson.methods import METHODS, UNTRAINED
from upperson.model import AdaptedCLIP, load_model
from upperson.model.adapted_clip import parameters_of
from upperson.model.archive import is_archive, read_archive, require_whole
from upperson.model.backbone import (
    Clip,
    fit_image_size,
    image_size_of,
    random_clip,
    require_transformers,
    uses_quick_gelu,
    with_other_activation,
)
from upperson.model.checkpoint import save_checkpoint
from upperson.model.tensor_files import CHECKPOINT, RESUME_STATE
from upperson.model.weights import (
    DTYPES,
    OPENAI_NUMBERS,
    TEMPERATURE,
    WRAPPERS,
    fingerprint,
    holds_tensors,
    load_pickled,
    not_finite,
    unusable,
    weights_as_bytes,
)

MODEL, IMAGE_SIZE, PRESET = "ViT-B-16-quickgelu", (384, 128), "cuhk-pedes"  # of the released trainings
SHOWN = 3  # keys of each problem in an error
OWN = {  # files of this project, and what to do with them
    CHECKPOINT: "it needs no import, and can be used as it is",
    RESUME_STATE: "use the checkpoint of the same run, best.safetensors",
}


class Foreign(NamedTuple):
    """A foreign checkpoint, as a model of this project."""

    config: Config
    model: AdaptedCLIP  # with all weights of the file
    backbone: dict[str, Tensor]  # the state dict of the CLIP, with the position embedding of the file
    image_size: tuple[int, int]  # of the position embedding of the file
    read: int  # number of keys
    unread: list[str]  # known keys and entries that no feature depends on


def read_foreign(
    path: Path,
    form: str,
    *,
    model: str = MODEL,
    image_size: tuple[int, int] | None = None,
    trained_on: str = PRESET,
    dtype: torch.dtype = torch.float32,
) -> Foreign:
    """Reads a checkpoint of another program.

    Args:
        path: the file, as torch.save, safetensors or (clip) TorchScript wrote it.
        form: a key of FORMATS.
        model: the architecture, as in ModelConfig.
        image_size: (height, width); None: that of the position embedding, which is of 384×128 or of a square.
        trained_on: the preset of the training's data set and recipe.
        dtype: that of the model's weights.

    Raises CheckpointError, which names the file and the key, for a file that is not of this format and architecture;
    BackboneError for an unknown architecture.
    """
    wanted = FORMATS[form]
    state, others = tensors_of(path)
    file = File(path, form, state)
    problem = unusable({key: value for key, value in state.items() if not known_unread(wanted, key)}, DTYPES)
    if problem:
        raise CheckpointError(f"{path}: {problem}{file.advice()}")
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if isinstance(tensor, Tensor)}
    clip: Clip = random_clip(model)
    require_transformers(model, clip)
    size = size_of_images(file, clip, image_size)
    fit_image_size(clip.visual, size)
    clip.to(dtype)
    told = check_told(file, clip, model)
    if told.mean is not None:
        known = open_clip.get_model_preprocess_cfg(clip)
        open_clip.set_model_preprocess_cfg(clip, known | {"mean": told.mean, "std": told.std})

    backbone = dict(clip.state_dict())
    sources = {name: wanted.clip(name.removeprefix("text.")) for name in backbone}
    for name in TEMPERATURE:  # not in all files; no feature depends on it
        if name in sources and sources[name].keys[0] not in state:
            del sources[name]
    used = file.fill(backbone, sources)
    try:
        config = preset(trained_on, wanted.method).replace(
            model=model, pretrained="none", image_size=image_size or size, backend="auto", **wanted.options(shapes)
        )
        adapted = AdaptedCLIP(replace(config.model, backend="torch"), clip).to(dtype)
    except (ValueError, MethodError, BackboneError) as error:
        raise CheckpointError(f"{path}: {error}{file.advice()}") from None
    modules = parameters_of(adapted.trained_modules())
    used |= file.fill(
        modules,
        {
            f"{place}.{name}": wanted.adaptation(place.tower, place.block, f"{place.kind}.{name}", shapes)
            for place, module in adapted.trained_modules().items()
            for name, _ in module.named_parameters()
        },
    )
    rest = [key for key in state if key not in used]
    if unknown := [key for key in rest if not known_unread(wanted, key)]:
        raise CheckpointError(f"{path}: {listed('unknown', unknown)}{file.advice()}")
    return Foreign(config, adapted, backbone, size, len(used), [*rest, *others])


def known_unread(form: Format, key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in form.unread)


class File(NamedTuple):
    """The tensors of a file, of which every one must be accounted for."""

    path: Path
    form: str
    state: Mapping[str, Tensor]

    @torch.no_grad()
    def fill(self, targets: Mapping[str, Tensor], sources: Mapping[str, Source]) -> set[str]:
        """Copies tensors to their places, and returns their keys. Raises CheckpointError with the keys that misfit."""
        missing, misshapen, used = [], [], set()
        for name, source in sources.items():
            target, parts = targets[name], []
            expected = split_shape(target, source)
            for key in source.keys:
                used.add(key)
                if key not in self.state:
                    missing.append(key)
                    continue
                found = self.state[key]
                if target.dim() == 0 and found.shape == (1,):
                    found = found.reshape(())
                if tuple(found.shape) != expected:
                    misshapen.append(f"{key} {tuple(found.shape)}, expected {expected}")
                parts.append(found)
            if not missing and not misshapen:
                joined = torch.stack(parts) if source.stacked else torch.cat(parts) if parts[1:] else parts[0]
                target.copy_(joined.t() if source.transposed else joined)
                if problem := not_finite({source.keys[0]: target}):
                    raise CheckpointError(f"{self.path}: {problem}")
        problems = [listed("missing", missing)] if missing else []
        problems += [listed("misshapen", misshapen)] if misshapen else []
        if problems:
            raise CheckpointError(f"{self.path}: {'; '.join(problems)}{self.advice()}")
        return used

    def advice(self) -> str:
        """What was expected, and of which format the file seems to be."""
        seems = next((form for form, other in FORMATS.items() if other.mark in self.state), None)
        other = f"; the file has keys of --as {seems}" if seems not in (None, self.form) else ""
        return f"; expected a checkpoint of {FORMATS[self.form].title} and of this --model{other}"


def split_shape(target: Tensor, source: Source) -> tuple[int, ...]:
    """The shape that each tensor of a source must have."""
    shape = tuple(target.shape)
    if source.transposed:
        return shape[::-1]
    if source.stacked:
        return shape[1:]
    return (shape[0] // len(source.keys), *shape[1:]) if len(source.keys) > 1 else shape


def listed(problem: str, keys: Sequence[str]) -> str:
    more = ", …" if len(keys) > SHOWN else ""
    return f"{len(keys)} {problem} key{'s' if len(keys) > 1 else ''}: {', '.join(keys[:SHOWN])}{more}"


# ------------------------------------------------------------------------------------ reading


def tensors_of(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The state dict of a file by key, without the prefix of DistributedDataParallel, and the names of other entries.

    A training saves its state dict under one of WRAPPERS, beside an optimizer, an epoch and others. Raises
    CheckpointError for a file that cannot be read, or without exactly one state dict.
    """
    try:
        require_regular(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                kind = (file.metadata() or {}).get("format")
                if kind in OWN:
                    raise CheckpointError(f"{path} is an {kind} already; {OWN[kind]}")
                return {key: file.get_tensor(key) for key in file.keys()}, []  # noqa: SIM118 (no mapping)
        require_whole(path)
        content: Any = read_archive(path) if is_archive(path) else load_pickled(path)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged and foreign files raise many types
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    others: list[str] = []
    if isinstance(content, Mapping) and not holds_tensors(content):
        held = [key for key, value in content.items() if isinstance(value, Mapping) and holds_tensors(value)]
        if len(held) > 1 or (held and held[0] not in WRAPPERS):
            raise CheckpointError(
                f"{path}: found state dicts under {', '.join(map(str, held))}; expected one, under one of "
                f"{', '.join(WRAPPERS)}"
            )
        others = [str(key) for key in content if key not in held]
        content = content[held[0]] if held else content
    if not holds_tensors(content) or not all(isinstance(key, str) for key in content):
        keys = ", ".join(map(str, list(content)[:SHOWN])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path}: the file holds no state dict of tensors by name; found {keys or 'nothing'}")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): value for key, value in content.items()}, others


def size_of_images(file: File, clip: Clip, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """The image size (height, width) of the position embedding of a file."""
    (key,) = FORMATS[file.form].clip("visual.positional_embedding").keys
    embedding = file.state.get(key)
    if embedding is None or embedding.dim() != 2:
        found = "is missing" if embedding is None else f"has the shape {tuple(embedding.shape)}, expected 2 dimensions"
        raise CheckpointError(f"{file.path}: the key {key} {found}{file.advice()}")
    try:
        return image_size_of(Path(key), embedding, {}, clip.visual, image_size or IMAGE_SIZE)
    except BackboneError as error:
        raise CheckpointError(f"{file.path}: {error} (--image-size){file.advice()}") from None


def check_told(file: File, clip: Clip, model: str) -> Told:
    """What the file tells of its CLIP. Raises CheckpointError for another activation than that of the architecture."""
    try:
        told = FORMATS[file.form].told(file.path, any(name in file.state for name in OPENAI_NUMBERS))
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    if told.quick_gelu is not None and told.quick_gelu != uses_quick_gelu(clip):
        activations = ("GELU", "QuickGELU")
        raise CheckpointError(
            f"{file.path}: the weights were trained with {activations[told.quick_gelu]}, as {told.by} tells, but "
            f"{model} computes {activations[not told.quick_gelu]}; expected {with_other_activation(model)}"
        )
    return told


# ------------------------------------------------------------------------------------ writing


def import_checkpoint(foreign: Foreign, source: Path, output: Path, pretrained: str | None = None) -> list[Path]:
    """Writes a foreign checkpoint, read from `source` in float32, and returns the files: `output`, and the CLIP.

    pretrained: the backbone of the training, a tag of open_clip or a file; None: unknown. The CLIP is not written if
    its weights are those of this backbone, or if the method trains all of CLIP.

    No file is written if the model of the files has other features than `foreign`. Raises CheckpointError,
    BackboneError or OSError.
    """
    model, config, beside = foreign.model, foreign.config, clip_path(output)
    quick_gelu = bool(uses_quick_gelu(model.clip))
    paths, frozen = [output], None
    if not config.model.method.trains_clip:
        if pretrained is not None:
            frozen = fingerprint_as_adapted(replace(config.model, pretrained=pretrained), foreign)
        if frozen is not None:
            config = config.replace(pretrained=pretrained)
        else:
            config, frozen = config.replace(pretrained=str(beside)), fingerprint(foreign.backbone)
            paths.append(beside)
    with staged(paths) as places:
        if len(places) > 1:
            preprocess = replace(model.preprocess, image_size=foreign.image_size)
            write_atomically(places[1], weights_as_bytes(foreign.backbone, preprocess, quick_gelu))
        save_checkpoint(places[0], model.adaptation(), config, {}, frozen)
        changes = {"pretrained": str(places[1])} if len(places) > 1 else {}
        found = largest_difference(model, load_model(places[0], backend="torch", **changes))
        if not found <= TOLERANCE:  # also true for NaN
            raise CheckpointError(
                f"{source}: the imported features have a relative difference of {found:.1e} from the file's; expected "
                f"at most {TOLERANCE:.0e}; no file was written"
            )
    return paths


def fingerprint_as_adapted(config: ModelConfig, foreign: Foreign) -> str | None:
    """The fingerprint of a backbone whose weights, at the image size of the file, are those in it; None: they differ.

    Raises BackboneError for a backbone that cannot be built.
    """
    config = replace(config.replace(method=UNTRAINED), image_size=foreign.image_size)
    known = AdaptedCLIP(config)
    return known.fingerprint if fingerprint(known.clip.state_dict()) == fingerprint(foreign.backbone) else None


def clip_path(output: Path) -> Path:
    """The file of the frozen CLIP beside a checkpoint."""
    return output.with_name(f"{output.stem}-clip.safetensors")


# ------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    return exit_status(lambda: _import(argv))


def _import(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.pretrained is not None and METHODS[FORMATS[options.form].method]().trains_clip:
        parser.error(
            f"--pretrained: --as {options.form} trains all of CLIP, so OUT has all weights and refers to no backbone; "
            "expected no --pretrained"
        )
    outputs = [options.output, clip_path(options.output)]
    check_outputs(parser, outputs, [options.file, Path(options.pretrained or ""), Path(options.model)])
    foreign = read_foreign(
        options.file,
        options.form,
        model=options.model,
        image_size=options.image_size and tuple(options.image_size),
        trained_on=options.preset,
    )
    paths = import_checkpoint(foreign, options.file, options.output, options.pretrained)
    print("\n".join(_report(options, foreign, paths)))
    return 0


def _report(options: argparse.Namespace, foreign: Foreign, paths: Sequence[Path]) -> Iterable[str]:
    config = foreign.config
    method = config.model.method
    yield f"{options.file}: {FORMATS[options.form].title}, {foreign.read} keys read"
    if foreign.unread:
        yield f"not read, since no feature depends on them: {', '.join(sorted(foreign.unread))}"
    yield f"method {method.name}: {method}"
    words = "recorded as trained on" if method.trains else "configured for"
    yield f"{words} {config.data.dataset} (--preset)"
    if len(paths) > 1 and options.pretrained is not None:
        yield f"the CLIP in the file has other weights than {options.pretrained}, so it was written, too"
    yield f"written: {', '.join(map(str, paths))}"
    place = "" if config.data.is_synthetic else " --data-root DIR"
    yield f"next: upperson evaluate {options.output} --data {config.data.dataset}{place}"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="upperson import",
        allow_abbrev=False,
        description="Make a checkpoint of this project from one of another program. Every key is read, known to affect "
        "no feature, or refused by name. OUT has the adapters; the frozen CLIP of the file is written beside it, as "
        "OUT-clip.safetensors, unless --pretrained has the same weights. IRRA trains all of CLIP: all is in OUT.",
    )
    parser.add_argument("file", type=path_argument, metavar="FILE", help="a .pth, .pt, .bin or .safetensors file")
    parser.add_argument(
        "--as", dest="form", required=True, choices=FORMATS,
        help="the program that wrote FILE: the released training of a method; or a CLIP of OpenAI, open_clip or "
        "Hugging Face, which becomes a zero-shot checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=path_argument, required=True, metavar="OUT", help="the checkpoint, .safetensors"
    )
    parser.add_argument(
        "--model", default=MODEL, help=f"the architecture, as in upperson train (default: {MODEL})", metavar="NAME"
    )
    parser.add_argument(
        "--pretrained", metavar="TAG|FILE",
        help="the backbone of the training, such as openai; if the CLIP of FILE has the same weights, it is not "
        "written (default: it is written)",
    )  # fmt: skip
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="in pixels (default: 384 128 or a square, as the position embedding has it)",
    )  # fmt: skip
    parser.add_argument(
        "--preset", choices=PRESETS, default=PRESET, metavar="NAME",
        help=f"the preset of the training's data set, which the checkpoint records: {', '.join(PRESETS)} "
        f"(default: {PRESET})",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
