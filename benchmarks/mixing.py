"""Accuracy on digits with and without `MixUp`, `CutMix` and `CutMixUp`, beside fastai's; what a batch costs

Five seeds. The training images are the first of a random order; the last 597 of all 1,797 are for validation,
as they are, and not mixed. Each case begins with the same weights. fastai's callbacks draw from PyTorch's
random generator, so their batches come in another order."""
import json, platform, time, warnings
from importlib.metadata import version
from pathlib import Path
warnings.filterwarnings('ignore')

import torch
from fastai.callback import mixup as fastais
from fastai.vision.all import *
from sklearn.datasets import load_digits
from fastai_callbacks_ext.mixing import CutMix, CutMixUp, MixUp
from fastai_callbacks_ext.test_utils import digits_model
from harness import facts, measure, options, seeds_table, table

FILE = Path(__file__).parent/'results/mixing.json'
CASES = {'plain': lambda: [], "fastai's MixUp()": lambda: [fastais.MixUp()], 'MixUp()': lambda: [MixUp()],
         "MixUp(by='batch')": lambda: [MixUp(by='batch')], "fastai's CutMix()": lambda: [fastais.CutMix()],
         'CutMix()': lambda: [CutMix()], 'CutMixUp()': lambda: [CutMixUp()],
         'CutMixUp(until=.8)': lambda: [CutMixUp(until=.8)]}

def wide_model():
    "A network of 60,000 parameters, which learns a few hundred images by heart"
    def block(i, o, stride): return ConvLayer(i, o, stride=stride)
    return nn.Sequential(block(1, 32, 1), block(32, 64, 2), block(64, 64, 1), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(256, 10))

TASKS = {     # number of training images, share of wrong labels, model, epochs, largest learning rate
    '1,200 images, small network, 20 epochs': (1200, 0, digits_model, 20, 1e-2),
    '1,200 images, large network, 20 epochs': (1200, 0, wide_model, 20, 5e-3),
    '200 images, large network, 40 epochs': (200, 0, wide_model, 40, 5e-3),
    '600 images, 30% of the labels wrong, large network, 30 epochs': (600, .3, wide_model, 30, 5e-3)}

def learner(n, wrong, model, seed, cbs):
    x,y = map(torch.tensor, load_digits(return_X_y=True))
    g = torch.Generator().manual_seed(0)
    x,order = (x/16).float().view(-1,1,8,8),torch.randperm(len(y), generator=g)
    bad = order[:round(wrong*n)]
    y[bad] = (y[bad]+torch.randint(1, 10, (len(bad),), generator=g))%10
    set_seed(seed)
    parts = [order[:n], order[1200:]]
    dls = DataLoaders(*(DataLoader([*zip(x[o], y[o].long())], 64, shuffle=o is parts[0]) for o in parts))
    return Learner(dls, model(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)

def found(task, seed, cbs):
    "Accuracy at the end"
    n,wrong,model,n_epoch,lr = TASKS[task]
    learn = learner(n, wrong, model, seed, cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n_epoch, lr)
    return learn.recorder.values[-1][2]

def costs(rounds, batches=10):
    "Seconds for a batch of 64 images of 3x64x64 pixels with a model that costs nothing"
    x,y = torch.randn(64*batches, 3, 64, 64),torch.randint(0, 10, (64*batches,))
    def case(cbs):
        data = torch.utils.data.TensorDataset(x, y)
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
        loader = torch.utils.data.DataLoader(data, 64)
        learn = Learner(DataLoaders(loader, []), model, loss_func=CrossEntropyLossFlat(), cbs=cbs)
        def seconds():
            with learn.no_bar(), learn.no_logging():
                begin = time.perf_counter()
                learn.fit(1)
                return (time.perf_counter()-begin)/batches
        return seconds
    cases = CASES | {"CutMix(by='item')": lambda: [CutMix(by='item')]}
    return measure({k: case(f()) for k,f in cases.items() if 'until' not in k}, rounds)

def main():
    parser = options(__doc__)
    parser.add_argument('--seeds', type=int, default=5, help='(default: %(default)s)')
    args = parser.parse_args()
    tables = {}
    for task in TASKS:
        rows = {k: [round(found(task, seed, f()), 4) for seed in range(args.seeds)] for k,f in CASES.items()}
        tables[task] = dict(unit='accuracy', larger_is_better=True, rows=rows)
        print(f'\n{task}\n\n{seeds_table(tables[task], list(rows))}', flush=True)
    cost = 'A batch of 64 images of 3x64x64, nearly without a model'
    versions = {'Python': platform.python_version()} | {p: version(p) for p in ('torch','fastai')}
    results = dict(date=time.strftime('%Y-%m-%d'), machine=f'{platform.machine()} CPU', threads=1,
                   versions=versions, rounds=args.rounds, tables=tables | {cost: costs(args.rounds)})
    FILE.write_text(json.dumps(results, indent=1)+'\n')
    print(f'\n{cost}\n\n{table(results, cost)}\n\n{facts(results)}')

if __name__=='__main__': main()
