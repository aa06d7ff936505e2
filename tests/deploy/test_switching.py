"""Several adaptations of one backbone: each computes what its checkpoint does alone, and none disturbs another."""

import copy
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY_CLIP, build, inputs, stirred, tiny_config

from upperson.config import Config
from upperson.deploy.switching import Adaptations
from upperson.errors import CheckpointError, RunError
from upperson.model import AdaptedCLIP
from upperson.model.checkpoint import load_model, save_checkpoint

CONFIGURATIONS = {
    "cuhk": dict(),
    "icfg": dict(prefix_length=5, lora_rank=4, depth_prefix=1, depth_lora=2, depth_adapter=1),
    "rstp": dict(prefix="vanilla", lora="dora", adapter_attn="sequential", adapter_mlp="ln-tuning"),
    "logits": dict(lora="none", adapter_attn="none", scale_target="logits", adapter_reduction=8),
    "nothing": dict(method="zero-shot"),
}


@pytest.fixture
def tiny(tmp_path):
    """A tiny CLIP in a file."""
    torch.manual_seed(5)
    save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), tmp_path / "clip.safetensors")
    return tiny_config(tmp_path, pretrained=str(tmp_path / "clip.safetensors"))


def checkpoint(path, config, seed=0):
    save_checkpoint(path, stirred(build(config, seed), seed).trained_parameters(), Config(config), {})
    return path


@pytest.fixture
def files(tmp_path, tiny):
    """A checkpoint of each of CONFIGURATIONS, all of one backbone."""
    return {
        name: checkpoint(tmp_path / f"{name}.safetensors", tiny.replace(**changes), seed)
        for seed, (name, changes) in enumerate(CONFIGURATIONS.items())
    }


@pytest.fixture
def adaptations(tiny, files):
    adaptations = Adaptations(AdaptedCLIP(tiny.replace(method="zero-shot")))
    for name, path in files.items():
        adaptations.add(name, path)
    return adaptations


@torch.no_grad()
def features(model):
    images, tokens = inputs()
    return torch.stack([model.encode_image(images), model.encode_text(tokens)])


def test_each_is_its_checkpoint_alone_whatever_was_in_use_before(adaptations, files):
    model = adaptations.model
    alone = {name: load_model(path) for name, path in files.items()}
    original = features(model)
    assert adaptations.active == "original" and adaptations.names == ("original", *files)
    assert torch.equal(original, features(alone["nothing"]))
    for name in (*files, *reversed(files), "cuhk", "rstp", "cuhk"):
        adaptations.use(name)
        assert adaptations.active == name and model.config == alone[name].config
        assert torch.equal(features(model), features(alone[name])), name
        ours, theirs = model.trained_parameters(), alone[name].trained_parameters()
        assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert {id(p) for p in ours.values()} == {id(p) for p in model.parameters() if p.requires_grad}
        with model.zero_shot():
            assert torch.equal(features(model), original)
    adaptations.use("original")
    assert torch.equal(features(model), original) and not model.config.method.trains
    every = [features(each) for each in alone.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])


@pytest.mark.slow
def test_a_model_with_modules_of_its_own_gets_them_back(files):
    model = load_model(files["cuhk"])
    expected, adaptations = features(model), Adaptations(model)
    adaptations.add("rstp", files["rstp"])
    assert torch.equal(features(model), expected)  # adding changes nothing
    adaptations.use("rstp")
    assert not torch.equal(features(model), expected)
    adaptations.use("original")
    assert torch.equal(features(model), expected)


def test_references_are_exchanged_and_nothing_is_copied(adaptations, files):
    """The backbone's tensors and each adaptation's are the same objects before and after; so is randomness."""
    model, state = adaptations.model, torch.get_rng_state()

    def storage(parameters):
        return {name: (id(parameter), parameter.data_ptr()) for name, parameter in parameters}

    backbone = storage(model.clip.named_parameters())
    found = []
    for name in (*files, *files):
        adaptations.use(name)
        found.append(storage(model.trained_parameters().items()))
        present = storage(model.clip.named_parameters())
        assert {name: present[name] for name in backbone} == backbone
        assert len(present) == len(backbone) + len(model.trained_parameters())
    assert found[: len(files)] == found[len(files) :]
    adaptations.add("again", files["cuhk"])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_dtype_of_the_backbone_is_kept(tiny, files):
    model = AdaptedCLIP(tiny.replace(method="zero-shot")).double()
    adaptations = Adaptations(model)
    adaptations.add("rstp", files["rstp"])
    adaptations.add("cuhk", files["cuhk"])
    for name, dtype in (("rstp", torch.float64), ("cuhk", torch.bfloat16), ("rstp", torch.float32)):
        model.to(dtype)
        adaptations.use(name)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.encode_image(inputs(dtype)[0]).dtype == dtype


