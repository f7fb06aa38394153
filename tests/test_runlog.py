"The log of a run: one file over all fits, right after kills, resumes, errors; never in the way"
import json, os, pickle, random, shutil, signal, sys, threading, time
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest, torch
from fastai.callback.all import ShortEpochCallback
from fastai.learner import Recorder
from fastai.metrics import AvgMetric
from fastcore.imports import noop
from fastai.callback.core import (Callback, CancelBatchException, CancelEpochException, CancelFitException,
                                  CancelTrainException, CancelValidException)
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.rows import RowFeed, RowFile, read_rows
from fastai_callbacks_ext.runlog import RunLog, Sink, read_log
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner, text_learner
from common import exit_code, fit, learner, quiet

def small(*cbs, **kwargs): return learner(cbs=[*cbs], **kwargs)      # 4 batches in an epoch

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

class Kill(Callback):
    "SIGKILL at some moment: when an event is sent for the nth time in this process"
    n = 0
    def __init__(self, event, at, order): self.event,self.at,self.order = event,at,order
    def __call__(self, event_name):
        if event_name==self.event: self.n += 1
        if self.n==self.at: os.kill(os.getpid(), signal.SIGKILL)

class TellsEpochs(ExtCallback):
    "An intervention between an epoch's last batch and the checkpoint of that epoch"
    def after_epoch(self): self.tell('looked', f'epoch {self.epoch} has ended')

def tuned(*cbs):
    learn = small(*cbs, SkipNonFinite(), TellsEpochs(), PoisonBatch((1,6)))
    with quiet(learn): learn.fine_tune(2, 1e-2)

EVENT = 'fit','step','epoch','batch','what','why'
def one_table(run):
    "What must be there once, whatever happened"
    return (run.steps[['fit','step','epoch','batch','loss','lr']].fillna('no loss').to_dict('records'),
            run.epochs.drop(columns='time').to_dict('records'),
            run.events[run.events.callback!='checkpoint'][list(EVENT)].fillna('none').to_dict('records'))

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    os.chdir(tmp_path_factory.mktemp('whole'))
    tuned(RunLog(every=1))
    return one_table(read_log())

EVENTS = '''before_fit before_epoch before_batch before_step after_batch after_train after_epoch
    after_fit'''.split()

@pytest.mark.parametrize('seed', [2,17])       # of 121 that were tried, two in which a first version failed
def test_killed_again_and_again(seed, whole):
    "Each step and epoch is in the tables once, with the numbers of a run that was never killed"
    rng = random.Random(seed)
    def attempt(*cbs): tuned(RunLog(every=1), Checkpoint('saved', steps=2, background=False), *cbs)
    for _ in range(4):
        kill = Kill(rng.choice(EVENTS), rng.randrange(1, 6), rng.choice((-50, 1995, 2050)))
        exit_code(partial(attempt, kill))
    assert exit_code(attempt)==0
    with_steps = [f for f in Path('runs').glob('*.jsonl') if read_log(f).status=='finished']
    run = read_log(with_steps[-1])
    assert one_table(run)==whole
    assert [o['status'] for o in run.fits]==['finished']*2

def test_one_file_over_all_calls():
    log = RunLog(every=1)
    learn = small(log)
    with quiet(learn):
        learn.validate()
        learn.lr_find(show_plot=False)
        learn.fit(1)
        learn.get_preds()
        learn.fine_tune(1)
        learn.validate()
        learn.lr_find(show_plot=False)
    run = read_log()
    assert len(list(Path('runs').iterdir()))==1 and run.status=='finished'
    assert run.steps.step.tolist()==[*range(1, 13)] and run.steps.fit.tolist()==[0]*4+[1]*4+[2]*4
    assert run.epochs.step.tolist()==[4,8,12]
    assert run.validations.step.tolist()==[0,12] and list(run.of('lr_find').step)==[0,12]
    row = learn.recorder.metric_names[1:]
    assert list(run.epochs.columns)==['time','fit','step','epoch',*row]

