"A fit with `learn.validate()`, `get_preds` or another fit in between is the fit without it"
import tempfile
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest, torch
from fastai.basics import Callback, L, Learner, set_seed
from fastai.callback.core import FetchPredsCallback
from fastai.learner import load_learner
from fastai.optimizer import Adam, OptimWrapper
from fastcore.xtras import working_directory
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.base.core import ExtCallback
from fastai_callbacks_ext.base.position import load_random_state, random_state
from fastai_callbacks_ext.test_utils import text_learner
from common import NEEDS, RNN, fit, learner, make, public_callbacks
from test_contract import plain
from test_layers import scaler

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def again(learn): return learn.dls.valid.new(shuffle=False)
LOOKS = dict(
    validate=lambda learn: learn.validate(), training_set=lambda learn: learn.validate(0),
    predictions=lambda learn: learn.get_preds(dl=again(learn)),
    inner=lambda learn: learn.get_preds(dl=again(learn), inner=True, with_loss=True),
    one=lambda learn: learn.predict(learn.dls.valid_ds[0][0]), summary=lambda learn: learn.summary(),
    export=lambda learn: learn.export('export.pkl'),
    context=lambda learn: nullcontext(learn.__enter__().__exit__(None, None, None)))

class Look(Callback):
    "In the `at`th event `when`, does something else with the learner; random numbers stay"
    looking = []        # no look inside a look
    def __init__(self, how, when='after_batch', at=2, order=70):
        self.how,self.when,self.at,self.n,self.order = how,when,at,0,order
    def __call__(self, event_name):
        if event_name!=self.when or self.looking or not self.learn.training and 'batch' in self.when: return
        self.n += 1
        if self.n%self.at: return
        self.looking.append(random_state(self.learn.dls))
        try: self.how(self.learn)
        finally: load_random_state(self.learn.dls, self.looking.pop())

def results(learn):
    "Weights, optimizer, what was recorded, and the states of callbacks"
    tensors = [*learn.model.state_dict().values(), *(v for s in learn.opt.state.values() for v in s.values()
                                                     if isinstance(v, torch.Tensor))]
    rec = learn.recorder
    seen = [[o.tolist() for o in rec.losses], rec.lrs, rec.iters, [[*o] for o in rec.values],
            learn.train_iter, learn.epoch, learn.n_epoch]
    return tensors,seen

CLOCK = 'TimeLimit','Throughput','RunLog','WriteReport'     # they keep times
def states(learn):
    ours = [cb for cb in learn.cbs if isinstance(cb, ExtCallback) and type(cb).__name__ not in CLOCK]
    drawn = 'used','best','_run'        # a time; names of files
    return {cb.name: {k: v for k,v in plain(cb.state_dict()).items() if k not in drawn} for cb in ours}

def alone(run, *looks):
    "`run` in a folder of its own"
    with tempfile.TemporaryDirectory() as d, working_directory(d): return run(*looks)

def check(run, *looks, tol=0):
    a,b = alone(run),alone(run, *looks)
    (ts,seen),(us,others) = results(a),results(b)
    assert all(cb.n for cb in looks) and len(ts)==len(us)
    for t,u in zip(ts, us): torch.testing.assert_close(u, t, rtol=tol, atol=tol)
    if not tol: assert others==seen
    np.testing.assert_equal(states(b), states(a))
    return b

def train(*cbs, cls=None, method='fit_one_cycle', prepare=None, **kwargs):
    made = [cls() for cls in L(cls)]
    learn = learner(*[type(o) for o in made], cbs=[*made, *cbs], **kwargs)
    if prepare: prepare(learn)
    return fit(learn, 2, method)

ARGS = {ext.TimeLimit: dict(schedule=False), ext.StepLimit: dict(steps=6), ext.SampleLimit: dict(samples=200),
        ext.GradientAccumulation: dict(n_acc=64), ext.MicroBatch: dict(size=10), ext.MixUp: dict(until=.5),
        ext.SWA: dict(start=.4, every=1), ext.Freeze: dict(schedule={0: '*bias*', 3: 0}, unit='steps')}
def of(cls, **kwargs): return lambda: make(cls, **ARGS.get(cls, {}) | kwargs)
every = pytest.mark.parametrize('cls', public_callbacks(), ids=lambda o: o.__name__)

