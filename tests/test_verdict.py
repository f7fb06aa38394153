"Guards that do not wait: the device decides, the program learns it later; the results are the same"
import random
from functools import partial
from itertools import product
from math import inf

import pytest, torch
from fastai.callback.core import (Callback, CancelBatchException, CancelEpochException,
                                  CancelTrainException)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientClip as FastaiGradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, Lamb, Larc, Lookahead, OptimWrapper, RAdam
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.averaging import _lerp
from fastai_callbacks_ext.base import late
from fastai_callbacks_ext.base.core import verdicts_of
from fastai_callbacks_ext.base.step import StepNumbers
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner
from cases import every_case, some
from common import FREE, make, public_callbacks, quiet, suit
from fastcore.imports import noop
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
RAW = dict(validate='raw', final='raw')

class Scaler(MixedPrecision):
    "fastai's, on any device, in float32; its scale falls in some batches"
    def __init__(self, scale=2.**40, **kwargs):
        super().__init__()
        self.scale,self.more = scale,kwargs
    def before_fit(self):
        self.autocast,self.scales = torch.autocast(DEVICE, enabled=False),[]
        more = dict(init_scale=self.scale, growth_interval=3) | self.more
        self.learn.scaler = torch.amp.GradScaler(DEVICE, **more)

    def after_fit(self):
        self.state = self.learn.scaler.state_dict()
        super().after_fit()

class OwnScaler(Scaler):
    def before_step(self): super().before_step()

class Lag:
    "Numbers arrive `n` looks after they were sent"
    def __init__(self, monkeypatch, n):
        def there(copy):
            copy.looks = getattr(copy, 'looks', 0)+1
            return copy.looks>n
        monkeypatch.setattr(late._Copy, 'there', property(there))

def net():
    return nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)).to(DEVICE)

GUARDS = dict(
    skip=lambda wait: [SkipNonFinite(wait=wait, max_consecutive=9)],
    clip=lambda wait: [GradientClip(.5, wait=wait)],
    inf_norm=lambda wait: [GradientClip(.1, norm_type=float('inf'), wait=wait)],
    value=lambda wait: [GradientClip(max_value=.05, wait=wait)],
    adaptive=lambda wait: [GradientClip(adaptive=.02, wait=wait)],
    both=lambda wait: [SkipNonFinite(wait=wait), GradientClip(.5, wait=wait)],
    scaler=lambda wait: [scaler(wait)],
    all=lambda wait: [SkipNonFinite(wait=wait), GradientClip(.5, wait=wait), scaler(wait)])

BESIDE = dict(
    ema=lambda: [EMA(**RAW)], warm_ema=lambda: [EMA(decay=.9, **RAW)],
    rare_ema=lambda: [EMA(decay=.9, every=3, **RAW)], late_ema=lambda: [EMA(decay=.9, start=5, **RAW)],
    often_swa=lambda: [SWA(start=0., every=3, **RAW)],
    cold_ema=lambda: [EMA(decay=[.9,.99], warmup=False, **RAW)], swa=lambda: [SWA(start=0., **RAW)],
    lawa=lambda: [LAWA(**RAW)], terminate=lambda: [TerminateOnNaN(every=5)],
    centralize=lambda: [GradientCentralization()], noise=lambda: [GradientNoise()],
    look_ahead=lambda: [LookaheadWeights(3)], steps=lambda: [StepLimit(11)],
    accumulate=lambda: [GradientAccumulation(2)], micro=lambda: [MicroBatch(16)], mix=lambda: [MixUp()],
    spike=lambda: [SpikeGuard(warmup=5)], schedule_stop=lambda: [EarlyStopping(patience=9), StopFile('stop')])

def scaler(wait, **kwargs):
    cb = Scaler(**kwargs)
    vars(cb)['wait'] = wait
    return cb

