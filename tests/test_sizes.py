"`ProgressiveResize`, `BatchSizeSchedule`, `SeqLenSchedule` beside others; runs that are resumed"
from functools import partial

import numpy as np
import pytest, torch
from fastai.callback import mixup as fastais
from fastai.callback.core import Callback
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import set_seed
from torch import nn
import fastai_callbacks_ext.all as ext
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.hypers import FitSteps
from fastai_callbacks_ext.sizes import BatchSizeSchedule, ProgressiveResize, SeqLenSchedule
from fastai_callbacks_ext.test_utils import digits_learner, text_learner
from common import RNN, fit, quiet, traces
from crash import digests
from settings import SETTINGS

def pooled(p=.1):
    "Reads digits of any size"
    def block(i, o): return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block(1, 8), *block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p),
                         nn.Linear(16, 10))

def digits(*cbs, n=250, bs=32, **kwargs):
    set_seed(42)
    return digits_learner([*cbs], n=n, bs=bs, model=pooled(), **kwargs)

def text(*cbs, **kwargs): return text_learner([*(o() for o in RNN), *cbs], n=2000, **kwargs)

RESIZE = partial(ProgressiveResize, multiple=2)
BATCHES = partial(BatchSizeSchedule, {0: 16, 1: 25, 2: 64})
WORDS = partial(SeqLenSchedule, 4, multiple=4)
ALL = dict(images=(digits, RESIZE), batches=(digits, BATCHES), words=(text, WORDS),
           text_batches=(text, partial(BatchSizeSchedule, {0: 4, 1: 8})))
each = pytest.mark.parametrize('kind', ALL)
def learner(kind, *cbs, **kwargs):
    make,cb = ALL[kind]
    return make(cb(), *cbs, **kwargs)

class Seen(Callback):
    "What each batch is trained on, and where the fit is"
    order,run_valid = 100,False
    def before_fit(self): self.shapes,self.pct,self.lrs = [],[],[]
    def before_batch(self):
        self.shapes.append(tuple(self.x.shape))
        self.pct.append(self.pct_train)
        self.lrs.append(self.opt.hypers[-1]['lr'])
    def after_fit(self): self.end = self.pct_train
    @property
    def items(self): return [o[0] for o in self.shapes]

# --- schedules ----------------------------------------------------------------------------------
@pytest.mark.parametrize('loop', [[], [FastLoop]])
@each
def test_the_fit_is_over_when_its_items_are(kind, loop):
    learn = fit(learner(kind, seen := Seen(), *(o() for o in loop)), 3, 'fit_one_cycle')
    assert seen.end==pytest.approx(1) and np.all(np.diff(seen.pct)>0)
    per_epoch = {'words': lambda o: o[0]*o[1], 'text_batches': lambda o: o[0]*o[1]}.get(kind, lambda o: o[0])
    done = np.cumsum([0, *map(per_epoch, seen.shapes)])
    assert np.allclose(seen.pct, done[:-1]/done[-1], atol=.03)

@pytest.mark.parametrize('cbs', [(), (partial(GradientAccumulation, 50),),
                                 (partial(GradientAccumulation, lambda epoch,step: 20+30*epoch),)])
@pytest.mark.parametrize('unit,lengths', [('pct',(.25,.5)), ('epochs',(1,2)), ('steps',(5,8))])
def test_a_schedule_knows_all_steps_of_the_fit(cbs, unit, lengths):
    "It ends at 0 in the last step, whose number is known beforehand"
    class Steps(Callback):
        order = 3000
        def before_fit(self): self.n,self.planned = 0,FitSteps(self.learn).total
        def after_step(self): self.n += 1
        def after_cancel_step(self): self.n -= 1
    warm,end = lengths
    sched = Schedule({'lr': [ext.Warmup(warm), ext.Flat(), ext.Decay(end)]}, unit=unit)
    learn = digits(BATCHES(), sched, seen := Seen(), steps := Steps(), *(o() for o in cbs))
    fit(learn, 4, lr=1.)
    assert steps.n==steps.planned
    assert seen.lrs[0]==0 and 0<seen.lrs[-1]<.2 and max(seen.lrs)==1
    if unit=='steps' or cbs: return
    flat = [i for i,lr in enumerate(seen.lrs) if lr==1]
    starts = np.cumsum([0, 12, 8, 3, 3])      # of the epochs, in batches
    assert flat==list(range(starts[1], starts[2]+1))

