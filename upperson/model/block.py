"""A transformer block of either tower: open_clip's frozen layers with the trained modules."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from upperson_kernels import prefix_attention, quick_gelu, unpack_sequences

from upperson.model.attention import attend_once
from upperson.petl import FROZEN, Adapter, LoRA, Merged, Prefix, Prompt, merged_linear

KINDS = ("prefix", "lora", "adapter_attn", "adapter_mlp", "prompt")


class Stream(NamedTuple):
    """The residual stream between two blocks, as x + update. The next LayerNorm computes the sum."""

    x: Tensor  # (B, N, C), or (T, C) packed
    update: Tensor | None = None  # the same shape; None: zero

    def total(self) -> Tensor:
        return self.x if self.update is None else self.x + self.update


class Sequences(NamedTuple):
    """The offsets of the sequences in a packed (T, C); see upperson_kernels.prefix_attention."""

    cu_seqlens: Tensor
    longest: int


class Prepared(NamedTuple):
    """What a block otherwise computes itself from its trained modules; see prepared.py."""

    projection: Merged | None = None  # the packed projection with LoRA
    prefix: tuple[Tensor, Tensor] | None = None  # key and value columns, (P, heads, head width)
    adapter_attn: tuple[Tensor, Tensor] | None = None  # weights of the down and the up projection
    adapter_mlp: tuple[Tensor, Tensor] | None = None


NOTHING = Prepared()


class Block(nn.Module):
    """Replaces an open_clip ResidualAttentionBlock in AdaptedCLIP, and keeps its layers.

        y = LN₁(x) + adapter_attn(x)
        x = x + out_proj(prefix_attention(in_proj(y)))          low-rank updates on in_proj's keys and values
        x = x + MLP(LN₂(x) + adapter_mlp(x))

    These are the equations with L-Adapters; petl/adapters.py has those of the other adapters. Prompts are tokens, which
    the tower inserts before the block (prompts.py). The trained modules are None until `set_modules` is called. If
    `adapted` is False, the block computes the same as open_clip's own block.

    `attention` is the operator upperson_kernels.prefix_attention. `activation` is upperson_kernels.quick_gelu if the
    model has QuickGELU; otherwise `activation` is None, and open_clip's activation runs.
    """

    def __init__(self, frozen: ResidualAttentionBlock, causal: bool, backend: str | None, low_rank_gradients: bool):
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = frozen.ln_1, frozen.attn, frozen.ls_1
        self.ln_2, self.mlp, self.ls_2 = frozen.ln_2, frozen.mlp, frozen.ls_2
        self.causal = causal
        self.backend = backend
        self.low_rank_gradients = low_rank_gradients
        self.adapted = True
        self.attention = prefix_attention
        self.activation = quick_gelu if isinstance(frozen.mlp.gelu, QuickGELU) else None
        self.set_modules()

    def set_modules(
        self,
        prefix: Prefix | None = None,
        lora: LoRA | None = None,
        adapter_attn: Adapter | None = None,
        adapter_mlp: Adapter | None = None,
        prompt: Prompt | None = None,
    ) -> None:
        """Replaces the trained modules."""
        self.prefix, self.lora, self.adapter_attn, self.adapter_mlp = prefix, lora, adapter_attn, adapter_mlp
        self.prompt = prompt

    def trained_modules(self) -> dict[str, nn.Module]:
        """The trained modules by kind."""
        return {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) is not None}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of the trained modules, by name within the block."""
        return {
            f"{kind}.{name}": parameter
            for kind, module in self.trained_modules().items()
            for name, parameter in module.named_parameters()
        }

    def forward(
        self,
        stream: Stream,
        sequences: Sequences | None = None,
        read: Tensor | None = None,
        shared: Tensor | None = None,
        prepared: Prepared = NOTHING,
    ) -> Stream:
        """The stream after the block.

        Args:
            stream: the stream before the block, (B, N, C), or packed (T, C).
            sequences: the offsets of packed sequences.
            read: (B,) int64, the only token of each sequence that is used later: a position, or for packed sequences
                the row of the last token. Only these tokens are computed, and the returned stream is (B, C).
            shared: (m, C), further tokens of the stream before the block, which all tokens of all sequences attend to.
            prepared: what was computed for this block together with others.
        """
        x, update, shared = in_autocast_dtype(*stream, shared)
        at_attention, at_mlp = self.active(self.adapter_attn), self.active(self.adapter_mlp)
        y, x = at_attention.normalise(self.ln_1, x, update, self.backend, prepared.adapter_attn)
        if read is None:
            attended = self.attend(y, sequences, shared, prepared)
        else:
            tokens, x, y = y, rows_of(x, read), rows_of(y, read)
            attended = self.attend_from(y, tokens, sequences, read, shared, prepared)
        attended = at_attention.finish(y, self.ls_1(self.attn.out_proj(attended)))
        y, x = at_mlp.normalise(self.ln_2, attended, x, self.backend, prepared.adapter_mlp)
        return Stream(x, at_mlp.finish(y, self.ls_2(self.feed_forward(y))))

    def active(self, adapter: Adapter | None) -> Adapter:
        return FROZEN if adapter is None or not self.adapted else adapter

    def attend(self, y: Tensor, sequences: Sequences | None, shared: Tensor | None, prepared: Prepared) -> Tensor:
        """The concatenated outputs of the heads for the normalised input y; both (B, N, C), or packed (T, C)."""
        heads = self.attn.num_heads
        qkv = self.project(y, prepared).unflatten(-1, (3, heads, -1))
        key, value, scale, target = self.prefix_columns(qkv, shared, prepared)
        cu_seqlens, longest = (None, None) if sequences is None else sequences
        return self.attention(
            qkv,
            key,
            value,
            scale,
            causal=self.causal,
            scale_target=target,
            cu_seqlens=cu_seqlens,
            max_seqlen=longest,
            backend=self.backend,
        ).flatten(-2)

    def attend_from(
        self,
        y: Tensor,
        tokens: Tensor,
        sequences: Sequences | None,
        read: Tensor,
        shared: Tensor | None,
        prepared: Prepared,
    ) -> Tensor:
        """The same for the tokens y (B, C) at `read` only, which attend to all `tokens`, (B, N, C) or packed (T, C)."""
        heads, width = self.attn.num_heads, self.attn.embed_dim
        query = F.linear(y, self.attn.in_proj_weight[:width], self.attn.in_proj_bias[:width])
        key_value = self.project(tokens, prepared, width).unflatten(-1, (2, heads, -1))
        visible = None
        if sequences is not None:  # the last tokens, which attend to all others
            key_value, *_ = unpack_sequences(key_value, *sequences)
            visible = torch.arange(sequences.longest, device=y.device) < sequences.cu_seqlens.diff()[:, None]
        elif self.causal:
            visible = torch.arange(tokens.shape[1], device=y.device) <= read[:, None]
        prefix_key, prefix_value, scale, target = self.prefix_columns(key_value, shared, prepared)
        query = query.unflatten(-1, (heads, -1))
        key, value = key_value.unbind(2)
        return attend_once(
            query, key, value, prefix_key, prefix_value, scale, scale_target=target, visible=visible
        ).flatten(-2)

    def project(self, y: Tensor, prepared: Prepared, first: int = 0) -> Tensor:
        """Queries, keys and values; only the outputs from row `first` of the packed weight on."""
        weight, bias = self.attn.in_proj_weight[first:], self.attn.in_proj_bias[first:]
        if prepared.projection is not None:
            return merged_linear(y, bias, prepared.projection.rows_from(first))
        if self.lora is None or not self.adapted:
            return F.linear(y, weight, bias)
        return self.lora.linear(y, weight, bias, self.low_rank_gradients)

    def prefix_columns(
        self, like: Tensor, shared: Tensor | None, prepared: Prepared
    ) -> tuple[Tensor, Tensor, Tensor, str]:
        """Keys and values of the prefix, (P, heads, head width), λ, and the target of λ. `like`: (…, heads, D)."""
        if shared is not None:
            adapter = self.active(self.adapter_attn)
            y, _ = adapter.normalise(self.ln_1, shared, None, self.backend, prepared.adapter_attn)
            key_value = self.project(y, prepared, self.attn.embed_dim).unflatten(-1, (2, *like.shape[-2:]))
            key, value = key_value.unbind(1)
            return key, value, like.new_ones(()), "weights"
        if self.prefix is not None and self.adapted:
            if prepared.prefix is not None:
                return *prepared.prefix, self.prefix.scale_factor(), self.prefix.target
            key, value, scale = self.prefix(self.attn.num_heads)
            return key, value, scale, self.prefix.target
        key = value = like.new_empty(0, *like.shape[-2:])
        return key, value, like.new_ones(()), "weights"

    def feed_forward(self, y: Tensor) -> Tensor:
        """The MLP."""
        if self.activation is None:
            return self.mlp(y)
        first: Any = self.mlp.c_fc
        second: Any = self.mlp.c_proj
        if type(first) is not nn.Linear:  # quantised, or replaced by another library
            return second(self.activation(first(y), backend=self.backend))
        return second(self.activation(F.linear(y, first.weight), first.bias, backend=self.backend))


def rows_of(x: Tensor, read: Tensor) -> Tensor:
    """The token at `read` of each sequence, (B, C), from (B, N, C) or packed (T, C)."""
    return x[read] if x.dim() == 2 else x[torch.arange(x.shape[0], device=x.device), read]


def in_autocast_dtype(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The residual stream in the dtype of autocast, where that is on: LayerNorms then read and write 16 bits."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), *(other if other is None else other.to(dtype) for other in others)
