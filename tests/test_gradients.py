"Each callback of the page on gradients is its definition, alone and beside others"
import copy, itertools
from functools import partial
from math import inf, isfinite, nan

import pytest, torch
import torch.nn.functional as F
from fastai.callback.all import GradientAccumulation as Fastais, MixedPrecision, MixUp, ReduceLROnPlateau, ShortEpochCallback
from fastai.callback.core import Callback, CancelBackwardException, CancelBatchException, CancelStepException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st
from torch import nn
from common import fit, quiet
from fastai_callbacks_ext.all import (Checkpoint, FastLoop, GradientAccumulation, GradientCentralization, GradientClip, GradientNoise, LookaheadWeights, RNNRegularizer, SkipNonFinite,
                                      SpikeGuard, StepLimit, TerminateOnNaN, loss_weight, rnn_cbs, unit_norm)
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner, text_learner
from test_safety import CPUMixedPrecision

class Batches(list):
    "A loader of the batches in this list"

class Grads(Callback):
    "Keeps gradient, loss and hyper-parameters of each step"
    order,run_valid = 60,False
    def before_fit(self): self.grads,self.losses,self.lrs = [],[],[]
    def before_step(self):
        self.grads.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]).clone())
        self.losses.append(float(self.loss.mean())); self.lrs.append(self.opt.hypers[-1]['lr'])

def batched(x, y, sizes):
    "`x` and `y` in batches of these sizes"
    return Batches(zip(x.split(sizes), y.split(sizes)))

def learner(train, model, loss_func, *cbs, opt_func=SGD, lr=0., **kwargs):
    learn = Learner(DataLoaders(train, Batches(train[:1])), model, loss_func, opt_func=opt_func, lr=lr, cbs=[Grads(), *cbs], **kwargs)
    learn.recorder.add_time = False
    return learn

def grads(*args, n=1, **kwargs):
    learn = learner(*args, **kwargs)
    with quiet(learn): learn.fit(n)
    return learn.grads

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

@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes, st.integers(1, 20), st.sampled_from(['flush','drop']), st.integers(0, 99))
def test_exact_on_integers(sizes, n_acc, last, seed):
    "In float64 the gradient of a window is the sum of integers over their number, to the last bit"
    g = torch.Generator().manual_seed(seed)
    x,y = (torch.randint(-50, 50, (sum(sizes),k), generator=g).double() for k in (3,1))
    got = grads(batched(x, y, sizes), nn.Linear(3, 1, bias=False).double(), product_loss, Float(), GradientAccumulation(n_acc, last))
    wins = windows(sizes, n_acc, last)
    want = [(a*b).sum(0)/len(a) for a,b in zip(x[:sum(wins)].split(wins), y[:sum(wins)].split(wins))]
    assert len(got.grads)==len(want)
    for a,b in zip(got.grads, want): assert torch.equal(a, b)

losses = {
    'cross-entropy': lambda: CrossEntropyLossFlat(), 'classes': lambda: CrossEntropyLossFlat(weight=torch.tensor([.2,1.,3.,5.])), 'none': lambda: CrossEntropyLossFlat(reduction='none'),
    'none, classes': lambda: nn.CrossEntropyLoss(reduction='none', weight=torch.tensor([.2,1.,3.,5.])), 'sum': lambda: CrossEntropyLossFlat(reduction='sum'), 'function': lambda: F.cross_entropy,
    'ignore 0': lambda: CrossEntropyLossFlat(ignore_index=0)}

class Mean(Callback):
    "Reduces a loss of each item as PyTorch does"
    order = 5
    def before_backward(self):
        if self.loss_grad.ndim: self.learn.loss_grad = self.loss_grad.sum()/loss_weight(self.learn)

