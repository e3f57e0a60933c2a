"""Import of weights: three file formats, every complaint, and a .pth reader that never runs what it reads."""

import collections
import hashlib
import io
import os
import pickle
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from mlfsic_jax.backbones import BACKBONES, Conv4, EfficientNetLite, MobileNetV2, ResNet
from mlfsic_jax.backbones.weights import (
    load_head,
    load_weights,
    read_state_dict,
    save_weights,
    to_variables,
    weights_hash,
)
from mlfsic_jax.system.errors import InputError

TINY = Conv4(width=2)
REAL_WEIGHTS = Path(os.environ.get("MLFSIC_SHARED", "../shared")) / "weights/mobilenet_v2_imagenet1k.safetensors"


def tiny_state(dtype=np.float32):
    """Random weights of TINY under PyTorch names, multiples of 1/8 that every float type holds exactly."""
    rng = np.random.default_rng(0)
    state = {}
    for block in range(4):
        shapes = {"0.weight": (2, 3 if block == 0 else 2, 3, 3)}
        shapes |= dict.fromkeys(("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"), (2,))
        for name, shape in shapes.items():
            state[f"encoder.{block}.{name}"] = (rng.integers(1, 16, shape) / 8).astype(dtype)
        state[f"encoder.{block}.1.num_batches_tracked"] = np.array(7, np.int64)
    return state


