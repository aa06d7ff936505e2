"""The model: a frozen open_clip CLIP whose blocks carry UP-Person's trained modules."""

from collections.abc import Iterator
from contextlib import contextmanager

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from upperson.config import ModelConfig
from upperson.model.backbone import build_clip, fit_image_size, pooling, require_transformers, text_tower
from upperson.model.block import Block
from upperson.model.petl import LAdapter, LoRA, SalablePrefix


class UPPerson(nn.Module):
    """CLIP adapted to text-based person retrieval by S-Prefix, LoRA and L-Adapter (arXiv 2504.10084).

    Args:
        config: what to build; see ModelConfig.
        clip: an open_clip model to adapt and freeze in place, instead of the one that `config` names.

    Only the parameters of the trained modules require gradients. There is no dropout: train() and eval() agree.
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
        self.image_blocks = adapt(self.clip.visual.transformer, config, causal=False)
        self.text_blocks = adapt(text.transformer, config, causal=self.text_causal)
        self.context_length = text.context_length
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
        preprocessing = open_clip.get_model_preprocess_cfg(self.clip)
        self.image_mean = tuple(preprocessing.get("mean", open_clip.OPENAI_DATASET_MEAN))
        self.image_std = tuple(preprocessing.get("std", open_clip.OPENAI_DATASET_STD))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, E), not normalised, of images (B, 3, H, W), normalised by image_mean and image_std."""
        return self.clip.encode_image(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, E), not normalised, of token ids (B, context_length), int64.

        What open_clip's encode_text computes, without the padding behind the longest caption of the batch: no
        token before it sees it. Under torch.compile the padding stays, as a graph cannot depend on the tokens.
        """
        text = text_tower(self.clip)
        pool_type, end_id = pooling(self.clip)
        length = tokens.shape[1]
        if self.text_causal and pool_type == "argmax" and not torch.compiler.is_compiling():
            # The end token has the largest id.
            length = int(tokens.argmax(1).max()) + 1
        x = text.token_embedding(tokens[:, :length]) + text.positional_embedding[:length]
        for block in self.text_blocks:
            x = block(x)
        x = text_global_pool(text.ln_final(x), tokens[:, :length], pool_type, end_id)
        projection = text.text_projection
        return projection(x) if isinstance(projection, nn.Module) else x @ projection

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: {image,text}.blocks.{i}.{prefix,lora,adapter_attn,adapter_mlp}.…"""
        return {f"{tower}.blocks.{i}.{name}": parameter
                for tower, blocks in (("image", self.image_blocks), ("text", self.text_blocks))
                for i, block in enumerate(blocks)
                for name, parameter in block.trained().items()}

    @contextmanager
    def zero_shot(self) -> Iterator[None]:
        """Within it the model computes the frozen backbone alone."""
        blocks = [*self.image_blocks, *self.text_blocks]
        for block in blocks:
            block.adapted = False
        try:
            yield
        finally:
            for block in blocks:
                block.adapted = True


def adapt(transformer: nn.Module, config: ModelConfig, causal: bool) -> list[Block]:
    """Replaces the blocks of an open_clip Transformer, and returns the new ones.

    LoRA and prefix act in blocks i < depth, adapters in blocks i ≥ depth.
    """
    layers, width = len(transformer.resblocks), transformer.width
    depth_prefix = layers if config.depth_prefix is None else config.depth_prefix
    depth_lora = layers if config.depth_lora is None else config.depth_lora
    hidden = width // config.adapter_reduction
    for i, frozen in enumerate(transformer.resblocks):
        has_adapter = i >= config.depth_adapter
        transformer.resblocks[i] = Block(
            frozen, causal, config.scale_target, None if config.backend == "auto" else config.backend,
            prefix=SalablePrefix(config.prefix_length, width, config.prefix_scale) if i < depth_prefix else None,
            lora=LoRA(config.lora_rank, width) if i < depth_lora else None,
            adapter_attn=LAdapter(width, hidden) if has_adapter else None,
            adapter_mlp=LAdapter(width, hidden) if has_adapter else None,
        )
    return list(transformer.resblocks)
