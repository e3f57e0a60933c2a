"""Tables of labels as spreadsheets, scripts and tools write them: read right, or refused where in doubt."""

import json

import pytest

from mlfsic_jax.data.photo_files import Finder
from mlfsic_jax.data.splits import benchmark_labels
from mlfsic_jax.data.tables import odd_labels, read_csv, read_table
from mlfsic_jax.system.errors import InputError


def table_of(folder, text, name="labels.csv"):
    """Photo -> its labels, the labels, and the notes, of a table that names photos which need not be there."""
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    table = read_table(path, Finder(folder))
    return (
        {photo.relative_to(folder).as_posix(): names for photo, names in table.labels.items()},
        table.names,
        table.notes,
    )


def labelled(folder, *cells):
    """The labels in a column of cells."""
    rows = ('"{}"'.format(cell.replace('"', '""')) for cell in cells)
    labels, _, notes = table_of(folder, "\n".join(["file,labels", *(f"{i}.jpg,{row}" for i, row in enumerate(rows))]))
    return list(labels.values()), " ".join(notes)


# --- separators


@pytest.mark.parametrize(
    ("cells", "expected", "separator"),
    [
        (["dog", "cat", "bird"], [["dog"], ["cat"], ["bird"]], ""),
        (["dog|cat", "cat | bird", ""], [["dog", "cat"], ["cat", "bird"], []], "|"),
        (["dog;cat", "bird"], [["dog", "cat"], ["bird"]], ";"),
        (["dog#cat", "dog", ""], [["dog", "cat"], ["dog"], []], "#"),  # doccano
        (["#dog #cat", "#cat #dog", "#cat"], [["dog", "cat"], ["cat", "dog"], ["cat"]], "#"),  # hashtags
        (["C#|C", "C#"], [["C#", "C"], ["C#"]], "|"),
        (["dog, cat", "cat"], [["dog", "cat"], ["cat"]], ","),
        (["dog, cat", "bird, dog"], [["dog", "cat"], ["bird", "dog"]], ","),  # dog is first here and last there
        (
            ["dog, cat", "cat, bird", "bird, boat", "dog"],
            [["dog", "cat"], ["cat", "bird"], ["bird", "boat"], ["dog"]],
            ",",
        ),
        (["dog,", "dog, cat"], [["dog"], ["dog", "cat"]], ","),
        (["dog, ", "cat", "dog"], [["dog"], ["cat"], ["dog"]], ","),  # a form's, with nothing after it
        (["dog;", "dog"], [["dog"], ["dog"]], ";"),
        (["salt, sea|rock", "sea"], [["salt, sea", "rock"], ["sea"]], "|"),
        (["salt, sea", "dog|cat"], [["salt, sea"], ["dog", "cat"]], "|"),
        (["salt, sea|", "salt, sea"], [["salt, sea"], ["salt, sea"]], "|"),  # the way to say that it is one
        (["C#", "F#;A", "A"], [["C#"], ["F#", "A"], ["A"]], ";"),
        (["C#", "D"], [["C#"], ["D"]], ""),
        (["hot dog", "tv-monitor", "R&B"], [["hot dog"], ["tv-monitor"], ["R&B"]], ""),
        (['["dog","cat"]', "bird", "salt, sea", "[]"], [["dog", "cat"], ["bird"], ["salt, sea"], []], ""),
        (["['dog', 'cat']", "['bird']"], [["dog", "cat"], ["bird"]], ""),  # as Python writes lists
        (['{"choices": ["dog", "cat"]}', "bird"], [["dog", "cat"], ["bird"]], ""),  # Label Studio
        (["cafe\u0301, the\u0301", "caf\u00e9"], [["caf\u00e9", "th\u00e9"], ["caf\u00e9"]], ","),
    ],
)
def test_one_rule_says_what_separates_labels(tmp_path, cells, expected, separator):
    found, notes = labelled(tmp_path, *cells)
    assert found == expected
    assert (f"Labels in labels.csv are separated by {separator!r}." in notes) == (separator not in ("", "|"))


