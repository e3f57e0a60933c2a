"""The same computations in plain batched PyTorch, on a CPU, for comparison; imported only where PyTorch is installed.

``lcm``, ``prototypes``, ``convolution``, ``training`` and ``features`` return programs by name, called with nothing.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.core.prototypes import Prototypes

Programs = dict[str, Callable[[], None]]


def lcm(features, labels, words, projection, steps: int) -> Programs:
    """``lcm_select`` with its weighted mean as written, and as an einsum.

    float [S, h, w, n], bool [S, C], float [C, d], float [n, d] or None.
    """
    u, w, y = as_tensor(features).flatten(1, 2), as_tensor(words), as_tensor(labels).float()
    a = None if projection is None else as_tensor(projection)

    def run(einsum: bool) -> None:
        loss_change(u if a is None else u @ a, y, w, steps=steps, einsum=einsum)

    return {"equations": lambda: run(False), "einsum": lambda: run(True)}


def loss_change(u, labels, words, *, scale=10.0, steps=20, step_size=1.0, momentum=0.95, einsum=False):
    """``lcm.loss_change``: tensors [S, L, d], [S, C], [C, d] -> (score, importance), [S, L]."""
    rho, score, words = torch.ones(u.shape[:2]), torch.zeros(u.shape[:2]), functional.normalize(words, dim=1)
    for i in range(1, steps + 1):
        rho.requires_grad_(True)
        pooled = torch.einsum("sl,sld->sd", rho, u) / u.shape[1] if einsum else (rho[..., None] * u).mean(dim=1)
        logits = scale * functional.normalize(pooled, dim=1) @ words.T
        loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, rho)
        rho, alpha = rho.detach(), min(1 - 1 / (i + 1), momentum)
        score = alpha * score + (1 - alpha) * (rho * gradient).abs()
        rho = rho - step_size * gradient
        low, high = rho.amin(dim=1, keepdim=True), rho.amax(dim=1, keepdim=True)
        rho = (rho - low) / (high - low)
        rho = torch.where(rho > 0, rho, torch.where(rho > 0, rho, 1.0).amin(dim=1, keepdim=True))
    return score, rho


def prototypes(module: Prototypes, params, regions, labels, words) -> Programs:
    """``Prototypes`` without gradients: Flax's parameters, float [S, L, d], bool [S, C], float [C, d]."""
    p, tensors = as_parameters(params), (as_tensor(regions), as_tensor(labels), as_tensor(words))
    return {"no_grad": torch.no_grad()(functools.partial(label_prototypes, module, p, *tensors))}


