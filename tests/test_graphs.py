"""`Graphs` gives the numbers of a fit without it

Where there is no CUDA, each test runs with two stand-ins: the package's own, which calls the function again,
and a strict one (`graph_tape`), which runs no Python of the model in a replay."""
import gc
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import fastai.callback.training as fastais
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException,
                                  CancelStepException, CancelTrainException)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import rnn_cbs
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder, load_learner
from fastai.losses import BaseLoss, CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, Lamb, Lookahead, OptimWrapper, RAdam
from fastai.torch_core import TensorImage, default_device, set_seed
from fastcore.imports import noop
from graph_tape import Tape
from torch import Tensor, nn, tensor
from torch.utils._pytree import tree_flatten

import fastai_callbacks_ext.graphs as graphs
from fastai_callbacks_ext.all import (EMA, SAM, FastLoop, FusedStep, GradientAccumulation, GradientClip,
                                      MicroBatch, SkipNonFinite, TerminateOnNaN, Throughput)
from fastai_callbacks_ext.base.graph import CallsAgain
from fastai_callbacks_ext.graphs import Graphs
from fastai_callbacks_ext.test_utils import digits_learner, text_learner

pytestmark = pytest.mark.parametrize('backend', ['calls again', 'tape'], indirect=True)

@pytest.fixture(autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setattr(graphs, 'CallsAgain', Tape if request.param=='tape' else CallsAgain)
    # a forward pass of oneDNN's LSTM writes what its backward pass needs only where autograd looks
    with torch.backends.mkldnn.flags(enabled=False): yield request.param

class Net(nn.Module):
    "Dropout and batch norm; in each forward pass, `own` is called with the module"
    def __init__(self, own=noop):
        super().__init__()
        self.body,self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 16)),nn.Linear(16, 10)
        self.bn,self.drop,self.n,self.h,self.own = nn.BatchNorm1d(16),nn.Dropout(.3),0,torch.zeros(16),own
        self.box = SimpleNamespace(h=torch.zeros(16))
    def forward(self, x):
        h = self.drop(F.relu(self.bn(self.body(x))))
        res = self.own(self, h)
        return self.head(h if res is None or res is self else res)

class Look(Callback):
    "What the batches of training give"
    order = 70
    def before_fit(self): self.seen,self.kept = [],[]
    def after_batch(self):
        if not self.training: return
        self.seen.append((self.learn.loss.item(), self.learn.pred.detach().clone()))
        self.kept.append((self.learn.loss, self.learn.pred))

def learner(cbs=(), model=None, seed=0, n=120, bs=20, **kwargs):
    set_seed(seed)
    return digits_learner(list(cbs), model=(model or Net)(), n=n, bs=bs, **kwargs)

def fit(learn, n=2, f=None):
    set_seed(1)
    with learn.no_bar(), learn.no_logging(): (f or (lambda o: o.fit(n)))(learn)
    return learn

def state(learn):
    "Weights, statistics, and what the optimizer keeps"
    leaves = [o for d in (learn.model, learn.opt) for o in tree_flatten(d.state_dict())[0]]
    return [o for o in leaves if isinstance(o, Tensor)]

def agree(a, b):
    "To the last bit; on a GPU, kernels may be others"
    if a.device.type!='cpu': return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4)
    return torch.equal(a, b)

def check(make, cbs=list, n=2, f=None, least=1, said='without CUDA', loop=FastLoop, **kwargs):
    "A fit with `Graphs` is the fit without it; some batches were replayed"
    g = Graphs()
    a = fit(make([*cbs(), Look()], **kwargs), n, f)
    b = fit(make([*cbs(), Look(), *([loop()] if loop else ()), g], **kwargs), n, f)
    assert all(map(agree, state(a), state(b)))
    assert len(a.look.seen)==len(b.look.seen)
    for (x,p),(y,q) in zip(a.look.seen, b.look.seen): assert agree(p, q) and agree(tensor(x), tensor(y))
    for (x,p),(y,q) in zip(b.look.seen, b.look.kept):      # nobody's tensors were overwritten
        assert x==y.item() and torch.equal(p, q)
    assert g.replayed>=least, (g.replayed, g.records)
    assert all(said in str(r) or 'without CUDA' in str(r) for r in g.records), g.records
    assert type(b) is Learner and not g._parts and g._backend is None
    return b,g

class OnPred(Callback):
    def after_pred(self): self.learn.pred = self.pred*1.5
class OnLoss(Callback):
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad + self.pred.pow(2).mean()*.1
class OnPenalty(Callback):
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad + self.model.head.weight.pow(2).sum()*.1
class InPlace(Callback):
    def after_loss(self): self.learn.loss_grad /= 3
class OnBackward(Callback):
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*.5
class OnGrads(Callback):
    def after_backward(self):
        for p in self.model.parameters():
            if p.grad is not None: p.grad *= .5
class Skips(Callback):
    "Cancels at some event of a batch that is watched, and of one that is replayed"
    order = 5
    def __init__(self, event, e): self.event,self.e = event,e
    def __call__(self, event_name):
        if event_name==self.event and self.training and self.learn.train_iter in (1, 6): raise self.e()

class OwnPrecision(MixedPrecision):
    def after_loss(self):
        super().after_loss()
        if self.training: self.learn.loss_grad = self.learn.loss_grad*.5
class CpuPrecision(MixedPrecision):
    "fastai's, with autocast where the model is"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16)
class Autocast(Callback):
    "All of a batch in autocast, also the backward pass"
    def before_batch(self):
        self.on = torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16)
        self.on.__enter__()
    def after_batch(self): self.on.__exit__(None, None, None)

