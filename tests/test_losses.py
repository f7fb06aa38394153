"A window is the big batch for each loss that is known; of others it is said what is taken for granted"
import re
from functools import partial

import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import (BaseLoss, BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss,
                           FocalLoss,
                           FocalLossFlat, L1LossFlat, LabelSmoothingCrossEntropy,
                           LabelSmoothingCrossEntropyFlat,
                           MSELossFlat)
from fastai.torch_core import set_seed
from torch import nn
from common import quiet
from fastai_callbacks_ext.all import GradientAccumulation, loss_weight
from test_gradients import Batches, device, learner

N,sizes,weights = 23,[3,5,1,6,2,6],torch.tensor([.1,1.,3.,8.], device=device)
g = torch.Generator().manual_seed(0)
def drawn(f, *args): return f(*args, generator=g).to(device)
x,classes,real = drawn(torch.randn, N, 5),drawn(torch.randint, 0, 4, (N,)),drawn(torch.randn, N, 4)
signs = torch.where(real>0, 1., -1.)
targets = dict(
    classes=classes, some=torch.where(x[:,0]>.3, -100, classes), real=real, positive=real.abs(),
    yes=(real>0).float(), chances=real.softmax(1), signs=signs,
    pixels=drawn(torch.randint, 0, 4, (N,2)), spread=(real, real.abs()+.1),
    labels=torch.stack([classes, torch.full_like(classes, -1), classes, classes], 1),
    cosine=(real, signs[:,0]),
    ranks=(real, signs), triplet=(real, real.flip(0)), weighed=(drawn(torch.rand, N, 4).round(), real.abs()),
    speech=(drawn(torch.randint, 1, 4, (N,2)), torch.full_like(classes, 6), torch.where(x[:,0]>0, 1, 2)))
targets['some pixels'] = torch.where(targets['pixels']==1, -100, targets['pixels'])

def dense(): return nn.Linear(5, 4)
def image(): return nn.Sequential(nn.Linear(5, 8), nn.Unflatten(1, (4,2)))
def chances(): return nn.Sequential(nn.Linear(5, 4), nn.Sigmoid())
class Frames(nn.Linear):
    "Of a recording: predictions of time, item, class"
    def __init__(self): super().__init__(5, 24)
    def forward(self, x): return super().forward(x).view(-1, 6, 4).transpose(0, 1).log_softmax(-1)

ce,w = CrossEntropyLossFlat,dict(weight=weights)
known = {   # kind of targets, model: losses
    ('classes', dense): [
        ce(), F.cross_entropy, nn.CrossEntropyLoss(**w), partial(F.cross_entropy, **w), ce(reduction='sum'),
        partial(F.cross_entropy, ignore_index=0), partial(F.cross_entropy, reduction='sum'),
        partial(F.cross_entropy, size_average=False), ce(ignore_index=0, **w), ce(label_smoothing=.1, **w),
        partial(partial(F.cross_entropy, ignore_index=1), label_smoothing=.2), nn.NLLLoss(**w), F.nll_loss,
        FocalLoss(**w), FocalLossFlat(**w), FocalLossFlat(reduction='sum'), LabelSmoothingCrossEntropy(),
        LabelSmoothingCrossEntropyFlat(), LabelSmoothingCrossEntropyFlat(reduction='sum', **w),
        nn.MultiMarginLoss(**w), F.multi_margin_loss, BaseLoss(nn.MultiMarginLoss)],
    ('some', dense): [ce(), F.cross_entropy, ce(**w), partial(F.cross_entropy, label_smoothing=.1, **w),
        ce(reduction='sum'), nn.NLLLoss(), FocalLossFlat()],
    ('chances', dense): [nn.CrossEntropyLoss(), partial(F.cross_entropy, label_smoothing=.1, **w),
        nn.KLDivLoss(),
        nn.KLDivLoss(reduction='batchmean'), partial(F.kl_div, reduction='batchmean'), F.kl_div,
        nn.KLDivLoss(reduction='sum')],
    ('pixels', image): [ce(axis=1), nn.CrossEntropyLoss(**w), DiceLoss(), DiceLoss(reduction='mean'),
        FocalLossFlat(axis=1)],
    ('some pixels', image): [ce(axis=1, **w), F.cross_entropy],
    ('real', dense): [MSELossFlat(), L1LossFlat(), nn.MSELoss(), F.mse_loss, nn.SmoothL1Loss(),
        nn.HuberLoss(),
        partial(F.huber_loss, reduction='sum')],
    ('positive', dense): [nn.PoissonNLLLoss(), F.poisson_nll_loss],
    ('yes', dense): [BCEWithLogitsLossFlat(), BCEWithLogitsLossFlat(pos_weight=weights),
        nn.BCEWithLogitsLoss(**w),
        nn.MultiLabelSoftMarginLoss(**w)],
    ('yes', chances): [BCELossFlat(), nn.BCELoss(**w)],
    ('weighed', dense): [F.binary_cross_entropy_with_logits],
    ('signs', dense): [nn.SoftMarginLoss(), nn.HingeEmbeddingLoss()],
    ('labels', dense): [nn.MultiLabelMarginLoss()],
    ('spread', dense): [nn.GaussianNLLLoss(), F.gaussian_nll_loss],
    ('cosine', dense): [nn.CosineEmbeddingLoss()],
    ('ranks', dense): [nn.MarginRankingLoss()],
    ('triplet', dense): [nn.TripletMarginLoss(), F.triplet_margin_loss, nn.TripletMarginWithDistanceLoss()],
    ('speech', Frames): [nn.CTCLoss(), partial(F.ctc_loss, zero_infinity=True), nn.CTCLoss(reduction='sum')]}
