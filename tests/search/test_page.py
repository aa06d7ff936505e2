"""The server of the page: what it answers, whom it refuses, and how it starts and ends."""

import importlib.util
import io
import os
import re
import signal
import socket
import threading
import time

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")

from gallery_in_memory import GalleryInMemory, jpeg
from starlette.testclient import TestClient

from upperson.errors import SearchError
from upperson.search.__main__ import main
from upperson.search.page import app as page_app
from upperson.search.page import listen, serve, uploads
from upperson.search.page.app import make_app
from upperson.search.page.guard import host_name

HERE = "http://127.0.0.1:8765"
TOKEN = "a-token-of-two-dozen-letters"


@pytest.fixture(scope="module")
def gallery():
    return GalleryInMemory()


@pytest.fixture
def client(gallery):
    return TestClient(make_app(gallery), HERE)


def ids(answer):
    """The numbers of the images of a page, in their order."""
    return [int(id) for id in re.findall(r'<img src="/image/(\d+)" alt="/', answer.text)]


def message(answer):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", answer.text.partition('<div class="message')[2])).split(">", 1)[
        -1
    ]


def test_the_first_page_shows_images_and_examples(client, gallery):
    answer = client.get("/")
    assert answer.status_code == 200
    assert ids(answer) == list(range(1, 25))
    assert "24 of 32 images" in answer.text
    assert 'href="/?q=a+person+in+a+red+jacket"' in answer.text


def test_a_sentence_finds_the_most_similar_first(client):
    answer = client.get("/", params={"q": "a red coat", "top": 5})
    assert len(ids(answer)) == 5
    similarities = [float(text) for text in re.findall(r"</span>(-?\d\.\d{3})</span>", answer.text)]
    assert len(similarities) == 5 and similarities == sorted(similarities, reverse=True)
    assert re.findall(r'<span class="rank">(\d+)', answer.text) == ["1", "2", "3", "4", "5"]


def test_a_search_by_an_image_of_the_gallery_finds_itself(client):
    answer = client.get("/", params={"like": 7})
    assert ids(answer)[0] == 7
    assert "1.000" in answer.text


def test_a_click_on_an_image_keeps_the_filters(client):
    answer = client.get("/", params={"q": "red", "not": "blue", "camera": ["entrance 1", "entrance 2"], "top": 3})
    (first, *_) = re.findall(r'<a class="picture" href="([^"]*)"', answer.text)
    assert first.startswith("/?camera=entrance+1&amp;camera=entrance+2&amp;top=3&amp;like=")


def test_all_that_can_be_asked_reaches_the_query(gallery, monkeypatch):
    seen = []
    monkeypatch.setattr(gallery, "search", lambda query: seen.append(query) or [])
    client = TestClient(make_app(gallery), HERE)
    client.get(
        "/?q=a+coat&q=+a+bag+%0D%0A%0D%0A+shoes&like=3&not=a+hat%0Agloves&weight=0.3&every=1&top=7&camera=a&camera=b"
        "&since=2026-01-31T08:30&until=2026-01-31T09:00:05&path=*/x/*&rerank=1"
    )
    (query,) = seen
    assert query.sentences == ("a coat", "a bag", "shoes") and query.avoid == ("a hat", "gloves")
    assert (query.like, query.avoid_weight, query.every, query.top) == ((3,), 0.3, True, 7)
    assert (query.cameras, query.path, query.rerank) == (("a", "b"), "*/x/*", True)
    assert (str(query.since), str(query.until)) == ("2026-01-31 08:30:00", "2026-01-31 09:00:05")


def test_each_image_and_filter_can_be_taken_away(client):
    answer = client.get("/?q=red&like=3&camera=entrance+1&camera=entrance+2&until=2026-02-01T00:00")
    addresses = re.findall(r'<a href="([^"]*)" data-swap aria-label="Remove', answer.text)
    assert [address.replace("&amp;", "&") for address in addresses] == [
        "/?q=red&camera=entrance+1&camera=entrance+2&until=2026-02-01T00%3A00",
        "/?q=red&like=3&camera=entrance+2&until=2026-02-01T00%3A00",
        "/?q=red&like=3&camera=entrance+1&until=2026-02-01T00%3A00",
        "/?q=red&like=3&camera=entrance+1&camera=entrance+2",
    ]


