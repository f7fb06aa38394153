"On a GPU the tests compare bits, so its kernels have to give the same ones each time; no test leaves autocast on"
import os
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest, torch

if torch.cuda.is_available():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False

@pytest.fixture(autouse=True)
def autocast_is_left():
    yield
    left = [o for o in ('cpu','cuda') if torch.is_autocast_enabled(o)]
    for o in left: torch.set_autocast_enabled(o, False)
    assert not left, f'autocast is still on: {left}'