each = [(kind, model, loss) for (kind,model),losses in known.items() for loss in losses]

def accumulated(loss, y, model, *cbs, n_acc=N, **kwargs):
    "A fit of one window, which leaves the weights as they are"
    set_seed(0)
    batches = Batches((xb, *yb) for xb,*yb in zip(*(t.split(sizes) for t in (x, *y))))
    learn = learner(batches, model(), loss, *cbs, GradientAccumulation(n_acc, **kwargs), lr=0.)
    learn.dls.n_inp = 1
    with quiet(learn): learn.fit(1)
    return learn

def whole(loss, learn, y):
    "Gradient and loss of the big batch"
    value = loss(learn.model(x), *y)
    grads = torch.autograd.grad(value, [p for p in learn.model.parameters()])
    return torch.cat([o.flatten() for o in grads]),value

@pytest.mark.parametrize('kind,model,loss', each, ids=[f'{k}-{i}' for i,(k,_,_) in enumerate(each)])
def test_known_losses(kind, model, loss, capsys):
    y = targets[kind] if isinstance(targets[kind], tuple) else (targets[kind],)
    learn = accumulated(loss, y, model)
    grad,value = whole(loss, learn, y)
    torch.testing.assert_close(learn.grads.grads[0], grad, rtol=1e-4, atol=1e-6)
    assert learn.grads.losses[0]==pytest.approx(value.item(), rel=1e-4) and len(learn.grads.grads)==1
    assert capsys.readouterr().out==''

class Sized(nn.Module):
    "Images of another size for each batch: predictions of item, class, pixel"
    def __init__(self, axis=1):
        super().__init__()
        self.linear,self.axis = nn.Linear(5, 4),axis
    def forward(self, x):
        out = self.linear(x)[:,:,None]*torch.linspace(-1, 1, len(x)%3+2, device=x.device)
        return out.movedim(1, self.axis)

fastais = {'classes': [ce, FocalLossFlat, LabelSmoothingCrossEntropyFlat],
           'classes first': [nn.CrossEntropyLoss, FocalLoss, LabelSmoothingCrossEntropy, DiceLoss],
           'numbers': [MSELossFlat, L1LossFlat, BCEWithLogitsLossFlat, BCELossFlat]}

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('kind,cls', [(k, o) for k,os in fastais.items() for o in os],
                         ids=lambda o: getattr(o, '__name__', o))
