"The numbers of a step hold on to nothing; an undone batch has left nothing; items are named when certain"
import random, weakref
from collections import deque
from functools import partial

import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.basics import (Adam, Callback, CancelBatchException, CancelFitException, DataLoader, DataLoaders,
                           Learner, MSELossFlat,
                           OptimWrapper, SkipItemException, Tensor, default_device)
from fastai.callback.all import MixUp, ModelResetter, PartialDL, RNNCallback, WeightedDL
from torch import nn
from fastai_callbacks_ext.all import GradientClip, SkipNonFinite, TerminateOnNaN
from fastai_callbacks_ext.base.step import BatchUndo, StepNumbers, step_numbers
from fastai_callbacks_ext.base.watch import ItemWatch
from fastai_callbacks_ext.test_utils import digits_learner, text_learner
from common import fit

nan = float('nan')
torch_sgd = partial(OptimWrapper, opt=torch.optim.SGD)

# Numbers
@pytest.mark.parametrize('opt_func', [Adam, torch_sgd], ids=['fastai','torch'])
def test_numbers_keep_nothing_alive(opt_func):
    "The gradients of the step before are gone in the next forward pass, unless the optimizer keeps them"
    class Look(Callback):
        order,run_valid = 3000,False
        def __init__(self): self.refs,self.alive = [],[]
        def before_step(self): self.refs = [weakref.ref(p.grad) for p in self.model.parameters()]
        def before_batch(self):
            for p in self.model.parameters(): p.grad = None
            self.alive += [r() is not None for r in self.refs]
    learn = digits_learner([GradientClip(.1), SkipNonFinite(), look := Look()], n=200, bs=32,
                           opt_func=opt_func)
    fit(learn)
    assert look.alive and not any(look.alive)

def test_numbers_are_of_these_gradients():
    "Also in a later fit of one batch, whose tensors may lie where the old ones did"
    class See(Callback):
        order,run_valid = 5,False
        def before_step(self):
            want = torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item()
            seen.append(abs(step_numbers(self.learn).grad_norm-want) < 1e-4*want)
    seen,learn = [],digits_learner(See(), n=40, bs=32, opt_func=torch_sgd)
    for _ in range(10): fit(learn)
    assert len(seen)==10 and all(seen)

class Writes(Callback):
    "Changes gradients as PyTorch does not count it"
    order,run_valid = 5,False
    def __init__(self, factor): self.factor = factor
    def before_step(self):
        for p in self.model.parameters(): p.grad.data.mul_(self.factor)

@pytest.mark.parametrize('guard', [TerminateOnNaN, SkipNonFinite])
def test_numbers_after_code_of_others(guard):
    "What it did to the gradients is seen by whoever asks next"
    def norms(*cbs): return fit(digits_learner([*cbs, GradientClip(.1)], n=40, bs=32)).gradient_clip.norms
    plain,scaled = norms(),norms(guard(), Writes(100))
    assert scaled==pytest.approx([100*o for o in plain], rel=1e-4)
    learn = fit(digits_learner([guard(), Writes(nan), GradientClip()], n=40, bs=32))
    assert learn.gradient_clip.skipped==1

def test_numbers_are_shared(monkeypatch):
    "Computed once in a step, unless code of others may have changed them"
    made,first = [],StepNumbers.__init__
    monkeypatch.setattr(StepNumbers, '__init__', lambda self, *args: (made.append(1), first(self, *args))[0])
    for others,want in ([], 1), ([Writes(1)], 2):
        made.clear()
        fit(digits_learner([TerminateOnNaN(), GradientClip(1e9), *others], n=40, bs=32))
        assert len(made)==want

def test_numbers_of_a_loss_that_was_changed():
    class Add(Callback):
        order,run_valid = 5,False
        def before_step(self):
            numbers = StepNumbers(self.loss)
            seen.append(numbers.are_of(self.loss))
            self.learn.loss.add_(1)
            seen.append(numbers.are_of(self.loss))
    seen = []
    fit(digits_learner(Add(), n=40, bs=32))
    assert seen==[True, False]

# Undo
class Config:
    "Plain values"
    def __init__(self): self.n,self.by_name = 0,{'a': [0]}

