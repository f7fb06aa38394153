"Runs that go on, as people run them: bars, loaders, losses, callbacks that own things, folders"
import contextlib, io, itertools, json, os, random, re, signal, subprocess, sys, sysconfig, time, types
from collections import defaultdict, deque
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.all import (Callback, CSVLogger, EarlyStoppingCallback, GradientAccumulation,
                                 GradientClip, MixUp, ParamScheduler, ReduceLROnPlateau, SaveModelCallback,
                                 SchedCos, ShowGraphCallback, TerminateOnNaNCallback)
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner, Metric
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy, skm_to_fastai
from fastai.optimizer import Optimizer, OptimWrapper, SGD, ranger
from fastai.torch_core import default_device
from fastcore.imports import noop
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from fastai_callbacks_ext.all import Checkpoint, ExtCallback, PreemptionGuard, ScheduleFree, SkipNonFinite
from fastai_callbacks_ext.base import files
from fastai_callbacks_ext.base.files import load_state
from fastai_callbacks_ext.test_utils import FreeSGD, digits_dls, digits_learner, digits_model
import crash
from common import exit_code
from test_checkpoint import as_in_a_new_process, in_a_folder_of_its_own

TorchDL = torch.utils.data.DataLoader

class StopIn(Callback):
    "Raises in a training batch"
    order = 3000
    def __init__(self, epoch, batch): self.at = epoch,batch
    def after_batch(self):
        if self.training and (self.epoch,self.iter)==self.at: raise KeyboardInterrupt

def train(make, fits, *cbs, stop=None, forget=True, bar=False):
    "A run in a process of its own, as far as `Checkpoint` knows: the learner, and what was printed"
    if forget: as_in_a_new_process()
    learn,out = make(),io.StringIO()
    if stop: learn.add_cb(StopIn(*stop))
    with contextlib.redirect_stdout(out), contextlib.ExitStack() as stack:
        if not bar: stack.enter_context(learn.no_bar())
        with contextlib.suppress(KeyboardInterrupt): fits(learn, list(cbs))
    return learn,out.getvalue()

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist()

def goes_on(make, fits, stops, path='run', numbers=lambda learn: crash.digests(learn), **args):
    "Stopped at `stops` and begun again, it ends as without; all that was printed"
    args = dict(steps=2, background=False) | args
    want,said = numbers(train(make, fits)[0]),''
    for stop in (*stops, None):
        learn,out = train(make, fits, Checkpoint(path, **args), stop=stop)
        said += out
    assert numbers(learn)==want
    assert said.count('resumed')>=len(stops), said
    return said

def small(cbs=(), **kwargs): return digits_learner(list(cbs), n=160, bs=32, **kwargs)
def fit(epochs=3, **kwargs): return lambda learn, cbs: learn.fit(epochs, 1e-2, cbs=cbs, **kwargs)

# Bars and tables
class Board(Callback):
    "Writes numbers to an object of another package, as fastai's `TensorBoardCallback` does"
    def before_fit(self): self.writer = type('SummaryWriter', (), {'lines': property(lambda s: iter(()))})()

@pytest.mark.parametrize('fits', [fit(8), lambda l,cbs: l.fine_tune(2, 1e-2, cbs=cbs)],
                         ids=['fit','fine_tune'])
def test_with_everything_that_fastai_shows(fits, monkeypatch):
    "In epoch 0 and later, within and between; the bar says the right epoch"
    def make():
        learn = small([ShowGraphCallback(), CSVLogger()])
        learn.recorder.add_time = True
        return learn
    monkeypatch.setattr('fastprogress.fastprogress.printing', lambda: True)
    want = crash.digests(train(make, fits, bar=True)[0])
    lines = Path('history.csv').read_text().count('\n')
    for stop in ((0,2), (1,1), (1,3), (6,0), None):
        learn,out = train(make, fits, Checkpoint('run', steps=2, background=False), stop=stop, bar=True)
        if stop is None or stop[0]>learn.n_epoch: break
    learn,out = train(make, fits, Checkpoint('run'), bar=True) if stop else (learn,out)
    assert crash.digests(learn)==want and Path('history.csv').read_text().count('\n')==lines
    if learn.n_epoch==8:
        at = out.split('resumed in epoch ')[1]
        epochs = [int(o) for o in re.findall(r'Epoch (\d+)/8', at)]
        assert {*epochs}<={7,8} and epochs, epochs      # the bar may leave out the last one

def test_finished_with_bar():
    train(small, fit(), Checkpoint('run'), bar=True)
    learn,out = train(small, fit(), Checkpoint('run'), bar=True)
    assert 'checkpoint: found the fit finished, after 3 epochs, from run/fit_0' in out and 'batch' not in out

def test_after_the_last_epoch():
    "Killed when all epochs were done, and the final state was not written"
    class End(Callback):
        order = 2500
        def after_epoch(self):
            if self.epoch==2: raise KeyboardInterrupt
    train(lambda: small([End()]), fit(), Checkpoint('run', background=False))
    learn,out = train(small, fit(), Checkpoint('run'))
    assert 'checkpoint: resumed after the last epoch, from run/fit_0\n' in out
    assert crash.digests(learn)==crash.digests(train(small, fit())[0])

