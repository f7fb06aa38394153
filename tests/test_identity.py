"Which run is this? What tells runs apart, and what must not"
import json, os, pickle, subprocess, sys, tempfile
from array import array
from collections import deque
from copy import copy
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from functools import partial
from inspect import signature
from pathlib import Path
from uuid import UUID

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, combine_scheds
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.losses import BaseLoss
from fastai.optimizer import Adam, Lamb, Larc, Lookahead, OptimWrapper, QHAdam, RAdam, RMSProp, SGD, ranger
from fastai.vision.all import (CrossEntropyLossFlat, DataLoaders, Datasets, IndexSplitter, Learner, MixUp,
                               RandomResizedCrop, Rotate, noop, set_seed)
from fastcore.xtras import working_directory
from PIL import Image
from fastai.vision.core import PILImage
from torch import nn
from torch.utils.data import (ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset,
                              WeightedRandomSampler)
from fastai_callbacks_ext.all import EMA, SWA
from fastai_callbacks_ext.base import identity
from fastai_callbacks_ext.base.identity import (facts_differences, facts_unknown, fingerprint,
                                                model_differences, note_changes, run_facts)
from fastai_callbacks_ext.test_utils import digits_learner
from cases import some
from common import NEW, make, public_callbacks, quiet
from settings import SETTINGS

N = 3000      # more than a fingerprint looks at
g = torch.Generator().manual_seed(0)
labels = torch.randint(0, 3, (N,), generator=g)

class Mine(Dataset):
    "A data set as people write them"
    def __init__(self, folder, transform=None):
        self.files = [f'{folder}/{i}.png' for i in range(N)]
        self.transform = transform
    def __len__(self): return N
    def __getitem__(self, i): raise AssertionError('an item was read')

paths = [Path(f'data/{i%3}/{i}.png') for i in range(N)]
table = pd.DataFrame(dict(x=np.arange(N)*1., name=[f'n{i}' for i in range(N)], y=labels.numpy()))

# Items as people have them, by their positions
forms = dict(
    paths=lambda idx: [paths[i] for i in idx],
    strings=lambda idx: [str(paths[i]) for i in idx],
    array=lambda idx: np.arange(N*4.).reshape(N,4)[idx],
    wide=lambda idx: np.arange(N*1500, dtype='f4').reshape(N,1500)[idx],
    tensor=lambda idx: torch.arange(N*4.).view(N,4)[idx],
    table=lambda idx: table.iloc[idx],
    categories=lambda idx: table.name.astype('category').iloc[idx],
    tensors=lambda idx: [(torch.ones(5)*i, labels[i]) for i in idx],
    dicts=lambda idx: [dict(image=f'{i}.png', label=i%3) for i in idx],
    dataset=lambda idx: TensorDataset(torch.arange(N)[idx], labels[idx]),
    subset=lambda idx: Subset(Mine('a'), idx),
    concat=lambda idx: ConcatDataset([Subset(Mine('a'), idx), Mine('b')]),
    datasets=lambda idx: Datasets(paths, [[noop]], splits=(idx, [0])).subset(0))

@pytest.mark.parametrize('form', forms)
def test_other_items(form):
    "Another fold, another order, fewer items; the same items made anew are the same"
    make,every = forms[form],np.arange(N)
    fold = np.concatenate([every[:500], every[1000:], every[:500]])
    swapped = every.copy()
    swapped[[0, -1]] = swapped[[-1, 0]]
    others = [every[::-1], np.roll(every, 1), fold, every[:-1], swapped]
    assert fingerprint(make(every.tolist()))==fingerprint(make(every.tolist()))
    assert len({fingerprint(make(o.tolist())) for o in [every, *others]})==6

def reader(y): return lambda i: y[i]
class Labeller:
    def __init__(self, y): self.y = y
    def __call__(self, i): return self.y[i]
    def label(self, i): return self.y[i]
scale = 1
def of_this_module(i): return labels[i]*scale

