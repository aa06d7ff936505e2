"""The targets of the project at its production shapes, and which measured ratios reach them."""

from collections.abc import Iterator
from typing import Any

from harness.comparison import MODES
from harness.output import table

# (baseline in words, least speed-up, the beginning of the candidates' names), by operator.
BASELINES = {
    "attention": (("best folded SDPA", 1.5, "folded SDPA"), ("explicit softmax", 4.0, "explicit softmax")),
    "adapter": (("eager", 3.0, "eager"), ("best torch.compile", 1.3, "torch.compile")),
}
STEP_MILLISECONDS = 20.0


def target(what: str, required: float, measured: float, unit: str, note: str = "") -> dict[str, Any]:
    return dict(what=what, required=required, measured=measured, unit=unit, note=note, met=measured >= required)


def operator_targets(operator: str, rows: list[dict]) -> Iterator[dict[str, Any]]:
    """Speed-ups over the fastest baselines of each shape, which the notes name, and the share of the floor."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = [row for row in rows if row["shape"] == shape]
        ours = {row["mode"]: row for row in here if row["kind"] == "fused"}
        if not ours:
            continue

        def speed_up(mode: str, prefix: str, here: list = here, ours: dict = ours) -> tuple[float, str] | None:
            rivals = [row for row in here if row["mode"] == mode and row["kind"] == "baseline"]
            named = [row for row in rivals if row["candidate"].startswith(prefix)]
            best = min(named, key=lambda row: row["median"], default=None)
            return best and (best["median"] / ours[mode]["median"], best["candidate"])

        title = f"{operator}, {shape}"
        for baseline, required, prefix in BASELINES[operator]:
            if found := speed_up("both", prefix):
                ratio, name = found
                yield target(f"{title}: forward + backward against {baseline}", required, ratio, "×", name)
        if operator == "attention":
            share = ours["both"]["share_of_floor"]
            yield target(f"{title}: forward + backward, share of the floor", 0.6, share, "%")
        found = [(*result, mode) for mode in MODES if (result := speed_up(mode, ""))]
        if found:
            ratio, name, mode = min(found)
            yield target(f"{title}: slowest mode against its best baseline", 1.0, ratio, "×", f"{mode}, {name}")


def step_targets(rows: list[dict]) -> list[dict[str, Any]]:
    """The training step of CLIP ViT-B/16 at batch 128: the faster one of our paths, which the notes name."""
    plain = next((row for row in rows if row["path"] == "plain"), None)
    our_paths = [row for row in rows if row["path"].startswith("ours")]
    if plain is None or not our_paths:
        return []
    ours = min(our_paths, key=lambda row: row["milliseconds"])
    measured = (
        (f"{STEP_MILLISECONDS:.0f} ms ÷ measured time", 1.0, STEP_MILLISECONDS / ours["milliseconds"], "×"),
        ("share of the measured matrix rate", 0.55, ours["share_of_matrix_rate"], "%"),
        ("speed against the plain path", 4.0, plain["milliseconds"] / ours["milliseconds"], "×"),
        ("peak memory of the plain path ÷ that of ours", 2.0, plain["peak_memory"] / ours["peak_memory"], "×"),
    )
    return [target(f"training step: {what}", *figures, ours["path"]) for what, *figures in measured]


def targets_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; a measured ratio is followed by its note."""

    def cells(row: dict[str, Any]) -> dict[str, str]:
        style = "{:.0%}" if row["unit"] == "%" else "{:.2f}×"
        required, measured = (style.format(row[key]) for key in ("required", "measured"))
        note = f" ({row['note']})" if row["note"] else ""
        line = {"target": row["what"], "at least": required, "measured": measured + note}
        return line | {"met": "yes" if row["met"] else "no"}

    return table(list(map(cells, rows)), "pipe")
