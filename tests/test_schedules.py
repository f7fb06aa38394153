"`ReduceLROnPlateau` and `Multiplier`: the rate is that of the schedule times a factor, whatever runs beside"
from functools import partial

import numpy as np
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.tracker import ReduceLROnPlateau as FastaisReduceLROnPlateau
from fastai.metrics import AvgMetric
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.hypers import Multiplier
from common import fit, learner

class Played(AvgMetric):
    "A metric with given values, one an epoch"
    def __init__(self, values): self.values,self.n = values,0
    def reset(self): pass
    def accumulate(self, learn): pass
    @property
    def value(self): return self.values[min(self.owner.epoch, len(self.values)-1)]
    @property
    def name(self): return 'played'

def played(values, *cbs, n=None, method='fit', **kwargs):
    "A fit in which the metric has these `values`"
    learn = learner(cbs=[*cbs], metrics=Played(values), **kwargs)
    learn.metrics[0].owner = learn
    return fit(learn, n or len(values), method)

def scales(learn, plain):
    "How far the rate of each batch is from the plain schedule, one number an epoch"
    ratio = np.array(learn.recorder.lrs)/np.array(plain.recorder.lrs)
    ratio = ratio.reshape(len(learn.recorder.values), -1)
    assert np.allclose(ratio, ratio[:,:1], rtol=1e-12)
    return ratio[:,0]

OPTS = {'fastai': Adam, 'wrapper': partial(OptimWrapper, opt=torch.optim.AdamW)}

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('method', ['fit','fit_one_cycle','fit_flat_cos'])
@pytest.mark.parametrize('cbs', [list, lambda: [FastLoop()], lambda: [GradientAccumulation(64)]])
def test_the_rate_is_schedule_times_scale(opt, method, cbs):
    "A plateau after the second value: divided after the third epoch, and after the fifth"
    values,cb = [3.,2.,2.,2.,2.],ReduceLROnPlateau('played', comp=np.less, patience=1, factor=4.)
    how = dict(method=method, opt_func=OPTS[opt], n=6)
    plain,learn = played(values, *cbs(), **how),played(values, cb, *cbs(), **how)
    assert np.allclose(scales(learn, plain), [1,1,1,1/4,1/16,1/64], rtol=1e-6)
    assert cb.reductions==3     # none after the last epoch
    assert [h['lr'] for h in learn.opt.hypers]==[h['lr'] for h in plain.opt.hypers]
    assert not any(type(o).__module__.endswith('base.hypers') for o in learn.cbs)

class StepSizes(Callback):
    "The rates that steps of SGD without momentum were taken with"
    order = 3000
    def before_fit(self): self.p,self.lrs = next(self.model.parameters()),[]
    def before_step(self): self.was,self.grad = self.p.data.clone(),self.p.grad.clone()
    def after_step(self): self.lrs.append(((self.was-self.p.data)/self.grad).median().item())

def test_the_step_uses_the_reduced_rate():
    how = dict(opt_func=partial(SGD, mom=0.), lr=1e-2)
    learn = played([2.]*3, ReduceLROnPlateau('played', comp=np.less), sizes := StepSizes(), **how)
    assert np.allclose(sizes.lrs, learn.recorder.lrs, rtol=1e-2)
    assert np.allclose(scales(learn, played([2.]*3, **how)), [1,1,.1])

@pytest.mark.parametrize('kwargs,expected', [
    (dict(patience=1), [1,1,.1,.01,.001]), (dict(patience=2), [1,1,1,.1,.1]),
    (dict(patience=1, cooldown=1), [1,1,.1,.1,.01]), (dict(patience=1, warmup=2), [1,1,1,.1,.01]),
    (dict(patience=4, unit='steps'), [1,1,.1,.01,.001]), (dict(patience=8, unit='steps'), [1,1,1,.1,.1]),
    (dict(patience=1, min_lr=2e-4), [1,1,.1,.02,.02]), (dict(patience=0), [1,1,.1,.01,.001])])
def test_when_it_reduces(kwargs, expected):
    "The metric never improves; an epoch has 4 batches"
    cb = ReduceLROnPlateau('played', comp=np.less, **kwargs)
    learn,plain = (played([2.]*5, *cbs, lr=1e-2) for cbs in ([cb], []))
    assert np.allclose(scales(learn, plain), expected)
    assert cb.reductions==len({*expected})-1        # at `min_lr` there are no more

