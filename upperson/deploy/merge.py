"""Folds a checkpoint into the weights of a plain CLIP, which open_clip loads and which costs nothing extra.

    upperson merge CHECKPOINT OUTPUT.safetensors
    upperson merge CHECKPOINT OUTPUT.safetensors --rest REST.safetensors

LoRA, DoRA and WoRA fold into the weights of keys and values. LN-tuning folds into LayerNorm's gain and bias. CLIP's own
weights, where a method trains them, need no folding. The other modules do not fold. A prefix adds columns of keys and
values, whose attention weights λ scales; prompts add tokens; open_clip's towers have neither. A bottleneck adapter is
not linear, and no layer of CLIP computes it. `--rest` writes these modules to a second checkpoint, whose backbone is
OUTPUT: load_model gives the same features, and merges no weights at every step.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from upperson.config import ModelConfig
from upperson.errors import MergeError, exit_status
from upperson.files import write_atomically
from upperson.methods import Place
from upperson.model import AdaptedCLIP, load_model
from upperson.model.adapted_clip import parameters_of
from upperson.model.backbone import CLIP_VOCABULARY, configuration_file, random_clip
from upperson.model.block import KINDS, Block
from upperson.model.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from upperson.model.weights import weights_as_bytes
from upperson.petl import LayerNormTuning, LoRA

TOLERANCE = 1e-5  # of features, relative, in float32


def merge(model: AdaptedCLIP) -> dict[str, Tensor]:
    """The state dict of a plain open_clip model with the features of `model`, in its dtype and on its device.

    The model is left as it is; weights that nothing is folded into are its own tensors. The position embedding is that
    of config.image_size. Raises MergeError, which names them, for modules that do not fold.
    """
    modules = unfoldable(model)
    if modules:
        named = dict.fromkeys(f"{place.kind} {type(module).__name__}" for place, module in modules.items())
        raise MergeError(f"does not fold into weights that open_clip can use: {', '.join(named)}")
    return folded(model)


def unfoldable(model: AdaptedCLIP) -> dict[Place, nn.Module]:
    """The trained modules that do not fold, by their places."""
    return {
        place: module
        for place, module in model.trained_modules().items()
        if not isinstance(module, LoRA | LayerNormTuning)
    }


@torch.no_grad()
def folded(model: AdaptedCLIP) -> dict[str, Tensor]:
    """The state dict of open_clip's model, with everything in it that folds."""
    state = dict(model.clip.state_dict())
    for name, block in model.clip.named_modules():
        if not isinstance(block, Block):
            continue
        for parameter_name in block.trained():
            del state[f"{name}.{parameter_name}"]
        if block.lora is not None:
            state[f"{name}.attn.in_proj_weight"] = block.lora(block.attn.in_proj_weight)
        for norm, adapter in (("ln_1", block.adapter_attn), ("ln_2", block.adapter_mlp)):
            if isinstance(adapter, LayerNormTuning):
                state[f"{name}.{norm}.weight"] = adapter.weight.detach()
                state[f"{name}.{norm}.bias"] = adapter.bias.detach()
    return state


# ------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    parser = _parser()
    options = parser.parse_args(argv)
    return exit_status(lambda: _merge(parser, options))


