"""Final metric with the averages as they come, without an argument: fits of 1, 3 and 10 epochs of one cycle,
on two models with batch norm and two without

An average leaves the training alone: the numbers of a column are of the same runs.
"""
import argparse, contextlib, json, platform, sys, time, warnings
from importlib.metadata import version
from pathlib import Path
warnings.filterwarnings('ignore')

import numpy as np
import torch
from fastai.basics import *
from fastai.callback.all import *
from fastai_callbacks_ext.all import EMA, LAWA, SWA
from fastai_callbacks_ext.test_utils import digits_dls, text_learner
from harness import facts
from sklearn.datasets import load_diabetes
from torch import nn

FILE = Path(__file__).parent/'results/average_defaults.json'
PLAIN,EPOCHS = 'trained weights',(1,3,10)
AVERAGES = {'EMA()': EMA, 'SWA()': SWA, 'LAWA()': LAWA}

def conv(n, i=16): return [nn.Conv2d(i, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]

def digits_conv(seed):
    set_seed(seed)
    layers = [*conv(16, 1), *(o for _ in range(4) for o in conv(16)), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
              nn.Linear(16, 10)]
    return Learner(digits_dls(), nn.Sequential(*layers), CrossEntropyLossFlat(), lr=1e-2, metrics=accuracy)

def digits_mlp(seed):
    set_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                          nn.Linear(128, 10))
    return Learner(digits_dls(), model, CrossEntropyLossFlat(), lr=1e-2, metrics=accuracy)

def diabetes(seed):
    "Standardized, with a fifth for validation"
    x,y = (torch.tensor(o, dtype=torch.float32).view(442, -1) for o in load_diabetes(return_X_y=True))
    x,y = (((o-o.mean(0))/o.std(0))[torch.randperm(442, generator=torch.Generator().manual_seed(42))]
           for o in (x, y))
    sets = [list(zip(x[part], y[part])) for part in (slice(88, None), slice(88))]
    set_seed(seed)
    dls = DataLoaders(DataLoader(sets[0], bs=16, shuffle=True, drop_last=True), DataLoader(sets[1], bs=88))
    model = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64),
                          nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))
    return Learner(dls, model, MSELossFlat(), lr=1e-2, metrics=rmse)

def language(seed): return text_learner(n=10_000, seed=seed)

TASKS = {   # title: metric, larger is better, learner
    'Digits, 5 convolutions with batch norm': ('accuracy', True, digits_conv),
    'Digits, MLP without': ('accuracy', True, digits_mlp),
    'Diabetes, MLP with batch norm': ('RMSE', False, diabetes),
    'Language model, AWD-LSTM without': ('perplexity', False, language)}

def value(learn):
    with learn.no_bar(): return learn.validate()[1]

def found(make, epochs, seed):
    "The metric of the trained weights and of each average"
    learn,cbs = make(seed),{k: cls(validate='raw', final='raw') for k,cls in AVERAGES.items()}
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, cbs=list(cbs.values()))
    res = {PLAIN: value(learn)}
    for k,cb in cbs.items():
        with cb.using(cb.average_name): res[k] = value(learn)
    return res

def measured(seeds):
    "By task: metric, which way is better, and for each row the values of each length of fit, one a seed"
    tables = {}
    for title,(unit,larger,make) in TASKS.items():
        rows = {k: [[] for _ in EPOCHS] for k in (PLAIN, *AVERAGES)}
        for i,epochs in enumerate(EPOCHS):
            for seed in range(seeds):
                for k,v in found(make, epochs, seed).items(): rows[k][i].append(round(v, 5))
            print(title, epochs, {k: round(np.mean(v[i]), 4) for k,v in rows.items()}, flush=True)
        tables[title] = dict(unit=unit, larger_is_better=larger, rows=rows)
    return tables

def table(results):
    "Mean over the seeds, and in how many an average is better and worse than the trained weights"
    head = ['', *(f"{n} epoch{'s'*(n>1)}" for n in results['epochs'])]
    lines = []
    for title,t in results['tables'].items():
        sign,base = 1 if t['larger_is_better'] else -1,t['rows'][PLAIN]
        lines += [f"\n**{title}: {t['unit']}, {'larger' if sign>0 else 'smaller'} is better**\n", _row(head),
                  _row(['---', *['---:']*len(base)])]
        for k,columns in t['rows'].items():
            cells = [_cell(v, None if k==PLAIN else b, sign) for v,b in zip(columns, base)]
            lines.append(_row([k, *cells]))
    return '\n'.join(lines)

def _row(cells): return f"| {' | '.join(cells)} |"

def _cell(values, base, sign):
    mean = np.mean(values)
    text = f'{mean:.3f}' if mean<10 else f'{mean:.1f}'
    if base is None: return f'{text} ± {np.std(values, ddof=1):.2g}'
    better,worse = (sum(sign*s*(v-b)>0 for v,b in zip(values, base)) for s in (1,-1))
    return f'{text} ({better} better, {worse} worse)'

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=5, help='runs of each fit (default: %(default)s)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr): tables = measured(args.seeds)
    versions = {'Python':platform.python_version()} | {p:version(p) for p in ('torch','fastai')}
    results = dict(date=time.strftime('%Y-%m-%d'), versions=versions, machine=f'{platform.machine()} CPU',
                   threads=1,
                   epochs=EPOCHS, seeds=args.seeds, tables=tables)
    FILE.write_text(json.dumps(results, indent=1)+'\n')
    print(facts(results), table(results), sep='\n')

if __name__=='__main__': main()
