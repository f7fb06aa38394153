"`MicroBatch`: a batch in pieces is the batch; one that failed leaves nothing"
import random
from functools import partial

import numpy as np
import pytest, torch, torch.nn.functional as F
from fastai.basics import Callback, DataLoaders, Learner, L, set_seed
from fastai.callback import mixup
from fastai.callback.core import CancelBackwardException, CancelBatchException
from fastai.losses import BaseLoss, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper
from torch import nn
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.core import ExtCallback
from fastai_callbacks_ext.memory import MicroBatch
from fastai_callbacks_ext.test_utils import digits_learner, digits_model, text_learner
from cases import some
from common import EXACT, NEEDS, fit, learner, make, public_callbacks, quiet, suit, traces
from ranks import launch
from test_safety import AnyMixedPrecision

OPTS = {'fastai': Adam, 'wrapper': partial(OptimWrapper, opt=torch.optim.AdamW)}
MESSAGE = 'CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB'

class Room(nn.Module):
    "Has room for `k` items. The list `fails` is out of reach, since attributes are put back"
    def __init__(self, k, where, fails, error=torch.OutOfMemoryError):
        super().__init__()
        self.k,self.where,self.fail,self.error = k,where,fails.append,error
    def forward(self, x):
        if self.where=='backward' and x.requires_grad: x.register_hook(self.check)
        if self.where!='backward': self.check(x)
        return x
    def check(self, x):
        if len(x)<=self.k or not self.training and self.where!='both': return
        self.fail(len(x))
        raise self.error(MESSAGE)

class Drawing(nn.Module):
    "Dropout of NumPy's and Python's random numbers, and what a module keeps in attributes"
    def __init__(self): super().__init__(); self.n,self.seen,self.total = 0,[],torch.zeros(())
    def forward(self, x):
        if not self.training: return x
        self.n += 1
        self.seen.append(len(x))
        self.total = self.total+x.detach().sum()
        return x*float(np.random.rand()+random.random())

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

def roomy(*cbs, k=10**6, where='forward', bs=32, n=160, model=None, error=torch.OutOfMemoryError, **kwargs):
    "A learner whose model has room for `k` items, before its last layer"
    set_seed(3)
    random.seed(3)
    layers = model() if model else [*digits_model()[:-1], Drawing(), nn.Linear(128, 10)]
    net = nn.Sequential(*layers[:-1], Room(k, where, fails := [], error), layers[-1])
    learn = digits_learner([*cbs], n=n, bs=bs, model=net, **kwargs)
    learn.fails = fails
    return learn

def bits(learn):
    "Weights, statistics, attributes, random states, losses"
    drawing = [m for m in learn.model.modules() if isinstance(m, Drawing)]
    return [*learn.model.state_dict().values(), torch.get_rng_state(), torch.stack([*learn.recorder.losses]),
            torch.tensor(np.random.get_state()[1].tolist()), torch.tensor(random.getstate()[1]),
            *(t for m in drawing for t in (torch.tensor(m.seen), m.total)),
            *(p.grad for p in learn.model.parameters() if p.grad is not None),
            torch.tensor([v for row in learn.recorder.values for v in row])]

def same(a, b):
    "To the last bit; on a GPU, the same fit rounds in other ways each time"
    a,b = bits(a),bits(b)
    return len(a)==len(b) and all(map(equal, a, b))

def equal(a, b):
    if not (torch.cuda.is_available() and a.is_floating_point()): return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)

def close(a, b, tol=1e-5):
    a,b = (torch.cat([p.detach().flatten() for p in o.model.parameters()]) for o in (a, b))
    assert (a-b).norm()<=tol*b.norm(), ((a-b).norm()/b.norm()).item()

BESIDE = dict(alone=list, fast=lambda: [FastLoop()], window=lambda: [GradientAccumulation(64)],
              clip=lambda: [GradientClip(.1), FastLoop()], guard=lambda: [SkipNonFinite()],
              ema=lambda: [EMA()],
              scaler=lambda: [AnyMixedPrecision(torch.float32, 2.**10)], half=lambda: [AnyMixedPrecision()],
              fastais_mixup=lambda: [mixup.MixUp()], seen=lambda: [Throughput(), ItemStats()])