def write(state, path):
    """Write a state dict of arrays in the format that the path's ending names."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **state)
    else:
        save_pth(state, path)
    return path


def save_pth(content, path, **options):
    torch = pytest.importorskip("torch")

    def to_torch(value):
        if isinstance(value, dict):
            return collections.OrderedDict((key, to_torch(inner)) for key, inner in value.items())
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
        return torch.from_numpy(np.array(value))

    torch.save(to_torch(content), path, **options)
    return path


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {np.dtype(np.float32)}


def test_every_array_lands_where_its_name_says():
    state = tiny_state()
    variables = to_variables(state, TINY)
    np.testing.assert_array_equal(
        variables["params"]["encoder_2_0"]["kernel"], np.einsum("oihw->hwio", state["encoder.2.0.weight"])
    )
    for collection, layer, ours, theirs in [
        ("params", "encoder_0_0", "bias", "0.0.bias"),
        ("params", "encoder_3_1", "scale", "3.1.weight"),
        ("params", "encoder_3_1", "bias", "3.1.bias"),
        ("batch_stats", "encoder_1_1", "mean", "1.1.running_mean"),
        ("batch_stats", "encoder_1_1", "var", "1.1.running_var"),
    ]:
        np.testing.assert_array_equal(variables[collection][layer][ours], state[f"encoder.{theirs}"])
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", pytest.param(".pth", marks=pytest.mark.extras)])
def test_formats_and_float_types_import_identically(tmp_path, suffix, dtype):
    path = write(tiny_state(dtype), tmp_path / f"weights{suffix}")
    assert_same(load_weights(path, TINY, 32), to_variables(tiny_state(), TINY))


@pytest.mark.extras
def test_pth_is_read_without_torch(tmp_path, monkeypatch):
    path = write(tiny_state(), tmp_path / "weights.pth")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    assert_same(load_weights(path, TINY, 32), to_variables(tiny_state(), TINY))


@pytest.mark.extras
def test_pth_views_and_shared_storage(tmp_path):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": whole.T,
        "tail": whole[2:, 1::2],
        "parameter": torch.nn.Parameter(whole[0]),
        "scalar": torch.tensor(5),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    torch.save(tensors, tmp_path / "views.pth")
    arrays = read_state_dict(tmp_path / "views.pth")
    assert arrays.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(arrays[key], tensor.detach().numpy())
        assert arrays[key].dtype == tensor.detach().numpy().dtype


@pytest.mark.parametrize(
    ("module", "head", "other"),
    [
        (ResNet((1, 1), width=2), "fc", "classifier"),
        (MobileNetV2(stages=((1, 8, 1, 1),), last_features=8), "classifier", "fc"),
    ],
)
def test_the_classifier_head_is_ignored_by_name(module, head, other):
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    names = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for (_, *path, leaf), value in traverse_util.flatten_dict(shapes).items():
        shape = tuple(value.shape[i] for i in (3, 2, 0, 1)) if value.ndim == 4 else value.shape
        state["_".join(path).replace("_", ".") + "." + names[leaf]] = np.ones(shape, np.float32)
    head_weights = {f"{head}.1.weight": np.ones((10, 4), np.float32), f"{head}.1.bias": np.ones(10, np.float32)}
    to_variables(state | head_weights, module, 32)
    with pytest.raises(InputError, match=rf"unexpected: {other}\.bias"):
        to_variables(state | {f"{other}.bias": np.ones(10, np.float32)}, module, 32)


def test_efficientnet_lite_under_both_kinds_of_names(tmp_path):
    module = EfficientNetLite(depth=1.1, stages=((1, 8, 1, 1, 3), (2, 8, 2, 2, 5), (2, 16, 1, 1, 3)), last_features=8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(1, 2, leaf.shape).astype(np.float32), shapes)
    save_weights(tmp_path / "weights.safetensors", variables, module)
    present = load_file(tmp_path / "weights.safetensors")

    numbers = {"0.0": 0, "1.0": 1, "1.1": 2, "1.2": 3, "2.0": 4}  # depth 1.1 makes three blocks of two
    first = {"conv_dw": "depthwise_conv", "bn1": "bn1", "conv_pw": "project_conv", "bn2": "bn2"}
    expanded = {"conv_pw": "expand_conv", "bn1": "bn0", "conv_dw": "depthwise_conv", "bn2": "bn1"}
    expanded |= {"conv_pwl": "project_conv", "bn3": "bn2"}
    outside = {"conv_stem": "conv_stem", "bn1": "bn0", "conv_head": "conv_head", "bn2": "bn1"}
    former = {"_fc.weight": np.ones((10, 8), np.float32), "_fc.bias": np.ones(10, np.float32)}
    for key, array in present.items():
        *parts, layer, leaf = key.split(".")
        if parts:
            number = numbers[".".join(parts[1:])]
            former[f"_blocks.{number}._{(expanded if number else first)[layer]}.{leaf}"] = array
        else:
            former[f"_{outside[layer]}.{leaf}"] = array
    assert len(former) == len(present) + 2 and not former.keys() & present.keys()
    for state in (former, present, {f"module.{key}": array for key, array in former.items()}):
        assert_same(to_variables(state, module, 32), variables)
    with pytest.raises(InputError, match=r"missing: bn1\.bias; unexpected: _blocks\.5\._conv\.weight\."):
        spare = {"_blocks.5._conv.weight": former.pop("_bn0.bias")}
        to_variables(former | spare, module, 32)


@pytest.mark.parametrize(
    ("name", "key", "n"),
    [
        ("resnet50", "fc", 2048),
        ("resnet101", "fc", 2048),
        ("mobilenet_v2", "classifier.1", 1280),
        ("inception_v3", "fc", 2048),
        ("vit_b_16", "heads.head", 768),
        ("vit_b_32", "heads.head", 768),
        *((f"efficientnet_lite{i}", "classifier", 1280) for i in range(5)),
        ("efficientnet_lite2", "_fc", 1280),
    ],
)
def test_the_imagenet_classifier(tmp_path, name, key, n):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(1000, n)).astype(np.float16), rng.normal(size=1000).astype(np.float16)
    other = {"AuxLogits.fc.weight": np.ones((1000, 768), np.float16), "AuxLogits.fc.bias": np.ones(1000, np.float16)}
    path = write({f"{key}.weight": weight, f"{key}.bias": bias, **other}, tmp_path / "weights.safetensors")
    found = load_head(path, name)
    np.testing.assert_array_equal(found[0], weight.astype(np.float32), strict=True)
    np.testing.assert_array_equal(found[1], bias.astype(np.float32), strict=True)


def test_the_imagenet_classifier_of_two_parts_is_the_mean_of_theirs(tmp_path):
    rng = np.random.default_rng(0)
    heads = [(rng.normal(size=(1000, 1280)), rng.normal(size=1000)) for _ in range(2)]
    files = [
        write({"classifier.weight": weight, "classifier.bias": bias}, tmp_path / f"{i}.safetensors")
        for i, (weight, bias) in enumerate(heads)
    ]
    weight, bias = load_head(f"{files[0]},{files[1]}", "efficientnet_lite0_lite2")
    features = rng.normal(size=2 * 1280)
    logits = [w @ x + b for (w, b), x in zip(heads, np.split(features, 2), strict=True)]
    np.testing.assert_allclose(weight @ features + bias, np.mean(logits, axis=0), atol=1e-4)  # float32
    with pytest.raises(InputError, match=r"names 1 weights file.*EfficientNetLite \+ EfficientNetLite takes 2"):
        load_head(files[0], "efficientnet_lite0_lite2")


def test_backbones_without_an_imagenet_classifier(tmp_path):
    for name in ("conv4", "clip_resnet50", "clip_vit_b_32", "resnet50_vit_b_16"):
        assert BACKBONES[name].head is None
        with pytest.raises(
            InputError, match=rf"of {name} hold no ImageNet classifier: choose one of resnet50, .*lite0_lite2$"
        ):
            load_head(tmp_path / "absent.pth", name)
    with pytest.raises(InputError, match="no backbone 'resnet'"):
        load_head(tmp_path / "absent.pth", "resnet")
    with pytest.raises(InputError, match="no weights file"):
        load_head(tmp_path / "absent.pth", "mobilenet_v2")


@pytest.mark.parametrize(
    ("weight", "bias", "problem"),
    [
        (None, np.ones(1000), "weight is missing, not float [1000, 1280]"),
        (np.ones((1000, 1280)), None, "bias is missing, not float [1000]"),
        (np.ones((21, 1280), np.float32), np.ones(21), "weight is float32 [21, 1280], not float [1000, 1280]"),
        (np.ones((1000, 1280)), np.ones(1, np.float32), "bias is float32 [1], not float [1000]"),
        (np.ones((1000, 1280), np.int8), np.ones(1000), "weight is int8 [1000, 1280], not float [1000, 1280]"),
        (np.ones((1000, 1280)), np.full(1000, 1e300), "bias is NaN or infinity in places, not float [1000]"),
    ],
)
def test_unusable_imagenet_classifiers_are_refused(tmp_path, weight, bias, problem):
    head = {"classifier.1.weight": weight, "classifier.1.bias": bias, "fc.weight": np.ones((1000, 1280))}
    path = write({key: array for key, array in head.items() if array is not None}, tmp_path / "weights.npz")
    with pytest.raises(InputError) as caught:
        load_head(path, "mobilenet_v2")
    assert str(caught.value) == (
        f"{path} holds no ImageNet classifier of mobilenet_v2: classifier.1.{problem}; "
        "get it with: python -m mlfsic_jax.fetch mobilenet_v2"
    )


def test_every_problem_is_listed_at_once(tmp_path):
    state = tiny_state()
    del state["encoder.0.0.weight"], state["encoder.3.1.running_var"]
    state["encoder.4.0.weight"] = state["fc.weight"] = np.ones((2, 2), np.float32)
    state["encoder.1.0.weight"] = np.ones((2, 2, 5, 5), np.float32)
    state["encoder.2.0.bias"] = np.ones(3, np.float32)
    state["encoder.2.1.bias"] = np.array([np.nan, 1], np.float32)
    path = write(state, tmp_path / "weights.npz")
    with pytest.raises(InputError) as caught:
        load_weights(path, TINY, 32)
    message = str(caught.value)
    assert message.startswith(f"{path} does not fit the backbone Conv4")
    assert "missing: encoder.0.0.weight, encoder.3.1.running_var;" in message
    assert "unexpected: encoder.4.0.weight, fc.weight;" in message
    assert "encoder.1.0.weight is [2, 2, 5, 5], not [2, 2, 3, 3]" in message
    assert "encoder.2.0.bias is [3], not [2]" in message
    assert "unusable: encoder.2.1.bias holds NaN or infinity." in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "array", "complaint"),
    [
        ("encoder.0.0.bias", np.array([np.nan, 0], np.float32), "NaN or infinity"),
        ("encoder.0.0.bias", np.array([np.inf, 0], np.float16), "NaN or infinity"),
        ("encoder.0.0.bias", np.array([1e300, 0]), "NaN or infinity"),
        ("encoder.0.0.bias", np.array([1, 2]), "int64, not floating point"),
        ("encoder.0.1.running_var", np.array([1, -1], np.float32), "negative variance"),
    ],
)
def test_unusable_values_are_refused(key, array, complaint):
    with pytest.raises(InputError, match=f"unusable: {key} .*{complaint}"):
        to_variables(tiny_state() | {key: array}, TINY)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", pytest.param(".pth", marks=pytest.mark.extras)])
@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_truncated_files(tmp_path, suffix, keep):
    path = write(tiny_state(), tmp_path / f"weights{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: 1 if keep == 1 else int(keep * len(content))])
    with pytest.raises(InputError, match=rf"weights{suffix} is (truncated or damaged|not a file written)") as caught:
        load_weights(path, TINY, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", pytest.param(".pth", marks=pytest.mark.extras)])
def test_one_flipped_byte_among_the_weights(tmp_path, suffix):
    """Both formats carry checksums; a .safetensors file has none."""
    path = write(tiny_state(), tmp_path / f"weights{suffix}")
    content = bytearray(path.read_bytes())
    position = content.index(tiny_state()["encoder.0.0.weight"].tobytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="truncated or damaged"):
        load_weights(path, TINY, 32)


def test_files_that_are_not_there_or_of_no_known_kind(tmp_path):
    with pytest.raises(InputError, match=r"no weights file .*absent\.pth"):
        load_weights(tmp_path / "absent.pth", TINY, 32)
    with pytest.raises(InputError, match=r"must end in \.safetensors, \.npz, \.pth"):
        load_weights(tmp_path / "weights.h5", TINY, 32)
    with pytest.raises(InputError, match="no backbone 'resnet'"):
        load_weights(tmp_path / "absent.pth", "resnet", 32)
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(InputError, match="single array"):
        load_weights(tmp_path / "array.npz", TINY, 32)


class Attack:
    """Unpickling this creates the file: the stand-in for any command."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def zip_pth(path, pickled, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pth_file_is_refused_and_not_run(tmp_path, protocol):
    target = tmp_path / "executed"
    content = pickle.dumps({"encoder.0.0.weight": Attack(target)}, protocol)
    path = zip_pth(tmp_path / "evil.pth", content)
    with pytest.raises(InputError, match=r"evil\.pth refers to \w+\.system; only plain tensors .*weights_only=False"):
        load_weights(path, TINY, 32)
    assert not target.exists()
    pickle.loads(content)  # the file would have done its work on a trusting reader
    assert target.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "builtins getattr", "torch load", "torch._utils _rebuild_tensor_v2.__globals__", "numpy dtype"],
)
def test_nothing_but_the_allow_list_is_found(tmp_path, name):
    path = zip_pth(tmp_path / "weights.pth", b"c" + name.replace(" ", "\n").encode() + b"\n.")
    with pytest.raises(InputError, match="only plain tensors are read"):
        read_state_dict(path)


