"What is copied is the state of one moment, wherever it is and however late its bytes arrive"
import threading
from functools import partial
from types import SimpleNamespace

import pytest, torch
from fastai.basics import Callback, OptimWrapper, noop
from hypothesis import given, strategies as st
from torch import Tensor, nn
import fastai_callbacks_ext.base.snapshot as module
import fastai_callbacks_ext.checkpoint as checkpoint
from fastai_callbacks_ext.all import (EMA, SAM, SWA, Checkpoint, FastLoop, GradientAccumulation,
                                      LookaheadWeights, SpikeGuard)
from fastai_callbacks_ext.base.files import BackgroundWriter, StateFiles, load_state, map_state, save_state
from fastai_callbacks_ext.base.snapshot import Snapshot, _Gpu
from fastai_callbacks_ext.test_utils import digits_learner
from test_files import bits, quick, states

class Gpu(_Gpu):
    "Main memory in the place of a GPU's. What is on it comes when it is waited for, in small parts"
    part,free,gate = 500,10**12,None
    def has(self, t): return True
    def room(self, device): return self.free
    def mark(self, device): return SimpleNamespace(synchronize=noop)
    def parts(self, held, mark):
        if self.gate: assert self.gate.wait(20)
        yield from held.view(torch.uint8).split(self.part)

class Full(Gpu):
    "No room for a second copy"
    free = 0

class OutOfMemory(Gpu):
    "There seemed to be room"
    def clone(self, pieces): return None

class Torn(Gpu):
    "Takes no copy on the GPU: what comes late is what is there then"
    def clone(self, pieces): return pieces
    def parts(self, held, mark):
        if self.gate: assert self.gate.wait(20)
        yield from super().parts(Gpu.clone(self, held), mark)

kinds = {'main memory':Snapshot, **{o.__name__:partial(Snapshot, o()) for o in (Gpu, Full, OutOfMemory)}}
on_each = pytest.mark.parametrize('make', kinds.values(), ids=kinds)

@pytest.fixture(autouse=True)
def unpinned(monkeypatch):
    "Without a GPU no memory can be pinned"
    monkeypatch.setattr(module, '_new', lambda dtype, n, pinned: torch.empty(n, dtype=dtype))

@quick
@given(st.lists(states, min_size=1, max_size=3), st.sampled_from([*kinds.values()]))
def test_equals(tmp_path, several, make):
    snapshot = make()
    for state in several:
        copy = snapshot.take(state)
        assert bits(copy)==bits(map_state(state, lambda t: t))
        naive,size = [],save_state(tmp_path/'a', copy)['size']
        map_state(state, naive.append)
        numbers = sum(t.numel()*t.element_size() for t in naive if not t.is_sparse)
        assert size <= numbers + 2000*(len(naive)+2) + 8*len(repr(state))

@quick
@given(states, st.sampled_from([*kinds.values()]))
def test_is_independent(state, make):
    "Also when the copy comes after the change"
    originals,before = [],bits(map_state(state, lambda t: t))
    finish = make().start(state)
    map_state(state, originals.append)
    saved = [t.clone() for t in originals]
    try:
        for t in originals:
            if t.is_sparse or not t.numel() or 0 in t.stride(): continue
            t.copy_(1-t.to(torch.complex64) if t.is_complex() else (1-t.double()).to(t.dtype))
        assert bits(finish())==before
    finally:
        for t,s in zip(originals, saved):
            if not t.is_sparse and 0 not in t.stride(): t.copy_(s)

def net(n=4): return nn.Sequential(*[nn.Linear(50, 50) for _ in range(n)], nn.BatchNorm1d(50))

@on_each
def test_uses_memory_again(make):
    state,snapshot = {'m': net().state_dict(), 'n': 1},make()
    ptrs = lambda o: [t.data_ptr() for t in o['m'].values()]
    first = ptrs(snapshot.take(state))
    for _ in range(3):
        for t in state['m'].values(): t.add_(1)
        copy = snapshot.take(state)
        assert sorted(ptrs(copy))==sorted(first) and bits(copy)==bits(state)
    assert set(ptrs(state)).isdisjoint(first)
    bigger = {'m': state['m'] | {'more': torch.ones(1234)}, 'n': 2}
    assert set(first)<set(ptrs(snapshot.take(bigger)))
    small = {'m': {'w': torch.ones(50, 50)}}
    assert set(ptrs(snapshot.take(small)))<set(first)
    assert [len(o) for o in snapshot._buffers.values()]==[1]      # what is no longer used is let go

