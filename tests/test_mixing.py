"`MixUp`, `CutMix`, `CutMixUp`: what is mixed, with what loss, and that all else is as without them"
import pickle
from copy import copy
from functools import partial

import numpy as np
import pytest, torch, torch.nn.functional as F
from fastai import losses
from fastai.callback import mixup as fastais
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import TensorImage, TensorMask, default_device, set_seed
from fastai.vision.core import TensorBBox, TensorPoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.mixing import CutMix, CutMixUp, MixUp, _counts, _parts
from fastai_callbacks_ext.test_utils import digits_learner
from common import EXACT, fit, learner, quiet, traces
from test_layers import scaler

ALL = [MixUp, CutMix, CutMixUp]
each = pytest.mark.parametrize('cls', ALL)
both = pytest.mark.parametrize('by', ['item','batch'])
OPTS = {'fastai': Adam, 'wrapper': partial(OptimWrapper, opt=torch.optim.AdamW)}

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
def mix_of(learn): return next(cb for cb in learn.cbs if isinstance(cb, tuple(ALL)))._mix

class Seen(Callback):
    "Inputs, targets and losses of each batch"
    order,run_valid = 20,False
    def before_fit(self): self.batches,self.losses = [],[]
    def before_batch(self): self.batches.append(tuple(o.clone() for o in (*self.xb, *self.yb)))
    def before_backward(self): self.losses.append((self.loss_grad.item(), self.loss.item()))

class Raw(Seen): order = -50        # before they are mixed

def small(*cbs, loss_func=None, xs=None, ys=None, n=32, bs=8, model=None, valid=True, **kwargs):
    "A learner with PyTorch's loaders, in which `xs` and `ys` are tensors"
    set_seed(0)
    g = torch.Generator().manual_seed(1)
    xs = xs or [torch.randn(n, 1, 6, 6, generator=g)]
    ys = ys or [torch.randint(0, 4, (n,), generator=g)]
    data = TensorDataset(*xs, *ys)
    dls = DataLoaders(DataLoader(data, bs, shuffle=True), DataLoader(data, bs))
    dls.n_inp = len(xs)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(xs[0][0].numel(), 4))
    learn = Learner(dls, model, loss_func=loss_func or nn.CrossEntropyLoss(), cbs=[*cbs], lr=1e-2, **kwargs)
    learn.model.to(next(iter(dls.train))[0].device)
    return learn

# --- without mixing: nothing changes ------------------------------------------------------------
OFF = [partial(MixUp, 0), partial(CutMix, 0), partial(CutMixUp, 0, 0), partial(CutMixUp, 0, cut=0),
       *(partial(cls, **kw) for cls in ALL for kw in (dict(p=0), dict(until=0)))]

@pytest.mark.parametrize('method', ['fit','fit_one_cycle','fine_tune'])
@pytest.mark.parametrize('off', [partial(MixUp, 0), partial(CutMix, p=0), partial(CutMixUp, until=0)])
def test_off_is_bit_identical(method, off):
    a,b = (fit(learner(cbs=cbs), 2, method) for cbs in ([], [off()]))
    assert torch.equal(weights(a), weights(b)) and a.recorder.losses==b.recorder.losses
    assert torch.equal(torch.get_rng_state(), _state_after(method))

def _state_after(method):
    fit(learner(cbs=[]), 2, method)
    return torch.get_rng_state()

@pytest.mark.parametrize('off', OFF)
def test_all_ways_to_switch_it_off(off, capsys):
    a,b = (fit(small(*cbs), 1) for cbs in ([], [off()]))
    assert torch.equal(weights(a), weights(b)) and capsys.readouterr().out==''

@each
@both
def test_the_same_items_and_random_numbers_come_with_and_without(cls, by):
    "Order of the data, and all that others draw"
    class Draws(Callback):
        order = 30
        def before_fit(self): self.drawn = []
        def before_batch(self): self.drawn.append((torch.rand(1).item(), np.random.rand()))
    a,b = (fit(small(*cbs, raw := Raw(), Draws()), 2) for cbs in ([], [cls(by=by)]))
    for x,y in zip(a.raw.batches, b.raw.batches): assert all(map(torch.equal, x, y))
    assert a.draws.drawn==b.draws.drawn and not torch.equal(weights(a), weights(b))

@each
def test_the_batch_of_the_loader_is_not_edited(cls):
    class Kept(Callback):
        order,run_valid = -50,False
        def before_batch(self): self.was = [(o, o.clone()) for o in (*self.xb, *self.yb)]
        def after_batch(self): assert all(torch.equal(*o) for o in self.was)
    fit(small(cls(), Kept()), 2)

