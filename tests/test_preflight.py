"What `preflight` finds; that it finds nothing in sound learners; that a fit afterwards has the same bits"
import gc, os, random, signal
from _thread import allocate_lock
from datetime import datetime, timedelta
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest, torch
import torch.nn.functional as F
from fastai.callback.all import MixUp, SaveModelCallback
from fastai.callback.core import Callback, CancelBatchException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.metrics import AccumMetric, accuracy
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, L1LossFlat, MSELossFlat
from fastai.optimizer import OptimWrapper
from fastai_callbacks_ext import preflight as module
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base import costs, items as checks, rehearsal
from fastai_callbacks_ext.base.rehearsal import NotKnown, Rehearsal, putting_back
from fastai_callbacks_ext.preflight import PreflightResult, PreflightCheck, preflight
from fastai_callbacks_ext.test_utils import digits_dls, digits_learner, digits_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from cases import every_case
from common import fit, traces
from settings import SETTINGS

def bits(learn):
    "All that a later fit depends on, as numbers and texts"
    opt = [] if learn.opt is None else [{k: str(v) for k,v in learn.opt.state.get(p, {}).items()}
                                        for g in learn.opt.param_lists for p in g]
    numbers = random.getstate(),str(np.random.get_state()),torch.get_rng_state().tolist()
    return dict(random=numbers, opt=opt,
                hypers=[] if learn.opt is None else [dict(h) for h in learn.opt.hypers],
                grads=[None if p.grad is None else p.grad.tolist() for p in learn.model.parameters()],
                frozen=[p.requires_grad for p in learn.model.parameters()],
                modes=[m.training for m in learn.model.modules()],
                weights={k: v.tolist() for k,v in learn.model.state_dict().items()},
                loaders=[getattr(dl, 'rng', random).getstate() for dl in learn.dls.loaders],
                attrs=sorted(vars(learn)), cbs=[(type(cb), sorted(vars(cb))) for cb in learn.cbs],
                same=[id(o) for o in (learn.opt, learn.model, learn.loss_func, *learn.cbs)])

def steps_of(learn): return [o.item() for o in learn.recorder.losses],list(map(list, learn.recorder.values))

QUICK = 'digits','tabular_classes','torch_loader','list_of_batches','text_classifier'
@pytest.mark.parametrize('name', list(SETTINGS) if every_case else QUICK)
def test_sound_learners(name):
    "No false alarm; all is put back; the fit is the same"
    if name=='classifier': list(DataLoader([0], num_workers=1))      # PyTorch's signal handler stays
    learn = SETTINGS[name]()
    gc.collect()        # the pipes of workers
    before,left = bits(learn),traces(learn)
    found = preflight(learn, n_epoch=2)
    gc.collect()
    assert found.problems==[] and found.ok
    assert bits(learn)==before and traces(learn)==left
    if name=='gan': return
    unknown = {'memory','items'} if name=='list_of_batches' else {'memory'}
    assert {o.name for o in found.checks if o.status=='not checked'}<=unknown
    assert end_of(learn)==end_of(SETTINGS[name]())

def end_of(learn):
    "All bits after a fit"
    fit(learn, 2)
    return steps_of(learn),{k: v for k,v in bits(learn).items() if k!='same'}

def small(*cbs, **kwargs): return digits_learner([*cbs], n=160, bs=32, **kwargs)

def wrapped(params, **kwargs): return OptimWrapper(params, torch.optim.SGD, momentum=.9, **kwargs)
@pytest.mark.parametrize('kwargs', [{}, dict(opt_func=wrapped)])
def test_in_the_middle_of_a_training(kwargs):
    "The optimizer has a state, the head alone is trained, and gradients wait"
    def trained():
        learn = fit(small(EMA(), **kwargs).to_fp16())
        for p in list(learn.model.parameters())[:4]: p.requires_grad_(False)
        for p in list(learn.model.parameters())[4:]: p.grad = torch.ones_like(p)
        return learn
    learn = trained()
    before = bits(learn)
    assert preflight(learn).problems==[]
    assert bits(learn)==before
    assert end_of(learn)==end_of(trained())

