"""A model without its dataset: python -m mlfsic_jax.export --workdir=RUN --out=FOLDER."""

from mlfsic_jax.run.saved import main

if __name__ == "__main__":
    main()
