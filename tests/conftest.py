"How tests are spread over workers; what is read once; what coverage leaves out; the same bits on a GPU"
import copy, gc, os
from functools import cache
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest, sklearn.datasets, torch
from xdist.scheduler import LoadScopeScheduling

if torch.cuda.is_available():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
else:       # PyTorch notes each seed for devices that are not there, with the stack it was set in
    for device in torch.cuda,torch.xpu,torch.mtia: device.manual_seed_all = lambda seed: None

load_digits = cache(sklearn.datasets.load_digits)      # unpacks and reads a text each time
sklearn.datasets.load_digits = lambda *args, **kwargs: copy.deepcopy(load_digits(*args, **kwargs))

@pytest.fixture(autouse=True)
def autocast_is_left():
    yield
    left = [o for o in ('cpu','cuda') if torch.is_autocast_enabled(o)]
    for o in left: torch.set_autocast_enabled(o, False)
    assert not left, f'autocast is still on: {left}'

class ByFile(LoadScopeScheduling):
    """A file on one worker, so that what its tests share is started once

    Files whose tests share nothing are last, and spread one by one; those in a notebook share its kernel."""
    alone = 'test_contract.py','test_notebooks.py'
    def _split_scope(self, nodeid):
        file = nodeid.split('::')[0]
        if nodeid.endswith('in_a_notebook'): return 'one kernel'
        return nodeid if file.endswith(self.alone) else file

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log): return ByFile(config, log)

ONLY_HERE = '[01_rnn.ipynb]','[11_tracing.ipynb]'      # notebooks whose modules no other test reaches as well
NOT_TRACED = """
test_contract test_crash test_demo test_distributed test_docs test_learners test_notebooks test_packaging
test_goes_on_from_anywhere test_damaged_files test_when_to_save test_loaders
test_each_exception_in_each_event test_any_callbacks test_beside_ours
test_skipped_is_as_if_it_had_never_been_there test_resumes_to_the_same_bits
test_goes_on test_time_goes_on test_deadline""".split()

def pytest_collection_modifyitems(items):
    "Coverage slows a test down by 40 %: long files and tests go without, whose lines shorter ones reach too"
    for o in items:
        long = o.path.stem in NOT_TRACED or o.originalname in NOT_TRACED
        if long and not o.name.endswith(ONLY_HERE): o.add_marker('no_cover')

def pytest_collection_finish():
    "What is imported by now stays: collections of garbage need not look at it, and tests ask for many"
    gc.collect()
    gc.freeze()
