"Each callback of the page on gradients is its definition, beside others and for all kinds of gradients"
from functools import partial
from math import inf, nan
from weakref import ref

import pytest, torch
import torch.nn.functional as F
from fastai.callback import training
from fastai.callback.core import Callback, CancelStepException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import default_device, set_seed
from hypothesis import given, settings, strategies as st
from torch import nn
from common import fit, quiet
from fastai_callbacks_ext.all import (SAM, Checkpoint, GradientAccumulation, GradientCentralization,
                                      GradientClip, GradientNoise, LookaheadWeights, TerminateOnNaN,
                                      unit_norm)
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner

device = default_device()

class Batches(list):
    "A loader of the batches in this list"

class Grads(Callback):
    "Keeps gradient, loss and hyper-parameters of each step"
    order,run_valid = 60,False
    def before_fit(self): self.grads,self.losses,self.lrs = [],[],[]
    def before_step(self):
        self.grads.append(torch.cat([p.grad.to_dense().flatten() for p in self.model.parameters()]).clone())
        self.losses.append(float(self.loss.mean())); self.lrs.append(self.opt.hypers[-1]['lr'])

def batched(x, y, sizes):
    "`x` and `y` in batches of these sizes"
    return Batches(zip(x.split(sizes), y.split(sizes)))

def learner(train, model, loss_func, *cbs, opt_func=SGD, lr=0., **kwargs):
    learn = Learner(DataLoaders(train, Batches(train[:1])), model, loss_func, opt_func=opt_func, lr=lr,
                    cbs=[Grads(), *cbs], **kwargs)
    learn.recorder.add_time = False
    return learn

def grads(*args, n=1, **kwargs):
    learn = learner(*args, **kwargs)
    with quiet(learn): learn.fit(n)
    return learn.grads

def data(n=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g).to(device),torch.randint(0, 4, (n,), generator=g).to(device)

# Clipping

def clipped(cb, *cbs, model=None, n=1, **kwargs):
    "Gradients without and with a clip, of the same batches at the same weights"
    res = []
    for clip in ([], [cb]):
        set_seed(0)
        learn = learner(batched(*data(48), [6]*8), model() if model else nn.Linear(5, 4),
                        CrossEntropyLossFlat(), *clip, *cbs, lr=0., **kwargs)
        with quiet(learn): learn.fit(n)
        res.append(torch.stack(learn.grads.grads))
    return res

@settings(max_examples=12, deadline=None, derandomize=True)
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

def net():
    return nn.Sequential(nn.Unflatten(1, (1,5)), nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Flatten(),
                         nn.Linear(12, 4)).to(device)

def agc(p, g, limit, eps=1e-3):
    "Of the paper, unit by unit"
    if p.ndim<2: return g*min(1, limit*max(p.norm().item(), eps)/max(g.norm().item(), 1e-12))
    return torch.stack([b*min(1, limit*max(a.norm().item(), eps)/max(b.norm().item(), 1e-12))
                        for a,b in zip(p, g)])

@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.floats(1e-3, 1), st.sampled_from([(), '4', ('1','4')]))
def test_adaptive(limit, exclude):
    plain,got = clipped(GradientClip(adaptive=limit, exclude=exclude), model=net)
    set_seed(0)
    model = net()
    for g,h in zip(plain, got):
        parts = g.split([p.numel() for p in model.parameters()])
        want = [o if exclude and n.startswith(exclude) else agc(p, o.view_as(p), limit)
                for (n,p),o in zip(model.named_parameters(), parts)]
        torch.testing.assert_close(h, torch.cat([o.detach().flatten() for o in want]), rtol=1e-4, atol=1e-7)

def test_adaptive_as_timm():
    agc = pytest.importorskip('timm.utils.agc')
    plain,got = clipped(GradientClip(adaptive=0.02), model=net)
    set_seed(0)
    model = net()
    for g,h in zip(plain, got):
        for p,o in zip(model.parameters(), g.split([p.numel() for p in model.parameters()])):
            p.grad = o.view_as(p).clone()
        agc.adaptive_clip_grad(model.parameters(), 0.02)
        torch.testing.assert_close(h, torch.cat([p.grad.flatten() for p in model.parameters()]))

