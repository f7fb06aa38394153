"Each average is its definition, and a swap of weights leaves no trace however it ends"
from copy import deepcopy
from types import SimpleNamespace

import numpy as np, pytest, torch
from fastai.basics import DataLoaders, Learner, MSELossFlat
from fastai.callback.all import BnFreeze, EarlyStoppingCallback, MixedPrecision, MixUp, SaveModelCallback
from fastai.callback.core import (Callback, CancelEpochException, CancelFitException, CancelStepException,
                                  CancelValidException)
from fastai.learner import load_learner
from fastai.metrics import Metric, rmse
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from cases import some
from common import fit, quiet
from fastai_callbacks_ext.all import (EMA, LAWA, SWA, Checkpoint, EarlyStopping, ExtCallback, FastLoop,
                                      GradientAccumulation, SaveTopK, SkipNonFinite, refresh_batchnorm, soup)
from fastai_callbacks_ext.base.files import DamagedFile
from fastai_callbacks_ext.base.model import load_weights
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner, text_learner

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

averagers = {'EMA': lambda **kw: EMA(0.8, **kw), 'SWA': lambda **kw: SWA(0., **kw),
             'LAWA': lambda **kw: LAWA(3, 7, **kw)}
each = pytest.mark.parametrize('make', averagers.values(), ids=averagers)

class Steps(Callback):
    "Keeps the state after each step that was taken, and after each epoch"
    order,run_valid = 48,False
    def before_fit(self): self.first,self.steps,self.epochs,self.skipped = self.state(),[],[],False
    def state(self): return {k: v.clone() for k,v in self.model.state_dict().items()}
    def after_cancel_step(self): self.skipped = True
    def after_step(self):
        if not self.skipped: self.steps.append(self.state())
        self.skipped = False
    def after_train(self): self.epochs.append(self.state())

def learner(*cbs, n=300, **kwargs): return digits_learner([*cbs, Steps()], bs=32, n=n, **kwargs)
def run(*cbs, epochs=2, n=300, **kwargs): return fit(learner(*cbs, n=n, **kwargs), epochs)
def state(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}
def assert_equal(a, b):
    for k in b: assert torch.equal(a[k].to(b[k].device), b[k]), k
def assert_close(a, b, **tol):
    tol = tol or dict(rtol=1e-4, atol=1e-6)
    for k in b: torch.testing.assert_close(a[k].double(), b[k].double(), **tol)
def mean(states, shares):
    "Weighted mean of the float tensors"
    shares = torch.tensor(shares, dtype=torch.float64)/sum(shares)
    return {k: sum(w*s[k].double() for w,s in zip(shares, states)) for k,v in states[-1].items()
            if v.is_floating_point()}

# Definitions

@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.integers(1, 4), st.integers(0, 9))
def test_ema_is_its_closed_form(decay, every, start):
    "Shares of decay**age over the updates, statistics of batch norm included"
    learn = run(EMA(decay, every=every, start=start))
    used = learn.steps.steps[start:][every-1::every]
    assert_close(state(learn), mean(used, [decay**(every*(len(used)-1-i)) for i in range(len(used))]),
                 rtol=1e-3, atol=1e-5)

@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.floats(0, 0.999), st.integers(1, 3), st.integers(0, 5))
def test_without_warmup_the_past_is_what_was_there(decay, every, start):
    learn = run(EMA(decay, every=every, start=start, warmup=False))
    steps = learn.steps
    states = [[steps.first, *steps.steps][start], *steps.steps[start:][every-1::every]]
    d,n = decay**every,len(states)
    shares = [d**(n-1)] + [(1-d)*d**(n-1-i) for i in range(1, n)]
    assert_close(state(learn), mean(states, shares), rtol=1e-3, atol=1e-5)

def age(shares):
    "Mean number of steps that weights with these `shares`, the oldest first, are old"
    return sum(o*(len(shares)-i) for i,o in enumerate(shares, 1))/sum(shares)

def poly(n):
    "Shares of the default of EMA after n steps"
    shares = []
    for i in range(1, n+1): shares = [o*(1-19/(i+18)) for o in shares] + [19/(i+18)]
    return shares

def test_defaults_are_a_twentieth_of_the_fit_old():
    assert age(poly(4000))==pytest.approx(200, rel=0.01)
    learn = run(ema := EMA(), LAWA(validate='raw', final='raw'), epochs=4)
    steps = learn.steps.steps
    with ema.using('ema'): got = state(learn)
    old_enough = {k: v for k,v in steps[-1].items() if 'running' in k}
    want = mean(steps, poly(len(steps))) | old_enough
    assert_close(got, {k: v for k,v in want.items() if 'num_' not in k}, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('steps', [7,50,60,1000,1001,1013])
def test_lawa_spreads_its_sets_over_the_latest_tenth(steps):
    cb = LAWA(buffers='average')
    cb._learner = SimpleNamespace(model=(m := nn.Linear(1,1)))
    for i in range(1, steps+1):
        with torch.no_grad(): m.weight.fill_(i)
        cb._t = i
        cb._stepped()
    at = [int(o['weight']) for o in cb._kept]
    assert at==cb._at and len(at)<=5 and at[0]>=0.88*steps-1 and at[-1]>=steps-max(1, steps/50)
    assert len(at)>=4 or steps<100

def test_statistics_are_as_old_as_the_weights():
    "Batch norm's own are ten steps old, in a long fit the average of them is shorter by as much"
    cb = EMA()
    cb._learner = SimpleNamespace(model=(m := nn.BatchNorm1d(1)))
    for i in range(1, 1001):
        with torch.no_grad(): m.weight.fill_(i), m.running_mean.fill_(i)
        cb._t = i
        with torch.no_grad(): cb._stepped()
    kept = cb._kept[0]
    assert 1000-kept['weight'].item()==pytest.approx(50, rel=.03)
    assert 1000-kept['running_mean'].item()==pytest.approx(40, abs=3)

def test_half_life():
    a,b = run(EMA(half_life=5)),run(EMA(0.5**0.2))
    assert_close(state(a), state(b), rtol=1e-6, atol=1e-7)

class Torchs(Callback):
    "torch's `AveragedModel`, beside"
    order,run_valid = 49,False
    def __init__(self, decay): self.decay = decay
    def before_train(self):
        if not hasattr(self, 'average'):
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay),
                                         use_buffers=True)
            self.average.update_parameters(self.model)     # the first is a copy
    def after_step(self): self.average.update_parameters(self.model)

def test_as_torch():
    learn = run(EMA(0.9, warmup=False), Torchs(0.9))
    assert_close({k: v for k,v in state(learn).items() if 'num_batches' not in k},
                 {k: v for k,v in learn.torchs.average.module.state_dict().items() if 'num_batches' not in k},
                 rtol=1e-5, atol=1e-7)

def test_as_timm():
    timm = pytest.importorskip('timm.utils')
    class Timms(Callback):
        order,run_valid = 49,False
        def before_train(self):
            if not hasattr(self, 'v3'): self.v3 = timm.ModelEmaV3(self.model, decay=0.9)
        def after_step(self): self.v3.update(self.model)
    learn = run(EMA(0.9, warmup=False), Timms())
    assert_close({k: v for k,v in state(learn).items() if 'num_batches' not in k},
                 {k: v for k,v in learn.timms.v3.module.state_dict().items() if 'num_batches' not in k},
                 rtol=1e-5, atol=1e-7)

