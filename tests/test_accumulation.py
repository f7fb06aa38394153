"A window of accumulation is the big batch, whatever else is on the learner and however it is left"
from functools import partial
from math import inf

import pytest, torch
import torch.nn.functional as F
from fastai.callback.all import GradientAccumulation as Fastais, MixUp, ShortEpochCallback
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException,
                                  CancelEpochException, CancelFitException, CancelTrainException)
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st
from torch import nn
from common import fit, quiet
from fastai_callbacks_ext.all import (Checkpoint, FastLoop, GradientAccumulation, GradientCentralization,
                                      GradientClip, GradientNoise, LookaheadWeights, SkipNonFinite,
                                      SpikeGuard, TerminateOnNaN, loss_weight, rnn_cbs)
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner, text_learner
from cases import some
from test_gradients import Batches, Grads, batched, data, device, grads, learner
from test_safety import AnyMixedPrecision

sizes = st.lists(st.integers(1, 7), min_size=1, max_size=12)

def windows(sizes, n_acc, last):
    "Sizes of the windows"
    res,items = [],0
    for s in sizes:
        items += s
        if items>=n_acc: res.append(items); items = 0
    return res + [items]*bool(items and last=='flush')

class Float(Callback):
    "fastai's recorder takes float32 only"
    order,run_valid = 49,True
    def after_batch(self): self.learn.loss = self.loss.float()

def product_loss(pred, y): return (pred*y).mean()

@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes, st.integers(1, 20), st.sampled_from(['flush','drop']), st.integers(0, 99))
def test_exact_on_integers(sizes, n_acc, last, seed):
    "In float64 the gradient of a window is the sum of integers over their number, to the last bit"
    g = torch.Generator().manual_seed(seed)
    x,y = (torch.randint(-50, 50, (sum(sizes),k), generator=g).double().to(device) for k in (3,1))
    got = grads(batched(x, y, sizes), nn.Linear(3, 1, bias=False).double(), product_loss, Float(),
                GradientAccumulation(n_acc, last))
    wins = windows(sizes, n_acc, last)
    want = [(a*b).sum(0)/len(a) for a,b in zip(x[:sum(wins)].split(wins), y[:sum(wins)].split(wins))]
    assert len(got.grads)==len(want)
    for a,b in zip(got.grads, want): assert torch.equal(a, b)

classes = torch.tensor([.2,1.,3.,5.], device=device)
losses = {
    'cross-entropy': CrossEntropyLossFlat, 'classes': lambda: CrossEntropyLossFlat(weight=classes),
    'none': lambda: CrossEntropyLossFlat(reduction='none'),
    'none, classes': lambda: nn.CrossEntropyLoss(reduction='none', weight=classes),
    'sum': lambda: CrossEntropyLossFlat(reduction='sum'), 'function': lambda: F.cross_entropy,
    'ignore 0': lambda: CrossEntropyLossFlat(ignore_index=0)}

class Mean(Callback):
    "Reduces a loss of each item as PyTorch does"
    order = 5
    def before_backward(self):
        if self.loss_grad.ndim: self.learn.loss_grad = self.loss_grad.sum()/loss_weight(self.learn)

@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=8), st.integers(1, 20), st.integers(0, 99),
       st.booleans())