wrapped = partial(OptimWrapper, opt=torch.optim.AdamW)
smooth = CrossEntropyLossFlat()
CASES = dict(
    nothing=list, on_pred=lambda: [OnPred()], on_loss=lambda: [OnLoss()], penalty=lambda: [OnPenalty()],
    in_place=lambda: [InPlace()],
    on_backward=lambda: [OnBackward()], after_backward=lambda: [OnGrads()], clip=lambda: [GradientClip(.1)],
    fastais_clip=lambda: [fastais.GradientClip(.1)], accumulation=lambda: [GradientAccumulation(64)],
    mixup=lambda: [MixUp()],
    fastais_accumulation=lambda: [fastais.GradientAccumulation(64)], ema=lambda: [EMA()], sam=lambda: [SAM()],
    fp16=lambda: [MixedPrecision()], fp16_pred=lambda: [MixedPrecision(), OnPred()],
    fp16_loss=lambda: [MixedPrecision(), OnLoss()], fp16_own=lambda: [OwnPrecision()],
    cpu_fp16=lambda: [CpuPrecision()], cpu_fp16_pred=lambda: [CpuPrecision(), OnPred()],
    cpu_fp16_loss=lambda: [CpuPrecision(), OnLoss()],
    autocast=lambda: [Autocast()], skip_non_finite=lambda: [SkipNonFinite()],
    cancel_batch=lambda: [Skips('before_batch', CancelBatchException)],
    cancel_step=lambda: [Skips('before_step', CancelStepException)],
    cancel_backward=lambda: [Skips('before_backward', CancelBackwardException)],
    cancel_train=lambda: [Skips('after_batch', CancelTrainException)])

@pytest.mark.parametrize('opt_func', [Adam, wrapped], ids=['fastai', 'torch'])
@pytest.mark.parametrize('name', CASES)
def test_the_numbers_of_a_fit_without_it(name, opt_func):
    check(learner, CASES[name], opt_func=opt_func, loss_func=smooth, loop=None if len(name)%2 else FastLoop)

def around(p, y, axis=-1): return F.cross_entropy(p, y)
around_axis = lambda axis: lambda p,y,**kwargs: around(p, y, axis)
class Off(OnPred):
    run = False
PLANS = dict(
    nothing=('whole', list), fp16=('whole', lambda: [MixedPrecision()]), off=('whole', lambda: [Off()]),
    clock=('whole', lambda: [Throughput()]), grads=('whole', lambda: [OnGrads()]),
    on_loss=('loss', lambda: [OnLoss()]), on_backward=('loss', lambda: [OnBackward()]),
    on_pred=('pred', lambda: [OnPred()]), any_event=('pred', lambda: [Skips('', ValueError)]),
    own_fp16=('pred', lambda: [OwnPrecision()]),
    given=('whole', list, partial(around, axis=1)), surroundings=('pred', list, around_axis(1)),
    given_surroundings=('pred', list, partial(around_axis(1), axis=1)))
@pytest.mark.parametrize('name', PLANS)
def test_where_a_batch_is_cut(name):
    "As late as the callbacks allow"
    plan,cbs,*loss = PLANS[name]
    class Note(Callback):
        order = 900
        def after_batch(self): assert self.learn.graphs._looking is None
        def after_fit(self): self.plans = {kind.part.plan for kind in self.learn.graphs._parts.values()}
    learn = fit(learner([Graphs(), note := Note(), *cbs()], loss_func=(*loss, smooth)[0]))
    assert note.plans=={plan}

class Two(nn.Module):
    "Two inputs, two outputs"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.unused = nn.Linear(6, 4),nn.Linear(3, 4),nn.Linear(2, 2)
    def forward(self, x, y): return (self.a(x)*self.b(y), None, self.a(x).detach())

def tabular(cbs=(), n=50, **kwargs):
    set_seed(0)
    g = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, k, generator=g) for k in (6, 3, 4)]
    ds = torch.utils.data.TensorDataset(*xs)
    dls = DataLoaders(*[DataLoader(ds, 8) for _ in range(2)], device=default_device())
    dls.n_inp = 2
    res = Learner(dls, Two(), loss_func=lambda p,y: F.mse_loss(p[0], y), cbs=list(cbs), **kwargs)
    res.model.to(dls.device)
    return res

def test_several_inputs_and_outputs_and_a_smaller_last_batch():
    class Pred(Callback):
        order = 60
        def after_batch(self):
            if self.training: assert self.pred[1] is None and self.pred[0].shape==self.pred[2].shape
    class Between(Callback):
        def after_pred(self):
            if self.training: assert [self.pred[i].requires_grad for i in (0, 2)]==[True, False]
    for opt_func in (Adam, wrapped):
        for cbs in ([Pred], [Pred, Between]):
            make = lambda *more: tabular([*(o() for o in cbs), *more], opt_func=opt_func)
            a,b = fit(make(), 3),fit(make(g := Graphs()), 3)
            assert all(map(agree, state(a), state(b))) and g.replayed==15
            assert b.model.unused.weight.grad is None

class Sizes:
    "Batches of several shapes"
    def __init__(self, sizes): self.sizes,self.device,self.bs,self.dataset = sizes,default_device(),None,sizes
    def __len__(self): return len(self.sizes)
    def to(self, device): return self
    def __iter__(self):
        g = torch.Generator().manual_seed(0)
        for n in self.sizes:
            x,y = torch.randn(n, 64, generator=g),torch.randint(0, 10, (n,), generator=g)
            yield x.to(self.device),y.to(self.device)

