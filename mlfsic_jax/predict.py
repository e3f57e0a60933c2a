"""Labels photos from 1 to 5 examples of each label: python -m mlfsic_jax.predict --workdir=RUN --support=FILE ..."""

from mlfsic_jax.run.classifier import main

if __name__ == "__main__":
    main()