# --- a batch that failed leaves nothing ---------------------------------------------------------
@pytest.mark.parametrize('where', ['forward','backward'])
@pytest.mark.parametrize('beside', BESIDE)
def test_failed_then_split_is_split_at_once(beside, where):
    "Bit for bit: weights, batch norm, random states, gradients that are left, losses, metrics"
    failed = fit(roomy(cb := MicroBatch(), *BESIDE[beside](), k=8, where=where, n=120), 2, 'fit_one_cycle')
    at_once = fit(roomy(MicroBatch(8), *BESIDE[beside](), n=120), 2, 'fit_one_cycle')
    assert failed.fails==[32,16] and cb.found['train']==8
    assert same(failed, at_once)

def test_autocast_is_on_again():
    "`MixedPrecision` has left it before the backward pass that fails"
    failed = fit(roomy(MicroBatch(), AnyMixedPrecision(), k=8, where='backward', n=80))
    assert failed.fails==[32,16] and same(failed, fit(roomy(MicroBatch(8), AnyMixedPrecision(), n=80)))

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('method', ['fit','fine_tune'])
def test_also_with_other_optimizers_and_fits(opt, method):
    how = dict(opt_func=OPTS[opt], splitter=lambda m: [list(m[:4].parameters()), list(m[4:].parameters())])
    failed = fit(roomy(MicroBatch(), k=9, **how), 2, method)
    at_once = fit(roomy(MicroBatch(8), **how), 2, method)
    assert failed.fails==[32,16] and same(failed, at_once)

def test_validation_fails_and_is_split():
    failed = fit(roomy(cb := MicroBatch(), k=8, where='both'), 2)
    at_once = fit(roomy(MicroBatch(8)), 2)
    assert failed.fails==[32,16]*2 and cb.found==dict(train=8, valid=8)
    assert [r.what for r in cb.records]==['batch norm uses the mean and variance of each piece',
        'does batches in pieces of 16 items', 'does batches in pieces of 8 items',
        'does validation batches in pieces of 16 items', 'does validation batches in pieces of 8 items']
    assert same(failed, at_once)

def test_a_later_batch_fails():
    "What was trained before stays; only the batch that failed is done again"
    class Shrink(Callback):
        def before_batch(self):
            if self.training and self.train_iter==3: self.model[-2].k = 10
    learn,want = fit(roomy(cb := MicroBatch(), Shrink()), 2),roomy(cb2 := MicroBatch())
    class Split(Callback):
        def before_batch(self):
            if self.training and self.train_iter==3: cb2.found['train'] = 8
    fit(want.add_cb(Split()), 2)
    assert learn.fails==[32,16] and cb.records[-1].batch==3 and same(learn, want)

@pytest.mark.parametrize('error', [MemoryError, RuntimeError])
def test_other_errors_of_memory(error):
    assert fit(roomy(MicroBatch(), k=16, error=error)).fails==[32]

def test_memory_of_the_failed_batch_is_free():
    "When it is tried again, nothing of the failed pass is alive"
    import weakref
    alive = []
    class Watch(nn.Module):
        def __init__(self): super().__init__(); self.refs = []
        def forward(self, x):
            alive.append(sum(r() is not None for r in refs))
            y = x*2
            refs.append(weakref.ref(y))
            if len(x)<=16: return y
            errors.append(torch.OutOfMemoryError(MESSAGE))      # somebody may keep the error
            raise errors[0]
    refs,errors = [],[]
    fit(roomy(MicroBatch(), model=lambda: [nn.Flatten(), nn.Linear(64, 128), Watch(), nn.Linear(128, 10)]))
    assert alive[1]==0

