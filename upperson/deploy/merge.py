"""Merges a checkpoint into the weights of a plain CLIP, which open_clip loads and which has no extra cost.

    upperson merge CHECKPOINT OUTPUT.safetensors
    upperson merge CHECKPOINT OUTPUT.safetensors --rest REST.safetensors

LoRA, DoRA and WoRA merge into the weights of keys and values. LN-tuning merges into LayerNorm's gain and bias. If a
method trains CLIP's own weights, these are already merged. The other modules cannot be merged. A prefix adds columns of
keys and values, whose attention weights λ scales; prompts add tokens; open_clip's towers have neither. A bottleneck
adapter is not linear, and no layer of CLIP computes it. `--rest` writes these modules to a second checkpoint, whose
backbone is OUTPUT. load_model of this checkpoint gives the same features, and no longer merges weights in every step.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from upperson.config import ModelConfig
from upperson.deploy.outputs import check_outputs, staged
from upperson.errors import MergeError, Parser, exit_status, path_argument
from upperson.files import write_atomically
from upperson.methods import Place
from upperson.model import AdaptedCLIP, load_model
from upperson.model.adapted_clip import parameters_of
from upperson.model.backbone import CLIP_VOCABULARY, configuration_file, random_clip, uses_quick_gelu
from upperson.model.block import KINDS, Block
from upperson.model.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from upperson.model.weights import fingerprint, not_finite, weights_as_bytes
from upperson.petl import LayerNormTuning, LoRA

TOLERANCE = 1e-5  # relative error of features in float32


def merge(model: AdaptedCLIP) -> dict[str, Tensor]:
    """The state dict of a plain open_clip model with the features of `model`, in its dtype and on its device.

    The model is not changed; unchanged weights of the result are the model's own tensors. The position embedding is
    that of config.image_size. Raises MergeError with the names of modules that cannot be merged.
    """
    modules = unmergeable(model)
    if modules:
        named = dict.fromkeys(f"{place.kind} {type(module).__name__}" for place, module in modules.items())
        raise MergeError(f"cannot be merged into open_clip's weights: {', '.join(named)}")
    return merged_state(model)


def unmergeable(model: AdaptedCLIP) -> dict[Place, nn.Module]:
    """The trained modules that cannot be merged, by their places."""
    return {
        place: module
        for place, module in model.trained_modules().items()
        if not isinstance(module, LoRA | LayerNormTuning)
    }


@torch.no_grad()
def merged_state(model: AdaptedCLIP) -> dict[str, Tensor]:
    """The state dict of open_clip's model, with all modules merged that can be merged."""
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


@torch.no_grad()
def fold(model: AdaptedCLIP) -> None:
    """Merges in place what can be merged. The features stay the same; the other modules stay."""
    merged, remaining = merged_state(model), unmergeable(model)
    model.put_modules(remaining)
    own = model.clip.state_dict()
    for name, tensor in merged.items():
        own[name].copy_(tensor)


# ------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after an error of one line. Wrong arguments exit with 2, as in argparse."""
    return exit_status(lambda: _merge(argv))


