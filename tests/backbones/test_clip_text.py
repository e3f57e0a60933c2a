"""CLIP's text encoder and the pooling of its images: against NumPy, and against transformers with the same weights.

Vectors have length 1; float32 in another order of sums differs by about 1e-6 after a few layers, GELU in place of its
quick approximation or a missing mask by 1e-2 and more. So 1e-5.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlfsic_jax.backbones import BACKBONES, ClipResNet, ClipVisionTransformer, clip_text
from mlfsic_jax.backbones.weights import load_pooling, load_text_encoder, save_weights, to_variables
from mlfsic_jax.core import clip
from mlfsic_jax.system.errors import InputError
from tests.test_whole_program import random_variables

LETTERS = "abcdefghijklmnopqrstuvwxyz"
MERGES = ("p h", "ph o", "pho t", "phot o</w>", "o f</w>", "d o", "do g</w>")
PIECES = (*LETTERS, *(f"{c}</w>" for c in LETTERS), *(m.replace(" ", "") for m in MERGES))
PIECES = (*PIECES, "<|startoftext|>", "<|endoftext|>")
CONTEXT, WIDTH, JOINT, LAYERS = 12, 128, 6, 2  # two heads
PHOTO_OF_DOG = ("a</w>", "photo</w>", "of</w>", "a</w>", "dog</w>")
TOLERANCE = 1e-5


def text_tensors(seed=0):
    """A text encoder under OpenAI's names, beside an image encoder and a number, as in its files."""
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=0.3, mean=0.0):
        return rng.normal(mean, scale, shape).astype(np.float32)

    state = {"token_embedding.weight": draw(len(PIECES), WIDTH), "positional_embedding": draw(CONTEXT, WIDTH)}
    for i in range(LAYERS):
        sizes = {"attn.in_proj_": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)}
        for name, (out, into) in sizes.items():
            at = f"transformer.resblocks.{i}.{name}"
            state |= {f"{at}weight": draw(out * WIDTH, into * WIDTH, scale=0.1), f"{at}bias": draw(out * WIDTH)}
    for name in ("ln_final", *(f"transformer.resblocks.{i}.ln_{j}" for i in range(LAYERS) for j in (1, 2))):
        state |= {f"{name}.weight": draw(WIDTH, mean=1.0), f"{name}.bias": draw(WIDTH)}
    return state | {
        "text_projection": draw(WIDTH, JOINT),
        "logit_scale": np.array(4.6, np.float32),
        "visual.proj": draw(4, JOINT),
    }