@pytest.mark.slow
def test_only_what_is_in_use_is_trained(adaptations):
    adaptations.use("icfg")
    before = {name: parameter.detach().clone() for name, parameter in adaptations.model.trained_parameters().items()}
    adaptations.use("rstp")
    images, tokens = inputs()
    (adaptations.model.encode_image(images) * adaptations.model.encode_text(tokens)).sum().backward()
    assert all(parameter.grad is not None for parameter in adaptations.model.trained_parameters().values())
    adaptations.use("icfg")
    for name, parameter in adaptations.model.trained_parameters().items():
        assert parameter.grad is None and torch.equal(parameter, before[name])


@pytest.mark.slow
def test_the_backend_is_that_of_the_model(tiny, files):
    adaptations = Adaptations(AdaptedCLIP(tiny.replace(backend="auto")))
    adaptations.add("cuhk", files["cuhk"])
    adaptations.use("cuhk")
    assert adaptations.model.config == tiny.replace(backend="auto")


@pytest.mark.slow
def test_a_backbone_that_lay_elsewhere(tmp_path, tiny, files, adaptations):
    moved = str(shutil.copy(tiny.pretrained, tmp_path / "moved.safetensors"))
    path = checkpoint(tmp_path / "other.safetensors", tiny.replace(pretrained=moved))
    with pytest.raises(CheckpointError, match=f"of another backbone, pretrained: {moved}, not {tiny.pretrained} as"):
        adaptations.add("moved", path)
    adaptations.add("moved", path, pretrained=tiny.pretrained)
    adaptations.use("moved")
    assert torch.equal(features(adaptations.model), features(load_model(path)))


