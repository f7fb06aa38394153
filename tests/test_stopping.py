"Stopping: when, in which state, on whose decision, and what is the same after a restart"
import contextlib, io, pickle
from datetime import datetime, timedelta, timezone
from math import inf, nan
from pathlib import Path

import numpy as np, pytest, torch
from fastai.basics import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
                           CancelStepException, CancelValidException, DataLoaders, Learner)
from fastai.callback.all import GradientAccumulation, ShortEpochCallback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.learner import ValueMetric
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from fastai_callbacks_ext.all import (Checkpoint, EarlyStopping, FastLoop, SampleLimit, SaveTopK, StepLimit,
                                      StopFile, StopReason, TimeLimit)
from fastai_callbacks_ext.stopping import _n_items
from fastai_callbacks_ext.test_utils import digits_learner, digits_model
from common import quiet
from cases import every_case, some
import crash
from test_checkpoint import run

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)

class Clock(Callback):
    "A clock for `cbs` that batches move on, by `train` and `valid` seconds; `slow` is a factor by epoch"
    order = -100
    def __init__(self, *cbs, train=1., valid=2., slow=()):
        self.train,self.valid,self.slow,self.seconds = train,valid,dict(slow),1000.
        for cb in cbs: cb.clock = self.time
    def state_dict(self): return {}      # the time of day does not come from a checkpoint
    def load_state_dict(self, state): pass
    def time(self): return self.seconds
    def after_batch(self):
        self.seconds += (self.train if self.training else self.valid)*self.slow.get(self.epoch, 1)

class Seen(Callback):
    "The weights after each epoch, before any decision; `pct_train` and the learning rate of each batch"
    order = 62
    def before_fit(self): self.weights,self.pcts = [],[]
    def after_epoch(self): self.weights.append({k: v.clone() for k,v in self.model.state_dict().items()})
    def before_batch(self):
        if self.training: self.pcts.append(float(self.pct_train))

def equal(a, b): return all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a)

def digits(cbs=None, n=200, bs=32, **kwargs):
    "5 batches an epoch, 2 of validation"
    return digits_learner(cbs, n=n, bs=bs, **kwargs)

def fit(learn, n, method='fit', *args, **kwargs):
    with quiet(learn), contextlib.redirect_stdout(io.StringIO()) as out:
        getattr(learn, method)(n, *args, **kwargs)
    return out.getvalue()

# EarlyStopping
class Sequence:
    "A learner whose metric has given values, by epoch"
    def __init__(self, name='score'):
        self.learn = digits_learner(n=20, bs=16, lr=0.)      # one batch an epoch
        self.learn.metrics = ValueMetric(lambda: self.values[self.learn.epoch], name)
    def rows(self, values, *cbs):
        "Epochs that the fit took"
        self.values = values
        self.out = fit(self.learn, len(values), cbs=list(cbs))
        return len(self.learn.recorder.values)

@pytest.fixture(scope='module')
def sequence(): return Sequence()

def at(**kwargs): return EarlyStopping('score', **kwargs)
def stops(*args, **kwargs): return EarlyStopping(*args, restore_best=True, **kwargs)

some_value = st.one_of(st.sampled_from([0., .1, .2, .3, 1., nan]), st.floats(-5, 5))
in_one_folder = dict(suppress_health_check=[HealthCheck.function_scoped_fixture])

@settings(max_examples=25, deadline=None, derandomize=True, **in_one_folder)
@given(st.lists(some_value, min_size=1, max_size=7), st.integers(0, 3), st.sampled_from([0., .1, .5]),
       st.sampled_from([None, np.less, np.greater]))
def test_as_fastais(sequence, values, patience, min_delta, comp):
    "The same arguments in the same order: the same epoch, for any values"
    args = 'score',comp,min_delta,patience
    theirs,ours = EarlyStoppingCallback(*args),EarlyStopping(*args)
    assert sequence.rows(values, theirs)==sequence.rows(values, ours)
    if ours.best is not None: assert ours.best==theirs.best
    sequence.rows(values, theirs), sequence.rows(values, ours)      # in a second fit

def test_best_of_the_fit_before(sequence):
    cb = at(comp=np.less, reset_on_fit=False, patience=2)
    sequence.rows([3., 1.], cb)
    assert sequence.rows([2., 2., 2., 2.], cb)==2 and cb.best==1
    cb = at(comp=np.less, patience=2)
    sequence.rows([3., 1.], cb)
    assert sequence.rows([2., 2., 2., 2.], cb)==3 and cb.best==2

def test_names_take_a_side():
    for name,comp in dict(valid_loss=np.less, error_rate=np.less, accuracy=np.greater, _rmse=np.less).items():
        assert EarlyStopping(name).comp is comp
    assert EarlyStopping('accuracy', np.less).comp is np.less

