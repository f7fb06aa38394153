"Numbers of each training item: right whatever draws the items, whatever the loss, in any fit; no harm done"
import contextlib, io, random
from functools import partial
from pathlib import Path

import numpy as np
import pytest, torch
from fastai.callback.all import GradientAccumulation as FastaisAccumulation
from fastai.callback.all import CutMix, MixUp
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelFitException,
                                  CancelStepException)
from fastai.callback.data import WeightedDL
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader, SkipItemException
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.text.data import SortedDL
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset, TensorDataset
from fastai_callbacks_ext import items
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.base.labels import label_numbers, output_kind
from fastai_callbacks_ext.test_utils import PoisonBatch, digits_learner, text_learner
from common import fit, learner, quiet

@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)

G = torch.Generator().manual_seed(1)
X,Y = torch.randn(50, 4, generator=G),torch.randint(3, (50,), generator=G)
X[:,0] = torch.arange(50.)      # so that the true items can be seen in the batch
ITEMS = list(zip(X, Y))

class Truth(Callback):
    "What is in a batch by its content, whatever the loader says"
    order,run_valid = 5,False
    def before_fit(self): self.seen = []
    def after_backward(self):
        batch = [round(o) for o in self.xb[0][:,0].tolist()],self.pred.detach().clone(),self.yb[0].clone()
        self.seen.append(batch)

def expected(seen, loss_func=nn.CrossEntropyLoss()):
    "The numbers by their definitions, item after item"
    history = {}
    for items,pred,targ in seen:
        for i,found in zip(items, label_numbers(output_kind(loss_func), loss_func)(pred, targ).T.tolist()):
            history.setdefault(i, []).append(found)
    res = {}
    for i,rows in history.items():
        p,margin,right = np.array(rows).T[:3]
        forgotten = sum((right[:-1]==1) & (right[1:]==0))
        res[i] = p.mean(),p.std(),margin.mean(),forgotten,len(p),np.minimum(margin, 1).mean()
    return res

def assert_right(stats, seen, loss_func=nn.CrossEntropyLoss()):
    table,want = stats.table(),expected(seen, loss_func)
    assert table.index.tolist()==sorted(want)
    names = ['confidence','variability','margin','forgetting','seen','score']
    got = table[names].to_numpy()
    np.testing.assert_allclose(got, np.array([want[i] for i in table.index]), rtol=1e-4, atol=2e-5)

def on_rows(dl, *cbs, model=None, loss_func=None, **kwargs):
    set_seed(3)
    layers = nn.BatchNorm1d(4, affine=False),nn.Linear(4, 16),nn.ReLU(),nn.Linear(16, 3)
    loss_func = loss_func or nn.CrossEntropyLoss()
    model = model or nn.Sequential(*layers)
    return Learner(DataLoaders(dl, dl), model, loss_func=loss_func, lr=.05, cbs=[*cbs])

LOADERS = {'fastai': lambda: DataLoader(ITEMS, 8, shuffle=True),
           'repeats': lambda: WeightedDL(ITEMS, 8, wgts=np.arange(50.), shuffle=True, num_workers=0),
           'workers': lambda: DataLoader(ITEMS, 8, shuffle=True, num_workers=2),
           'torch': lambda: TorchLoader(TensorDataset(X, Y), 8, shuffle=True),
           'torch, workers': lambda: TorchLoader(TensorDataset(X, Y), 8, shuffle=True, num_workers=2),
           'torch, staying workers': lambda: TorchLoader(ITEMS, 8, shuffle=True, num_workers=1,
                                                         persistent_workers=True)}

@pytest.mark.parametrize('name', LOADERS)
def test_numbers_are_those_of_the_items(name):
    dl = LOADERS[name]()
    cls = type(dl)
    learn = on_rows(dl, stats := ItemStats(), truth := Truth())
    seen = []
    for n in (2, 1):      # a second fit goes on
        fit(learn, n)
        seen += truth.seen
    assert_right(stats, seen)
    assert stats.records==[] and type(dl) is cls and 'do_item' not in vars(dl)
    for o in getattr(getattr(dl, '_iterator', None), '_workers', ()): o.terminate()      # PyTorch takes 5 s

