"`TimeLeft` counts right; `Progress` shows it, keeps log files clean, and leaves fastai's callback as it was"
import contextlib, io, re, sys
from types import SimpleNamespace

import pytest, torch
from fastai.callback import progress as fastais
from fastai.callback.all import (Callback, CancelFitException, ProgressCallback, ShortEpochCallback,
                                 ShowGraphCallback)
from fastai.learner import load_learner
from fastprogress import fastprogress
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext import progress
from fastai_callbacks_ext.base.timeleft import TimeLeft, on_screen
from common import Exports, learner

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

# --- the estimate -------------------------------------------------------------------------------
class Clock:
    now = 0.
    def __call__(self): return self.now

def run(left, epochs, n=(4, 2), seconds=(2., 1.), between=0., warm=0., every=1, begin=True, first=0):
    "The estimate, and the true rest without what a process needs once, after each mark"
    clock,true,found = left.clock,[],[]
    clock.now += warm
    def mark(*args):
        left.mark(*args)
        found.append(left.seconds())
        true.append(clock.now)
    for epoch in epochs:
        for training,n_phase,s in zip((True, False), n, seconds):
            if (epoch,training)!=(epochs[0],True): clock.now += between
            start = first if (epoch,training)==(epochs[0],True) else 0
            if begin: mark(epoch, training, 0, n_phase)
            for i in range(start, n_phase):
                clock.now += s
                if i%every==0 or i==n_phase-1: mark(epoch, training, i+1, n_phase)
    return found,[clock.now-o for o in true]

def test_exact_once_all_is_known():
    "From the second epoch on, with what lies between the phases; before, it is not known"
    found,true = run(TimeLeft(4, 4, 2, Clock()), range(4), between=3.)
    assert found[:2]==[None, None] and found[2]==2*2 + 2*1 + 3*(8+2)
    last = true[-1]+3                # of the last validation on, nothing lies ahead
    assert found[-1]==0==true[-1]
    assert found[17:24]==pytest.approx(true[17:24])
    assert found[24:]==pytest.approx(true[24:])