def handmade_tensor(tmp_path, offset, size, stride, storage="ctorch\nFloatStorage\n"):
    """A .pth file of one tensor over a storage of four float32, described as a damaged or hostile file might."""

    def integers(values):
        return "(" + "".join(f"I{value}\n" for value in values) + "t"

    persistent = f"(Vstorage\n{storage}V0\nVcpu\nI4\ntQ"
    tensor = f"ctorch._utils\n_rebuild_tensor_v2\n({persistent}I{offset}\n{integers(size)}{integers(stride)}tR"
    raw = np.arange(4, dtype=np.float32).tobytes()
    with zipfile.ZipFile(tmp_path / "handmade.pth", "w") as archive:
        archive.writestr("a/data.pkl", f"(dVx\n{tensor}s.")
        archive.writestr("a/data/0", raw)
    return tmp_path / "handmade.pth"


def test_a_handmade_pth_is_read(tmp_path):
    arrays = read_state_dict(handmade_tensor(tmp_path, 1, (3,), (1,)))
    np.testing.assert_array_equal(arrays["x"], [1, 2, 3])


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(2, (3,), (1,)), (0, (2, 2), (3, 3)), (-1, (1,), (1,)), (3, (2,), (-1,)), (0, (2,), (1, 1)), (9, (10**9,), (0,))],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, offset, size, stride):
    with pytest.raises(InputError, match="truncated or damaged"):
        read_state_dict(handmade_tensor(tmp_path, offset, size, stride))