def test_what_waits_is_worked_off_in_between(monkeypatch):
    monkeypatch.setattr(ItemStats, 'most', 30)
    fit(on_rows(LOADERS['fastai'](), stats := ItemStats(), truth := Truth()), 2)
    assert_right(stats, truth.seen)

class Stream(IterableDataset):
    def __iter__(self): return iter(ITEMS)

class Long(TorchLoader):
    def __len__(self): return 7

UNKNOWN = {'text': (lambda cb: text_learner([ModelResetter(), RNNCallback(), cb], n=1000), 'stream of text'),
           'iterable': (lambda cb: on_rows(DataLoader(Stream(), 8, n=50), cb), 'without an index'),
           'iterable, torch': (lambda cb: on_rows(Long(Stream(), 8), cb), 'without an index'),
           'collate': (lambda cb: on_rows(TorchLoader(ITEMS, 8, collate_fn=lambda b: TorchLoader(b, 50)
                                                      .collate_fn(b[::-1])), cb), 'its own collate_fn'),
           'loss': (lambda cb: on_rows(LOADERS['fastai'](), cb, loss_func=lambda p,y: p.mean()), 'outputs'),
           'batches': (lambda cb: on_rows([(X[:8], Y[:8])]*3, cb), 'draws its items itself')}

@pytest.mark.parametrize('name', UNKNOWN)
def test_items_or_loss_that_are_not_known(name):
    "One line, and the run goes on"
    make,why = UNKNOWN[name]
    learn = make(stats := ItemStats())
    if name=='batches': learn.dls.loaders[1] = DataLoader(ITEMS, 8)
    fit(learn, 2)
    assert len(stats.records)==1 and why in stats.records[0].why
    assert not len(stats.table()) and not len(stats.suspects()) and not len(stats.worst())

class SkipSome:
    def __len__(self): return 50
    def __getitem__(self, i):
        if i in (30,31): raise SkipItemException()
        return ITEMS[i]

class Turned(Callback):
    "Changes the batch unseen by PyTorch, now and then"
    run_valid = False
    def before_batch(self):
        if self.iter==2:
            for o in (*self.xb, *self.yb): o.data.copy_(o.flip(0))

def test_batches_that_are_not_certain_do_not_count():
    "Mixed ones, those after an item that was left out, and those that a callback has changed"
    for cb in (MixUp(), CutMix()):
        learn = digits_learner([stats := ItemStats(), cb], n=160, bs=32)
        fit(learn)
        assert not len(stats.table()) and len(stats.records)==1
        assert stats.records[0].why==f'{type(cb).__name__} mixes items'
    fit(on_rows(DataLoader(SkipSome(), 8), stats := ItemStats()), 2)
    assert [*stats.table().index]==[*range(24)] and stats.table().seen.eq(2).all()
    assert [o.why for o in stats.records]==['the loader has left out an item']
    fit(on_rows(DataLoader(ITEMS, 8), stats := ItemStats(), Turned()))
    assert [*stats.table().index]==[*range(16), *range(24, 50)]

class Raise(Callback):
    run_valid = False
    def __init__(self, event, error): setattr(self, event, partial(self._raise, error))
    def _raise(self, error):
        if self.iter==1: raise error

CANCELLED = [Raise('before_batch', CancelBatchException()), Raise('after_loss', CancelBatchException()),
             Raise('before_backward', CancelBackwardException()), Raise('before_step', CancelStepException())]

@pytest.mark.parametrize('cb', [*CANCELLED, 'SkipNonFinite','SpikeGuard'], ids=str)
def test_cancelled_batches_do_not_count(cb):
    cbs = [cb] if isinstance(cb, Callback) else [PoisonBatch(1), globals()[cb]()]
    fit(on_rows(DataLoader(ITEMS, 8), stats := ItemStats(), *cbs))
    assert [*stats.table().index]==[*range(8), *range(16, 50)]

