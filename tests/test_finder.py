"`lr_find`: the fit after it is the fit without it, it counts steps, and it does not guess"
import copy, gc, pickle, signal
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
from fastai.callback import schedule
from fastai.callback import training as fastais
from fastai.callback.core import (Callback, CancelBatchException, CancelFitException,
                                  CancelStepException)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import default_device, set_seed
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.finder import LRFinder, LRFindResult, _fell, _methods, _result, lr_find
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_dls
from common import EXACT, fit, learner, quiet, traces
from torch import nn

METHODS = 'valley','slide','minimum','steep'
OPTS = {'fastai': Adam, 'wrapper': partial(OptimWrapper, opt=torch.optim.AdamW)}

def find(learn, **kwargs):
    with learn.no_bar(): return lr_find(learn, **dict(show_plot=False, num_it=24) | kwargs)

def two_parts(model): return [list(model[:4].parameters()), list(model[4:].parameters())]

class At(Callback):
    "Calls `f` after some training batch, with all that was counted before"
    order,n = 3000,0
    def __init__(self, batch, f): self.batch,self.f = batch,f
    def after_batch(self):
        if not self.training: return
        self.n += 1
        if self.n==self.batch: self.f()

def ctrl_c(): raise KeyboardInterrupt
def sigint(): signal.raise_signal(signal.SIGINT)
def error(): raise OSError('no such thing')
def cancel(): raise CancelFitException

def trained(learn, method='fit_one_cycle'):
    with quiet(learn): getattr(learn, method)(2, 1e-2)
    return learn

def same(a, b):
    "The same weights and statistics, the same curve"
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()):
        torch.testing.assert_close(p, q, **EXACT)
    assert a.recorder.lrs==b.recorder.lrs
    torch.testing.assert_close(torch.stack(a.recorder.losses), torch.stack(b.recorder.losses), **EXACT)

# --- everything is put back ---------------------------------------------------------------------
SETS = dict(plain=list, fast=lambda: [FastLoop()], average=lambda: [EMA(), SWA()],
            accumulate=lambda: [GradientAccumulation(64)], fastais=lambda: [fastais.GradientAccumulation(64)],
            mixup=lambda: [MixUp()], steps=lambda: [SAM(), GradientClip(1.), GradientNoise()],
            others=lambda: [SkipNonFinite(), EarlyStopping(), ReduceLROnPlateau(), BnFreeze(), LayerStats()])

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('cbs', SETS)
def test_the_next_fit_is_the_same(opt, cbs):
    "Dropout, shuffling, batch norm, momentum: from a new learner, and after a fit"
    def two_fits(*finds):
        learn = learner(cbs=SETS[cbs](), opt_func=OPTS[opt], splitter=two_parts)
        for kwargs in finds: find(learn, **kwargs)
        trained(learn)
        gc.collect()        # files of earlier tests
        before = traces(learn)
        for kwargs in finds: find(learn, **kwargs)
        assert traces(learn)==before
        return trained(learn, 'fine_tune')
    same(two_fits(dict(runs=2, num_it=8)), two_fits())

@pytest.fixture
def keyboard():
    "A process of pytest-xdist ignores Ctrl-C"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

@pytest.mark.parametrize('end', [ctrl_c, sigint, error, cancel])
@pytest.mark.parametrize('event', [1, 7])
def test_however_it_ends(end, event, keyboard):
    "Also by a signal as the terminal sends it"
    plain,learn = trained(learner()),learner(cbs=(cb := At(event, end)))
    before = traces(learn)
    if end is cancel: assert 'something else has ended' in find(learn).why
    else:
        with pytest.raises((KeyboardInterrupt, OSError)): find(learn)
    assert cb.n==0                  # its attributes are put back too
    cb.run = False
    assert learn.opt is None and not hasattr(learn, 'lr_finder')
    assert traces(learn)|dict(attrs=0)==before|dict(attrs=0)
    same(trained(learn), plain)

