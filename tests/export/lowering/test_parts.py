"""A method that was compiled into a file: the same bytes as without, and refused if it does not belong."""

import json
import zipfile

import pytest
import torch

from flashpte.export.common.errors import UsageError
from flashpte.export.files.output_folder import OutputError
from flashpte.export.lowering import PartError, compile_method, lower, parts
from flashpte.export.lowering.cross_compile.answers import Answer, Weight
from flashpte.export.lowering.parts import Part, build_versions, check_part, read_answer, read_part, write_part
from flashpte.export.lowering.program_digest import program_digest

GAPS = torch.arange(129.0)


class Layer(torch.nn.Module):
    """A weight, a mutated buffer, a view with gaps (which becomes dense on the GPU) and a lifted constant."""

    def __init__(self, fill):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((64, 64), fill))
        self.register_buffer("state", torch.zeros(4, 64))
        self.register_buffer("gaps", (GAPS * fill)[1::2])

    def forward(self, x, rows):
        self.state.index_copy_(0, rows, torch.relu(x @ self.weight))
        return self.state + self.gaps * torch.tensor([0.5, 2.0]).sum()


def program(fill=1.0, rows=1):
    return torch.export.export(Layer(fill), (torch.ones(rows, 64), torch.arange(rows)))


@pytest.fixture
def part(tmp_path):
    """A part of method ``one`` that no compiler made."""
    library = tmp_path / "made.so"
    library.write_bytes(bytes(range(256)) * 8)
    properties = {"shape": (2,), "stride": (1,), "offset": 0, "storage_size": None, "is_fake": True}
    weights = {
        "weight": Weight("weight", ((64, 64), (64, 1), 0), torch.float32, True, properties),
        "made": Weight(b"\0\1\2\3", ((2,), (1,), 0), torch.bfloat16, False, properties),
    }
    described = Part("one", "sm_90", program_digest(program(), "flashpte"), "a plan", build_versions())
    write_part(tmp_path / "one.zip", described, Answer(str(library), weights))
    return tmp_path / "one.zip"


def test_a_part_is_read_as_it_was_written(part, tmp_path):
    read = read_part(part)
    assert (read.method, read.arch, read.plan, read.versions) == ("one", "sm_90", "a plan", build_versions())
    answer = read_answer(part, tmp_path / "read.so")
    assert (tmp_path / "read.so").read_bytes() == (tmp_path / "made.so").read_bytes()
    assert (answer.weights["weight"].storage, answer.weights["made"].storage) == ("weight", b"\0\1\2\3")
    assert (answer.weights["weight"].layout, answer.weights["made"].dtype) == (((64, 64), (64, 1), 0), torch.bfloat16)
    assert answer.weights["weight"].properties["shape"] == (2,)
    first = part.read_bytes()
    write_part(part, read, Answer(str(tmp_path / "read.so"), answer.weights))
    assert part.read_bytes() == first
    assert not list(tmp_path.glob(".*"))


def damaged(part, how):
    data = bytearray(part.read_bytes())
    if how == "one byte":
        with zipfile.ZipFile(part) as archive:
            data[archive.getinfo("library.so").header_offset + 60] ^= 1
    part.write_bytes({"one byte": data, "cut": data[:-40], "text": b"{}", "empty": b""}[how])


@pytest.mark.parametrize("how", ["one byte", "cut", "text", "empty"])
def test_a_damaged_part_is_refused(part, how, tmp_path):
    damaged(part, how)
    with pytest.raises(PartError, match=rf"^{part} is damaged, or is no compiled method: compile it again$"):
        lower({"one": program()}, output_dir=tmp_path / "out", arch="sm_90", compiled={"one": part})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("generator", "another"),
        ("version", 99),
        ("weights", None),
        ("versions", ["torch"]),
    ],
)
def test_a_part_of_another_format_is_refused(part, field, wrong, tmp_path):
    with zipfile.ZipFile(part) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(files["part.json"]) | {field: wrong}
    with zipfile.ZipFile(part, "w") as archive:
        for name, data in {**files, "part.json": json.dumps(header)}.items():
            archive.writestr(name, data)
    if field != "weights":
        with pytest.raises(PartError, match="compile it again"):
            read_part(part)
    if field != "versions":
        with pytest.raises(PartError, match="compile it again"):
            read_answer(part, tmp_path / "read.so")


