"""What is not computed cannot change the result: each switch of ModelConfig, proven equal and counted."""

import importlib
import itertools
from dataclasses import replace

import open_clip
import pytest
import torch
from operators import DEVICE, EXACT, slow_case
from tiny import NOTHING, TINY_CLIP, VARIANTS, build, inputs, stirred
from upperson_kernels import unpack_sequences
from upperson_kernels.attention import reference

from upperson.errors import BackboneError
from upperson.losses.pairs import sdm_loss
from upperson.model import AdaptedCLIP
from upperson.model.attention import attend_once
from upperson.model.captions import PackedCaptions, pack_captions
from upperson.petl.low_rank import DoRA, LoRA
from upperson.tables.costs import flop_counter

SWITCHES = ("skip_unread", "pack_captions", "low_rank_gradients")
OFF = dict.fromkeys(SWITCHES, False)
WHOLE = dict(prefix="salable", lora="lora", adapter_attn="l-parallel", adapter_mlp="l-parallel")
PERSON_IDS = torch.tensor([0, 1, 1, 2])


def identify(variant):
    return "-".join(map(str, variant.values()))


def results(config, captions=None, device="cpu", dtype=torch.float64):
    """Features, loss and gradients of every trained parameter."""
    model = stirred(build(config).to(device, dtype))
    images, tokens = (tensor.to(device) for tensor in inputs(dtype))
    features = model.encode_image(images), model.encode_text(tokens if captions is None else captions)
    loss = sdm_loss(*features, PERSON_IDS.to(device))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.trained_parameters().items()}
    return {"images": features[0], "captions": features[1], "loss": loss} | gradients


def assert_equal(found, expected, bound=1e-10, where=""):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, (where, name)
            continue
        torch.testing.assert_close(
            found[name],
            value,
            rtol=bound,
            atol=bound * float(value.detach().abs().max() + 1),
            msg=lambda m, n=name: f"{where} {n}: {m}",
        )


# ------------------------------------------------------------------------------------ the same results


@pytest.mark.parametrize(
    "variant",
    [
        WHOLE,
        dict(WHOLE, scale_target="logits"),
        *map(slow_case, VARIANTS),
        dict(method="full"),
        dict(method="cskt", prompt_length=2),
    ],
    ids=identify,
)
def test_switches_change_no_result(tiny, variant):
    """Neither each alone nor all together."""
    config = tiny.replace(**({} if "method" in variant else NOTHING) | variant, **OFF)
    if variant == dict(prefix="none"):
        pytest.skip("nothing is trained")
    expected = results(config)
    for on in (*((switch,) for switch in SWITCHES), SWITCHES):
        assert_equal(results(replace(config, **dict.fromkeys(on, True))), expected, where="+".join(on))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_all_switches_together_with_the_kernels(tiny, backend):
    """Each backend with everything on against PyTorch with everything off."""
    everything = tiny.replace(backend=backend, **dict.fromkeys(SWITCHES, True))
    where = dict(device=DEVICE, dtype=EXACT)
    bound = 1e-10 if torch.float64 == EXACT else 1e-4
    assert_equal(results(everything, **where), results(tiny.replace(**OFF), **where), bound)


def test_captions_that_are_packed_already(tiny):
    _, tokens = inputs()
    for skip_unread in (True, False):
        config = tiny.replace(skip_unread=skip_unread)
        assert_equal(results(config, pack_captions(tokens)), results(config))


def test_towers_that_see_padding_are_not_packed(tiny):
    """A text tower without the causal mask: its padding is part of what it computes."""
    images, tokens = inputs(torch.float64)
    text = dict(TINY_CLIP["text_cfg"], no_causal_mask=True)
    features = []
    for switches in (OFF, dict.fromkeys(SWITCHES, True)):
        torch.manual_seed(0)
        clip = open_clip.CustomTextCLIP(**dict(TINY_CLIP, text_cfg=text)).double().eval()
        expected = clip.encode_text(tokens)
        model = AdaptedCLIP(tiny.replace(**switches), clip).double()
        assert model.pack_captions(tokens) is tokens
        with model.zero_shot():
            torch.testing.assert_close(model.encode_text(tokens), expected)
        features.append(stirred(model).encode_text(tokens))
    torch.testing.assert_close(*features)