@pytest.mark.parametrize('kind', losses)
def test_equals_the_big_batch(kind, sizes, n_acc, seed, ignored):
    "Gradients, losses and weights of a fit in pieces are those of the fit in windows"
    g = torch.Generator().manual_seed(seed)
    x,y = torch.randn(sum(sizes), 5, generator=g),torch.randint(0, 4, (sum(sizes),), generator=g)
    if ignored and kind!='ignore 0': y[torch.rand(len(y), generator=g)<0.5] = -100
    y[0] = 1
    x,y = x.to(device),y.to(device)
    def run(sizes, *cbs):
        set_seed(0)
        model = nn.Linear(5, 4)
        learn = learner(batched(x, y, sizes), model, losses[kind](), *cbs, lr=0.02,
                        opt_func=partial(SGD, mom=0.9))
        with quiet(learn): learn.fit(2)
        return learn
    wins = windows(sizes, n_acc, 'flush')
    starts = torch.tensor([0,*wins]).cumsum(0)
    if any(not float(loss_weight(type('', (), dict(loss_func=losses[kind](), yb=(y[a:b],)))))
           for a,b in zip(starts, starts[1:])): return   # a mean of nothing
    small,big = run(sizes, GradientAccumulation(n_acc)),run(wins, Mean())
    for a,b in zip(small.grads.grads, big.grads.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a,b in zip(small.model.parameters(), big.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if 'none' not in kind:
        torch.testing.assert_close(small.grads.losses, big.grads.losses, rtol=1e-4, atol=1e-5)
    assert len(small.recorder.losses)==len(big.recorder.losses)
    if 'none' not in kind:
        torch.testing.assert_close(small.recorder.losses[-1], big.recorder.losses[-1], rtol=1e-4, atol=1e-5)

def pair(*cbs, small=(6,)*8, big=(12,)*4, n_acc=12, big_cbs=None, fit=lambda o: o.fit(2), acc=None, **kwargs):
    "A fit in pieces with accumulation, and the one with big batches, beside `cbs`"
    res = []
    for sizes,first in ((small, [acc or GradientAccumulation(n_acc)]), (big, [])):
        set_seed(0)
        learn = learner(batched(*data(sum(sizes)), list(sizes)), nn.Linear(5, 4), CrossEntropyLossFlat(),
                        *first, *(f() for f in cbs), **(dict(lr=.1) | kwargs))
        with quiet(learn): fit(learn)
        res.append(learn)
    return res

def assert_same(small, big, **tol):
    tol = tol or dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(small.grads.grads), torch.stack(big.grads.grads), **tol)
    assert small.grads.lrs==big.grads.lrs
    for a,b in zip(small.model.parameters(), big.model.parameters()): torch.testing.assert_close(a, b, **tol)

def test_fastais_is_not():
    "What these tests find in fastai's callback"
    small,big = pair(n_acc=10, acc=Fastais(10))
    with pytest.raises(AssertionError): assert_same(small, big)

@pytest.mark.parametrize('opt_func', [SGD, Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_optimizers(opt_func): assert_same(*pair(opt_func=opt_func, lr=0.01))

@pytest.mark.parametrize('cb', [
    lambda: GradientClip(0.1), lambda: GradientClip(max_value=.01), lambda: GradientClip(adaptive=0.1),
    GradientCentralization, GradientNoise, LookaheadWeights, TerminateOnNaN, SkipNonFinite, SpikeGuard,
    FastLoop, lambda: AnyMixedPrecision(torch.float32, 2.**10)])
def test_beside(cb): assert_same(*pair(cb), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('method', ['fit_one_cycle','fit_flat_cos','fit_sgdr'])
def test_schedules_count_steps(method):
    run = lambda o: o.fit_sgdr(2, 1) if method=='fit_sgdr' else getattr(o, method)(3, 0.1)
    small,big = pair(fit=run)
    assert_same(small, big)
    assert small.recorder.lrs==big.recorder.lrs

def test_window_loss_in_recorder_and_metrics():
    small,big = pair(fit=lambda o: o.fit(2), metrics=accuracy)
    torch.testing.assert_close(torch.stack(small.recorder.losses), torch.stack(big.recorder.losses))
    for a,b in zip(small.recorder.values, big.recorder.values): torch.testing.assert_close(a[0], b[0])
    small,big = pair(fit=lambda o: (setattr(o.recorder, 'train_metrics', True), o.fit(1)), metrics=accuracy,
                     lr=0.)
    torch.testing.assert_close(list(small.recorder.values[-1][:2]), list(big.recorder.values[-1][:2]))
    assert small.recorder.run_train

def test_progress_of_n_acc():
    "Windows grow by epoch, and by step"
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    cb := GradientAccumulation(lambda epoch, step: 6*2**epoch))
    with quiet(learn): learn.fit(3)
    assert len(learn.grads.grads)==8+4+2
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(lambda epoch, step: 6*(step+1)))
    with quiet(learn): learn.fit(1)
    assert len(learn.grads.grads)==4   # 6, 12, 18, and 12 that were left
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(lambda epoch, step: 0))
    with quiet(learn), pytest.raises(ValueError, match='n_acc'): learn.fit(1)

@pytest.mark.parametrize('last', ['flush','drop'])
def test_nothing_is_left_over(last):
    "However a fit ends, the next one is what it would have been"
    class Leave(Callback):
        order = 100
        def after_batch(self):
            if self.training and self.iter==3: raise KeyboardInterrupt
    def run(first):
        set_seed(0)
        learn = learner(batched(*data(42), [6]*7), nn.Linear(5, 4), CrossEntropyLossFlat(),
                        GradientAccumulation(18, last), lr=0.)
        if first:
            learn.add_cb(Leave())
            with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(1)
            learn.remove_cb(Leave)
            assert learn.recorder.run_train and not any(p.grad.any() for p in learn.model.parameters())
        with quiet(learn): learn.fit(2, 0.1)
        return learn
    for a,b in zip(run(True).grads.grads, run(False).grads.grads, strict=True): assert torch.equal(a, b)

def test_a_phase_cut_short_flushes():
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(30), ShortEpochCallback(0.7), lr=0.)
    with quiet(learn): learn.fit(1)
    x,y = data(48)
    loss = F.cross_entropy(learn.model(x[30:42]), y[30:42])
    want = torch.autograd.grad(loss, list(learn.model.parameters()))
    assert len(learn.grads.grads)==2
    torch.testing.assert_close(learn.grads.grads[1], torch.cat([o.flatten() for o in want]))

