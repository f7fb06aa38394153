"Each average is its definition, and a swap of weights leaves no trace however it ends"
import copy, os
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.all import EarlyStoppingCallback, SaveModelCallback, ShortEpochCallback
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelStepException, CancelValidException
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from common import fit, quiet
from fastai_callbacks_ext.all import (EMA, LAWA, SWA, Checkpoint, EarlyStopping, FastLoop, GradientAccumulation, Lookahead, SaveTopK, SkipNonFinite, StepLimit, TerminateOnNaN,
                                      refresh_batchnorm, soup)
from fastai_callbacks_ext.base.files import DamagedFile
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner, text_learner

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

averagers = {'EMA': lambda **kw: EMA(0.8, **kw), 'SWA': lambda **kw: SWA(0., **kw), 'LAWA': lambda **kw: LAWA(3, **kw)}
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
    for k in b: assert torch.equal(a[k], b[k]), k
def assert_close(a, b, **tol):
    for k in b: torch.testing.assert_close(a[k].double(), b[k].double(), **(tol or dict(rtol=1e-4, atol=1e-6)))
def mean(states, shares):
    "Weighted mean of the float tensors"
    shares = torch.tensor(shares, dtype=torch.float64)/sum(shares)
    return {k: sum(w*s[k].double() for w,s in zip(shares, states)) for k,v in states[-1].items() if v.is_floating_point()}

# Definitions

@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.integers(1, 4), st.integers(0, 9))
def test_ema_is_its_closed_form(decay, every, start):
    "Shares of decay**age over the updates, statistics of batch norm included"
    learn = run(EMA(decay, every=every, start=start))
    used = learn.steps.steps[start:][every-1::every]
    assert_close(state(learn), mean(used, [decay**(every*(len(used)-1-i)) for i in range(len(used))]), rtol=1e-3, atol=1e-5)

@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.floats(0, 0.999), st.integers(1, 3), st.integers(0, 5))
def test_without_warmup_the_past_is_what_was_there(decay, every, start):
    learn = run(EMA(decay, every=every, start=start, warmup=False))
    steps = learn.steps
    states = [[steps.first, *steps.steps][start], *steps.steps[start:][every-1::every]]
    d = decay**every
    assert_close(state(learn), mean(states, [d**(len(states)-1)] + [(1-d)*d**(len(states)-1-i) for i in range(1, len(states))]), rtol=1e-3, atol=1e-5)

def test_half_life():
    a,b = run(EMA(half_life=5)),run(EMA(0.5**0.2))
    assert_close(state(a), state(b), rtol=1e-6, atol=1e-7)

class Torchs(Callback):
    "torch's `AveragedModel`, beside"
    order,run_valid = 49,False
    def __init__(self, decay): self.decay = decay
    def before_train(self):
        if not hasattr(self, 'average'):
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True)
            self.average.update_parameters(self.model)     # the first is a copy
    def after_step(self): self.average.update_parameters(self.model)

def test_as_torch():
    learn = run(EMA(0.9, warmup=False), Torchs(0.9))
    assert_close({k: v for k,v in state(learn).items() if 'num_batches' not in k}, {k: v for k,v in learn.torchs.average.module.state_dict().items() if 'num_batches' not in k}, rtol=1e-5, atol=1e-7)

def test_as_timm():
    timm = pytest.importorskip('timm.utils')
    class Timms(Callback):
        order,run_valid = 49,False
        def before_train(self):
            if not hasattr(self, 'v3'): self.v3 = timm.ModelEmaV3(self.model, decay=0.9)
        def after_step(self): self.v3.update(self.model)
    learn = run(EMA(0.9, warmup=False), Timms())
    assert_close({k: v for k,v in state(learn).items() if 'num_batches' not in k}, {k: v for k,v in learn.timms.v3.module.state_dict().items() if 'num_batches' not in k}, rtol=1e-5, atol=1e-7)

@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.sampled_from([0., 0.3, 0.5, 1.]), st.sampled_from([None, 1, 3]))
def test_swa_is_the_mean(start, every):
    learn = run(SWA(start, every, buffers='average'), epochs=3)
    n,steps = len(learn.dls.train),learn.steps.steps
    used = [s for i,s in enumerate(learn.steps.epochs) if i/3>=start] if every is None else [s for i,s in enumerate(steps) if (i+1)%every==0 and i/(3*n)>=start-1e-9]
    assert_close(state(learn), mean(used, [1]*len(used)) if used else learn.steps.epochs[-1])