@pytest.mark.parametrize("pool_type", ["first", "last", "argmax", "eos"])
@pytest.mark.parametrize("skip_unread", [False, True])
def test_every_pooling_of_the_text_tower(tiny, pool_type, skip_unread):
    torch.manual_seed(0)
    text = dict(TINY_CLIP["text_cfg"], pool_type=pool_type, eos_id=49407)
    clip = open_clip.CustomTextCLIP(**dict(TINY_CLIP, text_cfg=text)).double().eval()
    _, tokens = inputs()
    with torch.no_grad():
        expected = clip.encode_text(tokens)
        model = AdaptedCLIP(tiny.replace(skip_unread=skip_unread, method="zero-shot"), clip).double()
        torch.testing.assert_close(model.encode_text(tokens), expected)


def test_a_pooling_without_a_token_is_refused(tiny):
    text = dict(TINY_CLIP["text_cfg"], pool_type="none")
    with pytest.raises(BackboneError, match="pool type 'none'.*expected argmax, eos, first or last"):
        AdaptedCLIP(tiny, open_clip.CustomTextCLIP(**dict(TINY_CLIP, text_cfg=text)))


@pytest.mark.parametrize(
    "vision", [dict(pool_type="avg"), dict(attentional_pool=True, attn_pooler_heads=2)], ids=["average", "attention"]
)
def test_image_towers_that_read_all_tokens(tiny, vision):
    clip = open_clip.CLIP(**dict(TINY_CLIP, vision_cfg=TINY_CLIP["vision_cfg"] | vision)).double().eval()
    images, _ = inputs(torch.float64)
    with torch.no_grad():
        model = AdaptedCLIP(tiny.replace(image_size=(32, 32), skip_unread=True), clip).double()
        images = images[:, :, :32].repeat(1, 1, 1, 2)
        with model.zero_shot():
            frozen = model.encode_image(images)
        reference = open_clip.CLIP(**dict(TINY_CLIP, vision_cfg=TINY_CLIP["vision_cfg"] | vision)).double().eval()
        names = reference.state_dict().keys()
        reference.load_state_dict({name: value for name, value in model.clip.state_dict().items() if name in names})
        torch.testing.assert_close(frozen, reference.encode_image(images))


# ------------------------------------------------------------------------------------ the pieces


def test_packing_by_hand():
    tokens = torch.tensor([[49406, 5, 49407, 0, 0], [49406, 49407, 0, 0, 0], [49406, 7, 8, 9, 49407]])
    packed = pack_captions(tokens)
    assert packed.token_ids.tolist() == [49406, 5, 49407, 49406, 49407, 49406, 7, 8, 9, 49407]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]
    assert packed.cu_seqlens.tolist() == [0, 3, 5, 10] and packed.cu_seqlens.dtype == torch.int32
    assert packed.longest == 5 and len(packed) == 3
    moved = packed.to("cpu", non_blocking=True)
    assert isinstance(moved, PackedCaptions) and torch.equal(moved.token_ids, packed.token_ids)

    padded, sequence, position = unpack_sequences(packed.positions.double()[:, None], packed.cu_seqlens, packed.longest)
    assert padded.squeeze(-1).tolist() == [[0, 1, 2, 0, 0], [0, 1, 0, 0, 0], [0, 1, 2, 3, 4]]
    assert sequence.tolist() == [0] * 3 + [1] * 2 + [2] * 5 and position.tolist() == packed.positions.tolist()

    nothing = pack_captions(tokens[:0])
    assert len(nothing) == nothing.longest == len(nothing.token_ids) == 0