# One folder
def test_a_fit_that_this_process_has_finished_is_not_another_ones():
    "The next fold, the next stage"
    before = train(small, fit(), Checkpoint('run'))[0]
    files = sorted(Path('run').rglob('*'))
    with pytest.raises(ValueError) as e: train(small, fit(), Checkpoint('run'), forget=False)
    for o in ('has finished a fit in run already', "such as Checkpoint('run/2')"): assert o in str(e.value)
    assert sorted(Path('run').rglob('*'))==files
    train(small, fit(), Checkpoint('run/2'), forget=False)
    _,out = train(small, fit(), Checkpoint('run', resume=False), forget=False)
    assert 'found' not in out and 'resumed' not in out

def test_one_checkpoint_for_several_fits():
    cb = Checkpoint('run')
    for i in range(3): assert 'fin' not in train(small, fit(1), cb, forget=False)[1]
    assert sorted(o.name for o in Path('run').iterdir())==['fit_0','fit_1','fit_2']

def test_an_interrupted_fit_goes_on_in_the_same_process():
    "Ctrl-C in a notebook, and the cell again; also in the second fit"
    fits = lambda l,cbs: l.fine_tune(2, 1e-2, cbs=cbs)
    train(small, fits, Checkpoint('run', steps=1, background=False), stop=(1,1))
    learn,out = train(small, fits, Checkpoint('run'), forget=False)
    assert 'resumed in epoch 1, batch 2' in out and crash.digests(learn)==crash.digests(train(small, fits)[0])

def a_second_run():
    learn = digits_learner(n=160, bs=32)
    try:
        with learn.no_bar(): learn.fit(1, cbs=Checkpoint('run'))
    except ValueError as e: Path('said').write_text(str(e))

def test_two_processes_in_one_folder():
    "The second is refused in a line, the first does not notice; a process that was killed holds nothing"
    class Other(Callback):
        def after_batch(self):
            if self.training and self.train_iter==2:
                before = sorted(Path('run').rglob('*'))
                assert exit_code(a_second_run)==0
                assert sorted(Path('run').rglob('*'))==before
    learn,_ = train(lambda: small([Other()]), fit(), Checkpoint('run'))
    assert f'run is in use by process {os.getpid()} on ' in (said := Path('said').read_text())
    assert 'Use another path' in said
    assert crash.digests(learn)==crash.digests(train(small, fit())[0])
    assert not Path('run/.checkpoint.lock').exists()
    class Die(Callback):
        def after_batch(self): os.kill(os.getpid(), signal.SIGKILL)
    assert exit_code(lambda: train(lambda: small([Die()]), fit(), Checkpoint('killed')))==-signal.SIGKILL
    assert Path('killed/.checkpoint.lock').exists()
    train(small, fit(1), Checkpoint('killed'))
    assert not Path('killed/.checkpoint.lock').exists()

def test_a_folder_that_cannot_be_locked(monkeypatch):
    def lockf(*args): raise OSError(37, 'No locks available')
    monkeypatch.setattr('fcntl.lockf', lockf)
    _,out = train(small, lambda l,cbs: l.fine_tune(1, cbs=cbs), Checkpoint('run'))
    assert out.count('cannot lock run, so a second run there would not be noticed: No locks available')==1

@pytest.mark.parametrize('place', ['link/run', '/proc/nothere/run'])
def test_a_folder_that_cannot_be_made(place):
    "A disk that is not mounted: it is said, and the training goes on"
    Path('link').symlink_to('nothere/there')
    learn,out = train(small, fit(1), Checkpoint(place))
    assert out.count(f'cannot lock {place}, so a second run there would not be noticed: ')==1
    assert 'could not save' in out and len(learn.recorder.values)==1

# Random states
class Epochs(torch.utils.data.Sampler):
    "Draws from the number of its epoch"
    def __init__(self, n): self.n,self.epoch = n,0
    def __len__(self): return self.n
    def __iter__(self):
        self.epoch += 1
        return iter(torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist())

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, items): self.items,self.rng = items,np.random.default_rng(3)
    def __len__(self): return len(self.items)
    def __iter__(self): return (self.items[i] for i in self.rng.permutation(len(self.items)))

def seeded(): return torch.Generator().manual_seed(5)
def batches_of(items):
    return torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(items, generator=seeded()), 32, False)

RandomSampler = torch.utils.data.RandomSampler
def weighted(items):
    return torch.utils.data.WeightedRandomSampler(torch.ones(len(items)), 96, generator=seeded())
LOADERS = dict(
    generator=lambda o: TorchDL(o, 32, shuffle=True, generator=seeded()),
    epochs=lambda o: TorchDL(o, 32, sampler=Epochs(len(o))),
    sampler=lambda o: TorchDL(o, 32, sampler=RandomSampler(o, generator=seeded())),
    batch_sampler=lambda o: TorchDL(o, batch_sampler=batches_of(o)),
    stream=lambda o: TorchDL(Stream(o), 32), weighted=lambda o: TorchDL(o, 32, sampler=weighted(o)))

@pytest.mark.parametrize('name', LOADERS)
def test_generators_of_loaders(name):
    def make():
        learn = small()
        items,valid = [[ds[i] for i in range(len(ds))] for ds in (learn.dls.train_ds, learn.dls.valid_ds)]
        learn.dls = DataLoaders(LOADERS[name](items), TorchDL(valid, 32), device=default_device())
        return learn
    goes_on(make, fit(), [(1,0), (1,2), (2,1)])