def test_the_recorder_and_gradients_stay():
    learn = trained(learner())
    values,lrs,losses = (list(getattr(learn.recorder, o)) for o in ('values','lrs','losses'))
    grads = [None if p.grad is None else p.grad.clone() for p in learn.model.parameters()]
    hypers = [dict(h) for h in learn.opt.hypers]
    find(learn)
    assert [list(getattr(learn.recorder, o)) for o in ('values','lrs')]==[values, lrs]
    assert all(map(torch.equal, learn.recorder.losses, losses))
    assert hypers==[dict(h) for h in learn.opt.hypers]
    for p,g in zip(learn.model.parameters(), grads): assert (p.grad is None)==(g is None)

def test_no_file_is_written(tmp_path, monkeypatch):
    "Nor do callbacks that save or log act"
    monkeypatch.chdir(tmp_path)
    cbs = [SaveModelCallback(), CSVLogger(), EarlyStoppingCallback(patience=0), Checkpoint('runs')]
    learn = learner(cbs=[*cbs, SaveTopK()], path=tmp_path, model_dir='/proc/not_writable')
    find(learn)
    assert not list(tmp_path.rglob('*'))

def test_run_log_has_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = learner(cbs=RunLog())
    with quiet(learn): learn.fit(1)
    res = find(learn)
    fit(learn, 1)
    run = read_log(learn.run_log.log_file)
    row = run.of('lr_find').iloc[0]
    assert len(run.of('lr_find'))==1 and row.step==4
    assert row.lr==pytest.approx(res.lrs) and row.loss==pytest.approx(res.losses)
    assert run.epochs.step.tolist()==[4,8]

def test_a_plain_loader():
    "Whose order is drawn by a generator of its own"
    def make():
        items = list(digits_dls(32, 160).train_ds)
        set_seed(0)
        g = torch.Generator().manual_seed(1)
        dl = torch.utils.data.DataLoader(items, 16, shuffle=True, generator=g)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(.1), nn.Linear(64, 10)).to(default_device())
        return Learner(DataLoaders(dl, dl), model, loss_func=nn.CrossEntropyLoss())
    plain,learn = trained(make()),make()
    find(learn, runs=2)
    same(trained(learn), plain)

# --- steps and rates ----------------------------------------------------------------------------
def noting(seen):
    "A callback that puts the rates of each step into `seen`; a list of its own would be put back"
    class Steps(Callback):
        order = 61
        def after_step(self): seen.append([h['lr'] for h in self.opt.hypers])
    return Steps()

KINDS = dict(none=list, ours=lambda: [GradientAccumulation(64)],
             fastais=lambda: [fastais.GradientAccumulation(64)],
             huge=lambda: [GradientAccumulation(10**4)],
             asked=lambda: [GradientAccumulation(lambda epoch,step: 64)],
             fast=lambda: [GradientAccumulation(64), FastLoop()])

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('kind', KINDS)
def test_a_rate_a_step(opt, kind):
    "Exponentially from step to step, whatever accumulates; the last window of an epoch is a step too"
    seen = []
    learn = learner(cbs=[*KINDS[kind](), noting(seen)], opt_func=OPTS[opt])
    res = find(learn, start_lr=1e-6, end_lr=1., stop_div=False)
    assert len(res.lrs)==len(seen)==24
    assert np.allclose(res.lrs, 1e-6*1e6**(np.arange(24)/24)) and np.allclose([o[0] for o in seen], res.lrs)

def test_groups_keep_their_proportion():
    seen = []
    learn = learner(cbs=noting(seen), splitter=two_parts, lr=slice(1e-4,1e-2))
    res = find(learn, stop_div=False)
    assert np.allclose(np.array(seen), np.array(res.lrs)[:,None]*[.01,1])

def test_accumulated_is_a_big_batch():
    "Rates and losses of windows are those of batches of their size"
    def make(bs, *cbs):
        dls = digits_dls(bs, 160)
        dls.train.shuffle = False
        set_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(dls.device)
        return Learner(dls, model, CrossEntropyLossFlat(), cbs=[*cbs])
    big,small = (find(make(*o), num_it=40, suggest=METHODS)
                 for o in ((64,), (16, GradientAccumulation(64))))
    assert np.allclose(big.raw, small.raw, rtol=1e-3) and np.allclose(big.lrs, small.lrs)
    assert list(small)==pytest.approx(list(big))