# --- planted faults -------------------------------------------------------------------------------
class Change(Callback):
    "Changes something that the loss or the model gets"
    order = 5
    def __init__(self, x=None, y=None, loss=None): self.x,self.y,self.by = x,y,loss
    def before_batch(self):
        if self.x: self.learn.xb = tuple(map(self.x, self.xb))
        if self.y: self.learn.yb = tuple(map(self.y, self.yb))
    def after_loss(self):
        if self.by: self.learn.loss_grad = self.by(self.loss_grad)

class Net(nn.Module):
    "Digits in some wrong way"
    def __init__(self, way):
        super().__init__()
        self.way,self.layers,self.n = way,nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),0
        if way=='unused': self.spare = nn.Linear(3, 3)
        if way=='table': self.rows = nn.Embedding(10, 64)
    def forward(self, x):
        if self.way=='mixes': x = x - x.mean(0)
        if self.way=='blind': x = x*0
        if self.way=='random': x = x + torch.from_numpy(np.random.default_rng().normal(size=x.shape)).to(x)
        if self.way=='detached': return self.layers(x).detach()
        if self.way=='table': return self.layers(self.rows(x.long().flatten(1)[:,0]))
        if self.way=='broken': raise RuntimeError('two lines\nof text')
        return self.layers(x)

def net(way): return small(model=Net(way))

def tensors(x, y, model, loss, vx=None, vy=None):
    "A learner of plain PyTorch"
    loader = lambda *o: DataLoader(TensorDataset(*o), 16)
    valid = (x[:16]+1, y[:16]) if vx is None else (vx, vy)
    return Learner(DataLoaders(loader(x, y), loader(*valid)), model, loss_func=loss)

def table(scale=1., **kwargs):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=g)
    x[:,3] = x[:,3]*scale
    return tensors(x, (x[:,:1]>0).long().flatten(), nn.Linear(12, 2), nn.CrossEntropyLoss(), **kwargs)

def regression(shape, loss, offset=0.):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=g)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 1))
    return tensors(x, (x.sum(1)+offset).view(shape), model, loss)

def doubled():
    "Two validation images are in the training set, one under another label"
    learn = table()
    x,y = learn.dls.train.dataset.tensors
    x[7],y[7] = x[5],1-y[5]
    learn.dls.valid.dataset.tensors[0][:2] = x[5:7]
    return learn

def classes(train, valid):
    x = torch.randn(len(train), 12)
    y,other = map(torch.tensor, (train, valid))
    return tensors(x, y, nn.Linear(12, 9), nn.CrossEntropyLoss(), torch.randn(len(other), 12), other)

def left_out():
    learn = small()
    learn.opt = learn.opt_func([list(learn.model.parameters())[:-1]], lr=.1)
    return learn

class Unseeded(TensorDataset):
    rng = staticmethod(np.random.default_rng)
    def __getitem__(self, i):
        x,y = super().__getitem__(i)
        return x+self.rng().normal(),y

def other_scale():
    learn = small(Change(x=lambda x: x*40-9))
    refresh_batchnorm(learn)
    learn.cbs[-1].x = None
    learn.model[1].num_batches_tracked += 1000
    return learn

def unseeded():
    learn = table()
    learn.dls.loaders[0] = DataLoader(Unseeded(*learn.dls.train.dataset.tensors), 16)
    return learn

