import pytest
from harness import programs
from harness.cases import SHAPES, SUITES, Case, choose
from harness.inputs import ROTATED_BYTES, forms, rotations
from harness.prepare import SWEEP, Job, plan
from harness.runners import PEERS, RUNNERS, chosen
from harness.sweep import table_choice, tiles, with_splits

from flashpte.kernels import tuning

CASES = [case for cases in SUITES.values() for case in cases]


def test_keys_are_unique():
    assert len({case.key for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_sizes_fit(case):
    assert case.shape.heads_q % case.shape.heads_kv == 0
    assert case.rows <= case.live <= case.length
    assert case.floor({"read_bytes_per_us": 1.0, "bf16_flop_per_us": 1.0}) > 0
    sets = rotations(case.input_bytes)
    assert sets * case.input_bytes >= 0.7 * ROTATED_BYTES, "what is read stays in L2"


@pytest.mark.parametrize(
    ("rows", "length", "context", "window"),
    [(1, 50, None, None), (4, 50, 30, None), (20, 64, None, 8), (64, 64, None, 9)],
)
def test_visible_scores_are_those_of_the_mask(rows, length, context, window):
    import torch

    case = Case("decode", "llama-8b", length, rows, context, window)
    mask, bounds = forms(torch.arange(rows) + case.live - rows, length, window)
    assert mask.sum().item() == case.visible
    assert bounds.shape == (2, 1, rows)


def test_layers_that_share_a_mask():
    assert {name: SHAPES[name].layers for name in ("gemma-full", "gemma-sliding")} == {
        "gemma-full": 10,
        "gemma-sliding": 50,
    }


def test_choosing():
    assert choose(["decode"], "llama-8b L=32768") == [Case("decode", "llama-8b", 32768, 1)]
    assert {runner.label for runner in chosen(["fa3"]) if not runner.ours} == {"fa3"}
    assert set(PEERS) < set(RUNNERS) == {runner.label for runner in chosen(None)}


def test_every_case_has_peers_but_those_of_our_own_tiles():
    for case in CASES:
        peers = [label for label in PEERS if RUNNERS[label].refuses(case) is None]
        ours_alone = case.suite == "other" and case.shape.latent_values is None
        assert bool(peers) == (not ours_alone), case.key


def test_jobs_cover_what_is_compiled_once():
    jobs = plan(RUNNERS.values(), CASES, choose(["other"]))
    for runner in RUNNERS.values():
        mine = [(case.key, *job.part) for job in jobs if job.runner == runner.label for case in job.cases]
        wanted = [case.key for case in CASES if runner.refuses(case) is None]
        assert sorted(mine) == sorted((key, i, runner.parts) for key in wanted for i in range(runner.parts))
    assert {case.key for job in jobs if job.runner == SWEEP for case in job.cases} == {c.key for c in choose(["other"])}


def test_a_program_made_beforehand_is_no_job(tmp_path, monkeypatch):
    monkeypatch.setenv(programs.VARIABLE, str(tmp_path))
    runner, cases = RUNNERS["flashpte aoti"], choose(["decode"], "L=4096")
    made, *others = [case for case in cases if runner.refuses(case) is None]
    programs.path_of(made).parent.mkdir()
    programs.path_of(made).touch()
    assert [case for group in runner.groups(cases) for case in group] == others


def test_a_job_travels_with_its_shapes():
    job = Job("flex", (Case("prefill", "gemma-sliding", 2048, 2048, window=1024),), (1, 3))
    assert Job.from_json(job.to_json()) == job


@pytest.mark.parametrize("case", choose(["other", "decode", "prefill"]), ids=lambda case: case.key)
def test_sweeps_contain_the_tables_choice(case):
    arch = tuning.limits("sm_90")
    found = tiles(case, arch)
    assert found[0] == table_choice(case, arch)
    assert len(found) == len(set(found)) > 3
    for config in found:
        for split in with_splits(case, config, arch):
            if isinstance(split, tuning.SplitKConfig):
                assert tuning.SPLIT_K_MAP_BLOCK_N % split.block_n == 0
                assert split.num_splits == 2 or split.num_splits * split.block_n <= case.live


def test_executorchs_tiles_are_split_without_loss():
    pytest.importorskip("executorch.backends.cuda.triton.kernels")
    from harness import peers

    everything = [list(tuner.configs) for tuner in peers._tuners()]
    shares = []
    for i in range(3):
        peers._compile_part(i, 3)
        shares.append([list(tuner.configs) for tuner in peers._tuners()])
    for number, configs in enumerate(everything):
        assert sorted(map(str, configs)) == sorted(str(c) for share in shares for c in share[number])
    peers._compile_part(0, 1)
    assert [tuner.configs for tuner in peers._tuners()] == everything