def test_auto():
    "The percentile of the norms so far, that of the step included"
    import numpy as np
    plain,got = clipped(cb := GradientClip(auto=30, window=6), n=2)
    norms = plain.norm(dim=1).tolist()
    limits = [np.percentile(norms[max(0, i-5):i+1], 30) for i in range(16)]
    assert cb.limits==pytest.approx(limits, rel=1e-4)
    want = torch.tensor([min(a, b) for a,b in zip(norms, limits)]).float()
    torch.testing.assert_close(got.norm(dim=1).cpu(), want)

@pytest.mark.parametrize('kwargs', [{}, dict(norm_type=inf), dict(max_value=.1), dict(adaptive=.01),
                                    dict(auto=10)], ids=str)
@pytest.mark.parametrize('value', [inf,-inf,nan])
def test_what_is_not_finite_goes_nowhere(kwargs, value):
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(),
                    cb := GradientClip(**kwargs), PoisonBatch((0,5), 'grad', value), lr=.1, opt_func=Adam)
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
    learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), GradientClip(10.),
                    TerminateOnNaN(snapshot=None), lr=.1)
    learn.remove_cb(Grads)      # with code of others between them, they would not
    with quiet(learn), Count() as count: learn.fit(1)
    assert count.n==8

@pytest.mark.parametrize('kwargs,match', [(dict(max_norm=1, adaptive=1),'max_norm=1, adaptive=1'),
                                          (dict(max_norm=-1),'max_norm='), (dict(auto=101),'auto='),
                                          (dict(norm_type=0),'norm_type='), (dict(window=0),'window=')])
def test_wrong_clip(kwargs, match):
    with pytest.raises(ValueError, match=match): GradientClip(**kwargs)
def test_exclude_what_is_not_there():
    learn = digits_learner(n=160)
    with pytest.raises(ValueError, match="exclude='head'.*0, 1, 3"), quiet(learn):
        learn.fit(1, cbs=GradientClip(adaptive=0.1, exclude='head'))

# Centralization, noise, slow weights

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
    plain,got = clipped(GradientNoise(0.3, 0.55, seed=3),
                        model=lambda: nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 4)))
    for t,d in enumerate(got-plain):
        assert d.std().item()==pytest.approx((0.3/(1+t)**0.55)**0.5, rel=0.05) and abs(d.mean())<0.02
    _,again = clipped(GradientNoise(0.3, 0.55, seed=3),
                      model=lambda: nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 4)))
    _,other = clipped(GradientNoise(0.3, 0.55, seed=4),
                      model=lambda: nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 4)))
    assert torch.equal(got, again) and not torch.equal(got, other)
    set_seed(0); fit(digits_learner(n=160)); a = torch.rand(1)
    set_seed(0); fit(digits_learner(GradientNoise(), n=160)); assert torch.equal(a, torch.rand(1))

def test_lookahead_takes_in_what_is_finite():
    "A weight that is damaged and put right again does not come back"
    class Damage(Callback):
        order,run_valid = 43,False
        def after_step(self):
            w = self.model.weight.data
            if self.iter==1: w[0,:2] = torch.tensor([float('inf'), float('nan')], device=w.device)
            if self.iter==3: w.copy_(w.nan_to_num(0, 0, 0))
    net = nn.Linear(5, 4).to(device)
    learn = learner(batched(*data(48), [6]*8), net, CrossEntropyLossFlat(), LookaheadWeights(2), Damage(),
                    lr=.1)
    with quiet(learn): learn.fit(1)
    assert net.weight.isfinite().all() and net.bias.isfinite().all()