def of_sizes(sizes):
    def make(cbs, **kwargs):
        set_seed(0)
        dls,model = DataLoaders(Sizes(sizes), Sizes(sizes[:2])),Net().to(default_device())
        return Learner(dls, model, loss_func=smooth, cbs=cbs, **kwargs)
    return make

def test_shapes_that_come_again_are_replayed_and_others_are_not():
    _,g = check(of_sizes([4,6]*5+[7,9]), n=1, least=4)
    assert g.replayed==4
    a = fit(of_sizes([4,6,8]*5)([]), 1)
    b = fit(of_sizes([4,6,8]*5)([g := Graphs(max_shapes=2)]), 1)
    assert g.replayed==4 and all(map(agree, state(a), state(b)))
    assert [r.why for r in g.records if 'CUDA' not in r.what]==['2 shapes have a graph, which is max_shapes']

def test_rnn_state_and_regularizer():
    for cbs in (rnn_cbs, partial(rnn_cbs, 2, 1)):
        a = fit(text_learner([*cbs()], n=4000))
        b = fit(text_learner([*cbs(), g := Graphs()], n=4000))
        assert all(map(agree, state(a), state(b)))
        assert a.recorder.values==b.recorder.values or default_device().type!='cpu'
        assert g.replayed>=18
        assert all(h.grad_fn is None for pair in b.model[0].hidden for h in pair)

def node_of(p): return p.view_as(p).grad_fn.next_functions[0][0]

def test_one_node_adds_to_each_gradient():
    "It is made aside, whoever keeps a part of autograd's graph, as `WeightDropout`; else no capture works"
    class AsideOnly(Callback):
        order = 991     # after `Graphs`
        def before_fit(self): self.kept = [v for m in self.model.modules() for v in vars(m).values()
                                           if isinstance(v, Tensor) and v.grad_fn is not None]
        def after_batch(self):
            if self.training: assert {*map(node_of, self.model.parameters())}=={*self.learn.graphs._nodes}
    learn = fit(text_learner([*rnn_cbs(2, 1), Graphs(), aside := AsideOnly()], n=2000))
    fit(learn)
    assert not aside.kept and learn.graphs._nodes==()

def test_frozen_groups_change():
    def make(cbs, **kw):
        groups = lambda m: [[*m.body.parameters(), *m.bn.parameters()], [*m.head.parameters()]]
        return learner(cbs, splitter=groups, **kw)
    class Thaw(Callback):
        def before_batch(self):
            if self.training and self.train_iter==8: self.learn.unfreeze()
    check(make, n=2, f=lambda o: o.fine_tune(2, freeze_epochs=2))
    check(make, lambda: [Thaw()], n=4, f=lambda o: (o.freeze(), o.fit(4)))

class Each(Callback):
    "Calls `f` with the learner before each training batch"
    order = -60
    def __init__(self, f): self.f = f
    def before_batch(self):
        if self.training: self.f(self.learn)

def comes(learn):
    if learn.train_iter==6: learn.add_cb(OnLoss())
    if learn.train_iter==11: learn.remove_cb(OnLoss)
def wakes(learn):
    if learn.train_iter==1:
        learn.add_cb(OnPred())
        learn.on_pred.run = False
    if learn.train_iter>1: learn.on_pred.run = learn.train_iter in (7, 8, 9)
@pytest.mark.parametrize('change', [comes, wakes])
def test_callbacks_may_come_and_go(change): check(learner, lambda: [Each(change)], n=4, least=5)

def on_instance(learn):
    def halve():
        for p in learn.model.parameters(): p.grad.mul_(.5)
    if learn.train_iter==8: learn.look.before_step = halve
    if learn.train_iter==16: del learn.look.before_step
def test_a_method_that_an_instance_gets_in_mid_fit():
    for more in (), (FusedStep,):
        check(learner, lambda: [Each(on_instance), *(o() for o in more)], n=6, least=9)

def swap(learn):
    if learn.train_iter==7: learn.model.head.weight.data = learn.model.head.weight.data.clone()*2
def other_p(learn):
    if learn.train_iter==9: learn.model.drop.p = .6
def new_head(learn):
    if learn.train_iter==9: learn.model.drop = nn.Dropout(.5)
def freeze_bn(learn):
    if learn.train_iter>8: learn.model.bn.eval()
def other_loss(learn):
    if learn.train_iter==8: learn.loss_func = CrossEntropyLossFlat(label_smoothing=.2)
def hook(learn):
    if learn.train_iter in (7, 8): learn.handle = learn.model.body.register_forward_hook(lambda m,x,y: y*2)
    elif 'handle' in vars(learn): vars(learn).pop('handle').remove()
def grad_hook(learn):
    if learn.train_iter==8: learn.model.head.weight.register_hook(lambda g: g*2)
CHANGES = swap,other_p,new_head,freeze_bn,other_loss,hook,grad_hook
@pytest.mark.parametrize('change', CHANGES, ids=lambda f: f.__name__)
def test_what_a_capture_takes_for_granted_may_change(change):
    check(learner, lambda: [Each(change)], n=4, least=2, said='hooked')

def new_own(learn):
    if learn.train_iter==9: learn.model.own = moves
@pytest.mark.parametrize('change', [swap, other_p, new_head, other_loss, new_own], ids=lambda f: f.__name__)
def test_after_a_change_that_stays_the_batches_are_captured_anew(change):
    check(learner, lambda: [Each(change)], n=6, least=9)

