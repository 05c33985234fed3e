"""Programs whose callers pass and take tensors in GPU memory."""

import pytest
import torch

from flashpte.export.files.executorch_tables import read_program
from flashpte.export.lowering import lower

pytestmark = [pytest.mark.lowering, pytest.mark.xdist_group("device_tensors")]


class Add(torch.nn.Module):
    def forward(self, x, y):
        return x + y.sum()


@pytest.fixture(scope="module", params=[False, True], ids=["host", "device"])
def method(request, tmp_path_factory):
    """The table of a method of a program, and whether it is for tensors on the device."""
    folder = tmp_path_factory.mktemp("device") / "out"
    program = torch.export.export(Add(), (torch.ones(4), torch.ones(2)))
    lower({"forward": program}, output_dir=folder, arch="sm_90", device_tensors=request.param)
    table, _ = read_program((folder / "model.pte").read_bytes())
    (plan,) = [plan for plan in table["execution_plan"] if plan["name"] == "forward"]
    return plan, request.param


def tensors(plan, which):
    return [plan["values"][index]["val"] for index in plan[which]]


def test_inputs_and_outputs(method):
    plan, on_device = method
    place = "CUDA" if on_device else None
    for tensor in tensors(plan, "inputs") + tensors(plan, "outputs"):
        assert ((tensor.get("extra_tensor_info") or {}).get("device_type") == "CUDA") == (place == "CUDA")


def test_the_caller_owns_inputs_on_the_device_and_no_output(method):
    # A runner passes its own pointers, and takes the output from memory that the program planned.
    plan, on_device = method
    assert [tensor.get("allocation_info") is None for tensor in tensors(plan, "inputs")] == [on_device] * 2
    assert all(tensor.get("allocation_info") is not None for tensor in tensors(plan, "outputs"))


def test_copies(method):
    plan, on_device = method
    copies = {operator["name"] for operator in plan.get("operators", [])}
    assert copies == (set() if on_device else {"et_copy::_h2d_copy", "et_copy::_d2h_copy"})
