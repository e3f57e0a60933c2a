"""Trains the backbone as a classifier of the train labels: python -m mlfsic_jax.pretrain --config=FILE.

A linear layer on the global features, binary cross-entropy on every train label: the classifier that the paper's
authors published as their baseline. What it leaves, ``<workdir>/pretrain/backbone.safetensors``, is where the episodic
stage starts:

python -m mlfsic_jax.main --config=FILE --config.backbone_weights=<workdir>/pretrain/backbone.safetensors
"""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from mlfsic_jax.backbones.weights import save_weights
from mlfsic_jax.core.functional import binary_cross_entropy
from mlfsic_jax.data.features import usable_splits
from mlfsic_jax.run import evaluate, inputs
from mlfsic_jax.run.checkpoint import Checkpoints
from mlfsic_jax.run.config import validate
from mlfsic_jax.run.train import TrainState, claim, create_optimizer, open_workdir, run_epochs
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.flags import run_config

_HELD_OUT = 10  # every tenth training image chooses the epoch
_INIT, _HOLD_OUT, _ORDER, _NOISE = range(4)


class Classifier(nn.Module):
    """Photos uint8 [B, H, W, 3] -> logits float32 [B, C].

    Attributes:
      backbone: photos -> local features.
      n_labels: C.
    """

    backbone: nn.Module
    n_labels: int

    @nn.compact
    def __call__(self, photos, train: bool = False):
        return nn.Dense(self.n_labels, name="head")(self.backbone(photos, train).mean(axis=(1, 2)))


def pretrain_step(state: TrainState, key, photos, labels, *, model: Classifier, optimizer):
    """One batch, mapped over the devices.

    Args:
      state: is donated; its step is folded into ``key``.
      key: of the augmentation.
      photos: uint8 [B, H, W, 3], of this process.
      labels: bool [B, C], of this process.
      model: batch norm averages over ``parallel.AXIS``.
      optimizer: see ``create_optimizer``.

    Returns:
      (new state, loss), the loss summed over labels and averaged over photos.
    """
    specs = (parallel.REPLICATED, parallel.REPLICATED, parallel.SHARDED, parallel.SHARDED)
    step = parallel.pmapped(_step, model, optimizer, specs=specs, out_specs=parallel.REPLICATED, donate=(0,))
    return step(state, key, *parallel.shard((photos, labels)))


def _step(model, optimizer, state: TrainState, key, photos, labels):
    key = jax.random.fold_in(jax.random.fold_in(key, state.step), jax.lax.axis_index(parallel.AXIS))

    def loss_fn(params):
        logits, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            photos,
            train=True,
            rngs={"augment": key},
            mutable=["batch_stats"],
        )
        return binary_cross_entropy(logits, labels).sum(axis=1).mean(), updates.get("batch_stats", {})

    (loss, batch_stats), grads = parallel.mean(jax.value_and_grad(loss_fn, has_aux=True)(state.params))
    updates, opt_state = optimizer.update(grads, state.opt_state)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state), loss


def _probabilities(model: Classifier, variables, photos):
    return (jax.nn.sigmoid(model.apply(variables, photos)),)


