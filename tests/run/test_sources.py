"""Results in files belong to the inputs that they were made from."""

import json
import os
import shutil

from mlfsic_jax.run import config as defaults
from mlfsic_jax.run import sources
from tests.made_up import save_photo


def test_results_agree_with_the_inputs_that_they_were_made_from(tmp_path):
    photos, weights, vectors = tmp_path / "photos", tmp_path / "w.safetensors", tmp_path / "words.txt"
    save_photo(photos / "cat" / "1.png")
    for file, text in ((weights, "w"), (vectors, "cat 1"), (photos / "split.json", "{}")):
        file.write_text(text)
    config = defaults.default()
    config.data.name, config.data.source, config.data.split = "folder", str(photos), str(photos / "split.json")
    config.backbone_weights, config.labels.vectors = str(weights), str(vectors)
    config.labels.embedding = "glove"

    def stored():
        return sources.metadata(config)[sources.KEY]

    def disagrees(change):
        before = stored()
        assert sources.agree(config, before)
        change()
        assert not sources.agree(config, before) and sources.agree(config, stored())

    assert set(json.loads(stored())) == {"data", "split", "weights", "vectors"}
    assert not sources.agree(config, None)  # of a program that did not note it
    disagrees(lambda: save_photo(photos / "dog" / "2.png"))
    disagrees(lambda: (photos / "split.json").write_text('{"train": []}'))
    disagrees(lambda: weights.write_text("other"))
    disagrees(lambda: vectors.write_text("cat 22"))
    before = stored()
    shutil.move(photos, tmp_path / "moved")
    assert sources.agree(config, before)  # nothing there says otherwise
    config.data.source = str(tmp_path / "moved")
    assert sources.agree(config, before)
    os.utime(tmp_path / "moved/cat/1.png", (1, 1))
    assert not sources.agree(config, before)
