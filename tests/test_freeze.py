"`Freeze` and `BnFreeze`: what stays, bit by bit, and that all else is as before"
import copy, pickle
from functools import partial

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import BnFreeze as FastaisBnFreeze
from fastai.learner import load_learner
from fastai.optimizer import SGD, Adam, OptimWrapper, ranger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.freeze import Freeze
from test_safety import AnyMixedPrecision
from common import fit, learner

def two_groups(model): return [list(model[:4].parameters()), list(model[4:].parameters())]

def statistics(learn):
    names = 'running_mean','running_var','num_batches_tracked'
    return {n: b.clone() for n,b in learn.model.named_buffers() if n.endswith(names)}

def changed(cbs, method='fit', freeze=False, n=1, **kwargs):
    "The layers whose statistics a fit changes"
    learn = learner(cbs=cbs, splitter=two_groups, **kwargs)
    if freeze: learn.freeze()
    before = statistics(learn)
    fit(learn, n, method)
    return {n.split('.')[0] for n,b in statistics(learn).items() if not torch.equal(b, before[n])}

BESIDE = [list, lambda: [FastLoop()], lambda: [EMA()], lambda: [SWA()], lambda: [SAM()],
          lambda: [GradientAccumulation(64)], lambda: [SkipNonFinite()]]

@pytest.mark.parametrize('cbs', BESIDE)
def test_statistics_stay(cbs):
    assert changed([BnFreeze(), *cbs()])==set()
    assert changed([BnFreeze('1'), *cbs()])=={'4'}
    assert changed([BnFreeze(('1','4')), *cbs()])==set()

def test_those_of_frozen_groups():
    assert changed([BnFreeze()], freeze=True)=={'4'}            # the head learns its own
    assert changed([FastaisBnFreeze()], freeze=True)=={'1','4'}

def test_fine_tune(capsys):
    "First the body, then all"
    assert changed([BnFreeze()], 'fine_tune')=={'4'}
    said = capsys.readouterr().out
    assert 'keeps the statistics of 1 layer in' in said and 'keeps the statistics of 2 layers' in said

class Validates(Callback):
    "A validation in mid-epoch ends in training mode"
    def after_batch(self):
        if self.training and self.iter==1: self.model.train()

def test_an_average_without_a_validation():
    assert changed([BnFreeze(), SWA(validate='raw')])==set()

def test_it_is_silent_outside_of_a_fit(capsys):
    learn = learner(cbs=BnFreeze())
    with learn.no_bar(): learn.validate(), learn.get_preds()
    assert 'keeps' not in capsys.readouterr().out

def test_whoever_puts_the_model_into_training_mode(): assert changed([BnFreeze(), Validates()])==set()

def test_weights_of_batch_norm_are_trained():
    learn = learner(cbs=BnFreeze())
    before = learn.model[1].weight.clone()
    fit(learn)
    assert not torch.equal(learn.model[1].weight, before)

def test_modes_are_put_back():
    class Fails(Callback):
        def after_batch(self): raise ValueError('no')
    learn = learner(cbs=[BnFreeze(), Fails()])
    with pytest.raises(ValueError): fit(learn)
    assert learn.model.training and all(m.training for m in learn.model.modules())

def test_layers_without_weights_and_models_without_batch_norm(capsys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 10))
    parts = lambda m: [list(m[:2].parameters()), list(m[3].parameters())]
    learn = learner(cbs=BnFreeze(), model=model, splitter=parts)
    learn.freeze()
    fit(learn)
    fit(learner(cbs=BnFreeze(), model=nn.Sequential(nn.Flatten(), nn.Linear(64, 10))))
    assert 'keeps the statistics of 0 layers' in capsys.readouterr().out

def test_new_layers_are_named(capsys):
    fit(learner(cbs=BnFreeze()))
    assert '2 of them without a batch so far, such as 1' in capsys.readouterr().out

