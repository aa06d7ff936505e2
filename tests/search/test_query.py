"""Queries: exactly the ranking of evaluation, what is combined and filtered, the command line, errors of one line."""

import json
import re
import subprocess
import sys
from datetime import datetime

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_run, write_image

from upperson.data import gallery as images_of
from upperson.data import queries as captions_of
from upperson.data import read_splits
from upperson.errors import SearchError
from upperson.evaluate.embed import embed
from upperson.search import Gallery, Query
from upperson.search.__main__ import main
from upperson.search.entry import read_time
from upperson.search.html import results_page
from upperson.search.rerank import distances_of, rerank
from upperson.search.store import Filter


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("model"), embedded_identities=(4, 2, 15))


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint):
    """A folder with nine images and their index."""
    folder = tmp_path_factory.mktemp("place")
    for number in range(9):
        name = f"cam{number % 3}/2026-01-{number + 1:02}_12-00-00.png"
        write_image(folder / "photos" / name, number)
    with Gallery.open(folder / "people.db", checkpoint) as gallery:
        gallery.add([folder / "photos"])
    return folder


@pytest.fixture
def gallery(place):
    with Gallery.open(place / "people.db", create=False) as opened:
        yield opened


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# ---------------------------------------------------------------------------------------- as evaluation


def test_the_ranking_is_that_of_evaluation(index, checkpoint):
    """R@1 and the ten best images of every caption of the synthetic test split."""
    with Gallery.open(index, checkpoint) as gallery:
        gallery.indexing().add_drawings(gallery.drawings, progress=False)
        samples = read_splits(gallery.searcher.config.data)["test"]
        expected = embed(gallery.searcher.model, samples, progress=False).text_to_image()
        images, people = images_of(samples)
        captions, wanted = captions_of(samples)
        assert len(gallery) == len(images) == 30 and len(captions) == 60
        names = [f"synthetic/test/{number:04d}" for number in range(len(images))]
        first = []
        for caption, person, top, similarities in zip(
            captions, wanted.tolist(), expected.top.tolist(), expected.top_similarity.tolist(), strict=True
        ):
            hits = gallery.search(Query((caption,), top=10))
            assert [hit.entry.path for hit in hits] == [names[image] for image in top]
            assert [hit.rank for hit in hits] == list(range(1, 11))
            np.testing.assert_allclose([hit.similarity for hit in hits], similarities, atol=1e-5)
            first.append(people[names.index(hits[0].entry.path)].item() == person)
        assert 100 * np.mean(first) == expected.metrics["R@1"]


# ---------------------------------------------------------------------------------------- what is combined


def test_sentences_images_and_words_to_avoid(gallery, place):
    sentences, avoided = ("a man in red", "a woman"), ("a hat", "a bag")
    photo = Image.open(place / "photos" / "cam1" / "2026-01-02_12-00-00.png")
    vectors = gallery.store.vectors(list(range(1, 10)))
    parts = np.concatenate([
        gallery.searcher.encode_texts(sentences), gallery.searcher.encode_images([photo]), vectors[4:5]
    ])  # fmt: skip
    away = 0.25 * gallery.searcher.encode_texts(avoided).mean(0)
    asked = dict(sentences=sentences, images=(photo,), like=(5,), avoid=avoided, avoid_weight=0.25)
    for every in (False, True):
        directions = unit(parts - away) if every else unit(parts.mean(0, keepdims=True) - away)
        similarities = (vectors @ directions.T).min(1)
        hits = gallery.search(Query(**asked, every=every))
        order = np.argsort(-similarities, kind="stable")
        assert [hit.entry.id for hit in hits] == (order + 1).tolist()
        np.testing.assert_allclose([hit.similarity for hit in hits], similarities[order], atol=1e-5)
    best = gallery.search(Query(images=(photo,), top=1))[0]
    assert best.entry.path == photo.filename and best.similarity == pytest.approx(1, abs=1e-5)
    assert [hit.entry.id for hit in gallery.search(Query(like=(7,), top=1))] == [7]


