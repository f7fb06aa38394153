"The lists that callbacks share are those of the step, whatever has happened to the model"
import contextlib, gc, io
from functools import partial
from math import inf, nan
from types import SimpleNamespace
from weakref import ref

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.base.grads import step_grads, with_grad
from fastai_callbacks_ext.base.lists import (Rows, copies, copy_finite_, grad_lists, norms, norms_in_one,
                                             opt_params, subtract_means_, views_like)
from fastai_callbacks_ext.base.step import StepNumbers, _NumpyState, all_finite
from fastai_callbacks_ext.gradients import unit_norm

device = 'cuda' if torch.cuda.is_available() else 'cpu'
shapes = [(4,3), (4,3), (5,), (5,), (2,3,1,2), (), (70,80), (0,3)]

def params(n=40, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shapes[i%len(shapes)], dtype=dtype, device=device)) for i in range(n)]
def give_grads(ps):
    for p in ps: p.grad = torch.randn_like(p)

# --- the lists, after anything that may happen ------------------------------------------------------
acts = st.sampled_from(['step', 'none', 'some none', 'freeze', 'replace', 'swap', 'retype', 'sparse',
                        'regroup', 'expand', 'transpose'])

def act(name, i, opt):
    "What may happen to the parameters between two steps"
    ps = opt_params(opt)
    p = ps[i%len(ps)]
    if name=='step': give_grads(ps)
    elif name=='none': p.grad = None
    elif name=='some none':
        for p in ps[i%3::3]: p.grad = None
    elif name=='freeze':
        p.requires_grad_(not p.requires_grad)
        p.grad = None
    elif name=='replace':
        new = nn.Parameter(torch.randn(shapes[(i+3)%len(shapes)], device=device))
        give_grads([new])
        lists = [[new if o is p else o for o in g] for g in opt.param_lists]
        if isinstance(opt, OptimWrapper):
            for g,o in zip(opt.opt.param_groups, lists): g['params'] = o
        else: opt.param_lists = lists
    elif name=='swap':      # the parameter is the same object, of another shape
        p.grad,p.data = None,torch.randn(7, device=device)
        give_grads([p])
    elif name=='retype':
        other = {torch.float32: torch.bfloat16}
        for p in ps: p.grad,p.data = None,p.data.to(other.get(p.dtype, torch.float32))
        give_grads(ps)
    elif name=='sparse' and p.ndim==2 and len(p)>2:
        rows = torch.randn(3, p.shape[1], dtype=p.dtype, device=device)
        p.grad = torch.sparse_coo_tensor([[0,2,0]], rows, p.shape)
    elif name=='regroup':
        if not isinstance(opt, OptimWrapper): opt.param_lists = [ps[::-1]]
    elif name=='expand': p.grad = torch.ones((), dtype=p.dtype, device=device).expand(p.shape)
    elif name=='transpose' and p.ndim==2:
        p.grad = torch.randn(p.shape[::-1], dtype=p.dtype, device=device).t()

def dense(g): return g.coalesce().values() if g.is_sparse else g
def has_means(g): return g.ndim>1 and g.numel()>len(g)
def one_by_one(g, p): return torch.linalg.vector_norm(g.double(), p).item()

@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(acts, st.integers(0, 39)), max_size=12), st.booleans())
def test_lists_are_those_of_the_step(plan, wrapped):
    ps = params()
    opt = OptimWrapper(ps, torch.optim.SGD, lr=0.1) if wrapped else Adam(ps, lr=0.1)
    give_grads(ps)
    for o in [('step', 0), *plan]:
        act(*o, opt)
        now = [p for g in opt.param_lists for p in g if p.grad is not None]
        found,grads,rows = grad_lists(opt)
        assert len(found)==len(now) and all(a is b for a,b in zip(found, now))
        assert all(g is p.grad for p,g in zip(now, grads))
        assert [*map(id, with_grad(opt))]==[id(p) for p in now if p.numel()]
        numbers = [dense(p.grad) for p in now]
        if not numbers: continue
        want = [one_by_one(g, 2) for g in numbers]
        for o in (norms_in_one(numbers, rows=rows), norms_in_one(numbers)):
            np.testing.assert_allclose(o.tolist(), want, rtol=1e-5)
        n = StepNumbers(torch.tensor(1., device=device), grads, rows)
        np.testing.assert_allclose(n.grad_norm, np.linalg.norm(want), rtol=1e-5)
        assert n.finite and n.tensor.numel()==1+len(now)
        assert sum(g.numel() for g in step_grads(opt))==sum(g.numel() for g in numbers)
        subtract_means_(less := copies(numbers), has_means, rows)
        rounded = len({g.dtype for g in numbers})>1      # rows of several types are computed in the finer one
        for a,g in zip(less, numbers):
            want = g-g.mean(tuple(range(1, g.ndim)), keepdim=True) if has_means(g) else g
            torch.testing.assert_close(a, want, rtol=.02*rounded, atol=.02*rounded)