class Bad(PoisonBatch):
    "Several kinds of damage"
    def __init__(self, seed):
        r = random.Random(seed)
        self.plan = {r.randrange(16): r.choice(['input','loss','grad','number']) for _ in range(6)}
        super().__init__((), '', r.choice([float('nan'), float('inf')]))
    def _hit(self, where):
        trains = [*self.model.parameters()][-1].requires_grad
        return self.training and trains and self.plan.get(self.train_iter)==where

    def after_loss(self):
        super().after_loss()
        if self._hit('number'): self.learn.loss = self.loss*self.value      # the gradients are fine

def trained(cbs, seed=0, opt_func=Adam, epochs=2, model=net, **kwargs):
    with torch.random.fork_rng():
        bad = [] if seed is None else [Bad(seed)]
        learn = digits_learner([FastLoop(), FusedStep('fused'), *cbs, *bad], n=320, bs=32, model=model(),
                               opt_func=opt_func, **kwargs)
        suit(learn)
        with quiet(learn): learn.fit_one_cycle(epochs, 1e-2)
    return learn

def results(learn):
    "All that must be the same, as lists of numbers and texts"
    def numbers(o):
        if isinstance(o, Tensor): return o.detach().double().cpu().flatten().tolist()
        if isinstance(o, dict): return {k: numbers(v) for k,v in o.items()}
        return [numbers(v) for v in o] if isinstance(o, (list,tuple)) else o
    rec,res = learn.recorder,dict(weights=list(learn.model.state_dict().values()))
    res['state'] = [learn.opt.state[p] for g in learn.opt.param_lists for p in g]
    res |= dict(losses=[float(o) for o in rec.losses], lrs=rec.lrs, values=[list(o) for o in rec.values],
                count=rec.smooth_loss.count, smooth=float(rec.smooth_loss.value))
    for cb in learn.cbs:
        if not hasattr(cb, 'records'): continue
        res[cb.name] = {k: getattr(cb, k) for k in cb.fit_state if k not in ('_stats','used')}
        res[cb.name+' at'] = [(r.what, r.epoch, r.batch, r.iteration) for r in cb.records if r.what!='waits']
    res['scaler'] = [cb.state for cb in learn.cbs if isinstance(cb, Scaler)]
    held = {p for g in learn.opt.param_lists for p in g}
    res['grads'] = [p.grad for p in learn.model.parameters() if p not in held]
    return numbers(res)

def close(a, b, where=''):
    assert type(a) is type(b) or {type(a), type(b)}<={int,float}, (where, a, b)
    if isinstance(a, dict):
        assert a.keys()==b.keys(), where
        for k in a: close(a[k], b[k], f'{where}.{k}')
    elif isinstance(a, (list,tuple)):
        assert len(a)==len(b), (where, len(a), len(b))
        for x,y in zip(a, b): close(x, y, where)
    elif isinstance(a, float): assert a==pytest.approx(b, rel=2e-4, abs=2e-6, nan_ok=True), where
    else: assert a==b, (where, a, b)

class Count(Callback):
    "How many batches the device has decided about"
    def before_fit(self): self.n = 0
    def before_backward(self):
        verdicts = verdicts_of(self.learn)
        self.n += verdicts is not None and not verdicts.why_not()

@pytest.mark.parametrize('name,lag', some(product(GUARDS, [0, 2]), 9))
def test_results_are_those_of_waiting(name, lag, monkeypatch, capsys):
    Lag(monkeypatch, lag)
    for seed in range(1+every_case):
        count = Count()
        more = {False: [EMA(**RAW), count], True: [EMA(**RAW)]}
        a,b = (trained([*GUARDS[name](wait), *more[wait]], seed) for wait in (False, True))
        assert count.n>12
        close(results(a), results(b))

@pytest.mark.parametrize('beside', some(BESIDE, 8))
def test_beside_others(beside, monkeypatch, capsys):
    "They agree, or the guards wait"
    Lag(monkeypatch, 1)
    a,b = (trained([*GUARDS['all'](wait), *BESIDE[beside]()], 3) for wait in (False, True))
    close(results(a), results(b))

TEXT = ModelResetter, RNNCallback, RNNRegularizer, SeqLenSchedule
others = [o for o in public_callbacks() if o not in TEXT and o not in (FastLoop, FusedStep)]