class Everything(nn.Module):
    "Changes in each forward pass all that a module can change"
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(.5))
        for n in ('center','replaced','resized'): self.register_buffer(n, torch.zeros(1))
        self.hidden,self.pair = torch.zeros(2),[torch.zeros(1), (torch.zeros(1),)]
        self.by_name = {'a': torch.zeros(1)}
        self.seen,self.recent,self.names = 0,deque(maxlen=3),['a']*100
        self.conjugate = torch.zeros(2, dtype=torch.cfloat).conj()
        self.wide = torch.zeros(1).expand(5)
        self.long,self.queue,self.words = [0]*2000,deque([0.]*100, maxlen=100),set()
        self.counts,self.grown,self.config = np.zeros(3),np.zeros(1),Config()
        self.hidden_net = [nn.BatchNorm1d(64, device=default_device())]
        self.torch_rng,self.rng = torch.Generator().manual_seed(0),random.Random(0)
        self.np_rng,self.old_np_rng = np.random.default_rng(0),np.random.RandomState(0)
        self.itself = [0]
        self.itself.append(self.itself)
    def forward(self, x):
        m = x.detach().mean().cpu()
        if self.training:
            self.center += m.to(self.center.device)
            self.replaced = self.replaced+1
            self.hidden += m
            self.pair[0].add_(m)
            self.pair[1][0].add_(m)
            self.by_name['a'].add_(m)
            self.by_name[self.seen] = m
            self.conjugate.add_(m)
            self.seen += 1
            self.recent.append(m)
            if not hasattr(self, 'late'): self.late = m
            self.resized.resize_(len(self.resized)+1).fill_(self.seen)
            self.long[-1] += 1
            self.queue.append(m.item())
            self.words.add(m.item())
            self.counts += 1
            self.grown.resize(len(self.grown)+1, refcheck=False)
            self.config.n += 1
            self.config.by_name['a'][0] += 1
            self.hidden_net[0](x.flatten(1))
            torch.rand(1, generator=self.torch_rng), self.rng.random(), self.np_rng.random()
            self.old_np_rng.rand()
            self.itself[0] += 1
        return self.net(x) + random.random() + np.random.rand() + torch.rand(1, device=x.device)

class Centered(nn.Module):
    "A loss with a buffer of its own, as DINO's"
    def __init__(self):
        super().__init__()
        self.register_buffer('center', torch.zeros(10, device=default_device()))
    def forward(self, o, y):
        if self.training: self.center.lerp_(o.detach().mean(0), .1)
        return F.cross_entropy(o-self.center, y)

def plain(o):
    "All numbers in `o`"
    if isinstance(o, Tensor): return (tuple(o.shape), o.detach().cpu().resolve_conj().tolist())
    if isinstance(o, dict): return {str(k): plain(v) for k,v in o.items()}
    if isinstance(o, np.ndarray): return o.tolist()
    if isinstance(o, (list,tuple,deque)): return [plain(v) for v in o if v is not o]
    if isinstance(o, set): return sorted(o)
    if isinstance(o, nn.Module): return plain(dict(o.named_buffers()))
    if isinstance(o, Config): return plain(vars(o))
    if isinstance(o, np.random.Generator): return str(o.bit_generator.state)
    if isinstance(o, torch.Generator): return o.get_state().tolist()
    state = getattr(o, 'getstate', None) or getattr(o, 'get_state', None)
    return plain(state()) if state else o

def everything(learn):
    m = learn.model
    own = {k: plain(v) for k,v in vars(m).items() if k[0]!='_' and k!='training'}
    grads = [None if p.grad is None else p.grad.tolist() for p in m.parameters()]
    return dict(own=own, buffers=plain(dict(m.named_buffers())),
                loss=plain(dict(learn.loss_func.named_buffers())), grads=grads,
                random=[random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()])

@pytest.mark.parametrize('at', [0,1,3])
@pytest.mark.parametrize('window', [False,True])
def test_all_that_a_batch_changes_is_undone(at, window):
    class Undo(Callback):
        order,run_valid = -100,False
        def before_train(self): self.undo = BatchUndo(self.learn)
        def before_batch(self):
            self.undo.keep_all()
            self.before,self.loss = everything(self.learn),self.learn.loss.item()
        def before_step(self):
            if self.iter!=at:
                if window: raise CancelBatchException
                return
            changed = everything(self.learn)
            assert all(changed[k]!=self.before[k] for k in changed)
            self.undo.undo()
            after = everything(self.learn)
            none = not any(g is not None and np.any(g) for g in self.before['grads'])
            if none: after['grads'] = self.before['grads']     # zeros or none
            assert after==self.before and self.learn.loss.item()==self.loss and not self.undo.refused
            self.done = True
            raise CancelFitException
        def after_step(self): self.undo.window = False
    learn = digits_learner(undo := Undo(), n=200, bs=32, model=Everything(), loss_func=Centered())
    fit(learn)
    assert undo.done

