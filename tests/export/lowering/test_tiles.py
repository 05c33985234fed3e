"""Cross-compiling embeds the tile choice of the table, for each kind of attention."""

import pytest
import torch
from wrappers import wrapper_source

from flashpte.export.lowering.cross_compile import compile_kernels
from flashpte.kernels import tuning
from flashpte.passes import replace_sdpa

pytestmark = pytest.mark.xdist_group("tiles")

KEYS, HEADS, HEADS_KV, HEAD_DIM = 4096, 8, 2, 64


class DecodeAndPrefill(torch.nn.Module):
    def forward(self, one, many, k, v):
        def attend(q):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return attend(one), attend(many)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile-time constants, by name, and threads of each kernel of a program lowered for sm_90."""

    def random(heads, length):
        return torch.randn(1, heads, length, HEAD_DIM, dtype=torch.bfloat16)

    keys, values = random(HEADS_KV, KEYS), random(HEADS_KV, KEYS)
    example = (random(HEADS, 1), random(HEADS, 300), keys, values)
    program, report = replace_sdpa(torch.export.export(DecodeAndPrefill(), example))
    assert report.declined == ()
    kernels = {}
    pick = compile_kernels._pick_launcher

    def record(launchers):
        chosen = pick(launchers)
        source = chosen.bin.src
        constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
        kernels[source.fn.fn.__name__.rstrip("_0123456789")] = (constants, chosen.bin.metadata.num_warps)
        return chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_kernels, "_pick_launcher", record)
        wrapper_source(program, tmp_path_factory.mktemp("tiles"))
    return kernels


def shape(q_len: int) -> tuning.AttentionShape:
    return tuning.AttentionShape(1, HEADS, HEADS_KV, q_len, KEYS, HEAD_DIM, HEAD_DIM, torch.bfloat16)


@pytest.mark.lowering
def test_decode(compiled):
    config = tuning.choose_split_k(shape(1), tuning.limits("sm_90"))
    constants, warps = compiled["_split_k_kernel"]
    assert (constants["BLOCK_R"], constants["BLOCK_N"], constants["STAGES"], warps) == (
        config.block_rows,
        config.block_n,
        config.num_stages,
        config.num_warps,
    )
    assert config.num_splits > 1
    assert "_combine_kernel" in compiled


@pytest.mark.lowering
def test_prefill(compiled):
    config = tuning.choose_hopper(shape(300), tuning.limits("sm_90"))
    constants, warps = compiled["_hopper_kernel"]
    assert (constants["BLOCK_N"], constants["BLOCK_DV"], constants["STAGES"], constants["CONSUMER_REGISTERS"]) == (
        config.block_n,
        config.block_dv,
        config.num_stages,
        config.consumer_registers,
    )
    assert constants["V_STAGES"] == config.num_stages + config.more_v_stages
    assert constants["WIDE_STORES"] == config.wide_stores
    assert constants["TMA"] == config.tma
    assert warps == 12  # two warp groups compute and one copies
