"""PLA's alignment against SciPy and all permutations, its decoder against PyTorch's LSTM."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mlfsic_jax.methods import pla

align, loss = jax.jit(jax.vmap(pla.align)), jax.jit(pla.loss)


def random_case(seed, n_labels, n_positive):
    rng = np.random.default_rng(seed)
    n_steps = min(pla.MAX_LABELS, n_labels) + 1
    logits = 2 * rng.normal(size=(n_steps, n_labels + 1))
    labels = np.zeros(n_labels, bool)
    labels[rng.permutation(n_labels)[:n_positive]] = True
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32), labels


def aligned_by_hand(log_p, labels):
    """Targets of the label steps and of "end": predicted labels first, the others as SciPy assigns them."""
    n_labels, positive = len(labels), list(np.flatnonzero(labels))
    m = min(len(positive), len(log_p) - 1)
    targets = {}
    for t in range(m):
        predicted = log_p[t].argmax()
        if predicted in positive and predicted not in targets.values():
            targets[t] = predicted
    steps = [t for t in range(m) if t not in targets]
    others = [c for c in positive if c not in targets.values()]
    rows, columns = linear_sum_assignment(-log_p[np.ix_(steps, others)])
    targets |= {steps[r]: others[c] for r, c in zip(rows, columns, strict=True)}
    return [targets[t] for t in range(m)] + [n_labels]


@pytest.mark.parametrize(("n_labels", "n_positive"), [(3, 1), (3, 3), (5, 2), (8, 4), (8, 5), (8, 7), (8, 0)])
def test_alignment_is_that_of_scipy(n_labels, n_positive):
    cases = [random_case(seed, n_labels, n_positive) for seed in range(40)]
    targets, counts = align(*map(jnp.stack, zip(*cases, strict=True)))
    for (log_p, labels), got, counted in zip(cases, np.asarray(targets), np.asarray(counts), strict=True):
        expected = aligned_by_hand(log_p, labels)
        np.testing.assert_array_equal(got[: len(expected)], expected)
        np.testing.assert_array_equal(counted, np.arange(len(log_p)) < len(expected))


def test_loss_is_the_lowest_over_all_orders_where_no_label_is_predicted():
    log_p, labels = random_case(0, 6, 4)
    log_p[:, 6] = 1.0  # "end" is predicted everywhere, so nothing is fixed; not a distribution, which does not matter
    orders = itertools.permutations(np.flatnonzero(labels))
    lowest = min(-sum(log_p[t, c] for t, c in enumerate(order)) for order in orders)
    np.testing.assert_allclose(loss(jnp.asarray(log_p), jnp.asarray(labels)), (lowest - 1.0) / 5, rtol=1e-5)


def test_a_predicted_label_keeps_its_step_even_where_another_order_were_cheaper():
    p = np.array([[0.4, 0.35, 0.25], [0.9, 0.05, 0.05], [0.1, 0.1, 0.8]])
    # label 0 is predicted first and again; its first step counts, though (1, 0) would be far cheaper
    targets, _ = align(np.log(p)[None], np.array([[True, True]]))
    np.testing.assert_array_equal(targets[0], [0, 1, 2])


def test_a_score_is_the_highest_probability_of_the_label_over_the_steps():
    rng = np.random.default_rng(2)
    method, regions = pla.PLA(width=5), rng.normal(size=(2, 7, 6)).astype(np.float32)
    rows = pla.Labels(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 3), (4, 5), 4)))
    params = pla.Decoder(5).init(jax.random.key(0), regions[0], rows)["params"]
    got = method.score({}, (params, rows), {"regions": regions})
    for scores, image in zip(got, regions, strict=True):
        log_p = np.asarray(pla.Decoder(5).apply({"params": params}, image, rows))
        np.testing.assert_allclose(scores, [max(np.exp(step[c]) for step in log_p) for c in range(3)], rtol=1e-5)


@pytest.mark.extras
def test_decoder_is_pytorchs_lstm_with_attention():
    torch = pytest.importorskip("torch")
    n_labels, e, h, d = 4, 3, 5, 6
    rng = np.random.default_rng(1)
    regions = rng.normal(size=(7, d)).astype(np.float32)
    shapes = ((n_labels + 1, e), (n_labels + 1, h), n_labels + 1)
    rows = pla.Labels(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))
    model = pla.Decoder(h)
    shapes = jax.eval_shape(model.init, jax.random.key(0), regions, rows)["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), shapes)

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name].get("bias", 0)

    cell = torch.nn.LSTMCell(e + d, h)
    gates = params["cell"]
    with torch.no_grad():
        cell.weight_ih.copy_(torch.tensor(np.concatenate([gates[f"i{g}"]["kernel"].T for g in "ifgo"])))
        cell.weight_hh.copy_(torch.tensor(np.concatenate([gates[f"h{g}"]["kernel"].T for g in "ifgo"])))
        cell.bias_ih.copy_(torch.tensor(np.concatenate([gates[f"h{g}"]["bias"] for g in "ifgo"])))
        cell.bias_hh.zero_()
    state, memory = (dense(f"{name}_start", regions.mean(0)) for name in ("hidden", "cell"))
    last, expected = params["start"], []
    for _ in range(n_labels + 1):
        asked = dense("attention_key", regions) + dense("attention_query", state)
        energy = dense("attention_weight", np.maximum(asked, 0))
        weights = np.exp(energy - energy.max())
        context = (weights / weights.sum()).T @ regions / (1 + np.exp(-dense("gate", state)))
        inputs = torch.tensor(np.concatenate([last, context[0]])[None])
        with torch.no_grad():
            state, memory = (x.numpy()[0] for x in cell(inputs, tuple(torch.tensor(x[None]) for x in (state, memory))))
        logits = rows.output @ state + rows.bias
        last = rows.vectors[logits.argmax()]
        expected.append(logits - np.log(np.exp(logits).sum()))
    got = jax.jit(model.apply)({"params": params}, regions, rows)
    np.testing.assert_allclose(got, expected, atol=1e-4)  # float32, five steps


def test_new_labels_start_at_the_mean_or_at_their_words():
    base = pla.Labels(*(jnp.arange(3.0 * w).reshape(3, w) for w in (2, 4)), jnp.array([1.0, 3.0, 9.0]))
    words = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    by_mean = pla.new_labels(base, 3)
    np.testing.assert_allclose(by_mean.vectors, [[1, 2]] * 3 + [[4, 5]])
    np.testing.assert_allclose(by_mean.output, [[2, 3, 4, 5]] * 3 + [[8, 9, 10, 11]])
    np.testing.assert_allclose(by_mean.bias, [2, 2, 2, 9])
    by_word = pla.new_labels(base, 3, words)
    expected = np.sqrt(2) * np.array([[0.6, 0.8], [0, 1], [1, 0]])
    np.testing.assert_allclose(by_word.vectors, [*expected, [4, 5]], rtol=1e-6)
    np.testing.assert_allclose(by_word.output, by_mean.output)