@on_each
def test_keeps_ties(tmp_path, make):
    m = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    m[1].weight = m[0].weight
    lstm = nn.LSTM(100, 100, 2)
    flat = torch.cat([p.detach().flatten() for p in lstm.parameters()])
    parts = [t for t in flat.split([p.numel() for p in lstm.parameters()])]
    state = {'m': m.state_dict(), 'T': m[0].weight.T, 'parts': parts, 'one': flat[5],
             'big': torch.zeros(10**6)[7:9], 'column': torch.zeros(1000, 1000)[:,3]}
    copy = make().take(state)
    assert bits(copy)==bits(map_state(state, lambda t: t))
    assert len({t.data_ptr() for t in (copy['m']['0.weight'], copy['m']['1.weight'], copy['T'])})==1
    assert len({t.untyped_storage().data_ptr() for t in (*copy['parts'], copy['one'])})==1
    want = 4*(300*300 + 600 + flat.numel() + 2 + 1000)
    assert save_state(tmp_path/'a', copy)['size']<=1.05*want
    back = load_state(tmp_path/'a')
    assert bits(back)==bits(copy) and back['m']['0.weight'].data_ptr()==back['m']['1.weight'].data_ptr()

def test_of_types_in_one_storage(tmp_path):
    "`torch.save` refuses views of a storage as different types"
    t = torch.arange(8.)
    copy = Snapshot().take([t, t.view(torch.int32)])
    save_state(tmp_path/'a', copy)
    assert bits(load_state(tmp_path/'a'))==bits([t, t.view(torch.int32)])

def test_of_foreign_memory():
    import numpy as np
    a = np.arange(20.)
    state = [torch.from_numpy(a), torch.from_numpy(a[:5]), torch.from_numpy(a[3:])]
    assert bits(Snapshot().take(state))==bits(state)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('room', [True, False])
def test_from_gpu(room, monkeypatch):
    monkeypatch.undo()
    if not room: monkeypatch.setattr(_Gpu, 'room', lambda self, device: 0)
    state,snapshot = {'m': net(50).cuda().state_dict()},Snapshot()
    for _ in range(3):
        for t in state['m'].values(): t.add_(1)
        want = bits(map_state(state, Tensor.cpu))
        finish = snapshot.start(state)
        for t in state['m'].values(): t.add_(1)
        copy = finish()
        assert all(t.is_pinned()!=room for t in copy['m'].values())
        assert bits(copy)==want

def test_training_goes_on_while_writing(tmp_path):
    "The weights change under the writer, and the file has those of the snapshot"
    model,snapshot,writer,states = net(20),Snapshot(),BackgroundWriter(),StateFiles(tmp_path, keep=20)
    want = {}
    for i in range(10):
        if not writer.busy:
            copy = snapshot.take({'m': model.state_dict()})
            want[i] = bits(copy)
            writer.submit(partial(states.save, copy, {'i': i}))
        with torch.no_grad():
            for p in model.parameters(): p.add_(1)
    writer.close()
    for n in states._numbers('pt'):
        state,about = states._load(n)
        assert bits(state)==want[about['i']]

# In a fit
class Recorded(Snapshot):
    "Notes what it was to copy"
    def __init__(self, gpu):
        super().__init__(gpu)
        self.wanted = []
    def start(self, state):
        self.wanted.append(bits(map_state(state, lambda t: t)))
        return super().start(state)

class Gate(Callback):
    "What is to be copied arrives when two more batches have begun, or validation, or the end of the fit"
    order,opened = -3000,threading.Event()
    def before_fit(self): self.opened.clear()
    def before_batch(self):
        if not self.training or self.iter%2==0: self.opened.set()
    def after_batch(self): self.opened.clear()
    def before_validate(self): self.opened.set()
    def after_fit(self): self.opened.set()

