"""Packages that only some of the work needs: the extra of the distribution that brings each of them."""

from __future__ import annotations

from importlib.util import find_spec

DISTRIBUTION = "grappa-retrieval"
EXTRAS = {
    "aiohttp": "remote",
    "alembic": "mlflow",
    "faiss": "cpu",
    "fsspec": "remote",
    "huggingface_hub": "hub",
    "jinja2": "report",
    "markupsafe": "report",
    "matplotlib": "report",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "pandas": "pipeline",
    "pillow_heif": "heic",
    "pyarrow": "pipeline",
    "pydantic": "pipeline",
    "rich": "pipeline",
    "scipy": "pipeline",
    "sklearn": "pipeline",
    "sqlalchemy": "mlflow",
    "starlette": "explore",
    "submitit": "slurm",
    "tensorboard": "tensorboard",
    "transformers": "objects",
    "typer": "pipeline",
    "uvicorn": "explore",
    "wandb": "wandb",
    "yaml": "pipeline",
}


def install_command(extra: str) -> str:
    """Return the command that installs an extra, such as ``pip install 'grappa-retrieval[report]'``."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def missing_sentence(module: str | None) -> str | None:
    """Return how to install what ``import module`` did not find; None where no extra brings it."""
    package = (module or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    or_gpu = f" (or {install_command('gpu')})" if package == "faiss" else ""
    return f"the package {package} is missing; install it by `{install_command(EXTRAS[package])}`{or_gpu}"


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    return find_spec(package) is not None
