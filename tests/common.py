"What the tests share: the public callbacks, a learner for each, and what a fit may leave behind"
import os, pickle, signal, subprocess, sys, tempfile, threading, traceback, warnings
from contextlib import contextmanager
from functools import partial

import cloudpickle, torch
import fastai.callback.all   # for what it adds to `Learner`: `fit_one_cycle`, `lr_find`, `no_bar`, ...
import fastai_callbacks_ext.all as ext
from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper
from fastai.text.models.awdlstm import EmbeddingDropout
from fastai_callbacks_ext.base.core import ExtCallback
from fastai_callbacks_ext.test_utils import FreeSGD, digits_learner, text_learner
from fastcore.imports import noop
from fasttransform import Transform
from torch import nn

warnings.filterwarnings('ignore')

def public_callbacks():
    "Every callback that `from fastai_callbacks_ext.all import *` gives"
    found = {getattr(ext, o) for o in ext.__all__}
    found = {o for o in found if isinstance(o, type) and issubclass(o, ExtCallback) and o is not ExtCallback}
    return sorted(found, key=lambda o: o.__name__)

RNN = [ext.ModelResetter, ext.RNNCallback]   # an AWD-LSTM needs both

# The learner for a callback that cannot work with the one that reads digits
NEEDS = {ext.ModelResetter: text_learner, ext.RNNCallback: text_learner, ext.RNNRegularizer: text_learner,
         ext.SeqLenSchedule: text_learner}

# Arguments that make a callback do its work, where the defaults make it do nothing
ARGS = {ext.RNNRegularizer: dict(alpha=2, beta=1)}

# Arguments without a default
NEW = {ext.Checkpoint: lambda: dict(path=tempfile.mkdtemp(dir='.')), ext.StopFile: lambda: dict(path='stop'),
       ext.StepLimit: lambda: dict(steps=10**6), ext.SampleLimit: lambda: dict(samples=10**9),
       ext.Distill: lambda: dict(teacher=digits_learner(n=40).model),
       ext.Freeze: lambda: dict(schedule={0: '*bias*', 1: 0}),
       ext.ProgressiveResize: lambda: dict(multiple=2),
       ext.BatchSizeSchedule: lambda: dict(schedule={0: 8, 1: 16}),
       ext.SeqLenSchedule: lambda: dict(start=4, multiple=4),
       ext.HyperMult: lambda: dict(wd={'bias': 0}),
       ext.TimeLimit: lambda: dict(minutes=60, schedule=True)}

# For `assert_close`: to the last bit where sums have one order; a GPU adds up in any
EXACT = {} if torch.cuda.is_available() else dict(rtol=0, atol=0)

# What some can be given only when the learner is there
def _embeds(learn): return any(isinstance(m, (nn.Embedding, EmbeddingDropout)) for m in learn.model.modules())
def _first(learn): return next(n for n,m in learn.model.named_modules() if m._parameters and n)
def read_any_size(learn):
    "The network for digits of 8 x 8 pools its 2 x 2 places, which changes nothing for them"
    net = ext.unwrap_model(learn.model)
    if type(net) is not nn.Sequential: return
    if any(isinstance(m, nn.AdaptiveAvgPool2d) for m in net.modules()): return
    at = next((i for i,m in enumerate(net) if isinstance(m, nn.Flatten)), None)
    if at is not None: net.insert(at, nn.AdaptiveAvgPool2d(2))
def suit(learn, *cbs):
    "Give the callbacks of `learn`, and `cbs`, what they need to work with it"
    if any(type(cb) is ext.ProgressiveResize for cb in (*learn.cbs, *cbs)): read_any_size(learn)
    for cb in (*learn.cbs, *cbs):
        # an AWD-LSTM cannot be copied by `deepcopy`
        if type(cb) is ext.Distill: cb.teacher = pickle.loads(pickle.dumps(ext.unwrap_model(learn.model)))
        if type(cb) is ext.ScheduleFree: learn.opt_func,learn.opt = FREE,None
        if type(cb) is ext.FGM and not _embeds(learn): cb.modules = (_first(learn),)
    return learn

FREE = partial(OptimWrapper, opt=FreeSGD)

def make(cls, **kwargs): return cls(**(NEW.get(cls, dict)() | ARGS.get(cls, {}) | kwargs))