@each
def test_metrics_and_validation_are_not_mixed(cls):
    learn = small(cls(), seen := Seen(), raw := Raw())
    seen.run_valid = raw.run_valid = True
    with quiet(learn):
        learn.validate()
        for a,b in zip(seen.batches, raw.batches): assert all(map(torch.equal, a, b))
        learn.fit(1)
    for (x,y),(x0,y0) in zip(seen.batches, raw.batches): assert torch.equal(y, y0)
    mixed = [not torch.equal(a[0], b[0]) for a,b in zip(seen.batches, raw.batches)]
    assert any(mixed[:4]) and not any(mixed[4:])

# --- what is mixed ------------------------------------------------------------------------------
class Check(Callback):
    "The input is that of two items by their shares"
    order,run_valid = 20,False
    def before_fit(self): self.n,self.kinds = 0,set()
    def before_batch(self):
        if (mix := mix_of(self)) is None: return
        x0,x = self.raw.batches[-1][0],self.x
        other,lam = x0[mix.order.cpu()],torch.as_tensor(mix.shares)
        lam = lam.expand(len(x0)) if mix.one else lam
        cut = torch.full((len(x0),), bool(mix.any_cut)) if mix.one else mix.cut
        for i in range(len(x)):
            if cut[i]:      # each pixel is of one of the two, and the other's are a rectangle
                ours,theirs = x[i]==x0[i],x[i]==other[i]
                assert (ours | theirs).all()
                if torch.equal(x0[i], other[i]): continue
                assert (~ours[0]).sum()==round(float(1-lam[i])*ours[0].numel())
                rows,cols = (~ours[0]).any(1),(~ours[0]).any(0)
                assert rows.sum()*cols.sum()==(~ours[0]).sum()
            else:
                assert lam[i]>=.5
                torch.testing.assert_close(x[i], lam[i]*x0[i]+(1-lam[i])*other[i], check_dtype=False)
            self.n += 1
        self.kinds |= {*cut.tolist()}

@each
@both
def test_inputs(cls, by):
    fit(small(cls(by=by), Raw(), check := Check()), 6)
    assert check.n>50 and check.kinds=={MixUp: {False}, CutMix: {True}, CutMixUp: {False,True}}[cls]

@both
def test_shares_follow_alpha(by):
    "The variance of a Beta distribution with alpha twice is 1/(8 alpha+4); the larger of both shares counts"
    cb,rng = MixUp(3., by=by),np.random.default_rng(0)
    x,times = torch.zeros(500, 1),range(1 if by=='item' else 500)
    lam = [cb._draw(rng, (x,), (), by=='item').shares for _ in times]
    lam = np.concatenate(lam)
    assert abs(((lam-.5)**2).mean()-1/28)<.005 and lam.min()>=.5
    x = torch.zeros(500, 1, 64, 64)
    areas = [CutMix(1., by=by)._draw(rng, (x,), (), by=='item') for _ in range(1 if by=='item' else 300)]
    areas = np.concatenate([o.shares for o in areas if o])
    assert .6<areas.mean()<.75 and areas.min()<.3     # a rectangle over the edge is smaller

def test_share_of_batches():
    class Count(Callback):
        run_valid = False
        def before_fit(self): self.n = 0
        def after_loss(self): self.n += mix_of(self) is not None
    fit(small(MixUp(p=.5), count := Count(), n=400, bs=4), 1)
    assert 30<count.n<70

@pytest.mark.parametrize('until,n', [(.5, 8), (.75, 12), (1., 16), (.3, 5)])
def test_until(until, n, capsys):
    class Count(Callback):
        run_valid = False
        def before_fit(self): self.at = []
        def after_loss(self):
            if mix_of(self) is not None: self.at.append(self.train_iter)
    learn = small(MixUp(until=until), count := Count())
    for _ in range(2):
        fit(learn, 4)
        assert count.at==list(range(n))
    assert capsys.readouterr().out.count('mixes no more')==2*(until<1)

def test_each_batch_and_each_fit_is_mixed_another_way():
    class Orders(Callback):
        run_valid = False
        def before_fit(self): self.all = vars(self).get('all', [])
        def before_batch(self): self.all.append((*mix_of(self).partners, *mix_of(self).shares))
    learn = small(MixUp(), orders := Orders(), bs=16, n=64)
    fit(learn, 2), fit(learn, 2)
    assert len({*orders.all})==16
    again = small(MixUp(), orders2 := Orders(), bs=16, n=64)
    fit(again, 2), fit(again, 2)
    assert orders.all==orders2.all

@each
def test_ranks_draw_their_own(cls, monkeypatch):
    xb,got = (torch.randn(16, 1, 8, 8),),[]
    for rank in (0, 1):
        monkeypatch.setattr('fastai_callbacks_ext.mixing.rank_distrib', lambda: rank)
        fit(small(cb := cls(p=1.), seen := Seen()), 1)
        got.append(seen.batches)
    assert not all(torch.equal(a[0], b[0]) for a,b in zip(*got))

