"""The variants of the trained modules: what each computes, written out; their gradients; fused against plain."""

import itertools
import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from operators import DEVICE, EXACT, slow_case
from tiny import NOTHING, VARIANTS, build, inputs, stirred, tiny_clip, tiny_config

from upperson import PRESETS, AdaptedCLIP
from upperson.losses.objective import Objective
from upperson.model.block import Stream
from upperson.petl import ADAPTERS, LOW_RANK, PREFIXES

ADAPTER_KINDS = [*ADAPTERS, "none"]


@pytest.fixture
def tiny(tmp_path):
    """Two blocks a tower, nothing trained: the tests add what they are about."""
    return tiny_config(tmp_path, tiny_clip(layers=2), **NOTHING)


def adapted(config, dtype=torch.float64):
    return stirred(build(config).to(dtype))


def written_out(block, x, causal, variant):
    """One block of a variant from the formulas alone, one head and one sample at a time."""
    parameters = {name: p for name, p in block.trained().items()}

    def bottleneck(name, u):
        hidden = torch.relu(u @ parameters[f"{name}.down_weight"].t() + parameters[f"{name}.down_bias"])
        return parameters[f"{name}.scale"] * (
            hidden @ parameters[f"{name}.up_weight"].t() + parameters[f"{name}.up_bias"]
        )

    def layer_norm(x, weight, bias):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    def around(kind, name, norm, x, sublayer):
        if kind == "ln-tuning":
            return sublayer(layer_norm(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"]))
        y = layer_norm(x, norm.weight, norm.bias)
        if kind == "l-parallel":
            y = y + bottleneck(name, x)
        if kind == "l-sequential":
            y = y + bottleneck(name, y)
        out = sublayer(y)
        if kind == "parallel":
            out = out + bottleneck(name, y)
        if kind == "sequential":
            out = out + bottleneck(name, out)
        return out

    def updated(weight, which):
        kind = variant.get("lora", "none")
        if kind == "none":
            return weight
        update = parameters[f"lora.{which}_up"] @ parameters[f"lora.{which}_down"]
        if kind == "lora":
            return weight + parameters[f"lora.{which}_scale"] * update
        if kind == "wora":
            weight, update = parameters[f"lora.{which}_beta"] * weight, parameters[f"lora.{which}_alpha"] * update
        if kind == "wora":  # per input
            columns = [
                m * column / column.square().sum().sqrt()
                for m, column in zip(parameters[f"lora.{which}_input_magnitude"], (weight + update).t(), strict=True)
            ]
            return torch.stack(columns, 1)
        rows = [  # per output, with a norm that is a constant in backward
            m * row / row.detach().square().sum().sqrt()
            for m, row in zip(parameters[f"lora.{which}_magnitude"], weight + update, strict=True)
        ]
        return torch.stack(rows)

    def attention(y):
        heads, width = block.attn.num_heads, y.shape[-1] // block.attn.num_heads
        w_q, w_k, w_v = block.attn.in_proj_weight.chunk(3)
        b_q, b_k, b_v = block.attn.in_proj_bias.chunk(3)
        q, k, v = y @ w_q.t() + b_q, y @ updated(w_k, "key").t() + b_k, y @ updated(w_v, "value").t() + b_v
        kind, target = variant.get("prefix", "none"), variant.get("scale_target", "weights")
        columns = 0 if kind == "none" else 3
        key_scale, value_scale, factor = (
            parameters[f"prefix.{name}"] if kind == "salable" else 1.0 for name in ("key_scale", "value_scale", "scale")
        )
        out = torch.zeros_like(y)
        for sample, head in itertools.product(range(len(y)), range(heads)):
            part = slice(head * width, (head + 1) * width)
            keys, values = k[sample, :, part], v[sample, :, part]
            logits = q[sample, :, part] @ keys.t() / width**0.5
            if causal:
                logits = logits + torch.full(logits.shape, -torch.inf, dtype=logits.dtype).triu(1)
            if columns:
                prefix_logits = q[sample, :, part] @ (key_scale * block.prefix.key[:, part]).t() / width**0.5
                if target == "logits":
                    prefix_logits = factor * prefix_logits
                logits = torch.cat([prefix_logits, logits], 1)
                values = torch.cat([value_scale * block.prefix.value[:, part], values])
            weights = logits.softmax(1)
            if columns and target == "weights":
                weights = torch.cat([factor * weights[:, :columns], weights[:, columns:]], 1)
            out[sample, :, part] = weights @ values
        return out @ block.attn.out_proj.weight.t() + block.attn.out_proj.bias

    def mlp(y):
        hidden = y @ block.mlp.c_fc.weight.t() + block.mlp.c_fc.bias
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        return hidden @ block.mlp.c_proj.weight.t() + block.mlp.c_proj.bias

    x = x + around(variant.get("adapter_attn", "none"), "adapter_attn", block.ln_1, x, attention)
    return x + around(variant.get("adapter_mlp", "none"), "adapter_mlp", block.ln_2, x, mlp)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
@pytest.mark.parametrize("causal", [False, True])
def test_each_computes_its_formula(tiny, variant, causal):
    """Outputs, and gradients of the input and of every parameter, in float64."""
    model = adapted(tiny.replace(**variant))
    block = (model.text_blocks if causal else model.image_blocks)[0]
    # What reaches the block is no fresh LayerNorm, so gain and bias matter.
    with torch.no_grad():
        for norm in (block.ln_1, block.ln_2):
            norm.weight.add_(0.1 * torch.arange(32) / 32)
            norm.bias.add_(0.2)
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    direction = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = [x, *block.trained().values()]
    ours = block(Stream(0.25 * x, 0.75 * x)).total()
    expected = written_out(block, x, causal, variant)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((out * direction).sum(), wanted) for out in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert len(wanted) > 1 or variant == dict(prefix="none")


@pytest.mark.parametrize(
    "variant",
    [variant for variant in VARIANTS if variant.get("lora") != "dora"],  # its norm is a constant in backward
    ids=lambda variant: "-".join(map(str, variant.values())),
)
def test_gradients_are_those_of_finite_differences(tiny, variant):
    block = adapted(tiny.replace(**variant)).image_blocks[0]
    x = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    parameters = list(block.trained().values())
    assert torch.autograd.gradcheck(lambda *_: block(Stream(x)).total(), [x, *parameters], fast_mode=True)


def test_low_rank_updates_start_at_the_weight():
    """α of WoRA starts at 8, which up = 0 hides; magnitudes are the norms of the weight's rows or columns."""
    torch.manual_seed(0)
    weight = torch.randn(24, 8, dtype=torch.float64)
    for kind, build_update in LOW_RANK.items():
        module = build_update(2, weight).double()
        torch.testing.assert_close(module(weight), weight, msg=kind)
        names = {name.split("_", 1)[1] for name, _ in module.named_parameters()}
        scalars = {"lora": {"scale"}, "dora": {"magnitude"}, "wora": {"input_magnitude", "alpha", "beta"}}
        assert names == {"up", "down"} | scalars[kind]
    assert (module.key_alpha.item(), module.value_alpha.item(), module.key_beta.item()) == (8, 8, 1)
    torch.testing.assert_close(module.key_input_magnitude, weight[8:16].square().sum(0).sqrt())
    dora = LOW_RANK["dora"](2, weight)
    torch.testing.assert_close(dora.value_magnitude, weight[16:].square().sum(1).sqrt())


@pytest.mark.parametrize(
    "variant",
    [
        dict(prefix="salable", adapter_mlp="l-parallel"),
        *(
            slow_case(variant)
            for variant in (
                dict(prefix="vanilla", lora="dora", adapter_attn="l-sequential", adapter_mlp="parallel"),
                dict(prefix="salable", lora="wora", adapter_attn="sequential", adapter_mlp="ln-tuning"),
                dict(method="full"),
            )
        ),
    ],
    ids=lambda variant: "-".join(variant.values()),
)
def test_fused_against_plain(tiny, variant):
    """Loss and gradients of both towers are the same on the kernels and without them."""
    bound = 1e-9 if torch.float64 == EXACT else 1e-3
    images, tokens = (t.to(DEVICE) for t in inputs(EXACT))
    found = []
    for backend in ("triton", "torch"):
        model = stirred(build(tiny.replace(backend=backend, **variant)), scale=0.05).to(DEVICE, EXACT)
        loss = F.cosine_similarity(model.encode_image(images), model.encode_text(tokens)).sum()
        parameters = model.trained_parameters()
        found.append((loss, dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))))
    (fused, fused_gradients), (plain, plain_gradients) = found
    torch.testing.assert_close(fused, plain, rtol=bound, atol=bound)
    for name, gradient in fused_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=bound, atol=bound, msg=name)


