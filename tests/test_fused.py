"`FusedStep`: fastai's bits on fastai's state, whatever happens in the fit; what is not known is left alone"
import copy, random
from functools import partial
from types import SimpleNamespace

import pytest, torch
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.optimizer import (SGD, Adam, Lamb, Larc, Lookahead, Optimizer, OptimWrapper, QHAdam, RAdam,
                              RMSProp, average_grad, l2_reg, momentum_step, ranger, sgd_step, weight_decay)
from fastai.torch_core import TensorBase
from fastcore.imports import noop
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base import kernels
from fastai_callbacks_ext.base.foreach import _agrees, _operations, fastest, layout, pieces, same_bits
from fastai_callbacks_ext.base.kernels import lend_kernels, no_kernels
from fastai_callbacks_ext.base.state import load_opt_state, opt_state
from fastai_callbacks_ext.test_utils import digits_learner
from common import EXACT, fit, learner, quiet
from torch import Tensor, nn

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
OPTS = dict(
    sgd=SGD, momentum=partial(SGD, mom=.9, wd=.1), l2=partial(SGD, mom=.9, wd=.1, decouple_wd=False),
    rms_prop=partial(RMSProp, wd=.1), rms_momentum=partial(RMSProp, mom=.9, decouple_wd=False, wd=.1),
    adam=Adam, adam_l2=partial(Adam, decouple_wd=False), radam=partial(RAdam, wd=.01),
    sadam=partial(RAdam, beta=50., eps=0.),
    qhadam=partial(QHAdam, wd=.1, nu_2=.9), larc=partial(Larc, wd=.1), lars=partial(Larc, mom=0., clip=False),
    lamb=partial(Lamb, wd=.1), lamb_l2=partial(Lamb, wd=.1, decouple_wd=False), ranger=ranger,
    both=lambda ps, **k: Optimizer(ps, [weight_decay, l2_reg, average_grad, momentum_step], mom=.9, wd=.1,
                                   **k),
    lookahead=lambda *a, **k: Lookahead(SGD(*a, mom=.9, **k), k=3))

def tensors(dtype):
    "Parameters of many kinds"
    r = torch.Generator().manual_seed(1)
    t = lambda *shape: torch.randn(shape, generator=r)
    res = [t(7, 3), t(7), t(), t(0, 2), t(5, 4, 3, 3).to(memory_format=torch.channels_last), t(6, 5).T,
           t(40, 9), t(10, 8)[:,::2], torch.zeros(4), t(300)]
    return [nn.Parameter(o.to(DEVICE, dtype)) for o in res]

class Script:
    "The same steps with any kernel: what may happen between two steps, by chance"
    def __init__(self, make, seed, kernel=None, dtype=torch.float32, events=()):
        self.r,self.g = random.Random(seed),torch.Generator().manual_seed(seed)
        self.params,self.dtype = tensors(dtype),dtype
        n = self.r.choice([1, 2, 3])
        self.opt = make([self.params[i::n] for i in range(n)], lr=.01)
        for p in self.params:
            if p.ndim==1: self.opt.state[p]['do_wd'] = False
        self.back = lend_kernels(self.opt, kernel) if kernel else lambda: None
        self.events = events

    def gradients(self):
        for i,p in enumerate(self.params):
            g = (torch.randn(p.shape, generator=self.g)*.1).to(p.device, p.dtype)
            if p.grad is None or i%3==0 and self.r.random()<.2: p.grad = torch.zeros_like(p)
            p.grad.add_(g)
            if self.r.random()<.05: p.grad = None

    def hypers(self):
        self.opt.set_hyper('lr', [.02*self.r.random() for _ in self.opt.param_lists])
        if self.r.random()<.3: self.opt.set_hyper('mom', self.r.choice([.8, .9]))

    def step(self):
        for name in self.events:
            if self.r.random()<.04: getattr(self, name)()
        self.gradients()
        self.hypers()
        self.opt.step()
        for _ in range(self.r.choice([0, 1, 1, 1, 2])): self.opt.zero_grad()

    # --- what may happen ---
    def other_data(self): self.params[0].data = self.params[0].data.clone()
    def other_layout(self): self.params[4].data = self.params[4].data.contiguous()
    def frozen(self): self.opt.freeze_to(self.r.choice([0, -1]))
    def dropped(self): self.opt.clear_state()
    def no_decay(self): self.opt.state[self.params[0]]['do_wd'] = self.r.choice([True, False])
    def loaded(self): self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))
    def resumed(self): load_opt_state(self.opt, copy.deepcopy(opt_state(self.opt)))
    def other_dicts(self):
        for p in self.params: self.opt.state[p] = dict(self.opt.state[p])
    def all_dropped(self):
        for p in self.params: p.grad = None

    def run(self, steps):
        for _ in range(steps): self.step()
        self.back()
        return self

