"""The whole run: train, choose on validation labels, evaluate on novel ones."""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from mlfsic_jax.core.episodes import InfeasibleEpisode, sample_episodes
from mlfsic_jax.core.metrics import multilabel_metrics
from mlfsic_jax.data.features import View
from mlfsic_jax.methods import METHODS, Method, trained_of
from mlfsic_jax.run import evaluate, inputs, loop, sources
from mlfsic_jax.run.checkpoint import Checkpoints
from mlfsic_jax.run.config import create_methods, lcm_options, validate
from mlfsic_jax.run.saved import save_for_prediction
from mlfsic_jax.run.step import Objective, TrainState, create_optimizer, create_train_state, read_batch, train_steps
from mlfsic_jax.run.workdir import claim, episodes_file, open_workdir, provenance
from mlfsic_jax.system import parallel
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.files import write_arrays, write_json
from mlfsic_jax.system.untrusted import expand

_CALL_BYTES = 2**28  # of inputs in one call of ``train_steps``; another waits on the host meanwhile
# Keys of one run's random streams, folded into jax.random.key(config.seed).
_INIT, _EPISODES, _NOISE, _VALIDATION, _SWEEP, _TEST = range(6)


def stream_key(seed: int, n_shot: int, stream: int) -> jax.Array:
    """The key of one of a run's random streams."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), n_shot), stream)


def novel_key(seed: int, n_shot: int) -> jax.Array:
    """The key of the fixed novel episodes that every method is evaluated on."""
    return stream_key(seed, n_shot, _TEST)


class Episodes(loop.Stage):
    """Training by episodes for one shot count.

    All randomness is a function of the seed and the step: an interrupted run ends with the numbers of any other.
    """

    def __init__(self, config: ConfigDict, run: inputs.Inputs, n_shot: int):
        self._config, self._run, self._n_shot = config, run, n_shot
        options = config.train
        self.name, self.labels = f"{n_shot}-shot", {"n_shot": n_shot}
        self.epochs, self.validate_every = options.epochs, options.validate_every
        self._per_step = options.episodes_per_step
        self.per_epoch = -(-options.episodes_per_epoch // self._per_step)  # steps
        n_devices = jax.device_count()
        self._shared = self._per_step % n_devices == 0
        if not self._shared:
            hint = f"to share them, set config.train.episodes_per_step to a multiple of {n_devices}"
            print(f"{n_shot}-shot: each of the {n_devices} devices trains on every episode; {hint}")
        steps = (options.warmup_epochs * self.per_epoch, options.epochs * self.per_epoch)
        optimizer, self._schedule = create_optimizer(options.learning_rate, *steps, options.schedule)
        lcm = lcm_options(config) if config.lcm.during_training else None
        self._objective = Objective(run.model, optimizer, options.gamma, lcm, config.lcm.training_threshold)
        self._noise_key = parallel.replicate(self._key(_NOISE))
        self._in_call = self._steps_in_call()

    def _key(self, stream: int) -> jax.Array:
        return stream_key(self._config.seed, self._n_shot, stream)

    def _steps_in_call(self) -> int:
        """How many steps a call of ``train_steps`` makes."""
        if self._run.model.backbone is not None and jax.default_backend() == "cpu":
            return 1  # XLA's convolutions are ten times as slow inside of a loop there
        train, per_label = self._run.splits["train"], self._n_shot + self._config.train.n_query
        n_images = self._per_step * per_label * train.labels.shape[1]
        of_step = n_images * train.inputs(np.zeros(1, int)).nbytes
        return max(1, min(self.per_epoch, _CALL_BYTES // of_step))

    def initial_state(self) -> TrainState:
        """Fresh parameters on every device."""
        objective, train = self._objective, self._run.splits["train"]
        state = create_train_state(self._key(_INIT), objective.model, train, objective.optimizer, self._run.pretrained)
        return parallel.replicate(state)

    def batches(self, epoch: int, first: int):
        train, key = self._run.splits["train"], jax.random.fold_in(self._key(_EPISODES), epoch)
        sizes = {"n_shot": self._n_shot, "n_query": self._config.train.n_query}
        episodes = sample_episodes(key, train.labels, n_episodes=self.per_epoch * self._per_step, **sizes)
        mine = parallel.share(self._per_step) if self._shared else slice(None)
        by_step = [np.asarray(x).reshape(self.per_epoch, self._per_step, -1)[:, mine] for x in episodes]
        starts = range(first, self.per_epoch, self._in_call)
        calls = [[rows[i : i + self._in_call].swapaxes(0, 1) for rows in by_step] for i in starts]
        return parallel.prefetch(lambda rows: read_batch(train, *rows), calls)

    def step(self, state: TrainState, batch):
        words = self._run.splits["train"].word_vectors
        return train_steps(state, self._noise_key, batch, words, self._objective, shared=self._shared)

    def validate(self, state: TrainState, done: int, losses: np.ndarray) -> dict[str, float]:
        config, variables = self._config, state.variables()
        base, trained = create_methods(config, self._n_shot, ("base",)), {"base": {"variables": variables}}
        view, key = inputs.feature_views(self._run, variables)["validation"], self._key(_VALIDATION)
        sizes = {"n_episodes": config.train.validation_episodes, "n_query": config.eval.n_query}
        scores = evaluate.score_episodes(base, trained, view, key=key, n_shot=self._n_shot, **sizes)
        cm, query_loss = losses.mean(axis=0).tolist()
        metrics = {"learning_rate": float(self._schedule(done)), "cm_loss": cm, "query_loss": query_loss}
        return metrics | {"validation_macro_ap": evaluate.macro_ap(scores.methods["base"], scores.labels)}

    def drawn_with(self, epoch: int, number: int) -> str:
        epoch_key = jax.random.fold_in(self._key(_EPISODES), epoch)
        episodes = range(number * self._per_step, (number + 1) * self._per_step)
        data = [jax.random.key_data(jax.random.fold_in(epoch_key, i)).tolist() for i in episodes]
        return f"sample_episode with jax.random.wrap_key_data(jax.numpy.uint32({data})) draws its episodes"


def train(config: ConfigDict, run: inputs.Inputs, n_shot: int, workdir: Path) -> dict:
    """The variables of one shot count's model, best on validation; resumes and raises as ``loop.run`` does."""
    stage = Episodes(config, run, n_shot)
    checkpoints = Checkpoints(workdir / f"checkpoints_{n_shot}shot", metric="validation_macro_ap")
    best, state = loop.run(stage, stage.initial_state(), checkpoints, workdir / "metrics.jsonl")
    ap = 100 * best["validation_macro_ap"]
    print(f"{n_shot}-shot: best on validation at epoch {best['epoch']}, Ma-AP {ap:.1f} %")
    return state.variables()


