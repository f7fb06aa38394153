"`Schedule`: its phases are the formulas, over the steps that a fit takes; it multiplies, resumes, pickles"
import copy, json, pickle
from functools import partial
from math import cos, pi, sqrt

import numpy as np
import pytest, torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.schedules import _AnyFit, _Curve, _filled
from fastai_callbacks_ext.test_utils import digits_learner
from hypothesis import given, settings, strategies as st
from common import fit, learner

OPTS = {'fastai': Adam, 'wrapper': partial(OptimWrapper, opt=torch.optim.AdamW)}

class Values(Callback):
    "The values of a hyper-parameter in each batch and at each step, for each parameter group"
    order,run_valid = 2000,False
    def __init__(self, name='lr'): self.of,self.batches,self.steps = name,[],[]
    def look(self): return [h[self.of] for h in self.opt.hypers]
    def after_pred(self): self.batches.append(self.look())
    def before_step(self): self.steps.append(self.look())

def values(*cbs, n=2, of='lr', method='fit', bs=32, items=160, splitter=None, opt=Adam,
           **kwargs):
    "Values in each batch and in each step of a fit; an epoch has 4 batches"
    more = {} if splitter is None else dict(splitter=splitter)
    learn = digits_learner([*cbs, seen := Values(of)], n=items, bs=bs, opt_func=opt, **more)
    fit(learn, n, method, **kwargs)
    return np.array(seen.batches),np.array(seen.steps)

def halves(model): return [list(model[:4].parameters()), list(model[4:].parameters())]

# --- the formulas -------------------------------------------------------------------------------
# written down again, each from its start to its end
FORMULAS = {
    'linear': lambda a,b,p,rises,power: a+(b-a)*p,
    'cos': lambda a,b,p,rises,power: b+(a-b)*(1+cos(pi*p))/2,
    'exp': lambda a,b,p,rises,power: a**(1-p)*b**p,
    'sqrt': lambda a,b,p,rises,power: a+(b-a)*(1-sqrt(1-p)) if rises else a+(b-a)*sqrt(p),
    'poly': lambda a,b,p,rises,power: a+(b-a)*p**power if rises else b+(a-b)*(1-p)**power}

@st.composite
def schedules(draw):
    "Phases in shares of 1,000 steps, which of them takes the rest, and where each begins and ends"
    n = draw(st.integers(1, 6))
    cuts = sorted(draw(st.lists(st.integers(1, 999), min_size=n-1, max_size=n-1, unique=True)))
    borders,now,phases,want = [0, *cuts, 1000],None,[],[]
    rest = draw(st.sampled_from([None, *range(n)]))
    for i,(a,b) in enumerate(zip(borders, borders[1:])):
        kind,shape = draw(st.sampled_from([Warmup, Flat, Decay])),draw(st.sampled_from([*FORMULAS]))
        power,low = draw(st.floats(.5, 4)),.001*(shape=='exp')
        start = draw(st.one_of(st.none(), st.floats(low or 0., 2)))
        if shape=='exp' and (start is None or start<low) and kind is not Flat: start = .5
        first = 0. if kind is Warmup else 1.
        begin = start if start is not None else first if now is None else now
        length = None if i==rest else (b-a)/1000
        if kind is Flat: phases.append(Flat(length, start)); now = begin
        else:
            now = draw(st.floats(low or 0., 2))
            phases.append(kind(length, shape, start, now, power))
        formula = (lambda p,v=begin: v) if kind is Flat else \
                  partial(lambda p,f,a,b,r,k: f(a, b, p, r, k), f=FORMULAS[shape], a=begin, b=now,
                          r=kind is Warmup, k=power)
        want.append((a, b, formula))
    return phases,want

@settings(max_examples=150, deadline=None, derandomize=True)
@given(schedules(), st.sampled_from([1, 7, 40, 1000]))
def test_each_phase_is_its_formula(case, total):
    "At each step of fits of several lengths, to 1e-12; at borders, the phase that begins there"
    phases,want = case
    curve = _Curve('lr', Schedule({'lr': phases}).phases['lr'], 'pct', fit_of(total))
    for t in range(total):
        at = 1000*t/total
        a,b,f = next(o for o in want if at<o[1]-1e-9)
        assert curve(t)==pytest.approx(f(max(0, at-a)/(b-a)), rel=1e-12, abs=1e-12)

