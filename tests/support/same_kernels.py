"""Shows whether a change of the source leaves the code of the attention and linear kernels unchanged.

Before the change:  python tests/support/same_kernels.py record before.json
After it:           python tests/support/same_kernels.py compare before.json

The operators' launchers are called as PyTorch calls them, for all kinds of calls on several archs. Kernels are compiled
but not launched. The script compares the last intermediate code of Triton itself (TTGIR), from which all machine code
follows, except for names of values, source lines and the order of constants. It takes 120 s of CPU time;
``same_bytes.py`` compares the machine code of whole exports.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from attention_cases import Case, build, with_intervals
from compile_only import compiling_for
from linear_cases import Case as LinearCase
from linear_cases import build as build_linear

from flashpte.kernels import ops
from flashpte.kernels.linear.dispatch import launch_linear

ARCHES = ("sm_80", "sm_90")
CONSTANT = re.compile(r"\s*(%[-\w.$]+) = (arith\.constant .*)")


@dataclasses.dataclass(frozen=True)
class Call:
    """An operator, a problem, and the intervals that are its mask (``None``: the problem's own mask)."""

    op: str
    case: Case
    intervals: str | None = None


def _case(q_len: int, kv_len: int, **changes) -> Case:
    return Case(q_len, kv_len, **{"heads_q": 8, "heads_kv": 2, "head_dim": 128, "dtype": torch.bfloat16, **changes})


CALLS = (
    *(Call("sdpa_decode", _case(1, 4096, head_dim=d)) for d in (64, 256, 512)),
    *(Call("sdpa_decode", _case(1, 1000, mask=m)) for m in ("is_causal", "bool_context", "float_bias")),
    *(Call("sdpa_decode", _case(1, 1000), kind) for kind in ("causal", "documents")),
    Call("sdpa_decode", _case(1, 200, head_dim=96, v_head_dim=80, batch=3, layout="blhd")),
    Call("sdpa_decode", _case(1, 200, dtype=torch.float32)),
    *(Call("sdpa_verify", _case(5, 4096, heads_q=16, mask=m)) for m in ("none", "bool_ring", "float_bias")),
    *(Call("sdpa_verify", _case(16, 4096, head_dim=d), kind) for d in (256, 512) for kind in ("ring", "documents")),
    Call("sdpa_verify", _case(8, 8192, head_dim=104, heads_q=8)),
    *(Call("sdpa_prefill", _case(300, 4096, head_dim=d, mask="is_causal")) for d in (64, 128, 256, 512)),
    *(Call("sdpa_prefill", _case(300, 4096, mask=m)) for m in ("none", "bool_window", "bool_head", "float_bias")),
    *(Call("sdpa_prefill", _case(300, 4096, head_dim=256), kind) for kind in ("window", "documents")),
    Call("sdpa_prefill", _case(300, 4096, head_dim=320, v_head_dim=384, dtype=torch.float16)),
    Call("sdpa_prefill", _case(40, 100, head_dim=40, dtype=torch.float32, mask="bool_dense")),
    Call("sdpa_prefill", _case(2000, 2000, head_dim=99, batch=2)),
    Call("sdpa_dispatch", _case(12, 700, mask="bool_head")),
    Call("sdpa_dispatch", _case(80, 700, mask="bool_context", dim_order=(0, 1, 2, 3))),
)


def _linear(rows: int, **changes) -> LinearCase:
    columns = 1168 if changes.get("bits") == 8 else 1024
    return LinearCase(rows, **{"out_features": 256, "in_features": columns, "dtype": torch.bfloat16, **changes})


LINEAR_CALLS = (
    *(_linear(rows, group=group) for rows in (1, 16, 64, 300) for group in (32, 128)),
    *(_linear(rows, group=group, zeros="whole") for rows in (8, 16, 64) for group in (32, 64, 128)),
    *(_linear(rows, bits=8, group=group) for rows in (1, 16, 64) for group in (32, 1168)),
    *(_linear(rows, zeros=zeros) for rows in (1, 64) for zeros in ("real", "offsets")),
    *(_linear(rows, bits=8, zeros="offsets", scale_dtype=torch.float32) for rows in (16, 64)),
    *(_linear(rows, dtype=torch.float16, scale_dtype=torch.float16, bias=True) for rows in (3, 64)),
    *(_linear(rows, dtype=torch.float16) for rows in (3, 64)),
    *(_linear(rows, dtype=torch.float32) for rows in (3, 64)),
)


def _launch_attention(call: Call) -> None:
    problem, intervals = build(call.case), None
    if call.intervals is not None:
        problem, intervals = with_intervals(call.case, call.intervals)
    p, masked = problem, intervals is not None
    mask = None if masked else p.mask
    bounds = (intervals.bounds, intervals.values) if masked else (None, None)
    causal = p.is_causal and not masked
    launcher = getattr(ops, call.op)._init_fn
    launcher(p.query, p.key, p.value, mask, None, None, causal, p.scale, list(call.case.dim_order), *bounds)


def digests(arch: str, folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yields, for each kernel that the calls compile, its name with the call's, and the SHA-256 of its code."""
    calls = [(f"{number} {call.op}", call) for number, call in enumerate(CALLS)]
    for label, call in [*calls, *((f"linear {case}", case) for case in LINEAR_CALLS)]:
        with compiling_for(arch, to_the_end=False) as compiled:
            if isinstance(call, LinearCase):
                launch_linear(build_linear(call).call)
            else:
                _launch_attention(call)
        for place, (name, code) in enumerate(compiled):
            digest = hashlib.sha256(without_names(code).encode()).hexdigest()
            yield f"{arch} {label} {place} {name}", digest
            if folder is not None:
                (folder / f"{arch}_{label.replace(' ', '_')}_{place}_{name}.ttgir").write_text(without_names(code))


def without_names(code: str) -> str:
    """TTGIR with values and functions numbered in order, without locations, and with constants at their uses."""
    lines = [line for line in code.splitlines() if not line.startswith("#loc")]
    lines = [re.sub(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", line) for line in lines]
    constants = dict(match.groups() for line in lines if (match := CONSTANT.fullmatch(line)))
    numbers: dict[str, str] = {}

    def renamed(name: re.Match[str]) -> str:
        return constants.get(name[0]) or numbers.setdefault(name[0], f"{name[1]}{len(numbers)}")

    text = "\n".join(line for line in lines if not CONSTANT.fullmatch(line))
    return re.sub(r"([%@])([-\w.$]+)", renamed, text)


def main() -> int:
    """Records or compares; returns 0 if all code is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--arch", action="append", choices=ARCHES, help="this arch alone; may be repeated")
    parser.add_argument("--folder", type=Path, help="where to write the code that was compared, to look at")
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    found = {name: digest for arch in options.arch or ARCHES for name, digest in digests(arch, options.folder)}
    if options.action == "record":
        options.file.write_text(json.dumps(found, indent=1))
        print(f"{len(found)} kernels")
        return 0
    known = json.loads(options.file.read_text())
    known = {name: digest for name, digest in known.items() if name.split()[0] in (options.arch or ARCHES)}
    differ = [name for name in sorted({*known, *found}) if known.get(name) != found.get(name)]
    for name in differ:
        print(f"{name} differs")
    print(f"{len(found)} kernels, {len(differ)} differ")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