# --- the loss -----------------------------------------------------------------------------------
class Expect(Callback):
    "The loss by its definition: item by item, two targets"
    order,run_valid = 20,False
    def __init__(self, per_item): self.per_item,self.n,self.worst = per_item,0,0.
    def before_backward(self):
        if (mix := mix_of(self)) is None or mix.second is None: return
        f = self.learn.loss_func
        lam = torch.as_tensor(mix.shares, dtype=torch.float64, device=self.pred.device)
        if mix.one: want = lam*f(self.pred, *self.yb).double()+(1-lam)*f(self.pred, *mix.second).double()
        else:
            want = sum((lam if k==0 else 1-lam)@self.per_item(self.pred, *ys).double()
                       for k,ys in enumerate((self.yb, mix.second)))
        off = (self.loss.double()-want).abs().max()/(want.abs().max()+1e-9)
        self.worst = max(self.worst, off.item())
        assert torch.equal(self.loss, self.loss_grad)
        self.n += 1

torch.manual_seed(3)
w4 = torch.tensor([.1,1.,2.,5.], device=default_device())
def by_mean(each): return lambda p,y: each(p, y)/len(y)
def ce_of(**kw):
    "Cross-entropy of each item, as its share in PyTorch's mean"
    def f(p, y):
        y = y.long()
        l = F.cross_entropy(p, y, reduction='none', **kw)
        counted = (y!=kw.get('ignore_index', -100)).float()
        weight = counted if 'weight' not in kw else counted*kw['weight'][y]
        return l/weight.sum()
    return f
mse = lambda p,y: ((p-y)**2).mean(1)/len(y)
bce = lambda p,y: F.binary_cross_entropy_with_logits(p, y, reduction='none').mean(1)/len(y)
labels = torch.randint(0, 4, (32,))
soft,real,many = torch.rand(32, 4).softmax(1),torch.randn(32, 4),(torch.rand(32, 4)>.5).float()
smooth = lambda p,y: F.cross_entropy(p, y, label_smoothing=.1, reduction='none')/len(y)
def total(f): return lambda p,y: f(p, y)*len(y)

def own_function(pred, y, reduction='mean'):
    l = (pred-y).abs().pow(1.5).sum(1)
    return l if reduction=='none' else l.mean()
class OwnModule(nn.Module):
    def __init__(self): super().__init__(); self.reduction = 'mean'
    def forward(self, pred, y): return own_function(pred, y, self.reduction)

LOSSES = dict(
    module=(nn.CrossEntropyLoss, labels, ce_of()), function=(lambda: F.cross_entropy, labels, ce_of()),
    fastais=(CrossEntropyLossFlat, labels, ce_of()),
    weighted=(lambda: nn.CrossEntropyLoss(w4), labels, ce_of(weight=w4)),
    flat_weighted=(lambda: CrossEntropyLossFlat(weight=w4), labels, ce_of(weight=w4)),
    ignored=(lambda: nn.CrossEntropyLoss(ignore_index=1), labels, ce_of(ignore_index=1)),
    partial=(lambda: partial(F.cross_entropy, weight=w4), labels, ce_of(weight=w4)),
    sum=(lambda: nn.CrossEntropyLoss(reduction='sum'), labels, total(ce_of())),
    smooth=(lambda: nn.CrossEntropyLoss(label_smoothing=.1), labels, smooth),
    fastais_smooth=(losses.LabelSmoothingCrossEntropyFlat, labels, smooth),
    focal=(losses.FocalLossFlat, labels, by_mean(lambda p,y: losses.FocalLossFlat(reduction='none')(p, y))),
    soft=(nn.CrossEntropyLoss, soft, lambda p,y: F.cross_entropy(p, y, reduction='none')/len(y)),
    mse=(nn.MSELoss, real, mse), flat_mse=(losses.MSELossFlat, real, mse), l1=(
        nn.L1Loss, real, lambda p,y: (p-y).abs().mean(1)/len(y)),
    multi=(losses.BCEWithLogitsLossFlat, many, bce), own_function=(
        lambda: own_function, real, by_mean(lambda p,y: own_function(p, y, 'none'))),
    own_module=(OwnModule, real, by_mean(lambda p,y: own_function(p, y, 'none'))))

@pytest.mark.parametrize('name', LOSSES)
@both
def test_losses(name, by):
    make,y,per_item = LOSSES[name]
    learn = small(MixUp(1., by=by), check := Expect(per_item), loss_func=make(), ys=[y])
    if hasattr(learn.loss_func, 'to'): learn.loss_func.to(next(learn.model.parameters()).device)
    fit(learn, 2)
    assert check.n==8 and check.worst<2e-5