def test_a_model_that_changes_again_and_again_is_left_alone():
    def change(learn): learn.model.drop.p = .3+.01*(learn.train_iter//5)
    _,g = check(learner, lambda: [Each(change)], n=12, least=2, said='again and again')
    assert g.replayed<20 and sum('again and again' in r.why for r in g.records)==1

def boxed(m, h):
    m.box.h = m.box.h.to(h.device)*.9+h.detach().mean(0)
    return h+m.box.h
def count(m, h): m.n += 1
def coin(m, h):
    if random.random()<.5: return h*2
def numpys(m, h): return h*float(np.random.rand())
def grows(m, h): m.n = (*(m.n or ()), 1)
@pytest.mark.parametrize('own,why', [(count, 'attribute n'), (coin, 'random numbers'),
                                     (numpys, 'random numbers'), (grows, 'attribute n'),
                                     (boxed, 'attribute box')])
def test_python_state_is_found_and_left_alone(own, why):
    check(learner, model=partial(Net, own), least=0, said=why)
    g = Graphs()
    fit(learner([g], model=partial(Net, own)))
    assert g.replayed==0 and sum(why in r.why for r in g.records)==1

def moves(m, h):
    m.h = (m.h.to(h.device)*.9+h.detach().mean(0)).clone()
    return h+m.h
def moves_or_begins(m, h):
    if not hasattr(m, 'h'): m.h = torch.zeros(16)
    return moves(m, h)
def test_tensors_that_a_model_replaces_are_passed_on():
    _,g = check(learner, model=partial(Net, moves), least=5)
    def gone(learn):
        if learn.train_iter==9: del learn.model.h
    check(learner, lambda: [Each(gone)], model=partial(Net, moves_or_begins), n=3, least=5)
    class Clears(Callback):
        def after_fit(self): del self.learn.model.h
    check(learner, lambda: [Clears()], model=partial(Net, moves_or_begins), n=2, least=5)
def test_a_state_that_a_model_begins_with_is_its_own():
    "What is given back when the fit ends is no part of the graphs"
    a,b = learner(model=partial(Net, moves)),learner([Graphs()], model=partial(Net, moves))
    for learn in (a, b):
        fit(learn, 2)
        fit(learn, 2)
    assert agree(a.model.h, b.model.h)

class Draws(Callback):
    def before_batch(self): self.scale = random.random()
    def before_fit(self): self.learn.loss_func,self.old = self.loss,self.learn.loss_func
    def after_fit(self): self.learn.loss_func = self.old
    def loss(self, p, y, **kw): return F.cross_entropy(p, y)*self.scale
def test_a_loss_with_surroundings_is_computed_as_usual():
    check(learner, lambda: [Draws()], least=5)
    alpha = [1.]
    def around(p, y): return F.cross_entropy(p, y)*alpha[0]
    check(learner, lambda: [Each(lambda l: alpha.__setitem__(0, 1.+l.train_iter))], loss_func=around, least=5)

class Scaled(BaseLoss):
    "Has numbers of its own"
    def __init__(self): self.func,self.axis,self.by,self.texts = nn.CrossEntropyLoss(),-1,1.,[1.]
    def __call__(self, p, y): return self.func(p, y)*self.by*self.texts[-1]
def test_what_the_loss_knows_may_change():
    def by(learn): learn.loss_func.by = 1.+learn.train_iter//6
    def texts(learn): learn.loss_func.texts[-1] = 1.+learn.train_iter//6
    for change in (by, texts): check(learner, lambda: [Each(change)], loss_func=Scaled(), n=4, least=2)

FACTOR = 1.
def reads_global(p, y): return F.cross_entropy(p, y)*FACTOR
class Reads(Net):
    def forward(self, x): return super().forward(x)*FACTOR
@pytest.mark.parametrize('kwargs', [dict(loss_func=reads_global), dict(model=Reads)])
def test_a_number_that_the_code_reads_may_change(kwargs):
    def change(learn):
        global FACTOR
        FACTOR = 1.+learn.train_iter//6
    check(learner, lambda: [Each(change)], n=4, least=2, **kwargs)

class Asks(Callback):
    "Asks for a gradient of its own"
    def after_loss(self):
        if not self.training: return
        self.g, = torch.autograd.grad(self.learn.loss_grad, [self.model.head.weight], retain_graph=True)
    def after_backward(self): self.model.head.weight.grad += self.g
def test_a_callback_that_computes_gradients_itself_is_seen():
    check(learner, lambda: [Asks()], opt_func=wrapped, least=0, said='gradients of its own')

def test_what_only_the_capture_does_is_found(backend):
    "The stand-in that calls the model again does it in each batch"
    for own,why in ((lambda m,h: random.random(), 'random numbers'),
                    (lambda m,h: setattr(m, 'n', 1), 'attribute n'),
                    (lambda m,h: setattr(m, 'h', m.h+1), 'attribute h')):
        def late(m, h):
            if m.training and len(calls)>2: own(m, h)
            if m.training: calls.append(1)
        calls = []
        fit(learner([g := Graphs()], model=partial(Net, late)))
        if backend=='tape': assert g.replayed==0 and why in g.records[-1].why, g.records

@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError])
def test_any_end_leaves_nothing(error):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.train_iter==n: raise error('stop')
    for n in (2, 5):
        learn = learner([g := Graphs(), Stop()])
        with pytest.raises(error): fit(learn)
        assert type(learn) is Learner and not g._parts and g._backend is None
        gc.collect()
        learn.remove_cb(Stop)
        fit(learn)
        assert g.replayed>0

