"""The inputs, outputs and shared tensors of exported programs."""

import pytest
import torch

from flashpte.export.common.errors import UsageError
from flashpte.export.common.options import ExportOptions
from flashpte.export.models.methods import MethodSpec, constant_methods, plan_methods
from flashpte.export.pipeline import export_programs, plan_export

pytestmark = pytest.mark.xdist_group("methods")


@pytest.fixture(scope="module")
def small():
    options = ExportOptions("gemma4-31b", small=True, random_seed=0, verify_window=4, layers=2)
    plan = plan_export(options)
    return plan, export_programs(plan)


def inputs(program):
    names = program.graph_signature.user_inputs
    return [node.meta["val"] for node in program.graph.nodes if node.name in names]


def output(program):
    (name,) = program.graph_signature.user_outputs
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


def attention_nodes(program):
    return [n for n in program.graph.nodes if n.target == torch.ops.aten.scaled_dot_product_attention.default]


def test_methods_and_their_shapes(small):
    _, programs = small
    assert list(programs) == ["prefill", "decode", "target_verify"]
    for name, tokens, rows in (("decode", 1, 1), ("target_verify", 4, 4)):
        ids, positions = inputs(programs[name])
        assert (tuple(ids.shape), tuple(positions.shape)) == ((1, tokens), (tokens,))
        assert ids.dtype == positions.dtype == torch.int64
        assert tuple(output(programs[name]).shape) == (1, rows, 512)
        assert output(programs[name]).dtype == torch.bfloat16
        assert not programs[name].range_constraints
    assert tuple(output(programs["prefill"]).shape) == (1, 1, 512)
    ((symbol, bounds),) = programs["prefill"].range_constraints.items()
    assert (int(bounds.lower), int(bounds.upper)) == (2, 64)
    assert [str(v.shape[-1]) for v in inputs(programs["prefill"])] == [str(symbol)] * 2


def test_the_head_runs_on_one_row_of_a_prefill(small):
    _, programs = small
    vocabulary_products = [
        node.meta["val"].shape
        for node in programs["prefill"].graph.nodes
        if node.target == torch.ops.aten.linear.default and node.meta["val"].shape[-1] == 512
        if node.args[1].name.endswith("embed_tokens_weight")
    ]
    assert [tuple(shape) for shape in vocabulary_products] == [(1, 1, 512)]


def test_attention_is_one_grouped_call_with_a_bool_mask(small):
    _, programs = small
    for program in programs.values():
        nodes = attention_nodes(program)
        assert len(nodes) == 2
        for node in nodes:
            mask = node.args[3].meta["val"]
            assert mask.dtype == torch.bool
            assert mask.ndim == 4
            assert node.args[1].meta["val"].shape[1] == 4  # H_kv, not repeated to H_q = 8
        assert len({node.args[3] for node in nodes}) == 1  # all layers of one kind share a mask


def test_methods_share_weights_and_caches_by_name_and_memory(small):
    plan, programs = small
    names = {name: set(program.state_dict) | set(program.constants) for name, program in programs.items()}
    assert names["prefill"] == names["decode"] == names["target_verify"]
    mutated = programs["decode"].run_decompositions({}).graph_signature.buffers_to_mutate
    assert sorted(mutated.values()) == ["kv_cache.k_0", "kv_cache.k_1", "kv_cache.v_0", "kv_cache.v_1"]
    for key in ("kv_cache.k_1", "model.model.rotary_emb.sliding_attention_inv_freq"):
        assert len({p.constants[key].data_ptr() for p in programs.values()}) == 1
    weight = "model.model.layers.1.mlp.up_proj.weight"
    assert {p.state_dict[weight].data_ptr() for p in programs.values()} == {
        plan.model.model.layers[1].mlp.up_proj.weight.data_ptr()
    }


def test_weights_need_no_gradient_and_tied_ones_have_one_name(small):
    _, programs = small
    for program in programs.values():
        assert not any(parameter.requires_grad for parameter in program.parameters())
        names = program.graph_signature.parameters
        assert "model.model.embed_tokens.weight" in names
        assert not any("lm_head" in name for name in names)


def test_plan_methods_picks_and_refuses():
    assert [m.name for m in plan_methods(64)] == ["prefill", "decode"]
    assert plan_methods(64, 4, "target_verify") == (MethodSpec("target_verify", 4, 4, all_logits=True),)
    assert not plan_methods(2)[0].dynamic
    with pytest.raises(UsageError, match="add verify_window"):
        plan_methods(64, None, "target_verify")


def test_constant_methods_say_what_a_runner_asks():
    values = constant_methods(plan_methods(64, 4), max_seq_len=256, vocab_size=512, bos_id=0, eos_ids=(1, 106))
    assert values == {
        "get_max_seq_len": 256,
        "get_max_context_len": 256,
        "get_vocab_size": 512,
        "use_kv_cache": True,
        "get_min_prefill_chunk": 2,
        "get_max_prefill_chunk": 64,
        "get_prefill_logits": "last",
        "get_decode_logits": "last",
        "get_verify_window": 4,
        "get_target_verify_logits": "all",
        "get_bos_id": 0,
        "get_eos_ids": [1, 106],
    }
    decode_only = constant_methods(plan_methods(64, None, "decode"), max_seq_len=8, vocab_size=9)
    assert not {"get_max_prefill_chunk", "get_verify_window", "get_bos_id", "get_eos_ids"} & decode_only.keys()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_reaches_weights_caches_and_logits(dtype):
    options = ExportOptions("gemma4-31b", small=True, random_seed=0, dtype=dtype, layers=1, method="decode")
    program = export_programs(plan_export(options))["decode"]
    wanted = getattr(torch, dtype)
    assert {t.dtype for t in program.state_dict.values()} == {wanted}
    assert program.constants["kv_cache.k_0"].dtype == output(program).dtype == wanted
