"A part of ranks.py: each process has its own batches and ignored targets"
import torch
import torch.distributed as dist
from fastai.callback.all import ShortEpochCallback
from fastai.callback.core import Callback
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from common import quiet
from fastai_callbacks_ext.all import (EMA, LAWA, SAM, SWA, FastLoop, GradientAccumulation, GradientClip,
                                      GradientCentralization, GradientNoise, LookaheadWeights, SkipNonFinite)
from fastai_callbacks_ext.test_utils import PoisonBatch
from test_gradients import batched, data, learner

def batches(rank):
    "48 items of this process in batches of 6; more targets are ignored in the second one"
    x,y = data(48, seed=rank)
    y[torch.arange(48)%6 < 4*rank] = -100
    return batched(x, y, [6]*8)

class Sharing(Callback):
    "Gradients are shared again after each backward pass"
    order,run_valid = 7,False
    def look(self): assert self.model.require_backward_grad_sync
    after_backward = before_step = after_batch = look

def run(rank, *cbs, lr=0.1, n=2):
    "What a fit did: gradients, how often they were shared, weights"
    set_seed(0)
    model,loss = nn.Linear(5, 4),CrossEntropyLossFlat()
    learn = learner(batches(rank), model, loss, Sharing(), *cbs, opt_func=SGD, lr=lr)
    shared = []
    def counted(state, bucket):
        shared.append(1)
        return allreduce_hook(None, bucket)
    learn.model = DistributedDataParallel(learn.model)
    learn.model.register_comm_hook(None, counted)
    with quiet(learn): learn.fit(n)
    return dict(grads=torch.stack(learn.grads.grads).tolist(), shared=len(shared),
                weights=[p.tolist() for p in learn.model.parameters()],
                syncs=learn.model.require_backward_grad_sync)

cases = dict(
    windows=lambda: dict(cbs=[GradientAccumulation(12)], lr=0., n=1),
    left_over=lambda: dict(cbs=[GradientAccumulation(18)], lr=0., n=1),
    cut_short=lambda: dict(cbs=[GradientAccumulation(30), ShortEpochCallback(0.7)], lr=0., n=1),
    sam=lambda: dict(cbs=[SAM(0.5)], lr=0., n=1),
    skipped=lambda: dict(cbs=[GradientAccumulation(12), SkipNonFinite(),
                              PoisonBatch((3,4,7) if dist.get_rank() else ())]),
    sam_window=lambda: dict(cbs=[SAM(0.5), GradientAccumulation(12)]),
    all=lambda: dict(cbs=[SAM(), GradientAccumulation(12), GradientClip(0.1), GradientCentralization(),
                          GradientNoise(), LookaheadWeights(2), EMA(0.5), FastLoop()]),
    averages=lambda: dict(cbs=[SWA(0.), LAWA(2, validate='raw', final='raw')]))