def fit_of(total, n_epoch=1):
    fit = _AnyFit()
    fit.total,fit.n_epoch = total,n_epoch
    return fit

def test_a_step_decay_falls_at_the_step_that_was_meant():
    "28 % of 25 steps are 7.000000000000001; counted from the end too"
    for total in range(3, 60):
        for k in range(1, total):
            for phases in ([Flat(k/total), Flat(at=0.)], [Flat(), Flat(1-k/total, at=0.)]):
                curve = _Curve('lr', _filled('lr', phases), 'pct', fit_of(total))
                assert [curve(k-1), curve(k)]==[1, 0], (total, k)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(['linear','cos','poly','sqrt']), st.floats(.01, 2), st.booleans()),
                min_size=1, max_size=5))
def test_it_is_continuous_where_a_phase_goes_on(parts):
    phases = [(Warmup if up else Decay)(1/len(parts), shape, end=end) for shape,end,up in parts]
    curve = _Curve('lr', _filled('lr', phases), 'pct', _AnyFit())
    for a,b,p in curve.parts:
        assert curve(b-1e-13)==pytest.approx(p['end'], abs=1e-5)
        assert curve(b)==pytest.approx(p['end'], abs=1e-9)

def hf_wsd(step, warmup, stable, decay, kind, low):
    "As the documentation of `get_wsd_schedule` of Hugging Face's Transformers defines it, with its defaults"
    if step<warmup: share = step/warmup
    elif step<warmup+stable: return 1.
    elif step<warmup+stable+decay:
        p = (step-warmup-stable)/decay
        share = {'linear': 1-p, 'cos': .5*(1+cos(pi*p)), 'sqrt': 1-sqrt(p)}[kind]
    else: return low
    return share*(1-low)+low

@pytest.mark.parametrize('kind', ['linear','cos','sqrt'])
@pytest.mark.parametrize('low', [0., .1])
@pytest.mark.parametrize('warmup,decay', [(2,3), (0,5), (3,0), (1,8)])
def test_wsd_is_hugging_faces(kind, low, warmup, decay):
    "12 steps in 3 epochs. The warm-up of theirs begins at the lowest value too"
    phases = [Warmup(warmup, start=low), Flat(), Decay(decay, kind, end=low)]
    lr,sched = 1e-2,Schedule({'lr': phases}, 'steps')
    got = values(sched, n=3, lr=lr)[0][:,0]
    assert np.allclose(got, [lr*hf_wsd(t, warmup, 12-warmup-decay, decay, kind, low) for t in range(12)],
                       rtol=1e-12, atol=1e-18)

def test_presets():
    at = lambda s,*ts: [_Curve('lr', s.phases['lr'], s.unit, _AnyFit())(t) for t in ts]
    assert np.allclose(at(Schedule.wsd(.1, .2), 0, .05, .5, .9, 1), [0, .5, 1, .5, 0])
    assert np.allclose(at(Schedule.wsd(.1, .5, 'exp', end=.01), .75), [.1])
    assert np.allclose(at(Schedule.trapezoid(.2, .4), .1, .5, .7), [.5, 1, .75])
    assert np.allclose(at(Schedule.linear(.2, end=.1), .1, .6, 1), [.5, .55, .1])
    assert np.allclose(at(Schedule.cosine(0), 0, .5, 1), [1, .5, 0])
    assert np.allclose(at(Schedule.step((.4,.8), .5), 0, .39, .41, .79, .81), [1, 1, .5, .5, .25])
    assert np.allclose(at(Schedule(), 0, .5, .9), at(Schedule.wsd(), 0, .5, .9))
    assert type(Schedule.wsd(2, 3, unit='epochs')) is Schedule and Schedule.wsd(unit='epochs').unit=='epochs'

