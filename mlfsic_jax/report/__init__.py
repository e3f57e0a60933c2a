"""A finished run as one self-contained page."""

from mlfsic_jax.report.page import write_report

__all__ = ["write_report"]
