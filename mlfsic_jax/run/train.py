"""Training by episodes (paper section 4.4), and the whole run: train, choose on validation, evaluate on novel."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from mlfsic_jax import __version__
from mlfsic_jax.core import word_ridge
from mlfsic_jax.core.episodes import InfeasibleEpisode, sample_episodes
from mlfsic_jax.core.metrics import multilabel_metrics
from mlfsic_jax.core.model import BaseModel, LCMOptions
from mlfsic_jax.data.features import View
from mlfsic_jax.data.prepared import digest
from mlfsic_jax.run import evaluate, inputs
from mlfsic_jax.run.checkpoint import Checkpoints
from mlfsic_jax.run.config import default, validate
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import lock, write_arrays, write_json, write_tree
from mlfsic_jax.system.progress import track
from mlfsic_jax.system.untrusted import read_json

# Keys of one run's random streams, folded into jax.random.key(config.seed).
_INIT, _EPISODES, _NOISE, _VALIDATION, _SWEEP, _TEST = range(6)


class TrainState(NamedTuple):
    """All that a checkpoint holds."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    def variables(self) -> dict:
        """What ``model.apply`` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


class Batch(NamedTuple):
    """The episodes of one training step, see ``BaseModel.losses``; all arrays have a leading axis [E]."""

    support: jax.Array
    query: jax.Array
    support_labels: jax.Array
    query_labels: jax.Array


def read_batch(split: View, support: np.ndarray, query: np.ndarray) -> Batch:
    """Reads the images int [E, S] and int [E, Q] of a training step."""
    return Batch(split.inputs(support), split.inputs(query), split.labels[support], split.labels[query])


def create_optimizer(
    learning_rate: float, warmup_steps: int, total_steps: int, schedule: str
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Adam with linear warm-up, then ``"cosine"`` to zero or ``"constant"``."""
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(learning_rate, total_steps - warmup_steps)
    else:
        after = optax.constant_schedule(learning_rate)
    rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), after], [warmup_steps])
    # The first update is step 1 of the warm-up, not step 0, whose learning rate is 0.
    return optax.adam(lambda count: rate(count + 1)), rate


def create_train_state(key, model: BaseModel, split: View, optimizer, pretrained=None) -> TrainState:
    """Fresh parameters, those of the backbone from published weights where given.

    Args:
      key: fixes the random parameters.
      model: what to initialise.
      split: for the shapes.
      optimizer: its state is created too.
      pretrained: variables of the backbone, or None.
    """
    one = split.inputs(np.zeros(1, int))
    labels = jnp.ones((1, split.labels.shape[1]))

    @jax.jit
    def init(key, one, labels, words):
        params_key, dropout_key, augment_key = jax.random.split(key, 3)
        rngs = {"params": params_key, "dropout": dropout_key, "augment": augment_key}
        return model.init(rngs, one, one, labels, labels, words)

    variables = init(key, one, labels, split.word_vectors)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    if pretrained is not None:
        params = params | {"backbone": pretrained["params"]}
        batch_stats = {"backbone": pretrained["batch_stats"]} if "batch_stats" in pretrained else {}
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, jax.jit(optimizer.init)(params))