# --- a batch in pieces is the batch -------------------------------------------------------------
PLAIN = lambda: [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
_weights = torch.linspace(.1, 2, 10)
LOSSES = dict(flat=(CrossEntropyLossFlat(), None), weighted=(CrossEntropyLossFlat(weight=_weights), None),
              function=(F.cross_entropy, None), sum=(nn.CrossEntropyLoss(reduction='sum'), None),
              smooth=(LabelSmoothingCrossEntropyFlat(), None),
              own=(lambda p,y: F.cross_entropy(p, y), 'items'),
              targets=(lambda p,y: F.cross_entropy(p, y), 'targets'),
              own_sum=(lambda p,y: F.cross_entropy(p, y, reduction='sum'), 'sum'),
              counted=(lambda p,y: F.cross_entropy(p, y), lambda learn: (learn.yb[0]!=-100).sum()))

class Ignore(Callback):
    "Some targets are ignored, more in the front"
    order = -5
    def before_batch(self):
        first = torch.arange(len(self.y), device=self.y.device)<9
        if self.training: self.learn.yb = (torch.where(first, -100, self.y),)

@pytest.mark.parametrize('size', [1,7,16,31])
@pytest.mark.parametrize('loss', LOSSES)
def test_the_gradient_is_that_of_the_whole_batch(loss, size):
    f,weight = LOSSES[loss]
    cbs = [Ignore()]*(loss in ('flat','weighted','function','sum','counted'))
    whole,pieces = (fit(roomy(*cbs, *more, loss_func=f, model=PLAIN), 1, lr=1e-3)
                    for more in ([], [MicroBatch(size, weight=weight)]))
    pieces_losses,losses = (torch.stack([*o.recorder.losses]) for o in (pieces, whole))
    assert torch.allclose(pieces_losses, losses, rtol=1e-4)
    assert np.allclose(pieces.recorder.values[0], whole.recorder.values[0], rtol=1e-3)

class Gradients(Callback):
    order,run_valid = 49,False
    def before_fit(self): self.grads = []
    def before_step(self):
        self.grads.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))

def gradients(*cbs, mb=(), **kwargs):
    learn = fit(roomy(*cbs, *mb, g := Gradients(), **(dict(model=PLAIN) | kwargs)), 1, lr=0.)
    return torch.stack(g.grads),learn

@pytest.mark.parametrize('beside', ['alone','window','scaler','fastais_mixup','clip'])
def test_gradients(beside):
    cbs = BESIDE[beside]
    whole,_ = gradients(*cbs())
    for size in (5, 16):
        got,_ = gradients(*cbs(), mb=[MicroBatch(size)])
        assert got.shape==whole.shape and ((got-whole).norm(dim=1)<=1e-5*whole.norm(dim=1)).all()

# a callback that changes the loss, beside losses in which targets are ignored or count more
CHANGE_LOSS = {f'{cls.__name__} {by}': partial(cls, by=by) for cls in (MixUp, CutMix, CutMixUp)
               for by in ('item','batch')}
CHANGE_LOSS |= dict(distill=lambda: Distill(nn.Sequential(*PLAIN())), rdrop=RDrop,
                    both=lambda: [Distill(nn.Sequential(*PLAIN())), MixUp()])
UNEVEN = dict(flat=(LOSSES['flat'], 9), weighted=(LOSSES['weighted'], 9), sum=(LOSSES['sum'], 0),
              own=(LOSSES['own'], 0), multi=((nn.BCEWithLogitsLoss(), None), 0))

class IgnoreFirst(Callback):
    "Before they are mixed"
    order = -5
    def __init__(self, n): self.n = n
    def before_batch(self):
        first = torch.arange(len(self.y), device=self.y.device)<self.n
        if self.training: self.learn.yb = (torch.where(first, -100, self.y),)

class OneHot(Callback):
    order = -5
    def before_batch(self): self.learn.yb = (F.one_hot(self.y, 10).float(),)

@pytest.mark.parametrize('loss', UNEVEN)
@pytest.mark.parametrize('name', CHANGE_LOSS)
def test_what_changes_the_loss_sees_pieces(name, loss):
    "Loss and gradient are those of the whole batch, also where a piece has no target that counts"
    ((f,weight),ignored),of = UNEVEN[loss],'loss' if loss=='own' else None
    if loss=='sum' and not name.startswith(('Mix','Cut')): return      # it is refused
    def run(*mb):
        set_seed(5)
        cbs = L(CHANGE_LOSS[name]())
        for cb in cbs:
            if hasattr(cb, 'outputs'): cb.outputs = cb.outputs or of
        cbs += [OneHot()] if loss=='multi' else [IgnoreFirst(ignored)] if ignored else []
        g,learn = gradients(*cbs, mb=mb, loss_func=f, metrics=[])
        return g,torch.stack([*learn.recorder.losses])
    whole,losses = run()
    assert whole.norm()>0
    for size in (5, 16):
        got,ls = run(MicroBatch(size, weight=weight))
        assert ((got-whole).norm(dim=1)<=2e-5*whole.norm(dim=1)).all(), size
        assert torch.allclose(ls, losses, rtol=1e-4), size

