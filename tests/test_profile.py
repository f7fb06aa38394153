"`profile_callbacks` finds what was planted, changes nothing, and leaves nothing"
import pickle

import pytest, torch
from fastai.callback.core import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
                                  CancelStepException)
from fastai.learner import Learner, load_learner
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.base.calls import CallTimes, call_times
from fastai_callbacks_ext.tracing import _of_batch
from common import EXACT, fit, learner, quiet

class Clock:
    "Goes on only when it is told to, or by `tick` each time that it is read"
    def __init__(self, tick=0.): self.now,self.tick = 0.,tick
    def __call__(self):
        self.now += self.tick
        return self.now

class Planted(Callback):
    "Takes some seconds in some events; may raise in one"
    order = 55
    def __init__(self, clock, raises=None, **seconds):
        self.clock,self.raises,self.seconds = clock,raises or {},seconds
        for o in {*seconds, *self.raises}: setattr(self, o, self.act(o))
    def act(self, event_name):
        def f():
            self.clock.now += self.seconds.get(event_name, 0)
            if event_name in self.raises: raise self.raises[event_name]
        return f

class Waits(ext.ExtCallback):
    "Ours, with methods of its class"
    order = 56
    def __init__(self, clock): self.clock = clock
    def after_batch(self): self.clock.now += .5
    def after_epoch(self): self.clock.now += 8

loops = pytest.mark.parametrize('loop', [[], [ext.FastLoop]], ids=['plain','fast'])

def profiled(learn, clock, n=2):
    "A table by callback, event and phase, and the profile"
    with ext.profile_callbacks(learn, clock) as prof: fit(learn, n)
    return prof.table().set_index(['callback','event','during']),prof

@loops
def test_finds_what_was_planted(loop):
    "4 batches of training and 1 of validation in each of 2 epochs"
    clock = Clock()
    slow = Planted(clock, after_batch=2, before_validate=4, before_backward=.25)
    table,prof = profiled(learner(cbs=[slow, Waits(clock), *[o() for o in loop]]), clock)
    want = {('Planted','after_batch','train'): (8, 16), ('Planted','after_batch','valid'): (2, 4),
            ('Planted','before_validate',''): (2, 8), ('Planted','before_backward','train'): (8, 2),
            ('Waits','after_batch','train'): (8, 4), ('Waits','after_batch','valid'): (2, 1),
            ('Waits','after_epoch',''): (2, 16)}
    found = {k: (o.calls, o.seconds) for k,o in table.iterrows() if o.seconds}
    assert found==want and prof.times.elapsed()==sum(s for _,s in want.values())
    assert table.percent.sum()==pytest.approx(100) and prof.table().seconds.is_monotonic_decreasing
    row = table.loc['Waits','after_epoch','']
    assert row.us_per_call==8e6 and row.raised==0

def test_the_fast_loop_makes_fewer_calls():
    "Those of its own table are timed, and not fastai's instead"
    plain,_ = profiled(learner(), Clock())
    fast,prof = profiled(learner(ext.FastLoop), Clock())
    silent = lambda t: t[t.index.get_level_values('event')=='no method'].calls.sum()
    assert silent(plain)>4*silent(fast)
    for o in ('Recorder','TrainEvalCallback'): assert fast.loc[o,'after_batch','train'].calls==8
    assert prof.times.rows['Recorder','after_batch','valid'].calls==2

@loops
def test_same_bits(loop):
    want = fit(learner(*loop), 2)
    learn = learner(*loop)
    profiled(learn, Clock(.1))
    for p,q in zip(learn.model.parameters(), want.model.parameters()): assert torch.equal(p, q)
    values = [torch.tensor(o.recorder.values) for o in (learn, want)]
    torch.testing.assert_close(*values, **EXACT)

class Broken(Exception): pass
ENDS = dict(batch=CancelBatchException, step=CancelStepException, epoch=CancelEpochException,
            fit=CancelFitException, error=Broken, interrupt=KeyboardInterrupt)

@loops
@pytest.mark.parametrize('how', ENDS)
def test_exceptions_pass_and_are_counted(how, loop):
    where = 'before_step' if how=='step' else 'after_loss'
    def run(profile):
        clock = Clock()
        raises = {where: ENDS[how]('broken')}
        learn = learner(cbs=[Planted(clock, raises), *[o() for o in loop]])
        cls,attrs = type(learn),{k for k in vars(learn) if callable(vars(learn)[k])}
        try:
            if profile: table = profiled(learn, clock)[0]
            else: fit(learn, 2)
            said = ''
        except (Broken, KeyboardInterrupt) as e: said = f'{type(e).__name__} {e}'
        assert type(learn) is cls and call_times(learn) is None
        assert {k for k in vars(learn) if callable(vars(learn)[k])}<=attrs
        if profile and not said: assert table.loc['Planted',where,'train'].raised>0
        return said,learn.train_iter,learn.recorder.values
    assert str(run(True))==str(run(False))