def test_gradients_that_nobody_zeroes():
    "A parameter that the optimizer does not hold collects its gradients; what was bad is taken out again"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 10))
    class Bad(Callback):
        order,run_valid = -20,False
        def after_loss(self):
            if self.iter==2: self.learn.loss_grad,self.learn.loss = self.loss_grad*nan,self.loss*nan
    learn = digits_learner([SkipNonFinite(), Bad()], n=200, bs=32, model=model,
                           splitter=lambda m: [list(m[2].parameters())])
    fit(learn)
    assert all(p.grad.isfinite().all() for p in model[1].parameters()) and model[1].weight.grad.any()

def test_what_cannot_be_copied_is_listed():
    class Sealed(Tensor):
        @classmethod
        def __torch_function__(cls, f, types, args=(), kwargs=None):
            if f is Tensor.clone: raise TypeError('no copies')
            return super().__torch_function__(f, types, args, kwargs or {})
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.register_buffer('sealed', torch.zeros(2).as_subclass(Sealed))
    learn = digits_learner([SkipNonFinite(snapshot=None)], n=200, bs=32, model=model)
    fit(learn, 2)
    assert len(r := learn.skip_non_finite.records)==1 and 'sealed (TypeError: no copies)' in r[0].why

class Log:
    "Not plain values only"
    def __init__(self): self.log = self

@pytest.mark.parametrize('attrs,said', [
    (dict(long=[0]*20_000), 'long (20,000 items)'),
    (dict(count=iter([1])), 'count (an object of class list_iterator)'),
    (dict(many=[{} for _ in range(300)]), 'many (what is in its 300 items)'),
    (dict(rng=random.SystemRandom()), 'rng (NotImplementedError'),
    (dict(log=Log()), 'log (an object of class Log)')])
def test_what_nobody_can_undo_is_said(attrs, said):
    "In one line; of what is copied, or does not change, nothing is said"
    model = nn.Sequential(nn.Flatten(), Everything())
    for k,v in attrs.items(): setattr(model[1], k, v)
    learn = digits_learner([SkipNonFinite(snapshot=None)], n=200, bs=32, model=model)
    fit(learn, 2)
    assert len(r := learn.skip_non_finite.records)==1 and r[0].why.startswith(f'1.{said}'), r

def test_a_copy_that_cannot_be_put_back_ends_no_fit():
    "It is said before the next batch"
    class Locked(nn.Flatten):
        def __init__(self): super().__init__(); self.counts = np.zeros(2)
        def forward(self, x):
            self.counts.flags.writeable = False
            return super().forward(x)
    class Bad(Callback):
        order,run_valid = -20,False
        def after_loss(self):
            if self.iter==2: self.learn.loss_grad,self.learn.loss = self.loss_grad*nan,self.loss*nan
    model = nn.Sequential(Locked(), nn.Linear(64, 10))
    class Unlock(Callback):
        order,run_valid = -10**7,False
        def before_batch(self): model[0].counts.flags.writeable = True
    learn = fit(digits_learner([SkipNonFinite(), Bad(), Unlock()], n=200, bs=32, model=model))
    skipped,said = learn.skip_non_finite.records
    assert skipped.what=='skipped a batch' and said.why.startswith('0.counts (ValueError'), said

# Items
class NoteItems(Callback):
    "Compares the items that are named with those that are in the batch"
    run_valid = False
    def __init__(self): self.named,self.wrong = 0,0
    def before_fit(self): self.watch = None
    def before_train(self):
        self.watch = self.watch or ItemWatch(self.learn)
        self.watch.restart()
    order = -1000
    def before_batch(self): self.watch.note()
    def before_step(self):
        items = self.watch.items()
        self.named += bool(items)
        self.wrong += bool(items) and items!=[round(o) for o in self.x[:,0].tolist()]
    def after_fit(self): self.watch.close()