# Parts of a run that are not the model's
class Temperature(nn.Module):
    "A loss with a parameter, a buffer and a counter of its own"
    def __init__(self):
        super().__init__()
        self.t,self.n = nn.Parameter(torch.zeros(1)),0
        self.register_buffer('mean', torch.zeros(1), persistent=False)
    def forward(self, o, y):
        if torch.is_grad_enabled():
            self.n += 1
            self.mean.lerp_(o.detach().mean(), .1)
        return F.cross_entropy(o*self.t.exp()+self.mean*self.n/100, y)

def test_a_loss_that_is_trained():
    def make():
        loss = Temperature()
        return small(loss_func=loss, splitter=lambda m: [list(m.parameters()), list(loss.parameters())])
    def numbers(learn):
        loss = learn.loss_func
        return crash.digests(learn),loss.t.item(),loss.n,loss.mean.item()
    goes_on(make, fit(), [(0,2), (2,1)], numbers=numbers)

class Head(Callback):
    "A layer of its own, trained with the model; gradients of two batches are gathered for a step"
    def __init__(self): self.layer = nn.Linear(10, 10)
    def after_pred(self): self.learn.pred = self.layer.to(self.pred.device)(self.pred)
def test_a_callback_that_is_trained():
    def make():
        torch.manual_seed(1)
        head = Head()
        learn = small([head, GradientAccumulation(64)],
                      splitter=lambda m: [list(m.parameters()), list(head.layer.parameters())])
        head.layer.weight.requires_grad_(False)
        return learn
    goes_on(make, fit(), [(0,2), (2,1)], steps=1,
            numbers=lambda l: (crash.digests(l), l.head.layer.bias.tolist()))

class Counting(nn.Module):
    "Remembers something in an attribute that is no buffer"
    def __init__(self): super().__init__(); self.calls,self.last = 0,None
    def forward(self, x):
        if self.training: self.calls,self.last = self.calls+1,x.mean(0, keepdim=True).detach()
        return x+self.calls/100 if self.last is None else x+.1*self.last+self.calls/100
def test_a_module_that_counts():
    def make():
        torch.manual_seed(0)
        return small(model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10), Counting()))
    goes_on(make, fit(), [(0,2), (2,1)], numbers=lambda l: (crash.digests(l), l.model[2].calls))

# What callbacks own
class Teachers(Callback):
    "Momentum encoders made in `before_fit`, an optimizer, random generators, a queue, counts"
    def before_fit(self):
        self.slow,self.both = deepcopy(self.learn.model),[deepcopy(self.learn.model) for _ in range(2)]
        self.w = nn.Parameter(torch.zeros(1, device=self.dls.device))
        self.params,self.stats = list(self.learn.model.parameters()),list(self.learn.model.buffers())
        self.opt2 = torch.optim.Adam([self.w], 1e-2)
        self.rng,self.np = seeded(),np.random.default_rng(0)
        self.queue,self.seen = deque(maxlen=3),defaultdict(int)
    def after_loss(self):
        if not self.training: return
        self.queue.append(self.loss.item())
        self.seen[self.epoch] += 1
        noise = torch.rand(1, generator=self.rng).item()*self.np.random()
        far = sum(F.mse_loss(self.pred, t(self.x).detach()) for t in (self.slow, *self.both))
        self.learn.loss_grad = self.loss_grad + noise*far*sum(self.queue)*self.seen[self.epoch]*(1+self.w)
    def after_step(self):
        self.opt2.step()
        self.opt2.zero_grad()
        for t,d in zip((self.slow, *self.both), (.1,.2,.3)):
            for p,q in zip(self.params, t.parameters()): q.data.lerp_(p.data, d)
        self.stats[0].add_(.01)

def test_a_copy_of_the_model_is_in_the_same_mode():
    "After a fit, the model is in evaluation mode; so is what a second fit copies, also if the first was done"
    class Copy(Callback):
        def before_fit(self): self.slow = deepcopy(self.learn.model)
        def after_pred(self):
            if self.training: self.learn.pred = self.pred+self.slow(self.x).detach()
    goes_on(lambda: small([Copy()]), lambda l,cbs: l.fine_tune(2, 1e-2, cbs=cbs), [(1,2)])

def test_callbacks_that_own_things():
    out = goes_on(lambda: small([Teachers()], opt_func=SGD), fit(), [(0,2), (2,1)],
                  numbers=lambda l: (crash.digests(l), l.teachers.w.item()))
    assert 'cannot save' not in out

class Item: pass
class Mess(Callback):
    "What cannot be saved, and what need not be"
    def __init__(self): self.count,self.same,self.f = itertools.count(),Item(),noop
    def before_fit(self):
        self.old,self.dl = self.learn.logger,self.dls.train
        self.file,self.box = open('log.txt', 'w'),Item()
    def before_train(self): self.g = lambda x: x
    def before_batch(self):
        self.box.n = getattr(self.box, 'n', 0)+next(self.count)
        self.net = nn.Linear(1, 1)
    def after_fit(self): self.file.close()

