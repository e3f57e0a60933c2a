"""The sentence encoder against a BERT written out in NumPy, and against transformers."""

import json
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy.special import erf

from mlfsic_jax.data.encoders import encode_labels
from mlfsic_jax.data.minilm import _encode, _read_params, encode_texts, unread_texts
from mlfsic_jax.data.voc import DISPLAY_NAMES, LABEL_NAMES
from mlfsic_jax.data.words import load_word_vectors
from mlfsic_jax.label_embeddings import main
from mlfsic_jax.system.errors import InputError

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "dog", "hot", "##dog", "##s", "cat", ":")
N_LAYERS, HIDDEN, INNER, POSITIONS = 2, 64, 96, 40
# Texts and their word pieces.
TEXTS = {
    "a photo of a Hotdog": "a photo of a hot ##dog",
    "dogs": "dog ##s",
    "A cat: a hot dog, of cats; a photo of a dog of a cat": (
        "a cat : a hot dog [UNK] of cat ##s [UNK] a photo of a dog of a cat"
    ),
    "zebra": "[UNK]",
}


def linear(rng, *shape):
    return {"weight": rng.normal(0, 0.2, shape), "bias": rng.normal(0, 0.2, shape[0])}


def norm(rng):
    return {"weight": rng.normal(1, 0.2, HIDDEN), "bias": rng.normal(0, 0.2, HIDDEN)}


def tensors_of_bert():
    rng = np.random.default_rng(0)
    modules = {"embeddings.LayerNorm": norm(rng)}
    for name, n in {"word": len(PIECES), "position": POSITIONS, "token_type": 2}.items():
        modules[f"embeddings.{name}_embeddings"] = {"weight": rng.normal(0, 1, (n, HIDDEN))}
    for i in range(N_LAYERS):
        square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        layer = {name: linear(rng, HIDDEN, HIDDEN) for name in square}
        layer |= {"intermediate.dense": linear(rng, INNER, HIDDEN), "output.dense": linear(rng, HIDDEN, INNER)}
        layer |= {name: norm(rng) for name in ("attention.output.LayerNorm", "output.LayerNorm")}
        modules |= {f"encoder.layer.{i}.{name}": module for name, module in layer.items()}
    # The published file has these two as well, which the mean over tokens does not need.
    modules["pooler.dense"] = linear(rng, HIDDEN, HIDDEN)
    tensors = {f"{name}.{leaf}": a.astype(np.float32) for name, module in modules.items() for leaf, a in module.items()}
    return tensors | {"embeddings.position_ids": np.arange(POSITIONS)[None]}


