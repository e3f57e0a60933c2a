"""A model fitted to a user's own labels: ``fit``, then ``predict`` and ``explain``."""

import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mlfsic_jax.data.transforms import PhotoBatch
from mlfsic_jax.methods import METHODS, Method
from mlfsic_jax.run import evaluate, inputs
from mlfsic_jax.run.explain import THRESHOLD, Match, reached_through, strongest_matches
from mlfsic_jax.run.names import label_names_of, words_of
from mlfsic_jax.run.photos import is_many, map_photos
from mlfsic_jax.run.saved import Predictor, Trained, trained_of
from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.parallel import replicate_here

Result = TypeVar("Result")
_BY_NAME = "class_word_ridge"


class Predictions(NamedTuple):
    """The predictions for Q photos."""

    probabilities: np.ndarray  # float32 [Q, C]
    label_names: tuple[str, ...]  # C names
    labels: tuple[tuple[str, ...], ...]  # of each photo, those above their threshold, the likeliest first


class Reason(NamedTuple):
    """Why a label was predicted: the shares of its score, before that is standardised, and where they come from."""

    label: str
    probability: float
    words: float  # share of the label's name
    photos: float  # share of the support photos
    classes: tuple[tuple[str, float], ...]  # ImageNet classes that the name was reached through, with their weights
    region: tuple[int, int]  # (row, column), on the photo's grid, of the region that adds most to the name's share