class Spoil(Callback):
    "A NaN that SpikeGuard answers by putting weights back; weights changed by hand before the forward pass"
    order = 5
    def before_batch(self):
        if self.training and self.train_iter in (5,9): self.learn.xb = (self.x*float('nan'),)
        with torch.no_grad():
            for p in self.learn.model.parameters(): p.mul_(1.001)

cases = dict(
    plain=lambda: [], hand=lambda: [Spoil()], sam=lambda: [SAM()], ema=lambda: [EMA()],
    swa=lambda: [SWA(every=2)], lookahead=lambda: [LookaheadWeights()],
    accumulation=lambda: [GradientAccumulation(64)],
    fastloop=lambda: [FastLoop(), EMA()], spikes=lambda: [SpikeGuard(action='rollback', snapshot=2), Spoil()])

def saved(monkeypatch, path, cbs, gpu, **kwargs):
    "What was to be saved at each save of a fit, and what the files have"
    gpu.gate,made = Gate.opened,[]
    monkeypatch.setattr(checkpoint, 'Snapshot', lambda: made.append(Recorded(gpu)) or made[-1])
    learn = digits_learner([*cbs, Gate()], n=250, bs=32, **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-2, cbs=Checkpoint(path, steps=1, keep=99))
    files = StateFiles(path/'fit_0', keep=99)
    before_last = sorted(files._numbers('pt'))[:-1]
    return made[-1].wanted,[bits(files._load(n)[0]) for n in before_last]

@pytest.mark.parametrize('gpu', [Gpu, Full])
@pytest.mark.parametrize('case', cases)
def test_the_state_of_its_moment(monkeypatch, tmp_path, on_cpu, case, gpu):
    "Whatever changes the weights, and whenever: the files have what was there when they were saved"
    want,got = saved(monkeypatch, tmp_path, cases[case](), gpu())
    assert want and got==want

def test_a_torn_copy_would_be_seen(monkeypatch, tmp_path, on_cpu):
    want,got = saved(monkeypatch, tmp_path, [], Torn())
    assert len(got)==len(want) and got!=want

@on_each
def test_memory_for_the_first_copy(make):
    "It is there before; what is prepared is used, and only what is missing is asked for"
    big,snapshot = [torch.arange(2.**22), torch.zeros(2**21), torch.ones(3)],make()
    need = snapshot.missing(big)
    snapshot.prepare(need)
    assert not snapshot.missing(big)
    ready = {o.data_ptr() for same in snapshot._buffers.values() for o in same}
    copy = snapshot.take(big)
    assert bits(copy)==bits(big) and (not need or {o.data_ptr() for o in copy}==ready)
    more = snapshot.missing([*big, torch.ones(2**22)])
    assert len(more)==(0 if make is kinds['Gpu'] else 1)

@pytest.mark.parametrize('gpu', [None, Gpu(), Full()])
def test_a_fit_with_prepared_memory(monkeypatch, tmp_path, gpu):
    "Saves wait for it, and give the same files; no thread is left"
    monkeypatch.setattr(module, '_small', 0)
    n,prepared,real = threading.active_count(),[],Snapshot.prepare
    monkeypatch.setattr(Snapshot, 'prepare', lambda self,need: prepared.append(len(need)) or real(self, need))
    monkeypatch.setattr(checkpoint, 'Snapshot', lambda: Snapshot(gpu))
    learn = digits_learner(n=250, bs=32)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=Checkpoint(tmp_path, steps=2))
    state,about = StateFiles(tmp_path/'fit_0').load()
    assert about['at']['finished'] and threading.active_count()==n
    assert len(prepared)==(type(gpu) is not Gpu)

def test_later(monkeypatch):
    "A copy that a thread completes; the next one waits for it"
    gpu = Gpu()
    gpu.gate,snapshot = threading.Event(),Snapshot(gpu)
    x = torch.zeros(1000)
    first = snapshot.later([x])
    x.add_(1)
    threading.Timer(.05, gpu.gate.set).start()
    second = snapshot.later([x])
    assert bits(second())==bits([torch.ones(1000)]) and first() is not None