@pytest.mark.parametrize(
    "variant",
    [*map(slow_case, VARIANTS[:-2]), *VARIANTS[-2:], dict(method="full")],
    ids=lambda variant: "-".join(map(str, variant.values())),
)
def test_autocast_keeps_parameters_and_gradients_in_float32(tiny, variant):
    """With the heads of id and mlm as well."""
    images, tokens = inputs()
    batch = dict(images=images, captions=tokens, masked_captions=tokens, person_ids=torch.arange(4))
    batch |= dict(mask_labels=tokens, mask_positions=(tokens > 0).nonzero())
    torch.manual_seed(0)
    model = stirred(build(tiny.replace(**variant)), scale=0.05)
    goal = Objective("sdm+id+mlm", 0.02, 16, 49408, range(4))
    exact, _ = goal(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = goal(model, batch)
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert loss.item() == pytest.approx(exact.item(), rel=0.1)
    loss.backward()
    for name, parameter in (model.trained_parameters() | goal.trained_parameters()).items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("field", "kinds"),
    [
        ("prefix", [*PREFIXES, "none"]),
        ("lora", [*LOW_RANK, "none"]),
        ("adapter_attn", ADAPTER_KINDS),
        ("adapter_mlp", ADAPTER_KINDS),
    ],
)
def test_every_choice_differs_from_every_other(tiny, field, kinds):
    images, tokens = inputs(torch.float64)
    features = []
    for kind in kinds:
        model = adapted(tiny.replace(**{field: kind}))
        with torch.no_grad():
            features.append(torch.stack([model.encode_image(images), model.encode_text(tokens)]))
    for a, b in itertools.combinations(features, 2):
        assert ((a - b).abs().amax((1, 2)) > 1e-3).all()  # in both towers


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if "prefix" not in v], ids=lambda variant: "-".join(map(str, variant.values()))
)
def test_what_has_not_been_trained_changes_nothing(tiny, variant):
    """A prefix starts small, the others at nothing."""
    model, (images, tokens) = build(tiny.replace(**variant)).double(), inputs(torch.float64)
    with torch.no_grad():
        adapted_features = model.encode_image(images), model.encode_text(tokens)
        with model.zero_shot():
            frozen = model.encode_image(images), model.encode_text(tokens)
    for a, b in zip(adapted_features, frozen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_full_fine_tuning_trains_clip_and_zero_shot_nothing(tiny):
    model, (images, tokens) = build(tiny.replace(method="full")), inputs()
    parameters = model.trained_parameters()
    names = {name for name, _ in open_clip.CLIP(**json.loads(Path(tiny.model).read_text())).named_parameters()}
    assert set(parameters) == names - {"logit_scale"}
    assert {id(p) for p in parameters.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    (model.encode_image(images) * model.encode_text(tokens)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in parameters.values())
    nothing = build(tiny.replace(method="zero-shot"))
    assert not nothing.trained_parameters() and not any(p.requires_grad for p in nothing.parameters())


@pytest.mark.slow
def test_depths_and_numbers_of_parameters():
    """Counts written out for ViT-B/16 at the CUHK-PEDES preset, depths included."""
    width = {"image": 768, "text": 512}

    def count(**changes):
        with torch.device("meta"):
            clip = open_clip.create_model("ViT-B-16-quickgelu", device="meta")
            model = AdaptedCLIP(PRESETS["cuhk-pedes"].model.replace(**changes), clip)
        return sum(p.numel() for p in model.trained_parameters().values())

    def expected(per_block):
        return sum(per_block(c) for c in width.values())

    assert count(**NOTHING | dict(prefix="salable")) == 12 * expected(lambda c: 2 * 10 * c + 3)
    assert count(**NOTHING | dict(prefix="vanilla", depth_prefix=5)) == 5 * expected(lambda c: 2 * 10 * c)
    assert count(**NOTHING | dict(lora="lora")) == 12 * expected(lambda c: 2 * (2 * 32 * c + 1))
    assert count(**NOTHING | dict(lora="dora")) == 12 * expected(lambda c: 2 * (2 * 32 * c + c))
    assert count(**NOTHING | dict(lora="wora", depth_lora=7)) == 7 * expected(lambda c: 2 * (2 * 32 * c + c + 2))
    one_adapter = 12 * expected(lambda c: 2 * c * (c // 8) + c // 8 + c + 1)
    for kind in ("l-parallel", "l-sequential", "parallel", "sequential"):
        assert count(**NOTHING | dict(adapter_attn=kind)) == one_adapter
    assert count(**NOTHING | dict(adapter_mlp="ln-tuning", depth_adapter=2)) == 10 * expected(lambda c: 2 * c)
    assert count(method="full") == 149_620_737 - 1 - 4 * 768  # 193 positions, not 197; no temperature
