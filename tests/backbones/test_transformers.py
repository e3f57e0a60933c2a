"""Backbones against the `transformers` library's implementations, with the same random weights.

The error is the largest absolute difference relative to the largest value of the map, about 1e-6 in float32; 1e-4
leaves room for other CPUs. Exact GELU in place of its approximation, or another epsilon in the layer norms of these
inputs, show as 1e-3 and more.
"""

import functools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from mlfsic_jax.backbones import ClipVisionTransformer, ResNet, VisionTransformer, create_backbone
from mlfsic_jax.backbones.weights import to_variables
from mlfsic_jax.system.errors import InputError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.extras

TOLERANCE = 1e-4
TINY = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3, "image_size": 32}
VIT_NAMES = (
    (r"^embeddings\.cls_token$", "class_token"),
    (r"^embeddings\.position_embeddings$", "encoder.pos_embedding"),
    (r"^embeddings\.patch_embeddings\.projection\.", "conv_proj."),
    (r"^layers\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.attention\.o_proj\.", ".self_attention.out_proj."),
    (r"\.attention\.in_proj", ".self_attention.in_proj"),
    (r"\.layernorm_before\.", ".ln_1."),
    (r"\.layernorm_after\.", ".ln_2."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^layernorm\.", "encoder.ln."),
)
CLIP_NAMES = (
    (r"^embeddings\.class_embedding$", "class_embedding"),
    (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^embeddings\.patch_embedding\.", "conv1."),
    (r"^pre_layrnorm\.", "ln_pre."),
    (r"^post_layernorm\.", "ln_post."),
    (r"^encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^", "visual."),
)
RESNET_NAMES = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.", lambda found: f"layer{int(found[1]) + 1}."),
    (r"\.layer\.(\d)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}."),
    (r"\.layer\.(\d)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)


def renamed(state, names):
    """A state dict of `transformers` under the names of the weights' usual source."""
    state = dict(state)
    for key in [key for key in state if ".q_proj." in key]:
        parts = [state.pop(key.replace(".q_proj.", f".{which}_proj.")) for which in "qkv"]
        state[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    for pattern, name in names:
        state = {re.sub(pattern, name, key): tensor for key, tensor in state.items()}
    return state


def randomise(model, seed=0):
    """Weights that keep the size of what they multiply, and no vector of zeros or ones: any mix-up shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(1, 2, generator=generator)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim >= 2 and name.endswith("weight") and "position" not in name:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
            else:
                tensor.normal_(0, 0.5, generator=generator)
    return model.eval()


def variables_of(model, module, names, size):
    return to_variables({key: value.numpy() for key, value in renamed(model.state_dict(), names).items()}, module, size)


def random_images(*shape):
    return np.random.default_rng(0).standard_normal((*shape, 3)).astype(np.float32)


def pixels(images):
    return {"pixel_values": torch.from_numpy(images.transpose(0, 3, 1, 2))}


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() < TOLERANCE * np.abs(expected).max()


def tiny_vit(**options):
    config = transformers.ViTConfig(**TINY, patch_size=8, layer_norm_eps=1e-6, **options)
    module = VisionTransformer(patch=8, image_size=32, n_layers=2, n_heads=3, width=24)
    return randomise(transformers.ViTModel(config, add_pooling_layer=False)), module


def tiny_clip():
    module = ClipVisionTransformer(patch=8, image_size=32, n_layers=2, n_heads=3, width=24)
    return randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY, patch_size=8))), module


@torch.no_grad()
def vit_tokens(model, images):
    return model(**pixels(images)).last_hidden_state


@torch.no_grad()
def clip_tokens(model, images):
    return model.post_layernorm(model(**pixels(images)).last_hidden_state)


@pytest.mark.parametrize(
    ("make", "names", "tokens"),
    [(tiny_vit, VIT_NAMES, vit_tokens), (tiny_clip, CLIP_NAMES, clip_tokens)],
    ids=["vit", "clip"],
)
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # so small a variance tells which epsilon is added to it
def test_tiny_transformers_agree(make, names, tokens, scale):
    (model, module), images = make(), scale * random_images(2, 32, 32)
    if scale < 1:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.startswith("embeddings."):
                    tensor.mul_(scale)
    expected = tokens(model, images)[:, 1:].reshape(2, 4, 4, 24).numpy()
    actual = module.apply(variables_of(model, module, names, 32), images)
    assert_close(actual, expected)


def test_the_two_activations_differ_enough_to_be_told_apart():
    images = random_images(2, 32, 32)
    exact = vit_tokens(tiny_vit()[0], images)
    quick = vit_tokens(tiny_vit(hidden_act="quick_gelu")[0], images)
    assert (exact - quick).abs().max() > 10 * TOLERANCE * exact.abs().max()


def test_tiny_resnet_agrees():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[32, 64, 128], depths=[1, 2, 3])
    model, module = randomise(transformers.ResNetModel(config)), ResNet(stage_sizes=(1, 2, 3), width=8)
    images = random_images(2, 51, 70)
    with torch.no_grad():
        expected = model(**pixels(images)).last_hidden_state.numpy().transpose(0, 2, 3, 1)
    assert_close(jax.jit(module.apply)(variables_of(model, module, RESNET_NAMES, 64), images), expected)


VIT = functools.partial(transformers.ViTModel, add_pooling_layer=False)


@pytest.mark.parametrize(
    ("name", "make", "names", "n_parameters"),
    [
        ("vit_b_16", lambda: VIT(transformers.ViTConfig()), VIT_NAMES, 86_567_656 - 769_000),
        ("vit_b_32", lambda: VIT(transformers.ViTConfig(patch_size=32)), VIT_NAMES, 88_224_232 - 769_000),
        (
            "clip_vit_b_32",
            lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig()),
            CLIP_NAMES,
            87_849_216 - 768 * 512,
        ),
        (
            "resnet101",
            lambda: transformers.ResNetModel(transformers.ResNetConfig(depths=[3, 4, 23, 3])),
            RESNET_NAMES,
            44_549_160 - 2_049_000,
        ),
    ],
)
def test_full_backbones_have_the_published_keys_shapes_and_number_of_parameters(name, make, names, n_parameters):
    with torch.device("meta"):
        state = renamed(make().state_dict(), names)
    expected = {key: tuple(tensor.shape) for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    module = create_backbone(name)
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == n_parameters

    leaf_names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    found = {}
    for (_, *path, leaf), value in traverse_util.flatten_dict(variables).items():
        path = [part.replace("__", "~").replace("_", ".").replace("~", "_") for part in path]
        key = getattr(module, "key_prefix", "") + ".".join([*path, leaf_names.get(leaf, leaf)])
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}[value.ndim] if leaf == "kernel" else range(value.ndim)
        found[key] = tuple(value.shape[axis] for axis in axes)
    assert found == expected


def test_heads_are_ignored_by_name_and_former_names_are_known():
    model, module = tiny_vit()
    state = {key: tensor.numpy() for key, tensor in renamed(model.state_dict(), VIT_NAMES).items()}
    expected = to_variables(state, module, 32)
    state |= {"heads.head.weight": np.ones((10, 24), np.float32), "heads.head.bias": np.ones(10, np.float32)}
    older = {re.sub(r"\.mlp\.0\.", ".mlp.linear_1.", key): array for key, array in state.items()}
    older = {re.sub(r"\.mlp\.3\.", ".mlp.linear_2.", key): array for key, array in older.items()}
    assert older.keys() != state.keys()
    jax.tree.map(np.testing.assert_array_equal, to_variables(older, module, 32), expected)
    with pytest.raises(InputError, match=r"unexpected: visual\.proj\."):
        to_variables(state | {"visual.proj": np.ones((24, 4), np.float32)}, module, 32)

    model, module = tiny_clip()
    state = {key: tensor.numpy() for key, tensor in renamed(model.state_dict(), CLIP_NAMES).items()}
    text = {
        "transformer.resblocks.0.ln_1.bias": np.ones(2),
        "logit_scale": np.ones(()),
        "visual.proj": np.ones((24, 4)),
    }
    to_variables(state | text, module, 32)
    with pytest.raises(InputError, match=r"unexpected: heads\.head\.bias\."):
        to_variables(state | {"heads.head.bias": np.ones(10, np.float32)}, module, 32)


def test_mistakes_are_one_short_line():
    model, module = tiny_vit()
    state = {key: tensor.numpy() for key, tensor in renamed(model.state_dict(), VIT_NAMES).items()}
    del state["class_token"]
    state["encoder.layers.encoder_layer_0.mlp.0.weight"] = np.ones((24, 96), np.float32)
    with pytest.raises(InputError) as caught:
        to_variables(state, module, 32, source="vit.pth")
    assert str(caught.value) == (
        "vit.pth does not fit the backbone VisionTransformer; missing: class_token; wrong shape: "
        "encoder.layers.encoder_layer_0.mlp.0.weight is [24, 96], not [96, 24]. "
        "Give intact weights of this architecture under its published key names."
    )
    with pytest.raises(InputError, match=r"missing: visual.class_embedding, .* and \d+ more; unexpected: .* more\."):
        to_variables(state, tiny_clip()[1], 32)


@pytest.mark.parametrize("name", ["vit_b_16", "clip_vit_b_32"])
def test_another_image_size_is_refused(name):
    with pytest.raises(
        InputError, match=r"takes images of 224x224 pixels.*got 256x256: set config.data.image_size = 224"
    ):
        to_variables({}, create_backbone(name), 256)
