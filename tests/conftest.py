"How tests are spread over workers; what is read once; what coverage leaves out; the same bits on a GPU"
import copy, gc, multiprocessing.util, os, random, re, shutil, tempfile
from functools import cache
from itertools import groupby
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
os.environ.setdefault('OMP_NUM_THREADS', '1')       # a forked child hangs where its parent has used more

import pytest
from cases import every_case
from xdist.scheduler import LoadScopeScheduling

def prepare():
    "In each process that runs tests; the one that only starts others is quicker without these imports"
    import sklearn.datasets, torch
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
    else:       # PyTorch notes each seed for devices that are not there, with the stack it was set in
        for device in torch.cuda,torch.xpu,torch.mtia: device.manual_seed_all = lambda seed: None
    load_digits = cache(sklearn.datasets.load_digits)      # unpacks and reads a text each time
    sklearn.datasets.load_digits = lambda *args, **kwargs: copy.deepcopy(load_digits(*args, **kwargs))

@pytest.fixture(autouse=True)
def autocast_is_left():
    import torch
    yield
    left = [o for o in ('cpu','cuda') if torch.is_autocast_enabled(o)]
    for o in left: torch.set_autocast_enabled(o, False)
    assert not left, f'autocast is still on: {left}'

@pytest.fixture(scope='session', autouse=True)
def temporary_folder(tmp_path_factory):
    "Removed at the end, with what notebooks and processes that are started here leave"
    tmp_path_factory.getbasetemp(),multiprocessing.util.get_temp_dir()      # these stay where they were
    was,folder = tempfile.tempdir,tempfile.mkdtemp(prefix='tests-')
    os.environ['TMPDIR'] = tempfile.tempdir = folder
    yield
    tempfile.tempdir = was
    shutil.rmtree(folder, ignore_errors=True)

@pytest.fixture
def on_cpu():
    "Learners are on the CPU, also where there is a GPU"
    from fastai.torch_core import default_device, defaults
    was = defaults.use_cuda
    default_device(False)
    yield
    default_device(was)

def pytest_configure(config):
    "In a worker pytest-cov starts twice, and `no_cover` pauses the second only"
    if hasattr(config, 'workerinput') or not config.getoption('numprocesses', None): prepare()
    cov = config.pluginmanager.get_plugin('_cov')
    if hasattr(config, 'workerinput') and cov and cov.cov_controller: cov.cov_controller.cov.stop()

class ByFile(LoadScopeScheduling):
    """A file on one worker, so that what its tests share is started once

    Files whose tests share nothing are last, and spread one by one; those in a notebook share its kernel."""
    alone = 'test_notebooks.py','test_contract.py'
    def _split_scope(self, nodeid):
        file = nodeid.split('::')[0]
        if nodeid.endswith('in_a_notebook'): return 'one kernel'
        return nodeid if file.endswith(self.alone) else file

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.option.dist == 'load': return ByFile(config, log)     # with many workers: `--dist worksteal`

def values(item):
    "What each of its `parametrize` gives to a test"
    names = [mark.args[0] for mark in item.iter_markers('parametrize')]
    names = [[n.strip() for n in o.split(',')] if isinstance(o, str) else o for o in names]
    return {tuple((n, id(item.callspec.params[n])) for n in ns) for ns in names}

def few(cases):
    "Of all combinations of several arguments, so many that each value of each is met"
    cases,met = random.Random(cases[0].originalname).sample(cases, len(cases)),set()
    while cases:
        best = max(cases, key=lambda o: len(values(o)-met))
        if values(best)<=met: break
        met |= values(best)
        cases.remove(best)
        yield best

# Coverage slows a test down by half. It sees the notebooks that have code of the package, and of these files
# the first case of each test, but of long ones
TRACED = """
test_adversarial test_best test_checkpoint test_consistency test_files test_gradients test_identity
test_items test_losses test_loop test_memory test_mixing test_preflight test_profile test_progress
test_resume test_runlog test_step test_throughput test_upgrade""".split()
LONG = """
test_goes_on_from_anywhere test_damaged_files test_any_callbacks test_each_exception_in_each_event
test_in_another_process""".split()

def traced(tests):
    "Those of the cases of a test that coverage sees"
    file,first = tests[0].path.stem,tests[0]
    if file=='test_notebooks': return [o for o in tests if not re.search(r'\[(index|tutorials/)', o.name)]
    return [first] if file in TRACED and first.originalname not in LONG else []

def pytest_collection_modifyitems(items):
    kept = []
    for _,tests in groupby(items, lambda o: o.nodeid.split('[')[0]):
        tests = list(tests)
        if len(tests)>1 and not every_case: tests = sorted(few(tests), key=items.index)
        for o in {*tests}-{*traced(tests)}: o.add_marker('no_cover')
        kept += tests
    if left := [o for o in items if o not in kept]: items[0].config.hook.pytest_deselected(items=left)
    items[:] = sorted(kept, key=lambda o: o.path.stem=='test_contract')     # short ones last: no worker waits

def pytest_collection_finish():
    "What is imported by now stays: collections of garbage need not look at it, and tests ask for many"
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
