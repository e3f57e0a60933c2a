"""Weights as training programs save them: wrapped, prefixed, beside objects of all kinds, without PyTorch."""

import argparse
import collections
import hashlib
import io
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mlfsic_jax.backbones.weights import load_weights, read_state_dict, to_variables, weights_files, weights_hash
from mlfsic_jax.system.errors import InputError
from tests.backbones.test_weights import TINY, assert_same, tiny_state, zip_pth


class Stored:
    """Numbers of a tensor, which a pickle refers to."""

    def __init__(self, storage_type, key, array):
        self.reference = ("storage", storage_type, key, "cpu", array.size)


def save_like_torch(content, path, protocol=2):
    """Writes ``content`` as torch.save does, without PyTorch: arrays become tensors, all else is pickled as it is."""
    torch, utils, arrays = types.ModuleType("torch"), types.ModuleType("torch._utils"), []
    torch.__dict__.update({name: type(name, (), {"__module__": "torch"}) for name in ("FloatStorage", "LongStorage")})

    def _rebuild_tensor_v2(*_): ...

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value.reference if isinstance(value, Stored) else None

        def reducer_override(self, value):
            if not isinstance(value, np.ndarray):
                return NotImplemented
            stored = Stored(
                torch.FloatStorage if value.dtype == np.float32 else torch.LongStorage, str(len(arrays)), value
            )
            arrays.append(np.ascontiguousarray(value))
            steps = tuple(step // value.itemsize for step in np.zeros(value.shape, value.dtype).strides)
            return _rebuild_tensor_v2, (stored, 0, value.shape, steps, False, collections.OrderedDict())

    pickled = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setitem(sys.modules, "torch._utils", utils)
        Pickler(pickled, protocol).dump(content)
    return zip_pth(path, pickled.getvalue(), **{f"data/{i}": array.tobytes() for i, array in enumerate(arrays)})


def prefixed(prefix, factor=1):
    return {f"{prefix}{key}": array * np.array(factor, array.dtype) for key, array in tiny_state().items()}


ADAM = {"state": {0: {"step": np.array(3), "exp_avg": np.ones(9, np.float32)}}, "param_groups": [{"lr": 0.1}]}
OPTIONS = argparse.Namespace(lr=0.1, out=Path("runs"), layers={1, 2})
MEASURES = {"loss": np.float64(0.5), ("mAP", 50): np.arange(3), "best": np.ones((), np.float32), None: 1 + 2j}
FILES = {
    "plain.pth": prefixed(""),
    "data-parallel.pt": prefixed("module."),
    "compiled.pth": prefixed("_orig_mod."),
    "compiled-parallel.pth": prefixed("module._orig_mod."),
    "beside-numbers.pth": {"epoch": 3, **prefixed(""), "args": OPTIONS},
    "tutorial.tar.pth": {"epoch": 3, "model_state_dict": prefixed(""), "optimizer_state_dict": ADAM, **MEASURES},
    "net.PTH": {"net": prefixed("module."), "acc": np.float32(90.1)},
    "imagenet.pth.tar": {"arch": "conv4", "state_dict": prefixed("module."), "best_acc1": np.ones((), np.float32)},
    "torchvision.pth": {"model": prefixed(""), "optimizer": ADAM, "args": OPTIONS, "scaler": {"scale": 2.0**16}},
    "average.pth": {"state_dict_ema": prefixed(""), "rng_state": np.arange(99)},
    "averaged.pth": {"n_averaged": np.array(7), **prefixed("module.")},
    "nested.pth": {"checkpoint": {"trainer": {"weights": prefixed("backbone.")}}},
    "lightning.ckpt": {"state_dict": prefixed("model."), "hyper_parameters": OPTIONS, "optimizer_states": [ADAM]},
    "larger.ckpt": {"state_dict": {**prefixed("model.trunk."), "model.fc.weight": np.ones((2, 2), np.float32)}},
    "pytorch_model.bin": collections.OrderedDict(prefixed("")),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", FILES)
def test_files_of_training_programs(tmp_path, capsys, name, protocol):
    path = save_like_torch(FILES[name], tmp_path / name, protocol)
    assert_same(load_weights(path, TINY, 32), to_variables(tiny_state(), TINY))
    assert capsys.readouterr().err == ""  # there was nothing to choose


@pytest.mark.extras
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_pytorch_s_own_tools(tmp_path, capsys, legacy):
    torch = pytest.importorskip("torch")

    def block(n_in):
        convolution, norm = torch.nn.Conv2d(n_in, 2, 3, padding=1), torch.nn.BatchNorm2d(2)
        return torch.nn.Sequential(convolution, norm, torch.nn.ReLU(), torch.nn.MaxPool2d(2))

    network = torch.nn.Module()
    network.encoder = torch.nn.ModuleList(block(n_in) for n_in in (3, 2, 2, 2))
    optimizer = torch.optim.Adam(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    average = torch.optim.swa_utils.AveragedModel(network)
    optimizer.step()
    content = {
        "model": torch.nn.DataParallel(network).state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "model_ema": average.state_dict(),
        "args": argparse.Namespace(device=torch.device("cpu"), dtype=torch.float16, size=torch.Size([3])),
        "rng": torch.get_rng_state(),
        "others": {"complex": torch.ones(3, dtype=torch.complex64), "float8": torch.ones(3).to(torch.float8_e4m3fn)},
        "best": torch.tensor(0.5),
        "loss": np.float64(0.5),
    }
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    expected = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
    assert_same(load_weights(path, TINY, 32), to_variables(expected, TINY))
    assert capsys.readouterr().err == f"{path}: weights are taken from 'model', not from 'model_ema'\n"


def test_of_several_state_dicts_one_is_taken_and_named(tmp_path, capsys):
    plain = to_variables(tiny_state(), TINY)
    for content, message in [
        ({"model_ema": prefixed("", 2), "model": prefixed("")}, "from 'model', not from 'model_ema'"),
        ({"ema": {"module": prefixed("", 2)}, "weights": prefixed("")}, "from 'weights', not from 'ema.module'"),
        ({"critic": {"w": np.ones(2, np.float32)}, "student": prefixed("")}, "from 'student', not from 'critic'"),
        ({"anchors": np.ones(9, np.float32), "net": prefixed("")}, "from 'net', not from the outermost dict"),
    ]:
        path = save_like_torch(content, tmp_path / "checkpoint.pth")
        assert_same(load_weights(path, TINY, 32), plain)
        assert capsys.readouterr().err == f"{path}: weights are taken {message}\n"
    both = save_like_torch({"state_dict": {**prefixed("model."), **prefixed("ema.", 2)}}, tmp_path / "both.ckpt")
    with pytest.raises(InputError, match=r"both\.ckpt does not fit .*missing: encoder.*unexpected: model\.encoder"):
        load_weights(both, TINY, 32)


def test_dicts_within_dicts_without_end(tmp_path):
    itself = b"\x80\x02}q\x00(Vself\nh\x00Vmodel\n}Vself\nh\x00su."
    with pytest.raises(InputError, match="is not a state dict: its entry 'self' is a dict"):
        read_state_dict(zip_pth(tmp_path / "itself.pth", itself))
    one = {"weight": np.ones(2, np.float32)}
    for _ in range(3):
        one = {str(i): one for i in range(1000)}  # a thousand million places
    assert read_state_dict(save_like_torch(one, tmp_path / "many.pth")).keys() == {"weight"}


def test_what_nobody_asked_for_is_not_read(tmp_path):
    whole = save_like_torch({"model": prefixed(""), "optimizer": ADAM}, tmp_path / "whole.pth")
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "cut.pth", "w") as target:
        kept = [name for name in source.namelist() if source.read(name) != np.ones(9, np.float32).tobytes()]
        assert len(kept) == len(source.namelist()) - 1
        for name in kept:
            target.writestr(name, source.read(name))
    assert_same(load_weights(tmp_path / "cut.pth", TINY, 32), to_variables(tiny_state(), TINY))


@pytest.mark.extras
def test_a_whole_module_is_refused_and_the_advice_helps(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    network, path = torch.nn.Linear(2, 3), tmp_path / "module.pth"
    network.register_buffer("tied", network.bias.detach())  # shares its numbers
    torch.save(network, path)
    with pytest.raises(InputError, match="refers to torch.nn.modules.linear.Linear; only plain tensors") as caught:
        read_state_dict(path)
    advice = re.search(r"(x = torch\.load\(.*?\)); .*; (safetensors\.torch\.save_file.*\))$", str(caught.value))
    monkeypatch.chdir(tmp_path)
    import safetensors.torch

    exec(
        f"{advice[1]}; state = x.state_dict(); {advice[2]}", {"torch": torch, "safetensors": safetensors, "path": path}
    )
    found = read_state_dict("weights.safetensors")
    assert found.keys() == {"weight", "bias", "tied"}
    np.testing.assert_array_equal(found["weight"], network.weight.detach().numpy())


def test_several_files_and_names_with_commas_and_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.pth", "b.pth", "x,y.pth", "a.pth,b.pth", "of, mine/c.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for given, expected in [
        ("~/a.pth", ["a.pth"]),
        (f"{tmp_path}/a.pth, ~/b.pth", ["a.pth", "b.pth"]),
        ("~/x,y.pth", ["x,y.pth"]),
        ("~/a.pth,~/x,y.pth,~/b.pth", ["a.pth", "x,y.pth", "b.pth"]),
        ("~/of, mine/c.pth,~/a.pth", ["of, mine/c.pth", "a.pth"]),
        ("~/a.pth,b.pth", ["a.pth,b.pth"]),
        ("~/a.pth,~/gone.pth", ["a.pth", "gone.pth"]),
    ]:
        assert weights_files(given) == tuple(tmp_path / name for name in expected)
    assert weights_files(Path("p.pth,q.pth")) == (Path("p.pth"), Path("q.pth"))
    (tmp_path / "a.pth").write_bytes(b"abc")
    assert weights_hash("~/a.pth") == hashlib.sha256(b"abc").hexdigest()
