"`Throughput`: the parts of a step, what is left out, the verdict, memory, and that nothing is changed"
import pickle

import pytest, torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fasttransform import Pipeline, Transform
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from common import EXACT, finite, fit, traces
from fastai_callbacks_ext import throughput as module
from fastai_callbacks_ext.all import FastLoop, GradientAccumulation, RunLog, Throughput, Verdict, read_log
from fastai_callbacks_ext.base.parts import PARTS, PartClock
from fastai_callbacks_ext.test_utils import digits_learner

class Played:
    "A clock that goes on when it is told to"
    def __init__(self): self.seconds = 0.
    def __call__(self): return self.seconds
    def wait(self, seconds): self.seconds += seconds

class Slow(Transform):
    def __init__(self, wait): self.wait = wait
    def encodes(self, x:torch.Tensor):
        self.wait()
        return x

class SlowCallback(Callback):
    def __init__(self, event_name, wait): setattr(self, event_name, wait)

def slow(part, wait, cbs=(), **kwargs):
    "A learner in which `part` of a step calls `wait`"
    learn = digits_learner(list(cbs), n=160, bs=32, **kwargs)
    dl,paused = learn.dls.train,lambda: wait() if learn.training else None
    if part=='data':
        own = dl.create_batch
        dl.create_batch = lambda b: (wait(), own(b))[1]
    if part=='transforms': dl.after_batch = Pipeline([Slow(lambda: wait(.5))])      # for x and for y
    if part=='forward': learn.model.register_forward_hook(lambda *args: paused())
    if part=='backward': next(learn.model.parameters()).register_hook(lambda g: wait())
    if part=='optimizer':
        learn.create_opt()
        own_step = learn.opt.step
        learn.opt.step = lambda *args,**kwargs: (wait(), own_step(*args, **kwargs))[1]
    if part=='callbacks': learn.add_cb(SlowCallback('after_loss', paused))
    return learn

def played(part='data', cbs=(), skip=0, window=100, epochs=2, **kwargs):
    "`Throughput` of a fit by a played clock in which `part` takes 20 ms a step"
    clock,t = Played(),Throughput(window, skip)
    t.now = clock
    learn = slow(part, lambda k=1.: clock.wait(.02*k), [t, *cbs], **kwargs)
    fit(learn, epochs)
    return t

@pytest.mark.parametrize('cbs', [list, lambda: [FastLoop()], lambda: [GradientAccumulation(64)]])
@pytest.mark.parametrize('part', PARTS)
def test_a_delay_is_found_in_its_part(part, cbs):
    "With accumulation, every second batch takes a step"
    ms = played(part, cbs(), epochs=1).table().ms_a_step
    fewer = part=='optimizer' and cbs and isinstance(next(iter(cbs()), None), GradientAccumulation)
    assert ms.pop(part)==pytest.approx(10 if fewer else 20)
    assert ms.sum()==pytest.approx(0)

def test_what_is_skipped_and_when_rows_come(tmp_path):
    "A row for each window, and at the end of each epoch; the first batches are in none"
    t = played('forward', [RunLog(tmp_path)], skip=1, window=2)
    rows = read_log(tmp_path).of('throughput')
    assert rows.steps.tolist()==[2,1,2,2] and rows.step.tolist()==[3,4,6,8] and rows.epoch.tolist()==[0,0,1,1]
    assert rows.step_ms.tolist()==[20]*4 and rows.forward_ms.tolist()==[20]*4
    assert rows.items_per_s.tolist()==[32/.02]*4 and rows.data_wait_share.tolist()==[0]*4
    assert t.verdict.part=='none' and t.verdict.share==1

def test_a_fit_that_is_too_short_says_so(capsys):
    t = played(skip=8)
    assert t.verdict is None and t.table().empty
    assert 'has measured nothing' in capsys.readouterr().out
    assert t.records[-1].why=='of 8 batches, skip=8 leaves out the first 8'
    assert Throughput().table().empty and Throughput().verdict is None

def test_the_verdict_is_said_once_and_again_if_another_is_clear(capsys):
    t = played('transforms', window=4)
    said = [o for o in capsys.readouterr().out.splitlines() if o.startswith('throughput:')]
    assert len(said)==1
    assert said[0].endswith('use fewer or cheaper batch_tfms, or do them in workers as item_tfms')
    t._m.all,t._m.all_steps = t._m.all.__class__(callbacks=29., forward=71.),1      # not yet
    t.learn = digits_learner()
    t._say()
    assert not capsys.readouterr().out
    t._m.all['callbacks'] = 50.
    t._say()
    assert 'callbacks and the loop take 41% of each step' in capsys.readouterr().out
    assert not t.records        # it has not intervened

