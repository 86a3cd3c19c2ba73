"""Package metadata of kqat; the settings of its tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    # Released as development versions only: naming one in the bound is what lets pip take them.
    "tflm": ["tflite-micro>=0.dev20261023"],
    "ethos-u": ["ethos-u-vela>=5.2"],
    "plots": ["matplotlib>=3.8"],
    "recipes": ["scikit-learn>=1.9", "pillow>=13.0", "matplotlib>=3.11"],
    "test": ["pytest>=9.2", "pytest-cov>=7.1", "pytest-xdist>=3.8", "hypothesis>=6.170"],
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
    "medicai>=0.0.4",
]  # fmt: skip

setup(
    name="kqat",
    version="0.1.0",
    description="Quantization-aware training for Keras 3, shipped as a full-integer .tflite",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["kqat*", "tflite_export*", "recipes*"]),
    package_data={
        "kqat": ["py.typed"],
        "tflite_export": ["py.typed"],
        "kqat.analysis": ["templates/*.j2"],
        "tflite_export.firmware": ["templates/*.j2"],
        "tflite_export.verification": ["templates/*.j2"],
        "plots": ["matplotlib>=3.8"],
        "recipes": ["*.j2", "RESULTS.md", "results/*.json"],
    },
    install_requires=[
        # The converter's output is read op by op, and tracing knows Keras's internals: a new minor
        # version of either is let in when the tests have passed on it.
        "tensorflow>=2.21,<2.22",
        "keras>=3.15,<3.16",
        "numpy>=2.4,<3",
        "scipy>=1.17",
        "jinja2>=3.1",
        "click>=8.2",
        "rich>=15.0",
        "flatbuffers>=25.9",
        "ai-edge-litert>=2.3,<3",
        "tensorflow-model-optimization>=0.8.1,<0.9",
        # What tensorflow-model-optimization runs on; its release must be TensorFlow's.
        "tf-keras>=2.21,<2.22",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["kqat=kqat.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
