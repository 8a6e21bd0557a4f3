"""Wrong uses of the derivatives: each error says what is wrong, what was expected, what came, and the cure."""

import pytest
import torch

import fnn

X = torch.tensor([0.5, -1.0, 2.0])
BATCH = torch.ones(2, 3)


# Every transform of a function of one vector: of its sum where a scalar is asked for, and else of a vector.
OF_SCALAR = {
    "grad": lambda f, x: fnn.grad(f)(x),
    "value_and_grad": lambda f, x: fnn.value_and_grad(f)(x),
    "hessian": lambda f, x: fnn.hessian(f)(x),
    "hvp": lambda f, x: fnn.hvp(f, x, torch.ones_like(x)),
    "per_sample_grad": lambda f, x: fnn.per_sample_grad(f)(x, BATCH),
    "per_sample_grad_norm": lambda f, x: fnn.per_sample_grad_norm(f)(x, BATCH),
    "clipped_grad": lambda f, x: fnn.clipped_grad(f, 1.0)(x, BATCH),
    "hessian_diagonal": lambda f, x: fnn.hessian_diagonal(f)(x),
    "sparse_hessian": lambda f, x: fnn.sparse_hessian(f)(x),
    "HessianOperator": lambda f, x: fnn.HessianOperator(f, x) @ x,
}
OF_VECTOR = {
    "jacobian": lambda f, x: fnn.jacobian(f)(x),
    "vjp": lambda f, x: fnn.vjp(f, x)[1](x),
    "jvp": lambda f, x: fnn.jvp(f, x, torch.ones_like(x)),
    "linearize": lambda f, x: fnn.linearize(f, x)[1](x),
    "gnvp": lambda f, x: fnn.gnvp(f, lambda y: (y**2).sum(), x, torch.ones_like(x)),
    "ntk": lambda f, x: fnn.ntk(f, x, BATCH, BATCH),
    "laplacian": lambda f, x: fnn.laplacian(f)(x),
    "divergence": lambda f, x: fnn.divergence(f)(x),
    "sparse_jacobian": lambda f, x: fnn.sparse_jacobian(f)(x),
    "JacobianOperator": lambda f, x: fnn.JacobianOperator(f, x) @ x,
    "NTKOperator": lambda f, x: fnn.NTKOperator(f, x, BATCH).to_dense(),
    "GGNOperator": lambda f, x: fnn.GGNOperator(f, lambda y: (y**2).sum(), x, BATCH).to_dense(),
}
ALL = {**OF_SCALAR, **OF_VECTOR}


def ask(name, f, x=X):
    """The derivative `name` of an elementwise function `f`, summed where a scalar is asked for."""
    if name in OF_SCALAR:
        return OF_SCALAR[name](lambda x, *example: f(x).sum(), x)
    return OF_VECTOR[name](lambda x, *example: f(x), x)


def says(error, *parts):
    """The message holds every part."""
    message = str(error.value)
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("name", ALL)
def test_what_is_asked_below_works(name):
    ask(name, torch.sin)


@pytest.mark.parametrize("name", OF_SCALAR)
def test_output_that_is_not_a_scalar(name):
    with pytest.raises(ValueError, match=r"\(3,\)") as error:
        OF_SCALAR[name](lambda x, *example: x**2, X)
    says(error, name)


def test_grad_names_the_cures_of_a_vector():
    with pytest.raises(ValueError, match=r"\.sum\(\)") as error:
        fnn.grad(torch.sin)(X)
    says(error, "grad", "(3,)", "fnn.jacobian")


@pytest.mark.parametrize("name", ALL)
def test_output_that_is_not_a_tensor(name):
    with pytest.raises(TypeError) as error:
        ALL[name](lambda x, *example: 2.0, X)
    says(error, "float", "tensor")


@pytest.mark.parametrize("name", ALL)
def test_integer_input(name):
    with pytest.raises(TypeError) as error:
        ALL[name](lambda x, *example: x, torch.arange(3))
    says(error, "torch.int64", "floating")