@pytest.mark.parametrize(
    "asked, words",
    [
        ("q=red&top=0", "from 1 to 200, found “0”"),
        ("q=red&top=ten", "found “ten”"),
        ("q=red&top=" + "9" * 5000, "from 1 to 200"),
        ("q=red&weight=nan", "from 0 to 1"),
        ("q=red&not=a&weight=1.5", "from 0 to 1"),
        ("q=red&since=yesterday", "is not a time; expected 2026-01-31"),
        ("q=red&until=2026-W05", "is not a time; expected 2026-01-31"),
        ("q=red&since=2026-02-01&until=2026-01-01", "since before until"),
        ("q=red&since=2026-02-01T00:00%2B02:00", "time zone"),
        ("camera=entrance+1", "Write a sentence or choose an image"),
        ("not=red", "Write a sentence or choose an image"),
        ("q=" + "x" * 501, "at most 500 characters"),
        ("&".join(["q=red"] * 21), "at most 20"),
        ("q=" + "red%0A" * 21, "at most 20"),
        ("like=" + "9" * 30, "found “9999"),
        ("like=" + "9" * 5000, "at most 500 characters; a text has 5,000"),  # Python reads no number so long
        ("q=red&like=1&like=" + "0" * 5000, "at most 500 characters; a text has 5,000"),
        ("like=-1", "found “-1”"),
        ("like=٣", "found “٣”"),
        ("like=999", "Image 999 is not in"),
        ("image=unknown", "no longer kept"),
    ],
)
def test_what_cannot_be_searched_is_said_in_a_sentence(client, asked, words):
    answer = client.get("/?" + asked)
    assert answer.status_code == 400
    assert words in message(answer) and not ids(answer)


def test_an_address_that_asks_for_too_much(client):
    assert client.get("/?" + "camera=a&" * 500 + "q=red").status_code == 414
    assert client.get("/?" + "camera=a&" * 499 + "q=red").status_code == 200


def test_an_error_of_the_index_is_shown(client):
    answer = client.get("/", params={"q": "broken"})
    assert answer.status_code == 400
    assert "people.db: the index is damaged; expected a file" in message(answer)


def test_no_image_fits(client):
    answer = client.get("/", params={"q": "red", "path": "nowhere/*"})
    assert answer.status_code == 200
    assert "No image fits the filters" in message(answer)
    assert 'href="/?q=red" data-swap>Search without filters' in answer.text


def test_an_empty_index():
    answer = TestClient(make_app(GalleryInMemory(people=0)), HERE).get("/")
    assert answer.status_code == 200
    assert "upperson search index PHOTOS" in message(answer)


@pytest.mark.parametrize("name", ["q", "not", "path", "camera", "since", "weight", "top", "like", "image", "x"])
def test_what_is_asked_is_escaped(client, name):
    attack = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    text = client.get("/", params={"q": "red", name: attack}).text
    assert "<script>alert" not in text and "<img src=x" not in text
    assert "<b>street" not in text  # paths of the index too


# ---------------------------------------------------------------------------------------- images


def test_images_by_number(client):
    answer = client.get("/image/1")
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(answer.content)).size == (64, 192)


@pytest.mark.parametrize(
    "name",
    ["0", "999", "-1", "+1", "1.0", "x", "٣", "9" * 19, "9" * 5000, "1%2F..", "..%2F..%2Fetc%2Fpasswd", "%00", ""],
)
def test_other_names_are_no_image(client, name):
    assert client.get(f"/image/{name}").status_code == 404


def test_an_image_whose_file_has_gone_spares_the_others():
    gallery = GalleryInMemory(people=2)
    del gallery.images[1]
    client = TestClient(make_app(gallery), HERE)
    assert client.get("/").status_code == 200 and ids(client.get("/")) == list(range(1, 9))
    assert client.get("/image/1").status_code == 404 and client.get("/image/2").status_code == 200


