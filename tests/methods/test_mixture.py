"""The mixture of adapters: its formula, its routes, the balance loss, and the savings that this loss does not allow."""

import pytest
import torch
from tiny import build, inputs, stirred, tiny_clip, tiny_config, tiny_training, training_of
from torch import nn

from upperson import AdaptedCLIP, Config, preset
from upperson.config.command_line import parse_arguments
from upperson.data.splits import read_splits
from upperson.errors import MethodError
from upperson.losses.balance import balance_loss
from upperson.losses.objective import Objective
from upperson.model.captions import PackedCaptions
from upperson.petl import Mixture, mixture
from upperson.petl.mixture import tallied
from upperson.train.fit import build_model


@pytest.fixture
def tiny(tmp_path):
    """Two blocks a tower, mixtures of four experts."""
    config = tiny_config(tmp_path, tiny_clip(layers=2)).replace(method="dm-adapter")
    return config.replace(experts=4, adapter_reduction=4)


@pytest.fixture(params=["slices", "every expert"])
def path(request, monkeypatch):
    """The ways to compute the experts in float64, each forced."""
    monkeypatch.setattr(mixture, "every_expert", lambda *_: request.param == "every expert")
    return request.param


def random_mixture(dtype=torch.float64, experts=4, chosen=2, unused=True):
    """Random parameters; no token chooses expert 2 if it is `unused`."""
    torch.manual_seed(0)
    module = Mixture(nn.LayerNorm(16), experts, chosen, 8, 0.7).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        if unused:
            module.alpha.fill_(0.4)
            module.task_gate[2] = -9 * module.task.sign()
    return module


def written_out(module, x):
    """The output for a token (C,), and its experts, from the formulas alone."""
    p = dict(module.named_parameters())
    centred = x - x.mean()
    z = centred / (centred.square().mean() + 1e-5).sqrt() * p["norm_weight"] + p["norm_bias"]
    logits = [
        (1 - p["alpha"]) * (own @ z) + p["alpha"] * (task @ p["task"])
        for own, task in zip(p["input_gate"], p["task_gate"], strict=True)
    ]
    experts = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: module.chosen]
    total = sum(logits[e].exp() for e in experts)
    out = 0
    for e in experts:
        hidden = torch.relu(p["down_weight"][e] @ z + p["down_bias"][e])
        out = out + logits[e].exp() / total * (p["up_weight"][e] @ hidden + p["up_bias"][e])
    return module.scale * out, experts


# ---------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_the_formula(path, chosen, dtype=torch.float64, bound=1e-11):
    """Outputs and all gradients. An expert that no token chose gets zeros, not None."""
    module, norm = random_mixture(dtype, chosen=chosen), nn.LayerNorm(16).to(dtype)
    x = torch.randn(2, 9, 16, dtype=dtype).requires_grad_()
    update = torch.randn(2, 9, 16, dtype=dtype)
    y, stream = module.normalise(norm, x, update, None)
    torch.testing.assert_close(y, norm(x + update))
    parts = [written_out(module, token) for token in (x + update).flatten(0, 1)]
    assert 2 not in {e for _, experts in parts for e in experts}
    expected = (x + update) + torch.stack([out for out, _ in parts]).view(x.shape)
    torch.testing.assert_close(stream, expected, rtol=bound, atol=bound)
    wanted = {"x": x, **dict(module.named_parameters())}
    found, defined = (torch.autograd.grad(out.sin().sum(), wanted.values()) for out in (stream, expected))
    for name, a, b in zip(wanted, found, defined, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound, msg=name)
        if name in ("down_weight", "down_bias", "up_weight", "up_bias"):
            assert not a[2].any() and a[0].any(), name