@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_is_as_it_was(name):
    loss = LOSSES[name][0]()
    inner = getattr(loss, 'func', loss)
    before = dict(vars(inner)),dict(getattr(loss, '__dict__', {}))
    class Stops(Callback):
        order = 50
        def after_backward(self): raise KeyboardInterrupt
    learn = small(MixUp(), Stops(), loss_func=loss, ys=[LOSSES[name][1]])
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert learn.loss_func is loss
    assert (dict(vars(inner)),dict(getattr(loss, '__dict__', {})))==before

def test_values_of_items():
    "A loss that takes no mean keeps its values, each mixed by the share of its item"
    class Mean(Callback):
        order = 25
        def after_loss(self):
            if self.training:
                mix,f = mix_of(self),self.learn.loss_func
                lam = torch.as_tensor(mix.shares, dtype=torch.float32, device=self.pred.device)
                want = lam*f(self.pred, self.y) + (1-lam)*f(self.pred, *mix.second)
                torch.testing.assert_close(self.loss_grad, want)
            self.learn.loss_grad,self.learn.loss = self.loss_grad.mean(),self.loss.mean()
    loss = nn.CrossEntropyLoss(reduction='none')
    for by in ('item','batch'): fit(small(MixUp(by=by), Mean(), loss_func=loss))

class NoParts(nn.Module):
    def forward(self, pred, y): return F.cross_entropy(pred, y)
class FalsePromise(NoParts):
    reduction = 'mean'
    def __init__(self): super().__init__(); self.reduction = 'mean'
class Delegates:
    "Sets what it wraps: a copy of it would change the loss itself"
    def __init__(self): self.inner = nn.CrossEntropyLoss()
    @property
    def reduction(self): return self.inner.reduction
    @reduction.setter
    def reduction(self, v): self.inner.reduction = v
    def __call__(self, pred, y): return self.inner(pred, y)

def plain_function(): return lambda p,y: F.cross_entropy(p, y)

@pytest.mark.parametrize('loss', [NoParts, FalsePromise, Delegates, plain_function])
def test_a_loss_without_values_of_items(loss, capsys):
    "One share for a batch, and one line that says it"
    learn = small(MixUp(), check := Expect(None), loss_func=loss())
    fit(learn, 2), fit(learn, 1)
    assert check.n==12 and check.worst<1e-6 and mix_of(learn) is None
    assert capsys.readouterr().out.count('mixes all items of a batch by one number')==1
    assert getattr(learn.loss_func, 'reduction', 'mean')=='mean'

def test_a_loss_that_is_not_known_is_tried_in_the_first_batch():
    class Ones(Callback):
        run_valid = False
        def before_fit(self): self.one = []
        def after_loss(self): self.one.append(mix_of(self).one)
    fit(small(MixUp(), ones := Ones(), loss_func=OwnModule(), ys=[real]))
    assert ones.one==[True]+[False]*3

def test_equal_shares_of_items_give_what_one_share_gives():
    "Also where a mean has weights, or ignores targets"
    y,real = (torch.randint(0, 4, (16,)),),(torch.randn(16, 4), torch.rand(16, 4)+.1)
    weighted = nn.CrossEntropyLoss(w4.cpu(), ignore_index=2)
    for loss,args in ((weighted, y), (nn.CrossEntropyLoss(reduction='sum'), y),
                      (nn.GaussianNLLLoss(), real)):
        pred = torch.randn(16, 4)
        parts = _parts(loss, 16, pred, args)
        torch.testing.assert_close((_counts(loss(pred, *args), parts)*parts).sum(), loss(pred, *args))

def test_compiled_losses_are_not_changed():
    class Compiled:
        "As `torch.compile` wraps a module"
        def __init__(self, m): vars(self)['_orig_mod'] = m
        def __setattr__(self, k, v): setattr(self._orig_mod, k, v)
        def __getattr__(self, k): return getattr(vars(self)['_orig_mod'], k)
        def __call__(self, *args): return self._orig_mod(*args)
    loss = Compiled(nn.CrossEntropyLoss())
    learn = small(MixUp(), check := Expect(ce_of()), loss_func=loss)
    fit(learn)
    assert learn.mix_up._separable and check.n and check.worst<1e-5 and loss.reduction=='mean'

def test_a_penalty_of_another_callback_stays():
    class Penalty(Callback):
        run_valid = False
        def after_loss(self): self.learn.loss_grad = self.loss_grad+1
    learn = small(MixUp(), Penalty(), seen := Seen())
    fit(learn)
    for a,b in seen.losses: assert abs(a-b-1)<1e-5