# --- in fits ------------------------------------------------------------------------------------
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('method', ['fit','fit_one_cycle','fit_flat_cos'])
@pytest.mark.parametrize('cbs', [list, lambda: [FastLoop()], lambda: [GradientAccumulation(64)]])
def test_it_multiplies_what_runs(opt, method, cbs):
    "Each group its own rate; afterwards each hyper-parameter is what it was"
    how = dict(method=method, opt=OPTS[opt], splitter=halves, n=3)
    kwargs = dict(lr_max=slice(1e-3, 1e-2)) if method=='fit_one_cycle' else dict(lr=slice(1e-3, 1e-2))
    plain = values(*cbs(), **how, **kwargs)
    sched = Schedule({'lr': [Warmup(.25), Flat(), Decay(.5)], 'wd': [Flat(at=.5)]})
    got = values(sched, *cbs(), **how, **kwargs)
    n = 12//(2 if any(isinstance(o, GradientAccumulation) for o in cbs()) else 1)
    curve = [t/(n/4) if t<n/4 else 1. if t<n/2 else (1+cos(pi*(t-n/2)/(n/2)))/2 for t in range(n)]
    assert np.allclose(got[1], plain[1]*np.array(curve)[:,None], rtol=1e-6, atol=1e-15)
    assert np.allclose(got[0], plain[0]*np.repeat(curve, 12//n)[:,None], rtol=1e-6, atol=1e-15)
    make = lambda cbs: digits_learner(cbs, n=160, bs=32, opt_func=OPTS[opt])
    a,b = (fit(make(c), 1, method) for c in (cbs(), [sched, *cbs()]))
    assert a.opt.hypers==b.opt.hypers

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('name', ['lr','wd','mom','sqr_mom','eps'])
def test_each_hyper_parameter(opt, name):
    plain = values(of=name, opt=OPTS[opt])[1]
    got = values(Schedule({name: [Decay(None, 'linear', end=.5)]}), of=name, opt=OPTS[opt])[1]
    assert np.allclose(got, plain*(1-np.arange(8)/16)[:,None], rtol=1e-12)

class StepSizes(Callback):
    "The rates that steps of SGD without momentum were taken with"
    order = 3000
    def before_fit(self): self.p,self.lrs = next(self.model.parameters()),[]
    def before_step(self): self.was,self.grad = self.p.data.clone(),self.p.grad.clone()
    def after_step(self): self.lrs.append(((self.was-self.p.data)/self.grad).median().item())

@pytest.mark.parametrize('cbs', [list, lambda: [GradientAccumulation(64)]])
def test_the_steps_use_it(cbs):
    learn = digits_learner([Schedule.linear(.25), *cbs(), sizes := StepSizes()], n=160, bs=32,
                           opt_func=partial(SGD, mom=0.))
    fit(learn, 4, lr=1e-2)
    n = len(sizes.lrs)
    want = [t/(n/4) if t<n/4 else 1-(t-n/4)/(.75*n) for t in range(n)]
    assert n==(8 if cbs() else 16) and np.allclose(np.array(sizes.lrs)/1e-2, want, rtol=2e-2, atol=1e-3)

@pytest.mark.parametrize('last', ['flush','drop'])
@pytest.mark.parametrize('n_acc', [32, 50, 64, 100, 128, lambda epoch,step: 32*(1+epoch),
                                   lambda epoch,step: 32+40*step])
def test_the_steps_of_a_fit_are_known_beforehand(n_acc, last):
    "As many as are taken, and each at its own value; the last begins at (n-1)/n"
    sched = Schedule({'lr': [Decay(None, 'linear')]})
    batches,steps = values(sched, GradientAccumulation(n_acc, last=last), n=3, lr=1.)
    n = sched._fit.total
    assert n==len(steps) and np.allclose(steps[:,0], 1-np.arange(n)/n, rtol=1e-12)
    assert {*batches[:,0]}<={*steps[:,0], 0.}      # of steps only; what is dropped at the end has 0

def test_batches_are_counted_if_asked():
    got = values(Schedule({'lr': [Decay(None, 'linear')]}, count='batches'), GradientAccumulation(64), lr=1.)
    assert np.allclose(got[0][:,0], 1-np.arange(8)/8) and np.allclose(got[1][:,0], 1-np.arange(0, 8, 2)/8)

def test_epochs_under_a_growing_window():
    "3 epochs of 4, 2 and 1 steps: borders in epochs are where the epochs end"
    acc = GradientAccumulation(lambda epoch,step: 32*2**epoch)
    got = values(Schedule({'lr': [Flat(1), Flat(1, .5), Flat(1, .25)]}, 'epochs'), acc, n=3, lr=1.)[1][:,0]
    assert [*got]==[1]*4+[.5]*2+[.25]

@pytest.mark.parametrize('unit,lengths', [('pct', (.25, .5)), ('epochs', (1, 2)), ('steps', (4, 8))])
def test_units_are_the_same_lengths(unit, lengths):
    got = values(Schedule({'lr': [Warmup(lengths[0]), Flat(), Decay(lengths[1])]}, unit), n=4)[0]
    assert np.allclose(got, values(Schedule({'lr': [Warmup(.25), Flat(), Decay(.5)]}), n=4)[0], rtol=1e-12)

def test_units_can_be_mixed():
    got = values(Schedule({'lr': [Warmup(4, unit='steps'), Flat(), Decay(2, unit='epochs')]}), n=4)[0]
    assert np.allclose(got, values(Schedule({'lr': [Warmup(.25), Flat(), Decay(.5)]}), n=4)[0], rtol=1e-12)

def test_both_fits_of_fine_tune_and_a_second_fit_begin_anew():
    sched = Schedule.linear(.25)
    plain,got = (values(*cbs, n=2, method='fine_tune')[1][:,0] for cbs in ([], [sched]))
    lin = lambda n: [t/(n/4) if t<n/4 else 1-(t-n/4)/(.75*n) for t in range(n)]
    assert np.allclose(got/plain, lin(4)+lin(8))
    learn = learner(cbs=[sched, seen := Values()])
    for n in (2, 1): fit(learn, n, lr=1.)
    assert np.allclose(np.array(seen.batches)[:,0], lin(8)+lin(4))

@pytest.mark.parametrize('method', ['fit','fit_one_cycle'])
def test_from_a_later_epoch(method):
    "Rates of the other epochs are those of the whole fit"
    whole,rest = (values(Schedule.wsd(.3, .5), n=4, method=method, start_epoch=e)[0] for e in (0, 2))
    assert np.allclose(rest, whole[8:], rtol=1e-12)

def test_a_skipped_batch_takes_its_time():
    "The schedule ends with the fit"
    class Skip(Callback):
        order = -8
        def before_step(self):
            if self.train_iter in (1, 2, 6): raise CancelBatchException
    got = values(Schedule({'lr': [Decay(None, 'linear')]}), Skip(), lr=1.)
    assert np.allclose(got[0][:,0], 1-np.arange(8)/8)

def test_an_epoch_that_is_cut_short():
    got = values(Schedule({'lr': [Decay(None, 'linear')]}), ShortEpochCallback(.5), lr=1.)[0][:,0]
    assert len(got)<8 and all(any(np.isclose(o, 1-np.arange(8)/8)) for o in got)

def test_time_limit_runs_it_faster():
    "Each batch takes a second of a clock that we turn; there is time for half of the batches"
    class Clock(Callback):
        order,t = 1000,0.
        def after_batch(self): Clock.t += self.training
    class Limit(TimeLimit): clock = staticmethod(lambda: Clock.t)
    limit = Limit(minutes=.2, schedule=True)
    got = values(Schedule({'lr': [Decay(None, 'linear')]}), limit, Clock(), n=6, lr=1.)[0][:,0]
    assert 10<=len(got)<=13 and (np.diff(got)<0).all() and got[-1]<.15

@pytest.mark.parametrize('method', ['fit','fit_one_cycle'])
@pytest.mark.parametrize('cbs', [list, lambda: [FastLoop()], lambda: [GradientAccumulation(64)]])
def test_a_resumed_run_has_the_same_rates(tmp_path, method, cbs):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.epoch==2 and self.iter==1: raise KeyboardInterrupt
    def run(*more):
        sched = Schedule({'lr': [Warmup(.3), Flat(), Decay(.4)], 'wd': [Decay()]})
        return fit(learner(cbs=[sched, *cbs(), *more]), 4, method)
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Stop(), Checkpoint(tmp_path, steps=1))
    resumed = run(Checkpoint(tmp_path, steps=1))
    assert resumed.recorder.lrs==whole.recorder.lrs
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))