@pytest.mark.parametrize('cls', some(others, 8), ids=lambda o: o.__name__)
def test_beside_each_callback(cls, monkeypatch, capsys, tmp_path):
    "What it says of itself in `late_steps` is true"
    monkeypatch.chdir(tmp_path)
    Lag(monkeypatch, 1)
    kwargs = dict(opt_func=FREE) if cls is ScheduleFree else {}
    a,b = (results(trained([*GUARDS['both'](wait), make(cls)], 3, **kwargs)) for wait in (False, True))
    for k in ('weights','state','losses','lrs','values','count','smooth'): close(a[k], b[k], k)

def test_weights_outside_of_the_optimizer(capsys):
    "Their gradients are nobody's to zero; those of a batch that is left out are not there"
    last = lambda model: [list(model[-1].parameters())]
    a,b = (trained(GUARDS['both'](wait), 1, splitter=last) for wait in (False, True))
    close(results(a), results(b))

def looking_ahead(*args, **kwargs): return Lookahead(SGD(*args, **kwargs))

torchs = partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))
torchs_sgd = partial(OptimWrapper, opt=partial(torch.optim.SGD, fused=True, momentum=.9))

OPTS = [SGD, RAdam, partial(SGD, mom=.9), Larc, Lamb, looking_ahead, torchs,
        partial(OptimWrapper, opt=torch.optim.Adam), torchs_sgd]

@pytest.mark.parametrize('opt_func', some(OPTS, 5))
def test_any_optimizer(opt_func, monkeypatch, capsys):
    "Where the kernel takes no flag, the guards wait"
    Lag(monkeypatch, 1)
    a,b = (trained(GUARDS['both'](wait), 1, opt_func, 2) for wait in (False, True))
    close(results(a), results(b))

class Keeps(nn.Module):
    "Keeps what the forward pass has seen, in many ways"
    def __init__(self, how):
        super().__init__()
        self.net,self.how,self.n,self.seen,self.list,self.gone = net(),how,0,None,[0],True
        self.register_buffer('total', torch.zeros(()))
    def forward(self, x):
        if self.how=='number': self.n += 1
        if self.how=='tensor': self.seen = x.detach().mean()
        if self.how=='list': self.list[0] += 1
        if self.how=='buffer': self.total = self.total + x.detach().mean()
        if self.how=='in place': self.total += x.detach().mean()
        if self.how=='gone': vars(self).pop('gone', None)
        if self.how=='grows': self.total.data = self.total.new_ones(self.total.numel()+1)
        return self.net(x)

@pytest.mark.parametrize('how', some(['number','tensor','list','buffer','in place','grows','gone'], 4))
def test_what_a_model_keeps_is_put_back(how, capsys):
    a,b = (trained(GUARDS['both'](wait), 1, model=lambda: Keeps(how).to(DEVICE)) for wait in (False, True))
    close(results(a), results(b))
    kept = lambda m: (m.n, m.list, 'gone' in vars(m))
    assert kept(a.model)==kept(b.model)
    if how=='tensor': close(a.model.seen.item(), b.model.seen.item())

class Waits(TorchDispatchMode):
    "Counts what would make a GPU wait"
    def __init__(self): self.n = 0; super().__init__()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = str(func).startswith(('aten._local_scalar_dense','aten.nonzero','aten.equal'))
        self.n += waits and args[0].is_floating_point()     # the loader has a whole number, on the CPU
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('guards', ['both','all'])
def test_no_step_waits(guards, monkeypatch, tmp_path):
    counts,lists = [],[]
    monkeypatch.setattr(late._Copy, 'there', False)
    real = Tensor.tolist
    monkeypatch.setattr(Tensor, 'tolist', lambda t: lists.append(1) or real(t))
    cbs = [FastLoop(), FusedStep('fused'), TerminateOnNaN(every=20), EMA(**RAW), GradientCentralization(),
           Checkpoint(tmp_path, minutes=99), StepLimit(10**6), *GUARDS[guards](False)]
    learn = digits_learner(cbs, n=320, bs=32, model=net())
    step = learn.one_batch
    def one_batch(i, b):
        lists.clear()
        with Waits() as waits: step(i, b)
        if learn.training: counts.append(waits.n+len(lists))
    monkeypatch.setattr(type(learn), 'one_batch', lambda self, i, b: one_batch(i, b))
    type(learn).one_batch.__module__ = 'fastai.learner'     # it trains a batch as fastai does
    with quiet(learn): learn.fit(3, 1e-3)
    assert counts[10:18]==[0]*8