@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.sampled_from([None, 1, 4]))
def test_lawa_is_the_mean_of_the_last(k, every):
    learn = run(LAWA(k, every), epochs=3)
    used = (learn.steps.epochs if every is None else learn.steps.steps[every-1::every])[-k:]
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
    learn = learner(ema := EMA(0.999, warmup=False))
    ema._learner = learn
    model = learn.model.to(dtype)
    with torch.no_grad(): [p.fill_(1.) for p in model.parameters()]
    ema._begin(); ema._t = 1
    scopes,ema._n = ema._scopes,0
    ema._t = 0; ema._begin()
    with torch.no_grad(): [p.fill_(2.) for p in model.parameters()]
    for _ in range(700): ema._update()
    for a in ema._kept[0][:4]: torch.testing.assert_close(a, torch.full_like(a, 2-.999**700), rtol=1e-4, atol=1e-5)
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
        assert_close(got, want, rtol=0.1, atol=0.05)      # the last batch of an epoch is another one each time
        return
    assert_close(got, want)

def test_refresh_leaves_the_mode():
    learn = digits_learner(n=160)
    learn.model.train(); learn.model[1].eval()
    before = [m.training for m in learn.model.modules()]
    refresh_batchnorm(learn)
    assert [m.training for m in learn.model.modules()]==before

def test_freezing():
    learn = digits_learner(n=300, bs=32, splitter=lambda m: [list(m[:4].parameters()), list(m[4:].parameters())])
    cb,first = EMA(0.8),learn.model[0].weight.detach().clone()
    learn.freeze(); fit(learn, 1, cbs=cb)
    assert torch.equal(learn.model[0].weight, first)
    learn.unfreeze(); fit(learn, 1, cbs=cb)
    assert not torch.equal(learn.model[0].weight, first)
    fit(learn, 1, method='fine_tune', cbs=cb)

# The training is left alone

@each
@pytest.mark.parametrize('validate', ['avg','raw','both'])
@pytest.mark.parametrize('final', ['avg','raw'])
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

def test_a_skipped_step_is_no_update():
    class Skip(Callback):
        order = 20
        def before_step(self):
            if self.iter%2: raise CancelStepException
    learn = run(EMA(0.8), Skip())
    steps = learn.steps.steps
    assert len(steps)==8 and learn.ema._n==8
    assert_close({k: v for k,v in state(learn).items() if 'running' not in k and 'num' not in k}, {k: v for k,v in mean(steps, [0.8**(7-i) for i in range(8)]).items() if 'running' not in k and 'num' not in k})
    learn = run(EMA(0.8), SkipNonFinite(), PoisonBatch(2))
    assert learn.ema._n==len(learn.steps.steps)==13
    assert all(v.isfinite().all() for v in state(learn).values())
    learn = run(EMA(0.8), GradientAccumulation(64))
    assert learn.ema._n==len(learn.steps.steps)==8

# Validation

def values(learn, epoch=-1): return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[epoch]))

@each
def test_columns(make):
    "The usual columns are of the average, those with 'raw_' of the trained weights, as a validation of each says"
    learn = run(cb := make(validate='both'), epochs=3)
    assert list(values(learn))==['train_loss','raw_valid_loss','raw_accuracy','valid_loss','accuracy']
    got = values(learn)
    with quiet(learn):
        assert learn.validate()==[got['valid_loss'], got['accuracy']]
        with cb.using('raw'): assert learn.validate()==[got['raw_valid_loss'], got['raw_accuracy']]
    assert got['raw_valid_loss']==values(run(epochs=3))['valid_loss']

def test_columns_of_several():
    learn = run(cb := EMA([0.5, 0.9], validate='both'))
    got = values(learn)
    assert list(got)==['train_loss','raw_valid_loss','raw_accuracy','ema2_valid_loss','ema2_accuracy','valid_loss','accuracy']
    with quiet(learn), cb.using('ema', 1): assert learn.validate()==[got['ema2_valid_loss'], got['ema2_accuracy']]
    assert values(run(EMA(0.9)))['valid_loss']==got['ema2_valid_loss'] and values(run(EMA(0.5)))['valid_loss']==got['valid_loss']

def test_columns_with_the_bar_training_metrics_and_time(capsys):
    learn = digits_learner(EMA(0.8, validate='both'), n=300)
    learn.recorder.add_time = learn.recorder.train_metrics = True
    learn.fit(2)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','train_accuracy','raw_valid_loss','raw_valid_accuracy','valid_loss','valid_accuracy','time']
    assert all(len(o)==6 for o in learn.recorder.values)

