"""Word vectors of labels, from made-up files and from a published one."""

import gzip
import os
import pathlib
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from mlfsic_jax.data.encoders import ENCODERS
from mlfsic_jax.data.voc import DISPLAY_NAMES, LABEL_NAMES
from mlfsic_jax.data.words import EMBEDDINGS, default_path, how_to_get, load_word_vectors
from mlfsic_jax.system.errors import InputError

VECTORS = {
    "the": [0.5, -0.25, 1e-3],
    "dog": [1.0, 2.0, 3.0],
    "tv": [0.0, 1.0, -1.0],
    "monitor": [2.0, 0.0, 1.0],
    "potted": [4.0, 4.0, 4.0],
    "plant": [0.0, 2.0, 8.0],
    "tvset": [7.0, 7.0, 7.0],
}


def write(path, entries, header=""):
    lines = [" ".join([word, *map(str, vector)]) for word, vector in entries]
    path.write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def glove(tmp_path):
    return write(tmp_path / "glove.txt", VECTORS.items())


def test_one_word_is_its_vector_and_several_are_averaged(glove):
    vectors = load_word_vectors(glove, ["dog", "tvmonitor", "pottedplant"], ["dog", "tv monitor", "potted plant"])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.float32([[1, 2, 3], [1, 0.5, 0], [2, 3, 6]]))


@pytest.mark.parametrize("phrase", ["tv_monitor", "tvmonitor", "tv-monitor", "tv monitor", "television"])
def test_an_entry_of_the_whole_phrase_comes_first(tmp_path, phrase):
    path = write(tmp_path / "glove.txt", [*VECTORS.items(), (phrase, [9.0, 9.0, 9.0])])
    np.testing.assert_array_equal(load_word_vectors(path, ["television"], ["tv monitor"]), [[9, 9, 9]])


def test_phrase_spellings_have_an_order(tmp_path):
    path = write(tmp_path / "glove.txt", [("tvmonitor", [1.0, 1.0]), ("tv_monitor", [2.0, 2.0])])
    np.testing.assert_array_equal(load_word_vectors(path, ["tvmonitor"], ["tv monitor"]), [[2, 2]])


def test_commas_and_slashes_separate_words_and_hyphens_do_not(tmp_path):
    path = write(tmp_path / "glove.txt", [("t-shirt", [1.0, 3.0]), ("top", [3.0, 5.0])])
    np.testing.assert_array_equal(load_word_vectors(path, ["top, t-shirt"], ["top, t-shirt"]), [[2, 4]])


def test_lower_case_is_the_fallback(tmp_path):
    path = write(tmp_path / "glove.txt", [("tv", [1.0, 1.0]), ("Dog", [2.0, 2.0]), ("dog", [3.0, 3.0])])
    np.testing.assert_array_equal(load_word_vectors(path, ["a", "b"], ["TV", "Dog"]), [[1, 1], [2, 2]])


def test_every_label_without_a_vector_is_listed_with_its_words(glove):
    with pytest.raises(InputError) as caught:
        load_word_vectors(glove, ["dog", "x", "y"], ["dog", "wild tv", "big red bus"])
    message = str(caught.value)
    assert "2 of the 3 labels: 'wild tv' (missing: wild); 'big red bus' (missing: big, red, bus)" in message
    assert str(glove) in message and "\n" not in message


def test_the_first_of_two_equal_words_counts(tmp_path):
    path = write(tmp_path / "glove.txt", [("dog", [1.0, 1.0]), ("cat", [2.0, 2.0]), ("dog", [3.0, 3.0])])
    np.testing.assert_array_equal(load_word_vectors(path, ["dog"], ["dog"]), [[1, 1]])


def test_words_with_spaces_and_odd_white_space_do_not_disturb(tmp_path):
    words = [
        ("the", [0.0, 0.5]),
        (". . .", [1.0, 1.0]),
        ("at name@domain.com", [2.0, 2.0]),
        ("a\u00a0b\u2028", [3.0, 3.0]),
    ]
    path = write(tmp_path / "glove.txt", [*words, ("hot dog", [4.0, 4.0]), ("na\u00efve", [5.0, 5.0])])
    np.testing.assert_array_equal(
        load_word_vectors(path, ["hotdog", "naive"], ["hot dog", "na\u00efve"]), [[4, 4], [5, 5]]
    )