@pytest.mark.parametrize('values,args,rows,best', [
    ([nan]*5, dict(patience=2), 2, None),                      # never a number
    ([nan, 1., nan, 2., nan, nan], dict(patience=2), 6, 2.),
    ([nan, nan, 1., 2.], dict(patience=3), 4, 2.),             # what comes after NaN is an improvement
    ([1., inf, inf, inf], dict(comp=np.less, patience=2), 3, 1.),
    ([1., inf, 2., 2.], dict(patience=2), 4, 2.),              # nor is infinity good
    ([1., 1.05, 1.11, 1.2], dict(min_delta=.1), 2, 1.),
    ([1., 1.2, 1.29, 3.], dict(min_delta=.1), 3, 1.2),
    ([10., 10.9, 12., 12.5], dict(min_delta=.1, relative=True, patience=1), 2, 10.),
    ([10., 11.1, 12.3, 13., 20.], dict(min_delta=.1, relative=True), 4, 12.3),
    ([-10., -8.9, -8.1, 0.], dict(min_delta=.1, relative=True), 3, -8.9),
    ([10., 8.9, 8.1, 0.], dict(comp=np.less, min_delta=.1, relative=True), 3, 8.9),
    ([5., 4., 3., 2., 1., 1.], dict(warmup=3), 4, 5.),
    ([5., 4., 3., 2., 1., 1.], dict(warmup=3, patience=2), 5, 5.),
    ([nan, nan, 3., 2., 1.], dict(warmup=2), 4, 3.),
    ([5., 6., 9., 9., 8., 10.], dict(threshold=9.), 3, 9.),
    ([5., 4., 3., 2.9], dict(comp=np.less, threshold=3.), 3, 3.),
    ([5., 9., 9., 1.], dict(threshold=4., warmup=2, patience=9), 3, 9.),
    ([5., 4., 2., 3.], dict(divergence=2.5, patience=9), 3, 5.),
    ([5., 4., 2.5, 3.], dict(divergence=2.5, patience=9), 4, 5.),
    ([5., nan, 5., 5.], dict(divergence=2.5, patience=9), 2, 5.),
    ([5., 6., inf, 5.], dict(comp=np.less, divergence=7., patience=9), 3, 5.),
    ([1., None, None, 2., None, 3.], dict(), 6, 3.),            # not computed: nothing is known, nothing lost
    ([2., None, 1., None, 1., 5.], dict(patience=2), 5, 2.),
    ([None, nan, None, nan, 1.], dict(patience=2), 4, None),   # but NaN is computed
    ([None, None, 1.], dict(divergence=0., threshold=9.), 3, 1.),
], ids=str)
def test_when(sequence, values, args, rows, best):
    cb = at(**args)
    assert sequence.rows(values, cb)==rows
    assert cb.best==best and (cb.reason is None)==(rows==len(values))

def test_reason(sequence):
    for args,reason in ((dict(), StopReason.NO_IMPROVEMENT), (dict(threshold=1.), StopReason.GOOD_ENOUGH),
                        (dict(divergence=1.5, patience=3), StopReason.DIVERGED)):
        cb = at(**args)
        assert cb.reason is None
        sequence.rows([2.,1.,1.], cb)
        assert cb.reason is reason and len(cb.records)==1
        assert sequence.out.count('\n')==1 and f'{reason.value}: score is' in sequence.out
    sequence.rows([1.,2.,3.], cb := at(patience=3))
    assert cb.reason is None and not cb.records and not sequence.out
    sequence.rows([1.,1.], cb := at())
    assert cb.reason is None and not cb.records      # in the last epoch there is nothing to stop

def test_each_fit_has_its_reason_and_its_patience(sequence):
    cb = at(comp=np.less, reset_on_fit=False, patience=2, unit='steps')      # an epoch is a step
    assert sequence.rows([3., 2., 1., 1., 1., 1.], cb)==5 and cb.reason is StopReason.NO_IMPROVEMENT
    other = at()
    other.load_state_dict(cb.state_dict())
    assert other.reason is cb.reason
    assert sequence.rows([2., 2., 2., 2.], cb)==2
    assert sequence.rows([2.], cb)==1 and cb.reason is None

@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.floats(0, .99))
def test_smooth(values, s):
    "In closed form; what is not finite leaves no trace"
    cb = EarlyStopping(smooth=s)
    for n in range(1, len(values)+1):
        got = cb._smoothed(values[n-1])
        assert np.isnan(cb._smoothed(nan)) and cb._smoothed(inf)==inf
        weights = s**np.arange(n)[::-1]
        assert got==pytest.approx((weights*values[:n]).sum()/weights.sum(), rel=1e-6, abs=1e-6)
    assert s>0 or got==values[-1]

def test_smooth_stops_later(sequence):
    values = [1., 2., 1., 2.2, 1.5, 2.6, 2.7]
    assert sequence.rows(values, at())==3 and sequence.rows(values, at(smooth=.9))==3
    values = [1.,3.,2.9,2.8,2.9,2.9]
    assert sequence.rows(values, at())==3 and sequence.rows(values, at(smooth=.5))==6

@pytest.mark.parametrize('patience,rows', [(1,2), (5,2), (6,3), (10,3), (11,4)])
def test_steps(patience, rows):
    learn = digits(EarlyStopping('accuracy', min_delta=1, patience=patience, unit='steps'))
    fit(learn, 8)
    assert len(learn.recorder.values)==rows and learn.early_stopping.best_epoch==0