whitening = nn.BatchNorm1d(64, track_running_stats=False)
def mean_of(pred, y): return ((pred-y)**2).mean()
nan = float('nan')
FAULTS = [
    ('inputs', lambda: small(Change(x=lambda x: x*nan)), 'wrong', 'the input has NaN'),
    ('inputs', lambda: small(Change(x=lambda x: x/0)), 'wrong', 'the input has'),
    ('inputs', lambda: small(Change(x=lambda x: x*0)), 'wrong', 'the input is constant'),
    ('inputs', lambda: small(Change(x=lambda x: x[:1].repeat(len(x),1,1,1))), 'wrong', 'same for all items'),
    ('inputs', lambda: small(Change(x=lambda x: torch.rand(len(x),1,1,1).repeat(1,1,8,8).to(x))), 'look',
      'constant within many items'),
    ('inputs', lambda: small(Change(x=lambda x: x*255)), 'look', 'divide by 255'),
    ('inputs', lambda: table(1000), 'look', '1 of 12 columns'),
    ('inputs', lambda: small(Change(x=lambda x: 11+torch.rand_like(x)), model=Net('table')),
     'not checked', 'an embedding of 10 rows gets numbers from 11'),
    ('inputs', other_scale, 'look', 'not those that the model was trained with'),
    ('items', doubled, 'wrong', '2 validation items are in the training set too'),
    ('items', doubled, 'look', '1 training item occurs again with another label'),
    ('items', unseeded, 'not checked', 'random items'),
    ('labels', lambda: classes([0,1]*20, [0,1,2,2]), 'wrong', 'class 2 of the validation set'),
    ('labels', lambda: classes([0]*120+[1]*2, [0,1]), 'look', 'very unequal'),
    ('labels', lambda: classes([0,11]*20, [0,1]), 'wrong', '11 is among them; the model has outputs for 0'),
    ('labels', lambda: regression((64,), nn.MSELoss()), 'wrong', '(16, 1) and (16,)'),
    ('labels', lambda: regression((64,1), nn.MSELoss(), nan), 'wrong', 'targets are NaN'),
    ('labels', lambda: regression((64,1), nn.BCEWithLogitsLoss(), 5.), 'wrong', 'are not from 0 to 1'),
    ('labels', lambda: tensors(torch.randn(32, 2), torch.zeros(32).long(), nn.Linear(2, 1), F.cross_entropy),
     'wrong', 'always 0'),
    ('a step', lambda: net('broken'), 'wrong', 'RuntimeError: two lines'),
    ('a step', lambda: net('detached'), 'wrong', 'does not depend on any parameter'),
    ('a step', lambda: small(Change(loss=lambda l: l*nan)), 'wrong', 'the first loss is nan'),
    ('first loss', lambda: small(Change(x=lambda x: x*255), model=Net('')), 'look', 'far above'),
    ('first loss', lambda: regression((64,1), MSELossFlat(), 500.), 'look', 'far above'),
    ('first loss', lambda: small(model=fit(small(lr=.1), 6).model), 'look', 'far below'),
    ('first loss', lambda: regression((64,1), mean_of), 'not checked', 'mean_of'),
    ('gradients', lambda: net('unused'), 'look', '2 parameters get no gradient'),
    ('gradients', left_out, 'wrong', '1 parameter is not in the optimizer'),
    ('same twice', lambda: net('random'), 'look', 'the same step twice'),
    ('same twice', unseeded, 'look', 'another first batch'),
    ('items of a batch', lambda: net('mixes'), 'wrong', 'items of a batch are mixed'),
    ('items of a batch', lambda: small(model=nn.Sequential(nn.Flatten(), whitening, nn.Linear(64, 10))),
     'not checked', '1 is a batch norm'),
    ('items of a batch', lambda: net('random'), 'not checked', 'other predictions'),
    ('by heart', lambda: net('blind'), 'wrong', 'cannot be learned by heart')]

def about(name, learn, **kwargs):
    found = learn if isinstance(learn, PreflightResult) else preflight(learn, **kwargs)
    return [o for o in found.checks if o.name==name]

def planted(name):
    "Each fault of a check is found, and all is put back"
    for _,make,status,text in (o for o in FAULTS if o[0]==name):
        torch.manual_seed(0)
        learn = make()
        before = bits(learn)
        found = about(name, learn, only=list(dict.fromkeys(['a step', name])))
        hit = [o for o in found if o.status==status and text in str(o)]
        assert len(hit)==1, (text, found)
        assert bits(learn)==before

def test_faults_of_inputs(): planted('inputs')
def test_faults_of_items(): planted('items')
def test_faults_of_labels(): planted('labels')
def test_faults_of_a_step(): planted('a step')
def test_faults_of_the_first_loss(): planted('first loss')
def test_faults_of_gradients(): planted('gradients')
def test_not_the_same_twice(): planted('same twice')
def test_mixed_items(): planted('items of a batch')
def test_not_learned_by_heart(): planted('by heart')