OWN_PASS = ['AWP','FGM','SAM']      # they are refused beside it
OTHERS = [cls for cls in public_callbacks() if cls not in NEEDS and cls not in (MicroBatch, Freeze)
          and cls.__name__ not in OWN_PASS]

@pytest.mark.parametrize('cls', some(OTHERS, 6))
def test_beside_any_callback(cls):
    def run(*mb):
        learn = suit(roomy(make(cls), *mb, g := Gradients(), model=PLAIN, metrics=[]))
        fit(learn, lr=0.)
        return torch.stack(g.grads),torch.stack([*learn.recorder.losses])
    (whole,losses),(got,ls) = run(),run(MicroBatch(5))
    assert ((got-whole).norm(dim=1)<=1e-5*whole.norm(dim=1)).all() and torch.allclose(ls, losses, rtol=1e-5)

def test_it_is_accumulation_of_batches():
    "Of 32 items in 8s: the bits of four batches that are added up"
    want,_ = gradients(GradientAccumulation(32), bs=8)
    got,_ = gradients(mb=[MicroBatch(8)])
    assert got.shape==want.shape and torch.allclose(got, want, rtol=1e-5, atol=1e-7)

def test_a_cancelled_backward_pass_in_an_open_window():
    "The step is taken with what was there before"
    class Cancel(Callback):
        order = 70
        def before_backward(self):
            if self.training and self.train_iter==1: raise CancelBackwardException
    class NoZero(Callback):
        "A window of two batches, by hand"
        order,run_valid = 80,False
        def before_step(self):
            if self.train_iter%2==0: raise CancelBatchException
    want,_ = gradients(NoZero(), Cancel())
    for size in ('auto', 8):
        got,_ = gradients(NoZero(), Cancel(), mb=[MicroBatch(size)])
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-7)

@pytest.mark.parametrize('cbs', [BESIDE[o] for o in ('alone','fast','scaler')])
@pytest.mark.parametrize('size', ['auto',32])
def test_what_fits_is_left_alone(cbs, size):
    assert same(fit(roomy(MicroBatch(size), *cbs()), 2), fit(roomy(*cbs()), 2))

def test_a_penalty_on_the_weights_is_part_of_the_step():
    class Penalty(Callback):
        run_valid = False
        def after_loss(self):
            self.learn.loss_grad = self.loss_grad+sum(p.square().sum() for p in self.model.parameters())
    want,_ = gradients(Penalty())
    got,_ = gradients(Penalty(), mb=[MicroBatch(8)])
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)

def test_who_needs_the_predictions_must_see_pieces():
    class Entropy(Callback):
        run_valid = False
        def after_loss(self):
            self.learn.loss_grad = self.loss_grad-self.pred.softmax(1).square().sum(1).mean()
    class EntropyInPieces(Entropy): in_pieces = True
    with pytest.raises(ValueError, match='Entropy.after_loss adds to the loss of the whole batch'):
        gradients(Entropy(), mb=[MicroBatch(8)])
    want,got = gradients(Entropy())[0],gradients(EntropyInPieces(), mb=[MicroBatch(8)])[0]
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)

def test_others_see_one_batch():
    class Sees(Callback):
        order = 200
        events = ('before_batch','after_pred','after_loss','before_backward','after_backward','after_step',
                  'after_batch')
        def __call__(self, name):
            if name=='before_fit': self.seen = []
            if name in self.events:
                pred = None if name=='before_batch' else tuple(self.pred.shape)
                self.seen.append((name, self.training, len(self.x), len(self.y), pred))
    def seen(*cbs):
        fit(roomy(*cbs, o := Sees()))
        return o.seen
    assert seen(MicroBatch(5))==seen()
    assert seen(MicroBatch(5), FastLoop())==seen()

