"""The backbone as a classifier of the train labels, before training by episodes.

A linear layer on the global features, binary cross-entropy on every train label: the classifier that the paper's
authors published as their baseline.
"""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from mlfsic_jax.backbones.weights import save_weights
from mlfsic_jax.core.functional import binary_cross_entropy
from mlfsic_jax.data.dataset import ImageDataset
from mlfsic_jax.data.features import Cache, usable_splits
from mlfsic_jax.run import evaluate, inputs, loop
from mlfsic_jax.run.checkpoint import Checkpoints
from mlfsic_jax.run.config import validate
from mlfsic_jax.run.step import TrainState, create_optimizer, initial_state
from mlfsic_jax.run.workdir import claim, open_workdir
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError

_HELD_OUT = 10  # every tenth training image chooses the epoch


class Classifier(nn.Module):
    """Photos uint8 [B, H, W, 3] -> logits float32 [B, C]."""

    backbone: nn.Module  # photos -> local features
    n_labels: int  # C

    @nn.compact
    def __call__(self, photos, train: bool = False):
        return nn.Dense(self.n_labels, name="head")(self.backbone(photos, train).mean(axis=(1, 2)))


def pretrain_step(state: TrainState, key, photos, labels, *, model: Classifier, optimizer):
    """One batch of photos uint8 [B, H, W, 3] and labels bool [B, C], mapped over the devices: (new state, loss).

    The loss is summed over labels and averaged over photos. ``state`` is donated.
    """
    specs = (parallel.REPLICATED, parallel.REPLICATED, parallel.SHARDED, parallel.SHARDED)
    step = parallel.pmapped(_step, model, optimizer, specs=specs, out_specs=parallel.REPLICATED, donate=(0,))
    return step(state, key, *parallel.shard((photos, labels)))


def _step(model, optimizer, state: TrainState, key, photos, labels):
    key = jax.random.fold_in(jax.random.fold_in(key, state.step), jax.lax.axis_index(parallel.AXIS))

    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = model.apply(variables, photos, train=True, rngs={"augment": key}, mutable=["batch_stats"])
        return binary_cross_entropy(logits, labels).sum(axis=1).mean(), updates.get("batch_stats", {})

    (loss, batch_stats), grads = parallel.mean(jax.value_and_grad(loss_fn, has_aux=True)(state.params))
    updates, opt_state = optimizer.update(grads, state.opt_state)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state), loss


def _probabilities(model: Classifier, variables, photos):
    return jax.nn.sigmoid(model.apply(variables, photos))


def pretrain(config: ConfigDict, workdir: str | Path) -> Path:
    """Trains the classifier, or goes on where its last checkpoint stands; returns the backbone's weights file.

    The epoch is the one with the best Ma-AP on a tenth of the training images, which are not trained on. The weights
    start from ``config.backbone_weights`` where given, and get the backbone's published key names. All is kept in the
    sub-folder ``pretrain`` of the workdir.

    Raises:
      InputError: a mistake in config or data.
    """
    config = ConfigDict(config).unlock()
    config.train_backbone = True
    validate(config)
    with open_workdir(Path(workdir) / "pretrain") as workdir:
        return _pretrain(config, workdir)


class Pretraining(loop.Stage):
    """Epochs of batches over nine tenths of the training images; the last tenth chooses the epoch."""

    name, labels = "backbone", {"stage": "pretrain"}

    def __init__(self, config: ConfigDict, dataset: ImageDataset, cache: Cache, backbone: nn.Module):
        self._dataset, self._cache = dataset, cache
        columns, self.images, _ = usable_splits(dataset, cache)["train"]
        self._truth = dataset.labels[np.ix_(self.images, columns)]
        self._init, hold_out, self._order, noise = jax.random.split(jax.random.key(config.seed), 4)
        order = np.asarray(jax.random.permutation(hold_out, len(self.images)))
        n_held_out = len(order) // _HELD_OUT
        self._held_out, self._seen = order[:n_held_out], order[n_held_out:]
        n_devices, options = jax.device_count(), config.pretrain
        self._batch_size = min(options.batch_size, len(self._seen)) // n_devices * n_devices
        if not self._batch_size or not n_held_out or not self._truth[self._held_out].any():
            raise InputError(f"the train split has {len(self.images)} photos: too few to hold a tenth of them out")
        self.per_epoch, self.epochs = len(self._seen) // self._batch_size, options.epochs
        steps = (options.warmup_epochs * self.per_epoch, self.epochs * self.per_epoch)
        self._optimizer, _ = create_optimizer(options.learning_rate, *steps, "cosine")
        self._model = Classifier(backbone, len(columns))
        self._noise_key = parallel.replicate(noise)

    def initial_state(self, weights: dict | None) -> TrainState:
        """Fresh parameters on every device, those of the backbone from weights where given."""
        variables = jax.jit(self._model.init)(self._init, *self._read(np.zeros(1, int)))
        return parallel.replicate(initial_state(variables, self._optimizer, weights))

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray]:
        return (self._cache.read(self.images[rows]),)

    def _order_of(self, epoch: int) -> np.ndarray:
        order = np.asarray(jax.random.permutation(jax.random.fold_in(self._order, epoch), self._seen))
        return order[: self.per_epoch * self._batch_size].reshape(self.per_epoch, self._batch_size)

    def batches(self, epoch: int, first: int):
        mine = self._order_of(epoch)[first:, parallel.share(self._batch_size)]
        return parallel.prefetch(lambda rows: (*self._read(rows), self._truth[rows]), mine)

    def step(self, state: TrainState, batch):
        state, loss = pretrain_step(state, self._noise_key, *batch, model=self._model, optimizer=self._optimizer)
        return state, loss[None]

    def validate(self, state: TrainState, done: int, losses: np.ndarray) -> dict[str, float]:
        scores = evaluate.map_batches(_probabilities, self._model, self._held_out, self._read, state.variables())
        held_out_ap = evaluate.macro_ap(scores[None], self._truth[self._held_out][None])
        return {"loss": float(losses.mean()), "held_out_macro_ap": held_out_ap}

    def drawn_with(self, epoch: int, number: int) -> str:
        rows = self.images[self._order_of(epoch)[number]]
        return "its photos: " + ", ".join(str(self._dataset.image_names[i]) for i in rows)


def _pretrain(config: ConfigDict, workdir: Path) -> Path:
    dataset = inputs.load_dataset(config)
    backbone, weights, weights_hash = inputs.load_backbone(config, parallel.AXIS)
    stage = Pretraining(config, dataset, inputs.photo_cache(config, dataset), backbone)
    settings = {"dataset": dataset.fingerprint, "weights": weights_hash, "pretrain": config.pretrain.to_dict()}
    claim(workdir, config, settings | {"images": len(stage.images)})
    checkpoints = Checkpoints(workdir / "checkpoints", metric="held_out_macro_ap")
    best, state = loop.run(stage, stage.initial_state(weights), checkpoints, workdir / "metrics.jsonl")
    path = workdir / "backbone.safetensors"
    network = {collection: tree["backbone"]["network"] for collection, tree in state.variables().items() if tree}
    if parallel.is_first():
        save_weights(path, network, backbone.network)
    ap = 100 * best["held_out_macro_ap"]
    print(f"best at epoch {best['epoch']}, Ma-AP of train labels on photos held out {ap:.1f} %")
    print(f"written to {path}; train on from it with --config.backbone_weights={path}")
    return path