@pytest.mark.parametrize('cb', [FastaisAccumulation, GradientAccumulation, FastLoop, SAM, EMA])
def test_beside_others(cb):
    "All batches of an accumulated step count"
    cbs = [cb(16)] if 'Accum' in cb.__name__ else [cb()]
    fit(on_rows(LOADERS['fastai'](), stats := ItemStats(), truth := Truth(), *cbs), 2)
    assert_right(stats, truth.seen)

def test_in_half_precision():
    class Half(Callback):
        def after_pred(self): self.learn.pred = self.pred.to(torch.bfloat16)
        def after_loss(self): self.learn.loss = self.loss.float()
    fit(on_rows(LOADERS['fastai'](), stats := ItemStats(), truth := Truth(), Half()))
    assert_right(stats, [(i, p.float(), y) for i,p,y in truth.seen])
    fit(on_rows(LOADERS['fastai'](), stats := ItemStats(), Poisoned()))
    assert len(stats.table())==49 and np.isfinite(stats.table().to_numpy(float)).all()

class Poisoned(Callback):
    "One item has no finite prediction"
    def after_pred(self):
        self.learn.pred = torch.where(self.xb[0][:,:1]==7, torch.nan, self.pred)

def test_predictions_that_are_changed_later_do_not_count():
    class Overwrites(Callback):
        order = 100
        def after_batch(self):
            if self.training and self.iter==3: self.pred.detach().zero_()
    fit(on_rows(DataLoader(ITEMS, 8), stats := ItemStats(), Overwrites()))
    assert [*stats.table().index]==[*range(24), *range(32, 50)]

def test_label_smoothing_changes_no_number():
    fit(on_rows(LOADERS['fastai'](), stats := ItemStats(), truth := Truth(),
                loss_func=LabelSmoothingCrossEntropyFlat()))
    assert_right(stats, truth.seen)

@pytest.mark.parametrize('kind', ['many labels','regression','soft'])
def test_other_targets(kind):
    "Which columns there are"
    targets = dict(regression=X[:,:1], soft=torch.eye(3)[Y], **{'many labels': torch.eye(3)[Y]})[kind]
    losses = dict(regression=MSELossFlat, soft=nn.CrossEntropyLoss)
    loss = losses.get(kind, BCEWithLogitsLossFlat)()
    model = nn.Linear(4, targets.shape[1])
    dl = DataLoader(list(zip(X/50, targets)), 8)
    fit(on_rows(dl, stats := ItemStats(), model=model, loss_func=loss), 2)
    want = ['loss','loss_variability']
    if kind=='many labels': want = ['confidence','variability','margin','forgetting']
    assert [*stats.table()]==[*want, 'seen', 'score'] and len(stats.table())==50
    assert stats.suspects(3).score.tolist()==sorted(stats.table().score)[:3]
    assert getattr(loss, 'reduction')=='mean'

def test_outputs_that_the_user_names():
    lost = lambda p,y: nn.functional.cross_entropy(p, y)
    fit(on_rows(LOADERS['fastai'](), stats := ItemStats('logits'), truth := Truth(), loss_func=lost))
    assert_right(stats, truth.seen)

@pytest.mark.parametrize('outputs', ['logit', 3])
def test_bad_arguments_are_refused(outputs):
    with pytest.raises((ValueError, TypeError), match='^outputs='): ItemStats(outputs)
    with pytest.raises((ValueError, TypeError), match='^n='): ItemStats().suspects(0)

def test_another_training_set_begins_anew():
    stats = ItemStats()
    for n,items in ((0, ITEMS), (0, ITEMS[:]), (1, ITEMS[::-1])):      # the same items in another list go on
        fit(on_rows(DataLoader(items, 8), stats))
        assert len(stats.records)==n
    assert stats.table().seen.eq(1).all()
    fit(on_rows(DataLoader(ITEMS[::-1], 8), stats, loss_func=nn.MultiMarginLoss()))
    assert len(stats.records)==2 and 'loss' in stats.table()

def test_it_changes_no_bit():
    def run(*cbs):
        learn = fit(on_rows(LOADERS['repeats'](), *cbs, RunLog()), 2)
        weights = [p.tolist() for p in learn.model.parameters()]
        return weights,torch.rand(1),np.random.rand(),learn.recorder.values
    assert run()==run(ItemStats())

