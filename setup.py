"""Package ppo-fast: `ppo_fast` plus the top folder `kernels/`, shipped as `ppo_fast.kernels`."""

from pathlib import Path

from setuptools import setup

# What `ppo-fast train` uses around the algorithm: command line, checkpoints, progress, logs, plots.
TRAIN = ["tyro>=1.0", "safetensors>=0.5", "tqdm>=4.66", "tensorboard>=2.17", "matplotlib>=3.8"]

setup(
    name="ppo-fast",
    version="0.1.0",
    description="PPO in PyTorch whose hot paths are Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "ppo_fast",
        "ppo_fast.control",
        "ppo_fast.functional",
        "ppo_fast.kernels",
        "ppo_fast.llm",
    ],
    package_dir={"ppo_fast.kernels": "kernels"},
    package_data={"ppo_fast": ["py.typed"]},
    install_requires=[
        "torch>=2.8",
        "numpy>=1.26",
        "gymnasium>=1.1",
        # No wheels for macOS; stages are then timed without ranges.
        "nvtx>=0.2.12",
        # Wheels exist for Linux only; everything imports and runs without it.
        "triton>=3.4; platform_system == 'Linux'",
    ],
    extras_require={
        "train": TRAIN,
        "test": [*TRAIN, "pytest>=8", "pytest-benchmark>=4", "ruff", "mypy"],
        "bench": [*TRAIN, "pytest-benchmark>=4", "stable-baselines3", "torchrl", "tensordict"],
        "llm": [*TRAIN, "transformers>=5", "tokenizers", "peft"],
        "atari": ["ale-py>=0.11"],
        "mujoco": ["gymnasium[mujoco]"],
        "envpool": ["envpool>=1.2"],
        "box2d": ["gymnasium[box2d]"],
        "video": ["moviepy>=2", "pygame>=2.1"],
    },
    entry_points={"console_scripts": ["ppo-fast = ppo_fast.cli:main"]},
)