def test_filters(gallery):
    def found(**options):
        return sorted(hit.entry.time.day for hit in gallery.search(Query(("a man",), **options)))

    assert found() == list(range(1, 10))
    assert found(cameras=("0", "2")) == [1, 3, 4, 6, 7, 9]
    assert found(since=datetime(2026, 1, 4, 12), until=datetime(2026, 1, 6)) == [4, 5]
    assert found(path="cam1/*") == [2, 5, 8] and found(path="*-0[1-3]_*") == [1, 2, 3]
    assert found(cameras=("7",)) == []
    assert len(gallery.search(Query(("a man",), top=4))) == 4


def test_queries_that_are_wrong(gallery, tmp_path, checkpoint):
    for fields, message in [
        (dict(), "the query is empty; expected a sentence or an image"),
        (dict(avoid=("a hat",)), "the query is empty"),
        (dict(sentences=("a man", " ")), "a sentence is empty"),
        (dict(sentences=("a man",), avoid=("",)), "a text to avoid is empty"),
        (dict(sentences=("a man",), avoid_weight=1.5), "the weight of words to avoid is 1.5"),
        (dict(sentences=("a man",), avoid_weight=float("nan")), "the weight of words to avoid is nan"),
        (dict(sentences=("a man",), top=0), "0 images were asked for; expected 1 to 10,000"),
        (dict(sentences=("a man",), since=datetime(2026, 2, 1), until=datetime(2026, 1, 1)), "no time lies between"),
        (dict(sentences=("a man",), path=" "), "the path is empty"),
        (dict(sentences=("a man",), cameras=("3", "")), "a camera is empty; expected a name"),
        (dict(sentences=("a man", "\udcff")), r"a sentence is not valid Unicode, '\\udcff'; expected UTF-8 text"),
        (dict(sentences=("a man",), avoid=("a \ud800",)), "a text to avoid is not valid Unicode"),
        (dict(sentences=("a man",), cameras=("3", "\udcff")), "a camera is not valid Unicode"),
    ]:
        with pytest.raises(ValueError, match=message):
            Query(**fields)
    for id in (99, 0, -1, 2**70):
        with pytest.raises(SearchError, match=f"no image has the id {id}"):
            gallery.search(Query(like=(id,)))
    with pytest.raises(SearchError, match="the query cancels itself out"):
        gallery.search(Query(("a man",), avoid=("a man",), avoid_weight=1.0))
    with Gallery.open(tmp_path / "empty.db", checkpoint) as empty:
        with pytest.raises(
            SearchError, match="empty.db: the index holds no images; add some with upperson search index"
        ):
            empty.search(Query(("a man",)))
        assert empty.cameras() == [] and empty.times() is None


def test_threads_search_at_once(gallery):
    from concurrent.futures import ThreadPoolExecutor

    queries = [Query((text,), top=3) for text in ("a man", "a woman in red", "a bag", "blue shoes")]
    alone = [gallery.search(query) for query in queries]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(gallery.search, queries * 5)) == alone * 5


# ---------------------------------------------------------------------------------------- re-ranking


def plain_rerank(distances, k1, k2, weight):
    """The paper's formulas as sets and sums, one pair after the other."""
    count = len(distances)

    def nearest(p, k):
        return sorted(range(count), key=lambda g: (g != p, distances[p][g]))[: k + 1]

    def reciprocal(p, k):
        return {g for g in nearest(p, k) if p in nearest(g, k)}

    def larger(p):
        found = set(reciprocal(p, k1))
        for q in reciprocal(p, k1):
            half = reciprocal(q, round(k1 / 2))
            if len(reciprocal(p, k1) & half) >= 2 / 3 * len(half):
                found |= half
        return found

    encoded = [[np.exp(-distances[p][g]) if g in members else 0.0 for g in range(count)]
               for p, members in enumerate(map(larger, range(count)))]  # fmt: skip
    expanded = [np.mean([encoded[g] for g in nearest(p, k2 - 1)], axis=0) for p in range(count)]
    final = []
    for g in range(1, count):
        jaccard = 1 - sum(map(min, expanded[0], expanded[g])) / sum(map(max, expanded[0], expanded[g]))
        final.append((1 - weight) * jaccard + weight * distances[0][g])
    return final