@pytest.mark.parametrize('minutes,rows', [(0,2), (.15,2), (.16,3), (.3,3), (.31,4)])
def test_minutes(minutes, rows):
    "An epoch takes 9 s, validation included"
    cb = EarlyStopping('accuracy', min_delta=1, patience=minutes, unit='minutes')
    learn = digits([cb, Clock(cb)])
    fit(learn, 8)
    assert len(learn.recorder.values)==rows

class Used(Callback):
    "The time that a checkpoint after a batch would have, beside the clock's"
    order = 1999
    def __init__(self, cb): self.cb,self.used = cb,[]
    def after_batch(self):
        if self.training: self.used.append((self.cb.state_dict()['used'], self.clock.seconds-1000))

def test_time_after_a_batch():
    for cb in (EarlyStopping(unit='minutes', patience=9), TimeLimit(minutes=9)):
        fit(digits([cb, Clock(cb), used := Used(cb)]), 2)
        assert len(used.used)==10 and all(a==b for a,b in used.used)

class Leave(Callback):
    order = 100
    def __init__(self, exc): self.exc = exc
    def after_batch(self):
        if self.training and self.train_iter==53: raise self.exc

high = dict(lr=.2)     # the validation loss goes up and down

class Worse(Callback):
    "The best epoch is not the last one"
    def before_train(self):
        if self.epoch>6: self.opt.set_hyper('lr', 2.)

@pytest.mark.parametrize('how', ['finished','stopped','cancelled','error','interrupted'])
@pytest.mark.parametrize('where', ['learner','fit'])
def test_restore_best(how, where):
    cb,log = EarlyStopping(patience=2 if how=='stopped' else 99, restore_best=True),Seen()
    exc = dict(cancelled=CancelFitException, error=OSError, interrupted=KeyboardInterrupt).get(how)
    leave = [Worse(), *([Leave(exc('broken'))] if exc else [])]
    learn = digits([cb, log, *leave] if where=='learner' else [], **high)
    with contextlib.suppress(OSError, KeyboardInterrupt):
        fit(learn, 12, cbs=[cb, log, *leave] if where=='fit' else [])
    rows,best = learn.recorder.values,cb.best_epoch
    losses = [o[1] for o in rows]
    assert best==np.argmin(losses)<len(rows)-1, 'this run has its best epoch at the end: it shows nothing'
    assert equal(learn.model.state_dict(), log.weights[best])
    assert not equal(log.weights[best], log.weights[-1])
    assert cb._weights is None and cb.records[-1].what=='loaded the best weights'
    assert len(rows)==12 if how=='finished' else len(rows)<12
    assert (cb.reason is StopReason.NO_IMPROVEMENT)==(how=='stopped')

def test_restore_best_of_all_fits():
    cb,log = EarlyStopping(patience=99, restore_best=True, reset_on_fit=False),Seen()
    learn = digits([cb, log], **high)
    fit(learn, 12)
    best,value = log.weights[cb.best_epoch],cb.best
    with quiet(learn): learn.opt.set_hyper('lr', 5.)
    fit(learn, 2, lr=5.)
    assert cb.best==value and equal(learn.model.state_dict(), best)

def test_restores_nothing_without_a_number():
    cb = at(restore_best=True, patience=9)
    learn = digits([cb, log := Seen()], metrics=ValueMetric(lambda: nan, 'score'))
    fit(learn, 2)
    assert equal(learn.model.state_dict(), log.weights[-1]) and not cb.records

def test_last_epoch_is_seen_by_others():
    "`SaveTopK` has the last epoch when the fit is stopped"
    cb = SaveTopK(k=None, load_best=False)
    learn = digits([EarlyStopping('accuracy', min_delta=1), cb])
    fit(learn, 5)
    assert len(learn.recorder.values)==2==len(cb.best)

class Cancel(Callback):
    "Cancels epoch 2 with `exc`, in training or in validation"
    order = 20
    def __init__(self, exc, training): self.exc,self.now = exc,training
    def after_batch(self):
        if self.epoch==2 and self.training==self.now: raise self.exc

def values_of(cb, learn, n=6, **kwargs):
    "What `cb` read, by epoch"
    seen,smoothed = {},type(cb)._smoothed
    cb._smoothed = lambda v: seen.setdefault(learn.epoch, smoothed(cb, v))
    fit(learn, n, cbs=cb, **kwargs)
    return seen

def test_after_a_phase_that_was_cut():
    for monitor,i in (('valid_loss',0), ('accuracy',1)):
        learn = digits(ShortEpochCallback(.5, short_valid=False))
        seen = values_of(EarlyStopping(monitor, patience=9), learn)
        assert list(seen.values())==[row[i] for row in learn.recorder.values] and len(seen)==6

cuts = [(CancelEpochException,True), (CancelEpochException,False), (CancelValidException,False)]

@pytest.mark.parametrize('exc,training', cuts)
def test_epochs_that_were_cancelled(exc, training):
    assert list(values_of(EarlyStopping(patience=9), digits(Cancel(exc(), training))))==[0,1,3,4,5]

class ValidatesSometimes(Callback):
    "In every third epoch"
    def __init__(self, order): self.order = order
    def before_validate(self):
        if self.epoch%3!=2: raise CancelValidException