others = labels.clone()
others[torch.randperm(N, generator=g)[:N//20]] += 1      # one in twenty

holders = dict(closure=reader, object=Labeller, method=lambda y: Labeller(y).label, list=list,
               partial=lambda y: partial(noop, y), numbers=lambda y: y.tolist(),
               dict=lambda y: dict(enumerate(y.tolist())), series=lambda y: pd.Series(y.numpy()))
@pytest.mark.parametrize('holder', holders.values(), ids=holders)
def test_other_labels(holder):
    assert fingerprint(holder(labels))==fingerprint(holder(labels.clone()))!=fingerprint(holder(others))

def test_labels_of_a_function_of_this_module(monkeypatch):
    before = fingerprint(of_this_module)
    monkeypatch.setattr(sys.modules[__name__], 'scale', 2)
    assert fingerprint(of_this_module)!=before

BODY = 'y = [o for o in (x, {}) if o not in {{1,2}}]\n    return [lambda: y, f(x)]'
SAME = [o+BODY.format(3) for o in ('"""What it does"""\n    ', '"""More"""\n    ', '\n\n    # moved\n    ')]

def defined(body):
    exec(f'def label(x, f=abs):\n    {body}', found := {})
    return found['label']

def test_docs_of_a_function_do_not_count():
    one = fingerprint(defined(BODY.format(3)))
    assert {fingerprint(defined(o)) for o in SAME}=={one}
    changed = [BODY.format(3).replace(*o) for o in (('f(x)','f(y)'), ('1,2','1,5'))]
    others = [BODY.format(4), BODY.format('"a"'), *changed]
    assert len({one, *(fingerprint(defined(o)) for o in others)})==5

def test_nothing_is_read_and_nothing_drawn():
    states = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    before = states()
    fingerprint(Mine('a')); fingerprint(paths); fingerprint(torch.randn(N, 9, generator=g))
    assert states()==before

def test_where_folders_are_does_not_count(tmp_path, monkeypatch):
    temporary = Path(tempfile.gettempdir())
    a,b,c = (fingerprint(temporary/o) for o in ('tmpa1/x/1.png','tmpb2/x/1.png','tmpb2/y/1.png'))
    assert a==b!=c
    seen = set()
    for o in ('one','two'):     # a project in another place, started from another place
        main = sys.modules['__main__']
        monkeypatch.setattr(main, '__file__', f'/srv/{o}/scripts/train.py', raising=False)
        for start in ('/usr','/usr/lib','/'):
            monkeypatch.chdir(start)
            seen |= {fingerprint([Path(f'/srv/{o}/data/1.png'), f'/srv/{o}/scripts/2.png', '/usr/lib/3.png'])}
    assert len(seen)==1

class Folder(Dataset):
    "As torchvision's: a folder, its files and their classes"
    def __init__(self, root):
        self.root,self.samples = root,[(f'{root}/{i%3}/{i}.png', i%3) for i in range(N)]
    def __len__(self): return N
    def files(self): return [f for f,_ in self.samples]

# Items as they are in a folder
IN_A_FOLDER = dict(paths=lambda d: [Path(d)/o.relative_to('data') for o in paths], dataset=Folder,
                   table=lambda d: pd.DataFrame(dict(name=Folder(d).files(), y=labels)),
                   array=lambda d: np.array(Folder(d).files()),
                   names=lambda d: [d, *map(str, range(9))], one=Path,
                   dict=lambda d: {f'{d}/{i}.png': i for i in range(9)},
                   set=lambda d: {*Folder(d).files()})

@pytest.mark.parametrize('form', IN_A_FOLDER)
def test_data_in_another_place(form):
    "As on the disk of each job; what is in the folder counts, and the name of the folder"
    make = IN_A_FOLDER[form]
    one,other,renamed = (make(f'/scratch/{o}') for o in ('job1/images','job22/images','job1/small'))
    assert fingerprint(one)==fingerprint(other)!=fingerprint(renamed)
    assert identity.describe(one)==identity.describe(other)

def test_files_in_other_folders_of_one():
    "Another class; and two folders that have nothing in common are compared as they are"
    a,b = (fingerprint([f'/scratch/images/{o}/1.png', '/scratch/images/dog/2.png']) for o in ('dog','cat'))
    assert a!=b
    assert fingerprint(['/a/x/1.png', '/b/y/1.png'])!=fingerprint(['/a/x/1.png', '/c/y/1.png'])
    assert fingerprint(['/a/1', 'x', '/a/2'])!=fingerprint(['x', '/a/1', '/a/2'])
    assert identity.describe('a/b')=="'a/b'" and identity.describe('/a/b')=="'b'"

# --- a whole run --------------------------------------------------------------------------------
class Ask(Callback):
    order = 2000
    def before_fit(self): self.facts = run_facts(self.learn)

def facts(learn, method='fit', **kwargs):
    ask = Ask()
    with quiet(learn): getattr(learn, method)(1, cbs=[ask, *kwargs.pop('cbs', [])], **kwargs)
    return ask.facts

def halves(model): return [list(part.parameters()) for part in (model[:2], model[2:])]

def small(val=range(16), y=None, p=.1, act=nn.ReLU, tfm=None, loss=None, freeze=False, bs=16, **kwargs):
    x,y = torch.arange(64.)[:,None],labels[:64] if y is None else y
    splits = IndexSplitter(list(val))(range(64))
    dsets = Datasets(range(64), [[lambda i: x[i]], [lambda i: y[i]]], splits=splits)
    set_seed(0)
    model = nn.Sequential(nn.Linear(1,4), act(), nn.Dropout(p), nn.Linear(4,5))
    dls = dsets.dataloaders(bs=bs, num_workers=0, after_batch=tfm)
    learn = Learner(dls, model, loss_func=loss or CrossEntropyLossFlat(), splitter=halves, **kwargs)
    if freeze: learn.freeze()
    return learn

def weighted(o, y, w=1.): return nn.functional.cross_entropy(o, y)*w

others_of_it = dict(
    fold=(dict(val=range(16, 32)), 'validation items: 16 as in the checkpoint, but other items'),
    fewer=(dict(val=range(8)), 'training items: 56 here, 48 in the checkpoint'),
    labels=(dict(y=others[:64]+1), 'training transforms: '),
    dropout=(dict(p=.5), 'model: 2: Dropout(p=0.5, inplace=False) here, Dropout(p=0.1'),
    activation=(dict(act=nn.GELU), 'model: 1: GELU('),
    augmentation=(dict(tfm=[Rotate(5)]), 'training transforms: [Rotate('),
    loss=(dict(loss=weighted), 'loss: weighted'),
    partial=(dict(loss=partial(weighted, w=2.)), 'loss: weighted'),
    weights=(dict(loss=CrossEntropyLossFlat(weight=torch.ones(5))), 'weight=[1, 1, 1, 1, 1]'),
    stage=(dict(freeze=True), 'frozen: 0.weight, 0.bias here, nothing in the checkpoint'),
    mixup=(dict(cbs=[MixUp(.3)]), 'callbacks: MixUp('),
    bs=(dict(bs=8), 'batch size: 8 here, 16 in the checkpoint'),
    bn=(dict(train_bn=False), 'learner: '))

@pytest.fixture(scope='module')
def first(): return facts(small())

@pytest.mark.parametrize('what', others_of_it)
def test_another_run(what, first):
    kwargs,words = others_of_it[what]
    found = facts_differences(facts(small(**kwargs)), first)
    assert any(words in o for o in found), found
    assert all(len(o)<1000 for o in found) and len(found)<8

def test_the_same_run(first):
    again = facts(small())
    assert facts_differences(again, first)==[] and facts_unknown(again, first)==[]
    assert json.loads(json.dumps(again))==again

class Watch(Callback):
    "A callback of the user's own, that may be there or not"
    def before_batch(self): pass

def test_what_may_change(first):
    "Workers, the device, a validation batch size; callbacks that watch, limit or save"
    learn = small(cbs=[Watch()])
    learn.dls.loaders = [dl.new(num_workers=1) for dl in learn.dls.loaders]
    learn.dls.loaders[1].bs = 7
    assert facts_differences(facts(learn), first)==[]

@pytest.mark.parametrize('name', some(SETTINGS, 5))
def test_a_fit_changes_nothing_of_it(name):
    "The second fit of a script asks after the first has run, or after it was found finished"
    learn = SETTINGS[name]()
    before = facts(learn)
    assert facts_unknown(before)==[] and ' at 0x' not in json.dumps(before)
    assert facts_differences(facts(learn), before)==[]
    assert facts_differences(facts(SETTINGS[name]()), before)==[]

@pytest.fixture(scope='module')
def elsewhere():
    "What a process with another seed for the hashes of strings, and with other addresses, sees"
    code = "import json, warnings; warnings.filterwarnings('ignore'); import test_identity as t; " \
           "print(json.dumps([t.facts_of_all(), t.without_addresses()]))"
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          cwd=Path(__file__).parent, env=os.environ | {'PYTHONHASHSEED': '1'})
    return json.loads(said.stdout.splitlines()[-1])

def facts_of_all():
    "Of learners whose facts have names, strings and functions in them, and of all kinds of optimizers"
    named = [SETTINGS[o]() for o in ('classifier','tabular_classes','text_classifier')]
    opts = Adam, SGD, RMSProp, QHAdam, Larc, Lamb, RAdam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)
    return [facts(o) for o in named + [digits_learner(n=100, bs=16, opt_func=f) for f in opts]]

