"`Distill` and `RDrop`: the loss is the formula, in training only; what they use stays as it was"
import pickle
from copy import deepcopy
from functools import partial

import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback import mixup
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import default_device
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from common import fit, learner, quiet, traces
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.labels import NotClear, divergence
from fastai_callbacks_ext.consistency import Distill, RDrop
from fastai_callbacks_ext.test_utils import text_learner
from test_safety import AnyMixedPrecision

class Losses(Callback):
    "What each training batch had"
    order,run_valid = 3000,False
    def before_fit(self): self.rows = []
    def after_loss(self): self.rows.append((self.loss.item(), self.pred.detach().clone(), *self.xb, *self.yb))

def net(seed=0, drop=.5, norm=True):
    torch.manual_seed(seed)
    middle = nn.BatchNorm1d(8) if norm else nn.ReLU()
    return nn.Sequential(nn.Linear(6, 8), middle, nn.Dropout(drop), nn.Linear(8, 3))

LOSSES = dict(classes=(nn.CrossEntropyLoss(), lambda: torch.randint(3, (32,))),
              labels=(nn.BCEWithLogitsLoss(), lambda: torch.randint(2, (32,3)).float()),
              numbers=(nn.MSELoss(), lambda: torch.randn(32, 3)))

def small(*cbs, loss='classes', model=net, **kwargs):
    loss_func,y = LOSSES[loss]
    torch.manual_seed(1)
    data = TensorDataset(torch.randn(32, 6), y())
    dls = DataLoaders(*(DataLoader(data, 8) for _ in range(2)))
    kwargs = dict(opt_func=Adam, lr=.1) | kwargs
    return Learner(dls, model(), loss_func, cbs=[*cbs], **kwargs)

def seeded(learn, *args):
    "A fit that draws the same random numbers as another one"
    torch.manual_seed(2)
    return fit(learn, *args)

def weights(learn): return [o.clone() for o in learn.model.state_dict().values()]
def same(a, b): return all(map(torch.equal, weights(a), weights(b)))

def brute(loss, s, t, T):
    "How far the student is from the teacher"
    if loss=='numbers': return F.mse_loss(s, t)
    if loss=='classes': return T**2*F.kl_div((s/T).log_softmax(1), (t/T).softmax(1), reduction='batchmean')
    p,q = ((o/T).sigmoid().double() for o in (t, s))
    return T**2*(p*(p/q).log()+(1-p)*((1-p)/(1-q)).log()).mean()

@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('T', [1., 3.])
def test_the_loss_of_distill(loss, T):
    teacher = net(5)
    fit(small(Distill(teacher, .3, T), rows := Losses(), loss=loss), 2)
    teacher.eval().to(default_device())
    for value,pred,x,y in rows.rows:
        want = .7*LOSSES[loss][0](pred, y) + .3*brute(loss, pred, teacher(x), T)
        assert value==pytest.approx(want.item(), rel=1e-4)

OPTS = {'fastai': Adam, 'wrapper': partial(OptimWrapper, opt=torch.optim.AdamW)}

@pytest.mark.parametrize('opt', OPTS)
def test_without_a_share_it_is_the_plain_fit(opt):
    a,b = (small(*cbs, opt_func=OPTS[opt]) for cbs in ([], [Distill(net(5), 0.)]))
    for o in (a, b): seeded(o, 2, 'fit_one_cycle')
    assert same(a, b) and a.recorder.values==b.recorder.values

def test_valid_loss_is_that_of_the_labels():
    "At learning rate 0 it does not depend on the teacher"
    values = [fit(small(*cbs, lr=0.), 1).recorder.values[0] for cbs in ([], [Distill(net(5))], [RDrop()])]
    assert len({o[1] for o in values})==1 and len({o[0] for o in values})==3

BESIDE = dict(nothing=list, loop=lambda: [FastLoop()], window=lambda: [GradientAccumulation(16)],
              guard=lambda: [SkipNonFinite()], sam=lambda: [SAM()], average=lambda: [EMA()])

@pytest.mark.parametrize('beside', BESIDE)
@pytest.mark.parametrize('make', [lambda: Distill(net(5)), RDrop], ids=['distill','rdrop'])
def test_it_acts_and_leaves_nothing(make, beside):
    plain,learn = (small(*cbs, *BESIDE[beside]()) for cbs in ([], [make()]))
    for o in (plain, learn): fit(o, 2, 'fine_tune')
    assert not same(plain, learn)
    for k in ('replaced','loaders','hooks'): assert traces(learn)[k]==traces(plain)[k]

def test_a_window_divides_the_whole_loss():
    "4 batches of 8 in a window: the mean of their gradients"
    class Grads(Callback):
        order = 3000
        def before_fit(self): self.rows = []
        def before_step(self): self.rows.append([p.grad.clone() for p in self.model.parameters()])
    model = partial(net, drop=0., norm=False)
    how = dict(model=model, opt_func=partial(SGD, mom=0.), lr=0.)
    fit(small(Distill(net(5)), one := Grads(), **how), 1)
    fit(small(Distill(net(5)), GradientAccumulation(32), two := Grads(), **how), 1)
    for a,b in zip(two.rows[0], zip(*one.rows)): torch.testing.assert_close(a, sum(b)/4)

@pytest.mark.parametrize('make', [lambda: Distill(net(5)), RDrop], ids=['distill','rdrop'])
def test_a_batch_in_pieces_has_the_same_loss(make):
    model = partial(net, drop=0., norm=False)
    a,b = (small(make(), *cbs, model=model) for cbs in ([], [MicroBatch(3)]))
    for o in (a, b): seeded(o, 2)
    for x,y in zip(weights(a), weights(b)): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)