@pytest.mark.parametrize('order', [-20, 49, 70])
def test_validation_every_third_epoch(order):
    "The value of an epoch is not that of the one before"
    assert list(values_of(EarlyStopping(patience=1), digits(ValidatesSometimes(order))))==[2,5]

class Uncopyable:
    def __deepcopy__(self, memo): raise TypeError('not this one')

class Odd(nn.Linear):
    def get_extra_state(self): return self.extra
    def set_extra_state(self, state): self.extra = state

@pytest.mark.parametrize('extra', [dict(a=[1]), Uncopyable()], ids=['any','none'])
def test_best_weights_that_cannot_be_copied(extra):
    "Any object can be, or else it is said once"
    model = digits_model()
    model.odd = Odd(10, 10)
    model.odd.extra = extra
    cb = stops(patience=99)
    learn = digits([cb, log := Seen()], model=model, **high)
    log.after_epoch = lambda: log.weights.append([p.detach().clone() for p in learn.model.parameters()])
    out = fit(learn, 4)
    lost = isinstance(extra, Uncopyable)
    assert len(learn.recorder.values)==4 and out.count('cannot keep the best weights')==lost
    kept = log.weights[-1 if lost else cb.best_epoch]
    assert all(map(torch.equal, learn.model.parameters(), kept))

def test_restore_best_of_a_compiled_model():
    cb = at(restore_best=True, patience=99)
    model = torch.compile(digits_model(), backend='eager')
    score = ValueMetric(lambda: [1,3,2][learn.epoch], 'score')
    learn = digits([cb, log := Seen()], model=model, metrics=score)
    fit(learn, 3)
    assert equal(learn.model.state_dict(), log.weights[1]) and not equal(log.weights[1], log.weights[2])

def test_start_epoch():
    assert list(values_of(EarlyStopping(patience=9), digits(), start_epoch=3))==[3,4,5]

def test_missing_metric():
    learn = digits(EarlyStopping('acuracy'))
    with pytest.raises(ValueError, match="no metric 'acuracy'; there are: train_loss, valid"): fit(learn, 1)

def test_train_loss():
    learn = digits()
    seen = values_of(EarlyStopping('train_loss', patience=9), learn)
    assert list(seen.values())==[row[0] for row in learn.recorder.values]

# Limits
class Skip(Callback):
    "Cancels every third step"
    order = 7
    def __init__(self, exc): self.exc = exc
    def before_step(self):
        if self.train_iter%3==2: raise self.exc

@pytest.mark.parametrize('steps,epoch,batch', [(1,0,0), (3,0,2), (5,0,4), (7,1,1), (10,1,4), (14,2,3)])
def test_step_limit(steps, epoch, batch):
    learn = digits(StepLimit(steps))
    out = fit(learn, 3)
    cb = learn.step_limit
    assert [(r.epoch,r.batch,r.iteration) for r in cb.records]==[(epoch,batch,steps)]
    assert cb.done==steps==len(learn.recorder.losses)
    assert out==f'step_limit: ended the fit in epoch {epoch}, batch {batch}: steps taken: {steps}\n'
    assert [len(o) for o in learn.recorder.values]==[3]*(epoch+1)
    losses = learn.recorder.losses
    assert learn.recorder.values[-1][0]==losses[-1].item()
    plain = digits(Seen())
    fit(plain, 3)
    assert torch.equal(torch.stack(losses), torch.stack(plain.recorder.losses[:steps]))
    if batch!=4: return
    assert learn.recorder.values==plain.recorder.values[:epoch+1]
    assert equal(learn.model.state_dict(), plain.seen.weights[epoch])

def test_last_batch_of_the_fit():
    "Nothing is said, nothing is changed"
    for cb in (StepLimit(15), SampleLimit(480), StopFile('stop'), TimeLimit(minutes=.45)):
        learn = digits([cb, Clock(cb), *[Touch(14)]*isinstance(cb, StopFile)])
        out = fit(learn, 3)
        plain = digits(log := Seen())
        fit(plain, 3)
        assert not out and not cb.records and learn.recorder.values==plain.recorder.values
        assert equal(learn.model.state_dict(), log.weights[-1])

@pytest.mark.parametrize('exc', [CancelStepException(), CancelBatchException()], ids=str)
def test_cancelled_steps_do_not_count(exc):
    learn = digits([StepLimit(6), Skip(exc)])
    fit(learn, 3)
    assert learn.train_iter==8 and learn.step_limit.done==6

def test_accumulation():
    "Steps are those of the optimizer; the limit may end a window"
    learn = digits([StepLimit(3), GradientAccumulation(64)])
    fit(learn, 3)
    assert learn.train_iter==6
    learn = digits([SampleLimit(150), GradientAccumulation(64)])
    fit(learn, 3)
    assert learn.train_iter==5 and learn.sample_limit.done==160