def test_a_name_ends_at_a_dot():
    "'1' is not 10"
    layers = [nn.Flatten(), nn.BatchNorm1d(64), *[nn.Identity()]*8, nn.BatchNorm1d(64), nn.Linear(64, 10)]
    learn = learner(cbs=BnFreeze('1'), model=nn.Sequential(*layers))
    fit(learn)
    assert not learn.model[1].num_batches_tracked and learn.model[10].num_batches_tracked

def test_a_name_that_fits_nothing():
    said = "names='body': expected the beginning of a layer's name, one of 1, 4"
    with pytest.raises(ValueError, match=said):
        fit(learner(cbs=BnFreeze('body')))

def test_upgrade_swaps_fastais():
    assert any(isinstance(cb, BnFreeze) for cb in upgrade(learner(cbs=FastaisBnFreeze())).cbs)

# --- Freeze ---------------------------------------------------------------------------------------
# In groups of three layers: the convolutions with their batch norm, and the head
def three_groups(model): return [list(model[i:j].parameters()) for i,j in ((0,3), (3,6), (6,None))]
def body(name): return name[0] in '01'
OPTS = dict(fastai=Adam, sgd=partial(SGD, mom=.9), around=ranger,
            wrapper=partial(OptimWrapper, opt=torch.optim.AdamW))
def scaler(): return AnyMixedPrecision(torch.float32, 2.**10)

class Moves(Callback):
    "Which groups move in which step; which have a gradient"
    order,run_valid = 3000,False
    def before_fit(self): self.moved,self.grads,self.lrs = [],[],[]
    def before_batch(self): self.was = [[p.detach().clone() for p in g] for g in self.opt.param_lists]
    def before_step(self):
        self.grads.append([any(p.grad is not None for p in g) for g in self.opt.param_lists])
    def after_batch(self):
        now = self.opt.param_lists
        self.moved.append([any(not torch.equal(p, w) for p,w in zip(*o)) for o in zip(now, self.was)])
        self.lrs.append([h['lr'] for h in self.opt.hypers])

def three(*cbs, train_bn=False, **kwargs):
    "A learner with three groups that were all trained before, with momentum and weight decay"
    learn = learner(splitter=three_groups, wd=.1, train_bn=train_bn, **kwargs)
    fit(learn, 1)
    return learn.add_cbs(cbs)

def frozen(moved): return [row.index(True) for row in moved]     # number of groups that stay
def steady(moved): return all(row==sorted(row) for row in moved)

BESIDE_FREEZE = dict(
    alone=list, loop=lambda: [FastLoop()], sam=lambda: [SAM()], ema=lambda: [EMA()],
    swa=lambda: [SWA(start=0)],
    lookahead=lambda: [LookaheadWeights(k=5)], noise=lambda: [GradientNoise()],
    skip=lambda: [SkipNonFinite()],
    clip=lambda: [GradientClip(.1), GradientCentralization()], scaler=lambda: [scaler()],
    all=lambda: [scaler(), FastLoop(), SAM(), GradientClip(.1), LayerStats()])

@pytest.mark.parametrize('beside', BESIDE_FREEZE)
@pytest.mark.parametrize('opt', OPTS)
def test_frozen_weights_stay(opt, beside):
    "Thawed from the head to the input, and frozen again; an epoch has 4 batches"
    learn = three(Freeze({0:-1, 1:-2, 2:0, 3:-1}), moves := Moves(), opt_func=OPTS[opt])
    fit(learn, 4, 'fit_one_cycle', cbs=BESIDE_FREEZE[beside]())
    assert steady(moves.moved) and steady(moves.grads)
    assert frozen(moves.moved)==[2]*4+[1]*4+[0]*4+[2]*4

