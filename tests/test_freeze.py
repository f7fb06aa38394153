"`BnFreeze`: which statistics stay, bit by bit, and that all else is as before"
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import BnFreeze as FastaisBnFreeze
from torch import nn
from fastai_callbacks_ext.all import *
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

def test_a_name_that_fits_nothing():
    said = "names='body': expected the beginning of a layer's name, one of 1, 4"
    with pytest.raises(ValueError, match=said):
        fit(learner(cbs=BnFreeze('body')))

def test_upgrade_swaps_fastais():
    assert any(isinstance(cb, BnFreeze) for cb in upgrade(learner(cbs=FastaisBnFreeze())).cbs)