def test_a_left_over_window_that_is_refused():
    "A callback that cancels the batch when the last window closes ends only that step"
    class Refuse(Callback):
        order = 20
        def before_step(self):
            if len(self.grads.grads)==1: raise CancelBatchException
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(30), Refuse(), ShortEpochCallback(0.7), lr=0.1)
    with quiet(learn): learn.fit(1)
    assert len(learn.grads.grads)==1 and len(learn.recorder.values)==1
    assert not any(p.grad.any() for p in learn.model.parameters())

@pytest.mark.parametrize('ends', [CancelTrainException, CancelEpochException])
@pytest.mark.parametrize('exc', [CancelBatchException, CancelTrainException, CancelEpochException,
                                 CancelFitException])
def test_any_cancellation_of_the_last_step(exc, ends):
    "It ends as much as fastai ends after the last batch, and the fit is no error"
    class Refuse(Callback):
        order,validated = 20,0
        def before_validate(self): self.validated += 1
        def before_step(self):
            if self.iter==6: raise exc
        def after_batch(self):
            if self.training and self.iter==6: raise ends
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(18), refuse := Refuse(), lr=0.1)
    with quiet(learn): learn.fit(2)
    assert len(learn.grads.grads)==(2 if exc is CancelFitException else 4)
    goes_on = ends is CancelTrainException and exc in (CancelBatchException, CancelTrainException)
    assert refuse.validated==2*goes_on
    assert not any(p.grad.any() for p in learn.model.parameters())

@pytest.mark.parametrize('batch', [0,3,4,7])
def test_a_skipped_batch_was_never_there(batch):
    "In the middle of a window, closing it, or the last one of the epoch"
    def run(keep, *cbs):
        set_seed(0)
        x,y = data(48)
        batches = [b for i,b in enumerate(batched(x, y, [6]*8)) if keep or i!=batch]
        learn = learner(Batches(batches), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(24),
                        *cbs, lr=0.1)
        with quiet(learn): learn.fit(1)
        return learn
    a,b = run(True, SkipNonFinite(), PoisonBatch(batch)),run(False)
    assert [torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters())]==[True, True]

@pytest.mark.parametrize('batch', [0,3,7])
def test_a_cancelled_backward_pass_adds_nothing(batch):
    class Cancel(Callback):
        order = -20
        def before_backward(self):
            if self.iter==batch: raise CancelBackwardException
    def run(batches, *cbs):
        set_seed(0)
        learn = learner(Batches(batches), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(24),
                        *cbs, lr=0.1)
        with quiet(learn): learn.fit(1)
        return learn
    batches = batched(*data(48), [6]*8)
    a,b = run(batches, Cancel()),run([o for i,o in enumerate(batches) if i!=batch])
    for p,q in zip(a.grads.grads, b.grads.grads, strict=True): assert torch.equal(p, q)