def test_a_call_inside_a_call():
    "The validation that a callback starts is not its own time"
    clock = Clock()
    class Validates(ext.ExtCallback):
        def after_fit(self):
            clock.now += 1
            with self.learn.no_logging(): self.learn._do_epoch_validate()
    table,prof = profiled(learner(cbs=[Validates(), Planted(clock, after_batch=2)]), clock, 1)
    assert table.loc['Validates','after_fit',''].seconds==1
    assert table.loc['Planted','after_batch','valid'].calls==2 and prof.times.elapsed()==1+6*2

def test_its_own_cost_is_taken_off():
    "A clock that goes on by 1 s each time that it is read"
    clock = Clock(1.)
    _,prof = profiled(learner(cbs=Planted(clock, after_epoch=100)), clock, 1)
    times = prof.times
    assert (times.inside, times.own)==(1, pytest.approx(2, abs=.1))
    assert prof.table().seconds.sum()==pytest.approx(100)
    assert times.elapsed()==pytest.approx(100, rel=.2) and 's more' in repr(prof)

def test_two_of_a_class_and_those_that_come_in_a_fit():
    clock = Clock()
    learn = learner(cbs=[Planted(clock, after_fit=1)])
    with ext.profile_callbacks(learn, clock) as prof:
        with quiet(learn): learn.fit(1, cbs=Planted(clock, after_batch=3))
    seconds = prof.table().groupby('callback').seconds.sum()
    assert (seconds['Planted'], seconds['Planted (2)'])==(1, 15)

@loops
def test_timeline_is_of_a_batch_of_median_length(loop):
    clock = Clock()
    class Longer(Callback):
        order = 70
        def after_batch(self): clock.now += 1+self.iter
    cbs = [Longer(), Planted(clock, before_batch=10), *[o() for o in loop]]
    _,prof = profiled(learner(cbs=cbs), clock, 1)
    calls = [o for o in _of_batch(prof.times) if o[3]]
    assert calls==[('Planted','before_batch',0,10_000),('Longer','after_batch',10_000,2000)]
    axs = prof.plot(most=1)
    assert [o.get_text() for o in axs[0].get_yticklabels()][:2]==['before_batch','after_batch']
    assert 'others' in [o.get_text() for o in axs[0].figure.legends[0].get_texts()]

def test_nothing_to_show():
    with ext.profile_callbacks(learner(), Clock()) as prof: pass
    assert len(prof.table())==0 and '0 s in callbacks' in repr(prof) and len(prof.plot())==2

def test_shows_the_most_expensive():
    _,prof = profiled(learner(cbs=Planted(clock := Clock(), after_batch=1)), clock, 1)
    assert repr(prof).splitlines()[1].split()[:4]==['Planted','after_batch','train','4']
    assert ' more rows: 0.0000 s.' in repr(prof)
    assert repr(prof).splitlines()[-1].startswith('5 s in callbacks')
    assert prof._repr_markdown_().startswith('| callback | event |')

def test_only_one_at_a_time_and_no_loop_of_ones_own():
    learn = learner()
    with ext.profile_callbacks(learn), pytest.raises(ValueError, match='timed already'):
        with ext.profile_callbacks(learn): pass
    class Mine(Learner):
        def _call_one(self, event_name): super()._call_one(event_name)
    learn.__class__ = Mine
    with pytest.raises(ValueError, match='Mine has its own _call_one'):
        with ext.profile_callbacks(learn): pass
    assert call_times(learn) is None

def test_a_copy_is_not_timed(tmp_path):
    learn = learner(ext.FastLoop, path=tmp_path)
    class MidFit(Callback):
        order = 90
        def after_epoch(self): self.learn.export('mid.pkl')
        def __reduce__(self): return Callback,()
    learn.add_cb(MidFit())
    with ext.profile_callbacks(learn, Clock()) as prof: fit(learn)
    calls = prof.times.calls()
    loaded = load_learner(tmp_path/'mid.pkl', cpu=not torch.cuda.is_available())
    with quiet(loaded): loaded.get_preds(dl=learn.dls.valid)
    assert call_times(loaded) is None and prof.times.calls()==calls
    fit(learn)
    assert prof.times.calls()==calls and type(learn) is Learner

def test_one_that_begins_in_mid_fit_and_ends_with_the_loop_running():
    "From the next phase on"
    class Begins(Callback):
        order = 5000
        def after_batch(self):
            if self.training and self.iter==2 and self.epoch==0: self.times = CallTimes(self.learn).open()
            if self.training and self.iter==2 and self.epoch==1: self.times.close()
    learn = fit(learner(ext.FastLoop, cbs=[Begins(), ext.FastLoop()]), 3)
    rows = learn.begins.times.rows
    assert rows['Recorder','after_batch','train'].calls==3 and call_times(learn) is None
