"""A mixture of adapters beside the MLP: each token chooses a few of several bottlenecks (AAAI 2025).

F is the MLP, x the residual stream after the attention, and z = LN'(x), with a LayerNorm of the mixture's own:

    x + F(LN(x)) + s · M(z)
    g    = (1 − α) · input_gate z + α · task_gate task        E logits; the second term is the same for all tokens
    M(z) = Σ_e w_e · A_e(z)        over the k experts with the largest g_e; w: the softmax of these k logits
    A_e(z) = up_e · relu(down_e · z)        each with biases

Every token gets all of its k experts, and its route depends on nothing but itself. Tokens are sorted by expert, so that
the rows of an expert are consecutive. All experts are then one grouped product, as long as all chosen rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upperson_kernels.backend import in_transform, once_differentiable

from upperson.petl.adapters import Adapter
from upperson.petl.initial import normal, scalar, uniform_fan_in

ALIGNMENT = 16  # bytes; that of the rows of PyTorch's grouped product


class Mixture(Adapter):
    """The mixture around one MLP. The experts' parameters are stacked: down_weight is (E, h, C), up_weight (E, C, h).

    An expert that no token chose therefore gets a gradient of zeros, and weight decay still applies to it.

    Args:
        norm: the frozen LayerNorm of the MLP.
        experts: E.
        chosen: k, at most E.
        hidden: h, the width of each bottleneck.
        scale: the constant s.
    """

    def __init__(self, norm: nn.LayerNorm, experts: int, chosen: int, hidden: int, scale: float):
        super().__init__()
        width = norm.normalized_shape[0]
        self.chosen, self.scale = chosen, scale
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.task = nn.Parameter(torch.randn(width))
        self.input_gate, self.task_gate = normal(experts, width), normal(experts, width)
        self.alpha = scalar(0.5)
        self.down_weight = nn.Parameter(torch.stack([uniform_fan_in(hidden, width).data for _ in range(experts)]))
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.up_weight = nn.Parameter(torch.zeros(experts, width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(experts, width))
        self.counts_tokens = False
        self.tally: Tensor | None = None

    def normalise(
        self,
        norm: nn.LayerNorm,
        x: Tensor,
        residual: Tensor | None,
        backend: str | None,
        weights: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Also adds the mixture's output to the stream, before the sublayer's output is added."""
        if residual is not None:
            x = x + residual
        z = F.layer_norm(x, norm.normalized_shape, self.norm_weight, self.norm_bias, norm.eps).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            mixed = self.mix(z.flatten(0, -2), *(weights or (self.down_weight, self.up_weight)))
        return norm(x), x + mixed.view(x.shape)

    def mix(self, z: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """s · M of the tokens z, both (T, C), in the dtype of z. `down`, `up`: the weights in any dtype."""
        logits = self.logits(z)
        if torch.compiler.is_exporting():  # ONNX has no stable sort; its TopK has the lower index first as well
            largest, order = logits.topk(self.chosen, dim=1)
        else:  # a stable order of equal logits: the lower index first, on every device
            largest, order = logits.sort(dim=1, descending=True, stable=True)
        chosen, shares = order[:, : self.chosen], self.scale * largest[:, : self.chosen].softmax(1)
        if self.counts_tokens:
            self.count(logits, chosen)
        # (T, E), zero for experts that were not chosen
        shares_of_all = torch.zeros_like(logits).scatter(1, chosen, shares).to(z.dtype)
        down, up, down_bias, up_bias = (t.to(z.dtype) for t in (down, up, self.down_bias, self.up_bias))
        if every_expert(z, down):
            hidden = F.relu(torch.einsum("tc,ehc->teh", z, down) + down_bias) * shares_of_all.unsqueeze(2)
            return torch.einsum("teh,ech->tc", hidden, up) + shares_of_all @ up_bias
        routes, experts, order = Routes.of(chosen, len(down))
        numbers = torch.arange(len(down), device=z.device)
        bias = (experts.unsqueeze(1) == numbers).to(z.dtype) @ down_bias  # as a product, whose gradient sums in order
        own_shares = shares.flatten().gather(0, order).unsqueeze(1).to(z.dtype)
        hidden = F.relu(GatheredProduct.apply(z, down, *routes) + bias) * own_shares
        return SummedProduct.apply(hidden, up, *routes) + shares_of_all @ up_bias

    def logits(self, z: Tensor) -> Tensor:
        """g of the tokens z (T, C): (T, E), in float32 or wider, since rounding would decide between near logits."""
        dtype = torch.promote_types(z.dtype, torch.float32)
        alpha, task = self.alpha.to(dtype), self.task.to(dtype)
        input_gate, task_gate = self.input_gate.to(dtype), self.task_gate.to(dtype)
        return torch.addmm(alpha * (task_gate @ task), z.to(dtype), ((1 - alpha) * input_gate).t())

    def count(self, logits: Tensor, chosen: Tensor) -> None:
        """Adds to the tally, (2, E): the sums over tokens of the softmax of all logits, and of the choices."""
        probabilities = logits.softmax(1).sum(0)
        experts = torch.arange(logits.shape[1], device=chosen.device)
        choices = (chosen.unsqueeze(2) == experts).sum((0, 1)).to(probabilities.dtype)
        found = torch.stack([probabilities, choices])
        self.tally = found if self.tally is None else self.tally + found

    def tallied_routes(self) -> Tensor:
        """The tally of all passes in a context `tallied`. Raises RuntimeError if there was none."""
        if self.tally is None:
            raise RuntimeError("tally: expected a pass of the block in a context tallied(), found none")
        return self.tally


@contextmanager
def tallied(mixtures: Sequence[Mixture]) -> Iterator[None]:
    """A context in which the mixtures tally the routes of all their tokens, for a loss."""
    for mixture in mixtures:
        mixture.counts_tokens, mixture.tally = True, None
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.counts_tokens, mixture.tally = False, None  # a kept tally would keep the graph of its pass


# ------------------------------------------------------------------------------------ grouped products


class Routes(NamedTuple):
    """The T·k pairs of a token and one of its experts, sorted by expert, and by token within an expert."""

    tokens: Tensor  # (T k,) int64: the token at each place
    places: Tensor  # (T k,) int64: the place of each pair, counted token after token
    ends: Tensor  # (E,) int32: the place behind the last pair of each expert
    chosen: int  # k

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> tuple["Routes", Tensor, Tensor]:
        """The routes of tokens with the experts `chosen` (T, k); and at each place the expert and the pair, (T k,)."""
        sorted_experts, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(experts, device=chosen.device)
        ends = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
        return cls(order // chosen.shape[1], order.argsort(), ends, chosen.shape[1]), sorted_experts, order


def gathered(x: Tensor, routes: Routes) -> Tensor:
    """The tokens x (T, C) at each place, (T k, C)."""
    return x[routes.tokens]


def summed(x: Tensor, routes: Routes) -> Tensor:
    """The adjoint of `gathered`: for each token the sum of its k rows of x (T k, C), in a fixed order: (T, C)."""
    return x[routes.places].unflatten(0, (-1, routes.chosen)).sum(1)


def products(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The product of each row with the weight of its expert: (T k, in), (E, out, in) -> (T k, out)."""
    if takes_grouped(x, weights):
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    out = x.new_empty(len(x), weights.shape[1])
    for rows, weight in zip(slices(ends), weights, strict=True):
        torch.mm(x[rows], weight.t(), out=out[rows])
    return out


def outer_products(y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """yᵀ x over the rows of each expert: (T k, out), (T k, in) -> (E, out, in); zero for an expert without rows."""
    if takes_grouped(x, y):
        return F.grouped_mm(y.t(), x, offs=ends)
    return torch.stack([y[rows].t() @ x[rows] for rows in slices(ends)])


def slices(ends: Tensor) -> list[slice]:
    """The consecutive rows of each expert. A GPU is waited for, so that their lengths are known."""
    places = [0, *ends.tolist()]
    return [slice(*pair) for pair in zip(places, places[1:], strict=False)]


def takes_grouped(x: Tensor, other: Tensor) -> bool:
    """Whether PyTorch's grouped product takes the rows of x with the rows of another operand.

    On a CPU it is as fast as the slices. Other dtypes have no compiled grouped product.
    """
    aligned = all(width * x.element_size() % ALIGNMENT == 0 for width in (*x.shape[1:], *other.shape[1:]))
    return x.dtype == torch.bfloat16 and len(x) > 0 and aligned


def every_expert(z: Tensor, down: Tensor) -> bool:
    """Whether all experts compute all tokens: for transforms of torch.func, traced and exported models, which take no
    grouped product; and for compiled blocks, if its slices would depend on the tokens."""
    if in_transform() or torch._C._get_tracing_state() is not None or torch.compiler.is_exporting():
        return True
    return torch.compiler.is_compiling() and not takes_grouped(z, down)


class GatheredProduct(torch.autograd.Function):
    """products(gathered(x)): (T, in), (E, out, in) -> (T k, out). The gathered rows are gathered again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, *routes: Any) -> Tensor:
        ctx.routes = Routes(*routes)
        ctx.save_for_backward(x, weights)
        return products(gathered(x, ctx.routes), weights, ctx.routes.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weights), routes = ctx.saved_tensors, ctx.routes
        need_x, need_weights, *_ = ctx.needs_input_grad
        gradient = gradient.contiguous()
        dx = summed(products(gradient, weights.transpose(1, 2), routes.ends), routes) if need_x else None
        dw = outer_products(gradient, gathered(x, routes), routes.ends) if need_weights else None
        return dx, dw, None, None, None, None


class SummedProduct(torch.autograd.Function):
    """summed(products(y)): (T k, in), (E, out, in) -> (T, out). The adjoint of GatheredProduct."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, *routes: Any) -> Tensor:
        ctx.routes = Routes(*routes)
        ctx.save_for_backward(y, weights)
        return summed(products(y, weights, ctx.routes.ends), ctx.routes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (y, weights), routes = ctx.saved_tensors, ctx.routes
        need_y, need_weights, *_ = ctx.needs_input_grad
        gradient = gathered(gradient, routes)
        dy = products(gradient, weights.transpose(1, 2), routes.ends) if need_y else None
        dw = outer_products(gradient, y, routes.ends) if need_weights else None
        return dy, dw, None, None, None, None
