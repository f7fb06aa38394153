"`AWP` and `FGM`: the gradient of the step is that of the papers, and nothing is left behind"
from functools import partial

import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBackwardException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from common import fit, learner, quiet, traces
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.adversarial import AWP, FGM
from fastai_callbacks_ext.base.twopass import MovesWeights
from fastai_callbacks_ext.test_utils import digits_learner, text_learner
from test_safety import AnyMixedPrecision

class Grads(Callback):
    "Gradients of each step, and the weights before it"
    order,run_valid = 3000,False
    def before_fit(self): self.rows = []
    def before_step(self):
        ps = [p for p in self.model.parameters()]
        self.rows.append([[p.detach().clone() for p in ps], [p.grad.clone() for p in ps],
                          *(o.clone() for o in (*self.xb, *self.yb)), self.learn.loss.item()])

class Words(nn.Module):
    "Two embeddings, their mean over the words, and a linear layer"
    def __init__(self):
        super().__init__()
        self.word,self.kind = nn.Embedding(20, 6),nn.Embedding(5, 6)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    def forward(self, x): return self.head(self.word(x).mean(1)+self.kind(x[:,0]%5))

def words(*cbs, bs=8, model=Words, seed=0, **kwargs):
    torch.manual_seed(seed)
    x,y = torch.randint(20, (32,4)),torch.randint(3, (32,))
    dls = DataLoaders(*(DataLoader(TensorDataset(x, y), bs) for _ in range(2)))
    kwargs = dict(opt_func=partial(SGD, mom=0.), lr=.1) | kwargs
    return Learner(dls, model(), nn.CrossEntropyLoss(), cbs=[*cbs], **kwargs)

def close(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('share', [1., .5, .2])
def test_the_gradient_of_awp(share):
    "w + gamma |w| g/|g| for each matrix, and a mixture of both gradients"
    learn = fit(words(AWP(.3, share=share), rows := Grads()), 2)
    model = Words()
    for weights,grads,x,y,loss in rows.rows:
        for p,w in zip(model.parameters(), weights): p.data = w.clone()
        plain = F.cross_entropy(model(x), y)
        g = torch.autograd.grad(plain, [*model.parameters()])
        for p,d in zip(model.parameters(), g):
            if p.ndim>1: p.data += .3*p.norm()*d/d.norm()
        there = torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()])
        for a,b,c in zip(grads, g, there): close(a, (1-share)*b+share*c)
        assert loss==pytest.approx(plain.item(), rel=1e-5)
    assert len(rows.rows)==8

@pytest.mark.parametrize('share', [1., .5])
def test_the_gradient_of_fgm(share):
    "Embeddings of each item are moved by epsilon, over both kinds of embeddings together"
    fit(words(FGM(.7, share=share), rows := Grads()), 2)
    model = Words()
    for weights,grads,x,y,loss in rows.rows:
        for p,w in zip(model.parameters(), weights): p.data = w.clone()
        first,second = model.word(x),model.kind(x[:,0]%5)
        def value(a, b): return F.cross_entropy(model.head(a.mean(1)+b), y)
        plain = value(first, second)
        g = torch.autograd.grad(plain, [*model.parameters()], retain_graph=True)
        da,db = torch.autograd.grad(plain, [first, second], retain_graph=True)
        norm = (da.flatten(1).square().sum(1)+db.square().sum(1)).sqrt()
        moved = value(first+.7*da/norm[:,None,None], second+.7*db/norm[:,None])
        there = torch.autograd.grad(moved, [*model.parameters()])
        for a,b,c in zip(grads, g, there): close(a, (1-share)*b+share*c)
        assert loss==pytest.approx(plain.item(), rel=1e-5)

def weights(learn): return [o.clone() for o in learn.model.state_dict().values()]
def same(a, b): return all(map(torch.equal, weights(a), weights(b)))

OPTS = {'fastai': Adam, 'wrapper': partial(OptimWrapper, opt=torch.optim.AdamW)}
MAKE = dict(awp=partial(AWP, .1), fgm=FGM)
BESIDE = dict(nothing=list, loop=lambda: [FastLoop()], window=lambda: [GradientAccumulation(16)],
              guard=lambda: [SkipNonFinite(), GradientClip(1.)], average=lambda: [EMA()])

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('off', [AWP(0.), FGM(0.), AWP(start=1.), FGM(start=1.)])
def test_with_nothing_to_move_it_is_the_plain_fit(opt, off):
    a,b = (words(*cbs, opt_func=OPTS[opt]) for cbs in ([], [off]))
    for o in (a, b): fit(o, 2, 'fit_one_cycle')
    assert same(a, b) and a.recorder.losses==b.recorder.losses

