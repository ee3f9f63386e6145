"""Features of the installed torch."""

import pytest
import torch
from torch.torch_version import TorchVersion

# torch 2.6 has no FSDP2 on CPUs, its FSDP1 cannot save empty shards, and its fake CUDA tensors need a GPU.
TORCH_2_7 = TorchVersion(torch.__version__) >= "2.7"
needs_torch_2_7 = pytest.mark.skipif(not TORCH_2_7, reason="needs torch 2.7")