@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.sampled_from([0., 0.3, 0.5, 1.]), st.sampled_from([None, 1, 3]))
def test_swa_is_the_mean(start, every):
    learn = run(SWA(start, every, buffers='average'), epochs=3)
    n,steps = len(learn.dls.train),learn.steps.steps
    if every is None: used = [s for i,s in enumerate(learn.steps.epochs, 1) if i/3>start]
    else: used = [s for i,s in enumerate(steps) if (i+1)%every==0 and i/(3*n)>=start-1e-9]
    assert_close(state(learn), mean(used, [1]*len(used)) if used else learn.steps.epochs[-1])

@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.sampled_from([1, 4, 7]))
def test_lawa_is_the_mean_of_the_last(k, every):
    learn = run(LAWA(k, every), epochs=3)
    used = learn.steps.steps[every-1::every][-k:]
    assert_close(state(learn), mean(used, [1]*len(used)))

def test_swa_learning_rate():
    class Rates(Callback):
        order,run_valid = 53,False
        def before_fit(self): self.lrs = []
        def before_step(self): self.lrs.append(self.opt.hypers[-1]['lr'])
    learn = digits_learner([SWA(0.5, lr=0.123), Rates()], bs=32, n=300)
    with quiet(learn): learn.fit_one_cycle(4)
    n = len(learn.dls.train)
    assert learn.rates.lrs[2*n:]==[0.123]*(2*n) and 0.123 not in learn.rates.lrs[:2*n]

# What is averaged

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_small_updates_of_half_precision(dtype):
    "An average in half precision would not move"
    ema,model = EMA(0.999, warmup=False),nn.Linear(3,3).to(dtype)
    ema._learner = SimpleNamespace(model=model)
    fill = lambda v: [p.data.fill_(v) for p in model.parameters()]
    fill(1.)
    ema._begin()
    fill(2.)
    with torch.no_grad(): [ema._update() for _ in range(700)]
    for a in ema._kept[0].values():
        torch.testing.assert_close(a, torch.full_like(a, 2-.999**700), rtol=1e-4, atol=1e-5)
    ema._lend()
    for p in model.parameters(): assert p.dtype==dtype and p.eq(torch.tensor(2-.999**700, dtype=dtype)).all()

def test_tied_weights():
    learn = text_learner(n=3000)
    fit(learn, 1, cbs=EMA(0.9))
    assert learn.model[0].encoder.weight is learn.model[1].decoder.weight

@pytest.mark.parametrize('buffers', ['average','copy','refresh'])
def test_buffers(buffers):
    learn = run(EMA(0.8, buffers=buffers))
    got,last,shares = state(learn),learn.steps.steps[-1],[0.8**i for i in range(len(learn.steps.steps))][::-1]
    average = mean(learn.steps.steps, shares)
    if buffers=='average': want = average
    if buffers=='copy': want = {k: last[k] if 'running' in k or 'num_' in k else v for k,v in average.items()}
    if buffers=='refresh':
        modes = [m.training for m in learn.model.modules()]
        refresh_batchnorm(learn)
        assert modes==[m.training for m in learn.model.modules()]
        want = state(learn)
        assert not torch.allclose(want['1.running_mean'], last['1.running_mean'])
        assert_close(got, want, rtol=0.1,
                     atol=0.05)      # the last batch of an epoch is another one each time
        return
    assert_close(got, want)

# Weights and statistics, and no constants

class Net(nn.Module):
    "Has weights, a statistic of its own, and constants of several kinds"
    def __init__(self):
        super().__init__()
        self.inside,self.out,self.teacher = nn.Linear(5,8),nn.Linear(8,1),nn.Linear(5,8).requires_grad_(False)
        self.ids = nn.Parameter(torch.tensor([16777217,123456789]), requires_grad=False)
        for k,v in dict(center=torch.zeros(5), mask=torch.full((3,3), -torch.inf).triu(1),
                        seen=torch.zeros(1).long(),
                        flag=torch.tensor([True]), table=torch.rand(7), cache=torch.zeros(0)).items():
            self.register_buffer(k, v)
    def forward(self, x):
        if self.training:
            self.center = self.center.lerp(x.mean(0), .2)
            self.seen += 1
            self.cache = torch.rand(int(self.seen)%3+1, device=x.device)
            for p,q in zip(self.teacher.parameters(), self.inside.parameters()): p.data.lerp_(q.detach(), .1)
        return self.out(torch.relu(self.inside(x-self.center)))

