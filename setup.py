"""Package metadata of kqat; the settings of its tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

EXTRAS = {
    # What reads tfmot's configs and Keras 2's SavedModels, and what benchmarks compare with.
    # tf-keras must be of TensorFlow's minor version; pip chooses it by tf-keras's own bounds.
    "tfmot": ["tensorflow-model-optimization>=0.8", "tf-keras>=2.16"],
    # Released as development versions only: naming one in the bound is what lets pip take them.
    "tflm": ["tflite-micro>=0.dev20240101"],
    "ethos-u": ["ethos-u-vela>=4.2"],
    "plots": ["matplotlib>=3.8"],
    # For the scripts in recipes/, which are run from a checkout.
    "recipes": ["scikit-learn>=1.5", "pillow>=10.0", "matplotlib>=3.8"],
    "test": ["pytest>=8.2", "pytest-cov>=5.0", "pytest-xdist>=3.6", "hypothesis>=6.100"],
    "docs": [
        "mkdocs>=1.6,<2",
        "mkdocs-material>=9.8",
        "mkdocstrings[python]>=1.0",
        "mkdocs-jupyter>=0.26",
        "latex2mathml>=3.81",
        "matplotlib>=3.11",
        "codespell>=2.4",
        "nbclient>=0.11",
        "nbformat>=5.11",
        "ipykernel>=7.4",
    ],
    # Exact, so that a new release of a linter never fails an old commit.
    "lint": ["ruff==0.17.6", "mypy==2.4.1"],
}
EXTRAS["dev"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})
# Collections of other people's architectures, which `benchmarks/zoo.py` takes the whole road. They
# are large, and no test needs them.
EXTRAS["zoo"] = [
    "keras-hub>=0.32", "kimm>=0.2.5", "keras-tcn>=3.5.7", "k3im>=0.1.1", "kyolo>=0.1.5",
    "medicai>=0.0.4", "keras-vision>=0.6.3",
]  # fmt: skip


def long_description() -> str:
    """The README for PyPI, which has no files beside it: without pictures, links as plain text.

    The project has no address on the web yet. When it has one, give it to `setup` as `url` and let
    these links lead there.
    """
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    name="kqat",
    version=VERSION,
    description="Quantization-aware training for Keras 3, shipped as a full-integer .tflite",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["keras", "quantization", "qat", "tflite", "litert", "tinyml", "microcontroller"],
    python_requires=">=3.10",
    packages=find_packages(include=["kqat*", "tflite_export*"]),
    package_data={
        "kqat": ["py.typed", "*.pyi"],
        "tflite_export": ["py.typed", "*.pyi"],
        "kqat.analysis": ["templates/*.j2"],
        "tflite_export.firmware": ["templates/*.j2"],
        "tflite_export.verification": ["templates/*.j2"],
    },
    # No upper bounds. docs/versions.md says which of these were run; `oldest` in
    # benchmarks/versions.py reads the bounds of TensorFlow, Keras and NumPy from here.
    install_requires=[
        "tensorflow>=2.16",
        "keras>=3.10",
        "numpy>=1.26",
        "scipy>=1.13",
        "jinja2>=3.1",
        "click>=8.1",
        "rich>=13.0",
        "flatbuffers>=24.3.25",
        "ai-edge-litert>=2.3",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["kqat=kqat.__main__:run"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Software Development :: Embedded Systems",
        "Typing :: Typed",
    ],
)