def label_prototypes(module: Prototypes | BaseModel, p, regions, labels, words, *, dropout: float = 0.0):
    """``Prototypes`` on tensors [S, L, d], [S, C], [C, d] -> [C, d], with parameters of ``as_parameters``.

    Every label needs ``module.n_dynamic`` support regions at least; ``dropout`` is inside the MLP.
    """
    (n_labels, d), heads = words.shape, module.n_heads
    flat, mask = regions.flatten(0, 1), labels.T.bool().repeat_interleave(regions.shape[1], dim=1)  # [M, d], [C, M]
    query = (words @ p["attention.query.kernel"]).reshape(n_labels, heads, d // heads)
    keys = flat.reshape(-1, heads, d // heads)
    logits = torch.einsum("chd,mhd->chm", query, keys) / (d / heads) ** 0.5
    attention = logits.masked_fill(~mask[:, None], -torch.inf).softmax(dim=-1)
    pooled = torch.einsum("chm,mhd->chd", attention, keys).reshape(n_labels, d)
    hidden = functional.gelu(pooled @ p["attention.mlp_1.kernel"] + p["attention.mlp_1.bias"])
    hidden = functional.dropout(hidden, dropout)
    attended = pooled + hidden @ p["attention.mlp_2.kernel"] + p["attention.mlp_2.bias"]

    theta_1 = (words @ p["dynamic.kernel_1.kernel"] + p["dynamic.kernel_1.bias"]).reshape(n_labels, d, -1)
    theta_2 = (words @ p["dynamic.kernel_2.kernel"] + p["dynamic.kernel_2.bias"]).reshape(n_labels, -1, d)
    similarity = functional.normalize(words, dim=1) @ functional.normalize(flat, dim=1).T
    top = similarity.masked_fill(~mask, -torch.inf).topk(module.n_dynamic, dim=1).indices

    def normalised(x, name: str):
        return functional.relu(functional.layer_norm(x, x.shape[-1:], p[f"{name}.scale"], p[f"{name}.bias"], 1e-6))

    u = normalised(torch.einsum("ckd,cde->cke", flat[top], theta_1), "dynamic.norm_1")
    return attended + normalised(torch.einsum("cke,ced->ckd", u, theta_2), "dynamic.norm_2").mean(dim=1)


def convolution(what: str, x, kernel, dy) -> dict[str, Callable[[], torch.Tensor]]:
    """One of ``functions.CONVOLUTIONS``, its arrays and result with their channels first."""
    x, dy = (as_tensor(a).permute(0, 3, 1, 2).contiguous() for a in (x, dy))
    kernel = as_tensor(kernel).permute(3, 2, 0, 1).contiguous()
    run = {
        "forward": lambda: functional.conv2d(x, kernel, padding=1),
        "to its input": lambda: nn.grad.conv2d_input(x.shape, kernel, dy, padding=1),
        "to its kernel": lambda: nn.grad.conv2d_weight(x, kernel.shape, dy, padding=1),
    }
    return {"conv2d": torch.no_grad()(run[what])}


def training(model: BaseModel, params, batch, word_vectors, backbone: str = "") -> Programs:
    """A step of Adam on one episode, from cached features or, with a ``backbone`` of ``network``, from photos.

    ``params`` are the model's without the backbone's, ``batch`` is a ``run.step.Batch``, word vectors are [C, d_w].
    """
    trained = network(backbone) if backbone else None
    if backbone and trained is None:
        return {}
    p, words = as_parameters(params), as_tensor(word_vectors)
    support, query, *labels = map(as_tensor, batch)
    if trained:
        trained.train()
        support, query = (x.permute(0, 3, 1, 2).contiguous() for x in (support, query))
    parameters = [*p.values(), *(trained.parameters() if trained else ())]
    optimizer = torch.optim.Adam([x.requires_grad_(True) for x in parameters], lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        sum(losses(model, p, support, query, *labels, words, trained)).backward()
        optimizer.step()

    return {"Adam": run}


def losses(model: BaseModel, p, support, query, support_labels, query_labels, word_vectors, trained=None):
    """``BaseModel.losses`` on tensors, photos with their channels first -> (L_cm, L_query)."""
    both = torch.cat([support, query]).float()
    features = both if trained is None else trained(both / 127.5 - 1).permute(0, 2, 3, 1)
    regions = features.flatten(1, 2) @ p["joint.a_visual.kernel"]
    words = word_vectors @ p["joint.a_text.kernel"]
    pooled, n_support = functional.normalize(regions.mean(dim=1), dim=1), len(support)
    own = {name.removeprefix("prototype."): value for name, value in p.items()}
    of_labels = label_prototypes(model, own, regions[:n_support], support_labels, words, dropout=model.dropout)

    def loss(images, rows, labels):
        logits = model.scale * images @ functional.normalize(rows, dim=1).T
        return functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")

    return loss(pooled[:n_support], words, support_labels), loss(pooled[n_support:], of_labels, query_labels)


def features(name: str, photos: np.ndarray) -> Programs:
    """A backbone of the same shape without gradients, on uint8 [B, H, W, 3]."""
    frozen, x = network(name), as_tensor(photos).permute(0, 3, 1, 2).contiguous()
    if frozen is None:
        return {}
    frozen.eval()
    return {"no_grad": torch.no_grad()(lambda: frozen(x.float() / 127.5 - 1))}


def network(name: str) -> nn.Module | None:
    """Conv-4-64, or ResNet-50 where transformers is installed, else None: [B, 3, H, W] -> [B, n, h, w]."""
    if name == "conv4":
        layers = []
        for n_in in (3, 64, 64, 64):
            layers += [nn.Conv2d(n_in, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers)
    if name != "resnet50" or importlib.util.find_spec("transformers") is None:
        return None
    from transformers import ResNetConfig, ResNetModel

    class ResNet50(ResNetModel):
        def forward(self, x):
            return super().forward(x).last_hidden_state

    return ResNet50(ResNetConfig())


def as_tensor(x) -> torch.Tensor:
    """An array as a tensor with memory of its own."""
    return torch.from_numpy(np.array(x))


def as_parameters(params) -> dict[str, Any]:
    """Flax's parameters as tensors, by their names joined with dots."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(key.key for key in path): as_tensor(leaf) for path, leaf in leaves}
