"""The learning rates that `lr_find` and fastai's `learn.lr_find` suggest, beside a grid: the validation
loss after a short fit of one cycle, on eight small learners

Where nothing accumulates, ours with one run is fastai's curve: the numbers are the same.
"""
import argparse, contextlib, io, json, math, platform, sys, time, warnings
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
warnings.filterwarnings('ignore')

import numpy as np
import torch
from fastai.tabular.all import *
from fastai.callback import schedule
from fastai.callback.training import GradientAccumulation as FastaisAccumulation
from fastai_callbacks_ext.all import GradientAccumulation
from fastai_callbacks_ext.finder import lr_find
from fastai_callbacks_ext.test_utils import digits_dls, digits_learner, text_learner
from harness import _markdown, facts
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from torch import nn

FILE = Path(__file__).parent/'results/lr_find.json'
GRID = [float(10**o) for o in np.arange(-4, .51, .5)]
AdamW = partial(OptimWrapper, opt=torch.optim.AdamW)

def mlp(n, out, norm=False):
    hidden = lambda i: [nn.Linear(i, 64), *[nn.BatchNorm1d(64)]*norm, nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden(n), *hidden(64), nn.Linear(64, out))

def digits_mlp(opt, cbs=None):
    def make(seed):
        set_seed(seed)
        return Learner(digits_dls(), mlp(64, 10), CrossEntropyLossFlat(), opt_func=opt, cbs=cbs)
    return make

def diabetes(opt, norm):
    def make(seed):
        x,y = (torch.tensor(o, dtype=torch.float32).view(442, -1) for o in load_diabetes(return_X_y=True))
        x,y = (((o-o.mean(0))/o.std(0))[torch.randperm(442, generator=torch.Generator().manual_seed(42))]
               for o in (x, y))
        sets = [list(zip(x[part], y[part])) for part in (slice(88, None), slice(88))]
        set_seed(seed)
        dls = DataLoaders(DataLoader(sets[0], bs=16, shuffle=True, drop_last=True),
                          DataLoader(sets[1], bs=88))
        return Learner(dls, mlp(10, 1, norm), MSELossFlat(), opt_func=opt)
    return make

def tabular(load, bs):
    def make(seed):
        df = load(as_frame=True).frame.sample(frac=1, random_state=42, ignore_index=True)
        set_seed(seed)
        dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=[*df.columns[:-1]],
                                         y_names='target', y_block=CategoryBlock(), bs=bs,
                                         valid_idx=range(len(df)//5), num_workers=0)
        return tabular_learner(dls, layers=[64, 32])
    return make

def accumulated(ours):
    cls = GradientAccumulation if ours else FastaisAccumulation
    return lambda seed: digits_learner(cls(256), seed=seed)

TASKS = {   # title: learner, learner for fastai's, epochs
    'Digits, CNN, Adam': (lambda seed: digits_learner(seed=seed),)*2+(4,),
    'Digits, CNN, accumulating 256': (accumulated(True),accumulated(False),4),
    'Digits, MLP, Adam': (digits_mlp(Adam),)*2+(4,),
    'Digits, MLP, SGD': (digits_mlp(SGD),)*2+(4,),
    'Wine, tabular learner': (tabular(load_wine, 16),)*2+(6,),
    'Breast cancer, tabular learner': (tabular(load_breast_cancer, 32),)*2+(4,),
    'Diabetes, MLP, PyTorch\'s AdamW': (diabetes(AdamW, True),)*2+(6,),
    'Language model, AWD-LSTM': (lambda seed: text_learner(n=10_000, seed=seed),)*2+(2,)}

@contextlib.contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()): yield learn

def loss(make, seed, lr, epochs):
    "Validation loss after a fit; that of a model that is not finite counts as infinite"
    with quiet(make(seed)) as learn:
        learn.fit_one_cycle(epochs, lr)
        res = learn.validate()[0]
    return res if math.isfinite(res) else math.inf

METHODS = 'valley','slide','minimum','steep'

def suggestions(ours, theirs, seed):
    "By name: what is asked, the rate"
    funcs = [getattr(schedule, o) for o in METHODS]
    with quiet(theirs(seed)) as learn: found = learn.lr_find(show_plot=False, suggest_funcs=funcs)
    yield from ((f"fastai's {o}", getattr(found, o)) for o in METHODS)
    for runs in (1, 3):
        with quiet(ours(seed)) as learn: found = lr_find(learn, runs=runs, suggest=METHODS, show_plot=False)
        yield from ((o if runs==1 else f'{o}, runs=3', getattr(found, o)) for o in METHODS)

def measured(seeds):
    "For each task: the mean loss at each rate of the grid; rates that were suggested, and the loss there"
    tables = {}
    for title,(ours,theirs,epochs) in TASKS.items():
        begin,at = time.time(),cache(lambda seed,lr: loss(ours, seed, lr, epochs))
        grid = [float(np.mean([at(seed, lr) for seed in range(seeds)])) for lr in GRID]
        rows = {}
        for seed in range(seeds):
            for name,lr in suggestions(ours, theirs, seed):
                lr = lr and float(f'{lr:.3g}')
                rows.setdefault(name, []).append((lr, lr and at(seed, lr)))
        tables[title] = dict(epochs=epochs, grid=grid, rows=rows)
        print(f'{title}: {time.time()-begin:.0f} s', file=sys.stderr, flush=True)
    return tables

def table(results, names):
    "For each task, the best rate of the grid; for each name, the loss over that of it, and the rate"
    lines = []
    for title,t in results['tables'].items():
        best = int(np.argmin(t['grid']))
        cells = [_cell([o for o in t['rows'][name] if o[0]], t['grid'][best]) for name in names]
        lines.append((title, f"{results['grid'][best]:.2g}", *cells))
    means = [np.exp(np.mean([np.log(_ratio(t, name)) for t in results['tables'].values()])) for name in names]
    lines.append(('Geometric mean', '', *(f'{o:.2f}' for o in means)))
    return _markdown(('', 'best of the grid', *names), lines)

def _ratio(t, name): return np.mean([l for lr,l in t['rows'][name] if lr])/min(t['grid'])

def _cell(found, best):
    if not found: return '-'
    lrs,losses = zip(*found)
    return f'{np.mean(losses)/best:.2f} ({np.exp(np.mean(np.log(lrs))):.2g})'

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3, help='(default: %(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = measured(args.seeds)
    versions = {'Python':platform.python_version()} | {p:version(p) for p in ('torch','fastai')}
    results = dict(date=time.strftime('%Y-%m-%d'), versions=versions, machine=f'{platform.machine()} CPU',
                   threads=1, seeds=args.seeds, grid=GRID, tables=tables)
    FILE.write_text(json.dumps(results, indent=1)+'\n')
    print(facts(results))
    for extra in ('', ', runs=3'): print(f"\n{table(results, [o+extra for o in METHODS])}")
    print('\n'+table(results, [f"fastai's {o}" for o in METHODS]))

if __name__=='__main__': main()