def numbers(model=None, cbs=(), bs=8, n=64, **kwargs):
    "A learner on numbers, with plain PyTorch loaders"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=g)
    data = list(zip(x, x.sum(1, keepdim=True)))
    set_seed(0)
    loader = torch.utils.data.DataLoader
    dls = DataLoaders(loader(data, bs, shuffle=True), loader(data[:n//4], bs))
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    kwargs = dict(lr=1e-2, metrics=rmse) | kwargs
    learn = Learner(dls, (model or Net()).to(device), MSELossFlat(), cbs=[*cbs, Steps()], **kwargs)
    learn.recorder.add_time = False
    return learn

everywhere = dict(EMA=lambda **kw: EMA(0.8, **kw), SWA=lambda **kw: SWA(0., 1, buffers='average', **kw),
                  LAWA=lambda **kw: LAWA(3, 1, **kw))

@pytest.mark.parametrize('make', everywhere.values(), ids=everywhere)
def test_only_weights_and_statistics_are_averaged(make):
    class Touch(Callback):
        "As DDP's broadcast, which writes into all buffers"
        def before_batch(self):
            for b in self.model.buffers(): b.copy_(b.clone())
    learn = fit(numbers(cbs=[cb := make(), Touch()]), 2)
    got,last,n = state(learn),learn.steps.steps[-1],len(learn.steps.steps)
    shares = dict(ema=[0.8**(n-1-i) for i in range(n)], swa=[1]*n, lawa=[0]*(n-3)+[1]*3)[cb.average_name]
    want = mean(learn.steps.steps, shares) if 'cache' not in last else \
        mean([{k: v for k,v in s.items() if k!='cache'} for s in learn.steps.steps], shares)
    moved = [k for k in want if k.split('.')[0] in ('inside','out','center')]
    assert_close(got, {k: want[k] for k in moved}, rtol=1e-3, atol=1e-5)
    constant = [k for k in got if k not in moved]
    assert {k.split('.')[0] for k in constant}=={'teacher','ids','mask','seen','flag','table','cache'}
    assert_equal(got, {k: last[k] for k in constant if k!='cache'})
    cb.use('raw'); assert_equal(state(learn), {k: v for k,v in last.items() if k!='cache'})

class Thaw(Callback):
    "A GAN's turns: now the one half is trained, now the other; or the body from some batch on"
    order,run_valid = -50,False
    def __init__(self, on): self.on = on
    def before_fit(self): self.model[0].requires_grad_(False)
    def before_batch(self):
        for i,p in enumerate(self.model.children()): p.requires_grad_(self.on(i, self.train_iter))

trained = {'turns': lambda i,t: (i==0)==(t%5 in (1,2)), 'body later': lambda i,t: i>0 or t>=5}
@pytest.mark.parametrize('on', trained.values(), ids=trained)
@pytest.mark.parametrize('stop', [None, 9])
@pytest.mark.parametrize('make', [everywhere['EMA'], everywhere['SWA'], lambda **kw: LAWA(12, 1, **kw)],
                         ids=everywhere)
def test_weights_that_are_trained_later(make, stop, on, tmp_path):
    "The average is of all weights along the way, of those too that are frozen at first; also after a restart"
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.train_iter==stop: raise KeyboardInterrupt
    def go(*cbs, path):
        cbs = make(final='raw'),Thaw(on),Checkpoint(path, steps=1, background=False),*cbs
        learn = numbers(nn.Sequential(nn.Linear(5,8), nn.Linear(8,1)), cbs, lr=.1)
        with quiet(learn): learn.fit(2)
        return learn
    learn = go(path=tmp_path/'a')
    states,n = learn.steps.steps,len(learn.steps.steps)
    assert n==16 and not torch.equal(states[0]['0.weight'], states[-1]['0.weight'])
    if stop:
        with pytest.raises(KeyboardInterrupt): go(Stop(), path=tmp_path/'b')
        learn = go(path=tmp_path/'b')
    cb = next(o for o in learn.cbs if hasattr(o, 'average_name'))
    shares = dict(ema=[0.8**(n-1-i) for i in range(n)], swa=[1]*n, lawa=[0]*(n-12)+[1]*12)[cb.average_name]
    with cb.using(cb.average_name): assert_close(state(learn), mean(states, shares))

@pytest.mark.parametrize('wrap', [nn.utils.parametrizations.weight_norm,
                                  nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_parametrized_weights(wrap):
    "The parts of a weight are averaged; a unit vector is that of the last step"
    model = nn.Sequential(wrap(nn.Linear(5,8)), nn.ReLU(), nn.Linear(8,1))
    learn = fit(numbers(model, [EMA(0.8)]), 2)
    got,last = state(learn),learn.steps.steps[-1]
    want = mean(learn.steps.steps, [0.8**i for i in range(len(learn.steps.steps))][::-1])
    vectors = {k: v for k,v in last.items() if k.endswith(('_u','_v'))}
    assert_equal(got, vectors); assert_close(got, {k: v for k,v in want.items() if k not in vectors})

def test_sparse_gradients():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(9, 4, sparse=True),nn.Linear(4,1)
        def forward(self, x): return self.out(self.emb(x.abs().long().clamp(max=8)).mean(1))
    from fastai.optimizer import OptimWrapper
    def opt_func(ps, lr, **kwargs): return OptimWrapper(ps, torch.optim.SGD, lr=lr)
    learn = fit(numbers(Words(), [EMA(0.8)], opt_func=opt_func), 1)
    assert_close(state(learn), mean(learn.steps.steps, [0.8**i for i in range(len(learn.steps.steps))][::-1]))

def test_compiled():
    def go(wrap):
        learn = digits_learner([EMA(0.8, buffers='refresh')], n=200, bs=32)
        learn.model = wrap(learn.model)
        return fit(learn, 1)
    a,b = go(lambda m: m),go(lambda m: torch.compile(m, backend='eager'))
    assert_close({f'_orig_mod.{k}': v for k,v in state(a).items()}, state(b))

def test_frozen_and_unfrozen_in_mid_fit():
    "A weight that is trained for a while only is averaged, and before and after has the value that it had"
    class Change(Callback):
        def before_epoch(self):
            self.model.inside.weight.requires_grad_(self.epoch!=0)
            self.model.out.weight.requires_grad_(self.epoch!=2)
    learn = fit(numbers(cbs=[ema := EMA(0.8), Change()]), 3)
    assert not torch.equal(learn.model.inside.weight, learn.steps.steps[-1]['inside.weight'])
    for k in ('inside.weight','out.weight'):
        moved = [s[k] for s in learn.steps.steps]
        n = len(moved)
        want = sum(0.8**(n-1-i)*v.double() for i,v in enumerate(moved))/sum(0.8**i for i in range(n))
        # the first of its steps counts for those before it
        torch.testing.assert_close(state(learn)[k].double(), want, rtol=1e-2, atol=1e-2)
    ema.use('raw'); assert_equal(state(learn), {k: v for k,v in learn.steps.steps[-1].items() if k!='cache'})

# Statistics of batch norm

def normed(cbs=(), **kwargs):
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5,8), nn.BatchNorm1d(8), nn.Linear(8,1))
    return numbers(model, cbs, **kwargs)
def statistics(learn): return {k: v for k,v in state(learn).items() if 'running' in k}
def seen(learn): return torch.cat([x for x,_ in learn.dls.train]).to(learn.model[0].weight.device)

def test_refreshed_statistics_are_those_of_the_training_set():
    learn = fit(normed(), 1)
    with torch.no_grad(): learn.model[0].running_var.fill_(torch.nan), learn.model[1].weight.mul_(3)
    count = learn.model[0].num_batches_tracked.clone()
    refresh_batchnorm(learn)
    torch.testing.assert_close(learn.model[0].running_mean, seen(learn).mean(0), rtol=1e-4, atol=1e-5)
    assert all(v.isfinite().all() for v in statistics(learn).values())
    assert learn.model[0].num_batches_tracked==count

@pytest.mark.parametrize('inside', [False,True])
def test_a_refresh_is_a_pass_of_the_learner(inside):
    "With the inputs that the callbacks make, and without a trace on anything"
    class Scale(Callback):
        n,log = 0,None
        def before_fit(self): self.log = self.log or []
        def before_batch(self):
            self.learn.xb = ((self.xb[0]-3)*10,)
            if not hasattr(self.learn, 'gather_preds'): self.counted = True
            self.n += 1; self.log.append(self.n)
    class Own(ExtCallback):
        "Acts in real fits only"
        calls = 0
        def before_batch(self): self.calls += 1
    cbs = [scale := Scale(), own := Own()]
    def traces(learn):
        return dict(attrs=set(vars(learn)), scale=(scale.n, list(scale.log)), own=own.calls,
                    rows=list(learn.recorder.values), losses=len(learn.recorder.losses),
                    hypers=[dict(h) for h in learn.opt.hypers], training=learn.training,
                    modes=[m.training for m in learn.model.modules()], cbs=set(map(str, learn.cbs)),
                    draw=torch.get_rng_state().tolist())
    learn = normed(cbs)
    if not inside: fit(learn, 1)
    else:
        class Refresh(Callback):
            order = 40
            def before_validate(self):
                before = traces(self.learn)
                refresh_batchnorm(self.learn, inner=True)
                assert traces(self.learn)==before
        fit(learn, 2, method='fit_one_cycle', cbs=Refresh())
        assert len(learn.recorder.values)==2 and len(learn.recorder.losses)==16
    before = traces(learn)
    if not inside: refresh_batchnorm(learn)
    assert traces(learn)==before
    torch.testing.assert_close(learn.model[0].running_mean, ((seen(learn)-3)*10).mean(0), rtol=.01, atol=.01)

def test_a_refresh_sees_what_mixup_mixes():
    learn = fit(digits_learner(n=200), 1)
    before = torch.get_rng_state()
    with learn.added_cbs(MixUp(1.)):
        loss = learn.loss_func
        refresh_batchnorm(learn)
        assert learn.loss_func is loss
        mixed = statistics(learn)
    assert torch.equal(torch.get_rng_state(), before)
    refresh_batchnorm(learn)
    less = mixed['1.running_var']<statistics(learn)['1.running_var']      # mixed images vary less
    assert less.float().mean()>.8

class BFloat16(MixedPrecision):
    "fastai's, on the CPU too"
    def before_fit(self):
        device = next(self.model.parameters()).device.type
        self.autocast,self.scales = torch.autocast(device, dtype=torch.bfloat16),[]
        self.learn.scaler = torch.amp.GradScaler(device, enabled=False)

@pytest.mark.parametrize('buffers', ['refresh','average'])
def test_a_refresh_has_the_precision_of_the_training(buffers):
    dtypes = []
    learn = normed([BFloat16(), SWA(0., buffers=buffers)])
    learn.model[1].register_forward_hook(lambda m,i,o: dtypes.append(o.dtype))
    fit(learn, 2)
    refresh_batchnorm(learn)
    assert set(dtypes)=={torch.bfloat16} and not torch.is_autocast_enabled(learn.model[1].weight.device.type)

def test_frozen_statistics_stay():
    "In eval mode while the model is trained, with a momentum of 0, or not tracked at all"
    class Freeze(Callback):
        def before_train(self): self.model[0].eval()
    for prepare,cbs in ((lambda m: None, [Freeze()]), (lambda m: setattr(m[0], 'momentum', 0.), []),
                        (lambda m: m[0].requires_grad_(False), [BnFreeze()])):
        learn = normed(cbs)
        prepare(learn.model)
        before = statistics(learn)
        with learn.added_cbs(SWA(0.)): fit(learn, 1)
        assert_equal(statistics(learn), {k: v for k,v in before.items() if k[0]=='0'})
        assert not torch.equal(learn.model[2].running_mean, before['2.running_mean'])
    refresh_batchnorm(numbers(nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5,1))))

def test_no_pass_without_batch_norm(monkeypatch):
    learn = fit(numbers(nn.Linear(5,1), [swa := SWA(0.)]), 1)
    monkeypatch.setattr(type(learn.dls.train), '__iter__', lambda self: 1/0)
    refresh_batchnorm(learn)
    with swa.using('swa'): pass

def test_one_refresh_for_each_average(monkeypatch):
    "Not one more at the end of the fit, or for each `use`"
    import fastai_callbacks_ext.averaging as averaging
    n,real = [],refresh_batchnorm
    monkeypatch.setattr(averaging, 'refresh_batchnorm', lambda *args,
                        **kwargs: (n.append(1), real(*args, **kwargs)))
    learn = fit(normed([swa := SWA(0.)]), 3)
    want = state(learn)
    swa.use('raw'); swa.use('swa')
    assert_equal(state(learn), want); assert len(n)==3

def test_a_batch_of_a_refresh_waits_for_nothing(monkeypatch):
    waits = []
    def counts(f): return lambda self, *args: (waits.append(1), f(self, *args))[1]
    def n_waits(learn):
        waits.clear()
        refresh_batchnorm(learn)
        return len(waits)
    learns = [fit(normed(n=n), 1) for n in (32,320)]
    for o in ('item','__float__','__bool__','__int__'):
        monkeypatch.setattr(torch.Tensor, o, counts(getattr(torch.Tensor, o)), raising=False)
    few,many = map(n_waits, learns)
    assert few==many

def test_freezing():
    def splitter(m): return [list(m[:4].parameters()), list(m[4:].parameters())]
    learn = digits_learner(n=300, bs=32, splitter=splitter)
    cb,first = EMA(0.8),learn.model[0].weight.detach().clone()
    learn.freeze(); fit(learn, 1, cbs=cb)
    assert torch.equal(learn.model[0].weight, first)
    learn.unfreeze(); fit(learn, 1, cbs=cb)
    assert not torch.equal(learn.model[0].weight, first)
    fit(learn, 1, method='fine_tune', cbs=cb)

# The training is left alone

@each
@pytest.mark.parametrize('validate,final', [('avg','avg'), ('both','raw'), ('raw','avg')])
def test_training_is_the_same(make, validate, final):
    "Bit by bit, with any kind of validation"
    cb = make()
    name = lambda o: cb.average_name if o=='avg' else o
    cb = make(validate=name(validate), final=name(final))
    a,b = run(epochs=3),run(cb, epochs=3)
    for s,t in zip(a.steps.steps, b.steps.steps, strict=True): assert_equal(s, t)
    if final=='raw': assert_equal(state(b), state(a))
    else: assert any(not torch.equal(v, state(b)[k]) for k,v in state(a).items())

@each
def test_random_numbers_are_the_same(make):
    def drawn(*cbs):
        run(*cbs)
        return torch.rand(1).item(),np.random.rand()
    assert drawn()==drawn(make(buffers='refresh'))

class Elsewhere(Callback):
    "Validates at another time than fastai does; `caught`: with an error, after which the training goes on"
    def __init__(self, event, caught=False, order=0):
        self.caught,self.order,self.seen,self.inside = caught,order,[],False
        self.mid_epoch = event in ('after_batch','after_step')
        setattr(self, event, self.validate)
    def after_pred(self):
        if self.caught and self.inside: raise MemoryError('caught')
    def validate(self):
        learn = self.learn
        if self.inside or self.mid_epoch and (not learn.training or learn.train_iter%3): return
        self.seen.append(learn.train_iter)
        kept,log = {k: getattr(learn, k, None) for k in ('iter','dl','n_iter','xb','yb')},learn.recorder.log
        self.inside,training = True,learn.training
        try: learn._do_epoch_validate()
        except MemoryError: pass
        self.inside = False
        for k,v in kept.items(): setattr(learn, k, v)
        learn.recorder.log = log
        learn.model.train(training)
        learn.training = training

times = [('after_batch',False), ('after_batch',True), ('after_step',False), ('before_train',False),
         ('after_epoch',False)]
late = [lambda **kw: SWA(0., **kw), lambda **kw: SWA(0., 1, **kw), lambda **kw: LAWA(3, 1, **kw)]
@pytest.mark.parametrize('make,event,caught',
                         some([(averagers['EMA'], *o) for o in times] + [(o, *times[1]) for o in late], 5))
def test_a_validation_in_mid_epoch_leaves_the_training_alone(make, event, caught):
    "Bit by bit, and the average is of trained weights"
    def go(*cbs): return run(*cbs, Elsewhere(event, caught, 200 if event=='after_epoch' else 0))
    a,b,c = go(),go(cb := make(final='raw')),go(never := make(final='raw', validate='raw'))
    assert len(b.elsewhere.seen)>=2
    for s,t in zip(a.steps.steps, b.steps.steps, strict=True): assert_equal(s, t)
    assert_equal(state(b), state(a))
    for kept,want in zip(cb._kept, never._kept, strict=True): assert_equal(kept, want)

class PredictsToo(Callback):
    def __init__(self, event, order):
        self.order = order
        setattr(self, event, lambda: self.learn.get_preds(inner=True))

def test_predictions_of_ones_own_leave_the_average_for_the_others():
    "After an epoch, and after the fit"
    class See(Callback):
        order = 62
        def after_epoch(self): self.seen = state(self.learn)
    for event,order in (('after_epoch',55), ('after_fit',60)):
        learn = run(ema := EMA(0.8), See(), PredictsToo(event, order))
        with ema.using('ema'):
            assert_equal(learn.see.seen, state(learn))
            want = state(learn)
        assert_equal(state(learn), want)

class Cache(nn.Module):
    """Keeps what is as long as its longest input; training and validation have others. `how` it is changed:
    made anew, taken away, or expanded, which makes it read-only"""
    def __init__(self, how):
        super().__init__()
        self.how,self.out,self.bn = how,nn.Linear(1,1),nn.BatchNorm1d(1)
        for persistent in (False,True): self.register_buffer(f'cos{persistent:d}', torch.zeros(1), persistent)
    def forward(self, x):
        x = x[:,:3] if self.training else x
        n = x.shape[1]
        for k in ('cos0','cos1'):
            cos = getattr(self, k)
            if cos is None or n>len(cos) or self.how=='expand': cos = torch.arange(n, device=x.device).cos()
            if self.how=='expand': cos = cos[:1].expand(n)
            x = x*cos[:n]
            setattr(self, k, None if self.how=='drop' and not self.training else cos)
        return self.out(self.bn(x.mean(1, keepdim=True)))

@pytest.mark.parametrize('how', ['grow','drop','expand'])
@pytest.mark.parametrize('make', [*everywhere.values(), SWA, lambda **kw: EMA(buffers='refresh', **kw)],
                         ids=[*everywhere, 'SWA refreshed', 'EMA refreshed'])
def test_a_buffer_that_changes_in_validation(make, how):
    "It stays as the model has made it, and no fit ends because of it"
    model,cb = Cache(how),make(final='raw')
    a,b = [fit(numbers(deepcopy(model), cbs), 3) for cbs in ([], [cb])]
    for s,t in zip(a.steps.steps, b.steps.steps, strict=True): assert_equal(s, t)
    assert_equal(state(b), state(a))
    assert len(b.recorder.values)==3 and cb.raw is None
    cb.use(cb.average_name); cb.use('raw')
    assert_equal(state(b), state(a))

@pytest.mark.parametrize('change', ['expanded','resized'])
def test_a_refresh_beside_a_buffer_that_cannot_be_copied_back(change):
    class Ones(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn,self.out = nn.BatchNorm1d(5),nn.Linear(5,1)
            self.register_buffer('ones', torch.ones(1).expand(5) if change=='expanded' else torch.ones(5))
        def forward(self, x):
            if change=='resized': self.ones.resize_(7).fill_(1.)
            return self.out(self.bn(x)*self.ones[:5])
    learn = numbers(Ones())
    ones,before = learn.model.ones,learn.model.bn.running_mean.clone()
    refresh_batchnorm(learn)
    assert learn.model.ones is ones and ones.tolist()==[1.]*5
    assert not torch.equal(learn.model.bn.running_mean, before)

def deep(): return nn.Sequential(nn.Linear(5,8), nn.Tanh(), nn.Linear(8,1))

class LosesWeights(Callback):
    "A step makes some weights infinite"
    order = 40
    def __init__(self, at): self.at = at
    def after_step(self):
        if self.train_iter==self.at: self.model[0].weight.data[:2] = torch.inf

@pytest.mark.parametrize('validate', ['avg','raw'])
@pytest.mark.parametrize('make', everywhere.values(), ids=everywhere)
def test_weights_that_were_lost_are_in_no_average_for_good(make, validate, capsys):
    "Once a guard has put them back, it is an average again; what is not one is told"
    name = make().average_name
    cb = make(validate=name if validate=='avg' else validate)
    learn = fit(numbers(deep(), [SkipNonFinite(snapshot=2), LosesWeights(4), cb]), 4)
    assert 'weights and optimizer are those before' in capsys.readouterr().out
    last,got = learn.steps.steps[-1],state(learn)
    assert torch.isfinite(got['0.weight']).all()
    assert not torch.isclose(got['0.weight'], last['0.weight'], rtol=1e-6).any()

@pytest.mark.parametrize('make', everywhere.values(), ids=everywhere)
def test_an_average_that_is_the_trained_weights_says_so(make, capsys):
    learn = fit(numbers(deep(), [cb := make(), SkipNonFinite(snapshot=2), LosesWeights(5)]), 1)
    out,got = capsys.readouterr().out,state(learn)
    if cb.average_name!='lawa':
        assert torch.equal(got['0.weight'][:2], learn.steps.steps[-1]['0.weight'][:2])
        assert out.count(f'{cb.name}: replaced NaN or infinite numbers in its average')==1
        assert 'in epoch 0: 0.weight\n' in out
    assert not torch.equal(got['0.weight'][2:], learn.steps.steps[-1]['0.weight'][2:])

def test_a_skipped_step_is_no_update():
    class Skip(Callback):
        order = 20
        def before_step(self):
            if self.iter%2: raise CancelStepException
    learn = run(EMA(0.8), Skip())
    steps = learn.steps.steps
    assert len(steps)==8 and learn.ema._n==8
    assert_close({k: v for k,v in state(learn).items() if 'running' not in k and 'num' not in k},
                 {k: v for k,v in mean(steps, [0.8**(7-i) for i in range(8)]).items() if 'running' not in k
                  and 'num' not in k})
    learn = run(EMA(0.8), SkipNonFinite(), PoisonBatch(2))
    assert learn.ema._n==len(learn.steps.steps)==13
    assert all(v.isfinite().all() for v in state(learn).values())
    learn = run(EMA(0.8), GradientAccumulation(64))
    assert learn.ema._n==len(learn.steps.steps)==8

# Validation

def values(learn, epoch=-1): return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[epoch]))

