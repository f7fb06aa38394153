"Run by torchrun: runs under fastai's `distrib_ctx` that stop and go on; each process writes what it saw to OUT/RANK.json"
import contextlib, io, json, os, random, sys, tempfile, warnings
from pathlib import Path
warnings.filterwarnings('ignore')
os.environ['ACCELERATE_USE_CPU'] = 'true'

import torch
import torch.distributed as dist
from fastai.basics import *
from fastai.callback.all import *
from fastai.distributed import DistributedDL
from fastai_callbacks_ext.all import Checkpoint
from fastai_callbacks_ext.test_utils import digits_learner
import crash

out,rank = Path(sys.argv[1]),int(os.environ['RANK'])
torch.set_num_threads(1)

def broadcast(self, t, rank):
    "As fastai's, which needs a GPU"
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = broadcast

class StopIn(Callback):
    "Stops a training batch, in the fit of so many epochs"
    order = 3000
    def __init__(self, n_epoch, epoch, batch): self.at = n_epoch,epoch,batch
    def after_batch(self):
        if self.training and (self.n_epoch,self.epoch,self.iter)==self.at: raise KeyboardInterrupt

def train(method, epochs, path=None, stop=None):
    "Checksums, and what was printed"
    Checkpoint._finished.clear()     # as in a process of its own
    learn = digits_learner(n=160, bs=16, metrics=accuracy)
    learn.dls.train.after_item.add(crash.Noise())
    learn.add_cb(CSVLogger(out/f'{rank}.csv'))
    random.seed(rank), torch.manual_seed(rank)
    cbs = [StopIn(*stop)] if stop else []
    if path: cbs.append(Checkpoint(path, steps=2, background=False))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(KeyboardInterrupt), learn.distrib_ctx(sync_bn=False):
        if rank==0: learn.remove_cb(ProgressCallback)
        getattr(learn, method)(epochs, 1e-2, cbs=cbs)
    return crash.digests(learn),said.getvalue()

def case(method, epochs, stops):
    want,path = train(method, epochs)[0],out/method
    said = [train(method, epochs, path, stop)[1] for stop in stops]
    got,last = train(method, epochs, path)
    again,finished = train(method, epochs, path)
    return dict(want=want, got=got, again=again, said=[*said[1:], last], finished=finished,
                lock=(dist.barrier(), (path/'.checkpoint.lock').exists())[1])     # once both have left

dist.init_process_group('gloo')
cases = dict(fit=case('fit_one_cycle', 3, [(3,1,0), (3,2,3)]),
             fine_tune=case('fine_tune', 2, [(1,0,3), (2,1,2)]))
(out/f'{rank}.json').write_text(json.dumps(cases))
dist.destroy_process_group()
