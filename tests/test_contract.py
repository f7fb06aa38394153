"""The contract of every public callback; new ones join by themselves

With digits each callback meets everything; settings and pairs are sampled (all: `make soak-contract`)."""
import inspect, random
from functools import cache
from pathlib import Path

import pytest, torch
from fastai.callback.all import (BnFreeze, CSVLogger, EarlyStoppingCallback, GradientAccumulation,
                                 GradientClip, ReduceLROnPlateau, SaveModelCallback, ShortEpochCallback)
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.rnn import RNNCallback
from fastai.learner import load_learner
from fastai.torch_core import set_seed
from fastcore.docments import docments
import contract
import fastai_callbacks_ext.all as ext
from common import (EXACT, NEEDS, Exports, ExtCallback, export, finite, fit, learner, make, public_callbacks,
                    quiet, suit, traces)

callbacks = public_callbacks()
each = pytest.mark.parametrize('cls', callbacks, ids=lambda o: o.__name__)

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def some(cls, all, n):
    "`n` of `all`, others for each callback"
    return random.Random(cls.__name__).sample(list(all), n)

class Leave(Callback):
    "Leaves the fit in the second training batch"
    order = 100
    def __init__(self, exc): self.exc = exc
    def after_batch(self):
        if self.training and self.iter==1: raise self.exc

@each
def test_defaults_and_name(cls):
    cb = make(cls)
    assert isinstance(cb, Callback) and cb.name==cb.name.lower() and '__' not in cb.name
    assert cls.__doc__ and cb.records==[]

@each
def test_documented(cls):
    "Each argument has a comment, for the table on the docs page"
    if cls.__init__ is ExtCallback.__init__: return
    docs = {k:v for k,v in docments(cls, full=True).items() if k not in ('self','return')}
    assert docs and all(v.docment for v in docs.values()), docs

@each
def test_fits(cls):
    for method in some(cls, ('fit','fit_one_cycle','fit_flat_cos','fine_tune'), 2):
        learn = fit(learner(cls), method=method)
        assert finite(learn) and len(learn.recorder.values)==1, method

@each
def test_passed_to_two_fits(cls):
    cb,learn = make(cls),learner(cls, cbs=[])
    suit(learn, cb)
    fit(learn, cbs=cb); fit(learn, cbs=cb)
    fit(learn, method='fine_tune', cbs=cb)
    assert cb.learn is None and not cb._scopes and finite(learn)

@each
def test_taken_off_in_mid_fit(cls):
    "What it had opened is closed at once, and the fit goes on"
    class TakeOff(Callback):
        order = 100
        def after_batch(self):
            if self.train_iter!=2 or cb.learn is None: return
            self.learn.remove_cb(cb)
            self.left = list(cb._scopes)
            if cls is ext.RNNCallback: self.learn.add_cb(RNNCallback())     # the loss cannot do without
    cb,off = make(cls),TakeOff()
    learn = fit(learner(cls, cbs=[cb, off]), 2)
    assert off.left==[] and cb.learn is None and finite(learn) and len(learn.recorder.values)==2

@cache
def validated():
    "What an untrained learner gives without any callback"
    with quiet(learn := learner()): return learn.validate()

@each
def test_outside_a_fit(cls):
    "`validate`, `get_preds`, `lr_find` change no weights, no statistics, and give what they give without it"
    learn = learner(cls)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with quiet(learn):
        if cls not in NEEDS:
            assert learn.validate()==validated()
            learn.predict(learn.dls.valid_ds[0][0])
        learn.validate(); preds = learn.get_preds()[0]
        learn.lr_find(show_plot=False, num_it=5, suggest_funcs=None)
        learn.validate()
    assert preds.isfinite().all()
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    assert getattr(learn, make(cls).name).records==[]

@each
def test_same_results_after_lr_find(cls):
    "A fit after `lr_find` and `validate` is the fit without them"
    def run(first):
        learn = learner(cls)
        if first:
            with quiet(learn): learn.lr_find(show_plot=False, num_it=5, suggest_funcs=None); learn.validate()
        learn.create_opt(); set_seed(1); learn.dls.train.rng.seed(1)
        return fit(learn).recorder.values
    torch.testing.assert_close(torch.tensor(run(True)), torch.tensor(run(False)), **EXACT)

@each
def test_export(cls, tmp_path):
    learn = learner(cls); learn.path = tmp_path
    dl = learn.dls.valid
    fit(learn)
    with quiet(learn): want = learn.get_preds(dl=dl)[0]
    export(learn)
    loaded = load_learner(tmp_path/'export.pkl', cpu=not torch.cuda.is_available())
    assert any(type(cb) is cls for cb in loaded.cbs)
    with quiet(loaded): torch.testing.assert_close(loaded.get_preds(dl=dl)[0], want)
    fit(learn)

