"A part of ranks.py: one process has a reason to stop, and all stop in the same batch"
import contextlib, io
from math import inf
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from torch.nn.parallel import DistributedDataParallel
from common import quiet
from fastai_callbacks_ext.all import EarlyStopping, SampleLimit, StopFile, TimeLimit
from fastai_callbacks_ext.test_utils import digits_learner

class Fault(Callback):
    "In the second process: a faster clock, a file in batch 5, and infinite metrics from epoch 2 on"
    order,seconds = -100,0.
    def __init__(self, what, cb):
        self.what,self.cb = what,cb
        cb.clock = self.time
    def time(self): return self.seconds
    def before_batch(self):
        self.seconds += 1+2*dist.get_rank()
        if self.there('file') and self.training and self.train_iter==5: Path('stop').touch()
    def after_validate(self):
        if self.there('metric') and self.epoch>=2: self.cb.metric = lambda name: inf
    def there(self, what): return self.what==what and dist.get_rank()==1

cases = dict(
    clock=lambda: TimeLimit(minutes=1), schedule=lambda: TimeLimit(minutes=1.5, schedule=True),
    file=lambda: StopFile('stop'), samples=lambda: SampleLimit(320),
    metric=lambda: EarlyStopping(divergence=100., patience=9, restore_best=True),
    patience=lambda: EarlyStopping('accuracy', min_delta=1, patience=.7, unit='minutes'))

def run(what):
    "What a fit of six epochs did, and what it said"
    learn = digits_learner([cb := cases[what](), Fault(what, cb)], n=320, bs=32)
    learn.model = DistributedDataParallel(learn.model)
    with quiet(learn), contextlib.redirect_stdout(io.StringIO()) as said: learn.fit_one_cycle(6, 1e-2)
    records = [(r.epoch, r.batch, r.iteration, r.what, r.why) for r in cb.records]
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()]).double().tolist()
    rec,best = learn.recorder,getattr(cb, 'best_epoch', None)
    return dict(records=records, batches=len(rec.losses), rows=len(rec.values), best=best, weights=weights,
                said=said.getvalue())
