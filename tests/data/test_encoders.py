"""Text encoders against the same tiny networks run by hand, one text at a time and without a tokeniser."""

import copy
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from mlfsic_jax.data.encoders import ENCODERS, Mention, encode_labels, read_sentences
from mlfsic_jax.data.splits import label_split
from mlfsic_jax.data.voc import DISPLAY_NAMES, LABEL_NAMES
from mlfsic_jax.data.words import BENCHMARKS, load_word_vectors
from mlfsic_jax.label_embeddings import main, read_labels
from mlfsic_jax.system.errors import InputError

PIECES = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "and", "dog", "cat", "sat", "on", "near", "tv"),
    *("monitor", "means", ".", ",", "hot", "skate", "##board", "##s", "big", "-", "in"),
]
N_LAYERS = 5

# Padding and batches change the order of float32 sums over 16 numbers of size 1, nothing else.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a BERT of 5 layers of width 16, its word pieces, and the network itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(PIECES),
        hidden_size=16,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
        initializer_range=0.5,
    )
    network = transformers.BertModel(config).eval()
    network.save_pretrained(folder)
    transformers.BertTokenizer({piece: i for i, piece in enumerate(PIECES)}).save_pretrained(folder)
    return folder, network


def hidden_states(network, pieces):
    """All layers [N_LAYERS + 1, T, 16] of one text, given as its word pieces."""
    import torch

    ids = torch.tensor([[PIECES.index(piece) for piece in pieces.split()]])
    with torch.no_grad():
        return np.stack([layer[0].numpy() for layer in network(ids, output_hidden_states=True).hidden_states])


@pytest.mark.extras
def test_mirrorbert_reads_the_label_at_cls(bert):
    folder, network = bert
    vectors = encode_labels("mirrorbert", ["dog", "tv monitor", "Skateboards"], model=str(folder))
    assert vectors.dtype == np.float32
    pieces = ["[CLS] dog [SEP]", "[CLS] tv monitor [SEP]", "[CLS] skate ##board ##s [SEP]"]
    np.testing.assert_allclose(vectors, [hidden_states(network, p)[-1, 0] for p in pieces], **CLOSE)


@pytest.mark.extras
def test_the_bi_encoder_reads_the_mask_of_its_prompt_at_length_one(bert):
    folder, network = bert
    vectors = encode_labels("bert_biencoder", ["dog", "tv monitor"], model=str(folder))
    dog = hidden_states(network, "[CLS] dog means [MASK] [SEP]")[-1, 3]
    monitor = hidden_states(network, "[CLS] tv monitor means [MASK] [SEP]")[-1, 4]
    np.testing.assert_allclose(vectors, [dog / np.linalg.norm(dog), monitor / np.linalg.norm(monitor)], **CLOSE)


SENTENCES = {
    "dog": ["The dog sat on the cat.", "a cat and a DOG, a dog"],
    "skateboard": ["Skateboard, big", "the cat sat on a big skateboard in the tv"],
    "tv monitor": ["a big TV monitor"],
}


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "sentences.tsv"
    path.write_text("".join(f"{label}\t{text}\n" for label, texts in SENTENCES.items() for text in texts), "utf-8")
    return path


@pytest.mark.extras
def test_mirrorwic_averages_four_layers_over_the_mention_and_then_over_sentences(bert, sentences):
    folder, network = bert
    labels = list(SENTENCES)
    vectors = encode_labels(
        "mirrorwic", labels, model=str(folder), mentions=read_sentences(sentences, labels, labels), batch_size=2
    )

    def mention(pieces, *positions):
        return np.mean([hidden_states(network, pieces)[layer, t] for layer in (2, 3, 4, 5) for t in positions], axis=0)

    dog = [mention("[CLS] the dog sat on the cat . [SEP]", 2), mention("[CLS] a cat and a dog , a dog [SEP]", 5)]
    skateboard = [
        mention("[CLS] skate ##board , big [SEP]", 1, 2),
        mention("[CLS] the cat sat on a big skate ##board in the tv [SEP]", 7, 8),
    ]
    monitor = mention("[CLS] a big tv monitor [SEP]", 3, 4)
    np.testing.assert_allclose(vectors, [np.mean(dog, 0), np.mean(skateboard, 0), monitor], **CLOSE)


