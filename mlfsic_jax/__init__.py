"""Multi-label few-shot image classification in JAX: the Base and LCM models, their episodes and evaluation."""

from mlfsic_jax.core.episodes import Episode, sample_episode
from mlfsic_jax.core.lcm import LCMSelection, lcm_select
from mlfsic_jax.core.metrics import multilabel_metrics

__all__ = ["Episode", "LCMSelection", "lcm_select", "multilabel_metrics", "sample_episode"]
__version__ = "0.1.0"