@pytest.mark.skipif(torch.cuda.is_available(), reason='has real failures')
def test_a_failed_capture_changes_nothing(monkeypatch):
    class Fails(Tape):
        def capture(self, f):
            super().capture(f)
            raise RuntimeError('operation not permitted\nwhen stream is capturing')
    monkeypatch.setattr(graphs, 'CallsAgain', Fails)
    for opt_func in (Adam, wrapped):
        _,g = check(learner, opt_func=opt_func, least=0, said='RuntimeError: operation not permitted')
        assert g.replayed==0 and len(g.records)==2

def waits(m, h): return h*(2. if h.sum().item()>0 else 1.)
def chooses(m, h): return h+h[h>0].sum()*0
@pytest.mark.parametrize('own', [waits, chooses])
def test_waiting_for_the_device_is_left_alone(own, backend):
    if backend=='calls again' and not torch.cuda.is_available(): return     # there is nothing to wait for
    check(learner, model=partial(Net, own), least=0, said='wait')
    fit(learner([g := Graphs()], model=partial(Net, own)))
    assert g.replayed==0

class Out:
    def __init__(self, y): self.y = y
class Wrapped(Net):
    def forward(self, x): return Out(super().forward(x))
class Words(Net):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(17, 10, sparse=True)
    def forward(self, x):
        return super().forward(x)+self.words(x.flatten(1)[:,:3].abs().mul(16).long().clamp(max=16)).sum(1)
def test_what_has_no_fixed_place_is_left_alone():
    inside = lambda o,y: F.cross_entropy(o.y, y)
    for model,loss,why in ((Wrapped, inside, 'returns a Out'), (Words, smooth, 'is sparse')):
        make = partial(learner, model=model, loss_func=loss, metrics=[],
                       opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
        a,b = fit(make()),fit(make([g := Graphs()]))
        assert g.replayed==0 and why in g.records[-1].why and all(map(agree, state(a), state(b)))

def test_only_a_real_fit():
    learn = learner([g := Graphs()])
    fit(learn)
    n = g.replayed
    learn.validate()
    learn.get_preds()
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=10)
    assert g.replayed==n and type(learn) is Learner
    assert fit(learn) and g.replayed==n

def test_switched_off_in_mid_fit():
    def off(learn):
        if 'graphs' in vars(learn): learn.graphs.run = learn.train_iter<5
    _,g = check(learner, lambda: [Each(off)])
    assert g.replayed==2

def test_batches_without_targets():
    "In a fit they are only read"
    ds = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8))
    dls = DataLoaders(*[DataLoader(ds, 8) for _ in range(2)], device=default_device())
    dls.n_inp = 1
    learn = Learner(dls, Net().to(dls.device), loss_func=smooth, cbs=[g := Graphs()])
    before = [p.clone() for p in learn.model.parameters()]
    learn.recorder.run = False
    with learn.no_bar(): fit(learn, 1)
    assert all(map(torch.equal, before, learn.model.parameters())) and g.replayed==0

def test_taken_off_in_mid_fit():
    class Off(Callback):
        def after_batch(self):
            if self.training and self.train_iter==6: self.learn.remove_cb(Graphs)
    a,b = fit(learner()),fit(learner([g := Graphs(), Off()]))
    assert type(b) is Learner and all(map(agree, state(a), state(b)))

def test_beside_a_callback_that_does_the_batches():
    _,g = check(learner, lambda: [MicroBatch(size=16)], least=0, said='does the batches itself')

@pytest.mark.parametrize('name', ['_do_one_batch', '_backward', '_step', '_do_grad_opt', '_split'])
def test_own_loops_are_left_alone(name):
    "Of a class of the user's, and of a callback that puts a method on the learner when the fit begins"
    def own(self, *args): return getattr(Learner, name)(self, *args)
    class Puts(Callback):
        order = 500
        def before_fit(self): setattr(self.learn, name, partial(own, self.learn))
    for by_class in (True, False):
        learn = learner([] if by_class else [Puts()])
        if by_class: learn.__class__ = type('Own', (Learner,), {name: own})
        learn.add_cb(g := Graphs())
        fit(learn)
        assert g.replayed==0 and name in g.records[-1].why

def test_several_devices_or_processes_are_left_alone(monkeypatch):
    learn = learner([g := Graphs()])
    learn.model = nn.DataParallel(learn.model)
    fit(learn)
    assert g.replayed==0 and 'in DataParallel' in g.records[-1].why
    monkeypatch.setattr(graphs, 'n_ranks', lambda: 2)
    fit(learner([g := Graphs()]))
    assert g.replayed==0 and 'several processes' in g.records[-1].why

def test_a_fit_inside_a_fit():
    class Inner(Callback):
        def after_epoch(self):
            if self.learn.n_epoch==3 and self.epoch==0: fit(self.learn, 1)
    check(learner, lambda: [Inner()], n=3, least=9)

# --- the step in the graph --------------------------------------------------------------------------
def in_groups(cbs, **kwargs):
    groups = lambda m: [[*m.body.parameters(), *m.bn.parameters()], [*m.head.parameters()]]
    return learner(cbs, splitter=groups, wd=.1, **kwargs)
def no_momentum(*args, **kwargs): return SGD(*args, **kwargs|dict(mom=0.))
def l2(*args, **kwargs): return Adam(*args, **kwargs, decouple_wd=False)
def lookahead(*args, **kwargs): return Lookahead(Adam(*args, **kwargs))
STEPS = dict(
    nothing=('step', list), fit_flat_cos=('step', list, lambda o: o.fit_flat_cos(3)),
    one_cycle=('whole', list, lambda o: o.fit_one_cycle(3)), ema=('whole', lambda: [EMA()]),
    nan=('loss', lambda: [TerminateOnNaN()]), clock=('step', lambda: [Throughput()]),
    bf16=('step', lambda: [CpuPrecision('bf16')]),
    bf16_no_wait=('step', lambda: [CpuPrecision('bf16'), NoWait()]),
    fp16=('whole', lambda: [ScaledPrecision()]), own_step=('whole', lambda: [OwnStep('bf16')]),
    own_grads=('whole', lambda: [OwnGrads('bf16')]), own_fake=('whole', lambda: [OwnFake('bf16')]),
    after_backward=('whole', lambda: [OnGrads()]), before_step=('whole', lambda: [AtStep()]),
    on_loss=('loss', lambda: [OnLoss()]), guard=('whole', lambda: [SkipNonFinite()]))

