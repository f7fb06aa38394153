"SAM is the step of the paper, beside everything else too, and leaves the weights where they belong"
from functools import partial
from math import inf, nan

import pytest, torch
import torch.nn.functional as F
from fastai.callback.all import MixUp
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from common import fit, quiet
from fastai_callbacks_ext.all import (EMA, SAM, Checkpoint, FastLoop, GradientAccumulation, SkipNonFinite,
                                      TerminateOnNaN, rnn_cbs)
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner, text_learner
from test_gradients import batched, data, device, learner
from test_safety import AnyMixedPrecision

def published(model, x, y, rho, adaptive, eta, loss_func=F.cross_entropy):
    "The gradient at w + rho g/|g|, or with T = |w| + eta at w + rho T^2 g/|T g|; and the loss at w"
    w = {n: p.detach().clone() for n,p in model.named_parameters()}
    def value(w): return loss_func(torch.func.functional_call(model, w, (x,)), y)
    g = torch.func.grad(value)(w)
    T = {n: p.abs()+eta if adaptive else torch.ones_like(p) for n,p in w.items()}
    norm = torch.sqrt(sum((T[n]*g[n]).square().sum() for n in w))
    return torch.func.grad(value)({n: w[n] + rho*T[n]**2*g[n]/norm for n in w}),value(w)

def net(): return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).to(device)