def tokenizer_json():
    special = [{"id": i, "content": PIECES[i], "special": True, "normalized": False} for i in range(5)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    model = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    normalizer = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    fixed = {"strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None}
    return {
        "version": "1.0",
        # As published, shorter than what the model is used for, and to be replaced.
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": fixed | {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [token | flags for token in special],
        "normalizer": {"type": "BertNormalizer", **normalizer},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {"type": "WordPiece", **model, "vocab": {piece: i for i, piece in enumerate(PIECES)}},
    }


def write_model(folder, tensors):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a BERT with 2 layers of width 64."""
    return write_model(tmp_path_factory.mktemp("minilm") / "model", tensors_of_bert())


@pytest.fixture
def copied(bert, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(bert, tmp_path / "copied")


def by_hand(pieces, n_heads=HIDDEN // 32):
    """The vector of one text, given as word pieces, in float64 and head by head."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors_of_bert().items()}

    def dense(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def normalised(name, x):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    ids = [PIECES.index(piece) for piece in ("[CLS]", *pieces.split(), "[SEP]")]
    table = {name: tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = table["word"][ids] + table["position"][: len(ids)] + table["token_type"][0]
    x = normalised("embeddings.LayerNorm", x)
    for i in range(N_LAYERS):
        at = f"encoder.layer.{i}"
        query, key, value = (dense(f"{at}.attention.self.{name}", x) for name in ("query", "key", "value"))
        heads = []
        for channels in np.split(np.arange(HIDDEN), n_heads):
            weights = np.exp(query[:, channels] @ key[:, channels].T / np.sqrt(len(channels)))
            heads.append(weights / weights.sum(1, keepdims=True) @ value[:, channels])
        x = normalised(
            f"{at}.attention.output.LayerNorm", x + dense(f"{at}.attention.output.dense", np.concatenate(heads, axis=1))
        )
        wide = dense(f"{at}.intermediate.dense", x)
        x = normalised(f"{at}.output.LayerNorm", x + dense(f"{at}.output.dense", wide * (1 + erf(wide / 2**0.5)) / 2))
    return x.mean(0) / np.linalg.norm(x.mean(0))


def test_vectors_are_those_of_a_bert_by_hand(bert):
    vectors = encode_texts(list(TEXTS), bert)
    assert vectors.shape == (len(TEXTS), HIDDEN) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(vectors, [by_hand(pieces) for pieces in TEXTS.values()], rtol=0, atol=2e-6)
    assert encode_texts([], str(bert)).shape == (0, HIDDEN)


def test_neither_padding_nor_the_batch_changes_a_vector(bert):
    texts = [*TEXTS, *(" ".join(["dog"] * n) for n in range(1, 17))]
    together = encode_texts(texts, bert)
    np.testing.assert_allclose(together, np.concatenate([encode_texts([t], bert) for t in texts]), rtol=0, atol=1e-6)
    np.testing.assert_allclose(together, encode_texts(texts, bert, batch_size=3), rtol=0, atol=1e-6)
    assert np.abs(together[:4] - together[4:8]).max() > 0.01


def test_a_long_text_is_cut(bert, copied):
    within = encode_texts(["dog " * (POSITIONS - 2)], bert)
    np.testing.assert_array_equal(encode_texts(["dog " * POSITIONS + "cat"], bert), within)
    np.testing.assert_allclose(within[0], by_hand("dog " * (POSITIONS - 2)), rtol=0, atol=2e-6)
    tensors = load_file(copied / "model.safetensors")
    tensors["embeddings.position_embeddings.weight"] = np.random.default_rng(1).normal(size=(300, HIDDEN)).astype("f4")
    save_file(tensors, copied / "model.safetensors")
    cut = encode_texts(["dog " * 254, "dog " * 254 + "cat", "dog " * 253 + "cat"], copied)
    np.testing.assert_array_equal(cut[0], cut[1])
    assert np.abs(cut[0] - cut[2]).max() > 1e-4


@pytest.mark.parametrize("prefix", ["bert.", "0.auto_model."])
def test_keys_may_have_a_prefix(bert, tmp_path, prefix):
    tensors = {prefix + name: tensor for name, tensor in tensors_of_bert().items()}
    folder = write_model(tmp_path / "prefixed", tensors | {"cls.predictions.bias": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(encode_texts(list(TEXTS), folder), encode_texts(list(TEXTS), bert))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_only_how_tensors_are_stored(tmp_path, dtype):
    half = {name: t.astype(dtype) if t.dtype == np.float32 else t for name, t in tensors_of_bert().items()}
    whole = {name: t.astype(np.float32) if t.dtype == dtype else t for name, t in half.items()}
    folders = write_model(tmp_path / "half", half), write_model(tmp_path / "whole", whole)
    np.testing.assert_array_equal(*(encode_texts(list(TEXTS), folder) for folder in folders))


CONFIG = {"model_type": "bert", "hidden_act": "gelu", "num_hidden_layers": N_LAYERS, "num_attention_heads": 8}


def test_the_config_gives_the_number_of_heads(copied):
    (copied / "config.json").write_text(json.dumps(CONFIG))
    expected = [by_hand(pieces, n_heads=8) for pieces in TEXTS.values()]
    np.testing.assert_allclose(encode_texts(list(TEXTS), copied), expected, rtol=0, atol=2e-6)
    assert np.abs(expected[0] - by_hand(next(iter(TEXTS.values())))).max() > 0.01


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": 7}, "config.json must have num_attention_heads, a divisor of 64"),
        ({"num_attention_heads": True}, "config.json must have num_attention_heads"),
        ({"num_hidden_layers": 3}, "config.json: num_hidden_layers is 3, but must be 2: get it with"),
        ({"model_type": "roberta"}, "config.json: model_type is 'roberta', but must be bert"),
        ({"hidden_act": "relu"}, "config.json: hidden_act is 'relu', but must be gelu"),
        (None, "config.json is damaged (.*): delete it, or get it with"),
    ],
)
def test_a_config_of_another_network_is_told(copied, config, message):
    (copied / "config.json").write_text(json.dumps(CONFIG | config) if config else "{")
    refused(copied, message)


def refused(folder, message, texts=("dog",)):
    with pytest.raises(InputError, match=message.replace("(.*)", r"\(.*\)")) as caught:
        encode_texts(texts, folder)
    assert "\n" not in str(caught.value)


QUERY, WORDS = "encoder.layer.1.attention.self.query.bias", "embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({QUERY: None}, f"model.safetensors is not of a BERT: it has no tensor {QUERY}: get it with"),
        ({WORDS: None}, f"it has no tensor {WORDS}"),
        ({QUERY: np.zeros(1, np.float32)}, r"self.query.bias is F32 \[1\]"),
        ({QUERY: np.zeros((HIDDEN, 1), np.float32)}, r"self.query.bias is F32 \[64, 1\]"),
        ({QUERY: np.zeros(HIDDEN, np.int32)}, r"self.query.bias is I32 \[64\]"),
        ({"embeddings.token_type_embeddings.weight": np.zeros((1, HIDDEN), np.float32)}, r"type_.* is F32 \[1, 64\]"),
        ({QUERY: np.full(HIDDEN, np.nan, np.float32)}, "model.safetensors is damaged .it gives NaN or infinity"),
        ({WORDS: np.zeros((len(PIECES) - 1, HIDDEN), np.float32)}, "tokenizer.json does not fit model.safetensors"),
        ({"embeddings.position_embeddings.weight": np.zeros((2, HIDDEN), np.float32)}, "does not fit model.safetens"),
    ],
)
def test_a_tensor_that_is_missing_or_does_not_fit_is_named(copied, change, message):
    tensors = load_file(copied / "model.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, copied / "model.safetensors")
    refused(copied, message)


def test_no_other_layer_may_be_missing(copied):
    tensors = load_file(copied / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("encoder.layer.")}, copied / "model.safetensors")
    refused(copied, "it has no tensor encoder.layer.0.attention.self.query.weight")


def test_missing_and_damaged_files_are_one_line(copied, tmp_path):
    refused("data/minilm", "folder data/minilm of the text encoder has no model.safetensors: get it with python -m "
            "mlfsic_jax.fetch minilm, or name another folder")  # fmt: skip
    refused(tmp_path / "minilm", f"python -m mlfsic_jax.fetch minilm --data_dir={tmp_path}, or")
    with pytest.raises(InputError, match="of the text encoder has no model.safetensors: get it with"):
        unread_texts(["dog"], tmp_path / "minilm")
    whole = (copied / "model.safetensors").read_bytes()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", whole[:100], whole[:-4]):
        (copied / "model.safetensors").write_bytes(content)
        refused(copied, "model.safetensors is cut short or damaged (.*): delete it and get it with")
    (copied / "model.safetensors").write_bytes(whole)
    for change in ("{", "[]", {"model": {}}, {"model": tokenizer_json()["model"] | {"vocab": {"dog": 0}}}):
        text = change if isinstance(change, str) else json.dumps(tokenizer_json() | {"added_tokens": []} | change)
        (copied / "tokenizer.json").write_text(text)
        refused(copied, "tokenizer.json is damaged (.*): delete it and get it with")
    (copied / "tokenizer.json").unlink()
    refused(copied, "copied of the text encoder has no tokenizer.json: get it")


def test_a_text_without_words_is_named(bert):
    for text in ("", " \n", "\x00", "\u200b"):
        with pytest.raises(InputError, match="^the text '.*' has no words: give some$"):
            encode_texts(["dog", text], bert)
    for text in (None, 3, "\ud800"):
        with pytest.raises(InputError, match=r"^the text .* cannot be encoded \(.*\): give another$"):
            encode_texts(["dog", text], bert)
    with pytest.raises(InputError, match="^encode_texts takes a list of texts: give \\['a dog'\\]$"):
        encode_texts("a dog", bert)


def test_the_command_needs_no_pytorch(bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    out = tmp_path / "voc-minilm.npz"
    main(["--encoder=minilm", "--labels=voc", f"--out={out}", f"--model={bert}"])
    displays = [DISPLAY_NAMES.get(name, name) for name in LABEL_NAMES]
    vectors = load_word_vectors(out, LABEL_NAMES, displays)
    expected = encode_texts([f"a photo of a {display}" for display in displays], bert)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)
    assert f"wrote {out}: 20 labels, 64 numbers each, minilm" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="data/minilm .* no model.safetensors: get it with .*mlfsic_jax.fetch minilm"):
        main(["--encoder=minilm", "--labels=voc", f"--out={out}"])
    with pytest.raises(SystemExit, match="encoder minilm takes no --weights"):
        main(["--encoder=minilm", "--labels=voc", f"--out={out}", "--weights=a.pt"])


@pytest.mark.extras
@pytest.mark.parametrize("n_layers, hidden, n_heads", [(2, 64, 2), (1, 96, 3)])
def test_vectors_are_those_of_transformers(tmp_path, n_layers, hidden, n_heads):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=len(PIECES),
        hidden_size=hidden,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=80,
        max_position_embeddings=24,
        layer_norm_eps=1e-12,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    network = transformers.BertModel(config).eval()
    network.save_pretrained(tmp_path)
    tokenizer = transformers.BertTokenizer({piece: i for i, piece in enumerate(PIECES)})
    tokenizer.save_pretrained(tmp_path)
    texts = [*TEXTS, *(" ".join(["hotdog cat"] * n) for n in range(1, 10))]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        hidden = network(**batch).last_hidden_state.double().numpy()
    real = batch["attention_mask"].numpy()[..., None]
    mean = (hidden * real).sum(1) / real.sum(1)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(encode_texts(texts, tmp_path), expected, rtol=0, atol=1e-5)
    (tmp_path / "config.json").unlink()  # 32 channels a head, as without it
    np.testing.assert_allclose(encode_texts(texts, tmp_path), expected, rtol=0, atol=1e-5)
    labels = encode_labels("minilm", ["dog"], model=str(tmp_path))
    np.testing.assert_allclose(labels, encode_texts(["a photo of a dog"], tmp_path), rtol=0, atol=1e-6)


def test_the_published_model_gives_its_known_vectors(shared):
    folder, golden = shared / "data" / "minilm", shared / "ready" / "golden.npz"
    if not (folder.is_dir() and golden.is_file()):
        pytest.skip(f"no {folder} (python -m mlfsic_jax.fetch minilm --data_dir={folder.parent}), or no {golden}")
    with np.load(golden) as arrays:
        vectors = encode_texts([f"a photo of a {label}" for label in arrays["labels"]], folder)
        np.testing.assert_allclose(vectors, arrays["label_photo"], rtol=0, atol=1e-6)


def test_products_of_matrices_are_not_rounded(bert):
    params, n_layers = _read_params(bert / "model.safetensors")
    ids, lengths = np.ones((2, 16), np.int32), np.full(2, 16, np.int32)
    program = str(jax.make_jaxpr(_encode, static_argnums=(3, 4))(params, ids, lengths, n_layers, 2))
    assert program.count("dot_general[") == program.count("(Precision.HIGHEST, Precision.HIGHEST)") == 8 * N_LAYERS