@pytest.mark.parametrize(("k1", "k2", "weight"), [(4, 2, 0.3), (6, 3, 0.0), (12, 6, 0.3), (3, 1, 1.0)])
def test_rerank_is_the_papers_formula(k1, k2, weight):
    for seed in range(2):
        vectors = unit(np.random.default_rng(seed).standard_normal((16, 5)))
        distances = 1 - vectors @ vectors.T
        np.testing.assert_allclose(
            rerank(distances, k1, k2, weight), plain_rerank(distances, k1, k2, weight), atol=1e-12
        )


def test_rerank_brings_a_neighbour_forward():
    """Of two equally similar images, the one among the other neighbours of the query comes first."""
    angles = np.radians([0, 5, 8, 11, -14, 14.001, 80, 85, 90, 95])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    final = rerank(1 - vectors @ vectors.T, 4, 2)
    assert final[4] < final[3]


def test_distances_of_a_query_and_images():
    vectors = unit(np.random.default_rng(0).standard_normal((12, 6)))
    distances = distances_of(vectors[:1] @ vectors[1:].T, vectors[1:])
    np.testing.assert_allclose(distances, 1 - vectors @ vectors.T, atol=1e-12)
    assert distances_of(np.ones(1), vectors[:1]).shape == (2, 2)


@pytest.mark.parametrize("gone", [(0,), (1, 4), range(1, 9), range(9)])
@pytest.mark.parametrize("again", [False, True])
def test_images_that_go_during_a_search_are_left_out(place, tmp_path, checkpoint, monkeypatch, gone, again):
    """Another process forgets the images at these places of the ranking."""
    with Gallery.open(tmp_path / "people.db", checkpoint) as gallery, Gallery.open(tmp_path / "people.db") as other:
        gallery.add([place / "photos"])
        search = gallery.store.search

        def forgotten_meanwhile(*asked):
            found = search(*asked)
            other.store.remove([found[number][0] for number in gone])
            return found

        ids = [hit.entry.id for hit in gallery.search(Query(("a man in red",)))]
        monkeypatch.setattr(gallery.store, "search", forgotten_meanwhile)
        hits = gallery.search(Query(("a man in red",), rerank=again))
        left = [id for number, id in enumerate(ids) if number not in gone]
        assert sorted(hit.entry.id for hit in hits) == sorted(left)
        assert [hit.rank for hit in hits] == list(range(1, len(left) + 1))


def test_rerank_in_a_search(gallery):
    plain, ranked = (gallery.search(Query(("a man in red",), rerank=again)) for again in (False, True))
    assert {hit.entry for hit in plain} == {hit.entry for hit in ranked}
    assert {hit.entry.id: hit.similarity for hit in plain} == {hit.entry.id: hit.similarity for hit in ranked}
    similarities = np.array([hit.similarity for hit in plain])
    vectors = gallery.store.vectors([hit.entry.id for hit in plain])
    order = np.argsort(rerank(distances_of(similarities, vectors)), kind="stable")
    assert [hit.entry.id for hit in ranked] == [plain[place].entry.id for place in order]
    assert len(gallery.search(Query(("a man",), rerank=True, top=2))) == 2
    assert len(gallery.search(Query(("a man",), rerank=True, cameras=("1",), path="*-02_*"))) == 1


# ---------------------------------------------------------------------------------------- the command line


def run(capsys, *arguments):
    """The exit status and the lines of standard output and error."""
    try:
        status = main(list(map(str, arguments)))
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), [line for line in captured.err.splitlines() if "the model is" not in line]


