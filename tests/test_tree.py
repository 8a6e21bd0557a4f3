"""fnn.tree: paths, partition and combine, at, ravel, select, and errors that name the path."""

from typing import NamedTuple

import pytest
import torch

from fnn import tree


class Moments(NamedTuple):
    mu: dict
    count: torch.Tensor


@pytest.fixture
def nested():
    return {
        "0": {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(3)},
        "moments": Moments({"w": torch.full((1,), 2.0)}, torch.tensor(3.0)),
        "list": [torch.zeros(2), (torch.ones(1),)],
        "empty": {},
    }


PATHS = ["0.weight", "0.bias", "moments.mu.w", "moments.count", "list.0", "list.1.0"]


def test_paths_follow_insertion_order(nested):
    assert list(tree.paths(nested)) == PATHS
    assert list(tree.paths({"b": torch.ones(1), "a": torch.ones(1)})) == ["b", "a"]
    assert tree.size(nested) == 6 + 3 + 1 + 1 + 2 + 1
    assert list(tree.paths(torch.ones(1))) == [""]


def test_flatten_and_unflatten_are_inverse(nested):
    leaves, structure = tree.flatten(nested)
    again = tree.unflatten(structure, leaves)
    assert type(again["moments"]) is Moments
    assert tree.allclose(again, nested)


def test_map_over_two_trees_names_the_difference(nested):
    doubled = tree.map(torch.add, nested, nested)
    assert torch.equal(doubled["moments"].count, torch.tensor(6.0))
    other = tree.map(lambda x: x, nested)
    del other["0"]["bias"]
    with pytest.raises(ValueError, match=r"missing '0\.bias'"):
        tree.map(torch.add, nested, other)
    with pytest.raises(ValueError, match=r"unexpected '0\.bias'"):
        tree.map(torch.add, other, nested)
    with pytest.raises(ValueError, match="another order"):
        tree.map(torch.add, {"a": torch.ones(1), "b": torch.ones(1)}, {"b": torch.ones(1), "a": torch.ones(1)})
    with pytest.raises(ValueError, match="other containers"):
        tree.map(torch.add, [torch.ones(1)], (torch.ones(1),))


@pytest.mark.parametrize(
    "where",
    [
        "*weight",
        lambda path, leaf: path.endswith("weight"),
        {
            "0": {"weight": True, "bias": False},
            "moments": Moments({"w": False}, False),  # type: ignore[arg-type]
            "list": [False, (False,)],
            "empty": {},
        },
    ],
    ids=["pattern", "predicate", "mask"],
)
def test_partition_and_combine(nested, where):
    chosen, rest = tree.partition(nested, where)
    assert list(tree.paths(chosen)) == ["0.weight"]
    assert list(tree.paths(rest)) == PATHS[1:]
    assert rest["0"]["weight"] == ()
    for halves in ((chosen, rest), (rest, chosen)):
        again = tree.combine(*halves)
        assert list(tree.paths(again)) == PATHS
        assert type(again["moments"]) is Moments
        assert tree.allclose(again, nested)


def test_combine_refuses_two_leaves_and_other_structures(nested):
    with pytest.raises(ValueError, match=r"both trees have a leaf at '0\.weight'"):
        tree.combine(nested, nested)
    with pytest.raises(ValueError, match="but the trees differ"):
        tree.combine({"a": {"b": ()}}, {"a": {"c": ()}})


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.b", "a", False),
        ("a.b.c", "a.*", True),
        ("a.b.c", "*.c", True),
        ("a.b.c", "a*c", True),
        ("ab", "ab*b", False),
        ("layers.10.weight", "layers.1.*", False),
        ("layers.10.weight", "*.1*.w*t", True),
        ("", "*", True),
        ("weight", "weight*", True),
        ("a.[x]", "a.[x]", True),
    ],
)
def test_patterns(path, pattern, expected):
    names = path.split(".")
    node = torch.ones(1)
    for name in reversed(names):
        node = {name: node} if path else node
    both = {"it": node, "other": torch.ones(1)} if path else node
    if not path:
        assert tree.leaves(tree.mask(both, pattern)) == [True]
        return
    pattern = f"it.{pattern}" if not pattern.startswith("*") else pattern
    if expected:
        assert list(tree.select(both, pattern)) == [f"it.{path}"]
    else:
        with pytest.raises(ValueError, match="no path matches"):
            tree.select(both, pattern)