@each
def test_columns(make):
    "The usual columns are of the average, those with 'raw_' of the trained weights"
    learn = run(cb := make(validate='both'), epochs=3)
    assert list(values(learn))==['train_loss','valid_loss','accuracy','raw_valid_loss','raw_accuracy']
    got = values(learn)
    with quiet(learn):
        assert learn.validate()==[got['valid_loss'], got['accuracy']]
        with cb.using('raw'): assert learn.validate()==[got['raw_valid_loss'], got['raw_accuracy']]
    assert got['raw_valid_loss']==values(run(epochs=3))['valid_loss']

def test_columns_of_several():
    learn = run(cb := EMA([0.5, 0.9], validate='both'))
    got = values(learn)
    assert list(got)==['train_loss','valid_loss','accuracy','raw_valid_loss','raw_accuracy',
                       'ema2_valid_loss','ema2_accuracy']
    with quiet(learn), cb.using('ema', 1):
        assert learn.validate()==[got['ema2_valid_loss'], got['ema2_accuracy']]
    assert values(run(EMA(0.9)))['valid_loss']==got['ema2_valid_loss']
    assert values(run(EMA(0.5)))['valid_loss']==got['valid_loss']

def test_columns_with_the_bar_training_metrics_and_time(capsys):
    learn = digits_learner(EMA(0.8, validate='both'), n=300)
    learn.recorder.add_time = learn.recorder.train_metrics = True
    learn.fit(2)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','train_accuracy','valid_loss',
                                               'valid_accuracy','raw_valid_loss','raw_valid_accuracy','time']
    assert all(len(o)==6 for o in learn.recorder.values)