def test_the_command_line(tmp_path, monkeypatch, capsys, checkpoint):
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        write_image(tmp_path / "photos" / f"c{number}" / f"2026-01-0{number + 1} 12.00.00.png", number)
    (tmp_path / "photos" / "bad.jpg").write_bytes(b"")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bad.jpg").write_bytes(b"")
    options = ("--checkpoint", checkpoint)
    status, out, _ = run(capsys, "index", "photos", *options)
    assert (
        status == 0 and out[0].startswith("4 added; 1 could not be indexed: ") and "people.db holds 4 images" in out[0]
    )
    assert run(capsys, "index", "broken", *options)[0] == 1
    status, out, _ = run(capsys, "query", "a man", "--top", 2)
    assert status == 0 and len(out) == 4 and out[0].split() == ["rank", "similarity", "camera", "time", "path"]
    status, out, err = run(
        capsys, "query", "a man", "--json", "--since", "2026-01-02", "--until", "2026-01-03", "--not", "red"
    )
    found = json.loads("\n".join(out))
    assert status == 0 and {hit["time"] for hit in found} == {"2026-01-02T12:00:00", "2026-01-03T12:00:00"}
    assert list(found[0]) == ["rank", "similarity", "id", "path", "camera", "time", "seconds", "box"]
    for unknown, named in ((["9"], "'9'"), (["01"], "'01'"), (["C1", "x"], "'C1', 'x'")):
        given = [part for name in unknown for part in ("--camera", name)]
        assert run(capsys, "query", "a man", *given)[1] == [
            f"no image passes the filters: no image is of camera {named}; the cameras are '0', '1', '2', '3'"
        ]
    assert run(capsys, "query", "a man", "--camera", 1, "--since", "2030-01-01")[1] == ["no image passes the filters"]
    assert run(capsys, "query", "--image", "photos/c1/2026-01-02 12.00.00.png", "--json", "--top", 1)[1][1:3] == [
        " {", '  "rank": 1,'
    ]  # fmt: skip
    assert run(capsys, "query", "a man", "--device", "abacus")[::2] == (
        1, ["error: device: 'abacus' is not allowed; expected auto, cpu, cuda, cuda:N or mps"]
    )  # fmt: skip
    assert run(capsys, "forget", "photos/c1")[1] == ["1 images were removed from people.db"]
    assert run(capsys, "query", "a man", "--camera", 1)[1][0].endswith("of camera '1'; the cameras are '0', '2', '3'")


@pytest.mark.parametrize(
    ("text", "since", "until"),
    [
        ("2026-01-31", datetime(2026, 1, 31), datetime(2026, 1, 31, 23, 59, 59, 999_999)),
        (" 2026-01-31 ", datetime(2026, 1, 31), datetime(2026, 1, 31, 23, 59, 59, 999_999)),
        ("2026-01-31T08:30", *[datetime(2026, 1, 31, 8, 30)] * 2),
        ("2026-01-31 08:30:15.125", *[datetime(2026, 1, 31, 8, 30, 15, 125_000)] * 2),
    ],
)
def test_times(text, since, until):
    assert (read_time(text), read_time(text, until=True)) == (since, until)


@pytest.mark.parametrize(
    "text", ["", "2026", "2026-W05", "2026-W05-1", "20260131", "2026-02-30", "2026-01-31T25:00", "T10"]
)
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="is not a time; expected 2026-01-31"):
        read_time(text)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("query",), 2, "the query is empty"),
        (("query", "a man", "--top", "0"), 2, "0 images were asked for"),
        (("query", "a man", "--top", "x"), 2, "invalid int value"),
        (("query", "a man", "--weight", "2"), 2, "the weight of words to avoid is 2.0"),
        (("query", "a man", "--since", "noon"), 2, "'noon' is not a time; expected 2026-01-31"),
        (("query", "a man", "--until", "2026-01-01T00:00:00+01:00"), 2, "has a time zone; expected local time"),
        (("query", "a man", "--until", "2026-W05"), 2, "'2026-W05' is not a time; expected 2026-01-31"),
        (("query", "a man", "--since", "2026-02-01", "--until", "2026-01-01"), 2, "no time lies between"),
        (("query", "a man", "--camera", ""), 2, "a camera is empty; expected a name"),
        (("query", "a man", "--html", "people.db"), 2, "'people.db': expected a name that ends in .html"),
        (("query", "a man", "--html", "best.safetensors"), 2, "expected a name that ends in .html"),
        (("query", "a man", "--html", "photos/html"), 2, "expected a name that ends in .html"),
        (("query", "a man", "--image", "none.jpg"), 1, "none.jpg: image is missing"),
        (("query", "a man", "--index", "none.db"), 1, "none.db: no index; make one"),
        (("query", "a man", "--index", "/etc/passwd"), 1, "not an index: it is not a SQLite file"),
        (("query", "a man"), 1, "people.db: no index; .* no checkpoint is in runs/"),
        (("query", "a man", "--checkpoint", "none.safetensors"), 1, "none.safetensors"),
        (("index",), 2, "nothing to index"),
        (("index", "."), 1, "no checkpoint is in runs/"),
        (("forget", "x"), 1, "people.db: no index"),
        (("forget",), 2, "required: PATH"),
        (("find", "x"), 2, "invalid choice: 'find'"),
        ((), 2, "required: COMMAND"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *arguments)
    assert found == status and not out and re.search(message, err[-1]), err
    assert len(err) == 1 or found == 2
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_the_synthetic_gallery_of_the_newest_run(tmp_path, monkeypatch, capsys):
    tiny_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "query", "a man", "--top", 3)
    assert status == 0 and len(out) == 5 and all("synthetic/test/000" in line for line in out[2:])
    assert err[0].startswith("people.db does not exist; indexing 8 synthetic test images of runs/embedded-1/best")
    assert run(capsys, "query", "a man", "--top", 3)[:2] == (0, out)
    with Gallery.default() as gallery:
        assert len(gallery) == 8 and len(gallery.examples()) == 6
        small = gallery.thumbnail(3)
        gallery.thumbnails.remove(3)
        assert gallery.thumbnail(3) == small  # drawn again
        assert gallery.search(Query(like=(3,)))[0].entry.path == "synthetic/test/0002"
    (tmp_path / "people.db").write_bytes(b"x" * 5000)
    assert run(capsys, "query", "a man")[0] == 1