def test_few_numbers_are_equal_by_chance():
    "Users and films are in both sets; a bottle of wine is not"
    learn = SETTINGS['ratings']()
    found, = about('items', learn, only='items')
    assert found.status=='ok' and 'as many as chance gives' in found.why
    learn = SETTINGS['tabular_classes']()
    learn.dls.valid.dataset.items.iloc[0] = learn.dls.train.dataset.items.iloc[0]
    assert '1 validation item is in the training set too' in about('items', learn, only='items')[0].what

def test_what_is_equal(tmp_path):
    "The content counts, also that of files"
    for name,text in zip('abc', ('same','same','other')): (tmp_path/name).write_text(text)
    mixed = lambda: dict(a=torch.ones(2), b=[1,'x',None])
    values = [lambda: tmp_path/'a', lambda: b'x', mixed, lambda: np.ones(3)]
    for v in values: assert checks._hash([v()])==checks._hash([v()])
    assert checks._hash(tmp_path/'a')==checks._hash(tmp_path/'b')!=checks._hash(tmp_path/'c')
    assert len({checks._hash([v()]) for v in values})==4
    assert checks._count(mixed())==2+1+1000+1000
    with pytest.raises(NotKnown, match='class Lock|class lock'): checks._hash(allocate_lock())

def test_memory_of_a_gpu():
    b = torch.ones(2,3),torch.ones(2)
    found, = costs._is_room(2**32, 2**33, b)
    assert (found.status, found.why)==('ok', '4 GB of 8 GB in a step of 2x3 and 2')
    assert costs._is_room(2**33-1, 2**33, b)[0].status=='look'

def test_other_losses():
    "Soft targets, absolute errors, probabilities, indices that are ignored"
    g = torch.Generator().manual_seed(0)
    x,soft = torch.randn(64, 12, generator=g),torch.rand(64, 3, generator=g).softmax(1)
    hard,model = torch.where(x[:,0]>1, -100, 1*(x[:,1]>0)),lambda n, *o: nn.Sequential(nn.Linear(12, n), *o)
    for y,net,loss in ((soft, model(3), nn.CrossEntropyLoss()), (x[:,:1], model(1), L1LossFlat()),
                       (hard, model(3), nn.CrossEntropyLoss()),
                       (hard.clamp(min=0), model(3, nn.LogSoftmax(1)), nn.NLLLoss()),
                       (1.*(x[:,:2]>0), model(2), BCEWithLogitsLossFlat())):
        found = preflight(tensors(x, y, net, loss, torch.randn(16, 12, generator=g), y[:16]),
                          only=['a step','labels','first loss'])
        assert not found.problems and about('first loss', found)[0].status=='ok', found

# --- however it ends ------------------------------------------------------------------------------
class Raises(Callback):
    "Raises an error in the nth forward pass"
    def __init__(self, error, at): self.error,self.at,self.n = error,at,0
    def after_pred(self):
        self.n += 1
        if self.n==self.at: raise self.error

@pytest.mark.parametrize('at', [1,20,40])
def test_ctrl_c(at):
    learn = fit(small(Raises(KeyboardInterrupt(), at)), 0)
    fit(learn, cbs=Change()) if at==20 else None
    learn.cbs[-1].n = 0
    before,left = bits(learn),traces(learn)
    with pytest.raises(KeyboardInterrupt): preflight(learn)
    assert bits(learn)==before and traces(learn)==left

@pytest.fixture
def ctrl_c():
    "A shell that starts something in the background lets it ignore Ctrl-C"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

def test_a_second_ctrl_c_waits_until_all_is_put_back(monkeypatch, ctrl_c):
    learn,weights,put_back = small(),[*small().model.parameters()],rehearsal.load_learner_state
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        put_back(*args)
    monkeypatch.setattr(rehearsal, 'load_learner_state', interrupted)
    with pytest.raises(KeyboardInterrupt):
        with putting_back(learn):
            for p in learn.model.parameters(): p.data.zero_()
    assert all(map(torch.equal, learn.model.parameters(), weights)) and learn.opt is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_in_another_thread():
    "Which gets no signals"
    found = []
    thread = Thread(target=lambda: found.append(preflight(small(), only='inputs')))
    thread.start(), thread.join()
    assert found[0].checks[0].status=='ok'