def train_step(
    state: TrainState,
    key,
    batch: Batch,
    word_vectors,
    *,
    model: BaseModel,
    optimizer,
    gamma: float,
    lcm: LCMOptions | None = None,
    threshold: float = 0.53,
    shared: bool = True,
):
    """One update of L_cm + gamma L_query (eq 20), averaged over the episodes of the step.

    Args:
      state: is donated.
      key: of the run's dropout and augmentation; the number of the episode in the run is folded in.
      batch: the step's episodes; where they are shared, those of this process.
      word_vectors: float32 [C, d_w].
      model: what is trained; batch norm averages over ``parallel.EPISODE_AXES``.
      optimizer: see ``create_optimizer``.
      gamma: weight of the query loss.
      lcm: ``LCMOptions`` to select regions during training too, or None.
      threshold: theta where ``lcm`` is given.
      shared: whether the episodes are mapped over the devices, of whose number theirs must be a multiple; else every
        device computes all of them.

    Returns:
      (the new ``TrainState``, (L_cm, L_query)), the losses averaged over all episodes.
    """
    if shared:
        batch = parallel.shard(batch)
    specs = (
        parallel.REPLICATED,
        parallel.REPLICATED,
        parallel.SHARDED if shared else parallel.REPLICATED,
        parallel.REPLICATED,
    )
    static = (model, optimizer, gamma, lcm, threshold, shared)
    step = parallel.pmapped(_step, *static, specs=specs, out_specs=parallel.REPLICATED, donate=(0,))
    return step(state, key, batch, word_vectors)


def _step(model, optimizer, gamma, lcm, threshold, shared, state: TrainState, key, batch: Batch, word_vectors):
    n_here = len(batch.support)
    n_all = n_here * (jax.lax.axis_size(parallel.AXIS) if shared else 1)
    first = state.step * n_all + (jax.lax.axis_index(parallel.AXIS) * n_here if shared else 0)

    def loss_fn(params):
        def losses(number, episode):
            dropout_key, augment_key = jax.random.split(jax.random.fold_in(key, number))
            (cm, query_loss), updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                *episode,
                word_vectors,
                lcm=lcm,
                threshold=threshold,
                rngs={"dropout": dropout_key, "augment": augment_key},
                mutable=["batch_stats"],
                method="losses",
            )
            return cm, query_loss, updates.get("batch_stats", {})

        results = jax.vmap(losses, axis_name=parallel.EPISODE_AXES[0])(first + jnp.arange(n_here), batch)
        cm, query_loss, batch_stats = jax.tree.map(lambda x: x.mean(axis=0), results)
        return cm + gamma * query_loss, (cm, query_loss, batch_stats)

    results = jax.grad(loss_fn, has_aux=True)(state.params)
    grads, (cm, query_loss, batch_stats) = parallel.mean(results)
    updates, opt_state = optimizer.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, batch_stats, opt_state), (cm, query_loss)