EVENTS = 'other_data','other_layout','other_dicts','frozen','dropped','no_decay','resumed','all_dropped'
def events_of(name): return EVENTS if name in ('ranger','lookahead') else (*EVENTS, 'loaded')

bits = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
def same(a, b):
    "Weights and state"
    for p,q in zip(a.params, b.params):
        bits(p, q)
        s,t = a.opt.state[p],b.opt.state[q]
        assert [(k, type(v)) for k,v in s.items()]==[(k, type(v)) for k,v in t.items()]
        for k in t:
            if isinstance(t[k], Tensor): bits(s[k], t[k])
            else: assert s[k]==t[k], k

def double(o): return torch.as_tensor(o, dtype=torch.float64).cpu()

@pytest.fixture
def small(monkeypatch):
    "Tensors of the tests are cut"
    monkeypatch.setattr(kernels, '_cached', lambda: 64)

@pytest.mark.parametrize('name', OPTS)
def test_foreach_has_the_bits(name, small):
    steps = partial(Script, OPTS[name], sorted(OPTS).index(name), events=events_of(name))
    same(steps('foreach').run(200), steps().run(200))

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['momentum','adam','qhadam','larc','lamb'])
def test_the_bits_of_other_types(name, dtype, small):
    steps = partial(Script, OPTS[name], 3, dtype=dtype, events=events_of(name))
    same(steps('foreach').run(20), steps().run(20))

@pytest.mark.parametrize('kernel', ['fused','auto'])
@pytest.mark.parametrize('name', OPTS)
def test_fused_equals_to_rounding(name, kernel, small):
    "In float64, so that what is left is a rule that differs"
    steps = partial(Script, OPTS[name], 5, dtype=torch.float64, events=events_of(name))
    a,b = steps(kernel).run(60),steps().run(60)
    for p,q in zip(a.params, b.params): torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    for p,q in zip(a.params, b.params):
        assert list(a.opt.state[p])==list(b.opt.state[q])
        for k,v in b.opt.state[q].items():
            torch.testing.assert_close(double(a.opt.state[p][k]), double(v), rtol=1e-9, atol=1e-11)

@pytest.mark.parametrize('kernel', ['foreach','fused'])
def test_sparse_gradients(kernel):
    def run(kernel):
        torch.manual_seed(0)
        emb,lin = nn.Embedding(9, 4, sparse=True, device=DEVICE),nn.Linear(4, 2, device=DEVICE)
        opt = SGD([*emb.parameters(), *lin.parameters()], lr=.1, wd=.1)
        back = lend_kernels(opt, kernel) if kernel else None
        for i in range(5):
            lin(emb(torch.tensor([i, 2, 2], device=DEVICE))).square().mean().backward()
            opt.step()
            opt.zero_grad()
        if back: back()
        return [emb.weight, *lin.parameters()]
    kwargs = EXACT if kernel=='foreach' else {}
    for a,b in zip(run(kernel), run(None)): torch.testing.assert_close(a, b, **kwargs)