@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=8), st.integers(1, 20), st.integers(0, 99), st.booleans())
@pytest.mark.parametrize('kind', losses)
def test_equals_the_big_batch(kind, sizes, n_acc, seed, ignored):
    "Gradients, losses and weights of a fit in pieces are those of the fit in windows"
    g = torch.Generator().manual_seed(seed)
    x,y = torch.randn(sum(sizes), 5, generator=g),torch.randint(0, 4, (sum(sizes),), generator=g)
    if ignored and kind!='ignore 0': y[torch.rand(len(y), generator=g)<0.5] = -100
    y[0] = 1
    def run(sizes, *cbs):
        set_seed(0)
        model = nn.Linear(5, 4)
        learn = learner(batched(x, y, sizes), model, losses[kind](), *cbs, lr=0.02, opt_func=partial(SGD, mom=0.9))
        with quiet(learn): learn.fit(2)
        return learn
    wins = windows(sizes, n_acc, 'flush')
    starts = torch.tensor([0,*wins]).cumsum(0)
    if any(not float(loss_weight(type('', (), dict(loss_func=losses[kind](), yb=(y[a:b],))))) for a,b in zip(starts, starts[1:])): return   # a mean of nothing
    small,big = run(sizes, GradientAccumulation(n_acc)),run(wins, Mean())
    for a,b in zip(small.grads.grads, big.grads.grads, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a,b in zip(small.model.parameters(), big.model.parameters()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if 'none' not in kind: torch.testing.assert_close(small.grads.losses, big.grads.losses, rtol=1e-4, atol=1e-5)
    assert len(small.recorder.losses)==len(big.recorder.losses)
    if 'none' not in kind: torch.testing.assert_close(small.recorder.losses[-1], big.recorder.losses[-1], rtol=1e-4, atol=1e-5)

def data(n=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g),torch.randint(0, 4, (n,), generator=g)

def pair(*cbs, small=(6,)*8, big=(12,)*4, n_acc=12, big_cbs=None, fit=lambda o: o.fit(2), acc=None, **kwargs):
    "A fit in pieces with accumulation, and the one with big batches, beside `cbs`"
    res = []
    for sizes,first in ((small, [acc or GradientAccumulation(n_acc)]), (big, [])):
        set_seed(0)
        learn = learner(batched(*data(sum(sizes)), list(sizes)), nn.Linear(5, 4), CrossEntropyLossFlat(), *first, *(f() for f in cbs), **(dict(lr=.1) | kwargs))
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

@pytest.mark.parametrize('cb', [lambda: GradientClip(0.1), lambda: GradientClip(max_value=.01), lambda: GradientClip(adaptive=0.1), GradientCentralization, GradientNoise, LookaheadWeights,
                                TerminateOnNaN, SkipNonFinite, SpikeGuard, FastLoop, lambda: CPUMixedPrecision(torch.float32, 2.**10)])
def test_beside(cb): assert_same(*pair(cb), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('method', ['fit_one_cycle','fit_flat_cos','fit_sgdr'])
def test_schedules_count_steps(method):
    run = lambda o: o.fit_sgdr(2, 1) if method=='fit_sgdr' else getattr(o, method)(3, 0.1)
    assert_same(*pair(fit=run))

def test_window_loss_in_recorder_and_metrics():
    small,big = pair(fit=lambda o: o.fit(2), metrics=accuracy)
    torch.testing.assert_close(torch.stack(small.recorder.losses), torch.stack(big.recorder.losses))
    for a,b in zip(small.recorder.values, big.recorder.values): torch.testing.assert_close(a[0], b[0])
    small,big = pair(fit=lambda o: (setattr(o.recorder, 'train_metrics', True), o.fit(1)), metrics=accuracy, lr=0.)
    torch.testing.assert_close(list(small.recorder.values[-1][:2]), list(big.recorder.values[-1][:2]))
    assert small.recorder.run_train

def test_progress_of_n_acc():
    "Windows grow by epoch, and by step"
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), cb := GradientAccumulation(lambda epoch, step: 6*2**epoch))
    with quiet(learn): learn.fit(3)
    assert len(learn.grads.grads)==8+4+2
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(lambda epoch, step: 6*(step+1)))
    with quiet(learn): learn.fit(1)
    assert len(learn.grads.grads)==4   # 6, 12, 18, and 12 that were left
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(lambda epoch, step: 0))
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
        learn = learner(batched(*data(42), [6]*7), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(18, last), lr=0.)
        if first:
            learn.add_cb(Leave())
            with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(1)
            learn.remove_cb(Leave)
            assert learn.recorder.run_train and not any(p.grad.any() for p in learn.model.parameters())
        with quiet(learn): learn.fit(2, 0.1)
        return learn
    for a,b in zip(run(True).grads.grads, run(False).grads.grads, strict=True): assert torch.equal(a, b)