def test_more_epochs_would_be_another_schedule(tmp_path):
    run = lambda n,**kwargs: fit(learner(cbs=[Schedule.wsd(), Checkpoint(tmp_path, **kwargs)]), n)
    run(1)
    with pytest.raises(ValueError, match='without a schedule'): run(2, extend=True)

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_backward','after_batch'])
def test_an_interrupted_fit_leaves_the_usual_values(event):
    class Fail(Callback):
        order = 70
        def __call__(self, name):
            if name==event and self.training and self.train_iter>=2: raise KeyboardInterrupt
    learn = learner(cbs=[Schedule({'lr': [Warmup()], 'wd': [Decay()]}), Fail()])
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, lr=1e-2, wd=.1)
    assert {(h['lr'],h['wd']) for h in learn.opt.hypers}=={(1e-2,.1)}
    assert not any(type(o).__module__.endswith('base.hypers') for o in learn.cbs)

def test_at_a_multiple_of_1_it_is_bit_identical_to_none():
    sched = Schedule({'lr': [Flat()], 'mom': [Flat()]})
    a,b = (fit(learner(cbs=cbs), 2, 'fit_one_cycle') for cbs in ([], [sched]))
    assert a.recorder.lrs==b.recorder.lrs
    assert all(map(torch.equal, a.model.parameters(), b.model.parameters()))