def exported(cls, *cbs):
    "Exports in mid-fit load, with the weights of then; their sizes"
    learn = learner(cls, cbs=[*cbs, exports := Exports()], path='.')
    dl = learn.dls.valid
    fit(learn)
    for name,weights in exports.weights.items():
        loaded = load_learner(name, cpu=not torch.cuda.is_available())
        for k,v in loaded.model.state_dict().items(): assert torch.equal(v, weights[k]), k
        with quiet(loaded): assert loaded.get_preds(dl=dl)[0].isfinite().all()
    return [Path(name).stat().st_size for name in ('batch.pkl','epoch.pkl')]

@cache
def exported_without(needs): return exported(ext.RNNCallback, RNNCallback()) if needs else exported(None)

@each
def test_export_in_mid_fit(cls):
    "It has nothing of the running fit: no data, no weights but those in use"
    kwargs = dict(restore_best=True) if cls is ext.EarlyStopping else {}
    sizes = exported(cls, make(cls, **kwargs))
    for size,plain in zip(sizes, exported_without(cls in NEEDS)): assert size<plain+4096

class Start(Callback):
    "Fails when all others have started"
    order = 100
    def before_fit(self): raise OSError('broken')

endings = {'finished':[], 'cancelled':[Leave(CancelFitException())], 'error':[Leave(OSError('broken'))],
           'interrupted':[Leave(KeyboardInterrupt())], 'start':[Start()]}

def traces_after(learn, leave, cbs=None):
    "What is left after a fit in which `leave` acts"
    learn.add_cbs(leave)
    with quiet(learn):
        try: learn.fit(1, cbs=cbs)
        except (OSError, KeyboardInterrupt): assert leave
    learn.remove_cbs(leave)
    return traces(learn)

@each
@pytest.mark.parametrize('where', ['learner','fit'])
def test_leaves_no_trace(cls, where):
    "However the fit ends, what is left is what fastai leaves without the callback"
    for how in endings if where=='learner' else some(cls, endings, 2):
        plain = learner(cls, cbs=[RNNCallback()] if cls is ext.RNNCallback else [])
        cb = make(cls)
        learn = learner(cls, cbs=[cb] if where=='learner' else [])
        suit(learn, cb), suit(plain, cb)
        left = traces_after(learn, endings[how], [] if where=='learner' else [cb])
        want = traces_after(plain, endings[how])
        left['attrs'] -= {cb.name}; want['attrs'] -= {cb.name}
        assert left==want and not cb._scopes, how
        if how=='interrupted': assert finite(fit(learn, cbs=[] if where=='learner' else [cb]))

def plain(o):
    "`o` with lists for tensors"
    if isinstance(o, torch.Tensor): return o.tolist()
    if isinstance(o, dict): return {k: plain(v) for k,v in o.items()}
    return [plain(v) for v in o] if isinstance(o, (list,tuple)) else o

@each
def test_state(cls):
    cb = make(cls)
    fit(learner(cls, cbs=[cb]))
    state,other = cb.state_dict(),make(cls)
    other.load_state_dict(state)
    assert plain(other.state_dict())==plain(state)
    with pytest.raises(ValueError, match=cb.name): other.load_state_dict({'nonsense': 1})

@each
def test_the_same_callback_twice(cls):
    "Refused at the start of the fit, in one line; the fit before and the callbacks are as they were"
    learn = fit(learner(cls, cbs=[cb := make(cls)]))
    n,before,state = len(learn.cbs),traces(learn),plain(cb.state_dict())
    for cbs in cb,[Leave(OSError()), cb]:
        match = f'^{cb.name}: the same callback is on the learner twice; expected once.*fit.cbs'
        with pytest.raises(ValueError, match=match): fit(learn, cbs=cbs)
        assert getattr(learn, cb.name) is cb and cb.learn is learn and not cb._scopes
        assert cb in learn.cbs and len(learn.cbs)==n
        assert plain(cb.state_dict())==state and traces(learn)==before
    assert finite(fit(learn))

singles = {'SAM': ext.SAM, 'GradientAccumulation': ext.GradientAccumulation, 'SWA': lambda: ext.SWA(lr=.1)}
@pytest.mark.parametrize('name', singles)
def test_two_that_cannot_both_be(name):
    "Refused in one line, before others begin; outside of a fit, and one by one, they are right"
    cb,other = singles[name](),singles[name]()
    learn = fit(learner(cbs=[cb, ema := ext.EMA(validate='raw', final='raw')]))
    with pytest.raises(ValueError, match=f'^{cb.name}: two callbacks {name} are on the learner; expected'):
        fit(learn, cbs=other)
    assert getattr(learn, cb.name) is cb and cb.learn is learn
    assert other.learn is None and other not in learn.cbs
    with ema.using('ema'), quiet(learn): learn.validate(cbs=other)
    learn.remove_cb(cb)
    assert finite(fit(learn, cbs=other))