def restore_best(config: ConfigDict, run: inputs.Inputs, n_shot: int, workdir: Path) -> dict:
    """The variables of a finished run, best on validation; ``InputError`` if there are none for this shot count."""
    folder = workdir / f"checkpoints_{n_shot}shot"
    if not folder.is_dir():
        raise InputError(f"{workdir} holds no model for {n_shot} shots: train one first")

    def init(key):
        return create_train_state(key, run.model, run.splits["train"], optax.identity()).variables()

    checkpoints = Checkpoints(folder, metric="validation_macro_ap")
    best = checkpoints.best()
    if best is None:
        raise InputError(f"{folder} holds no finished checkpoint: train again")
    variables = checkpoints.restore(best, jax.eval_shape(init, jax.random.key(0)), partial=True)
    checkpoints.close()
    return variables


def open_methods(
    config: ConfigDict, n_shot: int, base: View, variables: dict | None = None, names: tuple[str, ...] = ()
) -> tuple[dict[str, Method], dict[str, Any]]:
    """The methods of ``create_methods``, and their stores: what was trained by episodes or is learned from base images.

    ``base`` has local features for inputs; ``variables`` are those of the trained model, None where none needs it.
    """
    methods = create_methods(config, n_shot, names)
    stores = {} if variables is None else {"episodes": {"variables": variables}}
    alone = [m for m in create_methods(config, n_shot, tuple(METHODS)).values() if len(m.stores) == 1]
    key = jax.random.fold_in(novel_key(config.seed, n_shot), 1)
    for store in dict.fromkeys(store for method in methods.values() for store in method.stores):
        if store not in stores:
            stores[store] = next(method for method in alone if method.stores == (store,)).train(key, base)
    return methods, stores


def evaluate_run(
    config: ConfigDict, views: Mapping[str, View], n_shot: int, methods: evaluate.Methods, stores: Mapping[str, Any]
) -> tuple[dict, dict[str, np.ndarray]]:
    """Chooses theta on validation episodes, then evaluates all methods on the fixed novel episodes.

    Returns (one entry of ``results.json``, {"method.metric": float32 [E]} of all novel episodes); "lcm@0.53" there is
    LCM at this theta, chosen or not.
    """
    trained = {name: trained_of(method, stores, method.candidates()) for name, method in methods.items()}
    score = functools.partial(evaluate.score_episodes, methods, trained, n_shot=n_shot, n_query=config.eval.n_query)
    sweep_key = stream_key(config.seed, n_shot, _SWEEP)
    sweep = score(views["validation"], key=sweep_key, n_episodes=config.eval.sweep_episodes)
    novel = score(views["novel"], key=novel_key(config.seed, n_shot), n_episodes=config.eval.episodes)
    curves, chosen, by_value = {}, {}, {}
    for name, method in methods.items():
        if method.tuned:
            curves[name], of_values = _curve(name, method, sweep, novel)
            by_value |= of_values
            chosen[name] = int(np.argmax([point["validation_macro_ap"] for point in curves[name]]))
    for scores in (sweep, novel):  # of tuned methods, those at the chosen candidate
        scores.methods.update((name, scores.methods[name][i]) for name, i in chosen.items())
    calibration = evaluate.calibrate(methods, sweep)
    summary, values = evaluate.summarise(methods, novel, calibration)
    on_validation = {name: evaluate.macro_ap(scores, sweep.labels) for name, scores in sweep.methods.items()}
    entry = {
        "config": config.to_dict(),
        "dataset": config.data.name,
        "episodes": config.eval.episodes,
        "n_shot": n_shot,
        **summary,
        "validation": {"macro_ap": on_validation, "calibration": calibration},
        "tuned": {name: methods[name].candidates()[i] for name, i in chosen.items()},
    }
    if "lcm" in curves:
        base = on_validation.get("base")
        entry["theta"] = {"chosen": entry["tuned"]["lcm"], "base_validation_macro_ap": base, "sweep": curves["lcm"]}
    return entry, values | evaluate.episode_values(by_value)