def test_grouped_products_are_those_of_slices(monkeypatch):
    """In bfloat16, of widths that PyTorch's grouped product takes; other widths are sliced."""
    x, found = torch.randn(3, 9, 16).bfloat16().requires_grad_(), []
    for takes in (mixture.takes_grouped, lambda *_: False):
        monkeypatch.setattr(mixture, "takes_grouped", takes)
        module = random_mixture(torch.bfloat16)
        out = module.normalise(nn.LayerNorm(16).bfloat16(), x, None, None)[1]
        found.append([out, *torch.autograd.grad(out.float().sin().sum(), [x, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    monkeypatch.undo()
    rows = torch.empty(4, 8, dtype=torch.bfloat16)
    assert mixture.takes_grouped(rows, rows) and not mixture.takes_grouped(rows[:, :4], rows)
    assert not mixture.takes_grouped(rows[:0], rows) and not mixture.takes_grouped(rows.float(), rows.float())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_as_one_graph(dtype):
    module, norm = random_mixture(dtype), nn.LayerNorm(16).to(dtype)
    x = torch.randn(3, 9, 16, dtype=dtype).requires_grad_()
    found = []
    for call in (module.normalise, torch.compile(module.normalise, backend="aot_eager", fullgraph=True)):
        with tallied([module]):
            out, tally = call(norm, x, None, None)[1], module.tallied_routes()
        loss = out.float().sin().sum() + tally[0].square().sum()
        found.append([out, tally, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 3e-2
        assert (a - b).norm() <= bound * b.norm()  # one ReLU may turn where PyTorch rounds in another order


def test_gradients_are_those_of_finite_differences(path):
    module = random_mixture(unused=False)
    x = torch.randn(5, 16, dtype=torch.float64).requires_grad_()

    def call(x, *_):
        return module.normalise(nn.LayerNorm(16).double(), x, None, None)[1]

    assert torch.autograd.gradcheck(call, (x, *module.parameters()), fast_mode=True)


def test_frozen_factors_leave_the_others_their_gradients(path):
    x, norm = torch.randn(5, 16, dtype=torch.float64), nn.LayerNorm(16).double()
    for frozen in ("down_weight", "up_weight", "norm_weight"):
        gradients = []
        for freezes in (False, True):
            module = random_mixture()
            getattr(module, frozen).requires_grad_(not freezes)
            module.normalise(norm, x, None, None)[1].sin().sum().backward()
            gradients.append({name: p.grad for name, p in module.named_parameters()})
        assert gradients[1].pop(frozen) is None
        for name, gradient in gradients[1].items():
            torch.testing.assert_close(gradient, gradients[0][name], msg=name)


def test_a_route_depends_on_the_token_alone(path):
    """In another order and among others, each token has the same output to the bit; and so it has in each run."""
    module, order = random_mixture(), torch.randperm(40)
    x = torch.randn(40, 16, dtype=torch.float64)

    def call(x):
        return module.normalise(nn.LayerNorm(16).double(), x, None, None)[1]

    torch.testing.assert_close(call(x[order]), call(x)[order], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(call(x[:7]), call(x)[:7], rtol=1e-13, atol=1e-13)
    assert torch.equal(call(x), call(x))
    assert call(x[:0]).shape == (0, 16)


def test_equal_logits_choose_the_first_experts(path):
    module = random_mixture()
    with torch.no_grad():
        module.input_gate.zero_()
        module.task_gate.zero_()
    x = torch.randn(3, 16, dtype=torch.float64)
    with tallied([module]):
        module.normalise(nn.LayerNorm(16).double(), x, None, None)
        assert module.tallied_routes().tolist() == [[0.75] * 4, [3, 3, 0, 0]]


def test_initial_values(tiny):
    """Training starts at the backbone: the up projections are zero."""
    model, (images, tokens) = build(tiny), inputs()
    for name, parameter in model.trained_parameters().items():
        leaf, values = name.rsplit(".", 1)[1], parameter.detach()
        if leaf in ("up_weight", "up_bias", "down_bias", "norm_bias"):
            assert not values.any()
        elif leaf in ("norm_weight", "alpha"):
            assert torch.all(values == (1 if leaf == "norm_weight" else 0.5))
        elif leaf == "down_weight":
            assert values.abs().max() <= 32**-0.5 and 0.09 < values.std() < 0.12
            assert not torch.equal(values[0], values[1])
        else:
            assert 0.5 < values.std() / (1 if leaf == "task" else 0.02) < 1.5
    with torch.no_grad(), model.zero_shot():
        expected = model.encode_image(images), model.encode_text(tokens)
    for found, wanted in zip((model.encode_image(images), model.encode_text(tokens)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [False, True])
def test_under_autocast_parameters_and_gradients_stay_in_float32(tiny, kept):
    """And the result comes close to that of float32."""
    images, tokens = inputs()
    batch = dict(images=images, captions=tokens, person_ids=torch.arange(4))
    goal = Objective("sdm+0.5*balance", 0.02, 16, 49408, ())
    exact, _ = goal(stirred(build(tiny), scale=0.05), batch)
    model = stirred(build(tiny), scale=0.05)
    if kept:
        model.keep_frozen_weights(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = goal(model, batch)
    assert loss.item() == pytest.approx(exact.item(), rel=0.1) and parts["balance"].dtype == torch.float32
    loss.backward()
    for name, parameter in model.trained_parameters().items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


# ---------------------------------------------------------------------------------------- the balance loss


def test_the_balance_loss_is_that_of_its_definition(tiny):
    """Over all tokens of both towers, of padding too, in every block; the softmax is over all logits."""
    images, tokens = inputs(torch.float64)
    model = stirred(build(tiny).double())
    logits_of = {}
    for tower, blocks in model.towers.items():
        for i, block in enumerate(blocks):

            def kept(z, key=(tower, i), real=block.adapter_mlp.logits):
                return logits_of.setdefault(key, real(z))

            block.adapter_mlp.logits = kept
    batch = dict(images=images, captions=tokens, person_ids=torch.arange(4))
    total, losses = Objective("sdm+0.5*balance", 0.02, 16, 49408, ())(model, batch)
    assert total.item() == pytest.approx(losses["sdm"].item() + 0.5 * losses["balance"].item())
    expected = 0
    for (tower, _), logits in logits_of.items():
        assert len(logits) == 4 * (13 if tower == "image" else 12)  # padding, and every token of the last block
        probabilities, chosen = logits.softmax(1), logits.topk(2, dim=1).indices
        for e in range(4):
            expected = expected + probabilities[:, e].mean() * (chosen == e).sum() / len(logits)
    torch.testing.assert_close(losses["balance"], expected)
    assert all(block.adapter_mlp.tally is None for block in model.blocks())  # no graph is kept
    gates = [block.adapter_mlp.input_gate for block in model.blocks()]
    found, defined = (torch.autograd.grad(x, gates, retain_graph=True) for x in (losses["balance"], expected))
    for a, b in zip(found, defined, strict=True):
        torch.testing.assert_close(a, b)


def test_a_balanced_block_has_the_share_of_chosen_experts():
    tallies = torch.tensor([[[2.5] * 4, [5.0] * 4]])  # of ten tokens
    assert balance_loss(tallies, 2).item() == pytest.approx(2 / 4)
    assert balance_loss(tallies.repeat(3, 1, 1), 2).item() == pytest.approx(3 * 2 / 4)
    assert balance_loss(torch.tensor([[[10.0, 0, 0, 0], [10.0, 10, 0, 0]]]), 2).item() == pytest.approx(1)


def test_two_passes_are_tallied_together(tiny):
    """With mlm, the text tower computes masked and unmasked captions."""
    _, tokens = inputs(torch.float64)
    model = stirred(build(tiny).double())
    with model.computing_losses() as mixtures:
        model.encode_text(tokens)
        once = mixtures[-1].tallied_routes()
        model.encode_text(tokens)
        torch.testing.assert_close(mixtures[-1].tallied_routes(), 2 * once)
        with pytest.raises(RuntimeError, match="expected a pass of the block in a context tallied"):
            mixtures[0].tallied_routes()  # of the image tower


# ---------------------------------------------------------------------------------------- the savings


def test_savings_are_off_where_gradients_are_computed(tiny):
    _, tokens = inputs()
    model = build(tiny)
    assert not model.saves("skip_unread") and model.caption_packer()(tokens) is tokens
    with torch.no_grad():
        assert model.saves("skip_unread") and isinstance(model.caption_packer()(tokens), PackedCaptions)
        saved = model.encode_text(tokens)
        whole = build(tiny.replace(skip_unread=False, pack_captions=False))
        assert not whole.saves("skip_unread") and whole.caption_packer()(tokens) is tokens
        torch.testing.assert_close(whole.encode_text(tokens), saved, rtol=1e-5, atol=1e-6)
        batch = dict(images=inputs()[0], captions=tokens, person_ids=torch.arange(4))
        without = Objective("sdm+balance", 0.02, 16, 49408, ())(model, batch)[1]
    with_gradients = Objective("sdm+balance", 0.02, 16, 49408, ())(model, batch)[1]
    for name, loss in with_gradients.items():  # of all tokens in both
        torch.testing.assert_close(without[name], loss)
    other = build(tiny.replace(method="up-person"))
    assert other.saves("skip_unread") and other.saves("pack_captions")


@pytest.mark.parametrize("switch", ["skip_unread", "pack_captions"])
def test_a_saving_that_would_change_the_training_is_refused_by_hand(switch, capsys, tmp_path):
    flag, config = "--" + switch.replace("_", "-"), preset("embedded", "dm-adapter")
    message = f"{switch}: true is not allowed, since it would change the training of method dm-adapter"
    with pytest.raises(ValueError, match=message):
        config.replace(**{switch: True})
    with pytest.raises(SystemExit):
        parse_arguments(["--method", "dm-adapter", flag])
    assert message in capsys.readouterr().err
    (tmp_path / "c.json").write_text(Config().replace(**{switch: True}).to_json())
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "c.json"), "--method", "dm-adapter"])
    assert message in capsys.readouterr().err
    for value, flags in ((False, ["--no-" + flag[2:]]), (None, [])):
        assert getattr(parse_arguments(["--method", "dm-adapter", *flags]).model, switch) is value
    assert getattr(parse_arguments([flag]).model, switch) is True


def test_a_training_sees_padded_captions(tmp_path):
    config = tiny_training(tmp_path, "dm-adapter", run_dir=tmp_path / "run")
    training = training_of(config, AdaptedCLIP(config.model), read_splits(config.data))
    batch = next(iter(training.batches))
    assert batch["captions"].shape == (8, 24)
    measured = training.step(batch)
    assert measured["loss"] == pytest.approx(measured["loss_sdm"] + 0.5 * measured["loss_balance"], rel=1e-6)
    assert 0.9 * 4 * 2 / 6 < measured["loss_balance"] < 4 * 2 / 6 * 2
    training.log.close()


def test_where_the_balance_loss_is_not_defined(tiny, tmp_path):
    images, tokens = inputs()
    batch = dict(images=images, captions=tokens, person_ids=torch.arange(4))
    goal = Objective("sdm+balance", 0.02, 16, 49408, ())
    model = build(tiny)
    with pytest.raises(ValueError, match="balance: expected a model whose tokens choose among experts"):
        goal(build(tiny.replace(method="cskt", prompt_length=1)), batch)
    with torch.no_grad():
        packed = model.pack_captions(tokens)
    with pytest.raises(ValueError, match="these losses read padding; expected padded captions, found packed ones"):
        goal(model, batch | dict(captions=packed))
    config = tiny_training(tmp_path, losses="sdm+balance")
    with pytest.raises(MethodError, match="losses: balance needs experts .* method up-person has none"):
        build_model(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(chosen_experts=7), "chosen_experts: 7 is not allowed; it must be at most experts, which is 6"),
        (dict(experts=1), "chosen_experts: 2 is not allowed; it must be at most experts, which is 1"),
        (dict(experts=0), "experts: 0 is not allowed; it must be at least 1"),
        (dict(chosen_experts=2.0), "chosen_experts: 2.0 is not allowed; expected a whole number"),
    ],
)
def test_options_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        preset("embedded", "dm-adapter").replace(**changes)


def test_an_adapter_narrower_than_one(tiny):
    with pytest.raises(MethodError, match="adapter_reduction: 33 is more than the width of the image tower, 32"):
        AdaptedCLIP(tiny.replace(adapter_reduction=33))