@pytest.mark.parametrize('cls', [SAM, GradientCentralization, LookaheadWeights, partial(GradientNoise, 1.)])
def test_what_changes_a_step_takes_part(cls):
    plain,other = find(learner(), stop_div=False),find(learner(cbs=cls()), stop_div=False)
    assert plain.raw[0]==pytest.approx(other.raw[0], rel=1e-4)
    assert not np.allclose(plain.raw, other.raw, rtol=1e-3)

def test_other_schedules_do_not_interfere():
    cbs = [ParamScheduler({'lr': SchedCos(.1,.2), 'mom': SchedCos(.1,.2)}), ReduceLROnPlateau()]
    plain,beside = (find(learner(cbs=o)) for o in ([], cbs))
    assert np.array_equal(plain.raw, beside.raw)

@pytest.mark.parametrize('opt', OPTS)
def test_rates_losses_and_suggestions_are_fastais(opt):
    make = lambda: learner(opt_func=OPTS[opt])
    res,learn = find(make(), num_it=100, suggest=METHODS),make()
    funcs = [getattr(schedule, o) for o in METHODS]
    with quiet(learn): theirs = learn.lr_find(show_plot=False, suggest_funcs=funcs)
    n = len(res.lrs)
    assert np.allclose(res.lrs, learn.recorder.lrs[:n])
    assert np.allclose(res.losses, [float(o) for o in learn.recorder.losses[:n]], rtol=1e-4)
    assert [*res]==pytest.approx([*theirs]) and res._fields==theirs._fields
    valley,*others = res
    assert valley==res.valley==res[0] and len(others)==3

def test_more_and_fewer_steps_see_the_same_curve():
    "The smoothing goes with the number of steps"
    few,many = (find(learner(), num_it=o, suggest='minimum') for o in (30, 100))
    assert abs(np.log10(few.minimum/many.minimum))<.7

class Skips(MixedPrecision):
    "A loss scaler that skips the first steps, and each step whose loss is not finite"
    def __init__(self): super().__init__(); self.n = 0
    def before_fit(self): self.n = 0
    def after_fit(self): pass
    def before_batch(self): pass
    after_pred = after_loss = before_backward = after_step = before_batch
    def before_step(self):
        self.n += 1
        if self.n<=5 or not self.learn.loss.isfinite().all():
            raise CancelStepException

def test_skipped_steps_do_not_count():
    seen = []
    res = find(learner(cbs=[Skips()]), stop_div=False)
    assert len(res.lrs)==24 and res.valley

@pytest.mark.parametrize('cbs', [lambda: [], lambda: [Skips()]])
def test_a_loss_that_is_never_a_number(cbs, capsys):
    res = find(learner(cbs=[PoisonBatch(tuple(range(1000))), *cbs()]))
    assert res.valley is None and 'the loss of the first step is nan' in capsys.readouterr().out
    assert len(res.lrs)==0 and res.falling is None
    res.plot()

def test_no_step_at_all(capsys):
    class Never(Callback):
        def before_batch(self):
            raise CancelBatchException
    assert find(learner(cbs=Never())).valley is None
    assert 'no step was taken' in capsys.readouterr().out

# --- no guess -----------------------------------------------------------------------------------
@pytest.mark.parametrize('kwargs,why', [
    (dict(num_it=10), '10 steps are too few: raise num_it'), (dict(end_lr=1e-6), 'never fell noticeably'),
    (dict(start_lr=1e4, end_lr=1e9, num_it=100), 'too few: the loss has diverged')])
def test_too_little_evidence(kwargs, why, capsys):
    res = find(learner(opt_func=SGD), suggest=('valley','steep'), **kwargs)
    out = capsys.readouterr().out
    assert list(res)==[None]*2 and why in out and out.count('\n')==1
    res.plot()

def test_nan_in_the_middle():
    "What came before is judged; fastai's own suggestion needs more"
    res = find(learner(cbs=PoisonBatch(70)), num_it=100)
    assert len(res.lrs)==70 and res.valley