def tokenizer_json():
    """In the form of the published one, whose padding and truncation are not used."""
    space = {"type": "Split", "pattern": {"Regex": "[a-z]+|[^\\sa-z]+"}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = [
        {"id": len(PIECES) - 2 + i, "content": PIECES[i - 2], "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": True, "special": True}
        for i in range(2)
    ]
    model = {"type": "BPE", "unk_token": "<|endoftext|>", "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    return {
        "version": "1.0",
        "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [space, byte_level]},
        "post_processor": None,
        "model": model | {"vocab": {p: i for i, p in enumerate(PIECES)}, "merges": list(MERGES)},
    }


def write_files(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "clip.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return clip_text.TextFiles(folder / "clip.safetensors", folder / "tokenizer.json")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("clip"), text_tensors())


@pytest.fixture
def copied(files, tmp_path):
    return clip_text.TextFiles(*(shutil.copy(path, tmp_path / path.name) for path in files))


def normalised(state, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def by_hand(pieces):
    """The vector of one text in float64, token by token and head by head: each token is mixed from those up to it."""
    state = {name: tensor.astype(np.float64) for name, tensor in text_tensors().items()}
    ids = [PIECES.index(piece) for piece in ("<|startoftext|>", *pieces, "<|endoftext|>")]
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][: len(ids)]
    for i in range(LAYERS):
        at = f"transformer.resblocks.{i}."
        packed = normalised(state, f"{at}ln_1", x) @ state[f"{at}attn.in_proj_weight"].T
        query, key, value = np.split(packed + state[f"{at}attn.in_proj_bias"], 3, axis=1)
        mixed = np.zeros_like(x)
        for t in range(len(ids)):
            for head in np.split(np.arange(WIDTH), WIDTH // 64):
                weights = softmax(key[: t + 1, head] @ query[t, head] / 8)
                mixed[t, head] = weights @ value[: t + 1, head]
        x = x + mixed @ state[f"{at}attn.out_proj.weight"].T + state[f"{at}attn.out_proj.bias"]
        wide = normalised(state, f"{at}ln_2", x) @ state[f"{at}mlp.c_fc.weight"].T + state[f"{at}mlp.c_fc.bias"]
        wide = wide / (1 + np.exp(-1.702 * wide))
        x = x + wide @ state[f"{at}mlp.c_proj.weight"].T + state[f"{at}mlp.c_proj.bias"]
    vector = normalised(state, "ln_final", x)[-1] @ state["text_projection"]
    return vector / np.linalg.norm(vector)


def test_vectors_are_those_of_clip_by_hand(files):
    # "do" joins inside of a word, not at its end.
    texts = {"a photo of a Dog": PHOTO_OF_DOG, "dog": ("dog</w>",), "do  OF": ("d", "o</w>", "of</w>")}
    vectors = clip_text.encode_texts(list(texts), files)
    assert vectors.dtype == np.float32 and vectors.shape == (3, JOINT)
    expected = [by_hand(pieces) for pieces in texts.values()]
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=TOLERANCE)


def test_neither_padding_nor_company_changes_a_vector_and_a_long_text_is_cut(files):
    texts = [*(" ".join(["dog"] * n) for n in range(1, 11)), "dog " * 11 + "a"]
    together = clip_text.encode_texts(texts, files)
    alone = np.concatenate([clip_text.encode_texts([text], files) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(together[9], together[10])
    np.testing.assert_allclose(together[9], by_hand(["dog</w>"] * 10), rtol=0, atol=TOLERANCE)


def refused(files, message, text="dog"):
    with pytest.raises(InputError, match=message) as caught:
        clip_text.encode_texts([text], files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text_projection": None},
            r"holds no text encoder of CLIP: .*text_projection is missing; give OpenAI's RN50.pt",
        ),
        ({"positional_embedding": np.zeros(3, np.float32)}, r"no text encoder of CLIP: .*al_embedding is \[3\]"),
        ({"token_embedding.weight": np.zeros((60, 200), np.float32)}, r"no text encoder of CLIP: .* is \[60, 200\]"),
        ({"ln_final.bias": None}, "clip.safetensors does not fit .*ClipText; missing: ln_final.bias"),
        ({"text_projection": np.zeros((4, 4), np.float32)}, r"text_projection is \[4, 4\], not \[128, 4\]"),
        ({"ln_final.bias": np.full(WIDTH, np.nan, np.float32)}, "unusable: ln_final.bias holds NaN"),
        ({"extra": np.zeros(3, np.float32)}, "unexpected: extra"),
        (
            {"token_embedding.weight": np.zeros((60, WIDTH), np.float32)},
            "tokenizer.json does not fit .*clip.safetensors",
        ),
    ],
)
def test_a_tensor_that_is_missing_or_does_not_fit_is_named(copied, change, message):
    tensors = text_tensors() | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, copied.weights)
    refused(copied, message)


def test_tokenizers_and_texts_that_cannot_be_used(copied, tmp_path):
    for text in ("", " \n"):
        refused(copied, "^the text '.*' has no words: give some$", text)
    for content in ("{", json.dumps(tokenizer_json() | {"added_tokens": [], "model": {"type": "BPE"}})):
        copied.tokenizer.write_text(content)
        refused(
            copied, r"tokenizer.json is damaged \(.*\): delete it and get it with python -m mlfsic_jax.fetch clip_tok"
        )
    copied.tokenizer.unlink()
    parent = tmp_path.parent
    refused(copied, f"^no tokenizer {copied.tokenizer} for CLIP's texts: .*fetch clip_tokenizer --data_dir={parent}$")


def test_the_text_encoder_alone_is_saved_under_its_names(files, tmp_path):
    module, variables = load_text_encoder(files.weights)
    save_weights(tmp_path / "text.safetensors", variables, module)
    alone = clip_text.TextFiles(tmp_path / "text.safetensors", files.tokenizer)
    expected = clip_text.encode_texts(["a dog"], files)
    np.testing.assert_array_equal(clip_text.encode_texts(["a dog"], alone), expected)


def attention_pooling(n, n_tokens, seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"positional_embedding": (n_tokens, n), "c_proj.weight": (JOINT, n), "c_proj.bias": (JOINT,)}
    shapes |= {f"{name}_proj.{leaf}": (n,) * (1 + (leaf == "weight")) for name in "qkv" for leaf in ("weight", "bias")}
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("n", [32, 128])
def test_attention_pooling_by_hand(n):
    params, features = attention_pooling(n, 5), np.random.default_rng(2).normal(size=(3, 4, n)).astype(np.float32)
    w = {name: array.astype(np.float64) for name, array in params.items()}
    for image, pooled in zip(features.astype(np.float64), clip.pool(params, features), strict=True):
        tokens = np.vstack([image.mean(axis=0), image]) + w["positional_embedding"]
        query = tokens[0] @ w["q_proj.weight"].T + w["q_proj.bias"]
        key, value = (tokens @ w[f"{name}_proj.weight"].T + w[f"{name}_proj.bias"] for name in "kv")
        mixed = np.zeros(n)
        for head in np.split(np.arange(n), max(1, n // 64)):
            mixed[head] = softmax(key[:, head] @ query[head] / np.sqrt(len(head))) @ value[:, head]
        expected = mixed @ w["c_proj.weight"].T + w["c_proj.bias"]
        np.testing.assert_allclose(pooled, expected / np.linalg.norm(expected), rtol=0, atol=TOLERANCE)


def test_the_class_token_comes_first_and_the_patches_stay():
    sizes = {"patch": 8, "image_size": 16, "n_layers": 1, "n_heads": 2, "width": 8}
    module = ClipVisionTransformer(**sizes)
    variables, photos = random_variables(module, 16), np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    tokens = module.clone(all_tokens=True).apply(variables, photos)
    assert tokens.shape == (2, 1, 5, 8)
    np.testing.assert_array_equal(tokens[:, 0, 1:].reshape(2, 2, 2, 8), module.apply(variables, photos))
    proj = np.random.default_rng(1).normal(size=(8, JOINT))
    expected = tokens[:, 0, 0] @ proj
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(clip.pool({"proj": proj}, tokens[:, 0]), expected, rtol=0, atol=1e-6)


def small(monkeypatch, name, make):
    spec = dataclasses.replace(BACKBONES[name], create=lambda axis_name=None: make(), image_size=64)
    monkeypatch.setitem(BACKBONES, name, spec)


def test_pooling_is_read_and_what_does_not_fit_is_named(monkeypatch, tmp_path):
    small(monkeypatch, "clip_resnet50", lambda: ClipResNet((1, 1, 1), width=2))  # 64 pixels give 4 x 4 x 32
    path, params = tmp_path / "clip.safetensors", attention_pooling(32, 17)

    def load(size=64, **changes):
        state = {f"visual.attnpool.{name}": array for name, array in (params | changes).items()}
        save_file(state, path)
        return load_pooling(path, "clip_resnet50", size)

    found = load()
    assert found.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(found[name], array)
    wrong = {"c_proj.bias": np.zeros(JOINT + 1, np.float32)}
    message = (
        r"pooling of clip_resnet50: visual.attnpool.c_proj.bias is float32 \[7\], not float \[6\]; get it with: .*50$"
    )
    with pytest.raises(InputError, match=message):
        load(**wrong)
    with pytest.raises(
        InputError, match=r"positional_embedding is .* \[17, 32\], not float \[65, 32\]; set config.data.i"
    ):
        load(128)


@pytest.mark.extras
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_texts_and_images_are_those_of_transformers(tmp_path, monkeypatch, act):
    """The other activation shows that the tolerance can tell."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tests.backbones.test_transformers import CLIP_NAMES, randomise, renamed

    start, end = len(PIECES) - 2, len(PIECES) - 1
    layers = {"num_hidden_layers": 2, "hidden_act": act, "projection_dim": JOINT}
    text = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH, "vocab_size": len(PIECES)}
    text |= {"max_position_embeddings": CONTEXT, "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text | layers, vision_config=vision | layers, projection_dim=JOINT)
    model = randomise(transformers.CLIPModel(config))
    state = {key.removeprefix("vision_model."): t for key, t in model.state_dict().items() if "vision_model" in key}
    state = renamed(state, CLIP_NAMES) | {"visual.proj": model.visual_projection.weight.T}
    texts = {
        key.removeprefix("text_model."): t for key, t in model.state_dict().items() if key.startswith("text_model")
    }
    text_names = [(r"^embeddings\.token_embedding\.", "token_embedding."), (r"^final_layer_norm\.", "ln_final.")]
    texts = renamed(texts, [*text_names, *CLIP_NAMES[1:2], *CLIP_NAMES[5:-1]])
    state |= texts | {"text_projection": model.text_projection.weight.T}
    state = {key: tensor.detach().numpy().copy() for key, tensor in state.items() if "position_ids" not in key}
    files = write_files(tmp_path, state)

    tokens = torch.tensor([[start, *(PIECES.index(piece) for piece in PHOTO_OF_DOG), end]])
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
        found = model(input_ids=tokens, pixel_values=pixels)
    module = ClipVisionTransformer(patch=8, image_size=32, n_layers=2, n_heads=3, width=24, all_tokens=True)
    small(monkeypatch, "clip_vit_b_32_tokens", lambda: module)
    variables = to_variables(state, module, 32)
    pooled = clip.pool(load_pooling(files.weights, "clip_vit_b_32_tokens", 32), module.apply(variables, images)[:, 0])
    errors = [
        np.abs(clip_text.encode_texts(["a photo of a dog"], files) - found.text_embeds.numpy()).max(),
        np.abs(pooled - found.image_embeds.numpy()).max(),
    ]
    assert max(errors) < TOLERANCE if act == "quick_gelu" else min(errors) > 10 * TOLERANCE