def flagged(name, kernel, steps=25, read=()):
    "Some steps have a flag; without kernels they are left out"
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(o, device=DEVICE, dtype=torch.float64)) for o in ((5, 4), (4,))]
    opt = OPTS[name](params, lr=.01)
    back = lend_kernels(opt, kernel) if kernel else None
    for i in range(steps):
        bad = i%4 in (1, 2)
        for p in params: p.grad = torch.randn_like(p)
        if bad:
            params[0].grad.fill_(float('nan'))
            if not kernel: continue
        if kernel and (bad or i%5): opt.found_inf = torch.full((), float(bad), device=DEVICE)
        opt.step()
        if i in read: assert opt.state[params[0]].get('step', 1)>0
    if back: back()
    assert 'found_inf' not in vars(opt)
    return [*params, *(double(v) for p in params for v in opt.state[p].values())]

@pytest.mark.parametrize('read', [(), (7, 8, 20)])
@pytest.mark.parametrize('kernel', ['foreach','fused'])
@pytest.mark.parametrize('name', OPTS)
def test_a_flag_of_one_changes_nothing(name, kernel, read):
    for a,b in zip(flagged(name, kernel, read=read), flagged(name, None)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

@pytest.mark.parametrize('name', ['sgd','momentum','adam','adam_l2','lamb'])
def test_no_wait_for_the_flag(name, monkeypatch):
    "Neither for the flag nor for the counts, until somebody looks"
    def no(self, *args): raise AssertionError('waited')
    params = [nn.Parameter(torch.randn(3, 2, device=DEVICE))]
    opt = OPTS[name](params, lr=.01)
    back = lend_kernels(opt, 'fused')
    flag = torch.ones((), device=DEVICE)
    if DEVICE=='cpu' and name=='lamb': pytest.skip('a CPU reads the rates')
    with monkeypatch.context() as m:
        for o in ('item','tolist','__bool__','__float__','__int__'): m.setattr(Tensor, o, no)
        for _ in range(9):
            params[0].grad = torch.ones_like(params[0])
            opt.found_inf = flag
            opt.step()
    assert opt.state[params[0]].get('step', 0)==0
    back()

def test_state_is_read_right_by_all_ways():
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    opt = Adam([p], lr=.1)
    back = lend_kernels(opt, 'fused')
    state = opt.state
    for i in range(4):
        p.grad = torch.ones_like(p)
        opt.found_inf = torch.zeros((), device=DEVICE)
        opt.step()
    assert copy.deepcopy(opt).state_dict()['state'][0]['step']==4
    assert opt.state is state and opt.state_dict()['state'][0]['step']==4
    assert type(copy.deepcopy(opt)) is Optimizer
    opt.step()
    assert opt.state[p]['step']==5
    back()
    assert vars(opt)['state'] is state and type(opt) is Optimizer

def test_weights_can_still_be_differentiated():
    "fastai's step does not count as a change of a tensor that a backward pass needs"
    w = nn.Parameter(torch.ones(3, 3, device=DEVICE))
    for kernel in (None,'foreach','fused'):
        opt = Adam([w], lr=.1)
        back = lend_kernels(opt, kernel) if kernel else None
        x = torch.ones(2, 3, device=DEVICE, requires_grad=True)
        loss = (x@w).sum()
        loss.backward(retain_graph=True)
        opt.step()
        loss.backward()
        if back: back()

def test_memory_of_dropped_gradients_is_free():
    import weakref
    p = nn.Parameter(torch.ones(1000, device=DEVICE))
    opt = Adam([p], lr=.1)
    back = lend_kernels(opt)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        gone = weakref.ref(p.grad)
        opt.step()
        opt.zero_grad()
        p.grad = None
        assert gone() is None
    opt.step()      # no gradient at all
    assert opt.state[p]['step']==3
    back()

def test_shared_memory_is_left_to_fastai():
    "Two parameters on one memory: it matters which is first"
    def run(kernel):
        t = torch.arange(6., device=DEVICE)
        params = [nn.Parameter(t[:4]), nn.Parameter(t[2:])]
        opt = SGD(params, lr=.1, wd=.5)
        back = lend_kernels(opt, kernel) if kernel else None
        for p in params: p.grad = p.detach().clone()
        opt.step()
        if back: back()
        return t
    torch.testing.assert_close(run('foreach'), run(None), **EXACT)

ODD_HYPERS = dict(lr=[.1, .2, torch.tensor(.1), .3], dampening=[True, False], clip=[False, True], step=[5, 7],
                  do_wd=[False, True], wd=[0., .1, torch.tensor(.2)])
ODD_OPTS = 'momentum','l2','adam','adam_l2','radam','larc','lars','lamb'
@pytest.mark.parametrize('kernel', ['foreach','fused'])
@pytest.mark.parametrize('hyper', ODD_HYPERS)
@pytest.mark.parametrize('name', ODD_OPTS)
def test_odd_hypers_are_as_in_fastai(name, hyper, kernel):
    "Numbers that are tensors, and names of what fastai keeps in a parameter's state"
    def run(kernel):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(o, dtype=torch.float64)) for o in ((3, 4), (5,))]
        opt = OPTS[name](params, lr=.1)
        back = lend_kernels(opt, kernel) if kernel else None
        for i in range(8):
            for p in params: p.grad = torch.randn_like(p)
            if i>2: opt.hypers[0][hyper] = ODD_HYPERS[hyper][i%len(ODD_HYPERS[hyper])]
            if i==6: opt.hypers[0].pop(hyper) if hyper not in ('lr','wd') else opt.set_hyper(hyper, .1)
            opt.step()
        if back: back()
        return [*params, *(double(v) for p in params for v in opt.state[p].values())]
    kwargs = EXACT if kernel=='foreach' else dict(rtol=1e-9, atol=1e-11)
    for a,b in zip(run(kernel), run(None)): torch.testing.assert_close(a, b, **kwargs)