def pretrain(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Trains the classifier, or goes on where its last checkpoint stands, and writes the backbone.

    The epoch is the one with the best Ma-AP on a tenth of the training images, which are not trained on.

    Args:
      config: see ``mlfsic_jax.config``; starts from ``backbone_weights`` where given.
      workdir: of the run; all is kept in its sub-folder ``pretrain``.

    Returns:
      The weights file, with the backbone's published key names.

    Raises:
      InputError: a mistake in config or data.
    """
    config = ml_collections.ConfigDict(config).unlock()
    config.train_backbone = True
    validate(config)
    with open_workdir(Path(workdir) / "pretrain") as workdir:
        return _pretrain(config, workdir)


def _pretrain(config: ml_collections.ConfigDict, workdir: Path) -> Path:
    dataset = inputs.load_dataset(config)
    photo_backbone, weights, weights_hash = inputs.load_backbone(config, parallel.AXIS)
    cache = inputs.photo_cache(config, dataset)
    columns, images, _ = usable_splits(dataset, cache)["train"]
    labels = dataset.labels[np.ix_(images, columns)]
    settings = {"dataset": dataset.fingerprint, "weights": weights_hash, "pretrain": config.pretrain.to_dict()}
    claim(workdir, config, settings | {"images": len(images)})

    keys = jax.random.split(jax.random.key(config.seed), 4)
    order = np.asarray(jax.random.permutation(keys[_HOLD_OUT], len(images)))
    held_out, seen = order[: len(order) // _HELD_OUT], order[len(order) // _HELD_OUT :]
    n_devices = jax.device_count()
    batch_size = min(config.pretrain.batch_size, len(seen)) // n_devices * n_devices
    if not batch_size or not len(held_out) or not labels[held_out].any():
        raise InputError(f"the train split has {len(images)} photos: too few to hold a tenth of them out")
    per_epoch, epochs = len(seen) // batch_size, config.pretrain.epochs
    steps = (config.pretrain.warmup_epochs * per_epoch, epochs * per_epoch)
    optimizer, _ = create_optimizer(config.pretrain.learning_rate, *steps, "cosine")

    model = Classifier(photo_backbone, len(columns))
    variables = jax.jit(model.init)(keys[_INIT], cache.read(images[:1]))
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    if weights is not None:
        params = params | {"backbone": weights["params"]}
        batch_stats = {"backbone": weights["batch_stats"]} if "batch_stats" in weights else {}
    state = parallel.replicate(
        TrainState(jnp.zeros((), jnp.int32), params, batch_stats, jax.jit(optimizer.init)(params))
    )
    noise_key = parallel.replicate(keys[_NOISE])

    def read(rows):
        return (cache.read(images[rows]),)

    def order_of(epoch: int) -> np.ndarray:
        order = np.asarray(jax.random.permutation(jax.random.fold_in(keys[_ORDER], epoch), seen))
        return order[: per_epoch * batch_size].reshape(per_epoch, batch_size)

    def batches(epoch: int, first: int):
        mine = order_of(epoch)[first:, parallel.share(batch_size)]
        return parallel.prefetch(lambda rows: (*read(rows), labels[rows]), mine)

    def photos_of(epoch: int, number: int) -> str:
        return "its photos: " + ", ".join(str(dataset.image_names[i]) for i in images[order_of(epoch)[number]])

    def on_held_out(state: TrainState, done: int, losses: np.ndarray) -> dict[str, float]:
        (scores,) = evaluate.map_batches(_probabilities, model, held_out, read, state.variables())
        held_out_ap = evaluate.macro_ap(scores[None], labels[held_out][None])
        return {"loss": float(losses.mean()), "held_out_macro_ap": held_out_ap}

    best, state = run_epochs(
        state,
        Checkpoints(workdir / "checkpoints", metric="held_out_macro_ap"),
        workdir / "metrics.jsonl",
        name="backbone",
        labels={"stage": "pretrain"},
        epochs=epochs,
        per_epoch=per_epoch,
        validate_every=1,
        batches=batches,
        step=lambda state, batch: pretrain_step(state, noise_key, *batch, model=model, optimizer=optimizer),
        validate=on_held_out,
        drawn_with=photos_of,
    )
    variables = state.variables()
    path = workdir / "backbone.safetensors"
    network = {collection: tree["backbone"]["network"] for collection, tree in variables.items() if tree}
    if parallel.is_first():
        save_weights(path, network, photo_backbone.network)
    best_ap = best["held_out_macro_ap"]
    print(f"best at epoch {best['epoch']}, Ma-AP of train labels on photos held out {100 * best_ap:.1f} %")
    print(f"written to {path}; train on from it with --config.backbone_weights={path}")
    return path


def main(_: list[str]) -> None:
    """Trains the classifier."""
    run_config(lambda config: pretrain(config, config.workdir))
