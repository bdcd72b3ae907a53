import functools
import os

import pytest
import torch
from marks import needs_gpu

# The tensors are small: a second thread costs far more than it saves, here and in programs that tests run.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

if not torch.cuda.is_available():
    from sglang_cpu_engine.launch import ENVIRONMENT, FORKS

    os.environ.update(ENVIRONMENT | FORKS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Writes a random model once: tiny_model(family, layers, index_topk, nextn=False) -> its directory."""
    from tiny_model import write_tiny_model

    @functools.cache
    def write(family: str, layers: int, index_topk: int, nextn: bool = False):
        path = tmp_path_factory.mktemp(family)
        write_tiny_model(path, family, layers, index_topk, nextn=nextn)
        return path

    return write
