"""Multi-label few-shot image classification in JAX: the Base and LCM models, their episodes and evaluation."""

import importlib

_HOMES = {
    "Episode": "core.episodes",
    "sample_episode": "core.episodes",
    "LCMSelection": "core.lcm",
    "lcm_select": "core.lcm",
    "multilabel_metrics": "core.metrics",
    "create_backbone": "backbones",
    "evaluate": "run.evaluate",
    "fit": "run.classifier",
    "load": "run.ready",
}
__all__ = [*_HOMES, "methods"]
__version__ = "0.1.0"


def __getattr__(name: str):  # PEP 562: importing the package costs next to nothing
    if name == "methods":
        return importlib.import_module("mlfsic_jax.methods")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return __all__
