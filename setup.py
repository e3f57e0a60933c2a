"""Installs mlfsic_jax: ``pip install -e . -c constraints.txt``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "mlfsic_jax" / "__init__.py").read_text()).group(1)
APP, KEYWORDS = ["fastapi>=0.115", "uvicorn>=0.30"], ["exiv2>=0.19"]  # exiv2 is under the GPL

setup(
    name="mlfsic_jax",
    version=VERSION,
    description="Multi-label few-shot image classification in JAX: the Base and LCM models",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["mlfsic_jax*"]), "mlfsic_jax.configs"],
    package_dir={"mlfsic_jax.configs": "configs"},  # for --config=configs/NAME.py from any folder
    package_data={
        "mlfsic_jax": ["py.typed", "data/*.json", "data/*.safetensors", "report/report.html.jinja", "app/page/*"]
    },
    python_requires=">=3.11",
    # constraints.txt pins the versions that the tests ran with.
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "flax>=0.12",
        "importlib_resources>=6",  # TFDS needs it and does not say so
        "jax>=0.10,<0.12",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "pillow>=11.0",
        "safetensors>=0.5",
        "scipy>=1.15",
        "tensorboardX>=2.6.4",  # TensorBoard's files without TensorFlow
        "tensorflow-datasets>=4.9.10",  # builders and readers; TensorFlow itself is not needed
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            *("chex>=0.1.90", "hypothesis>=6.100", "pytest>=8.0", "pytest-xdist>=3.7", "ruff>=0.9"),
            *("scikit-learn>=1.5", "ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10", *APP, *KEYWORDS),
        ],
        "app": APP,
        "keywords": KEYWORDS,  # of photos, which the app writes
        "notebooks": ["ipykernel>=6.29", "notebook>=7.0"],
        "torch": ["torch>=2.6"],
        "bench": ["openvino>=2025.0", "torch>=2.6"],  # what the benchmark compares with
        "text": ["huggingface_hub>=1.0", "torch>=2.6", "transformers>=5.0"],
        "word2vec": ["gensim>=4.4"],
        "heic": ["pillow-heif>=0.20"],
        "cuda12": ["jax[cuda12]>=0.10,<0.12"],
        "tpu": ["jax[tpu]>=0.10,<0.12"],
    },
)
