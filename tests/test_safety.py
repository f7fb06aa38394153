"Every poison, everywhere: what is left is finite, and after a skipped batch what a run without it leaves"
import contextlib, io, itertools, math, shutil
from collections import deque
from functools import cache, partial

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import (SGD, Callback, CancelBatchException, CancelFitException, DataLoaders, Datasets,
                           ItemGetter, Learner, MSELossFlat, OptimWrapper, default_device, set_seed)
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.callback.tracker import TerminateOnNaNCallback as FastaisTerminateOnNaN
from fastai.callback import training
from fastai.callback.all import MixUp, SaveModelCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.tabular.all import TabularDataLoaders, tabular_learner
from hypothesis import given, settings, strategies as st
from torch import nn
from fastai_callbacks_ext.base import step
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.core import ExtCallback
from fastai_callbacks_ext.base.files import load_state
from fastai_callbacks_ext.base.step import BatchUndo, tensors_in
from fastai_callbacks_ext.base.diagnosis import diagnose
from fastai_callbacks_ext.safety import spike_limit
from fastai_callbacks_ext.base.state import random_state
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_dls, digits_learner, text_learner
from cases import some
from common import fit, quiet

nan,inf = float('nan'),math.inf
device = default_device().type

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

class AnyMixedPrecision(MixedPrecision):
    "fastai's, on any device, with a type and a scale of its own"
    def __init__(self, dtype=torch.bfloat16, scale=0):
        super().__init__()
        self.dtype,self.scale = dtype,scale
    def before_fit(self):
        self.autocast,self.scales = torch.autocast(device, dtype=self.dtype),[]
        kwargs = dict(init_scale=self.scale or 1., growth_interval=10**6, enabled=self.scale>0)
        self.learn.scaler = torch.amp.GradScaler(device, **kwargs)

class Without(Callback):
    "Leaves batches out before anybody sees them"
    order = -100
    def __init__(self, *batches): self.batches = batches
    def before_batch(self):
        if not (self.training and self.train_iter in self.batches): return
        self.learn.yb = ()
        raise CancelBatchException

CPUMixedPrecision = AnyMixedPrecision     # as other tests call it