class Drawing:
    "A data set that draws random numbers, and of which some items cannot be read at the end"
    gone = False
    def __len__(self): return 50
    def __getitem__(self, i):
        if self.gone and i%2: raise OSError('gone')
        return X[i]+torch.rand(1)*np.random.rand(),Y[i]

def test_items_that_are_read_to_be_shown_draw_no_random_number():
    class Close(Callback):
        order = -10**7
        def after_fit(self): self.dls.train.dataset.gone = True
    def run(*cbs):
        fit(on_rows(DataLoader(Drawing(), 8), *cbs, Close()))
        return torch.rand(1),np.random.rand()
    log = RunLog()
    assert run()==run(ItemStats(), log)
    worst = read_log().of('items').worst[0]
    assert len(worst)==24 and all((o['text']=='')==bool(o['index']%2) for o in worst)

def published(): return next(o for o in read_log().rows if o['kind']=='items')

def test_what_is_published():
    learn = digits_learner([stats := ItemStats(), RunLog()], n=160, bs=32)
    fit(learn, 2)
    row,table = published(),stats.suspects()
    assert row['n']==128 and row['index']==table.index.tolist() and row['seen']==[2]*128
    for k in ('confidence','variability','margin','score'): assert row[k]==table[k].round(4).tolist()
    assert [o['index'] for o in row['worst']]==row['index'][:24]
    first = row['worst'][0]
    assert first['label']==table.label.iloc[0] and isinstance(first['label'], int)
    from base64 import b64decode
    png = Image.open(io.BytesIO(b64decode(first['image'])))
    raw = learn.dls.train_ds[first['index']][0][0]
    assert png.size==(8,8) and np.abs(np.asarray(png)/255-raw.numpy()).max()<.003

def test_few_of_many_items_are_published():
    stats = ItemStats()
    learn = fit(on_rows(LOADERS['fastai'](), stats))
    rows = []
    class Keep(Callback):
        def receive(self, kind, row): rows.append(row)
    learn.add_cb(Keep())
    stats._publish(most=20, first=10, shown=2)
    order = stats.suspects().index.tolist()
    assert rows[0]['index'][:10]==order[:10] and len({*rows[0]['index']})==20 and rows[0]['n']==50
    assert rows[0]['index'][-1]==order[-1] and len(rows[0]['worst'])==2

@pytest.mark.parametrize('make', ['fastai','torch'])
def test_goes_on_where_it_was_stopped(make):
    "In the middle of an epoch"
    def run(folder, *cbs):
        saves = Checkpoint(folder, steps=1, background=False)
        learn = on_rows(LOADERS[make](), stats := ItemStats(), saves, *cbs)
        with contextlib.suppress(KeyboardInterrupt): fit(learn, 2)
        return stats
    want = run('whole').table()
    run('parts', Raise('after_batch', KeyboardInterrupt()))
    assert run('parts').table().equals(want)

def test_seeded_items_and_a_guard_beside_it():
    "Each puts something on the loader"
    dl = DataLoader(ITEMS, 8, shuffle=True, num_workers=1)
    cbs = [Checkpoint('run', seed_items=True), SkipNonFinite(), stats := ItemStats(), truth := Truth()]
    fit(on_rows(dl, *cbs), 2)
    assert_right(stats, truth.seen)
    assert 'do_item' not in vars(dl)

def test_texts_that_are_sorted_by_length():
    "fastai gives their order as an iterator"
    texts = [torch.arange(i, i+3) for i in range(50)]
    dl = SortedDL(list(zip(texts, Y)), sort_func=lambda o: o[0][0]%7, bs=8, shuffle=True, num_workers=0)
    class First(Callback):
        run_valid,order = False,5
        def after_backward(self):
            if self.iter: return
            items,_ = stats._now.watch.batch()
            assert len(items)==8 and self.yb[0].tolist()==Y[items].tolist() and 'get_idxs' not in vars(dl)
    model = nn.Sequential(nn.EmbeddingBag(60, 4), nn.Linear(4, 3))
    fit(on_rows(dl, stats := ItemStats(), First(), model=model), 2)
    assert stats.records==[] and stats.table().seen.eq(2).all() and len(stats.table())==50