def test_in_another_process(elsewhere):
    here,there = facts_of_all(),elsewhere[0]
    assert ' at 0x' not in json.dumps(here) and len(here)==len(there)==12
    for a,b in zip(here, there): assert facts_differences(a, b)==[]

class Stream(IterableDataset):
    def __iter__(self): yield from zip(torch.zeros(4, 1), labels[:4])
    def __len__(self): return 4

def test_what_cannot_be_known():
    loader = DataLoader(Stream(), 2)
    learn = Learner(DataLoaders(loader, loader), nn.Linear(1, 3), loss_func=nn.CrossEntropyLoss())
    assert facts_unknown(facts(learn))==['training items','validation items']

def test_samplers_and_transforms_of_torch():
    def learner(w, transform):
        data = Mine('a', transform)
        loader = DataLoader(data, 16, sampler=WeightedRandomSampler(w, N, generator=torch.Generator()))
        return run_facts_of(loader)
    def run_facts_of(loader):
        learn = Learner(DataLoaders(loader, loader), nn.Linear(1, 3), loss_func=nn.CrossEntropyLoss(), lr=.1)
        learn.create_opt(); learn.n_epoch = 1
        return run_facts(learn)
    even,crop = torch.ones(N),RandomResizedCrop
    base = learner(even, crop(8))
    assert facts_differences(learner(even, crop(8)), base)==[]
    assert 'training loader' in str(facts_differences(learner(torch.arange(N)*1., crop(8)), base))
    assert 'RandomResizedCrop' in str(facts_differences(learner(even, crop(8, min_scale=.5)), base))

