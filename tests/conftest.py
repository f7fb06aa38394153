"On a GPU the tests compare bits, so its kernels have to give the same ones each time"
import os
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import torch

if torch.cuda.is_available():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