@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.floats(0, 1), st.integers(1, 3))
def test_lookahead_weights(k, alpha, epochs):
    "As the algorithm of the paper, written out"
    def model(): set_seed(0); return nn.Linear(5, 4).to(device)
    learn = learner(batched(*data(48), [6]*8), net := model(), CrossEntropyLossFlat(),
                    LookaheadWeights(k, alpha), lr=.1, opt_func=partial(SGD, mom=0.9))
    with quiet(learn): learn.fit(epochs)
    want = model()
    opt = torch.optim.SGD(want.parameters(), .1, momentum=0.9)
    slow,t = [p.detach().clone() for p in want.parameters()],0
    for _ in range(epochs):
        for x,y in batched(*data(48), [6]*8):
            opt.zero_grad(); F.cross_entropy(want(x), y).backward(); opt.step(); t += 1
            if t%k==0:
                with torch.no_grad():
                    for s,p in zip(slow, want.parameters()): s += alpha*(p-s); p.copy_(s)
    for p,q in zip(net.parameters(), want.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('cls', [lambda: LookaheadWeights(3), GradientNoise, lambda: GradientClip(auto=50)])
def test_resume(cls, tmp_path):
    class Kill(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==8: raise KeyboardInterrupt
    def run(*cbs, path):
        learn = digits_learner([cls(), Checkpoint(path, steps=1), *cbs], bs=32, n=240)
        with quiet(learn): learn.fit_one_cycle(2)
        return learn
    want = run(path=tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): run(Kill(), path=tmp_path/'b')
    for p,q in zip(run(path=tmp_path/'b').model.parameters(), want.model.parameters()):
        assert torch.equal(p, q)

@pytest.mark.parametrize('cls', [LookaheadWeights, GradientNoise])
def test_a_skipped_step_does_not_count(cls):
    class Skip(Callback):
        order = 12.5
        def before_step(self):
            if self.iter%2: raise CancelStepException
    learn = digits_learner([cb := cls(), Skip()], bs=32, n=400)
    fit(learn)
    assert cb._t==5

# Gradients of every kind

makes = dict(
    norm=lambda: GradientClip(.05), one=lambda: GradientClip(.05, norm_type=1.),
    largest=lambda: GradientClip(.02, norm_type=inf), value=lambda: GradientClip(max_value=.01),
    adaptive=lambda: GradientClip(adaptive=.01), auto=lambda: GradientClip(auto=10),
    centralization=GradientCentralization, noise=GradientNoise, sam=lambda: SAM(.5),
    asam=lambda: SAM(.5, adaptive=True), slow=lambda: LookaheadWeights(2),
    accumulation=lambda: GradientAccumulation(12))
every = pytest.mark.parametrize('make', makes.values(), ids=makes)

def trained(model, make, opt_func=SGD, n=2, loss_func=None):
    "A learner after a fit"
    set_seed(0)
    learn = learner(batched(*data(48), [6]*8), model().to(device), loss_func or CrossEntropyLossFlat(),
                    make(), lr=.1, opt_func=opt_func)
    with quiet(learn): learn.fit(n)
    return learn

def same(a, b, **tol):
    for p,q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tol)

class Words(nn.Module):
    "An embedding of five words, the same one several times in an item"
    def __init__(self, sparse):
        super().__init__()
        self.e,self.l = nn.Embedding(9, 3, sparse=sparse),nn.Linear(3, 4)
    def forward(self, x): return self.l(self.e(x.abs().mul(2).long().clamp(0, 8)).mean(1))

@every
@pytest.mark.parametrize('opt_func', [SGD, partial(OptimWrapper, opt=torch.optim.SGD)],
                         ids=['fastai', 'torch'])
def test_sparse_gradients(make, opt_func):
    "The weights are those of a dense gradient"
    same(*(trained(partial(Words, sparse), make, opt_func) for sparse in (True, False)), rtol=1e-4, atol=1e-5)

def test_noise_and_sparse_adam():
    class Both(OptimWrapper):
        def __init__(self, params, lr, **kwargs): super().__init__(params, lr=lr, opt=torch.optim.SparseAdam)
    with pytest.raises(ValueError, match='GradientNoise: all numbers of the gradient get noise'):
        trained(partial(Words, True), GradientNoise, Both)

class Odd(nn.Linear):
    "With a parameter without elements, or without dimensions"
    def __init__(self, shape=(0,3)):
        super().__init__(5, 4)
        if shape is not None: self.odd = nn.Parameter(torch.full(shape, 2.))
    def forward(self, x): return super().forward(x) + (self.odd.sum() if hasattr(self, 'odd') else 0)

@every
def test_parameters_without_elements(make):
    "All others get what they get without them"
    for p,q in zip(trained(Odd, make).model.parameters(),
                   trained(partial(Odd, None), make).model.parameters()):
        torch.testing.assert_close(p, q)

class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(5, 4)
        self.scale,self.layer_scale = nn.Parameter(torch.tensor(2.)),nn.Parameter(torch.ones(4, 1))
    def forward(self, x): return super().forward(x)*self.scale*self.layer_scale.T

@every
def test_parameters_without_dimensions(make):
    assert all(p.isfinite().all() for p in trained(Scaled, make).model.parameters())

def test_adaptive_without_dimensions():
    plain,got = clipped(GradientClip(adaptive=.01), model=lambda: Scaled().to(device))
    assert plain[0,24].abs()>.02 and got[0,24].abs().item()==pytest.approx(.02, rel=1e-4)

class Complex(nn.Module):
    "Of complex weights, or of the same numbers in pairs"
    def __init__(self, pairs):
        super().__init__()
        w = torch.randn(5, 4, dtype=torch.complex64)
        self.w = nn.Parameter(torch.view_as_real(w) if pairs else w)
    def forward(self, x):
        w = self.w if self.w.is_complex() else torch.view_as_complex(self.w)
        return (x.to(torch.complex64)@w).abs()

@pytest.mark.parametrize('make', [
    makes[k] for k in makes if k not in ('one','largest','centralization','asam')])
def test_complex_parameters(make):
    "As pairs of real numbers"
    a,b = (trained(partial(Complex, pairs), make, partial(OptimWrapper, opt=torch.optim.SGD))
           for pairs in (False, True))
    torch.testing.assert_close(torch.view_as_real(a.model.w), b.model.w, rtol=1e-4, atol=1e-5)

class Halves(nn.Module):
    "Gradients of 50,000 in float16: their norm is larger than any such number"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 4, dtype=torch.float16))
    def forward(self, x): return self.w.sum()*5e4