class NoWait(Callback):
    "With it, the device decides whether a scaled step is taken"
    wait = None
    def __init__(self): self.wait = False
class ScaledPrecision(CpuPrecision):
    "With a scaler that is on everywhere"
    def before_fit(self):
        super().before_fit()
        self.learn.scaler = torch.amp.GradScaler(default_device().type, init_scale=2.)
class OwnStep(CpuPrecision):
    def before_step(self): super().before_step()
class OwnGrads(CpuPrecision): after_backward = OnGrads.after_backward
class OwnFake(CpuPrecision):
    def step(self): super().step()
class AtStep(Callback):
    def before_step(self): self.learn.opt.set_hypers(wd=.1*self.learn.train_iter)

def check_step(make, plan, cbs=list, f=None, n=2, opt_func=Adam, kernel='auto', **kwargs):
    "Beside a fit with `FusedStep` alone; the graphs of `plan` have done the batches"
    plans,steps = set(),[]
    class Note(Callback):
        order = 900
        def after_batch(self):
            if (g := self.learn.__dict__.get('graphs')) and g._parts:
                plans.update(k.part.plan for k in g._parts.values() if k.part is not None)
        def after_fit(self): steps.append([d.get('step') for d in self.learn.opt.state.values()])
    _,g = check(partial(make, opt_func=opt_func), lambda: [FusedStep(kernel), Note(), *cbs()], n, f, **kwargs)
    assert plan in plans and steps[0]==steps[1]
    return g,plans

@pytest.mark.parametrize('name', STEPS)
def test_where_the_step_is_in_the_graph(name):
    "Not if a callback comes between, and not while a momentum changes from batch to batch"
    plan,cbs,*f = STEPS[name]
    assert check_step(learner, plan, cbs, *f, least=3)[1]=={plan}

OPTIMIZERS = [(SGD, 'step'), (no_momentum, 'step'), (l2, 'step'), (Lamb, 'whole'), (RAdam, 'whole'),
              (lookahead, 'whole'), (wrapped, 'whole')]
@pytest.mark.parametrize('opt_func,plan', OPTIMIZERS)
def test_optimizers_with_the_step_in_the_graph(opt_func, plan):
    assert check_step(learner, plan, opt_func=opt_func, said='')[1]=={plan}
    g = Graphs()
    a,b = (fit(tabular([FusedStep(), *more], opt_func=opt_func), 3) for more in ([], [g]))
    assert all(map(agree, state(a), state(b))) and g.replayed>=12 and b.model.unused.weight.grad is None
    f = lambda o: o.fit_flat_cos(2, slice(1e-3, 1e-2))
    check_step(in_groups, plan, f=f, opt_func=opt_func, said='')

class Double(Net):
    def __init__(self):
        super().__init__()
        self.double()
    def forward(self, x): return super().forward(x.double()).float()
def test_steps_that_no_graph_has():
    "By fastai's formula, and of other numbers than float32"
    for kwargs in (dict(kernel='foreach'), dict(model=Double)):
        assert check_step(learner, 'whole', **kwargs)[1]=={'whole'}

def hypers(**kwargs):
    def change(learn):
        if learn.train_iter==8: learn.opt.set_hypers(**kwargs)
    return change
def rates(learn): learn.opt.set_hypers(lr=1e-3*(1+learn.train_iter%3))
def no_grads(learn):
    if learn.train_iter in (7, 8):
        for p in learn.model.parameters(): p.grad = None
def grads_memory(learn):
    if learn.train_iter==8:
        for p in learn.model.parameters(): p.grad.data = p.grad.data.clone()
def states_memory(learn):
    if learn.train_iter==8:
        for d in learn.opt.state.values(): d['grad_avg'].data = d['grad_avg'].data.clone()
def own_opt_class(learn):
    class Own(type(learn.opt)):
        def step(self, *args):
            super().step(*args)
            for p in self.all_params()[0][:1]: p.data.mul_(.9)
    if learn.train_iter==8: learn.opt.__class__ = Own
def frozens_grads(learn):
    "Gradients of weights that are frozen already move them"
    if learn.train_iter==1: learn.freeze()
    w = learn.model.body[1].weight
    if learn.train_iter in (7, 8): w.grad = torch.ones_like(w)
def clear_state(learn):
    if learn.train_iter==8: learn.opt.clear_state()
def other_state(learn):
    if learn.train_iter==8:
        for d in learn.opt.state.values(): d['grad_avg'] = d['grad_avg']*2
def in_place(learn):
    if learn.train_iter==8:
        for d in learn.opt.state.values(): d['grad_avg'].mul_(2)
def counted(learn):
    if learn.train_iter==8:
        for d in learn.opt.state.values(): d['step'] += 5
def new_opt(learn):
    if learn.train_iter==8: learn.create_opt()
def no_decay(learn):
    if learn.train_iter==8: learn.opt.state[learn.model.head.weight]['do_wd'] = False