@pytest.mark.parametrize("target", ["weights", "logits"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 3])
def test_one_query_of_the_definition(prefix, causal, target):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 6, 3, 2, 8, dtype=torch.float64, generator=generator).requires_grad_()
    key, value = (
        torch.randn(prefix, 2, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    read, samples = torch.tensor([5, 0, 2]), torch.arange(3)
    visible = torch.arange(6) <= read[:, None] if causal else None
    query, keys, values = qkv.unbind(2)
    found = attend_once(query[samples, read], keys, values, key, value, scale, scale_target=target, visible=visible)
    expected = reference.explicit(qkv, key, value, scale, causal, target)[samples, read]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [
        torch.autograd.grad(out.sin().sum(), [qkv, key, value, scale], allow_unused=True) for out in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def random_lora(rows, kind=LoRA):
    torch.manual_seed(0)
    lora = kind(3, torch.randn(24, 8)).double()
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return lora, torch.randn(rows, 8).double(), torch.randn(rows).double()


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("rows", [24, 16], ids=["query, key, value", "key, value"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)], ids=str)
def test_low_rank_gradients_are_those_of_the_merged_weight(rows, shape, kind):
    lora, weight, bias = random_lora(rows, kind)
    x = torch.randn(shape).double().requires_grad_()
    found, expected = (lora.linear(x, weight, bias, switch) for switch in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *lora.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), wanted) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_low_rank_gradients_by_finite_differences():
    lora, weight, bias = random_lora(24)
    x = torch.randn(4, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: lora.linear(x, weight, bias, True), (x, *lora.parameters()))


def test_low_rank_gradients_have_no_second_derivative_rather_than_a_wrong_one():
    lora, weight, bias = random_lora(24)
    x = torch.randn(4, 8).double().requires_grad_()
    for loss in (lambda y: y.square().sum(), torch.sum):
        (first,) = torch.autograd.grad(loss(lora.linear(x, weight, bias, True)), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiable once"):
            torch.autograd.grad(first.sum() + x.sum(), x)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_low_rank_gradients_leave_trained_weights_theirs(kind):
    """Who unfreezes the projection beside LoRA gets all gradients, by way of the merged weight."""
    lora, weight, bias = random_lora(24, kind)
    x = torch.randn(4, 8).double()
    wanted = [weight.requires_grad_(), bias.requires_grad_(), *lora.parameters()]
    for a, b in zip(
        *(torch.autograd.grad(lora.linear(x, weight, bias, switch).sin().sum(), wanted) for switch in (True, False)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("frozen", [["key_down", "key_up", "key_scale"], ["value_down"], ["key_up"], ["value_scale"]])
def test_frozen_factors_leave_the_others_their_gradients(tiny, frozen, kept):
    """Keys and values are computed together, and each factor is trained on its own."""
    images, tokens = inputs()
    gradients = []
    for freezes in (False, True):
        model = stirred(build(tiny.replace(**NOTHING | dict(lora="lora"))))
        for name, parameter in model.trained_parameters().items():
            parameter.requires_grad_(not (freezes and name.split(".")[-1] in frozen))
        if kept:
            model.keep_frozen_weights(torch.float32)
        (model.encode_image(images).sin().sum() + model.encode_text(tokens).sin().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.adaptation().items()})
    for name, gradient in gradients[1].items():
        if name.split(".")[-1] in frozen:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, gradients[0][name])


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_low_rank_gradients_with_a_backbone_in_half_precision(kind):
    lora, weight, bias = random_lora(24, kind)
    lora, weight, bias, x = lora.float(), weight.bfloat16(), bias.bfloat16(), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (lora.linear(x, weight, bias, switch) for switch in (True, False))
    torch.testing.assert_close(found, expected, rtol=1.6e-2, atol=1e-5 if kind is LoRA else 5e-3)
    found.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in lora.parameters())


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_low_rank_gradients_under_autocast_come_close_to_the_merged_ones(kind):
    lora, weight, bias = random_lora(24, kind)
    lora, weight, bias = lora.float(), weight.float(), bias.float()
    x = torch.randn(64, 8)
    gradients = []
    for switch in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = lora.linear(x, weight, bias, switch)
        assert y.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(y.float().square().sum(), list(lora.parameters())))
    for parameter, a, b in zip(lora.parameters(), *gradients, strict=True):
        assert a.dtype == parameter.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.03


# ------------------------------------------------------------------------------------ fewer operations


