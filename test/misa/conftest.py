import os

import pytest
import torch

# The tensors are small: a second thread costs far more than it saves.
torch.set_num_threads(1)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                not torch.cuda.is_available(), reason="needs an NVIDIA GPU"
            ),
        ),
    ]
)
def device(request) -> str:
    return request.param