@pytest.mark.parametrize('schedule,unit,expected', [
    ({0:2}, 'epochs', [2]*12), ({0:['0','1'], 1:0}, 'epochs', [1]*4+[0]*8),
    ({0:-1, 3:1, 5:0}, 'steps', [2]*3+[1]*2+[0]*7),
    ({0:-1, .5:0}, 'pct', [2]*6+[0]*6), ({0:['0','1','3','4'], 1:body}, 'epochs', [2]*4+[1]*8),
    ({0:0, 2:'[013]*'}, 'epochs', [0]*8+[1]*4)])
@pytest.mark.parametrize('method', ['fit','fit_one_cycle'])
def test_when_and_what(schedule, unit, expected, method):
    learn = three(Freeze(schedule, unit), moves := Moves())
    fit(learn, 3, method)
    assert frozen(moves.moved)==expected

def test_unfrozen_groups_join_the_schedule():
    rates = []
    for cbs in ([], [Freeze()]):
        fit(three(*cbs, moves := Moves()), 3, 'fit_one_cycle')
        rates.append(moves.lrs)
    assert rates[0]==rates[1]

@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('n', [-1, 1, 2, 0])
def test_it_freezes_what_freeze_to_freezes(n, train_bn):
    class Look(Callback):
        order = 80
        def before_batch(self): self.seen = trained(self.learn)
    learn,other = (three(train_bn=train_bn) for _ in range(2))
    fit(learn, 1, cbs=[Freeze({0:n}), look := Look()])
    other.freeze_to(n)
    assert look.seen==trained(other)

@pytest.mark.parametrize('unit,key', [('steps',1), ('pct',.1), ('epochs',1)])
def test_under_accumulation_it_waits_for_the_next_step(unit, key):
    "Two batches are a step; the weights that are thawed get a whole gradient"
    def run(*cbs):
        fit(three(*cbs, moves := Moves()), 2, cbs=GradientAccumulation(64))
        return moves
    moves = run(Freeze({0:-1, key:0}, unit))
    first = dict(steps=1, pct=1, epochs=2)[unit]
    assert [row.index(True) for row in moves.moved if any(row)]==[2]*first+[0]*(4-first)
    assert [g.index(True) for g in moves.grads]==[2]*len([g for g in moves.grads if not g[0]])+[0]*len(
        [g for g in moves.grads if g[0]])

class Stop(Callback):
    order = 3000
    def __init__(self, epoch=1, batch=2): self.at = epoch,batch
    def after_batch(self):
        if self.training and (self.epoch,self.iter)==self.at: raise KeyboardInterrupt

def trained(learn): return [p.requires_grad for p in learn.model.parameters()],learn.opt.frozen_idx

@pytest.mark.parametrize('freeze', [False, True])
@pytest.mark.parametrize('how', ['end','error','taken off'])
def test_it_puts_back(freeze, how):
    class Off(Callback):
        def after_epoch(self): self.learn.remove_cb(Freeze) if how=='taken off' else None
    learn = three(Freeze({0:-1, 1:-2}), Off())
    if freeze: learn.freeze()
    before = trained(learn)
    if how=='error':
        with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=Stop())
    else: fit(learn, 3)
    assert trained(learn)==before
    assert all(p.grad is None for p in learn.model.parameters() if not p.requires_grad)

def test_keep_leaves_the_last_state():
    learn = three(Freeze({0:-1, 1:-2}, keep=True))
    fit(learn, 2)
    assert learn.opt.frozen_idx==1 and not next(learn.model.parameters()).requires_grad
    fit(learn, 1)
    assert learn.opt.frozen_idx==2

def test_both_fits_of_fine_tune_and_a_second_fit(capsys):
    learn = three(cb := Freeze({0:-1, 1:0}), moves := Moves())
    fit(learn, 2, 'fine_tune', freeze_epochs=2)
    assert frozen(moves.moved)==[2]*4+[0]*4 and trained(learn)==([True]*10, 0)
    fit(learn, 1)
    assert frozen(moves.moved)==[2]*4
    said = capsys.readouterr().out
    assert 'this fit ends before epoch 1 of the schedule' in said
    assert 'trains 1,290 of 6,186 weights in epoch 0: the first 2 of 3 parameter groups are frozen' in said