def test_files_of_older_versions(first):
    "Facts that were not kept then are not compared, and named"
    older = {k: v for k,v in first.items() if k not in ('loss','validation items')} | {'training items': 48}
    assert facts_differences(first, older)==[] and facts_unknown(first, older)==['loss','validation items']
    found = facts_differences(first, older | {'training items': 7})
    assert found==['training items: 48 here, 7 in the checkpoint']

def test_a_fact_that_fails_is_unknown():
    class Odd(Learner):
        @property
        def wd_bn_bias(self): raise RuntimeError('odd')
        @wd_bn_bias.setter
        def wd_bn_bias(self, v): pass
    learn = digits_learner(n=100)
    learn.create_opt(); learn.n_epoch = 1
    learn.__class__ = Odd
    assert facts_unknown(run_facts(learn))==['learner']

def boxes(i):
    box = dict(bbox=[1.,2.,3.,4.], outline=[[*map(float, range(60))]])
    return dict(image=f'{i}.png', boxes=[box]*10)

def test_items_of_many_parts(monkeypatch):
    "Not all of their parts are looked at, but items at every place are"
    items,n = [boxes(i) for i in range(400)],0
    real = identity._pieces
    def counted(*args):
        nonlocal n
        n += 1
        return real(*args)
    monkeypatch.setattr(identity, '_pieces', counted)
    first = fingerprint(items)
    assert n<10_000
    assert fingerprint([boxes(i) for i in range(400)])==first
    for at in (0, 399): assert fingerprint([*items[:at], boxes(-1), *items[at+1:]])!=first
    assert fingerprint(items[::-1])!=first and fingerprint(items[200:]+items[:200])!=first

# --- what has no attributes, or hidden ones -----------------------------------------------------
@dataclass(slots=True)
class Slots: x:object
class Hidden:
    def __init__(self, path): self._path = path
class Rows(Dataset):
    "A data set that keeps its rows to itself, and shows its classes"
    def __init__(self, items): self._kept,self.classes = items,['a','b']
    def __len__(self): return len(self._kept)

def picture(i): return Image.fromarray(np.full((4,4,3), i, 'u1'))
def times(i, **kwargs): return pd.date_range(f'{2000+i}-01-01', periods=3, **kwargs)

