"""LaSO (Alfassy et al. 2019): networks for set operations on label sets, used to augment the support.

A network maps the features X and Y of two images to one that a classifier should take for an image with the labels of
either (union), the labels of both (intersection), or the labels of X that Y lacks (subtraction). Two changes are ours,
for speed and purity: features are projected to their principal directions, and layer normalisation replaces batch
normalisation.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.core.functional import binary_cross_entropy, unit
from mlfsic_jax.core.options import positive, require
from mlfsic_jax.core.word_ridge import principal_directions
from mlfsic_jax.methods._training import adam_in_chunks, pooled_features
from mlfsic_jax.methods.classifier import Classifier, fit_linear
from mlfsic_jax.methods.closed_form import centred_unit

OPERATIONS = ("union", "intersection", "subtraction")
_BLOCKS = 3
_CHUNK = 100  # steps in one program


@dataclasses.dataclass(frozen=True)
class LaSO(Classifier):
    """Fits the linear layer of ``Classifier`` to the support and, in every epoch, to new synthetic features.

    The paper uses unions or intersections. Intersections do better on validation labels, where nearly all images have
    one label, so most intersections stand for an image without any.
    """

    sections: ClassVar[tuple[str, ...]] = ("laso",)
    stores: ClassVar[tuple[str, ...]] = ("laso",)
    base: ClassVar[str] = "labels"
    needs_contrast: ClassVar[bool] = True  # two images at least, to pair

    operations: tuple[str, ...] = ("intersection",)  # which to augment with, of ``OPERATIONS``
    n_components: int = 256  # d, ours
    width: int = 512  # of the networks' hidden layers, ours
    dropout: float = 0.5  # rate; 0.5 as in the authors' code, the paper does not print it.
    training_steps: int = 600  # of Adam in training, ours
    batch_size: int = 64  # pairs in a training step, ours
    training_learning_rate: float = 1e-3  # of Adam in training, ours
    seed: int = 0  # of the pairs drawn from a support set

    def __post_init__(self):
        super().__post_init__()
        known = set(OPERATIONS).issuperset(self.operations)
        require(
            self,
            **positive(self, "n_components", "width", "training_steps", "batch_size", "training_learning_rate"),
            operations=(known and len(self.operations) > 0, f"must be some of {', '.join(OPERATIONS)}"),
            dropout=(0 <= self.dropout < 1, "must be in [0, 1)"),
        )

    def train(self, key, base):
        features = pooled_features(base)
        mean = features.mean(axis=0)
        centred = unit(jnp.asarray(features - mean))
        components = jnp.asarray(principal_directions(centred[:, None], jnp.zeros_like(mean), self.n_components))
        x, labels = project(centred, components), jnp.asarray(base.labels, jnp.float32)
        model = Operations(labels.shape[1], self.width, self.dropout)
        init_key, step_key = jax.random.split(key)
        init = jax.jit(lambda k: model.init(k, x[:1], x[:1], labels[:1], labels[:1], method="losses"))

        @jax.jit
        def draw(chunk):
            pair_key, dropout_key = jax.random.split(jax.random.fold_in(step_key, chunk))
            pairs = jax.random.randint(pair_key, (_CHUNK, 2, self.batch_size), 0, len(x))
            return pairs, jax.vmap(jax.random.fold_in, (None, 0))(dropout_key, jnp.arange(_CHUNK))

        def loss(params, data, batch):
            (x, labels), ((i, j), dropout_key) = data, batch
            args = (x[i], x[j], labels[i], labels[j], True)
            rngs = {"dropout": dropout_key}
            return sum(model.apply({"params": params}, *args, rngs=rngs, method="losses").values())

        options = {"steps": self.training_steps, "chunk": _CHUNK, "learning_rate": self.training_learning_rate}
        params = adam_in_chunks(loss, init(init_key)["params"], (x, labels), draw, description="LaSO", **options)
        operations = {name: tree for name, tree in params.items() if name != "classifier"}  # it knows base labels only
        return {"mean": jnp.asarray(mean), "components": components, "params": operations}

    def fit(self, trained, images, labels, words):
        x, y = centred_unit(trained, images), labels.astype(jnp.float32)
        options = {"epochs": self.epochs, "operations": self.operations}
        made, made_labels = synthesise(trained, jax.random.key(self.seed), x, y, **options)

        def batch_of(epoch):
            return jnp.concatenate([x, made[epoch]]), jnp.concatenate([y, made_labels[epoch]])

        options = {"epochs": self.epochs, "learning_rate": self.learning_rate}
        return fit_linear(batch_of, x.shape[1], y.shape[1], **options)


class Operation(nn.Module):
    """An MLP on two concatenated features: blocks of linear layer, normalisation, leaky ReLU, dropout; then linear."""

    width: int
    dropout: float

    @nn.compact
    def __call__(self, x, y, train: bool = False):
        """Float [B, d], [B, d] -> [B, d]."""
        hidden = jnp.concatenate([x, y], axis=-1)
        for _ in range(_BLOCKS):
            hidden = nn.leaky_relu(nn.LayerNorm()(nn.Dense(self.width)(hidden)), 0.2)
            hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return nn.Dense(x.shape[-1])(hidden)


class Operations(nn.Module):
    """The three networks, and the classifier of base labels that judges their output in training."""

    n_labels: int
    width: int
    dropout: float

    def setup(self):
        self.union = Operation(self.width, self.dropout)
        self.intersection = Operation(self.width, self.dropout)
        self.subtraction = Operation(self.width, self.dropout)
        self.classifier = nn.Dense(self.n_labels)

    def losses(self, x, y, labels_x, labels_y, train: bool = False):
        """The paper's loss terms, each averaged over the pairs of features float [B, d] and labels 0/1 [B, C].

        Returns:
          name -> scalar: "classifier" (cross-entropy of X and Y themselves), "union", "intersection" and "subtraction"
          (cross-entropy of the networks' outputs), "symmetry" (between unions, and intersections, of (X, Y) and
          (Y, X)), "mode_collapse" (between X and the union of subtraction and intersection; likewise for Y).
        """
        made = {name: self.combine(x, y, name, train) for name in OPERATIONS}
        swapped = {name: self.combine(y, x, name, train) for name in OPERATIONS}

        def classify(features, labels):
            return binary_cross_entropy(self.classifier(features), labels).mean()

        def distance(a, b):
            return jnp.mean((a - b) ** 2)

        def collapse(image, parts):
            return distance(image, self.union(parts["subtraction"], made["intersection"], train))

        return {
            "classifier": classify(x, labels_x) + classify(y, labels_y),
            **{name: classify(made[name], combine_labels(labels_x, labels_y, name)) for name in OPERATIONS},
            "symmetry": sum(distance(made[name], swapped[name]) for name in ("union", "intersection")),
            "mode_collapse": collapse(x, made) + collapse(y, swapped),
        }

    def combine(self, x, y, operation: str, train: bool = False):
        """One of ``OPERATIONS`` on float [..., d] and [..., d]."""
        return getattr(self, operation)(x, y, train)


def project(x, components):
    """Centred unit features [..., n] in the principal directions: [..., d], entries of order one."""
    return x @ components * np.sqrt(components.shape[1])


def combine_labels(labels_x, labels_y, operation: str):
    """The label sets of ``Operations.combine``'s outputs: 0/1 [..., C], 0/1 [..., C] -> 0/1 [..., C]."""
    if operation == "union":
        return jnp.maximum(labels_x, labels_y)
    return labels_x * (labels_y if operation == "intersection" else 1 - labels_y)


def synthesise(trained, key, x, labels, *, epochs: int, operations: tuple[str, ...]):
    """Passes random pairs of support images, float [S, n], 0/1 [S, C], through the networks of ``LaSO.train``.

    Each of at least two images, as centred unit features, is X once per epoch. Returns (features float [E, O S, n],
    labels 0/1 [E, O S, C]) of E epochs and O operations.
    """
    s = len(x)
    partner = (jnp.arange(s) + jax.random.randint(key, (epochs, s), 1, s)) % s  # another image
    z = project(x, trained["components"])
    pairs = (jnp.broadcast_to(z, (epochs, *z.shape)), z[partner])
    label_pairs = (jnp.broadcast_to(labels, (epochs, *labels.shape)), labels[partner])
    width = trained["params"]["union"]["Dense_0"]["bias"].shape[0]
    model = Operations(labels.shape[1], width, dropout=0.0)
    made = [model.apply({"params": trained["params"]}, *pairs, o, method="combine") for o in operations]
    targets = [combine_labels(*label_pairs, o) for o in operations]
    back = trained["components"].T / np.sqrt(trained["components"].shape[1])  # undoes ``project``
    return jnp.concatenate(made, axis=1) @ back, jnp.concatenate(targets, axis=1)
