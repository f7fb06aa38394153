"""The runs behind figures of the pages: trained here, so that a page only draws them

`python benchmarks/figures.py` makes all of them, `python benchmarks/figures.py spikes` one. Each writes
results/NAME.json; its page loads that file, draws it, and says when and on what it was measured.
"""
import argparse, contextlib, io, json, platform, re, tempfile, time, warnings
from functools import cache, partial
from importlib.metadata import version
from math import isfinite
from pathlib import Path
warnings.filterwarnings('ignore')

import torch
import torch.nn.functional as F
from fastai.callback.all import *
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastcore.xtras import working_directory
from sklearn.datasets import load_digits
from fastai_callbacks_ext.all import (EMA, LAWA, SAM, SWA, GradientClip, SaveTopK, SpikeGuard, TimeLimit,
                                      soup)
from fastai_callbacks_ext.test_utils import digits_learner, text_learner
from harness import facts

RESULTS = Path(__file__).parent/'results'

def short(v):
    "`v` with 6 digits; None if it is not finite"
    return float(f'{v:.6g}') if isfinite(v) else None

def table(learn):
    "Columns of the epoch table, by name"
    columns = zip(*learn.recorder.values)
    return {k: [*map(short, column)] for k,column in zip(learn.recorder.metric_names[1:], columns)}

def trained(learn, fit, *args, **kwargs):
    "`learn`, after its method `fit`, with nothing printed"
    with learn.no_bar(), learn.no_logging(), contextlib.redirect_stdout(io.StringIO()):
        getattr(learn, fit)(*args, **kwargs)
    return learn

# --- safety -------------------------------------------------------------------------------------
def language_model(lr, seed, *cbs):
    learn = text_learner(seed=seed, bs=8, n=12_000, opt_func=SGD)
    learn.add_cbs(cbs)
    return trained(learn, 'fit_one_cycle', 3, lr, moms=None)

def guard():
    return SpikeGuard(watch=('loss','grad_norm'), factor=3, action='rollback', snapshot=20, lr_factor=0.4)

def spikes():
    "A language model at large learning rates, and with a guard: losses of five seeds"
    runs = {'lr 10': (10,), 'lr 20': (20,), 'lr 50': (50,), 'lr 50, SpikeGuard': (50, guard)}
    final,curves = {},{}
    for k,(lr,*cbs) in runs.items():
        learns = [language_model(lr, seed, *(f() for f in cbs)) for seed in range(5)]
        final[k] = [table(o)['valid_loss'][-1] for o in learns]
        curves[k] = [[short(v.item()) for v in o.recorder.losses] for o in learns]
    del curves['lr 20']     # not drawn
    return dict(seeds=5, valid_loss=final, smoothed_train_loss=curves)

# --- gradients ----------------------------------------------------------------------------------
CLIPS = {'not clipped': [], 'GradientClip(0.25)': [partial(GradientClip, 0.25)],
         'GradientClip(auto=50)': [partial(GradientClip, auto=50)]}

def clipping():
    "Validation loss of a language model after two epochs of SGD, at several learning rates"
    lrs = [0.3, 1, 3, 10, 30]
    def loss_at(lr, cbs):
        learn = text_learner(n=8000, opt_func=partial(SGD, mom=0.9))
        learn.add_cbs([f() for f in cbs])
        return table(trained(learn, 'fit', 2, lr))['valid_loss'][-1]
    return dict(lrs=lrs, valid_loss={k: [loss_at(lr, cbs) for lr in lrs] for k,cbs in CLIPS.items()})

def with_wrong_labels(n_epoch, *cbs):
    "Accuracy on right labels after each epoch, of a model trained with three in ten labels wrong"
    learn = digits_learner(cbs)
    items,g = learn.dls.train_ds.tls[1].items,torch.Generator().manual_seed(0)
    for i,(x,_) in enumerate(items):
        if torch.rand(1, generator=g)<0.3: items[i] = x,torch.randint(10, (1,), generator=g)[0]
    return table(trained(learn, 'fit_flat_cos', n_epoch, 1e-2))['accuracy']

def wrong_labels():
    "SAM where three in ten labels are wrong: accuracy on right labels"
    return dict(accuracy={
        'plain': with_wrong_labels(20), 'plain, 40 epochs': with_wrong_labels(40),
        'SAM(0.3)': with_wrong_labels(20, SAM(0.3)),
        'SAM(2, adaptive=True)': with_wrong_labels(20, SAM(2., adaptive=True))})

# --- stopping -----------------------------------------------------------------------------------
class FakeClock(Callback):
    "A clock that batches move on: by a second in training, by two in validation"
    order,seconds = -100,0.
    def after_batch(self): self.seconds += 1. if self.training else 2.
    def time(self): return self.seconds

def time_limit():
    "One cycle of ten epochs, cut off after a minute and a half, and with the schedule brought to its end"
    def in_time(**kwargs):
        limit,clock = TimeLimit(minutes=1.5, **kwargs),FakeClock()
        limit.clock = clock.time
        return [limit, clock]
    runs = {'all epochs': [], 'TimeLimit': in_time(), 'TimeLimit(schedule=True)': in_time(schedule=True)}
    found = {}
    for k,cbs in runs.items():
        learn = trained(digits_learner(cbs), 'fit_one_cycle', 10, 3e-2)
        found[k] = dict(lrs=[*map(short, learn.recorder.lrs)], iters=list(learn.recorder.iters),
                        valid_loss=table(learn)['valid_loss'])
    return dict(runs=found)

