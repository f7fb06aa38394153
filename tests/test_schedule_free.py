"`ScheduleFree`: which weights are where, whatever happens in the fit"
from functools import partial

import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.optimizer import OptimWrapper
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.schedule_free import ScheduleFree
from fastai_callbacks_ext.test_utils import FreeSGD, digits_learner
from common import fit, learner, quiet

FREE = partial(OptimWrapper, opt=FreeSGD)
def free(*cbs, **kwargs): return learner(cbs=[ScheduleFree(), *cbs], opt_func=FREE, **kwargs)

class Seen(Callback):
    "All z; the weights in each validation, and at the end of each epoch"
    order,name = 100,'seen'
    def before_fit(self): self.zs,self.valid,self.ends = [],[],[]
    def p(self): return next(self.model.parameters())
    def after_step(self): self.zs.append(self.opt.opt.state[self.p()]['z'].clone())
    def before_validate(self): self.valid.append(self.p().detach().clone())
    def after_epoch(self): self.ends.append(self.p().detach().clone())

def mean(zs): return torch.stack(zs).mean(0)
def close(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('cbs', [list, lambda: [FastLoop()], lambda: [SkipNonFinite(), GradientClip(9.)]])
def test_validation_and_the_end_have_the_average(cbs):
    learn = fit(free(seen := Seen(), *cbs()), 3, lr=.05)
    for i in range(3):
        close(seen.valid[i], mean(seen.zs[:4*i+4]))
        close(seen.ends[i], seen.valid[i])
    close(seen.p(), mean(seen.zs))
    last = learn.recorder.values[-1][1]
    with quiet(learn): assert learn.validate()[0]==pytest.approx(last, abs=1e-5)

def test_a_look_in_mid_epoch_has_the_average():
    "And the fit goes on at the weights for training"
    class Look(Callback):
        order,run_valid = 200,False
        def after_batch(self):
            if self.train_iter!=6: return
            before = self.seen.p().detach().clone()
            zs,valid,ends = self.seen.zs,self.seen.valid,self.seen.ends
            self.learn.validate()
            close(self.seen.valid[-1], mean(zs))
            close(self.seen.p(), before)
            assert not torch.equal(before, self.seen.valid[-1])
            self.seen.zs,self.seen.valid,self.seen.ends = zs,valid,ends
    fit(free(seen := Seen(), Look()), 3, lr=.05)
    close(seen.p(), mean(seen.zs))

@pytest.mark.parametrize('error', [KeyboardInterrupt, CancelFitException, ValueError('no')])
def test_however_the_fit_ends(error):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==6: raise error
    learn = free(seen := Seen(), Stop())
    try: fit(learn, 3, lr=.05)
    except (KeyboardInterrupt, ValueError): pass
    close(next(learn.model.parameters()), mean(seen.zs))
    assert not learn.opt.opt.param_groups[0]['training']

def test_lr_find_switches_too():
    class Watch(Callback):
        order,seen = 100,()
        def before_batch(self): self.seen += (self.opt.opt.param_groups[0]['training'],)
    learn = free(watch := Watch())
    with quiet(learn): learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert len(watch.seen)>5 and all(watch.seen) and not learn.opt.opt.param_groups[0]['training']

def test_a_second_fit_goes_on():
    learn = free(seen := Seen())
    fit(learn, 1, lr=.05)
    first = list(seen.zs)
    fit(learn, 1, lr=.05)
    close(next(learn.model.parameters()), mean(first+seen.zs))

@pytest.mark.parametrize('at', [3, 6])
def test_a_resumed_run_has_the_same_bits(at, tmp_path):
    class Stop(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==at: raise KeyboardInterrupt
    def run(*cbs): return fit(free(*cbs), 3, lr=.05)
    whole = run()
    with pytest.raises(KeyboardInterrupt): run(Stop(), Checkpoint(tmp_path, steps=1))
    again = run(Checkpoint(tmp_path, steps=1))
    a,b = (o.model.state_dict() for o in (again, whole))
    for k in a: assert torch.equal(a[k], b[k])

def test_statistics_of_batch_norm_are_those_of_the_average():
    "As `refresh_batchnorm` computes them outside"
    learn = fit(free(), 2, lr=.05)
    before = learn.model[1].running_mean.clone()
    refresh_batchnorm(learn)
    torch.testing.assert_close(before, learn.model[1].running_mean, rtol=.1, atol=.02)
    plain = fit(learner(cbs=ScheduleFree(refresh=False), opt_func=FREE), 2, lr=.05)
    assert not torch.equal(plain.model[1].running_mean, before)

def test_a_schedule_is_said(capsys):
    fit(free(), 1, 'fit_one_cycle')
    assert 'runs beside a schedule' in capsys.readouterr().out

def test_other_optimizers_are_refused():
    with pytest.raises(ValueError, match='has no train.. and eval..; expected one that has, such as'):
        fit(digits_learner([ScheduleFree()], n=160, bs=32))

class Noting(FreeSGD):
    "Adds a number to its groups when it steps"
    def step(self, closure=None):
        super().step(closure)
        for g in self.param_groups: g['noted'] = g['lr']

def test_an_optimizer_may_keep_notes_in_its_groups():
    "With batch norm there is a pass in each epoch, after which the hyper-parameters are put back"
    learn = fit(digits_learner(ScheduleFree(), n=160, opt_func=partial(OptimWrapper, opt=Noting)), 2, lr=.05)
    assert learn.opt.hypers[0]['noted']==learn.opt.hypers[0]['lr']==.05