def test_all_targets_ignored():
    "A batch, or a window, without a target does nothing, and shows no NaN"
    x,y = data(48)
    y[6:24] = -100
    learn = learner(batched(x, y, [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(12),
                    TerminateOnNaN(), lr=0.)
    with quiet(learn): learn.fit(1)
    assert len(learn.grads.grads)==4 and not learn.grads.grads[1].any() and learn.grads.losses[1]==0
    want = torch.autograd.grad(F.cross_entropy(learn.model(x[:6]), y[:6]), list(learn.model.parameters()))
    torch.testing.assert_close(learn.grads.grads[0], torch.cat([o.flatten() for o in want]))
    assert all(o.isfinite() for o in learn.recorder.losses)

def test_terms_that_others_add_to_the_loss():
    "AR and TAR count as the rest of the loss"
    def run(bs, *cbs):
        learn = text_learner([*rnn_cbs(2., 1.), Grads(), *cbs], bs=bs, n=4000, lr=0.)
        for o in learn.model.modules():
            if hasattr(o, 'p'): o.p = 0.
            for k,p in (('weight_p',1e-9), ('embed_p',0.)):
                if hasattr(o, k): setattr(o, k, p)
        with quiet(learn): learn.fit(1)
        return learn.grads.grads
    single,both = run(16),run(16, GradientAccumulation(32))
    torch.testing.assert_close((single[0]+single[1])/2, both[0], rtol=1e-4, atol=1e-6)

def test_mixup_and_accumulation():
    learn = digits_learner([MixUp(), GradientAccumulation(128)], n=400)
    fit(learn, 2)
    assert learn.recorder.values[-1][0]<2.3

def test_overflow_drops_the_window():
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(12), AnyMixedPrecision(torch.float32, 2.**10),
                    PoisonBatch(2, 'grad', inf), lr=.1)
    with quiet(learn): learn.fit(1)
    assert len(learn.grads.grads)==3 and all(o.isfinite().all() for o in learn.model.parameters())

@pytest.mark.parametrize('batch', some([2,5,1], 2))
def test_resume_inside_a_window(batch, tmp_path):
    "The state has the open window"
    def run(*cbs, path):
        learn = digits_learner([GradientAccumulation(96), Checkpoint(path, steps=1), *cbs], bs=32, n=400)
        with quiet(learn): learn.fit_one_cycle(2)
        return learn
    class Kill(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==batch+1: raise KeyboardInterrupt
    want = run(path=tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): run(Kill(), path=tmp_path/'b')
    got = run(path=tmp_path/'b')
    for p,q in zip(got.model.parameters(), want.model.parameters()): assert torch.equal(p, q)
    assert list(map(float, got.recorder.losses))==list(map(float, want.recorder.losses))
    assert got.recorder.run_train

@pytest.mark.parametrize('kwargs,match', [
    (dict(n_acc=0),'n_acc='), (dict(last='keep'),'last='), (dict(weight=3),'weight=')])
def test_wrong_accumulation(kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match): GradientAccumulation(**kwargs)


# What is borrowed

@pytest.mark.parametrize('name', ['wd','lr','mom'])
@pytest.mark.parametrize('event', ['before_step','after_step','after_epoch'])
@pytest.mark.parametrize('order', [-5,70])
def test_what_others_set_stays_set(event, name, order):
    "As beside big batches, with and without a schedule"
    class Sets(Callback):
        def change(self):
            if self.training or event=='after_epoch': self.opt.set_hyper(name, self.opt.hypers[-1][name]*.9)
        def before_fit(self): self.seen = []
        def after_train(self):
            self.seen.append({k:v for h in self.opt.hypers for k,v in h.items() if k!='lr' or name=='lr'})
    Sets.order = order
    setattr(Sets, event, Sets.change)
    fits = [lambda o: o.fit(3, .1, wd=.1)] + [lambda o: o.fit_one_cycle(3, .1, wd=.1)]*(name=='wd')
    if order<6 and event=='before_step': return     # in every batch, as others mean it
    for fit in fits:
        small,big = pair(Sets, fit=fit, opt_func=partial(SGD, mom=.9))
        if fit is fits[0]: assert small.sets.seen==big.sets.seen
        else: assert [o['wd'] for o in small.sets.seen]==[o['wd'] for o in big.sets.seen]

def test_nothing_is_lent_after_a_step():
    "Others see their own rate, and the recorder as it is, in all events but those of the step"
    class Look(Callback):
        order,run_valid = 65,False
        def before_batch(self): self.rate = self.opt.hypers[-1]['lr']
        def after_batch(self):
            assert self.opt.hypers[-1]['lr']==self.rate
            assert self.recorder.run_train and 'after_batch' not in vars(self.recorder)
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(18), Look(), lr=.1)
    with quiet(learn): learn.fit_one_cycle(2, .1)
    assert len(learn.recorder.losses)==6

def test_recorder_that_others_switch_off():
    class Off(Callback):
        order = 51
        def after_batch(self):
            if self.training and self.iter==3: self.recorder.run_train = False
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(12), Off(), lr=.1)
    with quiet(learn): learn.fit(1)
    assert not learn.recorder.run_train and len(learn.recorder.losses)==2
    assert 'after_batch' not in vars(learn.recorder)