def test_pth_files_that_are_no_state_dict(tmp_path):
    for content, complaint in [([1], "holds a list"), ({"lr": 0.1}, "its entry 'lr' is a float")]:
        with pytest.raises(InputError, match=complaint):
            read_state_dict(zip_pth(tmp_path / "other.pth", pickle.dumps(content, 2)))
    with pytest.raises(InputError, match="not written by torch.save"):
        with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
            archive.writestr("readme.txt", "hello")
        read_state_dict(tmp_path / "archive.pth")
    with pytest.raises(InputError, match="big-endian"):
        read_state_dict(zip_pth(tmp_path / "big.pth", pickle.dumps({}, 2), byteorder="big"))


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(InputError, match="page.pth is not a file written by torch.save: get it again$"):
        load_weights(tmp_path / "page.pth", TINY, 32)


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_tensors_of_a_torchscript_archive_are_read_without_torch(tmp_path, monkeypatch, how):
    torch = pytest.importorskip("torch")

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)
            self.sizes, self.rates, self.flags, self.name = [1, 2], [0.5], [True], "inner"
            self.table, self.maps = {"a": 1}, [torch.ones(1)]
            self.register_buffer("nothing", None)

        def forward(self, x):
            return self.norm(self.linear(x)) + self.sizes[0]

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.layers = Inner(), torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
            self.scale, self.pair = torch.nn.Parameter(torch.tensor(4.0)), (3, 4)
            self.register_buffer("size", torch.tensor(224))

        def forward(self, x):
            return self.scale * self.inner(x)

    model = Outer().eval()
    script = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.ones(1, 2))
    script.half().save(tmp_path / "script.pt")
    expected = {key: tensor.numpy() for key, tensor in model.half().state_dict().items()}
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now raises ImportError
    found = read_state_dict(tmp_path / "script.pt")
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, strict=True)