def test_early_stopping_and_saving_see_the_average():
    for saver in (SaveModelCallback(), SaveTopK(), EarlyStopping(patience=9, restore_best=True)):
        learn = run(cb := EMA(0.8, validate='both'), saver, epochs=4)
        rows = [values(learn, i)['valid_loss'] for i in range(4)]
        with quiet(learn): assert learn.validate()[0]==pytest.approx(min(rows), rel=1e-5), type(saver)
    learn = run(EMA(0.8), EarlyStopping(patience=1, min_delta=10.), epochs=4)
    assert len(learn.recorder.values)==2
    with quiet(learn): assert learn.validate()[0]==pytest.approx(values(run(EMA(0.8)))['valid_loss'], rel=1e-5)
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
@pytest.mark.parametrize('event', ['before_validate','after_validate','after_epoch','after_train','before_epoch'])
@pytest.mark.parametrize('order', [-20,70,300])
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
    with pytest.raises(OSError), cb.using('raw'): assert_equal(state(learn), learn.steps.steps[-1]); raise OSError
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

@each
@pytest.mark.parametrize('stop', [3,10,14])
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
    again = go(path=tmp_path/'b')       # of the finished fit
    assert_equal(state(again), state(want))
    cb = [o for o in again.cbs if hasattr(o, 'average_name')][0]
    cb.use('raw'); assert_equal(state(again), want.steps.steps[-1])

@each
def test_fast_loop(make):
    a,b = run(make(validate='both')),run(make(validate='both'), FastLoop())
    assert_equal(state(a), state(b)); assert list(values(a))==list(values(b))

def test_several_averagers():
    learn = run(EMA(0.8, validate='raw', final='raw'), SWA(0., validate='raw', final='raw'), LAWA(2, validate='raw', final='raw'))
    assert_equal(state(learn), learn.steps.steps[-1])
    for cb in (learn.ema, learn.swa, learn.lawa):
        with cb.using(cb.average_name): assert any(not torch.equal(v, learn.steps.steps[-1][k]) for k,v in state(learn).items())
        assert_equal(state(learn), learn.steps.steps[-1])

@pytest.mark.parametrize('validate', ['avg','raw'])
def test_averagers_that_both_lend(validate):
    "The last one is in use; no average is ever taken for the trained weights"
    cbs = EMA(0.8),LAWA(2, validate='lawa' if validate=='avg' else 'raw')
    a,b = run(epochs=3),run(*cbs, epochs=3)
    for s,t in zip(a.steps.steps, b.steps.steps, strict=True): assert_equal(s, t)
    alone = [state(run(o, epochs=3)) for o in (EMA(0.8), LAWA(2))]
    assert_equal(state(b), alone[1])
    for cb,want in zip(cbs, alone): cb.use(cb.average_name); assert_equal(state(b), want)
    cbs[0].use('raw'); assert_equal(state(b), a.steps.steps[-1])

def test_columns_of_two_that_lend():
    with pytest.raises(ValueError, match="validate='both'.*validate='raw'"): run(EMA(0.8, validate='both'), LAWA(2))
    assert 'raw_valid_loss' in values(run(EMA(0.8, validate='both'), LAWA(2, validate='raw')))

def test_short_fits():
    "An average that never began is none"
    learn = run(cb := EMA(0.9, start=1000))
    assert_equal(state(learn), learn.steps.steps[-1])
    with pytest.raises(RuntimeError, match='no average'): cb.use('ema')
    assert_equal(state(run(SWA(1.))), state(run()))

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
    assert_close({k: v for k,v in got.items() if 'running' not in k and 'num' not in k}, {k: v for k,v in want.items() if 'running' not in k and 'num' not in k})
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
    for kwargs,match in ((dict(files=[]),'files='), (dict(files=files, monitor='f1'),'monitor=.*valid_loss, accuracy')):
        with pytest.raises(ValueError, match=match): soup(learn, **kwargs)

@pytest.mark.parametrize('make,match', [(lambda: EMA(1.1),'decay='), (lambda: EMA([]),'decay='), (lambda: EMA(half_life=0),'half_life='), (lambda: EMA(validate='swa'),'validate='), (lambda: SWA(2.),'start='),
                                        (lambda: SWA(lr=-1.),'lr='), (lambda: LAWA(0),'k='), (lambda: LAWA(buffers='none'),'buffers='), (lambda: EMA(final='both'),'final='), (lambda: EMA(every=0),'every=')])
def test_wrong_arguments(make, match):
    with pytest.raises(ValueError, match=match): make()