def test_shares_of_a_schedule_are_shares_of_the_items():
    "The rate at the same item is that of the usual batches"
    def rates(*cbs):
        fit(digits(Schedule.linear(warmup=.25), seen := Seen(), *cbs, n=320), 4, lr=1.)
        return {round(k, 9): v for k,v in zip(seen.pct, seen.lrs)}
    a,b = rates(),rates(BatchSizeSchedule({0: 16, 2: 64}))
    both = a.keys() & b.keys()
    assert len(both)>=24 and all(a[k]==pytest.approx(b[k], abs=1e-9) for k in both)

def test_images_of_one_step_have_one_size():
    class Windows(Callback):
        order,run_valid = 3000,False
        def before_fit(self): self.all,self.now = [],[]
        def after_backward(self): self.now.append(self.x.shape[-1])
        def after_step(self): self.all.append(self.now); self.now = []
    learn = digits(RESIZE(multiple=1), GradientAccumulation(64), windows := Windows())
    fit(learn, 4)
    assert len({*sum(windows.all, [])})>3 and all(len({*o})==1 for o in windows.all)

# --- beside others --------------------------------------------------------------------------------
@pytest.mark.parametrize('cbs', [
    (FastLoop,), (partial(GradientAccumulation, 64),), (partial(ext.MicroBatch, 10),), (ext.MixUp,),
    (ext.CutMix,), (fastais.MixUp,), (partial(SAM, .05),), (EMA,), (GradientClip,), (ext.ItemStats,),
    (SkipNonFinite,), (ext.AWP,), (ext.RDrop,), (partial(ext.ActivationStats, every=1),)])
@pytest.mark.parametrize('kind', ['images','batches'])
def test_beside(kind, cbs):
    "With both kinds of optimizers, in `fine_tune`; nothing is left behind"
    for opt in (Adam, partial(OptimWrapper, opt=torch.optim.AdamW)):
        learn = learner(kind, *(o() for o in cbs), opt_func=opt)
        fit(learn, 1)
        before = traces(learn)
        fit(learn, 2, 'fine_tune')
        assert traces(learn)==before and all(p.isfinite().all() for p in learn.model.parameters())

@pytest.mark.parametrize('loop', [[], [FastLoop]])
def test_off_is_bit_identical(loop):
    for kind,off in dict(images=RESIZE(grow=(0,0)), batches=BatchSizeSchedule({0: 32}),
                         words=WORDS(grow=(0,0)), text_batches=BatchSizeSchedule({0: 16})).items():
        make,_ = ALL[kind]
        a,b = (fit(make(*cbs, *(o() for o in loop)), 2, 'fit_one_cycle') for cbs in ([], [off]))
        assert digests(a)==digests(b) and not off.records

def test_mixing_is_done_on_small_images():
    "So masks and rectangles have the size of the images"
    learn = SETTINGS['unet'](cbs=[ext.CutMix(), cb := ProgressiveResize(multiple=4), seen := Seen()])
    fit(learn, 2)
    assert [o[-2:] for o in seen.shapes][0]==(12,12) and seen.shapes[-1][-2:]==(24,24)
    assert cb.records[-1].what=='trains on whole images'

@pytest.mark.parametrize('kind', ['images','batches'])
def test_items_keep_their_names(kind):
    "Statistics of each item are of that item, and a guard names those of the bad batch"
    learn = digits(ALL[kind][1](), stats := ext.ItemStats())
    fit(learn, 3)
    table = stats.table()
    assert set(table.seen if 'seen' in table else table['times seen'])<={2,3} and len(table)==200
    class Bad(Callback):
        "One item is NaN"
        order = -10**6-3
        def before_batch(self):
            if not self.training or self.train_iter!=9: return
            x = self.x.clone()
            x[3] = torch.nan
            self.learn.xb = x,
    learn = digits(ALL[kind][1](), Bad(), guard := SkipNonFinite())
    class Order(Callback):
        def before_batch(self):
            if self.training and self.train_iter==9: self.idxs = list(self.learn.dls.train._DataLoader__idxs)
    learn.add_cb(order := Order())
    fit(learn, 3)
    bs,at = (32,9-6) if kind=='images' else (16,9)
    assert f'item {order.idxs[at*bs+3]}' in str(guard.records[0]).replace('items','item').replace('[','')

