"""The papers' numbers, ``published.json``: percent, as printed."""

import functools
from typing import Any

from mlfsic_jax.data.text import package_json


@functools.cache
def published_rows() -> list[dict[str, Any]]:
    """All rows; do not change them.

    Each has "dataset", "n_shot", "method", "backbone", "words", "paper", "table", "macro_ap", and where published
    "micro_ap", F1, precision and recall ("macro_f1", ..) and fields of an unusual setting. Rows that a report shows
    beside a run's own results also have "url" and "photos", the paper's address and its images.
    """
    found = package_json("published.json")
    paper, url = {"paper": found["paper"]}, found["url"]
    main = [{**paper, "url": url, "photos": found["photos"][row["dataset"]], **row} for row in found["rows"]]
    return main + [{**paper, **row} for row in found["other_rows"]]