@pytest.mark.parametrize('opt', ['fastai','wrapper'])
@pytest.mark.parametrize('schedule,unit', [
    ({0:-1, 1:-2, 2:0}, 'epochs'), ({0:'0', 6:0, 9:['0','1']}, 'steps'), ({0:-1, .45:0}, 'pct')])
@pytest.mark.parametrize('beside', [list, lambda: [GradientAccumulation(64), FastLoop()]])
def test_a_resumed_run_goes_on_with_its_entry(tmp_path, schedule, unit, opt, beside):
    def run(*cbs):
        cbs = [Freeze(schedule, unit), *beside(), *cbs]
        return fit(learner(cbs=cbs, splitter=three_groups, opt_func=OPTS[opt]), 3, 'fit_one_cycle')
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Stop(), Checkpoint(tmp_path, steps=1))
    resumed = run(moves := Moves(), Checkpoint(tmp_path, steps=1))
    assert len(moves.moved)<12
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    assert trained(resumed)==trained(whole)==([True]*10, 0)
    assert resumed.freezing.state_dict()==whole.freezing.state_dict()

@pytest.mark.parametrize('keep', [True, False])
def test_it_resumes_in_the_same_process_and_finds_the_end(tmp_path, keep):
    cbs = [Freeze({0:-1, 1:-2}, keep=keep), Checkpoint(tmp_path, steps=1)]
    learn = learner(cbs=cbs, splitter=three_groups)
    with pytest.raises(KeyboardInterrupt): fit(learn, 3, cbs=Stop())
    fit(learn, 3)
    after = trained(learn)
    again = learner(cbs=[Freeze({0:-1, 1:-2}, keep=keep)], splitter=three_groups)
    Checkpoint._finished.clear()
    fit(again, 3, cbs=Checkpoint(tmp_path, steps=1))
    assert trained(again)==after and after[1]==(1 if keep else 0)
    assert all(map(torch.equal, again.model.parameters(), learn.model.parameters()))

def test_another_schedule_is_another_run(tmp_path):
    def run(schedule, *cbs):
        return fit(learner(cbs=[Freeze(schedule), Checkpoint(tmp_path), *cbs], splitter=three_groups), 3)
    with pytest.raises(KeyboardInterrupt): run({0:-1, 1:0}, Stop())
    with pytest.raises(ValueError, match='Freeze'): run({0:-1, 2:0})

def test_layer_stats_say_what_is_frozen(capsys):
    fit(three(Freeze({0:'0'}), LayerStats(every=1)), 2)
    assert 'found 2 of 10 parameters frozen' in capsys.readouterr().out

def test_thawed_weights_join_an_average():
    learn = three(Freeze({0:-1, 1:0}), ema := EMA(.5, start=0), train_bn=True)
    fit(learn, 2)
    raw = {n: t.clone() for n,t in learn.model.named_parameters()}
    ema.use('raw')
    assert any(not torch.equal(p, raw[n]) for n,p in learn.model.named_parameters() if n[0]=='0')

def test_bn_freeze_takes_what_is_frozen_at_the_start(capsys):
    learn = three(Freeze({0:1, 1:0}), BnFreeze(), train_bn=True)
    before = statistics(learn)
    fit(learn, 2)
    assert {n[0] for n,b in statistics(learn).items() if not torch.equal(b, before[n])}=={'4'}

def test_the_method_of_the_learner_stays():
    learn = three(Freeze())
    learn.freeze()
    assert learn.opt.frozen_idx==2 and learn.freezing is learn.cbs[-1]