def test_what_others_find_out_is_the_same():
    def stats(*cbs):
        fit(roomy(o := ItemStats(), *cbs, model=PLAIN), 2, lr=0.)
        return o
    a,b = stats(),stats(MicroBatch(5))
    a,b = ([v for v in vars(o).values() if isinstance(v, (torch.Tensor, np.ndarray))] for o in (a, b))
    assert len(a)==len(b)>0
    for pair in zip(a, b):
        x,y = (torch.as_tensor(o).cpu() for o in pair)
        assert np.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)

# --- what a batch may be ------------------------------------------------------------------------
class Odd(nn.Module):
    "Takes a dict, gives a dict"
    def __init__(self): super().__init__(); self.net = nn.Linear(6, 3)
    def forward(self, d, names): return dict(logits=self.net(d['x']), names=None)

def odd_loss(pred, y, boxes):
    x = pred['logits']
    return F.cross_entropy(x, y)+(x.mean(1)-boxes[0]).square().mean()

def odd_learner(*cbs, graph=None, n=22):
    set_seed(1)
    items = [(torch.randn(6), torch.randn(1)[0], i%3) for i in range(n)]
    def collate(os):
        x,box,y = (torch.stack([torch.as_tensor(o) for o in v]) for v in zip(*os))
        res = (dict(x=x, on=True), [f'item {i}' for i in range(len(x))], y, (box,))
        return res if graph is None else (res[0], graph, *res[2:])
    loader = partial(torch.utils.data.DataLoader, items, batch_size=8, collate_fn=collate)
    dls = DataLoaders(loader(), loader())
    dls.n_inp = 2
    return Learner(dls, Odd(), loss_func=odd_loss, cbs=[*cbs], lr=1e-2)

def test_dicts_lists_and_plain_loaders():
    whole,pieces = (fit(odd_learner(*cbs), 2) for cbs in ([], [MicroBatch(3, weight='items')]))
    close(pieces, whole)
    assert np.allclose(pieces.recorder.values, whole.recorder.values, rtol=1e-4)

def test_what_cannot_be_split_is_refused():
    class Graph: pass
    with pytest.raises(ValueError, match=r'learn.xb\[1\] is of class Graph'):
        fit(odd_learner(MicroBatch(3, weight='items'), graph=Graph()))

def test_batches_of_one_item():
    a,b = (fit(odd_learner(*cbs, n=17), 2) for cbs in ([], [MicroBatch(1, weight='items')]))
    close(a, b)

# --- its end ------------------------------------------------------------------------------------
@pytest.mark.parametrize('min_size,tried', [(1,[32,16,8,4,2,1]), (8,[32,16,8]), (5,[32,16,8,5]), (32,[32])])
def test_not_even_the_smallest_piece_fits(min_size, tried):
    learn = roomy(MicroBatch(min_size=min_size), k=0, model=PLAIN)
    before = traces(learn)
    said = f'{tried[-1]} items? of a training batch of 32 do not fit.*min_size={min_size}'
    with pytest.raises(RuntimeError, match=said): fit(learn)
    assert learn.fails==tried and traces(learn)['replaced']==before['replaced'] and type(learn) is Learner

@pytest.mark.parametrize('size', ['auto',8])
def test_an_error_of_the_step_passes_on(size):
    "Weights may be half changed"
    class Full(Callback):
        order = 70
        def before_step(self): raise torch.OutOfMemoryError(MESSAGE)
    cb = MicroBatch(size)
    with pytest.raises(torch.OutOfMemoryError): fit(roomy(cb, Full()))
    assert cb.found['train'] is None

def test_other_errors_pass_on():
    learn = roomy(MicroBatch(), k=8, error=lambda m: RuntimeError('shapes'))
    with pytest.raises(RuntimeError, match='shapes'): fit(learn)
    assert learn.fails==[32]

@pytest.mark.parametrize('event', 'after_pred after_loss before_backward after_backward after_batch'.split())
@pytest.mark.parametrize('cbs', [list, lambda: [FastLoop()], lambda: [GradientAccumulation(64)]])
def test_an_interrupt_leaves_nothing(event, cbs):
    class Stop(Callback):
        order = 70
        def __call__(self, name):
            if name==event and self.training and self.train_iter>=2: raise KeyboardInterrupt
    cb,learn = MicroBatch(),roomy(Stop(), *cbs(), k=8)
    before = traces(learn)
    with pytest.raises(KeyboardInterrupt): fit(learn, cbs=cb)
    assert type(learn) is Learner and cb._now is None and cb._undo is None
    assert traces(learn)['replaced']==before['replaced']