def other_numbers(d): d['grad_avg'] = d['grad_avg'].double()
def other_class(d): d['grad_avg'] = TensorBase(d['grad_avg'])
def half_a_step(d): d['step'] += .5
def more(d): d['more'] = 1
def no_longer(d): d.pop('sqr_avg', None)
@pytest.mark.parametrize('kernel', ['foreach','fused'])
@pytest.mark.parametrize('odd', [other_numbers, other_class, half_a_step, more, no_longer])
def test_odd_state_is_as_in_fastai(odd, kernel):
    def run(kernel):
        torch.manual_seed(0)
        script = SimpleNamespace(params=[nn.Parameter(torch.randn(o)) for o in ((3, 4), (5,), (2,))])
        script.opt = Adam(script.params, lr=.1)
        back = lend_kernels(script.opt, kernel) if kernel else noop
        for i in range(6):
            for p in script.params: p.grad = torch.randn_like(p)
            if i==2: odd(script.opt.state[script.params[1]])
            script.opt.step()
        back()
        return script
    a,b = run(kernel),run(None)
    if kernel=='foreach': return same(a, b)
    for p,q in zip(a.params, b.params): torch.testing.assert_close(p, q)
    types = lambda o: [[(k, type(v)) for k,v in o.opt.state[p].items()] for p in o.params]
    assert types(a)==types(b)

@pytest.mark.parametrize('kernel', ['foreach','fused'])
def test_step_callbacks_may_change(kernel):
    def run(kernel):
        p = nn.Parameter(torch.ones(3))
        opt = Adam([p], lr=.1)
        back = lend_kernels(opt, kernel) if kernel else noop
        for i in range(6):
            p.grad = torch.ones(3)
            if i==2: opt.cbs.append(my_step)
            if i==4: opt.cbs.remove(my_step)
            opt.step()
        back()
        assert opt.state[p]['step']==6
        return p
    torch.testing.assert_close(run(kernel), run(None))

