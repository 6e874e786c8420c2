"""Hugging Face directories as transformers writes them, one per family and dtype."""

from pathlib import Path

import pytest
from tiny_models import torch_model


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """Returns a function (name, dtype, max_shard_size) -> directory that transformers' save_pretrained wrote."""
    torch = pytest.importorskip("torch")
    made: dict[tuple, Path] = {}

    def make(name: str, dtype: str = "float32", max_shard_size: str = "1GB") -> Path:
        key = (name, dtype, max_shard_size)
        if key not in made:
            import copy

            model = copy.deepcopy(torch_model(name)).to(getattr(torch, dtype))
            made[key] = tmp_path_factory.mktemp(f"{name}-{dtype}")
            model.save_pretrained(made[key], max_shard_size=max_shard_size)
        return made[key]

    return make