@pytest.mark.parametrize('workers,cores,expected', [
    (0, 16, '60 ms to load without workers, and 40 ms to train; 2 workers would keep up: num_workers=2'),
    (0, 2, '2 workers would keep up: num_workers=2'),
    (1, 16, '100 ms to load with 1 worker, and 40 ms to train; 3 workers would keep up: num_workers=3'),
    (2, 16, '200 ms to load with 2 workers, and 40 ms to train; 5 workers would keep up: num_workers=5')])
def test_how_many_workers_would_keep_up(monkeypatch, workers, cores, expected):
    monkeypatch.setattr(module, '_cores', lambda: cores)
    t = played()
    t._m.all.clear()
    t._m.all.update(data=6., forward=4.)
    t._m.all_steps,t._m.workers,t._m.n_batch,t._m.device = 100,workers,1000,torch.device('cpu')
    assert str(t.verdict).startswith('the model waits 60% of each step for items: ')
    assert str(t.verdict).endswith(expected)
    t._m.device = torch.device('cuda')
    assert t.verdict.what=='the GPU waits 60% of each step for items'

@pytest.mark.parametrize('part,what', [
    ('transforms','transforms of batches take 50% of each step: 500 of 1e+03 ms'),
    ('optimizer','step and zero_grad of the optimizer take 50% of each step'),
    ('callbacks','callbacks and the loop take 50% of each step')])
def test_a_large_part_is_named(part, what):
    t = played()
    t._m.all = t._m.all.__class__({part: .5, 'forward': .5})
    t._m.all_steps = 1
    assert t.verdict.part==part and str(t.verdict).startswith(what) and isinstance(t.verdict, Verdict)

def test_validation_is_measured_apart(tmp_path):
    clock,t = Played(),Throughput(skip=0)
    t.now = clock
    learn = slow('none', clock, [t, RunLog(tmp_path)])
    learn.model.register_forward_hook(lambda *args: clock.wait(.01 if learn.training else .03))
    fit(learn, 2)
    n,n_valid = (len(dl) for dl in learn.dls)
    rows = read_log(tmp_path).of('throughput')
    assert rows.validation_s.tolist()==pytest.approx([.03*n_valid]*2)
    assert t.table().ms_a_step.sum()==pytest.approx(10)
    assert t.verdict.part=='validation'
    assert t.verdict.share==pytest.approx(3*n_valid/(n+3*n_valid))

def test_the_time_left_is_that_of_the_whole_fit(tmp_path):
    "A batch takes 20 ms, one of validation 30; half of 20 is assumed before the first one"
    clock,t = Played(),Throughput(skip=0, window=3)
    t.now = clock
    learn = slow('none', clock, [t, RunLog(tmp_path)])
    learn.model.register_forward_hook(lambda *args: clock.wait(.02 if learn.training else .03))
    fit(learn, 2)
    n,n_valid = (len(dl) for dl in learn.dls)
    row = read_log(tmp_path).of('throughput').set_index(['epoch','step']).left_s
    assert row[0,3]==pytest.approx(.02 + .01*n_valid + .02*n + .01*n_valid)
    assert row[0,4]==pytest.approx(.02*n + .03*n_valid)         # at the end of the first epoch
    assert row[1,7]==pytest.approx(.02 + .03*n_valid) and row[1,8]==0

def test_the_start_of_workers_is_measured_apart(tmp_path):
    x,y = torch.randn(40,4),torch.randn(40,1)
    dl = TorchLoader(TensorDataset(x,y), batch_size=10, num_workers=1)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(4,1), loss_func=nn.MSELoss(),
                    cbs=[t := Throughput(skip=0), RunLog(tmp_path)])
    fit(learn, 2)
    rows = read_log(tmp_path).of('throughput')
    assert rows.steps.tolist()==[3,3] and (rows.worker_start_s>0).all()
    t._m.all_between['worker_start'] = 100.
    assert str(t.verdict).startswith('starting workers takes')
    assert t.verdict.next=='keep them: persistent_workers=True'

def test_memory_that_grows_is_told_once(monkeypatch, capsys):
    used = iter(range(0, 10**6, 10))
    monkeypatch.setattr(module, '_memory', lambda device: next(used))
    t = played(window=1, epochs=4)
    assert sum(r.what=='memory grows' for r in t.records)==1
    assert 'from 0 to 90 MB in 9 batches, and never fell' in capsys.readouterr().out
    assert module._slope(t._m.memory)==pytest.approx(10000)
    assert len(t._m.memory)<=20

@pytest.mark.parametrize('used', [[5]*99, [0,90]*50, [None]*99, [o/100 for o in range(99)]])
def test_memory_that_does_not_grow(monkeypatch, used):
    used = iter(used)
    monkeypatch.setattr(module, '_memory', lambda device: next(used))
    t = played(window=1, epochs=4)
    assert not any(r.what=='memory grows' for r in t.records)