@pytest.mark.parametrize(
    "name", ["../app.py", "%2e%2e/app.py", "..%2fapp.py", "%2e%2e%2f%2e%2e%2fhtml.py", "/etc/passwd"]
)
def test_only_the_files_of_the_page_are_served(client, name):
    assert client.get("/static/style.css").status_code == 200
    assert client.get(f"/static/{name}").status_code == 404


def test_search_by_an_image_of_ones_own(client):
    name = client.post("/upload", content=jpeg("red")).json()["image"]
    answer = client.get("/", params={"image": name})
    assert ids(answer) == ids(client.get("/", params={"q": "red"}))
    shown = client.get(f"/upload/{name}")
    assert Image.open(io.BytesIO(shown.content)).size == (60, 180)
    assert client.get(f"/upload/{name[:-1]}").status_code == 404


@pytest.mark.parametrize("content", [b"", b"no image", jpeg()[:300], b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_a_file_that_is_no_image(client, content):
    answer = client.post("/upload", content=content)
    assert answer.status_code == 415
    assert answer.text.startswith("This image cannot be read: ") and answer.text.count("\n") == 1


def test_a_file_that_is_too_large(client, monkeypatch):
    monkeypatch.setattr(page_app, "MAX_BYTES", 1000)
    assert client.post("/upload", content=(b"x" * 600 for _ in range(2))).status_code == 413


def test_an_image_of_too_many_pixels(client, monkeypatch):
    monkeypatch.setattr("upperson.data.images.MAX_PIXELS", 10_000)
    answer = client.post("/upload", content=jpeg())
    assert answer.status_code == 415 and "at most 10,000 pixels, found 60 x 180" in answer.text


def test_only_the_latest_uploads_are_kept_and_large_ones_are_made_small(monkeypatch):
    monkeypatch.setattr(uploads, "KEPT", 2)
    monkeypatch.setattr(uploads, "MAX_SIDE", 90)
    kept = uploads.Uploads()
    first, second, third = (kept.add(jpeg()) for _ in range(3))
    assert kept.get(first) is None and kept.get(second) is not None
    assert kept.get(third).size == (30, 90)


# ---------------------------------------------------------------------------------------- who may ask


def test_headers(client):
    for path in ("/", "/?q=red", "/image/1", "/image/999", "/static/style.css", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in headers
        assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "LOCALHOST", "[::1]:8765", "localhost."])
def test_names_of_this_computer(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example:8765", "localhost@evil.example", "192.168.0.7", "localhost:x", "", "a b"],
)
def test_foreign_host_headers_are_refused(client, host):
    for path in ("/", "/image/1", "/static/style.css"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 421 and "people" not in answer.text


def test_host_names():
    assert host_name("[::1]:80") == "::1" and host_name("Example.org.:80") == "example.org"
    assert host_name("example.org:80:80") is None and host_name("[::1") is None


def test_other_computers_reach_a_public_server_by_its_name_or_address(gallery):
    client = TestClient(make_app(gallery, frozenset({"box.example"}), True, TOKEN), HERE)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for host, status in (("box.example:80", 200), ("192.168.0.7", 200), ("[fe80::1]", 200), ("evil.example", 421)):
        assert client.get("/", headers={"Host": host, **bearer}).status_code == status


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Origin": HERE, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": HERE}, 403),
    ],
)
def test_other_sites_cannot_upload(client, headers, status):
    assert client.post("/upload", content=jpeg(), headers=headers).status_code == status


def test_other_sites_may_link_here_but_not_embed(client):
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    assert (
        client.get("/image/1", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).status_code == 403
    )


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST"])
def test_other_methods(client, method):
    assert client.request(method, "/").status_code == 405


