"A fit with `FastLoop` is the fit without it: the same calls, the same bits"
import contextlib, copy, io, math, os, pickle, warnings

import pytest, torch
from fastai.callback.all import (BnFreeze, CSVLogger, CutMix, EarlyStoppingCallback, FetchPredsCallback,
                                 GradientAccumulation, GradientClip, MixUp, ReduceLROnPlateau,
                                 SaveModelCallback, ShortEpochCallback)
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException,
                                  CancelEpochException, CancelFitException, CancelStepException,
                                  CancelTrainException, CancelValidException, event)
from fastai.data.core import DataLoaders
from fastai.learner import AvgMetric, Learner, Recorder, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import TensorBase, set_seed
from fastcore.basics import patch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from fastai.callback import rnn
import fastai_callbacks_ext.all as ext
from cases import every_case, some
from common import NEEDS, fit, learner, make, public_callbacks, quiet
from fastai_callbacks_ext.test_utils import digits_learner, text_learner

cancels = [CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
           CancelStepException, CancelTrainException, CancelValidException]
events = [e for e in vars(event) if e[0]!='_' and e!='after_create']

@pytest.fixture(autouse=True, scope='module')
def in_a_folder_of_its_own(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp('loop'))
    yield
    os.chdir(before)

class Spy(Callback):
    "Logs every event that it is called for, with what can be seen of the learner's state"
    order = -100
    def __init__(self): self.log = []

states = 'epoch','iter','training','train_iter','pct_train','loss','smooth_loss'
def _log(name):
    shown = lambda o: o.item() if isinstance(o, torch.Tensor) and o.numel()==1 else str(o)
    def method(self): self.log.append((name, *[shown(getattr(self.learn, o, None)) for o in states]))
    return method
for e in events: setattr(Spy, e, _log(e))
class LastSpy(Spy): order = 100

on_gpu = torch.cuda.is_available()

def bits(o):
    "Something that is equal if `o` is, to the last bit; on a GPU, something that is nearly equal"
    if on_gpu and isinstance(o, float): return o
    if isinstance(o, torch.Tensor):
        o = o.detach().cpu()
        return str(o.dtype),tuple(o.shape),o.flatten().tolist() if on_gpu else o.numpy().tobytes()
    if isinstance(o, dict): return {k:bits(v) for k,v in o.items()}
    if isinstance(o, (list,tuple)) or type(o).__name__=='L': return [bits(v) for v in o]
    return repr(o)

def results(learn, spies, out):
    "All that a run leaves"
    opt = [dict(s) for s in learn.opt.state.values()] if learn.opt else None
    rec = getattr(learn, 'recorder', None)
    kept = [getattr(rec, o, None) for o in ('lrs','losses','iters','values','metric_names','log')]
    final,smooth = [getattr(learn, o, None) for o in ('final_record','smooth_loss')]
    rng = torch.get_rng_state(), learn.dls.train.rng.getstate() if hasattr(learn.dls.train, 'rng') else None
    return dict(weights=bits(learn.model.state_dict()), opt=bits(opt), recorder=bits(kept), rng=bits(rng),
                final=bits(final), smooth=bits(smooth), log=[s.log for s in spies], out=out)

def equal(a, b):
    "The same; on a GPU, which adds up in any order, and where `FastLoop` averages on the device, nearly so"
    if not on_gpu: return a==b
    if isinstance(a, dict): return a.keys()==b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(equal, a, b))
    return a==b or isinstance(a, float) and (math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-3) or a!=a and b!=b)

def run(make_learner, use, fast):
    """Results of `use(learn)`, with or without `FastLoop`; the text of the error if it ends in one

    With any callback of the package, a fit stays where it is while the learner validates: one is in both"""
    spies = Spy(),LastSpy()
    learn = make_learner()
    learn.add_cbs([*spies, ext.ExtCallback(), *([ext.FastLoop()] if fast else [])])
    set_seed(1); learn.dls.train.rng.seed(1)
    cls,out = type(learn),io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: end = bits(use(learn))
        except Exception as e: end = f'{type(e).__name__}: {e}'
        except KeyboardInterrupt: end = 'interrupted'
    assert type(learn) is cls
    return results(learn, spies, end)