@pytest.mark.parametrize('kwargs', [dict(max_norm=.5), dict(max_norm=.5, norm_type=1.), dict(adaptive=.1),
                                    dict(auto=10)], ids=str)
def test_large_numbers_in_half_precision(kwargs):
    "Are finite, and clipped to what is asked for"
    cb = trained(Halves, lambda: GradientClip(**kwargs), n=0, loss_func=lambda p,y: p.float()).gradient_clip
    with quiet(cb.learn): cb.learn.fit(1, 0.)
    got = torch.stack(cb.learn.grads.grads)
    assert cb.skipped==0 and got.isfinite().all() and (got!=0).all()
    norms = torch.linalg.vector_norm(got.float(), cb.norm_type, dim=1)
    if 'auto' not in kwargs:
        want = torch.full_like(norms, .5 if 'max_norm' in kwargs else .1*8**.5)
        torch.testing.assert_close(norms, want, rtol=.01, atol=0)

@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(make, dtype):
    class Model(nn.Linear):
        def forward(self, x): return super().forward(x.to(dtype)).float()
    a,b = trained(lambda: Model(5, 4).to(dtype), make, n=1),trained(lambda: nn.Linear(5, 4), make, n=1)
    for p,q in zip(a.model.parameters(), b.model.parameters()):
        torch.testing.assert_close(p.float(), q, rtol=.1, atol=.05)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.head = nn.Linear(5, 5),nn.Linear(5, 5)
        self.head.weight = self.body.weight
    def forward(self, x): return self.head(self.body(x).relu())