def told(learn, name): return [(r.what, r.why) for r in getattr(learn, name).records]

class Looks(Callback):
    def before_step(self): pass

class Hears(Callback):
    def __call__(self, event_name): super().__call__(event_name)

class OwnStep(Learner):
    def _do_grad_opt(self): super()._do_grad_opt()

@pytest.mark.parametrize('cbs,why', [
    (lambda: [OwnScaler()], 'own_scaler has to know of each step'),
    (lambda: [Looks()], 'looks has to know of each step'),
    (lambda: [Hears()], 'hears has to know of each step'), (lambda: [SAM()], 'sam has to know of each step'),
    (lambda: [GradientClip(auto=50, wait=False)], 'gradient_clip has to know of each step'),
    (lambda: [GradientClip(.5, wait=True)], 'gradient_clip has to know of each step'),
    (lambda: [FastaiGradientClip()], 'gradient_clip has to know of each step')])
def test_says_why_it_waits(cbs, why, capsys):
    assert told(trained([SkipNonFinite(wait=False), *cbs()], 1), 'skip_non_finite')[0]==('waits', why)

class AsksRate(Callback):
    def before_fit(self): self.rates = []
    def before_batch(self): self.rates.append(self.learn.gradient_clip.clip_rate)
def test_the_share_of_clipped_steps_in_mid_epoch(monkeypatch):
    Lag(monkeypatch, 3)
    a,b = (trained([GradientClip(.5, wait=wait), AsksRate()], None).asks_rate.rates for wait in (True, False))
    assert a==b and 0<a[5]<1

class Mixes(Callback):
    "Puts other items in the places of those of a batch, so that no version tells it"
    def before_batch(self):
        if self.training: self.x.data.copy_(self.x.data.flip(0))
def test_names_no_items_whose_rows_have_moved(capsys):
    for more,named in ([], True),([Mixes()], False):
        learn = trained([SkipNonFinite(wait=False), PoisonBatch((5, 12), 'loss'), *more], None)
        assert [('the batch: items' in why) for _,why in told(learn, 'skip_non_finite')]==[named]*2

def test_a_loader_whose_items_are_not_known(capsys):
    batches = [(torch.randn(8, 4, device=DEVICE), torch.randint(2, (8,), device=DEVICE)) for _ in range(9)]
    guard = SkipNonFinite(wait=False)
    learn = Learner(DataLoaders(batches, []), nn.Linear(4, 2).to(DEVICE), nn.CrossEntropyLoss(),
                    opt_func=Adam, cbs=[FastLoop(), FusedStep(), guard, PoisonBatch(5)])
    with quiet(learn): learn.fit(1)
    assert told(learn, 'skip_non_finite')[0][1].startswith('the loss is nan; with')

def test_a_learner_with_its_own_step(capsys):
    learn = digits_learner([FastLoop(), FusedStep(), SkipNonFinite(wait=False)], n=320, bs=32)
    learn.__class__ = OwnStep
    with quiet(learn): learn.fit(1)
    assert told(learn, 'skip_non_finite')==[('waits', 'OwnStep has its own _do_grad_opt')]

def test_needs_a_loop_and_kernels(capsys):
    no_loop = 'there is no FastLoop that records the losses'
    no_flag = 'a step of Optimizer without FusedStep cannot be dropped'
    for cbs,why,kwargs in (([FastLoop()], no_flag, {}), ([FusedStep()], no_loop, {}),
                           ([FastLoop(), FusedStep()], 'a step of radam_step cannot be dropped',
                            dict(opt_func=RAdam))):
        learn = digits_learner([*cbs, SkipNonFinite(wait=False)], n=320, bs=32, **kwargs)
        with quiet(learn): learn.fit(1)
        assert told(learn, 'skip_non_finite')==[('waits', why)]

