"""The model: a frozen open_clip CLIP whose blocks carry UP-Person's trained modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from kernels.attention.reference import unpack
from upperson.config import ModelConfig
from upperson.model.backbone import BackboneError, build_clip, fit_image_size, pooling, require_transformers, text_tower
from upperson.model.block import MODULES, Block, Sequences, Stream, parameters_of, rows_of
from upperson.model.captions import PackedCaptions, pack_captions
from upperson.model.petl import ADAPTERS, LOW_RANK, PREFIXES

GRAPHS = 64  # of a block, each for a kind of input; some 20 are met in a training with its evaluations


class UPPerson(nn.Module):
    """CLIP adapted to text-based person retrieval by S-Prefix, LoRA and L-Adapter (arXiv 2504.10084), or by a variant.

    Args:
        config: what to build; see ModelConfig.
        clip: an open_clip model to adapt and freeze in place, instead of the one that `config` names.

    Only the parameters of the trained modules require gradients; with method "full" those of CLIP, with "zero-shot"
    none. There is no dropout: train() and eval() agree.

    Raises BackboneError for a backbone that cannot be built, loaded or adapted.
    """

    def __init__(self, config: ModelConfig, clip: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.clip = build_clip(config) if clip is None else clip
        require_transformers(config.model, self.clip)
        self.clip.eval().requires_grad_(False)
        fit_image_size(self.clip.visual, config.image_size)
        self.clip.visual.patch_dropout = nn.Identity()
        text = text_tower(self.clip)
        self.text_causal = text.attn_mask is not None
        backend = None if config.backend == "auto" else config.backend
        options = dict(backend=backend, low_rank_gradients=config.low_rank_gradients)
        self.image_blocks = replace_blocks(self.clip.visual.transformer, causal=False, **options)
        self.text_blocks = replace_blocks(text.transformer, causal=self.text_causal, **options)
        if config.method == "up-person":
            self.set_modules(config, self.new_modules(config))
        elif config.method == "full":
            for parameter in self.clip_parameters().values():
                parameter.requires_grad_()
        self.context_length = text.context_length
        self.embedding_width = self.clip.visual.output_dim                                  # E
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
        preprocessing = open_clip.get_model_preprocess_cfg(self.clip)
        self.image_mean = tuple(preprocessing.get("mean", open_clip.OPENAI_DATASET_MEAN))
        self.image_std = tuple(preprocessing.get("std", open_clip.OPENAI_DATASET_STD))

    # -------------------------------------------------------------------------------- images

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, E), not normalised, of images (B, 3, H, W), normalised by image_mean and image_std."""
        visual = self.clip.visual
        if self.config.skip_unread and visual.attn_pool is None and visual.pool_type == "tok":
            class_token = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            pooled = visual.ln_post(self.image_stream(images, class_token))
        else:
            pooled, _ = visual._pool(self.image_stream(images))
        return pooled if visual.proj is None else pooled @ visual.proj

    def encode_image_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """encode_image's result, and all tokens of the image normalised and projected alike, (B, N, E)."""
        visual = self.clip.visual
        x = self.image_stream(images)
        return visual._pool(x)[0] @ visual.proj, visual.ln_post(x) @ visual.proj

    def image_stream(self, images: Tensor, read: Tensor | None = None) -> Tensor:
        """What the image tower's last block leaves: of all tokens (B, N, C), or of those at `read` (B,), (B, C)."""
        return run(self.image_blocks, self.clip.visual._embeds(images), None, read)

    # -------------------------------------------------------------------------------- captions

    def encode_text(self, captions: Tensor | PackedCaptions) -> Tensor:
        """Embeddings (B, E), not normalised, of token ids (B, context_length), int64, or of packed captions.

        Token ids go through `pack_captions` first.
        """
        captions = self.pack_captions(captions)
        if isinstance(captions, PackedCaptions):
            read = captions.cu_seqlens[1:].long() - 1
        else:
            read = self.pooled_positions(captions)
        if self.config.skip_unread:
            return self.project_text(self.text_stream(captions, read))
        return self.project_text(rows_of(self.text_stream(captions), read))

    def encode_text_tokens(self, captions: Tensor | PackedCaptions) -> tuple[Tensor, Tensor]:
        """encode_text's result, and all tokens projected alike, (B, L, E), L at least the longest caption's."""
        captions = self.pack_captions(captions)
        x = self.text_stream(captions)
        if isinstance(captions, PackedCaptions):
            x, *_ = unpack(x, captions.cu_seqlens, captions.longest)
            read = captions.cu_seqlens.diff().long() - 1
        else:
            read = self.pooled_positions(captions)
        x = self.project_text(x)
        return rows_of(x, read), x

    def pack_captions(self, captions: Tensor | PackedCaptions) -> Tensor | PackedCaptions:
        """Token ids (B, L) as encode_text takes them: without padding, unless the tower sees it or the option is off.

        Done on the CPU, before they are copied to a GPU, this spares waiting for them there. Under torch.compile they
        stay as they are, since a graph cannot depend on them, and the padding is computed too, which changes nothing.
        """
        packable = self.text_causal and pooling(self.clip)[0] == "argmax" and self.config.pack_captions
        if not packable or isinstance(captions, PackedCaptions) or torch.compiler.is_compiling():
            return captions
        return pack_captions(captions)

    def text_stream(self, captions: Tensor | PackedCaptions, read: Tensor | None = None) -> Tensor:
        """What the text tower's last block leaves: of all tokens, (B, L, C) or packed (T, C), or of those at `read`."""
        text, sequences = text_tower(self.clip), None
        if isinstance(captions, PackedCaptions):
            x = text.token_embedding(captions.token_ids) + text.positional_embedding[captions.positions]
            sequences = Sequences(captions.cu_seqlens, captions.longest)
        else:
            x = text.token_embedding(captions) + text.positional_embedding[: captions.shape[1]]
        return run(self.text_blocks, x, sequences, read)

    def pooled_positions(self, tokens: Tensor) -> Tensor:
        """The position (B,) of the token that stands for each caption of (B, L)."""
        pool_type, end_id = pooling(self.clip)
        if pool_type == "argmax":                                           # the end token has the largest id
            return tokens.argmax(1)
        if pool_type == "eos":
            return (tokens == end_id).int().argmax(1)
        return torch.full_like(tokens[:, 0], {"first": 0, "last": tokens.shape[1] - 1}[pool_type])

    def project_text(self, x: Tensor) -> Tensor:
        """The final LayerNorm and the projection of any tokens (…, C), (…, E)."""
        text = text_tower(self.clip)
        x, projection = text.ln_final(x), text.text_projection
        return projection(x) if isinstance(projection, nn.Module) else x @ projection

    # -------------------------------------------------------------------------------- what is trained

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: {image,text}.blocks.{i}.{prefix,lora,adapter_attn,adapter_mlp}.…

        With method "full" those of CLIP, by open_clip's names.
        """
        return self.clip_parameters() if self.config.method == "full" else parameters_of(self.trained_modules())

    def trained_modules(self) -> dict[str, nn.Module]:
        """The trained modules by name: {image,text}.blocks.{i}.{prefix,lora,adapter_attn,adapter_mlp}."""
        return {f"{block_name}.{name}": module for block_name, block in self.blocks().items()
                for name, module in block.trained_modules().items()}

    def new_modules(self, config: ModelConfig) -> dict[str, nn.Module]:
        """New modules of the kinds that `config` names, by the same names. The model stays as it is."""
        return new_modules("image", self.image_blocks, config) | new_modules("text", self.text_blocks, config)

    def set_modules(self, config: ModelConfig, modules: dict[str, nn.Module]) -> None:
        """Makes these modules, which `config` describes, the trained ones. The backbone must be that of `config`."""
        self.config = config
        for block_name, block in self.blocks().items():
            block.set_modules(**{name: modules.get(f"{block_name}.{name}") for name in MODULES})

    def blocks(self) -> dict[str, Block]:
        """By name: {image,text}.blocks.{i}."""
        return {f"{tower}.blocks.{i}": block
                for tower, blocks in (("image", self.image_blocks), ("text", self.text_blocks))
                for i, block in enumerate(blocks)}

    def clip_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of CLIP that its features depend on: all but the temperature of its own loss."""
        return {name: parameter for name, parameter in self.clip.named_parameters()
                if name not in ("logit_scale", "logit_bias")}

    def compile_blocks(self, **options: Any) -> None:
        """Puts every block through torch.compile, from its next call on; `options` are those of torch.compile.

        Blocks of a kind share a graph: the first, the last and those between, of each tower, with gradients and
        without, for a first and for any later batch size. PyTorch allows one function fewer kinds by default.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        for block in self.blocks().values():
            block.compile(**options)

    @contextmanager
    def zero_shot(self) -> Iterator[None]:
        """Within it the model computes the backbone alone (with method "full" as far as that has been trained)."""
        for block in self.blocks().values():
            block.adapted = False
        try:
            yield
        finally:
            for block in self.blocks().values():
                block.adapted = True


def replace_blocks(transformer: nn.Module, **options: Any) -> list[Block]:
    """Replaces the blocks of an open_clip Transformer, and returns the new ones; `options` are those of Block."""
    for i, frozen in enumerate(transformer.resblocks):
        transformer.resblocks[i] = Block(frozen, **options)
    return list(transformer.resblocks)


def run(blocks: list[Block], x: Tensor, sequences: Sequences | None, read: Tensor | None) -> Tensor:
    """The tokens behind the last of `blocks`; see Block.forward."""
    stream = Stream(x)
    for block in blocks[:-1]:
        stream = block(stream, sequences)
    return blocks[-1](stream, sequences, read).total()


def new_modules(tower: str, blocks: list[Block], config: ModelConfig) -> dict[str, nn.Module]:
    """New trained modules of the kinds that `config` names, for the blocks of a tower.

    LoRA and prefix act in blocks i < depth, adapters in blocks i ≥ depth. Raises BackboneError for a depth or a
    reduction that the tower does not have room for.
    """
    for field, most in (("depth_prefix", len(blocks)), ("depth_lora", len(blocks)), ("depth_adapter", len(blocks)),
                        ("adapter_reduction", blocks[0].attn.embed_dim)):
        if (getattr(config, field) or 0) > most:
            what = "the width" if field == "adapter_reduction" else "the number of blocks"
            raise BackboneError(f"{field}: {getattr(config, field)} is more than {what} of the {tower} tower, {most}")
    depth_prefix = len(blocks) if config.depth_prefix is None else config.depth_prefix
    depth_lora = len(blocks) if config.depth_lora is None else config.depth_lora
    modules: dict[str, nn.Module] = {}
    for i, block in enumerate(blocks):
        name, width = f"{tower}.blocks.{i}", block.attn.embed_dim
        if config.prefix != "none" and i < depth_prefix:
            modules[f"{name}.prefix"] = PREFIXES[config.prefix](config.prefix_length, width, config.prefix_scale,
                                                                config.scale_target)
        if config.lora != "none" and i < depth_lora:
            modules[f"{name}.lora"] = LOW_RANK[config.lora](config.lora_rank, block.attn.in_proj_weight)
        for place, kind, norm in (("adapter_attn", config.adapter_attn, block.ln_1),
                                  ("adapter_mlp", config.adapter_mlp, block.ln_2)):
            if kind != "none" and i >= config.depth_adapter:
                modules[f"{name}.{place}"] = ADAPTERS[kind](norm, width // config.adapter_reduction)
    return modules