SCRIPT_OBJECT = b"c__torch__.some.place\nModel\n)\x81"  # an object; "}(...ub" gives it its attributes


def test_code_in_a_torchscript_archive_is_not_run(tmp_path):
    target = tmp_path / "executed"
    attack = pickle.dumps(Attack(target), 2)[2:-1]
    program = {"constants.pkl": b"", "code/__torch__/some/place.py": f"import os; os.system('touch {target}')"}
    for name, pickled in {
        "attribute": SCRIPT_OBJECT + b"}(Vweight\n" + attack + b"ub.",
        "state": SCRIPT_OBJECT + attack + b"b.",
        "type_tag": b"ctorch.jit._pickle\nrestore_type_tag\n(" + attack + b"Vint\ntR.",
        "other_name": b"ctorch.jit._pickle\ndef_unpickler\n.",
        "module": b"ctorch.jit._pickle.os\nsystem\n.",
    }.items():
        path = zip_pth(tmp_path / f"{name}.pt", b"\x80\x02" + pickled, **program)
        with pytest.raises(InputError, match=r"only plain tensors are read, and no code from a file is run"):
            read_state_dict(path)
    for name, pickled in {
        "called": b"c__torch__.os\nsystem\n(Vtouch " + str(target).encode() + b"\ntR.",
        "list_as_state": SCRIPT_OBJECT + b"]b.",
        "two_states": SCRIPT_OBJECT + b"N}(Vstate_dict\nVmine\nu\x86b.",
        "class_itself": b"c__torch__\nModel\n}(Vstate_dict\nVmine\nub.",
        "no_state": SCRIPT_OBJECT + b".",
    }.items():
        path = zip_pth(tmp_path / f"{name}.pt", b"\x80\x02" + pickled, **program)
        with pytest.raises(InputError, match="truncated or damaged"):
            read_state_dict(path)
    assert not target.exists()

    itself = SCRIPT_OBJECT + b"q\x00}(Vself\nh\x00Vname\nVinner\nub."
    assert read_state_dict(zip_pth(tmp_path / "itself.pt", b"\x80\x02" + itself, **program)) == {}
    within = b"}(Vx\n" + SCRIPT_OBJECT + b"}bu."
    with pytest.raises(InputError, match="its entry 'x' is a _ScriptModule"):
        read_state_dict(zip_pth(tmp_path / "within.pt", b"\x80\x02" + within))