def test_the_marks_of_a_gpu_count(monkeypatch):
    "Here a mark stands for a queue in which the backward pass takes 30 ms, and is there two steps later"
    made = []
    class Mark:
        def __init__(self): self.i = len(made); made.append(self)
        def query(self): return len(made)>self.i+20
        def elapsed_time(self, other): return 30. if self.i%16==10 else 0.
    clock,rows = Played(),[]
    pc = PartClock(lambda spent: rows.extend(pc.read()), id, clock, Mark, 1)
    learn = digits_learner(n=160, bs=32)
    pc.start(learn)
    try: fit(learn, 3)
    finally: pc.stop()
    assert len(rows)>6 and not clock.seconds
    scaled = module._scaled(module.Counter(forward=3, data=1), 8.)
    assert scaled==dict.fromkeys(PARTS, 0) | dict(forward=6, data=2)

def test_nothing_is_changed():
    "Weights, and what is on the learner and its loaders"
    learns = []
    for cbs in ([], [Throughput(skip=0, window=2)]):
        learns.append(digits_learner(n=160, bs=32))
        fit(learns[-1], 2, cbs=cbs)
    for a,b in zip(*(o.model.parameters() for o in learns)): torch.testing.assert_close(a, b, **EXACT)
    plain,measured = map(traces, learns)
    for k in ('replaced','loaders','hooks'): assert measured[k]==plain[k]

class Meddler(Callback):
    "Does in mid-fit what callbacks of others do"
    order,done = 70,0
    def before_batch(self):
        if not self.training or self.train_iter!=1: return
        tfms = self.dls.train.after_batch
        assert isinstance(tfms, Pipeline) and tfms.fs is not None and callable(tfms)
        tfms.split_idx = 0
        self.copy = pickle.loads(pickle.dumps(tfms))
        self.dls.train.to(self.dls.device)
        self.new = self.dls.train.new()
    def after_train(self): self.learn.validate()

def test_the_transforms_can_be_used_in_mid_fit():
    learn = digits_learner(n=160, bs=32)
    own = learn.dls.train.after_batch = Pipeline([Slow(int)])
    fit(learn, 2, cbs=[t := Throughput(skip=0), m := Meddler()])
    assert type(m.copy) is Pipeline and learn.dls.train.after_batch is own
    assert own.split_idx==0 and t._m.n==2*len(learn.dls.train)

def test_a_plain_pytorch_loader_and_cancelled_batches():
    x,y = torch.randn(40,4),torch.randn(40,1)
    class Cancel(Callback):
        def before_batch(self):
            if self.training and self.iter==1: raise CancelBatchException
    loaders = [TorchLoader(TensorDataset(x,y), batch_size=10) for _ in range(2)]
    learn = Learner(DataLoaders(*loaders), nn.Linear(4,1), loss_func=nn.MSELoss(),
                    cbs=[t := Throughput(skip=0), Cancel()])
    fit(learn, 2)
    assert t._m.n==8 and t.table().ms_a_step.sum()>0 and finite(learn)

def test_an_export_in_mid_fit_has_no_clock(tmp_path):
    class MidFit(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.iter==1: self.learn.export(tmp_path/'a.pkl')
    fit(digits_learner([Throughput(skip=0), MidFit()], n=160, bs=32))
    again = load_learner(tmp_path/'a.pkl')
    assert [type(cb).__name__ for cb in again.cbs if 'ark' in type(cb).__name__]==[]
    assert again.throughput.table().empty

def test_an_own_learner_is_said(capsys):
    class Own(Learner):
        def _do_one_batch(self): super()._do_one_batch()
    learn = digits_learner(n=160, bs=32)
    learn.__class__ = Own
    fit(learn, 1, cbs=(t := Throughput(skip=0)))
    assert 'cannot tell forward, backward and optimizer apart' in capsys.readouterr().out
    t._m.all = module.Counter(optimizer=90., forward=10.)
    assert t.verdict.part=='none'

def test_short_epochs_want_no_workers():
    t = played('data', window=2)
    assert t.verdict.next=='in epochs as short as these, workers take longer to start; make items cheaper'

@pytest.mark.parametrize('kwargs,words', [
    (dict(window=0), 'window=0'), (dict(skip=-1), 'skip=-1'), (dict(window='a'), "window='a'")])
def test_bad_arguments(kwargs, words):
    with pytest.raises((ValueError,TypeError), match=words): Throughput(**kwargs)

def test_plot():
    ax = played('forward').plot()
    assert ax.get_xlabel()=='milliseconds of a training step' and len(ax.patches)==len(PARTS)
