"Settings of all tests: how they are spread over workers, kernels on a GPU that give the same bits each time, no autocast left on"
import gc, os
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest, torch
from xdist.scheduler import LoadScopeScheduling

if torch.cuda.is_available():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False

@pytest.fixture(autouse=True)
def autocast_is_left():
    yield
    left = [o for o in ('cpu','cuda') if torch.is_autocast_enabled(o)]
    for o in left: torch.set_autocast_enabled(o, False)
    assert not left, f'autocast is still on: {left}'

class ByFile(LoadScopeScheduling):
    "A file on one worker, so that what its tests share is started once; files whose tests share nothing last, one by one"
    alone = 'test_contract.py','test_notebooks.py'
    def _split_scope(self, nodeid):
        file = nodeid.split('::')[0]
        return nodeid if file.endswith(self.alone) else file

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log): return ByFile(config, log)

def pytest_collection_finish():
    "What is imported by now stays: collections of garbage need not look at it, and tests ask for many"
    gc.collect()
    gc.freeze()