def loads(learn):
    if learn.train_iter==4: learn.kept = learn.opt.state_dict()
    if learn.train_iter==9: learn.opt.load_state_dict(learn.kept)
def unfreezes(learn):
    if learn.train_iter in (1, 8): (learn.freeze if learn.train_iter==1 else learn.unfreeze)()
def own_opt_step(learn):
    "By a step that somebody has put on the optimizer"
    if learn.train_iter!=8: return vars(learn.opt).pop('step', None)
    step = learn.opt.step
    def twice(closure=None): step(), step()
    learn.opt.step = twice
def by_hand(learn):
    if learn.train_iter==8:
        for p in learn.model.parameters(): p.grad = torch.ones_like(p)
        learn.opt.step()
        learn.opt.zero_grad()
def a_flag(learn):
    if learn.train_iter in (8, 14): learn.opt.found_inf = torch.ones((), device=default_device())
def flagged_by_hand(learn):
    if learn.train_iter in (8, 9):
        learn.opt.found_inf = torch.tensor(float(learn.train_iter==9), device=default_device())
        learn.opt.step()
def a_tensor(learn):
    if learn.train_iter in (7, 9):
        for h in learn.opt.hypers: h['wd'] = torch.tensor([.1]) if learn.train_iter==7 else .1
def step_hook(learn):
    if learn.train_iter==9: learn.opt.cbs = [*learn.opt.cbs, noisy]
def noisy(p, **kwargs): p.data.mul_(1.01)

OF_STEPS = (swap, other_p, rates, no_grads, grads_memory, states_memory, own_opt_class, frozens_grads,
            clear_state, other_state, in_place, counted, new_opt, no_decay, loads, unfreezes, own_opt_step,
            by_hand, a_flag, flagged_by_hand, a_tensor, step_hook)
@pytest.mark.parametrize('change', [*OF_STEPS, hypers(wd=.3), hypers(mom=.5), hypers(eps=1e-2)],
                         ids=lambda f: f.__name__)
def test_what_changes_between_steps_in_graphs(change):
    check_step(in_groups, 'step', lambda: [Each(change)], n=6, least=5, said='')

class Late(Net):
    "From its fifth batch on, another layer is trained"
    def __init__(self):
        super().__init__()
        self.late = nn.Linear(10, 10)
        self.begin = nn.Parameter(torch.zeros(()), requires_grad=False)
    def forward(self, x):
        res = super().forward(x)
        return self.late(res) if self.begin.requires_grad else res
def test_a_layer_that_is_trained_from_some_batch_on():
    for i in (4, 5, 6, 9):
        def begins(learn):
            if learn.train_iter==i: learn.model.begin.requires_grad_()
        check_step(partial(learner, model=Late), 'step', lambda: [Each(begins)], n=6, least=5, said='')

P = nn.Parameter(torch.zeros(10))
def with_p(p, y): return F.cross_entropy(p+P.to(p.device)*P.sum(), y)
@pytest.mark.parametrize('loss_func', [smooth, with_p], ids=['aside', 'in the loss'])
@pytest.mark.parametrize('change', ['grad', 'none', 'frozen', 'data'])
@pytest.mark.parametrize('step', [FusedStep, TerminateOnNaN])
def test_a_parameter_that_is_in_no_module(loss_func, change, step):
    def changes(learn):
        i = learn.train_iter
        if change=='grad': P.grad = torch.full_like(P, 1.+i)
        if change=='none' and i in (8, 9): P.grad = None
        if change=='frozen' and i==8: P.requires_grad_(False)
        if change=='data' and i==8: P.data = P.data.clone()+1
    def make(cbs, **kwargs):
        P.data,P.grad = torch.full((10,), .1, device=default_device()),None
        P.requires_grad_()
        return learner([*cbs, step()], loss_func=loss_func, splitter=lambda m: [[*m.parameters()], [P]])
    check(make, lambda: [Each(changes)], n=6, least=3, said='')

class OwnBuffer(Net):
    "Replaces a buffer"
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(10))
    def forward(self, x):
        res = super().forward(x)+self.mean
        self.mean = self.mean*.9+res.detach().mean(0)*.1
        return res
def test_a_buffer_that_is_replaced_is_found():
    check(learner, model=OwnBuffer, least=0, said='attribute mean')