def test_beside_reduce_on_plateau():
    plateau = ReduceLROnPlateau(min_delta=99., patience=1, factor=4.)
    alone,both = (values(Schedule.linear(), *cbs, n=5)[0] for cbs in ([], [plateau]))
    assert plateau.reductions==3
    assert np.allclose(both[:,0], alone[:,0]*np.repeat([1,1,1/4,1/16,1/64], 4), rtol=1e-12)

def test_two_schedules_multiply():
    a,b = Schedule({'lr': [Decay(None, 'linear')]}),Schedule({'lr': [Flat(.5), Flat(at=.5)]})
    got = values(a, b, lr=1.)[0][:,0]
    assert np.allclose(got, (1-np.arange(8)/8)*np.repeat([1,.5], 4))

# --- pickles, exports, plots --------------------------------------------------------------------
def test_pickles_copies_and_exports(tmp_path):
    sched = Schedule({'lr': [Warmup(.1), Flat(), Decay(.2, 'sqrt')], 'mom': [Warmup(start=.5)]})
    learn = learner(cbs=[sched], path=tmp_path)
    fit(learn, 2)
    learn.export()
    loaded = next(o for o in load_learner(tmp_path/'export.pkl').cbs if isinstance(o, Schedule))
    json.dumps(sched.phases)
    for o in (pickle.loads(pickle.dumps(sched)), copy.copy(sched), copy.deepcopy(sched), loaded):
        assert (o.phases,o.scales)==(sched.phases,sched.scales) and o._fit is None
        assert np.array_equal(values(o)[0], values(Schedule(sched.phases))[0])

def test_plot():
    import matplotlib.pyplot as plt
    sched = Schedule({'lr': [Warmup(2), Flat(), Decay(4)], 'wd': [Flat()]}, 'steps')
    with pytest.raises(ValueError, match='not known before'): sched.plot()
    values(sched)
    line = sched.plot().lines[0]
    assert line.get_xdata()[-1]==8 and line.get_label()=='lr' and np.isclose(line.get_ydata()[250], 1)
    assert Schedule.wsd().plot().get_xlabel()=='share of the fit'
    plt.close('all')

def test_a_loader_of_pytorch_and_one_without_a_batch_size():
    class Batches(torch.utils.data.IterableDataset):
        def __len__(self): return 6
        def __iter__(self): return iter([(torch.randn(4,5), torch.zeros(4).long())]*6)
    data = torch.utils.data.TensorDataset(torch.randn(23, 5), torch.zeros(23).long())
    plain = torch.utils.data.DataLoader(data, 4)
    bare = torch.utils.data.DataLoader(Batches(), batch_size=None)
    def run(dl, *cbs):
        learn = Learner(DataLoaders(dl, plain), torch.nn.Linear(5, 2), torch.nn.CrossEntropyLoss(), lr=1.,
                        cbs=[*cbs, seen := Values()])
        fit(learn, 2)
        return np.array(seen.steps)[:,0]
    line = lambda n,**kwargs: Schedule({'lr': [Decay(n, 'linear')]}, **kwargs)
    assert np.allclose(run(plain, line(None)), 1-np.arange(12)/12)
    assert np.allclose(run(plain, line(None), GradientAccumulation(12)), 1-np.arange(4)/4)
    assert np.allclose(run(plain, line(2, unit='epochs'), GradientAccumulation(12, last='drop')), [1,.5])
    assert np.allclose(run(bare, line(12, unit='steps')), 1-np.arange(12)/12)
    assert np.allclose(run(bare, line(None), GradientAccumulation(12)), 1-np.arange(0, 12, 3)/12)
    with pytest.raises(ValueError, match="no batch size.*count='batches'"):
        run(bare, line(4, unit='steps'), GradientAccumulation(12))