@pytest.mark.parametrize("name", [name for name in OF_SCALAR if name != "sparse_hessian"])
def test_integer_leaf_is_named_by_its_path(name):
    params = {"layer": {"weight": X, "count": torch.tensor(3)}}
    f = lambda p, *example: p["layer"]["weight"].sum()
    call = {
        "hvp": lambda: fnn.hvp(f, params, params),
        "HessianOperator": lambda: fnn.HessianOperator(f, params),
    }.get(name, lambda: OF_SCALAR[name](f, params))
    with pytest.raises(TypeError) as error:
        call()
    says(error, "layer.count", "torch.int64")


@pytest.mark.parametrize("name", ALL)
def test_number_instead_of_a_tensor(name):
    with pytest.raises(TypeError) as error:
        call = {
            "hvp": lambda f, x: fnn.hvp(f, x, X),
            "jvp": lambda f, x: fnn.jvp(f, x, X),
            "gnvp": lambda f, x: fnn.gnvp(f, f, x, X),
        }.get(name, ALL[name])
        call(lambda x, *example: X.sum(), 2.0)
    says(error, "float", "tensor")


@pytest.mark.parametrize("name", ALL)
def test_function_that_draws_without_a_key(name):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
        ask(name, lambda x: x * torch.rand_like(x))
    says(error, "global generator", "key")


@pytest.mark.parametrize("name", ["grad", "jacobian", "hvp", "per_sample_grad_norm", "laplacian"])
def test_compiled_function_that_draws_without_a_key(name, fast_compile):
    with pytest.raises(Exception, match="global generator"):
        torch.compile(lambda x: ask(name, lambda x: torch.nn.functional.dropout(x, 0.5), x), fullgraph=True)(X)


@pytest.mark.parametrize("name", ALL)
def test_function_that_writes_into_its_argument(name):
    with pytest.raises(RuntimeError) as error:
        ask(name, lambda x: x.mul_(2), X.clone())
    says(error, "in place")


@pytest.mark.parametrize("name", ALL)
def test_function_that_writes_into_a_tensor_from_outside(name):
    outside = torch.zeros(3)
    with pytest.raises(RuntimeError) as error:
        ask(name, lambda x: outside.add_(x) * x)
    says(error, "in place")


@pytest.mark.parametrize("name", ALL)
def test_compiled_function(name):
    compiled = torch.compile(lambda x, *example: x)
    with pytest.raises(TypeError) as error:
        ALL[name](compiled, X)
    says(error, "already compiled", "torch.compile(")


@pytest.mark.parametrize("name", ALL)
def test_compiled_module(name):
    with pytest.raises(TypeError) as error:
        ALL[name](torch.compile(torch.nn.Tanh()), X)
    says(error, "already compiled")


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("hvp", "gnvp", "vjp", "jvp", "linearize")])
def test_value_instead_of_a_function(name):
    with pytest.raises(TypeError) as error:
        ALL[name](X, X)
    says(error, "expected a function", "Tensor")


# The functions that take all rows at once cannot branch on one row's values; the others may.
@pytest.mark.parametrize(
    "name", ["jacobian", "hessian", "per_sample_grad", "per_sample_grad_norm", "clipped_grad", "ntk", "laplacian"]
)
def test_branch_on_a_value_that_differs_between_rows(name):
    def branches(x, *example):
        y = x * (example[0] if example else 1.0)
        z = fnn.grad(lambda z: (z**3).sum())(y)
        return (z if z.sum() > 0 else -z).sum()

    call = {
        "jacobian": lambda: fnn.jacobian(branches, batched=True)(BATCH),
        "hessian": lambda: fnn.hessian(branches, batched=True)(BATCH),
        "laplacian": lambda: torch.vmap(fnn.laplacian(branches))(BATCH),
    }.get(name, lambda: ALL[name](branches, X))
    with pytest.raises(RuntimeError) as error:
        call()
    says(error, "torch.where")