def masked_by_hand(network):
    dog = [
        hidden_states(network, "[CLS] the [MASK] sat on the cat . [SEP]")[-1, 2],
        hidden_states(network, "[CLS] a cat and a [MASK] , a dog [SEP]")[-1, 5],
    ]
    skateboard = [
        hidden_states(network, "[CLS] [MASK] , big [SEP]")[-1, 1],
        hidden_states(network, "[CLS] the cat sat on a big [MASK] in the tv [SEP]")[-1, 7],
    ]
    monitor = hidden_states(network, "[CLS] a big [MASK] [SEP]")[-1, 3]
    return [np.mean(dog, 0), np.mean(skateboard, 0), monitor]


@pytest.mark.extras
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_bert_avg_masks_the_mention_whatever_the_batch(bert, sentences, batch_size):
    folder, network = bert
    mentions = read_sentences(sentences, list(SENTENCES), list(SENTENCES))
    vectors = encode_labels("bert_avg", list(SENTENCES), model=str(folder), mentions=mentions, batch_size=batch_size)
    np.testing.assert_allclose(vectors, masked_by_hand(network), **CLOSE)


def other_network(network):
    """The network with other weights: two of its pooling layer's arrays stay, as they are not used."""
    import torch

    other = copy.deepcopy(network)
    torch.manual_seed(1)
    with torch.no_grad():
        for array in other.parameters():
            array.add_(0.3 * torch.randn_like(array))
    return other


@pytest.mark.extras
@pytest.mark.parametrize("parallel", ["", "module."])
def test_concn_takes_its_fine_tuned_weights(bert, sentences, tmp_path, parallel):
    import torch

    folder, network = bert
    other = other_network(network)
    # The authors keep the masked language model as .bert, which has a network .bert without a pooling layer.
    state = {f"{parallel}bert.bert.{k}": v for k, v in other.state_dict().items() if "pooler" not in k}
    torch.save(state | {f"{parallel}bert.cls.predictions.bias": torch.zeros(3)}, tmp_path / "concn.pt")
    vectors = encode_labels(
        "bert_concn",
        list(SENTENCES),
        model=str(folder),
        weights=tmp_path / "concn.pt",
        mentions=read_sentences(sentences, list(SENTENCES), list(SENTENCES)),
    )
    np.testing.assert_allclose(vectors, masked_by_hand(other), **CLOSE)


