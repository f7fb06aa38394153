"""What `ProgressiveResize` saves: processor seconds of training, and the accuracy after it, seed by seed

A small conv net reads scikit-learn's digits of 8 x 8, enlarged to 48 x 48, in eight epochs of one-cycle:
on whole images, growing from half of their height and width, and on whole images in six epochs, which
take about the time of the growing ones. Enlarged digits have nothing that is lost at half the size.
"""
import contextlib, io, time, warnings
warnings.filterwarnings('ignore')

import numpy as np, torch
import torch.nn.functional as F
from fastai.vision.all import *
from fastai_callbacks_ext.sizes import ProgressiveResize
from sklearn.datasets import load_digits
import harness

EPOCHS,FEWER,SIZE = 8,6,48
x,y = map(torch.tensor, load_digits(return_X_y=True))
x = F.interpolate((x/16).float().view(-1, 1, 8, 8), (SIZE,)*2, mode='bicubic')

def learner(seed, cbs):
    set_seed(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    items = list(zip(x[order], y[order].long()))
    dsets = Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]], splits=(range(400), range(400, len(x))))
    def block(i, o): return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    head = nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(64, 10)
    model = nn.Sequential(*block(1, 16), *block(16, 32), *block(32, 64), *head)
    return Learner(dsets.dataloaders(bs=32, num_workers=0, device='cpu'), model, CrossEntropyLossFlat(),
                   metrics=accuracy, cbs=cbs)

class TrainingSeconds(Callback):
    "Processor seconds in training; validation is on whole images in all cases"
    order,seconds = 2001,0.
    def before_train(self): self.start = time.process_time()
    def after_train(self): self.seconds += time.process_time()-self.start

def run(seed, epochs, *cbs):
    learn = learner(seed, [*cbs, clock := TrainingSeconds()])
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
        learn.fit_one_cycle(epochs, 1e-2)
    return clock.seconds,learn.recorder.values[-1][-1]

if __name__=='__main__':
    args = harness.options(__doc__, rounds=5).parse_args()
    cases = {f'whole images, {EPOCHS} epochs': lambda seed: run(seed, EPOCHS),
             f'ProgressiveResize(), {EPOCHS} epochs': lambda seed: run(seed, EPOCHS, ProgressiveResize()),
             f'whole images, {FEWER} epochs': lambda seed: run(seed, FEWER)}
    found = {k: [] for k in cases}
    next(iter(cases.values()))(0)       # warm-up
    for seed in range(args.rounds):
        for k,case in cases.items(): found[k].append(case(seed))
    quartiles = {k: np.quantile([s for s,_ in v], (.25,.5,.75)).round(3).tolist() for k,v in found.items()}
    seconds = {k: dict(zip(('low','median','high'), q)) for k,q in quartiles.items()}
    scores = {k: [round(a, 4) for _,a in v] for k,v in found.items()}
    results = harness.report('resizing', {
        'Training': dict(unit='processor seconds', baseline=[*cases][0], rows=seconds)}, args.rounds,
        accuracy=dict(unit='accuracy', larger_is_better=True, rows=scores))
    print('\n'+harness.seeds_table(results['accuracy'], list(scores)))