def same(make_learner, use):
    plain,fast = run(make_learner, use, False),run(make_learner, use, True)
    for k in plain: assert equal(plain[k], fast[k]), k
    return plain

def small(*cbs, **kwargs): return lambda: digits_learner([cb() for cb in cbs], n=160, bs=32, **kwargs)
def text(*cbs): return lambda: text_learner([cb() for cb in cbs] or None, n=1000)
def fit2(learn):
    with learn.no_logging(): learn.fit_one_cycle(2)

# --- the same results ---------------------------------------------------------------------------
class TrainMetrics(Callback):
    def after_create(self): self.learn.recorder.train_metrics = True
class Inside(Callback):
    "Runs predictions and a validation inside a fit, which start the recorder anew"
    order,busy = 70,False
    def after_epoch(self):
        if self.busy: return
        self.busy = True
        self.learn.get_preds(inner=True)
        self.learn.validate()
        self.busy = False
class Mean(Callback):
    def before_backward(self): self.learn.loss_grad = self.loss_grad.mean()

def number(pred, targ): return 1.5

def bare_learner():
    learn = small()()
    learn.remove_cbs([learn.progress, learn.recorder])
    return learn

beside = dict(
    none=small(), bf16=lambda: small()().to_bf16(), fp16=lambda: small()().to_fp16(),
    accumulate=small(lambda: GradientAccumulation(48)), clip=small(GradientClip),
    mixup=small(MixUp), cutmix=small(CutMix), csv=small(CSVLogger), freeze=small(BnFreeze),
    save=small(lambda: SaveModelCallback(fname='m')), stop=small(lambda: EarlyStoppingCallback(min_delta=10)),
    short=small(lambda: ShortEpochCallback(0.5)),
    short_train=small(lambda: ShortEpochCallback(0.5, short_valid=False)),
    plateau=small(lambda: ReduceLROnPlateau(patience=0, min_delta=10)),
    train_metrics=small(TrainMetrics), fetch=small(FetchPredsCallback), inside=small(Inside),
    rnn=text(), rnn_regularizer=text(rnn.ModelResetter, rnn.RNNCallback, lambda: rnn.RNNRegularizer(2, 1)),
    wrapper=small(opt_func=lambda p, **kw: OptimWrapper(p, torch.optim.AdamW, **kw)),
    unreduced=small(Mean, loss_func=CrossEntropyLossFlat(reduction='none')),
    metrics=small(metrics=[accuracy, AvgMetric(number)]), no_recorder=lambda: bare_learner())

@pytest.mark.parametrize('name', some(beside, 12))
def test_beside_fastai(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    res = same(beside[name], fit2)
    assert len(res['log'][0])>50 and res['out']=="None", res['out']

@pytest.mark.parametrize('cls', some(public_callbacks(), 12), ids=lambda o: o.__name__)
def test_beside_ours(cls):
    if cls is ext.FastLoop: return same(small(), fit2)
    same(lambda: learner(cls), fit2)

uses = dict(
    fit=lambda l: l.fit(2), one_cycle=fit2, flat_cos=lambda l: l.fit_flat_cos(2),
    fine_tune=lambda l: l.fine_tune(1), validate=lambda l: l.validate(),
    get_preds=lambda l: l.get_preds(with_loss=True, with_input=True),
    train_preds=lambda l: l.get_preds(0), predict=lambda l: l.predict(l.dls.valid_ds[0][0]),
    lr_find=lambda l: l.lr_find(show_plot=False, num_it=12), no_bar=lambda l: fit(l, 2) and None,
    twice=lambda l: (l.fit(1), l.validate(), l.fit(1), l.get_preds()),
    start=lambda l: l.fit(3, start_epoch=2), freeze=lambda l: (l.freeze(), l.fit(1), l.unfreeze(), l.fit(1)))

@pytest.mark.parametrize('name', uses)
def test_uses(name):
    same(small(splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())]), uses[name])