# How an epoch ends

class Cancel(Callback):
    "Ends something after the fourth batch of an epoch, before or after the recorder has seen it"
    def __init__(self, exc, order): self.exc,self.order = exc,order
    def after_batch(self):
        if self.training and self.iter==3: raise self.exc

@pytest.mark.parametrize('order', [40,100])
@pytest.mark.parametrize('exc', [CancelTrainException, CancelEpochException, CancelFitException])
@pytest.mark.parametrize('last', ['flush','drop'])
def test_cancelled(exc, order, last):
    "A window of three batches, and the fourth: a step of its own, or none"
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(18, last), Cancel(exc, order), lr=0.)
    with quiet(learn): learn.fit(2)
    epochs,flushed = 1 if exc is CancelFitException else 2,last=='flush' and exc is not CancelFitException
    assert len(learn.grads.grads)==epochs*(1+flushed)
    x,y = data(48)
    loss = F.cross_entropy(learn.model(x[18:24]), y[18:24])
    want = torch.autograd.grad(loss, list(learn.model.parameters()))
    if flushed: torch.testing.assert_close(learn.grads.grads[1], torch.cat([o.flatten() for o in want]))
    assert 'after_batch' not in vars(learn.recorder)
    assert not any(p.grad.any() for p in learn.model.parameters())

def test_epochs_of_one_batch(capsys):
    "A step an epoch; without `flush` there is none, and a line says so"
    for last,steps in (('flush', 3), ('drop', 0)):
        learn = learner(batched(*data(6), [6]), nn.Linear(5, 4), CrossEntropyLossFlat(),
                        GradientAccumulation(32, last), lr=.1)
        with quiet(learn): learn.fit(3)
        assert len(learn.grads.grads)==steps
    said = 'took no step in epoch 0: the epoch has fewer than n_acc=32 items'
    assert capsys.readouterr().out.count(said)==1

def test_as_people_run_it(capsys):
    "Bar and table on, a PyTorch loader with workers, two fits of `fine_tune`"
    x,y = (o.cpu() for o in data(48))
    def run(bs, *cbs):
        set_seed(0)
        loader = torch.utils.data.DataLoader(list(zip(x, y)), bs, num_workers=1)
        learn = Learner(DataLoaders(loader, loader), nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)),
                        CrossEntropyLossFlat(), opt_func=SGD, cbs=cbs,
                        splitter=lambda m: [list(o.parameters()) for o in m], metrics=accuracy)
        learn.fine_tune(1, .1, freeze_epochs=1)
        return learn
    small,big = run(6, GradientAccumulation(12)),run(12)
    for a,b in zip(small.model.parameters(), big.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(small.recorder.losses)==len(big.recorder.losses) and 'accuracy' in capsys.readouterr().out

def test_a_rate_that_is_set_in_a_step_stays():
    class Own(Callback):
        order,run_valid = 70,False
        def before_step(self): self.opt.set_hyper('lr', .05)
        def after_step(self): assert self.opt.hypers[-1]['lr']==.05
    learn = learner(batched(*data(24), [6]*4), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    GradientAccumulation(12), Own())
    with quiet(learn): learn.fit_one_cycle(1, .1)