class CancelValidation(Callback):
    def after_pred(self):
        if not self.training and self.epoch==1: raise CancelValidException

def test_columns_of_a_validation_that_was_cancelled():
    "No number is ever in the column of another one"
    learn = run(EMA(0.8, validate='both'), CancelValidation())
    assert [len(o) for o in learn.recorder.values]==[5,5]
    assert list(values(learn).values())[1:]==[None]*4

def test_early_stopping_and_saving_see_the_average():
    for saver in (SaveModelCallback(), SaveTopK(), EarlyStopping(patience=9, restore_best=True)):
        learn = run(cb := EMA(0.8, validate='both'), saver, epochs=4)
        rows = [values(learn, i)['valid_loss'] for i in range(4)]
        with quiet(learn): assert learn.validate()[0]==pytest.approx(min(rows), rel=1e-5), type(saver)
    learn = run(EMA(0.8), EarlyStopping(patience=1, min_delta=10.), epochs=4)
    assert len(learn.recorder.values)==2
    want = values(run(EMA(0.8)))['valid_loss']
    with quiet(learn): assert learn.validate()[0]==pytest.approx(want, rel=1e-5)
    learn = run(EMA(0.8, final='raw'), EarlyStoppingCallback(min_delta=10.), epochs=4)
    assert_equal(state(learn), learn.steps.steps[-1])