def test_numbers_are_the_runs():
    "Losses of the batches and the table, to the bit of single precision; every n-th step"
    losses = []
    class Keep(Callback):
        def after_batch(self):
            if self.training: losses.append(self.loss.item())
    learn = fit(small(RunLog(every=3), Keep()), 2, 'fit_one_cycle')
    run = read_log()
    assert run.steps.step.tolist()==[3,6] and run.steps.loss.tolist()==[losses[2], losses[5]]
    assert run.steps.smooth_loss.tolist()==[learn.recorder.losses[i].item() for i in (2,5)]
    assert run.steps.lr.tolist()==[learn.recorder.lrs[i] for i in (2,5)]
    table = run.epochs[['train_loss','valid_loss','accuracy']].values.tolist()
    assert table==[[*o] for o in learn.recorder.values]

class End(Callback):
    def __init__(self, error): self.error = error
    def after_batch(self):
        if self.training and self.train_iter==3: raise self.error

ENDS = [(ValueError('bad <b>'), 'failed'), (KeyboardInterrupt(), 'interrupted'),
        (CancelFitException(), 'stopped')]

@pytest.mark.parametrize('error,status', ENDS)
def test_how_it_ended(error, status):
    learn = small(RunLog(every=1))
    try: fit(learn, 2, cbs=End(error))
    except (ValueError, KeyboardInterrupt): pass
    run = read_log()
    assert (run.status, run.steps.step.tolist())==(status, [1,2])     # it ended before the log's turn
    assert (run.fits[0]['error'] or '').endswith('bad <b>' if status=='failed' else '')
    fit(learn)
    assert read_log().status=='finished' and read_log().steps.step.tolist()==[1,2,*range(4, 8)]

def test_an_error_before_the_first_batch():
    class Bad(Callback):
        def before_epoch(self): raise ValueError('no data')
    with pytest.raises(ValueError): fit(small(RunLog()), cbs=Bad())
    assert read_log().fits[0]['error'].endswith('no data') and read_log().status=='failed'

def test_nan_is_kept():
    fit(small(RunLog(every=1), PoisonBatch(2)))
    assert np.isnan(read_log().steps.loss).tolist()==[False,False,True,True]
    for line in next(Path('runs').iterdir()).read_text().splitlines():
        json.loads(line, parse_constant=lambda o: pytest.fail(o))

@pytest.mark.parametrize('n', range(1, 36, 7))
def test_a_torn_line_is_skipped(n):
    path = Path('rows.jsonl')
    line = json.dumps(dict(step=2, text='ü\n"{}'))
    path.write_bytes(b'{"step": 1}\n'+line.encode()[:n])
    RowFile(path).add(dict(step=3))
    assert [o['step'] for o in read_rows(path)]==[1,3]
    assert path.read_bytes().endswith(b'\n{"step": 3}\n')

def test_a_training_phase_that_was_cut_short():
    "The names fit the numbers, where fastai's row lacks one"
    learn = fit(small(RunLog()), cbs=ShortEpochCallback(.4))
    log = read_log().epochs
    assert [log.valid_loss[0], log.accuracy[0]]==learn.recorder.final_record[-2:]

def test_with_the_fast_loop_it_is_the_same(whole):
    tuned(RunLog(every=1), FastLoop())
    assert one_table(read_log())==whole

@pytest.mark.skipif(os.getuid()==0 and not Path('/proc').exists(), reason='root may write anywhere')
def test_a_folder_that_cannot_be_written(capsys):
    Path('file').write_text('')
    learn = fit(small(RunLog('file')), 2)
    assert capsys.readouterr().out.count('run_log: writes no log')==1 and len(learn.recorder.values)==2

class Lists(Sink):
    name = 'lists'
    def __init__(self): self.seen,self.calls,self.configs = [],[],[]
    def open(self, path, config):
        self.calls.append(path.stem)
        self.configs.append(config)
    def log(self, numbers, step): self.seen.append((step, numbers))
    def close(self): self.calls.append('close')

def test_sinks_get_the_numbers():
    sink = Lists()
    log = RunLog(every=2, sinks=sink)
    fit(small(log), 2)
    run = read_log()
    losses = [(s, n['train/loss']) for s,n in sink.seen if 'train/loss' in n]
    assert losses==[*zip(run.steps.step, run.steps.loss)]
    assert [n['epoch/accuracy'] for _,n in sink.seen if 'epoch/accuracy' in n]==run.epochs.accuracy.tolist()
    assert sink.calls==[Path(log.file).stem, 'close'] and sink.configs[0]['epochs']==2

