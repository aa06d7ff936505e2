"""The stores of upperson search: insertion, queries, filters, memory and disk, with random vectors of length 1.

    python bench/search.py                                        10,000 and 100,000 vectors, both stores, minutes
    python bench/search.py --sizes 1000000 --stores sqlite        a million
    python bench/search.py --checkpoint best.safetensors          also R@1 through the stores, beside evaluation's
    python bench/search.py --output bench/results                 also writes search-cpu.md and search-cpu.json

Each measurement has a process of its own. Processor time is that of all threads, whatever else the machine does; wall
time is not, on a machine that others use. Both stores compare every vector, so their results are those of a product.
"""

import argparse
import importlib.util
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.options import at_least
from harness.output import save_json, table

from upperson.data import gallery as images_of
from upperson.data import queries as captions_of
from upperson.errors import exit_status
from upperson.evaluate.embed import embed
from upperson.files import write_atomically
from upperson.search import Gallery, Query
from upperson.search.store import FORMAT, Filter, Row, open_store
from upperson.tables.costs import Peak

WIDTH = 512
BATCH = 5000
QUERIES, FILTERED = 10, 3  # without and with a filter
TOP = 20
START = datetime(2026, 1, 1)
STORES = {"sqlite": ("people.db", "float32"), "sqlite-half": ("people.db", "float16"),
          "milvus": ("people.milvus.db", "float32")}  # fmt: skip
FILTERS = {"": Filter(), "camera": Filter(cameras=("3",)), "path": Filter(path="cam3/*73.jpg")}


def unit(generator: np.random.Generator, count: int) -> np.ndarray:
    vectors = generator.standard_normal((count, WIDTH), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def row(number: int) -> Row:
    camera = str(number % 10)
    path = f"/photos/cam{camera}/{number}.jpg"
    return Row(path, camera, START + timedelta(seconds=number), digest=f"{number:032x}", parts=1)


def processor_seconds() -> float:
    every = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in every)


def measure(name: str, size: int) -> dict[str, Any]:
    """One store of one size, in this process."""
    file, dtype = STORES[name]
    settings = dict(format=FORMAT, dimensions=WIDTH, dtype=dtype, checkpoint="none", identity={})
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(str(Path(folder) / file), settings)
        generator = np.random.default_rng(0)
        queries = unit(np.random.default_rng(1), QUERIES)
        peak, inserting, inserted, best = Peak(torch.device("cpu")), 0.0, 0.0, []
        for start in range(0, size, BATCH):
            numbers = range(start, min(start + BATCH, size))
            vectors, rows = unit(generator, len(numbers)), list(map(row, numbers))
            best.append((vectors @ queries.T).max(0))
            began, busy = time.perf_counter(), processor_seconds()
            store.add(rows, vectors)
            inserting += processor_seconds() - busy
            inserted += time.perf_counter() - began
        began, busy = time.perf_counter(), processor_seconds()
        store.tidy()
        inserting += processor_seconds() - busy
        inserted += time.perf_counter() - began
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 2**20
        found: dict[str, Any] = dict(
            store=name, size=size, insert_cpu_s=inserting, insert_wall_s=inserted, disk_mb=disk
        )
        highest = []
        for label, where in FILTERS.items():
            store.search(queries[:1], TOP, where)  # the first one opens files
            wall, busy = [], []
            for query in queries[: FILTERED if label else QUERIES]:
                began, used = time.perf_counter(), processor_seconds()
                hits = store.search(query[None], TOP, where)
                wall.append(time.perf_counter() - began)
                busy.append(processor_seconds() - used)
                if not label:
                    highest.append(hits[0][1])
            words = f"query_{label}_" if label else "query_"
            found[f"{words}cpu_ms"], found[f"{words}wall_ms"] = (
                1e3 * statistics.median(times) for times in (busy, wall)
            )
        found["memory_mb"] = peak.megabytes()
        np.testing.assert_allclose(highest, np.max(best, 0), atol=1e-5 if dtype == "float32" else 1e-3)
        store.close()
    return found


