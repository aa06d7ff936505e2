"""What a user passes to a model: wrong shapes and dtypes are always refused, wrong values on a CPU."""

import numpy as np
import pytest
import torch
from tiny import TINY_CLIP, build, inputs, tiny_config
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode

PROMPTED = dict(method="prompt-decoupling")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build(tiny_config(tmp_path_factory.mktemp("inputs")))


def changed(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


WRONG_IMAGES = [
    (lambda images: images.numpy(), TypeError, r"floating-point tensor of shape \(B, 3, 48, 16\), found a ndarray"),
    (lambda images: [images], TypeError, "found a list"),
    (lambda _: None, TypeError, "found a NoneType"),
    (lambda images: images.byte(), TypeError, "found uint8; model.preprocess makes them"),
    (lambda images: images.long(), TypeError, "found int64"),
    (lambda images: images > 0, TypeError, "found bool"),
    (lambda images: images.to(torch.complex64), TypeError, "found complex64"),
    (lambda images: images.double(), TypeError, "float32 as of the model's weights, found float64"),
    (lambda images: images.half(), TypeError, "found float16; images.to"),
    (lambda images: images[0], ValueError, r"found \(3, 48, 16\)"),
    (lambda images: images[:, :1], ValueError, r"found \(4, 1, 48, 16\)"),
    (lambda images: images.permute(0, 2, 3, 1), ValueError, r"found \(4, 48, 16, 3\)"),
    (lambda images: images.transpose(2, 3), ValueError, r"found \(4, 3, 16, 48\)"),
    (lambda images: images[:, :, :47], ValueError, r"found \(4, 3, 47, 16\)"),
    (lambda images: images[:0], ValueError, "at least one image, found a batch of none"),
    (lambda images: images[None], ValueError, r"found \(1, 4, 3, 48, 16\)"),
    (lambda images: changed(images, (2, 1, 0, 3), np.nan), ValueError, "image 2 has NaN or infinity"),
    (lambda images: changed(images, (3, 0, 47, 15), np.inf), ValueError, "image 3 has NaN or infinity"),
    (lambda images: changed(images, 0, -np.inf), ValueError, "image 0 has NaN or infinity"),
]
WRONG_CAPTIONS = [
    (
        lambda tokens: tokens.numpy(),
        TypeError,
        r"token ids of shape \(B, L\) in int64, with L from 1 to 12, found a nd",
    ),
    (lambda tokens: tokens.tolist(), TypeError, "found a list; model.tokenizer makes them"),
    (lambda _: ["a man"], TypeError, "found a list"),
    (lambda _: "a man", TypeError, "found a str"),
    (lambda tokens: tokens.float(), TypeError, "found float32"),
    (lambda tokens: tokens.to(torch.int16), TypeError, "found int16"),
    (lambda tokens: tokens > 0, TypeError, "found bool"),
    (lambda tokens: tokens[0], ValueError, r"found \(12,\)"),
    (lambda tokens: tokens[None], ValueError, r"found \(1, 4, 12\)"),
    (lambda tokens: tokens[:, :0], ValueError, r"found \(4, 0\)"),
    (lambda tokens: torch.cat([tokens, tokens], 1), ValueError, r"found \(4, 24\)"),
    (lambda tokens: changed(tokens, (1, 2), 49408), ValueError, "ids from 0 to 49407, found 49408"),
    (lambda tokens: changed(tokens, (1, 2), 2**62), ValueError, f"found {2**62}"),
    (lambda tokens: changed(tokens, (3, 11), -1), ValueError, "found -1"),
    (lambda tokens: torch.zeros_like(tokens), ValueError, "the end token 49407 in each caption; caption 0 has none"),
    (lambda tokens: changed(tokens, tokens == 49407, 7), ValueError, "caption 0 has none"),
    (lambda tokens: tokens[:, :5], ValueError, "caption 1 has none"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_IMAGES)
def test_wrong_images(model, change, error, message):
    images = change(inputs()[0])
    for encode in (model.encode_image, model.encode_image_tokens):
        with pytest.raises(error, match=f"^images: expected .*{message}"):
            encode(images)


@pytest.mark.parametrize(("change", "error", "message"), WRONG_CAPTIONS)
def test_wrong_captions(model, change, error, message):
    captions = change(inputs()[1])
    for encode in (model.encode_text, model.encode_text_tokens):
        with pytest.raises(error, match=f"^captions: expected .*{message}"):
            encode(captions)


@pytest.mark.parametrize("changes", [PROMPTED, dict(pack_captions=False)], ids=["prompts", "padded"])
def test_wrong_captions_of_other_models(tmp_path, changes):
    other = build(tiny_config(tmp_path).replace(**changes))
    for change, error, message in WRONG_CAPTIONS:
        with pytest.raises(error, match=f"^captions: expected .*{message}"):
            other.encode_text(change(inputs()[1]))


def test_an_id_of_packed_captions(model):
    packed = model.pack_captions(inputs()[1])
    packed.token_ids[2] = 49408
    with pytest.raises(ValueError, match="ids from 0 to 49407, found 49408"):
        model.encode_text(packed)


@torch.no_grad()
def test_right_inputs(model):
    """No captions, huge finite numbers, ids in int32, and captions that are shorter than the context."""
    images, tokens = inputs()
    assert model.encode_text(tokens[:0]).shape == (0, 16)
    assert model.encode_image(torch.full_like(images, 3e38)).shape == (4, 16)
    assert torch.equal(model.encode_text(tokens.int()), model.encode_text(tokens))
    torch.testing.assert_close(model.encode_text(tokens[:, :11]), model.encode_text(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode_image(images.half()).isfinite().all()


def test_a_tower_without_end_tokens_needs_none(tmp_path):
    description = TINY_CLIP | dict(text_cfg=TINY_CLIP["text_cfg"] | dict(pool_type="last"))
    other = build(tiny_config(tmp_path, description))
    assert other.encode_text(torch.zeros(2, 12, dtype=torch.int64)).shape == (2, 16)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_values_are_not_read_where_operations_are_recorded(model):
    """Under a counter, in a transform and in a trace."""
    images, _ = inputs()
    wrong = torch.full_like(images, np.nan)
    with FlopCounterMode(display=False) as counter:
        model.encode_image(wrong)
    assert counter.get_total_flops() > 0
    assert vmap(lambda image: model.encode_image(image[None])[0])(wrong).isnan().all()
    traced = torch.jit.trace_module(model, {"encode_image": images}, check_trace=False)
    assert traced.encode_image(wrong).isnan().all()
