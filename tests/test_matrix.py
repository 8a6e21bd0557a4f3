"""Every operation under every transform, as `python -m triton_kernels.matrix` has it, in a size for each commit."""

import dataclasses

import pytest
import torch

from triton_kernels import matrix
from triton_kernels.matrix import OPERATIONS, TOLERANCE, TRANSFORMS, UPSTREAM

OPERATION = {operation.name: operation for operation in OPERATIONS}
TRANSFORM = {transform.name: transform for transform in TRANSFORMS}
# What is compiled as one function, which takes a fraction of the time.
FAST = ("grad", "vmap(grad)", "jvp", "jvp(grad)")
FIRST = ("forward", "vmap", "vjp", "jacrev", "jacfwd", "vmap(vmap)", "vmap(jacfwd)")
SECOND = ("grad(grad)", "jacfwd(jacrev)", "jacrev(jacrev)", "jacfwd(jacfwd)")
THIRD = ("grad(jvp(grad))", "jacfwd(jacrev(jacrev))")
FAST_OPERATIONS = ("linear, gelu", "softmax", "linear_cross_entropy, smoothed")
# Activations are one operator: of those but gelu the first group is compiled here, and all of it by `make matrix`.
COMPILED = [
    pytest.param(
        operation,
        group,
        id=f"{operation}-{'+'.join(group)}",
        marks=[] if operation in FAST_OPERATIONS and group is FAST else pytest.mark.slow,
    )
    for operation in OPERATION
    for group in (FAST, FIRST, SECOND, THIRD)
    if group is FAST or not operation.startswith("linear, ") or operation == "linear, gelu"
]


def several(names):
    """Several transforms as one."""
    return matrix.Transform("several", lambda *inputs: [TRANSFORM[name].apply(*inputs) for name in names])


def test_the_table_has_what_it_must():
    names = {name.split(",")[0] for name in OPERATION}
    assert names == {"matmul", "linear", "softmax", "log_softmax", "cross_entropy", "linear_cross_entropy"}
    activations = ("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")
    assert {f"linear, {activation}" for activation in activations} < set(OPERATION)
    first = {"forward", "grad", "vmap", "vmap(grad)", "jvp", "vjp", "jacrev", "jacfwd", "vmap(vmap)"}
    higher = {"jacfwd(jacrev)", "jacrev(jacrev)", "jvp(grad)", "grad(grad)", "jacfwd(jacrev(jacrev))"}
    assert first | higher < set(TRANSFORM) - set(UPSTREAM)
    assert len(OPERATION) == len(OPERATIONS)
    assert len(TRANSFORM) == len(TRANSFORMS)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=TRANSFORM)
@pytest.mark.parametrize("operation", OPERATIONS, ids=OPERATION)
def test_eager(operation, transform, dtype):
    assert matrix.passes(operation, transform, "eager", dtype, "cpu") == ""


def test_every_transform_is_compiled():
    assert {*FAST, *FIRST, *SECOND, *THIRD, *UPSTREAM} == set(TRANSFORM)


@pytest.mark.parametrize(("operation", "group"), COMPILED)
def test_compiled(operation, group):
    assert matrix.passes(OPERATION[operation], several(group), "aot_eager", torch.float64, "cpu") == ""


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["matmul", *FAST_OPERATIONS])
def test_inductor(operation):
    """An operator of each kind; Inductor sees no transforms, only what became of them."""
    chosen = several(("vmap(grad)", "jvp(grad)"))
    assert matrix.passes(OPERATION[operation], chosen, "inductor", torch.float64, "cpu") == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", UPSTREAM)
def test_what_torch_cannot_compile_is_not_silently_wrong(name):
    assert matrix.compiled_cell(OPERATION["softmax"], TRANSFORM[name], "aot_eager", "cpu") in ("torch", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_entropy"])
def test_zero_tangents_have_memory(name):
    """Inductor of torch before 2.15 ends the process where they have none, pytorch#190856."""
    assert matrix.alone(OPERATION[name], TRANSFORM["jacfwd(jacfwd)"], "inductor") == "ok"


def _leaning(x):
    """Softmax with a derivative that is a millionth too large."""
    return torch.softmax(x, -1) + 1e-6 * (x - x.detach())


def test_a_cell_sees_a_wrong_derivative():
    wrong = dataclasses.replace(OPERATION["softmax"], ours=_leaning)
    assert matrix.passes(wrong, TRANSFORM["forward"], "eager", torch.float64, "cpu") == ""
    for name in ("grad", "vmap(grad)", "vjp", "jvp", "jacrev", "jacfwd", "jvp(grad)", "jacfwd(jacrev)", "grad(grad)"):
        assert "relative error" in matrix.passes(wrong, TRANSFORM[name], "eager", torch.float64, "cpu"), name


def test_a_cell_sees_a_derivative_that_is_zero_everywhere():
    constant = dataclasses.replace(OPERATION["softmax"], reference=lambda x: torch.softmax(x.detach(), -1))
    assert "shows nothing" in matrix.passes(constant, TRANSFORM["grad"], "eager", torch.float64, "cpu")


@pytest.mark.parametrize("broken", ["", "eager"])
def test_the_command_prints_the_table_and_writes_it(monkeypatch, capsys, tmp_path, broken):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- matrix -->\nold\n<!-- /matrix -->\nafter\n")
    softmax = dataclasses.replace(OPERATION["softmax"], **({"ours": _leaning} if broken else {}))
    monkeypatch.setattr(matrix, "OPERATIONS", (softmax, OPERATION["matmul"]))
    monkeypatch.setattr(matrix, "TRANSFORMS", (TRANSFORM["forward"], TRANSFORM["grad"]))
    arguments = ["--backend", "aot_eager", "--operation", "softmax", "--write", str(page)]
    assert matrix.main(arguments) == (1 if broken else 0)
    row = f"| softmax | ok/ok | {'**fails**/**fails**' if broken else 'ok/ok'} |"
    written = page.read_text()
    assert row in capsys.readouterr().out
    assert row in written
    assert "| | `forward` | `grad` |\n|---|---|---|\n" in written
    assert written.startswith("before\n<!-- matrix -->\n|")
    assert written.endswith("\n<!-- /matrix -->\nafter\n")
    assert "old" not in written


def test_a_page_without_markers_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n")
    with pytest.raises(ValueError, match="markers"):
        matrix.write(page, ["|"])
    assert page.read_text() == "before\n"