def count(config, **switches):
    """FLOPs of forward and backward of both towers, by torch's counter."""
    model = build(replace(config, **switches))
    images, tokens = inputs()
    with flop_counter() as counter:
        sdm_loss(model.encode_image(images), model.encode_text(tokens), PERSON_IDS).backward()
    return counter.get_total_flops()


def test_each_switch_saves_what_it_promises(tiny):
    """By hand: width 32, images of 13 tokens, 4 captions of 12 (packed: 4, 6, 10, 11), rank 2, 2 heads of 16."""
    tiny = tiny.replace(**(NOTHING | dict(lora="lora")))
    off = count(tiny, **OFF)
    pairs, width, rank = 4, 32, 2
    rows = pairs * (13 + 12)
    blocks = 3

    whole = 2 * rows * width * 3 * width  # Gᵀ x, (3 C, C)
    merge_backward = 2 * 2 * 2 * 2 * width * width * rank  # of up · down: two towers, two parts, two factors
    low_rank = 2 * rows * (2 * rank) * width + 2 * 3 * 2 * rows * rank * width
    assert off - count(tiny, **OFF | dict(low_rank_gradients=True)) == blocks * (whole + merge_backward - low_rank)

    packed_rows = 4 + 6 + 10 + 11
    assert count(tiny, **OFF | dict(pack_captions=True)) < off
    linear = 2 * width * (3 * width + width + 2 * 4 * width)  # of one token through in_proj, out_proj, MLP
    saved = off - count(tiny, **OFF | dict(pack_captions=True))
    # Forward, and backward for the tokens (not in the first block's in_proj, whose input nobody trains) and for the
    # weight that LoRA updates; attention is at most the longest caption's.
    tokens = 48 - packed_rows
    expected = tokens * (blocks * 2 * linear - 2 * width * 3 * width + blocks * 2 * width * 3 * width)
    attention = blocks * (4 + 10) * 2 * 16 * pairs * (12**2 - 11**2)
    assert saved == expected + attention

    skipped = off - count(tiny, **OFF | dict(skip_unread=True))
    assert skipped > 0.2 * off  # of three blocks, most of one


@pytest.mark.slow
def test_nothing_is_computed_below_the_first_trained_parameter(tiny):
    """Adapters in the last block alone: backward ends there, whatever the switches."""
    reached = []
    for values in itertools.product((False, True), repeat=3):
        switches = dict(zip(SWITCHES, values, strict=True))
        model = build(tiny.replace(**(NOTHING | dict(adapter_mlp="l-parallel", depth_adapter=2)), **switches))
        images, tokens = inputs()
        for block in (*model.image_blocks, *model.text_blocks):
            block.attn.out_proj.register_full_backward_hook(lambda *_: reached.append(1))
        with flop_counter() as forward:
            loss = sdm_loss(model.encode_image(images), model.encode_text(tokens), PERSON_IDS)
        with flop_counter() as backward:
            loss.backward()
        assert not reached
        assert backward.get_total_flops() < 0.5 * forward.get_total_flops()


def test_the_first_block_needs_no_gradient_of_its_input(tiny):
    """LoRA in the first block: its factors get gradients, its input gets none."""
    config = tiny.replace(**(NOTHING | dict(lora="lora", depth_lora=1)))
    model = build(config)
    images, _ = inputs()
    lengths = []
    model.image_blocks[0].lora.linear, linear = (
        (lambda y, *rest: lengths.append(y.requires_grad) or linear(y, *rest)),
        model.image_blocks[0].lora.linear,
    )
    model.encode_image(images).sum().backward()
    assert lengths == [False]


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernels_are_counted_as_pytorchs_own(tiny, causal):
    """The formulas for torch's flop counter, which a counter knows that was made after the kernels were imported."""
    importlib.import_module("upperson_kernels.adapter.op")
    importlib.import_module("upperson_kernels.attention.op")
    counts = []
    for backend in ("torch", "triton"):
        model = build(tiny.replace(backend=backend, **OFF)).to(DEVICE)
        images, tokens = (tensor.to(DEVICE) for tensor in inputs())
        with flop_counter() as counter:
            (model.encode_text(tokens) if causal else model.encode_image(images)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
