"""One transformer block of either tower: open_clip's frozen layers around the trained modules."""

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from kernels import prefix_attention
from upperson.model.petl import FROZEN, Adapter, LoRA, Prefix

MODULES = ("prefix", "lora", "adapter_attn", "adapter_mlp")


class Block(nn.Module):
    """Takes the place of an open_clip ResidualAttentionBlock, whose layers it keeps.

        y = LN₁(x) + adapter_attn(x)
        x = x + out_proj(prefix_attention(in_proj(y)))          low-rank updates on in_proj's keys and values
        x = x + MLP(LN₂(x) + adapter_mlp(x))

    with L-Adapters; the others stand elsewhere, see petl/adapters.py. The trained modules are None until `set_modules`
    puts them in. With `adapted` False the block computes what open_clip's own does.
    """

    def __init__(self, frozen: ResidualAttentionBlock, causal: bool, backend: str | None):
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = frozen.ln_1, frozen.attn, frozen.ls_1
        self.ln_2, self.mlp, self.ls_2 = frozen.ln_2, frozen.mlp, frozen.ls_2
        self.causal = causal
        self.backend = backend
        self.adapted = True
        self.set_modules()

    def set_modules(self, prefix: Prefix | None = None, lora: LoRA | None = None, adapter_attn: Adapter | None = None,
                    adapter_mlp: Adapter | None = None) -> None:
        """Replaces the trained modules."""
        self.prefix, self.lora, self.adapter_attn, self.adapter_mlp = prefix, lora, adapter_attn, adapter_mlp

    def trained_modules(self) -> dict[str, nn.Module]:
        """The trained modules by name."""
        return {name: getattr(self, name) for name in MODULES if getattr(self, name) is not None}

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of the trained modules, by name within the block."""
        return parameters_of(self.trained_modules())

    def get_weight_dtype(self) -> torch.dtype:
        """open_clip asks its first block for the dtype of the token embeddings."""
        return self.mlp.c_fc.weight.dtype

    def forward(self, x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None) -> Tensor:
        """x and the result: (B, N, C). The other arguments are open_clip's; causality is a property of the block."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        at_attention, at_mlp = self.active(self.adapter_attn), self.active(self.adapter_mlp)
        y, x = at_attention.normalise(self.ln_1, x, None, self.backend)
        attended = at_attention.finish(y, self.ls_1(self.attend(y)))
        y, x = at_mlp.normalise(self.ln_2, attended, x, self.backend)
        return x + at_mlp.finish(y, self.ls_2(self.mlp(y)))

    def active(self, adapter: Adapter | None) -> Adapter:
        return FROZEN if adapter is None or not self.adapted else adapter

    def attend(self, y: Tensor) -> Tensor:
        """The attention's output for its normalised input, both (B, N, C)."""
        heads = self.attn.num_heads
        weight, target = self.attn.in_proj_weight, "weights"
        if self.lora is not None and self.adapted:
            weight = self.lora(weight)
        qkv = F.linear(y, weight, self.attn.in_proj_bias).unflatten(-1, (3, heads, -1))
        if self.prefix is not None and self.adapted:
            key, value, scale = self.prefix(heads)
            target = self.prefix.target
        else:
            key = value = qkv.new_empty(0, heads, qkv.shape[-1])
            scale = qkv.new_ones(())
        out = prefix_attention(qkv, key, value, scale, causal=self.causal, scale_target=target, backend=self.backend)
        return self.attn.out_proj(out.flatten(-2))


def parameters_of(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of several modules, each under the name of its module and its own."""
    return {f"{name}.{parameter_name}": parameter for name, module in modules.items()
            for parameter_name, parameter in module.named_parameters()}