def test_at_reads_and_replaces_without_changing_the_tree(nested):
    assert torch.equal(tree.at(nested, "moments.mu.w").get(), torch.full((1,), 2.0))
    changed = tree.at(nested, "moments.mu.w").set(torch.zeros(4))
    assert changed["moments"].mu["w"].shape == (4,)
    assert nested["moments"].mu["w"].shape == (1,)
    assert changed["0"]["weight"] is nested["0"]["weight"]
    assert tree.at(nested, "list.1.0").apply(lambda x: x + 1)["list"][1][0].item() == 2
    assert tree.at(nested, "0").set({})["0"] == {}
    assert tree.at(torch.ones(1), "").set(3) == 3


def test_at_names_the_nearest_path(nested):
    with pytest.raises(KeyError, match=r"no path '0\.weigth'.*nearest are '0\.weight'"):
        tree.at(nested, "0.weigth")
    with pytest.raises(KeyError, match=r"no path '0\.weight\.deeper'"):
        tree.at(nested, "0.weight.deeper")


def test_all_registered_containers():
    import collections

    containers = {
        "default": collections.defaultdict(list, a=torch.ones(1)),
        "ordered": collections.OrderedDict(b=torch.ones(1), a=torch.zeros(1)),
        "deque": collections.deque([torch.ones(1), torch.zeros(1)]),
        "dotted.key": {"c": torch.ones(1)},
    }
    assert tree.allclose(tree.combine(*tree.partition(containers, "*a")), containers)
    for path in tree.paths(containers):
        changed = tree.at(containers, path).set(torch.full((1,), 5.0))
        assert {p for p, leaf in tree.paths(changed).items() if leaf == 5} == {path}
        assert tree.allclose(tree.at(changed, path).apply(lambda _: tree.at(containers, path).get()), containers)


def test_two_leaves_with_one_path_are_refused():
    for clash in ({1: torch.ones(1), "1": torch.ones(1)}, {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}):
        with pytest.raises(ValueError, match="two leaves of the tree have the path"):
            tree.paths(clash)


def test_ravel_restores_dtypes_exactly():
    mixed = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "single": torch.randn(2, 3),
        "double": torch.randn((), dtype=torch.float64),
    }
    vector, unravel = tree.ravel(mixed)
    assert vector.dtype == torch.float64
    assert vector.shape == (9,)
    again = unravel(vector)
    for path, leaf in tree.paths(again).items():
        assert leaf.dtype == tree.paths(mixed)[path].dtype
        assert torch.equal(leaf, tree.paths(mixed)[path])


def test_ravel_errors_and_edges():
    with pytest.raises(TypeError, match=r"'count' \(torch\.int64\).*partition first"):
        tree.ravel({"weight": torch.ones(2), "count": torch.tensor(1)})
    vector, unravel = tree.ravel({"a": {}})
    assert vector.numel() == 0
    assert unravel(vector) == {"a": {}}
    _, unravel = tree.ravel(torch.ones(2, 2))
    assert unravel(torch.arange(4.0)).shape == (2, 2)
    with pytest.raises(ValueError, match=r"expected a vector of shape \(4,\), got \(3,\)"):
        unravel(torch.ones(3))


def test_check_like_names_leaf_and_cause(nested):
    wrong = tree.at(nested, "0.bias").set(torch.ones(4))
    with pytest.raises(ValueError, match=r"params: leaf '0\.bias' has shape \(4,\), expected \(3,\)"):
        tree.check_like(nested, wrong, "params")
    wrong = tree.at(nested, "0.bias").set(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"leaf '0\.bias' has dtype torch\.float64"):
        tree.allclose(nested, wrong)


def test_under_transforms_and_compile(nested):
    def f(t):
        chosen, rest = tree.partition(t, "*weight")
        grads = torch.func.grad(lambda c: tree.combine(c, rest)["0"]["weight"].pow(2).sum())(chosen)
        vector, unravel = tree.ravel(grads)
        return tree.map(torch.add, unravel(vector), grads)

    eager = f(nested)
    assert torch.equal(eager["0"]["weight"], 4 * nested["0"]["weight"])
    assert list(tree.paths(eager)) == ["0.weight"]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(nested)
    assert tree.allclose(eager, compiled)
    batched = tree.map(lambda x: torch.stack([x, x + 1]), nested)
    rows = torch.func.vmap(f)(batched)
    assert torch.equal(rows["0"]["weight"][0], eager["0"]["weight"])
