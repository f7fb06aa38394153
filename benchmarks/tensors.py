"""Cost of a step with each callback that looks at all weights or gradients, over the step without it, for
models of 10 to 4,000 small tensors. The rest of the step is cheap: one kernel, and SGD"""
import os, warnings
from contextlib import redirect_stdout
from functools import partial
from time import perf_counter
warnings.filterwarnings('ignore')

import torch
from fastai.basics import Callback, DataLoaders, Learner, OptimWrapper
from fastai.callback.training import GradientClip as FastaiGradientClip
from torch import nn
from fastai_callbacks_ext.all import (EMA, LAWA, SWA, FastLoop, GradientAccumulation,
                                      GradientCentralization, GradientClip, GradientNoise, LookaheadWeights,
                                      SkipNonFinite, SpikeGuard, TerminateOnNaN)
from harness import measure, on_device, options, report, sync

SIZES,SHARE = (10, 100, 1000, 4000),0.15
RAW = dict(validate='raw', final='raw')
CASES = {
    'FastLoop': list,
    "fastai's GradientClip": lambda: [FastaiGradientClip(1e-6)],
    'TerminateOnNaN': lambda: [TerminateOnNaN()],
    'TerminateOnNaN(every=20)': lambda: [TerminateOnNaN(every=20)],
    'SkipNonFinite': lambda: [SkipNonFinite()],
    'SpikeGuard': lambda: [SpikeGuard()],
    'GradientClip': lambda: [GradientClip(1e6)],
    'GradientClip, each step clipped': lambda: [GradientClip(1e-6)],
    'GradientClip(adaptive=0.01)': lambda: [GradientClip(adaptive=0.01)],
    'GradientCentralization': lambda: [GradientCentralization()],
    'GradientNoise': lambda: [GradientNoise()],
    'LookaheadWeights': lambda: [LookaheadWeights()],
    'EMA': lambda: [EMA(**RAW)],
    'SWA(every=5)': lambda: [SWA(every=5, **RAW)],
    'LAWA(every=5)': lambda: [LAWA(every=5, **RAW)],
    'GradientAccumulation': lambda: [GradientAccumulation(1)]}

class Many(nn.Module):
    "`n` weights of 8 x 8"
    def __init__(self, n):
        super().__init__()
        for i in range(n): self.register_parameter(f'w{i}', nn.Parameter(torch.randn(8, 8)))
    def forward(self, x): return (x*torch.stack([*self._parameters.values()]).mean(0)).mean((1, 2))

class Batches(list):
    dataset = property(lambda self: self)

class Clock(Callback):
    order,spans = 3000,()
    def before_train(self):
        sync()
        self.start = perf_counter()
    def after_train(self):
        sync()
        self.spans = *self.spans,perf_counter()-self.start

def seconds(cbs, n, device, batches=40):
    "Seconds of a step, in the second epoch"
    torch.manual_seed(0)
    batch = lambda: [torch.randn(4, 8, 8, device=device), torch.randn(4, device=device)]
    data = Batches(batch() for _ in range(batches))
    data.device = torch.device(device)
    opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    learn = Learner(DataLoaders(data, Batches()), Many(n).to(device), nn.functional.mse_loss,
                    opt_func=opt_func, cbs=[FastLoop(), *cbs(), clock := Clock()])
    with open(os.devnull, 'w') as f, redirect_stdout(f), learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-4)
    return clock.spans[-1]/batches

def main():
    args = options(__doc__, device=True).parse_args()
    tables = {}
    for n in SIZES:
        cases = {k: partial(seconds, cbs, n, args.device) for k,cbs in CASES.items()}
        tables[f'{n:,} tensors of 64 numbers'] = measure(cases, args.rounds, 'ms a step')
    report(on_device('tensors', args.device), tables, args.rounds, args.device)
    print(f'\nTarget: each adds at most {SHARE} of the step')
    for k in list(CASES)[1:]:
        rows = [(t['rows'][k]['median'], t['rows']['FastLoop']['median']) for t in tables.values()]
        shares = [a/b-1 for a,b in rows]
        print(f"{'met' if max(shares)<=SHARE else 'MISSED':8}{'  '.join(f'{o:6.2f}' for o in shares)}  {k}")

if __name__=='__main__': main()
