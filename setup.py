"""Packaging of tuner; `constraints.txt` pins what was tested."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="tuner",
    version="0.1.0",
    description="Fine-tune InternLM2 and every causal LM that transformers serves, at long context, provably right",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["tuner", "tuner.*"]),
    package_data={"tuner.configs": ["recipes/*.py"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10",
        "transformers>=5.10,<6",
        "mmengine>=0.10.7,<0.11",
        "tokenizers>=0.22",
        "peft>=0.17",
        "psutil>=5.9",
        "safetensors>=0.5",
        "numpy>=1.26",
        "click>=8.1",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
    ],
    extras_require={
        "data": ["datasets>=3", "pyarrow>=15"],
        "deepspeed": ["deepspeed>=0.19.8,<0.20"],
        "flash": ["flash-attn>=2.7"],
        "qlora": ["bitsandbytes>=0.48"],
        "dev": [
            *("deepspeed>=0.19.8,<0.20", "bitsandbytes>=0.48"),
            *("datasets>=3", "pyarrow>=15", "hypothesis>=6.100"),
            *("pytest>=8", "pytest-xdist>=3", "ruff>=0.9", "mypy>=1.15"),
        ],
    },
    entry_points={"console_scripts": ["tuner = tuner.cli:main"]},
)