@pytest.mark.parametrize('every', [1, 3])
@pytest.mark.parametrize('begin', [True, False])
def test_what_marks_there_are(every, begin):
    "Each batch or not, with the beginnings of phases or without"
    found,true = run(TimeLeft(6, 8, 4, Clock()), range(6), n=(8, 4), every=every, begin=begin)
    assert found[-1]==0 and found[len(found)//2:]==pytest.approx(true[len(found)//2:])

def test_a_slow_first_batch_counts_nowhere():
    warm,_ = run(TimeLeft(3, 4, 2, Clock()), range(3), warm=100.)
    plain,_ = run(TimeLeft(3, 4, 2, Clock()), range(3))
    assert warm==plain
    clock = Clock()
    left = TimeLeft(2, 4, 0, clock)
    left.mark(0, True, 0)
    clock.now = 60.
    left.mark(0, True, 1)
    assert left.seconds() is None
    clock.now = 61.
    left.mark(0, True, 2)
    assert left.seconds()==2+4

@pytest.mark.parametrize('epoch,first', [(2, 0), (2, 2)])
def test_a_run_that_goes_on(epoch, first):
    "By `start_epoch`, or in the middle of an epoch"
    found,true = run(TimeLeft(5, 4, 2, Clock()), range(epoch, 5), first=first)
    known = next(i for i,o in enumerate(found) if o is not None)
    assert known==2 and found[-1]==0 and found[-8:]==pytest.approx(true[-8:])

def test_a_machine_that_gets_slower():
    clock = Clock()
    left = TimeLeft(8, 4, 0, clock)
    for epoch in range(7):
        left.mark(epoch, True, 0)
        for i in range(4):
            clock.now += 1. if epoch<4 else 3.
            left.mark(epoch, True, i+1)
    assert 11<left.seconds()<=12

def test_a_phase_cut_short_is_expected_to_be_so_again():
    clock = Clock()
    left = TimeLeft(4, 100, 2, clock)
    for epoch in range(2):
        for i in range(11):
            left.mark(epoch, True, i, 100)
            clock.now += 1.
        for i in range(3):
            left.mark(epoch, False, i, 2)
            clock.now += 1.
    assert left.seconds()<2*15

def test_no_batches():
    left = TimeLeft(1, 0, 0, Clock())
    left.mark(0, True, 0)
    assert left.seconds() is None and left.part()==0

# --- the bar ------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self): return True

def said(f, to=io.StringIO):
    with contextlib.redirect_stdout(to()) as out: f()
    return out.getvalue()

OUTSIDE = dict(validate=lambda l: l.validate(), get_preds=lambda l: l.get_preds(),
               lr_find=lambda l: l.lr_find(show_plot=False, num_it=5, suggest_funcs=None))

@pytest.mark.parametrize('loop', [[], [ext.FastLoop]], ids=['plain','fast'])
def test_a_log_file_has_the_table_only(loop):
    "fastai's bars are in it otherwise"
    assert '\r' in said(lambda: learner(cbs=[]).fit(2))
    learn = learner(ext.Progress, *loop)
    out = said(lambda: learn.fine_tune(2))
    assert '\r' not in out and '█' not in out
    lines = [o.split() for o in out.splitlines()]
    assert [o[0] for o in lines]==['epoch','0','epoch','0','1']
    for f in OUTSIDE.values(): assert '\r' not in said(lambda: f(learn))

QUIET = OUTSIDE | dict(our_finder=lambda l: ext.lr_find(l, show_plot=False, num_it=12))
def quiet_fit(learn):
    with learn.no_logging(): learn.fit(2)
QUIET['no_logging'] = quiet_fit

@pytest.mark.parametrize('to', [io.StringIO, Terminal], ids=['file','terminal'])
@pytest.mark.parametrize('name', QUIET)
def test_no_table_where_fastai_has_none(name, to):
    learn = learner(ext.Progress)
    assert 'train_loss' not in said(lambda: QUIET[name](learn), to)
    assert 'train_loss' in said(lambda: learn.fit(1), to) and learn.logger is print

@pytest.mark.parametrize('loop', [[], [ext.FastLoop]], ids=['plain','fast'])
def test_a_terminal_shows_the_time_left_of_the_fit(loop):
    learn = learner(ext.Progress, *loop)
    bars = [o for o in said(lambda: learn.fit(2), Terminal).split('\r') if '|' in o]
    first = [o for o in bars if o.startswith('Epoch 1/2')]
    assert re.search(r'\[0/4 00:00<\?, fit \? left\]', first[0]), first
    assert any(re.search(r'\[2/4 .*, fit 00:0\d left\]', o) for o in first), first
    assert ', fit 00:00 left]' in bars[-1] and bars[-1].startswith('Epoch 2/2')
    for f in OUTSIDE.values():
        out = said(lambda: f(learn), Terminal)
        assert '|' in out and 'left]' not in out

def test_log_or_screen(monkeypatch):
    monkeypatch.delenv('PYCHARM_HOSTED', raising=False)
    monkeypatch.setattr('fastai_callbacks_ext.base.timeleft.IN_NOTEBOOK', False)
    seen = []
    for to in (io.StringIO, Terminal): said(lambda: seen.append(on_screen()), to)
    monkeypatch.setattr(sys, 'stdout', SimpleNamespace(write=lambda s: None))
    assert seen==[False, True] and not on_screen()
    monkeypatch.setenv('PYCHARM_HOSTED', '1')
    assert on_screen()

@pytest.fixture
def notebook(monkeypatch):
    "What a notebook would show: the first content of each output, and its updates"
    pytest.importorskip('IPython')
    shown = []
    def display(o, **kwargs):
        shown.append(o)
        return SimpleNamespace(update=shown.append)
    monkeypatch.setattr('IPython.display.display', display)
    monkeypatch.setattr(fastais, 'master_bar', fastprogress.NBMasterBar)
    monkeypatch.setattr(fastais, 'progress_bar', fastprogress.NBProgressBar)
    return shown

def texts(shown):
    return [str(fastprogress.to_xml(o)) for o in shown if type(o).__name__ not in ('HTML','Figure')]

def test_a_notebook_shows_it_on_the_bar_of_the_epochs(notebook):
    learn = learner(ext.Progress)
    assert '\r' not in said(lambda: learn.fit(2))
    html = texts(notebook)
    main = [m for o in html if (m := re.search(r'([\d.]+)% \[(\d)/2 \d\d:\d\d&lt;(\?|\d\d:\d\d)\]', o))]
    parts = [float(m[1]) for m in main]
    assert any(m[2]=='0' and m[3]!='?' for m in main), html[:9]      # in the first epoch
    assert parts==sorted(parts) and parts[-1]==100
    assert 'valid_loss' in html[-1] and '<progress' not in html[-1]        # the table stays
    notebook.clear()
    learn.validate()
    assert notebook and type(learn.progress) is ProgressCallback

def test_beside_the_graph(notebook):
    learn = learner(cbs=[ext.Progress(), ShowGraphCallback()])
    learn.fit(2)
    assert len(learn.recorder.values)==2 and any('Figure' in type(o).__name__ for o in notebook)

class Leave(Callback):
    order = 100
    def __init__(self, exc): self.exc = exc
    def after_batch(self):
        self.seen = type(self.learn.progress)
        if self.training and self.iter==1: raise self.exc

@pytest.mark.parametrize('exc', [CancelFitException(), OSError('broken'), KeyboardInterrupt()], ids=repr)
def test_put_back_however_it_ends(exc):
    learn = learner(cbs=[leave := Leave(exc), ext.Progress()])
    theirs = learn.progress
    with contextlib.suppress(OSError, KeyboardInterrupt): said(lambda: learn.fit(1))
    assert issubclass(leave.seen, ProgressCallback) and leave.seen is not ProgressCallback
    assert learn.progress is theirs and type(theirs) is ProgressCallback
    learn.remove_cb(leave)
    assert '\r' not in said(lambda: learn.fit(1))

def test_no_bar_and_after_it():
    "fastai then adds a new callback"
    learn = learner(ext.Progress)
    def f():
        with learn.no_bar(): learn.fit(1)
    assert '|' not in said(f, Terminal)
    assert 'left]' in said(lambda: learn.fit(1), Terminal)
    learn.remove_cb(ProgressCallback)
    assert '|' not in said(lambda: learn.fit(1), Terminal)

def test_an_export_in_mid_fit_has_fastais_callback(tmp_path):
    learn = learner(cbs=[ext.Progress(), Exports()], path=tmp_path)
    said(lambda: learn.fit(1))
    for name in ('batch.pkl','epoch.pkl'):
        loaded = load_learner(tmp_path/name, cpu=not torch.cuda.is_available())
        assert type(loaded.progress) is ProgressCallback
        assert '\r' not in said(lambda: loaded.get_preds(dl=learn.dls.valid))

def test_with_the_fast_loop_it_is_as_quick():
    "The replacement of `FastLoop` calls the bar"
    calls = []
    class Look(Callback):
        order = 100
        def after_batch(self):
            calls.append({type(cb): method for _,cb,_,_,method,_ in type(self.learn)._table['after_batch']})
    said(lambda: learner(cbs=[Look(), ext.Progress(), ext.FastLoop()]).fit(1))
    methods = [m for c,m in calls[0].items() if issubclass(c, ProgressCallback)]
    assert [m.__qualname__ for m in methods]==['_progress.<locals>.after_batch']

def test_the_estimate_is_asked_for_a_few_times_only(monkeypatch):
    "Not in each batch, but when the bar is drawn: the clock of the bar goes on by 10 ms a batch"
    marks,clock = [],Clock()
    monkeypatch.setattr(fastprogress.time, 'time', clock)
    monkeypatch.setattr(TimeLeft, 'mark', lambda self, *args: marks.append(args))
    class Tick(Callback):
        order = 0
        def after_batch(self): clock.now += .01
    learn = learner(cbs=[Tick(), ext.Progress()])
    learn.dls.train.bs = 1
    said(lambda: learn.fit(1), Terminal)
    assert learn.train_iter==128 and len(marks)<30

def test_short_epochs_and_skipped_ones():
    learn = learner(cbs=[ShortEpochCallback(.5), ext.Progress()])
    assert 'left]' in said(lambda: learn.fit(3, start_epoch=1), Terminal)

def test_bars_of_another_kind(monkeypatch):
    "That a script has chosen"
    class Mine(fastprogress.ConsoleProgressBar): fill = '#'
    monkeypatch.setattr(fastais, 'progress_bar', Mine)
    out = said(lambda: learner(ext.Progress).fit(1), Terminal)
    assert '|#' in out and 'left]' in out
    assert progress._of_fit(Mine) is progress._of_fit(Mine)

@pytest.mark.parametrize('to', [io.StringIO, Terminal], ids=['file','terminal'])
def test_a_checkpoint_is_the_same_with_it_and_without(to):
    "Nothing of the bars is saved; a run may go on without it, or with it"
    saves = lambda: ext.Checkpoint('run', steps=2, background=False)
    class Stop(Callback):
        order = 3000
        def __init__(self, *at): self.at = at
        def after_batch(self):
            if self.training and (self.epoch,self.iter)==self.at: raise KeyboardInterrupt
    def go(*cbs):
        learn = learner(cbs=[*cbs, saves()])
        with contextlib.suppress(KeyboardInterrupt): learn.fit(3)
        return learn
    want = learner(cbs=[])
    said(lambda: want.fit(3))
    out = said(lambda: go(ext.Progress(), Stop(0, 2)), to)
    out += said(lambda: go(Stop(1, 1)), to)
    learn = []
    out += said(lambda: learn.append(go(ext.Progress())), to)
    assert out.count('resumed')==2 and 'cannot' not in out and 'lost' not in out, out
    for p,q in zip(learn[0].model.parameters(), want.model.parameters()): assert torch.equal(p, q)

def test_a_validation_inside_a_fit_is_not_counted():
    class Validates(Callback):
        order = 90
        def after_train(self):
            with self.learn.no_logging(): self.learn._do_epoch_validate()
            self.learn.model.train()
    learn = learner(cbs=[Validates(), ext.Progress()])
    assert 'left]' in said(lambda: learn.fit(2), Terminal) and len(learn.recorder.values)==2

def test_upgrade_adds_it(capsys):
    learn = ext.upgrade(learner())
    assert 'ProgressCallback + Progress' in capsys.readouterr().out
    ext.upgrade(learn)
    assert capsys.readouterr().out=='upgrade: nothing to swap\n'
    assert len([o for o in learn.cbs if isinstance(o, ext.Progress)])==1
    with learn.no_bar(): ext.upgrade(bare := learner().remove_cb(ProgressCallback))
    assert not any(isinstance(o, ext.Progress) for o in bare.cbs)