def _merge(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    outputs = [path for path in (options.output, options.rest) if path is not None]
    checkpoint = load_checkpoint(options.checkpoint)
    changes = {} if options.pretrained is None else {"pretrained": options.pretrained}
    try:
        checkpoint = replace(checkpoint, config=checkpoint.config.replace(**changes))
    except ValueError as error:
        parser.error(str(error))
    backbone = checkpoint.config.model
    _check_files(parser, outputs, [options.checkpoint, Path(backbone.pretrained), Path(backbone.model)])
    found = merge_checkpoint(checkpoint, options.output, options.rest)
    print(f"features differ by {found:.1e} at most, relative, in float32")
    print("\n".join(_how_to_load(backbone, *outputs)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="upperson merge",
        allow_abbrev=False,
        description="Fold a checkpoint into the weights of a plain CLIP, for open_clip: LoRA, DoRA, WoRA, LN-tuning, "
        "full fine-tuning. Prefixes and bottleneck adapters do not fold. The result is compared with the checkpoint "
        "before anything is written.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .safetensors file that training wrote")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the weights, a .safetensors file")
    parser.add_argument(
        "--rest",
        type=Path,
        metavar="REST",
        help="a second checkpoint, .safetensors, for the modules that do not fold; its backbone is OUTPUT",
    )
    parser.add_argument("--pretrained", metavar="FILE", help="the backbone's weights, where they have moved")
    return parser


def _check_files(parser: argparse.ArgumentParser, outputs: list[Path], inputs: list[Path]) -> None:
    for path in outputs:
        if path.suffix != ".safetensors":
            parser.error(f"{path}: expected a name that ends in .safetensors")
        if path.resolve() in [other.resolve() for other in inputs]:
            parser.error(f"{path} is read; expected another file to write")
        if path.is_dir() or not path.parent.is_dir():
            parser.error(f"{path}: expected a file in a folder that is there")
    if len({path.resolve() for path in outputs}) < len(outputs):
        parser.error(f"OUTPUT and --rest are the same file, {outputs[0]}")


def _how_to_load(config: ModelConfig, output: Path, rest: Path | None = None) -> list[str]:
    """Lines of Python."""
    if rest is not None:
        return [f"upperson.load_model({str(rest)!r})          # and {output}"]
    path = configuration_file(config.model)
    known = [] if path is None else [f"open_clip.add_model_config({str(path)!r})"]
    name = config.model if path is None else path.stem
    return [
        *known,
        f"open_clip.create_model({name!r}, pretrained={str(output)!r}, force_image_size={config.image_size})",
    ]


def merge_checkpoint(checkpoint: Checkpoint, output: Path, rest: Path | None = None) -> float:
    """Writes the merged weights of a checkpoint to `output`, and the modules that do not fold to `rest`.

    Returns the largest relative difference between the features of the written files and of the checkpoint. If it is
    above TOLERANCE, or anything else fails, nothing is written. Raises MergeError, BackboneError, CheckpointError or
    OSError.
    """
    path, config = checkpoint.path, checkpoint.config
    model = build_model(checkpoint, backend="torch")
    remaining, method = unfoldable(model), config.model.method
    if rest is None:
        try:
            state = merge(model)
        except MergeError as error:
            raise MergeError(f"{path}: {error}; --rest FILE keeps that in a checkpoint of its own") from None
    elif not remaining:
        raise MergeError(f"{path}: everything in it folds into {output}; nothing remains for {rest}")
    else:
        kept, kinds = ({place.kind for place in places} for places in (remaining, model.trained_modules()))
        method = method.without([kind for kind in KINDS if kind in kinds - kept])
        state = folded(model)

    content = weights_as_bytes(state, model.preprocess)
    with staged([output] if rest is None else [output, rest]) as (staged_output, *staged_rest):
        write_atomically(staged_output, content)
        if staged_rest:
            backbone = replace(config.model, method=method, pretrained=str(output))
            others = replace(config, model=backbone)
            save_checkpoint(staged_rest[0], parameters_of(remaining), others, checkpoint.results)
            written = load_model(staged_rest[0], pretrained=str(staged_output), backend="torch")
        else:
            written: Any = random_clip(config.model.model, config.model.image_size).eval()
            open_clip.load_checkpoint(written, str(staged_output), strict=True)
        found = largest_difference(model, written)
        if not found <= TOLERANCE:  # NaN as well
            raise MergeError(
                f"{path}: the merged features differ by {found:.1e}, relative, from the checkpoint's; expected "
                f"{TOLERANCE:.0e} at most; nothing was written"
            )
    return found


@contextmanager
def staged(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary paths: the files there move to `paths` if the body succeeds, and are deleted if it fails."""
    with ExitStack() as stack:
        # In the folder of the final path, so that moving a file is only a change of its name.
        folders = [stack.enter_context(TemporaryDirectory(prefix=".merge-", dir=path.parent)) for path in paths]
        files = [Path(folder) / path.name for folder, path in zip(folders, paths, strict=True)]
        yield files
        for file, path in zip(files, paths, strict=True):
            os.replace(file, path)


@torch.no_grad()
def largest_difference(model: AdaptedCLIP, other: Any) -> float:
    """The largest distance of two models' features of the same random input, relative to the features' length.

    `other` has open_clip's encode_image and encode_text.
    """
    generator = torch.Generator().manual_seed(0)
    samples, length = 4, model.context_length
    images = torch.randn(samples, 3, *model.config.image_size, generator=generator)
    start, end = CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1
    tokens = torch.randint(1, start, (samples, length), generator=generator)
    tokens[:, 0] = start
    for i in range(samples):  # captions of a quarter to all of the length
        last = (length - 1) * (i + 1) // samples
        tokens[i, last], tokens[i, last + 1 :] = end, 0
    pairs = (
        (model.encode_image(images), other.encode_image(images)),
        (model.encode_text(tokens), other.encode_text(tokens)),
    )
    return torch.stack([(ours - theirs).norm(dim=1) / ours.norm(dim=1) for ours, theirs in pairs]).max().item()


if __name__ == "__main__":
    sys.exit(main())
