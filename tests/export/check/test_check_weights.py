"""Every tensor is compared, or named as not compared."""

import torch

from flashpte.export.check.check_weights import compare_weights

W, F = torch.arange(4.0), torch.tensor([0.5, 0.25])


def test_a_weight_of_the_model_that_no_method_has():
    report = compare_weights({"model.a": W.clone()}, {"model.a": W, "model.b": W + 1})
    assert (report.equal, report.missing) == (1, ("model.b: the program has no tensor of this name",))


def test_a_tensor_of_the_program_that_the_model_does_not_have():
    report = compare_weights({"model.a": W.clone(), "model.packed": W}, {"model.a": W})
    assert report.missing == ("model.packed: the model has no tensor of this name",)


def test_states_and_constants_of_tracing_need_no_counterpart():
    program = {"model.a": W.clone(), "kv_cache.k_0": W, "_lifted_tensor_constant5_3b47b55d1a0ca089": W}
    report = compare_weights(program, {"model.a": W}, states=("kv_cache.k_0",))
    assert (report.equal, report.different, report.missing) == (1, (), ())


def test_a_computed_buffer_is_compared_where_the_program_reads_it():
    computed = {"model.rope.inv_freq": F, "model.rope.original_inv_freq": F}
    report = compare_weights({"model.a": W, "model.rope.inv_freq": F * 2}, {"model.a": W}, computed=computed)
    assert (report.different, report.missing) == (("model.rope.inv_freq",), ())


def test_weights_of_several_dtypes():
    program = {"model.a": W.to(torch.bfloat16), "model.b": W.to(torch.uint8), "model.c": W}
    report = compare_weights(program, {**program, "model.c": W.to(torch.float16)})
    assert (report.equal, len(report.missing)) == (2, 1)
