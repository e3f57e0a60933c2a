"""What ``benchmark`` compares with: the same computations in plain batched PyTorch, on a CPU.

Every public function gives programs by name, to be called with nothing; none where PyTorch is not installed, or where
JAX runs on an accelerator.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mlfsic_jax.core.model import BaseModel
from mlfsic_jax.core.prototypes import Prototypes

if TYPE_CHECKING:
    import torch
    from torch import nn

Programs = dict[str, Callable[[], None]]


def is_comparable() -> bool:
    """Whether PyTorch is there and would run on the device that JAX runs on."""
    return importlib.util.find_spec("torch") is not None and jax.default_backend() == "cpu"


def lcm(features, labels, words, projection, steps: int) -> Programs:
    """``lcm_select``: the equations as they stand, with a weighted mean, and with that mean written as einsum.

    Args:
      features: float [S, h, w, n].
      labels: bool [S, C].
      words: float [C, d].
      projection: float [n, d] or None.
      steps: iterations.
    """
    if not is_comparable():
        return {}
    u, w, y = as_tensor(features).flatten(1, 2), as_tensor(words), as_tensor(labels).float()
    a = None if projection is None else as_tensor(projection)

    def run(einsum: bool) -> None:
        loss_change(u if a is None else u @ a, y, w, steps=steps, einsum=einsum)

    return {name: functools.partial(run, name == "einsum") for name in ("equations", "einsum")}


def loss_change(u, labels, words, *, scale=10.0, steps=20, step_size=1.0, momentum=0.95, einsum=False):
    """``lcm.loss_change``: tensors [S, L, d], [S, C], [C, d] -> (score, importance), [S, L]."""
    import torch
    from torch.nn import functional

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
    if not is_comparable():
        return {}
    import torch

    p, tensors = as_parameters(params), (as_tensor(regions), as_tensor(labels), as_tensor(words))

    def run() -> None:
        with torch.no_grad():
            label_prototypes(module, p, *tensors)

    return {"no_grad": run}


def label_prototypes(module: Prototypes | BaseModel, p, regions, labels, words, *, dropout: float = 0.0):
    """``Prototypes``, for supports with ``n_dynamic`` locals of every label at least: tensors as there -> [C, d].

    Args:
      module: its sizes.
      p: Flax's parameters as tensors, by their names joined with dots.
      regions: [S, L, d].
      labels: [S, C].
      words: [C, d].
      dropout: inside the MLP.
    """
    import torch
    from torch.nn import functional

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


def training(model: BaseModel, params, batch, word_vectors, backbone: str = "") -> Programs:
    """A step of Adam on one episode, from cached features or, with a ``backbone``, from photos.

    Args:
      model: its sizes.
      params: the model's, without the backbone's.
      batch: support, query, support labels, query labels of the episode.
      word_vectors: float [C, d_w].
      backbone: a name that ``network`` knows.
    """
    trained = network(backbone) if backbone and is_comparable() else None
    if not is_comparable() or (backbone and trained is None):
        return {}
    import torch

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
    """``BaseModel.losses``: tensors as there, photos with their channels first -> (L_cm, L_query)."""
    import torch
    from torch.nn import functional

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
    frozen = network(name) if is_comparable() else None
    if frozen is None:
        return {}
    import torch

    frozen.eval()
    x = as_tensor(photos).permute(0, 3, 1, 2).contiguous()

    def run() -> None:
        with torch.no_grad():
            frozen(x.float() / 127.5 - 1)

    return {"no_grad": run}


def network(name: str) -> nn.Module | None:
    """Conv-4-64, or ResNet-50 where transformers is installed, else None: [B, 3, H, W] -> [B, n, h, w]."""
    from torch import nn

    if name == "conv4":
        layers = [
            (nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2))
            for n_in, n_out in itertools.pairwise((3, 64, 64, 64, 64))
        ]
        return nn.Sequential(*itertools.chain(*layers))
    if name != "resnet50" or importlib.util.find_spec("transformers") is None:
        return None
    from transformers import ResNetConfig, ResNetModel

    class ResNet50(ResNetModel):
        def forward(self, x):
            return super().forward(x).last_hidden_state

    return ResNet50(ResNetConfig())


def as_tensor(x) -> torch.Tensor:
    """An array as a tensor with memory of its own."""
    import torch

    return torch.from_numpy(np.array(x))


def as_parameters(params) -> dict[str, Any]:
    """Flax's parameters as tensors, by their names joined with dots."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(key.key for key in path): as_tensor(leaf) for path, leaf in leaves}
