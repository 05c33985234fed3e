"""The tables that the docs show, by the name in their mark, made of the files in ``results/``."""

from __future__ import annotations

import functools
from collections.abc import Callable

from harness import linear_table, models, report, results, schema, targets
from harness.results import OURS, Document, best_peer, time_of
from harness.tables import markdown, number

Table = Callable[[], list[str]]
MAIN_SUITES = ("decode", "verify", "prefill", "chunk", "other")


def suite_file(gpu: str, suite: str) -> schema.ResultFile:
    """A file of the tree."""
    return schema.read(schema.RESULTS / gpu / f"{suite}.json")


@functools.cache
def document(gpu: str) -> Document:
    """The main suites of a GPU together, as targets compare them."""
    return results.load(schema.RESULTS / gpu, suites=MAIN_SUITES)


def few(gpu: str, suite: str) -> list[str]:
    """Decode or verify."""
    reads = {row["kv_bytes"]: row["time_us"] for row in suite_file(gpu, "reads")["rows"]} if gpu == "h100" else None
    return report.few_rows(report.by_suite(document(gpu))[suite], reads)


def many(gpu: str) -> list[str]:
    """Prefill and chunks."""
    suites = report.by_suite(document(gpu))
    return report.many_rows([*suites["prefill"], *suites["chunk"]])


def missed(gpu: str) -> list[str]:
    """The targets that are not met, those of one shape and limit together."""
    found: dict[tuple[str, ...], list[str]] = {}
    for j in targets.judge(document(gpu)):
        if not j.met:
            shape, _, case = j.case.partition(" ")
            wanted, _, peer = j.wanted.partition(" (")
            limit = f"{'>=' if j.least else '<='} {j.limit:.3g}"
            if peer.startswith("limit"):
                wanted = j.wanted
            found.setdefault((j.suite, shape, wanted, limit), []).append(f"{case.removesuffix(' M=1')}: {j.value:.3f}")
    columns = ["suite", "shape", "compared with", "target", "is"]
    return markdown(columns, [[*key, "; ".join(values)] for key, values in found.items()])


def met(gpu: str) -> list[str]:
    """How many targets are met, by suite and what they ask."""
    counts: dict[tuple[str, str], list[bool]] = {}
    for j in targets.judge(document(gpu)):
        counts.setdefault((j.suite, j.wanted.split(" (")[0]), []).append(j.met)
    body = [[suite, wanted, f"{sum(found)} of {len(found)}"] for (suite, wanted), found in counts.items()]
    every = [verdict for found in counts.values() for verdict in found]
    return markdown(["suite", "target", "met"], [*body, ["all", "", f"{sum(every)} of {len(every)}"]])


def other() -> list[str]:
    """The table's tile against the best swept one, at shapes that the tables were not fitted to."""
    body = []
    for row in document("h100")["rows"]:
        if "sweep" in row:
            found = row["sweep"]
            cells = [number(found[name]) for name in ("table", "best", "ratio")]
            body.append([row["case"], *cells, str(found["tried"])])
    return markdown(["case", "table's tile", "best tile", "ratio", "tiles tried"], body)