class Rows:
    "Items that are their index"
    def __init__(self, n, skip=None): self.n,self.skip = n,skip
    def __len__(self): return self.n
    def __getitem__(self, i):
        if self.skip and i%7==self.skip: raise SkipItemException()
        return torch.tensor([float(i)]),torch.tensor([0.])

class Wide(Rows):
    "Items of many numbers, of which some are NaN"
    def __getitem__(self, i):
        return torch.arange(5000.).add_(i).index_fill_(0, torch.tensor([i+7]), nan),torch.zeros(1)

class Square(Rows):
    "As many numbers as items in a batch"
    def __getitem__(self, i): return torch.arange(5.)+i,torch.zeros(1)

class Reversed(Callback):
    "Turns the batch around"
    run_valid = False
    def before_batch(self): self.learn.xb = (self.xb[0].flip(0),)

def collate(b): return tuple(torch.stack(o) for o in zip(*b[::-1]))
class Shuffled(DataLoader):
    "Draws what it likes"
    def get_idxs(self): return [i for i in range(self.n) for _ in range(2)][:self.n]
class Own(DataLoader):
    "Reads what it likes"
    def create_item(self, i): return self.dataset[(i+1)%self.n]

loaders = {'fastai': (lambda: DataLoader(Rows(50), 8, shuffle=True), True),
           'last dropped': (lambda: DataLoader(Rows(50), 8, shuffle=True, drop_last=True), True),
           'partial': (lambda: PartialDL(Rows(50), 8, partial_n=20, num_workers=0), True),
           'weighted': (lambda: WeightedDL(Rows(50), 8, shuffle=True, num_workers=0), True),
           'own order': (lambda: Shuffled(Rows(50), 8), True),
           'workers': (lambda: DataLoader(Rows(50), 8, shuffle=True, num_workers=2), True),
           'skips': (lambda: DataLoader(Rows(50, 3), 8), None),
           'skips in workers': (lambda: DataLoader(Rows(50, 3), 8, num_workers=2), None),
           'own items': (lambda: Own(Rows(50), 8), False),
           'own batches': (lambda: DataLoader(Rows(50), 8, create_batch=collate), False),
           'torch': (lambda: torch.utils.data.DataLoader(Rows(50), 8, shuffle=True), True),
           'no batches': (lambda: DataLoader(list(zip(torch.zeros(5,8,1), torch.zeros(5,8,1)))), False)}

@pytest.mark.parametrize('name', loaders)
def test_items_are_right_or_not_named(name):
    make,named = loaders[name]
    dl = make()
    learn = Learner(DataLoaders(dl, dl), nn.Linear(1, 1), loss_func=MSELossFlat(), lr=0.,
                    cbs=[note := NoteItems()])
    fit(learn, 2)
    assert not note.wrong and (named is None or (note.named>0)==named)
    assert 'do_item' not in vars(dl)

def test_a_batch_that_a_callback_has_changed():
    dl = DataLoader(Rows(50), 8, shuffle=True)
    for cb in (Reversed(), MixUp()):
        learn = Learner(DataLoaders(dl, dl), nn.Linear(1, 1), loss_func=MSELossFlat(), lr=0.,
                        cbs=[note := NoteItems(), cb])
        fit(learn)
        assert not note.named
    class Unseen(Callback):
        "Through `data`: the version of the tensor does not count it"
        run_valid = False
        def before_batch(self):
            for o in (*self.xb, *self.yb): o.data.copy_(o.flip(0))
    class Turned(Callback):
        "Other rows, of the same shape and at the same place"
        run_valid = False
        def before_batch(self): self.learn.xb = (self.xb[0].transpose(0, 1),)
    for cb,make,bs in ((Unseen(), Rows, 8), (Unseen(), Wide, 8), (Turned(), Square, 5)):
        dl = DataLoader(make(50), bs, shuffle=True)
        for cbs,named in (([], True), ([cb], False)):
            learn = Learner(DataLoaders(dl, dl), nn.LazyLinear(1), loss_func=lambda o,y: o.mean(), lr=0.,
                            cbs=[note := NoteItems(), *cbs])
            learn.model(dl.one_batch()[0].flatten(1)[:,:1] if make is Rows else dl.one_batch()[0])
            fit(learn)
            assert bool(note.named)==named, (cb, make)
    note = NoteItems()
    fit(text_learner([ModelResetter(), RNNCallback(), note], n=1000))
    assert not note.named
