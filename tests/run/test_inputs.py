"""The backbone that takes photos, in float32 and in bfloat16, and the features that methods get of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax import backbones
from mlfsic_jax.backbones.conv4 import Conv4
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.features import View
from mlfsic_jax.run import config, inputs
from mlfsic_jax.system.errors import InputError


def photo_backbone(dtype):
    spec = backbones.BACKBONES["conv4"]
    return inputs.PhotoBackbone(Conv4(), spec.mean, spec.std, dtype=dtype)


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def variables(photos):
    return jax.jit(photo_backbone("float32").init)(jax.random.key(0), photos)


def test_bfloat16_computes_the_same_from_the_same_variables(photos, variables):
    expected = photo_backbone("float32").apply(variables, photos)
    actual = photo_backbone("bfloat16").apply(variables, photos)
    assert actual.dtype == expected.dtype == jnp.float32
    difference = jnp.abs(actual - expected).max() / jnp.abs(expected).max()
    assert 1e-5 < difference < 0.03  # eight bits of mantissa, four layers: it is bfloat16, and close


def test_bfloat16_trains_float32_parameters(photos, variables):
    def loss(params, dtype):
        features, updates = photo_backbone(dtype).apply(
            variables | {"params": params}, photos, True, mutable=["batch_stats"]
        )
        return (features**2).mean(), updates

    (gradient, updates), (expected, _) = (
        jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(variables["params"], dtype)
        for dtype in ("bfloat16", "float32")
    )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((gradient, updates)))
    kernel, expected_kernel = (g["network"]["encoder_0_0"]["kernel"].ravel() for g in (gradient, expected))
    cosine = kernel @ expected_kernel / jnp.linalg.norm(kernel) / jnp.linalg.norm(expected_kernel)
    assert 0.95 < cosine < 0.9999  # some of the ReLUs of a random network open or close


def test_variables_of_both_have_one_structure(photos, variables):
    like = jax.eval_shape(photo_backbone("bfloat16").init, jax.random.key(0), photos)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), like) == jax.tree.map(lambda x: (x.shape, x.dtype), variables)


def test_a_cpu_computes_in_float32_unless_told():
    settings = config.default()
    assert jax.default_backend() != "cpu" or inputs.compute_dtype(settings) == "float32"
    settings.compute_dtype = "bfloat16"
    assert inputs.compute_dtype(settings) == "bfloat16"


class Halved(nn.Module):
    """A backbone in miniature."""

    @nn.compact
    def __call__(self, photos, train: bool = False):
        return photos * self.param("scale", nn.initializers.constant(0.5), ())


def test_peers_get_the_features_of_a_trained_backbone():
    features = np.random.default_rng(0).random((150, 2, 2, 6)).astype(np.float16)
    split = View(lambda rows: features[rows], np.ones((150, 3), bool), np.ones((3, 5), np.float32), ("a", "b", "c"))
    frozen = inputs.Inputs(BaseModel(), {"novel": split}, split, None, {})
    assert inputs.feature_views(frozen) == {"novel": split, "base": split}  # these are the inputs
    trained = frozen._replace(model=BaseModel(backbone=Halved()))
    variables = {"params": {"backbone": {"scale": jnp.float32(0.25)}, "joint": {}}}
    views = inputs.feature_views(trained, variables)
    assert views.keys() == {"novel", "base"}
    rows = np.array([5, 149, 5])
    for view in views.values():
        np.testing.assert_array_equal(view.inputs(rows), features[rows] * np.float16(0.25))  # a quarter is exact
        assert view.labels is split.labels


def test_frozen_batch_norm_trains_all_but_its_statistics(photos, variables):
    backbone = photo_backbone("float32").clone(freeze_batch_norm=True)

    def features(params):
        return backbone.apply(variables | {"params": params}, photos, True, mutable=["batch_stats"])

    gradient, updates = jax.jit(jax.grad(lambda p: (lambda y, u: ((y**2).mean(), u))(*features(p)), has_aux=True))(
        variables["params"]
    )
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(gradient["network"]["encoder_0_0"]))
    # As it is used afterwards; with statistics of its own the batch would come out otherwise.
    as_used = photo_backbone("float32").apply(variables, photos)
    np.testing.assert_allclose(features(variables["params"])[0], as_used, atol=1e-6)
    own, _ = photo_backbone("float32").apply(variables, photos, True, mutable=["batch_stats"])
    assert jnp.abs(own - as_used).max() > 1e-2


def test_missing_files_are_named_as_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a,b.pth").touch()
    settings = config.default()
    settings.labels.vectors, settings.backbone_weights = "~/words.txt", "~/a,b.pth,~/c.pth"
    with pytest.raises(InputError) as caught:
        inputs.load_dataset(settings)
    words, weights, source = str(caught.value).splitlines()
    assert words.startswith(f"config.labels.vectors = '{tmp_path}/words.txt': no such file; get")
    assert weights.startswith(f"config.backbone_weights = '{tmp_path}/c.pth': no such file; get")
    assert source.startswith("config.data.source = ''")