def test_gradients_are_not_kept():
    ps = params()
    opt = OptimWrapper(ps, torch.optim.SGD, lr=0.1)
    give_grads(ps)
    step_grads(opt)
    grads = [ref(p.grad) for p in ps]
    opt.zero_grad()
    assert not any(r() is not None for r in grads)
    known = ref(opt)
    del opt
    gc.collect()
    assert known() is None

# --- the same bits as one tensor at a time ----------------------------------------------------------
kinds = torch.float32,torch.float64,torch.float16,torch.bfloat16

@pytest.mark.parametrize('dtype', kinds, ids=str)
def test_rows_have_the_bits_of_single_tensors(dtype):
    ts = [p.detach() for p in params(60, dtype) if p.numel()]
    half = torch.float32 if dtype in kinds[2:] else None
    for p in (2., inf, 1.):
        want = torch.stack(torch._foreach_norm(ts, p, half))
        assert torch.equal(norms_in_one(ts, p), want) and torch.equal(norms_in_one(ts, p, Rows(ts)), want)
        assert torch.equal(torch.stack(norms(ts, p)), want)
    deep = [t for t in ts if t.ndim>1]
    subtract_means_(less := copies(deep))
    for a,t in zip(less, deep): assert torch.equal(a, t-t.mean(tuple(range(1, t.ndim)), keepdim=True))
    rows = Rows(ts)
    scaled = [t/unit_norm(t, n) for t,n in rows.blocks(ts)]
    rows.put_back(found := copies(ts), scaled)
    for i in rows.others: found[i] = ts[i]/unit_norm(ts[i])
    for a,t in zip(found, ts): assert torch.equal(a.to(dtype), (t/unit_norm(t)).to(dtype))
    assert all(map(torch.equal, copies(ts), ts))

def test_numbers_in_half_precision_do_not_overflow_in_rows_that_were_found_in_float32():
    ts = [torch.full((2000,), 300., device=device) for _ in range(20)]
    assert norms_in_one([t.half() for t in ts], rows=Rows(ts)).isfinite().all()

@pytest.mark.parametrize('bad', [nan, inf, -inf])
@pytest.mark.parametrize('at', [0, 17, 39])
def test_one_bad_number_among_many_tensors(bad, at):
    ts = [torch.ones(8, device=device) for _ in range(40)]
    assert all_finite(ts)
    old,new = copies(ts),[t+1 for t in ts]
    new[at][3] = ts[at][3] = bad
    assert not all_finite(ts)
    assert not StepNumbers(torch.tensor(1., device=device), ts).finite
    copy_finite_(old, new)
    assert all((o==(1. if i==at and j==3 else 2.)) for i,t in enumerate(old) for j,o in enumerate(t.tolist()))

# --- callbacks on a model of many tensors: as one tensor at a time -----------------------------------
class Many(nn.Module):
    "Small weights of few shapes, a tied one, an embedding with sparse gradients, and one that is seldom used"
    def __init__(self, n=24):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(n))
        self.layers[3].weight = self.layers[5].weight
        self.emb,self.seldom = nn.Embedding(9, 6, sparse=True),nn.Linear(6, 6)
        self.steps = 0
    def forward(self, x):
        self.steps += 1
        x = self.emb(x)
        for l in self.layers: x = x+l(x).tanh()/8
        if self.steps%3==0: x = x+self.seldom(x)
        return x.mean(1)

class Loader(list):
    dataset = property(lambda self: self)
    device = torch.device(device)

class Mess(Callback):
    "Freezes, unfreezes and replaces weights in mid-fit"
    order = -50
    def before_batch(self):
        m,i = self.model,self.train_iter
        if i==4: m.layers[1].requires_grad_(False)
        if i==6: m.layers[1].requires_grad_(True)
        if i==8:
            for p in m.layers[2].parameters(): p.data = p.data.clone()
        if i==10: self.opt.param_groups[0]['lr'] = 0.01
        if i in (5,9): m.layers[0].weight.grad = None

def trained(cb, mess=True):
    torch.manual_seed(0)
    data = Loader((torch.randint(0, 9, (4,3)).to(device), torch.randn(4, 6).to(device)) for _ in range(14))
    model = Many().to(device)
    opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    learn = Learner(DataLoaders(data, Loader()), model, nn.functional.mse_loss, opt_func=opt_func,
                    cbs=[cb, *([Mess()] if mess else [])], train_bn=False)
    with contextlib.redirect_stdout(io.StringIO()), learn.no_bar(), learn.no_logging(): learn.fit(1, 0.5)
    return [p.detach().cpu() for p in model.parameters()]

