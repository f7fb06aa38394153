"A part of ranks.py: runs under fastai's `distrib_ctx` that stop and go on"
import contextlib, io, random
from pathlib import Path

import torch
import torch.distributed as dist
from fastai.callback.all import Callback, CSVLogger, ProgressCallback
from fastai.metrics import accuracy
import crash
from fastai_callbacks_ext.all import Checkpoint
from fastai_callbacks_ext.test_utils import digits_learner

class StopIn(Callback):
    "Stops a training batch, in the fit of so many epochs"
    order = 3000
    def __init__(self, n_epoch, epoch, batch): self.at = n_epoch,epoch,batch
    def after_batch(self):
        if self.training and (self.n_epoch,self.epoch,self.iter)==self.at: raise KeyboardInterrupt

def train(method, epochs, path=None, stop=None):
    "Checksums, and what was printed"
    Checkpoint._finished.clear()     # as in a process of its own
    rank = dist.get_rank()
    learn = digits_learner(n=160, bs=16, metrics=accuracy)
    learn.dls.train.after_item.add(crash.Noise())
    learn.add_cb(CSVLogger(Path(f'{rank}.csv').absolute()))
    random.seed(rank), torch.manual_seed(rank)
    cbs = [StopIn(*stop)] if stop else []
    if path: cbs.append(Checkpoint(path, steps=2, background=False))
    out,ctx = contextlib.redirect_stdout(io.StringIO()),learn.distrib_ctx(sync_bn=False)
    with out as said, contextlib.suppress(KeyboardInterrupt), ctx:
        if rank==0: learn.remove_cb(ProgressCallback)
        getattr(learn, method)(epochs, 1e-2, cbs=cbs)
    return crash.digests(learn),said.getvalue()

cases = dict(fit=('fit_one_cycle', 3, [(3,1,0), (3,2,3)]), fine_tune=('fine_tune', 2, [(1,0,3), (2,1,2)]))

def run(name):
    "A run that goes on after each of its stops, once more when it is finished, and one without stops"
    method,epochs,stops = cases[name]
    want,path = train(method, epochs)[0],Path(f'goes_on_{name}').absolute()
    said = [train(method, epochs, path, stop)[1] for stop in stops]
    got,last = train(method, epochs, path)
    again,finished = train(method, epochs, path)
    dist.barrier()      # once both have left
    return dict(want=want, got=got, again=again, said=[*said[1:], last], finished=finished,
                lock=(path/'.checkpoint.lock').exists())