def learner(*classes, cbs=None, **kwargs):
    "A small learner with a callback of each of `classes`, or with `cbs`, and what they need beside them"
    cbs = [make(cls) for cls in classes] if cbs is None else cbs
    if ext.ScheduleFree in classes: kwargs = dict(opt_func=FREE) | kwargs
    if any(NEEDS.get(cls) is text_learner for cls in classes):
        return suit(text_learner([cls() for cls in RNN if cls not in classes] + cbs, n=1000, **kwargs))
    return suit(digits_learner(cbs, n=160, bs=32, **kwargs))

@contextmanager
def quiet(learn):
    "No progress bar, no epoch lines"
    with learn.no_bar(), learn.no_logging(): yield learn

def forked(f):
    "Exit status of a child process that runs `f`; -9 if it was killed"
    if not (pid := os.fork()):
        code = 1
        try: f(); code = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def exit_code(f, new=False):
    "The same, in a new process if asked, or where there is CUDA, which a forked one cannot use"
    if not new and not torch.cuda.is_available(): return forked(f)
    code = 'import conftest, pickle, sys; conftest.prepare(); pickle.load(sys.stdin.buffer)()'
    env = os.environ|dict(PYTHONPATH=os.pathsep.join([os.path.dirname(__file__), *sys.path]))
    return subprocess.run([sys.executable, '-c', code], input=cloudpickle.dumps(f), env=env).returncode

def printing_into(f, path):
    "Call `f` in a process of its own, whose output goes into the file `path`"
    sys.stdout.flush(), sys.stderr.flush()
    out = os.open(path, os.O_WRONLY|os.O_CREAT|os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.stdout,sys.stderr = (open(o, 'w', buffering=1, closefd=False) for o in (1, 2))
    try: f()
    except SystemExit as e:
        if e.code: raise
    finally: sys.stdout.flush()

def into_file(f, path):
    "Exit status of a process that runs `f`, and all that it printed"
    code = exit_code(partial(printing_into, f, path))
    return code,path.read_text()

def export(learn, *args):
    "Export; the test is skipped where fastai itself cannot, as its transforms cannot be pickled"
    try: learn.export(*args)
    except TypeError as e:
        if 'RLock' not in str(e): raise
        try: pickle.dumps(Transform(noop))
        except TypeError:
            import pytest
            pytest.skip("fastai's transforms cannot be pickled: plum-dispatch 2.10 gives them a lock")
        raise

class Exports(Callback):
    "Exports in mid-fit: after some batch, and after the first epoch"
    order,run_valid = 90,False
    def __reduce_ex__(self, protocol): return Callback,()      # it is not in the file itself
    def before_fit(self): self.weights = {}
    def _export(self, name):
        self.weights[name] = {k: v.clone() for k,v in self.learn.model.state_dict().items()}
        export(self.learn, name)
    def after_batch(self):
        if self.train_iter==3: self._export('batch.pkl')
    def after_epoch(self):
        if self.epoch==0: self._export('epoch.pkl')

def finite(learn): return all(p.isfinite().all() for p in learn.model.parameters())

def fit(learn, n=1, method='fit', **kwargs):
    with quiet(learn): getattr(learn, method)(n, **kwargs)
    return learn

def _hooks(module):
    return {k:len(v) for k,v in vars(module).items() if k.endswith('_hooks') and hasattr(v, '__len__')}

def traces(learn):
    "Everything outside the results of a fit that a callback might have left changed"
    own = {k:v for k,v in vars(learn).items() if hasattr(type(learn), k) and k!='_metrics'}
    handled = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
    return dict(
        hooks=[_hooks(m) for m in learn.model.modules()],
        tensor_hooks=[len(p._backward_hooks or ()) for p in learn.model.parameters()],
        replaced={k for k,v in own.items() if callable(v)},     # methods
        loaders=[set(getattr(dl, '__dict__', ())) for dl in learn.dls.loaders], attrs=set(vars(learn)),
        model_attrs=[set(vars(m)) for m in learn.model.modules()],
        opt_attrs=set(vars(learn.opt)) if learn.opt else None,
        loss=(type(learn.loss_func), set(vars(learn.loss_func))),
        metrics=[m.name for m in learn.metrics],
        files=len(os.listdir('/proc/self/fd')) if os.path.exists('/proc/self/fd') else 0,
        threads=threading.active_count(),
        signals=[signal.getsignal(s) for s in handled],
        grad=torch.is_grad_enabled(), autocast=[torch.is_autocast_enabled(o) for o in ('cpu','cuda')])