class FailsAtTheEnd(Callback):
    def after_fit(self): self.learn.recorder.values[-1]

def test_a_callback_that_needs_results():
    "fastai's own, which read the recorder, and one that fails without"
    learn = small(SaveModelCallback(), FailsAtTheEnd())
    before = bits(learn)
    assert preflight(learn, only=['inputs','a step']).problems==[] and bits(learn)==before

class FailsAtTheStart(Callback):
    def before_fit(self): raise ValueError('no disk')

def test_a_check_that_fails_does_not_end_the_others(monkeypatch):
    monkeypatch.setitem(module._checks, 'labels', lambda r: 1/0)
    by_name = {o.name: o for o in preflight(small(), only=['labels','inputs']).checks}
    assert by_name['inputs'].status=='ok'
    assert by_name['labels'].why=='the check failed: ZeroDivisionError: division by zero'

def test_no_time_is_left():
    found = preflight(small(), seconds=0)
    assert {o.status for o in found.checks}=={'not checked'} and found.ok
    assert '0 seconds are over' in str(found)

# --- what cannot be known -------------------------------------------------------------------------
class OwnLoop(Learner):
    def _do_one_batch(self): super()._do_one_batch()

class Cancels(Callback):
    def before_batch(self): raise CancelBatchException

class Once(IterableDataset):
    def __init__(self): self.read = iter([(torch.ones(12), 1)]*40)
    def __iter__(self): return self.read
    def __len__(self): return 40

def stream():
    learn = table()
    learn.dls.loaders[0] = DataLoader(Once(), 16)
    return learn

def own_loop(): return OwnLoop(digits_dls(n=160), digits_model(), loss_func=CrossEntropyLossFlat())
def lazy(): return small(model=nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))
UNKNOWN = [(own_loop, 'OwnLoop has its own'), (lazy, 'no size before the first batch'),
           (lambda: small(Cancels()), 'a callback cancels the batch'), (stream, 'can be read only once'),
           (lambda: small(FailsAtTheStart()), 'ValueError')]

def test_says_why_it_cannot_know():
    for make,why in UNKNOWN:
        learn = make()
        read = getattr(learn.dls.train.dataset, 'read', None)
        found = preflight(learn)
        assert {o.status for o in found.checks}<={'not checked','ok'}
        assert sum(why in o.why for o in found.checks)>=min(8, len(found.checks)), found
        assert read is None or len(list(read))==40

def test_mixed_images_are_not_measured():
    "The targets of `MixUp` are random; the fit has it still"
    def mixed(): return small(MixUp())
    learn = mixed()
    assert preflight(learn).problems==[] and end_of(learn)==end_of(mixed())

# --- time, disk, log ------------------------------------------------------------------------------
def test_is_there_time(monkeypatch):
    monkeypatch.setattr(costs, '_step_seconds', lambda r: 90.)
    monkeypatch.setattr(costs, '_valid_seconds', lambda r: 18.)
    monkeypatch.setattr(Rehearsal, 'load_seconds', lambda r, i=0: 0.)      # 4 batches, 1 of validation
    said = lambda *cbs, **kwargs: about('fit', small(*cbs), only='fit', **kwargs)[0]
    assert said().status=='not checked'
    assert said(n_epoch=10).what=='10 epochs take about 1:03:00'
    assert said(hours=1).what=='9 epochs fit into 1 hours'
    assert [said(n_epoch=10, hours=h).status for h in (2,1.1,.9)]==['ok','look','wrong']
    assert said(n_epoch=10, hours=.9).next=='in that time: 7 epochs'
    limited = said(TimeLimit(40, reserve=10), n_epoch=10)
    assert limited.status=='look' and '40 minutes (time_limit)' in limited.why and '4 epochs' in limited.next
    soon = datetime.now()+timedelta(hours=3)
    assert said(TimeLimit(deadline=soon), n_epoch=10).status=='ok'