# --- several inputs and targets -----------------------------------------------------------------
class Two(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(36, 4)
    def forward(self, a, b): return self.l(a.flatten(1)) + b.float().flatten(1).mean(1, keepdim=True)
def images(h=6, w=6, c=1): return torch.randn(32, c, h, w)

@pytest.mark.parametrize('cls', [MixUp, CutMix])
@both
def test_two_inputs_are_mixed_alike(cls, by):
    "The second, of twice the size, in the same place"
    a = images()
    b = a.repeat_interleave(2, 2).repeat_interleave(2, 3)
    class Same(Callback):
        order,run_valid = 20,False
        def before_batch(self):
            a,b = self.xb
            assert torch.equal(a.repeat_interleave(2, 2).repeat_interleave(2, 3), b)
    fit(small(cls(by=by), Same(), xs=[a, b], model=Two()), 2)

def test_only_the_inputs_that_are_named():
    xs = [images(), torch.randint(0, 9, (32, 3))]
    learn = small(CutMix(inputs=0), seen := Seen(), raw := Raw(), xs=xs, model=Two())
    fit(learn)
    assert all(torch.equal(a[1], b[1]) for a,b in zip(seen.batches, raw.batches))
    assert any(not torch.equal(a[0], b[0]) for a,b in zip(seen.batches, raw.batches))

class Sum(nn.Module):
    "Of two targets, the first masks"
    def forward(self, pred, mask, y):
        return F.cross_entropy(pred, mask) + F.mse_loss(pred.mean((1, 2, 3)), y)
def pixels(): return nn.Conv2d(1, 3, 3, padding=1)

@both
def test_masks_are_cut_and_need_no_second_loss(by):
    masks = torch.randint(0, 3, (32, 6, 6))
    xs = [masks[:,None].float()]        # so that each pixel says what its target is
    class Agree(Callback):
        order,run_valid = 20,False
        def before_batch(self): assert torch.equal(self.x[:,0].long(), self.y)
        def after_loss(self):
            torch.testing.assert_close(self.loss, self.learn.loss_func(self.pred, self.y), **EXACT)
    for t in (masks, masks[:,None].float()):
        loss = nn.CrossEntropyLoss() if t.ndim==3 else nn.MSELoss()
        class SameShape(Agree):
            def before_batch(self): assert torch.equal(self.x.squeeze(1), self.y.squeeze(1).float())
        model = pixels() if t.ndim==3 else nn.Conv2d(1, 1, 3, padding=1)
        raw,seen = Raw(),Seen()
        fit(small(CutMix(by=by), raw, seen, SameShape(), xs=xs, ys=[t], loss_func=loss, model=model))
        assert any(not torch.equal(a[1], b[1]) for a,b in zip(seen.batches, raw.batches))

def test_masks_beside_another_target():
    "A mask that is cut is right for both losses"
    masks,y = torch.randint(0, 3, (32, 6, 6)),torch.randn(32)
    class SameMask(Callback):
        run_valid = False
        def after_loss(self):
            if mix_of(self): assert torch.equal(self.yb[0], mix_of(self).second[0])
    cbs = CutMix(),SameMask(),Expect(None)
    learn,check = small(*cbs, loss_func=Sum(), ys=[masks, y], model=pixels()),cbs[-1]
    fit(learn, 2)
    assert check.n>4 and check.worst<1e-6

def test_masks_of_items_that_are_cut_and_of_others():
    "Drawn for each item: a mask that is cut has one target, another mask has two"
    x = torch.arange(16.).view(16, 1, 1, 1).expand(16, 1, 6, 6)
    mask,cb = x[:,0].long(),CutMixUp(by='item')
    mix = cb._draw(np.random.default_rng(0), (x,), (mask,), True)
    (mixed,),(first,),(second,) = cb._mixed(mix, (x,), (mask,))
    assert mix.any_cut and not mix.all_cut
    for i,cut in enumerate(mix.cut.tolist()):
        if cut: assert torch.equal(first[i], second[i]) and torch.equal(first[i].float(), mixed[i,0])
        else: assert torch.equal(first[i], mask[i]) and torch.equal(second[i], mask[mix.order[i]])

def test_mixup_of_masks_uses_two_losses():
    ys = [torch.randint(0, 3, (32, 6, 6))]
    def per_item(p, y): return F.cross_entropy(p, y, reduction='none').mean((1, 2))/len(y)
    for loss in (nn.CrossEntropyLoss(), CrossEntropyLossFlat(axis=1), losses.DiceLoss(reduction='mean')):
        f = per_item if not isinstance(loss, losses.DiceLoss) else by_mean(
            lambda p,y: losses.DiceLoss(reduction='none')(p, y).mean(1))
        learn = small(MixUp(), check := Expect(f), loss_func=loss, ys=ys, model=pixels())
        fit(learn, 2)
        assert check.n==8 and check.worst<1e-5

def test_a_mask_of_another_size_and_of_fastais_class():
    cb,mask = CutMix(),TensorMask(torch.arange(16).view(16, 1, 1).expand(16, 3, 3).clone())
    x = torch.arange(16.).view(16, 1, 1, 1).expand(16, 1, 6, 6).clone()
    for each_ in (False, True):
        mix = cb._draw(np.random.default_rng(1), (x,), (mask,), each_)
        xb,yb,second = cb._mixed(mix, (TensorImage(x),), (mask,))
        assert second is None and type(yb[0]) is TensorMask and type(xb[0]) is TensorImage
        share = (yb[0]!=mask).float().mean((1, 2))
        assert abs(share-(xb[0]!=x).float().mean((1, 2, 3))).max()<.35

def test_nested_targets():
    "Tuples, lists and dicts of tensors"
    y = dict(a=torch.arange(4), b=(torch.arange(4.), [torch.arange(8).view(4, 2)]))
    cb = MixUp()
    mix = cb._draw(np.random.default_rng(0), (torch.randn(4, 3),), (y,), False)
    _,first,(second,) = cb._mixed(mix, (torch.randn(4, 3),), (y,))
    order = torch.as_tensor(mix.partners)
    assert torch.equal(second['a'], order) and torch.equal(second['b'][0], order.float())
    assert torch.equal(second['b'][1][0], y['b'][1][0][order]) and torch.equal(first[0]['a'], y['a'])

@each
def test_a_batch_of_one_item_and_the_rest_of_an_epoch(cls):
    class Alone(Callback):
        run_valid = False
        def after_loss(self): assert (mix_of(self) is None) or len(self.x)>1
    learn = small(cls(), Alone(), raw := Raw(), seen := Seen(), xs=[torch.randn(33, 1, 6, 6)],
                  ys=[torch.randint(0, 4, (33,))])
    fit(learn)
    assert [len(b[0]) for b in seen.batches]==[8]*4+[1]
    assert torch.equal(seen.batches[-1][0], raw.batches[-1][0])
    fit(small(cls(), bs=1))

# --- what is refused ----------------------------------------------------------------------------
ids,vectors = torch.randint(0, 9, (32, 36)),torch.randn(32, 36)
REFUSED = [
    (MixUp(), [ids], None, r'mix_up: input 0 has whole numbers \(torch.int64\), such as word ids'),
    (CutMix(), [vectors], None, r'cut_mix: input 0 has the shape \(8, 36\); expected images'),
    (CutMixUp(), [vectors], None, r'cut_mix_up: input 0 has the shape \(8, 36\); expected images'),
    (CutMixUp(), [(images()*9).byte()], None, r'cut_mix_up: input 0 has whole numbers \(torch.uint8\)'),
    (MixUp(inputs=1), None, None, r'inputs=\(1,\): expected numbers of inputs, 0 to 0'),
    (CutMix(), None, [torch.randn(32, 5, 7)], r'cut_mix: a target has the shape \(8, 5, 7\); expected'),
    (CutMix(), [images(), vectors], None, r'cut_mix: input 1 has the shape \(8, 36\)')]

@pytest.mark.parametrize('cb,xs,ys,message', REFUSED)
def test_refused_in_the_first_batch(cb, xs, ys, message):
    learn = small(copy(cb), xs=xs, ys=ys, model=Two() if xs and len(xs)==2 else None)
    before = traces(learn)
    with pytest.raises(ValueError, match=message): fit(learn)
    assert traces(learn)|dict(opt_attrs=0, attrs=0)==before|dict(opt_attrs=0, attrs=0)

@pytest.mark.parametrize('cls,y,message', [
    (MixUp, TensorBBox(torch.rand(4, 2, 4)), 'has boxes, which cannot be mixed'),
    (CutMix, TensorPoint(torch.rand(4, 3, 2)), 'has points, which may be cut out: use MixUp'),
    (MixUp, [dict(boxes=torch.rand(1, 4)) for _ in range(4)], r'has the shape \(1, 4\); expected 4 rows'),
    (MixUp, ['a']*4, 'is a str; expected tensors')])
def test_targets_that_cannot_be_mixed(cls, y, message):
    with pytest.raises(ValueError, match=message):
        cls()._draw(np.random.default_rng(0), (torch.randn(4, 1, 6, 6),), (y,), False)

def test_points_can_be_mixed():
    y = TensorPoint(torch.rand(4, 3, 2))
    assert MixUp()._draw(np.random.default_rng(0), (torch.randn(4, 1, 6, 6),), (y,), False)

@pytest.mark.parametrize('make,message', [
    (lambda: MixUp(-1), 'alpha=-1: expected a finite'), (lambda: CutMix(by='image'), "by='image'"),
    (lambda: MixUp(p=2), 'p=2'), (lambda: MixUp(until=9), 'until=9'), (lambda: CutMixUp(cut=2), 'cut=2'),
    (lambda: MixUp(inputs=()), r'inputs=\(\): expected at least one'),
    (lambda: MixUp(inputs=-1), 'inputs=-1')])
def test_refused_arguments(make, message):
    with pytest.raises(ValueError, match=message): make()

@pytest.mark.parametrize('cbs,message', [
    (lambda: [MixUp(), CutMix()], 'CutMix is on the learner too; expected one of the two. CutMixUp'),
    (lambda: [CutMix(), fastais.MixUp()], "fastai's MixUp is on the learner too"),
    (lambda: [MixUp(), MixUp()], 'two callbacks MixUp are on the learner')])
def test_two_that_mix_are_refused(cbs, message):
    with pytest.raises(ValueError, match=message): fit(small(*cbs()))

# --- beside others ------------------------------------------------------------------------------
@each
@pytest.mark.parametrize('beside', [FastLoop, lambda: GradientAccumulation(16), SkipNonFinite, EMA, scaler])
def test_beside(cls, beside):
    "The batches and losses are those without the other one"
    a = fit(learner(cbs=[cls(), seen := Seen()]), 1)
    b = fit(learner(cbs=[cls(), other := Seen(), beside()]), 1)
    for x,y in zip(seen.batches[:1], other.batches): assert all(map(torch.equal, x, y))
    assert len(seen.batches)==len(other.batches) and all(map(np.isfinite, np.ravel(other.losses)))

def test_fast_loop_changes_no_bit():
    a,b = (fit(learner(cbs=[CutMixUp(by='item'), *cbs]), 2, 'fit_one_cycle') for cbs in ([], [FastLoop()]))
    assert torch.equal(weights(a), weights(b))

@pytest.mark.parametrize('cls,loss', [(MixUp, nn.CrossEntropyLoss()), (CutMix, F.cross_entropy)])
def test_accumulated_batches(cls, loss):
    "Two batches in a window: the gradient is that of their mean"
    class Grads(Callback):
        order,run_valid = 100,False
        def before_fit(self): self.all = []
        def before_step(self):
            self.all.append(torch.cat([p.grad.flatten().clone() for p in self.model.parameters()]))
    opt = partial(Adam, lr=0.)
    fit(small(cls(), grads := Grads(), loss_func=loss, opt_func=opt), 1, lr=0.)
    fit(small(cls(), grads2 := Grads(), GradientAccumulation(16), loss_func=loss, opt_func=opt), 1, lr=0.)
    pairs = torch.stack(grads.all).view(2, 2, -1).mean(1)
    torch.testing.assert_close(torch.stack(grads2.all), pairs)

@each
def test_sam_sees_the_same_mix_twice(cls):
    class Losses(Callback):
        run_valid = False
        def before_fit(self): self.all = []
        def after_loss(self): self.all.append((self.train_iter, self.loss.item(), id(mix_of(self))))
    learn = small(cls(), losses_ := Losses(), SAM(rho=0.))
    fit(learn)
    for a,b in zip(losses_.all[::2], losses_.all[1::2]): assert a==b
    assert len(losses_.all)==8

def test_item_stats_leaves_mixed_batches_out(capsys):
    stats = ItemStats()
    fit(digits_learner([MixUp(), stats], n=160), 1)
    assert not len(stats.table()) and stats.records[0].why=='MixUp mixes items'

def test_preflight_leaves_it_out():
    learn = digits_learner([MixUp()], n=160)
    with quiet(learn): preflight(learn)
    assert learn.mix_up._mix is None

@each
def test_a_refresh_of_batch_norm_sees_what_is_mixed(cls):
    from fastai_callbacks_ext.base.passes import refresh_batchnorm
    learn = fit(digits_learner(n=200), 1)
    state = lambda: learn.model[1].running_var.clone()
    random = torch.get_rng_state()
    with learn.added_cbs(cb := cls()):
        refresh_batchnorm(learn)
        mixed,again = state(),(refresh_batchnorm(learn), state())[1]
        assert torch.equal(mixed, again) and cb._n==0 and cb._mix is None
    assert torch.equal(torch.get_rng_state(), random)
    refresh_batchnorm(learn)
    assert not torch.equal(mixed, state())

@each
def test_lr_find_mixes_and_changes_nothing(cls):
    learn = learner(cbs=[cls(), seen := Seen(), raw := Raw()])
    before = weights(learn)
    with quiet(learn): learn.lr_find(show_plot=False, num_it=5, suggest_funcs=None)
    assert any(not torch.equal(a[0], b[0]) for a,b in zip(seen.batches, raw.batches))
    assert torch.equal(weights(learn), before) and learn.cbs.attrgot('records')[-3:]

# --- ends, copies, resumes ----------------------------------------------------------------------
@each
@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','after_backward','after_batch'])
def test_an_interrupted_fit_leaves_nothing(cls, event):
    class Stops(Callback):
        order = 40
        def __call__(self, name):
            if name==event and self.training and self.train_iter==2: raise KeyboardInterrupt
    loss = nn.CrossEntropyLoss()
    learn = small(cb := cls(), Stops(), loss_func=loss)
    before = traces(learn)
    with pytest.raises(KeyboardInterrupt): fit(learn)
    assert learn.loss_func is loss
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, Stops)])
    fit(learn)
    assert cb._mix is None and learn.loss_func is loss
    assert traces(learn)['loss']==before['loss'] and traces(learn)['replaced']==before['replaced']

