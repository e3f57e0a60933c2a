"""python -m mlfsic_jax.report --workdir=RUN."""

from mlfsic_jax.report.page import main

main()