def test_a_cancelled_batch_in_an_open_window():
    "What was set aside is put back"
    class Cancel(Callback):
        order = -1
        def after_loss(self):
            if self.training and self.train_iter==1: raise CancelBatchException
    whole,_ = gradients(Cancel(), GradientAccumulation(64))
    got,_ = gradients(Cancel(), GradientAccumulation(64), mb=[MicroBatch(8)])
    assert torch.allclose(got, whole, rtol=1e-4, atol=1e-7)

@pytest.mark.parametrize('method', ['fit','fit_one_cycle'])
def test_a_resumed_run_goes_on_with_its_size(tmp_path, method):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.epoch==1 and self.iter==1: raise KeyboardInterrupt
    def run(*cbs): return fit(roomy(MicroBatch(), *cbs, k=8, where='both'), 3, method)
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Stop(), Checkpoint(tmp_path, steps=1))
    resumed = run(Checkpoint(tmp_path, steps=1))
    assert resumed.micro_batch.found==dict(train=8, valid=8)
    assert resumed.micro_batch.records==whole.micro_batch.records      # it did not have to find it again
    assert all(map(torch.equal, resumed.model.state_dict().values(), whole.model.state_dict().values()))

def test_a_second_fit_keeps_what_was_found():
    learn = fit(roomy(MicroBatch(), k=8))
    fit(learn)
    assert learn.fails==[32,16]

def test_lr_find_and_validate_are_done_in_pieces():
    learn = roomy(cb := MicroBatch(), k=8, where='both')
    with quiet(learn): learn.lr_find(show_plot=False, num_it=4, suggest_funcs=None)
    with quiet(learn): values = learn.validate()
    assert learn.fails==[32,16]*2
    learn.model[-2].k = 100
    learn.remove_cb(cb)
    with quiet(learn): assert np.allclose(values, learn.validate())

def test_processes_split_together(tmp_path):
    "Memory runs out in the second one only: both have the steps of plain `DistributedDataParallel`"
    first,second = launch(2, tmp_path, 200, memory=None)['memory']
    for name,a in first.items():
        b = second[name]
        for how in a:
            assert a[how]==b[how], (name, how)
            assert np.allclose(a[how]['weights'], a['plain']['weights'], rtol=1e-4, atol=1e-6), (name, how)
        assert a['forward']['weights']==a['backward']['weights']==a['at_once']['weights'], name
        assert a['forward']['found']==2

# --- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize('kwargs,message', [
    (dict(size=0), 'size=0'), (dict(size='half'), "size='half'"), (dict(min_size=0), 'min_size=0'),
    (dict(weight='words'), "weight='words': expected 'items', 'targets' (words, pixels), 'sum' or")])
def test_refused(kwargs, message):
    with pytest.raises((ValueError,TypeError)) as e: MicroBatch(**kwargs)
    assert message in str(e.value)

@pytest.mark.parametrize('size', ['auto',8])
def test_an_unknown_loss_is_refused_before_the_first_batch(size):
    learn = roomy(MicroBatch(size), loss_func=lambda p,y: F.cross_entropy(p, y))
    with pytest.raises(ValueError, match="what <lambda> is a mean over; expected weight='items'"): fit(learn)
    assert len(learn.model[-3].seen)==0

def test_models_that_keep_a_state_are_not_split():
    learn = fit(text_learner([*rnn_cbs(), cb := MicroBatch()], n=1000))
    assert 'keeps a state for each item' in cb.records[0].why
    with pytest.raises(ValueError, match='keeps a state for each item'):
        fit(text_learner([*rnn_cbs(), MicroBatch(4)], n=1000))

def test_sam_is_not_split():
    fit(roomy(SAM(), cb := MicroBatch()))
    assert 'pass of its own' in cb.records[0].why
    with pytest.raises(ValueError, match='pass of its own'): fit(roomy(SAM(), MicroBatch(4)))