@pytest.mark.extras
def test_the_bi_encoders_published_weights_are_its_concept_encoder(bert, tmp_path, monkeypatch):
    import torch

    folder, network = bert
    other = other_network(network)
    state = {f"_property_encoder.{k}": v for k, v in network.state_dict().items()}
    state |= {f"_concept_encoder.{k}": v for k, v in other.state_dict().items()}
    state["_concept_encoder.embeddings.position_ids"] = torch.arange(20)[None]  # as older transformers wrote it
    torch.save(state, tmp_path / "published.pt")
    asked = []

    def download(repository, file, local_files_only):
        asked.append((repository, file, local_files_only))
        return str(tmp_path / "published.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(ENCODERS, "bert_biencoder", ENCODERS["bert_biencoder"]._replace(model=str(folder)))
    vectors = encode_labels("bert_biencoder", ["dog"], local_files_only=True)
    expected = hidden_states(other, "[CLS] dog means [MASK] [SEP]")[-1, 3]
    np.testing.assert_allclose(vectors, [expected / np.linalg.norm(expected)], **CLOSE)
    assert asked == [(*ENCODERS["bert_biencoder"].weights, True)]

    def offline(*arguments, **keywords):
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(InputError, match="cannot be downloaded from huggingface.co/amitgajbhiye.*: no network. Get it"):
        encode_labels("bert_biencoder", ["dog"])


@pytest.mark.extras
def test_clip_projects_the_end_of_a_photo_of_a_label(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    letters = sorted(set("aphotofdgcthe"))
    merges = ["p h", "ph o", "pho t", "phot o</w>", "o f</w>", "o g</w>", "d og</w>"]
    joined = [merge.replace(" ", "") for merge in merges]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    start, end = ids["<|startoftext|>"], ids["<|endoftext|>"]
    width = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    # A whole CLIP, as published: the image encoder in the checkpoint is passed over.
    network = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **width, "vocab_size": len(vocabulary), "max_position_embeddings": 20, "bos_token_id": start,
                "eos_token_id": end, "pad_token_id": end, "projection_dim": 8, "initializer_factor": 20.0,
            },
            vision_config={**width, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path)
    tokenizer = transformers.CLIPTokenizer(ids, [tuple(merge.split()) for merge in merges])
    tokenizer.save_pretrained(tmp_path)

    vectors = encode_labels("clip", ["dog", "hot Cat"], model=str(tmp_path))

    def by_hand(pieces):
        tokens = torch.tensor([[start, *(ids[piece] for piece in pieces.split()), end]])
        with torch.no_grad():
            last = network.text_model(input_ids=tokens).last_hidden_state[0, -1].numpy()
        return network.text_projection.weight.detach().numpy() @ last

    prompt = "a</w> photo</w> of</w> a</w>"
    np.testing.assert_allclose(
        vectors, [by_hand(f"{prompt} dog</w>"), by_hand(f"{prompt} h o t</w> c a t</w>")], **CLOSE
    )
    assert vectors.shape == (2, 8) and np.abs(vectors[0] - vectors[1]).max() > 0.01


@pytest.mark.extras
def test_sentences_beyond_the_longest_text_are_skipped_and_counted(bert, capsys):
    folder, network = bert
    short, late = "the dog sat", "the cat sat on the cat and the cat sat on the cat near the big cat and the dog"
    mentions = [[Mention(short, 4, 7), Mention(late, len(late) - 3, len(late))]]
    vectors = encode_labels("bert_avg", ["dog"], model=str(folder), mentions=mentions)
    np.testing.assert_allclose(vectors[0], hidden_states(network, "[CLS] the [MASK] sat [SEP]")[-1, 2], **CLOSE)
    assert "1 texts skipped" in capsys.readouterr().err
    with pytest.raises(InputError, match="reads no sentence as far as the mention of 'dog': give shorter"):
        encode_labels("bert_avg", ["dog"], model=str(folder), mentions=[mentions[0][1:]])


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def mentioned(groups):
    return [[mention.text[mention.start : mention.end] for mention in group] for group in groups]


def test_a_mention_is_the_label_as_written_in_any_case_between_word_boundaries(tmp_path, capsys):
    path = write(
        tmp_path / "s.tsv",
        "dog\tDogs and a hotdog",  # neither is the word
        "dog\tAn old Dog.",
        "diningtable\tThe dining-table, a Dining  Table",
        "dining table\tA DINING TABLE is long",  # by its display name
        "top, t-shirt\ta stop, a T-shirt and a top",
        "unknown\tnot a label here",
        "",
    )
    names, displays = ["diningtable", "dog", "top, t-shirt"], ["dining table", "dog", "top, t-shirt"]
    groups = read_sentences(path, names, displays)
    assert mentioned(groups) == [["dining-table", "DINING TABLE"], ["Dog"], ["T-shirt"]]
    counts = "4 of 4 sentences for 3 labels, 1 to 2 each; 1 skipped as the label is not in them"
    assert capsys.readouterr().err == f"{path}: {counts}\n"


def test_sentences_are_drawn_without_replacement_by_the_seed(tmp_path):
    lines = [f"{label}\t{label} number {i}" for i in range(40) for label in ("dog", "cat")]
    path = write(tmp_path / "s.tsv", *lines)

    def drawn(labels, seed):
        return [[m.text for m in group] for group in read_sentences(path, labels, labels, max_sentences=10, seed=seed)]

    dogs, cats = drawn(["dog", "cat"], 0)
    assert len(set(dogs)) == len(set(cats)) == 10
    assert dogs == sorted(dogs, key=lambda text: int(text.split()[-1]))
    assert drawn(["cat"], 0) == [cats] and drawn(["dog"], 1) != [dogs]
    assert [len(group) for group in read_sentences(path, ["dog"], ["dog"])] == [40]


def test_mistakes_in_a_sentences_file_are_named(tmp_path):
    path = write(tmp_path / "s.tsv", "dog\ta dog", "cat\tcats only", "bird a bird")
    with pytest.raises(InputError, match=r"s.tsv, line 3: expected label<TAB>sentence, got 'bird a bird'"):
        read_sentences(path, ["dog"], ["dog"])
    write(path, "dog\ta dog", "cat\tcats only")
    with pytest.raises(InputError, match="has no sentence that mentions 'cat', 'big bird': add lines"):
        read_sentences(path, ["dog", "cat", "bird"], ["dog", "cat", "big bird"])
    path.write_bytes(b"dog\ta dog\ndog\tcaf\xe9 dog\n")
    with pytest.raises(InputError, match="s.tsv, line 2: not UTF-8 text"):
        read_sentences(path, ["dog"], ["dog"])
    with pytest.raises(InputError, match="absent.tsv cannot be read .*No such file"):
        read_sentences(tmp_path / "absent.tsv", ["dog"], ["dog"])


@pytest.mark.extras
def test_mistakes_in_a_model_are_one_line(bert, tmp_path):
    import torch

    folder, network = bert
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"/empty cannot be loaded: .*Give --model=NAME_OR_FOLDER") as caught:
        encode_labels("mirrorbert", ["dog"], model=str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the model no/such-model cannot be loaded") as caught:
        encode_labels("clip", ["dog"], model="no/such-model", local_files_only=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="clip cannot use .*: it has no text_model.*, which openai/clip"):
        encode_labels("clip", ["dog"], model=str(folder))
    with pytest.raises(InputError, match="encoder bert_concn has no published model"):
        encode_labels("bert_concn", ["dog"], mentions=[[Mention("a dog", 2, 5)]])

    torch.save({f"_concept_encoder.{k}": v for k, v in list(network.state_dict().items())[:9]}, tmp_path / "part.pt")
    with pytest.raises(InputError, match="part.pt have no _concept_encoder.encoder.layer"):
        encode_labels("bert_biencoder", ["dog"], model=str(folder), weights=tmp_path / "part.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(InputError, match="text.pt cannot be loaded into the model") as caught:
        encode_labels("bert_biencoder", ["dog"], model=str(folder), weights=tmp_path / "text.pt")
    assert "\n" not in str(caught.value)


class Attack:
    """Unpickling this creates the file: the stand-in for any command."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.extras
def test_no_code_of_a_model_or_its_weights_is_run(bert, tmp_path):
    import torch

    folder, network = bert
    target = tmp_path / "executed"
    torch.save({"_concept_encoder.embeddings.word_embeddings.weight": Attack(target)}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="evil.pt cannot be loaded into the model: Weights only load failed"):
        encode_labels("bert_biencoder", ["dog"], model=str(folder), weights=tmp_path / "evil.pt")

    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(network.state_dict(), pickled / "pytorch_model.bin")
    encode_labels("mirrorbert", ["dog"], model=str(pickled))  # bare tensors are read
    torch.save(network.state_dict() | {"x": Attack(target)}, pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="/pickled cannot be loaded: .*[Ww]eights"):
        encode_labels("mirrorbert", ["dog"], model=str(pickled))

    own_code = shutil.copytree(folder, tmp_path / "own_code")
    config = json.loads((own_code / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}
    (own_code / "config.json").write_text(json.dumps(config))
    (own_code / "mine.py").write_text(f"open({str(target)!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(InputError, match="/own_code cannot be loaded: .*custom code"):
        encode_labels("mirrorbert", ["dog"], model=str(own_code))
    assert not target.exists()


@pytest.mark.extras
def test_a_tokeniser_without_a_mask_is_told(bert, tmp_path):
    import transformers

    shutil.copytree(bert[0], tmp_path / "model")
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    tokenizer = transformers.BertTokenizer(vocabulary)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="bert_avg cannot use .*: its tokeniser has no mask_token"):
        encode_labels("bert_avg", ["dog"], model=str(tmp_path / "model"), mentions=[[Mention("a dog", 2, 5)]])


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_missing_library_is_told_with_its_extra(monkeypatch, library):
    for name in ("torch", "transformers"):  # neither need be installed: the other one is an empty module
        monkeypatch.setitem(sys.modules, name, None if name == library else types.ModuleType(name))
    with pytest.raises(InputError, match=rf'^{library} is not installed: pip install "mlfsic_jax\[text\]"$'):
        encode_labels("mirrorbert", ["dog"])


@pytest.mark.extras
def test_the_command_writes_what_load_word_vectors_reads(bert, tmp_path, capsys):
    folder, _ = bert
    out = tmp_path / "new" / "voc-mirrorbert.npz"
    main(["--encoder=mirrorbert", "--labels=voc", f"--out={out}", f"--model={folder}", "--local_files_only"])
    displays = [DISPLAY_NAMES.get(name, name) for name in LABEL_NAMES]
    vectors = load_word_vectors(out, LABEL_NAMES, displays)
    np.testing.assert_allclose(vectors, encode_labels("mirrorbert", displays, model=str(folder)), **CLOSE)
    assert f"wrote {out}: 20 labels, 16 numbers each, mirrorbert" in capsys.readouterr().out
    first = out.read_bytes()
    main(["--encoder=mirrorbert", "--labels=voc", f"--out={out}", f"--model={folder}"])
    assert out.read_bytes() == first


@pytest.mark.extras
def test_the_command_in_context_with_labels_of_ones_own(bert, sentences, tmp_path):
    folder, network = bert
    labels = write(tmp_path / "labels.txt", "dog", "", "board_a/file\tskateboard", "tv_monitor")
    sentences.write_text(sentences.read_text().replace("skateboard\t", "board_a/file\t"))
    out = tmp_path / "own.npz"
    flags = [f"--labels={labels}", f"--out={out}", f"--model={folder}", f"--sentences={sentences}"]
    main(["--encoder=bert_avg", *flags])
    vectors = load_word_vectors(out, ["dog", "board_a/file", "tv_monitor"], ["dog", "skateboard", "tv monitor"])
    np.testing.assert_allclose(vectors, masked_by_hand(network), **CLOSE)
    main(["--encoder=bert_avg", "--max_sentences=1", "--seed=3", "--batch_size=1", *flags])
    one = load_word_vectors(out, ["dog", "board_a/file", "tv_monitor"], ["dog", "skateboard", "tv monitor"])
    assert np.abs(one - vectors)[:2].max() > 0.01
    np.testing.assert_allclose(one[2], vectors[2], **CLOSE)


def test_all_benchmarks_have_labels():
    for benchmark in BENCHMARKS:
        names, displays = read_labels(benchmark)
        assert sorted(names) == sorted(sum(label_split(benchmark).values(), ()))
        assert len(displays) == len(names) and not any("_" in display for display in displays)
    assert dict(zip(*read_labels("voc"), strict=True))["tvmonitor"] == "tv monitor"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--encoder=glove"], "argument --encoder: invalid choice: 'glove' (choose from 'mirrorbert', 'mirrorwic'"),
        (["--encoder=clip", "--labels=vox"], "--labels=vox is neither a file nor one of voc, coco"),
        (["--encoder=clip", "--out=a.txt"], "--out=a.txt must end in .npz"),
        (["--encoder=clip", "--sentences=s.tsv"], "encoder clip takes no --sentences"),
        (["--encoder=bert_avg"], "encoder bert_avg needs --sentences=FILE with lines label<TAB>sentence"),
        (["--encoder=mirrorbert", "--weights=a.pt"], "encoder mirrorbert takes no --weights"),
        (["--encoder=clip", "--batch_size=0"], "argument --batch_size: '0' is no whole number from 1"),
        (["--encoder=clip", "--seed=-1"], "argument --seed: '-1' is no whole number from 0"),
        (["--encoder=clip", "--what=1"], "unrecognized arguments: --what=1"),
        (["--encoder=clip", "--labels=empty.txt"], "--labels=empty.txt is empty"),
        (["--encoder=clip", "--labels=twice.txt"], "--labels=twice.txt names 'dog' twice"),
        (["--encoder=clip", "--labels=latin.txt"], "--labels=latin.txt cannot be read as UTF-8 text"),
        (["--encoder=clip", "--labels=alike.txt"], "--labels=alike.txt: 'hot dog' cannot be told from 'hotdog'"),
        (["--encoder=clip", "--out=empty.txt/a.npz"], "the folder of --out=empty.txt/a.npz cannot be made ("),
    ],
)
def test_mistakes_in_flags_are_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty.txt", "", "")
    write(tmp_path / "twice.txt", "dog", "cat", "dog\thound")
    write(tmp_path / "alike.txt", "hot dog", "hotdog")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(SystemExit) as caught:
        main(["--labels=voc", "--out=a.npz", "--local_files_only", *flags])
    assert str(caught.value).startswith(f"error: {message}") and "\n" not in str(caught.value)
    assert not (tmp_path / "a.npz").exists()


def test_the_module_is_a_command():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mlfsic_jax.label_embeddings", "--encoder=clip"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr == "error: the following arguments are required: --labels, --out\n"