def test_what_cannot_be_saved_is_named_once():
    fits = lambda l,cbs: l.fine_tune(2, 1e-2, cbs=cbs)
    _,out = train(lambda: small([Mess()]), fits, Checkpoint('run', steps=1))
    lines = [o for o in out.splitlines() if 'cannot save' in o]
    assert len(lines)==1
    names = set(re.findall(r'Mess\.(\w+)', lines[0]))
    assert names=={'count','file','g','net'}, lines      # `box` is kept
    assert 'Mess.count (count)' in lines[0]
    train(lambda: small([Mess()]), fit(), Checkpoint('other', steps=1), stop=(0,2))
    _,out = train(lambda: small([Mess()]), fit(), Checkpoint('other'))
    assert out.count('cannot save')==1 and out.index('resumed')<out.index('cannot save')

def test_no_noise_about_fastais_own():
    cbs = lambda: [ShowGraphCallback(), CSVLogger(), MixUp(), SaveModelCallback(fname='m'),
                   EarlyStoppingCallback(patience=9), ReduceLROnPlateau(),
                   GradientAccumulation(64), GradientClip(), crash.CPUMixedPrecision(),
                   TerminateOnNaNCallback(), ParamScheduler({'wd': SchedCos(1e-2, 1e-3)})]
    _,out = train(lambda: small(cbs(), path=Path('.'), metrics=[accuracy, F1Score(average='macro')]), fit(),
                  Checkpoint('run', steps=1), bar=True)
    assert 'checkpoint' not in out

# Helping never harms
class Hist(torch.optim.SGD):
    "Keeps a queue and an object for each parameter"
    def step(self, closure=None):
        for p in self.param_groups[0]['params']:
            self.state[p].setdefault('hist', deque(maxlen=5)).append(1.)
            self.state[p]['item'] = Item()
        return super().step(closure)

class Extra(nn.Linear):
    def get_extra_state(self): return Item()
    def set_extra_state(self, state): pass

def two_tensors():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.twin = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)), requires_grad=False)
    return model

HARD = dict(opt=(dict(opt_func=partial(OptimWrapper, opt=Hist)), "optimizer['state'][0]['item'] (Item)"),
            extra=(dict(model=nn.Sequential(nn.Flatten(), Extra(64, 10))), "model['1._extra_state'] (Item)"))

@pytest.mark.parametrize('name', HARD)
def test_what_has_no_plain_form_is_said_at_the_first_save(name):
    kwargs,path = HARD[name]
    learn,out = train(lambda: small(**kwargs), fit(), Checkpoint('run', steps=1, background=False),
                      stop=(0,2))
    assert out.count('cannot save')==1 and path in out
    learn,out = train(lambda: small(**kwargs), fit(), Checkpoint('run'))
    assert 'resumed in epoch 0, batch 3' in out and len(learn.recorder.values)==3

def test_lazy_layers():
    make = lambda: small(model=nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(10)))
    class Broken(Callback):
        def state_dict(self): raise RuntimeError('nothing to tell')
        def load_state_dict(self, state): pass
    learn,out = train(lambda: small([Broken()]), fit(), Checkpoint('run', steps=1))
    assert len(learn.recorder.values)==3
    assert out.count('checkpoint: cannot save Broken (RuntimeError: nothing to tell)')==1
    learn,_ = train(make, fit(), Checkpoint('lazy', steps=1))
    assert len(learn.recorder.values)==3

def test_complex_parameters():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 10, dtype=torch.complex64))
        def forward(self, x): return (x.flatten(1).to(torch.complex64)@self.w.conj()).abs()
    opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
    make = lambda: torch.manual_seed(0) and small(model=Waves(), opt_func=opt_func)
    goes_on(make, fit(), [(0,2)], steps=1)