def test_tangents_that_do_not_fit_are_named():
    params = {"w": torch.ones(2, 3), "b": {"c": torch.ones(2)}}
    wrong = {"w": torch.ones(2, 3), "b": {"c": torch.ones(3)}}
    double = {"w": torch.ones(2, 3), "b": {"c": torch.ones(2, dtype=torch.float64)}}
    missing = {"w": torch.ones(2, 3)}
    f = lambda p: p["w"].sum(1) * p["b"]["c"]
    loss = lambda p: f(p).sum()
    for tangents, found in ((wrong, "(3,)"), (double, "float64"), (missing, "b.c")):
        for call in (
            lambda t: fnn.jvp(f, params, t),
            lambda t: fnn.jvp(f, (params,), (t,)),
            lambda t: fnn.hvp(loss, params, t),
            lambda t: fnn.gnvp(f, torch.sum, params, t),
            lambda t: fnn.linearize(f, params)[1](t),
            lambda t: fnn.HessianOperator(loss, params) @ t,
            lambda t: fnn.JacobianOperator(f, params) @ t,
        ):
            with pytest.raises((ValueError, TypeError)) as error:
                call(tangents)
            says(error, "b.c", found)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        fnn.vjp(f, params)[1](torch.ones(3))


def test_given_pattern_that_misses_a_nonzero():
    f = lambda x: x**2 + torch.roll(x, 1)
    pattern = torch.eye(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="pattern") as error:
        fnn.sparse_jacobian(f, pattern=pattern)(X)
    says(error, "sparse_jacobian")
    with pytest.raises(ValueError, match="pattern") as error:
        fnn.sparse_hessian(lambda x: x.prod(), pattern=pattern)(X)
    says(error, "sparse_hessian")


@pytest.mark.parametrize("name", ["grad", "value_and_grad", "jacobian", "hessian", "laplacian", "hessian_diagonal"])
@pytest.mark.parametrize(
    ("argnums", "expected"),
    [(2, ("argnums=2", "2 arguments")), (-3, ("argnums=-3",)), ((0, 0), ("(0, 0)",)), ((), ("()",))],
)
def test_argnums_that_are_not_there(name, argnums, expected):
    transform = getattr(fnn, name)
    with pytest.raises(ValueError, match="argument") as error:
        transform(lambda x, y: (x * y).sum(), argnums)(X, X)
    says(error, name, *expected)


@pytest.mark.parametrize("argnums", ["x", True, (0, "y"), 1.0, None])
def test_argnums_that_are_no_numbers(argnums):
    for transform in (fnn.grad, fnn.jacobian, fnn.hessian):
        with pytest.raises(TypeError, match="argnums must be an int or a tuple of ints"):
            transform(lambda x, y: (x * y).sum(), argnums)(X, X)


@pytest.mark.parametrize(
    "call",
    [
        lambda f: fnn.grad(f, has_aux=True)(X),
        lambda f: fnn.value_and_grad(f, has_aux=True)(X),
        lambda f: fnn.jacobian(f, has_aux=True)(X),
        lambda f: fnn.hessian(f, has_aux=True)(X),
        lambda f: fnn.vjp(f, X, has_aux=True),
        lambda f: fnn.jvp(f, X, X, has_aux=True),
        lambda f: fnn.linearize(f, X, has_aux=True),
        lambda f: fnn.hvp(f, X, X, has_aux=True),
        lambda f: fnn.laplacian(f, has_aux=True)(X),
        lambda f: fnn.per_sample_grad(f, has_aux=True)(X, BATCH),
        lambda f: fnn.sparse_jacobian(f, has_aux=True)(X),
    ],
)
def test_has_aux_without_a_pair(call):
    with pytest.raises(TypeError) as error:
        call(lambda x, *example: x.sum())
    says(error, "has_aux=True", "(output, aux)", "Tensor")
    with pytest.raises(TypeError) as error:
        call(lambda x, *example: (x.sum(), x, x))
    says(error, "has_aux=True", "a tuple of 3")


def test_pair_without_has_aux():
    for call in (fnn.grad, fnn.value_and_grad, fnn.hessian, fnn.per_sample_grad_norm, fnn.clipped_grad):
        with pytest.raises(TypeError, match="has_aux"):
            transform = call(lambda x, *example: (x.sum(), x), *([1.0] if call is fnn.clipped_grad else []))
            transform(X, BATCH) if "sample" in call.__name__ or "clipped" in call.__name__ else transform(X)