def test_the_teacher_stays_as_it_was():
    teacher = net(5).train()
    before,random = deepcopy(teacher.state_dict()),None
    plain = fit(small(), 1); drawn = torch.rand(2)
    fit(small(Distill(teacher)), 1)
    assert torch.equal(torch.rand(2), drawn)        # it draws no random numbers
    assert teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    for k,v in teacher.state_dict().items(): assert torch.equal(v, before[k])

def test_no_file_has_the_teacher():
    learn = small(cb := Distill(small()))
    assert pickle.loads(pickle.dumps(cb)).teacher is None and deepcopy(learn).distill.teacher is None
    with pytest.raises(ValueError, match='has no teacher'): fit(deepcopy(learn))

def test_a_model_cannot_teach_itself():
    learn = small()
    with pytest.raises(ValueError, match='share weights'): fit(learn, cbs=Distill(learn.model))

@pytest.mark.parametrize('name', ['distill','rdrop'])
def test_a_resumed_run_has_the_same_bits(name, tmp_path):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==5: raise KeyboardInterrupt
    def run(*cbs):
        return fit(small(Distill(net(5)) if name=='distill' else RDrop(), *cbs), 3, 'fit_one_cycle')
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Stop(), Checkpoint(tmp_path, steps=1))
    assert same(run(Checkpoint(tmp_path, steps=1)), whole)

@pytest.mark.parametrize('make', [lambda: Distill(net(5)), RDrop], ids=['distill','rdrop'])
def test_under_a_loss_scaler(make):
    a,b = (small(make(), *cbs) for cbs in ([], [AnyMixedPrecision(torch.float32, 2.**10)]))
    for o in (a, b): seeded(o, 2)
    for x,y in zip(weights(a), weights(b)): torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)

def test_the_loss_of_rdrop():
    "Both calls are noted"
    outs = []
    learn = small(RDrop(.7), rows := Losses())
    def note(m, inputs, out):
        if m.training: outs.append(out.detach().clone())
    learn.model.register_forward_hook(note)
    fit(learn, 1)
    assert len(outs)==8
    for (value,pred,x,y),a,b in zip(rows.rows, outs[::2], outs[1::2]):
        assert torch.equal(pred, a) and not torch.equal(a, b)
        p,q = a.log_softmax(1),b.log_softmax(1)
        far = ((p.exp()*(p-q)).sum(1)+(q.exp()*(q-p)).sum(1)).mean()/2
        want = (F.cross_entropy(a, y)+F.cross_entropy(b, y))/2 + .7*far
        assert value==pytest.approx(want.item(), rel=1e-4)

def test_batch_norm_counts_a_batch_once():
    learn = fit(small(RDrop()), 2)
    assert learn.model[1].num_batches_tracked==8 and learn.model[1].track_running_stats
    model = partial(net, drop=0.)
    a,b = (fit(small(*cbs, model=model, lr=0.), 1) for cbs in ([], [RDrop()]))
    assert same(a, b)

def test_both_calls_of_a_language_model_begin_with_the_same_hidden_state():
    begins = []
    def note(m, inputs):
        if m.training: begins.append(m.hidden[0][0].clone())
    learn = text_learner([*rnn_cbs(0, 0), RDrop()], n=1000)
    learn.model[0].register_forward_pre_hook(note)
    fit(learn)
    firsts,seconds = begins[::2],begins[1::2]
    assert len(firsts)>2 and all(map(torch.equal, firsts, seconds)) and not torch.equal(firsts[1], firsts[2])

def test_without_dropout_it_says_so(capsys):
    fit(small(RDrop(), model=lambda: nn.Linear(6, 3)))
    assert 'finds no dropout' in capsys.readouterr().out

def test_positions_that_do_not_count():
    far = divergence('logits', nn.CrossEntropyLoss(ignore_index=1))
    a,b,y = torch.randn(2, 3, 4),torch.randn(2, 3, 4),torch.tensor([[0,1,2,1],[1,1,0,2]])
    each = F.kl_div(a.log_softmax(1), b.softmax(1), reduction='none').sum(1)
    torch.testing.assert_close(far(a, b, y, 1.), each[y!=1].mean())

@pytest.mark.parametrize('make,message', [
    (lambda: small(Distill(net(5)), loss='own'), 'it does not know what'),
    (lambda: small(Distill(nn.Linear(6, 2))), 'expected the same shape'),
    (lambda: small(RDrop(), mixup.MixUp()), 'mix_up mixes labels')])
def test_refused(make, message):
    LOSSES['own'] = (lambda x,y: (x.sum(1)-y).abs().mean(), lambda: torch.randn(32))
    with pytest.raises(ValueError) as e: fit(make())
    assert message in str(e.value)

@pytest.mark.parametrize('make', [lambda: Distill(3), lambda: Distill(net(), 2.),
                                  lambda: Distill(net(), temperature=0), lambda: RDrop(-1),
                                  lambda: RDrop(outputs='logit')])
def test_bad_arguments(make):
    with pytest.raises((ValueError,TypeError)): make()

def test_which_axis_has_the_classes():
    "Of a loss of one's own, that which the targets lack; where that is not clear, an error says so"
    far = divergence('logits', lambda pred,y: 0)
    a,b = torch.randn(2, 2, 3, 4).unbind()
    y = torch.randint(0, 4, (2, 3))
    want = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction='none', log_target=True).sum(-1).mean()
    for axis in (1, -1):
        torch.testing.assert_close(far(*(o.movedim(-1, axis) for o in (a, b)), y, 1.), want)
    square = torch.randn(2, 3, 3)
    for x,targ in ((square, y), (a, None), (a, y.flatten())):
        with pytest.raises(NotClear, match='which axis'): far(x, x, targ, 1.)
    assert far(square[0], square[1], None, 1.)>0        # of two axes, the last