# Endings

class Leave(Callback):
    def __init__(self, event, exc, order=70):
        self.exc,self.order = exc,order
        setattr(self, event, self.leave)
    def leave(self):
        if self.learn.epoch==1 and not (self.learn.training and 'batch' in str(self.exc)): raise self.exc

@each
@pytest.mark.parametrize('event,order', [
    ('before_validate',-20), ('before_validate',300), ('after_validate',70), ('after_epoch',70),
    ('after_epoch',300), ('after_train',70)])
def test_an_interrupt_leaves_the_trained_weights(make, event, order):
    learn = learner(cb := make(validate='both'), Leave(event, KeyboardInterrupt(), order))
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(3)
    assert_equal(state(learn), learn.steps.steps[-1])
    cb.use(cb.average_name); cb.use('raw')
    assert_equal(state(learn), learn.steps.steps[-1])

@each
@pytest.mark.parametrize('exc', [CancelFitException, CancelEpochException, CancelValidException])
def test_cancelled_validation(make, exc):
    class Cancel(Callback):
        def after_pred(self):
            if not self.training: raise exc
    learn = run(cb := make(), Cancel())
    cb.use('raw')
    assert_equal(state(learn), learn.steps.steps[-1])

@each
def test_an_error_in_the_swap(make, monkeypatch):
    "Half of the weights are swapped, and the trained ones come back"
    learn = learner(cb := make())
    def broken(tensors, others):
        for t,o in list(zip(tensors, others))[:3]: t.copy_(o)
        monkeypatch.undo()
        raise KeyboardInterrupt
    class Break(Callback):
        order = 51
        def before_validate(self): monkeypatch.setattr(torch, '_foreach_copy_', broken)
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Break())
    assert_equal(state(learn), learn.steps.steps[-1])

@each
def test_use(make, tmp_path):
    learn = run(cb := make())
    average = state(learn)
    cb.use('raw'); assert_equal(state(learn), learn.steps.steps[-1])
    cb.use('raw'); cb.use(cb.average_name); assert_equal(state(learn), average)
    with pytest.raises(OSError), cb.using('raw'):
        assert_equal(state(learn), learn.steps.steps[-1])
        raise OSError
    assert_equal(state(learn), average)
    cb.use('raw')
    with cb.using(cb.average_name): assert_equal(state(learn), average)
    assert_equal(state(learn), learn.steps.steps[-1])
    with pytest.raises(ValueError, match='which='): cb.use('best')
    with pytest.raises(RuntimeError, match='no average'): make().use('raw')
    class Use(Callback):
        def after_batch(self): cb.use('raw')
    with quiet(learn), pytest.raises(RuntimeError, match='a fit is running'): learn.fit(1, cbs=Use())

@each
def test_passed_to_a_fit(make):
    learn = learner()
    fit(learn, 2, cbs=(cb := make()))
    average = state(learn)
    cb.use('raw'); assert_equal(state(learn), learn.steps.steps[-1])
    cb.use(cb.average_name); assert_equal(state(learn), average)

@each
def test_export(make, tmp_path):
    "With the weights in use, and no others, inside a fit too"
    class InTheFit(Callback):
        order = 65
        def after_epoch(self):
            torch.save(self.model.state_dict(), tmp_path/'in_use.pth')
            self.learn.export(tmp_path/'inside.pkl')
    learn = run(cb := make()); learn.path = tmp_path
    learn.export('after.pkl')
    loaded = load_learner(tmp_path/'after.pkl')
    assert_equal(state(loaded), state(learn))
    other = [o for o in loaded.cbs if type(o) is type(cb)][0]
    assert other._kept==[] and other.raw is None
    with pytest.raises(RuntimeError, match='not in an export'): other.use('raw')
    cb.use('raw'); cb.use(cb.average_name)
    learn = learner(make()); learn.path = tmp_path
    with quiet(learn): learn.fit(1, cbs=InTheFit())
    assert_equal(state(load_learner(tmp_path/'inside.pkl')), torch.load(tmp_path/'in_use.pth'))