@each
def test_bf16(cls): assert finite(fit(learner(cls).to_bf16()))

refused = {'accumulate': ext.GradientAccumulation, 'clip': ext.GradientClip}      # beside their own
beside = dict(accumulate=lambda: GradientAccumulation(48), save=lambda: SaveModelCallback(fname='m'),
              short=lambda: ShortEpochCallback(0.5), stop=EarlyStoppingCallback, plateau=ReduceLROnPlateau,
              clip=GradientClip, csv=CSVLogger, freeze=BnFreeze)

@each
def test_beside_fastai(cls, tmp_path):
    for name in some(cls, beside, 1):
        learn = learner(cls, cbs=[make(cls), beside[name]()]); learn.path = tmp_path
        if refused.get(name) is not cls: assert finite(fit(learn, 2)), name

@each
def test_wrong_arguments(cls):
    "An argument of a type that nothing accepts is refused by a message that names it, and what is accepted"
    if cls.__init__ is ExtCallback.__init__: return
    for name in inspect.signature(cls).parameters:
        if (cls.__name__, name)==('ActivationStats','modules'): continue    # names, looked up in the fit
        wrong = {name: ['wrong']}
        with pytest.raises((TypeError, ValueError), match=f'{name}=.*expected'): make(cls, **wrong)

# --- as people run it: a sample -----------------------------------------------------------------
sample = list(contract.sample(seed=1))

def test_sample_has_all():
    assert {cls for cls,_ in sample}==set(callbacks) and {s for _,s in sample}==set(contract.SETTINGS)
    assert {o for pair in contract.sample_pairs() for o in pair}==set(callbacks)

@pytest.mark.parametrize('cls,setting', sample, ids=lambda o: getattr(o, '__name__', o))
@pytest.mark.parametrize('prop', contract.PROPERTIES)
def test_in_its_setting(prop, cls, setting):
    if prop in (checks := contract.checks_in(setting)): checks[prop](cls, setting)

@pytest.mark.parametrize('a,b', contract.sample_pairs(), ids=lambda o: o.__name__)
def test_pairs(a, b): contract.pair(a, b)

GOES_ON = '''
from fastai.callback.all import Callback, ShowGraphCallback
from fastai_callbacks_ext.test_utils import digits_learner
class StopIn(Callback):
    order = 3000
    def __init__(self, *at): self.at = at
    def after_batch(self):
        if self.training and (self.epoch,self.iter)==self.at: raise KeyboardInterrupt
def go(*stop):
    learn = digits_learner([ShowGraphCallback(), *([StopIn(*stop)] if stop else [])], n=160, bs=32)
    try: learn.fine_tune(2, 1e-2, cbs=ext.Checkpoint('run', steps=2, background=False))
    except KeyboardInterrupt: pass
    return learn
for stop in ((0,2), (1,1), (1,3)): go(*stop)
print('RESULT', len(go().recorder.values))
'''

@pytest.fixture(scope='module')
def notebook(tmp_path_factory):
    "A notebook in which some callbacks train and go on after an interrupt, and a run goes on with a graph"
    pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    names = ['Checkpoint','FastLoop', *random.Random(0).sample([o.__name__ for o in callbacks], 1)]
    return contract.in_notebook(names, tmp_path_factory.mktemp('notebook'), GOES_ON)

def test_in_a_notebook(notebook):
    "With the bar and the table of a notebook: fits, and going on after an interrupt"
    assert list(contract.notebook_problems(notebook))==[]

def test_goes_on_in_a_notebook(notebook):
    "Each cell that is run again goes on where the last one was interrupted, beside fastai's graph"
    text = ''.join(o.get('text', '') for o in notebook.cells[-1].outputs)
    assert 'RESULT 2' in text and text.count('resumed in epoch')>=3, text

def test_a_notebook_can_fail(monkeypatch):
    "The test above can fail: a cell with an error, a cell without a bar"
    nbformat = pytest.importorskip('nbformat')
    cell = nbformat.v4.new_code_cell
    error = nbformat.v4.new_output('error', ename='OSError', evalue='broken', traceback=[])
    nb = nbformat.v4.new_notebook(cells=[cell('import os'), cell('a', outputs=[error]), cell('b')])
    assert list(contract.notebook_problems(nb))==[('a', 'OSError: broken'), ('b',)]