def test_the_newest_run_is_found(tmp_path, monkeypatch):
    from upperson.search.gallery import newest_checkpoint

    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("b-1", "c-1", "a-2")):
        path = tmp_path / "runs" / name / "best.safetensors"
        path.parent.mkdir(parents=True)
        path.touch()
        import os

        os.utime(path, (number, number))
    assert str(newest_checkpoint()) == "runs/a-2/best.safetensors"


@pytest.mark.parametrize("command", [[], ["index"], ["query"], ["serve"], ["forget"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0 and "usage: upperson search" in capsys.readouterr().out


def test_help_needs_no_torch():
    program = """
import sys
from contextlib import suppress
from upperson.search.__main__ import main
for command in ([], ["index"], ["query"], ["serve"], ["forget"]):
    with suppress(SystemExit):
        main([*command, "--help"])
assert not {"torch", "numpy", "PIL"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_filters_of_paths():
    for pattern, path, fits in [
        ("*.jpg", "/a/b.jpg", True),
        ("b.jpg", "/a/b.jpg", True),
        ("a/*.jpg", "/x/a/b/c.jpg", True),
        ("x/a", "/x/a/b.jpg", False),
        ("/x/*", "/x/a/b.jpg", True),
        ("B.JPG", "/a/b.jpg", False),
        ("[!b].jpg", "/a/b.jpg", False),
        ("synthetic/test/*", "synthetic/test/0001", True),
    ]:
        assert Filter(path=pattern).fits_path(path) == fits, (pattern, path)


# ---------------------------------------------------------------------------------------- the page


def test_the_page_shows_what_the_gallery_finds(gallery):
    pytest.importorskip("starlette", reason="the extra serve is not installed")
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    from starlette.testclient import TestClient

    from upperson.search.page.app import make_app

    client = TestClient(make_app(gallery), "http://localhost")

    def shown(**asked):
        answer = client.get("/", params=asked)
        assert answer.status_code == 200
        return [int(id) for id in re.findall(r'<img src="/image/(\d+)" alt="/', answer.text)]

    ids = [entry.id for entry in gallery.sample(99)]
    assert len(ids) == 9 and shown() == ids
    assert [client.get(f"/image/{id}").content for id in ids] == [gallery.thumbnail(id) for id in ids]
    found = gallery.search(Query(("a red coat",), cameras=("0", "2"), since=datetime(2026, 1, 3), rerank=True))
    asked = {"q": "a red coat", "camera": ["0", "2"], "since": "2026-01-03T00:00", "rerank": "1"}
    assert shown(**asked) == [hit.entry.id for hit in found]
    assert shown(like=ids[3])[0] == ids[3]
    assert client.get("/", params={"like": max(ids) + 1}).status_code == 400
    saved = results_page(Query(("a red coat",)), found, gallery)
    assert saved.count("data:image/jpeg;base64,") == len(found) > 0