@pytest.mark.parametrize('make,stop', some(zip([*averagers.values(), EMA, LAWA], [3,13,10,13,10]), 3))
def test_resume(make, stop, tmp_path):
    "To the same bits: model, average, and the row of the epoch"
    class Kill(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==stop: raise KeyboardInterrupt
    def go(*cbs, path):
        learn = learner(make(validate='both'), Checkpoint(path, steps=1), *cbs)
        with quiet(learn): learn.fit_one_cycle(2)
        return learn
    want = go(path=tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): go(Kill(), path=tmp_path/'b')
    got = go(path=tmp_path/'b')
    assert_equal(state(got), state(want)); assert values(got)==values(want)
    Checkpoint._finished.clear()        # as in a new process
    again = go(path=tmp_path/'b')       # of the finished fit
    assert_equal(state(again), state(want))
    cb = [o for o in again.cbs if hasattr(o, 'average_name')][0]
    cb.use('raw'); assert_equal(state(again), want.steps.steps[-1])

@each
def test_fast_loop(make):
    a,b = run(make(validate='both')),run(make(validate='both'), FastLoop())
    assert_equal(state(a), state(b)); assert list(values(a))==list(values(b))

def test_several_averagers():
    learn = run(EMA(0.8, validate='raw', final='raw'), SWA(0., validate='raw', final='raw'),
                LAWA(2, 7, validate='raw', final='raw'))
    assert_equal(state(learn), learn.steps.steps[-1])
    for cb in (learn.ema, learn.swa, learn.lawa):
        with cb.using(cb.average_name): average = state(learn)
        assert any(not torch.equal(v, learn.steps.steps[-1][k]) for k,v in average.items())
        assert_equal(state(learn), learn.steps.steps[-1])

@pytest.mark.parametrize('validate', ['avg','raw'])
def test_averagers_that_both_lend(validate):
    "The last one is in use; no average is ever taken for the trained weights"
    cbs = EMA(0.8),LAWA(2, 7, validate='lawa' if validate=='avg' else 'raw')
    a,b = run(epochs=3),run(*cbs, epochs=3)
    for s,t in zip(a.steps.steps, b.steps.steps, strict=True): assert_equal(s, t)
    alone = [state(run(o, epochs=3)) for o in (EMA(0.8), LAWA(2, 7))]
    assert_equal(state(b), alone[1])
    for cb,want in zip(cbs, alone): cb.use(cb.average_name); assert_equal(state(b), want)
    cbs[0].use('raw'); assert_equal(state(b), a.steps.steps[-1])

def test_columns_of_two_that_lend():
    with pytest.raises(ValueError, match="validate='both'.*validate='raw'"):
        run(EMA(0.8, validate='both'), LAWA(2))
    assert 'raw_valid_loss' in values(run(EMA(0.8, validate='both'), LAWA(2, validate='raw')))

def test_short_fits(capsys):
    "An average that never began is none, and says so"
    learn = run(cb := EMA(0.9, start=1000))
    assert_equal(state(learn), learn.steps.steps[-1])
    with pytest.raises(RuntimeError, match='no average'): cb.use('ema')
    out = capsys.readouterr().out
    assert 'ema: will average no weights' in out and 'start=1000' in out and 'this fit has 14 batches' in out
    assert 'ema: has averaged no weights' in out and 'steps taken: 14' in out
    assert_equal(state(run(SWA(1.))), state(run()))
    assert 'swa: will average no weights' in capsys.readouterr().out

@pytest.mark.parametrize('make,said', [
    (lambda: SWA(),
     'one set of weights only in epoch 0: start=0.75, every=None, and this fit has 14'),
    (lambda: SWA(0.5, 6), 'one set of weights only'), (lambda: SWA(0.99, 5), 'will average no weights'),
    (lambda: LAWA(2, 15), 'every=15'),
    (lambda: EMA(0.999), 'decay=0.999 remembers 1000 steps, and this fit has 14 batches'),
    (lambda: EMA(every=20), 'every=20')])
def test_what_an_average_says_when_a_fit_begins(make, said, capsys):
    run(make())
    assert said in capsys.readouterr().out

def test_the_defaults_say_nothing_when_a_fit_begins(capsys):
    run(EMA(), SWA(validate='raw', final='raw'), LAWA(validate='raw', final='raw'), epochs=8)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines)==1 and lines[0].startswith('ema: left the averaged weights in the model')
    assert lines[0].endswith("use('raw') puts the trained ones back")

# Taken off, or followed by others

events = ['after_epoch','before_validate','after_train','before_batch']
@pytest.mark.parametrize('make,event', [(averagers['EMA'], e) for e in events] +
                         [(averagers[o], 'after_epoch') for o in ('SWA','LAWA')])
def test_taken_off_in_mid_fit(make, event):
    "Training goes on with the trained weights; trackers still find their column"
    class Off(Callback):
        order = 55
        def __init__(self): setattr(self, event, self.off)
        def off(self):
            if self.epoch==1 and cb.learn is self.learn: self.learn.remove_cb(cb)
    cb = make(validate='both')
    learn = run(cb, Off(), SaveModelCallback('accuracy'), epochs=3)
    want = run(epochs=3)
    for s,t in zip(learn.steps.steps, want.steps.steps, strict=True): assert_equal(s, t)
    assert not any('after_all' in cb.name for cb in learn.cbs) and 'remove_cbs' not in vars(learn)
    assert len({len(o) for o in learn.recorder.values})==1
    assert values(learn)['accuracy']==values(want)['accuracy']

@pytest.mark.parametrize('final', ['ema','raw'])
def test_what_is_loaded_at_the_end_is_left(final, capsys):
    worst = SaveModelCallback('accuracy', np.less, fname='best')
    learn = run(cb := EMA(0.8, final=final), worst, epochs=3)
    left = state(learn)
    device = next(learn.model.parameters()).device
    assert_equal(left, torch.load(learn.path/learn.model_dir/'best.pth', map_location=device))
    assert 'had its weights replaced' in capsys.readouterr().out
    want = mean(learn.steps.steps, [0.8**i for i in range(21)][::-1])
    with cb.using('ema'): assert_close(state(learn), want)
    assert_equal(state(learn), left)
    counts = {k: v for k,v in left.items() if 'num_' in k}      # they are not averaged
    with cb.using('raw'):
        assert_equal(state(learn), learn.steps.steps[-1] | counts if final=='ema' else left)
    assert_equal(state(learn), left)

@pytest.mark.parametrize('final', ['ema','raw'])
def test_the_same_weights_loaded_again_are_no_others(final, capsys):
    class Load(Callback):
        order,run_valid = 70,False
        def after_fit(self): self.model.load_state_dict(state(self.learn))
    run(EMA(.8, final=final), Load(), epochs=1)
    assert 'had its weights replaced' not in capsys.readouterr().out

def test_another_model_is_not_given_weights():
    learn = run(cb := EMA(0.8))
    learn.model = nn.Sequential(*list(learn.model)[:-1])
    before = state(learn)
    with pytest.raises(RuntimeError, match="changed since the fit: it has no '8"): cb.use('raw')
    learn.model.append(nn.Linear(128, 9))
    with pytest.raises(RuntimeError, match="it has no '8.weight' of 10x128"): cb.use('raw')
    learn.model = learn.model[:-1]
    assert_equal(state(learn), before)
    with pytest.raises(ValueError, match='i=1: expected a whole number from 0 to 0'): cb.use('ema', 1)

def test_a_copy_of_the_model_is_given_weights():
    learn = run(cb := EMA(0.8))
    average,learn.model = state(learn),deepcopy(learn.model)
    cb.use('raw'); assert_equal(state(learn), learn.steps.steps[-1])
    cb.use('ema'); assert_equal(state(learn), average)

# The learning rate of SWA

def test_learning_rates_of_groups_keep_their_proportion_and_are_returned():
    class Rates(Callback):
        order,run_valid = 53,False
        def before_fit(self): self.lrs,self.after = [],[]
        def before_step(self): self.lrs.append([h['lr'] for h in self.opt.hypers])
        def after_batch(self): self.after.append([h['lr'] for h in self.opt.hypers])
    split = lambda m: [list(m[:4].parameters()), list(m[4:].parameters())]
    learn = digits_learner([SWA(0.5, lr=0.1), rates := Rates()], bs=32, n=300, splitter=split)
    fit(learn, 4, lr=slice(1e-3, 1e-2))
    half = len(rates.lrs)//2
    assert rates.lrs[:half]==[[1e-3,1e-2]]*half
    assert np.allclose(rates.lrs[half:], [1e-2,1e-1])
    assert rates.after==[[1e-3,1e-2]]*2*half and learn.recorder.lrs[half:]==[0.1]*half

@pytest.mark.parametrize('event', ['after_step','after_batch'])
def test_learning_rates_are_returned_after_a_step_that_was_left(event):
    class Leave(Callback):
        order,run_valid = 45,False
        def leave(self):
            if self.iter==1: raise CancelEpochException
    setattr(Leave, event, Leave.leave)
    learn = numbers(nn.Linear(5,1), [SWA(0., lr=.5), Leave()])
    fit(learn, 3, lr=1e-2)
    assert [h['lr'] for h in learn.opt.hypers]==[1e-2]

# Soup