def _merge(argv: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    outputs = [path for path in (options.output, options.rest) if path is not None]
    checkpoint = load_checkpoint(options.checkpoint)
    changes = {} if options.pretrained is None else {"pretrained": options.pretrained}
    try:
        checkpoint = replace(checkpoint, config=checkpoint.config.replace(**changes))
    except ValueError as error:
        parser.error(str(error))
    backbone = checkpoint.config.model
    if len({os.path.realpath(path) for path in outputs}) < len(outputs):
        parser.error(f"OUTPUT and --rest are the same file, {outputs[0]}")
    check_outputs(parser, outputs, [options.checkpoint, Path(backbone.pretrained), Path(backbone.model)])
    found = merge_checkpoint(checkpoint, options.output, options.rest)
    print(f"features differ by {found:.1e} at most (relative, in float32)")
    print("\n".join(_how_to_load(backbone, *outputs)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="upperson merge",
        allow_abbrev=False,
        description="Merge a checkpoint into the weights of a plain CLIP, for open_clip: LoRA, DoRA, WoRA, LN-tuning, "
        "full fine-tuning. Prefixes and bottleneck adapters cannot be merged. The result is compared with the "
        "checkpoint before files are written.",
    )
    parser.add_argument(
        "checkpoint", type=path_argument, metavar="CHECKPOINT", help="a .safetensors file that training wrote"
    )
    parser.add_argument("output", type=path_argument, metavar="OUTPUT", help="the weights, a .safetensors file")
    parser.add_argument(
        "--rest",
        type=path_argument,
        metavar="REST",
        help="a second checkpoint, .safetensors, for the modules that cannot be merged; its backbone is OUTPUT",
    )
    parser.add_argument("--pretrained", metavar="FILE", help="the backbone's weights, if the file has moved")
    return parser


def _how_to_load(config: ModelConfig, output: Path, rest: Path | None = None) -> list[str]:
    """Lines of Python that load the files."""
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
    """Writes the merged weights of a checkpoint to `output`, and the modules that cannot be merged to `rest`.

    Returns the largest relative difference between the features of the written files and of the checkpoint. No file is
    written if this difference is above TOLERANCE, or after any other error. Raises MergeError, BackboneError,
    CheckpointError or OSError.
    """
    path, config = checkpoint.path, checkpoint.config
    model = build_model(checkpoint, backend="torch")
    remaining, method = unmergeable(model), config.model.method
    if rest is None:
        try:
            state = merge(model)
        except MergeError as error:
            raise MergeError(f"{path}: {error}; --rest FILE writes these modules to a second checkpoint") from None
    elif not remaining:
        raise MergeError(f"{path}: all modules merge into {output}; none remains for {rest}")
    else:
        kept, kinds = ({place.kind for place in places} for places in (remaining, model.trained_modules()))
        method = method.without([kind for kind in KINDS if kind in kinds - kept])
        state = merged_state(model)

    if problem := not_finite(state):
        raise MergeError(f"{path}: after merging, {problem}; no file was written")
    content = weights_as_bytes(state, model.preprocess, bool(uses_quick_gelu(model.clip)))
    with staged([output] if rest is None else [output, rest]) as (staged_output, *staged_rest):
        write_atomically(staged_output, content)
        if staged_rest:
            backbone = replace(config.model, method=method, pretrained=str(output))
            others = replace(config, model=backbone)
            save_checkpoint(staged_rest[0], parameters_of(remaining), others, checkpoint.results, fingerprint(state))
            written = load_model(staged_rest[0], pretrained=str(staged_output), backend="torch")
        else:
            written: Any = random_clip(config.model.model, config.model.image_size).eval()
            open_clip.load_checkpoint(written, str(staged_output), strict=True)
        found = largest_difference(model, written)
        if not found <= TOLERANCE:  # also true for NaN
            raise MergeError(
                f"{path}: the merged features have a relative difference of {found:.1e} from the checkpoint's; "
                f"expected at most {TOLERANCE:.0e}; no file was written"
            )
    return found


@torch.no_grad()
def largest_difference(model: AdaptedCLIP, other: Any) -> float:
    """The largest_distance of two models' features of random input. `other` has open_clip's methods."""
    images, tokens = random_inputs(model)
    ours = model.encode_image(images), model.encode_text(tokens)
    return largest_distance(ours, (other.encode_image(images), other.encode_text(tokens)))


def random_inputs(model: AdaptedCLIP, samples: int = 4) -> tuple[Tensor, Tensor]:
    """Images (samples, 3, H, W) float32, and the token ids (samples, L) int64 of captions of several lengths."""
    generator = torch.Generator().manual_seed(0)
    length = model.context_length
    images = torch.randn(samples, 3, *model.config.image_size, generator=generator)
    start, end = CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1
    tokens = torch.randint(1, start, (samples, length), generator=generator)
    tokens[:, 0] = start
    for i in range(samples):  # caption lengths from a quarter to all of the context
        last = (length - 1) * (i + 1) // samples
        tokens[i, last], tokens[i, last + 1 :] = end, 0
    return images, tokens


def largest_distance(features: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest distance of two models' features (samples, E) of each tower, relative to the former's norm."""
    pairs = zip(features, others, strict=True)
    return torch.stack([(ours - theirs).norm(dim=1) / ours.norm(dim=1) for ours, theirs in pairs]).max().item()


if __name__ == "__main__":
    sys.exit(main())