def test_a_part_that_does_not_belong_is_refused(part, monkeypatch, tmp_path):
    digest = program_digest(program(), "flashpte")
    check_part(part, method="one", arch="sm_90", program=digest)
    with pytest.raises(PartError, match=r"holds one for sm_90, not two for sm_90$"):
        check_part(part, method="two", arch="sm_90", program=digest)
    with pytest.raises(PartError, match=r"holds one for sm_90, not one for sm_80$"):
        check_part(part, method="one", arch="sm_80", program=digest)
    for other in (program_digest(program(rows=2), "flashpte"), program_digest(program(), "math")):
        with pytest.raises(PartError, match=r"compiled from another program than one is now: compile it again$"):
            check_part(part, method="one", arch="sm_90", program=other)
    with pytest.raises(PartError, match=r"missing\.zip does not exist$"):
        check_part(tmp_path / "missing.zip", method="one", arch="sm_90", program=digest)
    monkeypatch.setattr(parts, "compiler_version", lambda compiler: "g++ 1.0")
    with pytest.raises(PartError, match=r"compiled under other versions \(g\+\+ .*, here g\+\+ 1\.0\): compile it"):
        check_part(part, method="one", arch="sm_90", program=digest)


def test_what_lower_takes(part, tmp_path):
    for wrong in ({"compiled": {"two": part}}, {"compiled": {"one": part}, "format": "pt2"}):
        with pytest.raises(UsageError, match="must be methods of the programs, and the format pte"):
            lower({"one": program()}, output_dir=tmp_path / "out", arch="sm_90", **wrong)


def test_a_part_that_cannot_be_written_leaves_nothing(part, tmp_path):
    library = Answer(str(tmp_path / "made.so"), {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_part(tmp_path / "file" / "one.zip", read_part(part), library)
    with pytest.raises(OutputError, match="cannot write"):
        write_part(part, read_part(part), Answer(str(tmp_path / "gone.so"), {}))
    assert not list(tmp_path.glob(".*"))
    read_part(part)


def test_the_digest_counts_what_compiling_reads():
    first = program_digest(program(), "flashpte")
    assert program_digest(program(), "flashpte") == first
    assert program_digest(program(fill=2.0), "flashpte") == first
    changed = program()
    (name,) = changed.graph_signature.inputs_to_lifted_tensor_constants.values()
    changed.constants[name][0] = 3.0
    assert program_digest(changed, "flashpte") != first
    shared = program()
    shared.state_dict["state"] = shared.state_dict["weight"][:4]
    assert program_digest(shared, "flashpte") != first


@pytest.mark.lowering
def test_a_method_compiled_without_its_weights_gives_the_same_bytes(tmp_path):
    def lowered(name, **how):
        folder = lower({"one": program()}, output_dir=tmp_path / name, arch="sm_90", **how).folder
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    file = compile_method("one", program(fill=5.0), output=tmp_path / "parts" / "one.zip", arch="sm_90")
    assert list(file.parent.iterdir()) == [file]
    lines = []
    joined = lowered("joined", compiled={"one": file}, progress=lines.append)
    assert lines[0] == "joining one"
    assert joined == lowered("alone")
    # Weights are found by name, so another program's values would be its own.
    stale = read_part(file)
    write_part(
        file,
        stale,
        Answer(
            str(tmp_path / "joined/model.pte"),
            {
                "gone": Weight(
                    "gone", ((1,), (1,), 0), torch.float32, True, {"shape": (1,), "stride": (1,), "offset": 0}
                )
            },
        ),
    )
    with pytest.raises(parts.ExportError, match="the compiled method reads gone, which the program does not hold"):
        lowered("refused", compiled={"one": file})
    assert not (tmp_path / "refused").exists()