@pytest.mark.parametrize('kwargs,values,n', [
    (dict(min_delta=.5), [3.,2.6,2.4,1.8], 1), (dict(min_delta=.1, relative=True), [3.,2.8,2.6,2.2], 1),
    ({}, [float('nan')]*4, 4), ({}, [3.,float('inf'),2.,1.], 1), ({}, [3.,2.,1.,.5], 0)])
def test_what_is_an_improvement(kwargs, values, n):
    played(values, cb := ReduceLROnPlateau('played', comp=np.less, **kwargs), n=5)
    assert cb.reductions==n

def test_both_fits_of_fine_tune_and_a_second_fit_begin_with_the_schedule():
    values = [2.]*4
    learn = played(values, cb := ReduceLROnPlateau('played', comp=np.less), n=3, method='fine_tune')
    plain = played(values, n=3, method='fine_tune')
    assert np.allclose(scales(learn, plain), [1,1,.1])
    fit(learn, 2)
    assert cb.reductions==0 and cb.scale==1.

def test_it_goes_on_from_the_best_weights():
    kept = {}
    class Keep(Callback):
        order = 61
        def before_train(self): self.keep('begin')
        def after_epoch(self): self.keep('end')
        def keep(self, when): kept[when,self.epoch] = [p.data.clone() for p in self.model.parameters()]
    cb = ReduceLROnPlateau('played', comp=np.less, patience=2, restore_best=True)
    played([3.,1.,2.,2.], cb, Keep(), n=5)
    same = lambda a,b: all(map(torch.equal, kept[a], kept[b]))
    assert same(('begin',4), ('end',1)) and not same(('begin',3), ('end',1))

@pytest.mark.parametrize('method', ['fit','fit_one_cycle'])
def test_a_resumed_run_goes_on_with_its_scale(tmp_path, method):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.epoch==3 and self.iter==1: raise KeyboardInterrupt
    def run(*cbs):
        return played([2.]*5, ReduceLROnPlateau('played', comp=np.less), *cbs, method=method)
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Stop(), Checkpoint(tmp_path, steps=1))
    resumed = run(Checkpoint(tmp_path, steps=1))
    assert resumed.recorder.lrs==whole.recorder.lrs
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))

class Times(Multiplier):
    def __init__(self, m, *scales): self.m,self.scales = m,scales
    def multipliers(self, name, values): return [self.m]*len(values)

def test_several_multiply_and_any_can_be_taken_off():
    class Off(Callback):
        def after_epoch(self):
            if self.epoch==0: self.learn.remove_cb(second)
    first,second = Times(.5, 'lr'),Times(.1, 'lr', 'wd')
    learn,plain = (fit(learner(cbs=cbs), 2, 'fit_one_cycle') for cbs in ([first, second, Off()], []))
    assert np.allclose(scales(learn, plain), [.05,.5])
    assert learn.opt.hypers[-1]['wd']==plain.opt.hypers[-1]['wd']

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_backward','after_batch'])
def test_an_error_leaves_the_rate_of_the_schedule(event):
    class Fail(Callback):
        order = 70
        def __call__(self, name):
            if name==event and self.training and self.train_iter>=2: raise KeyboardInterrupt
    learn = learner(cbs=[Times(.5, 'lr'), Fail()])
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, lr=1e-2)
    assert {h['lr'] for h in learn.opt.hypers}=={1e-2}

@pytest.mark.parametrize('kwargs,message', [
    (dict(factor=.1), 'factor=0.1: the rate is divided by it; expected more than 1'),
    (dict(unit='batches'), "unit='batches': expected 'epochs' or 'steps'"),
    (dict(patience=-1), 'patience=-1'), (dict(min_lr=-1), 'min_lr=-1')])
def test_refused(kwargs, message):
    with pytest.raises(ValueError) as e: ReduceLROnPlateau(**kwargs)
    assert message in str(e.value)

def test_upgrade_swaps_fastais():
    learn = learner(cbs=FastaisReduceLROnPlateau(patience=2, factor=3., min_lr=1e-6, min_delta=.1))
    cb = next(o for o in upgrade(learn).cbs if isinstance(o, ReduceLROnPlateau))
    assert (cb.patience,cb.factor,cb.min_lr,cb.min_delta)==(2,3.,1e-6,.1)
