"""Complex arithmetic becomes real arithmetic with the same results; what is not known is refused by name."""

import re

import pytest
import torch
from torch.export import Dim, export

from flashpte.export.common.errors import ExportError
from flashpte.export.lowering import inspect_pte, lower
from flashpte.export.lowering.complex_numbers import has_complex, with_real_numbers
from flashpte.export.lowering.plain_errors import LoweringError
from flashpte.export.lowering.preflight import check_programs
from flashpte.export.lowering.prepare import plain_program, prepare_pte


class Llama4Rope(torch.nn.Module):
    """As transformers writes it: frequencies by ``polar``, scaled, broadcast over the heads."""

    def forward(self, x, angle):
        turn = torch.polar(torch.ones_like(angle), angle) * 1.25
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn[:, None, :]).flatten(-2).type_as(x)


class MetaRope(torch.nn.Module):
    """As Meta's Llama writes it: a table of complex frequencies, read at the positions."""

    def __init__(self, persistent=True):
        super().__init__()
        angles = torch.outer(torch.arange(32.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles), persistent=persistent)

    def forward(self, x, positions):
        turn = self.table[positions].view(x.shape[0], 1, 4)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(turn * pairs).flatten(2).type_as(x)


class WritesInPlace(torch.nn.Module):
    """Writes to what complex tensors were made of, and through a view of their parts."""

    def forward(self, x, y):
        x, y = x.clone(), y.clone()
        a, z = torch.complex(x[..., 0], x[..., 1]), torch.view_as_complex(y)
        w = a * z
        x.mul_(2)
        torch.view_as_real(z).add_(1)
        return torch.view_as_real(w), torch.view_as_real(a), torch.view_as_real(z * a)


class Arithmetic(torch.nn.Module):
    """Every operator that is known, each where a mistake in it shows."""

    def forward(self, x, y):
        a, b = torch.view_as_complex(x), torch.complex(y[..., 0], y[..., 1])
        c = (a * b + a - b * (0.5 - 2j)) * y[..., 0] / 3.0
        d = torch.cat([c.conj().resolve_conj().unsqueeze(0).expand(2, -1, -1).real, (-c)[None].imag])
        e = torch.view_as_real(c.transpose(0, 1)[1:].reshape(-1))
        return d, e, (c.to(torch.complex128) * 2).real.float()


def programs():
    randn = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, generator=randn)
    rows = Dim("rows", min=2, max=16)
    shapes = {"x": {0: rows}}
    yield "llama 4", Llama4Rope(), (x, torch.randn(5, 4, generator=randn)), {**shapes, "angle": {0: rows}}
    yield "llama 4, bfloat16", Llama4Rope(), (x.bfloat16(), torch.randn(5, 4, generator=randn)), None
    yield "meta", MetaRope(), (x, torch.arange(5) * 3), {**shapes, "positions": {0: rows}}
    yield "meta, not saved", MetaRope(False), (x, torch.arange(5) * 3), None
    yield (
        "arithmetic",
        Arithmetic(),
        (torch.randn(3, 4, 2, generator=randn), torch.randn(3, 4, 2, generator=randn)),
        None,
    )


@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize(
    ("name", "module", "args", "shapes"), programs(), ids=lambda v: v if isinstance(v, str) else ""
)
def test_results_stay(name, module, args, shapes, decompose):
    program = export(module, args, dynamic_shapes=shapes)
    if decompose:
        program = program.run_decompositions({})
    assert has_complex(program.graph_module)
    expected = module(*args)
    plain = plain_program(program, "pte")
    check_programs({"forward": plain}, "pte")
    prepared = prepare_pte(plain)
    assert not has_complex(prepared.graph_module)
    prepared.graph_module.graph.lint()
    torch.testing.assert_close(prepared.module()(*args), expected)
    torch.testing.assert_close(program.module()(*args), expected)  # the caller's program is as it was


@pytest.mark.lowering
def test_a_complex_table_lowers(tmp_path):
    """The written files are compared with the program that was compiled, which holds the table's real numbers."""
    _, module, args, shapes = next(case for case in programs() if case[0] == "meta")
    program = export(module, args, dynamic_shapes=shapes)
    lowered = lower({"forward": program}, output_dir=tmp_path / "out", arch="sm_90")
    table = inspect_pte(lowered.model).weight("forward", "table")
    assert torch.equal(table, torch.view_as_real(module.table))
    assert program.state_dict["table"].is_complex()  # the caller's


def test_a_program_without_complex_numbers_stays():
    program = export(torch.nn.Linear(3, 4), (torch.randn(2, 3),))
    assert with_real_numbers(program) is program


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.fft.fft(x).abs(), "fft"),
        (lambda x: torch.view_as_complex(x).angle(), "angle"),
        (lambda x: torch.view_as_complex(x).abs(), "abs"),
        (lambda x: torch.view_as_real(torch.complex(x[:, :1], x[:1, :])), "complex"),  # which broadcasts
        (
            lambda x: torch.cond(x.sum() > 0, lambda x: torch.view_as_complex(x).real + 1, lambda x: x[:, 0] * 2, (x,)),
            "branch",
        ),
        (lambda x: torch.view_as_real(torch.view_as_complex(x) + x[..., 0]), "add"),
        (lambda x: torch.view_as_real(torch.view_as_complex(x).exp()), "exp"),
    ],
)
def test_what_is_not_known_is_named(function, named):
    class Net(torch.nn.Module):
        def forward(self, x):
            return function(x)

    program = export(Net(), (torch.randn(4, 2),))
    with pytest.raises(LoweringError, match=rf"{re.escape(named)}.*complex numbers") as error:
        with_real_numbers(program)
    assert "\n" not in str(error.value)
    with pytest.raises(ExportError, match=rf"method forward: .*{re.escape(named)}"):
        check_programs({"forward": program}, "pte")
