"""The backbone that takes photos, in float32 and in bfloat16, and the features that methods get of it."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlfsic_jax import backbones
from mlfsic_jax.backbones.conv4 import Conv4
from mlfsic_jax.bench import made_up
from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.data.features import View
from mlfsic_jax.run import config, inputs
from mlfsic_jax.system import parallel
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


# Largest layers of a photo: 112 x 112 x 96, 160 x 160 x 96, 112 x 112 x 64, 197 x 3072, 84 x 84 x 64, 32 x 32 x 64.
LAYERS = [
    *(("mobilenet_v2", 224, 1), ("efficientnet_lite0", 320, 1), ("resnet50", 224, 2), ("vit_b_16", 224, 3)),
    *(("conv4", 84, 4), ("conv4", 32, 32), ("conv4", 16, 32)),
]


@pytest.mark.parametrize(("name", "size", "batch"), LAYERS)
def test_a_batch_fits_the_cache_of_a_core(name, size, batch, monkeypatch):
    backbone = made_up.photo_backbone(name)
    assert inputs.batch_size(backbone, size) == inputs.batch_size(backbone.clone(dtype="bfloat16"), size) == batch
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert inputs.batch_size(backbone, size) == 32 * jax.local_device_count()


@pytest.mark.parametrize("n_cores", [1, 5])
def test_features_of_any_number_of_photos_by_any_number_of_threads(variables, monkeypatch, n_cores):
    monkeypatch.setattr(parallel, "cores", lambda: n_cores)
    backbone = photo_backbone("float32")
    photos = np.random.default_rng(1).integers(0, 255, (13, 84, 84, 3), np.uint8)
    expected = np.concatenate([backbone.apply(variables, photo[None]) for photo in photos])
    found = inputs.features_of(backbone, variables, photos)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32, of 0 to 2
    np.testing.assert_array_equal(found[3:8], inputs.features_of(backbone, variables, photos[3:8]))  # to the last bit


SHARDED = """
import jax, numpy as np
from mlfsic_jax.bench import made_up
from mlfsic_jax.run import inputs
from mlfsic_jax.system import parallel

photos = np.random.default_rng(0).integers(0, 255, (70, 16, 16, 3), np.uint8)
backbone = made_up.photo_backbone("conv4")
variables = parallel.replicate(made_up.random_variables(backbone, photos))
expected = inputs.features_of(backbone, parallel.replicate_here(variables), photos)
jax.default_backend = lambda: "gpu"  # where every device gets its part of large batches
assert inputs.batch_size(backbone, 16) == 64 and len(parallel.devices_here()) == 2
there = parallel.replicate_here(variables)
assert len(inputs.features_here(backbone, there, "float16", photos[:64]).sharding.device_set) == 2
np.testing.assert_allclose(inputs.features_of(backbone, there, photos), expected, atol=1e-6)
print("the same")
"""


def test_devices_share_large_batches():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run([sys.executable, "-c", SHARDED], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True)
    assert done.stdout == b"the same\n", done.stderr.decode()[-2000:]


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
