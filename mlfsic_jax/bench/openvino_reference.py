"""MobileNetV2 in OpenVINO, on a CPU, for comparison; imported only where OpenVINO is installed."""

import sys
from collections.abc import Callable

import numpy as np

from mlfsic_jax.backbones.mobilenet import MobileNetV2
from mlfsic_jax.run.inputs import PhotoBackbone

sys.modules["openvino_telemetry"] = None  # else the import reports to its makers, from a fork of this process
import openvino  # noqa: E402
from openvino import opset13 as op  # noqa: E402

_NHWC, _NCHW = np.array([0, 2, 3, 1]), np.array([0, 3, 1, 2])


def features(backbone: PhotoBackbone, variables, photos: np.ndarray) -> Callable[[], np.ndarray]:
    """A program of the same weights: photos uint8 [B, H, W, 3], one at a time on each core -> float32 [B, h, w, n]."""
    graph = network(backbone, variables, photos.shape[1])
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"}
    queue, found = openvino.AsyncInferQueue(openvino.compile_model(graph, "CPU", hints)), [None] * len(photos)
    queue.set_callback(lambda request, i: found.__setitem__(i, request.get_output_tensor().data.copy()))

    def run() -> np.ndarray:
        for i in range(len(photos)):
            queue.start_async({0: photos[i : i + 1]}, i)
        queue.wait_all()
        return np.concatenate(found)

    return run


def network(backbone: PhotoBackbone, variables, size: int) -> openvino.Model:
    """The graph of ``MobileNetV2`` for one photo, its batch norms folded into the convolutions."""
    params, statistics = ({**variables[name]["network"]} for name in ("params", "batch_stats"))
    photo = op.parameter([1, size, size, 3], np.uint8)
    mean, std = (255 * np.float32(values).reshape(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    x = op.divide(op.subtract(op.transpose(op.convert(photo, "f32"), _NCHW), mean), std)
    x = _layer(x, params, statistics, "features_0_0", "features_0_1", 2)
    number = 1
    for expansion, _, repeats, first_stride in MobileNetV2.stages:
        for stride in (first_stride, *[1] * (repeats - 1)):
            own, shortcut, k = (params[f"features_{number}"], statistics[f"features_{number}"]), x, 0
            if expansion != 1:
                x, k = _layer(x, *own, "conv_0_0", "conv_0_1"), 1
            x = _layer(x, *own, f"conv_{k}_0", f"conv_{k}_1", stride)
            x = _layer(x, *own, f"conv_{k + 1}", f"conv_{k + 2}", relu=False)
            same = stride == 1 and x.get_output_shape(0) == shortcut.get_output_shape(0)
            x, number = op.add(x, shortcut) if same else x, number + 1
    x = _layer(x, params, statistics, f"features_{number}_0", f"features_{number}_1")
    return openvino.Model([op.transpose(x, _NHWC)], [photo])


def _layer(x, params, statistics, conv: str, norm: str, stride: int = 1, relu: bool = True):
    """Convolution, batch norm and ReLU6: [1, c, h, w] -> [1, n, h, w]."""
    scale = np.asarray(params[norm]["scale"]) / np.sqrt(np.asarray(statistics[norm]["var"]) + 1e-5)
    shift = np.asarray(params[norm]["bias"]) - np.asarray(statistics[norm]["mean"]) * scale
    kernel = np.ascontiguousarray((np.asarray(params[conv]["kernel"]) * scale).transpose(3, 2, 0, 1))  # [n, c, k, k]
    options = [stride] * 2, [kernel.shape[-1] // 2] * 2, [kernel.shape[-1] // 2] * 2, [1, 1]
    if x.get_output_shape(0)[1] == kernel.shape[1]:
        x = op.convolution(x, kernel, *options)
    else:  # each channel by itself
        x = op.group_convolution(x, kernel[:, None], *options)
    x = op.add(x, shift.reshape(1, -1, 1, 1))
    return op.clamp(x, 0.0, 6.0) if relu else x
