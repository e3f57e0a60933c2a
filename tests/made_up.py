"""Tiny made-up datasets in the official layouts of the real ones: photos of noise, a few for every label."""

import csv
import itertools
import json

import numpy as np
from PIL import Image

from mlfsic_jax.data import coco, imaterialist, nus_wide, voc
from mlfsic_jax.data.splits import label_split


def photos_of(labels, per_label):
    """(stem, labels) of every photo: each label alone ``per_label - 1`` times and once with its neighbour."""
    numbers = itertools.count(1)
    found = []
    for label, neighbour in zip(labels, [*labels[1:], labels[0]], strict=True):
        found += [(f"{next(numbers):012}", [label]) for _ in range(per_label - 1)]
        found.append((f"{next(numbers):012}", sorted({label, neighbour})))
    return found


def save_photo(path, size=(44, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(path.name.encode()[-8:], "little") % 2**32
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def make_voc(root, per_label=8):
    year = root / "VOC2007"
    for part in ("Annotations", "ImageSets/Main"):
        (year / part).mkdir(parents=True)
    names = []
    for split in label_split("voc").values():
        for label in split:
            for _ in range(per_label):
                name = f"{len(names):06}"
                save_photo(year / "JPEGImages" / f"{name}.jpg")
                thing = f"<object><name>{label}</name><difficult>0</difficult></object>"
                (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{thing}</annotation>")
                names.append(name)
    (year / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names[:100]))
    (year / "ImageSets" / "Main" / "val.txt").write_text("\n".join(names[100:]))
    return voc.LABEL_NAMES


def write_instances(path, photos, labels, file_name):
    """A COCO instances file; category ids have gaps, as the official ones do."""
    ids = {label: 2 * i + 1 for i, label in enumerate(labels)}
    content = {
        "images": [{"id": int(stem), "file_name": file_name(stem)} for stem, _ in photos],
        "categories": [{"id": ids[label], "name": label} for label in labels],
        "annotations": [
            {"image_id": int(stem), "category_id": ids[label], "iscrowd": 0}
            for stem, names in photos
            for label in names
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_coco(root, per_label=6):
    photos = [photo for split in label_split("coco").values() for photo in photos_of(split, per_label)]
    photos = [(f"{i:012}", labels) for i, (_, labels) in enumerate(photos)]
    for start, name in enumerate(coco.IMAGE_SETS):
        half = photos[start::2]

        def file_name(stem, name=name):
            return f"COCO_{name}_{stem}.jpg"

        write_instances(root / "annotations" / f"instances_{name}.json", half, coco.LABEL_NAMES, file_name)
        for stem, _ in half:
            save_photo(root / name / file_name(stem))
    return coco.LABEL_NAMES


def make_nus_wide(root, per_label=4):
    photos = [photo for split in label_split("nus_wide").values() for photo in photos_of(split, per_label)]
    photos = [(f"place/{i:04}_{i}", labels) for i, (_, labels) in enumerate(photos)]
    (root / "ImageList").mkdir(parents=True)
    lines = [stem.replace("/", "\\") + ".jpg" for stem, _ in photos] + ["gone\\9999_9.jpg"]
    (root / "ImageList" / "Imagelist.txt").write_text("\n".join(lines) + "\n")
    (root / "Groundtruth" / "AllLabels").mkdir(parents=True)
    for label in nus_wide.LABEL_NAMES:
        truth = ["1" if label in labels else "0" for _, labels in photos] + ["1"]
        (root / "Groundtruth" / "AllLabels" / f"Labels_{label}.txt").write_text("\n".join(truth) + "\n")
    for i, (stem, _) in enumerate(photos):
        flat = i % 2  # as repackaged copies have them
        save_photo(root / "images" / f"{stem.split('/')[1] if flat else stem}.jpg")
    return nus_wide.LABEL_NAMES


def make_imaterialist(root, per_label=4):
    photos = [photo for split in label_split("imaterialist").values() for photo in photos_of(split, per_label)]
    photos = [(f"{i:032x}", labels) for i, (_, labels) in enumerate(photos)]
    ids = {label: i for i, label in enumerate(imaterialist.LABEL_NAMES)}
    root.mkdir(parents=True)
    categories = [{"id": i, "name": label, "supercategory": "x", "level": 2} for label, i in ids.items()]
    (root / "label_descriptions.json").write_text(json.dumps({"categories": categories, "attributes": []}))
    with open(root / "train.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "EncodedPixels", "Height", "Width", "ClassId"])
        for stem, labels in photos:
            for label in labels:
                attributes = "_12_3" if ids[label] % 2 else ""
                rows.writerow(
                    [
                        f"{stem}.jpg",
                        "1 2 " * 50_000 if stem.endswith("0f") else "1 2",
                        9,
                        9,
                        f"{ids[label]}{attributes}",
                    ]
                )
            save_photo(root / "train" / f"{stem}.jpg")
    return imaterialist.LABEL_NAMES


FOLDER_LABELS = ("beach", "dune", "pine tree", "rock", "sea", "shell", "tide", "wave")


def make_folder(root, kind, per_label=8, labels=FOLDER_LABELS):
    """``kind``: "labels", "columns", "instances" or "folders"."""
    photos = [(f"{stem[-4:]}.png", names) for stem, names in photos_of(labels, per_label)]
    root.mkdir(parents=True)
    if kind == "folders":
        for file, names in photos:
            for name in names:
                save_photo(root / name / file)
        return labels
    for file, _ in photos:
        save_photo(root / "photos" / file)
    if kind == "labels":
        lines = ["file,labels", *(f"photos/{file},{'|'.join(names)}" for file, names in photos)]
        (root / "labels.csv").write_text("\n".join(lines) + "\n")
    elif kind == "columns":
        lines = [",".join(["file", *labels])]
        lines += [",".join([f"photos/{file}", *("01"[label in names] for label in labels)]) for file, names in photos]
        (root / "labels.csv").write_text("\n".join(lines) + "\n")
    else:
        by_number = [(file.removesuffix(".png"), names) for file, names in photos]
        write_instances(root / "labels.json", by_number, labels, lambda stem: f"photos/{stem}.png")
    return labels


def save_word_vectors(path, names):
    """Random vectors for the words of the names, in the format that the file's name stands for."""
    rng = np.random.default_rng(0)
    words = sorted({word for name in names for word in name.replace(",", " ").split()})
    vectors = rng.normal(size=(len(words), 10)).astype(np.float32)
    if path.suffix == ".npz":
        np.savez(path, **dict(zip(words, vectors, strict=True)))
    elif path.suffix == ".bin":
        records = (w.encode() + b" " + v.tobytes() + b"\n" for w, v in zip(words, vectors, strict=True))
        path.write_bytes(f"{len(words)} 10\n".encode() + b"".join(records))
    else:
        header = [f"{len(words)} 10"] if path.suffix == ".vec" else []
        lines = [" ".join([w, *(f"{x:.4f}" for x in v)]) for w, v in zip(words, vectors, strict=True)]
        path.write_text("\n".join(header + lines) + "\n")
