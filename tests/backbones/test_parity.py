"""Every backbone against the same architecture in PyTorch, with the same random weights and running statistics.

The error is the largest absolute difference relative to the largest value of the map. Both sides compute in float32 and
differ only in the order of summation, about 4e-6 after fifty layers; 1e-4 leaves room for other CPUs, while an image
shifted by one pixel shows as 0.1 to 1 and batch norm's epsilon 1e-3 in place of 1e-5 as 1e-2.
"""

import jax
import numpy as np
import pytest

from mlfsic_jax.backbones import BACKBONES, Conv4, MobileNetV2, ResNet, create
from mlfsic_jax.backbones.pretrained import to_variables
from mlfsic_jax.errors import InputError

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

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
    return to_variables({key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}, module, 64)


def maps_of_both(model, module, images):
    """Local maps [B, h, w, n] of the PyTorch model and of the Linen module, in evaluation mode."""
    randomise(model).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
    return expected, np.asarray(jax.jit(module.apply)(variables_of(model, module), images))


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
    ],
    ids=["conv4", "resnet", "mobilenet"],
)
def test_tiny_backbones_agree_with_pytorch(model, module, size):
    expected, actual = maps_of_both(model, module, random_images(2, *size))
    assert error(actual, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "model", "n_features"), [("resnet50", TorchResNet, 2048), ("mobilenet_v2", TorchMobileNetV2, 1280)]
)
def test_full_backbones_agree_with_pytorch_at_224(name, model, n_features):
    expected, actual = maps_of_both(model(), create(name), random_images(1, 224, 224))
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


@pytest.mark.parametrize(
    ("name", "shape"), [("conv4", (2, 14, 14, 64)), ("resnet50", (2, 7, 7, 2048)), ("mobilenet_v2", (2, 7, 7, 1280))]
)
def test_every_backbone_of_the_table_maps_224(name, shape):
    module, images = create(name), jax.ShapeDtypeStruct((2, 224, 224, 3), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    local = jax.eval_shape(module.apply, variables, images)
    assert (local.shape, local.dtype) == (shape, np.float32)
    assert set(variables) == {"params", "batch_stats"}


def test_table_names_its_backbones():
    assert set(BACKBONES) == {"conv4", "resnet50", "mobilenet_v2"}
    with pytest.raises(InputError, match="'resnet5'.*conv4, mobilenet_v2, resnet50"):
        create("resnet5")


def test_conv4_refuses_images_without_a_location_left():
    with pytest.raises(ValueError, match="at least 16x16 pixels, got 32x15"):
        jax.eval_shape(Conv4().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 15, 3), np.float32))