def test_word2vec_header_fasttext_trailing_spaces_crlf_and_gzip_are_read(tmp_path):
    expected = np.float32([[1, 2, 3]])
    header = write(tmp_path / "a.vec", VECTORS.items(), header="7 3\n")
    np.testing.assert_array_equal(load_word_vectors(header, ["dog"], ["dog"]), expected)
    text = header.read_text()
    other = tmp_path / "b.vec"
    other.write_bytes(text.replace("\n", " \r\n").encode() + b"\n")
    np.testing.assert_array_equal(load_word_vectors(other, ["dog"], ["dog"]), expected)
    packed = tmp_path / "c.txt.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    np.testing.assert_array_equal(load_word_vectors(packed, ["dog"], ["dog"]), expected)
    packed.write_bytes(gzip.compress(text.encode())[:-12])
    with pytest.raises(InputError, match="c.txt.gz cannot be read after line"):
        load_word_vectors(packed, ["dog"], ["dog"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"dog 1 2 3\ncat 1 2\n", "line 2: 2 numbers after 'cat'"),
        (b"dog 1 2 3\ndog\ncat 1 2 3\n", "line 2: 0 numbers after 'dog', not 3 as before; is the file complete"),
        (b"2 3\ndog 1 2\ncat 1 2 3\n", "line 2: 2 numbers after 'dog', not 3"),
        (b"2 3\n\xff 1 2\n", "line 2: 2 numbers after '\ufffd', not 3"),
        (b"the 1 2 3\ndog 1 2 3 4\n", "no vector for 1 of the 1 labels: 'dog' .missing: dog"),
        (b"the 1 2 3\ndog 1 x 3\n", "line 2: the vector of 'dog' holds something that is no number"),
        (b"the 1 2 3\ndog 1 nan 3\n", "line 2: the vector of 'dog' holds something that is no number"),
        (b"the 1 2 3\ndog 1 1e99 3\n", "line 2: the vector of 'dog' holds a number beyond float32"),
        (b"dog\xe9 1 2 3\n", "no vector for 1 of the 1 labels: 'dog' .missing: dog"),
        (b"dog\t1 2 3\n", "line 1: a tab between the word and its vector: replace tabs by spaces"),
        (b"2 3\ndog\t1\t2\t3\n", "line 2: 0 numbers after 'dog.t1.t2.t3', not 3"),
        (b"<html>\n", "line 1: expected a word and its vector"),
        (b"<!DOCTYPE html PUBLIC>\n", "line 1: expected a word and its vector"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_word_vectors(path, ["dog"], ["dog"])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("header", [b"", b"9 3\n", b"\xef\xbb\xbf"])
def test_entries_that_nobody_asked_for_may_be_anything(tmp_path, header):
    lines = [
        *(b"the 1 2 3", b"cat 0.1 0.2 0.3", b"\xff\xfe 0.4 0.5 0.6", b"\xed\xa0\x80 1 2 3", b"no 7 0.4 0.5 0.6"),
        *(b"cat 9 1 1 1", b"half", b" 4 5 6", b"x nan - 1e999", b"caf\xc3\xa9 7 8 9", b"dog 0.7 0.8 0.9"),
    ]
    path = tmp_path / "words.vec"
    path.write_bytes(header + b"\n".join(lines) + b"\n")
    names = ["cat", "dog", "no 7", "caf\u00e9"]
    expected = np.float32([[0.1, 0.2, 0.3], [0.7, 0.8, 0.9], [0.4, 0.5, 0.6], [7, 8, 9]])
    np.testing.assert_array_equal(load_word_vectors(path, names, names), expected)


def test_the_header_tells_the_length_where_the_first_word_has_a_space(tmp_path):
    path = tmp_path / "words.vec"
    path.write_bytes(b"2 2\nno 7 0.5 0.25\ndog 1 2\n")
    np.testing.assert_array_equal(load_word_vectors(path, ["dog", "no 7"], ["dog", "no 7"]), [[1, 2], [0.5, 0.25]])


def test_a_line_without_end_is_not_read_whole(tmp_path):
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(b"dog 1 2\ncat " + b"1" * 50_000_000))
    assert path.stat().st_size < 60_000
    tracemalloc.start()
    with pytest.raises(InputError, match="bomb.txt.gz, line 2 has more than 1,048,576 bytes: convert"):
        load_word_vectors(path, ["dog"], ["dog"])
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_long_number_costs_no_time(tmp_path):
    path = tmp_path / "digits.txt"
    path.write_bytes(b"dog " + b"1" * 1_000_000 + b"x\n")  # as many ways to read it as it has digits, squared
    started = time.process_time()
    with pytest.raises(InputError, match="line 1: expected a word and its vector"):
        load_word_vectors(path, ["dog"], ["dog"])
    assert time.process_time() - started < 5


def test_archives_that_are_bombs_or_hold_objects(tmp_path):
    path = tmp_path / "words.npz"
    np.savez_compressed(path, dog=np.ones(2, np.float32), other=np.zeros(5_000_000))
    with pytest.raises(
        InputError, match=r"words.npz has [\d,]+ bytes and would expand to 40,000,\d+: it is damaged or"
    ):
        load_word_vectors(path, ["dog"], ["dog"])
    np.savez(path, dog=np.array([print], dtype=object))
    with pytest.raises(InputError, match=r"words.npz is not a readable .npz file .Object arrays cannot be loaded"):
        load_word_vectors(path, ["dog"], ["dog"])
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(InputError, match=r"words.npz is a single array"):
        load_word_vectors(path, ["dog"], ["dog"])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dog", b"text")
    with pytest.raises(InputError, match=r"words.npz is not a readable .npz file .its member 'dog' is not an array"):
        load_word_vectors(path, ["dog"], ["dog"])


def test_missing_and_zipped_files_are_named(tmp_path):
    with pytest.raises(InputError, match="absent.txt does not exist"):
        load_word_vectors(tmp_path / "absent.txt", ["dog"], ["dog"])
    (tmp_path / "glove.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="unpack it"):
        load_word_vectors(tmp_path / "glove.zip", ["dog"], ["dog"])


@pytest.mark.parametrize("name", ["wiki.vec", "wiki.vec.gz"])
def test_fasttext_files(tmp_path, name):
    content = b"3 3\n, 0.1 -0.2 3.5\nDog 1.0 2.0 3.0 \ntv -1 0 0.5\n"  # some of fastText's lines end in a space
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    vectors = load_word_vectors(tmp_path / name, ["Dog", "tv"], ["Dog", "tv"])
    np.testing.assert_array_equal(vectors, np.float32([[1, 2, 3], [-1, 0, 0.5]]))


def word2vec(entries, newline=b"\n"):
    """A binary word2vec file: a text line, then each word, a space and its float32 numbers."""
    lines = [word.encode() + b" " + np.array(vector, "<f4").tobytes() + newline for word, vector in entries]
    return b"%d %d\n" % (len(entries), len(entries[0][1])) + b"".join(lines)


GOOGLE_NEWS = [
    ("</s>", [0.25, 0.5]), ("dog", [1.0, 2.0]), ("Dog", [3.0, 4.0]), ("TV", [5.0, 6.0]), ("monitor", [7.0, 8.0]),
    ("dining_table", [9.0, 10.0]), ("dining", [0.0, 0.0]), ("table", [0.0, 0.0]), ("na\u00efve", [11.0, 12.0]),
]  # fmt: skip


@pytest.mark.extras
@pytest.mark.parametrize(("name", "newline"), [("news.bin", b""), ("news.bin", b"\n"), ("news.bin.gz", b"")])
def test_word2vec_files_are_cased_and_have_phrases(tmp_path, name, newline):
    pytest.importorskip("gensim")
    content = word2vec(GOOGLE_NEWS, newline)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    labels = ["dog", "Dog", "DOG", "diningtable", "tv", "naive"]
    displays = ["dog", "Dog", "DOG", "dining table", "TV monitor", "na\u00efve"]
    vectors = load_word_vectors(tmp_path / name, labels, displays)
    np.testing.assert_array_equal(vectors, np.float32([[1, 2], [3, 4], [1, 2], [9, 10], [6, 7], [11, 12]]))
    with pytest.raises(InputError, match=r"no vector for 1 of the 2 labels: 'hot dog' \(missing: hot\)"):
        load_word_vectors(tmp_path / name, ["dog", "hotdog"], ["dog", "hot dog"])


@pytest.mark.extras
@pytest.mark.parametrize(
    "content",
    [
        word2vec(GOOGLE_NEWS)[:-9],
        b"",
        b"dog 1 2\ncat 3 4\n",
        b"\xba\x16\x4f\x2f\x0c\x00\x00\x00",  # how a fastText model begins
        word2vec([("dog", [np.nan, 1.0])]),
    ],
)
def test_a_file_that_is_no_word2vec_file_is_named(tmp_path, content):
    pytest.importorskip("gensim")
    path = tmp_path / "news.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match="news.bin is not a readable .bin file|news.bin: entry 'dog'") as caught:
        load_word_vectors(path, ["dog"], ["dog"])
    assert "\n" not in str(caught.value)


def test_word2vec_without_gensim_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "news.bin").write_bytes(word2vec(GOOGLE_NEWS))
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    with pytest.raises(InputError, match=r'gensim is missing: pip install "mlfsic_jax\[word2vec\]"$'):
        load_word_vectors(tmp_path / "news.bin", ["dog"], ["dog"])


def test_every_embedding_has_a_file_and_says_how_to_get_it():
    assert default_path("glove", "voc", "in") == pathlib.Path("in/glove.6B.300d.txt")
    assert default_path("clip", "coco", "in") == pathlib.Path("in/coco-clip.npz")
    assert how_to_get("glove50", "voc") == "get glove.6B.50d.txt with: python -m mlfsic_jax.fetch glove"
    assert how_to_get("glove", "voc", "in").endswith("python -m mlfsic_jax.fetch glove --data_dir=in")
    assert how_to_get("fasttext", "voc").startswith("get wiki-news-300d-1M.vec from https://")
    command = "make it with: python -m mlfsic_jax.label_embeddings"
    assert how_to_get("clip", "coco", "in") == f"{command} --encoder=clip --labels=coco --out=in/coco-clip.npz"
    own = "--encoder=bert_concn --labels=FILE --out=data/folder-bert_concn.npz --sentences=FILE --model=NAME_OR_FOLDER"
    assert how_to_get("bert_concn", "folder") == f"{command} {own}"
    with pytest.raises(InputError, match="word embedding 'glov' is unknown: use one of glove, glove50, .*, clip$"):
        default_path("glov", "voc")
    assert len({default_path(name, "voc") for name in EMBEDDINGS}) == len(EMBEDDINGS)
    for name, spec in EMBEDDINGS.items():
        assert (spec.source == "") == (name in ENCODERS) and spec.licence
        assert "\n" not in how_to_get(name, "voc")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_phrase_vectors_from_an_archive(tmp_path, suffix):
    path = tmp_path / f"phrases{suffix}"
    entries = {"dog": np.float32([1, 2]), "tv monitor": np.float32([3, 4]), "unused": np.zeros((2, 2), np.float32)}
    np.savez(path, **entries) if suffix == ".npz" else save_file(entries, path)
    vectors = load_word_vectors(path, ["dog", "tvmonitor"], ["dog", "tv monitor"])
    np.testing.assert_array_equal(vectors, np.float32([[1, 2], [3, 4]]))
    with pytest.raises(InputError, match="'unused' is float32"):
        load_word_vectors(path, ["unused"], ["unused"])
    with pytest.raises(InputError, match="missing: cat"):
        load_word_vectors(path, ["cat"], ["cat"])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="is not a readable"):
        load_word_vectors(path, ["dog"], ["dog"])


def test_voc_labels_in_published_glove_vectors(tmp_path):
    path = pathlib.Path(os.environ.get("MLFSIC_SHARED", "../shared")) / "vectors" / "glove.6B.300d.labels.txt"
    if not path.is_file():
        pytest.skip(f"no GloVe vectors at {path}; set MLFSIC_SHARED to the folder that holds vectors/")
    display = [DISPLAY_NAMES.get(name, name) for name in LABEL_NAMES]
    vectors = load_word_vectors(path, LABEL_NAMES, display)
    assert vectors.shape == (20, 300) and np.isfinite(vectors).all()
    published = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            word, *numbers = line.split()
            published[word] = np.array(numbers, float)
    np.testing.assert_array_equal(vectors[14], published["person"].astype(np.float32))
    np.testing.assert_array_equal(vectors[10], published["dining_table"].astype(np.float32))

    # The full published file has no phrases; "tv" and "plant" stand for all words here, as this excerpt lacks the rest.
    words_only = write(tmp_path / "glove.txt", [(word, published[word]) for word in ("tv", "plant", "dog")])
    mean = load_word_vectors(words_only, ["x"], ["tv plant"])
    np.testing.assert_allclose(mean[0], (published["tv"] + published["plant"]) / 2, rtol=1e-6)
