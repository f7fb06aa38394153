"""Fine-tuning with few images: all layers, the head only, `Freeze`, and rates that fall by layer

Networks are trained on the digits 0 to 4, then on a few images of 5 to 9. Prints the
mean accuracy and its error.
"""
import contextlib, io, sys, warnings
warnings.filterwarnings('ignore')

import numpy as np, torch
from fastai.vision.all import *
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.test_utils import digits_model
from sklearn.datasets import load_digits

x,y = map(torch.tensor, load_digits(return_X_y=True))
x,y = (x/16).float().view(-1, 1, 8, 8),y.long()

def loaders(first, n, seed, bs):
    "`n` images of five digits for training, the others for validation; 0: four in five"
    chosen = (y>=first)&(y<first+5)
    xs,ys = x[chosen],y[chosen]-first
    order = torch.randperm(len(xs), generator=torch.Generator().manual_seed(seed))
    n = n or 4*len(xs)//5
    splits = range(n),range(n, len(xs))
    dsets = Datasets(list(zip(xs[order], ys[order])), [[ItemGetter(0)], [ItemGetter(1)]], splits=splits)
    return dsets.dataloaders(bs=bs, num_workers=0)

def quietly(learn, *args):
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
        learn.fit_one_cycle(*args)
    return learn

def network(seed, n=0, bs=64, first=0, body=None, cbs=None):
    set_seed(seed)
    model,groups = digits_model(),layer_groups(decay=.5)
    if body: model.load_state_dict({k: v for k,v in body.items() if k[0]!='8'}, strict=False)
    cbs = {'freeze': Freeze({0:-1, 3:-2, 6:0}), 'by layer': HyperMult(groups)}.get(cbs)
    return Learner(loaders(first, n, seed, bs), model, loss_func=CrossEntropyLossFlat(), metrics=accuracy,
                   splitter=groups, cbs=cbs)

def accuracies(seeds):
    res = {}
    for seed in range(seeds):
        body = {k: v.clone() for k,v in quietly(network(seed), 8, 1e-2).model.state_dict().items()}
        for n in (20, 50):
            for kind in ('all','head','freeze','by layer'):
                for lr in (3e-3, 1e-2, 3e-2):
                    learn = network(seed, n, 10, 5, body, kind)
                    if kind=='head': learn.freeze()
                    res.setdefault((n, kind, lr), []).append(quietly(learn, 12, lr).recorder.values[-1][-1])
    return res

for (n,kind,lr),v in accuracies(int(sys.argv[1]) if len(sys.argv)>1 else 4).items():
    print(f'{n:3} images  {kind:9} lr {lr:<6} accuracy {np.mean(v):.3f} +- {np.std(v)/len(v)**.5:.3f}')