def test_a_phase_cut_short_flushes():
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(30), ShortEpochCallback(0.7), lr=0.)
    with quiet(learn): learn.fit(1)
    x,y = data(48)
    want = torch.autograd.grad(F.cross_entropy(learn.model(x[30:42]), y[30:42]), list(learn.model.parameters()))
    assert len(learn.grads.grads)==2
    torch.testing.assert_close(learn.grads.grads[1], torch.cat([o.flatten() for o in want]))

def test_a_left_over_window_that_is_refused():
    "A callback that cancels the batch when the last window closes ends only that step"
    class Refuse(Callback):
        order = 20
        def before_step(self):
            if len(self.grads.grads)==1: raise CancelBatchException
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(30), Refuse(), ShortEpochCallback(0.7), lr=0.1)
    with quiet(learn): learn.fit(1)
    assert len(learn.grads.grads)==1 and len(learn.recorder.values)==1 and not any(p.grad.any() for p in learn.model.parameters())

@pytest.mark.parametrize('batch', [0,3,4,7])
def test_a_skipped_batch_was_never_there(batch):
    "In the middle of a window, closing it, or the last one of the epoch"
    def run(keep, *cbs):
        set_seed(0)
        x,y = data(48)
        batches = [b for i,b in enumerate(batched(x, y, [6]*8)) if keep or i!=batch]
        learn = learner(Batches(batches), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(24), *cbs, lr=0.1)
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
        learn = learner(Batches(batches), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(24), *cbs, lr=0.1)
        with quiet(learn): learn.fit(1)
        return learn
    batches = batched(*data(48), [6]*8)
    a,b = run(batches, Cancel()),run([o for i,o in enumerate(batches) if i!=batch])
    for p,q in zip(a.grads.grads, b.grads.grads, strict=True): assert torch.equal(p, q)

def test_all_targets_ignored():
    "A batch, or a window, without a target does nothing, and shows no NaN"
    x,y = data(48)
    y[6:24] = -100
    learn = learner(batched(x, y, [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(12), TerminateOnNaN(), lr=0.)
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
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientAccumulation(12), CPUMixedPrecision(torch.float32, 2.**10), PoisonBatch(2, 'grad', inf), lr=.1)
    with quiet(learn): learn.fit(1)
    assert len(learn.grads.grads)==3 and all(o.isfinite().all() for o in learn.model.parameters())

@pytest.mark.parametrize('batch', [1,2,5])
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
    assert [o.item() for o in got.recorder.losses]==[o.item() for o in want.recorder.losses] and got.recorder.run_train

@pytest.mark.parametrize('kwargs,match', [(dict(n_acc=0),'n_acc='), (dict(last='keep'),'last='), (dict(weight=3),'weight=')])
def test_wrong_accumulation(kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match): GradientAccumulation(**kwargs)

# Clipping

def clipped(cb, *cbs, model=None, n=1, **kwargs):
    "Gradients without and with a clip, of the same batches at the same weights"
    res = []
    for clip in ([], [cb]):
        set_seed(0)
        learn = learner(batched(*data(48), [6]*8), model() if model else nn.Linear(5, 4), CrossEntropyLossFlat(), *clip, *cbs, lr=0., **kwargs)
        with quiet(learn): learn.fit(n)
        res.append(torch.stack(learn.grads.grads))
    return res

@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(0.01, 5), st.sampled_from([1., 1.5, 2., 3., inf]))
def test_by_norm(max_norm, p):
    "As torch's `clip_grad_norm_`"
    plain,got = clipped(cb := GradientClip(max_norm, p))
    for g,h,norm in zip(plain, got, cb.norms):
        param = nn.Parameter(torch.zeros_like(g)); param.grad = g.clone()
        total = nn.utils.clip_grad_norm_([param], max_norm, p)
        torch.testing.assert_close(h, param.grad, rtol=1e-4, atol=1e-6)
        assert norm==pytest.approx(total.item(), rel=1e-4)
    assert cb.clip_rate==sum(o>max_norm for o in cb.norms)/8