def novel_key(seed: int, n_shot: int) -> jax.Array:
    """The key of the fixed novel episodes that every method is evaluated on."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), n_shot), _TEST)


def lcm_options(config: ml_collections.ConfigDict) -> LCMOptions:
    """The fields of ``config.lcm`` that say how LCM runs."""
    return LCMOptions(**{name: config.lcm[name] for name in LCMOptions._fields})


def ridge_options(config: ml_collections.ConfigDict) -> evaluate.RidgeOptions:
    """The fields of ``config.ridge`` that say how the closed-form model works."""
    return evaluate.RidgeOptions(**{name: config.ridge[name] for name in evaluate.RidgeOptions._fields})


def train(config: ml_collections.ConfigDict, run: inputs.Inputs, n_shot: int, workdir: Path) -> dict:
    """Trains the model for one shot count, or goes on where its last checkpoint stands.

    All randomness is a function of the seed and the step, so a run that was interrupted ends with the numbers of one
    that was not.

    Returns:
      The variables of the checkpoint that was best on validation.

    Raises:
      InputError: see ``run_epochs``.
      KeyboardInterrupt: likewise.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), n_shot)
    keys = [jax.random.fold_in(key, i) for i in range(6)]
    split, per_step = run.splits["train"], config.train.episodes_per_step
    per_epoch = -(-config.train.episodes_per_epoch // per_step)  # steps
    shared = per_step % jax.device_count() == 0
    if not shared:
        print(
            f"{n_shot}-shot: each of the {jax.device_count()} devices trains on every episode; to share them, set "
            f"config.train.episodes_per_step to a multiple of {jax.device_count()}"
        )
    mine = parallel.share(per_step) if shared else slice(None)
    steps = (config.train.warmup_epochs * per_epoch, config.train.epochs * per_epoch)
    optimizer, schedule = create_optimizer(config.train.learning_rate, *steps, config.train.schedule)
    state = parallel.replicate(create_train_state(keys[_INIT], run.model, split, optimizer, run.pretrained))
    noise_key = parallel.replicate(keys[_NOISE])
    one_step = functools.partial(
        train_step,
        model=run.model,
        optimizer=optimizer,
        gamma=config.train.gamma,
        lcm=lcm_options(config) if config.lcm.during_training else None,
        threshold=config.lcm.training_threshold,
        shared=shared,
    )

    def batches(epoch: int, first: int) -> Iterator[Batch]:
        episodes = sample_episodes(
            jax.random.fold_in(keys[_EPISODES], epoch),
            split.labels,
            n_episodes=per_epoch * per_step,
            n_shot=n_shot,
            n_query=config.train.n_query,
        )
        supports, queries = (np.asarray(x).reshape(per_epoch, per_step, -1)[first:, mine] for x in episodes)
        return parallel.prefetch(lambda rows: read_batch(split, *rows), zip(supports, queries, strict=True))

    def on_validation(state: TrainState, done: int, losses: np.ndarray) -> dict[str, float]:
        validation = evaluate.score_episodes(
            run.model,
            state.variables(),
            run.splits["validation"],
            key=keys[_VALIDATION],
            n_episodes=config.train.validation_episodes,
            n_shot=n_shot,
            n_query=config.eval.n_query,
        )
        cm, query_loss = losses.mean(axis=0).tolist()
        return {
            "learning_rate": float(schedule(done)),
            "cm_loss": cm,
            "query_loss": query_loss,
            "validation_macro_ap": evaluate.macro_ap(validation.methods["base"], validation.labels),
        }

    def drawn_with(epoch: int, step: int) -> str:
        epoch_key = jax.random.fold_in(keys[_EPISODES], epoch)
        episodes = range(step * per_step, (step + 1) * per_step)
        data = [jax.random.key_data(jax.random.fold_in(epoch_key, i)).tolist() for i in episodes]
        return f"sample_episode with jax.random.wrap_key_data(jax.numpy.uint32({data})) draws its episodes"

    best, state = run_epochs(
        state,
        Checkpoints(workdir / f"checkpoints_{n_shot}shot", metric="validation_macro_ap"),
        workdir / "metrics.jsonl",
        name=f"{n_shot}-shot",
        labels={"n_shot": n_shot},
        epochs=config.train.epochs,
        per_epoch=per_epoch,
        validate_every=config.train.validate_every,
        batches=batches,
        step=lambda state, batch: one_step(state, noise_key, batch, split.word_vectors),
        validate=on_validation,
        drawn_with=drawn_with,
    )
    best_ap = best["validation_macro_ap"]
    print(f"{n_shot}-shot: best on validation at epoch {best['epoch']}, Ma-AP {100 * best_ap:.1f} %")
    return state.variables()


def run_epochs(
    state: TrainState,
    checkpoints: Checkpoints,
    log_file: Path,
    *,
    name: str,
    labels: dict,
    epochs: int,
    per_epoch: int,
    validate_every: int,
    batches: Callable[[int, int], Iterator],
    step: Callable[[TrainState, Any], tuple[TrainState, Any]],
    validate: Callable[[TrainState, int, np.ndarray], dict[str, float]],
    drawn_with: Callable[[int, int], str],
) -> tuple[dict, TrainState]:
    """Steps and validations from where the last checkpoint stands to the last epoch.

    Each validation writes a line to ``log_file`` and a checkpoint. SIGTERM or SIGINT writes a checkpoint after the step
    under way.

    Args:
      state: fresh, on every device.
      checkpoints: are closed at the end.
      log_file: see ``MetricsLog``.
      name: what is trained, for messages.
      labels: tell this training's lines in ``log_file`` from others'.
      epochs: how many.
      per_epoch: steps.
      validate_every: epochs; the last one is validated anyway.
      batches: ``(epoch, first) -> the epoch's batches from number first on``.
      step: ``(state, batch) -> (state, losses)``; losses are scalars, or a tuple of them.
      validate: ``(state, steps done, losses [steps since the last validation, ...]) -> metrics``.
      drawn_with: ``(epoch, number in it) -> how to draw the data of that step again``.

    Returns:
      (the metrics of the step that is best by the metric of ``checkpoints``, its state).

    Raises:
      InputError: a loss or a parameter is not finite, or a checkpoint cannot be written.
      KeyboardInterrupt: a signal came.
    """
    latest = checkpoints.latest()
    done, losses = 0, []
    if latest is not None:
        state, done = checkpoints.restore(latest, state), latest
        losses = checkpoints.metrics(latest).get("losses", [])  # of a checkpoint between two validations
        at = "" if done % per_epoch == 0 else f", step {done % per_epoch} of {per_epoch}"
        print(f"{name}: continuing at epoch {done // per_epoch} of {epochs}{at}", flush=True)
    log = MetricsLog(log_file, labels, after_step=done)

    def require_finite(values: list, first: int) -> None:
        """``values`` are the losses of the steps from ``first`` on, counted from 0."""
        for number, value in enumerate(jax.device_get(values), first):
            if not np.isfinite(value).all():
                epoch, in_epoch = divmod(number, per_epoch)
                shown = ", ".join(map(str, np.ravel(value)))
                fail(f"the loss of step {number + 1} is {shown} (epoch {epoch + 1}; {drawn_with(epoch, in_epoch)})")

    def fail(what: str) -> NoReturn:
        checkpoints.wait()
        good = checkpoints.latest()
        kept = "no checkpoint was written yet" if good is None else f"the last good checkpoint is that of step {good}"
        checkpoints.close()
        raise InputError(
            f"{name}: {what}; {kept} in {checkpoints.directory}. "
            "Lower the learning rate or look at these photos, and start in another workdir"
        )

    def require_all_finite() -> None:
        require_finite(losses, done - len(losses))
        if not _all_finite(state):
            fail(f"the parameters after step {done} are not finite")

    remaining = range(done // per_epoch, epochs)
    with parallel.stop_requests(f"stopping: writing a checkpoint after this step of {name} training") as asked_to_stop:
        for epoch in track(remaining, total=len(remaining), description=f"training, {name}", unit="epochs"):
            last = epoch + 1 == epochs or (epoch + 1) % validate_every == 0  # before a validation
            stopping = False
            for batch in batches(epoch, done % per_epoch):
                state, loss = step(state, batch)
                losses.append(loss)
                done += 1
                # Two steps under way at most: each holds its photos or features.
                require_finite(losses[-2:][:1], done - len(losses[-2:]))
                stopping = asked_to_stop(done)
                if stopping and not (last and done % per_epoch == 0):
                    require_all_finite()
                    checkpoints.save(done, state, {"losses": jax.tree.map(float, jax.device_get(losses))})
                    checkpoints.close()
                    raise KeyboardInterrupt(signal.SIGTERM)
            if not last:
                continue
            require_all_finite()
            of_steps = np.asarray(jax.device_get(losses), np.float32)  # those of a checkpoint are Python's floats
            metrics = {"epoch": epoch + 1, "step": done, **validate(state, done, of_steps)}
            losses = []
            log.write(metrics)
            checkpoints.save(done, state, metrics)
            if stopping:
                checkpoints.close()
                raise KeyboardInterrupt(signal.SIGTERM)
    checkpoints.wait()
    best = checkpoints.best()
    if best != done:
        state = checkpoints.restore(best, state)
    metrics = checkpoints.metrics(best)
    checkpoints.close()
    return metrics, state


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    return jnp.array([jnp.isfinite(x).all() for x in leaves]).all()


def restore_best(config: ml_collections.ConfigDict, run: inputs.Inputs, n_shot: int, workdir: Path) -> dict:
    """The variables of a finished run: those of the checkpoint that was best on validation.

    Raises:
      InputError: nothing was trained there for this shot count.
    """
    folder = workdir / f"checkpoints_{n_shot}shot"
    if not folder.is_dir():
        raise InputError(f"{workdir} holds no model for {n_shot} shots: train one first")
    init = functools.partial(create_train_state, model=run.model, split=run.splits["train"], optimizer=optax.identity())
    like = jax.eval_shape(init, jax.random.key(0)).variables()
    checkpoints = Checkpoints(folder, metric="validation_macro_ap")
    best = checkpoints.best()
    if best is None:
        raise InputError(f"{folder} holds no finished checkpoint: train again")
    variables = checkpoints.restore(best, like, partial=True)
    checkpoints.close()
    return variables


def evaluate_run(
    config: ml_collections.ConfigDict,
    run: inputs.Inputs,
    n_shot: int,
    variables: dict,
    fitted: word_ridge.Fitted,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Chooses theta on validation episodes, then evaluates all methods on the fixed novel episodes.

    Args:
      config: see ``mlfsic_jax.config``.
      run: see ``inputs.load``.
      n_shot: K.
      variables: of the trained model.
      fitted: of ``evaluate.fit_ridge``.

    Returns:
      (one entry of ``results.json``, {"method.metric": float32 [E]} of all novel episodes; "lcm@0.53" is LCM at another
      theta than the chosen one).
    """
    sweep_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), n_shot), _SWEEP)
    thresholds = tuple(config.lcm.thresholds)
    score = functools.partial(
        evaluate.score_episodes,
        run.model,
        variables,
        n_shot=n_shot,
        n_query=config.eval.n_query,
        thresholds=thresholds,
        lcm=lcm_options(config),
    )
    score = functools.partial(score, ridge=ridge_options(config), fitted=fitted)
    sweep = score(run.splits["validation"], key=sweep_key, n_episodes=config.eval.sweep_episodes)
    on_validation = [evaluate.macro_ap(scores, sweep.labels) for scores in sweep.lcm]
    chosen = int(np.argmax(on_validation))
    calibration = evaluate.calibrate(sweep)
    validation = {name: evaluate.macro_ap(scores, sweep.labels) for name, scores in sweep.methods.items()}
    validation["lcm"] = on_validation[chosen]
    novel = score(run.splits["novel"], key=novel_key(config.seed, n_shot), n_episodes=config.eval.episodes)
    summary, values = evaluate.summarise(novel, chosen, calibration)
    by_theta = [multilabel_metrics(scores, novel.labels) for scores in novel.lcm]
    values |= evaluate.episode_values({f"lcm@{t:g}": v for t, v in zip(thresholds, by_theta, strict=True)})
    entry = {
        "config": config.to_dict(),
        "dataset": config.data.name,
        "episodes": config.eval.episodes,
        "n_shot": n_shot,
        **summary,
        "validation": {"macro_ap": validation, "calibration": calibration},
        "theta": {
            "chosen": thresholds[chosen],
            "base_validation_macro_ap": evaluate.macro_ap(sweep.methods["base"], sweep.labels),
            "sweep": [
                {
                    "theta": theta,
                    "kept": float(kept),
                    "validation_macro_ap": on_val,
                    "novel_macro_ap": float(on_novel["macro_ap"].mean()),
                }
                for theta, kept, on_val, on_novel in zip(thresholds, sweep.kept, on_validation, by_theta, strict=True)
            ],
        },
    }
    return entry, values


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | Path, results_in: str | Path | None = None
) -> list[dict]:
    """The whole run: one model for each shot count, trained, evaluated, written to ``<workdir>/results.json``.

    ``episodes_<K>shot.safetensors`` beside it holds the metrics of every novel episode.

    Args:
      config: see ``mlfsic_jax.config``.
      workdir: where the run is kept; the same command in the same workdir goes on where it was stopped.
      results_in: where the results go instead, for other settings of the evaluation of what the workdir holds.

    Returns:
      What ``results.json`` holds.

    Raises:
      InputError: a mistake in config or data.
    """
    start = time.monotonic()
    validate(config)
    out = Path(results_in or workdir)
    config = config.copy_and_resolve_references()
    config.train.episodes_per_step = config.train.episodes_per_step or jax.device_count()
    with open_workdir(workdir) as workdir:
        out.mkdir(parents=True, exist_ok=True)
        run = inputs.load(config)
        fields = config.to_dict()
        settings = {name: fields[name] for name in ("train_backbone", "model", "train")}
        settings["lcm"] = fields["lcm"] if config.lcm.during_training else None
        claim(workdir, config, settings | {"inputs": run.identity})
        _check_feasible(config, run)
        results, comes_from = [], provenance(run)
        for n_shot in config.shots:
            variables = train(config, run, n_shot, workdir)
            print(f"{n_shot}-shot: evaluating {config.eval.episodes} episodes of novel labels", flush=True)
            fitted = evaluate.fit_ridge(run.model, variables, run.base, ridge_options(config))
            entry, values = evaluate_run(config, run, n_shot, variables, fitted)
            results.append(entry | {"provenance": comes_from})
            if parallel.is_first():
                if results_in is None:
                    save_for_prediction(workdir, run, n_shot, variables, fitted)
                write_arrays(episodes_file(out, n_shot), values, {"config": json.dumps(entry["config"])})
                write_json(out / "results.json", results)
    print(evaluate.results_table(results))
    print(f"written to {out / 'results.json'} after {time.monotonic() - start:.0f} s")
    return results


def provenance(run: inputs.Inputs) -> dict:
    """What results come from besides the config: code, packages, devices, and hashes of data, weights and words."""
    package = Path(__file__).parents[1]
    sources = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json"))
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "pillow")
    return {
        "mlfsic_jax": {"version": __version__, "sha256": digest(sources)},
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in names},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} processes",
        "inputs": run.identity,
    }


def episodes_file(workdir: Path, n_shot: int) -> Path:
    """The file with the metrics of every novel episode, {"method.metric": float32 [E]}; its metadata: "config"."""
    return workdir / f"episodes_{n_shot}shot.safetensors"


def save_for_prediction(
    workdir: Path, run: inputs.Inputs, n_shot: int, variables: dict, fitted: word_ridge.Fitted
) -> None:
    """Writes what ``mlfsic_jax.predict`` needs besides the results: the best model, and the labels' word vectors."""
    write_tree(workdir / f"model_{n_shot}shot.safetensors", {"variables": variables, "fitted": fitted._asdict()})
    vectors = {
        name: vector
        for split in run.splits.values()
        for name, vector in zip(split.label_names, split.word_vectors, strict=True)
    }
    splits = {name: list(split.label_names) for name, split in run.splits.items()}
    write_arrays(workdir / "label_vectors.safetensors", vectors, {"splits": json.dumps(splits)})


@contextlib.contextmanager
def open_workdir(workdir: str | Path) -> Iterator[Path]:
    """Makes sure, before anything is computed, that results can be written, and that no other run writes there.

    Raises:
      InputError: they cannot, or one does.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "metrics.jsonl").touch()
            if parallel.is_first():
                refusal = f"another run has the workdir {workdir}: wait for its end, or choose another workdir"
                stack.enter_context(lock(workdir / ".lock", refusal=refusal))
        except OSError as error:
            raise InputError(f"cannot write to the workdir {workdir}: {error.strerror}") from None
        yield workdir


def claim(workdir: Path, config: ml_collections.ConfigDict, settings: dict) -> None:
    """Notes in the workdir what is trained there, ``settings`` and all that concerns photos.

    Raises:
      InputError: something else was trained there; the fields that differ are named.
    """
    fields = config.to_dict()
    data_fields = {k: v for k, v in fields["data"].items() if k not in ("source", "prepared_dir", "split")}
    wanted = {name: fields[name] for name in ("seed", "backbone", "augment")} | {"data": data_fields} | settings
    wanted = json.loads(json.dumps(wanted))
    path = workdir / "trained_with.json"
    if parallel.is_first() and not path.exists():
        write_json(path, wanted)
    parallel.wait_for_all()
    try:
        found = dict(read_json(path))
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged: choose another workdir") from None
    for name, section in default().to_dict().items():  # fields that came later had their defaults there
        if isinstance(section, dict) and isinstance(found.get(name), dict):
            found[name] = {k: v for k, v in section.items() if k in wanted[name]} | found[name]
    if found != wanted:
        differ = ", ".join(f"{k} (there {a}, now {b})" for k, a, b in _differences(found, wanted))
        raise InputError(f"{workdir} holds a run with other settings, {differ}: choose another workdir")


def _differences(a, b, prefix=""):
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix, a, b


def _check_feasible(config: ml_collections.ConfigDict, run: inputs.Inputs) -> None:
    """Before hours of training: can every split serve the episodes that will be asked of it?"""
    key = jax.random.key(0)
    for name, split in run.splits.items():
        n_query = config.train.n_query if name == "train" else config.eval.n_query
        for n_shot in config.shots:
            try:
                evaluate.draw(key, split, 1, n_shot, n_query)
            except InfeasibleEpisode as error:
                names = [split.label_names[c] for c in error.labels]
                raise InputError(f"{name} split, {n_shot}-shot: {error.describe(names)}") from None


class MetricsLog:
    """``metrics.jsonl``: one line per validation, without those that a resumed run will write again.

    The same numbers go to ``tensorboard/`` beside it.
    """

    def __init__(self, path: Path, run: dict, after_step: int):
        """``run`` stands at the start of every line and tells this run's lines from the others'."""
        self._path, self._run = path, run
        self._mine: list[dict] = []
        if not parallel.is_first():
            return
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = [line for line in lines if _is_whole(line) and not self._will_repeat(json.loads(line), after_step)]
        part = path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        os.replace(part, path)
        self._mine = [metrics for metrics in map(json.loads, kept) if run.items() <= metrics.items()]

    def write(self, metrics: dict) -> None:
        if parallel.is_first():
            with self._path.open("a") as file:
                file.write(json.dumps(self._run | metrics) + "\n")
            self._mine.append(metrics)
            name = "-".join(f"{key}={value}" for key, value in self._run.items())
            scalars_to_tensorboard(self._mine, self._path.parent / "tensorboard" / name, without=tuple(self._run))

    def _will_repeat(self, metrics: dict, after_step: int) -> bool:
        return self._run.items() <= metrics.items() and metrics["step"] > after_step


def scalars_to_tensorboard(metrics: list[dict], folder: Path, without: tuple[str, ...] = ()) -> None:
    """Writes numbers for TensorBoard, in the place of what the folder held: no step stands there twice.

    Args:
      metrics: lines of ``metrics.jsonl``, each with its "step".
      folder: what TensorBoard shows as one run.
      without: fields to leave out.
    """
    from tensorboardX import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for line in metrics:
            for name, value in line.items():
                if name not in ("step", *without):
                    writer.add_scalar(name, value, line["step"])


def _is_whole(line: str) -> bool:
    try:
        metrics = json.loads(line)
        return isinstance(metrics, dict) and isinstance(metrics.get("step"), int)
    except (ValueError, RecursionError):  # the run was killed while it wrote this line
        return False