def test_a_flag_is_kept_by_fastais_step_too():
    "A step that is left to fastai is left out if the flag is 1, and counts are right before it"
    p = nn.Parameter(torch.ones(3))
    opt = Adam([p], lr=.1)
    back = lend_kernels(opt, 'fused')
    def step(flag, lr):
        opt.hypers[0]['lr'],opt.found_inf,p.grad = lr,torch.tensor(flag),torch.ones(3)*(1-flag)
        opt.step()
        assert 'found_inf' not in vars(opt)
    for flag,lr in ((0., .1), (1., .1), (0., .1), (0., torch.tensor(.1)), (1., torch.tensor(.1)), (0., .1)):
        before = p.detach().clone()
        step(flag, lr)
        assert torch.equal(p, before)==(flag==1)
    assert opt.state[p]['step']==4
    back()

def test_a_new_state_has_its_own_counts():
    p = nn.Parameter(torch.ones(3))
    opt = Adam([p], lr=.1)
    back = lend_kernels(opt, 'fused')
    for _ in range(3):
        p.grad,opt.found_inf = torch.ones(3),torch.tensor(0.)
        opt.step()
    opt.state = type(opt.state)(dict, {p: dict(grad_avg=torch.zeros(3), sqr_avg=torch.zeros(3), step=7)})
    assert opt.state[p]['step']==7
    p.grad = torch.ones(3)
    opt.step()
    assert opt.state[p]['step']==8
    back()

def test_a_closure_is_refused_as_by_fastai():
    for make in (Adam, ranger):
        opt = make([nn.Parameter(torch.ones(2))], lr=.1)
        back = lend_kernels(opt)
        with pytest.raises(NotImplementedError): opt.step(lambda: None)
        back()

@pytest.mark.parametrize('kernel', [None,'foreach','fused'])
def test_without_decay_a_weight_is_not_read(kernel):
    "Infinity times 0 is NaN"
    for make in (SGD, Adam):
        p = nn.Parameter(torch.full((3,), float('inf')))
        opt = make([p], lr=.1, wd=0., decouple_wd=False)
        back = lend_kernels(opt, kernel) if kernel else noop
        p.grad = torch.ones(3)
        opt.step()
        back()
        assert p.isposinf().all()

def test_kernels_are_taken_back_once():
    opt = ranger([nn.Parameter(torch.ones(2))], lr=.1)
    outer,inner = lend_kernels(opt),lend_kernels(opt)
    inner()
    assert type(opt) is not Lookahead
    outer()
    assert type(opt) is Lookahead and type(opt.opt) is Optimizer

# --- which are known ----------------------------------------------------------------------------
def weights(learn): return list(learn.model.state_dict().values())
def equal(a, b):
    for p,q in zip(weights(a), weights(b)): torch.testing.assert_close(p, q, **EXACT)

class Mine(Optimizer):
    def step(self, closure=None): super().step()

def my_step(p, lr, **kwargs): p.data.add_(p.grad.data, alpha=-lr)

NOT_KNOWN = dict(
    wrapper=(partial(OptimWrapper, opt=torch.optim.SGD), "PyTorch's"),
    own_class=(lambda ps, lr: Mine(ps, [sgd_step], lr=lr), 'Mine is not known'),
    own_step=(lambda ps, lr: Optimizer(ps, [weight_decay, my_step], lr=lr), 'the step callback my_step'),
    given=(lambda ps, lr: Optimizer(ps, [partial(sgd_step, x=1)], lr=lr), 'what sgd_step was given'),
    twice=(lambda ps, lr: Optimizer(ps, [average_grad, average_grad, sgd_step], lr=lr, mom=.9),
           'average_grad twice'),
    twice_around=(lambda ps, lr: Lookahead(Lookahead(SGD(ps, lr))), 'Lookahead is not known'),
    around=(lambda ps, lr: Lookahead(Mine(ps, [sgd_step], lr=lr)), 'Mine is not known'))