def test_a_token_is_needed_and_is_kept_in_a_cookie(gallery):
    client = TestClient(make_app(gallery, token=TOKEN), HERE, follow_redirects=False)
    for address in ("/", "/image/1", "/static/style.css", "/?token=", f"/?token={TOKEN}x", "/?token=%ff%fe"):
        answer = client.get(address)
        assert answer.status_code == 401 and TOKEN not in answer.text
    assert client.post(f"/upload?token={TOKEN}", content=jpeg()).status_code == 401
    answer = client.get(f"/?q=red&token={TOKEN}&top=3")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?q=red&top=3")
    assert "HttpOnly" in answer.headers["set-cookie"] and "samesite=lax" in answer.headers["set-cookie"].lower()
    assert client.get("/?q=red&top=3").status_code == 200  # by the cookie
    assert client.post("/upload", content=jpeg()).status_code == 200
    other = TestClient(make_app(gallery, token=TOKEN), HERE)
    assert other.get("/", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    assert other.get("/", headers={"Cookie": f"upperson-8765={TOKEN}x"}).status_code == 401
    assert other.get("/", headers={"Cookie": "\x00;=;upperson-8765"}).status_code == 401


def test_the_other_requests_do_not_wait_for_a_search(gallery, monkeypatch):
    searching, go_on = threading.Event(), threading.Event()

    def slow(query):
        searching.set()
        assert go_on.wait(20)
        return []

    monkeypatch.setattr(gallery, "search", slow)
    with TestClient(make_app(gallery), HERE) as client:
        waiting = threading.Thread(target=client.get, args=("/?q=red",))
        waiting.start()
        assert searching.wait(20)
        assert client.get("/image/1").status_code == 200
        go_on.set()
        waiting.join()


def test_an_error_of_the_program_shows_nothing_of_it(gallery, monkeypatch):
    monkeypatch.setattr(gallery, "search", lambda query: 1 / 0)
    answer = TestClient(make_app(gallery), HERE, raise_server_exceptions=False).get("/?q=red")
    assert answer.status_code == 500 and answer.text == "The server failed; its terminal says why.\n"
    assert "content-security-policy" in answer.headers


# ---------------------------------------------------------------------------------------- start and end


def test_a_taken_port():
    with listen(port=0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SearchError, match=rf"cannot listen on port {port} of 127.0.0.1 .*--port {port + 1}"):
            listen(port=port)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"port": 65536}, "--port: expected a number from 1 to 65535, found 65536"),
        ({"port": -1}, "found -1"),
        ({"host": "no.such.host.invalid"}, "--host: 'no.such.host.invalid'"),
        ({"host": "x" * 300}, "--host"),
        ({"host": "192.0.2.1", "port": 0}, "192.0.2.1"),
        ({"token": "short"}, "--token: expected at least 16"),
        ({"token": "sixteen letters\n\n"}, "printable"),
    ],
)
def test_where_it_cannot_listen(arguments, words):
    with pytest.raises(SearchError) as refused:
        listen(**{"port": 0, **arguments})
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_the_command_refuses_before_it_opens_an_index(capsys):
    with listen(port=0) as taken:
        for port in (taken.getsockname()[1], 65536):
            assert main(["serve", "--port", str(port), "--index", "there is none.db"]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ") and str(port) in line


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_package_is_named(missing, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(SearchError, match=r"pip install 'upperson\[serve\]'"):
        listen(port=0)


def interrupted(port, asked):
    """Asks a server that is starting, and then interrupts this process as Ctrl-C does."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                asked.append(connection.recv(100))
                break
        except OSError:
            time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("host, status", [("127.0.0.1", b"200"), ("0.0.0.0", b"401")])
def test_ctrl_c_ends_it_with_one_line(gallery, capfd, host, status):
    opened, asked = listen(host, 0), []
    port = opened.getsockname()[1]
    thread = threading.Thread(target=interrupted, args=(port, asked))
    thread.start()
    serve(gallery, host, opened=opened)
    thread.join()
    out, err = capfd.readouterr()
    assert asked[0].startswith(b"HTTP/1.1 " + status) and err == ""
    first, address, last = out.splitlines()
    assert first == "/data/people.db: 32 images; Ctrl-C ends" and last == "stopped"
    token = re.fullmatch(rf"http://{host}:{port}/(?:\?token=(.*))?", address)[1]
    assert token is None if host == "127.0.0.1" else len(token) == 32