def test_metrics_of_the_training(capsys):
    learn = digits_learner([FastLoop(), FusedStep(), SkipNonFinite(wait=False)], n=320, bs=32)
    learn.recorder.train_metrics = True
    with quiet(learn): learn.fit(1)
    assert told(learn, 'skip_non_finite')==[('waits', 'there are metrics of the training')]

def test_a_callback_that_comes_later(capsys):
    class Adds(Callback):
        def before_batch(self):
            if self.training and self.train_iter==10: self.learn.add_cb(Looks())
    assert told(trained([SkipNonFinite(wait=False), Adds()], None), 'skip_non_finite')==[
        ('waits', 'looks has to know of each step')]

def test_a_state_waits(monkeypatch, capsys):
    Lag(monkeypatch, 99)
    class Asks(Callback):
        def before_batch(self):
            if self.training and self.train_iter==14:
                skipped = self.learn.skip_non_finite.state_dict()['skipped']
                self.found = [skipped, len(self.learn.gradient_clip.norms)]
    asks = Asks()
    trained([*GUARDS['both'](False), PoisonBatch((10, 12), 'input'), asks], None)
    assert asks.found==[2, 12]

def test_large_but_finite():
    "The 2-norm of these overflows"
    loss,grads = torch.ones((), device=DEVICE),[torch.full((3,), v, device=DEVICE) for v in (1e30, 1.)]
    assert StepNumbers(loss, grads).not_finite==0
    assert StepNumbers(loss, [*grads, grads[0]*1e30]).not_finite==StepNumbers(loss*inf, grads).not_finite==1

@pytest.mark.parametrize('guard', ['skip','terminate'])
def test_a_scale_that_is_too_low(guard, capsys):
    "An overflow is not for the scaler to mend then: it counts"
    def cbs(wait):
        first = SkipNonFinite(wait=wait) if guard=='skip' else TerminateOnNaN(every=4)
        return [first, scaler(wait, scale=.5, growth_interval=10**6), PoisonBatch((9, 13), 'grad')]
    a,b = (trained(cbs(wait), None) for wait in (False, True))
    name = a.cbs.filter(lambda o: isinstance(o, (SkipNonFinite, TerminateOnNaN)))[0].name
    assert len(told(a, name))==len(told(b, name))==(2 if name=='skip_non_finite' else 1)
    if name=='skip_non_finite': close(results(a), results(b))

class At(Callback):
    "Does something once, before a batch"
    def __init__(self, n, f, event='before_batch'):
        self.n,self.f,self.done = n,f,False
        setattr(self, event, self.act)
    def act(self):
        if self.done or not self.training or self.train_iter!=self.n: return
        self.done = True
        self.f(self.learn)

def cancel(error):
    def f(learn): raise error
    return f

IN_BETWEEN = dict(
    validate=lambda: At(8, lambda l: l.validate()),
    validate_after_pred=lambda: At(8, lambda l: l.validate(), 'after_pred'),
    preds=lambda: At(8, lambda l: l.get_preds()),
    find=lambda: At(8, lambda l: lr_find(l, num_it=12, show_plot=False)),
    their_find=lambda: At(8, lambda l: l.lr_find(num_it=12, show_plot=False)),
    fit=lambda: At(8, lambda l: l.fit(1)),
    no_batch=lambda: At(8, cancel(CancelBatchException)),
    no_epoch=lambda: At(8, cancel(CancelEpochException), 'after_backward'),
    no_training=lambda: At(8, cancel(CancelTrainException), 'after_backward'),
    now_it_waits=lambda: At(8, lambda l: l.add_cb(Looks())),
    new_optimizer=lambda: At(8, lambda l: l.create_opt()))

