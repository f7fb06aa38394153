"Run by torchrun: one process has a reason to stop, all stop in the same batch; each writes OUT/RANK.json"
import json, os, sys, warnings
from math import inf
from pathlib import Path
warnings.filterwarnings('ignore')

import torch
import torch.distributed as dist
from fastai.basics import *
from torch.nn.parallel import DistributedDataParallel
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.test_utils import digits_learner

out = Path(sys.argv[1])
rank = int(os.environ['RANK'])
dist.init_process_group('gloo')

class Fault(Callback):
    "In the second process: a faster clock, a file in batch 5, and infinite metrics from epoch 2 on"
    order,seconds = -100,0.
    def __init__(self, what, cb):
        self.what,self.cb = what,cb
        cb.clock = self.time
    def time(self): return self.seconds
    def before_batch(self):
        self.seconds += 1+2*rank
        if self.what=='file' and rank==1 and self.training and self.train_iter==5: (out/'stop').touch()
    def after_validate(self):
        if self.what=='metric' and rank==1 and self.epoch>=2: self.cb.metric = lambda name: inf

def run(what, cb):
    learn = digits_learner([cb, Fault(what, cb)], n=320, bs=32)
    learn.model = DistributedDataParallel(learn.model)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(6, 1e-2)
    records = [(r.epoch, r.batch, r.iteration, r.what, r.why) for r in cb.records]
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()]).double().tolist()
    rec,best = learn.recorder,getattr(cb, 'best_epoch', None)
    return dict(records=records, batches=len(rec.losses), rows=len(rec.values), best=best, weights=weights)

cases = dict(
    clock=TimeLimit(minutes=1), schedule=TimeLimit(minutes=1.5, schedule=True), file=StopFile(out/'stop'),
    samples=SampleLimit(320),
    metric=EarlyStopping(divergence=100., patience=9, restore_best=True),
    patience=EarlyStopping('accuracy', min_delta=1, patience=.7, unit='minutes'))
(out/f'{rank}.json').write_text(json.dumps({what: run(what, cb) for what,cb in cases.items()}))
dist.destroy_process_group()