def test_metrics_do_not_fill_the_checkpoint():
    "A metric that gathers all predictions; with `train_metrics` it is kept in mid-epoch, where it is needed"
    def make(train_metrics=False):
        count = skm_to_fastai(lambda t,p: len(p), flatten=False)
        learn = small(metrics=[accuracy, F1Score(average='macro'), count],
                      model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        learn.recorder.train_metrics = train_metrics
        return learn
    train(make, fit(), Checkpoint('run', steps=3))
    own = lambda f: torch.load(f)['state']['own'][0]['state']
    states = [own(f)['objects']['Recorder']['way']['metrics'] for f in Path('run').rglob('*.pt')]
    assert states and all('preds' in m or i!=3 for s in states for i,m in enumerate(s))
    assert all(len(str(s))<3000 for s in states)
    goes_on(partial(make, True), fit(), [(1,2)], path='other', steps=1)

class Tally:
    "As the metrics of another package"
    def __init__(self): self.reset()
    def reset(self): self.right,self.n = torch.zeros(1),0
    def update(self, o, y): self.right += (o.argmax(1)==y).sum().item(); self.n += len(y)
class Wraps(Metric):
    def __init__(self, inner): self.inner = inner
    def reset(self): self.inner.reset()
    def accumulate(self, learn): self.inner.update(learn.pred, learn.y)
    value = property(lambda self: (self.inner.right/self.inner.n).item())
class ByClass(Metric):
    def reset(self): self.found = defaultdict(list)
    def accumulate(self, learn):
        for o,y in zip(learn.pred.argmax(1).tolist(), learn.y.tolist()): self.found[y].append(o==y)
    value = property(lambda self: float(np.mean([np.mean(o) for o in self.found.values()])))
class Box(Metric):
    def reset(self): self.all = defaultdict(lambda: 0)
    def accumulate(self, learn): self.all[0] += 1
    value = property(lambda self: self.all[0])

def test_what_metrics_gather_in_mid_epoch():
    "Also in objects of theirs; one that cannot be kept is named"
    def make(*more):
        torch.manual_seed(0)
        learn = small(metrics=[Wraps(Tally()), ByClass(), F1Score(average='macro'), *more],
                      model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        learn.recorder.train_metrics,learn.recorder.add_time = True,False
        return learn
    def table(learn): return learn.recorder.values
    fits = lambda l,cbs: [l.fit(2, cbs=cbs) for _ in range(2)]
    assert 'cannot' not in goes_on(make, fits, [(0,2), (1,2)], steps=1, numbers=table)
    _,out = train(partial(make, Box()), fit(1), Checkpoint('other', steps=1))
    assert out.count('cannot save metrics[3].all (defaultdict of <lambda>)')==1, out

# Files of other callbacks
def test_save_model_beside_an_average():
    "fastai's loads its best file at the end"
    from fastai_callbacks_ext.all import EMA
    make = lambda: small([SaveModelCallback(fname='best'), EMA(.9, final='raw')], path=Path('.'))
    goes_on(make, lambda l,cbs: l.fine_tune(3, 1e-2, cbs=cbs), [(0,2), (1,1), (2,3)])
    as_in_a_new_process()
    want = weights(train(make, lambda l,cbs: l.fine_tune(3, 1e-2, cbs=cbs))[0])
    assert weights(train(make, lambda l,cbs: l.fine_tune(3, 1e-2, cbs=cbs), Checkpoint('run'))[0])==want

# Signals to the whole group
class Send(Callback):
    "Sends a signal to all processes of the group in the event `when` of a training batch"
    def __init__(self, when, number, times, at):
        self.when,self.number,self.times,self.at = when,number,times,at
    def __call__(self, name):
        if name!=self.when or self.train_iter!=self.at: return
        for _ in range(self.times):
            cmd = ['kill', f'-{self.number:d}', '--', f'-{os.getpid()}']
            subprocess.run(cmd, start_new_session=True)
            time.sleep(.3)

def leads_a_group(send):
    "Trains with data workers, in a group of its own"
    os.setsid()
    for s in signal.SIGTERM,signal.SIGUSR1: signal.signal(s, signal.SIG_DFL)
    dls = DataLoaders(*[dl.new(num_workers=2) for dl in digits_dls(bs=16, n=240).loaders])
    learn = Learner(dls, digits_model(), loss_func=CrossEntropyLossFlat())
    cbs = [Checkpoint('run', epochs=None, background=False), PreemptionGuard(), send]
    with learn.no_bar(): learn.fit(2, cbs=cbs)

@pytest.mark.parametrize('when,number,times,at,batch', [
    ('after_pred', signal.SIGTERM, 1, 8, 9), ('before_step', signal.SIGUSR1, 2, 8, 9),
    ('after_train', signal.SIGTERM, 1, 12, None)])
def test_a_signal_to_the_whole_group(when, number, times, at, batch):
    "Data workers live on; the batch, or the validation, ends; the process ends by the signal"
    assert exit_code(lambda: leads_a_group(Send(when, number, times, at)))==-number
    at = json.loads(next(Path('run').rglob('*.json')).read_text())['about']['at']
    assert at['batch']==batch and at['finished'] is False, at

# Saves that meet each other
def states_on_disk():
    "What each checkpoint says of its place, and its weights"
    for f in sorted(Path('run').rglob('*.json')):
        about = json.loads(f.read_text())
        state = load_state(f.with_suffix('.pt'), about['size'], about['sha256'])['state']
        yield about['about']['at'],state['shared']['model']['weights']

class Signal(Callback):
    "Sends a signal after a batch; keeps the weights after each"
    order = 1990
    def __init__(self, batch): self.batch,self.seen = batch,{}
    def after_batch(self):
        if not self.training: return
        state = self.learn.model.state_dict()
        self.seen[self.epoch,self.iter+1] = {k: v.cpu().clone() for k,v in state.items()}
        if self.train_iter==self.batch: signal.raise_signal(signal.SIGUSR1)

@pytest.fixture
def usr1():
    before = signal.signal(signal.SIGUSR1, lambda *args: None)
    yield
    signal.signal(signal.SIGUSR1, before)

def test_a_save_waits_for_the_one_before(monkeypatch, usr1):
    "A signal while a file is still written: that file has the weights of its batch, not of a later one"
    write,waits = files._Sink.write,iter([.02]*50)
    monkeypatch.setattr(files._Sink, 'write', lambda *args: (time.sleep(next(waits, 0)), write(*args))[1])
    cb = Signal(4)
    train(small, fit(), cb, Checkpoint('run', steps=2), PreemptionGuard(signal.SIGUSR1))
    found = {(at['epoch'], at['batch']): weights for at,weights in states_on_disk()}
    assert {(0,2), (0,4)}==found.keys()
    for at,state in found.items():
        assert all(torch.equal(v.cpu(), state[k]) for k,v in cb.seen[at].items()), at

def test_a_failed_save_does_not_cost_the_next(monkeypatch):
    "None can be written on the way; the final state is"
    save = files.save_state
    def fails(file, state):
        if state['about']['at']['finished']: return save(file, state)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(files, 'save_state', fails)
    assert 'could not save' in train(small, fit(), Checkpoint('run'))[1]
    assert [at['finished'] for at,_ in states_on_disk()]==[True]

@pytest.mark.parametrize('epoch', [0, 1])
def test_an_error_before_the_first_batch_of_an_epoch(epoch, usr1):
    "After a signal: there is no batch to go on from; the epoch before is, and the error is the loader's"
    class Broken(Callback):
        order,epoch_of_error = 3000,epoch
        def before_train(self):
            if self.epoch!=self.epoch_of_error: return
            signal.raise_signal(signal.SIGUSR1)
            raise OSError('the loader is broken')
    with pytest.raises(OSError, match='the loader is broken'):
        train(small, fit(), Broken(), Checkpoint('run'), PreemptionGuard(signal.SIGUSR1))
    assert [(at['epoch'],at['batch']) for at,_ in states_on_disk()]==[(1,None)]*epoch
    want = crash.digests(train(small, fit())[0])
    assert crash.digests(train(small, fit(), Checkpoint('run'))[0])==want

def test_a_do_item_of_ones_own_beside_seeded_items():
    "It is called for each item, and is there afterwards"
    def doubled(i): return type(dl).do_item(dl, i)
    learn = small()
    learn.dls.train = dl = learn.dls.train.new(num_workers=1)
    dl.do_item,first = doubled,[]
    learn.add_cb(StopIn(0, 1))
    with contextlib.suppress(KeyboardInterrupt), learn.no_bar():
        class Look(Callback):
            def before_batch(self): first.append(vars(dl)['do_item'].own)
        learn.fit(1, cbs=[Checkpoint('run', seed_items=True), SkipNonFinite(), Look()])
    assert first and all(o is doubled for o in first) and vars(dl)['do_item'] is doubled

def test_seeded_items_beside_a_guard():
    "What a guard puts on the loader for a while does not stay there"
    learn = small()
    learn.dls.train = dl = learn.dls.train.new(num_workers=1)
    with learn.no_bar(): learn.fit(2, cbs=[Checkpoint('run', seed_items=True), SkipNonFinite()])
    assert 'do_item' not in vars(dl)

# What a run changes, wherever it is. Each of these goes on to other numbers if it is not kept
X = torch.randn(48, 5, generator=seeded())
ITEMS = list(zip(X, (X.sum(1)>0).long()))

def tiny(cbs=(), model=None, dls=None, loss=None, opt=SGD):
    "Six batches an epoch"
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    if dls is None:
        dls = DataLoaders(DataLoader(ITEMS[:36], bs=6, shuffle=True), DataLoader(ITEMS[36:], bs=6))
    model = model or nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    learn = Learner(dls, model, loss or F.cross_entropy, opt_func=opt, lr=.1, cbs=cbs)
    learn.recorder.add_time,learn.logger = False,noop
    return learn

def scaled(name, by):
    "A class of callbacks that multiply the loss by `by(self)` in training"
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.loss_grad*by(self)
    return type(name, (Callback,), dict(after_loss=after_loss))

class Flag(scaled('Flag', lambda self: 3 if self.first else 1)):
    "At the end of each epoch it is what it was when the fit began"
    first = False
    def __init__(self): self.first = False
    def before_epoch(self): self.first = True
    def after_batch(self): self.first = False

class Reweigh(Callback):
    def __init__(self, w): self.w = w
    def after_batch(self): self.w[0] *= 1.1
def class_weights(): return tiny([Reweigh(w := torch.ones(2))], loss=nn.CrossEntropyLoss(weight=w))

class Writes(Callback):
    def __init__(self, d): self.d = d
    def after_batch(self): self.d['n'] += 1
class Reads(scaled('Reads', lambda self: 1+self.d['n']/20)):
    def __init__(self, d): self.d = d
def shared_dict(): return tiny([Writes(d := dict(n=0)), Reads(d)])

class Losses(scaled('Losses', lambda self: 1+len(self.losses)/20)):
    order = 60
    def before_fit(self): self.losses = self.recorder.losses

class OnLearner(scaled('OnLearner', lambda self: self.temperature)):
    def before_fit(self): self.learn.temperature = 1.
    def after_batch(self): self.learn.temperature *= .9

class Slots:
    __slots__ = 'n',
    def __init__(self): self.n = 0
class Inner(Callback): n = 0
class Owns(scaled('Owns', lambda self: 1+(self.slots.n+self.inner.n+len(self.all)+self.module.n)/50)):
    all = []
    def __init__(self): self.slots,self.inner,self.module = Slots(),Inner(),Temperature()
    def before_fit(self): type(self).all = self.all if self.learn.n_epoch==0 else []
    def after_batch(self):
        self.slots.n += 1; self.inner.n += 1; self.all.append(1); self.module.n += 1

class Teaches(ExtCallback):
    "Names none of its state: a model, and a list"
    run_valid = False
    def __init__(self, teacher): self.teacher,self.said = teacher,[]
    def after_loss(self):
        with torch.no_grad(): said = self.teacher(self.x)
        self.said.append(said.mean().item())
        self.learn.loss_grad = self.loss_grad + F.mse_loss(self.pred, said)*(1+len(self.said)/50)
    @torch.no_grad()
    def step_taken(self):
        for t,p in zip(self.teacher.parameters(), self.model.parameters()): t.lerp_(p, .1)
def teaches():
    learn = tiny()
    learn.add_cb(Teaches(deepcopy(learn.model)))
    return learn

class OwnsLoader(Callback):
    def __init__(self): self.other = DataLoader(ITEMS, bs=6, shuffle=True)
    def after_loss(self):
        if not self.training: return
        x,_ = self.other.one_batch()
        self.learn.loss_grad = self.loss_grad+self.learn.model(x).pow(2).mean()

class CoTrains(Callback):
    def __init__(self):
        self.other = tiny()
        self.other.create_opt()
    def after_loss(self):
        if not self.training: return
        o = self.other
        F.cross_entropy(o.model(self.x), self.y).backward()
        o.opt.step(), o.opt.zero_grad()
        self.learn.loss_grad = self.loss_grad+F.mse_loss(self.pred, o.model(self.x).detach())

class ByParameter(Callback):
    def before_fit(self): self.old = {p: p.detach().clone() for p in self.learn.model.parameters()}
    def after_step(self):
        for p,o in self.old.items(): o.lerp_(p.data, .3), p.data.lerp_(o, .5)

class Counts(torch.optim.SGD):
    def step(self, closure=None):
        self.n = getattr(self, 'n', 0)+1
        for p in self.param_groups[0]['params']: p.data.add_(p.grad, alpha=-.1/self.n)
class Stepper:
    def __init__(self): self.n = 0
    def __call__(self, p, lr, **kw): self.n += 1; p.data.add_(p.grad.data, alpha=-lr/(1+self.n/10))

class DropUp(Callback):
    def after_batch(self): self.learn.model[1].p = self.learn.model[1].p*.95
def dropout(): return tiny([DropUp()], nn.Sequential(nn.Linear(5, 8), nn.Dropout(.5), nn.Linear(8, 2)))

class Noisy(nn.Module):
    def __init__(self): super().__init__(); self.g,self.inside = seeded(),[nn.Linear(5, 5)]
    def forward(self, x):
        if self.training:
            x = x+torch.randn(x.shape, generator=self.g)/3
            for p in self.inside[0].parameters(): p.data *= .9
        return x+self.inside[0](x).detach()

class Outermost(nn.Module):
    "The model itself counts, remembers and cools down"
    def __init__(self):
        super().__init__()
        self.layer,self.tau,self.seen,self.mean = nn.Linear(5, 2),2.,[],None
    def forward(self, x):
        o = self.layer(x)
        if self.training:
            self.tau *= .9
            self.seen.append(o.detach().mean().item())
            self.mean = o.detach().mean(0) if self.mean is None else .9*self.mean+.1*o.detach().mean(0)
        return o/self.tau+len(self.seen)/50 if self.mean is None else o/self.tau-self.mean+self.seen[-1]

class Grows(nn.Module):
    "A buffer that is not saved with the weights, made in `forward`, and longer later"
    def forward(self, x):
        if self.training:
            old = self._buffers.get('bank', x.new_zeros(0, 5))
            self.register_buffer('bank', torch.cat([old, x[:1].detach()]), persistent=False)
        return x-self.bank.mean(0)

rng = None
def shakes(x): return x+torch.tensor(rng.normal(0, .3, x.shape)).float()
def loader_with(**kwargs): return DataLoaders(TorchDL(ITEMS[:36], **kwargs), TorchDL(ITEMS[36:], 6))
def transform_with_a_global():
    global rng
    rng = np.random.default_rng(0)
    dsets = Datasets(range(48), [[lambda i: X[i], shakes], [lambda i: ITEMS[i][1]]],
                     splits=(range(36), range(36, 48)))
    return tiny(dls=dsets.dataloaders(bs=6, num_workers=0))

class Noise:
    def __init__(self): self.rng = np.random.default_rng(0)
    def __getitem__(self, i): return ITEMS[i][0]+float(self.rng.normal()), ITEMS[i][1]
    def __len__(self): return 36
def nested_data():
    data = torch.utils.data.ConcatDataset([Noise()])
    return tiny(dls=DataLoaders(TorchDL(data, 6, shuffle=True), TorchDL(ITEMS[36:], 6)))

class BatchesOfSix:
    "No `Sampler`: counts its epochs"
    def __init__(self): self.epoch = 0
    def __len__(self): return 6
    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(36)
        self.epoch += 1
        return iter(order.reshape(6, 6).tolist())
class InPlace(torch.utils.data.Sampler):
    def __init__(self): self.order = list(range(36))
    def __len__(self): return 36
    def __iter__(self): random.shuffle(self.order); return iter(self.order)
class Numbered(DataLoader):
    n_epochs = 0
    def get_idxs(self):
        self.n_epochs += 1
        return np.random.default_rng(self.n_epochs).permutation(self.n).tolist()
def numbered(): return tiny(dls=DataLoaders(Numbered(ITEMS[:36], bs=6), DataLoader(ITEMS[36:], bs=6)))
class Larger(Callback):
    def after_epoch(self): self.dls.train.bs = 9

CHANGES = dict(
    flag=lambda: tiny([Flag()]), class_weights=class_weights, shared_dict=shared_dict,
    losses=lambda: tiny([Losses()]), on_learner=lambda: tiny([OnLearner()]),
    owns=lambda: tiny([Owns()]), teaches=teaches,
    owns_loader=lambda: tiny([OwnsLoader()]), co_trains=lambda: tiny([CoTrains()]),
    by_parameter=lambda: tiny([ByParameter()]),
    lookahead=lambda: tiny(opt=partial(ranger, k=4)),
    optimizer=lambda: tiny(opt=partial(OptimWrapper, opt=Counts)),
    stepper=lambda: tiny(opt=lambda p,lr,**kw: Optimizer(p, [Stepper()], lr=lr)), dropout=dropout,
    noisy=lambda: tiny(model=nn.Sequential(Noisy(), nn.Linear(5, 2))),
    outermost=lambda: tiny(model=Outermost()),
    wrapped=lambda: tiny(model=nn.DataParallel(Outermost())),
    buffer=lambda: tiny(model=nn.Sequential(Grows(), nn.Linear(5, 2))),
    loss_in_partial=lambda: tiny(loss=partial(Temperature())), global_generator=transform_with_a_global,
    nested_data=nested_data, batch_sampler=lambda: tiny(dls=loader_with(batch_sampler=BatchesOfSix())),
    in_place=lambda: tiny(dls=loader_with(batch_size=6, sampler=InPlace())), numbered=numbered,
    larger=lambda: tiny([Larger()]))

@pytest.mark.parametrize('name', CHANGES)
def test_what_changes_is_put_back(name):
    "In mid-epoch, and between epochs"
    def make():
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        return CHANGES[name]()
    said = goes_on(make, fit(), [(0,3), (1,1)], steps=1, numbers=weights)
    assert 'cannot save' not in said, said

def test_workers_that_live_on():
    "Between epochs: the first one draws a random number more"
    made = []
    def make():
        made.append(loader_with(batch_size=6, shuffle=True, num_workers=1, persistent_workers=True))
        return tiny(dls=made[-1])
    goes_on(make, fit(), [(1,1), (2,1)], steps=None, numbers=weights)
    for dls in made: dls.train._iterator._shutdown_workers()      # collected as garbage, each takes 5 s

def test_one_that_fails_is_named_and_the_rest_is_saved():
    class Bad:
        def state_dict(self): raise RuntimeError('not now')
        def load_state_dict(self, state): pass
    class Holds(Callback):
        def __init__(self): self.bad,self.own = Bad(),[]; self.own.append(self.own)
    class Odd(Callback):
        def state_dict(self): return Bad()
        def load_state_dict(self, state): pass
    class Less(Callback):
        def state_dict(self): return dict(n=1, o=object())
        def load_state_dict(self, state): return state['o']
    said = goes_on(lambda: tiny([Holds(), Odd(), Less()]), fit(), [(1,1)], steps=1, numbers=weights)
    for o in ('Holds.bad (RuntimeError: not now)', 'Odd (state_dict: ', "Less['o'] (object)",
              "Less (KeyError: 'o')"):
        assert o in said, said
    assert 'Holds.own' not in said

def test_what_is_swapped_for_something_new_is_named():
    class Swap(Callback):
        def before_epoch(self):
            if self.epoch!=1: return
            self.learn.loss_func,self.learn.dls = nn.CrossEntropyLoss(label_smoothing=.5),tiny().dls
    _,said = train(lambda: tiny([Swap()]), fit(), Checkpoint('run'))
    assert 'learner.loss_func (CrossEntropyLoss)' in said and 'learner.dls (DataLoaders)' in said, said

def test_long_lists_cost_little():
    "A million numbers that do not change are not written"
    class Long(Callback):
        def __init__(self): self.numbers = list(range(10**6))
    train(lambda: tiny([Long()]), fit(1), Checkpoint('run'))
    assert max(f.stat().st_size for f in Path('run').rglob('*.pt'))<1e5

# --- an optimizer of another package ------------------------------------------------------------
class CountsSteps(FreeSGD):
    "Counts its steps in an attribute"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.n = 0
    def step(self, closure=None):
        self.n += 1
        super().step()

def test_an_optimizer_of_an_installed_package(tmp_path, monkeypatch):
    "Its own attributes go on too, and no line says that it cannot be saved"
    module = types.ModuleType('installed')
    module.__file__ = f"{sysconfig.get_paths()['purelib']}/installed/__init__.py"
    monkeypatch.setitem(sys.modules, 'installed', module)
    monkeypatch.setattr(CountsSteps, '__module__', 'installed')
    monkeypatch.chdir(tmp_path)
    def make():
        return digits_learner(ScheduleFree(), n=160, bs=32, opt_func=partial(OptimWrapper, opt=CountsSteps))
    def numbers(learn): return crash.digests(learn),learn.opt.opt.n
    said = goes_on(make, lambda learn,cbs: learn.fit(2, cbs=cbs), [(0,2), (1,1)], numbers=numbers)
    assert 'cannot save' not in said
