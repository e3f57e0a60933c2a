"""The closed-form model against plain NumPy loops of its equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from mlfsic_jax import methods
from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.functional import inverse_definite

IMAGES, B, C, S, Q, L, N, DW = 60, 5, 3, 7, 6, 4, 8, 4
# float32 against float64 loops; values are of order one, systems well conditioned by their regulariser
close = functools.partial(np.testing.assert_allclose, atol=1e-4)


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    base = {"local": np.abs(rng.normal(size=(IMAGES, L, N))), "labels": rng.random((IMAGES, B)) < 0.4}
    base["words"] = rng.normal(size=(B, DW))
    episode = {"support": np.abs(rng.normal(size=(S, L, N))), "query": np.abs(rng.normal(size=(Q, L, N)))}
    labels = rng.random((S, C)) < 0.4
    labels[np.arange(C), np.arange(C)] = True
    return base, episode, labels, rng.normal(size=(C, DW))


def fitted_of(base, components=None):
    components = np.eye(N) if components is None else components
    return word_ridge.fit(base["local"].mean(1), base["labels"], base["words"], components)


def by_hand(case, *, beta, kernel, regulariser):
    """Scores [Q, C] and left-out scores [S, C], every fit made anew."""
    base, episode, labels, words = case
    mu = base["local"].mean((0, 1))
    x = unit(base["local"].mean(1) - mu)
    y = base["labels"].astype(float)
    r = np.linalg.solve(x.T @ x + 300 * np.eye(N), x.T @ (y - y.mean(0)))
    v = unit(r.T)
    m = v.mean(0)
    g = unit(base["words"])
    a = np.linalg.solve(g @ g.T + 0.1 * np.eye(B), v - m)
    classifiers = np.stack([sum((unit(w) @ g[b]) * a[b] for b in range(B)) + m for w in words])

    def prior(images):
        out = np.zeros((len(images), C))
        for i, image in enumerate(images):
            f = unit(image.mean(0) - mu)
            dots = [f @ classifiers[c] for c in range(C)]
            out[i] = [beta * (d - np.mean(dots)) for d in dots]
        return out

    def scores(support, targets, prior_support, query):
        k_ss = np.array([[kernel(p - mu, q - mu) for q in support] for p in support])
        k_qs = np.array([[kernel(p - mu, q - mu) for q in support] for p in query])
        t = targets - prior_support
        return prior(query) + k_qs @ np.linalg.solve(
            (k_ss + k_ss.T) / 2 + regulariser * np.eye(len(support)), t - t.mean(0)
        )

    support, query = episode["support"], episode["query"]
    full = scores(support, labels.astype(float), prior(support), query)
    left_out = np.zeros((S, C))
    for i in range(S):
        others = np.arange(S) != i
        left_out[i] = scores(support[others], labels[others].astype(float), prior(support[others]), support[i : i + 1])[
            0
        ]
    return full, left_out


def linear(z1, z2):
    return unit(z1.mean(0)) @ unit(z2.mean(0))


def match(z1, z2):
    r1, r2 = np.sqrt((z1**2).sum(1)), np.sqrt((z2**2).sum(1))

    def similarity(za, zb, ra, rb):
        return np.array([[za[i] @ zb[j] / (ra[i] * rb[j]) for j in range(len(zb))] for i in range(len(za))])

    def h(za, zb, ra, rb):
        s, total = similarity(za, zb, ra, rb), 0.0
        for i in range(len(za)):
            for j in range(len(zb)):
                total += ra[i] ** 2 / (ra**2).sum() * rb[j] ** 2 / (rb**2).sum() * max(0, s[i, j]) ** 2
        return total

    s = similarity(z1, z2, r1, r2)
    k1 = sum(r1[i] / r1.sum() * s[i].max() for i in range(len(z1))) / 2
    k1 += sum(r2[j] / r2.sum() * s[:, j].max() for j in range(len(z2))) / 2
    return (k1 + h(z1, z2, r1, r2) / np.sqrt(h(z1, z1, r1, r1) * h(z2, z2, r2, r2))) / 2


REGULARISER = {"word_ridge": 1.0, "region_word_ridge": 0.3}


def predict(case, method, fitted, keep=None, beta=0.5):
    """Scores of the queries, and of each support image left out."""
    _, episode, labels, words = case
    support, query = (episode[k].astype(np.float32) for k in ("support", "query"))
    regions = (None, None)
    if method == "region_word_ridge":
        regions = [word_ridge.regions(fitted, x) for x in (support, query)]
    if keep is not None:
        regions[0] = regions[0] * keep[..., None]
    options = {"beta": beta, "regulariser": REGULARISER[method]}
    adapted = word_ridge.adapt(fitted, support.mean(1), regions[0], labels, words, **options)
    return word_ridge.scores(fitted, adapted, query.mean(1), regions[1]), adapted.left_out


@pytest.mark.parametrize("method, kernel", [("word_ridge", linear), ("region_word_ridge", match)])
@pytest.mark.parametrize("beta", [0.5, 0.0])
def test_scores_and_left_out_scores(case, method, kernel, beta):
    scores, left_out = predict(case, method, fitted_of(case[0]), beta=beta)
    regulariser = REGULARISER[method]
    full, expected = by_hand(case, beta=beta, kernel=kernel, regulariser=regulariser)
    close(scores, full)
    close(left_out, expected)
    assert beta == 0 or np.abs(full - by_hand(case, beta=0, kernel=kernel, regulariser=regulariser)[0]).max() > 0.01


@pytest.mark.parametrize("inverse_of", [jnp.linalg.inv, inverse_definite])
def test_unknown_labels_leave_an_image_out_of_that_labels_fit(inverse_of):
    rng = np.random.default_rng(5)
    x, p, y = rng.normal(size=(S, N)), rng.normal(size=(S, C)), rng.integers(0, 2, (S, C)).astype(float)
    y[[0, 3, 6], [0, 0, 2]] = np.nan
    y[5] = np.nan  # of an image that only fills the set up
    arrays = (a.astype(np.float32) for a in (x @ x.T, p, y))
    dual, left_out = map(np.asarray, word_ridge.solve(*arrays, 2.0, inverse_of))
    for c in range(C):
        known = np.flatnonzero(~np.isnan(y[:, c]))
        peer = Ridge(alpha=2.0, fit_intercept=False)
        t = y[known, c] - p[known, c]
        close(x.T @ dual[:, c], peer.fit(x[known], t - t.mean()).coef_)
        assert not dual[np.isnan(y[:, c]), c].any()
        for i, image in enumerate(known):
            others, rest = np.delete(known, i), np.delete(t, i)
            close(left_out[image, c], p[image, c] + x[image] @ peer.fit(x[others], rest - rest.mean()).coef_)
    few = y[:, :1].astype(np.float32)  # only one image is known, with the label: there is no negative to be centred on
    few[1:] = np.nan
    assert np.isfinite(word_ridge.left_out_centre(left_out[:, :1], few)).all()


def test_without_prior_it_is_the_ridge_row(case):
    base, episode, labels, _ = case
    fitted = fitted_of(base)
    scores, _ = predict(case, "word_ridge", fitted, beta=0.0)
    x, q = (unit(episode[k].mean(1) - np.asarray(fitted.mean)) for k in ("support", "query"))
    ridge, trained = methods.create("ridge"), {"mean": fitted.mean}
    state = ridge.fit(trained, {"pooled": episode["support"].mean(1).astype(np.float32)}, labels, None)
    close(scores + labels.mean(0), ridge.score(trained, state, {"pooled": episode["query"].mean(1).astype(np.float32)}))
    reference = Ridge(alpha=1.0, fit_intercept=False).fit(x, labels - labels.mean(0))
    close(scores, reference.predict(q))


def test_the_meaning_of_words_matters(case):
    words = case[3]
    fitted = fitted_of(case[0])
    changed = (*case[:3], words[::-1])
    a, b = (np.asarray(predict(c, "word_ridge", fitted)[0]) for c in (case, changed))
    assert np.abs(a - b).max() > 1e-3


def test_a_rotation_of_the_regions_changes_nothing(case):
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(N, N)))[0]
    a, _ = predict(case, "region_word_ridge", fitted_of(case[0]))
    close(a, predict(case, "region_word_ridge", fitted_of(case[0], rotation))[0])


def test_regions_that_are_left_out_do_not_matter(case):
    base, episode, _, _ = case
    fitted = fitted_of(base)
    keep = np.random.default_rng(2).random((S, L)) < 0.6
    keep[:, 0] = True
    a, _ = predict(case, "region_word_ridge", fitted, keep=keep)
    full, _ = predict(case, "region_word_ridge", fitted, keep=np.ones((S, L), bool))
    close(full, predict(case, "region_word_ridge", fitted)[0])
    assert np.abs(np.asarray(a) - np.asarray(full)).max() > 1e-3
    z = word_ridge.regions(fitted, episode["support"].astype(np.float32))
    kept = jnp.where(keep[..., None], z, 0.0)
    shorter = [np.asarray(z)[i][keep[i]] for i in range(S)]
    kernel = [[match(p.astype(float), q.astype(float)) for q in shorter] for p in shorter]
    close(word_ridge.region_kernel(kept, kept), kernel)


def test_an_image_matches_itself_best(case):
    z = case[1]["support"].astype(np.float32)
    kernel = np.asarray(word_ridge.region_kernel(z, z))
    close(np.diag(kernel), 1.0)
    assert (kernel <= 1 + 1e-5).all()
    assert np.isfinite(word_ridge.region_kernel(np.zeros((2, L, N), np.float32), z)).all()


def test_pairs_of_regions_add_up_to_the_kernel(case):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(3, L, N)).astype(np.float32), rng.normal(size=(2, L + 1, N)).astype(np.float32)
    a[1, 2], b[0, 0] = 0, 0  # left out
    pairs = np.asarray(jax.jit(word_ridge.region_pairs)(a, b))
    assert pairs.shape == (3, 2, L, L + 1)
    close(pairs.sum(axis=(2, 3)), word_ridge.region_kernel(a, b))
    assert (pairs[1, :, 2] == 0).all() and (pairs[:, 0, :, 0] == 0).all()

    # One pair by hand: two regions that are each other's best match.
    z, y = a[0].astype(float), b[1].astype(float)
    cosines = np.array([[unit(p) @ unit(q) for q in y] for p in z])
    i, j = np.unravel_index(cosines.argmax(), cosines.shape)
    norm = [np.linalg.norm(x, axis=1) for x in (z, y)]
    v = [n**2 / (n**2).sum() for n in norm]
    own = [
        sum(w[p] * w[q] * max(0, unit(x[p]) @ unit(x[q])) ** 2 for p in range(len(x)) for q in range(len(x)))
        for w, x in zip(v, (z, y), strict=True)
    ]
    best = (norm[0][i] / norm[0].sum() + norm[1][j] / norm[1].sum()) * cosines[i, j] / 2
    close(pairs[0, 1, i, j], (best + v[0][i] * v[1][j] * cosines[i, j] ** 2 / np.sqrt(own[0] * own[1])) / 2)


def test_a_score_comes_apart_into_words_and_pairs_of_regions(case):
    _, episode, labels, words = case
    fitted = fitted_of(case[0])
    s, q = (episode[part].astype(np.float32) for part in ("support", "query"))
    (s_pooled, s_regions), (q_pooled, q_regions) = ((x.mean(1), word_ridge.regions(fitted, x)) for x in (s, q))
    adapted = word_ridge.adapt(fitted, s_pooled, s_regions, labels, words, beta=0.5, regulariser=0.3)
    prior = word_ridge.word_prior(fitted, unit(q_pooled - np.asarray(fitted.mean)), words, 0.5)
    by_pairs = np.einsum("qslm,sc->qc", word_ridge.region_pairs(q_regions, s_regions), adapted.dual)
    close(prior + by_pairs, word_ridge.scores(fitted, adapted, q_pooled, q_regions))


def test_principal_directions_are_those_of_sklearn():
    from sklearn.decomposition import PCA

    z = np.random.default_rng(0).normal(size=(50, L, N)) * np.arange(1, N + 1)
    mean = z.mean((0, 1))
    ours = word_ridge.principal_directions(z, mean, 3)
    theirs = PCA(3).fit((z - mean).reshape(-1, N)).components_
    np.testing.assert_allclose(np.abs(np.sum(ours.T * theirs, axis=1)), 1, atol=1e-4)  # up to sign


def test_jit_and_vmap(case):
    _, episode, labels, words = case
    fitted = fitted_of(case[0])
    support, query = episode["support"].mean(1).astype(np.float32), episode["query"].mean(1).astype(np.float32)

    def score(support, query):
        adapted = word_ridge.adapt(fitted, support, None, labels, words, beta=0.5, regulariser=1.0)
        return word_ridge.scores(fitted, adapted, query)

    many = jax.jit(jax.vmap(score))(np.stack([support, support[::-1]]), np.stack([query, query]))
    close(many[0], score(support, query))


def test_standardised_scores_are_distances_from_the_images_without_the_label(case):
    labels = case[2]
    query, left_out = predict(case, "word_ridge", fitted_of(case[0]))
    standardised = word_ridge.standardised(query, left_out, labels)
    query, left_out = np.asarray(query, np.float64), np.asarray(left_out, np.float64)
    negatives = [left_out[~labels[:, c], c] for c in range(C)]
    overall = np.concatenate(negatives).mean()
    centre = np.array([(n.sum() + 4 * overall) / (len(n) + 4) for n in negatives])
    spread = np.sqrt(np.concatenate([(n - c) ** 2 for n, c in zip(negatives, centre, strict=True)]).mean())
    close(standardised, (query - centre) / spread)