def test_limit_per_fit_or_over_all():
    learn = digits()
    cb = StepLimit(7)
    for _ in range(2):
        fit(learn, 3, cbs=cb)
        assert len(learn.recorder.losses)==7
    cb = StepLimit(7, reset_on_fit=False)
    fit(learn, 3, 'fine_tune', cbs=cb)       # an epoch of 5 batches, and then 3 epochs
    assert len(learn.recorder.losses)==2 and cb.done==7
    weights = {k: v.clone() for k,v in learn.model.state_dict().items()}
    out = fit(learn, 3, cbs=cb)              # nothing left
    assert equal(weights, learn.model.state_dict()) and learn.recorder.values==[]
    assert 'ended the fit in epoch 0: ' in out
    learn = digits()
    fit(learn, 3, 'fine_tune', cbs=StepLimit(7))
    assert len(learn.recorder.losses)==7

def test_two_limits():
    learn = digits([StepLimit(7), SampleLimit(64), cb := StopFile('stop'), TimeLimit(minutes=60)])
    fit(learn, 3)
    assert learn.train_iter==2 and len(learn.sample_limit.records)==1 and not learn.step_limit.records
    fit(learn, 3)
    assert learn.train_iter==2

# what a batch may hold, and the number of items in it
t = torch.zeros
BATCHES = [((t(4,3), t(4)), 4), ((dict(a=t(4,3), b=t(4,7)), t(4)), 4), (([t(4,3), t(4,5)], t(4)), 4),
    ((t(2,7), t(14)), 2), ((t(4,3),), 4), (([t(3,8,8), t(3,9,9)], [dict(box=t(1,4)), dict(box=t(5,4))]), 2),
    ((['a','b','c'],), 3), ((object(),), 9)]

@pytest.mark.parametrize('batch,n', BATCHES, ids=[str(i) for i in range(len(BATCHES))])
def test_items_in_a_batch(batch, n):
    class dl: bs = 9
    assert _n_items(batch, dl)==n

@pytest.mark.parametrize('method,n', [('fit',2), ('fine_tune',1)])
def test_sample_limit_as_people_run_it(method, n):
    "Dicts from a PyTorch loader, fastai's bar and table on"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.l = nn.Linear(3, 1)
        def forward(self, b): return self.l(b['x'])[:,0]
    items = [(dict(x=torch.ones(3)), torch.tensor(1.)) for _ in range(40)]
    dl = torch.utils.data.DataLoader(items, 4)
    limit = SampleLimit(52, reset_on_fit=False)
    learn = Learner(DataLoaders(dl, dl), Net(), loss_func=nn.MSELoss(), cbs=limit)
    with contextlib.redirect_stdout(io.StringIO()): getattr(learn, method)(n)
    assert limit.done==52 and len(learn.recorder.losses)==(13 if method=='fit' else 3)

class After(Callback):
    order = 150
    def __init__(self): self.n = 0
    def after_epoch(self): self.n += 1

def test_what_comes_after_an_epoch():
    "Others see the epoch, and the fit is cancelled after them"
    learn = digits([StepLimit(7), after := After(), save := SaveTopK(k=None, load_best=False)])
    fit(learn, 3)
    assert after.n==2==len(save.best)

def test_cut_by_another():
    "A training phase that another callback has cut keeps fastai's row"
    learn = digits([StepLimit(100), ShortEpochCallback(.5, short_valid=False)])
    fit(learn, 2)
    assert [len(o) for o in learn.recorder.values]==[2,2]

def test_without_a_recorder():
    learn = digits(StepLimit(7))
    learn.remove_cb(learn.recorder)
    learn.remove_cb(learn.progress)
    with learn.no_logging(): learn.fit(3)
    assert learn.train_iter==7

@pytest.mark.parametrize('make', [lambda: StepLimit(7), lambda: SampleLimit(200),
    lambda: TimeLimit(minutes=.3, schedule=True), lambda: stops('accuracy', min_delta=1)])
def test_beside_fast_loop(make):
    def result(*more):
        cb = make()
        learn = digits([cb, Clock(cb), *more])
        out = fit(learn, 4, 'fit_one_cycle', 1e-2)
        rounded = {'losses','values'} if torch.cuda.is_available() else set()      # averaged on the device
        return out,{k: v for k,v in crash.digests(learn).items() if k not in rounded}
    assert result()==result(FastLoop())

# TimeLimit
def times(limit, epochs=4, method='fit', **kwargs):
    "Seconds that the fit took, and its batches"
    learn = digits([limit, clock := Clock(limit, **kwargs), log := Seen()])
    out = fit(learn, epochs, method)
    return clock.seconds-1000,learn.train_iter,log,learn,out

@pytest.mark.parametrize('seconds', range(4, 36, 2))
def test_in_time(seconds):
    "Never late once validation was seen, and no batch is left out for which there was time"
    # an epoch: 5 s, and 4 s of validation, estimated as 2 s
    took,batches,_,learn,out = times(TimeLimit(minutes=seconds/60))
    free = lambda s: s//9*5+min(max(s%9-4, 0), 5)      # batches that fit in
    rows = learn.recorder.values
    assert all(len(o)==3 for o in rows)
    if seconds>=9: assert took<=seconds and batches==free(seconds) and took>seconds-5
    else: assert took<=seconds+2 and batches==min(seconds-2, 5)         # by the estimate
    assert out.count('ended the fit')==1