VALUES = dict(
    date=lambda i: [date(2020, 1, i)], datetime=lambda i: [datetime(2020, 1, i, tzinfo=timezone.utc)],
    timestamp=lambda i: [pd.Timestamp(2020, 1, i)], decimal=lambda i: [Decimal(i)],
    uuid=lambda i: [UUID(int=i)], picture=lambda i: [picture(i)], pil=lambda i: [PILImage(picture(i))],
    deque=lambda i: deque([1, i]), array=lambda i: array('f', [i]), bytes=lambda i: [bytearray([i])],
    slots=lambda i: [Slots(i)], tensor_in_slots=lambda i: [Slots(torch.arange(5000)//4999*i)],
    hidden=lambda i: [Hidden(f'{i}.png')], rows=lambda i: Rows([i, 8]),
    hidden_dates=lambda i: Rows([date(2020, 1, i)]),
    zone=lambda i: pd.Series(times(i, tz='UTC')), period=lambda i: pd.Series(times(i).to_period('D')),
    objects=lambda i: pd.Series([date(2020, 1, i)], dtype=object),
    levels=lambda i: pd.DataFrame(dict(y=[1, 1])).set_index(pd.MultiIndex.from_tuples([('a', i), ('b', 9)])))

@pytest.mark.parametrize('kind', VALUES)
def test_values_without_attributes(kind):
    make = VALUES[kind]
    assert fingerprint(make(1))==fingerprint(make(1))!=fingerprint(make(2)) and identity._tells(make(1))

class Closed:
    "Has nothing that can be seen, and cannot be pickled"
    __slots__ = ()
    def __reduce_ex__(self, protocol): raise TypeError('closed')

def loader_facts(data):
    loader = DataLoader(data, 2)
    learn = Learner(DataLoaders(loader, loader), nn.Linear(1, 3), loss_func=nn.CrossEntropyLoss(), lr=.1)
    learn.create_opt(); learn.n_epoch = 1
    return run_facts(learn)

def test_items_that_tell_nothing_are_said():
    "Also where there is something beside them, which is compared all the same"
    both = ['training items','validation items']
    assert facts_unknown(loader_facts([Closed()]*4))==both
    some = [loader_facts(Rows([Closed()]*n)) for n in (4, 4, 6)]
    assert facts_unknown(some[0])==both and facts_unknown(loader_facts(Rows([1, 2])))==[]
    assert facts_differences(some[0], some[1])==[] and facts_differences(some[0], some[2])

class Node:
    def __init__(self, x, near): self.x,self.near = x,near

def grid(n, last=0.):
    g = {(i, j): Node(torch.tensor(i*n+j*1.), []) for i in range(n) for j in range(n)}
    for (i, j),o in g.items():
        o.near += [g[k] for k in ((i+1, j), (i, j+1), (i-1, j), (i, j-1)) if k in g]
    g[n-1,n-1].x += last
    return list(g.values())

def test_a_graph_is_walked_once():
    seen = {}
    pieces = list(identity._pieces(grid(6), 1000, seen))
    assert len(seen)==36 and len(pieces)<3000
    assert fingerprint(grid(6))==fingerprint(grid(6))!=fingerprint(grid(6, last=1.))
    a,b = Node(torch.ones(1), 1),Node(torch.zeros(1), 2)
    assert fingerprint([a, b, a])!=fingerprint([a, b, b])
    chain = [Node(torch.ones(1)*i, None) for i in range(1500)]
    for one,after in zip(chain, chain[1:]): one.near = after
    fingerprint(chain)

def keep(x): return x
def turn(x): return x

def test_no_addresses(elsewhere):
    "Functions as keys, sets of functions and of paths: the order is not that of the addresses"
    here = without_addresses()
    assert ' at 0x' not in str(here) and here==elsewhere[1]

def without_addresses():
    "What others see of them, with functions at other addresses and another temporary folder"
    folder = tempfile.mkdtemp()
    sets = {keep, turn, len},{f'{folder}/{i}' for i in range(9)},{Path(folder)/f'{i}' for i in range(9)}
    return [f(o) for o in (*sets, {turn: .5, keep: .5}) for f in (fingerprint, identity.describe)]

def test_names_of_attributes_are_no_globals(monkeypatch):
    def reads(o): return o.scale
    before = fingerprint(reads)
    monkeypatch.setattr(sys.modules[__name__], 'scale', 2)
    assert fingerprint(reads)==before

# --- seeds, schedules, caches -------------------------------------------------------------------
def test_a_seed_that_nobody_chose():
    def seed_of(choose):
        learn = small()
        choose()
        return {'seed': facts(learn)['seed']}
    drawn,again,chosen = map(seed_of, (torch.seed, torch.seed, lambda: torch.manual_seed(3)))
    assert facts_differences(drawn, again)==[] and drawn['seed']=='not set'
    assert facts_differences(chosen, drawn)==['seed: 3 here, not set in the checkpoint']

def test_what_a_schedule_sets_is_not_compared_twice():
    "A fit that was interrupted leaves it anywhere"
    first,second = small(opt_func=Adam),small(opt_func=Adam)
    second.create_opt()
    second.opt.set_hypers(mom=.123)
    one = [facts(o, 'fit_one_cycle') for o in (first, second)]
    assert facts_differences(*one)==[] and 'schedule' in one[0]
    second.opt.set_hypers(mom=.123)
    assert 'hyper-parameters' in str(facts_differences(facts(second), facts(small(opt_func=Adam))))

class Falling:
    "A schedule that counts how often it is asked"
    def __init__(self): self.n = 0
    def __call__(self, pct):
        self.n += 1
        return .1/self.n

def test_a_schedule_of_yours_is_not_called():
    falling = Falling()
    def counts(pct): return falling(pct)
    for f in (falling, counts, combine_scheds([.5, .5], [SchedLin(.1, .2), counts])):
        learn = small(cbs=[ParamScheduler({'lr': f})])
        learn.create_opt(); learn.n_epoch = 1
        assert run_facts(learn)['schedule']['lr'] and falling.n==0
    theirs = combine_scheds([.5, .5], [SchedLin(.1, .2), SchedCos(.2, .1)])
    learn = small(cbs=[ParamScheduler({'lr': theirs})])
    learn.create_opt(); learn.n_epoch = 1
    assert run_facts(learn)['schedule']=={'lr': [.1, .16, pytest.approx(.190451), .1]}

def test_a_cache_that_fills_is_no_other_data():
    "What changes in a fit is not new; what changes between two fits is"
    class Cached(Rows):
        def __init__(self, items):
            super().__init__(items)
            self.cache = {}
        def __getitem__(self, i): return self.cache.setdefault(i, (torch.zeros(1), self._kept[i]))
    data = Cached([0, 1, 2, 1])
    loader = DataLoader(data, 2)
    learn = Learner(DataLoaders(loader, loader), nn.Linear(1, 3), loss_func=nn.CrossEntropyLoss(), lr=.1)
    learn.create_opt(); learn.n_epoch = 1
    before = run_facts(learn)
    assert [data[i][1] for i in range(4)]==[0, 1, 2, 1]
    assert facts_differences(run_facts(learn), before)
    note_changes(learn, before)
    assert run_facts(learn)==before
    data._kept[0] = 2
    assert facts_differences(run_facts(learn), before)

# --- settings under another name ----------------------------------------------------------------
class Smooth(nn.Module):
    "Keeps its argument under another name, and counts its calls"
    def __init__(self, eps=.1):
        super().__init__()
        self.e,self.n,self.device = eps,0,'cpu'
    def forward(self, o, y):
        self.n += 1
        return nn.functional.cross_entropy(o, y, label_smoothing=self.e)
class Called:
    "The same, and no module"
    def __init__(self, eps=.1): self.e,self.n = eps,0
    def __call__(self, o, y): self.n += 1; return nn.functional.cross_entropy(o, y, label_smoothing=self.e)
class Scaled(nn.Module):
    def __init__(self, by=.1): super().__init__(); self.factor,self.n = by,0
    def forward(self, x): self.n += 1; return x*self.factor

LOSSES = dict(module=(Smooth, 'loss: Smooth(e=0.2)'),
              fastais=(lambda e=.1: BaseLoss(Smooth, e), 'loss: BaseLoss('),
              object=(Called, 'loss: Called(e=0.2)'),
              partial=(lambda e=.1: partial(Smooth(e)), 'loss: Smooth(e=0.2)'))

@pytest.mark.parametrize('kind', LOSSES)
def test_a_loss_that_keeps_its_argument_under_another_name(kind):
    "A count of its own, and where it is, are no facts"
    make,words = LOSSES[kind]
    learn = small(loss=make())
    first,second = facts(learn),facts(learn)
    assert facts_differences(second, first)==[] and 'training=' not in first['loss']
    found = facts_differences(facts(small(loss=make(.2))), first)[0]
    assert words in found and 'e=0.2' in found

def test_a_module_that_keeps_its_argument_under_another_name():
    some = [facts(small(act=partial(Scaled, o))) for o in (.1, .1, .2)]
    assert facts_differences(some[0], some[1])==[]
    found = facts_differences(some[2], some[0])
    assert found==['model: 1: Scaled(factor=0.2) here, Scaled(factor=0.1) in the checkpoint']

# --- callbacks and optimizers -------------------------------------------------------------------
# Another value of each argument, where it is not the other bool or the next number
ANOTHER = dict(decay=.5, half_life=[2,3], validate='raw', final='raw', buffers='copy', last='drop',
               weight='items', max_norm=.5, max_value=.5, adaptive=.5, auto=10, exclude='head', lr=.5,
               module='rnn', mask=len, lengths=len, monitor='accuracy', comp=np.greater, unit='steps',
               names='1', wait=True)
ANOTHER |= {('LAWA','every'): 2, ('SWA','every'): 2, ('SWA','start'): .5, ('SAM','adaptive'): True}
ANOTHER |= {('Distill','temperature'): 3., ('Distill','teacher'): torch.nn.Linear(2, 2),
            ('FGM','modules'): '0', ('AWP','share'): .5,
            ('Distill','outputs'): 'loss', ('RDrop','outputs'): 'loss'}
ANOTHER |= {('Schedule','phases'): {'wd': [dict(kind='flat', length=None, unit=None, start=.5, end=.5,
                                              shape='linear', power=1.)]},
            ('Schedule','unit'): 'epochs', ('Schedule','count'): 'batches'}
ANOTHER |= {('MicroBatch','size'): 8}
ANOTHER |= {(o,k): v for o in ('MixUp','CutMix','CutMixUp') for k,v in dict(
    by='batch' if o=='MixUp' else 'item', p=.5, until=.5, inputs=0).items()}
ANOTHER |= {('ProgressiveResize',k): v for k,v in dict(
    grow=(0,.5), unit='epochs', mode='area', inputs=0, targets=0, frozen='grow').items()}
ANOTHER |= {('BatchSizeSchedule',k): v for k,v in dict(schedule={0: 4}, unit='pct', frozen='grow').items()}
ANOTHER |= {('SeqLenSchedule',k): v for k,v in dict(
    start=8, end=12, grow=(0,.25), unit='epochs', multiple=2, keep='last', inputs=0, pad=0,
    frozen='grow').items()}
ANOTHER |= {('Freeze','schedule'): {0: '0', 1: 0},
            ('HyperMult','lr'): {'*': .5}, ('HyperMult','wd'): {'norm': 0}}
with tempfile.TemporaryDirectory() as d, working_directory(d):       # `Checkpoint` makes its folder
    acting = [o for o in public_callbacks() if identity._acts(make(o))]
arguments = [(o, k) for o in acting for k,p in signature(o).parameters.items() if p.kind is not p.VAR_KEYWORD
             and p.kind is not p.VAR_POSITIONAL]

@pytest.mark.parametrize('cls,name', arguments, ids=lambda o: getattr(o, '__name__', o))
def test_each_argument_of_each_acting_callback_is_a_fact(cls, name):
    "Also where it is kept under another name"
    usual = signature(cls).parameters[name].default
    next_one = lambda: not usual if isinstance(usual, bool) else usual/2 if usual and usual<1 else usual+1
    other = ANOTHER[k] if (k := (cls.__name__, name)) in ANOTHER else ANOTHER.get(name) or next_one()
    made = [make(cls), *(cls(**NEW.get(cls, dict)() | {name: other}) for _ in range(2))]
    a,b,c = map(identity.describe_callback, made)
    assert a!=b==c and f'{name}=' in b, b

def test_which_callbacks_act():
    "A new one has to be put on a side"
    assert {o.__name__ for o in acting}=={
        'EMA', 'SWA', 'LAWA', 'GradientAccumulation', 'GradientCentralization', 'GradientClip',
        'GradientNoise', 'LookaheadWeights', 'SAM', 'ModelResetter', 'RNNCallback', 'RNNRegularizer',
        'Distill', 'RDrop', 'AWP', 'FGM', 'Schedule', 'ScheduleFree', 'MicroBatch',
        'MixUp', 'CutMix', 'CutMixUp', 'ProgressiveResize', 'BatchSizeSchedule', 'SeqLenSchedule',
        'Freeze', 'HyperMult', 'ReduceLROnPlateau', 'BnFreeze'}
    watch_guard_or_save = {'ActivationStats', 'Checkpoint', 'EarlyStopping', 'FastLoop', 'FusedStep',
                           'Graphs', 'ItemStats', 'LayerStats', 'PreemptionGuard', 'Progress', 'RunLog',
                           'SampleLimit',
                           'SaveTopK', 'SkipNonFinite', 'SpikeGuard', 'StepLimit', 'StopFile',
                           'TerminateOnNaN', 'Throughput', 'TimeLimit', 'WriteReport'}
    assert {o.__name__ for o in public_callbacks() if o not in acting}==watch_guard_or_save

def test_what_a_callback_is_made_with_is_kept_in_copies_and_not_in_files():
    class Mine(EMA):
        def __init__(self, share, **kwargs): super().__init__(1-share, **kwargs)
    one,words = EMA(.9),identity.describe_callback(EMA(decay=.9))
    same = identity.describe_callback(one)==identity.describe_callback(copy(one))==words
    assert same and 'decay=0.9' in words
    assert "share=0.1, start=3, validate='ema'" in identity.describe_callback(Mine(.1, start=3))
    again = pickle.loads(pickle.dumps(one))
    assert '_given' not in vars(again) and 'decay' not in identity.describe_callback(again)
    one.every = 7
    assert 'every=7' in identity.describe_callback(one)

def around(params, alpha=.5, **kwargs): return Lookahead(RAdam(params, **kwargs), alpha=alpha)
OF_FASTAI = dict(
    plateau=(dict(cbs=ReduceLROnPlateau(factor=10)), dict(cbs=ReduceLROnPlateau(factor=2)), 'factor=2'),
    lookahead=(dict(opt_func=RAdam), dict(opt_func=around), 'Lookahead(alpha=0.5, k=6, Optimizer('),
    alpha=(dict(opt_func=around), dict(opt_func=partial(around, alpha=.9)), 'Lookahead(alpha=0.9, k=6, '))

@pytest.mark.parametrize('name', OF_FASTAI)
def test_what_else_changes_a_step(name):
    one,other,words = OF_FASTAI[name]
    found = facts_differences(facts(small(**other)), facts(small(**one)))
    assert len(found)==1 and words in found[0], found

def test_helpers_of_a_callback_are_no_facts():
    assert len(facts(small(cbs=SWA()))['callbacks'])==1

def test_the_first_epoch():
    some = [facts(small(), start_epoch=o) for o in (0, 1)]
    assert facts_differences(*some)==['first epoch: 0 here, 1 in the checkpoint']

# --- shapes -------------------------------------------------------------------------------------
class Memory(nn.Module):
    "Keeps what it has seen"
    def __init__(self, n=0):
        super().__init__()
        self.register_buffer('bank', torch.zeros(n))
        self.register_buffer('mean', torch.zeros(2) if n else None)

def test_buffers_and_lazy_layers_may_grow():
    made = nn.Sequential(nn.LazyLinear(2), Memory(3), nn.Linear(2, 2))
    made[0](torch.zeros(1, 4))
    mine = nn.Sequential(nn.LazyLinear(2), Memory(), nn.Linear(2, 2))
    assert model_differences(mine, made.state_dict())==model_differences(made, mine.state_dict())==[]
    found = model_differences(nn.Sequential(nn.Linear(4, 2), Memory(), nn.Linear(3, 2)), made.state_dict())
    assert found==['model: 2.weight: shape (2, 3) here, shape (2, 2) in the checkpoint']
    bare,biased = nn.Linear(4, 2, bias=False),nn.Linear(4, 2)
    assert 'nothing in the checkpoint' in str(model_differences(biased, bare.state_dict()))
    assert 'nothing here' in str(model_differences(bare, biased.state_dict()))