@every
def test_a_look_in_mid_epoch_and_at_the_end_of_epochs(cls):
    "For each callback: the same weights, records, states; after an odd number of batches in each epoch"
    how = LOOKS['validate']
    rounds = cls is ext.ScheduleFree         # it goes to the average and back
    check(partial(needy, cls) if cls in NEEDS else partial(train, cls=of(cls)),
          Look(how, at=3), Look(how, 'after_epoch', 1, order=-20), tol=1e-5 if rounds else 0)

def needy(cls, *cbs):
    "An AWD-LSTM: its hidden states go on, too"
    rnn = [o() for o in RNN if o is not cls]
    return fit(text_learner([*rnn, make(cls), *cbs], n=3000), 2, 'fit_one_cycle')

EVENTS = 'batch','epoch','train','validate'
@pytest.mark.parametrize('how', LOOKS)
@pytest.mark.parametrize('when', [f'{o}_{e}' for o in ('before','after') for e in EVENTS])
@pytest.mark.parametrize('order', [-20, -5, 30, 2000])
def test_any_look_anywhere(how, when, order):
    if (how, when)==('inner','before_epoch'): return        # fastai's `Recorder` may have no log yet
    at = 3 if 'batch' in when else 1
    check(partial(train, cls=of(ext.StepLimit)), Look(LOOKS[how], when, at, order))

def with_train_metrics(learn): learn.recorder.train_metrics = True
SETTINGS = dict(
    fast=dict(cls=ext.FastLoop), fine_tune=dict(cls=ext.EMA, method='fine_tune'),
    flat=dict(method='fit_flat_cos'), scaler=dict(cls=scaler), window=dict(cls=of(ext.GradientAccumulation)),
    metrics=dict(prepare=with_train_metrics), fast_metrics=dict(cls=ext.FastLoop, prepare=with_train_metrics))

@pytest.mark.parametrize('setting', SETTINGS)
def test_in_any_setting(setting):
    kwargs = dict(SETTINGS[setting])
    cls = [*L(kwargs.pop('cls', None)), ExtCallback]
    check(partial(train, cls=cls, **kwargs), Look(LOOKS['validate'], at=3, order=5),
          Look(LOOKS['predictions'], 'after_epoch', 1))

# --- others -------------------------------------------------------------------------------------
def test_predictions_of_each_epoch():
    "fastai's `FetchPreds`: the table stays, and so does what the fit has open"
    a,b = train(cls=ExtCallback),train(fetch := FetchPredsCallback(), cls=ExtCallback)
    assert len(fetch.preds)==2 and len(b.recorder.values[0])==3
    assert [*a.recorder.values[0]]==[*b.recorder.values[0]]     # it draws random numbers

def test_a_look_that_fails():
    "And is caught: the fit goes on as if it had not been"
    def fails(event_name, learn):
        cb = Callback()
        setattr(cb, event_name, lambda: [][1])
        with pytest.raises(Exception, match='list index'), learn.added_cbs(cb):
            with learn: learn._do_epoch_validate()
    for event_name in ('before_fit','before_epoch','before_batch','after_validate','after_epoch','after_fit'):
        check(partial(train, cls=of(ext.StepLimit)), Look(partial(fails, event_name), at=3))

@pytest.mark.parametrize('cls', [ExtCallback, ext.Progress])
@pytest.mark.parametrize('where', ['terminal','file'])
def test_the_table_goes_on(cls, where, capsys, monkeypatch):
    "One table with a row for each epoch; and the next fit has its own"
    if where=='terminal': monkeypatch.setattr('sys.stdout.isatty', lambda: True)
    def shown(*looks):
        set_seed(0)
        learn = learner(cbs=[cls(), *looks])
        for _ in range(2): learn.fit(2)
        rows = [o.split() for o in capsys.readouterr().out.replace('\r', '\n').splitlines()]
        return [o for o in rows if o[:1] in (['0'], ['1'], ['epoch']) and len(o)==4]
    want = shown()
    assert [o[0] for o in want]==['epoch','0','1']*2
    class Child(Callback):
        "The bar below the table is that of the fit"
        order,run_valid = 3000,False
        def after_batch(self): assert self.learn.progress.mbar.child is self.learn.progress.pbar
    assert shown(Child(), Look(LOOKS['validate'], at=3), Look(LOOKS['predictions'], 'after_epoch', 1))==want

