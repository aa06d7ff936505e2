"""One transformer block of either tower: open_clip's frozen layers around the trained modules."""

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from kernels import prefix_attention
from upperson.model.petl import LAdapter, LoRA, SalablePrefix


class Block(nn.Module):
    """Takes the place of an open_clip ResidualAttentionBlock, whose layers it keeps.

        y = LN₁(x) + adapter_attn(x)
        x = x + out_proj(prefix_attention(in_proj(y)))          LoRA on in_proj's keys and values
        x = x + MLP(LN₂(x) + adapter_mlp(x))

    Any trained module may be None. With `adapted` False the block computes what open_clip's own does.
    """

    def __init__(self, frozen: ResidualAttentionBlock, causal: bool, scale_target: str, backend: str | None,
                 prefix: SalablePrefix | None, lora: LoRA | None,
                 adapter_attn: LAdapter | None, adapter_mlp: LAdapter | None):
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = frozen.ln_1, frozen.attn, frozen.ls_1
        self.ln_2, self.mlp, self.ls_2 = frozen.ln_2, frozen.mlp, frozen.ls_2
        self.causal = causal
        self.scale_target = scale_target
        self.backend = backend
        self.prefix = prefix
        self.lora = lora
        self.adapter_attn = adapter_attn
        self.adapter_mlp = adapter_mlp
        self.adapted = True

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of the trained modules, by name within the block."""
        modules = dict(prefix=self.prefix, lora=self.lora, adapter_attn=self.adapter_attn,
                       adapter_mlp=self.adapter_mlp)
        return {f"{name}.{parameter_name}": parameter for name, module in modules.items() if module is not None
                for parameter_name, parameter in module.named_parameters()}

    def get_weight_dtype(self) -> torch.dtype:
        """open_clip asks its first block for the dtype of the token embeddings."""
        return self.mlp.c_fc.weight.dtype

    def forward(self, x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None) -> Tensor:
        """x and the result: (B, N, C). The other arguments are open_clip's; causality is a property of the block."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = self.normalise(self.ln_1, self.adapter_attn, x)
        attended = self.ls_1(self.attend(y))
        y, x = self.normalise(self.ln_2, self.adapter_mlp, attended, residual=x)
        return x + self.ls_2(self.mlp(y))

    def normalise(self, norm: nn.LayerNorm, adapter: LAdapter | None, x: Tensor,
                  residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """LayerNorm and the adapter beside it, of x or of x + residual; the latter returns the sum as well."""
        if adapter is not None and self.adapted:
            return adapter(norm, x, residual, self.backend)
        if residual is None:
            return norm(x)
        x = x + residual
        return norm(x), x

    def attend(self, y: Tensor) -> Tensor:
        heads = self.attn.num_heads
        weight = self.attn.in_proj_weight
        if self.lora is not None and self.adapted:
            weight = self.lora(weight)
        qkv = F.linear(y, weight, self.attn.in_proj_bias).unflatten(-1, (3, heads, -1))
        if self.prefix is not None and self.adapted:
            key, value, scale = self.prefix(heads)
        else:
            key = value = qkv.new_empty(0, heads, qkv.shape[-1])
            scale = qkv.new_ones(())
        out = prefix_attention(qkv, key, value, scale, causal=self.causal, scale_target=self.scale_target,
                               backend=self.backend)
        return self.attn.out_proj(out.flatten(-2))