def test_loading_and_computing_at_the_same_time():
    "With workers, the slower one counts"
    learn = table()
    r = Rehearsal(learn)
    r._read = {0: ([], [5.,7.,9.])}
    assert costs._both(r, 0, 3.)==5.
    learn.dls.train.num_workers = 2
    assert costs._both(r, 0, 3.)==3. and costs._both(r, 0, 1.)==2.

def test_is_there_room(monkeypatch, tmp_path):
    "Bytes of weights, statistics and of Adam's two averages"
    learn = small(path=tmp_path/'not'/'there')
    weights = sum(t.numel()*t.element_size() for t in learn.model.state_dict().values())
    bytes_ = weights+sum(8*p.numel() for p in learn.model.parameters())
    status = {}
    for free in (bytes_-1, bytes_+1000, 4*bytes_):
        monkeypatch.setattr(costs.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=free))
        status[free-bytes_] = about('disk', learn, only=['a step','disk'])[-1].status
    assert list(status.values())==['wrong','look','ok']
    broken = net('broken')
    assert about('disk', broken, only=['a step','disk'])[-1].what.startswith('the weights take')

def test_goes_into_the_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = small(RunLog(every=2))
    preflight(learn, only=['inputs','memory'])
    assert os.listdir()==[]
    fit(learn)
    preflight(learn, only='inputs')
    first,second = [o for o in read_log().rows if o['kind']=='preflight']
    assert [o['step'] for o in (first, second)]==[0,4]
    assert [list(o) for o in first['checks']]==[['name','status','what','why','next']]*2
    memory = 'ok' if torch.cuda.is_available() else 'not checked'
    assert [o['status'] for o in first['checks']]==['ok',memory]

def test_what_it_shows():
    rows = ('a', 'ok', 'fine', '', ''),('b', 'look', 'odd|', '3', 'see'),('c', 'wrong', 'bad', '1', '')
    found = PreflightResult([PreflightCheck(*o) for o in rows])
    assert [o.name for o in found.problems]==['c','b'] and not found.ok
    assert repr(found).splitlines()==[
        'preflight: 1 wrong, 1 look, 1 ok', 'ok           a                 fine',
        'look         b                 odd|: 3 -> see', 'wrong        c                 bad: 1']
    assert '| **look** | b | odd\\| | 3 | see |' in found._repr_markdown_()

@pytest.mark.parametrize('kwargs,error', [
    (dict(n_epoch=0), 'n_epoch=0'), (dict(hours=-1), 'hours=-1'), (dict(seconds='x'), "seconds='x'"),
    (dict(only='input'), "only='input': expected 'inputs'.*did you mean 'inputs'")])
def test_bad_arguments(kwargs, error):
    with pytest.raises((ValueError,TypeError), match=error): preflight(small(), **kwargs)

def test_needs_a_learner():
    with pytest.raises(TypeError, match='learn='): preflight(digits_model())

# --- what would end the fit ---------------------------------------------------------------------
def fails_at_once(pred, targ): raise ZeroDivisionError
def fails_on_few(preds, targs): raise ValueError('one class')

def test_a_metric_that_fails():
    found = preflight(small(metrics=[accuracy, fails_at_once]), only='metrics')
    assert found.problems[0].what=='the metric fails_at_once fails' and not found.ok
    few = AccumMetric(fails_on_few, dim_argmax=1)       # it may need more items
    late = preflight(small(metrics=few), only='metrics')
    assert late.problems[0].status=='look' and late.ok
    good = preflight(small(metrics=accuracy), only='metrics').checks[0]
    assert good.status=='ok' and good.what=='1 metric can be computed'

def test_a_loader_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter([(torch.randn(1,8,8), torch.tensor(1))]*8)
    dl = torch.utils.data.DataLoader(Stream(), batch_size=4)
    learn = Learner(DataLoaders(dl, dl), digits_model(), loss_func=nn.CrossEntropyLoss())
    found = preflight(learn)
    assert not found.ok and 'no length' in str(found)

def test_not_one_epoch_fits():
    found = preflight(small(), hours=1e-9, only='fit')
    assert not found.ok and 'not one epoch fits' in str(found)
