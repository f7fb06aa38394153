"""How often a training step reads a number of the device, with each callback. Each read makes a GPU wait

On a GPU, PyTorch counts (`torch.cuda.set_sync_debug_mode`). On a CPU, where nothing waits, the reads of
tensors with floats are counted, and late numbers are held back until the epoch ends, as if a GPU were slow.
"""
import os, sys, tempfile, warnings
from contextlib import contextmanager, redirect_stdout
from functools import partial
from unittest.mock import patch
warnings.filterwarnings('ignore')

import torch
from fastai.basics import Adam, Callback, DataLoaders, Learner, default_device
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientClip as FastaiGradientClip
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base import late
from harness import on_device, options, write

RAW,FIRST,LAST = dict(validate='raw', final='raw'),8,16       # batches that are counted
WAITS = 'aten._local_scalar_dense','aten.nonzero','aten.equal'

class Scaler(MixedPrecision):
    "`to_fp16`; on a CPU in float32, with the same scaler"
    def before_fit(self):
        super().before_fit()
        device = next(self.model.parameters()).device.type
        if device=='cuda': return
        self.autocast,self.learn.scaler = torch.autocast(device, enabled=False),torch.amp.GradScaler(device)

def fast(*cbs): return lambda wait: [FastLoop(), FusedStep('fused'), *(o(wait) for o in cbs)]
def once(cls, *args, **kwargs): return lambda wait: cls(*args, **kwargs)

skip,clip = lambda wait: SkipNonFinite(wait=wait),lambda wait: GradientClip(1., wait=wait)
def scaler(wait):
    cb = Scaler()
    vars(cb)['wait'] = wait
    return cb
checkpoint = lambda wait: Checkpoint(tempfile.mkdtemp(), minutes=99)
ours = (once(TerminateOnNaN, every=99), once(EMA, **RAW), once(GradientCentralization), checkpoint,
        once(StepLimit, 10**9))
CASES = {
    'fastai': lambda wait: [],
    "fastai's GradientClip": lambda wait: [FastaiGradientClip()],
    'FastLoop, FusedStep': fast(),
    'the same, TerminateOnNaN()': fast(once(TerminateOnNaN)),
    'the same, TerminateOnNaN(every=20)': fast(once(TerminateOnNaN, every=99)),
    'the same, SkipNonFinite()': fast(skip),
    'the same, GradientClip()': fast(clip),
    "the same, GradientClip(auto=50)": fast(once(GradientClip, auto=50)),
    'the same, to_fp16': fast(scaler),
    'the same, EMA()': fast(once(EMA, **RAW)),
    'the same, SpikeGuard()': fast(once(SpikeGuard)),
    'the same, all that need not wait': fast(skip, clip, scaler, *ours)}

class Reads(TorchDispatchMode):
    "Counts the reads of floats"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += str(func).startswith(WAITS) and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))

class Marks(Callback):
    "The number of reads at the beginning of each batch"
    order = -10**7
    def __init__(self, reads): self.reads,self.at = reads,[]
    def before_batch(self):
        if self.training: self.at.append(self.reads())

@contextmanager
def counting(device):
    "Gives a function that says how many reads there were"
    if device=='cuda':
        torch.cuda.set_sync_debug_mode('warn')
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter('always')
                yield lambda: sum('synchroniz' in str(o.message) for o in found)
        finally: torch.cuda.set_sync_debug_mode('default')
        return
    reads = Reads()
    def counted(f):
        def read(t, *args, **kwargs):
            from_late = sys._getframe(1).f_code.co_filename==late.__file__      # a GPU's copy does not wait
            reads.n += t.is_floating_point() and not from_late
            return f(t, *args, **kwargs)
        return read
    both = dict(tolist=counted(Tensor.tolist), cpu=counted(Tensor.cpu))
    with patch.multiple(Tensor, **both), patch.object(late._Copy, 'there', False), reads:
        yield lambda: reads.n

def waits(case, wait, device):
    "Reads of a step, the mean over some"
    torch.manual_seed(0)
    batch = lambda: (torch.randn(16, 30, device=device), torch.randint(2, (16,), device=device))
    model = nn.Sequential(nn.Linear(30, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)).to(device)
    with counting(device) as reads:
        learn = Learner(DataLoaders([batch() for _ in range(LAST+2)], []), model, nn.CrossEntropyLoss(),
                        opt_func=Adam, cbs=[*CASES[case](wait), marks := Marks(reads)])
        with open(os.devnull, 'w') as f, redirect_stdout(f), learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)
    return (marks.at[LAST]-marks.at[FIRST])/(LAST-FIRST)

def main():
    args = options(__doc__, rounds=1, device=True).parse_args()
    default_device(args.device=='cuda')
    rows = {k: dict(waiting=waits(k, True, args.device), late=waits(k, False, args.device)) for k in CASES}
    table = dict(unit='reads a step', baseline=next(iter(rows)), rows=rows)
    write(on_device('waits', args.device), {'waits': table}, args.rounds, args.device)
    for k,v in rows.items(): print(f"{k:40} {v['waiting']:5.2f} {v['late']:5.2f}")

if __name__=='__main__': main()
