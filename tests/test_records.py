"`tell` says where the run is, in each event: no number is left of an earlier fit or of a pass in between"
import pytest
from fastai.basics import Callback, Learner
from fastai.callback.core import (CancelBackwardException, CancelBatchException, CancelEpochException,
                                  CancelStepException, CancelTrainException)
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.base.core import ExtCallback
from fastai_callbacks_ext.test_utils import digits_learner
from common import fit
from test_kept import LOOKS, Look
from test_layers import scaler

class Truth(Learner):
    "Knows the training batch that it is in, how many are done, which epoch it is"
    at,done,nth,fits = None,0,0,False
    def _with_events(self, f, event_type, *args):
        was = self.at
        if event_type=='batch': self.at = self.iter if self.dl is self.dls.train else None
        try: super()._with_events(f, event_type, *args)
        finally: self.at = was

class Tells(ExtCallback):
    "In each event"
    run_outside = True
    def __init__(self, order): self.order,self.seen = order,[]
    def __call__(self, event_name):
        if event_name=='after_fit': self.note(event_name)
        super().__call__(event_name)
        if event_name=='before_fit': self.at_end(self.note, 'at the end')
        if event_name!='after_fit': self.note(event_name)
    def note(self, event_name):
        learn,look = self.learn,bool(Look.looking)
        if not getattr(learn, 'fits', False): return
        r = self.tell('was in', event_name)
        if event_name=='before_fit' and not look: learn.done = learn.nth = 0
        if event_name=='before_epoch' and not look: learn.nth = learn.epoch
        want = learn.nth,None if look else learn.at
        self.seen.append((event_name, look, (r.epoch, r.batch), want, r.iteration, learn.done))

class Counts(Callback):
    "Just after fastai has counted"
    order,run_valid = -9.5,False
    def after_batch(self):
        if not Look.looking: self.learn.done += 1

class Cancels(Callback):
    "Of each kind one"
    order,run_valid = 30,False
    def _cancel(self, n, ex):
        if self.train_iter==n and not Look.looking: raise ex
    def before_batch(self): self._cancel(1, CancelBatchException)
    def before_backward(self): self._cancel(2, CancelBackwardException)
    def before_step(self): self._cancel(3, CancelStepException)
    def after_loss(self): self._cancel(6, CancelTrainException)
    def after_pred(self): self._cancel(9, CancelEpochException)

SETTINGS = dict(plain=[], fast=[ext.FastLoop], cancels=[Cancels], fast_cancels=[ext.FastLoop, Cancels],
                pieces=[lambda: ext.MicroBatch(10)], twice=[ext.SAM],
                window=[lambda: ext.GradientAccumulation(64)],
                scaler=[scaler], looks=[lambda: Look(LOOKS['validate'], at=3, order=5)],
                other_looks=[lambda: Look(LOOKS['predictions'], 'after_epoch', 1), ext.FastLoop])

@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('order', [-30, 0, 2000])
@pytest.mark.parametrize('method', ['fit','fine_tune'])
def test_where_the_run_is(setting, order, method):
    "In all events of two fits, with a validation and a finder before them"
    cbs = [make() for make in SETTINGS[setting]]+[Counts(), cb := Tells(order)]
    learn = digits_learner(cbs, n=160, bs=32)
    learn.__class__ = Truth
    for _ in range(2):
        Look.looking.append('outside')
        with learn.no_bar(), learn.no_logging():
            learn.validate()
            learn.lr_find(num_it=7, show_plot=False, suggest_funcs=None)
        Look.looking.clear()
        learn.fits = True
        fit(learn, 2, method)
        learn.fits = False
    assert len({o[0] for o in cb.seen})>15
    for event_name,look,said,want,n,done in cb.seen:
        assert said==want, (event_name, look)
        if event_name!='after_batch' or look: assert n==done, (event_name, look)

def test_a_state_is_a_copy_and_keeps_what_is_the_same():
    class Lists(ExtCallback): fit_state = dict(a=[1,.5], b=None, c=[1,[2]])
    cb = Lists()
    cb.b = cb.a
    state = cb.state_dict()
    assert state['a'] is state['b'] and state['a'] is not cb.a and state['c'][1] is not cb.c[1]
    cb.a.append(3)
    assert state['a']==[1,.5]
