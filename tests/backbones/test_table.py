"""The table of backbones: names, maps, published files; several parts in one; training, also on several devices."""

import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mlfsic_jax.backbones import (
    BACKBONES,
    ClipResNet,
    ClipVisionTransformer,
    Conv4,
    EfficientNetLite,
    InceptionV3,
    Joined,
    MobileNetV2,
    ResNet,
    VisionTransformer,
    create_backbone,
    how_to_get,
    published_files,
)
from mlfsic_jax.backbones.inception import _BLOCKS, Mixed
from mlfsic_jax.backbones.weights import load_weights, save_weights, weights_files, weights_hash
from mlfsic_jax.system.errors import InputError

MAPS = {
    "conv4": (14, 14, 64),
    "resnet50": (7, 7, 2048),
    "resnet101": (7, 7, 2048),
    "mobilenet_v2": (7, 7, 1280),
    "inception_v3": (8, 8, 2048),
    "vit_b_16": (14, 14, 768),
    "vit_b_32": (7, 7, 768),
    "clip_resnet50": (7, 7, 2048),
    "clip_vit_b_32": (7, 7, 768),
    "clip_vit_b_32_tokens": (1, 50, 768),
    "resnet50_vit_b_16": (1, 1, 2048 + 768),
    "efficientnet_lite0": (7, 7, 1280),
    "efficientnet_lite1": (8, 8, 1280),
    "efficientnet_lite2": (9, 9, 1280),
    "efficientnet_lite3": (9, 9, 1280),
    "efficientnet_lite4": (10, 10, 1280),
    "efficientnet_lite0_lite2": (12, 12, 1280 + 1280),
}
# Published numbers of parameters, the classifier included.
PARAMETERS = {f"efficientnet_lite{i}": n for i, n in enumerate((4.652, 5.417, 6.092, 8.197, 13.007))}
TINY = {
    "conv4": Conv4(width=4),
    "resnet": ResNet((1,), width=4),
    "mobilenet": MobileNetV2(width=0.25, stages=((2, 32, 1, 2),), last_features=16),
    "clip_resnet": ClipResNet((1,), width=4),
    "efficientnet_lite": EfficientNetLite(stages=((1, 8, 1, 1, 3), (2, 8, 1, 2, 5)), last_features=16),
    "inception": Mixed(_BLOCKS["7b"], width=1 / 16),  # one block: the whole takes a minute to compile for training
    "vit": VisionTransformer(patch=16, image_size=32, n_layers=1, n_heads=2, width=8),
    "clip_vit": ClipVisionTransformer(patch=16, image_size=32, n_layers=1, n_heads=2, width=8),
}
WITHOUT_BATCH_NORM = ("vit", "clip_vit")


def random_images(batch, size=32):
    return np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)


def random_variables(module, images):
    """Drawn with NumPy: compiling the initialisers takes longer than all else here."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(1, 2, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.3, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


def batch_norm_axes(module, size):
    """The set of axis names of a module's batch norms, and the shapes of its variables and of its map."""
    axes = set()

    def note(call, arguments, options, context):
        if isinstance(context.module, nn.BatchNorm):
            axes.add(context.module.axis_name)
        return call(*arguments, **options)

    with nn.intercept_methods(note):
        images = jax.ShapeDtypeStruct((2, size, size, 3), np.float32)
        local, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    return axes, variables, local


def test_names():
    assert set(BACKBONES) == set(MAPS)
    for use in (create_backbone, published_files):
        with pytest.raises(InputError, match="'resnet5'.*clip_resnet50, clip_vit_b_32, .*, conv4, .*, vit_b_32"):
            use("resnet5")


