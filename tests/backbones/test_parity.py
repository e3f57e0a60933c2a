"""Every backbone against the same architecture in PyTorch, with the same random weights and running statistics.

The error is the largest absolute difference relative to the largest value of the map. Both sides compute in float32 and
differ only in the order of summation, about 4e-6 after fifty layers; 1e-4 leaves room for other CPUs, while an image
shifted by one pixel shows as 0.1 to 1 and batch norm's epsilon 1e-3 in place of 1e-5 as 1e-2.
"""

import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from mlfsic_jax.backbones import ClipResNet, Conv4, EfficientNetLite, InceptionV3, MobileNetV2, ResNet, create_backbone
from mlfsic_jax.backbones.weights import load_weights, to_variables

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

pytestmark = pytest.mark.extras

TOLERANCE = 1e-4


class TorchConv4(nn.Module):
    def __init__(self, width=64):
        super().__init__()

        def block(n_in):
            return nn.Sequential(
                nn.Conv2d(n_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
            )

        self.encoder = nn.Sequential(block(3), block(width), block(width), block(width))

    def forward(self, x):
        return self.encoder(x)


class TorchBottleneck(nn.Module):
    def __init__(self, n_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or n_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(n_in, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class TorchResNet(nn.Module):
    def __init__(self, stage_sizes=(3, 4, 6, 3), width=64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm2d(width), nn.MaxPool2d(3, stride=2, padding=1)
        n_in, self.stages = width, len(stage_sizes)
        for stage, n_blocks in enumerate(stage_sizes):
            blocks = []
            for block in range(n_blocks):
                blocks.append(TorchBottleneck(n_in, width * 2**stage, 2 if stage > 0 and block == 0 else 1))
                n_in = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(n_in, 10)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return x


def torch_conv_bn_relu6(n_in, n_out, kernel, stride=1, groups=1):
    conv = nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU6())


class TorchInvertedResidual(nn.Module):
    def __init__(self, n_in, n_out, expansion, stride):
        super().__init__()
        hidden = n_in * expansion
        self.shortcut = stride == 1 and n_in == n_out
        self.conv = nn.Sequential(
            *([torch_conv_bn_relu6(n_in, hidden, 1)] if expansion != 1 else []),
            torch_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, n_out, 1, bias=False),
            nn.BatchNorm2d(n_out),
        )

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


FULL_STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
TINY_STAGES = ((1, 8, 1, 1), (2, 16, 2, 2), (3, 24, 2, 2), (2, 24, 1, 1))
WIDE_STAGES = ((1, 32, 1, 1), (2, 64, 2, 2), (3, 96, 2, 2), (2, 96, 1, 1))  # the same at a quarter of the width


class TorchMobileNetV2(nn.Module):
    def __init__(self, stem=32, stages=FULL_STAGES, last=1280):
        super().__init__()
        layers, n_in = [torch_conv_bn_relu6(3, stem, 3, stride=2)], stem
        for expansion, n_out, repeats, stride in stages:
            for repeat in range(repeats):
                layers.append(TorchInvertedResidual(n_in, n_out, expansion, stride if repeat == 0 else 1))
                n_in = n_out
        self.features = nn.Sequential(*layers, torch_conv_bn_relu6(n_in, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, 10))

    def forward(self, x):
        return self.features(x)


class TorchSameConv(nn.Conv2d):
    """Padded so that every side n becomes ceil(n / stride), an odd pixel below and to the right, as in TensorFlow."""

    def forward(self, x):
        padding = []
        for side in (3, 2):
            n, k, stride = x.shape[side], self.kernel_size[side - 2], self.stride[side - 2]
            total = max((-(-n // stride) - 1) * stride + k - n, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(nn.functional.pad(x, padding))


class TorchLiteBlock(nn.Module):
    def __init__(self, n_in, n_out, expansion, stride, kernel):
        super().__init__()
        hidden, layers = n_in * expansion, []
        if expansion != 1:
            layers.append(("conv_pw", nn.Conv2d(n_in, hidden, 1, bias=False)))
        layers.append(("conv_dw", TorchSameConv(hidden, hidden, kernel, stride, groups=hidden, bias=False)))
        layers.append(("conv_pw" if expansion == 1 else "conv_pwl", nn.Conv2d(hidden, n_out, 1, bias=False)))
        self.names, self.shortcut = [name for name, _ in layers], stride == 1 and n_in == n_out
        for i, (name, conv) in enumerate(layers, 1):
            self.add_module(name, conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(conv.out_channels, eps=1e-3))

    def forward(self, x):
        y = x
        for i, name in enumerate(self.names, 1):
            y = getattr(self, f"bn{i}")(getattr(self, name)(y))
            y = y if i == len(self.names) else nn.functional.relu6(y)
        return x + y if self.shortcut else y


# Rows of (expansion, channels, repeats, stride, kernel). The small one in Linen has width 1.3 and depth 1.5.
TINY_LITE = ((1, 16, 1, 1, 3), (2, 24, 3, 2, 5), (3, 32, 2, 2, 3), (2, 24, 2, 1, 5), (2, 40, 1, 2, 3))
TINY_LITE_UNSCALED = ((1, 12, 1, 1, 3), (2, 14, 2, 2, 5), (3, 24, 1, 2, 3), (2, 20, 1, 1, 5), (2, 32, 1, 2, 3))
LITES = {  # channels and repeats of the published networks
    "efficientnet_lite0": ((16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    "efficientnet_lite1": ((16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)),
    "efficientnet_lite2": ((16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
    "efficientnet_lite3": ((24, 32, 48, 96, 136, 232, 384), (1, 3, 3, 5, 5, 6, 1)),
    "efficientnet_lite4": ((24, 32, 56, 112, 160, 272, 448), (1, 4, 4, 6, 6, 8, 1)),
}


class TorchEfficientNetLite(nn.Module):
    def __init__(self, stages, last=1280):
        super().__init__()
        self.conv_stem, self.bn1 = TorchSameConv(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        n_in, blocks = 32, []
        for expansion, n_out, repeats, stride, kernel in stages:
            sizes = [(n_in, n_out, expansion, stride, kernel)] + [(n_out, n_out, expansion, 1, kernel)] * (repeats - 1)
            blocks.append(nn.Sequential(*[TorchLiteBlock(*size) for size in sizes]))
            n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn2 = nn.Conv2d(n_in, last, 1, bias=False), nn.BatchNorm2d(last, eps=1e-3)
        self.classifier = nn.Linear(last, 10)

    def forward(self, x):
        x = self.blocks(nn.functional.relu6(self.bn1(self.conv_stem(x))))
        return nn.functional.relu6(self.bn2(self.conv_head(x)))


def full_lite(name):
    expansions, strides, kernels = (1, 6, 6, 6, 6, 6, 6), (1, 2, 2, 2, 1, 2, 1), (3, 3, 5, 3, 5, 5, 3)
    channels, repeats = LITES[name]
    return TorchEfficientNetLite(zip(expansions, channels, repeats, strides, kernels, strict=True))


class TorchUnit(nn.Module):
    def __init__(self, n_in, n_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(n_out, eps=1e-3)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class TorchMixed(nn.Module):
    """An Inception block from a table: name -> (input, features, kernel, stride), and the maps to concatenate."""

    def __init__(self, n_in, table, outputs, scale):
        super().__init__()
        self.table, self.outputs, channels = table, outputs, {"x": n_in, "avg": n_in, "max": n_in}
        for name, (source, features, kernel, stride) in table.items():
            kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
            padding = tuple(side // 2 if stride == 1 else 0 for side in kernel)
            channels[name] = features // scale
            self.add_module(name, TorchUnit(channels[source], channels[name], kernel, stride, padding))
        self.n_out = sum(channels[name] for name in outputs)

    def forward(self, x):
        maps = {"x": x, "avg": nn.functional.avg_pool2d(x, 3, stride=1, padding=1)}
        if "max" in self.outputs:
            maps["max"] = nn.functional.max_pool2d(x, 3, stride=2)
        for name, (source, *_) in self.table.items():
            maps[name] = getattr(self, name)(maps[source])
        return torch.cat([maps[name] for name in self.outputs], 1)


def inception_table(kind, n):
    row, column = (1, 7), (7, 1)
    double = {
        "branch3x3dbl_1": ("x", 64, 1, 1),
        "branch3x3dbl_2": ("branch3x3dbl_1", 96, 3, 1),
        "branch3x3dbl_3": ("branch3x3dbl_2", 96, 3, 2 if kind == "B" else 1),
    }
    if kind == "A":
        table = {"branch1x1": ("x", 64, 1, 1), "branch5x5_1": ("x", 48, 1, 1), "branch5x5_2": ("branch5x5_1", 64, 5, 1)}
        table |= {**double, "branch_pool": ("avg", n, 1, 1)}
        return table, ["branch1x1", "branch5x5_2", "branch3x3dbl_3", "branch_pool"]
    if kind == "B":
        return {"branch3x3": ("x", 384, 3, 2), **double}, ["branch3x3", "branch3x3dbl_3", "max"]
    if kind == "C":
        table = {"branch1x1": ("x", 192, 1, 1), "branch7x7_1": ("x", n, 1, 1)}
        table |= {"branch7x7_2": ("branch7x7_1", n, row, 1), "branch7x7_3": ("branch7x7_2", 192, column, 1)}
        table |= {"branch7x7dbl_1": ("x", n, 1, 1), "branch7x7dbl_2": ("branch7x7dbl_1", n, column, 1)}
        table |= {"branch7x7dbl_3": ("branch7x7dbl_2", n, row, 1), "branch7x7dbl_4": ("branch7x7dbl_3", n, column, 1)}
        table |= {"branch7x7dbl_5": ("branch7x7dbl_4", 192, row, 1), "branch_pool": ("avg", 192, 1, 1)}
        return table, ["branch1x1", "branch7x7_3", "branch7x7dbl_5", "branch_pool"]
    if kind == "D":
        table = {"branch3x3_1": ("x", 192, 1, 1), "branch3x3_2": ("branch3x3_1", 320, 3, 2)}
        table |= {"branch7x7x3_1": ("x", 192, 1, 1), "branch7x7x3_2": ("branch7x7x3_1", 192, row, 1)}
        table |= {"branch7x7x3_3": ("branch7x7x3_2", 192, column, 1), "branch7x7x3_4": ("branch7x7x3_3", 192, 3, 2)}
        return table, ["branch3x3_2", "branch7x7x3_4", "max"]
    table = {"branch1x1": ("x", 320, 1, 1), "branch3x3_1": ("x", 384, 1, 1)}
    table |= {f"branch3x3_2{fork}": ("branch3x3_1", 384, k, 1) for fork, k in (("a", (1, 3)), ("b", (3, 1)))}
    table |= {"branch3x3dbl_1": ("x", 448, 1, 1), "branch3x3dbl_2": ("branch3x3dbl_1", 384, 3, 1)}
    table |= {f"branch3x3dbl_3{fork}": ("branch3x3dbl_2", 384, k, 1) for fork, k in (("a", (1, 3)), ("b", (3, 1)))}
    table |= {"branch_pool": ("avg", 192, 1, 1)}
    forks = [f"{branch}{fork}" for branch in ("branch3x3_2", "branch3x3dbl_3") for fork in "ab"]
    return table, ["branch1x1", *forks, "branch_pool"]


class TorchInception(nn.Module):
    STEM = (
        *(("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3, 1, 1), "max"),
        *(("Conv2d_3b_1x1", 80, 1, 1, 0), ("Conv2d_4a_3x3", 192, 3, 1, 0), "max"),
    )
    BLOCKS = (
        *(("5b", "A", 32), ("5c", "A", 64), ("5d", "A", 64), ("6a", "B", None), ("6b", "C", 128), ("6c", "C", 160)),
        *(("6d", "C", 160), ("6e", "C", 192), ("7a", "D", None), ("7b", "E", None), ("7c", "E", None)),
    )

    def __init__(self, scale=1):
        super().__init__()
        n = 3
        for layer in self.STEM:
            if layer != "max":
                name, features, *rest = layer
                self.add_module(name, TorchUnit(n, features // scale, *rest))
                n = features // scale
        for name, kind, number in self.BLOCKS:
            block = TorchMixed(n, *inception_table(kind, number), scale)
            self.add_module(f"Mixed_{name}", block)
            n = block.n_out
        self.AuxLogits, self.fc = nn.Sequential(TorchUnit(768 // scale, 8, 1)), nn.Linear(n, 10)

    def forward(self, x):
        for layer in self.STEM:
            x = nn.functional.max_pool2d(x, 3, stride=2) if layer == "max" else getattr(self, layer[0])(x)
        for name, *_ in self.BLOCKS:
            x = getattr(self, f"Mixed_{name}")(x)
        return x


class TorchClipBottleneck(nn.Module):
    def __init__(self, n_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(stride)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or n_in != 4 * width:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(n_in, 4 * width, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.pool(torch.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class TorchClipResNet(nn.Module):
    def __init__(self, stage_sizes, width):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        n_in, stages = width, []
        for stage, n_blocks in enumerate(stage_sizes):
            blocks = []
            for block in range(n_blocks):
                blocks.append(TorchClipBottleneck(n_in, width * 2**stage, 2 if stage > 0 and block == 0 else 1))
                n_in = 4 * width * 2**stage
            stages.append(nn.Sequential(*blocks))
            self.add_module(f"layer{stage + 1}", stages[-1])
        self.stages = [f"layer{stage + 1}" for stage in range(len(stages))]
        self.attnpool = nn.Linear(n_in, 4)

    def forward(self, x):
        for layer in ("1", "2", "3"):
            x = torch.relu(getattr(self, f"bn{layer}")(getattr(self, f"conv{layer}")(x)))
        x = nn.functional.avg_pool2d(x, 2)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x


class TorchClip(nn.Module):
    """As much of CLIP as its files hold: the image encoder, a text encoder, and numbers kept as buffers."""

    def __init__(self, stage_sizes=(3, 4, 6, 3), width=64):
        super().__init__()
        self.visual, self.transformer = TorchClipResNet(stage_sizes, width), nn.Linear(2, 2)
        self.token_embedding, self.ln_final = nn.Embedding(3, 2), nn.LayerNorm(2)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            self.register_parameter(name, nn.Parameter(torch.zeros(2)))
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(7))

    def forward(self, x):
        return self.visual(x)


def randomise(model, seed=0):
    """Draw weights and running statistics so that a mix-up of any two would show.

    The variances are above 1 on purpose: with smaller ones a deep random network is chaotic, and magnifies rounding to
    the size of the tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if tensor.ndim == 4:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
            elif name.endswith("running_var"):
                tensor.uniform_(1, 2, generator=generator)
            elif name.endswith("weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0, 0.2, generator=generator)
    return model


def variables_of(model, module):
    return to_variables({key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}, module, 96)


def maps_of_both(model, module, images):
    """Local maps [B, h, w, n] of the PyTorch model and of the Linen module, in evaluation mode."""
    randomise(model).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    return expected, np.asarray(jax.jit(module.apply)(variables_of(model, module), images))


def keys_and_shapes(module):
    """PyTorch's names of a backbone's arrays and their shapes there, by the rule that ``pretrained`` states."""
    variables = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 96, 96, 3), np.float32))
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    found = {}
    for (_, *path, leaf), value in traverse_util.flatten_dict(variables).items():
        path = [part.replace("__", "~").replace("_", ".").replace("~", "_") for part in path]
        key = getattr(module, "key_prefix", "") + ".".join([*path, names.get(leaf, leaf)])
        found[key] = tuple(value.shape[axis] for axis in (3, 2, 0, 1)) if value.ndim == 4 else value.shape
    return found


def error(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(expected).max() > 0
    return np.abs(actual - expected).max() / np.abs(expected).max()


def random_images(batch, height, width):
    return np.random.default_rng(0).standard_normal((batch, height, width, 3)).astype(np.float32)


@pytest.mark.parametrize("size", [(64, 64), (51, 70)])  # odd sides tell where a strided layer pads
@pytest.mark.parametrize(
    ("model", "module"),
    [
        (TorchConv4(width=8), Conv4(width=8)),
        (TorchResNet((1, 2, 1), width=8), ResNet(stage_sizes=(1, 2, 1), width=8)),
        (TorchMobileNetV2(8, TINY_STAGES, 40), MobileNetV2(width=0.25, stages=WIDE_STAGES, last_features=40)),
        (TorchClip((1, 2, 1), width=8), ClipResNet(stage_sizes=(1, 2, 1), width=8)),
        (TorchEfficientNetLite(TINY_LITE, 40), EfficientNetLite(1.3, 1.5, TINY_LITE_UNSCALED, last_features=40)),
    ],
    ids=["conv4", "resnet", "mobilenet", "clip_resnet", "efficientnet_lite"],
)
def test_tiny_backbones_agree_with_pytorch(model, module, size):
    expected, actual = maps_of_both(model, module, random_images(2, *size))
    assert error(actual, expected) < TOLERANCE


def test_tiny_inception_agrees_with_pytorch():
    expected, actual = maps_of_both(TorchInception(scale=16), InceptionV3(width=1 / 16), random_images(2, 107, 140))
    assert actual.shape == (2, 2, 3, 128)
    assert error(actual, expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_float16_torchscript_archive_of_clip_is_imported(tmp_path):
    model = randomise(TorchClip((1, 2, 1), width=8)).eval()
    script = torch.jit.trace(model, torch.zeros(1, 3, 32, 32))
    script.half().save(tmp_path / "RN50.pt")
    model.half()
    module = ClipResNet(stage_sizes=(1, 2, 1), width=8)
    variables = load_weights(tmp_path / "RN50.pt", module)
    jax.tree.map(np.testing.assert_array_equal, variables, variables_of(model, module))
    torch.save(model.state_dict(), tmp_path / "RN50_state.pt")
    jax.tree.map(np.testing.assert_array_equal, variables, load_weights(tmp_path / "RN50_state.pt", module))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *[("inception_v3", TorchInception), ("clip_resnet50", TorchClip), ("resnet50", TorchResNet)],
        *[(name, functools.partial(full_lite, name)) for name in LITES],
    ],
)
def test_full_backbones_have_the_published_keys_and_shapes(name, model):
    with torch.device("meta"):
        state = model().state_dict()
    module = create_backbone(name)
    expected = {
        key: tuple(tensor.shape)
        for key, tensor in state.items()
        if not key.startswith(module.head_prefixes) and not key.endswith("num_batches_tracked")
    }
    assert keys_and_shapes(module) == expected


@pytest.mark.parametrize(
    ("name", "model", "n_features"), [("resnet50", TorchResNet, 2048), ("mobilenet_v2", TorchMobileNetV2, 1280)]
)
def test_full_backbones_agree_with_pytorch_at_224(name, model, n_features):
    expected, actual = maps_of_both(model(), create_backbone(name), random_images(1, 224, 224))
    assert actual.shape == (1, 7, 7, n_features)
    assert error(actual, expected) < TOLERANCE


def test_batch_statistics_in_training():
    model, module = randomise(TorchConv4(width=8)), Conv4(width=8)
    variables, images = variables_of(model, module), random_images(3, 32, 32)
    model.train()
    expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).detach().numpy().transpose(0, 2, 3, 1)
    actual, updated = jax.jit(lambda v, x: module.apply(v, x, True, mutable=["batch_stats"]))(variables, images)
    assert error(np.asarray(actual), expected) < TOLERANCE

    after = variables_of(model, module)["batch_stats"]
    before = variables["batch_stats"]
    for block in range(4):
        name = f"encoder_{block}_1"
        ours, theirs = updated["batch_stats"][name], after[name]
        np.testing.assert_allclose(ours["mean"], theirs["mean"], rtol=1e-4, atol=1e-5)
        # PyTorch adds a tenth of the unbiased variance, Flax of the biased one.
        count = 3 * (32 // 2**block) ** 2
        added = (theirs["var"] - 0.9 * before[name]["var"]) * (count - 1) / count
        np.testing.assert_allclose(ours["var"], 0.9 * before[name]["var"] + added, rtol=1e-4, atol=1e-5)


def test_evaluation_leaves_the_statistics_alone():
    module, images = Conv4(width=4), random_images(2, 16, 16)
    variables = variables_of(randomise(TorchConv4(width=4)), module)
    _, updated = module.apply(variables, images, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])


def test_conv4_refuses_images_without_a_location_left():
    with pytest.raises(ValueError, match="at least 16x16 pixels, got 32x15"):
        jax.eval_shape(Conv4().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 15, 3), np.float32))