def saved(learn, n=4, with_opt=False):
    "Models that were fine-tuned from one"
    fit(learn, 2); learn.save('start')
    for i in range(n):
        learn.load('start', with_opt=False); learn.opt = None; set_seed(i)
        with quiet(learn): (learn.fit_one_cycle if with_opt else learn.fit)(1, [1e-3, 1e-2, 5e-3, 0.5][i%4])
        learn.save(f'm{i}', with_opt=with_opt)
    return [f'm{i}' for i in range(n)]

def test_greedy_soup():
    "No worse than the best; a bad model is left out; the first is the best"
    learn = digits_learner(n=400); learn.path = learn.path.cwd()
    files,losses = saved(learn),{}
    for f in files:
        learn.load(f)
        with quiet(learn): losses[f] = learn.validate()[0]
    kept = soup(learn, files)
    with quiet(learn): assert learn.validate()[0]<=min(losses.values())
    assert kept[0]==min(losses, key=losses.get) and 'm3' not in kept
    best = soup(learn, [max(losses, key=losses.get)])
    with quiet(learn): assert learn.validate()[0]==pytest.approx(max(losses.values()))
    by_accuracy = soup(learn, files, monitor='accuracy')
    assert by_accuracy

def test_uniform_soup():
    "The mean, and statistics of the training set under it"
    learn = digits_learner(n=400); learn.path = learn.path.cwd()
    files = saved(learn, 3, with_opt=True)
    states = [torch.load(learn.path/learn.model_dir/f'{f}.pth', weights_only=False)['model'] for f in files]
    assert sorted(soup(learn, files, greedy=False))==files
    got,want = state(learn),mean(states, [1,1,1])
    assert_close({k: v for k,v in got.items() if 'running' not in k and 'num' not in k},
                 {k: v for k,v in want.items() if 'running' not in k and 'num' not in k})
    assert not torch.allclose(got['1.running_mean'].double(), want['1.running_mean'])

def test_soup_leaves_the_rest_alone():
    "Files, the recorder's rows, and the weights after an error"
    learn = digits_learner(SaveModelCallback(fname='best'), n=400); learn.path = learn.path.cwd()
    files = saved(learn, 2)
    bits,rows = (learn.path/learn.model_dir/'best.pth').read_bytes(),list(learn.recorder.values)
    soup(learn, files)
    assert (learn.path/learn.model_dir/'best.pth').read_bytes()==bits and list(learn.recorder.values)==rows
    before = state(learn)
    with pytest.raises(DamagedFile, match='nothing.pth: missing'): soup(learn, [*files, 'nothing'])
    assert_equal(state(learn), before)
    for kwargs,match in ((dict(files=[]),'files='),
                         (dict(files=files, monitor='f1'),'monitor=.*valid_loss, accuracy')):
        with pytest.raises(ValueError, match=match): soup(learn, **kwargs)

def compiled(learn):
    learn.model = torch.compile(learn.model, backend='eager')
    return learn

@pytest.mark.parametrize('there,here', [(compiled, lambda o: o), (lambda o: o, compiled),
                                        (compiled, compiled)])
def test_soup_of_compiled_models(there, here):
    learn = there(digits_learner(n=200)); learn.path = learn.path.cwd()
    for i in range(2): fit(learn, 1); learn.save(f'm{i}')
    other = here(digits_learner(n=200)); other.path = learn.path
    assert soup(other, ['m0','m1'], greedy=False)
    want = mean([torch.load(learn.path/learn.model_dir/f'm{i}.pth', weights_only=False)['model']
                 for i in range(2)], [1,1])
    plain = lambda state: {k.removeprefix('_orig_mod.'): v.cpu() for k,v in state.items()
                           if 'running' not in k and 'num' not in k}
    assert_close(plain(state(other)), plain(want))

@pytest.mark.parametrize('greedy', [True,False])
def test_a_diverged_model_is_in_no_soup(greedy, capsys):
    learn = fit(digits_learner(n=200), 1); learn.path = learn.path.cwd()
    learn.save('good')
    with torch.no_grad(): learn.model[-1].weight.fill_(torch.nan)
    learn.save('diverged')
    assert list(soup(learn, ['diverged','good'], greedy))==['good']
    assert 'soup: left out diverged: valid_loss is not a finite number' in capsys.readouterr().out
    with pytest.raises(ValueError, match='valid_loss is not a finite number for any'):
        soup(learn, ['diverged'])
    assert state(learn)['8.weight'].isfinite().all()

class Odd(Metric):
    "A metric that nothing is known of; it has no value at first"
    name,seen = 'oddness',[]
    def reset(self): self.seen.append(1)
    def accumulate(self, learn): pass
    value = property(lambda self: None if len(self.seen)==1 else float(len(self.seen)))

def test_which_way_is_better(capsys):
    learn = numbers(nn.Linear(5,1)); learn.path = learn.path.cwd()
    for f in ('bad','good'):
        learn.save(f)
        fit(learn, 3, lr=.1)
    assert list(soup(learn, ['bad','good'], monitor='_rmse'))[0]=='good'
    learn.metrics = [Odd()]
    assert list(soup(learn, ['bad','good'], monitor='oddness'))==['good']
    assert "soup: treats larger as better in 'oddness'; if not: maximize=False" in capsys.readouterr().out

@pytest.mark.parametrize('make,match', [
    (lambda: EMA(1.1),'decay='), (lambda: EMA([]),'decay='), (lambda: EMA(half_life=0),'half_life='),
    (lambda: EMA(validate='swa'),'validate='), (lambda: SWA(2.),'start='), (lambda: SWA(lr=-1.),'lr='),
    (lambda: LAWA(0),'k='), (lambda: LAWA(buffers='none'),'buffers='),
    (lambda: EMA(final='both'),'final='), (lambda: EMA(every=0),'every=')])
def test_wrong_arguments(make, match):
    with pytest.raises(ValueError, match=match): make()

# Models that are wrapped in parts, or have more than tensors
class Extra(nn.Linear):
    "Has a state that is no tensor"
    def get_extra_state(self): return {'seen': 3}
    def set_extra_state(self, state): self.extra = state

def test_soup_of_a_model_with_an_extra_state():
    learn = digits_learner(n=160, bs=32, model=nn.Sequential(nn.Flatten(), Extra(64, 10)), path='.')
    for name in ('a','b'):
        fit(learn)
        learn.save(name, with_opt=False)
    with quiet(learn): assert set(soup(learn, ['a','b'], greedy=False))=={'a','b'}
    assert learn.model[1].extra=={'seen': 3}

@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.'])
def test_load_weights_of_a_wrapped_model(prefix):
    "Into a model of which a part is compiled"
    net = lambda: nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 10)))
    there,here = net(),net()
    here[1] = torch.compile(here[1], backend='eager')
    load_weights(here, {f'{prefix}{k}': v for k,v in there.state_dict().items()})
    for p,q in zip(here.parameters(), there.parameters()): assert torch.equal(p, q)

def test_decay_or_half_life():
    with pytest.raises(ValueError, match='decay=0.9, half_life=10: expected one of the two'):
        EMA(.9, half_life=10)

def test_taken_off_without_a_recorder():
    class TakeOff(Callback):
        def after_batch(self):
            if self.train_iter==2: self.learn.remove_cb(EMA)
    learn = digits_learner([EMA(.9), TakeOff()], n=160, bs=32)
    learn.remove_cb(learn.recorder)
    with learn.no_bar(): learn.fit(2)
    assert all(p.isfinite().all() for p in learn.model.parameters())
