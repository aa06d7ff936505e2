"""The engines of the store, as new indexes."""

import os
import uuid

import pytest


@pytest.fixture(params=["people.db", "people.milvus.db", "server"])
def index(request, tmp_path, monkeypatch):
    """A new index of each engine; of a server only if MILVUS_SERVER is its address, such as http://127.0.0.1:19530."""
    if request.param == "people.db":
        yield str(tmp_path / request.param)
        return
    pymilvus = pytest.importorskip("pymilvus", reason="the extra milvus is not installed")
    if request.param == "people.milvus.db":
        pytest.importorskip("milvus_lite", reason="the extra milvus is not installed")
        yield str(tmp_path / request.param)
        return
    server = os.environ.get("MILVUS_SERVER")
    if not server:
        pytest.skip("MILVUS_SERVER names no server")
    monkeypatch.chdir(tmp_path)  # the files beside the index are kept in the current folder
    name = f"test_{uuid.uuid4().hex}"
    yield f"{server}/{name}"
    client = pymilvus.MilvusClient(server, token=os.environ.get("MILVUS_TOKEN", ""))
    for collection in (name, f"{name}_settings"):
        client.drop_collection(collection)
    client.close()