def test_fastais_losses_of_images_of_several_sizes(kind, cls, reduction, capsys):
    "The step is that of all terms of the window together"
    axis = -1 if kind=='classes' else 1
    def model(): return nn.Sequential(Sized(axis), *[nn.Sigmoid()]*(cls is BCELossFlat)).to(device)
    set_seed(0)
    net,xs = model(),x.split(sizes)
    shapes = [net(o).shape for o in xs]     # of item, class, pixel, or with the class last
    if kind=='numbers': ys = [drawn(torch.rand, *s) for s in shapes]
    else: ys = [drawn(torch.randint, 0, 4, (s[0], s.numel()//s[0]//4)) for s in shapes]
    set_seed(0)
    learn = learner(Batches(zip(xs, ys)), model(), cls(reduction=reduction), GradientAccumulation(N), lr=0.)
    with quiet(learn): learn.fit(1)
    apart = cls(reduction='none')
    terms = torch.cat([apart(net(a), b).flatten() for a,b in zip(xs, ys)])
    value = terms.sum() if reduction=='sum' else terms.mean()
    want = torch.autograd.grad(value, list(net.parameters()))
    want = torch.cat([o.flatten() for o in want])
    torch.testing.assert_close(learn.grads.grads[0], want, rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().out==''

@pytest.mark.parametrize('loss', [partial(F.cross_entropy, reduction='none'), nn.MSELoss(reduction='none'),
                                  FocalLossFlat(reduction='none')])
def test_unreduced(loss):
    "Their mean is taken as the loss itself would take it"
    y = real if isinstance(loss, nn.MSELoss) else classes
    learn = accumulated(loss, (y,), dense)
    torch.testing.assert_close(learn.grads.grads[0], whole(lambda *o: loss(*o).mean(), learn, (y,))[0])

def test_compiled_loss():
    learn = accumulated(torch.compile(nn.CrossEntropyLoss(**w), backend='eager'), (targets['some'],), dense)
    want = whole(nn.CrossEntropyLoss(**w), learn, (targets['some'],))[0]
    torch.testing.assert_close(learn.grads.grads[0], want, rtol=1e-4, atol=1e-6)

def own(pred, y): return ((pred-y)**2).mean()
def mean_of_items(pred, y): return torch.stack([F.mse_loss(p, t) for p,t in zip(pred, y)]).mean()
def two_heads(pred, a, b): return ((pred[:,:2]-a[:,:2])**2).mean()+((pred[:,0]-b)**2).mean()
class Twice(nn.CrossEntropyLoss):
    def forward(self, pred, y): return 2*super().forward(pred, y)
class Added(nn.Module):
    reduction = 'sum'
    def forward(self, pred, y): return own(pred, y)*pred.numel()

@pytest.mark.parametrize('loss,y,said', [
    (own, (real,), 'treats own as a mean over the targets'),
    (mean_of_items, (real,), 'treats mean_of_items as'),
    (lambda p,t: own(p, t), (real,), 'treats <lambda> as'),
    (Twice(), (classes,), 'treats Twice as a mean over the items'),
    (two_heads, (real, real[:,0]), 'treats two_heads as a mean over the items'),
    (Added(), (real,), 'treats Added as a sum')])
def test_what_is_taken_for_granted(loss, y, said, capsys):
    "Own losses: right if they are what the line says"
    learn = accumulated(loss, y, dense)
    torch.testing.assert_close(learn.grads.grads[0], whole(loss, learn, y)[0], rtol=1e-4, atol=1e-6)
    out = capsys.readouterr().out
    assert out.count('gradient_accumulation: ')==1 and said in out and "weight='items'" in out

def test_smoothing_by_classes_is_two_means(capsys):
    accumulated(LabelSmoothingCrossEntropyFlat(**w), (classes,), dense)
    assert re.search('treats LabelSmoothingCrossEntropy as a mean.*two means.*label_smoothing=',
                     capsys.readouterr().out)
    accumulated(LabelSmoothingCrossEntropyFlat(), (targets['some'],), dense)
    assert 'two means' in capsys.readouterr().out

@pytest.mark.parametrize('weight', ['items', 'targets', lambda learn: len(learn.y)])
def test_weight_says_it(weight, capsys):
    "Then nothing is taken for granted"
    learn = accumulated(own, (real,), dense, weight=weight)
    torch.testing.assert_close(learn.grads.grads[0], whole(own, learn, (real,))[0])
    assert capsys.readouterr().out==''

def test_said_once(capsys):
    "In `fine_tune`, and in a second fit"
    learn = accumulated(own, (real,), dense)
    with quiet(learn): learn.fit(1)
    assert capsys.readouterr().out.count('treats own')==1

@pytest.mark.parametrize('cls', [MixUp, CutMix])
@pytest.mark.parametrize('loss', [ce(**w), LabelSmoothingCrossEntropyFlat(**w), ce(ignore_index=0)])
def test_mixed_targets(cls, loss, capsys):
    "A mean over all targets, whatever the loss would have made of them"
    class Weights(Callback):
        order,run_valid = 5,False
        def before_fit(self): self.seen = []
        def before_backward(self): self.seen.append((float(loss_weight(self.learn)), len(self.y)))
    set_seed(0)
    images = torch.randn(12, 1, 4, 4).to(device)
    batches = Batches(zip(images.split(4), classes[:12].split(4)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    learn = learner(batches, model, loss, cls(), Weights(), GradientAccumulation(8))
    with quiet(learn): learn.fit(1)
    assert all(a==b for a,b in learn.weights.seen)
    assert len(learn.grads.grads)==2 and capsys.readouterr().out==''

@pytest.mark.parametrize('make', [lambda t: [dict(box=o) for o in t], lambda t: dict(box=t, other=t[:1])],
                         ids=['list', 'dict'])
def test_targets_that_are_no_tensors(make, capsys):
    "Items are counted by the input"
    class Make(Callback):
        order = -5
        def before_batch(self): self.learn.yb = (make(self.yb[0]),)
    def loss(pred, y):
        return ((pred-(torch.stack([o['box'] for o in y]) if isinstance(y, list) else y['box']))**2).mean()
    learn = accumulated(loss, (real,), dense, Make())
    torch.testing.assert_close(learn.grads.grads[0], whole(own, learn, (real,))[0], rtol=1e-4, atol=1e-6)
    assert 'a mean over the items' in capsys.readouterr().out

def test_input_in_a_dict():
    class Model(nn.Linear):
        def forward(self, x): return super().forward(x['x'])
    class Make(Callback):
        order = -5
        def before_batch(self): self.learn.xb = (dict(x=self.xb[0]),)
    learn = accumulated(MSELossFlat(), (real,), lambda: Model(5, 4), Make(), n_acc=9)
    assert len(learn.grads.grads)==2    # 3+5+1, 6+2+6

@pytest.mark.parametrize('weight', ['words', 3, None])
def test_wrong_weight(weight):
    with pytest.raises(ValueError, match=f"weight={weight!r}: expected 'items', 'targets' or a function"):
        GradientAccumulation(weight=weight)