# --- any callbacks, any exceptions --------------------------------------------------------------
class Rows(torch.utils.data.Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.tensor([i/12., 1.]),torch.tensor(i%2)

def tiny(n_valid=12):
    "A learner that fits in milliseconds"
    set_seed(0)
    dls = DataLoaders.from_dsets(Rows(12), Rows(n_valid), bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Linear(2, 2), nn.CrossEntropyLoss(), metrics=accuracy)
    learn.remove_cb(learn.progress)
    learn.recorder.add_time = False
    return learn

errors = [*cancels, ValueError, KeyError, AssertionError, KeyboardInterrupt]
often = ('before_fit before_epoch before_train before_batch after_pred after_loss before_backward '
         'before_step after_cancel_step after_cancel_batch after_batch before_validate')
some_events = st.one_of(st.sampled_from(often.split()), st.sampled_from(events))
acts = st.one_of(
    st.tuples(st.just('raise'), st.sampled_from(errors)), st.tuples(st.just('remove'), st.integers(0, 3)),
    st.tuples(st.just('add'), some_events), st.tuples(st.just('gain'), st.integers(0, 3), some_events),
    st.tuples(st.just('flag'), st.sampled_from(['run','run_train','run_valid']), st.booleans()))
plans = st.fixed_dictionaries(dict(
    order=st.sampled_from([-20, -10, 0, 5, 50, 55, 61]), run_train=st.booleans(), run_valid=st.booleans(),
    events=st.lists(some_events, unique=True, min_size=1, max_size=8),
    own=st.lists(some_events, unique=True, max_size=2),
    special=st.sampled_from(['', '', '', 'calls', 'training', 'ours', 'ours', 'ours']),
    # (which of its events, which time, what)
    acts=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3), acts), max_size=3)))

class Actor(Callback):
    "Logs its calls, and in some of them does what its plan says"
    def __init__(self, plan, all):
        self.plan,self.all,self.log = plan,all,[]
        self.order,self.run_train,self.run_valid = plan['order'],plan['run_train'],plan['run_valid']
        for e in plan['own']: setattr(self, e, lambda e=e: self.act(e))
    def act(self, e):
        n = sum(o[0]==e for o in self.log)
        self.log.append((e, *[getattr(self.learn, o, None) for o in states[:4]]))
        for i,nth,(what,*args) in self.plan['acts']:
            at = self.plan['events'][i%len(self.plan['events'])],nth
            if at==(e,n): getattr(self, f'do_{what}')(*args)
    def do_raise(self, exc): raise exc(*['because'][:exc is not AssertionError])
    def do_remove(self, i):
        cb = self.all[i%len(self.all)]
        if cb.learn is not None and cb is not self: self.learn.remove_cb(cb)
    def do_add(self, e):
        cb = actor(plan(e), self.all)
        self.all.append(cb); self.learn.add_cb(cb)
    def do_gain(self, i, e):
        cb = self.all[i%len(self.all)]
        setattr(cb, e, lambda: cb.act(e))
    def do_flag(self, name, value): setattr(self, name, value)

def calls(self, event_name):
    self.log.append((event_name, 'called'))
    return Callback.__call__(self, event_name)

def actor(plan, all):
    methods = {e:lambda self, e=e: self.act(e) for e in plan['events']}
    methods |= dict(calls={'__call__':calls}, training={'training':False}).get(plan['special'], {})
    bases = (Actor, ext.ExtCallback) if plan['special']=='ours' else (Actor,)
    return type('Actor', bases, methods)(plan, all)

def same_with(plans, use, **kwargs):
    "The same results with actors of these `plans`, and the same calls to each"
    logs = []
    def make_learner():
        actors = []
        actors += [actor(p, actors) for p in plans]
        logs.append(actors)
        return tiny(**kwargs).add_cbs(actors)
    same(make_learner, use)
    assert [cb.log for cb in logs[0]]==[cb.log for cb in logs[1]]
    return [cb.log for cb in logs[0]]