def regression(cbs=None, **kwargs):
    "A net with batch norm and dropout for 160 of the diabetes data, whose targets are real numbers"
    from sklearn.datasets import load_diabetes
    set_seed(42)
    x,y = load_diabetes(return_X_y=True)
    items = list(zip(torch.tensor(x).float()*20, torch.tensor((y-150)/80).float()[:,None]))[:200]
    dls = Datasets(items, [[ItemGetter(0)], [ItemGetter(1)]],
                   splits=(range(160), range(160,200))).dataloaders(bs=16, num_workers=0)
    model = nn.Sequential(nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
    learn = Learner(dls, model, MSELossFlat(), lr=1e-2, cbs=cbs, **kwargs)
    learn.recorder.add_time = False
    return learn

def digits(cbs=None, **kwargs): return digits_learner(cbs, n=400, bs=32, **kwargs)     # 10 batches an epoch

def state(learn):
    "Everything that a batch may have changed"
    params = [p for g in learn.opt.param_lists for p in g if p in learn.opt.state]
    opt = [o for p in params for o in learn.opt.state[p].values()]
    rec = [[o.item() for o in learn.recorder.losses], list(map(list, learn.recorder.values))]
    parts = *learn.model.state_dict().values(),*opt,torch.get_rng_state(),rec
    return [t.clone() if isinstance(t, torch.Tensor) else t for t in parts]

def same(a, b):
    assert len(a)==len(b)
    for x,y in zip(a, b): assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x==y

def finite(learn):
    "Weights, statistics, the optimizer's state, gradients"
    opt = [list(s.values()) for s in learn.opt.state.values()]
    grads = [p.grad for p in learn.model.parameters() if p.grad is not None]
    return all_finite([learn.model.state_dict(), opt, grads])

def trained(make, *cbs, epochs=2, method='fit', **kwargs):
    "A fitted learner, and what was printed"
    learn = make(list(cbs), **kwargs)
    with quiet(learn), contextlib.redirect_stdout(io.StringIO()) as out: getattr(learn, method)(epochs)
    return learn,out.getvalue()

def scaler(): return AnyMixedPrecision(torch.float32, 2.**14)
settings_ = {'plain': list, 'bf16': lambda: [AnyMixedPrecision()],
             'window': lambda: [training.GradientAccumulation(64)],
             'clip': lambda: [training.GradientClip(0.1)], 'own window': lambda: [GradientAccumulation(64)],
             'fast': lambda: [FastLoop()], 'mixup': lambda: [MixUp()], 'scaler': lambda: [scaler()],
             'scaler, window': lambda: [scaler(), training.GradientAccumulation(64)]}
wheres = 'input','target','weight','loss','grad'
fits = [(w,s) for w,s in itertools.product(wheres, settings_) if not (w=='target' and s=='mixup')]

@cache
def state_without(make, setting, batch):
    "What a run leaves whose `batch` nobody sees"
    return state(trained(make, Without(batch), *settings_[setting]())[0])

def batch_of(where, setting):
    "Each place meets all four, each setting two, so that two places share a run without"
    return (0,1,7,19)[([*settings_].index(setting) + 2*(wheres.index(where)%2))%4]

# With a scaler, a gradient is the scaler's matter, which drops the whole window
cases = [(w, s, batch_of(w, s)) for w,s in fits if not (w=='grad' and s=='scaler, window')]

@pytest.mark.parametrize('where,setting,batch', some(cases, 12), ids=str)
def test_skipped_is_as_if_it_had_never_been_there(where, setting, batch):
    "Bit for bit: weights, statistics, optimizer, random numbers, recorder"
    make = regression if where=='target' else digits
    got,_ = trained(make, SkipNonFinite(snapshot=1), PoisonBatch(batch, where), *settings_[setting]())
    assert finite(got)
    if where=='weight' and 'window' in setting and batch: return     # the copy is from before the window
    same(state(got), state_without(make, setting, batch))
    scaled = where=='grad' and setting=='scaler'
    found = [] if scaled else [batch]
    guard = got.skip_non_finite
    assert [r.iteration for r in guard.records]==found and guard.skipped==len(found)

@pytest.mark.parametrize('setting', ['plain','window'])
def test_data_that_never_held_the_batch(setting):
    "The same for a loop that reads the batch and does not train on it"
    got,_ = trained(digits, SkipNonFinite(), PoisonBatch(13, 'input'), *settings_[setting]())
    want = digits(settings_[setting]())
    real,n = type(want).one_batch,itertools.count()
    def one_batch(i, b):
        if not (want.training and next(n)==13): real(want, i, b)
    want.one_batch = one_batch
    fit(want, 2)
    same(state(got), state(want))

@pytest.mark.parametrize('make', [digits, text_learner])
def test_every_batch_of_an_epoch(make):
    "Whichever it is; the hidden state of a language model too"
    cbs = lambda: [ModelResetter(), RNNCallback()] if make is text_learner else []
    kwargs = dict(n=3000) if make is text_learner else {}
    n = len(make(cbs(), **kwargs).dls.train)
    for batch in range(n):
        got,_ = trained(make, *cbs(), SkipNonFinite(snapshot=None),
                        PoisonBatch(batch, 'grad' if make is text_learner else 'input'), epochs=1, **kwargs)
        want,_ = trained(make, *cbs(), Without(batch), epochs=1, **kwargs)
        same(state(got), state(want))

def test_a_language_model_whose_hidden_state_is_poisoned():
    "Without it put back, all batches that follow are lost"
    class PoisonHidden(Callback):
        order = -20
        def after_pred(self):
            if self.training and self.train_iter==3:
                for m in self.model.modules():
                    if isinstance(vars(m).get('hidden'), list): m.hidden = [(h*nan, c) for h,c in m.hidden]
                self.learn.pred = (self.pred[0]*nan, *self.pred[1:])
    cbs = [ModelResetter(), RNNCallback()]
    got,out = trained(text_learner, *cbs, SkipNonFinite(), PoisonHidden(), epochs=1)
    assert out.count('\n')==1 and finite(got) and len(got.recorder.losses)==len(got.dls.train)-1

looks = (0,1), (7,8), (19,1), (0,8), (19,8)
looked = [(w, s, *looks[(3*i+i//9)%5]) for i,(w,s) in enumerate(fits) if i%2==0]
@pytest.mark.parametrize('where,setting,batch,every', some(looked, 11), ids=str)
def test_terminate_leaves_what_is_finite(where, setting, batch, every):
    learn,out = trained(regression if where=='target' else digits, TerminateOnNaN(every),
                        PoisonBatch(batch, where), *settings_[setting]())
    scaled = where=='grad' and setting.startswith('scaler')      # the scaler skips it
    assert finite(learn) and out.count('stopped the fit')==(not scaled) and out.count('\n')==(not scaled), out
    assert not any(math.isnan(o) for o in learn.recorder.losses) or every>1
    fit(learn)
    assert finite(learn)

def test_terminate_is_where_the_batch_before_left_it():
    class Stop(Callback):
        order = -100
        def before_batch(self):
            if self.training and self.train_iter==13: raise CancelFitException
    for where in ('input','loss','grad'):
        got,_ = trained(digits, TerminateOnNaN(), PoisonBatch(13, where))
        want,_ = trained(digits, Stop())
        same(state(got), state(want))

@pytest.mark.parametrize('every', [2,3,8,100])
def test_later_looks_put_the_copy_back(every):
    "What is left is the state of a batch that was trained, at a copy"
    class Keep(Callback):
        order = 100
        def before_fit(self): self.states = [[t.clone() for t in self.model.state_dict().values()]]
        def after_batch(self):
            if self.training: self.states.append([t.clone() for t in self.model.state_dict().values()])
    learn,out = trained(digits, TerminateOnNaN(every, snapshot=4), PoisonBatch(13, 'input'), keep := Keep())
    left = list(learn.model.state_dict().values())
    at = [i for i,s in enumerate(keep.states) if all(map(torch.equal, s, left))]
    assert at and at[0]<=13 and 'batch 13 of the fit' in out and f'before batch {at[0]} ' in out
    assert at[0]>=13-4-every or at[0]==0

def test_a_later_look_does_not_wait():
    "Between the looks no number of the device is asked for"
    class Waits(torch.overrides.TorchFunctionMode):
        n = 0
        def __torch_function__(self, f, types, args=(), kwargs=None):
            waits = 'item','tolist','__bool__','__float__','__int__','cpu','numpy'
            self.n += getattr(f, '__name__', '') in waits
            return f(*args, **(kwargs or {}))
    def waits(cb):
        learn = digits_learner([FastLoop(), cb], n=800, bs=32)
        with quiet(learn), Waits() as mode: learn.fit(1)
        return mode.n
    none = waits(Callback())
    per_batch,later = [(waits(TerminateOnNaN(e, snapshot=None))-none) for e in (1,10)]
    assert (per_batch,later)==(20+1, 2+1)      # one at the start

@pytest.mark.parametrize('valid', [False,True])
def test_in_validation(valid):
    class PoisonValid(Callback):
        order = -20
        def after_pred(self):
            if not self.training: self.learn.pred = self.pred*nan
    plain = trained(digits)[0]
    for cb in (TerminateOnNaN(valid=valid), SkipNonFinite(), SpikeGuard()):
        learn,out = trained(digits, cb, PoisonValid())
        stops = valid and isinstance(cb, TerminateOnNaN)
        assert finite(learn) and out.count('stopped the fit')==stops
        if not stops: same(state(learn)[:-1], state(plain)[:-1])

def test_limits():
    "Five in a row are skipped, the sixth stops; counts are of one fit"
    for n,stops in ((5,False), (6,True)):
        learn,out = trained(digits, SkipNonFinite(), PoisonBatch(tuple(range(4,4+n))))
        assert out.count('skipped a batch')==5 and finite(learn)
        assert ('stopped the fit in epoch 0, batch 9: 6 batches in a row were not finite' in out)==stops
    alternate = PoisonBatch(tuple(range(0, 20, 2)))
    learn,out = trained(digits, SkipNonFinite(max_total=10), alternate)
    assert learn.skip_non_finite.skipped==10 and 'stopped' not in out
    learn,out = trained(digits, SkipNonFinite(max_total=9), alternate)
    assert 'stopped the fit in epoch 1, batch 8: 10 batches of this fit were not finite' in out
    with quiet(learn), contextlib.redirect_stdout(io.StringIO()): learn.fit(1)
    assert learn.skip_non_finite.skipped==5
    _,out = trained(digits, SkipNonFinite(max_consecutive=0), PoisonBatch(3))
    assert 'stopped the fit' in out

@pytest.mark.parametrize('cls', [TerminateOnNaN,SkipNonFinite])
def test_a_scaler_at_its_end(cls):
    "Gradients that are not finite at any scale are no overflow"
    learn,out = trained(digits, cls(), AnyMixedPrecision(torch.float32, 4.),
                        PoisonBatch(tuple(range(3,30)), 'grad'), epochs=3)
    assert finite(learn) and out.count('stopped the fit')==1
    stopped = learn.cbs.filter(lambda o: isinstance(o, cls))[0].records[-1].iteration
    assert stopped==(6 if cls is TerminateOnNaN else 11)      # 4, 2, 1; then a scale under 1

@pytest.mark.parametrize('every', [1,4])
def test_a_later_check_copies_nothing_before_each_batch(every, monkeypatch):
    "It undoes no batch, but a `GradScaler` at its end asks for that at once"
    copied,keep = [],step.BatchUndo.keep
    monkeypatch.setattr(step.BatchUndo, 'keep', lambda self: copied.append(keep(self)))
    learn,out = trained(digits, TerminateOnNaN(every=every))
    assert bool(copied)==(every==1) and not out
    learn,out = trained(digits, TerminateOnNaN(every=every), AnyMixedPrecision(torch.float32, 4.),
                        PoisonBatch(tuple(range(3,30)), 'grad'), epochs=3)
    assert finite(learn) and out.count('stopped the fit')==1 and 'the gradient of' in out
    assert learn.terminate_on_nan.records[-1].iteration==6 and copied

@pytest.mark.parametrize('every', [1,4])
def test_no_copy_of_model_and_optimizer_within_a_window(every):
    at,cb = [],TerminateOnNaN(every=every, snapshot=1)
    copy_state,cb._copy_state = cb._copy_state,lambda: at.append(cb.train_iter) or copy_state()
    fit(digits_learner([cb, training.GradientAccumulation(64)], n=200, bs=16))
    assert at==[0,4,8]

def test_a_copy_is_never_of_what_is_not_finite():
    class Damage(Callback):
        order = 2000
        def after_batch(self):
            if self.training and self.train_iter==6: next(self.model.parameters()).data.view(-1)[0] = nan
    for cb in (TerminateOnNaN(snapshot=1), SkipNonFinite(snapshot=1), SpikeGuard(snapshot=1)):
        learn,_ = trained(digits, cb, Damage())
        assert finite(learn)

def test_no_copy():
    learn,out = trained(digits, TerminateOnNaN(snapshot=None), PoisonBatch(5, 'weight'))
    assert 'there is no copy' in out and not finite(learn)

# Where it began
def test_diagnosis_names_the_first():
    expected = dict(input="the input has 2,048 of 2,048 values",
                    weight='the weight 8.weight has 1 of 1,280 values', loss='the loss is nan',
                    grad='the gradient of 8.bias has 10 of 10 values')
    for where,text in expected.items():
        _,out = trained(digits, TerminateOnNaN(), PoisonBatch(5, where))
        assert text in out, (where, out)
    _,out = trained(regression, TerminateOnNaN(), PoisonBatch(5, 'target'))
    assert 'the target has 16 of 16 values' in out
    class Divide(nn.Module):
        def forward(self, x): return x/(x-x)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sequential(nn.ReLU(), Divide()),
                          nn.Linear(32, 10))
    _,out = trained(digits, TerminateOnNaN(), model=model)
    assert 'the output of 2.1 (Divide) has 1,024 of 1,024 values' in out

@pytest.mark.parametrize('resumed', [False,True])
def test_items_are_those_of_the_data(resumed):
    "One image of the data set is broken: the line names it, also after a resume in mid-epoch"
    class Note(Callback):
        def before_batch(self):
            if self.training and self.train_iter==6: self.items = self.learn.terminate_on_nan._watch.items()
    item = trained(digits, note := Note(), TerminateOnNaN())[0] and note.items[3]
    def make(cbs):
        learn = digits(cbs)
        items = learn.dls.train_ds.items
        items[item] = (items[item][0]*nan, items[item][1])
        return learn
    cbs = [TerminateOnNaN()]
    if resumed:
        class Kill(Callback):
            def before_batch(self):
                if self.training and self.train_iter==4: raise KeyboardInterrupt
        learn = make([Checkpoint('run', steps=1, background=False), Kill()])
        with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(2)
        cbs.append(Checkpoint('run', steps=1, background=False))
    learn,out = trained(make, *cbs)
    assert 'the input has 64 of 2,048 values' in out and f'; item {item} of the training set' in out, out
    if resumed: assert 'resumed in epoch 0' in out

def test_items_of_tables_and_texts():
    import pandas as pd
    from sklearn.datasets import load_diabetes
    from fastai.tabular.all import Normalize
    set_seed(0)
    df = load_diabetes(as_frame=True).frame
    df.loc[42+77, 'bmi'] = nan
    dls = TabularDataLoaders.from_df(df, cont_names=list(df.columns[:10]), y_names='target',
                                     procs=[Normalize], valid_idx=list(range(42)), bs=40)
    learn = tabular_learner(dls, layers=[16], cbs=[TerminateOnNaN()])
    items = dls.train.dataset.items
    items.iloc[77, items.columns.get_loc('bmi')] = nan
    with quiet(learn), contextlib.redirect_stdout(io.StringIO()) as out: learn.fit(5)
    out = out.getvalue()
    assert 'of 400 values' in out and '; item 77 of the training set' in out, out
    learn,out = trained(text_learner, ModelResetter(), RNNCallback(), TerminateOnNaN(), PoisonBatch(2),
                        epochs=1)
    assert 'the loss is nan' in out and 'item' not in out

def test_diagnosis_changes_nothing():
    "The forward pass is the same as the first one, and is undone"
    seen = []
    class Look(Callback):
        order = 10
        def before_step(self):
            undo = self.learn.skip_non_finite._undo
            def all_there(): return [self.model.state_dict(), [p.grad for p in self.model.parameters()]]
            kept = [t.clone() for t in tensors_in(all_there())]
            rng = torch.get_rng_state()
            seen.append(diagnose(self.learn, undo))
            for a,b in zip(kept, tensors_in(all_there())): assert torch.equal(a, b)
            assert torch.equal(rng, torch.get_rng_state())
    trained(digits, SkipNonFinite(), Look(), epochs=1)
    assert seen==[None]*10

def test_report():
    learn,out = trained(digits, TerminateOnNaN(save='bad/report.pt'), PoisonBatch(5, 'loss'))
    found = load_state('bad/report.pt')
    assert found['why'] in out and len(found['items'])==32
    assert found['xb'][0].shape==(32,1,8,8) and found['yb'][0].shape==(32,)
    model = digits().model.cpu()
    model.load_state_dict(found['model']['weights'])
    assert model(torch.zeros(32,1,8,8)).isfinite().all()
    (io.open('file','w')).close()
    _,out = trained(digits, TerminateOnNaN(save='file/report.pt'), PoisonBatch(5))
    assert 'could not save the report' in out and 'stopped the fit' in out

# Spikes
class Spike(Callback):
    "Multiplies the loss of some batches"
    order = -20
    def __init__(self, *batches, by=1e4): self.batches,self.by = batches,by
    def after_loss(self):
        if not (self.training and self.train_iter in self.batches): return
        self.learn.loss_grad,self.learn.loss = self.loss_grad*self.by,self.loss*self.by

class SetRate(Callback):
    "Sets the learning rate once, as by hand"
    def __init__(self, batch): self.batch = batch
    def before_batch(self):
        if self.training and self.train_iter==self.batch: self.opt.set_hyper('lr', 1e-3)

watched = itertools.cycle(['loss','grad_norm',('loss','grad_norm')])
@pytest.mark.parametrize('watch,setting',
                         [(next(watched), s) for s in ('plain','bf16','clip','fast','mixup','scaler')],
                         ids=str)
def test_a_spike_is_skipped(watch, setting):
    kwargs = dict(epochs=4)
    got,out = trained(digits, SpikeGuard(watch=watch, warmup=10),
                      Spike(25, by=1e3 if setting=='scaler' else 1e4), *settings_[setting](), **kwargs)
    want,_ = trained(digits, Without(25), *settings_[setting](), **kwargs)
    assert [r.iteration for r in got.spike_guard.records]==[25], out
    same(state(got), state(want))

def test_a_window_with_a_spike_is_dropped():
    got,out = trained(digits, SpikeGuard(warmup=5), Spike(25), GradientAccumulation(64), epochs=4)
    assert [r.iteration for r in got.spike_guard.records]==[25] and finite(got)
    assert got.recorder.values[-1][0]<got.recorder.values[0][0]

def test_a_spike_is_clipped():
    "To the median norm: what is left is the step of the batch without the factor, to that length"
    norms = {}
    class Norm(Callback):
        order = 10.7
        def before_step(self): norms[self.train_iter] = step_numbers(self.learn).grad_norm
    trained(digits, SpikeGuard(action='clip', warmup=10), Norm(), Spike(25), epochs=3)
    clipped = norms[25]
    before = [norms[i] for i in range(25)]
    assert clipped==pytest.approx(np.median(before), rel=1e-5)

@pytest.mark.parametrize('fast', [False,True])
def test_rollback(fast):
    "To the older copy; the batches in between are not done again; the schedule goes on"
    class Keep(Callback):
        order = 2001
        def before_fit(self): self.states = {}
        def after_batch(self):
            if self.training: self.states[self.train_iter] = state(self.learn)[:-1]
    learn,out = trained(digits, SpikeGuard(watch='loss', action='rollback', snapshot=8, warmup=10), Spike(29),
                        keep := Keep(), *[FastLoop()]*fast, epochs=4, method='fit_one_cycle')
    r = learn.spike_guard.records
    assert len(r)==1 and 'went back to batch 16 of the fit' in r[0].what
    n = len(keep.states[16])
    same(keep.states[30], keep.states[16])
    assert len(learn.recorder.losses)==39 and learn.recorder.lrs[-1]<1e-4

def test_rollback_lowers_the_learning_rate_for_a_while():
    for method,lrs in (('fit', [1e-2]*40), ('fit_one_cycle', None)):
        plain,_ = trained(digits, epochs=4, method=method)
        learn,_ = trained(digits,
                          SpikeGuard(watch='loss', action='rollback', snapshot=8, warmup=10, lr_factor=.5,
                                     lr_batches=5), Spike(21,23), epochs=4, method=method)
        want = [lr*(.5 if i==22 else .25 if 23<i<29 else 1) for i,lr in enumerate(plain.recorder.lrs)]
        got = learn.recorder.lrs
        del want[23], want[21]
        assert got==pytest.approx(want), (got, want)
        assert [h['lr'] for h in learn.opt.hypers]==[h['lr'] for h in plain.opt.hypers]

def test_lower_rates_multiply_with_a_schedule():
    guard = SpikeGuard(watch='loss', action='rollback', snapshot=8, warmup=10, lr_factor=.5)
    sched = lambda: Schedule({'lr': [Decay(None, 'linear')]})
    plain,learn = (trained(digits, sched(), *cbs, epochs=4)[0] for cbs in ([], [guard, Spike(21)]))
    want = [lr*(.5 if i>21 else 1) for i,lr in enumerate(plain.recorder.lrs) if i!=21]
    assert learn.recorder.lrs==pytest.approx(want)

def test_mended_weights_keep_the_schedule():
    "A copy does not bring the learning rate of its time back"
    learn,_ = trained(digits, SkipNonFinite(snapshot=8), PoisonBatch(30, 'weight'), epochs=4,
                      method='fit_one_cycle')
    plain,_ = trained(digits, epochs=4, method='fit_one_cycle')
    for k in ('mom','lr'): assert learn.opt.hypers[0][k]==plain.opt.hypers[0][k]
    flat,_ = trained(digits, SpikeGuard(watch='loss', action='rollback', snapshot=8, warmup=10), Spike(29),
                     SetRate(20), epochs=4)
    assert flat.recorder.lrs[-1]==1e-3

def test_after_a_rollback_the_newer_copy_is_gone():
    "It may be from within the spike"
    learn,out = trained(digits, SpikeGuard(watch='loss', action='rollback', snapshot=8, warmup=10),
                        Spike(29,31), epochs=4)
    assert [r.what for r in learn.spike_guard.records]==['went back to batch 16 of the fit']*2

def test_rollbacks_are_bounded():
    learn,out = trained(digits,
                        SpikeGuard(watch='loss', action='rollback', snapshot=5, warmup=10, max_rollbacks=2),
                        Spike(20,25,30), epochs=4)
    assert out.count('went back')==2 and finite(learn)
    assert 'stopped the fit in epoch 3, batch 0: after 2 rollbacks' in out

def test_a_new_level_is_accepted():
    growing = [Spike(i, by=1e3*100.**(i-20)) for i in range(20,24)]
    learn,out = trained(digits, SpikeGuard(watch='loss', warmup=10, max_consecutive=3), *growing, epochs=3)
    assert out.count('skipped a batch')==3 and out.count('treats this level as normal')==1

def test_what_comes_again_and_again_is_no_spike():
    learn,out = trained(digits, SpikeGuard(warmup=10), Spike(*range(20,40,2), by=300), epochs=4)
    assert 1<=len(learn.spike_guard.records)<=3, out

def test_spike_guard_stops_for_what_stays_not_finite():
    for action in ('skip','clip','rollback'):
        learn,out = trained(digits, SpikeGuard(action=action, max_consecutive=3),
                            PoisonBatch(tuple(range(12,40)), 'input'), epochs=4)
        assert finite(learn) and out.count('stopped the fit')==1, out

@pytest.mark.parametrize('action,where,batch', ids=str, argvalues=zip(
    ['skip','clip','rollback']*4, ['input','loss','grad','weight']*3, [0,7,19,0,19,7]*2))
def test_spike_guard_against_what_is_not_finite(action, where, batch):
    learn,out = trained(digits, SpikeGuard(action=action, snapshot=4), PoisonBatch(batch, where))
    assert finite(learn) and len(learn.spike_guard.records)==1
    assert not any(math.isnan(o) for o in learn.recorder.losses)

@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(.1, 100), min_size=5, max_size=50), st.floats(1, 20), st.floats(1, 20),
       st.sampled_from([1,-1]))
def test_spike_limit(values, threshold, factor, sign):
    "Scales with the values, is above all but two of them, and one wild value does not blind it"
    values = [sign*o for o in values]
    limit,scaled = (spike_limit([k*o for o in values], threshold, factor) for k in (1,3))
    third = sorted(values)[-3]
    assert scaled==pytest.approx(3*limit, rel=1e-6) and limit>=third and limit>=np.median(values)
    if sign>0: assert limit>=factor*third*(1-1e-9)
    wild = spike_limit([*values, 1e9], 0, factor)
    assert wild<1e6

# Resume
guards = dict(skip=lambda: SkipNonFinite(max_total=3), spike=lambda: SpikeGuard(warmup=10),
              rollback=lambda: SpikeGuard(watch='loss', action='rollback', snapshot=6, warmup=10,
                                          lr_factor=.5, lr_batches=7),
              terminate=lambda: TerminateOnNaN(every=4))

def guarded(name):
    "The guard, and what it meets"
    return guards[name](),PoisonBatch((13,23,28)) if name=='skip' else Spike(13,23,28)

@cache
def unbroken(name): return trained(digits, *guarded(name), epochs=4, method='fit_one_cycle')[0]

@pytest.mark.parametrize('name', guards)
@pytest.mark.parametrize('at', [14,24])
def test_resumes_to_the_same_bits(name, at):
    class Kill(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==at: raise KeyboardInterrupt
    want,(guard,fault) = unbroken(name),guarded(name)
    learn = digits([guard, fault, Checkpoint('run', steps=at//2, background=False), Kill()])
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit_one_cycle(4)
    set_seed(1)
    guard,fault = guarded(name)
    got = digits([guard, fault, Checkpoint('run', background=False)])
    with quiet(got), contextlib.redirect_stdout(io.StringIO()) as out: got.fit_one_cycle(4)
    assert f'resumed in epoch {at//10}, batch {at%10}' in out.getvalue()
    same(state(got), state(want))
    records = lambda learn: getattr(learn, guard.name).records
    assert records(got)==records(want) and got.recorder.lrs==want.recorder.lrs

def test_wrong_arguments():
    for kwargs,match in ((dict(watch='acc'),'watch='), (dict(action='stop'),'action='),
                         (dict(window=2),'window='), (dict(lr_factor=2.),'lr_factor='),
                         (dict(snapshot=None),'snapshot=')):
        with pytest.raises((ValueError,TypeError), match=match): SpikeGuard(**kwargs)
    with pytest.raises(ValueError, match='max_consecutive=-1'): SkipNonFinite(max_consecutive=-1)
    with pytest.raises(TypeError, match='save=3'): TerminateOnNaN(save=3)
    match = "save='a.pt', every=2: expected every=1"
    with pytest.raises(ValueError, match=match): TerminateOnNaN(2, save='a.pt')

def test_shared_numbers(monkeypatch):
    "All guards together look at the gradients once a batch"
    import fastai_callbacks_ext.base.step as module
    n,real = [],module.StepNumbers.__init__
    def counted(self, *args):
        n.append(1)
        real(self, *args)
    monkeypatch.setattr(module.StepNumbers, '__init__', counted)
    trained(digits, TerminateOnNaN(), SkipNonFinite(), SpikeGuard(), epochs=1)
    assert len(n)==10

@pytest.mark.parametrize('cb', [SkipNonFinite, partial(SpikeGuard, action='rollback')],
                         ids=['skip','rollback'])
def test_a_guard_that_joins_a_resumed_run(cb):
    "Its first copy is of the weights that the checkpoint has put back, and not of those from before"
    class Kill(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==14: raise KeyboardInterrupt
    learn = digits([Checkpoint('run', steps=1, background=False), Kill()])
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(4)
    before = [t.clone() for t in learn.model.state_dict().values()]
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==16: raise CancelFitException
    for batch in (14,15):
        shutil.copytree('run', f'run{batch}')
        Checkpoint._finished.clear()        # as in a new process
        again = Checkpoint(f'run{batch}', background=False)
        got = digits([again, cb(), PoisonBatch(batch, 'weight'), Stop()])
        with quiet(got), contextlib.redirect_stdout(io.StringIO()) as out: got.fit(4)
        assert all(o in out.getvalue() for o in ('resumed in epoch 1, batch 4', 'batch 14 of the fit'))
    for a,b in zip(got.model.state_dict().values(), before): assert torch.equal(a, b)

# What cannot be copied
class Hist(torch.optim.SGD):
    "A Python object in its state"
    def step(self, closure=None):
        for p in self.param_groups[0]['params']: self.state[p].setdefault('hist', iter('abc'))
        return super().step(closure)

class Thing(nn.Linear):
    "A Python object in the model's state"
    def get_extra_state(self): return object()
    def set_extra_state(self, state): pass

def net(*last): return nn.Sequential(nn.Flatten(), *last)
odd = {'iterator': (dict(opt_func=partial(OptimWrapper, opt=Hist)), "['state'][0]['hist'] (str_"),
       'extra state': (dict(model=net(Thing(64, 10))), "_extra_state")}

rollback = partial(SpikeGuard, action='rollback')
@pytest.mark.parametrize('guard', [TerminateOnNaN, SkipNonFinite, SpikeGuard, rollback],
                         ids=['stop','skip','spike','rollback'])
@pytest.mark.parametrize('kind', odd)
def test_what_cannot_be_copied_is_said_once(guard, kind):
    "With the path to it; the guard does its work without"
    kwargs,path = odd[kind]
    learn,out = trained(lambda cbs, **kw: digits(cbs, **kwargs, **kw), guard(snapshot=3), PoisonBatch(14))
    first,last = interventions(learn)
    assert first.what=='goes on without a copy of model and optimizer' and path in first.why, out
    assert all_finite(list(learn.model.parameters()))
    did = 'stopped the fit' if guard is TerminateOnNaN else 'skipped a batch'
    assert (last.iteration,last.what)==(14,did)

@pytest.mark.parametrize('guard', [TerminateOnNaN, SkipNonFinite, SpikeGuard])
@pytest.mark.parametrize('batch', [0,5])
def test_lazy_layers(guard, batch):
    "There is nothing to copy before the first batch; what it makes is as new if it is skipped"
    model = net(nn.LazyBatchNorm1d(), nn.LazyLinear(10))
    learn,out = trained(digits, guard(), PoisonBatch(batch, 'input'), model=model)
    assert out.count('\n')==1 and all_finite(learn.model.state_dict()) and 'copy' not in out
    if batch==0 and guard is not TerminateOnNaN: assert learn.model[1].num_batches_tracked==19

def test_a_mask_of_infinities_is_no_damage():
    "Copies are taken, and put back for what is damage"
    model = net(nn.Linear(64, 10))
    model.register_buffer('mask', torch.full((4,4), -inf).triu(1))
    learn,out = trained(digits, SkipNonFinite(snapshot=5), PoisonBatch(13, 'weight'), model=model)
    assert 'those before batch 10 of the fit' in out
    assert all(p.isfinite().all() for p in learn.model.parameters())

class Cache(nn.Linear):
    "With a buffer that grows, is replaced or resized in place, or of which all elements are one"
    def __init__(self, how):
        super().__init__(64, 10)
        self.how,self.length,first = how,1,torch.ones(1, device=device)
        self.register_buffer('seen', first.expand(5) if how=='wide' else first, persistent=how!='not saved')
    def forward(self, x):
        if self.training and self.how!='wide':
            self.length += 1
            if self.how=='resized':
                old = len(self.seen)
                self.seen.resize_(self.length)[old:] = 1.
            else: self.seen = torch.cat([self.seen, self.seen.new_ones(1)])
        return super().forward(x)*self.seen[0]

@pytest.mark.parametrize('where', ['weight','seen'])
@pytest.mark.parametrize('how', ['saved','not saved','resized','wide'])
@pytest.mark.parametrize('guard', [TerminateOnNaN, SkipNonFinite, partial(SpikeGuard, action='rollback')],
                         ids=['stop','skip','rollback'])
def test_buffers_whose_size_changes(guard, how, where):
    "The copy is put back; a buffer that is fine stays with the attributes that it goes with"
    class Damage(Callback):
        order,run_valid = -200,False
        def after_batch(self):
            if self.train_iter==12: getattr(self.model[1], where).data[:1] = nan
    if (how,where)==('wide','seen'): return
    learn,out = trained(digits, guard(snapshot=5), Damage(), model=net(Cache(how)))
    m = learn.model[1]
    assert 'all but' not in out and all_finite(learn.model.state_dict()), out
    if where=='weight' and how!='wide': assert len(m.seen)==m.length
    assert 'batch 10 of the fit' in out or guard().name=='spike_guard' and 'batch 5 of the fit' in out

def test_what_cannot_be_put_back_is_said():
    "The rest of the copy is"
    class Stubborn(nn.Linear):
        def get_extra_state(self): return {'a': 1}
        def set_extra_state(self, state): raise RuntimeError('takes no state')
    learn,out = trained(digits, SkipNonFinite(), PoisonBatch(3, 'weight'), model=net(Stubborn(64, 10)))
    assert 'those before batch 0 of the fit, all but model (' in out and 'takes no state' in out, out
    assert all_finite([p for p in learn.model.parameters()])

def test_parameters_of_the_loss():
    "What the optimizer holds is looked at, named, and put back"
    class Temperature(nn.Module):
        def __init__(self):
            super().__init__()
            self.t = nn.Parameter(torch.zeros(1, device=default_device()))
        def forward(self, o, y): return F.cross_entropy(o*self.t.exp(), y)
    class Damage(Callback):
        order = 2000
        def after_batch(self):
            if self.training and self.train_iter==13: self.learn.loss_func.t.data.fill_(nan)
    loss = Temperature()
    learn,out = trained(digits, SkipNonFinite(snapshot=5), Damage(), loss_func=loss,
                        splitter=lambda m: [list(m.parameters()), list(loss.parameters())])
    assert 'the weight loss_func.t is nan; weights and optimizer are those before batch 10' in out
    assert loss.t.isfinite().all()

# Beside fastai's callbacks
neighbours = {'guard': lambda: FastaisTerminateOnNaN(), 'mixup': lambda: MixUp(),
              'clip': lambda: training.GradientClip(.1), 'window': lambda: training.GradientAccumulation(64),
              'stopping': lambda: EarlyStoppingCallback(patience=9), 'save': lambda: SaveModelCallback(),
              'plateau': lambda: ReduceLROnPlateau(patience=9),
              'bf16': lambda: AnyMixedPrecision(), 'scaler': lambda: scaler()}
beside = [(n, g, i%2) for i,(n,g) in enumerate(itertools.product(neighbours, [SkipNonFinite, SpikeGuard]))]
@pytest.mark.parametrize('name,guard,first', some(beside, 11), ids=str)
def test_neighbours(name, guard, first):
    "The fit goes to its end, in both orders, with every number finite"
    cbs = [guard(), neighbours[name]()]
    learn,out = trained(digits, PoisonBatch((3,12), 'input'), *(cbs if first else cbs[::-1]))
    assert len(learn.recorder.values)==2 and finite(learn) and out.count('skipped a batch')==2, out
    assert all(math.isfinite(v) for row in learn.recorder.values for v in row)

def test_a_short_epoch():
    learn,out = trained(digits, SkipNonFinite(), training.ShortEpochCallback(.5), PoisonBatch(2, 'input'))
    assert out.count('skipped')==1 and len(learn.recorder.values)==2 and finite(learn)

# SpikeGuard and a loss scaler
@pytest.mark.parametrize('value', [nan,inf])
@pytest.mark.parametrize('batch', [0,13])
def test_a_bad_input_before_the_scaler(value, batch):
    "The scaler skips the step before `SpikeGuard` sees it; what is left is as without the batch"
    scaled = lambda: AnyMixedPrecision(torch.float32, 2.**14)
    got,out = trained(digits, SpikeGuard(), PoisonBatch(batch, 'input', value), scaled())
    want,_ = trained(digits, Without(batch), scaled())
    same(state(got), state(want))
    assert [r.iteration for r in got.spike_guard.records]==[batch], out

def test_an_overflow_is_the_scalers_matter():
    "It is undone and not told"
    got,out = trained(digits, SpikeGuard(), PoisonBatch(13, 'grad', inf),
                      AnyMixedPrecision(torch.float32, 2.**14))
    want,_ = trained(digits, Without(13), AnyMixedPrecision(torch.float32, 2.**14))
    same(state(got), state(want))
    assert not got.spike_guard.records

@pytest.mark.skipif(not torch.cuda.is_available(), reason='fastai\'s float16 needs a GPU')
@pytest.mark.parametrize('guard', [SkipNonFinite, SpikeGuard, rollback], ids=['skip','spike','rollback'])
@pytest.mark.parametrize('value', [nan,inf])
def test_fp16(guard, value):
    learn,out = trained(digits, guard(), PoisonBatch((5,13), 'input', value), MixedPrecision())
    assert finite(learn) and out.count('\n')==2 and len(learn.recorder.values)==2

# Healthy runs
def test_sparse_gradients_of_a_hinge_loss():
    "Most are exactly 0: the others are what there is to learn"
    set_seed(0)
    x = torch.randn(800, 4)
    x[:,0],y = 3,torch.ones(800)
    x[::37,0],x[::37,1] = -3,5
    model = nn.Linear(4, 1)
    with torch.no_grad(): model.weight.copy_(torch.tensor([[1.,0,0,0]]))
    dl = torch.utils.data.DataLoader(list(zip(x, y)), 4, shuffle=True)
    learn = Learner(DataLoaders(dl, dl), model, loss_func=lambda o,t: F.relu(1-o[:,0]*t).mean(), lr=1e-3,
                    opt_func=SGD, cbs=[guard := SpikeGuard()])
    fit(learn)
    assert not guard.records and len(guard.history['grad_norm'])<100

@pytest.mark.parametrize('growth', [1.05,1.3])
def test_a_plateau_is_left(growth):
    "Growth from batch to batch is no spike, however even it was before; a jump is"
    for jump,n in ((1,0), (50,1)):
        guard,sizes = SpikeGuard(),[(1+.01*math.sin(7*t))*growth**max(t-100, 0) for t in range(130)]
        sizes[60] *= jump
        found = [guard._limit('grad_norm', v)<v or guard._remember({'grad_norm':v}) for v in sizes]
        assert sum(map(bool, found))==n

# Looks that are put off
class Branches(nn.Module):
    "The second layer is used in every other batch"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.n = nn.Linear(64, 10),nn.Linear(64, 10),0
    def forward(self, x):
        self.n += self.training
        return self.a(x.flatten(1)) + (self.b(x.flatten(1)) if self.n%2 else 0)

def test_a_look_at_batches_with_other_gradients():
    cb = TerminateOnNaN(every=3)
    fit(digits_learner(cb, n=200, bs=32, model=Branches()))
    assert cb.records==[]

@pytest.mark.parametrize('every', [4, 100])
def test_a_cancelled_batch_shifts_no_number(every):
    class Cancel(Callback):
        order = -15
        def before_batch(self):
            if self.training and self.train_iter==3: raise CancelBatchException
    cb = TerminateOnNaN(every=every)
    fit(digits_learner([cb, Cancel(), PoisonBatch(2)], n=200, bs=32))
    assert 'of batch 2 of the fit' in cb.records[0].why

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_norms_of_half_precision(dtype):
    "The sum of squares is too large for the type, the gradients are not"
    g = torch.full((10_000,), 900., dtype=dtype, device=device)
    numbers = step.StepNumbers(torch.tensor(1., device=device), [g, torch.ones(2, device=device)])
    assert numbers.finite and numbers.tensor.isfinite().all() and step.all_finite([g])
    assert numbers.grad_norm==pytest.approx(90_000, rel=1e-2)
