"A part of ranks.py: memory runs out in one of two processes"
import torch
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from common import quiet
from fastai_callbacks_ext.all import FastLoop, GradientAccumulation, GradientClip, SkipNonFinite
from fastai_callbacks_ext.memory import MicroBatch
from test_gradients import batched, data, learner

class Room(nn.Module):
    "In the process that has no room for more than `k` items"
    def __init__(self, k, where): super().__init__(); self.k,self.where = k,where
    def forward(self, x):
        if self.where=='backward' and x.requires_grad: x.register_hook(self.check)
        if self.where=='forward': self.check(x)
        return x
    def check(self, x):
        if self.training and len(x)>self.k: raise torch.OutOfMemoryError('CUDA out of memory')

def one(rank, *cbs, k=10**6, where='forward'):
    set_seed(0)
    x,y = data(48, seed=rank)
    net = nn.Sequential(nn.Linear(5, 6), Room(k if rank else 10**6, where), nn.ReLU(), nn.Linear(6, 4))
    learn = learner(batched(x, y, [8]*6), net, CrossEntropyLossFlat(), *cbs, opt_func=SGD, lr=.1)
    learn.model = DistributedDataParallel(learn.model)
    with quiet(learn): learn.fit(2)
    cb = next((o for o in learn.cbs if isinstance(o, MicroBatch)), None)
    return dict(weights=torch.cat([p.detach().flatten() for p in net.parameters()]).tolist(),
                found=cb and cb.found['train'])

BESIDE = dict(alone=list, window=lambda: [GradientAccumulation(24)],
              others=lambda: [FastLoop(), GradientClip(.1), SkipNonFinite()])

def run(rank):
    "For each neighbour: without, in pieces from the beginning, and where one process fails"
    res = {}
    for name,cbs in BESIDE.items():
        res[name] = dict(plain=one(rank, *cbs()), pieces=one(rank, *cbs(), MicroBatch(3)),
                         at_once=one(rank, *cbs(), MicroBatch(2)),
                         forward=one(rank, *cbs(), MicroBatch(), k=2),
                         backward=one(rank, *cbs(), MicroBatch(), k=2, where='backward'))
    return res