def test_sinks_get_what_comes_between_fits():
    learn = small(RunLog(sinks=(sink := Lists())))
    fit(learn)
    with quiet(learn): learn.validate()
    fit(learn)
    names = [name for _,numbers in sink.seen for name in numbers]
    assert names.count('validate/valid_loss')==1 and names.count('epoch/valid_loss')==2

def test_a_sink_that_fails_or_sleeps_does_no_harm(capsys, monkeypatch):
    finish = RowFeed.finish
    monkeypatch.setattr(RowFeed, 'finish', lambda self: finish(self, 1.))      # less patience
    class Fails(Lists):
        name = 'fails'
        def log(self, numbers, step): raise OSError('no network')
    class Sleeps(Lists):
        name = 'sleeps'
        def log(self, numbers, step): time.sleep(60)
    want = fit(small(), 2).recorder.values
    start = threading.active_count()
    learn = small(RunLog(every=1, sinks=[Fails(), sleeps := Sleeps(), lists := Lists()]))
    fit(learn, 2)
    out = capsys.readouterr().out
    assert learn.recorder.values==want and len(lists.seen)==10
    assert out.count('fails gets no more rows: OSError: no network')==1 and out.count('sleeps is behind')==1
    assert threading.active_count()<=start+1       # the sleeping one