class Classifier(NamedTuple):
    """A model fitted to a user's labels, see ``fit``."""

    predictor: Predictor
    trained: Trained  # the one of its shot counts that is used
    method: str
    label_names: tuple[str, ...]  # C names
    thresholds: np.ndarray  # float [C]: a photo has a label where its probability is above
    state: Any  # what the method keeps of the support, see ``Method.fit``
    kept: np.ndarray | None  # bool [S, h, w], the regions of the support photos that LCM keeps; None for other methods
    note: str  # why this method and this shot count, in one line

    def predict(self, photos: Any) -> Predictions:
        """Says which of the labels each of Q photos has, or a single one; ``InputError`` where one cannot be read."""
        rows = []
        for row in predict_each(self, photos if is_many(photos) else [photos]):
            if isinstance(row, InputError):
                raise row
            rows.append(row)
        found = np.array(rows, np.float32).reshape(-1, len(self.label_names))
        return Predictions(found, self.label_names, tuple(labels_above(self, row) for row in found))

    def explain(self, photo: Any) -> list[Match]:
        """The regions of a photo that add most to its predicted labels' scores, with those of the support they met.

        ``Match.support`` counts the photos of ``fit``. ``InputError`` when the photo cannot be read, or the method does
        not compare regions.
        """
        found, probability = self._explain(photo)
        options = {"width": self.predictor.grid[1], "threshold": self.thresholds}
        return strongest_matches(found["pairs"][0], found["dual"], probability, self.label_names, **options)

    def reasons(self, photo: Any) -> list[Reason]:
        """What names and photos add to a photo's scores, the likeliest label first; errors as of ``explain``."""
        found, probability = self._explain(photo)
        if "classes" not in found:
            raise InputError(f"method {self.method} has no classes that names are reached through: use {_BY_NAME}")
        photos = np.einsum("slm,sc->c", found["pairs"][0], found["dual"])
        reasons = []
        for c in np.argsort(-probability, kind="stable"):
            values = float(probability[c]), float(found["prior"][0, c]), float(photos[c])
            reached = reached_through(found["classes"][c], found["prior_pairs"][0, :, c], self.predictor.grid[1])
            reasons.append(Reason(self.label_names[c], *values, *reached))
        return reasons

    def _explain(self, photo: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """``Method.explain`` of one photo, and its probabilities, float32 [C]."""
        method, trained = self.trained.methods[self.method], trained_of(self.trained, self.method)
        if type(method).explain is Method.explain:
            able = [name for name, m in METHODS.items() if type(m).explain is not Method.explain]
            raise InputError(f"method {self.method} does not compare regions: fit with one of {', '.join(able)}")
        images = _embed_photos(self.predictor, self.trained, self.method, [photo])
        found = {name: np.asarray(x) for name, x in method.explain(trained, self.state, images).items()}
        return found, probabilities(self, images)[0]


def fit(
    predictor: Predictor,
    photos: Sequence[Any],
    labels: Sequence[str | Sequence[str]],
    *,
    method: str | None = None,
    label_names: str | Sequence[str] | None = None,
    vectors: str | os.PathLike[str] | None = None,
    wordings: Mapping[str, str | Sequence[str]] | None = None,
) -> Classifier:
    """Teaches a model labels from a few photos. Nothing is trained: it takes a moment.

    The model out of the box needs none: ``fit(model, [], [], label_names=("cat", "dog"))``.

    Args:
      predictor: of its shot counts, the one nearest to the photos per label (median) is used.
      photos: S photos, each a path, a ``PIL.Image`` or an array uint8 [H, W, 3].
      labels: for each photo its label names, or one name; empty where it has none of the labels.
      method: one of ``METHODS``; None for the one that was best on validation labels.
      label_names: the labels, to fix their order, or one; by default as they occur.
      vectors: a further file of word vectors, see ``words.load_word_vectors``, looked at before the model's.
      wordings: of some labels, in place of their names, one or several that are averaged, such as
        ``{"dog": ("dog", "puppy")}``; for methods that encode names.

    Raises:
      InputError: a label has no photo, no word vector or no counter-example, a photo cannot be read, or the model was
        not trained for the method.
    """
    if not is_many(photos):
        raise InputError("fit takes several photos: give [photo], and its labels as [[label, ..]]")
    photos = list(photos)
    names, matrix = _label_matrix(photos, list(labels), label_names)
    median = statistics.median(matrix.sum(axis=0).tolist())
    trained = nearest_shots(predictor, median)
    note = _note(predictor, trained, method, median)
    chosen = method or _best(trained)
    value = _method(predictor, trained, chosen)
    alone = [name for name, column in zip(names, matrix.T, strict=True) if not column.any()]
    if alone and value.needs_photos:
        raise InputError(f"label {alone[0]!r} has no support photo: give it 1 to 5, or take it out")
    everywhere = [name for name, column in zip(names, matrix.T, strict=True) if column.all()]
    if everywhere and value.needs_contrast:
        raise InputError(
            f"label {everywhere[0]!r} is on every support photo, so {chosen} has nothing to tell it from: add a photo "
            "without it (it may have no label at all), or use method prototypes"
        )
    words, unread = words_of(predictor, trained, value, names, matrix.any(axis=0), vectors=vectors, wordings=wordings)
    fitting = Fitting(predictor, trained, chosen, names, words)
    with ThreadPoolExecutor(1) as meanwhile:
        compiled = meanwhile.submit(_compile_fit, fitting, matrix)
        images = _embed_photos(predictor, trained, chosen, photos)
        compiled.result()  # passes on what went wrong
    return fit_embedded(fitting, images, matrix, note + unread)


class Fitting(NamedTuple):
    """What a support set is given to."""

    predictor: Predictor
    trained: Trained
    method: str
    label_names: tuple[str, ...]
    words: np.ndarray | None


def fit_embedded(fitting: Fitting, images: Mapping[str, np.ndarray], labels: np.ndarray, note: str) -> Classifier:
    """``fit`` for photos that went through ``Method.embed``; labels are bool [S, C], or float and NaN where unknown."""
    predictor, trained, chosen, names, words = fitting
    value, labels = trained.methods[chosen], _fill(trained.methods[chosen], labels)
    images = {name: np.pad(x, [(0, len(labels) - len(x))] + [(0, 0)] * (x.ndim - 1)) for name, x in images.items()}
    state = _fit(value, trained_of(trained, chosen), images, labels, words)
    if value.statistics(state).get("beta", 1) == 0:
        note += "; the names mean something else than the photos show, or nothing, and are not used"
    kept = state.get("keep") if isinstance(state, dict) else None
    kept = None if kept is None else np.asarray(kept).reshape(-1, *predictor.grid)
    return Classifier(predictor, trained, chosen, names, np.full(len(names), THRESHOLD), state, kept, note)


def _compile_fit(fitting: Fitting, labels: np.ndarray) -> None:
    """Compiles what ``fit_embedded`` runs for labels bool [S, C], while the photos are still being read."""
    predictor, trained, chosen, _, words = fitting
    value, stores, labels = trained.methods[chosen], trained_of(trained, chosen), _fill(trained.methods[chosen], labels)
    features = inputs.shapes(predictor.backbone, predictor.image_size).features
    of_one = jax.eval_shape(functools.partial(_embed_features, value), stores, features)
    images = {name: jax.ShapeDtypeStruct((len(labels), *x.shape[1:]), x.dtype) for name, x in of_one.items()}
    _fit.lower(value, stores, images, labels, words).compile()


def _fill(method: Method, labels: np.ndarray) -> np.ndarray:
    """Labels with unknown ones for photos that are not there, as many as share a program, if the method takes them."""
    if not method.takes_unknown:
        return labels
    n = 8 if len(labels) <= 8 else -(-len(labels) // 64) * 64
    return np.pad(labels.astype(np.float32), [(0, n - len(labels)), (0, 0)], constant_values=np.nan)


def predict_each(classifier: Classifier, photos: Iterable[Any]) -> Iterator[np.ndarray | InputError]:
    """``Classifier.predict`` in a few photos' memory: float32 [C] for each photo, or why it cannot be read."""

    def predict(images: dict[str, jax.Array], errors: list[InputError | None]) -> list[np.ndarray | InputError]:
        rows = probabilities(classifier, images)
        return [row if error is None else error for row, error in zip(rows, errors, strict=False)]

    yield from itertools.chain.from_iterable(_map_embedded(predict, *classifier[:3], photos))


def embed_each(
    predictor: Predictor, trained: Trained, method: str, photos: Iterable[Any]
) -> Iterator[dict[str, np.ndarray] | InputError]:
    """``Method.embed`` of photos in a few photos' memory: for each its row of every array, or why it cannot be read."""

    def rows(images: dict[str, jax.Array], errors: list[InputError | None]) -> list[dict[str, np.ndarray] | InputError]:
        arrays = {name: np.asarray(x) for name, x in images.items()}
        return [error or {name: x[i] for name, x in arrays.items()} for i, error in enumerate(errors)]

    yield from itertools.chain.from_iterable(_map_embedded(rows, predictor, trained, method, photos))


def labels_above(classifier: Classifier, probabilities: np.ndarray) -> tuple[str, ...]:
    """The labels of one photo, float [C], whose probability is above their threshold, the likeliest first."""
    order = np.argsort(-probabilities, kind="stable")
    return tuple(classifier.label_names[c] for c in order if probabilities[c] > classifier.thresholds[c])


def _label_matrix(photos, labels, label_names) -> tuple[tuple[str, ...], np.ndarray]:
    """C names and bool [S, C]."""
    if len(photos) != len(labels):
        raise InputError(f"{len(photos)} support photos but labels for {len(labels)}: give every photo its labels")
    each = [label_names_of(names, "a support photo") for names in labels]
    given = list(dict.fromkeys(itertools.chain.from_iterable(each)))
    names = tuple(dict.fromkeys(given if label_names is None else label_names_of(label_names, "label_names")))
    if not names:
        raise InputError("the support has no label: name at least one, with 1 to 5 photos")
    for name in given:
        if name not in names:
            raise InputError(f"label {name!r} of a support photo is not among the labels {', '.join(names)}")
    return names, np.array([[name in photo for name in names] for photo in each], bool).reshape(len(each), len(names))


def nearest_shots(predictor: Predictor, per_label: float) -> Trained:
    """The model for the shot count nearest to this many photos per label; of two that are equally near, the larger."""
    return min(predictor.trained, key=lambda trained: (abs(trained.n_shot - per_label), -trained.n_shot))


def _best(trained: Trained) -> str:
    """The best on validation labels of those that look at the support; every other one would ignore the user's."""
    adapting = [name for name in trained.validation if name in trained.methods and trained.methods[name].adapts]
    return max(adapting or trained.validation, key=trained.validation.__getitem__)


def _method(predictor: Predictor, trained: Trained, name: str) -> Method:
    """A method that the model was trained and tuned for; ``InputError`` if it was not."""
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown: use one of {', '.join(METHODS)}")
    if METHODS[name].control:
        raise InputError(f"method {name} is a control for evaluations and labels no photos: use another")
    method = trained.methods.get(name)
    if predictor.manifest.get("ready") and name not in trained.calibration:
        raise InputError(f"the model out of the box has {', '.join(trained.calibration)} only, not method {name}")
    tuned = not METHODS[name].tuned or name in trained.tuned
    if method is None or not tuned or (method.calibrated and name not in trained.calibration):
        what = "labels of the dataset" if METHODS[name].base == "labels" else "photos of the dataset"
        evaluated = ",".join(f"'{known}'" for known in (*trained.validation, name))
        raise InputError(
            f"method {name} has to learn from {what} first, and {predictor.path} was trained without it: run its "
            f'training command again with --config.eval.methods="({evaluated})"'
        )
    return method


def _note(predictor: Predictor, trained: Trained, method: str | None, median: float) -> str:
    name, dataset = method or _best(trained), predictor.config.data.name
    if predictor.manifest.get("ready"):
        kind, backbone = "names and photos" if median else "names alone", predictor.config.backbone
        return f"method {name}, out of the box, from {kind}: {backbone} was trained on ImageNet's classes"
    note = f"method {name}: {'chosen by you' if method else 'best on validation labels'}"
    if name in trained.validation:
        note += f" ({100 * trained.validation[name]:.1f} Ma-AP there, {trained.n_shot}-shot)"
    if name in METHODS and METHODS[name].base == "labels":
        note += f"; it learned from the base labels of {dataset}"
    if "validation" in predictor.config.ridge.fit_on:
        note += ", and the ridge methods from the validation labels too"
    if len(predictor.trained) > 1:
        note += f"; the support has {median:g} per label, {trained.n_shot}-shot is nearest to that"
    return note


def _embed_photos(predictor: Predictor, trained: Trained, method: str, photos: Sequence[Any]) -> dict[str, np.ndarray]:
    """``Method.embed`` of photos that all have to be readable."""

    def readable(images: dict[str, jax.Array], errors: list[InputError | None]) -> dict[str, np.ndarray]:
        for error in filter(None, errors):
            raise error
        return {name: np.asarray(x)[: len(errors)] for name, x in images.items()}

    none = [np.zeros((1, 1, 3), np.uint8)]  # for the shapes
    parts = list(_map_embedded(readable, predictor, trained, method, photos if len(photos) else none))
    return {name: np.concatenate([part[name] for part in parts])[: len(photos)] for name in parts[0]}


def _map_embedded(
    fn: Callable[[dict[str, jax.Array], list[InputError | None]], Result],
    predictor: Predictor,
    trained: Trained,
    method: str,
    photos: Iterable[Any],
) -> Iterator[Result]:
    """Takes photos through backbone and method in batches, the way that evaluation did it; ``fn`` gets each.

    It gets ``Method.embed`` of a batch, and for each photo in it None or why it cannot be read.
    """
    frozen = predictor.backbone_variables is not None
    own = predictor.backbone_variables if frozen else trained.stores["episodes"]["variables"]
    own = replicate_here(own if frozen else inputs.backbone_variables(own))
    of_method = trained.methods[method], trained_of(trained, method)
    dtype = "float16" if frozen else "float32"  # as evaluation got them

    def compute(batch: PhotoBatch) -> Result:
        features = inputs.features_here(predictor.backbone, own, dtype, batch.pixels)
        return fn(_embed_features(*of_method, features), batch.errors)

    size = predictor.image_size
    return map_photos(compute, photos, size, inputs.batch_size(predictor.backbone, size))


@functools.partial(jax.jit, static_argnums=0)
def _embed_features(method: Method, trained, features):
    return method.embed(trained, features.reshape(len(features), -1, features.shape[-1]).astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _fit(method: Method, trained, images: Mapping[str, Any], labels, words):
    return method.fit(trained, {**images, **method.embed_support(trained, images, labels, words)}, labels, words)


@functools.partial(jax.jit, static_argnums=0)
def _score(method: Method, trained, state, images):
    return method.score(trained, state, images)


def probabilities(classifier: Classifier, images: Mapping[str, Any]) -> np.ndarray:
    """float32 [Q, C] for photos that went through ``Method.embed``."""
    trained, name = classifier.trained, classifier.method
    scores = np.asarray(_score(trained.methods[name], trained_of(trained, name), classifier.state, images))
    found = evaluate.probabilities(trained.methods[name], scores, trained.calibration.get(name))
    return np.clip(found, 0, 1).astype(np.float32)