def test_copies_and_exports(tmp_path):
    learn = three(Freeze({0:body, 1:0}))
    fit(copy.deepcopy(learn), 1), fit(pickle.loads(pickle.dumps(learn)), 1)
    fit(learn, 1)
    learn.export(tmp_path/'end.pkl')
    assert isinstance(load_learner(tmp_path/'end.pkl').freezing, Freeze)

def test_with_a_loader_of_pytorch():
    learn = three(Freeze({0:-1, 1:0}), moves := Moves())
    items = [o for o in learn.dls.train_ds]
    data = TensorDataset(torch.stack([o[0] for o in items]), torch.stack([o[1] for o in items]))
    learn.dls = type(learn.dls)(*[DataLoader(data, batch_size=32) for _ in range(2)])
    fit(learn, 2)
    assert frozen(moves.moved)==[2]*4+[0]*4

class DistributedDataParallel(nn.Module):
    "As the real one looks to a callback"
    require_backward_grad_sync = True
    def __init__(self, module): super().__init__(); self.module = module
    def forward(self, x): return self.module(x)

class Wraps(Callback):
    "As `DistributedTrainer`: around each fit"
    order = 11
    def before_fit(self): self.learn.model = DistributedDataParallel(self.model)
    def after_fit(self): self.learn.model = self.model.module

def test_in_several_processes_one_entry_only():
    fit(three(Freeze({0:-1}), Wraps()), 1)
    with pytest.raises(ValueError, match='expected a schedule with one entry'):
        fit(three(Freeze(), Wraps()), 1)
    learn = three(Freeze({0:-1}))
    learn.model = DistributedDataParallel(learn.model)
    with pytest.raises(ValueError, match='in DistributedDataParallel'): fit(learn, 1)

@pytest.mark.parametrize('schedule,unit,message', [
    ({1:0}, 'epochs', 'keys that begin with 0 and increase'), ({}, 'epochs', 'keys that begin with 0'),
    ({0:0, 2:1, 1:0}, 'epochs', 'keys that begin with 0 and increase'),
    ({0:True}, 'epochs', 'schedule: True:'),
    ({0:[]}, 'epochs', 'expected a number of groups'), ({0:0, .5:1}, 'epochs', 'expected int'),
    ({0:0, 1.:1}, 'pct', 'expected less than 1'), ({0:0}, 'batches', "unit='batches'"),
    ([0], 'epochs', 'expected dict')])
def test_refused_when_it_is_made(schedule, unit, message):
    with pytest.raises((ValueError, TypeError)) as e: Freeze(schedule, unit)
    assert message in str(e.value)

@pytest.mark.parametrize('schedule,message', [
    ({0:-1, 1:3}, '3: the learner has 3 parameter groups; expected -3 to 2'), ({0:-4}, 'expected -3 to 2'),
    ({0:-1, 1:'8.weihgt'}, "there are: 0, 1, 3, 4, 8; did you mean '8.weight'?"),
    ({0:''}, "schedule=''"), ({0:'*'}, 'freezes the whole model'),
    ({0:lambda n: False}, 'true for none of 0, 1')])
def test_refused_at_the_start_of_a_fit(schedule, message):
    learn = three(Freeze(schedule))
    before = trained(learn)
    with pytest.raises(ValueError) as e: fit(learn, 2)
    assert message in str(e.value) and trained(learn)==before

def test_one_group_and_weights_that_the_optimizer_lacks():
    with pytest.raises(ValueError, match='has one parameter group'): fit(learner(cbs=Freeze()), 1)
    learn = learner(cbs=[Freeze({0:'0', 1:0})])
    learn.model[0].requires_grad_(False)
    with pytest.raises(ValueError, match='the optimizer does not have 0.weight, 0.bias: frozen when'):
        fit(learn, 1)
    learn.model.requires_grad_(True), learn.create_opt()
    fit(learn, 2)
    always = learner(cbs=[Freeze({0:['0','3'], 1:'0'})])
    always.model[0].requires_grad_(False)
    fit(always, 2)
