"Fits that stop and go on: everywhere, with every loader; what is refused; damaged files; disks that fail"
import contextlib, copy, errno, io, json, os, pickle, random, shutil, signal, threading
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from fastai.basics import (Adam, Callback, CancelFitException, DataLoader, DataLoaders, L, OptimWrapper,
                           RMSProp, TfmdDL, noop, params)
from fastai.callback.all import CSVLogger, EarlyStoppingCallback, MixUp
from fastai.text.data import SortedDL
from torch import nn
import fastai_callbacks_ext.checkpoint as module
from fastai_callbacks_ext.all import Checkpoint, PreemptionGuard, SaveTopK, StepLimit
from fastai_callbacks_ext.base.passes import refresh_batchnorm
from fastai_callbacks_ext.base.core import ExtCallback
from fastai_callbacks_ext.base.position import batches_from, load_random_state, random_state, skips_exactly
from fastai_callbacks_ext.test_utils import digits_learner
import crash
from cases import some
from common import exit_code

@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    as_in_a_new_process()
    yield
    as_in_a_new_process()

class Stopped(Exception): pass

events = SimpleNamespace(sent=0)      # not in the callback: what is there is put back

class StopAt(Callback):
    "Raises at the `n`th event, after the others"
    order = 3000
    def __init__(self, n): self.n = n
    def __call__(self, event_name):
        events.sent += 1
        if events.sent==self.n: raise Stopped('stopped')

def leave_autocast():
    "fastai's mixed precision leaves it entered where an error ends a batch"
    for o in 'cpu','cuda': torch.set_autocast_enabled(o, False)
    for _ in range(torch.autocast_increment_nesting()): torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()

def as_in_a_new_process():
    "As far as `Checkpoint` knows"
    Checkpoint._finished.clear(), Checkpoint._ended.clear()

def run(case, cb=None, stop=None):
    "Checksums of a run of `case`, None where it was stopped; what it printed, and how many events there were"
    events.sent = 0
    as_in_a_new_process()
    learn,fits = crash.CASES[case](Path('.')) if isinstance(case, str) else case()
    learn.add_cb(StopAt(stop))
    with contextlib.redirect_stdout(io.StringIO()) as out, learn.no_bar():
        try: fits(cb or [])
        except Stopped: return None,out.getvalue(),events.sent
        finally: leave_autocast()
    return crash.digests(learn),out.getvalue(),events.sent

def digits(cbs=None, n=250, epochs=2, dls=None, how='fit_one_cycle', **kwargs):
    "A case: a learner that reads digits, and its fits"
    def make():
        learn = digits_learner(cbs() if cbs else None, n=n, bs=32, **kwargs)
        if dls: learn.dls = dls(learn.dls)
        return learn,lambda cb: getattr(learn, how)(epochs, 1e-2, cbs=cb)
    return make

@cache
def whole(**kwargs):
    "Checksums of a run of `digits` that nothing stops"
    return run(digits(**kwargs))[0]

