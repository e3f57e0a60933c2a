"""Text and CSV files, read line by line; a malformed one is reported with its name and line."""

import codecs
import csv
import gzip
import importlib.resources
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from mlfsic_jax.system.errors import InputError
from mlfsic_jax.system.untrusted import MAX_LINE, reason, reported


def package_json(name: str) -> Any:
    """A table that comes with this package."""
    return json.loads(importlib.resources.files("mlfsic_jax.data").joinpath(name).read_text("utf-8"))


def text_lines(path: pathlib.Path, hint: str = "get it again") -> Iterator[tuple[int, str]]:
    """Yields (number, line) of the lines that are not blank, unpacking ``.gz``.

    ``InputError``, with ``hint``, when the file cannot be read, is not UTF-8, or has a line beyond a megabyte.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(raw) > MAX_LINE:
                    raise InputError(f"{path}, line {number} has more than {MAX_LINE:,} bytes: {hint}")
                raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                if raw.strip(b" \t\r\n"):
                    yield number, raw.decode("utf-8").rstrip(" \r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number}: not UTF-8 text ({error.reason}): {hint}") from error
    except (OSError, EOFError, zlib.error) as error:
        where = f" after line {number}" if number else ""
        raise InputError(f"{path} cannot be read{where} ({reason(error)}): {hint}") from error


def is_separator_line(text: str) -> bool:
    """Whether a line is "sep=;", which tells Excel what follows."""
    return text.strip().casefold().startswith("sep=")


def csv_rows(path: pathlib.Path, hint: str, longest: int, delimiter: str = ",") -> Iterator[tuple[str, list[str]]]:
    """Yields (file and line, fields) of the first row, then of every other row, which must have as many fields.

    Blank rows and the empty fields that spreadsheets add to rows are left out. ``InputError``, with ``hint``, when the
    file is malformed or a field is longer than ``longest`` characters.
    """
    csv.field_size_limit(longest)  # of the whole process; others may have changed it
    report = reported(f"{path} cannot be read", hint, (OSError, UnicodeDecodeError, csv.Error))
    with report, open(path, newline="", encoding="utf-8-sig") as file:
        reader, columns = csv.reader(file, strict=True, delimiter=delimiter, skipinitialspace=True), []
        for row in reader:
            if not any(field.strip() for field in row):
                continue
            while len(row) > len(columns) and not row[-1].strip():
                row.pop()
            where = f"{path}, line {reader.line_num}"
            if not columns and is_separator_line(row[0]):
                continue
            if columns and len(row) != len(columns):
                expected = f"expected {len(columns)} fields, as the first line has, not {len(row)}"
                raise InputError(f"{where}: {expected}: {hint}")
            columns = columns or row
            yield where, row
        if not columns:
            yield f"{path}, line 1", []
