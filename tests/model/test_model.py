"""AdaptedCLIP on open_clip: what is trained, what is frozen, depths, fused against plain, loading, what is refused."""

import functools
import json
import time

import open_clip
import pytest
import torch
from huggingface_hub import constants
from operators import DEVICE, EXACT, slow_case
from safetensors.torch import save_file
from tiny import TINY_CLIP, build, inputs, stirred
from torch._dynamo.testing import CompileCounterWithBackend

from upperson import PRESETS, AdaptedCLIP, DataConfig, ModelConfig
from upperson.data import read_splits, train_loader
from upperson.errors import BackboneError, MethodError
from upperson.losses.pairs import sdm_loss
from upperson.model import download
from upperson.model.backbone import build_clip, fit_image_size, resize_position_embedding
from upperson.model.block import Stream
from upperson.model.captions import PackedCaptions

# ------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize(
    ("preset", "model", "count"),
    [
        ("cuhk-pedes", "ViT-B-16-quickgelu", 7_419_816),
        ("icfg-pedes", "ViT-B-16-quickgelu", 7_542_696),
        ("rstpreid", "ViT-B-16-quickgelu", 6_191_016),
        ("cuhk-pedes", "ViT-L-14-quickgelu", 21_199_356),
    ],
)
def test_number_of_trained_parameters(preset, model, count):
    """The paper's counts. On the meta device nothing is allocated."""
    with torch.device("meta"):
        built = AdaptedCLIP(PRESETS[preset].model, open_clip.create_model(model, device="meta"))
    patches = 244 if "L-14" in model else 193
    assert built.clip.visual.positional_embedding.shape[0] == patches
    assert sum(p.numel() for p in built.trained_parameters().values()) == count
    assert sum(p.numel() for p in built.parameters() if p.requires_grad) == count


def test_only_trained_parameters_get_gradients(tiny):
    model = stirred(build(tiny))
    images, tokens = inputs()
    sdm_loss(model.encode_image(images), model.encode_text(tokens), torch.tensor([0, 1, 1, 2])).backward()
    trained = model.trained_parameters()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    ids = {id(p) for p in trained.values()}
    assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) not in ids)


def test_initial_values_of_the_paper(tiny):
    for name, parameter in build(tiny.replace(prefix_scale=7.0)).trained_parameters().items():
        leaf = name.rsplit(".", 1)[-1]
        if name.endswith("prefix.scale"):
            assert parameter.item() == 7
        elif leaf.endswith("scale"):
            assert parameter.item() == 1
        elif leaf in ("key", "value"):
            assert parameter.min() >= 0 and parameter.max() < 0.01 and parameter.std() > 1e-3
        elif leaf in ("key_up", "value_up", "up_weight", "up_bias", "down_bias"):
            assert parameter.abs().max() == 0
        else:
            bound = parameter.shape[1] ** -0.5
            assert 0.5 * bound < parameter.abs().max() <= bound


def test_depths(tiny):
    """LoRA and prefix act in blocks i < depth, adapters in blocks i ≥ depth."""
    names = build(tiny.replace(depth_prefix=1, depth_lora=2, depth_adapter=2)).trained_parameters()
    for tower in ("image", "text"):
        blocks = [{n.split(".")[3] for n in names if n.startswith(f"{tower}.blocks.{i}.")} for i in range(3)]
        assert blocks == [{"prefix", "lora"}, {"lora"}, {"adapter_attn", "adapter_mlp"}]
    nothing = tiny.replace(depth_prefix=0, depth_lora=0, depth_adapter=3)
    assert not build(nothing).trained_parameters()


# ------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("custom_text", [False, True])
def test_without_the_trained_modules_it_is_open_clip(tiny, custom_text):
    torch.manual_seed(0)
    clip = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**TINY_CLIP).double().eval()
    fit_image_size(clip.visual, (48, 16))
    images, tokens = inputs(torch.float64)
    with torch.no_grad():
        expected = clip.encode_image(images), clip.encode_text(tokens)
        model = stirred(AdaptedCLIP(tiny, clip).double())
        with model.zero_shot():
            frozen = model.encode_image(images), model.encode_text(tokens)
        adapted = model.encode_image(images), model.encode_text(tokens)
    for a, b, c in zip(expected, frozen, adapted, strict=True):
        torch.testing.assert_close(a, b)
        assert (a - c).abs().max() > 1e-2