HOW = [('fit','fastai'), ('fit_one_cycle','wrapper'), ('fine_tune','fastai')]

@each
@both
@pytest.mark.parametrize('method,opt', HOW)
def test_a_resumed_run_has_the_same_bits(cls, by, method, opt, tmp_path):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.epoch==1 and self.iter==1: raise KeyboardInterrupt
    def run(*cbs):
        learn = learner(cbs=[cls(by=by, p=.8, until=.9), *cbs], opt_func=OPTS[opt])
        return fit(learn, 2, method)
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Stop(), Checkpoint(tmp_path, steps=1))
    resumed = run(Checkpoint(tmp_path, steps=1))
    assert torch.equal(weights(resumed), weights(whole))

def test_a_killed_run_with_an_own_loss_goes_on(tmp_path):
    def run(stop=None):
        class Kill(Callback):
            order = 3000
            def after_batch(self):
                if self.training and self.train_iter==stop: raise KeyboardInterrupt
        save = Checkpoint(tmp_path/f'{bool(stop or again)}', steps=1)
        learn = small(MixUp(), save, Kill(), loss_func=OwnModule(), ys=[real])
        return fit(learn, 2)
    again = False
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(3)
    again = True
    assert torch.equal(weights(run()), weights(whole))

@each
def test_copies_and_exports(cls, tmp_path):
    learn = digits_learner(cls(by='batch'), n=160, path=tmp_path)
    fit(learn)
    cb = next(o for o in learn.cbs if isinstance(o, cls))
    for o in (copy(cb), pickle.loads(pickle.dumps(cb))): assert o.by=='batch' and o._mix is None
    learn.export('e.pkl')
    class Mid(Callback):
        order = 90
        def __reduce_ex__(self, protocol): return Callback,()
        def after_batch(self):
            if self.training and self.train_iter==1: self.learn.export('mid.pkl')
    fit(learn, 1, cbs=Mid())