@pytest.mark.parametrize('what,lag', some(product(IN_BETWEEN, [1, 99]), 7))
def test_what_happens_while_a_verdict_is_pending(what, lag, monkeypatch, capsys):
    Lag(monkeypatch, lag)
    cbs = lambda wait: [SkipNonFinite(2, wait=wait), GradientClip(.5, wait=wait), EMA(decay=.9, **RAW),
                        PoisonBatch((6, 7)), IN_BETWEEN[what]()]
    a,b = (results(trained(cbs(wait), None)) for wait in (False, True))
    close(a, b)

@pytest.mark.parametrize('guards', ['both','clip'])
@pytest.mark.parametrize('opt_func', [torchs, torchs_sgd])
def test_the_first_batch_is_bad(guards, opt_func, capsys):
    cbs = lambda wait: [*GUARDS[guards](wait), PoisonBatch((0, 1), 'grad')]
    a,b = (trained(cbs(wait), None, opt_func) for wait in (False, True))
    close(results(a), results(b))

def test_weights_that_are_repaired_late(monkeypatch, capsys):
    "The batches since then were bad because of them"
    Lag(monkeypatch, 6)
    learn = trained([SkipNonFinite(wait=False), PoisonBatch(2, 'weight')], None)
    assert [r.what for r in learn.skip_non_finite.records]==['skipped a batch']
    assert learn.skip_non_finite.skipped==1 and len(learn.recorder.losses)<16

class CountsSteps(Learner):
    def _step(self): super()._step()

class Shrinks(torch.optim.AdamW):
    pass

def test_code_of_others_around_the_step(capsys):
    "It would run for steps that are not taken"
    hook = lambda o,args,kwargs: None
    cases = [(CountsSteps, Adam, noop, 'CountsSteps has its own _step'),
             (Learner, partial(OptimWrapper, opt=partial(Shrinks, fused=True)), noop,
              'a step of Shrinks cannot be dropped; one of Adam(fused=True) can'),
             (Learner, torchs, lambda l: l.opt.opt.register_step_post_hook(hook), 'hooks act on each step')]
    for cls,opt_func,before,why in cases:
        learn = digits_learner([FastLoop(), FusedStep(), SkipNonFinite(wait=False)], n=320, bs=32,
                               opt_func=opt_func)
        learn.__class__ = cls
        learn.create_opt()
        before(learn)
        with quiet(learn): learn.fit(1)
        assert told(learn, 'skip_non_finite')==[('waits', why)]

@pytest.mark.parametrize('kwargs', [dict(max_norm=0.), dict(adaptive=0.), dict(max_value=0.)])
def test_a_limit_of_zero(kwargs, capsys):
    "Of a gradient that is 0"
    class Zero(Callback):
        def after_backward(self):
            for p in self.model.parameters(): p.grad.zero_()
    a,b = (trained([GradientClip(**kwargs, wait=wait), Zero()], None, SGD) for wait in (False, True))
    close(results(a), results(b))
    assert all(p.isfinite().all() for p in a.model.parameters())

def test_twice_the_same_guard(capsys):
    guards = lambda wait: [SkipNonFinite(wait=wait), SkipNonFinite(wait=wait)]
    for wait in (False, True):
        learn = trained([*guards(wait), PoisonBatch(5)], None)
        assert sorted(cb.skipped for cb in learn.cbs.filter(lambda o: isinstance(o, SkipNonFinite)))==[0, 1]

def test_the_log_knows_the_step(monkeypatch, capsys, tmp_path):
    Lag(monkeypatch, 3)
    learn = trained([SkipNonFinite(wait=False), RunLog(tmp_path), PoisonBatch(5)], None)
    events = read_log(learn.run_log.log_file).events
    assert events[events.callback=='skip_non_finite'].step.tolist()==[6]

def test_the_log_has_no_loss_of_a_dropped_batch(capsys, tmp_path):
    def losses(wait):
        guards = [SkipNonFinite(wait=wait), PoisonBatch((5, 12), 'grad')]
        learn = trained([*guards, RunLog(tmp_path, every=1)], None)
        return read_log(learn.run_log.log_file).steps.loss
    a,b = losses(True),losses(False)
    assert a[a.isna()].index.tolist()==[5, 12]
    close(a.tolist(), b.tolist())