@pytest.mark.parametrize('name', ['tensorboard','wandb','mlflow','trackio'])
def test_a_tracker_that_is_not_installed_is_said(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard' if name=='tensorboard' else name, None)
    assert fit(small(RunLog(sinks=name))).recorder.values
    assert capsys.readouterr().out.count(f'{name} gets no more rows: ')==1

BAD = dict(path=3),dict(every=0),dict(every=1.5),dict(sinks='tensorbord'),dict(sinks=[3]),dict(echo=-1)

@pytest.mark.parametrize('kwargs', BAD, ids=str)
def test_bad_arguments_are_refused(kwargs):
    with pytest.raises((ValueError, TypeError), match=f'^{next(iter(kwargs))}='): RunLog(**kwargs)

def test_echo(capsys):
    fit(small(RunLog(echo=0)), 2)
    lines = [o for o in capsys.readouterr().out.splitlines() if o.startswith('run_log')]
    assert len(lines)==8 and 'epoch 0 of 2, train_loss' in lines[1] and ' left' in lines[1]
    assert lines[-1].startswith('run_log: 100%') and 'best valid_loss' in lines[-1]

def test_reading_what_is_not_there():
    Path('runs').mkdir()
    with pytest.raises(ValueError, match='no file'): read_log()
    with pytest.raises(FileNotFoundError): read_log('nowhere.jsonl')

def test_metrics_of_any_kind():
    "Text, tensors of several numbers"
    class Odd(AvgMetric):
        def __init__(self, value, name): self._value,self._n = value,name
        def reset(self): pass
        def accumulate(self, learn): pass
        value = property(lambda self: self._value)
        name = property(lambda self: self._n)
    learn = small(RunLog())
    learn.metrics = [Odd('fine', 'words'), Odd(torch.ones(2), 'two')]
    learn.recorder.logger = noop
    with learn.no_bar(): learn.fit(1)
    assert read_log().epochs.words[0]=='fine'

def test_what_others_tell_before_the_first_batch():
    "It waits for the file; also of a callback whose turn in `before_fit` is earlier"
    class Tells(ExtCallback):
        order = -100
        def before_fit(self): self.tell('looked', 'it was asked to')
    fit(small(Tells(), RunLog()))
    events = read_log().events
    assert events[['callback','what','fit','step']].values.tolist()==[['tells','looked',0,0]]

class Recorded:
    "Stands in for a tracker's package, and for what it returns: keeps the calls"
    def __init__(self): self.calls = []
    def __getattr__(self, name):
        if name.startswith('_'): raise AttributeError(name)
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return [] if name=='search_runs' else self
        return call
    info,run_id,experiment_id = property(lambda self: self),'run','experiment'

@pytest.mark.parametrize('name', ['tensorboard','wandb','mlflow','trackio'])
def test_what_a_tracker_gets(name, monkeypatch):
    "Each number once, with its step; the run is begun and ended in each fit"
    package = Recorded()
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard' if name=='tensorboard' else name, package)
    fit(small(RunLog(every=2, sinks=name)), 2)
    losses = read_log().steps.loss.tolist()
    found = []
    for called,args,kwargs in package.calls:
        if called in ('add_scalar','log_metric') and 'train/loss' in args:
            found.append(args[args.index('train/loss')+1])
        if called=='log' and 'train/loss' in args[0]: found.append(args[0]['train/loss'])
    assert found==losses
    assert package.calls[-1][0]=={'tensorboard':'close', 'mlflow':'set_terminated'}.get(name, 'finish')

def test_more_epochs_than_the_saved_fit_had():
    "With `extend`, a fit that was finished goes on: its batches are counted once"
    for n in (1, 3):
        learn = small(RunLog(every=1), Checkpoint('saved', extend=True, background=False))
        fit(learn, n)
        Checkpoint._finished.clear()        # as in a new process
    run = read_log()
    assert run.steps.step.tolist()==[*range(1, 13)] and run.epochs.step.tolist()==[4,8,12]
    assert [o['status'] for o in run.fits]==['finished']

def test_without_a_recorder():
    learn = small(RunLog(every=1, echo=0))
    learn.remove_cb(Recorder)
    with learn.no_bar(): learn.fit(1)
    assert read_log().status=='finished' and len(read_log().steps)==4

@pytest.mark.parametrize('gone', ['file','folder'])
def test_a_log_that_is_lost_ends_no_run(gone, capsys):
    "The folder becomes a file after the first fit"
    learn = small(RunLog(every=1))
    fit(learn)
    shutil.rmtree('runs')
    if gone=='folder': Path('runs').write_text('')
    with quiet(learn): learn.validate()
    fit(learn)
    assert len(learn.recorder.values)==1
    assert capsys.readouterr().out.count('writes no log')==(gone=='folder')

def test_the_run_that_was_written_last_is_read():
    old,new = RunLog(every=1),RunLog(every=1)
    learn = small()
    for log in (old, new, old): fit(learn, cbs=log)
    assert read_log().file.name==old.file and len(read_log().fits)==2

# --- rows are of this epoch and this batch ------------------------------------------------------
def shown(learn):
    "The rows of fastai's table"
    return [dict(zip(learn.recorder.metric_names[1:], row)) for row in learn.recorder.values]

def logged(run): return run.epochs.drop(columns=['time','fit','step','epoch','batch'], errors='ignore')

class EndsAfter(Callback):
    "Ends the fit when the table has shown an epoch"
    def __init__(self, order, error): self.order,self.error = order,error
    def after_epoch(self):
        if self.epoch==1: raise self.error()

@pytest.mark.parametrize('error', [CancelFitException, KeyboardInterrupt])
@pytest.mark.parametrize('order', [60, 1995])
def test_the_epoch_after_which_a_fit_ends_is_there(order, error):
    learn = small(RunLog(), EndsAfter(order, error))
    with quiet(learn), suppress(KeyboardInterrupt): learn.fit(4)
    assert logged(read_log()).to_dict('records')==shown(learn) and len(shown(learn))==2

class Cancels(Callback):
    "Cancels a phase of the second epoch"
    order = 70
    def __init__(self, event, error): setattr(self, event, partial(self.cancel, error))
    def cancel(self, error):
        if self.epoch==1: raise error()

@pytest.mark.parametrize('event,error,expected', [
    ('before_validate', CancelValidException, [2,1,2]), ('after_pred', CancelValidException, [2,1,2]),
    ('before_epoch', CancelEpochException, [2,0,2]), ('before_train', CancelTrainException, [2,2,2])])
def test_an_epoch_has_the_values_that_were_computed_in_it(event, error, expected):
    "How many losses each epoch has"
    learn = small(RunLog(), Cancels(event, error))
    if event=='after_pred': learn.cbs[-1].run_train = False
    fit(learn, 3)
    rows = read_log().epochs.set_index('epoch')[['train_loss','valid_loss']]
    assert [rows.loc[i].notna().sum() if i in rows.index else 0 for i in range(3)]==expected

class Validates(Callback):
    "Calls `validate` in the midst of a fit, on other items than those of the validation"
    def __init__(self, event, order): self.event,self.order = event,order
    def __call__(self, event_name):
        if event_name!=self.event or not self.learn.training and event_name=='after_train': return
        if getattr(self, 'inside', False): return
        self.inside = True
        self.learn.validate(dl=self.learn.dls.train)
        self.inside = False

@pytest.mark.parametrize('event', ['after_train','after_validate','after_epoch'])
@pytest.mark.parametrize('order', [52, 60, 1995])
def test_a_validation_inside_of_a_fit_is_apart(event, order):
    "`Recorder` has put the numbers of the other pass into its log; none of them are the epoch's"
    learn = small(RunLog(), Validates(event, order))
    with quiet(learn): learn.fit(2)
    plain = small(RunLog())
    fit(plain, 2)
    run,row = read_log(learn.run_log.log_file),read_log(plain.run_log.log_file).epochs.iloc[0]
    names = 'train_loss','valid_loss','accuracy'
    for name in names:      # after the first epoch, the shuffling is another one
        v = run.epochs.iloc[0].get(name, np.nan)
        assert pd.isna(v) or v==pytest.approx(row[name], abs=1e-6)
    assert run.epochs.epoch.tolist()==[0,1] and run.epochs.train_loss.notna().all()
    assert len(run.validations)==2
    for name in {'valid_loss'} & {*run.epochs}: assert not {*run.epochs[name]} & {*run.validations[name]}

def test_lr_find_of_a_copy_inside_of_a_fit():
    class Finds(Callback):
        order = 1000
        def after_epoch(self):
            if self.training: return
            copied = deepcopy(self.learn)
            copied.cbs = copied.cbs.filter(lambda cb: not isinstance(cb, Finds))
            with quiet(copied): copied.lr_find(num_it=6, show_plot=False)
    learn = small(RunLog(), Finds())
    with quiet(learn): learn.fit(2)
    assert logged(read_log(learn.run_log.log_file)).to_dict('records')==shown(learn)

def test_epochs_before_start_epoch_have_no_row():
    learn = small(RunLog())
    fit(learn, 1)
    fit(learn, 3, start_epoch=2)
    assert read_log().epochs[['fit','epoch']].values.tolist()==[[0,0],[1,2]]

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss'])
def test_a_cancelled_batch_has_no_loss_of_another_one(event):
    class Cancel(Callback):
        def __call__(self, name):
            if name==event and self.training and self.iter in (0,2): raise CancelBatchException
    fit(small(Cancel(), RunLog(every=1)), 2)
    steps = read_log().steps
    assert steps.batch.tolist()==[0,1,2,3]*2 and steps.loss.isna().tolist()==[True,False]*4

def test_metrics_of_one_name_are_both_there():
    def one(*_): return torch.tensor(1.)
    def valid_loss(*_): return torch.tensor(2.)
    learn = small(RunLog(), metrics=[one, valid_loss])
    fit(learn, 1)
    row = logged(read_log()).iloc[0]
    assert row.one==1 and row.valid_loss_2==2 and row.valid_loss not in (1,2)

def test_a_copy_has_a_log_of_its_own(tmp_path):
    learn = small(RunLog(every=1))
    fit(learn, 1)
    for other in (deepcopy(learn), pickle.loads(pickle.dumps(learn))): fit(other, 1)
    fit(learn, 1)
    runs = [read_log(o).steps.step.tolist() for o in (tmp_path/'runs').glob('*.jsonl')]
    assert sorted(runs, key=len)==[[1,2,3,4], [1,2,3,4], [*range(1,9)]]

def test_tables_without_rows_have_their_columns():
    fit(small(RunLog(every=100)), 1)
    run = read_log()
    assert run.steps[['step','epoch','batch','loss','lr']].empty and run.events[['what','why']].empty

def test_a_relative_path_stays_where_the_first_fit_was(tmp_path, monkeypatch):
    learn = small(RunLog())
    fit(learn, 1)
    (tmp_path/'sub').mkdir()
    monkeypatch.chdir(tmp_path/'sub')
    fit(learn, 1)
    assert len(read_log(tmp_path/'runs').fits)==2 and not (tmp_path/'sub'/'runs').exists()

class Mine(Callback):
    def __init__(self, a): self.a = a

def test_all_callbacks_are_in_the_log():
    fit(small(RunLog(), SkipNonFinite(max_total=7), Mine(3)), 1, cbs=Mine(5))
    said = ' '.join(read_log().fits[0]['callbacks'])
    assert 'max_total=7' in said and 'Mine(a=3)' in said and 'Mine(a=5)' in said

def test_no_warning(recwarn):
    fit(small(RunLog()), 1)
    assert not [o for o in recwarn if 'shadowing' in str(o.message)]