@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.floats(1e-3, 2), st.booleans(), st.floats(0, 0.1),
       st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_the_published_step(rho, adaptive, eta, sizes):
    "Weights, gradients and losses of a fit are those of the algorithm written out"
    set_seed(0)
    learn = learner(batched(*data(sum(sizes)), sizes), net(), CrossEntropyLossFlat(),
                    SAM(rho, adaptive, eta), lr=.1)
    with quiet(learn): learn.fit(2)
    set_seed(0)
    model,losses = net(),[]
    for x,y in list(batched(*data(sum(sizes)), sizes))*2:
        g,loss = published(model, x, y, rho, adaptive, eta)
        losses.append(loss.item())
        with torch.no_grad():
            for n,p in model.named_parameters(): p -= .1*g[n]
    for p,q in zip(learn.model.parameters(), model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert learn.grads.losses==pytest.approx(losses, rel=1e-4)

def gradients(*cbs, model=net, seed=0, sizes=(6,)*4, loss_func=None, **kwargs):
    set_seed(seed)
    learn = learner(batched(*data(sum(sizes)), list(sizes)), model(), loss_func or CrossEntropyLossFlat(),
                    *cbs, **kwargs)
    with quiet(learn): learn.fit(1)
    return learn

def test_rho_0_is_plain():
    "To the last bit, with dropout and batch norm"
    model = lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    a,b = gradients(model=model, lr=.1),gradients(SAM(0.), model=model, lr=.1)
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(p, q)
    assert a.grads.losses==b.grads.losses

def test_statistics_and_random_numbers_once():
    "Those of a plain run at the same weights"
    model = lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    a = gradients(model=model); drawn = torch.rand(3)
    b = gradients(SAM(0.5), model=model)
    assert torch.equal(drawn, torch.rand(3))
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(p, q)
    assert a.grads.losses==b.grads.losses
    assert not torch.allclose(a.grads.grads[0], b.grads.grads[0])

def test_dropout_is_the_same_in_both_passes():
    "At a tiny rho the gradient is the plain one"
    model = lambda: nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    a,b = gradients(model=model),gradients(SAM(1e-6), model=model)
    torch.testing.assert_close(a.grads.grads[0], b.grads.grads[0], rtol=1e-3, atol=1e-5)

def test_generators_of_the_model_draw_the_same_in_both_passes():
    masks = []
    class Drop(nn.Linear):
        def __init__(self):
            super().__init__(5, 4)
            self.generator = torch.Generator().manual_seed(0)
        def forward(self, x):
            masks.append(torch.rand(x.shape, generator=self.generator)>.5)
            return super().forward(x*masks[-1].to(x.device))
    gradients(SAM(0.5), model=lambda: Drop().to(device))
    first,second = masks[:8:2],masks[1:8:2]
    assert all(map(torch.equal, first, second)) and not torch.equal(*first[:2])

def test_accumulation():
    "The mean of the gradients of the batches, each at its own way"
    learn = gradients(SAM(0.5), GradientAccumulation(12))
    single = gradients(SAM(0.5)).grads
    want = torch.stack(single.grads).view(2, 2, -1).mean(1)
    torch.testing.assert_close(torch.stack(learn.grads.grads), want)
    assert learn.grads.losses==pytest.approx([sum(single.losses[:2])/2, sum(single.losses[2:])/2])

@pytest.mark.parametrize('dtype,tol', [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize('scale', [1., 2.**12])
def test_mixed_precision(dtype, tol, scale):
    "Both passes in autocast, the way not by the loss scale, and no weight that was cast before it was moved"
    learn = gradients(SAM(0.5), AnyMixedPrecision(dtype, scale), sizes=(6,)*2)
    set_seed(0)
    model = net()
    for got,(x,y) in zip(learn.grads.grads, batched(*data(12), [6]*2)):
        g,_ = published(model, x, y, 0.5, False, 0)
        want = torch.cat([g[n].flatten() for n,_ in model.named_parameters()])
        assert (got-want).norm()<tol*want.norm()

def test_unreduced_loss():
    a = gradients(SAM(0.5), GradientAccumulation(6), loss_func=CrossEntropyLossFlat(reduction='none'))
    b = gradients(SAM(0.5))
    torch.testing.assert_close(torch.stack(a.grads.grads), torch.stack(b.grads.grads))

def test_recurrent_model():
    "Hidden states go on from those of the pass at the weights"
    def run(*cbs):
        learn = text_learner([*rnn_cbs(2., 1.), *cbs], n=3000, lr=0.)
        fit(learn)
        return learn
    a,b = run(),run(SAM(0.5))
    for s,t in zip(a.model[0].hidden[0], b.model[0].hidden[0]): assert torch.equal(s, t)
    assert [o.item() for o in a.recorder.losses]==[o.item() for o in b.recorder.losses]

def test_mixup():
    learn = digits_learner([MixUp(), SAM()], n=400)
    fit(learn, 2)
    assert learn.recorder.values[-1][0]<2.3

class Leave(Callback):
    "Raises in an event"
    def __init__(self, event, exc, order=40):
        self.exc,self.order = exc,order
        setattr(self, event, self.leave)
    def leave(self):
        if self.training and self.iter==1: raise self.exc

@pytest.mark.parametrize('event', ['after_pred','after_loss','before_backward','after_backward','before_step',
                                   'after_batch'])
@pytest.mark.parametrize('exc', [CancelBatchException, CancelFitException, KeyboardInterrupt])
@pytest.mark.parametrize('order', [40,70])
def test_weights_are_put_back(event, exc, order):
    "Bit by bit, whatever leaves the batch"
    if event=='after_batch' and exc is CancelBatchException: return     # the batch is over
    set_seed(0)
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    learn = learner(batched(*data(12), [6]*2), model, CrossEntropyLossFlat(), SAM(3.),
                    Leave(event, exc, order))
    with quiet(learn):
        try: learn.fit(1)
        except KeyboardInterrupt: pass
    for p,q in zip(model.parameters(), before): assert torch.equal(p, q)

class Weights(Callback):
    "Keeps the weights in the events in which others look at them"
    order = 11
    def before_fit(self): self.seen = []
    def look(self): self.seen.append(torch.cat([p.detach().flatten() for p in self.model.parameters()]))
    before_step = after_batch = look

def test_others_see_the_weights():
    learn = gradients(SAM(3.), Weights(), lr=0.)
    for w in learn.weights.seen: assert torch.equal(w, learn.weights.seen[0])

@pytest.mark.parametrize('where', ['input','loss'])
def test_beside_guards(where):
    "A poisoned batch is skipped as without SAM"
    def run(*cbs):
        learn = digits_learner([SAM(), *cbs], n=400)
        fit(learn)
        return learn
    learn = run(SkipNonFinite(), PoisonBatch(2, where))
    assert learn.skip_non_finite.skipped==1
    assert all(t.isfinite().all() for t in learn.model.state_dict().values())
    learn = run(TerminateOnNaN(), PoisonBatch(2, where))
    assert len(learn.terminate_on_nan.records)==1
    assert all(t.isfinite().all() for t in learn.model.state_dict().values())

def test_fast_loop():
    def run(*cbs):
        learn = digits_learner([SAM(), EMA(), *cbs], n=400)
        return fit(learn, 2)
    for p,q in zip(run().model.parameters(), run(FastLoop()).model.parameters()): assert torch.equal(p, q)

def test_frozen_layers():
    "Only weights that are trained are moved"
    def splitter(m): return [list(m[:4].parameters()), list(m[4:].parameters())]
    learn = digits_learner(SAM(0.5), n=160, splitter=splitter)
    before = learn.model[0].weight.detach().clone()
    learn.freeze()
    fit(learn)
    assert torch.equal(learn.model[0].weight, before)
    learn.unfreeze()
    fit(learn)
    assert not torch.equal(learn.model[0].weight, before)

def test_resume(tmp_path):
    class Kill(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==8: raise KeyboardInterrupt
    def run(*cbs, path):
        learn = digits_learner([SAM(), Checkpoint(path, steps=1), *cbs], bs=32, n=400)
        with quiet(learn): learn.fit_one_cycle(2)
        return learn
    want = run(path=tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): run(Kill(), path=tmp_path/'b')
    for p,q in zip(run(path=tmp_path/'b').model.parameters(), want.model.parameters()):
        assert torch.equal(p, q)

@pytest.mark.parametrize('kwargs,match', [(dict(rho=-1),'rho='), (dict(adaptive=1),'adaptive='),
                                          (dict(eta=-1),'eta=')])
def test_wrong_arguments(kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match): SAM(**kwargs)

class Checkpointed(nn.Module):
    "Computes its first layer once more in the backward pass, or does not"
    def __init__(self, how):
        super().__init__()
        self.body,self.head,self.how = nn.Linear(5, 8),nn.Linear(8, 4),how
    def forward(self, x):
        if self.how is None: return self.head(self.body(x).tanh())
        h = checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=self.how=='reentrant')
        return self.head(h.tanh())

@pytest.mark.parametrize('how', ['reentrant','not reentrant'])
@pytest.mark.parametrize('cbs', [[], [lambda: GradientAccumulation(12)]], ids=['alone', 'accumulation'])
def test_activation_checkpointing(how, cbs):
    "All weights are moved, the same way as without it"
    a,b = (gradients(SAM(1.), *(f() for f in cbs), model=lambda: Checkpointed(o), lr=.1) for o in (how, None))
    for p,q in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(p, q)

def test_gradients_that_are_there_stay():
    "Of an open window, and of parameters that the optimizer does not have"
    class Look(Callback):
        order,run_valid = 46,False
        def before_fit(self): self.seen = []
        def before_batch(self):
            self.seen.append([None if p.grad is None else p.grad.clone() for p in self.model.parameters()])
    learn = gradients(SAM(1.), GradientAccumulation(12), Look(), model=net,
                      splitter=lambda m: [list(m[2].parameters())])
    assert all(g is None for o in learn.look.seen[:1]
               for g in o) and all(o[2].any() for o in learn.look.seen[1::2])
    plain = gradients(GradientAccumulation(12), model=net, splitter=lambda m: [list(m[2].parameters())])
    for p,q in zip(learn.model[0].parameters(), plain.model[0].parameters()):
        assert p.grad.shape==q.grad.shape

def test_taken_off_between_the_passes():
    "By a callback that acts in the first one: the batch is that of a plain run"
    class Off(Callback):
        def after_pred(self):
            if self.training: self.learn.remove_cb(SAM)
    model = lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(.5), nn.Linear(8, 4))
    a,b = gradients(SAM(1.), Off(), model=model, lr=.1),gradients(model=model, lr=.1)
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(p, q)