@pytest.mark.parametrize(
    ("cells", "place", "text"),
    [
        (["salt, sea", "rock"], 2, "'salt, sea'"),
        (["rock", "Doe, John", "Doe, Jane"], 3, "'Doe, John'"),  # Doe never stands alone
        (["room #3", "room #4"], 2, "'room #3'"),
        (["dog|cat", "bird;boat"], 3, "'bird;boat'"),
        (["dog|cat;bird", "dog"], 2, "'dog|cat;bird'"),
        (["dog|cat", "dog, bird"], 3, "'dog, bird'"),
        (["dog;cat", "dog#bird"], 3, "'dog#bird'"),
        (["dog;cat", "bird, cat", "bird"], 3, "'bird, cat'"),
        (["dog|bird, cat", "bird", "cat"], 2, "'dog|bird, cat'"),
        (['["dog","cat"]', "dog, bird"], 3, "'dog, bird'"),
        (['{"choices": ["dog"]}', "dog|cat"], 3, "'dog|cat'"),
    ],
)
def test_two_readings_are_refused(tmp_path, cells, place, text):
    with pytest.raises(InputError) as caught:
        labelled(tmp_path, *cells)
    line = str(caught.value)
    assert line.startswith(f"{tmp_path}/labels.csv, line {place}: is {text} one label or several? write ")
    assert "\n" not in line


def test_what_the_refusal_advises_is_read(tmp_path):
    with pytest.raises(InputError, match=r"write 'salt\|sea' for several, 'salt, sea\|' for one"):
        labelled(tmp_path, "salt, sea", "rock")
    assert labelled(tmp_path, "salt|sea", "rock")[0] == [["salt", "sea"], ["rock"]]
    assert labelled(tmp_path, "salt, sea|", "rock")[0] == [["salt, sea"], ["rock"]]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("dog|dog", "line 2: a label occurs twice in 'dog|dog'"),
        ('["dog"', "line 2: '\\[\"dog\"' is no list of labels"),
        ('{"rectanglelabels": ["dog"]}', "line 2: .* is no list of labels: write a|b"),
        ("[1, 2]", r"line 2: \[1, 2\] is no list of labels"),
        ("[" * 3000, "line 2: .* is no list of labels"),
        ("[dog, cat]", "line 2: '.dog, cat.' is no list of labels"),
    ],
)
def test_cells_that_are_no_labels(tmp_path, cell, message):
    with pytest.raises(InputError, match=message):
        labelled(tmp_path, cell)


# --- rows and columns