@settings(max_examples=100 if every_case else 40, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
@given(st.lists(plans, min_size=1, max_size=4), st.sampled_from(['fit','fit','fit','validate','get_preds']))
def test_any_callbacks(plans, method):
    same_with(plans, lambda learn: learn.fit(2) if method=='fit' else getattr(learn, method)())

def plan(*events, order=1, train=True, valid=True, own=(), special='', acts=()):
    return dict(order=order, run_train=train, run_valid=valid, events=list(events), own=list(own),
                special=special, acts=list(acts))

def fit_twice(learn): learn.fit(2)

def test_flags_in_a_fit():
    log, = same_with([plan('before_batch', acts=[(0, 1, ('flag', 'run', False))])], fit_twice)
    assert len(log)==2

def test_flags_of_ours_in_a_fit():
    "They are asked again where something has changed: also within an event, and for a single part of the fit"
    for flag in ('run','run_train'):
        acts = [(0, 1, ('flag', flag, False))]
        log, = same_with([plan('before_batch', special='ours', acts=acts)], fit_twice)
        assert len(log)==(2 if flag=='run' else 8)
    first = lambda *act: plan('after_batch', order=0, acts=[(0, 1, act)])
    ours = plan('after_batch', special='ours')
    for act,n in (('gain', 1, 'after_batch'),12),(('remove', 1),1),(('gain', 1, 'before_batch'),22):
        logs = same_with([first(*act), ours], fit_twice)
        assert len(logs[1])==n, act

def test_a_deleted_method_and_flag_of_ours():
    class Deletes(Callback):
        def after_batch(self):
            if not self.training: return
            cb,own = self.learn.ours,lambda: seen.append('own')
            if self.train_iter==1: cb.after_loss = own
            if self.train_iter==2: cb.run_train = False
            if self.train_iter==4: del cb.run_train, cb.after_loss
    class Ours(ext.ExtCallback):
        run_valid = False
        def after_loss(self): seen.append(self.train_iter)
    found = []
    for cbs in ([], [ext.FastLoop()]):
        seen = []
        learn = tiny().add_cbs([Deletes(), Ours(), *cbs])
        with learn.no_logging(): learn.fit(2)
        found.append(seen)
    assert found[0]==found[1] and found[0]

def test_removed_and_added_in_an_event():
    "Whoever is removed is still called in this event, detached; whoever is added, from the next one on"
    first = plan('after_batch', order=0, acts=[(0, 1, ('remove', 1)), (0, 2, ('add', 'after_batch'))])
    logs = same_with([first, plan('after_batch', order=1, train=False)], fit_twice)
    assert [len(o) for o in logs]==[12,1,9]

def test_a_learner_with_an_event_of_its_own():
    "fastai calls it for every callback that does not define the event"
    seen = []
    def make_learner():
        learn,n = tiny(),[]
        learn.after_pred = lambda: n.append(1)
        seen.append(n)
        return learn
    same(make_learner, fit_twice)
    assert 20<len(seen[0])<=len(seen[1])<=len(seen[0])*1.5      # `FastLoop` is one more callback

def test_own_call_and_flag():
    log, = same_with([plan('after_loss', special='calls')], fit_twice)
    assert len(log)>90
    log, = same_with([plan('after_loss', special='training', valid=False)], fit_twice)
    assert log==[]

@pytest.mark.parametrize('exc', errors, ids=lambda o: o.__name__)
def test_each_exception_in_each_event(exc):
    "In the second of three training batches, in the second epoch's validation, or in the fit's own events"
    for e in some(events, 5):
        same_with([plan(e, acts=[(0, 1 if 'fit' not in e else 0, ('raise', exc))])], fit_twice, n_valid=4)

# --- stepping back, leaving no trace ------------------------------------------------------------
class OwnCall(Learner):
    sent = 0
    def __call__(self, event_name): OwnCall.sent += 1; return super().__call__(event_name)
class OwnSteps(Learner):
    def __init__(self, *args, **kwargs): self.used = set(); super().__init__(*args, **kwargs)
    def _set_device(self, b): self.used.add('_set_device'); return super()._set_device(b)
    def _split(self, b): self.used.add('_split'); return super()._split(b)
    def one_batch(self, i, b): self.used.add('one_batch'); return super().one_batch(i, b)
    def _do_one_batch(self): self.used.add('_do_one_batch'); return super()._do_one_batch()
    def _with_events(self, *args): self.used.add('_with_events'); return super()._with_events(*args)
    def _do_grad_opt(self): self.used.add('_do_grad_opt'); return super()._do_grad_opt()
    def all_batches(self): self.used.add('all_batches'); return super().all_batches()

def of_class(cls):
    def f():
        set_seed(0)
        dls = digits_learner(n=160, bs=32).dls
        from fastai_callbacks_ext.test_utils import digits_model
        learn = cls(dls, digits_model(), CrossEntropyLossFlat(), metrics=accuracy)
        learn.recorder.add_time = False
        return learn
    return f

def test_own_events_are_kept(capsys):
    learn = of_class(OwnCall)().add_cb(ext.FastLoop())
    OwnCall.sent = 0
    fit(learn)
    n = OwnCall.sent
    assert capsys.readouterr().out.count('OwnCall has its own __call__')==1
    assert len(learn.fast_loop.records)==1
    learn.remove_cb(ext.FastLoop); OwnCall.sent = 0
    fit(learn)
    assert n==OwnCall.sent>40
    learn.add_cb(ext.FastLoop()).validate()
    assert learn.fast_loop.records==[] and 'own __call__' not in capsys.readouterr().out    # it is no fit

def test_own_methods_are_kept():
    learn = of_class(OwnSteps)().add_cb(ext.FastLoop())
    fit(learn)
    assert len(learn.used)==7 and learn.fast_loop.records==[]
    same(of_class(OwnSteps), fit2)

class Replaces(Callback):
    "Replaces methods of the learner for the length of a fit"
    def before_fit(self):
        self.n,old = 0,self.learn._do_one_batch
        def counted(): self.n += 1; old()
        self.learn._do_one_batch = counted
    def after_fit(self): del self.learn._do_one_batch
class ReplacesEvents(Callback):
    def before_fit(self):
        self.seen,old = [],self.learn._call_one
        self.learn._call_one = lambda e: (self.seen.append(e), old(e))
    def after_fit(self): del self.learn._call_one

def test_replaced_methods_are_kept():
    cb = Replaces()
    learn = fit(digits_learner([ext.FastLoop(), cb], n=160, bs=32))
    assert cb.n==len(learn.dls.train)+len(learn.dls.valid) and not learn.fast_loop.records
    cb = ReplacesEvents()
    learn = fit(digits_learner([ext.FastLoop(), cb], n=160, bs=32))
    assert cb.seen.count('after_batch')==len(learn.dls.train)+len(learn.dls.valid)
    assert learn.fast_loop.records[0].why=='Learner has its own _call_one'

class InFit(Callback):
    order = 2000
    def __init__(self, f): self.f = f
    def after_batch(self):
        if not self.training or self.iter!=1 or getattr(self, 'done', False): return
        self.done = True
        self.got = self.f(self.learn)

def test_copied_and_exported_in_a_fit(tmp_path):
    "What leaves the fit is a plain learner"
    def f(learn):
        assert type(learn) is not Learner and isinstance(learn, Learner) and type(learn).__name__=='Learner'
        xb,yb,pred,loss,dl = learn.xb,learn.yb,learn.pred,learn.loss,learn.dl
        learn.export(); learn.xb,learn.yb,learn.pred,learn.loss,learn.dl = xb,yb,pred,loss,dl
        return copy.copy(learn)
    cb = InFit(f)
    learn = digits_learner([ext.FastLoop(), cb], n=160, bs=32); learn.path = tmp_path
    fit(learn)
    assert type(cb.got) is Learner
    loaded = load_learner(tmp_path/'export.pkl')
    assert type(loaded) is Learner and not set(vars(loaded)) & {'_table'}
    with quiet(loaded): loaded.get_preds(dl=learn.dls.valid)

def test_a_fit_in_a_fit():
    def f(learn):
        other = fit(digits_learner(ext.FastLoop(), n=160, bs=32))
        return type(other)
    cb = InFit(f)
    fit(digits_learner([ext.FastLoop(), cb], n=160, bs=32))
    assert cb.got is Learner

@pytest.mark.skipif(torch.cuda.is_available(), reason='fastai fails in it, on a GPU in another place')
def test_a_fit_in_its_own_fit():
    "A callback of this package keeps the outer fit in place, with `FastLoop` or without"
    same(small(lambda: InFit(lambda learn: fit(learn) and None), lambda: ext.StepLimit(10**6)), fit2)

class Label(TensorBase): pass
class Seen(Callback):
    order = 10
    def before_batch(self): self.types = type(self.x),type(self.y)

def test_targets_are_cast():
    "Also where only they are of a subclass of `Tensor`"
    learn = digits_learner([ext.FastLoop(), Seen()], n=160, bs=32)
    for dl in learn.dls.loaders: dl.after_batch = lambda b: (b[0], b[1].as_subclass(Label))
    fit(learn)
    assert learn.seen.types==(torch.Tensor, torch.Tensor)

def test_batches_are_moved():
    def f(learn):
        b = learn.xb + learn.yb
        assert learn._set_device(b) is b
        # fastai's tries to move it
        with pytest.raises(NotImplementedError): learn._set_device((b[0].to('meta'), b[1]))
    fit(digits_learner([ext.FastLoop(), InFit(f)], n=160, bs=32))

def test_removed_in_a_fit():
    same(small(lambda: InFit(lambda learn: learn.remove_cb(ext.FastLoop) and None)), fit2)

def test_a_class_that_gains_a_method():
    "From the next phase on"
    class Late(Callback): n = 0
    def gain(learn):
        @patch
        def after_batch(self:Late): self.n += 1
    learn = fit(digits_learner([ext.FastLoop(), Late(), InFit(gain)], n=160, bs=32))
    assert learn.late.n>=len(learn.dls.valid)

def test_all_of_ours_removed_in_a_fit():
    "What is taken off sleeps from the next event on, and the loop is fastai's again at once"
    def take_off(learn):
        learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ext.ExtCallback)])
        assert type(learn) is Learner and 'remove_cbs' not in vars(learn)
    ours = ext.TerminateOnNaN,ext.GradientClip,ext.SpikeGuard,lambda: ext.StepLimit(100)
    same(small(*ours, lambda: InFit(take_off)), fit2)