@pytest.mark.parametrize("name", MAPS)
def test_map_at_the_published_size_and_axis_of_every_batch_norm(name):
    axes, variables, local = batch_norm_axes(create_backbone(name, axis_name="devices"), BACKBONES[name].image_size)
    assert (local.shape, local.dtype) == ((2, *MAPS[name]), np.float32)
    if "vit" in name and "resnet" not in name:
        assert (axes, set(variables)) == (set(), {"params"})
    else:
        assert (axes, set(variables)) == ({"devices"}, {"params", "batch_stats"})
    if name in PARAMETERS:
        n_parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) + 1000 * (1280 + 1)
        assert round(n_parameters / 1e6, 3) == PARAMETERS[name]


def test_batch_norms_are_not_synchronised_by_default():
    assert batch_norm_axes(create_backbone("conv4"), 64)[0] == {None}


@pytest.mark.parametrize("name", MAPS)
def test_published_files(name):
    files = published_files(name)
    assert len(files) == {"conv4": 0, "resnet50_vit_b_16": 2, "efficientnet_lite0_lite2": 2}.get(name, 1)
    for file in files:
        stem, _, prefix = file.url.rpartition("/")[2].removesuffix(".pth").rpartition("-")
        if "torch" in file.url:
            assert re.fullmatch("[0-9a-f]{8}", file.sha256) and prefix == file.sha256 and stem in file.url
        else:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256) and f"/{file.sha256}/" in file.url
        assert file.url in BACKBONES[name].pretrained
    assert (BACKBONES[name].pretrained is None) == (files == ())


def test_every_backbone_says_how_to_get_its_weights():
    assert how_to_get("mobilenet_v2") == "get it with: python -m mlfsic_jax.fetch mobilenet_v2"
    assert how_to_get("resnet50", "in").endswith("fetch resnet50 --data_dir=in")
    assert how_to_get("conv4").startswith("conv4 has no published weights")
    for name in MAPS:
        assert "\n" not in how_to_get(name) and all(file.megabytes > 0 for file in published_files(name))


def test_inception_takes_pixels_in_minus_one_to_one():
    spec = BACKBONES["inception_v3"]
    pixels = np.array([0.0, 1.0])[:, None]
    np.testing.assert_array_equal((pixels - spec.mean) / spec.std, [[-1] * 3, [1] * 3])


def test_efficientnet_lite_takes_pixels_less_127_over_128():
    spec = BACKBONES["efficientnet_lite2"]
    pixels = np.array([0, 127, 255])[:, None] / 255
    expected = np.array([[-127 / 128] * 3, [0] * 3, [1] * 3])
    np.testing.assert_allclose((pixels - spec.mean) / spec.std, expected, atol=1e-15)


def test_images_too_small_for_inception_are_refused():
    module = InceptionV3(width=1 / 16)
    with pytest.raises(InputError, match="at least 75x75 pixels, got 74x80: set config.data.image_size to 299"):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 74, 80, 3), np.float32))
    shape = jax.ShapeDtypeStruct((1, 75, 75, 3), np.float32)
    assert jax.eval_shape(module.init_with_output, jax.random.key(0), shape)[0].shape == (1, 1, 1, 128)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_a_gradient_in_training(name):
    module, images = TINY[name], random_images(3)
    noise = np.random.default_rng(2).standard_normal(1000).astype(np.float32)

    @jax.jit
    def gradient(variables):
        def loss(params):
            local, updates = module.apply(variables | {"params": params}, images, True, mutable=["batch_stats"])
            return (local.ravel() * jnp.resize(noise, local.size)).sum(), updates

        return jax.grad(loss, has_aux=True)(variables["params"])

    variables = random_variables(module, images)
    gradients, updates = gradient(variables)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        # A bias before a batch norm has none but rounding.
        if not (name == "conv4" and path[-1].key == "bias" and path[-2].key.endswith("_0")):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, path
    assert (updates == {}) == (name in WITHOUT_BATCH_NORM)
    if updates:
        moved = jax.tree.map(
            lambda new, old: np.abs(new - old).max() > 0, updates, {"batch_stats": variables["batch_stats"]}
        )
        assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ["conv4", "inception"])  # the others: see the axes above