def test_enough_time():
    for seconds in (36, 100):
        took,batches,_,_,out = times(TimeLimit(minutes=seconds/60))
        assert took==36 and batches==20 and not out

def test_epochs_of_one_batch():
    "Nothing but first batches: they tell how long the next one takes"
    limit = TimeLimit(minutes=1)
    learn = digits_learner([limit, clock := Clock(limit, train=20., valid=1.)], n=20, bs=16)
    out = fit(learn, 9)
    assert learn.train_iter==2 and clock.seconds-1000<=60 and out.count('ended the fit')==1
    for minutes in (0, .1, 1):
        learn = digits_learner([limit := TimeLimit(minutes=minutes), Clock(limit, train=20.)], n=20, bs=16)
        assert fit(learn, 1).count('ended the fit')==(minutes==0) and learn.train_iter==(minutes>0)

def test_longest_validation_counts():
    "The second epoch's validation takes three times as long"
    took,batches,_,learn,_ = times(TimeLimit(minutes=1), 9, slow={1: 3})
    assert learn.time_limit.closing==12 and took<=60 and took>60-12-1-5

class AfterAll(Callback):
    "Takes 3 s after each epoch, after all others, and notes what a checkpoint would have there"
    order = 2500
    def __init__(self, limit): self.limit,self.used = limit,[]
    def after_epoch(self):
        self.used.append((self.limit.state_dict()['used'], self.clock.seconds-1000))
        self.clock.seconds += 3

def test_time_after_an_epoch():
    "Counted: in the state, and in what it takes to close the next one. An epoch is 5 + 4 + 3 s"
    for seconds,batches in ((16, 5), (20, 6), (32, 11)):
        limit = TimeLimit(minutes=seconds/60)
        learn = digits([limit, clock := Clock(limit), after := AfterAll(limit)])
        fit(learn, 9)
        assert learn.train_iter==batches and clock.seconds-1000<=seconds
        assert after.used and all(used==seen for used,seen in after.used)

class Cancelled(Callback):
    n = 0
    def after_cancel_train(self): self.n += 1

def test_nothing_is_cancelled_at_the_end_of_an_epoch():
    for steps,n in ((9,1), (10,0)):
        fit(digits([StepLimit(steps), cancelled := Cancelled()]), 3)
        assert cancelled.n==n

def test_reserve(): assert times(TimeLimit(minutes=1, reserve=.5), 9)[1]==times(TimeLimit(minutes=.5), 9)[1]

evening = datetime(2026, 11, 24, 17, 58)

@pytest.fixture
def at_evening(monkeypatch): monkeypatch.setattr(TimeLimit, 'now', staticmethod(lambda: evening))

soon = (evening+timedelta(minutes=1)).astimezone()

@pytest.mark.parametrize('deadline,seconds', some([('18:00',120), ('18:00:30',150), ('2026-11-24 18:00',120),
    ('2026-11-24T17:59',60), (datetime(2026,11,24,17,59,30),90), (soon,60),
    (soon.astimezone(timezone(timedelta(hours=9))).isoformat(),60), ('17:58',86400),
    ('00:00',6*3600+120)], 6), ids=str)