def test_a_flag_is_for_one_step(capsys):
    "PyTorch's optimizers keep it; from batch 10 on, the guard waits"
    class Adds(Callback):
        def before_batch(self):
            if self.training and self.train_iter==10: self.learn.add_cb(Looks())
    cbs = lambda wait: [SkipNonFinite(wait=wait), PoisonBatch(9), Adds()]
    a,b = (trained(cbs(wait), None, torchs) for wait in (False, True))
    close(results(a), results(b))

@pytest.mark.parametrize('most', [9, 0])
def test_interrupted(most, monkeypatch, capsys):
    "What had not come is known afterwards, and the interrupt stays one"
    Lag(monkeypatch, 99)
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.train_iter==14: raise KeyboardInterrupt
    guard = SkipNonFinite(most, wait=False)
    with pytest.raises(KeyboardInterrupt): trained([guard, PoisonBatch((10, 12), 'input'), Stop()], None)
    assert guard.skipped==(2 if most else 0)
    assert [r.what for r in guard.records]==(['skipped a batch']*2 if most else ['stopped the fit'])

def test_stops_after_many(monkeypatch, capsys):
    Lag(monkeypatch, 2)
    learn = trained([SkipNonFinite(2, wait=False), PoisonBatch(tuple(range(6, 24)), 'input')], None)
    assert [o for o,_ in told(learn, 'skip_non_finite')]==['skipped a batch']*2+['stopped the fit']
    assert learn.epoch==1 and learn.skip_non_finite.skipped==2
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_repairs_weights(capsys):
    learn = trained([SkipNonFinite(wait=False, snapshot=5), PoisonBatch(9, 'weight')], None)
    assert 'weights and optimizer are those before batch' in told(learn, 'skip_non_finite')[0][1]
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_a_saved_state_knows_all(monkeypatch, capsys, tmp_path):
    "What a file has is not behind: the run that goes on is the run that was not ended"
    Lag(monkeypatch, 99)
    class End(Callback):
        order = 5000
        def before_batch(self):
            if self.training and self.train_iter==14: raise KeyboardInterrupt
    cbs = lambda: [Checkpoint(tmp_path, steps=14, background=False), *GUARDS['all'](False), EMA(**RAW)]
    with pytest.raises(KeyboardInterrupt): trained([*cbs(), End()], 3)
    resumed,whole = trained(cbs(), 3),trained([*GUARDS['all'](False), EMA(**RAW)], 3)
    a,b = results(resumed),results(whole)
    for k in ('weights','state','losses','ema','skip_non_finite','gradient_clip'): close(a[k], b[k], k)

def test_taken_off(monkeypatch, capsys):
    "In mid-fit, with verdicts that have not come: the learner is as before, and the batches count until then"
    Lag(monkeypatch, 99)
    class TakeOff(Callback):
        order = 5000
        def before_batch(self):
            if not self.training or self.train_iter!=12: return
            self.learn.remove_cbs(self.learn.cbs.filter(lambda o: type(o) in self.off))
    for off in ((SkipNonFinite,), (FusedStep,), (GradientClip, EMA)):
        cb = TakeOff()
        cb.off = off
        learn = trained([*GUARDS['both'](False), EMA(**RAW), cb], 3)
        assert verdicts_of(learn) is None and 'found_inf' not in vars(learn.opt)
        assert all(p.isfinite().all() for p in learn.model.parameters()) or SkipNonFinite in off

@pytest.mark.parametrize('flag', [0., 1.])
def test_an_average_of_any_layout(flag):
    "Weights with gaps in memory, transposed, in another order"
    t = torch.arange(48., device=DEVICE)
    now = [t.view(6, 8)[:, ::2], t.view(6, 8).T, t.view(2, 3, 2, 4).to(memory_format=torch.channels_last), t]
    average = [o.to(torch.float32, copy=True).mul_(2) for o in now]
    expected = [torch.lerp(a, o, .3*(1-flag)) for a,o in zip(average, now)]
    _lerp(average, now, .3, torch.tensor(flag, device=DEVICE))
    for a,b in zip(average, expected): torch.testing.assert_close(a, b)