def test_noise_is_no_fall():
    rng = np.random.default_rng(0)
    for n in (20, 100, 300):
        assert np.mean([_fell(rng.normal(2, .3, n)) for _ in range(300)])<.08
        falls = lambda: np.concatenate([np.full(n//2, 2.), np.linspace(2, 1, n-n//2)])+rng.normal(0, .3, n)
        assert np.mean([_fell(falls()) for _ in range(300)])>.8

def test_a_negative_loss():
    "fastai's rule ends it after two steps"
    class Below(nn.Module):
        def forward(self, o, y): return nn.functional.cross_entropy(o, y)-5
    learn = learner(loss_func=Below(), metrics=[])
    assert len(find(learn, end_lr=1e-1).lrs)==24

# --- several runs -------------------------------------------------------------------------------
def test_runs_have_another_order(capsys):
    learn = learner()
    res = find(learn, runs=3, suggest=METHODS, num_it=60)
    low,high = res.band
    assert (low<=res.losses).all() and (res.losses<=high).all() and (low<high).any()
    assert len(res.each['valley'])==3 and len({*res.each['steep'], *res.each['valley']})>2
    assert capsys.readouterr().out.count('; each run alone: ')==4
    one = find(learner(), num_it=60)
    assert one.band is None and one.each=={'valley': [one.valley]}
    assert one.valley==res.each['valley'][0]        # the first run is that of one run

def test_a_run_that_diverges_early_does_not_end_the_curve():
    lrs = list(np.geomspace(1e-7, 1, 60))
    curve = [2.]*30+[2-.05*i for i in range(30)]
    res = _result(_methods('valley'), [(lrs, curve), (lrs, curve), (lrs[:25], curve[:24]+[float('nan')])], 60)
    assert len(res.lrs)==60 and res.valley and res.each['valley'][2] is None
    res = _result(_methods('valley'), [(lrs, curve), (lrs[:25], curve[:25]), (lrs[:26], curve[:26])], 60)
    assert len(res.lrs)==26 and res.valley is None

# --- as people use it ---------------------------------------------------------------------------
def test_result_is_a_tuple_that_can_be_kept():
    res = find(learner(), num_it=40, suggest=('valley','minimum'))
    for o in (pickle.loads(pickle.dumps(res)), copy.copy(res), copy.deepcopy(res)):
        assert o==res and isinstance(o, LRFindResult) and o.valley==res.valley and (o.lrs==res.lrs).all()
    assert repr(res)==f'LRFindResult(valley={res.valley}, minimum={res.minimum})'
    assert res._asdict()==dict(valley=res.valley, minimum=res.minimum)
    low,high = res.falling
    assert res.lrs[0]<low<high<=res.lrs[-1]

def test_figure():
    plt.close('all')
    learn = learner()
    res = find(learn, show_plot=True, runs=2, num_it=40)
    assert len(plt.get_fignums())==1
    _,ax = plt.subplots()
    assert res.plot(ax) is ax and ax.get_xscale()=='log'
    labels = ax.get_legend_handles_labels()[1]
    assert labels==['loss of a step','all runs','smoothed','the loss falls',f'valley: {res.valley:.2g}']
    plt.close('all')

def test_with_the_bar_on():
    learn = learner(cbs=[GradientAccumulation(64), Progress()])
    assert len(lr_find(learn, num_it=24, show_plot=False).lrs)>6

def test_functions_as_suggestion():
    def first(lrs, losses, num_it): return lrs[0],(lrs[0], losses[0])
    res = find(learner(), suggest=(first, partial(schedule.slide, thresh=.01)), num_it=40)
    assert res._fields==('first','slide') and res.first==pytest.approx(res.lrs[4])
    assert len(find(learner(), suggest=None))==0

@pytest.mark.parametrize('kwargs,message', [
    (dict(start_lr=1, end_lr=.1), 'start_lr=1, end_lr=0.1: expected 0 < start_lr < end_lr'),
    (dict(start_lr=0), 'expected 0 < start_lr'), (dict(num_it=5), 'num_it=5'), (dict(runs=0), 'runs=0'),
    (dict(end_lr=float('inf')), 'end_lr=inf'),
    (dict(suggest='valey'), "suggest='valey': expected 'valley', 'slide', 'minimum', 'steep'"),
    (dict(suggest=('steep','minimun')), "did you mean 'minimum'?")])
def test_refused(kwargs, message):
    learn = learner()
    with pytest.raises(ValueError) as e: lr_find(learn, **kwargs)
    assert message in str(e.value) and learn.opt is None

def test_layers_without_a_size():
    learn = learner(model=nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))
    with pytest.raises(ValueError, match='no size before the first batch'): find(learn)