@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.floats(1e-3, 1))
def test_by_value(limit):
    plain,got = clipped(GradientClip(max_value=limit))
    torch.testing.assert_close(got, plain.clamp(-limit, limit))

def net(): return nn.Sequential(nn.Unflatten(1, (1,5)), nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 4))

def agc(p, g, limit, eps=1e-3):
    "Of the paper, unit by unit"
    if p.ndim<2: return g*min(1, limit*max(p.norm().item(), eps)/max(g.norm().item(), 1e-12))
    return torch.stack([b*min(1, limit*max(a.norm().item(), eps)/max(b.norm().item(), 1e-12)) for a,b in zip(p, g)])

@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.floats(1e-3, 1), st.sampled_from([(), '4', ('1','4')]))
def test_adaptive(limit, exclude):
    plain,got = clipped(GradientClip(adaptive=limit, exclude=exclude), model=net)
    set_seed(0)
    model = net()
    for g,h in zip(plain, got):
        parts = g.split([p.numel() for p in model.parameters()])
        want = [o if exclude and n.startswith(exclude) else agc(p, o.view_as(p), limit) for (n,p),o in zip(model.named_parameters(), parts)]
        torch.testing.assert_close(h, torch.cat([o.detach().flatten() for o in want]), rtol=1e-4, atol=1e-7)

def test_adaptive_as_timm():
    agc = pytest.importorskip('timm.utils.agc')
    plain,got = clipped(GradientClip(adaptive=0.02), model=net)
    set_seed(0)
    model = net()
    for g,h in zip(plain, got):
        for p,o in zip(model.parameters(), g.split([p.numel() for p in model.parameters()])): p.grad = o.view_as(p).clone()
        agc.adaptive_clip_grad(model.parameters(), 0.02)
        torch.testing.assert_close(h, torch.cat([p.grad.flatten() for p in model.parameters()]))

def test_auto():
    "The percentile of the norms so far, that of the step included"
    import numpy as np
    plain,got = clipped(cb := GradientClip(auto=30, window=6), n=2)
    norms = plain.norm(dim=1).tolist()
    limits = [np.percentile(norms[max(0, i-5):i+1], 30) for i in range(16)]
    assert cb.limits==pytest.approx(limits, rel=1e-4)
    torch.testing.assert_close(got.norm(dim=1), torch.tensor([min(a, b) for a,b in zip(norms, limits)]).float())

@pytest.mark.parametrize('kwargs', [{}, dict(norm_type=inf), dict(max_value=.1), dict(adaptive=.01), dict(auto=10)], ids=str)
@pytest.mark.parametrize('value', [inf,-inf,nan])
def test_what_is_not_finite_goes_nowhere(kwargs, value):
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), cb := GradientClip(**kwargs), PoisonBatch((0,5), 'grad', value), lr=.1, opt_func=Adam)
    with quiet(learn): learn.fit(1)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert cb.skipped==2 and len(cb.norms)==6 and len(cb.records)==2

def test_one_pass_over_the_gradient():
    "`TerminateOnNaN`, `GradientClip` and `SpikeGuard` share the norms"
    from torch.overrides import TorchFunctionMode
    class Count(TorchFunctionMode):
        n = 0
        def __torch_function__(self, f, types, args=(), kwargs=None):
            if 'foreach_norm' in getattr(f, '__name__', ''): self.n += 1
            return f(*args, **(kwargs or {}))
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientClip(10.), TerminateOnNaN(snapshot=None), lr=.1)
    with quiet(learn), Count() as count: learn.fit(1)
    assert count.n==8

@pytest.mark.parametrize('kwargs,match', [(dict(max_norm=1, adaptive=1),'max_norm=1, adaptive=1'), (dict(max_norm=-1),'max_norm='), (dict(auto=101),'auto='), (dict(norm_type=0),'norm_type='), (dict(window=0),'window=')])
def test_wrong_clip(kwargs, match):
    with pytest.raises(ValueError, match=match): GradientClip(**kwargs)