@pytest.mark.parametrize('name', NOT_KNOWN)
def test_what_is_not_known_is_left_alone(name, capsys):
    make,why = NOT_KNOWN[name]
    learn = fit(learner(cbs=[cb := FusedStep()], opt_func=make))
    assert capsys.readouterr().out.count('left the optimizer as it is')==1 and why in cb.records[0].why
    plain = fit(learner(opt_func=make))
    equal(learn, plain)

def test_it_is_said_once():
    fit(learner(cbs=[cb := FusedStep(), Late()], opt_func=NOT_KNOWN['wrapper'][0]), 3)
    assert len(cb.records)==1

@pytest.mark.parametrize('make', [Adam, ranger])
def test_replaced_methods_are_left_alone(make):
    opt = make([nn.Parameter(torch.ones(2))], lr=.1)
    inner = getattr(opt, 'opt', opt)
    inner.zero_grad = inner.zero_grad
    assert no_kernels(opt)=='its zero_grad was replaced'
    inner.step = inner.step
    assert no_kernels(opt)=='its step and zero_grad was replaced'

def test_a_parameter_that_is_there_twice():
    p = nn.Parameter(torch.ones(2))
    assert no_kernels(SGD([[p], [p]], lr=.1))=='a parameter is in it twice'

@pytest.mark.parametrize('kernel', ['Fused', None, 1])
def test_unknown_kernel(kernel):
    with pytest.raises(ValueError, match='kernel=.*expected one of auto, foreach, fused'): FusedStep(kernel)

# --- in fits ------------------------------------------------------------------------------------
class Late(Callback):
    "Replaces the optimizer, after the others and in mid-fit"
    order,run_valid = 5000,False
    def before_fit(self): self.learn.create_opt()
    def before_epoch(self):
        if self.epoch==1: self.learn.create_opt()

class Hides(Callback):
    "Frozen and unfrozen, hypers and state changed, steps left out, in mid-fit"
    order,run_valid = 200,False
    def before_batch(self):
        if self.train_iter==2: self.opt.freeze_to(-1)
        if self.train_iter==4: self.opt.unfreeze()
        if self.train_iter==5: self.opt.clear_state()
    def before_step(self):
        if self.train_iter%3==0: raise CancelStepException

BESIDE = dict(
    alone=list, loop=lambda: [FastLoop()], window=lambda: [GradientAccumulation(64)], sam=lambda: [SAM()],
    awp=lambda: [AWP()], micro=lambda: [MicroBatch(8)], late=lambda: [Late()], hides=lambda: [Hides()],
    guards=lambda: [SkipNonFinite(), SpikeGuard(), GradientClip(.1)],
    averages=lambda: [EMA(), LookaheadWeights(2)],
    mults=lambda: [HyperMult(lr={'bias': .5}, wd={'bias': 0})], layers=lambda: [LayerStats(every=2)],
    freeze=lambda: [Freeze(schedule={0: '*bias*', 1: 0})], scaler=lambda: [MixedPrecision()])

def by_name(m): return [[p for n,p in m.named_parameters() if ('bias' in n)==b] for b in (False, True)]

@pytest.mark.parametrize('opt_func', [Adam, ranger], ids=['adam','ranger'])
@pytest.mark.parametrize('beside', BESIDE)
def test_fits_have_the_bits(beside, opt_func):
    def run(*cbs):
        learn = learner(cbs=[*BESIDE[beside](), *cbs], opt_func=opt_func)
        if beside=='mults': learn.splitter = by_name
        with quiet(learn): learn.fine_tune(2, 1e-2)
        assert type(learn.opt) in (Optimizer,Lookahead)
        return learn
    equal(run(FusedStep('foreach')), run())

def test_it_acts(monkeypatch):
    "The step is taken by kernels: also after another optimizer came, and with an own `step` for a batch"
    steps = []
    real = kernels.Kernels.step
    monkeypatch.setattr(kernels.Kernels, 'step', lambda self, *a: steps.append(real(self, *a)) or steps[-1])
    fit(learner(cbs=[FusedStep(), Late()]), 2)
    assert steps==[True]*len(steps) and len(steps)==8, steps
    steps.clear()
    fit(learner(cbs=[FusedStep(), LayerStats(every=2)]), 2)
    assert steps==[True]*8

