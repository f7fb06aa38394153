"What `preflight` finds; that it finds nothing in sound learners; that a fit afterwards has the same bits"
import os, random, signal, sys
from collections import namedtuple
from datetime import datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest, torch
import torch.nn.functional as F
from fastai.callback.all import MixUp
from fastai.callback.core import Callback, CancelBatchException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, L1LossFlat, MSELossFlat
from fastai.optimizer import OptimWrapper
from fastai_callbacks_ext import preflight as module
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.rehearsal import NotKnown, Rehearsal, putting_back
from fastai_callbacks_ext.preflight import CHECKS, Check, Preflight, preflight
from fastai_callbacks_ext.test_utils import digits_dls, digits_learner, digits_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from cases import every_case
from common import fit, quiet, traces
from settings import SETTINGS

def bits(learn):
    "All that a later fit depends on, as numbers and texts"
    opt = [] if learn.opt is None else [{k: str(v) for k,v in learn.opt.state.get(p, {}).items()}
                                        for g in learn.opt.param_lists for p in g]
    return dict(random=(random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()), opt=opt,
                hypers=[] if learn.opt is None else [dict(h) for h in learn.opt.hypers],
                grads=[None if p.grad is None else p.grad.tolist() for p in learn.model.parameters()],
                frozen=[p.requires_grad for p in learn.model.parameters()],
                modes=[m.training for m in learn.model.modules()],
                weights={k: v.tolist() for k,v in learn.model.state_dict().items()},
                loaders=[getattr(dl, 'rng', random).getstate() for dl in learn.dls.loaders],
                attrs=sorted(vars(learn)), cbs=[(type(cb), sorted(vars(cb))) for cb in learn.cbs],
                same=[id(o) for o in (learn.opt, learn.model, learn.loss_func, *learn.cbs)])

def steps_of(learn): return [o.item() for o in learn.recorder.losses],list(map(list, learn.recorder.values))

QUICK = 'digits','tabular_classes','ratings','torch_loader','text_classifier'
@pytest.mark.parametrize('name', list(SETTINGS) if every_case else QUICK)
def test_sound_learners(name):
    "No false alarm; all is put back; the fit is the same"
    learn = SETTINGS[name]()
    before,left = bits(learn),traces(learn)
    found = preflight(learn, n_epoch=2)
    assert found.problems==[] and found.ok
    assert bits(learn)==before and traces(learn)==left
    if name=='gan': return
    assert {o.name for o in found.checks if o.status=='not checked'}<={'memory'}
    assert end_of(learn)==end_of(SETTINGS[name]())

def end_of(learn):
    "All bits after a fit"
    fit(learn, 2)
    return steps_of(learn),{k: v for k,v in bits(learn).items() if k!='same'}

def small(*cbs, **kwargs): return digits_learner([*cbs], n=160, bs=32, **kwargs)

def wrapped(params, **kwargs): return OptimWrapper(params, torch.optim.SGD, momentum=.9, **kwargs)
@pytest.mark.parametrize('kwargs', [{}, dict(opt_func=wrapped)])
def test_in_the_middle_of_a_training(kwargs):
    "The optimizer has a state, the head alone is trained, and gradients wait"
    def trained():
        learn = fit(small(EMA(), **kwargs).to_fp16())
        for p in list(learn.model.parameters())[:4]: p.requires_grad_(False)
        for p in list(learn.model.parameters())[4:]: p.grad = torch.ones_like(p)
        return learn
    learn = trained()
    before = bits(learn)
    assert preflight(learn).problems==[]
    assert bits(learn)==before
    assert end_of(learn)==end_of(trained())

# --- planted faults -------------------------------------------------------------------------------
class Change(Callback):
    "Changes something that the loss or the model gets"
    order = 5
    def __init__(self, x=None, y=None, loss=None): self.x,self.y,self.by = x,y,loss
    def before_batch(self):
        if self.x: self.learn.xb = tuple(map(self.x, self.xb))
        if self.y: self.learn.yb = tuple(map(self.y, self.yb))
    def after_loss(self):
        if self.by: self.learn.loss_grad = self.by(self.loss_grad)

class Net(nn.Module):
    "Digits in some wrong way"
    def __init__(self, way):
        super().__init__()
        self.way,self.layers,self.n = way,nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),0
        if way=='unused': self.spare = nn.Linear(3, 3)
        if way=='table': self.rows = nn.Embedding(10, 64)
    def forward(self, x):
        if self.way=='mixes': x = x - x.mean(0)
        if self.way=='blind': x = x*0
        if self.way=='random': x = x + torch.from_numpy(np.random.default_rng().normal(size=x.shape)).float()
        if self.way=='detached': return self.layers(x).detach()
        if self.way=='table': return self.layers(self.rows(x.long().flatten(1)[:,0]))
        if self.way=='broken': raise RuntimeError('two lines\nof text')
        return self.layers(x)

def net(way): return small(model=Net(way))

def tensors(x, y, model, loss, vx=None, vy=None):
    "A learner of plain PyTorch"
    loader = lambda *o: DataLoader(TensorDataset(*o), 16)
    return Learner(DataLoaders(loader(x, y), loader(x[:16]+1 if vx is None else vx, y[:16] if vy is None else vy)),
                   model, loss_func=loss)

def table(scale=1., **kwargs):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=g)
    x[:,3] = x[:,3]*scale
    return tensors(x, (x[:,:1]>0).long().flatten(), nn.Linear(12, 2), nn.CrossEntropyLoss(), **kwargs)

def regression(shape, loss, offset=0.):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=g)
    return tensors(x, (x.sum(1)+offset).view(shape), nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 1)), loss)