def test_exclude_what_is_not_there():
    learn = digits_learner(n=160)
    with pytest.raises(ValueError, match="exclude='head'.*0, 1, 3"), quiet(learn): learn.fit(1, cbs=GradientClip(adaptive=0.1, exclude='head'))

# Centralization, noise, lookahead

@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_unit_norm(shape):
    x = torch.randn(shape)
    got = unit_norm(x)
    want = [o.norm() for o in x] if len(shape)>1 else [x.norm()]
    torch.testing.assert_close(got.flatten(), torch.stack(want)); assert got.ndim==len(shape)

@pytest.mark.parametrize('conv_only', [False,True])
def test_centralization(conv_only):
    plain,got = clipped(GradientCentralization(conv_only), model=net)
    shapes = [p.shape for p in net().parameters()]
    for g,h in zip(plain, got):
        for s,a,b in zip(shapes, g.split([s.numel() for s in shapes]), h.split([s.numel() for s in shapes])):
            a = a.view(s)
            if len(s)>=(3 if conv_only else 2): a = torch.stack([o-o.mean() for o in a])
            torch.testing.assert_close(a.flatten(), b)

def test_noise():
    "Of the variance of the paper, the same for the same seed, and other random numbers are as they were"
    plain,got = clipped(GradientNoise(0.3, 0.55, seed=3), model=lambda: nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 4)))
    for t,d in enumerate(got-plain): assert d.std().item()==pytest.approx((0.3/(1+t)**0.55)**0.5, rel=0.05) and abs(d.mean())<0.02
    _,again = clipped(GradientNoise(0.3, 0.55, seed=3), model=lambda: nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 4)))
    _,other = clipped(GradientNoise(0.3, 0.55, seed=4), model=lambda: nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 4)))
    assert torch.equal(got, again) and not torch.equal(got, other)
    set_seed(0); fit(digits_learner(n=160)); a = torch.rand(1)
    set_seed(0); fit(digits_learner(GradientNoise(), n=160)); assert torch.equal(a, torch.rand(1))

@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.floats(0, 1), st.integers(1, 3))
def test_lookahead(k, alpha, epochs):
    "As the algorithm of the paper, written out"
    def model(): set_seed(0); return nn.Linear(5, 4)
    learn = learner(batched(*data(48), [6]*8), net := model(), CrossEntropyLossFlat(), LookaheadWeights(k, alpha), lr=.1, opt_func=partial(SGD, mom=0.9))
    with quiet(learn): learn.fit(epochs)
    want = model()
    opt,slow,t = torch.optim.SGD(want.parameters(), .1, momentum=0.9),[p.detach().clone() for p in want.parameters()],0
    for _ in range(epochs):
        for x,y in batched(*data(48), [6]*8):
            opt.zero_grad(); F.cross_entropy(want(x), y).backward(); opt.step(); t += 1
            if t%k==0:
                with torch.no_grad():
                    for s,p in zip(slow, want.parameters()): s += alpha*(p-s); p.copy_(s)
    for p,q in zip(net.parameters(), want.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('cls', [lambda: LookaheadWeights(3), GradientNoise, lambda: GradientClip(auto=50)])
def test_resume(cls, tmp_path):
    class Kill(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==8: raise KeyboardInterrupt
    def run(*cbs, path):
        learn = digits_learner([cls(), Checkpoint(path, steps=1), *cbs], bs=32, n=400)
        with quiet(learn): learn.fit_one_cycle(2)
        return learn
    want = run(path=tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): run(Kill(), path=tmp_path/'b')
    for p,q in zip(run(path=tmp_path/'b').model.parameters(), want.model.parameters()): assert torch.equal(p, q)

@pytest.mark.parametrize('cls', [LookaheadWeights, GradientNoise])
def test_a_skipped_step_does_not_count(cls):
    class Skip(Callback):
        order = 12.5
        def before_step(self):
            if self.iter%2: raise CancelStepException
    learn = digits_learner([cb := cls(), Skip()], bs=32, n=400)
    fit(learn)
    assert cb._t==5