def test_statistics_of_batch_norm_are_computed_on_whole_images():
    sizes = []
    learn = digits(RESIZE(grow=(0,1)), SWA(start=.5))
    learn.model[0].register_forward_hook(lambda m,x,y: sizes.append(x[0].shape[-1]))
    fit(learn, 3)
    assert sizes[-1]==8

# --- exact resume ---------------------------------------------------------------------------------
class Stop(Callback):
    order = 3000
    def __init__(self, epoch, batch): self.at = epoch,batch
    def after_batch(self):
        if self.training and (self.epoch,self.iter)==self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('at', [(0,1), (1,2), (2,0)])
@pytest.mark.parametrize('cbs', [(), (FastLoop, partial(GradientAccumulation, 50))])
@each
def test_a_resumed_run_has_the_same_bits(kind, at, cbs, tmp_path):
    def run(*more):
        learn = learner(kind, *(o() for o in cbs))
        try: fit(learn, 4, 'fit_one_cycle', cbs=more)
        except KeyboardInterrupt: pass
        return learn
    whole,first = run(),run(Stop(*at), Checkpoint(tmp_path, steps=1, epochs=None))
    sizes = lambda learn: {k: v for k,v in vars(learn.dls.train).items() if type(v) is int}
    assert sizes(first)==sizes(whole)
    resumed = run(Checkpoint(tmp_path, steps=1, epochs=None))
    assert digests(resumed)==digests(whole) and sizes(resumed)==sizes(whole)
    own = lambda learn: next(cb for cb in learn.cbs if type(cb).__module__.endswith('.sizes'))
    assert own(resumed).state_dict()==own(whole).state_dict()

def test_a_finished_run_that_is_found_again_leaves_the_loader(tmp_path):
    for _ in range(2):
        learn = fit(learner('batches', Checkpoint(tmp_path)), 3)
        assert learn.dls.train.bs==32
        Checkpoint._finished.clear()

# --- text classifiers -----------------------------------------------------------------------------
def test_a_text_classifier_of_fastai_reads_short_texts():
    learn = SETTINGS['text_classifier'](cbs=[cb := SeqLenSchedule(8), seen := Seen()])
    fit(learn, 4)
    lengths = [o[1] for o in seen.shapes]
    half = len(lengths)//2
    assert lengths[0]==8 and max(lengths)>40 and lengths[:half]==sorted(lengths[:half])
    assert [r.what for r in cb.records]==['cuts texts to 8 words', 'trains on whole texts']

@pytest.mark.parametrize('kind', ['language_model','text_classifier'])
def test_the_two_fits_of_fine_tune(kind):
    learn = SETTINGS[kind](cbs=[cb := SeqLenSchedule(8, frozen='start'), seen := Seen()])
    first = []
    class Note(Callback):
        def after_fit(self): first.append(list(self.seen.shapes))
    fit(learn, 2, 'fine_tune', cbs=Note())
    assert max(o[1] for o in first[0])==8 and first[1][0][1]==8 and max(o[1] for o in first[1])>8

@pytest.mark.parametrize('kind', [o for o in ALL if o!='images'])
def test_taken_off_in_an_epoch(kind):
    "The epoch ends as it began, and the next has the loader's own size"
    class Off(Callback):
        def after_batch(self):
            if self.training and self.train_iter==2: self.learn.remove_cb(cb)
    make,new = ALL[kind]
    def shapes(*cbs, n=2):
        fit(make(*cbs, seen := Seen()), n)
        return seen.shapes
    whole,grown = shapes(),shapes(new(), n=1)       # a fit of one epoch, for text at its start
    short = shapes(cb := new(), Off())
    assert short==grown+whole[len(whole)//2:] and grown!=whole[:len(whole)//2]
