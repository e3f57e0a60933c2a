"""LaSO's losses and synthetic support against plain NumPy."""

import jax
import numpy as np
import pytest

from mlfsic_jax.methods import laso

B, D, C, WIDTH = 5, 4, 3, 6


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, B, D)).astype(np.float32)
    labels_x, labels_y = (rng.random((2, B, C)) < 0.5).astype(np.float32)
    model = laso.Operations(C, WIDTH, dropout=0.5)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, y, labels_x, labels_y, method="losses"))["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)
    return model, params, x, y, labels_x, labels_y


def network(params, x, y):
    hidden = np.concatenate([x, y], axis=1).astype(np.float64)
    for i in range(3):
        dense, norm = params[f"Dense_{i}"], params[f"LayerNorm_{i}"]
        hidden = hidden @ dense["kernel"] + dense["bias"]
        hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-6)
        hidden = hidden * norm["scale"] + norm["bias"]
        hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    return hidden @ params["Dense_3"]["kernel"] + params["Dense_3"]["bias"]


def test_losses_are_the_papers(case):
    model, params, x, y, labels_x, labels_y = case

    def entropy(features, labels):
        p = 1 / (1 + np.exp(-(features @ params["classifier"]["kernel"] + params["classifier"]["bias"])))
        return -np.mean([np.log(p[i, c] if labels[i, c] else 1 - p[i, c]) for i in range(B) for c in range(C)])

    def squared(a, b):
        return np.mean((a - b) ** 2)

    def union(a, b):
        return network(params["union"], a, b)

    def intersection(a, b):
        return network(params["intersection"], a, b)

    def subtraction(a, b):
        return network(params["subtraction"], a, b)

    sets_x, sets_y = ([set(np.flatnonzero(row)) for row in labels] for labels in (labels_x, labels_y))

    def rows(sets):
        return [[c in s for c in range(C)] for s in sets]

    pairs = list(zip(sets_x, sets_y, strict=True))
    expected = {
        "classifier": entropy(x, labels_x) + entropy(y, labels_y),
        "union": entropy(union(x, y), np.array(rows([a | b for a, b in pairs]))),
        "intersection": entropy(intersection(x, y), np.array(rows([a & b for a, b in pairs]))),
        "subtraction": entropy(subtraction(x, y), np.array(rows([a - b for a, b in pairs]))),
        "symmetry": squared(union(x, y), union(y, x)) + squared(intersection(x, y), intersection(y, x)),
        "mode_collapse": squared(x, union(subtraction(x, y), intersection(x, y)))
        + squared(y, union(subtraction(y, x), intersection(x, y))),
    }
    got = model.apply({"params": params}, x, y, labels_x, labels_y, method="losses")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)  # float32 against float64


def test_synthetic_support_is_what_the_networks_make_of_pairs(case):
    _, params, *_ = case
    rng = np.random.default_rng(1)
    components = np.linalg.qr(rng.normal(size=(7, D)))[0].astype(np.float32)
    x, labels = rng.normal(size=(B, 7)).astype(np.float32), np.eye(B, C, dtype=np.float32)
    labels[:, 0] = 1
    networks = {name: params[name] for name in params if name != "classifier"}
    trained = {"mean": np.zeros(7), "components": components, "params": networks}
    operations = ("union", "subtraction", "intersection")
    made, targets = laso.synthesise(trained, jax.random.key(0), x, labels, epochs=4, operations=operations)
    assert made.shape == (4, 3 * B, 7) and targets.shape == (4, 3 * B, C)
    z = x @ components * 2  # times the root of D
    for epoch in range(4):
        for i in range(B):
            partners = [  # who of the others gives just these three features, to float32
                j
                for j in range(B)
                if j != i
                and all(
                    np.allclose(
                        network(params[o], z[[i]], z[[j]])[0] @ components.T / 2, made[epoch, k * B + i], atol=1e-2
                    )
                    for k, o in enumerate(operations)
                )
            ]
            assert len(partners) == 1
            both = np.stack([labels[i], labels[partners[0]]]).astype(bool)
            expected = [both.any(0), both[0] & ~both[1], both.all(0)]
            np.testing.assert_array_equal(targets[epoch, i::B], expected)