# Everywhere
@pytest.mark.parametrize('case', ['tabular','cnn','language','accumulation'])
def test_goes_on_from_anywhere(case):
    "Stopped at an event, and once more on the way; `make soak-crash` does it at all of them"
    want,_,events = run(case)
    for n in some(range(events//5, events, events//5), 1 + (case=='cnn')):
        path = Path(f'run-{n}')
        assert run(case, Checkpoint(path, steps=3), stop=n)[0] is None
        run(case, Checkpoint(path, steps=3), stop=n//2)
        assert run(case, Checkpoint(path, steps=3))[0]==want, n

@pytest.mark.parametrize('args', [
    dict(), dict(epochs=None, steps=1), dict(epochs=None, minutes=0), dict(steps=2, background=False),
    dict(epochs=2), dict(keep=1, steps=3)], ids=str)
def test_when_to_save(args):
    want,_,events = run(case := digits(n=130))      # 4 batches an epoch
    for n in some(range(12, events+1, events//4), 2):
        path = Path(f'run-{n}')
        run(case, Checkpoint(path, **args), stop=n)
        assert run(case, Checkpoint(path, **args))[0]==want, n

@pytest.mark.parametrize('how', ['fit','fit_one_cycle','fit_flat_cos','fine_tune'])
def test_finished(how):
    "The same script again returns at once, with the same final state"
    case = digits(how=how)
    want = run(case)[0]
    assert run(case, Checkpoint('run'))[0]==want
    got,out,events = run(case, Checkpoint('run'))
    assert got==want and out.count('found the fit finished')==(2 if how=='fine_tune' else 1) and events<10

def between(seen):
    def make():
        learn = digits_learner(n=250, bs=32)
        def fits(cb):
            learn.fit(2, 1e-2, cbs=cb)
            seen.append(crash.digests(learn))
            learn.fit(1, 1e-3, cbs=cb)
        return learn,fits
    return make

def test_between_fits():
    "Code between two fits sees the state after the first, also when the second goes on"
    seen = []
    want,_,events = run(between(seen))
    for n in (events-20, events-3, None):
        run(between([]), Checkpoint(f'run{n}', steps=2), stop=n)
        got,out,_ = run(between(seen), Checkpoint(f'run{n}', steps=2))
        assert got==want and seen[-1]==seen[0]
        assert out.count('found the fit finished')==(2 if n is None else 1)

def test_goes_on_after_interruption():
    "In the same process, with the same callback and another learner"
    want = whole()
    cb,threads = Checkpoint('run', steps=3),threading.active_count()
    for n in (70, 30, 40): run(digits(), cb, stop=n)
    assert threading.active_count()==threads and cb._snapshot is None and cb._resuming is None
    assert run(digits(), cb)[0]==want

def test_on_the_learner():
    want = whole()
    def case():
        learn = digits_learner(Checkpoint('run', steps=3), n=250, bs=32)
        return learn,lambda cb: learn.fit_one_cycle(2, 1e-2)
    run(case, stop=90)
    assert run(case)[0]==want

class Counts(ExtCallback):
    "A callback of the user's with a state"
    state_attrs = 'n',
    n = 0
    def after_batch(self): self.n += 1

class Other(Callback):
    "One with methods `state_dict` and `load_state_dict` of its own, and a value that has no plain form"
    def __init__(self): self.seen,self._f = [],noop
    def before_batch(self): self.seen.append(self.iter)
    def state_dict(self): return {'seen': L(self.seen)}
    def load_state_dict(self, state): self.seen = list(state['seen'])

class Plain(Callback):
    "One that has none"
    def __init__(self): self.n,self.best,self.where,self.arr,self._f = 0,{},Path('.'),np.zeros(2),noop
    def after_batch(self):
        self.n += 1
        self.best = {'a': L(self.n), 'b': (1,{2})}
        self.arr[0] += 1

def test_callbacks():
    got = []
    def case():
        cbs = [Counts(), Other(), Plain(), CSVLogger()]
        learn,fits = digits(lambda: cbs)()
        def more(cb):
            fits(cb)
            got.append([cbs[0].n, cbs[1].seen,
                        {k:v for k,v in vars(cbs[2]).items() if k in ('n','best','where')},
                        cbs[2].arr.tolist(), Path('history.csv').read_text()])
        return learn,more
    _,_,events = run(case)
    for n in range(40, events, 62):
        run(case, Checkpoint(f'run{n}', steps=3), stop=n)
        run(case, Checkpoint(f'run{n}', steps=3))
    run(case, Checkpoint(f'run{n}'))    # finished
    assert all(o==got[0] for o in got) and len(got)>2 and got[0][4].count('\n')==3

def test_changed_arguments_count():
    "What a callback was given is not undone, what it has learnt is put back"
    def case(patience):
        stopping = lambda: [EarlyStoppingCallback('accuracy', patience=patience, min_delta=2.)]
        return digits(stopping, epochs=6, how='fit')
    run(case(9), Checkpoint('run'), stop=130)
    _,out,_ = run(case(5), Checkpoint('run'))
    assert 'resumed in epoch 2' in out and 'No improvement since epoch 0' in out
    assert len(list(Path('run').glob('*/*.json')))==2

# Loaders
class Counted(list):
    read = 0
    def __getitem__(self, i):
        Counted.read += 1
        return super().__getitem__(i)

def loaders(make):
    "Has training items read by the loader that `make` makes of them"
    return lambda dls: DataLoaders(make([dls.train_ds[i] for i in range(len(dls.train_ds))]), dls.valid)

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, items): self.items = items
    def __iter__(self): return (self.items[i] for i in np.random.permutation(len(self.items)))
def weighted(items):
    dl = TfmdDL(items, bs=32, shuffle=True, num_workers=0)
    dl.shuffle_fn = lambda idxs: np.random.choice(len(items), len(items)).tolist()
    return dl
def torchs(items, **kwargs): return torch.utils.data.DataLoader(items, batch_size=32, shuffle=True, **kwargs)

def plain(items, bs=32, **kwargs): return TfmdDL(items, bs=bs, shuffle=True, num_workers=0, **kwargs)
LOADERS = dict(
    plain=plain, drop_last=partial(plain, drop_last=True), weighted=weighted, torchs=torchs,
    sorted=lambda o: SortedDL(o, sort_func=lambda x: x[0].sum().item(), bs=32, shuffle=True, num_workers=0),
    random_items=partial(plain, after_item=crash.Noise()),
    random_batches=partial(plain, after_batch=crash.Noise()),
    stream=lambda o: DataLoader(Stream(o), bs=32, n=len(o)),
    one_at_a_time=lambda o: plain([(x[None],y[None]) for x,y in o[:12]], bs=None),
    workers=lambda o: TfmdDL(o, bs=32, shuffle=True, num_workers=2))

@pytest.mark.parametrize('name', some(LOADERS, 6))
def test_loaders(name):
    case = digits(n=170, dls=loaders(LOADERS[name]))        # 4 batches an epoch, and the rest
    want,_,events = run(case)
    for n in some(range(20, events, events//2), 1):
        run(case, Checkpoint(f'run{n}', steps=1), stop=n)
        assert run(case, Checkpoint(f'run{n}', steps=1))[0]==want, n

@pytest.mark.parametrize('workers', [0, 2])
def test_items_are_not_read_again(workers):
    counted = loaders(lambda o: TfmdDL(Counted(o), bs=32, shuffle=True, num_workers=workers))
    case = digits(dls=counted, epochs=1)
    def read(*args, **kwargs):
        Counted.read = 0
        run(*args, **kwargs)
        return Counted.read
    if workers:     # they count for themselves
        dl = case()[0].dls.train
        start = random_state(SimpleNamespace(loaders=[dl]))
        every = [b[1].tolist() for b in dl]
        load_random_state(SimpleNamespace(loaders=[dl]), start)
        assert [b[1].tolist() for b in batches_from(dl, 3, noop)]==every[3:]
        return
    assert read(case)>=200
    read(case, Checkpoint('run', epochs=None, steps=5), stop=60)     # after batch 5 of 7
    assert read(case, Checkpoint('run', epochs=None, steps=5)) <= 200-5*32+1

@pytest.mark.parametrize('n', range(0, 9))
@pytest.mark.parametrize('name', ['plain','workers','torchs','stream'])
def test_batches_from(name, n):
    "The batches from the nth on, and then the loader is as it was"
    items = [(torch.full((1,), float(i)),torch.tensor(i)) for i in range(100)]
    if name=='torchs': dl = torch.utils.data.DataLoader(items, batch_size=16, shuffle=True)
    else:
        dl = LOADERS[name](items)
        dl.bs = 16
    dls = SimpleNamespace(loaders=[dl])
    start = random_state(dls)
    every,attrs = [b[1].tolist() for b in dl],set(vars(dl))
    load_random_state(dls, start)
    ready = []
    assert [b[1].tolist() for b in batches_from(dl, n, lambda: ready.append(1))]==every[n:]
    assert ready==[1] and set(vars(dl))==attrs and skips_exactly(dl)==(name in ('plain','workers'))
    load_random_state(dls, start)
    it = batches_from(dl, n, noop)
    next(it, None); it.close()
    assert set(vars(dl))-{'it'}==attrs-{'it'}

def test_seeded_items():
    "With workers, random items are the same after going on in mid-epoch with `seed_items`, and only with it"
    noisy = loaders(lambda o: TfmdDL(o, bs=32, shuffle=True, num_workers=2, after_item=crash.Noise()))
    case = digits(dls=noisy, epochs=1)
    def interrupted(path, seed_items):
        want = run(case, Checkpoint(f'{path}-whole', epochs=None, seed_items=seed_items))[0]
        args = dict(epochs=None, steps=3, seed_items=seed_items)
        run(case, Checkpoint(path, **args), stop=50)
        got,out,_ = run(case, Checkpoint(path, **args))
        assert 'resumed in epoch 0' in out and 'batch 0' not in out
        return got==want,out
    same,out = interrupted('a', True)
    assert same and 'seed_items' not in out
    same,out = interrupted('b', False)
    assert not same and out.count('seed_items=True makes them the same')==1

def test_limits_are_said_once():
    cb = Checkpoint('run')
    case = digits(dls=loaders(torchs), how='fine_tune')
    assert run(case, cb)[1].count('are read again and dropped')==1
    assert 'checkpoint:' not in run(digits(), Checkpoint('other'))[1]

def test_fresh_processes():
    "Nothing of a process, such as an address or the seed of its hashes, is in the way"
    want,folder = run('cnn')[0],Path('killed')
    folder.mkdir()
    assert exit_code(lambda: crash.train('cnn', folder, ('event', 150, 3000), True))==-signal.SIGKILL
    def go_on():
        with open('out.txt', 'w') as f, contextlib.redirect_stdout(f):
            print('RESULT', crash.train('cnn', folder, None, True)[0])
    assert exit_code(go_on, new=True)==0
    got = Path('out.txt').read_text()
    assert 'resumed in epoch' in got and got.split('RESULT')[1].strip()==str(want)

# Another run
WRONG = dict(model=dict(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), seed=dict(seed=1),
             n=dict(n=300), epochs=dict(epochs=3), how=dict(how='fit'),
             opt=dict(opt_func=RMSProp), torch=dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
             wd=dict(wd=0.3), groups=dict(splitter=lambda m: [params(m[:3]), params(m[3:])]))
WORDS = dict(model='model: 0.weight', seed='seed: 1 here, 42 in', n='training items: 240 here, 200 in',
             epochs='epochs: 3 here, 2 in the checkpoint', how='schedule: ', opt='optimizer: ',
             torch='optimizer: AdamW',
             wd="'wd': 0.3", groups='parameter groups: ')

@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "The folder of a run that was stopped"
    folder = tmp_path_factory.mktemp('begun')/'run'
    run(digits(), Checkpoint(folder, steps=2), stop=60)
    return folder

@pytest.mark.parametrize('what', WRONG)
def test_refuses_another_run(what, begun):
    shutil.copytree(begun, 'run')
    kwargs = dict(WRONG[what])
    if 'model' in kwargs: kwargs['model'] = kwargs['model']()
    if what=='torch': want = r'optimizer: AdamW\('
    before = sorted(Path('run').rglob('*'))
    with pytest.raises(ValueError) as e: run(digits(**kwargs), Checkpoint('run', steps=2))
    for o in (WORDS[what], 'has the checkpoint of another run', 'Use another path, or resume=False'):
        assert o in str(e.value)
    assert sorted(Path('run').rglob('*'))==before

def test_another_run_begins_anew(begun):
    shutil.copytree(begun, 'run')
    run(digits(n=300), Checkpoint('run', steps=2, resume=False), stop=60)
    assert 'resumed' in run(digits(n=300), Checkpoint('run', steps=2))[1]

def test_batch_size_and_lr():
    def case(bs, lr):
        def make():
            learn = digits_learner(n=250, bs=bs)
            return learn,lambda cb: learn.fit_one_cycle(2, lr, cbs=cb)
        return make
    run(case(32, 1e-2), Checkpoint('run'), stop=90)
    for bs,lr,word in ((16, 1e-2, 'batch size: 16 here, 32 in the checkpoint'), (32, 1e-3, 'schedule: ')):
        with pytest.raises(ValueError, match=word): run(case(bs, lr), Checkpoint('run'))

def test_resume_false_starts_anew():
    want = whole()
    run(digits(seed=1), Checkpoint('run', steps=2), stop=90)
    run(digits(), Checkpoint('run', steps=2, resume=False), stop=90)
    for f in sorted(Path('run/fit_0').glob('*.pt'))[:1]: f.write_bytes(b'')
    assert run(digits(), Checkpoint('run', steps=2))[0]==want

def test_fit_of_another_run_is_not_used():
    "The second fit of an older run in the same folder"
    case = digits(how='fine_tune')
    want = run(case)[0]
    run(digits(how='fine_tune', seed=42), Checkpoint('run', steps=2), stop=200)
    assert list(Path('run/fit_1').glob('*.json'))
    run(case, Checkpoint('run', steps=2, resume=False), stop=60)
    got,out,_ = run(case, Checkpoint('run', steps=2))
    assert got==want and 'fit_1 is from another run than fit_0' in out

def test_extend():
    longer = digits(how='fit', epochs=4)
    want = run(longer)[0]
    for stop in some((60, None, 120), 2):
        path = f'run{stop}'
        run(digits(how='fit', epochs=2), Checkpoint(path, steps=3), stop=stop)
        with pytest.raises(ValueError, match='epochs: 4 here, 2 in'): run(longer, Checkpoint(path))
        got,_,_ = run(longer, Checkpoint(path, extend=True))
        assert got=={**want, 'model': got['model']}==want
    run(digits(), Checkpoint('cycle'))
    with pytest.raises(ValueError, match='extend=True allows more epochs only, in fits without a schedule'):
        run(digits(epochs=3), Checkpoint('cycle', extend=True))
    run(digits(how='fit'), Checkpoint('short'))
    with pytest.raises(ValueError, match='epochs: 1 here, 2 in the checkpoint'):
        run(digits(how='fit', epochs=1), Checkpoint('short', extend=True))

# Files
@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A folder with two checkpoints of a run, and its checksums"
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('saved')
    want = whole(epochs=1)
    run(digits(epochs=1), Checkpoint(folder, epochs=None, steps=3, background=False), stop=55)
    assert len(list(folder.glob('*/*.pt')))==2
    return folder,want

def damaged(good, r):
    "Kinds of damage"
    for n in (0, 1, 30, 1000, len(good)//2, len(good)-1): yield f'first {n} bytes', good[:n]
    for _ in range(3):
        i = r.randrange(len(good))
        yield f'flipped byte {i}', good[:i]+bytes([good[i]^(1<<r.randrange(8))])+good[i+1:]
    yield 'twice', good*2
    yield 'noise', r.randbytes(len(good))
    yield 'text', b'not a checkpoint'
    b = io.BytesIO()
    torch.save({'state': Bomb(), 'about': {}}, b)
    yield 'code', b.getvalue()
    yield 'pickle', pickle.dumps(Bomb())

class Bomb:
    def __reduce__(self): return os.mkdir,('code-was-run',)

@pytest.mark.parametrize('kind', ['pt','json'])
def test_damaged_files(saved, kind):
    "A line that names the file; the one before is used, or none; the same bits in the end; no code is run"
    folder,want = saved
    newest = sorted(folder.glob(f'*/*.{kind}'))[-1]
    n = 0
    for what,content in some(damaged(newest.read_bytes(), random.Random(0)), 7):
        for both in (False, True):
            n += 1
            shutil.copytree(folder, path := Path(f'run-{n}'))
            for f in sorted(path.glob(f'*/*.{kind}'))[0 if both else -1:]: f.write_bytes(content)
            got,out,_ = run(digits(epochs=1), Checkpoint(path))
            lines = [o for o in out.splitlines() if o.startswith('checkpoint: ')]
            flipped = kind=='json' and what.startswith('flipped')
            assert got==want, (what, both)
            if flipped and len(lines)==1: assert 'resumed in epoch 0, batch 6' in lines[0]  # only for people
            elif flipped: assert all(any(w in o for w in ('00000','resumed','starts')) for o in lines), lines
            elif both:
                assert len(lines)==3 and all(f'{o:06}.{kind}' in l for o,l in zip((2,1), lines)), lines
                assert lines[2].endswith('can be used: training starts from the beginning')
            else: assert f'000002.{kind}: ' in lines[0] and 'resumed in epoch 0, batch 3' in lines[1], lines
            shutil.rmtree(path)
    assert n>=14 and not Path('code-was-run').exists()

@pytest.mark.parametrize('background', [True, False])
@pytest.mark.parametrize('no', [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_failed_writes(background, no, monkeypatch):
    "One line for each, training goes on, and what was there is still there; or the fit stops"
    want,real,fails = whole(),os.fsync,[]
    def fsync(fd):
        if fails: raise OSError(no, os.strerror(no))
        real(fd)
    monkeypatch.setattr(os, 'fsync', fsync)
    class Break(Callback):
        def before_batch(self):
            thread = self.checkpoint._writer._thread
            if thread: thread.join()    # each save has ended before the next
            if self.train_iter==5: fails.append(1)
    args = dict(epochs=None, steps=2, background=background)
    case = digits(lambda: [Break()])
    got,out,_ = run(case, Checkpoint('run', **args))
    lines = [o for o in out.splitlines() if o.startswith('checkpoint: could not save')]
    assert got==want and lines and not list(Path('.').rglob('*.tmp'))
    assert all(os.strerror(no) in o and 'cannot write run/fit_0/0' in o for o in lines)
    assert len(lines)>=(3 if background else 5), lines
    fails.clear()
    got,out,_ = run(digits(), Checkpoint('run', **args))
    assert got==want and 'resumed in epoch 0' in out
    fails.clear()
    with pytest.raises(OSError, match=os.strerror(no)):
        run(case, Checkpoint('other', on_error='stop', **args))
    fails.clear()
    assert run(digits(), Checkpoint('other', **args))[0]==want

def test_error_of_the_writer_is_said_at_the_next_batch(monkeypatch):
    real,seen = module.StateFiles.save,[]
    def save(self, *args):
        raise OSError(errno.ENOSPC, 'no space')
    monkeypatch.setattr(module.StateFiles, 'save', save)
    class Look(Callback):
        order = 2001
        def after_batch(self):
            self.checkpoint._writer._thread and self.checkpoint._writer._thread.join()
            seen.append(len(self.checkpoint.records))
    run(digits(lambda: [Look()], epochs=1), Checkpoint('run', epochs=None, steps=3))
    assert seen[:4]==[0,0,0,1]

def test_slow_disk_does_not_hold_the_training_up(monkeypatch):
    "While a file is being written, no other one is begun: it is due at the next batch after"
    gate,begun,real = threading.Event(),threading.Semaphore(0),module.StateFiles.save
    def save(self, *args):
        begun.release()
        gate.wait(20)
        return real(self, *args)
    monkeypatch.setattr(module.StateFiles, 'save', save)
    class Open(Callback):
        order = 3000
        def after_batch(self):
            if self.training and self.train_iter==9:
                assert begun.acquire(timeout=20) and not begun.acquire(blocking=False)
                gate.set()
                self.checkpoint._writer._thread.join()
            if self.training and self.train_iter==11: assert begun.acquire(timeout=20)
    run(digits(lambda: [Open()]), Checkpoint('run', epochs=None, steps=2))
    assert gate.is_set()

def test_manifest():
    run(digits(), Checkpoint('run', steps=3), stop=50)
    about = json.loads(next(Path('run/fit_0').glob('*.json')).read_text())['about']
    assert about['at']=={'epoch': 0, 'batch': 3, 'finished': False, 'n_epoch': 2}
    assert about['facts']['batch size']==32 and 'torch' in about['versions']

def test_says_other_versions(monkeypatch):
    run(digits(), Checkpoint('run', steps=3), stop=50)
    monkeypatch.setattr(module.fastai, '__version__', '99')
    assert 'the results may differ in rounding' in run(digits(), Checkpoint('run'))[1]

def test_wrong_arguments():
    for args,word in (({'on_error':'x'},"on_error='x': expected 'continue' or 'stop'"),
                      ({'epochs':0},'epochs=0'), ({'steps':1.5},'steps=1.5'), ({'minutes':-1},'minutes=-1'),
                      ({'resume':1},'resume=1')):
        with pytest.raises((ValueError,TypeError), match=word): Checkpoint('x', **args)

# Preemption
class Signal(Callback):
    def __init__(self, number, when='after_batch', at=9): self.number,self.when,self.at = number,when,at
    def __call__(self, event_name):
        if event_name!=self.when or self.train_iter!=self.at: return
        if self.training==(self.when!='after_validate'): os.kill(os.getpid(), self.number)

def test_preemption_kills_in_time():
    "SIGTERM, which nobody handles: the process ends by it, after the checkpoint; the next one goes on"
    want = whole()
    case = digits(lambda: [Signal(signal.SIGTERM), PreemptionGuard()])
    assert exit_code(lambda: case()[1](Checkpoint('run', epochs=None)))==-signal.SIGTERM
    got,out,_ = run(digits(lambda: [PreemptionGuard()]), Checkpoint('run', epochs=None))
    assert got==want and 'resumed in epoch 1, batch 3' in out

@pytest.mark.parametrize('when,where', [('after_batch','epoch 1, batch 2'), ('after_validate','epoch 0')])
def test_preemption(when, where):
    got,want = [],whole()
    handler = lambda number,frame: got.append(number)
    earlier = {s:signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        cbs = lambda: [Signal(signal.SIGUSR1, when, 9 if when=='after_batch' else 6), PreemptionGuard()]
        _,out,_ = run(digits(cbs), Checkpoint('run', epochs=None))
        assert got==[signal.SIGUSR1] and f'preemption_guard: ended the fit in {where}' in out
        assert 'SIGUSR1; the next run resumes from run' in out
        assert all(signal.getsignal(s) is handler for s in earlier)
        assert run(digits(), Checkpoint('run', epochs=None))[0]==want
        _,out,_ = run(digits(cbs))
        assert got==[signal.SIGUSR1]*2 and 'nothing was saved, as there is no Checkpoint' in out
    finally:
        for s,h in earlier.items(): signal.signal(s, h)

def test_preemption_signals():
    with pytest.raises(ValueError, match='signals=.*expected'): PreemptionGuard([9999])
    assert PreemptionGuard(signal.SIGUSR2).signals==[signal.SIGUSR2]

# Again in the same process
def on_one_learner(fits, stop, cbs=(), new=False):
    "What two calls of `fits` on one learner say and give; the first is interrupted at an event"
    learn,first = digits_learner(list(cbs), n=250, bs=32),Checkpoint('run', steps=1, background=False)
    events.sent = 0
    as_in_a_new_process()
    with learn.no_bar(), contextlib.redirect_stdout(io.StringIO()) as out:
        with pytest.raises(Stopped): fits(learn, [first, StopAt(stop)])
        fits(learn, [Checkpoint('run', steps=1, background=False) if new else first])
    return out.getvalue(),crash.digests(learn)

@pytest.mark.parametrize('new', [False, True])
@pytest.mark.parametrize('stop', [50, 170])
@pytest.mark.parametrize('how', ['fit','fit_one_cycle','fine_tune','mixup'])
def test_the_same_call_again(how, stop, new):
    "A cell of a notebook that was interrupted, run again: on the learner that it has left"
    mixup,how = how=='mixup','fit_flat_cos' if how=='mixup' else how
    def fits(learn, cbs): getattr(learn, how)(3, 1e-2, cbs=[*cbs, *([MixUp()] if mixup else [])])
    want = run(digits(how=how, epochs=3, cbs=(lambda: [MixUp()]) if mixup else None))[0]
    out,got = on_one_learner(fits, stop, new=new)
    assert {k: got[k] for k in ('model','opt','values')}=={k: want[k] for k in ('model','opt','values')}
    assert 'resumed in epoch' in out and out.count('found the fit')==(how=='fine_tune' and stop==170)

@pytest.mark.parametrize('rates', [(.1, .01, .1, .02), (.1, .1, .1)])
def test_a_loop_of_fits_again(rates):
    "It begins again with its first fit; where all fits are alike, with the one that was interrupted"
    def loop(learn, cbs):
        for lr in rates: learn.fit(1, lr, cbs=cbs)
    n = len(rates)
    out,_ = on_one_learner(loop, 60*(n-1)+30)
    assert (out.count('found the fit finished'),out.count('resumed in epoch'))==((n-1, 1) if n==4 else (0, 1))
    assert out.index('resumed') > out.rfind('found')

def test_a_copy_is_a_new_one():
    "Of a learner that has been trained with it: it saves, and does not take the fit for its own"
    learn = digits_learner(Checkpoint('run'), n=250, bs=32)
    def fit(o):
        with o.no_bar(), contextlib.redirect_stdout(io.StringIO()) as out: o.fit(1, 1e-2)
        return out.getvalue()
    fit(learn)
    for make in (copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))):
        same = make(learn.checkpoint)
        assert same._id!=learn.checkpoint._id and (same._fit,same._run,same._fits)==(0,None,[])
    other = copy.deepcopy(learn)
    with pytest.raises(ValueError, match='restart Python'): fit(other)
    other.checkpoint.path = Path('other')
    assert 'checkpoint' not in fit(other) and len(list(Path('other/fit_0').glob('*.pt')))==2

def test_no_attribute_of_fastai_hides_a_method():
    "fastcore gives what is copied an attribute `_state`"
    for o in crash.Callback.__subclasses__() + ExtCallback.__subclasses__():
        if o.__module__.startswith('fastai_callbacks_ext'): assert not hasattr(o, '_state'), o

def test_no_epochs():
    case = digits(epochs=2, how='fine_tune')
    def none_frozen():
        learn,_ = case()
        return learn,lambda cb: learn.fine_tune(2, 1e-2, freeze_epochs=0, cbs=cb)
    want,_,events = run(none_frozen)
    run(none_frozen, Checkpoint('run', steps=3), stop=events//2)
    assert run(none_frozen, Checkpoint('run', steps=3))[0]==want

def test_ended_by_a_signal_that_is_handled():
    "No other fit of the script begins"
    earlier = signal.signal(signal.SIGUSR1, lambda *args: None)
    try:
        case = digits(lambda: [Signal(signal.SIGUSR1, at=2), PreemptionGuard()], how='fine_tune')
        with pytest.raises(ValueError, match='the run in run was ended by SIGUSR1, .*with a new Checkpoint'):
            run(case, Checkpoint('run'))
        assert not Path('run/fit_1').exists()
        want = run(digits(how='fine_tune'))[0]
        assert run(digits(how='fine_tune'), Checkpoint('run'))[0]==want
    finally: signal.signal(signal.SIGUSR1, earlier)

@pytest.mark.parametrize('second', ['other', 'run'])
def test_no_other_fit_begins_when_a_signal_has_ended_one(second):
    "Stages with a Checkpoint each. The same call again goes on, and the next stage may begin when it is done"
    earlier = signal.signal(signal.SIGUSR1, lambda *args: None)
    learn,two = digits_learner(n=250, bs=32),Checkpoint(second)
    fit = lambda *cbs: learn.fit(1, cbs=[*cbs, PreemptionGuard()])
    try:
        with learn.no_bar(), contextlib.redirect_stdout(io.StringIO()) as out:
            fit(one := Checkpoint('run'), Signal(signal.SIGUSR1, at=2))
            said = r'in run was ended by SIGUSR1, and .* Checkpoint\(.run.\)\. .* restart Python'
            for cb in [one, two] if second=='other' else [one]:
                with pytest.raises(ValueError, match=said): fit(cb)
            assert not Path('other').exists()
            fit(Checkpoint('third', resume=False))      # on purpose
            if second=='other': fit(Checkpoint('run'))
            fit(two)
        assert 'resumed in epoch 0, batch 2' in out.getvalue()
    finally: signal.signal(signal.SIGUSR1, earlier)

# Places
def test_files_of_yours_stay():
    Path('run').mkdir()
    Path('run/lock').write_text('mine')
    Path('run/.checkpoint.lock').write_text('mine, too')
    run(digits(epochs=1), Checkpoint('run'))
    assert [Path('run', o).read_text() for o in ('lock','.checkpoint.lock')]==['mine','mine, too']
    class Bad(Callback):
        order = 2500
        def before_fit(self): raise Stopped('stopped')
    Path('empty').mkdir()
    for o in ('empty','new/er'): run(digits(lambda: [Bad()]), Checkpoint(o))
    assert Path('empty').exists() and not Path('new/er').exists()

def test_another_working_directory(tmp_path):
    "A script may change it on the way; messages have the path that was given"
    class Go(Callback):
        def after_epoch(self): os.chdir('/')
    def case():
        os.chdir(tmp_path)
        return digits(lambda: [Go()], how='fine_tune')()
    want,_,events = run(case)
    run(case, Checkpoint('run', steps=2, background=False), stop=events-30)
    got,out,_ = run(case, Checkpoint('run', steps=2, background=False))
    assert got==want and 'from run/fit_1' in out and sorted(os.listdir(tmp_path))==['run']

def test_a_file_is_no_folder():
    Path('file').write_text('')
    for o in ('file','file/run'):
        said = f"path='{o}': expected a folder, but file is a file"
        with pytest.raises(ValueError, match=said): Checkpoint(o)

# Words
def test_a_fit_that_was_ended_early():
    run(digits(epochs=9), Checkpoint('run'))
    case = digits(lambda: [StepLimit(9)], epochs=9, how='fit')
    run(case, Checkpoint('other'))
    _,out,_ = run(case, Checkpoint('other'))
    said = 'where it was stopped (resume=False starts from the beginning)'
    assert f'found the fit finished, after 2 of 9 epochs, {said}' in out
    assert 'after 9 epochs, from run' in run(digits(epochs=9), Checkpoint('run'))[1]
    with pytest.raises(ValueError, match='epochs: 3 here, 9 in the checkpoint; extend=True allows more'):
        run(digits(epochs=3, how='fit'), Checkpoint('other', extend=True))

def test_a_loop_of_its_own_is_said():
    class Own(module.Learner):
        def all_batches(self): super().all_batches()
    def case():
        learn,fits = digits()()
        learn.__class__ = Own
        return learn,fits
    assert 'does not use `Own.all_batches`' in run(case, Checkpoint('run'))[1]

def test_items_of_a_run_without_a_seed():
    "They are seeded as in the process before"
    def case():
        learn,fits = digits(dls=loaders(lambda o: TfmdDL(o, bs=32, shuffle=True, num_workers=1,
                                                         after_item=crash.Noise())), epochs=1)()
        torch.manual_seed(seeds.pop())
        return learn,fits
    seeds = [2**40, 2**41, 2**41]
    args = dict(epochs=None, steps=3, seed_items=True)
    want = run(case, Checkpoint('whole', **args))[0]
    run(case, Checkpoint('run', **args), stop=50)
    assert run(case, Checkpoint('run', **args))[0]==want

def test_of_an_older_version():
    "A checkpoint in another form is refused, and stays as it is"
    run(digits(), Checkpoint('run', steps=2), stop=60)
    files = module.StateFiles(Path('run/fit_0'))
    state,about = files.load(print)
    own = state['own'][0]['state']
    own['callbacks'] = own.pop('objects')
    files.save(state, about)
    before = {f: f.read_bytes() for f in Path('run').rglob('*.*')}
    with pytest.raises(ValueError, match="run.fit_0 has a checkpoint of an older version .* resume=False"):
        run(digits(), Checkpoint('run', steps=2))
    assert {f: f.read_bytes() for f in Path('run').rglob('*.*')}==before