def test_worst_of_texts_tables_and_images():
    import pandas as pd
    from fastai.tabular.all import CategoryBlock, Categorify, Normalize, TabularDataLoaders, tabular_learner
    df = pd.DataFrame(dict(size=np.arange(64.), kind=list('ab')*32, label=['low']*32+['high']*32))
    names = dict(cat_names=['kind'], cont_names=['size'], y_names='label', y_block=CategoryBlock())
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], valid_idx=[0,1], bs=16, **names)
    learn = tabular_learner(dls, layers=[8], cbs=(stats := ItemStats()))
    fit(learn, 2)
    worst = stats.worst(3)
    assert {*worst.label}<={'low','high'} and {*worst.kind}<={'a','b'}
    raw = df.iloc[dls.train.items.index[worst.index]]
    np.testing.assert_allclose(worst['size'], raw['size'], atol=1e-3)
    assert (worst.label.values==raw.label.values).all()
    learn = digits_learner([stats := ItemStats()], n=160, bs=32)
    fit(learn)
    import matplotlib.pyplot as plt
    assert 'text' not in stats.worst(3) and plt.gcf().axes[0].get_title().startswith('item ')
    plt.close('all')

def part(rank, world=3, **kwargs):
    "The part of a process, without the others"
    dl = DistributedDL(DataLoader(ITEMS, 10, num_workers=0, **kwargs), rank=rank, world_size=world)
    dl._broadcast = lambda idxs,_: idxs
    return dl

def test_padding_does_not_count():
    "50 items for three processes are 51"
    seen = []
    for rank in range(3):
        fit(on_rows(part(rank), stats := ItemStats(), truth := Truth()))
        assert stats.records==[]
        seen += stats.table().index.tolist()
    assert seen==[*range(50)]
    assert truth.seen[-1][0][-1]==0       # the padding was trained on

def test_what_several_processes_have_found(monkeypatch):
    "As in two processes, one after the other: each epoch, the second gets what the first has found"
    sent,seen = [],[]
    def first(o):
        sent.append(o)
        return [o]
    def second(o): return [sent.pop(0), o]
    monkeypatch.setattr(items, 'n_ranks', lambda: 2)
    for rank,from_all in enumerate((first, second)):
        monkeypatch.setattr(items, 'from_all', from_all)
        dl = part(rank, 2, shuffle=True)
        dl.dl.rng = random.Random(3)       # the same order in both
        learn = on_rows(dl, stats := ItemStats(), truth := Truth())
        fit(learn, 3)
        seen.append(truth.seen)
    assert not sent and stats.records==[]
    half = len(seen[0])//3
    in_order = [b for epoch in range(3) for rank in seen for b in rank[epoch*half:][:half]]
    assert_right(stats, in_order)

class Pair(nn.Module):
    def __init__(self): super().__init__(); self.m = nn.Linear(4, 3)
    def forward(self, x): return self.m(x),self.m(x)

def test_predictions_that_say_nothing_about_items(monkeypatch):
    "Two outputs, two targets, an index that is not there, a data set that cannot be told from others"
    two = lambda o,*y: nn.functional.cross_entropy(o[0] if isinstance(o, tuple) else o, y[0])
    pairs = DataLoader([(x,y,y) for x,y in ITEMS], 8, n_inp=1)
    cases = (DataLoader(ITEMS, 8), Pair(), 'not one tensor'),(pairs, None, 'more than one target')
    for dl,model,why in cases:
        learn = on_rows(dl, stats := ItemStats('logits'), model=model, loss_func=two)
        learn.dls.n_inp = 1
        fit(learn)
        assert len(stats.records)==1 and why in stats.records[0].why and not len(stats.table())
    fit(on_rows(DataLoader(ITEMS, 8, get_idxs=lambda: [-1,*range(49)]), stats := ItemStats()))
    assert 'does not have' in stats.records[0].why and not len(stats.table())
    monkeypatch.setattr(items, 'fingerprint', lambda o: 1/0)
    for _ in range(2): fit(on_rows(DataLoader(ITEMS[:], 8), stats))
    assert stats.table().seen.eq(1).all()