def test_two_halves_synchronised_are_the_whole_batch(name):
    module, images = TINY[name], random_images(4)
    together = module.clone(axis_name="devices")
    variables = random_variables(module, images)

    def trained(module, images):
        return module.apply(variables, images, True, mutable=["batch_stats"])

    whole, whole_updates = jax.jit(lambda x: trained(module, x))(images)
    halves = images.reshape(2, 2, *images.shape[1:])
    synchronised, updates = jax.jit(jax.vmap(lambda x: trained(together, x), axis_name="devices"))(halves)
    apart, _ = jax.jit(jax.vmap(lambda x: trained(module, x)))(halves)

    # Sums of float32 in another order, magnified by a few batch norms: 1e-5; without synchronising it is 0.1 and more.
    scale = np.abs(whole).max()
    assert np.abs(synchronised.reshape(whole.shape) - whole).max() < 1e-4 * scale
    assert np.abs(apart.reshape(whole.shape) - whole).max() > 1e-2 * scale
    for half in range(2):
        of_half = jax.tree.map(lambda leaf, half=half: leaf[half], updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), of_half, whole_updates)


@pytest.mark.parametrize("name", [name for name in TINY if name != "inception"])
def test_what_is_saved_is_loaded(name, tmp_path):
    variables = random_variables(TINY[name], random_images(1))
    save_weights(tmp_path / "saved.safetensors", variables, TINY[name])
    jax.tree.map(np.testing.assert_array_equal, load_weights(tmp_path / "saved.safetensors", TINY[name], 32), variables)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.safetensors"]


def test_a_backbone_of_two_parts_takes_two_files(tmp_path):
    first, second = ResNet((1,), width=2), Conv4(width=3)
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    parts = [random_variables(part, random_images(1)) for part in (first, second)]
    for file, variables, part in zip(files, parts, (first, second), strict=True):
        save_weights(file, variables, part)
    module, images = Joined((first, second), pooled=True), random_images(2)

    variables = load_weights(f"{files[0]},{files[1]}", module, 32)
    expected = [np.asarray(p.apply(v, images)).mean((1, 2)) for p, v in zip((first, second), parts, strict=True)]
    actual = module.apply(variables, images)
    assert actual.shape == (2, 1, 1, 8 + 3)
    np.testing.assert_allclose(actual[:, 0, 0], np.concatenate(expected, axis=1), rtol=1e-5, atol=1e-6)

    same = Joined((second, second))
    maps = np.asarray(same.apply(load_weights(f"{files[1]},{files[1]}", same, 32), images))
    np.testing.assert_allclose(maps, np.tile(second.apply(parts[1], images), 2), rtol=1e-5, atol=1e-6)

    with pytest.raises(InputError, match=r"names 1 weights file.*ResNet \+ Conv4 takes 2.*comma"):
        load_weights(files[0], module, 32)
    with pytest.raises(InputError, match="names 2 weights file.*Conv4 takes 1"):
        load_weights(f"{files[0]},{files[1]}", second, 32)
    with pytest.raises(InputError, match=r"first\.safetensors does not fit the backbone Conv4"):
        load_weights(f"{files[0]},{files[0]}", module, 32)


def test_files_named_with_commas(tmp_path):
    for name in ("a.pth", "b.pth", "a,b.pth"):
        (tmp_path / name).write_bytes(name.encode())
    a, b = tmp_path / "a.pth", tmp_path / "b.pth"
    digests = [hashlib.sha256(path.name.encode()).hexdigest() for path in (a, b)]
    assert weights_files(f"{a}, {b}") == (a, b)
    assert weights_hash(f"{a},{b}") == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert weights_hash(f"{b},{a}") != weights_hash(f"{a},{b}")
    assert weights_hash(a) == digests[0]
    assert weights_files(tmp_path / "a,b.pth") == (tmp_path / "a,b.pth",)  # a file that is there
    with pytest.raises(InputError, match="cannot read the weights file .*absent.pth"):
        weights_hash(f"{a},{tmp_path / 'absent.pth'}")