def random() -> list[str]:
    """On how many random shapes flashpte is fastest, by kernel; the map, which all layers share, is left out."""
    counts: dict[str, list[float]] = {}
    for row in results.load(schema.RESULTS / "h100" / "random.json")["rows"]:
        own, peer = time_of(row, OURS), best_peer(row)
        if own is not None and peer is not None:
            kind = "decode" if row["rows"] == 1 else "prefill" if row["rows"] == row["length"] else "verify"
            counts.setdefault(kind, []).append(own / peer[0])
    body = []
    for kind, ratios in counts.items():
        ordered = sorted(ratios)
        shown = [number(ordered[i]) for i in (0, len(ordered) // 2, -1)]  # best, median, worst
        body.append([kind, str(len(ratios)), str(sum(ratio <= 1 for ratio in ratios)), *shown])
    columns = ["kernel", "shapes", "flashpte fastest", "of the best peer: best", "median", "worst"]
    return markdown(columns, body)


def tiles() -> list[str]:
    """How near the tables' tiles are to the best ones on random shapes."""
    rows = results.load(schema.RESULTS / "h100" / "random.json")["rows"]
    return report.sweep_summary([row for row in rows if "sweep" in row])


def head_dims() -> list[str]:
    """Prefill at head dims other than the models'."""
    body = []
    for row in results.load(schema.RESULTS / "h100" / "head-dims.json")["rows"]:
        own, peer = time_of(row, OURS), best_peer(row)
        if own is not None and peer is not None:
            cells = [number(row["floor"]), number(own), number(peer[0]), peer[1], number(own / peer[0])]
            body.append([row["case"], *cells])
    return markdown(["case", "floor", OURS, "best peer", "", "of best peer"], body)


def reads() -> list[str]:
    """What reading the bytes takes, without attention."""
    found = suite_file("h200", "reads")["rows"]
    body = [[f"{row['kv_bytes'] / 1e6:.1f} MB", f"{row['floor_us']:.1f}", f"{row['time_us']:.1f}"] for row in found]
    return markdown(["bytes", "floor", "plain read"], body)


MASK_COLUMNS = {
    "context": ("tensor_us", "tensor_long_us", "tensor_ratio", "positions_us", "positions_long_us", "positions_ratio"),
    "prefill": ("tensor_us", "positions_us", "is_causal_us", "ratio", "limit"),
    "map": ("map_tensor_us", "map_positions_us", "layer_us"),
}
MASK_HEADS = {
    "context": ("tensor, 4,096", "131,072", "ratio", "positions, 4,096", "131,072", "ratio"),
    "prefill": ("tensor", "positions", "is_causal", "ratio", "limit"),
    "map": ("map by tensor", "map by positions", "one layer"),
}


def masks(part: str) -> list[str]:
    """One part of what masks cost."""
    body = []
    for row in suite_file("h200", "masks")["rows"]:
        if row["part"] == part:
            verdict = [] if part == "map" else ["yes" if row["met"] else "no"]
            body.append([row["case"], *(number(row.get(key)) for key in MASK_COLUMNS[part]), *verdict])
    return markdown(["case", *MASK_HEADS[part], *([] if part == "map" else ["met"])], body)


# The cases of the README, by suite and case, in words.
README = {
    ("decode", "gemma-full L=4096 M=1"): "decode, gemma-full (D = 512), 4,096 keys",
    ("decode", "gemma-full L=131072 context=4096 M=1"): "decode, gemma-full, 4,096 tokens in a cache of 131,072",
    ("decode", "qwen3.5 L=4096 M=1"): "decode, qwen3.5 (D = 256), 4,096 keys",
    ("decode", "llama-8b L=4096 M=1"): "decode, llama-8b (D = 128), 4,096 keys",
    ("verify", "gemma-full L=32768 M=4"): "verify of 4 rows, gemma-full, 32,768 keys",
    ("verify", "qwen3.5 L=32768 M=16"): "verify of 16 rows, qwen3.5, 32,768 keys",
    ("verify", "llama-8b L=4096 M=8"): "verify of 8 rows, llama-8b, 4,096 keys",
    ("prefill", "gemma-full L=8192 causal"): "prefill of 8,192 rows, gemma-full",
    ("prefill", "gemma-sliding L=8192 window=1024"): "prefill of 8,192 rows, gemma-sliding, window 1,024",
    ("prefill", "llama-8b L=8192 causal"): "prefill of 8,192 rows, llama-8b",
}
PEERS = {
    "executorch": "ExecuTorch",
    "executorch causal": "ExecuTorch",
    "flashinfer": "FlashInfer",
    "fa3": "FlashAttention 3",
    "torch efficient": "memory-efficient",
    "torch cudnn": "cuDNN",
    "flex": "FlexAttention",
}


def _short(value: float) -> str:
    """A time with three digits, below 100 one behind the point."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def readme() -> list[str]:
    """The README's choice of cases."""
    rows = {(row["suite"], row["case"]): row for row in document("h100")["rows"]}
    body = []
    for key, label in README.items():
        row = rows[key]
        peer, own = best_peer(row), time_of(row, OURS)
        if peer is not None and own is not None:
            cells = [_short(row["floor"]), _short(own), _short(peer[0])]
            body.append([label, *cells, PEERS.get(peer[1], peer[1])])
    return markdown(["case", "floor", OURS, "best peer", ""], body)


TABLES: dict[str, Table] = {
    "readme": readme,
    **{
        f"{gpu} {suite}": functools.partial(few, gpu, suite)
        for gpu in ("h100", "h200")
        for suite in ("decode", "verify")
    },
    **{f"{gpu} prefill": functools.partial(many, gpu) for gpu in ("h100", "h200")},
    **{f"{gpu} missed": functools.partial(missed, gpu) for gpu in ("h100", "h200")},
    **{f"{gpu} targets": functools.partial(met, gpu) for gpu in ("h100", "h200")},
    "h100 other": other,
    "h100 random": random,
    "h100 tiles": tiles,
    "h100 head-dims": head_dims,
    "h200 reads": reads,
    **{f"h200 masks {part}": functools.partial(masks, part) for part in MASK_COLUMNS},
    "h200 linear": lambda: linear_table.table(suite_file("h200", "linear")["rows"], summary=True),
    "h200 dense": lambda: linear_table.table(suite_file("h200", "dense")["rows"], summary=False),
    "h200 whole-model": lambda: models.whole_model(suite_file("h200", "whole-model")["rows"]),
    "h200 speculative": lambda: models.speculative(suite_file("h200", "speculative")["rows"]),
}