def test_refused(tmp_path, tiny, files, adaptations):
    """With everything that was there before still in place."""
    other = tiny.replace(model="embedded", pretrained="none", image_size=(32, 32))
    full = tiny.replace(method="full")
    random = tiny.replace(pretrained="none")
    damaged = tmp_path / "damaged.safetensors"
    save_checkpoint(damaged, {"image.blocks.0.lora.key_up": torch.zeros(2)}, Config(tiny), {})
    adaptations.use("icfg")
    expected = features(adaptations.model)
    for path, message in (
        (
            checkpoint(tmp_path / "other.safetensors", other),
            rf"another backbone, model: embedded, not {tiny.model}; pretrained: none, not {tiny.pretrained}; "
            r"image_size: \(32, 32\), not \(48, 16\) as in the model",
        ),
        (checkpoint(tmp_path / "full.safetensors", full), "full.safetensors: a checkpoint of method 'full'"),
        (damaged, r"damaged.safetensors: .* missing: .*; 1 of another shape: image.blocks.0.lora.key_up \(2,\)"),
        (tmp_path / "nowhere.safetensors", "nowhere.safetensors: there is no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            adaptations.add("new", path)
    with pytest.raises(CheckpointError, match="the name 'rstp' is in use; names in use are original, cuhk, icfg, rstp"):
        adaptations.add("rstp", files["cuhk"])
    with pytest.raises(CheckpointError, match="unknown adaptation 'new'; expected one of original, cuhk, icfg, rstp"):
        adaptations.use("new")
    assert adaptations.active == "icfg" and torch.equal(features(adaptations.model), expected)
    with pytest.raises(CheckpointError, match="method 'full' has changed the model's backbone"):
        Adaptations(AdaptedCLIP(full))
    with pytest.raises(CheckpointError, match="a checkpoint with pretrained 'none'; its random weights may differ"):
        Adaptations(AdaptedCLIP(random)).add("new", checkpoint(tmp_path / "random.safetensors", random))


def test_no_features_are_mixed_between_threads(adaptations, files):
    """What a thread computes is that of one adaptation, its own if it has chosen one, or an error."""
    model = adaptations.model
    expected = {}
    for name in ("cuhk", "rstp"):
        adaptations.use(name)
        expected[name] = features(model)
    outcomes = {name: [] for name in ("cuhk", "rstp", "neither")}

    def work(name):
        for _ in range(25):
            try:
                if name != "neither":
                    adaptations.use(name)
                found = features(model)
                own = [kind for kind, each in expected.items() if torch.equal(found, each)]
                outcomes[name].append(own[0] if own else "mixed")
            except RunError:
                outcomes[name].append("refused")

    threads = [threading.Thread(target=work, args=[name]) for name in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes["cuhk"]) <= {"cuhk", "refused"} and set(outcomes["rstp"]) <= {"rstp", "refused"}
    assert all(len(each) == 25 for each in outcomes.values())
    adaptations.use("cuhk")  # no thread is left that computes
    assert torch.equal(features(model), expected["cuhk"])


def test_threads_wait_for_their_turn(adaptations):
    """Under `using` nothing is refused, and each thread computes what its adaptation computes alone."""
    model, expected = adaptations.model, {}
    for name in ("cuhk", "rstp", "nothing"):
        with adaptations.using(name) as same:
            assert same is model and adaptations.active == name
            expected[name] = features(model)
    wrong, begun = [], threading.Barrier(6)

    def work(name):
        begun.wait(10)
        for _ in range(15):
            try:
                with adaptations.using(name):
                    if not torch.equal(features(model), expected[name]):
                        wrong.append(name)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=[name]) for name in (*expected, *expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and wrong == []


def test_threads_of_one_adaptation_compute_at_once_and_others_are_served_in_order(adaptations):
    inside, leave, order = threading.Barrier(3), threading.Event(), []

    def work(name, waits):
        with adaptations.using(name):
            order.append(name)
            if waits:
                inside.wait(10)
                leave.wait(10)

    first = [threading.Thread(target=work, args=["cuhk", True]) for _ in range(2)]
    for thread in first:
        thread.start()
    inside.wait(10)  # both are inside at once
    second = []
    for number, name in enumerate(("rstp", "cuhk", "icfg"), 1):  # a newcomer for cuhk does not overtake rstp
        second.append(threading.Thread(target=work, args=[name, False]))
        second[-1].start()
        while len(adaptations._waiting) < number:
            time.sleep(0.001)
    assert order == ["cuhk", "cuhk"]
    leave.set()
    for thread in (*first, *second):
        thread.join(10)
    assert order == ["cuhk", "cuhk", "rstp", "cuhk", "icfg"]


def test_errors_within_using_leave_the_turn(adaptations, monkeypatch):
    with pytest.raises(CheckpointError, match="unknown adaptation 'new'"), adaptations.using("new"):
        pass
    with pytest.raises(KeyError), adaptations.using("cuhk"):
        raise KeyError
    with adaptations.using("cuhk"), adaptations.using("cuhk"):  # the same within itself
        with pytest.raises(RunError, match="using 'rstp' within using 'cuhk' would wait"), adaptations.using("rstp"):
            pass
        adaptations.model.encode_text(inputs()[1])
    with monkeypatch.context() as patch:  # another thread computes without a turn
        patch.setitem(adaptations.model.turns.computing, -1, 1)
        with pytest.raises(RunError, match="while another thread computes"), adaptations.using("rstp"):
            pass
    with adaptations.using("rstp"):
        assert adaptations.active == "rstp"
    assert not adaptations._waiting and adaptations._computing == 0


class Elsewhere:
    """Another thread, which runs one function after the other."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, work, *arguments):
        return self.pool.submit(work, *arguments).result(10)


def test_a_switch_is_refused_while_another_thread_computes(adaptations, monkeypatch):
    model, elsewhere, said = adaptations.model, Elsewhere(), []
    adaptations.use("cuhk")
    stream = AdaptedCLIP.image_stream

    def interrupted(*arguments, **options):
        for work in (adaptations.use, lambda _: model.zero_shot().__enter__()):
            with pytest.raises(RunError, match="while another thread computes with the model, would mix features"):
                elsewhere(work, "rstp")
            said.append(work)
        with model.zero_shot():  # this thread knows what it does
            pass
        elsewhere(features, alone)  # and other models are none of its business
        return stream(*arguments, **options)

    alone = build(model.config)
    with monkeypatch.context() as patch:
        patch.setattr(model, "image_stream", lambda *arguments, **options: interrupted(model, *arguments, **options))
        found = features(model)
    assert len(said) == 2 and torch.equal(found, features(model)) and adaptations.active == "cuhk"
    elsewhere(adaptations.use, "rstp")
    with pytest.raises(RunError, match="another thread has switched the adaptation since this thread chose one"):
        features(model)
    adaptations.use("rstp")
    assert torch.equal(features(model), Elsewhere()(features, model))  # a thread that has chosen none


def test_zero_shot_applies_to_the_thread_that_entered_it(adaptations):
    model, elsewhere = adaptations.model, Elsewhere()
    adaptations.use("cuhk")
    adapted = features(model)
    with model.zero_shot():
        with model.zero_shot():
            original = features(model)
        assert torch.equal(features(model), original) and not torch.equal(original, adapted)
        for work in (features, model_tokens):
            with pytest.raises(RunError, match="zero_shot.. is active in another thread"):
                elsewhere(work, model)
        for work in (lambda: adaptations.use("rstp"), lambda: model.zero_shot().__enter__()):
            with pytest.raises(RunError, match="would mix features"):
                elsewhere(work)
    assert torch.equal(features(model), adapted)
    assert torch.equal(elsewhere(features, model), adapted)
    with pytest.raises(KeyError), model.zero_shot():
        raise KeyError
    assert torch.equal(features(model), adapted)


def model_tokens(model):
    images, tokens = inputs()
    return model.encode_image_tokens(images), model.encode_text_tokens(tokens)


def test_a_copy_is_a_model_of_its_own(adaptations):
    adaptations.use("cuhk")
    copies = [copy.deepcopy(adaptations.model), pickle.loads(pickle.dumps(adaptations.model))]
    expected = features(adaptations.model)
    with adaptations.model.zero_shot():
        for each in copies:
            assert torch.equal(Elsewhere()(features, each), expected)