@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('beside', BESIDE)
@pytest.mark.parametrize('method', ['fit','fine_tune'])
def test_it_acts_and_leaves_nothing(name, beside, method):
    "Batches of one window are each moved by themselves"
    plain,learn = (words(*cbs, *BESIDE[beside](), opt_func=Adam) for cbs in ([], [MAKE[name]()]))
    for o in (plain, learn): fit(o, 2, method)
    assert not same(plain, learn)
    for k in ('replaced','loaders','hooks'): assert traces(learn)[k]==traces(plain)[k]
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_a_window_has_the_gradient_of_its_batches():
    "Where no batch changes what another one sees, it is the mean of theirs"
    fit(words(AWP(.1), GradientAccumulation(32), two := Grads(), lr=0.), 1)
    fit(words(AWP(.1), one := Grads(), lr=0.), 1)
    mean = [sum(o)/4 for o in zip(*(row[1] for row in one.rows))]
    for a,b in zip(two.rows[0][1], mean): close(a, b)

@pytest.mark.parametrize('name', MAKE)
def test_under_a_loss_scaler(name):
    make = MAKE[name]
    a,b = (words(make(), *cbs) for cbs in ([], [AnyMixedPrecision(torch.float32, 2.**10)]))
    for o in (a, b): fit(o, 2)
    for x,y in zip(weights(a), weights(b)): close(x, y)

@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('event', ['after_pred','after_loss','after_backward','after_batch'])
def test_interrupted_the_weights_are_back(name, event):
    class Stop(Callback):
        order = 2000
        def __call__(self, event_name):
            if event_name==event and self.training and self.train_iter==2: raise KeyboardInterrupt
    def run(*cbs):
        learn = words(*cbs, Stop(), lr=0.)
        with pytest.raises(KeyboardInterrupt): fit(learn, 1)
        return learn
    learn = run(MAKE[name]())
    assert same(learn, run()) and not any(m._forward_hooks for m in learn.model.modules())

@pytest.mark.parametrize('name', MAKE)
def test_a_resumed_run_has_the_same_bits(name, tmp_path):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==5: raise KeyboardInterrupt
    def run(*cbs): return fit(words(MAKE[name](start=.3), *cbs, opt_func=Adam), 3, 'fit_one_cycle')
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Stop(), Checkpoint(tmp_path, steps=1))
    assert same(run(Checkpoint(tmp_path, steps=1)), whole)

def test_it_begins_after_a_share_of_the_fit():
    class Count(Callback):
        def before_fit(self): self.n = 0
        def after_pred(self): self.n += self.training
    fit(words(AWP(.1, start=.5), count := Count()), 4)
    assert count.n==16+8

def test_language_models_have_embeddings():
    learn = text_learner([*rnn_cbs(2, 1), FGM(.1)], n=1000)
    fit(learn)
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_frozen_embeddings_are_moved_too():
    class Frozen(Words):
        def __init__(self):
            super().__init__()
            self.word.requires_grad_(False), self.kind.requires_grad_(False)
    a,b = (fit(words(*cbs, model=Frozen), 1) for cbs in ([], [FGM()]))
    assert not same(a, b) and torch.equal(a.model.word.weight, b.model.word.weight)

@pytest.mark.parametrize('cb,message', [
    (FGM(), "modules=None: expected names of modules whose output can be moved, such as an nn.Embedding"),
    (FGM(modules='body'), "modules='body'"), (AWP(names='body'), "names='body': no parameter is named so")])
def test_what_fits_nothing_is_refused(cb, message):
    with pytest.raises(ValueError) as e: fit(digits_learner([cb], n=160, bs=32))
    assert message in str(e.value)

@pytest.mark.parametrize('make', [lambda: AWP(-1), lambda: FGM(share=2), lambda: AWP(start=-1),
                                  lambda: FGM('a')])
def test_bad_arguments(make):
    with pytest.raises((ValueError,TypeError)): make()

class CancelsBackward(Callback):
    "In each second batch, after both passes are prepared"
    order = 60
    def before_backward(self):
        if self.train_iter%2: raise CancelBackwardException

@pytest.mark.parametrize('name', MAKE)
def test_a_cancelled_backward_pass_leaves_no_gradient(name):
    class Look(Callback):
        order,seen = 3000,()
        def after_cancel_backward(self):
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.seen += (sum(g.abs().sum().item() for g in grads),)
    fit(words(MAKE[name](share=.5), CancelsBackward(), look := Look()), 2)
    assert len(look.seen)==4 and set(look.seen)=={0.}

def test_two_of_them_are_refused():
    with pytest.raises(ValueError, match='needs two passes too'): fit(words(AWP(), SAM()))

def test_any_outputs_can_be_moved():
    a,b = (fit(learner(cbs=cbs), 1) for cbs in ([], [FGM(.5, modules='0')]))
    assert not same(a, b)