def test_deadline(at_evening, deadline, seconds):
    limit = TimeLimit(deadline=deadline)
    n = 30 if seconds>1000 else 1000
    took,batches,_,_,out = times(limit, n//9+1, train=seconds/100, valid=seconds/100)
    assert seconds*.96<=took<=seconds*1.0001 if n==1000 else not out
    assert ('the fit must end by 20' in out)==(n==1000)

def test_deadline_is_past(at_evening):
    took,batches,log,learn,out = times(TimeLimit(deadline='2026-11-24 17:00'))
    assert took==batches==0
    assert 'ended the fit in epoch 0: the fit must end by 2026-11-24 17:00' in out

@pytest.mark.parametrize('text', ['tomorrow', '25:00', '2026-13-01', ''])
def test_wrong_deadline(text):
    with pytest.raises(ValueError, match=f'deadline={text!r}: expected'): TimeLimit(deadline=text)

@pytest.mark.parametrize('args', [{}, dict(minutes=1, deadline='18:00')], ids=str)
def test_one_of_two(args):
    with pytest.raises(ValueError, match='expected one of the two'): TimeLimit(**args)

@settings(max_examples=8 if every_case else 4, deadline=None, derandomize=True)
@given(st.floats(.7, 1.5), st.floats(.5, 2), st.floats(.1, 3),
       st.dictionaries(st.integers(0, 7), st.floats(.3, 3), max_size=3))
def test_schedule(minutes, train, valid, slow):
    "Never back; never behind fastai's; at its end when the time is up"
    limit = TimeLimit(minutes=minutes, schedule=True)
    took,batches,seen,learn,out = times(limit, 8, 'fit_one_cycle', train=train, valid=valid, slow=slow)
    pcts,own = seen.pcts,[i/40 for i in range(batches)]
    assert all(a<=b+1e-9 for a,b in zip(pcts, pcts[1:])) and max(pcts)<=1
    assert all(p>=o-1e-9 for p,o in zip(pcts, own))
    if not out: assert batches==40
    elif batches>10: assert pcts[-1]>.85

@pytest.mark.parametrize('minutes', [.75, 1, 1.5])
def test_schedule_ends(minutes):
    "An epoch is 5 s and 2 s of validation: when the last batch begins, its share of the schedule is left"
    _,_,seen,learn,out = times(TimeLimit(minutes=minutes, schedule=True), 30, 'fit_one_cycle', valid=1.)
    pcts = np.array(seen.pcts)
    assert out and 1-pcts[-1]<4/(60*minutes) and learn.recorder.lrs[-1]<.02*max(learn.recorder.lrs)
    steps = np.diff(pcts)[:-4]
    assert (steps[1:]<1.5*steps[:-1]).all(), 'a jump, as at a validation for which it does not stand still'

def test_schedule_that_is_overtaken():
    "A slow first epoch hurries it; the others are quick: it waits for fastai's, and ends with it"
    _,batches,seen,_,out = times(TimeLimit(minutes=2, schedule=True), 8, 'fit_one_cycle', slow={0: 4})
    own = np.arange(40)/40
    ahead = np.array(seen.pcts)-own
    assert not out and batches==40 and ahead[5]>.05 and ahead[20:]==pytest.approx(0, abs=1e-9)

def test_schedule_of_a_quick_fit_is_the_same():
    limit = TimeLimit(minutes=60, schedule=True)
    learn = times(limit, 4, 'fit_one_cycle')[3]
    got = crash.digests(learn)
    plain = digits()
    fit(plain, 4, 'fit_one_cycle')
    assert got==crash.digests(plain)

# Going on
def case(make, epochs=6, how='fit_one_cycle'):
    def f():
        learn = digits(make())
        return learn,lambda cb: getattr(learn, how)(epochs, .2, cbs=cb)
    return f

CASES = {
    'early': case(lambda: [stops(patience=2)], 12),
    'smooth': case(lambda: [stops('accuracy', patience=2, min_delta=.05, smooth=.5)], 12),
    'steps': case(lambda: [stops('accuracy', patience=8, min_delta=.3, unit='steps')], 12),
    'best': case(lambda: [stops('train_loss', np.greater, patience=99)], 6, 'fit'),
    'step limit': case(lambda: [StepLimit(18)]),
    'skipped': case(lambda: [StepLimit(12), Skip(CancelStepException())]),
    'samples': case(lambda: [SampleLimit(18*32)])}

@pytest.mark.parametrize('name', CASES)
def test_goes_on(name):
    "Killed somewhere, the next run ends in the same batch with the same bits"
    want,out,events = run(CASES[name])
    said = [o for o in out.splitlines() if 'stopping:' in o or 'limit:' in o]
    assert said
    for n in some((events//3, events-20), 1 + (name=='early')):
        assert run(CASES[name], Checkpoint(f'run-{n}', steps=3), stop=n)[0] is None
        got,out,_ = run(CASES[name], Checkpoint(f'run-{n}', steps=3))
        assert got==want and [o for o in out.splitlines() if 'stopping:' in o or 'limit:' in o]==said, n
        got,out,_ = run(CASES[name], Checkpoint(f'run-{n}', steps=3))
        assert got==want and 'found the fit finished' in out

class Late(Callback):
    "Takes its time at the start of a fit"
    order = 1950
    def __init__(self, clock, seconds): self.clock,self.seconds = clock,seconds
    def before_fit(self): self.clock.seconds += self.seconds

@pytest.mark.parametrize('schedule,late', [(True,0), (False,20)])
def test_time_goes_on(schedule, late):
    "The time of all runs counts, what it took to go on too, not what lay between; and since the checkpoint"
    clocks = []
    def make():
        limit = TimeLimit(minutes=2, schedule=schedule)
        clocks.append(Clock(limit))
        clocks[-1].seconds = 10**5*len(clocks)       # other machines
        return [limit, clocks[-1], Late(clocks[-1], late)]
    f = case(make, 30)
    want,out,events = run(f)
    took = clocks[-1].seconds%10**5
    assert 115<=took<=120
    for n in (events*2//3,):
        run(f, Checkpoint(f'run-{n}', steps=1, background=False), stop=n)
        first = clocks[-1].seconds%10**5
        got,out,_ = run(f, Checkpoint(f'run-{n}', steps=1, background=False))
        assert 113<=first+clocks[-1].seconds%10**5<=125 and out.count('ended the fit')==1
        if not late: assert (got['values'],got['lrs'])==(want['values'],want['lrs'])

def test_schedule_goes_on():
    "Also where fastai's schedule is about to overtake the hurried one"
    def make():
        limit = TimeLimit(minutes=2, schedule=True)
        return [limit, Clock(limit, slow={0: 4})]
    clocks = []
    def going_on():      # the clock of the machine goes on
        limit,clock = make()
        clock.seconds = clocks[-1].seconds if clocks else 1000.
        clocks.append(clock)
        return [limit, clock]
    want,_,events = run(case(make, 8))
    for n in some(range(events*2//8, events*4//8, 50), 2):
        clocks.clear()
        run(case(going_on, 8), Checkpoint(f'run-{n}', steps=1, background=False), stop=n)
        got = run(case(going_on, 8), Checkpoint(f'run-{n}', steps=1, background=False))[0]
        assert got['lrs']==want['lrs'], n

def test_patience_in_minutes_goes_on():
    clocks = []
    def make():
        cb = EarlyStopping('accuracy', min_delta=1, patience=.5, unit='minutes')
        clocks.append(Clock(cb))
        return [cb, clocks[-1]]
    want,_,events = run(case(make, 12))
    for n in some((events//4, events*2//3), 1):
        run(case(make, 12), Checkpoint(f'run-{n}', steps=1), stop=n)
        assert run(case(make, 12), Checkpoint(f'run-{n}', steps=1))[0]['values']==want['values']

# StopFile
class Touch(Callback):
    order = -5
    def __init__(self, batch, path='stop'): self.batch,self.path = batch,Path(path)
    def before_batch(self):
        if self.training and self.train_iter==self.batch: self.path.touch()

@pytest.mark.parametrize('every,batches', [(1,7), (4,8), (3,9), (100,10)])
def test_stop_file(every, batches):
    "Looked for after every n-th batch, and at the end of an epoch"
    learn = digits([StopFile('stop', every=every), Touch(6)])
    out = fit(learn, 3)
    assert learn.train_iter==batches and not Path('stop').exists() and out.count('found the file stop')==1
    assert [len(o) for o in learn.recorder.values]==[3,3]

def test_stop_file_of_another_run():
    Path('stop').touch()
    learn = digits(StopFile(Path('stop')))
    out = fit(learn, 2)
    assert learn.train_iter==10 and not Path('stop').exists() and out.count('removed a file')==1

def test_a_stop_file_that_cannot_be_removed():
    "It ends one fit, and is ignored until it is gone; what lay there before the run ends none"
    Path('stop/x').mkdir(parents=True)
    learn = digits(cb := StopFile('stop'))
    out = fit(learn, 2)
    assert len(learn.recorder.values)==2 and out.count('could not remove a file')==1 and 'ended' not in out
    Path('stop/x').rmdir(), Path('stop').rmdir()
    class Mkdir(Callback):
        def after_batch(self):
            if self.training and self.train_iter==2: Path('stop/x').mkdir(parents=True)
    out = fit(learn, 2, cbs=Mkdir())
    assert len(learn.recorder.values)==1
    assert out.count('ended the fit')==1==out.count('could not remove a file')
    assert not fit(learn, 2) and len(learn.recorder.values)==2

def test_stop_file_between_fits():
    "Made in the last batch of the first fit, it ends the second"
    learn = digits(cb := StopFile('stop'))
    fit(learn, 1, cbs=Touch(4))
    assert Path('stop').exists() and not cb.records
    fit(learn, 1)
    assert not Path('stop').exists() and learn.recorder.values==[]
    fit(learn, 1)
    assert len(learn.recorder.values)==1

def test_stop_file_outside_a_fit():
    learn = digits(StopFile('stop'))
    Path('stop').touch()
    with quiet(learn):
        learn.validate()
        learn.get_preds()
        learn.lr_find(show_plot=False, num_it=3, suggest_funcs=None)
    assert Path('stop').exists()

@pytest.mark.parametrize('make', [lambda: EarlyStopping(threshold=-1., divergence=1e9), lambda: StepLimit(1),
    lambda: SampleLimit(1), lambda: TimeLimit(minutes=0)])
def test_outside_a_fit(make):
    cb = make()
    learn = digits(cb)
    with quiet(learn):
        learn.validate()
        learn.get_preds()
        learn.lr_find(show_plot=False, num_it=4, suggest_funcs=None)
    assert len(learn.recorder.losses)>=4 and not cb.records
    pickle.loads(pickle.dumps(cb))

def test_schedule_by_a_real_clock():
    "With time enough it begins at the beginning, and learns as without"
    learn = digits_learner([TimeLimit(minutes=60, schedule=True)], n=300, bs=32)
    with quiet(learn): learn.fit_one_cycle(2, 1e-2)
    rates = learn.recorder.hps['lr'] if hasattr(learn.recorder, 'hps') else learn.recorder.lrs
    assert max(rates)==pytest.approx(1e-2, rel=.2) and rates[0]<max(rates)/2

def test_the_best_belongs_to_one_model():
    "`reset_on_fit=False` in a second learner: its weights stay its own"
    cb = EarlyStopping(patience=9, restore_best=True, reset_on_fit=False)
    first = digits_learner(n=160, bs=32)
    with quiet(first): first.fit(2, 1e-2, cbs=cb); first.fit(1, 1e-2, cbs=cb)
    best = cb.best
    second = digits_learner(n=160, bs=32, model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with quiet(second): second.fit(1, 1e-9, cbs=cb)
    assert cb.best==second.recorder.values[0][1]!=best

def test_nothing_to_follow(capsys):
    learn = digits_learner([EarlyStopping()], n=160, bs=32)
    learn.dls.valid = learn.dls.valid.new([])
    with quiet(learn): learn.fit(2)
    assert 'had no metric to watch' in capsys.readouterr().out