def accuracies(names: list[str], checkpoint: Path) -> dict[str, float]:
    """R@1 on the test split of a checkpoint on synthetic data: by evaluation, and by searches in each store."""
    found: dict[str, float] = {}
    for name in names:
        file, dtype = STORES[name]
        with (
            tempfile.TemporaryDirectory() as folder,
            Gallery.open(Path(folder) / file, checkpoint, half=dtype == "float16") as gallery,
        ):
            gallery.indexing().add_drawings(gallery.drawings, progress=False)
            samples = gallery.samples
            if not found:
                evaluation = embed(gallery.searcher.model, samples, progress=False).text_to_image()
                found["evaluation"] = evaluation.metrics["R@1"]
            person_of = dict(zip(gallery.drawings, images_of(samples)[1].tolist(), strict=True))
            first = [
                person_of[gallery.search(Query((caption,), top=1))[0].entry.path] == person
                for caption, person in zip(*captions_of(samples), strict=True)
            ]
            found[name] = 100 * float(np.mean(first))
    return found


def cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "store": row["store"],
        "vectors": f"{row['size']:,}",
        "insert, CPU s": f"{row['insert_cpu_s']:.1f}",
        "query, CPU ms": f"{row['query_cpu_ms']:.1f}",
        "wall ms": f"{row['query_wall_ms']:.1f}",
        "one camera of ten, CPU ms": f"{row['query_camera_cpu_ms']:.1f}",
        "path, CPU ms": f"{row['query_path_cpu_ms']:.1f}",
        "memory, MB": "–" if row["memory_mb"] is None else f"{row['memory_mb']:,.0f}",
        "disk, MB": f"{row['disk_mb']:,.0f}",
    }


def report(rows: list[dict[str, Any]], accuracy: dict[str, float], load: float, output: Path | None) -> str:
    """The table of what has been measured so far, which is also written to `output`."""
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    machine = (
        f"{os.cpu_count()} cores, OMP_NUM_THREADS {threads}. Load average before and after: {load:.1f}, "
        f"{os.getloadavg()[0]:.1f}. NumPy {np.__version__}, Python {sys.version.split()[0]}."
    )
    text = (
        f"{table(list(map(cells, rows)), 'pipe')}\n\n{WIDTH} numbers a vector, in batches of {BATCH:,}; medians of "
        f"{QUERIES} queries for {TOP} images each, of {FILTERED} with a filter. Memory is the growth of the process's "
        f"peak, mapped files included.\n{machine}\n"
    )
    if accuracy:
        each = ", ".join(f"{value:.2f} by {name}" for name, value in accuracy.items())
        text += f"\nR@1 of a checkpoint on its synthetic test split: {each}.\n"
    if output:
        write_atomically(output / "search-cpu.md", f"# Stores of the search\n\n{text}")
        save_json(output / "search-cpu.json", dict(machine=machine, rows=rows, accuracy=accuracy))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--sizes", type=at_least(100), nargs="+", default=[10_000, 100_000], metavar="N", help="numbers of vectors")
    option("--stores", choices=STORES, nargs="+", default=["sqlite", "milvus"], help="(default: sqlite milvus)")
    option("--checkpoint", type=Path, metavar="FILE", help="a checkpoint on embedded data, as of python train.py")
    option("--output", type=Path, metavar="DIR", help="folder for search-cpu.md and search-cpu.json")
    arguments = parser.parse_args()
    stores = [name for name in arguments.stores if name != "milvus" or importlib.util.find_spec("milvus_lite")]
    if "milvus" in arguments.stores and "milvus" not in stores:
        print("Milvus Lite is left out: it is not installed (pip install 'upperson[milvus]')")
    rows, load = [], os.getloadavg()[0]
    accuracy = accuracies(stores, arguments.checkpoint) if arguments.checkpoint else {}
    for size in arguments.sizes:
        for name in stores:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                rows.append(fresh.apply(measure, (name, size)))
            print(f"{name}, {size:,} vectors: measured", flush=True)
            text = report(rows, accuracy, load, arguments.output)
    print(f"\n{text}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