@pytest.mark.extras
def test_the_legacy_format_is_read_and_its_damage_noticed(tmp_path):
    legacy = save_pth(tiny_state(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    found, expected = read_state_dict(legacy), tiny_state()
    assert set(found) == set(expected)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
    content = legacy.read_bytes()
    for keep in (len(content) - 1, len(content) // 2, 40):
        legacy.write_bytes(content[:keep])
        with pytest.raises(InputError, match="truncated or damaged"):
            read_state_dict(legacy)
    legacy.write_bytes(pickle.dumps({}, 2) * 5)
    with pytest.raises(InputError, match="not written by torch.save"):
        read_state_dict(legacy)


@pytest.mark.parametrize(
    ("pickled", "complaint"),
    [
        (b"}r\xff\xff\xff\x3f.", None),  # an entry number for which Python's unpickler takes 17 GB
        (b"}p1000000000\n.", None),
        (b"}Vx\nK\x02s" + b")" + b"\x85" * 300_000 + b"K\x01s.", "entry 'x'"),  # to hash that key overruns the C stack
        (b"ccollections\nOrderedDict\n(((K\x01K\x01K\x01lltR.", "too many values to unpack"),
        (b"}Vx\n" + b")" + b"\x85" * 100_000 + b"s.", "its entry 'x' is a tuple"),
        (b"\x8d" + b"\xff" * 7 + b"\x7fx.", "truncated or damaged"),
        (b"I" + b"9" * 5000 + b"\n.", "truncated or damaged"),
        (b"ios\nsystem\n.", "the instruction (INST|MARK)|damaged"),
        (b"\x82\x01.", "the instruction EXT1, which no state dict needs"),
        (b"\x92.", "the instruction NEWOBJ_EX, which no state dict needs"),
        (b"}}b}Vstate_dict\nNsb0", "truncated or damaged"),
    ],
)
def test_programs_that_cost_memory_or_crash(tmp_path, pickled, complaint):
    path = zip_pth(tmp_path / "weights.pth", pickled)
    started = time.process_time()
    if complaint is None:
        tracemalloc.start()
        assert read_state_dict(path) == {}
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()
    else:
        with pytest.raises(InputError, match=complaint) as caught:
            read_state_dict(path)
        assert len(str(caught.value)) < 1000
    assert time.process_time() - started < 30


def test_modules_within_modules_without_end(tmp_path):
    depth = 2000
    pickled = b"".join(SCRIPT_OBJECT + b"}Vm\n" for _ in range(depth)) + b"N" + b"sb" * depth + b"."
    path = zip_pth(tmp_path / "weights.pt", b"\x80\x02" + pickled)
    with pytest.raises(InputError, match="truncated or damaged .modules within modules without end"):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_files_that_would_expand_to_gigabytes(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"}.")
        for i in range(3):
            archive.writestr(f"a/data/{i}", bytes(10_000_000))
    assert path.stat().st_size < 50_000
    with pytest.raises(
        InputError, match=r"has [\d,]+ bytes and would expand to 30,000,002: it is damaged or malicious"
    ):
        read_state_dict(path)


def test_npz_with_pickled_objects_is_refused(tmp_path):
    target = tmp_path / "executed"
    buffer = io.BytesIO()
    np.savez(buffer, x=np.array([Attack(target)], dtype=object))
    (tmp_path / "weights.npz").write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=r"weights\.npz"):
        load_weights(tmp_path / "weights.npz", TINY, 32)
    assert not target.exists()


def test_weights_hash(tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "weights.pth").write_bytes(content)
    assert weights_hash(tmp_path / "weights.pth") == hashlib.sha256(content).hexdigest()
    with pytest.raises(InputError, match="cannot read the weights file .*absent"):
        weights_hash(tmp_path / "absent")


def test_real_mobilenet_weights_are_all_used():
    if not REAL_WEIGHTS.is_file():
        pytest.skip(f"{REAL_WEIGHTS} is absent: set MLFSIC_SHARED to the folder that holds weights/")
    variables = load_weights(REAL_WEIGHTS, "mobilenet_v2", 224)
    stored = load_file(REAL_WEIGHTS)
    assert len(jax.tree.leaves(variables)) == len(stored) == 260
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == sum(array.size for array in stored.values())
    np.testing.assert_array_equal(variables["batch_stats"]["features_18_1"]["var"], stored["features.18.1.running_var"])
