"""The synthetic data: captions fit the images, every process gets the same, and the small CLIP is above chance."""

import copy
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import typing
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2.functional import normalize

from upperson.config import DataConfig, EmbeddedDataset
from upperson.data.samples import Sample, gallery, queries
from upperson.data.splits import read_splits
from upperson.embedded.dataset import read_embedded, read_scenes
from upperson.embedded.identities import Identity, draw_identity
from upperson.embedded.night import Night
from upperson.embedded.pretrain import Scenes, encode_by_length, encode_short_text, learn_spellings, pretrain, respelt
from upperson.embedded.scenes import TOYS, Scene, draw_scene
from upperson.embedded.sentences import LATE_SPELLINGS, MISSPELT, SHOP, WEARERS
from upperson.embedded.vocabulary import COLOURS, HAIR, HAIR_COLOURS, NAMES, PATTERNS
from upperson.embedded.weights import (
    CLIP_CONFIG,
    CLIP_WEIGHTS,
    EmbeddedWeightsError,
    load_embedded_clip,
    save_embedded_clip,
    untrained_embedding,
)
from upperson.model.backbone import fit_image_size

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def data() -> dict[str, list[Sample]]:
    return read_embedded()


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    return load_embedded_clip()


# -- the data set


def fingerprint() -> str:
    digest = hashlib.sha256()
    for domain in typing.get_args(EmbeddedDataset):
        config = DataConfig(domain, embedded_seed=3, embedded_identities=(3, 1, 2), embedded_views=2)
        for split, samples in read_splits(config).items():
            for sample in samples:
                digest.update(f"{split} {sample.caption} {sample.person_id} {sample.image_id}".encode())
                digest.update(sample.image.draw().tobytes())
    for scene in (draw_scene(3, index) for index in range(10)):
        digest.update(scene.caption.encode() + scene.draw().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_same_samples_and_pixels_in_another_process():
    here = Path(__file__)
    command = [sys.executable, "-c", f"import {here.stem}; print({here.stem}.fingerprint())"]
    path = os.pathsep.join([str(here.parent), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300)
    assert other.stdout.split()[-1] == fingerprint()


def test_another_seed_gives_other_samples():
    sizes = {"train": 2, "val": 1, "test": 1}
    assert read_embedded(1, **sizes)["train"] != read_embedded(2, **sizes)["train"]
    assert read_embedded(1, **sizes) == read_embedded(1, **sizes)


def test_sizes(data):
    shape = {split: (len(data[split]), len(gallery(data[split])[0])) for split in SPLITS}
    assert shape == {"train": (4800, 2400), "val": (800, 400), "test": (1600, 800)}
    with pytest.raises(ValueError, match="at least 1"):
        read_embedded(test=0)


def test_no_identity_is_in_two_splits_and_all_look_different(data):
    people = {sample.person_id: (split, sample.image.identity) for split in SPLITS for sample in data[split]}
    assert len(people) == 900
    for sample in data["test"]:
        assert people[sample.person_id] == ("test", sample.image.identity)
    assert len({identity.appearance for _, identity in people.values()}) == 900


def test_people_who_look_alike_are_drawn_again(monkeypatch):
    def twins(rng: random.Random) -> Identity:
        pending[:] = pending or [draw_identity(rng)] * 2
        return pending.pop()

    pending: list[Identity] = []
    monkeypatch.setattr("upperson.embedded.dataset.draw_identity", twins)
    splits = read_embedded(train=3, val=2, test=2, views=1)
    looks = {sample.person_id: sample.image.identity.appearance for split in SPLITS for sample in splits[split]}
    assert len(looks) == len(set(looks.values())) == 7


def test_image_ids_are_unique_over_all_splits(data):
    images = {}
    for split in SPLITS:
        for sample in data[split]:
            assert images.setdefault(sample.image_id, sample.image) == sample.image
    assert len(set(images.values())) == len(images) == 3600


def test_drawings_have_the_right_size_and_differ(data):
    some = gallery(data["train"][:96])[0]
    drawn = [np.asarray(image.draw()) for image in some]
    assert all(picture.shape == (192, 64, 3) and picture.dtype == np.uint8 for picture in drawn)
    assert len({picture.tobytes() for picture in drawn}) == len(drawn)
    assert all(picture.std() > 15 for picture in drawn)


def test_identity_shows_in_the_pixels_of_the_same_view(data):
    one, other = data["train"][0].image, data["train"][8].image
    same_view = replace(other, view=one.view)
    assert np.abs(np.asarray(one.draw(), float) - np.asarray(same_view.draw(), float)).mean() > 3


def test_clothes_have_their_colour(data):
    """In the middle of the chest, seen from behind in even light, a plain garment has its colour."""
    checked = 0
    for sample in data["train"][::8]:
        person, view = sample.image.identity, sample.image.view
        if person.upper.pattern != "plain" or person.upper.kind == "padded jacket" or person.bag:
            continue
        even = replace(view.light, brightness=1, contrast=1, cast=(1, 1, 1), slope=0, noise=0, blur=0)
        bald = replace(person, hair=replace(person.hair, kind="short hair"))
        picture = replace(sample.image, identity=bald, view=replace(view, facing="back", light=even)).draw()
        x, y = round(view.centre) - 4, round(view.feet - 0.66 * view.height)
        assert np.abs(np.subtract(picture.getpixel((x, y)), person.upper.rgb)).max() <= 3
        checked += 1
    assert checked > 20


# -- the other domains


def splits_of(domain: str, seed: int = 0) -> dict[str, list[Sample]]:
    return read_splits(DataConfig(domain, embedded_seed=seed, embedded_identities=(30, 10, 20), embedded_views=3))


@pytest.mark.parametrize("domain", typing.get_args(EmbeddedDataset))
def test_domains(domain):
    """Sizes, ids that no two splits share, and one drawing an image."""
    splits = splits_of(domain)
    images_each, captions_each = (1, 1) if "scenes" in domain else (3, 2)
    person_ids, image_ids = [], []
    for split, identities in zip(SPLITS, (30, 10, 20), strict=True):
        images, owners = gallery(splits[split])
        assert len(images) == len(set(images)) == identities * images_each
        assert len(splits[split]) == len(images) * captions_each
        assert all(isinstance(image, Night) == domain.endswith("-night") for image in images)
        person_ids += sorted(set(owners.tolist()))
        image_ids += [*dict.fromkeys(sample.image_id for sample in splits[split])]
    assert person_ids == list(range(60)) and image_ids == list(range(60 * images_each))
    size = (128, 128) if "scenes" in domain else (64, 192)
    assert {sample.image.draw().size for sample in splits["val"]} == {size}
    assert splits == splits_of(domain) and splits["test"] != splits_of(domain, seed=1)["test"]


def test_the_embedded_set_is_the_first_one():
    """The synthetic people by day never change: published numbers and checkpoints depend on them."""
    splits = splits_of("embedded")
    drawn = read_embedded(train=30, val=10, test=20, views=3)
    assert splits == {split: [Sample(*drawing) for drawing in drawings] for split, drawings in drawn.items()}
    captions = "\n".join(queries(splits["test"])[0])
    assert hashlib.sha256(captions.encode()).hexdigest().startswith("2e585f2e9d0769a1")


def test_at_night_there_are_other_people():
    looks = [
        {sample.image.identity.appearance for sample in splits_of("embedded")["train"]},
        {sample.image.day.identity.appearance for sample in splits_of("embedded-night")["train"]},
    ]
    assert len(looks[0]) == len(looks[1]) == 30 and not looks[0] & looks[1]


def test_scenes_have_captions_of_their_own_and_are_not_those_of_pretraining():
    day, night = splits_of("embedded-scenes"), splits_of("embedded-scenes-night")
    captions = [[sample.caption for split in SPLITS for sample in splits[split]] for splits in (day, night)]
    assert len(set(captions[0])) == len(set(captions[1])) == 60
    seeds = [
        {sample.image.seed for split in SPLITS for sample in day[split]},
        {sample.image.seed for split in SPLITS for sample in night[split]},
        {draw_scene(0, index).seed for index in range(1000)},
    ]
    assert not seeds[0] & seeds[1] and not (seeds[0] | seeds[1]) & seeds[2]


def test_scenes_with_the_caption_of_another_one_are_left_out(monkeypatch):
    """Each scene comes twice, the second time with other pixels."""
    monkeypatch.setattr(
        "upperson.embedded.dataset.draw_scene",
        lambda series, index: replace(draw_scene(series, index // 2), seed=index),
    )
    splits = read_scenes(train=3, val=2, test=2)
    assert [sample.image.seed for split in SPLITS for sample in splits[split]] == [0, 2, 4, 6, 8, 10, 12]


def test_scenes_need_a_size():
    with pytest.raises(ValueError, match="train, val, test must be at least 1, found .600, 0, 200."):
        read_scenes(val=0)


@pytest.mark.parametrize("domain", ["embedded-night", "embedded-scenes-night"])
def test_night_is_dark_bluish_noisy_and_still_shows_what_is_there(domain):
    days, nights = [], []
    for image in gallery(splits_of(domain)["test"])[0]:
        day, night = np.asarray(image.day.draw(), float), np.asarray(image.draw(), float)
        assert night.shape == day.shape
        assert 0.3 < night.mean() / day.mean() < 0.7
        assert night[..., 2].mean() / night[..., 0].mean() > 1.25 * day[..., 2].mean() / day[..., 0].mean()
        assert night.std() < 40
        assert np.array_equal(np.asarray(replace(image).draw(), float), night)
        other = np.asarray(replace(image, seed=image.seed + 1).draw(), float)
        assert np.abs(other - night).mean() > 3
        days.append(day.ravel())
        nights.append(night.ravel())
    # Each picture of the night is more like its own day than like that of any other.
    likeness = np.corrcoef(np.stack(nights), np.stack(days))[: len(days), len(days) :]
    assert (likeness.argmax(axis=1) == np.arange(len(days))).mean() > (0.7 if "scenes" in domain else 0.9)


# -- captions


def colours_in(caption: str) -> set[str]:
    """The colours that a caption names, longest names first, so that "dark blue" is not also "blue"."""
    names = {name: key for key, colour in COLOURS.items() for name in colour.names}
    names |= {name: name for name in HAIR_COLOURS if name not in names}
    found, text = set(), caption.lower()
    for name in sorted(names, key=len, reverse=True):
        text, count = re.subn(rf"\b{name}\b", "", text)
        found |= {names[name]} if count else set()
    return found


def kinds_in(caption: str, of: Mapping[str, tuple[str, ...]] = NAMES) -> list[set[str]]:
    """For each name of a thing in the caption, the kinds of thing that it can mean."""
    names: dict[str, set[str]] = {}
    for kind, words in of.items():
        for name in words:
            names.setdefault(name, set()).add(kind)
    found, text = [], caption.lower()
    for name in sorted(names, key=len, reverse=True):
        text, count = re.subn(rf"\b{name}\b", "", text)
        found += [names[name]] if count else []
    return found


def test_captions_name_only_what_is_visible(data):
    for sample in data["val"]:
        visible = sample.image.visible()
        colours = {colour for item in visible.values() for colour in (item.colour, item.accent) if colour}
        assert colours_in(sample.caption) <= colours, (sample.caption, colours)
        kinds = {item.kind for item in visible.values()}
        for meanings in kinds_in(sample.caption):
            assert meanings & kinds, (sample.caption, kinds)
        patterns = {item.pattern for item in visible.values()}
        for pattern, (adjectives, _) in PATTERNS.items():
            if pattern != "stripes" and any(word in sample.caption for word in adjectives):
                assert pattern in patterns, sample.caption
        if "glasses" in sample.caption:
            assert "glasses" in visible
        if "beard" in sample.caption:
            assert "beard" in visible
        if re.search(r"\b(bald|shaved) head\b", sample.caption):
            assert visible["hair"].kind == "bald"
        if "logo" in sample.caption:
            assert visible["upper"].pattern == "logo" and sample.image.view.facing == "front"


def test_what_a_view_hides_is_not_visible(data):
    images = gallery(data["train"])[0]
    hidden_bags = hidden_glasses = hidden_shoes = 0
    for image in images:
        person, view, visible = image.identity, image.view, image.visible()
        assert "upper" in visible
        assert ("hair" in visible) != (person.hair.kind == "bald" and person.hat is not None)
        if person.bag and person.bag.kind != "backpack" and view.facing == "left":
            assert ("bag" in visible) == (person.bag_hand == 1)
            hidden_bags += "bag" not in visible
        if person.glasses and view.facing == "back":
            assert "glasses" not in visible
            hidden_glasses += 1
        if view.occluded:
            assert "shoes" not in visible
            hidden_shoes += 1
    assert min(hidden_bags, hidden_glasses, hidden_shoes) > 10


@pytest.mark.slow
def test_what_is_visible_is_drawn(data):
    """Taking a visible bag or hat away, or recolouring visible shoes, changes the picture."""
    checked = dict.fromkeys(("bag", "hat", "shoes", "glasses"), 0)
    for image in gallery(data["val"])[0]:
        person, before = image.identity, np.asarray(image.draw(), int)
        green = replace(person.shoes, rgb=(0, 255, 0) if person.shoes.rgb[0] > 100 else (255, 0, 255))
        for part, other in (("bag", None), ("hat", None), ("shoes", green), ("glasses", False)):
            if part in image.visible() and checked[part] < 25:
                after = np.asarray(replace(image, identity=replace(person, **{part: other})).draw(), int)
                changed = (np.abs(after - before).max(axis=2) > 8).sum()
                assert changed > (10 if part == "glasses" else 40), (part, image)
                checked[part] += 1
    assert min(checked.values()) == 25


def test_captions_omit_something_and_vary(data):
    captions = queries(data["train"])[0]
    assert len(set(captions)) > 0.99 * len(captions)
    first_words = {" ".join(caption.lower().split()[:2]) for caption in captions}
    assert len(first_words) > 50
    images = gallery(data["train"])[0]
    shown = sum(len(image.visible()) for image in images) * 2
    named = sum(len(kinds_in(caption)) + ("hair" in caption or "ponytail" in caption) for caption in captions)
    assert 0.5 < named / shown < 0.85


@pytest.mark.slow
def test_captions_are_clean_and_short(data):
    captions = [caption for split in SPLITS for caption in queries(data[split])[0]]
    assert all(re.fullmatch(r"[A-Z][A-Za-z,. :-]+\.", caption) for caption in captions)
    assert not any("  " in caption or " ," in caption or " a a" in caption for caption in captions)
    tokens = open_clip.SimpleTokenizer()(captions)
    assert tokens[:, -1].max() == 0  # none was cut off at 77 tokens
    assert (tokens.argmax(dim=-1) >= 6).all()  # at least five words or marks


# -- pretraining


# The commonest words of captions of pedestrian photographs, with their frequency per million words: 18,470 captions of
# CUHK-PEDES. The mean number of words of these captions is 23.5, its standard deviation 7.8.
WORDS = [line.split(",")[0] for line in Path(__file__).with_name("words.csv").read_text().splitlines()[1:]]
REAL_MEAN, REAL_DEVIATION = 23.5, 7.8

# The words of scenes that are not among the commonest: toys, shops, and misspelt words.
FURTHER_WORDS = """
accessories added balloon bandana bench bending bigger bin bird blac blanket blouses board bought braided brought buy
buyer came cannot carefully chair checks clipped clogs closer closes cold crate crest crew crocs crossbody dancer
descends describe directions display don't drinks earphones eat else employee empty far find first fish folders
forearms freely fresh gift golf gowns guy's hangers hidden horse hurried indoors japanese jean's jerseys jewelry
jumpsuits kept know lady's lights likely listens mirror model most motorcycle moves mug music nearby neat need neither
nobody none nor notes now numbers nylons office once ones opens our owner padded padding palm par parasol pare passed
peep pen perfect pile pinstripes posture puffer quiet racket rectangle rims rips robes row rug run sailing sale say
scooped sell seller sells sharp shelf shelves shoe's shops shot silk since sits sizes slicked slips slow snapped
speaks station stepped stilettos stood stopped stubble such suits take taken teens texting then these think thirties
tiled today tongue took toy try tunics turn tuxedos unclear underwear uniforms use used vertically waited wants wearer
weighs when where whole whose wig will wool wore would writers wth yard
"""


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(0, index) for index in range(6000)]


def words_of(caption: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", caption.lower())


def test_captions_are_as_long_as_real_ones(data):
    lengths = np.array([len(caption.replace(",", "").split()) for caption in queries(data["train"])[0]])
    assert abs(lengths.mean() - REAL_MEAN) < 1.5 and abs(lengths.std() - REAL_DEVIATION) < 1.5


def test_captions_use_the_words_of_real_ones(data):
    used, commonest = [word for caption in queries(data["test"])[0] for word in words_of(caption)], set(WORDS[:1000])
    assert np.mean([word in commonest for word in used]) > 0.97


def test_scenes_use_the_words_of_real_captions_and_a_few_more(scenes):
    used = {word for scene in scenes for word in words_of(scene.caption)}
    assert used - set(WORDS) <= set(FURTHER_WORDS.split())
    assert len(used & set(WORDS[:1000])) > 950


def test_sentences_name_no_colour_as_if_it_were_there():
    """A sentence around a scene names a colour or an item only to say that it is absent, elsewhere or somebody's."""
    for sentence in (*WEARERS, *SHOP):
        denied = re.search(
            r"\b(no|not|none|nothing|neither|nobody|without|never|sells?|shop|store|elsewhere)\b", sentence, re.I
        )
        named = colours_in(re.sub(r"\b\w+ (skinned|hair|beard)\b|\bgray beard\b", "", sentence))
        assert denied or not named, sentence


def test_scenes_name_only_what_is_visible(scenes):
    """Without the sentences around it, a caption names the colours and kinds of its scene only."""
    misspelt = {word for spellings in MISSPELT.values() for spelling in spellings for word in words_of(spelling)} - {
        "a"
    }
    for scene in scenes[:1500]:
        text = scene.caption
        if misspelt & set(words_of(text)):
            continue
        for sentence in (*WEARERS, *SHOP):
            text = text.replace(sentence, "")
        items = scene.items()
        colours = {colour for item in items for colour in (item.colour, item.accent) if colour}
        assert colours_in(text) <= colours, (scene.caption, colours)
        kinds = {item.kind for item in items}
        names = NAMES | TOYS
        for meanings in kinds_in(text, names):
            assert meanings & kinds, (scene.caption, kinds)


def test_no_scene_shows_a_person(scenes, monkeypatch):
    def no_figure(*_):
        raise AssertionError("a scene draws a person")

    monkeypatch.setattr("upperson.embedded.pedestrians.draw_figure", no_figure)
    monkeypatch.setattr("upperson.embedded.figure._Figure", no_figure)
    assert {scene.draw().size for scene in scenes[:40]} == {(128, 128)}
    kinds = {item.kind for scene in scenes for item in scene.items()}
    assert kinds == {*NAMES, *TOYS, *HAIR} - {"bald"}


def test_man_and_woman_are_said_where_the_view_shows_it(data):
    counts = dict.fromkeys(("man", "woman", "person"), 0)
    for sample in data["train"]:
        said, image = sample.image.looks_like(), sample.image
        counts[said] += 1
        female = bool(re.search(r"\b(woman|lady|female|she|her)\b", sample.caption.lower()))
        male = bool(re.search(r"\b(man|guy|male|gentleman|he|his)\b", sample.caption.lower()))
        assert (female, male) in {
            "woman": ((True, False), (False, False)),
            "man": ((False, True), (False, False)),
            "person": ((False, False),),
        }[said], sample.caption
        assert said != "woman" or image.identity.woman
        assert said != "man" or not image.identity.woman
    assert min(counts.values()) > 0.1 * sum(counts.values()), counts


def test_scenes_as_tensors():
    pictures, tokens = Scenes(seed=0, count=4)[3]
    assert pictures.shape == (3, 128, 128) and pictures.dtype == torch.uint8
    assert tokens.shape == (77,) and tokens.max() == 49407


def test_short_text_is_the_same_text(clip):
    texts = ["a blue t-shirt with white stripes and black shoes", "a red coat", "shoes", "a blue coat", "black shoes"]
    tokens = open_clip.SimpleTokenizer()(texts)
    with torch.no_grad():
        full = clip.encode_text(tokens)
        for short in (encode_short_text(clip, tokens), encode_by_length(clip, tokens)):
            torch.testing.assert_close(short, full, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_pretraining_learns_and_repeats():
    random.seed(0)
    first, tokens = pretrain(seed=5, steps=3, batch_size=8, learning_rate=1e-3, workers=0)
    random.seed(1)
    second, _ = pretrain(seed=5, steps=3, batch_size=8, learning_rate=1e-3, workers=0)
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert {49406, 49407} <= tokens


def test_late_spellings_are_learned_alone(clip):
    """Two tokens change; a known token of a spelling and all other weights do not."""
    learning, tokenizer = copy.deepcopy(clip).train(), open_clip.SimpleTokenizer()
    with torch.no_grad():
        learning.token_embedding.weight.copy_(untrained_embedding(*clip.token_embedding.weight.shape))
    before = copy.deepcopy(learning.state_dict())
    known = {tokenizer.encode("it")[0], tokenizer.encode("don't")[1]}
    captions = (draw_scene(1, index).caption for index in itertools.count())
    new = learn_spellings(learning, captions, known, steps=2)
    assert new == {token for word in LATE_SPELLINGS.values() for token in tokenizer.encode(word)} - known
    after = learning.state_dict()
    changed = (after["token_embedding.weight"] != before["token_embedding.weight"]).any(dim=1).nonzero().flatten()
    assert set(changed.tolist()) == new and len(new) == 2
    assert all(torch.equal(after[name], before[name]) for name in before if name != "token_embedding.weight")


# -- the shipped weights


def test_weights_are_small_and_fit_open_clip(clip):
    assert CLIP_WEIGHTS.stat().st_size < 5_000_000
    fresh = open_clip.CLIP(**json.loads(CLIP_CONFIG.read_text()))
    fresh.load_state_dict(clip.state_dict(), strict=True)
    for tensor in clip.state_dict().values():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
    stored = load_file(CLIP_WEIGHTS)
    rows = clip.token_embedding.weight[stored["token_embedding.ids"].long()]
    assert torch.equal(rows, stored["token_embedding.rows"].float())
    assert 49407 in stored["token_embedding.ids"]


def test_the_commonest_words_are_trained(clip):
    """Every token of at least 1,000 words has moved by more than half of its random start."""
    tokenizer = open_clip.SimpleTokenizer()
    trained = clip.token_embedding.weight.detach()
    start = untrained_embedding(*trained.shape)
    moved = ((trained - start).norm(dim=1) > 0.5 * start.norm(dim=1)).tolist()
    known = [all(moved[token] for token in tokenizer.encode(word)) for word in WORDS]
    assert all(known[:1000])


def test_captions_in_late_spellings_mean_the_same(clip):
    captions = [draw_scene(1, index).caption for index in range(1500)]  # the CLIP was trained on series 0
    changed = [caption for caption in captions if respelt(caption) != caption]
    assert all(any(spelling in respelt(caption) for caption in changed) for spelling in LATE_SPELLINGS.values())
    tokenizer = open_clip.SimpleTokenizer()
    with torch.no_grad():
        written, spelt = (encode_short_text(clip, tokenizer(texts)) for texts in (changed, [*map(respelt, changed)]))
    assert F.cosine_similarity(written, spelt).min() > 0.95


def test_saved_weights_come_back(tmp_path, clip):
    path = tmp_path / "clip.safetensors"
    save_embedded_clip(clip, load_file(CLIP_WEIGHTS)["token_embedding.ids"].tolist(), path)
    assert load_file(path).keys() == load_file(CLIP_WEIGHTS).keys()
    for name, tensor in load_embedded_clip(path).state_dict().items():
        assert torch.equal(tensor, clip.state_dict()[name]), name


def test_damaged_weights_say_how_to_make_them_again(tmp_path):
    path = tmp_path / "clip.safetensors"
    rebuild = r"python -m upperson\.embedded\.pretrain"
    with pytest.raises(EmbeddedWeightsError, match=rf"clip\.safetensors is missing.*{rebuild}"):
        load_embedded_clip(path)
    path.write_bytes(CLIP_WEIGHTS.read_bytes()[:-1000])
    with pytest.raises(EmbeddedWeightsError, match=rf"clip\.safetensors is damaged.*{rebuild}"):
        load_embedded_clip(path)
    tensors = load_file(CLIP_WEIGHTS)
    for change in ({"logit_scale": None}, {"visual.proj": torch.zeros(2, 2)}, {"token_embedding.ids": None}):
        kept = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(kept, path)
        with pytest.raises(EmbeddedWeightsError, match=rebuild):
            load_embedded_clip(path)


def test_zero_shot_is_above_chance(data):
    """60 people in one image each, two captions: R@1 by chance is 1.7 %."""
    clip = load_embedded_clip()
    fit_image_size(clip.visual, (192, 64))
    samples = [sample for sample in data["test"] if sample.image_id % 4 == 0][:120]
    images, people = gallery(samples)
    captions, wanted = queries(samples)
    pictures = torch.stack([torch.from_numpy(np.array(image.draw())).permute(2, 0, 1) for image in images])
    pictures = normalize(pictures / 255, list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        seen = F.normalize(clip.encode_image(pictures), dim=-1)
        read = F.normalize(clip.encode_text(open_clip.SimpleTokenizer()(captions)), dim=-1)
    found = people[(read @ seen.T).argmax(dim=1)] == wanted
    assert found.float().mean() >= 3 / len(images)
