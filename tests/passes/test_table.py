"""Reports as text: equal layers share a row of at most 100 columns."""

import dataclasses

from flashpte.passes import NodeRoute, RoutingReport, format_table

ROUTE = NodeRoute(
    node="scaled_dot_product_attention",
    module_path="model.layers.0.self_attn",
    op="flashpte::sdpa_decode",
    reason="L_q is 1",
    query=(1, 32, 1, 128),
    key=(1, 8, 4096, 128),
    value=(1, 8, 4096, 128),
    lq_range=(1, 1),
    dtype="bfloat16",
    mask="causal",
    mask_form="positions",
    map_users=4,
    bytes_saved=1000,
)


def routes(numbers, path="model.layers.{}.self_attn", **changes):
    return [dataclasses.replace(ROUTE, module_path=path.format(number), **changes) for number in numbers]


def rows(*nodes):
    """The lines of a table of one method, without header and notes."""
    lines = format_table({"decode": RoutingReport(tuple(nodes))}).splitlines()
    return [line for line in lines[3:] if not line.startswith("[")]


def test_layers_that_differ_in_nothing_else_share_a_row():
    found = rows(*routes(range(4)), *routes([9], key=(1, 8, 512, 128)))
    assert [line.split("1x32x1x128")[0].strip() for line in found[::2]] == ["layers 0-3 x4", "layers 9"]
    assert [line.strip() for line in found[1::2]] == ["one map for 4, saves 4 kB", "one map for 4, saves 1 kB"]


def test_two_runs_of_layers_are_named():
    (row, _) = rows(*routes([0, 1, 2, 4, 5, 7, 8]))
    assert row.strip().startswith("layers 0-2 4-5 ... x7  ")


def test_several_attentions_of_a_layer_are_told_apart():
    found = rows(*routes([0, 1]), *routes([0, 1], "model.layers.{}.cross", mask="none", mask_form="none"))
    assert [line.split("  ")[1] for line in found[::2]] == ["layers 0-1.self_attn x2", "layers 0-1.cross x2"]


def test_a_path_without_a_number_is_shown():
    (row, _) = rows(*routes([1], "encoder.attention"))
    assert row.strip().startswith("encoder.attention  ")


def test_notes_are_shared_numbered_and_wrapped():
    reason = "a long reason " * 12
    text = format_table(
        {
            "decode": RoutingReport((*routes([0]), *routes([1], reason=reason, op=None))),
            "verify": RoutingReport(tuple(routes([0]))),
        }
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2] == "decode"
    assert [line for line in lines if line.endswith("[1]")] == [line for line in lines if "sdpa_decode" in line]
    assert sum("(left as it was)" in line and line.endswith("[2]") for line in lines) == 1
    notes = lines[next(i for i, line in enumerate(lines) if line.startswith("[1]")) :]
    assert notes[0] == "[1] L_q is 1"
    assert " ".join(line.strip() for line in notes[1:]) == f"[2] {reason.strip()}"