@pytest.mark.parametrize('cls,theirs', [(MixUp, fastais.MixUp), (CutMix, fastais.CutMix)])
def test_upgrade_swaps_fastais(cls, theirs):
    class Stops(Callback):
        def after_batch(self): raise KeyboardInterrupt
    learn = digits_learner(theirs(.7), n=160)
    loss = learn.loss_func
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=Stops())
    assert learn.loss_func is not loss
    ext.upgrade(learn)
    cb = next(o for o in learn.cbs if isinstance(o, cls))
    assert cb.alpha==pytest.approx(.7) and learn.loss_func is loss and theirs not in map(type, learn.cbs)
    fit(learn)

def test_the_loss_that_fastais_left_is_taken_off():
    class Stops(Callback):
        def after_batch(self): raise KeyboardInterrupt
    learn = digits_learner(n=160)
    loss = learn.loss_func
    with pytest.raises(KeyboardInterrupt): fit(learn, 1, cbs=[fastais.MixUp(), Stops()])
    fit(learn, 1, cbs=MixUp())
    assert learn.loss_func is loss

@each
def test_it_learns(cls):
    learn = fit(digits_learner(cls(), n=1000), 5, 'fit_one_cycle', lr_max=2e-2)
    assert learn.recorder.values[-1][2]>.8

@each
def test_show(cls):
    import matplotlib
    matplotlib.use('agg')
    learn = learner(cbs=[cls()])
    cb,state = learn.cbs[-1],torch.get_rng_state()
    cb.show(learn, 4)
    assert torch.equal(torch.get_rng_state(), state)
    titles = [ax.get_title() for ax in matplotlib.pyplot.gcf().axes]
    assert len(titles)==4 and all(len(t.split())==4 for t in titles)
    matplotlib.pyplot.close('all')
    small(cls()).cbs[-1].show(small())
    matplotlib.pyplot.close('all')