class OneByOne(Callback):
    run_valid = False
    def grads(self):
        for p in opt_params(self.opt):
            if p.grad is None: continue
            if p.grad.is_sparse: p.grad = p.grad.coalesce()
            yield p,p.grad._values() if p.grad.is_sparse else p.grad
class Centralize(OneByOne):
    order = 12
    def before_step(self):
        for _,g in self.grads():
            if g.ndim>1: g -= g.mean(tuple(range(1, g.ndim)), keepdim=True)
class Clip(OneByOne):
    order = 11
    def before_step(self):
        gs = [g for _,g in self.grads()]
        norm = np.linalg.norm([g.norm().item() for g in gs])
        if norm>0.01:
            for g in gs: g *= 0.01/norm
class Adaptive(OneByOne):
    order = 11
    def before_step(self):
        for p,g in self.grads():
            w = p.detach()[p.grad._indices()[0]] if p.grad.is_sparse else p.detach()
            g /= (unit_norm(g)/unit_norm(w).clamp_min(1e-3)/0.001).clamp_min(1.)
class Slow(OneByOne):
    order,slow,n = 44,None,0
    def after_step(self):
        if self.slow is None: return
        self.n += 1
        if self.n%5: return
        for p,s in zip(opt_params(self.opt), self.slow):
            s.lerp_(p.detach(), 0.5)
            p.data.copy_(s)
    def before_train(self): self.slow = [p.detach().clone() for p in opt_params(self.opt)]

pairs = {'centralization': (ext.GradientCentralization, Centralize),
         'clip': (partial(ext.GradientClip, 0.01), Clip),
         'adaptive': (partial(ext.GradientClip, adaptive=0.001), Adaptive),
         'lookahead': (ext.LookaheadWeights, Slow)}

@pytest.mark.parametrize('name', pairs)
def test_as_one_by_one(name):
    ours,theirs = pairs[name]
    mess = name!='lookahead'        # a weight that is frozen in between stays as it is there
    for a,b in zip(trained(ours(), mess), trained(theirs(), mess)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

class Nothing(Callback): pass

@pytest.mark.parametrize('make', [ext.TerminateOnNaN, ext.SkipNonFinite, partial(ext.TerminateOnNaN, every=4),
                                  partial(ext.EMA, validate='raw', final='raw')])
def test_watchers_change_no_bit(make):
    for a,b in zip(trained(make()), trained(Nothing())): assert torch.equal(a, b) or device=='cuda'

def test_ema_is_the_mean_that_a_loop_computes():
    class Loop(Callback):
        order,n,kept = 52,0,None
        def after_step(self):
            self.n += 1
            now = [p.detach().clone() for p in self.model.parameters()]
            if self.kept is None: self.kept = now
            for k,p in zip(self.kept, now): k.lerp_(p, (1-0.9)/(1-0.9**self.n))
    ema,loop = ext.EMA(0.9),Loop()
    found = trained(ema)
    trained(loop)
    for a,b in zip(found, loop.kept): torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-5)

def test_adaptive_clipping_after_a_change_of_shapes():
    ps = [nn.Parameter(torch.randn(4, 3, device=device)) for _ in range(20)]
    opt,cb = OptimWrapper(ps, torch.optim.SGD, lr=.1),ext.GradientClip(adaptive=.01)
    for shape in [(4,3), (4,3), (2,5), ()]:
        for p in ps[::2]: p.grad,p.data = None,torch.randn(shape, device=device)
        give_grads(ps)
        found = []
        for o in (cb, ext.GradientClip(adaptive=.01)):
            o.learn,o._excluded = SimpleNamespace(opt=opt),{id(ps[3])}
            found.append(o._largest_ratio())
        want = max((unit_norm(p.grad)/unit_norm(p.detach()).clamp_min(1e-3)).max().item()
                   for i,p in enumerate(ps) if i!=3)
        assert found==[pytest.approx(want)]*2

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_views_are_one_after_the_other(dtype):
    ts = [p.detach() for p in params(50, dtype)]
    flat = torch.cat([t.reshape(-1) for t in ts])
    found = views_like(flat, ts)
    assert len(found)==50 and all(map(torch.equal, found, ts)) and views_like(flat[:0], [])==[]
    for v in found: v.zero_()
    assert not flat.any()

# --- NumPy's generator ------------------------------------------------------------------------------
def test_state_of_numpys_generator():
    before,state,draw = np.random.get_state(),_NumpyState(),np.random.default_rng(0)
    try:
        np.random.seed(1)
        for _ in range(300):
            how = draw.integers(4)
            if how==0: np.random.rand(draw.integers(1, 700))
            elif how==1: np.random.randn()      # one of two normal numbers waits to be used
            elif how==2: np.random.seed(draw.integers(3))
            now,found = np.random.get_state(),state.get()
            assert found[0]==now[0] and (found[1]==now[1]).all() and found[2:]==now[2:]
    finally: np.random.set_state(before)