def test_train_and_eval_agree(tiny):
    model, (images, tokens) = stirred(build(tiny)), inputs()
    a = model.train().encode_image(images), model.encode_text(tokens)
    b = model.eval().encode_image(images), model.encode_text(tokens)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_option_changes_the_features(tiny):
    """Each option of the model reaches the computation, in both towers."""
    images, tokens = inputs()

    def features(**options):
        model = stirred(build(tiny.replace(**options)))
        with torch.no_grad():
            return model.encode_image(images), model.encode_text(tokens)

    plain = features()
    assert all(torch.equal(a, b) for a, b in zip(plain, features(), strict=True))
    for options in (
        dict(scale_target="logits"),
        dict(prefix_scale=3.0),
        dict(prefix_length=5),
        dict(lora_rank=4),
        dict(adapter_reduction=8),
        dict(depth_prefix=1),
        dict(depth_lora=1),
        dict(depth_adapter=1),
    ):
        for a, b in zip(plain, features(**options), strict=True):
            assert (a - b).abs().max() > 1e-4, options


@pytest.mark.slow
def test_three_training_steps_with_the_kernels_and_without(tiny):
    """The switch: the same losses and the same parameters, fused or not."""
    bound = 1e-9 if torch.float64 == EXACT else 1e-4
    images, tokens = (t.to(DEVICE) for t in inputs(EXACT))
    person_ids = torch.tensor([0, 1, 1, 2], device=DEVICE)

    def train(backend):
        model = stirred(build(tiny.replace(backend=backend))).to(DEVICE, EXACT)
        optimizer = torch.optim.Adam(model.trained_parameters().values(), lr=1e-2, eps=1e-3)
        losses = []
        for _ in range(3):
            loss = sdm_loss(model.encode_image(images), model.encode_text(tokens), person_ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, model.trained_parameters()

    fused_losses, fused = train("triton")
    plain_losses, plain = train("torch")
    assert fused_losses == pytest.approx(plain_losses, rel=bound)
    assert plain_losses[2] < plain_losses[0]
    for name, parameter in fused.items():
        torch.testing.assert_close(parameter, plain[name], rtol=bound, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_autocast_keeps_parameters_in_float32(tiny):
    model, (images, tokens) = stirred(build(tiny)), inputs()
    exact = model.encode_image(images), model.encode_text(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.encode_image(images), model.encode_text(tokens)
    for a, b in zip(exact, half, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(a, b.float()).min() > 0.99
    sdm_loss(*half, torch.tensor([0, 1, 1, 2])).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.trained_parameters().values())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_block_compiles_whole_and_once_for_every_batch(tiny, backend):
    block = stirred(build(tiny.replace(backend=backend))).image_blocks[0].to(DEVICE)
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for batch in (2, 3, 6):
        x = torch.randn(batch, 9, 32, device=DEVICE)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(Stream(x)).total(), block(Stream(x)).total())
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_model_compiles_whole_and_once_for_every_batch(tiny):
    """Both towers, the loss and backward; the compiled text tower computes the padding too, which changes nothing."""
    model = stirred(build(tiny.replace(backend="triton"))).to(DEVICE, EXACT)
    bound = 1e-9 if torch.float64 == EXACT else 1e-2

    def loss_of(images, tokens, person_ids):
        return sdm_loss(model.encode_image(images), model.encode_text(tokens), person_ids)

    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(loss_of, backend=counter, fullgraph=True)
    for batch in (4, 6):
        arguments = [t.to(DEVICE) for t in (*inputs(EXACT, batch), torch.arange(batch) // 2)]
        for argument in arguments:
            torch._dynamo.mark_dynamic(argument, 0)
        gradients = []
        for function in (compiled, loss_of):
            model.zero_grad()
            function(*arguments).backward()
            gradients.append([p.grad.clone() for p in model.trained_parameters().values()])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)
    assert counter.frame_count == 1


def test_position_embedding_resize(golden, recipe):
    numbers = golden("pos_embed")
    embedding = torch.from_numpy(recipe.draw("pos_embed", "input/positional_embedding", (197, 768)))
    resized = resize_position_embedding(embedding, (14, 14), (24, 8))
    assert resized.shape == (193, 768)
    torch.testing.assert_close(resized.norm(dim=1), torch.from_numpy(numbers["row_norm"]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(resized[:, 0], torch.from_numpy(numbers["first_column"]), rtol=1e-9, atol=1e-9)
    rows = torch.from_numpy(numbers["rows"])
    torch.testing.assert_close(resized[rows], torch.from_numpy(numbers["rows_value"]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("workers", [slow_case(0), 2])
@pytest.mark.parametrize("changes", [{}, dict(method="cskt", prompt_length=2), dict(pack_captions=False)], ids=str)
def test_loaders_pack_captions_as_the_model_does(tiny, changes, workers):
    """Also the masked ones: the same features, to the bit, whoever packs."""
    model = stirred(build(tiny.replace(**changes)))
    samples = read_splits(DataConfig(embedded_identities=(3, 1, 1), embedded_views=2))["train"]
    options = dict(
        tokenizer=functools.partial(model.tokenizer, context_length=model.caption_length), image_size=(48, 16),
        batch_size=5, seed=1, mask_captions=True, mask_labels=True, workers=workers, epoch=1,
    )  # fmt: skip
    plain, packed = (list(train_loader(samples, **options, pack=pack)) for pack in (None, model.caption_packer()))
    assert len(plain) == len(packed) == 3
    for first, second in zip(plain, packed, strict=True):
        for name in ("captions", "masked_captions"):
            assert isinstance(second[name], PackedCaptions) == ("pack_captions" not in changes)
            with torch.no_grad():
                assert torch.equal(model.encode_text(second[name]), model.encode_text(first[name]))
        assert torch.equal(first["mask_labels"], second["mask_labels"])


def test_the_configuration_of_a_run_is_not_that_of_a_model():
    with pytest.raises(TypeError, match=r"config: expected a ModelConfig, such as Config\(\).model, found a Config"):
        AdaptedCLIP(PRESETS["embedded"])


# ------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_from_a_local_file(tiny, tmp_path, suffix):
    torch.manual_seed(3)
    source = open_clip.CLIP(**TINY_CLIP)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    loaded = build_clip(tiny.replace(pretrained=str(path)))
    for name, tensor in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_named_model_takes_a_local_file(tmp_path, monkeypatch):
    """By open_clip's name of the model, the way a downloaded checkpoint is used; position embedding resized."""
    directory = tmp_path / "configs"
    directory.mkdir()
    (directory / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(directory)
    source = open_clip.CLIP(**TINY_CLIP)
    save_file(source.state_dict(), tmp_path / "clip.safetensors")
    config = ModelConfig(model="tiny-clip", pretrained=str(tmp_path / "clip.safetensors"), image_size=(48, 16))
    clip = AdaptedCLIP(config).clip
    assert torch.equal(clip.visual.conv1.weight, source.visual.conv1.weight)
    assert clip.visual.positional_embedding.shape == (1 + 6 * 2, 32)


def test_a_tag_without_a_network_is_explained(monkeypatch):
    """Without a network there are no minutes of retries: the hub's library is told that it is offline."""
    seen = []

    def refuse(*args, **kwargs):
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", refuse)
    config = ModelConfig(model="ViT-B-32-quickgelu", pretrained="openai", image_size=(224, 224))
    for online, message in (
        (False, "could not be downloaded: https://.* cannot be reached"),
        (True, "no route to host"),
    ):
        monkeypatch.setattr(download, "reachable", lambda url, online=online: online)
        beginning = "'openai' of ViT-B-32-quickgelu are not in .* cache.*"
        with pytest.raises(BackboneError, match=beginning + message):
            build_clip(config)
    assert seen == [True, False] and not constants.HF_HUB_OFFLINE


def test_a_host_that_does_not_answer_is_known_within_seconds(monkeypatch):
    begun = time.monotonic()
    assert not download.reachable("http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not download.reachable("https://huggingface.co")
    assert time.monotonic() - begun < download.TIMEOUT + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="ViT-B-61"), "unknown model 'ViT-B-61'.*similar names: .*ViT-B-16"),
        (dict(model="ViT-B-32", pretrained="laion"), "'laion' of ViT-B-32 is neither a file nor one of its tags"),
        (dict(model="missing.json"), "model configuration missing.json does not exist"),
        (dict(pretrained="missing.pt"), "'missing.pt' of .* is neither a file nor 'none'"),
        (dict(image_size=(48, 7)), "image_size 48×7 is smaller than one patch, 8×8"),
        (dict(model="RN50"), "RN50: the image tower is a ModifiedResNet"),
    ],
)
def test_refused(tiny, change, message):
    with pytest.raises(BackboneError, match=message):
        AdaptedCLIP(tiny.replace(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(depth_lora=4), "depth_lora: 4 is more than the number of blocks of the image tower, 3"),
        (dict(adapter_reduction=33), "adapter_reduction: 33 is more than the width of the image tower, 32"),
    ],
)
def test_methods_without_room_are_refused(tiny, change, message):
    with pytest.raises(MethodError, match=message):
        AdaptedCLIP(tiny.replace(**change))


def test_refused_files(tiny, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('{"embed_dim": 16, "vision')
    with pytest.raises(BackboneError, match="broken.json is not an open_clip model configuration"):
        build_clip(tiny.replace(model=str(broken)))
    other = tmp_path / "other.safetensors"
    save_file({"some.weight": torch.zeros(2)}, other)
    with pytest.raises(BackboneError, match="other.safetensors does not contain weights of this model"):
        build_clip(tiny.replace(pretrained=str(other)))
    cut = tmp_path / "cut.pt"
    torch.save(open_clip.CLIP(**TINY_CLIP).state_dict(), cut)
    cut.write_bytes(cut.read_bytes()[:10_000])
    with pytest.raises(BackboneError, match="cut.pt does not contain weights of this model"):
        build_clip(tiny.replace(pretrained=str(cut)))


def test_another_vocabulary_is_refused(tiny, tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(TINY_CLIP | dict(text_cfg=TINY_CLIP["text_cfg"] | dict(vocab_size=1000))))
    with pytest.raises(BackboneError, match="the vocabulary has 1000 tokens.*the 49408 tokens of CLIP's tokenizer"):
        AdaptedCLIP(tiny.replace(model=str(path)))


@pytest.mark.slow
def test_compiled_blocks_share_their_graphs(tiny):
    """First, middle and last of each tower; batches and captions of any length, evaluation too, without a fallback."""
    model, eager = (stirred(build(tiny)).to(torch.float64) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    model.compile_blocks(backend=counter, fullgraph=True)
    for batch in (4, 3, 4, 2):
        images, tokens = inputs(torch.float64, batch)
        gradients = []
        for each in (model, eager):
            each.zero_grad()
            sdm_loss(each.encode_image(images), each.encode_text(tokens), torch.arange(batch) // 2).backward()
            gradients.append([p.grad for p in each.trained_parameters().values()])
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    trained = counter.frame_count
    assert trained <= 3 * 6  # sizes: the first, any but the batch's, any
    with torch.inference_mode():
        torch.testing.assert_close(model.encode_text(tokens), eager.encode_text(tokens))
        with model.zero_shot(), eager.zero_shot():
            torch.testing.assert_close(model.encode_image(images), eager.encode_image(images))
    assert counter.frame_count <= trained + 6
    assert model.trained_parameters().keys() == eager.trained_parameters().keys()