@pytest.mark.parametrize('name', ['body','head'])
def test_exclude_a_tied_weight(name):
    "By either of its names"
    plain,got = clipped(GradientClip(adaptive=1e-3, exclude=name), model=lambda: Tied().to(device))
    torch.testing.assert_close(got[:,:25], plain[:,:25])
    other = slice(30, 35) if name=='body' else slice(25, 30)
    assert (got[:,other].norm(dim=1) < plain[:,other].norm(dim=1)).all()

def test_units_of_one_element_are_not_centred():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Parameter(torch.rand(5, 1)),nn.Parameter(torch.rand(4, 1, 1))
        def forward(self, x): return x@self.a*self.b.view(4)
    plain,got = clipped(GradientCentralization(), model=lambda: Model().to(device))
    assert torch.equal(plain, got) and plain.all()

def test_refuses_fastais_beside_it():
    "And changes nothing"
    for cb,theirs in ((GradientClip(), training.GradientClip()),
                      (GradientAccumulation(), training.GradientAccumulation())):
        learn = learner(batched(*data(48), [6]*8), nn.Linear(5, 4), CrossEntropyLossFlat(), theirs, lr=.1)
        before,cbs = [p.detach().clone() for p in learn.model.parameters()],learn.cbs.map(type)
        said = rf"{cb.name}: fastai's {type(cb).__name__} is on the learner too.*upgrade\(learn\)"
        with quiet(learn), pytest.raises(ValueError, match=said): learn.fit(1, cbs=cb)
        assert set(learn.cbs.map(type))==set(cbs)
        for p,q in zip(learn.model.parameters(), before): assert torch.equal(p.cpu(), q.cpu())

@pytest.mark.parametrize('make', [makes[k] for k in ('norm','noise','sam','slow','accumulation')])
@pytest.mark.parametrize('event', ['before_batch','after_pred','after_backward','before_step','after_step',
                                   'after_batch','after_epoch'])
def test_taken_off_in_mid_fit(make, event):
    "Then the fit goes on without it"
    for order in (-5, 100):
        cb = make()
        class Off(Callback):
            def take(self):
                now = not self.training if event=='after_epoch' else self.training and self.iter>0
                if self.epoch==0 and now and cb in self.learn.cbs: self.learn.remove_cb(cb)
        Off.order = order
        setattr(Off, event, Off.take)
        learn = trained(lambda: nn.Linear(5, 4), lambda: cb, n=0)
        with quiet(learn): learn.fit(2, .1, cbs=[Off()])
        assert cb.learn is None and len(learn.recorder.values)==2
        assert 'after_batch' not in vars(learn.recorder)
        learn.opt.zero_grad()
        plain = trained(lambda: nn.Linear(5, 4), Callback, n=0)
        plain.model.load_state_dict(learn.model.state_dict())
        for o in (learn, plain):
            with quiet(o): o.fit(1, .1)
        same(learn, plain)

def test_clipping_keeps_no_gradient():
    "They are gone before the next batch, and not in an export"
    alive = []
    class Look(Callback):
        def after_batch(self):
            if not self.training: return
            self.refs = [ref(p.grad) for p in self.model.parameters()]
            for p in self.model.parameters(): p.grad = None
        def before_batch(self): alive.append(sum(o() is not None for o in getattr(self, 'refs', ())))
    fit(digits_learner([GradientClip(adaptive=.01), Look()], n=160, bs=32))
    assert len(alive)>4 and sum(alive)==0

def test_lookahead_of_an_optimizer_with_more_weights():
    "Made anew between two epochs"
    class More(Callback):
        def before_epoch(self):
            if self.epoch!=1: return
            self.learn.splitter = lambda m: [[*m.parameters(), *more.parameters()]]
            self.create_opt()
            self.learn.opt.set_hyper('lr', 1e-2)
    more = nn.Linear(2, 2).to(device)
    learn = fit(digits_learner([LookaheadWeights(), More()], n=160, bs=32), 3)
    assert all(p.isfinite().all() for p in learn.model.parameters())