# --- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize('make,message', [
    (lambda: Schedule({'lr': [Flat(), Decay()]}), 'several phases have no length; expected one'),
    (lambda: Schedule({'lr': [Warmup(.5), Decay(.6)]}), 'the phases take 1.1 of the fit'),
    (lambda: Schedule({'lr': [Warmup(.5), Flat(), Decay(.6)]}), 'the phases take 1.1 of the fit'),
    (lambda: Schedule({'lr': [Warmup(.5), Decay(.4)]}), '0.1 of the fit has no phase; expected 1 in all'),
    (lambda: Schedule({'lr': [Warmup(.5), Flat(), Decay(.5)]}), 'nothing is left over'),
    (lambda: Schedule({'lr': [Warmup(5), Flat()]}), "length=5, unit='pct': expected a share"),
    (lambda: Schedule({'lr': [Warmup(.5)]}, 'steps'), "length=0.5, unit='steps': expected a whole number"),
    (lambda: Warmup(-1), 'length=-1: expected a finite number >= 0'),
    (lambda: Decay(float('nan')), 'length=nan'), (lambda: Flat(at=-1), 'at=-1'),
    (lambda: Decay(end=-1), 'end=-1'),
    (lambda: Decay(.1, 'cosine'), "shape='cosine': expected 'linear', 'cos', 'sqrt', 'poly', 'exp'; did you"),
    (lambda: Decay(.1, 'poly', power=0), 'power=0: expected more than 0'),
    (lambda: Schedule({'lr': [Decay(None, 'exp')]}), "shape='exp' from 1 to 0; expected values above 0"),
    (lambda: Decay(unit='epoch'), "unit='epoch': expected 'pct', 'epochs', 'steps'; did you mean 'epochs'?"),
    (lambda: Schedule(unit='shares'), "unit='shares': expected 'pct', 'epochs', 'steps'"),
    (lambda: Schedule(count='batch'), "count='batch': expected 'steps', 'batches'; did you mean 'batches'?"),
    (lambda: Schedule({}), 'phases={}'), (lambda: Schedule({'lr': []}), "phases['lr'] is empty"),
    (lambda: Schedule({'lr': [.5]}), "phases['lr'] has 0.5: expected Warmup, Flat or Decay"),
    (lambda: Schedule.step((.5,.5)), 'at=(0.5, 0.5)')])
def test_refused(make, message):
    with pytest.raises(ValueError) as e: make()
    assert message in str(e.value)

def test_refused_kinds():
    for make in (lambda: Schedule([Warmup(.1)]), lambda: Schedule({1: [Flat()]}), lambda: Warmup('1')):
        with pytest.raises(TypeError): make()

@pytest.mark.parametrize('sched,message', [
    (lambda: Schedule({'lrs': [Flat()]}), "phases: 'lrs' is no hyper-parameter of the optimizer; expected"),
    (lambda: Schedule({'lrs': [Flat()]}), "did you mean 'lr'?"),
    (lambda: Schedule({'amsgrad': [Flat()]}), "'amsgrad' is no hyper-parameter"),
    (lambda: Schedule.wsd(2, 2, unit='epochs'), 'the phases take 2 of the fit (8 steps in 2 epochs)'),
    (lambda: Schedule.wsd(1, 1, unit='epochs'), 'without a length (8 steps in 2 epochs)'),
    (lambda: Schedule({'lr': [Decay(4)]}, 'steps'), '0.5 of the fit (8 steps in 2 epochs) has no')])
def test_refused_before_the_first_batch(sched, message):
    learn = learner(cbs=[sched()], opt_func=OPTS['wrapper'])
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError) as e: fit(learn, 2)
    assert message in str(e.value)
    assert all(map(torch.equal, before, learn.model.parameters()))

def test_a_fit_of_no_epoch(): fit(learner(cbs=[Schedule.wsd()]), 0)