@pytest.mark.parametrize('kernel', ['foreach','auto'])
@pytest.mark.parametrize('error', [KeyboardInterrupt, ValueError('no')])
def test_given_back_however_the_fit_ends(error, kernel):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==2: raise error
    learn = learner(cbs=[FusedStep(kernel), Stop()], opt_func=ranger)
    with pytest.raises((KeyboardInterrupt, ValueError)): fit(learn, 2)
    assert type(learn.opt) is Lookahead and type(learn.opt.opt) is Optimizer

def test_taken_off_in_mid_fit():
    class Off(Callback):
        order,run_valid = 90,False
        def after_batch(self):
            if self.train_iter==2:
                self.learn.remove_cb(self.learn.fused_step)
                assert type(self.opt) is Optimizer
    equal(fit(learner(cbs=[FusedStep('foreach'), Off()]), 2), fit(learner(), 2))

def test_saved_and_exported_in_mid_fit(tmp_path):
    "`learn.save` and `export` see fastai's optimizer"
    class Saves(Callback):
        order,run_valid = 90,False
        def after_batch(self):
            if self.train_iter!=3: return
            self.learn.save('mid')
            self.learn.export('mid.pkl')
            self.steps = [s['step'] for s in self.opt.state_dict()['state']]
    learn = fit(learner(cbs=[FusedStep(), saves := Saves()], path=tmp_path), 1)
    assert set(saves.steps)=={3}
    learn.load('mid')
    assert {s['step'] for s in learn.opt.state_dict()['state']}=={3}
    assert type(torch.load(tmp_path/'mid.pkl', weights_only=False).opt or learn.opt) is Optimizer

# --- the operations -----------------------------------------------------------------------------
def test_operations_of_a_kind_are_tried_once():
    kind = torch.device(DEVICE),torch.float32
    assert same_bits(*kind).mul_ is torch._foreach_mul_
    assert same_bits(*kind) is same_bits(*kind) and vars(fastest).keys()==vars(same_bits(*kind)).keys()

def test_an_axis_of_one_has_any_stride():
    "Its numbers are one after the other in memory; those of a longer axis may not be"
    t = torch.arange(60.)
    assert layout(t.as_strided((5, 1, 6), (1, 7, 5)))==((5, 1, 6), (1, 7, 5))
    assert layout(t.as_strided((5, 2, 6), (1, 7, 5))) is None

@pytest.mark.parametrize('name', [k for k,o in _operations.items() if o.ways])
def test_a_way_that_rounds_otherwise_is_not_taken(name):
    def off(*args):
        res = way(*args)
        for t in res or args[0]: t.mul_(1+1e-5)
        return res
    o,kind = _operations[name],dict(device=torch.device('cpu'), dtype=torch.float32)
    assert _agrees(o, o.loop, **kind)
    for way in o.ways: assert not _agrees(o, off, **kind)

@pytest.mark.parametrize('cut', [False, True])
def test_pieces_are_as_large_as_they_may_be(cut):
    "All is in them once; no two that follow each other fit together"
    r = random.Random(0)
    for _ in range(200):
        sizes,most = [r.randrange(20) for _ in range(r.randrange(9))],r.randrange(1, 30)
        found = pieces(sizes, most, cut)
        seen = sorted((i, n) for o in found for i in o.which for n in range(sizes[i])[o.part or slice(None)])
        assert seen==[(i, n) for i,size in enumerate(sizes) for n in range(size)]
        numbers = [sum(sizes[i] for i in o.which) for o in found if o.part is None]
        firsts = [sizes[o.which[0]] for o in found if o.part is None]
        assert all(n<=most or len(o.which)==1 for n,o in zip(numbers, [o for o in found if o.part is None]))
        assert all(a+b>most for a,b in zip(numbers, firsts[1:]))