def _curve(name: str, method: Method, sweep: evaluate.Scores, novel: evaluate.Scores) -> tuple[list[dict], dict]:
    """Both splits over the candidates of a tuned method, and the novel metrics by "name@value"."""
    points, by_value = [], {}
    for i, value in enumerate(method.candidates()):
        found = evaluate.probabilities(method, novel.methods[name][i])
        metrics = by_value[f"{name}@{value:g}"] = multilabel_metrics(found, novel.labels)
        statistics = {statistic: float(values[i]) for statistic, values in sweep.statistics[name].items()}
        statistics["validation_macro_ap"] = evaluate.macro_ap(sweep.methods[name][i], sweep.labels)
        points.append({method.tuned: value} | statistics | {"novel_macro_ap": float(metrics["macro_ap"].mean())})
    return points, by_value


def evaluate_alone(
    config: ConfigDict, run: inputs.Inputs, n_shot: int, names: tuple[str, ...], variables: dict | None = None
) -> dict[str, np.ndarray]:
    """{"method.metric": float32 [E]} of one method, e.g. a peer, or of several, on the fixed novel episodes.

    ``variables`` are those of the trained model, where a method uses it or the backbone was trained with it.
    """
    views = inputs.feature_views(run, variables)
    methods, stores = open_methods(config, n_shot, views["base"], variables, names)
    if any(method.tuned or method.calibrated for method in methods.values()):
        return evaluate_run(config, views, n_shot, methods, stores)[1]
    trained = {name: trained_of(method, stores) for name, method in methods.items()}
    sizes = {"n_episodes": config.eval.episodes, "n_shot": n_shot, "n_query": config.eval.n_query}
    scores = evaluate.score_episodes(methods, trained, views["novel"], key=novel_key(config.seed, n_shot), **sizes)
    return evaluate.summarise(methods, scores, {})[1]


def train_and_evaluate(config: ConfigDict, workdir: str | Path, results_in: str | Path | None = None) -> list[dict]:
    """The whole run: one model for each shot count, trained, evaluated, written to ``<workdir>/results.json``.

    ``episodes_<K>shot.safetensors`` beside it holds the metrics of every novel episode. The same command in the same
    workdir goes on where it was stopped. With ``results_in`` the results go there, for an evaluation with other
    settings. Returns the content of ``results.json``.

    Raises:
      InputError: a mistake in config or data.
    """
    start = time.monotonic()
    validate(config)
    config = config.copy_and_resolve_references()
    config.train.episodes_per_step = config.train.episodes_per_step or jax.device_count()
    with open_workdir(workdir) as workdir:
        out = expand(results_in) if results_in else workdir
        out.mkdir(parents=True, exist_ok=True)
        run = inputs.load(config)
        fields = config.to_dict()
        settings = {name: fields[name] for name in ("train_backbone", "freeze_batch_norm", "model", "train")}
        settings["lcm"] = fields["lcm"] if config.lcm.during_training else None
        claim(workdir, config, settings | {"inputs": run.identity})
        _check_feasible(config, run)
        results, comes_from = [], provenance(run.identity)
        for n_shot in config.shots:
            variables = train(config, run, n_shot, workdir)
            print(f"{n_shot}-shot: evaluating {config.eval.episodes} episodes of novel labels", flush=True)
            views = inputs.feature_views(run, variables)
            methods, stores = open_methods(config, n_shot, views["base"], variables)
            entry, values = evaluate_run(config, views, n_shot, methods, stores)
            results.append(entry | {"provenance": comes_from})
            if parallel.is_first():
                if results_in is None:
                    kept = [store for method in methods.values() if not method.control for store in method.stores]
                    kept = {"episodes": {"variables": variables}} | {store: stores[store] for store in kept}
                    save_for_prediction(workdir, run, n_shot, kept)
                write_arrays(episodes_file(out, n_shot), values, sources.metadata(config))
                write_json(out / "results.json", results)
    print(evaluate.results_table(results))
    print(f"written to {out / 'results.json'} after {time.monotonic() - start:.0f} s")
    return results


def _check_feasible(config: ConfigDict, run: inputs.Inputs) -> None:
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