class Sleeper(ext.ExtCallback):
    "Counts batches while it is awake: from the third to the sixth, and in no validation inside the fit"
    def __init__(self): self.seen = []
    def before_fit(self): self.run = False
    def after_batch(self): self.seen.append(self.learn.train_iter)
class Wakes(Callback):
    order = 70
    def after_batch(self):
        if self.training and self.train_iter in (2,6): self.learn.sleeper.run = self.train_iter==2
class Validates(Callback):
    order = 80
    def after_batch(self):
        if self.training and self.train_iter==4: self.learn.get_preds(inner=True, dl=self.dls.valid)

def test_sleeping_callbacks():
    "A callback acts while `run` says so, as in fastai's loop; `validate` inside a fit is no fit"
    def use(learn):
        fit2(learn)
        assert learn.sleeper.seen==[3, 4, 4, 5, 6]      # the epoch's own validation is after its fourth batch
    for beside in ([], [Validates]): same(small(Sleeper, Wakes, *beside), use)

# --- no waiting ---------------------------------------------------------------------------------
class Waits(TorchFunctionMode):
    "Counts what would wait for a device"
    names = {'item','cpu','tolist','numpy','nonzero',
             *(f'__{o}__' for o in ('bool','float','int','index','format','repr'))}
    def __init__(self): super().__init__(); self.seen = []
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__name__', '') in self.names: self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))

class BatchWaits(Callback):
    "What waits in the batches from the fourth of a phase to its last"
    order = 2000
    def __init__(self): self.mode,self.found = Waits(),{}
    def after_batch(self):
        if self.iter==2: self.mode.seen.clear()
        if self.iter==self.n_iter-1: self.found['train' if self.training else 'valid'] = list(self.mode.seen)

def waits(cbs, bar):
    cb = BatchWaits()
    learn = digits_learner([cb, *cbs], bs=32)
    bars = contextlib.nullcontext() if bar else learn.no_bar()
    with cb.mode, learn.no_logging(), contextlib.redirect_stdout(io.StringIO()), bars: learn.fit(1)
    return cb.found

def test_batches_do_not_wait():
    plain,fast = waits([], False),waits([ext.FastLoop()], False)
    assert len(plain['train'])>20 and len(plain['valid'])>=8     # the test sees fastai wait
    assert fast=={'train':[], 'valid':[]}
    with_bar = waits([ext.FastLoop()], True)
    assert len(with_bar['train'])+len(with_bar['valid'])<20<len(waits([], True)['train'])