@pytest.mark.parametrize(
    "text",
    [
        "file,labels\na.jpg,dog|cat\nb.jpg,\n",
        "File,Labels\r\na.jpg,dog|cat\r\nb.jpg,\r\n",
        "\ufefffile,labels\na.jpg,dog|cat\nb.jpg,\n",  # Excel's byte order mark
        "file;labels\na.jpg;dog|cat\nb.jpg;\n",  # Excel where the comma is decimal
        '\ufeff"file";"labels"\n"a.jpg";"dog|cat"\n"b.jpg";""\n',
        "file\tlabels\na.jpg\tdog|cat\nb.jpg\t\n",
        "file,labels,,\na.jpg,dog|cat,,\n,,,\n\nb.jpg,,,\n,,,\n",  # empty columns and rows of a spreadsheet
        "\n,\nfile,labels\na.jpg,dog|cat\nb.jpg,\n",
        "file, labels\na.jpg, dog|cat\nb.jpg, \n",
        "image,tags\na.jpg,dog|cat\nb.jpg,\n",
        "labels,filename\ndog|cat,a.jpg\n,b.jpg\n",
        ",file,labels\n0,a.jpg,dog|cat\n1,b.jpg,\n",  # pandas' row numbers
        "filename,width,class\na.jpg,40,dog\na.jpg,40,cat\na.jpg,40,dog\nb.jpg,30,\n",  # a row per box
        "file,labels\na.jpg,dog\nb.jpg,\na.jpg,cat\n",  # a row per label
        "file,dog,cat\na.jpg,1,1\nb.jpg,0,0\n",
        ",file,dog,cat\n0,a.jpg,True,True\n1,b.jpg,False,False\n",
        "file,dog,cat,Unnamed: 0\na.jpg,1.0,1.0,0\nb.jpg,0.0,,1\n",  # read and written by pandas again
        "Unnamed: 0.1,Unnamed: 0,file,dog,cat\n0,0,a.jpg,1,1\n1,1,b.jpg,0,0\n",  # and again
        "file;dog;cat\na.jpg;True;TRUE\nb.jpg;False;false\n",
        "file,dog,cat,\na.jpg,1.0,x,\nb.jpg,0.0,,\n",
        "path,dog,cat\na.jpg,X,1\nb.jpg,,0\n",
    ],
)
def test_one_table_in_many_hands(tmp_path, text):
    labels, names, _ = table_of(tmp_path, text)
    assert labels == {"a.jpg": ["dog", "cat"], "b.jpg": []} and names == ["dog", "cat"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,path,tree\na.jpg,1,0\n", {"a.jpg": ["path"]}),  # labels called like columns
        ("file,class,tags,image\na.jpg,1,0,1\n", {"a.jpg": ["class", "image"]}),
        ("file,label,notes\na.jpg,dog,\nb.jpg,cat,\n", {"a.jpg": ["dog"], "b.jpg": ["cat"]}),
        ("file,labels,dog,cat\na.jpg,dog,0.9132,0.1000\n", {"a.jpg": ["dog"]}),  # predictions, corrected
        ("file,labels\na.jpg,labels\n", {"a.jpg": ["labels"]}),
        ("file,url,labels\na.jpg,,cat\nb.jpg,,dog\n", {"a.jpg": ["cat"], "b.jpg": ["dog"]}),  # spare columns
        ("file,label,tags\na.jpg,cat,\n", {"a.jpg": ["cat"]}),
        ("file,labels,cat,dog\na.jpg,,0.0666,0.0700\n", {"a.jpg": []}),  # predictions, none above the threshold
    ],
)
def test_what_a_column_is_its_cells_decide(tmp_path, text, expected):
    assert table_of(tmp_path, text)[0] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,labels\na.jpg,dog\n", r"line 1: the columns must be file,labels or .*, not \['id', 'labels'\]"),
        ("file\na.jpg\n", "line 1: the columns must be file,labels or"),
        ("file|labels\na.jpg|dog\n", "line 1: the columns must be file,labels or"),
        ("file,,dog\na.jpg,1,1\n", "line 1: the columns must be file,labels or"),
        (",file,dog\n1,a.jpg,1\n0,b.jpg,1\n", "line 1: the columns must be file,labels or"),  # not the rows' numbers
        ("file,image,labels\na.jpg,b.jpg,dog\n", r"columns \['file', 'image'\] may hold the photo: keep one"),
        ("file,labels,tags\na.jpg,dog,indoor\n", r"columns \['labels', 'tags'\] may hold the labels: keep one"),
        (
            "file,category,dog,cat\na.jpg,indoor,1,0\nb.jpg,outdoor,0,1\n",
            r"in the 0/1 columns \['dog', 'cat'\]: take one",
        ),
        ("file,label\na.jpg,1\nb.jpg,0\n", "line 1: column 'label' has 0 and 1 only"),
        ("file,label\na.jpg,True\nb.jpg,False\n", "line 1: column 'label' has False and True only"),
        ("file,label\na.jpg,1.0\nb.jpg,\n", "line 1: column 'label' has 1.0 only"),
        ("file,dog,Unnamed: 3\na.jpg,1,x\n", "line 1: the columns must be file,labels or"),
        ("file,animal\na.jpg,dog\n", "line 2, column 'animal': 'dog', expected 0 or 1; call a column of names labels"),
        ("file,dog,cat\na.jpg,1,-1\n", "line 2, column 'cat': '-1', expected 0 or 1"),
        ("file,labels\na.jpg,dog, cat\n", "line 2: expected 2 fields, as the first line has"),
        ("file,dog,dog\na.jpg,1,0\n", "line 1: a column occurs twice"),
        ("file,dog,cat\na.jpg,1,0\na.jpg,1,0\n", "line 3: 'a.jpg' occurs twice"),
        ("file,labels\n,dog\n", "line 2: '' must be the path of a photo"),
        (b"\xff\xfef\0i\0l\0e\0", "labels.csv.*: save it as CSV in UTF-8"),  # Excel's "Unicode text"
    ],
)
def test_tables_that_leave_a_doubt(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        table_of(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_read_are_told(tmp_path):
    notes = table_of(tmp_path, "file,width,labels\na.jpg,40,dog\n")[2]
    assert notes == ["Columns of labels.csv that were not read: ['width']."]


def test_what_may_be_a_slip_is_told(tmp_path):
    assert "taken for labels that no photo has: ['notes']" in table_of(tmp_path, "file,dog,notes\na.jpg,1,\n")[2][0]
    notes = table_of(tmp_path, 'file,labels\na.jpg,cat|dog\nb.jpg,"sofa,chair"\n')[2]
    assert notes == ["Taken for one label each in labels.csv: ['sofa,chair']."]


def test_invisible_characters_make_no_label_of_their_own(tmp_path):
    labels, names, _ = table_of(tmp_path, "file,labels\na.jpg,cat\u200b\nb.jpg,c\u00adat|\ufeffdog\u200e\nc.jpg,cat\n")
    assert names == ["cat", "dog"] and labels["b.jpg"] == ["cat", "dog"]
    family = "\U0001f468\u200d\U0001f469"  # a joiner that has a meaning
    assert table_of(tmp_path, f"file,labels\na.jpg,{family}\n")[1] == [family]


def test_objects_in_json(tmp_path):
    records = [{"file": "a.jpg", "labels": ["dog", "cat"]}, {"file": "b.jpg"}, {"file": "c.jpg", "labels": []}]
    labels, _, notes = table_of(tmp_path, json.dumps(records), "labels.json")
    assert labels == {"a.jpg": ["dog", "cat"], "c.jpg": []}
    assert notes == ["1 entries of labels.json have no annotation and are left out."]
    lines = "\n".join(json.dumps({"image": f"{i}.jpg", "tags": tags}) for i, tags in enumerate(("dog|cat", "cat")))
    assert table_of(tmp_path, lines, "x.jsonl")[0] == {"0.jpg": ["dog", "cat"], "1.jpg": ["cat"]}
    wide = [{"file": "a.jpg", "dog": True, "cat": 0}, {"file": "b.jpg", "cat": 1.0}]
    assert table_of(tmp_path, json.dumps(wide), "labels.json")[0] == {"a.jpg": ["dog"], "b.jpg": ["cat"]}
    for content, message in (
        ([1], "entry 1: 1 is no object"),
        ([{"file": 1, "labels": "a"}], "1 must be the path of a photo"),
        ({"a.jpg": "dog"}, "is not a COCO instances file"),
        ([{"file": "a.jpg", "labels": [[]]}], r"entry 1: \[\[\]\] is no list of labels"),
    ):
        with pytest.raises(InputError, match=message):
            table_of(tmp_path, json.dumps(content), "labels.json")
    with pytest.raises(InputError, match="labels.json is not valid JSON"):
        table_of(tmp_path, "{", "labels.json")


def test_the_support_of_a_prediction_is_read_by_the_same_rules(tmp_path, capsys):
    path = tmp_path / "support.csv"
    path.write_text('Image;Tags\n../elsewhere/a.jpg;"dog, Cat"\n/abs/b.jpg;dog\nc.jpg;cat\n')
    labels, names = read_csv(path, anywhere=True)
    assert {str(photo): names for photo, names in labels.items()} == {
        f"{tmp_path}/../elsewhere/a.jpg": ["dog", "Cat"],
        "/abs/b.jpg": ["dog"],
        f"{tmp_path}/c.jpg": ["cat"],
    }
    assert names == ["dog", "Cat", "cat"]
    told = capsys.readouterr().err
    assert "Labels in support.csv are separated by ','." in told and "The labels 'Cat', 'cat' are several" in told
    with pytest.raises(InputError, match="line 2: '../elsewhere/a.jpg' must be the path of a photo inside"):
        read_csv(path)


def test_labels_that_look_like_slips():
    names = ["dog", "Dog", "hot_dog", "hot dog", "None", "cat and dog", "cat", "sand, rock", "salt", "Ca\u00f1on"]
    assert [line.partition(" ")[0] for line in odd_labels(names)] == ["The", "The", "'None'", "'cat"]
    (line,) = odd_labels(["scab", "rust", "scab rust", "rust\u3001scab", "scab/rust", "leaf spot"])
    assert line.startswith("'scab rust' was taken for one label, and 2 more like it, but its parts look like labels")
    assert "'haze primary'" in next(odd_labels(["haze primary", "clear haze", "primary road"]))
    for name in ("voc", "coco", "nus_wide", "imaterialist"):
        assert list(odd_labels(benchmark_labels(name))) == []
    assert list(odd_labels(["dog", "cat", "hot dog", "R&B", "salt, sea", "nanny"])) == []