def doubled():
    "Two validation images are in the training set, one under another label"
    learn = table()
    x,y = learn.dls.train.dataset.tensors
    x[7],y[7] = x[5],1-y[5]
    learn.dls.valid.dataset.tensors[0][:2] = x[5:7]
    return learn

def classes(train, valid):
    x = torch.randn(len(train), 12)
    return tensors(x, torch.tensor(train), nn.Linear(12, 9), nn.CrossEntropyLoss(), torch.randn(len(valid), 12),
                   torch.tensor(valid))

def left_out():
    learn = small()
    learn.opt = learn.opt_func([list(learn.model.parameters())[:-1]], lr=.1)
    return learn

class Unseeded(TensorDataset):
    rng = staticmethod(np.random.default_rng)
    def __getitem__(self, i):
        x,y = super().__getitem__(i)
        return x+self.rng().normal(),y

def other_scale():
    learn = small(Change(x=lambda x: x*40-9))
    refresh_batchnorm(learn)
    learn.cbs[-1].x = None
    learn.model[1].num_batches_tracked += 1000
    return learn

def unseeded():
    learn = table()
    learn.dls.loaders[0] = DataLoader(Unseeded(*learn.dls.train.dataset.tensors), 16)
    return learn

def mean_of(pred, y): return ((pred-y)**2).mean()
nan = float('nan')
FAULTS = [
    ('inputs', lambda: small(Change(x=lambda x: x*nan)), 'wrong', 'the input has NaN'),
    ('inputs', lambda: small(Change(x=lambda x: x/0)), 'wrong', 'the input has'),
    ('inputs', lambda: small(Change(x=lambda x: x*0)), 'wrong', 'the input is constant'),
    ('inputs', lambda: small(Change(x=lambda x: x[:1].expand_as(x).clone())), 'wrong', 'the same for all items'),
    ('inputs', lambda: small(Change(x=lambda x: x[:,:,:1,:1].expand_as(x).clone() + torch.rand(len(x),1,1,1))),
     'look', 'constant within many items'),
    ('inputs', lambda: small(Change(x=lambda x: x*255)), 'look', 'divide by 255'),
    ('inputs', lambda: table(1000), 'look', '1 of 12 columns'),
    ('inputs', lambda: small(Change(x=lambda x: 11+torch.rand_like(x)), model=Net('table')),
     'not checked', 'an embedding of 10 rows gets numbers from 11'),
    ('inputs', other_scale, 'look', 'not those that the model was trained with'),
    ('items', doubled, 'wrong', '2 validation items are in the training set too'),
    ('items', doubled, 'look', '1 training item occurs again with another label'),
    ('items', unseeded, 'not checked', 'random items'),
    ('labels', lambda: classes([0,1]*20, [0,1,2,2]), 'wrong', 'class 2 of the validation set'),
    ('labels', lambda: classes([0]*120+[1]*2, [0,1]), 'look', 'very unequal'),
    ('labels', lambda: classes([0,11]*20, [0,1]), 'wrong', '11 is among them; the model has outputs for 0 to 8'),
    ('labels', lambda: regression((64,), nn.MSELoss()), 'wrong', '(16, 1) and (16,)'),
    ('labels', lambda: regression((64,1), nn.MSELoss(), nan), 'wrong', 'targets are NaN'),
    ('labels', lambda: regression((64,1), nn.BCEWithLogitsLoss(), 5.), 'wrong', 'targets are not from 0 to 1'),
    ('labels', lambda: tensors(torch.randn(32, 12), torch.zeros(32).long(), nn.Linear(12, 1), F.cross_entropy),
     'wrong', 'always 0'),
    ('a step', lambda: net('broken'), 'wrong', 'RuntimeError: two lines'),
    ('a step', lambda: net('detached'), 'wrong', 'does not depend on any parameter'),
    ('a step', lambda: small(Change(loss=lambda l: l*nan)), 'wrong', 'the first loss is nan'),
    ('first loss', lambda: small(Change(x=lambda x: x*255), model=Net('')), 'look', 'far above'),
    ('first loss', lambda: regression((64,1), MSELossFlat(), 500.), 'look', 'far above'),
    ('first loss', lambda: small(model=fit(small(lr=.1), 6).model), 'look', 'far below'),
    ('first loss', lambda: regression((64,1), mean_of), 'not checked', 'mean_of'),
    ('gradients', lambda: net('unused'), 'look', '2 parameters get no gradient'),
    ('gradients', left_out, 'wrong', '1 parameter is not in the optimizer'),
    ('same twice', lambda: net('random'), 'look', 'the same step twice'),
    ('same twice', unseeded, 'look', 'another first batch'),
    ('items of a batch', lambda: net('mixes'), 'wrong', 'items of a batch are mixed'),
    ('items of a batch', lambda: small(model=nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False),
                                                         nn.Linear(64, 10))), 'not checked', '1 is a batch norm'),
    ('items of a batch', lambda: net('random'), 'not checked', 'other predictions'),
    ('by heart', lambda: net('blind'), 'wrong', 'cannot be learned by heart')]

def about(name, learn, **kwargs): return [o for o in preflight(learn, **kwargs).checks if o.name==name]

@pytest.mark.parametrize('i', range(len(FAULTS)))
def test_planted_faults(i):
    name,make,status,text = FAULTS[i]
    torch.manual_seed(0)
    learn = make()
    before = bits(learn)
    needs = ['a step'] if name not in ('inputs','items','labels','a step') else []
    found = about(name, learn, only=[*needs, name])
    hit = [o for o in found if o.status==status and text in str(o)]
    assert len(hit)==1, found
    assert bits(learn)==before
