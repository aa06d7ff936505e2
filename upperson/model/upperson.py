"""The model: a frozen open_clip CLIP whose blocks carry UP-Person's trained modules."""

from collections.abc import Iterator
from contextlib import contextmanager

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from upperson.config import ModelConfig
from upperson.model.backbone import BackboneError, build_clip, fit_image_size, pooling, require_transformers, text_tower
from upperson.model.block import MODULES, Block, parameters_of
from upperson.model.petl import ADAPTERS, LOW_RANK, PREFIXES


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
        self.image_blocks = replace_blocks(self.clip.visual.transformer, causal=False, backend=backend)
        self.text_blocks = replace_blocks(text.transformer, causal=self.text_causal, backend=backend)
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

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, E), not normalised, of images (B, 3, H, W), normalised by image_mean and image_std."""
        return self.clip.encode_image(images)

    def encode_image_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """encode_image's result, and all tokens of the image normalised and projected alike, (B, N, E)."""
        visual = self.clip.visual
        found = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC",
                                             output_extra_tokens=True)
        tokens = torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)
        return found["image_features"], tokens @ visual.proj

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, E), not normalised, of token ids (B, context_length), int64.

        What open_clip's encode_text computes, without the padding behind the longest caption of the batch: no
        token before it sees it. Under torch.compile the padding stays, as a graph cannot depend on the tokens.
        """
        x = self.text_states(tokens)
        return self.project_text(self.pool_text(x, tokens))

    def encode_text_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """encode_text's result, and all tokens up to the longest caption's end projected alike, (B, L, E)."""
        x = self.text_states(tokens)
        return self.project_text(self.pool_text(x, tokens)), self.project_text(x)

    def text_states(self, tokens: Tensor) -> Tensor:
        """The normalised output of the text transformer, (B, L, C), of the first L tokens."""
        text = text_tower(self.clip)
        length = tokens.shape[1]
        if self.text_causal and pooling(self.clip)[0] == "argmax" and not torch.compiler.is_compiling():
            # The end token has the largest id.
            length = int(tokens.argmax(1).max()) + 1
        x = text.token_embedding(tokens[:, :length]) + text.positional_embedding[:length]
        for block in self.text_blocks:
            x = block(x)
        return text.ln_final(x)

    def pool_text(self, x: Tensor, tokens: Tensor) -> Tensor:
        pool_type, end_id = pooling(self.clip)
        return text_global_pool(x, tokens[:, : x.shape[1]], pool_type, end_id)

    def project_text(self, x: Tensor) -> Tensor:
        projection = text_tower(self.clip).text_projection
        return projection(x) if isinstance(projection, nn.Module) else x @ projection

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


def replace_blocks(transformer: nn.Module, causal: bool, backend: str | None) -> list[Block]:
    """Replaces the blocks of an open_clip Transformer, and returns the new ones."""
    for i, frozen in enumerate(transformer.resblocks):
        transformer.resblocks[i] = Block(frozen, causal, backend)
    return list(transformer.resblocks)


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