# --- averaging ----------------------------------------------------------------------------------
def averaged(n_epoch, lr, cb): return table(trained(digits_learner(cb), 'fit', n_epoch, lr))

def restless():
    "A run at a learning rate that stays where it is, after every epoch: its weights and their average"
    rows = averaged(20, 3e-2, EMA(0.98, validate='both'))
    lines = {'the weights': 'raw_', 'their moving average, EMA(0.98)': ''}
    return {what: {k: rows[prefix+what] for k,prefix in lines.items()} for what in ('valid_loss','accuracy')}

def decays():
    "The start of moving averages of several decays, with and without a warm-up: validation losses"
    several = averaged(12, 1e-2, EMA([0.9, 0.98, 0.995], validate='both'))
    columns = {'the weights': 'raw_valid_loss', 'EMA(0.9)': 'valid_loss', 'EMA(0.98)': 'ema2_valid_loss',
               'EMA(0.995)': 'ema3_valid_loss'}
    cold = averaged(12, 1e-2, EMA(0.98, warmup=False))['valid_loss']
    return dict(valid_loss={k: several[v] for k,v in columns.items()} | {'EMA(0.98, warmup=False)': cold})

def averages():
    "Three averages of the same run: validation losses"
    cbs = {'SWA(0.5)': SWA(0.5, validate='both'), 'LAWA(5, every=12)': LAWA(5, every=12, validate='both'),
           'EMA(0.98)': EMA(0.98, validate='both')}
    runs = {k: averaged(16, 3e-2, cb) for k,cb in cbs.items()}
    raw = {k: v['raw_valid_loss'] for k,v in runs.items()}
    assert raw['SWA(0.5)']==raw['LAWA(5, every=12)']==raw['EMA(0.98)'], 'an average changed the training'
    return dict(valid_loss={'the weights': raw['SWA(0.5)']} | {k: v['valid_loss'] for k,v in runs.items()})

# --- the best models ----------------------------------------------------------------------------
SHOWN = 600     # images of the digits for training and validation; no run sees the others

@cache
def unseen():
    "The images and labels that no run sees"
    images,labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(42))    # as in `digits_dls`
    rest = order[SHOWN:]
    return (images[rest]/16).float().view(-1, 1, 8, 8), labels[rest].long()

@torch.no_grad()
def held_out(learn):
    "Loss and accuracy on images that no run sees"
    x,y = unseen()
    pred = learn.model.eval()(x.to(learn.dls.device)).cpu()
    return short(F.cross_entropy(pred, y).item()), short((pred.argmax(1)==y).float().mean().item())

def best_of_a_run(seed):
    "The last epoch of ten, the best by accuracy, and the mean of the best three"
    top = SaveTopK('accuracy', load_best=False)
    learn = trained(digits_learner(top, n=SHOWN, seed=seed), 'fit', 10, 3e-2)
    found = {'last epoch': held_out(learn)}
    learn.load(top.fname)
    found['best epoch'] = held_out(learn)
    top.average(learn=learn)
    return found | {'mean of the best three': held_out(learn)}

def best_of_several(seed):
    "The best of eight models that were tuned from one start, and their means"
    learn = trained(digits_learner(n=SHOWN, seed=seed), 'fit_one_cycle', 3, 1e-2)
    learn.save('start')
    files,singles = [f'tuned_{i}' for i in range(8)],[]
    for i,(file,lr) in enumerate(zip(files, [1e-3,3e-3,1e-2,2e-2]*2)):
        learn.load('start', with_opt=False)
        set_seed(100*seed+i)
        trained(learn, 'fit_flat_cos', 4, lr, reset_opt=True).save(file)
        with learn.no_bar(): singles.append((learn.validate()[0], held_out(learn)))
    found = {'best of eight': min(singles)[1]}
    with learn.no_bar():
        for k,greedy in (('soup', True), ('mean of all eight', False)):
            soup(learn, files, greedy=greedy)
            found[k] = held_out(learn)
    return found

def best_models():
    "Loss and accuracy on 1,197 unseen images, of ten seeds"
    with tempfile.TemporaryDirectory() as folder, working_directory(folder):
        runs = [best_of_a_run(seed) | best_of_several(seed) for seed in range(10)]
    return {what: {k: [o[k][i] for o in runs] for k in runs[0]} for i,what in enumerate(('loss','accuracy'))}

FIGURES = {f.__name__: f for f in (spikes, clipping, wrong_labels, time_limit, restless, decays, averages,
                                  best_models)}

def write(name):
    versions = {'Python':platform.python_version()} | {p:version(p) for p in ('torch','fastai')}
    results = dict(date=time.strftime('%Y-%m-%d'), versions=versions, machine=f'{platform.machine()} CPU',
                   threads=1, **FIGURES[name]())
    text = json.dumps(results, indent=1)
    text = re.sub(r'\[[^][{}"]+\]', lambda m: ' '.join(m[0].split()), text)     # numbers of a run on a line
    (RESULTS/f'{name}.json').write_text(text+'\n')
    print(f'{name}.json: {facts(results)}', flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', choices=[[], *FIGURES], help='(default: all)')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names or FIGURES: write(name)

if __name__=='__main__': main()