class Weights(Callback):
    "Some are frozen from the second epoch on"
    def before_epoch(self):
        for p in list(self.model.parameters())[:4]: p.requires_grad_(self.epoch==0)

OPTS = dict(fastais=Adam, wrapper=partial(OptimWrapper, opt=torch.optim.AdamW), made=None)
@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('cls', [of(ext.Freeze), lambda: Weights()], ids=['ours','own'])
def test_an_export_with_frozen_weights(cls, opt):
    "fastai's `export` makes the optimizer anew, without them; the file has no optimizer"
    def run(*looks):
        made = lambda learn: learn if opt!='made' else setattr(learn, 'opt_func', OptimWrapper(
            learn.model.parameters(), torch.optim.AdamW, lr=.01))
        return train(*looks, cls=[cls, ExtCallback], prepare=made, opt_func=OPTS[opt] or Adam, lr=.01)
    def export(learn):
        opt,state = learn.opt,learn.opt.state_dict()
        learn.export('export.pkl')
        assert learn.opt is opt and load_learner('export.pkl').opt is None
        exported.append(Path('export.pkl').stat().st_size)
    exported = []
    learn = check(run, Look(export, at=3), Look(export, 'after_epoch', 1))
    assert len(exported)==4 and type(learn) is Learner

def test_a_look_that_takes_off_the_last_callback():
    "The methods are gone, and the fit is where it was"
    def take_off(learn): learn.validate(cbs=Callback(before_validate=lambda self: learn.remove_cb(ext.EMA)))
    want = results(train(cls=[]))[1]
    learn = train(Look(take_off), cls=ext.EMA)
    assert type(learn) is Learner and results(learn)[1][4:]==want[4:] and 'remove_cbs' not in vars(learn)

def test_a_fit_in_between():
    "Another learning rate, more epochs: the counters and the rate of the outer fit go on"
    rates = []
    class Rates(Callback):
        order = 80
        def after_batch(self):
            if self.training and not Look.looking:
                rates.append((self.train_iter, self.epoch, self.n_epoch, self.opt.hypers[-1]['lr']))
    train(Look(lambda learn: fit(learn, 3, lr=.5), at=3), Rates(), cls=ExtCallback, method='fit')
    assert rates==[(i+1, i//4, 2, .01) for i in range(8)]

FIND = dict(ours=ext.lr_find, fastais=lambda learn, **kw: learn.lr_find(**kw))
@pytest.mark.parametrize('find', FIND.values(), ids=FIND)
def test_a_finder_in_between(find):
    look = Look(partial(find, num_it=12, show_plot=False), at=3)
    learn = train(look, cls=of(ext.StepLimit), method='fit')
    assert learn.train_iter==6 and len(learn.recorder.losses)==6

def test_the_log_counts_on():
    "Steps and epochs of `RunLog`; the looks are rows of their own"
    def log(*looks):
        train(*looks, cls=lambda: ext.RunLog('log.jsonl', every=1))
        return ext.read_log('log.jsonl')
    a,b = alone(log),alone(log, Look(LOOKS['validate'], at=3), Look(LOOKS['validate'], 'after_epoch', 1))
    for k in ('steps','epochs'):
        x,y = (getattr(o, k).drop(columns=['time'], errors='ignore') for o in (a, b))
        assert len(x) and x.equals(y), k
    assert len(a.validations)==0 and b.validations.step.tolist()==[3, 4, 6, 8]

def test_checkpoints_count_on():
    "Interrupted and resumed, with a look in each part"
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.learn.train_iter==5: raise KeyboardInterrupt
    cls = lambda: ext.Checkpoint('run', steps=2)
    def run(*cbs): return train(Look(LOOKS['validate'], at=3), *cbs, cls=cls)
    def parts():
        with suppress(KeyboardInterrupt): run(Stop())
        return run()
    a,b = alone(partial(train, cls=cls)),alone(parts)
    for t,u in zip(*(o.model.state_dict().values() for o in (a, b))): assert torch.equal(t, u)
    assert b.train_iter==8