def test_a_step_that_changes_often_goes_outside():
    def decay(learn): learn.opt.set_hypers(wd=.1*(1+learn.train_iter//5))
    g,plans = check_step(learner, 'whole', lambda: [Each(decay)], n=15, least=20, said='leaves the step out')
    assert plans=={'step','whole'}

def test_graphs_with_the_step_make_room_for_those_without(monkeypatch):
    "Two shapes, of which `max_shapes` allows no more"
    monkeypatch.setattr(Graphs.__init__, '__defaults__', (3, 2))
    def decay(learn):
        learn.opt.set_hypers(wd=.1*(1+learn.train_iter//14))
        if 'graphs' in vars(learn) and learn.graphs._apart:
            assert all(kind.part is None or kind.part.step is None for kind in learn.graphs._parts.values())
    g,plans = check_step(of_sizes([4,6]*14), 'whole', lambda: [Each(decay)], n=8, least=60,
                         said='leaves the step out')
    assert plans=={'step','whole'} and not any('max_shapes' in str(r) for r in g.records)

def test_a_step_that_cannot_be_captured_stays_outside(monkeypatch, backend):
    if backend!='tape': return      # the other one captures nothing
    def fails(self): raise RuntimeError('not permitted\nhere')
    monkeypatch.setattr('fastai_callbacks_ext.base.kernels.GraphedStep.record', fails)
    g,_ = check_step(learner, 'whole', n=3, least=5, said='leaves the step out of the graphs')
    assert [r.why for r in g.records if 'step' in r.what]==['RuntimeError: not permitted']

# --- what is in a batch ---------------------------------------------------------------------------
class Any(nn.Module):
    "Takes what there is"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 4)
    def forward(self, *xs):
        leaves = tree_flatten(xs)[0]
        whole = any(isinstance(o, Tensor) and not o.is_floating_point() for o in leaves)
        res = self.lin(sum(o.to_dense().float()*(i+1) if isinstance(o, Tensor) else float(o or 0)
                           for i,o in enumerate(leaves)))
        return res*(len(xs)+(.5 if isinstance(xs[-1], dict) else 0)+(.25 if whole else 0))
def sums(p, *ys): return sum((p-(y if isinstance(y, Tensor) else float(y))).pow(2).mean()*(i+1)
                             for i,y in enumerate(ys))

class Gives(Callback):
    "`f` makes each training batch of a number and two tensors"
    order = -60
    def __init__(self, f): self.f = f
    def before_batch(self):
        if self.training: self.learn.xb,self.learn.yb = self.f(self.train_iter//3, *self.xb, *self.yb)

ALIKE = dict(
    dtype=lambda i,x,y: ((x.long() if i%2 else x,), (y,)),
    number=lambda i,x,y: ((x, i%2), (y,)), target=lambda i,x,y: ((x,), (y, i%2)),
    truth=lambda i,x,y: ((x, True if i%2 else 1.5), (y,)), none=lambda i,x,y: ((x, None if i%2 else 2), (y,)),
    kinds=lambda i,x,y: ((dict(a=x, b=x) if i%2 else [x, x],), (y,)),
    place=lambda i,x,y: ((x, y[:, :1]), (y,)) if i%2 else ((x,), (y[:, :1], y)),
    strides=lambda i,x,y: ((x.T.contiguous().T if i%2 else x,), (y,)))
@pytest.mark.parametrize('name', ALIKE)
def test_batches_that_look_alike_are_told_apart(name):
    def make(cbs, **kwargs):
        set_seed(0)
        g = torch.Generator().manual_seed(0)
        ds = torch.utils.data.TensorDataset(*(torch.randn(128, k, generator=g)*3 for k in (8, 4)))
        dls = DataLoaders(*[DataLoader(ds, 8) for _ in range(2)], device=default_device())
        return Learner(dls, Any().to(dls.device), loss_func=sums, cbs=cbs, **kwargs)
    _,g = check(make, lambda: [Gives(ALIKE[name])], n=2, least=16)
    assert g.replayed<=26       # two kinds: each has been watched

def needs_grad(i, x, y): return (x.detach().requires_grad_(),), (y,)
def sparse(i, x, y): return (x.to_sparse(),), (y,)
def subclass(i, x, y): return (TensorImage(x),), (y,)
@pytest.mark.parametrize('gives,why', [(needs_grad, 'has a gradient'), (sparse, 'or is sparse'),
                                       (subclass, 'TensorImage is in the batch')])
def test_odd_tensors_in_a_batch_are_left_alone(gives, why):
    class InputGrads(Callback):
        "The gradient of the input reaches who asks for it"
        def after_backward(self):
            if self.x.requires_grad: self.model.lin.bias.grad += self.x.grad.sum()
    def make(cbs, **kwargs):
        set_seed(0)
        g = torch.Generator().manual_seed(0)
        ds = torch.utils.data.TensorDataset(*(torch.randn(64, k, generator=g) for k in (8, 4)))
        dls = DataLoaders(*[DataLoader(ds, 8) for _ in range(2)], device=default_device())
        learn = Learner(dls, Any().to(dls.device), loss_func=sums, cbs=cbs, **kwargs)
        return learn
    class Gives10(Gives): order = 15     # after `CastToTensor`
    _,g = check(make, lambda: [Gives10(gives), InputGrads()], least=0, said=why, loop=None)
    assert g.replayed==0 and sum(why in r.why for r in g.records)==1

def test_gradients_are_set_to_zero_as_by_fastai():
    "Also those that are sparse, or a part of a graph"
    def grads(zero):
        params = [nn.Parameter(torch.ones(3, 2, device=default_device())) for _ in range(5)]
        opt = Adam(params, lr=.1)
        params[0].grad = torch.ones_like(params[0])
        params[1].grad = torch.ones_like(params[1]).to_sparse()
        params[2].grad = (params[2]*2).requires_grad_()
        for use in ([0], [0, 1], [0, 2], [0, 1, 2], [3]):
            some = Adam([params[i] for i in use], lr=.1)
            zero(some)
        return params, opt
    for a,b in zip(grads(graphs._zero_grad)[0], grads(lambda o: o.zero_grad())[0]):
        assert (a.grad is None)==(b.grad is None)
        if a.grad is not None:
            assert a.grad.requires_grad==b.grad.requires_grad and a.grad.layout==b.grad.layout
            assert torch.equal(a.grad.to_dense(), b.grad.to_dense()) and not a.grad.to_dense().any()

@pytest.mark.parametrize('kwargs', [dict(warmup=0), dict(warmup=1.5), dict(max_shapes=0), dict(warmup=True)])
def test_bad_arguments(kwargs):
    with pytest.raises((ValueError, TypeError), match=next(iter(kwargs))): Graphs(**kwargs)

def test_a_copy_and_an_export(tmp_path):
    learn = learner([Graphs()], loss_func=smooth)
    learn.path = tmp_path
    fit(learn)
    learn.export('o.pkl')
    assert load_learner(tmp_path/'o.pkl').graphs.warmup==3
